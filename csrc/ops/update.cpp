// noisy_update_: schema, argument checks, CPU and CUDA calls, fake tensors.
#include "ops/update.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <cmath>

#include "ops/checks.h"
#include "ops/devices.h"
#include "ops/tensor_lists.h"

namespace kdkernels {

const std::vector<RuleField>& rule_fields() {
  using R = math::UpdateRule;
  static const std::vector<RuleField> table = {
      {"lr", &R::lr},
      {"std", &R::std},
      {"weight_decay", &R::weight_decay},
      {"momentum", &R::momentum},
      {"dampening", &R::dampening},
      {"beta1", &R::beta1},
      {"beta2", &R::beta2},
      {"eps", &R::eps},
      {"num_data", &R::num_data, 1},
      {"temperature", &R::temperature},
      {"nesterov", &R::nesterov},
      {"maximize", &R::maximize},
      {"stochastic_rounding", &R::stochastic_rounding},
  };
  return table;
}

namespace {

using at::Tensor;
using math::Update;

// ---- the arguments -------------------------------------------------------------------------------

void check_not_negative(const char* name, double value) {
  TORCH_CHECK_VALUE(value >= 0 && std::isfinite(value), name, " is ", value,
                    "; it must be finite and 0 or more");
}

std::vector<math::UpdateRule> rules_of(at::ArrayRef<double> numbers) {
  size_t fields = rule_fields().size();
  TORCH_CHECK_VALUE(numbers.size() % fields == 0, "rules has ", numbers.size(),
                    " numbers; it must have ", fields, " per rule");
  std::vector<math::UpdateRule> rules(numbers.size() / fields);
  const double* number = numbers.data();
  for (math::UpdateRule& rule : rules) {
    for (const RuleField& field : rule_fields()) {
      std::visit([&](auto member) { rule.*member = *number++; }, field.member);
    }
    check_not_negative("lr", rule.lr);
    check_not_negative("std", rule.std);
  }
  return rules;
}

// The arguments of noisy_update_ taken apart.
struct UpdateCall {
  Update update;
  at::TensorList params, grads, first, second;  // moments are empty where the update has none
  std::vector<math::UpdateRule> rules;
  at::IntArrayRef rule_of, steps;
  OptionalTensor lr, std, grad_scale, found_inf;
  std::vector<Tensor> step_tensors;

  UpdateCall(at::IntArrayRef packed, at::TensorList all_params, at::TensorList all_grads,
             at::TensorList moments, at::ArrayRef<double> fields, const TensorOptionals& tensors)
      : params(all_params), grads(all_grads), rules(rules_of(fields)) {
    size_t count = params.size();
    TORCH_CHECK_VALUE(!packed.empty() && packed[0] >= 0 && packed[0] <= 3, "update is ",
                      packed.empty() ? -1 : packed[0], "; it must be from 0 to 3");
    update = static_cast<Update>(packed[0]);
    TORCH_CHECK_VALUE(packed.size() > count, "rule_of has ", packed.size() - 1, " numbers for ",
                      count, " params; it must have one each");
    rule_of = packed.slice(1, count);
    steps = packed.slice(1 + count);
    size_t needed = count * (math::has_first(update) + math::has_second(update));
    TORCH_CHECK_VALUE(moments.empty() || moments.size() == needed, "moments has ", moments.size(),
                      " tensors for ", count, " params; it must have ", needed, " or none");
    if (math::has_first(update) && !moments.empty()) first = moments.slice(0, count);
    if (math::has_second(update) && !moments.empty()) second = moments.slice(needed - count);
    lr = tensor_at(tensors, 2);
    std = tensor_at(tensors, 3);
    grad_scale = tensor_at(tensors, 4);
    found_inf = tensor_at(tensors, 5);
    for (size_t i = 6; i < tensors.size(); ++i) {
      step_tensors.push_back(tensors.get(i).value_or(Tensor()));
    }
  }

