"""The distillation losses, forward and backward: eager PyTorch, torch.compile, fused."""

import functools

import pytest
import torch
from torch.nn import functional as F

from bench.plain import plain_loss
from kdkernels import distillation_loss, topk_distillation_loss, topk_teacher

SIZES = [
    (512, 32000, torch.float32),
    (512, 32000, torch.bfloat16),
    (128, 1000, torch.float32),
    (64, 10, torch.float32),
]
# rows, classes, dtype, labels, divergence
CASES = [(*size, labels, "forward_kl") for size in SIZES for labels in (False, True)]
CASES += [(*size, False, name) for size in SIZES[:3] for name in ("reverse_kl", "js")]
PEERS = ["eager", "torch.compile", "fused", "fused inplace", "copy"]


@functools.lru_cache(maxsize=1)  # the next size takes its place
def peers(rows, classes, dtype, with_labels, divergence):
    """{name: call}, all on the same tensors; each call makes the loss and the logits' gradient."""
    torch._dynamo.reset()
    g = torch.Generator().manual_seed(0)
    z, t = ((3 * torch.randn(rows, classes, generator=g)).to(dtype) for _ in range(2))
    labels = torch.randint(classes, (rows,), generator=g) if with_labels else None
    temperature, alpha = (3.0, 0.5) if with_labels else (2.0, None)
    leaf = z.clone().requires_grad_()
    hidden = leaf * 1  # logits are a layer's output, which may be overwritten; a leaf may not
    options = (labels, temperature, alpha, divergence)
    compiled = torch.compile(plain_loss, dynamic=False)
    # Reading two tensors and writing one is half as much again as a copy of one.
    source = torch.empty(3 * z.numel() // 2, dtype=dtype).normal_()
    target = torch.empty_like(source)

    def backward(loss, logits):
        return loss, torch.autograd.grad(loss, logits)[0]

    def fused(logits, inplace):
        loss = distillation_loss(
            logits,
            t,
            labels,
            temperature=temperature,
            alpha=alpha,
            divergence=divergence,
            inplace=inplace,
        )
        return backward(loss, logits)

    calls = {
        "eager": lambda: backward(plain_loss(leaf, t, *options), leaf),
        "torch.compile": lambda: backward(compiled(leaf, t, *options), leaf),
        "fused": lambda: fused(leaf, False),
        # From the second call on the logits are the last call's gradient, which takes as long.
        "fused inplace": lambda: fused(hidden, True),
        "copy": lambda: target.copy_(source),
    }

    want = backward(plain_loss(leaf.double(), t.double(), *options), leaf)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for name in PEERS[:-1]:
        loss, gradient = calls[name]()
        torch.testing.assert_close(loss.double(), want[0], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(gradient, want[1], rtol=tolerance, atol=tolerance / rows)
    return calls


@functools.lru_cache(maxsize=1)
def topk_peers(rows, classes, k):
    """The forward KL to a teacher's k largest classes, beside the dense eager loss."""
    g = torch.Generator().manual_seed(0)
    z, t = (3 * torch.randn(rows, classes, generator=g) for _ in range(2))
    leaf, top = z.requires_grad_(), topk_teacher(t, k)
    indices = top.indices.long()
    source = torch.empty(rows * k).normal_()
    target = torch.empty_like(source)

    def eager_topk():
        log_q = leaf.gather(-1, indices).log_softmax(-1)
        return F.kl_div(log_q, top.values.softmax(-1), reduction="batchmean")

    def fused(sparse):
        return topk_distillation_loss(leaf, top.values, top.indices, sparse_gradient=sparse)

    def dense():
        return plain_loss(leaf, t, None, 1.0, None, "forward_kl")

    calls = {"eager": dense, "eager top k": eager_topk}
    calls |= {"fused": lambda: fused(False), "fused sparse": lambda: fused(True)}
    torch.testing.assert_close(fused(False), eager_topk())
    steps = {
        name: lambda call=call: torch.autograd.grad(call(), leaf) for name, call in calls.items()
    }
    return steps | {"copy": lambda: target.copy_(source)}


def title(rows, classes, dtype, with_labels, divergence):
    name = str(dtype).removeprefix("torch.")
    kind = "" if divergence == "forward_kl" else f" {divergence}"
    return f"{rows}x{classes} {name}{kind}{' labels' if with_labels else ''}"


@pytest.fixture(
    scope="module",  # so that the tests of one case follow each other
    params=CASES,
    ids=lambda p: title(*p).replace(" ", "-"),
)
def case(request):
    return request.param


@pytest.mark.parametrize("peer", PEERS)
def test_time(benchmark, case, peer):
    benchmark.group = title(*case)
    benchmark(peers(*case)[peer])


def test_ratios(compare, case):
    compare(title(*case), peers(*case))


def test_topk_ratios(compare):
    compare("top 64, 64x128256 float32", topk_peers(64, 128256, 64))
