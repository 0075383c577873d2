// Small kernels that are right with kBug = 0 and have one bug otherwise; the line of the finding is marked.
#include <cooperative_groups.h>
#include <cuda_pipeline.h>

#include <cstdint>

namespace cg = cooperative_groups;

constexpr int kThreads = 64;

// The sum of a block's 64 values.
template <int kBug>
__global__ void block_sum(const float* x, float* out, int) {
  __shared__ float partial[kThreads / 32];
  float v = x[threadIdx.x];
  for (int lane = 16; lane > 0; lane /= 2) v += __shfl_xor_sync(0xFFFFFFFFu, v, lane);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
  if (!kBug) __syncthreads();
  if (threadIdx.x == 0) out[0] = partial[0] + partial[1];  // missing barrier
}

// out = 2 x, four elements a thread and a scalar tail.
template <int kBug>
__global__ void shifted_tail(const float* x, float* out, int n) {
  int vectors = n / 4;
  for (int i = threadIdx.x; i < vectors; i += kThreads) {
    float4 v = reinterpret_cast<const float4*>(x)[i];
    reinterpret_cast<float4*>(out)[i] = make_float4(2 * v.x, 2 * v.y, 2 * v.z, 2 * v.w);
  }
  int i = vectors * 4 + threadIdx.x + kBug;
  if (i < n + kBug) out[i] = 2 * x[i];  // shifted tail
}

template <int kBug>
__global__ void misaligned_vector(const float* x, float* out, int n) {
  int i = threadIdx.x;
  if (i >= n / 4 - 1) return;
  float4 v = *reinterpret_cast<const float4*>(x + 4 * i + kBug);  // misaligned vector
  out[i] = v.x + v.y + v.z + v.w;
}

// Rows of n elements: the sum of each.
template <int kBug>
__global__ void past_the_row(const float* x, float* out, int n) {
  float sum = 0;
  for (int i = 0; i < n + kBug; ++i) sum += x[blockIdx.x * n + i];  // past the row
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

template <int kBug>
__global__ void shuffle_mask(const float* x, float* out, int) {
  float v = x[threadIdx.x];
  if (threadIdx.x % 32 < 16) {
    uint32_t mask = kBug ? 0x000000FFu : 0x0000FFFFu;
    v += __shfl_xor_sync(mask, v, 1);  // shuffle mask
  }
  out[threadIdx.x] = v;
}

template <int kBug>
__global__ void shuffle_inactive(const float* x, float* out, int) {
  float v = x[threadIdx.x];
  uint32_t mask = kBug ? 0x0000FFFFu : 0xFFFFFFFFu;
  if (!kBug || threadIdx.x % 32 < 16) v = __shfl_down_sync(mask, v, 8);  // inactive lane
  out[threadIdx.x] = v;
}

// Half of the warp waits for lanes that left.
template <int kBug>
__global__ void lanes_never_meet(const float* x, float* out, int) {
  float v = x[threadIdx.x];
  if (kBug && threadIdx.x % 2) {
    v += __shfl_xor_sync(0xFFFFFFFFu, v, 2);
    v *= 3;
  } else {
    v += __shfl_xor_sync(0xFFFFFFFFu, v, 4);
  }
  out[threadIdx.x] = v;
}

template <int kBug>
__global__ void divergent_barrier(const float* x, float* out, int) {
  __shared__ float s[kThreads];
  s[threadIdx.x] = x[threadIdx.x];
  if (kBug && threadIdx.x < 16) {
    s[threadIdx.x] += 1;
    __syncthreads();
    out[threadIdx.x] = s[15 - threadIdx.x];
  } else {
    __syncthreads();
    out[threadIdx.x] = s[kThreads - 1 - threadIdx.x];
  }
}

// 64 threads at a barrier that waits for 96.
template <int kBug>
__global__ void barrier_count(const float* x, float* out, int) {
  if (kBug) {
    asm volatile("bar.sync 3, 96;" ::: "memory");  // barrier count
  } else {
    asm volatile("bar.sync 3, 64;" ::: "memory");
  }
  out[threadIdx.x] = x[threadIdx.x];
}

template <int kBug>
__global__ void global_never_written(const float* x, float* out, int n) {
  if (!kBug) out[threadIdx.x] = 0;
  if (threadIdx.x < n) out[threadIdx.x] += x[threadIdx.x];  // never written
}

template <int kBug>
__global__ void shared_never_written(const float* x, float* out, int) {
  __shared__ float s[kThreads];
  if (!kBug || threadIdx.x != 5) s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = s[(threadIdx.x + 1) % kThreads];  // shared never written
}

// Lanes of one warp exchange values through shared memory.
template <int kBug>
__global__ void missing_syncwarp(const float* x, float* out, int) {
  __shared__ float s[kThreads];
  s[threadIdx.x] = x[threadIdx.x];
  if (!kBug) __syncwarp();
  out[threadIdx.x] = s[threadIdx.x ^ 1];  // missing syncwarp
}

// The next round overwrites what others may still read.
template <int kBug>
__global__ void write_after_read(const float* x, float* out, int) {
  __shared__ float s[kThreads];
  float sum = 0;
  for (int round = 0; round < 3; ++round) {
    s[threadIdx.x] = x[threadIdx.x] + round;  // write after read
    __syncthreads();
    sum += s[kThreads - 1 - threadIdx.x];
    if (!kBug) __syncthreads();
  }
  out[threadIdx.x] = sum;
}

template <int kBug>
__global__ void missing_wait(const float* x, float* out, int) {
  __shared__ alignas(16) float s[4 * kThreads];
  __pipeline_memcpy_async(s + 4 * threadIdx.x, x + 4 * (threadIdx.x % 16), 16);
  __pipeline_commit();
  if (!kBug) __pipeline_wait_prior(0);
  out[threadIdx.x] = s[4 * threadIdx.x];  // missing wait
}

// Warps exchange values behind an mbarrier, twice.
template <int kBug>
__global__ void mbarrier_wait(const float* x, float* out, int) {
  __shared__ float s[kThreads];
  __shared__ uint64_t barrier;
  uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(&barrier));
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(at), "r"(kThreads) : "memory");
  }
  __syncthreads();
  float sum = 0;
  for (int phase = 0; phase < 2; ++phase) {
    s[threadIdx.x] = x[threadIdx.x] + phase;
    asm volatile("{.reg .b64 t; mbarrier.arrive.shared.b64 t, [%0];}" ::"r"(at) : "memory");
    if (!kBug) {
      asm volatile(
          "{.reg .pred p; wait: mbarrier.try_wait.parity.shared.b64 p, [%0], %1; @!p bra wait;}" ::
              "r"(at),
          "r"(phase)
          : "memory");
    }
    sum += s[kThreads - 1 - threadIdx.x];  // mbarrier wait
    __syncthreads();
  }
  out[threadIdx.x] = sum;
}

