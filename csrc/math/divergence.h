// One class's share of a divergence D(p, q) of a teacher p and a student q, and of its derivatives.
//
// Every divergence here is a sum over classes of f(p, q) >= 0. With a = df / d log q and b = df / d log p, its
// gradient in the student's logits is a - q sum a, in the teacher's b - p sum b, both over the temperature. The
// sum of a divergence's usual terms p (log p - log q) has terms of both signs, which cancel where the two
// distributions are close; f adds to each what sums to zero: p (d - 1) + q with d = log p - log q.
#pragma once

#include "math/elementary.h"

namespace kdkernels {
namespace math {

constexpr double kLargestNumber = 1.7976931348623157e308;

enum class Divergence {
  kForwardKL,  // KL(p || q)
  kReverseKL,  // KL(q || p)
  kJS,  // beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q; 0 < beta < 1
  kSkewForwardKL,  // KL(p || beta p + (1 - beta) q)                   (DistiLLM, arXiv 2402.03898)
  kSkewReverseKL,  // KL(q || beta q + (1 - beta) p)
  kTotalVariation,  // sum |p - q| / 2
  kAlphaBeta,  // alpha = beta, beta = second                          (ABKD, arXiv 2505.04560, eq. 4)
  kDecoupled,  // weights beta, second of target and non-target terms  (DKD, arXiv 2203.08679, eq. 7)
};

KD_FN bool has_two_parameters(Divergence divergence) {
  return divergence == Divergence::kAlphaBeta || divergence == Divergence::kDecoupled;
}
// Parameters go from 0 to here.
KD_FN double largest_parameter(Divergence divergence) {
  return has_two_parameters(divergence) ? kLargestNumber : 1;
}

// ---- functions with an fp64 twin ----------------------------------------------------------------

// 1 / x. On a GPU the fp32 one is the special function unit's, accurate to an ulp: an IEEE division there is
// a function call, whose registers would be spilled around it.
KD_FN float inverse(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}
KD_FN double inverse(double x) { return 1.0 / x; }

KD_FN float exp_acc(float x) { return exp(x); }
KD_FN float log_acc(float x) { return log(x); }
KD_FN float tanh_acc(float x) {
  // Odd, and accurate at 0 as expm1 is.
  float magnitude = x < 0.0f ? -x : x;
  float e = expm1(-2.0f * magnitude);
  float y = -e * inverse(e + 2.0f);
  return x < 0.0f ? -y : (x == x ? y : x);
}
#if defined(__CUDA_ARCH__)
KD_FN double exp_acc(double x) { return ::exp(x); }
KD_FN double log_acc(double x) { return ::log(x); }
KD_FN double tanh_acc(double x) {  // as above; CUDA's own is less accurate than fp64
  double e = ::expm1(-2.0 * ::fabs(x)), y = -e / (e + 2.0);
  return x < 0.0 ? -y : (x == x ? y : x);
}
#else
KD_FN double exp_acc(double x) { return __builtin_exp(x); }
KD_FN double log_acc(double x) { return __builtin_log(x); }
KD_FN double tanh_acc(double x) { return __builtin_tanh(x); }
#endif

KD_FN double log_normal(double x) { return log_acc(x); }

// -log(1 + x) where x is exact, small or not; `sum` is 1 + x, exact too where x is not small.
KD_FN float neg_log(float x, float sum, bool small) {
  Mantissa<float> b = split(sum);
  return -log_reduced(small ? x : b.m - 1.0f, small ? 0.0f : b.e);
}
KD_FN double neg_log(double x, double sum, bool small) {
#if defined(__CUDA_ARCH__)
  return small ? -::log1p(x) : -::log(sum);
#else
  return small ? -__builtin_log1p(x) : -__builtin_log(sum);
#endif
}

// ---- differences that do not cancel -------------------------------------------------------------

// Below this a series is the more accurate.
constexpr double kSmall = 0.25;

// A number's own type, or that of a vector's lanes (cpu/vector.h).
template <class F>
struct Scalar {
  using type = F;
};
template <class F>
using RealOf = typename Scalar<F>::type;

template <class F>
KD_FN F magnitude(F x) {
  return select(x < F(0), -x, x);
}

// sum over k >= 0 of x^k / (k + first)!, |x| < kSmall, to the precision of F.
template <int kFirst, class F>
KD_FN F exp_tail(F x) {
  constexpr int kTerms = sizeof(RealOf<F>) == 4 ? 6 : 11;
  constexpr double kInverse[] = {1.0,
                                 1.0,
                                 1.0 / 2,
                                 1.0 / 6,
                                 1.0 / 24,
                                 1.0 / 120,
                                 1.0 / 720,
                                 1.0 / 5040,
                                 1.0 / 40320,
                                 1.0 / 362880,
                                 1.0 / 3628800,
                                 1.0 / 39916800,
                                 1.0 / 479001600,
                                 1.0 / 6227020800.0};
  F y(static_cast<RealOf<F>>(kInverse[kTerms + kFirst - 1]));
  KD_UNROLL
  for (int k = kTerms - 2; k >= 0; --k) {
    y = fma(y, x, F(static_cast<RealOf<F>>(kInverse[k + kFirst])));
  }
  return y;
}

// exp_tail<2>(-x) to 4e-7, or, in fp64, to its precision.
template <class F>
KD_FN F alternating_tail(F x) {
  if constexpr (sizeof(RealOf<F>) == 8) return exp_tail<2>(-x);
  constexpr float kInverse[] = {-1.0f / 120, 1.0f / 24, -1.0f / 6, 0.5f};
  F y(static_cast<RealOf<F>>(1.0f / 720));
  KD_UNROLL
  for (int k = 0; k < 4; ++k) y = fma(y, x, F(static_cast<RealOf<F>>(kInverse[k])));
  return y;
}

// a (e - 1) + b where b = a exp(-e): never negative; b where a is 0.
template <class F>
KD_FN F excess(F a, F b, F e) {
  F series = a * (e * e * exp_tail<2>(-e));
  F direct = fma(a, e - F(1), b);
  direct = select(direct < F(0), F(0), direct);
  F y = select(magnitude(e) < F(kSmall), series, direct);
  return select(a == F(0), b, y);
}

// a - b where b = a exp(-e).
template <class F>
KD_FN F difference(F a, F b, F e) {
  F series = a * (e * exp_tail<1>(-e));
  return select(magnitude(e) < F(kSmall), series, a - b);
}

// excess(a, b, e), which is a (e - 1) + b, and b - a from one series, in few instructions: relative errors of excess are
// some 1e-5 near kSmall, where fp32 changes from the series to what cancels.
template <class F>
struct ExcessAndDifference {
  F excess, difference;
};
template <class F>
KD_FN ExcessAndDifference<F> excess_and_difference(F a, F b, F e) {
  const F square = e * e, series = square * alternating_tail(e), difference = b - a;
  auto small = square < F(RealOf<F>(kSmall * kSmall));
  return {select(small, a * series, fma(a, e, difference)),
          select(small, a * (series - e), difference)};
}

// a e; 0 where a is 0.
template <class F>
KD_FN F times(F a, F e) {
  return select(a == F(0), F(0), a * e);
}

// log(p / m) and log(q / m) of the mixture m = of_p p + of_q q, from d = log p - log q; of_p + of_q = 1.
template <class Real>
struct Mixture {
  Real p, q;
};
template <class Real>
KD_FN Mixture<Real> mixture(Real d, Real of_p, Real of_q) {
  bool p_larger = d >= Real(0);
  Real size = magnitude(d);
  Real of_larger = p_larger ? of_p : of_q, of_smaller = p_larger ? of_q : of_p;
  // The larger over m is 1 / (of_larger + of_smaller w), w = exp(-size); w may underflow.
  Real w = exp2_nonpositive(-size * Real(1.4426950408889634));
  bool small = size < Real(kSmall);
  Real x = of_smaller * (-size * exp_tail<1>(-size));
  Real larger = neg_log(x, fma(of_smaller, w, of_larger), small);
  larger = of_larger == Real(0) ? size : larger;
  Real smaller = larger - size;
  return {p_larger ? larger : smaller, p_larger ? smaller : larger};
}

// log(1 + x) and phi(x) = (1 + x) log(1 + x) - x where x is exact, small or not; `sum` as above.
template <class Real>
struct LogAndPhi {
  Real log, phi;
};
KD_FN LogAndPhi<float> log_and_phi(float x, float sum, bool small) {
  Mantissa<float> b = split(sum);
  float e = small ? 0.0f : b.e, f = small ? x : b.m - 1.0f;
  // log(1 + f) = f - f^2 / 2 + f^3 p
  float p = log_coefficient(0);
  KD_UNROLL
  for (int i = 1; i < 8; ++i) p = fma(p, f, log_coefficient(i));
  float log = fma(e, 0x1.62e43p-24f, fma(f * f, fma(f, p, -0.5f), f));
  float series = f * f * fma(f, fma(f, p, p - 0.5f), 0.5f);
  return {log, small ? series : fma(sum, log, -x)};
}
KD_FN LogAndPhi<double> log_and_phi(double x, double sum, bool small) {
  double log = -neg_log(x, sum, small);
  return {log, fma(sum, log, -x)};
}

// ---- the divergences ----------------------------------------------------------------------------

template <class Real>
struct ClassShare {
  Real f, a, b;
};

// Of one class: p, q, d = log p - log q, log_p and log_q. A class that both sides exclude has p = q = 0 and
// d = NaN; it adds nothing.
template <class Real>
struct Element {
  Real p, q, d, log_p, log_q;
};

struct ForwardKL {
  template <class F>
  KD_FN ClassShare<F> share(const Element<F>& x, F, F) {
    return {excess(x.p, x.q, x.d), difference(x.q, x.p, -x.d), times(x.p, x.d)};
  }
};

struct ReverseKL {
  template <class F>
  KD_FN ClassShare<F> share(const Element<F>& x, F, F) {
    return {excess(x.q, x.p, -x.d), times(x.q, -x.d), difference(x.p, x.q, x.d)};
  }
};

// With L the larger of p and q, s its opposite's share of m, w = 1 + y the smaller over L, and
// phi(x) = (1 + x) log(1 + x) - x: m = L (1 + s y) and f = L (s phi(y) - phi(s y)).
struct JS {
  template <class Real>
  KD_FN ClassShare<Real> share(const Element<Real>& x, Real beta, Real) {
    Real rest = Real(1) - beta;
    bool p_larger = x.d >= Real(0);
    Real size = magnitude(x.d);
    Real larger = p_larger ? x.p : x.q, s = p_larger ? rest : beta;
    size = size < Real(1000) ? size : Real(1000);  // w is 0; 0 times infinity is not
    bool small = size < Real(kSmall);
    Real w = exp2_nonpositive(-size * Real(1.4426950408889634));
    Real tail = exp_tail<2>(-size);
    Real y = small ? size * fma(size, tail, Real(-1)) : w - Real(1);
    Real phi = small ? size * size * fma(-tail, Real(1) + size, Real(1))
                     : fma(-w, Real(1) + size, Real(1));
    LogAndPhi<Real> of_m = log_and_phi(s * y, fma(s, w, Real(1) - s), small);
    Real f = larger * fma(s, phi, -of_m.phi);
    Real of_smaller = -of_m.log - size;
    return {f > Real(0) ? f : Real(0), rest * times(x.q, p_larger ? of_smaller : -of_m.log),
            beta * times(x.p, p_larger ? -of_m.log : of_smaller)};
  }
};

struct SkewForwardKL {
  template <class Real>
  KD_FN ClassShare<Real> share(const Element<Real>& x, Real beta, Real) {
    Real rest = Real(1) - beta, m = fma(beta, x.p, rest * x.q);
    Mixture<Real> e = mixture(x.d, beta, rest);
    Real q_minus_p = difference(x.q, x.p, -x.d);
    Real inv_m = inverse(m > Real(0x1p-126) ? m : Real(0x1p-126));
    Real q_over_m = beta == Real(0) ? Real(1) : x.q * inv_m;  // q may underflow where it is m
    return {excess(x.p, m, e.p), rest * rest * q_minus_p * q_over_m,
            fma(beta * rest * q_minus_p, x.p * inv_m, times(x.p, e.p))};
  }
};

struct SkewReverseKL {
  template <class Real>
  KD_FN ClassShare<Real> share(const Element<Real>& x, Real beta, Real second) {
    ClassShare<Real> y =
        SkewForwardKL::share(Element<Real>{x.q, x.p, -x.d, x.log_q, x.log_p}, beta, second);
    return {y.f, y.b, y.a};
  }
};

struct TotalVariation {
  template <class Real>
  KD_FN ClassShare<Real> share(const Element<Real>& x, Real, Real) {
    Real y = difference(x.q, x.p, -x.d);
    Real sign = y > Real(0) ? Real(0.5) : y < Real(0) ? Real(-0.5) : y * Real(0.5);
    return {sign * y, sign * x.q, -sign * x.p};
  }
};

// alpha, beta > 0
struct AlphaBetaInside {
  template <class Real>
  KD_FN ClassShare<Real> share(const Element<Real>& x, Real alpha, Real beta) {
    Real both = alpha + beta;
    Real pc = exp_acc(both * x.log_p), qc = exp_acc(both * x.log_q);
    Real inv_alpha = inverse(alpha), inv_beta = inverse(beta), inv_both = inverse(both);
    Real product = exp_acc(fma(alpha, x.log_p, beta * x.log_q));
    Real e = beta * x.d, of_d = both * exp_tail<2>(-both * x.d) - beta * exp_tail<2>(-e);
    Real series = pc * (x.d * x.d * (of_d * inv_alpha));
    Real direct = fma(inv_beta, pc, inv_alpha * qc) * inv_both - inv_alpha * inv_beta * product;
    Real f = magnitude(both * x.d) < Real(kSmall) ? series : direct;
    return {f < Real(0) ? Real(0) : f, inv_alpha * difference(qc, product, -alpha * x.d),
            inv_beta * difference(pc, product, e)};
  }
};

// alpha or beta = 0
struct AlphaBetaLimit {
  template <class Real>
  KD_FN ClassShare<Real> share(const Element<Real>& x, Real alpha, Real beta) {
    Real both = alpha + beta, inv = inverse(both);
    Real pc = exp_acc(both * x.log_p), qc = exp_acc(both * x.log_q);
    bool of_p = beta == Real(0);
    Real inner = of_p ? pc : qc, outer = of_p ? qc : pc, d = of_p ? x.d : -x.d;
    Real f = inv * inv * excess(inner, outer, both * d), of_inner = times(inner, d),
         of_outer = inv * difference(outer, inner, -both * d);
    return {f, of_p ? of_outer : of_inner, of_p ? of_inner : of_outer};
  }
};

struct AlphaBeta {
  template <class Real>
  KD_FN ClassShare<Real> share(const Element<Real>& x, Real alpha, Real beta) {
    return alpha == Real(0) || beta == Real(0) ? AlphaBetaLimit::share(x, alpha, beta)
                                               : AlphaBetaInside::share(x, alpha, beta);
  }
};

// The usual terms, without what f adds, are f + plain (p - q), with derivatives a - plain q and b + plain p. A
// sum over a part of the classes wants those.
KD_FN double plain_share(Divergence divergence, double beta) {
  switch (divergence) {
    case Divergence::kForwardKL: return 1;
    case Divergence::kReverseKL: return -1;
    case Divergence::kSkewForwardKL: return 1 - beta;
    case Divergence::kSkewReverseKL: return beta - 1;
    default: return 0;
  }
}

// f(policy) for the policy of a divergence. Decoupled is KL(p || q) of the classes beside the label; what is
// special about it happens once a row.
template <class F>
KD_FN void with_policy(Divergence divergence, F f) {
  switch (divergence) {
    case Divergence::kForwardKL:
    case Divergence::kDecoupled: return f(ForwardKL{});
    case Divergence::kReverseKL: return f(ReverseKL{});
    case Divergence::kJS: return f(JS{});
    case Divergence::kSkewForwardKL: return f(SkewForwardKL{});
    case Divergence::kSkewReverseKL: return f(SkewReverseKL{});
    case Divergence::kTotalVariation: return f(TotalVariation{});
    case Divergence::kAlphaBeta: return f(AlphaBeta{});
  }
}

}  // namespace math
}  // namespace kdkernels
