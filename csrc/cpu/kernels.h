// The CPU kernels, as the ops call them. Each runs at the best ISA level of the machine, or at the one
// that the environment variable KDKERNELS_ISA names.
#pragma once

#include <string>
#include <vector>

#include "params.h"

namespace kdkernels {
namespace cpu {

// One ISA level's kernels; the same source compiled for that level.
struct Kernels {
  const char* isa;
  // Rows [begin, end); row_loss is fp64 [rows].
  void (*loss_rows)(const LossParams&, int64_t begin, int64_t end, double* row_loss);
  // Elements [begin, end) of one run; norms: [2], added to, or null.
  void (*noise)(const NoiseParams&, const NoiseTensor&, int64_t begin, int64_t end, double* norms);
  double (*noise_dot)(const NoiseDotParams&, const NoiseTensor&, int64_t begin, int64_t end);
  void (*combine)(const CombineParams&, const NoiseTensor&, int64_t begin, int64_t end);
  void (*update)(const UpdateParams&, const UpdateTensor&, int64_t begin, int64_t end,
                 double* norms);
  // Elements [begin, end).
  void (*stochastic_round)(const RoundParams&, int64_t begin, int64_t end);
  void (*dropout)(const DropoutParams&, int64_t begin, int64_t end);
  // Replicas [begin, end).
  void (*regression)(const RegressionParams&, int64_t begin, int64_t end);
  // y[i] = f(x[i]) for a function of math/elementary.h, or of math/distribution.h with x's bits as words, for
  // tests. False if there is none of that name.
  bool (*elementary)(const char* f, const float* x, float* y, int64_t n);
};

// The level in use. Throws std::invalid_argument if KDKERNELS_ISA names none, or one this machine lacks.
const Kernels& kernels();
std::vector<std::string> isa_compiled();
std::vector<std::string> isa_supported();
// Changes the level in use; the same errors.
void set_isa(const std::string& name);

// `threads` bounds the threads of a call; results do not depend on it.
void loss(const LossParams& params, int threads);
void noise(const NoiseParams& params, int threads);
void noise_dot(const NoiseDotParams& params, int threads);
void combine(const CombineParams& params, int threads);
void update(const UpdateParams& params, int threads);
void stochastic_round(const RoundParams& params, int threads);
void dropout(const DropoutParams& params, int threads);
void regression(const RegressionParams& params, int threads);

}  // namespace cpu
}  // namespace kdkernels
