// The noise ops: schemas, argument checks, CPU and CUDA calls, autograd, fake tensors.
//
// No op keeps noise for backward: whoever needs it again makes it again from the same NoiseArgs.
#include "ops/noise.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "ops/checks.h"
#include "ops/devices.h"

namespace kdkernels {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The tail that every schema shares, and its C++ parameters and arguments.
#define KD_NOISE_SCHEMA \
  "SymInt seed, SymInt step=0, SymInt stream=0, SymInt offset=0, Tensor? seed_tensor=None, " \
  "Tensor? step_tensor=None"
#define KD_NOISE_PARAMS \
  c10::SymInt seed, c10::SymInt step, c10::SymInt stream, c10::SymInt offset, \
      const OptionalTensor &seed_tensor, const OptionalTensor &step_tensor
#define KD_NOISE_ARGS {seed, step, stream, offset, seed_tensor, step_tensor}
#define KD_SPREAD(noise) \
  noise.seed, noise.step, noise.stream, noise.offset, noise.seed_tensor, noise.step_tensor

// The numbers behind NoiseArgs once a kernel is about to run.
struct Numbers {
  uint32_t seed_low, seed_high, step, stream;
  uint64_t offset;
  const int64_t* device_step;
};

uint32_t checked_u32(const char* name, int64_t value) {
  TORCH_CHECK_VALUE(value >= 0 && value <= 0xFFFFFFFFLL, name, " is ", value,
                    "; it takes 0 to 2^32 - 1");
  return static_cast<uint32_t>(value);
}

void check_scalar(const char* name, const Tensor& tensor) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kLong, name, " has dtype ", tensor.scalar_type(),
                   "; as a tensor it takes int64");
  TORCH_CHECK_VALUE(tensor.sym_numel() == 1, name, " has shape ", tensor.sym_sizes(),
                    "; as a tensor it takes one element");
}

Numbers numbers(const NoiseArgs& noise, const at::Device& device) {
  Numbers n = {};
  int64_t seed = noise.seed.expect_int();
  if (noise.seed_tensor.has_value()) {
    check_scalar("seed", *noise.seed_tensor);
    TORCH_CHECK_VALUE(noise.seed_tensor->is_cpu(), "seed is on ", noise.seed_tensor->device(),
                      "; as a tensor it takes a CPU one");
    seed = *noise.seed_tensor->const_data_ptr<int64_t>();
  }
  n.seed_low = static_cast<uint32_t>(static_cast<uint64_t>(seed));
  n.seed_high = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
  int64_t step = noise.step.expect_int();
  if (noise.step_tensor.has_value()) {
    const Tensor& tensor = *noise.step_tensor;
    check_scalar("step", tensor);
    if (tensor.is_cpu() && !on_cuda(tensor.device())) {
      step = *tensor.const_data_ptr<int64_t>();
    } else {
      TORCH_CHECK_VALUE(tensor.device() == device, "step is on ", tensor.device(),
                        " and the noise on ", device,
                        "; as a tensor it takes that device or the CPU");
      n.device_step = tensor.const_data_ptr<int64_t>();
    }
  }
  n.step = checked_u32("step", step);
  n.stream = checked_u32("stream", noise.stream.expect_int());
  int64_t offset = noise.offset.expect_int();
  TORCH_CHECK_VALUE(offset >= 0, "offset is ", offset, "; it takes 0 or more");
  n.offset = static_cast<uint64_t>(offset);
  return n;
}

void check_std(double std) {
  TORCH_CHECK_VALUE(std >= 0 && std::isfinite(std), "std is ", std,
                    "; it takes a finite number, 0 or more");
}

void check_std_tensor(const Tensor& std, const Tensor& x) {
  TORCH_CHECK_TYPE(is_floating_dtype(std.scalar_type()), "std has dtype ", std.scalar_type(),
                   "; as a tensor it takes float32, float64, bfloat16 or float16");
  TORCH_CHECK_VALUE(std.sym_numel() == 1, "std has shape ", std.sym_sizes(),
                    "; as a tensor it takes one element");
  check_device("std", std, "x", x);
}

