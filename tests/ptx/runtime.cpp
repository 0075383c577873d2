// The CUDA runtime's functions as launchers call them, on the emulator, and the C interface of the Python face.
//
// A library of .cu files that is linked with this instead of libcudart runs its launches here: nvcc's own
// registration code hands over the PTX and the kernels' names, device memory is host memory that was announced.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <mutex>
#include <sstream>

#include "emulator.h"

namespace {

using ptx::Allocation;
using ptx::Function;
using ptx::Launch;
using ptx::Module;

struct Kernel {
  size_t binary;
  std::string name;
  int dynamic_shared = 48 << 10;
};

struct Binary {
  const char* data;
  std::map<int, std::unique_ptr<Module>> modules;  // by architecture, parsed when first launched
};

struct State {
  ptx::Machine machine;
  std::vector<std::unique_ptr<Binary>> binaries;
  std::map<const void*, Kernel> kernels;
  std::vector<std::unique_ptr<Module>> loaded;
  std::map<uint64_t, std::unique_ptr<std::vector<uint8_t>>> mallocs;
  std::string error, text;
  cudaError_t last = cudaSuccess;
  struct Configuration {
    dim3 grid, block;
    size_t shared;
    cudaStream_t stream;
  };
  static thread_local std::vector<Configuration> configurations;
};
thread_local std::vector<State::Configuration> State::configurations;

State& state() {
  static State s;
  return s;
}

cudaError_t failed(cudaError_t code, const std::string& what) {
  if (state().error.empty()) state().error = what;
  return state().last = code;
}

void announce(uint64_t address, uint64_t size, const std::string& name, bool written) {
  Allocation a;
  a.size = size;
  a.name = name;
  a.tracked = !written;
  if (!written) a.written.assign(size, 0);
  state().machine.memory[address] = std::move(a);
}

// The parts of a fat binary that are PTX, by the architecture in their .target. nvcc has to be told --no-compress.
std::map<int, std::string> ptx_parts(const char* data) {
  std::map<int, std::string> parts;
  uint16_t header;
  uint64_t size;
  std::memcpy(&header, data + 6, 2);
  std::memcpy(&size, data + 8, 8);
  for (const char *at = data + header, *end = at + size; at < end;) {
    uint16_t kind;
    uint32_t entry_header;
    uint64_t payload;
    std::memcpy(&kind, at, 2);
    std::memcpy(&entry_header, at + 4, 4);
    std::memcpy(&payload, at + 8, 8);
    if (kind == 1) {
      std::string text(at + entry_header, strnlen(at + entry_header, payload));
      size_t target = text.find(".target sm_");
      if (target != std::string::npos) parts[std::atoi(text.c_str() + target + 11)] = text;
    }
    at += entry_header + payload;
  }
  return parts;
}

Module* module_of(Binary& binary) {
  if (binary.modules.empty()) {
    for (auto& [arch, text] : ptx_parts(binary.data))
      binary.modules[arch] = ptx::parse(text, "sm_" + std::to_string(arch));
  }
  Module* best = nullptr;
  for (auto& [arch, module] : binary.modules) {
    if (arch <= state().machine.device.arch) best = module.get();
  }
  return best;
}

void announce_globals(Module& module) {
  for (auto& [name, storage] : module.globals) {
    uint64_t address = reinterpret_cast<uint64_t>(storage.data());
    announce(address, storage.size() * 8, name, true);
  }
}

cudaError_t launch(const Kernel& kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                   dim3 cluster) {
  // One launch at a time, whatever the host's threads do.
  static std::mutex mutex;
  std::lock_guard<std::mutex> lock(mutex);
  State& s = state();
  if (!s.error.empty()) return s.last;
  ptx::Device& device = s.machine.device;
  try {
    Module* module = module_of(*s.binaries[kernel.binary]);
    if (module == nullptr)
      return failed(cudaErrorNoKernelImageForDevice,
                    "no PTX for sm_" + std::to_string(device.arch) + " in the library");
    auto found = module->functions.find(kernel.name);
    if (found == module->functions.end())
      return failed(cudaErrorInvalidDeviceFunction, "no kernel " + kernel.name + " in the PTX");
    Function& f = *found->second;
    if (f.cluster[0] > 0)
      cluster = dim3(static_cast<unsigned>(f.cluster[0]), static_cast<unsigned>(f.cluster[1]),
                     static_cast<unsigned>(f.cluster[2]));
    uint64_t threads = uint64_t{block.x} * block.y * block.z;
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7FFFFFFFu || grid.y > 65535 ||
        grid.z > 65535 || threads == 0 || threads > 1024 ||
        (f.max_threads > 0 && threads > static_cast<uint64_t>(f.max_threads)))
      return failed(cudaErrorInvalidConfiguration,
                    "launch of " + kernel.name + " with a grid or block out of range");
    if (shared > static_cast<size_t>(kernel.dynamic_shared) ||
        shared + std::max(f.shared_bytes, module->shared_bytes) >
            static_cast<size_t>(device.shared_per_block))
      return failed(cudaErrorInvalidValue,
                    "launch of " + kernel.name + " with " + std::to_string(shared) +
                        " bytes of dynamic shared memory; " +
                        std::to_string(kernel.dynamic_shared) + " are allowed");
    unsigned blocks = cluster.x * cluster.y * cluster.z;
    if (grid.x % cluster.x != 0 || grid.y % cluster.y != 0 || grid.z % cluster.z != 0 ||
        blocks > static_cast<unsigned>(device.max_cluster))
      return failed(cudaErrorInvalidClusterSize,
                    "launch of " + kernel.name + " in clusters of " + std::to_string(blocks) +
                        "; this device takes " + std::to_string(device.max_cluster));
    std::vector<uint8_t> parameters(f.parameter_bytes);
    for (size_t i = 0; i < f.parameters.size(); ++i)
      std::memcpy(parameters.data() + f.parameters[i].offset, arguments[i], f.parameters[i].size);
    announce_globals(*module);
    Launch l;
    l.grid = {grid.x, grid.y, grid.z};
    l.block = {block.x, block.y, block.z};
    l.cluster = {cluster.x, cluster.y, cluster.z};
    l.dynamic_shared = shared;
    s.machine.launch(*module, f, l, parameters);
  } catch (const std::exception& e) {
    return failed(cudaErrorLaunchFailure, e.what());
  }
  return cudaSuccess;
}

