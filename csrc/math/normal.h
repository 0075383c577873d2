// Standard normal numbers from Philox words by the transform of Box and Muller (1958).
//
// Two 32-bit words give two normals. u = (r_a + 1/2) 2^-32 lies in (0, 1], so |normal| <= 6.77.
#pragma once

#include "math/philox.h"

namespace kdkernels {
namespace math {

// Which numbers: everything but the element index, which fills the counter's low 64 bits (index / 4).
struct NoiseKey {
  uint32_t seed_low, seed_high;
  uint32_t stream, step;
};

struct NoisePair {
  float first, second;
};

// The square root of x, -0 or in [2^-23, 46], from a reciprocal root of machine accuracy, operation for operation
// what nvcc makes of an IEEE root of finite numbers from 2^-101 on. So it is rounded correctly on every GPU on
// which that one is. The documented error of the reciprocal root, 2^-22.9, would leave a doubt for the radicands
// 0x1.dd26e4p+k with odd k and 0x1.f82294p+k with even k, and for no others.
template <class ReciprocalRoot>
KD_FN float root_by_reciprocal(float x, ReciprocalRoot reciprocal_root) {
  float y = reciprocal_root(x);
  float root = x * y;
  return fma(fma(-root, root, x), 0.5f * y, root);
}

// sqrt(-2 log u) of u = (r_a + 1/2) 2^-32.
template <class Root>
KD_FN float normal_radius(uint32_t r_a, Root root) {
  float twice_u = fma(static_cast<float>(r_a), 0x1p-31f, 0x1p-32f);
  int32_t bits = bits_from_float(twice_u);
  int32_t e = (bits - (kTwoThirdsBits + 0x00800000)) & static_cast<int32_t>(0xFF800000);
  float f = float_from_bits(bits - e) - 2.0f;  // twice that of log_normal
  float p = log_coefficient(0) * 0x1p-9f;
  KD_UNROLL
  for (int i = 1; i < 8; ++i) p = fma(p, f, log_coefficient(i) * exp2_int(i - 9));
  float r = fma(f * f, fma(f, p, -0.25f), f);
  float negative = fma(static_cast<float>(e), 0x1.62e43p-23f, r);  // 2 log u
  return root(-negative);
}

// The two numbers in 46 instructions of a GPU where a logarithm, a root and sincospi take 65: values carry powers
// of two that spare multiplications, the exponent is converted where it stands, and the sign of the quadrant goes
// on the radius. tests/box_muller.cpp compares it with those over every fp32 that a Philox word becomes: no bit
// differs, with an IEEE root nor with root_by_reciprocal.
template <class Root>
KD_FN NoisePair box_muller_with(uint32_t r_a, uint32_t r_b, Root root) {
  float radius = normal_radius(r_a, root);
  // Half of round(2 x): its bits end in those of the integer.
  float word = static_cast<float>(r_b);
  float rounded = fma(word, 0x1p-31f, 0.5f * kRoundToInt);
  int32_t k = bits_from_float(rounded);
  SinCos angle = sincospi_quarter(fma(word, 0x1p-31f, 0.5f * kRoundToInt - rounded));
  // Bit 1 of k is the sign of both, bit 0 their exchange: 0, 2, -0 and -2 as a float.
  int32_t quadrant = static_cast<int32_t>(static_cast<uint32_t>(k) << 30);
  bool odd = float_from_bits(quadrant) != 0.0f;
  radius = float_from_bits(bits_from_float(radius) ^ (quadrant & static_cast<int32_t>(0x80000000)));
  NoisePair pair;
  pair.first = radius * (odd ? -angle.sin : angle.cos);
  pair.second = radius * (odd ? angle.cos : angle.sin);
  return pair;
}

KD_FN NoisePair box_muller(uint32_t r_a, uint32_t r_b) {
#if defined(__CUDA_ARCH__)
  return box_muller_with(r_a, r_b, [](float x) {
    return root_by_reciprocal(x, [](float radicand) {
      radicand = fmaxf(radicand, 0x1p-60f);  // 0 must not make infinity
      float y;
      asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(radicand));
      return y;
    });
  });
#else
  return box_muller_with(r_a, r_b, [](float x) KD_INLINE_LAMBDA { return sqrt(x); });
#endif
}

struct Noise4 {
  float value[4];
};

KD_FN Noise4 normal4(Philox4x32<uint32_t> r) {
  NoisePair a = box_muller(r.word[0], r.word[1]);
  NoisePair b = box_muller(r.word[2], r.word[3]);
  Noise4 out;
  out.value[0] = a.first;
  out.value[1] = a.second;
  out.value[2] = b.first;
  out.value[3] = b.second;
  return out;
}

// The normals of elements 4 * counter to 4 * counter + 3.
KD_FN Noise4 normal4(NoiseKey key, uint32_t counter_low, uint32_t counter_high) {
  return normal4(
      philox4x32_10(counter_low, counter_high, key.stream, key.step, key.seed_low, key.seed_high));
}

}  // namespace math
}  // namespace kdkernels
