// The row walker for any divergence, teacher and layout. Included by one file per ISA level.
//
// Each pass of math/row.h is a loop over one row, which L2 holds: student and teacher are read where they lie or once
// into a buffer of computed values. Exponentials at temperature T are made once and kept, the terms' derivatives take
// the teacher's place, and the gradient is written once. So the buffer takes 2 to 4 values per class, 6 with a gradient of
// the teacher's.
#pragma once

#include "cpu/row_classes.h"
#include "row_task.h"

namespace kdkernels {
namespace cpu {
namespace {

// The state's fields of one row lie `rows` apart.
math::RowState load_state(const double* state, int64_t rows, int64_t row) {
  double fields[math::kRowState];
  for (int i = 0; i < math::kRowState; ++i) fields[i] = state[i * rows + row];
  math::RowState out;
  std::memcpy(&out, fields, sizeof out);
  return out;
}
void store_state(const math::RowState& x, int64_t rows, int64_t row, double* state) {
  double fields[math::kRowState];
  std::memcpy(fields, &x, sizeof x);
  for (int i = 0; i < math::kRowState; ++i) state[i * rows + row] = fields[i];
}

// One call's walk over rows. The members after `row` are of one row.
template <class T>
struct RowWalk {
  using Real = typename Compute<T>::type;
  using V = Vector<Real>;
  using Transform = math::Transform<V>;

  const LossParams& p;
  const math::RowTask task;
  const Transform of_student, of_teacher;
  const bool wants_teacher;  // what the teacher's gradient is made of
  const bool dense;  // the row's own classes are read, beside a top-k teacher's entries too
  const bool shares_hard;  // cross-entropy's exponentials are those at temperature T
  const bool watched;  // statistics are wanted, or may be by another slice
  const int first_stage;
  RowClasses<Real> own, entry;
  Real *u, *t, *entry_u, *entry_t;  // planes for logits
  int64_t* column;  // of an entry, or -1

  int64_t row;
  const T* z_row;
  int64_t label_here;  // the label's class of the slice, or -1
  double weight;
  Real label_u, label_t, max_u, max_t;
  math::RowState x;
  math::RowNorm exact;
  double total_u;

  RowWalk(const LossParams& params, RowBuffer& buffer)
      : p(params),
        task(row_task(params)),
        of_student(Transform::of(p.logit_scale, p.soft_cap)),
        of_teacher(Transform::of(p.teacher_logit_scale, p.teacher_soft_cap)),
        // A slice's terms may be for it.
        wants_teacher(p.alpha > 0 && (p.teacher_gradient != nullptr ||
                                      (p.state != nullptr && p.stages == kTerms))),
        dense(!task.renormalize || task.cross_entropy),
        shares_hard(task.temperature == 1 && !task.standardize),
        watched(p.statistics != nullptr || p.state != nullptr),
        first_stage(p.stages & -p.stages) {
    const int64_t padded = padded_to_vectors(p.classes),
                  entries = task.entries ? padded_to_vectors(p.entries) : 0;
    const int64_t planes = wants_teacher ? 6 : 4;
    Real* memory = static_cast<Real*>(
        buffer.reserve(static_cast<size_t>(planes * (padded + entries)) * sizeof(Real) +
                       static_cast<size_t>(entries) * sizeof(int64_t)));
    own = held(memory, p.classes, padded);
    entry = held(memory + planes * padded, task.entries ? p.entries : 0, entries);
    u = memory + 2 * padded;
    t = memory + 3 * padded;
    entry_u = memory + planes * padded + 2 * entries;
    entry_t = entry_u + entries;
    column = reinterpret_cast<int64_t*>(memory + planes * (padded + entries));
  }

  RowClasses<Real> held(Real* memory, int64_t n, int64_t padded) const {
    Real *q = memory, *probabilities = memory + padded, *more = memory + 4 * padded;
    return {n,
            padded,
            memory + 2 * padded,
            memory + 3 * padded,
            q,
            probabilities,
            wants_teacher ? more : probabilities,
            wants_teacher ? more + padded : probabilities};
  }
  const RowClasses<Real>& compared() const { return task.entries ? entry : own; }

  // The factor of exponentials that are rounded to Real, in powers of 2.
  static Real log2_scale(double scale) { return static_cast<Real>(scale * math::kLog2E); }

  // ---- a row ----

