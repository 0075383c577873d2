"""Optimizers with noise: torch.optim without it, noise where it belongs, in any loop, resumed."""

import copy
import inspect
import io
import itertools
import math
import pickle
import random
import warnings

import pytest
import sklearn.datasets
import torch
from torch import nn

import kdkernels
from kdkernels import (
    SGLD,
    GradientNoise,
    NoiseDominatesWarning,
    NoisyAdamW,
    NoisySGD,
    add_noise_,
    evolution_step,
    mezo_step,
    pSGLD,
    reference,
)

pytestmark = pytest.mark.quick

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(7, 5), (300,), (), (0, 3), (2, 3, 4, 5)]
DISTRIBUTIONS = kdkernels.noise.DISTRIBUTIONS


def randn(*shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def parameters(dtype=torch.float32):
    """Of several shapes; the last one is channels_last."""
    params = [randn(*shape, seed=k, dtype=dtype) for k, shape in enumerate(SHAPES)]
    params[-1] = params[-1].to(memory_format=torch.channels_last)
    return [nn.Parameter(p) for p in params]


def set_gradients(params, step):
    for k, p in enumerate(params):
        p.grad = torch.empty_like(p).copy_(randn(*p.shape, seed=1000 * step + k))


def train(optimizer, params, steps, before=None):
    for step in steps:
        set_gradients(params, step)
        if before is not None:
            before(params, step)
        optimizer.step()


def bits(tensors):
    return [t.detach().reshape(-1).view(torch.uint8).clone() for t in tensors]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(bits(a), bits(b), strict=True))


def assert_close(got, want, ulps):
    """Within so many units in the last place, of 1 where an element is smaller."""
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        error = (a.detach().double() - b.detach().double()).abs()
        allowed = ulps * torch.finfo(a.dtype).eps * b.detach().double().abs().clamp(min=1)
        assert (error <= allowed).all(), (a.shape, (error / allowed).max() * ulps)


def grouped(params, **numbers):
    """Three groups, each with its own numbers."""
    return [
        {"params": params[:2]},
        {"params": params[2:4], **{name: 0.5 * value for name, value in numbers.items()}},
        {"params": params[4:], **{name: 0.25 * value for name, value in numbers.items()}},
    ]


# ---- without noise: torch.optim ------------------------------------------------------------------

