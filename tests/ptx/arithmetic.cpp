// Instructions that turn registers into registers, one lane at a time.
//
// Approximate functions: the exact value, moved by a pseudo-random share of the largest error that the PTX ISA
// documents (a fixed function of the operand), so that a kernel has to live with any hardware's answer.
#include <cfenv>
#include <cmath>
#include <functional>
#include <limits>
#include <type_traits>

#include "emulator.h"

namespace ptx {
namespace {

template <class T, class Bits>
T as(Bits bits) {
  static_assert(sizeof(T) == sizeof(Bits));
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
uint32_t bits_of(float x) { return as<uint32_t>(x); }
uint64_t bits_of(double x) { return as<uint64_t>(x); }

class RoundingScope {
 public:
  explicit RoundingScope(Rounding mode) : changed_(mode != Rounding::rn) {
    if (!changed_) return;
    constexpr int modes[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};
    std::fesetround(modes[static_cast<int>(mode)]);
  }
  ~RoundingScope() {
    if (changed_) std::fesetround(FE_TONEAREST);
  }

 private:
  bool changed_;
};

float flush(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

template <class T>
void flush_all(const Instruction& ins, T (&x)[kLanes]) {
  if constexpr (std::is_same_v<T, float>) {
    if (!ins.ftz) return;
    for (float& v : x) v = flush(v);
  }
}

// What every fp32 and fp64 result goes through: flush, saturate, the one NaN that NVIDIA's units make.
template <class T>
void finish(const Instruction& ins, T (&x)[kLanes]) {
  flush_all(ins, x);
  if (ins.sat) {
    for (T& v : x) v = v >= T(1) ? T(1) : v > T(0) ? v : T(0);
  }
  if constexpr (std::is_same_v<T, float>) {
    for (T& v : x) v = v != v ? as<float>(0x7FFFFFFFu) : v;
  }
}

// ---- 16-bit floats: computed in fp32 or fp64 and rounded once ------------------------------------------------

// x rounded to `digits` significant bits with exponents from `lowest` on; overflow as the mode says.
double round_to(double x, int digits, int lowest, double largest, Rounding mode) {
  if (x == 0 || !std::isfinite(x)) return x;
  int ulp = std::max(std::ilogb(x), lowest) - (digits - 1);
  double scaled = std::ldexp(x, -ulp);
  double whole = mode == Rounding::rn   ? std::nearbyint(scaled)
                 : mode == Rounding::rz ? std::trunc(scaled)
                 : mode == Rounding::rm ? std::floor(scaled)
                                        : std::ceil(scaled);
  double y = std::copysign(std::ldexp(whole, ulp), x);
  if (std::fabs(y) > largest) {
    bool to_infinity =
        mode == Rounding::rn || (mode == Rounding::rp && x > 0) || (mode == Rounding::rm && x < 0);
    return std::copysign(to_infinity ? std::numeric_limits<double>::infinity() : largest, x);
  }
  return y;
}

float widen_f16(uint16_t h) {
  int exponent = h >> 10 & 31, fraction = h & 1023;
  float sign = h >> 15 ? -1.0f : 1.0f;
  if (exponent == 31)
    return fraction ? as<float>(0x7FFFFFFFu) : sign * std::numeric_limits<float>::infinity();
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(fraction), -24);
  return sign * std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
}
float widen_bf16(uint16_t h) { return as<float>(static_cast<uint32_t>(h) << 16); }

uint16_t narrow_f16(double x, Rounding mode) {
  if (x != x) return 0x7FFF;
  double y = round_to(x, 11, -14, 65504, mode);
  uint16_t sign = std::signbit(y) ? 0x8000 : 0;
  y = std::fabs(y);
  if (std::isinf(y)) return sign | 0x7C00;
  if (y < 0x1p-14) return sign | static_cast<uint16_t>(y * 0x1p24);
  int exponent = std::ilogb(y);
  return sign | static_cast<uint16_t>(((exponent + 15) << 10) |
                                      (static_cast<int>(std::ldexp(y, 10 - exponent)) & 1023));
}
uint16_t narrow_bf16(double x, Rounding mode) {
  if (x != x) return 0x7FFF;
  float y = static_cast<float>(round_to(x, 8, -126, 0x1.FEp127, mode));
  return static_cast<uint16_t>(bits_of(y) >> 16);
}

bool is_bf16(Type t) { return t == Type::bf16 || t == Type::bf16x2; }
bool is_packed(Type t) { return t == Type::f16x2 || t == Type::bf16x2; }
float widen(Type t, uint16_t h) { return is_bf16(t) ? widen_bf16(h) : widen_f16(h); }
uint16_t narrow(Type t, double x, Rounding mode = Rounding::rn) {
  return is_bf16(t) ? narrow_bf16(x, mode) : narrow_f16(x, mode);
}

// a + b rounded to odd: rounding once more to fewer digits then gives the exact sum's rounding (Boldo and
// Melquiond, 2008).
double sum_to_odd(double a, double b) {
  double sum = a + b;
  if (!std::isfinite(sum)) return sum;
  double bb = sum - a, error = (a - (sum - bb)) + (b - bb);
  uint64_t bits = bits_of(sum);
  if (error != 0 && (bits & 1) == 0)
    sum = as<double>((error > 0) == (sum > 0) ? bits + 1 : bits - 1);
  return sum;
}

// f(a, b, c) of each half.
template <class F>
Status halves(Context& c, int operands, F f) {
  const Instruction& ins = c.ins;
  uint32_t x[3][kLanes] = {}, d[kLanes];
  for (int k = 0; k < operands; ++k) fetch(c, c.operand(k + 1), x[k]);
  for (int i = 0; i < kLanes; ++i) {
    uint32_t out = 0;
    for (int half = 0; half < (is_packed(ins.type) ? 2 : 1); ++half) {
      float v[3];
      for (int k = 0; k < 3; ++k)
        v[k] = widen(ins.type, static_cast<uint16_t>(x[k][i] >> 16 * half));
      if (ins.ftz && !is_bf16(ins.type)) {
        for (float& value : v)
          value = std::fabs(value) < 0x1p-14f ? std::copysign(0.0f, value) : value;
      }
      double y = f(v[0], v[1], v[2]);
      if (ins.sat) y = y >= 1 ? 1 : y > 0 ? y : 0;
      uint16_t h = narrow(ins.type, y, ins.rounding);
      if (ins.ftz && !is_bf16(ins.type) && (h & 0x7C00) == 0) h &= 0x8000;
      out |= static_cast<uint32_t>(h) << 16 * half;
    }
    d[i] = out;
  }
  put(c, c.operand(0), d);
  return Status::kNext;
}

// ---- Minimum and maximum -----------------------------------------------------------------------------------

template <class T>
T float_min(T a, T b, bool nan) {
  if (a != a || b != b)
    return nan || (a != a && b != b) ? std::numeric_limits<T>::quiet_NaN() : (a != a ? b : a);
  if (a == b) return std::signbit(a) ? a : b;
  return a < b ? a : b;
}
template <class T>
T float_max(T a, T b, bool nan) {
  if (a != a || b != b)
    return nan || (a != a && b != b) ? std::numeric_limits<T>::quiet_NaN() : (a != a ? b : a);
  if (a == b) return std::signbit(a) ? b : a;
  return a > b ? a : b;
}

// ---- Loops over lanes ---------------------------------------------------------------------------------------

template <class T, int kOperands, class F>
Status integers(Context& c, F f) {
  T a[kLanes], b[kLanes] = {}, e[kLanes] = {}, d[kLanes];
  fetch(c, c.operand(1), a);
  if constexpr (kOperands > 1) fetch(c, c.operand(2), b);
  if constexpr (kOperands > 2) fetch(c, c.operand(3), e);
  for (int i = 0; i < kLanes; ++i) d[i] = static_cast<T>(f(a[i], b[i], e[i]));
  put(c, c.operand(0), d);
  return Status::kNext;
}

template <class T>
void literal(Context& c, size_t k, T (&x)[kLanes]) {
  const Operand& o = c.operand(k);
  if (o.kind == Operand::kImmediate && o.literal_bits != 0 && o.literal_bits != 8 * sizeof(T)) {
    double value =
        o.literal_bits == 64 ? as<double>(o.value) : as<float>(static_cast<uint32_t>(o.value));
    for (T& v : x) v = static_cast<T>(value);
    return;
  }
  fetch(c, o, x);
}

template <class T, int kOperands, class F>
Status floats(Context& c, F f) {
  T a[kLanes], b[kLanes] = {}, e[kLanes] = {}, d[kLanes];
  literal(c, 1, a);
  if constexpr (kOperands > 1) literal(c, 2, b);
  if constexpr (kOperands > 2) literal(c, 3, e);
  flush_all(c.ins, a);
  flush_all(c.ins, b);
  flush_all(c.ins, e);
  {
    RoundingScope scope(c.ins.rounding);
    for (int i = 0; i < kLanes; ++i) d[i] = f(a[i], b[i], e[i]);
  }
  finish(c.ins, d);
  put(c, c.operand(0), d);
  return Status::kNext;
}

// Two fp32 in 64 bits.
template <class F>
Status pairs(Context& c, int operands, F f) {
  uint64_t x[3][kLanes] = {}, d[kLanes];
  for (int k = 0; k < operands; ++k) fetch(c, c.operand(k + 1), x[k]);
  float half[2][kLanes];
  {
    RoundingScope scope(c.ins.rounding);
    for (int h = 0; h < 2; ++h) {
      for (int i = 0; i < kLanes; ++i) {
        float v[3];
        for (int k = 0; k < 3; ++k) {
          v[k] = as<float>(static_cast<uint32_t>(x[k][i] >> 32 * h));
          if (c.ins.ftz) v[k] = flush(v[k]);
        }
        half[h][i] = f(v[0], v[1], v[2]);
      }
    }
  }
  for (auto& h : half) finish(c.ins, h);
  for (int i = 0; i < kLanes; ++i)
    d[i] = bits_of(half[0][i]) | static_cast<uint64_t>(bits_of(half[1][i])) << 32;
  put(c, c.operand(0), d);
  return Status::kNext;
}

// Calls f<T>() for the integer type of the instruction.
template <template <class> class F>
Handler by_integer(Type type) {
  switch (type) {
    case Type::u8:
    case Type::b8: return F<uint8_t>::run;
    case Type::s8: return F<int8_t>::run;
    case Type::u16:
    case Type::b16: return F<uint16_t>::run;
    case Type::s16: return F<int16_t>::run;
    case Type::u32:
    case Type::b32: return F<uint32_t>::run;
    case Type::s32: return F<int32_t>::run;
    case Type::u64:
    case Type::b64: return F<uint64_t>::run;
    case Type::s64: return F<int64_t>::run;
    default: return nullptr;
  }
}

template <class T>
using Unsigned = std::make_unsigned_t<T>;
template <class T>
using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;

// An integer instruction of n operands: the value of `expression` in a, b, e, computed without overflow.
#define KD_INTEGER(Name, n, expression) \
  template <class T> \
  struct Name { \
    static Status run(Context& c) { \
      return integers<T, n>(c, [&](T a, T b, T e) -> T { \
        using U = Unsigned<T>; \
        [[maybe_unused]] constexpr int kBits = 8 * sizeof(T); \
        [[maybe_unused]] U ua = static_cast<U>(a), ub = static_cast<U>(b), ue = static_cast<U>(e); \
        return static_cast<T>(expression); \
      }); \
    } \
  };

template <class T>
T saturated(Wide<T> x) {
  if (x > std::numeric_limits<T>::max()) return std::numeric_limits<T>::max();
  if (x < std::numeric_limits<T>::min()) return std::numeric_limits<T>::min();
  return static_cast<T>(x);
}
template <class T>
T high(T a, T b) {
  return static_cast<T>((static_cast<Wide<T>>(a) * b) >> (8 * sizeof(T)));
}
template <class T>
T divide(T a, T b) {
  if (b == 0) return static_cast<T>(-1);
  return static_cast<T>(static_cast<Wide<T>>(a) / b);
}
template <class T>
T remainder_of(T a, T b) {
  return b == 0 ? a : static_cast<T>(static_cast<Wide<T>>(a) % b);
}
template <class T>
T bit_field(T a, uint32_t position, uint32_t length) {
  constexpr uint32_t kBits = 8 * sizeof(T);
  position &= 255;
  length &= 255;
  Unsigned<T> u = static_cast<Unsigned<T>>(a);
  bool sign = false;
  if (std::is_signed_v<T> && length > 0) {
    uint32_t top = std::min(position + length - 1, kBits - 1);
    sign = u >> top & 1;
  }
  Unsigned<T> out = 0;
  for (uint32_t i = 0; i < kBits; ++i) {
    bool bit = i < length && position + i < kBits ? u >> (position + i) & 1 : sign;
    out |= static_cast<Unsigned<T>>(bit) << i;
  }
  return static_cast<T>(out);
}

KD_INTEGER(Add, 2, ua + ub)
KD_INTEGER(AddSat, 2, saturated<T>(static_cast<Wide<T>>(a) + b))
KD_INTEGER(Sub, 2, ua - ub)
KD_INTEGER(SubSat, 2, saturated<T>(static_cast<Wide<T>>(a) - b))
KD_INTEGER(MulLo, 2, static_cast<uint64_t>(ua) * ub)
KD_INTEGER(MulHi, 2, high<T>(a, b))
KD_INTEGER(MadLo, 3, static_cast<uint64_t>(ua) * ub + ue)
KD_INTEGER(MadHi, 3, static_cast<U>(high<T>(a, b)) + ue)
KD_INTEGER(MadHiSat, 3, saturated<T>(static_cast<Wide<T>>(high<T>(a, b)) + e))
KD_INTEGER(Sad, 3, static_cast<U>(a > b ? ua - ub : ub - ua) + ue)
KD_INTEGER(Div, 2, divide<T>(a, b))
KD_INTEGER(Rem, 2, remainder_of<T>(a, b))
KD_INTEGER(Abs, 1, a < 0 ? U(0) - ua : ua)
KD_INTEGER(Neg, 1, U(0) - ua)
KD_INTEGER(Min, 2, a < b ? a : b)
KD_INTEGER(Max, 2, a > b ? a : b)
KD_INTEGER(And, 2, ua& ub)
KD_INTEGER(Or, 2, ua | ub)
KD_INTEGER(Xor, 2, ua ^ ub)
KD_INTEGER(Not, 1, ~ua)
KD_INTEGER(Cnot, 1, ua == 0)

template <class T>
T shift_24(T a) {
  return std::is_signed_v<T>
             ? static_cast<T>(static_cast<int32_t>(static_cast<uint32_t>(a) << 8) >> 8)
             : static_cast<T>(a & 0xFFFFFF);
}
template <class T>
int64_t product_24(T a, T b) {
  return static_cast<int64_t>(shift_24(a)) * static_cast<int64_t>(shift_24(b));
}
KD_INTEGER(Mul24Lo, 2, product_24(a, b))
KD_INTEGER(Mul24Hi, 2, product_24(a, b) >> 16)
KD_INTEGER(Mad24Lo, 3, product_24(a, b) + e)
KD_INTEGER(Mad24Hi, 3, (product_24(a, b) >> 16) + e)

// Shifts take an unsigned 32-bit distance, whatever the type.
template <class T, bool kLeft>
struct Shift {
  static Status run(Context& c) {
    T a[kLanes], d[kLanes];
    uint32_t b[kLanes];
    fetch(c, c.operand(1), a);
    fetch(c, c.operand(2), b);
    constexpr uint32_t kBits = 8 * sizeof(T);
    for (int i = 0; i < kLanes; ++i) {
      if (b[i] >= kBits) {
        d[i] = !kLeft && std::is_signed_v<T> && a[i] < 0 ? static_cast<T>(-1) : T(0);
      } else {
        d[i] = kLeft ? static_cast<T>(static_cast<Unsigned<T>>(a[i]) << b[i])
                     : static_cast<T>(a[i] >> b[i]);
      }
    }
    put(c, c.operand(0), d);
    return Status::kNext;
  }
};
template <class T>
using Shl = Shift<T, true>;
template <class T>
using Shr = Shift<T, false>;

template <class T>
struct Bfe {
  static Status run(Context& c) {
    T a[kLanes], d[kLanes];
    uint32_t b[kLanes], e[kLanes];
    fetch(c, c.operand(1), a);
    fetch(c, c.operand(2), b);
    fetch(c, c.operand(3), e);
    for (int i = 0; i < kLanes; ++i) d[i] = bit_field(a[i], b[i], e[i]);
    put(c, c.operand(0), d);
    return Status::kNext;
  }
};

template <class T>
struct Bfi {
  static Status run(Context& c) {
    T f[kLanes], base[kLanes];
    uint32_t position[kLanes], length[kLanes];
    fetch(c, c.operand(1), f);
    fetch(c, c.operand(2), base);
    fetch(c, c.operand(3), position);
    fetch(c, c.operand(4), length);
    constexpr uint32_t kBits = 8 * sizeof(T);
    for (int i = 0; i < kLanes; ++i) {
      uint32_t p = position[i] & 255, n = length[i] & 255;
      for (uint32_t k = 0; k < n && p + k < kBits; ++k) {
        T bit = T(1) << (p + k);
        base[i] = static_cast<T>((base[i] & ~bit) | ((f[i] >> k & 1) << (p + k)));
      }
    }
    put(c, c.operand(0), base);
    return Status::kNext;
  }
};

// Instructions whose result is 32 bits however wide the operand.
template <class T>
struct Count {
  static Status run(Context& c) {
    T a[kLanes];
    uint32_t d[kLanes];
    fetch(c, c.operand(1), a);
    bool popc = c.ins.words[0] == "popc", clz = c.ins.words[0] == "clz",
         shift = has(c.ins, "shiftamt");
    constexpr uint32_t kBits = 8 * sizeof(T);
    for (int i = 0; i < kLanes; ++i) {
      uint64_t u = static_cast<Unsigned<T>>(a[i]);
      if (popc) {
        d[i] = static_cast<uint32_t>(__builtin_popcountll(u));
      } else if (clz) {
        d[i] = u == 0 ? kBits : static_cast<uint32_t>(__builtin_clzll(u)) - (64 - kBits);
      } else {  // bfind: the first bit from the top that differs from the sign
        if (a[i] < 0) u = static_cast<Unsigned<T>>(~a[i]);
        d[i] = u == 0 ? ~0u : 63 - static_cast<uint32_t>(__builtin_clzll(u));
        if (shift && d[i] != ~0u) d[i] = kBits - 1 - d[i];
      }
    }
    put(c, c.operand(0), d);
    return Status::kNext;
  }
};

template <class T>
struct Brev {
  static Status run(Context& c) {
    return integers<T, 1>(c, [](T a, T, T) {
      T d = 0;
      for (size_t k = 0; k < 8 * sizeof(T); ++k) d = static_cast<T>(d << 1 | (a >> k & 1));
      return d;
    });
  }
};

// mul.wide and mad.wide: operands of T, results of twice its size.
template <class T>
struct Wider {
  static Status run(Context& c) {
    using D = std::conditional_t<std::is_signed_v<T>,
                                 std::conditional_t<sizeof(T) == 2, int32_t, int64_t>,
                                 std::conditional_t<sizeof(T) == 2, uint32_t, uint64_t>>;
    T a[kLanes], b[kLanes];
    D e[kLanes] = {}, d[kLanes];
    fetch(c, c.operand(1), a);
    fetch(c, c.operand(2), b);
    if (c.ins.words[0] == "mad") fetch(c, c.operand(3), e);
    for (int i = 0; i < kLanes; ++i) {
      d[i] = static_cast<D>(static_cast<Unsigned<D>>(static_cast<D>(a[i]) * static_cast<D>(b[i])) +
                            static_cast<Unsigned<D>>(e[i]));
    }
    put(c, c.operand(0), d);
    return Status::kNext;
  }
};

// add.cc, addc, sub.cc, subc, mad.lo.cc, madc: with the warp's carry bits. The carry of a subtraction is its borrow.
template <class T>
struct Carry {
  static Status run(Context& c) {
    T a[kLanes], b[kLanes], e[kLanes] = {}, d[kLanes];
    fetch(c, c.operand(1), a);
    fetch(c, c.operand(2), b);
    const std::string& name = c.ins.words[0];
    bool multiply = name[0] == 'm', subtract = name[0] == 's', in = name.back() == 'c',
         out = has(c.ins, "cc");
    bool upper = has(c.ins, "hi");
    if (multiply) fetch(c, c.operand(3), e);
    uint32_t carries = 0;
    for (int i = 0; i < kLanes; ++i) {
      using U = unsigned __int128;
      U x = static_cast<Unsigned<T>>(a[i]), y = static_cast<Unsigned<T>>(b[i]);
      if (multiply) {
        x = static_cast<Unsigned<T>>(
            upper ? high<T>(a[i], b[i])
                  : static_cast<T>(static_cast<uint64_t>(a[i]) * static_cast<uint64_t>(b[i])));
        y = static_cast<Unsigned<T>>(e[i]);
      }
      U k = in ? c.warp.carry >> i & 1 : 0;
      U sum = subtract ? x - y - k : x + y + k;
      d[i] = static_cast<T>(sum);
      carries |= static_cast<uint32_t>(sum >> (8 * sizeof(T)) & 1) << i;
    }
    if (out) c.warp.carry = (c.warp.carry & ~c.active) | (carries & c.active);
    put(c, c.operand(0), d);
    return Status::kNext;
  }
};

Status lop3(Context& c) {
  uint32_t table = static_cast<uint32_t>(c.operand(4).value);
  return integers<uint32_t, 3>(c, [table](uint32_t a, uint32_t b, uint32_t e) {
    uint32_t d = 0;
    for (int k = 0; k < 8; ++k) {
      if (table >> k & 1) d |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? e : ~e);
    }
    return d;
  });
}

Status shf(Context& c) {
  bool left = has(c.ins, "l"), clamp = has(c.ins, "clamp");
  return integers<uint32_t, 3>(c, [=](uint32_t a, uint32_t b, uint32_t n) {
    n = clamp ? std::min(n, 32u) : n & 31;
    uint64_t both = static_cast<uint64_t>(b) << 32 | a;
    return left ? static_cast<uint32_t>((both << n) >> 32) : static_cast<uint32_t>(both >> n);
  });
}

Status prmt(Context& c) {
  static const char* const modes[] = {"f4e", "b4e", "rc8", "ecl", "ecr", "rc16"};
  int mode = -1;
  for (int k = 0; k < 6; ++k) {
    if (has(c.ins, modes[k])) mode = k;
  }
  return integers<uint32_t, 3>(c, [mode](uint32_t a, uint32_t b, uint32_t select) {
    uint64_t both = static_cast<uint64_t>(b) << 32 | a;
    uint32_t d = 0;
    for (uint32_t k = 0; k < 4; ++k) {
      uint32_t s = select & 3, from;
      bool sign = false;
      switch (mode) {
        case 0: from = (s + k) & 7; break;
        case 1: from = (s - k) & 7; break;
        case 2: from = s; break;
        case 3: from = std::max(k, s); break;
        case 4: from = std::min(k, s); break;
        case 5: from = (k & 1) + (s & 1) * 2; break;
        default: from = select >> 4 * k & 7; sign = select >> 4 * k & 8;
      }
      uint32_t byte = both >> 8 * from & 255;
      if (sign) byte = byte & 128 ? 255 : 0;
      d |= byte << 8 * k;
    }
    return d;
  });
}

// dp4a and dp2a: the types of both factors stand in the words.
Status dot_product(Context& c) {
  bool four = c.ins.words[0] == "dp4a", low = has(c.ins, "lo");
  bool a_signed = is_signed(c.ins.type), b_signed = is_signed(c.ins.from);
  return integers<uint32_t, 3>(c, [=](uint32_t a, uint32_t b, uint32_t e) {
    for (int k = 0; k < (four ? 4 : 2); ++k) {
      int bits = four ? 8 : 16;
      int64_t x = a >> bits * k & ((1u << bits) - 1);
      int64_t y = b >> 8 * (four || low ? k : k + 2) & 255;
      if (a_signed && x >> (bits - 1)) x -= int64_t{1} << bits;
      if (b_signed && y >> 7) y -= 256;
      e += static_cast<uint32_t>(x * y);
    }
    return e;
  });
}

Status bmsk(Context& c) {
  bool clamp = has(c.ins, "clamp");
  return integers<uint32_t, 2>(c, [clamp](uint32_t a, uint32_t b, uint32_t) {
    if (!clamp) a &= 31, b &= 31;
    uint64_t mask = b >= 32 ? 0xFFFFFFFFull : (uint64_t{1} << b) - 1;
    return a >= 32 ? 0u : static_cast<uint32_t>(mask << a);
  });
}

Status szext(Context& c) {
  bool clamp = has(c.ins, "clamp"), sign = is_signed(c.ins.type);
  return integers<uint32_t, 2>(c, [=](uint32_t a, uint32_t n, uint32_t) {
    if (!clamp) n &= 31;
    if (n >= 32) return a;
    if (n == 0) return 0u;
    uint32_t low = a & ((1u << n) - 1);
    return sign && low >> (n - 1) ? low | ~((1u << n) - 1) : low;
  });
}

Status fns(Context& c) {
  uint32_t mask[kLanes], base[kLanes], d[kLanes];
  int32_t offset[kLanes];
  fetch(c, c.operand(1), mask);
  fetch(c, c.operand(2), base);
  fetch(c, c.operand(3), offset);
  for (int i = 0; i < kLanes; ++i) {
    int position = static_cast<int>(base[i]), step = offset[i] < 0 ? -1 : 1;
    int wanted = std::abs(offset[i]) - 1;
    d[i] = ~0u;
    if (offset[i] == 0) {
      if (position < 32 && mask[i] >> position & 1) d[i] = base[i];
      continue;
    }
    for (; position >= 0 && position < 32; position += step) {
      if ((mask[i] >> position & 1) && wanted-- == 0) {
        d[i] = static_cast<uint32_t>(position);
        break;
      }
    }
  }
  put(c, c.operand(0), d);
  return Status::kNext;
}

// Two 16-bit integers in a register.
Status integer_pairs(Context& c) {
  const std::string& name = c.ins.words[0];
  bool sign = c.ins.type == Type::s16x2;
  return integers<uint32_t, 2>(c, [&](uint32_t a, uint32_t b, uint32_t) {
    uint32_t d = 0;
    for (int half = 0; half < 2; ++half) {
      int x = sign ? static_cast<int16_t>(a >> 16 * half) : static_cast<uint16_t>(a >> 16 * half);
      int y = sign ? static_cast<int16_t>(b >> 16 * half) : static_cast<uint16_t>(b >> 16 * half);
      int z = name == "add" ? x + y : name == "min" ? std::min(x, y) : std::max(x, y);
      d |= static_cast<uint32_t>(z & 0xFFFF) << 16 * half;
    }
    return d;
  });
}

// ---- Comparison and selection ---------------------------------------------------------------------------------

enum Compare { kEq, kNe, kLt, kLe, kGt, kGe, kEqu, kNeu, kLtu, kLeu, kGtu, kGeu, kNum, kNan };
int compare_of(const std::string& word) {
  static const std::map<std::string, int> names = {
      {"eq", kEq},   {"ne", kNe},   {"lt", kLt},   {"le", kLe},   {"gt", kGt},   {"ge", kGe},
      {"lo", kLt},   {"ls", kLe},   {"hi", kGt},   {"hs", kGe},   {"equ", kEqu}, {"neu", kNeu},
      {"ltu", kLtu}, {"leu", kLeu}, {"gtu", kGtu}, {"geu", kGeu}, {"num", kNum}, {"nan", kNan}};
  auto found = names.find(word);
  return found == names.end() ? -1 : found->second;
}

template <class T>
bool compared(int op, T a, T b) {
  bool unordered = a != a || b != b;
  if (op == kNum) return !unordered;
  if (op == kNan) return unordered;
  if (op >= kEqu) {
    if (unordered) return true;
    op -= kEqu - kEq;
  }
  switch (op) {
    case kEq: return a == b;
    case kNe: return !unordered && a != b;
    case kLt: return a < b;
    case kLe: return a <= b;
    case kGt: return a > b;
    default: return a >= b;
  }
}

template <class T>
uint32_t compare_lanes(Context& c) {
  T a[kLanes], b[kLanes];
  if constexpr (std::is_floating_point_v<T>) {
    literal(c, 1, a);
    literal(c, 2, b);
    flush_all(c.ins, a);
    flush_all(c.ins, b);
  } else {
    fetch(c, c.operand(1), a);
    fetch(c, c.operand(2), b);
  }
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i)
    bits |= static_cast<uint32_t>(compared(c.ins.compare, a[i], b[i])) << i;
  return bits;
}

uint32_t compare_halves(Context& c, Type type, int half) {
  uint32_t a[kLanes], b[kLanes], bits = 0;
  fetch(c, c.operand(1), a);
  fetch(c, c.operand(2), b);
  for (int i = 0; i < kLanes; ++i) {
    float x = widen(type, static_cast<uint16_t>(a[i] >> 16 * half)),
          y = widen(type, static_cast<uint16_t>(b[i] >> 16 * half));
    if (c.ins.ftz && std::fabs(x) < 0x1p-14f) x = 0;
    if (c.ins.ftz && std::fabs(y) < 0x1p-14f) y = 0;
    bits |= static_cast<uint32_t>(compared(c.ins.compare, x, y)) << i;
  }
  return bits;
}

uint32_t compare_any(Context& c, Type type) {
  switch (type) {
    case Type::b16:
    case Type::u16: return compare_lanes<uint16_t>(c);
    case Type::s16: return compare_lanes<int16_t>(c);
    case Type::b32:
    case Type::u32: return compare_lanes<uint32_t>(c);
    case Type::s32: return compare_lanes<int32_t>(c);
    case Type::b64:
    case Type::u64: return compare_lanes<uint64_t>(c);
    case Type::s64: return compare_lanes<int64_t>(c);
    case Type::f32: return compare_lanes<float>(c);
    case Type::f64: return compare_lanes<double>(c);
    default: return compare_halves(c, type, 0);
  }
}

uint32_t combined(Context& c, uint32_t bits) {
  if (c.ins.combine == 0) return bits;
  uint32_t other = fetch_predicate(c, c.operand(3));
  return c.ins.combine == 1 ? bits & other : c.ins.combine == 2 ? bits | other : bits ^ other;
}

Status setp(Context& c) {
  const Operand& d = c.operand(0);
  bool pair = d.kind == Operand::kVector;
  uint32_t bits = compare_any(c, c.ins.type);
  if (is_packed(c.ins.type)) {
    put_predicate(c, d.elements[0], combined(c, bits));
    put_predicate(c, d.elements[1], combined(c, compare_halves(c, c.ins.type, 1)));
    return Status::kNext;
  }
  uint32_t first = combined(c, bits), second = combined(c, ~bits);
  put_predicate(c, pair ? d.elements[0] : d, first);
  if (pair) put_predicate(c, d.elements[1], second);
  return Status::kNext;
}

// set.op.dtype.stype: all ones or 1.0.
Status set(Context& c) {
  uint32_t bits[2];
  Type from = c.ins.from;
  bits[0] = combined(c, compare_any(c, from));
  bits[1] = is_packed(from) ? combined(c, compare_halves(c, from, 1)) : 0;
  uint32_t d[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    bool low = bits[0] >> i & 1, upper = bits[1] >> i & 1;
    switch (c.ins.type) {
      case Type::f32: d[i] = low ? 0x3F800000u : 0; break;
      case Type::f16: d[i] = low ? 0x3C00u : 0; break;
      case Type::bf16: d[i] = low ? 0x3F80u : 0; break;
      case Type::f16x2: d[i] = (low ? 0x3C00u : 0) | (upper ? 0x3C000000u : 0); break;
      case Type::bf16x2: d[i] = (low ? 0x3F80u : 0) | (upper ? 0x3F800000u : 0); break;
      default:
        d[i] = is_packed(from) ? (low ? 0xFFFFu : 0) | (upper ? 0xFFFF0000u : 0) : low ? ~0u : 0;
    }
  }
  put(c, c.operand(0), d);
  return Status::kNext;
}

template <class T>
struct Selp {
  static Status run(Context& c) {
    T a[kLanes], b[kLanes];
    fetch(c, c.operand(1), a);
    fetch(c, c.operand(2), b);
    uint32_t bits = fetch_predicate(c, c.operand(3));
    for (int i = 0; i < kLanes; ++i) a[i] = bits >> i & 1 ? a[i] : b[i];
    put(c, c.operand(0), a);
    return Status::kNext;
  }
};

template <class T>
struct Slct {
  static Status run(Context& c) {
    T a[kLanes], b[kLanes];
    fetch(c, c.operand(1), a);
    fetch(c, c.operand(2), b);
    bool number = c.ins.from == Type::f32;
    uint32_t e[kLanes];
    fetch(c, c.operand(3), e);
    for (int i = 0; i < kLanes; ++i) {
      bool first = number ? as<float>(e[i]) >= 0 || (c.ins.ftz && flush(as<float>(e[i])) == 0)
                          : static_cast<int32_t>(e[i]) >= 0;
      a[i] = first ? a[i] : b[i];
    }
    put(c, c.operand(0), a);
    return Status::kNext;
  }
};

Status predicate_logic(Context& c) {
  uint32_t a = fetch_predicate(c, c.operand(1));
  uint32_t b = c.ins.operands.size() > 2 ? fetch_predicate(c, c.operand(2)) : 0;
  const std::string& name = c.ins.words[0];
  put_predicate(c, c.operand(0),
                name == "and"   ? a & b
                : name == "or"  ? a | b
                : name == "xor" ? a ^ b
                : name == "not" ? ~a
                                : a);
  return Status::kNext;
}

// ---- mov, with packing -------------------------------------------------------------------------------------------

template <class T>
struct Mov {
  static Status run(Context& c) {
    T a[kLanes];
    const Operand &d = c.operand(0), &s = c.operand(1);
    if (d.kind == Operand::kVector) {  // unpack
      uint64_t wide[kLanes], part[kLanes];
      fetch_cells(c, s, wide);
      size_t bits = 8 * static_cast<size_t>(bytes_of(c.ins.type)) / d.elements.size();
      for (size_t k = 0; k < d.elements.size(); ++k) {
        for (int i = 0; i < kLanes; ++i)
          part[i] = wide[i] >> bits * k & (bits == 64 ? ~0ull : (uint64_t{1} << bits) - 1);
        put(c, d.elements[k], part);
      }
      return Status::kNext;
    }
    if (s.kind == Operand::kVector) {  // pack
      uint64_t wide[kLanes] = {}, part[kLanes];
      size_t bits = 8 * static_cast<size_t>(bytes_of(c.ins.type)) / s.elements.size();
      for (size_t k = 0; k < s.elements.size(); ++k) {
        fetch_cells(c, s.elements[k], part);
        for (int i = 0; i < kLanes; ++i)
          wide[i] |= (part[i] & (bits == 64 ? ~0ull : (uint64_t{1} << bits) - 1)) << bits * k;
      }
      put(c, d, wide);
      return Status::kNext;
    }
    if constexpr (std::is_floating_point_v<T>) {
      literal(c, 1, a);
    } else {
      fetch(c, s, a);
    }
    put(c, d, a);
    return Status::kNext;
  }
};

// ---- cvt --------------------------------------------------------------------------------------------------------

__int128 clamp_integer(__int128 x, Type t) {
  int bits = 8 * bytes_of(t);
  __int128 low = is_signed(t) ? -(__int128{1} << (bits - 1)) : 0;
  __int128 top = is_signed(t) ? (__int128{1} << (bits - 1)) - 1 : (__int128{1} << bits) - 1;
  return x < low ? low : x > top ? top : x;
}

double whole(double x, Rounding mode) {
  return mode == Rounding::rn   ? std::nearbyint(x)
         : mode == Rounding::rz ? std::trunc(x)
         : mode == Rounding::rm ? std::floor(x)
                                : std::ceil(x);
}

// From an operand's low bits to a number, and back.
double read_float(uint64_t bits, Type t) {
  switch (t) {
    case Type::f64: return as<double>(bits);
    case Type::f32: return as<float>(static_cast<uint32_t>(bits));
    default: return widen(t, static_cast<uint16_t>(bits));
  }
}

uint64_t write_float(double x, Type t, const Instruction& ins, bool rounded) {
  switch (t) {
    case Type::f64: return bits_of(x);
    case Type::f32: {
      if (x != x) return 0x7FFFFFFFu;
      float y = static_cast<float>(
          rounded ? x : round_to(x, 24, -126, std::numeric_limits<float>::max(), ins.rounding));
      return bits_of(ins.ftz ? flush(y) : y);
    }
    default: {
      if (has(ins, "relu")) x = x > 0 ? x : x != x ? x : 0;
      return narrow(t, x, ins.rounding);
    }
  }
}

__int128 read_integer(uint64_t bits, Type t) {
  int n = 8 * bytes_of(t);
  if (n < 64) bits &= (uint64_t{1} << n) - 1;
  if (!is_signed(t)) return static_cast<__int128>(bits);
  return static_cast<__int128>(static_cast<int64_t>(bits << (64 - n)) >> (64 - n));
}

// An integer as a float of `digits` significant bits, rounded once.
double integer_as_float(__int128 x, int digits, Rounding mode) {
  bool negative = x < 0;
  unsigned __int128 magnitude =
      negative ? static_cast<unsigned __int128>(-x) : static_cast<unsigned __int128>(x);
  int length = 0;
  for (auto m = magnitude; m != 0; m >>= 1) ++length;
  int drop = std::max(0, length - digits);
  unsigned __int128 kept = magnitude >> drop, rest = magnitude - (kept << drop),
                    half = drop > 0 ? static_cast<unsigned __int128>(1) << (drop - 1) : 0;
  bool up = false;
  if (rest != 0) {
    up = mode == Rounding::rn   ? rest > half || (rest == half && (kept & 1))
         : mode == Rounding::rz ? false
                                : (mode == Rounding::rm) == negative;
  }
  double y = std::ldexp(static_cast<double>(static_cast<uint64_t>(kept + (up ? 1 : 0))), drop);
  return negative ? -y : y;
}

uint64_t converted(const Instruction& ins, uint64_t bits) {
  Type to = ins.type, from = ins.from;
  if (is_float(from)) {
    double x = read_float(bits, from);
    if (ins.ftz && from == Type::f32) x = flush(static_cast<float>(x));
    if (!is_float(to)) {
      if (x != x)
        return from == Type::f64 || bytes_of(to) == 8
                   ? (is_signed(to) || bytes_of(to) == 8 ? uint64_t{1} << (8 * bytes_of(to) - 1)
                                                         : uint64_t{1} << (8 * bytes_of(to) - 1))
                   : 0;
      double y = whole(x, ins.rounding);
      y = std::fmin(std::fmax(y, -0x1p100), 0x1p100);
      return static_cast<uint64_t>(clamp_integer(static_cast<__int128>(y), to));
    }
    if (ins.integral) x = whole(x, ins.rounding);
    if (ins.sat) x = x >= 1 ? 1 : x > 0 ? x : 0;
    return write_float(x, to, ins, ins.integral && from == to);
  }
  __int128 x = read_integer(bits, from);
  if (is_float(to)) {
    int digits = to == Type::f64 ? 53 : to == Type::f32 ? 24 : to == Type::f16 ? 11 : 8;
    double y = integer_as_float(x, digits, ins.rounding);
    if (ins.sat) y = y >= 1 ? 1 : y > 0 ? y : 0;
    return write_float(y, to, ins, true);
  }
  if (ins.sat) x = clamp_integer(x, to);
  return static_cast<uint64_t>(x);
}

Status cvt(Context& c) {
  const Instruction& ins = c.ins;
  uint64_t a[kLanes], d[kLanes];
  if (is_packed(ins.type) && ins.operands.size() > 2) {  // d = {a, b}: a above b
    float x[kLanes], y[kLanes];
    literal(c, 1, x);
    literal(c, 2, y);
    bool relu = has(ins, "relu");
    for (int i = 0; i < kLanes; ++i) {
      if (relu)
        x[i] = x[i] > 0 || x[i] != x[i] ? x[i] : 0, y[i] = y[i] > 0 || y[i] != y[i] ? y[i] : 0;
      d[i] = static_cast<uint64_t>(narrow(ins.type, x[i], ins.rounding)) << 16 |
             narrow(ins.type, y[i], ins.rounding);
    }
    put(c, c.operand(0), d);
    return Status::kNext;
  }
  fetch_cells(c, c.operand(1), a);
  for (int i = 0; i < kLanes; ++i) d[i] = converted(ins, a[i]);
  // Narrow results are extended by their own sign into a wider register.
  switch (ins.type) {
    case Type::s8:
    case Type::s16:
    case Type::s32: {
      int64_t wide[kLanes];
      for (int i = 0; i < kLanes; ++i) wide[i] = static_cast<int64_t>(read_integer(d[i], ins.type));
      put(c, c.operand(0), wide);
      break;
    }
    default:
      for (uint64_t& v : d) {
        if (bytes_of(ins.type) < 8) v &= (uint64_t{1} << 8 * bytes_of(ins.type)) - 1;
      }
      put(c, c.operand(0), d);
  }
  return Status::kNext;
}

// The conversions that kernels are full of, without the detour.
Status widen_bf16_lanes(Context& c) {
  uint32_t a[kLanes];
  float d[kLanes];
  fetch(c, c.operand(1), a);
  for (int i = 0; i < kLanes; ++i) d[i] = as<float>(a[i] << 16);
  put(c, c.operand(0), d);
  return Status::kNext;
}

// ---- fp32 and fp64 functions ---------------------------------------------------------------------------------------

// In [-1, 1], from the operand's bits.
double error_of(uint64_t bits) {
  bits *= 0x9E3779B97F4A7C15ull;
  bits ^= bits >> 32;
  bits *= 0xD6E8FEB86659FD93ull;
  bits ^= bits >> 29;
  return static_cast<double>(static_cast<int64_t>(bits)) * 0x1p-63;
}

// The largest error of an approximate function: the sum of what is given.
struct Bound {
  double relative = 0, absolute = 0, ulps = 0;
};

// What is documented includes the rounding to the type, which comes afterwards.
double moved(const Context& c, double exact, uint64_t operand, Type type, Bound bound) {
  if (!c.machine.options.perturb || !std::isfinite(exact) || exact == 0) return exact;
  int digits = type == Type::f64 ? 53 : type == Type::f32 ? 24 : is_bf16(type) ? 8 : 11;
  int lowest = type == Type::f64 ? -1022 : type == Type::f32 || is_bf16(type) ? -126 : -14;
  double ulp = std::ldexp(1.0, std::max(std::ilogb(exact), lowest) - (digits - 1));
  double error = bound.relative * std::fabs(exact) + bound.absolute + bound.ulps * ulp - ulp / 2;
  double y = exact + error_of(operand) * std::fmax(error, 0.0);
  // A normal result stays one, where flushing would take all of it.
  if (type == Type::f32 && std::fabs(exact) >= 0x1p-126 && std::fabs(y) < 0x1p-126)
    return std::copysign(0x1p-126, exact);
  return y;
}

// Of Instruction::mode; other instructions have -1.
enum Special { kEx2, kLg2, kSin, kCos, kTanh, kRcp, kSqrt, kRsqrt };
constexpr const char* kSpecials[] = {"ex2", "lg2", "sin", "cos", "tanh", "rcp", "sqrt", "rsqrt"};

double exact_function(int name, double x) {
  switch (name) {
    case kEx2: return std::exp2(x);
    case kLg2: return x < 0 ? std::numeric_limits<double>::quiet_NaN() : std::log2(x);
    case kSin: return std::sin(x);
    case kCos: return std::cos(x);
    case kTanh: return std::tanh(x);
    case kRcp: return 1 / x;
    case kSqrt: return std::sqrt(x);
    default: return 1 / std::sqrt(x);
  }
}

// Documented errors: PTX ISA 9.0, sections 9.7.3 (fp32, fp64) and 9.7.4 (f16, bf16).
Bound bound_of(int name, double x, Type type, bool ftz) {
  if (is_bf16(type)) return name == kTanh ? Bound{0, 0x1p-8} : Bound{0x1p-7};
  if (type == Type::f16 || type == Type::f16x2) {
    return name == kTanh ? Bound{0, std::exp2(-10.987)} : Bound{std::exp2(-9.9)};
  }
  if (type == Type::f64) return ftz ? Bound{0x1p-20} : Bound{0, 0, 1};
  if (name == kEx2) return {0, 0, 2};
  if (name == kRcp) return {0, 0, 1};
  if (name == kLg2) return x > 0.5 && x < 2 ? Bound{0, 0x1p-22} : Bound{0x1p-22};
  if (name == kSin || name == kCos) {
    return {0, std::exp2(std::fabs(x) <= 2 * M_PI ? -20.5 : -14.7)};
  }
  if (name == kTanh) return {0x1p-11};
  if (name == kRsqrt) return {std::exp2(-22.9)};
  return {0x1p-23};
}

Status approximate_fp32(Context& c) {
  float a[kLanes], d[kLanes] = {};
  literal(c, 1, a);
  flush_all(c.ins, a);
  const int name = c.ins.mode;
  for (int i = 0; i < kLanes; ++i) {
    if (!(c.active >> i & 1)) continue;
    double y = exact_function(name, a[i]);
    d[i] = static_cast<float>(
        moved(c, y, bits_of(a[i]), Type::f32, bound_of(name, a[i], Type::f32, true)));
  }
  finish(c.ins, d);
  put(c, c.operand(0), d);
  return Status::kNext;
}

// rcp and rsqrt .approx.ftz.f64 see and make the upper word only; rsqrt.approx.f64 is accurate.
Status approximate_fp64(Context& c) {
  double a[kLanes], d[kLanes] = {};
  literal(c, 1, a);
  const int name = c.ins.mode;
  constexpr uint64_t kUpper = 0xFFFFFFFF00000000ull;
  for (int i = 0; i < kLanes; ++i) {
    double x = a[i];
    if (c.ins.ftz) {
      x = as<double>(bits_of(x) & kUpper);
      if (std::fpclassify(a[i]) == FP_SUBNORMAL) x = std::copysign(0.0, x);
    }
    double y = exact_function(name, x);
    if (c.ins.ftz && std::fpclassify(y) == FP_SUBNORMAL) y = std::copysign(0.0, y);
    d[i] = moved(c, y, bits_of(x), Type::f64, bound_of(name, x, Type::f64, c.ins.ftz));
    if (c.ins.ftz)
      d[i] = a[i] != a[i] || d[i] != d[i] ? as<double>(0x7FFFFFFF00000000ull)
                                          : as<double>(bits_of(d[i]) & kUpper);
  }
  put(c, c.operand(0), d);
  return Status::kNext;
}

Status approximate_halves(Context& c) {
  const int name = c.ins.mode;
  return halves(c, 1, [&](float x, float, float) {
    return moved(c, exact_function(name, x), bits_of(x), c.ins.type,
                 bound_of(name, x, c.ins.type, c.ins.ftz));
  });
}

// div.approx and div.full: 2 ulp; beyond 2^126 the first one's reciprocal is 0.
Status divide_approximately(Context& c) {
  bool full = has(c.ins, "full");
  return floats<float, 2>(c, [&](float a, float b, float) {
    if (!full && std::fabs(b) > 0x1p126f) return a * std::copysign(0.0f, b);
    return static_cast<float>(moved(c, static_cast<double>(a) / b, bits_of(a) * 31ull + bits_of(b),
                                    Type::f32, {0, 0, 2}));
  });
}

template <class T>
Handler float_handler(const Instruction& ins) {
  const std::string& name = ins.words[0];
  if (name == "add")
    return [](Context& c) { return floats<T, 2>(c, [](T a, T b, T) { return a + b; }); };
  if (name == "sub")
    return [](Context& c) { return floats<T, 2>(c, [](T a, T b, T) { return a - b; }); };
  if (name == "mul")
    return [](Context& c) { return floats<T, 2>(c, [](T a, T b, T) { return a * b; }); };
  if (name == "fma" || name == "mad")
    return
        [](Context& c) { return floats<T, 3>(c, [](T a, T b, T e) { return std::fma(a, b, e); }); };
  if (name == "min" || name == "max") {
    // The third operand of the three-way form is not known.
    if (ins.operands.size() > 3) return nullptr;
    bool smaller = name == "min";
    if (smaller)
      return [](Context& c) {
        return floats<T, 2>(c, [&](T a, T b, T) { return float_min(a, b, c.ins.nan); });
      };
    return [](Context& c) {
      return floats<T, 2>(c, [&](T a, T b, T) { return float_max(a, b, c.ins.nan); });
    };
  }
  if (name == "abs")
    return [](Context& c) { return floats<T, 1>(c, [](T a, T, T) { return std::fabs(a); }); };
  if (name == "neg")
    return [](Context& c) { return floats<T, 1>(c, [](T a, T, T) { return -a; }); };
  if (name == "copysign")
    return
        [](Context& c) { return floats<T, 2>(c, [](T a, T b, T) { return std::copysign(b, a); }); };
  if (name == "testp") {
    return [](Context& c) {
      T a[kLanes];
      literal(c, 1, a);
      const std::string& what = c.ins.words[1];
      uint32_t bits = 0;
      for (int i = 0; i < kLanes; ++i) {
        int k = std::fpclassify(a[i]);
        bool yes = what == "finite"       ? std::isfinite(a[i])
                   : what == "infinite"   ? k == FP_INFINITE
                   : what == "number"     ? k != FP_NAN
                   : what == "notanumber" ? k == FP_NAN
                   : what == "normal"     ? k == FP_NORMAL || k == FP_ZERO
                                          : k == FP_SUBNORMAL;
        bits |= static_cast<uint32_t>(yes) << i;
      }
      put_predicate(c, c.operand(0), bits);
      return Status::kNext;
    };
  }
  if (name == "div") {
    if (ins.approx) return sizeof(T) == 4 ? divide_approximately : nullptr;
    return [](Context& c) { return floats<T, 2>(c, [](T a, T b, T) { return a / b; }); };
  }
  if (ins.approx || name == "tanh") {
    return ins.mode < 0 ? nullptr : sizeof(T) == 4 ? approximate_fp32 : approximate_fp64;
  }
  if (name == "rcp")
    return [](Context& c) { return floats<T, 1>(c, [](T a, T, T) { return T(1) / a; }); };
  if (name == "sqrt")
    return [](Context& c) { return floats<T, 1>(c, [](T a, T, T) { return std::sqrt(a); }); };
  return nullptr;
}

Handler half_handler(const Instruction& ins) {
  const std::string& name = ins.words[0];
  if (name == "add")
    return [](Context& c) {
      return halves(c, 2, [](double a, double b, double) { return sum_to_odd(a, b); });
    };
  if (name == "sub")
    return [](Context& c) {
      return halves(c, 2, [](double a, double b, double) { return sum_to_odd(a, -b); });
    };
  if (name == "mul")
    return
        [](Context& c) { return halves(c, 2, [](double a, double b, double) { return a * b; }); };
  if (name == "fma") {
    return [](Context& c) {
      bool relu = has(c.ins, "relu");
      return halves(c, 3, [relu](double a, double b, double e) {
        double y = sum_to_odd(a * b, e);
        return relu && y < 0 ? 0.0 : y;
      });
    };
  }
  if (name == "min")
    return [](Context& c) {
      return halves(c, 2, [&](double a, double b, double) { return float_min(a, b, c.ins.nan); });
    };
  if (name == "max")
    return [](Context& c) {
      return halves(c, 2, [&](double a, double b, double) { return float_max(a, b, c.ins.nan); });
    };
  if (name == "abs")
    return [](Context& c) {
      return halves(c, 1, [](double a, double, double) { return std::fabs(a); });
    };
  if (name == "neg")
    return [](Context& c) { return halves(c, 1, [](double a, double, double) { return -a; }); };
  if (name == "ex2" || name == "tanh") return approximate_halves;
  return nullptr;
}

Handler pair_handler(const Instruction& ins) {
  const std::string& name = ins.words[0];
  if (name == "add")
    return [](Context& c) { return pairs(c, 2, [](float a, float b, float) { return a + b; }); };
  if (name == "sub")
    return [](Context& c) { return pairs(c, 2, [](float a, float b, float) { return a - b; }); };
  if (name == "mul")
    return [](Context& c) { return pairs(c, 2, [](float a, float b, float) { return a * b; }); };
  if (name == "fma")
    return [](Context& c) {
      return pairs(c, 3, [](float a, float b, float e) { return std::fma(a, b, e); });
    };
  return nullptr;
}

Handler integer_handler(const Instruction& ins) {
  const std::string& name = ins.words[0];
  Type t = ins.type;
  bool wide = has(ins, "wide"), upper = has(ins, "hi"), carry = has(ins, "cc");
  if (name == "addc" || name == "subc" || name == "madc" || carry) return by_integer<Carry>(t);
  if (t == Type::u16x2 || t == Type::s16x2)
    return name == "add" || name == "min" || name == "max" ? integer_pairs : nullptr;
  if (name == "add") return ins.sat ? by_integer<AddSat>(t) : by_integer<Add>(t);
  if (name == "sub") return ins.sat ? by_integer<SubSat>(t) : by_integer<Sub>(t);
  if (name == "mul" || name == "mad") {
    bool mad = name == "mad";
    if (wide) {
      switch (t) {
        case Type::u16: return Wider<uint16_t>::run;
        case Type::s16: return Wider<int16_t>::run;
        case Type::u32: return Wider<uint32_t>::run;
        case Type::s32: return Wider<int32_t>::run;
        default: return nullptr;
      }
    }
    if (upper)
      return mad ? (ins.sat ? by_integer<MadHiSat>(t) : by_integer<MadHi>(t))
                 : by_integer<MulHi>(t);
    return mad ? by_integer<MadLo>(t) : by_integer<MulLo>(t);
  }
  if (name == "mul24" || name == "mad24") {
    bool mad = name == "mad24";
    if (t == Type::u32)
      return upper ? (mad ? Mad24Hi<uint32_t>::run : Mul24Hi<uint32_t>::run)
                   : (mad ? Mad24Lo<uint32_t>::run : Mul24Lo<uint32_t>::run);
    return upper ? (mad ? Mad24Hi<int32_t>::run : Mul24Hi<int32_t>::run)
                 : (mad ? Mad24Lo<int32_t>::run : Mul24Lo<int32_t>::run);
  }
  if (name == "sad") return by_integer<Sad>(t);
  if (name == "div") return by_integer<Div>(t);
  if (name == "rem") return by_integer<Rem>(t);
  if (name == "abs") return by_integer<Abs>(t);
  if (name == "neg") return by_integer<Neg>(t);
  if (name == "min" || name == "max") {
    if (ins.operands.size() > 3) return nullptr;
    return name == "min" ? by_integer<Min>(t) : by_integer<Max>(t);
  }
  if (name == "and") return by_integer<And>(t);
  if (name == "or") return by_integer<Or>(t);
  if (name == "xor") return by_integer<Xor>(t);
  if (name == "not") return by_integer<Not>(t);
  if (name == "cnot") return by_integer<Cnot>(t);
  if (name == "shl") return by_integer<Shl>(t);
  if (name == "shr") return by_integer<Shr>(t);
  if (name == "bfe") return by_integer<Bfe>(t);
  if (name == "bfi") return by_integer<Bfi>(t);
  if (name == "popc" || name == "clz" || name == "bfind") return by_integer<Count>(t);
  if (name == "brev") return by_integer<Brev>(t);
  if (name == "lop3" && ins.words.size() == 2) return lop3;
  if (name == "shf") return shf;
  if (name == "prmt") return prmt;
  if (name == "dp4a" || name == "dp2a") return dot_product;
  if (name == "bmsk") return bmsk;
  if (name == "szext") return szext;
  if (name == "fns") return fns;
  return nullptr;
}

template <template <class> class F>
Handler by_bits(Type type) {
  switch (type) {
    case Type::f32: return F<float>::run;
    case Type::f64: return F<double>::run;
    case Type::f16:
    case Type::bf16: return F<uint16_t>::run;
    case Type::f16x2:
    case Type::bf16x2:
    case Type::u16x2:
    case Type::s16x2: return F<uint32_t>::run;
    case Type::f32x2: return F<uint64_t>::run;
    default: return by_integer<F>(type);
  }
}

}  // namespace

