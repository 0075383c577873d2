// The hot loops of the CPU kernels, for counting their instructions: `instructions CASE` runs one case's set-up
// and then measured(), between whose start and end bench/instructions.py lets callgrind count.
//
// One thread, one ISA level (KDKERNELS_ISA). Prints the elements that the case goes over.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "math/row.h"

using namespace kdkernels;

extern "C" __attribute__((noipa)) void measured(const std::function<void()>* f) {
  (*f)();
  asm volatile("");  // no tail call: callgrind counts until the return
}

namespace {

constexpr int64_t kElements = 1 << 16;

// Numbers of a logit's size, of any dtype; or those of `around` with such numbers added.
struct Buffer {
  Dtype dtype;
  std::vector<double> bytes;
  Buffer(int64_t n, Dtype type, double scale, uint32_t state = 12345,
         const Buffer* around = nullptr)
      : dtype(type), bytes(static_cast<size_t>(n) + 1) {
    for (int64_t i = 0; i < n; ++i) {
      state = state * 1664525u + 1013904223u;
      float x = static_cast<float>(scale * (static_cast<int32_t>(state) * 0x1p-31));
      if (around != nullptr) x += around->value(i);
      if (dtype == Dtype::kFloat32) reinterpret_cast<float*>(bytes.data())[i] = x;
      uint32_t bits;
      std::memcpy(&bits, &x, sizeof bits);
      if (dtype == Dtype::kBFloat16)
        reinterpret_cast<uint16_t*>(bytes.data())[i] = static_cast<uint16_t>(bits >> 16);
    }
  }
  float value(int64_t i) const {
    if (dtype == Dtype::kFloat32) return reinterpret_cast<const float*>(bytes.data())[i];
    uint32_t bits = reinterpret_cast<const uint16_t*>(bytes.data())[i];
    bits <<= 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  }
  void* data() { return bytes.data(); }
};

int run(int64_t elements, const std::function<void()>& f) {
  measured(&f);
  std::printf("%lld\n", static_cast<long long>(elements));
  return 0;
}

// near: the student's logits are some 0.1 from the teacher's.
int loss(math::Divergence divergence, Dtype dtype, int64_t rows, int64_t classes, bool near,
         bool labels = false) {
  const int64_t n = rows * classes;
  Buffer z(n, dtype, 6), row_loss(rows, dtype, 0);
  Buffer t = near ? Buffer(n, dtype, 0.17, 1, &z) : Buffer(n, dtype, 6, 1);
  std::vector<int64_t> label(static_cast<size_t>(rows), 1);
  LossParams p = {};
  p.dtype = dtype;
  p.rows = rows;
  p.classes = p.all_classes = classes;
  p.student_rows.inner = p.gradient_rows.inner = p.teacher_rows[0].inner = classes;
  p.student = p.gradient = z.data();
  p.teacher_data[0] = t.data();
  p.row_loss = row_loss.data();
  p.temperature = 2;
  p.denominator.number = static_cast<double>(rows);
  p.divergence = divergence;
  p.beta = 0.5;
  if (labels) {
    p.labels = label.data();
    p.alpha = 0.5;
    p.temperature = 3;
  }
  return run(n, [&] { cpu::loss(p, 1); });
}

NoiseTensor tensor(void* data) { return {data, data, kElements, 0.1, 0, 3, 0}; }
NoiseSource source(math::Distribution distribution) { return {distribution, 1, 2, 7, nullptr}; }

int noise(Dtype dtype, math::Distribution distribution) {
  Buffer x(kElements, dtype, 1);
  NoiseTensor one = tensor(x.data());
  NoiseParams p = {};
  p.dtype = dtype;
  p.mode = NoiseMode::kAdd;
  p.source = source(distribution);
  p.tensors = &one;
  p.count = p.indices = 1;
  return run(kElements, [&] { cpu::noise(p, 1); });
}

int noise_dot() {
  Buffer x(kElements, Dtype::kFloat32, 1);
  NoiseTensor one = tensor(x.data());
  double result;
  NoiseDotParams p = {};
  p.dtype = Dtype::kFloat32;
  p.source = source(math::Distribution::kNormal);
  p.tensors = &one;
  p.count = p.indices = 1;
  p.result = &result;
  return run(kElements, [&] { cpu::noise_dot(p, 1); });
}

int combine(int64_t terms) {
  Buffer x(kElements, Dtype::kFloat32, 1);
  NoiseTensor one = tensor(x.data());
  std::vector<int64_t> seeds(static_cast<size_t>(terms), 5);
  std::vector<double> coefficients(static_cast<size_t>(terms), 0.1);
  CombineParams p = {};
  p.dtype = Dtype::kFloat32;
  p.source = source(math::Distribution::kNormal);
  p.tensors = &one;
  p.count = 1;
  p.seeds = seeds.data();
  p.coefficients = coefficients.data();
  p.terms = terms;
  return run(kElements, [&] { cpu::combine(p, 1); });
}

int update(math::Update which, Dtype dtype, double std) {
  Buffer param(kElements, dtype, 1), grad(kElements, dtype, 1), first(kElements, dtype, 0.1),
      second(kElements, dtype, 0);
  UpdateTensor one = {};
  one.param = param.data();
  one.grad = grad.data();
  one.first = first.data();
  one.second = which == math::Update::kAdamW ? second.data() : nullptr;
  one.numel = kElements;
  one.step = 5;
  math::UpdateRule rule = {};
  rule.lr = 1e-3;
  rule.std = std;
  rule.momentum = 0.9;
  rule.beta1 = 0.9;
  rule.beta2 = 0.999;
  rule.eps = 1e-8;
  rule.weight_decay = 0.01;
  UpdateParams p = {};
  p.dtype = dtype;
  p.update = which;
  p.source = source(math::Distribution::kNormal);
  p.tensors = &one;
  p.count = p.indices = p.rule_count = 1;
  p.rules = &rule;
  return run(kElements, [&] { cpu::update(p, 1); });
}

int regression() {
  constexpr int64_t kSteps = 4000;
  std::vector<double> x(100, 0.5), y(100, 1.0);
  int64_t seed = 3;
  double theta = 0.5, lr = 0.01, lam = 0.01, sigma = 1, result;
  RegressionParams p = {x.data(), y.data(), 100,  1,      kSteps, false,   &seed,
                        &theta,   &lr,      &lam, &sigma, 0,      &result, nullptr};
  return run(kSteps, [&] { cpu::regression(p, 1); });
}

}  // namespace

