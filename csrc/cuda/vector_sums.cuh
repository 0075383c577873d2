// The first sweep over vectors of a long row: their maxima, and sums of exponentials relative to these.
#pragma once

#include "cuda/row.cuh"

namespace kdkernels {
namespace cuda {
namespace {

// Adds a vector's elements, none above the sums' maxima, to a thread's sums.
template <class Policy, class T, int kCount, class Real>
__device__ __forceinline__ void add(const Task<Real>& task, RowSums<Real>& sums,
                                    const Vector<T, kCount>& z, const Vector<T, kCount>& t) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    Real x = (widen(z.value[j]) - sums.max_s) * task.scale;
    Real y = (widen(t.value[j]) - sums.max_t) * task.scale;
    Real ex = math::exp2_nonpositive(x);
    sums.sum_s += ex;
    sums.sum_t += math::exp2_nonpositive(y);
    if constexpr (Policy::kCross) sums.cross += math::times(ex, x - y);
  }
  if (task.hard == CrossEntropy::kOwn) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      Real shifted = widen(z.value[j]) - sums.max_s;
      sums.sum_hard += math::exp2_nonpositive(shifted * Real(math::kLog2E));
    }
  }
}

// Of the elements that a place has, what label smoothing adds up.
template <class T, int kCount, class Index, class Real>
__device__ __forceinline__ void add_smooth(RowSums<Real>& sums, const Vector<T, kCount>& z,
                                           const Place<Index>& place) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    if (place.holds(j)) {
      sums.sum_z += widen(z.value[j]) - sums.max_s;
      sums.count += Real(1);
    }
  }
}

// (v - max) * scale as one fma: v * scale - base. `error`, what rounding the base lost, is the same for all
// elements, so that one factor makes their exponentials exact.
struct Shift {
  float scale, base, error;
  __device__ __forceinline__ Shift(float max, float scale) : scale(scale), base(max * scale) {
    error = math::fma(max, scale, -base);
  }
  __device__ __forceinline__ float operator()(float v) const { return math::fma(v, scale, -base); }
  // Of |error| <= 2^-9 the third power is nothing. Not so beyond, or of no maximum.
  __device__ __forceinline__ bool small() const { return fabsf(base) <= 65536.0f; }
  // The sum of e x from that of exponents which still lack the error; sum: of e, which does not.
  __device__ __forceinline__ float back(float of_shifted, float sum) const {
    return math::fma(factor(), of_shifted, -error * sum);
  }
  // 2^-error
  __device__ __forceinline__ float factor() const {
    constexpr double square = math::kLn2 * math::kLn2 / 2;
    return math::fma(error, math::fma(error, float(square), -float(math::kLn2)), 1.0f);
  }
};
struct Shifts {
  Shift s, t, hard;
  __device__ __forceinline__ Shifts(const Task<float>& task, float max_s, float max_t)
      : s(max_s, task.scale), t(max_t, task.scale), hard(max_s, float(math::kLog2E)) {}
  __device__ __forceinline__ bool small() const { return s.small() && t.small() && hard.small(); }
};

// add() in fewer instructions, for sums whose exponents still lack the shifts' errors; `cross` is unguarded: NaN where
// the guard would have made a difference.
template <class Policy, class T, int kCount>
__device__ __forceinline__ void add_shifted(const Task<float>& task, RowSums<float>& sums,
                                            const Shifts& shifts, const Vector<T, kCount>& z,
                                            const Vector<T, kCount>& t) {
  float zs[kCount], ts[kCount];
  widen_all(z, zs);
  widen_all(t, ts);
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    float x = shifts.s(zs[j]), y = shifts.t(ts[j]);
    float ex = math::exp2_nonpositive(x);
    sums.sum_s += ex;
    sums.sum_t += math::exp2_nonpositive(y);
    if constexpr (Policy::kCross) sums.cross = math::fma(ex, x - y, sums.cross);
  }
  if (task.hard == CrossEntropy::kOwn) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) sums.sum_hard += math::exp2_nonpositive(shifts.hard(zs[j]));
  }
}

// Adds to `sums` a part that add_shifted made relative to the same maxima.
template <class Policy>
__device__ __forceinline__ void add_part(RowSums<float>& sums, const RowSums<float>& part,
                                         const Shifts& shifts) {
  float of_s = shifts.s.factor();
  sums.sum_s = math::fma(of_s, part.sum_s, sums.sum_s);
  sums.sum_t = math::fma(shifts.t.factor(), part.sum_t, sums.sum_t);
  if constexpr (Policy::kCross) {
    float moved = math::fma(part.sum_s, shifts.t.error - shifts.s.error, part.cross);
    sums.cross = math::fma(of_s, moved, sums.cross);
  }
  sums.sum_hard = math::fma(shifts.hard.factor(), part.sum_hard, sums.sum_hard);
}

// The largest of many vectors' elements; 16-bit ones two at a time.
template <class T>
struct Largest {
  T value = Lowest<T>::value;
  template <int kCount>
  __device__ __forceinline__ void add(const Vector<T, kCount>& x) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) value = Max::apply(x.value[j], value);
  }
  __device__ __forceinline__ T result() const { return value; }
};
template <class T, class Pair>
struct LargestPair {
  Pair value;
  __device__ __forceinline__ LargestPair() {
    narrow(-INFINITY, value.x);
    narrow(-INFINITY, value.y);
  }
  __device__ __forceinline__ void add(const Vector<T>& x) {
    Pair pairs[4];
    memcpy(pairs, &x, sizeof pairs);
#pragma unroll
    for (int i = 0; i < 4; ++i) value = __hmax2(value, pairs[i]);
  }
  __device__ __forceinline__ float result() const {
    return Max::apply(Max::apply(widen(value.x), widen(value.y)), Lowest<float>::value);
  }
};
template <>
struct Largest<__nv_bfloat16> : LargestPair<__nv_bfloat16, __nv_bfloat162> {};
template <>
struct Largest<__half> : LargestPair<__half, __half2> {};

template <class Policy, class Real>
__device__ __forceinline__ void rebase(const Task<Real>& task, RowSums<Real>& sums, Real max_s,
                                       Real max_t) {
  if (max_s > sums.max_s || max_t > sums.max_t) {
    sums = math::rebase<Policy>(task.hard, sums, max_s, max_t, task.scale, Exp2Nonpositive());
  }
}

}  // namespace
}  // namespace cuda
}  // namespace kdkernels
