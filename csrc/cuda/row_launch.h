// The launches of rows, of which cuda::loss makes one: sweeps, in a file for each Extra of cuda/plan.h so that they compile
// side by side, and the passes of the general kernel.
#pragma once

#include "cuda/kernels.h"
#include "cuda/plan.h"

namespace kdkernels {
namespace cuda {

// Rows' losses, gradients and statistics.
struct RowLaunch {
  const LossParams& p;
  double inv_denominator;
  const double* device_inv_denominator;  // instead of the number, or null
  double* partial;  // sums of the loss, or null
  int64_t partials = 0;  // how many of them; set by the launch
};
cudaError_t plain_sweeps(RowLaunch& rows, cudaStream_t stream);
cudaError_t sweeps_with_statistics(RowLaunch& rows, cudaStream_t stream);
cudaError_t sweeps_of_transforms(RowLaunch& rows, cudaStream_t stream);
cudaError_t general_passes(RowLaunch& rows, cudaStream_t stream);

}  // namespace cuda
}  // namespace kdkernels
