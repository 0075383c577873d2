// Largest error of functions in csrc/math/elementary.h over fp32 arguments, in units in the last place
// of the correctly rounded result, against fp64 (whose own error is below 1e-8 ulp of fp32). Prints one
// line a function: name, largest error, argument, and a hash of all results. The arguments are every
// `stride`-th bit pattern, stride 1 takes all of them; but one block in 61 is enough where the exponential is 0,
// 1 + x or infinite, and where the logarithm is not finite.
//
//   g++ -O3 -std=c++20 -fopenmp -ffp-contract=off -fno-math-errno -fno-trapping-math -mavx2 -mfma
//       -I csrc tests/elementary_ulp.cpp && ./a.out [functions, comma-separated, or all] [stride]
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "math/elementary.h"

using namespace kdkernels;

namespace {

double sinpi_fp64(double x) {
  double r = std::fmod(x, 2.0);  // exact
  double k = std::nearbyint(2 * r), f = r - 0.5 * k;
  double s = std::sin(M_PI * f), c = std::cos(M_PI * f);
  switch (static_cast<int>(k) & 3) {
    case 0: return s;
    case 1: return c;
    case 2: return -s;
    default: return -c;
  }
}
double cospi_fp64(double x) {
  double r = std::fabs(std::fmod(x, 2.0));
  return sinpi_fp64(r + 0.5);  // exact: r has 24 bits and is below 2
}

// The logarithm from a table of those of [2/3, 4/3), which every exponent shares.
double log_fp64(double x) {
  static const std::vector<double> of_mantissa = [] {
    std::vector<double> table(1 << 23);
    for (int i = 0; i < 1 << 23; ++i) {
      double m = 1 + i * 0x1p-23;
      table[i] = std::log(3 * m < 4 ? m : m / 2);
    }
    return table;
  }();
  if (!(x >= 0x1p-126 && x < INFINITY)) return std::log(x);
  int64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  int mantissa = static_cast<int>(bits >> 29) & 0x7FFFFF, exponent = (bits >> 52) - 1023;
  if (3 * (1 + mantissa * 0x1p-23) >= 4) ++exponent;
  return std::fma(exponent, M_LN2, of_mantissa[mantissa]);
}

// Distance of `got` from `want` in ulps of fp32 at `want`.
double ulp_error(float got, double want) {
  if (std::isnan(want) || std::isnan(got))
    return std::isnan(want) && std::isnan(got) ? 0 : INFINITY;
  float rounded = static_cast<float>(want);
  if (std::isinf(rounded) || std::isinf(got)) return got == rounded ? 0 : INFINITY;
  if (got == want) return 0;
  // want is finite and not 0 here: functions that are exact at their zeros returned above, and an
  // fp64 subnormal is far below half an fp32 one.
  int64_t bits;
  std::memcpy(&bits, &want, sizeof bits);
  int exponent = static_cast<int>((bits >> 52) & 0x7FF) - 1023;  // 2^exponent <= |want|
  bits = static_cast<int64_t>(1023 - std::max(exponent - 23, -149)) << 52;
  double ulps;  // 1 / (an ulp), a power of two
  std::memcpy(&ulps, &bits, sizeof ulps);
  return std::fabs(got - want) * ulps;
}

constexpr int kFlat = 61;

template <class F, class Ref>
void sweep(const char* name, F f, Ref ref, bool (*in_domain)(float), bool (*flat)(float),
           uint64_t stride) {
  double worst = 0;
  float at = 0;
  uint64_t hash = 0;
#pragma omp parallel
  {
    constexpr int kBlock = 1024;
    float x[kBlock], y[kBlock];
    double mine = 0;
    float where = 0;
    uint64_t sum = 0;
#pragma omp for schedule(dynamic, 64)
    for (int64_t block = 0; block < static_cast<int64_t>((1ULL << 32) / stride / kBlock); ++block) {
      for (int i = 0; i < kBlock; ++i) {
        uint32_t bits = static_cast<uint32_t>((block * kBlock + i) * stride);
        std::memcpy(&x[i], &bits, 4);
      }
      if (block % kFlat != 0 && flat(x[0]) && flat(x[kBlock - 1])) continue;
      for (int i = 0; i < kBlock; ++i) y[i] = f(x[i]);
      for (int i = 0; i < kBlock; ++i) {
        if (!in_domain(x[i])) continue;
        double error = ulp_error(y[i], ref(static_cast<double>(x[i])));
        if (error > mine) mine = error, where = x[i];
        uint32_t bits, key;
        std::memcpy(&bits, &y[i], 4);
        std::memcpy(&key, &x[i], 4);
        if (y[i] != y[i]) bits = 0x7FC00000;
        sum += (bits ^ 0x9E3779B97F4A7C15ULL) * (2 * static_cast<uint64_t>(key) + 1);
      }
    }
#pragma omp critical
    {
      if (mine > worst) worst = mine, at = where;
      hash += sum;
    }
  }
  std::printf("%s %.4f %a %016llx\n", name, worst, at, static_cast<unsigned long long>(hash));
  std::fflush(stdout);
}

bool always(float) { return true; }
bool nonpositive(float x) { return !(x > 0); }
bool never(float) { return false; }
bool flat_exp(float x) { return !(std::fabs(x) > 0x1p-20f && std::fabs(x) < 110); }
bool flat_log(float x) { return !(x > 0 && x < INFINITY); }
// Where the exponential of a non-positive argument is not flushed, and NaN.
bool normal_exp2(float x) { return !(x > 0) && !(x < -126.0f); }

}  // namespace

int main(int argc, char** argv) {
  std::string chosen = argc > 1 ? argv[1] : "all";
  uint64_t stride = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  auto run = [&](const std::string& name, auto f, auto ref, bool (*in_domain)(float) = always,
                 bool (*flat)(float) = never) {
    if (chosen != "all" && ("," + chosen + ",").find("," + name + ",") == std::string::npos) return;
    sweep(name.c_str(), f, ref, in_domain, flat, stride);
  };
  using math::sincospi;
  run("exp", [](float x) { return math::exp(x); }, [](double x) { return std::exp(x); }, always,
      flat_exp);
  run("log", [](float x) { return math::log(x); }, log_fp64, always, flat_log);
  run("exp2_nonpositive", [](float x) { return math::exp2_nonpositive(x); },
      [](double x) { return std::exp2(x); }, normal_exp2);
  run("expm1_nonpositive", [](float x) { return math::expm1_nonpositive(x); },
      [](double x) { return std::expm1(x); }, nonpositive);
  run("log1p", [](float x) { return math::log1p(x); }, [](double x) { return std::log1p(x); });
  run("sinpi", [](float x) { return sincospi(x).sin; }, sinpi_fp64);
  run("cospi", [](float x) { return sincospi(x).cos; }, cospi_fp64);
}
