// The distillation loss and its gradient, a row a group of threads.
#include <algorithm>
#include <cfloat>

#include "cuda/device.cuh"
#include "cuda/kernels.h"
#include "math/distillation.h"

namespace kdkernels {
namespace cuda {
namespace {

using math::CrossEntropy;
using math::ForwardKL;

// Launch table. A warp a row while a lane has at most 32 elements of a row: no barrier, and 4 rows a block
// keep an SM full. Beyond that 256 threads a row: 3 blocks an SM at 80 registers, so that one row's barriers
// hide behind the others' loads. Asking for at least one block an SM keeps ptxas from spilling to fit more.
constexpr int kWarpRowClasses = 1024;
constexpr int kRowsPerBlock = 4;
constexpr int kRowThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 30;

struct Exp2Nonpositive {
  template <class Real>
  __device__ Real operator()(Real x) const {
    return math::exp2_nonpositive(x);
  }
};

template <class Real>
struct Lowest;
template <>
struct Lowest<float> {
  static constexpr float value = -FLT_MAX;
};
template <>
struct Lowest<double> {
  static constexpr double value = -DBL_MAX;
};

// Adds elements to a thread's own sums. Its maxima move rarely after the first few vectors, so rebasing
// stands behind a branch.
template <class Policy, CrossEntropy kHard, int kCount, class T, class Real>
__device__ __forceinline__ void visit(math::RowSums<Real>& sums, const Vector<T, kCount>& z,
                                      const Vector<T, kCount>& t, Real scale, bool smoothing) {
  Real max_s = sums.max_s, max_t = sums.max_t;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    max_s = math::larger(widen(z.value[i]), max_s);
    max_t = math::larger(widen(t.value[i]), max_t);
  }
  if (max_s > sums.max_s || max_t > sums.max_t) {
    sums = math::rebase<Policy, kHard>(sums, max_s, max_t, scale, Exp2Nonpositive());
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    Real shifted = widen(z.value[i]) - max_s;
    Real x = shifted * scale, y = (widen(t.value[i]) - max_t) * scale;
    Real ex = math::exp2_nonpositive(x), ey = math::exp2_nonpositive(y);
    sums.sum_s += ex;
    sums.sum_t += ey;
    sums.term += Policy::term(x, y, ex, ey);
    if (kHard == CrossEntropy::kOwn)
      sums.sum_hard += math::exp2_nonpositive(shifted * Real(math::kLog2E));
    if (kHard != CrossEntropy::kNone && smoothing) {
      sums.sum_z += shifted;
      sums.count += Real(1);
    }
  }
}

// Reads z and t twice (the second time from L2 as far as the rows in flight fit there: 132 SMs * 3 rows *
// 128 KB of bf16 at 32,000 classes is 51 MB, H100's L2 50 MB), writes the gradient once. 2 or 3 exponentials
// an element and pass.
template <class T, class Policy, CrossEntropy kHard, int kCount, int kThreads, int kRows>
__global__ void __launch_bounds__(kThreads* kRows, 1)
    rows_kernel(const DistillationParams p, double scale_fp64, const double* inv_denominator) {
  using Real = typename Compute<T>::type;
  constexpr int kWarps = kThreads / kWarp;
  __shared__ Real shared[6 * kWarps];
  const int lane = threadIdx.x;
  const Real temperature = static_cast<Real>(p.temperature);
  const Real scale = static_cast<Real>(scale_fp64);
  const Real smoothing = static_cast<Real>(p.label_smoothing);
  const Real factor = static_cast<Real>(*inv_denominator * p.gradient_scale);
  const Real inv_classes = math::inverse(static_cast<Real>(p.classes));
  const int64_t vectors = p.classes / kCount;

  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.y; row < p.rows;
       row += static_cast<int64_t>(gridDim.x) * kRows) {
    const T* z_row = static_cast<const T*>(p.student) + row * p.student_stride;
    const T* t_row = static_cast<const T*>(p.teacher) + row * p.teacher_stride;
    T* g_row = static_cast<T*>(p.gradient) + row * p.gradient_stride;
    int64_t label = p.labels != nullptr ? p.labels[row] : -1;
    Real weight = p.weight != nullptr ? static_cast<const Real*>(p.weight)[row] : Real(1);
    bool ignored = weight == Real(0) || (p.labels != nullptr && label == p.ignore_index);
    bool invalid = p.labels != nullptr && (label < 0 || label >= p.classes);
    if (ignored || invalid) {
      if (lane == 0)
        static_cast<Real*>(p.row_loss)[row] = ignored ? Real(0) : static_cast<Real>(nan(""));
      if (p.gradient != nullptr) {
#pragma unroll 1
        for (int64_t i = lane; i < p.classes; i += kThreads) narrow(Real(0), g_row[i]);
      }
      continue;
    }
    Real label_z = kHard != CrossEntropy::kNone ? static_cast<Real>(widen(z_row[label])) : Real(0);

    math::RowSums<Real> sums = {Lowest<Real>::value, Lowest<Real>::value, 0, 0, 0, 0, 0, 0};
#pragma unroll 1
    for (int64_t i = lane; i < vectors; i += kThreads) {
      visit<Policy, kHard>(sums, reinterpret_cast<const Vector<T, kCount>*>(z_row)[i],
                           reinterpret_cast<const Vector<T, kCount>*>(t_row)[i], scale,
                           smoothing > Real(0));
    }
#pragma unroll 1
    for (int64_t i = vectors * kCount + lane; i < p.classes; i += kThreads) {
      Vector<T, 1> z = {z_row[i]}, t = {t_row[i]};
      visit<Policy, kHard>(sums, z, t, scale, smoothing > Real(0));
    }
    Real maxima[2] = {sums.max_s, sums.max_t};
    reduce<Max, kThreads>(maxima, shared);
    sums = math::rebase<Policy, kHard>(sums, maxima[0], maxima[1], scale, Exp2Nonpositive());
    Real values[6] = {sums.sum_s, sums.sum_t, sums.term, sums.sum_hard, sums.sum_z, sums.count};
    reduce<Sum, kThreads>(values, shared);
    sums = {maxima[0], maxima[1], values[0], values[1], values[2], values[3], values[4], values[5]};

    math::RowResult<Real> result =
        math::finish_row<Policy, kHard>(sums, inv_classes, temperature, static_cast<Real>(p.alpha),
                                        smoothing, label_z - sums.max_s, weight * factor);
    if (lane == 0) static_cast<Real*>(p.row_loss)[row] = weight * result.loss;
    if (p.gradient == nullptr) continue;

    auto gradient = [&](Real z, Real t, int64_t i) {
      Real shifted = z - sums.max_s;
      Real ex = math::exp2_nonpositive(shifted * scale);
      Real ey = math::exp2_nonpositive((t - sums.max_t) * scale);
      Real g = math::fma(result.of_ey, ey, -result.uniform);
      if (kHard == CrossEntropy::kOwn)
        g = math::fma(result.of_hard, math::exp2_nonpositive(shifted * Real(math::kLog2E)), g);
      g = math::fma(result.of_ex, ex, g);
      return i == label ? g - result.at_label : g;
    };
#pragma unroll 1
    for (int64_t i = lane; i < vectors; i += kThreads) {
      Vector<T, kCount> z = reinterpret_cast<const Vector<T, kCount>*>(z_row)[i];
      Vector<T, kCount> t = reinterpret_cast<const Vector<T, kCount>*>(t_row)[i];
      Vector<T, kCount> g;
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        narrow(gradient(widen(z.value[j]), widen(t.value[j]), i * kCount + j), g.value[j]);
      }
      reinterpret_cast<Vector<T, kCount>*>(g_row)[i] = g;
    }
#pragma unroll 1
    for (int64_t i = vectors * kCount + lane; i < p.classes; i += kThreads) {
      narrow(gradient(widen(z_row[i]), widen(t_row[i]), i), g_row[i]);
    }
  }
}

