#if defined(__x86_64__)
// The standard library's headers come first, so that its code is compiled for every machine; ours all
// come after the target is set.
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#pragma GCC target("avx2,fma,f16c")
#define KD_HAS_FMA
#define KD_VECTOR_BYTES 32
#define KD_ISA avx2
#include "cpu/isa.h"
#endif
