// Source: CUDA C++ Programming Guide 13.0, table "Technical Specifications per Compute Capability", sections "Kernel
// Functions", "Shared Memory" and "Thread Block Clusters".
#include "limits.h"

namespace ptx {
namespace {

constexpr uint64_t kThreads = 1024, kThreadsZ = 64, kGridX = 0x7FFFFFFF, kGridYZ = 65535;
constexpr uint64_t kParameterBytes = 32764;

uint64_t product(const std::array<uint32_t, 3>& x) { return uint64_t{x[0]} * x[1] * x[2]; }

std::string refuse_shape(const Function& kernel, const Launch& l) {
  if (product(l.grid) == 0 || l.grid[0] > kGridX || l.grid[1] > kGridYZ || l.grid[2] > kGridYZ)
    return "a grid of " + coordinates(l.grid) + " blocks; at most " + std::to_string(kGridYZ) +
           " are allowed in y and z";
  uint64_t threads = product(l.block);
  if (threads == 0 || threads > kThreads || l.block[0] > kThreads || l.block[1] > kThreads ||
      l.block[2] > kThreadsZ)
    return "a block of " + coordinates(l.block) + " threads; at most " + std::to_string(kThreads) +
           " are allowed, and " + std::to_string(kThreadsZ) + " in z";
  uint64_t declared = static_cast<uint64_t>(kernel.max_threads);
  if (declared > 0 && (kernel.exact_threads ? threads != declared : threads > declared))
    return "a block of " + std::to_string(threads) + " threads; the kernel is compiled for " +
           (kernel.exact_threads ? "exactly " : "at most ") + std::to_string(declared);
  if (kernel.parameter_bytes > kParameterBytes)
    return std::to_string(kernel.parameter_bytes) + " bytes of parameters; at most " +
           std::to_string(kParameterBytes) + " are allowed";
  return "";
}

std::string refuse_cluster(const Device& device, const Function& kernel, const Launch& l) {
  std::array<uint32_t, 3> declared;
  for (size_t k = 0; k < 3; ++k) declared[k] = static_cast<uint32_t>(kernel.cluster[k]);
  if (declared[0] > 0 && declared != l.cluster)
    return "clusters of " + coordinates(l.cluster) + " blocks; the kernel is compiled for " +
           coordinates(declared);
  if (product(l.cluster) > static_cast<uint64_t>(device.max_cluster))
    return "clusters of " + std::to_string(product(l.cluster)) + " blocks; this device takes " +
           std::to_string(device.max_cluster);
  for (size_t k = 0; k < 3; ++k) {
    if (l.cluster[k] == 0 || l.grid[k] % l.cluster[k] != 0)
      return "a grid of " + coordinates(l.grid) + " blocks, which clusters of " +
             coordinates(l.cluster) + " do not divide";
  }
  return "";
}

std::string refuse_shared(const Device& device, const Module& module, const Function& kernel,
                          const Launch& l, std::optional<uint64_t> opted_in) {
  uint64_t fixed = static_shared(module, kernel);
  if (fixed > kSharedWithoutOptIn)
    return std::to_string(fixed) + " bytes of static shared memory; at most " +
           std::to_string(kSharedWithoutOptIn) + " are allowed";
  uint64_t allowed = std::min(opted_in.value_or(kSharedWithoutOptIn - fixed),
                              most_dynamic_shared(device, module, kernel));
  if (l.dynamic_shared <= allowed) return "";
  return std::to_string(l.dynamic_shared) + " bytes of dynamic and " + std::to_string(fixed) +
         " of static shared memory; " + std::to_string(allowed) + " of dynamic are allowed " +
         (opted_in.has_value() ? "by cudaFuncSetAttribute"
                               : "without cudaFuncSetAttribute, as both count");
}

}  // namespace

uint64_t static_shared(const Module& module, const Function& kernel) {
  return std::max(kernel.shared_bytes, module.shared_bytes);
}

uint64_t most_dynamic_shared(const Device& device, const Module& module, const Function& kernel) {
  return static_cast<uint64_t>(device.shared_per_block) - static_shared(module, kernel);
}

Refusal refuse(const Device& device, const Module& module, const Function& kernel,
               const Launch& launch, std::optional<uint64_t> opted_in) {
  std::string shape = refuse_shape(kernel, launch), cluster, shared;
  if (shape.empty()) cluster = refuse_cluster(device, kernel, launch);
  if (shape.empty() && cluster.empty())
    shared = refuse_shared(device, module, kernel, launch, opted_in);
  if (shape.empty() && cluster.empty() && shared.empty()) return {};
  cudaError_t code = !shape.empty()     ? cudaErrorInvalidConfiguration
                     : !cluster.empty() ? cudaErrorInvalidClusterSize
                                        : cudaErrorInvalidValue;
  return {code, "launch of " + demangled(kernel.name) + " with " + shape + cluster + shared};
}

}  // namespace ptx