const char* const kClasses[] = {"fp32", "fp64",   "fp16", "integer", "convert",
                                "mufu", "memory", "move", "control", "barrier"};
const char* const kSpaces[] = {"generic", "global", "shared", "local", "param", "const"};
const char* const kDirections[] = {"load", "store", "atomic"};

void json_triple(std::ostream& out, const char* name, const std::array<uint32_t, 3>& x) {
  out << "\"" << name << "\": [" << x[0] << ", " << x[1] << ", " << x[2] << "], ";
}

void json_launch(std::ostream& out, const Launch& l) {
  out << "{\"kernel\": \"" << l.kernel << "\", ";
  json_triple(out, "grid", l.grid);
  json_triple(out, "block", l.block);
  json_triple(out, "cluster", l.cluster);
  out << "\"static_shared\": " << l.static_shared << ", \"dynamic_shared\": " << l.dynamic_shared
      << ", ";
  uint64_t blocks = uint64_t{l.grid[0]} * l.grid[1] * l.grid[2];
  out << "\"critical_path\": " << l.critical_path << ", \"critical_path_mean\": "
      << static_cast<double>(l.critical_sum) / static_cast<double>(blocks) << ", ";
  for (int warp = 0; warp < 2; ++warp) {
    out << (warp ? "\"warp_instructions\": {" : "\"thread_instructions\": {");
    for (size_t k = 0; k < static_cast<size_t>(ptx::Class::count); ++k) {
      out << (k ? ", " : "") << "\"" << kClasses[k]
          << "\": " << (warp ? l.warp_instructions[k] : l.thread_instructions[k]);
    }
    out << "}, ";
  }
  out << "\"opcodes\": {";
  bool first = true;
  for (auto& [name, n] : l.opcodes) {
    out << (first ? "" : ", ") << "\"" << name << "\": " << n;
    first = false;
  }
  out << "}, \"memory\": {";
  first = true;
  for (int space = 0; space < 6; ++space) {
    for (int direction = 0; direction < 3; ++direction) {
      const ptx::Traffic& t = l.traffic[space][direction];
      if (t.requests == 0) continue;
      out << (first ? "" : ", ") << "\"" << kSpaces[space] << " " << kDirections[direction]
          << "\": {\"requests\": " << t.requests << ", \"bytes\": " << t.bytes
          << ", \"sectors\": " << t.sectors << ", \"conflicts\": " << t.conflicts << "}";
      first = false;
    }
  }
  out << "}}";
}

}  // namespace

