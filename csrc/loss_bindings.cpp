// The losses' arguments from Python: dicts of arguments by name, as a function's locals() are. The names, kinds and
// ranges are those of the table in ops/loss_options.cpp; an argument that is not as it says is named in the error.
#include "loss_bindings.h"

#include <torch/csrc/autograd/python_variable.h>

#include <string>

#include "math/row.h"
#include "ops/checks.h"
#include "ops/distillation.h"
#include "ops/linear_distillation.h"

namespace py = pybind11;

namespace kdkernels {
namespace {

[[noreturn]] void refuse(const char* name, PyObject* value, const std::string& takes) {
  PyErr_Clear();
  throw py::type_error(std::string(name) + " is a " + Py_TYPE(value)->tp_name + "; it takes " +
                       takes);
}

// ---- one argument -------------------------------------------------------------------------------

// What makes plain tensors of wrappers that stand for one, in Python; never freed, as below.
py::function* unwrap = nullptr;
void set_unwrap(py::function function) { unwrap = new py::function(std::move(function)); }

// THPVariable_Check, without its call of Python's isinstance for what options mostly are.
bool is_tensor(PyObject* value) {
  return value != Py_None && !PyFloat_CheckExact(value) && !PyLong_CheckExact(value) &&
         THPVariable_Check(value);
}

OptionalTensor tensor_of(const char* name, PyObject* value, bool required = false) {
  if (value == nullptr || (value == Py_None && !required)) return std::nullopt;
  if (!THPVariable_Check(value)) refuse(name, value, required ? "a tensor" : "a tensor or None");
  const at::Tensor& tensor = THPVariable_Unpack(value);
  bool wraps = tensor.unsafeGetTensorImpl()->key_set().has(c10::DispatchKey::Python);
  if (!wraps || unwrap == nullptr) return tensor;
  return (*unwrap)(py::reinterpret_borrow<py::object>(value)).cast<at::Tensor>();
}

// A number of a tensor of one element, where an option takes no tensor.
double item_of(const char* name, const at::Tensor& tensor) {
  TORCH_CHECK_TYPE(tensor.numel() == 1 && !tensor.is_meta() && !tensor.is_complex(), name,
                   " is a tensor of shape ", tensor.sizes(), " on ", tensor.device(),
                   "; it takes a number");
  TORCH_CHECK_VALUE(!(at::GradMode::is_enabled() && tensor.requires_grad()), name,
                    " requires grad, but no gradient flows to it; pass ", name, ".detach()");
  return tensor.item().toDouble();
}

double number_of(const char* name, PyObject* value, const char* takes) {
  if (PyFloat_CheckExact(value)) return PyFloat_AS_DOUBLE(value);
  if (is_tensor(value)) return item_of(name, THPVariable_Unpack(value));
  const PyNumberMethods* methods = Py_TYPE(value)->tp_as_number;
  bool is_number =
      methods != nullptr && (methods->nb_float != nullptr || methods->nb_index != nullptr);
  if (!is_number) refuse(name, value, takes);
  double number = PyFloat_AsDouble(value);
  if (number == -1 && PyErr_Occurred()) {
    bool overflow = PyErr_ExceptionMatches(PyExc_OverflowError);
    if (!overflow) refuse(name, value, takes);
    PyErr_Clear();
    throw py::value_error(std::string(name) + " is out of range; it takes " + takes);
  }
  return number;
}

int64_t integer_of(const char* name, PyObject* value) {
  auto index = py::reinterpret_steal<py::object>(PyNumber_Index(value));
  if (!index) refuse(name, value, "an int");
  int overflow = 0;
  int64_t out = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
  if (overflow != 0) {
    throw py::value_error(std::string(name) + " is " + std::string(py::str(index)) +
                          "; it is out of range");
  }
  return out;
}

bool bool_of(const char* name, PyObject* value) {
  if (PyBool_Check(value)) return value == Py_True;
  const PyNumberMethods* methods = Py_TYPE(value)->tp_as_number;
  if (methods == nullptr || methods->nb_bool == nullptr || value == Py_None) {
    refuse(name, value, "a bool");
  }
  int out = PyObject_IsTrue(value);
  if (out < 0) refuse(name, value, "a bool");
  return out != 0;
}

int64_t choice_of(const char* name, PyObject* value, const std::vector<std::string>& choices) {
  if (!PyUnicode_Check(value)) refuse(name, value, "a string");
  Py_ssize_t size = 0;
  const char* text = PyUnicode_AsUTF8AndSize(value, &size);
  if (text == nullptr) PyErr_Clear();  // a string that has no UTF-8
  std::string_view given = text == nullptr ? std::string_view("?") : std::string_view(text, size);
  std::string takes;
  for (size_t i = 0; i < choices.size(); ++i) {
    if (given == choices[i]) return static_cast<int64_t>(i);
    takes += (i == 0 ? "\"" : i + 1 == choices.size() ? " or \"" : ", \"") + choices[i] + "\"";
  }
  throw py::value_error(std::string(name) + " is \"" + std::string(given) + "\"; it takes " +
                        takes);
}

// ---- all options --------------------------------------------------------------------------------

// The option as Python has it: its name as a dict's key, its choices, and its default.
struct PythonOption {
  const LossOption* option;
  PyObject* key;
  std::vector<std::string> choices;
  bool optional;
  std::optional<at::Scalar> usual;

