// Rows that registers hold: the walks tile and warp of cuda/plan.h.
#pragma once

#include "cuda/row.cuh"

namespace kdkernels {
namespace cuda {
namespace {

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

template <class T, class Policy, Extra kExtra>
using Sweep = std::conditional_t<math::kThirdSweep<Policy>, TermSweeps<T, kExtra>,
                                 SecondSweep<T, Policy, kExtra>>;
template <class T, class Policy, Extra kExtra>
struct Solved {
  Sweep<T, Policy, kExtra> sweep;
  typename Compute<T>::type loss;
};

// One row in the registers of `lanes` neighbouring lanes: z and t come as logits, -inf where a lane has no
// element, and z goes as the gradient but for the label's own share, at_label. kChunks chunks of kChunk elements,
// of which the first `chunks` are in use, then kEdge elements; valid(k) tells elements from padding, column(k) is an
// element's class. at: the row.
template <class T, class Policy, Extra kExtra, int kChunks, int kChunk, int kEdge, class Real,
          class Valid, class Column>
__device__ __forceinline__ Solved<T, Policy, kExtra> solve(
    const LossParams& p, const Task<Real>& task, int64_t at, const Row<Real>& state, Real label_z,
    Real factor, int chunks, int lanes, Real (&z)[kChunks * kChunk + kEdge],
    Real (&t)[kChunks * kChunk + kEdge], Valid valid, Column column) {
  auto each = [&](auto visit) { visit_chunks<kChunks, kChunk, kEdge>(chunks, visit); };
  if constexpr (kExtra == Extra::kTransforms) {
    each([&](int k) {
      z[k] = task.template student<kExtra>(z[k]);
      t[k] = task.template teacher<kExtra>(t[k]);
    });
  }
  auto back = [&](Real of_z, Real gradient) { return task.template back<kExtra>(of_z, gradient); };
  const bool own = task.hard == CrossEntropy::kOwn;
  Real maxima[2] = {Lowest<Real>::value, Lowest<Real>::value};
  each([&](int k) {
    maxima[0] = Max::apply(z[k], maxima[0]);
    maxima[1] = Max::apply(t[k], maxima[1]);
  });
  reduce_lanes<Max>(maxima, lanes);

  constexpr int kSums = Policy::kCross ? 3 : 2;
  Real sums[kSums] = {}, hard_sums[2] = {0, 0};
  if (task.smooth) {
    each([&](int k) { hard_sums[1] += valid(k) ? z[k] - maxima[0] : Real(0); });
  }
  if (own) {
    each([&](int k) {
      hard_sums[0] += math::exp2_nonpositive((z[k] - maxima[0]) * Real(math::kLog2E));
    });
  }
  if (own || task.smooth) reduce_lanes<Sum>(hard_sums, lanes);
  each([&](int k) {
    Real x = (z[k] - maxima[0]) * task.scale, y = (t[k] - maxima[1]) * task.scale;
    Real ex = math::exp2_nonpositive(x);
    sums[0] += ex;
    sums[1] += math::exp2_nonpositive(y);
    if constexpr (Policy::kCross) sums[2] += math::times(ex, x - y);
  });
  reduce_lanes<Sum>(sums, lanes);

  const RowSums<Real> row = {
      maxima[0],    maxima[1],    sums[0], sums[1], Policy::kCross ? sums[kSums - 1] : Real(0),
      hard_sums[0], hard_sums[1], Real(0)};
  Solved<T, Policy, kExtra> out = {Sweep<T, Policy, kExtra>(task, row, label_z, factor), Real(0)};
  [[maybe_unused]] const bool wants_statistics =
      kExtra != Extra::kNothing && p.statistics != nullptr;
  FirstClasses<Real> first;
  if (wants_statistics) {
    each([&](int k) {
      if (valid(k)) first.compare(row, z[k], t[k], Real(column(k)));
    });
    Real classes[2] = {first.s, first.t};
    reduce_lanes<Max>(classes, lanes);
    first = {classes[0], classes[1]};
  }
  StatisticSums<Real> statistics;
  Real terms[math::kThirdSweep<Policy> ? 2 : 1] = {};
  if constexpr (math::kThirdSweep<Policy>) {
    if (math::needs_exact_sums(p.divergence)) {
      Real excess[1] = {0};
      each([&](int k) {
        const auto x = out.sweep.element(task, z[k], t[k]);
        excess[0] += math::difference(x.q, x.p, -x.d);
      });
      reduce_lanes<Sum>(excess, lanes);
      out.sweep.refine(excess[0]);
    }
    math::with_policy(p, [&](auto policy) {
      using Terms = decltype(policy);
      if constexpr (!math::kTwoSweeps<Terms>) {
        each([&](int k) {
          const auto element = out.sweep.element(task, z[k], t[k]);
          const math::ClassShare<Real> x = Terms::share(element, task.parameters);
          terms[0] += x.f;
          terms[1] += x.a;
          if (wants_statistics) statistics.add(element);
          if constexpr (math::kHasSlope<Terms>) t[k] = x.slope;
        });
        reduce_lanes<Sum>(terms, lanes);
        out.sweep.of_q = -out.sweep.other * terms[1];
        each([&](int k) {
          if constexpr (math::kHasSlope<Terms>) {
            z[k] = back(z[k], out.sweep.gradient_of_slope(task, z[k], t[k]));
          } else {
            z[k] = back(z[k], out.sweep.template gradient<Terms>(task, z[k], t[k]));
          }
        });
      }
    });
  } else {
    each([&](int k) {
      const Exponents<Real> of = out.sweep.exponents(task, z[k], t[k]);
      const TermAndGradient<Real> x = out.sweep.element(task, z[k], t[k], of);
      if (wants_statistics) statistics.add(of);
      terms[0] += x.term;
      z[k] = back(z[k], x.gradient);
    });
    reduce_lanes<Sum>(terms, lanes);
  }
  terms[0] = terms[0] < Real(0) ? Real(0) : terms[0];  // of rounded terms
  out.loss = math::fma(out.sweep.of_term, terms[0], out.sweep.loss);
  if (wants_statistics) {
    Real self[2] = {statistics.self_s, statistics.self_t};
    reduce_lanes<Sum>(self, lanes);
    const bool writes = (threadIdx.x & (lanes - 1)) == 0 && at < p.rows;
    if (writes && state.skipped()) {
      blank_statistics(p, state, at);
    } else if (writes) {
      write_statistics<Policy, Real>(p, task, at, row, {self[0], self[1]}, first, terms[0]);
    }
  }
  return out;
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
constexpr int tile_blocks(int element_size, bool extra) {
  return element_size == 8 ? 2 : extra ? 3 : 4;
}

// tile. A block copies a run of whole rows to shared memory as one flat image: global accesses are 16 bytes
// whatever the rows' own alignment, and a row's few lanes find its elements anywhere. The gradient goes back
// the same way, over the student's image. Bytes 1.00 times the least, 4 special functions an element (6 with
// cross-entropy's own); each lane finishes its row.
template <class T, class Policy, Extra kExtra>
__global__ void __launch_bounds__(kTileThreads, tile_blocks(sizeof(T), kExtra != Extra::kNothing))
    tile_kernel(const __grid_constant__ LossParams p,
                const __grid_constant__ Task<typename Compute<T>::type> task, int lanes,
                int tile_rows) {
  using Real = typename Compute<T>::type;
  constexpr int kCount = 16 / sizeof(T), kChunk = 2, kChunks = kTileLaneElements / kChunk;
  __shared__ Vector<T> z_shared[kTileElements / kCount + 1], t_shared[kTileElements / kCount + 1];
  const int classes = static_cast<int>(p.classes), thread = threadIdx.x;
  const int lane = thread & (lanes - 1), group = thread / lanes, groups = kTileThreads / lanes;
  const int chunks = (classes + lanes * kChunk - 1) / (lanes * kChunk);
  const bool want_gradient = p.gradient != nullptr;
  wait_for_launch_before();
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
    const T* z_tile = row_at<T>(p.student, p.student_rows, first);
    const T* t_tile = row_at<T>(p.teacher_data[0], p.teacher_rows[0], first);
    T* g_tile = want_gradient ? row_at<T>(p.gradient, p.gradient_rows, first) : nullptr;
    const int64_t flat_elements = static_cast<int64_t>(rows - 1) * classes;
    auto flat = [&](const RowStrides& strides) {
      // Sequences that come length first fill the same memory in another order.
      return strides.inner == classes &&
             offset_of(strides, first + rows - 1) - offset_of(strides, first) == flat_elements;
    };
    const Span<T, int> span(z_tile, t_tile, g_tile, rows * classes);
    const bool vectors = span.vectors && flat(p.student_rows) && flat(p.teacher_rows[0]) &&
                         (!want_gradient || flat(p.gradient_rows));
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
        z_image[i] = row_at<T>(p.student, p.student_rows, first + row)[column];
        t_image[i] = row_at<T>(p.teacher_data[0], p.teacher_rows[0], first + row)[column];
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
      // Of a row that is not there, the row behind the last.
      const int64_t at = live ? first + in_tile : p.rows;
      const Real label_z =
          labelled ? task.template student<kExtra>(widen(z_image[start + label])) : Real(0);
      const Solved<T, Policy, kExtra> solved = solve<T, Policy, kExtra, kChunks, kChunk, 0>(
          p, task, at, row, label_z, row.weight * factor, chunks, lanes, z, t, valid, column);
      if (live && lane == 0) total += row.emit(p, first + in_tile, solved.loss);
      if (!want_gradient) continue;
      // The label's element, once more and with its share: no lane looks for it among its own.
      T at_label;
      if (labelled) {
        const Real label_t = task.template teacher<kExtra>(widen(t_image[start + label]));
        Real gradient;
        if constexpr (math::kThirdSweep<Policy>) {
          gradient = solved.sweep.gradient_of(p, task, label_z, label_t);
        } else {
          gradient = solved.sweep.element(task, label_z, label_t).gradient;
        }
        narrow(task.template back<kExtra>(label_z, gradient - solved.sweep.at_label), at_label);
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
        row_at<T>(p.gradient, p.gradient_rows, first + row)[i - row * classes] = z_image[i];
      }
    }
    __syncthreads();
  }
  emit_partial(task.partial, total);
}

// warp. A warp reads a row into registers, 16 bytes per lane and access; a lane has at most one element of its
// head or tail. Bytes 1.00 times the least, 4 special functions an element (6 with cross-entropy's own).
template <class T, class Policy, Extra kExtra>
__global__ void __launch_bounds__(kWarpThreads, kWarpBlocks)
    warp_kernel(const __grid_constant__ LossParams p,
                const __grid_constant__ Task<typename Compute<T>::type> task) {
  using Real = typename Compute<T>::type;
  constexpr int kCount = 16 / sizeof(T), kSlots = kWarpClasses / kWarp / kCount;
  constexpr int kElements = kSlots * kCount;
  const int lane = threadIdx.x % kWarp, classes = static_cast<int>(p.classes);
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kWarpThreads / kWarp);
  wait_for_launch_before();
  const Real factor = task.factor(p);
  double total = 0;

