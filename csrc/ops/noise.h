// The noise ops as PyTorch calls them, and what they share with other ops on lists of tensors that make noise; see
// kdkernels/noise.py for what the arguments mean.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/SymInt.h>

#include <optional>
#include <vector>

#include "params.h"

namespace kdkernels {

// Which noise, but for the element and its tensor. A tensor, where given, holds the number and overrides it: a CPU
// int64 scalar for the seed, an int64 scalar on any device for the step.
struct NoiseNumbers {
  c10::SymInt seed, step;
  std::optional<at::Tensor> seed_tensor, step_tensor;
  int64_t distribution;
};

// One tensor's.
struct NoiseArgs : NoiseNumbers {
  c10::SymInt stream, offset;
};

// A list's. streams: of the first tensor, the others' follow, or of each; offsets: for all, or of each; runs: empty,
// or (run, stride) of each, see `Place`.
struct NoiseListArgs : NoiseNumbers {
  std::vector<c10::SymInt> streams, offsets, runs;
};

// The tails that schemas share, their C++ parameters, and structs of those.
#define KD_NOISE_SCHEMA \
  "SymInt seed, SymInt step=0, SymInt stream=0, SymInt offset=0, Tensor? seed_tensor=None, " \
  "Tensor? step_tensor=None, int distribution=0"
#define KD_NOISE_PARAMS \
  c10::SymInt seed, c10::SymInt step, c10::SymInt stream, c10::SymInt offset, \
      const std::optional<at::Tensor>&seed_tensor, const std::optional<at::Tensor>&step_tensor, \
      int64_t distribution
#define KD_NOISE_ARGS \
  NoiseArgs { {seed, step, seed_tensor, step_tensor, distribution}, stream, offset }
#define KD_NOISE_SPREAD(n) \
  n.seed, n.step, n.stream, n.offset, n.seed_tensor, n.step_tensor, n.distribution

#define KD_NOISE_LIST_SCHEMA \
  "SymInt seed, SymInt step=0, SymInt[] streams, SymInt[] offsets, SymInt[] runs, Tensor? " \
  "seed_tensor=None, Tensor? step_tensor=None, int distribution=0"
#define KD_NOISE_LIST_PARAMS \
  c10::SymInt seed, c10::SymInt step, c10::SymIntArrayRef streams, c10::SymIntArrayRef offsets, \
      c10::SymIntArrayRef runs, const std::optional<at::Tensor>&seed_tensor, \
      const std::optional<at::Tensor>&step_tensor, int64_t distribution
#define KD_NOISE_LIST_ARGS \
  NoiseListArgs { \
    {seed, step, seed_tensor, step_tensor, distribution}, streams.vec(), offsets.vec(), runs.vec() \
  }
#define KD_NOISE_LIST_SPREAD(n) \
  n.seed, n.step, n.streams, n.offsets, n.runs, n.seed_tensor, n.step_tensor, n.distribution

at::Tensor randn_like(const at::Tensor& x, KD_NOISE_PARAMS);
void add_noise_(at::TensorList tensors, at::ArrayRef<double> std, KD_NOISE_LIST_PARAMS,
                bool multiplicative, const std::optional<at::Tensor>& std_tensor,
                const std::optional<at::Tensor>& norms);
at::Tensor input_noise(const at::Tensor& x, const std::optional<at::Tensor>& std_tensor, double std,
                       KD_NOISE_PARAMS, bool multiplicative);
at::Tensor gradient_noise(const at::Tensor& x, const std::optional<at::Tensor>& std_tensor,
                          double std, KD_NOISE_PARAMS, bool multiplicative);
at::Tensor noise_dot(at::TensorList tensors, KD_NOISE_LIST_PARAMS);
// scales[k] * eps in the shape and dtype of tensors[k]: the adjoint of noise_dot.
std::vector<at::Tensor> scaled_noise(at::TensorList tensors, const at::Tensor& scales,
                                     KD_NOISE_LIST_PARAMS);
void combine_noise_(at::TensorList tensors, const at::Tensor& coefficients, const at::Tensor& seeds,
                    c10::SymInt step, c10::SymIntArrayRef streams, c10::SymIntArrayRef offsets,
                    c10::SymIntArrayRef runs, const std::optional<at::Tensor>& step_tensor,
                    int64_t distribution);

// ---- lists of tensors ----------------------------------------------------------------------------

// What is known before a kernel runs, so that an error precedes any work.
void check_noise(const NoiseNumbers& noise);
void check_noise(const NoiseListArgs& noise, size_t tensors);
void check_std(double std);
// A tensor of one fp64 number, or one each.
void check_each(const char* name, const at::Tensor& tensor, const char* one, size_t count,
                const at::Tensor& like);
// `name`[i] of every list is of a dtype and device that kernels take.
void check_list(const char* name, at::TensorList tensors);
// ... may be written in place.
void check_writable(const char* name, at::TensorList tensors);
void check_no_gradient(const char* op, const char* name, at::TensorList tensors);
void check_norms(const std::optional<at::Tensor>& norms, size_t count, const at::Tensor& like);

// The numbers once a kernel is about to run on `device`.
NoiseSource source_of(const NoiseNumbers& noise, const at::Device& device);

// A tensor's place in its noise: element i is number offset + i / run * stride + i % run of the stream. A shard
// along a dimension that is not the first has such runs; run 0 is a contiguous one.
struct Place {
  uint32_t stream;
  uint64_t offset;
  int64_t run, stride;
};
std::vector<Place> places_of(const NoiseListArgs& noise, at::TensorList tensors);

// use(first element, count, offset of the first) for each contiguous run of a tensor.
template <class Use>
void for_runs(const Place& place, int64_t numel, Use use) {
  int64_t run = place.run == 0 ? numel : place.run;
  uint64_t offset = place.offset;
  for (int64_t first = 0; first < numel; first += run) {
    use(first, run, offset);
    offset += static_cast<uint64_t>(place.stride);
  }
}

// The row-major form of tensors that kernels write to; what had to be copied goes back in write_back().
class InPlace {
 public:
  void* data(const at::Tensor& tensor, const char* name, size_t index);
  // An error where two of them share memory: threads would write there at once.
  void check_apart(const char* op);
  void write_back();

