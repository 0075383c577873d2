// Stochastic rounding and dropout, which take 16 random bits per element and nothing from its neighbours.
//
// A thread has the eight elements of one Philox counter, 80 issue slots or 10 an element; to round one takes 9 more. An
// element of fp32 and its 16 bits are 6 bytes, in which time an H100's SM has 53 slots, and dropout's of bf16, 4 bytes,
// 35: memory binds.
#include "cuda/bits.cuh"
#include "cuda/kernels.h"

namespace kdkernels {
namespace cuda {
namespace {

constexpr int kBitsThreads = 256;

// ElementBits as a kernel takes them.
struct BitsArguments {
  math::PhiloxKeys keys;
  const int64_t* device_step;
  int64_t rows, run, stride, groups;  // counters that a row touches, at most
  uint64_t offset;
  uint32_t stream, step, purpose;

  __device__ BitsKey key() const {
    return {keys, purpose, stream,
            device_step != nullptr ? static_cast<uint32_t>(*device_step) : step};
  }
};

BitsArguments arguments_of(const ElementBits& bits, uint32_t purpose) {
  const NoiseSource& source = bits.source;
  BitsArguments a = {};
  a.keys = math::philox_keys(source.seed_low, source.seed_high);
  a.device_step = source.device_step;
  a.rows = bits.rows;
  a.run = bits.run;
  a.stride = bits.stride;
  a.groups = (bits.run + kBitsPerCounter - 2) / kBitsPerCounter + 1;
  a.offset = bits.offset;
  a.stream = bits.stream;
  a.step = source.step;
  a.purpose = purpose;
  return a;
}

template <class T>
__device__ __forceinline__ bool is_aligned(const T* at) {
  constexpr unsigned kBytes = sizeof(T) * kBitsPerCounter;
  return reinterpret_cast<uintptr_t>(at) % (kBytes < 16 ? kBytes : 16) == 0;
}

// Eight elements in accesses of at most 16 bytes.
template <class T>
struct Eight {
  static constexpr int kAccess = sizeof(T) >= 2 ? 16 / sizeof(T) : kBitsPerCounter;
  Vector<T, kAccess> part[kBitsPerCounter / kAccess];
  __device__ __forceinline__ T& operator[](int j) { return part[j / kAccess].value[j % kAccess]; }
  __device__ __forceinline__ void load(const T* from) {
#pragma unroll
    for (int k = 0; k < kBitsPerCounter / kAccess; ++k)
      part[k] = reinterpret_cast<const Vector<T, kAccess>*>(from)[k];
  }
  __device__ __forceinline__ void store(T* to) const {
#pragma unroll
    for (int k = 0; k < kBitsPerCounter / kAccess; ++k) {
      if constexpr (sizeof part[k] == 16) {  // as one store
        uint4 bits;
        memcpy(&bits, &part[k], sizeof bits);
        __stwb(reinterpret_cast<uint4*>(to) + k, bits);
      } else {
        reinterpret_cast<Vector<T, kAccess>*>(to)[k] = part[k];
      }
    }
  }
};

// out[i] = use(in[i], bits of i).
template <class In, class Out, class Use>
__device__ __forceinline__ void for_eight(const BitsArguments& p, const In* in, Out* out, Use use) {
  const int64_t thread = int64_t{blockIdx.x} * kBitsThreads + static_cast<int>(threadIdx.x);
  const int64_t row = thread / p.groups, group = thread % p.groups;
  if (row >= p.rows) return;
  const uint64_t first = p.offset + static_cast<uint64_t>(row * p.stride);  // of the row
  const uint64_t counter = first / kBitsPerCounter + static_cast<uint64_t>(group);
  // The group's first element within the row, negative where the row begins inside.
  const int64_t begin = group * kBitsPerCounter - static_cast<int64_t>(first % kBitsPerCounter);
  if (begin >= p.run) return;
  const math::Philox4x32<uint32_t> words = p.key().words(counter);
  in += row * p.run + begin;
  out += row * p.run + begin;
  if (begin >= 0 && begin + kBitsPerCounter <= p.run && is_aligned(in) && is_aligned(out)) {
    Eight<In> x;
    Eight<Out> y;
    x.load(in);
#pragma unroll
    for (int j = 0; j < kBitsPerCounter; ++j) y[j] = use(x[j], math::bits_of(words.word[j / 2], j));
    y.store(out);
    return;
  }
#pragma unroll
  for (int j = 0; j < kBitsPerCounter; ++j) {
    if (begin + j >= 0 && begin + j < p.run)
      out[j] = use(in[j], math::bits_of(words.word[j / 2], j));
  }
}

// Calls launch(blocks) with as many as the bits need.
template <class Launch>
cudaError_t launch_bits(const BitsArguments& a, Launch launch) {
  const int64_t threads = a.rows * a.groups;
  if (threads == 0) return cudaSuccess;
  launch(static_cast<unsigned>((threads + kBitsThreads - 1) / kBitsThreads));
  return cudaGetLastError();
}

template <math::RoundedDtype kDtype>
__global__ void __launch_bounds__(kBitsThreads)
    round_kernel(const __grid_constant__ BitsArguments p, const float* in,
                 math::Rounded<kDtype>* out) {
  for_eight(p, in, out, [](float x, uint32_t bits) {
    return static_cast<math::Rounded<kDtype>>(math::round_stochastically<kDtype>(x, bits));
  });
}

template <class T>
__global__ void __launch_bounds__(kBitsThreads)
    dropout_kernel(const __grid_constant__ BitsArguments p, const T* in, T* out, uint32_t dropped,
                   typename Compute<T>::type scale) {
  using Real = typename Compute<T>::type;
  for_eight(p, in, out, [&](T x, uint32_t bits) {
    T y;
    narrow(bits < dropped ? Real{0} : static_cast<Real>(widen(x)) * scale, y);
    return y;
  });
}

template <class T>
cudaError_t launch_dropout(const DropoutParams& p, cudaStream_t stream) {
  const BitsArguments a = arguments_of(p.bits, math::kWordsForDropout);
  return launch_bits(a, [&](unsigned blocks) {
    dropout_kernel<<<blocks, kBitsThreads, 0, stream>>>(
        a, static_cast<const T*>(p.in), static_cast<T*>(p.out), p.dropped,
        static_cast<typename Compute<T>::type>(p.scale));
  });
}

}  // namespace

cudaError_t dropout(const DropoutParams& p, cudaStream_t stream) {
  return by_dtype(p.dtype,
                  [&](auto element) { return launch_dropout<decltype(element)>(p, stream); });
}

cudaError_t stochastic_round(const RoundParams& p, cudaStream_t stream) {
  const BitsArguments a = arguments_of(p.bits, math::kWordsForRounding);
  return launch_bits(a, [&](unsigned blocks) {
    math::with_rounded_dtype(p.dtype, [&](auto dtype) {
      constexpr math::RoundedDtype kDtype = decltype(dtype)::value;
      round_kernel<kDtype><<<blocks, kBitsThreads, 0, stream>>>(
          a, p.in, static_cast<math::Rounded<kDtype>*>(p.out));
    });
  });
}

}  // namespace cuda
}  // namespace kdkernels
