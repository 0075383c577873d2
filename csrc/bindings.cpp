// The Python module kdkernels._C: the ops as plain functions, and what the library knows of itself.
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/headeronly/version.h>

#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include "cpu/kernels.h"
#include "loss_bindings.h"
#include "math/philox.h"
#include "ops/noise.h"
#include "ops/regression.h"
#include "ops/update.h"

namespace py = pybind11;
using namespace kdkernels;

namespace {

constexpr const char* kRefusal = "incompatible function arguments";  // which errors.py explains

// How an op's argument comes from Python: as pybind11 takes it, and without its detours for the frequent kinds.
// What get() returns holds as long as this and the Python object do.
template <class Argument>
struct FromPython {
  py::detail::make_caster<Argument> caster;
  bool load(PyObject* object) { return caster.load(object, true); }
  Argument get() { return py::detail::cast_op<Argument>(caster); }
};
template <>
struct FromPython<const at::Tensor&> {
  const at::Tensor* tensor;
  bool load(PyObject* object) {
    if (!THPVariable_Check(object)) return false;
    tensor = &THPVariable_Unpack(object);
    return true;
  }
  const at::Tensor& get() { return *tensor; }
};
template <>
struct FromPython<at::Tensor> : FromPython<const at::Tensor&> {};
template <>
struct FromPython<const std::optional<at::Tensor>&> {
  std::optional<at::Tensor> tensor;
  bool load(PyObject* object) {
    if (object == Py_None) return true;
    if (!THPVariable_Check(object)) return false;
    tensor = THPVariable_Unpack(object);
    return true;
  }
  const std::optional<at::Tensor>& get() { return tensor; }
};
template <>
struct FromPython<std::string_view> {
  std::string_view text;
  bool load(PyObject* object) {
    Py_ssize_t size = 0;
    const char* data = PyUnicode_Check(object) ? PyUnicode_AsUTF8AndSize(object, &size) : nullptr;
    PyErr_Clear();  // of a string that has no UTF-8
    text = {data, static_cast<size_t>(size)};
    return data != nullptr;
  }
  std::string_view get() { return text; }
};
// An int, or what stands for one; no float of any type.
template <>
struct FromPython<int64_t> {
  int64_t number;
  bool load(PyObject* object) {
    auto index = py::reinterpret_steal<py::object>(PyNumber_Index(object));
    number = index ? PyLong_AsLongLong(index.ptr()) : 0;
    const bool sound = PyErr_Occurred() == nullptr;
    PyErr_Clear();
    return sound;
  }
  int64_t get() { return number; }
};
template <>
struct FromPython<c10::SymInt> : FromPython<int64_t> {};

// load(element) for each element of a sequence, until one is not as it should be.
template <class Load>
bool load_each(PyObject* object, Load load) {
  if (!PySequence_Check(object) || PyUnicode_Check(object) || PyBytes_Check(object)) return false;
  auto elements = py::reinterpret_steal<py::object>(PySequence_Fast(object, ""));
  if (!elements) throw py::error_already_set();
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(elements.ptr()); ++i) {
    if (!load(PySequence_Fast_GET_ITEM(elements.ptr(), i))) return false;
  }
  return true;
}
template <class Element>
struct FromPython<at::ArrayRef<Element>> {
  c10::SmallVector<Element, 16> list;
  bool load(PyObject* object) {
    return load_each(object, [&](PyObject* item) {
      FromPython<Element> element;
      if (!element.load(item)) return false;
      list.push_back(element.get());
      return true;
    });
  }
  at::ArrayRef<Element> get() { return list; }
};
template <>
struct FromPython<const TensorOptionals&> {
  TensorOptionals list;
  bool load(PyObject* object) {
    return load_each(object, [&](PyObject* item) {
      FromPython<const OptionalTensor&> element;
      if (!element.load(item)) return false;
      list.push_back(std::move(element.tensor));
      return true;
    });
  }
  const TensorOptionals& get() { return list; }
};

// An optimizer's rules: dicts, of which the fields are read by their names.
struct RulesFromPython {
  std::vector<double> numbers;
  bool load(PyObject* object) {
    static const std::vector<PyObject*> names = [] {
      std::vector<PyObject*> out;
      for (const RuleField& field : rule_fields()) {
        out.push_back(PyUnicode_InternFromString(field.name));
      }
      return out;
    }();
    return load_each(object, [&](PyObject* rule) {
      for (size_t i = 0; i < names.size(); ++i) {
        PyObject* value = PyDict_Check(rule) ? PyDict_GetItem(rule, names[i]) : nullptr;
        double number = value != nullptr ? PyFloat_AsDouble(value) : rule_fields()[i].usual;
        if (number == -1 && PyErr_Occurred()) {
          PyErr_Clear();
          throw py::type_error(std::string(rule_fields()[i].name) + " is a " +
                               Py_TYPE(value)->tp_name + "; it must be a number");
        }
        numbers.push_back(number);
      }
      return true;
    });
  }
  at::ArrayRef<double> get() { return numbers; }
};

