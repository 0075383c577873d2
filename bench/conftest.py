"""What the benchmarks share: ratios that a busy machine does not move, and the table of them.

pytest-benchmark times one case after another, so whatever else the machine does in between stands
in its ratios. `compare` times the cases in turns, a short sample of each in every round, and takes
the quartiles of the rounds' own ratios.
"""

import gc
import os
import statistics
import time

import pytest
import torch

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler's notes on GPUs that are not there
SAMPLE_SECONDS = (
    0.02  # of calls in a row, so that the clock and the caches' first miss do not count
)
COMPARE_SECONDS = 15  # for all rounds of one comparison
TABLE = pytest.StashKey[list]()


def pytest_configure(config):
    config.stash[TABLE] = []


def pytest_collect_file(file_path, parent):
    if file_path.match("bench_*.py") and not parent.session.isinitpath(file_path):
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def timed(call, loops):
    start = time.perf_counter()
    for _ in range(loops):
        call()
    return (time.perf_counter() - start) / loops


def take_turns(calls):
    """{name: seconds a call, in each round}; a round has a sample of every case."""
    loops = {}
    for name, call in calls.items():
        timed(call, 2)
        loops[name] = max(1, round(SAMPLE_SECONDS / timed(call, 2)))
    seconds = {name: [] for name in calls}
    names = list(calls)
    collecting = gc.isenabled()
    gc.disable()
    end = time.perf_counter() + COMPARE_SECONDS
    while len(seconds[names[0]]) < 5 or (
        time.perf_counter() < end and len(seconds[names[0]]) < 101
    ):
        for name in names:
            seconds[name].append(timed(calls[name], loops[name]))
        names.append(names.pop(0))  # nobody always runs after the same neighbour
    if collecting:
        gc.enable()
    return seconds


def allocations(call):
    """How often a call asks PyTorch's CPU allocator for memory, and for how many bytes in all."""
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return sum(size > 0 for size in sizes), sum(size for size in sizes if size > 0)


@pytest.fixture
def compare(benchmark, request):
    """compare(title, {case: call}): how often each case fits into the first one's time.

    The case "copy" moves the bytes that the others must move, and no more: the memory's limit.
    """

    def run(title, calls):
        benchmark.group = title
        seconds = take_turns(calls)
        base = next(iter(calls))
        for name, own in seconds.items():
            ratios = [b / o for b, o in zip(seconds[base], own, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            of_copy = statistics.median(c / o for c, o in zip(seconds["copy"], own, strict=True))
            microseconds = 1e6 * statistics.median(own)
            count, allocated = allocations(calls[name])
            row = (title, name, microseconds, low, middle, high, 100 * of_copy, count, allocated)
            request.config.stash[TABLE].append(row)
            benchmark.extra_info[name] = {
                "microseconds": microseconds,
                f"times faster than {base} (quartiles)": [low, middle, high],
                "share of the memory limit": of_copy,
                "rounds": len(own),
                "allocations": count,
                "bytes allocated": allocated,
            }
        # pytest-benchmark keeps extra_info only beside a timing of its own.
        benchmark.pedantic(calls["fused"], rounds=3)

    return run


def pytest_terminal_summary(terminalreporter, config):
    table = config.stash[TABLE]
    if not table:
        return
    terminalreporter.section("cases in turns")
    line = terminalreporter.write_line
    head = f"{'':34}{'case':22}{'time':>12}{'faster':>10}   {'quartiles':16}{'of the copy':>12}"
    line(f"{head}{'allocations':>13}")
    for title, name, us, low, middle, high, share, count, allocated in table:
        quartiles = f"{low:.2f} to {high:.2f}"
        shown = title if name == "eager" else ""
        row = f"{shown:34}{name:22}{us:9.1f} us{middle:9.2f}x   {quartiles:16}{share:10.0f} %"
        line(f"{row}{count:7} {allocated / 2**20:9.1f} MiB")
    line("faster: than eager, the median of the rounds' ratios. Of the copy: of the speed of a")
    line("plain copy that moves as many bytes as the fused kernel must. Load averages were")
    line(f"{os.getloadavg()}: beside other work whoever has more parallel loops loses more.")
