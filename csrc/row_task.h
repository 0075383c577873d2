// What math/row.h is told of a call.
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

}  // namespace kdkernels
