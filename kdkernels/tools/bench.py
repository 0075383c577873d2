"""How fast kdkernels is: what bench/ and ``python -m kdkernels bench --quick`` measure with.

**In turns.** Whatever else a machine does must not decide who is faster. So all cases of a
comparison are timed in rounds: in each round every case has one short sample of calls in a row, in
an order that is drawn anew. Before that each was checked against the formula and called until it
was warm. Python's garbage collector is off, and all use the same number of threads.

**Ratios** are of the same round: a clock that slows down slows both. What is reported is the median
over the rounds, with a 95 % confidence interval between two of the rounds' own values: those that a
median lies between with that probability, whatever the distribution, since each round is as likely
above the true median as below. (A bootstrap of the median has 87 % where it says 95 % for the seven
rounds that slow cases get.) It takes rounds as independent; of seven or fewer it is their range.

**The limit** of the memory, or of the cache where so many bytes fit one, is a triad, c = a + 3 b on
three existing arrays that hold together as many bytes as the op must move at least, measured in the
same rounds. GB/s are of those bytes too: what a case moves beyond them does not count for it. A
processor reads the lines of c before it writes them, which an op that writes where it reads is
spared: such an op can be faster than the triad.
"""

import contextlib
import datetime
import functools
import gc
import importlib
import itertools
import json
import math
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import kdkernels
from kdkernels import info
from kdkernels.info import disturbed
from kdkernels.tools.settings import Bench

OURS = "kdkernels"
SAMPLE_SECONDS = 0.02
"""Of calls in a row, so that the clock and what the last case left in the caches do not count."""

MAX_ROUNDS = 101
LIMITS = ("memcpy", "triad")
"""Cases that do less than the op: what the machine allows."""

COPIES_BYTES = 1 << 26
"""Of logits that calls in a row overwrite, each its own, as far as these bytes last."""


# ---- statistics ----------------------------------------------------------------------------------


def interval(values: list[float]) -> tuple[float, float, float]:
    """The median and its 95 % confidence interval from order statistics: see the module."""
    ordered, count = sorted(map(float, values)), len(values)
    outside, left = 0, 2.0**-count  # left: the probability that so many lie below the true median
    while left + math.comb(count, outside + 1) * 2.0**-count <= 0.025:
        outside += 1
        left += math.comb(count, outside) * 2.0**-count
    return statistics.median(ordered), ordered[outside], ordered[-1 - outside]


def ratio(result: dict, over: str, under: str) -> tuple[float, float, float]:
    """How many times as long as ``under`` the case ``over`` takes: see :func:`interval`."""
    pair = (result["cases"][name]["seconds"] for name in (over, under))
    return interval([a / b for a, b in zip(*pair, strict=True)])


def summary(rounds: dict[str, list[float]], bytes: int = 0) -> dict[str, dict[str, Any]]:
    """What the rounds say of each case.

    Args:
        rounds: case -> seconds of a call in each round; the first case is the one compared with.
        bytes: the fewest that a call must move; 0: no rates.

    Returns:
        Case -> ``seconds`` (all of them, in the rounds' order), ``median``, ``quartiles``,
        ``faster`` (than the first case: median, ends of the interval) and, where there are bytes,
        ``bytes_per_second`` and ``of_triad`` (the share of its speed: median, ends).
    """
    kept = {name: [float(f"{s:.5g}") for s in own] for name, own in rounds.items()}
    cases: dict[str, dict[str, Any]] = {name: {"seconds": own} for name, own in kept.items()}
    base = next(iter(cases))
    for name, case in cases.items():
        low, median, high = np.quantile(case["seconds"], (0.25, 0.5, 0.75)).tolist()
        case |= {"median": median, "quartiles": [low, high]}
        case["faster"] = ratio({"cases": cases}, base, name)
        if bytes:
            case["bytes_per_second"] = bytes / median
            case["of_triad"] = ratio({"cases": cases}, "triad", name)
    return cases


# ---- measuring -----------------------------------------------------------------------------------


def _timed(call, loops):
    start = time.perf_counter()
    for _ in range(loops):
        call()
    return (time.perf_counter() - start) / loops


