// One step of soft-regularised linear regression y ~ theta x with input noise e and weight decay lambda:
//
//   gradient = mean_i 2 (theta (x_i + e_i) - y_i) (x_i + e_i)
//   theta   <- theta - lr (gradient + lambda theta)
//
// Both means of the gradient, E[(x + e)^2] and E[(x + e) y], are all that a step needs of the samples.
// With one e for every sample they follow from four moments, so a step costs O(1).
#pragma once

#include "math/normal.h"

namespace kdkernels {
namespace math {

struct SampleMeans {
  double x, y, xx, xy;  // means over the samples
};

KD_FN double regression_step(double theta, double mean_xx, double mean_xy, double lr, double lam) {
  double gradient = 2.0 * fma(theta, mean_xx, -mean_xy);
  return theta - lr * fma(lam, theta, gradient);
}

// E[(x + e)^2] and E[(x + e) y] for one e.
struct NoisyMeans {
  double xx, xy;
};

KD_FN NoisyMeans noisy_means(SampleMeans m, double e) {
  return {fma(e, fma(2.0, m.x, e), m.xx), fma(e, m.y, m.xy)};
}

KD_FN double regression_step(double theta, SampleMeans m, double e, double lr, double lam) {
  NoisyMeans means = noisy_means(m, e);
  return regression_step(theta, means.xx, means.xy, lr, lam);
}

}  // namespace math
}  // namespace kdkernels
