// What a call's parameters say of its rows, for math/row.h and for the choice of a kernel.
#pragma once

#include "math/row_element.h"
#include "params.h"

namespace kdkernels {

KD_FN math::RowTask row_task(const LossParams& p) {
  math::RowTask task = {};
  task.divergence = p.divergence;
  task.divergence_alpha = p.divergence_alpha;
  task.beta = p.beta;
  task.temperature = 1;
  task.alpha = p.alpha;
  task.smoothing = p.label_smoothing;
  task.all_classes = static_cast<double>(p.all_classes);
  task.cross_entropy = p.labels != nullptr && p.alpha < 1;
  // All ranks take the same passes, whichever outputs each of them wants.
  task.compares = p.alpha > 0 || p.statistics != nullptr || p.state != nullptr;
  if (!task.compares) return task;
  task.temperature = p.temperature;
  task.standardize = p.standardize;
  task.mixed = p.teachers > 1;
  task.separate_label = p.divergence == math::Divergence::kDecoupled;
  task.entries = p.tail != Tail::kNone;
  task.renormalize = p.tail == Tail::kRenormalize;
  task.bucket = p.tail == Tail::kBucket;
  task.ignore = p.tail == Tail::kIgnore;
  return task;
}

template <class Real>
KD_FN math::Logits<Real> logits_of(const LossParams& p) {
  using Transform = math::Transform<Real>;
  return {Transform::of(p.logit_scale, p.soft_cap),
          Transform::of(p.teacher_logit_scale, p.teacher_soft_cap), p.probs};
}

KD_FN bool has_row_options(const LossParams& p) {
  for (int i = 0; i < kRowOptions; ++i) {
    if (p.row_options[i] != nullptr) return true;
  }
  return false;
}

// Whether a call compares two matrices class by class, with the same numbers for all rows: what sweeps take.
KD_FN bool is_of_two_matrices(const LossParams& p) {
  return !has_row_options(p) && p.teachers == 1 && p.tail == Tail::kNone && !p.standardize &&
         p.teacher_gradient == nullptr && p.state == nullptr;
}

// Whether these are logits as they are, and only the loss and its gradient are wanted.
KD_FN bool is_of_plain_logits(const LossParams& p) {
  return is_of_two_matrices(p) && !p.probs && p.logit_scale == 1 && p.soft_cap == 0 &&
         p.teacher_logit_scale == 1 && p.teacher_soft_cap == 0 && p.statistics == nullptr;
}

// The divergence of a call and its parameters, by its name's. At the limits of a parameter another one is exact.
// False: it has no such parameters.
KD_FN bool set_divergence(math::Divergence named, double alpha, double beta, LossParams& out) {
  using math::Divergence;
  out.divergence = named;
  out.divergence_alpha = alpha;
  out.beta = beta;
  bool forward = false, reverse = false;
  switch (named) {
    case Divergence::kJS:
      forward = beta == 0;
      reverse = beta == 1;
      break;
    case Divergence::kSkewForwardKL: forward = beta == 0; break;
    case Divergence::kSkewReverseKL: reverse = beta == 0; break;
    case Divergence::kAlphaBeta:
      forward = alpha == 1 && beta == 0;
      reverse = alpha == 0 && beta == 1;
      break;
    default: break;
  }
  if (forward) out.divergence = Divergence::kForwardKL;
  if (reverse) out.divergence = Divergence::kReverseKL;
  return named != Divergence::kAlphaBeta || alpha > 0 || beta > 0;
}

// Whether a number that a tensor has for an option may stand there; the ops check numbers that are none of a tensor's.
KD_FN bool in_range(RowOption option, math::Divergence divergence, double value) {
  switch (option) {
    case kTemperature: return value >= kLeastTemperature && value <= kLargestTemperature;
    case kAlpha: return value >= 0 && value <= 1;
    case kDivergenceAlpha:
    case kBeta: return value >= 0 && value <= math::largest_parameter(divergence);
    default: return value > 0 && value <= kLargestNumber;
  }
}

// The call of one row, with that row's options where the call has tensors of them. False: one is out of range.
template <class Real>
KD_FN bool options_of_row(const LossParams& call, int64_t row, LossParams& out) {
  const math::Divergence named = call.divergence;
  double alpha = call.divergence_alpha, beta = call.beta;
  double* const numbers[kRowOptions] = {
      &out.temperature,
      &out.alpha,
      &alpha,
      &beta,
      &out.logit_scale,
      &out.soft_cap,
      &out.teacher_logit_scale,
      &out.teacher_soft_cap,
  };
  out = call;
  bool valid = true;
  for (int i = 0; i < kRowOptions; ++i) {
    out.row_options[i] = nullptr;
    if (call.row_options[i] == nullptr) continue;
    *numbers[i] = static_cast<double>(static_cast<const Real*>(call.row_options[i])[row]);
    valid &= in_range(static_cast<RowOption>(i), named, *numbers[i]);
  }
  valid &= set_divergence(named, alpha, beta, out);
  return valid;
}

}  // namespace kdkernels
