// Soft-regularised linear regression: every step of every replica in one launch.
//
// Only the trajectory is written to global memory while it runs. A replica is a chain of steps: what a step needs
// besides theta is made for 32 steps, or for the samples of 32 lanes, at once; the chain itself is 5 dependent fp64
// operations per step.
#include "cuda/device.cuh"
#include "cuda/kernels.h"
#include "cuda/plan.h"
#include "math/regression.h"

namespace kdkernels {
namespace cuda {
namespace {

constexpr int kThreads = kRegressionThreads, kWarps = kRegressionWarps;

// The numbers of one replica.
struct Replica {
  math::NoiseKey key;
  double theta, lr, lam, sigma;

  __device__ Replica(const RegressionParams& p, int64_t r) {
    uint64_t seed = static_cast<uint64_t>(p.seed[r]);
    key = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), p.stream, 0};
    theta = p.theta[r];
    lr = p.lr[r];
    lam = p.lam[r];
    sigma = p.sigma[r];
  }
};

// The samples' means, the same bits in every block.
__device__ __forceinline__ math::SampleMeans moments_of(const RegressionParams& p) {
  __shared__ double shared[4 * kWarps];
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
  return {sum[0] / n, sum[1] / n, sum[2] / n, sum[3] / n};
}

// One warp per replica: calls steps(replica, first, n, path) for steps [first, first + n), n at most 32, which
// leaves theta after step first + lane in path of that lane. The block's replicas are neighbours, so that
// their trajectories leave through shared memory in whole sectors.
template <class Steps>
__device__ __forceinline__ void warp_a_replica(const RegressionParams& p, Steps steps) {
  __shared__ double paths[kWarp][kWarps + 1];  // one more keeps a column's rows in different banks
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int64_t begin = int64_t{blockIdx.x} * kWarps; begin < p.replicas;
       begin += int64_t{gridDim.x} * kWarps) {
    const bool live = begin + warp < p.replicas;
    const int64_t r = live ? begin + warp : begin;  // idle warps of the last block repeat one
    Replica replica(p, r);
    if (p.trajectory != nullptr && live && lane == 0) p.trajectory[r] = replica.theta;
    for (int64_t first = 0; first < p.steps; first += kWarp) {
      const int n = static_cast<int>(p.steps - first < kWarp ? p.steps - first : kWarp);
      double path = 0;
      steps(replica, first, n, path);
      if (p.trajectory == nullptr) continue;
      paths[lane][warp] = path;
      __syncthreads();
      const int row = static_cast<int>(threadIdx.x) / kWarps, column = threadIdx.x % kWarps;
      if (row < n && begin + column < p.replicas)
        p.trajectory[(first + 1 + row) * p.replicas + begin + column] = paths[row][column];
      __syncthreads();
    }
    if (live && lane == 0) p.result[r] = replica.theta;
  }
}

// One normal per step.
template <bool kWarpEach>
__global__ void __launch_bounds__(kThreads, kRegressionBlocksPerSm)
    per_step_kernel(const __grid_constant__ RegressionParams p) {
  const math::SampleMeans moments = moments_of(p);
  if constexpr (kWarpEach) {
    __shared__ double2 staged[kWarps][kWarp];
    double2* means = staged[threadIdx.x / kWarp];
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    warp_a_replica(p, [&](Replica& replica, int64_t first, int n, double& path) {
      replica.key.step = static_cast<uint32_t>(first) + static_cast<uint32_t>(lane);
      double e = replica.sigma * static_cast<double>(math::normal4(replica.key, 0, 0).value[0]);
      math::NoisyMeans mine = math::noisy_means(moments, e);
      means[lane] = {mine.xx, mine.xy};
      __syncwarp();
      for (int j = 0; j < n; ++j) {
        double2 mean = means[j];
        replica.theta =
            math::regression_step(replica.theta, mean.x, mean.y, replica.lr, replica.lam);
        path = lane == j ? replica.theta : path;
      }
      __syncwarp();
    });
  } else {
    for (int64_t r = int64_t{blockIdx.x} * kThreads + threadIdx.x; r < p.replicas;
         r += int64_t{gridDim.x} * kThreads) {
      Replica replica(p, r);
      if (p.trajectory != nullptr) p.trajectory[r] = replica.theta;
      for (int64_t step = 0; step < p.steps; ++step) {
        replica.key.step = static_cast<uint32_t>(step);
        double e = replica.sigma * static_cast<double>(math::normal4(replica.key, 0, 0).value[0]);
        replica.theta = math::regression_step(replica.theta, moments, e, replica.lr, replica.lam);
        if (p.trajectory != nullptr) p.trajectory[(step + 1) * p.replicas + r] = replica.theta;
      }
      p.result[r] = replica.theta;
    }
  }
}

