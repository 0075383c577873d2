// Fresh memory for large tensors.
#pragma once

#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/Tensor.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>

namespace kdkernels {

// `x`, of memory not yet written. A fresh page costs its first writer a fault, for 64 MB in pages of 4 KB some 20 ms,
// more than a loss of that size takes; in pages of 2 MB, which Linux gives to who asks, it is a fourth of that.
inline at::Tensor in_huge_pages(at::Tensor x) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 2 << 20;
  if (x.is_cpu() && !at::isTensorSubclassLike(x) && x.nbytes() >= 2 * kPage) {
    uintptr_t begin = reinterpret_cast<uintptr_t>(x.mutable_data_ptr()), end = begin + x.nbytes();
    begin = (begin + kPage - 1) / kPage * kPage;
    end = end / kPage * kPage;
    // An advice: a system without such pages refuses it.
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#endif
  return x;
}

}  // namespace kdkernels
