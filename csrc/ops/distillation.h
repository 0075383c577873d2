// The distillation losses as PyTorch calls them; see kdkernels/distill.py for what the arguments mean.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "params.h"

namespace kdkernels {

enum class Reduction { kNone, kSum, kMean };

// What a loss computes: the arguments that are no tensors, checked, with defaults filled in.
struct LossOptions {
  math::Divergence divergence;
  double beta, second;  // as DivergenceParams has them
  double temperature, alpha, label_smoothing;
  double logit_scale, soft_cap, teacher_logit_scale, teacher_soft_cap;  // soft_cap 0: none
  double num_items;  // 0: none
  int64_t ignore_index;
  Reduction reduction;
  Tail tail;
  bool probs, log_mix, standardize;
  c10::SmallVector<double, kMaxTeachers> teacher_weights;  // sum 1, one a teacher
  // Columns of a vocabulary: [first_class, first_class + V) of all_classes; all_classes 0: it is whole.
  int64_t first_class, all_classes;

  std::vector<double> packed() const;
  static LossOptions unpacked(at::ArrayRef<double> numbers);
};

struct LossCall {
  at::Tensor student;  // [*, V]
  std::vector<at::Tensor> teachers;  // [*, V] each; top-k: one [*, K]
  std::optional<at::Tensor> labels, weight;  // [*]
  std::optional<at::Tensor> indices, teacher_logsumexp;  // [*, K], [*]
  LossOptions options;
  std::string group;  // of processes that share a vocabulary, or empty
};

struct Want {
  bool gradient, teacher_gradient, statistics;
  bool entries_only;  // the gradient of a top-k loss at its entries, [*, K]
  bool inplace;  // the gradient may be written over the logits
};

// Tensors that were not asked for are undefined. Gradients are times gradient_scale(call).
struct LossResult {
  at::Tensor loss, gradient, teacher_gradient;
  at::Tensor statistics;  // [kStatistics, *]
};

// What other losses share: raises what bad arguments deserve, by shape and dtype, ...
void check_call(const LossCall& call);
void check_logsumexp(const LossCall& call, std::string_view teacher_kind);
// ... and labels and indices that are in no vocabulary, on the CPU, before anything is written.
void check_classes(const LossCall& call, const at::Tensor& labels, const at::Tensor& indices);
LossResult run_loss(const LossCall& call, const Want& want);
// A power of two that keeps fp16 gradients, which a mean over rows makes small, away from underflow until
// backward knows the incoming gradient. 1 for other dtypes, and where weights set no bound.
double gradient_scale(const LossCall& call);
// One all-reduce of PyTorch's traceable collectives: op is "sum", "max" or "min". Boxed, since the type of the
// group's name differs between versions.
at::Tensor all_reduce(const at::Tensor& x, const char* op, const std::string& group);
// gradient * grad_output / scale, row by row where there is one a row, into `gradient` itself if it may be.
at::Tensor scaled(const at::Tensor& gradient, const at::Tensor& grad_output, bool per_row,
                  double scale, bool may_overwrite);
// Whether that is nothing to do: the incoming gradient is 1, and that is known without waiting for a device.
bool is_one(const at::Tensor& grad_output, bool per_row, double scale, bool last);

// Every loss on given logits. `tail` is "none" for dense teachers. Returns the loss, and the statistics where
// asked for.
std::vector<at::Tensor> distillation_loss(
    const at::Tensor& student_logits, at::TensorList teacher,
    const std::optional<at::Tensor>& labels, const std::optional<at::Tensor>& indices,
    const std::optional<at::Tensor>& teacher_logsumexp, const std::optional<at::Tensor>& weight,
    double temperature, std::optional<double> alpha, std::string_view divergence,
    std::optional<double> divergence_alpha, std::optional<double> beta, std::string_view tail,
    std::string_view teacher_kind, at::ArrayRef<double> teacher_weights,
    std::string_view teacher_mixture, bool standardize, double logit_scale,
    std::optional<double> soft_cap, double teacher_logit_scale,
    std::optional<double> teacher_soft_cap, double label_smoothing, int64_t ignore_index,
    std::optional<double> num_items, std::string_view reduction, bool inplace, bool sparse_gradient,
    bool statistics, std::string_view group, int64_t first_class, int64_t all_classes);

// Options from arguments; `labels`: whether there are any.
LossOptions loss_options(bool labels, int64_t teachers, double temperature,
                         std::optional<double> alpha, std::string_view divergence,
                         std::optional<double> divergence_alpha, std::optional<double> beta,
                         std::string_view tail, std::string_view teacher_kind,
                         at::ArrayRef<double> teacher_weights, std::string_view teacher_mixture,
                         bool standardize, double logit_scale, std::optional<double> soft_cap,
                         double teacher_logit_scale, std::optional<double> teacher_soft_cap,
                         double label_smoothing, int64_t ignore_index,
                         std::optional<double> num_items, std::string_view reduction,
                         int64_t first_class, int64_t all_classes);

// Differentiable gradients of a loss in the student and in a single teacher (undefined where it requires no
// grad), given grad_output: what a second differentiation goes through.
using DifferentiableGradients =
    std::function<std::vector<at::Tensor>(const LossCall&, const at::Tensor& grad_output)>;
void set_differentiable_gradients(DifferentiableGradients gradients);

}  // namespace kdkernels
