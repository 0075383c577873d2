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

#include "ops/checks.h"
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
  if (on_cuda(out.device())) {
    at::addmm_out(into, into, a, b, out.scalar_type(), beta, alpha);
    return;
  }
  int64_t most = std::min(kPart, out.size(0));
  Tensor part;
  if (!onednn) part = at::empty({most, out.size(1)}, a.options());
  for (int64_t r = 0; r < out.size(0); r += most) {
    int64_t n = std::min(most, out.size(0) - r);
    Tensor rows = out.narrow(0, r, n), of_a = a.narrow(0, r, n);
    Tensor product = onednn ? onednn_product(of_a, b) : part.narrow(0, 0, n);
    if (onednn && beta == 0) {
      at::mul_out(rows, product, c10::scalar_to_tensor(alpha));
    } else if (onednn) {
      rows.add_(product, alpha);
    } else {
      at::mm_out(product, of_a, b);
      add(rows, product, beta, static_cast<float>(alpha));
    }
  }
}

}  // namespace

at::ScalarType product_type(const Tensor& hidden) {
  at::ScalarType type = hidden.scalar_type();
  bool wide = on_cpu(hidden.device()) &&
              (type == at::kHalf || (type == at::kBFloat16 && !has_bf16_products()));
  return wide ? at::kFloat : type;
}

ChunkPlan plan_chunks(int64_t kept, int64_t classes, int64_t bytes, double all_logits,
                      std::optional<int64_t> budget, bool cuda) {
  // Products on a GPU read the whole head a chunk, which hides behind their arithmetic from some thousand rows on; rows
  // that start at 128 bytes, and whole tiles of rows, multiply at full speed.
  constexpr int64_t kPitch = 64, kTile = 128, kLeast = 1024, kMost = 4096;
  constexpr double kLeastBudget = 32 << 20;
  int64_t pitch = cuda ? (classes + kPitch - 1) / kPitch * kPitch : classes;
  double of_row = static_cast<double>(bytes) * static_cast<double>(pitch);
  double most = budget.has_value() ? static_cast<double>(*budget) / of_row
                                   : std::max(all_logits / 25, kLeastBudget) / of_row;
  if (cuda && !budget.has_value()) {
    most = std::clamp(most, static_cast<double>(kLeast), static_cast<double>(kMost));
  }
  kept = std::max<int64_t>(kept, 1);
  int64_t rows = std::clamp<int64_t>(static_cast<int64_t>(std::min(most, 1e15)), 1, kept);
  int64_t chunks = (kept + rows - 1) / rows, even = (kept + chunks - 1) / chunks;
  int64_t tiled = (even + kTile - 1) / kTile * kTile;
  return {cuda && tiled <= rows ? tiled : even, pitch};
}

Head::Head(const Tensor& weight, const std::optional<Tensor>& bias, at::ScalarType product)
    : weight_(weight), product_(product) {
  if (bias.has_value()) bias_ = bias->to(acc_type(weight));
}

void Head::logits(const Tensor& hidden, const Tensor& out) {
  bool cuda = on_cuda(out.device());
  Tensor h = cuda ? hidden : hidden.to(out.scalar_type());
  each_block(cuda ? product_ : out.scalar_type(), [&](int64_t v, const Tensor& weight) {
    Tensor into = out.narrow(1, v, weight.size(0)), w = weight.t();
    if (bias_.defined() && (cuda || for_onednn(into, h.size(1)))) {
      into.copy_(bias_.narrow(0, v, weight.size(0)));
      multiply(into, h, w, 1, 1);
    } else if (bias_.defined()) {
      at::addmm_out(into, bias_.narrow(0, v, weight.size(0)), h, w);
    } else {
      multiply(into, h, w, 0, 1);
    }
  });
}

void Head::hidden_gradient(const Tensor& gradient, double alpha, const Tensor& grad_hidden) {
  each_block(product_, [&](int64_t v, const Tensor& weight) {
    multiply(grad_hidden, gradient.narrow(1, v, weight.size(0)), weight, v == 0 ? 0 : 1, alpha);
  });
}

void Head::weight_gradient(const Tensor& gradient, const Tensor& hidden, double beta, double alpha,
                           const Tensor& grad_weight) {
  const int64_t block = block_of(product_);
  for (int64_t v = 0; v < weight_.size(0); v += block) {
    int64_t n = std::min(block, weight_.size(0) - v);
    multiply(grad_weight.narrow(0, v, n), gradient.narrow(1, v, n).t(), hidden, beta, alpha);
  }
}

void Head::bias_gradient(const Tensor& gradient, double alpha, const Tensor& grad_bias) {
  const int64_t block = block_of(gradient.scalar_type());
  for (int64_t v = 0; v < weight_.size(0); v += block) {
    int64_t n = std::min(block, weight_.size(0) - v);
    grad_bias.narrow(0, v, n).add_(gradient.narrow(1, v, n).sum(0), alpha);
  }
}

int64_t Head::block_of(at::ScalarType type) const {
  bool wide = type == at::kFloat || type == at::kDouble;
  return on_cpu(weight_.device()) && wide ? std::min(kBlock, weight_.size(0)) : weight_.size(0);
}

template <class F>
void Head::each_block(at::ScalarType type, F f) {
  const int64_t classes = weight_.size(0), block = block_of(type);
  if (weight_.scalar_type() != type && !widened_.defined()) {
    widened_ = at::empty({block, weight_.size(1)}, weight_.options().dtype(type));
  }
  for (int64_t v = 0; v < classes; v += block) {
    Tensor w = weight_.narrow(0, v, std::min(block, classes - v));
    f(v, weight_.scalar_type() == type ? w : widened_.narrow(0, 0, w.size(0)).copy_(w));
  }
}

}  // namespace kdkernels
