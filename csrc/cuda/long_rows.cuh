// Rows that shared memory holds, of a block or of a cluster, and rows that are read twice: the walks held and
// stream of cuda/plan.h.
#pragma once

#include "cuda/team.cuh"
#include "cuda/vector_sums.cuh"

namespace kdkernels {
namespace cuda {
namespace {

// Blocks an SM that registers must allow.
constexpr int row_blocks(bool held, int element_size, Extra extra, bool third_sweep) {
  const int threads = held ? held_max_threads(element_size) : kStreamThreads;
  return (held                ? 65536 / held_registers(element_size, extra, third_sweep)
          : element_size == 8 ? 256
                              : 512) /
         threads;
}

// Logits of a row in shared memory: of each thread a vector a turn, in planes of 16 bytes.
template <class Held, int kCount>
struct Slots {
  static constexpr int kPlanes = kCount * sizeof(Held) / 16;
  uint4* first;  // of this thread
  int threads, plane;

  __device__ __forceinline__ uint4* at(int slot) const { return first + slot * threads; }
  __device__ __forceinline__ Vector<Held, kCount> get(int slot) const {
    uint4 bits[kPlanes];
#pragma unroll
    for (int i = 0; i < kPlanes; ++i) bits[i] = at(slot)[i * plane];
    Vector<Held, kCount> x;
    memcpy(&x, bits, sizeof x);
    return x;
  }
  __device__ __forceinline__ void put(int slot, const Vector<Held, kCount>& x) const {
    uint4 bits[kPlanes];
    memcpy(bits, &x, sizeof x);
#pragma unroll
    for (int i = 0; i < kPlanes; ++i) at(slot)[i * plane] = bits[i];
  }
};

// A thread's part of one row: slots, in shared memory if kHeld, else read again in each sweep.
template <class T, class Policy, bool kHeld, Extra kExtra>
struct LongRow {
  using Real = typename Compute<T>::type;
  using Held = HeldType<T, kExtra>;
  using Index = std::conditional_t<kHeld, int, int64_t>;
  static constexpr int kCount = 16 / sizeof(T), kGroups = kHeld ? 4 : 1;
  static constexpr bool kTransforms = kExtra == Extra::kTransforms,
                        kStatistics = kExtra != Extra::kNothing;
  using Logits = Vector<Held, kCount>;
  // Wider types in shared memory have the instructions to spare, and not the registers.
  static constexpr bool kShift = sizeof(T) == 2 || (sizeof(T) == 4 && (!kHeld || kTransforms));
  static constexpr int kLeastSlots = 4;  // that pay for what is done once a group

  const LossParams& p;
  const Task<Real>& task;
  Team<T>& team;
  const Slots<Held, kCount> z_slots, t_slots;
  const int64_t r;
  const bool last;  // of this block's rows
  const Row<Real> row;
  const T *z_row, *t_row;
  T* g_row;
  const Span<T, Index> span;
  // This block's share of the body; this thread's slots with something in them: `mine` of the body (the first may be the one
  // that is none, and is passed over), then at most one with an element of the row's head or tail.
  Index begin, end, own;
  int mine, skip, slots, whole;  // slots up to `whole` are whole vectors, those from `skip` on
  Index at_first;  // where they start

  __device__ __forceinline__ LongRow(const LossParams& p, const Task<Real>& task, Team<T>& team,
                                     const Slots<Held, kCount>& z_slots,
                                     const Slots<Held, kCount>& t_slots, int64_t r, bool last)
      : p(p),
        task(task),
        team(team),
        z_slots(z_slots),
        t_slots(t_slots),
        r(r),
        last(last),
        row(read_row<Real>(p, r)),
        z_row(row_at<T>(p.student, p.student_rows, r)),
        t_row(row_at<T>(p.teacher_data[0], p.teacher_rows[0], r)),
        g_row(p.gradient != nullptr ? row_at<T>(p.gradient, p.gradient_rows, r) : nullptr),
        span(z_row, t_row, g_row, static_cast<Index>(p.classes)) {
    const int thread = team.thread, threads = team.threads;
    Index share = (span.body + team.cluster - 1) / team.cluster;
    share += share % 2;  // as in held_plan: whole sectors
    begin = team.rank * share < span.body ? team.rank * share : span.body;
    end = begin + share < span.body ? begin + share : span.body;
    own = span.vectors ? end - begin : min(end * kCount, span.elements) - begin * kCount;
    const int log_step = 31 - __clz(span.vectors ? threads : threads * kCount);
    mine = own > thread ? static_cast<int>((own - thread - 1) >> log_step) + 1 : 0;
    skip = span.vectors && begin + thread < span.skew;
    slots = mine + (team.rank == 0 && thread < kEdges && !edge().empty());
    whole = span.vectors ? mine : 0;
    at_first = span.head + (begin + thread - span.skew) * kCount;
  }