// All tensors on one device; one launch a dtype.
void run_noise(const std::vector<NoiseTensor>& tensors, const std::vector<Dtype>& dtypes,
               const Numbers& n, const at::Device& device, const double* device_std) {
  for (Dtype dtype : {Dtype::kFloat32, Dtype::kFloat64, Dtype::kBFloat16, Dtype::kFloat16}) {
    std::vector<NoiseTensor> group;
    for (size_t i = 0; i < tensors.size(); ++i) {
      if (dtypes[i] == dtype && tensors[i].numel > 0) group.push_back(tensors[i]);
    }
    if (group.empty()) continue;
    NoiseParams p = {dtype,         group.data(), static_cast<int64_t>(group.size()),
                     n.seed_low,    n.seed_high,  n.step,
                     n.device_step, device_std};
    if (!on_cuda(device)) {
      cpu::noise(p, at::get_num_threads());
    } else {
#if defined(KDKERNELS_WITH_CUDA)
      launch_cuda(device, [&](cudaStream_t s) { return cuda::noise(p, s); });
#endif
    }
  }
}

// x + std * eps, or std * eps alone: the op behind the others.
Tensor noise_forward(const Tensor& x, bool add, const OptionalTensor& std_tensor, double std,
                     KD_NOISE_PARAMS) {
  NoiseArgs noise = KD_NOISE_ARGS;
  // Elements count in row-major order, whatever the strides; noise alone needs none of x's values.
  Tensor in = add ? x.contiguous() : x;
  Tensor out = at::empty_like(x, x.options(), at::MemoryFormat::Contiguous);
  if (x.is_meta()) return out;
  Numbers n = numbers(noise, x.device());
  const double* device_std = nullptr;
  Tensor on_device;
  if (std_tensor.has_value()) {
    if (!on_cuda(x.device())) {
      std = std_tensor->item<double>();
    } else {
      on_device = std_tensor->to(at::kDouble);
      device_std = on_device.const_data_ptr<double>();
    }
  }
  NoiseTensor tensor = {out.mutable_data_ptr(),
                        add ? in.const_data_ptr() : nullptr,
                        x.numel(),
                        std,
                        n.offset,
                        n.stream};
  run_noise({tensor}, {dtype_of(x)}, n, x.device(), device_std);
  return out;
}

Tensor noise_dot_forward(const Tensor& x, KD_NOISE_PARAMS) {
  NoiseArgs noise = KD_NOISE_ARGS;
  Tensor in = x.contiguous();
  Tensor out = at::empty({}, x.options().dtype(acc_type(x)));
  if (x.is_meta()) return out;
  Numbers n = numbers(noise, x.device());
  NoiseDotParams p = {dtype_of(x),
                      in.const_data_ptr(),
                      in.numel(),
                      n.offset,
                      {n.seed_low, n.seed_high, n.stream, n.step},
                      n.device_step,
                      out.mutable_data_ptr(),
                      nullptr};
  if (!on_cuda(x.device())) {
    cpu::noise_dot(p, at::get_num_threads());
  } else {
#if defined(KDKERNELS_WITH_CUDA)
    Tensor partial = at::empty({cuda::kNoiseDotBlocks}, x.options().dtype(at::kDouble));
    p.partial = partial.mutable_data_ptr<double>();
    launch_cuda(x.device(), [&](cudaStream_t s) { return cuda::noise_dot(p, s); });
#endif
  }
  return out;
}

template <class Signature>
c10::TypedOperatorHandle<Signature> op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

Tensor dispatch_noise(const Tensor& x, bool add, const OptionalTensor& std_tensor, double std,
                      const NoiseArgs& noise) {
  static auto handle = op<decltype(noise_forward)>("kdkernels::_noise");
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return handle.call(x, add, std_tensor, std, KD_SPREAD(noise));
}

// NoiseArgs between forward and backward.
void save_noise(AutogradContext* ctx, const NoiseArgs& noise) {
  ctx->saved_data["seed"] = noise.seed;
  ctx->saved_data["step"] = noise.step;
  ctx->saved_data["stream"] = noise.stream;
  ctx->saved_data["offset"] = noise.offset;
}

