"""What the benchmarks share: their options, the fixture `compare`, and what a run leaves behind.

How a comparison is measured is in kdkernels/measuring.py, what its page looks like in
report.py.
"""

import importlib.metadata
import os
from pathlib import Path

import pytest
import torch

from bench import report
from kdkernels import measuring

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    # Its workers start in the background, which is where the first comparisons are timed.
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}
PEERS = ("trl", "liger-kernel", "torchdistill", "opacus")
FOLDER = Path(__file__).parent / "results"
RESULTS, MACHINE = pytest.StashKey[list](), pytest.StashKey[dict]()


def pytest_addoption(parser):
    group = parser.getgroup("kdkernels")
    group.addoption("--full", action="store_true", help="all sizes, not the main ones alone")
    group.addoption(
        "--compare-seconds", type=float, default=7.0, metavar="S", help="a comparison; default 7"
    )
    group.addoption(
        "--threads", type=int, metavar="N", help="for all cases; default torch's choice"
    )
    group.addoption(
        "--add", action="store_true", help="to the machine's file instead of beginning a new one"
    )
    group.addoption("--results", type=Path, default=FOLDER, help=f"folder, default {FOLDER}")


def pytest_configure(config):
    config.addinivalue_line("markers", "full: only with --full")
    config.stash[RESULTS] = []


def pytest_collect_file(file_path, parent):
    if file_path.match("bench_*.py") and not parent.session.isinitpath(file_path):
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--full"):
        items[:] = [item for item in items if "full" not in item.keywords]


@pytest.fixture(scope="session", autouse=True)
def machine(request):
    if request.config.getoption("--threads"):
        torch.set_num_threads(request.config.getoption("--threads"))
    installed = {found.name.lower() for found in importlib.metadata.distributions()}
    peers = {n: importlib.metadata.version(n) for n in PEERS if n.replace("-", "_") in installed}
    request.config.stash[MACHINE] = measuring.machine() | {"peers": peers}


@pytest.fixture
def compare(benchmark, request):
    """compare(comparison): measure it; its result goes into the report and to pytest-benchmark."""

    def run(comparison):
        result = measuring.measure(comparison, request.config.getoption("--compare-seconds"))
        result = report.kept(result | {"suite": request.path.stem.removeprefix("bench_")})
        request.config.stash[RESULTS].append(result)
        benchmark.group = comparison.title
        for name, case in result["cases"].items():
            benchmark.extra_info[name] = case
        # pytest-benchmark keeps extra_info only beside a timing of its own.
        ours = [name for name in comparison.calls if name.startswith(measuring.OURS)]
        benchmark.pedantic(comparison.calls[ours[-1]], rounds=3)
        torch._dynamo.reset()

    return run


def pytest_terminal_summary(terminalreporter, config):
    results = config.stash[RESULTS]
    if not results:
        return
    terminalreporter.section("cases in turns")
    line = terminalreporter.write_line
    line(measuring.HEAD)
    for result in results:
        for text in measuring.lines(result):
            line(text)
    record = measuring.record(config.stash[MACHINE], results)
    for text in report.goal_lines(record):
        line(text)
    files = report.write(record, config.getoption("--results"), config.getoption("--add"))
    line("written: " + ", ".join(str(file) for file in files))