  void walk(int64_t at, double& loss) {
    row = at;
    const int64_t label = p.labels != nullptr ? p.labels[row] : -1;
    weight =
        p.weight != nullptr ? static_cast<double>(static_cast<const Real*>(p.weight)[row]) : 1.0;
    if ((p.labels != nullptr && label == p.ignore_index) || weight == 0) {
      leave_out(loss);
      return;
    }
    z_row = row_at<T>(p.student, p.student_rows, row);
    label_here = label - p.first_class;
    if (p.labels == nullptr || label_here < 0 || label_here >= p.classes) label_here = -1;

    x = p.state != nullptr && first_stage > kMoments ? load_state(p.state, p.rows, row)
                                                     : math::RowState{};
    read_row();
    if ((p.stages & kMoments) != 0 && task.standardize) find_moments();
    separate();
    math::scales(task, x, exact);
    if ((p.stages & kMaxima) != 0) find_maxima();
    if ((p.stages & (kSums | kTerms | kGradient)) != 0) add_exponentials();
    if ((p.stages & (kTerms | kGradient)) != 0 && task.compares) add_terms();
    if ((p.stages & kGradient) != 0) {
      finish(label, loss);
    } else {
      store_state(x, p.rows, row, p.state);
    }
  }

  void leave_out(double& loss) const {
    if ((p.stages & kGradient) == 0) {
      store_state(math::RowState{}, p.rows, row, p.state);
      return;
    }
    loss = 0;
    fill_gradients(Real(0), Real(0));
    for (int i = 0; p.statistics != nullptr && i < math::kStatistics; ++i) statistic(i) = 0;
  }

  Real& statistic(int i) const { return static_cast<Real*>(p.statistics)[i * p.rows + row]; }
  T* gradient_row() const { return row_at<T>(p.gradient, p.gradient_rows, row); }
  T* teacher_gradient_row() const {
    return row_at<T>(p.teacher_gradient, p.teacher_gradient_rows, row);
  }
  T* entry_gradient_row() const { return static_cast<T*>(p.entry_gradient) + row * p.entries; }
  const T* teacher_row(int k) const { return row_at<T>(p.teacher_data[k], p.teacher_rows[k], row); }

  void fill_gradients(Real student, Real teacher) const {
    auto fill = [](T* out, int64_t n, Real value) {
      for (int64_t i = 0; i < n; ++i) narrow(value, out[i]);
    };
    if (p.gradient != nullptr) fill(gradient_row(), p.classes, student);
    if (p.teacher_gradient != nullptr) fill(teacher_gradient_row(), p.classes, teacher);
    if (p.entry_gradient != nullptr) fill(entry_gradient_row(), p.entries, student);
  }

  // ---- load ----

  // The row itself, where it can be read as it is.
  const Real* in_place(const T* in, bool changes, Real& max) const {
    if constexpr (sizeof(T) == sizeof(Real)) {
      if (own.n == own.padded && !changes && !task.separate_label && !task.entries) {
        max = max_of(in, own.padded);
        return in;
      }
    }
    return nullptr;
  }

  Real load_logits(const T* in, const Transform of, Real* out) const {
    const Real excluded = -kInfinity<Real>;
    if (Transform::nothing(of)) {
      return load_row(in, own.n, own.padded, excluded, out, [](V x) KD_INLINE_LAMBDA { return x; });
    }
    return load_row(in, own.n, own.padded, excluded, out,
                    [=](V x) KD_INLINE_LAMBDA { return Transform::apply(of, x); });
  }

  void read_row() {
    label_u = label_t = max_u = max_t = 0;
    total_u = 0;
    if (dense) {
      own.u = in_place(z_row, !Transform::nothing(of_student), max_u);
      if (own.u == nullptr) {
        max_u = load_logits(z_row, of_student, u);
        own.u = u;
      }
    }
    if (label_here >= 0) {
      label_u = Transform::apply(of_student, V(Real(widen(z_row[label_here])))).lanes[0];
    }
    if (task.cross_entropy && task.smoothing > 0 && (p.stages & kSums) != 0) {
      const Real* logits = own.u;
      for (int64_t i = 0; i < own.n; ++i) total_u += logits[i];  // the padding is -inf
    }
    if (task.entries) {
      load_entries();
    } else if (task.compares) {
      load_teacher();
      if (label_here >= 0) label_t = own.t[label_here];
    }
  }

  void load_teacher() {
    const bool changes = p.probs || p.teachers > 1 || !Transform::nothing(of_teacher);
    own.t = in_place(teacher_row(0), changes, max_t);
    if (own.t != nullptr) return;
    own.t = t;
    if (p.teachers > 1) {
      mix_teachers();
    } else {
      max_t = load_one(0, t);
    }
  }

