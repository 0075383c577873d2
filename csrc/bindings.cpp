// The Python module kdkernels._C: the ops as plain functions, and what the library knows of itself.
#include <torch/csrc/utils/pybind.h>
#include <torch/headeronly/version.h>

#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include "cpu/kernels.h"
#include "math/philox.h"
#include "math/row.h"
#include "ops/distillation.h"
#include "ops/linear_distillation.h"
#include "ops/noise.h"
#include "ops/regression.h"
#include "ops/update.h"

namespace py = pybind11;
using namespace kdkernels;

namespace {

// An op through PyTorch's dispatcher, with what pybind11 makes of lists and of numbers that may be symbolic.
template <class Argument>
struct FromPython {
  using type = Argument;
  static Argument get(Argument argument) { return argument; }
};
template <>
struct FromPython<c10::SymInt> {
  using type = int64_t;
  static c10::SymInt get(int64_t number) { return number; }
};
template <class Element>
struct FromPython<at::ArrayRef<Element>> {
  using type = const std::vector<Element>&;
  static at::ArrayRef<Element> get(const std::vector<Element>& list) { return list; }
};
template <>
struct FromPython<c10::SymIntArrayRef> {
  using type = const std::vector<int64_t>&;
  static std::vector<c10::SymInt> get(const std::vector<int64_t>& list) {
    return {list.begin(), list.end()};
  }
};
template <class... Arguments, class Result>
auto dispatched(const char* name, Result (*)(Arguments...)) {
  auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Result(Arguments...)>();
  return [op](typename FromPython<Arguments>::type... arguments) {
    return op.call(FromPython<Arguments>::get(arguments)...);
  };
}

const char* name_of(math::Divergence divergence) {
  switch (divergence) {
    case math::Divergence::kForwardKL: return "forward_kl";
    case math::Divergence::kReverseKL: return "reverse_kl";
    case math::Divergence::kJS: return "js";
    case math::Divergence::kSkewForwardKL: return "skew_forward_kl";
    case math::Divergence::kSkewReverseKL: return "skew_reverse_kl";
    case math::Divergence::kTotalVariation: return "total_variation";
    case math::Divergence::kAlphaBeta: return "alpha_beta";
    case math::Divergence::kDecoupled: return "decoupled";
  }
  return "";
}

// Options as the arguments of kdkernels.reference's functions.
py::dict arguments_of(const LossOptions& o) {
  using math::Divergence;
  auto cap = [](double value) -> py::object {
    return value == 0 ? py::object(py::none()) : py::float_(value);
  };
  constexpr const char* kReductions[] = {"none", "sum", "mean"};
  constexpr const char* kTails[] = {"", "renormalize", "bucket", "ignore"};
  bool two = o.divergence == Divergence::kAlphaBeta || o.divergence == Divergence::kDecoupled;
  bool one = o.divergence == Divergence::kJS || o.divergence == Divergence::kSkewForwardKL ||
             o.divergence == Divergence::kSkewReverseKL;
  py::dict out;
  out["temperature"] = o.temperature;
  out["alpha"] = o.alpha;
  out["divergence"] = name_of(o.divergence);
  out["divergence_alpha"] = two ? py::object(py::float_(o.beta)) : py::none();
  out["beta"] = two   ? py::object(py::float_(o.second))
                : one ? py::object(py::float_(o.beta))
                      : py::none();
  out["teacher_kind"] = o.probs ? "probs" : "logits";
  out["logit_scale"] = o.logit_scale;
  out["soft_cap"] = cap(o.soft_cap);
  out["label_smoothing"] = o.label_smoothing;
  out["ignore_index"] = o.ignore_index;
  out["num_items"] = cap(o.num_items);
  out["reduction"] = kReductions[static_cast<int>(o.reduction)];
  if (o.tail != Tail::kNone) {
    out["tail"] = kTails[static_cast<int>(o.tail)];
    return out;
  }
  out["teacher_weights"] = o.teacher_weights;
  out["teacher_mixture"] = o.log_mix ? "log_probs" : "probs";
  out["standardize"] = o.standardize;
  out["teacher_logit_scale"] = o.teacher_logit_scale;
  out["teacher_soft_cap"] = cap(o.teacher_soft_cap);
  return out;
}

void set_gradients(py::function function) {
  // Never freed: the interpreter is gone before this library's variables are.
  auto* kept = new py::function(std::move(function));
  set_differentiable_gradients([kept](const LossCall& call, const at::Tensor& grad_output) {
    py::gil_scoped_acquire gil;
    py::object out = (*kept)(call.student, call.teachers, call.labels, call.weight, call.indices,
                             call.teacher_logsumexp, arguments_of(call.options), grad_output);
    std::vector<at::Tensor> gradients;
    for (const auto& gradient : out.cast<std::vector<std::optional<at::Tensor>>>()) {
      gradients.push_back(gradient.value_or(at::Tensor()));
    }
    return gradients;
  });
}

py::dict build_info() {
  py::dict info;
#if defined(KDKERNELS_WITH_CUDA)
  info["cuda"] = KDKERNELS_CUDA_VERSION;
  info["cuda_archs"] = KDKERNELS_CUDA_ARCHS;
#else
  info["cuda"] = py::none();
  info["cuda_archs"] = py::none();
#endif
  info["torch"] = TORCH_VERSION;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["isa_levels"] = cpu::isa_compiled();
  info["isa_supported"] = cpu::isa_supported();
  info["isa"] = cpu::kernels().isa;
  return info;
}

at::Tensor elementary(const std::string& name, const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.is_cpu() && x.is_contiguous() && x.scalar_type() == at::kFloat,
                    "x takes a contiguous fp32 CPU tensor");
  at::Tensor y = x.clone();
  TORCH_CHECK_VALUE(cpu::kernels().elementary(name.c_str(), x.const_data_ptr<float>(),
                                              y.mutable_data_ptr<float>(), x.numel()),
                    "name is \"", name, "\", which is no function of csrc/math/elementary.h");
  return y;
}

