// linear_distillation_loss: arguments and autograd of the loss of linear heads.
//
// The gradients that are wanted are made in the forward call (ops/linear_forward.cpp); backward scales them. Only a
// loss a row, whose incoming gradients are not known before, is made once more in backward.
#include "ops/linear_distillation.h"

#include <ATen/TensorOperators.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/where.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include <algorithm>
#include <utility>

#include "ops/checks.h"
#include "ops/linear_call.h"
#include "ops/pages.h"

namespace kdkernels {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// ---- autograd -----------------------------------------------------------------------------------

// f(x) for the optional tensor x, which it may set; the same of a tensor.
template <class F>
void set(Tensor& x, F f) {
  x = f(x);
}
template <class F>
void set(OptionalTensor& x, F f) {
  if (x.has_value()) x = f(*x);
}

// The call with its heads and their inputs in a dtype, as a linear layer has them under autocast.
LinearCall in_dtype(LinearCall c, at::ScalarType type) {
  const bool heads = c.has_heads();
  LinearCall::each_of_heads(c, [&](const char* name, auto& x) {
    bool given = std::string_view(name).starts_with("teacher") && !heads;
    if (!given) set(x, [&](const Tensor& tensor) { return tensor.to(type); });
  });
  return c;
}

struct SavedLinear : torch::CustomClassHolder {
  LinearCall call;  // its tensors are saved, in the order of each_saved
  int64_t want;
  at::ScalarType computed;
  at::ScalarType types[3];  // of the gradients
  variable_list kept;  // tensors of inference mode, in the saved ones' places
};

// f(tensor) for each tensor of a call.
template <class F>
void each_saved(LinearCall& c, F f) {
  LinearCall::each_of_heads(c, [&](const char*, auto& x) { f(x); });
  f(c.teacher_index);
  RowTensors::each(c.rows, [&](const char*, OptionalTensor& x) { f(x); });
}

// Takes the tensors out of a call.
variable_list taken(LinearCall& c) {
  variable_list out;
  each_saved(
      c, [&](auto& x) { out.push_back(OptionalTensor(std::exchange(x, {})).value_or(Tensor())); });
  return out;
}

struct LinearLoss : torch::autograd::Function<LinearLoss> {
  static variable_list forward(AutogradContext* ctx, const Tensor& hidden, const Tensor& head,
                               const OptionalTensor& bias, const LinearCall& call,
                               at::ScalarType computed, int64_t want) {
    auto holder = c10::make_intrusive<SavedLinear>();
    holder->call = call;
    variable_list saved = taken(holder->call);
    holder->want = want;
    holder->computed = computed;
    holder->types[0] = hidden.scalar_type();
    holder->types[1] = head.scalar_type();
    holder->types[2] = bias.has_value() ? bias->scalar_type() : computed;
    bool redo = call.options.reduction == Reduction::kNone;
    LinearResult out =
        linear_forward(in_dtype(call, computed), redo ? want & kRowStatistics : want);
    if (redo) {
      // Inference mode's tensors cannot be saved, and nothing writes to them.
      holder->kept.assign(saved.size(), Tensor());
      for (size_t i = 0; i < saved.size(); ++i) {
        if (saved[i].defined() && saved[i].is_inference()) std::swap(holder->kept[i], saved[i]);
      }
      ctx->save_for_backward(std::move(saved));
    } else {
      // Once rounded; but fp16 waits for backward's factor.
      for (int i = 1; i < 3; ++i) {
        Tensor& x = i == 1 ? out.head : out.bias;
        at::ScalarType type = holder->types[i];
        if (!x.defined() || type == at::kHalf || type == x.scalar_type()) continue;
        x = in_huge_pages(at::empty_symint(x.sym_sizes(), x.options().dtype(type))).copy_(x);
      }
      ctx->save_for_backward({out.hidden, out.head, out.bias});
    }
    ctx->set_materialize_grads(false);
    ctx->saved_data["call"] = c10::IValue::make_capsule(std::move(holder));
    if (!out.statistics.defined()) return {out.loss};
    ctx->mark_non_differentiable({out.statistics});
    return {out.loss, out.statistics};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const Tensor& grad_output = grads[0];
    variable_list out(6);
    if (!grad_output.defined()) return out;
    TORCH_CHECK_VALUE(!at::GradMode::is_enabled(),
                      "linear_distillation_loss has no second derivative; pass "
                      "create_graph=False, or backend=\"reference\"");
    auto holder =
        c10::static_intrusive_pointer_cast<SavedLinear>(ctx->saved_data["call"].toCapsule());
    variable_list saved = ctx->get_saved_variables();
    if (holder->call.options.reduction == Reduction::kNone) {
      saved = redone(*holder, saved, grad_output);
    } else {
      bool last = !at::isTensorSubclassLike(grad_output) &&
                  !torch::autograd::get_current_graph_task_keep_graph();
      if (!is_one(grad_output, false, 1, last)) {
        for (int i = 0; i < 3; ++i) {
          if (saved[i].defined()) saved[i] = scaled(saved[i], grad_output, false, 1, last);
        }
      }
    }
    for (int i = 0; i < 3; ++i) {
      if (saved[i].defined()) out[i] = saved[i].to(holder->types[i]);
    }
    return out;
  }

