// Philox4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as
// 1, 2, 3" (SC 2011): 128 random bits as a pure function of a 128-bit counter and a 64-bit key.
//
// Known answers of Random123 (counter, key -> output), checked in tests/test_noise.py:
//   00000000 00000000 00000000 00000000, 00000000 00000000 -> 6627e8d5 e169c58d bc57ac4c 9b00dbd8
//   ffffffff ffffffff ffffffff ffffffff, ffffffff ffffffff -> 408f276d 41c83b0e a20bc7c6 6d5451fd
//   243f6a88 85a308d3 13198a2e 03707344, a4093822 299f31d0 -> d16cfe09 94fdcceb 5001e420 24126ea1
#pragma once

#include "math/elementary.h"

namespace kdkernels {
namespace math {

template <class Word>
struct Philox4x32 {
  Word word[4];
};

// The two halves of a 32 x 32 bit product.
KD_FN void multiply(uint32_t a, uint32_t b, uint32_t& high, uint32_t& low) {
  low = a * b;
#if defined(__CUDA_ARCH__)
  high = __umulhi(a, b);
#else
  high = static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
#endif
}

// Counter words c0 to c3, key words k0 and k1. Word is uint32_t, or a vector of counters that has its own
// multiply() and operator^.
template <class Word>
KD_FN Philox4x32<Word> philox4x32_10(Word c0, Word c1, Word c2, Word c3, uint32_t k0, uint32_t k1) {
  KD_UNROLL
  for (int round = 0; round < 10; ++round) {
    Word high0, low0, high1, low1;
    multiply(c0, 0xD2511F53u, high0, low0);
    multiply(c2, 0xCD9E8D57u, high1, low1);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  Philox4x32<Word> out;
  out.word[0] = c0;
  out.word[1] = c1;
  out.word[2] = c2;
  out.word[3] = c3;
  return out;
}

}  // namespace math
}  // namespace kdkernels
