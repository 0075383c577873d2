// Small kernels that exchange values through global memory: right with kBug = 0, one fault otherwise. The line of the
// finding is marked. x holds 1024 numbers, out 256, and work 64 zeros.
#include <cuda_pipeline.h>

#include <cstdint>

constexpr int kThreads = 64;

__device__ __forceinline__ unsigned load_volatile(const unsigned* at) {
  return *const_cast<const volatile unsigned*>(at);
}

// ---- Who else touches a word ---------------------------------------------------------------------------------------

template <int kBug>
__global__ void blocks_write_word(float* x, float* out, unsigned*) {
  if (threadIdx.x == 0) out[kBug ? 0 : blockIdx.x] = x[blockIdx.x];  // blocks write word
}

// Tiles of 16 elements, the fault's of 17.
template <int kBug>
__global__ void tiles_overlap(float* x, float* out, unsigned*) {
  int i = blockIdx.x * 16 + threadIdx.x;
  if (threadIdx.x < 16 + kBug) out[i] = 2 * x[i] + blockIdx.x;  // tiles overlap
}

// In place: an element's neighbour may be another block's.
template <int kBug>
__global__ void neighbour_in_place(float* x, float* out, unsigned*) {
  int i = blockIdx.x * kThreads + threadIdx.x;
  bool last = threadIdx.x == kThreads - 1;
  float next = kBug || !last ? x[i + 1] : 0;  // neighbour in place
  __syncthreads();
  x[i] += next;  // neighbour is overwritten
}

// Two blocks share words, each its half.
template <int kBug>
__global__ void halves_of_words(float*, float* out, unsigned*) {
  uint16_t* halves = reinterpret_cast<uint16_t*>(out);
  if (kBug && blockIdx.x == 1) {
    reinterpret_cast<unsigned*>(out)[threadIdx.x] = 7;  // whole word
  } else {
    halves[2 * threadIdx.x + blockIdx.x] = 5;  // half word
  }
}

template <int kBug>
__global__ void warps_exchange(float* x, float* out, unsigned*) {
  x[threadIdx.x] += 1;  // warps exchange, written
  if (!kBug) __syncthreads();
  out[threadIdx.x] = x[threadIdx.x ^ 32];  // warps exchange
}

template <int kBug>
__global__ void lanes_exchange(float* x, float* out, unsigned*) {
  x[threadIdx.x] += 1;
  if (!kBug) __syncwarp();
  out[threadIdx.x] = x[threadIdx.x ^ 1];  // lanes exchange
}

// A barrier of two warps of four, one of which is not the writer's.
template <int kBug>
__global__ void barrier_of_others(float* x, float* out, unsigned*) {
  int warp = threadIdx.x / 32;
  if (warp == 0) out[threadIdx.x] = x[threadIdx.x];
  if (warp == (kBug ? 2 : 0) || warp == 1) asm volatile("bar.sync 1, 64;" ::: "memory");
  if (warp == 1) out[threadIdx.x + 32] = out[threadIdx.x - 32];  // barrier of others
}

template <int kBug>
__global__ void sum_without_atomic(float* x, float*, unsigned* work) {
  if (threadIdx.x != 0) return;
  if (kBug) {
    work[0] += static_cast<unsigned>(x[blockIdx.x]);  // sum without atomic
  } else {
    atomicAdd(work, static_cast<unsigned>(x[blockIdx.x]));
  }
}

// Atomics order one another, not a plain read of what others still add to.
template <int kBug>
__global__ void plain_read_of_atomics(float* x, float* out, unsigned* work) {
  if (threadIdx.x != 0) return;
  atomicAdd(work, 1u);  // atomic before a plain read
  out[blockIdx.x] = kBug ? *work : load_volatile(work);  // plain read of atomics
  if (!kBug) out[blockIdx.x] = 0;
}

template <int kBug>
__global__ void block_scope_atomic(float*, float*, unsigned* work) {
  if (kBug) {
    atomicAdd_block(work, 1u);  // block scope atomic
  } else {
    atomicAdd(work, 1u);
  }
}

// Another warp overwrites what a copy in the background still reads.
template <int kBug>
__global__ void source_of_copy(float* x, float* out, unsigned*) {
  __shared__ alignas(16) float s[4 * 32];
  if (threadIdx.x < 32) {
    __pipeline_memcpy_async(s + 4 * threadIdx.x, x + 4 * threadIdx.x, 16);  // source of copy
    __pipeline_commit();
    if (!kBug) __pipeline_wait_prior(0);
  }
  if (!kBug) __syncthreads();
  if (threadIdx.x >= 32) x[threadIdx.x - 32] = 0;  // source overwritten
  if (threadIdx.x < 32) {
    __pipeline_wait_prior(0);  // copy at its wait
    out[threadIdx.x] = s[4 * threadIdx.x];
  }
}

// ---- Fences --------------------------------------------------------------------------------------------------------

// Whether the block is the last to come here.
__device__ __forceinline__ bool is_last(unsigned* count) {
  return atomicAdd(count, 1u) == gridDim.x - 1;
}

