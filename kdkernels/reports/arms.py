"""What a distillation's metrics and test predictions say: the numbers of its report."""

import itertools
import math
import re
import statistics
from collections.abc import Iterable
from typing import Any

import torch
from torch.nn import functional as F

from kdkernels.experiments.soft_regularization import calibration_error, reliability
from kdkernels.reports import metrics
from kdkernels.train.loop import PHASES
from kdkernels.train.run_folder import RunFolder
from kdkernels.train.settings import CONTROL

# Limits on the relative difference of the arms reference and fused. For the same logits the two
# losses differ by rounding alone. Their curves part further: BatchNorm over small batches and
# Adam's first steps magnify a last bit to percents within ten steps, whatever the loss. So past
# the first two steps the measure is the control, a second run of the reference that differs from
# it by rounding only.
SAME_LOGITS = 1e-5
FIRST_STEPS = 1e-4
TIMES_CONTROL = 4.0
FOLLOW = {
    "same_logits": "both losses of the same logits, largest of all steps",
    "first_steps": "loss curves, first two steps",
    "first_epoch": "loss curves, largest in the first epoch",
    "control": "the same between reference and control",
    "first_mean": "mean loss of the first epoch",
    "run": "loss curves, largest in the whole run",
}

LADDER = {
    "reference": "plain PyTorch",
    "fused": "fused loss",
    "cached": "teacher asked once",
    "full": "channels_last, fused Adam, in place",
}
"""What each arm adds to the one before it."""


def generation(learner: str) -> tuple[str, int]:
    """The arm and the generation of a learner: ``("full", 2)`` of ``full-g2``."""
    found = re.fullmatch(r"(.+)-g(\d+)", learner)
    return (found[1], int(found[2])) if found else (learner, 1)


def results(folder: RunFolder) -> dict | None:
    """Read a distillation's metrics and test predictions.

    Returns:
        None where there are no metrics yet; otherwise ``losses`` (learner -> loss of each step),
        ``epochs`` (learner -> its epoch lines), ``arms`` (a row each for the tables), ``ladder``
        (see :func:`ladder`), ``apart`` (relative difference from the reference's losses, a list a
        curve), ``follow`` (the largest of them), ``checks``, and ``confusion`` (the most accurate
        student's: its ``arm`` and ``counts``, rows true and columns guessed classes) or None.
    """
    losses, epochs, twins = metrics.curves_of(folder)
    if not epochs:
        return None
    target = folder.config["distill"]["target_accuracy"]
    arms = {name: _arm(name, epochs, target) for name in epochs if name != CONTROL}
    found = {
        "losses": losses,
        "epochs": epochs,
        "arms": arms,
        "ladder": ladder(epochs),
        "apart": {},
        "follow": None,
        "checks": [],
        "confusion": _add_tests(folder, arms),
    }
    if {"reference", "fused", CONTROL} <= epochs.keys():
        found |= _followed(losses, epochs, twins)
    return found


def _arm(name: str, epochs: dict[str, list[dict]], target: float | None) -> dict[str, Any]:
    """What an arm's epochs say of it, and of its reference's of the same generation."""
    lines, number = epochs[name], generation(name)[1]
    until = itertools.accumulate(line["seconds"] for line in lines)
    reached = [
        seconds
        for line, seconds in zip(lines, until, strict=True)
        if target is not None and line["accuracy"] >= target
    ]
    arm = metrics.timed(lines) | {
        "accuracy": lines[-1]["accuracy"],
        "best": max(line["accuracy"] for line in lines),
        "seconds_to_target": reached[0] if reached else None,
        "epoch_seconds": statistics.median(line["seconds"] for line in lines),
        "others": max((line.get("others") or 0.0 for line in lines), default=0.0),
    }
    base = epochs.get("reference" if number == 1 else f"reference-g{number}")
    if base and name != "teacher":
        arm["speedup"] = metrics.timed(base)["seconds"] / arm["seconds"]
        arm |= metrics.speedups(base, lines)
    return arm


