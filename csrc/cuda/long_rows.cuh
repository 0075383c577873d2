// Rows that shared memory holds, of a block or of a cluster, and rows that are read twice: the walks held and
// stream of cuda/plan.h.
#pragma once

#include "cuda/row.cuh"

namespace kdkernels {
namespace cuda {
namespace {

// Adds a vector's elements, none above the sums' maxima, to a thread's sums.
template <class Policy, class T, class Real>
__device__ __forceinline__ void add(const Task<Real>& task, RowSums<Real>& sums, const Vector<T>& z,
                                    const Vector<T>& t) {
  constexpr int kCount = 16 / sizeof(T);
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    Real x = (widen(z.value[j]) - sums.max_s) * task.scale;
    Real y = (widen(t.value[j]) - sums.max_t) * task.scale;
    Real ex = math::exp2_nonpositive(x);
    sums.sum_s += ex;
    sums.sum_t += math::exp2_nonpositive(y);
    if constexpr (Policy::kCross) sums.cross += math::times(ex, x - y);
  }
  if (task.hard == CrossEntropy::kOwn) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      Real shifted = widen(z.value[j]) - sums.max_s;
      sums.sum_hard += math::exp2_nonpositive(shifted * Real(math::kLog2E));
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

// add() in fewer instructions, for sums whose exponents still lack the shifts' errors; `cross` is unguarded: NaN where
// the guard would have made a difference.
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
    float ex = math::exp2_nonpositive(x);
    sums.sum_s += ex;
    sums.sum_t += math::exp2_nonpositive(y);
    if constexpr (Policy::kCross) sums.cross = math::fma(ex, x - y, sums.cross);
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
  float of_s = shifts.s.factor();
  sums.sum_s = math::fma(of_s, part.sum_s, sums.sum_s);
  sums.sum_t = math::fma(shifts.t.factor(), part.sum_t, sums.sum_t);
  if constexpr (Policy::kCross) {
    float moved = math::fma(part.sum_s, shifts.t.error - shifts.s.error, part.cross);
    sums.cross = math::fma(of_s, moved, sums.cross);
  }
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
  Real sums[2] = {row.sum_s, row.sum_t}, cross[1] = {row.cross}, hard[1] = {row.sum_hard};
  Real smooth[2] = {row.sum_z, row.count};
  reduce_lanes<Sum>(sums, lanes);
  if constexpr (Policy::kCross) reduce_lanes<Sum>(cross, lanes);
  if (task.hard == CrossEntropy::kOwn) reduce_lanes<Sum>(hard, lanes);
  if (task.smooth) reduce_lanes<Sum>(smooth, lanes);
  return {maxima[0], maxima[1], sums[0], sums[1], cross[0], hard[0], smooth[0], smooth[1]};
}

// Blocks an SM that registers must allow.
constexpr int row_blocks(bool held, int element_size) {
  int threads = held ? held_max_threads(element_size) : kStreamThreads;
  return (held ? 65536 / held_registers(element_size) : element_size == 8 ? 256 : 512) / threads;
}

template <class T>
constexpr int kHeldWarps = held_max_threads(sizeof(T)) / kWarp;

template <class Real>
struct Pair {
  Real first, second;
};
template <class Real>
struct alignas(16) Part {
  RowSums<Real> sums;
};
struct alignas(16) LossShare {
  double loss;
};

// The sweeps behind the first of a divergence with three: the sum of the row's terms, and its gradient but for the label's
// share. each(visit): visit(s, z, t) for the thread's slots; reduce_row(a, b): the sums of both over the row's threads;
// keep(s, slopes): t is these from now on; write(s, gradient).
template <bool kHeld, class T, class Real, class Each, class ReduceRow, class Keep, class Write>
__device__ __forceinline__ Real more_sweeps(const LossParams& p, const Task<Real>& task,
                                            TermSweeps<T>& sweep, Each each, ReduceRow reduce_row,
                                            Keep keep, Write write) {
  constexpr int kCount = 16 / sizeof(T);
  if (math::needs_exact_sums(p.divergence)) {
    Real excess = 0;
    each([&](int, const Vector<T>& z, const Vector<T>& t) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        const auto x = sweep.element(task, widen(z.value[j]), widen(t.value[j]));
        excess += math::difference(x.q, x.p, -x.d);
      }
    });
    sweep.refine(reduce_row(excess, Real(0)).first);
  }
  Pair<Real> terms = {0, 0};
  math::with_policy(p.divergence, p.beta, p.second, [&](auto policy) {
    using Terms = decltype(policy);
    if constexpr (!math::kTwoSweeps<Terms>) {
      // Where rows are held; of 16 bits slopes would lose digits to their sum.
      constexpr bool kSlopes = kHeld && math::kHasSlope<Terms> && sizeof(T) > 2;
      each([&](int s, const Vector<T>& z, const Vector<T>& t) {
        Real zs[kCount], ts[kCount];
        widen_all(z, zs);
        widen_all(t, ts);
        [[maybe_unused]] Vector<T> slopes;
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          const math::ClassShare<Real> x =
              Terms::share(sweep.element(task, zs[j], ts[j]), task.parameters);
          terms.first += x.f;
          terms.second += x.a;
          if constexpr (kSlopes) narrow(x.slope, slopes.value[j]);
        }
        if constexpr (kSlopes) keep(s, slopes);
      });
      terms = reduce_row(terms.first, terms.second);
      sweep.of_q = -sweep.other * terms.second;
      if (p.gradient == nullptr) return;
      each([&](int s, const Vector<T>& z, const Vector<T>& t) {
        Real zs[kCount], ts[kCount];
        Vector<T> out;
        widen_all(z, zs);
        widen_all(t, ts);
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          if constexpr (kSlopes) {
            narrow(sweep.gradient_of_slope(task, zs[j], ts[j]), out.value[j]);
          } else {
            narrow(sweep.template gradient<Terms>(task, zs[j], ts[j]), out.value[j]);
          }
        }
        write(s, out);
      });
    }
  });
  return terms.first < Real(0) ? Real(0) : terms.first;  // of rounded terms
}

