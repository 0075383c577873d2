// Stochastic rounding of fp32 to formats of 16 and 8 bits: up with the probability of what is cut off, so that the
// mean of the result is the value itself (Gupta et al., "Deep learning with limited numerical precision", 2015).
//
// The probability is that share, rounded to a multiple of 2^-16; for bf16 and normal fp16 it is such a multiple. What
// the format can hold stays as it is, infinities and NaN stay, and a finite number stays finite: beyond the largest
// number of the format it becomes that one. e4m3 has no infinity, of which NaN is made.
#pragma once

#include <type_traits>

#include "math/philox.h"

namespace kdkernels {
namespace math {

// What words are for: the upper bits of a counter's high word. Numbers of mean 0 have none of them set, since the index
// of an element is below 2^63.
constexpr uint32_t kWordsForRounding = 0x80000000u, kWordsForDropout = 0x40000000u;
// Of those, element i has 16 bits: half i % 2 of word i % 8 / 2 of counter i / 8.
constexpr int kBitsPerCounter = 8;

KD_FN uint32_t bits_of(uint32_t word, int element) {
  return element % 2 == 0 ? word & 0xFFFFu : word >> 16;
}

// What is rounded besides an element has these multiples of its bits, modulo 2^16. As odd factors they are uniform as
// well; of all such pairs these make the three nearly independent: their shortest linear relation has length 276.
KD_FN uint32_t bits_of_first(uint32_t bits) { return bits * 34009u & 0xFFFFu; }
KD_FN uint32_t bits_of_second(uint32_t bits) { return bits * 55081u & 0xFFFFu; }

enum class RoundedDtype { kBFloat16, kFloat16, kFloat8E4M3, kFloat8E5M2 };

// A format of fewer bits than fp32. The numbers are magnitudes, without sign.
struct Format {
  int bits, mantissa, bias;
  uint32_t largest, infinity, nan;
};
KD_FN constexpr Format format_of(RoundedDtype dtype) {
  switch (dtype) {
    case RoundedDtype::kBFloat16: return {16, 7, 127, 0x7F7F, 0x7F80, 0x7FC0};
    case RoundedDtype::kFloat16: return {16, 10, 15, 0x7BFF, 0x7C00, 0x7E00};
    case RoundedDtype::kFloat8E4M3: return {8, 3, 7, 0x7E, 0x7F, 0x7F};
    default: return {8, 2, 15, 0x7B, 0x7C, 0x7F};
  }
}

template <RoundedDtype kDtype>
using Rounded = std::conditional_t<format_of(kDtype).bits == 16, uint16_t, uint8_t>;

// f(dtype) with a dtype that the compiler knows.
template <class F>
auto with_rounded_dtype(RoundedDtype dtype, F f) {
  using D = RoundedDtype;
  switch (dtype) {
    case D::kBFloat16: return f(std::integral_constant<D, D::kBFloat16>());
    case D::kFloat16: return f(std::integral_constant<D, D::kFloat16>());
    case D::kFloat8E4M3: return f(std::integral_constant<D, D::kFloat8E4M3>());
    default: return f(std::integral_constant<D, D::kFloat8E5M2>());
  }
}

// r: 16 random bits.
template <RoundedDtype kDtype>
KD_FN uint32_t round_stochastically(float x, uint32_t r) {
  constexpr Format kFormat = format_of(kDtype);
  const uint32_t bits = static_cast<uint32_t>(bits_from_float(x)), magnitude = bits & 0x7FFFFFFFu;
  constexpr int kCut = 23 - kFormat.mantissa;
  // The bits that are cut off, plus the random ones, carry into what is left. Those beyond 16 are rounded away first.
  uint32_t added;
  if constexpr (kCut <= 16) {
    added = r >> (16 - kCut);
  } else {
    added = (2 * r + 1) << (kCut - 17);
  }
  uint32_t out = ((magnitude + added) >> kCut) -
                 (static_cast<uint32_t>(127 - kFormat.bias) << kFormat.mantissa);
  if constexpr (kFormat.bias != 127) {
    // Below the least normal number the format has multiples of one number. In fixed point, with 17 bits behind it:
    constexpr uint32_t kNormal = static_cast<uint32_t>(128 - kFormat.bias) << 23;
    constexpr int kScale = kFormat.bias - 1 + kFormat.mantissa + 17;
    const bool subnormal = magnitude < kNormal;
    const float small = float_from_bits(static_cast<int32_t>(subnormal ? magnitude : 0));
    const uint32_t fixed = static_cast<uint32_t>(static_cast<int32_t>(small * exp2_int(kScale)));
    out = subnormal ? (fixed + 2 * r + 1) >> 17 : out;
  }
  out = out < kFormat.largest ? out : kFormat.largest;
  const uint32_t not_finite = magnitude > 0x7F800000u ? kFormat.nan : kFormat.infinity;
  out = magnitude >= 0x7F800000u ? not_finite : out;
  return out | (bits >> 31) << (kFormat.bits - 1);
}

}  // namespace math
}  // namespace kdkernels
