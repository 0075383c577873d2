// The op of the losses on logits: autograd, and what it is called with.
//
// The forward call makes the gradient in the student's logits along with the loss, while the rows are in
// cache; backward hands it on, scaled where the incoming gradient is not 1.
#include "ops/distillation.h"

#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/sparse_coo_tensor.h>
#include <ATen/ops/stack.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include "ops/checks.h"

namespace kdkernels {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

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
  // An index of -1 has gradient 0, wherever it stands.
  at.push_back(indices.clamp_min(0).to(at::kLong).reshape(-1));
  return at::sparse_coo_tensor(at::stack(at), entries.reshape(-1), shape);
}

// A call between forward and backward. Its tensors go through save_for_backward, which watches for changes in place;
// but for those of inference mode, which it refuses and which stay here.
struct SavedCall : torch::CustomClassHolder {
  LossCall call;
  Want want;
  double scale;

  // f(a tensor of the call, given or not) for each in a fixed order.
  template <class F>
  void each_tensor(F f) {
    f(call.student);
    for (Tensor& teacher : call.teachers) f(teacher);
    RowTensors::each(call.rows, [&](const char*, OptionalTensor& x) {
      if (x.has_value()) f(*x);
    });
  }
  void move_to(variable_list& saved) {
    each_tensor([&](Tensor& x) {
      if (!x.is_inference()) saved.push_back(std::move(x));
    });
  }
  LossCall with(variable_list::const_iterator saved) const {
    SavedCall out = *this;
    out.each_tensor([&](Tensor& x) {
      if (!x.defined()) x = *saved++;
    });
    return std::move(out.call);
  }
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
    saved.push_back(want.entries_only ? *call.rows.indices : Tensor());
    auto holder = c10::make_intrusive<SavedCall>();
    holder->want = want;
    holder->scale = gradient_scale(call, call.student.scalar_type());
    holder->call.options = call.options;
    holder->call.group = call.group;
    if (want.inplace) {
      student.unsafeGetTensorImpl()->bump_version();
    } else {  // for a second differentiation
      holder->call = call;
      holder->move_to(saved);
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
    bool per_row = holder->call.options.reduction == Reduction::kNone;
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
    TORCH_CHECK_VALUE(holder.call.group.empty(),
                      "process_group: a loss of a shared vocabulary has no second derivative");
    TORCH_CHECK_VALUE(!holder.want.entries_only,
                      "sparse_gradient is True, which has no second derivative");
    variable_list out = differentiable_gradients()(holder.with(saved.begin() + 3), grad_output);
    out.resize(4);
    return out;
  }
};

// Under autocast a layer in the lower dtype may meet one in fp32: all logits take the widest.
void promote(LossCall& call) {
  at::DeviceType device = call.student.device().type();
  // Autocast knows no meta device, among others.
  if (!at::autocast::is_autocast_available(device) || !at::autocast::is_autocast_enabled(device)) {
    return;
  }
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

// What a call is to make, from the wishes and what requires grad.
Want wanted(const LossCall& call, int64_t wishes) {
  const LossOptions& o = call.options;
  bool inplace = (wishes & kInplace) != 0, sparse = (wishes & kSparseGradient) != 0;
  TORCH_CHECK_VALUE(
      !sparse || (o.tail == Tail::kRenormalize && !call.rows.options[kAlpha].has_value() &&
                  alpha_of(o, call.rows.labels.has_value()) == 1),
      "sparse_gradient is True, but every column has a gradient; it goes with "
      "tail=\"renormalize\" and alpha=1");
  Want want = {.statistics = (wishes & kReturnStatistics) != 0};
  if (!at::GradMode::is_enabled()) return want;
  want.gradient = call.student.requires_grad();
  for (const Tensor& t : call.teachers) want.teacher_gradient |= t.requires_grad();
  if (!want.gradient && !want.teacher_gradient) return want;
  TORCH_CHECK_VALUE(!want.teacher_gradient || call.teachers.size() == 1,
                    "teacher_logits holds several teachers of which one requires grad");
  TORCH_CHECK_VALUE(!(inplace && sparse),
                    "inplace and sparse_gradient are both True; a sparse gradient has no place");
  // A tracer plans memory itself, and knows no sparse gradients.
  bool eager = !at::isTensorSubclassLike(call.student) && !call.student.is_meta();
  want.inplace = inplace && eager && want.gradient;
  want.entries_only = sparse && eager;
  return want;
}

}  // namespace

void set_differentiable_gradients(DifferentiableGradients gradients) {
  differentiable_gradients() = std::move(gradients);
}

std::vector<Tensor> distillation_loss(const Tensor& student_logits, at::TensorList teachers,
                                      const TensorOptionals& rows, const PackedOptions& options,
                                      int64_t wishes, std::string_view group) {
  LossCall call = {student_logits, teachers.vec(), unpack(rows), unpack(options),
                   std::string(group)};
  promote(call);
  check_call(call);
  Want want = wanted(call, wishes);
  LossResult out;
  if (!want.gradient && !want.teacher_gradient) {
    out = run_loss(call, want);
  } else {
    if (want.inplace) check_inplace(call);
    variable_list outputs = DistillationLoss::apply(
        call.student, want.teacher_gradient ? OptionalTensor(call.teachers[0]) : std::nullopt, call,
        want);
    out.loss = outputs[0];
    if (want.statistics) out.statistics = outputs[1];
  }
  if (!want.statistics) return {std::move(out.loss)};
  return {std::move(out.loss), std::move(out.statistics)};
}

TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  m.def(
      "distillation_loss(Tensor student_logits, Tensor[] teachers, Tensor?[] rows, "
      "Scalar?[] options, int wishes=0, str group=\"\") -> Tensor[]");
}
TORCH_LIBRARY_IMPL(kdkernels, CompositeExplicitAutograd, m) {
  m.impl("distillation_loss", distillation_loss);
}
TORCH_LIBRARY_IMPL(kdkernels, Autograd, m) { m.impl("distillation_loss", distillation_loss); }

}  // namespace kdkernels
