"""The emulator on code that is not ours: CUB, cooperative groups and cuRAND, with known answers.

Sums are of whole numbers that their type holds exactly, so that every order of adding is right.
"""

import ctypes
import functools
import importlib.util
import math
from pathlib import Path

import numpy as np
import ptx
import pytest

from kdkernels import _C

pytestmark = pytest.mark.skipif(ptx.toolkit() is None, reason="needs nvcc")

SOURCES = Path(__file__).resolve().parent / "ptx"
# What foreign.cu's LAUNCHERS gives each type: a block's threads, a logical warp's lanes, and the
# threads and the items a thread of the sort.
SIZES = {
    "int32": (128, 32, 128, 4),
    "uint64": (96, 16, 64, 3),
    "float32": (256, 32, 96, 5),
    "float64": (50, 8, 32, 7),
    "float16": (160, 12, 64, 4),
}


def curand_folder():
    """Where cuRAND's headers are: the toolkit, or the wheel that comes with torch for CUDA."""
    nvidia = importlib.util.find_spec("nvidia")
    wheels = nvidia.submodule_search_locations if nvidia else []
    folders = [ptx.toolkit().home / "include", *(Path(w) / "cu13/include" for w in wheels)]
    return next((folder for folder in folders if (folder / "curand_kernel.h").exists()), None)


@functools.cache
def library(name):
    include = [curand_folder()] if name == "foreign_curand" else []
    if None in include:
        pytest.skip("needs cuRAND's headers")
    return ptx.build(name, [SOURCES / f"{name}.cu"], arch=("75", "90"), include=include)


@pytest.fixture(params=[75, 90])
def arch(request):
    return request.param


def call(run, launcher, *arguments):
    """Call a launcher, with addresses as 64-bit integers."""
    given = [ctypes.c_uint64(x) if isinstance(x, int) and x > 0x7FFFFFFF else x for x in arguments]
    error = run.library.c[launcher](*given)
    run.check()
    assert error == 0


def numbers(shape, dtype, low=-3, high=4):
    """Whole numbers whose sums stay exact, in half precision too."""
    rng = np.random.default_rng(1)
    low = 0 if np.dtype(dtype).kind == "u" else low
    return rng.integers(low, high, shape).astype(dtype)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("valid", [1, 31, 50])
def test_cub_block_reduce(arch, name, valid):
    blocks, threads = 3, SIZES[name][0]
    x = numbers((blocks, threads, 3), name)
    out = np.zeros((2, blocks, 3), name)
    lib = library("foreign")
    with lib.run(arch=arch) as run:
        call(run, f"reduce_{name}", run.buffer(x), run.buffer(out, written=False), blocks, valid)
    sums = [x.sum((1, 2)), x.max((1, 2)), x[:, :valid, 0].sum(1)]
    np.testing.assert_array_equal(out, np.broadcast_to(np.stack(sums, 1), out.shape))


@pytest.mark.parametrize("name", SIZES)
def test_cub_block_scan(arch, name):
    blocks, threads = 2, SIZES[name][0]
    x = numbers((blocks, threads * 2), name)
    inclusive, exclusive = np.zeros((2, *x.shape), name), np.zeros((2, *x.shape), name)
    total = np.zeros((2, blocks), name)
    lib = library("foreign")
    with lib.run(arch=arch) as run:
        outs = [run.buffer(out, written=False) for out in (inclusive, exclusive, total)]
        call(run, f"scan_{name}", run.buffer(x), *outs, blocks)
    sums = x.cumsum(1, dtype=name)
    for algorithm in range(2):
        np.testing.assert_array_equal(inclusive[algorithm], sums)
        np.testing.assert_array_equal(exclusive[algorithm], sums - x)
        np.testing.assert_array_equal(total[algorithm], sums[:, -1])


def test_cub_block_scan_of_an_operator_that_does_not_commute(arch):
    blocks, threads = 2, 192
    x = np.random.default_rng(2).integers(0, 2**64, (blocks, threads), "uint64")
    out = np.zeros((2, blocks, threads), "uint64")
    lib = library("foreign")
    with lib.run(arch=arch) as run:
        call(run, "compose", run.buffer(x), run.buffer(out, written=False), blocks)
    for block in range(blocks):
        multiplier, constant = 1, 0
        for i, packed in enumerate(x[block].tolist()):
            m, c = packed >> 32, packed & 0xFFFFFFFF
            multiplier, constant = m * multiplier % 2**32, (m * constant + c) % 2**32
            assert out[0, block, i] == out[1, block, i] == multiplier << 32 | constant