  bool is_usual(const std::optional<at::Scalar>& value) const {
    if (!value.has_value() || !usual.has_value()) return value.has_value() == usual.has_value();
    return value->toDouble() == usual->toDouble();
  }
};

std::optional<at::Scalar> usual_of(const LossOption& option) {
  static const LossOptions defaults;
  return std::visit([](auto member) -> std::optional<at::Scalar> {
    const auto& value = defaults.*member;
    using Value = std::decay_t<decltype(value)>;
    if constexpr (std::is_enum_v<Value>) return at::Scalar(static_cast<int64_t>(value));
    if constexpr (std::is_arithmetic_v<Value>) return at::Scalar(value);
    return std::nullopt;
  }, option.member);
}

const std::vector<PythonOption>& python_options() {
  static const auto* table = [] {
    auto* out = new std::vector<PythonOption>;
    for (const LossOption& option : loss_options()) {
      bool optional = std::holds_alternative<std::optional<double> LossOptions::*>(option.member) ||
                      std::holds_alternative<std::optional<int64_t> LossOptions::*>(option.member);
      out->push_back({&option, PyUnicode_InternFromString(option.name), choices_of(option),
                      optional, usual_of(option)});
    }
    return out;
  }();
  return *table;
}

std::optional<at::Scalar> scalar_of(const PythonOption& option, PyObject* value) {
  const char* name = option.option->name;
  const LossOption::Member& member = option.option->member;
  if (option.optional && value == Py_None) return std::nullopt;
  if (!option.choices.empty()) return at::Scalar(choice_of(name, value, option.choices));
  if (std::holds_alternative<bool LossOptions::*>(member)) return at::Scalar(bool_of(name, value));
  if (std::holds_alternative<int64_t LossOptions::*>(member) ||
      std::holds_alternative<std::optional<int64_t> LossOptions::*>(member)) {
    return at::Scalar(integer_of(name, value));
  }
  return at::Scalar(number_of(name, value, option.optional ? "a number or None" : "a number"));
}

// A tensor whose numbers the kernels read row by row. One number of a CPU tensor is read here.
bool is_row_option(const LossOption& option, PyObject* value) {
  if (option.row_option == kRowOptions || !is_tensor(value)) return false;
  const at::Tensor& tensor = THPVariable_Unpack(value);
  return tensor.dim() > 0 || !tensor.is_cpu() || tensor.requires_grad() ||
         tensor.unsafeGetTensorImpl()->key_set().has(c10::DispatchKey::Python);
}

// Keys of the dicts that are no options.
struct Keys {
  PyObject *student_logits, *labels, *weight, *indices, *logsumexp, *values, *teacher_weights;
  PyObject *inplace, *sparse_gradient, *return_statistics;
};
const Keys& keys() {
  auto key = [](const char* name) { return PyUnicode_InternFromString(name); };
  static const Keys out = {key("student_logits"),
                           key("labels"),
                           key("weight"),
                           key("teacher_indices"),
                           key("teacher_logsumexp"),
                           key("teacher_values"),
                           key("teacher_weights"),
                           key("inplace"),
                           key("sparse_gradient"),
                           key("return_statistics")};
  return out;
}

// All that a call says beside the student and the teachers.
struct Arguments {
  PackedOptions options;
  RowTensors rows;
  int64_t wishes = 0;
  bool needs_option_gradient = false;  // an option is a tensor that requires grad

  explicit Arguments(PyObject* dict) {
    const Keys& key = keys();
    auto get = [dict](const char* name, PyObject* k) {
      return tensor_of(name, PyDict_GetItemWithError(dict, k));
    };
    rows.labels = get("labels", key.labels);
    rows.weight = get("weight", key.weight);
    rows.indices = get("teacher_indices", key.indices);
    rows.teacher_logsumexp = get("teacher_logsumexp", key.logsumexp);
    wish(dict, "inplace", key.inplace, kInplace);
    wish(dict, "sparse_gradient", key.sparse_gradient, kSparseGradient);
    wish(dict, "return_statistics", key.return_statistics, kReturnStatistics);
    add_options(dict);
  }

