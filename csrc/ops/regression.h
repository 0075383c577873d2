// The regression loop as PyTorch calls it; see kdkernels/noise for what the arguments mean.
#pragma once

#include <ATen/core/Tensor.h>

namespace kdkernels {

// x, y: [samples]; theta, lr, lam, sigma: fp64 [replicas]; seed: int64 [replicas]. Returns fp64 [replicas], or
// [steps + 1, replicas] with trajectory.
at::Tensor noisy_linear_regression(const at::Tensor& x, const at::Tensor& y,
                                   const at::Tensor& theta, const at::Tensor& lr,
                                   const at::Tensor& lam, const at::Tensor& sigma,
                                   const at::Tensor& seed, int64_t steps, int64_t stream,
                                   bool per_sample, bool trajectory);

}  // namespace kdkernels
