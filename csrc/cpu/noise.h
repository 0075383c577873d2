// Noise over contiguous elements. Included by one file an ISA level.
//
// Random numbers are made a block at a time in L1, from the block's counters alone, and used at once: a tensor
// is read once and written once, and nothing else moves.
#pragma once

#include "cpu/kernels.h"
#include "cpu/storage.h"
#include "math/distribution.h"

namespace kdkernels {
namespace cpu {
namespace {

constexpr int kCounters = 256, kNumbers = 4 * kCounters;  // of a block

#if defined(KD_VECTOR_BYTES)
// Philox words of several counters, one in the low half of each 64-bit lane; the high halves hold anything.
// So a product stays where it is made and its halves need one shift, where gcc's own vector code for a 32 x
// 32 bit product spends most of its instructions on moving them (329 against 160 for 8 counters on AVX2).
typedef uint64_t Lanes __attribute__((vector_size(KD_VECTOR_BYTES)));
KD_FN Lanes multiply_low_halves(Lanes a, Lanes b) {
#if KD_VECTOR_BYTES == 64
  return (Lanes)_mm512_maskz_mul_epu32(0xFF, (__m512i)a, (__m512i)b);
#else
  return (Lanes)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#endif
}
struct Counters {
  Lanes lanes;
  Counters() = default;
  explicit Counters(Lanes x) : lanes(x) {}
  explicit Counters(uint32_t x) : lanes(Lanes{} + static_cast<uint64_t>(x)) {}
};
KD_FN Counters operator^(Counters a, Counters b) { return Counters(a.lanes ^ b.lanes); }
KD_FN Counters operator^(Counters a, uint32_t b) {
  return Counters(a.lanes ^ static_cast<uint64_t>(b));
}
KD_FN void multiply(Counters a, uint32_t b, Counters& high, Counters& low) {
  low.lanes = multiply_low_halves(a.lanes, Lanes{} + static_cast<uint64_t>(b));
  high.lanes = low.lanes >> 32;
}

// word[k][j] = word k of a block's counter first + j.
KD_FN void philox_words(uint32_t first, int counters, const math::PhiloxShared& shared,
                        const math::PhiloxKeys& keys, uint32_t (&word)[4][kCounters]) {
  constexpr int kLanes = sizeof(Lanes) / sizeof(uint64_t);
  Lanes twice;
  for (int i = 0; i < kLanes; ++i) twice[i] = static_cast<uint64_t>(2 * i);
  for (int j = 0; j < counters; j += 2 * kLanes) {
    // Even counters in one vector and odd ones in the other interleave into 32-bit lanes in order.
    Lanes even = twice + static_cast<uint64_t>(first + static_cast<uint32_t>(j)), odd = even + 1;
    math::Philox4x32<Counters> a = math::philox4x32_10(Counters(even), shared, keys);
    math::Philox4x32<Counters> b = math::philox4x32_10(Counters(odd), shared, keys);
    for (int k = 0; k < 4; ++k) {
      Lanes both = (a.word[k].lanes & 0xFFFFFFFFu) | (b.word[k].lanes << 32);
      std::memcpy(&word[k][j], &both, sizeof both);
    }
  }
}
#else
KD_FN void philox_words(uint32_t first, int counters, const math::PhiloxShared& shared,
                        const math::PhiloxKeys& keys, uint32_t (&word)[4][kCounters]) {
  for (int j = 0; j < counters; ++j) {
    math::Philox4x32<uint32_t> r =
        math::philox4x32_10(first + static_cast<uint32_t>(j), shared, keys);
    for (int k = 0; k < 4; ++k) word[k][j] = r.word[k];
  }
}
#endif

// Words of counters that all have the first one's high half.
KD_FN void philox_block(math::NoiseKey key, uint64_t first, int counters,
                        uint32_t (&word)[4][kCounters]) {
  const math::PhiloxKeys keys = math::philox_keys(key.seed_low, key.seed_high);
  const math::PhiloxShared shared =
      math::philox_shared(static_cast<uint32_t>(first >> 32), key.stream, key.step, keys);
  philox_words(static_cast<uint32_t>(first), counters, shared, keys, word);
}

// lane[k][j] = number k of counter j.
template <math::Distribution kDistribution>
KD_FN void make_numbers(const uint32_t (&word)[4][kCounters], int counters,
                        float (&lane)[4][kCounters]) {
  for (int pair = 0; pair < 4; pair += 2) {
    for (int j = 0; j < counters; ++j) {
      math::NoisePair n = math::noise_pair<kDistribution>(word[pair][j], word[pair + 1][j]);
      lane[pair][j] = n.first;
      lane[pair + 1][j] = n.second;
    }
  }
}

// The numbers of elements 4 * first and on, for `counters` counters (rounded up to whole vectors). One copy of
// this code serves every loop that uses noise.
__attribute__((noinline)) void number_block(math::Distribution distribution, math::NoiseKey key,
                                            uint64_t first, int counters, float* out) {
  using math::Distribution;
  alignas(64) uint32_t word[4][kCounters];
  alignas(64) float lane[4][kCounters];
  int padded = (counters + 15) / 16 * 16;
  philox_block(key, first, padded, word);
  switch (distribution) {
    case Distribution::kNormal: make_numbers<Distribution::kNormal>(word, padded, lane); break;
    case Distribution::kUniform: make_numbers<Distribution::kUniform>(word, padded, lane); break;
    case Distribution::kRademacher:
      make_numbers<Distribution::kRademacher>(word, padded, lane);
      break;
    case Distribution::kTruncatedNormal:
      make_numbers<Distribution::kTruncatedNormal>(word, padded, lane);
      break;
    case Distribution::kLaplace: make_numbers<Distribution::kLaplace>(word, padded, lane); break;
  }
  for (int j = 0; j < padded; ++j) {
    out[4 * j] = lane[0][j];
    out[4 * j + 1] = lane[1][j];
    out[4 * j + 2] = lane[2][j];
    out[4 * j + 3] = lane[3][j];
  }
}

// Elements [begin, end) cut into blocks, whose counters have one high half: use(first element, count, its
// counter, which of the counter's four numbers it has).
template <class Use>
KD_FN void for_blocks(uint64_t offset, int64_t begin, int64_t end, Use use) {
  for (int64_t i = begin; i < end;) {
    uint64_t index = offset + static_cast<uint64_t>(i);
    constexpr uint64_t kSharedHigh = uint64_t(1) << 34;  // elements
    int skip = static_cast<int>(index % 4);
    int64_t most = kNumbers - skip,
            shared = static_cast<int64_t>(kSharedHigh - index % kSharedHigh);
    most = most < shared ? most : shared;
    int n = static_cast<int>(end - i < most ? end - i : most);
    use(i, n, index / 4, skip);
    i += n;
  }
}

// use(first element, count, their numbers).
template <class Use>
KD_FN void for_numbers(math::Distribution distribution, math::NoiseKey key, uint64_t offset,
                       int64_t begin, int64_t end, Use use) {
  alignas(64) float eps[kNumbers];
  for_blocks(offset, begin, end,
             [&](int64_t i, int n, uint64_t counter, int skip) KD_INLINE_LAMBDA {
    number_block(distribution, key, counter, (n + skip + 3) / 4, eps);
    use(i, n, eps + skip);
  });
}

KD_FN math::NoiseKey key_of(const NoiseSource& source, uint32_t stream) {
  uint32_t step =
      source.device_step != nullptr ? static_cast<uint32_t>(*source.device_step) : source.step;
  return {source.seed_low, source.seed_high, stream, step};
}

// The std of a block's elements where all have one, once for all blocks of a call; false where they differ.
template <class Real>
KD_FN bool fill_std(const NoiseParams& p, const NoiseTensor& tensor, int64_t count,
                    Real (&block)[kNumbers]) {
  if (p.stds != nullptr && p.std_size > 1) return false;
  Real std = p.stds != nullptr ? static_cast<const Real*>(p.stds)[tensor.index]
                               : static_cast<Real>(tensor.std);
  int n = static_cast<int>(count < kNumbers ? count : kNumbers);
  for (int j = 0; j < n; ++j) block[j] = std;
  return true;
}

// Those of elements [i, i + n) where they differ.
template <class Real>
KD_FN void fill_pattern(const NoiseParams& p, const NoiseTensor& tensor, int64_t i, int n,
                        Real (&block)[kNumbers]) {
  const Real* stds = static_cast<const Real*>(p.stds) + tensor.index * p.std_size;
  int64_t at = i / p.std_inner % p.std_size, left = p.std_inner - i % p.std_inner;
  for (int j = 0; j < n;) {
    // A stretch of one std, or where each has one element, a stretch of the pattern.
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

template <NoiseMode kMode, class T, class Real>
KD_FN void apply_block(const T* in, const Real* std, const float* eps, int n, T* out) {
  // Element by element in and out are the same or apart, never shifted.
#pragma omp simd
  for (int j = 0; j < n; ++j) {
    Real x = 0;
    if constexpr (kMode != NoiseMode::kOnly) x = widen(in[j]);
    narrow(math::apply_noise<kMode>(std[j], static_cast<Real>(eps[j]), x), out[j]);
  }
}

template <class T, class Real>
KD_FN void add_squares(const T* in, const Real* std, const float* eps, int n, double* norms) {
  double of_in = 0, of_noise = 0;
#pragma omp simd reduction(+ : of_in, of_noise)
  for (int j = 0; j < n; ++j) {
    double x = static_cast<double>(widen(in[j])),
           noise = static_cast<double>(std[j] * static_cast<Real>(eps[j]));
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
  alignas(64) Real std[kNumbers];
  bool one = fill_std(p, tensor, end - begin, std);
  for_numbers(p.source.distribution, key_of(p.source, tensor.stream), tensor.offset, begin, end,
              [&](int64_t i, int n, const float* eps) KD_INLINE_LAMBDA {
    if (!one) fill_pattern(p, tensor, i, n, std);
    if (norms != nullptr) add_squares(in + i, std, eps, n, norms);
    switch (p.mode) {
      case NoiseMode::kOnly: return apply_block<NoiseMode::kOnly>(in, std, eps, n, out + i);
      case NoiseMode::kAdd: return apply_block<NoiseMode::kAdd>(in + i, std, eps, n, out + i);
      case NoiseMode::kScale: return apply_block<NoiseMode::kScale>(in + i, std, eps, n, out + i);
      case NoiseMode::kTimes: return apply_block<NoiseMode::kTimes>(in + i, std, eps, n, out + i);
    }
  });
}

void noise(const NoiseParams& p, const NoiseTensor& tensor, int64_t begin, int64_t end,
           double* norms) {
  switch (p.dtype) {
    case Dtype::kFloat32: return noise_of<float>(p, tensor, begin, end, norms);
    case Dtype::kFloat64: return noise_of<double>(p, tensor, begin, end, norms);
    case Dtype::kBFloat16: return noise_of<BFloat16>(p, tensor, begin, end, norms);
    case Dtype::kFloat16: return noise_of<Float16>(p, tensor, begin, end, norms);
  }
}

template <class T>
double noise_dot_of(const NoiseDotParams& p, const NoiseTensor& tensor, int64_t begin,
                    int64_t end) {
  const T* in = static_cast<const T*>(tensor.in);
  double total = 0;
  for_numbers(p.source.distribution, key_of(p.source, tensor.stream), tensor.offset, begin, end,
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
  switch (p.dtype) {
    case Dtype::kFloat32: return noise_dot_of<float>(p, tensor, begin, end);
    case Dtype::kFloat64: return noise_dot_of<double>(p, tensor, begin, end);
    case Dtype::kBFloat16: return noise_dot_of<BFloat16>(p, tensor, begin, end);
    case Dtype::kFloat16: return noise_dot_of<Float16>(p, tensor, begin, end);
  }
  return 0;
}

template <class T>
void combine_of(const CombineParams& p, const NoiseTensor& tensor, int64_t begin, int64_t end) {
  using Real = typename Compute<T>::type;
  T* out = static_cast<T*>(tensor.out);
  math::NoiseKey key = key_of(p.source, tensor.stream);
  alignas(64) float eps[kNumbers];
  alignas(64) Real sum[kNumbers];
  // All seeds of a block while it is in L1: the tensor is read once and written once.
  for_blocks(tensor.offset, begin, end,
             [&](int64_t i, int n, uint64_t counter, int skip) KD_INLINE_LAMBDA {
    for (int j = 0; j < n; ++j) sum[j] = 0;
    for (int64_t k = 0; k < p.terms; ++k) {
      uint64_t seed = static_cast<uint64_t>(p.seeds[k]);
      key.seed_low = static_cast<uint32_t>(seed);
      key.seed_high = static_cast<uint32_t>(seed >> 32);
      number_block(p.source.distribution, key, counter, (n + skip + 3) / 4, eps);
      Real coefficient = static_cast<Real>(p.coefficients[k]);
      for (int j = 0; j < n; ++j) {
        sum[j] = math::fma(coefficient, static_cast<Real>(eps[skip + j]), sum[j]);
      }
    }
    for (int j = 0; j < n; ++j) narrow(widen(out[i + j]) + sum[j], out[i + j]);
  });
}

void combine(const CombineParams& p, const NoiseTensor& tensor, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case Dtype::kFloat32: return combine_of<float>(p, tensor, begin, end);
    case Dtype::kFloat64: return combine_of<double>(p, tensor, begin, end);
    case Dtype::kBFloat16: return combine_of<BFloat16>(p, tensor, begin, end);
    case Dtype::kFloat16: return combine_of<Float16>(p, tensor, begin, end);
  }
}

}  // namespace
}  // namespace cpu
}  // namespace kdkernels
