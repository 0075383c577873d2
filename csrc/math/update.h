// One optimizer step of one element, with noise: SGD, AdamW (Loshchilov and Hutter, arXiv 1711.05101), Langevin
// dynamics (SGLD: Welling and Teh, ICML 2011) and its RMSprop-preconditioned form (pSGLD: Li et al.,
// arXiv 1512.07666, without the curvature term Gamma, as there).
//
// SGD and AdamW are torch.optim's on the gradient g + std * eps. The Langevin updates draw from the density
// exp(-U / temperature), U = num_data * loss + weight_decay / 2 * |theta|^2, with lr the step size epsilon of
// the papers:
//
//   SGLD   theta <- theta - lr / 2 * dU + sqrt(lr * temperature) * eps
//   pSGLD  V <- beta2 V + (1 - beta2) g^2, G = 1 / (eps + sqrt(V)), and lr * G in place of lr
#pragma once

#include "math/elementary.h"

namespace kdkernels {
namespace math {

enum class Update { kSgd, kAdamW, kSgld, kPsgld };

// Which moments an update has; SGD's only with momentum.
KD_FN constexpr bool has_first(Update u) { return u == Update::kSgd || u == Update::kAdamW; }
KD_FN constexpr bool has_second(Update u) { return u == Update::kAdamW || u == Update::kPsgld; }

// The numbers of a parameter group; an update reads those named after it.
struct UpdateRule {
  double lr, std, weight_decay;
  double momentum, dampening;  // SGD
  double beta1, beta2, eps;  // AdamW; pSGLD has beta2 and eps
  double num_data, temperature;  // SGLD and pSGLD, which do not read std
  bool nesterov, maximize;
  bool stochastic_rounding;  // of parameters and moments of 16 bits
};

// What the elements of one tensor share, computed in fp64 and rounded once.
template <class Real>
struct UpdateNumbers {
  Real std;  // noise's factor
  Real sign;  // -1 to maximize
  Real lr;  // AdamW: over the first bias correction; Langevin: half
  Real weight_decay;  // AdamW: 1 - lr * weight_decay
  // Factors of the old and the new part: of the first and the second moment, and of what SGD follows, the gradient
  // and the momentum buffer. Factors in place of conditions keep a CPU's loop in vectors.
  Real keep1, take1, keep2, take2;
  Real lerp;  // AdamW: 1 if the first moment moves by a part of its distance to the gradient
  Real root, eps;  // AdamW: 1 / sqrt(second bias correction)
  Real num_data;
  bool stochastic_rounding;
};

KD_FN double power(double x, uint64_t n) {
  double y = 1;
  for (; n > 0; n >>= 1, x *= x) y = (n & 1) != 0 ? y * x : y;
  return y;
}

// step: 1 at a tensor's first update.
template <class Real>
KD_FN UpdateNumbers<Real> update_numbers(Update update, const UpdateRule& r, double lr, double std,
                                         uint64_t step) {
  UpdateNumbers<Real> n = {};
  n.sign = static_cast<Real>(r.maximize ? -1 : 1);
  n.std = static_cast<Real>(std);
  n.lr = static_cast<Real>(lr);
  n.weight_decay = static_cast<Real>(r.weight_decay);
  n.stochastic_rounding = r.stochastic_rounding;
  if (update == Update::kSgd) {
    bool first = step == 1 || r.momentum == 0;
    n.keep1 = static_cast<Real>(step == 1 ? 0 : r.momentum);
    n.take1 = static_cast<Real>(first ? 1 : 1 - r.dampening);
    n.keep2 = static_cast<Real>(r.nesterov ? 1 : 0);
    n.take2 = static_cast<Real>(r.nesterov ? r.momentum : 1);
  } else if (update == Update::kAdamW) {
    n.lr = static_cast<Real>(lr / (1 - power(r.beta1, step)));
    n.weight_decay = static_cast<Real>(1 - lr * r.weight_decay);
    // As torch: what differs least from the old moment, or for a small beta1 from the gradient.
    bool lerp = r.beta1 > 0.5;
    n.lerp = static_cast<Real>(lerp ? 1 : 0);
    n.keep1 = static_cast<Real>(lerp ? 1 : r.beta1);
    n.take1 = static_cast<Real>(1 - r.beta1);
    n.keep2 = static_cast<Real>(r.beta2);
    n.take2 = static_cast<Real>(1 - r.beta2);
    n.root = static_cast<Real>(1 / sqrt(1 - power(r.beta2, step)));
    n.eps = static_cast<Real>(r.eps);
  } else {
    n.std = static_cast<Real>(sqrt(lr * r.temperature));
    n.lr = static_cast<Real>(lr / 2);
    n.num_data = static_cast<Real>(r.num_data);
    n.keep2 = static_cast<Real>(r.beta2);
    n.take2 = static_cast<Real>(1 - r.beta2);
    n.eps = static_cast<Real>(r.eps);
  }
  return n;
}

// What noise and gradient contribute: to the gradient, or for Langevin updates to the parameter.
template <class Real>
struct UpdateShares {
  Real noise, gradient;
};

// `first`: SGD's momentum buffer, AdamW's first moment; `second`: AdamW's and pSGLD's second moment.
template <Update kUpdate, class Real>
KD_FN UpdateShares<Real> update_element(const UpdateNumbers<Real>& n, Real eps, Real gradient,
                                        Real& param, Real& first, Real& second) {
  UpdateShares<Real> shares;
  shares.noise = n.std * eps;
  shares.gradient = gradient;
  if constexpr (kUpdate == Update::kSgd) {
    Real g = n.sign * fma(n.std, eps, gradient);
    g = fma(n.weight_decay, param, g);
    first = fma(n.keep1, first, n.take1 * g);
    g = fma(n.take2, first, n.keep2 * g);
    param = fma(-n.lr, g, param);
  } else if constexpr (kUpdate == Update::kAdamW) {
    Real g = n.sign * fma(n.std, eps, gradient);
    first = fma(n.take1, fma(-n.lerp, first, g), n.keep1 * first);
    second = fma(n.take2 * g, g, n.keep2 * second);
    Real denominator = fma(sqrt(second), n.root, n.eps);
    param = fma(-n.lr, first / denominator, param * n.weight_decay);
  } else {
    Real preconditioner = 1, root = 1;
    if constexpr (kUpdate == Update::kPsgld) {
      second = fma(n.take2 * gradient, gradient, n.keep2 * second);
      preconditioner = 1 / (n.eps + sqrt(second));
      root = sqrt(preconditioner);
    }
    Real slope = fma(n.weight_decay, param, n.sign * n.num_data * gradient);
    shares.gradient = n.lr * preconditioner * slope;
    shares.noise = n.std * root * eps;
    param = (param - shares.gradient) + shares.noise;
  }
  return shares;
}

}  // namespace math
}  // namespace kdkernels
