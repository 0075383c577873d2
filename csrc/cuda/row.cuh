// What every kernel that walks rows of a distillation loss is given: its launch and its row.
//
// What an H100 allows per element while memory moves it at 3.35 TB/s, 14.5 bytes per clock and SM (1.75 GHz): at
// 6 bytes (16 bits: two reads, one write) 6.6 special functions and 53 lane instructions, twice that at 12.
#pragma once

#include "cuda/device.cuh"
#include "math/distillation.h"
#include "math/row_element.h"

namespace kdkernels {
namespace cuda {
namespace {

using math::AnySweeps;
using math::CrossEntropy;
using math::ForwardSweeps;
using math::ReverseSweeps;
using math::RowSums;
using math::TermAndGradient;

struct Exp2Nonpositive {
  template <class Real>
  __device__ __forceinline__ Real operator()(Real x) const {
    return math::exp2_nonpositive(x);
  }
};

template <class T, Extra kExtra>
using HeldType = std::conditional_t<kExtra == Extra::kTransforms, typename Compute<T>::type, T>;

// What a launch computes, the same for all its rows, so that every branch on it is uniform: one kernel for
// all options. The host rounds the scalars.
template <class Real>
struct Task {
  CrossEntropy hard;
  bool smooth;
  Real scale, temperature, inv_temperature, alpha, smoothing, inv_classes;
  double inv_denominator;
  const double* device_inv_denominator;  // instead of it, or null
  double* partial;  // one sum of losses a block, or null
  math::Parameters<Real> parameters;  // of AnySweeps
  math::Logits<Real> logits;

  __device__ Real factor(const LossParams& p) const {
    double inverse = device_inv_denominator != nullptr ? *device_inv_denominator : inv_denominator;
    return static_cast<Real>(inverse * p.gradient_scale);
  }
  // Both sides' logits as they are compared, and the gradient in a logit from that in the compared one, z.
  template <Extra kExtra>
  __device__ __forceinline__ Real student(Real z) const {
    return kExtra == Extra::kTransforms ? math::Logits<Real>::of_student(logits, z) : z;
  }
  template <Extra kExtra>
  __device__ __forceinline__ Real teacher(Real t) const {
    return kExtra == Extra::kTransforms ? math::Logits<Real>::of_teacher(logits, t) : t;
  }
  template <Extra kExtra>
  __device__ __forceinline__ Real back(Real z, Real gradient) const {
    return kExtra == Extra::kTransforms ? math::Transform<Real>::back(logits.student, z, gradient)
                                        : gradient;
  }
};

template <class Real>
struct Row {
  int64_t label;
  Real weight;
  bool ignored, invalid;

  __device__ __forceinline__ bool skipped() const { return ignored || invalid; }
  // The row's share of the loss, noted where the caller wants rows.
  __device__ __forceinline__ double emit(const LossParams& p, int64_t row, Real loss) const {
    loss = ignored ? Real(0) : invalid ? static_cast<Real>(nan("")) : weight * loss;
    if (p.row_loss != nullptr) static_cast<Real*>(p.row_loss)[row] = loss;
    return loss;
  }
};

template <class Real>
__device__ __forceinline__ Row<Real> read_row(const LossParams& p, int64_t row) {
  int64_t label = p.labels != nullptr ? p.labels[row] : -1;
  Real weight = p.weight != nullptr ? static_cast<const Real*>(p.weight)[row] : Real(1);
  return {label, weight, weight == Real(0) || (p.labels != nullptr && label == p.ignore_index),
          p.labels != nullptr && (label < 0 || label >= p.classes)};
}

// Of an element, and 2 to their power.
template <class Real>
struct Exponents {
  Real x, y, ex, ey;
  __device__ __forceinline__ Exponents(Real x, Real y)
      : x(x), y(y), ex(math::exp2_nonpositive(x)), ey(math::exp2_nonpositive(y)) {}
};

// What a row's elements need once its sums are known: see math::RowResult.
template <class T, class Policy, Extra kExtra>
struct SecondSweep : math::RowResult<typename Compute<T>::type> {
  using Real = typename Compute<T>::type;
  // e = kSign ((t - early - z - late) / T + above), as in math::ElementNorm. Logits of 16 bits differ by exact numbers.
  static constexpr bool kEarly = sizeof(HeldType<T, kExtra>) > 2;
  Real max_s, max_t, early, late;

