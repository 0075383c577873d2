// The optimizer op as PyTorch calls it; see kdkernels/optim.py for what the arguments mean.
#pragma once

#include "ops/noise.h"

namespace kdkernels {

// One step of an optimizer (math::Update) over a list of parameters, with noise. first and second: moments, none or
// one a parameter, empty where its rule has none. steps: how many updates a parameter has had, this one included; or
// step_tensors, fp32 scalars. rules: kRuleNumbers numbers each, math::UpdateRule's fields in order; rule_of: each
// parameter's. Gradients are written only where there is a grad_scale.
void noisy_update_(int64_t update, at::TensorList params, at::TensorList grads,
                   at::TensorList first, at::TensorList second, at::IntArrayRef steps,
                   at::TensorList step_tensors, at::IntArrayRef rule_of, at::ArrayRef<double> rules,
                   KD_NOISE_LIST_PARAMS, const std::optional<at::Tensor>& lr_tensor,
                   const std::optional<at::Tensor>& std_tensor,
                   const std::optional<at::Tensor>& grad_scale,
                   const std::optional<at::Tensor>& found_inf,
                   const std::optional<at::Tensor>& norms);

}  // namespace kdkernels
