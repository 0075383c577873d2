#include "ops/noise_numbers.h"

#include <limits>

#include "ops/devices.h"

namespace kdkernels {
namespace {

using at::Tensor;

constexpr int64_t kAnyOffset = std::numeric_limits<int64_t>::max(), kAnyWord = 0xFFFFFFFF;

void check_number(const char* name, int64_t value, int64_t most) {
  TORCH_CHECK_VALUE(value >= 0 && value <= most, name, " is ", value, "; it must be ",
                    most == kAnyOffset ? "0 or more"
                    : most == kAnyWord ? "from 0 to 2^32 - 1"
                                       : "from 0 to 4");
}

void check_known(const char* name, const c10::SymInt& value, int64_t most) {
  if (std::optional<int64_t> known = value.maybe_as_int()) check_number(name, *known, most);
}

void check_one_or_each(const char* name, size_t numbers, size_t tensors) {
  TORCH_CHECK_VALUE(numbers == 1 || numbers == tensors, name, " has ", numbers, " numbers for ",
                    tensors, " tensors; it must have one, or one per tensor");
}

void check_scalar(const char* name, const Tensor& tensor) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kLong, name, " has dtype ", tensor.scalar_type(),
                   "; as a tensor it must be int64");
  TORCH_CHECK_VALUE(tensor.sym_numel() == 1, name, " has shape ", tensor.sym_sizes(),
                    "; as a tensor it must have one element");
}

}  // namespace

NoiseNumbers::NoiseNumbers(c10::SymIntArrayRef noise, const TensorOptionals& noise_tensors,
                           size_t tensors)
    : fields(noise),
      seed_tensor(tensor_at(noise_tensors, 0)),
      step_tensor(tensor_at(noise_tensors, 1)) {
  TORCH_CHECK_VALUE(noise.size() >= kNoiseFields, "noise has ", noise.size(),
                    " numbers; it must have at least ", int{kNoiseFields});
  int64_t first_offset = kNoiseFields + noise[kStreams].expect_int(),
          first_run = first_offset + noise[kOffsets].expect_int(),
          end = static_cast<int64_t>(noise.size());
  TORCH_CHECK_VALUE(kNoiseFields <= first_offset && first_offset <= first_run && first_run <= end,
                    "noise has ", end, " numbers; its streams and offsets need ", first_run);
  auto part = [&](int64_t begin, int64_t stop) {
    return noise.slice(static_cast<size_t>(begin), static_cast<size_t>(stop - begin));
  };
  streams = part(kNoiseFields, first_offset);
  offsets = part(first_offset, first_run);
  runs = part(first_run, end);
  check_known("step", noise[kStep], kAnyWord);
  check_known("distribution", noise[kDistribution], 4);
  check_one_or_each("stream", streams.size(), tensors);
  check_one_or_each("offset", offsets.size(), tensors);
  TORCH_CHECK_VALUE(runs.empty() || runs.size() == 2 * tensors, "runs has ", runs.size(),
                    " numbers for ", tensors, " tensors; it must have none, or two per tensor");
  for (const c10::SymInt& stream : streams) check_known("stream", stream, kAnyWord);
  for (const c10::SymInt& offset : offsets) check_known("offset", offset, kAnyOffset);
}

void check_capture(const TensorOptionals& noise_tensors, const at::Device& device) {
  if (!is_captured(device)) return;
  OptionalTensor seed = tensor_at(noise_tensors, 0), step = tensor_at(noise_tensors, 1);
  TORCH_CHECK_VALUE(!seed.has_value() || !seed->is_cpu(),
                    "seed is drawn on the host, but a CUDA graph is being captured, whose replays "
                    "would all have this one; it must be an int, or a tensor on the device");
  TORCH_CHECK_VALUE(
      step.has_value() && on_cuda(step->device()),
      "step is a number, but a CUDA graph is being captured, whose replays would all have the "
      "noise of this step; it must be a tensor on ",
      device, " (of an optimizer: capturable=True)");
}

std::vector<c10::SymInt> noise_of_members(const NoiseNumbers& noise,
                                          const std::vector<size_t>& members) {
  bool follow = noise.streams.size() == 1, one_offset = noise.offsets.size() == 1;
  std::vector<c10::SymInt> out(noise.fields.begin(), noise.fields.begin() + kNoiseFields);
  out[kStreams] = static_cast<int64_t>(members.size());
  out[kOffsets] = one_offset ? 1 : static_cast<int64_t>(members.size());
  for (size_t i : members) {
    out.push_back(follow ? noise.streams[0] + static_cast<int64_t>(i) : noise.streams[i]);
  }
  if (one_offset) out.push_back(noise.offsets[0]);
  for (size_t i : members) {
    if (!one_offset) out.push_back(noise.offsets[i]);
  }
  for (size_t i : members) {
    if (!noise.runs.empty()) out.insert(out.end(), {noise.runs[2 * i], noise.runs[2 * i + 1]});
  }
  return out;
}