  __device__ __forceinline__ bool wants_statistics() const {
    return kExtra == Extra::kStatistics || (kTransforms && p.statistics != nullptr);
  }
  __device__ __forceinline__ Place<Index> edge() const {
    return edge_place(span, team.thread & (kEdges - 1));
  }
  __device__ __forceinline__ Place<Index> place(int s) const {
    return s < mine ? body_place(span, begin, end, s, team.thread, team.threads) : edge();
  }
  __device__ __forceinline__ Index at(int s) const {
    return at_first + static_cast<Index>(s) * (team.threads * kCount);
  }
  __device__ __forceinline__ Vector<T> fetch(const T* from, int s) const {
    return s < whole ? *reinterpret_cast<const Vector<T>*>(from + at(s)) : load(from, place(s));
  }

  // ---- logits as they are compared ----

  __device__ __forceinline__ void convert(const Vector<T>& z, const Vector<T>& t, Logits& z_out,
                                          Logits& t_out) const {
    if constexpr (kTransforms) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        z_out.value[j] = task.template student<kExtra>(widen(z.value[j]));
        t_out.value[j] = task.template teacher<kExtra>(widen(t.value[j]));
      }
    } else {
      z_out = z;
      t_out = t;
    }
  }
  __device__ __forceinline__ void read(int s, Logits& z, Logits& t) const {
    if constexpr (kHeld) {
      z = z_slots.get(s);
      t = t_slots.get(s);
    } else {
      convert(fetch(z_row, s), fetch(t_row, s), z, t);
    }
  }
  // visit(s, z, t) for slots [from, slots).
  template <class Visit>
  __device__ __forceinline__ void each(int from, Visit visit) const {
#pragma unroll 1
    for (int s = from; s < slots; ++s) {
      Logits z, t;
      read(s, z, t);
      visit(s, z, t);
    }
  }
  __device__ __forceinline__ void write(int s, const Vector<T>& out) const {
    if (s < whole) {
      *reinterpret_cast<Vector<T>*>(g_row + at(s)) = out;
    } else {
      store(g_row, place(s), out);
    }
  }

  // ---- sweep 1 ----

