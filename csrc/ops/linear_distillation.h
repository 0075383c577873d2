// The distillation loss of linear heads, from hidden states; see kdkernels/distill.py for what the arguments mean.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace kdkernels {

// `teacher`: its hidden states where there is a teacher_weight; else logits or, with `indices`, top-k values.
// Returns the loss and the statistics, which are empty unless asked for.
std::tuple<at::Tensor, at::Tensor> linear_distillation_loss(
    const at::Tensor& student_hidden, const at::Tensor& student_weight,
    const std::optional<at::Tensor>& student_bias, at::TensorList teacher,
    const std::optional<at::Tensor>& teacher_weight, const std::optional<at::Tensor>& teacher_bias,
    const std::optional<at::Tensor>& labels, const std::optional<at::Tensor>& indices,
    const std::optional<at::Tensor>& teacher_logsumexp, const std::optional<at::Tensor>& weight,
    double temperature, std::optional<double> alpha, std::string_view divergence,
    std::optional<double> divergence_alpha, std::optional<double> beta, std::string_view tail,
    std::string_view teacher_kind, at::ArrayRef<double> teacher_weights,
    std::string_view teacher_mixture, bool standardize, double logit_scale,
    std::optional<double> soft_cap, double teacher_logit_scale,
    std::optional<double> teacher_soft_cap, double label_smoothing, int64_t ignore_index,
    std::optional<double> num_items, std::string_view reduction, bool statistics,
    std::string_view group, int64_t first_class, int64_t all_classes,
    std::optional<int64_t> memory_budget);

}  // namespace kdkernels
