// The CUDA kernels, as the ops call them: launched on a stream, errors of the launch returned.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/plan.h"
#include "params.h"

namespace kdkernels {
namespace cuda {

// A label out of range gives its row NaN loss and zero gradient.
cudaError_t distillation(const DistillationParams& p, cudaStream_t stream);
int64_t distillation_workspace(int64_t rows);  // doubles
// Any divergence, teacher and layout; p.workspace holds divergence_workspace(rows) doubles. An index out of range
// counts as such a label does.
cudaError_t divergence(const DivergenceParams& p, cudaStream_t stream);
int64_t divergence_workspace(int64_t rows);
cudaError_t scale_rows(const ScaleParams& p, cudaStream_t stream);
cudaError_t noise(const NoiseParams& p, cudaStream_t stream);
int64_t noise_workspace(const NoiseParams& p);  // doubles; 0 without norms
cudaError_t noise_dot(const NoiseDotParams& p, cudaStream_t stream);
int64_t noise_dot_workspace(const NoiseDotParams& p);
cudaError_t combine(const CombineParams& p, cudaStream_t stream);
cudaError_t update(const UpdateParams& p, cudaStream_t stream);
int64_t update_workspace(const UpdateParams& p);
cudaError_t regression(const RegressionParams& p, cudaStream_t stream);

}  // namespace cuda
}  // namespace kdkernels