SGD = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.1},
    {"momentum": 0.9, "weight_decay": 0.1, "maximize": True},
    {"weight_decay": 0.1},
]
ADAMW = [
    {},
    {"weight_decay": 0.0},
    {"betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.3},
    {"betas": (0.0, 0.99), "maximize": True},
]
PAIRS = [(NoisySGD, torch.optim.SGD, {"lr": 0.01, **o}) for o in SGD]
PAIRS += [(NoisyAdamW, torch.optim.AdamW, {"lr": 0.01, **o}) for o in ADAMW]


@pytest.mark.parametrize("implementation", [{"foreach": False}, {"foreach": True}, {"fused": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("ours", "theirs", "options"), PAIRS)
def test_equals_torch_without_noise(ours, theirs, options, dtype, implementation):
    for capturable in (False, True):
        mine, other = parameters(dtype), parameters(dtype)
        a = ours(grouped(mine, lr=0.01), capturable=capturable, **options)
        b = theirs(grouped(other, lr=0.01), **implementation, **options)
        train(a, mine, [0])
        train(b, other, [0])
        assert_close(mine, other, 1)
        # Each step rounds otherwise by up to an ulp, and momentum makes ten of one.
        train(a, mine, range(1, 50))
        train(b, other, range(1, 50))
        assert_close(mine, other, 4 if dtype == torch.float32 else 6)


@pytest.mark.parametrize(
    ("ours", "theirs"), [(NoisySGD, torch.optim.SGD), (NoisyAdamW, torch.optim.AdamW)]
)
def test_defaults_are_torchs(ours, theirs):
    mine, other = (inspect.signature(kind).parameters for kind in (ours, theirs))
    shared = (mine.keys() & other.keys()) - {"params"}
    assert {"lr", "weight_decay"} < shared
    for name in shared:
        assert mine[name].default == other[name].default, name


def wide(tensors):
    return [nn.Parameter(t.detach().float()) for t in tensors]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("ours", "theirs", "options"), PAIRS)
def test_16_bit_parameters_are_computed_in_fp32(ours, theirs, options, dtype):
    """Each step is torch's on the fp32 values of parameters and state, rounded once."""
    mine = parameters(dtype)
    a = ours(mine, **options)
    for step in range(10):
        other = wide(mine)
        b = theirs(other, **options)
        saved = {"state": {}, "param_groups": b.state_dict()["param_groups"]}
        for k, p in enumerate(mine):
            state = {n: v.float() if torch.is_tensor(v) else v for n, v in a.state[p].items()}
            if state and theirs is torch.optim.AdamW:
                saved["state"][k] = state | {"step": torch.tensor(float(state["step"]))}
            elif "momentum_buffer" in state:
                saved["state"][k] = state
        b.load_state_dict(saved)
        set_gradients(mine, step)
        for p, q in zip(mine, other, strict=True):
            q.grad = p.grad.float()
        a.step()
        b.step()
        assert_close(mine, [q.detach().to(dtype) for q in other], 1)


@pytest.mark.parametrize(("ours", "theirs", "options"), [PAIRS[1], PAIRS[6]])
def test_takes_over_from_torch(ours, theirs, options):
    mine, other = parameters(), parameters()
    b = theirs(other, **options)
    train(b, other, range(3))
    with torch.no_grad():
        torch._foreach_copy_(mine, other)
    for capturable in (False, True):
        params = copy.deepcopy(mine)
        a = ours(params, capturable=capturable, seed=4, **options)
        a.load_state_dict(copy.deepcopy(b.state_dict()))
        assert a.param_groups[0]["seed"] == 4 and a.param_groups[0]["std"] == 0
        resumed = copy.deepcopy(other)
        c = theirs(resumed, **options)
        c.load_state_dict(copy.deepcopy(b.state_dict()))
        train(a, params, range(3, 8))
        train(c, resumed, range(3, 8))
        assert_close(params, resumed, 4)


def test_mixed_dtypes_in_one_list():
    kinds = list(itertools.product(DTYPES, SHAPES))
    params = [nn.Parameter(randn(*s, seed=k, dtype=d)) for k, (d, s) in enumerate(kinds)]
    alone = copy.deepcopy(params)
    optimizer = NoisyAdamW(params, std=0.1, seed=5)
    train(optimizer, params, range(3))
    for k, p in enumerate(alone):
        # A parameter by itself, at its stream: the others have no gradient.
        rest = [nn.Parameter(torch.empty(1)) for _ in range(k)]
        one = NoisyAdamW([*rest, p], std=0.1, seed=5)
        for step in range(3):
            p.grad = randn(*p.shape, seed=1000 * step + k).to(p.dtype)
            one.step()
    assert same(params, alone)


def test_memory_layout_does_not_matter():
    dense = [nn.Parameter(randn(4, 6, 5, 3, seed=1))]
    images = [nn.Parameter(dense[0].detach().to(memory_format=torch.channels_last))]
    mixed = [nn.Parameter(images[0].detach().clone())]

    def contiguous(params, step):
        params[0].grad = params[0].grad.contiguous()

    for params in (dense, images, mixed):
        before = contiguous if params is mixed else None
        train(NoisyAdamW(params, std=0.5, seed=1), params, range(3), before)
    assert mixed[0].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(dense[0], images[0]) and torch.equal(dense[0], mixed[0])
    gradient = GradientNoise(torch.optim.SGD(images, 0.0), 0.5, seed=1)
    images[0].grad = torch.zeros_like(images[0])
    gradient.optimizer.step()
    want = kdkernels.randn_like(dense[0], seed=1)
    torch.testing.assert_close(images[0].grad, 0.5 * want, rtol=1e-6, atol=0)


# ---- with noise ----------------------------------------------------------------------------------


def noise_the_gradients(std, **noise):
    def add(params, step):
        grads = [p.grad for p in params]
        reference.add_noise_(grads, std, step=step, **noise)

    return add


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(("ours", "theirs", "options"), [PAIRS[k] for k in (0, 2, 3, 4, 6, 8)])
def test_equals_torch_fed_reference_noise(ours, theirs, options, distribution, capturable):
    mine, other = parameters(), parameters()
    noise = {"seed": -7, "distribution": distribution}
    a = ours(grouped(mine, lr=0.01), std=0.3, capturable=capturable, **noise, **options)
    b = theirs(grouped(other, lr=0.01), **options)
    train(a, mine, range(10))
    train(b, other, range(10), noise_the_gradients(0.3, **noise))
    assert_close(mine, other, 8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_noise_is_add_noise(dtype):
    params = parameters(dtype)
    noise = GradientNoise(torch.optim.SGD(params, 0.0), 0.3, seed=9, distribution="laplace")
    for step in range(3):
        set_gradients(params, step)
        want = [p.grad.clone() for p in params]
        add_noise_(want, 0.3, seed=9, step=step, distribution="laplace")
        noise.optimizer.step()
        assert same([p.grad for p in params], want)
    assert noise.step == 3


def test_a_std_a_group():
    params = parameters()
    groups = grouped(params, lr=0.1, std=0.4)
    noisy = NoisySGD(groups, lr=0.1, std=0.4, seed=3)
    other = copy.deepcopy(params)
    plain = torch.optim.SGD(grouped(other, lr=0.1), lr=0.1)
    noise = GradientNoise(plain, [0.4, torch.tensor(0.2), lambda t: 0.1], seed=3)
    train(noisy, params, range(3))
    train(plain, other, range(3))
    assert noise.step == 3
    assert_close(params, other, 2)
    plain.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    with pytest.raises(ValueError, match="std holds 3.*: 4"):
        plain.step()


def random_groups(params, draw):
    """A layout of a few groups, each with numbers of its own, and what each parameter's are."""
    left, groups, stds = list(params), [], []
    while left:
        count = draw.randint(0, len(left))
        std = draw.choice([0.0, 0.1, 0.5])
        groups.append({"params": left[:count], "lr": draw.choice([0.0, 0.01, 0.1])})
        groups[-1] |= {"weight_decay": draw.choice([0.0, 0.1]), "maximize": draw.random() < 0.5}
        if draw.random() < 0.5:
            groups[-1] |= {"momentum": 0.9, "nesterov": draw.random() < 0.5}
            groups[-1]["dampening"] = 0.0 if groups[-1]["nesterov"] else 0.5
        stds += [std] * count
        groups[-1]["std"] = std
        left = left[count:]
    return groups, stds


@pytest.mark.parametrize("kind", [NoisySGD, NoisyAdamW])
@pytest.mark.parametrize("seed", range(8))
def test_any_layout_of_groups(kind, seed):
    draw = random.Random(seed)
    mine, other = parameters(), parameters()
    groups, stds = random_groups(mine, draw)
    theirs = {NoisySGD: torch.optim.SGD, NoisyAdamW: torch.optim.AdamW}[kind]
    if kind is NoisyAdamW:
        for group in groups:
            for name in ("momentum", "nesterov", "dampening"):
                group.pop(name, None)
    rest = iter(other)
    plain = [
        {k: v for k, v in group.items() if k not in ("params", "std")}
        | {"params": list(itertools.islice(rest, len(group["params"])))}
        for group in groups
    ]
    a, b = kind(groups, seed=seed), theirs(plain)
    for step in range(5):
        missing = [draw.random() < 0.3 for _ in mine]
        for params in (mine, other):
            set_gradients(params, step)
        reference.add_noise_([p.grad for p in other], stds, seed=seed, step=step)
        for p, q, none in zip(mine, other, missing, strict=True):
            if none:
                p.grad = q.grad = None
        a.step()
        b.step()
    assert_close(mine, other, 8)


def test_parameters_without_a_gradient_shift_nobody():
    def run(skip, make):
        params = parameters()
        optimizer = make(params)
        before = [p.detach().clone() for p in params]
        for step in range(4):
            set_gradients(params, step)
            for k in skip if step % 2 == 1 else ():
                params[k].grad = None
            optimizer.step()
        return before, params

    def with_hook(params):
        optimizer = torch.optim.SGD(params, 0.1, momentum=0.9)
        GradientNoise(optimizer, 0.3, seed=2)
        return optimizer

    makers = [
        with_hook,
        lambda p: NoisySGD(p, 0.1, momentum=0.9, std=0.3, seed=2),
        lambda p: NoisyAdamW(p, std=0.3, seed=2),
        lambda p: pSGLD(p, 0.1, seed=2),
    ]
    for make in makers:
        _, whole = run([], make)
        before, some = run([0, 2], make)
        assert same([some[k] for k in (1, 3, 4)], [whole[k] for k in (1, 3, 4)])
        assert not torch.equal(some[0], whole[0]) and not torch.equal(some[0], before[0])
    # What is skipped in steps 1 and 3 has the noise of steps 0 and 2, and counts two updates.
    params = parameters()
    optimizer = NoisyAdamW(params, std=0.3, seed=2)
    for step in range(4):
        set_gradients(params, step)
        if step % 2 == 1:
            params[0].grad = None
        optimizer.step()
    assert [optimizer.state[p]["step"] for p in params[:2]] == [2, 4]
    alone = parameters()[:1]
    theirs = torch.optim.AdamW(alone)
    train(theirs, alone, [0, 2], noise_the_gradients(0.3, seed=2))
    assert_close(params[:1], alone, 8)


def small_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def batch(step, size=8):
    return randn(size, 6, seed=step), torch.arange(size) % 3


def loss_of(model, step, part=slice(None)):
    x, y = batch(step)
    return nn.functional.cross_entropy(model(x[part]), y[part], reduction="sum") / len(x)


def hooked(optimizer_class, capturable=False, **options):
    def make(params):
        optimizer = optimizer_class(params, **options)
        schedule = kdkernels.neelakantan(0.01)
        return optimizer, GradientNoise(optimizer, schedule, seed=6, capturable=capturable)

    return make


def ours(optimizer_class, **options):
    def make(params):
        return optimizer_class(params, seed=6, **options), None

    return make


MAKERS = {
    "hook-sgd": hooked(torch.optim.SGD, lr=0.1, momentum=0.9),
    "hook-adam": hooked(torch.optim.Adam, lr=0.01),
    "hook-adam-fused": hooked(torch.optim.Adam, lr=0.01, fused=True),
    "hook-adam-capturable": hooked(torch.optim.Adam, True, lr=0.01, fused=True),
    "hook-lbfgs": hooked(torch.optim.LBFGS, max_iter=4, line_search_fn="strong_wolfe"),
    "sgd": ours(NoisySGD, lr=0.1, std=0.1),
    "sgd-momentum": ours(NoisySGD, lr=0.1, momentum=0.9, std=kdkernels.cosine(0.1, 4)),
    "sgd-capturable": ours(NoisySGD, lr=0.1, momentum=0.9, std=0.1, capturable=True),
    "adamw": ours(NoisyAdamW, lr=0.01, std=0.1, distribution="uniform"),
    "adamw-capturable": ours(
        NoisyAdamW, lr=torch.tensor(0.01), std=kdkernels.exponential(0.1, 0.9), capturable=True
    ),
    "sgld": ours(SGLD, lr=1e-4, num_data=100, weight_decay=1.0),
    "psgld": ours(pSGLD, lr=1e-4, num_data=100),
}


def loop(model, optimizer, steps):
    for step in steps:

        def closure(step=step):
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


@pytest.mark.parametrize("kind", MAKERS)
def test_accumulated_gradients_get_the_noise_once(kind):
    whole, parts = small_model(), small_model()
    a, b = MAKERS[kind](whole.parameters())[0], MAKERS[kind](parts.parameters())[0]
    if isinstance(a, torch.optim.LBFGS):
        pytest.skip("a closure has all micro-batches")
    for step in range(3):
        a.zero_grad()
        loss_of(whole, step).backward()
        a.step()
        b.zero_grad()
        for part in (slice(0, 3), slice(3, 5), slice(5, 8)):
            loss_of(parts, step, part).backward()
        b.step()
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-3, atol=2e-5)


def test_noise_comes_after_clipping():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    noise = GradientNoise(optimizer, 0.5, seed=1, diagnostics=True, warn_above=100)
    (100 * loss_of(model, 0)).backward()
    before = nn.utils.clip_grad_norm_(model.parameters(), 0.25)
    clipped = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    assert before > 1
    (norms,) = noise.norms()
    assert norms.gradient == pytest.approx(0.25, rel=1e-4)
    for p, g, k in zip(model.parameters(), clipped, range(4), strict=True):
        want = g + 0.5 * kdkernels.randn_like(p, seed=1, stream=k)
        torch.testing.assert_close(p.grad, want)


def test_closures():
    """Once a step, whatever calls the closure; every evaluation of a step has the same noise."""
    seen = []
    params = [nn.Parameter(torch.zeros(5))]
    optimizer = torch.optim.LBFGS(params, max_iter=3)
    noise = GradientNoise(optimizer, 0.5, seed=4)

    def closure():
        optimizer.zero_grad()
        loss = (params[0] - 1).square().sum()
        loss.backward()
        seen.append((params[0].detach().clone(), params[0].grad))
        return loss

    for step in range(2):
        seen.clear()
        optimizer.step(closure)
        assert len(seen) > 1 and noise.step == step + 1
        for theta, grad in seen:
            got = grad - 2 * (theta - 1)
            want = 0.5 * kdkernels.randn_like(theta, seed=4, step=step)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    for make in (lambda p: NoisySGD(p, 0.1, std=0.5, seed=4), lambda p: torch.optim.SGD(p, 0.1)):
        params = [nn.Parameter(torch.zeros(5))]
        optimizer = make(params)
        if not isinstance(optimizer, NoisySGD):
            GradientNoise(optimizer, 0.5, seed=4)
        loss = optimizer.step(closure)
        assert loss == 5
        want = 0.1 * 2 - 0.05 * kdkernels.randn_like(params[0], seed=4)
        torch.testing.assert_close(params[0].detach(), want)


# ---- a gradient scaler ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("capturable", [False, True])
def test_gradients_are_unscaled_before_the_noise(dtype, capturable):
    """What a GradScaler leaves to an optimizer, in every dtype."""
    params = parameters(dtype)
    set_gradients(params, 0)
    want = [p.grad.clone() for p in params]
    add_noise_(want, 0.25, seed=3)
    fused = torch.optim.SGD(params, 0.0, fused=True)
    GradientNoise(fused, 0.25, seed=3, capturable=capturable)
    noisy = NoisySGD(copy.deepcopy(params), 1.0, std=0.25, seed=3, capturable=True)
    twice = copy.deepcopy(noisy)
    for p, q, r in zip(params, *(o.param_groups[0]["params"] for o in (noisy, twice)), strict=True):
        q.grad, r.grad, p.grad = p.grad * 4, p.grad.clone(), p.grad * 4
    for optimizer in (fused, noisy):
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
        optimizer.step()
    twice.step()
    assert same([p.grad for p in params], want)
    for name in ("grad", "data"):
        a, b = ([getattr(p, name) for p in o.param_groups[0]["params"]] for o in (noisy, twice))
        assert same(a, b)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("kind", [k for k in MAKERS if k != "hook-lbfgs"])
def test_gradient_scaler(kind, clip):
    """Steps with infinities count for nothing; the others are as without a scaler."""
    scaled, plain = small_model(), small_model()
    a, noise = MAKERS[kind](scaled.parameters())
    b, _ = MAKERS[kind](plain.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    for step in range(6):
        before = [p.detach().clone() for p in scaled.parameters()]
        a.zero_grad()
        loss = loss_of(scaled, step)
        if step % 3 == 1:
            loss = loss * math.inf
        scaler.scale(loss).backward()
        if clip:
            scaler.unscale_(a)
            nn.utils.clip_grad_norm_(scaled.parameters(), 0.1)
        scaler.step(a)
        scaler.update()
        if step % 3 == 1:
            assert same(list(scaled.parameters()), before)
            continue
        b.zero_grad()
        loss_of(plain, step).backward()
        if clip:
            nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        b.step()
        # Scales are powers of two.
        assert same(list(scaled.parameters()), list(plain.parameters())), step
        assert same([p.grad for p in scaled.parameters()], [p.grad for p in plain.parameters()])
    steps = noise.step if noise is not None else a.param_groups[0]["noise_step"]
    assert steps == 4
    assert all(s.get("step", 4) == 4 for s in a.state.values())


# ---- stop and resume -----------------------------------------------------------------------------


def saved_and_loaded(*objects):
    file = io.BytesIO()
    torch.save([o.state_dict() for o in objects if o is not None], file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.parametrize("kind", MAKERS)
def test_stopping_after_any_step_changes_nothing(kind):
    steps = 5
    straight = small_model()
    loop(straight, MAKERS[kind](straight.parameters())[0], range(steps))
    want = list(straight.parameters())
    for stop in range(steps):
        model = small_model()
        optimizer, noise = MAKERS[kind](model.parameters())
        loop(model, optimizer, range(stop))
        states = saved_and_loaded(model, optimizer, noise)
        torch.manual_seed(99)
        model = small_model(1)
        optimizer, noise = MAKERS[kind](model.parameters())
        for thing, state in zip((model, optimizer, noise), states, strict=False):
            thing.load_state_dict(state)
        loop(model, optimizer, range(stop, steps))
        assert same(list(model.parameters()), want), stop


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("kind", MAKERS)
def test_copies_go_on_alike(kind, copier):
    model = small_model()
    optimizer, noise = MAKERS[kind](model.parameters())
    if kind == "hook-lbfgs":
        pytest.skip("torch.optim.LBFGS cannot be copied")
    loop(model, optimizer, range(2))
    model_copy, optimizer_copy, noise_copy = copier((model, optimizer, noise))
    loop(model, optimizer, range(2, 4))
    loop(model_copy, optimizer_copy, range(2, 4))
    assert same(list(model.parameters()), list(model_copy.parameters()))
    if noise is not None:
        assert noise_copy.step == noise.step == 4


def test_a_seed_is_drawn_once_and_kept():
    params = parameters()
    torch.manual_seed(0)
    a, b = NoisySGD(params, std=0.1), NoisySGD(params, std=0.1)
    c = GradientNoise(torch.optim.SGD(params), 0.1)
    torch.manual_seed(0)
    d = NoisySGD(params, std=0.1)
    seeds = [o.param_groups[0]["seed"] for o in (a, b, d)] + [c.seed]
    assert seeds[0] == seeds[2] and len(set(seeds)) == 3
    assert a.state_dict()["param_groups"][0]["seed"] == seeds[0]
    for seed in (2**64 - 1, -1):
        assert NoisySGD(params, seed=seed).param_groups[0]["seed"] == -1


def test_schedules_stay_as_constructed():
    params = parameters()
    schedule = kdkernels.cosine(0.5, 10)
    a = NoisySGD([{"params": params[:2], "std": schedule}, {"params": params[2:]}], std=0.25)
    state = a.state_dict()
    assert [g["std"] for g in state["param_groups"]] == [None, 0.25]
    b = NoisySGD([{"params": params[:2], "std": schedule}, {"params": params[2:]}], std=0.75)
    b.load_state_dict(state)
    assert b.param_groups[0]["std"] is schedule and b.param_groups[1]["std"] == 0.25
    assert b.param_groups[0]["seed"] == a.param_groups[0]["seed"]


def test_state_that_others_move_or_clear_is_seen():
    params, other = parameters(), parameters()
    a, b = (NoisySGD(p, 0.1, momentum=0.9, std=0.1, seed=1) for p in (params, other))
    train(a, params, range(2))
    train(b, other, range(2))
    for state in a.state.values():  # as offloading does
        state["momentum_buffer"] = state["momentum_buffer"].clone()
    train(a, params, [2])
    train(b, other, [2])
    assert same(params, other)
    a.state.clear()
    train(a, params, [3])
    assert all(s["step"] == 1 for s in a.state.values())
    a.param_groups[0]["momentum"] = 0.0
    train(a, params, [4])
    assert all(s["step"] == 2 for s in a.state.values())


# ---- compiled ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hook-sgd", "sgd-momentum", "adamw-capturable"])
def test_inside_a_compiled_step(kind):
    eager, compiled = small_model(), small_model()
    loop(eager, MAKERS[kind](eager.parameters())[0], range(4))
    optimizer, _ = MAKERS[kind](compiled.parameters())

    @torch.compile(backend="aot_eager")
    def one(x, y):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(compiled(x), y, reduction="sum") / len(x)
        loss.backward()
        optimizer.step()
        return loss

    for step in range(4):
        one(*batch(step))
    for p, q in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    torch.compile(optimizer.step, backend="aot_eager")()
    assert not same(list(eager.parameters()), list(compiled.parameters()))


# ---- schedules -----------------------------------------------------------------------------------

SCHEDULES = [
    (kdkernels.neelakantan(), lambda t: math.sqrt(0.3 / (1 + t) ** 0.55)),
    (kdkernels.neelakantan(1.0, 0.5), lambda t: math.sqrt(1 / (1 + t) ** 0.5)),
    (
        kdkernels.cosine(0.4, 10, 0.1),
        lambda t: 0.1 + 0.3 * (1 + math.cos(math.pi * min(t, 10) / 10)) / 2,
    ),
    (kdkernels.exponential(0.5, 0.9), lambda t: 0.5 * 0.9**t),
]


@pytest.mark.parametrize(("schedule", "want"), SCHEDULES)
def test_schedules(schedule, want):
    for t in (0, 1, 2, 5, 10, 11, 1000):
        assert schedule(t) == pytest.approx(want(t), rel=1e-14)
        on_device = schedule(torch.tensor(t))
        assert on_device.dtype == torch.float64
        assert on_device.item() == pytest.approx(want(t), rel=1e-14)
    assert pickle.loads(pickle.dumps(schedule))(3) == schedule(3)


@pytest.mark.parametrize("capturable", [False, True])
def test_a_scheduled_std_is_that_of_the_step(capturable):
    def noise(t):
        return 1.0 / (1 + t)

    params = [nn.Parameter(torch.zeros(4))]
    for make in (
        lambda: NoisySGD(params, 1.0, std=noise, seed=1, capturable=capturable),
        lambda: (
            GradientNoise(
                torch.optim.SGD(params, 1.0), noise, seed=1, capturable=capturable
            ).optimizer
        ),
    ):
        optimizer = make()
        for step in range(4):
            params[0].data.zero_()
            params[0].grad = torch.zeros(4)
            optimizer.step()
            want = -kdkernels.randn_like(params[0], seed=1, step=step) / (1 + step)
            torch.testing.assert_close(params[0].detach(), want)


@pytest.mark.parametrize("capturable", [False, True])
def test_tensors_for_lr_and_std(capturable):
    mine, other = parameters(), parameters()
    lr, std = torch.tensor(0.01), torch.tensor([0.2])
    options = {"momentum": 0.9, "seed": 1}
    a = NoisySGD(mine, lr, std=std, capturable=capturable, **options)
    b = NoisySGD(other, lr.item(), std=std.item(), **options)
    for step in range(4):
        if step == 2:
            lr.fill_(0.02)
            std.fill_(0.1)
            b.param_groups[0] |= {"lr": lr.item(), "std": std.item()}
        train(a, mine, [step])
        train(b, other, [step])
    assert same(mine, other)


def test_learning_rate_schedulers_and_new_groups():
    params, other = parameters(), parameters()
    a = NoisySGD(params[:2], 0.1, std=0.2, seed=1)
    b = torch.optim.SGD(other[:2], 0.1)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (a, b)]
    for step in range(5):
        if step == 2:
            a.add_param_group({"params": params[2:], "std": 0.4, "lr": 0.01})
            b.add_param_group({"params": other[2:], "lr": 0.01})
            assert [g["noise_step"] for g in a.param_groups] == [step, step]
            for scheduler in schedulers:
                scheduler.base_lrs.append(0.01)
        for p in (params, other):
            set_gradients(p, step)
        grads = [p.grad for p in other]
        std = [0.2, 0.2, 0.4, 0.4, 0.4]
        reference.add_noise_(grads, std, seed=1, step=step)
        a.step()
        b.step()
        for scheduler in schedulers:
            scheduler.step()
        assert [g["lr"] for g in a.param_groups] == [g["lr"] for g in b.param_groups]
        assert {g["noise_step"] for g in a.param_groups} == {step + 1}
    assert_close(params, other, 4)


# ---- Langevin dynamics ---------------------------------------------------------------------------

CHAINS = 100_000


def chains(optimizer_class, steps, mean=1.5, variance=0.25, **options):
    """That many independent chains of exp(-(theta - mean)^2 / (2 variance)), as one parameter."""
    theta = nn.Parameter(torch.full((CHAINS,), mean))
    optimizer = optimizer_class([theta], seed=8, **options)
    num_data = options.get("num_data", 1)
    sign = -1 if options.get("maximize") else 1
    for _ in range(steps):
        theta.grad = sign * (theta.detach() - mean) / variance / num_data
        optimizer.step()
    return theta.detach().double()


def assert_gaussian(sample, mean, variance):
    """Mean and variance within five standard errors."""
    assert abs(sample.mean() - mean) < 5 * math.sqrt(variance / CHAINS)
    assert abs(sample.var() / variance - 1) < 5 * math.sqrt(2 / CHAINS)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_data": 50}, {"temperature": 0.5}, {"maximize": True}, {"distribution": "uniform"}],
)
def test_sgld_samples_the_posterior(options):
    """theta' = (1 - lr / 2v) theta + sqrt(lr T) eps: stationary variance T v / (1 - lr / 4v)."""
    variance, lr = 0.25, 0.1
    sample = chains(SGLD, 60, lr=lr, **options)
    assert_gaussian(
        sample, 1.5, options.get("temperature", 1) * variance / (1 - lr / (4 * variance))
    )


def test_sgld_with_a_prior():
    """Likelihood N(1.5, 0.25), prior N(0, 1 / 2): precision 6, mean 1."""
    sample = chains(SGLD, 100, lr=0.02, weight_decay=2.0)
    assert_gaussian(sample, 1.0, (1 / 6) / (1 - 0.02 * 6 / 4))


def test_sgld_at_temperature_0_is_gradient_descent():
    mine, other = parameters(), parameters()
    train(SGLD(mine, 0.1, num_data=3, weight_decay=0.5, temperature=0), mine, range(5))
    theirs = torch.optim.SGD(other, 0.05, weight_decay=0.5)

    def thrice(params, step):
        for p in params:
            p.grad *= 3

    train(theirs, other, range(5), thrice)
    assert_close(mine, other, 4)


def test_psgld_samples_the_posterior(set_threads):
    """Slow preconditioners: G is nearly the same for all, 1 / (eps + sqrt(E g^2))."""
    set_threads(1)
    variance, eps, beta2, lr = 0.25, 1.0, 0.997, 0.1
    sample = chains(pSGLD, 1500, lr=lr, eps=eps, beta2=beta2)
    step = lr / (eps + math.sqrt(1 / variance))
    assert abs(sample.mean() - 1.5) < 5 * math.sqrt(variance / CHAINS)
    # What leaving Gamma out costs is of the order of 1 - beta2.
    want = variance / (1 - step / (4 * variance))
    assert abs(sample.var() / want - 1) < 5 * math.sqrt(2 / CHAINS) + 2 * (1 - beta2)


REFERENCES = [  # optimizer, its numbers, whether it has a first and a second moment
    ("sgd", NoisySGD, {"momentum": 0.9, "dampening": 0.2, "std": 0.3}, True, False),
    ("adamw", NoisyAdamW, {"betas": (0.8, 0.9), "std": 0.3}, True, True),
    ("sgld", SGLD, {"num_data": 3.0, "temperature": 0.7}, False, False),
    ("psgld", pSGLD, {"num_data": 3.0, "beta2": 0.9, "eps": 0.1}, False, True),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("update", "make", "rule", "first", "second"), REFERENCES)
def test_updates_are_the_references(update, make, rule, first, second, dtype):
    rule = {"lr": 0.01, "weight_decay": 0.2, "maximize": True, **rule}
    mine, other = parameters(dtype), [p.detach() for p in parameters(dtype)]
    moments = [[torch.zeros_like(p) if kept else None for p in other] for kept in (first, second)]
    optimizer = make(mine, seed=3, diagnostics=True, **rule)
    for step in range(5):
        train(optimizer, mine, [step])
        shares = reference.noisy_update_(
            update,
            other,
            [p.grad for p in mine],
            *moments,
            [step + 1] * len(other),
            [rule] * len(other),
            [kdkernels.randn_like(p, seed=3, step=step, stream=k) for k, p in enumerate(other)],
        )
        assert_close(mine, other, 8)
        (norms,) = optimizer.norms()
        want = [sum(s[k].double().square().sum() for s in shares).sqrt() for k in (0, 1)]
        assert norms.gradient == pytest.approx(want[0].item(), rel=1e-5)
        assert norms.noise == pytest.approx(want[1].item(), rel=1e-5)


# ---- diagnostics ---------------------------------------------------------------------------------


def norm(tensors):
    return math.sqrt(sum(t.double().square().sum().item() for t in tensors))


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("optimizer_class", [NoisySGD, NoisyAdamW, torch.optim.Adam])
def test_norms_are_those_computed_by_hand(optimizer_class, capturable):
    params = parameters()
    groups = grouped(params, lr=0.1)
    if optimizer_class is torch.optim.Adam:
        optimizer = optimizer_class(groups)
        source = GradientNoise(optimizer, 0.3, seed=2, capturable=capturable, diagnostics=True)
    else:
        optimizer = source = optimizer_class(
            groups, std=0.3, seed=2, capturable=capturable, diagnostics=True
        )
    assert source.norms() == []
    for step in range(3):
        set_gradients(params, step)
        grads = [p.grad.clone() for p in params]
        eps = [
            0.3 * kdkernels.randn_like(p, seed=2, step=step, stream=k) for k, p in enumerate(params)
        ]
        if step == 1:
            params[1].grad = None
            grads[1] = eps[1] = torch.zeros(0)
        optimizer.step()
        for norms, part in zip(source.norms(), (slice(2), slice(2, 4), slice(4, 5)), strict=True):
            assert norms.gradient == pytest.approx(norm(grads[part]), rel=1e-6)
            assert norms.noise == pytest.approx(norm(eps[part]), rel=1e-6)
            assert norms.ratio == pytest.approx(norms.noise / norms.gradient)


def test_norms_of_nothing():
    params = parameters()
    optimizer = NoisySGD([{"params": params[:1]}, {"params": params[1:]}], std=0.1, seed=0)
    set_gradients(params, 0)
    optimizer.step()
    assert optimizer.norms() == []
    optimizer.diagnostics = True
    params[0].grad.zero_()
    for p in params[1:]:
        p.grad = None
    optimizer.step()
    first, second = optimizer.norms()
    assert first.gradient == 0 and first.ratio == math.inf
    assert second == (0, 0) and math.isnan(second.ratio)


def test_warns_once_when_noise_dominates():
    def run(std, **options):
        params = parameters()
        noise = GradientNoise(torch.optim.SGD(params, 0.0), std, seed=1, **options)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            train(noise.optimizer, params, range(6))
        return [str(w.message) for w in seen if w.category is NoiseDominatesWarning]

    assert run(9.0) == run(9.0, diagnostics=True) == []
    for options in ({}, {"diagnostics": True}, {"warn_above": 0.5}):
        messages = run(13.0, **options)
        assert len(messages) == 1 and "group 0" in messages[0] and "step 0" in messages[0]
    # It is looked at in steps 0, 3, ...
    late = run(lambda t: 50.0 if t >= 1 else 0.0, check_every=3)
    assert len(late) == 1 and "step 3" in late[0]
    assert run(lambda t: 50.0 if t == 1 else 0.0, check_every=3) == []
    assert run([50.0], capturable=True) == []
    params = parameters()
    noise = GradientNoise(torch.optim.SGD(params, 0.0), 50.0, diagnostics=True)
    for p in params:
        p.grad = torch.zeros_like(p)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        noise.optimizer.step()
    assert noise.norms()[0].ratio == math.inf


def test_the_hook_can_be_removed():
    params = parameters()
    noise = GradientNoise(torch.optim.SGD(params, 0.0), 0.5, seed=1)
    noise.remove()
    set_gradients(params, 0)
    want = [p.grad.clone() for p in params]
    noise.optimizer.step()
    assert same([p.grad for p in params], want) and noise.step == 0
    noise.remove()


# ---- nothing, and bad input ----------------------------------------------------------------------


def test_nothing_to_do():
    empty = NoisySGD([{"params": []}], std=0.1, diagnostics=True)
    empty.step()
    assert empty.param_groups[0]["noise_step"] == 1 and empty.norms() == []
    params = parameters()
    idle = NoisyAdamW(params, std=0.1)
    idle.step()
    assert same(params, parameters())
    assert idle.param_groups[0]["noise_step"] == 1 and not idle.state
    noise = GradientNoise(torch.optim.SGD(params), 0.1)
    noise.optimizer.step()
    assert noise.step == 1
    evolution_step([], lambda: 0.0, population=2, std=1.0, lr=1.0, seed=0, step=0)
    mezo_step([], lambda: 0.0, lr=1.0, seed=0, step=0)


P = [nn.Parameter(torch.ones(3))]
BAD_OPTIMIZERS = [
    (lambda: NoisySGD(P, -1.0), ValueError, "lr is -1"),
    (lambda: NoisySGD(P, "fast"), TypeError, "lr is a str"),
    (lambda: NoisySGD(P, torch.ones(2)), ValueError, r"lr has shape \[2\]"),
    (lambda: NoisySGD(P, std=-0.1), ValueError, "std is -0.1"),
    (lambda: NoisySGD(P, std=math.nan), ValueError, "std is nan"),
    (lambda: NoisySGD(P, std=math.inf), ValueError, "std is inf"),
    (lambda: NoisySGD(P, std=None), TypeError, "std is a NoneType"),
    (lambda: NoisySGD(P, momentum=-1), ValueError, "momentum is -1"),
    (lambda: NoisySGD(P, weight_decay=-1), ValueError, "weight_decay is -1"),
    (lambda: NoisySGD(P, nesterov=True), ValueError, "nesterov.*momentum"),
    (lambda: NoisySGD(P, nesterov=1), TypeError, "nesterov is a int"),
    (lambda: NoisySGD(P, capturable="yes"), TypeError, "capturable is a str"),
    (lambda: NoisySGD(P, diagnostics=2), TypeError, "diagnostics is a int"),
    (lambda: NoisySGD(P, seed=0.5), TypeError, "seed is a float"),
    (lambda: NoisySGD(P, seed=2**64), ValueError, "seed is 1844"),
    (lambda: NoisySGD(P, distribution="cauchy"), ValueError, 'distribution is "cauchy".*laplace'),
    (lambda: NoisySGD(P, beta=1), TypeError, "beta"),
    (lambda: NoisySGD([{"params": [], "seed": 1}, {"params": P}], seed=2), ValueError, "seed is 2"),
    (lambda: NoisySGD([{"params": P, "seed": 2**64}]), ValueError, "seed is 1844"),
    (lambda: NoisyAdamW(P, betas=(0.9, 1.0)), ValueError, r"betas\[1\] is 1"),
    (lambda: NoisyAdamW(P, betas=0.9), ValueError, "betas is 0.9"),
    (lambda: NoisyAdamW(P, eps=-1), ValueError, "eps is -1"),
    (lambda: SGLD(P, 0.1, num_data=-1), ValueError, "num_data is -1"),
    (lambda: SGLD(P, 0.1, temperature=-1), ValueError, "temperature is -1"),
    (lambda: pSGLD(P, 0.1, beta2=1), ValueError, "beta2 is 1"),
    (lambda: NoisySGD([nn.Parameter(torch.ones(1, dtype=torch.complex64))]), TypeError, "params"),
    (lambda: GradientNoise(P, 0.1), TypeError, "optimizer is a list"),
    (lambda: GradientNoise(torch.optim.SGD(P), -1), ValueError, "std is -1"),
    (lambda: GradientNoise(torch.optim.SGD(P), [0.1, 0.1]), ValueError, "std holds 2"),
    (lambda: GradientNoise(torch.optim.SGD(P), 0.1, check_every=0), ValueError, "check_every is 0"),
    (lambda: GradientNoise(torch.optim.SGD(P), 0.1, warn_above=-1), ValueError, "warn_above is -1"),
    (lambda: GradientNoise(torch.optim.SGD(P), 1, distribution=3), TypeError, "distribution is a"),
    (lambda: kdkernels.neelakantan(-1), ValueError, "eta is -1"),
    (lambda: kdkernels.cosine(1, 0), ValueError, "steps is 0"),
    (lambda: kdkernels.exponential("a", 1), TypeError, "std is a str"),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD_OPTIMIZERS)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


def both(**options):
    def hook(params):
        optimizer = torch.optim.SGD(params)
        GradientNoise(optimizer, **options)
        return optimizer

    return [hook, lambda params: NoisySGD(params, **options)]


@pytest.mark.parametrize("make", [*both(std=0.1), *both(std=0.1, capturable=True)])
def test_bad_gradients_change_nothing(make):
    params = [nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(4, 3))]
    optimizer = make(params)
    params[0].grad = torch.ones(4, 3)
    params[1].grad = torch.ones(4, 3).to_sparse()
    with pytest.raises(TypeError, match="gradient of parameter 1 is sparse"):
        optimizer.step()
    assert all((p == 1).all() for p in params) and (params[0].grad == 1).all()
    assert all(state["step"] == 0 for state in optimizer.state.values())
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.complex64))]
    plain = torch.optim.SGD(params)
    GradientNoise(plain, 0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(TypeError, match="gradient of parameter 1 is torch.complex64"):
        plain.step()
    assert (params[0].grad == 1).all()


@pytest.mark.parametrize("make", [*both(std=lambda t: -1.0), *both(std=lambda t: "much")])
def test_bad_schedules(make):
    params = parameters()
    optimizer = make(params)
    set_gradients(params, 0)
    with pytest.raises((ValueError, TypeError), match="std is .* at step 0"):
        optimizer.step()
    assert same(params, parameters())


def test_a_refused_group_is_not_added():
    optimizer = NoisySGD(P, std=0.1)
    for group, message in (
        ({"std": -1}, "std is -1"),
        ({"momentum": -1}, "momentum is -1"),
        ({"seed": 5}, "seed is 5"),
        ({"capturable": True}, "capturable is True"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], **group})
        assert len(optimizer.param_groups) == 1