 private:
  struct Range {
    const char *begin, *end;  // of the first element and after the last
    const char* name;
    size_t index;
    at::Tensor tensor;
  };
  static bool shares_elements(const Range& a, const Range& b);
  std::vector<Range> ranges_;
  std::vector<std::pair<at::Tensor, at::Tensor>> copies_;
  std::vector<at::Tensor> written_;
};

// The indices of a list's tensors of each dtype that it has.
struct DtypeGroup {
  Dtype dtype;
  std::vector<size_t> members;
};
std::vector<DtypeGroup> grouped_by_dtype(at::TensorList tensors);

// [count, 2] or [count] fp64 numbers of a list, of which kernels write those of one dtype at a time.
class Rows {
 public:
  // `all`: undefined where they are not wanted.
  Rows(at::Tensor all, size_t count) : all_(std::move(all)), count_(count) {}

  // run(where it writes those of a group, in its order, or null), unless the group has no elements: all are 0 then.
  template <class Run>
  void fill(const DtypeGroup& group, bool empty, Run run) {
    if (!all_.defined()) return empty ? void() : run(nullptr);
    bool whole = group.members.size() == count_;
    at::Tensor part = whole ? all_ : at::empty_like(all_.narrow(0, 0, group.members.size()));
    if (empty) {
      part.zero_();
    } else {
      run(part.mutable_data_ptr<double>());
    }
    for (size_t i = 0; i < group.members.size() && !whole; ++i) {
      all_.select(0, group.members[i]).copy_(part.select(0, i));
    }
  }

 private:
  at::Tensor all_;
  size_t count_;
};

// What a kernel is told of a group, as its runs.
template <class Params, class Run>
void set_runs(Params& p, const DtypeGroup& group, const std::vector<Run>& runs) {
  p.dtype = group.dtype;
  p.tensors = runs.data();
  p.count = static_cast<int64_t>(runs.size());
  if constexpr (requires { p.indices; }) p.indices = static_cast<int64_t>(group.members.size());
}

// `tensor`, of one number or one each, as those of a group in its order.
at::Tensor each_of(const at::Tensor& tensor, const DtypeGroup& group, size_t count,
                   at::ScalarType dtype);

}  // namespace kdkernels
