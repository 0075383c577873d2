// Sweeps that give statistics of their rows.
#include "cuda/sweeps.cuh"

namespace kdkernels {
namespace cuda {

cudaError_t sweeps_with_statistics(RowLaunch& rows, cudaStream_t stream) {
  return launch_sweeps<Extra::kStatistics>(rows, stream);
}

}  // namespace cuda
}  // namespace kdkernels
