// What the kernels share: dtypes, 16-byte vectors and where a thread's elements lie, copies to shared memory,
// clusters, reductions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cfloat>
#include <cstdint>
#include <cstring>

#include "cuda/plan.h"
#include "params.h"

namespace kdkernels {
namespace cuda {

// launch(element), element being of the dtype.
template <class Launch>
cudaError_t by_dtype(Dtype dtype, Launch launch) {
  switch (dtype) {
    case Dtype::kFloat32: return launch(float{});
    case Dtype::kFloat64: return launch(double{});
    case Dtype::kBFloat16: return launch(__nv_bfloat16{});
    case Dtype::kFloat16: return launch(__half{});
  }
  return cudaErrorInvalidValue;
}

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
template <class T, int kCount = 16 / sizeof(T)>
struct alignas(sizeof(T) * kCount) Vector {
  T value[kCount];
};

// All of a vector's elements in the compute type.
template <class T, int kCount, class Real>
__device__ __forceinline__ void widen_all(const Vector<T, kCount>& x, Real (&out)[kCount]) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) out[j] = widen(x.value[j]);
}
// A bfloat16 is the upper half of its float: two of a word are one instruction each.
__device__ __forceinline__ void widen_all(const Vector<__nv_bfloat16>& x, float (&out)[8]) {
  uint32_t words[4];
  memcpy(words, &x, sizeof words);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = __uint_as_float(words[i] << 16);
    out[2 * i + 1] = __uint_as_float(words[i] & 0xFFFF0000u);
  }
}

// ---- where elements lie -------------------------------------------------------------------------

// `elements` neighbours that are read from two arrays and written to a third. Where all three addresses lie
// alike relative to 16 bytes: `head` single elements, `body` vectors, `tail` single elements. The first
// `skew` (0 or 1) of the vectors is none: it makes the others start at an even multiple of 16 bytes, so that
// a warp's 512 bytes are 16 sectors, not 17. Elsewhere there are no vectors: `body` counts as many elements
// as vectors would hold, rounded up. At most elements / kCount + 1.
template <class T, class Index>
struct Span {
  static constexpr int kCount = 16 / sizeof(T);
  Index elements, body;
  int head, tail, skew;
  bool vectors;

  __device__ __forceinline__ Span(const T* a, const T* b, const T* c, Index n) : elements(n) {
    const unsigned at_a = static_cast<unsigned>(reinterpret_cast<uintptr_t>(a)),
                   at_b = static_cast<unsigned>(reinterpret_cast<uintptr_t>(b)),
                   at_c =
                       c == nullptr ? at_a : static_cast<unsigned>(reinterpret_cast<uintptr_t>(c));
    vectors = (((at_a ^ at_b) | (at_a ^ at_c)) & 15) == 0;
    head = vectors ? static_cast<int>((0u - at_a) % 16 / sizeof(T)) : 0;
    head = n < head ? static_cast<int>(n) : head;
    body = vectors ? (n - head) / kCount : (n + kCount - 1) / kCount;
    tail = vectors ? static_cast<int>(n - head - body * kCount) : 0;
    skew = vectors && (at_a + head * sizeof(T)) % 32 == 16;
    body += skew;
  }
};

// Up to kCount elements of one thread: first + j * step where that is below limit.
template <class Index>
struct Place {
  Index first, limit;
  int step;

  __device__ __forceinline__ bool empty() const { return first >= limit; }
  __device__ __forceinline__ Index at(int j) const { return first + j * step; }
  __device__ __forceinline__ bool holds(int j) const { return at(j) < limit; }
  template <int kCount>
  __device__ __forceinline__ bool whole() const {
    return step == 1 && first + kCount <= limit;
  }
};

// Slot `slot` of member `member` of a team that shares body items [begin, end): neighbouring members take
// neighbouring vectors, or neighbouring elements where there are no vectors.
template <class T, class Index>
__device__ __forceinline__ Place<Index> body_place(const Span<T, Index>& span, Index begin,
                                                   Index end, int slot, int member, int team) {
  constexpr int kCount = Span<T, Index>::kCount;
  Index item = begin + static_cast<Index>(slot) * team;
  if (span.vectors) {
    item += member;
    Index first = span.head + (item - span.skew) * kCount;
    return {first, item >= span.skew && item < end ? first + kCount : first, 1};
  }
  Index limit = end * kCount < span.elements ? end * kCount : span.elements;
  return {item * kCount + member, limit, team};
}

// The one element of the head or tail that member 0 to 15 of a team has.
template <class T, class Index>
__device__ __forceinline__ Place<Index> edge_place(const Span<T, Index>& span, int member) {
  bool in_head = member < kEdges / 2;
  int i = in_head ? member : member - kEdges / 2;
  Index first = in_head ? Index(i) : span.elements - span.tail + i;
  return {first, i < (in_head ? span.head : span.tail) ? first + 1 : first, 1};
}

// Elements that a place lacks come as -inf, which adds nothing to a softmax.
template <class T, class Index>
__device__ __forceinline__ Vector<T> load(const T* data, const Place<Index>& place) {
  constexpr int kCount = 16 / sizeof(T);
  if (place.template whole<kCount>())
    return *reinterpret_cast<const Vector<T>*>(data + place.first);
  Vector<T> x;
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    if (place.holds(j)) {
      x.value[j] = data[place.at(j)];
    } else {
      narrow(-INFINITY, x.value[j]);
    }
  }
  return x;
}

