"""Stochastic rounding, dropout and seeds per row: which numbers, that nothing else moves them."""

import hashlib
import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nightly import examples
from torch import nn

import kdkernels
from kdkernels import (
    SGLD,
    NoisyAdamW,
    NoisySGD,
    add_noise_,
    dropout,
    input_noise,
    pSGLD,
    randn_like,
    reference,
    stochastic_round,
)

pytestmark = pytest.mark.quick

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ROUNDED = [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
EMULATED = "emulated_ops" in sys.modules
# Little-endian, on every machine.
SHA256 = {
    "round bfloat16": "ba7bf60331df8824a311c3b5b565a1fd6432d9783b20622e5b91a9261360ba1f",
    "round float16": "6b4ddec9fe20fe847e0a94a7966d63124dd05128ad4b14cfce84ea9bc05b8b7d",
    "round float8_e4m3fn": "b4ff1cf14a1d0d555d3f0b84e49721d2c16a6ace8dddf8887c85f23bb9e19c05",
    "round float8_e5m2": "dca37373133f7231fb1057f16801bda837d84af4b6905ef1e477bff6d6772f46",
    "dropout float32": "2014849ad3b2f43302d09d3b453e32ceb3d7b32fe82ae3171b2118f32283fd41",
    "rows float32": "3eacca1b8bcdf3560dbb2ff6700d78995d91042837d2693d020efaac9437906c",
    "dropout float64": "2f5bfdb5202aba9a8c1f95f676161480ecfa668a9d0fbf66d514b1a686f2b7ee",
    "rows float64": "32a3cb4a9d855838eeed033025d7d8cc8ff6460dd28ab8b235133ab54b70c331",
    "dropout bfloat16": "3c11adff657a86a4b2fc3a24960783f6dfea54e620fd525cd3c30898632a97ad",
    "rows bfloat16": "799760e39af94bdeceaf11371b98ff772606ed104d4381b0c371d3d95473cc88",
    "dropout float16": "7d0835030c67536ee0d247c09c81f01a36b2295ce7f679ba0434513c3366d1ba",
    "rows float16": "3c7a62b73df9909c2f35d1da9b94b7270839a262dedb3c439a2f872cc74a9dc1",
}
MANY = 2**14 if EMULATED else 2**20


def bits(x):
    return x.detach().contiguous().reshape(-1).view(torch.uint8)


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def digest(x):
    return hashlib.sha256(bits(x).numpy().tobytes()).hexdigest()


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def any_floats(n, seed=0):
    """Of all 2^32, among them subnormals, infinities and NaN."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (n,), dtype=torch.int32, generator=g).view(torch.float32)


def numbers_of(dtype):
    """Every finite number of a dtype, in order, as fp32."""
    bytes_ = {2: torch.int16, 1: torch.uint8}[dtype.itemsize]
    x = torch.arange(2 ** (8 * dtype.itemsize)).to(bytes_).view(dtype).float()
    return x[torch.isfinite(x)].unique()


# ---- stochastic rounding -------------------------------------------------------------------------

ADDRESSES = [
    {"seed": 3, "step": 2, "stream": 5},
    {"seed": -7, "offset": 2**35 - 1003},  # the counter's high word changes within
    {"seed": 2**64 - 1, "stream": 2**32 - 1, "offset": 2**62 + 3},
]


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("address", ADDRESSES)
def test_rounding_is_that_of_the_reference(dtype, address):
    near = randn(3000, seed=1) * torch.logspace(-14, 6, 3000)
    x = torch.cat(
        [any_floats(3000), near, torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan])]
    )
    got, want = (f(x, dtype, **address) for f in (stochastic_round, reference.stochastic_round))
    number = ~torch.isnan(want.float())
    assert same(got[number], want[number]) and torch.isnan(got[~number].float()).all()


def of_every_op(x):
    """What each op here makes of fp32, by a name and a dtype."""
    for dtype in ROUNDED:
        yield f"round {str(dtype)[6:]}", stochastic_round(x, dtype, seed=1, step=2)
    for dtype in DTYPES:
        yield f"dropout {str(dtype)[6:]}", dropout(x.to(dtype), 0.25, seed=1, step=2)
        rows = randn_like(x.to(dtype).reshape(4, -1), seed=torch.tensor([1, 2, -3, 2**40]), step=2)
        yield f"rows {str(dtype)[6:]}", rows


def test_bits_are_those_of_every_machine():
    x = 100 * randn_like(torch.empty(2**14), seed=0)
    assert {name: digest(y) for name, y in of_every_op(x)} == SHA256


@pytest.mark.parametrize("dtype", ROUNDED)
def test_what_a_dtype_holds_is_not_changed(dtype):
    x = numbers_of(dtype)
    for seed in range(2):
        assert torch.equal(stochastic_round(x, dtype, seed=seed).float(), x)
    assert same(stochastic_round(torch.tensor([-0.0]), dtype, seed=0).float(), torch.tensor([-0.0]))
    got = stochastic_round(torch.tensor([math.inf, -math.inf, math.nan]), dtype, seed=0).double()
    infinity = math.nan if dtype == torch.float8_e4m3fn else math.inf
    want = torch.tensor([infinity, -infinity, math.nan], dtype=torch.float64)
    assert torch.equal(got.nan_to_num(7), want.nan_to_num(7))


@pytest.mark.parametrize("dtype", ROUNDED)
def test_every_number_of_a_dtype_is_reached_from_both_sides(dtype):
    """Subnormals as well, with the probability of where a value lies between them."""
    x = numbers_of(dtype)
    low, high = x[:-1].double(), x[1:].double()
    for share in (0.25, 0.5):
        between = (low + share * (high - low)).float()
        exact = (between.double() - low) == share * (high - low)
        got = stochastic_round(between, dtype, seed=4).double()
        assert ((got == low) | (got == high)).all()
        # Away from 0: of negative numbers `high` is the smaller magnitude.
        up = torch.where(low < 0, got == low, got == high)[exact].double()
        wanted = torch.where(low < 0, 1 - share, share)[exact]
        if len(up) > 10**4 and not EMULATED:
            error = 4 * math.sqrt((wanted * (1 - wanted)).sum())
            assert abs(up.sum() - wanted.sum()) < error


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("value", [1.001, -3.17159, 1e-3, 300.3, 2.0**-15 * 1.2345, 2e-7])
def test_the_mean_is_the_value(dtype, value):
    x = torch.full((MANY,), value)
    got = stochastic_round(x, dtype, seed=5).double()
    assert len(got.unique()) <= 2
    error = 4 * got.std() / math.sqrt(MANY)
    # The probability is a multiple of 2^-16.
    step = (got.max() - got.min()) * 2.0**-17
    assert abs(got.mean() - x[0].double()) <= error + step


@pytest.mark.parametrize("dtype", ROUNDED)
def test_finite_numbers_stay_finite(dtype):
    largest = torch.tensor(torch.finfo(dtype).max, dtype=torch.float64)
    x = torch.tensor([largest, torch.finfo(torch.float32).max]).double()
    x = torch.cat([x, largest + (x[1] - largest) * torch.linspace(0, 1, 1000).double()]).float()
    for sign in (1, -1):
        got = stochastic_round(sign * x, dtype, seed=0).double()
        assert (got == sign * largest).all()


@settings(max_examples=examples(40))
@given(st.integers(0, 3000), st.integers(0, 3000), st.sampled_from(ROUNDED))
def test_a_shard_is_rounded_as_in_the_whole(start, length, dtype):
    x = randn(5000, seed=1)
    whole = stochastic_round(x, dtype, seed=4, step=1)[start : start + length]
    shard = stochastic_round(x[start : start + length], dtype, seed=4, step=1, offset=start)
    assert same(shard, whole)
    kept = dropout(x, 0.3, seed=4)[start : start + length]
    assert same(dropout(x[start : start + length], 0.3, seed=4, offset=start), kept)


def test_rounding_of_any_layout():
    x = randn(6, 5, 4).to(memory_format=torch.contiguous_format)
    want = stochastic_round(x, seed=2)
    for y in (x.permute(2, 0, 1).contiguous().permute(1, 2, 0), torch.stack([x, x], -1)[..., 0]):
        got = stochastic_round(y, seed=2)
        assert same(got, want)
    images = randn(2, 3, 4, 5)
    got = stochastic_round(images.to(memory_format=torch.channels_last), seed=2)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert same(got, stochastic_round(images, seed=2))
    assert stochastic_round(torch.empty(0, 3), seed=0).shape == (0, 3)


def test_every_isa_level_and_any_number_of_threads(set_isa, isa_levels, set_threads):
    x = randn(3, 50001)
    results = []
    for level in isa_levels:
        set_isa(level)
        for threads in (1, 3):
            set_threads(threads)
            made = [stochastic_round(x, dtype, seed=1, offset=3) for dtype in ROUNDED]
            made += [dropout(x.to(dtype), 0.3, seed=1, offset=5) for dtype in DTYPES]
            results.append(made)
    for made in results[1:]:
        assert all(same(a, b) for a, b in zip(made, results[0], strict=True))


# ---- optimizers ----------------------------------------------------------------------------------

OPTIMIZERS = [
    (NoisySGD, {"lr": 0.1, "momentum": 0.9, "std": 0.1}),
    (NoisySGD, {"lr": 0.1, "std": 0.0}),
    (NoisyAdamW, {"lr": 0.01, "std": 0.1}),
    (NoisyAdamW, {"lr": 0.01}),
    (SGLD, {"lr": 0.01, "num_data": 10}),
    (pSGLD, {"lr": 0.01, "num_data": 10}),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS)
def test_a_step_rounds_as_the_op_does(kind, options, dtype, capturable):
    """The first step: its moments are 0, so that the update in fp32 is that of fp32 parameters."""
    values = [randn(*shape, seed=k).to(dtype) for k, shape in enumerate([(70, 33), (129,), (2, 3)])]
    low = [nn.Parameter(v) for v in values] + [nn.Parameter(randn(9))]
    high = [nn.Parameter(p.detach().float()) for p in low]
    for k, (p, q) in enumerate(zip(low, high, strict=True)):
        p.grad = randn(*p.shape, seed=50 + k).to(p.dtype)
        q.grad = p.grad.float()
    options = options | {"seed": 7, "capturable": capturable}
    kind(low, stochastic_rounding=True, **options).step()
    kind(high, **options).step()
    for k, (p, q) in enumerate(zip(low, high, strict=True)):
        want = (
            q if p.dtype == torch.float32 else stochastic_round(q.detach(), dtype, seed=7, stream=k)
        )
        assert same(p, want)


@pytest.mark.parametrize("diagnostics", [False, True])
def test_moments_are_rounded_by_other_bits(diagnostics):
    p = nn.Parameter(torch.zeros(2**12, dtype=torch.bfloat16))
    optimizer = NoisyAdamW([p], seed=3, stochastic_rounding=True, diagnostics=diagnostics)
    p.grad = torch.full_like(p, 1.125)
    optimizer.step()
    state = optimizer.state[p]
    for name, want in (("exp_avg", 0.1 * 1.125), ("exp_avg_sq", 0.001 * 1.125**2)):
        got = state[name].double()
        low, high = got.min(), got.max()
        assert low < want < high and len(got.unique()) == 2
        assert abs(got.mean() - want) < 4 * got.std() / math.sqrt(got.numel())
    first, second = (state[n] == state[n].max() for n in ("exp_avg", "exp_avg_sq"))
    r = torch.corrcoef(torch.stack([first, second, p.detach() == p.detach().max()]).double())
    assert (r - torch.eye(3)).abs().max() < 4 / math.sqrt(2**12)


def test_steps_equal_the_reference_with_its_bits():
    p = nn.Parameter(randn(999).bfloat16())
    twin, m, v = p.detach().clone(), torch.zeros_like(p), torch.zeros_like(p)
    optimizer = NoisyAdamW([p], 0.01, seed=3, std=0.1, stochastic_rounding=True)
    rule = {"lr": 0.01, "std": 0.1}
    for step in range(3):
        p.grad = randn(999, seed=step).bfloat16()
        optimizer.step()
        eps = randn_like(torch.empty(999), seed=3, step=step)
        r = reference.noise._bits(999, 2**31, seed=3, step=step)
        m_, v_ = m.detach(), v.detach()
        reference.noisy_update_(
            "adamw", [twin], [p.grad], [m_], [v_], [step + 1], [rule], [eps], [r]
        )
        # An fp32 rounding apart, a value may fall on the other side.
        assert (p.detach() != twin).sum() <= 3
        twin, m, v = (
            p.detach().clone(),
            *(optimizer.state[p][n].clone() for n in optimizer._moments),
        )


def test_rounding_is_resumed_and_may_differ_between_groups():
    def make():
        params = [nn.Parameter(randn(300, seed=k).bfloat16()) for k in range(2)]
        groups = [{"params": params[:1], "stochastic_rounding": False}, {"params": params[1:]}]
        return params, NoisySGD(groups, 1e-3, momentum=0.9, seed=1, stochastic_rounding=True)

    def run(params, optimizer, steps):
        for step in steps:
            for k, p in enumerate(params):
                p.grad = randn(300, seed=10 * step + k).bfloat16()
            optimizer.step()

    params, optimizer = make()
    run(params, optimizer, range(4))
    others, resumed = make()
    run(others, resumed, range(2))
    state, kept = resumed.state_dict(), [p.detach().clone() for p in others]
    others, resumed = make()
    with torch.no_grad():
        for p, old in zip(others, kept, strict=True):
            p.copy_(old)
    resumed.load_state_dict(state)
    run(others, resumed, range(2, 4))
    assert all(same(a, b) for a, b in zip(params, others, strict=True))
    plain = [nn.Parameter(randn(300, seed=k).bfloat16()) for k in range(2)]
    run(plain, NoisySGD(plain, 1e-3, momentum=0.9, seed=1), range(4))
    assert same(params[0], plain[0]) and not same(params[1], plain[1])
    with pytest.raises(TypeError, match="stochastic_rounding is a str"):
        NoisySGD(plain, stochastic_rounding="yes")


def losses_of_a_regression(dtype, steps=300, **options):
    """Of bf16 weights near their optimum, where updates are smaller than half an ulp."""
    x, w = randn(512, 32, seed=1), randn(32, 8, seed=2)
    param = nn.Parameter((w + 0.05 * randn(32, 8, seed=3)).to(dtype))
    optimizer = NoisySGD([param], 1 / 16, seed=0, **options)
    for _ in range(steps):
        loss = ((x @ param.float() - x @ w) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


@pytest.mark.skipif(EMULATED, reason="300 steps")
def test_small_updates_add_up():
    full = losses_of_a_regression(torch.float32)
    nearest = losses_of_a_regression(torch.bfloat16)
    by_chance = losses_of_a_regression(torch.bfloat16, stochastic_rounding=True)
    assert full < 1e-4 and nearest > 5e-2 and by_chance < 1e-3


# ---- dropout -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("address", ADDRESSES)
def test_dropout_is_that_of_the_reference(dtype, p, address):
    x = randn(31, 65, dtype=dtype)
    assert same(dropout(x, p, **address), reference.dropout(x, p, **address))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_how_many_are_kept_and_independently(p):
    kept = (dropout(torch.ones(MANY), p, seed=8) != 0).double()
    assert abs(kept.mean() - (1 - p)) < 4 * math.sqrt(p * (1 - p) / MANY) + 2**-16
    for lag in (1, 2, 7, 8, 9, 64):
        r = torch.corrcoef(torch.stack([kept[lag:], kept[:-lag]]))[0, 1]
        assert abs(r) < 4.5 / math.sqrt(MANY)
    for way in ({"seed": 9}, {"seed": 8, "step": 1}, {"seed": 8, "stream": 1}):
        other = (dropout(torch.ones(MANY), p, **way) != 0).double()
        assert abs(torch.corrcoef(torch.stack([kept, other]))[0, 1]) < 4.5 / math.sqrt(MANY)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_drops_the_same_and_keeps_no_mask(dtype):
    x = randn(40, 33, dtype=dtype).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.numel()) or t, lambda t: t
    ):
        y = dropout(x, 0.25, seed=1, step=torch.tensor(4))
    assert sum(saved) <= 2  # seed and step
    grad = randn(40, 33, seed=1, dtype=dtype)
    y.backward(grad)
    assert same(x.grad, dropout(grad, 0.25, seed=1, step=4))


def test_gradients_of_dropout():
    x = randn(3, 7, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: dropout(x, 0.4, seed=0), x)
    assert torch.autograd.gradgradcheck(lambda x: dropout(x, 0.4, seed=0), x)


def test_dropout_as_a_module():
    layer = kdkernels.Dropout(0.5, seed=3, stream=2)
    x = torch.ones(4, 50)
    first, second = layer(x), layer(x)
    assert same(first, dropout(x, 0.5, seed=3, stream=2)) and layer.step == 2
    assert same(second, dropout(x, 0.5, seed=3, stream=2, step=1))
    assert layer.eval()(x) is x
    other = kdkernels.Dropout(0.5)
    other.load_state_dict(layer.state_dict())
    other.stream = 2
    assert same(other(x), dropout(x, 0.5, seed=3, stream=2, step=2))
    layer.reset_parameters()
    assert layer.step == 0 and repr(layer) == "Dropout(p=0.5, seed=3)"


# ---- a seed per row ------------------------------------------------------------------------------

SEEDS = torch.tensor([5, -1, 2**62, 5, 0])
STEPS = torch.tensor([0, 3, 2**32 - 1, 0, 9])


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 3), (5, 1000), (5, 7, 11), (5,), (5, 0)])
def test_a_row_has_the_noise_that_it_would_have_alone(shape, dtype, distribution):
    x = randn(*shape, dtype=dtype)
    noise = {"stream": 2, "offset": 3, "distribution": distribution}
    for steps in (STEPS, 4, torch.tensor(4)):
        of_row = steps.tolist() if steps is STEPS else [4] * 5
        alone = [{"seed": int(s), "step": t, **noise} for s, t in zip(SEEDS, of_row, strict=True)]
        rows = {"seed": SEEDS, "step": steps, **noise}
        assert same(
            randn_like(x, **rows),
            torch.stack([randn_like(row, **a) for row, a in zip(x, alone, strict=True)]),
        )
        for multiplicative in (False, True):
            options = {"multiplicative": multiplicative}
            want = [input_noise(r, 0.3, **a, **options) for r, a in zip(x, alone, strict=True)]
            assert same(input_noise(x, 0.3, **rows, **options), torch.stack(want))
            tensors = [x.clone(), x[:, None].clone()]
            add_noise_(tensors, [0.3, 0.5], **rows, **options)
            assert same(tensors[0], torch.stack(want))
            a_second = [
                input_noise(r, 0.5, **a | {"stream": 3}, **options)
                for r, a in zip(x, alone, strict=True)
            ]
            assert same(tensors[1][:, 0], torch.stack(a_second))


@pytest.mark.parametrize("std_shape", [(), (1,), (5, 1, 1), (7, 1), (11,), (5, 7, 1), (5, 7, 11)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_stds_of_rows_with_seeds(std_shape, dtype):
    x = randn(5, 7, 11, dtype=dtype).requires_grad_()
    std = randn(*std_shape, seed=2, dtype=dtype).abs().requires_grad_()
    got = input_noise(x, std, seed=SEEDS, multiplicative=True)
    eps = randn_like(x.detach().double(), seed=SEEDS)
    wide = [t.detach().double().requires_grad_() for t in (x, std)]
    want = wide[0] * (1 + wide[1] * eps)
    tolerance = (
        {"rtol": 1e-2, "atol": 2e-2} if dtype.itemsize == 2 else {"rtol": 1e-6, "atol": 1e-6}
    )
    torch.testing.assert_close(got.double(), want, **tolerance)
    grads = torch.autograd.grad(got.sum(), (x, std))
    wants = torch.autograd.grad(want.sum(), wide)
    tolerance["atol"] *= 20  # sums of up to 385
    for grad, want in zip(grads, wants, strict=True):
        torch.testing.assert_close(grad.double(), want, **tolerance)


def test_rows_of_the_reference():
    x = torch.empty(5, 33)
    got = randn_like(x, seed=SEEDS, step=STEPS, offset=1)
    want = reference.randn_like(x, seed=SEEDS, step=STEPS, offset=1)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


X = torch.zeros(5, 3)
BAD = [
    (lambda: randn_like(X, seed=torch.arange(4)), ValueError, "seed has 4 elements"),
    (lambda: randn_like(X, seed=torch.arange(5.0)), TypeError, "seed has dtype"),
    (lambda: randn_like(X, seed=SEEDS[:, None]), ValueError, "seed has shape"),
    (lambda: randn_like(X, seed=SEEDS, step=torch.arange(4)), ValueError, "step has shape"),
    (lambda: randn_like(X, seed=0, step=torch.arange(4)), ValueError, "step has 4 elements"),
    (lambda: randn_like(torch.zeros(()), seed=SEEDS), ValueError, "seed has 5 elements"),
    (lambda: add_noise_([X, X[:4].clone()], 0.1, seed=SEEDS), ValueError, "seed has 5 elements"),
    (lambda: dropout(X, 0.5, seed=SEEDS), ValueError, "seed has shape"),
    (lambda: dropout(X, 1.5, seed=0), ValueError, "p is 1.5"),
    (lambda: dropout(X, math.nan, seed=0), ValueError, "p is nan"),
    (lambda: dropout(X, "half", seed=0), TypeError, "p is a str"),
    (lambda: dropout(X.int(), 0.5, seed=0), TypeError, "x has dtype"),
    (lambda: dropout([1.0], 0.5, seed=0), TypeError, "x is a list"),
    (lambda: kdkernels.Dropout(-0.1), ValueError, "p is -0.1"),
    (lambda: kdkernels.Dropout(1.1), ValueError, "p is 1.1"),
    (lambda: stochastic_round(X, torch.float32, seed=0), TypeError, "dtype is Float"),
    (lambda: stochastic_round(X, "bf16", seed=0), TypeError, "dtype is a str"),
    (lambda: stochastic_round(X.double(), seed=0), TypeError, "x has dtype"),
    (lambda: stochastic_round(X, seed="zero"), TypeError, "seed is a str"),
    (lambda: stochastic_round(X, seed=0, step=-1), ValueError, "step is -1"),
    (lambda: stochastic_round(X.clone().requires_grad_(), seed=0), ValueError, "x requires grad"),
]


@pytest.mark.parametrize(("call", "error", "match"), BAD)
def test_bad_arguments_are_named(call, error, match):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.skipif(EMULATED, reason="of the CPU's")
def test_a_step_of_a_row_that_is_out_of_range():
    with pytest.raises(ValueError, match="step is -1"):
        randn_like(X, seed=SEEDS, step=torch.tensor([0, 0, -1, 0, 0]))


@pytest.mark.parametrize(("dtype", "cut"), [(torch.float8_e4m3fn, 20), (torch.float8_e5m2, 21)])
def test_a_share_finer_than_the_bits_is_rounded(dtype, cut):
    """Of more than 16 bits that are cut off: up from half of the last that random bits decide."""
    bits = reference.noise._bits(1000, reference.noise._FOR_ROUNDING, seed=3).long()
    low = ((2**16 - bits) << (cut - 16)) - (1 << (cut - 17))
    for less, want in ((0, 1 + 2.0 ** (cut - 23)), (1, 1.0)):
        x = (0x3F800000 + low - less).int().view(torch.float32)
        assert (stochastic_round(x, dtype, seed=3).float() == want).all()
