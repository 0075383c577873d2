// Noise over a list of tensors, the dot product of tensors with their noise, and sums of several noises.
//
// An element is read once and written once. On an H100 a normal takes no more time than moving a bf16 element: 3.35
// TB/s are 14.5 bytes per clock and SM, at 128 issue slots per clock, so moving an fp32 element both ways leaves 70
// slots for it, fp16 and bf16 35, fp64 141. Slots per element in the inner loop (sm_90, counted in its SASS):
//
//   fp16, bf16 36.1    fp32 35.6    fp64 43.0    noise alone 34.8    dot product 35.4
//
// of which Philox takes 9.3 (18 wide products at half rate and 19 xors for 4 elements), Box-Muller 23 (an approximate
// reciprocal root, 3 conversions and 42 other operations for 2), and the element itself 2 to 3. So memory binds fp32
// and fp64; 16 bits are bound by memory and issue alike. An access is in flight for about 280 slots of each of 32
// warps, several times the latency of memory.
#include "cuda/elements.cuh"
#include "cuda/kernels.h"

namespace kdkernels {
namespace cuda {
namespace {

using math::Distribution;

struct NoiseEntry : Run {
  void* out;
  const void* in;
  double std;
};

template <int kCapacity>
struct NoiseList {
  NoiseEntry entry[kCapacity];
  math::PhiloxKeys keys;
  const int64_t* device_step;
  const void* stds;  // with std_size and std_inner as in NoiseParams
  int64_t std_size, std_inner;
  double* partial;  // of norms or dot products, or null
  uint32_t step;
  int count, chunk_steps;
  Distribution distribution;
  NoiseMode mode;

  __device__ uint32_t noise_step() const {
    return device_step != nullptr ? static_cast<uint32_t>(*device_step) : step;
  }
};

// Fills the list with tensors [begin, end) of a call and returns its number of chunks.
template <class T, int kCapacity, class Params, class Plan>
int64_t fill(const Params& p, int64_t begin, int64_t end, Plan plan, NoiseList<kCapacity>& list) {
  int64_t steps = 0;
  for (int64_t t = begin; t < end; ++t) {
    const NoiseTensor& x = p.tensors[t];
    NoiseEntry& e = list.entry[t - begin];
    static_cast<Run&>(e) = run_of<T>(x.numel, x.offset, x.stream, x.index, {x.out, x.in});
    e.out = x.out;
    e.in = x.in;
    e.std = x.std;
    steps += steps_of<T>(e);
  }
  list.keys = math::philox_keys(p.source.seed_low, p.source.seed_high);
  list.device_step = p.source.device_step;
  list.step = p.source.step;
  list.distribution = p.source.distribution;
  list.count = static_cast<int>(end - begin);
  list.chunk_steps = plan(steps).steps;
  return assign_chunks<T>(list.entry, list.count, list.chunk_steps);
}

// Calls launch(begin, end, std::integral_constant<int, capacity>) for each launch that a list needs.
template <class Launch>
cudaError_t for_launches(int64_t count, Launch launch) {
  cudaError_t error = cudaSuccess;
  for (int64_t begin = 0; begin < count && error == cudaSuccess; begin += kNoiseRuns) {
    int64_t end = std::min<int64_t>(count, begin + kNoiseRuns);
    error = end - begin <= kFewNoiseRuns
                ? launch(begin, end, std::integral_constant<int, kFewNoiseRuns>())
                : launch(begin, end, std::integral_constant<int, kNoiseRuns>());
  }
  return error;
}

// ---- noise --------------------------------------------------------------------------------------

// The std of a lane's elements from step to step: one for all, or a pattern that repeats.
template <class Real>
struct OneStd {
  Real std;
  __device__ __forceinline__ OneStd next() const { return *this; }
  __device__ __forceinline__ Real operator[](int) const { return std; }
  __device__ __forceinline__ Real of_element(int64_t) const { return std; }
};

template <class T>
struct StdPattern {
  using Real = typename Compute<T>::type;
  static constexpr int kSize = Group<T>::kSize, kVector = 16 / sizeof(Real);
  const Real* stds;
  int64_t size, inner, before;
  // The lane's first element has stds[place], and is the within-th of the `inner` elements that do.
  int64_t place, within;
  int64_t place_step, within_step;

