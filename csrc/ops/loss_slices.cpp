// A loss whose vocabulary several processes share: each has a slice of the columns, and only numbers of rows cross.
// Also the two ops behind the dispatcher that tracers record.
#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cstddef>
#include <limits>

#include "math/row.h"
#include "ops/checks.h"
#include "ops/loss.h"

namespace kdkernels {
namespace {

using at::Tensor;

// ---- the ops below autograd ---------------------------------------------------------------------

constexpr int64_t kWantGradient = 1, kWantTeacher = 2, kWantStatistics = 4, kWantEntries = 8;

int64_t bits(const Want& want) {
  return (want.gradient ? kWantGradient : 0) | (want.teacher_gradient ? kWantTeacher : 0) |
         (want.statistics ? kWantStatistics : 0) | (want.entries_only ? kWantEntries : 0);
}

// Outputs that were not asked for are empty.
std::tuple<Tensor, Tensor, Tensor, Tensor> distillation_forward(
    const Tensor& student, at::TensorList teachers, const TensorOptionals& rows,
    const OptionalTensor& state, const PackedOptions& options, int64_t want) {
  LossCall call = {student, teachers.vec(), unpack(rows), unpack(options), ""};
  Want wanted = {.gradient = (want & kWantGradient) != 0,
                 .teacher_gradient = (want & kWantTeacher) != 0,
                 .statistics = (want & kWantStatistics) != 0,
                 .entries_only = (want & kWantEntries) != 0};
  LossResult out =
      launch(call, wanted, state.has_value() ? kGradient : kAllStages, state.value_or(Tensor()));
  auto or_empty = [&](const Tensor& x) {
    return x.defined() ? x : at::empty({0}, student.options());
  };
  return {out.loss, or_empty(out.gradient), or_empty(out.teacher_gradient),
          or_empty(out.statistics)};
}

// A copy of the state with one more stage in it.
Tensor distillation_stage(const Tensor& student, at::TensorList teachers,
                          const TensorOptionals& rows, const Tensor& state,
                          const PackedOptions& options, int64_t stage) {
  LossCall call = {student, teachers.vec(), unpack(rows), unpack(options), ""};
  Tensor out = state.clone();
  launch(call, {.statistics = true}, static_cast<int>(stage), out);
  return out;
}

// ---- what crosses the group ---------------------------------------------------------------------

// Fields [first, last] of math::RowState, as rows of the state.
#define KD_FIELDS(first, last) \
  offsetof(math::RowState, first) / 8, offsetof(math::RowState, last) / 8 + 1

Tensor reduce_fields(const Tensor& state, const char* op, const std::string& group, size_t begin,
                     size_t end) {
  Tensor out = state.clone();
  Tensor part = state.slice(0, static_cast<int64_t>(begin), static_cast<int64_t>(end));
  out.slice(0, static_cast<int64_t>(begin), static_cast<int64_t>(end))
      .copy_(all_reduce(part, op, group));
  return out;
}

// The largest logits of all slices, and the classes that have them.
Tensor reduce_maxima(const Tensor& state, const std::string& group, bool topk) {
  size_t own = offsetof(math::RowState, max_s) / 8,
         entry = offsetof(math::RowState, entry_max_s) / 8;
  size_t best = offsetof(math::RowState, best_s) / 8;
  Tensor out = reduce_fields(state, "max", group, KD_FIELDS(max_s, entry_max_t));
  int64_t from = static_cast<int64_t>(topk ? entry : own), at = static_cast<int64_t>(best);
  Tensor has = state.slice(0, from, from + 2) == out.slice(0, from, from + 2);
  Tensor classes = at::where(has, state.slice(0, at, at + 2), std::numeric_limits<double>::max());
  out.slice(0, at, at + 2).copy_(all_reduce(classes, "min", group));
  return out;
}

}  // namespace

// Boxed, since the type of the group's name differs between versions of PyTorch.
Tensor all_reduce(const Tensor& x, const char* op, const std::string& group) {
  static auto reduce =
      c10::Dispatcher::singleton().findSchemaOrThrow("_c10d_functional::all_reduce", "");
  static auto wait =
      c10::Dispatcher::singleton().findSchemaOrThrow("_c10d_functional::wait_tensor", "");
  torch::jit::Stack stack = {x.contiguous(), std::string(op), group};
  reduce.callBoxed(stack);
  wait.callBoxed(stack);
  return stack[0].toTensor();
}

LossResult dispatch_forward(const LossCall& call, const Want& want, const OptionalTensor& state) {
  static auto op = dispatched<decltype(distillation_forward)>("kdkernels::_distillation_forward");
  auto [loss, gradient, teacher_gradient, statistics] =
      op.call(call.student, call.teachers, pack(call.rows), state, pack(call.options), bits(want));
  auto if_wanted = [](bool wanted, const Tensor& x) { return wanted ? x : Tensor(); };
  return {loss, if_wanted(want.gradient, gradient),
          if_wanted(want.teacher_gradient, teacher_gradient),
          if_wanted(want.statistics, statistics)};
}

LossResult run_slice(const LossCall& call, const Want& want) {
  static auto stage_op = dispatched<decltype(distillation_stage)>("kdkernels::_distillation_stage");
  PackedOptions options = pack(call.options);
  TensorOptionals row_tensors = pack(call.rows);
  c10::SymInt rows = call.student.sym_numel() / call.student.sym_size(-1);
  std::vector<c10::SymInt> shape = {math::kRowState, rows};
  Tensor state = at::zeros_symint(shape, call.student.options().dtype(at::kDouble));
  auto stage = [&](int64_t which) {
    state = stage_op.call(call.student, call.teachers, row_tensors, state, options, which);
  };
  if (call.options.standardize) {
    stage(kMoments);
    state = reduce_fields(state, "sum", call.group, KD_FIELDS(count_s, square_t));
  }
  stage(kMaxima);
  state = reduce_maxima(state, call.group, call.options.tail != Tail::kNone);
  stage(kSums);
  state = reduce_fields(state, "sum", call.group, KD_FIELDS(sum_s, label_t));
  stage(kTerms);
  state = reduce_fields(state, "sum", call.group, KD_FIELDS(f, part_q));
  if (want.inplace) return launch(call, want, kGradient, state);
  return dispatch_forward(call, want, state);
}
#undef KD_FIELDS

TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  m.def(
      "_distillation_forward(Tensor student, Tensor[] teachers, Tensor?[] rows, Tensor? state, "
      "Scalar?[] options, int want) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "_distillation_stage(Tensor student, Tensor[] teachers, Tensor?[] rows, Tensor state, "
      "Scalar?[] options, int stage) -> Tensor");
}
TORCH_LIBRARY_IMPL(kdkernels, CompositeExplicitAutograd, m) {
  m.impl("_distillation_forward", distillation_forward);
  m.impl("_distillation_stage", distillation_stage);
}

}  // namespace kdkernels
