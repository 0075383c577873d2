// How a call is told to others: to math/row.h, and by the one-pass kernels to the walkers of any divergence.
#pragma once

#include "math/row.h"
#include "params.h"

namespace kdkernels {

KD_FN math::RowTask row_task(const DivergenceParams& p) {
  math::RowTask task = {};
  task.divergence = p.divergence;
  task.beta = p.beta;
  task.second = p.second;
  task.temperature = 1;
  task.alpha = p.alpha;
  task.smoothing = p.label_smoothing;
  task.all_classes = static_cast<double>(p.all_classes);
  task.cross_entropy = p.labels != nullptr && p.alpha < 1;
  // Slices do the same whatever their ranks are asked for.
  task.compares = p.alpha > 0 || p.statistics != nullptr || p.state != nullptr;
  if (!task.compares) return task;
  task.temperature = p.temperature;
  task.standardize = p.standardize;
  task.mixed = p.teachers > 1;
  task.aside_label = p.divergence == math::Divergence::kDecoupled;
  task.entries = p.tail != Tail::kNone;
  task.renormalize = p.tail == Tail::kRenormalize;
  task.bucket = p.tail == Tail::kBucket;
  task.ignore = p.tail == Tail::kIgnore;
  return task;
}

// A call of the one-pass kernels for the walkers of any divergence.
KD_FN DivergenceParams forward_kl(const DistillationParams& p) {
  DivergenceParams general = {};
  static_cast<DistillationParams&>(general) = p;
  general.divergence = math::Divergence::kForwardKL;
  general.logit_scale = general.teacher_logit_scale = 1;
  general.teachers = 1;
  general.teacher_data[0] = p.teacher;
  general.teacher_strides[0] = p.teacher_stride;
  general.teacher_weights[0] = 1;
  general.all_classes = p.classes;
  general.stages = kAllStages;
  return general;
}

}  // namespace kdkernels
