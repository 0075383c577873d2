// distillation_loss: schema, argument checks, CPU and CUDA calls, autograd, autocast, fake tensors.
//
// The forward call makes the gradient in the student's logits along with the loss, while the rows are in
// cache; backward hands it on, scaled where the incoming gradient is not 1.
#include "ops/distillation.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include <cmath>

#include "ops/checks.h"
#include "ops/devices.h"

namespace kdkernels {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

enum Reduction : int64_t { kNone, kSum, kMean };

Reduction parse_reduction(std::string_view name) {
  if (name == "mean") return kMean;
  if (name == "sum") return kSum;
  TORCH_CHECK_VALUE(name == "none", "reduction is \"", name,
                    "\"; it takes \"mean\", \"sum\" or \"none\"");
  return kNone;
}

// The arguments, checked, with defaults filled in.
struct Call {
  Tensor student, teacher;
  OptionalTensor labels, weight;
  double temperature, alpha, label_smoothing;
  int64_t ignore_index;
  std::optional<double> num_items;
  Reduction reduction;
};

void check_shape(const char* name, const Tensor& tensor, c10::SymIntArrayRef shape) {
  TORCH_CHECK_VALUE(tensor.sym_sizes() == shape, name, " has shape ", tensor.sym_sizes(),
                    "; it takes the shape of student_logits without its last dimension, ", shape);
}

Call checked(const Tensor& student, const Tensor& teacher, const OptionalTensor& labels,
             double temperature, std::optional<double> alpha, double label_smoothing,
             int64_t ignore_index, const OptionalTensor& weight, std::optional<double> num_items,
             std::string_view reduction) {
  check_tensor("student_logits", student);
  check_tensor("teacher_logits", teacher);
  TORCH_CHECK_TYPE(student.scalar_type() == teacher.scalar_type(), "teacher_logits has dtype ",
                   teacher.scalar_type(), " and student_logits ", student.scalar_type(),
                   "; they must be equal (autocast makes them so)");
  check_device("teacher_logits", teacher, "student_logits", student);
  TORCH_CHECK_VALUE(student.dim() >= 1 && student.sym_size(-1) >= 1, "student_logits has shape ",
                    student.sym_sizes(), "; it takes [*, V] with at least one class");
  TORCH_CHECK_VALUE(student.sym_sizes() == teacher.sym_sizes(), "teacher_logits has shape ",
                    teacher.sym_sizes(), "; it takes that of student_logits, ",
                    student.sym_sizes());
  TORCH_CHECK_VALUE(!(at::GradMode::is_enabled() && teacher.requires_grad()),
                    "teacher_logits requires grad, but no gradient flows to the teacher; pass "
                    "teacher_logits.detach()");
  c10::SymIntArrayRef leading = student.sym_sizes().slice(0, student.dim() - 1);
  if (labels.has_value()) {
    TORCH_CHECK_TYPE(labels->scalar_type() == at::kLong, "labels has dtype ", labels->scalar_type(),
                     "; it takes int64");
    check_shape("labels", *labels, leading);
    check_device("labels", *labels, "student_logits", student);
  }
  if (weight.has_value()) {
    TORCH_CHECK_TYPE(!weight->is_complex(), "weight has dtype ", weight->scalar_type(),
                     "; it takes a real dtype");
    check_shape("weight", *weight, leading);
    check_device("weight", *weight, "student_logits", student);
    TORCH_CHECK_VALUE(!(at::GradMode::is_enabled() && weight->requires_grad()),
                      "weight requires grad, but no gradient flows to it; pass weight.detach()");
  }
  TORCH_CHECK_VALUE(temperature >= 1e-15 && temperature <= 1e15, "temperature is ", temperature,
                    "; it takes a number above 0 (from 1e-15 to 1e15)");
  double alpha_value = alpha.value_or(labels.has_value() ? 0.5 : 1.0);
  TORCH_CHECK_VALUE(alpha_value >= 0 && alpha_value <= 1, "alpha is ", alpha_value,
                    "; it takes a number in [0, 1]");
  TORCH_CHECK_VALUE(labels.has_value() || alpha_value == 1, "alpha is ", alpha_value,
                    " without labels; cross-entropy's share 1 - alpha needs them");
  TORCH_CHECK_VALUE(label_smoothing >= 0 && label_smoothing <= 1, "label_smoothing is ",
                    label_smoothing, "; it takes a number in [0, 1]");
  Reduction parsed = parse_reduction(reduction);
  if (num_items.has_value()) {
    TORCH_CHECK_VALUE(*num_items > 0 && std::isfinite(*num_items), "num_items is ", *num_items,
                      "; it takes a finite number above 0");
    TORCH_CHECK_VALUE(parsed == kMean, "num_items goes with reduction=\"mean\" only, not \"",
                      reduction, "\"");
  }
  return {student,     teacher,         labels,       weight,    temperature,
          alpha_value, label_smoothing, ignore_index, num_items, parsed};
}

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

// A power of two that keeps fp16 gradients, which a mean over rows makes small, away from underflow until
// backward knows the incoming gradient. 1 for other dtypes, and where weights set no bound.
double gradient_scale(const Call& call) {
  if (call.student.scalar_type() != at::kHalf || call.weight.has_value()) return 1;
  return std::exp2(std::floor(std::log2(16384.0 / std::max(call.temperature, 1.0))));
}

// The loss and, if asked for, its gradient in the student's logits times gradient_scale: new, or written
// over them.
std::tuple<Tensor, Tensor> forward(const Call& call, bool want_gradient, bool inplace) {
  bool cuda = on_cuda(call.student.device());
  at::ScalarType acc = acc_type(call.student);
  auto options = call.student.options();
  c10::SymIntArrayRef shape = call.student.sym_sizes();
  Tensor loss = call.reduction == kNone
                    ? at::empty_symint(shape.slice(0, shape.size() - 1), options.dtype(acc))
                    : at::empty({}, options.dtype(acc));
  if (call.student.is_meta()) {
    return {loss, want_gradient ? at::empty_symint(shape, options) : at::empty({0}, options)};
  }
  int64_t classes = call.student.size(-1), rows = call.student.numel() / classes;

  std::optional<int64_t> student_stride = row_stride(call.student),
                         teacher_stride = row_stride(call.teacher);
  Tensor student = student_stride.has_value() ? call.student : call.student.contiguous();
  Tensor teacher = teacher_stride.has_value() ? call.teacher : call.teacher.contiguous();
  Tensor labels = call.labels.has_value() ? call.labels->contiguous() : Tensor();
  Tensor weight = call.weight.has_value() ? call.weight->to(acc).contiguous() : Tensor();

  DistillationParams p = {};
  p.dtype = dtype_of(student);
  p.rows = rows;
  p.classes = classes;
  p.student = student.const_data_ptr();
  p.student_stride = student_stride.value_or(classes);
  // Without a share in the loss the teacher is not read.
  p.teacher = call.alpha > 0 ? teacher.const_data_ptr() : p.student;
  p.teacher_stride = call.alpha > 0 ? teacher_stride.value_or(classes) : p.student_stride;
  p.labels = labels.defined() ? labels.const_data_ptr<int64_t>() : nullptr;
  p.weight = weight.defined() ? weight.const_data_ptr() : nullptr;
  p.temperature = call.temperature;
  p.alpha = call.alpha;
  p.label_smoothing = call.label_smoothing;
  p.ignore_index = call.ignore_index;
  p.gradient_scale = gradient_scale(call);

  // Before anything is written: labels in range, and what the mean divides by.
  p.denominator =
      call.num_items.value_or(call.reduction == kMean ? static_cast<double>(rows) : 1.0);
  if (!cuda && labels.defined()) {
    for (int64_t i = 0; i < rows; ++i) {
      int64_t label = p.labels[i];
      TORCH_CHECK_VALUE(label == p.ignore_index || (label >= 0 && label < classes), "labels holds ",
                        label, " at position ", i, "; it takes classes in [0, ", classes,
                        ") or ignore_index=", p.ignore_index);
    }
  }
  if (call.reduction == kMean && !call.num_items.has_value() &&
      (labels.defined() || weight.defined())) {
    p.denominator = -1;
    if (!cuda) {
      double kept = 0;
      for (int64_t i = 0; i < rows; ++i) {
        if (labels.defined() && p.labels[i] == p.ignore_index) continue;
        kept += !weight.defined()    ? 1.0
                : acc == at::kDouble ? weight.const_data_ptr<double>()[i]
                                     : static_cast<double>(weight.const_data_ptr<float>()[i]);
      }
      p.denominator = kept;
    }
  }

  Tensor gradient;
  if (want_gradient) {
    gradient = inplace ? call.student.detach() : at::empty(call.student.sizes(), options);
    p.gradient = gradient.mutable_data_ptr();
    p.gradient_stride = inplace ? p.student_stride : classes;
  } else {
    gradient = at::empty({0}, options);
  }
  (call.reduction == kNone ? p.row_loss : p.loss) = loss.mutable_data_ptr();
  if (cuda) {
#if defined(KDKERNELS_WITH_CUDA)
    Tensor workspace = at::empty({cuda::distillation_workspace(rows)}, options.dtype(at::kDouble));
    p.workspace = workspace.mutable_data_ptr<double>();
    launch_cuda(student.device(), [&](cudaStream_t s) { return cuda::distillation(p, s); });
#endif
  } else {
    cpu::distillation(p, at::get_num_threads());
  }
  return {loss, gradient};
}

// The op behind autograd, with only what it needs to know.
std::tuple<Tensor, Tensor> distillation_forward(
    const Tensor& student, const Tensor& teacher, const OptionalTensor& labels,
    const OptionalTensor& weight, double temperature, double alpha, double label_smoothing,
    int64_t ignore_index, std::optional<double> num_items, int64_t reduction, bool want_gradient) {
  Call call = {
      student, teacher,         labels,       weight,    temperature,
      alpha,   label_smoothing, ignore_index, num_items, static_cast<Reduction>(reduction)};
  return forward(call, want_gradient, false);
}

std::tuple<Tensor, Tensor> dispatch_forward(const Call& call, bool want_gradient) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("kdkernels::_distillation_forward", "")
                       .typed<decltype(distillation_forward)>();
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return op.call(call.student, call.teacher, call.labels, call.weight, call.temperature, call.alpha,
                 call.label_smoothing, call.ignore_index, call.num_items, call.reduction,
                 want_gradient);
}

