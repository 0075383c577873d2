// Random numbers, words and bits of contiguous elements. Included by one file per ISA level.
//
// They are made one block at a time in L1, from the block's counters alone, and used at once: a tensor is read once and
// written once, and nothing else moves.
#pragma once

#include "cpu/kernels.h"
#include "cpu/storage.h"
#include "math/distribution.h"
#include "math/rounding.h"

namespace kdkernels {
namespace cpu {
namespace {

// The size of a block. It is small, so that making noise and moving memory take turns often: what is fetched ahead
// then fits a core's queue of misses.
constexpr int kCounters = 64, kNumbers = 4 * kCounters;

// The memory that a block of noise is for: `count` tensors from the block's first element on, with `bytes` per counter.
// The block after it is fetched while the noise is made, so that arithmetic and memory overlap.
struct Fetch {
  const void* data[4];
  int count, bytes;
};

// Fetches what the counters one block after counter j are for, so many at a time.
constexpr int kFetchedCounters = 32;
KD_FN void fetch_ahead(const Fetch& fetch, int j) {
  for (int t = 0; t < fetch.count; ++t) {
    uintptr_t next = reinterpret_cast<uintptr_t>(fetch.data[t]) +
                     static_cast<uintptr_t>((kCounters + j) * fetch.bytes);
    uintptr_t end = next + static_cast<uintptr_t>(kFetchedCounters * fetch.bytes);
    for (; next != end; next += 256) {  // whole for every dtype: `bytes` is at least 8
      KD_UNROLL
      for (uintptr_t line = 0; line < 256; line += 64)
        __builtin_prefetch(reinterpret_cast<const void*>(next + line));
    }
  }
}

#if defined(KD_VECTOR_BYTES)
// Philox words of several counters, one in the low half of each 64-bit element; the high halves are undefined. A product
// then stays where it is made and its halves need one shift, whereas gcc's vector code for a 32 x 32 bit product spends
// most of its instructions on moving them (329 against 160 for 8 counters on AVX2).
typedef uint64_t WideWords __attribute__((vector_size(KD_VECTOR_BYTES)));
constexpr int kPerVector = sizeof(WideWords) / sizeof(uint64_t), kGroup = 2 * kPerVector;

#if KD_VECTOR_BYTES == 64
constexpr int kGroups = 2;  // four independent chains hide each other's latency
KD_FN WideWords multiply_low_halves(WideWords a, WideWords b) {
  return (WideWords)_mm512_maskz_mul_epu32(0xFF, (__m512i)a, (__m512i)b);
}
// The low or high halves of two vectors' elements, interleaved.
KD_FN WideWords low_halves(WideWords even, WideWords odd) {
  return (WideWords)_mm512_mask_shuffle_epi32((__m512i)even, 0xAAAA, (__m512i)odd, _MM_PERM_CCAA);
}
KD_FN WideWords high_halves(WideWords even, WideWords odd) {
  return (WideWords)_mm512_mask_shuffle_epi32((__m512i)odd, 0x5555, (__m512i)even, _MM_PERM_DDBB);
}
#else
constexpr int kGroups = 1;  // more would not fit 16 registers
KD_FN WideWords multiply_low_halves(WideWords a, WideWords b) {
  return (WideWords)_mm256_mul_epu32((__m256i)a, (__m256i)b);
}
KD_FN WideWords low_halves(WideWords even, WideWords odd) {
  return (WideWords)_mm256_blend_epi32((__m256i)even, (__m256i)(odd << 32), 0xAA);
}
KD_FN WideWords high_halves(WideWords even, WideWords odd) {
  return (WideWords)_mm256_blend_epi32((__m256i)(even >> 32), (__m256i)odd, 0xAA);
}
#endif

// The even and the odd counters of kGroups groups of kGroup.
struct Counters {
  WideWords even[kGroups], odd[kGroups];
  Counters() = default;
  explicit Counters(uint32_t all) {
    for (int g = 0; g < kGroups; ++g) even[g] = odd[g] = WideWords{} + static_cast<uint64_t>(all);
  }
};
// The same counters as 32-bit words in order.
struct Words {
  WideWords group[kGroups];
};
// A round's key in all 32-bit elements. It stays in memory, from where vector operations take an operand.
struct VectorKey {
  WideWords copies;
};
KD_FN Counters operator^(Counters a, const VectorKey& b) {
  for (int g = 0; g < kGroups; ++g) {
    a.even[g] ^= b.copies;
    a.odd[g] ^= b.copies;
  }
  return a;
}
KD_FN Counters operator^(const Counters& a, uint32_t b) { return a ^ VectorKey{WideWords{} + b}; }
KD_FN Counters operator^(Counters a, const Counters& b) {
  for (int g = 0; g < kGroups; ++g) {
    a.even[g] ^= b.even[g];
    a.odd[g] ^= b.odd[g];
  }
  return a;
}
KD_FN Words operator^(Words a, const Counters& b) {
  for (int g = 0; g < kGroups; ++g) a.group[g] ^= low_halves(b.even[g], b.odd[g]);
  return a;
}
KD_FN Words operator^(Words a, const VectorKey& b) {
  for (int g = 0; g < kGroups; ++g) a.group[g] ^= b.copies;
  return a;
}
KD_FN void multiply(const Counters& a, uint32_t b, Counters& high, Counters& low) {
  const WideWords factor = WideWords{} + static_cast<uint64_t>(b);
  for (int g = 0; g < kGroups; ++g) {
    low.even[g] = multiply_low_halves(a.even[g], factor);
    low.odd[g] = multiply_low_halves(a.odd[g], factor);
  }
  for (int g = 0; g < kGroups; ++g) {
    high.even[g] = low.even[g] >> 32;
    high.odd[g] = low.odd[g] >> 32;
  }
}
KD_FN void multiply(const Counters& a, uint32_t b, Words& high, Words& low) {
  Counters unused, product;
  multiply(a, b, unused, product);
  for (int g = 0; g < kGroups; ++g) {
    high.group[g] = high_halves(product.even[g], product.odd[g]);
    low.group[g] = low_halves(product.even[g], product.odd[g]);
  }
}

// The counter of a group that stands at place j. Groups are 4 x 4 matrices of counters side by side, transposed, so that
// in_order() needs no instruction that crosses 128 bits.
KD_FN constexpr int counter_at(int j) { return j % 4 * (kGroup / 4) + j / 4; }

KD_FN VectorKey key_of(uint32_t key) { return {WideWords{} + key * uint64_t{0x100000001}}; }

// word[k][j] = word k of the counter at place j of a block from counter `first` on.
KD_FN void philox_words(uint32_t first, int counters, const math::PhiloxShared& shared,
                        const math::PhiloxKeysOf<VectorKey>& keys, const Fetch& fetch,
                        uint32_t (&word)[4][kCounters]) {
  WideWords even;
  for (int i = 0; i < kPerVector; ++i) even[i] = static_cast<uint64_t>(counter_at(2 * i));
  for (int j = 0; j < counters; j += kGroups * kGroup) {
    if (j % kFetchedCounters == 0) fetch_ahead(fetch, j);
    Counters c;
    for (int g = 0; g < kGroups; ++g) {
      c.even[g] = even + static_cast<uint64_t>(first + static_cast<uint32_t>(j + g * kGroup));
      c.odd[g] = c.even[g] + counter_at(1);
    }
    math::Philox4x32<Words> r = math::philox4x32_10<Counters, Words>(c, shared, keys);
    KD_UNROLL
    for (int k = 0; k < 4; ++k) {
      KD_UNROLL
      for (int g = 0; g < kGroups; ++g) {
        std::memcpy(&word[k][j + g * kGroup], &r.word[k].group[g], sizeof(WideWords));
      }
    }
  }
}

// out[4 i + k] = number or word k of counter i of a block; number[k][j] is that of the counter at place j.
template <class Number>
KD_FN void in_order(const Number (&numbers)[4][kCounters], int counters, Number* out) {
  const auto& number = reinterpret_cast<const float (&)[4][kCounters]>(numbers);
  for (int j = 0; j < counters; j += kGroup) {
    float* at = reinterpret_cast<float*>(out) + 4 * j;
#if KD_VECTOR_BYTES == 64
    __m512 x0 = _mm512_load_ps(&number[0][j]), x1 = _mm512_load_ps(&number[1][j]),
           x2 = _mm512_load_ps(&number[2][j]), x3 = _mm512_load_ps(&number[3][j]);
    __m512d a = (__m512d)_mm512_maskz_unpacklo_ps(0xFFFF, x0, x1),
            b = (__m512d)_mm512_maskz_unpackhi_ps(0xFFFF, x0, x1),
            c = (__m512d)_mm512_maskz_unpacklo_ps(0xFFFF, x2, x3),
            d = (__m512d)_mm512_maskz_unpackhi_ps(0xFFFF, x2, x3);
    _mm512_storeu_ps(at, (__m512)_mm512_maskz_unpacklo_pd(0xFF, a, c));
    _mm512_storeu_ps(at + 16, (__m512)_mm512_maskz_unpackhi_pd(0xFF, a, c));
    _mm512_storeu_ps(at + 32, (__m512)_mm512_maskz_unpacklo_pd(0xFF, b, d));
    _mm512_storeu_ps(at + 48, (__m512)_mm512_maskz_unpackhi_pd(0xFF, b, d));
#else
    __m256 x0 = _mm256_load_ps(&number[0][j]), x1 = _mm256_load_ps(&number[1][j]),
           x2 = _mm256_load_ps(&number[2][j]), x3 = _mm256_load_ps(&number[3][j]);
    __m256d a = (__m256d)_mm256_unpacklo_ps(x0, x1), b = (__m256d)_mm256_unpackhi_ps(x0, x1),
            c = (__m256d)_mm256_unpacklo_ps(x2, x3), d = (__m256d)_mm256_unpackhi_ps(x2, x3);
    _mm256_storeu_ps(at, (__m256)_mm256_unpacklo_pd(a, c));
    _mm256_storeu_ps(at + 8, (__m256)_mm256_unpackhi_pd(a, c));
    _mm256_storeu_ps(at + 16, (__m256)_mm256_unpacklo_pd(b, d));
    _mm256_storeu_ps(at + 24, (__m256)_mm256_unpackhi_pd(b, d));
#endif
  }
}
#else
using VectorKey = uint32_t;
KD_FN VectorKey key_of(uint32_t key) { return key; }

KD_FN void philox_words(uint32_t first, int counters, const math::PhiloxShared& shared,
                        const math::PhiloxKeys& keys, const Fetch& fetch,
                        uint32_t (&word)[4][kCounters]) {
  for (int j = 0; j < counters; j += kFetchedCounters) fetch_ahead(fetch, j);
  for (int j = 0; j < counters; ++j) {
    math::Philox4x32<uint32_t> r =
        math::philox4x32_10(first + static_cast<uint32_t>(j), shared, keys);
    for (int k = 0; k < 4; ++k) word[k][j] = r.word[k];
  }
}

template <class Number>
KD_FN void in_order(const Number (&number)[4][kCounters], int counters, Number* out) {
  for (int j = 0; j < counters; ++j) {
    out[4 * j] = number[0][j];
    out[4 * j + 1] = number[1][j];
    out[4 * j + 2] = number[2][j];
    out[4 * j + 3] = number[3][j];
  }
}
#endif

// What the blocks of one tensor share.
struct NoiseStream {
  math::Distribution distribution;
  math::NoiseKey key;
  math::PhiloxKeys keys;
  math::PhiloxKeysOf<VectorKey> vector_keys;
};
KD_FN NoiseStream noise_stream(math::Distribution distribution, math::NoiseKey key) {
  NoiseStream s = {distribution, key, math::philox_keys(key.seed_low, key.seed_high), {}};
  for (int round = 0; round < math::kPhiloxRounds; ++round) {
    for (int k = 0; k < 2; ++k) s.vector_keys.round[round][k] = key_of(s.keys.round[round][k]);
  }
  return s;
}

// number[k][j] = number k of the counter at place j.
template <math::Distribution kDistribution>
KD_FN void make_numbers(const uint32_t (&word)[4][kCounters], int counters,
                        float (&number)[4][kCounters]) {
  for (int pair = 0; pair < 4; pair += 2) {
    for (int j = 0; j < counters; ++j) {
      math::NoisePair n = math::noise_pair<kDistribution>(word[pair][j], word[pair + 1][j]);
      number[pair][j] = n.first;
      number[pair + 1][j] = n.second;
    }
  }
}

// The words of counters [first, first + counters), at most a block's, which all have the first one's high half; it gets the
// bits of `purpose`. Returns how many counters were made: whole vectors of them.
KD_FN int words_of_block(const NoiseStream& stream, uint32_t purpose, uint64_t first, int counters,
                         const Fetch& fetch, uint32_t (&word)[4][kCounters]) {
  const int padded = (counters + kFetchedCounters - 1) / kFetchedCounters * kFetchedCounters;
  const math::PhiloxShared shared =
      math::philox_shared(static_cast<uint32_t>(first >> 32) | purpose, stream.key.stream,
                          stream.key.step, stream.keys);
  philox_words(static_cast<uint32_t>(first), padded, shared, stream.vector_keys, fetch, word);
  return padded;
}

// 16 bits each of elements 8 * first and on, for `counters` counters, as math/rounding.h numbers them; memory for
// whole vectors of counters.
__attribute__((noinline)) void bits_block(const NoiseStream& stream, uint32_t purpose,
                                          uint64_t first, int counters, const Fetch& fetch,
                                          uint16_t* out) {
  alignas(64) uint32_t word[4][kCounters], ordered[4 * kCounters];
  for (int at = 0; at < counters; at += kCounters) {
    const int left = counters - at;
    const int made = words_of_block(stream, purpose, first + static_cast<uint64_t>(at),
                                    left < kCounters ? left : kCounters, fetch, word);
    in_order(word, made, ordered);
    std::memcpy(out + math::kBitsPerCounter * at, ordered, sizeof(uint32_t) * 4 * made);
  }
}

// The numbers of elements 4 * first and on, for `counters` counters (rounded up to whole vectors). One copy of
// this code serves every loop that uses noise.
__attribute__((noinline)) void number_block(const NoiseStream& stream, uint64_t first, int counters,
                                            const Fetch& fetch, float* out) {
  using math::Distribution;
  alignas(64) uint32_t word[4][kCounters];
  alignas(64) float number[4][kCounters];
  const int padded = words_of_block(stream, 0, first, counters, fetch, word);
  switch (stream.distribution) {
    case Distribution::kNormal: make_numbers<Distribution::kNormal>(word, padded, number); break;
    case Distribution::kUniform: make_numbers<Distribution::kUniform>(word, padded, number); break;
    case Distribution::kRademacher:
      make_numbers<Distribution::kRademacher>(word, padded, number);
      break;
    case Distribution::kTruncatedNormal:
      make_numbers<Distribution::kTruncatedNormal>(word, padded, number);
      break;
    case Distribution::kLaplace: make_numbers<Distribution::kLaplace>(word, padded, number); break;
  }
  in_order(number, padded, out);
}

// Calls use(first element, count, its counter, its place in the counter) for each block of at most `numbers` of elements
// [begin, end), of which a counter has `each`. The counters of a block have one high half.
template <int each = 4, class Use>
KD_FN void for_blocks(uint64_t offset, int64_t begin, int64_t end, int numbers, Use use) {
  for (int64_t i = begin; i < end;) {
    uint64_t index = offset + static_cast<uint64_t>(i);
    constexpr uint64_t kSharedHigh = uint64_t(1) << 34;  // elements
    int skip = static_cast<int>(index % each);
    int64_t most = numbers - skip, shared = static_cast<int64_t>(kSharedHigh - index % kSharedHigh);
    most = most < shared ? most : shared;
    int n = static_cast<int>(end - i < most ? end - i : most);
    use(i, n, index / each, skip);
    i += n;
  }
}

// Calls use(first element, count, their numbers) for each block; data is the tensor that they are for, or null.
template <class T, class Use>
KD_FN void for_numbers(const NoiseStream& stream, uint64_t offset, int64_t begin, int64_t end,
                       const T* data, Use use) {
  alignas(64) float eps[kNumbers];
  for_blocks(offset, begin, end, kNumbers,
             [&](int64_t i, int n, uint64_t counter, int skip) KD_INLINE_LAMBDA {
    Fetch fetch = {{data + i}, data != nullptr ? 1 : 0, 4 * static_cast<int>(sizeof(T))};
    number_block(stream, counter, (n + skip + 3) / 4, fetch, eps);
    use(i, n, eps + skip);
  });
}

KD_FN NoiseStream noise_stream(const NoiseSource& source, uint32_t stream, int64_t row = 0) {
  math::NoiseKey key = {source.seed_low, source.seed_high, stream, source.step};
  if (source.device_step != nullptr) key.step = static_cast<uint32_t>(*source.device_step);
  if (source.row_steps != nullptr) key.step = static_cast<uint32_t>(source.row_steps[row]);
  if (source.row_seeds != nullptr) {
    const uint64_t seed = static_cast<uint64_t>(source.row_seeds[row]);
    key.seed_low = static_cast<uint32_t>(seed);
    key.seed_high = static_cast<uint32_t>(seed >> 32);
  }
  return noise_stream(source.distribution, key);
}

}  // namespace
}  // namespace cpu
}  // namespace kdkernels
