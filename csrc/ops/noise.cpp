// The noise ops: schemas, argument checks, CPU and CUDA calls, autograd, fake tensors.
//
// No op keeps noise for backward: whoever needs it again makes it again from the same numbers.
#include "ops/noise.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "ops/checks.h"
#include "ops/devices.h"

namespace kdkernels {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

uint32_t checked_u32(const char* name, int64_t value) {
  TORCH_CHECK_VALUE(value >= 0 && value <= 0xFFFFFFFFLL, name, " is ", value,
                    "; it takes 0 to 2^32 - 1");
  return static_cast<uint32_t>(value);
}

uint64_t checked_offset(int64_t value) {
  TORCH_CHECK_VALUE(value >= 0, "offset is ", value, "; it takes 0 or more");
  return static_cast<uint64_t>(value);
}

void check_scalar(const char* name, const Tensor& tensor) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kLong, name, " has dtype ", tensor.scalar_type(),
                   "; as a tensor it takes int64");
  TORCH_CHECK_VALUE(tensor.sym_numel() == 1, name, " has shape ", tensor.sym_sizes(),
                    "; as a tensor it takes one element");
}

// f(number) where a number is known while tracing.
template <class Check>
void if_known(const c10::SymInt& value, Check check) {
  if (std::optional<int64_t> known = value.maybe_as_int()) check(*known);
}

void check_one_or_each(const char* name, size_t numbers, size_t tensors) {
  TORCH_CHECK_VALUE(numbers == 1 || numbers == tensors, name, " has ", numbers, " numbers for ",
                    tensors, " tensors; it takes one, or one a tensor");
}

}  // namespace

// ---- lists of tensors ----------------------------------------------------------------------------

void check_noise(const NoiseNumbers& noise) {
  if (!noise.step_tensor.has_value()) {
    if_known(noise.step, [](int64_t step) { checked_u32("step", step); });
  }
  TORCH_CHECK_VALUE(noise.distribution >= 0 && noise.distribution <= 4, "distribution is ",
                    noise.distribution, "; it takes 0 to 4");
}

void check_noise(const NoiseListArgs& noise, size_t tensors) {
  check_noise(noise);
  check_one_or_each("stream", noise.streams.size(), tensors);
  check_one_or_each("offset", noise.offsets.size(), tensors);
  TORCH_CHECK_VALUE(noise.runs.empty() || noise.runs.size() == 2 * tensors, "runs has ",
                    noise.runs.size(), " numbers for ", tensors,
                    " tensors; it takes none, or two a tensor");
  for (const c10::SymInt& stream : noise.streams) {
    if_known(stream, [](int64_t value) { checked_u32("stream", value); });
  }
  for (const c10::SymInt& offset : noise.offsets) if_known(offset, checked_offset);
}

void check_std(double std) {
  TORCH_CHECK_VALUE(std >= 0 && std::isfinite(std), "std is ", std,
                    "; it takes a finite number, 0 or more");
}

void check_each(const char* name, const Tensor& tensor, const char* one, size_t count,
                const Tensor& like) {
  check_plain(name, tensor, like);
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kDouble, name, " has dtype ", tensor.scalar_type(),
                   "; it takes float64");
  TORCH_CHECK_VALUE(tensor.dim() == 1 && (tensor.sym_numel() == 1 ||
                                          tensor.sym_numel() == static_cast<int64_t>(count)),
                    name, " has shape ", tensor.sym_sizes(), "; it takes [1] or one number a ", one,
                    ", [", count, "]");
  check_device(name, tensor, "the tensors", like);
}

void check_list(const char* name, at::TensorList tensors) {
  for (const Tensor& tensor : tensors) {
    check_plain(name, tensor, tensors[0]);
    check_tensor(name, tensor);
    check_device(name, tensor, "the first of them", tensors[0]);
  }
}

void check_writable(const char* name, at::TensorList tensors) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& tensor = tensors[i];
    TORCH_CHECK_VALUE(tensor.is_meta() || at::has_internal_overlap(tensor) != at::MemOverlap::Yes,
                      name, "[", i, "] of shape ", tensor.sym_sizes(),
                      " has elements that share memory; pass a clone");
  }
}

void check_no_gradient(const char* op, const char* name, at::TensorList tensors) {
  if (!at::GradMode::is_enabled()) return;
  for (size_t i = 0; i < tensors.size(); ++i) {
    TORCH_CHECK_VALUE(!tensors[i].requires_grad(), name, "[", i, "] requires grad, and ", op,
                      " writes in place; call it under torch.no_grad()");
  }
}

void check_norms(const OptionalTensor& norms, size_t count, const Tensor& like) {
  if (!norms.has_value()) return;
  check_plain("norms", *norms, like);
  TORCH_CHECK_TYPE(norms->scalar_type() == at::kDouble, "norms has dtype ", norms->scalar_type(),
                   "; it takes float64");
  TORCH_CHECK_VALUE(norms->dim() == 2 && norms->sym_size(0) == static_cast<int64_t>(count) &&
                        norms->sym_size(1) == 2 && norms->is_contiguous(),
                    "norms has shape ", norms->sym_sizes(), " and strides ", norms->sym_strides(),
                    "; it takes two numbers a tensor, [", count, ", 2], contiguous");
  check_device("norms", *norms, "the tensors", like);
}

