#include "ops/linear_products.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/ScalarOps.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>

#include <algorithm>

#include "ops/devices.h"

namespace kdkernels {

using at::Tensor;

namespace {

// On CPUs products of a few hundred rows with a whole head are made in blocks of classes, which stay in cache.
constexpr int64_t kBlock = 2048;
// Rows of a product that is made before it is added to others.
constexpr int64_t kPart = 512;
const c10::OperatorName kOneDnnLinear("mkldnn::_linear_pointwise", "");

bool has_bf16_products() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

// into = beta * into + alpha * x, both contiguous and beta 0 or 1; torch's own would first make a copy of x in fp32.
void add(const Tensor& into, const Tensor& x, double beta, float alpha) {
  auto* out = into.mutable_data_ptr<float>();
  const auto* in = x.const_data_ptr<at::BFloat16>();
  at::parallel_for(0, into.numel(), 1 << 15, [=](int64_t begin, int64_t end) {
    if (beta == 0) {
      for (int64_t i = begin; i < end; ++i) out[i] = alpha * static_cast<float>(in[i]);
    } else {
      for (int64_t i = begin; i < end; ++i) out[i] += alpha * static_cast<float>(in[i]);
    }
  });
}

// Whether a product of fp32 on a CPU is for oneDNN: torch takes MKL, which keeps to AVX2 on CPUs that are not Intel's,
// and makes half as many in a second. Not for small ones, of which oneDNN compiles a kernel for each new shape.
bool for_onednn(const Tensor& out, int64_t inner) {
#if defined(__x86_64__)
  static const bool faster = __builtin_cpu_is("amd") && __builtin_cpu_supports("avx512f") &&
                             c10::Dispatcher::singleton().findSchema(kOneDnnLinear).has_value();
  return faster && on_cpu(out.device()) && out.scalar_type() == at::kFloat &&
         out.numel() * inner >= int64_t{1} << 26 && at::globalContext().userEnabledMkldnn();
#else
  return false;
#endif
}

// a @ b by oneDNN, which torch has for torch.compile's linear layers only.
Tensor onednn_product(const Tensor& a, const Tensor& b) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(
      kOneDnnLinear.name.c_str(), kOneDnnLinear.overload_name.c_str());
  torch::jit::Stack stack = {
      a, b.t(), c10::IValue(), "none", c10::List<std::optional<at::Scalar>>(), c10::IValue()};
  op.callBoxed(stack);
  return stack[0].toTensor();
}

// out = beta * out + alpha * a @ b with beta 0 or 1, summed in acc; out is in the dtype of a or in acc.
void multiply(const Tensor& out, const Tensor& a, const Tensor& b, double beta, double alpha) {
  Tensor into = out;
  bool same = out.scalar_type() == a.scalar_type(), onednn = same && for_onednn(out, a.size(1));
  if (same && !onednn) {
    at::addmm_out(into, into, a, b, beta, alpha);
    return;
  }
  // CUDA sums in fp32 and rounds nothing; addmm with such an output is refused by some versions of torch.
  bool cuda = on_cuda(out.device());
  int64_t most = std::min(cuda ? 16 * kPart : kPart, out.size(0));
  Tensor part;
  if (!onednn) part = at::empty({most, out.size(1)}, cuda ? out.options() : a.options());
  for (int64_t r = 0; r < out.size(0); r += most) {
    int64_t n = std::min(most, out.size(0) - r);
    Tensor rows = out.narrow(0, r, n), of_a = a.narrow(0, r, n);
    Tensor product = onednn ? onednn_product(of_a, b) : part.narrow(0, 0, n);
    if (onednn && beta == 0) {
      at::mul_out(rows, product, c10::scalar_to_tensor(alpha));
    } else if (onednn) {
      rows.add_(product, alpha);
    } else if (cuda) {
      at::mm_out(product, of_a, b, out.scalar_type());
      if (beta == 0) rows.zero_();
      rows.add_(product, alpha);
    } else {
      at::mm_out(product, of_a, b);
      add(rows, product, beta, static_cast<float>(alpha));
    }
  }
}

}  // namespace

at::ScalarType work_type(const Tensor& hidden) {
  at::ScalarType type = hidden.scalar_type();
  bool wide = on_cpu(hidden.device()) &&
              (type == at::kHalf || (type == at::kBFloat16 && !has_bf16_products()));
  return wide ? at::kFloat : type;
}

Head::Head(const Tensor& weight, const std::optional<Tensor>& bias, at::ScalarType work)
    : weight_(weight),
      classes_(weight.size(0)),
      block_(on_cpu(weight.device()) && (work == at::kFloat || work == at::kDouble)
                 ? std::min(kBlock, classes_)
                 : classes_) {
  if (bias.has_value()) bias_ = bias->to(work);
  if (weight.scalar_type() != work) {
    widened_ = at::empty({block_, weight.size(1)}, weight.options().dtype(work));
  }
}

void Head::logits(const Tensor& hidden, const Tensor& out) {
  for (int64_t v = 0; v < classes_; v += block_) {
    int64_t n = std::min(block_, classes_ - v);
    Tensor into = out.narrow(1, v, n), w = rows(v, n).t();
    if (for_onednn(into, hidden.size(1))) {
      if (bias_.defined()) into.copy_(bias_.narrow(0, v, n));
      multiply(into, hidden, w, bias_.defined() ? 1 : 0, 1);
    } else if (bias_.defined()) {
      at::addmm_out(into, bias_.narrow(0, v, n), hidden, w);
    } else {
      at::mm_out(into, hidden, w);
    }
  }
}

void Head::hidden_gradient(const Tensor& gradient, double alpha, const Tensor& grad_hidden) {
  for (int64_t v = 0; v < classes_; v += block_) {
    int64_t n = std::min(block_, classes_ - v);
    multiply(grad_hidden, gradient.narrow(1, v, n), rows(v, n), v == 0 ? 0 : 1, alpha);
  }
}

void Head::weight_gradient(const Tensor& gradient, const Tensor& hidden, double beta, double alpha,
                           const Tensor& grad_weight) {
  for (int64_t v = 0; v < classes_; v += block_) {
    int64_t n = std::min(block_, classes_ - v);
    multiply(grad_weight.narrow(0, v, n), gradient.narrow(1, v, n).t(), hidden, beta, alpha);
  }
}

void Head::bias_gradient(const Tensor& gradient, double alpha, const Tensor& grad_bias) {
  // A sum in fp32 of 16 bits makes a copy.
  int64_t step = on_cpu(gradient.device()) ? kBlock : classes_;
  for (int64_t v = 0; v < classes_; v += step) {
    int64_t n = std::min(step, classes_ - v);
    grad_bias.narrow(0, v, n).add_(gradient.narrow(1, v, n).sum(0, false, grad_bias.scalar_type()),
                                   alpha);
  }
}

Tensor Head::rows(int64_t from, int64_t n) {
  Tensor w = weight_.narrow(0, from, n);
  return widened_.defined() ? widened_.narrow(0, 0, n).copy_(w) : w;
}

}  // namespace kdkernels
