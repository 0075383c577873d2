// The loss of heads' logits, a chunk of rows at a time, so that [N, V] never exists.
//
// A chunk's logits are made by a matrix product into a buffer, the loss writes their gradient over them, and two
// more products take that to the hidden states and to the head. Rows that have one teacher follow each other, so that
// one head is at work at a time.
#include <ATen/ScalarOps.h>
#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linalg_vecdot.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/topk.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>

#include "math/row.h"
#include "ops/checks.h"
#include "ops/devices.h"
#include "ops/linear_call.h"
#include "ops/linear_products.h"
#include "ops/pages.h"

namespace kdkernels {

using at::Tensor;

TensorOptionals pack_heads(const LinearCall& c) {
  TensorOptionals out({c.bias, c.teacher_index, c.entropy_gradient});
  for (const LinearTeacher& teacher : c.teachers) {
    out.push_back(teacher.head);
    out.push_back(teacher.bias);
  }
  return out;
}

LinearCall linear_call(const Tensor& hidden, const Tensor& head, const TensorOptionals& others,
                       at::TensorList teachers, const TensorOptionals& rows,
                       const PackedOptions& options, std::string_view group) {
  LinearCall out = {.hidden = hidden,
                    .head = head,
                    .bias = others.get(0),
                    .teachers = {},
                    .teacher_index = others.get(1),
                    .entropy_gradient = others.get(2),
                    .rows = unpack(rows),
                    .options = unpack(options),
                    .group = std::string(group)};
  for (size_t m = 0; m < teachers.size(); ++m) {
    out.teachers.push_back({teachers[m], others.get(3 + 2 * m), others.get(4 + 2 * m)});
  }
  return out;
}

namespace {

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
  if (c.options.top_k > 0) {
    std::vector<c10::SymInt> sizes(rows.begin(), rows.end());
    sizes.emplace_back(c.options.top_k);
    out.top_logits = at::zeros_symint(sizes, acc);
    out.top_indices = at::full_symint(sizes, -1, options.dtype(at::kLong));
  }
  return out;
}

class ChunkedLoss {
 public:
  ChunkedLoss(const LinearCall& call, int64_t want)
      : c_(call),
        want_(want),
        out_(outputs(call, want)),
        width_(call.hidden.size(-1)),
        all_(call.hidden.numel() / width_),
        classes_(call.head.size(0)),
        acc_(acc_type(call.hidden)),
        product_(product_type(call.hidden)),
        head_(call.head, call.bias, product_) {}

  LinearResult run() {
    set_rows();
    set_buffers();
    for (const KeptRows& rows : kept_.groups) each_chunk(rows);
    reduce();
    return out_;
  }

 private:
  Tensor flat(const Tensor& x) const { return x.reshape({all_, x.size(-1)}); }
  bool gradients() const { return (want_ & kGradients) != 0; }
  bool topk() const { return rows_.indices.has_value(); }

  void set_rows() {
    rows_ = flat_rows(c_.rows, all_, acc_);
    Tensor teacher;
    if (c_.teacher_index.has_value())
      teacher = c_.teacher_index->reshape({all_}).cpu().contiguous();
    if (c_.entropy_gradient.has_value())
      entropy_ = c_.entropy_gradient->reshape({all_, 1}).to(acc_);
    RowTensors counting = rows_;
    if (entropy_.defined()) counting.weight = std::nullopt;  // its rows count whatever they weigh
    kept_ = kept_rows(counting, c_.options, c_.hidden, all_, teacher, c_.teachers.size());
    factor_ = kept_.divisor == 0 ? 0 : 1 / kept_.divisor;
    // A factor on the device goes with the rows' weights, so that gradients need no pass of their own. But in fp16
    // large weights overflow and small ones underflow: their maximum is taken out.
    OptionalTensor& weight = rows_.weight;
    bool half = product_ == at::kHalf;
    if (kept_.factor.defined() && !half) {
      weight = weight.has_value() ? *weight * kept_.factor : kept_.factor.expand({all_});
      if (entropy_.defined()) entropy_ = entropy_ * kept_.factor;
    } else {
      device_factor_ = kept_.factor;
    }
    if (half && weight.has_value() && all_ > 0) {
      Tensor keep = kept_.groups[0].keep.squeeze(-1);
      Tensor size = entropy_.defined() ? at::maximum(weight->abs(), entropy_.squeeze(-1).abs())
                                       : weight->abs();
      Tensor largest = at::where(keep, size, at::zeros({}, weight->options())).max();
      largest = at::where(largest == 0, at::ones({}, largest.options()), largest);
      weight = *weight / largest;
      if (entropy_.defined()) entropy_ = entropy_ / largest;
      device_factor_ = device_factor_.defined() ? device_factor_ * largest : largest;
    }
    // A teacher without a share in the loss is not read, nor are its logits made.
    reads_teacher_ = c_.options.alpha.value_or(1) > 0 || rows_.options[kAlpha].has_value() ||
                     (want_ & kRowStatistics) || topk();
    reads_teacher_ = reads_teacher_ && !c_.teachers.empty();
  }

