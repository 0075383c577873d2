// The losses of any divergence, teacher and layout: one kernel a dtype, whose options are uniform branches.
#include "cuda/divergence.h"

#include "cuda/divergence.cuh"
#include "row_task.h"

namespace kdkernels {
namespace cuda {
namespace {

// Blocks an SM that registers must allow.
constexpr int divergence_blocks(int element_size) { return 1; }

// A block a row, which it goes over up to 5 times: moments, maxima, sums, terms, gradient. Bytes 1.00 times
// the least where the row fits shared memory. 2 special functions an element in the sums and as many again
// in the terms and in the gradient, where each element's share of the divergence is computed.
template <class T>
__global__ void __launch_bounds__(kDivergenceThreads, divergence_blocks(sizeof(T)))
    divergence_kernel(const __grid_constant__ DivergenceParams p,
                      const __grid_constant__ DivergenceTask task) {
  using Real = typename Compute<T>::type;
  extern __shared__ uint4 images_shared[];
  __shared__ RowShared<Real> shared;
  const int thread = threadIdx.x;
  char* memory = reinterpret_cast<char*>(images_shared);
  RowWalk<T> walk{p, task, shared};
  walk.column = reinterpret_cast<int64_t*>(memory);
  walk.entry_u = reinterpret_cast<Real*>(walk.column + p.entries);
  walk.entry_t = walk.entry_u + p.entries;
  memory += (p.entries * (sizeof(int64_t) + 2 * sizeof(Real)) + 15) / 16 * 16;
  const int side = task.capacity * static_cast<int>(task.cooked ? sizeof(Real) : sizeof(T)) + 16;
  walk.student_image = memory;
  walk.teacher_image = memory + side;
  walk.raw = reinterpret_cast<T*>(memory + side * (task.row.entries ? 1 : 2));
  if (thread == 0) shared.loss = 0;
  if (thread < kMaxTeachers)
    shared.mix_max[thread] = shared.mix_scale[thread] = shared.mix_shift[thread] = 0;
  const int stages = p.state != nullptr ? p.stages : kAllStages;
  double* fields = reinterpret_cast<double*>(&shared.state);

  const int turn = p.only != nullptr ? kWarp : 1;
  for (int64_t base = static_cast<int64_t>(blockIdx.x) * turn; base < p.rows;
       base += static_cast<int64_t>(gridDim.x) * turn) {
    unsigned rows = 1;
    if (p.only != nullptr) {
      const int64_t mine = base + thread % kWarp;
      rows = __ballot_sync(0xFFFFFFFFu, mine < p.rows && p.only[mine] != 0);
    }
    for (; rows != 0; rows &= rows - 1) {
      const int64_t row = base + __ffs(static_cast<int>(rows)) - 1;
      const int64_t label = p.labels != nullptr ? p.labels[row] : -1;
      const double weight =
          p.weight != nullptr ? static_cast<double>(static_cast<const Real*>(p.weight)[row]) : 1.0;
      const bool ignored = weight == 0 || (p.labels != nullptr && label == p.ignore_index);
      __syncthreads();  // the last row no longer needs what is shared
      walk.start(row, label);
      if (thread == 0) shared.label_u = shared.label_t = 0;
      for (int i = thread; i < math::kRowState; i += blockDim.x)
        fields[i] = p.state != nullptr && stages > kMoments ? p.state[i * p.rows + row] : 0.0;
      bool invalid = p.labels != nullptr && (label < 0 || label >= p.all_classes);
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
                ? !task.refine
                : (stages & stage) == 0 || (stage == kMoments && !task.row.standardize) ||
                      (stage == kTerms && !task.row.compares))
          continue;
        walk.prepare(stage, normalized, weight);
        normalized = stage > kSums;
        if (stage < kGradient || p.gradient != nullptr || p.entry_gradient != nullptr ||
            p.teacher_gradient != nullptr)
          walk.pass(stage, weight);
        walk.first_pass = false;
      }
      if (p.state != nullptr && (stages & kGradient) == 0) {
        __syncthreads();
        for (int i = thread; i < math::kRowState; i += blockDim.x)
          p.state[i * p.rows + row] = fields[i];
      }
    }
  }
  if (thread == 0 && task.partial != nullptr) task.partial[blockIdx.x] = shared.loss;
}

template <class T>
cudaError_t launch(const DivergenceParams& p, DivergenceTask task, cudaStream_t stream) {
  Device device;
  const void* kernel = reinterpret_cast<const void*>(divergence_kernel<T>);
  cudaError_t error = device_of(kernel, device);
  if (error != cudaSuccess) return error;
  const int sides = task.row.entries ? (task.own ? 1 : 0) : 2;
  const DivergencePlan plan =
      plan_divergence(p.classes, p.entries, sizeof(T), task.cooked, sides, device);
  task.capacity = plan.capacity;
  if (plan.shared > 48 * 1024 - kDivergenceStatic) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared);
    if (error != cudaSuccess) return error;
  }
  divergence_kernel<T>
      <<<static_cast<unsigned>(divergence_partials(p)), static_cast<unsigned>(plan.threads),
         static_cast<size_t>(plan.shared), stream>>>(p, task);
  return cudaGetLastError();
}

}  // namespace

cudaError_t divergence_rows(const DivergenceParams& p, double inv_denominator,
                            const double* device_inv_denominator, double* partial,
                            cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  DivergenceTask task = {};
  task.row = row_task(p);
  task.best = p.statistics != nullptr || p.state != nullptr;
  task.own = !task.row.renormalize || task.row.cross_entropy;
  task.reads_teacher = !task.row.entries && (task.row.compares || p.teacher_gradient != nullptr);
  // These two feel the last bit of the sums where student and teacher are close.
  task.refine = task.row.compares && p.state == nullptr &&
                (p.divergence == math::Divergence::kTotalVariation ||
                 p.divergence == math::Divergence::kAlphaBeta);
  task.cooked = p.logit_scale != 1 || p.soft_cap > 0;
  if (task.reads_teacher) {
    task.cooked |=
        p.teachers > 1 || p.probs || p.teacher_logit_scale != 1 || p.teacher_soft_cap > 0;
  }
  task.inv_denominator = inv_denominator;
  task.device_inv_denominator = device_inv_denominator;
  task.partial = partial;
  switch (p.dtype) {
    case Dtype::kFloat32: return launch<float>(p, task, stream);
    case Dtype::kFloat64: return launch<double>(p, task, stream);
    case Dtype::kBFloat16: return launch<__nv_bfloat16>(p, task, stream);
    case Dtype::kFloat16: return launch<__half>(p, task, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace cuda
}  // namespace kdkernels