NoiseArgs saved_noise(AutogradContext* ctx, const Tensor& seed_tensor, const Tensor& step_tensor) {
  NoiseArgs noise = {ctx->saved_data["seed"].toSymInt(),
                     ctx->saved_data["step"].toSymInt(),
                     ctx->saved_data["stream"].toSymInt(),
                     ctx->saved_data["offset"].toSymInt(),
                     {},
                     {}};
  if (seed_tensor.defined()) noise.seed_tensor = seed_tensor;
  if (step_tensor.defined()) noise.step_tensor = step_tensor;
  return noise;
}

// A step tensor may be advanced in place before backward: keep its value of now.
Tensor snapshot(const OptionalTensor& tensor) {
  return tensor.has_value() ? tensor->clone() : Tensor();
}

// sum eps_i x_i; linear in x, so its gradient is eps.
struct NoiseDot : torch::autograd::Function<NoiseDot> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const NoiseArgs& noise) {
    save_noise(ctx, noise);
    ctx->save_for_backward({x, snapshot(noise.seed_tensor), snapshot(noise.step_tensor)});
    static auto handle = op<decltype(noise_dot_forward)>("kdkernels::_noise_dot");
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return handle.call(x, KD_SPREAD(noise));
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list saved = ctx->get_saved_variables();
    NoiseArgs noise = saved_noise(ctx, saved[1], saved[2]);
    Tensor eps = dispatch_noise(saved[0], false, std::nullopt, 1.0, noise);
    return {(eps * grads[0]).to(saved[0].scalar_type()), Tensor()};
  }
};

struct InputNoise : torch::autograd::Function<InputNoise> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& std_tensor,
                        double std, const NoiseArgs& noise) {
    save_noise(ctx, noise);
    ctx->save_for_backward(
        {std_tensor.value_or(Tensor()), snapshot(noise.seed_tensor), snapshot(noise.step_tensor)});
    return dispatch_noise(x, true, std_tensor, std, noise);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list saved = ctx->get_saved_variables();
    Tensor std_gradient;
    if (saved[0].defined() && ctx->needs_input_grad(1)) {
      Tensor sum = NoiseDot::apply(grads[0], saved_noise(ctx, saved[1], saved[2]));
      std_gradient = sum.to(saved[0].scalar_type()).reshape_symint(saved[0].sym_sizes());
    }
    return {grads[0], std_gradient, Tensor(), Tensor()};
  }
};

struct GradientNoise : torch::autograd::Function<GradientNoise> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, double std, const NoiseArgs& noise) {
    save_noise(ctx, noise);
    ctx->saved_data["std"] = std;
    ctx->save_for_backward({snapshot(noise.seed_tensor), snapshot(noise.step_tensor)});
    return x.view_as(x);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list saved = ctx->get_saved_variables();
    NoiseArgs noise = saved_noise(ctx, saved[0], saved[1]);
    // Through the differentiable op: the second derivative is the identity again.
    Tensor noisy = input_noise(grads[0], std::nullopt, ctx->saved_data["std"].toDouble(), noise);
    return {noisy, Tensor(), Tensor()};
  }
};

// Ranges that are known before a kernel runs, checked early so that an error precedes any work.
void check_args(const NoiseArgs& noise) {
  auto u32 = [](const char* name, const c10::SymInt& value) {
    if (std::optional<int64_t> known = value.maybe_as_int()) checked_u32(name, *known);
  };
  if (!noise.step_tensor.has_value()) u32("step", noise.step);
  u32("stream", noise.stream);
  std::optional<int64_t> offset = noise.offset.maybe_as_int();
  TORCH_CHECK_VALUE(!offset.has_value() || *offset >= 0, "offset is ", noise.offset,
                    "; it takes 0 or more");
}