def take_turns(
    calls: dict[str, Callable],
    seconds: float,
    least: int = 7,
    before: dict[str, tuple[Callable, int]] | None = None,
) -> dict[str, list[float]]:
    """Time calls in turns; see the module.

    Args:
        calls: case -> what is timed.
        seconds: until no new round begins.
        least: rounds, however long they take.
        before: case -> what is called before each of its samples, and how many calls at most one
            then has.

    Returns:
        Case -> seconds of a call in each round.
    """
    loops, before = {}, before or {}
    for name, call in calls.items():
        prepare, most = before.get(name, (lambda: None, sys.maxsize))
        call()
        prepare()
        once = _timed(call, 1)
        if once < SAMPLE_SECONDS:  # the first calls in a row are slower than those after them
            prepare()
            once = _timed(call, min(most, max(1, int(SAMPLE_SECONDS / once / 4))))
        loops[name] = min(most, max(1, round(SAMPLE_SECONDS / once)))
    rounds = {name: [] for name in calls}
    names, random = list(calls), np.random.default_rng(0)
    collecting = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        for done in range(MAX_ROUNDS):
            if done >= least and time.perf_counter() > end:
                break
            for name in random.permutation(names).tolist():
                if name in before:
                    before[name][0]()
                rounds[name].append(_timed(calls[name], loops[name]))
    finally:
        if collecting:
            gc.enable()
    return rounds


@contextlib.contextmanager
def _silent_stderr():
    """The profiler's C++ has notes on starting, stopping and GPUs that are not there."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def allocations(call: Callable) -> tuple[int, int]:
    """How often a call asks PyTorch's CPU allocator for memory, and for how many bytes in all."""
    cpu = torch.profiler.ProfilerActivity.CPU
    with _silent_stderr(), torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        call()
    profiler: Any = profile.profiler
    events = profiler.kineto_results.events()
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return sum(size > 0 for size in sizes), sum(size for size in sizes if size > 0)


