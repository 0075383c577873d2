"""The distillation losses, forward and backward, beside eager PyTorch, torch.compile and packages.

TRL's and torchdistill's losses get the factor T^2 that theirs lack: see bench/peers.py.
"""

import functools
import itertools
import math

import pytest
import torch
from torch.nn import functional as F

import kdkernels
from kdkernels.measuring import OURS, Comparison
from kdkernels.tools.comparisons import (
    backward,
    dense,
    plain_loss,
    restore,
    short,
    top_k,
    training_logits,
)

FP32, BF16 = torch.float32, torch.bfloat16
BETAS = {"forward_kl": 0.0, "js": 0.5, "reverse_kl": 1.0}  # TRL's and Liger's names for them


def full(*values):
    return pytest.param(*values, marks=pytest.mark.full)


def add_compiled(found, **options):
    leaf, t, others = (found.inputs[name] for name in ("z", "t", "options"))
    compiled = torch.compile(plain_loss, **options)
    found.add("torch.compile", lambda: backward(compiled(leaf, t, *others), leaf))


def add_trl(found):
    leaf, t, (_, temperature, _, divergence) = (found.inputs[n] for n in ("z", "t", "options"))

    def make(gkd):
        loss = gkd.GKDTrainer.generalized_jsd_loss
        z, teacher, beta = leaf[:, None], t[:, None], BETAS[divergence]
        return lambda: backward(temperature**2 * loss(z, teacher, None, beta, temperature), leaf)

    found.add_peer("TRL", "trl.experimental.gkd", make)


def add_torchdistill(found):
    leaf, t, (labels, temperature, *_) = (found.inputs[n] for n in ("z", "t", "options"))

    def make(losses):
        where = {f"{side}_module_path": side for side in ("student", "teacher")}
        where |= {f"{side}_module_io": "output" for side in ("student", "teacher")}
        loss = losses.KDLoss(**where, temperature=temperature, alpha=0.5)
        factor = 1 if labels is not None else temperature**2
        z, teacher = {"student": {"output": leaf}}, {"teacher": {"output": t}}
        return lambda: backward(factor * loss(z, teacher, labels), leaf)

    found.add_peer("torchdistill", "torchdistill.losses.mid_level", make)


NEAR, ALL_GAPS = {"gaps": (0.1,)}, {"gaps": (0.01, 0.1, 0.3)}


@pytest.mark.parametrize(
    "rows, classes, dtype, divergence, labels, more",
    [
        (512, 32000, FP32, "forward_kl", False, NEAR),
        (512, 32000, FP32, "forward_kl", True, NEAR),
        (512, 32000, BF16, "forward_kl", False, NEAR),
        full(512, 32000, BF16, "forward_kl", True, ALL_GAPS),
        full(512, 32000, BF16, "forward_kl", True, NEAR | {"prompts": 0.5}),
        (128, 1000, FP32, "forward_kl", False, NEAR),
        full(128, 1000, FP32, "forward_kl", True, NEAR),
        full(128, 1000, BF16, "forward_kl", False, NEAR),
        (64, 10, FP32, "forward_kl", False, NEAR),
        (64, 10, FP32, "forward_kl", True, NEAR),
        (512, 32000, FP32, "js", False, NEAR),
        (512, 32000, FP32, "reverse_kl", False, NEAR),
        full(512, 32000, BF16, "js", False, ALL_GAPS | {"temperature": 1.0}),
        full(512, 32000, BF16, "reverse_kl", False, ALL_GAPS | {"temperature": 4.0}),
        full(128, 1000, FP32, "js", False, NEAR),
        full(128, 1000, FP32, "reverse_kl", False, NEAR),
        full(512, 50257, BF16, "forward_kl", False, NEAR),
        full(64, 128256, FP32, "forward_kl", False, NEAR),
        full(64, 128256, BF16, "forward_kl", False, NEAR),
        full(64, 151936, BF16, "js", False, NEAR),
        full(64, 262144, BF16, "reverse_kl", False, NEAR),
    ],
)
def test_dense(compare, rows, classes, dtype, divergence, labels, more):
    found = dense(rows, classes, dtype, divergence, labels, **more)
    if "prompts" not in more:
        add_compiled(found, dynamic=False)
        if not labels:
            add_trl(found)
        if divergence == "forward_kl":
            add_torchdistill(found)
    compare(found)


@pytest.mark.parametrize("dtype", [FP32, full(BF16)])
def test_divergences(compare, dtype):
    """Ours in place, all of them beside the forward KL, and each where the student is near."""
    rows, classes = 512, 32000
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (rows,), generator=g)
    inputs = {gap: training_logits(rows, classes, gap, dtype=dtype)[:2] for gap in (math.inf, 0.1)}
    output = torch.empty(rows, classes, dtype=dtype).requires_grad_() * 1

    def check(call, z, t, **options):
        restore(z, [output])
        want = kdkernels.distillation_loss(z, t, backend="reference", **options)
        torch.testing.assert_close(call()[0].float(), want.float(), rtol=2e-3, atol=1e-5)

    title = f"kdkernels in place, divergences, {rows}x{classes} {short(dtype)}"
    found = Comparison(title, None, bytes=3 * output.nbytes)
    for name, (gap, (z, t)) in itertools.product(kdkernels.divergences(), inputs.items()):
        options = {"divergence": name, "temperature": 2.0}
        if name == "decoupled":
            options |= {"labels": labels, "alpha": 1.0}

        def call(t=t, options=options):
            return backward(kdkernels.distillation_loss(output, t, inplace=True, **options), output)

        found.add(
            (name if name == "forward_kl" and gap == math.inf else f"{OURS} {name}")
            + f", gap {gap:g}" * (gap < math.inf),
            call,
            check=functools.partial(check, z=z, t=t, **options),
            before=None if gap == math.inf else (functools.partial(restore, z, [output]), 1),
        )
    compare(found)