int main(int argc, char** argv) {
  using math::Distribution;
  using math::Divergence;
  using math::Update;
  constexpr Dtype kFp32 = Dtype::kFloat32, kBf16 = Dtype::kBFloat16;
  const std::vector<std::pair<std::string, std::function<int()>>> cases = {
      {"forward_kl 32000 fp32",
       [] { return loss(Divergence::kForwardKL, kFp32, 4, 32000, false); }},
      {"forward_kl 32000 bf16",
       [] { return loss(Divergence::kForwardKL, kBf16, 4, 32000, false); }},
      {"forward_kl 32000 fp32 labels",
       [] { return loss(Divergence::kForwardKL, kFp32, 4, 32000, false, true); }},
      {"forward_kl 1000 fp32", [] { return loss(Divergence::kForwardKL, kFp32, 64, 1000, false); }},
      {"forward_kl 10 fp32 labels",
       [] { return loss(Divergence::kForwardKL, kFp32, 6400, 10, false, true); }},
      {"reverse_kl 32000 fp32",
       [] { return loss(Divergence::kReverseKL, kFp32, 4, 32000, false); }},
      {"js 32000 fp32", [] { return loss(Divergence::kJS, kFp32, 4, 32000, false); }},
      {"js 32000 bf16", [] { return loss(Divergence::kJS, kBf16, 4, 32000, false); }},
      {"forward_kl 32000 fp32 near",
       [] { return loss(Divergence::kForwardKL, kFp32, 4, 32000, true); }},
      {"forward_kl 32000 bf16 near",
       [] { return loss(Divergence::kForwardKL, kBf16, 4, 32000, true); }},
      {"forward_kl 1000 bf16 near",
       [] { return loss(Divergence::kForwardKL, kBf16, 64, 1000, true); }},
      {"reverse_kl 10 bf16 near",
       [] { return loss(Divergence::kReverseKL, kBf16, 6400, 10, true); }},
      {"reverse_kl 32000 bf16 near",
       [] { return loss(Divergence::kReverseKL, kBf16, 4, 32000, true); }},
      {"reverse_kl 262144 bf16 near",
       [] { return loss(Divergence::kReverseKL, kBf16, 1, 262144, true); }},
      {"js 32000 fp32 near", [] { return loss(Divergence::kJS, kFp32, 4, 32000, true); }},
      {"js 32000 bf16 near", [] { return loss(Divergence::kJS, kBf16, 4, 32000, true); }},
      {"skew_forward_kl 32000 bf16 near",
       [] { return loss(Divergence::kSkewForwardKL, kBf16, 4, 32000, true); }},
      {"skew_reverse_kl 32000 bf16 near",
       [] { return loss(Divergence::kSkewReverseKL, kBf16, 4, 32000, true); }},
      {"total_variation 32000 bf16 near",
       [] { return loss(Divergence::kTotalVariation, kBf16, 4, 32000, true); }},
      {"noise fp32", [] { return noise(kFp32, Distribution::kNormal); }},
      {"noise bf16", [] { return noise(kBf16, Distribution::kNormal); }},
      {"noise fp32 laplace", [] { return noise(kFp32, Distribution::kLaplace); }},
      {"noise_dot fp32", [] { return noise_dot(); }},
      {"combine 8 fp32", [] { return combine(8); }},
      {"sgd fp32", [] { return update(Update::kSgd, kFp32, 0.1); }},
      {"adamw fp32", [] { return update(Update::kAdamW, kFp32, 0.1); }},
      {"adamw fp32 no noise", [] { return update(Update::kAdamW, kFp32, 0); }},
      {"adamw bf16", [] { return update(Update::kAdamW, kBf16, 0.1); }},
      {"regression", [] { return regression(); }},
  };
  for (const auto& [name, f] : cases) {
    if (argc > 1 && name == argv[1]) return f();
    if (argc == 1) std::puts(name.c_str());
  }
  return argc > 1;
}