  __device__ __forceinline__ int group_slots() const {
    const int some = (slots + kGroups - 1) / kGroups;
    return kShift ? max(some, kLeastSlots) : some;
  }
  // The row to shared memory, in groups, each in a thread's first plane as it is.
  __device__ __forceinline__ void bring() const {
    const int of_group = group_slots();
#pragma unroll 1
    for (int g = 0; g < kGroups; ++g) {
      const int to = min(slots, (g + 1) * of_group), to_whole = min(to, whole);
      int s = max(skip, g * of_group);
#pragma unroll 1
      for (; s < to_whole; ++s) {
        copy_async(z_slots.at(s), z_row + at(s));
        copy_async(t_slots.at(s), t_row + at(s));
      }
#pragma unroll 1
      for (; s < to; ++s) {
        raw(z_slots, s) = load(z_row, place(s));
        raw(t_slots, s) = load(t_row, place(s));
      }
      commit_copies();
    }
  }
  __device__ __forceinline__ static Vector<T>& raw(const Slots<Held, kCount>& side, int s) {
    return *reinterpret_cast<Vector<T>*>(side.at(s));
  }
  // Of slots [from, to), which have been brought.
  __device__ __forceinline__ void add_group(int from, int to, RowSums<Real>& sums) const {
    Largest<Held> largest_s, largest_t;
#pragma unroll 2
    for (int s = from; s < to; ++s) {
      Logits z, t;
      convert(raw(z_slots, s), raw(t_slots, s), z, t);
      if constexpr (kTransforms) {
        z_slots.put(s, z);
        t_slots.put(s, t);
      }
      largest_s.add(z);
      largest_t.add(t);
    }
    const Real max_s = Max::apply(largest_s.result(), sums.max_s);
    const Real max_t = Max::apply(largest_t.result(), sums.max_t);
    rebase<Policy>(task, sums, max_s, max_t);
    if (task.smooth) {
#pragma unroll 1
      for (int s = from; s < to; ++s) add_smooth(sums, z_slots.get(s), place(s));
    }
    if constexpr (kShift) {
      const Shifts shifts(task, max_s, max_t);
      if (shifts.small()) {
        RowSums<Real> part = {max_s, max_t, 0, 0, 0, 0, 0, 0};
#pragma unroll 1
        for (int s = from; s < to; ++s) {
          const Logits z = z_slots.get(s), t = t_slots.get(s);
          add_shifted<Policy>(task, part, shifts, z, t);
        }
        if (part.cross == part.cross) return add_part<Policy>(sums, part, shifts);
      }
    }
#pragma unroll 1
    for (int s = from; s < to; ++s) add<Policy>(task, sums, z_slots.get(s), t_slots.get(s));
  }
  // This thread's sums. While later groups are on their way it adds up the earlier ones.
  __device__ __forceinline__ RowSums<Real> add_up() const {
    RowSums<Real> sums = {Lowest<Real>::value, Lowest<Real>::value, 0, 0, 0, 0, 0, 0};
    if constexpr (kHeld) {
      const int of_group = group_slots();
#pragma unroll 1
      for (int g = 0; g < kGroups; ++g) {
        if (g == kGroups - 4) wait_copies<3>();
        if (g == kGroups - 3) wait_copies<2>();
        if (g == kGroups - 2) wait_copies<1>();
        if (g == kGroups - 1) wait_copies<0>();
        const int from = max(skip, g * of_group), to = min(slots, (g + 1) * of_group);
        if (kShift && from >= to) continue;
        add_group(from, to, sums);
      }
    } else {
      each(skip, [&](int s, const Logits& z, const Logits& t) {
        Largest<Held> largest_s, largest_t;
        largest_s.add(z);
        largest_t.add(t);
        rebase<Policy>(task, sums, Max::apply(largest_s.result(), sums.max_s),
                       Max::apply(largest_t.result(), sums.max_t));
        add<Policy>(task, sums, z, t);
        if (task.smooth) add_smooth(sums, z, place(s));
      });
    }
    return sums;
  }

  // ---- the other sweeps ----

  // Whether this thread writes a class's gradient.
  __device__ __forceinline__ bool writes(Index label) const {
    const Index member =
        span.vectors ? (label - span.head) / kCount + span.skew - begin : label - begin * kCount;
    const bool in_body = label >= span.head && member >= 0 && member < own;
    return in_body ? (member & (team.threads - 1)) == team.thread
                   : slots > mine && label == edge().first;
  }
  // The label's gradient, with its own share: the thread that wrote the label's element writes it again.
  template <class Gradient>
  __device__ __forceinline__ void write_label(Real label_z, Real at_label,
                                              Gradient gradient) const {
    if (g_row == nullptr || task.hard == CrossEntropy::kNone) return;
    const Index label = static_cast<Index>(p.labels[r]);  // read again, for registers
    if (!writes(label)) return;
    const Real label_t = task.template teacher<kExtra>(widen(t_row[label]));
    narrow(task.template back<kExtra>(label_z, gradient(label_t) - at_label), g_row[label]);
  }
  // Tells the classes of the largest logits that this thread has.
  __device__ __forceinline__ void tell_first(const RowSums<Real>& own_sums,
                                             const RowSums<Real>& sums) const {
    if (!wants_statistics()) return;
    FirstClasses<Real> first;
    if (!(own_sums.max_s < sums.max_s && own_sums.max_t < sums.max_t)) {
      each(skip, [&](int s, const Logits& z, const Logits& t) {
        const Place<Index> here = place(s);
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          if (here.holds(j))
            first.compare(sums, widen(z.value[j]), widen(t.value[j]), Real(here.at(j)));
        }
      });
    }
    team.tell(first.s, first.t);
  }
  // Sums over the row of a thread's terms and their derivatives, and what statistics take.
  __device__ __forceinline__ FirstClasses<Real> reduce(Real& terms, Real& of_a,
                                                       StatisticSums<Real>& statistics) const {
    if constexpr (kStatistics) {
      Real x[] = {terms, of_a, statistics.self_s, statistics.self_t, Real(0), Real(0)};
      team.template reduce<4, 2>(x, wants_statistics());
      terms = x[0];
      of_a = x[1];
      statistics = {x[2], x[3]};
      return {x[4], x[5]};
    } else {
      Real x[] = {terms, of_a};
      team.template reduce<2>(x);
      terms = x[0];
      of_a = x[1];
      return {};
    }
  }
  // By one thread: the row's loss, and its statistics.
  __device__ __forceinline__ void emit(const RowSums<Real>& sums, Real terms, Real loss,
                                       const StatisticSums<Real>& statistics,
                                       const FirstClasses<Real>& first) const {
    if (!team.is_first()) return;
    team.exchange.totals[0] += row.emit(p, r, loss);
    if (wants_statistics()) write_statistics<Policy>(p, task, r, sums, statistics, first, terms);
  }