  Real load_one(int k, Real* out) const {
    if (!p.probs) return load_logits(teacher_row(k), of_teacher, out);
    return load_row(teacher_row(k), own.n, own.padded, Real(0), out,
                    [](V x) KD_INLINE_LAMBDA { return log_acc(x); });
  }

  // Several teachers as one: the logarithm of their mixture times the temperature, so that it is logits again.
  // A share may underflow where its logarithm does not.
  void mix_teachers() {
    Real* out = t;
    const bool log_mix = p.log_mix;
    bool first = true;
    for (int k = 0; k < p.teachers; ++k) {
      if (p.teacher_weights[k] == 0) continue;
      Real* logits = own.q;
      Real max = load_one(k, logits);
      const double scale = scale_of(logits), w = p.teacher_weights[k];
      double sum = p.log_mix ? 1.0
                             : exponential_sum(logits, own.padded, max,
                                               static_cast<Real>(scale * math::kLog2E));
      const V factor(static_cast<Real>(p.log_mix ? scale * w : scale)),
          shift(static_cast<Real>(p.log_mix ? 0.0 : math::log_acc(w / sum))), top(max);
      for_vectors<Real>(own.padded, [&, out, logits](int64_t i) KD_INLINE_LAMBDA {
        V y = fma(load(logits + i) - top, factor, shift);
        if (!first) y = log_mix ? load(out + i) + y : math::log_add(load(out + i), y);
        store(y, out + i);
      });
      first = false;
    }
    const V temperature(static_cast<Real>(task.temperature));
    max_t = load_row(out, own.padded, own.padded, -kInfinity<Real>, out,
                     [=](V x) KD_INLINE_LAMBDA { return x * temperature; });
  }

  // Of one teacher's logits, standardised or not.
  double scale_of(const Real* logits) const {
    math::RowTask alone = task;
    alone.mixed = false;
    math::RowState moments = {};
    math::RowNorm norm;
    if (task.standardize) {
      add_moments(logits, own.padded, moments.count_t, moments.moment_t, moments.square_t);
    }
    math::scales(alone, moments, norm);
    return norm.scale_t;
  }

  void load_entries() {
    const Real* values = static_cast<const Real*>(p.teacher_data[0]) + row * p.entries;
    for (int64_t k = 0; k < entry.padded; ++k) {
      int64_t at = -1;
      if (k < entry.n) {
        at = p.wide_indices ? static_cast<const int64_t*>(p.indices)[row * p.entries + k]
                            : static_cast<const int32_t*>(p.indices)[row * p.entries + k];
      }
      at -= p.first_class;
      column[k] = at >= 0 && at < p.classes ? at : -1;
      bool here = column[k] >= 0;
      entry_u[k] = here ? static_cast<Real>(widen(z_row[at])) : -kInfinity<Real>;
      entry_t[k] = here ? values[k] : -kInfinity<Real>;
    }
    load_row(entry_u, entry.padded, entry.padded, -kInfinity<Real>, entry_u,
             [of = of_student](V x) KD_INLINE_LAMBDA { return Transform::apply(of, x); });
  }

  // ---- moments, maxima, sums ----

  void find_moments() {
    add_moments(own.u, own.padded, x.count_s, x.moment_s, x.square_s);
    if (!task.mixed) add_moments(own.t, own.padded, x.count_t, x.moment_t, x.square_t);
  }

  // Takes the label (DKD) or the entries out of the row's own classes.
  void separate() {
    if (task.separate_label && label_here >= 0) {
      u[label_here] = t[label_here] = -kInfinity<Real>;
      max_u = max_of(u, own.padded);
      max_t = max_of(t, own.padded);
    }
    if (!task.entries || !dense) return;
    for (int64_t k = 0; k < entry.n; ++k) {
      if (column[k] >= 0) u[column[k]] = -kInfinity<Real>;
    }
    max_u = max_of(u, own.padded);
  }

