// What every kernel that walks rows of a distillation loss is given: its launch and its row.
//
// What an H100 allows an element while memory moves it at 3.35 TB/s, 14.5 bytes a clock and SM (1.75 GHz): at
// 6 bytes (16 bits: two reads, one write) 6.6 special functions and 53 lane instructions, twice that at 12.
#pragma once

#include "cuda/device.cuh"
#include "math/distillation.h"

namespace kdkernels {
namespace cuda {
namespace {

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

  __device__ Real factor(const LossParams& p) const {
    double inverse = device_inv_denominator != nullptr ? *device_inv_denominator : inv_denominator;
    return static_cast<Real>(inverse * p.gradient_scale);
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

// What a row's elements need once its sums are known: see math::RowResult.
template <class T, class Policy>
struct SecondSweep : math::RowResult<typename Compute<T>::type> {
  using Real = typename Compute<T>::type;
  // e = kSign ((t - early - z - late) / T + above), as in math::ElementNorm. Logits of 16 bits differ by exact numbers.
  static constexpr bool kEarly = sizeof(T) > 2;
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
                           math::larger(e, Real(math::kLeast)));
  }
  __device__ __forceinline__ TermAndGradient<Real> element(const Task<Real>& task, Real z,
                                                           Real t) const {
    TermAndGradient<Real> x = soft(task, z, t, math::exp2_nonpositive((z - max_s) * task.scale),
                                   math::exp2_nonpositive((t - max_t) * task.scale));
    if (task.hard != CrossEntropy::kNone) {
      Real eh = math::exp2_nonpositive((z - max_s) * Real(math::kLog2E));
      x.gradient = math::fma(this->of_hard, eh, x.gradient - this->uniform);
    }
    return x;
  }
};

}  // namespace
}  // namespace cuda
}  // namespace kdkernels
