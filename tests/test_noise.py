"""The noise ops: which numbers they are, that nothing else moves them, gradients, bad input."""

import hashlib
import io
import itertools
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import scipy.stats
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from nightly import examples
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

import kdkernels
from kdkernels import (
    _C,
    add_noise_,
    combine_noise_,
    gradient_noise,
    input_noise,
    noise_dot,
    perturbed_parameters,
    randn_like,
    reference,
    soft_regularization,
)
from kdkernels.noise import DISTRIBUTIONS, shard_of

pytestmark = pytest.mark.quick

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
MILLION = 2**20
# Of the 2^20 fp32 normals of seed 0, step 0, stream 0, little-endian, on every machine.
SHA256 = "8dcc6a9e4e617fdc4c7d4c8b986510139149bcff63e27331b8f7767f7694f75f"


def normals(n, dtype=torch.float32, **noise):
    return randn_like(torch.empty(n, dtype=dtype), **noise)


def bits(x):
    return x.reshape(-1).view(torch.uint8)


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def added(x, std, eps, multiplicative=False):
    """x + std * eps rounded once, or x + (std * eps) * x with std * eps rounded before: eps in
    fp32, and std in the dtype that the kernel computes in."""
    if x.dtype == torch.float64:
        return x + std * eps.double() * (x if multiplicative else 1)
    noise = torch.tensor(std, dtype=torch.float32).double() * eps.double()
    if multiplicative:
        noise = noise.float().double() * x.double()
    return (x.double() + noise).float().to(x.dtype)


# ---- which numbers -------------------------------------------------------------------------------

