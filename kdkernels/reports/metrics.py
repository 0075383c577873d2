"""What the lines of metrics.jsonl say of learners: losses, epochs, seconds, speed-ups."""

import statistics
from typing import Any

from kdkernels.train.loop import PHASES
from kdkernels.train.run_folder import RunFolder

SPEEDUP_RANGE = "{epoch_speedup_range[0]:.2f} .. {epoch_speedup_range[1]:.2f}"
BY_EPOCH = {"by epoch: median (range)": "{epoch_speedup:.2f} (" + SPEEDUP_RANGE + ")"}
"""The column of what :func:`speedups` found."""


def curves_of(folder: RunFolder) -> tuple[dict[str, list[float]], dict[str, list[dict]], list]:
    """Learner -> its loss of each step, learner -> its epochs' lines, and the twins' losses."""
    losses, epochs, twins = {}, {}, []
    for line in folder.metrics():
        if line["kind"] == "step":
            losses.setdefault(line["learner"], []).append(float(line["loss"]))
            twins += [line["twin"]] if "twin" in line else []
        elif line["kind"] == "epoch":
            epochs.setdefault(line["learner"], []).append(line)
    return losses, epochs, twins


def spent(lines: list[dict]) -> dict[str, float]:
    """Seconds by phase, over epochs' lines."""
    return {phase: sum(line["phases"][phase] for line in lines) for phase in PHASES}


def timed(lines: list[dict]) -> dict[str, Any]:
    """A learner's epochs, steps, and seconds, by phase too."""
    phases = spent(lines)
    return {
        "epochs": len(lines),
        "steps": lines[-1]["step"],
        "phases": phases,
        "seconds": sum(phases.values()),
    }


def speedups(base: list[dict], lines: list[dict]) -> dict[str, Any]:
    """How much faster the epochs of ``lines`` are than those of ``base``, in pairs."""
    ratios = [a["seconds"] / b["seconds"] for a, b in zip(base, lines, strict=False)]
    return {
        "epoch_speedup": statistics.median(ratios),
        "epoch_speedup_range": (min(ratios), max(ratios)),
    }


def apart(one: list[float], other: list[float]) -> list[float]:
    """``|other - one| / |one|`` of each step that both have."""
    return [abs(b - a) / abs(a) for a, b in zip(one, other, strict=False)]


def limited(name: str, value: float, limit: float) -> dict[str, Any]:
    """A check: a value that must be at most its limit."""
    return {"name": name, "value": value, "limit": limit, "passed": value <= limit}


def rows(arms: dict[str, dict]) -> list[dict]:
    """Rows of a table, one an arm, which have its name too."""
    return [{"arm": name} | arm for name, arm in arms.items()]
