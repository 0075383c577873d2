// Rows of few classes, kLanes of them side by side: a vector holds one class of each, so that what is done once per row
// costs a kLanes-th, and no vector is part empty. Included by one file per ISA level.
#pragma once

#include <limits>

#include "cpu/kernels.h"
#include "math/distillation.h"
#include "row_task.h"

namespace kdkernels {
namespace cpu {
namespace {

constexpr int kShortClasses = 32, kLanes = 16;

// Rows of any divergence; see cpu/divergence.h.
template <class T>
void divergence_rows_of(const LossParams& p, int64_t begin, int64_t end, double* row_loss);

template <class F>
KD_FN void for_lanes(F f) {
#pragma omp simd
  for (int r = 0; r < kLanes; ++r) f(r);
}

// kLanes rows at a time of one call. Terms: the divergence's policy of math/divergence.h.
template <class T, class Terms>
class ShortRows {
  using Real = typename Compute<T>::type;
  using Lanes = Real[kLanes];

 public:
  ShortRows(const LossParams& params, math::CrossEntropy hard, const math::Parameters<Real>& of)
      : p(params),
        parameters(of),
        has_own_exponentials(hard == math::CrossEntropy::kOwn),
        has_labels(hard != math::CrossEntropy::kNone),
        classes(static_cast<int>(p.classes)),
        scale(static_cast<Real>(math::kLog2E / p.temperature)),
        inv_temperature(static_cast<Real>(1 / p.temperature)),
        of_label(static_cast<Real>((1 - p.alpha) * (1 - p.label_smoothing))),
        of_classes(static_cast<Real>((1 - p.alpha) * p.label_smoothing / p.classes)) {}

  void run(int64_t begin, int64_t end, double* row_loss) {
    for (first = begin; first < end; first += kLanes) {
      count = static_cast<int>(end - first < kLanes ? end - first : kLanes);
      read();
      add_exponentials();
      normalize();
      if (math::needs_exact_sums(p.divergence)) refine_sums();
      add_terms();
      finish_loss();
      if (p.gradient != nullptr) make_gradient();
      for (int r = 0; r < count; ++r) write(r, row_loss);
    }
  }

 private:
  template <class F>
  KD_INLINE_LAMBDA void for_classes(F f) const {
    for (int c = 0; c < classes; ++c) for_lanes([&](int r) KD_INLINE_LAMBDA { f(c, r); });
  }

  // Rows that are left out, and those behind the last one, are of logits 0.
  void read() {
    for (int r = 0; r < kLanes; ++r) {
      const int64_t row = first + r;
      const bool is_row = r < count;
      weight[r] = is_row && p.weight != nullptr ? static_cast<const Real*>(p.weight)[row] : Real(1);
      kept[r] =
          is_row && weight[r] != 0 && (p.labels == nullptr || p.labels[row] != p.ignore_index);
      label[r] = kept[r] && p.labels != nullptr ? static_cast<int>(p.labels[row]) : 0;
      const T* z_row = row_at<T>(p.student, p.student_rows, row);
      const T* t_row = row_at<T>(p.teacher_data[0], p.teacher_rows[0], row);
      for (int c = 0; c < classes; ++c) {
        z[c][r] = kept[r] ? widen(z_row[c]) : Real(0);
        t[c][r] = kept[r] ? widen(t_row[c]) : Real(0);
      }
    }
  }

  void add_exponentials() {
    for_lanes([&](int r) KD_INLINE_LAMBDA {
      max_s[r] = max_t[r] = -std::numeric_limits<Real>::max();
      sum_s[r] = sum_t[r] = sum_hard[r] = sum_z[r] = 0;
    });
    for_classes([&](int c, int r) KD_INLINE_LAMBDA {
      max_s[r] = z[c][r] > max_s[r] ? z[c][r] : max_s[r];
      max_t[r] = t[c][r] > max_t[r] ? t[c][r] : max_t[r];
    });
    for (int r = 0; r < kLanes; ++r) label_z[r] = has_labels ? z[label[r]][r] - max_s[r] : Real(0);
    for_classes([&](int c, int r) KD_INLINE_LAMBDA {
      const Real shifted = z[c][r] - max_s[r];
      q[c][r] = math::exp2_nonpositive(shifted * scale);
      a[c][r] = math::exp2_nonpositive((t[c][r] - max_t[r]) * scale);
      sum_s[r] += q[c][r];
      sum_t[r] += a[c][r];
      sum_z[r] += shifted;
    });
    if (!has_own_exponentials) return;
    for_classes([&](int c, int r) KD_INLINE_LAMBDA {
      hard[c][r] = math::exp2_nonpositive((z[c][r] - max_s[r]) * static_cast<Real>(math::kLog2E));
      sum_hard[r] += hard[c][r];
    });
  }

  void normalize() {
    for_lanes([&](int r) KD_INLINE_LAMBDA {
      const Real offset = max_t[r] - max_s[r];
      const bool far = math::magnitude(offset) > Real(1);
      early[r] = far ? offset : Real(0);
      late[r] = far ? Real(0) : offset;
      inv_s[r] = math::inverse(sum_s[r]);
      inv_t[r] = math::inverse(sum_t[r]);
      above[r] = math::log_normal(sum_s[r] * inv_t[r]);
      log2_s[r] = math::log_normal(sum_s[r]) * static_cast<Real>(math::kLog2E);
      log2_t[r] = math::log_normal(sum_t[r]) * static_cast<Real>(math::kLog2E);
      log_hard[r] = math::log_normal(has_own_exponentials ? sum_hard[r] : sum_s[r]);
    });
    for_classes([&](int c, int r) KD_INLINE_LAMBDA {
      q[c][r] *= inv_s[r];
      a[c][r] *= inv_t[r];
    });
  }