std::vector<uint32_t> philox(const std::array<uint32_t, 4>& counter,
                             const std::array<uint32_t, 2>& key) {
  math::Philox4x32<uint32_t> out =
      math::philox4x32_10(counter[0], counter[1], counter[2], counter[3], key[0], key[1]);
  return {out.word, out.word + 4};
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const c10::TypeError& e) {
      PyErr_SetString(PyExc_TypeError, e.what_without_backtrace());
    } catch (const c10::ValueError& e) {
      PyErr_SetString(PyExc_ValueError, e.what_without_backtrace());
    } catch (const c10::Error& e) {
      PyErr_SetString(PyExc_RuntimeError, e.what_without_backtrace());
    }
  });

  py::call_guard<py::gil_scoped_release> no_gil;
  m.def("distillation_loss", dispatched("kdkernels::distillation_loss", distillation_loss), no_gil);
  m.def("linear_distillation_loss",
        dispatched("kdkernels::linear_distillation_loss", linear_distillation_loss), no_gil);
  m.def("set_differentiable_gradients", set_gradients);
  m.def("randn_like", dispatched("kdkernels::randn_like", randn_like), no_gil);
  m.def("add_noise_", dispatched("kdkernels::add_noise_", add_noise_), no_gil);
  m.def("input_noise", dispatched("kdkernels::input_noise", input_noise), no_gil);
  m.def("gradient_noise", dispatched("kdkernels::gradient_noise", gradient_noise), no_gil);
  m.def("noise_dot", dispatched("kdkernels::noise_dot", noise_dot), no_gil);
  m.def("_scaled_noise", dispatched("kdkernels::_scaled_noise", scaled_noise), no_gil);
  m.def("combine_noise_", dispatched("kdkernels::combine_noise_", combine_noise_), no_gil);
  m.def("noisy_update_", dispatched("kdkernels::noisy_update_", noisy_update_), no_gil);
  m.def("noisy_linear_regression", noisy_linear_regression, no_gil);

  m.def("build_info", build_info);
  m.attr("row_state") = math::kRowState;
  m.def("set_isa", [](const std::string& name) { cpu::set_isa(name); });
  m.def("elementary", elementary);
  m.def("philox", philox);
}
