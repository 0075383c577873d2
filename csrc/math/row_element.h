// What one class of a row takes from the row, in the type that elements are computed in.
#pragma once

#include "math/row.h"

namespace kdkernels {
namespace math {

// u = cap tanh(scale z / cap), or scale z without a cap (0). Infinities stay. F: a number, or a vector of them.
template <class F>
struct Transform {
  using Real = RealOf<F>;
  Real scale, inner, cap, inv_cap;

  KD_FN Transform of(double scale, double cap) {
    bool capped = cap > 0;
    return {static_cast<Real>(scale), static_cast<Real>(capped ? scale / cap : 0.0),
            static_cast<Real>(cap), static_cast<Real>(capped ? 1 / cap : 0.0)};
  }
  KD_FN bool nothing(const Transform& x) { return x.cap == Real(0) && x.scale == Real(1); }
  KD_FN F apply(const Transform& x, F z) {
    const F infinity{static_cast<Real>(__builtin_inf())};
    const F u = x.cap > Real(0) ? F(x.cap) * tanh_acc(z * F(x.inner)) : z * F(x.scale);
    return select(magnitude(z) == infinity, z, u);  // a cap hides no infinity
  }
  // dL/dz of g = dL/du.
  KD_FN F back(const Transform& x, F u, F g) {
    const F scaled = g * F(x.scale);
    if (!(x.cap > Real(0))) return scaled;
    const F y = u * F(x.inv_cap), slope = (F(1) - y) * (F(1) + y);
    return select(u == F(-static_cast<Real>(__builtin_inf())), F(0), scaled * slope);
  }
};

// Both sides' logits, as a kernel compares them.
template <class F>
struct Logits {
  Transform<F> student, teacher;
  bool probs;  // the teacher has probabilities

  KD_FN bool nothing(const Logits& x) {
    return Transform<F>::nothing(x.student) && Transform<F>::nothing(x.teacher) && !x.probs;
  }
  KD_FN F of_student(const Logits& x, F z) { return Transform<F>::apply(x.student, z); }
  KD_FN F of_teacher(const Logits& x, F t) {
    if (!x.probs) return Transform<F>::apply(x.teacher, t);
    return t == F(-static_cast<RealOf<F>>(__builtin_inf())) ? t : log_acc(t);
  }
};

// log(e^a + e^b), as row.h has it in fp64. F: float, or a vector of them.
template <class F>
KD_FN F log_add(F a, F b) {
  using Real = RealOf<F>;
  const auto first = b < a;
  const F larger = select(first, a, b), smaller = select(first, b, a);
  const F y = larger + log_normal(F(1) + exp2_nonpositive((smaller - larger) * F(Real(kLog2E))));
  return select(larger == F(-static_cast<Real>(__builtin_inf())), larger, y);
}

// RowNorm for elements.
template <class Real>
struct ElementNorm {
  Real scale_s, scale_t, max_s, max_t, log_sum_s, log_sum_t;
  // d = (t - early - u - late) scale - rho: differences of close logits are exact. Which of the two holds
  // max_t - max_s depends on what rounds less. Two scales that differ (standardised logits) add (t - max_t) extra.
  Real early, late, rho, extra;

