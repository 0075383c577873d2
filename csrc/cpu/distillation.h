// The rows of plain logits. Included by one file per ISA level.
//
// One sweep over a row makes every exponential once, relative to a maximum that was guessed from a few classes,
// and keeps them in L2 while their sums grow; it also finds the row's largest logits, and the rare row whose
// guess was far off is done again. A second sweep reads z, t and what was kept from L2, adds the divergence's terms up
// and, for both KLs, writes the gradient; for the other divergences it keeps the terms' derivatives in the place of the
// teacher's exponentials, and a third sweep makes the gradient of them. So z and t are read from memory once and the
// gradient is written once; what is kept takes 2 (3 with cross-entropy's own) computed values per class.
#pragma once

#include <cmath>
#include <cstdlib>
#include <limits>

#include "cpu/kernels.h"
#include "cpu/short_rows.h"
#include "cpu/vector.h"
#include "math/distillation.h"
#include "row_task.h"

namespace kdkernels {
namespace cpu {
namespace {

constexpr int kPad = 16;  // the widest vector: rows that are copied are padded to a multiple of it
// Elements summed in fp32 before fp64 takes over: a dominant class would otherwise swallow the small ones
// that follow it in its lane.
constexpr int kFold = 128;
// How far ahead of its reads a row asks for memory. The hardware's own prefetchers stop at the end of a page.
constexpr int kAheadBytes = 4096;

// Rows of any divergence; see cpu/divergence.h.
void loss_rows(const LossParams& p, int64_t begin, int64_t end, double* row_loss);

KD_FN double exp2_fp64(double x) { return x == 0 ? 1.0 : __builtin_exp2(x); }

// Exponentials of the rows a thread works on; grows, and is freed with the thread.
struct RowBuffer {
  void* data = nullptr;
  size_t size = 0;
  ~RowBuffer() { std::free(data); }
  void* reserve(size_t bytes) {
    if (bytes > size) {
      std::free(data);
      size = (bytes + 63) / 64 * 64;
      data = std::aligned_alloc(64, size);
      if (data == nullptr) std::abort();
    }
    return data;
  }
};

// How far the exponents of a row may exceed their shift without any overflow, or fall behind it without loss.
constexpr double kFar = 60;
constexpr double kLargestShift = 1 << 20;
constexpr double kInfinite = std::numeric_limits<double>::infinity();

KD_FN bool near(double x, double most) { return -most <= x && x <= most; }

// Near a row's largest logit: the largest of some classes, or 0 where that is not finite.
template <class T>
KD_FN double guess(const T* row, int64_t classes) {
  using Real = typename Compute<T>::type;
  using V = Vector<Real>;
  constexpr int kLooks = 4;
  double max;
  if (classes < V::kLanes) {
    max = static_cast<double>(
        largest(load_part(row, static_cast<int>(classes), -std::numeric_limits<Real>::infinity())));
  } else {
    V m = load(row);
    for (int look = 1; look < kLooks; ++look) {
      m = larger(m, load(row + (classes - V::kLanes) * look / (kLooks - 1)));
    }
    max = static_cast<double>(largest(m));
  }
  return max - max == 0 ? max : 0.0;
}

// Of the exponents of a row's sides and of its cross-entropy: 2^(scale z - shift). The shifts are integers.
struct Shifts {
  double s, t, hard;
};
template <class Real>
struct Exponents {
  using V = Vector<Real>;
  math::Shifted<V> s, t, hard;
  // y - x = (t - early - z - late) scale + rest: of close logits exact, as in math::ElementNorm.
  V early, late, scale, rest;