def _followed(losses: dict, epochs: dict, twins: list[float]) -> dict[str, Any]:
    """How far fused's losses are from reference's, and the checks of that."""
    curves = {
        "fused": metrics.apart(losses["reference"], losses["fused"]),
        CONTROL: metrics.apart(losses["reference"], losses[CONTROL]),
        "same logits": metrics.apart(twins, losses["fused"]),
    }
    an_epoch = epochs["reference"][0]["step"]
    means = [[line["loss"] for line in epochs[name]] for name in ("reference", "fused")]
    follow = {
        "same_logits": max(curves["same logits"]),
        "first_steps": max(curves["fused"][:2]),
        "first_epoch": max(curves["fused"][:an_epoch]),
        "control": max(curves[CONTROL][:an_epoch]),
        "first_mean": metrics.apart(*means)[0],
        "run": max(curves["fused"]),
    }
    limits = {
        "same_logits": SAME_LOGITS,
        "first_steps": FIRST_STEPS,
        "first_epoch": max(TIMES_CONTROL * follow["control"], FIRST_STEPS),
    }
    checks = [
        metrics.limited(f"fused follows reference: {FOLLOW[key]}", follow[key], limit)
        for key, limit in limits.items()
    ]
    return {"apart": curves, "follow": follow, "checks": checks}


def _add_tests(folder: RunFolder, arms: dict) -> dict | None:
    """Add to each arm what its test predictions say, where it left them; the confusion matrix."""
    right, best, confusion = {}, None, None
    for name, arm in arms.items():
        found = folder.load(f"{name}-test")
        if found is None:
            continue
        logits, labels = found[0]["logits"].double(), found[0]["labels"]
        guess = logits.argmax(1)
        right[name] = (guess == labels).double()
        arm["ece"] = calibration_error(logits, labels)
        arm["test_loss"] = F.cross_entropy(logits, labels).item()
        arm["reliability"] = [bins.tolist() for bins in reliability(logits, labels)]
        if name != "teacher" and (best is None or arm["accuracy"] > arms[best]["accuracy"]):
            best, classes = name, logits.shape[1]
            counts = torch.bincount(labels * classes + guess, minlength=classes**2)
            confusion = {"arm": name, "counts": counts.view(classes, classes).tolist()}
    for name in right.keys() - {"teacher", "reference"} if "reference" in right else ():
        # Over images, and not over seeds.
        away = right[name] - right["reference"]
        error = away.std().item() / math.sqrt(len(away)) if len(away) > 1 else 0.0
        arms[name]["difference"] = {"mean": away.mean().item(), "standard_error": error}
    return confusion


def ladder(epochs: dict[str, list[dict]]) -> list[dict]:
    """How the arms of ``LADDER`` gain on each other, from the reference on; ``epochs``: learner ->
    lines.

    Returns:
        A rung an arm that was run, none without a reference: ``arm``, ``adds`` (in words),
        ``seconds`` over the epochs that all of them have, ``saved`` (seconds less than the rung
        before), ``ratio`` (the rung before's seconds over this one's), ``speedup`` (the reference's
        over this one's), and by phase ``spent`` and ``saved_by_phase``.
    """
    present = [name for name in LADDER if name in epochs]
    if present[:1] != ["reference"] or len(present) == 1:
        return []
    common = min(len(epochs[name]) for name in present)
    rungs, added = [], []
    for name, adds in LADDER.items():
        added.append(adds)
        if name not in epochs:
            continue
        phases = metrics.spent(epochs[name][:common])
        seconds = sum(phases.values())
        above = rungs[-1] if rungs else {"seconds": seconds, "spent": phases}
        rungs.append(
            {
                "arm": name,
                "adds": " + ".join(added),
                "epochs": common,
                "seconds": seconds,
                "saved": above["seconds"] - seconds,
                "ratio": above["seconds"] / seconds,
                "speedup": (rungs[0]["seconds"] if rungs else seconds) / seconds,
                "spent": phases,
                "saved_by_phase": {p: above["spent"][p] - phases[p] for p in PHASES},
            }
        )
        added = []
    return rungs


def best_of(arms: Iterable[str]) -> str | None:
    """The one of these arms that adds the most to the reference; None where there is none."""
    return next((name for name in reversed(LADDER) if name in arms), None)