// One block: the sum of value(row) over all rows, in a fixed order.
template <class Value>
__device__ double block_sum(int64_t rows, Value value) {
  __shared__ double shared[kRowThreads / kWarp];
  double sum[1] = {0};
  for (int64_t row = threadIdx.x; row < rows; row += kRowThreads) sum[0] += value(row);
  reduce<Sum, kRowThreads>(sum, shared);
  return sum[0];
}

// What losses and gradients are multiplied by: 1 / denominator, 0 where that is 0.
template <class Real>
__global__ void inv_denominator_kernel(const DistillationParams p, double* inv_denominator) {
  double sum = block_sum(p.denominator < 0 ? p.rows : 0, [&](int64_t row) {
    if (p.labels != nullptr && p.labels[row] == p.ignore_index) return 0.0;
    return p.weight != nullptr ? static_cast<double>(static_cast<const Real*>(p.weight)[row]) : 1.0;
  });
  if (p.denominator >= 0) sum = p.denominator;
  if (threadIdx.x == 0) *inv_denominator = sum != 0 ? 1 / sum : 0;
}

template <class Real>
__global__ void total_loss_kernel(const DistillationParams p, const double* inv_denominator) {
  double sum = block_sum(p.rows, [&](int64_t row) {
    return static_cast<double>(static_cast<const Real*>(p.row_loss)[row]);
  });
  if (threadIdx.x == 0) *static_cast<Real*>(p.loss) = static_cast<Real>(sum * *inv_denominator);
}