  // Of a divergence with three sweeps, whose second adds up its terms and their derivatives.
  template <class Terms>
  __device__ __forceinline__ Real other_sweeps(TermSweeps<T, kExtra>& sweep,
                                               StatisticSums<Real>& statistics,
                                               FirstClasses<Real>& first) const {
    // Where rows are held; rounded to 16 bits slopes would lose digits to their sum.
    constexpr bool kSlopes = kHeld && math::kHasSlope<Terms> && sizeof(T) > 2;
    Real terms = 0, of_a = 0;
    each(skip, [&](int s, const Logits& z, const Logits& t) {
      Real zs[kCount], ts[kCount];
      widen_all(z, zs);
      widen_all(t, ts);
      [[maybe_unused]] Logits slopes;
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        const auto element = sweep.element(task, zs[j], ts[j]);
        const math::ClassShare<Real> x = Terms::share(element, task.parameters);
        terms += x.f;
        of_a += x.a;
        if (wants_statistics()) statistics.add(element);
        if constexpr (kSlopes) narrow(x.slope, slopes.value[j]);
      }
      if constexpr (kSlopes) t_slots.put(s, slopes);
    });
    first = reduce(terms, of_a, statistics);
    sweep.of_q = -sweep.other * of_a;
    if (g_row == nullptr) return terms;
    each(skip, [&](int s, const Logits& z, const Logits& t) {
      Real zs[kCount], ts[kCount];
      Vector<T> out;
      widen_all(z, zs);
      widen_all(t, ts);
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        Real gradient;
        if constexpr (kSlopes) {
          gradient = sweep.gradient_of_slope(task, zs[j], ts[j]);
        } else {
          gradient = sweep.template gradient<Terms>(task, zs[j], ts[j]);
        }
        narrow(task.template back<kExtra>(zs[j], gradient), out.value[j]);
      }
      write(s, out);
    });
    return terms;
  }
  __device__ __forceinline__ void three_sweeps(const RowSums<Real>& own_sums,
                                               const RowSums<Real>& sums, Real label_z) const {
    TermSweeps<T, kExtra> sweep(task, sums, label_z, row.weight * team.exchange.factor);
    if (math::needs_exact_sums(p.divergence)) {
      Real excess[] = {Real(0)};
      each(skip, [&](int, const Logits& z, const Logits& t) {
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          const auto x = sweep.element(task, widen(z.value[j]), widen(t.value[j]));
          excess[0] += math::difference(x.q, x.p, -x.d);
        }
      });
      team.template reduce<1>(excess);
      sweep.refine(excess[0]);
    }
    tell_first(own_sums, sums);
    Real terms = 0;
    StatisticSums<Real> statistics;
    FirstClasses<Real> first;
    math::with_policy(p, [&](auto policy) {
      using Terms = decltype(policy);
      if constexpr (!math::kTwoSweeps<Terms>) terms = other_sweeps<Terms>(sweep, statistics, first);
    });
    terms = terms < Real(0) ? Real(0) : terms;  // of rounded terms
    if (last) team.arrive();
    emit(sums, terms, math::fma(sweep.of_term, terms, sweep.loss), statistics, first);
    write_label(label_z, sweep.at_label,
                [&](Real label_t) { return sweep.gradient_of(p, task, label_z, label_t); });
  }

  // As shifted_sweep has them.
  __device__ __forceinline__ Exponents<Real> shifted_exponents(const RowSums<Real>& sums, Real z,
                                                               Real t) const {
    if constexpr (kShift) {
      const Shifts shifts(task, sums.max_s, sums.max_t);
      return {shifts.s(z), shifts.t(t)};
    } else {
      return {z, t};
    }
  }
  // The second sweep over whole vectors, in fewer instructions.
  template <class Sweep>
  __device__ __forceinline__ Real shifted_sweep(Sweep& sweep, const Shifts& shifts,
                                                StatisticSums<Real>& statistics) const {
    const Real of_s = shifts.s.factor(), of_t = shifts.t.factor(),
               of_hard = sweep.of_hard * shifts.hard.factor();
    sweep.inv_s *= of_s;
    sweep.inv_t *= of_t;
    Real terms = 0;
#pragma unroll 1
    for (int s = skip; s < whole; ++s) {
      Logits z, t;
      Vector<T> out;
      read(s, z, t);
      Real zs[kCount], ts[kCount], gradient[kCount];
      widen_all(z, zs);
      widen_all(t, ts);
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        const Exponents<Real> of(shifts.s(zs[j]), shifts.t(ts[j]));
        const TermAndGradient<Real> x = sweep.soft(task, zs[j], ts[j], of.ex, of.ey);
        terms += x.term;
        if (wants_statistics()) statistics.add(of);
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
      for (int j = 0; j < kCount; ++j)
        narrow(task.template back<kExtra>(zs[j], gradient[j]), out.value[j]);
      *reinterpret_cast<Vector<T>*>(g_row + at(s)) = out;
    }
    sweep.inv_s *= math::inverse(of_s);
    sweep.inv_t *= math::inverse(of_t);
    return terms;
  }
  __device__ __forceinline__ void two_sweeps(const RowSums<Real>& own_sums,
                                             const RowSums<Real>& sums, Real label_z) const {
    tell_first(own_sums, sums);
    StatisticSums<Real> statistics;
    SecondSweep<T, Policy, kExtra> sweep(task, sums, label_z, row.weight * team.exchange.factor);
    Real terms = 0;
    int done = skip;  // slots up to here are done
    [[maybe_unused]] bool shifted = false;
    if constexpr (kShift) {
      const Shifts shifts(task, sums.max_s, sums.max_t);
      shifted = shifts.small();
      if (shifted) {
        terms = shifted_sweep(sweep, shifts, statistics);
        done = max(skip, whole);
      }
    }
    each(done, [&](int s, const Logits& z, const Logits& t) {
      Vector<T> out;
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        const Real zj = widen(z.value[j]), tj = widen(t.value[j]);
        const Exponents<Real> of = sweep.exponents(task, zj, tj);
        const TermAndGradient<Real> x = sweep.element(task, zj, tj, of);
        terms += x.term;
        if (wants_statistics()) statistics.add(shifted ? shifted_exponents(sums, zj, tj) : of);
        narrow(task.template back<kExtra>(zj, x.gradient), out.value[j]);
      }
      if (g_row != nullptr) write(s, out);
    });
    // Numbers are made again, for registers.
    const Real weight = p.weight != nullptr ? static_cast<const Real*>(p.weight)[r] : Real(1);
    const Real at_label =
        (Real(1) - task.alpha) * (weight * team.exchange.factor) * (Real(1) - task.smoothing);
    write_label(label_z, at_label,
                [&](Real label_t) { return sweep.element(task, label_z, label_t).gradient; });
    const Real of_term = task.alpha * task.temperature * task.temperature;
    if (wants_statistics()) {
      Real none = 0;
      const FirstClasses<Real> first = reduce(terms, none, statistics);
      if constexpr (kShift) {
        const Shifts shifts(task, sums.max_s, sums.max_t);
        if (shifted) {
          statistics.self_s = shifts.s.back(statistics.self_s, sums.sum_s);
          statistics.self_t = shifts.t.back(statistics.self_t, sums.sum_t);
        }
      }
      return emit(sums, terms, math::fma(of_term, terms, sweep.loss), statistics, first);
    }
    add_shares(of_term, sweep.loss, terms, weight);
  }
  // The row's loss is the sum of all warps' shares.
  __device__ __forceinline__ void add_shares(Real of_term, Real of_row, Real terms,
                                             Real weight) const {
    Real of_warp[1] = {terms};
    reduce_lanes<Sum>(of_warp);
    if (team.lane == 0) {
      Real loss = of_term * of_warp[0];
      if (team.is_first()) loss += of_row;
      loss *= weight;
      team.exchange.shares[team.warp()].loss = static_cast<double>(loss);
      team.exchange.totals[team.warp()] += static_cast<double>(loss);
    }
    if (p.row_loss == nullptr) return;
    team.meet();
    if (!team.is_first()) return;
    double loss = 0;
    for (int i = 0; i < team.parts(); ++i) loss += team.loss_of(i);
    static_cast<Real*>(p.row_loss)[r] = static_cast<Real>(loss);
  }

  __device__ __forceinline__ void skip_row() const {
    if (team.is_first()) {
      team.exchange.totals[0] += row.emit(p, r, Real(0));
      if (wants_statistics()) blank_statistics(p, row, r);
    }
    if (g_row == nullptr) return;
    Vector<T> zero;
#pragma unroll
    for (int j = 0; j < kCount; ++j) narrow(Real(0), zero.value[j]);
#pragma unroll 1
    for (int s = 0; s < slots; ++s) store(g_row, place(s), zero);
  }
  __device__ __forceinline__ void run() const {
    if (row.skipped()) return skip_row();
    if constexpr (kHeld) bring();
    const Real label_z = task.hard != CrossEntropy::kNone
                             ? task.template student<kExtra>(widen(z_row[row.label]))
                             : Real(0);
    const RowSums<Real> own_sums = add_up();
    constexpr bool kThird = math::kThirdSweep<Policy>;
    const bool tells_more = kThird || p.row_loss != nullptr || wants_statistics();
    const RowSums<Real> sums = team.template merge<Policy>(task, own_sums, last && !tells_more);
    if constexpr (kThird) {
      three_sweeps(own_sums, sums, label_z);
    } else {
      two_sweeps(own_sums, sums, label_z);
    }
  }
};

