// The loops over the classes of a row that any divergence needs, on computed values: fp32 or fp64. Included by
// one file an ISA level.
#pragma once

#include "cpu/distillation.h"
#include "math/row_element.h"

namespace kdkernels {
namespace cpu {
namespace {

constexpr int kBlock = 1024;  // classes of a row that L1 holds beside what is kept of them
template <class Real>
constexpr Real kInfinity = std::numeric_limits<Real>::infinity();
template <class Real>
constexpr Real kLog2EOf = static_cast<Real>(math::kLog2E);

// Classes [0, n) of a row, or entries of a top-k teacher, padded with excluded ones to whole vectors.
template <class Real>
struct Lane {
  int64_t n, padded;
  const Real *u, *t;  // transformed logits; where they need not be changed, the row itself
  Real *q, *p;  // exponentials relative to some maxima
  Real *a, *b;  // of ClassShare. a lies over p, unless b is wanted too
};

KD_FN int64_t padded_to_vectors(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

// A maximum that a sum of exponentials can be relative to, also where there is no logit.
template <class Real>
KD_FN Real finite_max(double max) {
  return math::larger(static_cast<Real>(max), -std::numeric_limits<Real>::max());
}

template <class Real>
KD_FN Real max_of(const Real* x, int64_t padded) {
  Real m = -std::numeric_limits<Real>::max();
#pragma omp simd reduction(max : m)
  for (int64_t i = 0; i < padded; ++i) m = x[i] > m ? x[i] : m;
  return m;
}

// The first of the classes with this logit.
template <class Real>
KD_FN int64_t where(const Real* x, int64_t n, Real value) {
  for (int64_t i = 0; i < n; ++i) {
    if (x[i] == value) return i;
  }
  return 0;
}

template <class Real>
KD_FN void transform(const math::Transform<Real>& f, Real* x, int64_t padded) {
  using Transform = math::Transform<Real>;
  if (Transform::nothing(f)) return;
#pragma omp simd
  for (int64_t i = 0; i < padded; ++i) x[i] = Transform::apply(f, x[i]);
}

// count, sum and sum of squares of the finite logits.
template <class Real>
void add_moments(const Real* x, int64_t padded, double& count, double& sum, double& squares) {
  double n = 0, s = 0, ss = 0;
#pragma omp simd reduction(+ : n, s, ss)
  for (int64_t i = 0; i < padded; ++i) {
    bool finite = x[i] != -kInfinity<Real>;
    double v = finite ? x[i] : Real(0);
    n += finite ? 1.0 : 0.0;
    s += v;
    ss += v * v;
  }
  count = n;
  sum = s;
  squares = ss;
}

// f(i, j, sums) for the classes i of [0, padded), which adds to the sums[k][j]. These are in Real over kFold
// classes, beyond them in fp64, each lane j for itself: a vector's lanes are added up once, at the end.
template <class Real, int kSums, class F>
KD_FN void add_sums(int64_t padded, double (&out)[kSums], F f) {
  alignas(64) double total[kSums][kPad] = {};
  for (int64_t first = 0; first < padded; first += kFold) {
    int64_t last = first + kFold < padded ? first + kFold : padded;
    alignas(64) Real sums[kSums][kPad] = {};
    for (int64_t i = first; i < last; i += kPad) {
#pragma omp simd
      for (int j = 0; j < kPad; ++j) f(i + j, j, sums);
    }
    for (int k = 0; k < kSums; ++k) {
#pragma omp simd
      for (int j = 0; j < kPad; ++j) total[k][j] += sums[k][j];
    }
  }
  for (int k = 0; k < kSums; ++k) {
    for (int j = 0; j < kPad; ++j) out[k] += total[k][j];
  }
}
// The sum of f(i).
template <class Real, class F>
KD_FN double sum_of(int64_t padded, F f) {
  double out[1] = {};
  add_sums<Real>(padded, out, [=](int64_t i, int j, Real(&sums)[1][kPad]) KD_INLINE_LAMBDA {
    sums[0][j] += f(i);
  });
  return out[0];
}

// y[i] = 2^((x[i] - max) scale); their sum.
template <class Real>
double exponentials(const Real* x, Real* y, int64_t padded, Real max, Real scale) {
  return sum_of<Real>(padded, [=](int64_t i) KD_INLINE_LAMBDA {
    return y[i] = math::exp2_nonpositive((x[i] - max) * scale);
  });
}

// The sum alone.
template <class Real>
double exponential_sum(const Real* x, int64_t padded, Real max, Real scale) {
  return sum_of<Real>(padded, [=](int64_t i) KD_INLINE_LAMBDA {
    return math::exp2_nonpositive((x[i] - max) * scale);
  });
}

// ---- the divergence's terms -----------------------------------------------------------------------

struct Terms {
  double f, a, b;
};

// Adds to the sums over all classes; a, and b if wanted, are kept. inv_s and inv_t make probabilities of q and p.
template <class Policy, bool kTeacher, class Real>
void terms_of(const Lane<Real>& x, const math::ElementNorm<Real>& norm, Real inv_s, Real inv_t,
              const math::Parameters<Real>& by, Terms& out) {
  using Norm = math::ElementNorm<Real>;
  // Copies, which no store to a or b can change.
  const Norm n = norm;
  const math::Parameters<Real> parameters = by;
  const Real *logits = x.u, *teacher = x.t, *q = x.q, *p = x.p;
  Real *keep_a = x.a, *keep_b = x.b;
  constexpr int kSums = kTeacher ? 3 : 2;
  double total[kSums] = {};
  add_sums<Real>(x.padded, total, [=](int64_t i, int j, Real(&sums)[kSums][kPad]) KD_INLINE_LAMBDA {
    Real u = logits[i], t = teacher[i];
    const Real d = Norm::d(n, u, t), log2_e = kLog2EOf<Real>;
    math::Element<Real> element = {p[i] * inv_t,
                                   q[i] * inv_s,
                                   math::smaller_over_larger(d),
                                   d,
                                   Norm::log_p(n, t) * log2_e,
                                   Norm::log_q(n, u) * log2_e};
    math::ClassShare<Real> share = Policy::share(element, parameters);
    keep_a[i] = share.a;
    sums[0][j] += share.f;
    sums[1][j] += share.a;
    if constexpr (kTeacher) {
      keep_b[i] = share.b;
      sums[2][j] += share.b;
    }
  });
  out.f += total[0];
  out.a += total[1];
  if constexpr (kTeacher) out.b += total[2];
}

// Added to `out`.
template <class Real>
void terms(const LossParams& p, const Lane<Real>& x, const math::ElementNorm<Real>& norm,
           double inv_s, double inv_t, bool teacher, Terms& out) {
  Real of_q = static_cast<Real>(inv_s), of_p = static_cast<Real>(inv_t);
  const math::Parameters<Real>& parameters = parameters_of<Real>(p);
  math::with_policy(p.divergence, p.beta, p.second, [&](auto policy) {
    using Policy = decltype(policy);
    if (teacher) {
      terms_of<Policy, true>(x, norm, of_q, of_p, parameters, out);
    } else {
      terms_of<Policy, false>(x, norm, of_q, of_p, parameters, out);
    }
  });
}

// The sum of q - p: see math::refine.
template <class Real>
double excess_of_q(const Lane<Real>& x, const math::ElementNorm<Real>& norm, double inv_s,
                   double inv_t) {
  Real of_q = static_cast<Real>(inv_s), of_p = static_cast<Real>(inv_t);
  return sum_of<Real>(x.padded, [=](int64_t i) KD_INLINE_LAMBDA {
    return math::difference(x.q[i] * of_q, x.p[i] * of_p,
                            -math::ElementNorm<Real>::d(norm, x.u[i], x.t[i]));
  });
}

// ---- gradients -------------------------------------------------------------------------------------

// math::RowGradient for the classes of a lane, of_e being for exponentials in place of probabilities.
template <class Real>
struct LaneGradient {
  Real of_a, of_e, of_hard, hard_max, uniform, of_z, mean;

  KD_FN Real soft(const LaneGradient& g, Real a, Real e) {
    return math::fma(g.of_a, a, math::fma(g.of_e, e, -g.uniform));
  }
  KD_FN Real add_hard(const LaneGradient& g, Real soft, Real u) {
    return math::fma(g.of_hard, math::exp2_nonpositive((u - g.hard_max) * kLog2EOf<Real>), soft);
  }
  KD_FN Real add_z(const LaneGradient& g, Real y, Real u) {
    return u == -kInfinity<Real> ? y : math::fma(g.of_z, u - g.mean, y);
  }
};

// What most losses need: nothing but `soft` and cross-entropy's exponentials, rounded to where it goes.
template <class T, class Real>
void write_gradient(const Lane<Real>& x, const Real* a, const LaneGradient<Real>& g, T* out) {
  using Gradient = LaneGradient<Real>;
  if (g.of_hard == Real(0)) {
#pragma omp simd
    for (int64_t i = 0; i < x.n; ++i) narrow(Gradient::soft(g, a[i], x.q[i]), out[i]);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < x.n; ++i) {
      narrow(Gradient::add_hard(g, Gradient::soft(g, a[i], x.q[i]), x.u[i]), out[i]);
    }
  }
}

// The same in computed values, through the transform as well.
template <class Real>
void make_gradient(const Lane<Real>& x, const Real* a, const LaneGradient<Real>& g,
                   const math::Transform<Real>& f, Real* out) {
  using Gradient = LaneGradient<Real>;
#pragma omp simd
  for (int64_t i = 0; i < x.padded; ++i) {
    Real y = Gradient::add_hard(g, Gradient::soft(g, a[i], x.q[i]), x.u[i]);
    out[i] = math::Transform<Real>::back(f, x.u[i], Gradient::add_z(g, y, x.u[i]));
  }
}

}  // namespace
}  // namespace cpu
}  // namespace kdkernels
