// Sweeps over scaled or capped logits, or probabilities.
#include "cuda/sweeps.cuh"

namespace kdkernels {
namespace cuda {

cudaError_t sweeps_of_transforms(RowLaunch& rows, cudaStream_t stream) {
  return launch_sweeps<Extra::kTransforms>(rows, stream);
}

}  // namespace cuda
}  // namespace kdkernels