// held, kHeld: a block or a cluster a row. A block's slice of the row is copied to shared memory at once,
// in up to 4 groups; while later groups are on their way the thread adds up the earlier ones. A thread reads only what
// it copied, so no barrier guards the slots; the row's sums take one, and each thread adds its own share of the loss
// to what it adds up over all rows. Bytes 1.00 times the least. Special functions an element: 4, or 6 with
// cross-entropy's own exponentials.
// stream, else: a block a row, read from global memory in both sweeps.
template <class T, class Policy, bool kHeld>
__global__ void __launch_bounds__(kHeld ? held_max_threads(sizeof(T)) : kStreamThreads,
                                  row_blocks(kHeld, sizeof(T)))
    row_kernel(const __grid_constant__ LossParams p,
               const __grid_constant__ Task<typename Compute<T>::type> task, int cluster,
               int capacity) {
  using Real = typename Compute<T>::type;
  using Index = std::conditional_t<kHeld, int, int64_t>;
  constexpr int kCount = 16 / sizeof(T);
  // Wider types in shared memory have the instructions to spare, and not the registers.
  constexpr bool kShift = sizeof(T) == 2 || (sizeof(T) == 4 && !kHeld);
  constexpr int kGroups = kHeld ? 4 : 1;
  constexpr int kLeastSlots = 4;  // that pay for what is done once a group
  extern __shared__ uint4 slots_shared[];
  __shared__ Part<Real> parts[2][kHeldWarps<T>];
  // Of each warp: the row's share of the loss, and the sum over all rows.
  __shared__ LossShare shares[kHeldWarps<T>];
  __shared__ double totals[kHeldWarps<T>];
  // Kept by thread 0; the others read it after a row's barrier.
  __shared__ Real factor;
  const int thread = threadIdx.x, threads = blockDim.x, rank = kHeld ? cluster_rank() : 0;
  const int warps = threads / kWarp, lane = thread % kWarp, log_warps = 31 - __clz(warps);
  Vector<T>* z_slots = reinterpret_cast<Vector<T>*>(slots_shared) + thread;
  Vector<T>* t_slots = z_slots + capacity * threads + kEdges;
  if (lane == 0) totals[thread / kWarp] = 0;
  if (thread == 0) factor = task.factor(p);
  int turn = 0;
  bool arrived = false;

  const int stride = gridDim.x / cluster;
  for (int64_t r = blockIdx.x / cluster; r < p.rows; r += stride) {
    const Row<Real> row = read_row<Real>(p, r);
    const T* z_row = static_cast<const T*>(p.student) + r * p.student_stride;
    const T* t_row = static_cast<const T*>(p.teacher_data[0]) + r * p.teacher_strides[0];
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
    const int skip = span.vectors && begin + thread < span.skew;
    auto edge = [&] { return edge_place(span, thread & (kEdges - 1)); };
    const int slots = mine + (rank == 0 && thread < kEdges && !edge().empty());
    auto place = [&](int s) {
      return s < mine ? body_place(span, begin, end, s, thread, threads) : edge();
    };
    // Slots up to here are whole vectors, those from `skip` on; where they start.
    const int whole = span.vectors ? mine : 0;
    const Index at_first = span.head + (begin + thread - span.skew) * kCount;
    auto at = [&](int s) { return at_first + static_cast<Index>(s) * (threads * kCount); };

    if (row.skipped()) {
      if (thread == 0 && rank == 0) totals[0] += row.emit(p, r, Real(0));
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
          z_slots[s * threads] = load(z_row, place(s));
          t_slots[s * threads] = load(t_row, place(s));
        }
        commit_copies();
      }
    }
    const Real label_z =
        task.hard != CrossEntropy::kNone ? static_cast<Real>(widen(z_row[row.label])) : Real(0);

    RowSums<Real> sums = {Lowest<Real>::value, Lowest<Real>::value, 0, 0, 0, 0, 0, 0};
    if constexpr (kHeld) {
#pragma unroll 1
      for (int g = 0; g < kGroups; ++g) {
        if (g == 0) wait_copies<3>();
        if (g == 1) wait_copies<2>();
        if (g == 2) wait_copies<1>();
        if (g == 3) wait_copies<0>();
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
        if constexpr (kShift) {
          const Shifts shifts(task, max_s, max_t);
          if (shifts.small()) {
            RowSums<Real> part = {max_s, max_t, 0, 0, 0, 0, 0, 0};
#pragma unroll 1
            for (int s = from; s < to; ++s) {
              const Vector<T> z = z_slots[s * threads], t = t_slots[s * threads];
              add_shifted<Policy>(task, part, shifts, z, t);
            }
            added = part.cross == part.cross;
            if (added) add_part<Policy>(sums, part, shifts);
          }
        }
        if (!added) {
#pragma unroll 1
          for (int s = from; s < to; ++s)
            add<Policy>(task, sums, Vector<T>(z_slots[s * threads]), t_slots[s * threads]);
        }
      }
    } else {
#pragma unroll 1
      for (int s = 0; s < slots; ++s) {
        auto here = place(s);
        Vector<T> z = load(z_row, here), t = load(t_row, here);
        Largest<T> largest_s, largest_t;
        largest_s.add(z);
        largest_t.add(t);
        rebase<Policy>(task, sums, Max::apply(largest_s.result(), sums.max_s),
                       Max::apply(largest_t.result(), sums.max_t));
        add<Policy>(task, sums, z, t);
        if (task.smooth) add_smooth(sums, z, here);
      }
    }

    // Whether this thread writes a class's gradient.
    auto writes = [&](Index label) {
      const Index member =
          span.vectors ? (label - span.head) / kCount + span.skew - begin : label - begin * kCount;
      const bool in_body = label >= span.head && member >= 0 && member < own;
      return in_body ? (member & (threads - 1)) == thread : slots > mine && label == edge().first;
    };

    // Every warp merges the parts of all warps of the cluster. Two turns of parts: who writes the next
    // row's has passed that row's barrier after all have read this row's.
    sums = merge_lanes<Policy>(task, sums, kWarp);
    if (lane == 0) parts[turn][thread / kWarp].sums = sums;
    auto meet = [&] {
      if (cluster > 1) {
        cluster_arrive();
        cluster_wait();
      } else {
        __syncthreads();
      }
    };
    meet();
    const int count = warps * cluster;  // a power of two
    auto part = [&](int i) {
      const Part<Real>* at = &parts[turn][i & (warps - 1)];
      return cluster > 1 ? read_peer(at, i >> log_warps).sums : at->sums;
    };
    sums = part(lane & (count - 1));
    for (int i = lane + kWarp; i < count; i += kWarp)
      sums = math::merge<Policy>(task.hard, sums, part(i), task.scale, Exp2Nonpositive());
    if (!math::kThirdSweep<Policy> && cluster > 1 && r + stride >= p.rows &&
        p.row_loss == nullptr) {
      cluster_arrive();
      arrived = true;
    }
    turn ^= 1;
    sums = merge_lanes<Policy>(task, sums, min(count, kWarp));

    if constexpr (math::kThirdSweep<Policy>) {
      TermSweeps<T> sweep(task, sums, label_z, row.weight * factor);
      // visit(s, z, t) for this thread's slots.
      auto each = [&](auto visit) {
#pragma unroll 1
        for (int s = skip; s < slots; ++s) {
          if constexpr (kHeld) {
            visit(s, Vector<T>(z_slots[s * threads]), Vector<T>(t_slots[s * threads]));
          } else {
            visit(s, load(z_row, place(s)), load(t_row, place(s)));
          }
        }
      };
      // The sums of all threads of the row.
      auto reduce_row = [&](Real a, Real b) {
        Real of_lanes[2] = {a, b};
        reduce_lanes<Sum>(of_lanes);
        if (lane == 0)
          parts[turn][thread / kWarp].sums = {0, 0, of_lanes[0], of_lanes[1], 0, 0, 0, 0};
        meet();
        Real total[2] = {0, 0};
        for (int i = lane; i < count; i += kWarp) {
          const RowSums<Real> of = part(i);
          total[0] += of.sum_s;
          total[1] += of.sum_t;
        }
        turn ^= 1;
        reduce_lanes<Sum>(total);
        return Pair<Real>{total[0], total[1]};
      };
      auto keep = [&](int s, const Vector<T>& slopes) { t_slots[s * threads] = slopes; };
      auto write = [&](int s, const Vector<T>& out) {
        if (s < whole) {
          *reinterpret_cast<Vector<T>*>(g_row + at(s)) = out;
        } else {
          store(g_row, place(s), out);
        }
      };
      const Real terms = more_sweeps<kHeld>(p, task, sweep, each, reduce_row, keep, write);
      if (cluster > 1 && r + stride >= p.rows) {
        cluster_arrive();
        arrived = true;
      }
      if (thread == 0 && rank == 0)
        totals[0] += row.emit(p, r, math::fma(sweep.of_term, terms, sweep.loss));
      if (g_row != nullptr && task.hard != CrossEntropy::kNone) {
        const Index label = static_cast<Index>(row.label);
        if (writes(label)) {
          const T label_t =
              static_cast<const T*>(p.teacher_data[0])[r * p.teacher_strides[0] + label];
          narrow(sweep.gradient_of(p, task, label_z, widen(label_t)) - sweep.at_label,
                 g_row[label]);
        }
      }
    } else {
      SecondSweep<T, Policy> sweep(task, sums, label_z, row.weight * factor);
      Real terms = 0;
      int done = skip;  // slots up to here are done
      if constexpr (kShift) {
        const Shifts shifts(task, sums.max_s, sums.max_t);
        if (shifts.small()) {
          const Real of_s = shifts.s.factor(), of_t = shifts.t.factor(),
                     of_hard = sweep.of_hard * shifts.hard.factor();
          sweep.inv_s *= of_s;
          sweep.inv_t *= of_t;
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
              const TermAndGradient<Real> x =
                  sweep.soft(task, zs[j], ts[j], math::exp2_nonpositive(shifts.s(zs[j])),
                             math::exp2_nonpositive(shifts.t(ts[j])));
              terms += x.term;
              gradient[j] = x.gradient;
            }
            if (g_row == nullptr) continue;
            if (task.hard != CrossEntropy::kNone) {
#pragma unroll
              for (int j = 0; j < kCount; ++j) {
                Real eh = math::exp2_nonpositive(shifts.hard(zs[j]));
                gradient[j] = math::fma(of_hard, eh, gradient[j] - sweep.uniform);
              }
            }
#pragma unroll
            for (int j = 0; j < kCount; ++j) narrow(gradient[j], out.value[j]);
            *reinterpret_cast<Vector<T>*>(g_row + at(s)) = out;
          }
          sweep.inv_s *= math::inverse(of_s);
          sweep.inv_t *= math::inverse(of_t);
          done = max(skip, whole);
        }
      }
