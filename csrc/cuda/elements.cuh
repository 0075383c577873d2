// How a GPU walks the elements of a list of tensors, each with its random number: what noise and optimizer
// updates share.
//
// A block has one chunk of one tensor. A lane handles one group of elements at a time, in 16-byte accesses that are
// issued before the numbers are made in registers. A group starts with the first element of a Philox counter.
#pragma once

#include <algorithm>
#include <cstring>

#include "cuda/device.cuh"
#include "cuda/plan.h"
#include "math/distribution.h"

namespace kdkernels {
namespace cuda {
namespace {

// ---- a group of elements in registers -----------------------------------------------------------

// Two neighbouring elements, as stored and as computed with.
__device__ __forceinline__ float2 widen_pair(float2 x) { return x; }
__device__ __forceinline__ double2 widen_pair(double2 x) { return x; }
__device__ __forceinline__ float2 widen_pair(__nv_bfloat162 x) {
  // One instruction each; the toolkit's conversion takes two for the upper element.
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

// What a lane handles at a time: 16 bytes of elements, and at least the 4 of a counter.
template <class T>
struct Group {
  static constexpr int kSize = noise_group(sizeof(T));
  static constexpr int kAccess = 16 / sizeof(T);  // elements
  using RealPair = decltype(widen_pair(typename Storage<T>::Pair()));
  typename Storage<T>::Pair pair[kSize / 2];

  // The place of element j, relative to the lane's group. A counter's fp64 elements are 32 bytes: two lanes share
  // one group and then the other, so that an access fills the sectors that it touches.
  static __device__ int position(int j) {
    if constexpr (kAccess == kSize) {
      return j;
    } else {
      return (j / kAccess - odd()) * kSize + odd() * kAccess + j % kAccess;
    }
  }
  static __device__ int odd() { return static_cast<int>(threadIdx.x) & 1; }
  // Moves the numbers of the lane's group to the lanes that have its elements.
  template <class Number>
  static __device__ void arrange(Number (&x)[kSize]) {
    if constexpr (kAccess < kSize) {
#pragma unroll
      for (int j = 0; j < kAccess; ++j) {
        Number other = __shfl_xor_sync(0xFFFFFFFFu, odd() ? x[j] : x[kAccess + j], 1);
        x[j] = odd() ? other : x[j];
        x[kAccess + j] = odd() ? x[kAccess + j] : other;
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
      // A plain store, in a form that the compiler does not split.
      __stwb(reinterpret_cast<uint4*>(group + position(j)), bytes);
    }
  }
};

// ---- which elements a thread has ----------------------------------------------------------------

// A run of elements of a launch, cut into groups that start with the first element of a counter.
struct Run {
  int64_t numel;
  uint64_t counter;  // of the first group
  uint32_t stream;
  uint32_t first_chunk;  // the run has the launch's chunks from here to the next run's first
  int32_t index;  // of the tensor
  uint16_t lead;  // elements of the first group that lie before the run
  bool vectors;  // every group starts at a multiple of 16 bytes
};

// Null arrays are left out.
template <class T, int kArrays>
KD_FN Run run_of(int64_t numel, uint64_t offset, uint32_t stream, int32_t index,
                 const void* const (&arrays)[kArrays]) {
  uintptr_t first = 0, apart = 0;
  for (const void* array : arrays) {
    if (array == nullptr) continue;
    uintptr_t at = reinterpret_cast<uintptr_t>(array);
    first = first == 0 ? at : first;
    apart |= (at - first) % 16;
  }
  // A group of two counters may start at either of them: at the one whose elements are aligned.
  uint64_t lead = offset % 4;
  uint64_t misaligned = (first - lead * sizeof(T)) % 16;
  if (sizeof(T) == 2 && misaligned == 8) {
    lead += 4;
    misaligned = 0;
  }
  bool vectors = misaligned == 0 && apart == 0;
  return {numel, offset / 4 - lead / 4, stream, 0, index, static_cast<uint16_t>(lead), vectors};
}

template <class T>
constexpr int64_t kStepElements = int64_t{kNoiseThreads} * Group<T>::kSize;

// The number of steps for the run's elements and the `lead` before them.
template <class T>
int64_t steps_of(const Run& run) {
  return run.numel == 0 ? 0 : (run.lead + run.numel + kStepElements<T> - 1) / kStepElements<T>;
}

// Assigns chunks to each run and returns their number.
template <class T, class Entry>
int64_t assign_chunks(Entry* entries, int64_t count, int chunk_steps) {
  int64_t chunks = 0;
  for (int64_t i = 0; i < count; ++i) {
    entries[i].first_chunk = static_cast<uint32_t>(chunks);
    chunks += (steps_of<T>(entries[i]) + chunk_steps - 1) / chunk_steps;
  }
  return chunks;
}

// The run that a chunk belongs to.
template <class Entry>
__device__ __forceinline__ const Entry& entry_of(const Entry* entries, int count, unsigned chunk) {
  int i = 0;
  for (int high = count - 1; i < high;) {
    int middle = (i + high + 1) / 2;
    if (entries[middle].first_chunk <= chunk) {
      i = middle;
    } else {
      high = middle - 1;
    }
  }
  return entries[i];
}

// One warp's part of a chunk. Steps [begin, end) are whole vectors; the others, up to `steps`, hold an end of the run,
// or any part of a run that is not aligned.
template <class T>
struct WarpChunk {
  static constexpr int kSize = Group<T>::kSize;
  static constexpr int64_t kStride = kStepElements<T>;  // elements from step to step
  // Lane 0's first element at step 0; negative where the run starts within its group.
  int64_t first;
  uint64_t counter;  // of that element
  int begin, end, steps;

  __device__ WarpChunk(const Run& run, int64_t chunk, int chunk_steps) {
    int64_t group =
        chunk * chunk_steps * kNoiseThreads + static_cast<int64_t>(threadIdx.x / kWarp * kWarp);
    first = group * kSize - run.lead;
    counter = run.counter + static_cast<uint64_t>(group * (kSize / 4));
    steps = clamp((run.numel - first + kStride - 1) / kStride, chunk_steps);
    begin = first < 0 ? 1 : 0;
    end = run.vectors ? clamp((run.numel - first - kWarp * kSize + kStride) / kStride, steps) : 0;
    // Vector steps share the counter's high word. A chunk where it changes is rare and has no vector steps.
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
  // The lane's first element of the first vector step.
  __device__ int64_t lane_first() const {
    return first_at(begin) + static_cast<int>(threadIdx.x) % kWarp * kSize;
  }
};

// ---- their numbers ------------------------------------------------------------------------------

// Keeps a value in a register; the compiler would compute it again in every iteration of a loop.
__device__ __forceinline__ void keep(uint32_t& x) { asm volatile("" : "+r"(x)); }
__device__ __forceinline__ void keep(float& x) { asm volatile("" : "+f"(x)); }
__device__ __forceinline__ void keep(double& x) { asm volatile("" : "+d"(x)); }

template <math::Distribution kDistribution, int kSize>
__device__ __forceinline__ void numbers(const uint32_t (&word)[kSize], float (&eps)[kSize]) {
#pragma unroll
  for (int j = 0; j < kSize; j += 2) {
    math::NoisePair pair = math::noise_pair<kDistribution>(word[j], word[j + 1]);
    eps[j] = pair.first;
    eps[j + 1] = pair.second;
  }
}

// The branch is the same in all threads, and taken once per group.
template <int kSize>
__device__ __forceinline__ void numbers(math::Distribution distribution,
                                        const uint32_t (&word)[kSize], float (&eps)[kSize]) {
  using math::Distribution;
  switch (distribution) {
    case Distribution::kNormal: return numbers<Distribution::kNormal>(word, eps);
    case Distribution::kUniform: return numbers<Distribution::kUniform>(word, eps);
    case Distribution::kRademacher: return numbers<Distribution::kRademacher>(word, eps);
    case Distribution::kTruncatedNormal: return numbers<Distribution::kTruncatedNormal>(word, eps);
    case Distribution::kLaplace: return numbers<Distribution::kLaplace>(word, eps);
  }
}

// The numbers of one tensor from one seed.
template <class T>
struct Philox {
  static constexpr int kSize = Group<T>::kSize;
  using Number = float;
  const math::PhiloxKeys& keys;
  uint32_t stream, step;
  math::Distribution distribution;
  math::PhiloxShared shared;

  __device__ __forceinline__ Philox(const math::PhiloxKeys& k, uint32_t of_stream, uint32_t of_step,
                                    math::Distribution d)
      : keys(k), stream(of_stream), step(of_step), distribution(d), shared() {}

  // Sets the high word of the counters of all following vector groups.
  __device__ __forceinline__ void begin_vectors(uint32_t high) {
    shared = math::philox_shared(high, stream, step, keys);
#pragma unroll
    for (int j = 0; j < 4; ++j) keep(shared.word[j]);
  }
  __device__ __forceinline__ void vector(uint32_t low, float (&eps)[kSize]) const {
    uint32_t word[kSize];
#pragma unroll
    for (int c = 0; c < kSize / 4; ++c)
      put(math::philox4x32_10(low + static_cast<uint32_t>(c), shared, keys), c, word);
    numbers(distribution, word, eps);
  }
  __device__ __forceinline__ void edge(uint64_t counter, float (&eps)[kSize]) const {
    uint32_t word[kSize];
#pragma unroll
    for (int c = 0; c < kSize / 4; ++c) {
      uint64_t i = counter + static_cast<uint64_t>(c);
      math::PhiloxShared of_counter =
          math::philox_shared(static_cast<uint32_t>(i >> 32), stream, step, keys);
      put(math::philox4x32_10(static_cast<uint32_t>(i), of_counter, keys), c, word);
    }
    numbers(distribution, word, eps);
  }
  static __device__ __forceinline__ void put(const math::Philox4x32<uint32_t>& four, int c,
                                             uint32_t (&word)[kSize]) {
#pragma unroll
    for (int j = 0; j < 4; ++j) word[4 * c + j] = four.word[j];
  }
};

// Vector steps in flight at the same time.
template <class T>
constexpr int kUnrolledSteps =
    sizeof(T) == 8 ? 1 : 2;  // two fp64 steps would not fit the registers

// Calls vector(x, eps) with x = load() for each step of whole vectors, and edge(first, eps) for each other step, with
// the lane's group from element `first` on. load and vector advance by WarpChunk::kStride elements per step, from
// lane_first() on.
template <class T, int kUnroll, class Numbers, class Load, class VectorStep, class EdgeStep>
__device__ __forceinline__ void for_steps(const WarpChunk<T>& warp, Numbers& source, Load load,
                                          VectorStep vector, EdgeStep edge) {
  constexpr int kSize = Group<T>::kSize;
  using Number = typename Numbers::Number;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll 1
  for (int step = warp.begin == 0 ? warp.end : 0; step < warp.steps;
       step = step + 1 == warp.begin ? warp.end : step + 1) {
    Number eps[kSize];
    source.edge(warp.counter_at(step) + static_cast<uint64_t>(lane * (kSize / 4)), eps);
    edge(warp.first_at(step), eps);
  }
  // Vector steps come last, so that their loop has all registers.
  if (warp.begin >= warp.end) return;
  uint64_t counter = warp.counter_at(warp.begin) + static_cast<uint64_t>(lane * (kSize / 4));
  source.begin_vectors(static_cast<uint32_t>(counter >> 32));
  uint32_t low = static_cast<uint32_t>(counter);
#pragma unroll kUnroll
  for (int step = warp.begin; step < warp.end; ++step) {
    auto x = load();
    Number eps[kSize];
    source.vector(low, eps);
    Group<T>::arrange(eps);
    vector(x, eps);
    low += static_cast<uint32_t>(warp.kStride / 4);
  }
}

// Exchanges the numbers of a block's edge steps, so that neighbouring lanes have neighbouring elements.
template <class T, class Number>
struct Staged {
  static constexpr int kSize = Group<T>::kSize;
  alignas(16) Number number[kNoiseThreads * kSize];

  // Calls use(i, eps of element i) for the warp's elements from `first` on that belong to the run.
  template <class Use>
  __device__ __forceinline__ void each(int64_t first, int64_t numel, const Number (&eps)[kSize],
                                       Use use) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    Number* warp = number + static_cast<int>(threadIdx.x) / kWarp * kWarp * kSize;
#pragma unroll
    for (int j = 0; j < kSize; j += 16 / sizeof(Number)) {
      uint4 bytes;
      std::memcpy(&bytes, &eps[j], sizeof bytes);
      *reinterpret_cast<uint4*>(warp + lane * kSize + j) = bytes;
    }
    __syncwarp();
#pragma unroll 1
    for (int j = lane; j < kWarp * kSize; j += kWarp) {
      int64_t i = first + j;
      if (i >= 0 && i < numel) use(i, warp[j]);
    }
    __syncwarp();
  }
};

// ---- sums per tensor ------------------------------------------------------------------------------

// Each chunk of a launch leaves kValues sums; those of one tensor are added in the order of the chunks.
struct Totals {
  const double* partial;  // [chunks, kValues]
  double* result;  // [indices, kValues], added to
  const float* unless;  // nothing is added where this is not 0; or null
  int count;
  uint32_t first_chunk[kNoiseRuns + 1];
  int32_t index[kNoiseRuns];
};

template <int kValues>
__global__ void __launch_bounds__(kNoiseThreads) totals_kernel(const __grid_constant__ Totals p) {
  __shared__ double shared[kValues * kNoiseThreads / kWarp];
  if (p.unless != nullptr && *p.unless != 0) return;
  double sum[kValues] = {};
  for (unsigned chunk = p.first_chunk[blockIdx.x] + threadIdx.x;
       chunk < p.first_chunk[blockIdx.x + 1]; chunk += kNoiseThreads) {
#pragma unroll
    for (int v = 0; v < kValues; ++v) sum[v] += p.partial[kValues * chunk + v];
  }
  reduce<Sum, kNoiseThreads>(sum, shared);
  if (threadIdx.x != 0) return;
#pragma unroll
  for (int v = 0; v < kValues; ++v) p.result[int64_t{kValues} * p.index[blockIdx.x] + v] += sum[v];
}

// The doubles of workspace that launches with sums use.
inline int64_t partials(int64_t runs, int values) {
  return values * (kSumBlocks + std::min<int64_t>(runs, kNoiseRuns));
}

// Called once before the launches of a call.
template <int kValues>
cudaError_t clear_totals(double* result, int64_t indices, cudaStream_t stream) {
  return cudaMemsetAsync(result, 0, sizeof(double) * static_cast<size_t>(kValues * indices),
                         stream);
}

// Called after each launch. Runs of a tensor are neighbours.
template <int kValues, class Entry>
cudaError_t add_totals(const Entry* entries, int64_t count, int64_t chunks, const double* partial,
                       double* result, const float* unless, cudaStream_t stream) {
  Totals totals;
  totals.partial = partial;
  totals.result = result;
  totals.unless = unless;
  int tensors = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (tensors > 0 && entries[i].index < totals.index[tensors - 1]) return cudaErrorInvalidValue;
    if (tensors > 0 && entries[i].index == totals.index[tensors - 1]) continue;
    totals.first_chunk[tensors] = entries[i].first_chunk;
    totals.index[tensors++] = entries[i].index;
  }
  totals.first_chunk[tensors] = static_cast<uint32_t>(chunks);
  if (tensors == 0) return cudaSuccess;
  totals_kernel<kValues><<<static_cast<unsigned>(tensors), kNoiseThreads, 0, stream>>>(totals);
  return cudaGetLastError();
}

}  // namespace
}  // namespace cuda
}  // namespace kdkernels