extern "C" {

// ---- What nvcc's host code and launchers call ------------------------------------------------------------------------

void** __cudaRegisterFatBinary(void* wrapper) {
  struct Wrapper {
    int magic, version;
    const char* data;
  };
  auto binary = std::make_unique<Binary>();
  binary->data = static_cast<Wrapper*>(wrapper)->data;
  state().binaries.push_back(std::move(binary));
  return reinterpret_cast<void**>(state().binaries.size());
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }

void __cudaRegisterFunction(void** binary, const char* host, char*, const char* name, int, void*,
                            void*, void*, void*, int*) {
  state().kernels[host] = {reinterpret_cast<size_t>(binary) - 1, name};
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  state().configurations.push_back({grid, block, shared, static_cast<cudaStream_t>(stream)});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  auto& top = state().configurations.back();
  *grid = top.grid;
  *block = top.block;
  *shared = top.shared;
  *static_cast<cudaStream_t*>(stream) = top.stream;
  state().configurations.pop_back();
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* host, dim3 grid, dim3 block, void** arguments,
                             size_t shared, cudaStream_t) {
  return launch(state().kernels.at(host), grid, block, arguments, shared, dim3(1, 1, 1));
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                               size_t shared, cudaStream_t stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* host,
                                void** arguments) {
  dim3 cluster(1, 1, 1);
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& a = config->attrs[i];
    if (a.id == cudaLaunchAttributeClusterDimension)
      cluster = dim3(a.val.clusterDim.x, a.val.clusterDim.y, a.val.clusterDim.z);
  }
  return launch(state().kernels.at(host), config->gridDim, config->blockDim, arguments,
                config->dynamicSmemBytes, cluster);
}
cudaError_t cudaGetLastError() {
  cudaError_t last = state().last;
  if (state().error.empty()) state().last = cudaSuccess;
  return last;
}
cudaError_t cudaPeekAtLastError() { return state().last; }
const char* cudaGetErrorString(cudaError_t code) {
  return code == cudaSuccess ? "no error" : state().error.c_str();
}
const char* cudaGetErrorName(cudaError_t code) {
  return code == cudaSuccess ? "cudaSuccess" : "an error of the emulated device";
}

cudaError_t cudaFuncSetAttribute(const void* host, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value > state().machine.device.shared_per_block)
      return failed(
          cudaErrorInvalidValue,
          std::to_string(value) + " bytes of dynamic shared memory, more than the device has");
    state().kernels.at(host).dynamic_shared = value;
  }
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void* host) {
  const Kernel& k = state().kernels.at(host);
  Module* module = module_of(*state().binaries[k.binary]);
  *a = cudaFuncAttributes{};
  a->sharedSizeBytes = module->functions.at(k.name)->shared_bytes;
  a->maxThreadsPerBlock = 1024;
  a->ptxVersion = a->binaryVersion = module->arch;
  a->maxDynamicSharedSizeBytes = k.dynamic_shared;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*,
                                                                   int threads, size_t shared,
                                                                   unsigned) {
  const ptx::Device& d = state().machine.device;
  *blocks = std::min(
      {32, 2048 / std::max(1, threads), d.shared_per_sm / static_cast<int>(shared + 1024)});
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* host,
                                                          int threads, size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, host, threads, shared, 0);
}
// Another architecture is another device, so that what a library remembers of one is not taken for the other's.
cudaError_t cudaGetDevice(int* device) {
  *device = state().machine.device.arch;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 128;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const ptx::Device& d = state().machine.device;
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = d.arch / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = d.arch % 10; break;
    case cudaDevAttrMultiProcessorCount: *value = d.sms; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 << 10; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = d.shared_per_block; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = d.shared_per_sm; break;
    case cudaDevAttrL2CacheSize: *value = d.l2; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrMaxGridDimX: *value = 0x7FFFFFFF; break;
    case cudaDevAttrMaxGridDimY: *value = 65535; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrClusterLaunch: *value = d.max_cluster > 1; break;
    default:
      return failed(cudaErrorInvalidValue, "device attribute " + std::to_string(attribute) +
                                               " is not known to the emulator");
  }
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return state().last; }
cudaError_t cudaDeviceSynchronize() { return state().last; }
cudaError_t cudaMalloc(void** pointer, size_t size) {
  auto block = std::make_unique<std::vector<uint8_t>>(size + 256);
  uint64_t address = (reinterpret_cast<uint64_t>(block->data()) + 255) / 256 * 256;
  announce(address, size, "cudaMalloc", false);
  *pointer = reinterpret_cast<void*>(address);
  state().mallocs[address] = std::move(block);
  return cudaSuccess;
}
cudaError_t cudaFree(void* pointer) {
  state().machine.memory.erase(reinterpret_cast<uint64_t>(pointer));
  state().mallocs.erase(reinterpret_cast<uint64_t>(pointer));
  return cudaSuccess;
}
static void mark(void* pointer, size_t size) {
  // Not by Machine::find: between launches what it remembers may be gone.
  auto& memory = state().machine.memory;
  const uint64_t address = reinterpret_cast<uint64_t>(pointer);
  auto after = memory.upper_bound(address);
  if (after == memory.begin()) return;
  auto& [base, a] = *std::prev(after);
  if (a.tracked && address + size <= base + a.size)
    std::fill_n(a.written.begin() + static_cast<std::ptrdiff_t>(address - base), size, uint8_t{1});
}
cudaError_t cudaMemsetAsync(void* pointer, int value, size_t size, cudaStream_t) {
  std::memset(pointer, value, size);
  mark(pointer, size);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, size);
  mark(to, size);
  return cudaSuccess;
}