#pragma unroll 1
      for (int s = done; s < slots; ++s) {
        const auto here = place(s);
        Vector<T> z, t, out;
        if constexpr (kHeld) {
          z = z_slots[s * threads];
          t = t_slots[s * threads];
        } else {
          z = load(z_row, here);
          t = load(t_row, here);
        }
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          const TermAndGradient<Real> x = sweep.element(task, widen(z.value[j]), widen(t.value[j]));
          terms += x.term;
          narrow(x.gradient, out.value[j]);
        }
        if (g_row != nullptr) store(g_row, here, out);
      }
      // The label's share: the thread that wrote the label's element writes it again.
      if (g_row != nullptr && task.hard != CrossEntropy::kNone) {
        const Index label = static_cast<Index>(p.labels[r]);  // read again, for registers
        if (writes(label)) {
          // Numbers are made again, for registers.
          const Real weight = p.weight != nullptr ? static_cast<const Real*>(p.weight)[r] : Real(1);
          const Real at_label =
              (Real(1) - task.alpha) * (weight * factor) * (Real(1) - task.smoothing);
          const T label_t =
              static_cast<const T*>(p.teacher_data[0])[r * p.teacher_strides[0] + label];
          narrow(sweep.element(task, label_z, widen(label_t)).gradient - at_label, g_row[label]);
        }
      }

      // The row's loss is the sum of all warps' shares.
      Real of_warp[1] = {terms};
      reduce_lanes<Sum>(of_warp);
      if (lane == 0) {
        Real loss = task.alpha * task.temperature * task.temperature * of_warp[0];
        if (thread == 0 && rank == 0) loss += sweep.loss;
        if (p.weight != nullptr) loss *= static_cast<const Real*>(p.weight)[r];
        shares[thread / kWarp].loss = static_cast<double>(loss);
        totals[thread / kWarp] += static_cast<double>(loss);
      }
      if (p.row_loss == nullptr) continue;
      meet();
      if (thread == 0 && rank == 0) {
        double loss = 0;
        for (int i = 0; i < count; ++i) {
          const LossShare* at = &shares[i & (warps - 1)];
          loss += cluster > 1 ? read_peer(at, i >> log_warps).loss : at->loss;
        }
        static_cast<Real*>(p.row_loss)[r] = static_cast<Real>(loss);
      }
    }
  }
  __syncthreads();
  if (thread == 0 && task.partial != nullptr) {
    double total = 0;
    for (int warp = 0; warp < warps; ++warp) total += totals[warp];
    task.partial[blockIdx.x] = total;
  }
  // A block stays while others of its cluster may read its parts.
  if (cluster > 1) {
    if (!arrived) cluster_arrive();
    cluster_wait();
  }
}

}  // namespace
}  // namespace cuda
}  // namespace kdkernels
