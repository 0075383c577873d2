// The distillation losses on logits: schema, argument checks, CPU and CUDA calls, autograd, fake tensors.
//
// The forward call makes the gradient in the student's logits along with the loss, while the rows are in
// cache; backward hands it on, scaled where the incoming gradient is not 1.
#include "ops/distillation.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sparse_coo_tensor.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include <cmath>
#include <cstddef>
#include <limits>

#include "math/row.h"
#include "ops/checks.h"
#include "ops/devices.h"
#include "ops/pages.h"

namespace kdkernels {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using math::Divergence;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// ---- options ------------------------------------------------------------------------------------

Reduction parse_reduction(std::string_view name) {
  if (name == "mean") return Reduction::kMean;
  if (name == "sum") return Reduction::kSum;
  TORCH_CHECK_VALUE(name == "none", "reduction is \"", name,
                    "\"; it takes \"mean\", \"sum\" or \"none\"");
  return Reduction::kNone;
}

Tail parse_tail(std::string_view name) {
  if (name == "none") return Tail::kNone;
  if (name == "renormalize") return Tail::kRenormalize;
  if (name == "bucket") return Tail::kBucket;
  TORCH_CHECK_VALUE(name == "ignore", "tail is \"", name,
                    "\"; it takes \"renormalize\", \"bucket\" or \"ignore\"");
  return Tail::kIgnore;
}

// A divergence's name, what its parameters are unless given, and up to where they go.
struct DivergenceName {
  std::string_view name;
  Divergence divergence;
  double alpha, beta;  // NaN: it has no such parameter
  double largest;
};
constexpr double kNone = std::numeric_limits<double>::quiet_NaN();
constexpr double kAny = std::numeric_limits<double>::max();
constexpr DivergenceName kDivergences[] = {
    {"forward_kl", Divergence::kForwardKL, kNone, kNone, 0},
    {"reverse_kl", Divergence::kReverseKL, kNone, kNone, 0},
    {"js", Divergence::kJS, kNone, 0.5, 1},
    {"skew_forward_kl", Divergence::kSkewForwardKL, kNone, 0.1, 1},
    {"skew_reverse_kl", Divergence::kSkewReverseKL, kNone, 0.1, 1},
    {"total_variation", Divergence::kTotalVariation, kNone, kNone, 0},
    {"alpha_beta", Divergence::kAlphaBeta, 0.2, 0.7, kAny},
    {"decoupled", Divergence::kDecoupled, 1.0, 8.0, kAny},
};

double parameter(const char* argument, std::optional<double> given, double usual, double largest,
                 std::string_view divergence) {
  if (!given.has_value()) return usual;
  TORCH_CHECK_VALUE(usual == usual, argument, " is ", *given, ", but divergence \"", divergence,
                    "\" has no such parameter");
  TORCH_CHECK_VALUE(*given >= 0 && *given <= largest && std::isfinite(*given), argument, " is ",
                    *given, "; divergence \"", divergence, "\" takes ",
                    largest == 1 ? "a number in [0, 1]" : "a finite number of at least 0");
  return *given;
}

void set_divergence(std::string_view name, std::optional<double> alpha, std::optional<double> beta,
                    LossOptions& out) {
  for (const DivergenceName& d : kDivergences) {
    if (name != d.name) continue;
    out.divergence = d.divergence;
    double first = parameter("divergence_alpha", alpha, d.alpha, d.largest, name);
    double second = parameter("beta", beta, d.beta, d.largest, name);
    bool two = d.alpha == d.alpha;
    out.beta = two ? first : second == second ? second : 0;
    out.second = two ? second : 0;
    // The limits, exactly.
    if (d.divergence == Divergence::kJS && second == 0) out.divergence = Divergence::kForwardKL;
    if (d.divergence == Divergence::kJS && second == 1) out.divergence = Divergence::kReverseKL;
    if (d.divergence == Divergence::kSkewForwardKL && second == 0) {
      out.divergence = Divergence::kForwardKL;
    }
    if (d.divergence == Divergence::kSkewReverseKL && second == 0) {
      out.divergence = Divergence::kReverseKL;
    }
    if (d.divergence == Divergence::kAlphaBeta) {
      TORCH_CHECK_VALUE(first > 0 || second > 0,
                        "divergence_alpha and beta are both 0; divergence \"alpha_beta\" takes "
                        "at least one above 0");
      if (first == 1 && second == 0) out.divergence = Divergence::kForwardKL;
      if (first == 0 && second == 1) out.divergence = Divergence::kReverseKL;
    }
    return;
  }
  std::string names;
  for (const DivergenceName& d : kDivergences) {
    names += (names.empty() ? "\"" : ", \"") + std::string(d.name) + "\"";
  }
  TORCH_CHECK_VALUE(false, "divergence is \"", name, "\"; it takes one of ", names);
}

// ---- checks -------------------------------------------------------------------------------------

void check_shape(const char* name, const Tensor& tensor, c10::SymIntArrayRef shape) {
  TORCH_CHECK_VALUE(tensor.sym_sizes() == shape, name, " has shape ", tensor.sym_sizes(),
                    "; it takes the shape of student_logits without its last dimension, ", shape);
}

// One number a row, or none.
void check_rows(const char* name, const OptionalTensor& tensor, const Tensor& student) {
  if (!tensor.has_value()) return;
  TORCH_CHECK_TYPE(!tensor->is_complex(), name, " has dtype ", tensor->scalar_type(),
                   "; it takes a real dtype");
  check_shape(name, *tensor, student.sym_sizes().slice(0, student.dim() - 1));
  check_device(name, *tensor, "student_logits", student);
  TORCH_CHECK_VALUE(!(at::GradMode::is_enabled() && tensor->requires_grad()), name,
                    " requires grad, but no gradient flows to it; pass ", name, ".detach()");
}

void check_dense_teacher(const Tensor& teacher, const Tensor& student) {
  check_tensor("teacher_logits", teacher);
  TORCH_CHECK_TYPE(student.scalar_type() == teacher.scalar_type(), "teacher_logits has dtype ",
                   teacher.scalar_type(), " and student_logits ", student.scalar_type(),
                   "; they must be equal (autocast makes them so)");
  check_device("teacher_logits", teacher, "student_logits", student);
  TORCH_CHECK_VALUE(student.sym_sizes() == teacher.sym_sizes(), "teacher_logits has shape ",
                    teacher.sym_sizes(), "; it takes that of student_logits, ",
                    student.sym_sizes());
}

void check_topk_teacher(const LossCall& call) {
  const Tensor &student = call.student, &values = call.teachers[0];
  const LossOptions& o = call.options;
  check_tensor("teacher_values", values);
  check_device("teacher_values", values, "student_logits", student);
  int64_t dims = student.dim();
  TORCH_CHECK_VALUE(values.dim() == dims && values.sym_sizes().slice(0, dims - 1) ==
                                                student.sym_sizes().slice(0, dims - 1),
                    "teacher_values has shape ", values.sym_sizes(),
                    "; it takes [*, K] with the leading shape of student_logits, ",
                    student.sym_sizes());
  TORCH_CHECK_VALUE(values.sym_size(-1) >= 1 && values.sym_size(-1) <= kMaxTopK,
                    "teacher_values has ", values.sym_size(-1),
                    " entries a row; it takes from 1 to ", kMaxTopK);
  TORCH_CHECK_TYPE(call.indices.has_value(), "teacher_indices is None; it takes a tensor");
  TORCH_CHECK_TYPE(
      call.indices->scalar_type() == at::kLong || call.indices->scalar_type() == at::kInt,
      "teacher_indices has dtype ", call.indices->scalar_type(), "; it takes int32 or int64");
  TORCH_CHECK_VALUE(call.indices->sym_sizes() == values.sym_sizes(), "teacher_indices has shape ",
                    call.indices->sym_sizes(), "; it takes that of teacher_values, ",
                    values.sym_sizes());
  check_device("teacher_indices", *call.indices, "student_logits", student);
  if (call.teacher_logsumexp.has_value()) {
    check_tensor("teacher_logsumexp", *call.teacher_logsumexp);
    check_rows("teacher_logsumexp", call.teacher_logsumexp, student);
  }
  TORCH_CHECK_VALUE(!(at::GradMode::is_enabled() && values.requires_grad()),
                    "teacher_values requires grad; pass teacher_values.detach()");
  TORCH_CHECK_VALUE(o.divergence == Divergence::kForwardKL ||
                        o.divergence == Divergence::kReverseKL || o.divergence == Divergence::kJS,
                    "divergence is not one that a top-k teacher goes with: \"forward_kl\", "
                    "\"reverse_kl\" or \"js\"");
  TORCH_CHECK_VALUE(!o.probs,
                    "teacher_kind is \"probs\"; of a top-k teacher it takes \"logits\" or "
                    "\"log_probs\"");
}

// ---- kernels ------------------------------------------------------------------------------------

// The distance between rows, if all leading dimensions collapse into one of that stride and the classes
// lie side by side.
std::optional<int64_t> row_stride(const Tensor& logits) {
  int64_t dims = logits.dim();
  if (logits.numel() == 0) return logits.size(-1);
  if (logits.size(-1) > 1 && logits.stride(-1) != 1) return std::nullopt;
  int64_t stride = logits.size(-1), rows = 1;
  for (int64_t d = dims - 2; d >= 0; --d) {
    if (logits.size(d) == 1) continue;
    if (rows == 1) {
      stride = logits.stride(d);
    } else if (logits.stride(d) != stride * rows) {
      return std::nullopt;
    }
    rows *= logits.size(d);
  }
  return stride;
}

// Whether the one-pass kernel of forward KL does it.
bool one_pass(const LossCall& call, const Want& want) {
  const LossOptions& o = call.options;
  return o.divergence == Divergence::kForwardKL && o.tail == Tail::kNone &&
         call.teachers.size() == 1 && !o.probs && !o.standardize && o.logit_scale == 1 &&
         o.soft_cap == 0 && o.teacher_logit_scale == 1 && o.teacher_soft_cap == 0 &&
         !want.teacher_gradient && !want.statistics;
}

// The sum of the kept rows' weights, on the CPU.
double kept_weight(const Tensor& labels, const Tensor& weight, int64_t rows, int64_t ignore_index) {
  const int64_t* label = labels.defined() ? labels.const_data_ptr<int64_t>() : nullptr;
  auto sum = [&](auto zero, auto weight_of) {
    auto kept = zero;
    for (int64_t i = 0; i < rows; ++i) {
      kept += label == nullptr || label[i] != ignore_index ? weight_of(i) : zero;
    }
    return static_cast<double>(kept);
  };
  if (!weight.defined()) return sum(int64_t{0}, [](int64_t) { return int64_t{1}; });
  if (weight.scalar_type() == at::kDouble) {
    return sum(0.0, [w = weight.const_data_ptr<double>()](int64_t i) { return w[i]; });
  }
  return sum(0.0, [w = weight.const_data_ptr<float>()](int64_t i) { return double{w[i]}; });
}

// Rows as a kernel reads them: the tensor itself or, where they do not lie so, a copy.
struct Rows {
  Tensor tensor;
  int64_t stride;
  explicit Rows(const Tensor& logits) {
    std::optional<int64_t> found = row_stride(logits);
    tensor = found.has_value() ? logits : logits.contiguous();
    stride = found.value_or(logits.size(-1));
  }
};

// The outputs that a call wants, not yet written.
LossResult outputs(const LossCall& call, const Want& want) {
  const Tensor& student = call.student;
  auto options = student.options();
  c10::SymIntArrayRef shape = student.sym_sizes(), rows = shape.slice(0, shape.size() - 1);
  at::ScalarType acc = acc_type(student);
  LossResult out;
  out.loss = call.options.reduction == Reduction::kNone ? at::empty_symint(rows, options.dtype(acc))
                                                        : at::empty({}, options.dtype(acc));
  if (want.gradient && want.entries_only) {
    out.gradient = at::empty_symint(call.teachers[0].sym_sizes(), options);
  } else if (want.gradient) {
    out.gradient =
        want.inplace ? student.detach() : in_huge_pages(at::empty_symint(shape, options));
  }
  if (want.teacher_gradient) {
    out.teacher_gradient = in_huge_pages(at::empty_symint(shape, options));
  }
  if (want.statistics) {
    std::vector<c10::SymInt> sizes(rows.begin(), rows.end());
    sizes.insert(sizes.begin(), math::kStatistics);
    out.statistics = at::empty_symint(sizes, options.dtype(acc));
  }
  return out;
}

// One call of a kernel: all of a loss, or one stage of it with its `state`.
LossResult launch(const LossCall& call, const Want& want, int stages, const Tensor& state) {
  const LossOptions& o = call.options;
  bool last = (stages & kGradient) != 0;
  LossResult out;
  if (last) out = outputs(call, want);
  if (call.student.is_meta()) return out;
  bool cuda = on_cuda(call.student.device());
  at::ScalarType acc = acc_type(call.student);
  int64_t classes = call.student.size(-1), rows = call.student.numel() / classes;
  bool topk = o.tail != Tail::kNone, reads_teacher = o.alpha > 0 || want.statistics || topk;

  Rows student(call.student);
  Tensor labels = call.labels.has_value() ? call.labels->contiguous() : Tensor();
  Tensor weight = call.weight.has_value() ? call.weight->to(acc).contiguous() : Tensor();
  Tensor indices = call.indices.has_value() ? call.indices->contiguous() : Tensor();
  Tensor logsumexp =
      call.teacher_logsumexp.has_value() ? call.teacher_logsumexp->to(acc).contiguous() : Tensor();
  // Not once more by later stages.
  if (!cuda && (stages & (kMoments | kMaxima)) != 0) check_classes(call, labels, indices);

  DivergenceParams p = {};
  p.dtype = dtype_of(call.student);
  p.rows = rows;
  p.classes = classes;
  p.student = student.tensor.const_data_ptr();
  p.student_stride = student.stride;
  p.labels = labels.defined() ? labels.const_data_ptr<int64_t>() : nullptr;
  p.weight = weight.defined() ? weight.const_data_ptr() : nullptr;
  p.temperature = o.temperature;
  p.alpha = o.alpha;
  p.label_smoothing = o.label_smoothing;
  p.ignore_index = o.ignore_index;
  p.gradient_scale = gradient_scale(call);
  p.denominator = o.num_items > 0                          ? o.num_items
                  : o.reduction != Reduction::kMean        ? 1.0
                  : !labels.defined() && !weight.defined() ? static_cast<double>(rows)
                  : cuda ? -1.0
                         : kept_weight(labels, weight, rows, o.ignore_index);
  if (want.gradient && last) {
    void* data = out.gradient.mutable_data_ptr();
    (want.entries_only ? p.entry_gradient : p.gradient) = data;
    p.gradient_stride = want.inplace ? p.student_stride : classes;
  }
  if (last) {
    (o.reduction == Reduction::kNone ? p.row_loss : p.loss) = out.loss.mutable_data_ptr();
  }

  // Without a share in the loss the teacher is not read.
  c10::SmallVector<Rows, 1> teachers;
  for (const Tensor& teacher : call.teachers) {
    if (topk) {
      teachers.emplace_back(teacher.to(acc).contiguous());
    } else if (reads_teacher) {
      teachers.emplace_back(teacher);
    } else {
      teachers.push_back(student);
    }
  }
  p.teacher = teachers[0].tensor.const_data_ptr();
  p.teacher_stride = teachers[0].stride;
  Tensor workspace;
  [[maybe_unused]] auto make_workspace = [&](int64_t (*size)(int64_t)) {
    workspace = at::empty({size(rows)}, call.student.options().dtype(at::kDouble));
    p.workspace = workspace.mutable_data_ptr<double>();
  };
  if (stages == kAllStages && one_pass(call, want)) {
    if (cuda) {
#if defined(KDKERNELS_WITH_CUDA)
      make_workspace(cuda::distillation_workspace);
      launch_cuda(call.student.device(), [&](cudaStream_t s) { return cuda::distillation(p, s); });
#endif
    } else {
      cpu::distillation(p, at::get_num_threads());
    }
    return out;
  }

  p.divergence = o.divergence;
  p.beta = o.beta;
  p.second = o.second;
  p.logit_scale = o.logit_scale;
  p.soft_cap = o.soft_cap;
  p.teacher_logit_scale = o.teacher_logit_scale;
  p.teacher_soft_cap = o.teacher_soft_cap;
  p.standardize = o.standardize;
  p.probs = o.probs;
  p.log_mix = o.log_mix;
  p.teachers = static_cast<int>(teachers.size());
  for (int i = 0; i < p.teachers; ++i) {
    p.teacher_data[i] = teachers[i].tensor.const_data_ptr();
    p.teacher_strides[i] = teachers[i].stride;
    p.teacher_weights[i] = o.teacher_weights[i];
  }
  if (want.teacher_gradient && last) {
    p.teacher_gradient = out.teacher_gradient.mutable_data_ptr();
    p.teacher_gradient_stride = classes;
  }
  if (want.statistics && last) p.statistics = out.statistics.mutable_data_ptr();
  p.tail = o.tail;
  if (topk) {
    p.entries = indices.size(-1);
    p.indices = indices.const_data_ptr();
    p.wide_indices = indices.scalar_type() == at::kLong;
    p.teacher_logsumexp = logsumexp.defined() ? logsumexp.const_data_ptr() : nullptr;
  }
  p.first_class = o.first_class;
  p.all_classes = o.all_classes != 0 ? o.all_classes : classes;
  p.stages = stages;
  p.state = state.defined() ? state.mutable_data_ptr<double>() : nullptr;
  if (cuda) {
#if defined(KDKERNELS_WITH_CUDA)
    make_workspace(cuda::divergence_workspace);
    launch_cuda(call.student.device(), [&](cudaStream_t s) { return cuda::divergence(p, s); });
#endif
  } else {
    cpu::divergence(p, at::get_num_threads());
  }
  return out;
}

// ---- the ops below autograd ---------------------------------------------------------------------

constexpr int64_t kWantGradient = 1, kWantTeacher = 2, kWantStatistics = 4, kWantEntries = 8;

int64_t bits(const Want& want) {
  return (want.gradient ? kWantGradient : 0) | (want.teacher_gradient ? kWantTeacher : 0) |
         (want.statistics ? kWantStatistics : 0) | (want.entries_only ? kWantEntries : 0);
}

LossCall call_of(const Tensor& student, at::TensorList teachers, const OptionalTensor& labels,
                 const OptionalTensor& weight, const OptionalTensor& indices,
                 const OptionalTensor& teacher_logsumexp, at::ArrayRef<double> options) {
  return {student,
          teachers.vec(),
          labels,
          weight,
          indices,
          teacher_logsumexp,
          LossOptions::unpacked(options),
          ""};
}

// Outputs that were not asked for are empty. `state`: of a slice whose other stages are done.
std::tuple<Tensor, Tensor, Tensor, Tensor> distillation_forward(
    const Tensor& student, at::TensorList teachers, const OptionalTensor& labels,
    const OptionalTensor& weight, const OptionalTensor& indices,
    const OptionalTensor& teacher_logsumexp, const OptionalTensor& state,
    at::ArrayRef<double> options, int64_t want) {
  LossCall call = call_of(student, teachers, labels, weight, indices, teacher_logsumexp, options);
  Want wanted = {(want & kWantGradient) != 0, (want & kWantTeacher) != 0,
                 (want & kWantStatistics) != 0, (want & kWantEntries) != 0, false};
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
                          const OptionalTensor& labels, const OptionalTensor& weight,
                          const OptionalTensor& indices, const OptionalTensor& teacher_logsumexp,
                          const Tensor& state, at::ArrayRef<double> options, int64_t stage) {
  LossCall call = call_of(student, teachers, labels, weight, indices, teacher_logsumexp, options);
  Tensor out = state.clone();
  launch(call, {false, false, true, false, false}, static_cast<int>(stage), out);
  return out;
}

LossResult dispatch_forward(const LossCall& call, const Want& want, const OptionalTensor& state) {
  static auto op = dispatched<decltype(distillation_forward)>("kdkernels::_distillation_forward");
  std::vector<double> options = call.options.packed();
  auto [loss, gradient, teacher_gradient, statistics] =
      op.call(call.student, call.teachers, call.labels, call.weight, call.indices,
              call.teacher_logsumexp, state, options, bits(want));
  auto if_wanted = [](bool wanted, const Tensor& x) { return wanted ? x : Tensor(); };
  return {loss, if_wanted(want.gradient, gradient),
          if_wanted(want.teacher_gradient, teacher_gradient),
          if_wanted(want.statistics, statistics)};
}

// ---- a vocabulary that processes share ----------------------------------------------------------

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

LossResult sliced(const LossCall& call, const Want& want) {
  static auto stage_op = dispatched<decltype(distillation_stage)>("kdkernels::_distillation_stage");
  std::vector<double> options = call.options.packed();
  c10::SymInt rows = call.student.sym_numel() / call.student.sym_size(-1);
  std::vector<c10::SymInt> shape = {math::kRowState, rows};
  Tensor state = at::zeros_symint(shape, call.student.options().dtype(at::kDouble));
  auto stage = [&](int64_t which) {
    state = stage_op.call(call.student, call.teachers, call.labels, call.weight, call.indices,
                          call.teacher_logsumexp, state, options, which);
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

// ---- autograd -----------------------------------------------------------------------------------

DifferentiableGradients& differentiable_gradients() {
  static DifferentiableGradients gradients;
  return gradients;
}

// The gradient of a top-k loss from its entries', [*, K], as a sparse tensor of the student's shape.
Tensor sparse_gradient(const Tensor& entries, const Tensor& indices, at::IntArrayRef shape) {
  std::vector<Tensor> at;
  for (int64_t d = 0; d + 1 < entries.dim(); ++d) {
    std::vector<int64_t> along(static_cast<size_t>(entries.dim()), 1);
    along[d] = entries.size(d);
    Tensor index = at::arange(entries.size(d), indices.options().dtype(at::kLong));
    at.push_back(index.view(along).expand(entries.sizes()).reshape(-1));
  }
  // What is no entry has gradient 0, wherever it stands.
  at.push_back(indices.clamp_min(0).to(at::kLong).reshape(-1));
  return at::sparse_coo_tensor(at::stack(at), entries.reshape(-1), shape);
}

// The options of a call, for backward. No tensors: those go through save_for_backward.
struct SavedCall : torch::CustomClassHolder {
  LossOptions options;
  std::string group;
  size_t teachers;
  Want want;
  double scale;
};

struct DistillationLoss : torch::autograd::Function<DistillationLoss> {
  // The teacher is the only one, given where it requires grad.
  static variable_list forward(AutogradContext* ctx, const Tensor& student,
                               const OptionalTensor& /* teacher */, const LossCall& call,
                               const Want& want) {
    LossResult out = run_loss(call, want);
    variable_list saved;
    saved.reserve(8 + call.teachers.size());
    saved.push_back(std::move(out.gradient));
    saved.push_back(std::move(out.teacher_gradient));
    saved.push_back(want.entries_only ? *call.indices : Tensor());
    auto holder = c10::make_intrusive<SavedCall>();
    holder->options = call.options;
    holder->group = call.group;
    holder->teachers = call.teachers.size();
    holder->want = want;
    holder->scale = gradient_scale(call);
    if (want.inplace) {
      student.unsafeGetTensorImpl()->bump_version();
    } else {
      // For a second differentiation.
      saved.push_back(student);
      for (const OptionalTensor* x :
           {&call.labels, &call.weight, &call.indices, &call.teacher_logsumexp}) {
        saved.push_back(x->has_value() ? **x : Tensor());
      }
      saved.insert(saved.end(), call.teachers.begin(), call.teachers.end());
    }
    ctx->save_for_backward(std::move(saved));
    ctx->set_materialize_grads(false);
    ctx->saved_data["call"] = c10::IValue::make_capsule(std::move(holder));
    if (!want.statistics) return {out.loss};
    ctx->mark_non_differentiable({out.statistics});
    return {out.loss, out.statistics};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const Tensor& grad_output = grads[0];
    if (!grad_output.defined()) return {Tensor(), Tensor(), Tensor(), Tensor()};
    variable_list saved = ctx->get_saved_variables();
    auto holder =
        c10::static_intrusive_pointer_cast<SavedCall>(ctx->saved_data["call"].toCapsule());
    const Want& want = holder->want;
    if (at::GradMode::is_enabled()) return again(*holder, saved, grad_output);
    bool traced = at::isTensorSubclassLike(grad_output);
    bool last = !traced && !torch::autograd::get_current_graph_task_keep_graph();
    TORCH_CHECK_VALUE(
        last || !want.inplace || traced,
        "inplace is True, which allows one backward; pass inplace=False with retain_graph=True");
    variable_list out = {saved[0], saved[1], Tensor(), Tensor()};
    bool per_row = holder->options.reduction == Reduction::kNone;
    if (!is_one(grad_output, per_row, holder->scale, last)) {
      for (int i = 0; i < 2; ++i) {
        if (out[i].defined()) {
          out[i] = scaled(out[i], grad_output, per_row, holder->scale, last);
        }
      }
    }
    if (want.entries_only) out[0] = sparse_gradient(out[0], saved[2], saved[3].sizes());
    return out;
  }

  static variable_list again(const SavedCall& holder, const variable_list& saved,
                             const Tensor& grad_output) {
    TORCH_CHECK_VALUE(!holder.want.inplace,
                      "inplace is True, which keeps no logits to differentiate a second time; pass "
                      "inplace=False with create_graph=True");
    TORCH_CHECK_VALUE(holder.group.empty(),
                      "process_group: a loss of a shared vocabulary has no second derivative");
    TORCH_CHECK_VALUE(!holder.want.entries_only,
                      "sparse_gradient is True, which has no second derivative");
    auto optional = [](const Tensor& x) { return x.defined() ? OptionalTensor(x) : std::nullopt; };
    LossCall call = {saved[3],           {saved.begin() + 8, saved.end()},
                     optional(saved[4]), optional(saved[5]),
                     optional(saved[6]), optional(saved[7]),
                     holder.options,     ""};
    variable_list out = differentiable_gradients()(call, grad_output);
    out.resize(4);
    return out;
  }
};

// Under autocast a layer in the lower dtype may meet one in fp32: all logits take the widest.
void promote(LossCall& call) {
  if (!at::autocast::is_autocast_enabled(call.student.device().type())) return;
  at::ScalarType wider = call.student.scalar_type();
  bool dense = call.options.tail == Tail::kNone;
  for (const Tensor& teacher : call.teachers) {
    if (dense) wider = c10::promoteTypes(wider, teacher.scalar_type());
  }
  call.student = call.student.to(wider);
  for (Tensor& teacher : call.teachers) {
    if (dense) teacher = teacher.to(wider);
  }
}

// That the classes of a row's entries differ, and are some.
template <class Index>
void check_entries(const Index* index, const Tensor& indices, int64_t classes) {
  std::vector<uint64_t> seen(static_cast<size_t>(classes / 64 + 1), 0);  // a bit a class
  int64_t entries = indices.size(-1);
  for (int64_t i = 0; i < indices.numel(); i += entries) {
    for (int64_t e = i; e < i + entries; ++e) {
      int64_t at = index[e];
      TORCH_CHECK_VALUE(at >= -1 && at < classes, "teacher_indices holds ", at, " in row ",
                        i / entries, "; it takes classes in [0, ", classes,
                        "), or -1 for no entry");
      if (at < 0) continue;
      uint64_t bit = uint64_t{1} << (at % 64);
      TORCH_CHECK_VALUE((seen[at / 64] & bit) == 0, "teacher_indices holds ", at, " twice in row ",
                        i / entries, "; a row's classes must differ");
      seen[at / 64] |= bit;
    }
    for (int64_t e = i; e < i + entries; ++e) {
      if (index[e] >= 0) seen[index[e] / 64] = 0;
    }
  }
}

void check_inplace(const LossCall& call) {
  const Tensor& student = call.student;
  TORCH_CHECK_VALUE(!student.is_leaf(),
                    "inplace is True, but student_logits is a leaf that requires grad; its "
                    "values would be lost");
  TORCH_CHECK_VALUE(
      row_stride(student).has_value() && at::has_internal_overlap(student) != at::MemOverlap::Yes,
      "inplace is True, but student_logits of shape ", student.sizes(), " and strides ",
      student.strides(), " is not rows of adjacent classes; pass student_logits.contiguous()");
  // A row's gradient is written once that row was read, so a teacher may be the same memory row for row.
  for (const Tensor& teacher : call.teachers) {
    TORCH_CHECK_VALUE(at::get_overlap_status(student, teacher) != at::MemOverlapStatus::Partial,
                      "inplace is True, but teacher_logits overlaps student_logits in memory; pass "
                      "teacher_logits.clone()");
  }
}

}  // namespace

// ---- what other ops share -----------------------------------------------------------------------

std::vector<double> LossOptions::packed() const {
  std::vector<double> out = {static_cast<double>(divergence),
                             beta,
                             second,
                             temperature,
                             alpha,
                             label_smoothing,
                             logit_scale,
                             soft_cap,
                             teacher_logit_scale,
                             teacher_soft_cap,
                             num_items,
                             static_cast<double>(ignore_index),
                             static_cast<double>(reduction),
                             static_cast<double>(tail),
                             static_cast<double>(probs),
                             static_cast<double>(log_mix),
                             static_cast<double>(standardize),
                             static_cast<double>(first_class),
                             static_cast<double>(all_classes)};
  out.insert(out.end(), teacher_weights.begin(), teacher_weights.end());
  return out;
}

LossOptions LossOptions::unpacked(at::ArrayRef<double> x) {
  constexpr size_t kNumbers = 19;
  return {static_cast<Divergence>(x[0]),
          x[1],
          x[2],
          x[3],
          x[4],
          x[5],
          x[6],
          x[7],
          x[8],
          x[9],
          x[10],
          static_cast<int64_t>(x[11]),
          static_cast<Reduction>(x[12]),
          static_cast<Tail>(x[13]),
          x[14] != 0,
          x[15] != 0,
          x[16] != 0,
          {x.begin() + kNumbers, x.end()},
          static_cast<int64_t>(x[17]),
          static_cast<int64_t>(x[18])};
}

LossOptions loss_options(bool labels, int64_t teachers, double temperature,
                         std::optional<double> alpha, std::string_view divergence,
                         std::optional<double> divergence_alpha, std::optional<double> beta,
                         std::string_view tail, std::string_view teacher_kind,
                         at::ArrayRef<double> teacher_weights, std::string_view teacher_mixture,
                         bool standardize, double logit_scale, std::optional<double> soft_cap,
                         double teacher_logit_scale, std::optional<double> teacher_soft_cap,
                         double label_smoothing, int64_t ignore_index,
                         std::optional<double> num_items, std::string_view reduction,
                         int64_t first_class, int64_t all_classes) {
  LossOptions o = {};
  set_divergence(divergence, divergence_alpha, beta, o);
  TORCH_CHECK_VALUE(temperature >= 1e-15 && temperature <= 1e15, "temperature is ", temperature,
                    "; it takes a number above 0 (from 1e-15 to 1e15)");
  o.temperature = temperature;
  o.alpha = alpha.value_or(labels ? 0.5 : 1.0);
  TORCH_CHECK_VALUE(o.alpha >= 0 && o.alpha <= 1, "alpha is ", o.alpha,
                    "; it takes a number in [0, 1]");
  TORCH_CHECK_VALUE(labels || o.alpha == 1, "alpha is ", o.alpha,
                    " without labels; cross-entropy's share 1 - alpha needs them");
  TORCH_CHECK_VALUE(labels || o.divergence != Divergence::kDecoupled,
                    "labels is None; divergence \"decoupled\" needs them");
  TORCH_CHECK_VALUE(label_smoothing >= 0 && label_smoothing <= 1, "label_smoothing is ",
                    label_smoothing, "; it takes a number in [0, 1]");
  o.label_smoothing = label_smoothing;
  o.tail = parse_tail(tail);
  TORCH_CHECK_VALUE(
      teacher_kind == "logits" || teacher_kind == "log_probs" || teacher_kind == "probs",
      "teacher_kind is \"", teacher_kind, "\"; it takes \"logits\", \"log_probs\" or \"probs\"");
  o.probs = teacher_kind == "probs";
  TORCH_CHECK_VALUE(teacher_mixture == "probs" || teacher_mixture == "log_probs",
                    "teacher_mixture is \"", teacher_mixture,
                    "\"; it takes \"probs\" or \"log_probs\"");
  o.log_mix = teacher_mixture == "log_probs";
  o.standardize = standardize;

  auto factor = [](const char* name, double value) {
    TORCH_CHECK_VALUE(std::isfinite(value) && value > 0, name, " is ", value,
                      "; it takes a finite number above 0");
    return value;
  };
  bool logits = teacher_kind == "logits" && o.tail == Tail::kNone;
  TORCH_CHECK_VALUE(logits || teacher_logit_scale == 1, "teacher_logit_scale is ",
                    teacher_logit_scale, ", but goes with teacher_kind=\"logits\" only");
  TORCH_CHECK_VALUE(logits || !teacher_soft_cap.has_value(), "teacher_soft_cap is ",
                    teacher_soft_cap.value_or(0), ", but goes with teacher_kind=\"logits\" only");
  o.logit_scale = factor("logit_scale", logit_scale);
  o.teacher_logit_scale = factor("teacher_logit_scale", teacher_logit_scale);
  o.soft_cap = soft_cap.has_value() ? factor("soft_cap", *soft_cap) : 0;
  o.teacher_soft_cap =
      teacher_soft_cap.has_value() ? factor("teacher_soft_cap", *teacher_soft_cap) : 0;

  o.ignore_index = ignore_index;
  o.reduction = parse_reduction(reduction);
  if (num_items.has_value()) {
    TORCH_CHECK_VALUE(*num_items > 0 && std::isfinite(*num_items), "num_items is ", *num_items,
                      "; it takes a finite number above 0");
    TORCH_CHECK_VALUE(o.reduction == Reduction::kMean,
                      "num_items goes with reduction=\"mean\" only, not \"", reduction, "\"");
  }
  o.num_items = num_items.value_or(0);

  TORCH_CHECK_VALUE(teachers >= 1 && teachers <= kMaxTeachers, "teacher_logits holds ", teachers,
                    " teachers; it takes from 1 to ", kMaxTeachers);
  TORCH_CHECK_VALUE(
      teacher_weights.empty() || static_cast<int64_t>(teacher_weights.size()) == teachers,
      "teacher_weights holds ", teacher_weights.size(), " numbers for ", teachers,
      teachers == 1 ? " teacher" : " teachers");
  double total = 0;
  for (int64_t i = 0; i < teachers; ++i) {
    double w = teacher_weights.empty() ? 1.0 : teacher_weights[i];
    TORCH_CHECK_VALUE(std::isfinite(w) && w >= 0, "teacher_weights holds ", w,
                      "; it takes finite numbers of at least 0");
    total += w;
    o.teacher_weights.push_back(w);
  }
  TORCH_CHECK_VALUE(total > 0, "teacher_weights are all 0");
  for (double& w : o.teacher_weights) w /= total;
  o.first_class = first_class;
  o.all_classes = all_classes;
  return o;
}

void check_call(const LossCall& call) {
  const Tensor& student = call.student;
  const LossOptions& o = call.options;
  check_tensor("student_logits", student);
  TORCH_CHECK_VALUE(student.dim() >= 1 && student.sym_size(-1) >= 1, "student_logits has shape ",
                    student.sym_sizes(), "; it takes [*, V] with at least one class");
  if (o.tail == Tail::kNone) {
    for (const Tensor& teacher : call.teachers) check_dense_teacher(teacher, student);
  } else {
    check_topk_teacher(call);
  }
  if (call.labels.has_value()) {
    TORCH_CHECK_TYPE(call.labels->scalar_type() == at::kLong, "labels has dtype ",
                     call.labels->scalar_type(), "; it takes int64");
    check_rows("labels", call.labels, student);
  }
  check_rows("weight", call.weight, student);
  if (o.all_classes != 0) {
    TORCH_CHECK_VALUE(o.first_class >= 0 && student.sym_size(-1) + o.first_class <= o.all_classes,
                      "student_logits has ", student.sym_size(-1), " columns from ", o.first_class,
                      " on of a vocabulary of ", o.all_classes);
    TORCH_CHECK_VALUE(call.teachers.size() == 1,
                      "teacher_logits holds several teachers, whose mixture process_group cannot "
                      "make; mix them before");
  }
}

void check_logsumexp(const LossCall& call, std::string_view teacher_kind) {
  const LossOptions& o = call.options;
  if (o.tail == Tail::kBucket || o.tail == Tail::kIgnore) {
    TORCH_CHECK_VALUE(
        call.teacher_logsumexp.has_value() || (teacher_kind == "log_probs" && o.temperature == 1),
        "teacher_logsumexp is None; tail=\"bucket\" and \"ignore\" need the logsumexp "
        "of all the teacher's logits / temperature, but for log-probabilities at "
        "temperature 1");
  } else {
    TORCH_CHECK_VALUE(!call.teacher_logsumexp.has_value(),
                      "teacher_logsumexp goes with tail=\"bucket\" or \"ignore\" only");
  }
}

void check_classes(const LossCall& call, const Tensor& labels, const Tensor& indices) {
  const LossOptions& o = call.options;
  int64_t classes = o.all_classes != 0 ? o.all_classes : call.student.size(-1);
  const int64_t* label = labels.defined() ? labels.const_data_ptr<int64_t>() : nullptr;
  int64_t rows = labels.defined() ? labels.numel() : 0;
  auto fits = [&](int64_t x) { return (x == o.ignore_index) | (uint64_t(x) < uint64_t(classes)); };
  bool all_fit = true;  // first, since a loop that may raise has no vectors
  for (int64_t i = 0; i < rows; ++i) all_fit &= fits(label[i]);
  for (int64_t i = 0; !all_fit && i < rows; ++i) {
    TORCH_CHECK_VALUE(fits(label[i]), "labels holds ", label[i], " at position ", i,
                      "; it takes classes in [0, ", classes, ") or ignore_index=", o.ignore_index);
  }
  if (!indices.defined()) return;
  if (indices.scalar_type() == at::kLong) {
    check_entries(indices.const_data_ptr<int64_t>(), indices, classes);
  } else {
    check_entries(indices.const_data_ptr<int32_t>(), indices, classes);
  }
}

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

Tensor scaled(const Tensor& gradient, const Tensor& grad_output, bool per_row, double scale,
              bool may_overwrite) {
  Tensor factor = scale == 1 ? grad_output : grad_output / scale;
  if (per_row) factor = factor.unsqueeze(-1);
  if (!may_overwrite) return gradient.mul(factor).to(gradient.scalar_type());
#if defined(KDKERNELS_WITH_CUDA)
  if (on_cuda(gradient.device())) {
    // A kernel that reads the factor on the device and returns at once where it is 1.
    Tensor on_device = factor.to(acc_type(gradient)).contiguous();
    int64_t classes = gradient.size(-1);
    ScaleParams p = {dtype_of(gradient),
                     gradient.mutable_data_ptr(),
                     gradient.numel() / classes,
                     classes,
                     row_stride(gradient).value_or(classes),
                     on_device.const_data_ptr(),
                     per_row};
    launch_cuda(gradient.device(), [&](cudaStream_t s) { return cuda::scale_rows(p, s); });
    return gradient;
  }
#endif
  return gradient.mul_(factor);
}

bool is_one(const Tensor& grad_output, bool per_row, double scale, bool last) {
  if (!last || !grad_output.is_cpu() || on_cuda(grad_output.device()) || per_row || scale != 1) {
    return false;
  }
  return grad_output.scalar_type() == at::kDouble ? *grad_output.const_data_ptr<double>() == 1
                                                  : *grad_output.const_data_ptr<float>() == 1;
}

double gradient_scale(const LossCall& call) {
  if (call.student.scalar_type() != at::kHalf || call.weight.has_value()) return 1;
  // Forward KL's gradient is at most T; others grow with the logarithm of a ratio of probabilities.
  double bound = call.options.divergence == Divergence::kForwardKL ? 16384 : 64;
  return std::exp2(std::floor(std::log2(bound / std::max(call.options.temperature, 1.0))));
}

LossResult run_loss(const LossCall& call, const Want& want) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  if (!call.group.empty()) return sliced(call, want);
  // In place nothing is traced; see who sets it.
  if (want.inplace || !at::isTensorSubclassLike(call.student)) {
    return launch(call, want, kAllStages, Tensor());
  }
  return dispatch_forward(call, want, std::nullopt);
}

void set_differentiable_gradients(DifferentiableGradients gradients) {
  differentiable_gradients() = std::move(gradients);
}

std::vector<Tensor> distillation_loss(
    const Tensor& student_logits, at::TensorList teacher, const OptionalTensor& labels,
    const OptionalTensor& indices, const OptionalTensor& teacher_logsumexp,
    const OptionalTensor& weight, double temperature, std::optional<double> alpha,
    std::string_view divergence, std::optional<double> divergence_alpha, std::optional<double> beta,
    std::string_view tail, std::string_view teacher_kind, at::ArrayRef<double> teacher_weights,
    std::string_view teacher_mixture, bool standardize, double logit_scale,
    std::optional<double> soft_cap, double teacher_logit_scale,
    std::optional<double> teacher_soft_cap, double label_smoothing, int64_t ignore_index,
    std::optional<double> num_items, std::string_view reduction, bool inplace, bool sparse_gradient,
    bool statistics, std::string_view group, int64_t first_class, int64_t all_classes) {
  LossCall call = {
      student_logits,
      teacher.vec(),
      labels,
      weight,
      indices,
      teacher_logsumexp,
      loss_options(labels.has_value(), static_cast<int64_t>(teacher.size()), temperature, alpha,
                   divergence, divergence_alpha, beta, tail, teacher_kind, teacher_weights,
                   teacher_mixture, standardize, logit_scale, soft_cap, teacher_logit_scale,
                   teacher_soft_cap, label_smoothing, ignore_index, num_items, reduction,
                   first_class, all_classes),
      std::string(group)};
  promote(call);
  check_call(call);
  const LossOptions& o = call.options;
  check_logsumexp(call, teacher_kind);
  TORCH_CHECK_VALUE(!sparse_gradient || (o.tail == Tail::kRenormalize && o.alpha == 1),
                    "sparse_gradient is True, but with tail=\"", tail, "\" and alpha=", o.alpha,
                    " every column has a gradient; it goes with tail=\"renormalize\" and alpha=1");

  Want want = {};
  want.statistics = statistics;
  bool grad = at::GradMode::is_enabled();
  want.gradient = grad && call.student.requires_grad();
  for (const Tensor& t : call.teachers) want.teacher_gradient |= grad && t.requires_grad();
  LossResult out;
  if (!want.gradient && !want.teacher_gradient) {
    out = run_loss(call, want);
  } else {
    TORCH_CHECK_VALUE(!want.teacher_gradient || call.teachers.size() == 1,
                      "teacher_logits holds several teachers of which one requires grad");
    // A tracer plans memory itself, and knows no sparse gradients.
    bool eager = !at::isTensorSubclassLike(call.student) && !call.student.is_meta();
    want.inplace = inplace && eager && want.gradient;
    want.entries_only = sparse_gradient && eager;
    TORCH_CHECK_VALUE(!(inplace && sparse_gradient),
                      "inplace and sparse_gradient are both True; a sparse gradient has no place");
    if (want.inplace) check_inplace(call);
    variable_list outputs = DistillationLoss::apply(
        call.student, want.teacher_gradient ? OptionalTensor(call.teachers[0]) : std::nullopt, call,
        want);
    out.loss = outputs[0];
    if (statistics) out.statistics = outputs[1];
  }
  if (!statistics) return {std::move(out.loss)};
  return {std::move(out.loss), std::move(out.statistics)};
}

TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  m.def(
      "distillation_loss(Tensor student_logits, Tensor[] teacher, Tensor? labels=None, Tensor? "
      "indices=None, Tensor? teacher_logsumexp=None, Tensor? weight=None, float temperature=1.0, "
      "float? alpha=None, str divergence=\"forward_kl\", float? divergence_alpha=None, float? "
      "beta=None, str tail=\"none\", str teacher_kind=\"logits\", float[] teacher_weights=[], str "
      "teacher_mixture=\"probs\", bool standardize=False, float logit_scale=1.0, float? "
      "soft_cap=None, float teacher_logit_scale=1.0, float? teacher_soft_cap=None, float "
      "label_smoothing=0.0, int ignore_index=-100, float? num_items=None, str reduction=\"mean\", "
      "bool inplace=False, bool sparse_gradient=False, bool statistics=False, str group=\"\", int "
      "first_class=0, int all_classes=0) -> Tensor[]");
  m.def(
      "_distillation_forward(Tensor student, Tensor[] teachers, Tensor? labels, Tensor? weight, "
      "Tensor? indices, Tensor? teacher_logsumexp, Tensor? state, float[] options, int want) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "_distillation_stage(Tensor student, Tensor[] teachers, Tensor? labels, Tensor? weight, "
      "Tensor? indices, Tensor? teacher_logsumexp, Tensor state, float[] options, int stage) -> "
      "Tensor");
}
TORCH_LIBRARY_IMPL(kdkernels, CompositeExplicitAutograd, m) {
  m.impl("distillation_loss", distillation_loss);
  m.impl("_distillation_forward", distillation_forward);
  m.impl("_distillation_stage", distillation_stage);
}
TORCH_LIBRARY_IMPL(kdkernels, Autograd, m) { m.impl("distillation_loss", distillation_loss); }

}  // namespace kdkernels
