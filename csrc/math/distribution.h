// Random numbers of mean 0 and variance 1 from Philox words: the normal, and four others.
//
//   normal            Box-Muller of two words, math/normal.h                    |x| <= 6.77
//   uniform           on [-sqrt(3), sqrt(3)]                                     1.2 ulp
//   rademacher        -1 or 1                                                    0.0 ulp
//   truncated normal  a normal cut off at two standard deviations, over the      3.9 ulp
//                     0.8796 that this leaves of its standard deviation          |x| <= 2.28
//   laplace           of scale 1 / sqrt(2), |x| <= 15.7                          1.6 ulp
//
// The errors are the largest against fp64, in ulp of max(|x|, 1) (tests/test_distributions.py).
// All but the normal take one word a number, so that element i has word i % 4 of counter i / 4.
#pragma once

#include "math/normal.h"

namespace kdkernels {
namespace math {

enum class Distribution { kNormal, kUniform, kRademacher, kTruncatedNormal, kLaplace };

// The odd integers from -2^31 + 1 to 2^31 - 1, two words each, over 2^31: exactly symmetric, never 0.
KD_FN float symmetric_uniform(uint32_t r) {
  return static_cast<float>(static_cast<int32_t>(r | 1)) * 0x1p-31f;
}

KD_FN float uniform(uint32_t r) {
  return static_cast<float>(static_cast<int32_t>(r | 1)) * 0x1.bb67aep-31f;
}

KD_FN float with_sign_of(uint32_t r, float magnitude) {
  uint32_t bits = static_cast<uint32_t>(bits_from_float(magnitude)) & 0x7FFFFFFFu;
  return float_from_bits(static_cast<int32_t>(bits | (r & 0x80000000u)));
}

KD_FN float rademacher(uint32_t r) { return with_sign_of(r, 1.0f); }

// By inversion: sqrt(2) erfinv(p) over the standard deviation that is left, with p = erf(sqrt(2)) q. Like Giles
// ("Approximating the erfinv function", 2011) it is a polynomial in w = -log(1 - p^2), here with coefficients of
// its own for w <= 2.42, fitted to a relative error of 2e-8 and rounded one after the other.
KD_FN float truncated_normal(uint32_t r) {
  float q = symmetric_uniform(r);
  float w = -log_normal(fma(-0x1.d277bcp-1f * q, q, 1.0f));
  float y = -0x1.d42d44p-18f;
  y = fma(y, w, 0x1.9e1616p-14f);
  y = fma(y, w, -0x1.eb31eap-13f);
  y = fma(y, w, -0x1.d225dap-9f);
  y = fma(y, w, 0x1.223c30p-6f);
  y = fma(y, w, 0x1.6c97b0p-2f);
  y = fma(y, w, 0x1.5c28bep+0f);
  return q * y;
}

KD_FN float laplace(uint32_t r) {
  float u = fma(static_cast<float>(static_cast<int32_t>(r & 0x7FFFFFFFu)), 0x1p-31f, 0x1p-32f);
  return with_sign_of(r, -0x1.6a09e6p-1f * log_normal(u));
}

// The numbers of two neighbouring elements from their words.
template <Distribution kDistribution>
KD_FN NoisePair noise_pair(uint32_t r_a, uint32_t r_b) {
  if constexpr (kDistribution == Distribution::kNormal) {
    return box_muller(r_a, r_b);
  } else if constexpr (kDistribution == Distribution::kUniform) {
    return {uniform(r_a), uniform(r_b)};
  } else if constexpr (kDistribution == Distribution::kRademacher) {
    return {rademacher(r_a), rademacher(r_b)};
  } else if constexpr (kDistribution == Distribution::kTruncatedNormal) {
    return {truncated_normal(r_a), truncated_normal(r_b)};
  } else {
    return {laplace(r_a), laplace(r_b)};
  }
}

enum class NoiseMode {
  kOnly,  // std * eps
  kAdd,  // in + std * eps
  kScale,  // in * (1 + std * eps), as fma(std * eps, in, in)
  kTimes,  // in * (std * eps)
};

// What becomes of `in`, which kOnly does not use.
template <NoiseMode kMode, class Real>
KD_FN Real apply_noise(Real std, Real eps, Real in) {
  if constexpr (kMode == NoiseMode::kOnly) {
    return std * eps;
  } else if constexpr (kMode == NoiseMode::kAdd) {
    return fma(std, eps, in);
  } else if constexpr (kMode == NoiseMode::kScale) {
    return fma(std * eps, in, in);
  } else {
    return in * (std * eps);
  }
}

}  // namespace math
}  // namespace kdkernels
