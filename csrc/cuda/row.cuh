// What every kernel that walks rows of a distillation loss is told of its launch and of its row.
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
using math::OnePassKL;
using math::RowResult;
using math::RowSums;

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
  Real scale, temperature, alpha, smoothing, inv_classes;
  double inv_denominator;
  const double* device_inv_denominator;  // instead of it, or null
  double* partial;  // one sum of losses a block or cluster, or null
  uint8_t* near;  // [rows]: whether the general kernel is to do a row again

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
  // Whether the student is so near the teacher that the general kernel does the row again: then this one adds no
  // loss and writes no gradient.
  __device__ __forceinline__ bool near(const RowResult<Real>& result) const {
    return !skipped() && result.divergence < Real(math::kNearRow);
  }
  // The row's share of the loss, noted where the caller wants rows.
  __device__ __forceinline__ double emit(const LossParams& p, const Task<Real>& task, int64_t row,
                                         Real loss, bool near = false) const {
    task.near[row] = near;
    if (near) return 0;
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

}  // namespace
}  // namespace cuda
}  // namespace kdkernels
