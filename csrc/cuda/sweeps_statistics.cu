// Sweeps that give statistics of their rows.
#include "cuda/sweeps.cuh"

namespace kdkernels {
namespace cuda {

cudaError_t sweeps_with_statistics(Sweeps& sweeps, cudaStream_t stream) {
  return launch_sweeps<Extra::kStatistics>(sweeps, stream);
}

}  // namespace cuda
}  // namespace kdkernels
