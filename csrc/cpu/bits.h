// Stochastic rounding and dropout, which take 16 random bits per element. Included by one file per ISA level.
#pragma once

#include "cpu/numbers.h"

namespace kdkernels {
namespace cpu {
namespace {

// Calls use(first element, count, their bits) for each block of elements [begin, end). `in`, of `bytes` an element, is
// fetched ahead.
template <class Use>
KD_FN void for_bits(const ElementBits& p, uint32_t purpose, int64_t begin, int64_t end,
                    const void* in, int bytes, Use use) {
  constexpr int kBits = math::kBitsPerCounter * kCounters;
  const NoiseStream stream = noise_stream(p.source, p.stream);
  alignas(64) uint16_t bits[kBits];
  while (begin < end) {
    const int64_t row = begin / p.run, first = row * p.run;
    const int64_t last = end < first + p.run ? end : first + p.run;
    const uint64_t offset = p.offset + static_cast<uint64_t>(row * p.stride);
    for_blocks<math::kBitsPerCounter>(offset, begin - first, last - first, kBits,
                                      [&](int64_t i, int n, uint64_t counter, int skip)
                                          KD_INLINE_LAMBDA {
      Fetch fetch = {{static_cast<const char*>(in) + (first + i) * bytes}, 1, 8 * bytes};
      bits_block(stream, purpose, counter, (n + skip + 7) / 8, fetch, bits);
      use(first + i, n, bits + skip);
    });
    begin = last;
  }
}

void stochastic_round(const RoundParams& p, int64_t begin, int64_t end) {
  math::with_rounded_dtype(p.dtype, [&](auto dtype) {
    constexpr math::RoundedDtype kDtype = decltype(dtype)::value;
    using Out = math::Rounded<kDtype>;
    for_bits(p.bits, math::kWordsForRounding, begin, end, p.in, sizeof(float),
             [&](int64_t i, int n, const uint16_t* bits) KD_INLINE_LAMBDA {
      const float* in = p.in + i;
      Out* out = static_cast<Out*>(p.out) + i;
#pragma omp simd
      for (int j = 0; j < n; ++j)
        out[j] = static_cast<Out>(math::round_stochastically<kDtype>(in[j], bits[j]));
    });
  });
}

template <class T>
void dropout_of(const DropoutParams& p, int64_t begin, int64_t end) {
  using Real = typename Compute<T>::type;
  const Real scale = static_cast<Real>(p.scale);
  for_bits(p.bits, math::kWordsForDropout, begin, end, p.in, sizeof(T),
           [&](int64_t i, int n, const uint16_t* bits) KD_INLINE_LAMBDA {
    const T* in = static_cast<const T*>(p.in) + i;
    T* out = static_cast<T*>(p.out) + i;
#pragma omp simd
    for (int j = 0; j < n; ++j) {
      const Real x = widen(in[j]);
      narrow(bits[j] < p.dropped ? Real{0} : x * scale, out[j]);
    }
  });
}

void dropout(const DropoutParams& p, int64_t begin, int64_t end) {
  return by_dtype(p.dtype,
                  [&](auto element) { return dropout_of<decltype(element)>(p, begin, end); });
}

}  // namespace
}  // namespace cpu
}  // namespace kdkernels
