// linear_distillation_loss: the loss of heads' logits, a chunk of rows at a time, so that [N, V] never exists.
//
// A chunk's logits are made by a matrix product into a buffer, the loss writes their gradient over them, and two
// more products take that to the hidden states and to the head. All of it happens in the forward call, for the
// gradients that are wanted; backward scales them. Only a loss a row, whose incoming gradients are not known
// before, is made once more in backward.
#include "ops/linear_distillation.h"

#include <ATen/ScalarOps.h>
#include <ATen/TensorOperators.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include <algorithm>

#include "math/row.h"
#include "ops/checks.h"
#include "ops/devices.h"
#include "ops/linear_products.h"
#include "ops/loss.h"
#include "ops/pages.h"

namespace kdkernels {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct LinearCall {
  Tensor hidden, head;  // [*, H], [V, H]
  OptionalTensor bias;  // [V]
  std::vector<Tensor>
      teachers;  // one [*, Ht] where there is a teacher_head, else as LossCall has them
  OptionalTensor teacher_head, teacher_bias;
  RowTensors rows;
  LossOptions options;
  std::string group;
};

enum WantBits : int64_t { kHidden = 1, kHead = 2, kBias = 4, kGradients = 7, kRowStatistics = 8 };

// Gradients in the hidden states' dtype (fp32 for fp16, which may underflow before backward scales it) and, of the
// head and its bias, in acc; undefined where not wanted.
struct LinearResult {
  Tensor loss, hidden, head, bias;
  Tensor statistics;  // [kStatistics, *]
};

at::ScalarType hidden_gradient_type(const Tensor& hidden) {
  return hidden.scalar_type() == at::kHalf ? at::kFloat : hidden.scalar_type();
}

// The loss 0, and gradients of hidden states and head that are yet to be written.
LinearResult outputs(const LinearCall& c, int64_t want) {
  auto unwritten = [&](c10::SymIntArrayRef shape, const at::TensorOptions& options) {
    return in_huge_pages(at::empty_symint(shape, options));
  };
  auto options = c.hidden.options();
  auto acc = options.dtype(acc_type(c.hidden));
  c10::SymIntArrayRef shape = c.hidden.sym_sizes(), rows = shape.slice(0, shape.size() - 1);
  LinearResult out;
  out.loss =
      c.options.reduction == Reduction::kNone ? at::zeros_symint(rows, acc) : at::zeros({}, acc);
  if (want & kHidden) {
    out.hidden = unwritten(shape, options.dtype(hidden_gradient_type(c.hidden)));
  }
  if (want & kHead) out.head = unwritten(c.head.sym_sizes(), acc);
  if (want & kBias) out.bias = at::zeros_symint(c.head.sym_sizes().slice(0, 1), acc);
  if (want & kRowStatistics) {
    std::vector<c10::SymInt> sizes(rows.begin(), rows.end());
    sizes.insert(sizes.begin(), math::kStatistics);
    out.statistics = at::zeros_symint(sizes, acc);
  }
  return out;
}

// ---- rows ---------------------------------------------------------------------------------------

// The rows that count. Those that do not are not touched, whatever they hold: on the CPU they are left out; on CUDA,
// where counting would wait for the device, their hidden states are read as 0.
struct KeptRows {
  int64_t all, count;
  Tensor index;  // [count], int64; undefined: all of them
  Tensor keep;  // [all, 1], bool; undefined: all of them
  double divisor;  // of the mean
  Tensor device_divisor;  // [], instead

