// The matrix products of a linear head, a chunk of rows at a time.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace kdkernels {

// The dtype that hidden states, heads and the logits' gradients are multiplied in. CPUs multiply 16 bits in fp32, a
// block of the head at a time, unless they have instructions for it: torch has no fast product for those.
at::ScalarType product_type(const at::Tensor& hidden);

// How the rows are cut into chunks. A row of a chunk takes `pitch` elements of each of its buffers.
struct ChunkPlan {
  int64_t rows, pitch;
};
// Of `kept` rows, those that count, of `classes` logits each, which take `bytes` of a chunk's memory apiece. budget:
// bytes of a chunk; all_logits: bytes of the logits that would be stored without chunks, for the default budget.
ChunkPlan plan_chunks(int64_t kept, int64_t classes, int64_t bytes, double all_logits,
                      std::optional<int64_t> budget, bool cuda);

// One side's head.
class Head {
 public:
  Head(const at::Tensor& weight, const std::optional<at::Tensor>& bias, at::ScalarType product);

  // logits [n, V] = hidden [n, H] @ weight^T + bias. In fp32 for 16 bits, and none is rounded.
  void logits(const at::Tensor& hidden, const at::Tensor& out);
  // grad_hidden [n, H] = alpha * gradient [n, V] @ weight
  void hidden_gradient(const at::Tensor& gradient, double alpha, const at::Tensor& grad_hidden);
  // grad_weight [V, H] = beta * grad_weight + alpha * gradient^T [V, n] @ hidden [n, H]
  void weight_gradient(const at::Tensor& gradient, const at::Tensor& hidden, double beta,
                       double alpha, const at::Tensor& grad_weight);
  // grad_bias [V] += alpha * sum of gradient [n, V] over rows
  void bias_gradient(const at::Tensor& gradient, double alpha, const at::Tensor& grad_bias);

 private:
  // Classes that are multiplied at a time in a dtype.
  int64_t block_of(at::ScalarType type) const;
  // f(first class, their rows of the weight in a dtype) for each block.
  template <class F>
  void each_block(at::ScalarType type, F f);

  at::Tensor weight_, bias_, widened_;
  at::ScalarType product_;
};

}  // namespace kdkernels