def test_top_k(compare):
    compare(top_k(64, 128256, 64))


LARGE = (50257, 128256, 151936, 262144)


@pytest.mark.parametrize("classes", [10, 100, 1000, 8000, 32000, *map(full, LARGE)])
def test_growth_with_classes(compare, classes):
    growth(compare, 128, classes, "loss, 128 rows fp32", "classes", classes)


@pytest.mark.parametrize("rows", [1, 8, 64, 512, 4096, full(16384), full(32768)])
def test_growth_with_rows(compare, rows):
    growth(compare, rows, 1000, "loss, 1,000 classes fp32", "rows", rows)


def growth(compare, rows, classes, plot, axis, value):
    growth = {"plot": plot, "axis": axis, "value": value, "elements": rows * classes}
    found = dense(rows, classes, growth=growth)
    found.title = f"growth, {found.title}"
    # As where shapes vary: one piece of code for all of them.
    add_compiled(found, dynamic=True)
    compare(found)


@pytest.mark.skipif(torch.get_num_threads() == 1, reason="one thread alone")
def test_threads(compare):
    """Ours in place on 1, 2, 4, ... threads and on all of them."""
    found, most = dense(512, 32000), torch.get_num_threads()
    call = found.calls[f"{OURS} in place"]

    def on(threads):
        torch.set_num_threads(threads)
        try:
            return call()
        finally:
            torch.set_num_threads(most)

    found.title += ", threads"
    found.calls.clear()
    for threads in [n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n < most] + [most]:
        name = f"{OURS} in place, {threads}"
        found.add(name, functools.partial(on, threads))
    compare(found)


# rows, classes, width, dtype, rows of logits at a time: a part of a batch of 4,096 rows
@pytest.mark.parametrize(
    "rows, classes, width, dtype, chunk",
    [(512, 8000, 2048, FP32, 128), (512, 8000, 2048, BF16, 128), full(652, 8016, 2048, BF16, 652)],
)
def test_linear(compare, rows, classes, width, dtype, chunk):
    """The loss of linear heads, and the gradients of hidden states and head.

    "products" are the four matrix products that it takes and nothing else, of the whole batch and
    of as many rows at a time as ours takes.
    """
    g = torch.Generator().manual_seed(0)
    hidden, teacher_hidden = (torch.randn(rows, width, generator=g).to(dtype) for _ in range(2))
    head, teacher_head = (
        (2 * width**-0.5 * torch.randn(classes, width, generator=g)).to(dtype) for _ in range(2)
    )
    leaves = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
    z, t = (torch.empty(rows, classes, dtype=dtype) for _ in range(2))
    grad_hidden, grad_head = torch.empty_like(hidden), torch.empty_like(head)

    def logits(h, w):
        with torch.no_grad():
            teacher_logits = F.linear(teacher_hidden, teacher_head)
        return F.linear(h, w), teacher_logits

    def loss(h, w):
        return plain_loss(*logits(h, w), None, 2.0, None)

    def eager():
        return backward(loss(*leaves), *leaves)

    def unfused():
        made = kdkernels.distillation_loss(*logits(*leaves), temperature=2.0, inplace=True)
        return backward(made, *leaves)

    def fused():
        budget = 2 * chunk * classes * hidden.element_size()
        return backward(
            kdkernels.linear_distillation_loss(
                *leaves, teacher_hidden, teacher_head, temperature=2.0, memory_budget=budget
            ),
            *leaves,
        )

    def products(step):
        for i in range(0, rows, step):
            h, th, n = hidden[i : i + step], teacher_hidden[i : i + step], min(step, rows - i)
            torch.mm(h, head.T, out=z[:n])
            torch.mm(th, teacher_head.T, out=t[:n])
            torch.mm(z[:n], head, out=grad_hidden[i : i + step])
            torch.addmm(grad_head, z[:n].T, h, beta=min(i, 1), out=grad_head)

    def trl(trainer):
        mask = torch.ones(1, rows)
        states = hidden_states, teacher_hidden[None]
        heads = leaves[1], teacher_head
        return lambda: backward(
            4 * trainer._chunked_divergence_loss(*states, *heads, mask, 0.0, temperature=2.0)[0],
            *leaves,
        )

    def liger(chunked):
        labels = torch.zeros(rows, dtype=torch.long)
        module = chunked.LigerFusedLinearJSDLoss(
            0.0, 4.0, beta=0.0, temperature=2.0, compiled=False, chunk_size=chunk
        )
        return lambda: backward(module(*leaves, teacher_hidden, teacher_head, labels), *leaves)

    hidden_states = leaves[0][None]
    want, tolerance = eager(), 1e-4 if dtype == FP32 else 3e-2

    def check(call):
        for a, b in zip(call(), want, strict=True):
            atol = tolerance * b.abs().max().item()
            torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=atol)

    title = f"linear {rows}x{width}x{classes} {short(dtype)}, {chunk} rows of logits"
    found = Comparison(title, check)
    compiled = torch.compile(loss, dynamic=False)
    found.add("eager", eager)
    found.add("torch.compile", lambda: backward(compiled(*leaves), *leaves))
    found.add_peer("TRL, chunked", "trl.trainer.distillation_trainer", trl)
    found.add_peer("Liger, chunked", "liger_kernel.chunked_loss", liger)
    found.add("products", lambda: products(rows), check=False)
    found.add(f"products, {chunk} rows", lambda: products(chunk), check=False)
    found.add(f"{OURS}, logits in memory", unfused)
    found.add(OURS, fused)
    compare(found)
