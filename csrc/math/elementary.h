// Elementary functions in fp32, one source for the CPU loops and the CUDA kernels.
//
// Every function is straight-line code over IEEE operations and explicit fma, so gcc vectorises a plain
// loop over it and every compiler rounds it alike (build with -ffp-contract=off / --fmad=false).
// Largest errors against fp64 over every fp32 argument (tests/elementary_ulp.cpp):
//
//   exp 0.88 ulp    exp2_nonpositive 0.80 ulp    log 0.94 ulp
//   log1p 1.55 ulp  expm1_nonpositive 0.89 ulp   sinpi 0.97 ulp, cospi 0.88 ulp
//
// Method: argument reduction to a small interval (Cody and Waite, 1980), then a polynomial fitted to
// least maximal relative error with its coefficients rounded to fp32 one after the other.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define KD_FN static __host__ __device__ __forceinline__
#define KD_INLINE_LAMBDA
#define KD_UNROLL _Pragma("unroll")
#else
// Internal linkage: each ISA level's translation unit keeps its own copy, compiled for that level.
#define KD_FN static inline __attribute__((always_inline))
#define KD_INLINE_LAMBDA __attribute__((always_inline))
#define KD_UNROLL _Pragma("GCC unroll 16")
#endif

namespace kdkernels {
namespace math {

KD_FN float float_from_bits(int32_t bits) {
#if defined(__CUDA_ARCH__)
  return __int_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

KD_FN int32_t bits_from_float(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_int(x);
#else
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

// a * b + c with one rounding, on every machine.
KD_FN float fma(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#elif defined(KD_HAS_FMA) || defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  // No FMA instruction: a * b is exact in fp64; round the sum to odd there, so that the rounding to
  // fp32 that follows is the only one (Boldo and Melquiond, 2008).
  double product = static_cast<double>(a) * b, addend = c;
  double sum = product + addend;
  double bb = sum - product;
  double error = (product - (sum - bb)) + (addend - bb);
  int64_t bits;
  std::memcpy(&bits, &sum, sizeof bits);
  int64_t toward_error = ((error > 0) == (sum > 0)) ? 1 : -1;
  // error - error is 0 unless the sum overflowed or was not a number.
  bool inexact = error - error == 0 && error != 0 && (bits & 1) == 0;
  bits += inexact ? toward_error : 0;
  std::memcpy(&sum, &bits, sizeof sum);
  return static_cast<float>(sum);
#endif
}

KD_FN double fma(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
  return __fma_rn(a, b, c);
#else
  return __builtin_fma(a, b, c);
#endif
}

template <class Real>
KD_FN Real select(bool condition, Real a, Real b) {
  return condition ? a : b;
}

// b where either is NaN.
template <class Real>
KD_FN Real larger(Real a, Real b) {
  return a > b ? a : b;
}

// b where either is NaN.
template <class Real>
KD_FN Real smaller(Real a, Real b) {
  return a < b ? a : b;
}

// x within a bound; the bound where x is NaN.
template <class F>
KD_FN F at_least(F x, F bound) {
  return larger(x, bound);
}
template <class F>
KD_FN F at_most(F x, F bound) {
  return smaller(x, bound);
}
#if defined(__CUDA_ARCH__)
KD_FN float at_least(float x, float bound) { return ::fmaxf(x, bound); }
KD_FN float at_most(float x, float bound) { return ::fminf(x, bound); }
#endif

// 2^n, n in [-126, 127].
KD_FN float exp2_int(int32_t n) { return float_from_bits((n + 127) << 23); }

// 1.5 * 2^23: adding it rounds to an integer, which then stands in the low bits.
constexpr float kRoundToInt = 12582912.0f;
constexpr int32_t kRoundToIntBits = 0x4B400000;

// e^x for all x; subnormal results are rounded once.
KD_FN float exp(float x) {
  x = x < -104.0f ? -104.0f : x;  // comparisons let NaN through
  x = x > 89.0f ? 89.0f : x;
  // x = n ln 2 + r, |r| <= ln 2 / 2; r_high + r_low is r before rounding.
  float k = fma(x, 0x1.715476p+0f, kRoundToInt);
  int32_t n = bits_from_float(k) - kRoundToIntBits;
  k -= kRoundToInt;
  float r_high = fma(k, -0x1.62e43p-1f, x);  // exact
  float r_low = k * 0x1.05c61p-29f;
  float r = fma(k, 0x1.05c61p-29f, r_high);
  float q = 0x1.6a50aep-10f;
  q = fma(q, r, 0x1.123978p-7f);
  q = fma(q, r, 0x1.5558acp-5f);
  q = fma(q, r, 0x1.555492p-3f);
  q = fma(q, r, 0x1.fffffcp-2f);
  float p = 1.0f + (r_high + fma(r * r, q, r_low));
  int32_t half = n >> 1;  // n spans [-150, 128]: 2^n takes two factors
  return p * exp2_int(half) * exp2_int(n - half);
}

// 2^r, |r| <= 1/2. F: float, or a vector of them.
template <class F>
KD_FN F exp2_reduced(F r) {
  F p(0x1.416b50p-13f);
  p = fma(p, r, F(0x1.5f082ep-10f));
  p = fma(p, r, F(0x1.3b2de0p-7f));
  p = fma(p, r, F(0x1.c6af7cp-5f));
  p = fma(p, r, F(0x1.ebfbdcp-3f));
  p = fma(p, r, F(0x1.62e430p-1f));
  return fma(p, r, F(1.0f));
}

// 2^n for an integer n >= -126 that stands in the low bits of k; 0 for n = -127.
KD_FN float power_of_low_bits(float k) {
  uint32_t bits = (static_cast<uint32_t>(bits_from_float(k)) << 23) + 0x3F800000u;
  return float_from_bits(static_cast<int32_t>(bits));
}

// 2^u for u <= 0: u = (z - max) log2(e) / T costs no more to make than the natural exponent, and reduces to
// r = u - n exactly. Accurate down to -126, 0 below -126.5.
template <class F>
KD_FN F exp2_polynomial(F u) {
  u = larger(F(-127.0f), u);  // lets NaN through
  F k = u + F(kRoundToInt);  // n stands in its low bits
  return exp2_reduced(u - (k - F(kRoundToInt))) * power_of_low_bits(k);
}

// How exp2_shifted scales and shifts its arguments.
template <class F>
struct Shifted {
  F scale, shift;  // shift: an integer of magnitude < 2^21
  F lowest;  // whose exponent is -127
};

// 2^(scale z - shift) for an exponent of at most 127: one rounding beside the polynomial's, whatever z is. 0 where
// the exponent is below -126.5.
template <class F>
KD_FN F exp2_shifted(F z, const Shifted<F>& by) {
  z = larger(by.lowest, z);  // lets NaN through
  F to_int = F(kRoundToInt) - by.shift;  // exact
  F k = fma(z, by.scale, to_int);
  F r = fma(z, by.scale, -(k - to_int));
  return exp2_reduced(r) * power_of_low_bits(k);
}

// The softmax's exponential: exp2_polynomial, or on a GPU one special function with a relative error of
// 2^-22, of which an SM makes 16 a clock.
KD_FN float exp2_nonpositive(float u) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(u));
  return y;
#else
  return exp2_polynomial(u);
#endif
}
KD_FN double exp2_nonpositive(double u) {
#if defined(__CUDA_ARCH__)
  return ::exp2(u);
#else
  return __builtin_exp2(u);
#endif
}

// e^x - 1 for x <= 0. F: float, or a vector of them.
template <class F>
KD_FN F expm1_nonpositive(F x) {
  x = larger(F(-18.0f), x);  // lets NaN through
  const F k = fma(x, F(0x1.715476p+0f), F(kRoundToInt)), n = k - F(kRoundToInt);
  const F r = fma(n, F(0x1.05c61p-29f), fma(n, F(-0x1.62e43p-1f), x));
  F q(0x1.9e6ec6p-13f);
  q = fma(q, r, F(0x1.6d3a3ap-10f));
  q = fma(q, r, F(0x1.1112dap-7f));
  q = fma(q, r, F(0x1.5554f8p-5f));
  q = fma(q, r, F(0x1.555554p-3f));
  q = fma(q, r, F(0.5f));
  const F p = fma(r * r, q, r), power = power_of_low_bits(k);
  return fma(power, p, power - F(1.0f));
}

// Of (log(1 + f) - f + f^2 / 2) / f^3, |f| <= 1/3, the highest power first.
KD_FN constexpr float log_coefficient(int i) {
  constexpr float kCoefficient[] = {-0x1.07d88ap-3f, 0x1.1e6e2ap-3f,  -0x1.f3293ap-4f,
                                    0x1.1ed52ap-3f,  -0x1.559cc0p-3f, 0x1.99d052p-3f,
                                    -0x1.fffef8p-3f, 0x1.555506p-2f};
  return kCoefficient[i];
}

// log(1 + f), |f| <= 1/3, plus 2^-23 e ln 2: the exponent as it stands in a float's bits.
template <class F>
KD_FN F log_reduced(F f, F e) {
  F p(log_coefficient(0));
  KD_UNROLL
  for (int i = 1; i < 8; ++i) p = fma(p, f, F(log_coefficient(i)));
  F s = f * f;
  F r = fma(s, fma(f, p, F(-0.5f)), f);
  return fma(e, F(0x1.62e43p-24f), r);
}

constexpr int32_t kTwoThirdsBits = 0x3F2AAAAB;

// x = m 2^(2^-23 e) for positive, normal, finite x; m in [2/3, 4/3).
template <class F>
struct Mantissa {
  F m, e;
};
KD_FN Mantissa<float> split(float x) {
  int32_t bits = bits_from_float(x);
  int32_t e = (bits - kTwoThirdsBits) & static_cast<int32_t>(0xFF800000);
  return {float_from_bits(bits - e), static_cast<float>(e)};
}

// log x for positive, normal, finite x. F: float, or a vector of them.
template <class F>
KD_FN F log_normal(F x) {
  Mantissa<F> b = split(x);
  return log_reduced(b.m - F(1.0f), b.e);
}

// log x; -inf at 0, NaN below. F: float, or a vector of them.
template <class F>
KD_FN F log(F x) {
  const auto subnormal = x < F(0x1p-126f);
  const Mantissa<F> b = split(select(subnormal, x * F(0x1p23f), x));
  F y = log_reduced(b.m - F(1.0f), b.e - select(subnormal, F(0x17p23f), F(0.0f)));
  y = select(F(0.0f) < x, y, select(x == F(0.0f), F(-__builtin_inff()), F(__builtin_nanf(""))));
  return select(x < F(__builtin_inff()), y, x);  // inf and NaN are their own
}

// log(1 + x); -inf at -1, NaN below.
KD_FN float log1p(float x) {
  float u = x + 1.0f;
  int32_t e = (bits_from_float(u) - kTwoThirdsBits) & static_cast<int32_t>(0xFF800000);
  // 2^-k (1 + x) - 1, with x itself rather than the rounded 1 + x; k up to 128 takes two factors.
  int32_t k = e >> 23, half = k >> 1;
  float s = exp2_int(-half), s2 = exp2_int(half - k);
  float f = fma(x * s, s2, s * s2 - 1.0f);
  float y = log_reduced(f, static_cast<float>(e));
  y = x > -1.0f ? y : (x == -1.0f ? -__builtin_inff() : __builtin_nanf(""));
  y = x == 0.0f ? x : y;  // keeps -0
  return x < __builtin_inff() ? y : x;
}

struct SinCos {
  float sin, cos;
};

// sin(pi r) and cos(pi r), |r| <= 1/4.
KD_FN SinCos sincospi_quarter(float r) {
  float u = r * r;
  float a = fma(-0x1.2db5a6p-1f, u, 0x1.465facp+1f);
  a = fma(a, u, -0x1.4abbbep+2f);
  float s = fma(r, 0x1.921fb6p+1f, fma(u * r, a, r * -0x1.777a5cp-24f));  // pi in two parts
  float c = fma(0x1.d4f7eep-3f, u, -0x1.55b2b6p+0f);
  c = fma(c, u, 0x1.03c1b0p+2f);
  c = fma(c, u, -0x1.3bd3ccp+2f);
  c = fma(c, u, 1.0f);
  return {s, c};
}

// sin(pi x) and cos(pi x) from k = round(2 x), |x| < 2^24.
KD_FN SinCos sincospi_reduced(float x, int32_t k) {
  SinCos y = sincospi_quarter(fma(static_cast<float>(k), -0.5f, x));  // exact, in [-1/4, 1/4]
  float s = y.sin, c = y.cos;
  bool swap = (k & 1) != 0;
  float sine = swap ? c : s, cosine = swap ? s : c;
  // The sign bits: bit 1 of k for the sine, of k + 1 for the cosine.
  y.sin = float_from_bits(bits_from_float(sine) ^ ((k & 2) << 30));
  y.cos = float_from_bits(bits_from_float(cosine) ^ (((k + 1) & 2) << 30));
  return y;
}

// sin(pi x) and cos(pi x). Period 2; exact zeros and ones at the multiples of 1/2.
KD_FN SinCos sincospi(float x) {
  // From 2^24 on every float is an even integer; x - x keeps inf and NaN as NaN.
  float magnitude = x < 0.0f ? -x : x;
  x = magnitude < 0x1p24f ? x : x - x;
  float twice = x + x;
  float half = magnitude < 0x1p22f ? 0.5f : 0.0f;  // from there on 2x is an integer
  return sincospi_reduced(x, static_cast<int32_t>(twice + (twice < 0.0f ? -half : half)));
}

KD_FN float sqrt(float x) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(x);
#else
  return __builtin_sqrtf(x);
#endif
}
KD_FN double sqrt(double x) {
#if defined(__CUDA_ARCH__)
  return __dsqrt_rn(x);
#else
  return __builtin_sqrt(x);
#endif
}

}  // namespace math
}  // namespace kdkernels
