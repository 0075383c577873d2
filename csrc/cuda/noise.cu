// Noise over a list of tensors, and the dot product of a tensor with its noise.
//
// An element is read once and written once, in 16-byte accesses that are asked for before its normal is made
// in registers. A normal costs an H100's SM no more time than a bf16 element: 3.35 TB/s are 14.5 bytes a clock
// and an SM, so an fp32 element that is read and written has 70 of its 128 issue slots a clock, fp16 and bf16
// 35, fp64 141. Slots that an element takes in the inner loop (sm_90, counted in its SASS):
//
//   fp16, bf16 36.1    fp32 35.6    fp64 43.0    noise alone 34.8    dot product 35.4
//
// of which Philox 9.3 (18 wide products at half rate and 19 xors for 4 elements), Box and Muller 23 (an
// approximate reciprocal root, 3 conversions and 42 other operations for 2), and the element itself 2 to 3. So
// memory binds fp32 and fp64, and binds 16 bits as much as issue does. An access is in flight for the time of
// some 280 slots of each of 32 warps, several times the latency of memory.
#include <algorithm>
#include <cstring>

#include "cuda/device.cuh"
#include "cuda/kernels.h"
#include "cuda/plan.h"
#include "math/normal.h"

namespace kdkernels {
namespace cuda {
namespace {

// ---- a group of elements in registers -----------------------------------------------------------

// Two neighbours, and as the numbers that they are computed in.
__device__ __forceinline__ float2 widen_pair(float2 x) { return x; }
__device__ __forceinline__ double2 widen_pair(double2 x) { return x; }
__device__ __forceinline__ float2 widen_pair(__nv_bfloat162 x) {
  // One instruction each; the toolkit's conversion takes two for the upper one.
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xFFFF0000u)};
}
__device__ __forceinline__ float2 widen_pair(__half2 x) { return __half22float2(x); }
__device__ __forceinline__ void narrow_pair(float2 x, float2& out) { out = x; }
__device__ __forceinline__ void narrow_pair(double2 x, double2& out) { out = x; }
__device__ __forceinline__ void narrow_pair(float2 x, __nv_bfloat162& out) {
  out = __float22bfloat162_rn(x);
}
__device__ __forceinline__ void narrow_pair(float2 x, __half2& out) { out = __float22half2_rn(x); }

template <class T>
struct Storage;
template <>
struct Storage<float> {
  using Pair = float2;
};
template <>
struct Storage<double> {
  using Pair = double2;
};
template <>
struct Storage<__nv_bfloat16> {
  using Pair = __nv_bfloat162;
};
template <>
struct Storage<__half> {
  using Pair = __half2;
};

// What a lane makes at a time: 16 bytes of elements, and at least the 4 of a counter.
template <class T>
struct Group {
  static constexpr int kSize = noise_group(sizeof(T));
  static constexpr int kAccess = 16 / sizeof(T);  // elements
  typename Storage<T>::Pair pair[kSize / 2];

  // Where element j lies, counted from the lane's own group. A counter's fp64 elements are 32 bytes: two lanes
  // share one group and then the other, so that an access fills the sectors that it touches.
  static __device__ int position(int j) {
    if constexpr (kAccess == kSize) {
      return j;
    } else {
      return (j / kAccess - odd()) * kSize + odd() * kAccess + j % kAccess;
    }
  }
  static __device__ int odd() { return static_cast<int>(threadIdx.x) & 1; }
  // Puts the normals of the lane's own group where its elements are.
  static __device__ void arrange(float (&eps)[kSize]) {
    if constexpr (kAccess < kSize) {
#pragma unroll
      for (int j = 0; j < kAccess; ++j) {
        float other = __shfl_xor_sync(0xFFFFFFFFu, odd() ? eps[j] : eps[kAccess + j], 1);
        eps[j] = odd() ? other : eps[j];
        eps[kAccess + j] = odd() ? eps[kAccess + j] : other;
      }
    }
  }

