// How a block goes over a row of any divergence: what stands in shared memory, and the loops over its classes.
#pragma once

#include <climits>

#include "cuda/device.cuh"
#include "math/row_element.h"

namespace kdkernels {
namespace cuda {
namespace {

// What a launch does, the same for all its rows.
template <class Real>
struct DivergenceTask {
  math::RowTask row;
  math::Logits<Real> logits;
  math::Parameters<Real> parameters;
  Real temperature;
  bool own;  // the columns beside a top-k teacher's entries are read
  bool reads_teacher;  // a dense one
  // Logits wait in shared memory transformed, the teachers' as their mixture.
  bool transformed;
  bool changes;  // else they are transformed as they are read
  bool best;  // the classes of the largest logits are wanted
  bool refine;  // a pass over the row puts its sums right
  int capacity;  // classes of a chunk
  // Where what stands in shared memory, in bytes: entries' logits and columns, a chunk of each side, what is
  // transformed on its way.
  int column, entry_u, entry_t, student_image, teacher_image, raw;
  double inv_denominator;
  const double* device_inv_denominator;  // instead of it, or null
  double* partial;  // one sum of losses a block, or null
};

template <class Value>
__device__ __forceinline__ Value* shared_at(int offset) {
  extern __shared__ uint4 row_memory[];
  return reinterpret_cast<Value*>(reinterpret_cast<char*>(row_memory) + offset);
}

// Classes or entries that shared memory holds, as logits and in the end as gradients. Threads take them in groups of
// neighbours; the places of the first and the last group that belong to no class hold -inf.
template <class T, class Real, int kGroup>
struct HeldClasses {
  using Group = Real[kGroup];
  int u, t;  // where, for shared_at
  int lead;  // places of the first group before the first class
  int64_t first;  // class of the first, of the slice
  int n;
  bool wide;  // of the compute type
  bool has_teacher, entries;

  __device__ __forceinline__ Real get(int data, int i) const {
    if constexpr (sizeof(T) == sizeof(Real)) {
      return shared_at<Real>(data)[i];
    } else {
      return wide ? shared_at<Real>(data)[i] : widen(shared_at<T>(data)[i]);
    }
  }
  __device__ __forceinline__ void put(int data, int i, Real x) const {
    if (sizeof(T) == sizeof(Real) || wide) {
      shared_at<Real>(data)[i] = x;
    } else {
      narrow(x, shared_at<T>(data)[i]);
    }
  }
  // Of the group whose first class is i.
  template <class Stored>
  __device__ __forceinline__ static Vector<Stored, kGroup>& group_at(int data, int i) {
    return *reinterpret_cast<Vector<Stored, kGroup>*>(shared_at<Stored>(data) + i);
  }
  __device__ __forceinline__ void get_group(int data, int i, Group& x) const {
    if (sizeof(T) == sizeof(Real) || wide) {
      const Vector<Real, kGroup> from = group_at<Real>(data, i);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) x[j] = from.value[j];
    } else {
      const Vector<T, kGroup> from = group_at<T>(data, i);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) x[j] = widen(from.value[j]);
    }
  }
  __device__ __forceinline__ void put_group(int data, int i, const Group& x) const {
    if (sizeof(T) == sizeof(Real) || wide) {
      Vector<Real, kGroup> to;
#pragma unroll
      for (int j = 0; j < kGroup; ++j) to.value[j] = x[j];
      group_at<Real>(data, i) = to;
    } else {
      Vector<T, kGroup> to;
#pragma unroll
      for (int j = 0; j < kGroup; ++j) narrow(x[j], to.value[j]);
      group_at<T>(data, i) = to;
    }
  }
  // visit(i, u, t) for this thread's groups, i being the first class of one, which is negative in the first.
  template <class Visit>
  __device__ __forceinline__ void each_group(Visit visit) const {
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x) * kGroup - lead; i < n; i += blockDim.x * kGroup) {
      Group z, y;
      get_group(u, i, z);
      if (has_teacher) {
        get_group(t, i, y);
      } else {
#pragma unroll
        for (int j = 0; j < kGroup; ++j) y[j] = -Real(INFINITY);
      }
      visit(i, z, y);
    }
  }
  // Writes those places, before the barrier after the thread's own classes.
  __device__ __forceinline__ void pad() const {
    const int thread = threadIdx.x, behind = (kGroup - (lead + n) % kGroup) % kGroup;
    if (thread >= lead + behind) return;
    const int i = thread < lead ? thread - lead : n + thread - lead;
    put(u, i, -Real(INFINITY));
    if (has_teacher) put(t, i, -Real(INFINITY));
  }
};

constexpr double kLog2E = 1.4426950408889634;
constexpr int kRefine = 6;  // a pass of this walker's own, between kSums and kTerms
constexpr int kTotals = 11;  // sums of a pass, at most

