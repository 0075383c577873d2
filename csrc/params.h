// What a kernel is given: plain structs of pointers, sizes, strides (in elements) and scalars, shared by
// the ops that fill them and the CPU and CUDA kernels that read them. No torch, no CUDA runtime.
#pragma once

#include <cstdint>

#include "math/distribution.h"
#include "math/divergence.h"
#include "math/rounding.h"
#include "math/update.h"

namespace kdkernels {

enum class Dtype { kFloat32, kFloat64, kBFloat16, kFloat16 };

// The type that stored elements are computed in, "acc" below: fp64 for fp64, fp32 for all others.
template <class T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};

enum class Tail {
  kNone,  // the teacher is dense
  kRenormalize,  // both sides are softmaxes over a row's entries
  kBucket,  // the entries and one class for the rest of the vocabulary
  kIgnore,  // the sum over the entries only
};

constexpr int kMaxTeachers = 8, kMaxTopK = 1024;
// Passes over a row. A whole row takes all of them in one call; slices of a vocabulary take one per call, between
// which the ranks add up what the passes leave in `state`.
enum Stage { kMoments = 1, kMaxima = 2, kSums = 4, kTerms = 8, kGradient = 16, kAllStages = 31 };

// What a loss and its gradient are divided by; 0 makes both 0.
struct Denominator {
  double number = 1;
  // Instead of the number: the sum of the kept rows' weights, which a CUDA kernel finds on the device.
  bool is_kept_weight = false;
};

// Where the rows of a matrix lie, in elements: in runs of `run` rows that are `inner` apart; the runs are `outer` apart. So
// does logits[:, :-1] of [batch, length, classes]. Most matrices are one run.
struct RowStrides {
  int64_t inner = 0, outer = 0, run = INT64_MAX;
  uint64_t inverse =
      0;  // 2^64 / run, rounded up: exact for the rows below 2^31 that runs are limited to
};
inline RowStrides rows_in_runs(int64_t inner, int64_t outer, int64_t run) {
  return {inner, outer, run, UINT64_MAX / static_cast<uint64_t>(run) + 1};  // run > 1
}
KD_FN int64_t offset_of(const RowStrides& rows, int64_t row) {
  if (row < rows.run) return row * rows.inner;
  // The upper half of a product of 31 and 64 bits: a division would be dear on a GPU.
  const uint64_t of_row = static_cast<uint32_t>(row),
                 low = of_row * static_cast<uint32_t>(rows.inverse);
  const int64_t run = static_cast<int64_t>((of_row * (rows.inverse >> 32) + (low >> 32)) >> 32);
  return run * rows.outer + (row - run * rows.run) * rows.inner;
}
template <class T>
KD_FN const T* row_at(const void* data, const RowStrides& rows, int64_t row) {
  return static_cast<const T*>(data) + offset_of(rows, row);
}
template <class T>
KD_FN T* row_at(void* data, const RowStrides& rows, int64_t row) {
  return static_cast<T*>(data) + offset_of(rows, row);
}

constexpr double kLeastTemperature = 1e-15, kLargestTemperature = 1e15;
using math::kLargestNumber;

// Options that may differ from row to row: which of LossParams' numbers a tensor overrides.
enum RowOption {
  kTemperature,
  kAlpha,
  kDivergenceAlpha,
  kBeta,
  kLogitScale,
  kSoftCap,
  kTeacherLogitScale,
  kTeacherSoftCap,
  kRowOptions
};

// One distillation loss over a [rows, classes] matrix of student logits: any divergence, teacher and layout.
struct LossParams {
  Dtype dtype;
  int64_t rows, classes;
  const void* student = nullptr;  // [rows, classes], dtype, its rows below
  void* gradient =
      nullptr;  // [rows, classes], dtype, its rows below; null: only the loss is computed
  RowStrides student_rows = {}, gradient_rows = {};
  const int64_t* labels = nullptr;  // [rows] or null
  const void* weight = nullptr;  // [rows], acc, or null
  int64_t ignore_index = -100;
  void* row_loss = nullptr;  // [rows], acc: weight * loss, or null
  void* loss = nullptr;  // [], acc: sum of weight * loss over the denominator, or null
  Denominator denominator = {};
  double gradient_scale = 1;  // a further factor of the gradient, a power of two
  double temperature = 1, alpha = 1, label_smoothing = 0;

  math::Divergence divergence = math::Divergence::kForwardKL;
  double divergence_alpha = 0, beta = 0;  // its parameters
  // Of the student's and of a teacher's logits: soft_cap * tanh(logit_scale * x / soft_cap); soft_cap 0: none.
  double logit_scale = 1, soft_cap = 0, teacher_logit_scale = 1, teacher_soft_cap = 0;
  // [rows] each, acc: what a row takes instead of the number, or null.
  const void* row_options[kRowOptions] = {};
  bool standardize = false;

  int teachers = 1;  // 1 to kMaxTeachers
  // [rows, classes], dtype, their rows below; or of top-k one matrix of values [rows, entries], acc, contiguous
  const void* teacher_data[kMaxTeachers] = {};
  RowStrides teacher_rows[kMaxTeachers] = {};
  double teacher_weights[kMaxTeachers] = {1};  // sum 1
  bool probs = false;  // teachers are probabilities, else logits or log-probabilities
  bool log_mix = false;  // several are mixed as logarithms, else as probabilities
  void* teacher_gradient = nullptr;  // [rows, classes] of the only teacher, or null
  RowStrides teacher_gradient_rows = {};
  void* statistics = nullptr;  // [math::kStatistics, rows], acc, or null