  for (int64_t r = static_cast<int64_t>(blockIdx.x) * (kWarpThreads / kWarp) + threadIdx.x / kWarp;
       r < p.rows; r += warps) {
    const Row<Real> row = read_row<Real>(p, r);
    const T* z_row = row_at<T>(p.student, p.student_rows, r);
    const T* t_row = row_at<T>(p.teacher_data[0], p.teacher_rows[0], r);
    T* g_row = p.gradient != nullptr ? row_at<T>(p.gradient, p.gradient_rows, r) : nullptr;
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
      if (kExtra != Extra::kNothing && p.statistics != nullptr && lane == 0)
        blank_statistics(p, row, r);
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
    auto column = [&](int k) {
      if (k == kElements) return edge.first;
      return first + (span.vectors ? k / kCount * kWarp * kCount + k % kCount : k * kWarp);
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
    const Real label_z = task.hard != CrossEntropy::kNone
                             ? task.template student<kExtra>(widen(z_row[row.label]))
                             : Real(0);
    const Solved<T, Policy, kExtra> solved = solve<T, Policy, kExtra, kSlots, kCount, 1>(
        p, task, r, row, label_z, row.weight * factor, slots, kWarp, z, t, valid, column);
    const Real at_label = task.template back<kExtra>(label_z, solved.sweep.at_label);
    if (lane == 0) total += row.emit(p, r, solved.loss);
    if (g_row == nullptr) continue;
    // In place: the label's logit is read before any lane writes.
    __syncwarp();
    const int label = static_cast<int>(row.label);
    if (has_edge)
      narrow(z[kElements] - (edge.first == label ? at_label : Real(0)), g_row[edge.first]);
    if (span.vectors) {
#pragma unroll
      for (int s = 0; s < kSlots; ++s) {
        if (!valid(s * kCount)) continue;
        int at = first + s * kWarp * kCount;
        Vector<T> g;
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          Real own = at + j == label ? at_label : Real(0);
          narrow(z[s * kCount + j] - own, g.value[j]);
        }
        *reinterpret_cast<Vector<T>*>(g_row + at) = g;
      }
    } else {
#pragma unroll
      for (int k = 0; k < kElements; ++k) {
        int at = first + k * kWarp;
        if (valid(k)) narrow(z[k] - (at == label ? at_label : Real(0)), g_row[at]);
      }
    }
  }
  emit_partial(task.partial, total);
}

}  // namespace
}  // namespace cuda
}  // namespace kdkernels
