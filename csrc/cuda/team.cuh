// The threads of a block or cluster that share a long row, and what they tell each other of it.
#pragma once

#include "cuda/row.cuh"

namespace kdkernels {
namespace cuda {
namespace {

// The sums of the parts of each `lanes` neighbouring lanes, in every one of them.
template <class Policy, class Real>
__device__ __forceinline__ RowSums<Real> merge_lanes(const Task<Real>& task,
                                                     const RowSums<Real>& part, int lanes) {
  Real maxima[2] = {part.max_s, part.max_t};
  reduce_lanes<Max>(maxima, lanes);
  RowSums<Real> row =
      math::rebase<Policy>(task.hard, part, maxima[0], maxima[1], task.scale, Exp2Nonpositive());
  Real sums[2] = {row.sum_s, row.sum_t}, cross[1] = {row.cross}, hard[1] = {row.sum_hard};
  Real smooth[2] = {row.sum_z, row.count};
  reduce_lanes<Sum>(sums, lanes);
  if constexpr (Policy::kCross) reduce_lanes<Sum>(cross, lanes);
  if (task.hard == CrossEntropy::kOwn) reduce_lanes<Sum>(hard, lanes);
  if (task.smooth) reduce_lanes<Sum>(smooth, lanes);
  return {maxima[0], maxima[1], sums[0], sums[1], cross[0], hard[0], smooth[0], smooth[1]};
}

template <class T>
constexpr int kHeldWarps = held_max_threads(sizeof(T)) / kWarp;

// What warps tell each other of a row: sums as the first sweep makes them, or others, and maxima from kMaximaAt on.
constexpr int kPartValues = 8, kMaximaAt = 4;
template <class Real>
union alignas(16) Part {
  RowSums<Real> sums;
  Real values[kPartValues];
};
static_assert(sizeof(RowSums<float>) == kPartValues * sizeof(float));
struct alignas(16) LossShare {
  double loss;
};
template <class T>
struct Exchange {
  using Real = typename Compute<T>::type;
  // In two turns: who writes the next has passed a barrier after all have read the last.
  Part<Real> parts[2][kHeldWarps<T>];
  LossShare shares[kHeldWarps<T>];  // of the row's loss
  double totals[kHeldWarps<T>];  // of all rows
  Real factor;  // kept by thread 0; the others read it after a row's barrier
};

// The threads that share rows: of a block, or of a cluster's blocks. Each warp adds up what all of them have.
template <class T>
struct Team {
  using Real = typename Compute<T>::type;
  Exchange<T>& exchange;
  const int cluster, rank, thread, threads, warps, lane, log_warps;
  int turn = 0;
  bool arrived = false;  // at the barrier behind which a block may end

  __device__ __forceinline__ Team(Exchange<T>& exchange, int cluster, int rank, int log_warps)
      : exchange(exchange),
        cluster(cluster),
        rank(rank),
        thread(threadIdx.x),
        threads(blockDim.x),
        warps(threads / kWarp),
        lane(thread % kWarp),
        log_warps(log_warps) {}

  __device__ __forceinline__ int warp() const { return thread / kWarp; }
  __device__ __forceinline__ bool is_first() const { return thread == 0 && rank == 0; }
  __device__ __forceinline__ int parts() const { return warps * cluster; }  // a power of two
  __device__ __forceinline__ void meet() const {
    if (cluster > 1) {
      cluster_arrive();
      cluster_wait();
    } else {
      __syncthreads();
    }
  }
  __device__ __forceinline__ void arrive() {
    if (cluster == 1) return;
    cluster_arrive();
    arrived = true;
  }
  __device__ __forceinline__ void end() const {
    if (cluster == 1) return;
    if (!arrived) cluster_arrive();
    cluster_wait();
  }
  __device__ __forceinline__ Part<Real> part(int i) const {
    const Part<Real>* at = &exchange.parts[turn][i & (warps - 1)];
    return cluster > 1 ? read_peer(at, i >> log_warps) : *at;
  }
  __device__ __forceinline__ double loss_of(int i) const {
    const LossShare* at = &exchange.shares[i & (warps - 1)];
    return cluster > 1 ? read_peer(at, i >> log_warps).loss : at->loss;
  }

  // The sums of all threads' parts. last: of what this block tells others.
  template <class Policy>
  __device__ __forceinline__ RowSums<Real> merge(const Task<Real>& task, RowSums<Real> sums,
                                                 bool last) {
    sums = merge_lanes<Policy>(task, sums, kWarp);
    if (lane == 0) exchange.parts[turn][warp()].sums = sums;
    meet();
    sums = part(lane & (parts() - 1)).sums;
    for (int i = lane + kWarp; i < parts(); i += kWarp)
      sums = math::merge<Policy>(task.hard, sums, part(i).sums, task.scale, Exp2Nonpositive());
    if (last) arrive();
    turn ^= 1;
    return merge_lanes<Policy>(task, sums, min(parts(), kWarp));
  }
  // Sums over the row's threads, and of what tell() told before, maxima.
  template <int kSums, int kMaxima = 0>
  __device__ __forceinline__ void reduce(Real (&value)[kSums + kMaxima], bool told = false) {
    Part<Real>& mine = exchange.parts[turn][warp()];
    Real sums[kSums];
#pragma unroll
    for (int v = 0; v < kSums; ++v) sums[v] = value[v];
    reduce_lanes<Sum>(sums);
    if (lane == 0) {  // whole, as it is read
#pragma unroll
      for (int v = 0; v < kMaximaAt; ++v) mine.values[v] = v < kSums ? sums[v] : Real(0);
      if (!told) {
#pragma unroll
        for (int v = kMaximaAt; v < kPartValues; ++v) mine.values[v] = Real(0);
      }
    }
    meet();
    Real maxima[kMaxima + 1];
    Part<Real> x = part(lane & (parts() - 1));
    auto take = [&](bool first) {
#pragma unroll
      for (int v = 0; v < kSums; ++v) sums[v] = first ? x.values[v] : sums[v] + x.values[v];
#pragma unroll
      for (int v = 0; v < kMaxima; ++v) {
        const Real y = x.values[kMaximaAt + v];
        maxima[v] = first ? y : Max::apply(maxima[v], y);
      }
    };
    take(true);
    for (int i = lane + kWarp; i < parts(); i += kWarp) {
      x = part(i);
      take(false);
    }
    turn ^= 1;
    maxima[kMaxima] = 0;
    reduce_lanes<Sum>(sums, min(parts(), kWarp));
    if constexpr (kMaxima > 0) reduce_lanes<Max>(maxima, min(parts(), kWarp));
#pragma unroll
    for (int v = 0; v < kSums + kMaxima; ++v) value[v] = v < kSums ? sums[v] : maxima[v - kSums];
  }
  // Maxima for the next reduce: so they take no registers until then.
  __device__ __forceinline__ void tell(Real a, Real b) const {
    Real maxima[2] = {a, b};
    reduce_lanes<Max>(maxima);
    if (lane != 0) return;
#pragma unroll
    for (int v = kMaximaAt; v < kPartValues; ++v)
      exchange.parts[turn][warp()].values[v] = v - kMaximaAt < 2 ? maxima[v - kMaximaAt] : Real(0);
  }
};

}  // namespace
}  // namespace cuda
}  // namespace kdkernels
