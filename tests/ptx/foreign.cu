// NVIDIA's own device code for the emulator to run: CUB's block and warp algorithms, and cooperative
// groups. Each launcher covers one of them, for the type that its suffix names, and returns the
// launch's error.
#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>
#include <cooperative_groups/scan.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cub/block/block_radix_sort.cuh>
#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>
#include <cub/warp/warp_reduce.cuh>
#include <cub/warp/warp_scan.cuh>

namespace cg = cooperative_groups;

namespace {

struct Max {
  template <typename T>
  __device__ T operator()(const T& a, const T& b) const {
    return a < b ? b : a;
  }
};

// x -> multiplier * x + constant modulo 2^32, packed in 64 bits: associative, but not commutative,
// so that a scan which takes its elements in another order than theirs gives other numbers.
struct Compose {
  __device__ uint64_t operator()(uint64_t first, uint64_t second) const {
    const uint32_t m1 = first >> 32, c1 = first, m2 = second >> 32, c2 = second;
    return uint64_t{m1 * m2} << 32 | (m2 * c1 + c2);
  }
};

// out[block] = {sum, maximum, sum of the first `valid` threads' elements}
template <typename T, int kThreads, cub::BlockReduceAlgorithm kAlgorithm>
__global__ void block_reduce(const T* in, T* out, int valid) {
  constexpr int kItems = 3;
  using Reduce = cub::BlockReduce<T, kThreads, kAlgorithm>;
  __shared__ typename Reduce::TempStorage storage;
  const T* mine = in + (blockIdx.x * kThreads + threadIdx.x) * kItems;
  T items[kItems];
  for (int i = 0; i < kItems; ++i) items[i] = mine[i];
  const T sum = Reduce(storage).Sum(items);
  __syncthreads();
  const T most = Reduce(storage).Reduce(items, Max());
  __syncthreads();
  const T partial = Reduce(storage).Sum(items[0], valid);
  if (threadIdx.x == 0) {
    out[3 * blockIdx.x] = sum;
    out[3 * blockIdx.x + 1] = most;
    out[3 * blockIdx.x + 2] = partial;
  }
}

// Inclusive and exclusive prefix sums of a block's elements, and a warp's through cub::WarpScan.
template <typename T, int kThreads, cub::BlockScanAlgorithm kAlgorithm>
__global__ void block_scan(const T* in, T* inclusive, T* exclusive, T* total) {
  constexpr int kItems = 2;
  using Scan = cub::BlockScan<T, kThreads, kAlgorithm>;
  __shared__ typename Scan::TempStorage storage;
  const int at = (blockIdx.x * kThreads + threadIdx.x) * kItems;
  T items[kItems], scanned[kItems], aggregate;
  for (int i = 0; i < kItems; ++i) items[i] = in[at + i];
  Scan(storage).InclusiveSum(items, scanned);
  for (int i = 0; i < kItems; ++i) inclusive[at + i] = scanned[i];
  __syncthreads();
  Scan(storage).ExclusiveSum(items, scanned, aggregate);
  for (int i = 0; i < kItems; ++i) exclusive[at + i] = scanned[i];
  if (threadIdx.x == 0) total[blockIdx.x] = aggregate;
}

template <int kThreads, cub::BlockScanAlgorithm kAlgorithm>
__global__ void block_compose(const uint64_t* in, uint64_t* out) {
  using Scan = cub::BlockScan<uint64_t, kThreads, kAlgorithm>;
  __shared__ typename Scan::TempStorage storage;
  const int at = blockIdx.x * kThreads + threadIdx.x;
  uint64_t scanned;
  Scan(storage).InclusiveScan(in[at], scanned, Compose());
  out[at] = scanned;
}

// Logical warps of kWidth lanes: sums, maxima, and both scans. Where kWidth is no power of two, CUB
// takes one logical warp from each warp of the hardware, whose other lanes have left here.
template <typename T, int kWidth, int kWarps>
__global__ void warp_algorithms(const T* in, T* sums, T* maxima, T* inclusive, T* exclusive) {
  using Reduce = cub::WarpReduce<T, kWidth>;
  using Scan = cub::WarpScan<T, kWidth>;
  __shared__ typename Reduce::TempStorage reduce_storage[kWarps];
  __shared__ typename Scan::TempStorage scan_storage[kWarps];
  const int stride = blockDim.x / kWarps, warp = threadIdx.x / stride, lane = threadIdx.x % stride;
  if (lane >= kWidth) return;
  const int at = (blockIdx.x * kWarps + warp) * kWidth + lane;
  const T x = in[at];
  const T sum = Reduce(reduce_storage[warp]).Sum(x);
  __syncwarp();
  const T most = Reduce(reduce_storage[warp]).Reduce(x, Max());
  if (lane == 0) {
    sums[at / kWidth] = sum;
    maxima[at / kWidth] = most;
  }
  T before, upto;
  Scan(scan_storage[warp]).InclusiveSum(x, upto);
  __syncwarp();
  Scan(scan_storage[warp]).ExclusiveSum(x, before);
  inclusive[at] = upto;
  exclusive[at] = before;
}

// Sorts keys upwards with their places as values, then the keys alone downwards, striped.
template <typename T, int kThreads, int kItems>
__global__ void block_sort(const T* in, T* up, int* place, T* down) {
  using Pairs = cub::BlockRadixSort<T, kThreads, kItems, int>;
  using Keys = cub::BlockRadixSort<T, kThreads, kItems>;
  __shared__ union {
    typename Pairs::TempStorage pairs;
    typename Keys::TempStorage keys;
  } storage;
  const int base = blockIdx.x * kThreads * kItems;
  T keys[kItems];
  int values[kItems];
  for (int i = 0; i < kItems; ++i) {
    values[i] = threadIdx.x * kItems + i;
    keys[i] = in[base + values[i]];
  }
  Pairs(storage.pairs).Sort(keys, values);
  for (int i = 0; i < kItems; ++i) {
    up[base + threadIdx.x * kItems + i] = keys[i];
    place[base + threadIdx.x * kItems + i] = values[i];
  }
  __syncthreads();
  Keys(storage.keys).SortDescendingBlockedToStriped(keys);
  for (int i = 0; i < kItems; ++i) down[base + i * kThreads + threadIdx.x] = keys[i];
}

// A tile's sum, maximum, exclusive prefix sum, and its lanes' votes.
template <int kWidth>
__device__ void tile_algorithms(cg::thread_block block, int x, int at, int* out) {
  const auto tile = cg::tiled_partition<kWidth>(block);
  out[4 * at] = cg::reduce(tile, x, cg::plus<int>());
  out[4 * at + 1] = cg::reduce(tile, x, cg::greater<int>());
  out[4 * at + 2] = cg::exclusive_scan(tile, x);
  out[4 * at + 3] = tile.ballot(x & 1);
}

__global__ void groups(const int* in, const float* floats, int* tiles, int* odd, int* labeled,
                       float* sums) {
  const auto block = cg::this_thread_block();
  const int n = gridDim.x * blockDim.x, at = blockIdx.x * blockDim.x + threadIdx.x, x = in[at];
  tile_algorithms<32>(block, x, at, tiles);
  tile_algorithms<16>(block, x, at, tiles + 4 * n);
  tile_algorithms<4>(block, x, at, tiles + 8 * n);
  // The lanes with an odd x, which a branch has parted from the rest, in one group or in several:
  // which of them run together is left open.
  odd[4 * at] = odd[4 * at + 1] = odd[4 * at + 2] = odd[4 * at + 3] = -1;
  if (x & 1) {
    const auto active = cg::coalesced_threads();
    odd[4 * at] = cg::reduce(active, x, cg::plus<int>());
    odd[4 * at + 1] = cg::inclusive_scan(active, x, cg::plus<int>());
    odd[4 * at + 2] = active.thread_rank();
    odd[4 * at + 3] = active.shfl(static_cast<int>(threadIdx.x % 32), 0);
  }
  const auto warp = cg::tiled_partition<32>(block);
  const auto same = cg::labeled_partition(warp, x % 5);
  labeled[3 * at] = cg::reduce(same, x, cg::bit_xor<int>());
  labeled[3 * at + 1] = cg::reduce(same, unsigned(x), cg::less<unsigned>());
  labeled[3 * at + 2] = same.size();
  sums[at] = cg::reduce(warp, floats[at], cg::plus<float>());
}

// Each block of a cluster adds to every block's counters, and reads its neighbour's total.
__global__ void cluster_group(const int* in, int* out) {
#if __CUDA_ARCH__ >= 900
  __shared__ int counts[8], total;
  const auto cluster = cg::this_cluster();
  const int x = in[cluster.block_rank() * blockDim.x + threadIdx.x +
                   blockIdx.x / cluster.num_blocks() * cluster.num_threads()];
  if (threadIdx.x < 8) counts[threadIdx.x] = 0;
  if (threadIdx.x == 0) total = 0;
  cluster.sync();
  for (unsigned i = 0; i < cluster.num_blocks(); ++i) {
    atomicAdd(cluster.map_shared_rank(counts + (x & 7), i), 1);
  }
  atomicAdd(&total, x);
  cluster.sync();
  const int next = (cluster.block_rank() + 1) % cluster.num_blocks();
  if (threadIdx.x < 8) out[9 * blockIdx.x + threadIdx.x] = counts[threadIdx.x];
  if (threadIdx.x == 0) out[9 * blockIdx.x + 8] = *cluster.map_shared_rank(&total, next);
  cluster.sync();
#endif
}

template <typename T, int kThreads>
cudaError_t launch_reduce(const void* in, void* out, int blocks, int valid) {
  const T* from = static_cast<const T*>(in);
  T* to = static_cast<T*>(out);
  block_reduce<T, kThreads, cub::BLOCK_REDUCE_WARP_REDUCTIONS>
      <<<blocks, kThreads>>>(from, to, valid);
  block_reduce<T, kThreads, cub::BLOCK_REDUCE_RAKING>
      <<<blocks, kThreads>>>(from, to + 3 * blocks, valid);
  return cudaGetLastError();
}

template <typename T, int kThreads>
cudaError_t launch_scan(const void* in, void* inclusive, void* exclusive, void* total, int blocks) {
  const T* from = static_cast<const T*>(in);
  T *i = static_cast<T*>(inclusive), *e = static_cast<T*>(exclusive), *t = static_cast<T*>(total);
  const int n = blocks * kThreads * 2;
  block_scan<T, kThreads, cub::BLOCK_SCAN_WARP_SCANS><<<blocks, kThreads>>>(from, i, e, t);
  block_scan<T, kThreads, cub::BLOCK_SCAN_RAKING>
      <<<blocks, kThreads>>>(from, i + n, e + n, t + blocks);
  return cudaGetLastError();
}

template <typename T, int kWidth>
cudaError_t launch_warp(const void* in, void* sums, void* maxima, void* inclusive, void* exclusive,
                        int blocks) {
  constexpr int kWarps = 6;
  constexpr int kThreads = kWarps * ((kWidth & (kWidth - 1)) == 0 ? kWidth : 32);
  warp_algorithms<T, kWidth, kWarps><<<blocks, kThreads>>>(
      static_cast<const T*>(in), static_cast<T*>(sums), static_cast<T*>(maxima),
      static_cast<T*>(inclusive), static_cast<T*>(exclusive));
  return cudaGetLastError();
}

template <typename T, int kThreads, int kItems>
cudaError_t launch_sort(const void* in, void* up, int* place, void* down, int blocks) {
  block_sort<T, kThreads, kItems><<<blocks, kThreads>>>(
      static_cast<const T*>(in), static_cast<T*>(up), place, static_cast<T*>(down));
  return cudaGetLastError();
}

}  // namespace

