// Host functions that break a rule of the CUDA runtime if `bug` is not 0. Each returns the runtime's last error.
#include <cuda_runtime.h>

#include <thread>

namespace {

constexpr int kStatic = 1024;  // bytes

__global__ void shared(float* x) {
  extern __shared__ float dynamic[];
  __shared__ float fixed[kStatic / 4];
  fixed[threadIdx.x] = x[threadIdx.x];
  dynamic[threadIdx.x] = 2 * x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = fixed[threadIdx.x ^ 1] + dynamic[threadIdx.x ^ 1];
}

__global__ void scale(float* x, float factor) {
  if (blockIdx.x + blockIdx.y + blockIdx.z + threadIdx.z == 0) x[threadIdx.x] *= factor;
}

__global__ void __launch_bounds__(128) bounded(float* x) { x[threadIdx.x] += 1; }

__global__ void __cluster_dims__(2, 1, 1) paired(float* x) {
  x[blockIdx.x * blockDim.x + threadIdx.x] += 1;
}

// The second of two launches starts while the first one may still run.
__global__ void first_launch(float* x, float* out) {
  out[threadIdx.x] = x[threadIdx.x];
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
template <int kBug>
__global__ void dependent_launch(float* x, float* out) {
  float weight = x[threadIdx.x + 32];  // neither reads nor writes what the first launch does
  if (kBug == 1) weight += out[threadIdx.x];  // read too early
  if (kBug == 2) x[threadIdx.x] = 5;  // written too early
  if (kBug != 3) asm volatile("griddepcontrol.wait;" ::: "memory");
  out[threadIdx.x + 32] = weight + out[threadIdx.x];  // never waited
}

cudaError_t allow(int bytes) {
  return cudaFuncSetAttribute(shared, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

// Elsewhere, as another thread of the program would.
template <class Work>
void in_thread(Work work) {
  std::thread(work).join();
}

template <class... Parameters>
void launch_with(cudaLaunchAttribute attribute, unsigned blocks, void (*kernel)(Parameters...),
                 Parameters... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(32);
  config.attrs = &attribute;
  config.numAttrs = 1;
  cudaLaunchKernelEx(&config, kernel, arguments...);
}

void launch_in_clusters(unsigned blocks, unsigned cluster, float* x) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  launch_with(attribute, blocks, scale, x, 2.0f);
}

}  // namespace

extern "C" {

int static_and_dynamic(int bug, float* x, void*) {
  shared<<<1, 256, (48 << 10) - (bug ? kStatic / 2 : kStatic)>>>(x);
  return cudaGetLastError();
}
// Of a device with 99 KB a block.
int more_than_the_device_has(int bug, float* x, void*) {
  int bytes = (99 << 10) - (bug ? 0 : kStatic);
  cudaError_t error = allow(bytes);
  if (error == cudaSuccess) shared<<<1, 256, static_cast<size_t>(bytes)>>>(x);
  return error;
}
int more_than_was_allowed(int bug, float* x, void*) {
  allow(60 << 10);
  shared<<<1, 256, (60 << 10) + bug>>>(x);
  return cudaGetLastError();
}
int blocks_in_y(int bug, float* x, void*) {
  scale<<<dim3(1, static_cast<unsigned>(65535 + bug)), 1>>>(x, 2);
  return cudaGetLastError();
}
int blocks_in_z(int bug, float* x, void*) {
  scale<<<dim3(1, 1, static_cast<unsigned>(65535 + bug)), 1>>>(x, 2);
  return cudaGetLastError();
}
int threads_in_z(int bug, float* x, void*) {
  scale<<<1, dim3(1, 1, static_cast<unsigned>(64 + bug))>>>(x, 2);
  return cudaGetLastError();
}
int threads(int bug, float* x, void*) {
  scale<<<1, static_cast<unsigned>(1024 + bug)>>>(x, 2);
  return cudaGetLastError();
}
int launch_bounds(int bug, float* x, void*) {
  bounded<<<1, static_cast<unsigned>(128 + bug)>>>(x);
  return cudaGetLastError();
}
int cluster_too_large(int bug, float* x, void*) {
  launch_in_clusters(16, bug ? 16 : 8, x);
  return cudaGetLastError();
}
int cluster_does_not_divide(int bug, float* x, void*) {
  launch_in_clusters(static_cast<unsigned>(8 + bug), 4, x);
  return cudaGetLastError();
}
int cluster_of_the_kernel(int bug, float* x, void*) {
  paired<<<static_cast<unsigned>(4 + bug), 32>>>(x);
  return cudaGetLastError();
}
int lowered_attribute(int bug, float* x, void*) {
  allow(80 << 10);
  in_thread([=] { allow((bug ? 60 : 80) << 10); });
  shared<<<1, 256, 70 << 10>>>(x);
  return cudaGetLastError();
}

// bug: 1 reads, 2 writes before its wait, 3 does not wait.
int dependent(int bug, float* x, float* out) {
  first_launch<<<1, 32>>>(x, out);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  auto kernel = bug == 0   ? dependent_launch<0>
                : bug == 1 ? dependent_launch<1>
                : bug == 2 ? dependent_launch<2>
                           : dependent_launch<3>;
  launch_with(attribute, 1, kernel, x, out);
  return cudaGetLastError();
}

// With a stream that may be captured. bug: 1 waits for it, 2 works in the legacy stream, 3 allocates, 0 refuses.
int captured(int bug, float* x, void*, void* stream) {
  cudaStream_t s = static_cast<cudaStream_t>(stream);
  cudaStreamCaptureStatus status;
  cudaStreamIsCapturing(s, &status);
  scale<<<1, 32, 0, bug == 2 ? nullptr : s>>>(x, 2);
  if (bug == 1) cudaStreamSynchronize(s);
  if (bug == 3) {
    void* memory;
    cudaMalloc(&memory, 64);
  }
  return status == cudaStreamCaptureStatusActive ? -1 : cudaGetLastError();
}
}