// As the CUDA programming guide has it: of the last block's own fence only an L1 cache could make a difference, which
// holds nothing of `out` here.
template <int kBug>
__global__ void last_block(float* x, float* out, unsigned* work) {
  if (threadIdx.x != 0) return;
  out[blockIdx.x] = 2 * x[blockIdx.x];  // last block, written
  if (!kBug) __threadfence();
  if (!is_last(work)) return;
  float sum = 0;
  for (int i = 0; i < gridDim.x; ++i) sum += out[i];  // last block
  out[100] = sum;
  *work = 0;  // for the next launch
}

// All threads take part: they store, one announces, all of the last block add up.
template <int kBug>
__global__ void last_block_of_threads(float* x, float* out, unsigned* work) {
  __shared__ bool last;
  x[blockIdx.x * kThreads + threadIdx.x] += 1;
  if (kBug != 1) __threadfence();
  if (kBug != 2) __syncthreads();
  if (threadIdx.x == 0) last = is_last(work);
  __syncthreads();
  if (!last) return;
  __threadfence();
  float sum = 0;
  for (int i = 0; i < gridDim.x; ++i)
    sum += x[i * kThreads + threadIdx.x];  // last block of threads
  out[threadIdx.x] = sum;
}
template <int kBug>
__global__ void announced_before_others(float* x, float* out, unsigned* work) {
  __shared__ bool last;
  x[blockIdx.x * kThreads + threadIdx.x] += 1;
  if (!kBug) __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = is_last(work);
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  float sum = 0;
  for (int i = 0; i < gridDim.x; ++i) sum += x[i * kThreads + threadIdx.x];  // before others
  out[threadIdx.x] = sum;
}

template <int kBug>
__global__ void fence_too_early(float* x, float* out, unsigned* work) {
  if (threadIdx.x != 0) return;
  if (kBug) __threadfence();
  out[blockIdx.x] = 2 * x[blockIdx.x];
  if (!kBug) __threadfence();
  if (!is_last(work)) return;
  __threadfence();
  float sum = 0;
  for (int i = 0; i < gridDim.x; ++i) sum += out[i];  // fence too early
  out[100] = sum;
}

template <int kBug>
__global__ void fence_of_block(float* x, float* out, unsigned* work) {
  if (threadIdx.x != 0) return;
  out[blockIdx.x] = 2 * x[blockIdx.x];
  if (kBug) {
    __threadfence_block();
  } else {
    __threadfence();
  }
  if (!is_last(work)) return;
  __threadfence();
  float sum = 0;
  for (int i = 0; i < gridDim.x; ++i) sum += out[i];  // fence of block
  out[100] = sum;
}

// A lane's fence covers what it knows of, which without __syncwarp is not what the other lanes stored.
template <int kBug>
__global__ void fence_of_lane(float* x, float* out, unsigned* work) {
  bool last = false;
  out[blockIdx.x * 32 + threadIdx.x] = 2 * x[threadIdx.x];
  if (!kBug) __syncwarp();
  if (threadIdx.x == 0) {
    __threadfence();
    last = is_last(work);
  }
  __syncwarp();
  if (!last) return;
  __threadfence();
  float sum = 0;
  for (int i = 0; i < gridDim.x * 32; ++i) sum += out[i];  // fence of lane
  work[1] = static_cast<unsigned>(sum);
}

// Each warp announces for itself: no fence covers another warp's stores, and none has to.
template <int kBug>
__global__ void warps_announce(float* x, float* out, unsigned* work) {
  int warp = threadIdx.x / 32;
  if (threadIdx.x % 32 != 0) return;
  out[blockIdx.x * 2 + warp] = 2 * x[warp];
  if (!kBug || warp == 0) __threadfence();
  if (atomicAdd(work, 1u) != 2 * gridDim.x - 1) return;
  __threadfence();
  float sum = 0;
  for (int i = 0; i < 2 * gridDim.x; ++i) sum += out[i];  // warps announce
  work[1] = static_cast<unsigned>(sum);
}

// Block 0 stores and raises a flag for which the others wait.
template <int kBug>
__global__ void flag_without_fence(float* x, float* out, unsigned* work) {
  if (threadIdx.x != 0) return;
  if (blockIdx.x == 0) {
    out[100] = x[5];
    if (!kBug) __threadfence();
    atomicExch(work, 1u);
  } else {
    while (load_volatile(work) == 0) {
    }
    __threadfence();
    out[blockIdx.x] = out[100];  // flag without fence
  }
}

// What a block read before may still be in its L1 cache.
template <int kBug>
__global__ void read_again(float* x, float* out, unsigned* work) {
  if (threadIdx.x != 0) return;
  if (blockIdx.x == 0) {
    while (load_volatile(work) == 0) {
    }
    __threadfence();
    x[5] = 1000;
    __threadfence();
    atomicExch(work + 1, 1u);
  } else {
    float before = x[5];
    __threadfence();
    atomicExch(work, 1u);
    while (load_volatile(work + 1) == 0) {
    }
    if (!kBug) __threadfence();
    out[blockIdx.x] = x[5] - before;  // read again
  }
}