  // Rows [from, from + n) of x.
  Tensor of(const Tensor& x, int64_t from, int64_t n) const {
    return index.defined() ? x.index_select(0, index.narrow(0, from, n)) : x.narrow(0, from, n);
  }
  RowTensors of(RowTensors x, int64_t from, int64_t n) const {
    RowTensors::each(x, [&](const char*, OptionalTensor& tensor) {
      if (tensor.has_value()) tensor = of(*tensor, from, n);
    });
    return x;
  }
  // The same of hidden states, without what rows hold that do not count.
  Tensor hidden(const Tensor& x, int64_t from, int64_t n, at::ScalarType work) const {
    Tensor out = of(x, from, n).to(work);
    return keep.defined() ? at::where(keep.narrow(0, from, n), out, at::zeros({}, out.options()))
                          : out;
  }
  // Writes such rows, along `dim`.
  void put(const Tensor& x, int64_t dim, int64_t from, const Tensor& rows) const {
    Tensor values = rows.to(x.scalar_type());
    if (index.defined()) {
      Tensor into = x;
      into.index_copy_(dim, index.narrow(0, from, rows.size(dim)), values);
    } else {
      x.narrow(dim, from, rows.size(dim)).copy_(values);
    }
  }
};

// The tensors of rows with one dimension for all rows; labels and indices as they are, numbers in acc.
RowTensors flat_rows(RowTensors rows, int64_t all, at::ScalarType acc) {
  RowTensors::each(rows, [&](const char*, OptionalTensor& x) {
    if (!x.has_value()) return;
    bool integers = &x == &rows.labels || &x == &rows.indices;
    Tensor flat = &x == &rows.indices ? x->reshape({all, x->size(-1)}) : x->reshape({all});
    x = (integers ? flat : flat.to(acc)).contiguous();
  });
  return rows;
}

KeptRows kept_rows(const LinearCall& c, const OptionalTensor& labels, const OptionalTensor& weight,
                   int64_t all) {
  KeptRows out = {all, all, {}, {}, static_cast<double>(all), {}};
  bool mean = c.options.reduction == Reduction::kMean && !c.options.num_items.has_value();
  if (!mean) out.divisor = c.options.num_items.value_or(1);
  if (!labels.has_value() && !weight.has_value()) return out;
  if (on_cuda(c.hidden.device())) {
    Tensor factor = weight.has_value()
                        ? *weight
                        : at::ones({all}, c.hidden.options().dtype(acc_type(c.hidden)));
    if (labels.has_value()) {
      factor =
          at::where(*labels != c.options.ignore_index, factor, at::zeros({}, factor.options()));
    }
    out.keep = (factor != 0).unsqueeze(-1);
    if (mean) out.device_divisor = factor.sum();
    out.divisor = mean ? 1 : out.divisor;
    return out;
  }
  const int64_t* label = labels.has_value() ? labels->const_data_ptr<int64_t>() : nullptr;
  std::vector<int64_t> kept;
  double total = 0;
  for (int64_t i = 0; i < all; ++i) {
    if (label != nullptr && label[i] == c.options.ignore_index) continue;
    double w = !weight.has_value()                   ? 1
               : weight->scalar_type() == at::kFloat ? weight->const_data_ptr<float>()[i]
                                                     : weight->const_data_ptr<double>()[i];
    total += w;
    if (w != 0) kept.push_back(i);
  }
  if (mean) out.divisor = total;
  out.count = static_cast<int64_t>(kept.size());
  if (out.count < all) out.index = at::tensor(kept, at::kLong);
  return out;
}

// ---- the loss -----------------------------------------------------------------------------------

LinearResult run(const LinearCall& c, int64_t want) {
  LinearResult out = outputs(c, want);
  if (c.hidden.is_meta()) return out;
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  int64_t width = c.hidden.size(-1), all = c.hidden.numel() / width, classes = c.head.size(0);
  auto flat = [&](const Tensor& x) { return x.reshape({all, x.size(-1)}); };
  at::ScalarType acc = acc_type(c.hidden), product = product_type(c.hidden);
  Tensor hidden = flat(c.hidden);
  RowTensors flat_of = flat_rows(c.rows, all, acc);
  bool topk = flat_of.indices.has_value();
  KeptRows rows = kept_rows(c, flat_of.labels, flat_of.weight, all);

  // fp16 keeps large weights from overflow and small ones from underflow by their maximum.
  Tensor device_factor;
  if (product == at::kHalf && flat_of.weight.has_value() && all > 0) {
    Tensor& weight = *flat_of.weight;
    Tensor largest =
        at::where(rows.keep.squeeze(-1), weight.abs(), at::zeros({}, weight.options())).max();
    device_factor = at::where(largest == 0, at::ones({}, largest.options()), largest);
    weight = weight / device_factor;
  }

  Head head(c.head, c.bias, product);
  std::optional<Head> teacher_head;
  if (c.teacher_head.has_value()) teacher_head.emplace(*c.teacher_head, c.teacher_bias, product);
  bool copied = !topk && (rows.index.defined() || c.teachers[0].scalar_type() != acc);
  int64_t matrices = 1 + (teacher_head.has_value() ? 1
                          : copied                 ? static_cast<int64_t>(c.teachers.size())
                                                   : 0);
  int64_t bytes = static_cast<int64_t>(c10::elementSize(acc)) * matrices;
  if (product != acc) bytes += static_cast<int64_t>(c10::elementSize(product));
  double all_logits = static_cast<double>(all) * static_cast<double>(classes) *
                      static_cast<double>(c.hidden.element_size()) *
                      (teacher_head.has_value() ? 2 : 1);
  const ChunkPlan plan = plan_chunks(rows.count, classes, bytes, all_logits,
                                     c.options.memory_budget, on_cuda(c.hidden.device()));
  const int64_t step = plan.rows;
  auto options = c.hidden.options();
  auto buffer = [&](at::ScalarType type) {
    return in_huge_pages(at::empty({step, plan.pitch}, options.dtype(type))).narrow(1, 0, classes);
  };
  Tensor logits = buffer(acc), teacher_logits = teacher_head.has_value() ? buffer(acc) : Tensor();
  Tensor rounded = product != acc && (want & (kHidden | kHead)) ? buffer(product) : Tensor();
  std::vector<Tensor> teachers;
  for (const Tensor& teacher : c.teachers) teachers.push_back(flat(teacher));
  Tensor row_loss = at::zeros({all}, options.dtype(acc));
  Tensor grad_hidden = out.hidden.defined() ? out.hidden.view({all, width}) : Tensor();
  Tensor statistics =
      out.statistics.defined() ? out.statistics.view({math::kStatistics, all}) : Tensor();
  // A head in blocks adds their products up.
  Tensor grad_rows =
      grad_hidden.defined()
          ? at::empty({step, width}, product == hidden.scalar_type() ? grad_hidden.options()
                                                                     : options.dtype(product))
          : Tensor();
  bool gradients = (want & kGradients) != 0;
  double factor = rows.divisor == 0 ? 0 : 1 / rows.divisor;

  LossCall call;
  call.student = logits;
  call.options = c.options;
  call.options.reduction = Reduction::kNone;
  call.options.num_items = std::nullopt;
  call.group = c.group;
  if (!on_cuda(c.hidden.device())) {
    call.rows = flat_of;
    check_row_values(call, flat_of.labels.value_or(Tensor()), flat_of.indices.value_or(Tensor()));
  }
  if (out.hidden.defined() && rows.index.defined()) out.hidden.zero_();
  if (out.head.defined() && rows.count == 0) out.head.zero_();
  for (int64_t from = 0; from < rows.count; from += step) {
    int64_t n = std::min(step, rows.count - from);
    Tensor h = rows.hidden(hidden, from, n, product);
    call.student = logits.narrow(0, 0, n);
    head.logits(h, call.student);
    call.teachers.clear();
    for (const Tensor& teacher : teachers) {
      if (teacher_head.has_value()) {
        call.teachers.push_back(teacher_logits.narrow(0, 0, n));
        teacher_head->logits(rows.hidden(teacher, from, n, product), call.teachers[0]);
      } else {
        Tensor part = rows.of(teacher, from, n);
        call.teachers.push_back(topk ? part : part.to(acc));
      }
    }
    call.rows = rows.of(flat_of, from, n);
    LossResult loss = run_loss(
        call, {.gradient = gradients, .statistics = statistics.defined(), .inplace = gradients});
    rows.put(row_loss, 0, from, loss.loss);
    if (statistics.defined()) rows.put(statistics, 1, from, loss.statistics);
    if (!gradients) continue;
    if (out.bias.defined()) head.bias_gradient(loss.gradient, factor, out.bias);
    Tensor gradient = loss.gradient;
    double alpha = factor;
    if (rounded.defined()) {
      const double scale = gradient_scale(call, product);
      gradient = rounded.narrow(0, 0, n);
      at::mul_out(gradient, loss.gradient, c10::scalar_to_tensor(scale));
      alpha /= scale;
    }
    if (grad_hidden.defined()) {
      Tensor part = grad_rows.narrow(0, 0, n);
      head.hidden_gradient(gradient, alpha, part);
      rows.put(grad_hidden, 0, from, part);
    }
    if (out.head.defined()) head.weight_gradient(gradient, h, from == 0 ? 0 : 1, alpha, out.head);
  }

  if (rows.device_divisor.defined()) {
    Tensor one = at::ones({}, options.dtype(acc));
    Tensor inverse = at::where(rows.device_divisor == 0, at::zeros({}, one.options()),
                               one / rows.device_divisor);
    device_factor = device_factor.defined() ? device_factor * inverse : inverse;
  }
  if (device_factor.defined()) {
    for (const Tensor& x : {row_loss, out.hidden, out.head, out.bias}) {
      if (x.defined()) x.mul_(device_factor);
    }
  }
  out.loss = c.options.reduction == Reduction::kNone ? row_loss.view(out.loss.sizes())
                                                     : (row_loss.sum(at::kDouble) * factor).to(acc);
  if (!c.group.empty() && out.hidden.defined()) out.hidden = all_reduce(out.hidden, "sum", c.group);
  return out;
}

// The op behind autograd. `others`: the head's bias, the teacher's head and its bias. Outputs that were not asked for
// are empty.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_forward(
    const Tensor& hidden, const Tensor& head, const TensorOptionals& others,
    at::TensorList teachers, const TensorOptionals& rows, const PackedOptions& options,
    int64_t want, std::string_view group) {
  LinearResult out = run({hidden, head, others.get(0), teachers.vec(), others.get(1), others.get(2),
                          unpack(rows), unpack(options), std::string(group)},
                         want);
  auto or_empty = [&](const Tensor& x) {
    return x.defined() ? x : at::empty({0}, hidden.options());
  };
  return {out.loss, or_empty(out.hidden), or_empty(out.head), or_empty(out.bias),
          or_empty(out.statistics)};
}