  void find_maxima() {
    x.max_s = dense ? max_u : math::kLowestState;
    x.max_t = task.compares && !task.entries ? max_t : math::kLowestState;
    x.entry_max_s = task.entries ? max_of(entry.u, entry.padded) : math::kLowestState;
    x.entry_max_t = task.entries ? max_of(entry.t, entry.padded) : math::kLowestState;
    x.best_s = x.best_t = 0;
    if (!watched || !task.compares) return;
    const RowClasses<Real>& best = compared();
    Real top_s = static_cast<Real>(task.entries ? x.entry_max_s : x.max_s),
         top_t = static_cast<Real>(task.entries ? x.entry_max_t : x.max_t);
    int64_t s = where(best.u, best.n, best.padded, top_s),
            t = where(best.t, best.n, best.padded, top_t);
    x.best_s = static_cast<double>(p.first_class + (task.entries ? column[s] : s));
    x.best_t = static_cast<double>(p.first_class + (task.entries ? column[t] : t));
  }

  void add_exponentials() {
    math::RowState now = {};
    const Real scale_s = log2_scale(exact.scale_s), scale_t = log2_scale(exact.scale_t),
               max_s = finite_max<Real>(x.max_s), max_t = finite_max<Real>(x.max_t),
               entry_max_s = finite_max<Real>(x.entry_max_s),
               entry_max_t = finite_max<Real>(x.entry_max_t);
    if (dense) now.sum_s = exponentials(own.u, own.q, own.padded, max_s, scale_s);
    if (task.entries) {
      now.entry_sum_s = exponentials(entry.u, entry.q, entry.padded, entry_max_s, scale_s);
      now.entry_sum_t = exponentials(entry.t, entry.p, entry.padded, entry_max_t, scale_t);
    } else if (task.compares) {
      now.sum_t = exponentials(own.t, own.p, own.padded, max_t, scale_t);
    }
    if ((p.stages & kSums) == 0) return;
    if (task.cross_entropy) {
      now.hard =
          shares_hard ? now.sum_s : exponential_sum(own.u, own.padded, max_s, kLog2EOf<Real>);
      now.entry_hard = shares_hard
                           ? now.entry_sum_s
                           : exponential_sum(entry.u, entry.padded, entry_max_s, kLog2EOf<Real>);
    }
    for (int64_t k = 0; k < entry.n; ++k) now.entry_count += column[k] >= 0 ? 1.0 : 0.0;
    x.sum_s = now.sum_s;
    x.sum_t = now.sum_t;
    x.hard = now.hard;
    x.entry_sum_s = now.entry_sum_s;
    x.entry_sum_t = now.entry_sum_t;
    x.entry_hard = now.entry_hard;
    x.entry_count = now.entry_count;
    x.total_u = total_u;
    x.label_s = label_u;
    x.label_t = label_t;
  }

  // ---- terms ----

  // What makes probabilities of the exponentials relative to these maxima.
  double inverse_s(double max) const {
    return exponent((max - exact.max_s) * exact.scale_s, exact.log_sum_s);
  }
  double inverse_t(double max) const {
    return exponent((max - exact.max_t) * exact.scale_t, exact.log_sum_t);
  }
  static double exponent(double above, double log_sum) {
    return log_sum == -kInfinity<double> ? 0.0 : exp2_fp64((above - log_sum) * math::kLog2E);
  }

  void add_terms() {
    double logsumexp = p.teacher_logsumexp != nullptr
                           ? static_cast<double>(static_cast<const Real*>(p.teacher_logsumexp)[row])
                           : 0.0;
    math::normalize(task, x, logsumexp, exact);
    const bool separate = task.separate_label || task.entries;
    auto norm = math::ElementNorm<Real>::of(exact, separate);
    if ((p.stages & kTerms) != 0) add_other_terms(norm);
    const RowClasses<Real>& held = compared();
    const double max_s = task.entries ? x.entry_max_s : x.max_s,
                 max_t = task.entries ? x.entry_max_t : x.max_t;
    if (math::needs_exact_sums(p.divergence) && p.state == nullptr) {
      math::refine(exact, excess_of_q(held, norm, inverse_s(max_s), inverse_t(max_t)));
      norm = math::ElementNorm<Real>::of(exact, separate);
    }
    Terms sums = {};
    terms(p, held, norm, inverse_s(max_s), inverse_t(max_t), wants_teacher, sums);
    if ((p.stages & kTerms) == 0) return;
    x.f = sums.f;
    x.a = sums.a;
    x.b = sums.b;
    if (!task.standardize) return;
    x.az = times_z(held.a, held.u, held.padded, exact.s);
    x.bz = wants_teacher ? times_z(held.b, held.t, held.padded, exact.t) : 0.0;
  }

  // What rounding its sum's logarithm adds to the logarithm of every class.
  static double lost(Real rounded, double log_sum) {
    return log_sum == -kInfinity<double> ? 0.0 : rounded - log_sum;
  }