  static math::Shifted<V> of(Real scale, double shift) {
    return {V(scale), V(static_cast<Real>(shift)),
            V(static_cast<Real>((shift - 127) / static_cast<double>(scale)))};
  }
  Exponents(Real scale_soft, Real scale_hard, const Shifts& shift)
      : s(of(scale_soft, shift.s)),
        t(of(scale_soft, shift.t)),
        hard(of(scale_hard, shift.hard)),
        scale(scale_soft) {
    const double exact = scale_soft;
    // On the logits' own grid, so that taking it from them rounds nothing away.
    const Real offset = static_cast<Real>(shift.t / exact) - static_cast<Real>(shift.s / exact);
    const bool far = math::magnitude(offset) > Real(1);
    early = V(far ? offset : Real(0));
    late = V(far ? Real(0) : offset);
    rest = V(static_cast<Real>(offset * exact - (shift.t - shift.s)));
  }
  // sign (difference ln 2 + above) instead.
  Exponents natural(double above, double sign) const {
    Exponents out = *this;
    const V nats(static_cast<Real>(sign * math::kLn2));
    out.scale = scale * nats;
    out.rest = fma(rest, nats, V(static_cast<Real>(sign * above)));
    return out;
  }

  // y - x, of any value where a logit is -inf.
  KD_INLINE_LAMBDA V difference(V u, V v) const { return fma(v - early - u - late, scale, rest); }
};

// add(u, v, i) for the vectors u, v at every class i of a row, padded with excluded classes, and fold() after every
// kFold of them.
template <class T, class Add, class Fold>
KD_FN void for_row(const T* z, const T* t, int64_t classes, Add add, Fold fold) {
  using Real = typename Compute<T>::type;
  constexpr int kLanes = Vector<Real>::kLanes, kAhead = kAheadBytes / sizeof(T);
  constexpr Real kExcluded = -std::numeric_limits<Real>::infinity();
  const int64_t whole = classes / kLanes * kLanes;
  for (int64_t first = 0; first < classes; first += kFold) {
    const int64_t last = first + kFold < whole ? first + kFold : whole;
    for (int64_t i = first; i < last; i += kLanes) {
      __builtin_prefetch(z + i + kAhead);
      __builtin_prefetch(t + i + kAhead);
      add(load(z + i), load(t + i), i);
    }
    if (whole < classes && classes - first <= kFold) {
      const int n = static_cast<int>(classes - whole);
      add(load_part(z + whole, n, kExcluded), load_part(t + whole, n, kExcluded), whole);
    }
    fold();
  }
}

// Makes and keeps the row's exponentials, with exponents x and y of student and teacher, and finds all sums but that of
// the logits. The maxima are the row's own; the exponentials are relative to the shifts. kCross: RowSums::cross too.
template <class T, bool kCross, bool kOwn, class Real>
KD_FN math::RowSums<double> first_sweep(const T* z, const T* t, int64_t classes,
                                        const Exponents<Real>& by, Real* ex, Real* ey, Real* eh) {
  using V = Vector<Real>;
  V max_s(-std::numeric_limits<Real>::max()), max_t = max_s;
  WideSum<Real> sum_s, sum_t, sum_hard, cross;
  const V none(Real(0));
  V part_s = none, part_t = none, part_hard = none, part_cross = none;
  auto add = [&](V u, V v, int64_t i) KD_INLINE_LAMBDA {
    max_s = larger(u, max_s);
    max_t = larger(v, max_t);
    V a = exp2_shifted(u, by.s), b = exp2_shifted(v, by.t);
    part_s = part_s + a;
    part_t = part_t + b;
    store(a, ex + i);
    store(b, ey + i);
    if constexpr (kCross) {
      part_cross = part_cross - a * select(a == none, none, by.difference(u, v));
    }
    if constexpr (kOwn) {
      V h = exp2_shifted(u, by.hard);
      part_hard = part_hard + h;
      store(h, eh + i);
    }
  };
  for_row(z, t, classes, add, [&]() KD_INLINE_LAMBDA {
    sum_s.add(part_s);
    sum_t.add(part_t);
    if constexpr (kCross) cross.add(part_cross);
    if constexpr (kOwn) sum_hard.add(part_hard);
    part_s = part_t = part_hard = part_cross = none;
  });
  return {static_cast<double>(largest(max_s)),
          static_cast<double>(largest(max_t)),
          sum_s.total(),
          sum_t.total(),
          kCross ? cross.total() : 0.0,
          kOwn ? sum_hard.total() : 0.0,
          0.0,
          0.0};
}

// The first sweep, from a guess of the shifts and, where the largest logits turn out to be far from it, once more.
// False where the row has no such logits or they are too large.
template <class T, bool kCross, bool kOwn, class Real>
bool sweep_once(const T* z, const T* t, int64_t classes, Real scale, Real scale_hard, Real* ex,
                Real* ey, Real* eh, Shifts& shift, math::RowSums<double>& sums) {
  double max_s = guess(z, classes), max_t = guess(t, classes);
  for (int tries = 0; tries < 2; ++tries) {
    shift = {__builtin_rint(max_s * scale), __builtin_rint(max_t * scale),
             __builtin_rint(max_s * scale_hard)};
    if (!near(shift.s, kLargestShift) || !near(shift.t, kLargestShift) ||
        !near(shift.hard, kLargestShift)) {
      return false;
    }
    const Exponents<Real> by(scale, scale_hard, shift);
    sums = first_sweep<T, kCross, kOwn>(z, t, classes, by, ex, ey, eh);
    max_s = sums.max_s;
    max_t = sums.max_t;
    if (near(max_s * scale - shift.s, kFar) && near(max_t * scale - shift.t, kFar) &&
        near(max_s * scale_hard - shift.hard, kFar)) {
      return true;
    }
  }
  return false;
}

// The sum of the divergence's terms; and the gradient, which may be written over z. label: -1 where there is none.
template <class T, class Policy, math::CrossEntropy kHard, bool kGradient, class Real>
KD_FN double second_sweep(const T* z, const T* t, int64_t classes, const Exponents<Real>& by,
                          const math::RowResult<double>& row, const Real* ex, const Real* ey,
                          const Real* eh, int64_t label, T* gradient) {
  using V = Vector<Real>;
  constexpr bool kOwn = kHard == math::CrossEntropy::kOwn,
                 kLabels = kHard != math::CrossEntropy::kNone;
  const Exponents<Real> natural = by.natural(row.above, Policy::kSign);
  const V inv_s(static_cast<Real>(row.inv_s)), inv_t(static_cast<Real>(row.inv_t)),
      of_q(static_cast<Real>(row.of_q)), other(static_cast<Real>(row.other)),
      of_hard(static_cast<Real>(row.of_hard)), uniform(static_cast<Real>(row.uniform)),
      none(Real(0)), least(Real(math::kLeast));
  auto element = [&](V a, V b, V e, V h) KD_INLINE_LAMBDA {
    math::TermAndGradient<V> x =
        Policy::element(of_q, other, b * inv_t, a * inv_s, larger(e, least));
    if constexpr (kLabels) x.gradient = fma(of_hard, kOwn ? h : a, x.gradient - uniform);
    return x;
  };
  Real at_label = 0;  // before its logit is written over
  if (kGradient && label >= 0) {
    const V d = natural.difference(V(Real(widen(z[label]))), V(Real(widen(t[label]))));
    const V h(kOwn ? eh[label] : Real(0));
    at_label = element(V(ex[label]), V(ey[label]), d, h).gradient.lanes[0] -
               static_cast<Real>(row.at_label);
  }
  WideSum<Real> sum;
  V part = none;
  const int64_t whole = classes / V::kLanes * V::kLanes;
  auto add = [&](V u, V v, int64_t i) KD_INLINE_LAMBDA {
    const math::TermAndGradient<V> x =
        element(load(ex + i), load(ey + i), natural.difference(u, v), kOwn ? load(eh + i) : none);
    part = part + x.term;
    if constexpr (kGradient) {
      if (i < whole) {
        store(x.gradient, gradient + i);
      } else {
        store_part(x.gradient, static_cast<int>(classes - whole), gradient + whole);
      }
    }
  };
  for_row(z, t, classes, add, [&]() KD_INLINE_LAMBDA {
    sum.add(part);
    part = none;
  });
  if (kGradient && label >= 0) narrow(at_label, gradient[label]);
  return sum.total();
}

// Elements of a row whose normalizers are known; a logit of an excluded class may give any d, with probabilities of 0.
template <class T>
struct Elements {
  using Real = typename Compute<T>::type;
  using V = Vector<Real>;
  using Element = math::Element<V, sizeof(T) == 2>;
  Exponents<Real> by;
  V inv_s, inv_t, above_s, above_t;