// Adds the lane's samples of one counter, from `i` on, under their noise.
__device__ __forceinline__ void add_samples(const RegressionParams& p, const Replica& replica,
                                            int64_t i, const double (&x)[4], const double (&y)[4],
                                            double (&sum)[2]) {
  uint64_t counter = static_cast<uint64_t>(i) / 4;
  math::Noise4 eps = math::normal4(replica.key, static_cast<uint32_t>(counter),
                                   static_cast<uint32_t>(counter >> 32));
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (i + j >= p.samples) continue;
    double noisy = math::fma(replica.sigma, static_cast<double>(eps.value[j]), x[j]);
    sum[0] = math::fma(noisy, noisy, sum[0]);
    sum[1] = math::fma(noisy, y[j], sum[1]);
  }
}

__device__ __forceinline__ void load_samples(const RegressionParams& p, int64_t i, double (&x)[4],
                                             double (&y)[4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    x[j] = i + j < p.samples ? __ldg(p.x + i + j) : 0;
    y[j] = i + j < p.samples ? __ldg(p.y + i + j) : 0;
  }
}

// One normal per sample and step: a lane has 4 samples of every 128. kKept times 128 samples stay in registers;
// if 0, all are read from L1 in every step, 2 KB per warp for about 170 instructions.
template <int kKept>
__global__ void __launch_bounds__(kThreads, kRegressionBlocksPerSm)
    per_sample_kernel(const __grid_constant__ RegressionParams p) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const double n = static_cast<double>(p.samples);
  double x[kKept > 0 ? kKept : 1][4], y[kKept > 0 ? kKept : 1][4];
#pragma unroll
  for (int k = 0; k < kKept; ++k) load_samples(p, (k * kWarp + lane) * 4, x[k], y[k]);
  warp_a_replica(p, [&](Replica& replica, int64_t first, int steps, double& path) {
    for (int step = 0; step < steps; ++step) {
      replica.key.step = static_cast<uint32_t>(first) + static_cast<uint32_t>(step);
      double sum[2] = {0, 0};
      if constexpr (kKept > 0) {
#pragma unroll
        for (int k = 0; k < kKept; ++k) {
          int i = (k * kWarp + lane) * 4;
          if (i < p.samples) add_samples(p, replica, i, x[k], y[k], sum);
        }
      } else {
        for (int64_t i = lane * 4; i < p.samples; i += 4 * kWarp) {
          load_samples(p, i, x[0], y[0]);
          add_samples(p, replica, i, x[0], y[0], sum);
        }
      }
      reduce<Sum, kWarp>(sum, static_cast<double*>(nullptr));
      replica.theta =
          math::regression_step(replica.theta, sum[0] / n, sum[1] / n, replica.lr, replica.lam);
      path = lane == step ? replica.theta : path;
    }
  });
}

// The device itself, not the architecture compiled for: the number of its fp64 units decides.
cudaError_t this_device(Device& device) {
  int ordinal = 0, major = 0, minor = 0;
  device = {};
  cudaError_t error = cudaGetDevice(&ordinal);
  auto ask = [&](int& value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, ordinal);
  };
  ask(device.sms, cudaDevAttrMultiProcessorCount);
  ask(major, cudaDevAttrComputeCapabilityMajor);
  ask(minor, cudaDevAttrComputeCapabilityMinor);
  device.arch = 10 * major + minor;
  return error;
}

}  // namespace

cudaError_t regression(const RegressionParams& p, cudaStream_t stream) {
  if (p.replicas == 0) return cudaSuccess;
  Device device = {};
  cudaError_t error = this_device(device);
  if (error != cudaSuccess) return error;
  RegressionPlan plan = plan_regression(p.replicas, p.per_sample, device);
  unsigned blocks = static_cast<unsigned>(plan.blocks);
  if (!p.per_sample && plan.warp) {
    per_step_kernel<true><<<blocks, kThreads, 0, stream>>>(p);
  } else if (!p.per_sample) {
    per_step_kernel<false><<<blocks, kThreads, 0, stream>>>(p);
  } else if (p.samples <= kRegressionFewSamples) {
    per_sample_kernel<1><<<blocks, kThreads, 0, stream>>>(p);
  } else if (p.samples <= kRegressionSamples) {
    per_sample_kernel<3><<<blocks, kThreads, 0, stream>>>(p);
  } else {
    per_sample_kernel<0><<<blocks, kThreads, 0, stream>>>(p);
  }
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace kdkernels
