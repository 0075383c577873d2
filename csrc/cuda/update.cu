// One optimizer step, with noise, over a list of parameters.
//
// Each element of parameter, gradient and moments is read once, and what changes is written once: with AdamW 28 bytes
// per element in fp32 and 14 in 16 bits, in which time an H100's SM has 247 and 124 issue slots. The numbers that
// elements share are computed on the host where it knows step, lr and std, else by the first thread of each block.
#include <vector>

#include "cuda/bits.cuh"
#include "cuda/elements.cuh"
#include "cuda/kernels.h"

namespace kdkernels {
namespace cuda {
namespace {

using math::Update;

struct UpdateEntry : Run {
  void *param, *grad, *first, *second;
  const float* device_step;
  uint32_t step;
  uint32_t slot;
};

// What the elements of some tensors share, or what the device computes it from.
template <class Real>
union Slot {
  math::UpdateNumbers<Real> numbers;
  struct {
    math::UpdateRule rule;
    int32_t index;  // of the rule
  } given;
};

// Entries fill `bytes` from its front and slots from its end: fewer rules leave room for more tensors.
template <class Real, int kBytes>
struct UpdateList {
  math::PhiloxKeys keys;
  const int64_t* noise_step;
  const double *lr, *std;  // [rules], or null
  const float *grad_scale, *found_inf;
  double* partial;  // of norms, or null
  uint32_t step;
  int count, chunk_steps;
  math::Distribution distribution;
  bool on_device;  // slots are `given`
  alignas(8) unsigned char bytes[kBytes];

  __host__ __device__ UpdateEntry* entries() { return reinterpret_cast<UpdateEntry*>(bytes); }
  __host__ __device__ const UpdateEntry* entries() const {
    return reinterpret_cast<const UpdateEntry*>(bytes);
  }
  __host__ __device__ Slot<Real>& slot(uint32_t i) {
    return reinterpret_cast<Slot<Real>*>(bytes + kBytes)[-1 - static_cast<int>(i)];
  }
  __host__ __device__ const Slot<Real>& slot(uint32_t i) const {
    return reinterpret_cast<const Slot<Real>*>(bytes + kBytes)[-1 - static_cast<int>(i)];
  }
};

// 4 KB of kernel arguments, and the 32 KB that CUDA 12.1 allows, less what comes before `bytes`.
constexpr int kFewBytes = 3936, kManyBytes = 32600;

// The numbers of a tensor whose std may be 0.
template <class T>
struct MaybeNoise : Philox<T> {
  using Philox<T>::kSize;
  bool noisy;