  Elements(const Exponents<Real>& of, const math::RowResult<double>& row)
      : by(of.natural(row.above, 1)),
        inv_s(static_cast<Real>(row.inv_s)),
        inv_t(static_cast<Real>(row.inv_t)),
        above_s(static_cast<Real>(math::log_acc(row.inv_s) * math::kLog2E)),
        above_t(static_cast<Real>(math::log_acc(row.inv_t) * math::kLog2E)) {}
  KD_INLINE_LAMBDA Element element(V u, V v, V ex, V ey) const {
    const V tiny(std::numeric_limits<Real>::min());
    const V p = ey * inv_t, q = ex * inv_s;
    return {p,
            q,
            smaller(p, q) / (larger(p, q) + tiny),
            by.difference(u, v),
            fma(v, by.t.scale, -by.t.shift) + above_t,
            fma(u, by.s.scale, -by.s.shift) + above_s};
  }
};

// Sums over a row of f and a of math::ClassShare.
struct TermSums {
  double f, a;
};

template <class Real>
KD_FN math::Parameters<Vector<Real>> in_every_lane(const math::Parameters<Real>& x) {
  using V = Vector<Real>;
  math::Parameters<V> y;
  y.alpha = V(x.alpha);
  y.beta = V(x.beta);
  y.close = V(x.close);
  for (int n = 0; n < math::Parameters<Real>::kTerms; ++n) {
    y.f[n] = V(x.f[n]);
    y.a[n] = V(x.a[n]);
    y.b[n] = V(x.b[n]);
  }
  return y;
}

// Adds up the terms; a takes the place of the teacher's exponentials.
template <class T, class Policy, class Real>
TermSums terms_sweep(const T* z, const T* t, int64_t classes, const Elements<T>& row,
                     const math::Parameters<Real>& of, const Real* ex, Real* ey) {
  using V = Vector<Real>;
  const math::Parameters<V> parameters = in_every_lane(of);  // no store can change a copy
  WideSum<Real> sum_f, sum_a;
  V part_f(Real(0)), part_a(Real(0));
  auto add = [&](V u, V v, int64_t i) KD_INLINE_LAMBDA {
    const math::ClassShare<V> share =
        Policy::share(row.element(u, v, load(ex + i), load(ey + i)), parameters);
    part_f = part_f + share.f;
    part_a = part_a + share.a;
    store(share.a, ey + i);
  };
  for_row(z, t, classes, add, [&]() KD_INLINE_LAMBDA {
    sum_f.add(part_f);
    sum_a.add(part_a);
    part_f = part_a = V(Real(0));
  });
  return {sum_f.total(), sum_a.total()};
}

// The sum of q - p: see math::refine.
template <class T, class Real>
double excess_sweep(const T* z, const T* t, int64_t classes, const Elements<T>& row, const Real* ex,
                    const Real* ey) {
  using V = Vector<Real>;
  WideSum<Real> sum;
  V part(Real(0));
  auto add = [&](V u, V v, int64_t i) KD_INLINE_LAMBDA {
    const auto x = row.element(u, v, load(ex + i), load(ey + i));
    part = part + math::difference(x.q, x.p, -x.d);
  };
  for_row(z, t, classes, add, [&]() KD_INLINE_LAMBDA {
    sum.add(part);
    part = V(Real(0));
  });
  return sum.total();
}

// The gradient, from the exponentials and what terms_sweep left.
template <class T, math::CrossEntropy kHard, class Real>
void third_sweep(int64_t classes, const math::RowResult<double>& row, const Real* ex, const Real* a,
                 const Real* eh, int64_t label, T* gradient) {
  using V = Vector<Real>;
  constexpr bool kOwn = kHard == math::CrossEntropy::kOwn,
                 kShared = kHard == math::CrossEntropy::kShared;
  const V of_a(static_cast<Real>(row.other)),
      of_ex(static_cast<Real>(row.of_q * row.inv_s + (kShared ? row.of_hard : 0.0))),
      of_hard(static_cast<Real>(row.of_hard)), uniform(static_cast<Real>(row.uniform));
  auto at = [&](int64_t i) KD_INLINE_LAMBDA {
    V y = fma(of_a, load(a + i), fma(of_ex, load(ex + i), -uniform));
    if constexpr (kOwn) y = fma(of_hard, load(eh + i), y);
    return y;
  };
  write_row(classes, gradient, at);
  if (label >= 0) {
    const Real y = at(label / V::kLanes * V::kLanes).lanes[label % V::kLanes];
    narrow(y - static_cast<Real>(row.at_label), gradient[label]);
  }
}

// The parameters of a call, which a thread makes again where they differ from its last call's.
template <class Real>
const math::Parameters<Real>& parameters_of(const LossParams& p) {
  static thread_local math::Parameters<Real> parameters;
  static thread_local math::Divergence divergence = math::Divergence::kForwardKL;
  static thread_local double alpha = -1, beta = -1;
  if (p.divergence != divergence || p.divergence_alpha != alpha || p.beta != beta) {
    parameters = math::parameters_of<Real>(p);
    divergence = p.divergence;
    beta = p.beta;
    alpha = p.divergence_alpha;
  }
  return parameters;
}

// The second sweep and, where there is a gradient, the third: the sum of the terms, or NaN.
template <class T, math::CrossEntropy kHard, class Real>
double second_and_third_sweep(const LossParams& p, const T* z, const T* t,
                              const Exponents<Real>& by, math::RowResult<double> row,
                              const Real* ex, Real* ey, const Real* eh, int64_t label,
                              T* gradient) {
  if (math::needs_exact_sums(p.divergence)) {
    const double excess =
        excess_sweep(z, t, p.classes, Elements<T>(by, row), ex, static_cast<const Real*>(ey));
    // Of the ratio alone: each side's probabilities add up to 1 as they are.
    row.above += math::log_of_excess(excess);
  }
  const Elements<T> elements(by, row);
  const math::Parameters<Real>& parameters = parameters_of<Real>(p);
  TermSums sums = {};
  math::with_policy(p, [&](auto policy) {
    using Policy = decltype(policy);
    if constexpr (!math::kTwoSweeps<Policy>)
      sums = terms_sweep<T, Policy>(z, t, p.classes, elements, parameters, ex, ey);
  });
  row.of_q = -row.other * sums.a;
  if (gradient != nullptr && sums.f + math::magnitude(sums.a) < kInfinite)
    third_sweep<T, kHard>(p.classes, row, ex, static_cast<const Real*>(ey), eh, label, gradient);
  return (sums.f < 0 ? 0.0 : sums.f) + 0 * sums.a;  // the sum of rounded terms is not negative
}

template <class T, class Policy, math::CrossEntropy kHard>
void rows(const LossParams& p, int64_t begin, int64_t end, double* row_loss) {
  using Real = typename Compute<T>::type;
  static thread_local RowBuffer buffer;
  constexpr bool kOwn = kHard == math::CrossEntropy::kOwn,
                 kLabels = kHard != math::CrossEntropy::kNone;

  const bool keep = p.gradient != nullptr;
  const int64_t padded = (p.classes + kPad - 1) / kPad * kPad;
  const size_t values = static_cast<size_t>((kOwn ? 3 : 2) * padded);
  Real* ex = static_cast<Real*>(buffer.reserve(values * sizeof(Real)));
  Real *ey = ex + padded, *eh = ey + padded;
  // The same rounded factors for elements and for sums.
  const Real scale_real = static_cast<Real>(math::kLog2E / p.temperature),
             scale_hard_real = static_cast<Real>(kOwn ? math::kLog2E : scale_real);
  const double scale_hard = scale_hard_real;

  for (int64_t row = begin; row < end; ++row) {
    const T* z = row_at<T>(p.student, p.student_rows, row);
    const T* t = row_at<T>(p.teacher_data[0], p.teacher_rows[0], row);
    T* gradient = keep ? row_at<T>(p.gradient, p.gradient_rows, row) : nullptr;
    const int64_t label = p.labels != nullptr ? p.labels[row] : -1;
    const double weight = p.weight != nullptr ? static_cast<const Real*>(p.weight)[row] : 1.0;
    if ((p.labels != nullptr && label == p.ignore_index) || weight == 0) {
      row_loss[row] = 0;
      if (keep) std::memset(static_cast<void*>(gradient), 0, p.classes * sizeof(T));
      continue;
    }

    Shifts shift;
    math::RowSums<double> sums;
    bool done = sweep_once<T, Policy::kCross, kOwn>(z, t, p.classes, scale_real, scale_hard_real,
                                                    ex, ey, eh, shift, sums);
    double factor =
        p.denominator.number != 0 ? weight / p.denominator.number * p.gradient_scale : 0.0;
    math::RowResult<double> result = {};
    if (done) {
      const double zero = shift.hard / scale_hard;  // the logit that cross-entropy is relative to
      if (kLabels && p.label_smoothing > 0) {
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < p.classes; ++i) sum += static_cast<double>(widen(z[i])) - zero;
        sums.sum_z = sum;
      }
      double label_z = kLabels ? static_cast<double>(widen(z[label])) - zero : 0.0;
      result = math::finish_row<Policy, double>(kHard, sums, 1.0 / static_cast<double>(p.classes),
                                                p.temperature, p.alpha, p.label_smoothing, label_z,
                                                factor);
      // Not so where a logit is NaN, or where p excludes a class that q has.
      done = sums.sum_s + sums.sum_t + sums.sum_hard + math::magnitude(sums.cross) < kInfinite;
    }
    if (!done) {
      divergence_rows_of<T>(p, row, row + 1, row_loss);
      continue;
    }
    const Exponents<Real> by(scale_real, scale_hard_real, shift);
    const int64_t at = kLabels ? label : -1;
    double terms;
    if constexpr (math::kThirdSweep<Policy>) {
      terms = second_and_third_sweep<T, kHard>(p, z, t, by, result, ex, ey, eh, at,
                                               keep ? gradient : nullptr);
      if (!(terms < kInfinite)) {
        divergence_rows_of<T>(p, row, row + 1, row_loss);
        continue;
      }
    } else {
      terms = keep ? second_sweep<T, Policy, kHard, true>(z, t, p.classes, by, result, ex, ey, eh,
                                                          at, gradient)
                   : second_sweep<T, Policy, kHard, false>(z, t, p.classes, by, result, ex, ey, eh,
                                                           at, gradient);
    }
    row_loss[row] = weight * (result.loss + (p.alpha > 0 ? result.of_term * terms : 0.0));
  }
}

// The rows of a call that is of plain logits by the kernels that are made for its divergence. False where none is.
template <class T, math::CrossEntropy kHard>
bool plain_rows_with(const LossParams& p, int64_t begin, int64_t end, double* row_loss) {
  if (p.divergence == math::Divergence::kForwardKL) {
    rows<T, math::ForwardSweeps, kHard>(p, begin, end, row_loss);
  } else if (p.divergence == math::Divergence::kReverseKL) {
    rows<T, math::ReverseSweeps, kHard>(p, begin, end, row_loss);
  } else if (math::has_third_sweep(p, sizeof(T) == 2)) {
    rows<T, math::AnySweeps, kHard>(p, begin, end, row_loss);
  } else {
    return false;
  }
  return true;
}

template <class T>
bool plain_rows_of(const LossParams& p, int64_t begin, int64_t end, double* row_loss) {
  using math::CrossEntropy;
  if (!is_of_plain_logits(p)) return false;
  const CrossEntropy hard = p.labels == nullptr || p.alpha == 1 ? CrossEntropy::kNone
                            : p.temperature == 1                ? CrossEntropy::kShared
                                                                : CrossEntropy::kOwn;
  if (p.classes <= kShortClasses && math::has_third_sweep(p, false)) {
    using Real = typename Compute<T>::type;
    math::with_policy(p, [&](auto policy) {
      ShortRows<T, decltype(policy)>(p, hard, parameters_of<Real>(p)).run(begin, end, row_loss);
    });
    return true;
  }
  switch (hard) {
    case CrossEntropy::kNone:
      return plain_rows_with<T, CrossEntropy::kNone>(p, begin, end, row_loss);
    case CrossEntropy::kShared:
      return plain_rows_with<T, CrossEntropy::kShared>(p, begin, end, row_loss);
    default: return plain_rows_with<T, CrossEntropy::kOwn>(p, begin, end, row_loss);
  }
}

}  // namespace
}  // namespace cpu
}  // namespace kdkernels