// ---- What Python calls -------------------------------------------------------------------------------------------------

void ptx_begin(int arch, int sms, int shared_per_block, int shared_per_sm, int max_cluster, int l2,
               uint64_t seed, int shuffle, int resident, int perturb, int undefined_shuffles,
               int same_values, int any_memory, uint64_t limit) {
  State& s = state();
  s.machine.device = {arch, sms, shared_per_block, shared_per_sm, max_cluster, l2};
  s.machine.options = {seed,
                       shuffle != 0,
                       resident,
                       perturb != 0,
                       undefined_shuffles != 0,
                       same_values != 0,
                       any_memory != 0,
                       limit};
  s.machine.memory.clear();
  s.machine.launches.clear();
  s.machine.output.clear();
  s.mallocs.clear();
  s.error.clear();
  s.last = cudaSuccess;
  for (auto& [host, kernel] : s.kernels) kernel.dynamic_shared = 48 << 10;
}
void ptx_buffer(uint64_t address, uint64_t size, const char* name, int written) {
  announce(address, size, name, written != 0);
}
const char* ptx_error() { return state().error.c_str(); }
const char* ptx_output() { return state().machine.output.c_str(); }
const char* ptx_launches() {
  std::ostringstream out;
  out.precision(12);
  out << "[";
  for (size_t i = 0; i < state().machine.launches.size(); ++i) {
    if (i) out << ", ";
    json_launch(out, state().machine.launches[i]);
  }
  out << "]";
  state().text = out.str();
  return state().text.c_str();
}
// The number of a parsed module, or -1 with ptx_error set.
int ptx_load(const char* text, const char* name) {
  try {
    state().loaded.push_back(ptx::parse(text, name));
    return static_cast<int>(state().loaded.size()) - 1;
  } catch (const std::exception& e) {
    state().error = e.what();
    return -1;
  }
}
// The sizes of a kernel's parameters, or "null".
const char* ptx_parameters(int module, const char* kernel) {
  auto found = state().loaded.at(static_cast<size_t>(module))->functions.find(kernel);
  if (found == state().loaded[static_cast<size_t>(module)]->functions.end() ||
      !found->second->entry)
    return "null";
  std::ostringstream out;
  out << "[";
  for (size_t i = 0; i < found->second->parameters.size(); ++i)
    out << (i ? ", " : "") << found->second->parameters[i].size;
  out << "]";
  state().text = out.str();
  return state().text.c_str();
}
const char* ptx_kernels(int module) {
  std::ostringstream out;
  for (auto& [name, f] : state().loaded.at(static_cast<size_t>(module))->functions) {
    if (f->entry) out << name << " ";
  }
  state().text = out.str();
  return state().text.c_str();
}
int ptx_launch(int module, const char* kernel, const unsigned* grid, const unsigned* block,
               const unsigned* cluster, uint64_t shared, void** arguments) {
  State& s = state();
  if (!s.error.empty()) return s.last;
  try {
    Module& m = *s.loaded.at(static_cast<size_t>(module));
    Function& f = *m.functions.at(kernel);
    std::vector<uint8_t> parameters(f.parameter_bytes);
    for (size_t i = 0; i < f.parameters.size(); ++i)
      std::memcpy(parameters.data() + f.parameters[i].offset, arguments[i], f.parameters[i].size);
    announce_globals(m);
    Launch l;
    l.grid = {grid[0], grid[1], grid[2]};
    l.block = {block[0], block[1], block[2]};
    l.cluster = {cluster[0], cluster[1], cluster[2]};
    l.dynamic_shared = shared;
    s.machine.launch(m, f, l, parameters);
  } catch (const std::exception& e) {
    return failed(cudaErrorLaunchFailure, e.what());
  }
  return 0;
}
}