  bool needs_first(size_t i) const {
    return math::has_first(update) && (update != Update::kSgd || rule(i).momentum != 0);
  }
  const math::UpdateRule& rule(size_t i) const { return rules[static_cast<size_t>(rule_of[i])]; }
};

bool has(at::TensorList moments, size_t i) {
  return !moments.empty() && moments[i].sym_numel() != 0;
}

// ---- checks --------------------------------------------------------------------------------------

void check_like(const char* name, size_t i, const Tensor& tensor, const Tensor& param) {
  check_plain(name, tensor, param);
  check_tensor(name, tensor);
  TORCH_CHECK_TYPE(tensor.scalar_type() == param.scalar_type(), name, "[", i, "] has dtype ",
                   tensor.scalar_type(), "; it must have that of params[", i, "], ",
                   param.scalar_type());
  TORCH_CHECK_VALUE(tensor.sym_sizes() == param.sym_sizes(), name, "[", i, "] has shape ",
                    tensor.sym_sizes(), "; it must have that of params[", i, "], ",
                    param.sym_sizes());
  check_device(name, tensor, "the params", param);
}

void check_moment(const char* name, const UpdateCall& call, at::TensorList moments, size_t i,
                  bool needed) {
  if (has(moments, i)) return check_like(name, i, moments[i], call.params[i]);
  TORCH_CHECK_VALUE(!needed || call.params[i].sym_numel() == 0, name, "[", i,
                    "] is empty, but the rule of params[", i, "] needs it");
}

void check_scalar(const char* name, const Tensor& tensor, const Tensor& like) {
  check_plain(name, tensor, like);
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat, name, " has dtype ", tensor.scalar_type(),
                   "; it must be float32");
  TORCH_CHECK_VALUE(tensor.sym_numel() == 1, name, " has shape ", tensor.sym_sizes(),
                    "; it must have one element");
  check_device(name, tensor, "the params", like);
}

void check_steps(const UpdateCall& call) {
  size_t count = call.params.size(), numbers = call.steps.size(),
         tensors = call.step_tensors.size();
  TORCH_CHECK_VALUE(numbers == 0 ? tensors == count : tensors == 0 && numbers == count,
                    "steps has ", numbers, " numbers and step_tensors ", tensors, " tensors for ",
                    count, " params; one of them must have one each");
  for (int64_t step : call.steps) {
    TORCH_CHECK_VALUE(step >= 1, "steps holds ", step, "; it must hold numbers of 1 or more");
  }
  for (const Tensor& step : call.step_tensors) check_scalar("step_tensors", step, call.params[0]);
}

void check_call(const UpdateCall& call, const OptionalTensor& norms) {
  const Tensor& like = call.params[0];
  check_steps(call);
  for (size_t i = 0; i < call.params.size(); ++i) {
    int64_t rule = call.rule_of[i];
    TORCH_CHECK_VALUE(rule >= 0 && rule < static_cast<int64_t>(call.rules.size()), "rule_of[", i,
                      "] is ", rule, "; there are ", call.rules.size(), " rules");
    check_like("grads", i, call.grads[i], call.params[i]);
    check_moment("first", call, call.first, i, call.needs_first(i));
    check_moment("second", call, call.second, i, math::has_second(call.update));
  }
  check_writable("params", call.params);
  if (call.grad_scale.has_value()) check_writable("grads", call.grads);
  check_writable("first", call.first);
  check_writable("second", call.second);
  if (call.lr.has_value()) check_each("lr", *call.lr, "rule", call.rules.size(), like);
  if (call.std.has_value()) check_each("std", *call.std, "rule", call.rules.size(), like);
  if (call.grad_scale.has_value()) check_scalar("grad_scale", *call.grad_scale, like);
  if (call.found_inf.has_value()) check_scalar("found_inf", *call.found_inf, like);
  check_norms(norms, call.params.size(), like);
}

// ---- kernels -------------------------------------------------------------------------------------

void run_update(const UpdateParams& p, const at::Device& device) {
  if (!on_cuda(device)) return cpu::update(p, at::get_num_threads());
#if defined(KDKERNELS_WITH_CUDA)
  launch_cuda(device, p, cuda::update_workspace(p), cuda::update);
#endif
}

// A parameter's memory, whole: `numel` and `offset` are those of its runs. Gradients that are only read, and are not
// row-major, are copied into `dense`.
UpdateTensor memory_of(const UpdateCall& call, size_t i, InPlace& in_place,
                       std::vector<Tensor>& dense) {
  UpdateTensor t = {};
  t.param = in_place.data(call.params[i], "params", i);
  if (call.grad_scale.has_value()) {
    t.grad = in_place.data(call.grads[i], "grads", i);
  } else {
    dense.push_back(call.grads[i].contiguous());
    t.grad = const_cast<void*>(dense.back().const_data_ptr());
  }
  if (has(call.first, i)) t.first = in_place.data(call.first[i], "first", i);
  if (has(call.second, i)) t.second = in_place.data(call.second[i], "second", i);
  t.rule = static_cast<int32_t>(call.rule_of[i]);
  if (!call.steps.empty()) {
    t.step = call.steps[i];
  } else if (on_cuda(call.params[i].device())) {
    t.device_step = call.step_tensors[i].const_data_ptr<float>();
  } else {
    t.step = static_cast<int64_t>(*call.step_tensors[i].const_data_ptr<float>());
  }
  return t;
}

UpdateTensor run_of(UpdateTensor t, int64_t begin_byte) {
  for (void** data : {&t.param, &t.grad, &t.first, &t.second}) {
    if (*data != nullptr) *data = static_cast<char*>(*data) + begin_byte;
  }
  return t;
}

void update_kernel(at::IntArrayRef update, at::TensorList params, at::TensorList grads,
                   at::TensorList moments, at::ArrayRef<double> rules, c10::SymIntArrayRef noise,
                   const TensorOptionals& tensors, const OptionalTensor& norms) {
  size_t count = params.size();
  check_list("params", params);
  TORCH_CHECK_VALUE(grads.size() == count, "grads has ", grads.size(), " tensors for ", count,
                    " params; it must have one each");
  const UpdateCall call(update, params, grads, moments, rules, tensors);
  if (count == 0) return;
  check_call(call, norms);
  NoiseNumbers numbers(noise, tensors, count);
  at::Device device = params[0].device();
  if (device.is_meta()) return;

  UpdateParams p = {};
  p.update = call.update;
  p.source = source_of(numbers, device);
  p.rules = call.rules.data();
  p.rule_count = static_cast<int64_t>(call.rules.size());
  Tensor lrs, stds;
  auto each_rule = [&](const OptionalTensor& given, Tensor& each) -> const double* {
    if (!given.has_value()) return nullptr;
    each = given->detach().expand({p.rule_count}).contiguous();
    return each.const_data_ptr<double>();
  };
  p.device_lr = each_rule(call.lr, lrs);
  p.device_std = each_rule(call.std, stds);
  if (call.grad_scale.has_value()) p.grad_scale = call.grad_scale->const_data_ptr<float>();
  if (call.found_inf.has_value()) p.found_inf = call.found_inf->const_data_ptr<float>();

  std::vector<NoisePlace> places = places_of(numbers, params);
  InPlace in_place(4 * count);
  std::vector<Tensor> dense;
  dense.reserve(count);
  std::vector<UpdateTensor> whole;
  whole.reserve(count);
  for (size_t i = 0; i < count; ++i) whole.push_back(memory_of(call, i, in_place, dense));
  in_place.check_apart("noisy_update_");

  GroupResults results(norms.value_or(Tensor()), count);
  for (const DtypeGroup& group : grouped_by_dtype(params)) {
    std::vector<UpdateTensor> runs;
    runs.reserve(group.members.size());
    for (size_t j = 0; j < group.members.size(); ++j) {
      size_t i = group.members[j];
      auto bytes = static_cast<int64_t>(params[i].element_size());
      for_runs(places[i], params[i].numel(), [&](int64_t first, int64_t numel, uint64_t offset) {
        UpdateTensor t = run_of(whole[i], first * bytes);
        t.numel = numel;
        t.offset = offset;
        t.stream = places[i].stream;
        t.index = static_cast<int32_t>(j);
        runs.push_back(t);
      });
    }
    results.fill(group, runs.empty(), [&](double* at) {
      p.norms = at;
      set_runs(p, group, runs);
      run_update(p, device);
    });
  }
  in_place.write_back();
}

}  // namespace

void noisy_update_(at::IntArrayRef update, at::TensorList params, at::TensorList grads,
                   at::TensorList moments, at::ArrayRef<double> rules, c10::SymIntArrayRef noise,
                   const TensorOptionals& tensors, const OptionalTensor& norms) {
  check_no_gradient("noisy_update_", "params", params);
  static auto op = dispatched<decltype(noisy_update_)>("kdkernels::noisy_update_");
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  op.call(update, params, grads, moments, rules, noise, tensors, norms);
}

TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  m.def(
      "noisy_update_(int[] update, Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] moments, "
      "float[] rules, SymInt[] noise, Tensor?[] tensors, Tensor(d!)? norms) -> ()");
}
TORCH_LIBRARY_IMPL(kdkernels, CompositeExplicitAutograd, m) {
  m.impl("noisy_update_", update_kernel);
}
TORCH_LIBRARY_IMPL(kdkernels, Autograd, m) { m.impl("noisy_update_", noisy_update_); }

}  // namespace kdkernels
