// Optimizer steps over contiguous elements, noise included. Included by one file an ISA level.
//
// A block's noise is made in L1 and used at once, so that a step moves what it moves without noise. The formula
// works on computed values, in place: where fp32 and fp64 lie, where 16-bit blocks are widened to.
#pragma once

#include "cpu/noise.h"
#include "math/update.h"

namespace kdkernels {
namespace cpu {
namespace {

// What a step works on; a moment that the rule has not is null.
template <class Real>
struct UpdateBlock {
  Real *param, *grad, *first, *second;
};

template <math::Update kUpdate, bool kFirst, bool kShares, class Real>
void update_loop(const math::UpdateNumbers<Real>& numbers, const UpdateBlock<Real>& block,
                 const float* eps, int count, Real* gradient_share, Real* noise_share) {
  constexpr bool kSecond = kUpdate == math::Update::kAdamW || kUpdate == math::Update::kPsgld;
  // Copies, which no store can change.
  const math::UpdateNumbers<Real> n = numbers;
  Real *param = block.param, *first = block.first, *second = block.second;
  const Real* grad = block.grad;
#pragma omp simd
  for (int j = 0; j < count; ++j) {
    Real x = param[j], m = 0, v = 0;
    if constexpr (kFirst) m = first[j];
    if constexpr (kSecond) v = second[j];
    math::UpdateShares<Real> shares =
        math::update_element<kUpdate>(n, static_cast<Real>(eps[j]), grad[j], x, m, v);
    param[j] = x;
    if constexpr (kFirst) first[j] = m;
    if constexpr (kSecond) second[j] = v;
    if constexpr (kShares) {
      gradient_share[j] = shares.gradient;
      noise_share[j] = shares.noise;
    }
  }
}

template <class Real>
KD_FN double sum_of_squares(const Real* x, int n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int j = 0; j < n; ++j) sum += static_cast<double>(x[j]) * static_cast<double>(x[j]);
  return sum;
}

template <math::Update kUpdate, bool kFirst, class Real>
KD_FN void update_with(const math::UpdateNumbers<Real>& n, const UpdateBlock<Real>& block,
                       const float* eps, int count, double* norms) {
  if (norms == nullptr) {
    return update_loop<kUpdate, kFirst, false, Real>(n, block, eps, count, nullptr, nullptr);
  }
  alignas(64) Real gradient_share[kNumbers], noise_share[kNumbers];
  update_loop<kUpdate, kFirst, true>(n, block, eps, count, gradient_share, noise_share);
  norms[0] += sum_of_squares(gradient_share, count);
  norms[1] += sum_of_squares(noise_share, count);
}

template <class Real>
__attribute__((noinline)) void update_block(math::Update update, const math::UpdateNumbers<Real>& n,
                                            const UpdateBlock<Real>& block, const float* eps,
                                            int count, double* norms) {
  using math::Update;
  switch (update) {
    case Update::kSgd:
      return block.first != nullptr ? update_with<Update::kSgd, true>(n, block, eps, count, norms)
                                    : update_with<Update::kSgd, false>(n, block, eps, count, norms);
    case Update::kAdamW: return update_with<Update::kAdamW, true>(n, block, eps, count, norms);
    case Update::kSgld: return update_with<Update::kSgld, false>(n, block, eps, count, norms);
    case Update::kPsgld: return update_with<Update::kPsgld, false>(n, block, eps, count, norms);
  }
}

// [0, n) of one of a parameter's tensors as computed values; null stays null.
template <class T, class Real>
KD_FN Real* widened(T* x, int n, Real* scratch) {
  if (x == nullptr) return nullptr;
  if constexpr (sizeof(T) == sizeof(Real)) return x;
  for (int j = 0; j < n; ++j) scratch[j] = widen(x[j]);
  return scratch;
}
template <class T, class Real>
KD_FN void put_back(const Real* scratch, int n, T* x) {
  if constexpr (sizeof(T) == sizeof(Real)) return;
  if (x == nullptr) return;
  for (int j = 0; j < n; ++j) narrow(scratch[j], x[j]);
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
  const math::NoiseKey key = key_of(p.source, tensor.stream);
  alignas(64) float eps[kNumbers] = {};
  alignas(64) Real param[kNumbers], grad[kNumbers], first[kNumbers], second[kNumbers];
  for_blocks(tensor.offset, begin, end,
             [&](int64_t i, int n, uint64_t counter, int skip) KD_INLINE_LAMBDA {
    if (numbers.std != 0) {
      number_block(p.source.distribution, key, counter, (n + skip + 3) / 4, eps);
    }
    T *param_at = shifted<T>(tensor.param, i), *grad_at = shifted<T>(tensor.grad, i),
      *first_at = shifted<T>(tensor.first, i), *second_at = shifted<T>(tensor.second, i);
    UpdateBlock<Real> block = {widened(param_at, n, param), widened(grad_at, n, grad),
                               widened(first_at, n, first), widened(second_at, n, second)};
    if (p.grad_scale != nullptr) {
      Real scale = static_cast<Real>(*p.grad_scale);
      for (int j = 0; j < n; ++j) block.grad[j] /= scale;
      put_back(block.grad, n, grad_at);
    }
    update_block(p.update, numbers, block, eps + skip, n, norms);
    put_back(block.param, n, param_at);
    put_back(block.first, n, first_at);
    put_back(block.second, n, second_at);
  });
}

void update(const UpdateParams& p, const UpdateTensor& tensor, int64_t begin, int64_t end,
            double* norms) {
  switch (p.dtype) {
    case Dtype::kFloat32: return update_of<float>(p, tensor, begin, end, norms);
    case Dtype::kFloat64: return update_of<double>(p, tensor, begin, end, norms);
    case Dtype::kBFloat16: return update_of<BFloat16>(p, tensor, begin, end, norms);
    case Dtype::kFloat16: return update_of<Float16>(p, tensor, begin, end, norms);
  }
}

}  // namespace
}  // namespace cpu
}  // namespace kdkernels
