// The launches of rows by sweeps, which cuda::loss makes: a file for each Extra, so that they compile side by side.
#pragma once

#include "cuda/kernels.h"
#include "cuda/plan.h"

namespace kdkernels {
namespace cuda {

// What rows are divided by, as 1 / it.
struct Inverse {
  double number;
  const double* on_device;  // instead of it, or null
};

// Rows' losses and gradients, and statistics. `partial`: sums of the loss, `partials` of them, or null.
struct Sweeps {
  const LossParams& p;
  Inverse inverse;
  double* partial;
  int64_t partials;
};
cudaError_t plain_sweeps(Sweeps& sweeps, cudaStream_t stream);
cudaError_t sweeps_with_statistics(Sweeps& sweeps, cudaStream_t stream);
cudaError_t sweeps_of_transforms(Sweeps& sweeps, cudaStream_t stream);

}  // namespace cuda
}  // namespace kdkernels