// What is the same for all threads of a row. Thread 0 writes it.
template <class Real>
struct RowShared {
  math::RowState state;
  math::RowNorm exact;
  math::ElementNorm<Real> norm;
  math::ElementGradient<Real> gradient;
  double totals[divergence_threads(sizeof(Real)) / kWarp][kTotals];
  double loss;  // of the block
  double total_u;
  Real label_u, label_t;
  // Exponents of 2: logits less the maximum (of the own ones, of the entries'), times a scale.
  Real max_s[2], max_t[2], scale_s, scale_t;
  Real mean_s, inv_std_s, mean_t, inv_std_t;
  // Of each of several teachers: what makes logarithms of its share of its logits.
  Real mix_max[kMaxTeachers], mix_scale[kMaxTeachers], mix_shift[kMaxTeachers];
};

// `count` reductions over the block in a fixed order; thread 0 gets the results. A barrier must follow before
// the next.
template <class Op>
__device__ __forceinline__ void reduce_block(double (&value)[kTotals], int count,
                                             double (*shared)[kTotals]) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
#pragma unroll 1
  for (int step = kWarp / 2; step > 0; step /= 2) {
#pragma unroll
    for (int v = 0; v < kTotals; ++v) {
      if (v < count) value[v] = Op::apply(value[v], __shfl_xor_sync(0xFFFFFFFFu, value[v], step));
    }
  }
  if (warps == 1) return;
#pragma unroll
  for (int v = 0; v < kTotals; ++v) {
    if (lane == 0 && v < count) shared[warp][v] = value[v];
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
#pragma unroll 1
  for (int w = 1; w < warps; ++w) {
#pragma unroll
    for (int v = 0; v < kTotals; ++v) {
      if (v < count) value[v] = Op::apply(value[v], shared[w][v]);
    }
  }
}

// ---- global memory ------------------------------------------------------------------------------

// Elements that an address lies past 16 bytes.
template <class T>
__device__ __forceinline__ int phase_of(const T* data) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(data) % 16 / sizeof(T));
}

// visit(i) by some thread for each of n elements that lie beside whole vectors of 16 bytes, visit_vector(i) for
// the first element of each of those.
template <class T, class Index, class Vectors, class Edges>
__device__ __forceinline__ void each_vector(int phase, Index n, Vectors visit_vector, Edges visit) {
  constexpr int kCount = 16 / sizeof(T);
  Index head = (kCount - phase) % kCount;
  head = n < head ? n : head;
  const Index body = (n - head) / kCount, tail = n - head - body * kCount;
#pragma unroll 4
  for (Index v = threadIdx.x; v < body; v += blockDim.x) visit_vector(head + v * kCount);
  const int thread = threadIdx.x;
  if (thread < head) visit(Index(thread));
  if (thread >= kCount && thread - kCount < tail) visit(n - tail + thread - kCount);
}

// n elements to an image in shared memory, fast where that lies past 16 bytes as they do; there after wait_copies and a
// barrier.
template <class T>
__device__ __forceinline__ void bring(const T* from, int n, T* image) {
  if (phase_of(from) == phase_of(image)) {
    each_vector<T>(phase_of(from), n, [&](int i) { copy_async(image + i, from + i); },
                   [&](int i) { image[i] = from[i]; });
  } else {
#pragma unroll 4
    for (int i = threadIdx.x; i < n; i += blockDim.x) image[i] = from[i];
  }
  commit_copies();
}

template <class T, class Real>
__device__ __forceinline__ void fill(T* to, int64_t n, Real value) {
  Vector<T> x;
#pragma unroll
  for (int j = 0; j < static_cast<int>(16 / sizeof(T)); ++j) narrow(value, x.value[j]);
  uint4 bits;  // as one store
  memcpy(&bits, &x, sizeof bits);
  each_vector<T>(phase_of(to), n, [&](int64_t i) {
    __stwb(reinterpret_cast<uint4*>(to + i), bits);
  }, [&](int64_t i) { to[i] = x.value[0]; });
}

// Held classes' gradients, which stand in an image, to global memory.
template <class T, class Real, int kGroup>
__device__ __forceinline__ void write(const HeldClasses<T, Real, kGroup>& held, int image, T* to) {
  const T* from = shared_at<T>(image);
  if ((sizeof(T) < sizeof(Real) && held.wide) || phase_of(from) != phase_of(to)) {
    for (int i = threadIdx.x; i < held.n; i += blockDim.x) narrow(held.get(image, i), to[i]);
    return;
  }
  each_vector<T>(phase_of(to), held.n, [&](int i) {
    *reinterpret_cast<Vector<T>*>(to + i) = *reinterpret_cast<const Vector<T>*>(from + i);
  }, [&](int i) { to[i] = from[i]; });
}

// ---- the passes ---------------------------------------------------------------------------------

// One block's walk over rows. Members that a row changes are the same in all threads, but for what its own
// classes add up to.
template <class T, int kGroup>
struct RowWalk {
  using Real = typename Compute<T>::type;
  using Transform = math::Transform<Real>;
  using Group = Real[kGroup];

