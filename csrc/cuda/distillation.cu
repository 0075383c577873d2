// The distillation loss and its gradient. Four walks of a row, which cuda/plan.h chooses from; what they
// compute on the way stands in math/distillation.h.
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
using math::RowResult;
using math::RowSums;

struct Exp2Nonpositive {
  template <class Real>
  __device__ __forceinline__ Real operator()(Real x) const {
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

// What a launch computes, the same for all its rows, so that every branch on it is uniform: one kernel for
// all options. The host rounds the scalars.
template <class Real>
struct Task {
  CrossEntropy hard;
  bool smooth;
  Real scale, temperature, alpha, smoothing, inv_classes;
  double inv_denominator;
  const double* device_inv_denominator;  // instead of it, or null
  double* partial;  // one sum of losses a block or cluster, or null

  __device__ Real factor(const DistillationParams& p) const {
    double inverse = device_inv_denominator != nullptr ? *device_inv_denominator : inv_denominator;
    return static_cast<Real>(inverse * p.gradient_scale);
  }
};

template <class Real>
struct Row {
  int64_t label;
  Real weight;
  bool ignored, invalid;

  __device__ __forceinline__ bool skipped() const { return ignored || invalid; }
  // The row's share of the loss, noted where the caller wants rows.
  __device__ __forceinline__ double emit(const DistillationParams& p, int64_t row,
                                         Real loss) const {
    loss = ignored ? Real(0) : invalid ? static_cast<Real>(nan("")) : weight * loss;
    if (p.row_loss != nullptr) static_cast<Real*>(p.row_loss)[row] = loss;
    return loss;
  }
};

template <class Real>
__device__ __forceinline__ Row<Real> read_row(const DistillationParams& p, int64_t row) {
  int64_t label = p.labels != nullptr ? p.labels[row] : -1;
  Real weight = p.weight != nullptr ? static_cast<const Real*>(p.weight)[row] : Real(1);
  return {label, weight, weight == Real(0) || (p.labels != nullptr && label == p.ignore_index),
          p.labels != nullptr && (label < 0 || label >= p.classes)};
}

// What an H100 allows an element while memory moves it at 3.35 TB/s, 14.5 bytes a clock and SM (1.75 GHz): at
// 6 bytes (16 bits: two reads, one write) 6.6 special functions and 53 lane instructions, twice that at 12.

// ---- rows in registers --------------------------------------------------------------------------

// visit(k) for the elements of the first `chunks` of kChunks chunks of kChunk, then for kEdge more; k is
// known to the compiler, as registers need.
template <int kChunks, int kChunk, int kEdge, class Visit>
__device__ __forceinline__ void visit_chunks(int chunks, Visit visit) {
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    if (c < chunks) {
#pragma unroll
      for (int j = 0; j < kChunk; ++j) visit(c * kChunk + j);
    }
  }
#pragma unroll
  for (int j = 0; j < kEdge; ++j) visit(kChunks * kChunk + j);
}

template <class Real>
struct Solved : RowResult<Real> {
  Real max_s, max_t;
};

// One row in the registers of `lanes` neighbouring lanes: z and t come as logits, -inf where a lane has no
// element, and z goes as the gradient but for the label's own share, result.at_label. An element's
// exponentials are computed once; cross-entropy's own and, beside it, the student's twice. kChunks chunks of
// kChunk elements, of which the first `chunks` are in use, then kEdge elements; valid(k) tells elements from
// padding.
template <class Policy, int kChunks, int kChunk, int kEdge, class Real, class Valid>
__device__ __forceinline__ Solved<Real> solve(const Task<Real>& task, Real label_z, Real factor,
                                              bool want_gradient, int chunks, int lanes,
                                              Real (&z)[kChunks * kChunk + kEdge],
                                              Real (&t)[kChunks * kChunk + kEdge], Valid valid) {
  auto each = [&](auto visit) { visit_chunks<kChunks, kChunk, kEdge>(chunks, visit); };
  const bool own = task.hard == CrossEntropy::kOwn;
  Real maxima[2] = {Lowest<Real>::value, Lowest<Real>::value};
  each([&](int k) {
    maxima[0] = Max::apply(z[k], maxima[0]);
    maxima[1] = Max::apply(t[k], maxima[1]);
  });
  reduce_lanes<Max>(maxima, lanes);

  Real sums[3] = {0, 0, 0}, hard_sums[2] = {0, 0};
  if (task.smooth) {
    each([&](int k) { hard_sums[1] += valid(k) ? z[k] - maxima[0] : Real(0); });
  }
  if (own) {
    each([&](int k) {
      z[k] -= maxima[0];
      hard_sums[0] += math::exp2_nonpositive(z[k] * Real(math::kLog2E));
    });
  }
  if (own || task.smooth) reduce_lanes<Sum>(hard_sums, lanes);
  auto sum = [&](int k, Real shifted) {
    Real x = shifted * task.scale, y = (t[k] - maxima[1]) * task.scale;
    Real ex = math::exp2_nonpositive(x), ey = math::exp2_nonpositive(y);
    sums[0] += ex;
    sums[1] += ey;
    sums[2] += Policy::term(x, y, ex, ey);
    t[k] = ey;
    return ex;
  };
  if (own) {
    each([&](int k) { sum(k, z[k]); });
  } else {
    each([&](int k) { z[k] = sum(k, z[k] - maxima[0]); });
  }
  reduce_lanes<Sum>(sums, lanes);

  RowSums<Real> row = {maxima[0], maxima[1],    sums[0],      sums[1],
                       sums[2],   hard_sums[0], hard_sums[1], Real(0)};
  Solved<Real> result = {
      math::finish_row<Policy>(task.hard, row, task.inv_classes, task.temperature, task.alpha,
                               task.smoothing, label_z - maxima[0], factor),
      maxima[0], maxima[1]};
  if (!want_gradient) return result;
  if (own) {
    each([&](int k) {
      Real ex = math::exp2_nonpositive(z[k] * task.scale);
      Real eh = math::exp2_nonpositive(z[k] * Real(math::kLog2E));
      Real g = math::fma(result.of_hard, eh, -result.uniform);
      z[k] = math::fma(result.of_ex, ex, math::fma(result.of_ey, t[k], g));
    });
  } else {
    each([&](int k) {
      z[k] = math::fma(result.of_ex, z[k], math::fma(result.of_ey, t[k], -result.uniform));
    });
  }
  return result;
}

// One partial sum of losses a block, from the threads' own.
__device__ __forceinline__ void emit_partial(double* partial, double total) {
  __shared__ double shared[kTileThreads / kWarp];
  double sum[1] = {total};
  reduce<Sum, kTileThreads>(sum, shared);
  if (threadIdx.x == 0 && partial != nullptr) partial[blockIdx.x] = sum[0];
}
static_assert(kTileThreads == kWarpThreads);

// Blocks an SM that registers must allow.
constexpr int kWarpBlocks = 4;
constexpr int tile_blocks(int element_size) { return element_size == 8 ? 3 : 4; }

// tile. A block copies a run of whole rows to shared memory as one flat image: global accesses are 16 bytes
// whatever the rows' own alignment, and a row's few lanes find its elements anywhere. The gradient goes back
// the same way, over the student's image. Bytes 1.00 times the least, 2 special functions an element (5 with
// cross-entropy's own), about 63 instructions at 128 classes and more below, since each lane finishes its
// row: memory binds in fp32, instructions by about a fifth in 16 bits.
template <class T, class Policy>
__global__ void __launch_bounds__(kTileThreads, tile_blocks(sizeof(T)))
    tile_kernel(const __grid_constant__ DistillationParams p,
                const __grid_constant__ Task<typename Compute<T>::type> task, int lanes,
                int tile_rows) {
  using Real = typename Compute<T>::type;
  constexpr int kCount = 16 / sizeof(T), kChunk = 2, kChunks = kTileLaneElements / kChunk;
  __shared__ Vector<T> z_shared[kTileElements / kCount + 1], t_shared[kTileElements / kCount + 1];
  const int classes = static_cast<int>(p.classes), thread = threadIdx.x;
  const int lane = thread & (lanes - 1), group = thread / lanes, groups = kTileThreads / lanes;
  const int chunks = (classes + lanes * kChunk - 1) / (lanes * kChunk);
  const bool want_gradient = p.gradient != nullptr;
  const bool flat = p.student_stride == classes && p.teacher_stride == classes &&
                    (!want_gradient || p.gradient_stride == classes);
  const Real factor = task.factor(p);
  // i / classes is i * reciprocal / 2^20: exact as long as i * classes is at most 2^20.
  const unsigned reciprocal = (1u << 20) / static_cast<unsigned>(classes) + 1;
  static_assert(kTileElements * kTileClasses <= (1 << 20));
  // Rows whose first elements share a bank start at different columns: a power of two of classes would have
  // all lanes in one bank.
  constexpr int kRound = 128 / sizeof(T), kWord = sizeof(T) < 4 ? 4 / sizeof(T) : 1;
  const int common = min(classes & -classes, kRound);
  const int in_warp = group & (kWarp / lanes - 1);
  const int rotation = lane + (in_warp * common / kRound * max(lanes, kWord) & (common - 1));
  const int lane_elements = (classes - lane + lanes - 1) / lanes;
  double total = 0;

  for (int64_t first = static_cast<int64_t>(blockIdx.x) * tile_rows; first < p.rows;
       first += static_cast<int64_t>(gridDim.x) * tile_rows) {
    const int rows = p.rows - first < tile_rows ? static_cast<int>(p.rows - first) : tile_rows;
    const T* z_tile = static_cast<const T*>(p.student) + first * p.student_stride;
    const T* t_tile = static_cast<const T*>(p.teacher) + first * p.teacher_stride;
    T* g_tile = want_gradient ? static_cast<T*>(p.gradient) + first * p.gradient_stride : nullptr;
    const Span<T, int> span(z_tile, t_tile, g_tile, rows * classes);
    const bool vectors = flat && span.vectors;
    const int vector_count = span.body - span.skew;
    const Place<int> edge = edge_place(span, thread & (kEdges - 1));
    const bool has_edge = vectors && thread < kEdges && !edge.empty();
    // The body's vectors keep their alignment.
    const int shift = vectors ? (kCount - span.head) & (kCount - 1) : 0;
    T *z_image = z_shared[0].value + shift, *t_image = t_shared[0].value + shift;

    if (vectors) {
#pragma unroll 4
      for (int v = thread - span.skew; v < vector_count; v += kTileThreads) {
        if (v < 0) continue;
        int i = span.head + v * kCount;
        copy_async(z_image + i, z_tile + i);
        copy_async(t_image + i, t_tile + i);
      }
      commit_copies();
      if (has_edge) {
        z_image[edge.first] = z_tile[edge.first];
        t_image[edge.first] = t_tile[edge.first];
      }
      wait_copies<0>();
    } else {
#pragma unroll 4
      for (int i = thread; i < span.elements; i += kTileThreads) {
        int row = static_cast<int>(static_cast<unsigned>(i) * reciprocal >> 20);
        int column = i - row * classes;
        z_image[i] = z_tile[row * p.student_stride + column];
        t_image[i] = t_tile[row * p.teacher_stride + column];
      }
    }
    __syncthreads();

#pragma unroll 1
    for (int round = 0; round < tile_rows; round += groups) {
      const int in_tile = round + group, start = in_tile * classes;
      const bool live = in_tile < rows;
      Row<Real> row = {-1, Real(0), true, false};
      if (live) row = read_row<Real>(p, first + in_tile);
      const int mine = live ? lane_elements : 0;
      auto valid = [&](int k) { return k < mine; };
      // Less than twice `classes`, so that of it and of what remains after one turn the lesser is right.
      auto column = [&](int k) {
        unsigned turned = static_cast<unsigned>(rotation + k * lanes);
        return static_cast<int>(min(turned, turned - static_cast<unsigned>(classes)));
      };
      Real z[kTileLaneElements], t[kTileLaneElements];
      auto each = [&](auto visit) { visit_chunks<kChunks, kChunk, 0>(chunks, visit); };
      each([&](int k) {
        z[k] = t[k] = -Real(INFINITY);
        if (valid(k)) {
          z[k] = widen(z_image[start + column(k)]);
          t[k] = widen(t_image[start + column(k)]);
        }
      });
      const bool labelled = task.hard != CrossEntropy::kNone && !row.skipped();
      const int label = labelled ? static_cast<int>(row.label) : 0;
      Real label_z = labelled ? widen(z_image[start + label]) : Real(0);
      const Solved<Real> result = solve<Policy, kChunks, kChunk, 0>(
          task, label_z, row.weight * factor, want_gradient, chunks, lanes, z, t, valid);
      if (live && lane == 0) total += row.emit(p, first + in_tile, result.loss);
      if (!want_gradient) continue;
      // The label's element, once more and with its share: no lane looks for it among its own.
      T at_label;
      if (labelled) {
        Real ex = math::exp2_nonpositive((label_z - result.max_s) * task.scale);
        Real ey =
            math::exp2_nonpositive((widen(t_image[start + label]) - result.max_t) * task.scale);
        Real eh = math::exp2_nonpositive((label_z - result.max_s) * Real(math::kLog2E));
        Real g = task.hard == CrossEntropy::kOwn ? math::fma(result.of_hard, eh, -result.uniform)
                                                 : -result.uniform;
        g = math::fma(result.of_ex, ex, math::fma(result.of_ey, ey, g));
        narrow(g - result.at_label, at_label);
      }
      __syncwarp();  // all lanes have read the label's logit
      if (row.skipped()) {
#pragma unroll
        for (int k = 0; k < kTileLaneElements; ++k) z[k] = 0;
      }
      each([&](int k) {
        if (valid(k)) narrow(z[k], z_image[start + column(k)]);
      });
      __syncwarp();
      if (labelled && lane == 0) z_image[start + label] = at_label;
    }
    __syncthreads();

    if (want_gradient && vectors) {
#pragma unroll 4
      for (int v = thread - span.skew; v < vector_count; v += kTileThreads) {
        if (v < 0) continue;
        int i = span.head + v * kCount;
        *reinterpret_cast<Vector<T>*>(g_tile + i) = *reinterpret_cast<Vector<T>*>(z_image + i);
      }
      if (has_edge) g_tile[edge.first] = z_image[edge.first];
    } else if (want_gradient) {
#pragma unroll 4
      for (int i = thread; i < span.elements; i += kTileThreads) {
        int row = static_cast<int>(static_cast<unsigned>(i) * reciprocal >> 20);
        g_tile[row * p.gradient_stride + i - row * classes] = z_image[i];
      }
    }
    __syncthreads();
  }
  emit_partial(task.partial, total);
}

// warp. A warp reads a row into registers, 16 bytes a lane and access; a lane has at most one element of its
// head or tail. Bytes 1.00 times the least, 2 special functions an element (5 with cross-entropy's own),
// about 30 instructions at 1000 classes.
template <class T, class Policy>
__global__ void __launch_bounds__(kWarpThreads, kWarpBlocks)
    warp_kernel(const __grid_constant__ DistillationParams p,
                const __grid_constant__ Task<typename Compute<T>::type> task) {
  using Real = typename Compute<T>::type;
  constexpr int kCount = 16 / sizeof(T), kSlots = kWarpClasses / kWarp / kCount;
  constexpr int kElements = kSlots * kCount;
  const int lane = threadIdx.x % kWarp, classes = static_cast<int>(p.classes);
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kWarpThreads / kWarp);
  const Real factor = task.factor(p);
  double total = 0;

