// What the kernels share: dtypes, vectors of elements, reductions over a group of threads.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "params.h"

namespace kdkernels {
namespace cuda {

constexpr int kWarp = 32;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

__device__ __forceinline__ void narrow(float x, float& out) { out = x; }
__device__ __forceinline__ void narrow(double x, double& out) { out = x; }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16& out) {
  out = __float2bfloat16_rn(x);
}
__device__ __forceinline__ void narrow(float x, __half& out) { out = __float2half_rn(x); }

// kCount elements that move in one load or store.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Vector {
  T value[kCount];
};

template <class T>
bool aligned(const void* pointer, int64_t stride, int count) {
  size_t bytes = sizeof(T) * static_cast<size_t>(count);
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0 && stride % count == 0;
}

struct Sum {
  template <class Real>
  __device__ static Real apply(Real a, Real b) {
    return a + b;
  }
};
struct Max {
  template <class Real>
  __device__ static Real apply(Real a, Real b) {
    return a > b ? a : b;
  }
};

// kValues reductions over a group of kThreads threads (a warp, or the whole block) in a fixed order; every
// thread gets the results. `shared` holds kValues * kThreads / kWarp values.
template <class Op, int kThreads, int kValues, class Real>
__device__ __forceinline__ void reduce(Real (&value)[kValues], Real* shared) {
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2) {
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
      value[v] = Op::apply(value[v], __shfl_xor_sync(0xFFFFFFFFu, value[v], lane));
    }
  }
  if constexpr (kThreads > kWarp) {
    constexpr int kWarps = kThreads / kWarp;
    int warp = threadIdx.x / kWarp;
    if (threadIdx.x % kWarp == 0) {
#pragma unroll
      for (int v = 0; v < kValues; ++v) shared[v * kWarps + warp] = value[v];
    }
    __syncthreads();
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
      value[v] = shared[v * kWarps];
      for (int w = 1; w < kWarps; ++w) value[v] = Op::apply(value[v], shared[v * kWarps + w]);
    }
    __syncthreads();
  }
}

}  // namespace cuda
}  // namespace kdkernels
