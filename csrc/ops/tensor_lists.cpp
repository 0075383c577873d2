#include "ops/tensor_lists.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "ops/checks.h"

namespace kdkernels {

using at::Tensor;

void check_list(const char* name, at::TensorList tensors) {
  for (const Tensor& tensor : tensors) {
    check_plain(name, tensor, tensors[0]);
    check_tensor(name, tensor);
    check_device(name, tensor, "the first of them", tensors[0]);
  }
}

void check_writable(const char* name, at::TensorList tensors) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& tensor = tensors[i];
    TORCH_CHECK_VALUE(tensor.is_meta() || at::has_internal_overlap(tensor) != at::MemOverlap::Yes,
                      name, "[", i, "] of shape ", tensor.sym_sizes(),
                      " has elements that share memory; pass a clone");
  }
}

void check_no_gradient(const char* op, const char* name, at::TensorList tensors) {
  if (!at::GradMode::is_enabled()) return;
  for (size_t i = 0; i < tensors.size(); ++i) {
    TORCH_CHECK_VALUE(!tensors[i].requires_grad(), name, "[", i, "] requires grad, and ", op,
                      " writes in place; call it under torch.no_grad()");
  }
}

void check_each(const char* name, const Tensor& tensor, const char* item, size_t count,
                const Tensor& like) {
  check_plain(name, tensor, like);
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kDouble, name, " has dtype ", tensor.scalar_type(),
                   "; it must be float64");
  TORCH_CHECK_VALUE(tensor.dim() == 1 && (tensor.sym_numel() == 1 ||
                                          tensor.sym_numel() == static_cast<int64_t>(count)),
                    name, " has shape ", tensor.sym_sizes(), "; it must be [1] or one number per ",
                    item, ", [", count, "]");
  check_device(name, tensor, "the tensors", like);
}

void check_norms(const std::optional<Tensor>& norms, size_t count, const Tensor& like) {
  if (!norms.has_value()) return;
  check_plain("norms", *norms, like);
  TORCH_CHECK_TYPE(norms->scalar_type() == at::kDouble, "norms has dtype ", norms->scalar_type(),
                   "; it must be float64");
  TORCH_CHECK_VALUE(norms->dim() == 2 && norms->sym_size(0) == static_cast<int64_t>(count) &&
                        norms->sym_size(1) == 2 && norms->is_contiguous(),
                    "norms has shape ", norms->sym_sizes(), " and strides ", norms->sym_strides(),
                    "; it must hold two numbers per tensor, [", count, ", 2], contiguous");
  check_device("norms", *norms, "the tensors", like);
}

// ---- writing in place ----------------------------------------------------------------------------

void* InPlace::data(const Tensor& tensor, const char* name, size_t index) {
  Written& w = written_.emplace_back(Written{&tensor, {}, nullptr, nullptr, name, index});
  bool dense = tensor.is_contiguous();
  if (!dense) w.copy = tensor.contiguous();
  if (tensor.numel() > 0) {
    w.begin = static_cast<const char*>(tensor.const_data_ptr());
    int64_t last = tensor.numel() - 1;  // element, by strides, which are never negative
    if (!dense) {
      last = 0;
      for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
    }
    w.end = w.begin + (last + 1) * static_cast<int64_t>(tensor.element_size());
  }
  return (dense ? tensor : w.copy).mutable_data_ptr();
}

// Whether tensors whose ranges overlap have an element in common; views of every other column do not.
bool InPlace::shares_elements(const Written& a, const Written& b) {
  if (!a.copy.defined() && !b.copy.defined()) return true;
  int64_t size = static_cast<int64_t>(a.tensor->element_size());
  const char *begin = std::min(a.begin, b.begin), *end = std::max(a.end, b.end);
  if (size != static_cast<int64_t>(b.tensor->element_size()) || (a.begin - b.begin) % size != 0) {
    return true;
  }
  // One flag per element of the memory that both lie in.
  Tensor seen = at::zeros({(end - begin) / size}, at::kBool);
  auto view = [&](const Written& w) {
    return seen.as_strided(w.tensor->sizes(), w.tensor->strides(), (w.begin - begin) / size);
  };
  view(a).fill_(true);
  return view(b).any().item<bool>();
}

void InPlace::check_apart(const char* op) {
  std::vector<const Written*> sorted;
  sorted.reserve(written_.size());
  for (const Written& w : written_) {
    if (w.begin != nullptr) sorted.push_back(&w);
  }
  std::sort(sorted.begin(), sorted.end(),
            [](const Written* a, const Written* b) { return a->begin < b->begin; });
  for (size_t i = 0; i < sorted.size(); ++i) {
    for (size_t j = i + 1; j < sorted.size() && sorted[j]->begin < sorted[i]->end; ++j) {
      const Written &a = *sorted[i], &b = *sorted[j];
      TORCH_CHECK_VALUE(!shares_elements(a, b), b.name, "[", b.index, "] shares memory with ",
                        a.name, "[", a.index, "]; call ", op, " for one after the other");
    }
  }
}

void InPlace::write_back() {
  for (const Written& w : written_) {
    if (w.copy.defined()) w.tensor->copy_(w.copy);
    if (!w.tensor->is_inference()) w.tensor->unsafeGetTensorImpl()->bump_version();
  }
}

// ---- one kernel call per dtype -------------------------------------------------------------------

std::vector<DtypeGroup> grouped_by_dtype(at::TensorList tensors) {
  std::vector<DtypeGroup> groups;
  for (size_t i = 0; i < tensors.size(); ++i) {
    Dtype dtype = dtype_of(tensors[i]);
    auto group = std::find_if(groups.begin(), groups.end(),
                              [&](const DtypeGroup& g) { return g.dtype == dtype; });
    if (group == groups.end()) {
      group = groups.insert(group, {dtype, {}});
      group->members.reserve(tensors.size());
    }
    group->members.push_back(i);
  }
  return groups;
}

Tensor numbers_of_group(const Tensor& tensor, const DtypeGroup& group, size_t count,
                        at::ScalarType dtype) {
  Tensor each = tensor.detach().expand({static_cast<int64_t>(count)});
  if (group.members.size() != count) {
    std::vector<Tensor> parts;
    for (size_t i : group.members) parts.push_back(each.select(0, i));
    each = at::stack(parts);
  }
  return each.to(dtype).contiguous();
}

}  // namespace kdkernels
