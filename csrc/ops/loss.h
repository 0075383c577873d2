// A distillation loss below autograd: what it is called with, its checks, and its kernels' calls. Shared by the losses
// on logits and on hidden states; kdkernels/distill says what the arguments mean.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "ops/checks.h"
#include "ops/loss_options.h"

namespace kdkernels {

// The tensors that say something of each row, all optional.
struct RowTensors {
  OptionalTensor labels, weight;  // [*]
  OptionalTensor indices, teacher_logsumexp;  // of a top-k teacher: [*, K], [*]
  std::array<OptionalTensor, kRowOptions> options;  // [*] or []: instead of the option's number

  // f(name of the argument, tensor) for each of them, given or not.
  template <class Self, class F>
  static void each(Self& rows, F f) {
    f("labels", rows.labels);
    f("weight", rows.weight);
    f("teacher_indices", rows.indices);
    f("teacher_logsumexp", rows.teacher_logsumexp);
    for (const LossOption& option : loss_options()) {
      if (option.row_option != kRowOptions) f(option.name, rows.options[option.row_option]);
    }
  }
  bool has_options() const;
  std::vector<bool> given_options() const;
};
TensorOptionals pack(const RowTensors& rows);  // up to the last one that is given
RowTensors unpack(const TensorOptionals& packed);

struct LossCall {
  at::Tensor student;  // [*, V]
  std::vector<at::Tensor> teachers;  // [*, V] each; top-k: one [*, K]
  RowTensors rows;
  LossOptions options;
  std::string group;  // of processes that share a vocabulary, or empty
};

struct Want {
  bool gradient = false, teacher_gradient = false, statistics = false;
  bool entries_only = false;  // the gradient of a top-k loss at its entries, [*, K]
  bool inplace = false;  // the gradient may be written over the logits
};

// Tensors that were not asked for are undefined. Gradients are times gradient_scale(call, dtype of the logits).
struct LossResult {
  at::Tensor loss, gradient, teacher_gradient;
  at::Tensor statistics;  // [kStatistics, *]
};

// What a loss does beside its values, as bits.
enum LossWish : int64_t { kInplace = 1, kSparseGradient = 2, kReturnStatistics = 4 };

// ---- checks (loss_checks.cpp) ----

// Raises what bad arguments deserve, by shape, dtype and device; tensors that only look unusual become plain ones.
void check_call(LossCall& call);
// Labels, indices and options of rows that are out of range, on the CPU, before anything is written.
void check_row_values(const LossCall& call, const at::Tensor& labels, const at::Tensor& indices);
void check_inplace(const LossCall& call);

// ---- kernels (loss_launch.cpp) ----

LossResult run_loss(const LossCall& call, const Want& want);
// One call of a kernel: all of a loss, or one stage of it with its `state`.
LossResult launch(const LossCall& call, const Want& want, int stages, const at::Tensor& state);
// Where rows lie, if classes are adjacent and the leading dimensions collapse into one or two.
std::optional<RowStrides> row_strides(const at::Tensor& logits);

// ---- gradients (loss_launch.cpp) ----

// A power of two that keeps gradients of a dtype, fp16, which a mean over rows makes small, away from underflow until
// backward knows the incoming gradient. 1 for other dtypes, and where weights or temperatures of rows set no bound.
double gradient_scale(const LossCall& call, at::ScalarType type);
// gradient * grad_output / scale, row by row where there is one per row, into `gradient` itself if it may be.
at::Tensor scaled(const at::Tensor& gradient, const at::Tensor& grad_output, bool per_row,
                  double scale, bool may_overwrite);
// Whether that is nothing to do: the incoming gradient is 1, and that is known without waiting for a device.
bool is_one(const at::Tensor& grad_output, bool per_row, double scale, bool last);

// ---- a vocabulary that processes share (loss_slices.cpp) ----

// All stages, between which the processes of call.group exchange numbers of rows.
LossResult run_slice(const LossCall& call, const Want& want);
// The gradient stage behind the dispatcher, for tracers; `state` of a slice whose other stages are done, or none.
LossResult dispatch_forward(const LossCall& call, const Want& want, const OptionalTensor& state);
// One all-reduce of PyTorch's traceable collectives: op is "sum", "max" or "min".
at::Tensor all_reduce(const at::Tensor& x, const char* op, const std::string& group);

// ---- second derivatives (distillation.cpp) ----

// Differentiable gradients of a loss in the student and in a single teacher (undefined where it requires no
// grad), given grad_output: what a second differentiation goes through.
using DifferentiableGradients =
    std::function<std::vector<at::Tensor>(const LossCall&, const at::Tensor& grad_output)>;
void set_differentiable_gradients(DifferentiableGradients gradients);

}  // namespace kdkernels
