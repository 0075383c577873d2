// Noise over a list of tensors, and the dot product of a tensor with its noise.
#include <algorithm>

#include "cuda/device.cuh"
#include "cuda/kernels.h"
#include "math/normal.h"

namespace kdkernels {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kCountersPerThread = 8;
constexpr int kCountersPerBlock = kThreads * kCountersPerThread;

// A tensor of a launch; block b works on the last one whose first_block is at most b.
struct Entry {
  void* out;
  const void* in;
  int64_t numel;
  uint64_t offset;
  double std;
  uint32_t stream, first_block;
};

// The list travels as a kernel argument: 80 tensors fit the classic 4 KB, 640 the 32 KB of CUDA 12.1 on.
template <int kCapacity>
struct List {
  Entry entry[kCapacity];
  int count;
  uint32_t seed_low, seed_high, step;
  const int64_t* device_step;
  const double* device_std;
};

template <class T>
__device__ __forceinline__ bool aligned_device(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % sizeof(Vector<T, 4>) == 0;
}

template <class T, class Real>
__device__ __forceinline__ Real noisy(bool add, T x, Real std, float eps) {
  return add ? math::fma(std, static_cast<Real>(eps), static_cast<Real>(widen(x)))
             : std * static_cast<Real>(eps);
}

// One Philox call a thread makes 4 neighbouring elements, moved by one load and one store where they are
// aligned. Reads and writes each element once; about 90 integer and 60 floating-point instructions for 4.
template <class T, int kCapacity>
__global__ void __launch_bounds__(kThreads)
    noise_kernel(const __grid_constant__ List<kCapacity> list) {
  using Real = typename Compute<T>::type;
  int low = 0, high = list.count - 1;
  while (low < high) {
    int middle = (low + high + 1) / 2;
    if (list.entry[middle].first_block <= blockIdx.x) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const Entry& e = list.entry[low];
  uint32_t step =
      list.device_step != nullptr ? static_cast<uint32_t>(*list.device_step) : list.step;
  math::NoiseKey key = {list.seed_low, list.seed_high, e.stream, step};
  Real std = static_cast<Real>(list.device_std != nullptr ? *list.device_std : e.std);
  const T* in = static_cast<const T*>(e.in);
  T* out = static_cast<T*>(e.out);
  // Element of this tensor that is the first of counter 0 of the block; negative only in the first block.
  int64_t skip = static_cast<int64_t>(e.offset % 4);
  int64_t block = static_cast<int64_t>(blockIdx.x - e.first_block) * kCountersPerBlock;
  bool together = skip == 0 && aligned_device(in) && aligned_device(out);
#pragma unroll 1
  for (int k = 0; k < kCountersPerThread; ++k) {
    int64_t counter = block + k * kThreads + threadIdx.x;
    int64_t first = counter * 4 - skip;
    if (first >= e.numel) break;
    uint64_t global = e.offset / 4 + static_cast<uint64_t>(counter);
    math::Normal4 eps =
        math::normal4(key, static_cast<uint32_t>(global), static_cast<uint32_t>(global >> 32));
    if (together && first + 4 <= e.numel) {
      Vector<T, 4> x;
      if (in != nullptr) x = reinterpret_cast<const Vector<T, 4>*>(in + first)[0];
#pragma unroll
      for (int j = 0; j < 4; ++j)
        narrow(noisy(in != nullptr, x.value[j], std, eps.value[j]), x.value[j]);
      reinterpret_cast<Vector<T, 4>*>(out + first)[0] = x;
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        int64_t i = first + j;
        if (i < 0 || i >= e.numel) continue;
        T x;
        if (in != nullptr) x = in[i];
        narrow(noisy(in != nullptr, x, std, eps.value[j]), out[i]);
      }
    }
  }
}

int64_t counters(uint64_t offset, int64_t numel) {
  return (static_cast<int64_t>(offset % 4) + numel + 3) / 4;
}

template <class T, int kCapacity>
cudaError_t launch_list(const NoiseParams& p, int64_t begin, int64_t end, cudaStream_t stream) {
  List<kCapacity> list;
  list.count = static_cast<int>(end - begin);
  list.seed_low = p.seed_low;
  list.seed_high = p.seed_high;
  list.step = p.step;
  list.device_step = p.device_step;
  list.device_std = p.device_std;
  int64_t blocks = 0;
  for (int64_t t = begin; t < end; ++t) {
    const NoiseTensor& x = p.tensors[t];
    list.entry[t - begin] = {
        x.out, x.in, x.numel, x.offset, x.std, x.stream, static_cast<uint32_t>(blocks)};
    blocks += (counters(x.offset, x.numel) + kCountersPerBlock - 1) / kCountersPerBlock;
  }
  noise_kernel<T, kCapacity><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(list);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch_noise(const NoiseParams& p, cudaStream_t stream) {
  constexpr int kFew = 80, kMany = 640;
  cudaError_t error = cudaSuccess;
  for (int64_t begin = 0; begin < p.count && error == cudaSuccess;) {
    int64_t end = std::min<int64_t>(p.count, begin + kMany);
    error = end - begin <= kFew ? launch_list<T, kFew>(p, begin, end, stream)
                                : launch_list<T, kMany>(p, begin, end, stream);
    begin = end;
  }
  return error;
}

// Partial sums, a block kCountersPerBlock counters: products of one counter in fp32 or fp64, their sum in
// fp64.
template <class T>
__global__ void __launch_bounds__(kThreads) dot_kernel(const NoiseDotParams p) {
  using Real = typename Compute<T>::type;
  __shared__ double shared[kThreads / kWarp];
  const T* x = static_cast<const T*>(p.x);
  math::NoiseKey key = p.key;
  if (p.device_step != nullptr) key.step = static_cast<uint32_t>(*p.device_step);
  int64_t skip = static_cast<int64_t>(p.offset % 4);
  double sum[1] = {0};
#pragma unroll 1
  for (int k = 0; k < kCountersPerThread; ++k) {
    int64_t counter =
        static_cast<int64_t>(blockIdx.x) * kCountersPerBlock + k * kThreads + threadIdx.x;
    int64_t first = counter * 4 - skip;
    if (first >= p.numel) break;
    uint64_t global = p.offset / 4 + static_cast<uint64_t>(counter);
    math::Normal4 eps =
        math::normal4(key, static_cast<uint32_t>(global), static_cast<uint32_t>(global >> 32));
    Real four = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      int64_t i = first + j;
      if (i >= 0 && i < p.numel)
        four = math::fma(static_cast<Real>(widen(x[i])), static_cast<Real>(eps.value[j]), four);
    }
    sum[0] += static_cast<double>(four);
  }
  reduce<Sum, kThreads>(sum, shared);
  if (threadIdx.x == 0) p.partial[blockIdx.x] = sum[0];
}

template <class Real>
__global__ void __launch_bounds__(kThreads)
    dot_total_kernel(const NoiseDotParams p, int64_t blocks) {
  __shared__ double shared[kThreads / kWarp];
  double sum[1] = {0};
  for (int64_t b = threadIdx.x; b < blocks; b += kThreads) sum[0] += p.partial[b];
  reduce<Sum, kThreads>(sum, shared);
  if (threadIdx.x == 0) *static_cast<Real*>(p.result) = static_cast<Real>(sum[0]);
}

template <class T>
cudaError_t launch_dot(const NoiseDotParams& p, cudaStream_t stream) {
  int64_t blocks = (counters(p.offset, p.numel) + kCountersPerBlock - 1) / kCountersPerBlock;
  if (p.numel == 0) blocks = 0;
  if (blocks > 0) dot_kernel<T><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(p);
  dot_total_kernel<typename Compute<T>::type><<<1, kThreads, 0, stream>>>(p, blocks);
  return cudaGetLastError();
}

}  // namespace

cudaError_t noise(const NoiseParams& p, cudaStream_t stream) {
  switch (p.dtype) {
    case Dtype::kFloat32: return launch_noise<float>(p, stream);
    case Dtype::kFloat64: return launch_noise<double>(p, stream);
    case Dtype::kBFloat16: return launch_noise<__nv_bfloat16>(p, stream);
    case Dtype::kFloat16: return launch_noise<__half>(p, stream);
  }
  return cudaErrorInvalidValue;
}

int64_t noise_dot_blocks(int64_t numel) { return counters(3, numel) / kCountersPerBlock + 1; }

cudaError_t noise_dot(const NoiseDotParams& p, cudaStream_t stream) {
  switch (p.dtype) {
    case Dtype::kFloat32: return launch_dot<float>(p, stream);
    case Dtype::kFloat64: return launch_dot<double>(p, stream);
    case Dtype::kBFloat16: return launch_dot<__nv_bfloat16>(p, stream);
    case Dtype::kFloat16: return launch_dot<__half>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace cuda
}  // namespace kdkernels