# ---- evolution strategies and MeZO ---------------------------------------------------------------


def digits():
    x, y = sklearn.datasets.load_digits(return_X_y=True)
    x, y = torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    train, test = order[:1400], order[1400:]
    return (x[train], y[train]), (x[test], y[test])


def accuracy(model, data):
    with torch.no_grad():
        return (model(data[0]).argmax(1) == data[1]).double().mean().item()


def batches(data, steps):
    order = torch.Generator().manual_seed(1)
    for step in range(steps):
        rows = torch.randint(len(data[0]), (256,), generator=order)
        yield step, data[0][rows], data[1][rows]


@pytest.mark.parametrize("shaping", ["standardize", "ranks"])
@pytest.mark.parametrize("antithetic", [True, False])
def test_an_update_from_scores_found_elsewhere(antithetic, shaping):
    """By workers that know theta and a member's two numbers."""
    theta = [randn(7, 3, seed=1), randn(5, seed=2).bfloat16()]
    mine, theirs, kept = ([t.clone() for t in theta] for _ in range(3))
    place = {"seed": -3, "step": 4, "antithetic": antithetic}
    options = {"std": 0.1, "lr": 0.05, "shaping": shaping, "distribution": "uniform"}

    def score(params):
        return params[0].sin().sum().item() + params[1].float().sum().item()

    got = evolution_step(mine, lambda: score(mine), population=8, **place, **options)
    members = kdkernels.evolution_members(8, **place)
    scores = []
    for seed, sign in reversed(members):
        noise = {"seed": seed, "step": 4, "distribution": "uniform"}
        with kdkernels.perturbed_parameters(kept, sign * 0.1, **noise):
            scores.insert(0, score(kept))
    assert scores == got.tolist() and same(kept, theta)
    kdkernels.evolution_update(theirs, scores, **place, **options)
    assert same(mine, theirs) and not same(theta, theirs)