@pytest.mark.parametrize("name", SIZES)
def test_cub_warp_reduce_and_scan(arch, name):
    blocks, width = 2, SIZES[name][1]
    x = numbers((blocks * 6, width), name, low=-9, high=9)
    sums, maxima = np.zeros(len(x), name), np.zeros(len(x), name)
    inclusive, exclusive = np.zeros_like(x), np.zeros_like(x)
    lib = library("foreign")
    with lib.run(arch=arch) as run:
        outs = [run.buffer(o, written=False) for o in (sums, maxima, inclusive, exclusive)]
        call(run, f"warp_{name}", run.buffer(x), *outs, blocks)
    want = x.cumsum(1, dtype=name)
    np.testing.assert_array_equal(sums, want[:, -1])
    np.testing.assert_array_equal(maxima, x.max(1))
    np.testing.assert_array_equal(inclusive, want)
    np.testing.assert_array_equal(exclusive, want - x)


@pytest.mark.parametrize("name", SIZES)
def test_cub_block_radix_sort(arch, name):
    blocks, threads, items = 2, *SIZES[name][2:]
    rng = np.random.default_rng(3)
    shape = (blocks, threads * items)
    if np.dtype(name).kind == "f":
        x = rng.normal(size=shape).astype(name)
        x[:, :4] = [math.inf, -math.inf, 1e-7, 0]
    else:
        info = np.iinfo(name)
        x = rng.integers(info.min, info.max, shape, name, endpoint=True)
    x[:, -9:] = x[:, :9]  # equal keys keep their order
    up, down, place = np.zeros_like(x), np.zeros_like(x), np.zeros(shape, "int32")
    lib = library("foreign")
    with lib.run(arch=arch) as run:
        outs = [run.buffer(out, written=False) for out in (up, place, down)]
        call(run, f"sort_{name}", run.buffer(x), *outs, blocks)
    order = np.argsort(x, 1, kind="stable")
    np.testing.assert_array_equal(place, order)
    np.testing.assert_array_equal(up, np.take_along_axis(x, order, 1))
    np.testing.assert_array_equal(down, up[:, ::-1])


def test_cooperative_groups(arch):
    blocks, threads = 2, 96
    n = blocks * threads
    rng = np.random.default_rng(4)
    x = rng.integers(0, 1000, n, "int32")
    x[:32], x[32:64] = 2 * x[:32], 2 * x[32:64] + 1  # a warp without odd numbers, one of them only
    floats = rng.integers(-50, 50, n).astype("float32")
    tiles, odd = np.zeros((3, n, 4), "int32"), np.zeros((n, 4), "int32")
    labeled, sums = np.zeros((n, 3), "int32"), np.zeros(n, "float32")
    lib = library("foreign")
    # cg looks for the n-th lane of a group where there may be none, shuffles from there all the
    # same, and then drops what it got.
    with lib.run(arch=arch, undefined_shuffles=True) as run:
        outs = [run.buffer(out, written=False) for out in (tiles, odd, labeled, sums)]
        call(run, "cooperative", run.buffer(x), run.buffer(floats), *outs, blocks, threads)
    for k, width in enumerate((32, 16, 4)):
        tile = x.reshape(-1, width)
        ballot = ((tile & 1).astype("int64") << np.arange(width)).sum(1, keepdims=True)
        want = [tile.sum(1, keepdims=True), tile.max(1, keepdims=True), tile.cumsum(1) - tile]
        want = np.stack([np.broadcast_to(w, tile.shape) for w in [*want, ballot]], 2)
        np.testing.assert_array_equal(tiles[k].reshape(want.shape), want.astype("int32"))
    for first in range(0, n, 32):
        warp = x[first : first + 32]
        got = odd[first : first + 32]
        assert (got[warp % 2 == 0] == -1).all()
        for leader in set(got[warp % 2 == 1, 3].tolist()):
            of = (warp % 2 == 1) & (got[:, 3] == leader)
            assert of.argmax() == leader
            np.testing.assert_array_equal(got[of, 0], np.full(of.sum(), warp[of].sum()))
            np.testing.assert_array_equal(got[of, 1], warp[of].cumsum())
            np.testing.assert_array_equal(got[of, 2], np.arange(of.sum()))
        for i, value in enumerate(warp):
            same = warp[warp % 5 == value % 5]
            want = [np.bitwise_xor.reduce(same), same.min(), len(same)]
            np.testing.assert_array_equal(labeled[first + i], want)
    np.testing.assert_array_equal(sums, floats.reshape(-1, 32).sum(1).repeat(32))


