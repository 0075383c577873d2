// noisy_linear_regression: schema, argument checks, CPU and CUDA calls, fake tensors.
#include "ops/regression.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "ops/checks.h"
#include "ops/devices.h"

namespace kdkernels {
namespace {

using at::Tensor;

void check_replicas(const char* name, const Tensor& tensor, at::ScalarType dtype,
                    const Tensor& like) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, name, " has dtype ", tensor.scalar_type(),
                   "; it must be ", dtype);
  TORCH_CHECK_VALUE(tensor.dim() == 1 && tensor.sym_numel() == like.sym_numel(), name,
                    " has shape ", tensor.sym_sizes(), "; it must have one number per replica, [",
                    like.sym_numel(), "]");
}

Tensor regression(const Tensor& x, const Tensor& y, const Tensor& theta, const Tensor& lr,
                  const Tensor& lam, const Tensor& sigma, const Tensor& seed, int64_t steps,
                  int64_t stream, bool per_sample, bool trajectory) {
  check_tensor("x", x);
  check_tensor("y", y);
  TORCH_CHECK_VALUE(x.dim() == 1 && x.sym_numel() >= 1, "x has shape ", x.sym_sizes(),
                    "; it must be [samples] with at least one sample");
  TORCH_CHECK_VALUE(y.sym_sizes() == x.sym_sizes(), "y has shape ", y.sym_sizes(),
                    "; it must have that of x, ", x.sym_sizes());
  TORCH_CHECK_VALUE(steps >= 0 && steps <= 0xFFFFFFFFLL, "steps is ", steps,
                    "; it must be from 0 to 2^32 - 1");
  TORCH_CHECK_VALUE(stream >= 0 && stream <= 0xFFFFFFFFLL, "stream is ", stream,
                    "; it must be from 0 to 2^32 - 1");
  check_replicas("seed", seed, at::kLong, theta);
  const std::pair<const char*, const Tensor*> numbers[] = {
      {"theta", &theta}, {"lr", &lr}, {"lam", &lam}, {"sigma", &sigma}};
  for (auto& [name, tensor] : numbers) {
    check_replicas(name, *tensor, at::kDouble, theta);
    check_device(name, *tensor, "x", x);
  }
  check_device("y", y, "x", x);
  check_device("seed", seed, "x", x);
  c10::SymInt replicas = theta.sym_numel();
  Tensor result = at::empty_symint({replicas}, theta.options());
  Tensor path;
  if (trajectory) path = at::empty_symint({steps + 1, replicas}, theta.options());
  if (x.is_meta()) return trajectory ? path : result;

  Tensor x64 = x.detach().to(at::kDouble).contiguous(),
         y64 = y.detach().to(at::kDouble).contiguous();
  Tensor theta_c = theta.contiguous(), lr_c = lr.contiguous(), lam_c = lam.contiguous();
  Tensor sigma_c = sigma.contiguous(), seed_c = seed.contiguous();
  RegressionParams p = {};
  p.x = x64.const_data_ptr<double>();
  p.y = y64.const_data_ptr<double>();
  p.samples = x64.numel();
  p.replicas = theta_c.numel();
  p.steps = steps;
  p.per_sample = per_sample;
  p.seed = seed_c.const_data_ptr<int64_t>();
  p.theta = theta_c.const_data_ptr<double>();
  p.lr = lr_c.const_data_ptr<double>();
  p.lam = lam_c.const_data_ptr<double>();
  p.sigma = sigma_c.const_data_ptr<double>();
  p.stream = static_cast<uint32_t>(stream);
  p.result = result.mutable_data_ptr<double>();
  p.trajectory = trajectory ? path.mutable_data_ptr<double>() : nullptr;
  if (!on_cuda(x.device())) {
    cpu::regression(p, at::get_num_threads());
  } else {
#if defined(KDKERNELS_WITH_CUDA)
    launch_cuda(x.device(), [&](cudaStream_t s) { return cuda::regression(p, s); });
#endif
  }
  return trajectory ? path : result;
}

}  // namespace

Tensor noisy_linear_regression(const Tensor& x, const Tensor& y, const Tensor& theta,
                               const Tensor& lr, const Tensor& lam, const Tensor& sigma,
                               const Tensor& seed, int64_t steps, int64_t stream, bool per_sample,
                               bool trajectory) {
  static auto handle = dispatched<decltype(regression)>("kdkernels::noisy_linear_regression");
  return handle.call(x, y, theta, lr, lam, sigma, seed, steps, stream, per_sample, trajectory);
}

TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  m.def(
      "noisy_linear_regression(Tensor x, Tensor y, Tensor theta, Tensor lr, Tensor lam, Tensor "
      "sigma, Tensor seed, int steps, int stream, bool per_sample, bool trajectory) -> Tensor");
}
TORCH_LIBRARY_IMPL(kdkernels, CompositeExplicitAutograd, m) {
  m.impl("noisy_linear_regression", regression);
}

}  // namespace kdkernels