LinearResult dispatch_forward(const LinearCall& c, int64_t want) {
  static auto op = dispatched<decltype(linear_forward)>("kdkernels::_linear_distillation_forward");
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  auto [loss, hidden, head, bias, statistics] =
      op.call(c.hidden, c.head, TensorOptionals({c.bias, c.teacher_head, c.teacher_bias}),
              c.teachers, pack(c.rows), pack(c.options), want, c.group);
  LinearResult out;
  out.loss = loss;
  if (want & kHidden) out.hidden = hidden;
  if (want & kHead) out.head = head;
  if (want & kBias) out.bias = bias;
  if (want & kRowStatistics) out.statistics = statistics;
  return out;
}

// ---- autograd -----------------------------------------------------------------------------------

// The call with its heads and their inputs in a dtype, as a linear layer has them under autocast.
LinearCall in_dtype(LinearCall c, at::ScalarType type) {
  c.hidden = c.hidden.to(type);
  c.head = c.head.to(type);
  auto cast = [&](OptionalTensor& x) {
    if (x.has_value()) x = x->to(type);
  };
  cast(c.bias);
  if (c.teacher_head.has_value()) c.teachers[0] = c.teachers[0].to(type);
  cast(c.teacher_head);
  cast(c.teacher_bias);
  return c;
}

