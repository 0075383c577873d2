"""How fast kdkernels is: what bench/ and ``kdkernels bench --quick`` measure with.

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
import gc
import importlib
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdkernels import info
from kdkernels.info import disturbed

OURS = "kdkernels"
SAMPLE_SECONDS = 0.02
"""The length of a sample, so that the clock and the last case's caches do not count."""

MAX_ROUNDS = 101
LIMITS = ("memcpy", "triad")
"""Cases that do less than the op: what the machine allows."""

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
    """What the rounds say of each case, the first of which the others are compared with.

    Args:
        rounds: case -> seconds of a call in each round.
        bytes: the fewest that a call must move; 0: no rates.

    Returns:
        Case -> ``seconds`` (in the rounds' order), ``median``, ``quartiles``, ``faster`` (than the
        first
        case: median, ends of the interval) and, where there are bytes, ``bytes_per_second`` and
        ``of_triad`` (the share of its speed: median, ends).
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
    calls: dict[Any, Callable],
    seconds: float,
    least: int = 7,
    before: dict[Any, tuple[Callable, int]] | None = None,
) -> dict[Any, list[float]]:
    """Time calls in turns; see the module. Gives case -> seconds of a call in each round.

    ``calls``: case -> what is timed. No new round begins after so many ``seconds``, but there are
    at ``least`` so many. ``before``: case -> what is called before each of its samples, and how
    many calls a sample then has at most.
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
        for done in range(max(MAX_ROUNDS, least)):
            if done >= least and time.perf_counter() > end:
                break
            for name in map(names.__getitem__, random.permutation(len(names))):
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
    """One op on one input, and all implementations of it that are timed.

    Attributes:
        title: over its table.
        check: ``check(call)`` raises AssertionError where a case's result is wrong.
        bytes: the fewest that a call must move, for which :func:`measure` adds a triad; 0 where
            memory is not what limits the op.
        growth: the plot that this is a point of, its axis and the value there; None: of none.
        calls: case -> call; the first is the one that the others are compared with.
        per: case -> how many units of work a call does, where it is not one.
        before: as :func:`take_turns` has it, where a call needs what others overwrite.
        missing: case -> why it could not take part.
        inputs: for peers that are added.
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

        ``check``: in place of the comparison's; False where ``call`` is not the op, but a limit.
        ``per`` and ``before`` are the comparison's of this case.
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
    """Time a comparison's cases in turns, as :func:`take_turns` does.

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
        "title": comparison.title,
        "bytes": comparison.bytes,
        "growth": comparison.growth,
        "missing": comparison.missing,
        "date": began,
        "threads": threads,
        "load": [load, os.getloadavg()[0]],
        "others": others,
        "cases": cases,
    }


# ---- what was measured, and on what --------------------------------------------------------------


def machine() -> dict:
    """Processor, cores, instruction set level in use, threads, versions, the memory's triad."""
    facts = info.collect()
    size = 3 << 27
    call = triad(size)
    call()
    return {
        "processor": info.processor(),
        "cores": os.cpu_count(),
        "isa": facts["isa"],
        "threads": facts["threads"],
        "kdkernels": facts["kdkernels"],
        "torch": facts["torch"],
        "numpy": np.__version__,
        "python": facts["python"],
        "compiler": facts["compiler"],
        "system": platform.platform(),
        "triad_bytes_per_second": size / min(_timed(call, 1) for _ in range(9)),
    }


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
