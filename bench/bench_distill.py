"""The distillation loss, forward and backward: eager PyTorch, torch.compile, the fused kernel."""

import functools

import pytest
import torch
from torch.nn import functional as F

from kdkernels import distillation_loss

SIZES = [
    (512, 32000, torch.float32),
    (512, 32000, torch.bfloat16),
    (128, 1000, torch.float32),
    (64, 10, torch.float32),
]
PEERS = ["eager", "torch.compile", "fused", "fused inplace", "copy"]


def plain_loss(z, t, labels, temperature, alpha):
    """What people write."""
    kl = F.kl_div(
        F.log_softmax(z / temperature, -1), F.softmax(t / temperature, -1), reduction="batchmean"
    )
    loss = temperature**2 * kl
    if labels is not None:
        loss = alpha * loss + (1 - alpha) * F.cross_entropy(z, labels)
    return loss


@functools.lru_cache(maxsize=1)  # the next size takes its place
def peers(rows, classes, dtype, with_labels):
    """{name: call}, all on the same tensors; each call makes the loss and the logits' gradient."""
    torch._dynamo.reset()
    g = torch.Generator().manual_seed(0)
    z, t = ((3 * torch.randn(rows, classes, generator=g)).to(dtype) for _ in range(2))
    labels = torch.randint(classes, (rows,), generator=g) if with_labels else None
    temperature, alpha = (3.0, 0.5) if with_labels else (2.0, None)
    leaf = z.clone().requires_grad_()
    hidden = leaf * 1  # logits are a layer's output, which may be overwritten; a leaf may not
    compiled = torch.compile(plain_loss, dynamic=False)
    # Reading two tensors and writing one is half as much again as a copy of one.
    source = torch.empty(3 * z.numel() // 2, dtype=dtype).normal_()
    target = torch.empty_like(source)

    def backward(loss, logits):
        return loss, torch.autograd.grad(loss, logits)[0]

    def fused(logits, inplace):
        loss = distillation_loss(
            logits, t, labels, temperature=temperature, alpha=alpha, inplace=inplace
        )
        return backward(loss, logits)

    calls = {
        "eager": lambda: backward(plain_loss(leaf, t, labels, temperature, alpha), leaf),
        "torch.compile": lambda: backward(compiled(leaf, t, labels, temperature, alpha), leaf),
        "fused": lambda: fused(leaf, False),
        # From the second call on the logits are the last call's gradient, which takes as long.
        "fused inplace": lambda: fused(hidden, True),
        "copy": lambda: target.copy_(source),
    }

    want = backward(plain_loss(leaf.double(), t.double(), labels, temperature, alpha), leaf)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for name in PEERS[:-1]:
        loss, gradient = calls[name]()
        torch.testing.assert_close(loss.double(), want[0], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(gradient, want[1], rtol=tolerance, atol=tolerance / rows)
    return calls


def title(rows, classes, dtype, with_labels):
    name = str(dtype).removeprefix("torch.")
    return f"{rows}x{classes} {name}{' labels' if with_labels else ''}"


@pytest.fixture(
    scope="module",  # so that the tests of one size follow each other
    params=[(*size, with_labels) for size in SIZES for with_labels in (False, True)],
    ids=lambda p: title(*p).replace(" ", "-"),
)
def size(request):
    return request.param


@pytest.mark.parametrize("peer", PEERS)
def test_time(benchmark, size, peer):
    benchmark.group = title(*size)
    benchmark(peers(*size)[peer])


def test_ratios(compare, size):
    compare(title(*size), peers(*size))
