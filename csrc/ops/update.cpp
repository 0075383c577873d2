// noisy_update_: schema, argument checks, CPU and CUDA calls, fake tensors.
#include "ops/update.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <cmath>

#include "ops/checks.h"
#include "ops/devices.h"

namespace kdkernels {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr size_t kRuleNumbers = 12;

struct Moments {
  const char* name;
  at::TensorList tensors;
  bool has(size_t i) const { return !tensors.empty() && tensors[i].sym_numel() != 0; }
};

std::vector<math::UpdateRule> rules_of(at::ArrayRef<double> numbers) {
  TORCH_CHECK_VALUE(numbers.size() % kRuleNumbers == 0, "rules has ", numbers.size(),
                    " numbers; it takes ", kRuleNumbers, " a rule");
  std::vector<math::UpdateRule> rules;
  for (size_t i = 0; i < numbers.size(); i += kRuleNumbers) {
    const double* n = numbers.data() + i;
    TORCH_CHECK_VALUE(n[0] >= 0 && std::isfinite(n[0]), "lr is ", n[0],
                      "; it takes a finite number, 0 or more");
    check_std(n[1]);
    rules.push_back(
        {n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10] != 0, n[11] != 0});
  }
  return rules;
}

void check_like(const char* name, at::TensorList tensors, at::TensorList params) {
  TORCH_CHECK_VALUE(tensors.size() == params.size(), name, " has ", tensors.size(), " tensors for ",
                    params.size(), " params; it takes one each");
}

void check_like(const char* name, size_t i, const Tensor& tensor, const Tensor& param) {
  check_plain(name, tensor, param);
  check_tensor(name, tensor);
  TORCH_CHECK_TYPE(tensor.scalar_type() == param.scalar_type(), name, "[", i, "] has dtype ",
                   tensor.scalar_type(), "; it takes params[", i, "]'s, ", param.scalar_type());
  TORCH_CHECK_VALUE(tensor.sym_sizes() == param.sym_sizes(), name, "[", i, "] has shape ",
                    tensor.sym_sizes(), "; it takes params[", i, "]'s, ", param.sym_sizes());
  check_device(name, tensor, "the params", param);
}

bool needs_first(math::Update update, const math::UpdateRule& rule) {
  return update == math::Update::kAdamW || (update == math::Update::kSgd && rule.momentum != 0);
}

bool needs_second(math::Update update) {
  return update == math::Update::kAdamW || update == math::Update::kPsgld;
}

void check_scaler(const char* name, const OptionalTensor& tensor, const Tensor& like) {
  if (!tensor.has_value()) return;
  check_plain(name, *tensor, like);
  TORCH_CHECK_TYPE(tensor->scalar_type() == at::kFloat, name, " has dtype ", tensor->scalar_type(),
                   "; it takes float32");
  TORCH_CHECK_VALUE(tensor->sym_numel() == 1, name, " has shape ", tensor->sym_sizes(),
                    "; it takes one element");
  check_device(name, *tensor, "the params", like);
}

void check_steps(at::IntArrayRef steps, at::TensorList step_tensors, at::TensorList params) {
  TORCH_CHECK_VALUE(steps.empty() ? step_tensors.size() == params.size()
                                  : step_tensors.empty() && steps.size() == params.size(),
                    "steps has ", steps.size(), " numbers and step_tensors ", step_tensors.size(),
                    " tensors for ", params.size(), " params; one of them takes one each");
  for (int64_t step : steps) {
    TORCH_CHECK_VALUE(step >= 1, "steps holds ", step, "; it takes 1 or more");
  }
  for (const Tensor& step : step_tensors) check_scaler("step_tensors", step, params[0]);
}

const float* scalar(const OptionalTensor& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<float>() : nullptr;
}

void run(const UpdateParams& p, const at::Device& device) {
  if (!on_cuda(device)) return cpu::update(p, at::get_num_threads());
#if defined(KDKERNELS_WITH_CUDA)
  launch_cuda(device, p, cuda::update_workspace(p), cuda::update);
#endif
}

