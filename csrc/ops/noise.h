// The noise ops as PyTorch calls them; see kdkernels/noise.py for what the arguments mean.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <optional>
#include <vector>

namespace kdkernels {

// Which noise. A tensor, where given, holds the number and overrides it: a CPU int64 scalar for the seed,
// an int64 scalar on any device for the step.
struct NoiseArgs {
  c10::SymInt seed, step, stream, offset;
  std::optional<at::Tensor> seed_tensor, step_tensor;
};

at::Tensor randn_like(const at::Tensor& x, const NoiseArgs& noise);
void add_noise_(const std::vector<at::Tensor>& tensors, const std::vector<double>& std,
                const NoiseArgs& noise);
at::Tensor input_noise(const at::Tensor& x, const std::optional<at::Tensor>& std_tensor, double std,
                       const NoiseArgs& noise);
at::Tensor gradient_noise(const at::Tensor& x, double std, const NoiseArgs& noise);

}  // namespace kdkernels
