// What every op asks of its arguments before a kernel runs, and the few things they share with PyTorch.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/Exception.h>

#include "params.h"

namespace kdkernels {

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