uint16_t half_sum(Type type, uint16_t a, uint16_t b) {
  return narrow(type, sum_to_odd(widen(type, a), widen(type, b)));
}

Handler arithmetic_handler(Instruction& ins) {
  const std::string& name = ins.words[0];
  if (has(ins, "xorsign")) return nullptr;
  Type t = ins.type;
  auto special = std::find(std::begin(kSpecials), std::end(kSpecials), name);
  bool is_special = special != std::end(kSpecials);
  ins.mode = is_special ? static_cast<int>(special - std::begin(kSpecials)) : -1;
  ins.kind = is_special && (ins.approx || name == "tanh") ? Class::mufu
             : t == Type::f64                             ? Class::fp64
             : t == Type::f32 || t == Type::f32x2         ? Class::fp32
             : is_float(t)                                ? Class::fp16
                                                          : Class::integer;
  if (name == "mov") {
    ins.kind = Class::move;
    if (t == Type::pred) return predicate_logic;
    return by_bits<Mov>(t);
  }
  if (name == "cvt") {
    ins.kind = Class::convert;
    if (t == Type::f32 && ins.from == Type::bf16 && !ins.sat && !ins.ftz && !ins.integral)
      return widen_bf16_lanes;
    return has(ins, "pack") ? nullptr : cvt;
  }
  if (name == "selp") return by_bits<Selp>(t);
  if (name == "slct") return by_bits<Slct>(t);
  if (name == "setp" || name == "set") {
    ins.compare = ins.words.size() > 1 ? compare_of(ins.words[1]) : -1;
    if (ins.compare < 0) return nullptr;
    ins.combine = has(ins, "and") ? 1 : has(ins, "or") ? 2 : has(ins, "xor") ? 3 : 0;
    return name == "setp" ? setp : set;
  }
  if (t == Type::pred && (name == "and" || name == "or" || name == "xor" || name == "not"))
    return predicate_logic;
  if (t == Type::f32) return float_handler<float>(ins);
  if (t == Type::f64) return float_handler<double>(ins);
  if (t == Type::f32x2) return pair_handler(ins);
  if (is_float(t)) return half_handler(ins);
  return integer_handler(ins);
}

}  // namespace ptx