  __device__ void load(const T* group) {
#pragma unroll
    for (int j = 0; j < kSize; j += kAccess) {
      uint4 bytes = *reinterpret_cast<const uint4*>(group + position(j));
      std::memcpy(&pair[j / 2], &bytes, sizeof bytes);
    }
  }
  __device__ void store(T* group) const {
#pragma unroll
    for (int j = 0; j < kSize; j += kAccess) {
      uint4 bytes;
      std::memcpy(&bytes, &pair[j / 2], sizeof bytes);
      // The plain store; said like this, the compiler does not take it apart.
      __stwb(reinterpret_cast<uint4*>(group + position(j)), bytes);
    }
  }
};

// ---- which elements a thread has ----------------------------------------------------------------

// A tensor of a launch, as groups of elements that start with a counter's first.
struct Entry {
  void* out;
  const void* in;
  int64_t numel;
  uint64_t counter;  // of the first group
  double std;
  uint32_t stream;
  uint32_t first_chunk;  // this tensor has the launch's chunks from here to the next entry's
  uint32_t lead;  // elements of the first group that lie before the tensor
  bool vectors;  // every group starts at a multiple of 16 bytes
};

// One warp's part of a chunk. Steps [begin, end) are whole vectors; the rest, up to `steps`, hold an end of the
// tensor, or any part of one that is not aligned.
template <class T>
struct WarpChunk {
  static constexpr int kSize = Group<T>::kSize;
  static constexpr int64_t kStride = int64_t{kNoiseThreads} * kSize;  // elements from step to step
  int64_t
      first;  // lane 0's first element at step 0; negative where the tensor starts within its group
  uint64_t counter;  // of that element
  int begin, end, steps;

  __device__ WarpChunk(const Entry& e, int64_t chunk, int chunk_steps) {
    int64_t group =
        chunk * chunk_steps * kNoiseThreads + static_cast<int64_t>(threadIdx.x / kWarp * kWarp);
    first = group * kSize - e.lead;
    counter = e.counter + static_cast<uint64_t>(group * (kSize / 4));
    steps = clamp((e.numel - first + kStride - 1) / kStride, chunk_steps);
    begin = first < 0 ? 1 : 0;
    end = e.vectors ? clamp((e.numel - first - kWarp * kSize + kStride) / kStride, steps) : 0;
    // Vector steps share the counter's high word; in the rare chunk where it changes, none is one.
    if (counter_at(begin) >> 32 != counter_at(chunk_steps) >> 32) end = 0;
    if (begin > end) begin = end;
  }
  static __device__ int clamp(int64_t n, int most) {
    return n < 0 ? 0 : n < most ? static_cast<int>(n) : most;
  }
  __device__ int64_t first_at(int step) const { return first + step * kStride; }
  __device__ uint64_t counter_at(int step) const {
    return counter + static_cast<uint64_t>(step * (kStride / 4));
  }
};

// The numbers behind the noise of one tensor.
struct Key {
  const math::PhiloxKeys& keys;
  uint32_t stream, step;
};

// Keeps a value in a register, where the compiler would make it anew in every turn of a loop.
__device__ __forceinline__ void keep(uint32_t& x) { asm volatile("" : "+r"(x)); }
__device__ __forceinline__ void keep(float& x) { asm volatile("" : "+f"(x)); }
__device__ __forceinline__ void keep(double& x) { asm volatile("" : "+d"(x)); }

template <class T>
__device__ __forceinline__ void put(math::Noise4 four, int counter,
                                    float (&eps)[Group<T>::kSize]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) eps[4 * counter + j] = four.value[j];
}

