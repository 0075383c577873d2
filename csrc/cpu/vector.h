// Vectors of computed values, as wide as the ISA level's, and how they come from and go to memory of any dtype.
// Included by one file per ISA level.
//
// gcc vectorises a plain loop over a scalar formula well, but not a reduction whose parts are folded into fp64
// every few vectors, and not the conversions of 16-bit elements. Loops that need those are written in these.
// (gcc 12 warns of its own undefined value in intrinsics of 512 bits unless they are the masked ones.)
#pragma once

#include "cpu/storage.h"
#include "math/divergence.h"

namespace kdkernels {
namespace cpu {
namespace {

#if defined(KD_VECTOR_BYTES)
constexpr int kVectorBytes = KD_VECTOR_BYTES;
#else
constexpr int kVectorBytes = 16;
#endif

typedef float FloatLanes __attribute__((vector_size(kVectorBytes)));
typedef double DoubleLanes __attribute__((vector_size(kVectorBytes)));
template <class Real>
struct LanesOf {
  typedef FloatLanes type;
};
template <>
struct LanesOf<double> {
  typedef DoubleLanes type;
};

// kLanes values of type Real.
template <class Real>
struct Vector {
  static constexpr int kLanes = kVectorBytes / sizeof(Real);
  typedef typename LanesOf<Real>::type Lanes;
  Lanes lanes;
  Vector() = default;
  explicit Vector(Lanes x) : lanes(x) {}
  explicit Vector(Real x) : lanes(Lanes{} + x) {}  // in every lane
};
using Floats = Vector<float>;
using Doubles = Vector<double>;

}  // namespace
}  // namespace cpu
namespace math {
template <class Real>
struct Scalar<cpu::Vector<Real>> {
  using type = Real;
};
}  // namespace math
namespace cpu {
namespace {

template <class Real>
KD_FN Vector<Real> operator+(Vector<Real> a, Vector<Real> b) {
  return Vector<Real>(a.lanes + b.lanes);
}
template <class Real>
KD_FN Vector<Real> operator-(Vector<Real> a, Vector<Real> b) {
  return Vector<Real>(a.lanes - b.lanes);
}
template <class Real>
KD_FN Vector<Real> operator-(Vector<Real> a) {
  return Vector<Real>(-a.lanes);
}
template <class Real>
KD_FN Vector<Real> operator*(Vector<Real> a, Vector<Real> b) {
  return Vector<Real>(a.lanes * b.lanes);
}
template <class Real>
KD_FN Vector<Real> operator/(Vector<Real> a, Vector<Real> b) {
  return Vector<Real>(a.lanes / b.lanes);
}
// Lanes that are true are all ones.
template <class Real>
KD_FN auto operator<(Vector<Real> a, Vector<Real> b) {
  return a.lanes < b.lanes;
}
template <class Real>
KD_FN auto operator==(Vector<Real> a, Vector<Real> b) {
  return a.lanes == b.lanes;
}
template <class Mask, class Real>
KD_FN Vector<Real> select(Mask mask, Vector<Real> a, Vector<Real> b) {
  return Vector<Real>(mask ? a.lanes : b.lanes);
}
// b where either is NaN.
template <class Real>
KD_FN Vector<Real> larger(Vector<Real> a, Vector<Real> b) {
  return Vector<Real>(a.lanes > b.lanes ? a.lanes : b.lanes);
}
#if KD_VECTOR_BYTES == 32  // gcc makes two instructions of the above
KD_FN Floats larger(Floats a, Floats b) {
  return Floats((FloatLanes)_mm256_max_ps((__m256)a.lanes, (__m256)b.lanes));
}
KD_FN Floats smaller(Floats a, Floats b) {
  return Floats((FloatLanes)_mm256_min_ps((__m256)a.lanes, (__m256)b.lanes));
}
#endif
KD_FN Floats magnitude(Floats x) {
  typedef int32_t Bits __attribute__((vector_size(kVectorBytes)));
  return Floats((FloatLanes)((Bits)x.lanes & 0x7FFFFFFF));
}
template <class Real>
KD_FN Vector<Real> smaller(Vector<Real> a, Vector<Real> b) {
  return Vector<Real>(a.lanes < b.lanes ? a.lanes : b.lanes);
}

// a b + c with one rounding, or, without the instruction, with a second one from fp64.
KD_FN Floats fma(Floats a, Floats b, Floats c) {
#if KD_VECTOR_BYTES == 64
  return Floats((Floats::Lanes)_mm512_fmadd_ps((__m512)a.lanes, (__m512)b.lanes, (__m512)c.lanes));
#elif KD_VECTOR_BYTES == 32
  return Floats((Floats::Lanes)_mm256_fmadd_ps((__m256)a.lanes, (__m256)b.lanes, (__m256)c.lanes));
#else
  for (int i = 0; i < Floats::kLanes; ++i) {
#if defined(__aarch64__)
    c.lanes[i] = __builtin_fmaf(a.lanes[i], b.lanes[i], c.lanes[i]);
#else
    c.lanes[i] = static_cast<float>(static_cast<double>(a.lanes[i]) * b.lanes[i] + c.lanes[i]);
#endif
  }
  return c;
#endif
}
KD_FN Doubles fma(Doubles a, Doubles b, Doubles c) {
  for (int i = 0; i < Doubles::kLanes; ++i)
    c.lanes[i] = __builtin_fma(a.lanes[i], b.lanes[i], c.lanes[i]);
  return c;
}

typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));

// 2^n for an integer n that stands in the low bits of k; 0 for n = -127.
KD_FN Floats power_of_low_bits(Floats k) {
  return Floats((Floats::Lanes)(((Ints)k.lanes << 23) + 0x3F800000));
}

KD_FN math::Mantissa<Floats> split(Floats x) {
  Ints bits = (Ints)x.lanes;
  Ints e = (bits - math::kTwoThirdsBits) & static_cast<int32_t>(0xFF800000);
  Floats m((Floats::Lanes)(bits - e));
  return {m, Floats(__builtin_convertvector(e, Floats::Lanes))};
}

KD_FN Doubles exp2_shifted(Doubles z, const math::Shifted<Doubles>& by) {
  for (int i = 0; i < Doubles::kLanes; ++i) {
    z.lanes[i] = __builtin_exp2(__builtin_fma(z.lanes[i], by.scale.lanes[i], -by.shift.lanes[i]));
  }
  return z;
}

KD_FN Floats exp2_nonpositive(Floats x) { return math::exp2_polynomial(x); }
KD_FN Doubles exp2_nonpositive(Doubles x) {
  for (int i = 0; i < Doubles::kLanes; ++i) x.lanes[i] = __builtin_exp2(x.lanes[i]);
  return x;
}
KD_FN Floats log_acc(Floats x) { return math::log(x); }
KD_FN Doubles log_acc(Doubles x) {
  for (int i = 0; i < Doubles::kLanes; ++i) x.lanes[i] = __builtin_log(x.lanes[i]);
  return x;
}
KD_FN Doubles log_normal(Doubles x) { return log_acc(x); }
KD_FN Doubles tanh_acc(Doubles x) {
  for (int i = 0; i < Doubles::kLanes; ++i) x.lanes[i] = __builtin_tanh(x.lanes[i]);
  return x;
}
template <class Real>
KD_FN Vector<Real> inverse(Vector<Real> x) {
  return Vector<Real>(Real(1)) / x;
}

template <int... kLane>
struct LaneNumbers {};
template <int kBy, class Lanes, int... kLane>
KD_FN Lanes rotated(Lanes x, LaneNumbers<kLane...>) {
  return __builtin_shufflevector(x, x, (kLane + kBy) % static_cast<int>(sizeof...(kLane))...);
}
// All lanes combined in every lane, halves at a time.
template <int kWidth, class Real, class Combine>
KD_FN Vector<Real> combined(Vector<Real> x, Combine combine) {
  if constexpr (kWidth == 0) {
    return x;
  } else {
    LaneNumbers<__integer_pack(Vector<Real>::kLanes)...> all;
    return combined<kWidth / 2>(combine(x, Vector<Real>(rotated<kWidth>(x.lanes, all))), combine);
  }
}
template <class Real>
KD_FN Real largest(Vector<Real> x) {
  constexpr int kHalf = Vector<Real>::kLanes / 2;
  return combined<kHalf>(x, [](Vector<Real> a, Vector<Real> b) KD_INLINE_LAMBDA {
    return larger(a, b);
  }).lanes[0];
}
template <class Real>
KD_FN Real sum_of_lanes(Vector<Real> x) {
  constexpr int kHalf = Vector<Real>::kLanes / 2;
  return combined<kHalf>(x, [](Vector<Real> a, Vector<Real> b) KD_INLINE_LAMBDA {
    return a + b;
  }).lanes[0];
}

// ---- memory -------------------------------------------------------------------------------------

KD_FN Floats load(const float* in) {
  Floats x;
  std::memcpy(&x.lanes, in, sizeof x.lanes);
  return x;
}
KD_FN Doubles load(const double* in) {
  Doubles x;
  std::memcpy(&x.lanes, in, sizeof x.lanes);
  return x;
}
KD_FN Floats load(const BFloat16* in) {
#if KD_VECTOR_BYTES == 64
  __m512i bits =
      _mm512_maskz_cvtepu16_epi32(0xFFFF, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in)));
  return Floats((Floats::Lanes)_mm512_maskz_slli_epi32(0xFFFF, bits, 16));
