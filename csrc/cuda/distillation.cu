// The distillation loss and its gradient: which kernels a call launches, and the sums over its rows.
#include <algorithm>

#include "cuda/row.cuh"
#include "cuda/row_launch.h"
#include "row_task.h"

namespace kdkernels {
namespace cuda {
namespace {

// ---- sums over rows -----------------------------------------------------------------------------

constexpr int kSumThreads = 1024;
// Rows that one block adds up in the time of a launch or two.
constexpr int64_t kRowsPerSumBlock = 65536;
constexpr int64_t kMaxSumBlocks = 256;

// The sum of value(i) for i = begin, begin + stride, ... over a block, in a fixed order.
template <class Value>
__device__ __forceinline__ double block_sum(int64_t begin, int64_t end, int64_t stride,
                                            Value value) {
  __shared__ double shared[kSumThreads / kWarp];
  double sum[1] = {0};
#pragma unroll 8
  for (int64_t i = begin; i < end; i += stride) sum[0] += value(i);
  reduce<Sum, kSumThreads>(sum, shared);
  return sum[0];
}

// The kept rows' weights: one sum per block, or of a single block the inverse.
template <class Real>
__global__ void __launch_bounds__(kSumThreads)
    weight_kernel(const __grid_constant__ LossParams p, double* out) {
  double sum = block_sum(static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x, p.rows,
                         static_cast<int64_t>(gridDim.x) * kSumThreads, [&](int64_t row) {
    Real weight = p.weight != nullptr ? static_cast<const Real*>(p.weight)[row] : Real(1);
    bool ignored = p.labels != nullptr && p.labels[row] == p.ignore_index;
    return ignored ? 0.0 : static_cast<double>(weight);
  });
  if (threadIdx.x == 0) out[blockIdx.x] = gridDim.x == 1 ? (sum != 0 ? 1 / sum : 0) : sum;
}

__global__ void __launch_bounds__(kSumThreads)
    inverse_kernel(const double* sums, int64_t count, double* out) {
  double sum = block_sum(threadIdx.x, count, kSumThreads, [&](int64_t i) { return sums[i]; });
  if (threadIdx.x == 0) *out = sum != 0 ? 1 / sum : 0;
}

template <class Real>
__global__ void __launch_bounds__(kSumThreads)
    loss_kernel(const double* partial, int64_t count, double inv_denominator,
                const double* device_inv_denominator, Real* loss) {
  wait_for_launch_before();
  double sum = block_sum(threadIdx.x, count, kSumThreads, [&](int64_t i) { return partial[i]; });
  double factor = device_inv_denominator != nullptr ? *device_inv_denominator : inv_denominator;
  if (threadIdx.x == 0) *loss = static_cast<Real>(sum * factor);
}

// ---- launches -----------------------------------------------------------------------------------

// The workspace: the inverse denominator, sums of weights, partial losses.
constexpr int64_t kPartials = 1 + kMaxSumBlocks;

template <class Real>
void find_denominator(RowLaunch& rows, cudaStream_t stream) {
  const LossParams& p = rows.p;
  const double number = p.denominator.number;
  if (!p.denominator.is_kept_weight) {
    rows.inv_denominator = number > 0 ? 1 / number : 0;
    return;
  }
  double *inverse = p.workspace, *weights = inverse + 1;
  int64_t blocks = std::min(kMaxSumBlocks, (p.rows + kRowsPerSumBlock - 1) / kRowsPerSumBlock);
  blocks = std::max<int64_t>(blocks, 1);
  weight_kernel<Real><<<static_cast<unsigned>(blocks), kSumThreads, 0, stream>>>(
      p, blocks == 1 ? inverse : weights);
  if (blocks > 1) inverse_kernel<<<1, kSumThreads, 0, stream>>>(weights, blocks, inverse);
  rows.device_inv_denominator = inverse;
}

// The loss from the workspace's partial ones.
template <class Real>
cudaError_t add_partials(const RowLaunch& rows, cudaStream_t stream) {
  const LossParams& p = rows.p;
  if (p.loss == nullptr) return cudaGetLastError();  // of the sums of weights
  Device device;
  cudaError_t error = device_of(reinterpret_cast<const void*>(loss_kernel<Real>), device);
  if (error != cudaSuccess) return error;
  error = launch_kernel(loss_kernel<Real>, {.blocks = 1, .threads = kSumThreads, .overlaps = true},
                        device, stream, rows.partial, rows.partials, rows.inv_denominator,
                        rows.device_inv_denominator, static_cast<Real*>(p.loss));
  return error != cudaSuccess ? error : cudaGetLastError();
}

// Whether sweeps take the call's rows: see cuda/plan.h. fp64 has no special functions to save, so that it has sweeps for the
// two KLs of plain logits alone. A number in fp32 is a class's below 2^24.
bool has_sweeps(const LossParams& p) {
  const bool kl =
      p.divergence == math::Divergence::kForwardKL || p.divergence == math::Divergence::kReverseKL;
  if (p.dtype == Dtype::kFloat64) return kl && is_of_plain_logits(p);
  const bool rounded = p.dtype != Dtype::kFloat32;
  return is_of_two_matrices(p) && (kl || math::has_third_sweep(p, rounded)) &&
         (p.statistics == nullptr || p.classes <= (1 << 24));
}

// Multiplies rows by a factor that is on the device; a block looks at the factor before any data.
template <class T>
__global__ void __launch_bounds__(256) scale_kernel(const __grid_constant__ ScaleParams p) {
  using Real = typename Compute<T>::type;
  constexpr int kCount = 16 / sizeof(T);
  for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
    Real factor = static_cast<const Real*>(p.factor)[p.per_row ? row : 0];
    if (factor == Real(1)) continue;
    T* data = row_at<T>(p.data, p.strides, row);
    const Span<T, int64_t> span(data, data, data, p.classes);
    for (int64_t begin = static_cast<int64_t>(blockIdx.x) * blockDim.x; begin < span.body + kEdges;
         begin += static_cast<int64_t>(gridDim.x) * blockDim.x) {
      int64_t item = begin + threadIdx.x;
      Place<int64_t> here = item < span.body ? body_place<T, int64_t>(span, item, item + 1, 0, 0, 1)
                                             : edge_place(span, static_cast<int>(item - span.body));
      if (item >= span.body + kEdges || here.empty()) continue;
      Vector<T> x = load(data, here);
#pragma unroll
      for (int j = 0; j < kCount; ++j)
        narrow(static_cast<Real>(widen(x.value[j])) * factor, x.value[j]);
      store(data, here, x);
    }
  }
}

template <class T>
cudaError_t launch_scale(const ScaleParams& p, cudaStream_t stream) {
  constexpr int kThreads = 256;
  if (p.rows == 0) return cudaSuccess;
  ScaleParams flat = p;
  if (!p.per_row && offset_of(p.strides, p.rows - 1) == (p.rows - 1) * p.classes) {
    flat.classes = p.rows * p.classes;
    flat.rows = 1;
  }
  int64_t items = flat.classes / (16 / static_cast<int>(sizeof(T))) + kEdges;
  unsigned rows = static_cast<unsigned>(std::min<int64_t>(32768, flat.rows));
  unsigned columns = static_cast<unsigned>(
      std::min<int64_t>(std::max<int64_t>(2048 / rows, 1), (items + kThreads - 1) / kThreads));
  scale_kernel<T><<<dim3(columns, rows), kThreads, 0, stream>>>(flat);
  return cudaGetLastError();
}

}  // namespace

int64_t loss_workspace(int64_t rows) {
  return kPartials + std::min(rows, kMaxPartials) * kMaxCluster;
}

cudaError_t loss(const LossParams& p, cudaStream_t stream) {
  return by_dtype(p.dtype, [&](auto element) {
    using Real = typename Compute<decltype(element)>::type;
    RowLaunch rows = {p, 0, nullptr, p.loss != nullptr ? p.workspace + kPartials : nullptr};
    find_denominator<Real>(rows, stream);
    const bool transforms = !math::Logits<Real>::nothing(logits_of<Real>(p));
    auto* launch = !has_sweeps(p)            ? general_passes
                   : transforms              ? sweeps_of_transforms
                   : p.statistics != nullptr ? sweeps_with_statistics
                                             : plain_sweeps;
    const cudaError_t error = launch(rows, stream);
    return error != cudaSuccess ? error : add_partials<Real>(rows, stream);
  });
}

cudaError_t scale_rows(const ScaleParams& p, cudaStream_t stream) {
  return by_dtype(p.dtype,
                  [&](auto element) { return launch_scale<decltype(element)>(p, stream); });
}

}  // namespace cuda
}  // namespace kdkernels
