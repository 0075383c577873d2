// Soft-regularised linear regression: every step of every replica in one launch.
#include "cuda/device.cuh"
#include "cuda/kernels.h"
#include "math/regression.h"

namespace kdkernels {
namespace cuda {
namespace {

constexpr int kThreads = 128;

__device__ __forceinline__ math::NoiseKey replica_key(const RegressionParams& p, int64_t replica) {
  uint64_t seed = static_cast<uint64_t>(p.seed[replica]);
  return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), p.stream, 0};
}

__device__ __forceinline__ void record(const RegressionParams& p, int64_t step, int64_t replica,
                                       double theta) {
  if (p.trajectory != nullptr) p.trajectory[step * p.replicas + replica] = theta;
}

// One normal a step: a thread a replica, all in registers; the block first finds the samples' moments.
__global__ void __launch_bounds__(kThreads) per_step_kernel(const RegressionParams p) {
  __shared__ double shared[4 * kThreads / kWarp];
  double sum[4] = {0, 0, 0, 0};
  for (int64_t i = threadIdx.x; i < p.samples; i += kThreads) {
    double x = p.x[i], y = p.y[i];
    sum[0] += x;
    sum[1] += y;
    sum[2] = math::fma(x, x, sum[2]);
    sum[3] = math::fma(x, y, sum[3]);
  }
  reduce<Sum, kThreads>(sum, shared);
  double n = static_cast<double>(p.samples);
  math::Moments moments = {sum[0] / n, sum[1] / n, sum[2] / n, sum[3] / n};

  int64_t r = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (r >= p.replicas) return;
  math::NoiseKey key = replica_key(p, r);
  double theta = p.theta[r], lr = p.lr[r], lam = p.lam[r], sigma = p.sigma[r];
  record(p, 0, r, theta);
  for (int64_t step = 0; step < p.steps; ++step) {
    key.step = static_cast<uint32_t>(step);
    double e = sigma * static_cast<double>(math::normal4(key, 0, 0).value[0]);
    theta = math::regression_step(theta, moments, e, lr, lam);
    record(p, step + 1, r, theta);
  }
  p.result[r] = theta;
}

// One normal a sample and step: a warp a replica, a lane 4 samples at a time.
__global__ void __launch_bounds__(kThreads) per_sample_kernel(const RegressionParams p) {
  int64_t r = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (r >= p.replicas) return;  // whole warps leave together
  int lane = threadIdx.x % kWarp;
  math::NoiseKey key = replica_key(p, r);
  double theta = p.theta[r], lr = p.lr[r], lam = p.lam[r], sigma = p.sigma[r];
  double n = static_cast<double>(p.samples);
  if (lane == 0) record(p, 0, r, theta);
  for (int64_t step = 0; step < p.steps; ++step) {
    key.step = static_cast<uint32_t>(step);
    double sum[2] = {0, 0};
    for (int64_t counter = lane; counter * 4 < p.samples; counter += kWarp) {
      math::Normal4 eps =
          math::normal4(key, static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        int64_t i = counter * 4 + j;
        if (i >= p.samples) continue;
        double x = math::fma(sigma, static_cast<double>(eps.value[j]), p.x[i]);
        sum[0] = math::fma(x, x, sum[0]);
        sum[1] = math::fma(x, p.y[i], sum[1]);
      }
    }
    reduce<Sum, kWarp>(sum, static_cast<double*>(nullptr));
    theta = math::regression_step(theta, sum[0] / n, sum[1] / n, lr, lam);
    if (lane == 0) record(p, step + 1, r, theta);
  }
  if (lane == 0) p.result[r] = theta;
}

}  // namespace

cudaError_t regression(const RegressionParams& p, cudaStream_t stream) {
  if (p.replicas == 0) return cudaSuccess;
  int64_t per_block = p.per_sample ? kThreads / kWarp : kThreads;
  unsigned blocks = static_cast<unsigned>((p.replicas + per_block - 1) / per_block);
  if (p.per_sample) {
    per_sample_kernel<<<blocks, kThreads, 0, stream>>>(p);
  } else {
    per_step_kernel<<<blocks, kThreads, 0, stream>>>(p);
  }
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace kdkernels
