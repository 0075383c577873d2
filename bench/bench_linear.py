"""The loss of linear heads, forward and backward: with logits, the products alone, fused."""

import functools

import pytest
import torch
from torch.nn import functional as F

from kdkernels import distillation_loss, linear_distillation_loss

# rows, classes, width, dtype, rows of logits at a time: a 25th of a batch of 4096 rows
SIZES = [
    (652, 8016, 2048, torch.float32, 163),
    (652, 8016, 2048, torch.bfloat16, 163),
    (652, 8016, 2048, torch.bfloat16, 652),
]
PEERS = ["eager", "unfused", "chunks", "fused", "copy"]


@functools.lru_cache(maxsize=1)  # the next size takes its place
def peers(rows, classes, width, dtype, chunk):
    """{name: call}, on the same tensors; each makes the loss and both gradients, or its products.

    "copy", the limit, is here the four products of a whole batch and nothing else; "chunks" is
    those of as many rows at a time as "fused" takes.
    """
    g = torch.Generator().manual_seed(0)
    hidden, teacher_hidden = (torch.randn(rows, width, generator=g).to(dtype) for _ in range(2))
    head, teacher_head = (
        (2 * width**-0.5 * torch.randn(classes, width, generator=g)).to(dtype) for _ in range(2)
    )
    leaves = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
    z, t = (torch.empty(rows, classes, dtype=dtype) for _ in range(2))
    grad_hidden, grad_head = torch.empty_like(hidden), torch.empty_like(head)

    def backward(loss):
        return loss, *torch.autograd.grad(loss, leaves)

    def logits():
        with torch.no_grad():
            teacher_logits = F.linear(teacher_hidden, teacher_head)
        return F.linear(*leaves), teacher_logits

    def plain():
        student, teacher = (x / 2 for x in logits())
        log_q, p = student.log_softmax(-1), teacher.softmax(-1)
        return backward(4 * F.kl_div(log_q, p, reduction="batchmean"))

    def unfused():
        return backward(distillation_loss(*logits(), temperature=2.0, inplace=True))

    def fused():
        budget = 2 * chunk * classes * hidden.element_size()
        return backward(
            linear_distillation_loss(
                *leaves, teacher_hidden, teacher_head, temperature=2.0, memory_budget=budget
            )
        )

    def products(step):
        for i in range(0, rows, step):
            h, th, n = hidden[i : i + step], teacher_hidden[i : i + step], min(step, rows - i)
            torch.mm(h, head.T, out=z[:n])
            torch.mm(th, teacher_head.T, out=t[:n])
            torch.mm(z[:n], head, out=grad_hidden[i : i + step])
            torch.addmm(grad_head, z[:n].T, h, beta=min(i, 1), out=grad_head)

    calls = {
        "eager": plain,
        "unfused": unfused,
        "chunks": lambda: products(chunk),
        "fused": fused,
        "copy": lambda: products(rows),
    }
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    want = plain()
    for call in (unfused, fused):
        for a, b in zip(call(), want, strict=True):
            atol = tolerance * b.abs().max().item()
            torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=atol)
    return calls


def title(rows, classes, width, dtype, chunk):
    name = str(dtype).removeprefix("torch.")
    return f"{rows}x{width}x{classes} {name}, {chunk} rows"


@pytest.fixture(scope="module", params=SIZES, ids=lambda p: title(*p).replace(" ", "-"))
def size(request):
    return request.param


@pytest.mark.parametrize("peer", PEERS)
def test_time(benchmark, size, peer):
    benchmark.group = title(*size)
    benchmark.pedantic(peers(*size)[peer], rounds=3)


def test_ratios(compare, size):
    compare(title(*size), peers(*size))