NoiseSource source_of(const NoiseNumbers& noise, const at::Device& device) {
  NoiseSource source = {};
  source.distribution = static_cast<math::Distribution>(noise.distribution);
  int64_t seed = noise.seed.expect_int();
  if (noise.seed_tensor.has_value()) {
    check_scalar("seed", *noise.seed_tensor);
    TORCH_CHECK_VALUE(noise.seed_tensor->is_cpu(), "seed is on ", noise.seed_tensor->device(),
                      "; as a tensor it takes a CPU one");
    seed = *noise.seed_tensor->const_data_ptr<int64_t>();
  }
  source.seed_low = static_cast<uint32_t>(static_cast<uint64_t>(seed));
  source.seed_high = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
  int64_t step = noise.step.expect_int();
  if (noise.step_tensor.has_value()) {
    const Tensor& tensor = *noise.step_tensor;
    check_scalar("step", tensor);
    if (on_cpu(tensor.device())) {
      step = *tensor.const_data_ptr<int64_t>();
    } else {
      TORCH_CHECK_VALUE(tensor.device() == device, "step is on ", tensor.device(),
                        " and the noise on ", device,
                        "; as a tensor it takes that device or the CPU");
      source.device_step = tensor.const_data_ptr<int64_t>();
    }
  }
  source.step = checked_u32("step", step);
  return source;
}

std::vector<Place> places_of(const NoiseListArgs& noise, at::TensorList tensors) {
  std::vector<Place> places(tensors.size());
  bool numbered = noise.streams.size() != 1 || tensors.size() == 1;
  for (size_t i = 0; i < tensors.size(); ++i) {
    int64_t stream = noise.streams[numbered ? i : 0].expect_int();
    if (!numbered) {
      stream += static_cast<int64_t>(i);
      TORCH_CHECK_VALUE(stream <= 0xFFFFFFFFLL, "stream is ", noise.streams[0], "; with ",
                        tensors.size(), " tensors the last stream exceeds 2^32 - 1");
    }
    places[i].stream = checked_u32("stream", stream);
    places[i].offset =
        checked_offset(noise.offsets[noise.offsets.size() == 1 ? 0 : i].expect_int());
    if (noise.runs.empty()) continue;
    int64_t run = noise.runs[2 * i].expect_int(), stride = noise.runs[2 * i + 1].expect_int();
    int64_t numel = tensors[i].numel();
    TORCH_CHECK_VALUE(run >= 0 && (run == 0 || (stride >= run && numel % run == 0)), "runs[", i,
                      "] is (", run, ", ", stride, ") for a tensor of ", numel,
                      " elements; it takes a divisor of that and a stride of at least as much");
    places[i].run = run;
    places[i].stride = stride;
  }
  return places;
}

void* InPlace::data(const Tensor& tensor, const char* name, size_t index) {
  Tensor dense = tensor.contiguous();
  if (!tensor.is_contiguous()) copies_.emplace_back(tensor, dense);
  written_.push_back(tensor);
  if (dense.numel() > 0) {
    const char* begin = static_cast<const char*>(tensor.const_data_ptr());
    int64_t last = 0;  // element, by strides, which are never negative
    for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
    const char* end = begin + (last + 1) * static_cast<int64_t>(tensor.element_size());
    ranges_.push_back({begin, end, name, index, tensor});
  }
  return dense.mutable_data_ptr();
}

// Whether tensors whose ranges overlap have an element in common; views of every other column do not.
bool InPlace::shares_elements(const Range& a, const Range& b) {
  if (a.tensor.is_contiguous() && b.tensor.is_contiguous()) return true;
  int64_t size = static_cast<int64_t>(a.tensor.element_size());
  const char *begin = std::min(a.begin, b.begin), *end = std::max(a.end, b.end);
  if (size != static_cast<int64_t>(b.tensor.element_size()) || (a.begin - b.begin) % size != 0) {
    return true;
  }
  // A flag an element of the memory that both lie in.
  Tensor seen = at::zeros({(end - begin) / size}, at::kBool);
  auto view = [&](const Range& range) {
    return seen.as_strided(range.tensor.sizes(), range.tensor.strides(),
                           (range.begin - begin) / size);
  };
  view(a).fill_(true);
  return view(b).any().item<bool>();
}

void InPlace::check_apart(const char* op) {
  std::sort(ranges_.begin(), ranges_.end(),
            [](const Range& a, const Range& b) { return a.begin < b.begin; });
  for (size_t i = 0; i < ranges_.size(); ++i) {
    for (size_t j = i + 1; j < ranges_.size() && ranges_[j].begin < ranges_[i].end; ++j) {
      const Range &a = ranges_[i], &b = ranges_[j];
      TORCH_CHECK_VALUE(!shares_elements(a, b), b.name, "[", b.index, "] shares memory with ",
                        a.name, "[", a.index, "]; call ", op, " for one after the other");
    }
  }
}

