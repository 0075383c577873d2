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

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#define KD_HAS_FMA
#define KD_VECTOR_BYTES 64
#define KD_ISA avx512
#include "cpu/isa.h"
#endif