// gradient * grad_output, row by row where there is one a row, into `gradient` itself if it may be.
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

struct DistillationLoss : torch::autograd::Function<DistillationLoss> {
  static Tensor forward(AutogradContext* ctx, const Tensor& student, const Call& call,
                        bool inplace) {
    Tensor loss, gradient;
    if (inplace) {
      std::tie(loss, gradient) = kdkernels::forward(call, true, true);
      student.unsafeGetTensorImpl()->bump_version();
      ctx->save_for_backward({gradient});
    } else {
      std::tie(loss, gradient) = dispatch_forward(call, true);
      // The logits, labels and weights are for a second differentiation.
      ctx->save_for_backward(
          {gradient, student, call.labels.value_or(Tensor()), call.weight.value_or(Tensor())});
    }
    ctx->set_materialize_grads(false);
    ctx->saved_data["temperature"] = call.temperature;
    ctx->saved_data["alpha"] = call.alpha;
    ctx->saved_data["ignore_index"] = call.ignore_index;
    ctx->saved_data["num_items"] = call.num_items;
    ctx->saved_data["reduction"] = static_cast<int64_t>(call.reduction);
    ctx->saved_data["scale"] = gradient_scale(call);
    ctx->saved_data["inplace"] = inplace;
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const Tensor& grad_output = grads[0];
    if (!grad_output.defined()) return {Tensor(), Tensor(), Tensor()};
    variable_list saved = ctx->get_saved_variables();
    Tensor gradient = saved[0];
    bool inplace = ctx->saved_data["inplace"].toBool();
    bool per_row = ctx->saved_data["reduction"].toInt() == kNone;
    double scale = ctx->saved_data["scale"].toDouble();
    if (at::GradMode::is_enabled()) {
      TORCH_CHECK_VALUE(
          !inplace,
          "inplace is True, which keeps no logits to differentiate a second time; pass "
          "inplace=False with create_graph=True");
      return {twice_differentiable(ctx, saved, grad_output, per_row, scale), Tensor(), Tensor()};
    }
    // The buffer is this node's own, so the last backward through it may hand it on or write there.
    bool traced = at::isTensorSubclassLike(grad_output);
    bool last = !traced && !torch::autograd::get_current_graph_task_keep_graph();
    TORCH_CHECK_VALUE(
        last || !inplace || traced,
        "inplace is True, which allows one backward; pass inplace=False with retain_graph=True");
    if (last && grad_output.is_cpu() && !on_cuda(grad_output.device()) && !per_row && scale == 1) {
      double factor = grad_output.scalar_type() == at::kDouble
                          ? *grad_output.const_data_ptr<double>()
                          : *grad_output.const_data_ptr<float>();
      if (factor == 1) return {gradient, Tensor(), Tensor()};
    }
    return {scaled(gradient, grad_output, per_row, scale, last), Tensor(), Tensor()};
  }