  // label_z: the label's logit.
  __device__ __forceinline__ SecondSweep(const Task<Real>& task, const RowSums<Real>& sums,
                                         Real label_z, Real factor)
      : math::RowResult<Real>(math::finish_row<Policy>(task.hard, sums, task.inv_classes,
                                                       task.temperature, task.alpha, task.smoothing,
                                                       label_z - sums.max_s, factor)),
        max_s(sums.max_s),
        max_t(sums.max_t) {
    const Real offset = max_t - max_s, back = offset - max_t;
    const Real lost = (max_t - (offset - back)) - (max_s + back);  // what rounding took from it
    const bool far = kEarly && math::magnitude(offset) > Real(1);
    early = far ? offset : Real(0);
    late = far ? Real(0) : offset;
    this->above = Policy::kSign * math::fma(-lost, task.inv_temperature, this->above);
  }

  // Of an element whose exponentials are ex and ey, without cross-entropy.
  __device__ __forceinline__ TermAndGradient<Real> soft(const Task<Real>& task, Real z, Real t,
                                                        Real ex, Real ey) const {
    const Real after = kEarly ? t - early : t;
    const Real e = math::fma(after - z - late, Policy::kSign * task.inv_temperature, this->above);
    return Policy::element(this->of_q, this->other, ey * this->inv_t, ex * this->inv_s,
                           math::at_least(e, Real(math::kLeast)));
  }
  __device__ __forceinline__ Exponents<Real> exponents(const Task<Real>& task, Real z,
                                                       Real t) const {
    return {(z - max_s) * task.scale, (t - max_t) * task.scale};
  }
  __device__ __forceinline__ TermAndGradient<Real> element(const Task<Real>& task, Real z, Real t,
                                                           const Exponents<Real>& of) const {
    TermAndGradient<Real> x = soft(task, z, t, of.ex, of.ey);
    if (task.hard != CrossEntropy::kNone) {
      Real eh = math::exp2_nonpositive((z - max_s) * Real(math::kLog2E));
      x.gradient = math::fma(this->of_hard, eh, x.gradient - this->uniform);
    }
    return x;
  }
  __device__ __forceinline__ TermAndGradient<Real> element(const Task<Real>& task, Real z,
                                                           Real t) const {
    return element(task, z, t, exponents(task, z, t));
  }
};

// The second and third sweeps of a divergence whose policy is one of math/divergence.h.
template <class T, Extra kExtra>
struct TermSweeps : SecondSweep<T, AnySweeps, kExtra> {
  using Base = SecondSweep<T, AnySweeps, kExtra>;
  using Real = typename Base::Real;
  using Element = math::Element<Real, sizeof(T) == 2>;
  Real log2_s, log2_t;  // of the sums

  __device__ __forceinline__ TermSweeps(const Task<Real>& task, const RowSums<Real>& sums,
                                        Real label_z, Real factor)
      : Base(task, sums, label_z, factor),
        log2_s(math::log_acc(sums.sum_s) * Real(math::kLog2E)),
        log2_t(math::log_acc(sums.sum_t) * Real(math::kLog2E)) {
    // Of a row with NaN the sums alone are sure to be; the maxima below would pass over it.
    const Real nothing = Real(0) * (sums.sum_s + sums.sum_t);
    this->of_term += nothing;
    this->other += nothing;
  }

  __device__ __forceinline__ Real difference(const Task<Real>& task, Real z, Real t) const {
    const Real after = Base::kEarly ? t - this->early : t;
    return math::fma(after - z - this->late, task.inv_temperature, this->above);
  }
  // Where the gradient is not rounded, the smaller probability comes from the larger one and their difference: two
  // exponentials give p, q and w.
  __device__ __forceinline__ Element element(const Task<Real>& task, Real z, Real t) const {
    Element x;
    x.d = difference(task, z, t);
    const Real log_q = math::fma(z - this->max_s, task.scale, -log2_s),
               log_p = math::fma(t - this->max_t, task.scale, -log2_t);
    x.w = math::smaller_over_larger(x.d);
    if constexpr (sizeof(T) == 2) {
      x.q = math::exp2_nonpositive(log_q);
      x.p = math::exp2_nonpositive(log_p);
    } else {
      const Real top = math::exp2_nonpositive(Max::apply(log_q, log_p)), low = top * x.w;
      x.p = x.d < Real(0) ? low : top;
      x.q = x.d < Real(0) ? top : low;
    }
    x.log2_q = log_q;
    x.log2_p = log_p;
    return x;
  }
  // After the sum of q - p: see math::refine. Of the ratio alone: each side's probabilities add up to 1 as they are.
  __device__ __forceinline__ void refine(Real excess) {
    this->above += math::log_of_excess(excess);
  }
  __device__ __forceinline__ Real add_hard(const Task<Real>& task, Real z, Real soft) const {
    if (task.hard == CrossEntropy::kNone) return soft;
    const Real eh = math::exp2_nonpositive((z - this->max_s) * Real(math::kLog2E));
    return math::fma(this->of_hard, eh, soft - this->uniform);
  }
  template <class Policy>
  __device__ __forceinline__ Real gradient(const Task<Real>& task, Real z, Real t) const {
    if constexpr (sizeof(T) == 2 && math::kHasSlope<Policy>)
      return gradient_of_slope(task, z, Policy::slope(difference(task, z, t), task.parameters));
    const Element x = element(task, z, t);
    const Real a = Policy::share(x, task.parameters).a;
    return add_hard(task, z, math::fma(this->other, a, this->of_q * x.q));
  }
  // From math::ClassShare::slope.
  __device__ __forceinline__ Real gradient_of_slope(const Task<Real>& task, Real z,
                                                    Real slope) const {
    const Real q = math::exp2_nonpositive(math::fma(z - this->max_s, task.scale, -log2_s));
    return add_hard(task, z, q * math::fma(this->other, slope, this->of_q));
  }
  // The label's, without its own share.
  __device__ __forceinline__ Real gradient_of(const LossParams& p, const Task<Real>& task, Real z,
                                              Real t) const {
    Real y = 0;
    math::with_policy(p, [&](auto policy) {
      if constexpr (!math::kTwoSweeps<decltype(policy)>) y = gradient<decltype(policy)>(task, z, t);
    });
    return y;
  }
};

// What a row's statistics take beside its sums and terms. What is NaN here is so in the row's sums.
template <class Real>
struct StatisticSums {
  Real self_s = 0,
       self_t = 0;  // of q log2 q, p log2 p; of a divergence of two sweeps of ex x, ey y

