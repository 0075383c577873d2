// Sweeps over scaled or capped logits, or probabilities.
#include "cuda/sweeps.cuh"

namespace kdkernels {
namespace cuda {

cudaError_t sweeps_of_transforms(Sweeps& sweeps, cudaStream_t stream) {
  return launch_sweeps<Extra::kTransforms>(sweeps, stream);
}

}  // namespace cuda
}  // namespace kdkernels