  // The gradient as a differentiable function of the student's logits z and of grad_output: the saved
  // value, plus an expression that is zero and has the derivative
  //   d/dz [T alpha softmax(z / T) + (1 - alpha) softmax(z)].
  static Tensor twice_differentiable(AutogradContext* ctx, const variable_list& saved,
                                     const Tensor& grad_output, bool per_row, double scale) {
    const Tensor &gradient = saved[0], &student = saved[1], &labels = saved[2];
    double temperature = ctx->saved_data["temperature"].toDouble();
    double alpha = ctx->saved_data["alpha"].toDouble();
    at::ScalarType acc = acc_type(student);
    Tensor z = student.to(acc);
    Tensor factor = saved[3].defined() ? saved[3].to(acc) : at::ones_like(z.detach().select(-1, 0));
    Tensor dropped = factor == 0;
    if (labels.defined())
      dropped = dropped.logical_or(labels == ctx->saved_data["ignore_index"].toInt());
    factor = at::where(dropped, at::zeros_like(factor), factor);
    if (ctx->saved_data["reduction"].toInt() == kMean) {
      std::optional<double> num_items = ctx->saved_data["num_items"].toOptional<double>();
      Tensor total = factor.sum();
      factor = num_items.has_value() ? factor / *num_items
                                     : at::where(total == 0, factor, factor / total);
    }
    Tensor moving = at::softmax(z / temperature, -1) * (temperature * alpha);
    if (alpha < 1) moving = moving + at::softmax(z, -1) * (1 - alpha);
    Tensor zero = at::where(dropped.unsqueeze(-1), at::zeros_like(z), moving - moving.detach());
    Tensor value = gradient.to(acc) / scale + zero * factor.unsqueeze(-1);
    return (value * (per_row ? grad_output.unsqueeze(-1) : grad_output)).to(student.scalar_type());
  }
};

