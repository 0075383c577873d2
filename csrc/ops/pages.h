// Fresh memory for large tensors.
#pragma once

#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/Tensor.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>

namespace kdkernels {

// Returns `x`, whose memory is not written yet, with 2 MB huge pages requested with madvise. The first write to a page
// is a fault: for 64 MB in pages of 4 KB these take about 20 ms, more than a loss of that size; in huge pages a fourth.
inline at::Tensor in_huge_pages(at::Tensor x) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 2 << 20;
  if (x.is_cpu() && !at::isTensorSubclassLike(x) && x.nbytes() >= 2 * kPage) {
    uintptr_t begin = reinterpret_cast<uintptr_t>(x.mutable_data_ptr()), end = begin + x.nbytes();
    begin = (begin + kPage - 1) / kPage * kPage;
    end = end / kPage * kPage;
    // The result does not matter: a system without huge pages refuses the advice.
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#endif
  return x;
}

}  // namespace kdkernels
