// Which kernel runs, and with what launch: pure functions of sizes and of the device, without a CUDA header,
// so that a launcher, the tests and the emulator all read the same table.
#pragma once

#include <algorithm>
#include <cstdint>

namespace kdkernels {
namespace cuda {

// What plans depend on; device_of() in device.cuh asks the CUDA runtime for it.
struct Device {
  int arch;  // 10 * major + minor compute capability: 75, 80, 86, 89, 90, 100, 120
  int sms;
  int shared_per_block;  // bytes that a block may opt in to
  int shared_per_sm;
};

// ---- distillation -------------------------------------------------------------------------------
//
//   walk    classes                        a row belongs to       its logits wait in
//   tile    up to 512                      1 to 32 lanes          registers, staged through shared memory
//   warp    up to 1024, 16 and 32 bits,    a warp                 registers
//           both KLs
//   held    as long as the row fits        a block or a cluster   shared memory
//   stream  beyond                         a block                global memory: read twice
//
// tile: rows this short rarely start at 16 bytes, but a run of them is one flat span. 16 elements a lane
//   keep what is done once a row and lane (5 shuffles a value, 2 logarithms) below the work on its elements.
// warp: 32 elements a lane is what registers hold; no barrier. fp64 would need twice the registers.
// held: a cluster (sm_90 on) splits rows until 3 blocks fit an SM, so that one's loads hide behind the
//   others' arithmetic; where none does that, it takes the split with most blocks an SM.
//   Threads: the fewest that still make 16 warps an SM, because each thread adds to the row's reduction.
// stream: 256 threads, 2 blocks an SM at up to 128 registers, whose loads are 16 KB at a time.
enum class Walk { kTile, kWarp, kHeld, kStream };

// What a kernel does beside the loss and gradient of logits as they are. Each adds to the last.
enum class Extra {
  kNothing,
  kStatistics,
  kTransforms,  // of scaled or capped logits, or of probabilities: it keeps them in the compute type, as they are compared
};

constexpr int kTileClasses = 512, kTileElements = 2048, kTileThreads = 128, kTileLaneElements = 16;
constexpr int kWarpClasses = 1024, kWarpThreads = 128;
constexpr int kStreamThreads = 256, kMaxCluster = 8;
constexpr int kEdges =
    16;  // slots of one element: up to 8 before a row's first 16 bytes, up to 8 after
constexpr int kBusyThreads = 512;  // an SM
constexpr int kRowStatic = 2048;  // bytes of static shared memory, at most
constexpr int kBlockReserve = 1024 + kRowStatic;  // CUDA takes 1 KB of each block
// Blocks or clusters of a launch; each block leaves one partial sum of the loss, which one block adds quickly.
constexpr int64_t kMaxPartials = 16384;

struct DistillationPlan {
  Walk walk;
  int threads;  // a block
  int lanes;  // that share a row within a block
  int rows;  // a block works on at a time
  int cluster;  // blocks that share a row
  int slots;  // held: 16-byte slots per thread, each for the student's and the teacher's logits
  int shared;  // bytes of dynamic shared memory a block

