// The dense row walker. Included by one file an ISA level.
//
// A row is visited in blocks that stay in L1. For each block: its largest logits, then its exponentials
// relative to the largest so far, which are summed (fp32 within a block, fp64 across blocks) and kept.
// Once the row's sums are known the gradient is made from the kept exponentials, each block's brought to
// the row's final maxima by one factor. So z and t are read once, the gradient is written once, and each
// exponential is computed once; the kept ones take 2 (3 with cross-entropy's own) acc values a class.
#pragma once

#include <cmath>
#include <cstdlib>
#include <limits>

#include "cpu/kernels.h"
#include "cpu/storage.h"
#include "math/distillation.h"
#include "row_task.h"

namespace kdkernels {
namespace cpu {
namespace {

constexpr int kBlock = 1024;  // 3 logit or gradient blocks of 4 KB beside 12 KB of exponentials: L1
// Elements summed in fp32 before fp64 takes over: a dominant class would otherwise swallow the small ones
// that follow it in its lane.
constexpr int kFold = 128;
constexpr int kPad = 16;  // the widest vector: block loops run over a multiple of it

// Rows of any divergence; see cpu/divergence.h.
template <class T>
void divergence_rows_of(const DivergenceParams& p, int64_t begin, int64_t end, double* row_loss);

KD_FN double exp2_fp64(double x) { return x == 0 ? 1.0 : __builtin_exp2(x); }

// Exponentials of the rows a thread works on; grows, and is freed with the thread.
struct RowBuffer {
  void* data = nullptr;
  size_t size = 0;
  ~RowBuffer() { std::free(data); }
  void* reserve(size_t bytes) {
    if (bytes > size) {
      std::free(data);
      size = (bytes + 63) / 64 * 64;
      data = std::aligned_alloc(64, size);
      if (data == nullptr) std::abort();
    }
    return data;
  }
};

template <class Real>
KD_FN Real block_max(const Real* x, int padded) {
  Real m = -std::numeric_limits<Real>::max();
#pragma omp simd reduction(max : m)
  for (int i = 0; i < padded; ++i) m = x[i] > m ? x[i] : m;
  return m;
}

// The largest logits that a block's exponentials are relative to.
template <class Real>
struct Maxima {
  Real s, t;
};

// Exponentials of one block and their sums.
template <class Policy, math::CrossEntropy kHard, class Real>
KD_FN math::RowSums<double> block_sums(const Real* z, const Real* t, int padded, Maxima<Real> max,
                                       Real scale, Real* ex, Real* ey, Real* eh) {
  math::RowSums<double> sums = {max.s, max.t, 0, 0, 0, 0, 0, 0};
  for (int first = 0; first < padded; first += kFold) {
    int last = first + kFold < padded ? first + kFold : padded;
    Real sum_s = 0, sum_t = 0, term = 0, sum_hard = 0;
#pragma omp simd reduction(+ : sum_s, sum_t, term, sum_hard)
    for (int i = first; i < last; ++i) {
      Real shifted = z[i] - max.s;
      Real x = shifted * scale, y = (t[i] - max.t) * scale;
      Real a = math::exp2_nonpositive(x), b = math::exp2_nonpositive(y);
      ex[i] = a;
      ey[i] = b;
      sum_s += a;
      sum_t += b;
      term += Policy::term(x, y, a, b);
      if constexpr (kHard == math::CrossEntropy::kOwn) {
        Real h = math::exp2_nonpositive(shifted * static_cast<Real>(math::kLog2E));
        eh[i] = h;
        sum_hard += h;
      }
    }
    sums.sum_s += sum_s;
    sums.sum_t += sum_t;
    sums.term += term;
    sums.sum_hard += sum_hard;
  }
  return sums;
}

template <class T, class Policy, math::CrossEntropy kHard>
void rows(const DistillationParams& p, int64_t begin, int64_t end, double* row_loss) {
  using Real = typename Compute<T>::type;
  using Sums = math::RowSums<double>;
  static thread_local RowBuffer buffer;
  constexpr int kKept = kHard == math::CrossEntropy::kOwn ? 3 : 2;
  constexpr Real kLowest = -std::numeric_limits<Real>::max();
  constexpr Real kInfinity = std::numeric_limits<Real>::infinity();
  alignas(64) Real z_block[kBlock], t_block[kBlock], g_block[kBlock], kept_block[kKept * kBlock];

  // Rows of one block keep their exponentials on the stack; statistics alone reuse one block.
  int64_t blocks = (p.classes + kBlock - 1) / kBlock;
  bool keep = p.gradient != nullptr;
  Real* kept = kept_block;
  Maxima<Real> only_maxima, *maxima = &only_maxima;
  if (keep && blocks > 1) {
    size_t values = static_cast<size_t>(kKept * kBlock * blocks);
    kept =
        static_cast<Real*>(buffer.reserve(values * sizeof(Real) + blocks * sizeof(Maxima<Real>)));
    maxima = reinterpret_cast<Maxima<Real>*>(kept + values);
  }
  // The same rounded factor for elements and for sums.
  const Real scale = static_cast<Real>(math::kLog2E / p.temperature);

  const DivergenceParams general = forward_kl(p);

  for (int64_t row = begin; row < end; ++row) {
    const T* z_row = static_cast<const T*>(p.student) + row * p.student_stride;
    const T* t_row = static_cast<const T*>(p.teacher) + row * p.teacher_stride;
    T* g_row = static_cast<T*>(p.gradient) + (keep ? row * p.gradient_stride : 0);
    int64_t label = p.labels != nullptr ? p.labels[row] : -1;
    double weight = p.weight != nullptr ? static_cast<const Real*>(p.weight)[row] : 1.0;
    if ((p.labels != nullptr && label == p.ignore_index) || weight == 0) {
      row_loss[row] = 0;
      if (keep) std::memset(static_cast<void*>(g_row), 0, p.classes * sizeof(T));
      continue;
    }
    double label_z = 0;
    if constexpr (kHard != math::CrossEntropy::kNone) label_z = widen(z_row[label]);

    Sums sums = {};
    Maxima<Real> max = {kLowest, kLowest};
    for (int64_t b = 0; b < blocks; ++b) {
      int n = static_cast<int>(p.classes - b * kBlock < kBlock ? p.classes - b * kBlock : kBlock);
      int padded = (n + kPad - 1) / kPad * kPad;
      const Real* z = load_block(z_row + b * kBlock, n, padded, -kInfinity, z_block);
      const Real* t = load_block(t_row + b * kBlock, n, padded, -kInfinity, t_block);
      max.s = math::larger(block_max(z, padded), max.s);
      max.t = math::larger(block_max(t, padded), max.t);
      Real* ex = kept + (keep ? kKept * kBlock * b : 0);
      Sums part =
          block_sums<Policy, kHard>(z, t, padded, max, scale, ex, ex + kBlock, ex + 2 * kBlock);
      if (kHard != math::CrossEntropy::kNone && p.label_smoothing > 0) {
        for (int i = 0; i < n; ++i) part.sum_z += static_cast<double>(z[i]) - max.s;
        part.count = n;
      }
      sums = b == 0 ? part
                    : math::merge<Policy>(kHard, sums, part, static_cast<double>(scale), exp2_fp64);
      if (keep) maxima[b] = max;
    }

    double factor = p.denominator != 0 ? weight / p.denominator * p.gradient_scale : 0.0;
    math::RowResult<double> result = math::finish_row<Policy, double>(
        kHard, sums, 1.0 / static_cast<double>(p.classes), p.temperature, p.alpha,
        p.label_smoothing, label_z - max.s, factor);
    row_loss[row] = weight * result.loss;
    if (result.divergence < math::kNearRow) {
      divergence_rows_of<T>(general, row, row + 1, row_loss);
      continue;
    }
    if (!keep) continue;

    for (int64_t b = 0; b < blocks; ++b) {
      int n = static_cast<int>(p.classes - b * kBlock < kBlock ? p.classes - b * kBlock : kBlock);
      int padded = (n + kPad - 1) / kPad * kPad;
      double grown_s = static_cast<double>(maxima[b].s) - max.s,
             grown_t = static_cast<double>(maxima[b].t) - max.t;
      Real of_ex = static_cast<Real>(result.of_ex * exp2_fp64(grown_s * scale));
      Real of_ey = static_cast<Real>(result.of_ey * exp2_fp64(grown_t * scale));
      Real uniform = static_cast<Real>(result.uniform);
      const Real *ex = kept + kKept * kBlock * b, *ey = ex + kBlock;
      bool direct = sizeof(T) == sizeof(Real) && n == padded;
      Real* g = direct ? reinterpret_cast<Real*>(g_row + b * kBlock) : g_block;
      if constexpr (kHard == math::CrossEntropy::kOwn) {
        Real of_hard = static_cast<Real>(result.of_hard * exp2_fp64(grown_s * math::kLog2E));
        const Real* eh = ex + 2 * kBlock;
#pragma omp simd
        for (int i = 0; i < padded; ++i) {
          g[i] =
              math::fma(of_ex, ex[i], math::fma(of_ey, ey[i], math::fma(of_hard, eh[i], -uniform)));
        }
      } else {
#pragma omp simd
        for (int i = 0; i < padded; ++i) {
          g[i] = math::fma(of_ex, ex[i], math::fma(of_ey, ey[i], -uniform));
        }
      }
      int64_t at = label - b * kBlock;
      if (kHard != math::CrossEntropy::kNone && at >= 0 && at < n) {
        g[at] -= static_cast<Real>(result.at_label);
      }
      if (!direct) {
        T* out = g_row + b * kBlock;
        for (int i = 0; i < n; ++i) narrow(g[i], out[i]);
      }
    }
  }
}

// Short rows, kLanes of them side by side: a vector holds one class of each, so that what is done once a row
// costs a kLanes-th, and no vector is part empty.
constexpr int kShortClasses = 32, kLanes = 16;

template <class T, class Policy, math::CrossEntropy kHard>
void short_rows(const DistillationParams& p, int64_t begin, int64_t end, double* row_loss) {
  using Real = typename Compute<T>::type;
  constexpr bool kOwn = kHard == math::CrossEntropy::kOwn,
                 kLabels = kHard != math::CrossEntropy::kNone;
  const int classes = static_cast<int>(p.classes);
  const Real scale = static_cast<Real>(math::kLog2E / p.temperature);
  const DivergenceParams general = forward_kl(p);
  alignas(64) Real z[kShortClasses][kLanes], t[kShortClasses][kLanes];
  alignas(64) Real max_s[kLanes], max_t[kLanes], sum_s[kLanes], sum_t[kLanes], term[kLanes],
      sum_hard[kLanes], sum_z[kLanes];
  alignas(64) Real of_ex[kLanes], of_ey[kLanes], of_hard[kLanes], uniform[kLanes], at_label[kLanes];

  for (int64_t first = begin; first < end; first += kLanes) {
    const int n = static_cast<int>(end - first < kLanes ? end - first : kLanes);
    double weight[kLanes];
    int64_t label[kLanes];
    bool kept[kLanes], one_pass[kLanes];
    for (int r = 0; r < kLanes; ++r) {
      const int64_t row = first + r;
      weight[r] = r < n && p.weight != nullptr ? static_cast<const Real*>(p.weight)[row] : 1.0;
      label[r] = r < n && p.labels != nullptr ? p.labels[row] : 0;
      kept[r] = r < n && weight[r] != 0 && (p.labels == nullptr || label[r] != p.ignore_index);
      const T* z_row = static_cast<const T*>(p.student) + row * p.student_stride;
      const T* t_row = static_cast<const T*>(p.teacher) + row * p.teacher_stride;
      for (int c = 0; c < classes; ++c) {
        z[c][r] = kept[r] ? widen(z_row[c]) : Real(0);
        t[c][r] = kept[r] ? widen(t_row[c]) : Real(0);
      }
    }

    for (int r = 0; r < kLanes; ++r) {
      max_s[r] = max_t[r] = -std::numeric_limits<Real>::max();
      sum_s[r] = sum_t[r] = term[r] = sum_hard[r] = sum_z[r] = 0;
    }
    for (int c = 0; c < classes; ++c) {
      for (int r = 0; r < kLanes; ++r) {
        max_s[r] = z[c][r] > max_s[r] ? z[c][r] : max_s[r];
        max_t[r] = t[c][r] > max_t[r] ? t[c][r] : max_t[r];
      }
    }
    double label_z[kLanes];
    for (int r = 0; r < kLanes; ++r) {
      label_z[r] = kLabels && kept[r] ? static_cast<double>(z[label[r]][r]) - max_s[r] : 0.0;
    }
    // Exponentials take the place of the logits they are of.
    alignas(64) Real hard[kOwn ? kShortClasses : 1][kLanes];
    for (int c = 0; c < classes; ++c) {
#pragma omp simd
      for (int r = 0; r < kLanes; ++r) {
        Real shifted = z[c][r] - max_s[r];
        Real x = shifted * scale, y = (t[c][r] - max_t[r]) * scale;
        Real a = math::exp2_nonpositive(x), b = math::exp2_nonpositive(y);
        z[c][r] = a;
        t[c][r] = b;
        sum_s[r] += a;
        sum_t[r] += b;
        term[r] += Policy::term(x, y, a, b);
        sum_z[r] += shifted;
        if constexpr (kOwn) {
          Real h = math::exp2_nonpositive(shifted * static_cast<Real>(math::kLog2E));
          hard[c][r] = h;
          sum_hard[r] += h;
        }
      }
    }

    for (int r = 0; r < n; ++r) {
      of_ex[r] = of_ey[r] = of_hard[r] = uniform[r] = 0;
      one_pass[r] = true;
      row_loss[first + r] = 0;
      if (!kept[r]) continue;
      math::RowSums<double> sums = {max_s[r], max_t[r],    sum_s[r], sum_t[r],
                                    term[r],  sum_hard[r], sum_z[r], static_cast<double>(classes)};
      double factor = p.denominator != 0 ? weight[r] / p.denominator * p.gradient_scale : 0.0;
      math::RowResult<double> result =
          math::finish_row<Policy, double>(kHard, sums, 1.0 / classes, p.temperature, p.alpha,
                                           p.label_smoothing, label_z[r], factor);
      row_loss[first + r] = weight[r] * result.loss;
      one_pass[r] = !(result.divergence < math::kNearRow);
      of_ex[r] = static_cast<Real>(result.of_ex);
      of_ey[r] = static_cast<Real>(result.of_ey);
      of_hard[r] = static_cast<Real>(result.of_hard);
      uniform[r] = static_cast<Real>(result.uniform);
      at_label[r] = static_cast<Real>(result.at_label);
    }
    if (p.gradient != nullptr) {
      for (int c = 0; c < classes; ++c) {
#pragma omp simd
        for (int r = 0; r < kLanes; ++r) {
          Real g = -uniform[r];
          if constexpr (kOwn) g = math::fma(of_hard[r], hard[c][r], g);
          z[c][r] = math::fma(of_ex[r], z[c][r], math::fma(of_ey[r], t[c][r], g));
        }
      }
    }
    for (int r = 0; r < n; ++r) {
      if (!one_pass[r]) {
        divergence_rows_of<T>(general, first + r, first + r + 1, row_loss);
      } else if (p.gradient != nullptr) {
        T* g_row = static_cast<T*>(p.gradient) + (first + r) * p.gradient_stride;
        if (kLabels && kept[r]) z[label[r]][r] -= at_label[r];
        for (int c = 0; c < classes; ++c) narrow(kept[r] ? z[c][r] : Real(0), g_row[c]);
      }
    }
  }
}

template <class T, math::CrossEntropy kHard>
void rows_with(const DistillationParams& p, int64_t begin, int64_t end, double* row_loss) {
  using Policy = math::OnePassKL;
  return p.classes <= kShortClasses ? short_rows<T, Policy, kHard>(p, begin, end, row_loss)
                                    : rows<T, Policy, kHard>(p, begin, end, row_loss);
}

template <class T>
void rows_of(const DistillationParams& p, int64_t begin, int64_t end, double* row_loss) {
  using math::CrossEntropy;
  if (p.labels == nullptr || p.alpha == 1) {
    rows_with<T, CrossEntropy::kNone>(p, begin, end, row_loss);
  } else if (p.temperature == 1) {
    rows_with<T, CrossEntropy::kShared>(p, begin, end, row_loss);
  } else {
    rows_with<T, CrossEntropy::kOwn>(p, begin, end, row_loss);
  }
}

void distillation_rows(const DistillationParams& p, int64_t begin, int64_t end, double* row_loss) {
  switch (p.dtype) {
    case Dtype::kFloat32: return rows_of<float>(p, begin, end, row_loss);
    case Dtype::kFloat64: return rows_of<double>(p, begin, end, row_loss);
    case Dtype::kBFloat16: return rows_of<BFloat16>(p, begin, end, row_loss);
    case Dtype::kFloat16: return rows_of<Float16>(p, begin, end, row_loss);
  }
}

}  // namespace
}  // namespace cpu
}  // namespace kdkernels