// Barriers that count and vote; lanes that elect one of them.
template <int kBug>
__global__ void block_votes(const float* x, float* out, int) {
  int many = __syncthreads_count(x[threadIdx.x] > 4);
  int all = __syncthreads_and(x[threadIdx.x] >= 0), any = __syncthreads_or(x[threadIdx.x] > 1000);
  uint32_t leader = 0, elected = 0;
  asm volatile("{.reg .pred p; elect.sync %0|p, 0xffffffff; selp.u32 %1, 1, 0, p;}"
               : "=r"(leader), "=r"(elected));
  out[threadIdx.x] = many + 100 * all + 200 * any + 1000 * elected + leader;
}

// Blocks add in whatever order they come: not the same bits every time.
template <int kBug>
__global__ void order_of_blocks(const float* x, float* out, int) {
  if (threadIdx.x != 0) return;
  if (kBug) {
    atomicAdd(out, x[blockIdx.x]);
  } else if (blockIdx.x == 0) {
    float sum = 0;
    for (int i = 0; i < gridDim.x; ++i) sum += x[i];
    out[0] = sum;
  }
}

#if __CUDA_ARCH__ >= 900 || !defined(__CUDA_ARCH__)
// Each block reads its neighbour's shared memory.
template <int kBug>
__global__ void __cluster_dims__(2, 1, 1) cluster_before(const float* x, float* out, int) {
  __shared__ float s[kThreads];
  auto cluster = cg::this_cluster();
  s[threadIdx.x] = x[threadIdx.x];
  if (!kBug) cluster.sync();
  out[blockIdx.x * kThreads + threadIdx.x] =
      cluster.map_shared_rank(s, cluster.block_rank() ^ 1)[threadIdx.x];  // cluster before
  cluster.sync();
}

template <int kBug>
__global__ void __cluster_dims__(2, 1, 1) cluster_gone(const float* x, float* out, int) {
  __shared__ float s[kThreads];
  auto cluster = cg::this_cluster();
  s[threadIdx.x] = x[threadIdx.x];
  cluster.sync();
  if (kBug && cluster.block_rank() == 1) return;
  for (int i = 0; i < 200; ++i) {
    float v = cluster.map_shared_rank(s, cluster.block_rank() ^ 1)[threadIdx.x];  // cluster gone
    out[blockIdx.x * kThreads + threadIdx.x] = v;
  }
  if (!kBug) cluster.sync();
}
#endif

#define LAUNCHERS(name, blocks) \
  extern "C" void launch_##name(int bug, const float* x, float* out, int n) { \
    if (bug) { \
      name<1><<<blocks, kThreads>>>(x, out, n); \
    } else { \
      name<0><<<blocks, kThreads>>>(x, out, n); \
    } \
  }
LAUNCHERS(block_sum, 1)
LAUNCHERS(shifted_tail, 1)
LAUNCHERS(misaligned_vector, 1)
LAUNCHERS(past_the_row, 4)
LAUNCHERS(shuffle_mask, 1)
LAUNCHERS(shuffle_inactive, 1)
LAUNCHERS(lanes_never_meet, 1)
LAUNCHERS(divergent_barrier, 1)
LAUNCHERS(barrier_count, 1)
LAUNCHERS(global_never_written, 1)
LAUNCHERS(shared_never_written, 1)
LAUNCHERS(missing_syncwarp, 1)
LAUNCHERS(write_after_read, 1)
LAUNCHERS(missing_wait, 1)
LAUNCHERS(mbarrier_wait, 1)
LAUNCHERS(block_votes, 1)
LAUNCHERS(order_of_blocks, 64)
LAUNCHERS(cluster_before, 4)
LAUNCHERS(cluster_gone, 4)