  // Blocks of the launch divided by `cluster`; they stride over the rows.
  int64_t partials(int64_t total_rows) const {
    int64_t wanted = (total_rows + rows - 1) / rows;
    return wanted < kMaxPartials ? wanted : kMaxPartials;
  }
};

// What ptxas is held to for `held`: registers per thread, of an SM's 65536, and threads per block. Rows that wait in the compute
// type take so much shared memory that few threads share an SM.
constexpr int held_registers(int element_size, Extra extra, bool third_sweep) {
  const bool many = extra == Extra::kTransforms || (extra == Extra::kStatistics && third_sweep);
  return element_size == 8 || many ? 128 : 64;
}
constexpr int held_max_threads(int element_size) { return element_size == 8 ? 256 : 512; }

// Blocks that an SM holds, whatever they take. CUDA C++ Programming Guide, "Technical specifications".
constexpr int blocks_limit(int arch) {
  return arch == 75 || arch == 86 ? 16 : arch == 89 || arch == 120 ? 24 : 32;
}

// One launch of `held` if a block of it fits the device; slots is 0 if not.
inline DistillationPlan held_plan(int64_t classes, int element_size, Extra extra, bool third_sweep,
                                  int cluster, const Device& device, int& blocks_per_sm) {
  const int registers = held_registers(element_size, extra, third_sweep);
  const int planes = extra == Extra::kTransforms && element_size == 2 ? 2 : 1;
  int64_t vectors = classes / (16 / element_size) + 1;  // Span::body at most
  int64_t share = (vectors + cluster - 1) / cluster;
  share += share % 2;  // whole sectors of 32 bytes
  for (int threads = 32;; threads *= 2) {
    int64_t slots = (share + threads - 1) / threads;
    int64_t shared = (slots * threads + kEdges) * 2 * 16 * planes;
    int resident = 65536 / registers;  // threads an SM
    int most = std::min(resident / threads, blocks_limit(device.arch));
    blocks_per_sm = 0;
    if (shared + kBlockReserve <= device.shared_per_block) {
      blocks_per_sm =
          std::min(most, device.shared_per_sm / static_cast<int>(shared + kBlockReserve));
    }
    if (blocks_per_sm * threads >= std::min(resident, kBusyThreads) ||
        threads == held_max_threads(element_size)) {
      bool fits = blocks_per_sm > 0;
      return {Walk::kHeld,
              threads,
              threads,
              1,
              cluster,
              fits ? static_cast<int>(slots) : 0,
              fits ? static_cast<int>(shared) : 0};
    }
  }
}

// third_sweep: a row is gone over three times, for which registers cannot hold 32 elements a lane.
inline DistillationPlan plan_distillation(int64_t classes, int element_size, Extra extra,
                                          const Device& device, bool third_sweep) {
  if (classes <= kTileClasses) {
    int lanes = 1;
    while (classes > static_cast<int64_t>(lanes) * kTileLaneElements) lanes *= 2;
    int rows = kTileThreads / lanes;
    int rounds = kTileElements / (rows * static_cast<int>(classes));
    return {Walk::kTile, kTileThreads, lanes, rows * rounds, 1, 0, 0};
  }
  if (classes <= kWarpClasses && element_size < 8 && !third_sweep)
    return {Walk::kWarp, kWarpThreads, 32, kWarpThreads / 32, 1, 0, 0};

  DistillationPlan best = {Walk::kStream, kStreamThreads, kStreamThreads, 1, 1, 0, 0};
  int most = 0;
  for (int cluster = 1; cluster <= (device.arch >= 90 ? kMaxCluster : 1); cluster *= 2) {
    int blocks = 0;
    DistillationPlan plan =
        held_plan(classes, element_size, extra, third_sweep, cluster, device, blocks);
    if (blocks > most) {
      best = plan;
      most = blocks;
    }
    if (most >= 3) break;
  }
  return best;
}

// ---- any divergence -----------------------------------------------------------------------------
//
// A row has one block, which goes over it once a pass of math/row.h. What the passes read waits in shared
// memory: the logits as they are, or `transformed`, of the compute type, with one more row
// to bring them in. A row that fits is read from global memory once; of a longer one each pass brings in one
// chunk after the other, of 24 KB so that 3 blocks fit the SMs of every device and one's loads hide behind the
// others' arithmetic, mostly from L2.
// Threads: the fewest that make kDivergenceBusy an SM, whose long chains of dependent instructions want many
// warps; with at least kDivergenceWork classes each, because each adds to the reductions, one per pass. A short row
// has a warp.
constexpr int kDivergenceBusy = 1024, kDivergenceWork = 16;
// With a register each of 65536 for 128 of them; fp64 needs up to 255.
constexpr int divergence_threads(int element_size) { return element_size == 8 ? 256 : 512; }
constexpr int kChunkBytes = 24 * 1024;
constexpr int kDivergenceStatic = 3328;  // bytes of static shared memory, at most

// Entries of a row in whole groups: see HeldClasses in divergence.cuh.
constexpr int64_t padded_entries(int64_t entries) { return (entries + 3) / 4 * 4; }

struct DivergencePlan {
  int threads;
  int capacity;  // classes of a chunk, a multiple of 16 bytes of them
  int shared;  // bytes of dynamic shared memory
};

// Bytes of shared memory a class; `sides`: rows of logits that are brought in, 0 to 2.
constexpr int divergence_class_bytes(int element_size, bool transformed, int sides) {
  int acc = element_size == 8 ? 8 : 4;
  return sides == 0 ? 0 : transformed ? sides * acc + element_size : sides * element_size;
}

inline DivergencePlan plan_divergence(int64_t classes, int64_t entries, int element_size,
                                      bool transformed, int sides, const Device& device) {
  const int acc = element_size == 8 ? 8 : 4, group = 16 / element_size;
  const int a_class = divergence_class_bytes(element_size, transformed, sides);
  // An entry is a column and two logits; images of rows start at any element of 16 bytes.
  const int64_t fixed = padded_entries(entries) * (2 * acc + 8) + 16 * (sides + transformed);
  const int64_t whole = (classes + group - 1) / group * group;
  const int64_t work = std::max(classes, entries);
  const int reserve = 1024 + kDivergenceStatic;  // CUDA takes 1 KB of each block
  int64_t capacity = sides == 0 ? 0 : whole;
  if (fixed + capacity * a_class + reserve > device.shared_per_block)
    capacity = kChunkBytes / a_class / group * group;
  const int shared = static_cast<int>(fixed + capacity * a_class);
  int threads = 32;
  while (threads < divergence_threads(element_size) && threads * int64_t{kDivergenceWork} < work &&
         device.shared_per_sm / (shared + reserve) * threads < kDivergenceBusy) {
    threads *= 2;
  }
  return {threads, static_cast<int>(capacity), shared};
}

// ---- noise --------------------------------------------------------------------------------------
//
// 64 registers hold two groups of elements at work, so 4 blocks of 256 threads live on an SM of every chip. A
// block has one chunk of one tensor. Chunks are as long as gives every place for a block the same number of
// equal ones; up to 32 steps, so that blocks read near each other, and what a chunk starts with (the tensor, the
// first rounds of Philox) is a hundredth of it. A loop over chunks would cost more than starting a block: the
// keys of Philox's rounds then no longer stay in uniform registers.
constexpr int kNoiseThreads = 256, kNoiseBlocksPerSm = 4, kNoiseMaxSteps = 32;
// An optimizer's step holds a group of each of up to four arrays: 16 bits want 80 registers, fp64 128.
constexpr int update_blocks_per_sm(int element_size) {
  return element_size == 8 ? 2 : element_size == 2 ? 3 : kNoiseBlocksPerSm;
}
// A sum of noises holds the keys of Philox's rounds, and so do rows with seeds of their own beside the pattern of stds.
constexpr int kCombineBlocksPerSm = 3, kRowsBlocksPerSm = 3;
// A sum has the same bits on every device: its grid does not depend on one. 4096 partial sums are added by one
// block, and are 8 rounds of the blocks that live on an H100.
constexpr int kSumBlocks = 4096;
// Runs of a launch at most: what a kernel's arguments hold, the classic 4 KB or the 32 KB of CUDA 12.1 on.
constexpr int kFewNoiseRuns = 64, kNoiseRuns = 576;

// Elements that a thread makes in a step: 16 bytes of them, and at least the 4 of a Philox counter.
constexpr int noise_group(int element_size) { return element_size == 2 ? 8 : 4; }

struct NoisePlan {
  int blocks;  // for one tensor; each further one of a list adds at most one
  int steps;  // a chunk; a step is kNoiseThreads groups
};

inline NoisePlan noise_chunks(int64_t steps, int64_t each) {
  return {static_cast<int>((steps + each - 1) / each), static_cast<int>(each)};
}

// `steps` in all tensors of the launch together.
inline NoisePlan plan_noise(int64_t steps, int blocks_per_sm, const Device& device) {
  int64_t places = static_cast<int64_t>(device.sms) * blocks_per_sm;
  int64_t rounds = (steps + places * kNoiseMaxSteps - 1) / (places * kNoiseMaxSteps);
  return noise_chunks(steps, steps == 0 ? 1 : (steps + places * rounds - 1) / (places * rounds));
}

inline NoisePlan plan_sums(int64_t steps) {
  return noise_chunks(steps, steps == 0 ? 1 : (steps + kSumBlocks - 1) / kSumBlocks);
}

// ---- regression ---------------------------------------------------------------------------------
//
// One normal a step: a warp a replica makes the normals of 32 steps at once and is then bound by the 5 fp64
// operations that a step waits for, about 90 clocks; a thread a replica waits for its normal in every step,
// about 450, but does not repeat those operations in 32 lanes. So a thread wins where an SM has more replicas
// than pay for that: 450 clocks hold 115 steps of a warp at 64 fp64 operations per clock and SM, and 6 at the
// 2 of consumer chips.
// One normal a sample and step: always a warp. The grid is what lives on the device; it strides over replicas.
constexpr int kRegressionThreads = 256, kRegressionWarps = kRegressionThreads / 32;
constexpr int kRegressionBlocksPerSm = 2;  // up to 128 registers
// Samples that a warp keeps in registers, for the two variants that do: 4 and 12 a lane.
constexpr int kRegressionFewSamples = 128, kRegressionSamples = 384;

struct RegressionPlan {
  bool warp;  // a warp a replica, else a thread
  int blocks;
};

inline RegressionPlan plan_regression(int64_t replicas, bool per_sample, const Device& device) {
  bool fast_fp64 = device.arch == 80 || device.arch == 90 || device.arch == 100;
  bool warp = per_sample || replicas <= int64_t{device.sms} * (fast_fp64 ? 112 : 6);
  int64_t a_block = warp ? kRegressionWarps : kRegressionThreads;
  int64_t wanted = (replicas + a_block - 1) / a_block;
  int64_t most = int64_t{device.sms} * kRegressionBlocksPerSm;
  return {warp, static_cast<int>(wanted < most ? wanted : most)};
}

}  // namespace cuda
}  // namespace kdkernels
