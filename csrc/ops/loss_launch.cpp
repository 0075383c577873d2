// From a checked call to the kernels' parameters and back: outputs, workspace, one launch.
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>

#include "math/row.h"
#include "ops/checks.h"
#include "ops/devices.h"
#include "ops/loss.h"
#include "ops/pages.h"

namespace kdkernels {

using at::Tensor;

bool RowTensors::has_options() const {
  return std::any_of(options.begin(), options.end(), [](const auto& x) { return x.has_value(); });
}

std::vector<bool> RowTensors::given_options() const {
  std::vector<bool> out;
  for (const OptionalTensor& x : options) out.push_back(x.has_value());
  return out;
}

TensorOptionals pack(const RowTensors& rows) {
  size_t place = 0, needed = 0;
  RowTensors::each(rows, [&](const char*, const OptionalTensor& x) {
    ++place;
    if (x.has_value()) needed = place;
  });
  TensorOptionals out;
  out.reserve(needed);
  RowTensors::each(rows, [&](const char*, const OptionalTensor& x) {
    if (out.size() < needed) out.push_back(x);
  });
  return out;
}

RowTensors unpack(const TensorOptionals& packed) {
  RowTensors out;
  size_t place = 0;
  RowTensors::each(out, [&](const char*, OptionalTensor& x) {
    if (place < packed.size()) x = packed.get(place++);
  });
  return out;
}

std::optional<RowStrides> row_strides(const Tensor& logits) {
  RowStrides out = {.inner = logits.size(-1)};
  if (logits.numel() == 0) return out;
  if (logits.size(-1) > 1 && logits.stride(-1) != 1) return std::nullopt;
  int64_t rows = 1, runs = 1;
  for (int64_t d = logits.dim() - 2; d >= 0; --d) {
    const int64_t size = logits.size(d), stride = logits.stride(d);
    if (size == 1) continue;
    if (rows == 1) {
      out.inner = stride;
      rows = size;
    } else if (runs == 1 && stride == out.inner * rows) {
      rows *= size;
    } else if (runs == 1 && logits.numel() / logits.size(-1) < INT32_MAX) {
      out = rows_in_runs(out.inner, stride, rows);
      runs = size;
    } else if (runs > 1 && stride == out.outer * runs) {
      runs *= size;
    } else {
      return std::nullopt;
    }
  }
  return out;
}

namespace {

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

// Logits as a kernel reads them: the tensor itself or, where RowStrides cannot say where its rows lie, a copy.
struct Matrix {
  Tensor tensor;
  RowStrides strides;
  explicit Matrix(const Tensor& logits) {
    std::optional<RowStrides> found = row_strides(logits);
    tensor = found.has_value() ? logits : logits.contiguous();
    strides = found.value_or(RowStrides{.inner = logits.size(-1)});
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

// The tensors that say something of rows, contiguous and in the kernels' dtypes; undefined where there is none.
struct PlainRows {
  Tensor labels, weight, indices, logsumexp, options[kRowOptions];

  PlainRows(const RowTensors& rows, at::ScalarType acc) {
    auto in_acc = [acc](const OptionalTensor& x) {
      return x.has_value() ? x->to(acc).contiguous() : Tensor();
    };
    auto as_is = [](const OptionalTensor& x) { return x.has_value() ? x->contiguous() : Tensor(); };
    labels = as_is(rows.labels);
    indices = as_is(rows.indices);
    weight = in_acc(rows.weight);
    logsumexp = in_acc(rows.teacher_logsumexp);
    for (int i = 0; i < kRowOptions; ++i) options[i] = in_acc(rows.options[i]);
  }
};

const void* data_of(const Tensor& x) { return x.defined() ? x.const_data_ptr() : nullptr; }
void* out_data_of(const Tensor& x) { return x.defined() ? x.mutable_data_ptr() : nullptr; }

Denominator denominator_of(const LossCall& call, const PlainRows& rows, int64_t count, bool cuda) {
  const LossOptions& o = call.options;
  if (o.num_items.has_value()) return {*o.num_items};
  if (o.reduction != Reduction::kMean) return {1};
  if (!rows.labels.defined() && !rows.weight.defined()) return {static_cast<double>(count)};
  if (cuda) return {0, true};
  return {kept_weight(rows.labels, rows.weight, count, o.ignore_index)};
}

// What a call's options say, in the kernels' words.
void set_options(const LossCall& call, const PlainRows& rows, LossParams& p) {
  const LossOptions& o = call.options;
  p.ignore_index = o.ignore_index;
  p.temperature = o.temperature;
  p.alpha = alpha_of(o, rows.labels.defined());
  p.label_smoothing = o.label_smoothing;
  p.logit_scale = o.logit_scale;
  p.soft_cap = o.soft_cap.value_or(0);
  p.teacher_logit_scale = o.teacher_logit_scale;
  p.teacher_soft_cap = o.teacher_soft_cap.value_or(0);
  p.standardize = o.standardize;
  p.probs = o.teacher_kind == TeacherKind::kProbs;
  p.log_mix = o.teacher_mixture == Mixture::kLogProbs;
  p.tail = o.tail;
  p.first_class = o.first_class;
  p.all_classes = o.all_classes != 0 ? o.all_classes : p.classes;
  for (int i = 0; i < kRowOptions; ++i) p.row_options[i] = data_of(rows.options[i]);
  if (p.row_options[kAlpha] != nullptr) p.alpha = 0.5;  // both losses, as far as the call says
  set_divergence(o, p);
}

void set_teachers(const std::vector<Matrix>& teachers, const LossOptions& o, LossParams& p) {
  std::vector<double> shares = shares_of(o, teachers.size());
  p.teachers = static_cast<int>(teachers.size());
  for (int i = 0; i < p.teachers; ++i) {
    p.teacher_data[i] = teachers[i].tensor.const_data_ptr();
    p.teacher_rows[i] = teachers[i].strides;
    p.teacher_weights[i] = shares[i];
  }
}

void set_entries(const PlainRows& rows, LossParams& p) {
  p.entries = rows.indices.size(-1);
  p.indices = rows.indices.const_data_ptr();
  p.wide_indices = rows.indices.scalar_type() == at::kLong;
  p.teacher_logsumexp = data_of(rows.logsumexp);
}

void set_outputs(const LossCall& call, const Want& want, const LossResult& out, LossParams& p) {
  (call.options.reduction == Reduction::kNone ? p.row_loss : p.loss) = out.loss.mutable_data_ptr();
  (want.entries_only ? p.entry_gradient : p.gradient) = out_data_of(out.gradient);
  p.gradient_rows = want.inplace ? p.student_rows : RowStrides{.inner = p.classes};
  p.teacher_gradient = out_data_of(out.teacher_gradient);
  p.teacher_gradient_rows.inner = p.classes;
  p.statistics = out_data_of(out.statistics);
}

void run_kernels(const LossParams& p, [[maybe_unused]] const c10::Device& device) {
#if defined(KDKERNELS_WITH_CUDA)
  if (on_cuda(device)) {
    launch_cuda(device, p, cuda::loss_workspace(p.rows), cuda::loss);
    return;
  }
#endif
  cpu::loss(p, at::get_num_threads());
}

}  // namespace

LossResult launch(const LossCall& call, const Want& want, int stages, const Tensor& state) {
  bool last = (stages & kGradient) != 0;
  LossResult out;
  if (last) out = outputs(call, want);
  if (call.student.is_meta()) return out;
  bool cuda = on_cuda(call.student.device()), topk = call.options.tail != Tail::kNone;
  at::ScalarType acc = acc_type(call.student);
  Matrix student(call.student);
  PlainRows rows(call.rows, acc);
  // The stages after the first find them checked.
  if (!cuda && (stages & (kMoments | kMaxima)) != 0) {
    check_row_values(call, rows.labels, rows.indices);
  }

  int64_t classes = call.student.size(-1);
  LossParams p = {.dtype = dtype_of(call.student),
                  .rows = call.student.numel() / classes,
                  .classes = classes,
                  .student = student.tensor.const_data_ptr(),
                  .student_rows = student.strides,
                  .labels = static_cast<const int64_t*>(data_of(rows.labels)),
                  .weight = data_of(rows.weight),
                  .gradient_scale = gradient_scale(call, call.student.scalar_type()),
                  .stages = stages,
                  .state = static_cast<double*>(out_data_of(state))};
  p.denominator = denominator_of(call, rows, p.rows, cuda);
  set_options(call, rows, p);
  // A teacher without a share in the loss is not read.
  bool reads_teacher = p.alpha > 0 || want.statistics || topk;
  std::vector<Matrix> teachers;
  for (const Tensor& teacher : call.teachers) {
    teachers.push_back(topk            ? Matrix(teacher.to(acc).contiguous())
                       : reads_teacher ? Matrix(teacher)
                                       : student);
  }
  set_teachers(teachers, call.options, p);
  if (topk) set_entries(rows, p);
  if (last) set_outputs(call, want, out, p);
  run_kernels(p, call.student.device());
  return out;
}

LossResult run_loss(const LossCall& call, const Want& want) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  if (!call.group.empty()) return run_slice(call, want);
  // In place nothing is traced: the op allows it for tensors in memory only.
  if (want.inplace || !at::isTensorSubclassLike(call.student)) {
    return launch(call, want, kAllStages, Tensor());
  }
  return dispatch_forward(call, want, std::nullopt);
}

// ---- gradients ----------------------------------------------------------------------------------

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
                     row_strides(gradient).value_or(RowStrides{.inner = classes}),
                     on_device.const_data_ptr(),
                     per_row};
    launch_cuda(gradient.device(), [&](cudaStream_t s) { return cuda::scale_rows(p, s); });
    return gradient;
  }
#endif
  return gradient.mul_(factor);
}

bool is_one(const Tensor& grad_output, bool per_row, double scale, bool last) {
  if (!last || !on_cpu(grad_output.device()) || per_row || scale != 1) {
    return false;
  }
  return grad_output.scalar_type() == at::kDouble ? *grad_output.const_data_ptr<double>() == 1
                                                  : *grad_output.const_data_ptr<float>() == 1;
}

double gradient_scale(const LossCall& call, at::ScalarType type) {
  const bool unbounded = call.options.teacher_kind == TeacherKind::kProbs;  // over a probability
  if (type != at::kHalf || call.rows.weight.has_value() || call.rows.has_options() || unbounded) {
    return 1;
  }
  // Forward KL's gradient is at most T; others grow with the logarithm of a ratio of probabilities.
  LossParams p = {};
  set_divergence(call.options, p);
  double bound = p.divergence == math::Divergence::kForwardKL ? 16384 : 64;
  return std::exp2(std::floor(std::log2(bound / std::max(call.options.temperature, 1.0))));
}

}  // namespace kdkernels