@pytest.mark.parametrize(
    ("scores", "error", "match"),
    [
        ([1.0], ValueError, "population is 1"),
        ([], ValueError, "population is 0"),
        ([1.0, math.nan], ValueError, "scores holds nan"),
        (torch.zeros(2, 2), ValueError, "scores has shape"),
        (["a", 1.0], TypeError, "scores is a str"),
        (3.0, TypeError, "scores is a float"),
    ],
)
def test_scores_that_an_update_refuses(scores, error, match):
    with pytest.raises(error, match=match):
        kdkernels.evolution_update(P, scores, std=0.1, lr=0.1, seed=0, step=0)


@pytest.mark.parametrize(
    "options",
    [
        {"population": 64, "lr": 0.03},
        {"population": 64, "lr": 0.1, "shaping": "ranks", "distribution": "rademacher"},
        {"population": 63, "lr": 0.03, "antithetic": False},
    ],
)
def test_evolution_trains_on_digits(options, set_threads):
    """A network of two layers: accuracy on 397 digits that it has not seen."""
    set_threads(1)
    data, held_out = digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    lr = kdkernels.cosine(options.pop("lr"), 120)
    for step, x, y in batches(data, 120):

        def score(x=x, y=y):
            assert not torch.is_grad_enabled()
            return -nn.functional.cross_entropy(model(x), y)

        scores = evolution_step(
            model.parameters(), score, std=0.05, lr=lr(step), seed=1, step=step, **options
        )
        assert scores.shape == (options["population"],) and scores.dtype == torch.float64
    assert accuracy(model, held_out) > 0.88