 private:
  // Up to the last one that is not its default; the teachers' weights stand behind all of them.
  void add_options(PyObject* dict) {
    PyObject* weights = PyDict_GetItemWithError(dict, keys().teacher_weights);
    const bool has_weights = weights != nullptr && weights != Py_None;
    c10::SmallVector<std::optional<at::Scalar>, 32> values;
    size_t needed = 0;
    for (const PythonOption& option : python_options()) {
      PyObject* value = PyDict_GetItemWithError(dict, option.key);
      std::optional<at::Scalar> given = option.usual;
      if (value != nullptr && is_row_option(*option.option, value)) {
        at::Tensor tensor = *tensor_of(option.option->name, value, true);
        needs_option_gradient |= at::GradMode::is_enabled() && tensor.requires_grad();
        rows.options[option.option->row_option] = tensor;
      } else if (value != nullptr) {
        given = scalar_of(option, value);
      }
      values.push_back(given);
      if (has_weights || !option.is_usual(given)) needed = values.size();
    }
    options.reserve(needed);
    for (size_t i = 0; i < needed; ++i) options.push_back(values[i]);
    if (has_weights) add_teacher_weights(weights);
  }

  void wish(PyObject* dict, const char* name, PyObject* key, LossWish bit) {
    PyObject* value = PyDict_GetItemWithError(dict, key);
    if (value == Py_True) wishes |= bit;
    if (value != nullptr && !PyBool_Check(value)) refuse(name, value, "a bool");
  }

  void add_teacher_weights(PyObject* weights) {
    if (!PyList_Check(weights) && !PyTuple_Check(weights)) {
      refuse("teacher_weights", weights, "a sequence of numbers");
    }
    auto list = py::reinterpret_steal<py::object>(PySequence_Fast(weights, ""));
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(list.ptr()); ++i) {
      PyObject* item = PySequence_Fast_GET_ITEM(list.ptr(), i);
      options.push_back(at::Scalar(number_of("teacher_weights", item, "a sequence of numbers")));
    }
  }
};

std::vector<at::Tensor> teachers_of(const char* name, PyObject* list) {
  std::vector<at::Tensor> out;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); ++i) {
    out.push_back(*tensor_of(name, PyList_GET_ITEM(list, i), true));
  }
  return out;
}

// ---- the ops ------------------------------------------------------------------------------------

template <class Function>
auto op_of(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Function>();
}

// A function of the module on positional arguments, without the detours of pybind11's def.
using FastFunction = py::object (*)(PyObject* const* arguments);
template <FastFunction function, Py_ssize_t kCount>
PyObject* from_python(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  try {
    if (count != kCount) throw py::type_error("the function takes other arguments");
    return function(arguments).release().ptr();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (...) {
    py::detail::try_translate_exceptions();
  }
  return nullptr;
}
template <FastFunction function, Py_ssize_t kCount>
void define(py::module_& m, const char* name, const char* signature) {
  static PyMethodDef method;
  method = {name,
            reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(from_python<function, kCount>)),
            METH_FASTCALL, signature};
  m.add_object(name, py::reinterpret_steal<py::object>(
                         PyCFunction_NewEx(&method, nullptr, m.attr("__name__").ptr())));
}

std::string_view text_of(PyObject* object) {
  Py_ssize_t size = 0;
  const char* text = PyUnicode_AsUTF8AndSize(object, &size);
  if (text == nullptr) throw py::error_already_set();
  return {text, static_cast<size_t>(size)};
}

// (call, teachers, group) -> the op's outputs; None where an option needs a gradient, which the kernels do not make.
py::object distillation_loss_of(PyObject* const* arguments) {
  static auto op = op_of<decltype(distillation_loss)>("kdkernels::distillation_loss");
  PyObject* call = arguments[0];
  at::Tensor student =
      *tensor_of("student_logits", PyDict_GetItemWithError(call, keys().student_logits), true);
  bool topk = PyDict_GetItemWithError(call, keys().values) != nullptr;
  std::vector<at::Tensor> teachers =
      teachers_of(topk ? "teacher_values" : "teacher_logits", arguments[1]);
  Arguments given(call);
  if (given.needs_option_gradient) return py::none();
  std::string_view group = text_of(arguments[2]);
  std::vector<at::Tensor> out;
  {
    py::gil_scoped_release no_gil;
    out = op.call(student, teachers, pack(given.rows), given.options, given.wishes, group);
  }
  return py::cast(std::move(out));
}