// vector(x, eps) for each step of whole vectors, x loaded from `in` if kLoad; edge(first, eps) for each other
// step, with the lane's group from element `first` on.
template <class T, bool kLoad, class VectorStep, class EdgeStep>
__device__ __forceinline__ void for_steps(const WarpChunk<T>& warp, const T* in, const Key& key,
                                          VectorStep vector, EdgeStep edge) {
  constexpr int kSize = Group<T>::kSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll 1
  for (int step = warp.begin == 0 ? warp.end : 0; step < warp.steps;
       step = step + 1 == warp.begin ? warp.end : step + 1) {
    uint64_t counter = warp.counter_at(step) + static_cast<uint64_t>(lane * (kSize / 4));
    float eps[kSize];
#pragma unroll
    for (int c = 0; c < kSize / 4; ++c) {
      uint64_t i = counter + static_cast<uint64_t>(c);
      math::PhiloxShared shared =
          math::philox_shared(static_cast<uint32_t>(i >> 32), key.stream, key.step, key.keys);
      put<T>(math::normal4(math::philox4x32_10(static_cast<uint32_t>(i), shared, key.keys)), c,
             eps);
    }
    edge(warp.first_at(step), eps);
  }
  // Last, so that the loop has the registers to itself.
  if (warp.begin >= warp.end) return;
  uint64_t counter = warp.counter_at(warp.begin) + static_cast<uint64_t>(lane * (kSize / 4));
  math::PhiloxShared shared =
      math::philox_shared(static_cast<uint32_t>(counter >> 32), key.stream, key.step, key.keys);
#pragma unroll
  for (int j = 0; j < 4; ++j) keep(shared.word[j]);
  uint32_t low = static_cast<uint32_t>(counter);
  const T* from = in + warp.first_at(warp.begin) + lane * kSize;
  constexpr int kUnroll = sizeof(T) == 8 ? 1 : 2;  // fp64 would not fit the registers twice
#pragma unroll kUnroll
  for (int step = warp.begin; step < warp.end; ++step) {
    Group<T> x;
    if constexpr (kLoad) x.load(from);
    float eps[kSize];
#pragma unroll
    for (int c = 0; c < kSize / 4; ++c) {
      put<T>(math::normal4(math::philox4x32_10(low + static_cast<uint32_t>(c), shared, key.keys)),
             c, eps);
    }
    Group<T>::arrange(eps);
    vector(x, eps);
    low += static_cast<uint32_t>(warp.kStride / 4);
    from += warp.kStride;
  }
}

// Steps of one chunk that hold `numel` elements and the `lead` before them.
template <class T>
int64_t steps_of(const Entry& e) {
  return (e.lead + e.numel + WarpChunk<T>::kStride - 1) / WarpChunk<T>::kStride;
}

template <class T>
Entry entry_of(void* out, const void* in, int64_t numel, uint64_t offset, double std,
               uint32_t stream) {
  // Groups of two counters may start at either parity: at the one whose elements are aligned.
  uintptr_t at = reinterpret_cast<uintptr_t>(out != nullptr ? out : in);
  uint64_t lead = offset % 4;
  uint64_t misaligned = (at - lead * sizeof(T)) % 16;
  if (sizeof(T) == 2 && misaligned == 8) {
    lead += 4;
    misaligned = 0;
  }
  bool together = in == nullptr || out == nullptr ||
                  (reinterpret_cast<uintptr_t>(in) - reinterpret_cast<uintptr_t>(out)) % 16 == 0;
  return {out,
          in,
          numel,
          offset / 4 - lead / 4,
          std,
          stream,
          0,
          static_cast<uint32_t>(lead),
          misaligned == 0 && together};
}

// ---- noise --------------------------------------------------------------------------------------

// The list travels as a kernel argument: in the classic 4 KB, or in the 32 KB of CUDA 12.1 on.
template <int kCapacity>
struct List {
  Entry entry[kCapacity];
  math::PhiloxKeys keys;
  const int64_t* device_step;
  const double* device_std;
  uint32_t step;
  int count, chunk_steps;
};

template <class T, bool kAdd>
__device__ __forceinline__ void noise_chunk(const Entry& e, int64_t chunk, int chunk_steps,
                                            const Key& key, const double* device_std,
                                            float4* staged) {
  using Real = typename Compute<T>::type;
  using RealPair = decltype(widen_pair(Group<T>().pair[0]));
  constexpr int kSize = Group<T>::kSize;
  const WarpChunk<T> warp(e, chunk, chunk_steps);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const T* in = static_cast<const T*>(e.in);
  T* out = static_cast<T*>(e.out);
  T* to = out + warp.first_at(warp.begin) + lane * kSize;
  Real std = static_cast<Real>(device_std != nullptr ? *device_std : e.std);
  keep(std);
  auto noisy = [std](Real x, float eps) {
    return kAdd ? math::fma(std, static_cast<Real>(eps), x) : std * static_cast<Real>(eps);
  };

  for_steps<T, kAdd>(warp, in, key, [&](Group<T>& x, const float (&eps)[kSize]) {
#pragma unroll
    for (int j = 0; j < kSize / 2; ++j) {
      RealPair y = {};
      if constexpr (kAdd) y = widen_pair(x.pair[j]);
      y.x = noisy(y.x, eps[2 * j]);
      y.y = noisy(y.y, eps[2 * j + 1]);
      narrow_pair(y, x.pair[j]);
    }
    x.store(to);
    to += warp.kStride;
  }, [&](int64_t first, const float (&eps)[kSize]) {
    // Through shared memory, so that neighbouring lanes have neighbouring elements.
    float4* mine = staged + threadIdx.x / kWarp * (kWarp * kSize / 4);
#pragma unroll
    for (int c = 0; c < kSize / 4; ++c)
      mine[lane * (kSize / 4) + c] = {eps[4 * c], eps[4 * c + 1], eps[4 * c + 2], eps[4 * c + 3]};
    __syncwarp();
#pragma unroll 1
    for (int j = lane; j < kWarp * kSize; j += kWarp) {
      int64_t i = first + j;
      if (i < 0 || i >= e.numel) continue;
      Real x = 0;
      if constexpr (kAdd) x = static_cast<Real>(widen(in[i]));
      narrow(noisy(x, reinterpret_cast<const float*>(mine)[j]), out[i]);
    }
    __syncwarp();
  });
}

