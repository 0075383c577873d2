"""The costs of the peers' kernels: Liger's, and those that torch.compile makes.

Their launches have their true size, but only their first blocks run and stand for the others.
"""

import functools
import math

import ptx
import torch
from torch.nn import functional as F

from kdkernels.tools.comparisons import plain_loss, training_logits

from . import peers_ptx
from .cost import Cost, cost
from .ours import ALPHA, TEMPERATURE

try:
    from liger_kernel import transformers as liger
except ImportError:
    liger = None

ELEMENTS = 1 << 24  # of a loss, in at least 512 rows: its launches fill the GPU
STD = 0.1


class Counter:
    """Runs the launches that it is called with in the emulator, their first blocks at least."""

    def __init__(self, blocks=None):
        self.blocks, self.costs = blocks, []

    def __call__(self, launch):
        if not hasattr(launch, "ptx"):
            total = launch.read + launch.written
            self.costs.append(Cost(f"PyTorch's {launch.op}", moved=total, useful=total))
            return
        x, *yz = launch.grid
        part = (min(x, self.blocks or x), *yz)
        with library(launch.ptx).run(same_values=True) as run:
            args = []
            for value in launch.args:
                if torch.is_tensor(value):
                    run.buffer(torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage()))
                    value = value.data_ptr()
                args.append(0 if value is None else value)
            run.launch(launch.kernel, part, launch.block, args, shared=launch.shared)
        (done,) = run.launches
        each_once = sum(launch.touched())
        self.costs.append(cost(done, launch.ptx, math.prod(launch.grid), each_once))


@functools.cache
def library(text):
    return ptx.load(text)


# ---- losses --------------------------------------------------------------------------------------


def written(divergence, with_labels=False):
    """The loss as people write it."""
    alpha = ALPHA if with_labels else None

    def loss(z, t, labels):
        return plain_loss(z, t, labels if with_labels else None, TEMPERATURE, alpha, divergence)

    return loss


def divergence(log_q, p, labels):
    return F.kl_div(log_q, p, reduction="batchmean")


def jsd(log_q, log_p, labels):
    log_m = torch.logaddexp(log_q, log_p) - math.log(2)
    return sum((x.exp() * (x - log_m)).sum(-1).mean() / 2 for x in (log_q, log_p))


def cross_entropy(z, t, labels):
    return F.cross_entropy(z, labels)


# The tensors of [rows, classes] that an op must move (two read and one written; one and one), what
# is made of the logits before counting starts, and the op as people write it.
LOSSES = {
    "forward_kl": (3, lambda z, t: (z, t), written("forward_kl")),
    "forward_kl with labels": (3, lambda z, t: (z, t), written("forward_kl", True)),
    "reverse_kl": (3, lambda z, t: (z, t), written("reverse_kl")),
    "js": (3, lambda z, t: (z, t), written("js")),
    "KL of log-probabilities": (3, lambda z, t: (z.log_softmax(-1), t.softmax(-1)), divergence),
    "JSD of log-probabilities": (3, lambda z, t: (z.log_softmax(-1), t.log_softmax(-1)), jsd),
    "cross-entropy": (2, lambda z, t: (z, t), cross_entropy),
}


def losses():
    """(op, name, whether torch.compile compiles it, call); calls take what LOSSES prepares."""
    for op in LOSSES:
        if "log-probabilities" not in op:
            yield op, "PyTorch (its bytes alone)", False, LOSSES[op][2]
            yield op, "torch.compile", True, LOSSES[op][2]
    if liger is None:
        return
    kl, ce = liger.LigerKLDIVLoss(reduction="batchmean"), liger.LigerCrossEntropyLoss()
    js, reverse_kl = liger.LigerJSD(), liger.LigerJSD(beta=1.0)

    def kl_of_logits(z, t, labels):
        log_q, p = F.log_softmax(z / TEMPERATURE, -1), F.softmax(t / TEMPERATURE, -1)
        return TEMPERATURE**2 * kl(log_q, p)

    def of_logits(loss):
        def call(z, t, labels):
            log_q, log_p = (F.log_softmax(x / TEMPERATURE, -1) for x in (z, t))
            return TEMPERATURE**2 * loss(log_q, log_p)

        return call

    yield "forward_kl", "Liger KLDiv, PyTorch's softmax", False, kl_of_logits
    yield "reverse_kl", "Liger JSD, PyTorch's softmax", False, of_logits(reverse_kl)
    yield "js", "Liger JSD, PyTorch's softmax", False, of_logits(js)
    yield "KL of log-probabilities", "Liger KLDiv", False, lambda q, p, labels: kl(q, p)
    yield "JSD of log-probabilities", "Liger JSD", False, lambda q, p, labels: js(q, p)
    yield "cross-entropy", "Liger", False, lambda z, t, labels: ce(z, labels)


def rows_of(classes):
    return max(512, ELEMENTS // classes)


def loss_inputs(op, rows, classes, dtype):
    z, t, labels = training_logits(rows, classes, math.inf)
    z, t = LOSSES[op][1](z, t)
    return z.to(dtype).requires_grad_(), t.to(dtype), labels


def run_loss(op, compile_it, call, rows, classes, dtype, blocks=None):
    """The costs of a peer's forward and backward, its loss and its gradient."""
    z, t, labels = loss_inputs(op, rows, classes, dtype)
    torch._dynamo.reset()
    counter = Counter(blocks)
    with peers_ptx.on_cpu(counter, eager=not compile_it):
        loss = (peers_ptx.compiled(call) if compile_it else call)(z, t, labels)
        loss.backward()
    return counter.costs, loss, z.grad


def check_loss(op, name, compile_it, call, dtype):
    """What the emulated kernels of a peer compute is what PyTorch does in fp64."""
    rows, classes = 5, 1000
    _, loss, gradient = run_loss(op, compile_it, call, rows, classes, dtype)
    z, t, labels = loss_inputs(op, rows, classes, dtype)
    z = z.detach().double().requires_grad_()
    want = LOSSES[op][2](z, t.double(), labels)
    want.backward()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    message = f"{name}'s {op}: {{}}".format
    torch.testing.assert_close(
        loss.double(), want, rtol=tolerance, atol=tolerance, msg=lambda m: message(m)
    )
    torch.testing.assert_close(
        gradient.double(), z.grad, rtol=tolerance, atol=tolerance / rows, msg=lambda m: message(m)
    )


def count_loss(op, compile_it, call, classes, dtype):
    """(the costs of a peer's loss, elements, minimal bytes an element)."""
    rows, blocks = rows_of(classes), min(16, max(2, (1 << 18) // classes))
    costs, *_ = run_loss(op, compile_it, call, rows, classes, dtype, blocks)
    return costs, rows * classes, LOSSES[op][0] * dtype.itemsize


# ---- noise ---------------------------------------------------------------------------------------


def count_noise(sizes, dtype, blocks=16):
    """The costs of noise on a list of tensors by torch.compile."""
    tensors = [torch.zeros(n, dtype=dtype) for n in sizes]
    torch._dynamo.reset()
    counter = Counter(blocks)
    add = peers_ptx.compiled(lambda tensors: [x + STD * torch.randn_like(x) for x in tensors])
    with peers_ptx.on_cpu(counter, eager=False):
        add(tensors)
    return counter.costs
