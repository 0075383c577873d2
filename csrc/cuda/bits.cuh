// 16 random bits per element: the words that have them, and stochastic rounding by them.
#pragma once

#include "cuda/device.cuh"
#include "math/rounding.h"

namespace kdkernels {
namespace cuda {
namespace {

constexpr int kBitsPerCounter = math::kBitsPerCounter;

// Where a tensor's bits come from, but for the element.
struct BitsKey {
  const math::PhiloxKeys& keys;
  uint32_t purpose, stream, step;

  // The words of elements 8 * counter to 8 * counter + 7.
  __device__ __forceinline__ math::Philox4x32<uint32_t> words(uint64_t counter) const {
    const math::PhiloxShared shared =
        math::philox_shared(static_cast<uint32_t>(counter >> 32) | purpose, stream, step, keys);
    return math::philox4x32_10(static_cast<uint32_t>(counter), shared, keys);
  }
  // The words of 8 elements from `index` on, a multiple of 4: of one counter, or the halves of two.
  __device__ __forceinline__ math::Philox4x32<uint32_t> group(uint64_t index) const {
    math::Philox4x32<uint32_t> r = words(index / kBitsPerCounter);
    if (index % kBitsPerCounter != 0) {  // the same in all threads
      const math::Philox4x32<uint32_t> next = words(index / kBitsPerCounter + 1);
      r = {{r.word[2], r.word[3], next.word[0], next.word[1]}};
    }
    return r;
  }
  __device__ __forceinline__ uint32_t one(uint64_t index) const {
    const int place = static_cast<int>(index % kBitsPerCounter);
    const math::Philox4x32<uint32_t> r = words(index / kBitsPerCounter);
    const uint32_t low = place < 4 ? r.word[0] : r.word[2],
                   high = place < 4 ? r.word[1] : r.word[3];
    return math::bits_of(place % 4 < 2 ? low : high, place);
  }
};

__device__ __forceinline__ void round_by_chance(float x, uint32_t bits, __nv_bfloat16& out) {
  out = __ushort_as_bfloat16(static_cast<unsigned short>(
      math::round_stochastically<math::RoundedDtype::kBFloat16>(x, bits)));
}
__device__ __forceinline__ void round_by_chance(float x, uint32_t bits, __half& out) {
  out = __ushort_as_half(static_cast<unsigned short>(
      math::round_stochastically<math::RoundedDtype::kFloat16>(x, bits)));
}
// fp32 and fp64 keep what they get.
template <class Real>
__device__ __forceinline__ void round_by_chance(Real x, uint32_t, Real& out) {
  out = x;
}

// Two neighbours, of whose bits the first has the lower 16 of the word.
template <class RealPair, class Pair>
__device__ __forceinline__ void round_pair_by_chance(RealPair x, uint32_t bits, uint32_t next_bits,
                                                     Pair& out) {
  round_by_chance(x.x, bits, out.x);
  round_by_chance(x.y, next_bits, out.y);
}

}  // namespace
}  // namespace cuda
}  // namespace kdkernels