  __device__ __forceinline__ void vector(uint32_t low, float (&eps)[kSize]) const {
    if (noisy) return Philox<T>::vector(low, eps);
#pragma unroll
    for (int j = 0; j < kSize; ++j) eps[j] = 0;
  }
  __device__ __forceinline__ void edge(uint64_t counter, float (&eps)[kSize]) const {
    if (noisy) return Philox<T>::edge(counter, eps);
#pragma unroll
    for (int j = 0; j < kSize; ++j) eps[j] = 0;
  }
};

template <Update kUpdate, class Real, int kBytes>
__device__ __forceinline__ math::UpdateNumbers<Real> numbers_of(
    const UpdateList<Real, kBytes>& list, const UpdateEntry& e) {
  if (!list.on_device) return list.slot(e.slot).numbers;
  __shared__ math::UpdateNumbers<Real> made;
  if (threadIdx.x == 0) {
    const auto& given = list.slot(e.slot).given;
    made = math::update_numbers<Real>(
        kUpdate, given.rule, list.lr != nullptr ? list.lr[given.index] : given.rule.lr,
        list.std != nullptr ? list.std[given.index] : given.rule.std,
        e.device_step != nullptr ? static_cast<uint64_t>(*e.device_step) : e.step);
  }
  __syncthreads();
  return made;
}

template <class T>
struct Values {
  Group<T> param, grad, first, second;
};

// Pair j of what a group becomes, rounded to nearest or, with words for it, by chance.
template <class T>
__device__ __forceinline__ void round_values(const typename Group<T>::RealPair& p,
                                             const typename Group<T>::RealPair& m,
                                             const typename Group<T>::RealPair& v, bool by_chance,
                                             const math::Philox4x32<uint32_t>& words, int j,
                                             Values<T>& out) {
  if (sizeof(T) == 2 && by_chance) {
    const uint32_t a = math::bits_of(words.word[j], 0), b = math::bits_of(words.word[j], 1);
    round_pair_by_chance(p, a, b, out.param.pair[j]);
    round_pair_by_chance(m, math::bits_of_first(a), math::bits_of_first(b), out.first.pair[j]);
    round_pair_by_chance(v, math::bits_of_second(a), math::bits_of_second(b), out.second.pair[j]);
  } else {
    narrow_pair(p, out.param.pair[j]);
    narrow_pair(m, out.first.pair[j]);
    narrow_pair(v, out.second.pair[j]);
  }
}

// The same of one element.
template <class T, class Real>
__device__ __forceinline__ void round_value(Real x, bool by_chance, uint32_t bits, T& out) {
  if (sizeof(T) == 2 && by_chance) {
    round_by_chance(x, bits, out);
  } else {
    narrow(x, out);
  }
}

template <class T, Update kUpdate, int kBytes>
__global__ void __launch_bounds__(kNoiseThreads, update_blocks_per_sm(sizeof(T)))
    update_kernel(const __grid_constant__ UpdateList<typename Compute<T>::type, kBytes> list) {
  using Real = typename Compute<T>::type;
  constexpr int kSize = Group<T>::kSize;
  __shared__ Staged<T, float> staged;
  __shared__ double shared[2 * kNoiseThreads / kWarp];
  if (list.found_inf != nullptr && *list.found_inf != 0) return;
  const UpdateEntry& e = entry_of(list.entries(), list.count, blockIdx.x);
  const WarpChunk<T> warp(e, static_cast<int64_t>(blockIdx.x - e.first_chunk), list.chunk_steps);
  const math::UpdateNumbers<Real> n = numbers_of<kUpdate>(list, e);
  const bool scaled = list.grad_scale != nullptr, with_norms = list.partial != nullptr;
  const Real scale = scaled ? static_cast<Real>(*list.grad_scale) : 1;
  // SGD without momentum has no buffer.
  const bool first = math::has_first(kUpdate) && (kUpdate != Update::kSgd || e.first != nullptr);
  T *params = static_cast<T*>(e.param), *grads = static_cast<T*>(e.grad),
    *firsts = static_cast<T*>(e.first), *seconds = static_cast<T*>(e.second);
  const uint32_t step =
      list.noise_step != nullptr ? static_cast<uint32_t>(*list.noise_step) : list.step;
  MaybeNoise<T> noise = {{list.keys, e.stream, step, list.distribution}, n.std != 0};
  double norms[2] = {0, 0};  // gradient, noise
  const bool by_chance = sizeof(T) == 2 && n.stochastic_rounding;
  const BitsKey bits = {list.keys, math::kWordsForRounding, e.stream, step};
  // The number of element i of the run.
  const auto number = [&](int64_t i) { return 4 * e.counter + e.lead + static_cast<uint64_t>(i); };

  int64_t to_load = warp.lane_first(), at = to_load;
  for_steps<T, 1>(warp, noise, [&] {
    Values<T> x = {};
    x.param.load(params + to_load);
    x.grad.load(grads + to_load);
    if (first) x.first.load(firsts + to_load);
    if constexpr (math::has_second(kUpdate)) x.second.load(seconds + to_load);
    to_load += warp.kStride;
    return x;
  }, [&](Values<T>& x, const float (&eps)[kSize]) {
    Real sums[2] = {0, 0};
    math::Philox4x32<uint32_t> words = {};
    if (by_chance) words = bits.group(number(at));
    auto element = [&](float of_element, Real& grad, Real& param, Real& m, Real& v) {
      if (scaled) grad /= scale;
      auto shares =
          math::update_element<kUpdate>(n, static_cast<Real>(of_element), grad, param, m, v);
      sums[0] = math::fma(shares.gradient, shares.gradient, sums[0]);
      sums[1] = math::fma(shares.noise, shares.noise, sums[1]);
    };
#pragma unroll
    for (int j = 0; j < kSize / 2; ++j) {
      auto p = widen_pair(x.param.pair[j]), g = widen_pair(x.grad.pair[j]);
      auto m = widen_pair(x.first.pair[j]), v = widen_pair(x.second.pair[j]);
      element(eps[2 * j], g.x, p.x, m.x, v.x);
      element(eps[2 * j + 1], g.y, p.y, m.y, v.y);
      narrow_pair(g, x.grad.pair[j]);
      round_values(p, m, v, by_chance, words, j, x);
    }
    x.param.store(params + at);
    if (scaled) x.grad.store(grads + at);
    if (first) x.first.store(firsts + at);
    if constexpr (math::has_second(kUpdate)) x.second.store(seconds + at);
    at += warp.kStride;
    if (with_norms) {
      norms[0] += static_cast<double>(sums[0]);
      norms[1] += static_cast<double>(sums[1]);
    }
  }, [&](int64_t from, const float (&eps)[kSize]) {
    staged.each(from, e.numel, eps, [&](int64_t i, float eps_i) {
      Real p = widen(params[i]), g = widen(grads[i]), m = 0, v = 0;
      if (first) m = widen(firsts[i]);
      if constexpr (math::has_second(kUpdate)) v = widen(seconds[i]);
      if (scaled) {
        g /= scale;
        narrow(g, grads[i]);
      }
      auto shares = math::update_element<kUpdate>(n, static_cast<Real>(eps_i), g, p, m, v);
      const uint32_t r = by_chance ? bits.one(number(i)) : 0;
      round_value(p, by_chance, r, params[i]);
      if (first) round_value(m, by_chance, math::bits_of_first(r), firsts[i]);
      if constexpr (math::has_second(kUpdate))
        round_value(v, by_chance, math::bits_of_second(r), seconds[i]);
      norms[0] += static_cast<double>(shares.gradient * shares.gradient);
      norms[1] += static_cast<double>(shares.noise * shares.noise);
    });
  });
  if (!with_norms) return;
  reduce<Sum, kNoiseThreads>(norms, shared);
  if (threadIdx.x == 0) {
    list.partial[2 * int64_t{blockIdx.x}] = norms[0];
    list.partial[2 * int64_t{blockIdx.x} + 1] = norms[1];
  }
}

bool on_device(const UpdateParams& p) {
  if (p.device_lr != nullptr || p.device_std != nullptr) return true;
  return std::any_of(p.tensors, p.tensors + p.count,
                     [](const UpdateTensor& x) { return x.device_step != nullptr; });
}

uint32_t step_of(const UpdateTensor& x) {
  return static_cast<uint32_t>(std::min<int64_t>(x.step, UINT32_MAX));
}

// Assigns slots to the tensors from `begin` on, as many as fit `bytes`: the tensor that each slot is made of, and the
// slot of each tensor.
template <class Real>
struct Slots {
  std::vector<int64_t> owner;
  std::vector<uint32_t> of_tensor;