void check_input(const Tensor& x, const OptionalTensor& std_tensor, double std,
                 const NoiseArgs& noise) {
  check_tensor("x", x);
  check_std(std);
  check_args(noise);
  if (std_tensor.has_value()) check_std_tensor(*std_tensor, x);
}

Tensor input_noise_autograd(const Tensor& x, const OptionalTensor& std_tensor, double std,
                            KD_NOISE_PARAMS) {
  NoiseArgs noise = KD_NOISE_ARGS;
  check_input(x, std_tensor, std, noise);
  return InputNoise::apply(x, std_tensor, std, noise);
}
Tensor input_noise_no_autograd(const Tensor& x, const OptionalTensor& std_tensor, double std,
                               KD_NOISE_PARAMS) {
  NoiseArgs noise = KD_NOISE_ARGS;
  check_input(x, std_tensor, std, noise);
  return dispatch_noise(x, true, std_tensor, std, noise);
}

Tensor gradient_noise_autograd(const Tensor& x, double std, KD_NOISE_PARAMS) {
  NoiseArgs noise = KD_NOISE_ARGS;
  check_input(x, std::nullopt, std, noise);
  return GradientNoise::apply(x, std, noise);
}
Tensor gradient_noise_no_autograd(const Tensor& x, double std, KD_NOISE_PARAMS) {
  NoiseArgs noise = KD_NOISE_ARGS;
  check_input(x, std::nullopt, std, noise);
  return x.view_as(x);
}

Tensor randn_like_impl(const Tensor& x, KD_NOISE_PARAMS) {
  NoiseArgs noise = KD_NOISE_ARGS;
  check_tensor("x", x);
  check_args(noise);
  return dispatch_noise(x.detach(), false, std::nullopt, 1.0, noise);
}

// Two threads would write where two tensors overlap.
void check_apart(const std::vector<NoiseTensor>& list, const std::vector<Dtype>& dtypes) {
  struct Range {
    const char *begin, *end;
    size_t index;
  };
  std::vector<Range> ranges;
  for (size_t i = 0; i < list.size(); ++i) {
    int64_t bytes = dtypes[i] == Dtype::kFloat64 ? 8 : dtypes[i] == Dtype::kFloat32 ? 4 : 2;
    const char* begin = static_cast<const char*>(list[i].out);
    if (list[i].numel > 0) ranges.push_back({begin, begin + list[i].numel * bytes, i});
  }
  std::sort(ranges.begin(), ranges.end(),
            [](const Range& a, const Range& b) { return a.begin < b.begin; });
  for (size_t i = 1; i < ranges.size(); ++i) {
    TORCH_CHECK_VALUE(ranges[i - 1].end <= ranges[i].begin, "tensors[", ranges[i].index,
                      "] shares memory with tensors[", ranges[i - 1].index,
                      "]; call add_noise_ for one after the other");
  }
}

void add_noise_impl(at::TensorList tensors, at::ArrayRef<double> std, KD_NOISE_PARAMS) {
  NoiseArgs noise = KD_NOISE_ARGS;
  TORCH_CHECK_VALUE(std.size() == 1 || std.size() == tensors.size(), "std has ", std.size(),
                    " numbers for ", tensors.size(), " tensors; it takes one, or one a tensor");
  for (double s : std) check_std(s);
  check_args(noise);
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& tensor = tensors[i];
    check_tensor("tensors", tensor);
    check_device("tensors", tensor, "the first of them", tensors[0]);
    TORCH_CHECK_VALUE(tensor.is_meta() || at::has_internal_overlap(tensor) != at::MemOverlap::Yes,
                      "tensors[", i, "] of shape ", tensor.sym_sizes(),
                      " has elements that share memory; pass a clone");
  }
  if (tensors.empty() || tensors[0].is_meta()) return;
  Numbers n = numbers(noise, tensors[0].device());
  TORCH_CHECK_VALUE(n.stream + static_cast<uint64_t>(tensors.size()) - 1 <= 0xFFFFFFFFULL,
                    "stream is ", n.stream, "; with ", tensors.size(),
                    " tensors the last stream exceeds 2^32 - 1");
  std::vector<NoiseTensor> list;
  std::vector<Dtype> dtypes;
  std::vector<std::pair<Tensor, Tensor>> copies;
  for (size_t i = 0; i < tensors.size(); ++i) {
    Tensor dense = tensors[i].contiguous();
    if (!tensors[i].is_contiguous()) copies.emplace_back(tensors[i], dense);
    void* data = dense.mutable_data_ptr();
    list.push_back({data, data, dense.numel(), std[std.size() == 1 ? 0 : i], n.offset,
                    static_cast<uint32_t>(n.stream + i)});
    dtypes.push_back(dtype_of(dense));
  }
  check_apart(list, dtypes);
  run_noise(list, dtypes, n, tensors[0].device(), nullptr);
  for (auto& [tensor, dense] : copies) tensor.copy_(dense);
  for (const Tensor& tensor : tensors) {
    if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
  }
}

