// How rows of two matrices are launched: cuda/plan.h chooses the walk of a row; what the walks compute on their way stands
// in math/distillation.h.
#pragma once

#include "cuda/long_rows.cuh"
#include "cuda/row_launch.h"
#include "cuda/short_rows.cuh"
#include "row_task.h"

namespace kdkernels {
namespace cuda {
namespace {

CrossEntropy cross_entropy(const LossParams& p) {
  if (p.labels == nullptr || p.alpha == 1) return CrossEntropy::kNone;
  return p.temperature == 1 ? CrossEntropy::kShared : CrossEntropy::kOwn;
}

template <class T, class Policy, Extra kExtra>
cudaError_t launch_walk(const LossParams& p, const Task<typename Compute<T>::type>& task,
                        const DistillationPlan& plan, const Device& device, cudaStream_t stream) {
  const Grid grid = {plan.partials(p.rows) * plan.cluster, plan.threads, plan.shared, plan.cluster,
                     task.device_inv_denominator != nullptr};
  auto launch = [&](auto kernel, auto... arguments) {
    const cudaError_t error =
        allow_shared(reinterpret_cast<const void*>(kernel), plan.shared, kRowStatic, device);
    return error != cudaSuccess
               ? error
               : launch_kernel(kernel, grid, device, stream, p, task, arguments...);
  };
  switch (plan.walk) {
    case Walk::kTile: return launch(tile_kernel<T, Policy, kExtra>, plan.lanes, plan.rows);
    case Walk::kWarp:
      if constexpr (sizeof(T) < 8 && !math::kThirdSweep<Policy>)
        return launch(warp_kernel<T, Policy, kExtra>);
      break;
    case Walk::kHeld: return launch(row_kernel<T, Policy, true, kExtra>, plan.cluster, plan.slots);
    case Walk::kStream: return launch(row_kernel<T, Policy, false, kExtra>, 1, 0);
  }
  return cudaErrorInvalidValue;
}

template <class T, class Policy, Extra kExtra>
cudaError_t launch_sweeps(RowLaunch& rows, cudaStream_t stream) {
  using Real = typename Compute<T>::type;
  const LossParams& p = rows.p;
  Device device;
  cudaError_t error =
      device_of(reinterpret_cast<const void*>(row_kernel<T, Policy, true, kExtra>), device);
  if (error != cudaSuccess) return error;
  CrossEntropy hard = cross_entropy(p);
  const DistillationPlan plan =
      plan_distillation(p.classes, sizeof(T), kExtra, device, math::kThirdSweep<Policy>);
  rows.partials = plan.partials(p.rows) * plan.cluster;
  Task<Real> task = {hard,
                     hard != CrossEntropy::kNone && p.label_smoothing > 0,
                     static_cast<Real>(math::kLog2E / p.temperature),
                     static_cast<Real>(p.temperature),
                     static_cast<Real>(1 / p.temperature),
                     static_cast<Real>(p.alpha),
                     static_cast<Real>(p.label_smoothing),
                     static_cast<Real>(1.0 / static_cast<double>(p.classes)),
                     rows.inv_denominator,
                     rows.device_inv_denominator,
                     rows.partial,
                     {},
                     logits_of<Real>(p)};
  if constexpr (math::kThirdSweep<Policy>) task.parameters = math::parameters_of<Real>(p);
  return p.rows > 0 ? launch_walk<T, Policy, kExtra>(p, task, plan, device, stream) : cudaSuccess;
}

template <Extra kExtra>
cudaError_t launch_sweeps(RowLaunch& rows, cudaStream_t stream) {
  return by_dtype(rows.p.dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (sizeof(T) < 8 || kExtra == Extra::kNothing) {
      switch (rows.p.divergence) {
        case math::Divergence::kForwardKL:
          return launch_sweeps<T, ForwardSweeps, kExtra>(rows, stream);
        case math::Divergence::kReverseKL:
          return launch_sweeps<T, ReverseSweeps, kExtra>(rows, stream);
        default:
          if constexpr (sizeof(T) < 8) return launch_sweeps<T, AnySweeps, kExtra>(rows, stream);
      }
    }
    return cudaErrorInvalidValue;
  });
}

}  // namespace
}  // namespace cuda
}  // namespace kdkernels