template <class T, class Index>
__device__ __forceinline__ void store(T* data, const Place<Index>& place, const Vector<T>& x) {
  constexpr int kCount = 16 / sizeof(T);
  if (place.template whole<kCount>()) {
    *reinterpret_cast<Vector<T>*>(data + place.first) = x;
    return;
  }
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    if (place.holds(j)) data[place.at(j)] = x.value[j];
  }
}

// ---- asynchronous copies, clusters ---------------------------------------------------------------

// 16 bytes from global to shared memory, complete for this thread after wait_copies; at once before sm_80.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(global)
               : "memory");
#else
  *static_cast<uint4*>(shared) = *static_cast<const uint4*>(global);
#endif
}
__device__ __forceinline__ void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most kPending of the thread's commits are incomplete.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// The blocks of a cluster; without one a block is alone, rank 0 of 1.
__device__ __forceinline__ int cluster_rank() {
  uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return static_cast<int>(rank);
}
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
// What block `rank` of the cluster has in its own copy of a shared variable.
template <class Value>
__device__ __forceinline__ Value read_peer(const Value* shared, int rank) {
#if __CUDA_ARCH__ >= 900
  static_assert(sizeof(Value) % 16 == 0 && alignof(Value) >= 16);
  union {
    Value value;
    uint4 part[sizeof(Value) / 16];
  } x;
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(address)
      : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))), "r"(rank));
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(Value) / 16); ++i) {
    asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.part[i].x), "=r"(x.part[i].y), "=r"(x.part[i].z), "=r"(x.part[i].w)
                 : "r"(address + 16 * i)
                 : "memory");
  }
  return x.value;
#else
  return *shared;
#endif
}

// Every thread of a kernel that Grid::overlaps may start early calls this before it reads what another launch wrote.
__device__ __forceinline__ void wait_for_launch_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- reductions ---------------------------------------------------------------------------------

template <class Real>
struct Lowest;
template <>
struct Lowest<float> {
  static constexpr float value = -FLT_MAX;
};
template <>
struct Lowest<double> {
  static constexpr double value = -DBL_MAX;
};

struct Sum {
  template <class Real>
  __device__ __forceinline__ static Real apply(Real a, Real b) {
    return a + b;
  }
};
// Of a NaN and a number, the number.
struct Max {
  __device__ __forceinline__ static float apply(float a, float b) { return fmaxf(a, b); }
  __device__ __forceinline__ static double apply(double a, double b) { return fmax(a, b); }
};

// kValues reductions over each `lanes` neighbouring lanes (a power of two) in a fixed order; every lane gets
// the results. All 32 lanes of the warp take part.
template <class Op, int kValues, class Real>
__device__ __forceinline__ void reduce_lanes(Real (&value)[kValues], int lanes = kWarp) {
  for (int lane = lanes / 2; lane > 0; lane /= 2) {
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
      value[v] = Op::apply(value[v], __shfl_xor_sync(0xFFFFFFFFu, value[v], lane));
    }
  }
}

// kValues reductions over a group of kThreads threads (a warp, or the whole block) in a fixed order; every
// thread gets the results. `shared` holds kValues * kThreads / kWarp values.
template <class Op, int kThreads, int kValues, class Real>
__device__ __forceinline__ void reduce(Real (&value)[kValues], Real* shared) {
  reduce_lanes<Op>(value);
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

// ---- the device ---------------------------------------------------------------------------------

// The current device, asked once a thread and device. `kernel` is any of the build's: what was compiled for
// an older architecture than the device's plans for that one.
inline cudaError_t device_of(const void* kernel, Device& device) {
  static thread_local int known = -1;
  static thread_local Device cached;
  int ordinal = 0;
  cudaError_t error = cudaGetDevice(&ordinal);
  if (error != cudaSuccess) return error;
  if (ordinal != known) {
    int major = 0, minor = 0;
    auto ask = [&](int& value, cudaDeviceAttr attribute) {
      if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, ordinal);
    };
    ask(major, cudaDevAttrComputeCapabilityMajor);
    ask(minor, cudaDevAttrComputeCapabilityMinor);
    ask(cached.sms, cudaDevAttrMultiProcessorCount);
    ask(cached.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    ask(cached.shared_per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    cudaFuncAttributes attributes = {};
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
    if (error != cudaSuccess) return error;
    cached.arch = std::min(10 * major + minor, attributes.ptxVersion);
    known = ordinal;
  }
  device = cached;
  return cudaSuccess;
}

// Before a launch with `dynamic` bytes of shared memory, of a kernel with at most `fixed` bytes of static ones. It always
// allows the same number: to lower what is allowed would fail a launch that another thread is about to make.
inline cudaError_t allow_shared(const void* kernel, int dynamic, int fixed, const Device& device) {
  constexpr int kAlwaysAllowed = 48 * 1024;  // static and dynamic together
  if (dynamic <= kAlwaysAllowed - fixed) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              device.shared_per_block - fixed);
}

struct Grid {
  int64_t blocks;
  int threads;
  int shared = 0;  // bytes of dynamic shared memory, which allow_shared has allowed
  int cluster = 1;
  // From sm_90 on the blocks may start while the last ones of the launch before in the stream still run.
  bool overlaps = false;
};

template <class... Parameters, class... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), const Grid& grid, const Device& device,
                          cudaStream_t stream, Arguments... arguments) {
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = static_cast<size_t>(grid.shared);
  config.stream = stream;
  config.attrs = attributes;
  if (grid.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(grid.cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  }
  if (grid.overlaps && device.arch >= 90) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

}  // namespace cuda
}  // namespace kdkernels
