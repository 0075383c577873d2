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

// Normals of elements 4 * counter and on, for `counters` counters (rounded up to whole vectors).
inline void normal_block(math::NoiseKey key, uint64_t counter, int counters, float* out) {
  float lane[4][kCounters];
  uint32_t low = static_cast<uint32_t>(counter), high = static_cast<uint32_t>(counter >> 32);
  int padded = (counters + 15) / 16 * 16;
  for (int j = 0; j < padded; ++j) {
    uint32_t l = low + static_cast<uint32_t>(j);
    math::Normal4 n = math::normal4(key, l, high + (l < low ? 1u : 0u));
    lane[0][j] = n.value[0];
    lane[1][j] = n.value[1];
    lane[2][j] = n.value[2];
    lane[3][j] = n.value[3];
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
  for_normals(key, tensor.offset, begin, end, [=](int64_t i, int n, const float* eps) KD_INLINE_LAMBDA {
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
  for_normals(p.key, p.offset, begin, end, [&](int64_t i, int n, const float* eps) KD_INLINE_LAMBDA {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int j = 0; j < n; ++j) sum += static_cast<double>(widen(x[i + j])) * static_cast<double>(eps[j]);
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