def triad(bytes: int) -> Callable:
    """A call of c = a + 3 b on fp32 arrays that hold so many bytes together (McCalpin's STREAM)."""
    a, b, c = (torch.ones(max(1, bytes // 12)) for _ in range(3))
    return lambda: torch.add(a, b, alpha=3.0, out=c)


def memcpy(tensors: list[Tensor]) -> Callable:
    """A call that copies them all into existing memory."""
    targets = [torch.empty_like(x) for x in tensors]

    def copy():
        for x, y in zip(tensors, targets, strict=True):
            y.copy_(x)

    return copy


class Comparison:
    """One op on one input, and everybody who does it.

    Attributes:
        title: over its table.
        check: ``check(call)`` raises AssertionError where what a case gives is wrong.
        bytes: the fewest that a call must move; 0 where memory is not what limits the op. Where
            there are any, :func:`measure` adds a triad.
        growth: the plot that this is a point of, its axis and the value there; None: of none.
        calls: case -> call; the first is the one that the others are compared with.
        per: case -> how many units of work a call does, where it is not one.
        before: case -> what is called before a sample of it, where a call needs what others spoilt,
            and the calls of one at most.
        missing: case -> why it could not take part.
        inputs: for those who add peers.
    """

    def __init__(
        self,
        title: str,
        check: Callable[[Callable], object] | None,
        *,
        bytes: int = 0,
        growth=None,
        **inputs,
    ):
        self.title, self.check, self.bytes, self.growth = title, check, bytes, growth
        self.calls, self.per, self.before, self.missing = {}, {}, {}, {}
        self.inputs = inputs

    def add(
        self,
        name: str,
        call: Callable,
        *,
        check: bool | Callable = True,
        per: int = 1,
        before: tuple[Callable, int] | None = None,
    ) -> None:
        """Let a case take part; the names of kdkernels' begin with ``OURS``.

        Args:
            check: in place of the comparison's; False where ``call`` is not the op, but a limit.
            per: the units of work in a call: times are of one.
            before: what is called before each sample, and how many calls at most a sample has.
        """
        checks = self.check if check is True else check
        if checks:
            checks(call)
        self.calls[name] = call
        self.per[name] = per
        if before is not None:
            self.before[name] = before

    def add_peer(self, name: str, module: str, make: Callable) -> None:
        """Let a package take part where it can be imported: ``make(module)`` gives its call."""
        try:
            found = importlib.import_module(module)
        except (ImportError, RuntimeError) as error:
            self.missing[name] = f"cannot be imported ({str(error).splitlines()[0]})"
            return
        self.add(name, make(found))


def measure(comparison: Comparison, seconds: float = 8.0, least: int = 7) -> dict:
    """Time a comparison's cases in turns.

    Args:
        seconds: for all rounds together; a round that has begun is finished.
        least: rounds, however long they take.

    Returns:
        What goes to JSON: the comparison's ``title``, ``bytes``, ``growth`` and ``missing``, when
        it began (``date``), ``threads``, the ``load`` average before and after, the share of the
        processors' time that ``others`` took (None where the system does not tell), and ``cases``:
        as of :func:`summary`, with ``allocations`` and ``allocated`` bytes of one call.
    """
    calls = dict(comparison.calls)
    if comparison.bytes:
        calls["triad"] = triad(comparison.bytes)
    # Peers first, then ours, then the machine's limits; the first one stays.
    base, *others = calls
    others.sort(key=lambda name: 2 * (name in LIMITS) + name.startswith(OURS))
    calls = {name: calls[name] for name in (base, *others)}
    threads, load = torch.get_num_threads(), os.getloadavg()[0]
    began = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    watch = info.Others()
    rounds = take_turns(calls, seconds, least, comparison.before)
    others = watch.share()
    if torch.get_num_threads() != threads:
        raise RuntimeError(f"{comparison.title}: a case has changed the number of threads")
    cases = summary(
        {n: [s / comparison.per.get(n, 1) for s in own] for n, own in rounds.items()},
        comparison.bytes,
    )
    for name, case in cases.items():
        case["allocations"], case["allocated"] = allocations(calls[name])
    return {
        "title": comparison.title, "bytes": comparison.bytes, "growth": comparison.growth,
        "missing": comparison.missing, "date": began, "threads": threads,
        "load": [load, os.getloadavg()[0]], "others": others, "cases": cases,
    }  # fmt: skip


# ---- what was measured, and on what --------------------------------------------------------------


def machine() -> dict:
    """Processor, cores, instruction set level in use, threads, versions, the memory's triad."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.*)$", cpuinfo.read_text(), re.MULTILINE)
        name = found[1] if found else name
    facts = info.collect()
    size = 3 << 27
    call = triad(size)
    call()
    return {
        "processor": name, "cores": os.cpu_count(), "isa": facts["isa"],
        "threads": facts["threads"], "kdkernels": facts["kdkernels"], "torch": facts["torch"],
        "numpy": np.__version__, "python": facts["python"], "compiler": facts["compiler"],
        "system": platform.platform(),
        "triad_bytes_per_second": size / min(_timed(call, 1) for _ in range(9)),
    }  # fmt: skip


def slug(machine: dict) -> str:
    """A file's name for a machine: ``amd-epyc-2-cores``."""
    text = f"{machine['processor']} {machine['cores']} cores".lower()
    text = re.sub(r"\(r\)|\(tm\)|\bcpu\b|@.*ghz", " ", text)
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")


def record(machine: dict, results: list[dict]) -> dict:
    """Everything, ready for JSON."""
    loads = [load for result in results for load in result["load"]]
    return {
        "machine": machine,
        "date": results[0]["date"] if results else None,
        "load": [loads[0], loads[-1]] if loads else None,
        "results": results,
    }


def duration(seconds: float, also: tuple[float, ...] = ()) -> str:
    """``12.3 ms``; with more durations ``12.3 to 14.5 ms``, in the unit of the first."""
    unit, size = next(
        ((u, s) for u, s in (("s", 1), ("ms", 1e-3), ("µs", 1e-6)) if seconds >= s), ("ns", 1e-9)
    )
    shown = (
        f"{s / size:.0f}" if s >= 99.95 * size else f"{s / size:.3g}" for s in (seconds, *also)
    )
    return f"{' to '.join(shown)} {unit}"


def times(value: float) -> str:
    """A ratio with three digits that count."""
    return f"{value:.0f}" if value >= 99.5 else f"{value:.1f}" if value >= 9.95 else f"{value:.2f}"


HEAD = (
    f"{'':37}{'median':>8}  {'quartiles':21}{'times faster':12} {'(95 % interval)':17}{'GB/s':>6}"
    f"{'of triad':>10}{'allocations':>22}"
)


def lines(result: dict) -> list[str]:
    """A result as lines of a terminal, below ``HEAD``."""
    shown = [" ".join(filter(None, (result["title"], disturbed(result["others"]))))]
    for number, (name, case) in enumerate(result["cases"].items()):
        middle, low, high = case["faster"]
        line = f"  {name:34}{duration(case['median']):>9}  "
        line += f"{duration(case['quartiles'][0], case['quartiles'][1:]):21}"
        line += f"{times(middle):>8}     ({times(low)} to {times(high)})".ljust(30) * bool(number)
        line = line.ljust(97)
        if result["bytes"]:
            line += f"{case['bytes_per_second'] / 1e9:6.1f}{case['of_triad'][0]:9.0%} "
        mib = case["allocated"] / 2**20
        line = line.ljust(113) + f"{case['allocations']:8}" + f"{mib:10.1f} MiB" * (mib >= 0.05)
        shown.append(line.rstrip())
    shown += [f"  {name}: {why}" for name, why in result["missing"].items()]
    return shown


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
        rows: rows.
        classes: classes of a row.
        gap: standard deviation of the student's logits less the teacher's. Infinite: the student's
            are independent of the teacher's, and as peaked.
        dtype: of the logits, which are drawn in fp32, or in fp64 for fp64.
        prompts: share of the rows that do not count; these come first, and are labelled
            :data:`IGNORED`.
        seed: another seed draws other logits.
        device: where they are.

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


class _Dense:
    """A dense loss: its inputs, our call of it, and what calls must give."""

    def __init__(self, rows, classes, dtype, divergence, labels, prompts, temperature):
        self.rows, self.classes, self.dtype, self.labels = rows, classes, dtype, labels
        self.prompts = prompts
        self.options = {
            "temperature": temperature or (3.0 if labels else 2.0),
            "alpha": 0.5 if labels else None,
            "divergence": divergence,
        }

    def inputs(self, gap):
        """Student (a leaf), teacher, labels or None."""
        z, t, labels = training_logits(
            self.rows, self.classes, gap, dtype=self.dtype, prompts=self.prompts
        )
        return z.requires_grad_(), t, labels if self.labels else None

    def eager(self, z, t, labels):
        if not self.prompts:
            return backward(plain_loss(z, t, labels, **self.options), z)
        counts = labels != IGNORED
        return backward(plain_loss(z[counts], t[counts], labels[counts], **self.options), z)

    def fused(self, z, t, labels, inplace=False):
        loss = kdkernels.distillation_loss(z, t, labels, inplace=inplace, **self.options)
        return backward(loss, z)

    def checks(self, z, t, labels, outputs):
        """(a check of ours, one of others): PyTorch's sums over long, peaked rows are right to
        1e-3 in fp32.
        """
        exact = z.detach().double().requires_grad_()
        loss: Any = kdkernels.reference.distillation_loss(exact, t.double(), labels, **self.options)
        want = backward(loss, exact)

        def check(call, tolerance):
            restore(z, outputs)
            for got, right, scale in zip(call(), want, (1, 1 / self.rows), strict=True):
                torch.testing.assert_close(
                    got.double(), right, rtol=tolerance, atol=tolerance * scale
                )

        tolerances = (1e-4, 1e-2) if self.dtype == torch.float32 else (2e-2, 0.1)
        return [functools.partial(check, tolerance=tolerance) for tolerance in tolerances]


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
    op = _Dense(rows, classes, dtype, divergence, labels, prompts, temperature)
    z, t, hard = given = op.inputs(math.inf)
    output = z * 1
    ours, others = op.checks(*given, [output])
    title = f"{divergence} {rows}x{classes} {short(dtype)}{', labels' * labels}"
    title += f", {prompts:.0%} prompts" * bool(prompts)
    options = (hard, *(op.options[name] for name in ("temperature", "alpha", "divergence")))
    found = Comparison(
        title, others, bytes=round((3 - 2 * prompts) * t.nbytes), growth=growth,
        z=z, t=t, options=options,
    )  # fmt: skip
    found.add("eager", lambda: op.eager(*given))
    found.add(OURS, lambda: op.fused(*given), check=ours)
    # From the second call on the logits are what the last call wrote, which is as far.
    found.add(f"{OURS} in place", lambda: op.fused(output, t, hard, True), check=ours)
    for gap in gaps:
        student, teacher, label = op.inputs(gap)
        copies = [student * 1 for _ in range(max(1, min(1000, COPIES_BYTES // student.nbytes)))]
        turns = itertools.cycle(copies)
        found.add(
            f"{OURS} in place, gap {gap:g}",
            lambda turns=turns, t=teacher, y=label: op.fused(next(turns), t, y, True),
            check=op.checks(student, teacher, label, copies)[0],
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
        f"noise on {name} {short(dtype)}", check, bytes=2 * sum(x.nbytes for x in tensors),
        growth=growth, tensors=tensors, std=std,
    )  # fmt: skip
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


# ---- a table for one's own machine ---------------------------------------------------------------


def _quick(largest: int | None) -> Iterator[Comparison]:
    def rows(n, classes):
        return max(1, min(n, (largest or n * classes) // classes))

    def elements(sizes):
        return [min(n, largest or n) for n in sizes]

    near: dict[str, Any] = {"gaps": (0.1,)}
    yield dense(rows(512, 32000), 32000, **near)
    yield dense(rows(512, 32000), 32000, torch.bfloat16, **near)
    yield dense(rows(128, 1000), 1000, **near)
    yield dense(64, 10, **near)
    yield dense(rows(128, 32000), 32000, divergence="js", **near)
    yield top_k(rows(64, 128256), 128256, 64)
    yield noise("20M elements", elements([20_000_000]))
    yield noise("ResNet-18's 62 tensors", elements(resnet18()))
    yield optimizer("AdamW", "ResNet-18", elements(resnet18()))
    yield experiment_1(steps=10 if largest else 1000)


def quick(
    threads: int | None = None,
    path: str | None = None,
    *,
    seconds: float = 3.0,
    largest: int | None = None,
    out: Callable[[str], None] = print,
) -> dict:
    """Measure what people use most, beside eager PyTorch and the memory's limit: a minute.

    Args:
        threads: for all cases; torch's choice by default.
        path: of a JSON file for everything that was measured.
        seconds: for each comparison's rounds.
        largest: elements that a tensor may have, for a quick look at whether all of it runs.
        out: told each line.
    """
    before = torch.get_num_threads()
    file = open(path, "a") if path else None  # noqa: SIM115  an unwritable one fails before the work
    torch.set_num_threads(threads or before)
    results = []
    try:
        facts = machine()
        out(
            f"{facts['processor']}, {facts['cores']} cores; kernels use {facts['isa']}; "
            f"{facts['threads']} threads; torch {facts['torch']}, kdkernels {facts['kdkernels']}; "
            f"memory (triad) {facts['triad_bytes_per_second'] / 1e9:.1f} GB/s"
        )
        out(f"\n{HEAD}")
        for comparison in _quick(largest):
            if sys.stderr.isatty():
                print(f"\r{comparison.title} ...\r", end="", file=sys.stderr, flush=True)
            results.append(measure(comparison, seconds, least=6))
            out("\n".join(lines(results[-1])))
        found = record(facts, results)
        out(
            "\nTimes are of loss and gradient, or of one step. Faster: than the first line, median "
            "of the rounds' ratios.\nOf triad: share of the speed at which c = a + 3 b moves the "
            "fewest bytes that the op must move.\nLoad average {:.2f} before, {:.2f} after: beside "
            "other work, who has more parallel loops loses more.".format(*found["load"])
        )
        if torch.cuda.is_available():
            out("On the GPU: `make gpu-bench` in kdkernels' source folder.")
        if file:
            file.truncate(0)
            json.dump(found, file, indent=1)
        return found
    finally:
        torch.set_num_threads(before)
        if file:
            file.close()


def command(_: str, given: dict[str, Any]) -> int:
    """``kdkernels bench``."""
    settings = Bench(**given)
    if not settings.quick:
        print(
            "kdkernels bench: give --quick for a table in a minute; the whole suite is "
            "`make bench` in kdkernels' source folder",
            file=sys.stderr,
        )
        return 2
    try:
        quick(settings.threads, settings.json)
    except OSError as error:
        print(f"kdkernels bench: cannot write {settings.json}: {error.strerror}", file=sys.stderr)
        return 2
    return 0
