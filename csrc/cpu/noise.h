// Noise over contiguous elements. Included by one file per ISA level.
#pragma once

#include "cpu/numbers.h"

namespace kdkernels {
namespace cpu {
namespace {

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
  const int64_t before = tensor.row * tensor.numel;
  for_numbers(noise_stream(p.source, tensor.stream, tensor.row), tensor.offset, begin, end, in,
              [&](int64_t i, int n, const float* eps) KD_INLINE_LAMBDA {
    if (differ) fill_pattern(p, tensor, before + i, n, pattern);
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
