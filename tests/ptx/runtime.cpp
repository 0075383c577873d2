// The CUDA runtime's functions as launchers call them, on the emulator, and the C interface of the Python face.
//
// A library of .cu files that is linked with this instead of libcudart runs its launches here: nvcc's own
// registration code hands over the PTX and the kernels' names, device memory is host memory that was announced.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <mutex>
#include <set>
#include <sstream>
#include <thread>

#include "emulator.h"
#include "limits.h"

namespace {

using ptx::Allocation;
using ptx::Function;
using ptx::Launch;
using ptx::Module;

struct Kernel {
  size_t binary;
  std::string name;
  std::optional<uint64_t> dynamic_shared;  // what cudaFuncSetAttribute allows
  std::set<std::thread::id> users;  // host threads that launched it or set its attributes
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
  uint64_t captured_stream = 0;  // 0: none
  struct Configuration {
    dim3 grid, block;
    size_t shared;
    cudaStream_t stream;
  };
  static thread_local std::vector<Configuration> configurations;
};
thread_local std::vector<State::Configuration> State::configurations;

// It outlives whoever frees memory when the process ends.
State& state() {
  static State& s = *new State;
  return s;
}

// What the host's threads do here, they do one after another.
std::recursive_mutex mutex;
using Lock = std::lock_guard<std::recursive_mutex>;

cudaError_t failed(cudaError_t code, const std::string& what) {
  if (state().error.empty()) state().error = what;
  return state().last = code;
}

void announce(uint64_t address, uint64_t size, const std::string& name, bool written) {
  state().machine.announce(address, {size, name, !written, {}, 0});
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

// While a stream is captured, what waits for the device is refused, and so is all work in the legacy stream.
cudaError_t refuse_in_capture(const char* call) {
  if (state().captured_stream == 0) return cudaSuccess;
  return failed(cudaErrorStreamCaptureUnsupported,
                std::string(call) + " while a stream is being captured");
}

cudaError_t refuse_legacy_stream(const std::string& work, cudaStream_t stream) {
  if (state().captured_stream == 0 || stream != nullptr) return cudaSuccess;
  return failed(cudaErrorStreamCaptureImplicit,
                work + " in the legacy stream while another one is being captured");
}

void run(Module& module, Function& kernel, const Launch& l, void** arguments) {
  std::vector<uint8_t> parameters(kernel.parameter_bytes);
  for (size_t i = 0; i < kernel.parameters.size(); ++i) {
    const ptx::Variable& p = kernel.parameters[i];
    std::memcpy(parameters.data() + p.offset, arguments[i], p.size);
  }
  announce_globals(module);
  state().machine.launch(module, kernel, l, parameters);
}

// A cluster of 0 blocks: what the kernel is compiled for.
cudaError_t launch(const void* host, Launch l, void** arguments, cudaStream_t stream) {
  Lock lock(mutex);
  State& s = state();
  if (!s.error.empty()) return s.last;
  Kernel& kernel = s.kernels.at(host);
  kernel.users.insert(std::this_thread::get_id());
  ptx::Device& device = s.machine.device;
  try {
    if (cudaError_t code = refuse_legacy_stream("launch of " + kernel.name, stream)) return code;
    Module* module = module_of(*s.binaries[kernel.binary]);
    if (module == nullptr)
      return failed(cudaErrorNoKernelImageForDevice,
                    "no PTX for sm_" + std::to_string(device.arch) + " in the library");
    auto found = module->functions.find(kernel.name);
    if (found == module->functions.end())
      return failed(cudaErrorInvalidDeviceFunction, "no kernel " + kernel.name + " in the PTX");
    Function& f = *found->second;
    for (size_t k = 0; k < 3; ++k) {
      uint32_t compiled = static_cast<uint32_t>(f.cluster[0] > 0 ? f.cluster[k] : 1);
      if (l.cluster[k] == 0) l.cluster[k] = compiled;
    }
    ptx::Refusal refusal = ptx::refuse(device, *module, f, l, kernel.dynamic_shared);
    if (refusal.code != cudaSuccess) return failed(refusal.code, refusal.why);
    run(*module, f, l, arguments);
  } catch (const std::exception& e) {
    return failed(cudaErrorLaunchFailure, e.what());
  }
  return cudaSuccess;
}

Launch launch_of(dim3 grid, dim3 block, size_t shared) {
  Launch l;
  l.grid = {grid.x, grid.y, grid.z};
  l.block = {block.x, block.y, block.z};
  l.cluster = {0, 0, 0};
  l.dynamic_shared = shared;
  return l;
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
  state().kernels[host] = {reinterpret_cast<size_t>(binary) - 1, name, {}, {}};
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
                             size_t shared, cudaStream_t stream) {
  return launch(host, launch_of(grid, block, shared), arguments, stream);
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                               size_t shared, cudaStream_t stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* host,
                                void** arguments) {
  Launch l = launch_of(config->gridDim, config->blockDim, config->dynamicSmemBytes);
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& a = config->attrs[i];
    switch (a.id) {
      case cudaLaunchAttributeClusterDimension:
        l.cluster = {a.val.clusterDim.x, a.val.clusterDim.y, a.val.clusterDim.z};
        break;
      case cudaLaunchAttributeProgrammaticStreamSerialization:
        l.programmatic = a.val.programmaticStreamSerializationAllowed != 0;
        break;
      case cudaLaunchAttributeIgnore:
      case cudaLaunchAttributePriority: break;
      default:
        return failed(cudaErrorNotSupported,
                      "launch attribute " + std::to_string(a.id) + " is not known to the emulator");
    }
  }
  return launch(host, l, arguments, config->stream);
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
  Lock lock(mutex);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  Kernel& k = state().kernels.at(host);
  k.users.insert(std::this_thread::get_id());
  Module* module = module_of(*state().binaries[k.binary]);
  const uint64_t bytes = static_cast<uint64_t>(value);
  const uint64_t most =
      ptx::most_dynamic_shared(state().machine.device, *module, *module->functions.at(k.name));
  if (value < 0 || bytes > most)
    return failed(cudaErrorInvalidValue,
                  std::to_string(value) + " bytes of dynamic shared memory for " + k.name +
                      ", which may have " + std::to_string(most) + " beside its static ones");
  if (k.dynamic_shared.value_or(0) > bytes && k.users.size() > 1)
    return failed(cudaErrorInvalidValue,
                  "cudaFuncSetAttribute lowers the dynamic shared memory of " + k.name + " from " +
                      std::to_string(*k.dynamic_shared) + " to " + std::to_string(bytes) +
                      " bytes, although another thread may be about to launch it");
  k.dynamic_shared = bytes;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void* host) {
  const Kernel& k = state().kernels.at(host);
  Module* module = module_of(*state().binaries[k.binary]);
  *a = cudaFuncAttributes{};
  const uint64_t fixed = ptx::static_shared(*module, *module->functions.at(k.name));
  a->sharedSizeBytes = fixed;
  a->maxThreadsPerBlock = 1024;
  a->ptxVersion = a->binaryVersion = module->arch;
  a->maxDynamicSharedSizeBytes =
      static_cast<int>(k.dynamic_shared.value_or(ptx::kSharedWithoutOptIn - fixed));
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
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  bool captured =
      stream != nullptr && reinterpret_cast<uint64_t>(stream) == state().captured_stream;
  *status = captured ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return refuse_legacy_stream("cudaStreamIsCapturing", stream);
}
cudaError_t cudaStreamSynchronize(cudaStream_t) {
  cudaError_t code = refuse_in_capture("cudaStreamSynchronize");
  return code == cudaSuccess ? state().last : code;
}
cudaError_t cudaDeviceSynchronize() {
  cudaError_t code = refuse_in_capture("cudaDeviceSynchronize");
  return code == cudaSuccess ? state().last : code;
}
cudaError_t cudaMalloc(void** pointer, size_t size) {
  if (cudaError_t code = refuse_in_capture("cudaMalloc")) return code;
  auto block = std::make_unique<std::vector<uint8_t>>(size + 256);
  uint64_t address = (reinterpret_cast<uint64_t>(block->data()) + 255) / 256 * 256;
  announce(address, size, "cudaMalloc", false);
  *pointer = reinterpret_cast<void*>(address);
  state().mallocs[address] = std::move(block);
  return cudaSuccess;
}
cudaError_t cudaFree(void* pointer) {
  if (cudaError_t code = refuse_in_capture("cudaFree")) return code;
  state().machine.forget(reinterpret_cast<uint64_t>(pointer));
  state().mallocs.erase(reinterpret_cast<uint64_t>(pointer));
  return cudaSuccess;
}
// What the host has the device write.
static cudaError_t device_writes(const char* call, void* pointer, size_t size) {
  const uint64_t address = reinterpret_cast<uint64_t>(pointer);
  uint64_t base = 0;
  Allocation* a = state().machine.find(address, base);
  if (size > 0 && (a == nullptr || address + size > base + a->size))
    return failed(cudaErrorInvalidValue, std::string(call) + " of " + std::to_string(size) +
                                             " bytes beyond the device's buffers");
  if (size > 0 && a->tracked) std::fill_n(ptx::written_bytes(*a) + (address - base), size, 1);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* pointer, int value, size_t size, cudaStream_t stream) {
  if (cudaError_t code = refuse_legacy_stream("cudaMemsetAsync", stream)) return code;
  Lock lock(mutex);
  cudaError_t code = device_writes("cudaMemsetAsync", pointer, size);
  if (code == cudaSuccess) std::memset(pointer, value, size);
  return code;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  if (cudaError_t code = refuse_legacy_stream("cudaMemcpyAsync", stream)) return code;
  Lock lock(mutex);
  cudaError_t code =
      kind == cudaMemcpyDeviceToHost ? cudaSuccess : device_writes("cudaMemcpyAsync", to, size);
  if (code == cudaSuccess) std::memcpy(to, from, size);
  return code;
}

// ---- What Python calls -------------------------------------------------------------------------------------------------

void ptx_begin(int arch, int sms, int shared_per_block, int shared_per_sm, int max_cluster, int l2,
               uint64_t seed, int shuffle, int resident, int perturb, int undefined_shuffles,
               int same_values, uint64_t limit) {
  State& s = state();
  s.machine.device = {arch, sms, shared_per_block, shared_per_sm, max_cluster, l2};
  s.machine.options = {
      seed, shuffle != 0, resident, perturb != 0, undefined_shuffles != 0, same_values != 0, limit};
  s.machine.forget_all();
  s.machine.launches.clear();
  s.machine.output.clear();
  s.machine.ordering.clear();
  s.mallocs.clear();
  s.error.clear();
  s.last = cudaSuccess;
  s.captured_stream = 0;
  for (auto& [host, kernel] : s.kernels) {
    kernel.dynamic_shared.reset();
    kernel.users.clear();
  }
}
void ptx_buffer(uint64_t address, uint64_t size, const char* name, int written) {
  announce(address, size, name, written != 0);
}
// A stream that is being captured from here on; 0: none.
void ptx_capture(uint64_t stream) { state().captured_stream = stream; }
// Memory that the host may write without the device's knowledge: where it did, the pattern is gone.
void ptx_allocated(uint64_t address, uint64_t size, const char* name, uint16_t pattern) {
  Lock lock(mutex);
  state().machine.announce(address, {size, name, true, {}, pattern});
}
void ptx_freed(uint64_t address) {
  Lock lock(mutex);
  state().machine.forget(address);
}
// What a check found since the last call.
const char* ptx_take_error() {
  State& s = state();
  s.text = std::move(s.error);
  s.error.clear();
  s.last = cudaSuccess;
  return s.text.c_str();
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
  Lock lock(mutex);
  State& s = state();
  if (!s.error.empty()) return s.last;
  try {
    Module& m = *s.loaded.at(static_cast<size_t>(module));
    Function& f = *m.functions.at(kernel);
    Launch l;
    std::copy_n(grid, 3, l.grid.begin());
    std::copy_n(block, 3, l.block.begin());
    std::copy_n(cluster, 3, l.cluster.begin());
    l.dynamic_shared = shared;
    // A loaded module has opted in for what each launch needs.
    ptx::Refusal refusal = ptx::refuse(s.machine.device, m, f, l, shared);
    if (refusal.code != cudaSuccess) return failed(refusal.code, refusal.why);
    run(m, f, l, arguments);
  } catch (const std::exception& e) {
    return failed(cudaErrorLaunchFailure, e.what());
  }
  return 0;
}
}
