// The kernels of one ISA level. Included once by each isa_*.cpp, which has set the compiler's target and
// KD_ISA, the level's name.
//
// Everything here has internal linkage, so no level's code can stand in for another's at link time; for
// the same reason nothing here may use the standard library's templates.

#include "cpu/bits.h"
#include "cpu/distillation.h"
#include "cpu/divergence.h"
#include "cpu/noise.h"
#include "cpu/regression.h"
#include "cpu/update.h"

namespace kdkernels {
namespace cpu {
namespace {

bool elementary(const char* f, const float* x, float* y, int64_t n) {
#define KD_ELEMENTARY(name, expression) \
  if (__builtin_strcmp(f, name) == 0) { \
    for (int64_t i = 0; i < n; ++i) { \
      y[i] = math::expression; \
    } \
    return true; \
  }
  KD_ELEMENTARY("exp", exp(x[i]))
  KD_ELEMENTARY("exp2_nonpositive", exp2_nonpositive(x[i]))
  KD_ELEMENTARY("log", log(x[i]))
  KD_ELEMENTARY("log1p", log1p(x[i]))
  KD_ELEMENTARY("expm1_nonpositive", expm1_nonpositive(x[i]))
  KD_ELEMENTARY("sinpi", sincospi(x[i]).sin)
  KD_ELEMENTARY("cospi", sincospi(x[i]).cos)
  // Of math/distribution.h, of words whose bits are x's.
  KD_ELEMENTARY("uniform", uniform(static_cast<uint32_t>(math::bits_from_float(x[i]))))
  KD_ELEMENTARY("rademacher", rademacher(static_cast<uint32_t>(math::bits_from_float(x[i]))))
  KD_ELEMENTARY("truncated_normal",
                truncated_normal(static_cast<uint32_t>(math::bits_from_float(x[i]))))
  KD_ELEMENTARY("laplace", laplace(static_cast<uint32_t>(math::bits_from_float(x[i]))))
#undef KD_ELEMENTARY
  return false;
}

}  // namespace

#define KD_JOIN_(a, b) a##b
#define KD_JOIN(a, b) KD_JOIN_(a, b)
#define KD_STRING_(a) #a
#define KD_STRING(a) KD_STRING_(a)
extern const Kernels KD_JOIN(kernels_, KD_ISA);
const Kernels KD_JOIN(kernels_, KD_ISA) = {
    KD_STRING(KD_ISA), loss_rows, noise,      noise_dot, combine, update,
    stochastic_round,  dropout,   regression, elementary};

}  // namespace cpu
}  // namespace kdkernels