// (call, name of the teacher's argument, teachers, others, group), likewise; `others` as the op takes them.
py::object linear_distillation_loss_of(PyObject* const* arguments) {
  static auto op = op_of<decltype(linear_distillation_loss)>("kdkernels::linear_distillation_loss");
  PyObject* call = arguments[0];
  auto get = [call](const char* name) {
    return *tensor_of(name, PyDict_GetItemString(call, name), /*required=*/true);
  };
  at::Tensor hidden = get("student_hidden"), weight = get("student_weight");
  TensorOptionals others;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(arguments[3]); ++i) {
    const char* name = i == 0       ? "student_bias"
                       : i == 1     ? "teacher_index"
                       : i % 2 == 1 ? "teacher_weight"
                                    : "teacher_bias";
    others.push_back(tensor_of(name, PyList_GET_ITEM(arguments[3], i)));
  }
  std::vector<at::Tensor> teachers =
      teachers_of(std::string(text_of(arguments[1])).c_str(), arguments[2]);
  Arguments given(call);
  if (given.needs_option_gradient) return py::none();
  std::string_view group = text_of(arguments[4]);
  std::vector<at::Tensor> out;
  {
    py::gil_scoped_release no_gil;
    out = op.call(hidden, weight, others, teachers, pack(given.rows), given.options, given.wishes,
                  group);
  }
  return py::cast(std::move(out));
}

// ---- what Python reads --------------------------------------------------------------------------

// (name, default, choices, whether rows may differ, whether it is public) of each option.
py::list loss_options_table() {
  py::list out;
  const LossOptions defaults;
  for (const PythonOption& option : python_options()) {
    py::object usual = std::visit([&](auto member) -> py::object {
      const auto& value = defaults.*member;
      using Value = std::decay_t<decltype(value)>;
      if constexpr (std::is_enum_v<Value>)
        return py::str(option.choices[static_cast<size_t>(value)]);
      else if constexpr (std::is_arithmetic_v<Value>)
        return py::cast(value);
      else
        return py::none();
    }, option.option->member);
    out.append(py::make_tuple(option.option->name, usual, py::tuple(py::cast(option.choices)),
                              option.option->row_option != kRowOptions, option.option->is_public));
  }
  return out;
}

// (name, formula, source, {parameter: default}) of each divergence.
py::list divergence_table() {
  py::list out;
  for (const DivergenceEntry& entry : divergences()) {
    py::dict parameters;
    if (entry.alpha.has_value()) parameters["divergence_alpha"] = *entry.alpha;
    if (entry.beta.has_value()) parameters["beta"] = *entry.beta;
    out.append(py::make_tuple(entry.name, entry.formula, entry.source, parameters));
  }
  return out;
}

// A call as the arguments of kdkernels.reference's functions, but for student and teachers.
py::dict arguments_of(const LossCall& call) {
  py::dict out;
  for (const PythonOption& option : python_options()) {
    if (!option.option->is_public) continue;
    out[option.option->name] = std::visit([&](auto member) -> py::object {
      const auto& value = call.options.*member;
      using Value = std::decay_t<decltype(value)>;
      if constexpr (std::is_enum_v<Value>)
        return py::str(option.choices[static_cast<size_t>(value)]);
      else
        return py::cast(value);
    }, option.option->member);
  }
  const auto& weights = call.options.teacher_weights;
  out["teacher_weights"] = weights.empty()
                               ? py::object(py::none())
                               : py::cast(std::vector<double>(weights.begin(), weights.end()));
  RowTensors::each(call.rows, [&](const char* name, const OptionalTensor& x) {
    if (x.has_value() || !out.contains(name)) out[name] = py::cast(x);
  });
  return out;
}

void set_gradients(py::function function) {
  // Never freed: the interpreter is gone before this library's variables are.
  auto* kept = new py::function(std::move(function));
  set_differentiable_gradients([kept](const LossCall& call, const at::Tensor& grad_output) {
    py::gil_scoped_acquire gil;
    py::object out = (*kept)(call.student, call.teachers, arguments_of(call), grad_output);
    std::vector<at::Tensor> gradients;
    for (const auto& gradient : out.cast<std::vector<std::optional<at::Tensor>>>()) {
      gradients.push_back(gradient.value_or(at::Tensor()));
    }
    return gradients;
  });
}

}  // namespace

void bind_losses(py::module_& m) {
  define<distillation_loss_of, 3>(m, "distillation_loss",
                                  "distillation_loss(call: dict, teachers: list[Tensor], "
                                  "group: str) -> list[Tensor] | None");
  define<linear_distillation_loss_of, 5>(
      m, "linear_distillation_loss",
      "linear_distillation_loss(call: dict, teacher_name: str, teachers: list[Tensor], "
      "others: list[Tensor | None], group: str) -> list[Tensor] | None");
  m.def("set_unwrap", set_unwrap);
  m.def("set_differentiable_gradients", set_gradients);
  m.def("loss_options", loss_options_table);
  m.def("divergences", divergence_table);
  m.attr("row_state") = math::kRowState;
}

}  // namespace kdkernels