void update_forward(int64_t update, at::TensorList params, at::TensorList grads,
                    at::TensorList first, at::TensorList second, at::IntArrayRef steps,
                    at::TensorList step_tensors, at::IntArrayRef rule_of,
                    at::ArrayRef<double> rules, KD_NOISE_LIST_PARAMS,
                    const OptionalTensor& lr_tensor, const OptionalTensor& std_tensor,
                    const OptionalTensor& grad_scale, const OptionalTensor& found_inf,
                    const OptionalTensor& norms) {
  NoiseListArgs noise = KD_NOISE_LIST_ARGS;
  size_t count = params.size();
  TORCH_CHECK_VALUE(update >= 0 && update <= 3, "update is ", update, "; it takes 0 to 3");
  auto kind = static_cast<math::Update>(update);
  std::vector<math::UpdateRule> checked_rules = rules_of(rules);
  const Moments moments[] = {{"first", first}, {"second", second}};
  check_list("params", params);
  check_like("grads", grads, params);
  if (count == 0) return;
  for (const Moments& m : moments) {
    if (!m.tensors.empty()) check_like(m.name, m.tensors, params);
  }
  check_steps(steps, step_tensors, params);
  TORCH_CHECK_VALUE(rule_of.size() == count, "rule_of has ", rule_of.size(), " numbers for ", count,
                    " params; it takes one each");
  for (size_t i = 0; i < count; ++i) {
    int64_t rule = rule_of[i];
    TORCH_CHECK_VALUE(rule >= 0 && rule < static_cast<int64_t>(checked_rules.size()), "rule_of[", i,
                      "] is ", rule, "; there are ", checked_rules.size(), " rules");
    check_like("grads", i, grads[i], params[i]);
    const bool needed[] = {needs_first(kind, checked_rules[rule]), needs_second(kind)};
    for (int k = 0; k < 2; ++k) {
      const Moments& m = moments[k];
      if (m.has(i)) check_like(m.name, i, m.tensors[i], params[i]);
      TORCH_CHECK_VALUE(!needed[k] || m.has(i) || params[i].sym_numel() == 0, m.name, "[", i,
                        "] is empty, and the rule of params[", i, "] needs it");
    }
  }
  check_noise(noise, count);
  check_writable("params", params);
  if (grad_scale.has_value()) check_writable("grads", grads);
  for (const Moments& m : moments) check_writable(m.name, m.tensors);
  if (lr_tensor.has_value()) {
    check_each("lr", *lr_tensor, "rule", checked_rules.size(), params[0]);
  }
  if (std_tensor.has_value()) {
    check_each("std", *std_tensor, "rule", checked_rules.size(), params[0]);
  }
  check_scaler("grad_scale", grad_scale, params[0]);
  check_scaler("found_inf", found_inf, params[0]);
  check_norms(norms, count, params[0]);
  at::Device device = params[0].device();
  if (device.is_meta()) return;

  UpdateParams p = {};
  p.update = kind;
  p.source = source_of(noise, device);
  p.rules = checked_rules.data();
  p.rule_count = static_cast<int64_t>(checked_rules.size());
  auto each_rule = [&](const OptionalTensor& tensor) {
    return tensor.has_value() ? tensor->detach().expand({p.rule_count}).contiguous() : Tensor();
  };
  Tensor lrs = each_rule(lr_tensor), stds = each_rule(std_tensor);
  if (lrs.defined()) p.device_lr = lrs.const_data_ptr<double>();
  if (stds.defined()) p.device_std = stds.const_data_ptr<double>();
  p.grad_scale = scalar(grad_scale);
  p.found_inf = scalar(found_inf);

  std::vector<Place> places = places_of(noise, params);
  InPlace in_place;
  std::vector<Tensor> dense_grads;
  std::vector<UpdateTensor> whole(count);
  for (size_t i = 0; i < count; ++i) {
    UpdateTensor& t = whole[i];
    t.param = in_place.data(params[i], "params", i);
    if (grad_scale.has_value()) {
      t.grad = in_place.data(grads[i], "grads", i);
    } else {
      dense_grads.push_back(grads[i].contiguous());
      t.grad = const_cast<void*>(dense_grads.back().const_data_ptr());
    }
    t.first = moments[0].has(i) ? in_place.data(first[i], "first", i) : nullptr;
    t.second = moments[1].has(i) ? in_place.data(second[i], "second", i) : nullptr;
    t.stream = places[i].stream;
    t.rule = static_cast<int32_t>(rule_of[i]);
    if (!steps.empty()) {
      t.step = steps[i];
    } else if (on_cuda(device)) {
      t.device_step = step_tensors[i].const_data_ptr<float>();
    } else {
      t.step = static_cast<int64_t>(*step_tensors[i].const_data_ptr<float>());
    }
  }
  in_place.check_apart("noisy_update_");

  Rows rows(norms.value_or(Tensor()), count);
  for (const DtypeGroup& group : grouped_by_dtype(params)) {
    std::vector<UpdateTensor> list;
    list.reserve(group.members.size());
    for (size_t j = 0; j < group.members.size(); ++j) {
      size_t i = group.members[j];
      auto bytes = static_cast<int64_t>(params[i].element_size());
      for_runs(places[i], params[i].numel(),
               [&](int64_t begin, int64_t numel, uint64_t first_number) {
        auto advance = [&](void* data) {
          return data == nullptr ? nullptr : static_cast<char*>(data) + begin * bytes;
        };
        UpdateTensor t = whole[i];
        t.param = advance(t.param);
        t.grad = advance(t.grad);
        t.first = advance(t.first);
        t.second = advance(t.second);
        t.numel = numel;
        t.offset = first_number;
        t.index = static_cast<int32_t>(j);
        list.push_back(t);
      });
    }
    rows.fill(group, list.empty(), [&](double* at) {
      p.norms = at;
      set_runs(p, group, list);
      run(p, device);
    });
  }
  in_place.write_back();
}

}  // namespace

