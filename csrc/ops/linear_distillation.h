// The op linear_distillation_loss: the loss of linear heads, from hidden states; see kdkernels/distill for what the
// arguments mean.
#pragma once

#include "ops/loss.h"

namespace kdkernels {

// `others`: student_bias, teacher_index, none, then weight and bias of each teacher. `teachers`: hidden states where there are
// weights; else logits or, with indices among the rows, top-k values; none: labels alone. Returns as distillation_loss
// does.
std::vector<at::Tensor> linear_distillation_loss(
    const at::Tensor& student_hidden, const at::Tensor& student_weight,
    const TensorOptionals& others, at::TensorList teachers, const TensorOptionals& rows,
    const PackedOptions& options, int64_t wishes, std::string_view group);

}  // namespace kdkernels
