// Ops on lists of tensors: their checks, writing in place, and one kernel call per dtype.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>

#include <optional>
#include <utility>
#include <vector>

#include "params.h"

namespace kdkernels {

// ---- checks, before any work ---------------------------------------------------------------------

// Kernels have to support the dtype and device of every tensor; all share one device.
void check_list(const char* name, at::TensorList tensors);
void check_writable(const char* name, at::TensorList tensors);
void check_no_gradient(const char* op, const char* name, at::TensorList tensors);
// fp64 numbers: one, or one per `item`, of which there are `count`.
void check_each(const char* name, const at::Tensor& tensor, const char* item, size_t count,
                const at::Tensor& like);
void check_norms(const std::optional<at::Tensor>& norms, size_t count, const at::Tensor& like);

// ---- writing in place ----------------------------------------------------------------------------

// Row-major memory of tensors that kernels write to. Other layouts are copied, and copied back by write_back(). The
// tensors must outlive this.
class InPlace {
 public:
  explicit InPlace(size_t tensors) { written_.reserve(tensors); }
  void* data(const at::Tensor& tensor, const char* name, size_t index);
  // Raises where two tensors share memory, which threads would write at once.
  void check_apart(const char* op);
  void write_back();

 private:
  struct Written {
    const at::Tensor* tensor;
    at::Tensor copy;  // undefined where the tensor is row-major itself
    const char *begin, *end;  // of the first element and after the last
    const char* name;
    size_t index;
  };
  static bool shares_elements(const Written& a, const Written& b);
  std::vector<Written> written_;
};

// ---- one kernel call per dtype -------------------------------------------------------------------

// The tensors of a list that share a dtype, as indices into the list.
struct DtypeGroup {
  Dtype dtype;
  std::vector<size_t> members;
};
std::vector<DtypeGroup> grouped_by_dtype(at::TensorList tensors);

// Fills in a group's runs, which must outlive the kernel's call.
template <class Params, class Run>
void set_runs(Params& p, const DtypeGroup& group, const std::vector<Run>& runs) {
  p.dtype = group.dtype;
  p.tensors = runs.data();
  p.count = static_cast<int64_t>(runs.size());
  if constexpr (requires { p.indices; }) p.indices = static_cast<int64_t>(group.members.size());
}

// A group's share of `tensor`, which has one number or one per tensor of the list.
at::Tensor numbers_of_group(const at::Tensor& tensor, const DtypeGroup& group, size_t count,
                            at::ScalarType dtype);

// fp64 results of a list, [count, 2] or [count], that kernels write one group at a time.
class GroupResults {
 public:
  // `all` is undefined where results are not wanted.
  GroupResults(at::Tensor all, size_t count) : all_(std::move(all)), count_(count) {}

  // Calls run(memory for the group's results, or null). A group without elements has results 0 and no call.
  template <class Run>
  void fill(const DtypeGroup& group, bool empty, Run run) {
    if (!all_.defined()) return empty ? void() : run(nullptr);
    bool whole = group.members.size() == count_;
    at::Tensor part = whole ? all_ : at::empty_like(all_.narrow(0, 0, group.members.size()));
    if (empty) {
      part.zero_();
    } else {
      run(part.mutable_data_ptr<double>());
    }
    for (size_t i = 0; i < group.members.size() && !whole; ++i) {
      all_.select(0, group.members[i]).copy_(part.select(0, i));
    }
  }

 private:
  at::Tensor all_;
  size_t count_;
};

// out after run(memory), which takes its elements in row-major order, whatever its memory format.
template <class Run>
at::Tensor written_in_order(at::Tensor out, Run run) {
  at::Tensor dense =
      out.is_contiguous() ? out : at::empty_like(out, out.options(), at::MemoryFormat::Contiguous);
  run(dense.mutable_data_ptr());
  return dense.is_same(out) ? out : out.copy_(dense);
}

}  // namespace kdkernels
