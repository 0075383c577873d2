// The noise ops' autograd Functions. Each keeps the numbers of its noise, never the noise.
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/checks.h"
#include "ops/noise.h"
#include "ops/tensor_lists.h"

namespace kdkernels {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The arguments of NoiseNumbers, which autograd keeps.
struct KeptNoise {
  std::vector<c10::SymInt> numbers;
  OptionalTensor seed, step;

  KeptNoise(c10::SymIntArrayRef noise, const TensorOptionals& tensors)
      : numbers(noise.vec()), seed(tensor_at(tensors, 0)), step(tensor_at(tensors, 1)) {}

  TensorOptionals tensors() const {
    return seed.has_value() || step.has_value() ? TensorOptionals({seed, step}) : TensorOptionals();
  }
  bool has_rows() const {
    auto several = [](const OptionalTensor& x) { return x.has_value() && x->sym_numel() != 1; };
    return several(seed) || several(step) || (seed.has_value() && !seed->is_cpu());
  }
  // A step tensor may be advanced in place before backward: its value of now is kept.
  static Tensor snapshot(const OptionalTensor& tensor) {
    return tensor.has_value() ? tensor->clone() : Tensor();
  }
  // Keeps the noise and `saved`, behind which its tensors come.
  void save(AutogradContext* ctx, variable_list saved = {}) const {
    ctx->saved_data["noise"] = c10::SymIntArrayRef(numbers);
    saved.push_back(snapshot(seed));
    saved.push_back(snapshot(step));
    ctx->save_for_backward(std::move(saved));
  }
  // The inverse; `saved` is left with what came before the tensors.
  KeptNoise(AutogradContext* ctx, variable_list& saved)
      : numbers(ctx->saved_data["noise"].toSymIntVector()) {
    saved = ctx->get_saved_variables();
    for (OptionalTensor* tensor : {&step, &seed}) {
      if (saved.back().defined()) *tensor = saved.back();
      saved.pop_back();
    }
  }
};

Tensor dispatch_noise(const Tensor& x, NoiseMode mode, const OptionalTensor& std_tensor, double std,
                      const KeptNoise& noise) {
  static auto op = dispatched<decltype(apply_noise)>("kdkernels::_noise");
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return op.call(x, static_cast<int64_t>(mode), std_tensor, std, noise.numbers, noise.tensors());
}

Tensor dot(at::TensorList tensors, const KeptNoise& noise);

// Linear in the scales; its adjoint is noise_dot.
struct ScaledNoise : torch::autograd::Function<ScaledNoise> {
  static variable_list forward(AutogradContext* ctx, at::TensorList tensors, const Tensor& scales,
                               const KeptNoise& noise) {
    noise.save(ctx);
    ctx->saved_data["tensors"] = static_cast<int64_t>(tensors.size());
    static auto op = dispatched<decltype(scaled_noise)>("kdkernels::_scaled_noise");
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return op.call(tensors, scales, noise.numbers, noise.tensors());
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list none, out(ctx->saved_data["tensors"].toInt() + 2);
    out[out.size() - 2] = dot(grads, KeptNoise(ctx, none));
    return out;
  }
};

// Shape, dtype and device of a tensor, on the storage of one element.
Tensor outline(const Tensor& tensor) {
  return at::empty({}, tensor.options()).expand_symint(tensor.sym_sizes());
}

// sum eps_i x_i of each tensor; linear in it, so its gradient is eps.
struct NoiseDot : torch::autograd::Function<NoiseDot> {
  static Tensor forward(AutogradContext* ctx, at::TensorList tensors, const KeptNoise& noise) {
    variable_list saved;
    for (const Tensor& tensor : tensors) saved.push_back(outline(tensor));
    noise.save(ctx, std::move(saved));
    static auto op = dispatched<decltype(noise_dot)>("kdkernels::noise_dot");
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return op.call(tensors, noise.numbers, noise.tensors());
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list likes, wanted, of_wanted;
    KeptNoise noise(ctx, likes);
    std::vector<size_t> members;
    for (size_t i = 0; i < likes.size(); ++i) {
      if (ctx->needs_input_grad(i)) members.push_back(i);
    }
    for (size_t i : members) wanted.push_back(likes[i]);
    Tensor scales = grads[0];
    if (members.size() != likes.size()) {
      for (size_t i : members) of_wanted.push_back(scales.select(0, i));
      scales = at::stack(of_wanted);
      noise.numbers = noise_of_members({noise.numbers, noise.tensors(), likes.size()}, members);
    }
    // As a TensorList: each of its tensors then counts as an input.
    variable_list made = ScaledNoise::apply(at::TensorList(wanted), scales, noise);
    variable_list out(likes.size() + 1);
    for (size_t j = 0; j < members.size(); ++j) out[members[j]] = made[j];
    return out;
  }
};

Tensor dot(at::TensorList tensors, const KeptNoise& noise) {
  return NoiseDot::apply(tensors, noise);
}

// x * eps; linear in x, and its own adjoint.
struct NoiseTimes : torch::autograd::Function<NoiseTimes> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const KeptNoise& noise) {
    noise.save(ctx);
    return dispatch_noise(x, NoiseMode::kTimes, std::nullopt, 1.0, noise);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list none;
    return {apply(grads[0], KeptNoise(ctx, none)), Tensor()};
  }
};

// Zeros where the bits say so; linear in x, and its own adjoint.
struct Dropout : torch::autograd::Function<Dropout> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, double p, const KeptNoise& noise) {
    noise.save(ctx);
    ctx->saved_data["p"] = p;
    static auto op = dispatched<decltype(dropout)>("kdkernels::dropout");
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return op.call(x, p, noise.numbers, noise.tensors());
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list none;
    const KeptNoise noise(ctx, none);
    return {apply(grads[0], ctx->saved_data["p"].toDouble(), noise), Tensor(), Tensor()};
  }
};