  for (int64_t r = static_cast<int64_t>(blockIdx.x) * (kWarpThreads / kWarp) + threadIdx.x / kWarp;
       r < p.rows; r += warps) {
    const Row<Real> row = read_row<Real>(p, r);
    const T* z_row = static_cast<const T*>(p.student) + r * p.student_stride;
    const T* t_row = static_cast<const T*>(p.teacher) + r * p.teacher_stride;
    T* g_row =
        p.gradient != nullptr ? static_cast<T*>(p.gradient) + r * p.gradient_stride : nullptr;
    Span<T, int> span(z_row, t_row, g_row, classes);
    if (span.body > kSlots * kWarp) {  // no room for the skew
      span.body -= span.skew;
      span.skew = 0;
    }
    const Place<int> edge = edge_place(span, lane);
    const bool has_edge = lane < kEdges && !edge.empty();
    const int slots = (span.body + kWarp - 1) / kWarp;
    auto place = [&](int s) { return body_place(span, 0, span.body, s, lane, kWarp); };

    if (row.skipped()) {
      if (lane == 0) total += row.emit(p, r, Real(0));
      if (g_row == nullptr) continue;
      Vector<T> zero;
#pragma unroll
      for (int j = 0; j < kCount; ++j) narrow(Real(0), zero.value[j]);
#pragma unroll 1
      for (int s = 0; s < slots; ++s) store(g_row, place(s), zero);
      if (has_edge) g_row[edge.first] = zero.value[0];
      continue;
    }
    // Element k of this lane is at first + offset(k): neighbours within a vector, or 32 elements apart.
    const int first = span.vectors ? span.head + (lane - span.skew) * kCount : lane;
    auto valid = [&](int k) {
      if (k == kElements) return has_edge;
      if (!span.vectors) return first + k * kWarp < classes;
      const int item = lane + k / kCount * kWarp;
      return item >= span.skew && item < span.body;
    };
    Real z[kElements + 1], t[kElements + 1];
    z[kElements] = has_edge ? widen(z_row[edge.first]) : -Real(INFINITY);
    t[kElements] = has_edge ? widen(t_row[edge.first]) : -Real(INFINITY);
    if (span.vectors) {
      Vector<T> z_slot[kSlots], t_slot[kSlots];
#pragma unroll
      for (int s = 0; s < kSlots; ++s) {
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          narrow(-INFINITY, z_slot[s].value[j]);
          narrow(-INFINITY, t_slot[s].value[j]);
        }
        if (valid(s * kCount)) {
          z_slot[s] = *reinterpret_cast<const Vector<T>*>(z_row + first + s * kWarp * kCount);
          t_slot[s] = *reinterpret_cast<const Vector<T>*>(t_row + first + s * kWarp * kCount);
        }
      }
#pragma unroll
      for (int s = 0; s < kSlots; ++s) {
        Real z_wide[kCount], t_wide[kCount];
        widen_all(z_slot[s], z_wide);
        widen_all(t_slot[s], t_wide);
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          z[s * kCount + j] = z_wide[j];
          t[s * kCount + j] = t_wide[j];
        }
      }
    } else {
#pragma unroll
      for (int k = 0; k < kElements; ++k) {
        z[k] = t[k] = -Real(INFINITY);
        if (valid(k)) {
          z[k] = widen(z_row[first + k * kWarp]);
          t[k] = widen(t_row[first + k * kWarp]);
        }
      }
    }
    Real label_z = task.hard != CrossEntropy::kNone ? widen(z_row[row.label]) : Real(0);
    const Solved<Real> result = solve<Policy, kSlots, kCount, 1>(
        task, label_z, row.weight * factor, g_row != nullptr, slots, kWarp, z, t, valid);
    if (lane == 0) total += row.emit(p, r, result.loss);
    if (g_row == nullptr) continue;
    // In place: the label's logit is read before any lane writes.
    __syncwarp();
    const int label = static_cast<int>(row.label);
    if (has_edge)
      narrow(z[kElements] - (edge.first == label ? result.at_label : Real(0)), g_row[edge.first]);
    if (span.vectors) {
#pragma unroll
      for (int s = 0; s < kSlots; ++s) {
        if (!valid(s * kCount)) continue;
        int at = first + s * kWarp * kCount;
        Vector<T> g;
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          Real own = at + j == label ? result.at_label : Real(0);
          narrow(z[s * kCount + j] - own, g.value[j]);
        }
        *reinterpret_cast<Vector<T>*>(g_row + at) = g;
      }
    } else {
#pragma unroll
      for (int k = 0; k < kElements; ++k) {
        int at = first + k * kWarp;
        if (valid(k)) narrow(z[k] - (at == label ? result.at_label : Real(0)), g_row[at]);
      }
    }
  }
  emit_partial(task.partial, total);
}