void noisy_update_(int64_t update, at::TensorList params, at::TensorList grads,
                   at::TensorList first, at::TensorList second, at::IntArrayRef steps,
                   at::TensorList step_tensors, at::IntArrayRef rule_of, at::ArrayRef<double> rules,
                   KD_NOISE_LIST_PARAMS, const OptionalTensor& lr_tensor,
                   const OptionalTensor& std_tensor, const OptionalTensor& grad_scale,
                   const OptionalTensor& found_inf, const OptionalTensor& norms) {
  check_no_gradient("noisy_update_", "params", params);
  static auto handle = dispatched<decltype(update_forward)>("kdkernels::noisy_update_");
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  handle.call(update, params, grads, first, second, steps, step_tensors, rule_of, rules, seed, step,
              streams, offsets, runs, seed_tensor, step_tensor, distribution, lr_tensor, std_tensor,
              grad_scale, found_inf, norms);
}

TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  m.def(
      "noisy_update_(int update, Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] first, "
      "Tensor(d!)[] second, int[] steps, Tensor[] step_tensors, int[] rule_of, float[] rules, "
      "*, " KD_NOISE_LIST_SCHEMA
      ", Tensor? lr_tensor=None, Tensor? std_tensor=None, Tensor? grad_scale=None, Tensor? "
      "found_inf=None, Tensor(e!)? norms=None) -> ()");
}
TORCH_LIBRARY_IMPL(kdkernels, CompositeExplicitAutograd, m) {
  m.impl("noisy_update_", update_forward);
}
TORCH_LIBRARY_IMPL(kdkernels, Autograd, m) { m.impl("noisy_update_", noisy_update_); }

}  // namespace kdkernels
