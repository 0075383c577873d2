// The noise ops below autograd: checks, and one kernel call per dtype. No op keeps noise: where it is needed again, it
// is made again from the same numbers.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cmath>

#include "ops/checks.h"
#include "ops/devices.h"
#include "ops/noise.h"
#include "ops/tensor_lists.h"

namespace kdkernels {
namespace {

using at::Tensor;

void run_noise(const NoiseParams& p, const at::Device& device) {
  if (!on_cuda(device)) return cpu::noise(p, at::get_num_threads());
#if defined(KDKERNELS_WITH_CUDA)
  launch_cuda(device, p, cuda::noise_workspace(p), cuda::noise);
#endif
}

void run_noise_dot(const NoiseDotParams& p, const at::Device& device) {
  if (!on_cuda(device)) return cpu::noise_dot(p, at::get_num_threads());
#if defined(KDKERNELS_WITH_CUDA)
  launch_cuda(device, p, cuda::noise_dot_workspace(p), cuda::noise_dot);
#endif
}

void run_combine(const CombineParams& p, const at::Device& device) {
  if (!on_cuda(device)) return cpu::combine(p, at::get_num_threads());
#if defined(KDKERNELS_WITH_CUDA)
  launch_cuda(device, [&](cudaStream_t s) { return cuda::combine(p, s); });
#endif
}

// ---- one tensor ----------------------------------------------------------------------------------

void check_std_tensor(const Tensor& std, const Tensor& x) {
  check_plain("std", std, x);
  TORCH_CHECK_TYPE(is_floating_dtype(std.scalar_type()), "std has dtype ", std.scalar_type(),
                   "; as a tensor it must be float32, float64, bfloat16 or float16");
  check_device("std", std, "x", x);
  if (std.sym_numel() == 1) return;
  bool fits = std.dim() <= x.dim();
  for (int64_t d = 1; fits && d <= std.dim(); ++d) {
    fits = std.sym_size(-d) == 1 || std.sym_size(-d) == x.sym_size(-d);
  }
  TORCH_CHECK_VALUE(fits, "std has shape ", std.sym_sizes(), " and x ", x.sym_sizes(),
                    "; as a tensor std must have one element, or a shape that broadcasts to x's");
}

// The std of element i of x is stds[i / inner % size].
struct RepeatedStds {
  Tensor stds;
  int64_t size, inner;
};
RepeatedStds repeated_stds(const Tensor& std, const Tensor& x, at::ScalarType dtype) {
  int64_t size = 1, inner = 1;
  bool ended = false, one_block = true;
  for (int64_t d = 1; d <= x.dim(); ++d) {
    int64_t n = x.size(-d);
    if (n == 1) continue;
    bool varies = d <= std.dim() && std.size(-d) != 1;
    one_block &= !(varies && ended);
    ended |= size > 1 && !varies;
    if (varies) {
      size *= n;
    } else if (size == 1) {
      inner *= n;
    }
  }
  Tensor stds = std.detach();
  if (!one_block) {
    stds = stds.expand(x.sizes());
    size = x.numel();
    inner = 1;
  }
  return {stds.to(dtype).contiguous(), size, size == 1 ? 1 : inner};
}

}  // namespace

void check_one(const Tensor& x, const OptionalTensor& std_tensor, double std,
               c10::SymIntArrayRef noise, const TensorOptionals& noise_tensors) {
  check_plain("x", x, x);
  check_tensor("x", x);
  TORCH_CHECK_VALUE(std >= 0 && std::isfinite(std), "std is ", std,
                    "; it must be finite and 0 or more");
  NoiseNumbers(noise, noise_tensors, 1);
  if (std_tensor.has_value()) check_std_tensor(*std_tensor, x);
}

namespace {

// The runs of a tensor, or its rows, behind `runs`; its element 0 is at `to` and at `from`, either of which may be null.
void add_runs(const Tensor& x, char* to, const char* from, double std, const NoisePlace& place,
              int32_t index, int64_t rows, std::vector<NoiseTensor>& runs) {
  auto add = [&](int64_t first, int64_t count, uint64_t offset, int64_t row) {
    const int64_t bytes = first * static_cast<int64_t>(x.element_size());
    runs.push_back({to == nullptr ? nullptr : to + bytes, from == nullptr ? nullptr : from + bytes,
                    count, std, offset, place.stream, index, row});
  };
  if (rows > 0) {
    for_rows(rows, x.numel(), [&](int64_t first, int64_t count, int64_t row) {
      add(first, count, place.offset, row);
    });
  } else {
    for_runs(place, x.numel(),
             [&](int64_t first, int64_t count, uint64_t offset) { add(first, count, offset, 0); });
  }
}

}  // namespace

Tensor apply_noise(const Tensor& x, int64_t mode, const OptionalTensor& std_tensor, double std,
                   c10::SymIntArrayRef noise, const TensorOptionals& noise_tensors) {
  NoiseNumbers numbers(noise, noise_tensors, 1);
  NoiseParams p = {};
  p.mode = static_cast<NoiseMode>(mode);
  const bool only = p.mode == NoiseMode::kOnly;  // needs none of x's values
  Tensor out = at::empty_like(x, x.options(),
                              only ? at::MemoryFormat::Contiguous : at::MemoryFormat::Preserve);
  if (x.is_meta()) return out;
  const RowNumbers rows(numbers, x);
  p.source = rows.source;
  p.rows = rows.rows;
  NoisePlace place = places_of(numbers, x)[0];
  if (x.numel() == 0) return out;
  p.dtype = dtype_of(x);
  p.std_size = p.std_inner = 1;
  RepeatedStds repeated;
  if (std_tensor.has_value() && std_tensor->numel() == 1 && !on_cuda(x.device())) {
    std = std_tensor->item<double>();
  } else if (std_tensor.has_value()) {
    repeated = repeated_stds(*std_tensor, x, acc_type(p.dtype));
    p.stds = repeated.stds.const_data_ptr();
    p.std_size = repeated.size;
    p.std_inner = repeated.inner;
  }
  TORCH_CHECK_VALUE(place.run == 0 || p.std_size == 1, "std has shape ", std_tensor->sizes(),
                    "; for a tensor in several runs it must have one element");
  return written_in_order(out, [&](void* memory) {
    const Tensor in = only ? x : x.contiguous();
    auto* to = static_cast<char*>(memory);
    auto* from = only ? nullptr : static_cast<const char*>(in.const_data_ptr());
    std::vector<NoiseTensor> runs;
    add_runs(x, to, from, std, place, 0, p.rows, runs);
    p.tensors = runs.data();
    p.count = static_cast<int64_t>(runs.size());
    p.indices = 1;
    run_noise(p, x.device());
  });
}

namespace {

Tensor randn_like_kernel(const Tensor& x, c10::SymIntArrayRef noise,
                         const TensorOptionals& noise_tensors) {
  check_tensor("x", x);
  return apply_noise(x, static_cast<int64_t>(NoiseMode::kOnly), std::nullopt, 1, noise,
                     noise_tensors);
}

Tensor input_noise_kernel(const Tensor& x, const OptionalTensor& std_tensor, double std,
                          bool multiplicative, c10::SymIntArrayRef noise,
                          const TensorOptionals& noise_tensors) {
  check_one(x, std_tensor, std, noise, noise_tensors);
  auto mode = multiplicative ? NoiseMode::kScale : NoiseMode::kAdd;
  return apply_noise(x, static_cast<int64_t>(mode), std_tensor, std, noise, noise_tensors);
}

Tensor gradient_noise_kernel(const Tensor& x, const OptionalTensor& std_tensor, double std, bool,
                             c10::SymIntArrayRef noise, const TensorOptionals& noise_tensors) {
  check_one(x, std_tensor, std, noise, noise_tensors);
  return x.view_as(x);
}

// ---- lists of tensors ----------------------------------------------------------------------------

// The runs of a group's tensors, or their rows; element 0 of tensor i is at out[i] and at in[i], either of which may be empty.
std::vector<NoiseTensor> runs_of(const DtypeGroup& group, at::TensorList tensors,
                                 const std::vector<NoisePlace>& places,
                                 const std::vector<void*>& out, const std::vector<const void*>& in,
                                 at::ArrayRef<double> std, int64_t rows = 0) {
  std::vector<NoiseTensor> runs;
  runs.reserve(group.members.size());
  for (size_t j = 0; j < group.members.size(); ++j) {
    size_t i = group.members[j];
    auto* to = out.empty() ? nullptr : static_cast<char*>(out[i]);
    auto* from = in.empty() ? nullptr : static_cast<const char*>(in[i]);
    add_runs(tensors[i], to, from, std.empty() ? 0.0 : std[std.size() == 1 ? 0 : i], places[i],
             static_cast<int32_t>(j), rows, runs);
  }
  return runs;
}

// Where tensors that an op writes in place begin.
std::vector<void*> written_in_place(InPlace& in_place, at::TensorList tensors, const char* op) {
  std::vector<void*> out(tensors.size());
  for (size_t i = 0; i < out.size(); ++i) out[i] = in_place.data(tensors[i], "tensors", i);
  in_place.check_apart(op);
  return out;
}

void add_noise_kernel(at::TensorList tensors, at::ArrayRef<double> std,
                      const OptionalTensor& std_tensor, bool multiplicative,
                      c10::SymIntArrayRef noise, const TensorOptionals& noise_tensors,
                      const OptionalTensor& norms) {
  size_t count = tensors.size();
  // Of either sign: noise is taken off again by adding it with -std.
  for (double s : std)
    TORCH_CHECK_VALUE(std::isfinite(s), "std is ", s, "; it must be a finite number");
  check_list("tensors", tensors);
  if (count == 0) return;
  TORCH_CHECK_VALUE(std.size() == 1 || std.size() == count, "std has ", std.size(), " numbers for ",
                    count, " tensors; it must have one, or one per tensor");
  NoiseNumbers numbers(noise, noise_tensors, count);
  check_writable("tensors", tensors);
  if (std_tensor.has_value()) check_each("std", *std_tensor, "tensor", count, tensors[0]);
  check_norms(norms, count, tensors[0]);
  at::Device device = tensors[0].device();
  if (device.is_meta()) return;
  NoiseParams p = {};
  p.mode = multiplicative ? NoiseMode::kScale : NoiseMode::kAdd;
  const RowNumbers rows(numbers, tensors);
  TORCH_CHECK_VALUE(rows.rows == 0 || !norms.has_value(),
                    "norms are not made of noise that has a seed per row or on the device");
  p.source = rows.source;
  p.rows = rows.rows;
  p.std_size = p.std_inner = 1;
  std::vector<NoisePlace> places = places_of(numbers, tensors);
  InPlace in_place(count);
  std::vector<void*> out = written_in_place(in_place, tensors, "add_noise_");
  std::vector<const void*> in(out.begin(), out.end());
  GroupResults results(norms.value_or(Tensor()), count);
  for (const DtypeGroup& group : grouped_by_dtype(tensors)) {
    std::vector<NoiseTensor> runs = runs_of(group, tensors, places, out, in, std, rows.rows);
    Tensor stds;
    if (std_tensor.has_value()) {
      stds = numbers_of_group(*std_tensor, group, count, acc_type(group.dtype));
      p.stds = stds.const_data_ptr();
    }
    results.fill(group, runs.empty(), [&](double* at) {
      p.norms = at;
      set_runs(p, group, runs);
      if (p.rows == 0) return run_noise(p, device);
      // A call has the rows of one tensor.
      for (p.count = p.rows; p.tensors != runs.data() + runs.size(); p.tensors += p.rows)
        run_noise(p, device);
    });
  }
  in_place.write_back();
}

Tensor noise_dot_kernel(at::TensorList tensors, c10::SymIntArrayRef noise,
                        const TensorOptionals& noise_tensors) {
  size_t count = tensors.size();
  check_list("tensors", tensors);
  if (count == 0) return at::empty({0}, at::kDouble);
  NoiseNumbers numbers(noise, noise_tensors, count);
  at::Device device = tensors[0].device();
  Tensor result = at::empty({static_cast<int64_t>(count)}, tensors[0].options().dtype(at::kDouble));
  if (device.is_meta()) return result;
  NoiseDotParams p = {};
  p.source = source_of(numbers, device);
  std::vector<NoisePlace> places = places_of(numbers, tensors);
  std::vector<Tensor> dense;
  std::vector<const void*> in;
  for (const Tensor& tensor : tensors) {
    dense.push_back(tensor.contiguous());
    in.push_back(dense.back().const_data_ptr());
  }
  GroupResults results(result, count);
  for (const DtypeGroup& group : grouped_by_dtype(tensors)) {
    std::vector<NoiseTensor> runs = runs_of(group, tensors, places, {}, in, {});
    results.fill(group, runs.empty(), [&](double* at) {
      p.result = at;
      set_runs(p, group, runs);
      run_noise_dot(p, device);
    });
  }
  return result;
}

void combine_noise_kernel(at::TensorList tensors, const Tensor& coefficients, const Tensor& seeds,
                          c10::SymIntArrayRef noise, const TensorOptionals& noise_tensors) {
  size_t count = tensors.size();
  check_list("tensors", tensors);
  check_plain("coefficients", coefficients, count > 0 ? tensors[0] : coefficients);
  check_plain("seeds", seeds, count > 0 ? tensors[0] : seeds);
  TORCH_CHECK_TYPE(coefficients.scalar_type() == at::kDouble, "coefficients has dtype ",
                   coefficients.scalar_type(), "; it must be float64");
  TORCH_CHECK_TYPE(seeds.scalar_type() == at::kLong, "seeds has dtype ", seeds.scalar_type(),
                   "; it must be int64");
  TORCH_CHECK_VALUE(coefficients.dim() == 1 && seeds.sym_sizes() == coefficients.sym_sizes(),
                    "coefficients has shape ", coefficients.sym_sizes(), " and seeds ",
                    seeds.sym_sizes(), "; both must be one number per term, [terms]");
  if (count == 0) return;
  NoiseNumbers numbers(noise, noise_tensors, count);
  check_writable("tensors", tensors);
  at::Device device = tensors[0].device();
  for (const Tensor* term : {&coefficients, &seeds}) {
    TORCH_CHECK_VALUE(device.is_meta() || term->is_cpu() || term->device() == device,
                      term == &seeds ? "seeds" : "coefficients", " is on ", term->device(),
                      " and the tensors on ", device, "; it must be on that device or the CPU");
  }
  if (device.is_meta() || coefficients.is_meta() || seeds.is_meta()) return;
  Tensor factors = coefficients.detach().to(device).contiguous();
  Tensor keys = seeds.to(device).contiguous();
  CombineParams p = {};
  p.source = source_of(numbers, device);
  p.coefficients = factors.const_data_ptr<double>();
  p.seeds = keys.const_data_ptr<int64_t>();
  p.terms = keys.numel();
  std::vector<NoisePlace> places = places_of(numbers, tensors);
  if (p.terms == 0) return;
  InPlace in_place(count);
  std::vector<void*> out = written_in_place(in_place, tensors, "combine_noise_");
  for (const DtypeGroup& group : grouped_by_dtype(tensors)) {
    std::vector<NoiseTensor> runs = runs_of(group, tensors, places, out, {}, {});
    if (runs.empty()) continue;
    set_runs(p, group, runs);
    run_combine(p, device);
  }
  in_place.write_back();
}

// The count of a module's steps, which it raises by one. One op, so that a traced graph keeps the number for its
// backward pass, where it would otherwise read the raised count.
Tensor next_step(const Tensor& step) {
  Tensor before = step.clone();
  step.add_(1);
  return before;
}

}  // namespace

std::vector<Tensor> scaled_noise(at::TensorList tensors, const Tensor& scales,
                                 c10::SymIntArrayRef noise, const TensorOptionals& noise_tensors) {
  size_t count = tensors.size();
  check_list("tensors", tensors);
  if (count == 0) return {};
  NoiseNumbers numbers(noise, noise_tensors, count);
  check_each("scales", scales, "tensor", count, tensors[0]);
  std::vector<Tensor> outputs;
  for (const Tensor& x : tensors) {
    outputs.push_back(at::empty_like(x, x.options(), at::MemoryFormat::Contiguous));
  }
  at::Device device = tensors[0].device();
  if (device.is_meta()) return outputs;
  NoiseParams p = {};
  p.mode = NoiseMode::kOnly;
  p.source = source_of(numbers, device);
  p.std_size = p.std_inner = 1;
  std::vector<NoisePlace> places = places_of(numbers, tensors);
  std::vector<void*> out(count);
  for (size_t i = 0; i < count; ++i) out[i] = outputs[i].mutable_data_ptr();
  for (const DtypeGroup& group : grouped_by_dtype(tensors)) {
    std::vector<NoiseTensor> runs = runs_of(group, tensors, places, out, {}, {});
    if (runs.empty()) continue;
    Tensor stds = numbers_of_group(scales, group, count, acc_type(group.dtype));
    p.stds = stds.const_data_ptr();
    set_runs(p, group, runs);
    run_noise(p, device);
  }
  return outputs;
}

TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  m.def("randn_like(Tensor x, SymInt[] noise, Tensor?[] noise_tensors) -> Tensor");
  m.def(
      "input_noise(Tensor x, Tensor? std_tensor, float std, bool multiplicative, SymInt[] noise, "
      "Tensor?[] noise_tensors) -> Tensor");
  m.def(
      "gradient_noise(Tensor(a) x, Tensor? std_tensor, float std, bool multiplicative, SymInt[] "
      "noise, Tensor?[] noise_tensors) -> Tensor(a)");
  m.def(
      "add_noise_(Tensor(a!)[] tensors, float[] std, Tensor? std_tensor, bool multiplicative, "
      "SymInt[] noise, Tensor?[] noise_tensors, Tensor(b!)? norms) -> ()");
  m.def("noise_dot(Tensor[] tensors, SymInt[] noise, Tensor?[] noise_tensors) -> Tensor");
  m.def(
      "combine_noise_(Tensor(a!)[] tensors, Tensor coefficients, Tensor seeds, SymInt[] noise, "
      "Tensor?[] noise_tensors) -> ()");
  m.def(
      "_noise(Tensor x, int mode, Tensor? std_tensor, float std, SymInt[] noise, Tensor?[] "
      "noise_tensors) -> Tensor");
  m.def(
      "_scaled_noise(Tensor[] tensors, Tensor scales, SymInt[] noise, Tensor?[] noise_tensors) -> "
      "Tensor[]");
  m.def("_next_step_(Tensor(a!) step) -> Tensor");
}
TORCH_LIBRARY_IMPL(kdkernels, CompositeExplicitAutograd, m) {
  m.impl("randn_like", randn_like_kernel);
  m.impl("input_noise", input_noise_kernel);
  m.impl("gradient_noise", gradient_noise_kernel);
  m.impl("add_noise_", add_noise_kernel);
  m.impl("noise_dot", noise_dot_kernel);
  m.impl("combine_noise_", combine_noise_kernel);
  m.impl("_noise", apply_noise);
  m.impl("_scaled_noise", scaled_noise);
  m.impl("_next_step_", next_step);
}

}  // namespace kdkernels