// ---- rows in shared memory, or read twice -------------------------------------------------------

// Adds a vector's elements, none above the sums' maxima, to a thread's sums. kKeep: z and t go as their
// exponentials, h as cross-entropy's own.
template <class Policy, bool kKeep, class T, class Real>
__device__ __forceinline__ void add(const Task<Real>& task, RowSums<Real>& sums, Vector<T>& z,
                                    Vector<T>& t, Vector<T>& h) {
  constexpr int kCount = 16 / sizeof(T);
  Real shifted[kCount];
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    shifted[j] = widen(z.value[j]) - sums.max_s;
    Real x = shifted[j] * task.scale, y = (widen(t.value[j]) - sums.max_t) * task.scale;
    Real ex = math::exp2_nonpositive(x), ey = math::exp2_nonpositive(y);
    sums.sum_s += ex;
    sums.sum_t += ey;
    sums.term += Policy::term(x, y, ex, ey);
    if constexpr (kKeep) {
      z.value[j] = ex;
      t.value[j] = ey;
    }
  }
  if (task.hard == CrossEntropy::kOwn) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      Real eh = math::exp2_nonpositive(shifted[j] * Real(math::kLog2E));
      sums.sum_hard += eh;
      if constexpr (kKeep) h.value[j] = eh;
    }
  }
}

