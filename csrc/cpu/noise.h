// Noise over contiguous elements. Included by one file an ISA level.
//
// Normals are made a block at a time in L1, from the block's counters alone, and used at once: a tensor is
// read once and written once, and nothing else moves.
#pragma once

#include "cpu/kernels.h"
#include "cpu/storage.h"
#include "math/normal.h"

namespace kdkernels {
namespace cpu {
namespace {

constexpr int kCounters = 256;  // counters a block: 1024 normals

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
};
KD_FN Counters operator^(Counters a, Counters b) { return {a.lanes ^ b.lanes}; }
KD_FN Counters operator^(Counters a, uint32_t b) { return {a.lanes ^ static_cast<uint64_t>(b)}; }
KD_FN void multiply(Counters a, uint32_t b, Counters& high, Counters& low) {
  low.lanes = multiply_low_halves(a.lanes, Lanes{} + static_cast<uint64_t>(b));
  high.lanes = low.lanes >> 32;
}

// word[k][j] = word k of counter first + j.
KD_FN void philox_block(math::NoiseKey key, uint64_t first, int counters,
                        uint32_t (&word)[4][kCounters]) {
  constexpr int kLanes = sizeof(Lanes) / sizeof(uint64_t);
  Lanes twice;
  for (int i = 0; i < kLanes; ++i) twice[i] = static_cast<uint64_t>(2 * i);
  const Counters stream = {Lanes{} + key.stream}, step = {Lanes{} + key.step};
  for (int j = 0; j < counters; j += 2 * kLanes) {
    // Even counters in one vector and odd ones in the other interleave into 32-bit lanes in order.
    Lanes even = twice + (first + static_cast<uint64_t>(j)), odd = even + 1;
    math::Philox4x32<Counters> a = math::philox4x32_10(Counters{even}, Counters{even >> 32}, stream,
                                                       step, key.seed_low, key.seed_high);
    math::Philox4x32<Counters> b = math::philox4x32_10(Counters{odd}, Counters{odd >> 32}, stream,
                                                       step, key.seed_low, key.seed_high);
    for (int k = 0; k < 4; ++k) {
      Lanes both = (a.word[k].lanes & 0xFFFFFFFFu) | (b.word[k].lanes << 32);
      std::memcpy(&word[k][j], &both, sizeof both);
    }
  }
}
#else
KD_FN void philox_block(math::NoiseKey key, uint64_t first, int counters,
                        uint32_t (&word)[4][kCounters]) {
  for (int j = 0; j < counters; ++j) {
    uint64_t i = first + static_cast<uint64_t>(j);
    math::Philox4x32<uint32_t> r =
        math::philox4x32_10(static_cast<uint32_t>(i), static_cast<uint32_t>(i >> 32), key.stream,
                            key.step, key.seed_low, key.seed_high);
    for (int k = 0; k < 4; ++k) word[k][j] = r.word[k];
  }
}
#endif

// Normals of elements 4 * counter and on, for `counters` counters (rounded up to whole vectors).
inline void normal_block(math::NoiseKey key, uint64_t first, int counters, float* out) {
  alignas(64) uint32_t word[4][kCounters];
  alignas(64) float lane[4][kCounters];
  int padded = (counters + 15) / 16 * 16;
  philox_block(key, first, padded, word);
  for (int pair = 0; pair < 4; pair += 2) {
    for (int j = 0; j < padded; ++j) {
      math::NoisePair n = math::box_muller(word[pair][j], word[pair + 1][j]);
      lane[pair][j] = n.first;
      lane[pair + 1][j] = n.second;
    }
  }
  for (int j = 0; j < padded; ++j) {
    out[4 * j] = lane[0][j];
    out[4 * j + 1] = lane[1][j];
    out[4 * j + 2] = lane[2][j];
    out[4 * j + 3] = lane[3][j];
  }
}

// Calls use(first element, count, their normals) for elements [begin, end), a block at a time.
template <class Use>
KD_FN void for_normals(math::NoiseKey key, uint64_t offset, int64_t begin, int64_t end, Use use) {
  alignas(64) float eps[4 * kCounters];
  for (int64_t i = begin; i < end;) {
    uint64_t index = offset + static_cast<uint64_t>(i);
    int skip = static_cast<int>(index % 4);
    int64_t n = end - i < 4 * kCounters - skip ? end - i : 4 * kCounters - skip;
    normal_block(key, index / 4, static_cast<int>(n + skip + 3) / 4, eps);
    use(i, static_cast<int>(n), eps + skip);
    i += n;
  }
}

template <class T>
void noise_of(const NoiseTensor& tensor, math::NoiseKey key, int64_t begin, int64_t end) {
  using Real = typename Compute<T>::type;
  const T* in = static_cast<const T*>(tensor.in);
  T* out = static_cast<T*>(tensor.out);
  Real std = static_cast<Real>(tensor.std);
  for_normals(key, tensor.offset, begin, end,
              [=](int64_t i, int n, const float* eps) KD_INLINE_LAMBDA {
    if (in == nullptr) {
      for (int j = 0; j < n; ++j) narrow(std * static_cast<Real>(eps[j]), out[i + j]);
    } else {
      // Element by element in and out are the same or apart, never shifted.
#pragma omp simd
      for (int j = 0; j < n; ++j) {
        narrow(math::fma(std, static_cast<Real>(eps[j]), widen(in[i + j])), out[i + j]);
      }
    }
  });
}

void noise(Dtype dtype, const NoiseTensor& tensor, math::NoiseKey key, int64_t begin, int64_t end) {
  switch (dtype) {
    case Dtype::kFloat32: return noise_of<float>(tensor, key, begin, end);
    case Dtype::kFloat64: return noise_of<double>(tensor, key, begin, end);
    case Dtype::kBFloat16: return noise_of<BFloat16>(tensor, key, begin, end);
    case Dtype::kFloat16: return noise_of<Float16>(tensor, key, begin, end);
  }
}

template <class T>
double noise_dot_of(const NoiseDotParams& p, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(p.x);
  double total = 0;
  for_normals(p.key, p.offset, begin, end,
              [&](int64_t i, int n, const float* eps) KD_INLINE_LAMBDA {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int j = 0; j < n; ++j)
      sum += static_cast<double>(widen(x[i + j])) * static_cast<double>(eps[j]);
    total += sum;
  });
  return total;
}

double noise_dot(const NoiseDotParams& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case Dtype::kFloat32: return noise_dot_of<float>(p, begin, end);
    case Dtype::kFloat64: return noise_dot_of<double>(p, begin, end);
    case Dtype::kBFloat16: return noise_dot_of<BFloat16>(p, begin, end);
    case Dtype::kFloat16: return noise_dot_of<Float16>(p, begin, end);
  }
  return 0;
}

}  // namespace
}  // namespace cpu
}  // namespace kdkernels