void add_noise_autograd(at::TensorList tensors, at::ArrayRef<double> std, KD_NOISE_PARAMS) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    TORCH_CHECK_VALUE(
        !(at::GradMode::is_enabled() && tensors[i].requires_grad()), "tensors[", i,
        "] requires grad, and add_noise_ writes in place; call it under torch.no_grad()");
  }
  static auto handle = op<decltype(add_noise_impl)>("kdkernels::add_noise_");
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  handle.call(tensors, std, seed, step, stream, offset, seed_tensor, step_tensor);
}

}  // namespace

Tensor randn_like(const Tensor& x, const NoiseArgs& noise) {
  static auto handle = op<decltype(randn_like_impl)>("kdkernels::randn_like");
  return handle.call(x, KD_SPREAD(noise));
}

void add_noise_(const std::vector<Tensor>& tensors, const std::vector<double>& std,
                const NoiseArgs& noise) {
  static auto handle = op<decltype(add_noise_impl)>("kdkernels::add_noise_");
  handle.call(tensors, std, KD_SPREAD(noise));
}

Tensor input_noise(const Tensor& x, const OptionalTensor& std_tensor, double std,
                   const NoiseArgs& noise) {
  static auto handle = op<decltype(input_noise_autograd)>("kdkernels::input_noise");
  return handle.call(x, std_tensor, std, KD_SPREAD(noise));
}

Tensor gradient_noise(const Tensor& x, double std, const NoiseArgs& noise) {
  static auto handle = op<decltype(gradient_noise_autograd)>("kdkernels::gradient_noise");
  return handle.call(x, std, KD_SPREAD(noise));
}

TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  m.def("randn_like(Tensor x, *, " KD_NOISE_SCHEMA ") -> Tensor");
  m.def("add_noise_(Tensor(a!)[] tensors, float[] std, *, " KD_NOISE_SCHEMA ") -> ()");
  m.def("input_noise(Tensor x, Tensor? std_tensor, float std, *, " KD_NOISE_SCHEMA ") -> Tensor");
  m.def("gradient_noise(Tensor(a) x, float std, *, " KD_NOISE_SCHEMA ") -> Tensor(a)");
  m.def("_noise(Tensor x, bool add, Tensor? std_tensor, float std, *, " KD_NOISE_SCHEMA
        ") -> Tensor");
  m.def("_noise_dot(Tensor x, *, " KD_NOISE_SCHEMA ") -> Tensor");
}
TORCH_LIBRARY_IMPL(kdkernels, CompositeExplicitAutograd, m) {
  m.impl("randn_like", randn_like_impl);
  m.impl("add_noise_", add_noise_impl);
  m.impl("input_noise", input_noise_no_autograd);
  m.impl("gradient_noise", gradient_noise_no_autograd);
  m.impl("_noise", noise_forward);
  m.impl("_noise_dot", noise_dot_forward);
}
TORCH_LIBRARY_IMPL(kdkernels, Autograd, m) {
  m.impl("randn_like", randn_like_impl);
  m.impl("add_noise_", add_noise_autograd);
  m.impl("input_noise", input_noise_autograd);
  m.impl("gradient_noise", gradient_noise_autograd);
}

}  // namespace kdkernels