// Of the elements that a place has, what label smoothing adds up.
template <class T, class Index, class Real>
__device__ __forceinline__ void add_smooth(RowSums<Real>& sums, const Vector<T>& z,
                                           const Place<Index>& place) {
#pragma unroll
  for (int j = 0; j < static_cast<int>(16 / sizeof(T)); ++j) {
    if (place.holds(j)) {
      sums.sum_z += widen(z.value[j]) - sums.max_s;
      sums.count += Real(1);
    }
  }
}

// (v - max) * scale as one fma: v * scale - base. `error`, what rounding the base lost, is the same for all
// elements, so that one factor makes their exponentials exact.
struct Shift {
  float scale, base, error;
  __device__ __forceinline__ Shift(float max, float scale) : scale(scale), base(max * scale) {
    error = math::fma(max, scale, -base);
  }
  __device__ __forceinline__ float operator()(float v) const { return math::fma(v, scale, -base); }
  // Of |error| <= 2^-9 the third power is nothing. Not so beyond, or of no maximum.
  __device__ __forceinline__ bool small() const { return fabsf(base) <= 65536.0f; }
  // 2^-error
  __device__ __forceinline__ float factor() const {
    constexpr double square = math::kLn2 * math::kLn2 / 2;
    return math::fma(error, math::fma(error, float(square), -float(math::kLn2)), 1.0f);
  }
};
struct Shifts {
  Shift s, t, hard;
  __device__ __forceinline__ Shifts(const Task<float>& task, float max_s, float max_t)
      : s(max_s, task.scale), t(max_t, task.scale), hard(max_s, float(math::kLog2E)) {}
  __device__ __forceinline__ bool small() const { return s.small() && t.small() && hard.small(); }
};

// add() in fewer instructions, for sums whose exponents still lack the shifts' errors; terms are unguarded:
// NaN where the guard would have made a difference.
template <class Policy, class T>
__device__ __forceinline__ void add_shifted(const Task<float>& task, RowSums<float>& sums,
                                            const Shifts& shifts, const Vector<T>& z,
                                            const Vector<T>& t) {
  constexpr int kCount = 16 / sizeof(T);
  float zs[kCount], ts[kCount];
  widen_all(z, zs);
  widen_all(t, ts);
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    float x = shifts.s(zs[j]), y = shifts.t(ts[j]);
    float ex = math::exp2_nonpositive(x), ey = math::exp2_nonpositive(y);
    sums.sum_s += ex;
    sums.sum_t += ey;
    sums.term = Policy::add_unguarded(sums.term, x, y, ex, ey);
  }
  if (task.hard == CrossEntropy::kOwn) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) sums.sum_hard += math::exp2_nonpositive(shifts.hard(zs[j]));
  }
}

// Adds to `sums` a part that add_shifted made relative to the same maxima.
template <class Policy>
__device__ __forceinline__ void add_part(RowSums<float>& sums, const RowSums<float>& part,
                                         const Shifts& shifts) {
  float of_s = shifts.s.factor(), of_t = shifts.t.factor();
  sums.sum_s = math::fma(of_s, part.sum_s, sums.sum_s);
  sums.sum_t = math::fma(of_t, part.sum_t, sums.sum_t);
  sums.term += Policy::moved(part, shifts.s.error, shifts.t.error, of_s, of_t);
  sums.sum_hard = math::fma(shifts.hard.factor(), part.sum_hard, sums.sum_hard);
}

