// Optimizer steps over contiguous elements, with noise. Included by one file per ISA level.
//
// A block's noise is made in L1 and used at once, so that a step moves what it moves without noise. 16-bit elements
// are widened and narrowed in registers.
#pragma once

#include "cpu/numbers.h"
#include "cpu/storage.h"
#include "math/update.h"

namespace kdkernels {
namespace cpu {
namespace {

constexpr int kMostNumbers = 4 * kNumbers;  // the size of a block without noise

// What a step works on. A moment that the rule does not have is null. Grad is T, or, where gradients were unscaled or
// their norm is wanted, the type that they are computed in.
template <class T, class Grad>
struct UpdateBlock {
  T* param;
  const Grad* grad;
  T *first, *second;
  const uint16_t* bits;  // of 16-bit elements that are rounded by chance, or null
};

template <bool kByChance, class T, class Real>
KD_FN void round_to(Real x, uint32_t bits, T& out) {
  if constexpr (kByChance) {
    round_by_chance(x, bits, out);
  } else {
    narrow(x, out);
  }
}

template <math::Update kUpdate, bool kFirst, bool kShares, bool kByChance, class T, class Grad,
          class Real>
KD_FN void update_loop(const math::UpdateNumbers<Real>& numbers, const UpdateBlock<T, Grad>& block,
                       const float* eps, int count, Real* gradient_share, Real* noise_share) {
  constexpr bool kSecond = math::has_second(kUpdate);
  // Copies, which no store can change.
  const math::UpdateNumbers<Real> n = numbers;
  T *param = block.param, *first = block.first, *second = block.second;
  const Grad* grad = block.grad;
  const uint16_t* bits = block.bits;
#pragma omp simd
  for (int j = 0; j < count; ++j) {
    const uint32_t r = kByChance ? bits[j] : 0;
    Real x = widen(param[j]), g = widen(grad[j]), m = 0, v = 0;
    if constexpr (kFirst) m = widen(first[j]);
    if constexpr (kSecond) v = widen(second[j]);
    math::UpdateShares<Real> shares =
        math::update_element<kUpdate>(n, static_cast<Real>(eps[j]), g, x, m, v);
    round_to<kByChance>(x, r, param[j]);
    if constexpr (kFirst) round_to<kByChance>(m, math::bits_of_first(r), first[j]);
    if constexpr (kSecond) round_to<kByChance>(v, math::bits_of_second(r), second[j]);
    if constexpr (kShares) {
      gradient_share[j] = shares.gradient;
      noise_share[j] = shares.noise;
    }
  }
}

template <math::Update kUpdate, bool kFirst, bool kShares, class T, class Grad, class Real>
KD_FN void update_rounded(const math::UpdateNumbers<Real>& n, const UpdateBlock<T, Grad>& block,
                          const float* eps, int count, Real* gradient_share, Real* noise_share) {
  if constexpr (sizeof(T) == 2) {
    if (block.bits != nullptr)
      return update_loop<kUpdate, kFirst, kShares, true>(n, block, eps, count, gradient_share,
                                                         noise_share);
  }
  update_loop<kUpdate, kFirst, kShares, false>(n, block, eps, count, gradient_share, noise_share);
}

template <bool kShares, class T, class Grad, class Real>
__attribute__((noinline)) void update_block(math::Update update, const math::UpdateNumbers<Real>& n,
                                            const UpdateBlock<T, Grad>& block, const float* eps,
                                            int count, Real* gradient_share, Real* noise_share) {
  using math::Update;
#define KD_UPDATE(rule, has_first) \
  update_rounded<rule, has_first, kShares>(n, block, eps, count, gradient_share, noise_share)
  switch (update) {
    case Update::kSgd:
      return block.first != nullptr ? KD_UPDATE(Update::kSgd, true)
                                    : KD_UPDATE(Update::kSgd, false);
    case Update::kAdamW: return KD_UPDATE(Update::kAdamW, true);
    case Update::kSgld: return KD_UPDATE(Update::kSgld, false);
    case Update::kPsgld: return KD_UPDATE(Update::kPsgld, false);
  }
#undef KD_UPDATE
}

template <class Real>
KD_FN double sum_of_squares(const Real* x, int n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int j = 0; j < n; ++j) sum += static_cast<double>(x[j]) * static_cast<double>(x[j]);
  return sum;
}

// Divides a block's gradients by *grad_scale, in place and for the step, and adds the shares' squares to norms. Either
// may be null.
template <class T, class Real>
__attribute__((noinline)) void scaled_and_measured_block(math::Update update,
                                                         const math::UpdateNumbers<Real>& n,
                                                         const UpdateBlock<T, T>& block, T* grad,
                                                         const float* grad_scale, const float* eps,
                                                         int count, double* norms) {
  alignas(64) Real scaled[kMostNumbers], gradient_share[kMostNumbers], noise_share[kMostNumbers];
  for (int j = 0; j < count; ++j) scaled[j] = widen(grad[j]);
  if (grad_scale != nullptr) {
    Real scale = static_cast<Real>(*grad_scale);
    for (int j = 0; j < count; ++j) scaled[j] /= scale;
    for (int j = 0; j < count; ++j) narrow(scaled[j], grad[j]);
  }
  update_block<true>(
      update, n, UpdateBlock<T, Real>{block.param, scaled, block.first, block.second, block.bits},
      eps, count, gradient_share, noise_share);
  if (norms == nullptr) return;
  norms[0] += sum_of_squares(gradient_share, count);
  norms[1] += sum_of_squares(noise_share, count);
}

template <class T>
KD_FN T* shifted(void* x, int64_t i) {
  return x != nullptr ? static_cast<T*>(x) + i : nullptr;
}

template <class T>
void update_of(const UpdateParams& p, const UpdateTensor& tensor, int64_t begin, int64_t end,
               double* norms) {
  using Real = typename Compute<T>::type;
  const math::UpdateRule& rule = p.rules[tensor.rule];
  const math::UpdateNumbers<Real> numbers = math::update_numbers<Real>(
      p.update, rule, p.device_lr != nullptr ? p.device_lr[tensor.rule] : rule.lr,
      p.device_std != nullptr ? p.device_std[tensor.rule] : rule.std,
      tensor.device_step != nullptr ? static_cast<uint64_t>(*tensor.device_step)
                                    : static_cast<uint64_t>(tensor.step));
  const NoiseStream stream = noise_stream(p.source, tensor.stream);
  alignas(64) float eps[kMostNumbers] = {};
  alignas(64) uint16_t bits[kMostNumbers];
  const bool noisy = numbers.std != 0, rounds = sizeof(T) == 2 && numbers.stochastic_rounding;
  // With random words as much as is fetched ahead while they are made.
  const int block_size = noisy    ? kNumbers
                         : rounds ? math::kBitsPerCounter * kCounters
                                  : kMostNumbers;
  auto step = [&](int64_t i, int n, uint64_t counter, int skip) {
    T *param = shifted<T>(tensor.param, i), *grad = shifted<T>(tensor.grad, i),
      *first = shifted<T>(tensor.first, i), *second = shifted<T>(tensor.second, i);
    Fetch fetch = {{param, grad}, 2, 4 * static_cast<int>(sizeof(T))};
    if (first != nullptr) fetch.data[fetch.count++] = first;
    if (second != nullptr) fetch.data[fetch.count++] = second;
    if (noisy) number_block(stream, counter, (n + skip + 3) / 4, fetch, eps);
    if (rounds) {
      if (noisy) fetch.count = 0;
      fetch.bytes *= 2;
      bits_block(stream, math::kWordsForRounding, counter / 2, (n + skip + 7) / 8, fetch, bits);
    }
    UpdateBlock<T, T> block = {param, grad, first, second, rounds ? bits + skip : nullptr};
    if (p.grad_scale == nullptr && norms == nullptr) {
      update_block<false, T, T, Real>(p.update, numbers, block, eps + skip, n, nullptr, nullptr);
    } else {
      scaled_and_measured_block(p.update, numbers, block, grad, p.grad_scale, eps + skip, n, norms);
    }
  };
  if (rounds) {  // blocks begin with a counter of bits, which has the elements of two of numbers
    for_blocks<math::kBitsPerCounter>(
        tensor.offset, begin, end, block_size,
        [&](int64_t i, int n, uint64_t counter, int skip) { step(i, n, 2 * counter, skip); });
  } else {
    for_blocks(tensor.offset, begin, end, block_size, step);
  }
}

void update(const UpdateParams& p, const UpdateTensor& tensor, int64_t begin, int64_t end,
            double* norms) {
  return by_dtype(p.dtype, [&](auto element) {
    return update_of<decltype(element)>(p, tensor, begin, end, norms);
  });
}

}  // namespace
}  // namespace cpu
}  // namespace kdkernels