void InPlace::write_back() {
  for (auto& [tensor, dense] : copies_) tensor.copy_(dense);
  for (const Tensor& tensor : written_) {
    if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
  }
}

std::vector<DtypeGroup> grouped_by_dtype(at::TensorList tensors) {
  std::vector<DtypeGroup> groups;
  for (size_t i = 0; i < tensors.size(); ++i) {
    Dtype dtype = dtype_of(tensors[i]);
    auto group = std::find_if(groups.begin(), groups.end(),
                              [&](const DtypeGroup& g) { return g.dtype == dtype; });
    if (group == groups.end()) group = groups.insert(group, {dtype, {}});
    group->members.push_back(i);
  }
  return groups;
}

Tensor each_of(const Tensor& tensor, const DtypeGroup& group, size_t count, at::ScalarType dtype) {
  Tensor each = tensor.detach().expand({static_cast<int64_t>(count)});
  if (group.members.size() != count) {
    std::vector<Tensor> parts;
    for (size_t i : group.members) parts.push_back(each.select(0, i));
    each = at::stack(parts);
  }
  return each.to(dtype).contiguous();
}

namespace {

// ---- kernels -------------------------------------------------------------------------------------

void run(const NoiseParams& p, const at::Device& device) {
  if (!on_cuda(device)) return cpu::noise(p, at::get_num_threads());
#if defined(KDKERNELS_WITH_CUDA)
  launch_cuda(device, p, cuda::noise_workspace(p), cuda::noise);
#endif
}

void run(const NoiseDotParams& p, const at::Device& device) {
  if (!on_cuda(device)) return cpu::noise_dot(p, at::get_num_threads());
#if defined(KDKERNELS_WITH_CUDA)
  launch_cuda(device, p, cuda::noise_dot_workspace(p), cuda::noise_dot);
#endif
}

void run(const CombineParams& p, const at::Device& device) {
  if (!on_cuda(device)) return cpu::combine(p, at::get_num_threads());
#if defined(KDKERNELS_WITH_CUDA)
  launch_cuda(device, [&](cudaStream_t s) { return cuda::combine(p, s); });
#endif
}

// The runs of a group's tensors; element 0 of tensor i is at out[i], and at in[i] where there is an `in`.
std::vector<NoiseTensor> runs_of(const DtypeGroup& group, at::TensorList tensors,
                                 const std::vector<Place>& places, const std::vector<void*>& out,
                                 const std::vector<const void*>& in, at::ArrayRef<double> std) {
  std::vector<NoiseTensor> runs;
  runs.reserve(group.members.size());
  for (size_t j = 0; j < group.members.size(); ++j) {
    size_t i = group.members[j];
    int64_t bytes = static_cast<int64_t>(tensors[i].element_size());
    auto at = [&](auto* data, int64_t first) {
      using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(data)>>,
                                      const char, char>;
      return static_cast<Byte*>(data) + first * bytes;
    };
    for_runs(places[i], tensors[i].numel(), [&](int64_t first, int64_t count, uint64_t offset) {
      runs.push_back({out.empty() ? nullptr : at(out[i], first),
                      in.empty() ? nullptr : at(in[i], first), count,
                      std.empty() ? 0.0 : std[std.size() == 1 ? 0 : i], offset, places[i].stream,
                      static_cast<int32_t>(j)});
    });
  }
  return runs;
}

// ---- one tensor ----------------------------------------------------------------------------------

void check_args(const NoiseArgs& noise) {
  check_noise(noise);
  if_known(noise.stream, [](int64_t value) { checked_u32("stream", value); });
  if_known(noise.offset, checked_offset);
}

void check_std_tensor(const OptionalTensor& std, const Tensor& x) {
  if (!std.has_value()) return;
  check_plain("std", *std, x);
  TORCH_CHECK_TYPE(is_floating_dtype(std->scalar_type()), "std has dtype ", std->scalar_type(),
                   "; as a tensor it takes float32, float64, bfloat16 or float16");
  check_device("std", *std, "x", x);
  if (std->sym_numel() == 1) return;
  bool fits = std->dim() <= x.dim();
  for (int64_t d = 1; fits && d <= std->dim(); ++d) {
    fits = std->sym_size(-d) == 1 || std->sym_size(-d) == x.sym_size(-d);
  }
  TORCH_CHECK_VALUE(fits, "std has shape ", std->sym_sizes(), " and x ", x.sym_sizes(),
                    "; as a tensor std takes one element, or a shape that broadcasts to x's");
}

void check_input(const Tensor& x, const OptionalTensor& std_tensor, double std,
                 const NoiseArgs& noise) {
  check_plain("x", x, x);
  check_tensor("x", x);
  check_std(std);
  check_args(noise);
  check_std_tensor(std_tensor, x);
}

// The std of element i of x is stds[i / inner % size].
struct StdPattern {
  Tensor stds;
  int64_t size, inner;
};
StdPattern pattern_of(const Tensor& std, const Tensor& x, at::ScalarType dtype) {
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

// The op behind input_noise, its gradients and randn_like.
Tensor noise_forward(const Tensor& x, int64_t mode, const OptionalTensor& std_tensor, double std,
                     KD_NOISE_PARAMS) {
  NoiseArgs noise = KD_NOISE_ARGS;
  NoiseParams p = {};
  p.mode = static_cast<NoiseMode>(mode);
  // Elements count in row-major order, whatever the strides; noise alone needs none of x's values.
  bool only = p.mode == NoiseMode::kOnly;
  Tensor in = only ? x : x.contiguous();
  Tensor out = at::empty_like(x, x.options(),
                              only ? at::MemoryFormat::Contiguous : at::MemoryFormat::Preserve);
  if (x.is_meta()) return out;
  Tensor dense = out.is_contiguous() ? out : at::empty_like(in);
  p.source = source_of(noise, x.device());
  uint32_t stream_number = checked_u32("stream", noise.stream.expect_int());
  uint64_t offset_number = checked_offset(noise.offset.expect_int());
  if (x.numel() == 0) return out;
  p.dtype = dtype_of(x);
  p.std_size = p.std_inner = 1;
  StdPattern pattern;
  if (std_tensor.has_value() && std_tensor->numel() == 1 && !on_cuda(x.device())) {
    std = std_tensor->item<double>();
  } else if (std_tensor.has_value()) {
    pattern = pattern_of(*std_tensor, x, acc_type(p.dtype));
    p.stds = pattern.stds.const_data_ptr();
    p.std_size = pattern.size;
    p.std_inner = pattern.inner;
  }
  NoiseTensor tensor = {dense.mutable_data_ptr(),
                        only ? nullptr : in.const_data_ptr(),
                        x.numel(),
                        std,
                        offset_number,
                        stream_number,
                        0};
  p.tensors = &tensor;
  p.count = p.indices = 1;
  run(p, x.device());
  return dense.is_same(out) ? out : out.copy_(dense);  // channels_last stays that
}

Tensor dispatch_noise(const Tensor& x, NoiseMode mode, const OptionalTensor& std_tensor, double std,
                      const NoiseArgs& noise) {
  static auto handle = dispatched<decltype(noise_forward)>("kdkernels::_noise");
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return handle.call(x, static_cast<int64_t>(mode), std_tensor, std, KD_NOISE_SPREAD(noise));
}

// ---- lists ---------------------------------------------------------------------------------------

void add_noise_forward(at::TensorList tensors, at::ArrayRef<double> std, KD_NOISE_LIST_PARAMS,
                       bool multiplicative, const OptionalTensor& std_tensor,
                       const OptionalTensor& norms) {
  NoiseListArgs noise = KD_NOISE_LIST_ARGS;
  size_t count = tensors.size();
  // Of either sign: whoever takes noise off again adds it with -std.
  for (double s : std)
    TORCH_CHECK_VALUE(std::isfinite(s), "std is ", s, "; it takes a finite number");
  check_list("tensors", tensors);
  if (count == 0) return;
  check_one_or_each("std", std.size(), count);
  check_noise(noise, count);
  check_writable("tensors", tensors);
  if (std_tensor.has_value()) check_each("std", *std_tensor, "tensor", count, tensors[0]);
  check_norms(norms, count, tensors[0]);
  at::Device device = tensors[0].device();
  if (device.is_meta()) return;
  NoiseParams p = {};
  p.mode = multiplicative ? NoiseMode::kScale : NoiseMode::kAdd;
  p.source = source_of(noise, device);
  p.std_size = p.std_inner = 1;
  std::vector<Place> places = places_of(noise, tensors);
  InPlace in_place;
  std::vector<void*> out(count);
  for (size_t i = 0; i < count; ++i) out[i] = in_place.data(tensors[i], "tensors", i);
  in_place.check_apart("add_noise_");
  std::vector<const void*> in(out.begin(), out.end());
  Rows rows(norms.value_or(Tensor()), count);
  for (const DtypeGroup& group : grouped_by_dtype(tensors)) {
    std::vector<NoiseTensor> runs = runs_of(group, tensors, places, out, in, std);
    Tensor stds;
    if (std_tensor.has_value()) {
      stds = each_of(*std_tensor, group, count, acc_type(group.dtype));
      p.stds = stds.const_data_ptr();
    }
    rows.fill(group, runs.empty(), [&](double* at) {
      p.norms = at;
      set_runs(p, group, runs);
      run(p, device);
    });
  }
  in_place.write_back();
}

Tensor noise_dot_forward(at::TensorList tensors, KD_NOISE_LIST_PARAMS) {
  NoiseListArgs noise = KD_NOISE_LIST_ARGS;
  size_t count = tensors.size();
  check_list("tensors", tensors);
  if (count == 0) return at::empty({0}, at::kDouble);
  check_noise(noise, count);
  at::Device device = tensors[0].device();
  Tensor result = at::empty({static_cast<int64_t>(count)}, tensors[0].options().dtype(at::kDouble));
  if (device.is_meta()) return result;
  NoiseDotParams p = {};
  p.source = source_of(noise, device);
  std::vector<Place> places = places_of(noise, tensors);
  std::vector<Tensor> dense;
  std::vector<const void*> in;
  for (const Tensor& tensor : tensors) {
    dense.push_back(tensor.contiguous());
    in.push_back(dense.back().const_data_ptr());
  }
  Rows rows(result, count);
  for (const DtypeGroup& group : grouped_by_dtype(tensors)) {
    std::vector<NoiseTensor> runs = runs_of(group, tensors, places, {}, in, {});
    rows.fill(group, runs.empty(), [&](double* at) {
      p.result = at;
      set_runs(p, group, runs);
      run(p, device);
    });
  }
  return result;
}

void combine_forward(at::TensorList tensors, const Tensor& coefficients, const Tensor& seeds,
                     c10::SymInt step, c10::SymIntArrayRef streams, c10::SymIntArrayRef offsets,
                     c10::SymIntArrayRef runs, const OptionalTensor& step_tensor,
                     int64_t distribution) {
  c10::SymInt seed = 0;
  OptionalTensor seed_tensor;
  NoiseListArgs noise = KD_NOISE_LIST_ARGS;
  size_t count = tensors.size();
  check_list("tensors", tensors);
  check_plain("coefficients", coefficients, count > 0 ? tensors[0] : coefficients);
  check_plain("seeds", seeds, count > 0 ? tensors[0] : seeds);
  TORCH_CHECK_TYPE(coefficients.scalar_type() == at::kDouble, "coefficients has dtype ",
                   coefficients.scalar_type(), "; it takes float64");
  TORCH_CHECK_TYPE(seeds.scalar_type() == at::kLong, "seeds has dtype ", seeds.scalar_type(),
                   "; it takes int64");
  TORCH_CHECK_VALUE(coefficients.dim() == 1 && seeds.sym_sizes() == coefficients.sym_sizes(),
                    "coefficients has shape ", coefficients.sym_sizes(), " and seeds ",
                    seeds.sym_sizes(), "; they take one number a term, [terms], both");
  if (count == 0) return;
  check_noise(noise, count);
  check_writable("tensors", tensors);
  at::Device device = tensors[0].device();
  for (const Tensor* numbers : {&coefficients, &seeds}) {
    TORCH_CHECK_VALUE(device.is_meta() || numbers->is_cpu() || numbers->device() == device,
                      numbers == &seeds ? "seeds" : "coefficients", " is on ", numbers->device(),
                      " and the tensors on ", device, "; it takes that device or the CPU");
  }
  if (device.is_meta() || coefficients.is_meta() || seeds.is_meta()) return;
  Tensor factors = coefficients.detach().to(device).contiguous();
  Tensor keys = seeds.to(device).contiguous();
  CombineParams p = {};
  p.source = source_of(noise, device);
  p.coefficients = factors.const_data_ptr<double>();
  p.seeds = keys.const_data_ptr<int64_t>();
  p.terms = keys.numel();
  std::vector<Place> places = places_of(noise, tensors);
  if (p.terms == 0) return;
  InPlace in_place;
  std::vector<void*> out(count);
  for (size_t i = 0; i < count; ++i) out[i] = in_place.data(tensors[i], "tensors", i);
  in_place.check_apart("combine_noise_");
  for (const DtypeGroup& group : grouped_by_dtype(tensors)) {
    std::vector<NoiseTensor> list = runs_of(group, tensors, places, out, {}, {});
    if (list.empty()) continue;
    set_runs(p, group, list);
    run(p, device);
  }
  in_place.write_back();
}

// ---- autograd ------------------------------------------------------------------------------------

// NoiseNumbers between forward and backward.
void save_numbers(AutogradContext* ctx, const NoiseNumbers& noise) {
  ctx->saved_data["seed"] = noise.seed;
  ctx->saved_data["step"] = noise.step;
  ctx->saved_data["distribution"] = noise.distribution;
}

NoiseNumbers saved_numbers(AutogradContext* ctx, const Tensor& seed_tensor,
                           const Tensor& step_tensor) {
  NoiseNumbers noise = {ctx->saved_data["seed"].toSymInt(),
                        ctx->saved_data["step"].toSymInt(),
                        {},
                        {},
                        ctx->saved_data["distribution"].toInt()};
  if (seed_tensor.defined()) noise.seed_tensor = seed_tensor;
  if (step_tensor.defined()) noise.step_tensor = step_tensor;
  return noise;
}

void save_noise(AutogradContext* ctx, const NoiseArgs& noise) {
  save_numbers(ctx, noise);
  ctx->saved_data["stream"] = noise.stream;
  ctx->saved_data["offset"] = noise.offset;
}

NoiseArgs saved_noise(AutogradContext* ctx, const Tensor& seed_tensor, const Tensor& step_tensor) {
  return {saved_numbers(ctx, seed_tensor, step_tensor), ctx->saved_data["stream"].toSymInt(),
          ctx->saved_data["offset"].toSymInt()};
}

void save_noise(AutogradContext* ctx, const NoiseListArgs& noise) {
  save_numbers(ctx, noise);
  ctx->saved_data["streams"] = c10::SymIntArrayRef(noise.streams);
  ctx->saved_data["offsets"] = c10::SymIntArrayRef(noise.offsets);
  ctx->saved_data["runs"] = c10::SymIntArrayRef(noise.runs);
}

NoiseListArgs saved_noise_list(AutogradContext* ctx, const Tensor& seed_tensor,
                               const Tensor& step_tensor) {
  return {saved_numbers(ctx, seed_tensor, step_tensor), ctx->saved_data["streams"].toSymIntVector(),
          ctx->saved_data["offsets"].toSymIntVector(), ctx->saved_data["runs"].toSymIntVector()};
}

NoiseListArgs as_list(const NoiseArgs& noise) {
  return {noise, {noise.stream}, {noise.offset}, {}};
}

// A step tensor may be advanced in place before backward: keep its value of now.
Tensor snapshot(const OptionalTensor& tensor) {
  return tensor.has_value() ? tensor->clone() : Tensor();
}

Tensor dot(at::TensorList tensors, const NoiseListArgs& noise);

// Shape, dtype and device of a tensor, on the storage of one element.
Tensor outline(const Tensor& tensor) {
  return at::empty({}, tensor.options()).expand_symint(tensor.sym_sizes());
}

// Linear in the scales; its adjoint is noise_dot.
struct ScaledNoise : torch::autograd::Function<ScaledNoise> {
  static variable_list forward(AutogradContext* ctx, at::TensorList tensors, const Tensor& scales,
                               const NoiseListArgs& noise) {
    save_noise(ctx, noise);
    ctx->saved_data["tensors"] = static_cast<int64_t>(tensors.size());
    ctx->save_for_backward({snapshot(noise.seed_tensor), snapshot(noise.step_tensor)});
    static auto handle = dispatched<decltype(scaled_noise)>("kdkernels::_scaled_noise");
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return handle.call(tensors, scales, KD_NOISE_LIST_SPREAD(noise));
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list saved = ctx->get_saved_variables();
    variable_list out(ctx->saved_data["tensors"].toInt() + 2);
    out[out.size() - 2] = dot(grads, saved_noise_list(ctx, saved[0], saved[1]));
    return out;
  }
};

// The numbers of some of a list's tensors.
NoiseListArgs some_of(const NoiseListArgs& noise, const std::vector<size_t>& members) {
  NoiseListArgs out = {noise, {}, noise.offsets, {}};
  bool numbered = noise.streams.size() != 1;
  if (noise.offsets.size() != 1) out.offsets.clear();
  for (size_t i : members) {
    out.streams.push_back(numbered ? noise.streams[i] : noise.streams[0] + static_cast<int64_t>(i));
    if (noise.offsets.size() != 1) out.offsets.push_back(noise.offsets[i]);
    if (noise.runs.empty()) continue;
    out.runs.push_back(noise.runs[2 * i]);
    out.runs.push_back(noise.runs[2 * i + 1]);
  }
  return out;
}

// sum eps_i x_i of each tensor; linear in it, so its gradient is eps.
struct NoiseDot : torch::autograd::Function<NoiseDot> {
  static Tensor forward(AutogradContext* ctx, at::TensorList tensors, const NoiseListArgs& noise) {
    save_noise(ctx, noise);
    variable_list saved;
    for (const Tensor& tensor : tensors) saved.push_back(outline(tensor));
    saved.push_back(snapshot(noise.seed_tensor));
    saved.push_back(snapshot(noise.step_tensor));
    ctx->save_for_backward(std::move(saved));
    static auto handle = dispatched<decltype(noise_dot_forward)>("kdkernels::noise_dot");
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return handle.call(tensors, KD_NOISE_LIST_SPREAD(noise));
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list saved = ctx->get_saved_variables();
    size_t count = saved.size() - 2;
    NoiseListArgs noise = saved_noise_list(ctx, saved[count], saved[count + 1]);
    variable_list out(count + 1), wanted;
    std::vector<size_t> members;
    for (size_t i = 0; i < count; ++i) {
      if (ctx->needs_input_grad(i)) members.push_back(i);
    }
    for (size_t i : members) wanted.push_back(saved[i]);
    Tensor scales = grads[0];
    if (members.size() != count) {
      variable_list parts;
      for (size_t i : members) parts.push_back(scales.select(0, i));
      scales = at::stack(parts);
    }
    // As a TensorList: each of its tensors then counts as an input.
    variable_list made =
        ScaledNoise::apply(at::TensorList(wanted), scales, some_of(noise, members));
    for (size_t j = 0; j < members.size(); ++j) out[members[j]] = made[j];
    return out;
  }
};

Tensor dot(at::TensorList tensors, const NoiseListArgs& noise) {
  return NoiseDot::apply(tensors, noise);
}

// x * eps; linear in x, and its own adjoint.
struct NoiseTimes : torch::autograd::Function<NoiseTimes> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const NoiseArgs& noise) {
    save_noise(ctx, noise);
    ctx->save_for_backward({snapshot(noise.seed_tensor), snapshot(noise.step_tensor)});
    return dispatch_noise(x, NoiseMode::kTimes, std::nullopt, 1.0, noise);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list saved = ctx->get_saved_variables();
    return {apply(grads[0], saved_noise(ctx, saved[0], saved[1])), Tensor()};
  }
};

