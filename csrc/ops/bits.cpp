// Dropout and stochastic rounding below autograd: schemas, checks, CPU and CUDA calls, fake tensors.
#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cmath>

#include "ops/checks.h"
#include "ops/devices.h"
#include "ops/noise.h"
#include "ops/tensor_lists.h"

namespace kdkernels {
namespace {

using at::Tensor;
using math::RoundedDtype;

RoundedDtype rounded_dtype(at::ScalarType dtype) {
  switch (dtype) {
    case at::kBFloat16: return RoundedDtype::kBFloat16;
    case at::kHalf: return RoundedDtype::kFloat16;
    case at::kFloat8_e4m3fn: return RoundedDtype::kFloat8E4M3;
    case at::kFloat8_e5m2: return RoundedDtype::kFloat8E5M2;
    default:
      TORCH_CHECK_TYPE(false, "dtype is ", dtype,
                       "; it must be bfloat16, float16, float8_e4m3fn or float8_e5m2");
  }
}

// The bits of one tensor's elements.
ElementBits bits_of(const NoiseNumbers& numbers, const Tensor& x) {
  const NoisePlace place = places_of(numbers, x)[0];
  ElementBits bits = {source_of(numbers, x.device()), place.stream, place.offset, 1, x.numel(), 0};
  if (place.run != 0) {
    bits.rows = x.numel() / place.run;
    bits.run = place.run;
    bits.stride = place.stride;
  }
  return bits;
}

void run_round(const RoundParams& p, const at::Device& device) {
  if (!on_cuda(device)) return cpu::stochastic_round(p, at::get_num_threads());
#if defined(KDKERNELS_WITH_CUDA)
  launch_cuda(device, [&](cudaStream_t s) { return cuda::stochastic_round(p, s); });
#endif
}

void run_dropout(const DropoutParams& p, const at::Device& device) {
  if (!on_cuda(device)) return cpu::dropout(p, at::get_num_threads());
#if defined(KDKERNELS_WITH_CUDA)
  launch_cuda(device, [&](cudaStream_t s) { return cuda::dropout(p, s); });
#endif
}

Tensor dropout_kernel(const Tensor& x, double p, c10::SymIntArrayRef noise,
                      const TensorOptionals& noise_tensors) {
  check_plain("x", x, x);
  check_tensor("x", x);
  TORCH_CHECK_VALUE(p >= 0 && p <= 1, "p is ", p, "; it must be from 0 to 1");
  const NoiseNumbers numbers(noise, noise_tensors, 1);
  DropoutParams params = {};
  params.dtype = dtype_of(x);
  params.dropped = static_cast<uint32_t>(std::lround(p * 65536));
  // Of the elements that are kept, so that the mean is x's whatever p was rounded to.
  params.scale = params.dropped == 65536 ? 0 : 65536.0 / (65536 - params.dropped);
  const Tensor like =
      at::empty_like(x, x.options().dtype(x.scalar_type()), at::MemoryFormat::Preserve);
  if (x.is_meta() || x.numel() == 0) return like;
  return written_in_order(like, [&](void* out) {
    const Tensor in = x.contiguous();
    params.bits = bits_of(numbers, x);
    params.in = in.const_data_ptr();
    params.out = out;
    run_dropout(params, x.device());
  });
}

Tensor stochastic_round_kernel(const Tensor& x, at::ScalarType dtype, c10::SymIntArrayRef noise,
                               const TensorOptionals& noise_tensors) {
  check_plain("x", x, x);
  check_tensor("x", x);
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat, "x has dtype ", x.scalar_type(),
                   "; it must be float32");
  const NoiseNumbers numbers(noise, noise_tensors, 1);
  RoundParams p = {};
  p.dtype = rounded_dtype(dtype);
  const Tensor like = at::empty_like(x, x.options().dtype(dtype), at::MemoryFormat::Preserve);
  if (x.is_meta() || x.numel() == 0) return like;
  return written_in_order(like, [&](void* out) {
    const Tensor in = x.contiguous();
    p.bits = bits_of(numbers, x);
    p.in = in.const_data_ptr<float>();
    p.out = out;
    run_round(p, x.device());
  });
}

}  // namespace

Tensor stochastic_round(const Tensor& x, at::ScalarType dtype, c10::SymIntArrayRef noise,
                        const TensorOptionals& noise_tensors) {
  TORCH_CHECK_VALUE(!x.requires_grad() || !at::GradMode::is_enabled(),
                    "x requires grad, and stochastic_round is not differentiable; call it under "
                    "torch.no_grad()");
  static auto op = dispatched<decltype(stochastic_round)>("kdkernels::stochastic_round");
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return op.call(x, dtype, noise, noise_tensors);
}

TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  m.def("dropout(Tensor x, float p, SymInt[] noise, Tensor?[] noise_tensors) -> Tensor");
  m.def(
      "stochastic_round(Tensor x, ScalarType dtype, SymInt[] noise, Tensor?[] noise_tensors) -> "
      "Tensor");
}
TORCH_LIBRARY_IMPL(kdkernels, CompositeExplicitAutograd, m) {
  m.impl("dropout", dropout_kernel);
  m.impl("stochastic_round", stochastic_round_kernel);
}
TORCH_LIBRARY_IMPL(kdkernels, Autograd, m) { m.impl("stochastic_round", stochastic_round); }

}  // namespace kdkernels
