// Which noise an op makes: how its numbers cross from Python to a kernel.
//
// An op takes them as two arguments, "SymInt[] noise, Tensor?[] noise_tensors", which a tracer can record and autograd
// can keep:
//
//   noise          seed, step, distribution, the number of streams, the number of offsets; streams, offsets, runs
//   noise_tensors  seed, an int64 scalar on the CPU; step, an int64 scalar on any device. Each replaces its number;
//                  the list may end early. Ops that take RowNumbers also take one per row of a tensor, and a seed on
//                  any device.
//
// streams: the first tensor's, which the other tensors' follow, or one per tensor. offsets: one for all tensors, or
// one per tensor. runs: none, or run and stride per tensor, see NoisePlace.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <optional>
#include <vector>

#include "ops/checks.h"
#include "params.h"

namespace kdkernels {

enum NoiseField { kSeed, kStep, kDistribution, kStreams, kOffsets, kNoiseFields };

// Entry i of a list that may end before it.
inline OptionalTensor tensor_at(const TensorOptionals& tensors, size_t i) {
  return i < tensors.size() ? tensors.get(i) : std::nullopt;
}

// The two arguments taken apart, and checked as far as numbers are known while tracing. The numbers stay the caller's.
struct NoiseNumbers {
  c10::SymIntArrayRef fields, streams, offsets, runs;
  OptionalTensor seed_tensor, step_tensor;

  NoiseNumbers(c10::SymIntArrayRef noise, const TensorOptionals& noise_tensors, size_t tensors);
  const c10::SymInt& operator[](NoiseField field) const { return fields[field]; }
};

// Raises where work on `device` is being captured into a CUDA graph, whose replays would all have a number that the host
// holds: the step, or a drawn seed. Only ops that Python calls are checked: torch.compile captures another graph for
// another number.
void check_capture(const TensorOptionals& noise_tensors, const at::Device& device);

// The numbers as arguments again, for some of a list's tensors.
std::vector<c10::SymInt> noise_of_members(const NoiseNumbers& noise,
                                          const std::vector<size_t>& members);

// What a kernel on `device` takes.
NoiseSource source_of(const NoiseNumbers& noise, const at::Device& device);

// Seeds and steps that are not the host's, or differ from row to row of the tensors: whether they do follows from their
// shapes and devices alone.
bool has_row_numbers(const NoiseNumbers& noise, const at::Device& device);
struct RowNumbers {
  // 0: the kernel takes `source` as it is.
  int64_t rows = 0;
  NoiseSource source;
  at::Tensor seeds, steps;  // [rows], on the device, or undefined

  RowNumbers(const NoiseNumbers& noise, at::TensorList tensors);
};

// A tensor's place in its noise: element i is number offset + i / run * stride + i % run of the stream. A shard along
// a dimension that is not the first has such runs; a contiguous one has run 0.
struct NoisePlace {
  uint32_t stream;
  uint64_t offset;
  int64_t run, stride;
};
std::vector<NoisePlace> places_of(const NoiseNumbers& noise, at::TensorList tensors);

// use(first element, count, offset of the first) for each contiguous run of a tensor.
template <class Use>
void for_runs(const NoisePlace& place, int64_t numel, Use use) {
  int64_t run = place.run == 0 ? numel : place.run;
  uint64_t offset = place.offset;
  for (int64_t first = 0; first < numel; first += run) {
    use(first, run, offset);
    offset += static_cast<uint64_t>(place.stride);
  }
}

// use(first element, count, row) for each row of a tensor.
template <class Use>
void for_rows(int64_t rows, int64_t numel, Use use) {
  const int64_t count = rows == 0 ? 0 : numel / rows;
  for (int64_t row = 0; row < rows; ++row) use(row * count, count, row);
}

}  // namespace kdkernels