  // Sums that no divergence is needed for, before `a` takes the place of p.
  void add_other_terms(const math::ElementNorm<Real>& norm) {
    using Norm = math::ElementNorm<Real>;
    const RowClasses<Real>& held = compared();
    const double inv_s = inverse_s(task.entries ? x.entry_max_s : x.max_s),
                 inv_t = inverse_t(task.entries ? x.entry_max_t : x.max_t);
    if (watched) {
      x.self_s = inv_s * sum_of<Real>(held.padded, [&](int64_t i) KD_INLINE_LAMBDA {
        return math::times(held.q[i], Norm::log_q(norm, held.u[i]));
      });
      x.self_t = inv_t * sum_of<Real>(held.padded, [&](int64_t i) KD_INLINE_LAMBDA {
        return math::times(held.p[i], Norm::log_p(norm, held.t[i]));
      });
    }
    if (task.standardize) {
      x.qz = inv_s * times_z(held.q, held.u, held.padded, exact.s);
      x.pz = wants_teacher ? inv_t * times_z(held.p, held.t, held.padded, exact.t) : 0.0;
    }
    if (!task.entries) return;
    x.part_q = x.part_p = 0;
    // One less their sum is a probability too, so they are added up in fp64.
    for (int64_t k = 0; k < held.n; ++k) {
      x.part_q += held.q[k] * inv_s;
      x.part_p += math::exp_acc((held.t[k] - exact.max_t) * exact.scale_t - exact.log_sum_t);
    }
  }

  // The sum of w times the standardised logit; that of an excluded class is 0.
  static double times_z(const Real* w, const Real* logits, int64_t padded,
                        const math::RowMoments& moments) {
    const Real mean = static_cast<Real>(moments.mean);
    return moments.inv_std * sum_of<Real>(padded, [=](int64_t i) KD_INLINE_LAMBDA {
      return logits[i] == -kInfinity<Real> ? Real(0) : w[i] * (logits[i] - mean);
    });
  }

  // ---- loss and gradients ----

  void finish(int64_t label, double& loss) {
    const double factor =
        p.denominator.number != 0 ? weight / p.denominator.number * p.gradient_scale : 0.0;
    const math::RowGradient g = math::finish(task, x, exact, factor);
    loss = weight * g.loss;
    if (p.statistics != nullptr) {
      double values[math::kStatistics];
      math::statistics_of(task, x, exact, static_cast<double>(label), g.divergence, values);
      for (int i = 0; i < math::kStatistics; ++i) statistic(i) = static_cast<Real>(values[i]);
    }
    if (loss != loss) {
      const Real nan = std::numeric_limits<Real>::quiet_NaN();
      fill_gradients(nan, p.alpha > 0 ? nan : Real(0));
      return;
    }
    if (p.gradient != nullptr) write_student(g);
    if (task.entries && (p.gradient != nullptr || p.entry_gradient != nullptr)) write_entries(g);
    if (p.teacher_gradient != nullptr) write_teacher(g);
  }

  // of_e: of exponentials relative to `max`.
  VectorGradient<Real> vector_gradient(const math::RowGradient& g, double of_e, double max) const {
    if (shares_hard && task.cross_entropy) of_e += g.of_hard * math::exp_acc(max - g.hard_max);
    return {static_cast<Real>(g.of_a),
            static_cast<Real>(of_e),
            static_cast<Real>(shares_hard ? 0.0 : g.of_hard),
            static_cast<Real>(g.hard_max),
            static_cast<Real>(g.uniform),
            static_cast<Real>(g.of_z),
            static_cast<Real>(exact.s.mean)};
  }

  void write_student(const math::RowGradient& g) {
    T* out = gradient_row();
    if (!dense) {
      std::memset(static_cast<void*>(out), 0, static_cast<size_t>(own.n) * sizeof(T));
      return;
    }
    const bool soft = p.alpha > 0 && !task.entries;  // else no class has a share of its own
    VectorGradient<Real> of =
        vector_gradient(g, soft ? g.of_q * inverse_s(x.max_s) : g.of_other, x.max_s);
    if (!soft) of.of_a = 0;
    const Real* a = soft ? own.a : own.q;
    const Real at_label = label_here >= 0 ? label_gradient(g, of, a[label_here]) : Real(0);
    write_gradient(own, a, of, of_student, out);
    if (label_here >= 0) narrow(at_label, out[label_here]);
  }