// What a lock guards is for the next owner to see.
template <int kBug>
__global__ void lock_without_fence(float*, float* out, unsigned* work) {
  if (threadIdx.x != 0) return;
  while (atomicCAS(work, 0u, 1u) != 0) {
  }
  __threadfence();
  out[100] = out[100] + 1;  // lock without fence
  if (!kBug) __threadfence();
  atomicExch(work, 0u);
}

template <int kBug>
__global__ void relaxed_signal(float* x, float* out, unsigned* work) {
  if (threadIdx.x != 0) return;
  if (blockIdx.x == 0) {
    out[100] = x[5];
    if (kBug) {
      asm volatile("st.relaxed.gpu.global.u32 [%0], 1;" ::"l"(work) : "memory");
    } else {
      asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(work) : "memory");
    }
  } else {
    unsigned flag = 0;
    while (flag == 0) {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(flag) : "l"(work) : "memory");
    }
    out[blockIdx.x] = out[100];  // relaxed signal
  }
}

// Through a third block: what it heard of, it passes on with a fence of its own.
template <int kBug>
__global__ void passed_on(float* x, float* out, unsigned* work) {
  if (threadIdx.x != 0) return;
  if (blockIdx.x == 0) {
    out[100] = x[5];
    __threadfence();
    atomicExch(work, 1u);
  } else if (blockIdx.x == 1) {
    while (load_volatile(work) == 0) {
    }
    if (!kBug) __threadfence();
    atomicExch(work + 1, 1u);
  } else {
    while (load_volatile(work + 1) == 0) {
    }
    __threadfence();
    out[0] = out[100];  // passed on
  }
}

// ---- The read-only path ----------------------------------------------------------------------------------------------

template <int kBug>
__global__ void ldg_of_written(float* x, float* out, unsigned*) {
  x[threadIdx.x] += 1;
  __syncthreads();
  const float* from = x + (threadIdx.x ^ 1);
  out[threadIdx.x] = kBug ? __ldg(from) : *from;  // ldg of written
}

// A pointer that is promised to be the only one to what it points to.
__device__ __forceinline__ void twice(const float* __restrict__ from, float* __restrict__ to) {
  to[threadIdx.x] = 2 * __ldg(from + threadIdx.x);  // restrict in place
}
template <int kBug>
__global__ void restrict_in_place(float* x, float* out, unsigned*) {
  twice(x, kBug ? x : out);
}

template <int kBug>
__global__ void ldg_of_partial_sums(float* x, float* out, unsigned* work) {
  if (threadIdx.x != 0) return;
  out[blockIdx.x] = 2 * x[blockIdx.x];
  __threadfence();
  if (!is_last(work)) return;
  __threadfence();
  float sum = 0;
  for (int i = 0; i < gridDim.x; ++i) sum += kBug ? __ldg(out + i) : out[i];  // ldg of partial sums
  out[100] = sum;
}

#define LAUNCHERS(name, blocks, threads) \
  extern "C" void launch_##name(int bug, float* x, float* out, unsigned* work) { \
    if (bug == 2) { \
      name<2><<<blocks, threads>>>(x, out, work); \
    } else if (bug == 1) { \
      name<1><<<blocks, threads>>>(x, out, work); \
    } else { \
      name<0><<<blocks, threads>>>(x, out, work); \
    } \
  }
LAUNCHERS(blocks_write_word, 8, 32)
LAUNCHERS(tiles_overlap, 8, 32)
LAUNCHERS(neighbour_in_place, 4, kThreads)
LAUNCHERS(halves_of_words, 2, 32)
LAUNCHERS(warps_exchange, 1, kThreads)
LAUNCHERS(lanes_exchange, 1, 32)
LAUNCHERS(barrier_of_others, 1, 128)
LAUNCHERS(sum_without_atomic, 8, 32)
LAUNCHERS(plain_read_of_atomics, 8, 32)
LAUNCHERS(block_scope_atomic, 8, 32)
LAUNCHERS(source_of_copy, 1, kThreads)
LAUNCHERS(last_block, 8, 32)
LAUNCHERS(last_block_of_threads, 8, kThreads)
LAUNCHERS(announced_before_others, 8, kThreads)
LAUNCHERS(fence_too_early, 8, 32)
LAUNCHERS(fence_of_block, 8, 32)
LAUNCHERS(fence_of_lane, 8, 32)
LAUNCHERS(warps_announce, 8, kThreads)
LAUNCHERS(flag_without_fence, 3, 32)
LAUNCHERS(read_again, 2, 32)
LAUNCHERS(lock_without_fence, 3, 32)
LAUNCHERS(relaxed_signal, 3, 32)
LAUNCHERS(passed_on, 3, 32)
LAUNCHERS(ldg_of_written, 1, kThreads)
LAUNCHERS(restrict_in_place, 1, kThreads)
LAUNCHERS(ldg_of_partial_sums, 8, 32)