template <class T, int kCapacity>
__global__ void __launch_bounds__(kNoiseThreads, kNoiseBlocksPerSm)
    noise_kernel(const __grid_constant__ List<kCapacity> list) {
  __shared__ float4 staged[kNoiseThreads * Group<T>::kSize / 4];
  const uint32_t step =
      list.device_step != nullptr ? static_cast<uint32_t>(*list.device_step) : list.step;
  int t = 0;
  for (int high = list.count - 1; t < high;) {
    int middle = (t + high + 1) / 2;
    if (list.entry[middle].first_chunk <= blockIdx.x) {
      t = middle;
    } else {
      high = middle - 1;
    }
  }
  const Entry& e = list.entry[t];
  const Key key = {list.keys, e.stream, step};
  const int64_t chunk = blockIdx.x - e.first_chunk;
  if (e.in != nullptr) {
    noise_chunk<T, true>(e, chunk, list.chunk_steps, key, list.device_std, staged);
  } else {
    noise_chunk<T, false>(e, chunk, list.chunk_steps, key, list.device_std, staged);
  }
}

template <class T, int kCapacity>
cudaError_t launch_list(const NoiseParams& p, int64_t begin, int64_t end, const Device& device,
                        cudaStream_t stream) {
  List<kCapacity> list;
  int64_t steps = 0;
  for (int64_t t = begin; t < end; ++t) {
    const NoiseTensor& x = p.tensors[t];
    Entry& e = list.entry[t - begin];
    e = entry_of<T>(x.out, x.in, x.numel, x.offset, x.std, x.stream);
    steps += steps_of<T>(e);
  }
  NoisePlan plan = plan_noise(steps, device);
  int64_t chunks = 0;
  for (int64_t t = begin; t < end; ++t) {
    Entry& e = list.entry[t - begin];
    e.first_chunk = static_cast<uint32_t>(chunks);
    if (e.numel > 0) chunks += (steps_of<T>(e) + plan.steps - 1) / plan.steps;
  }
  if (chunks == 0) return cudaSuccess;
  list.keys = math::philox_keys(p.seed_low, p.seed_high);
  list.device_step = p.device_step;
  list.device_std = p.device_std;
  list.step = p.step;
  list.count = static_cast<int>(end - begin);
  list.chunk_steps = plan.steps;
  noise_kernel<T, kCapacity><<<static_cast<unsigned>(chunks), kNoiseThreads, 0, stream>>>(list);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch_noise(const NoiseParams& p, cudaStream_t stream) {
  constexpr int kFew = 64, kMany = 576;
  Device device;
  cudaError_t error = device_of(reinterpret_cast<const void*>(&noise_kernel<T, kFew>), device);
  for (int64_t begin = 0; begin < p.count && error == cudaSuccess;) {
    int64_t end = std::min<int64_t>(p.count, begin + kMany);
    error = end - begin <= kFew ? launch_list<T, kFew>(p, begin, end, device, stream)
                                : launch_list<T, kMany>(p, begin, end, device, stream);
    begin = end;
  }
  return error;
}

// ---- the dot product ----------------------------------------------------------------------------

struct Dot {
  Entry x;
  math::PhiloxKeys keys;
  const int64_t* device_step;
  uint32_t step;
  int chunk_steps;
  double* partial;
};

// A block's sum of one chunk: a group's products in fp32 (or fp64), groups in fp64.
template <class T>
__global__ void __launch_bounds__(kNoiseThreads, kNoiseBlocksPerSm)
    dot_kernel(const __grid_constant__ Dot p) {
  using Real = typename Compute<T>::type;
  constexpr int kSize = Group<T>::kSize;
  __shared__ double shared[kNoiseThreads / kWarp];
  const WarpChunk<T> warp(p.x, blockIdx.x, p.chunk_steps);
  const T* x = static_cast<const T*>(p.x.in);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const Key key = {p.keys, p.x.stream,
                   p.device_step != nullptr ? static_cast<uint32_t>(*p.device_step) : p.step};
  double sum[1] = {0};
  for_steps<T, true>(warp, x, key, [&](const Group<T>& group, const float (&eps)[kSize]) {
    Real products = 0;
#pragma unroll
    for (int j = 0; j < kSize / 2; ++j) {
      auto two = widen_pair(group.pair[j]);
      products = math::fma(two.x, static_cast<Real>(eps[2 * j]), products);
      products = math::fma(two.y, static_cast<Real>(eps[2 * j + 1]), products);
    }
    sum[0] += static_cast<double>(products);
  }, [&](int64_t first, float (&eps)[kSize]) {
    Group<T>::arrange(eps);
    Real products = 0;
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      int64_t i = first + lane * kSize + Group<T>::position(j);
      if (i >= 0 && i < p.x.numel)
        products = math::fma(static_cast<Real>(widen(x[i])), static_cast<Real>(eps[j]), products);
    }
    sum[0] += static_cast<double>(products);
  });
  reduce<Sum, kNoiseThreads>(sum, shared);
  if (threadIdx.x == 0) p.partial[blockIdx.x] = sum[0];
}

