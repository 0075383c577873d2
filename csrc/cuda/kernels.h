// The CUDA kernels, as the ops call them: launched on a stream, errors of the launch returned.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/plan.h"
#include "params.h"

namespace kdkernels {
namespace cuda {

// A label, an index or a number of a row's options that is out of range gives its row NaN loss and zero gradient.
cudaError_t loss(const LossParams& p, cudaStream_t stream);
int64_t loss_workspace(int64_t rows);  // doubles
cudaError_t scale_rows(const ScaleParams& p, cudaStream_t stream);
cudaError_t noise(const NoiseParams& p, cudaStream_t stream);
int64_t noise_workspace(const NoiseParams& p);  // doubles; 0 without norms
cudaError_t noise_dot(const NoiseDotParams& p, cudaStream_t stream);
int64_t noise_dot_workspace(const NoiseDotParams& p);
cudaError_t combine(const CombineParams& p, cudaStream_t stream);
cudaError_t update(const UpdateParams& p, cudaStream_t stream);
int64_t update_workspace(const UpdateParams& p);
cudaError_t stochastic_round(const RoundParams& p, cudaStream_t stream);
cudaError_t dropout(const DropoutParams& p, cudaStream_t stream);
cudaError_t regression(const RegressionParams& p, cudaStream_t stream);

}  // namespace cuda
}  // namespace kdkernels
