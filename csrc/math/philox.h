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
  uint64_t product = static_cast<uint64_t>(a) * b;
  low = static_cast<uint32_t>(product);
  high = static_cast<uint32_t>(product >> 32);
}

template <class Word, class Out = Word, class Key = uint32_t>
KD_FN Philox4x32<Out> philox_round(const Philox4x32<Word>& c, const Key& k0, const Key& k1) {
  Out high0, low0, high1, low1;
  multiply(c.word[0], 0xD2511F53u, high0, low0);
  multiply(c.word[2], 0xCD9E8D57u, high1, low1);
  return {{high1 ^ c.word[1] ^ k0, low1, high0 ^ c.word[3] ^ k1, low0}};
}

constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxBump0 = 0x9E3779B9u, kPhiloxBump1 = 0xBB67AE85u;

// Counter words c0 to c3, key words k0 and k1. Word is uint32_t, or a vector of counters that has its own
// multiply() and operator^.
template <class Word>
KD_FN Philox4x32<Word> philox4x32_10(Word c0, Word c1, Word c2, Word c3, uint32_t k0, uint32_t k1) {
  Philox4x32<Word> c = {{c0, c1, c2, c3}};
  KD_UNROLL
  for (int round = 0; round < kPhiloxRounds; ++round) {
    c = philox_round(c, k0, k1);
    k0 += kPhiloxBump0;
    k1 += kPhiloxBump1;
  }
  return c;
}

// The key of every round, for a kernel that finds them in constant memory instead of adding.
template <class Key>
struct PhiloxKeysOf {
  Key round[kPhiloxRounds][2];
};
using PhiloxKeys = PhiloxKeysOf<uint32_t>;

KD_FN PhiloxKeys philox_keys(uint32_t k0, uint32_t k1) {
  PhiloxKeys keys;
  for (int round = 0; round < kPhiloxRounds; ++round) {
    keys.round[round][0] = k0;
    keys.round[round][1] = k1;
    k0 += kPhiloxBump0;
    k1 += kPhiloxBump1;
  }
  return keys;
}

// What counters that differ in their low word alone share of the first two rounds.
struct PhiloxShared {
  uint32_t word[4];
};

KD_FN PhiloxShared philox_shared(uint32_t c1, uint32_t c2, uint32_t c3, const PhiloxKeys& keys) {
  uint32_t high1, low1, high0, low0;
  multiply(c2, 0xCD9E8D57u, high1, low1);
  multiply(high1 ^ c1 ^ keys.round[0][0], 0xD2511F53u, high0, low0);
  return {{c3 ^ keys.round[0][1], low1 ^ keys.round[1][0], high0 ^ keys.round[1][1], low0}};
}

// Out: Word, or what a vector of counters becomes in the last round. Key: uint32_t, or a vector of a key's copies.
template <class Word, class Out = Word, class Key = uint32_t>
KD_FN Philox4x32<Out> philox4x32_10(Word c0, const PhiloxShared& shared,
                                    const PhiloxKeysOf<Key>& keys) {
  Word high0, low0, high1, low1;
  multiply(c0, 0xD2511F53u, high0, low0);
  multiply(high0 ^ shared.word[0], 0xCD9E8D57u, high1, low1);
  Philox4x32<Word> c = {
      {high1 ^ shared.word[1], low1, low0 ^ shared.word[2], static_cast<Word>(shared.word[3])}};
  KD_UNROLL
  for (int round = 2; round < kPhiloxRounds - 1; ++round)
    c = philox_round(c, keys.round[round][0], keys.round[round][1]);
  return philox_round<Word, Out>(c, keys.round[kPhiloxRounds - 1][0],
                                 keys.round[kPhiloxRounds - 1][1]);
}

}  // namespace math
}  // namespace kdkernels