// What reads argument `place` of an op.
template <auto op, size_t place, class Argument>
struct Reader {
  using type = FromPython<Argument>;
};
template <class Argument>
struct Reader<noisy_update_, 4, Argument> {
  using type = RulesFromPython;
};

// Of an op's arguments, what decides whether a captured graph would bake its noise in.
struct NoiseArguments {
  const at::Tensor* first = nullptr;
  const TensorOptionals* noise_tensors = nullptr;
  void see(const at::Tensor& x) { first = first == nullptr ? &x : first; }
  void see(const at::TensorList& list) {
    if (!list.empty()) see(list[0]);
  }
  void see(const TensorOptionals& tensors) { noise_tensors = &tensors; }
  template <class Other>
  void see(const Other&) {}
};

// m.name: a registered op, through PyTorch's dispatcher, of positional arguments. Not by pybind11's def, which takes
// most of a microsecond for a loss's arguments.
template <auto implementation>
struct Op;
template <class Result, class... Arguments, Result (*implementation)(Arguments...)>
struct Op<implementation> {
  using Handle = c10::TypedOperatorHandle<Result(Arguments...)>;
  static inline std::optional<Handle> op;
  static inline PyMethodDef method;

  template <size_t... I>
  static PyObject* run(PyObject* const* arguments, std::index_sequence<I...>) {
    std::tuple<typename Reader<implementation, I, Arguments>::type...> from;
    if (!(std::get<I>(from).load(arguments[I]) && ...)) throw py::type_error(kRefusal);
    NoiseArguments seen;
    (seen.see(std::get<I>(from).get()), ...);
    if (seen.first != nullptr && seen.noise_tensors != nullptr)
      check_capture(*seen.noise_tensors, seen.first->device());
    auto call = [&] {
      py::gil_scoped_release no_gil;
      return op->call(std::get<I>(from).get()...);
    };
    if constexpr (std::is_void_v<Result>) {
      call();
      return py::none().release().ptr();
    } else {
      return py::cast(call()).release().ptr();
    }
  }

  static PyObject* from_python(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    try {
      if (count != sizeof...(Arguments)) throw py::type_error(kRefusal);
      return run(arguments, std::index_sequence_for<Arguments...>());
    } catch (py::error_already_set& error) {
      error.restore();
    } catch (...) {
      py::detail::try_translate_exceptions();
    }
    return nullptr;
  }

  // signature: for type checkers, where it is not the schema's.
  static void define(py::module_& m, const char* name, const char* signature = nullptr) {
    op = c10::Dispatcher::singleton()
             .findSchemaOrThrow((std::string("kdkernels::") + name).c_str(), "")
             .template typed<Result(Arguments...)>();
    method = {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(from_python)),
              METH_FASTCALL, signature};
    m.add_object(name, py::reinterpret_steal<py::object>(
                           PyCFunction_NewEx(&method, nullptr, m.attr("__name__").ptr())));
  }
};

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
    } catch (const c10::NotImplementedError& e) {
      PyErr_SetString(PyExc_NotImplementedError, e.what_without_backtrace());
    } catch (const c10::Error& e) {
      PyErr_SetString(PyExc_RuntimeError, e.what_without_backtrace());
    }
  });

  bind_losses(m);
  Op<randn_like>::define(m, "randn_like");
  Op<add_noise_>::define(m, "add_noise_");
  Op<input_noise>::define(m, "input_noise");
  Op<gradient_noise>::define(m, "gradient_noise");
  Op<noise_dot>::define(m, "noise_dot");
  Op<scaled_noise>::define(m, "_scaled_noise");
  Op<combine_noise_>::define(m, "combine_noise_");
  Op<dropout>::define(m, "dropout");
  Op<stochastic_round>::define(m, "stochastic_round");
  Op<noisy_update_>::define(
      m, "noisy_update_",
      "noisy_update_(update: Sequence[int], params: Sequence[Tensor], grads: Sequence[Tensor], "
      "moments: Sequence[Tensor], rules: Sequence[dict[str, Any]], noise: Sequence[int], "
      "tensors: Sequence[Tensor | None], norms: Tensor | None) -> None");
  m.def("noisy_linear_regression", noisy_linear_regression,
        py::call_guard<py::gil_scoped_release>());

  m.def("build_info", build_info);
  m.def("set_isa", [](const std::string& name) { cpu::set_isa(name); });
  m.def("elementary", elementary);
  m.def("philox", philox);
}