// held, kHeld: a block or a cluster a row. A block's slice of the row is copied to shared memory at once,
// in up to 4 groups; while later groups are on their way the thread adds up the earlier ones. A thread reads only what
// it copied, so no barrier guards the slots; the row's sums take one, and each thread adds its own share of the loss
// to what it adds up over all rows. Bytes 1.00 times the least. Special functions an element: 4, or 6 with
// cross-entropy's own exponentials.
// stream, else: a block a row, read from global memory in both sweeps.
template <class T, class Policy, bool kHeld, Extra kExtra>
__global__ void __launch_bounds__(kHeld ? held_max_threads(sizeof(T)) : kStreamThreads,
                                  row_blocks(kHeld, sizeof(T), kExtra, math::kThirdSweep<Policy>))
    row_kernel(const __grid_constant__ LossParams p,
               const __grid_constant__ Task<typename Compute<T>::type> task, int cluster,
               int capacity) {
  using Walk = LongRow<T, Policy, kHeld, kExtra>;
  using RowSlots = Slots<typename Walk::Held, Walk::kCount>;
  extern __shared__ uint4 slots_shared[];
  __shared__ Exchange<T> exchange;
  Team<T> team(exchange, cluster, kHeld ? cluster_rank() : 0, 31 - __clz(blockDim.x / kWarp));
  const int plane = capacity * team.threads + kEdges;
  const RowSlots z_slots = {slots_shared + team.thread, team.threads, plane};
  const RowSlots t_slots = {z_slots.first + RowSlots::kPlanes * plane, team.threads, plane};
  if (team.lane == 0) exchange.totals[team.warp()] = 0;
  wait_for_launch_before();
  if (team.thread == 0) exchange.factor = task.factor(p);

  const int stride = gridDim.x / cluster;
  for (int64_t r = blockIdx.x / cluster; r < p.rows; r += stride)
    Walk(p, task, team, z_slots, t_slots, r, r + stride >= p.rows).run();

  __syncthreads();
  if (team.thread == 0 && task.partial != nullptr) {
    double total = 0;
    for (int warp = 0; warp < team.warps; ++warp) total += exchange.totals[warp];
    task.partial[blockIdx.x] = total;
  }
  team.end();  // a block stays while others of its cluster may read its parts
}

}  // namespace
}  // namespace cuda
}  // namespace kdkernels