  Tail tail = Tail::kNone;
  int64_t entries = 0;  // a row, at most kMaxTopK
  const void* indices =
      nullptr;  // [rows, entries] contiguous, int64 if wide_indices else int32; -1: none
  bool wide_indices = false;
  const void* teacher_logsumexp = nullptr;  // [rows], acc, or null: 0
  void* entry_gradient = nullptr;  // [rows, entries], dtype, instead of `gradient`, or null

  // A slice of the vocabulary: columns [first_class, first_class + classes) of all_classes. Labels and
  // indices are of the whole.
  int64_t first_class = 0, all_classes = 0;
  int stages = kAllStages;
  double* state = nullptr;  // [math::kRowState, rows]; null: all stages in one call

  double* workspace = nullptr;  // CUDA: loss_workspace(rows) doubles
};

// data[r, i] *= factor[r], or *= factor[0]; nothing is touched where the factor is 1.
struct ScaleParams {
  Dtype dtype;
  void* data;  // [rows, classes], dtype
  int64_t rows, classes;
  RowStrides strides;
  const void* factor;  // [rows] or [1], acc
  bool per_row;
};

// Which noise, but for the element and its tensor.
struct NoiseSource {
  math::Distribution distribution;
  uint32_t seed_low, seed_high, step;
  const int64_t* device_step;  // CUDA: overrides step when not null
  // Of rows that differ in them, on the kernel's device: override seed and step when not null.
  const int64_t *row_seeds, *row_steps;
};

using math::NoiseMode;

// A contiguous run of elements of one tensor.
struct NoiseTensor {
  void* out;
  const void* in;  // null for kOnly; may equal out
  int64_t numel;
  double std;
  uint64_t offset;  // element i has eps(offset + i)
  uint32_t stream;
  int32_t index;  // the tensor's place in the op's list: its row of stds and norms
  int64_t row;  // of row_seeds and row_steps
};

struct NoiseParams {
  Dtype dtype;
  NoiseMode mode;
  NoiseSource source;
  const NoiseTensor* tensors;  // host memory
  int64_t count;
  // Where not null, the std of element i of a run is stds[index * std_size + i / std_inner % std_size]. With
  // std_size > 1 there is one run, of a whole tensor, or a run a row of it: i then counts from the tensor's first row.
  const void* stds;  // acc
  int64_t std_size, std_inner;
  // Sums of squares of in and of std * eps, added up over the runs of a tensor: [indices, 2], or null. kAdd.
  double* norms;
  int64_t indices;
  double* workspace;  // CUDA: noise_workspace(params) doubles
  // Where not 0, the runs are the rows of one tensor, in order and one after the other, each with a seed and a step of
  // row_seeds and row_steps; there are no norms.
  int64_t rows;
};

// result[index] = sum of in[i] * eps(offset + i) over a tensor's runs; out and std are not used.
struct NoiseDotParams {
  Dtype dtype;
  NoiseSource source;
  const NoiseTensor* tensors;
  int64_t count;
  double* result;  // [indices]
  int64_t indices;
  double* workspace;  // CUDA: noise_dot_workspace(params) doubles
};

// out[i] += sum over k of coefficients[k] * eps of seeds[k], added in this order and rounded once.
struct CombineParams {
  Dtype dtype;
  NoiseSource source;  // but for its seed
  const NoiseTensor* tensors;  // out only; std is not used
  int64_t count;
  const int64_t* seeds;  // [terms], on the kernel's device
  const double* coefficients;  // [terms], on the kernel's device
  int64_t terms;
};

// A contiguous run of elements of one parameter.
struct UpdateTensor {
  void *param, *grad;
  void *first, *second;  // moments, or null where the rule has none
  int64_t numel;
  uint64_t offset;
  uint32_t stream;
  int32_t index;  // of the parameter in the op's list: its row of norms
  int32_t rule;
  int64_t step;  // 1 at the parameter's first update
  const float* device_step;  // CUDA: overrides step when not null
};

struct UpdateParams {
  Dtype dtype;
  math::Update update;
  NoiseSource source;
  const UpdateTensor* tensors;  // host memory
  int64_t count;
  const math::UpdateRule* rules;  // host memory
  int64_t rule_count;
  const double *device_lr, *device_std;  // [rule_count] each: override the rules' when not null
  // Of a gradient scaler: gradients are divided by *grad_scale, in place, and nothing happens where *found_inf
  // is not 0. On the kernel's device, or null.
  const float *grad_scale, *found_inf;
  double* norms;  // [indices, 2]: sums of squares of both UpdateShares, gradient first; or null
  int64_t indices;
  double* workspace;  // CUDA: update_workspace(params) doubles
};

// 16 random bits per element of a tensor, which lies in rows of `run` elements: element i is number
// offset + i / run * stride + i % run of the whole.
struct ElementBits {
  NoiseSource source;  // its distribution is not read
  uint32_t stream;
  uint64_t offset;
  int64_t rows, run, stride;
};

// out[i] = in[i] * scale, or 0 where the element's bits are below `dropped`, which is up to 2^16.
struct DropoutParams {
  Dtype dtype;
  const void* in;
  void* out;
  uint32_t dropped;
  double scale;
  ElementBits bits;
};

struct RoundParams {
  math::RoundedDtype dtype;  // of out
  const float* in;
  void* out;
  ElementBits bits;
};

// Replicas of one linear regression y ~ theta x under input noise, all in fp64.
struct RegressionParams {
  const double* x;  // [samples]
  const double* y;  // [samples]
  int64_t samples, replicas, steps;
  bool per_sample;  // one normal per sample and step, else one per step
  const int64_t* seed;  // [replicas]
  const double *theta, *lr, *lam, *sigma;  // [replicas]
  uint32_t stream;
  double* result;  // [replicas]: theta after the last step
  double* trajectory;  // [steps + 1, replicas], or null
};

}  // namespace kdkernels