// The largest of many vectors' elements; 16-bit ones two at a time.
template <class T>
struct Largest {
  T value = Lowest<T>::value;
  __device__ __forceinline__ void add(const Vector<T>& x) {
#pragma unroll
    for (int j = 0; j < static_cast<int>(16 / sizeof(T)); ++j)
      value = Max::apply(x.value[j], value);
  }
  __device__ __forceinline__ T result() const { return value; }
};
template <class T, class Pair>
struct LargestPair {
  Pair value;
  __device__ __forceinline__ LargestPair() {
    narrow(-INFINITY, value.x);
    narrow(-INFINITY, value.y);
  }
  __device__ __forceinline__ void add(const Vector<T>& x) {
    Pair pairs[4];
    memcpy(pairs, &x, sizeof pairs);
#pragma unroll
    for (int i = 0; i < 4; ++i) value = __hmax2(value, pairs[i]);
  }
  __device__ __forceinline__ float result() const {
    return Max::apply(Max::apply(widen(value.x), widen(value.y)), Lowest<float>::value);
  }
};
template <>
struct Largest<__nv_bfloat16> : LargestPair<__nv_bfloat16, __nv_bfloat162> {};
template <>
struct Largest<__half> : LargestPair<__half, __half2> {};

template <class Policy, class Real>
__device__ __forceinline__ void rebase(const Task<Real>& task, RowSums<Real>& sums, Real max_s,
                                       Real max_t) {
  if (max_s > sums.max_s || max_t > sums.max_t) {
    sums = math::rebase<Policy>(task.hard, sums, max_s, max_t, task.scale, Exp2Nonpositive());
  }
}

// The sums of the parts of each `lanes` neighbouring lanes, in every one of them.
template <class Policy, class Real>
__device__ __forceinline__ RowSums<Real> merge_lanes(const Task<Real>& task,
                                                     const RowSums<Real>& part, int lanes) {
  Real maxima[2] = {part.max_s, part.max_t};
  reduce_lanes<Max>(maxima, lanes);
  RowSums<Real> row =
      math::rebase<Policy>(task.hard, part, maxima[0], maxima[1], task.scale, Exp2Nonpositive());
  Real sums[3] = {row.sum_s, row.sum_t, row.term}, hard[1] = {row.sum_hard};
  Real smooth[2] = {row.sum_z, row.count};
  reduce_lanes<Sum>(sums, lanes);
  if (task.hard == CrossEntropy::kOwn) reduce_lanes<Sum>(hard, lanes);
  if (task.smooth) reduce_lanes<Sum>(smooth, lanes);
  return {maxima[0], maxima[1], sums[0], sums[1], sums[2], hard[0], smooth[0], smooth[1]};
}

// Blocks an SM that registers must allow.
constexpr int row_blocks(bool held, int element_size) {
  int threads = held ? held_max_threads(element_size) : kStreamThreads;
  return (held ? 65536 / held_registers(element_size) : element_size == 8 ? 256 : 768) / threads;
}

constexpr int kHeldWarps = held_max_threads(2) / kWarp;

template <class Real>
struct alignas(16) Part {
  RowSums<Real> sums;
};