  Slots(const UpdateParams& p, int64_t begin, bool device, int bytes) {
    std::vector<int64_t> newest(static_cast<size_t>(p.rule_count), -1);  // slot of each rule
    for (int64_t t = begin; t < p.count && t - begin < kNoiseRuns; ++t) {
      const UpdateTensor& x = p.tensors[t];
      int64_t& slot = newest[static_cast<size_t>(x.rule)];
      bool known = slot >= 0 &&
                   (device || step_of(p.tensors[owner[static_cast<size_t>(slot)]]) == step_of(x));
      size_t slots = owner.size() + !known;
      if ((of_tensor.size() + 1) * sizeof(UpdateEntry) + slots * sizeof(Slot<Real>) >
          static_cast<size_t>(bytes)) {
        break;
      }
      if (!known) {
        slot = static_cast<int64_t>(owner.size());
        owner.push_back(t);
      }
      of_tensor.push_back(static_cast<uint32_t>(slot));
    }
  }
  int64_t tensors() const { return static_cast<int64_t>(of_tensor.size()); }
};

template <class T, Update kUpdate, int kBytes>
cudaError_t launch_list(const UpdateParams& p, int64_t begin,
                        const Slots<typename Compute<T>::type>& slots, bool device_makes,
                        const Device& device, cudaStream_t stream) {
  using Real = typename Compute<T>::type;
  UpdateList<Real, kBytes> list;
  static_assert(sizeof list <= (kBytes == kFewBytes ? 4096 : 32764));
  int64_t steps = 0;
  for (int64_t i = 0; i < slots.tensors(); ++i) {
    const UpdateTensor& x = p.tensors[begin + i];
    UpdateEntry& e = list.entries()[i];
    static_cast<Run&>(e) =
        run_of<T>(x.numel, x.offset, x.stream, x.index, {x.param, x.grad, x.first, x.second});
    e.param = x.param;
    e.grad = x.grad;
    e.first = x.first;
    e.second = x.second;
    e.device_step = x.device_step;
    e.step = step_of(x);
    e.slot = slots.of_tensor[static_cast<size_t>(i)];
    steps += steps_of<T>(e);
  }
  for (size_t s = 0; s < slots.owner.size(); ++s) {
    const UpdateTensor& x = p.tensors[slots.owner[s]];
    const math::UpdateRule& rule = p.rules[x.rule];
    Slot<Real>& slot = list.slot(static_cast<uint32_t>(s));
    if (device_makes) {
      slot.given = {rule, x.rule};
    } else {
      slot.numbers = math::update_numbers<Real>(kUpdate, rule, rule.lr, rule.std, step_of(x));
    }
  }
  list.keys = math::philox_keys(p.source.seed_low, p.source.seed_high);
  list.noise_step = p.source.device_step;
  list.lr = p.device_lr;
  list.std = p.device_std;
  list.grad_scale = p.grad_scale;
  list.found_inf = p.found_inf;
  list.partial = p.norms != nullptr ? p.workspace : nullptr;
  list.step = p.source.step;
  list.count = static_cast<int>(slots.tensors());
  NoisePlan plan = p.norms != nullptr ? plan_sums(steps)
                                      : plan_noise(steps, update_blocks_per_sm(sizeof(T)), device);
  list.chunk_steps = plan.steps;
  list.distribution = p.source.distribution;
  list.on_device = device_makes;
  int64_t chunks = assign_chunks<T>(list.entries(), list.count, list.chunk_steps);
  if (chunks == 0) return cudaSuccess;
  update_kernel<T, kUpdate, kBytes>
      <<<static_cast<unsigned>(chunks), kNoiseThreads, 0, stream>>>(list);
  if (p.norms == nullptr) return cudaGetLastError();
  return add_totals<2>(list.entries(), list.count, chunks, list.partial, p.norms, p.found_inf,
                       stream);
}

template <class T, Update kUpdate>
cudaError_t launch_update(const UpdateParams& p, cudaStream_t stream) {
  using Real = typename Compute<T>::type;
  Device device;
  cudaError_t error =
      device_of(reinterpret_cast<const void*>(&update_kernel<T, kUpdate, kFewBytes>), device);
  if (error == cudaSuccess && p.norms != nullptr)
    error = clear_totals<2>(p.norms, p.indices, stream);
  const bool device_makes = on_device(p);
  for (int64_t begin = 0; begin < p.count && error == cudaSuccess;) {
    const Slots<Real> few(p, begin, device_makes, kFewBytes);
    if (begin + few.tensors() == p.count)
      return launch_list<T, kUpdate, kFewBytes>(p, begin, few, device_makes, device, stream);
    const Slots<Real> many(p, begin, device_makes, kManyBytes);
    error = launch_list<T, kUpdate, kManyBytes>(p, begin, many, device_makes, device, stream);
    begin += many.tensors();
  }
  return error;
}

template <class T>
cudaError_t launch_dtype(const UpdateParams& p, cudaStream_t stream) {
  switch (p.update) {
    case Update::kSgd: return launch_update<T, Update::kSgd>(p, stream);
    case Update::kAdamW: return launch_update<T, Update::kAdamW>(p, stream);
    case Update::kSgld: return launch_update<T, Update::kSgld>(p, stream);
    case Update::kPsgld: return launch_update<T, Update::kPsgld>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t update(const UpdateParams& p, cudaStream_t stream) {
  return by_dtype(p.dtype,
                  [&](auto element) { return launch_dtype<decltype(element)>(p, stream); });
}

int64_t update_workspace(const UpdateParams& p) {
  return p.norms != nullptr ? partials(p.count, 2) : 0;
}

}  // namespace cuda
}  // namespace kdkernels
