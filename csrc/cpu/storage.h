// Conversion of elements between memory of any dtype and the fp32 or fp64 that they are computed in.
#pragma once

#include <cstdint>
#include <cstring>

#include "math/rounding.h"
#include "params.h"

namespace kdkernels {
namespace cpu {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Calls f(element) with an element of the dtype.
template <class F>
auto by_dtype(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::kFloat64: return f(double{});
    case Dtype::kBFloat16: return f(BFloat16{});
    case Dtype::kFloat16: return f(Float16{});
    default: return f(float{});
  }
}

KD_FN float widen(float x) { return x; }
KD_FN double widen(double x) { return x; }
KD_FN float widen(BFloat16 x) {
  return math::float_from_bits(static_cast<int32_t>(static_cast<uint32_t>(x.bits) << 16));
}
KD_FN float widen(Float16 x) {
  int32_t magnitude = x.bits & 0x7FFF,
          sign = static_cast<int32_t>(static_cast<uint32_t>(x.bits & 0x8000) << 16);
  // Rebase the exponent by 112, of inf and NaN by as much again; subnormals are small integers. No step makes an
  // fp32 subnormal, which x86 handles by a slow trap into microcode.
  int32_t normal = (magnitude << 13) + 0x38000000 + (magnitude >= 0x7C00 ? 0x38000000 : 0);
  int32_t subnormal = math::bits_from_float(static_cast<float>(magnitude) * 0x1p-24f);
  return math::float_from_bits((magnitude < 0x400 ? subnormal : normal) | sign);
}

// Round to nearest, ties to even; NaN stays NaN.
KD_FN void narrow(float x, float& out) { out = x; }
KD_FN void narrow(double x, double& out) { out = x; }
KD_FN void narrow(float x, BFloat16& out) {
  uint32_t bits = static_cast<uint32_t>(math::bits_from_float(x));
  uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  out.bits = static_cast<uint16_t>(x == x ? rounded : 0x7FC0u);
}
KD_FN void narrow(float x, Float16& out) {
  uint32_t bits = static_cast<uint32_t>(math::bits_from_float(x));
  uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  // Normal results: round the 13 low bits away and rebase the exponent.
  uint32_t normal = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal results: adding 1/2 lets the fp32 adder round at 2^-24.
  float shifted = math::float_from_bits(static_cast<int32_t>(magnitude)) + 0.5f;
  uint32_t subnormal = static_cast<uint32_t>(math::bits_from_float(shifted)) - 0x3F000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477FF000u ? 0x7C00u : half;  // 65520 and above round to inf
  half = magnitude > 0x7F800000u ? 0x7E00u : half;
  out.bits = static_cast<uint16_t>(half | sign);
}

// By chance, with 16 random bits; fp32 and fp64 keep what they get.
KD_FN void round_by_chance(float x, uint32_t, float& out) { out = x; }
KD_FN void round_by_chance(double x, uint32_t, double& out) { out = x; }
KD_FN void round_by_chance(float x, uint32_t bits, BFloat16& out) {
  out.bits =
      static_cast<uint16_t>(math::round_stochastically<math::RoundedDtype::kBFloat16>(x, bits));
}
KD_FN void round_by_chance(float x, uint32_t bits, Float16& out) {
  out.bits =
      static_cast<uint16_t>(math::round_stochastically<math::RoundedDtype::kFloat16>(x, bits));
}

// Returns in[0, n) as computed values, followed by copies of `pad` up to `padded`. Full blocks of fp32 and fp64 are not
// copied; others are converted into `scratch`.
template <class T, class Real = typename Compute<T>::type>
KD_FN const Real* load_block(const T* in, int n, int padded, Real pad, Real* scratch) {
  if constexpr (sizeof(T) == sizeof(Real)) {
    if (n == padded) return in;
  }
  for (int i = 0; i < n; ++i) scratch[i] = widen(in[i]);
  for (int i = n; i < padded; ++i) scratch[i] = pad;
  return scratch;
}

}  // namespace
}  // namespace cpu
}  // namespace kdkernels
