// The loops over the classes of a row that any divergence needs, on computed values: fp32 or fp64. Included by
// one file per ISA level.
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
struct RowClasses {
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

// at(i) for the first class i of every vector.
template <class Real, class At>
KD_FN void for_vectors(int64_t padded, At at) {
  for (int64_t i = 0; i < padded; i += Vector<Real>::kLanes) at(i);
}

template <class Real>
KD_FN Real max_of(const Real* x, int64_t padded) {
  using V = Vector<Real>;
  V m(-std::numeric_limits<Real>::max());
  for_vectors<Real>(padded, [&](int64_t i) KD_INLINE_LAMBDA { m = larger(load(x + i), m); });
  return largest(m);
}

// out = f(in), padded with excluded classes, where f(pad) is -inf; the maximum.
template <class T, class Real, class F>
KD_FN Real load_row(const T* in, int64_t n, int64_t padded, Real pad, Real* out, F f) {
  using V = Vector<Real>;
  V m(-std::numeric_limits<Real>::max());
  const int64_t whole = n / V::kLanes * V::kLanes;
  auto add = [&](V x, int64_t i) KD_INLINE_LAMBDA {
    store(x, out + i);
    m = larger(x, m);
  };
  for_vectors<Real>(whole, [&](int64_t i) KD_INLINE_LAMBDA {
    __builtin_prefetch(in + i + kAheadBytes / sizeof(T));
    add(f(load(in + i)), i);
  });
  for (int64_t i = whole; i < padded; i += V::kLanes) {
    add(f(i < n ? load_part(in + i, static_cast<int>(n - i), pad) : V(pad)), i);
  }
  return largest(m);
}

// The first of n classes with this logit; 0 where there is none.
template <class Real>
int64_t where(const Real* x, int64_t n, int64_t padded, Real value) {
  using V = Vector<Real>;
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t last = first + kBlock < padded ? first + kBlock : padded;
    V found(Real(0));
    for (int64_t i = first; i < last; i += V::kLanes) {
      found = select(load(x + i) == V(value), V(Real(1)), found);
    }
    for (int64_t i = first; largest(found) > 0 && i < n; ++i) {
      if (x[i] == value) return i;
    }
  }
  return 0;
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
// classes, beyond them in fp64, each held j for itself: a vector's lanes are added up once, at the end.
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
void terms_of(const RowClasses<Real>& x, const math::ElementNorm<Real>& norm, Real inv_s,
              Real inv_t, const math::Parameters<Real>& by, Terms& out) {
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
void terms(const LossParams& p, const RowClasses<Real>& x, const math::ElementNorm<Real>& norm,
           double inv_s, double inv_t, bool teacher, Terms& out) {
  Real of_q = static_cast<Real>(inv_s), of_p = static_cast<Real>(inv_t);
  const math::Parameters<Real>& parameters = parameters_of<Real>(p);
  math::with_policy(p, [&](auto policy) {
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
double excess_of_q(const RowClasses<Real>& x, const math::ElementNorm<Real>& norm, double inv_s,
                   double inv_t) {
  Real of_q = static_cast<Real>(inv_s), of_p = static_cast<Real>(inv_t);
  return sum_of<Real>(x.padded, [=](int64_t i) KD_INLINE_LAMBDA {
    return math::difference(x.q[i] * of_q, x.p[i] * of_p,
                            -math::ElementNorm<Real>::d(norm, x.u[i], x.t[i]));
  });
}

// ---- gradients -------------------------------------------------------------------------------------

// math::RowGradient for the classes of a held, of_e being for exponentials in place of probabilities.
template <class Real>
struct VectorGradient {
  using V = Vector<Real>;
  Real of_a, of_e, of_hard, hard_max, uniform, of_z, mean;

  KD_FN V soft(const VectorGradient& g, V a, V e) {
    return fma(V(g.of_a), a, fma(V(g.of_e), e, V(-g.uniform)));
  }
  KD_FN V add_hard(const VectorGradient& g, V y, V u) {
    return fma(V(g.of_hard), exp2_nonpositive((u - V(g.hard_max)) * V(kLog2EOf<Real>)), y);
  }
  KD_FN V add_z(const VectorGradient& g, V y, V u) {
    return select(u == V(-kInfinity<Real>), y, fma(V(g.of_z), u - V(g.mean), y));
  }
};

// Through the transform f; to memory of any dtype.
template <class T, class Real>
void write_gradient(const RowClasses<Real>& x, const Real* a, const VectorGradient<Real>& of,
                    const math::Transform<Vector<Real>>& f, T* out) {
  using V = Vector<Real>;
  using Gradient = VectorGradient<Real>;
  const Gradient g = of;  // copies, which no store can change
  const math::Transform<V> transform = f;
  const Real *u = x.u, *e = x.q;
  write_row(x.n, out, [=](int64_t i) KD_INLINE_LAMBDA {
    V y = Gradient::soft(g, load(a + i), load(e + i));
    if (g.of_hard != 0) y = Gradient::add_hard(g, y, load(u + i));
    if (g.of_z != 0) y = Gradient::add_z(g, y, load(u + i));
    return math::Transform<V>::nothing(transform)
               ? y
               : math::Transform<V>::back(transform, load(u + i), y);
  });
}

}  // namespace
}  // namespace cpu
}  // namespace kdkernels