  // The gradients of a loss a row: those of the sum that weighs rows by what comes in.
  static variable_list redone(const SavedLinear& holder, const variable_list& saved,
                              const Tensor& grad_output) {
    LinearCall c = holder.call;
    size_t place = 0;
    each_saved(c, [&](auto& x) {
      const Tensor& kept = holder.kept[place].defined() ? holder.kept[place] : saved[place];
      ++place;
      if (kept.defined()) x = kept;
    });
    OptionalTensor weight = c.rows.weight;
    c.rows.weight = grad_output;
    if (weight.has_value()) {
      Tensor w = weight->to(grad_output.scalar_type());
      c.rows.weight = at::where(w == 0, w, w * grad_output);
    }
    c.options.reduction = Reduction::kSum;
    LinearResult out = linear_forward(in_dtype(c, holder.computed), holder.want & kGradients);
    return {out.hidden, out.head, out.bias};
  }
};

// ---- arguments ----------------------------------------------------------------------------------

void check_frozen(const char* name, const Tensor& tensor) {
  TORCH_CHECK_VALUE(!(at::GradMode::is_enabled() && tensor.requires_grad()), name,
                    " requires grad, but no gradient flows to the teacher; pass ", name,
                    ".detach()");
}

// Dtypes may differ under autocast, which makes them one.
void check_head(const std::string& side, const Tensor& hidden, const Tensor& weight,
                const OptionalTensor& bias, const Tensor& student_hidden, bool autocast) {
  std::string hidden_name = side + "_hidden", weight_name = side + "_weight",
              bias_name = side + "_bias";
  auto check = [&](const std::string& name, const Tensor& tensor) {
    check_tensor(name.c_str(), tensor);
    TORCH_CHECK_TYPE(autocast || tensor.scalar_type() == student_hidden.scalar_type(), name,
                     " has dtype ", tensor.scalar_type(), " and student_hidden ",
                     student_hidden.scalar_type(), "; they must be equal (autocast makes them so)");
    check_device(name.c_str(), tensor, "student_hidden", student_hidden);
  };
  check(hidden_name, hidden);
  TORCH_CHECK_VALUE(hidden.dim() >= 1 && hidden.sym_size(-1) >= 1, hidden_name, " has shape ",
                    hidden.sym_sizes(), "; it takes [*, H] with H of at least 1");
  check(weight_name, weight);
  TORCH_CHECK_VALUE(
      weight.dim() == 2 && weight.sym_size(0) >= 1 && weight.sym_size(1) == hidden.sym_size(-1),
      weight_name, " has shape ", weight.sym_sizes(), "; it takes [V, ", hidden.sym_size(-1),
      "], the last being that of ", hidden_name);
  if (!bias.has_value()) return;
  check(bias_name, *bias);
  TORCH_CHECK_VALUE(bias->dim() == 1 && bias->sym_size(0) == weight.sym_size(0), bias_name,
                    " has shape ", bias->sym_sizes(), "; it takes [", weight.sym_size(0), "]");
}

void check_teacher_head(const LinearCall& c, const LinearTeacher& teacher, bool autocast) {
  const Tensor& hidden = teacher.input;
  check_head("teacher", hidden, *teacher.head, teacher.bias, c.hidden, autocast);
  TORCH_CHECK_VALUE(
      hidden.dim() == c.hidden.dim() && hidden.sym_sizes().slice(0, hidden.dim() - 1) ==
                                            c.hidden.sym_sizes().slice(0, hidden.dim() - 1),
      "teacher_hidden has shape ", hidden.sym_sizes(),
      "; it takes [*, H] with the leading shape of student_hidden, ", c.hidden.sym_sizes());
  TORCH_CHECK_VALUE(teacher.head->sym_size(0) == c.head.sym_size(0), "teacher_weight has ",
                    teacher.head->sym_size(0), " classes and student_weight ", c.head.sym_size(0),
                    "; they must be equal");
  check_frozen("teacher_hidden", hidden);
  check_frozen("teacher_weight", *teacher.head);
  if (teacher.bias.has_value()) check_frozen("teacher_bias", *teacher.bias);
}

void check_teacher_index(const LinearCall& c) {
  const Tensor& index = *c.teacher_index;
  TORCH_CHECK_TYPE(index.scalar_type() == at::kLong, "teacher_index has dtype ",
                   index.scalar_type(), "; it takes int64");
  c10::SymIntArrayRef rows = c.hidden.sym_sizes().slice(0, c.hidden.dim() - 1);
  TORCH_CHECK_VALUE(index.sym_sizes() == rows, "teacher_index has shape ", index.sym_sizes(),
                    "; it takes that of student_hidden without its last dimension, ", rows);
  TORCH_CHECK_VALUE(!c.options.max_rows.has_value(), "max_rows does not go with teacher_index");
}

void check(LinearCall& c, bool autocast, at::ScalarType computed) {
  const Tensor like = c.hidden;
  LinearCall::each_of_heads(c, [&](const char* name, auto& x) {
    set(x, [&](const Tensor& tensor) { return readable(name, tensor, like); });
  });
  set(c.teacher_index, [&](const Tensor& x) { return readable("teacher_index", x, like); });
  check_head("student", c.hidden, c.head, c.bias, c.hidden, autocast);
  if (c.teacher_index.has_value()) check_teacher_index(c);
  // Logits that take no memory, for what is required of all losses.
  auto logits_like = [&](c10::SymIntArrayRef shape) {
    return at::empty({}, c.hidden.options().dtype(computed)).expand_symint(shape);
  };
  std::vector<c10::SymInt> shape = c.hidden.sym_sizes().vec();
  shape.back() = c.head.sym_size(0);
  LossCall call = {logits_like(shape), {}, c.rows, c.options, c.group};
  for (const LinearTeacher& teacher : c.teachers) {
    if (c.has_heads()) {
      check_teacher_head(c, teacher, autocast);
    } else if (c.rows.indices.has_value()) {
      call.teachers.push_back(teacher.input);
    } else {
      check_tensor("teacher_logits", teacher.input);
      check_device("teacher_logits", teacher.input, "student_hidden", c.hidden);
      check_frozen("teacher_logits", teacher.input);
      call.teachers.push_back(logits_like(teacher.input.sym_sizes()));  // any dtype
    }
  }
  if (c.has_heads() || c.teachers.empty()) call.teachers = {call.student};  // one at a time
  check_call(call);
  c.rows = call.rows;
}

}  // namespace