namespace {

NoiseSource source_with_seed(const NoiseNumbers& noise, int64_t seed) {
  NoiseSource source = {};
  source.distribution = static_cast<math::Distribution>(noise[kDistribution].expect_int());
  source.seed_low = static_cast<uint32_t>(static_cast<uint64_t>(seed));
  source.seed_high = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
  return source;
}

// The step of all elements, where it is not given per row.
void set_step(NoiseSource& source, const NoiseNumbers& noise, const at::Device& device) {
  int64_t step = noise[kStep].expect_int();
  if (noise.step_tensor.has_value()) {
    const Tensor& tensor = *noise.step_tensor;
    check_scalar("step", tensor);
    if (on_cpu(tensor.device())) {
      step = *tensor.const_data_ptr<int64_t>();
      check_number("step", step, kAnyWord);
    } else {
      TORCH_CHECK_VALUE(tensor.device() == device, "step is on ", tensor.device(),
                        " and the noise on ", device,
                        "; as a tensor it must be on that device or the CPU");
      source.device_step = tensor.const_data_ptr<int64_t>();
    }
  }
  source.step = static_cast<uint32_t>(step);
}

bool several(const OptionalTensor& tensor) {
  return tensor.has_value() && tensor->sym_numel() != 1;
}

// [rows], where a kernel on `device` reads it.
Tensor row_numbers(const char* name, const Tensor& given, int64_t rows, const at::Device& device) {
  TORCH_CHECK_TYPE(given.scalar_type() == at::kLong, name, " has dtype ", given.scalar_type(),
                   "; as a tensor it must be int64");
  TORCH_CHECK_VALUE(given.numel() == 1 || (given.dim() == 1 && given.numel() == rows), name,
                    " has shape ", given.sizes(), "; as a tensor it must have one element, or [",
                    rows, "], one per row of each tensor");
  TORCH_CHECK_VALUE(given.is_cpu() || given.device() == device, name, " is on ", given.device(),
                    " and the noise on ", device,
                    "; as a tensor it must be on that device or the CPU");
  return given.detach().reshape({-1}).expand({rows}).to(device).contiguous();
}

}  // namespace

NoiseSource source_of(const NoiseNumbers& noise, const at::Device& device) {
  int64_t seed = noise[kSeed].expect_int();
  if (noise.seed_tensor.has_value()) {
    check_scalar("seed", *noise.seed_tensor);
    TORCH_CHECK_VALUE(noise.seed_tensor->is_cpu(), "seed is on ", noise.seed_tensor->device(),
                      "; as a tensor it must be on the CPU");
    seed = *noise.seed_tensor->const_data_ptr<int64_t>();
  }
  NoiseSource source = source_with_seed(noise, seed);
  set_step(source, noise, device);
  return source;
}

bool has_row_numbers(const NoiseNumbers& noise, const at::Device& device) {
  return several(noise.seed_tensor) || several(noise.step_tensor) ||
         (noise.seed_tensor.has_value() && !noise.seed_tensor->is_cpu() && !device.is_meta());
}

RowNumbers::RowNumbers(const NoiseNumbers& noise, at::TensorList tensors) {
  const at::Device device = tensors[0].device();
  if (!has_row_numbers(noise, device)) {
    source = source_of(noise, device);
    return;
  }
  const bool differ = several(noise.seed_tensor) || several(noise.step_tensor);
  const char* name = several(noise.seed_tensor) ? "seed" : "step";
  rows = differ ? (several(noise.seed_tensor) ? noise.seed_tensor : noise.step_tensor)->numel() : 1;
  for (const Tensor& x : tensors) {
    TORCH_CHECK_VALUE(!differ || (x.dim() > 0 && x.size(0) == rows), name, " has ", rows,
                      " elements for a tensor of shape ", x.sizes(), "; it must have one per row");
  }
  TORCH_CHECK_VALUE(noise.runs.empty(), name, " is per row or on ", device,
                    ", which a sharded tensor does not take; it must be an int");
  source = source_with_seed(noise, noise[kSeed].expect_int());
  if (noise.seed_tensor.has_value()) {
    seeds = row_numbers("seed", *noise.seed_tensor, rows, device);
    source.row_seeds = seeds.const_data_ptr<int64_t>();
  }
  if (!several(noise.step_tensor)) {
    set_step(source, noise, device);
    return;
  }
  steps = row_numbers("step", *noise.step_tensor, rows, device);
  source.row_steps = steps.const_data_ptr<int64_t>();
  for (int64_t r = 0; on_cpu(device) && r < rows; ++r)
    check_number("step", source.row_steps[r], kAnyWord);
}

std::vector<NoisePlace> places_of(const NoiseNumbers& noise, at::TensorList tensors) {
  size_t count = tensors.size();
  bool follow = noise.streams.size() == 1;
  if (follow) {
    TORCH_CHECK_VALUE(noise.streams[0].expect_int() + static_cast<int64_t>(count) - 1 <= kAnyWord,
                      "stream is ", noise.streams[0], "; with ", count,
                      " tensors the last stream exceeds 2^32 - 1");
  }
  std::vector<NoisePlace> places(count);
  for (size_t i = 0; i < count; ++i) {
    NoisePlace& place = places[i];
    place.stream = static_cast<uint32_t>(noise.streams[follow ? 0 : i].expect_int()) +
                   static_cast<uint32_t>(follow ? i : 0);
    place.offset =
        static_cast<uint64_t>(noise.offsets[noise.offsets.size() == 1 ? 0 : i].expect_int());
    if (noise.runs.empty()) continue;
    place.run = noise.runs[2 * i].expect_int();
    place.stride = noise.runs[2 * i + 1].expect_int();
    int64_t numel = tensors[i].numel();
    TORCH_CHECK_VALUE(
        place.run >= 0 && (place.run == 0 || (place.stride >= place.run && numel % place.run == 0)),
        "runs[", i, "] is (", place.run, ", ", place.stride, ") for a tensor of ", numel,
        " elements; the run must divide that number and not exceed the stride");
  }
  return places;
}

}  // namespace kdkernels