// held, kHeld: a block or a cluster a row. A block's slice of the row is copied to shared memory at once,
// in up to 4 groups (2 in fp64); while later groups are on their way the thread adds up the earlier ones. A
// thread reads only what it copied, so no barrier guards the slots; the row's sums take one. fp64 keeps
// exponentials in the slots, relative to the thread's maxima of the group, because computing them again
// would outlast the memory traffic; narrower types compute them again. Bytes 1.00 times the least. 16 bits
// and 32,000 classes: 4.2 special functions an element and 25 instructions in the loops (copy 2, maxima 2,
// sums 11, gradient 10), or 6.2 and 32 with cross-entropy's own exponentials; then what is done once a row.
// stream, else: a block a row, read from global memory in both passes.
template <class T, class Policy, bool kHeld>
__global__ void __launch_bounds__(kHeld ? held_max_threads(sizeof(T)) : kStreamThreads,
                                  row_blocks(kHeld, sizeof(T)))
    row_kernel(const __grid_constant__ DistillationParams p,
               const __grid_constant__ Task<typename Compute<T>::type> task, int cluster,
               int capacity) {
  using Real = typename Compute<T>::type;
  using Index = std::conditional_t<kHeld, int, int64_t>;
  constexpr int kCount = 16 / sizeof(T);
  constexpr bool kKeep = kHeld && sizeof(Real) == 8;
  // Wider types in shared memory have the instructions to spare, and not the registers.
  constexpr bool kShift = sizeof(T) == 2 || (sizeof(T) == 4 && !kHeld);
  constexpr int kGroups = kKeep ? 2 : kHeld ? 4 : 1;
  constexpr int kLeastSlots = 4;  // that pay for what is done once a group
  extern __shared__ uint4 slots_shared[];
  __shared__ Part<Real> parts[2][kHeldWarps];
  // Kept by thread 0; the others read the factor after a row's barrier.
  __shared__ double total;
  __shared__ Real factor;
  const int thread = threadIdx.x, threads = blockDim.x, rank = kHeld ? cluster_rank() : 0;
  const int warps = threads / kWarp, lane = thread % kWarp, log_warps = 31 - __clz(warps);
  Vector<T>* z_slots = reinterpret_cast<Vector<T>*>(slots_shared) + thread;
  Vector<T>* t_slots = z_slots + capacity * threads + kEdges;
  Vector<T>* h_slots = t_slots + capacity * threads + kEdges;
  if (thread == 0) {
    total = 0;
    factor = task.factor(p);
  }
  int turn = 0;
  bool arrived = false;

  const int64_t first = blockIdx.x / cluster, stride = gridDim.x / cluster;
  for (int64_t r = first; r < p.rows; r += stride) {
    const Row<Real> row = read_row<Real>(p, r);
    const T* z_row = static_cast<const T*>(p.student) + r * p.student_stride;
    const T* t_row = static_cast<const T*>(p.teacher) + r * p.teacher_stride;
    T* g_row =
        p.gradient != nullptr ? static_cast<T*>(p.gradient) + r * p.gradient_stride : nullptr;
    const Span<T, Index> span(z_row, t_row, g_row, static_cast<Index>(p.classes));
    Index share = (span.body + cluster - 1) / cluster;
    share += share % 2;  // as in held_plan: whole sectors
    const Index begin = rank * share < span.body ? rank * share : span.body;
    const Index end = begin + share < span.body ? begin + share : span.body;
    // This thread's slots with something in them: `mine` of the body (the first may be the one that is none,
    // and is passed over), then at most one with an element of the row's head or tail.
    const Index own =
        span.vectors ? end - begin : min(end * kCount, span.elements) - begin * kCount;
    const int log_step = 31 - __clz(span.vectors ? threads : threads * kCount);
    const int mine = own > thread ? static_cast<int>((own - thread - 1) >> log_step) + 1 : 0;
    const int skip = !kKeep && span.vectors && begin + thread < span.skew;
    const Place<Index> edge = edge_place(span, thread & (kEdges - 1));
    const int slots = mine + (rank == 0 && thread < kEdges && !edge.empty());
    auto place = [&](int s) {
      return s < mine ? body_place(span, begin, end, s, thread, threads) : edge;
    };
    // Slots up to here are whole vectors, those from `skip` on; where they start.
    const int whole = !kKeep && span.vectors ? mine : 0;
    const Index at_first = span.head + (begin + thread - span.skew) * kCount;
    auto at = [&](int s) { return at_first + static_cast<Index>(s) * (threads * kCount); };

    if (row.skipped()) {
      if (thread == 0 && rank == 0) total += row.emit(p, r, Real(0));
      if (g_row == nullptr) continue;
      Vector<T> zero;
#pragma unroll
      for (int j = 0; j < kCount; ++j) narrow(Real(0), zero.value[j]);
#pragma unroll 1
      for (int s = 0; s < slots; ++s) store(g_row, place(s), zero);
      continue;
    }

    int group_slots = (slots + kGroups - 1) / kGroups;
    if constexpr (kShift) group_slots = max(group_slots, kLeastSlots);
    if constexpr (kHeld) {
#pragma unroll 1
      for (int g = 0; g < kGroups; ++g) {
        const int to = min(slots, (g + 1) * group_slots), to_whole = min(to, whole);
        int s = max(skip, g * group_slots);
#pragma unroll 1
        for (; s < to_whole; ++s) {
          copy_async(z_slots + s * threads, z_row + at(s));
          copy_async(t_slots + s * threads, t_row + at(s));
        }
#pragma unroll 1
        for (; s < to; ++s) {
          auto here = place(s);
          if (kKeep && here.template whole<kCount>()) {
            copy_async(z_slots + s * threads, z_row + here.first);
            copy_async(t_slots + s * threads, t_row + here.first);
          } else {
            z_slots[s * threads] = load(z_row, here);
            t_slots[s * threads] = load(t_row, here);
          }
        }
        commit_copies();
      }
    }
    const Real label_z =
        task.hard != CrossEntropy::kNone ? static_cast<Real>(widen(z_row[row.label])) : Real(0);

    RowSums<Real> sums = {Lowest<Real>::value, Lowest<Real>::value, 0, 0, 0, 0, 0, 0};
    Real group_max_s[kGroups], group_max_t[kGroups];
    if constexpr (kHeld) {
#pragma unroll 1
      for (int g = 0; g < kGroups; ++g) {
        if (g == kGroups - 4) wait_copies<3>();
        if (g == kGroups - 3) wait_copies<2>();
        if (g == kGroups - 2) wait_copies<1>();
        if (g == kGroups - 1) wait_copies<0>();
        const int from = max(skip, g * group_slots), to = min(slots, (g + 1) * group_slots);
        if (kShift && from >= to) continue;
        Largest<T> largest_s, largest_t;
#pragma unroll 2
        for (int s = from; s < to; ++s) {
          Vector<T> z = z_slots[s * threads], t = t_slots[s * threads];
          largest_s.add(z);
          largest_t.add(t);
        }
        const Real max_s = Max::apply(largest_s.result(), sums.max_s);
        const Real max_t = Max::apply(largest_t.result(), sums.max_t);
        rebase<Policy>(task, sums, max_s, max_t);
        if (task.smooth) {
#pragma unroll 1
          for (int s = from; s < to; ++s)
            add_smooth(sums, Vector<T>(z_slots[s * threads]), place(s));
        }
        bool added = false;
        if constexpr (kKeep) {
#pragma unroll
          for (int i = 0; i < kGroups; ++i) {
            group_max_s[i] = i == g ? max_s : group_max_s[i];
            group_max_t[i] = i == g ? max_t : group_max_t[i];
          }
        }
        if constexpr (kShift) {
          const Shifts shifts(task, max_s, max_t);
          if (shifts.small()) {
            RowSums<Real> part = {max_s, max_t, 0, 0, 0, 0, 0, 0};
#pragma unroll 1
            for (int s = from; s < to; ++s) {
              const Vector<T> z = z_slots[s * threads], t = t_slots[s * threads];
              add_shifted<Policy>(task, part, shifts, z, t);
            }
            added = part.term == part.term;
            if (added) add_part<Policy>(sums, part, shifts);
          }
        }
        if (!added) {
#pragma unroll 1
          for (int s = from; s < to; ++s) {
            Vector<T> z = z_slots[s * threads], t = t_slots[s * threads], h;
            add<Policy, kKeep>(task, sums, z, t, h);
            if constexpr (kKeep) {
              z_slots[s * threads] = z;
              t_slots[s * threads] = t;
              if (task.hard == CrossEntropy::kOwn) h_slots[s * threads] = h;
            }
          }
        }
      }
    } else {
#pragma unroll 1
      for (int s = 0; s < slots; ++s) {
        auto here = place(s);
        Vector<T> z = load(z_row, here), t = load(t_row, here), h;
        Largest<T> largest_s, largest_t;
        largest_s.add(z);
        largest_t.add(t);
        rebase<Policy>(task, sums, Max::apply(largest_s.result(), sums.max_s),
                       Max::apply(largest_t.result(), sums.max_t));
        add<Policy, false>(task, sums, z, t, h);
        if (task.smooth) add_smooth(sums, z, here);
      }
    }

    // Every warp merges the parts of all warps of the cluster. Two turns of parts: who writes the next
    // row's has passed that row's barrier after all have read this row's.
    sums = merge_lanes<Policy>(task, sums, kWarp);
    if (lane == 0) parts[turn][thread / kWarp].sums = sums;
    if (cluster > 1) {
      cluster_arrive();
      cluster_wait();
    } else {
      __syncthreads();
    }
    const int count = warps * cluster;  // a power of two
    auto part = [&](int i) {
      const Part<Real>* at = &parts[turn][i & (warps - 1)];
      return cluster > 1 ? read_peer(at, i >> log_warps).sums : at->sums;
    };
    sums = part(lane & (count - 1));
    for (int i = lane + kWarp; i < count; i += kWarp)
      sums = math::merge<Policy>(task.hard, sums, part(i), task.scale, Exp2Nonpositive());
    if (cluster > 1 && r + stride >= p.rows) {
      cluster_arrive();
      arrived = true;
    }
    turn ^= 1;
    sums = merge_lanes<Policy>(task, sums, min(count, kWarp));
    RowResult<Real> result =
        math::finish_row<Policy>(task.hard, sums, task.inv_classes, task.temperature, task.alpha,
                                 task.smoothing, label_z - sums.max_s, row.weight * factor);
    if (thread == 0 && rank == 0) total += row.emit(p, r, result.loss);
    if (g_row == nullptr) continue;

    auto gradient_at = [&](Real z, Real t) {
      Real g = -result.uniform;
      if (task.hard == CrossEntropy::kOwn) {
        Real eh = math::exp2_nonpositive((z - sums.max_s) * Real(math::kLog2E));
        g = math::fma(result.of_hard, eh, g);
      }
      Real ex = math::exp2_nonpositive((z - sums.max_s) * task.scale);
      Real ey = math::exp2_nonpositive((t - sums.max_t) * task.scale);
      return math::fma(result.of_ex, ex, math::fma(result.of_ey, ey, g));
    };
    int done = 0;  // slots whose gradient is written
    if constexpr (kShift) {
      const Shifts shifts(task, sums.max_s, sums.max_t);
      if (shifts.small()) {
        const Real of_ex = result.of_ex * shifts.s.factor();
        const Real of_ey = result.of_ey * shifts.t.factor();
        const Real of_hard = result.of_hard * shifts.hard.factor();
#pragma unroll 1
        for (int s = skip; s < whole; ++s) {
          Vector<T> z, t, out;
          if constexpr (kHeld) {
            z = z_slots[s * threads];
            t = t_slots[s * threads];
          } else {
            z = *reinterpret_cast<const Vector<T>*>(z_row + at(s));
            t = *reinterpret_cast<const Vector<T>*>(t_row + at(s));
          }
          Real zs[kCount], ts[kCount], gradient[kCount];
          widen_all(z, zs);
          widen_all(t, ts);
#pragma unroll
          for (int j = 0; j < kCount; ++j) {
            Real ex = math::exp2_nonpositive(shifts.s(zs[j]));
            Real ey = math::exp2_nonpositive(shifts.t(ts[j]));
            gradient[j] = math::fma(of_ex, ex, math::fma(of_ey, ey, -result.uniform));
          }
          if (task.hard == CrossEntropy::kOwn) {
#pragma unroll
            for (int j = 0; j < kCount; ++j) {
              Real eh = math::exp2_nonpositive(shifts.hard(zs[j]));
              gradient[j] = math::fma(of_hard, eh, gradient[j]);
            }
          }
#pragma unroll
          for (int j = 0; j < kCount; ++j) narrow(gradient[j], out.value[j]);
          *reinterpret_cast<Vector<T>*>(g_row + at(s)) = out;
        }
        done = whole;
      }
    }
#pragma unroll 1
    for (int g = 0; g < kGroups; ++g) {
      // What brings a group's kept exponentials to the row's maxima.
      Real of_ex = result.of_ex, of_ey = result.of_ey, of_hard = result.of_hard;
      if constexpr (kKeep) {
        Real max_s = group_max_s[0], max_t = group_max_t[0];
#pragma unroll
        for (int i = 1; i < kGroups; ++i) {
          max_s = i == g ? group_max_s[i] : max_s;
          max_t = i == g ? group_max_t[i] : max_t;
        }
        of_ex *= math::exp2_nonpositive((max_s - sums.max_s) * task.scale);
        of_ey *= math::exp2_nonpositive((max_t - sums.max_t) * task.scale);
        of_hard *= math::exp2_nonpositive((max_s - sums.max_s) * Real(math::kLog2E));
      }
      const int from = kKeep ? max(skip, g * group_slots) : max(skip, done);
      const int to = kKeep ? min(slots, (g + 1) * group_slots) : slots;
#pragma unroll 1
      for (int s = from; s < to; ++s) {
        auto here = place(s);
        Vector<T> z, t, h, out;
        if constexpr (kHeld) {
          z = z_slots[s * threads];
          t = t_slots[s * threads];
          if (kKeep && task.hard == CrossEntropy::kOwn) h = h_slots[s * threads];
        } else {
          z = load(z_row, here);
          t = load(t_row, here);
        }
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          Real g;
          if constexpr (kKeep) {
            g = task.hard == CrossEntropy::kOwn ? math::fma(of_hard, h.value[j], -result.uniform)
                                                : -result.uniform;
            g = math::fma(of_ex, z.value[j], math::fma(of_ey, t.value[j], g));
          } else {
            g = gradient_at(widen(z.value[j]), widen(t.value[j]));
          }
          narrow(g, out.value[j]);
        }
        if constexpr (kKeep) {
#pragma unroll
          for (int j = 0; j < kCount; ++j) {
            if (here.at(j) == row.label) out.value[j] -= result.at_label;
          }
        }
        store(g_row, here, out);
      }
      if constexpr (!kKeep) break;
    }
    // The label's share: the thread that wrote the label's element writes it again.
    if (!kKeep && task.hard != CrossEntropy::kNone) {
      const Index label = static_cast<Index>(row.label);
      const Index member =
          span.vectors ? (label - span.head) / kCount + span.skew - begin : label - begin * kCount;
      const bool in_body = label >= span.head && member >= 0 && member < own;
      if (in_body ? (member & (threads - 1)) == thread : slots > mine && label == edge.first)
        narrow(gradient_at(label_z, widen(t_row[label])) - result.at_label, g_row[label]);
    }
  }
  if (thread == 0 && rank == 0 && task.partial != nullptr) task.partial[first] = total;
  // A block stays while others of its cluster may read its parts.
  if (cluster > 1) {
    if (!arrived) cluster_arrive();
    cluster_wait();
  }
}

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

