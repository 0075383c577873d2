// In place of the CPU kernels of the higher ISA levels, which take a minute each to compile and which no op calls where
// tensors are the emulated device's: those of the lowest.
#include "cpu/kernels.h"

namespace kdkernels {
namespace cpu {

extern const Kernels kernels_baseline, kernels_avx2, kernels_avx512;

namespace {

Kernels baseline_as(const char* isa) {
  Kernels kernels = kernels_baseline;
  kernels.isa = isa;
  return kernels;
}

}  // namespace

const Kernels kernels_avx2 = baseline_as("avx2"), kernels_avx512 = baseline_as("avx512");

}  // namespace cpu
}  // namespace kdkernels
