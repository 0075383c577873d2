// The kernels of whole rows in launches of few blocks, so that a block has many rows: cuda/plan.h bounds the number
// of blocks only beyond 16,384 of them.
#include "cuda/long_rows.cuh"
#include "cuda/short_rows.cuh"

namespace kdkernels {
namespace cuda {
namespace {

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int blocks, const DistillationPlan& plan,
                   Arguments... arguments) {
  cudaError_t error =
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                           cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(plan.cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks * plan.cluster));
  config.blockDim = dim3(static_cast<unsigned>(plan.threads));
  config.dynamicSmemBytes = static_cast<size_t>(plan.shared);
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

template <class Policy, Extra kExtra>
cudaError_t launch_sweeps(int cluster, int blocks, const LossParams& p, const Task<float>& task) {
  Device device;
  cudaError_t error =
      device_of(reinterpret_cast<const void*>(row_kernel<float, Policy, true, kExtra>), device);
  if (error != cudaSuccess) return error;
  DistillationPlan plan =
      plan_distillation(p.classes, sizeof(float), kExtra, device, math::kThirdSweep<Policy>);
  int resident = 0;
  if (cluster > 1)
    plan = held_plan(p.classes, sizeof(float), kExtra, math::kThirdSweep<Policy>, cluster, device,
                     resident);
  if (cluster == 0) plan = {Walk::kStream, kStreamThreads, kStreamThreads, 1, 1, 0, 0};
  switch (plan.walk) {
    case Walk::kTile:
      return launch(tile_kernel<float, Policy, kExtra>, blocks, plan, p, task, plan.lanes,
                    plan.rows);
    case Walk::kWarp:
      if constexpr (!math::kThirdSweep<Policy>)
        return launch(warp_kernel<float, Policy, kExtra>, blocks, plan, p, task);
      break;
    case Walk::kHeld:
      return launch(row_kernel<float, Policy, true, kExtra>, blocks, plan, p, task, plan.cluster,
                    plan.slots);
    case Walk::kStream:
      return launch(row_kernel<float, Policy, false, kExtra>, blocks, plan, p, task, 1, 0);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

// Losses per row, unless row_loss is null, and gradients of forward KL or, by three sweeps, total variation, with
// alpha = 0.5 and T = 2, in `blocks` blocks or clusters. cluster 0: rows too long for shared memory. partial: a double
// a block of the launch. statistics: where not null the student's logits are capped at 5, too.
extern "C" int launch_few(int three_sweeps, int cluster, int blocks, const float* student,
                          const float* teacher, const int64_t* labels, float* gradient,
                          float* row_loss, double* partial, float* statistics, int64_t rows,
                          int64_t classes) {
  LossParams p = {};
  p.rows = rows;
  p.classes = p.all_classes = classes;
  p.student_rows.inner = p.gradient_rows.inner = p.teacher_rows[0].inner = classes;
  p.student = student;
  p.teacher_data[0] = teacher;
  p.labels = labels;
  p.gradient = gradient;
  p.row_loss = row_loss;
  p.statistics = statistics;
  p.divergence = three_sweeps ? math::Divergence::kTotalVariation : math::Divergence::kForwardKL;
  Task<float> task = {CrossEntropy::kOwn,
                      false,
                      static_cast<float>(math::kLog2E / 2),
                      2,
                      0.5f,
                      0.5f,
                      0,
                      1 / static_cast<float>(classes),
                      1,
                      nullptr,
                      partial,
                      math::Parameters<float>::without_series(p)};
  task.logits = {math::Transform<float>::of(1, 5), math::Transform<float>::of(1, 0), false};
  auto run = [&](auto policy) {
    using Policy = decltype(policy);
    return statistics != nullptr
               ? launch_sweeps<Policy, Extra::kTransforms>(cluster, blocks, p, task)
               : launch_sweeps<Policy, Extra::kNothing>(cluster, blocks, p, task);
  };
  return three_sweeps ? run(AnySweeps{}) : run(ForwardSweeps{});
}

}  // namespace cuda
}  // namespace kdkernels