  __device__ __forceinline__ static void add(Real e, Real x, Real& sum) {
    sum = math::fma(e, Max::apply(x, Real(-1e30)), sum);  // -inf times 0 would be NaN
  }
  template <bool kRounded>
  __device__ __forceinline__ void add(const math::Element<Real, kRounded>& x) {
    add(x.q, x.log2_q, self_s);
    add(x.p, x.log2_p, self_t);
  }
  __device__ __forceinline__ void add(const Exponents<Real>& of) {
    add(of.ex, of.x, self_s);
    add(of.ey, of.y, self_t);
  }
};

// Of the largest logits: minus the first class that has it.
template <class Real>
struct FirstClasses {
  Real s = -Real(INFINITY), t = -Real(INFINITY);

  __device__ __forceinline__ void compare(const RowSums<Real>& sums, Real z, Real t_logit,
                                          Real at) {
    if (z == sums.max_s) s = Max::apply(s, -at);
    if (t_logit == sums.max_t) t = Max::apply(t, -at);
  }
};

// RowStatistics of kdkernels/reference/rows.py, by one thread.
template <class Policy, class Real>
__device__ __forceinline__ void write_statistics(const LossParams& p, const Task<Real>& task,
                                                 int64_t row, const RowSums<Real>& sums,
                                                 const StatisticSums<Real>& statistics,
                                                 const FirstClasses<Real>& first, Real divergence) {
  const Real ln2 = math::kLn2;
  const Real log_s = math::log_acc(sums.sum_s), log_t = math::log_acc(sums.sum_t);
  auto broken = [](Real sum) { return !(sum > Real(0) && sum < Real(INFINITY)); };
  const bool nan = broken(sums.sum_s) || (task.alpha > Real(0) && broken(sums.sum_t)) ||
                   (task.hard == CrossEntropy::kOwn && broken(sums.sum_hard));
  auto entropy = [&](Real self, Real sum, Real log_sum) {
    return math::kThirdSweep<Policy> ? -ln2 * self : log_sum - ln2 * self * math::inverse(sum);
  };
  const Real values[math::kStatistics] = {math::fma(sums.max_s, task.inv_temperature, log_s),
                                          math::fma(sums.max_t, task.inv_temperature, log_t),
                                          entropy(statistics.self_s, sums.sum_s, log_s),
                                          entropy(statistics.self_t, sums.sum_t, log_t),
                                          divergence,
                                          Real(first.s == first.t)};
#pragma unroll
  for (int i = 0; i < math::kStatistics; ++i) {
    const Real of_broken =
        i == 5 ? Real(1) : Real(NAN);  // all of it is NaN: the first is the largest
    static_cast<Real*>(p.statistics)[i * p.rows + row] = nan ? of_broken : values[i];
  }
}

// Of a row that is skipped.
template <class Real>
__device__ __forceinline__ void blank_statistics(const LossParams& p, const Row<Real>& state,
                                                 int64_t row) {
  const Real y = state.ignored ? Real(0) : static_cast<Real>(nan(""));
#pragma unroll
  for (int i = 0; i < math::kStatistics; ++i)
    static_cast<Real*>(p.statistics)[i * p.rows + row] = y;
}

}  // namespace
}  // namespace cuda
}  // namespace kdkernels
