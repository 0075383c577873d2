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

struct NormalPair {
  float first, second;
};

KD_FN NormalPair box_muller(uint32_t r_a, uint32_t r_b) {
  float u = (static_cast<float>(r_a) + 0.5f) * 0x1p-32f;
  float radius = sqrt(-2.0f * log_normal(u));
  SinCos angle = sincospi_turn(static_cast<float>(r_b) * 0x1p-31f);
  NormalPair pair;
  pair.first = radius * angle.cos;
  pair.second = radius * angle.sin;
  return pair;
}

struct Normal4 {
  float value[4];
};

// The normals of elements 4 * counter to 4 * counter + 3.
KD_FN Normal4 normal4(NoiseKey key, uint32_t counter_low, uint32_t counter_high) {
  Philox4x32<uint32_t> r =
      philox4x32_10(counter_low, counter_high, key.stream, key.step, key.seed_low, key.seed_high);
  NormalPair a = box_muller(r.word[0], r.word[1]);
  NormalPair b = box_muller(r.word[2], r.word[3]);
  Normal4 out;
  out.value[0] = a.first;
  out.value[1] = a.second;
  out.value[2] = b.first;
  out.value[3] = b.second;
  return out;
}

}  // namespace math
}  // namespace kdkernels
