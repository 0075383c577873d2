// All steps of soft-regularised linear regression. Included by one file per ISA level.
#pragma once

#include "cpu/kernels.h"
#include "cpu/noise.h"
#include "math/regression.h"

namespace kdkernels {
namespace cpu {
namespace {

constexpr int kTile = 64;  // replicas or steps whose normals are made together

KD_FN math::NoiseKey replica_key(const RegressionParams& p, int64_t replica, int64_t step) {
  uint64_t seed = static_cast<uint64_t>(p.seed[replica]);
  return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), p.stream,
          static_cast<uint32_t>(step)};
}

inline void record(const RegressionParams& p, int64_t step, int64_t replica, double theta) {
  if (p.trajectory != nullptr) p.trajectory[step * p.replicas + replica] = theta;
}

// One normal per step, many replicas: they lie side by side in vectors.
inline void replicas_together(const RegressionParams& p, math::SampleMeans m, int64_t begin,
                              int n) {
  double theta[kTile], lr[kTile], lam[kTile], sigma[kTile];
  uint32_t seed_low[kTile], seed_high[kTile];
  float eps[kTile];
  for (int j = 0; j < kTile; ++j) {
    int64_t r = begin + (j < n ? j : n - 1);  // unused places repeat the last replica
    math::NoiseKey key = replica_key(p, r, 0);
    seed_low[j] = key.seed_low;
    seed_high[j] = key.seed_high;
    theta[j] = p.theta[r];
    lr[j] = p.lr[r];
    lam[j] = p.lam[r];
    sigma[j] = p.sigma[r];
  }
  for (int j = 0; j < n; ++j) record(p, 0, begin + j, theta[j]);
  for (int64_t step = 0; step < p.steps; ++step) {
    for (int j = 0; j < kTile; ++j) {
      math::NoiseKey key = {seed_low[j], seed_high[j], p.stream, static_cast<uint32_t>(step)};
      eps[j] = math::normal4(key, 0, 0).value[0];
    }
    for (int j = 0; j < kTile; ++j) {
      theta[j] =
          math::regression_step(theta[j], m, sigma[j] * static_cast<double>(eps[j]), lr[j], lam[j]);
    }
    if (p.trajectory != nullptr) {
      for (int j = 0; j < n; ++j) record(p, step + 1, begin + j, theta[j]);
    }
  }
  for (int j = 0; j < n; ++j) p.result[begin + j] = theta[j];
}

// One normal per step, one replica: the normals of several steps lie side by side in vectors, then the steps follow.
inline void one_replica(const RegressionParams& p, math::SampleMeans m, int64_t r) {
  float eps[kTile];
  double theta = p.theta[r];
  record(p, 0, r, theta);
  for (int64_t first = 0; first < p.steps; first += kTile) {
    math::NoiseKey key = replica_key(p, r, first);
    for (int j = 0; j < kTile; ++j) {
      math::NoiseKey at = {key.seed_low, key.seed_high, key.stream,
                           key.step + static_cast<uint32_t>(j)};
      eps[j] = math::normal4(at, 0, 0).value[0];
    }
    for (int64_t step = first; step < p.steps && step < first + kTile; ++step) {
      double e = p.sigma[r] * static_cast<double>(eps[step - first]);
      theta = math::regression_step(theta, m, e, p.lr[r], p.lam[r]);
      record(p, step + 1, r, theta);
    }
  }
  p.result[r] = theta;
}

// One normal per sample and step.
inline void one_replica_per_sample(const RegressionParams& p, int64_t r) {
  double theta = p.theta[r], sigma = p.sigma[r];
  record(p, 0, r, theta);
  for (int64_t step = 0; step < p.steps; ++step) {
    double sum_xx = 0, sum_xy = 0;
    for_numbers(noise_stream(math::Distribution::kNormal, replica_key(p, r, step)), 0, 0, p.samples,
                p.x, [&](int64_t first, int n, const float* eps) KD_INLINE_LAMBDA {
      double xx = 0, xy = 0;
#pragma omp simd reduction(+ : xx, xy)
      for (int j = 0; j < n; ++j) {
        double x = math::fma(sigma, static_cast<double>(eps[j]), p.x[first + j]);
        xx += x * x;
        xy += x * p.y[first + j];
      }
      sum_xx += xx;
      sum_xy += xy;
    });
    double count = static_cast<double>(p.samples);
    theta = math::regression_step(theta, sum_xx / count, sum_xy / count, p.lr[r], p.lam[r]);
    record(p, step + 1, r, theta);
  }
  p.result[r] = theta;
}

void regression(const RegressionParams& p, int64_t begin, int64_t end) {
  if (p.per_sample) {
    for (int64_t r = begin; r < end; ++r) one_replica_per_sample(p, r);
    return;
  }
  math::SampleMeans m = {0, 0, 0, 0};
  for (int64_t i = 0; i < p.samples; ++i) {
    m.x += p.x[i];
    m.y += p.y[i];
    m.xx += p.x[i] * p.x[i];
    m.xy += p.x[i] * p.y[i];
  }
  double count = static_cast<double>(p.samples);
  m = {m.x / count, m.y / count, m.xx / count, m.xy / count};
  constexpr int kFewReplicas = 4;  // with fewer, a tile would be mostly padding
  for (int64_t r = begin; r < end;) {
    int n = static_cast<int>(end - r < kTile ? end - r : kTile);
    if (n < kFewReplicas) {
      for (int j = 0; j < n; ++j) one_replica(p, m, r + j);
    } else {
      replicas_together(p, m, r, n);
    }
    r += n;
  }
}

}  // namespace
}  // namespace cpu
}  // namespace kdkernels
