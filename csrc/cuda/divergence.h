// The launch of the divergence kernel, which cuda::loss makes.
#pragma once

#include "cuda/kernels.h"

namespace kdkernels {
namespace cuda {

// Partial sums of the loss that a launch leaves, one a block.
inline int64_t divergence_partials(const LossParams& p) { return std::min(p.rows, kMaxPartials); }

// Rows' losses, gradients and statistics. `device_inv_denominator`: instead of the number, or null;
// `partial`: divergence_partials(p) sums, or null.
cudaError_t divergence_rows(const LossParams& p, double inv_denominator,
                            const double* device_inv_denominator, double* partial,
                            cudaStream_t stream);

}  // namespace cuda
}  // namespace kdkernels
