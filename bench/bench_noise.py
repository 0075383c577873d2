"""Noise added in place: add_(randn_like) eager and compiled, and add_noise_."""

import functools

import pytest
import torch

from kdkernels import add_noise_

STD = 0.1
# The 62 parameters of ResNet-18, as (how many, elements).
RESNET18 = [(40, 256), (1, 9408), (4, 36864), (1, 73728), (3, 147456), (1, 294912), (3, 589824)]
RESNET18 += [(1, 1179648), (3, 2359296), (1, 8192), (1, 32768), (1, 131072), (1, 512000), (1, 1000)]
INPUTS = {
    "20M float32": ([20_000_000], torch.float32),
    "20M bfloat16": ([20_000_000], torch.bfloat16),
    "1k float32": ([1000], torch.float32),
    "ResNet-18 float32": ([n for count, n in RESNET18 for _ in range(count)], torch.float32),
}
PEERS = ["eager", "torch.compile", "fused", "copy"]


@functools.lru_cache(maxsize=1)  # the next input takes its place
def peers(name):
    """{name: call}, all on the same tensors."""
    torch._dynamo.reset()
    sizes, dtype = INPUTS[name]
    tensors = [torch.zeros(n, dtype=dtype) for n in sizes]
    targets = [torch.empty_like(x) for x in tensors]

    def plain(tensors):
        """What people write."""
        for x in tensors:
            x.add_(torch.randn_like(x), alpha=STD)

    def copy():
        for x, y in zip(tensors, targets, strict=True):
            y.copy_(x)

    compiled = torch.compile(plain, dynamic=False)
    calls = {
        "eager": lambda: plain(tensors),
        "torch.compile": lambda: compiled(tensors),
        "fused": lambda: add_noise_(tensors, STD, seed=1, step=2),
        "copy": copy,
    }
    for peer in PEERS[:-1]:
        for x in tensors:
            x.zero_()
        calls[peer]()
        largest = max(tensors, key=torch.numel)
        assert abs(largest.float().std() / STD - 1) < 0.15
    return calls


@pytest.fixture(scope="module", params=INPUTS, ids=lambda name: name.replace(" ", "-"))
def name(request):
    return request.param


@pytest.mark.parametrize("peer", PEERS)
def test_time(benchmark, name, peer):
    benchmark.group = name
    benchmark(peers(name)[peer])


def test_ratios(compare, name):
    compare(name, peers(name))