// The kept rows' weights: one sum a block, or of a single block the inverse.
template <class Real>
__global__ void __launch_bounds__(kSumThreads)
    weight_kernel(const __grid_constant__ DistillationParams p, double* out) {
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
  double sum = block_sum(threadIdx.x, count, kSumThreads, [&](int64_t i) { return partial[i]; });
  double factor = device_inv_denominator != nullptr ? *device_inv_denominator : inv_denominator;
  if (threadIdx.x == 0) *loss = static_cast<Real>(sum * factor);
}

// ---- launches -----------------------------------------------------------------------------------

CrossEntropy cross_entropy(const DistillationParams& p) {
  if (p.labels == nullptr || p.alpha == 1) return CrossEntropy::kNone;
  return p.temperature == 1 ? CrossEntropy::kShared : CrossEntropy::kOwn;
}

template <class... Parameters, class... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), int64_t blocks,
                          const DistillationPlan& plan, cudaStream_t stream,
                          Arguments... arguments) {
  if (plan.shared > 48 * 1024) {
    cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(plan.cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks * plan.cluster));
  config.blockDim = dim3(static_cast<unsigned>(plan.threads));
  config.dynamicSmemBytes = static_cast<size_t>(plan.shared);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = plan.cluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

template <class T, class Policy>
cudaError_t launch_rows(const DistillationParams& p, const Task<typename Compute<T>::type>& task,
                        const DistillationPlan& plan, cudaStream_t stream) {
  int64_t blocks = plan.partials(p.rows);
  switch (plan.walk) {
    case Walk::kTile:
      return launch_kernel(tile_kernel<T, Policy>, blocks, plan, stream, p, task, plan.lanes,
                           plan.rows);
    case Walk::kWarp:
      if constexpr (sizeof(T) < 8)
        return launch_kernel(warp_kernel<T, Policy>, blocks, plan, stream, p, task);
      break;
    case Walk::kHeld:
      return launch_kernel(row_kernel<T, Policy, true>, blocks, plan, stream, p, task, plan.cluster,
                           plan.slots);
    case Walk::kStream:
      return launch_kernel(row_kernel<T, Policy, false>, blocks, plan, stream, p, task, 1, 0);
  }
  return cudaErrorInvalidValue;
}

template <class T>
cudaError_t launch(const DistillationParams& p, cudaStream_t stream) {
  using Real = typename Compute<T>::type;
  Device device;
  cudaError_t error =
      device_of(reinterpret_cast<const void*>(row_kernel<T, ForwardKL, true>), device);
  if (error != cudaSuccess) return error;
  CrossEntropy hard = cross_entropy(p);
  DistillationPlan plan =
      plan_distillation(p.classes, sizeof(T), hard == CrossEntropy::kOwn, device);

  // The workspace: the inverse denominator, sums of weights, partial losses.
  double *inverse = p.workspace, *weights = inverse + 1, *partial = weights + kMaxSumBlocks;
  bool ask = p.denominator < 0;
  if (ask) {
    int64_t blocks = std::min(kMaxSumBlocks, (p.rows + kRowsPerSumBlock - 1) / kRowsPerSumBlock);
    blocks = std::max<int64_t>(blocks, 1);
    weight_kernel<Real><<<static_cast<unsigned>(blocks), kSumThreads, 0, stream>>>(
        p, blocks == 1 ? inverse : weights);
    if (blocks > 1) inverse_kernel<<<1, kSumThreads, 0, stream>>>(weights, blocks, inverse);
  }
  Task<Real> task = {hard,
                     hard != CrossEntropy::kNone && p.label_smoothing > 0,
                     static_cast<Real>(math::kLog2E / p.temperature),
                     static_cast<Real>(p.temperature),
                     static_cast<Real>(p.alpha),
                     static_cast<Real>(p.label_smoothing),
                     static_cast<Real>(1.0 / static_cast<double>(p.classes)),
                     p.denominator > 0 ? 1 / p.denominator : 0,
                     ask ? inverse : nullptr,
                     p.loss != nullptr ? partial : nullptr};
  if (p.rows > 0) error = launch_rows<T, ForwardKL>(p, task, plan, stream);
  if (error != cudaSuccess) return error;
  if (p.loss != nullptr) {
    loss_kernel<Real>
        <<<1, kSumThreads, 0, stream>>>(partial, plan.partials(p.rows), task.inv_denominator,
                                        task.device_inv_denominator, static_cast<Real*>(p.loss));
  }
  return cudaGetLastError();
}

// Multiplies rows by a factor that is on the device; a block looks at the factor before any data.
template <class T>
__global__ void __launch_bounds__(256) scale_kernel(const __grid_constant__ ScaleParams p) {
  using Real = typename Compute<T>::type;
  constexpr int kCount = 16 / sizeof(T);
  for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
    Real factor = static_cast<const Real*>(p.factor)[p.per_row ? row : 0];
    if (factor == Real(1)) continue;
    T* data = static_cast<T*>(p.data) + row * p.stride;
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
  if (!p.per_row && p.stride == p.classes) {
    flat.classes = flat.stride = p.rows * p.classes;
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

int64_t distillation_workspace(int64_t rows) {
  return 1 + kMaxSumBlocks + std::min(rows, kMaxPartials);
}

cudaError_t distillation(const DistillationParams& p, cudaStream_t stream) {
  switch (p.dtype) {
    case Dtype::kFloat32: return launch<float>(p, stream);
    case Dtype::kFloat64: return launch<double>(p, stream);
    case Dtype::kBFloat16: return launch<__nv_bfloat16>(p, stream);
    case Dtype::kFloat16: return launch<__half>(p, stream);
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
