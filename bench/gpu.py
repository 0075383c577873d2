"""GPU benchmarks: each op beside what people use instead, with a cold and with a warm L2 cache.

    python -m bench.gpu [--device cpu] [--only noise] [--peers eager Liger] [--seconds 2]

Writes bench/results/gpu-<device>.json, .md and .png. All who can do an op do it in turns, one call
each a round, and a ratio is the median of the rounds' own ratios, so that a clock that moves moves
both sides. cold: one call's time on the device, after the cache was filled with other data. warm:
the same right after another call. loop: calls one after another, with what the host does between
them. Shares of bandwidth are of the fewest bytes that the op must move, at the cold time.
"""

import argparse
import functools
import importlib
import json
import math
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn import functional as F

import kdkernels
from kdkernels.tools.comparisons import gpt2, plain_loss, resnet18, training_logits

OURS = "kdkernels"
MODES = ("cold", "warm", "loop")
MIN_ROUNDS, MAX_ROUNDS = 5, 200
LOOP_SECONDS = 0.005  # of calls in a sample of "loop"


@dataclass
class Case:
    """One op on one input, and everybody who can do it."""

    title: str
    device: str
    wanted: list | None = None  # names of peers; None: all
    bytes: int = 0  # the fewest that the op must move
    calls: dict[str, Callable] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)  # who cannot take part, and why
    notes: list[str] = field(default_factory=list)

    def add(self, name, call, error=None, allowed=0.0):
        """Let a peer take part if it runs; note a result that is far off, or stop if it is ours."""
        ours = name.startswith(OURS)
        if not ours and self.wanted is not None and name not in self.wanted:
            return
        try:
            off = error() if error else 0.0
        except Exception as failure:  # a peer may fail in its own ways
            if ours:
                raise
            said = str(failure).strip().splitlines() or [""]
            self.missing[name] = f"{type(failure).__name__}: {said[0][:100]}"
            return
        if not off <= allowed:
            sentence = f"{self.title}: {name} is off by {off:.2g} (allowed {allowed:.2g})"
            if ours:
                raise SystemExit(f"kdkernels: {sentence}.")
            self.notes.append(sentence)
        self.calls[name] = call


# ---- time ---------------------------------------------------------------------------------------


class CudaClock:
    """CUDA events; the device sleeps while the host queues a call, so the host does not count."""

    def __init__(self, megabytes=None):
        self.facts = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.name = self.facts.name
        size = (megabytes << 20) if megabytes else 2 * max(self.facts.L2_cache_size, 16 << 20)
        self.written = torch.zeros(size, dtype=torch.uint8, device="cuda")
        self.read = torch.zeros(size // 4, dtype=torch.int32, device="cuda")
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cycles = 10**7
        torch.cuda._sleep(cycles)
        self.cycles_per_second = cycles / self.elapsed(lambda: torch.cuda._sleep(cycles))

    def elapsed(self, call):
        self.start.record()
        call()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) / 1e3

    def sampler(self, call, mode):
        """Return a function that times one call."""
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        queued = time.perf_counter() - start
        torch.cuda.synchronize()
        if mode == "loop":
            done = time.perf_counter() - start
            return functools.partial(looped, call, done, torch.cuda.synchronize)
        cycles = int(self.cycles_per_second * (2 * queued + 2e-5))

        def sample():
            if mode == "cold":
                self.flush()
            else:
                call()
            torch.cuda._sleep(cycles)
            return self.elapsed(call)

        return sample

    def flush(self):
        # Written data must still leave the cache, which would fall into the measured time: what is
        # read after it pushes it out.
        self.written.zero_()
        self.read.sum()

    def nominal_bandwidth(self):
        """Bytes a second: memory moves twice a clock. None where the driver does not tell."""
        clock = getattr(self.facts, "memory_clock_rate", 0) * 1e3
        return 2 * clock * getattr(self.facts, "memory_bus_width", 0) / 8 or None