  // Separate calls, one for each teacher, have the same chunks.
  ChunkPlan plan_of(const KeptRows& rows) const {
    bool heads = reads_teacher_ && c_.has_heads();
    bool copied = reads_teacher_ && !heads && !topk() &&
                  (rows.index.defined() || c_.teachers[0].input.scalar_type() != acc_);
    int64_t matrices = 1 + (heads ? 1 : copied ? static_cast<int64_t>(c_.teachers.size()) : 0);
    if (entropy_.defined()) matrices += 3;  // of entropy_part
    int64_t bytes = static_cast<int64_t>(c10::elementSize(acc_)) * matrices;
    if (product_ != acc_) bytes += static_cast<int64_t>(c10::elementSize(product_));
    double all_logits = static_cast<double>(c_.teacher_index.has_value() ? rows.count : all_) *
                        static_cast<double>(classes_) *
                        static_cast<double>(c_.hidden.element_size()) * (heads ? 2 : 1);
    return plan_chunks(rows.count, classes_, bytes, all_logits, c_.options.memory_budget,
                       on_cuda(c_.hidden.device()));
  }

  void set_buffers() {
    int64_t step = 1, pitch = classes_;
    for (const KeptRows& rows : kept_.groups) {
      ChunkPlan plan = plan_of(rows);
      step = std::max(step, plan.rows);
      pitch = plan.pitch;
    }
    auto options = c_.hidden.options();
    auto buffer = [&](at::ScalarType type) {
      return in_huge_pages(at::empty({step, pitch}, options.dtype(type))).narrow(1, 0, classes_);
    };
    logits_ = buffer(acc_);
    if (reads_teacher_ && c_.has_heads()) teacher_logits_ = buffer(acc_);
    if (product_ != acc_ && (want_ & (kHidden | kHead))) rounded_ = buffer(product_);
    row_loss_ = at::zeros({all_}, options.dtype(acc_));
    hidden_ = flat(c_.hidden);
    if (out_.statistics.defined()) statistics_ = out_.statistics.view({math::kStatistics, all_});
    int64_t counted = 0;
    for (const KeptRows& rows : kept_.groups) counted += rows.count;
    if (out_.hidden.defined()) {
      if (counted < all_) out_.hidden.zero_();
      grad_hidden_ = out_.hidden.view({all_, width_});
      // A head in blocks adds their products up.
      grad_rows_ =
          at::empty({step, width_}, product_ == hidden_.scalar_type() ? grad_hidden_.options()
                                                                      : options.dtype(product_));
    }
    if (out_.head.defined() && counted == 0) out_.head.zero_();
    call_.options = c_.options;
    call_.options.reduction = Reduction::kNone;
    call_.options.num_items = std::nullopt;
    call_.group = c_.group;
    if (!on_cuda(c_.hidden.device())) {
      call_.student = logits_;
      call_.rows = rows_;
      check_row_values(call_, rows_.labels.value_or(Tensor()), rows_.indices.value_or(Tensor()));
    }
  }

