"""Noise added to lists of tensors, and optimizer steps with noise, beside what people write."""

import functools
import math

import pytest
import torch

from bench.plain import gpt2, resnet18
from kdkernels import NoisyAdamW, NoisySGD, add_noise_, combine_noise_

STD = 0.1
LISTS = {
    "20M": [20_000_000],
    "1k": [1000],
    "ResNet-18": resnet18(),
    "GPT-2": gpt2(),
}
INPUTS = {
    f"{name} {str(dtype).removeprefix('torch.')}": (sizes, dtype)
    for name, sizes in LISTS.items()
    for dtype in ((torch.float32, torch.bfloat16) if name == "20M" else (torch.float32,))
}
PEERS = ["eager", "foreach", "Opacus", "optax", "torch.compile", "fused", "copy"]
OPTIMIZERS = {"AdamW": (torch.optim.AdamW, NoisyAdamW, {}, 7)}  # tensors read and written
OPTIMIZERS["SGD"] = (torch.optim.SGD, NoisySGD, {"lr": 1e-3, "momentum": 0.9}, 5)


def eager(tensors):
    """What people write."""
    for x in tensors:
        x.add_(torch.randn_like(x), alpha=STD)


def foreach(tensors):
    torch._foreach_add_(tensors, [torch.randn_like(x) for x in tensors], alpha=STD)


def opacus(tensors):
    """DPOptimizer.add_noise of Opacus 1.6: a new gradient from the summed one."""
    out = []
    for x in tensors:
        torch.zeros(x.shape, dtype=x.dtype)  # _generate_noise's answer where std is 0
        out.append(x + torch.normal(mean=0, std=STD, size=x.shape, dtype=x.dtype))
    return out


def optax(tensors, count=1, eta=STD**2, gamma=0.0):
    """optax.add_noise: g + sqrt(eta / count^gamma) N(0, 1), out of place as in JAX."""
    std = math.sqrt(eta / count**gamma)
    return [x + std * torch.randn_like(x) for x in tensors]


def copy_of(tensors):
    """A call that copies them all."""
    targets = [torch.empty_like(x) for x in tensors]

    def copy():
        for x, y in zip(tensors, targets, strict=True):
            y.copy_(x)

    return copy


@functools.lru_cache(maxsize=1)  # the next input takes its place
def peers(name):
    """{name: call}, all on the same tensors."""
    torch._dynamo.reset()
    sizes, dtype = INPUTS[name]
    tensors = [torch.zeros(n, dtype=dtype) for n in sizes]

    compiled = torch.compile(eager, dynamic=False)
    calls = {
        "eager": lambda: eager(tensors),
        "foreach": lambda: foreach(tensors),
        "Opacus": lambda: opacus(tensors),
        "optax": lambda: optax(tensors),
        "torch.compile": lambda: compiled(tensors),
        "fused": lambda: add_noise_(tensors, STD, seed=1, step=2),
        "copy": copy_of(tensors),
    }
    largest = max(range(len(tensors)), key=lambda i: sizes[i])
    for peer in PEERS[:-1]:
        for x in tensors:
            x.zero_()
        noisy = (calls[peer]() or tensors)[largest]
        assert abs(noisy.float().std() / STD - 1) < 0.15
    return calls


def combinations(sizes, terms):
    """{name: call} of theta += sum_k c_k eps(seed_k), the update of ES and MeZO."""
    tensors = [torch.zeros(n) for n in LISTS[sizes]]
    seeds, coefficients = list(range(terms)), [0.1] * terms

    def passes():
        """As MeZO's and ES' scripts do: seed the generator, go over the parameters."""
        for seed, coefficient in zip(seeds, coefficients, strict=True):
            torch.manual_seed(seed)
            for x in tensors:
                x.add_(torch.randn_like(x), alpha=coefficient)

    def own_passes():
        for seed, coefficient in zip(seeds, coefficients, strict=True):
            add_noise_(tensors, coefficient, seed=seed)

    return {
        "eager": passes,
        "add_noise_ a seed": own_passes,
        "fused": lambda: combine_noise_(tensors, coefficients, seeds),
        "copy": copy_of(tensors),
    }


@functools.lru_cache(maxsize=1)
def optimizers(kind, sizes):
    """{name: call} of one step with noise on the gradients, each with its own parameters."""
    theirs, ours, options, passes = OPTIMIZERS[kind]

    def parameters():
        made = [torch.nn.Parameter(torch.ones(n)) for n in LISTS[sizes]]
        for p in made:
            p.grad = torch.full_like(p, 0.01)
        return made

    def with_noise(optimizer, params):
        grads = [p.grad for p in params]

        def step():
            eager(grads)
            optimizer.step()

        return step

    calls = {}
    for name, option in {"eager": {"foreach": True}, "torch fused": {"fused": True}}.items():
        params = parameters()
        calls[name] = with_noise(theirs(params, **options, **option), params)
    calls["fused"] = ours(parameters(), **options, std=STD, seed=1).step
    calls["fused, no noise"] = ours(parameters(), **options).step
    params = parameters()
    calls["torch fused, no noise"] = theirs(params, **options, fused=True).step
    total = passes * sum(LISTS[sizes]) // 2
    source, target = torch.ones(total), torch.empty(total)
    return calls | {"copy": lambda: target.copy_(source)}


@pytest.fixture(scope="module", params=INPUTS, ids=lambda name: name.replace(" ", "-"))
def name(request):
    return request.param


@pytest.mark.parametrize("peer", PEERS)
def test_time(benchmark, name, peer):
    benchmark.group = name
    benchmark(peers(name)[peer])


def test_ratios(compare, name):
    peers.cache_clear()  # the last test's tensors
    compare(name, peers(name))


def test_combine_ratios(compare):
    peers.cache_clear()
    compare("32 seeds, ResNet-18", combinations("ResNet-18", 32))


@pytest.mark.parametrize("sizes", ["ResNet-18", "GPT-2"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizer_ratios(compare, kind, sizes):
    peers.cache_clear()
    compare(f"{kind} {sizes}", optimizers(kind, sizes))