  const LossParams& p;
  const DivergenceTask<Real>& task;
  RowShared<Real>& shared;
  int64_t row;
  int64_t label;  // of the slice; may lie outside
  bool staged;  // the row's only chunk is in shared memory
  bool first_pass;
  HeldClasses<T, Real, kGroup> held;

  __device__ __forceinline__ const T* student_row() const {
    return row_at<T>(p.student, p.student_rows, row);
  }
  __device__ __forceinline__ const T* teacher_row(int k) const {
    return row_at<T>(p.teacher_data[k], p.teacher_rows[k], row);
  }
  __device__ __forceinline__ T* gradient_row() const {
    return row_at<T>(p.gradient, p.gradient_rows, row);
  }
  __device__ __forceinline__ T* teacher_gradient_row() const {
    return row_at<T>(p.teacher_gradient, p.teacher_gradient_rows, row);
  }
  __device__ __forceinline__ double weight() const {
    return p.weight != nullptr ? static_cast<double>(static_cast<const Real*>(p.weight)[row]) : 1.0;
  }
  __device__ __forceinline__ int64_t column(int k) const {
    return shared_at<int64_t>(task.column)[k];
  }

  template <class F>
  __device__ __forceinline__ void each(int n, F f) const {
#pragma unroll 1
    for (int i = threadIdx.x; i < n; i += blockDim.x) f(i);
  }