  void each_chunk(const KeptRows& rows) {
    std::optional<Head> teacher;
    std::vector<Tensor> inputs;
    if (reads_teacher_ && c_.has_heads()) {
      const LinearTeacher& t = c_.teachers[rows.teacher];
      teacher.emplace(*t.head, t.bias, product_);
      inputs.push_back(flat(t.input));
    } else if (reads_teacher_) {
      for (const LinearTeacher& t : c_.teachers) inputs.push_back(flat(t.input));
    }
    const int64_t step = plan_of(rows).rows;
    for (int64_t from = 0; from < rows.count; from += step) {
      int64_t n = std::min(step, rows.count - from);
      Tensor h = rows.hidden(hidden_, from, n, product_);
      call_.student = logits_.narrow(0, 0, n);
      head_.logits(h, call_.student);
      call_.teachers.clear();
      if (!reads_teacher_) call_.teachers.push_back(call_.student);
      for (const Tensor& input : inputs) {
        if (teacher.has_value()) {
          call_.teachers.push_back(teacher_logits_.narrow(0, 0, n));
          teacher->logits(rows.hidden(input, from, n, product_), call_.teachers[0]);
        } else {
          Tensor part = rows.of(input, from, n);
          call_.teachers.push_back(topk() ? part : part.to(acc_));
        }
      }
      call_.rows = rows.of(rows_, from, n);
      if (out_.top_logits.defined()) put_largest(rows, from);
      Tensor of_entropy;
      if (entropy_.defined()) {
        of_entropy = entropy_part(rows.kept_or(rows.of(entropy_, from, n), from, 0));
      }
      LossResult loss = run_loss(
          call_,
          {.gradient = gradients(), .statistics = statistics_.defined(), .inplace = gradients()});
      rows.put(row_loss_, 0, from, loss.loss);
      if (statistics_.defined()) rows.put(statistics_, 1, from, loss.statistics);
      if (of_entropy.defined()) loss.gradient.add_(of_entropy);
      if (gradients()) add_gradients(rows, from, h, loss.gradient);
    }
  }

  // The chunk's largest logits, before scale and cap, which keep their order.
  void put_largest(const KeptRows& rows, int64_t from) {
    auto [values, indices] = at::topk(call_.student, c_.options.top_k);
    rows.put(out_.top_logits.view({all_, -1}), 0, from, rows.kept_or(values, from, 0));
    rows.put(out_.top_indices.view({all_, -1}), 0, from, rows.kept_or(indices, from, -1));
  }

  // The share of the entropies H, of gradients g [n, 1], in the gradient of a chunk's logits: -g q (log q + H).
  Tensor entropy_part(const Tensor& g) const {
    const LossOptions& o = c_.options;
    auto number = [&](RowOption option, double value) {
      const OptionalTensor& x = call_.rows.options[option];
      return x.has_value() ? x->unsqueeze(-1)
                           : at::scalar_tensor(value, c_.hidden.options().dtype(acc_));
    };
    Tensor scale = number(kLogitScale, o.logit_scale), u = call_.student * scale, bent;
    if (o.soft_cap.has_value() || call_.rows.options[kSoftCap].has_value()) {
      Tensor cap = number(kSoftCap, o.soft_cap.value_or(0));
      bent = u.div_(cap).tanh_();
      u = (bent * cap)
              .masked_fill_(call_.student == -std::numeric_limits<double>::infinity(),
                            -std::numeric_limits<double>::infinity());
    }
    Tensor log_q =
        at::log_softmax(u, -1).clamp_min_(-1e30);  // of a class that is excluded 0 * log q is 0
    Tensor q = at::exp_out(u, log_q);
    Tensor entropy = -at::linalg_vecdot(q, log_q);
    Tensor out = log_q.add_(entropy.unsqueeze(-1)).mul_(q).mul_(-g * scale);
    return bent.defined() ? out.sub_(out * bent.square_()) : out;
  }

  // Of a chunk of rows from `from` on, of hidden states h.
  void add_gradients(const KeptRows& rows, int64_t from, const Tensor& h, Tensor gradient) {
    if (out_.bias.defined()) head_.bias_gradient(gradient, factor_, out_.bias);
    double alpha = factor_;
    if (rounded_.defined()) {
      const double scale = gradient_scale(call_, product_);
      Tensor into = rounded_.narrow(0, 0, h.size(0));
      at::mul_out(into, gradient, c10::scalar_to_tensor(scale));
      gradient = into;
      alpha /= scale;
    }
    if (grad_hidden_.defined()) {
      Tensor part = grad_rows_.narrow(0, 0, h.size(0));
      head_.hidden_gradient(gradient, alpha, part);
      rows.put(grad_hidden_, 0, from, part);
    }
    if (out_.head.defined()) {
      head_.weight_gradient(gradient, h, head_written_ ? 1 : 0, alpha, out_.head);
      head_written_ = true;
    }
  }