#elif KD_VECTOR_BYTES == 32
  __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in)));
  return Floats((Floats::Lanes)_mm256_slli_epi32(bits, 16));
#else
  Floats x;
  for (int i = 0; i < Floats::kLanes; ++i) x.lanes[i] = widen(in[i]);
  return x;
#endif
}
KD_FN Floats load(const Float16* in) {
#if KD_VECTOR_BYTES == 64
  return Floats((Floats::Lanes)_mm512_maskz_cvtph_ps(
      0xFFFF, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in))));
#elif KD_VECTOR_BYTES == 32
  return Floats(
      (Floats::Lanes)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in))));
#else
  Floats x;
  for (int i = 0; i < Floats::kLanes; ++i) x.lanes[i] = widen(in[i]);
  return x;
#endif
}

KD_FN void store(Floats x, float* out) { std::memcpy(out, &x.lanes, sizeof x.lanes); }
KD_FN void store(Doubles x, double* out) { std::memcpy(out, &x.lanes, sizeof x.lanes); }
KD_FN void store(Floats x, BFloat16* out) {
#if defined(KD_VECTOR_BYTES)
  typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
  Bits bits = (Bits)x.lanes;
  Bits rounded = bits + (((bits >> 16) & 1u) + 0x7FFFu);
  rounded = x.lanes == x.lanes ? rounded : Bits{} + 0x7FC00000u;
#if KD_VECTOR_BYTES == 64
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                      _mm512_maskz_cvtepi32_epi16(0xFFFF, (__m512i)(rounded >> 16)));
#else
  rounded = rounded >> 16;
  __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128((__m256i)rounded),
                                    _mm256_extracti128_si256((__m256i)rounded, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), packed);