class CpuClock:
    """The same on the CPU: to try this file, not to measure."""

    name = "cpu"

    def __init__(self, megabytes=None):
        self.written = torch.zeros((megabytes or 64) << 20, dtype=torch.uint8)

    def elapsed(self, call):
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def sampler(self, call, mode):
        call()
        once = self.elapsed(call)
        if mode == "loop":
            return functools.partial(looped, call, once, lambda: None)

        def sample():
            self.written.zero_() if mode == "cold" else call()
            return self.elapsed(call)

        return sample

    def nominal_bandwidth(self):
        return None


def looped(call, once, finish):
    """Seconds a call of many in a row."""
    count = max(1, min(1000, round(LOOP_SECONDS / max(once, 1e-9))))
    finish()
    start = time.perf_counter()
    for _ in range(count):
        call()
    finish()
    return (time.perf_counter() - start) / count


def copy_bandwidth(clock, device, elements):
    """Bytes a second of a large copy, read and written."""
    elements = elements or 1 << 28
    if device == "cuda":
        elements = min(elements, torch.cuda.mem_get_info()[0] // 32)
    source = torch.zeros(elements, device=device)
    target = torch.empty_like(source)
    sample = clock.sampler(lambda: target.copy_(source), "cold")
    return 2 * source.nbytes / statistics.median(sample() for _ in range(11))


def in_turns(samplers, seconds):
    """{name: seconds a call, one a round}; nobody always runs after the same neighbour."""
    rounds = {name: [] for name in samplers}
    names = list(samplers)
    end = time.perf_counter() + seconds
    for done in range(MAX_ROUNDS):
        if done >= MIN_ROUNDS and time.perf_counter() > end:
            break
        for name in names:
            rounds[name].append(samplers[name]())
        names.append(names.pop(0))
    return rounds


def summary(rounds):
    """{name: quartiles of its seconds, and of how many times as long as OURS it takes}."""
    return {
        name: {
            "seconds": statistics.quantiles(own, n=4),
            "times": statistics.quantiles(
                [mine / ours for mine, ours in zip(own, rounds[OURS], strict=True)], n=4
            ),
            "rounds": len(own),
        }
        for name, own in rounds.items()
    }


# ---- who takes part -----------------------------------------------------------------------------


def imported(name, device):
    """(module, "") or (None, why not)."""
    if device == "cpu":
        return None, "needs a GPU"
    try:
        return importlib.import_module(name), ""
    except Exception as error:  # a library may fail on import in its own ways
        return None, f"does not import ({(str(error).splitlines() or [''])[0]})"


def liger_loss(liger, z, t, labels, temperature, alpha, divergence="forward_kl"):
    """Liger's divergences take (log-)probabilities; its cross-entropy overwrites z."""
    log_q = F.log_softmax(z / temperature, -1)
    if divergence == "forward_kl":
        kl = liger.LigerKLDIVLoss(reduction="batchmean")
        loss = temperature**2 * kl(log_q, F.softmax(t / temperature, -1))
    else:
        jsd = liger.LigerJSD(beta={"js": 0.5, "reverse_kl": 1.0}[divergence])
        loss = temperature**2 * jsd(log_q, F.log_softmax(t / temperature, -1))
    if labels is not None:
        loss = alpha * loss + (1 - alpha) * liger.LigerCrossEntropyLoss()(z, labels)
    return loss


def quack_loss(quack, z, t, labels, temperature, alpha):
    """QuACK has the softmax and the cross-entropy; the divergence is PyTorch's."""
    loss = temperature**2 * F.kl_div(
        F.log_softmax(z / temperature, -1), quack.softmax(t / temperature), reduction="batchmean"
    )
    if labels is not None:
        loss = alpha * loss + (1 - alpha) * quack.cross_entropy(z, labels)
    return loss


def fused_loss(z, t, labels, temperature, alpha, divergence="forward_kl", inplace=False):
    """Ours."""
    options = {"temperature": temperature, "divergence": divergence, "inplace": inplace}
    if labels is not None:
        options["alpha"] = alpha
    return kdkernels.distillation_loss(z, t, labels, **options)


def with_gradient(loss, logits):
    value = loss(logits)
    return value, torch.autograd.grad(value, logits)[0]


def fp64_loss(z, t, labels, rows=256, **options):
    """(the loss, the gradient of the first rows), in slices that fit the memory."""
    total, first = 0.0, None
    for begin in range(0, len(z), rows):
        part = slice(begin, begin + rows)
        leaf = z[part].double().requires_grad_()
        share = len(leaf) / len(z)
        own = None if labels is None else labels[part]
        loss, gradient = with_gradient(
            lambda x, part=part, own=own: kdkernels.reference.distillation_loss(
                x, t[part].double(), own, **options
            ),
            leaf,
        )
        total += loss.item() * share
        first = gradient * share if first is None else first
    return total, first


def losses_of(case, divergence, near):
    """{name: a loss} of those who can do it."""
    losses = {OURS: fused_loss}
    if near:
        return losses  # what the peers take does not depend on the numbers
    losses[f"{OURS} in place"] = functools.partial(fused_loss, inplace=True)
    if divergence not in ("forward_kl", "reverse_kl", "js"):
        return losses
    losses |= {"eager": plain_loss, "torch.compile": torch.compile(plain_loss, dynamic=False)}
    for name, module, loss in (
        ("Liger", "liger_kernel.transformers", liger_loss),
        ("QuACK", "quack", quack_loss),
    ):
        found, reason = imported(module, case.device)
        if found and name == "QuACK" and divergence != "forward_kl":
            found, reason = None, "has no such divergence"
        if found:
            losses[name] = functools.partial(loss, found)
        else:
            case.missing[name] = reason
    return losses


def distillation(case, elements, rows, classes, dtype, hard, divergence="forward_kl", gap=math.inf):
    """Loss and gradient of the logits, whose student is far from the teacher, or near it."""
    device = case.device
    rows = max(1, min(rows, (elements or rows * classes) // classes))
    z, t, labels = training_logits(rows, classes, gap, dtype=dtype, device=device)
    options = {"temperature": 3.0 if hard else 2.0, "alpha": 0.5 if hard else 1.0}
    if divergence != "forward_kl":
        options["divergence"] = divergence
    labels = labels if hard or divergence == "decoupled" else None
    case.bytes = 3 * z.nbytes

    want_loss, want_gradient = fp64_loss(z, t, labels, **options)
    for name, loss in losses_of(case, divergence, gap < math.inf).items():
        # Logits are a layer's output, which may be overwritten; a leaf may not. From the second
        # call on they are what the last one wrote, which takes as long.
        inplace = "in place" in name
        leaf = z.clone() if inplace or name == "Liger" else z.detach()
        leaf.requires_grad_()
        logits = leaf * 1 if inplace else leaf

        def call(loss=loss, logits=logits):
            return with_gradient(lambda x: loss(x, t, labels, **options), logits)

        def error(call=call):
            got_loss, got_gradient = call()
            part = got_gradient[: len(want_gradient)].double()
            of_gradient = (part - want_gradient).abs().max().item() * rows
            return max(of_gradient, abs(got_loss.item() - want_loss) / abs(want_loss))

        case.add(name, call, error, 1e-4 if dtype == torch.float32 else 3e-2)
    source = torch.zeros(3 * z.numel() // 2, dtype=dtype, device=device)
    target = torch.empty_like(source)
    case.add("copy", lambda: target.copy_(source))


def topk(case, elements, rows, classes, dtype, k):
    """Loss and gradient of a teacher's k largest classes, renormalised."""
    rows = max(1, min(rows, (elements or rows * classes) // classes))
    k = min(k, classes)
    g = torch.Generator(case.device).manual_seed(0)
    kind = {"device": case.device, "dtype": dtype, "generator": g}
    leaf, t = (torch.randn(rows, classes, **kind).mul_(3) for _ in range(2))
    leaf.requires_grad_()
    top = kdkernels.topk_teacher(t, k)
    indices = top.indices.long()
    case.bytes = leaf.nbytes  # the gradient's zeros

    def plain(logits):
        log_q = logits.gather(-1, indices).log_softmax(-1)
        return F.kl_div(log_q, top.values.log_softmax(-1), reduction="batchmean", log_target=True)

    def fused(logits, **options):
        return kdkernels.topk_distillation_loss(logits, top.values, top.indices, **options)

    exact = leaf.detach().double().gather(-1, indices).log_softmax(-1)
    p = top.values.double().log_softmax(-1)
    want = F.kl_div(exact, p, reduction="batchmean", log_target=True).item()
    losses = {
        OURS: fused,
        f"{OURS} sparse": functools.partial(fused, sparse_gradient=True),
        "eager": plain,
        "torch.compile": torch.compile(plain, dynamic=False),
    }
    for name, loss in losses.items():

        def call(loss=loss):
            return with_gradient(loss, leaf)

        def error(call=call):
            return abs(call()[0].item() - want) / want

        case.add(name, call, error, 1e-4 if dtype == torch.float32 else 3e-2)
    target = torch.empty_like(t)
    case.add("copy", lambda: target.copy_(t))


def linear(case, elements, rows, classes, width, dtype):
    """Loss and gradients of a linear head; "copy" is its four matrix products."""
    rows = max(1, min(rows, (elements or rows * classes) // classes))
    g = torch.Generator(case.device).manual_seed(0)
    kind = {"device": case.device, "dtype": dtype, "generator": g}
    hidden, teacher = (torch.randn(rows, width, **kind) for _ in range(2))
    head, teacher_head = (torch.randn(classes, width, **kind) * width**-0.5 for _ in range(2))
    leaves = [hidden.requires_grad_(), head.requires_grad_()]
    case.bytes = 2 * head.nbytes

    def plain():
        with torch.no_grad():
            t = F.linear(teacher, teacher_head)
        return plain_loss(F.linear(*leaves), t, None, 2.0, None)

    def fused():
        return kdkernels.linear_distillation_loss(*leaves, teacher, teacher_head, temperature=2.0)

    with torch.no_grad():
        want = plain_loss(
            F.linear(hidden.float(), head.float()),
            F.linear(teacher.float(), teacher_head.float()),
            *(None, 2.0, None),
        ).item()
    for name, loss in {OURS: fused, "eager": plain, "torch.compile": torch.compile(plain)}.items():

        def call(loss=loss):
            value = loss()
            return value, *torch.autograd.grad(value, leaves)

        def error(call=call):
            return abs(call()[0].item() - want) / want

        case.add(name, call, error, 1e-4 if dtype == torch.float32 else 3e-2)

    def products():
        with torch.no_grad():
            z, _ = hidden @ head.T, teacher @ teacher_head.T
            return z @ head, z.T @ hidden

    case.add("copy", products)


def add_noise(case, elements, sizes, dtype, distribution="normal"):
    """x + std * noise, in place, over a list of tensors."""
    std = 0.1
    sizes = [min(size, elements or size) for size in sizes]
    tensors = [torch.zeros(size, dtype=dtype, device=case.device) for size in sizes]
    targets = [torch.empty_like(x) for x in tensors]
    largest = max(tensors, key=torch.numel)
    case.bytes = 2 * sum(x.nbytes for x in tensors)

    def fused():
        kdkernels.add_noise_(tensors, std, seed=1, step=2, distribution=distribution)

    def plain(tensors):
        for x in tensors:
            x.add_(torch.randn_like(x), alpha=std)

    def foreach():
        torch._foreach_add_(tensors, [torch.randn_like(x) for x in tensors], alpha=std)

    def copy():
        for x, y in zip(tensors, targets, strict=True):
            y.copy_(x)

    compiled = torch.compile(plain, dynamic=False)
    peers = {
        "eager": lambda: plain(tensors),
        "foreach": foreach,
        "torch.compile": lambda: compiled(tensors),
    }
    for name, call in {OURS: fused, **(peers if distribution == "normal" else {})}.items():

        def error(call=call):
            for x in tensors:
                x.zero_()
            call()
            return abs(largest.double().std().item() / std - 1)

        case.add(name, call, error, 6 / largest.numel() ** 0.5 + 0.01)
    case.add("copy", copy)


def dot_noise(case, elements, size, dtype):
    """The sum of a tensor's products with its noise."""
    x = torch.ones(min(size, elements or size), dtype=dtype, device=case.device)
    case.bytes = x.nbytes

    def plain():
        return (x * torch.randn_like(x)).sum(dtype=torch.float32)

    compiled = torch.compile(plain, dynamic=False)
    for name, call in {
        OURS: lambda: kdkernels.noise_dot(x, seed=1, step=2),
        "eager": plain,
        "torch.compile": compiled,
    }.items():
        # Standard deviations off: a sum of so many normals.
        case.add(name, call, lambda call=call: abs(call().item()) / x.numel() ** 0.5, 6)
    case.add("copy", lambda: x.sum(dtype=torch.float32))


def combine(case, elements, sizes, dtype, terms):
    """x + sum of several noises, in place: an update of evolution strategies or of MeZO."""
    sizes = [min(size, elements or size) for size in sizes]
    tensors = [torch.zeros(size, dtype=dtype, device=case.device) for size in sizes]
    targets = [torch.empty_like(x) for x in tensors]
    largest = max(tensors, key=torch.numel)
    case.bytes = 2 * sum(x.nbytes for x in tensors)
    seeds = list(range(terms))
    coefficients = [0.1 * (-1) ** k for k in seeds]
    generator = torch.Generator(case.device)

    def plain():
        for seed, coefficient in zip(seeds, coefficients, strict=True):
            generator.manual_seed(seed)
            for x in tensors:
                kind = {"dtype": x.dtype, "device": x.device, "generator": generator}
                x.add_(torch.randn(x.shape, **kind), alpha=coefficient)

    def copy():
        for x, y in zip(tensors, targets, strict=True):
            y.copy_(x)

    for name, call in {
        OURS: lambda: kdkernels.combine_noise_(tensors, coefficients, seeds),
        "eager": plain,
    }.items():

        def error(call=call):
            for x in tensors:
                x.zero_()
            call()
            return abs(largest.double().std().item() / (0.1 * terms**0.5) - 1)

        case.add(name, call, error, 6 / largest.numel() ** 0.5 + 0.02)
    case.add("copy", copy)


def optimizer(case, elements, kind, sizes, dtype):
    """A step of an optimizer on gradients with noise; peers add the noise to them first."""
    std, lr = 0.1, 1e-3
    sizes = [min(size, elements or size) for size in sizes]
    passes = {"AdamW": 7, "SGD": 5}[kind]  # tensors read or written
    options = {"lr": lr} | ({"momentum": 0.9} if kind == "SGD" else {"weight_decay": 0.0})
    theirs, ours = getattr(torch.optim, kind), getattr(kdkernels, f"Noisy{kind}")
    case.bytes = passes * dtype.itemsize * sum(sizes)

    def parameters():
        made = [torch.zeros(n, dtype=dtype, device=case.device) for n in sizes]
        made = [torch.nn.Parameter(x) for x in made]
        for p in made:
            p.grad = torch.zeros_like(p)
        return made

    def with_noise(optimizer):
        grads = [p.grad for p in optimizer.param_groups[0]["params"]]

        def step():
            torch._foreach_add_(grads, [torch.randn_like(g) for g in grads], alpha=std)
            optimizer.step()

        return step

    makers = {
        OURS: lambda params: ours(params, **options, std=std, seed=1),
        f"{OURS}, no noise": lambda params: ours(params, **options),
        "foreach": lambda params: theirs(params, **options, foreach=True),
        "torch fused": lambda params: theirs(params, **options, fused=True),
        "torch fused, no noise": lambda params: theirs(params, **options, fused=True),
    }
    for name, make in makers.items():
        noisy = "no noise" not in name
        params = parameters()
        made = make(params)
        call = made.step if name.startswith(OURS) or not noisy else with_noise(made)

        def error(params=params, call=call, noisy=noisy):
            """From zero, AdamW's first step is lr in the noise's direction, SGD's lr * noise."""
            call()
            largest = max(params, key=torch.numel).detach().double()
            step = largest.square().mean().sqrt().item()
            return abs(step / (lr * (1 if kind == "AdamW" else std)) - 1) if noisy else step

        case.add(name, call, error, 0.05)
    source = torch.zeros(passes * sum(sizes) // 2, dtype=dtype, device=case.device)
    target = torch.empty_like(source)
    case.add("copy", lambda: target.copy_(source))


def regression(case, elements, replicas, steps):
    """Noisy linear regression, all steps; bound by arithmetic and latency, not by memory."""
    if elements:
        replicas = min(replicas, elements // 1000)
    g = torch.Generator(case.device).manual_seed(0)
    kind = {"dtype": torch.float64, "device": case.device}
    x = torch.randn(100, generator=g, **kind)
    y = 2 * x + torch.randn(100, generator=g, **kind)
    start, lr, lam, sigma = torch.zeros(replicas, **kind), 0.05, 0.1, 0.3
    seeds = torch.arange(replicas, device=case.device)
    fixed = (x * y).mean() / ((x * x).mean() + sigma**2 + lam / 2)  # where the mean step is zero

    def fused():
        return kdkernels.noisy_linear_regression(
            x, y, start, steps=steps, lr=lr, lam=lam, sigma=sigma, seed=seeds
        )

    def plain():
        theta = start[:, None]
        for _ in range(steps):
            noisy = x + sigma * torch.randn(replicas, 1, **kind)
            gradient = (2 * (theta * noisy - y) * noisy).mean(1, keepdim=True)
            theta = theta - lr * (gradient + lam * theta)
        return theta[:, 0]

    for name, call in {OURS: fused, "eager": plain}.items():
        case.add(name, call, lambda call=call: (call().mean() - fixed).abs().item(), 0.5)


def short(dtype):
    return str(dtype).removeprefix("torch.").replace("float", "fp").replace("bfp", "bf")


LOGITS = [
    (8192, 32000, torch.bfloat16),
    (8192, 32000, torch.float32),
    (8192, 32001, torch.bfloat16),
    (4096, 128256, torch.bfloat16),
    (2048, 200000, torch.float32),
    (65536, 1000, torch.float32),
    (65536, 1000, torch.bfloat16),
    (1 << 18, 100, torch.float32),
    (1 << 20, 10, torch.float32),
    (512, 10, torch.float32),
]
# A new op: a function that fills a Case, and a line a size here.
CASES = (
    {
        f"distillation {rows} x {classes} {short(dtype)}{' labels' * hard}": (
            *(distillation, rows, classes, dtype, hard),
        )
        for rows, classes, dtype in LOGITS
        for hard in (False, True)
    }
    | {
        f"{divergence} {rows} x {classes} {short(dtype)}": (
            *(distillation, rows, classes, dtype, False, divergence),
        )
        for rows, classes, dtype in LOGITS[:6]
        for divergence in ("reverse_kl", "js")
    }
    | {
        f"{divergence} {rows} x {classes} {short(dtype)}, gap {gap:g}": (
            *(distillation, rows, classes, dtype, False, divergence, gap),
        )
        for rows, classes, dtype in LOGITS[:1] + LOGITS[6:9]
        for divergence in kdkernels.divergences()
        for gap in ((0.1, math.inf) if classes == 32000 else (0.1,))
        if not (gap == math.inf and divergence in ("forward_kl", "reverse_kl", "js"))
    }
    | {
        "top 64, 2048 x 128256 bf16": (topk, 2048, 128256, torch.bfloat16, 64),
        "linear 4096 x 128256, width 2048, bf16": (linear, 4096, 128256, 2048, torch.bfloat16),
        "noise 67M fp32": (add_noise, [1 << 26], torch.float32),
        "noise 67M bf16": (add_noise, [1 << 26], torch.bfloat16),
        "noise 1k fp32": (add_noise, [1000], torch.float32),
        "noise ResNet-18 fp32": (add_noise, resnet18(), torch.float32),
        "noise GPT-2 fp32": (add_noise, gpt2(), torch.float32),
        "uniform noise 67M bf16": (add_noise, [1 << 26], torch.bfloat16, "uniform"),
        "Laplace noise 67M bf16": (add_noise, [1 << 26], torch.bfloat16, "laplace"),
        "noise dot 67M fp32": (dot_noise, 1 << 26, torch.float32),
        "noise dot 67M bf16": (dot_noise, 1 << 26, torch.bfloat16),
        "8 noises GPT-2 fp32": (combine, gpt2(), torch.float32, 8),
        "8 noises GPT-2 bf16": (combine, gpt2(), torch.bfloat16, 8),
        "AdamW ResNet-18 fp32": (optimizer, "AdamW", resnet18(), torch.float32),
        "AdamW GPT-2 fp32": (optimizer, "AdamW", gpt2(), torch.float32),
        "AdamW GPT-2 bf16": (optimizer, "AdamW", gpt2(), torch.bfloat16),
        "SGD GPT-2 fp32": (optimizer, "SGD", gpt2(), torch.float32),
        "regression 1 replica, 1000 steps": (regression, 1, 1000),
        "regression 65536 replicas, 1000 steps": (regression, 65536, 1000),
    }
)


# ---- the report ---------------------------------------------------------------------------------


def measured(case, clock, seconds, copy):
    """A case's row of the report."""
    result = {"title": case.title, "bytes": case.bytes, "missing": case.missing}
    result |= {"notes": case.notes, "cases": {name: {} for name in case.calls}}
    for mode in MODES:
        samplers = {name: clock.sampler(call, mode) for name, call in case.calls.items()}
        for name, facts in summary(in_turns(samplers, seconds)).items():
            result["cases"][name][mode] = facts
    nominal = clock.nominal_bandwidth()
    for facts in result["cases"].values() if case.bytes else ():
        rate = case.bytes / facts["cold"]["seconds"][1]
        facts |= {"bytes_per_second": rate, "of_copy": rate / copy}
        if nominal:
            facts["of_nominal"] = rate / nominal
    return result


def table(report):
    """The report in Markdown."""
    nominal, copy = report["nominal_bandwidth"], report["copy_bandwidth"]
    told = f"{nominal / 1e12:.2f} TB/s" if nominal else "not told by the driver"
    lines = [
        f"# {report['device']}",
        "",
        f"Memory: nominal {told}, a large copy {copy / 1e12:.3f} TB/s. torch {report['torch']}, "
        f"kdkernels for {report['archs'] or 'the CPU'}. Times are medians in microseconds,",
        "ratios to kdkernels' time are medians over the rounds, with quartiles; shares are of the",
        "fewest bytes that the op must move, at the cold time."
        + (f" No tensor has more than {report['elements']} elements." * bool(report["elements"])),
        "",
        "| op | | cold | ratio | of nominal | of the copy | warm | ratio | loop | ratio |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for result in report["results"]:
        title = result["title"]
        for name, facts in result["cases"].items():
            cells = [title, name]
            for mode in MODES:
                low, middle, high = facts[mode]["times"]
                cells.append(f"{1e6 * facts[mode]['seconds'][1]:.1f}")
                cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})" if name != OURS else "")
                if mode == "cold":
                    cells += [percent(facts.get("of_nominal")), percent(facts.get("of_copy"))]
            lines.append("| " + " | ".join(cells) + " |")
            title = ""
    notes = [note for result in report["results"] for note in result["notes"]]
    reasons = {}
    for result in report["results"]:
        for name, reason in result["missing"].items():
            reasons.setdefault(f"{name}: {reason}", []).append(result["title"])
    notes += [f"{reason} ({len(titles)} rows)" for reason, titles in reasons.items()]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes), ""])


def percent(share):
    return "" if share is None else f"{100 * share:.0f} %"


def plot(report, path):
    """Share of the memory's bandwidth at the cold time, a group of bars an op."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    key = "of_nominal" if report["nominal_bandwidth"] else "of_copy"
    results = [result for result in report["results"] if result["bytes"]]
    names = list(dict.fromkeys(name for result in results for name in result["cases"]))
    colors = dict(zip(names, pyplot.get_cmap("tab10").colors, strict=False))
    figure, axes = pyplot.subplots(
        figsize=(9, 1.5 + 0.14 * sum(len(result["cases"]) + 1 for result in results))
    )
    place, ticks = 0, []
    for result in results:
        top = place
        for name, facts in result["cases"].items():
            axes.barh(place, 100 * facts[key], color=colors[name], height=0.9)
            place += 1
        ticks.append(((top + place - 1) / 2, result["title"]))
        place += 1
    if key == "of_nominal":
        peak = 100 * report["copy_bandwidth"] / report["nominal_bandwidth"]
        axes.axvline(peak, color="black", linewidth=0.8, linestyle=":")
    axes.set_yticks([at for at, _ in ticks], [title for _, title in ticks], fontsize=7)
    axes.set_ylim(place, -1)
    whose = (
        "the nominal bandwidth (dotted: a large copy)" if key == "of_nominal" else "a large copy"
    )
    axes.set_xlabel(f"fewest bytes / cold time, percent of {whose}")
    axes.set_title(report["device"])
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colors[name]) for name in names]
    axes.legend(handles, names, fontsize=7, loc="lower right")
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--only", default="", metavar="REGEX", help="of the ops' titles")
    parser.add_argument("--peers", nargs="+", help="beside kdkernels; default all there are")
    parser.add_argument("--seconds", type=float, default=1.0, help="a row and mode; default 1")
    parser.add_argument("--elements", type=int, help="a tensor at most; on the CPU 65536")
    parser.add_argument("--flush", type=int, metavar="MIB", help="default twice the L2 cache")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA GPU here; --device cpu tries the benchmark without one")
    elements = options.elements or (1 << 16 if options.device == "cpu" else None)

    clock = (CudaClock if options.device == "cuda" else CpuClock)(options.flush)
    copy = copy_bandwidth(clock, options.device, elements)
    report = {
        "device": clock.name,
        "nominal_bandwidth": clock.nominal_bandwidth(),
        "copy_bandwidth": copy,
        "elements": elements,
        "torch": torch.__version__,
        "archs": kdkernels._C.build_info()["cuda_archs"],
        "results": [],
    }
    for title, (fill, *size) in CASES.items():
        if not re.search(options.only, title):
            continue
        torch._dynamo.reset()
        case = Case(title, options.device, options.peers)
        try:
            fill(case, elements, *size)
            result = measured(case, clock, options.seconds, copy)
        except torch.OutOfMemoryError:
            print(f"{title}: does not fit this device's memory", flush=True)
            continue
        report["results"].append(result)
        print(f"{title}: {1e6 * result['cases'][OURS]['cold']['seconds'][1]:.1f} us", flush=True)

    options.out.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", clock.name.lower()).strip("-")
    path = options.out / f"gpu-{slug}"
    path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(report))
    written = ["json", "md"]
    try:
        plot(report, path.with_suffix(".png"))
        written.append("png")
    except ImportError as error:
        print(f"no plot: {error}")
    print("\n" + table(report) + f"\nwritten: {path}.{{{','.join(written)}}}")


if __name__ == "__main__":
    main()
