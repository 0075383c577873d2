// Which ISA level runs, and how its kernels' ranges are shared among threads.
#include <pthread.h>

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

thread_local bool forked = false;

namespace {
[[maybe_unused]] const int watching =
    pthread_atfork(nullptr, nullptr, [] { forked = true; });  // in the child
}  // namespace

// Exponentials or normals that another thread must find to do: 4 to 6 microseconds of work. To start a team takes 2
// where the others still spin, as they do for milliseconds after any loop of PyTorch's, and 20 where they sleep: two
// threads are the faster from 10,000 elements in all or from 50,000 to 90,000.
constexpr int64_t kElementsPerThread = 12288;
// What a thread takes at a time, at least: so much that the calls for it do not count.
constexpr int64_t kElementsPerPiece = 8192;

namespace {

// How many threads so much work is worth.
int worth(int64_t elements, int threads) {
  return static_cast<int>(std::min<int64_t>(threads, elements / kElementsPerThread));
}

void store(Dtype dtype, void* out, int64_t i, double value) {
  if (dtype == Dtype::kFloat64) {
    static_cast<double*>(out)[i] = value;
  } else {
    static_cast<float*>(out)[i] = static_cast<float>(value);
  }
}

}  // namespace

// All rows of a loss, shared among threads, and their sum.
void loss(const LossParams& p, int threads) {
  const Kernels& k = kernels();
  constexpr int64_t kOnStack = 256, kShortRows = 16;  // kernels take short rows so many at a time
  double on_stack[kOnStack];
  std::vector<double> on_heap(p.rows > kOnStack ? static_cast<size_t>(p.rows) : 0);
  double* row_loss = p.rows > kOnStack ? on_heap.data() : on_stack;
  int64_t piece = std::max<int64_t>(1, kElementsPerPiece / std::max<int64_t>(p.classes, 1));
  if (piece > kShortRows) piece -= piece % kShortRows;
  parallel_for(p.rows, piece, worth(p.rows * p.classes, threads),
               [&](int64_t begin, int64_t end) { k.loss_rows(p, begin, end, row_loss); });
  if (p.loss != nullptr) {
    double sum = 0;
    for (int64_t i = 0; i < p.rows; ++i) sum += row_loss[i];
    store(p.dtype, p.loss, 0, p.denominator.number != 0 ? sum / p.denominator.number : 0.0);
  }
  for (int64_t i = 0; p.row_loss != nullptr && i < p.rows; ++i) {
    store(p.dtype, p.row_loss, i, row_loss[i]);
  }
}

namespace {

// Chunks of a list's tensors as one range, so that many small tensors and one large one share threads alike:
// f(tensor, first and last element of a chunk, its place in the range). `work`: of an element, in normals.
template <class Tensor, class F>
void for_chunks(const Tensor* tensors, int64_t count, int64_t chunk_elements, int64_t work,
                int threads, const F& f) {
  std::vector<int64_t> first_chunk(static_cast<size_t>(count) + 1, 0);
  int64_t elements = 0;
  for (int64_t t = 0; t < count; ++t) {
    first_chunk[t + 1] = first_chunk[t] + (tensors[t].numel + chunk_elements - 1) / chunk_elements;
    elements += tensors[t].numel;
  }
  threads = worth(elements * work, threads);
  parallel_for(first_chunk[count], 1, threads, [&](int64_t begin, int64_t end) {
    int64_t t =
        std::upper_bound(first_chunk.begin(), first_chunk.end(), begin) - first_chunk.begin() - 1;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      while (chunk >= first_chunk[t + 1]) ++t;
      int64_t first = (chunk - first_chunk[t]) * chunk_elements;
      f(tensors[t], first, std::min(tensors[t].numel, first + chunk_elements), chunk);
    }
  });
}