OptionalTensor if_defined(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

struct InputNoise : torch::autograd::Function<InputNoise> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& std_tensor,
                        double std, bool multiplicative, const KeptNoise& noise) {
    ctx->saved_data["std"] = std;
    ctx->saved_data["multiplicative"] = multiplicative;
    bool needs_x = multiplicative && std_tensor.has_value() && std_tensor->requires_grad();
    noise.save(ctx, {std_tensor.value_or(Tensor()), needs_x ? x : Tensor()});
    return dispatch_noise(x, multiplicative ? NoiseMode::kScale : NoiseMode::kAdd, std_tensor, std,
                          noise);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list saved;
    KeptNoise noise(ctx, saved);
    const Tensor &std_tensor = saved[0], &x = saved[1], &grad = grads[0];
    bool multiplicative = ctx->saved_data["multiplicative"].toBool();
    Tensor x_gradient, std_gradient;
    if (ctx->needs_input_grad(0)) {
      double std = ctx->saved_data["std"].toDouble();
      x_gradient = multiplicative ? apply(grad, if_defined(std_tensor), std, true, noise) : grad;
    }
    if (std_tensor.defined() && ctx->needs_input_grad(1)) {
      at::ScalarType acc = acc_type(grad);
      Tensor product = multiplicative ? grad.to(acc) * x.to(acc) : grad;
      Tensor sum;
      if (std_tensor.sym_numel() == 1 && !noise.has_rows()) {
        sum = dot({product}, noise).reshape_symint(std_tensor.sym_sizes());
      } else {
        sum = NoiseTimes::apply(product.to(acc), noise).sum_to_size_symint(std_tensor.sym_sizes());
      }
      std_gradient = sum.to(std_tensor.scalar_type());
    }
    return {x_gradient, std_gradient, Tensor(), Tensor(), Tensor()};
  }
};

struct GradientNoise : torch::autograd::Function<GradientNoise> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& std_tensor,
                        double std, bool multiplicative, const KeptNoise& noise) {
    ctx->saved_data["std"] = std;
    ctx->saved_data["multiplicative"] = multiplicative;
    noise.save(ctx, {std_tensor.value_or(Tensor())});
    return x.view_as(x);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list saved;
    KeptNoise noise(ctx, saved);
    // Through the differentiable op, for the second derivative.
    Tensor noisy =
        InputNoise::apply(grads[0], if_defined(saved[0]), ctx->saved_data["std"].toDouble(),
                          ctx->saved_data["multiplicative"].toBool(), noise);
    return {noisy, Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

}  // namespace

Tensor randn_like(const Tensor& x, c10::SymIntArrayRef noise,
                  const TensorOptionals& noise_tensors) {
  check_tensor("x", x);
  static auto op = dispatched<decltype(randn_like)>("kdkernels::randn_like");
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return op.call(x, noise, noise_tensors);
}

Tensor input_noise(const Tensor& x, const OptionalTensor& std_tensor, double std,
                   bool multiplicative, c10::SymIntArrayRef noise,
                   const TensorOptionals& noise_tensors) {
  check_one(x, std_tensor, std, noise, noise_tensors);
  return InputNoise::apply(x, std_tensor, std, multiplicative, KeptNoise(noise, noise_tensors));
}

Tensor gradient_noise(const Tensor& x, const OptionalTensor& std_tensor, double std,
                      bool multiplicative, c10::SymIntArrayRef noise,
                      const TensorOptionals& noise_tensors) {
  check_one(x, std_tensor, std, noise, noise_tensors);
  OptionalTensor constant;
  if (std_tensor.has_value()) constant = std_tensor->detach();
  return GradientNoise::apply(x, constant, std, multiplicative, KeptNoise(noise, noise_tensors));
}

Tensor noise_dot(at::TensorList tensors, c10::SymIntArrayRef noise,
                 const TensorOptionals& noise_tensors) {
  check_list("tensors", tensors);
  return NoiseDot::apply(tensors, KeptNoise(noise, noise_tensors));
}

void add_noise_(at::TensorList tensors, at::ArrayRef<double> std, const OptionalTensor& std_tensor,
                bool multiplicative, c10::SymIntArrayRef noise,
                const TensorOptionals& noise_tensors, const OptionalTensor& norms) {
  check_no_gradient("add_noise_", "tensors", tensors);
  static auto op = dispatched<decltype(add_noise_)>("kdkernels::add_noise_");
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  op.call(tensors, std, std_tensor, multiplicative, noise, noise_tensors, norms);
}

void combine_noise_(at::TensorList tensors, const Tensor& coefficients, const Tensor& seeds,
                    c10::SymIntArrayRef noise, const TensorOptionals& noise_tensors) {
  check_no_gradient("combine_noise_", "tensors", tensors);
  static auto op = dispatched<decltype(combine_noise_)>("kdkernels::combine_noise_");
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  op.call(tensors, coefficients, seeds, noise, noise_tensors);
}

Tensor dropout(const Tensor& x, double p, c10::SymIntArrayRef noise,
               const TensorOptionals& noise_tensors) {
  return Dropout::apply(x, p, KeptNoise(noise, noise_tensors));
}

TORCH_LIBRARY_IMPL(kdkernels, Autograd, m) {
  m.impl("dropout", dropout);
  m.impl("randn_like", randn_like);
  m.impl("input_noise", input_noise);
  m.impl("gradient_noise", gradient_noise);
  m.impl("noise_dot", noise_dot);
  m.impl("add_noise_", add_noise_);
  m.impl("combine_noise_", combine_noise_);
}

}  // namespace kdkernels
