// A loop shared among OpenMP threads. They are PyTorch's, since both load one runtime.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace kdkernels {
namespace cpu {

// Whether this thread is in a forked process. libgomp's other threads stayed in the parent, and a team would wait for
// them for ever.
extern thread_local bool forked;

// Calls f(begin, end) over [0, n) on at most `threads` threads, in pieces that begin at multiples of `piece`. Each
// thread has a contiguous part of the range, as in PyTorch's loops, and then takes pieces of other parts, since rows
// that do not count cost nothing and cores are not all equally free. f must not throw.
template <class F>
void parallel_for(int64_t n, int64_t piece, int threads, const F& f) {
  int64_t pieces = (n + piece - 1) / piece, parts = std::min<int64_t>(threads, pieces);
  if (parts <= 1 || forked || omp_in_parallel()) {
    if (n > 0) f(0, n);
    return;
  }
  struct alignas(64) Part {
    std::atomic<int64_t> next;
  };
  std::vector<Part> taken(static_cast<size_t>(parts));
  // No num_threads(parts): threads that a team leaves out end, and the next larger team has to start them again.
#pragma omp parallel
  {
    int64_t count = std::min<int64_t>(parts, omp_get_num_threads()), thread = omp_get_thread_num();
    for (int64_t i = 0; thread < count && i < count; ++i) {
      int64_t part = (thread + i) % count, first = pieces * part / count;
      int64_t mine = pieces * (part + 1) / count - first, at;
      while ((at = taken[part].next.fetch_add(1, std::memory_order_relaxed)) < mine) {
        int64_t begin = (first + at) * piece;
        f(begin, std::min(begin + piece, n));
      }
    }
  }
}

}  // namespace cpu
}  // namespace kdkernels
