// The distillation loss of one row, in terms of running sums that any walker can collect.
//
//   loss = alpha T^2 D(p_t, p_s) + (1 - alpha) CE(z, label; smoothing)      (Hinton et al., 2015)
//   p_s = softmax(z / T), p_t = softmax(t / T); CE at temperature 1
//
// A walker visits a row in parts. For each part it knows the largest logits so far, max_s and max_t, and
// for each element the exponents x = (z - max_s) s, y = (t - max_t) s with s = log2(e) / T, and ex = 2^x,
// ey = 2^y. Parts are merged when the maxima move. A divergence is a policy of five functions: an element's
// term of its running sum, guarded and not, how that sum moves with the maxima, the divergence that comes of
// the sums, and an element's gradient.
#pragma once

#include "math/divergence.h"

namespace kdkernels {
namespace math {

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

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
  Acc term;  // of the policy's terms
  Acc sum_hard;  // of e^(z - max_s); CrossEntropy::kOwn only
  Acc sum_z;  // of z - max_s; with label smoothing only
  Acc count;  // elements behind sum_z
};

// KL(p_t || p_s) = sum p_t (log p_t - log p_s).
struct OnePassKL {
  static constexpr bool kOfStudent = false;  // whose exponentials the terms are of
  using Terms = ForwardKL;
  // p_t = 0 contributes 0 whatever the student says; NaN stays NaN.
  template <class Real>
  KD_FN Real term(Real x, Real y, Real, Real ey) {
    return ey == Real(0) ? Real(0) : ey * (y - x);
  }
  // The same added to a sum without the guard: NaN where the guard would have made a difference.
  template <class Real>
  KD_FN Real add_unguarded(Real sum, Real x, Real y, Real, Real ey) {
    return fma(ey, y - x, sum);
  }
  // The sum of terms once all x fell by dx and all y by dy; fx = 2^-dx, fy = 2^-dy.
  template <class Acc>
  KD_FN Acc moved(const RowSums<Acc>& sums, Acc dx, Acc dy, Acc, Acc fy) {
    return sums.sum_t == Acc(0) ? Acc(0) : fy * (sums.term + sums.sum_t * (dx - dy));
  }
  // inv_s = 1 / sum_s, inv_t = 1 / sum_t.
  template <class Acc>
  KD_FN Acc divergence(const RowSums<Acc>& sums, Acc, Acc inv_t) {
    return sums.term * (inv_t * Acc(kLn2)) + log_acc(sums.sum_s * inv_t);
  }
  // T^2 dD/dz = T (p_s - p_t), as coefficients of ex and ey.
  template <class Acc>
  KD_FN void gradient(const RowSums<Acc>&, Acc inv_s, Acc inv_t, Acc temperature, Acc& of_ex,
                      Acc& of_ey) {
    of_ex = temperature * inv_s;
    of_ey = -temperature * inv_t;
  }
};

// KL(p_s || p_t), of sums whose term is that of ex (x - y); the gradient's second coefficient is of ex (x - y).
struct OnePassReverseKL {
  static constexpr bool kOfStudent = true;
  using Terms = ReverseKL;
  template <class Acc>
  KD_FN Acc divergence(const RowSums<Acc>& sums, Acc inv_s, Acc) {
    return sums.term * (inv_s * Acc(kLn2)) + log_acc(sums.sum_t * inv_s);
  }
  // T^2 dD/dz = T p_s (log p_s - log p_t - D)
  template <class Acc>
  KD_FN void gradient(const RowSums<Acc>& sums, Acc inv_s, Acc, Acc temperature, Acc& of_ex,
                      Acc& of_difference) {
    of_difference = temperature * inv_s * Acc(kLn2);
    of_ex = -of_difference * sums.term * inv_s;
  }
};

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
  out.term = Policy::moved(part, dx, dy, fx, fy);
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
  x.term += y.term;
  x.sum_hard += y.sum_hard;
  x.sum_z += y.sum_z;
  x.count += y.count;
  return x;
}

// D comes out as a difference of logarithms of sums, whose rounding errors are some 1e-7: below this they would
// be felt, and the walkers of math/row.h do the row again.
constexpr double kNearRow = 0.05;

// What a row's second pass needs: the gradient of element i is
//   of_ex ex + of_ey ey + of_hard e^(z - max_s) - uniform - (i == label ? at_label : 0).
template <class Acc>
struct RowResult {
  Acc loss;
  Acc divergence;  // infinity where nobody asks for it
  Acc of_ex, of_ey, of_hard, uniform, at_label;
};

// label_z = z[label] - max_s. `factor` is the row's weight over the denominator, for the gradient only.
template <class Policy, class Acc>
KD_FN RowResult<Acc> finish_row(CrossEntropy hard, const RowSums<Acc>& sums, Acc inv_classes,
                                Acc temperature, Acc alpha, Acc smoothing, Acc label_z,
                                Acc factor) {
  RowResult<Acc> row;
  row.divergence = Acc(__builtin_inf());
  row.loss = row.of_ex = row.of_ey = row.of_hard = row.uniform = row.at_label = Acc(0);
  Acc inv_s = inverse(sums.sum_s), inv_t = inverse(sums.sum_t);
  if (alpha > Acc(0)) {
    row.divergence = Policy::divergence(sums, inv_s, inv_t);
    row.loss = alpha * temperature * temperature * row.divergence;
    Policy::gradient(sums, inv_s, inv_t, temperature, row.of_ex, row.of_ey);
    row.of_ex *= alpha * factor;
    row.of_ey *= alpha * factor;
  }
  if (hard != CrossEntropy::kNone) {
    Acc sum = hard == CrossEntropy::kShared ? sums.sum_s : sums.sum_hard;
    Acc cross_entropy = log_acc(sum) - (Acc(1) - smoothing) * label_z;
    if (smoothing > Acc(0)) cross_entropy -= smoothing * inv_classes * sums.sum_z;
    row.loss += (Acc(1) - alpha) * cross_entropy;
    Acc scale = (Acc(1) - alpha) * factor;
    if (hard == CrossEntropy::kShared) {
      row.of_ex += scale * inv_s;
    } else {
      row.of_hard = scale * inverse(sum);
    }
    row.uniform = scale * smoothing * inv_classes;
    row.at_label = scale * (Acc(1) - smoothing);
  }
  return row;
}

}  // namespace math
}  // namespace kdkernels