template <class T, CrossEntropy kHard, int kCount>
void launch_rows(const DistillationParams& p, const double* inv_denominator, cudaStream_t stream) {
  if (p.classes <= kWarpRowClasses) {
    int64_t blocks = std::min(kMaxBlocks, (p.rows + kRowsPerBlock - 1) / kRowsPerBlock);
    rows_kernel<T, ForwardKL, kHard, kCount, kWarp, kRowsPerBlock>
        <<<static_cast<unsigned>(blocks), dim3(kWarp, kRowsPerBlock), 0, stream>>>(
            p, math::kLog2E / p.temperature, inv_denominator);
  } else {
    int64_t blocks = std::min(kMaxBlocks, p.rows);
    rows_kernel<T, ForwardKL, kHard, kCount, kRowThreads, 1>
        <<<static_cast<unsigned>(blocks), kRowThreads, 0, stream>>>(p, math::kLog2E / p.temperature,
                                                                    inv_denominator);
  }
}

template <class T, int kCount>
void launch_hard(const DistillationParams& p, const double* inv_denominator, cudaStream_t stream) {
  if (p.labels == nullptr || p.alpha == 1) {
    launch_rows<T, CrossEntropy::kNone, kCount>(p, inv_denominator, stream);
  } else if (p.temperature == 1) {
    launch_rows<T, CrossEntropy::kShared, kCount>(p, inv_denominator, stream);
  } else {
    launch_rows<T, CrossEntropy::kOwn, kCount>(p, inv_denominator, stream);
  }
}

template <class T>
cudaError_t launch(const DistillationParams& p, double* inv_denominator, cudaStream_t stream) {
  using Real = typename Compute<T>::type;
  constexpr int kCount = 16 / sizeof(T);
  inv_denominator_kernel<Real><<<1, kRowThreads, 0, stream>>>(p, inv_denominator);
  bool vectors = aligned<T>(p.student, p.student_stride, kCount) &&
                 aligned<T>(p.teacher, p.teacher_stride, kCount) &&
                 (p.gradient == nullptr || aligned<T>(p.gradient, p.gradient_stride, kCount));
  if (p.rows > 0 && vectors) launch_hard<T, kCount>(p, inv_denominator, stream);
  if (p.rows > 0 && !vectors) launch_hard<T, 1>(p, inv_denominator, stream);
  if (p.loss != nullptr) total_loss_kernel<Real><<<1, kRowThreads, 0, stream>>>(p, inv_denominator);
  return cudaGetLastError();
}

template <class T>
__global__ void scale_kernel(const ScaleParams p) {
  using Real = typename Compute<T>::type;
  for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
    Real factor = static_cast<const Real*>(p.factor)[p.per_row ? row : 0];
    if (factor == Real(1)) continue;
    T* data = static_cast<T*>(p.data) + row * p.stride;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < p.classes;
         i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
      narrow(static_cast<Real>(widen(data[i])) * factor, data[i]);
    }
  }
}

template <class T>
cudaError_t launch_scale(const ScaleParams& p, cudaStream_t stream) {
  constexpr int kThreads = 256;
  if (p.rows == 0) return cudaSuccess;
  unsigned columns =
      static_cast<unsigned>(std::min<int64_t>(64, (p.classes + kThreads - 1) / kThreads));
  unsigned rows = static_cast<unsigned>(std::min<int64_t>(32768, p.rows));
  scale_kernel<T><<<dim3(columns, rows), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

cudaError_t distillation(const DistillationParams& p, double* inv_denominator,
                         cudaStream_t stream) {
  switch (p.dtype) {
    case Dtype::kFloat32: return launch<float>(p, inv_denominator, stream);
    case Dtype::kFloat64: return launch<double>(p, inv_denominator, stream);
    case Dtype::kBFloat16: return launch<__nv_bfloat16>(p, inv_denominator, stream);
    case Dtype::kFloat16: return launch<__half>(p, inv_denominator, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t scale_rows(const ScaleParams& p, cudaStream_t stream) {
  switch (p.dtype) {
    case Dtype::kFloat32: return launch_scale<float>(p, stream);
    case Dtype::kFloat64: return launch_scale<double>(p, stream);
    case Dtype::kBFloat16: return launch_scale<__nv_bfloat16>(p, stream);
    case Dtype::kFloat16: return launch_scale<__half>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace cuda
}  // namespace kdkernels
