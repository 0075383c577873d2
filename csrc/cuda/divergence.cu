// The losses of any divergence, teacher and layout: one kernel a dtype, whose options are uniform branches.
#include "cuda/divergence.cuh"
#include "cuda/row_launch.h"
#include "row_task.h"

namespace kdkernels {
namespace cuda {
namespace {

// What of a task stands in a call's options.
template <class Real>
KD_FN void set_options(const LossParams& p, DivergenceTask<Real>& task) {
  task.row = row_task(p);
  task.logits = logits_of<Real>(p);
  task.temperature = static_cast<Real>(p.temperature);
  task.refine = task.row.compares && p.state == nullptr && math::needs_exact_sums(p.divergence);
}

// The task of one row, in shared memory, where options stand in tensors; else the call's.
template <class Real, bool kPerRow>
struct RowTaskMemory {
  __device__ const DivergenceTask<Real>& task_or(const DivergenceTask<Real>& task) const {
    return task;
  }
};
template <class Real>
struct RowTaskMemory<Real, true> {
  // What the task is made of; as bytes, since shared memory has no constructors.
  alignas(16) unsigned char params[sizeof(LossParams)];
  DivergenceTask<Real> task;
  bool valid;

  __device__ const DivergenceTask<Real>& task_or(const DivergenceTask<Real>&) const { return task; }
  __device__ void set(const LossParams& p, const DivergenceTask<Real>& of_call, int64_t row) {
    LossParams& out = reinterpret_cast<LossParams&>(params);
    valid = options_of_row<Real>(p, row, out);
    task = of_call;
    set_options(out, task);
    if (p.row_options[kDivergenceAlpha] != nullptr || p.row_options[kBeta] != nullptr)
      task.parameters = math::parameters_of<Real>(out);
  }
};

// Classes that a thread takes at once. A task in shared memory leaves no registers for more than one, nor does fp64.
template <class T, bool kPerRow>
constexpr int kRowGroup = kPerRow || sizeof(T) == 8 ? 1 : 4;

template <class T, bool kPerRow>
constexpr int row_threads() {
  return divergence_threads(sizeof(T)) / (kPerRow && sizeof(T) == 2 ? 2 : 1);
}

// A block a row, which it goes over up to 5 times: moments, maxima, sums, terms, gradient. Bytes 1.00 times
// the least where the row fits shared memory (16 bits: V up to 57,000 on an H100), 3 times where it does not and
// L2 does not hold it. 32,000 classes in 16 bits: 5 special functions and 230 instructions per element of reverse
// KL, 7 and 340 of JS, so instructions bind. Registers leave 16 warps an SM, 8 in fp64.
//
// kPerRow: options stand in tensors, so that the first thread makes each row a task of its own. A task in shared
// memory takes registers that one among the parameters does not: 16 bits then have half the threads.
template <class T, bool kPerRow>
__global__ void __launch_bounds__(row_threads<T, kPerRow>(), 1)
    divergence_kernel(const __grid_constant__ LossParams p,
                      const __grid_constant__ DivergenceTask<typename Compute<T>::type> task) {
  using Real = typename Compute<T>::type;
  wait_for_launch_before();
  __shared__ RowShared<Real> shared;
  const int thread = threadIdx.x;
  __shared__ RowTaskMemory<Real, kPerRow> of_row;
  RowWalk<T, kRowGroup<T, kPerRow>> walk{p, of_row.task_or(task), shared};
  // Loops may read ahead what a later pass writes.
  for (int i = thread; i < static_cast<int>(sizeof shared / sizeof(int)); i += blockDim.x)
    reinterpret_cast<int*>(&shared)[i] = 0;
  __syncthreads();
  const int stages = p.state != nullptr ? p.stages : kAllStages;
  double* fields = reinterpret_cast<double*>(&shared.state);

  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const int64_t label = p.labels != nullptr ? p.labels[row] : -1;
    walk.row = row;
    walk.label = label - p.first_class;
    walk.staged = false;
    walk.first_pass = true;
    __syncthreads();  // the last row no longer needs what is shared
    bool invalid = p.labels != nullptr && (label < 0 || label >= p.all_classes);
    if constexpr (kPerRow) {
      if (thread == 0) of_row.set(p, task, row);
      __syncthreads();
      invalid |= !of_row.valid;
    }
    const bool ignored = walk.weight() == 0 || (p.labels != nullptr && label == p.ignore_index);
    if (thread == 0) shared.total_u = shared.label_u = shared.label_t = 0;
    for (int i = thread; i < math::kRowState; i += blockDim.x)
      fields[i] = p.state != nullptr && stages > kMoments ? p.state[i * p.rows + row] : 0.0;
    if (!ignored && task.row.entries) invalid |= walk.load_entries();
    __syncthreads();
    if (ignored || invalid) {
      blank<T>(p, row);
      const Real out = ignored ? Real(0) : static_cast<Real>(nan(""));
      if (thread == 0 && (stages & kGradient) != 0) walk.emit(out);
      for (int i = thread; i < math::kStatistics && p.statistics != nullptr; i += blockDim.x)
        static_cast<Real*>(p.statistics)[i * p.rows + row] = out;
      for (int i = thread; i < math::kRowState && p.state != nullptr; i += blockDim.x)
        p.state[i * p.rows + row] = 0;
      continue;
    }

    if (p.teachers > 1 && task.reads_teacher) walk.prepare_mixture();
    bool normalized = false;
#pragma unroll 1
    for (int stage = kMoments; stage <= kGradient; stage = stage == kSums     ? kRefine
                                                           : stage == kRefine ? kTerms
                                                                              : 2 * stage) {
      if (stage == kRefine
              ? !walk.task.refine
              : (stages & stage) == 0 || (stage == kMoments && !task.row.standardize) ||
                    (stage == kTerms && !walk.task.row.compares))
        continue;
      walk.prepare(stage, normalized);
      normalized = stage > kSums;
      if (stage < kGradient || p.gradient != nullptr || p.entry_gradient != nullptr ||
          p.teacher_gradient != nullptr)
        walk.pass(stage);
      walk.first_pass = false;
    }
    if (p.state != nullptr && (stages & kGradient) == 0) {
      __syncthreads();
      for (int i = thread; i < math::kRowState; i += blockDim.x)
        p.state[i * p.rows + row] = fields[i];
    }
  }
  if (thread == 0 && task.partial != nullptr) task.partial[blockIdx.x] = shared.loss;
}

template <class Real>
DivergenceTask<Real> task_of(const LossParams& p) {
  using Transform = math::Transform<Real>;
  DivergenceTask<Real> task = {};
  set_options(p, task);
  task.parameters = math::parameters_of<Real>(p);
  task.own = !task.row.renormalize || task.row.cross_entropy;
  task.reads_teacher =
      p.tail == Tail::kNone && (task.row.compares || p.teacher_gradient != nullptr);
  const bool of_student = !Transform::nothing(task.logits.student) || has_row_options(p);
  const bool of_teacher =
      task.reads_teacher && (p.probs || !Transform::nothing(task.logits.teacher));
  // A gradient in probabilities needs them once more.
  task.transformed =
      task.reads_teacher && (p.teachers > 1 || (p.probs && p.teacher_gradient != nullptr));
  task.changes = !task.transformed && (of_student || of_teacher);
  task.best = p.statistics != nullptr || p.state != nullptr;
  return task;
}

template <class T, bool kPerRow>
cudaError_t launch(RowLaunch& rows, cudaStream_t stream) {
  using Real = typename Compute<T>::type;
  const LossParams& p = rows.p;
  Device device;
  const void* kernel = reinterpret_cast<const void*>(divergence_kernel<T, kPerRow>);
  cudaError_t error = device_of(kernel, device);
  if (error != cudaSuccess) return error;
  const int of_rows = kPerRow ? static_cast<int>(sizeof(RowTaskMemory<Real, true>)) : 0;
  Device remaining = device;  // without the task of the row
  remaining.shared_per_block -= of_rows;
  DivergenceTask<Real> task = task_of<Real>(p);
  task.inv_denominator = rows.inv_denominator;
  task.device_inv_denominator = rows.device_inv_denominator;
  task.partial = rows.partial;

  const int sides = task.own + task.reads_teacher;
  const DivergencePlan plan =
      plan_divergence(p.classes, p.entries, sizeof(T), task.transformed, sides, remaining);
  const int entries = static_cast<int>(padded_entries(p.entries)), acc = sizeof(Real);
  const int side = plan.capacity * (task.transformed ? acc : static_cast<int>(sizeof(T))) + 16;
  task.capacity = plan.capacity;
  task.entry_u = entries * static_cast<int>(sizeof(int64_t));
  task.entry_t = task.entry_u + entries * acc;
  task.student_image = task.entry_t + entries * acc;
  task.teacher_image = task.student_image + side;
  task.raw = task.student_image + sides * side;
  error = allow_shared(kernel, plan.shared, kDivergenceStatic + of_rows, device);
  if (error != cudaSuccess) return error;
  rows.partials = std::min(p.rows, kMaxPartials);
  const Grid grid = {.blocks = rows.partials,
                     .threads = std::min(plan.threads, row_threads<T, kPerRow>()),
                     .shared = plan.shared,
                     .overlaps = rows.device_inv_denominator != nullptr};
  return launch_kernel(divergence_kernel<T, kPerRow>, grid, device, stream, p, task);
}

}  // namespace

cudaError_t general_passes(RowLaunch& rows, cudaStream_t stream) {
  if (rows.p.rows == 0) return cudaSuccess;
  return by_dtype(rows.p.dtype, [&](auto element) {
    using T = decltype(element);
    return has_row_options(rows.p) ? launch<T, true>(rows, stream) : launch<T, false>(rows, stream);
  });
}

}  // namespace cuda
}  // namespace kdkernels
