// The op distillation_loss, as the Python module calls it; see kdkernels/distill for what the arguments mean.
#pragma once

#include "ops/loss.h"

namespace kdkernels {

// Any loss on given logits: a top-k teacher is one of values, with indices among the rows. Returns the loss and, where
// wished for, the statistics.
std::vector<at::Tensor> distillation_loss(const at::Tensor& student_logits, at::TensorList teachers,
                                          const TensorOptionals& rows, const PackedOptions& options,
                                          int64_t wishes, std::string_view group);

}  // namespace kdkernels
