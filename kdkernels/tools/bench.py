"""``kdkernels bench``: a table of what people use most, for one's own machine."""

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from kdkernels import measuring
from kdkernels.tools import comparisons
from kdkernels.tools.settings import Bench


def _quick(largest: int | None) -> Iterator[measuring.Comparison]:
    def rows(n, classes):
        return max(1, min(n, (largest or n * classes) // classes))

    def elements(sizes):
        return [min(n, largest or n) for n in sizes]

    near: dict[str, Any] = {"gaps": (0.1,)}
    yield comparisons.dense(rows(512, 32000), 32000, **near)
    yield comparisons.dense(rows(512, 32000), 32000, torch.bfloat16, **near)
    yield comparisons.dense(rows(128, 1000), 1000, **near)
    yield comparisons.dense(64, 10, **near)
    yield comparisons.dense(rows(128, 32000), 32000, divergence="js", **near)
    yield comparisons.top_k(rows(64, 128256), 128256, 64)
    yield comparisons.noise("20M elements", elements([20_000_000]))
    yield comparisons.noise("ResNet-18's 62 tensors", elements(comparisons.resnet18()))
    yield comparisons.optimizer("AdamW", "ResNet-18", elements(comparisons.resnet18()))
    yield comparisons.experiment_1(steps=10 if largest else 1000)


def quick(
    threads: int | None = None,
    path: str | None = None,
    *,
    seconds: float = 3.0,
    largest: int | None = None,
    out: Callable[[str], None] = print,
) -> dict:
    """Measure what people use most, beside eager PyTorch and the memory's limit: a minute.

    ``path``: of a JSON file for everything that was measured. ``seconds``: for each comparison's
    rounds. ``largest``: elements that a tensor may have, for a quick look at whether all of it
    runs. ``out`` is called with each line.
    """
    before = torch.get_num_threads()
    file = open(path, "a") if path else None  # noqa: SIM115  an unwritable one fails before the work
    torch.set_num_threads(threads or before)
    results = []
    try:
        facts = measuring.machine()
        out(
            f"{facts['processor']}, {facts['cores']} cores; kernels use {facts['isa']}; "
            f"{facts['threads']} threads; torch {facts['torch']}, kdkernels {facts['kdkernels']}; "
            f"memory (triad) {facts['triad_bytes_per_second'] / 1e9:.1f} GB/s"
        )
        out(f"\n{measuring.HEAD}")
        for comparison in _quick(largest):
            if sys.stderr.isatty():
                print(f"\r{comparison.title} ...\r", end="", file=sys.stderr, flush=True)
            results.append(measuring.measure(comparison, seconds, least=6))
            out("\n".join(measuring.lines(results[-1])))
        found = measuring.record(facts, results)
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