Tensor loss_autograd(const Tensor& student, const Tensor& teacher, const OptionalTensor& labels,
                     double temperature, std::optional<double> alpha, double label_smoothing,
                     int64_t ignore_index, const OptionalTensor& weight,
                     std::optional<double> num_items, std::string_view reduction, bool inplace) {
  Call call = checked(student, teacher, labels, temperature, alpha, label_smoothing, ignore_index,
                      weight, num_items, reduction);
  if (!(at::GradMode::is_enabled() && student.requires_grad())) {
    return std::get<0>(dispatch_forward(call, false));
  }
  // A tracer plans memory itself.
  inplace = inplace && !at::isTensorSubclassLike(student) && !student.is_meta();
  if (inplace) {
    TORCH_CHECK_VALUE(!student.is_leaf(),
                      "inplace is True, but student_logits is a leaf that requires grad; its "
                      "values would be lost");
    TORCH_CHECK_VALUE(
        row_stride(student).has_value() && at::has_internal_overlap(student) != at::MemOverlap::Yes,
        "inplace is True, but student_logits of shape ", student.sizes(), " and strides ",
        student.strides(), " is not rows of adjacent classes; pass student_logits.contiguous()");
    // A row's gradient is written once that row was read, so the teacher may be the same memory row for row.
    TORCH_CHECK_VALUE(at::get_overlap_status(student, teacher) != at::MemOverlapStatus::Partial,
                      "inplace is True, but teacher_logits overlaps student_logits in memory; pass "
                      "teacher_logits.clone()");
  }
  return DistillationLoss::apply(student, call, inplace);
}