  // Where classes are kept separate, there may be no others; those then have probability 0.
  KD_FN ElementNorm of(RowNorm x, bool separate) {
    if (separate && x.log_sum_s == -__builtin_inf()) x.log_sum_s = 0;
    if (separate && x.log_sum_t == -__builtin_inf()) x.log_sum_t = 0;
    ElementNorm y;
    y.scale_s = static_cast<Real>(x.scale_s);
    y.scale_t = static_cast<Real>(x.scale_t);
    y.max_s = static_cast<Real>(x.max_s);
    y.max_t = static_cast<Real>(x.max_t);
    y.log_sum_s = static_cast<Real>(x.log_sum_s);
    y.log_sum_t = static_cast<Real>(x.log_sum_t);
    Real offset = y.max_t - y.max_s;
    bool far = magnitude(offset) > Real(1);
    y.early = far ? offset : Real(0);
    y.late = far ? Real(0) : offset;
    // What rounding took from the offset.
    double lost = (x.max_t - x.max_s) - static_cast<double>(offset);
    y.rho = static_cast<Real>(x.log_sum_t - x.log_sum_s + lost * x.scale_s);
    y.extra = static_cast<Real>(x.scale_t - x.scale_s);
    return y;
  }
  KD_FN Real log_q(const ElementNorm& x, Real u) {
    return fma(u - x.max_s, x.scale_s, -x.log_sum_s);
  }
  KD_FN Real log_p(const ElementNorm& x, Real t) {
    return fma(t - x.max_t, x.scale_t, -x.log_sum_t);
  }
  KD_FN Real d(const ElementNorm& x, Real u, Real t) {
    Real below = t - x.max_t;
    below = below > Real(-1e30) ? below : Real(-1e30);  // -inf times an extra of 0 would be NaN
    return fma(t - x.early - u - x.late, x.scale_s, fma(below, x.extra, -x.rho));
  }
  KD_FN Element<Real> element(const ElementNorm& x, Real u, Real t) {
    Element<Real> y;
    y.log2_q = log_q(x, u) * Real(kLog2E);
    y.log2_p = log_p(x, t) * Real(kLog2E);
    y.d = d(x, u, t);
    y.w = smaller_over_larger(y.d);
    y.q = exp2_nonpositive(y.log2_q);
    y.p = exp2_nonpositive(y.log2_p);
    return y;
  }
};

// RowGradient for elements.
template <class Real>
struct ElementGradient {
  Real of_a, of_q, of_other, of_hard, hard_max, uniform, at_label, of_z, mean, label_s;
  Real of_b, of_p, of_tz, mean_t, label_t;

  // Where the loss is NaN, so is the gradient, whatever its class's logits are.
  KD_FN ElementGradient of(const RowGradient& x, const RowNorm& norm) {
    const double nan = x.loss == x.loss ? 0.0 : x.loss;
    return {static_cast<Real>(x.of_a + nan),     static_cast<Real>(x.of_q),
            static_cast<Real>(x.of_other + nan), static_cast<Real>(x.of_hard),
            static_cast<Real>(x.hard_max),       static_cast<Real>(x.uniform),
            static_cast<Real>(x.at_label),       static_cast<Real>(x.of_z),
            static_cast<Real>(norm.s.mean),      static_cast<Real>(x.label_s + nan),
            static_cast<Real>(x.of_b + nan),     static_cast<Real>(x.of_p),
            static_cast<Real>(x.of_tz),          static_cast<Real>(norm.t.mean),
            static_cast<Real>(x.label_t + nan)};
  }
  // In u, from what the divergence brings.
  KD_FN Real student(const ElementGradient& x, bool cross_entropy, Real u, Real soft) {
    if (cross_entropy) {
      Real e = exp2_nonpositive((u - x.hard_max) * Real(1.4426950408889634));
      soft += fma(x.of_hard, e, -x.uniform);
    }
    if (x.of_z != Real(0) && u != -Real(__builtin_inf())) soft = fma(x.of_z, u - x.mean, soft);
    return soft;
  }
  KD_FN Real teacher(const ElementGradient& x, Real t, Real soft) {
    return x.of_tz != Real(0) && t != -Real(__builtin_inf()) ? fma(x.of_tz, t - x.mean_t, soft)
                                                             : soft;
  }
};

// Moments of values near one of them, `pivot`, as sums of themselves.
KD_FN void add_moments(double n, double pivot, double sum, double squares, double& moment,
                       double& square) {
  moment = sum + n * pivot;
  square = squares + pivot * (2 * sum + n * pivot);
}

}  // namespace math
}  // namespace kdkernels