@pytest.mark.parametrize("options", [{}, {"restore": "regenerate", "distribution": "uniform"}])
def test_mezo_trains_on_digits(options, set_threads):
    """A linear model: accuracy on 397 digits that it has not seen."""
    set_threads(1)
    data, held_out = digits()
    model = nn.Linear(64, 10)
    nn.init.zeros_(model.weight)
    lr = kdkernels.cosine(0.3, 600)
    for step, x, y in batches(data, 600):

        def loss(x=x, y=y):
            assert not torch.is_grad_enabled()
            return nn.functional.cross_entropy(model(x), y)

        mezo_step(model.parameters(), loss, lr=lr(step), directions=8, seed=1, step=step, **options)
    assert accuracy(model, held_out) > 0.9


def test_an_evolution_step_is_its_formula():
    """On a linear score, whose members' scores are known."""
    direction, theta = randn(50, seed=1), nn.Parameter(randn(50, seed=2))
    start = theta.detach().clone()
    for options, signs in (({}, (1, -1)), ({"antithetic": False}, (1,))):
        theta.data.copy_(start)
        shaped = {"population": 4, "std": 0.1, "lr": 0.3, "seed": 5, "step": 7, **options}
        scores = evolution_step([theta], lambda: (direction * theta).sum(), **shaped)
        seeds = kdkernels.optim.gradient_free._member_seeds(5, 7, 4 // len(signs))
        assert len(set(seeds)) == len(seeds)
        eps = [kdkernels.randn_like(theta, seed=s, step=7) for s in seeds]
        eps = torch.stack([sign * e for e in eps for sign in signs]).double()
        want = (start + 0.1 * eps) @ direction.double()
        torch.testing.assert_close(scores, want, rtol=1e-4, atol=1e-5)
        z = (scores - scores.mean()) / scores.std(correction=0)
        moved = start + 0.3 / (4 * 0.1) * (z[:, None] * eps).sum(0)
        torch.testing.assert_close(theta.detach().double(), moved, rtol=1e-6, atol=1e-6)
    theta.data.copy_(start)
    evolution_step([theta], lambda: 1.0, population=4, std=0.1, lr=1.0, seed=0, step=0)
    assert torch.equal(theta, start)  # nobody is better than another


@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("shaping", ["standardize", "ranks"])
@pytest.mark.parametrize("population", [1, 6, 8])
def test_equal_scores_say_nothing(shaping, antithetic, population):
    """0.9 is no binary fraction: the mean of six of them is another number."""
    theta = nn.Parameter(torch.zeros(20))
    options = {"population": population, "std": 0.1, "lr": 1.0, "seed": 0, "shaping": shaping}
    antithetic = antithetic and population > 1
    for step in range(3):
        evolution_step([theta], lambda: 0.9, step=step, antithetic=antithetic, **options)
    assert torch.equal(theta.detach(), torch.zeros(20))


def test_equal_scores_share_a_rank():
    theta, scores = nn.Parameter(torch.zeros(5)), iter([2.0, 1.0, 2.0, 5.0])
    options = {"population": 4, "std": 0.5, "lr": 1.0, "seed": 0, "step": 0}
    evolution_step([theta], lambda: next(scores), antithetic=False, shaping="ranks", **options)
    seeds = kdkernels.optim.gradient_free._member_seeds(0, 0, 4)
    eps = torch.stack([kdkernels.randn_like(theta, seed=s) for s in seeds])
    ranks = torch.tensor([1.5, 0.0, 1.5, 3.0]) / 3 - 0.5
    torch.testing.assert_close(theta.detach(), (ranks @ eps).float() / (4 * 0.5))


class Wrapper(torch.optim.Optimizer):
    """As accelerate's and others': an optimizer that never called Optimizer's __init__."""

    def __init__(self, inside):
        self.inside = inside

    @property
    def param_groups(self):
        return self.inside.param_groups

    def step(self, closure=None):
        self.inside.step()


def test_gradient_noise_of_a_wrapped_optimizer():
    moved = []
    for wrap in (lambda o: o, Wrapper, lambda o: Wrapper(Wrapper(o))):
        p = nn.Parameter(torch.zeros(10))
        optimizer = wrap(torch.optim.SGD([p], lr=1.0))
        noise = kdkernels.GradientNoise(optimizer, 0.5, seed=3)
        p.grad = torch.ones(10)
        optimizer.step()
        assert noise.step == 1
        moved.append(p.detach())
    assert torch.equal(moved[1], moved[0]) and torch.equal(moved[2], moved[0])
    with pytest.raises(TypeError, match="optimizer is a Wrapper without hooks"):
        kdkernels.GradientNoise(Wrapper(None), 0.5)


def test_a_mezo_step_is_its_formula():
    """On a quadratic loss, where the difference quotient is the derivative."""
    theta = nn.Parameter(randn(50, seed=2, dtype=torch.float64))
    start = theta.detach().clone()
    loss = mezo_step(
        [theta],
        lambda: theta.square().sum() / 2,
        lr=0.01,
        scale=0.1,
        directions=3,
        weight_decay=0.5,
        seed=5,
        step=7,
    )
    seeds = kdkernels.optim.gradient_free._member_seeds(5, 7, 3)
    eps = torch.stack([kdkernels.randn_like(theta, seed=s, step=7) for s in seeds])
    want = start * (1 - 0.005) - 0.01 / 3 * ((eps @ start)[:, None] * eps).sum(0)
    torch.testing.assert_close(theta.detach(), want, rtol=1e-11, atol=1e-11)
    seen = (start.square().sum() + 0.01 * eps.square().sum(1).mean()) / 2
    torch.testing.assert_close(loss, seen)


BAD_STEPS = [
    (lambda: evolution(population=3), ValueError, "population is 3.*pairs"),
    (lambda: evolution(population=0), ValueError, "population is 0"),
    (lambda: evolution(population=2.5), TypeError, "population is a float"),
    (lambda: evolution(std=0), ValueError, "std is 0"),
    (lambda: evolution(lr=-1), ValueError, "lr is -1"),
    (lambda: evolution(shaping="none"), ValueError, "shaping is 'none'"),
    (lambda: evolution(antithetic=1), TypeError, "antithetic is a int"),
    (lambda: evolution(step=-1), ValueError, "step is -1"),
    (lambda: evolution(seed="a"), TypeError, "seed is a str"),
    (lambda: evolution(score=lambda: math.nan), ValueError, "score_fn gave nan"),
    (lambda: evolution(score=lambda: torch.ones(2)), ValueError, r"score_fn gave shape \[2\]"),
    (lambda: evolution(score=lambda: "good"), TypeError, "score_fn gave a str"),
    (lambda: mezo(scale=0), ValueError, "scale is 0"),
    (lambda: mezo(directions=0), ValueError, "directions is 0"),
    (lambda: mezo(weight_decay=-1), ValueError, "weight_decay is -1"),
    (lambda: mezo(restore="no"), ValueError, "restore"),
    (lambda: mezo(distribution="cauchy"), ValueError, "distribution"),
    (lambda: mezo(loss=lambda: None), TypeError, "loss_fn gave a NoneType"),
]


def evolution(score=lambda: 0.0, **options):
    numbers = {"population": 2, "std": 0.1, "lr": 0.1, "seed": 0, "step": 0} | options
    evolution_step(P, score, **numbers)


def mezo(loss=lambda: 0.0, **options):
    mezo_step(P, loss, **({"lr": 0.1, "seed": 0, "step": 0} | options))


@pytest.mark.parametrize(("step", "error", "message"), BAD_STEPS)
def test_bad_steps_change_nothing(step, error, message):
    with pytest.raises(error, match=message):
        step()
    assert (P[0] == 1).all()
