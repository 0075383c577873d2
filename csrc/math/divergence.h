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
constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

enum class Divergence {
  kForwardKL,  // KL(p || q)
  kReverseKL,  // KL(q || p)
  kJS,  // beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q; 0 < beta < 1
  kSkewForwardKL,  // KL(p || beta p + (1 - beta) q)                   (DistiLLM, arXiv 2402.03898)
  kSkewReverseKL,  // KL(q || beta q + (1 - beta) p)
  kTotalVariation,  // sum |p - q| / 2
  kAlphaBeta,  // with alpha and beta                                  (ABKD, arXiv 2505.04560, eq. 4)
  kDecoupled,  // weights alpha, beta of target and non-target terms   (DKD, arXiv 2203.08679, eq. 7)
};

// Whether a row's terms feel an error of 1e-8 in the ratio of its two sums: the others' derivatives in it are 0 where p
// and q are close, since sum p d is 0 to first order. See refine() in math/row.h.
KD_FN bool needs_exact_sums(Divergence divergence) {
  return divergence == Divergence::kTotalVariation || divergence == Divergence::kAlphaBeta;
}
// The sum over classes of q - p is 0 but for the rounding of both sums, which leaves less than this.
constexpr double kLargestExcess = 1e-3;
// log(1 + excess), of which rounding 1 + excess would leave nothing in fp32; 0 of what is no rounding.
template <class Real>
KD_FN Real log_of_excess(Real excess) {
  const bool sound = -Real(kLargestExcess) < excess && excess < Real(kLargestExcess);
  return sound ? fma(excess * excess, Real(-0.5), excess) : Real(0);
}
// Parameters go from 0 to here.
KD_FN double largest_parameter(Divergence divergence) {
  const bool two = divergence == Divergence::kAlphaBeta || divergence == Divergence::kDecoupled;
  return two ? kLargestNumber : 1;
}

// A number's own type, or that of a vector's lanes (cpu/vector.h).
template <class F>
struct Scalar {
  using type = F;
};
template <class F>
using RealOf = typename Scalar<F>::type;

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

// Odd, and accurate at 0 as expm1 is. F: float, or a vector of them.
template <class F>
KD_FN F tanh_acc(F x) {
  const F e = expm1_nonpositive(select(x < F(0), x, -x) * F(2)), y = -e * inverse(e + F(2));
  return select(x < F(0), -y, y);
}

#if defined(__CUDA_ARCH__)
// In half the instructions: below 0.6 a polynomial of x^2 fitted to least maximal relative error, above from e^(-2x).
KD_FN float tanh_acc(float x) {
  const float e = exp2_nonpositive(::fabsf(x) * static_cast<float>(-2 * kLog2E));
  const float y = ::copysignf(fma(-2.0f * e, inverse(1.0f + e), 1.0f), x), square = x * x;
  float q = -0x1.828776p-8f;
  q = fma(q, square, 0x1.54c3c2p-6f);
  q = fma(q, square, -0x1.b89abap-5f);
  q = fma(q, square, 0x1.1109bep-3f);
  q = fma(q, square, -0x1.55553ep-2f);
  return ::fabsf(x) < 0.6f ? fma(x * square, q, x) : y;
}
#endif

