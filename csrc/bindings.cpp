// The Python module kdkernels._C: the ops as plain functions, and what the library knows of itself.
#include <torch/csrc/utils/pybind.h>
#include <torch/headeronly/version.h>

#include <ATen/Parallel.h>

#include "cpu/kernels.h"
#include "math/philox.h"
#include "ops/distillation.h"
#include "ops/noise.h"
#include "ops/regression.h"

namespace py = pybind11;
using namespace kdkernels;

namespace {

NoiseArgs noise_args(int64_t seed, int64_t step, int64_t stream, int64_t offset,
                     std::optional<at::Tensor> seed_tensor, std::optional<at::Tensor> step_tensor) {
  return {seed, step, stream, offset, std::move(seed_tensor), std::move(step_tensor)};
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
  m.def("distillation_loss", distillation_loss, no_gil);
  m.def("randn_like",
        [](const at::Tensor& x, int64_t seed, int64_t step, int64_t stream, int64_t offset,
           std::optional<at::Tensor> seed_tensor, std::optional<at::Tensor> step_tensor) {
    return randn_like(x, noise_args(seed, step, stream, offset, seed_tensor, step_tensor));
  },
        no_gil);
  m.def("add_noise_",
        [](const std::vector<at::Tensor>& tensors, const std::vector<double>& std, int64_t seed,
           int64_t step, int64_t stream, int64_t offset, std::optional<at::Tensor> seed_tensor,
           std::optional<at::Tensor> step_tensor) {
    add_noise_(tensors, std, noise_args(seed, step, stream, offset, seed_tensor, step_tensor));
  },
        no_gil);
  m.def("input_noise",
        [](const at::Tensor& x, std::optional<at::Tensor> std_tensor, double std, int64_t seed,
           int64_t step, int64_t stream, int64_t offset, std::optional<at::Tensor> seed_tensor,
           std::optional<at::Tensor> step_tensor) {
    return input_noise(x, std_tensor, std,
                       noise_args(seed, step, stream, offset, seed_tensor, step_tensor));
  },
        no_gil);
  m.def("gradient_noise",
        [](const at::Tensor& x, double std, int64_t seed, int64_t step, int64_t stream,
           int64_t offset, std::optional<at::Tensor> seed_tensor,
           std::optional<at::Tensor> step_tensor) {
    return gradient_noise(x, std, noise_args(seed, step, stream, offset, seed_tensor, step_tensor));
  },
        no_gil);
  m.def("noisy_linear_regression", noisy_linear_regression, no_gil);

  m.def("build_info", build_info);
  m.def("set_isa", [](const std::string& name) { cpu::set_isa(name); });
  m.def("elementary", elementary);
  m.def("philox", philox);
}
