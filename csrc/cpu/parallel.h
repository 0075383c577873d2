// A loop shared among OpenMP threads: the ones PyTorch itself uses, since both load one runtime.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>

namespace kdkernels {
namespace cpu {

// f(begin, end) over [0, n), in contiguous parts of at least `grain`, on at most `threads` threads.
// f must not throw.
template <class F>
void parallel_for(int64_t n, int64_t grain, int threads, const F& f) {
  int64_t parts = std::min<int64_t>(threads, n / std::max<int64_t>(grain, 1));
  if (parts <= 1 || omp_in_parallel()) {
    if (n > 0) f(0, n);
    return;
  }
#pragma omp parallel num_threads(static_cast<int>(parts))
  {
    int64_t count = omp_get_num_threads(), part = omp_get_thread_num();
    f(n * part / count, n * (part + 1) / count);
  }
}

}  // namespace cpu
}  // namespace kdkernels