struct InputNoise : torch::autograd::Function<InputNoise> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& std_tensor,
                        double std, bool multiplicative, const NoiseArgs& noise) {
    save_noise(ctx, noise);
    ctx->saved_data["std"] = std;
    ctx->saved_data["multiplicative"] = multiplicative;
    bool needs_x = multiplicative && std_tensor.has_value() && std_tensor->requires_grad();
    ctx->save_for_backward({std_tensor.value_or(Tensor()), needs_x ? x : Tensor(),
                            snapshot(noise.seed_tensor), snapshot(noise.step_tensor)});
    return dispatch_noise(x, multiplicative ? NoiseMode::kScale : NoiseMode::kAdd, std_tensor, std,
                          noise);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list saved = ctx->get_saved_variables();
    const Tensor &std_tensor = saved[0], &x = saved[1], &grad = grads[0];
    NoiseArgs noise = saved_noise(ctx, saved[2], saved[3]);
    bool multiplicative = ctx->saved_data["multiplicative"].toBool();
    double std = ctx->saved_data["std"].toDouble();
    OptionalTensor given = std_tensor.defined() ? OptionalTensor(std_tensor) : std::nullopt;
    Tensor x_gradient, std_gradient;
    if (ctx->needs_input_grad(0)) {
      x_gradient = multiplicative ? apply(grad, given, std, true, noise) : grad;
    }
    if (std_tensor.defined() && ctx->needs_input_grad(1)) {
      at::ScalarType acc = acc_type(grad);
      Tensor product = multiplicative ? grad.to(acc) * x.to(acc) : grad;
      Tensor sum;
      if (std_tensor.sym_numel() == 1) {
        sum = dot({product}, as_list(noise)).reshape_symint(std_tensor.sym_sizes());
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
                        double std, bool multiplicative, const NoiseArgs& noise) {
    save_noise(ctx, noise);
    ctx->saved_data["std"] = std;
    ctx->saved_data["multiplicative"] = multiplicative;
    ctx->save_for_backward(
        {std_tensor.value_or(Tensor()), snapshot(noise.seed_tensor), snapshot(noise.step_tensor)});
    return x.view_as(x);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list saved = ctx->get_saved_variables();
    NoiseArgs noise = saved_noise(ctx, saved[1], saved[2]);
    // Through the differentiable op, for the second derivative.
    Tensor noisy = InputNoise::apply(
        grads[0], saved[0].defined() ? OptionalTensor(saved[0]) : std::nullopt,
        ctx->saved_data["std"].toDouble(), ctx->saved_data["multiplicative"].toBool(), noise);
    return {noisy, Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

Tensor input_noise_forward(const Tensor& x, const OptionalTensor& std_tensor, double std,
                           KD_NOISE_PARAMS, bool multiplicative) {
  NoiseArgs noise = KD_NOISE_ARGS;
  check_input(x, std_tensor, std, noise);
  return dispatch_noise(x, multiplicative ? NoiseMode::kScale : NoiseMode::kAdd, std_tensor, std,
                        noise);
}

Tensor gradient_noise_forward(const Tensor& x, const OptionalTensor& std_tensor, double std,
                              KD_NOISE_PARAMS, bool) {
  check_input(x, std_tensor, std, KD_NOISE_ARGS);
  return x.view_as(x);
}

}  // namespace

// The count of a module's steps, which it raises by one. One op, so that a traced graph keeps the number for its
// backward pass, where it would otherwise read the raised count.
Tensor next_step(const Tensor& step) {
  Tensor before = step.clone();
  step.add_(1);
  return before;
}

std::vector<Tensor> scaled_noise(at::TensorList tensors, const Tensor& scales,
                                 KD_NOISE_LIST_PARAMS) {
  NoiseListArgs noise = KD_NOISE_LIST_ARGS;
  size_t count = tensors.size();
  check_list("tensors", tensors);
  if (count == 0) return {};
  check_noise(noise, count);
  check_each("scales", scales, "tensor", count, tensors[0]);
  std::vector<Tensor> outputs;
  for (const Tensor& x : tensors) {
    outputs.push_back(at::empty_like(x, x.options(), at::MemoryFormat::Contiguous));
  }
  if (tensors[0].is_meta()) return outputs;
  at::Device device = tensors[0].device();
  NoiseParams p = {};
  p.mode = NoiseMode::kOnly;
  p.source = source_of(noise, device);
  p.std_size = p.std_inner = 1;
  std::vector<Place> places = places_of(noise, tensors);
  std::vector<void*> out(count);
  for (size_t i = 0; i < count; ++i) out[i] = outputs[i].mutable_data_ptr();
  for (const DtypeGroup& group : grouped_by_dtype(tensors)) {
    std::vector<NoiseTensor> runs = runs_of(group, tensors, places, out, {}, {});
    if (runs.empty()) continue;
    Tensor stds = each_of(scales, group, count, acc_type(group.dtype));
    p.stds = stds.const_data_ptr();
    set_runs(p, group, runs);
    run(p, device);
  }
  return outputs;
}

Tensor randn_like(const Tensor& x, KD_NOISE_PARAMS) {
  NoiseArgs noise = KD_NOISE_ARGS;
  check_tensor("x", x);
  check_args(noise);
  return dispatch_noise(x.detach(), NoiseMode::kOnly, std::nullopt, 1.0, noise);
}

void add_noise_(at::TensorList tensors, at::ArrayRef<double> std, KD_NOISE_LIST_PARAMS,
                bool multiplicative, const OptionalTensor& std_tensor,
                const OptionalTensor& norms) {
  check_no_gradient("add_noise_", "tensors", tensors);
  static auto handle = dispatched<decltype(add_noise_forward)>("kdkernels::add_noise_");
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  handle.call(tensors, std, seed, step, streams, offsets, runs, seed_tensor, step_tensor,
              distribution, multiplicative, std_tensor, norms);
}

Tensor input_noise(const Tensor& x, const OptionalTensor& std_tensor, double std, KD_NOISE_PARAMS,
                   bool multiplicative) {
  NoiseArgs noise = KD_NOISE_ARGS;
  check_input(x, std_tensor, std, noise);
  return InputNoise::apply(x, std_tensor, std, multiplicative, noise);
}

Tensor gradient_noise(const Tensor& x, const OptionalTensor& std_tensor, double std,
                      KD_NOISE_PARAMS, bool multiplicative) {
  NoiseArgs noise = KD_NOISE_ARGS;
  check_input(x, std_tensor, std, noise);
  OptionalTensor constant;
  if (std_tensor.has_value()) constant = std_tensor->detach();
  return GradientNoise::apply(x, constant, std, multiplicative, noise);
}

Tensor noise_dot(at::TensorList tensors, KD_NOISE_LIST_PARAMS) {
  return NoiseDot::apply(tensors, KD_NOISE_LIST_ARGS);
}

void combine_noise_(at::TensorList tensors, const Tensor& coefficients, const Tensor& seeds,
                    c10::SymInt step, c10::SymIntArrayRef streams, c10::SymIntArrayRef offsets,
                    c10::SymIntArrayRef runs, const OptionalTensor& step_tensor,
                    int64_t distribution) {
  check_no_gradient("combine_noise_", "tensors", tensors);
  static auto handle = dispatched<decltype(combine_forward)>("kdkernels::combine_noise_");
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  handle.call(tensors, coefficients, seeds, step, streams, offsets, runs, step_tensor,
              distribution);
}

TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  m.def("randn_like(Tensor x, *, " KD_NOISE_SCHEMA ") -> Tensor");
  m.def("add_noise_(Tensor(a!)[] tensors, float[] std, *, " KD_NOISE_LIST_SCHEMA
        ", bool multiplicative=False, Tensor? std_tensor=None, Tensor(b!)? norms=None) -> ()");
  m.def("input_noise(Tensor x, Tensor? std_tensor, float std, *, " KD_NOISE_SCHEMA
        ", bool multiplicative=False) -> Tensor");
  m.def("gradient_noise(Tensor(a) x, Tensor? std_tensor, float std, *, " KD_NOISE_SCHEMA
        ", bool multiplicative=False) -> Tensor(a)");
  m.def("noise_dot(Tensor[] tensors, *, " KD_NOISE_LIST_SCHEMA ") -> Tensor");
  m.def(
      "combine_noise_(Tensor(a!)[] tensors, Tensor coefficients, Tensor seeds, *, SymInt step=0, "
      "SymInt[] streams, SymInt[] offsets, SymInt[] runs, Tensor? step_tensor=None, int "
      "distribution=0) -> ()");
  m.def("_noise(Tensor x, int mode, Tensor? std_tensor, float std, *, " KD_NOISE_SCHEMA
        ") -> Tensor");
  m.def("_next_step_(Tensor(a!) step) -> Tensor");
  m.def("_scaled_noise(Tensor[] tensors, Tensor scales, *, " KD_NOISE_LIST_SCHEMA ") -> Tensor[]");
}
TORCH_LIBRARY_IMPL(kdkernels, CompositeExplicitAutograd, m) {
  m.impl("_next_step_", next_step);
  m.impl("randn_like", randn_like);
  m.impl("add_noise_", add_noise_forward);
  m.impl("input_noise", input_noise_forward);
  m.impl("gradient_noise", gradient_noise_forward);
  m.impl("noise_dot", noise_dot_forward);
  m.impl("combine_noise_", combine_forward);
  m.impl("_noise", noise_forward);
  m.impl("_scaled_noise", scaled_noise);
}
TORCH_LIBRARY_IMPL(kdkernels, Autograd, m) {
  m.impl("randn_like", randn_like);
  m.impl("add_noise_", add_noise_);
  m.impl("input_noise", input_noise);
  m.impl("gradient_noise", gradient_noise);
  m.impl("noise_dot", noise_dot);
  m.impl("combine_noise_", combine_noise_);
}

}  // namespace kdkernels
