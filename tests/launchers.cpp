// The CUDA launchers as Python functions on addresses, for the emulator and for a GPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/kernels.h"
#include "cuda/plan.h"
#include "math/row.h"

namespace py = pybind11;
using namespace kdkernels;

namespace {

// A struct with its fields: numbers as they are, pointers as addresses.
template <class Struct>
struct Fields : py::class_<Struct> {
  Fields(py::module_& m, const char* name) : py::class_<Struct>(m, name, py::module_local()) {
    this->def(py::init([] { return Struct{}; }));
  }
  template <class Value, class Owner>  // the struct, or its base
  Fields& field(const char* name, Value Owner::* of_owner) {
    Value Struct::* member = of_owner;
    if constexpr (std::is_pointer_v<Value>) {
      this->def_property(name, [member](const Struct& s) {
        return reinterpret_cast<uintptr_t>(s.*member);
      }, [member](Struct& s, uintptr_t address) { s.*member = reinterpret_cast<Value>(address); });
    } else {
      this->def_readwrite(name, member);
    }
    return *this;
  }
};
#define FIELD(name) .field(#name, &Struct::name)

void check(cudaError_t code) {
  if (code != cudaSuccess) throw std::runtime_error(cudaGetErrorString(code));
}

template <class Params, class Tensor>
const Params& with_list(Params& p, const std::vector<Tensor>& tensors) {
  p.tensors = tensors.data();
  p.count = static_cast<int64_t>(tensors.size());
  return p;
}

}  // namespace