  // A chunk of one side through `raw`: f(i, logit).
  template <class F>
  __device__ __forceinline__ void through_raw(const T* from, int n, F f) {
    __syncthreads();
    T* image = shared_at<T>(task.raw) + phase_of(from);
    bring(from, n, image);
    wait_copies<0>();
    __syncthreads();
    each(n, [&](int i) { f(i, static_cast<Real>(widen(image[i]))); });
  }
  __device__ __forceinline__ Real student_logit(Real x) const {
    return math::Logits<Real>::of_student(task.logits, x);
  }
  __device__ __forceinline__ Real teacher_logit(Real x) const {
    return math::Logits<Real>::of_teacher(task.logits, x);
  }
  __device__ __forceinline__ Real student_at(int i) const {
    const Real x = held.get(held.u, i);
    return task.changes ? student_logit(x) : x;
  }
  __device__ __forceinline__ Real teacher_at(int i) const {
    const Real x = held.get(held.t, i);
    return task.changes ? teacher_logit(x) : x;
  }
  template <class Visit>
  __device__ __forceinline__ void each_group(Visit visit) const {
    const bool changes = task.changes && !held.entries;
    held.each_group([&](int i, Group& u, Group& t) {
      if (changes) {
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
          u[j] = student_logit(u[j]);
          if (held.has_teacher) t[j] = teacher_logit(t[j]);
        }
      }
      visit(i, u, t);
    });
  }

  // What is needed of each of several teachers to mix them.
  __device__ __forceinline__ void prepare_mixture() {
    enum { kMoment, kMax, kSum };
    for (int k = 0; k < p.teachers; ++k) {
      if (p.teacher_weights[k] == 0) continue;
      for (int what = p.standardize ? kMoment : kMax; what <= (p.log_mix ? kMax : kSum); ++what) {
        Real acc[4] = {what == kMax ? Lowest<Real>::value : Real(0), 0, 0, 0};
        __syncthreads();
        const Real scale = shared.mix_scale[k], max = shared.mix_max[k];
        for (int64_t first = 0; first < p.classes; first += task.capacity) {
          through_raw(teacher_row(k) + first, chunk(first), [&](int, Real x) {
            Real y = teacher_logit(x);
            if (what == kMoment) add_moment(acc, y);
            if (what == kMax) acc[0] = Max::apply(y, acc[0]);
            if (what == kSum) acc[0] += math::exp2_nonpositive((y - max) * scale * Real(kLog2E));
          });
        }
        double total[kTotals] = {static_cast<double>(acc[0])};
        if (what == kMoment) moments_of_thread(acc, total);
        if (what == kMax) {
          reduce_block<Max>(total, 1, shared.totals);
        } else {
          reduce_block<Sum>(total, 3, shared.totals);
        }
        if (threadIdx.x != 0) continue;
        if (what == kMoment) {
          shared.state.count_t = total[0];
          shared.state.moment_t = total[1];
          shared.state.square_t = total[2];
        } else if (what == kMax) {
          math::RowTask alone = task.row;
          alone.mixed = false;
          math::scales(alone, shared.state, shared.exact);
          shared.mix_max[k] = static_cast<Real>(total[0]);
          shared.mix_scale[k] =
              static_cast<Real>(shared.exact.scale_t * (p.log_mix ? p.teacher_weights[k] : 1.0));
          shared.mix_shift[k] = 0;
        } else {
          shared.mix_shift[k] = static_cast<Real>(math::log_acc(p.teacher_weights[k] / total[0]));
        }
      }
    }
    __syncthreads();
  }

  // Classes [first, first + held.n) into shared memory, transformed.
  __device__ __forceinline__ void load_transformed(int64_t first) {
    Real *u = shared_at<Real>(held.u), *t = shared_at<Real>(held.t);
    through_raw(student_row() + first, held.n, [&](int i, Real x) { u[i] = student_logit(x); });
    if (!held.has_teacher) return;
    const bool mix = p.teachers > 1;
    if (mix) each(held.n, [&](int i) { t[i] = p.log_mix ? Real(0) : -Real(INFINITY); });
    for (int k = 0; k < p.teachers; ++k) {
      if (mix && p.teacher_weights[k] == 0) continue;
      const Real scale = shared.mix_scale[k], max = shared.mix_max[k], shift = shared.mix_shift[k];
      through_raw(teacher_row(k) + first, held.n, [&](int i, Real x) {
        Real y = teacher_logit(x);
        if (mix) {
          y = math::fma(y - max, scale, shift);
          y = p.log_mix ? t[i] + y : math::log_add(t[i], y);
        }
        t[i] = y;
      });
    }
    if (mix) each(held.n, [&](int i) { t[i] *= task.temperature; });
  }

  // The chunk of the row's own classes from `first` on, with -inf for what is kept separate.
  __device__ __forceinline__ void stage_chunk(int64_t first) {
    const T* z = student_row() + first;
    const T* t = task.reads_teacher ? teacher_row(0) + first : nullptr;
    // Images lie past 16 bytes as what the student's is copied from, or to.
    int phase = 0;
    if (!task.transformed) {
      phase = phase_of(z);
    } else if (sizeof(T) == sizeof(Real)) {
      if (p.gradient != nullptr) {
        phase = phase_of(gradient_row() + first);
      } else if (p.teacher_gradient != nullptr) {
        phase = phase_of(teacher_gradient_row() + first);
      }
    }
    const int shift = phase * static_cast<int>(sizeof(T));
    held = {
        task.student_image + shift, task.teacher_image + shift, phase % kGroup, first, chunk(first),
        task.transformed,           task.reads_teacher,         false};
    if (staged) return;
    staged = p.classes <= task.capacity;
    __syncthreads();  // the last chunk is no longer needed
    if (task.transformed) {
      load_transformed(first);
    } else {
      bring(z, held.n, shared_at<T>(held.u));
      if (t != nullptr) bring(t, held.n, shared_at<T>(held.t));
      wait_copies<0>();
    }
    held.pad();
    __syncthreads();
    if (first_pass && task.row.smoothing > 0 && task.row.cross_entropy) {
      Real sum = 0;
      each(held.n, [&](int i) { sum += student_at(i); });
      double total[kTotals] = {static_cast<double>(sum)};
      reduce_block<Sum>(total, 1, shared.totals);
      if (threadIdx.x == 0) shared.total_u += total[0];
      __syncthreads();
    }
    if (holds_label()) {
      __syncthreads();
      if (threadIdx.x == 0) separate_label_at(static_cast<int>(label - first));
      __syncthreads();
    }
    if (!task.row.entries) return;
    each_entry([&](int k, int i) { held.put(held.u, i, -Real(INFINITY)); });
    __syncthreads();
  }
  __device__ __forceinline__ void separate_label_at(int at) {
    shared.label_u = student_at(at);
    shared.label_t = task.reads_teacher ? teacher_at(at) : Real(0);
    if (!task.row.separate_label) return;
    held.put(held.u, at, -Real(INFINITY));
    if (task.reads_teacher) held.put(held.t, at, -Real(INFINITY));
  }

  // f(k, i) for the entries that are in the chunk, at i of it.
  template <class F>
  __device__ __forceinline__ void each_entry(F f) const {
    each(static_cast<int>(p.entries), [&](int k) {
      const int64_t i = column(k) - held.first;
      if (column(k) >= 0 && i >= 0 && i < held.n) f(k, static_cast<int>(i));
    });
  }

  // Entries into shared memory; whether a column is none of the vocabulary's.
  __device__ __forceinline__ bool load_entries() {
    const Real* values = static_cast<const Real*>(p.teacher_data[0]) + row * p.entries;
    bool bad = false;
    each(static_cast<int>(p.entries), [&](int k) {
      const int64_t i = row * p.entries + k;
      int64_t at = p.wide_indices ? static_cast<const int64_t*>(p.indices)[i]
                                  : static_cast<const int32_t*>(p.indices)[i];
      bad |= at < -1 || at >= p.all_classes;
      at -= p.first_class;
      const bool here = at >= 0 && at < p.classes && !bad;
      shared_at<int64_t>(task.column)[k] = here ? at : -1;
      Real u = here ? static_cast<Real>(widen(student_row()[at])) : -Real(INFINITY);
      shared_at<Real>(task.entry_u)[k] = student_logit(u);
      shared_at<Real>(task.entry_t)[k] = here ? values[k] : -Real(INFINITY);
    });
    entries_held().pad();
    const int entries = static_cast<int>(p.entries);
    const int behind = (kGroup - entries % kGroup) % kGroup;
    if (static_cast<int>(threadIdx.x) < behind)
      shared_at<int64_t>(task.column)[entries + threadIdx.x] = -1;
    return __syncthreads_or(bad);
  }

  __device__ __forceinline__ HeldClasses<T, Real, kGroup> entries_held() const {
    return {task.entry_u, task.entry_t, 0, 0, static_cast<int>(p.entries), true, true, true};
  }

  // Whether the label is one of the held's classes.
  __device__ __forceinline__ bool holds_label() const {
    return label >= held.first && label < held.first + held.n;
  }
  __device__ __forceinline__ int chunk(int64_t first) const {
    return static_cast<int>(p.classes - first < task.capacity ? p.classes - first : task.capacity);
  }

  // count, sum and sum of squares of finite logits, these two relative to the first, acc[3].
  __device__ __forceinline__ static void add_moment(Real* acc, Real x) {
    if (x == -Real(INFINITY)) return;
    acc[3] = acc[0] == Real(0) ? x : acc[3];
    Real y = x - acc[3];
    acc[0] += Real(1);
    acc[1] += y;
    acc[2] = math::fma(y, y, acc[2]);
  }
  __device__ __forceinline__ static void moments_of_thread(const Real* acc, double* total) {
    total[0] = acc[0];
    math::add_moments(acc[0], acc[3], acc[1], acc[2], total[1], total[2]);
  }

  // What all threads need to know for a pass.
  __device__ __forceinline__ void prepare(int stage, bool normalized) {
    if (threadIdx.x == 0) {
      if (stage >= kSums && !normalized) prepare_sums();
      if (stage > kSums && !normalized) {
        double logsumexp = p.teacher_logsumexp != nullptr
                               ? static_cast<const Real*>(p.teacher_logsumexp)[row]
                               : 0.0;
        math::normalize(task.row, shared.state, logsumexp, shared.exact);
        shared.norm = element_norm();
      }
      if (stage == kGradient) finish_row();
    }
    __syncthreads();
  }
  __device__ __forceinline__ void prepare_sums() {
    const math::RowState& x = shared.state;
    math::scales(task.row, x, shared.exact);
    shared.max_s[0] = static_cast<Real>(x.max_s);
    shared.max_t[0] = static_cast<Real>(x.max_t);
    shared.max_s[1] = static_cast<Real>(x.entry_max_s);
    shared.max_t[1] = static_cast<Real>(x.entry_max_t);
    shared.scale_s = static_cast<Real>(shared.exact.scale_s * kLog2E);
    shared.scale_t = static_cast<Real>(shared.exact.scale_t * kLog2E);
    shared.mean_s = static_cast<Real>(shared.exact.s.mean);
    shared.inv_std_s = static_cast<Real>(shared.exact.s.inv_std);
    shared.mean_t = static_cast<Real>(shared.exact.t.mean);
    shared.inv_std_t = static_cast<Real>(shared.exact.t.inv_std);
  }

  __device__ __forceinline__ math::ElementNorm<Real> element_norm() const {
    return math::ElementNorm<Real>::of(shared.exact, task.row.separate_label || task.row.entries);
  }

  __device__ __forceinline__ void finish_row() {
    double inverse = task.device_inv_denominator != nullptr ? *task.device_inv_denominator
                                                            : task.inv_denominator;
    const math::RowGradient g =
        math::finish(task.row, shared.state, shared.exact, weight() * inverse * p.gradient_scale);
    emit(weight() * g.loss);
    shared.gradient = math::ElementGradient<Real>::of(g, shared.exact);
    if (p.statistics == nullptr) return;
    double values[math::kStatistics];
    math::statistics_of(task.row, shared.state, shared.exact,
                        static_cast<double>(label + p.first_class), g.divergence, values);
#pragma unroll
    for (int i = 0; i < math::kStatistics; ++i)
      static_cast<Real*>(p.statistics)[i * p.rows + row] = static_cast<Real>(values[i]);
  }

  // By thread 0.
  __device__ __forceinline__ void emit(double loss) {
    shared.loss += loss;
    if (p.row_loss != nullptr) static_cast<Real*>(p.row_loss)[row] = static_cast<Real>(loss);
  }

  // ---- one pass over one held, or over one chunk of it ----

  __device__ __forceinline__ void add_moments(Real (&acc)[kTotals]) const {
    each_group([&](int, const Group& u, const Group& t) {
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        add_moment(acc, u[j]);
        add_moment(acc + 4, t[j]);
      }
    });
    if (task.row.separate_label && holds_label() && threadIdx.x == 0) {
      add_moment(acc, shared.label_u);
      add_moment(acc + 4, shared.label_t);
    }
  }

  // at: the first class that has it.
  __device__ __forceinline__ void add_maximum(int first, const Group& x, Real& max,
                                              int64_t& at) const {
    Real largest = x[0];
#pragma unroll
    for (int j = 1; j < kGroup; ++j) largest = Max::apply(x[j], largest);
    if (task.best && largest > max) {
#pragma unroll
      for (int j = kGroup - 1; j >= 0; --j) {
        if (x[j] == largest) at = held.first + first + j;
      }
    }
    max = Max::apply(largest, max);
  }
  __device__ __forceinline__ void add_maxima(Real (&acc)[kTotals], int64_t& at_s,
                                             int64_t& at_t) const {
    each_group([&](int i, const Group& u, const Group& t) {
      add_maximum(i, u, acc[0], at_s);
      add_maximum(i, t, acc[1], at_t);
    });
  }

  __device__ __forceinline__ void add_sums(Real (&acc)[kTotals]) const {
    const Real max_s = shared.max_s[held.entries], max_t = shared.max_t[held.entries],
               scale_s = shared.scale_s, scale_t = shared.scale_t;
    each_group([&](int i, const Group& u, const Group& t) {
#pragma unroll
      for (int j = 0; j < kGroup; ++j) acc[0] += math::exp2_nonpositive((u[j] - max_s) * scale_s);
      if (held.has_teacher) {
#pragma unroll
        for (int j = 0; j < kGroup; ++j) acc[1] += math::exp2_nonpositive((t[j] - max_t) * scale_t);
      }
      if (task.row.cross_entropy) {
#pragma unroll
        for (int j = 0; j < kGroup; ++j)
          acc[2] += math::exp2_nonpositive((u[j] - max_s) * Real(kLog2E));
      }
      if (held.entries) {
#pragma unroll
        for (int j = 0; j < kGroup; ++j) acc[3] += column(i + j) >= 0 ? Real(1) : Real(0);
      }
    });
  }

  // What probabilities lack to a sum of 1, but for rounding.
  __device__ __forceinline__ void add_excess(Real (&acc)[kTotals]) const {
    const math::ElementNorm<Real> norm = shared.norm;
    each_group([&](int, const Group& u, const Group& t) {
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        const math::Element<Real> x = math::ElementNorm<Real>::element(norm, u[j], t[j]);
        acc[0] += math::difference(x.q, x.p, -x.d);
      }
    });
  }

  // Of a divergence: terms, or gradients in place of the logits; with the teacher's or without.
  template <class Policy, bool kGradients, bool kTeacher = false>
  __device__ __forceinline__ void divergence(Real (&acc)[kTotals]) const {
    const math::ElementNorm<Real> norm = shared.norm;
    const math::ElementGradient<Real>& g = shared.gradient;
    const int label_at = label_place();
    const bool entropies = p.statistics != nullptr || p.state != nullptr;
    each_group([&](int i, Group& u, Group& t) {
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        const math::Element<Real> x = math::ElementNorm<Real>::element(norm, u[j], t[j]);
        const math::ClassShare<Real> share = Policy::share(x, task.parameters);
        if constexpr (kGradients) {
          u[j] = student_gradient(i + j, u[j], math::fma(g.of_a, share.a, g.of_q * x.q), label_at);
          if (kTeacher) t[j] = teacher_gradient(t[j], math::fma(g.of_b, share.b, g.of_p * x.p));
          continue;
        }
        acc[0] += share.f;
        acc[1] += share.a;
        acc[2] += share.b;
        if (entropies) {
          acc[3] += math::times(x.q, math::nats(x.log2_q));
          acc[4] += math::times(x.p, math::nats(x.log2_p));
        }
        if (held.entries) acc[5] += x.q;
        if (task.row.standardize) add_moved(u[j], t[j], x, share, acc);
      }
      if constexpr (kGradients) {
        held.put_group(held.u, i, u);
        if (kTeacher) held.put_group(held.t, i, t);
      }
    });
  }

  // What moves mean and std of standardised logits. What is excluded is so whatever they are.
  __device__ __forceinline__ void add_moved(Real u, Real t, const math::Element<Real>& x,
                                            const math::ClassShare<Real>& share,
                                            Real (&acc)[kTotals]) const {
    const Real z = u == -Real(INFINITY) ? Real(0) : (u - shared.mean_s) * shared.inv_std_s;
    acc[7] += math::times(share.a, z);
    acc[8] += math::times(x.q, z);
    const Real zt = t == -Real(INFINITY) ? Real(0) : (t - shared.mean_t) * shared.inv_std_t;
    acc[9] += math::times(share.b, zt);
    acc[10] += math::times(x.p, zt);
  }

  // Where the label is in the held; a place of none if it is not. Of entries, each says so itself.
  __device__ __forceinline__ int label_place() const {
    return !held.entries && holds_label() ? static_cast<int>(label - held.first) : INT_MAX;
  }
  __device__ __forceinline__ Real student_gradient(int i, Real u, Real soft, int label_at) const {
    const math::ElementGradient<Real>& g = shared.gradient;
    Real y = math::ElementGradient<Real>::student(g, task.row.cross_entropy, u, soft);
    if (held.entries ? column(i) == label : i == label_at) y -= g.at_label;
    return task.transformed || task.changes ? Transform::back(task.logits.student, u, y) : y;
  }
  __device__ __forceinline__ Real teacher_gradient(Real t, Real soft) const {
    Real y = math::ElementGradient<Real>::teacher(shared.gradient, t, soft);
    return p.probs ? y : Transform::back(task.logits.teacher, t, y);
  }

  // Gradients of classes that have no share of their own in the divergence.
  __device__ __forceinline__ void other_gradients() const {
    const Real max = shared.max_s[0], scale = shared.scale_s, of_other = shared.gradient.of_other;
    const int label_at = label_place();
    each_group([&](int i, Group& u, Group& t) {
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        Real soft = of_other;
        if (of_other != Real(0)) soft *= math::exp2_nonpositive((u[j] - max) * scale);
        u[j] = student_gradient(i + j, u[j], soft, label_at);
        t[j] = 0;
      }
      held.put_group(held.u, i, u);
      if (p.teacher_gradient != nullptr) held.put_group(held.t, i, t);
    });
  }

  // A chunk's gradients, as they stand in its images, to global memory.
  __device__ __forceinline__ void write_chunk() {
    __syncthreads();
    if (task.row.separate_label && holds_label() && threadIdx.x == 0) {
      const math::ElementGradient<Real>& g = shared.gradient;
      const int at = static_cast<int>(label - held.first);
      held.put(held.u, at, student_gradient(at, shared.label_u, g.label_s, at));
      if (p.teacher_gradient != nullptr)
        held.put(held.t, at, teacher_gradient(shared.label_t, g.label_t));
    }
    if (task.row.entries)
      each_entry([&](int k, int i) { held.put(held.u, i, shared_at<Real>(task.entry_u)[k]); });
    __syncthreads();
    if (p.teacher_gradient != nullptr && p.probs) {
      // In the probability itself, which still stands in `raw`.
      const T* prob = shared_at<T>(task.raw) + phase_of(teacher_row(0) + held.first);
      each(held.n, [&](int i) {
        Real y = static_cast<Real>(widen(prob[i]));
        held.put(held.t, i, y == Real(0) ? Real(0) : held.get(held.t, i) / y);
      });
      __syncthreads();
    }
    if (p.gradient != nullptr) write(held, held.u, gradient_row() + held.first);
    if (p.teacher_gradient != nullptr) write(held, held.t, teacher_gradient_row() + held.first);
  }

  // What a pass added up over a held, into the row's state.
  __device__ __forceinline__ void collect(int stage, Real (&acc)[kTotals], int64_t at_s,
                                          int64_t at_t) {
    math::RowState& x = shared.state;
    double total[kTotals];
#pragma unroll
    for (int v = 0; v < kTotals; ++v) total[v] = acc[v];
    if (stage == kMaxima) {
      reduce_block<Max>(total, 2, shared.totals);
      if (threadIdx.x == 0) {
        (held.entries ? x.entry_max_s : x.max_s) = total[0];
        (held.entries ? x.entry_max_t : x.max_t) = total[1];
      }
      __syncthreads();
      if (!task.best || held.entries != task.row.entries) return;
      // The first of those that found the largest.
      const double max_s = held.entries ? x.entry_max_s : x.max_s,
                   max_t = held.entries ? x.entry_max_t : x.max_t;
      total[0] = acc[0] == max_s && at_s >= 0 ? -static_cast<double>(at_s) : -INFINITY;
      total[1] = acc[1] == max_t && at_t >= 0 ? -static_cast<double>(at_t) : -INFINITY;
      reduce_block<Max>(total, 2, shared.totals);
      if (threadIdx.x == 0) {
        x.best_s = best_class(-total[0]);
        x.best_t = best_class(-total[1]);
      }
    } else {
      if (stage == kMoments) {
        moments_of_thread(acc, total);
        moments_of_thread(acc + 4, total + 3);
      }
      if (stage == kTerms && held.entries) total[6] = part_p();
      const int count = stage == kMoments      ? 6
                        : stage == kSums       ? 4
                        : task.row.standardize ? kTotals
                        : task.row.entries     ? 7
                                               : 5;
      reduce_block<Sum>(total, count, shared.totals);
      if (stage == kRefine) __syncthreads();  // all have read what this changes
      if (threadIdx.x == 0) keep(stage, total);
    }
    __syncthreads();
  }
  // A thread's share of the entries' probability: fp64, because one less all of it is a probability too.
  __device__ __forceinline__ double part_p() const {
    double sum = 0;
    each(held.n, [&](int i) {
      const double above = held.get(held.t, i) - shared.exact.max_t;
      sum += math::exp_acc(above * shared.exact.scale_t - shared.exact.log_sum_t);
    });
    return sum;
  }
  __device__ __forceinline__ double best_class(double at) const {
    if (!(at < INFINITY)) at = 0;
    if (held.entries) at = static_cast<double>(column(static_cast<int>(at)));
    return at + static_cast<double>(p.first_class);
  }
  __device__ __forceinline__ void keep(int stage, const double (&total)[kTotals]) {
    math::RowState& x = shared.state;
    if (stage == kMoments) {
      x.count_s = total[0];
      x.moment_s = total[1];
      x.square_s = total[2];
      x.count_t = total[3];
      x.moment_t = total[4];
      x.square_t = total[5];
    } else if (stage == kSums && held.entries) {
      x.entry_sum_s = total[0];
      x.entry_sum_t = total[1];
      x.entry_hard = total[2];
      x.entry_count = total[3];
    } else if (stage == kSums) {
      x.sum_s = total[0];
      x.sum_t = total[1];
      x.hard = total[2];
      x.total_u = shared.total_u;
      const bool has_label = label >= 0 && label < p.classes;
      x.label_s = has_label ? shared.label_u : Real(0);
      x.label_t = has_label ? shared.label_t : Real(0);
    } else if (stage == kRefine) {
      math::refine(shared.exact, total[0]);
      shared.norm = element_norm();
    } else {
      x.f = total[0];
      x.a = total[1];
      x.b = total[2];
      x.self_s = total[3];
      x.self_t = total[4];
      x.part_q = total[5];
      x.part_p = total[6];
      x.az = total[7];
      x.qz = total[8];
      x.bz = total[9];
      x.pz = total[10];
    }
  }

  __device__ __forceinline__ void pass(int stage) {
    if (stage == kGradient && p.gradient != nullptr && !task.own) {
      const Real of_a = shared.gradient.of_a;  // NaN in a row that is
      fill(gradient_row(), p.classes, of_a == of_a ? Real(0) : of_a);
    }
    // A top-k teacher's entries, then the row's own classes.
#pragma unroll 1
    for (int entries = task.row.entries; entries >= 0; --entries) {
      if (entries == 0 && (!task.own || (stage == kTerms && task.row.entries))) break;
      Real acc[kTotals];
#pragma unroll
      for (int v = 0; v < kTotals; ++v) acc[v] = stage == kMaxima ? Lowest<Real>::value : Real(0);
      int64_t at_s = -1, at_t = -1;
      const bool compared = entries == task.row.entries;
#pragma unroll 1
      for (int64_t first = 0; first < (entries ? 1 : p.classes); first += task.capacity) {
        if (entries) {
          held = entries_held();
        } else {
          stage_chunk(first);
        }
        if (stage == kMoments) add_moments(acc);
        if (stage == kMaxima) add_maxima(acc, at_s, at_t);
        if (stage == kSums) add_sums(acc);
        if (stage == kRefine) add_excess(acc);
        if (stage >= kTerms && compared && (stage == kTerms || task.row.alpha > 0)) {
          math::with_policy(task.row, [&](auto policy) {
            using Policy = decltype(policy);
            if (stage == kTerms) {
              divergence<Policy, false>(acc);
            } else if (p.teacher_gradient == nullptr) {
              divergence<Policy, true>(acc);
            } else {
              divergence<Policy, true, true>(acc);
            }
          });
        } else if (stage == kGradient) {
          other_gradients();
        }
        if (stage == kGradient && !entries) write_chunk();
        if (entries) break;
      }
      if (stage != kGradient) {
        collect(stage, acc, at_s, at_t);
        continue;
      }
      __syncthreads();
      if (!entries) continue;
      each(held.n, [&](int k) {
        const Real y = shared_at<Real>(task.entry_u)[k];
        if (p.entry_gradient != nullptr)
          narrow(column(k) >= 0 ? y : Real(0),
                 static_cast<T*>(p.entry_gradient)[row * p.entries + k]);
        if (p.gradient != nullptr && !task.own && column(k) >= 0)
          narrow(y, gradient_row()[column(k)]);
      });
    }
  }
};

// Zero gradients of a row.
template <class T>
__device__ __forceinline__ void blank(const LossParams& p, int64_t row) {
  using Real = typename Compute<T>::type;
  if (p.gradient != nullptr) fill(row_at<T>(p.gradient, p.gradient_rows, row), p.classes, Real(0));
  if (p.teacher_gradient != nullptr)
    fill(row_at<T>(p.teacher_gradient, p.teacher_gradient_rows, row), p.classes, Real(0));
  if (p.entry_gradient != nullptr)
    fill(static_cast<T*>(p.entry_gradient) + row * p.entries, p.entries, Real(0));
}

}  // namespace
}  // namespace cuda
}  // namespace kdkernels
