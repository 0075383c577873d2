// The rows of hidden states that a linear head multiplies: those that count.
#pragma once

#include <vector>

#include "ops/loss.h"

namespace kdkernels {

// Rows that count. Those that do not are not touched, whatever they hold: where the host can tell them apart they are
// left out; on CUDA, where that would wait for the device, their hidden states are read as 0.
struct KeptRows {
  int64_t count;
  at::Tensor index;  // [count], int64, on the rows' device; undefined: all rows, as they lie
  at::Tensor keep;  // [all, 1], bool: rows of them that count; undefined: all
  size_t teacher = 0;

  // Rows [from, from + n) of x.
  at::Tensor of(const at::Tensor& x, int64_t from, int64_t n) const;
  RowTensors of(RowTensors x, int64_t from, int64_t n) const;
  // The same of hidden states, in a dtype, without what rows hold that do not count.
  at::Tensor hidden(const at::Tensor& x, int64_t from, int64_t n, at::ScalarType type) const;
  // Rows [from, from + n) of values as they are, x [n, ...], with `other` in those that do not count.
  at::Tensor kept_or(const at::Tensor& x, int64_t from, double other) const;
  // Writes such rows, along `dim`.
  void put(const at::Tensor& x, int64_t dim, int64_t from, const at::Tensor& rows) const;
};

// All rows of a call.
struct RowGroups {
  std::vector<KeptRows> groups;  // one, or one per teacher
  double divisor;  // of the mean, as far as the host knows it
  at::Tensor
      factor;  // [], of the loss and its gradients, where only the device knows it; undefined: none
};

// The tensors of rows with one dimension for all rows; labels and indices as they are, numbers in acc.
RowTensors flat_rows(RowTensors rows, int64_t all, at::ScalarType acc);

// rows: flat ones. teacher_index: [all], on the CPU, or undefined; teachers: how many it takes. like: hidden states.
RowGroups kept_rows(const RowTensors& rows, const LossOptions& options, const at::Tensor& like,
                    int64_t all, const at::Tensor& teacher_index, size_t teachers);

}  // namespace kdkernels