  Real back(Real at, Real gradient) const {
    return Transform::back(of_student, V(at), V(gradient)).lanes[0];
  }

  Real label_gradient(const math::RowGradient& g, const VectorGradient<Real>& of, Real a) const {
    using Gradient = VectorGradient<Real>;
    const V u(label_u);
    V y;
    if (task.separate_label) {
      double hard = task.cross_entropy ? g.of_hard * math::exp_acc(label_u - g.hard_max) : 0.0;
      y = V(static_cast<Real>(g.label_s + hard - g.uniform));
    } else {
      y = Gradient::add_hard(of, Gradient::soft(of, V(a), V(own.q[label_here])), u);
    }
    return back(label_u, Gradient::add_z(of, y, u).lanes[0] - static_cast<Real>(g.at_label));
  }

  void write_entries(const math::RowGradient& g) {
    const bool soft = p.alpha > 0;
    VectorGradient<Real> of =
        vector_gradient(g, soft ? g.of_q * inverse_s(x.entry_max_s) : 0.0, x.entry_max_s);
    if (!soft) of.of_a = 0;
    write_gradient(entry, soft ? entry.a : entry.q, of, of_student, entry.a);
    for (int64_t k = 0; k < entry.n; ++k) {
      const bool here = column[k] >= 0;
      Real y = here ? entry.a[k] : Real(0);
      if (here && column[k] == label_here) {
        y -= back(entry.u[k], static_cast<Real>(g.at_label));
      }
      if (p.entry_gradient != nullptr) narrow(y, entry_gradient_row()[k]);
      if (p.gradient != nullptr && here) narrow(y, gradient_row()[column[k]]);
    }
  }

  void write_teacher(const math::RowGradient& g) {
    T* out = teacher_gradient_row();
    if (!wants_teacher) {
      std::memset(static_cast<void*>(out), 0, static_cast<size_t>(own.n) * sizeof(T));
      return;
    }
    const Real of_b = static_cast<Real>(g.of_b),
               of_p = static_cast<Real>(g.of_p * inverse_t(x.max_t)),
               of_tz = static_cast<Real>(g.of_tz), mean = static_cast<Real>(exact.t.mean);
    const Real *logits = own.t, *b = own.b, *e = own.p;
    const T* probabilities = p.probs ? teacher_row(0) : nullptr;
    const int64_t n = own.n;
    auto at = [of_tz, mean, probabilities, of = of_teacher](V t, V y, V probability)
                  KD_INLINE_LAMBDA {
      if (of_tz != 0) y = select(t == V(-kInfinity<Real>), y, fma(V(of_tz), t - V(mean), y));
      y = Transform::back(of, t, y);
      // In probabilities it is of their logarithm so far.
      return probabilities == nullptr
                 ? y
                 : select(probability == V(Real(0)), V(Real(0)), y / probability);
    };
    write_row(n, out, [=](int64_t i) KD_INLINE_LAMBDA {
      const V one(Real(1));
      V probability = one;
      if (probabilities != nullptr) {
        probability = i + V::kLanes <= n
                          ? load(probabilities + i)
                          : load_part(probabilities + i, static_cast<int>(n - i), Real(1));
      }
      return at(load(logits + i), fma(V(of_b), load(b + i), V(of_p) * load(e + i)), probability);
    });
    if (task.separate_label && label_here >= 0) {
      const Real probability = p.probs ? widen(probabilities[label_here]) : Real(1);
      narrow(at(V(label_t), V(static_cast<Real>(g.label_t)), V(probability)).lanes[0],
             out[label_here]);
    }
  }
};

template <class T>
void divergence_rows_of(const LossParams& p, int64_t begin, int64_t end, double* row_loss) {
  static thread_local RowBuffer buffer;
  if (!has_row_options(p)) {
    RowWalk<T> walk(p, buffer);
    for (int64_t row = begin; row < end; ++row) walk.walk(row, row_loss[row]);
    return;
  }
  for (int64_t row = begin; row < end; ++row) {
    LossParams of_row;
    options_of_row<typename Compute<T>::type>(p, row, of_row);  // the ops have checked them
    RowWalk<T>(of_row, buffer).walk(row, row_loss[row]);
  }
}

void loss_rows(const LossParams& p, int64_t begin, int64_t end, double* row_loss) {
  by_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    if (!plain_rows_of<T>(p, begin, end, row_loss)) divergence_rows_of<T>(p, begin, end, row_loss);
  });
}

}  // namespace
}  // namespace cpu
}  // namespace kdkernels