@pytest.mark.parametrize("size", [1, 2, 8])
def test_cooperative_groups_cluster(size):
    clusters, threads = 2, 64
    blocks = clusters * size
    x = np.random.default_rng(5).integers(0, 1000, (clusters, size, threads), "int32")
    out = np.zeros((clusters, size, 9), "int32")
    lib = library("foreign")
    with lib.run(arch=90) as run:
        outs = run.buffer(x), run.buffer(out, written=False)
        call(run, "cluster", *outs, blocks, threads, size)
    for cluster in range(clusters):
        counts = np.bincount(x[cluster].ravel() & 7, minlength=8)
        np.testing.assert_array_equal(out[cluster, :, :8], np.broadcast_to(counts, (size, 8)))
        np.testing.assert_array_equal(out[cluster, :, 8], np.roll(x[cluster].sum(1), -1))


SEED = 0x0123456789ABCDEF


def philox_words(seed, subsequence, offset, count):
    """cuRAND's stream from our Philox: counter = (block of 4 words, subsequence), key = seed."""
    key = [seed & 0xFFFFFFFF, seed >> 32]
    words = []
    for block in range(offset // 4, (offset + count + 3) // 4):
        counter = [block & 0xFFFFFFFF, block >> 32, subsequence & 0xFFFFFFFF, subsequence >> 32]
        words += _C.philox(counter, key)
    return words[offset % 4 :][:count]


@pytest.mark.parametrize("offset", [0, 5, 2**34 - 3])
def test_curand_philox(arch, offset):
    blocks, threads, calls, subsequence = 2, 40, 3, 2**32 - 7
    out = np.zeros((blocks * threads, 4 * calls), "uint32")
    lib = library("foreign_curand")
    with lib.run(arch=arch) as run:
        place = run.buffer(out, written=False)
        seeds = [ctypes.c_uint64(x) for x in (SEED, subsequence, offset)]
        call(run, "philox", *seeds, place, blocks, threads, calls)
    for i, row in enumerate(out.tolist()):
        assert row == philox_words(SEED, subsequence + i, offset, 4 * calls)


def test_curand_normals(arch):
    """Box-Muller on the same words, in fp64 but for the uniforms, which are fp32 numbers."""
    blocks, threads = 4, 64
    n = blocks * threads
    normals, uniforms = np.zeros((n, 4), "float32"), np.zeros((n, 4), "float32")
    doubles = np.zeros((n, 2))
    lib = library("foreign_curand")
    with lib.run(arch=arch) as run:
        outs = [run.buffer(out, written=False) for out in (normals, uniforms, doubles)]
        call(run, "normals", ctypes.c_uint64(SEED), *outs, blocks, threads)
    words = np.array([philox_words(SEED, i, 0, 12) for i in range(n)], "uint64")

    def uniform(x):
        # An fma and two roundings give the same number here: scaling is exact.
        return x.astype("float32") * np.float32(2**-32) + np.float32(2**-33)

    np.testing.assert_array_equal(uniforms, uniform(words[:, 4:8]))
    radius = np.sqrt(-2 * np.log(uniform(words[:, 0:4:2]).astype("float64")))
    angle = 2 * np.pi * (words[:, 1:4:2] + 0.5) * 2**-32
    want = np.stack([radius * np.sin(angle), radius * np.cos(angle)], 2).reshape(n, 4)
    # The PTX ISA states 2^-20.5 for sin.approx and cos.approx; the angle, up to 2 pi, is rounded
    # three times in fp32, 2^-22 each; logarithm, root and product have a few ulp.
    bound = radius.repeat(2, 1) * (2**-20.5 + 3 * 2**-22 + 2**-21)
    assert (np.abs(normals - want) <= bound).all()
    assert abs(normals.mean()) < 0.1 and abs(normals.std() - 1) < 0.1

    u, v = ((words[:, i] ^ words[:, i + 1] << np.uint64(21)) for i in (8, 10))
    radius = np.sqrt(-2 * np.log(u * 2.0**-53 + 2.0**-54))
    angle = np.pi * (v * 2.0**-52 + 2.0**-53)
    want = np.stack([radius * np.sin(angle), radius * np.cos(angle)], 1)
    np.testing.assert_allclose(doubles, want, rtol=0, atol=2e-14)


def xorwow(v):
    """A step of Marsaglia's xorwow on its five words, without the counter that is added."""
    t = v[0] ^ v[0] >> 2
    return [*v[1:], (v[4] ^ v[4] << 4 ^ t ^ t << 1) & 0xFFFFFFFF]


@functools.cache
def xorwow_subsequence():
    """2^67 steps as a matrix of bits: what parts one subsequence from the next."""
    matrix = np.zeros((160, 160), "int32")
    for i in range(160):
        v = xorwow([(1 << i >> 32 * k) & 0xFFFFFFFF for k in range(5)])
        matrix[:, i] = [v[k // 32] >> k % 32 & 1 for k in range(160)]
    for _ in range(67):
        matrix = matrix @ matrix & 1
    return matrix


@pytest.mark.parametrize("offset", [0, 1000])
def test_curand_xorwow(arch, offset):
    blocks, threads, calls = 1, 33, 6
    out = np.zeros((blocks * threads, calls), "uint32")
    lib = library("foreign_curand")
    with lib.run(arch=arch) as run:
        place = run.buffer(out, written=False)
        seeds = [ctypes.c_uint64(x) for x in (SEED, offset)]
        call(run, "xorwow", *seeds, place, blocks, threads, calls)
    # curand_kernel.h's seeding
    t0 = 1099087573 * ((SEED & 0xFFFFFFFF) ^ 0xAAD26B49)
    t1 = 2591861531 * ((SEED >> 32) ^ 0xF7DCEFDD)
    v = [123456789 + t0, 362436069 ^ t0, 521288629 + t1, 88675123 ^ t1, 5783321 + t0]
    v = [x & 0xFFFFFFFF for x in v]
    for row in out.tolist():
        now, counter = v, 6615241 + t1 + t0
        for step in range(offset + calls):
            now, counter = xorwow(now), counter + 362437
            if step >= offset:
                assert row[step - offset] == (now[4] + counter) & 0xFFFFFFFF
        bits = [v[k // 32] >> k % 32 & 1 for k in range(160)]
        bits = xorwow_subsequence() @ bits & 1
        v = [sum(int(bits[32 * k + j]) << j for j in range(32)) for k in range(5)]


def device_wide(run, launcher, *arguments):
    """CUB's two calls: how much storage, then the algorithm."""
    need = ctypes.c_size_t()
    call(run, launcher, None, ctypes.byref(need), *arguments)
    storage = run.buffer(np.zeros(max(need.value, 1), "uint8"), written=False)
    call(run, launcher, storage, ctypes.byref(need), *arguments)


# A tile waits for those before it: they must have started, as in the hardware's ascending order, or
# all of them must run at the same time.
@pytest.mark.parametrize("order", [{"shuffle": False}, {"resident": 4096}])
@pytest.mark.parametrize("n", [1, 1000, 30011])
def test_cub_device_wide(arch, n, order):
    rng = np.random.default_rng(6)
    floats, whole = rng.integers(-9, 9, n).astype("float32"), rng.integers(-99, 99, n, "int32")
    keys, values = rng.integers(0, 2**32, n, "uint32"), np.arange(n, dtype="int32")
    total, scanned = np.zeros(1, "float32"), np.zeros(n, "int32")
    sorted_keys, sorted_values = np.zeros_like(keys), np.zeros_like(values)
    lib = library("foreign_device")
    with lib.run(arch=arch, **order) as run:

        def out(x):
            return run.buffer(x, written=False)

        device_wide(run, "device_sum", run.buffer(floats), out(total), n)
        device_wide(run, "device_scan", run.buffer(whole), out(scanned), n)
        sorts = run.buffer(keys), out(sorted_keys), run.buffer(values), out(sorted_values)
        device_wide(run, "device_sort", *sorts, n)
    assert total[0] == floats.sum()
    np.testing.assert_array_equal(scanned, whole.cumsum() - whole)
    order = np.argsort(keys, kind="stable")
    np.testing.assert_array_equal(sorted_keys, keys[order])
    np.testing.assert_array_equal(sorted_values, order)
