// The matrix products of a linear head, a chunk of rows at a time.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace kdkernels {

// The dtype of a chunk's logits. CPUs multiply 16 bits in fp32, a block of the head at a time, unless they have
// instructions for it: torch has no fast product for those.
at::ScalarType work_type(const at::Tensor& hidden);

// One side's head.
class Head {
 public:
  Head(const at::Tensor& weight, const std::optional<at::Tensor>& bias, at::ScalarType work);

  // logits [n, V] = hidden [n, H] @ weight^T + bias
  void logits(const at::Tensor& hidden, const at::Tensor& out);
  // grad_hidden [n, H] = alpha * gradient [n, V] @ weight
  void hidden_gradient(const at::Tensor& gradient, double alpha, const at::Tensor& grad_hidden);
  // grad_weight [V, H] = beta * grad_weight + alpha * gradient^T [V, n] @ hidden [n, H]
  void weight_gradient(const at::Tensor& gradient, const at::Tensor& hidden, double beta,
                       double alpha, const at::Tensor& grad_weight);
  // grad_bias [V] += alpha * sum of gradient [n, V] over rows
  void bias_gradient(const at::Tensor& gradient, double alpha, const at::Tensor& grad_bias);

 private:
  // Rows [from, from + n) of the weight, in the dtype that is multiplied.
  at::Tensor rows(int64_t from, int64_t n);

  at::Tensor weight_, bias_, widened_;
  int64_t classes_, block_;
};

}  // namespace kdkernels
