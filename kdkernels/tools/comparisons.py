"""What is compared: the ops on inputs as training has them, beside plain PyTorch.

:func:`kdkernels.measuring.measure` times these comparisons; bench/ in the source folder adds
peers to them.
"""

import functools
import itertools
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import kdkernels
from kdkernels.measuring import OURS, Comparison, memcpy

COPIES_BYTES = 1 << 26
"""The most that copies of logits take, of which each call in a row overwrites another one."""


# ---- inputs --------------------------------------------------------------------------------------

IGNORED = -100
"""The label of a row that does not count, as in torch.nn.functional.cross_entropy."""


class Logits(NamedTuple):
    """Inputs of a loss: see :func:`training_logits`."""

    student: Tensor
    teacher: Tensor
    labels: Tensor


def training_logits(
    rows: int,
    classes: int,
    gap: float = 0.1,
    *,
    dtype: torch.dtype = torch.float32,
    prompts: float = 0.0,
    seed: int = 0,
    device: str = "cpu",
) -> Logits:
    """Logits as training has them: of a trained teacher, and of a student that follows it.

    What a trained model predicts is peaked, and its probabilities fall as a power of their rank.
    Logits with an exponential distribution of mean m give that: k^-m at rank k, and two draws from
    a row agree with probability 1 - 1/m, however many classes there are (Pitman and Yor, "The
    two-parameter Poisson-Dirichlet distribution", 1997). Here m is 2.

    Args:
        rows, classes: of both.
        gap: standard deviation of the student's logits less the teacher's. Infinite: the student's
            are independent of the teacher's, and as peaked.
        dtype: of the logits, which are drawn in fp32, or in fp64 for fp64.
        prompts: share of the rows, the first ones, that are labelled :data:`IGNORED`.
        seed, device: of the draws.

    Returns:
        Student and teacher ``[rows, classes]`` and labels ``[rows]``, drawn from the teacher.
    """
    g = torch.Generator(device).manual_seed(seed)
    acc = torch.float64 if dtype == torch.float64 else torch.float32

    def drawn():
        return torch.empty(rows, classes, dtype=acc, device=device)

    teacher = drawn().exponential_(0.5, generator=g)
    if math.isinf(gap):
        student = drawn().exponential_(0.5, generator=g)
    else:
        student = drawn().normal_(0, gap, generator=g).add_(teacher)
    labels = (teacher - drawn().exponential_(generator=g).log_()).argmax(-1)  # Gumbel's trick
    labels[: int(prompts * rows)] = IGNORED
    return Logits(student.to(dtype), teacher.to(dtype), labels)


# ---- what people write in plain PyTorch ----------------------------------------------------------


def resnet18() -> list[int]:
    """Elements of each of torchvision's resnet18's 62 parameters."""
    sizes = [9408, 64, 64]
    for stage, width in enumerate((64, 128, 256, 512)):
        for block in range(2):
            narrows = stage > 0 and block == 0
            fan_in = width // 2 if narrows else width
            for channels in (fan_in, width):
                sizes += [9 * channels * width, width, width]
            sizes += [fan_in * width, width, width] if narrows else []
    return [*sizes, 512_000, 1000]


def gpt2() -> list[int]:
    """Elements of each of GPT-2's 148 parameters, 124 million in all, its head tied."""
    sizes = [50257 * 768, 1024 * 768]
    for _ in range(12):
        sizes += [768, 768, 768 * 2304, 2304, 768 * 768, 768]
        sizes += [768, 768, 768 * 3072, 3072, 3072 * 768, 768]
    return [*sizes, 768, 768]


def plain_divergence(log_q: Tensor, log_p: Tensor, name: str) -> Tensor:
    """KL(p || q), KL(q || p), or the mean of both sides' KL to their middle; summed over rows."""
    if name == "forward_kl":
        return F.kl_div(log_q, log_p.exp(), reduction="sum")
    if name == "reverse_kl":
        return F.kl_div(log_p, log_q, reduction="sum", log_target=True)
    log_m = torch.logsumexp(torch.stack((log_p, log_q)), 0) - math.log(2)
    p, q = (F.kl_div(log_m, x, reduction="sum", log_target=True) for x in (log_p, log_q))
    return (p + q) / 2


def plain_loss(z, t, labels, temperature, alpha, divergence="forward_kl"):
    """The distillation loss, a mean over rows; "js" has beta 1/2."""
    log_q, log_p = (F.log_softmax(x / temperature, -1) for x in (z, t))
    loss = temperature**2 * plain_divergence(log_q, log_p, divergence) / z.shape[0]
    if labels is not None:
        loss = alpha * loss + (1 - alpha) * F.cross_entropy(z, labels)
    return loss


def plain_noise(tensors: list[Tensor], std: float) -> None:
    """Add noise to each."""
    for x in tensors:
        x.add_(torch.randn_like(x), alpha=std)


# ---- comparisons that bench/ adds peers to -------------------------------------------------------


def short(dtype: torch.dtype) -> str:
    """``fp32``, ``bf16``."""
    return str(dtype).removeprefix("torch.").replace("float", "fp").replace("bfp", "bf")


