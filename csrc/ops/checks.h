// What every op asks of its arguments before a kernel runs, and the few things they share with PyTorch.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include <optional>

#include "params.h"

namespace kdkernels {

using OptionalTensor = std::optional<at::Tensor>;
using TensorOptionals = c10::List<OptionalTensor>;

constexpr const char* kCpuOnly =
    "this kdkernels was built for the CPU only; on a host with nvcc rebuild it with "
    "`KDKERNELS_CUDA=1 pip install --no-build-isolation --force-reinstall --no-deps .`";

// A registered op, by way of PyTorch's dispatcher; Function is the type of its implementation.
template <class Function>
auto dispatched(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Function>();
}

inline bool is_floating_dtype(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf;
}

inline Dtype dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble: return Dtype::kFloat64;
    case at::kBFloat16: return Dtype::kBFloat16;
    case at::kHalf: return Dtype::kFloat16;
    default: return Dtype::kFloat32;
  }
}

// fp64 for fp64, fp32 for all others.
inline at::ScalarType acc_type(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? at::kDouble : at::kFloat;
}
inline at::ScalarType acc_type(const at::Tensor& tensor) { return acc_type(dtype_of(tensor)); }

// Tensors that are none in memory, or are another's with a flag, made plain; others of a kind that kernels cannot read
// raise. `like`: the op's first tensor; a tracer's and functorch's tensors come with one of their kind.
inline at::Tensor readable(const char* name, const at::Tensor& tensor, const at::Tensor& like) {
  TORCH_CHECK_TYPE(tensor.defined(), name, " is an undefined tensor");
  auto keys = tensor.unsafeGetTensorImpl()->key_set();
  auto wraps = [](const at::Tensor& x) {
    return x.unsafeGetTensorImpl()->key_set().has(c10::DispatchKey::Python);
  };
  TORCH_CHECK_TYPE(!wraps(tensor) || wraps(like), name,
                   " is a tensor of a subclass that has no memory of its own (a DTensor, say); "
                   "it must be a plain tensor, as the op's first one is");
  TORCH_CHECK_VALUE(tensor.layout() == at::kStrided, name, " has layout ", tensor.layout(),
                    "; it takes a dense tensor");
  TORCH_CHECK_VALUE(!tensor.is_nested(), name, " is a nested tensor; it takes a dense tensor");
  // Forward mode asks for tangents, which a kernel does not make.
  TORCH_CHECK_NOT_IMPLEMENTED(
      !tensor._fw_grad(0).defined(), name,
      " has a tangent, but the fused ops have no forward-mode derivatives; use "
      "backend=\"reference\" where there is one, or reverse mode");
  if (keys.has(c10::DispatchKey::ZeroTensor))
    return at::zeros_symint(tensor.sym_sizes(), tensor.options());
  return tensor.is_neg() ? tensor.resolve_neg() : tensor;
}

// The same of a tensor that nothing may stand in for, since an op writes to it or keeps it.
inline void check_plain(const char* name, const at::Tensor& tensor, const at::Tensor& like) {
  TORCH_CHECK_VALUE(readable(name, tensor, like).is_same(tensor), name,
                    " is a negated view or a zero tensor; pass a clone");
}

inline void check_tensor(const char* name, const at::Tensor& tensor) {
  TORCH_CHECK_TYPE(is_floating_dtype(tensor.scalar_type()), name, " has dtype ",
                   tensor.scalar_type(), "; it takes float32, float64, bfloat16 or float16");
  TORCH_CHECK_VALUE(tensor.is_cpu() || tensor.is_cuda() || tensor.is_meta(), name, " is on ",
                    tensor.device(), "; it takes a CPU or CUDA tensor");
#if !defined(KDKERNELS_WITH_CUDA)
  TORCH_CHECK_VALUE(!tensor.is_cuda(), name, " is on ", tensor.device(), ", but ", kCpuOnly);
#endif
  TORCH_CHECK_VALUE(tensor.layout() == at::kStrided, name, " has layout ", tensor.layout(),
                    "; it takes a dense tensor");
}

inline void check_device(const char* name, const at::Tensor& tensor, const char* like_name,
                         const at::Tensor& like) {
  TORCH_CHECK_VALUE(tensor.device() == like.device(), name, " is on ", tensor.device(), " and ",
                    like_name, " on ", like.device(), "; they must share a device");
}

}  // namespace kdkernels
