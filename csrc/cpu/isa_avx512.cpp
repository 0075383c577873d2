#if defined(__x86_64__)
#include <cmath>
#include <cstdlib>
#include <limits>

#include "cpu/kernels.h"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#define KD_HAS_FMA
#define KD_ISA avx512
#include "cpu/isa.h"
#endif