struct SavedLinear : torch::CustomClassHolder {
  LinearCall call;  // without tensors
  int64_t want;
  at::ScalarType computed;
  at::ScalarType types[3];  // of the gradients
  variable_list kept;  // tensors of inference mode, in the saved ones' places
};

struct LinearLoss : torch::autograd::Function<LinearLoss> {
  static variable_list forward(AutogradContext* ctx, const Tensor& hidden, const Tensor& head,
                               const OptionalTensor& bias, const LinearCall& call,
                               at::ScalarType computed, int64_t want) {
    auto holder = c10::make_intrusive<SavedLinear>();
    holder->call.options = call.options;
    holder->call.group = call.group;
    holder->want = want;
    holder->computed = computed;
    holder->types[0] = hidden.scalar_type();
    holder->types[1] = head.scalar_type();
    holder->types[2] = bias.has_value() ? bias->scalar_type() : computed;
    bool redo = call.options.reduction == Reduction::kNone;
    LinearResult out =
        dispatch_forward(in_dtype(call, computed), redo ? want & kRowStatistics : want);
    if (redo) {
      auto or_none = [](const OptionalTensor& x) { return x.value_or(Tensor()); };
      variable_list saved = {hidden, head, or_none(bias), or_none(call.teacher_head),
                             or_none(call.teacher_bias)};
      RowTensors::each(call.rows,
                       [&](const char*, const OptionalTensor& x) { saved.push_back(or_none(x)); });
      saved.insert(saved.end(), call.teachers.begin(), call.teachers.end());
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
    size_t place = 0;
    auto next = [&] {
      const Tensor& kept = holder.kept[place];
      return kept.defined() ? (++place, kept) : saved[place++];
    };
    auto optional = [](const Tensor& x) { return x.defined() ? OptionalTensor(x) : std::nullopt; };
    LinearCall c = holder.call;
    c.hidden = next();
    c.head = next();
    c.bias = optional(next());
    c.teacher_head = optional(next());
    c.teacher_bias = optional(next());
    RowTensors::each(c.rows, [&](const char*, OptionalTensor& x) { x = optional(next()); });
    while (place < saved.size()) c.teachers.push_back(next());
    OptionalTensor weight = c.rows.weight;
    c.rows.weight = grad_output;
    if (weight.has_value()) {
      Tensor w = weight->to(grad_output.scalar_type());
      c.rows.weight = at::where(w == 0, w, w * grad_output);
    }
    c.options.reduction = Reduction::kSum;
    LinearResult out = dispatch_forward(in_dtype(c, holder.computed), holder.want & kGradients);
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

void check_teacher_head(const LinearCall& c, bool autocast) {
  const Tensor& hidden = c.teachers[0];
  check_head("teacher", hidden, *c.teacher_head, c.teacher_bias, c.hidden, autocast);
  TORCH_CHECK_VALUE(
      hidden.dim() == c.hidden.dim() && hidden.sym_sizes().slice(0, hidden.dim() - 1) ==
                                            c.hidden.sym_sizes().slice(0, hidden.dim() - 1),
      "teacher_hidden has shape ", hidden.sym_sizes(),
      "; it takes [*, H] with the leading shape of student_hidden, ", c.hidden.sym_sizes());
  TORCH_CHECK_VALUE(c.teacher_head->sym_size(0) == c.head.sym_size(0), "teacher_weight has ",
                    c.teacher_head->sym_size(0), " classes and student_weight ", c.head.sym_size(0),
                    "; they must be equal");
  check_frozen("teacher_hidden", hidden);
  check_frozen("teacher_weight", *c.teacher_head);
  if (c.teacher_bias.has_value()) check_frozen("teacher_bias", *c.teacher_bias);
}

void check(LinearCall& c, bool autocast, at::ScalarType computed) {
  c.hidden = readable("student_hidden", c.hidden, c.hidden);
  c.head = readable("student_weight", c.head, c.hidden);
  for (auto [name, tensor] : {std::pair<const char*, OptionalTensor*>{"student_bias", &c.bias},
                              {"teacher_weight", &c.teacher_head},
                              {"teacher_bias", &c.teacher_bias}}) {
    if (tensor->has_value()) *tensor = readable(name, **tensor, c.hidden);
  }
  const char* teacher_name = c.teacher_head.has_value()   ? "teacher_hidden"
                             : c.rows.indices.has_value() ? "teacher_values"
                                                          : "teacher_logits";
  for (Tensor& teacher : c.teachers) teacher = readable(teacher_name, teacher, c.hidden);
  check_head("student", c.hidden, c.head, c.bias, c.hidden, autocast);
  // Logits that take no memory, for what is required of all losses.
  auto like = [&](c10::SymIntArrayRef shape) {
    return at::empty({}, c.hidden.options().dtype(computed)).expand_symint(shape);
  };
  std::vector<c10::SymInt> shape = c.hidden.sym_sizes().vec();
  shape.back() = c.head.sym_size(0);
  LossCall call = {like(shape), c.teachers, c.rows, c.options, c.group};
  if (c.teacher_head.has_value()) {
    check_teacher_head(c, autocast);
    call.teachers = {call.student};
  } else if (!c.rows.indices.has_value()) {
    for (Tensor& teacher : call.teachers) {
      check_tensor("teacher_logits", teacher);
      check_device("teacher_logits", teacher, "student_hidden", c.hidden);
      check_frozen("teacher_logits", teacher);
      teacher = like(teacher.sym_sizes());  // any dtype
    }
  }
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
  LinearCall call = {student_hidden, student_weight,  others.get(0),
                     teachers.vec(), others.get(1),   others.get(2),
                     unpack(rows),   unpack(options), std::string(group)};
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
  LinearResult out = dispatch_forward(in_dtype(call, computed), want);
  if (!out.statistics.defined()) return {out.loss};
  return {out.loss, out.statistics};
}

TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  m.def(
      "linear_distillation_loss(Tensor student_hidden, Tensor student_weight, Tensor?[] others, "
      "Tensor[] teachers, Tensor?[] rows, Scalar?[] options, int wishes=0, str group=\"\") -> "
      "Tensor[]");
  m.def(
      "_linear_distillation_forward(Tensor hidden, Tensor head, Tensor?[] others, "
      "Tensor[] teachers, Tensor?[] rows, Scalar?[] options, int want, str group) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(kdkernels, CompositeExplicitAutograd, m) {
  m.impl("linear_distillation_loss", linear_distillation_loss);
  m.impl("_linear_distillation_forward", linear_forward);
}
TORCH_LIBRARY_IMPL(kdkernels, Autograd, m) {
  m.impl("linear_distillation_loss", linear_distillation_loss);
}

}  // namespace kdkernels
