#if defined(__x86_64__)
#include <cmath>
#include <cstdlib>
#include <limits>

#include "cpu/kernels.h"

#pragma GCC target("avx2,fma,f16c")
#define KD_HAS_FMA
#define KD_ISA avx2
#include "cpu/isa.h"
#endif