// log2 x of what is neither small nor large: the special function's error is 2^-22 between 1/2 and 2, and relative beyond.
template <class F>
KD_FN F log2_moderate(F x) {
  return log_normal(x) * F(RealOf<F>(kLog2E));
}
#if defined(__CUDA_ARCH__)
KD_FN float log2_moderate(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#endif
// log2 x of a mixture, with an error of 1e-7 beside the result's rounding.
template <class F>
KD_FN F log2_mixture(F x) {
  return log_normal(x) * F(RealOf<F>(kLog2E));
}
#if defined(__CUDA_ARCH__)
KD_FN float log2_mixture(float x) {
  const int32_t bits = bits_from_float(x),
                e = (bits - kTwoThirdsBits) & static_cast<int32_t>(0xFF800000);
  const float exponent = float_from_bits(kRoundToIntBits + (e >> 23)) - kRoundToInt;
  return exponent + log2_moderate(float_from_bits(bits - e));
}
#endif

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

template <class F>
KD_FN F magnitude(F x) {
  return select(x < F(0), -x, x);
}
#if defined(__CUDA_ARCH__)
KD_FN float magnitude(float x) { return ::fabsf(x); }
#endif

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

// ---- the divergences ----------------------------------------------------------------------------

template <class Real>
struct ClassShare {
  Real f, a, b;
  Real slope{};  // a / q, of policies that have slope()
};

constexpr double kLargestGap = 2000;  // of logarithms, in bits: its exponential is 0
// Of one class: p, q, w, the smaller of them over the larger, d = log p - log q, log2 p and log2 q. A class that both
// sides exclude has p = q = 0 and d = NaN or finite; it adds nothing. kRounded: the gradient will be rounded to 16 bits,
// so that an error of 1e-6 of a probability in its derivatives does not matter.
template <class Real, bool kRounded = false>
struct Element {
  Real p, q, w, d, log2_p, log2_q;
};
// |d| in bits, and w of it; not a number and infinity are kLargestGap, so that 0 times it is 0.
template <class F>
KD_FN F gap_of(F d) {
  return at_most(magnitude(d) * F(RealOf<F>(kLog2E)), F(kLargestGap));
}
template <class F>
KD_FN F smaller_over_larger(F d) {
  return exp2_nonpositive(-gap_of(d));
}

// Terms of the power series in d: of fp32 for |d| < 1/2, of fp64 for |d| < 1/4.
template <class Real>
constexpr int kSeries = sizeof(Real) == 4 ? 8 : 16;

// A divergence's parameters, and f / q, a / q and b / p of classes whose p and q are close as power series in d, where
// the terms' own formulas cancel. The mixtures' have their nearest singularities at |d| >= pi.
template <class F>
struct Parameters {
  static constexpr int kTerms = kSeries<RealOf<F>>;
  F alpha, beta;
  F close;  // |d| below this takes the series; 0: there are none
  F f[kTerms], a[kTerms], b[kTerms];  // of d^0, d^1, ...

  template <class Call>
  KD_FN Parameters without_series(const Call& call) {
    Parameters y = {};
    y.alpha = static_cast<F>(call.divergence_alpha);
    y.beta = static_cast<F>(call.beta);
    return y;
  }
};

// The sum over k >= kFirst of of[k] d^(k - kFirst).
template <int kFirst, class F, int kTerms>
KD_FN F series(const F (&of)[kTerms], F d) {
  F y = of[kTerms - 1];
  KD_UNROLL
  for (int k = kTerms - 2; k >= kFirst; --k) y = fma(y, d, of[k]);
  return y;
}

struct ForwardKL {
  template <class F, bool kRounded>
  KD_FN ClassShare<F> share(const Element<F, kRounded>& x, const Parameters<F>&) {
    return {excess(x.p, x.q, x.d), difference(x.q, x.p, -x.d), times(x.p, x.d)};
  }
};

struct ReverseKL {
  template <class F, bool kRounded>
  KD_FN ClassShare<F> share(const Element<F, kRounded>& x, const Parameters<F>&) {
    return {excess(x.q, x.p, -x.d), times(x.q, -x.d), difference(x.p, x.q, x.d)};
  }
};

// A term of a mixture m = share_p p + share_q q, share_p + share_q = 1: p, q and m over `top`, log2(p / m), log2(q / m).
// It is the larger of p and q, so that nothing underflows with it and the logarithms are small and exact; or 1, with
// the logarithms of p, q and m and their rounding.
template <class F>
struct Mixture {
  F top, p, q, m, log2_p, log2_q;
};
template <class F>
KD_FN Mixture<F> mixture(const Element<F, false>& x, F share_p, F share_q) {
  const auto q_larger = x.d < F(0);
  Mixture<F> y;
  y.top = select(q_larger, x.q, x.p);
  y.p = select(q_larger, x.w, F(1));
  y.q = select(q_larger, F(1), x.w);
  const F tiny(RealOf<F>(1e-37));  // the logarithm of 0 would be infinite
  y.m = fma(share_p, y.p, fma(share_q, y.q, tiny));
  const F larger = log_normal(y.m) * F(RealOf<F>(-kLog2E)), smaller = larger - gap_of(x.d);
  y.log2_p = select(q_larger, smaller, larger);
  y.log2_q = select(q_larger, larger, smaller);
  return y;
}
template <class F>
KD_FN Mixture<F> mixture(const Element<F, true>& x, F share_p, F share_q) {
  using Real = RealOf<F>;
  const F least(Real(-1e30)), tiny(Real(0x1p-126));
  const F m = fma(share_p, x.p, fma(share_q, x.q, tiny)), log2_m = log2_mixture(m);
  return {
      F(1), x.p, x.q, m, at_least(x.log2_p, least) - log2_m, at_least(x.log2_q, least) - log2_m};
}

// A term from f over the mixture's top, a / q and b / p; where p and q are close, from their series.
template <class F, bool kRounded>
KD_FN ClassShare<F> share_of(const Element<F, kRounded>& x, const Mixture<F>& y, F f, F a, F b,
                             const Parameters<F>& by) {
  const auto close = magnitude(x.d) < by.close;
  f = select(close, x.q * x.d * (x.d * series<2>(by.f, x.d)), y.top * f);
  if constexpr (!kRounded) {
    a = select(close, x.d * series<1>(by.a, x.d), a);
    b = select(close, x.d * series<1>(by.b, x.d), b);
  }
  return {f, x.q * a, x.p * b, a};
}

template <class F>
KD_FN F nats(F x) {
  return x * F(RealOf<F>(kLn2));
}

// p / q, at most 2^120: beyond, q is nothing. From it alone slope(d) makes a / q, with an error of 1e-7: enough for a
// gradient of 16 bits, which then needs neither p nor its logarithm.
template <class F>
KD_FN F ratio_of(F d) {
  return exp2_nonpositive(at_most(d * F(RealOf<F>(kLog2E)), F(120)));
}

struct JS {
  template <class F>
  KD_FN F slope(F d, const Parameters<F>& by) {
    const F rest = F(1) - by.beta;
    return nats(-rest) * log2_moderate(fma(by.beta, ratio_of(d), rest));
  }
  template <class F, bool kRounded>
  KD_FN ClassShare<F> share(const Element<F, kRounded>& x, const Parameters<F>& by) {
    const F rest = F(1) - by.beta;
    const Mixture<F> y = mixture(x, by.beta, rest);
    const F a = nats(rest) * y.log2_q, b = nats(by.beta) * y.log2_p;
    return share_of(x, y, fma(y.q, a, y.p * b), a, b, by);
  }
};

struct SkewForwardKL {
  template <class F>
  KD_FN F slope(F d, const Parameters<F>& by) {
    const F rest = F(1) - by.beta, ratio = ratio_of(d);
    return rest * rest * (F(1) - ratio) * inverse(fma(by.beta, ratio, rest));
  }
  template <class F, bool kRounded>
  KD_FN ClassShare<F> share(const Element<F, kRounded>& x, const Parameters<F>& by) {
    const F rest = F(1) - by.beta;
    const Mixture<F> y = mixture(x, by.beta, rest);
    const F more = rest * (y.q - y.p), over_m = more * inverse(y.m);  // m - p, 1 - p / m
    const F log_p = nats(y.log2_p);
    const F f = kRounded ? fma(y.p, log_p, more) : excess(y.p, y.m, log_p);
    return share_of(x, y, f, rest * over_m, fma(by.beta, over_m, log_p), by);
  }
};

struct SkewReverseKL {
  template <class F>
  KD_FN F slope(F d, const Parameters<F>& by) {
    const F rest = F(1) - by.beta, ratio = ratio_of(d), m = fma(rest, ratio, by.beta);
    return fma(by.beta * rest * (ratio - F(1)), inverse(m), -nats(log2_moderate(m)));
  }
  template <class F, bool kRounded>
  KD_FN ClassShare<F> share(const Element<F, kRounded>& x, const Parameters<F>& by) {
    const F rest = F(1) - by.beta;
    const Mixture<F> y = mixture(x, rest, by.beta);
    const F more = rest * (y.p - y.q), over_m = more * inverse(y.m);  // m - q, 1 - q / m
    const F log_q = nats(y.log2_q);
    const F f = kRounded ? fma(y.q, log_q, more) : excess(y.q, y.m, log_q);
    return share_of(x, y, f, fma(by.beta, over_m, log_q), rest * over_m, by);
  }
};

struct TotalVariation {
  template <class F>
  KD_FN F slope(F d, const Parameters<F>&) {  // half the sign of q - p
    const F half(RealOf<F>(0.5));
    return select(d < F(0), half, select(d == F(0), F(0), -half));
  }
  template <class F, bool kRounded>
  KD_FN ClassShare<F> share(const Element<F, kRounded>& x, const Parameters<F>& by) {
    const F half(RealOf<F>(0.5)), sign = slope(x.d, by);
    return {half * magnitude(difference(x.q, x.p, -x.d)), sign * x.q, -sign * x.p, sign};
  }
};

// alpha and beta > 0
struct AlphaBetaInside {
  template <class F, bool kRounded>
  KD_FN ClassShare<F> share(const Element<F, kRounded>& x, const Parameters<F>& by) {
    const F alpha = by.alpha, beta = by.beta, both = alpha + beta;
    const F inv_alpha = inverse(alpha), inv_beta = inverse(beta), inv_both = inverse(both);
    const F pc = exp2_nonpositive(both * x.log2_p), qc = exp2_nonpositive(both * x.log2_q);
    const F product = exp2_nonpositive(fma(alpha, x.log2_p, beta * x.log2_q));
    const F e = beta * x.d, of_both = both * x.d;
    const F of_d = both * exp_tail<2>(-of_both) - beta * exp_tail<2>(-e);
    const F close = pc * (x.d * x.d * (of_d * inv_alpha));
    const F direct = fma(inv_beta * inv_both, pc,
                         fma(inv_alpha * inv_both, qc, -inv_alpha * inv_beta * product));
    const F f = select(magnitude(of_both) < F(RealOf<F>(kSmall)), close, direct);
    return {select(f < F(0), F(0), f), inv_alpha * difference(qc, product, -alpha * x.d),
            inv_beta * difference(pc, product, e)};
  }
};

// alpha or beta = 0
struct AlphaBetaLimit {
  template <class F, bool kRounded>
  KD_FN ClassShare<F> share(const Element<F, kRounded>& x, const Parameters<F>& by) {
    const F both = by.alpha + by.beta, inv = inverse(both);
    const auto of_p = by.beta == F(0);
    const F pc = exp2_nonpositive(both * x.log2_p), qc = exp2_nonpositive(both * x.log2_q);
    const F inner = select(of_p, pc, qc), outer = select(of_p, qc, pc), d = select(of_p, x.d, -x.d);
    const F f = inv * inv * excess(inner, outer, both * d), of_inner = times(inner, d),
            of_outer = inv * difference(outer, inner, -both * d);
    return {f, select(of_p, of_outer, of_inner), select(of_p, of_inner, of_outer)};
  }
};

// ---- power series -------------------------------------------------------------------------------

// Of d, up to the power kTerms - 1.
template <int kTerms>
struct PowerSeries {
  double of[kTerms];
};
template <int kTerms>
KD_FN PowerSeries<kTerms> combine(double x, const PowerSeries<kTerms>& a, double y,
                                  const PowerSeries<kTerms>& b) {
  PowerSeries<kTerms> out;
  for (int n = 0; n < kTerms; ++n) out.of[n] = x * a.of[n] + y * b.of[n];
  return out;
}
template <int kTerms>
KD_FN PowerSeries<kTerms> product(const PowerSeries<kTerms>& a, const PowerSeries<kTerms>& b) {
  PowerSeries<kTerms> out = {};
  for (int n = 0; n < kTerms; ++n) {
    for (int k = 0; k <= n; ++k) out.of[n] += a.of[k] * b.of[n - k];
  }
  return out;
}
// exp(a) of a.of[0] = 0, from (exp a)' = a' exp a.
template <int kTerms>
KD_FN PowerSeries<kTerms> exponential(const PowerSeries<kTerms>& a) {
  PowerSeries<kTerms> out = {1.0};
  for (int n = 1; n < kTerms; ++n) {
    for (int k = 1; k <= n; ++k) out.of[n] += k * a.of[k] * out.of[n - k];
    out.of[n] /= n;
  }
  return out;
}
// log(a) of a.of[0] = 1, from a (log a)' = a'.
template <int kTerms>
KD_FN PowerSeries<kTerms> logarithm(const PowerSeries<kTerms>& a) {
  PowerSeries<kTerms> out = {};
  for (int n = 1; n < kTerms; ++n) {
    double sum = n * a.of[n];
    for (int k = 1; k < n; ++k) sum -= k * out.of[k] * a.of[n - k];
    out.of[n] = sum / n;
  }
  return out;
}

template <class Real, class Call>
KD_FN Parameters<Real> parameters_of(const Call& call) {
  const Divergence divergence = call.divergence;
  const double beta = call.beta;
  Parameters<Real> y = Parameters<Real>::without_series(call);
  const bool skew_forward = divergence == Divergence::kSkewForwardKL;
  if (divergence != Divergence::kJS && !skew_forward && divergence != Divergence::kSkewReverseKL)
    return y;
  y.close = sizeof(Real) == 4 ? Real(0.5) : Real(0.25);
  using Series = PowerSeries<kSeries<Real>>;
  const double rest = 1 - beta, of_p = divergence == Divergence::kSkewReverseKL ? rest : beta;
  const Series one = {1.0}, log_ratio = {0.0, 1.0};
  const Series p = exponential(log_ratio);  // over q, as all of these
  const Series m = combine(of_p, p, 1 - of_p, one), log_m = logarithm(m);
  const Series log_p = combine(1, log_ratio, -1, log_m), log_q = combine(-1, log_m, 0, one);
  const Series p_over_m = exponential(log_p), q_over_m = exponential(log_q);
  Series f, a, b;
  if (divergence == Divergence::kJS) {
    a = combine(rest, log_q, 0, one);
    b = combine(beta, log_p, 0, one);
    f = combine(1, a, 1, product(p, b));
  } else if (skew_forward) {
    a = combine(rest, one, -rest, p_over_m);
    b = combine(1, log_p, beta, combine(1, one, -1, p_over_m));
    f = combine(1, product(p, log_p), 1, combine(1, m, -1, p));
  } else {
    a = combine(1, log_q, beta, combine(1, one, -1, q_over_m));
    b = combine(rest, one, -rest, q_over_m);
    f = combine(1, log_q, 1, combine(1, m, -1, one));
  }
  for (int n = 0; n < kSeries<Real>; ++n) {
    y.f[n] = static_cast<Real>(f.of[n]);
    y.a[n] = static_cast<Real>(a.of[n]);
    y.b[n] = static_cast<Real>(b.of[n]);
  }
  return y;
}

// Whether three sweeps over whole rows of plain logits give four digits of D. With kRounded not where a mixture's smaller
// share is small: a term falls with it, or with its square.
template <class Call>
KD_FN bool has_third_sweep(const Call& call, bool rounded) {
  const double beta = call.beta;
  switch (call.divergence) {
    case Divergence::kDecoupled: return false;  // its label stands beside the others
    case Divergence::kJS: return !rounded || (beta >= 0.05 && beta <= 0.95);
    case Divergence::kSkewForwardKL:
    case Divergence::kSkewReverseKL: return !rounded || beta <= 0.6;
    default: return true;
  }
}
template <class Policy>
constexpr bool kHasSlope = requires(const Parameters<float>& by) { Policy::slope(0.0f, by); };

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

// f(policy) for the policy of a divergence with these parameters. Decoupled is KL(p || q) of the classes beside the label; what is
// special about it happens once a row.
template <class Call, class F>
KD_FN void with_policy(const Call& call, F f) {
  switch (call.divergence) {
    case Divergence::kForwardKL:
    case Divergence::kDecoupled: return f(ForwardKL{});
    case Divergence::kReverseKL: return f(ReverseKL{});
    case Divergence::kJS: return f(JS{});
    case Divergence::kSkewForwardKL: return f(SkewForwardKL{});
    case Divergence::kSkewReverseKL: return f(SkewReverseKL{});
    case Divergence::kTotalVariation: return f(TotalVariation{});
    case Divergence::kAlphaBeta:
      return call.divergence_alpha == 0 || call.beta == 0 ? f(AlphaBetaLimit{})
                                                          : f(AlphaBetaInside{});
  }
}

}  // namespace math
}  // namespace kdkernels
