// The optimizer op as PyTorch calls it; see kdkernels/optim for what the arguments mean.
#pragma once

#include <variant>

#include "ops/noise_numbers.h"

namespace kdkernels {

// One field of a parameter group's rule: its name in the group, and its value where the group has none.
struct RuleField {
  const char* name;
  std::variant<double math::UpdateRule::*, bool math::UpdateRule::*> member;
  double usual = 0;
};
// A rule crosses to the op as its fields' numbers, in this table's order.
const std::vector<RuleField>& rule_fields();

// One step of an optimizer over a list of parameters, with noise.
//
//   update   math::Update; the rule of each parameter; and, unless step tensors are given, how many updates each has
//            had, this one included
//   moments  the first one of each parameter, then the second of each, as far as the update has them; those that a
//            rule does not need are empty
//   rules    the fields of each rule
//   tensors  those of NoiseNumbers; lr and std, fp64, one or one per rule, which replace the rules'; grad_scale and
//            found_inf of a gradient scaler, fp32; and a step tensor, fp32, per parameter
//
// Gradients are written only where there is a grad_scale.
void noisy_update_(at::IntArrayRef update, at::TensorList params, at::TensorList grads,
                   at::TensorList moments, at::ArrayRef<double> rules, c10::SymIntArrayRef noise,
                   const TensorOptionals& tensors, const OptionalTensor& norms);

}  // namespace kdkernels
