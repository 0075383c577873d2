// The distillation loss as PyTorch calls it; see kdkernels/distill.py for what the arguments mean.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

namespace kdkernels {

at::Tensor distillation_loss(const at::Tensor& student_logits, const at::Tensor& teacher_logits,
                             const std::optional<at::Tensor>& labels, double temperature,
                             std::optional<double> alpha, double label_smoothing,
                             int64_t ignore_index, const std::optional<at::Tensor>& weight,
                             std::optional<double> num_items, std::string_view reduction,
                             bool inplace);

}  // namespace kdkernels
