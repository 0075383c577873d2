#include "ops/linear_rows.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/argsort.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <limits>

#include "ops/checks.h"
#include "ops/devices.h"

namespace kdkernels {

using at::Tensor;

Tensor KeptRows::of(const Tensor& x, int64_t from, int64_t n) const {
  return index.defined() ? x.index_select(0, index.narrow(0, from, n)) : x.narrow(0, from, n);
}

RowTensors KeptRows::of(RowTensors x, int64_t from, int64_t n) const {
  RowTensors::each(x, [&](const char*, OptionalTensor& tensor) {
    if (tensor.has_value()) tensor = of(*tensor, from, n);
  });
  return x;
}

Tensor KeptRows::hidden(const Tensor& x, int64_t from, int64_t n, at::ScalarType type) const {
  return kept_or(of(x, from, n).to(type), from, 0);
}

Tensor KeptRows::kept_or(const Tensor& x, int64_t from, double other) const {
  return keep.defined()
             ? at::where(of(keep, from, x.size(0)), x, at::scalar_tensor(other, x.options()))
             : x;
}

void KeptRows::put(const Tensor& x, int64_t dim, int64_t from, const Tensor& rows) const {
  Tensor values = rows.to(x.scalar_type());
  if (index.defined()) {
    Tensor into = x;
    into.index_copy_(dim, index.narrow(0, from, rows.size(dim)), values);
  } else {
    x.narrow(dim, from, rows.size(dim)).copy_(values);
  }
}

RowTensors flat_rows(RowTensors rows, int64_t all, at::ScalarType acc) {
  RowTensors::each(rows, [&](const char*, OptionalTensor& x) {
    if (!x.has_value()) return;
    bool integers = &x == &rows.labels || &x == &rows.indices;
    Tensor flat = &x == &rows.indices ? x->reshape({all, x->size(-1)}) : x->reshape({all});
    x = (integers ? flat : flat.to(acc)).contiguous();
  });
  return rows;
}

namespace {

bool is_mean(const LossOptions& o) {
  return o.reduction == Reduction::kMean && !o.num_items.has_value();
}

// A list of rows on a device, without waiting for it.
Tensor index_on(const c10::Device& device, const std::vector<int64_t>& rows) {
  auto size = static_cast<int64_t>(rows.size());
  Tensor out =
      at::empty({size}, at::TensorOptions().dtype(at::kLong).pinned_memory(device.is_cuda()));
  std::copy(rows.begin(), rows.end(), out.mutable_data_ptr<int64_t>());
  return device.is_cuda() ? out.to(device, /*non_blocking=*/true) : out;
}

// The groups of rows of which the host says whether they count.
std::vector<KeptRows> groups_of(const std::vector<bool>& counts, const Tensor& like,
                                const Tensor& teacher_index, size_t teachers) {
  const auto all = static_cast<int64_t>(counts.size());
  const int64_t* of = teacher_index.defined() ? teacher_index.const_data_ptr<int64_t>() : nullptr;
  std::vector<std::vector<int64_t>> lists(of == nullptr ? 1 : teachers);
  for (int64_t i = 0; i < all; ++i) {
    TORCH_CHECK_VALUE(of == nullptr || uint64_t(of[i]) < teachers, "teacher_index holds ",
                      of == nullptr ? 0 : of[i], " at position ", i, "; it takes places in [0, ",
                      teachers, ")");
    if (counts[i]) lists[of == nullptr ? 0 : of[i]].push_back(i);
  }
  std::vector<KeptRows> out;
  for (size_t m = 0; m < lists.size(); ++m) {
    auto count = static_cast<int64_t>(lists[m].size());
    out.push_back({count, count < all ? index_on(like.device(), lists[m]) : Tensor(), {}, m});
  }
  return out;
}

RowGroups rows_on_cpu(const RowTensors& rows, const LossOptions& o, const Tensor& like, int64_t all,
                      const Tensor& teacher_index, size_t teachers) {
  const OptionalTensor &labels = rows.labels, &weight = rows.weight;
  const int64_t* label = labels.has_value() ? labels->const_data_ptr<int64_t>() : nullptr;
  std::vector<bool> counts(all, false);
  double total = 0;
  int64_t count = 0;
  for (int64_t i = 0; i < all; ++i) {
    if (label != nullptr && label[i] == o.ignore_index) continue;
    double w = !weight.has_value()                   ? 1
               : weight->scalar_type() == at::kFloat ? weight->const_data_ptr<float>()[i]
                                                     : weight->const_data_ptr<double>()[i];
    total += w;
    counts[i] = w != 0;
    count += w != 0;
  }
  TORCH_CHECK_VALUE(count <= o.max_rows.value_or(count), "max_rows is ", o.max_rows.value_or(0),
                    ", but ", count, " rows count");
  return {groups_of(counts, like, teacher_index, teachers),
          is_mean(o) ? total : o.num_items.value_or(1),
          {}};
}

// With max_rows the rows that count are packed to the front by a stable sort, and no others are multiplied beyond that
// bound. How many count stays on the device: where it is more than the bound everything becomes NaN.
RowGroups rows_on_cuda(const RowTensors& rows, const LossOptions& o, const Tensor& like,
                       int64_t all, const Tensor& teacher_index, size_t teachers) {
  RowGroups out = {groups_of(std::vector<bool>(all, true), like, teacher_index, teachers),
                   is_mean(o) ? 1 : o.num_items.value_or(1),
                   {}};
  auto options = like.options().dtype(acc_type(like));
  Tensor zero = at::zeros({}, options), one = at::ones({}, options);
  Tensor weight = rows.weight.has_value() ? *rows.weight : one.expand({all});
  if (rows.labels.has_value()) weight = at::where(*rows.labels != o.ignore_index, weight, zero);
  Tensor keep = weight != 0;
  for (KeptRows& group : out.groups) group.keep = keep.unsqueeze(-1);
  if (is_mean(o)) {
    Tensor total = weight.sum();
    out.factor = at::where(total == 0, zero, one / total);
  }
  if (o.max_rows.value_or(all) < all) {
    KeptRows& group = out.groups[0];
    group.count = *o.max_rows;
    group.index = at::argsort(keep.to(at::kByte), /*stable=*/true, /*dim=*/0, /*descending=*/true)
                      .narrow(0, 0, group.count);
    Tensor nan = at::zeros({}, options).fill_(std::numeric_limits<double>::quiet_NaN());
    Tensor fits = keep.sum() <= group.count;
    out.factor = at::where(fits, out.factor.defined() ? out.factor : one, nan);
  }
  return out;
}

}  // namespace

RowGroups kept_rows(const RowTensors& rows, const LossOptions& o, const Tensor& like, int64_t all,
                    const Tensor& teacher_index, size_t teachers) {
  if (on_cuda(like.device()) && (rows.labels.has_value() || rows.weight.has_value())) {
    return rows_on_cuda(rows, o, like, all, teacher_index, teachers);
  }
  return rows_on_cpu(rows, o, like, all, teacher_index, teachers);
}

}  // namespace kdkernels