template <class Real>
__global__ void __launch_bounds__(kNoiseThreads)
    dot_total_kernel(const double* partial, int blocks, Real* result) {
  __shared__ double shared[kNoiseThreads / kWarp];
  double sum[1] = {0};
  for (int b = static_cast<int>(threadIdx.x); b < blocks; b += kNoiseThreads) sum[0] += partial[b];
  reduce<Sum, kNoiseThreads>(sum, shared);
  if (threadIdx.x == 0) *result = static_cast<Real>(sum[0]);
}

template <class T>
cudaError_t launch_dot(const NoiseDotParams& p, cudaStream_t stream) {
  using Real = typename Compute<T>::type;
  Dot dot = {};
  dot.x = entry_of<T>(nullptr, p.x, p.numel, p.offset, 0, p.key.stream);
  dot.keys = math::philox_keys(p.key.seed_low, p.key.seed_high);
  dot.device_step = p.device_step;
  dot.step = p.key.step;
  dot.partial = p.partial;
  NoisePlan plan = plan_noise_dot(p.numel > 0 ? steps_of<T>(dot.x) : 0);
  dot.chunk_steps = plan.steps;
  if (plan.blocks > 0) {
    dot_kernel<T><<<static_cast<unsigned>(plan.blocks), kNoiseThreads, 0, stream>>>(dot);
  }
  dot_total_kernel<Real>
      <<<1, kNoiseThreads, 0, stream>>>(p.partial, plan.blocks, static_cast<Real*>(p.result));
  return cudaGetLastError();
}

}  // namespace

cudaError_t noise(const NoiseParams& p, cudaStream_t stream) {
  switch (p.dtype) {
    case Dtype::kFloat32: return launch_noise<float>(p, stream);
    case Dtype::kFloat64: return launch_noise<double>(p, stream);
    case Dtype::kBFloat16: return launch_noise<__nv_bfloat16>(p, stream);
    case Dtype::kFloat16: return launch_noise<__half>(p, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t noise_dot(const NoiseDotParams& p, cudaStream_t stream) {
  switch (p.dtype) {
    case Dtype::kFloat32: return launch_dot<float>(p, stream);
    case Dtype::kFloat64: return launch_dot<double>(p, stream);
    case Dtype::kBFloat16: return launch_dot<__nv_bfloat16>(p, stream);
    case Dtype::kFloat16: return launch_dot<__half>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace cuda
}  // namespace kdkernels