  // log p - log q, as in math::ElementNorm.
  KD_INLINE_LAMBDA Real difference(int c, int r) const {
    return math::fma(t[c][r] - early[r] - z[c][r] - late[r], inv_temperature, above[r]);
  }

  void refine_sums() {
    alignas(64) Lanes excess = {};
    for_classes([&](int c, int r) KD_INLINE_LAMBDA {
      excess[r] += math::difference(q[c][r], a[c][r], -difference(c, r));
    });
    for_lanes([&](int r) KD_INLINE_LAMBDA { above[r] += math::log_of_excess(excess[r]); });
  }

  // The divergence; its derivatives take the place of the teacher's probabilities.
  void add_terms() {
    for_lanes([&](int r) KD_INLINE_LAMBDA { loss[r] = sum_a[r] = 0; });
    const math::Parameters<Real> of = parameters;  // no store can change a copy
    for_classes([&](int c, int r) KD_INLINE_LAMBDA {
      const Real d = difference(c, r);
      const math::Element<Real> element = {a[c][r],
                                           q[c][r],
                                           math::smaller_over_larger(d),
                                           d,
                                           (t[c][r] - max_t[r]) * scale - log2_t[r],
                                           (z[c][r] - max_s[r]) * scale - log2_s[r]};
      const math::ClassShare<Real> share = Terms::share(element, of);
      loss[r] += share.f;
      a[c][r] = share.a;
      sum_a[r] += a[c][r];
    });
  }

  // Both losses together, and the factors of the gradient.
  void finish_loss() {
    const bool smooth = has_labels && p.label_smoothing > 0;
    const Real of_divergence = static_cast<Real>(p.alpha * p.temperature * p.temperature),
               of_soft = static_cast<Real>(p.alpha * p.temperature),
               of_both = of_label + of_classes * static_cast<Real>(classes);
    const Real unit = p.denominator.number != 0
                          ? static_cast<Real>(p.gradient_scale / p.denominator.number)
                          : Real(0);
    for_lanes([&](int r) KD_INLINE_LAMBDA {
      const Real factor = weight[r] * unit;
      loss[r] *= of_divergence;
      of_a[r] = of_soft * factor;
      of_q[r] = -of_a[r] * sum_a[r];
      of_hard[r] = uniform[r] = at_label[r] = 0;
      if (has_labels) {
        loss[r] += of_both * log_hard[r] - of_label * label_z[r] -
                   (smooth ? of_classes * sum_z[r] : Real(0));
        uniform[r] = of_classes * factor;
        at_label[r] = of_label * factor;
        of_hard[r] = has_own_exponentials ? of_both * factor * math::inverse(sum_hard[r]) : Real(0);
        of_q[r] += has_own_exponentials ? Real(0) : of_both * factor;
      }
    });
  }

  // In the place of the student's logits.
  void make_gradient() {
    for_classes([&](int c, int r) KD_INLINE_LAMBDA {
      z[c][r] = math::fma(of_a[r], a[c][r], math::fma(of_q[r], q[c][r], -uniform[r]));
    });
    if (has_own_exponentials) {
      for_classes([&](int c, int r)
                      KD_INLINE_LAMBDA { z[c][r] = math::fma(of_hard[r], hard[c][r], z[c][r]); });
    }
    for (int r = 0; has_labels && r < kLanes; ++r) z[label[r]][r] -= at_label[r];
  }

  void write(int r, double* row_loss) const {
    const int64_t row = first + r;
    row_loss[row] = kept[r] ? static_cast<double>(weight[r]) * static_cast<double>(loss[r]) : 0.0;
    const bool sound = loss[r] - loss[r] == 0 && sum_s[r] > 0 && sum_t[r] > 0;
    if (kept[r] && !sound) {
      divergence_rows_of<T>(p, row, row + 1, row_loss);
    } else if (p.gradient != nullptr) {
      T* g_row = row_at<T>(p.gradient, p.gradient_rows, row);
      for (int c = 0; c < classes; ++c) narrow(kept[r] ? z[c][r] : Real(0), g_row[c]);
    }
  }

  const LossParams& p;
  const math::Parameters<Real> parameters;
  const bool has_own_exponentials, has_labels;  // of the cross-entropy
  const int classes;
  const Real scale, inv_temperature;
  const Real of_label, of_classes;  // cross-entropy's share at the label and at each class
  int64_t first;
  int count;  // rows of the kLanes
  // Logits, probabilities and, in the place of p's, a of math::ClassShare; cross-entropy's own exponentials.
  alignas(64) Lanes z[kShortClasses], t[kShortClasses], q[kShortClasses], a[kShortClasses],
      hard[kShortClasses];
  alignas(64) Lanes weight, max_s, max_t, sum_s, sum_t, sum_hard, sum_z, label_z, log_hard;
  // d = log p - log q = (t - early - z - late) / T + above.
  alignas(64) Lanes inv_s, inv_t, early, late, above, log2_s, log2_t;
  alignas(64) Lanes loss, sum_a, of_a, of_q, of_hard, uniform, at_label;
  int label[kLanes];
  bool kept[kLanes];
};

}  // namespace
}  // namespace cpu
}  // namespace kdkernels