def backward(loss: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    """The loss and its gradients."""
    return loss, *torch.autograd.grad(loss, leaves)


def dense(
    rows: int,
    classes: int,
    dtype: torch.dtype = torch.float32,
    divergence: str = "forward_kl",
    labels: bool = False,
    *,
    gaps: tuple[float, ...] = (),
    prompts: float = 0.0,
    temperature: float | None = None,
    growth=None,
) -> Comparison:
    """A loss and the logits' gradient: eager PyTorch, ours, ours in place.

    The student is far from its teacher: independent of it. ``gaps``: in place, too, where it is
    near, for each such standard deviation of its logits less the teacher's. ``prompts``: a share
    of the rows, with labels, that do not count.

    ``inputs``: z, a leaf, and t ``[rows, classes]``, and ``options``, plain_loss' other arguments.
    """
    options = {
        "temperature": temperature or (3.0 if labels else 2.0),
        "alpha": 0.5 if labels else None,
        "divergence": divergence,
    }
    # PyTorch's sums over long, peaked rows are right to 1e-3 in fp32.
    ours, others = (1e-4, 1e-2) if dtype == torch.float32 else (2e-2, 0.1)

    def inputs(gap):
        z, t, y = training_logits(rows, classes, gap, dtype=dtype, prompts=prompts)
        return z.requires_grad_(), t, y if labels else None

    def eager(z, t, y):
        if prompts:
            counts = y != IGNORED
            return backward(plain_loss(z[counts], t[counts], y[counts], **options), z)
        return backward(plain_loss(z, t, y, **options), z)

    def fused(z, t, y, inplace=False):
        return backward(kdkernels.distillation_loss(z, t, y, inplace=inplace, **options), z)

    def checks(z, t, y, outputs):
        exact = z.detach().double().requires_grad_()
        loss: Any = kdkernels.reference.distillation_loss(exact, t.double(), y, **options)
        want = backward(loss, exact)

        def check(call, tolerance=ours):
            restore(z, outputs)
            for got, right, scale in zip(call(), want, (1, 1 / rows), strict=True):
                torch.testing.assert_close(
                    got.double(), right, rtol=tolerance, atol=tolerance * scale
                )

        return check

    z, t, hard = far = inputs(math.inf)
    output = z * 1
    check = checks(*far, [output])
    title = f"{divergence} {rows}x{classes} {short(dtype)}{', labels' * labels}"
    title += f", {prompts:.0%} prompts" * bool(prompts)
    found = Comparison(
        title,
        functools.partial(check, tolerance=others),
        growth=growth,
        bytes=round((3 - 2 * prompts) * t.nbytes),
        z=z,
        t=t,
        options=(hard, *options.values()),
    )
    found.add("eager", lambda: eager(*far))
    found.add(OURS, lambda: fused(*far), check=check)
    # The second and later calls find what the last one wrote, which is as far from the teacher.
    found.add(f"{OURS} in place", lambda: fused(output, t, hard, True), check=check)
    for gap in gaps:
        student, teacher, label = inputs(gap)
        copies = [student * 1 for _ in range(max(1, min(1000, COPIES_BYTES // student.nbytes)))]
        turns = itertools.cycle(copies)
        found.add(
            f"{OURS} in place, gap {gap:g}",
            lambda turns=turns, t=teacher, y=label: fused(next(turns), t, y, True),
            check=checks(student, teacher, label, copies),
            before=(functools.partial(restore, student, copies), len(copies)),
        )
    return found


def restore(leaf: Tensor, outputs: list[Tensor]) -> None:
    """Logits as they were before a call wrote its gradient over them."""
    with torch.no_grad():
        for output in outputs:
            output.copy_(leaf)


def top_k(rows: int, classes: int, k: int) -> Comparison:
    """The loss of a teacher's k largest classes and its gradient, beside the dense loss in PyTorch.

    Where the gradient is dense, its zeros are most of what is written.
    """
    g = torch.Generator().manual_seed(0)
    z, t = (3 * torch.randn(rows, classes, generator=g) for _ in range(2))
    leaf, top = z.requires_grad_(), kdkernels.topk_teacher(t, k)
    indices = top.indices.long()

    def eager():
        log_q = leaf.gather(-1, indices).log_softmax(-1)
        return backward(F.kl_div(log_q, top.values.softmax(-1), reduction="batchmean"), leaf)

    def fused(sparse):
        return backward(
            kdkernels.topk_distillation_loss(leaf, top.values, top.indices, sparse_gradient=sparse),
            leaf,
        )

    want = eager()

    def check(call):
        loss, gradient = call()
        torch.testing.assert_close(loss, want[0])
        gradient = gradient.to_dense() if gradient.layout == torch.sparse_coo else gradient
        torch.testing.assert_close(gradient, want[1], rtol=1e-4, atol=1e-5 / rows)

    found = Comparison(f"top {k} of {rows}x{classes} fp32", check, z=leaf, top=top)
    dense = lambda: backward(plain_loss(leaf, t, None, 1.0, None), leaf)  # noqa: E731
    found.add("eager, all classes", dense, check=False)
    found.add("eager", eager)
    found.add(OURS, lambda: fused(False))
    found.add(f"{OURS}, sparse gradient", lambda: fused(True))
    return found


def noise(name: str, sizes: list[int], dtype: torch.dtype = torch.float32, growth=None):
    """Noise added in place to a list of tensors. ``inputs``: the tensors, and the std."""
    std = 0.1
    tensors = [torch.zeros(n, dtype=dtype) for n in sizes]
    largest = max(tensors, key=torch.numel)

    def check(call):
        for x in tensors:
            x.zero_()
        found = call()
        noisy = largest if found is None else found
        off = noisy.float().std().item() / std - 1
        assert abs(off) < 0.01 + 4 / len(noisy) ** 0.5, f"the noise's std is off by {off:.1%}"

    found = Comparison(
        f"noise on {name} {short(dtype)}",
        check,
        bytes=2 * sum(x.nbytes for x in tensors),
        growth=growth,
        tensors=tensors,
        std=std,
    )
    found.add("eager", lambda: plain_noise(tensors, std))
    found.add(OURS, lambda: kdkernels.add_noise_(tensors, std, seed=1, step=2))
    found.add("memcpy", memcpy(tensors), check=False)
    return found


OPTIMIZERS = {
    "AdamW": (torch.optim.AdamW, kdkernels.NoisyAdamW, {"lr": 1e-3, "weight_decay": 0.01}, 7),
    "SGD": (torch.optim.SGD, kdkernels.NoisySGD, {"lr": 1e-3, "momentum": 0.9}, 5),
}
"""torch's, ours, their options, and how many tensors of a parameter's size are read or written."""


def optimizer(kind: str, name: str, sizes: list[int]) -> Comparison:
    """A step of an optimizer, with noise on the gradients and without."""
    theirs, ours, options, passes = OPTIMIZERS[kind]
    std = 0.1

    def make(optimizer, noisy, **more):
        params = [torch.nn.Parameter(torch.ones(n)) for n in sizes]
        grads = [torch.full((n,), 0.01) for n in sizes]
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        made = optimizer(params, **options, **more)

        def step():
            plain_noise(grads, std)
            made.step()

        call = step if noisy else made.step
        return call, max(params, key=torch.numel)

    def change(call, parameter):
        before = parameter.detach().clone()
        call()
        return parameter.detach() - before

    def add(name, optimizer, noisy, **more):
        external = noisy and optimizer is not ours
        call, parameter = make(optimizer, external, **more)
        first = change(call, parameter)
        # A first step of AdamW goes lr in the gradient's direction, one of SGD lr times it.
        length = 1.0 if kind == "AdamW" else (0.01**2 + noisy * std**2) ** 0.5
        drift = options["lr"] * options.get("weight_decay", 0.0)
        off = (first + drift).square().mean().sqrt().item() / (options["lr"] * length) - 1
        assert abs(off) < 0.02 + 4 / len(parameter) ** 0.5, f"{name}: off by {off:.1%}"
        found.add(name, call, check=False)

    found = Comparison(f"{kind} step, {name} fp32", None, bytes=passes * 4 * sum(sizes))
    add("eager", theirs, True, foreach=True)
    add("torch fused", theirs, True, fused=True)
    add("torch fused, no noise", theirs, False, fused=True)
    add(OURS, ours, True, std=std, seed=1)
    add(f"{OURS}, no noise", ours, False)
    return found


def experiment_1(replicas: int | None = None, steps: int = 1000) -> Comparison:
    """Experiment 1's regression by its three paths; with many replicas at once too, if given."""
    from kdkernels.experiments.soft_regression import make_data, numpy_path, stationary, torch_path

    x, y, theta = make_data()
    x32, y32, theta32 = (torch.from_numpy(v).float() for v in (x, y, theta))
    loop = {"steps": steps, "lr": 0.01, "lam": 0.01}
    random, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    mean, spread = stationary(x, y, lr=0.01, lam=0.01, sigma=1.0, noise="per-step")

    def check(call):
        last = float(call().mean())
        assert abs(last - mean) < 6 * spread or steps < 1000, f"theta is {last}, should be {mean}"

    found = Comparison(f"experiment 1, {steps:,} steps of a replica", check)
    for count in (1, replicas) if replicas else (1,):
        many = f", {count:,} replicas" if count > 1 else ""
        shape, seeds = (1, count), torch.arange(count)
        paths = {
            "NumPy loop": lambda shape=shape: numpy_path(
                x, y, theta, lambda _: random.standard_normal(shape), **loop
            )[-1],
            "PyTorch loop": lambda shape=shape: torch_path(
                x32, y32, theta32, lambda _: torch.randn(shape, generator=generator), **loop
            )[-1],
            OURS: lambda seeds=seeds: kdkernels.noisy_linear_regression(
                x32, y32, float(theta[0, 0]), **loop, sigma=1.0, seed=seeds
            ),
        }
        for name, call in paths.items():
            found.add(name + many, call, per=count)
    return found