// The same for `kSums` sums per chunk, which f overwrites: out[index] is their sum over a tensor's chunks, in the
// order of chunks whatever the threads. With out null f gets null.
template <int kSums, class Tensor, class F>
void sum_chunks(const Tensor* tensors, int64_t count, int threads, double* out, int64_t indices,
                const F& f) {
  int64_t chunks = 0;
  for (int64_t t = 0; out != nullptr && t < count; ++t) {
    chunks += (tensors[t].numel + kElementsPerPiece - 1) / kElementsPerPiece;
  }
  std::vector<double> sums(static_cast<size_t>(kSums * chunks), 0.0);
  for_chunks(tensors, count, kElementsPerPiece, 1, threads,
             [&](const Tensor& tensor, int64_t begin, int64_t end, int64_t chunk) {
    f(tensor, begin, end, out != nullptr ? &sums[kSums * chunk] : nullptr);
  });
  if (out == nullptr) return;
  std::fill(out, out + kSums * indices, 0.0);
  const double* sum = sums.data();
  for (int64_t t = 0; t < count; ++t) {
    for (int64_t i = 0; i < tensors[t].numel; i += kElementsPerPiece, sum += kSums) {
      for (int s = 0; s < kSums; ++s) out[kSums * tensors[t].index + s] += sum[s];
    }
  }
}

}  // namespace

void noise(const NoiseParams& p, int threads) {
  const Kernels& k = kernels();
  sum_chunks<2>(p.tensors, p.count, threads, p.norms, p.indices,
                [&](const NoiseTensor& tensor, int64_t begin, int64_t end, double* norms) {
    k.noise(p, tensor, begin, end, norms);
  });
}

void noise_dot(const NoiseDotParams& p, int threads) {
  const Kernels& k = kernels();
  sum_chunks<1>(p.tensors, p.count, threads, p.result, p.indices,
                [&](const NoiseTensor& tensor, int64_t begin, int64_t end, double* sum) {
    *sum = k.noise_dot(p, tensor, begin, end);
  });
}

void combine(const CombineParams& p, int threads) {
  const Kernels& k = kernels();
  // An element's work grows with the seeds; no chunk is smaller than a block of noise.
  int64_t chunk = std::max<int64_t>(kElementsPerPiece / std::max<int64_t>(p.terms, 1), 1024);
  for_chunks(p.tensors, p.count, chunk, p.terms, threads,
             [&](const NoiseTensor& tensor, int64_t begin, int64_t end, int64_t) {
    k.combine(p, tensor, begin, end);
  });
}

void update(const UpdateParams& p, int threads) {
  const Kernels& k = kernels();
  bool skip = p.found_inf != nullptr && *p.found_inf != 0;
  sum_chunks<2>(p.tensors, skip ? 0 : p.count, threads, p.norms, p.indices,
                [&](const UpdateTensor& tensor, int64_t begin, int64_t end, double* norms) {
    k.update(p, tensor, begin, end, norms);
  });
}

namespace {

template <class Params>
void for_elements(const Params& p, int threads, void (*kernel)(const Params&, int64_t, int64_t)) {
  const int64_t elements = p.bits.rows * p.bits.run;
  parallel_for(elements, kElementsPerPiece, worth(elements, threads),
               [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

}  // namespace

void stochastic_round(const RoundParams& p, int threads) {
  for_elements(p, threads, kernels().stochastic_round);
}

void dropout(const DropoutParams& p, int threads) { for_elements(p, threads, kernels().dropout); }

void regression(const RegressionParams& p, int threads) {
  const Kernels& k = kernels();
  constexpr int64_t kTogether = 64;  // replicas that the kernel takes at a time
  int64_t normals = p.steps * (p.per_sample ? p.samples : 1);
  parallel_for(p.replicas, p.per_sample ? 1 : kTogether, worth(p.replicas * normals, threads),
               [&](int64_t begin, int64_t end) { k.regression(p, begin, end); });
}

}  // namespace cpu
}  // namespace kdkernels