// Where autograd is off altogether (inference mode).
Tensor loss_no_autograd(const Tensor& student, const Tensor& teacher, const OptionalTensor& labels,
                        double temperature, std::optional<double> alpha, double label_smoothing,
                        int64_t ignore_index, const OptionalTensor& weight,
                        std::optional<double> num_items, std::string_view reduction, bool) {
  Call call = checked(student, teacher, labels, temperature, alpha, label_smoothing, ignore_index,
                      weight, num_items, reduction);
  return std::get<0>(dispatch_forward(call, false));
}

using LossSignature = decltype(loss_autograd);

const c10::TypedOperatorHandle<LossSignature>& loss_op() {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("kdkernels::distillation_loss", "")
                       .typed<LossSignature>();
  return op;
}

// Under autocast a layer in the lower dtype may meet one in fp32: both logits take the wider.
template <c10::DispatchKey kKey>
Tensor loss_autocast(const Tensor& student, const Tensor& teacher, const OptionalTensor& labels,
                     double temperature, std::optional<double> alpha, double label_smoothing,
                     int64_t ignore_index, const OptionalTensor& weight,
                     std::optional<double> num_items, std::string_view reduction, bool inplace) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(kKey);
  at::ScalarType wider = c10::promoteTypes(student.scalar_type(), teacher.scalar_type());
  return loss_op().call(student.to(wider), teacher.to(wider), labels, temperature, alpha,
                        label_smoothing, ignore_index, weight, num_items, reduction, inplace);
}

}  // namespace

Tensor distillation_loss(const Tensor& student_logits, const Tensor& teacher_logits,
                         const OptionalTensor& labels, double temperature,
                         std::optional<double> alpha, double label_smoothing, int64_t ignore_index,
                         const OptionalTensor& weight, std::optional<double> num_items,
                         std::string_view reduction, bool inplace) {
  return loss_op().call(student_logits, teacher_logits, labels, temperature, alpha, label_smoothing,
                        ignore_index, weight, num_items, reduction, inplace);
}

TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  m.def(
      "distillation_loss(Tensor student_logits, Tensor teacher_logits, Tensor? labels=None, *, "
      "float temperature=1.0, float? alpha=None, float label_smoothing=0.0, int ignore_index=-100, "
      "Tensor? weight=None, float? num_items=None, str reduction=\"mean\", bool inplace=False) -> "
      "Tensor");
  m.def(
      "_distillation_forward(Tensor student_logits, Tensor teacher_logits, Tensor? labels, Tensor? "
      "weight, "
      "float temperature, float alpha, float label_smoothing, int ignore_index, float? num_items, "
      "int reduction, bool want_gradient) -> (Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(kdkernels, CompositeExplicitAutograd, m) {
  m.impl("distillation_loss", loss_no_autograd);
  m.impl("_distillation_forward", distillation_forward);
}
TORCH_LIBRARY_IMPL(kdkernels, Autograd, m) { m.impl("distillation_loss", loss_autograd); }
TORCH_LIBRARY_IMPL(kdkernels, AutocastCPU, m) {
  m.impl("distillation_loss", loss_autocast<c10::DispatchKey::AutocastCPU>);
}
TORCH_LIBRARY_IMPL(kdkernels, AutocastCUDA, m) {
  m.impl("distillation_loss", loss_autocast<c10::DispatchKey::AutocastCUDA>);
}

}  // namespace kdkernels
