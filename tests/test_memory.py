"""What losses and their gradients take of memory: the peak of a process's resident set."""

import os

import processes
import pytest
import torch

from kdkernels import (
    distillation_loss,
    linear_distillation_loss,
    linear_log_probs,
    topk_distillation_loss,
)

MB = 1 << 20
ROWS, CLASSES = 512, 32768  # logits of 64 MB


def status(field):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(field + ":")) << 10


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Each makes tensors of some rows, and returns a call that returns what it keeps.


def dense(rows, inplace, teachers=1, **options):
    leaf = randn(rows, CLASSES).requires_grad_()
    t = [randn(rows, CLASSES, seed=k) for k in range(teachers)]
    labels = torch.arange(rows)
    logits = leaf * 1 if inplace else leaf

    def step():
        loss, _ = distillation_loss(
            logits, t, labels, inplace=inplace, return_statistics=True, **options
        )
        gradient = torch.autograd.grad(loss, logits)
        return () if inplace else gradient

    return step


def shifted(rows, inplace, **options):
    """Logits of sequences of which the last is not compared."""
    leaf = randn(2, rows // 2 + 1, CLASSES).requires_grad_()
    logits = (leaf * 1 if inplace else leaf)[:, :-1]
    t = randn(2, rows // 2 + 1, CLASSES, seed=1)[:, 1:]

    def step():
        loss = distillation_loss(logits, t, inplace=inplace)
        return (loss,) if inplace else torch.autograd.grad(loss, logits)

    return step


def no_gradient(rows):
    z, t = randn(rows, CLASSES), randn(rows, CLASSES, seed=1)
    return lambda: (distillation_loss(z, t, divergence="js"),)


def top_k(rows):
    z, values = randn(rows, CLASSES).requires_grad_(), randn(rows, 64)
    indices = torch.arange(64).expand(rows, 64).contiguous()

    def step():
        loss = topk_distillation_loss(z, values, indices, sparse_gradient=True)
        torch.autograd.grad(loss, z)
        return ()

    return step


def linear(rows, budget):
    h, th = randn(rows, 64).requires_grad_(), randn(rows, 64, seed=1)
    w, tw = randn(CLASSES, 64, seed=2).requires_grad_(), randn(CLASSES, 64, seed=3)
    labels = torch.arange(rows) % CLASSES

    def step():
        loss = linear_distillation_loss(h, w, th, tw, labels, memory_budget=budget)
        return torch.autograd.grad(loss, (h, w))

    return step


def cross_entropy(rows):
    """Of a head, without a teacher."""
    h, w = randn(rows, 64).requires_grad_(), randn(CLASSES, 64, seed=2).requires_grad_()
    labels = torch.arange(rows) % CLASSES

    def step():
        return torch.autograd.grad(linear_distillation_loss(h, w, labels=labels), (h, w))

    return step


def log_probs(rows, budget):
    h, w = randn(rows, 64).requires_grad_(), randn(CLASSES, 64, seed=2).requires_grad_()
    ids = torch.arange(rows) % CLASSES

    def step():
        out = linear_log_probs(h, w, ids, memory_budget=budget)
        return torch.autograd.grad(out.log_probs.sum(), (h, w))

    return step


def measure(pipe, make, calls):
    torch.set_num_threads(2)
    found = []
    for rows, arguments in calls:
        make(2, **arguments)()  # whatever libraries keep from a first call on
        step = make(rows, **arguments)
        before = status("VmRSS")
        try:
            with open("/proc/self/clear_refs", "w") as f:
                f.write("5")  # forget the peak
        except OSError:
            pipe.send(None)
            return
        kept = step()
        found.append(status("VmHWM") - before - sum(x.nbytes for x in kept))
        del step, kept
    pipe.send(found)


def peaks(make, *calls):
    """Bytes that a call and its backward take beyond arguments and what they return, one by one.

    calls: of rows and arguments each, in a process of their own.
    """
    found = processes.fresh(measure, make, calls)
    if found is None:
        pytest.skip("this system keeps no peak of resident memory")
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"divergence": "js", "temperature": 2.0},
        {"divergence": "decoupled", "standardize": True, "soft_cap": 5.0},
        {"divergence": "reverse_kl", "teachers": 3},
    ],
)
def test_dense(options):
    """In place nothing of the logits' size, else the gradient alone; a row's buffers beside it."""
    calls = [(ROWS, {"inplace": inplace, **options}) for inplace in (True, False)]
    assert max(peaks(dense, *calls)) < 4 * MB


def test_rows_in_runs():
    """logits[:, :-1] and [:, 1:] are read and written where they lie."""
    calls = [(ROWS, {"inplace": inplace}) for inplace in (True, False)]
    assert max(peaks(shifted, *calls)) < 4 * MB


def flags_of_mapping(address):
    """What the system keeps of the mapping that an address is in, or None if it does not say."""
    try:
        with open("/proc/self/smaps") as f:
            lines = f.read().splitlines()
    except OSError:
        return None
    inside = False
    for line in lines:
        first, *rest = line.split()
        if "-" in first and not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            inside = begin <= address < end
        elif inside and first == "VmFlags:":
            return rest
    return None


def test_huge_pages():
    """Large gradients ask for them."""
    if not os.path.exists("/sys/kernel/mm/transparent_hugepage/enabled"):
        pytest.skip("this system has no huge pages for the asking")
    t = randn(ROWS, CLASSES, seed=1).requires_grad_()
    gradients = torch.autograd.grad(
        distillation_loss(z := randn(ROWS, CLASSES).requires_grad_(), t), (z, t)
    )
    flags = [flags_of_mapping(x.data_ptr() + x.nbytes // 2) for x in gradients]
    if None in flags:
        pytest.skip("this system says nothing of its mappings")
    assert all("hg" in f for f in flags)


def test_without_a_gradient():
    assert peaks(no_gradient, (ROWS, {}))[0] < 4 * MB


def test_sparse_gradient_of_top_k():
    assert peaks(top_k, (ROWS, {}))[0] < 4 * MB


def test_linear_by_default():
    rows = 4096
    assert peaks(linear, (rows, {"budget": None}))[0] < 0.05 * 2 * rows * CLASSES * 4


def test_linear_with_a_budget():
    assert peaks(linear, (1024, {"budget": 16 * MB}))[0] < 24 * MB


def test_linear_without_a_teacher():
    rows = 4096
    assert peaks(cross_entropy, (rows, {}))[0] < 0.08 * rows * CLASSES * 4


def test_linear_log_probs():
    assert peaks(log_probs, (1024, {"budget": 16 * MB}))[0] < 24 * MB
