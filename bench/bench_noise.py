"""Noise added to lists of tensors, one and many at once, beside what people write."""

import numpy as np
import pytest
import torch

import kdkernels
from kdkernels.measuring import OURS, Comparison, memcpy
from kdkernels.tools.comparisons import gpt2, noise, plain_noise, resnet18

FULL = pytest.mark.full


def add_peers(found):
    tensors, std = found.inputs["tensors"], found.inputs["std"]
    largest = max(range(len(tensors)), key=lambda i: len(tensors[i]))
    compiled = torch.compile(plain_noise, dynamic=False)
    random = np.random.default_rng(0)

    def foreach():
        torch._foreach_add_(tensors, [torch.randn_like(x) for x in tensors], alpha=std)

    def numpy():
        for x in tensors:
            array = x.numpy()
            array += np.float32(std) * random.standard_normal(len(x), np.float32)

    def opacus(package):
        """Its optimizer's step of noise, on the sum of the clipped gradients."""
        parameters = [torch.nn.Parameter(x.detach()) for x in tensors]
        optimizer = package.DPOptimizer(
            torch.optim.SGD(parameters, lr=1.0),
            noise_multiplier=std,
            max_grad_norm=1.0,
            expected_batch_size=1,
        )
        for p, x in zip(parameters, tensors, strict=True):
            p.summed_grad = x

        def call():
            optimizer.add_noise()
            for x in tensors:
                del x._processed  # or a second call on the same gradients would raise
            return parameters[largest].grad

        return call

    found.add("foreach", foreach)
    found.add("torch.compile", lambda: compiled(tensors, std))
    found.add_peer("Opacus", "opacus.optimizers", opacus)
    if tensors[0].dtype == torch.float32:
        found.add("NumPy", numpy)


@pytest.mark.parametrize(
    "name, sizes, dtype",
    [
        ("20M elements", [20_000_000], torch.float32),
        ("20M elements", [20_000_000], torch.bfloat16),
        ("1k elements", [1000], torch.float32),
        ("ResNet-18's 62 tensors", resnet18(), torch.float32),
        pytest.param("GPT-2's 148 tensors", gpt2(), torch.float32, marks=FULL),
    ],
)
def test_noise(compare, name, sizes, dtype):
    found = noise(name, sizes, dtype)
    add_peers(found)
    compare(found)


@pytest.mark.parametrize("size", [1000, 10_000, 100_000, 1_000_000, 10_000_000])
def test_growth(compare, size):
    plot = {"plot": "noise fp32", "axis": "elements", "value": size, "elements": size}
    found = noise(f"{size:,} elements", [size], growth=plot)
    found.title = f"growth, {found.title}"
    compare(found)


def test_combine(compare):
    """x + sum_k c_k eps(seed_k): the update of evolution strategies and of MeZO."""
    terms = 32
    tensors = [torch.zeros(n) for n in resnet18()]
    seeds, coefficients = list(range(terms)), [0.1] * terms
    largest = max(tensors, key=torch.numel)

    def check(call):
        for x in tensors:
            x.zero_()
        call()
        off = largest.std().item() / (0.1 * terms**0.5) - 1
        assert abs(off) < 0.01, f"the noise's std is off by {off:.1%}"

    def passes():
        """As MeZO's and ES' scripts do: seed the generator, go over the parameters."""
        for seed, coefficient in zip(seeds, coefficients, strict=True):
            torch.manual_seed(seed)
            plain_noise(tensors, coefficient)

    def own_passes():
        for seed, coefficient in zip(seeds, coefficients, strict=True):
            kdkernels.add_noise_(tensors, coefficient, seed=seed)

    bytes = 2 * sum(x.nbytes for x in tensors)
    found = Comparison(f"{terms} noises on ResNet-18's 62 tensors fp32", check, bytes=bytes)
    found.add("eager, a pass a seed", passes)
    found.add(f"{OURS}, a pass a seed", own_passes)
    found.add(OURS, lambda: kdkernels.combine_noise_(tensors, coefficients, seeds))
    found.add("memcpy", memcpy(tensors), check=False)
    compare(found)