KNOWN_ANSWERS = [  # Random123's kat_vectors
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([2**32 - 1] * 4, [2**32 - 1] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "want"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, want):
    assert _C.philox(counter, key) == want
    words = reference.philox4x32_10(*([torch.tensor(w) for w in v] for v in (counter, key)))
    assert [w.item() for w in words] == want


ADDRESSES = [
    {"seed": 0},
    {"seed": 1, "step": 2, "stream": 3, "offset": 5},
    {"seed": -1, "step": 2**32 - 1, "stream": 2**32 - 1},
    {"seed": -(2**63), "step": 7},
    {"seed": 2**64 - 1, "stream": 9},
    {"seed": 0x0123456789ABCDEF, "offset": 2**34 - 6},  # the counter's high word sets in
    {"seed": 3, "offset": 2**62 + 1},
]


@pytest.mark.parametrize("address", ADDRESSES)
def test_normals_are_those_of_the_reference(address):
    x = torch.empty(50001)
    got, want = randn_like(x, **address), reference.randn_like(x, **address)
    # log, sqrt, sinpi and a product, each within an ulp.
    ulp = want.abs() * 2.0**-23
    assert ((got.double() - want.double()).abs() <= 4 * ulp).all()


def test_seeds_are_64_bits():
    assert same(normals(8, seed=-1), normals(8, seed=2**64 - 1))
    assert same(normals(8, seed=-(2**63)), normals(8, seed=2**63))


def test_every_part_of_the_address_matters():
    ways = [{"seed": 0}, {"seed": 1}, {"seed": 2**32}, {"seed": 0, "step": 1}]
    ways += [{"seed": 0, "stream": 1}, {"seed": 0, "offset": 4}, {"seed": 0, "offset": 2**34}]
    samples = torch.stack([normals(100000, **way) for way in ways]).double()
    correlation = torch.corrcoef(samples) - torch.eye(len(ways))
    assert correlation.abs().max() < 5 / math.sqrt(100000)


@pytest.mark.parametrize("address", [{"seed": 0}, {"seed": -7, "step": 12345, "stream": 77}])
def test_normals_are_normal(address):
    x = normals(MILLION, torch.float64, **address).numpy()
    # Five standard errors of each moment.
    assert abs(x.mean()) < 5 * math.sqrt(1 / MILLION)
    assert abs(x.var() - 1) < 5 * math.sqrt(2 / MILLION)
    assert abs(scipy.stats.skew(x)) < 5 * math.sqrt(6 / MILLION)
    assert abs(scipy.stats.kurtosis(x)) < 5 * math.sqrt(24 / MILLION)
    assert scipy.stats.kstest(x, "norm").pvalue > 1e-3
    # The tails: what lies beyond 4 sigma is a Poisson count of about 66.
    assert abs((np.abs(x) > 4).sum() - 66.4) < 5 * math.sqrt(66.4)
    assert np.abs(x).max() < 6.8


def test_neighbours_are_independent():
    x = normals(MILLION, torch.float64, seed=5)
    for lag in range(1, 9):
        a, b = x[:-lag], x[lag:]
        for f in (torch.clone, torch.square, torch.abs):
            r = torch.corrcoef(torch.stack([f(a), f(b)]))[0, 1]
            assert abs(r) < 5 / math.sqrt(MILLION), (lag, f)
    # Each place within a counter's four is normal by itself.
    for place in range(4):
        assert scipy.stats.kstest(x[place::4].numpy(), "norm").pvalue > 1e-3


# ---- the same bits -------------------------------------------------------------------------------


def digest(x):
    return hashlib.sha256(x.cpu().numpy().astype("<f4").tobytes()).hexdigest()


def test_sha256_on_every_isa_level(set_isa, isa_levels):
    for level in isa_levels:
        set_isa(level)
        assert digest(normals(MILLION, seed=0)) == SHA256, level


def ways_of_noise(x, **noise):
    """What every op that adds nothing up makes of a matrix."""
    std = torch.linspace(0, 2, x.numel()).reshape(x.shape)
    made = [randn_like(x, **noise)]
    for multiplicative in (False, True):
        options = noise | {"multiplicative": multiplicative}
        made += [input_noise(x, s, **options) for s in (0.3, std[:, :1], std[0], std)]
        add_noise_([y := x.clone(), z := x[0].clone()], [0.1, 0.2], **options)
        made += [y, z]
    combine_noise_(y := x.clone(), [0.5, -0.25, 1e-3], [1, -2, 3], step=4, offset=2)
    return [*made, y]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_isa_level_makes_the_same(dtype, distribution, set_isa, isa_levels):
    x = (10 * torch.randn(3, 1667, generator=torch.Generator().manual_seed(0))).to(dtype)
    results = []
    for level in isa_levels:
        set_isa(level)
        results.append(ways_of_noise(x, seed=1, step=2, offset=3, distribution=distribution))
    for level, result in zip(isa_levels, results, strict=True):
        assert all(same(y, z) for y, z in zip(result, results[0], strict=True)), level


@pytest.mark.parametrize("n", [1, 1000, 300001])
def test_any_number_of_threads(n, set_threads):
    results = []
    x = torch.randn(3, n, generator=torch.Generator().manual_seed(0))
    for threads in (1, 2, 3, 5):
        set_threads(threads)
        tensors = [torch.ones(n), torch.ones(17), torch.ones(n // 2, dtype=torch.bfloat16)]
        norms = torch.empty(3, 2, dtype=torch.float64)
        _C.add_noise_(tensors, [0.5], None, False, [3, 0, 0, 1, 1, 0, 0], [], norms)
        results.append([norms, noise_dot([x, *tensors], seed=3), *ways_of_noise(x, seed=3)])
        results[-1] += tensors
    for result in results:
        assert all(same(y, z) for y, z in zip(result, results[0], strict=True))


def test_python_threads_at_once():
    x = torch.ones(100000)
    want = [input_noise(x, 0.1, seed=s) for s in range(8)]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda s: input_noise(x, 0.1, seed=s), range(8)))
    assert all(same(g, w) for g, w in zip(got, want, strict=True))


@settings(max_examples=examples(60))
@given(st.integers(0, 5000), st.integers(0, 5000), st.sampled_from(DTYPES))
def test_a_shard_has_its_slice_of_the_noise(start, length, dtype):
    whole = normals(10000, dtype, seed=4, step=1)
    shard = normals(length, dtype, seed=4, step=1, offset=start)
    assert same(shard, whole[start : start + length])


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_share_the_noise(dtype, distribution):
    noise = {"seed": 6, "distribution": distribution}
    assert same(normals(4999, dtype, **noise), normals(4999, **noise).to(dtype))


def test_elements_count_row_major_whatever_the_strides():
    dense = torch.empty(6, 5, 4)
    want = randn_like(dense, seed=2)
    assert want.is_contiguous()
    for x in (
        torch.empty(4, 5, 6).permute(2, 1, 0),
        torch.empty(12, 5, 8)[::2, :, ::2],
        torch.empty(1).expand(6, 5, 4),
    ):
        got = randn_like(x, seed=2)
        assert got.is_contiguous() and same(got, want)
    images = torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert same(randn_like(images, seed=2), randn_like(torch.empty(2, 3, 4, 5), seed=2))


def test_empty_and_scalar_tensors():
    assert randn_like(torch.empty(0, 3), seed=0).shape == (0, 3)
    assert same(randn_like(torch.empty(()), seed=0), normals(1, seed=0)[0])


def test_values_are_not_read():
    x = torch.full((100,), math.nan)
    assert same(randn_like(x, seed=1), normals(100, seed=1))


# ---- seeds and steps -----------------------------------------------------------------------------


def test_no_seed_draws_from_torch():
    torch.manual_seed(3)
    first, second = normals(10), normals(10)
    assert not same(first, second)
    torch.manual_seed(3)
    assert same(normals(10), first) and same(normals(10), second)


def test_a_seed_leaves_torch_alone():
    before = torch.get_rng_state()
    normals(10, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_step_tensor(shape):
    step = torch.full(shape, 5)
    x = torch.randn(9, 7)
    assert same(randn_like(x, seed=1, step=step), randn_like(x, seed=1, step=5))
    assert same(input_noise(x, 0.1, seed=1, step=step), input_noise(x, 0.1, seed=1, step=5))
    a, b = x.clone(), x.clone()
    add_noise_(a, 0.1, seed=1, step=step)
    add_noise_(b, 0.1, seed=1, step=5)
    assert same(a, b)


# ---- add_noise_ ----------------------------------------------------------------------------------


def mixed_list():
    g = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(1000, generator=g),
        torch.randn(0, generator=g),
        torch.randn(33, 77, generator=g).bfloat16(),
        torch.randn(64, 40, generator=g).t(),
        torch.randn((), generator=g),
        torch.randn(3, 5, generator=g).half(),
        torch.randn(20, 40, generator=g)[::2, 1::3],
        torch.randn(50000, generator=g, dtype=torch.float64),
        torch.randn(2, 3, 4, 4, generator=g).to(memory_format=torch.channels_last),
    ]
    return tensors, [0.1 * k for k in range(len(tensors))]


@pytest.mark.parametrize("one_std", [False, True])
def test_add_noise_to_a_mixed_list(one_std):
    tensors, std = mixed_list()
    before = [t.clone() for t in tensors]
    strides = [t.stride() for t in tensors]
    add_noise_(tensors, 0.3 if one_std else std, seed=8, step=4, stream=100, offset=7)
    for k, (x, t) in enumerate(zip(before, tensors, strict=True)):
        like = torch.empty(x.shape)
        eps = randn_like(like, seed=8, step=4, stream=100 + k, offset=7)
        want = added(x, 0.3 if one_std else std[k], eps)
        if x.dtype == torch.float64:
            torch.testing.assert_close(t, want, rtol=1e-15, atol=1e-15)
        else:
            assert torch.equal(t, want), k
    assert strides == [t.stride() for t in tensors]


def test_one_tensor_is_a_list_of_one():
    a, b = torch.ones(7), torch.ones(7)
    add_noise_(a, 1, seed=0)
    add_noise_([b], [1.0], seed=0)
    assert same(a, b) and same(a, input_noise(torch.ones(7), 1, seed=0))


def test_a_tuple_or_a_generator_of_parameters():
    want = [input_noise(torch.ones(n), 0.1, seed=0, stream=n - 3) for n in (3, 4)]
    for kind in (tuple, iter):
        tensors = [torch.ones(3), torch.ones(4)]
        add_noise_(kind(tensors), 0.1, seed=0)
        assert all(same(t, w) for t, w in zip(tensors, want, strict=True))


def test_a_parameter_keeps_its_noise_when_others_leave():
    a, b, c = (torch.zeros(100) for _ in range(3))
    add_noise_([a, b], 1.0, seed=0)
    add_noise_([c], 1.0, seed=0, stream=1)
    assert same(b, c)


def test_neighbours_of_a_view_are_untouched():
    base = torch.zeros(10, 10)
    add_noise_(base[2:5, 1:9:3], 1.0, seed=0)
    written = torch.zeros(10, 10, dtype=torch.bool)
    written[2:5, 1:9:3] = True
    assert torch.equal(base != 0, written)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_rounded_once(dtype):
    x = torch.randn(10000, generator=torch.Generator().manual_seed(0)).to(dtype)
    eps = normals(10000, seed=9)
    once = added(x, 0.01, eps)
    assert torch.equal(input_noise(x, 0.01, seed=9), once)
    add_noise_(x_ := x.clone(), 0.01, seed=9)
    assert torch.equal(x_, once)
    assert not torch.equal(x + (0.01 * eps).to(dtype), once)  # the test can tell


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_overflow_and_not_finite(dtype):
    x = torch.tensor([math.inf, -math.inf, math.nan, torch.finfo(dtype).max, 0.0]).to(dtype)
    y = input_noise(x, 0.0, seed=0)
    torch.testing.assert_close(y, x, rtol=0, atol=0, equal_nan=True)
    assert input_noise(torch.zeros(4, dtype=torch.float16), 1e6, seed=0).isinf().all()


def test_no_noise_without_std():
    x = torch.randn(100)
    assert same(input_noise(x, 0.0, seed=0), x)


def test_version_counter():
    """Autograd must notice that a tensor it kept has changed."""
    w, x = torch.randn(5, requires_grad=True), torch.randn(5, requires_grad=True)
    y = w * x
    version = w._version
    with torch.no_grad():
        add_noise_([w], 0.1, seed=0)
    assert w._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    view = torch.zeros(4, 4)
    add_noise_(view.t(), 0.1, seed=0)
    assert view._version > 0


def test_inference_tensors():
    with torch.inference_mode():
        x = torch.zeros(10)
        add_noise_(x, 1.0, seed=0)
        assert same(x, normals(10, seed=0)) and same(randn_like(x, seed=0), x)
        assert same(input_noise(torch.zeros(10), 1.0, seed=0), x)


# ---- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_input_noise_hands_the_gradient_on(dtype):
    x = torch.randn(40, 30).to(dtype).requires_grad_()
    y = input_noise(x, 0.2, seed=1, step=3)
    assert torch.equal(y.detach(), input_noise(x.detach(), 0.2, seed=1, step=3))
    g = torch.randn(40, 30).to(dtype)
    y.backward(g)
    assert same(x.grad, g)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("std_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_std_learns(dtype, std_dtype, shape):
    x = torch.randn(40, 30).to(dtype)
    std = torch.full(shape, 0.25, dtype=std_dtype, requires_grad=True)
    y = input_noise(x, std, seed=1, step=3, offset=2)
    assert torch.equal(y.detach(), input_noise(x, 0.25, seed=1, step=3, offset=2))
    g = torch.randn(40, 30).to(dtype)
    y.backward(g)
    want = (g.double() * normals(1200, seed=1, step=3, offset=2).view(40, 30).double()).sum()
    assert std.grad.shape == shape and std.grad.dtype == std_dtype
    torch.testing.assert_close(std.grad.double().reshape(()), want, rtol=1e-6, atol=1e-6)


def test_std_tensor_without_gradient():
    x = torch.randn(40, requires_grad=True)
    y = input_noise(x, torch.tensor(0.25), seed=1)
    (g,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(g, torch.ones(40))


def test_forward_and_backward_see_one_noise_without_a_seed():
    x, std = torch.zeros(1000), torch.tensor(2.0, requires_grad=True)
    y = input_noise(x, std)
    y.sum().backward()
    torch.testing.assert_close(std.grad, y.detach().sum() / 2, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", ["input_noise", "gradient_noise"])
def test_a_step_tensor_may_move_on_before_backward(op):
    step = torch.tensor(3)
    x, std = torch.zeros(50, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    if op == "input_noise":
        y = input_noise(x, std, seed=1, step=step)
        step += 1
        y.sum().backward()
        torch.testing.assert_close(std.grad, normals(50, seed=1, step=3).sum())
    else:
        y = gradient_noise(x, 1.0, seed=1, step=step)
        step += 1
        y.backward(torch.zeros(50))
        assert same(x.grad, normals(50, seed=1, step=3))


def test_gradcheck():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    std = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)

    def noisy(x, std):
        return input_noise(x, std, seed=1, step=2, stream=3, offset=1) ** 2

    assert torch.autograd.gradcheck(noisy, (x, std))
    assert torch.autograd.gradgradcheck(noisy, (x, std))

    def linear(x, std):
        return input_noise(x, std, seed=1)

    assert torch.autograd.gradgradcheck(linear, (x, std))
    # The noise that gradient_noise adds to a gradient is a constant to the next derivative.
    assert torch.autograd.gradgradcheck(lambda x: gradient_noise(x, 0.1, seed=1), x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_noise(dtype):
    x = torch.randn(40, 30).to(dtype).requires_grad_()
    y = gradient_noise(x, 0.2, seed=1, step=3, stream=2)
    assert same(y.detach(), x.detach()) and y.data_ptr() == x.data_ptr()
    g = torch.randn(30, 40).to(dtype).t()
    y.backward(g)
    eps = randn_like(torch.empty(40, 30), seed=1, step=3, stream=2)
    torch.testing.assert_close(x.grad, added(g, 0.2, eps), rtol=1e-15, atol=1e-15)


def test_gradient_noise_twice():
    x = torch.randn(20, dtype=torch.float64, requires_grad=True)
    y = gradient_noise(x, 0.2, seed=1) ** 3
    (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    eps = normals(20, torch.float64, seed=1)
    torch.testing.assert_close(g, 3 * x**2 + 0.2 * eps, rtol=1e-12, atol=1e-12)
    (gg,) = torch.autograd.grad(g.sum(), x)
    # The second derivative passes through gradient_noise's forward once more, and gains its noise.
    torch.testing.assert_close(gg, 6 * x + 0.2 * eps, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["input_noise", "gradient_noise"])
def test_ops_agree_with_the_reference(name):
    x = torch.randn(30, 7, dtype=torch.float64)
    g = torch.randn(30, 7, dtype=torch.float64)
    results = []
    for where in (kdkernels, reference):
        leaf = x.clone().requires_grad_()
        y = getattr(where, name)(leaf, 0.3, seed=-5, step=1, stream=2, offset=3)
        y.backward(g)
        results.append((y.detach(), leaf.grad))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_add_noise_agrees_with_the_reference():
    tensors, std = mixed_list()
    others = [t.clone() for t in tensors]
    add_noise_(tensors, std, seed=8, step=4, stream=1)
    reference.add_noise_(others, std, seed=8, step=4, stream=1)
    for got, want in zip(tensors, others, strict=True):
        tolerance = 0.01 if got.dtype.itemsize == 2 else 1e-6
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


# ---- distributions and modes ---------------------------------------------------------------------

# SHA-256 of the 2^20 fp32 numbers of seed 0, step 0, stream 0, little-endian, on every machine.
SHA256_OF = {
    "normal": SHA256,
    "uniform": "1b3902372a09ebb06a3e1bb11a909aac6b80a1824a83f040ca05036d557c991d",
    "rademacher": "40994d6ec29bf228a4a7d481e98ba8b304cc11edfd74d964ccbc4009e338c798",
    "truncated_normal": "beb98e0612e0a9cdedf5a03559d087c7e76fc022b91ff957c2b7393a66f3b6d6",
    "laplace": "7b83280534b584d9fd784e8a036f06c03af74bb2a34eeba72462897b02e10613",
}
# The same of the normals in each dtype's own bytes.
SHA256_IN = {
    torch.float32: SHA256,
    torch.float64: "7433131d643e52269ed83c866ff924b5d81dc154e73699380d35dc07be061d28",
    torch.bfloat16: "83662b59921c9af61c0f588d5017ca1c09a8933fa49d5252475913b2c9e5998b",
    torch.float16: "821514f28b3505297c3cf54593f5ce95c292b333d6743a64ab116cb15e1d217c",
}


def own_digest(x):
    return hashlib.sha256(bits(x.cpu()).numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_sha256_of_every_distribution(distribution, set_isa, isa_levels, set_threads):
    for level in isa_levels:
        set_isa(level)
        assert (
            digest(normals(MILLION, seed=0, distribution=distribution)) == SHA256_OF[distribution]
        )
    set_threads(1)
    cuts = [0, 5, 1000, 300_001, MILLION]
    shards = [
        normals(end - begin, seed=0, distribution=distribution, offset=begin)
        for begin, end in itertools.pairwise(cuts)
    ]
    assert digest(torch.cat(shards)) == SHA256_OF[distribution]


@pytest.mark.parametrize("dtype", DTYPES)
def test_sha256_in_every_dtype(dtype, set_isa, isa_levels):
    for level in isa_levels:
        set_isa(level)
        assert own_digest(normals(MILLION, dtype, seed=0)) == SHA256_IN[dtype], level


def numpy_philox(counter, key):
    """Philox4x32-10 in NumPy's integers: counters [n, 4] and keys [n, 2], uint64 below 2^32."""
    c, k = counter.T.copy(), key.T.copy()
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        half = np.uint64(32)
        c = np.stack([(b >> half) ^ c[1] ^ k[0], b & low, (a >> half) ^ c[3] ^ k[1], a & low])
        k = (k + np.array([[0x9E3779B9], [0xBB67AE85]], dtype=np.uint64)) & low
    return c.T


def test_words_are_numpys():
    draw = np.random.default_rng(0)
    counter = draw.integers(0, 2**32, (3000, 4), dtype=np.uint64)
    key = draw.integers(0, 2**32, (3000, 2), dtype=np.uint64)
    want = numpy_philox(counter, key)
    got = [_C.philox(c, k) for c, k in zip(counter.tolist(), key.tolist(), strict=True)]
    assert np.array_equal(np.array(got, dtype=np.uint64), want)
    for c, k, words in KNOWN_ANSWERS:
        assert numpy_philox(np.array([c], np.uint64), np.array([k], np.uint64))[0].tolist() == words


def test_an_element_has_the_word_of_its_address():
    """Rademacher's signs show the top bit of word i % 4 of counter (i // 4, stream, step)."""
    seed, step, stream, n = 0x0123456789ABCDEF, 77, 5, 10_000
    index = 2**34 - 1000 + np.arange(n, dtype=np.uint64)
    block = index // np.uint64(4)
    counter = np.stack(
        [block & np.uint64(2**32 - 1), block >> np.uint64(32)]
        + [np.full(n, number, np.uint64) for number in (stream, step)],
        axis=1,
    )
    key = np.tile(np.array([seed & 0xFFFFFFFF, seed >> 32], np.uint64), (n, 1))
    words = numpy_philox(counter, key)[np.arange(n), (index % np.uint64(4)).astype(int)]
    signs = normals(
        n, seed=seed, step=step, stream=stream, offset=int(index[0]), distribution="rademacher"
    )
    assert np.array_equal(signs.numpy() < 0, words >= 2**31)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_every_way_agrees_with_the_reference(distribution, dtype):
    x = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    noise = {"seed": -5, "step": 1, "offset": 3, "distribution": distribution}
    tolerance = {2: 1e-2, 4: 2e-6, 8: 2e-6}[dtype.itemsize]

    def close(got, want):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)

    close(randn_like(x, **noise), reference.randn_like(x, **noise))
    close(noise_dot([x, x[0]], **noise), reference.noise_dot([x, x[0]], **noise))
    for multiplicative in (False, True):
        way = noise | {"multiplicative": multiplicative}
        for std in (0.3, torch.rand(50, 1), torch.rand(7), torch.rand(50, 7)):
            close(input_noise(x, std, **way), reference.input_noise(x, std, **way))
        results = []
        for where in (kdkernels, reference):
            tensors = [x.clone(), x[0].clone()]
            where.add_noise_(tensors, [0.1, 0.2], **way)
            leaf = x.clone().requires_grad_()
            where.gradient_noise(leaf, 0.2, **way).backward(x)
            results.append([*tensors, leaf.grad])
        for got, want in zip(*results, strict=True):
            close(got, want)


# ---- std by element ------------------------------------------------------------------------------

PATTERNS = {
    "a row": (40, 1),
    "a feature": (30,),
    "a channel": (5, 1, 1),
    "a sample": (6, 1, 1, 1),
    "each": (6, 5, 4, 3),
    "two dimensions apart": (6, 1, 4, 1),
    "the last two": (4, 3),
    "one": (1, 1),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("multiplicative", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_std_of_any_shape_learns(pattern, multiplicative, dtype):
    """Against autograd through noise that is kept."""
    shape = PATTERNS[pattern]
    g = torch.Generator().manual_seed(0)
    x = torch.randn(*((40, 30) if pattern in ("a row", "a feature") else (6, 5, 4, 3)), generator=g)
    x, out_grad = x.to(dtype), torch.randn(x.shape, generator=g).to(dtype)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    std = torch.rand(shape, generator=g).to(acc)
    noise = {"seed": 3, "step": 4, "offset": 5}
    eps = randn_like(x.to(acc), **noise)
    results = []
    for kept in (False, True):
        leaf, s = x.clone().requires_grad_(), std.clone().requires_grad_()
        if kept:
            wide = leaf.to(acc)
            y = (wide * (1 + s * eps) if multiplicative else wide + s * eps).to(dtype)
        else:
            y = input_noise(leaf, s, multiplicative=multiplicative, **noise)
        y.backward(out_grad)
        assert s.grad.shape == std.shape and s.grad.dtype == std.dtype
        results.append((y.detach(), leaf.grad, s.grad))
    rounding = {2: 1e-2, 4: 1e-5, 8: 1e-12}[dtype.itemsize]
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=rounding, atol=rounding)


def test_gradcheck_of_every_way():
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    for shape in ((), (3,), (4, 1), (4, 3)):
        std = torch.rand(shape, dtype=torch.float64, requires_grad=True)
        for multiplicative in (False, True):
            for name in ("normal", "laplace"):

                def noisy(x, std, way=multiplicative, name=name):
                    return input_noise(x, std, seed=1, distribution=name, multiplicative=way)

                assert torch.autograd.gradcheck(noisy, (x, std))
                assert torch.autograd.gradgradcheck(lambda x, s, f=noisy: f(x, s) ** 2, (x, std))

    def dot(x, y):
        return noise_dot([x, y], seed=2, stream=[5, 3], offset=[0, 7])

    y = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(dot, (x, y))
    assert torch.autograd.gradgradcheck(lambda x, y: dot(x**2, y**3), (x, y))


def test_gradient_noise_takes_a_std_a_feature():
    x = torch.zeros(20, 3, requires_grad=True)
    std = torch.tensor([0.0, 1.0, 2.0])
    gradient_noise(x, std, seed=1).backward(torch.ones(20, 3))
    eps = randn_like(torch.empty(20, 3), seed=1)
    torch.testing.assert_close(x.grad, 1 + std * eps)
    x.grad = None
    gradient_noise(x, 0.5, seed=1, multiplicative=True).backward(torch.full((20, 3), 2.0))
    torch.testing.assert_close(x.grad, 2 * (1 + 0.5 * eps))


# ---- lists ---------------------------------------------------------------------------------------


def test_streams_and_offsets_one_a_tensor():
    tensors = [torch.zeros(10), torch.zeros(4, 3), torch.zeros(7, dtype=torch.bfloat16)]
    places = {"stream": [7, 0, 3], "offset": [2, 0, 2**40]}
    add_noise_(tensors, torch.tensor([1.0, 2.0, 3.0]), seed=1, **places)
    for k, tensor in enumerate(tensors):
        place = {name: numbers[k] for name, numbers in places.items()}
        want = (k + 1) * randn_like(torch.empty(tensor.shape), seed=1, **place)
        assert torch.equal(tensor, want.to(tensor.dtype))
    assert noise_dot([], seed=0).item() == 0 and add_noise_([], 1.0, seed=0) is None


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_noise_dot_of_a_mixed_list(distribution):
    tensors, _ = mixed_list()
    leaves = [t.clone().requires_grad_() for t in tensors]
    noise = {"seed": 3, "step": 9, "stream": 4, "distribution": distribution}
    got = noise_dot(leaves, **noise)
    want = sum(
        (t.double() * randn_like(torch.empty(t.shape), **noise | {"stream": 4 + k}).double()).sum()
        for k, t in enumerate(tensors)
    )
    assert got.dtype == torch.float64  # one of the tensors is
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-3)
    got.backward()
    for k, leaf in enumerate(leaves):
        eps = randn_like(leaf.detach(), **noise | {"stream": 4 + k})
        assert same(leaf.grad.contiguous(), eps)
    assert noise_dot(tensors[0], seed=0).dtype == torch.float32


def test_noise_dot_does_not_depend_on_threads(set_threads):
    x = torch.randn(300_001)
    results = []
    for threads in (1, 2, 3):
        set_threads(threads)
        results.append(noise_dot([x, x[:1000]], seed=1))
    assert all(same(r, results[0]) for r in results)


@pytest.mark.parametrize("terms", [0, 1, 2, 37])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_combine_is_one_seed_after_the_other(terms, distribution):
    tensors, _ = mixed_list()
    seeds = [(-1) ** k * (2**40 * k + 3) for k in range(terms)]
    coefficients = [0.5 - 0.1 * k for k in range(terms)]
    noise = {"step": 2, "stream": 5, "offset": 6, "distribution": distribution}
    got, want = ([t.clone() for t in tensors] for _ in range(2))
    combine_noise_(got, coefficients, seeds, **noise)
    reference.combine_noise_(want, coefficients, seeds, **noise)
    for a, b in zip(got, want, strict=True):
        rounding = {2: 1e-2, 4: 1e-4, 8: 1e-4}[a.dtype.itemsize]
        torch.testing.assert_close(a, b, rtol=rounding, atol=rounding)
    # Tensors of numbers do as well as lists, and threads change nothing.
    again = [t.clone() for t in tensors]
    numbers = (
        torch.tensor(coefficients, dtype=torch.float64),
        torch.tensor(seeds, dtype=torch.int64),
    )
    combine_noise_(again, *numbers, **noise)
    assert all(same(a.contiguous(), b.contiguous()) for a, b in zip(got, again, strict=True))


def test_combine_rounds_once_and_any_isa_alike(set_isa, isa_levels):
    x = torch.randn(5003, generator=torch.Generator().manual_seed(0)).bfloat16()
    results = []
    for level in isa_levels:
        set_isa(level)
        y = x.clone()
        combine_noise_(y, [0.3, -0.2, 0.1], [1, 2, 3])
        results.append(y)
    total = sum(
        c * normals(5003, torch.float64, seed=s) for c, s in ((0.3, 1), (-0.2, 2), (0.1, 3))
    )
    apart = (results[0].double() - (x.double() + total)).abs()
    assert (apart <= (x.double() + total).abs() * 2.0**-8 + 1e-6).all()
    assert all(same(r, results[0]) for r in results)


# ---- parameters ----------------------------------------------------------------------------------


@pytest.mark.parametrize("restore", ["copy", "regenerate"])
@pytest.mark.parametrize("fails", [False, True])
def test_perturbed_parameters_come_back(restore, fails):
    tensors, _ = mixed_list()
    params = [torch.nn.Parameter(t.clone()) for t in tensors]
    noise = {"seed": 1, "step": 2, "distribution": "uniform"}
    inside = [t.clone() for t in tensors]
    add_noise_(inside, 0.3, **noise)
    try:
        with perturbed_parameters(params, 0.3, restore=restore, **noise):
            assert all(torch.equal(p, x) for p, x in zip(params, inside, strict=True))
            if fails:
                raise KeyError("in the body")
    except KeyError:
        assert fails
    for p, before, moved in zip(params, tensors, inside, strict=True):
        if restore == "copy":
            assert same(p.detach().contiguous(), before.contiguous())
            continue
        # Half an ulp of theta + scale eps, and half an ulp of theta: the documented bound.
        eps = torch.finfo(p.dtype).eps
        bound = eps / 2 * (moved.abs().double() + 2 * before.abs().double()) * 1.01 + 1e-30
        assert ((p.detach().double() - before.double()).abs() <= bound).all()


def test_perturbed_parameters_in_pairs_and_a_step_that_moves():
    theta, step = torch.nn.Parameter(torch.zeros(100)), torch.tensor(3)
    sides = []
    for scale in (0.5, -0.5):
        with perturbed_parameters([theta], scale, seed=1, step=step, restore="regenerate"):
            sides.append(theta.detach().clone())
            step += 0
    assert same(sides[0], -sides[1]) and not theta.any()
    with perturbed_parameters(theta, 1.0, seed=1, step=step, restore="regenerate"):
        step += 1
    assert not theta.any()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        with perturbed_parameters(theta, 1.0, seed=1):
            loss = theta.square().sum()
        loss.backward()


def quadratic():
    g = torch.Generator().manual_seed(0)
    root = torch.randn(9, 9, generator=g, dtype=torch.float64)
    hessian, slope = root @ root.t(), torch.randn(9, generator=g, dtype=torch.float64)
    params = [torch.randn(n, generator=g, dtype=torch.float64, requires_grad=True) for n in (4, 5)]

    def loss():
        theta = torch.cat(params)
        return theta @ hessian @ theta / 2 + slope @ theta

    return loss, params, hessian, slope


def test_soft_regularization_of_a_quadratic():
    """Of a quadratic loss it is exact: value, and gradient H theta + b + lam H eps."""
    loss, params, hessian, slope = quadratic()
    eps = torch.cat(
        [normals(n, torch.float64, seed=3, step=5, stream=k) for k, n in enumerate((4, 5))]
    )
    got = soft_regularization(loss, params, 0.3, seed=3, step=5)
    theta = torch.cat(params).detach()
    gradient = hessian @ theta + slope
    torch.testing.assert_close(got.detach(), loss().detach() + 0.3 * eps @ gradient)
    got.backward()
    want = gradient + 0.3 * hessian @ eps
    torch.testing.assert_close(torch.cat([p.grad for p in params]), want)


def network():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2)
    ).double()
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.tensor([0, 1] * 4)
    return model, lambda m: torch.nn.functional.cross_entropy(m(x), y), x, y


def test_soft_regularization_against_finite_differences():
    model, loss_of, *_ = network()
    params = list(model.parameters())
    noise = {"seed": 1, "step": 2}
    lam, h = 0.7, 1e-5
    got = soft_regularization(lambda: loss_of(model), params, lam, **noise)
    got.backward()
    sides = []
    for scale in (h, -h):
        with perturbed_parameters(params, scale, **noise):
            loss = loss_of(model)
            sides.append((loss.detach(), torch.autograd.grad(loss, params)))
    derivative = (sides[0][0] - sides[1][0]) / (2 * h)
    torch.testing.assert_close(got.detach(), loss_of(model).detach() + lam * derivative)
    plain = torch.autograd.grad(loss_of(model), params)
    for p, g, up, down in zip(params, plain, sides[0][1], sides[1][1], strict=True):
        torch.testing.assert_close(p.grad, g + lam * (up - down) / (2 * h), rtol=1e-6, atol=1e-8)


def test_soft_regularization_against_jvp():
    """The value by torch.func.jvp, the gradient by the jvp of torch.func.grad."""
    model, _, x, y = network()
    theta = {name: p.detach() for name, p in model.named_parameters()}
    eps = {
        name: randn_like(p, seed=1, step=2, stream=k) for k, (name, p) in enumerate(theta.items())
    }

    def loss(theta):
        out = torch.func.functional_call(model, theta, (x,))
        return torch.nn.functional.cross_entropy(out, y)

    value, derivative = torch.func.jvp(loss, (theta,), (eps,))
    gradient, product = torch.func.jvp(torch.func.grad(loss), (theta,), (eps,))
    got = soft_regularization(
        lambda: torch.nn.functional.cross_entropy(model(x), y),
        model.parameters(),
        0.7,
        seed=1,
        step=2,
    )
    torch.testing.assert_close(got.detach(), value + 0.7 * derivative)
    got.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradient[name] + 0.7 * product[name])


def test_soft_regularization_skips_what_the_loss_does_not_use():
    loss, params, *_ = quadratic()
    idle = torch.nn.Parameter(torch.zeros(3))
    with_idle = soft_regularization(loss, [params[0], idle, params[1]], 0.3, seed=1)
    without = soft_regularization(loss, params, 0.3, seed=1, stream=[0, 2])
    torch.testing.assert_close(with_idle, without)
    with torch.no_grad():
        assert not soft_regularization(loss, params, 0.3, seed=1).requires_grad


# ---- modules -------------------------------------------------------------------------------------


def noisy_model(**options):
    return torch.nn.Sequential(
        kdkernels.InputNoise(0.5, learnable=True, shape=(3,), **options),
        torch.nn.Linear(3, 2),
        kdkernels.GradientNoiseLayer(0.1, **options),
    )


def test_modules_make_noise_in_training_only():
    model, x = noisy_model(seed=1), torch.randn(5, 3)
    model.eval()
    assert torch.equal(model(x), model[1](x)) and model[0].step == 0
    model.train()
    eps = [randn_like(x, seed=1, step=t) for t in range(2)]
    for t in range(2):
        torch.testing.assert_close(model[0](x), x + 0.5 * eps[t])
    assert model[0].step == 2 and model[2].step == 0
    assert isinstance(model[0].std, torch.nn.Parameter) and model[0].std.shape == (3,)
    assert "std=[3]" in repr(model[0]) and "std=0.1" in repr(model[2])


@pytest.mark.parametrize("layer", [nn.ReLU, nn.Hardswish, nn.ReLU6])
def test_noise_in_the_gradient_before_a_layer_in_place(layer):
    x = torch.randn(6, 5, requires_grad=True)
    grads = []
    for inplace in (True, False):
        noisy = kdkernels.GradientNoiseLayer(0.5, seed=3)
        (layer(inplace=inplace)(noisy(2 * x)) * torch.arange(5.0)).sum().backward()
        grads.append(x.grad)
        x.grad = None
    assert torch.equal(*grads)
    eps = 0.5 * randn_like(x, seed=3)
    layer()(y := (2 * x).detach().requires_grad_()).backward(torch.arange(5.0).expand(6, 5))
    torch.testing.assert_close(grads[0], 2 * (y.grad + eps))


def test_modules_on_the_meta_device_can_be_set_again():
    with torch.device("meta"):
        layers = nn.Sequential(
            kdkernels.InputNoise(0.25, learnable=True),
            kdkernels.InputNoise(0.5, shape=(3, 1, 1)),
            kdkernels.GradientNoiseLayer(0.1),
            kdkernels.InputNoise(0.75),
        )
        assert all(layer.get_extra_state().item() == layer.seed for layer in layers)
    layers = layers.to_empty(device="cpu")
    for layer in layers:
        layer.step.fill_(2**40)
        layer.reset_parameters()
        assert layer.step == 0
    assert layers[0].std == 0.25 and layers[0].std.requires_grad
    assert torch.equal(layers[1].std, torch.full((3, 1, 1), 0.5)) and layers[3].std == 0.75
    given = kdkernels.InputNoise(torch.tensor([0.1, 0.2]), seed=0)
    given.std.zero_()
    given.reset_parameters()
    assert given.std.tolist() == pytest.approx([0.1, 0.2])
    with pytest.raises(ValueError, match="std was given as a meta tensor"):
        kdkernels.InputNoise(torch.empty(2, device="meta")).reset_parameters()


def on_any_default_device(x, param):
    """Calls that make tensors of their own, on a tensor and a parameter: what each leaves."""
    optimizer = torch.optim.SGD([param], lr=0.1)
    noise = kdkernels.GradientNoise(optimizer, 0.1, diagnostics=True)
    optimizer.step()
    noisy = kdkernels.NoisyAdamW([param], std=0.1, diagnostics=True)
    noisy.step()
    noisy.load_state_dict(noisy.state_dict())
    noisy.step()
    add_noise_([x, x.clone()], [0.1, 0.2])
    combine_noise_(x, [0.5], [1])
    with torch.no_grad(), perturbed_parameters([param], 0.1):
        scores = [kdkernels.mezo_step([x], lambda: 1.0, lr=0.1, seed=0, step=0)]
    scores.append(
        kdkernels.evolution_step([x], lambda: 1.0, population=2, std=0.1, lr=0.1, seed=0, step=0)
    )
    made = [randn_like(x), input_noise(x, 0.1), noise_dot(x), param, *scores]
    return [*made, torch.tensor([*noise.norms(), *noisy.norms()], device="cpu")]


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_nothing_depends_on_the_default_device(device):
    """As under torch.set_default_device("cuda"): a meta tensor shows what was made there."""
    x, param = torch.zeros(4), nn.Parameter(torch.ones(4))
    param.grad = torch.ones(4)
    shape, cuts = (4, 6), ((Shard(1), 2, 1),)
    torch.manual_seed(0)
    with torch.device(device):
        made = on_any_default_device(x, param)
        place = kdkernels.noise.shards.place_of.__wrapped__(shape, cuts)
    assert all(y.device.type == "cpu" and torch.isfinite(y).all() for y in made)
    assert place == ((4, 3), 3, 3, 6)


emulated = sys.modules.get("emulated_ops")


@pytest.mark.skipif(emulated is None, reason="needs the emulated device")
def test_a_captured_graph_bakes_no_number_in():
    x, param = torch.zeros(100), nn.Parameter(torch.ones(100))
    param.grad = torch.ones(100)
    step, want = torch.tensor(3), randn_like(x, seed=1, step=3)
    kinds = [
        lambda **k: kdkernels.NoisySGD([param], 0.1, std=0.1, seed=1, **k),
        lambda **k: kdkernels.GradientNoise(torch.optim.SGD([param], 0.1), 0.1, seed=1, **k),
    ]
    for kind in kinds:
        host, device = (kind(capturable=capturable) for capturable in (False, True))
        kept = [param.detach().clone(), param.grad.clone()]
        with emulated.device.capture():
            for call, name in (
                (lambda: randn_like(x, step=step), "seed is drawn on the host"),
                (lambda: randn_like(x, seed=1), "step is a number"),
                (lambda: add_noise_([x], 0.1, seed=1, step=7), "step is a number"),
                (lambda: combine_noise_(x, [1.0], [2], step=7), "step is a number"),
                (getattr(host, "optimizer", host).step, "capturable=True"),
            ):
                with pytest.raises(ValueError, match=name):
                    call()
            assert same(randn_like(x, seed=1, step=step), want)
            assert same(param, kept[0]) and same(param.grad, kept[1])
            if hasattr(host, "remove"):
                host.remove()
            getattr(device, "optimizer", device).step()
        assert not same(param, kept[0])


@pytest.mark.parametrize("multiplicative", [False, True])
def test_noise_keeps_the_memory_format(multiplicative):
    dense = torch.randn(2, 3, 4, 5)
    want = kdkernels.input_noise(dense, 0.5, seed=1, multiplicative=multiplicative)
    for x in (
        dense.to(memory_format=torch.channels_last),
        dense.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0),
    ):
        for std in (0.5, torch.tensor(0.5), torch.full((3, 1, 1), 0.5)):
            got = kdkernels.input_noise(x, std, seed=1, multiplicative=multiplicative)
            assert got.stride() == x.stride() and same(got.contiguous(), want)
    cut = torch.zeros(2, 3, 8, 5)[:, :, ::2].copy_(dense)
    assert same(kdkernels.input_noise(cut, 0.5, seed=1, multiplicative=multiplicative), want)


def test_modules_resume_with_the_same_bits():
    torch.manual_seed(4)
    model, x = noisy_model(), torch.randn(5, 3)
    model(x)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    other = noisy_model()
    other.load_state_dict(torch.load(io.BytesIO(buffer.getvalue())))
    grads = []
    for m in (model, other):
        out = m(x)
        out.sum().backward()
        grads.append([out.detach(), *(p.grad for p in m.parameters())])
    assert all(same(a, b) for a, b in zip(*grads, strict=True))
    # A seed of its own each, drawn from torch's generator.
    assert model[0].seed != model[2].seed
    torch.manual_seed(4)
    assert noisy_model()[0].seed == model[0].seed


# ---- shards --------------------------------------------------------------------------------------

SHAPE = (6, 10, 7)
INDEX = torch.arange(420).reshape(SHAPE)
LAYOUTS = [
    [Shard(0)],
    [Shard(1)],
    [Shard(2)],
    [Replicate()],
    [_StridedShard(0, split_factor=3)],
    [Shard(0), Shard(0)],
    [Shard(1), Shard(1)],
    [Shard(0), Shard(1)],
    [Shard(2), Shard(0)],
    [Shard(1), Replicate()],
    [_StridedShard(0, split_factor=2), Shard(0)],
    [_StridedShard(1, split_factor=2), Shard(1)],
]


def chunk(x, n, k, dim):
    """torch.chunk's k-th, which may be empty."""
    size = -(-x.shape[dim] // n)
    begin = min(k * size, x.shape[dim])
    return x.narrow(dim, begin, min(size, x.shape[dim] - begin))


def cut(x, layout, mesh_shape, coordinate):
    """What a rank holds, said without DTensor's own words."""
    if isinstance(layout[0], _StridedShard) and len(layout) == 2:
        # FSDP2 over tensor parallelism: its second dimension cuts first.
        for k in (1, 0):
            x = chunk(x, mesh_shape[k], coordinate[k], layout[k].dim)
        return x
    if isinstance(layout[0], _StridedShard):
        parts = [chunk(x, layout[0].split_factor, j, 0) for j in range(layout[0].split_factor)]
        return torch.cat([chunk(part, mesh_shape[0], coordinate[0], 0) for part in parts])
    for placement, n, k in zip(layout, mesh_shape, coordinate, strict=True):
        x = chunk(x, n, k, placement.dim) if isinstance(placement, Shard) else x
    return x


@contextmanager
def mesh_of(rank, layout, world=4):
    """A mesh as one of its ranks sees it, of ranks that are not there. What torch's own functions
    make of its tensors may be another rank's, which their caches do not tell apart."""
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (2, world // 2) if len(layout) == 2 else (world,))
    finally:
        dist.destroy_process_group()


def sharded(x, mesh, layout):
    local = cut(x, layout, mesh.shape, mesh.get_coordinate()).clone(
        memory_format=torch.contiguous_format
    )
    return DTensor.from_local(
        local, mesh, layout, run_check=False, shape=x.shape, stride=x.stride()
    )


@pytest.mark.parametrize("rank", range(4))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_shards_place(layout, rank):
    with mesh_of(rank, layout) as mesh:
        tensor = sharded(INDEX, mesh, layout)
        local, offset, run, stride = shard_of(tensor)
    i = torch.arange(local.numel())
    place = offset + (i if run == 0 else i // run * stride + i % run)
    assert torch.equal(local.reshape(-1), place)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shards_have_their_part_of_every_noise(layout, dtype):
    """Ranks one after the other, each without the others."""
    theta = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)
    bias = torch.zeros(5, dtype=dtype)
    noise = {"seed": 1, "step": 2, "stream": 3, "distribution": "laplace"}
    whole, combined = theta.clone(), theta.clone()
    add_noise_([bias.clone(), whole], 0.5, **noise)
    combine_noise_([bias.clone(), combined], [0.5, 2.0], [7, 8], stream=3)
    eps = randn_like(theta, **noise)
    dots = []
    for rank in range(4):
        with mesh_of(rank, layout) as mesh:

            def mine(x, mesh=mesh):
                return cut(x, layout, mesh.shape, mesh.get_coordinate()).contiguous()

            made = randn_like(sharded(theta, mesh, layout), **noise)
            assert made.placements == tuple(layout) and made.shape == SHAPE
            assert same(made.to_local(), mine(eps))
            place = {"seed": 1, "step": 2, "stream": 3}
            low = kdkernels.stochastic_round(sharded(theta.float(), mesh, layout), **place)
            assert same(low.to_local(), mine(kdkernels.stochastic_round(theta.float(), **place)))
            kept = kdkernels.dropout(sharded(theta, mesh, layout), 0.5, **place)
            assert same(kept.to_local(), mine(kdkernels.dropout(theta, 0.5, **place)))
            for want, change in (
                (whole, lambda ts: add_noise_(ts, 0.5, **noise)),
                (combined, lambda ts: combine_noise_(ts, [0.5, 2.0], [7, 8], stream=3)),
            ):
                tensor = sharded(theta, mesh, layout)
                change([bias.clone(), tensor])
                assert same(tensor.to_local(), mine(want))
            for restore in ("copy", "regenerate"):
                param = sharded(theta, mesh, layout).requires_grad_()
                with perturbed_parameters([bias, param], 0.5, restore=restore, **noise):
                    assert same(param.to_local().detach(), mine(whole))
                drift = 0 if restore == "copy" else 4 * torch.finfo(dtype).eps
                assert ((param.to_local().detach() - mine(theta)).abs() <= drift).all()
            leaf = sharded(theta, mesh, layout).requires_grad_()
            dot = noise_dot([leaf], **noise)
            dot.backward()
            assert same(leaf.grad.to_local(), mine(eps))
            dots.append(dot.detach())
    # The ranks that are not there add nothing to a sum: it is this rank's own.
    if all(placement.is_replicate() for placement in layout):
        assert all(same(dot, noise_dot(theta, **noise)) for dot in dots)
    elif not any(placement.is_replicate() for placement in layout):
        torch.testing.assert_close(sum(dots), noise_dot(theta, **noise))


@pytest.mark.parametrize(
    ("layout", "shape", "match"),
    [
        ([Partial()], SHAPE, "placement"),
        ([Shard(1), Shard(2)], SHAPE, "equal runs"),
        ([_StridedShard(0, split_factor=2)], (5, 3), "unevenly"),
    ],
)
def test_shards_that_have_no_place(layout, shape, match):
    x = torch.zeros(shape)
    with mesh_of(0, layout, world=4 if len(layout) == 2 else 2) as mesh:
        tensor = sharded(x, mesh, layout)
        for call in (randn_like, lambda t, seed: add_noise_([x, t], 1.0, seed=seed), noise_dot):
            with pytest.raises(ValueError, match=match):
                call(tensor, seed=0)
    assert not x.any()


def test_a_rank_without_elements():
    with mesh_of(3, [Shard(0)]) as mesh:
        tensor = sharded(torch.zeros(3, 2), mesh, [Shard(0)])
        add_noise_([tensor], 1.0, seed=0)
        assert randn_like(tensor, seed=0).to_local().shape == (0, 2)
        assert noise_dot([tensor], seed=0) == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", range(len(DISTRIBUTIONS)))
def test_runs(dtype, distribution):
    """Columns 3 to 7 of a matrix and rows 2 to 5, by the ops' own arguments."""
    noise = [1, 2, distribution, 1, 2, 5, *(3, 20), *(5, 10, 0, 0)]
    whole = normals(
        100, dtype, seed=1, step=2, stream=5, distribution=DISTRIBUTIONS[distribution]
    ).view(10, 10)
    rows = normals(
        100, dtype, seed=1, step=2, stream=6, distribution=DISTRIBUTIONS[distribution]
    ).view(10, 10)
    wants = [whole[:, 3:8], rows[2:6]]
    tensors = [torch.zeros(want.shape, dtype=dtype) for want in wants]
    norms = torch.full((2, 2), math.nan, dtype=torch.float64)
    _C.add_noise_(tensors, [1.0], None, False, noise, [], norms)
    assert all(torch.equal(x, want) for x, want in zip(tensors, wants, strict=True))
    squares = torch.stack([want.double().square().sum() for want in wants])
    tolerance = 1e-2 if dtype.itemsize == 2 else 1e-6
    torch.testing.assert_close(norms[:, 1], squares, rtol=tolerance, atol=0)
    assert not norms[:, 0].any()
    torch.testing.assert_close(_C.noise_dot(tensors, noise, []), squares, rtol=tolerance, atol=0)


@pytest.mark.parametrize("multiplicative", [False, True])
def test_norms_of_a_mixed_list(multiplicative):
    """Of each tensor before the noise, and of its std * eps, whatever its dtype and size."""
    tensors, std = mixed_list()
    before = [t.clone() for t in tensors]
    norms = torch.full((len(tensors), 2), math.nan, dtype=torch.float64)
    stds = torch.tensor(std, dtype=torch.float64)
    noise = [8, 0, 0, 1, 1, 0, 0]
    _C.add_noise_(tensors, [0.0], stds, multiplicative, noise, [], norms)
    for k, x in enumerate(before):
        eps = randn_like(torch.empty(x.shape, dtype=torch.float64), seed=8, stream=k)
        want = torch.stack([x.double().square().sum(), (std[k] * eps).square().sum()])
        torch.testing.assert_close(norms[k], want, rtol=1e-5, atol=1e-12)
        assert torch.equal(tensors[k], added(x, std[k], eps, multiplicative)) or (
            x.dtype == torch.float64
        )


# ---- bad input -----------------------------------------------------------------------------------


def enter(context):
    with context:
        raise AssertionError("was entered")


X = torch.zeros(4, 3)
LEAF = torch.zeros(3, requires_grad=True)
BAD_ADDRESSES = [
    ("seed", ValueError, {"seed": 2**64}),
    ("seed", ValueError, {"seed": -(2**63) - 1}),
    ("seed", TypeError, {"seed": 1.5}),
    ("seed", TypeError, {"seed": "1"}),
    ("step", ValueError, {"step": -1}),
    ("step", ValueError, {"step": 2**32}),
    ("step", ValueError, {"step": 2**64}),
    ("step", TypeError, {"step": 0.5}),
    ("step", TypeError, {"step": torch.tensor(1.0)}),
    ("step", TypeError, {"step": torch.tensor(1, dtype=torch.int32)}),
    ("step", ValueError, {"step": torch.tensor([1, 2])}),
    ("step", ValueError, {"step": torch.tensor(-1)}),
    ("step", ValueError, {"step": torch.tensor(2**32)}),
    ("stream", ValueError, {"stream": -1}),
    ("stream", ValueError, {"stream": 2**32}),
    ("stream", ValueError, {"stream": 2**70}),
    ("offset", ValueError, {"offset": -1}),
    ("offset", ValueError, {"offset": 2**64}),
]
OPS = {
    "randn_like": lambda **noise: randn_like(X, **noise),
    "add_noise_": lambda **noise: add_noise_(X, 0.0, **noise),
    "input_noise": lambda **noise: input_noise(X, 0.0, **noise),
    "gradient_noise": lambda **noise: gradient_noise(X, 0.0, **noise),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", range(len(BAD_ADDRESSES)))
def test_bad_address_is_named(op, case):
    name, error, address = BAD_ADDRESSES[case]
    if op == "gradient_noise" and isinstance(address.get("step"), torch.Tensor):
        return  # its value is looked at in backward
    with pytest.raises(error, match=rf"\b{name}\b"):
        OPS[op](**{"seed": 0, **address})


BAD = [
    ("x", TypeError, lambda: randn_like(X.int(), seed=0)),
    ("x", TypeError, lambda: randn_like(X.cfloat(), seed=0)),
    ("x", TypeError, lambda: randn_like([1.0], seed=0)),
    ("x", ValueError, lambda: randn_like(X.to_sparse(), seed=0)),
    ("x", TypeError, lambda: input_noise(X.int(), 0.1, seed=0)),
    ("x", TypeError, lambda: gradient_noise(X.int(), 0.1, seed=0)),
    ("tensors", TypeError, lambda: add_noise_(X.int(), 0.1, seed=0)),
    ("tensors", TypeError, lambda: add_noise_([X, 1.0], 0.1, seed=0)),
    ("tensors", ValueError, lambda: add_noise_([X, X.to("meta")], 0.1, seed=0)),
    (r"tensors\[1\]", ValueError, lambda: add_noise_([X.clone(), LEAF], 0.1, seed=0)),
    (r"tensors\[0\]", ValueError, lambda: add_noise_(X[0].expand(4, 3), 0.1, seed=0)),
    *(
        ("std", ValueError, lambda v=v, op=op: op(X, v, seed=0))
        for v in (-0.1, math.nan, math.inf)
        for op in (add_noise_, input_noise, gradient_noise)
    ),
    *(
        ("std", TypeError, lambda v=v, op=op: op(X, v, seed=0))
        for v in ("a", None)
        for op in (add_noise_, input_noise, gradient_noise)
    ),
    ("std", ValueError, lambda: add_noise_([X, X.clone(), X.clone()], [0.1, 0.2], seed=0)),
    ("std", ValueError, lambda: add_noise_([X], [0.1, 0.2], seed=0)),
    ("std", ValueError, lambda: add_noise_([X, X.clone()], [0.1, -0.2], seed=0)),
    ("std", TypeError, lambda: input_noise(X, torch.tensor(1), seed=0)),
    ("std", ValueError, lambda: input_noise(X, torch.tensor(0.1, device="meta"), seed=0)),
    ("stream", ValueError, lambda: add_noise_([X, X.clone()], 0.1, seed=0, stream=2**32 - 1)),
    ("distribution", ValueError, lambda: randn_like(X, seed=0, distribution="cauchy")),
    ("distribution", TypeError, lambda: randn_like(X, seed=0, distribution=1)),
    ("distribution", ValueError, lambda: add_noise_(X, 0.1, seed=0, distribution="Normal")),
    ("multiplicative", TypeError, lambda: add_noise_(X, 0.1, seed=0, multiplicative="yes")),
    ("multiplicative", TypeError, lambda: input_noise(X, 0.1, seed=0, multiplicative="no")),
    ("std", ValueError, lambda: input_noise(X, torch.rand(2), seed=0)),
    ("std", ValueError, lambda: input_noise(X, torch.rand(2, 4, 3), seed=0)),
    ("std", TypeError, lambda: gradient_noise(X, torch.tensor(1), seed=0)),
    ("std", TypeError, lambda: add_noise_(X, torch.tensor(1), seed=0)),
    ("std", ValueError, lambda: add_noise_([X], torch.rand(2), seed=0)),
    ("stream", ValueError, lambda: add_noise_([X], 0.1, seed=0, stream=[1, 2])),
    ("stream", ValueError, lambda: add_noise_([X], 0.1, seed=0, stream=[-1])),
    ("offset", ValueError, lambda: add_noise_([X], 0.1, seed=0, offset=[1, 2])),
    ("offset", ValueError, lambda: add_noise_([X], 0.1, seed=0, offset=[-1])),
    ("stream", TypeError, lambda: add_noise_([X], 0.1, seed=0, stream=["a"])),
    ("tensors", TypeError, lambda: noise_dot([X, 1], seed=0)),
    ("tensors", TypeError, lambda: noise_dot(X.int(), seed=0)),
    ("tensors", ValueError, lambda: noise_dot([X, X.to("meta")], seed=0)),
    ("coefficients", ValueError, lambda: combine_noise_(X, [1.0, 2.0], [1])),
    ("coefficients", ValueError, lambda: combine_noise_(X, [math.nan], [1])),
    ("coefficients", TypeError, lambda: combine_noise_(X, ["a"], [1])),
    ("coefficients", TypeError, lambda: combine_noise_(X, torch.tensor([1]), [1])),
    ("coefficients", TypeError, lambda: combine_noise_(X, 1.0, [1])),
    ("seeds", TypeError, lambda: combine_noise_(X, [1.0], torch.rand(1))),
    ("seed", TypeError, lambda: combine_noise_(X, [1.0], [0.5])),
    ("seeds", TypeError, lambda: combine_noise_(X, [1.0], 3)),
    (r"tensors\[0\]", ValueError, lambda: combine_noise_(LEAF, [1.0], [1])),
    ("restore", ValueError, lambda: enter(perturbed_parameters([X], 0.1, restore="no"))),
    ("scale", ValueError, lambda: enter(perturbed_parameters([X], math.inf, seed=0))),
    ("scale", TypeError, lambda: enter(perturbed_parameters([X], "a", seed=0))),
    ("params", TypeError, lambda: enter(perturbed_parameters([1.0], 0.1, seed=0))),
    (r"params\[0\]", ValueError, lambda: soft_regularization(lambda: X.sum(), [X], 0.1)),
    ("loss_fn", TypeError, lambda: soft_regularization(lambda: 1.0, [LEAF], 0.1)),
    ("loss_fn", ValueError, lambda: soft_regularization(lambda: LEAF * 1, [LEAF], 0.1)),
    ("lam", TypeError, lambda: soft_regularization(lambda: LEAF.sum(), [LEAF], "a")),
    ("std", ValueError, lambda: kdkernels.InputNoise(-0.1)),
    ("std", TypeError, lambda: kdkernels.InputNoise("a")),
    ("shape", ValueError, lambda: kdkernels.InputNoise(torch.rand(3), shape=(2,))),
    ("learnable", TypeError, lambda: kdkernels.InputNoise(0.1, learnable="yes")),
    ("stream", ValueError, lambda: kdkernels.GradientNoiseLayer(0.1, stream=-1)),
    ("seed", ValueError, lambda: kdkernels.GradientNoiseLayer(0.1, seed=2**64)),
    ("distribution", ValueError, lambda: kdkernels.InputNoise(0.1, distribution="t")),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_argument_is_named(case):
    name, error, call = BAD[case]
    with pytest.raises(error, match=rf"\b{name}"):
        call()
    assert not X.any()  # nothing was written


def test_bad_step_tensor_of_gradient_noise():
    x = torch.zeros(3, requires_grad=True)
    with pytest.raises((TypeError, ValueError), match="step"):
        gradient_noise(x, 0.1, seed=0, step=torch.tensor(0.5)).sum().backward()


# ---- CUDA ----------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_cuda_sha256():
    assert digest(randn_like(torch.empty(MILLION, device="cuda"), seed=0)) == SHA256


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("address", ADDRESSES)
def test_cuda_gives_the_cpus_bits(dtype, address):
    for n in (1, 5, 4097, 100003):
        x = torch.randn(n, generator=torch.Generator().manual_seed(0)).to(dtype)
        for op in (randn_like, lambda x, **noise: input_noise(x, 0.3, **noise)):
            assert same(op(x.cuda(), **address).cpu(), op(x, **address))


@pytest.mark.gpu
def test_cuda_list_and_step_tensor():
    tensors, std = mixed_list()
    on_gpu = [t.cuda() for t in tensors]
    step = torch.tensor(4, device="cuda")
    add_noise_(tensors, std, seed=8, step=4, stream=100, offset=7)
    add_noise_(on_gpu, std, seed=8, step=step, stream=100, offset=7)
    for got, want in zip(on_gpu, tensors, strict=True):
        assert same(got.cpu(), want)


@pytest.mark.gpu
def test_cuda_gradients():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    results = []
    for device in ("cpu", "cuda"):
        leaf = x.to(device).requires_grad_()
        std = torch.tensor(0.3, device=device, requires_grad=True)
        input_noise(leaf, std, seed=1).square().sum().backward()
        noisy = x.to(device).requires_grad_()
        gradient_noise(noisy, 0.3, seed=1).square().sum().backward()
        results.append([leaf.grad.cpu(), std.grad.cpu(), noisy.grad.cpu()])
    want, got = results
    assert same(got[0], want[0]) and same(got[2], want[2])
    torch.testing.assert_close(got[1], want[1], rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
def test_cuda_graph_advances_with_its_step_tensor(cached_memory):
    x, step = torch.zeros(5000, device="cuda"), torch.zeros((), dtype=torch.int64, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        randn_like(x, seed=1, step=step)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = randn_like(x, seed=1, step=step)
        step += 1
    for k in range(3):
        graph.replay()
        assert same(out.cpu(), normals(5000, seed=1, step=k))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_cuda_on_another_device_than_the_current_one():
    x = randn_like(torch.empty(5000, device="cuda:1"), seed=3)
    assert x.device.index == 1 and same(x.cpu(), normals(5000, seed=3))


@pytest.mark.gpu
def test_cuda_beyond_2_to_the_31_elements(cached_memory):
    n = 2**31 + 5
    if torch.cuda.mem_get_info()[0] < 12e9:
        pytest.skip("needs 12 GB of GPU memory")
    x = torch.zeros(n, dtype=torch.bfloat16, device="cuda")
    add_noise_(x, 1.0, seed=3)
    assert same(x[-9:].cpu(), normals(9, torch.bfloat16, seed=3, offset=n - 9))


def test_tensors_that_share_memory_are_refused():
    x = torch.zeros(100)
    for tensors in ([x, x], [x[:60], x[50:]]):
        with pytest.raises(ValueError, match=r"tensors\[1\] shares memory with tensors\[0\]"):
            add_noise_(tensors, 1.0, seed=0)
    assert not x.any()
    add_noise_([x[50:], x[:50]], 1.0, seed=0)
    assert torch.equal(x[:50], randn_like(x[:50], seed=0, stream=1))


def test_empty_tensors_within_a_list():
    sizes = (5000, 0, 0, 5000)
    got, want = ([torch.zeros(n) for n in sizes] for _ in range(2))
    add_noise_(got, 1.0, seed=5)
    reference.add_noise_(want, 1.0, seed=5)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
