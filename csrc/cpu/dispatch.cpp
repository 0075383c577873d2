// Which ISA level runs, and how its kernels' ranges are shared among threads.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace kdkernels {
namespace cpu {

extern const Kernels kernels_baseline;
#if defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avx512;
#endif

namespace {

struct Level {
  const Kernels* kernels;
  bool supported;
};

// From the least to the most able.
std::vector<Level> levels() {
  std::vector<Level> all = {{&kernels_baseline, true}};
#if defined(__x86_64__)
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("f16c");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  all.push_back({&kernels_avx2, avx2});
  all.push_back({&kernels_avx512, avx512});
#endif
  return all;
}

std::string joined(const std::vector<std::string>& names) {
  std::string out;
  for (const std::string& name : names) out += (out.empty() ? "" : ", ") + name;
  return out;
}

const Kernels* find(const std::string& name, const std::string& who) {
  for (const Level& level : levels()) {
    if (name == level.kernels->isa && level.supported) return level.kernels;
  }
  throw std::invalid_argument(who + " is \"" + name + "\"; this machine runs " +
                              joined(isa_supported()));
}

std::atomic<const Kernels*> current{nullptr};

}  // namespace

std::vector<std::string> isa_compiled() {
  std::vector<std::string> names;
  for (const Level& level : levels()) names.push_back(level.kernels->isa);
  return names;
}

std::vector<std::string> isa_supported() {
  std::vector<std::string> names;
  for (const Level& level : levels()) {
    if (level.supported) names.push_back(level.kernels->isa);
  }
  return names;
}

const Kernels& kernels() {
  const Kernels* chosen = current.load(std::memory_order_acquire);
  if (chosen == nullptr) {
    const char* forced = std::getenv("KDKERNELS_ISA");
    chosen =
        find(forced != nullptr && *forced != 0 ? forced : isa_supported().back(), "KDKERNELS_ISA");
    current.store(chosen, std::memory_order_release);
  }
  return *chosen;
}

void set_isa(const std::string& name) {
  current.store(find(name, "isa"), std::memory_order_release);
}

// Work below which a second thread costs more than it brings: waking one takes some 5 microseconds, in
// which one thread does about this many exponentials or normals.
constexpr int64_t kElementsPerThread = 16384;

namespace {

void store(Dtype dtype, void* out, int64_t i, double value) {
  if (dtype == Dtype::kFloat64) {
    static_cast<double*>(out)[i] = value;
  } else {
    static_cast<float*>(out)[i] = static_cast<float>(value);
  }
}

// All rows of a loss, shared among threads, and what the caller asked for of them.
template <class Params>
void losses(const Params& p, int threads,
            void (*rows)(const Params&, int64_t begin, int64_t end, double* row_loss)) {
  constexpr int64_t kOnStack = 256;
  double on_stack[kOnStack];
  std::vector<double> on_heap(p.rows > kOnStack ? static_cast<size_t>(p.rows) : 0);
  double* row_loss = p.rows > kOnStack ? on_heap.data() : on_stack;
  int64_t grain = std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(p.classes, 1));
  parallel_for(p.rows, grain, threads,
               [&](int64_t begin, int64_t end) { rows(p, begin, end, row_loss); });
  if (p.loss != nullptr) {
    double sum = 0;
    for (int64_t i = 0; i < p.rows; ++i) sum += row_loss[i];
    store(p.dtype, p.loss, 0, p.denominator != 0 ? sum / p.denominator : 0.0);
  }
  for (int64_t i = 0; p.row_loss != nullptr && i < p.rows; ++i) {
    store(p.dtype, p.row_loss, i, row_loss[i]);
  }
}

}  // namespace

void distillation(const DistillationParams& p, int threads) {
  losses(p, threads, kernels().distillation_rows);
}

void divergence(const DivergenceParams& p, int threads) {
  losses(p, threads, kernels().divergence_rows);
}

void noise(const NoiseParams& p, int threads) {
  const Kernels& k = kernels();
  // The list as one range of chunks, so that many small tensors and one large one share threads alike.
  std::vector<int64_t> first_chunk(static_cast<size_t>(p.count) + 1, 0);
  int64_t elements = 0;
  for (int64_t t = 0; t < p.count; ++t) {
    int64_t numel = p.tensors[t].numel;
    first_chunk[t + 1] = first_chunk[t] + (numel + kElementsPerThread - 1) / kElementsPerThread;
    elements += numel;
  }
  if (elements < 2 * kElementsPerThread) threads = 1;
  parallel_for(first_chunk[p.count], 1, threads, [&](int64_t begin, int64_t end) {
    int64_t t =
        std::upper_bound(first_chunk.begin(), first_chunk.end(), begin) - first_chunk.begin() - 1;
    for (int64_t chunk = begin; chunk < end;) {
      while (chunk >= first_chunk[t + 1]) ++t;
      int64_t last = std::min(end, first_chunk[t + 1]);
      const NoiseTensor& tensor = p.tensors[t];
      math::NoiseKey key = {p.seed_low, p.seed_high, tensor.stream, p.step};
      k.noise(p.dtype, tensor, key, (chunk - first_chunk[t]) * kElementsPerThread,
              std::min(tensor.numel, (last - first_chunk[t]) * kElementsPerThread));
      chunk = last;
    }
  });
}

void noise_dot(const NoiseDotParams& p, int threads) {
  const Kernels& k = kernels();
  int64_t chunks = (p.numel + kElementsPerThread - 1) / kElementsPerThread;
  std::vector<double> partial(static_cast<size_t>(chunks));
  parallel_for(chunks, 2, threads, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      partial[c] =
          k.noise_dot(p, c * kElementsPerThread, std::min(p.numel, (c + 1) * kElementsPerThread));
    }
  });
  double sum = 0;  // in chunk order: the same bits for any number of threads
  for (double part : partial) sum += part;
  if (p.dtype == Dtype::kFloat64) {
    *static_cast<double*>(p.result) = sum;
  } else {
    *static_cast<float*>(p.result) = static_cast<float>(sum);
  }
}

void regression(const RegressionParams& p, int threads) {
  const Kernels& k = kernels();
  int64_t normals = p.steps * (p.per_sample ? p.samples : 1);
  int64_t grain = std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(normals, 1));
  parallel_for(p.replicas, std::max<int64_t>(grain, p.per_sample ? 1 : 64), threads,
               [&](int64_t begin, int64_t end) { k.regression(p, begin, end); });
}

}  // namespace cpu
}  // namespace kdkernels