// One set of launchers a type. The blocks' and warps' sizes differ, so that whole warps, part warps
// and logical warps of many widths are all met.
#define LAUNCHERS(T, NAME, THREADS, WIDTH, SORT_THREADS, SORT_ITEMS) \
  int reduce_##NAME(const void* in, void* out, int blocks, int valid) { \
    return launch_reduce<T, THREADS>(in, out, blocks, valid); \
  } \
  int scan_##NAME(const void* in, void* inclusive, void* exclusive, void* total, int blocks) { \
    return launch_scan<T, THREADS>(in, inclusive, exclusive, total, blocks); \
  } \
  int warp_##NAME(const void* in, void* sums, void* maxima, void* inclusive, void* exclusive, \
                  int blocks) { \
    return launch_warp<T, WIDTH>(in, sums, maxima, inclusive, exclusive, blocks); \
  } \
  int sort_##NAME(const void* in, void* up, int* place, void* down, int blocks) { \
    return launch_sort<T, SORT_THREADS, SORT_ITEMS>(in, up, place, down, blocks); \
  }

extern "C" {
LAUNCHERS(int, int32, 128, 32, 128, 4)
LAUNCHERS(uint64_t, uint64, 96, 16, 64, 3)
LAUNCHERS(float, float32, 256, 32, 96, 5)
LAUNCHERS(double, float64, 50, 8, 32, 7)
LAUNCHERS(__half, float16, 160, 12, 64, 4)

int compose(const uint64_t* in, uint64_t* out, int blocks) {
  constexpr int kThreads = 192;
  block_compose<kThreads, cub::BLOCK_SCAN_WARP_SCANS><<<blocks, kThreads>>>(in, out);
  block_compose<kThreads, cub::BLOCK_SCAN_RAKING_MEMOIZE>
      <<<blocks, kThreads>>>(in, out + blocks * kThreads);
  return cudaGetLastError();
}

int cooperative(const int* in, const float* floats, int* tiles, int* odd, int* labeled, float* sums,
                int blocks, int threads) {
  groups<<<blocks, threads>>>(in, floats, tiles, odd, labeled, sums);
  return cudaGetLastError();
}

int cluster(const int* in, int* out, int blocks, int threads, int size) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(size), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, cluster_group, in, out);
}
}