#endif
#else
  for (int i = 0; i < Floats::kLanes; ++i) narrow(x.lanes[i], out[i]);
#endif
}
KD_FN void store(Floats x, Float16* out) {
#if KD_VECTOR_BYTES == 64
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                      _mm512_maskz_cvtps_ph(0xFFFF, (__m512)x.lanes, 0));
#elif KD_VECTOR_BYTES == 32
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_cvtps_ph((__m256)x.lanes, 0));
#else
  for (int i = 0; i < Floats::kLanes; ++i) narrow(x.lanes[i], out[i]);
#endif
}

#if KD_VECTOR_BYTES == 64
KD_FN __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1); }
#endif
// The first n lanes only; the others are `pad`.
template <class T>
KD_FN auto load_part(const T* in, int n, typename Compute<T>::type pad) {
  Vector<typename Compute<T>::type> x(pad);
#if KD_VECTOR_BYTES == 64
  if constexpr (__is_same(T, float)) {
    x.lanes = (FloatLanes)_mm512_mask_loadu_ps((__m512)x.lanes, first_lanes(n), in);
    return x;
  }
#endif
  for (int i = 0; i < n; ++i) x.lanes[i] = widen(in[i]);
  return x;
}
template <class T>
KD_FN void store_part(Vector<typename Compute<T>::type> x, int n, T* out) {
#if KD_VECTOR_BYTES == 64
  if constexpr (__is_same(T, float)) {
    return _mm512_mask_storeu_ps(out, first_lanes(n), (__m512)x.lanes);
  }
#endif
  for (int i = 0; i < n; ++i) narrow(x.lanes[i], out[i]);
}

// Writes at(i), the values of the vector at element i, to out[0, n).
template <class T, class At>
KD_FN void write_row(int64_t n, T* out, At at) {
  constexpr int kLanes = Vector<typename Compute<T>::type>::kLanes;
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) store(at(i), out + i);
  if (whole < n) store_part(at(whole), static_cast<int>(n - whole), out + whole);
}

// ---- sums in fp64 -------------------------------------------------------------------------------

template <class Real>
struct WideSum;
template <>
struct WideSum<double> {
  Doubles sum = Doubles(0.0);
  void add(Doubles x) { sum = sum + x; }
  KD_INLINE_LAMBDA double total() const { return sum_of_lanes(sum); }
};
template <>
struct WideSum<float> {
  Doubles low = Doubles(0.0), high = Doubles(0.0);
  KD_INLINE_LAMBDA void add(Floats x) {
#if KD_VECTOR_BYTES == 64
    low.lanes += (Doubles::Lanes)_mm512_maskz_cvtps_pd(
        0xFF, _mm512_maskz_extractf32x8_ps(0xFF, (__m512)x.lanes, 0));
    high.lanes += (Doubles::Lanes)_mm512_maskz_cvtps_pd(
        0xFF, _mm512_maskz_extractf32x8_ps(0xFF, (__m512)x.lanes, 1));
#elif KD_VECTOR_BYTES == 32
    low.lanes += (Doubles::Lanes)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)x.lanes));
    high.lanes += (Doubles::Lanes)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)x.lanes, 1));
#else
    for (int i = 0; i < Doubles::kLanes; ++i) {
      low.lanes[i] += static_cast<double>(x.lanes[i]);
      high.lanes[i] += static_cast<double>(x.lanes[Doubles::kLanes + i]);
    }
#endif
  }
  KD_INLINE_LAMBDA double total() const { return sum_of_lanes(low + high); }
};

}  // namespace
}  // namespace cpu
}  // namespace kdkernels
