"""The emulator's instructions against exact values: one tiny PTX kernel an instruction.

A case names the instruction, its types and what it must give, as the PTX ISA defines it. Its kernel
loads a thread's operands, runs the instruction and stores the result. Integers are Python's;
floats are whole numbers of a format's smallest subnormal, so every rounding here is exact.
"""

import functools
import itertools
import math
import operator
import random
import struct
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import ptx
import pytest

pytestmark = pytest.mark.skipif(ptx.toolkit() is None, reason="needs nvcc")

INTEGERS = ["u16", "s16", "u32", "s32", "u64", "s64"]
WORDS = ["u32", "s32", "u64", "s64"]
ROUNDINGS = ["rn", "rz", "rm", "rp"]
FULL = 0xFFFFFFFF
THREADS = 128


class Case(NamedTuple):
    text: str  # an opcode, whose operands are %d, %a, %b, %c, %e; or whole instructions
    out: str
    ins: tuple
    want: Callable  # of integers, and of floats as bits; None where anything is right
    picks: dict = {}  # an operand's values, where not all of its type's are of use
    per_warp: bool = False  # want(lane, a's values in the warp, b's, c's)
    memory: bool = False  # want gives (d, what is then in a's place)


def size(t):
    return 1 if t == "pred" else 32 if t.endswith("x2") else int(t.lstrip("usbf"))


def signed(x, n):
    x &= (1 << n) - 1
    return x - (1 << n) if x >> (n - 1) else x


def limits(t):
    n = size(t)
    return (-(1 << (n - 1)), (1 << (n - 1)) - 1) if t[0] == "s" else (0, (1 << n) - 1)


def clamp(x, lo, hi):
    return min(max(x, lo), hi)


# --- floats, exactly ---


class Format:
    def __init__(self, name, exponent_bits, mantissa_bits):
        self.name, self.mantissa = name, mantissa_bits
        self.scale = (1 << (exponent_bits - 1)) - 2 + mantissa_bits  # smallest subnormal: 2**-scale
        self.sign_at = exponent_bits + mantissa_bits
        self.inf = ((1 << exponent_bits) - 1) << mantissa_bits
        self.nan = (1 << self.sign_at) - 1  # the canonical one
        self.one = ((1 << (exponent_bits - 1)) - 1) << mantissa_bits

    def decode(self, bits):
        """The sign, and the magnitude in smallest subnormals."""
        sign, bits = bits >> self.sign_at & 1, bits & self.nan
        if bits >= self.inf:
            return sign, math.inf if bits == self.inf else math.nan
        exponent, fraction = bits >> self.mantissa, bits & ((1 << self.mantissa) - 1)
        return sign, (fraction | 1 << self.mantissa) << exponent - 1 if exponent else fraction

    def signed(self, sign, bits):
        return sign << self.sign_at | bits

    def round(self, x, scale, mode="rn", zero_sign=0):
        """The bits of x * 2**-scale, rounded once."""
        if x == 0:
            return self.signed(zero_sign, 0)
        sign, x = int(x < 0), abs(x)
        shift = max(x.bit_length() - self.mantissa - 1, scale - self.scale)
        bits = ((shift - scale + self.scale) << self.mantissa) + shifted(x, shift, mode, sign)
        if bits >= self.inf:
            outwards = mode == "rn" or mode == ("rm" if sign else "rp")
            bits = self.inf if outwards else self.inf - 1
        return self.signed(sign, bits)

    def is_nan(self, bits):
        return bits & self.nan > self.inf

    def flush(self, bits):
        return bits & 1 << self.sign_at if bits & self.nan < 1 << self.mantissa else bits

    def saturate(self, bits):
        return 0 if self.is_nan(bits) or bits >> self.sign_at else min(bits, self.one)

    def value(self, bits):
        if self.name == "f64":
            return struct.unpack("<d", struct.pack("<Q", bits))[0]
        sign, x = self.decode(bits)
        return math.copysign(math.ldexp(x, -self.scale) if x < math.inf else x, -sign)

    def values(self):
        least, lot = 1 << self.mantissa, self.inf - 1
        half, two = self.one - least, self.one + least
        some = [0, 1, 2, least - 1, least, least + 1, half, self.one, self.one + 1, two, two + 1]
        some += [self.round(3, 0), self.round(5, 1), self.round(7, 1), lot - 1, lot]
        some += [self.inf, self.inf + 1, self.nan]
        return some + [self.signed(1, x) for x in some]

    def random(self, rng):
        """Any bits, or a number near 1 whose last bits are often alike: ties and cancellation."""
        if rng.random() < 0.3:
            return rng.getrandbits(self.sign_at + 1)
        fraction = rng.getrandbits(self.mantissa)
        if rng.random() < 0.5:
            fraction &= -1 << rng.randrange(self.mantissa)
        bits = self.one + (rng.randrange(-3, 4) << self.mantissa) | fraction
        return self.signed(rng.getrandbits(1), bits)


def shifted(x, shift, mode, sign):
    """x * 2**-shift as an integer, rounded."""
    if shift <= 0:
        return x << -shift
    kept, lost, half = x >> shift, x & ((1 << shift) - 1), 1 << (shift - 1)
    nearest = lost > half or lost == half and kept & 1
    away = {"rn": nearest, "rz": False, "rm": sign, "rp": not sign, "rna": lost >= half}[mode]
    return kept + bool(lost and away)


FORMATS = {
    name: Format(name, *bits)
    for name, bits in {"f16": (5, 10), "bf16": (8, 7), "f32": (8, 23), "f64": (11, 52)}.items()
}


def fma(f, mode, a, b, c):
    (sa, a), (sb, b), (sc, c) = map(f.decode, (a, b, c))
    sign = sa ^ sb
    if any(x != x for x in (a, b, c)) or {a, b} == {0, math.inf}:
        return f.nan
    if math.inf in (a, b):
        return f.nan if c == math.inf and sc != sign else f.signed(sign, f.inf)
    if c == math.inf:
        return f.signed(sc, f.inf)
    product, addend = a * b, c << f.scale
    total = (-product if sign else product) + (-addend if sc else addend)
    return f.round(total, 2 * f.scale, mode, sign if sign == sc else int(mode == "rm"))


def add(f, mode, a, b):
    return fma(f, mode, a, f.one, b)


def sub(f, mode, a, b):
    return b if f.is_nan(b) else fma(f, mode, a, f.one, b ^ 1 << f.sign_at)


def mul(f, mode, a, b):
    return fma(f, mode, a, b, f.signed((a ^ b) >> f.sign_at, 0))


def div(f, mode, a, b):
    (sa, a), (sb, b) = f.decode(a), f.decode(b)
    sign = sa ^ sb
    if a != a or b != b or a == b == 0 or a == b == math.inf:
        return f.nan
    if a == math.inf or b == 0:
        return f.signed(sign, f.inf)
    if b == math.inf or a == 0:
        return f.signed(sign, 0)
    places = f.scale + f.mantissa + 4
    quotient, rest = divmod(a << places, b)
    quotient = 2 * quotient + bool(rest)
    return f.round(-quotient if sign else quotient, places + 1, mode)


