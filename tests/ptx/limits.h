// What the CUDA runtime refuses to launch.
#pragma once

#include <cuda_runtime_api.h>

#include <optional>
#include <string>

#include "emulator.h"

namespace ptx {

struct Refusal {
  cudaError_t code = cudaSuccess;
  std::string why;
};

constexpr uint64_t kSharedWithoutOptIn = 48 << 10;
// Static shared memory of the kernel, that of its module included.
uint64_t static_shared(const Module& module, const Function& kernel);
// What cudaFuncSetAttribute may allow a kernel of dynamic shared memory.
uint64_t most_dynamic_shared(const Device& device, const Module& module, const Function& kernel);
// opted_in: what it was set to, if it was.
Refusal refuse(const Device& device, const Module& module, const Function& kernel,
               const Launch& launch, std::optional<uint64_t> opted_in);

}  // namespace ptx
