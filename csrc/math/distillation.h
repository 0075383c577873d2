// The distillation loss of one row by the divergences whose gradient needs no more than a first sweep's sums.
//
//   loss = alpha T^2 D(p_t, p_s) + (1 - alpha) CE(z, label; smoothing)      (Hinton et al., 2015)
//   p_s = softmax(z / T), p_t = softmax(t / T); CE at temperature 1
//
// The first sweep adds up exponentials: a walker visits the row in parts, for each of which it knows the largest logits
// so far, max_s and max_t, and for each element the exponents x = (z - max_s) s, y = (t - max_t) s with
// s = log2(e) / T, and ex = 2^x, ey = 2^y. Parts are merged when the maxima move. The second sweep makes the gradient
// and adds D up as a sum of terms none of which is negative, so that its digits do not depend on how close the two
// distributions are. A divergence is a policy of two functions: the gradient's coefficients, and an element's term of D
// and gradient.
#pragma once

#include "math/divergence.h"

namespace kdkernels {
namespace math {

// How cross-entropy gets its exponentials e^(z - max_s). The same for all rows of a call: a constant where
// a walker is compiled for each, a uniform branch where it is not.
enum class CrossEntropy {
  kNone,  // alpha = 1, or no labels
  kShared,  // T = 1: they are the student's own
  kOwn,  // a third exponential an element
};

// Sums over the part of a row that was visited.
template <class Acc>
struct RowSums {
  Acc max_s, max_t;  // largest logits
  Acc sum_s, sum_t;  // of ex, of ey
  Acc cross;  // of ex (x - y); where the policy asks for it
  Acc sum_hard;  // of e^(z - max_s); CrossEntropy::kOwn only
  Acc sum_z;  // of z - max_s; with label smoothing only
  Acc count;  // elements behind sum_z
};

// An element's term of D and gradient.
template <class F>
struct TermAndGradient {
  F term, gradient;
};

// KL(p_t || p_s). Its gradient is T (p_s - p_t).
struct ForwardSweeps {
  static constexpr int kSign = 1;
  static constexpr bool kCross = false;
  template <class Acc>
  KD_FN void coefficients(const RowSums<Acc>&, Acc, Acc temperature, Acc& of_q, Acc& other) {
    of_q = Acc(0);
    other = temperature;
  }
  template <class F>
  KD_FN TermAndGradient<F> element(F, F other, F p, F q, F e) {
    ExcessAndDifference<F> of = excess_and_difference(p, q, e);
    return {of.excess, other * of.difference};
  }
};

// KL(p_s || p_t). Its gradient is T p_s (log p_s - log p_t - D), which feels nothing of an error of 1e-7 in D.
struct ReverseSweeps {
  static constexpr int kSign = -1;
  static constexpr bool kCross = true;
  template <class Acc>
  KD_FN void coefficients(const RowSums<Acc>& sums, Acc inv_s, Acc temperature, Acc& of_q,
                          Acc& other) {
    Acc divergence = sums.cross * (inv_s * Acc(kLn2)) + log_acc(sums.sum_t * inv_s);
    other = temperature;
    of_q = -temperature * divergence;
  }
  template <class F>
  KD_FN TermAndGradient<F> element(F of_q, F other, F p, F q, F e) {
    return {excess_and_difference(q, p, e).excess, q * fma(other, e, of_q)};
  }
};

// Any divergence of math/divergence.h, by a third sweep: the second adds up its terms f and their derivatives a, the
// third makes the gradient T (a - p_s sum a).
struct AnySweeps {
  static constexpr int kSign = 1;
  static constexpr bool kCross = false;
  template <class Acc>
  KD_FN void coefficients(const RowSums<Acc>&, Acc, Acc temperature, Acc& of_q, Acc& other) {
    of_q = Acc(0);  // until the second sweep
    other = temperature;
  }
};
template <class Policy>
constexpr bool kThirdSweep = false;
template <>
constexpr bool kThirdSweep<AnySweeps> = true;
// Of policies of math/divergence.h: their divergences have a policy of two sweeps.
template <class Policy>
constexpr bool kTwoSweeps = false;
template <>
constexpr bool kTwoSweeps<ForwardKL> = true;
template <>
constexpr bool kTwoSweeps<ReverseKL> = true;

// The sums of a part relative to other maxima, each at least the part's own. exp2_fn: 2^x for x <= 0.
template <class Policy, class Acc, class Exp2>
KD_FN RowSums<Acc> rebase(CrossEntropy hard, const RowSums<Acc>& part, Acc max_s, Acc max_t,
                          Acc scale, Exp2 exp2_fn) {
  Acc grown = max_s - part.max_s;
  Acc dx = grown * scale, dy = (max_t - part.max_t) * scale;
  Acc fx = exp2_fn(-dx), fy = exp2_fn(-dy);
  RowSums<Acc> out = part;
  out.max_s = max_s;
  out.max_t = max_t;
  out.sum_s = fx * part.sum_s;
  out.sum_t = fy * part.sum_t;
  if constexpr (Policy::kCross) {
    out.cross = part.sum_s == Acc(0) ? Acc(0) : fx * (part.cross + part.sum_s * (dy - dx));
  }
  if (hard == CrossEntropy::kOwn) out.sum_hard = exp2_fn(-grown * Acc(kLog2E)) * part.sum_hard;
  out.sum_z = part.count == Acc(0) ? Acc(0) : part.sum_z - part.count * grown;
  return out;
}

// The sums of two parts as the sums of both.
template <class Policy, class Acc, class Exp2>
KD_FN RowSums<Acc> merge(CrossEntropy hard, const RowSums<Acc>& a, const RowSums<Acc>& b, Acc scale,
                         Exp2 exp2_fn) {
  Acc max_s = larger(a.max_s, b.max_s), max_t = larger(a.max_t, b.max_t);
  RowSums<Acc> x = rebase<Policy>(hard, a, max_s, max_t, scale, exp2_fn);
  RowSums<Acc> y = rebase<Policy>(hard, b, max_s, max_t, scale, exp2_fn);
  x.sum_s += y.sum_s;
  x.sum_t += y.sum_t;
  x.cross += y.cross;
  x.sum_hard += y.sum_hard;
  x.sum_z += y.sum_z;
  x.count += y.count;
  return x;
}

// What a row's second sweep needs. With d = (y - x) ln 2 + above = log p - log q and e = kSign d, or kLeast where that is
// more or e is NaN, the gradient of element i is
//   Policy::element(of_q, other, p, q, e).gradient + of_hard e^(z - max_s) - uniform - (i == label ? at_label : 0)
// where p = inv_t ey, q = inv_s ex; and the row's loss is `loss` and of_term times the sum of the elements' terms.
// So far below, a probability is 0, and T times this is finite.
constexpr double kLeast = -1e20;
template <class Acc>
struct RowResult {
  Acc loss, of_term;
  Acc inv_s, inv_t, above;
  Acc of_q, other, of_hard, uniform, at_label;
};

// label_z = z[label] - max_s. `factor` is the row's weight over the denominator, for the gradient only.
template <class Policy, class Acc>
KD_FN RowResult<Acc> finish_row(CrossEntropy hard, const RowSums<Acc>& sums, Acc inv_classes,
                                Acc temperature, Acc alpha, Acc smoothing, Acc label_z,
                                Acc factor) {
  RowResult<Acc> row;
  row.loss = row.of_hard = row.uniform = row.at_label = Acc(0);
  row.inv_s = inverse(sums.sum_s);
  row.inv_t = inverse(sums.sum_t);
  // The logarithm of the ratio, and 0 of equal sums.
  const Acc excess_s = (sums.sum_s - sums.sum_t) * row.inv_t;
  row.above = -neg_log(excess_s, sums.sum_s * row.inv_t, magnitude(excess_s) < Acc(kSmall));
  row.of_term = alpha * temperature * temperature;
  Policy::coefficients(sums, row.inv_s, temperature, row.of_q, row.other);
  row.of_q *= alpha * factor;
  row.other *= alpha * factor;
  if (hard == CrossEntropy::kNone) return row;
  Acc sum = hard == CrossEntropy::kShared ? sums.sum_s : sums.sum_hard;
  Acc cross_entropy = log_acc(sum) - (Acc(1) - smoothing) * label_z;
  if (smoothing > Acc(0)) cross_entropy -= smoothing * inv_classes * sums.sum_z;
  row.loss = (Acc(1) - alpha) * cross_entropy;
  Acc scale = (Acc(1) - alpha) * factor;
  row.of_hard = scale * inverse(sum);
  row.uniform = scale * smoothing * inv_classes;
  row.at_label = scale * (Acc(1) - smoothing);
  return row;
}

}  // namespace math
}  // namespace kdkernels
