// box_muller_with() of csrc/math/normal.h beside Box and Muller's transform as it is written, over every fp32 that
// a Philox word becomes.
//
// Prints four counts: words tried as r_a and how many of them differ in a bit, then the same of r_b. Both roots
// are tried, the CPU's and the GPU's, whose reciprocal root is here the fp32 nearest to it.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <initializer_list>

#include "math/normal.h"

using namespace kdkernels::math;

static bool same(NoisePair a, NoisePair b) { return std::memcmp(&a, &b, sizeof a) == 0; }

static NoisePair box_muller_plain(uint32_t r_a, uint32_t r_b) {
  float u = (static_cast<float>(r_a) + 0.5f) * 0x1p-32f;
  float radius = std::sqrt(-2.0f * log_normal(u));
  float turn = static_cast<float>(r_b) * 0x1p-31f;
  SinCos angle = sincospi_reduced(turn, static_cast<int32_t>(std::nearbyint(2.0f * turn)));
  return {radius * angle.cos, radius * angle.sin};
}

static bool differs(uint32_t a, uint32_t b) {
  auto reciprocal = [](float x) {
    x = x < 0x1p-60f ? 0x1p-60f : x;
    return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x)));
  };
  auto root = [=](float x) { return root_by_reciprocal(x, reciprocal); };
  NoisePair plain = box_muller_plain(a, b);
  return !same(plain, box_muller(a, b)) || !same(plain, box_muller_with(a, b, root));
}

int main() {
  // Below 2^24 every word is its own float; above, one word for each float.
  constexpr int64_t kExact = 1 << 24, kFloats = kExact + 8 * (kExact / 2);
  auto word = [](int64_t i) {
    if (i < kExact) return static_cast<uint32_t>(i);
    int64_t binade = (i - kExact) / (kExact / 2), place = (i - kExact) % (kExact / 2);
    return static_cast<uint32_t>((kExact / 2 + place) << (binade + 1));
  };
  long bad_a = 0, bad_b = 0;
#pragma omp parallel for reduction(+ : bad_a, bad_b)
  for (int64_t i = 0; i <= kFloats; ++i) {
    uint32_t r = i < kFloats ? word(i) : 0xFFFFFFFFu;  // which rounds to 2^32
    for (uint32_t b : {12345u, 0x60000000u}) bad_a += differs(r, b);
    for (uint32_t a : {0u, 0x9E3779B9u, 0xFFFFFFFFu}) bad_b += differs(a, r);
  }
  std::printf("%ld %ld %ld %ld\n", kFloats + 1, bad_a, kFloats + 1, bad_b);
}
