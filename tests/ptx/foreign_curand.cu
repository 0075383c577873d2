// cuRAND's device generators for the emulator to run.
#include <curand_kernel.h>

#include <cstdint>

namespace {

__global__ void philox_words(uint64_t seed, uint64_t subsequence, uint64_t offset, uint4* out,
                             int calls) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  curandStatePhilox4_32_10_t state;
  curand_init(seed, subsequence + i, offset, &state);
  for (int call = 0; call < calls; ++call) out[i * calls + call] = curand4(&state);
}

__global__ void philox_normals(uint64_t seed, float4* normals, float4* uniforms, double2* doubles) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  curandStatePhilox4_32_10_t state;
  curand_init(seed, i, 0, &state);
  normals[i] = curand_normal4(&state);
  uniforms[i] = curand_uniform4(&state);
  doubles[i] = curand_normal2_double(&state);
}

__global__ void xorwow_words(uint64_t seed, uint64_t offset, uint32_t* out, int calls) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  curandStateXORWOW_t state;
  curand_init(seed, i, offset, &state);
  for (int call = 0; call < calls; ++call) out[i * calls + call] = curand(&state);
}

}  // namespace

extern "C" {
int philox(uint64_t seed, uint64_t subsequence, uint64_t offset, void* out, int blocks, int threads,
           int calls) {
  philox_words<<<blocks, threads>>>(seed, subsequence, offset, static_cast<uint4*>(out), calls);
  return cudaGetLastError();
}

int normals(uint64_t seed, void* normals, void* uniforms, void* doubles, int blocks, int threads) {
  philox_normals<<<blocks, threads>>>(seed, static_cast<float4*>(normals),
                                      static_cast<float4*>(uniforms),
                                      static_cast<double2*>(doubles));
  return cudaGetLastError();
}

int xorwow(uint64_t seed, uint64_t offset, uint32_t* out, int blocks, int threads, int calls) {
  xorwow_words<<<blocks, threads>>>(seed, offset, out, calls);
  return cudaGetLastError();
}
}
