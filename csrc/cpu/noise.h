// Noise over contiguous elements. Included by one file per ISA level.
//
// Random numbers are made one block at a time in L1, from the block's counters alone, and used at once: a tensor
// is read once and written once, and nothing else moves.
#pragma once

#include "cpu/kernels.h"
#include "cpu/storage.h"
#include "math/distribution.h"

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

// out[4 i + k] = number k of counter i of a block; number[k][j] is that of the counter at place j.
KD_FN void in_order(const float (&number)[4][kCounters], int counters, float* out) {
  for (int j = 0; j < counters; j += kGroup) {
    float* at = out + 4 * j;
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

KD_FN void in_order(const float (&number)[4][kCounters], int counters, float* out) {
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

// The numbers of elements 4 * first and on, for `counters` counters (rounded up to whole vectors). One copy of
// this code serves every loop that uses noise.
__attribute__((noinline)) void number_block(const NoiseStream& stream, uint64_t first, int counters,
                                            const Fetch& fetch, float* out) {
  using math::Distribution;
  alignas(64) uint32_t word[4][kCounters];
  alignas(64) float number[4][kCounters];
  int padded = (counters + kFetchedCounters - 1) / kFetchedCounters * kFetchedCounters;
  // The block's counters all have the first one's high half.
  const math::PhiloxShared shared = math::philox_shared(
      static_cast<uint32_t>(first >> 32), stream.key.stream, stream.key.step, stream.keys);
  philox_words(static_cast<uint32_t>(first), padded, shared, stream.vector_keys, fetch, word);
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

// Calls use(first element, count, its counter, which of the counter's four numbers it has) for each block of elements
// [begin, end). The counters of a block have one high half.
template <class Use>
KD_FN void for_blocks(uint64_t offset, int64_t begin, int64_t end, int numbers, Use use) {
  for (int64_t i = begin; i < end;) {
    uint64_t index = offset + static_cast<uint64_t>(i);
    constexpr uint64_t kSharedHigh = uint64_t(1) << 34;  // elements
    int skip = static_cast<int>(index % 4);
    int64_t most = numbers - skip, shared = static_cast<int64_t>(kSharedHigh - index % kSharedHigh);
    most = most < shared ? most : shared;
    int n = static_cast<int>(end - i < most ? end - i : most);
    use(i, n, index / 4, skip);
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

KD_FN NoiseStream noise_stream(const NoiseSource& source, uint32_t stream) {
  uint32_t step =
      source.device_step != nullptr ? static_cast<uint32_t>(*source.device_step) : source.step;
  return noise_stream(source.distribution, {source.seed_low, source.seed_high, stream, step});
}

// The std of all elements of a tensor.
template <class Real>
KD_FN Real one_std(const NoiseParams& p, const NoiseTensor& tensor) {
  return p.stds != nullptr ? static_cast<const Real*>(p.stds)[tensor.index]
                           : static_cast<Real>(tensor.std);
}

// The stds of elements [i, i + n) where they differ.
template <class Real>
KD_FN void fill_pattern(const NoiseParams& p, const NoiseTensor& tensor, int64_t i, int n,
                        Real (&block)[kNumbers]) {
  const Real* stds = static_cast<const Real*>(p.stds) + tensor.index * p.std_size;
  int64_t at = i / p.std_inner % p.std_size, left = p.std_inner - i % p.std_inner;
  for (int j = 0; j < n;) {
    // Elements with one std, or, where each has its own, a part of the pattern.
    bool each = p.std_inner == 1;
    int64_t stretch = each ? p.std_size - at : left;
    int m = static_cast<int>(stretch < n - j ? stretch : n - j);
    if (each) {
      for (int k = 0; k < m; ++k) block[j + k] = stds[at + k];
      at = 0;
    } else {
      for (int k = 0; k < m; ++k) block[j + k] = stds[at];
      at = at + 1 < p.std_size ? at + 1 : 0;
      left = p.std_inner;
    }
    j += m;
  }
}

// The std of each element, or `one` where std is null.
template <NoiseMode kMode, bool kOne, class T, class Real>
KD_FN void apply_loop(const T* in, Real one, const Real* std, const float* eps, int n, T* out) {
  // Element by element in and out are the same or apart, never shifted.
#pragma omp simd
  for (int j = 0; j < n; ++j) {
    Real x = 0;
    if constexpr (kMode != NoiseMode::kOnly) x = widen(in[j]);
    narrow(math::apply_noise<kMode>(kOne ? one : std[j], static_cast<Real>(eps[j]), x), out[j]);
  }
}
template <NoiseMode kMode, class T, class Real>
KD_FN void apply_block(const T* in, Real one, const Real* std, const float* eps, int n, T* out) {
  if (std == nullptr) return apply_loop<kMode, true>(in, one, std, eps, n, out);
  apply_loop<kMode, false>(in, one, std, eps, n, out);
}

template <class T, class Real>
KD_FN void add_squares(const T* in, Real one, const Real* std, const float* eps, int n,
                       double* norms) {
  double of_in = 0, of_noise = 0;
#pragma omp simd reduction(+ : of_in, of_noise)
  for (int j = 0; j < n; ++j) {
    double x = static_cast<double>(widen(in[j])),
           noise = static_cast<double>((std == nullptr ? one : std[j]) * static_cast<Real>(eps[j]));
    of_in += x * x;
    of_noise += noise * noise;
  }
  norms[0] += of_in;
  norms[1] += of_noise;
}

template <class T>
void noise_of(const NoiseParams& p, const NoiseTensor& tensor, int64_t begin, int64_t end,
              double* norms) {
  using Real = typename Compute<T>::type;
  const T* in = static_cast<const T*>(tensor.in);
  T* out = static_cast<T*>(tensor.out);
  alignas(64) Real pattern[kNumbers];
  const bool differ = p.stds != nullptr && p.std_size > 1;
  const Real one = differ ? Real{0} : one_std<Real>(p, tensor), *std = differ ? pattern : nullptr;
  for_numbers(noise_stream(p.source, tensor.stream), tensor.offset, begin, end, in,
              [&](int64_t i, int n, const float* eps) KD_INLINE_LAMBDA {
    if (differ) fill_pattern(p, tensor, i, n, pattern);
    if (norms != nullptr) add_squares(in + i, one, std, eps, n, norms);
    switch (p.mode) {
      case NoiseMode::kOnly: return apply_block<NoiseMode::kOnly>(in, one, std, eps, n, out + i);
      case NoiseMode::kAdd: return apply_block<NoiseMode::kAdd>(in + i, one, std, eps, n, out + i);
      case NoiseMode::kScale:
        return apply_block<NoiseMode::kScale>(in + i, one, std, eps, n, out + i);
      case NoiseMode::kTimes:
        return apply_block<NoiseMode::kTimes>(in + i, one, std, eps, n, out + i);
    }
  });
}

void noise(const NoiseParams& p, const NoiseTensor& tensor, int64_t begin, int64_t end,
           double* norms) {
  return by_dtype(p.dtype, [&](auto element) {
    return noise_of<decltype(element)>(p, tensor, begin, end, norms);
  });
}

template <class T>
double noise_dot_of(const NoiseDotParams& p, const NoiseTensor& tensor, int64_t begin,
                    int64_t end) {
  const T* in = static_cast<const T*>(tensor.in);
  double total = 0;
  for_numbers(noise_stream(p.source, tensor.stream), tensor.offset, begin, end, in,
              [&](int64_t i, int n, const float* eps) KD_INLINE_LAMBDA {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int j = 0; j < n; ++j)
      sum += static_cast<double>(widen(in[i + j])) * static_cast<double>(eps[j]);
    total += sum;
  });
  return total;
}

double noise_dot(const NoiseDotParams& p, const NoiseTensor& tensor, int64_t begin, int64_t end) {
  return by_dtype(p.dtype, [&](auto element) {
    return noise_dot_of<decltype(element)>(p, tensor, begin, end);
  });
}

template <class T>
void combine_of(const CombineParams& p, const NoiseTensor& tensor, int64_t begin, int64_t end) {
  using Real = typename Compute<T>::type;
  T* out = static_cast<T*>(tensor.out);
  math::NoiseKey key = noise_stream(p.source, tensor.stream).key;
  // Making a seed's keys costs a tenth of a block's numbers, so several blocks share them.
  constexpr int kTogether = 8 * kNumbers;
  alignas(64) float eps[kNumbers];
  alignas(64) Real sum[kTogether];
  // All seeds are used while these blocks are in L1: the tensor is read once and written once.
  for_blocks(tensor.offset, begin, end, kTogether,
             [&](int64_t i, int n, uint64_t counter, int skip) KD_INLINE_LAMBDA {
    for (int j = 0; j < n; ++j) sum[j] = 0;
    for (int64_t k = 0; k < p.terms; ++k) {
      uint64_t seed = static_cast<uint64_t>(p.seeds[k]);
      key.seed_low = static_cast<uint32_t>(seed);
      key.seed_high = static_cast<uint32_t>(seed >> 32);
      const NoiseStream stream = noise_stream(p.source.distribution, key);
      Real coefficient = static_cast<Real>(p.coefficients[k]);
      for (int first = 0; first < n + skip; first += kNumbers) {  // one block
        int numbers = n + skip - first < kNumbers ? n + skip - first : kNumbers;
        Fetch fetch = {{out + i + first}, k == 0 ? 1 : 0, 4 * static_cast<int>(sizeof(T))};
        number_block(stream, counter + static_cast<uint64_t>(first / 4), (numbers + 3) / 4, fetch,
                     eps);
        for (int j = first == 0 ? skip : 0; j < numbers; ++j) {
          Real& s = sum[first - skip + j];
          s = math::fma(coefficient, static_cast<Real>(eps[j]), s);
        }
      }
    }
    for (int j = 0; j < n; ++j) narrow(widen(out[i + j]) + sum[j], out[i + j]);
  });
}

void combine(const CombineParams& p, const NoiseTensor& tensor, int64_t begin, int64_t end) {
  return by_dtype(
      p.dtype, [&](auto element) { return combine_of<decltype(element)>(p, tensor, begin, end); });
}

}  // namespace
}  // namespace cpu
}  // namespace kdkernels
