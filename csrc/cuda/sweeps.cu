// Sweeps over logits as they are.
#include "cuda/sweeps.cuh"

namespace kdkernels {
namespace cuda {

cudaError_t plain_sweeps(RowLaunch& rows, cudaStream_t stream) {
  return launch_sweeps<Extra::kNothing>(rows, stream);
}

}  // namespace cuda
}  // namespace kdkernels