std::vector<Tensor> linear_distillation_loss(const Tensor& student_hidden,
                                             const Tensor& student_weight,
                                             const TensorOptionals& others, at::TensorList teachers,
                                             const TensorOptionals& rows,
                                             const PackedOptions& options, int64_t wishes,
                                             std::string_view group) {
  LinearCall call =
      linear_call(student_hidden, student_weight, others, teachers, rows, options, group);
  at::ScalarType computed = student_hidden.scalar_type();
  c10::DeviceType device = student_hidden.device().type();
  bool autocast = at::autocast::is_autocast_available(device) &&
                  at::autocast::is_autocast_enabled(device) && is_floating_dtype(computed) &&
                  computed != at::kDouble;
  if (autocast) computed = at::autocast::get_autocast_dtype(device);
  check(call, autocast, computed);

  int64_t want = 0;
  if ((wishes & kReturnStatistics) != 0) want |= kRowStatistics;
  if (at::GradMode::is_enabled()) {
    if (call.hidden.requires_grad()) want |= kHidden;
    if (call.head.requires_grad()) want |= kHead;
    if (call.bias.has_value() && call.bias->requires_grad()) want |= kBias;
  }
  if (want & kGradients) {
    return LinearLoss::apply(call.hidden, call.head, call.bias, call, computed, want);
  }
  LinearResult out = linear_forward(in_dtype(call, computed), want);
  if (!out.statistics.defined()) return {out.loss};
  return {out.loss, out.statistics};
}

TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  m.def(
      "linear_distillation_loss(Tensor student_hidden, Tensor student_weight, Tensor?[] others, "
      "Tensor[] teachers, Tensor?[] rows, Scalar?[] options, int wishes=0, str group=\"\") -> "
      "Tensor[]");
}
TORCH_LIBRARY_IMPL(kdkernels, CompositeExplicitAutograd, m) {
  m.impl("linear_distillation_loss", linear_distillation_loss);
}
TORCH_LIBRARY_IMPL(kdkernels, Autograd, m) {
  m.impl("linear_distillation_loss", linear_distillation_loss);
}

}  // namespace kdkernels