  void reduce() {
    if (device_factor_.defined()) {
      for (const Tensor& x : {row_loss_, out_.hidden, out_.head, out_.bias}) {
        if (x.defined()) x.mul_(device_factor_);
      }
    }
    out_.loss = c_.options.reduction == Reduction::kNone
                    ? row_loss_.view(out_.loss.sizes())
                    : (row_loss_.sum(at::kDouble) * factor_).to(acc_);
    if (!c_.group.empty() && out_.hidden.defined()) {
      out_.hidden = all_reduce(out_.hidden, "sum", c_.group);
    }
  }

  const LinearCall& c_;
  const int64_t want_;
  LinearResult out_;
  const int64_t width_, all_, classes_;
  const at::ScalarType acc_, product_;  // what is summed in; what is multiplied
  Head head_;
  RowTensors rows_;
  RowGroups kept_;
  double factor_ = 1;
  Tensor device_factor_;  // another, or undefined
  Tensor entropy_;  // [all], or undefined
  bool reads_teacher_ = true, head_written_ = false;
  Tensor logits_, teacher_logits_, rounded_, grad_rows_;  // of a chunk
  Tensor hidden_, grad_hidden_, row_loss_, statistics_;  // of all rows
  LossCall call_;
};

// The op behind autograd. Outputs that were not asked for are empty.
using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
Outputs outputs_of(const LinearResult& out, const Tensor& hidden) {
  auto or_empty = [&](const Tensor& x) {
    return x.defined() ? x : at::empty({0}, hidden.options());
  };
  return {out.loss,
          or_empty(out.hidden),
          or_empty(out.head),
          or_empty(out.bias),
          or_empty(out.statistics),
          or_empty(out.top_logits),
          or_empty(out.top_indices)};
}

Outputs run_forward(const Tensor& hidden, const Tensor& head, const TensorOptionals& others,
                    at::TensorList teachers, const TensorOptionals& rows,
                    const PackedOptions& options, int64_t want, std::string_view group) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  LinearCall call = linear_call(hidden, head, others, teachers, rows, options, group);
  return outputs_of(ChunkedLoss(call, want).run(), hidden);
}

Outputs forward_of_shapes(const Tensor& hidden, const Tensor& head, const TensorOptionals& others,
                          at::TensorList teachers, const TensorOptionals& rows,
                          const PackedOptions& options, int64_t want, std::string_view group) {
  LinearCall call = linear_call(hidden, head, others, teachers, rows, options, group);
  return outputs_of(outputs(call, want), hidden);
}

}  // namespace

LinearResult linear_forward(const LinearCall& c, int64_t want) {
  static auto op = dispatched<decltype(run_forward)>("kdkernels::_linear_distillation_forward");
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  std::vector<Tensor> teachers;
  for (const LinearTeacher& teacher : c.teachers) teachers.push_back(teacher.input);
  auto [loss, hidden, head, bias, statistics, top_logits, top_indices] = op.call(
      c.hidden, c.head, pack_heads(c), teachers, pack(c.rows), pack(c.options), want, c.group);
  LinearResult out;
  out.loss = loss;
  if (want & kHidden) out.hidden = hidden;
  if (want & kHead) out.head = head;
  if (want & kBias) out.bias = bias;
  if (want & kRowStatistics) out.statistics = statistics;
  return out;
}

TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  m.def(
      "_linear_distillation_forward(Tensor hidden, Tensor head, Tensor?[] others, "
      "Tensor[] teachers, Tensor?[] rows, Scalar?[] options, int want, str group) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(kdkernels, CompositeExplicitAutograd, m) {
  m.impl("_linear_distillation_forward", run_forward);
}
TORCH_LIBRARY_IMPL(kdkernels, Meta, m) {
  m.impl("_linear_distillation_forward", forward_of_shapes);
}

}  // namespace kdkernels
