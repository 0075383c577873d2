// A fused linear loss below autograd: what it is called with and what it returns.
#pragma once

#include <string>
#include <vector>

#include "ops/linear_rows.h"
#include "ops/loss.h"

namespace kdkernels {

// A teacher with a head of its own has hidden states [*, Ht]; else `input` is as LossCall has it.
struct LinearTeacher {
  at::Tensor input;
  OptionalTensor head, bias;  // [V, Ht], [V]
};

struct LinearCall {
  at::Tensor hidden, head;  // [*, H], [V, H]
  OptionalTensor bias;  // [V]
  std::vector<LinearTeacher> teachers;  // none: labels alone
  OptionalTensor teacher_index;  // [*]: the teacher of each row, where all have heads
  OptionalTensor
      entropy_gradient;  // [*]: of the entropies of the student's rows; part of the gradients alone
  RowTensors rows;
  LossOptions options;
  std::string group;

  bool has_heads() const { return !teachers.empty() && teachers[0].head.has_value(); }
  // f(name of the argument, tensor) for the tensors of both sides' heads and their inputs, given or not; `x` is an
  // at::Tensor or an OptionalTensor.
  template <class Self, class F>
  static void each_of_heads(Self& c, F f) {
    f("student_hidden", c.hidden);
    f("student_weight", c.head);
    f("student_bias", c.bias);
    const char* input = c.has_heads()                ? "teacher_hidden"
                        : c.rows.indices.has_value() ? "teacher_values"
                                                     : "teacher_logits";
    for (auto& teacher : c.teachers) {
      f(input, teacher.input);
      f("teacher_weight", teacher.head);
      f("teacher_bias", teacher.bias);
    }
  }
};

// As the ops take them: student_bias, teacher_index, entropy_gradient, then weight and bias of each teacher.
TensorOptionals pack_heads(const LinearCall& c);
LinearCall linear_call(const at::Tensor& hidden, const at::Tensor& head,
                       const TensorOptionals& others, at::TensorList teachers,
                       const TensorOptionals& rows, const PackedOptions& options,
                       std::string_view group);

// What is wanted of a call, as bits.
enum WantBits : int64_t { kHidden = 1, kHead = 2, kBias = 4, kGradients = 7, kRowStatistics = 8 };

// Gradients in the hidden states' dtype (fp32 for fp16, which may underflow before backward scales it) and, of the
// head and its bias, in acc; undefined where not wanted.
struct LinearResult {
  at::Tensor loss, hidden, head, bias;
  at::Tensor statistics;  // [kStatistics, *]
  at::Tensor top_logits, top_indices;  // [*, top_k]; rows that do not count have index -1
};

// By way of PyTorch's dispatcher: the op _linear_distillation_forward.
LinearResult linear_forward(const LinearCall& c, int64_t want);

}  // namespace kdkernels