  // The lane's group starts at element i of a run, which has so many elements `ahead` of it.
  __device__ StdPattern(const Real* of, int64_t s, int64_t n, int64_t ahead, int64_t i)
      : stds(of),
        size(s),
        inner(n),
        before(ahead),
        place((ahead + i) / n % s),
        within((ahead + i) % n),
        place_step(kStepElements<T> / n % s),
        within_step(kStepElements<T> % n) {}

  struct OfGroup {
    Real std[kSize];
    __device__ __forceinline__ Real operator[](int j) const { return std[j]; }
  };

  __device__ __forceinline__ OfGroup next() {
    OfGroup group;
    load(group.std);
    Group<T>::arrange(group.std);
    within += within_step;
    bool carry = within >= inner;
    within -= carry ? inner : 0;
    place += place_step + carry;
    place -= place >= size ? size : 0;
    return group;
  }
  __device__ __forceinline__ void load(Real (&std)[kSize]) const {
    const Real* at = stds + place;
    if (within + kSize <= inner) {
      Real one = *at;
#pragma unroll
      for (int j = 0; j < kSize; ++j) std[j] = one;
    } else if (inner == 1 && place + kSize <= size && reinterpret_cast<uintptr_t>(at) % 16 == 0) {
#pragma unroll
      for (int j = 0; j < kSize; j += kVector) {
        uint4 bytes = *reinterpret_cast<const uint4*>(at + j);
        std::memcpy(&std[j], &bytes, sizeof bytes);
      }
    } else {
      int64_t c = place, w = within;
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        std[j] = stds[c];
        bool last = ++w == inner;
        w = last ? 0 : w;
        c = last ? c + 1 : c;
        c = c == size ? 0 : c;
      }
    }
  }
  __device__ __forceinline__ Real of_element(int64_t i) const {
    return stds[(before + i) / inner % size];
  }
};

template <NoiseMode kMode, class T, class Stds>
__device__ __forceinline__ void apply(Group<T>& x, const Stds& std,
                                      const float (&eps)[Group<T>::kSize]) {
  using Real = typename Compute<T>::type;
#pragma unroll
  for (int j = 0; j < Group<T>::kSize / 2; ++j) {
    typename Group<T>::RealPair y = {};
    if constexpr (kMode != NoiseMode::kOnly) y = widen_pair(x.pair[j]);
    y.x = math::apply_noise<kMode>(std[2 * j], static_cast<Real>(eps[2 * j]), y.x);
    y.y = math::apply_noise<kMode>(std[2 * j + 1], static_cast<Real>(eps[2 * j + 1]), y.y);
    narrow_pair(y, x.pair[j]);
  }
}

// The branch is the same in all threads, and taken once per group.
template <class T, class Stds>
__device__ __forceinline__ void apply(NoiseMode mode, Group<T>& x, const Stds& std,
                                      const float (&eps)[Group<T>::kSize]) {
  switch (mode) {
    case NoiseMode::kOnly: return apply<NoiseMode::kOnly>(x, std, eps);
    case NoiseMode::kAdd: return apply<NoiseMode::kAdd>(x, std, eps);
    case NoiseMode::kScale: return apply<NoiseMode::kScale>(x, std, eps);
    case NoiseMode::kTimes: return apply<NoiseMode::kTimes>(x, std, eps);
  }
}

template <class T, class Real>
__device__ __forceinline__ void apply_to_one(NoiseMode mode, const T* in, Real std, Real eps,
                                             T& out) {
  Real x = mode == NoiseMode::kOnly ? 0 : static_cast<Real>(widen(*in));
  switch (mode) {
    case NoiseMode::kOnly: return narrow(math::apply_noise<NoiseMode::kOnly>(std, eps, x), out);
    case NoiseMode::kAdd: return narrow(math::apply_noise<NoiseMode::kAdd>(std, eps, x), out);
    case NoiseMode::kScale: return narrow(math::apply_noise<NoiseMode::kScale>(std, eps, x), out);
    case NoiseMode::kTimes: return narrow(math::apply_noise<NoiseMode::kTimes>(std, eps, x), out);
  }
}

// Adds the squares of x and of std * eps to norms.
template <class T, class Stds>
__device__ __forceinline__ void add_norms(const Group<T>& x, const Stds& std,
                                          const float (&eps)[Group<T>::kSize], double (&norms)[2]) {
  using Real = typename Compute<T>::type;
  Real sum[2] = {0, 0};
#pragma unroll
  for (int j = 0; j < Group<T>::kSize / 2; ++j) {
    auto y = widen_pair(x.pair[j]);
    Real a = std[2 * j] * static_cast<Real>(eps[2 * j]);
    Real b = std[2 * j + 1] * static_cast<Real>(eps[2 * j + 1]);
    sum[0] = math::fma(y.y, y.y, math::fma(y.x, y.x, sum[0]));
    sum[1] = math::fma(b, b, math::fma(a, a, sum[1]));
  }
  norms[0] += static_cast<double>(sum[0]);
  norms[1] += static_cast<double>(sum[1]);
}

// Noise on one chunk of a tensor. Arguments that are constant at the call cost nothing in the loop.
template <int kUnroll, class T, class Stds, class Arguments>
__device__ __forceinline__ void noise_chunk(const Arguments& list, const NoiseEntry& e,
                                            const WarpChunk<T>& warp, Distribution distribution,
                                            NoiseMode mode, Stds stds, Staged<T, float>& staged,
                                            bool with_norms, double (&norms)[2]) {
  using Real = typename Compute<T>::type;
  constexpr int kSize = Group<T>::kSize;
  const T* in = static_cast<const T*>(e.in);
  T* out = static_cast<T*>(e.out);
  const T* from = in + warp.lane_first();
  T* to = out + warp.lane_first();
  Philox<T> numbers(list.keys, e.stream, list.noise_step(), distribution);
  for_steps<T, kUnroll>(warp, numbers, [&] {
    Group<T> x = {};
    if (mode != NoiseMode::kOnly) x.load(from);
    from += warp.kStride;
    return x;
  }, [&](Group<T>& x, const float (&eps)[kSize]) {
    const auto std = stds.next();
    if (with_norms) add_norms(x, std, eps, norms);
    apply(mode, x, std, eps);
    x.store(to);
    to += warp.kStride;
  }, [&](int64_t first, const float (&eps)[kSize]) {
    staged.each(first, e.numel, eps, [&](int64_t i, float eps_i) {
      Real std = stds.of_element(i);
      if (with_norms) {
        double x = static_cast<double>(widen(in[i]));
        double noise = static_cast<double>(std * static_cast<Real>(eps_i));
        norms[0] += x * x;
        norms[1] += noise * noise;
      }
      apply_to_one(mode, in + i, std, static_cast<Real>(eps_i), out[i]);
    });
  });
}

template <class T, int kCapacity>
__global__ void __launch_bounds__(kNoiseThreads, kNoiseBlocksPerSm)
    noise_kernel(const __grid_constant__ NoiseList<kCapacity> list) {
  using Real = typename Compute<T>::type;
  __shared__ Staged<T, float> staged;
  __shared__ double shared[2 * kNoiseThreads / kWarp];
  const NoiseEntry& e = entry_of(list.entry, list.count, blockIdx.x);
  const WarpChunk<T> warp(e, static_cast<int64_t>(blockIdx.x - e.first_chunk), list.chunk_steps);
  OneStd<Real> std = {static_cast<Real>(e.std)};
  if (list.stds != nullptr) std.std = static_cast<const Real*>(list.stds)[e.index];
  keep(std.std);
  const bool with_norms = list.partial != nullptr;
  const bool normal = list.distribution == Distribution::kNormal && !with_norms;
  double norms[2] = {0, 0};
  // The two most frequent cases have loops of their own.
  if (normal && list.mode == NoiseMode::kAdd) {
    noise_chunk<kUnrolledSteps<T>>(list, e, warp, Distribution::kNormal, NoiseMode::kAdd, std,
                                   staged, false, norms);
  } else if (normal && list.mode == NoiseMode::kOnly) {
    noise_chunk<kUnrolledSteps<T>>(list, e, warp, Distribution::kNormal, NoiseMode::kOnly, std,
                                   staged, false, norms);
  } else {
    noise_chunk<1>(list, e, warp, list.distribution, list.mode, std, staged, with_norms, norms);
  }
  if (!with_norms) return;
  reduce<Sum, kNoiseThreads>(norms, shared);
  if (threadIdx.x == 0) {
    list.partial[2 * int64_t{blockIdx.x}] = norms[0];
    list.partial[2 * int64_t{blockIdx.x} + 1] = norms[1];
  }
}

template <class T>
__global__ void __launch_bounds__(kNoiseThreads, kNoiseBlocksPerSm)
    pattern_kernel(const __grid_constant__ NoiseList<1> list) {
  using Real = typename Compute<T>::type;
  __shared__ Staged<T, float> staged;
  const NoiseEntry& e = list.entry[0];
  const WarpChunk<T> warp(e, static_cast<int64_t>(blockIdx.x), list.chunk_steps);
  const Real* of_tensor = static_cast<const Real*>(list.stds) + e.index * list.std_size;
  StdPattern<T> stds(of_tensor, list.std_size, list.std_inner, 0, warp.lane_first());
  double norms[2];
  noise_chunk<1>(list, e, warp, list.distribution, list.mode, stds, staged, false, norms);
}

// The rows of a tensor, each with a seed and a step: a block has a chunk of one row.
struct RowsArguments {
  NoiseSource source;
  NoiseTensor first;  // row
  NoiseMode mode;
  const void* stds;  // with std_size and std_inner as in NoiseParams
  int64_t std_size, std_inner;
  int64_t chunks;  // a row
  int chunk_steps;
};

// A row's numbers, as noise_chunk reads them.
struct RowNumbers {
  const math::PhiloxKeys& keys;
  uint32_t step;
  __device__ uint32_t noise_step() const { return step; }
};

template <class T>
__global__ void __launch_bounds__(kNoiseThreads, kRowsBlocksPerSm)
    rows_kernel(const __grid_constant__ RowsArguments p) {
  using Real = typename Compute<T>::type;
  __shared__ Staged<T, float> staged;
  __shared__ math::PhiloxKeys keys;
  const int64_t row = blockIdx.x / p.chunks, ahead = row * p.first.numel;
  if (threadIdx.x == 0) {
    const uint64_t seed = p.source.row_seeds != nullptr
                              ? static_cast<uint64_t>(p.source.row_seeds[row])
                              : uint64_t{p.source.seed_high} << 32 | p.source.seed_low;
    keys = math::philox_keys(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  }
  __syncthreads();
  const int64_t* step =
      p.source.row_steps != nullptr ? p.source.row_steps + row : p.source.device_step;
  const RowNumbers numbers = {keys, step != nullptr ? static_cast<uint32_t>(*step) : p.source.step};
  NoiseEntry e;
  e.out = static_cast<T*>(p.first.out) + ahead;
  e.in = p.first.in == nullptr ? nullptr : static_cast<const T*>(p.first.in) + ahead;
  e.std = p.first.std;
  static_cast<Run&>(e) = run_of<T>(p.first.numel, p.first.offset, p.first.stream, 0, {e.out, e.in});
  const WarpChunk<T> warp(e, static_cast<int64_t>(blockIdx.x % p.chunks), p.chunk_steps);
  const Real* of_tensor =
      p.stds == nullptr ? nullptr : static_cast<const Real*>(p.stds) + p.first.index * p.std_size;
  double norms[2];
  if (p.std_size > 1) {
    StdPattern<T> stds(of_tensor, p.std_size, p.std_inner, ahead, warp.lane_first());
    noise_chunk<1>(numbers, e, warp, p.source.distribution, p.mode, stds, staged, false, norms);
  } else {
    const OneStd<Real> std = {of_tensor != nullptr ? *of_tensor : static_cast<Real>(e.std)};
    noise_chunk<1>(numbers, e, warp, p.source.distribution, p.mode, std, staged, false, norms);
  }
}

template <class T>
cudaError_t launch_rows(const NoiseParams& p, cudaStream_t stream) {
  Device device;
  cudaError_t error = device_of(reinterpret_cast<const void*>(&rows_kernel<T>), device);
  if (error != cudaSuccess || p.rows == 0 || p.tensors[0].numel == 0) return error;
  RowsArguments a = {p.source, p.tensors[0], p.mode, p.stds, p.std_size, p.std_inner, 0, 0};
  // A row may begin anywhere in its first group.
  const int64_t steps =
      (p.tensors[0].numel + Group<T>::kSize - 1 + kStepElements<T> - 1) / kStepElements<T>;
  const int64_t each = plan_noise(steps * p.rows, kRowsBlocksPerSm, device).steps;
  a.chunk_steps = static_cast<int>(std::min(each, steps));
  a.chunks = (steps + a.chunk_steps - 1) / a.chunk_steps;
  rows_kernel<T><<<static_cast<unsigned>(a.chunks * p.rows), kNoiseThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch_noise(const NoiseParams& p, cudaStream_t stream) {
  if (p.rows > 0) return launch_rows<T>(p, stream);
  Device device;
  cudaError_t error =
      device_of(reinterpret_cast<const void*>(&noise_kernel<T, kFewNoiseRuns>), device);
  auto plan = [&](int64_t steps) {
    return p.norms != nullptr ? plan_sums(steps) : plan_noise(steps, kNoiseBlocksPerSm, device);
  };
  auto prepared = [&](int64_t begin, int64_t end, auto& list) {
    list.stds = p.stds;
    list.std_size = p.std_size;
    list.std_inner = p.std_inner;
    list.partial = p.norms != nullptr ? p.workspace : nullptr;
    list.mode = p.mode;
    return static_cast<unsigned>(fill<T>(p, begin, end, plan, list));
  };
  if (error != cudaSuccess) return error;
  if (p.norms != nullptr) error = clear_totals<2>(p.norms, p.indices, stream);
  if (error == cudaSuccess && p.stds != nullptr && p.std_size > 1 && p.count == 1) {
    NoiseList<1> list;
    if (unsigned chunks = prepared(0, 1, list); chunks > 0)
      pattern_kernel<T><<<chunks, kNoiseThreads, 0, stream>>>(list);
    return cudaGetLastError();
  }
  if (error != cudaSuccess) return error;
  return for_launches(p.count, [&](int64_t begin, int64_t end, auto capacity) {
    NoiseList<capacity> list;
    unsigned chunks = prepared(begin, end, list);
    if (chunks == 0) return cudaSuccess;
    noise_kernel<T, capacity><<<chunks, kNoiseThreads, 0, stream>>>(list);
    if (p.norms == nullptr) return cudaGetLastError();
    return add_totals<2>(list.entry, list.count, chunks, list.partial, p.norms, nullptr, stream);
  });
}

// ---- the dot product ----------------------------------------------------------------------------

// Adds the products of a group in fp32 (fp64 for fp64), and groups in fp64.
template <int kUnroll, class T, class Arguments>
__device__ __forceinline__ double dot_chunk(const Arguments& list, const NoiseEntry& e,
                                            Distribution distribution) {
  using Real = typename Compute<T>::type;
  constexpr int kSize = Group<T>::kSize;
  const WarpChunk<T> warp(e, static_cast<int64_t>(blockIdx.x - e.first_chunk), list.chunk_steps);
  const T* in = static_cast<const T*>(e.in);
  const T* from = in + warp.lane_first();
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  double sum = 0;
  Philox<T> numbers(list.keys, e.stream, list.noise_step(), distribution);
  for_steps<T, kUnroll>(warp, numbers, [&] {
    Group<T> x;
    x.load(from);
    from += warp.kStride;
    return x;
  }, [&](const Group<T>& x, const float (&eps)[kSize]) {
    Real products = 0;
#pragma unroll
    for (int j = 0; j < kSize / 2; ++j) {
      auto two = widen_pair(x.pair[j]);
      products = math::fma(two.x, static_cast<Real>(eps[2 * j]), products);
      products = math::fma(two.y, static_cast<Real>(eps[2 * j + 1]), products);
    }
    sum += static_cast<double>(products);
  }, [&](int64_t first, float (&eps)[kSize]) {
    Group<T>::arrange(eps);
    Real products = 0;
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      int64_t i = first + lane * kSize + Group<T>::position(j);
      if (i >= 0 && i < e.numel)
        products = math::fma(static_cast<Real>(widen(in[i])), static_cast<Real>(eps[j]), products);
    }
    sum += static_cast<double>(products);
  });
  return sum;
}

// Each block leaves the sum of its chunk.
template <class T, int kCapacity>
__global__ void __launch_bounds__(kNoiseThreads, kNoiseBlocksPerSm)
    dot_kernel(const __grid_constant__ NoiseList<kCapacity> list) {
  __shared__ double shared[kNoiseThreads / kWarp];
  const NoiseEntry& e = entry_of(list.entry, list.count, blockIdx.x);
  double sum[1];
  if (list.distribution == Distribution::kNormal) {
    sum[0] = dot_chunk<kUnrolledSteps<T>, T>(list, e, Distribution::kNormal);
  } else {
    sum[0] = dot_chunk<1, T>(list, e, list.distribution);
  }
  reduce<Sum, kNoiseThreads>(sum, shared);
  if (threadIdx.x == 0) list.partial[blockIdx.x] = sum[0];
}

template <class T>
cudaError_t launch_dot(const NoiseDotParams& p, cudaStream_t stream) {
  cudaError_t error = clear_totals<1>(p.result, p.indices, stream);
  if (error != cudaSuccess) return error;
  return for_launches(p.count, [&](int64_t begin, int64_t end, auto capacity) {
    NoiseList<capacity> list;
    list.partial = p.workspace;
    unsigned chunks = static_cast<unsigned>(fill<T>(p, begin, end, plan_sums, list));
    if (chunks == 0) return cudaSuccess;
    dot_kernel<T, capacity><<<chunks, kNoiseThreads, 0, stream>>>(list);
    return add_totals<1>(list.entry, list.count, chunks, p.workspace, p.result, nullptr, stream);
  });
}

// ---- sums of several noises ---------------------------------------------------------------------

constexpr int kTermsStaged = 16;  // per warp, between two reads of the seeds

// What a warp reads of a term.
template <class Real>
struct alignas(16) CombineTerm {
  math::PhiloxKeys keys;
  Real coefficient;
};

// The sum of a group's numbers over all terms, for one tensor.
template <class T>
struct CombineSums {
  static constexpr int kSize = Group<T>::kSize;
  using Real = typename Compute<T>::type;
  using Number = Real;
  const int64_t* seeds;
  const double* coefficients;
  int64_t terms;
  uint32_t stream, step, high;
  Distribution distribution;
  CombineTerm<Real>* staged;  // the warp's

  __device__ void stage(int64_t first) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    __syncwarp();
    if (lane < kTermsStaged && first + lane < terms) {
      uint64_t seed = static_cast<uint64_t>(seeds[first + lane]);
      staged[lane].keys =
          math::philox_keys(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
      staged[lane].coefficient = static_cast<Real>(coefficients[first + lane]);
    }
    __syncwarp();
  }
  __device__ __forceinline__ void begin_vectors(uint32_t of_vectors) { high = of_vectors; }
  __device__ __forceinline__ void vector(uint32_t low, Real (&sum)[kSize]) {
    add(sum, [&](float (&eps)[kSize], const math::PhiloxKeys& keys) {
      Philox<T> numbers(keys, stream, step, distribution);
      numbers.shared = math::philox_shared(high, stream, step, keys);
      numbers.vector(low, eps);
    });
  }
  __device__ __forceinline__ void edge(uint64_t counter, Real (&sum)[kSize]) {
    add(sum, [&](float (&eps)[kSize], const math::PhiloxKeys& keys) {
      Philox<T>(keys, stream, step, distribution).edge(counter, eps);
    });
  }
  template <class Make>
  __device__ __forceinline__ void add(Real (&sum)[kSize], Make make) {
#pragma unroll
    for (int j = 0; j < kSize; ++j) sum[j] = 0;
#pragma unroll 1
    for (int64_t first = 0; first < terms; first += kTermsStaged) {
      if (terms > kTermsStaged) stage(first);
      const int count =
          static_cast<int>(terms - first < kTermsStaged ? terms - first : kTermsStaged);
#pragma unroll 1
      for (int k = 0; k < count; ++k) {
        const CombineTerm<Real> term = staged[k];
        float eps[kSize];
        make(eps, term.keys);
#pragma unroll
        for (int j = 0; j < kSize; ++j)
          sum[j] = math::fma(term.coefficient, static_cast<Real>(eps[j]), sum[j]);
      }
    }
  }
};

struct CombineTerms {
  const int64_t* seeds;
  const double* coefficients;
  int64_t count;
};

template <class T, int kCapacity>
__global__ void __launch_bounds__(kNoiseThreads, kCombineBlocksPerSm)
    combine_kernel(const __grid_constant__ NoiseList<kCapacity> list, const CombineTerms terms) {
  using Real = typename Compute<T>::type;
  constexpr int kSize = Group<T>::kSize;
  __shared__ Staged<T, Real> staged;
  __shared__ CombineTerm<Real> of_warps[kNoiseThreads / kWarp][kTermsStaged];
  const NoiseEntry& e = entry_of(list.entry, list.count, blockIdx.x);
  const WarpChunk<T> warp(e, static_cast<int64_t>(blockIdx.x - e.first_chunk), list.chunk_steps);
  T* out = static_cast<T*>(e.out);
  T* at = out + warp.lane_first();
  CombineSums<T> sums = {
      terms.seeds,       terms.coefficients,           terms.count, e.stream, list.noise_step(), 0,
      list.distribution, of_warps[threadIdx.x / kWarp]};
  if (terms.count <= kTermsStaged) sums.stage(0);
  for_steps<T, 1>(warp, sums, [&] {
    Group<T> x;
    x.load(at);
    return x;
  }, [&](Group<T>& x, const Real(&sum)[kSize]) {
#pragma unroll
    for (int j = 0; j < kSize / 2; ++j) {
      auto y = widen_pair(x.pair[j]);
      y.x += sum[2 * j];
      y.y += sum[2 * j + 1];
      narrow_pair(y, x.pair[j]);
    }
    x.store(at);
    at += warp.kStride;
  }, [&](int64_t first, const Real(&sum)[kSize]) {
    staged.each(first, e.numel, sum, [&](int64_t i, Real of_i) {
      narrow(static_cast<Real>(widen(out[i])) + of_i, out[i]);
    });
  });
}

template <class T>
cudaError_t launch_combine(const CombineParams& p, cudaStream_t stream) {
  if (p.terms == 0) return cudaSuccess;
  Device device;
  cudaError_t error =
      device_of(reinterpret_cast<const void*>(&combine_kernel<T, kFewNoiseRuns>), device);
  if (error != cudaSuccess) return error;
  auto plan = [&](int64_t steps) { return plan_noise(steps, kCombineBlocksPerSm, device); };
  return for_launches(p.count, [&](int64_t begin, int64_t end, auto capacity) {
    NoiseList<capacity> list;
    unsigned chunks = static_cast<unsigned>(fill<T>(p, begin, end, plan, list));
    if (chunks == 0) return cudaSuccess;
    combine_kernel<T, capacity><<<chunks, kNoiseThreads, 0, stream>>>(
        list, CombineTerms{p.seeds, p.coefficients, p.terms});
    return cudaGetLastError();
  });
}

}  // namespace

cudaError_t noise(const NoiseParams& p, cudaStream_t stream) {
  return by_dtype(p.dtype,
                  [&](auto element) { return launch_noise<decltype(element)>(p, stream); });
}
int64_t noise_workspace(const NoiseParams& p) {
  return p.norms != nullptr ? partials(p.count, 2) : 0;
}

cudaError_t noise_dot(const NoiseDotParams& p, cudaStream_t stream) {
  return by_dtype(p.dtype, [&](auto element) { return launch_dot<decltype(element)>(p, stream); });
}
int64_t noise_dot_workspace(const NoiseDotParams& p) { return partials(p.count, 1); }

cudaError_t combine(const CombineParams& p, cudaStream_t stream) {
  return by_dtype(p.dtype,
                  [&](auto element) { return launch_combine<decltype(element)>(p, stream); });
}

}  // namespace cuda
}  // namespace kdkernels
