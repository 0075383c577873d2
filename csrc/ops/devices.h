// The kernels of this build's devices, and what a CUDA launch needs of PyTorch.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/Device.h>

#include "cpu/kernels.h"
#if defined(KDKERNELS_WITH_CUDA)
#include "cuda/kernels.h"
#if !defined(KDKERNELS_EMULATED)
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif
#endif

namespace kdkernels {

// Whether an op runs its CUDA kernels on tensors of a device. The tests' emulated build runs them on CPU tensors, and
// goes the same way with shapes alone, for the record of what it would do.
inline bool on_cuda(const c10::Device& device) {
#if defined(KDKERNELS_EMULATED)
  return device.is_cpu() || device.is_meta();
#else
  return device.is_cuda();
#endif
}

// Whether a tensor's values may be read directly.
inline bool on_cpu(const c10::Device& device) { return device.is_cpu() && !on_cuda(device); }

#if defined(KDKERNELS_EMULATED)
// The one stream of the emulated device; not the legacy one, which a capture forbids.
inline cudaStream_t emulated_stream() { return reinterpret_cast<cudaStream_t>(uintptr_t{1}); }
#endif

// Whether work on a device's current stream is being captured into a CUDA graph.
inline bool is_captured(const c10::Device& device) {
  if (!on_cuda(device)) return false;
#if defined(KDKERNELS_WITH_CUDA)
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
#if defined(KDKERNELS_EMULATED)
  cudaStreamIsCapturing(emulated_stream(), &status);
#else
  c10::cuda::CUDAGuard guard(device);
  C10_CUDA_CHECK(cudaStreamIsCapturing(c10::cuda::getCurrentCUDAStream(), &status));
#endif
  return status != cudaStreamCaptureStatusNone;
#else
  return false;
#endif
}

#if defined(KDKERNELS_WITH_CUDA)
// Calls launch(stream) with a device's current stream.
template <class Launch>
void launch_cuda(const c10::Device& device, Launch launch) {
#if defined(KDKERNELS_EMULATED)
  cudaError_t error = launch(emulated_stream());
  TORCH_CHECK(error == cudaSuccess, cudaGetErrorString(error));
#else
  c10::cuda::CUDAGuard guard(device);
  C10_CUDA_CHECK(launch(c10::cuda::getCurrentCUDAStream()));
#endif
}

// Calls launch(params, stream) with a workspace of so many doubles.
template <class Params>
void launch_cuda(const c10::Device& device, Params p, int64_t workspace,
                 cudaError_t (*launch)(const Params&, cudaStream_t)) {
  at::Tensor memory;
  if (workspace > 0) {
    memory = at::empty({workspace}, at::TensorOptions(device).dtype(at::kDouble));
    p.workspace = memory.mutable_data_ptr<double>();
  }
  launch_cuda(device, [&](cudaStream_t stream) { return launch(p, stream); });
}
#endif

}  // namespace kdkernels
