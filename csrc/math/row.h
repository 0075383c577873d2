// One row of a distillation loss of any divergence: what each pass over it adds up, and what follows of the
// sums. The sums are fp64, and each is a maximum or a sum over classes, so that slices of a vocabulary can
// be added up over ranks.
//
//   loss = alpha T^2 D(p, q) + (1 - alpha) CE(u, label; smoothing)
//   log q = (u - max_s) scale_s - log_sum_s, and so for the teacher
//
// Some classes are kept separate from the row's own sums: the label (DKD) or the entries of a top-k teacher.
#pragma once

#include "math/divergence.h"

namespace kdkernels {
namespace math {

// Sums of one row. Fields in the order of the passes that make them.
struct RowState {
  // moments, of the finite logits
  double count_s, moment_s, square_s, count_t, moment_t, square_t;
  // maxima: of the row's own logits; of the entries'
  double max_s, max_t, entry_max_s, entry_max_t;
  // the class of the largest logit, for the statistics
  double best_s, best_t;
  // sums, relative to the maxima: of exponentials at temperature T; of e^(u - max); of all u
  double sum_s, sum_t, hard, entry_sum_s, entry_sum_t, entry_hard, total_u;
  double entry_count;
  double label_s, label_t;  // the label's logits, from the slice that holds it
  // terms
  double f, a, b;  // of ClassShare
  double self_s, self_t;  // of q log q, p log p
  double az, qz, bz, pz;  // of a, q, b, p times the standardised logit
  double part_p, part_q;  // probability of the entries
};
constexpr int kRowState = sizeof(RowState) / sizeof(double);
constexpr int kStatistics = 6;
constexpr double kLowestState = -1.7976931348623157e308;  // the maximum of no logits

// What is the same for all rows.
struct RowTask {
  Divergence divergence;
  double divergence_alpha, beta;
  double temperature, alpha, smoothing;
  double all_classes;
  bool compares;  // D is wanted; else there is cross-entropy only, and all below is false
  bool cross_entropy;  // alpha < 1
  bool standardize;
  bool mixed;  // several teachers: each was standardised, and their mixture has no logits
  bool separate_label;  // DKD
  bool entries;  // the teacher has entries only
  bool renormalize, bucket, ignore;  // what is done about the others
};

// After the moments: u' = (u - mean) / std, as a factor and a shift.
struct RowMoments {
  double mean, inv_std, inv_count;  // 1 / (n - 1)
};

KD_FN RowMoments moments_of(double count, double moment, double square) {
  if (!(count > 1)) return {count == 1 ? moment : 0.0, 0.0, 0.0};
  double mean = moment / count;
  double variance = (square - moment * mean) / (count - 1);
  // What rounding leaves of a row of equal logits.
  bool flat = variance <= (1e-14 + 2.3e-16 * count) * mean * mean || variance == 0;
#if defined(__CUDA_ARCH__)
  double inv_std = flat ? 0.0 : ::rsqrt(variance);
#else
  double inv_std = flat ? 0.0 : 1.0 / __builtin_sqrt(variance);
#endif
  return {mean, inv_std, 1.0 / (count - 1)};
}

// After the sums: what turns a class's logits into log q, log p and d.
struct RowNorm {
  double scale_s, scale_t;  // of logits, in nats
  double max_s, max_t, log_sum_s, log_sum_t;
  RowMoments s, t;
};

KD_FN double log_add(double a, double b) {
  double larger = a > b ? a : b, smaller = a > b ? b : a;
  if (!(larger > kLowestState)) return larger;
  return larger + log_acc(1.0 + exp_acc(smaller - larger));
}

// A scale of 0 would turn -inf into NaN; this one makes every finite logit equal.
constexpr double kNoScale = 1e-30;

KD_FN void scales(const RowTask& task, const RowState& x, RowNorm& norm) {
  norm.scale_s = norm.scale_t = 1.0 / task.temperature;
  norm.s = norm.t = RowMoments{0.0, 1.0, 0.0};
  if (task.standardize) {
    norm.s = moments_of(x.count_s, x.moment_s, x.square_s);
    norm.scale_s = norm.s.inv_std > 0 ? norm.s.inv_std / task.temperature : kNoScale;
  }
  if (task.standardize && !task.mixed) {
    norm.t = moments_of(x.count_t, x.moment_t, x.square_t);
    norm.scale_t = norm.t.inv_std > 0 ? norm.t.inv_std / task.temperature : kNoScale;
  }
}

// teacher_logsumexp: of the whole vocabulary, for entries that are not renormalised.
KD_FN void normalize(const RowTask& task, const RowState& x, double teacher_logsumexp,
                     RowNorm& norm) {
  if (!task.entries) {
    norm.max_s = x.max_s;
    norm.max_t = x.max_t;
    norm.log_sum_s = log_acc(x.sum_s);
    norm.log_sum_t = log_acc(x.sum_t);
  } else if (task.renormalize) {
    norm.max_s = x.entry_max_s;
    norm.max_t = x.entry_max_t;
    norm.log_sum_s = log_acc(x.entry_sum_s);
    norm.log_sum_t = log_acc(x.entry_sum_t);
  } else {
    double max = x.max_s > x.entry_max_s ? x.max_s : x.entry_max_s;
    norm.max_s = max;
    norm.log_sum_s = log_acc(x.sum_s * exp_acc((x.max_s - max) * norm.scale_s) +
                             x.entry_sum_s * exp_acc((x.entry_max_s - max) * norm.scale_s));
    // A float near it, so that differences of logits stay exact.
    norm.max_t = static_cast<float>(teacher_logsumexp * task.temperature);
    norm.log_sum_t = teacher_logsumexp - norm.max_t / task.temperature;
  }
}

// Sums in fp32 leave an error of some 1e-8 in log_sum_s - log_sum_t, and so in every d. Most divergences do not
// feel it where p and q are close, since sum p d is 0 to first order. Those that do take it from `excess`, the
// sum over classes of q - p = difference(q, p, -d), which is 0 but for that error.
KD_FN void refine(RowNorm& norm, double excess) { norm.log_sum_s += log_of_excess(excess); }

// The label beside the others, as DKD has it: b = (p_y, 1 - p_y).
struct Binary {
  double q, p, rest_q, rest_p;  // probabilities
  double log_q, log_p, log_rest_q, log_rest_p;
  double logsumexp_s, logsumexp_t;
};

KD_FN Binary binary_of(const RowState& x, RowNorm norm) {
  // Each side's logarithms relative to one of its logits; nothing beside the label: -inf.
  refine(norm, x.a);
  double zero_s = x.sum_s > 0 ? norm.max_s : x.label_s,
         zero_t = x.sum_t > 0 ? norm.max_t : x.label_t;
  double rest_s = norm.log_sum_s, label_s = (x.label_s - zero_s) * norm.scale_s;
  double rest_t = norm.log_sum_t, label_t = (x.label_t - zero_t) * norm.scale_t;
  double all_s = log_add(rest_s, label_s), all_t = log_add(rest_t, label_t);
  Binary y;
  y.logsumexp_s = all_s + zero_s * norm.scale_s;
  y.logsumexp_t = all_t + zero_t * norm.scale_t;
  y.log_q = label_s - all_s;
  y.log_p = label_t - all_t;
  y.log_rest_q = rest_s - all_s;
  y.log_rest_p = rest_t - all_t;
  y.q = exp_acc(y.log_q);
  y.p = exp_acc(y.log_p);
  y.rest_q = exp_acc(y.log_rest_q);
  y.rest_p = exp_acc(y.log_rest_p);
  return y;
}

// After the terms. The gradient in the student's transformed logit u of class i is
//   of_a a + of_q q + of_hard e^(u - hard_max) - uniform + of_z (u - mean)
// less at_label in the label's; a class that is no entry has of_other e^((u - state.max_s) scale_s) in place of
// the first two, a label kept separate label_s. The gradient of a row whose loss is NaN is NaN. In the teacher's: of_b b + of_p p + of_tz (t - mean_t), and label_t.
struct RowGradient {
  double loss, divergence;
  double of_a, of_q, of_other, of_hard, hard_max, uniform, at_label, of_z, label_s;
  double of_b, of_p, of_tz, label_t;
};

// The terms of the classes beside a label; of a teacher without any others they are 0.
KD_FN double others(const RowState& x) {
  if (x.sum_t == 0) return 0.0;
  return x.sum_s == 0 ? __builtin_inf() : x.f;
}

// Rows with NaN or +inf among their logits, or without any above -inf: a sum of exponentials says so.
KD_FN bool broken(const RowTask& task, const RowState& x) {
  double s = x.sum_s + x.entry_sum_s, t = task.entries ? x.entry_sum_t : x.sum_t;
  if (task.separate_label) {
    s += x.label_s == -__builtin_inf() ? 0.0 : 1 + 0 * x.label_s;
    t += x.label_t == -__builtin_inf() ? 0.0 : 1 + 0 * x.label_t;
  }
  bool no_entry = task.renormalize && x.entry_count == 0;
  if (task.renormalize) s = x.entry_sum_s;
  bool student = !(s > 0 && s < __builtin_inf()) && !no_entry;
  bool teacher = !(t > 0 && t < __builtin_inf()) && !no_entry;
  if (task.bucket || task.ignore) teacher = !(x.part_p >= 0 && x.part_p < __builtin_inf());
  bool hard = task.cross_entropy && !(x.hard + x.entry_hard < __builtin_inf());
  return student || hard || (task.compares && task.alpha > 0 && teacher);
}

// All classes that are no entry, as one.
KD_FN Element<double> bucket_of(const RowTask& task, const RowState& x, const RowNorm& norm) {
  double log_q = (x.max_s - norm.max_s) * norm.scale_s - norm.log_sum_s;
  log_q = x.sum_s > 0 ? log_q + log_acc(x.sum_s) : -__builtin_inf();
  // Where there are none its p is 0, whatever rounding leaves.
  bool any = x.part_p < 1 && x.entry_count < task.all_classes;
  double p = any ? 1 - x.part_p : 0.0, log_p = log_acc(p);
  const double d = log_p - log_q;
  return {p, exp_acc(log_q), smaller_over_larger(d), d, log_p * kLog2E, log_q * kLog2E};
}

// factor: the row's weight over the denominator.
KD_FN RowGradient finish(const RowTask& task, const RowState& x, const RowNorm& norm,
                         double factor) {
  RowGradient y = {};
  double f = x.f < 0 ? 0.0 : x.f;  // of rounded terms
  double a = x.a, b = x.b, a_of_q = 0, b_of_p = 0;
  double of_rest = 0;  // a of all classes that are no entry
  double target = 1, weight_s = 0, weight_t = 0;
  if (task.separate_label) {
    Binary y2 = binary_of(x, norm);
    double d = y2.log_p - y2.log_q, rest_d = y2.log_rest_p - y2.log_rest_q;
    // Of the terms of the other classes, where both sides have some.
    target = x.sum_s > 0 && x.sum_t > 0 ? task.beta : 0.0;
    f = task.divergence_alpha * (excess(y2.p, y2.q, d) + excess(y2.rest_p, y2.rest_q, rest_d)) +
        (task.beta == 0 ? 0.0 : task.beta * others(x));
    weight_s = task.divergence_alpha * difference(y2.q, y2.p, -d);
    weight_t = task.divergence_alpha * times(y2.p * y2.rest_p, d - rest_d);
    // Where the label's logit excludes it or all others, its probability does not move.
    a = target == 0 ? 0.0 : target * x.a;
    b = target == 0 ? 0.0 : target * x.b;
  } else if (task.ignore) {
    double plain = plain_share(task.divergence, task.beta);
    f += plain * (x.part_p - x.part_q);
    a -= plain * x.part_q;
    b += plain * x.part_p;
    a_of_q = -plain;
    b_of_p = plain;
  } else if (task.bucket) {
    const Element<double> rest = bucket_of(task, x, norm);
    ClassShare<double> share = {};
    with_policy(task, [&](auto policy) {
      share = decltype(policy)::share(rest, Parameters<double>::without_series(task));
    });
    // Without a bucket p does not quite sum to 1, as f expects.
    if (rest.p == 0) f += plain_share(task.divergence, task.beta) * (x.part_p - 1);
    f += share.f;
    a += share.a;
    of_rest = share.a;
  }
  y.divergence = f;
  double scale = task.alpha * task.temperature * task.temperature * factor;
  if (task.alpha > 0) {
    y.loss = task.alpha * task.temperature * task.temperature * f;
    double of_s = scale * (norm.s.inv_std > 0 ? norm.scale_s : 0.0);
    double of_t = scale * (norm.t.inv_std > 0 ? norm.scale_t : 0.0);
    y.of_a = of_s * target;
    y.of_q = of_s * (a_of_q - a - weight_s);
    if (task.bucket || task.ignore) {
      double log_e = (x.max_s - norm.max_s) * norm.scale_s - norm.log_sum_s;
      double of_e =
          (task.bucket && x.sum_s > 0 ? of_rest / x.sum_s : 0.0) - times(exp_acc(log_e), a);
      y.of_other = x.sum_s > 0 ? of_s * of_e : 0.0;
    }
    y.label_s = of_s * weight_s;
    y.of_b = of_t * target;
    y.of_p = of_t * (b_of_p - b - weight_t);
    y.label_t = of_t * weight_t;
    if (task.standardize) {
      double label_z = (x.label_s - norm.s.mean) * norm.s.inv_std;
      double label_tz = (x.label_t - norm.t.mean) * norm.t.inv_std;
      double along = y.of_a * x.az + y.of_q * x.qz + times(y.label_s, label_z);
      double along_t = y.of_b * x.bz + y.of_p * x.pz + times(y.label_t, label_tz);
      y.of_z = -along * norm.s.inv_std * norm.s.inv_count;
      y.of_tz = -along_t * norm.t.inv_std * norm.t.inv_count;
    }
  }
  y.hard_max =
      __builtin_inf();  // without a hard loss its exponentials are 0, never 0 times infinity
  if (task.cross_entropy) {
    // Together with what is kept separate, relative to the larger maximum.
    double separate = task.separate_label ? x.label_s : x.entry_max_s;
    double of_separate = task.separate_label ? 1.0 : x.entry_hard;
    bool any_separate = task.separate_label || task.entries;
    double max = any_separate && separate > x.max_s ? separate : x.max_s;
    double sum = x.hard * exp_acc(x.max_s - max);
    if (any_separate) sum += of_separate * exp_acc(separate - max);
    double log_sum = log_acc(sum);
    y.hard_max = max;
    double keep = 1 - task.smoothing, share = (1 - task.alpha) * factor;
    double logsumexp = max + log_sum;
    double cross_entropy = keep == 0 ? 0.0 : keep * (logsumexp - x.label_s);
    if (task.smoothing > 0) {
      cross_entropy += task.smoothing * (logsumexp - x.total_u / task.all_classes);
    }
    y.loss += (1 - task.alpha) * cross_entropy;
    y.of_hard = share * exp_acc(-log_sum);
    y.uniform = share * task.smoothing / task.all_classes;
    y.at_label = share * keep;
  }
  if (broken(task, x)) y.loss = y.divergence = __builtin_nan("");
  return y;
}

// RowStatistics of kdkernels/reference/rows.py.
KD_FN void statistics_of(const RowTask& task, const RowState& x, const RowNorm& norm, double label,
                         double divergence, double (&out)[kStatistics]) {
  double lse_s = norm.max_s * norm.scale_s + norm.log_sum_s;
  double lse_t = norm.max_t * norm.scale_t + norm.log_sum_t;
  double entropy_s = -x.self_s, entropy_t = -x.self_t;
  double best_s = x.best_s, best_t = x.best_t;
  if (task.separate_label) {
    Binary b = binary_of(x, norm);
    entropy_s = b.rest_q * entropy_s - times(b.rest_q, b.log_rest_q) - times(b.q, b.log_q);
    entropy_t = b.rest_p * entropy_t - times(b.rest_p, b.log_rest_p) - times(b.p, b.log_p);
    lse_s = b.logsumexp_s;
    lse_t = b.logsumexp_t;
    if (x.label_s > x.max_s || (x.label_s == x.max_s && label < best_s)) best_s = label;
    if (x.label_t > x.max_t || (x.label_t == x.max_t && label < best_t)) best_t = label;
  }
  if (task.bucket) {
    Element<double> rest = bucket_of(task, x, norm);
    entropy_s -= times(rest.q, nats(rest.log2_q));
    entropy_t -= times(rest.p, nats(rest.log2_p));
  }
  if (task.standardize) {
    lse_s -= norm.s.mean * norm.scale_s;
    lse_t -= norm.t.mean * norm.scale_t;
  }
  if (task.mixed) lse_t = 0;
  double values[kStatistics] = {lse_s,     lse_t,      entropy_s,
                                entropy_t, divergence, best_s == best_t ? 1.0 : 0.0};
  // All of a broken row is NaN, so that the first class is the largest.
  if (broken(task, x)) {
    for (int i = 0; i < kStatistics; ++i) values[i] = i == 5 ? 1.0 : __builtin_nan("");
  }
  for (int i = 0; i < kStatistics; ++i) out[i] = values[i];
}

}  // namespace math
}  // namespace kdkernels
