// The noise ops as PyTorch calls them; see kdkernels/noise for what the arguments mean, and ops/noise_numbers.h for
// `noise` and `noise_tensors`.
#pragma once

#include "ops/noise_numbers.h"

namespace kdkernels {

at::Tensor randn_like(const at::Tensor& x, c10::SymIntArrayRef noise,
                      const TensorOptionals& noise_tensors);
at::Tensor input_noise(const at::Tensor& x, const OptionalTensor& std_tensor, double std,
                       bool multiplicative, c10::SymIntArrayRef noise,
                       const TensorOptionals& noise_tensors);
at::Tensor gradient_noise(const at::Tensor& x, const OptionalTensor& std_tensor, double std,
                          bool multiplicative, c10::SymIntArrayRef noise,
                          const TensorOptionals& noise_tensors);
void add_noise_(at::TensorList tensors, at::ArrayRef<double> std, const OptionalTensor& std_tensor,
                bool multiplicative, c10::SymIntArrayRef noise,
                const TensorOptionals& noise_tensors, const OptionalTensor& norms);
at::Tensor noise_dot(at::TensorList tensors, c10::SymIntArrayRef noise,
                     const TensorOptionals& noise_tensors);
// The seed of each term is in `seeds`; that of `noise` is not read.
void combine_noise_(at::TensorList tensors, const at::Tensor& coefficients, const at::Tensor& seeds,
                    c10::SymIntArrayRef noise, const TensorOptionals& noise_tensors);

at::Tensor dropout(const at::Tensor& x, double p, c10::SymIntArrayRef noise,
                   const TensorOptionals& noise_tensors);
at::Tensor stochastic_round(const at::Tensor& x, at::ScalarType dtype, c10::SymIntArrayRef noise,
                            const TensorOptionals& noise_tensors);

// ---- below autograd (noise_kernels.cpp) ----------------------------------------------------------

// Checks of a public op on one tensor.
void check_one(const at::Tensor& x, const OptionalTensor& std_tensor, double std,
               c10::SymIntArrayRef noise, const TensorOptionals& noise_tensors);
// Noise on one tensor: what randn_like, input_noise and their gradients are made of.
at::Tensor apply_noise(const at::Tensor& x, int64_t mode, const OptionalTensor& std_tensor,
                       double std, c10::SymIntArrayRef noise, const TensorOptionals& noise_tensors);
// scales[k] * eps in the shape and dtype of tensors[k]: the adjoint of noise_dot.
std::vector<at::Tensor> scaled_noise(at::TensorList tensors, const at::Tensor& scales,
                                     c10::SymIntArrayRef noise,
                                     const TensorOptionals& noise_tensors);

}  // namespace kdkernels