PYBIND11_MODULE(launchers, m) {
  py::enum_<Dtype>(m, "Dtype", py::module_local())
      .value("float32", Dtype::kFloat32)
      .value("float64", Dtype::kFloat64)
      .value("bfloat16", Dtype::kBFloat16)
      .value("float16", Dtype::kFloat16);
  // A number stands for rows of one run.
  py::class_<RowStrides>(m, "RowStrides", py::module_local())
      .def(py::init([](int64_t inner) {
    return RowStrides{.inner = inner};
  })).def(py::init([](int64_t inner, int64_t outer, int64_t run) {
    return rows_in_runs(inner, outer, run);
  }));
  py::implicitly_convertible<py::int_, RowStrides>();
  {
    using Struct = Denominator;
    // clang-format off
    Fields<Struct>(m, "Denominator") FIELD(number) FIELD(is_kept_weight);
  }
  py::enum_<math::Divergence>(m, "Divergence", py::module_local())
      .value("forward_kl", math::Divergence::kForwardKL)
      .value("reverse_kl", math::Divergence::kReverseKL)
      .value("js", math::Divergence::kJS)
      .value("skew_forward_kl", math::Divergence::kSkewForwardKL)
      .value("skew_reverse_kl", math::Divergence::kSkewReverseKL)
      .value("total_variation", math::Divergence::kTotalVariation)
      .value("alpha_beta", math::Divergence::kAlphaBeta)
      .value("decoupled", math::Divergence::kDecoupled);
  py::enum_<Tail>(m, "Tail", py::module_local())
      .value("none", Tail::kNone)
      .value("renormalize", Tail::kRenormalize)
      .value("bucket", Tail::kBucket)
      .value("ignore", Tail::kIgnore);
  {
    using Struct = LossParams;
    Fields<Struct> fields(m, "LossParams");
    fields FIELD(dtype) FIELD(rows) FIELD(classes) FIELD(student) FIELD(gradient) FIELD(labels)
        FIELD(weight) FIELD(row_loss) FIELD(loss) FIELD(student_rows) FIELD(gradient_rows)
        FIELD(temperature) FIELD(alpha) FIELD(label_smoothing) FIELD(ignore_index)
        FIELD(denominator) FIELD(gradient_scale) FIELD(workspace) FIELD(divergence) FIELD(beta)
        FIELD(divergence_alpha) FIELD(logit_scale) FIELD(soft_cap) FIELD(teacher_logit_scale)
        FIELD(teacher_soft_cap) FIELD(standardize) FIELD(probs) FIELD(log_mix)
        FIELD(teacher_gradient) FIELD(teacher_gradient_rows) FIELD(statistics) FIELD(tail)
        FIELD(entries) FIELD(indices) FIELD(wide_indices) FIELD(teacher_logsumexp)
        FIELD(entry_gradient) FIELD(first_class) FIELD(all_classes) FIELD(stages) FIELD(state);
    fields.def("set_row_option", [](Struct& p, int option, uintptr_t data) {
      p.row_options[option] = reinterpret_cast<const void*>(data);
    });
    fields.def("set_teachers", [](Struct& p, const std::vector<uintptr_t>& data,
                                  const std::vector<RowStrides>& strides,
                                  const std::vector<double>& weights) {
      p.teachers = static_cast<int>(data.size());
      for (size_t i = 0; i < data.size(); ++i) {
        p.teacher_data[i] = reinterpret_cast<const void*>(data[i]);
        p.teacher_rows[i] = strides[i];
        p.teacher_weights[i] = weights[i];
      }
    });
  }
  {
    using Struct = ScaleParams;
    Fields<Struct>(m, "ScaleParams")
        FIELD(dtype) FIELD(data) FIELD(rows) FIELD(classes) FIELD(strides) FIELD(factor) FIELD(per_row);
  }
  py::enum_<math::Distribution>(m, "Distribution", py::module_local())
      .value("normal", math::Distribution::kNormal)
      .value("uniform", math::Distribution::kUniform)
      .value("rademacher", math::Distribution::kRademacher)
      .value("truncated_normal", math::Distribution::kTruncatedNormal)
      .value("laplace", math::Distribution::kLaplace);
  py::enum_<NoiseMode>(m, "NoiseMode", py::module_local())
      .value("only", NoiseMode::kOnly)
      .value("add", NoiseMode::kAdd)
      .value("scale", NoiseMode::kScale)
      .value("times", NoiseMode::kTimes);
  py::enum_<math::Update>(m, "Update", py::module_local())
      .value("sgd", math::Update::kSgd)
      .value("adamw", math::Update::kAdamW)
      .value("sgld", math::Update::kSgld)
      .value("psgld", math::Update::kPsgld);
  {
    using Struct = NoiseSource;
    Fields<Struct>(m, "NoiseSource")
        FIELD(distribution) FIELD(seed_low) FIELD(seed_high) FIELD(step) FIELD(device_step);
  }
  {
    using Struct = NoiseTensor;
    Fields<Struct>(m, "NoiseTensor")
        FIELD(out) FIELD(in) FIELD(numel) FIELD(std) FIELD(offset) FIELD(stream) FIELD(index);
  }
  {
    using Struct = NoiseParams;
    Fields<Struct>(m, "NoiseParams")
        FIELD(dtype) FIELD(mode) FIELD(source) FIELD(stds) FIELD(std_size) FIELD(std_inner)
        FIELD(norms) FIELD(indices) FIELD(workspace) FIELD(count);
  }
  {
    using Struct = NoiseDotParams;
    Fields<Struct>(m, "NoiseDotParams")
        FIELD(dtype) FIELD(source) FIELD(result) FIELD(indices) FIELD(workspace) FIELD(count);
  }
  {
    using Struct = CombineParams;
    Fields<Struct>(m, "CombineParams")
        FIELD(dtype) FIELD(source) FIELD(seeds) FIELD(coefficients) FIELD(terms);
  }
  {
    using Struct = math::UpdateRule;
    Fields<Struct>(m, "UpdateRule")
        FIELD(lr) FIELD(std) FIELD(weight_decay) FIELD(momentum) FIELD(dampening) FIELD(beta1)
        FIELD(beta2) FIELD(eps) FIELD(num_data) FIELD(temperature) FIELD(nesterov) FIELD(maximize)
        FIELD(stochastic_rounding);
  }
  {
    using Struct = UpdateTensor;
    Fields<Struct>(m, "UpdateTensor")
        FIELD(param) FIELD(grad) FIELD(first) FIELD(second) FIELD(numel) FIELD(offset)
        FIELD(stream) FIELD(index) FIELD(rule) FIELD(step) FIELD(device_step);
  }
  {
    using Struct = UpdateParams;
    Fields<Struct>(m, "UpdateParams")
        FIELD(dtype) FIELD(update) FIELD(source) FIELD(device_lr) FIELD(device_std)
        FIELD(grad_scale) FIELD(found_inf) FIELD(norms) FIELD(indices) FIELD(workspace) FIELD(count);
  }
  {
    using Struct = RegressionParams;
    Fields<Struct>(m, "RegressionParams")
        FIELD(x) FIELD(y) FIELD(samples) FIELD(replicas) FIELD(steps) FIELD(per_sample) FIELD(seed)
        FIELD(theta) FIELD(lr) FIELD(lam) FIELD(sigma) FIELD(stream) FIELD(result) FIELD(trajectory);
  }
  {
    using Struct = cuda::Device;
    Fields<Struct>(m, "Device") FIELD(arch) FIELD(sms) FIELD(shared_per_block) FIELD(shared_per_sm);
  }
  {
    using Struct = cuda::DistillationPlan;
    Fields<Struct>(m, "DistillationPlan")
        FIELD(walk) FIELD(threads) FIELD(lanes) FIELD(rows) FIELD(cluster) FIELD(slots) FIELD(shared);
  }
  {
    using Struct = cuda::DivergencePlan;
    Fields<Struct>(m, "DivergencePlan") FIELD(threads) FIELD(capacity) FIELD(shared);
  }
  {
    using Struct = cuda::NoisePlan;
    Fields<Struct>(m, "NoisePlan") FIELD(blocks) FIELD(steps);
  }
  {
    using Struct = cuda::RegressionPlan;
    Fields<Struct>(m, "RegressionPlan") FIELD(warp) FIELD(blocks);
    // clang-format on
  }
  py::enum_<cuda::Extra>(m, "Extra", py::module_local())
      .value("nothing", cuda::Extra::kNothing)
      .value("statistics", cuda::Extra::kStatistics)
      .value("transforms", cuda::Extra::kTransforms);
  py::enum_<cuda::Walk>(m, "Walk", py::module_local())
      .value("tile", cuda::Walk::kTile)
      .value("warp", cuda::Walk::kWarp)
      .value("held", cuda::Walk::kHeld)
      .value("stream", cuda::Walk::kStream);

  // Each launches on `stream`, an address, and raises if the launch fails.
  m.def("loss", [](const LossParams& p, uintptr_t stream) {
    check(cuda::loss(p, reinterpret_cast<cudaStream_t>(stream)));
  });
  m.def("loss_workspace", cuda::loss_workspace);
  m.attr("divergence_static") = cuda::kDivergenceStatic;
  m.attr("row_state") = math::kRowState;
  m.attr("statistics") = math::kStatistics;
  m.def("scale_rows", [](const ScaleParams& p, uintptr_t stream) {
    check(cuda::scale_rows(p, reinterpret_cast<cudaStream_t>(stream)));
  });
  m.def("noise", [](NoiseParams p, const std::vector<NoiseTensor>& tensors, uintptr_t stream) {
    check(cuda::noise(with_list(p, tensors), reinterpret_cast<cudaStream_t>(stream)));
  });
  m.def("noise_workspace", cuda::noise_workspace);
  m.def("noise_dot",
        [](NoiseDotParams p, const std::vector<NoiseTensor>& tensors, uintptr_t stream) {
    check(cuda::noise_dot(with_list(p, tensors), reinterpret_cast<cudaStream_t>(stream)));
  });
  m.def("noise_dot_workspace", cuda::noise_dot_workspace);
  m.def("combine", [](CombineParams p, const std::vector<NoiseTensor>& tensors, uintptr_t stream) {
    check(cuda::combine(with_list(p, tensors), reinterpret_cast<cudaStream_t>(stream)));
  });
  m.def("update", [](UpdateParams p, const std::vector<UpdateTensor>& tensors,
                     const std::vector<math::UpdateRule>& rules, uintptr_t stream) {
    p.rules = rules.data();
    p.rule_count = static_cast<int64_t>(rules.size());
    check(cuda::update(with_list(p, tensors), reinterpret_cast<cudaStream_t>(stream)));
  });
  m.def("update_workspace", cuda::update_workspace);
  m.attr("sum_blocks") = cuda::kSumBlocks;
  m.def("regression", [](const RegressionParams& p, uintptr_t stream) {
    check(cuda::regression(p, reinterpret_cast<cudaStream_t>(stream)));
  });
  m.def("plan_distillation", cuda::plan_distillation);
  m.def("plan_divergence", cuda::plan_divergence);
  m.def("plan_noise", cuda::plan_noise);
  m.def("plan_sums", cuda::plan_sums);
  m.def("plan_regression", cuda::plan_regression);
}