def rcp(f, mode, a):
    return div(f, mode, f.one, a)


def sqrt(f, mode, a):
    sign, x = f.decode(a)
    if x != x or sign and x:
        return f.nan
    if x in (0, math.inf):
        return a
    x, places = x << (f.scale & 1), f.mantissa + 4
    root = math.isqrt(x << 2 * places)
    root = 2 * root + (root * root != x << 2 * places)
    return f.round(root, (f.scale + 1) // 2 + places + 1, mode)


def extreme(f, most, nan, a, b):
    """min and max: a number before a NaN unless .NaN is asked for, and -0 below +0."""
    if f.is_nan(a) or f.is_nan(b):
        return f.nan if nan or f.is_nan(a) and f.is_nan(b) else b if f.is_nan(a) else a

    def order(x):
        return -(x & f.nan) - 1 if x >> f.sign_at else x

    return (max if most else min)(a, b, key=order)


def modified(f, function, ftz=False, sat=False, relu=False):
    """function with what .ftz, .sat and .relu do before and after it."""

    def want(*operands):
        x = function(*(map(f.flush, operands) if ftz else operands))
        x = f.flush(x) if ftz else x
        if relu and not f.is_nan(x) and x >> f.sign_at:
            # Whether -0 is negative is not said.
            return 0 if x & f.nan else lambda got: got & f.nan == 0
        return f.saturate(x) if sat else x

    return want


def paired(function):
    """function on both halves of 32-bit operands."""
    return lambda *x: tuple(function(*(v >> s & 0xFFFF for v in x)) for s in (0, 16))


# --- running the cases ---


def edges(t):
    if t == "pred":
        return [0, 1]
    if t.endswith("x2"):
        return []
    if t in FORMATS:
        return FORMATS[t].values()
    n, (lo, hi) = size(t), limits(t)
    some = [0, 1, 2, 3, 7, n - 1, 1 << n // 2, (1 << n // 2) - 1, hi, hi - 1, hi // 2, hi // 2 + 1]
    return some + ([-1, -2, lo, lo + 1, -(1 << n // 2)] if lo else [hi - 2])


def anything(t, rng):
    if t.endswith("x2"):
        f = FORMATS[t[:-2]]
        return f.random(rng) | rng.choice([f.random(rng), *f.values()]) << 16
    if t in FORMATS:
        return FORMATS[t].random(rng)
    n = size(t)
    x = rng.getrandbits(rng.randrange(n) + 1)
    return signed(x, n) if t[0] == "s" else x


def operands(case):
    """Columns of operands, one row a thread: every pair of edge values, then random ones."""
    rng = random.Random(case.text)
    known = [case.picks.get(i, edges(t)) for i, t in enumerate(case.ins)]

    def draw(i):
        fixed = known[i] and (i in case.picks or case.ins[i] == "pred" or rng.random() < 0.4)
        return rng.choice(known[i]) if fixed else anything(case.ins[i], rng)

    rows = list(itertools.product(*known)) if len(known) < 3 and not case.per_warp else []
    rows = rng.sample(rows, min(len(rows), 512))
    rows += [tuple(map(draw, range(len(known)))) for _ in range(256)]
    rows += [tuple(map(draw, range(len(known)))) for _ in range(-len(rows) % THREADS)]
    return list(zip(*rows, strict=True))


def kernel(name, case):
    """The PTX of a kernel that runs the case on a thread's operands."""
    lines = [
        ".reg .b64 %p<6>, %offset; .reg .b32 %i, %t, %n, %m, %u, %v; .reg .b64 %w, %x;",
        ".reg .pred %pa, %pb, %pc, %pd, %q; .reg .b16 %byte;",
        ".shared .align 8 .b8 slots[1024];",
        "mov.u32 %i, %ctaid.x; mov.u32 %n, %ntid.x; mov.u32 %t, %tid.x;",
        "mad.lo.u32 %i, %i, %n, %t;",
    ]
    text, letters = case.text, "abce"[: len(case.ins)]
    for k, (t, r) in enumerate(zip((*case.ins, case.out), f"{letters}d", strict=True)):
        n = max(size(t), 8)
        lines += [f"ld.param.u64 %p{k}, [{name}_{k}]; cvta.to.global.u64 %p{k}, %p{k};"]
        lines += [f"mul.wide.u32 %offset, %i, {n // 8}; add.u64 %p{k}, %p{k}, %offset;"]
        if t == "pred":
            text = text.replace(f"%{r}", f"%p{r}")
            if r != "d":
                lines += [f"ld.global.u8 %byte, [%p{k}]; setp.ne.u16 %p{r}, %byte, 0;"]
            continue
        lines += [f".reg .b{max(n, 16)} %{r};"]
        if r != "d":
            lines += [f"ld.global.{'u8' if n == 8 else f'b{n}'} %{r}, [%p{k}];"]
    last = len(case.ins)
    if ";" not in text:
        registers = [
            f"%p{r}" if t == "pred" else f"%{r}" for r, t in zip(letters, case.ins, strict=True)
        ]
        lines += [f"{text} {', '.join(['%pd' if case.out == 'pred' else '%d', *registers])};"]
    else:
        lines += [text]
    if case.out == "pred":
        lines += [f"selp.b16 %byte, 1, 0, %pd; st.global.u8 [%p{last}], %byte;"]
    else:
        lines += [f"st.global.b{size(case.out)} [%p{last}], %d;"]
    parameters = ", ".join(f".param .u64 {name}_{k}" for k in range(last + 1))
    body = "\n  ".join(lines)
    return f".visible .entry {name}({parameters})\n{{\n  {body}\n  ret;\n}}\n"


def module(cases):
    kernels = [kernel(f"k{i}", case) for i, case in enumerate(cases)]
    return ".version 9.0\n.target sm_90\n.address_size 64\n" + "\n".join(kernels)


def matches(t, got, want):
    if want is None or callable(want):
        return want is None or want(got)
    if isinstance(want, tuple):
        return all(
            matches(t[:-2], got >> s & 0xFFFF, w) for s, w in zip((0, 16), want, strict=True)
        )
    want &= (1 << size(t)) - 1
    f = FORMATS.get(t)
    return got == want or f is not None and f.is_nan(got) and f.is_nan(want)


def array(t, values):
    n = max(size(t), 8)
    return np.array([v & ((1 << n) - 1) for v in values], f"u{n // 8}")


def readable(x):
    return f"{x:#x}" if isinstance(x, int) else str(x)


def check(cases):
    """Run every case, and name each that is wrong with its first wrong operands."""
    wrong = []
    with ptx.load(module(cases)).run(arch=90) as run:
        for i, case in enumerate(cases):
            columns = operands(case)
            rows = len(columns[0])
            arrays = [array(t, column) for t, column in zip(case.ins, columns, strict=True)]
            arrays.append(np.zeros(rows, f"u{max(size(case.out), 8) // 8}"))
            addresses = [run.buffer(x) for x in arrays]
            run.launch(f"k{i}", (rows // THREADS, 1, 1), (THREADS, 1, 1), addresses)
            bad = 0
            for row, inputs in enumerate(zip(*columns, strict=True)):
                got = int(arrays[-1][row])
                if case.per_warp:
                    first = row & -32
                    warp = [column[first : first + 32] for column in columns]
                    want = case.want(row - first, *warp)
                else:
                    want = case.want(*inputs)
                types = [case.out]
                if case.memory:
                    got, types = (got, int(arrays[0][row])), [case.out, case.ins[0]]
                else:
                    got, want = (got,), (want,)
                if not all(map(matches, types, got, want)):
                    bad += 1
                    if bad == 1:
                        shown = [" ".join(map(readable, x)) for x in (inputs, got, want)]
                        wrong += ["{}: {} gave {}, not {}".format(case.text, *shown)]
            if bad > 1:
                wrong[-1] += f", and {bad - 1} more of {rows}"
    assert not wrong, "\n" + "\n".join(wrong)


# --- integers ---


def quotient(a, b):
    if b == 0:
        return None
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def remainder(a, b):
    return None if b == 0 else a - b * quotient(a, b)


def integer_cases(t):
    n, (lo, hi), two, three = size(t), limits(t), (t, t), (t, t, t)
    counts = {1: [0, 1, n - 1, n, n + 1, 31, 32, 33, 63, 64, 65, 255, 256, FULL]}
    yield Case(f"add.{t}", t, two, lambda a, b: a + b)
    yield Case(f"sub.{t}", t, two, lambda a, b: a - b)
    yield Case(f"mul.lo.{t}", t, two, lambda a, b: a * b)
    yield Case(f"mul.hi.{t}", t, two, lambda a, b: a * b >> n)
    yield Case(f"mad.lo.{t}", t, three, lambda a, b, c: a * b + c)
    yield Case(f"mad.hi.{t}", t, three, lambda a, b, c: (a * b >> n) + c)
    yield Case(f"sad.{t}", t, three, lambda a, b, c: abs(a - b) + c)
    yield Case(f"div.{t}", t, two, quotient)
    yield Case(f"rem.{t}", t, two, remainder)
    yield Case(f"min.{t}", t, two, min)
    yield Case(f"max.{t}", t, two, max)
    yield Case(f"shr.{t}", t, (t, "u32"), lambda a, b: a >> min(b, n), counts)
    yield Case(f"shl.b{n}", t, (t, "u32"), lambda a, b: a << min(b, n), counts)
    if n < 64:
        wide = f"{t[0]}{2 * n}"
        yield Case(f"mul.wide.{t}", wide, two, lambda a, b: a * b)
        yield Case(f"mad.wide.{t}", wide, (t, t, wide), lambda a, b, c: a * b + c)
    if t[0] == "s":
        yield Case(f"abs.{t}", t, (t,), abs)
        yield Case(f"neg.{t}", t, (t,), lambda a: -a)
    else:
        b = f"b{n}"
        yield Case(f"and.{b}", b, two, lambda a, b: a & b)
        yield Case(f"or.{b}", b, two, lambda a, b: a | b)
        yield Case(f"xor.{b}", b, two, lambda a, b: a ^ b)
        yield Case(f"not.{b}", b, (t,), lambda a: ~a)
        yield Case(f"cnot.{b}", b, (t,), lambda a: a == 0)
    if t == "s32":
        yield Case(f"add.sat.{t}", t, two, lambda a, b: clamp(a + b, lo, hi))
        yield Case(f"sub.sat.{t}", t, two, lambda a, b: clamp(a - b, lo, hi))
        yield Case(f"mad.hi.sat.{t}", t, three, lambda a, b, c: clamp((a * b >> n) + c, lo, hi))
    if n == 32:
        half = [signed(x, 24) if t == "s32" else x for x in (0, 1, 0xFFFFFF, 0x800000, 0x123456)]
        short = {0: half, 1: half}
        yield Case(f"mul24.lo.{t}", t, two, lambda a, b: a * b, short)
        yield Case(f"mul24.hi.{t}", t, two, lambda a, b: a * b >> 16, short)
        yield Case(f"mad24.lo.{t}", t, three, lambda a, b, c: a * b + c, short)


def extract(t, a, at, length):
    at, length, n = at & 0xFF, length & 0xFF, size(t)
    sign = length and a >> min(at + length - 1, n - 1) & 1 and t[0] == "s"
    field = (a & (1 << n) - 1) >> at & (1 << length) - 1
    return field | (-1 << max(0, min(length, n - at)) if sign else 0)


def insert(n, a, b, at, length):
    at, length = at & 0xFF, length & 0xFF
    mask = (1 << length) - 1 << at & (1 << n) - 1
    return b & ~mask | a << at & mask


def find(t, a):
    a = ~a if a < 0 else a
    return a.bit_length() - 1


def from_shift(t, a):
    return -1 if find(t, a) < 0 else size(t) - 1 - find(t, a)


def reverse(n, a):
    return int(f"{a:0{n}b}"[::-1], 2)


def mask(mode, a, b):
    over = mode == "clamp" and (a >= 32 or b >= 32)
    start, stop = a & 31, (a & 31) + (b & 31)
    if mode == "clamp" and a >= 32:
        return 0
    return (FULL << start) & (FULL if over else ~(FULL << stop))


def extend(t, mode, a, b):
    if mode == "clamp" and b >= 32:
        return a
    b &= 31
    return 0 if b == 0 else signed(a, b) if t == "s32" else a & (1 << b) - 1


def permute(mode, a, b, c):
    source = a | b << 32
    places = {
        "": [c >> 4 * i & 7 for i in range(4)],
        ".f4e": [(c & 3) + i for i in range(4)],
        ".b4e": [(c & 3) - i & 7 for i in range(4)],
        ".rc8": [c & 3] * 4,
        ".ecl": [max(c & 3, i) for i in range(4)],
        ".ecr": [min(c & 3, i) for i in range(4)],
        ".rc16": [2 * (c & 1) + (i & 1) for i in range(4)],
    }[mode]
    taken = [source >> 8 * i & 0xFF for i in places]
    if mode == "":
        taken = [(x >> 7) * 0xFF if c >> 4 * i & 8 else x for i, x in enumerate(taken)]
    return sum(x << 8 * i for i, x in enumerate(taken))


def funnel(left, mode, a, b, c):
    c = min(c, 32) if mode == "clamp" else c & 31
    both = b << 32 | a
    return both << c >> 32 if left else both >> c


def dot(width, at, bt, first, a, b, c):
    """dp4a, and dp2a where width is 16: its b's bytes begin at byte `first`."""

    def part(t, x, i, n):
        x = x >> i * n & (1 << n) - 1
        return signed(x, n) if t == "s32" else x

    return c + sum(part(at, a, i, width) * part(bt, b, i + first, 8) for i in range(32 // width))


def find_nth(bits, base, offset):
    if offset == 0:
        return base if bits >> base & 1 else -1
    step = 1 if offset > 0 else -1
    found = [i for i in range(base, 32 if step > 0 else -1, step) if bits >> i & 1]
    return found[abs(offset) - 1] if len(found) >= abs(offset) else -1


def lookup(table, a, b, c):
    inputs = [(a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c) for i in range(8)]
    return sum((x & FULL) for i, x in enumerate(inputs) if table >> i & 1)


def bit_cases():
    P = functools.partial
    places = [0, 1, 5, 8, 31, 32, 33, 63, 64, 65, 200, 255]
    near = [0, 1, 4, 15, 30, 31, 32, 33, 64, FULL]
    for t in WORDS:
        n = size(t)
        yield Case(f"bfe.{t}", t, (t, "u32", "u32"), P(extract, t), {1: places, 2: places})
        yield Case(f"bfind.{t}", "u32", (t,), P(find, t))
        yield Case(f"bfind.shiftamt.{t}", "u32", (t,), P(from_shift, t))
        if t[0] == "u":
            ins = (t, t, "u32", "u32")
            yield Case(f"bfi.b{n}", t, ins, P(insert, n), {2: places, 3: places})
            yield Case(f"brev.b{n}", t, (t,), P(reverse, n))
            yield Case(f"clz.b{n}", "u32", (t,), lambda a, n=n: n - a.bit_length())
            yield Case(f"popc.b{n}", "u32", (t,), int.bit_count)
    u, uu, uuu = "u32", ("u32", "u32"), ("u32", "u32", "u32")
    for mode in ("clamp", "wrap"):
        yield Case(f"bmsk.{mode}.b32", u, uu, P(mask, mode), {0: near, 1: near})
        yield Case(f"szext.{mode}.u32", u, uu, P(extend, "u32", mode), {1: near})
        yield Case(f"szext.{mode}.s32", "s32", ("s32", u), P(extend, "s32", mode), {1: near})
        for left in (False, True):
            shift = f"shf.{'l' if left else 'r'}.{mode}.b32"
            yield Case(shift, u, uuu, P(funnel, left, mode), {2: near})
    for mode in ("", ".f4e", ".b4e", ".rc8", ".ecl", ".ecr", ".rc16"):
        yield Case(f"prmt.b32{mode}", u, uuu, P(permute, mode))
    for at, bt in itertools.product(("u32", "s32"), repeat=2):
        ins = ("u32", "u32", "s32" if "s32" in (at, bt) else "u32")
        yield Case(f"dp4a.{at}.{bt}", ins[2], ins, P(dot, 8, at, bt, 0))
        yield Case(f"dp2a.lo.{at}.{bt}", ins[2], ins, P(dot, 16, at, bt, 0))
        yield Case(f"dp2a.hi.{at}.{bt}", ins[2], ins, P(dot, 16, at, bt, 2))
    picks = {1: list(range(32)), 2: [*range(-33, 34)]}
    yield Case("fns.b32", u, (u, u, "s32"), find_nth, picks)
    rng = random.Random(3)
    for table in [
        0x00,
        0xFF,
        0x80,
        0xFE,
        0x96,
        0xE8,
        0xCA,
        *(rng.getrandbits(8) for _ in "12345678"),
    ]:
        yield Case(f"lop3.b32 %d, %a, %b, %c, {table:#x};", u, uuu, P(lookup, table))


def carry_cases():
    def one(n):
        return lambda a, b, c: c + (a + b >> n)

    def chain(n):
        def want(a, b, c):
            second = b + c + (a + b >> n)
            return second + (second >> n) + a

        return want

    def borrow(n):
        def want(a, b, c):
            second = b - c - (a < b)
            return (second & (1 << n) - 1) - a - (second < 0)

        return want

    def low(n):
        return lambda a, b, c: a * b + c + ((a * b >> n) + c >> n)

    for t in ("u32", "u64"):
        n, ins = size(t), (t, t, t)
        text = f"add.cc.{t} %d, %a, %b; addc.{t} %d, %c, 0;"
        yield Case(text, t, ins, one(n))
        text = f"add.cc.{t} %d, %a, %b; addc.cc.{t} %d, %b, %c; addc.{t} %d, %d, %a;"
        yield Case(text, t, ins, chain(n))
        text = f"sub.cc.{t} %d, %a, %b; subc.cc.{t} %d, %b, %c; subc.{t} %d, %d, %a;"
        yield Case(text, t, ins, borrow(n))
        text = f"mad.lo.cc.{t} %d, %a, %b, %c; madc.hi.{t} %d, %a, %b, 0;"
        yield Case(text, t, ins, lambda a, b, c, n=n: a * b + c >> n)
        text = f"mad.hi.cc.{t} %d, %a, %b, %c; madc.lo.{t} %d, %a, %b, %c;"
        yield Case(text, t, ins, low(n))


# --- floats ---


def rounded_cases(name):
    """add, sub, mul and fma in every rounding, with .ftz and .sat, and packed."""
    f = FORMATS[name]
    short = size(name) == 16
    flags = {"f32": [True, False], "f16": [True, False]}.get(name, [False])
    for (op, function), mode, ftz, sat in itertools.product(
        [("add", add), ("sub", sub), ("mul", mul), ("fma", fma)],
        ["", "rn"] if short else ["", *ROUNDINGS],
        flags,
        flags,
    ):
        if op == "fma" and not mode:
            continue
        opcode = op + f".{mode}" * bool(mode) + ".ftz" * ftz + ".sat" * sat
        exact = functools.partial(function, f, mode or "rn")
        want = modified(f, exact, ftz, sat)
        ins = (name,) * (3 if op == "fma" else 2)
        yield Case(f"{opcode}.{name}", name, ins, want)
        if short:
            x2 = f"{name}x2"
            yield Case(f"{opcode}.{x2}", x2, (x2,) * len(ins), paired(want))
            if op == "fma" and not ftz and not sat:
                want = modified(f, exact, relu=True)
                yield Case(f"fma.rn.relu.{name}", name, ins, want)
                yield Case(f"fma.rn.relu.{x2}", x2, (x2,) * 3, paired(want))


def sign_cases(name):
    """neg, abs, min, max, and for the wide ones copysign and testp."""
    f, short, ins = FORMATS[name], size(name) == 16, (name, name)
    flush = {"f32": [False, True], "f16": [False, True]}.get(name, [False])

    def both(opcode, ins, want):
        yield Case(f"{opcode}.{name}", name, ins, want)
        if short:
            x2 = f"{name}x2"
            yield Case(f"{opcode}.{x2}", x2, (x2,) * len(ins), paired(want))

    for ftz in flush:
        tail = ".ftz" * ftz
        yield from both(f"neg{tail}", ins[:1], modified(f, lambda a: a ^ 1 << f.sign_at, ftz))
        yield from both(f"abs{tail}", ins[:1], modified(f, lambda a: a & f.nan, ftz))
        for most, nan in itertools.product([False, True], [False, True]):
            opcode = ("max" if most else "min") + tail + ".NaN" * nan
            want = functools.partial(extreme, f, most, nan)
            if not nan or name != "f64":
                yield from both(opcode, ins, modified(f, want, ftz))
    if not short:
        sign = 1 << f.sign_at
        yield Case(f"copysign.{name}", name, ins, lambda a, b: a & sign | b & f.nan)
        least = 1 << f.mantissa
        for kind, test in {
            "finite": lambda a: a < f.inf,
            "infinite": lambda a: a == f.inf,
            "number": lambda a: a <= f.inf,
            "notanumber": lambda a: a > f.inf,
            "normal": lambda a: a == 0 or least <= a < f.inf,
            "subnormal": lambda a: 0 < a < least,
        }.items():
            want = functools.partial(lambda test, a: test(a & f.nan), test)
            yield Case(f"testp.{kind}.{name}", "pred", ins[:1], want)


def division_cases(name):
    f = FORMATS[name]
    for mode, ftz in itertools.product(ROUNDINGS, [False, True] if name == "f32" else [False]):
        for op, function in (("div", div), ("rcp", rcp), ("sqrt", sqrt)):
            want = modified(f, functools.partial(function, f, mode), ftz)
            ins = (name,) * (2 if op == "div" else 1)
            yield Case(f"{op}.{mode}{'.ftz' * ftz}.{name}", name, ins, want)


# --- comparisons ---

ORDERED = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}
UNSIGNED = {"lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge}


def float_comparisons(f, ftz=False):
    """Every comparison of a float type, by name, on bits."""

    def on_values(test, unordered):
        def want(a, b):
            a, b = (f.value(f.flush(x) if ftz else x) for x in (a, b))
            return int(unordered if a != a or b != b else test(a, b))

        return want

    tests = {name: on_values(test, False) for name, test in ORDERED.items()}
    tests |= {f"{name}u": on_values(test, True) for name, test in ORDERED.items()}
    tests["num"] = on_values(lambda a, b: True, False)
    tests["nan"] = on_values(lambda a, b: False, True)
    return tests


def comparison_cases():
    def combined(test, boolean, negated):
        return lambda a, b, c: boolean(test(a, b), c ^ negated)

    booleans = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}
    tables = {t: ORDERED | (UNSIGNED if t[0] == "u" else {}) for t in INTEGERS}
    tables |= {f"b{n}": {k: ORDERED[k] for k in ("eq", "ne")} for n in (16, 32, 64)}
    tables |= {t: float_comparisons(f) for t, f in FORMATS.items()}
    tables["ftz.f32"] = float_comparisons(FORMATS["f32"], ftz=True)
    tables["ftz.f16"] = float_comparisons(FORMATS["f16"], ftz=True)
    for t, tests in tables.items():
        plain = t.removeprefix("ftz.")
        for cmp, test in tests.items():
            yield Case(f"setp.{cmp}.{t}", "pred", (plain, plain), test)
            if plain in ("f32", "s32", "u64", "f64"):
                want = functools.partial(lambda test, a, b: -int(test(a, b)), test)
                yield Case(
                    f"set.{cmp}.{t.replace(plain, 'u32.' + plain)}", "u32", (plain,) * 2, want
                )
                want = functools.partial(lambda test, a, b: 0x3F800000 * test(a, b), test)
                yield Case(
                    f"set.{cmp}.{t.replace(plain, 'f32.' + plain)}", "f32", (plain,) * 2, want
                )
            for (name, boolean), negated in itertools.product(booleans.items(), (0, 1)):
                if t in ("s32", "f32") and cmp in ("lt", "ne"):
                    text = f"setp.{cmp}.{name}.{t} %d|%q, %a, %b, {'!' * negated}%c;"
                    want = combined(test, boolean, negated)
                    yield Case(text, "pred", (t, t, "pred"), want)
                    text = f"setp.{cmp}.{name}.{t} %q|%d, %a, %b, {'!' * negated}%c;"
                    want = combined(lambda a, b, test=test: 1 - test(a, b), boolean, negated)
                    yield Case(text, "pred", (t, t, "pred"), want)
    for t in ("b16", "b32", "b64", "u16", "s32", "u64", "f32", "f64"):
        yield Case(f"selp.{t}", t, (t, t, "pred"), lambda a, b, c: a if c else b)
    want = lambda a, b, c: a if c >= 0 else b  # noqa: E731
    yield Case("slct.s32.s32", "s32", ("s32",) * 3, want, {2: [-9, -1, 0, 1, 9]})
    for cmp in ("eq", "lt", "geu"):
        test = float_comparisons(FORMATS["f16"])[cmp]
        one = paired(lambda a, b, test=test: 0x3C00 * test(a, b))
        yield Case(f"set.{cmp}.f16x2.f16x2", "f16x2", ("f16x2", "f16x2"), one)
    for op, function in booleans.items():
        yield Case(f"{op}.pred", "pred", ("pred", "pred"), function)
    yield Case("not.pred", "pred", ("pred",), lambda a: 1 - a)


# --- conversions ---


def to_integer(f, t, mode, ftz, bits):
    sign, x = f.decode(f.flush(bits) if ftz else bits)
    if x != x:
        top = 1 << size(t) - 1
        return (limits(t)[0] or top) if f.name == "f64" or size(t) == 64 else 0
    whole = x if x == math.inf else shifted(x, f.scale, mode, sign)
    return clamp(-whole if sign else whole, *limits(t))


def to_integral(f, mode, bits):
    sign, x = f.decode(bits)
    if x != x or x == math.inf:
        return bits
    whole = shifted(x, f.scale, mode, sign)
    return f.round(-whole if sign else whole, 0, "rn", sign)


def convert(source, target, mode, bits):
    sign, x = source.decode(bits)
    if x != x or x == math.inf:
        return target.nan if x != x else target.signed(sign, target.inf)
    return target.round(-x if sign else x, source.scale, mode, sign)


def conversion_cases():
    P = functools.partial
    whole = [*INTEGERS, "u8", "s8"]
    for source, target in itertools.product(whole, whole):
        # What is narrower than its register fills it, by its own sign.
        out = target if size(target) > 8 else f"{target[0]}32"
        limit = limits(target)
        n = size(target)
        cut = signed if target[0] == "s" else lambda a, n: a & (1 << n) - 1
        if source != target:
            yield Case(f"cvt.{target}.{source}", out, (source,), lambda a, cut=cut, n=n: cut(a, n))
            if limits(source)[0] < limit[0] or limits(source)[1] > limit[1]:
                want = P(lambda limit, a: clamp(a, *limit), limit)
                yield Case(f"cvt.sat.{target}.{source}", out, (source,), want)
    for t, (name, f), mode in itertools.product(whole, FORMATS.items(), ROUNDINGS):
        if name == "bf16" and size(t) == 8:
            continue
        if name != "bf16" or mode == "rn":
            yield Case(
                f"cvt.{mode}.{name}.{t}", name, (t,), P(lambda f, m, a: f.round(a, 0, m), f, mode)
            )
        out = t if size(t) > 8 else f"{t[0]}32"
        yield Case(f"cvt.{mode}i.{t}.{name}", out, (name,), P(to_integer, f, t, mode, False))
        if name == "f32":
            yield Case(f"cvt.{mode}i.ftz.{t}.f32", out, (name,), P(to_integer, f, t, mode, True))
    for (a, source), (b, target) in itertools.product(FORMATS.items(), FORMATS.items()):
        narrower = target.mantissa < source.mantissa or {a, b} == {"f16", "bf16"}
        modes = ROUNDINGS if narrower else [""]
        if b == "bf16":
            modes = ["rn", "rz"] if a == "f32" else ["rn"]
        for mode in modes if a != b else []:
            opcode, exact = (
                "cvt" + f".{mode}" * bool(mode),
                P(convert, source, target, mode or "rn"),
            )
            yield Case(f"{opcode}.{b}.{a}", b, (a,), exact)
            if "bf16" not in (a, b):
                yield Case(f"{opcode}.sat.{b}.{a}", b, (a,), modified(target, exact, sat=True))
            if {a, b} == {"f32", "f64"}:
                # .ftz is about the f32 side alone.
                def want(x, source=source, target=target, exact=exact):
                    if source.name == "f32":
                        return exact(source.flush(x))
                    return target.flush(exact(x))

                yield Case(f"{opcode}.ftz.{b}.{a}", b, (a,), want)
    for name, f in FORMATS.items():
        for mode in ROUNDINGS:
            exact = P(to_integral, f, mode)
            yield Case(f"cvt.{mode}i.{name}.{name}", name, (name,), exact)
            if name == "f32":
                want = modified(f, exact, ftz=True)
                yield Case(f"cvt.{mode}i.ftz.f32.f32", name, (name,), want)
    yield Case("cvt.sat.f32.f32", "f32", ("f32",), FORMATS["f32"].saturate)
    for name, mode, relu in itertools.product(("f16", "bf16"), ("rn", "rz"), (False, True)):
        x2, f = f"{name}x2", FORMATS[name]
        one = modified(f, P(convert, FORMATS["f32"], f, mode), relu=relu)
        opcode = f"cvt.{mode}{'.relu' * relu}"
        yield Case(f"{opcode}.{x2}.f32", x2, ("f32", "f32"), P(lambda g, a, b: (g(b), g(a)), one))


# --- approximations, within the errors that the PTX ISA states ---


class Near(NamedTuple):
    """Accepts the bits of a number that is as near as a bound on the error demands."""

    f: Format
    exact: float
    relative: float = 0.0
    absolute: float = 0.0
    ulps: float = 0.0
    ftz: bool = False

    def __call__(self, bits):
        f, exact, got = self.f, self.exact, self.f.value(bits)
        if exact != exact or got != got:
            return exact != exact and got != got
        if math.isinf(exact) or exact == 0 and self.absolute == 0:
            return got == exact and math.copysign(1, got) == math.copysign(1, exact)
        least, most = 2.0 ** (f.mantissa - f.scale), f.value(f.inf - 1)
        ulp = 2.0 ** max(math.frexp(exact)[1] - 1 - f.mantissa, -f.scale)
        bound = max(self.relative * abs(exact), self.absolute, self.ulps * ulp)
        if self.ftz and abs(got) < least:
            return got == 0 and abs(exact) - bound < least
        if math.isinf(got):
            return got * exact > 0 and abs(exact) + max(bound, ulp) > most
        return abs(got - exact) <= bound


def real_exp2(x):
    return 2.0 ** clamp(x, -1100, 1020) if x == x else x


def real_log2(x):
    return math.nan if x != x or x < 0 else -math.inf if x == 0 else math.log2(x)


def real_rsqrt(x):
    if x == 0:
        return math.copysign(math.inf, x)
    return math.nan if x != x or x < 0 else 1 / math.sqrt(x)


def real_sqrt(x):
    return x if x == 0 else math.nan if x != x or x < 0 else math.sqrt(x)


def real_rcp(x):
    return math.copysign(math.inf, x) if x == 0 else 1 / x


def periodic(function):
    return lambda x: math.nan if math.isinf(x) else function(x)


def periodic_error(x):
    if abs(x) <= 2 * math.pi:
        return {"absolute": 2**-20.5}
    return {"absolute": 2**-14.7 if abs(x) <= 100 * math.pi else 2.0}


def log2_error(x):
    return {"absolute" if 0.5 < x < 2 else "relative": 2**-22}


def approximate(f, function, error, ftz=False):
    def want(bits):
        x = f.value(f.flush(bits) if ftz else bits)
        return Near(f, function(x), ftz=ftz, **(error(x) if callable(error) else error))

    return want


def approximation_cases():
    f32, f64 = FORMATS["f32"], FORMATS["f64"]
    # Sixteenths from far below the least result to above the largest.
    exponents = [*map(f32.round, range(-2500, 2100, 37), itertools.repeat(4)), *f32.values()]
    angles = [*map(f32.round, range(-320 * 64, 320 * 64, 97), itertools.repeat(6)), *f32.values()]
    for op, function, error, picks in (
        ("ex2", real_exp2, {"ulps": 2}, {0: exponents}),
        ("lg2", real_log2, log2_error, {}),
        ("sin", periodic(math.sin), periodic_error, {0: angles}),
        ("cos", periodic(math.cos), periodic_error, {0: angles}),
        ("rcp", real_rcp, {"ulps": 1}, {}),
        ("rsqrt", real_rsqrt, {"relative": 2**-22.9}, {}),
        ("sqrt", real_sqrt, {"relative": 2**-23}, {}),
    ):
        for ftz in (False, True):
            want = approximate(f32, function, error, ftz)
            yield Case(f"{op}.approx{'.ftz' * ftz}.f32", "f32", ("f32",), want, picks)
    want = approximate(f32, math.tanh, {"relative": 2**-11})
    yield Case("tanh.approx.f32", "f32", ("f32",), want)
    for name, ex2, bounds in (
        ("f16", "ex2.approx", (-9.9, -10.987)),
        ("bf16", "ex2.approx.ftz", (-7, -8)),
    ):
        f, x2 = FORMATS[name], f"{name}x2"
        want = approximate(f, real_exp2, {"relative": 2 ** bounds[0], "ulps": 0.5}, name == "bf16")
        yield Case(f"{ex2}.{name}", name, (name,), want)
        yield Case(f"{ex2}.{x2}", x2, (x2,), paired(want))
        want = approximate(f, math.tanh, {"absolute": 2 ** bounds[1]})
        yield Case(f"tanh.approx.{name}", name, (name,), want)
        yield Case(f"tanh.approx.{x2}", x2, (x2,), paired(want))

    def divide(full, ftz, a, b):
        a, b = (f32.value(f32.flush(x) if ftz else x) for x in (a, b))
        sign = math.copysign(1, a) * math.copysign(1, b)
        if a != a or b != b or a == b == 0 or math.isinf(a) and math.isinf(b):
            return Near(f32, math.nan)
        if not full and 2.0**126 < abs(b) < math.inf:
            return Near(f32, math.nan if math.isinf(a) else math.copysign(0, sign))
        if not full and 0 < abs(b) < 2.0**-126:
            return None
        if b == 0:
            return Near(f32, math.copysign(math.inf, sign))
        return Near(f32, a / b, ulps=2, ftz=ftz)

    for kind, ftz in itertools.product(("full", "approx"), (False, True)):
        want = functools.partial(divide, kind == "full", ftz)
        yield Case(f"div.{kind}{'.ftz' * ftz}.f32", "f32", ("f32", "f32"), want)

    def coarse(function):
        # No error is stated; the operand and the result have 20 bits of fraction.
        def want(bits):
            x = f64.value(f64.flush(bits & ~FULL))
            if f64.is_nan(bits):
                # Whether a NaN with nothing in its upper word is seen as one is not said.
                return (lambda got: got == f64.nan & ~FULL) if x != x else None
            fine = Near(f64, function(x), relative=2**-19, ftz=True)
            return lambda got: fine(got) and (got & FULL == 0 or f64.is_nan(got))

        return want

    yield Case("rcp.approx.ftz.f64", "f64", ("f64",), coarse(real_rcp))
    yield Case("rsqrt.approx.ftz.f64", "f64", ("f64",), coarse(real_rsqrt))
    yield Case("rsqrt.approx.f64", "f64", ("f64",), approximate(f64, real_rsqrt, {"ulps": 3}))


# --- moves, warps and atomics ---


def move_cases():
    for t, n in itertools.product(("u8", "s8", "u16", "s16", "u32", "s32"), (32, 64)):
        if size(t) < n:
            yield Case(f"ld.global.{t} %d, [%p0];", f"{t[0]}{n}", (t,), lambda a: a)
    text = "mov.b32 {%h, %k}, %a; mov.b32 %d, {%k, %h};"
    yield Case(f".reg .b16 %h, %k; {text}", "b32", ("b32",), lambda a: a << 16 | a >> 16)
    for text in ("mov.b64 {%u, %v}, %a;", "ld.global.v2.b32 {%u, %v}, [%p0];"):
        text += " mov.b64 %d, {%v, %u};"
        yield Case(text, "b64", ("b64",), lambda a: a << 32 | a >> 32)
    text = "and.b32 %d, %a, 0b1011; or.b32 %d, %d, 0x7F0U;"
    yield Case(text, "b32", ("b32",), lambda a: a & 11 | 0x7F0)
    yield Case("add.s32 %d, %a, -017;", "s32", ("s32",), lambda a: a - 15)
    text = "mul.lo.s64 %d, %a, -9223372036854775807;"
    yield Case(text, "s64", ("s64",), lambda a: a * -(2**63 - 1))
    want = functools.partial(add, FORMATS["f32"], "rn", 0xBFC00000)
    yield Case("add.f32 %d, %a, 0fBFC00000;", "f32", ("f32",), want)
    want = functools.partial(mul, FORMATS["f64"], "rn", 0x400921FB54442D18)
    yield Case("mul.f64 %d, %a, 0d400921FB54442D18;", "f64", ("f64",), want)


def shuffle(mode, lane, a, b, c):
    delta, limit, segment = b[lane] & 31, c[lane] & 31, c[lane] >> 8 & 31
    last, first = lane & segment | limit & ~segment, lane & segment
    source = {
        "up": lane - delta,
        "down": lane + delta,
        "bfly": lane ^ delta,
        "idx": first | delta & ~segment,
    }[mode]
    valid = source >= last if mode == "up" else source <= last
    return a[source if valid else lane] << 32 | valid


def ballot(values):
    return sum(1 << i for i, x in enumerate(values) if x)


def warp_cases():
    def case(text, out, ins, want, picks=None):
        return Case(text.replace("ALL", f"{FULL:#x}"), out, ins, want, picks or {}, per_warp=True)

    def same(values):
        return len(set(values)) == 1

    for (mode, test), picks in itertools.product(
        (("all", all), ("any", any), ("uni", same)), ([0, 1], [0], [1])
    ):
        text, want = (
            f"vote.sync.{mode}.pred %d, %a, ALL;",
            functools.partial(lambda f, _, a: f(a), test),
        )
        yield case(text, "pred", ("pred",), want, {0: picks})
        want = functools.partial(lambda f, _, a: f([1 - x for x in a]), test)
        yield case(text.replace("%a", "!%a"), "pred", ("pred",), want, {0: picks})
    text = "vote.sync.ballot.b32 %d, %a, ALL;"
    yield case(text, "b32", ("pred",), lambda _, a: ballot(a))
    second = "selp.b32 %v, 1, 0, %q; mov.b64 %d, {%v, %u};"
    for t in ("b32", "b64"):
        text, picks = f"match.any.sync.{t} %d, %a, ALL;", {0: [1, 2, limits(t)[1]]}
        yield case(text, "b32", (t,), lambda lane, a: ballot(x == a[lane] for x in a), picks)
        for picks in ([9], [8] * 40 + [9]):
            text = f"match.all.sync.{t} %u|%q, %a, ALL; {second}"
            yield case(text, "b64", (t,), lambda _, a: same(a) * (FULL << 32 | 1), {0: picks})
    bounds = [s << 8 | x for s in (0, 16, 24, 28, 30, 31) for x in (0, 1, 7, 15, 31)]
    for mode in ("up", "down", "bfly", "idx"):
        text, picks = (
            f"shfl.sync.{mode}.b32 %u|%q, %a, %b, %c, ALL; {second}",
            {1: range(40), 2: bounds},
        )
        yield case(text, "b64", ("u32",) * 3, functools.partial(shuffle, mode), picks)

    # Lanes whose b is set branch to the instruction, which names them alone; the rest get 0. Its
    # function is of the lane and of the values of those that take part.
    folds = {"add": sum, "min": min, "max": max}
    folds |= {
        f: functools.partial(functools.reduce, getattr(operator, f"{f}_")) for f in ("and", "or")
    }
    folds["xor"] = functools.partial(functools.reduce, operator.xor)
    operations = [
        ("activemask.b32 %d;", "u32", lambda _, x: sum(1 << i for i in x)),
        ("shfl.sync.idx.b32 %d, %a, %t, 31, %m;", "u32", lambda lane, x: x[lane]),
        (
            "match.any.sync.b32 %d, %a, %m;",
            "u32",
            lambda n, x: sum(1 << i for i in x if x[i] == x[n]),
        ),
        (
            "setp.eq.u32 %pa, %a, 5; vote.sync.ballot.b32 %d, %pa, %m;",
            "u32",
            lambda _, x: sum(1 << i for i in x if x[i] == 5),
        ),
    ]
    for op, fold in folds.items():
        for t in ("u32", "s32") if op in ("add", "min", "max") else ("b32",):
            want = functools.partial(lambda fold, _, x: fold(x.values()), fold)
            operations.append((f"redux.sync.{op}.{t} %d, %a, %m;", t, want))
    head = "setp.ne.u32 %q, %b, 0; vote.sync.ballot.b32 %m, %q, ALL; mov.b32 %d, 0; @!%q bra done;"
    for (text, t, function), taken in itertools.product(operations, ([1], [0, 1], [0, 0, 0, 1])):

        def want(lane, a, b, function=function):
            return function(lane, {i: x for i, x in enumerate(a) if b[i]}) if b[lane] else 0

        picks = {1: taken} | ({} if "redux" in text else {0: [5, 6, 7]})
        yield case(f"{head} {text} done:", t, (t, "u32"), want, picks)
    # Tiles of eight lanes, each naming its own lanes in the same instruction.
    head = "and.b32 %m, %t, 24; shl.b32 %m, 0xff, %m;"
    for text, t, function in operations:

        def want(lane, a, function=function):
            return function(lane, {i: a[i] for i in range(lane & 24, (lane & 24) + 8)})

        if "activemask" not in text:
            yield case(f"{head} {text}", t, (t,), want, {0: [5, 6, 7, 200]})


def atomic_cases():
    def plus(name, ftz=False):
        return modified(FORMATS[name], functools.partial(add, FORMATS[name], "rn"), ftz)

    operations = [("add", t, operator.add) for t in ("u32", "s32", "u64")]
    operations += [(op, t, f) for t in WORDS for op, f in (("min", min), ("max", max))]
    operations += [("inc", "u32", lambda a, b: 0 if a >= b else a + 1)]
    operations += [("dec", "u32", lambda a, b: b if a == 0 or a > b else a - 1)]
    for t in ("b32", "b64"):
        operations += [("and", t, operator.and_), ("or", t, operator.or_), ("xor", t, operator.xor)]
        operations += [("exch", t, lambda a, b: b)]
    operations += [("cas", t, lambda a, b, c: c if a == b else a) for t in ("b16", "b32", "b64")]
    operations += [("add", "f64", plus("f64"))]
    for t in ("f16", "bf16"):
        operations += [("add.noftz", t, plus(t)), ("add.noftz", f"{t}x2", paired(plus(t)))]
    for space in ("global", "shared"):
        # fp32 sums in global memory flush subnormals, in shared memory they do not.
        for op, t, function in [*operations, ("add", "f32", plus("f32", space == "global"))]:
            n, before, after, place = size(t), "", "", "%p0"
            if space == "shared":
                before = f"mov.u32 %u, slots; mad.lo.u32 %u, %t, 8, %u; st.shared.b{n} [%u], %a; "
                after = f" ld.shared.b{n} %a, [%u]; st.global.b{n} [%p0], %a;"
                place = "%u"
            want = functools.partial(lambda f, a, *b: (a, f(a, *b)), function)
            text = (
                f"{before}atom.{space}.{op}.{t} %d, [{place}], %b{', %c' * (op == 'cas')};{after}"
            )
            picks = {i: [0, 1, limits(t)[1]] for i in (0, 1)} if op == "cas" else {}
            yield Case(text, t, (t,) * (3 if op == "cas" else 2), want, picks, memory=True)
            if op not in ("exch", "cas"):
                text = f"{before}mov.b{n} %d, %a; red.{space}.{op}.{t} [{place}], %b;{after}"
                yield Case(text, t, (t, t), want, memory=True)
    scopes = ("relaxed.cta", "acquire.gpu", "release.gpu", "acq_rel.sys", "relaxed.cluster")
    for scope, space in itertools.product(scopes, (".global", "")):
        text = f"atom.{scope}{space}.add.u32 %d, [%p0], %b;"
        yield Case(text, "u32", ("u32", "u32"), lambda a, b: (a, a + b), memory=True)


GROUPS = {
    **{t: functools.partial(integer_cases, t) for t in INTEGERS},
    "bits": bit_cases,
    "carry": carry_cases,
    **{f"{t} add, mul, fma": functools.partial(rounded_cases, t) for t in FORMATS},
    **{f"{t} signs and extremes": functools.partial(sign_cases, t) for t in FORMATS},
    "f32 division": functools.partial(division_cases, "f32"),
    "f64 division": functools.partial(division_cases, "f64"),
    "comparisons": comparison_cases,
    "conversions": conversion_cases,
    "approximations": approximation_cases,
    "moves": move_cases,
    "warps": warp_cases,
    "atomics": atomic_cases,
}


@pytest.mark.parametrize("group", GROUPS)
def test_instructions(group):
    check(list(GROUPS[group]()))


CONTENDED = """
.version 9.0
.target sm_90
.address_size 64
.visible .entry count(.param .u64 cells, .param .u64 seen)
{
  .reg .b64 %cells, %seen;
  .reg .b32 %i, %n, %t, %d;
  ld.param.u64 %cells, [cells];
  ld.param.u64 %seen, [seen];
  mov.u32 %i, %ctaid.x;
  mov.u32 %n, %ntid.x;
  mov.u32 %t, %tid.x;
  mad.lo.u32 %i, %i, %n, %t;
  mad.wide.u32 %seen, %i, 8, %seen;
  atom.global.add.u32 %d, [%cells], 1;
  st.global.u32 [%seen], %d;
  atom.global.inc.u32 %d, [%cells+4], 6;
  st.global.u32 [%seen+4], %d;
  red.global.max.u32 [%cells+8], %i;
  red.global.add.f32 [%cells+12], 0f3F000000;
  ret;
}
"""


def test_atomics_of_all_threads_on_the_same_cells():
    blocks, threads = 5, 96
    n = blocks * threads
    cells, seen = np.zeros(4, "uint32"), np.zeros((n, 2), "uint32")
    with ptx.load(CONTENDED).run(arch=90, seed=3) as run:
        addresses = run.buffer(cells), run.buffer(seen, written=False)
        run.launch("count", (blocks, 1, 1), (threads, 1, 1), addresses)
    assert cells[:3].tolist() == [n, n % 7, n - 1]
    assert cells[3:].view("float32")[0] == n / 2
    assert sorted(seen[:, 0].tolist()) == list(range(n))
    assert sorted(seen[:, 1].tolist()) == sorted(i % 7 for i in range(n))


def test_an_unknown_instruction_is_named():
    case = Case("min.xorsign.abs.f32", "f32", ("f32", "f32"), lambda a, b: None)
    with pytest.raises(ptx.KernelError, match=r"unknown instruction.*min\.xorsign\.abs\.f32"):
        check([case])
