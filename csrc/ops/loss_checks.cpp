// What a distillation loss requires of its tensors.
#include <ATen/MemoryOverlap.h>
#include <ATen/TensorOperators.h>

#include <algorithm>

#include "ops/checks.h"
#include "ops/loss.h"
#include "row_task.h"

namespace kdkernels {
namespace {

using at::Tensor;
using math::Divergence;

bool records_gradients(const Tensor& tensor) {
  return at::GradMode::is_enabled() && tensor.requires_grad();
}

// A number per row.
void check_rows(const char* name, const Tensor& tensor, const Tensor& student) {
  TORCH_CHECK_TYPE(!tensor.is_complex(), name, " has dtype ", tensor.scalar_type(),
                   "; it takes a real dtype");
  c10::SymIntArrayRef shape = student.sym_sizes().slice(0, student.dim() - 1);
  TORCH_CHECK_VALUE(tensor.sym_sizes() == shape, name, " has shape ", tensor.sym_sizes(),
                    "; it takes the shape of student_logits without its last dimension, ", shape);
  check_device(name, tensor, "student_logits", student);
  TORCH_CHECK_VALUE(!records_gradients(tensor), name,
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
                    " entries per row; it takes from 1 to ", kMaxTopK);
  TORCH_CHECK_TYPE(call.rows.indices.has_value(), "teacher_indices is None; it takes a tensor");
  const Tensor& indices = *call.rows.indices;
  TORCH_CHECK_TYPE(indices.scalar_type() == at::kLong || indices.scalar_type() == at::kInt,
                   "teacher_indices has dtype ", indices.scalar_type(),
                   "; it takes int32 or int64");
  TORCH_CHECK_VALUE(indices.sym_sizes() == values.sym_sizes(), "teacher_indices has shape ",
                    indices.sym_sizes(), "; it takes that of teacher_values, ", values.sym_sizes());
  check_device("teacher_indices", indices, "student_logits", student);
  TORCH_CHECK_VALUE(!records_gradients(values),
                    "teacher_values requires grad; pass teacher_values.detach()");
  TORCH_CHECK_VALUE(o.divergence == Divergence::kForwardKL ||
                        o.divergence == Divergence::kReverseKL || o.divergence == Divergence::kJS,
                    "divergence must be \"forward_kl\", \"reverse_kl\" or \"js\" for a top-k "
                    "teacher");
  TORCH_CHECK_VALUE(o.teacher_kind != TeacherKind::kProbs,
                    "teacher_kind is \"probs\"; of a top-k teacher it takes \"logits\" or "
                    "\"log_probs\"");
}

void check_logsumexp(const LossCall& call) {
  const LossOptions& o = call.options;
  const OptionalTensor& logsumexp = call.rows.teacher_logsumexp;
  if (o.tail != Tail::kBucket && o.tail != Tail::kIgnore) {
    TORCH_CHECK_VALUE(!logsumexp.has_value(),
                      "teacher_logsumexp goes with tail=\"bucket\" or \"ignore\" only");
    return;
  }
  bool at_one = o.temperature == 1 && !call.rows.options[kTemperature].has_value();
  TORCH_CHECK_VALUE(
      logsumexp.has_value() || (o.teacher_kind == TeacherKind::kLogProbs && at_one),
      "teacher_logsumexp is None; tail=\"bucket\" and \"ignore\" need the logsumexp of all the "
      "teacher's logits / temperature, but for log-probabilities at temperature 1");
  if (logsumexp.has_value()) check_tensor("teacher_logsumexp", *logsumexp);
}

void check_slice(const LossCall& call) {
  const LossOptions& o = call.options;
  if (o.all_classes == 0) return;
  TORCH_CHECK_VALUE(
      o.first_class >= 0 && call.student.sym_size(-1) + o.first_class <= o.all_classes,
      "student_logits has ", call.student.sym_size(-1), " columns from ", o.first_class,
      " on of a vocabulary of ", o.all_classes);
  TORCH_CHECK_VALUE(call.teachers.size() == 1,
                    "teacher_logits holds several teachers, whose mixture process_group cannot "
                    "make; mix them before");
}

// A number per row, or one for all rows.
void check_row_option(const char* name, OptionalTensor& tensor, const Tensor& student) {
  TORCH_CHECK_TYPE(at::isFloatingType(tensor->scalar_type()) ||
                       at::isIntegralType(tensor->scalar_type(), /*includeBool=*/false),
                   name, " has dtype ", tensor->scalar_type(), "; it takes a real dtype");
  if (tensor->dim() == 0) {
    check_device(name, *tensor, "student_logits", student);
    TORCH_CHECK_VALUE(!records_gradients(*tensor), name, " requires grad; pass ", name,
                      ".detach()");
    tensor = tensor->expand_symint(student.sym_sizes().slice(0, student.dim() - 1));
  }
  check_rows(name, *tensor, student);
}

// The classes of a row's entries lie in the vocabulary and differ.
template <class Index>
void check_entries(const Index* index, const Tensor& indices, int64_t classes) {
  std::vector<uint64_t> seen(static_cast<size_t>(classes / 64 + 1), 0);  // a bit per class
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

void check_labels(const Tensor& labels, int64_t classes, int64_t ignore_index) {
  const int64_t* label = labels.const_data_ptr<int64_t>();
  int64_t rows = labels.numel();
  auto fits = [&](int64_t x) { return (x == ignore_index) | (uint64_t(x) < uint64_t(classes)); };
  bool all_fit = true;  // checked first, since a loop that may raise is not vectorised
  for (int64_t i = 0; i < rows; ++i) all_fit &= fits(label[i]);
  for (int64_t i = 0; !all_fit && i < rows; ++i) {
    TORCH_CHECK_VALUE(fits(label[i]), "labels holds ", label[i], " at position ", i,
                      "; it takes classes in [0, ", classes, ") or ignore_index=", ignore_index);
  }
}

// The numbers of a CPU tensor, in fp64.
std::vector<double> numbers_of(const Tensor& tensor) {
  Tensor numbers = tensor.to(at::kDouble).contiguous();
  const double* data = numbers.const_data_ptr<double>();
  return {data, data + numbers.numel()};
}

void check_row_options(const LossCall& call) {
  const LossOptions& o = call.options;
  for (const LossOption& option : loss_options()) {
    if (option.row_option == kRowOptions) continue;
    const OptionalTensor& tensor = call.rows.options[option.row_option];
    if (!tensor.has_value()) continue;
    std::vector<double> numbers = numbers_of(*tensor);
    for (size_t i = 0; i < numbers.size(); ++i) {
      TORCH_CHECK_VALUE(in_range(option.row_option, o.divergence, numbers[i]), option.name,
                        " holds ", numbers[i], " at position ", i, "; it takes ",
                        range_of(option, o.divergence));
    }
  }
}

}  // namespace

void check_call(LossCall& call) {
  const LossOptions& o = call.options;
  call.student = readable("student_logits", call.student, call.student);
  const Tensor& student = call.student;
  bool dense = o.tail == Tail::kNone;
  for (Tensor& teacher : call.teachers) {
    teacher = readable(dense ? "teacher_logits" : "teacher_values", teacher, student);
  }
  RowTensors::each(call.rows, [&](const char* name, OptionalTensor& tensor) {
    if (tensor.has_value()) tensor = readable(name, *tensor, student);
  });
  check_tensor("student_logits", student);
  TORCH_CHECK_VALUE(student.dim() >= 1 && student.sym_size(-1) >= 1, "student_logits has shape ",
                    student.sym_sizes(), "; it takes [*, V] with at least one class");
  TORCH_CHECK_VALUE(!dense || !call.rows.indices.has_value(),
                    "tail is \"none\"; of a top-k teacher it takes \"renormalize\", \"bucket\" or "
                    "\"ignore\"");
  if (dense) {
    for (const Tensor& teacher : call.teachers) check_dense_teacher(teacher, student);
  } else {
    check_topk_teacher(call);
  }
  if (call.rows.labels.has_value()) {
    TORCH_CHECK_TYPE(call.rows.labels->scalar_type() == at::kLong, "labels has dtype ",
                     call.rows.labels->scalar_type(), "; it takes int64");
  }
  RowTensors::each(call.rows, [&](const char* name, OptionalTensor& tensor) {
    if (!tensor.has_value() || &tensor == &call.rows.indices) return;
    bool is_option = &tensor >= call.rows.options.data() &&
                     &tensor < call.rows.options.data() + call.rows.options.size();
    if (is_option) {
      check_row_option(name, tensor, student);
    } else {
      check_rows(name, *tensor, student);
    }
  });
  check_options(o, call.rows.labels.has_value(), call.teachers.size(), call.rows.given_options());
  check_logsumexp(call);
  check_slice(call);
}

void check_row_values(const LossCall& call, const Tensor& labels, const Tensor& indices) {
  const LossOptions& o = call.options;
  int64_t classes = o.all_classes != 0 ? o.all_classes : call.student.size(-1);
  if (labels.defined()) check_labels(labels, classes, o.ignore_index);
  if (indices.defined() && indices.scalar_type() == at::kLong) {
    check_entries(indices.const_data_ptr<int64_t>(), indices, classes);
  } else if (indices.defined()) {
    check_entries(indices.const_data_ptr<int32_t>(), indices, classes);
  }
  if (call.rows.has_options()) check_row_options(call);
}

namespace {

// Whether each element has memory of its own, as far as a dimension's stride passes over all that is within it.
bool lies_apart(const Tensor& x) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (x.size(d) > 1) dims.emplace_back(x.stride(d), x.size(d));
  }
  std::sort(dims.begin(), dims.end());
  int64_t last = 0;  // offset of the last element of the dimensions so far
  for (auto [stride, size] : dims) {
    if (stride <= last) return false;
    last += stride * (size - 1);
  }
  return true;
}

}  // namespace

void check_inplace(const LossCall& call) {
  const Tensor& student = call.student;
  TORCH_CHECK_VALUE(!student.is_leaf(),
                    "inplace is True, but student_logits is a leaf that requires grad; its "
                    "values would be lost");
  TORCH_CHECK_VALUE(row_strides(student).has_value() && lies_apart(student),
                    "inplace is True, but student_logits of shape ", student.sizes(),
                    " and strides ", student.strides(),
                    " is not rows of adjacent classes that lie apart; pass "
                    "student_logits.contiguous()");
  // A row's gradient is written once that row was read, so a teacher may be the same memory row for row.
  for (const Tensor& teacher : call.teachers) {
    TORCH_CHECK_VALUE(at::get_overlap_status(student, teacher) != at::MemOverlapStatus::Partial,
                      "inplace is True, but teacher_logits overlaps student_logits in memory; pass "
                      "teacher_logits.clone()");
  }
}

}  // namespace kdkernels
