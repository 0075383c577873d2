"""What experiment 2, a distillation, has to show."""

import functools
import math
import re
import statistics
from collections.abc import Callable

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, PercentFormatter
from torch.nn import functional as F

from kdkernels.train.distillation import ARMS, CONTROL, NOISY, apart
from kdkernels.train.loop import PHASES
from kdkernels.train.page import BLUE, GREEN, INK, PAPER, PHASE_COLOURS, RED, SIZE, colour
from kdkernels.train.report import Section, Table, duration
from kdkernels.train.run_folder import RunFolder
from kdkernels.train.soft_regularization import BINS, calibration_error, reliability
from kdkernels.train.soft_report import FEW, plot_reliability

__all__ = ["LADDER", "NAMES", "generation", "ladder", "plot_ladder", "plot_phases", "results",
           "sections"]  # fmt: skip

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

CLEAR = 2.0
"""Standard errors from which on a difference is called one."""

MANY_CLASSES = 20
"""From more on a confusion matrix is drawn without numbers."""


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
    losses, epochs, twins = {}, {}, []
    for line in folder.metrics():
        if line["kind"] == "step":
            losses.setdefault(line["learner"], []).append(float(line["loss"]))
            if "twin" in line:
                twins.append(line["twin"])
        elif line["kind"] == "epoch":
            epochs.setdefault(line["learner"], []).append(line)
    if not epochs:
        return None
    target = folder.config["distill"]["target_accuracy"]
    arms = {}
    for name, lines in epochs.items():
        if name == CONTROL:
            continue
        phases = {p: sum(line["phases"][p] for line in lines) for p in PHASES}
        until, reached = 0.0, None
        for line in lines:
            until += line["seconds"]
            if reached is None and target is not None and line["accuracy"] >= target:
                reached = until
        arms[name] = {
            "epochs": len(lines), "steps": lines[-1]["step"],
            "accuracy": lines[-1]["accuracy"], "best": max(line["accuracy"] for line in lines),
            "phases": phases, "seconds": sum(phases.values()), "seconds_to_target": reached,
            "epoch_seconds": statistics.median(line["seconds"] for line in lines),
        }  # fmt: skip
    for name, arm in arms.items():
        _, number = generation(name)
        base = "reference" if number == 1 else f"reference-g{number}"
        if base not in arms or name == "teacher":
            continue
        arm["speedup"] = arms[base]["seconds"] / arm["seconds"]
        pairs = zip(epochs[base], epochs[name], strict=False)
        ratios = [a["seconds"] / b["seconds"] for a, b in pairs]
        arm["epoch_speedup"] = statistics.median(ratios)
        arm["epoch_speedup_range"] = (min(ratios), max(ratios))
    confusion = _add_tests(folder, arms)
    curves, followed, checks = {}, None, []
    if {"reference", "fused", CONTROL} <= epochs.keys():
        curves = {
            "fused": apart(losses["reference"], losses["fused"]),
            CONTROL: apart(losses["reference"], losses[CONTROL]),
            "same logits": apart(twins, losses["fused"]),
        }
        per_epoch = epochs["reference"][0]["step"]
        means = [[line["loss"] for line in epochs[name]] for name in ("reference", "fused")]
        followed = {
            "same_logits": max(curves["same logits"]),
            "first_steps": max(curves["fused"][:2]),
            "first_epoch": max(curves["fused"][:per_epoch]),
            "control": max(curves[CONTROL][:per_epoch]),
            "first_mean": apart(*means)[0],
            "run": max(curves["fused"]),
        }
        limits = {
            "same_logits": SAME_LOGITS,
            "first_steps": FIRST_STEPS,
            "first_epoch": max(TIMES_CONTROL * followed["control"], FIRST_STEPS),
        }
        checks = [
            {
                "name": f"fused follows reference: {FOLLOW[key]}", "value": followed[key],
                "limit": limit, "passed": followed[key] <= limit,
            }
            for key, limit in limits.items()
        ]  # fmt: skip
    return {
        "losses": losses, "epochs": epochs, "arms": arms, "ladder": ladder(epochs),
        "apart": curves, "follow": followed, "checks": checks, "confusion": confusion,
    }  # fmt: skip


def _add_tests(folder: RunFolder, arms: dict) -> dict | None:
    """Add to each arm what its test predictions say, where it left them; the confusion matrix."""
    right, best, confusion = {}, None, None
    for name, arm in arms.items():
        found = folder.load(f"{name}-test")
        if found is None:
            continue
        logits, labels = found[0]["logits"].double(), found[0]["labels"]
        guess = logits.argmax(1)
        right[name] = guess == labels
        arm["ece"] = calibration_error(logits, labels)
        arm["test_loss"] = F.cross_entropy(logits, labels).item()
        arm["reliability"] = [bins.tolist() for bins in reliability(logits, labels)]
        if name != "teacher" and (best is None or arm["accuracy"] > arms[best]["accuracy"]):
            best, classes = name, logits.shape[1]
            counts = torch.bincount(labels * classes + guess, minlength=classes**2)
            confusion = {"arm": name, "counts": counts.view(classes, classes).tolist()}
    for name in right:
        if "reference" in right and name not in ("teacher", "reference"):
            arms[name]["difference"] = paired(right[name], right["reference"])
    return confusion


def paired(right: torch.Tensor, base: torch.Tensor) -> dict[str, float]:
    """The difference of two accuracies on the same images.

    Args:
        right, base: ``[n]`` bool, whether either is right about an image.

    Returns:
        ``mean`` of the images' differences (1, 0 or -1), and its ``standard_error``, which is over
        images and not over seeds.
    """
    apart = right.double() - base.double()
    error = apart.std().item() / math.sqrt(len(apart)) if len(apart) > 1 else 0.0
    return {"mean": apart.mean().item(), "standard_error": error}


def ladder(epochs: dict[str, list[dict]]) -> list[dict]:
    """How the arms of ``LADDER`` that were run gain on each other, from the reference on.

    Args:
        epochs: learner -> its epoch lines.

    Returns:
        A rung an arm, none without a reference: ``arm``, ``adds`` (in words), ``seconds`` over the
        epochs that all of them have, ``saved`` (seconds less than the rung before), ``ratio``
        (the rung before's seconds over this one's), ``speedup`` (the reference's over this one's),
        and by phase ``spent`` and ``saved_by_phase``.
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
        lines = epochs[name][:common]
        spent = {p: sum(line["phases"][p] for line in lines) for p in PHASES}
        seconds = sum(spent.values())
        above = rungs[-1] if rungs else {"seconds": seconds, "spent": spent}
        rungs.append(
            {
                "arm": name, "adds": " + ".join(added), "epochs": common, "seconds": seconds,
                "saved": above["seconds"] - seconds, "ratio": above["seconds"] / seconds,
                "speedup": (rungs[0]["seconds"] if rungs else seconds) / seconds, "spent": spent,
                "saved_by_phase": {p: above["spent"][p] - spent[p] for p in PHASES},
            }
        )  # fmt: skip
        added = []
    return rungs


# ---- tables --------------------------------------------------------------------------------------


def _points(difference: dict, digits: int = 2) -> str:
    mean, error = (difference[key] * 100 for key in ("mean", "standard_error"))
    return f"{mean:+.{digits}f} ± {error:.{digits}f}"


def _summary(found: dict, config: dict) -> Table:
    arms, rows = found["arms"], []
    tested = any("ece" in arm for arm in arms.values())
    compared = any("difference" in arm for arm in arms.values())
    for name, arm in arms.items():
        spread = arm.get("epoch_speedup_range")
        row = [name, f"{arm['accuracy']:.1%}", f"{arm['best']:.1%}"]
        if compared:
            row.append(_points(arm["difference"]) if "difference" in arm else "")
        if tested:
            row.append(f"{arm['ece']:.2%}" if "ece" in arm else "")
        row += [
            str(arm["epochs"]),
            f"{arm['seconds']:.1f}",
            f"{arm['epoch_seconds']:.2f}",
            f"{arm['speedup']:.2f}" if "speedup" in arm else "",
            "{:.2f} ({:.2f} .. {:.2f})".format(arm["epoch_speedup"], *spread) if spread else "",
        ]
        if config["target_accuracy"] is not None:
            reached = arm["seconds_to_target"]
            row.append("not reached" if reached is None else f"{reached:.1f}")
        rows.append(row)
    size = config["image_size"]
    bases = dict.fromkeys(generation(name)[0] for name in arms)
    return Table(
        "Experiment 2: accuracy and time",
        ["arm", "test accuracy", "best"]
        + (["minus reference's, points"] if compared else [])
        + (["ECE"] if tested else [])
        + ["epochs", "seconds", "seconds an epoch (median)", "speed-up over reference",
           "by epoch: median (range)"]
        + (["seconds to target"] if config["target_accuracy"] is not None else []),
        rows,
        f"{config['data']} at {size}x{size}, batch {config['batch_size']}, lr {config['lr']}, "
        f"temperature {config['temperature']}, alpha {config['alpha']}. Seconds are of training "
        "steps; testing and checkpoints are left out, the one pass of the teacher in arms that "
        "keep its predictions is counted in their first epoch. The arms take turns epoch by epoch. "
        "In the first epochs BatchNorm's running averages trail the weights, and tests are near "
        "chance. "
        + (
            "Differences of accuracy are on the same test images, ± their standard error over "
            "images; other seeds would spread more. "
            if compared
            else ""
        )
        + (
            f"ECE: expected calibration error, {BINS} bins of equal width (Guo et al., arXiv "
            "1706.04599). "
            if tested
            else ""
        )
        + " ".join(f"{name}: {ARMS[name].about}." for name in bases if name in ARMS)
        + (
            f" {NOISY}: full, with {config['noise']} noise of std {config['noise_std']:g}"
            + (" / (1 + step)^0.275" if config["noise"] == "gradient" else "")
            + " on the student."
            if NOISY in arms
            else ""
        )
        + (
            " NAME-g2: the second generation, whose teacher is the student NAME, and so on; its "
            "speed-up is over reference's of that generation."
            if any(generation(name)[1] > 1 for name in arms)
            else ""
        ),
    )  # fmt: skip


def _phases(found: dict) -> Table:
    return Table(
        "Experiment 2: seconds by phase",
        ["arm", *PHASES, "loss alone, a step"],
        [
            [
                name,
                *(f"{arm['phases'][p]:.2f}" if arm["phases"][p] >= 0.005 else "" for p in PHASES),
                duration(arm["phases"]["loss"] / arm["steps"]),
            ]
            for name, arm in found["arms"].items()
        ],
        "Sums over all epochs. The fused loss makes its gradient in the forward call, so part of "
        "what PyTorch does under backward stands under loss. For the teacher, student forward is "
        "its own.",
    )


def _ladder_table(rungs: list[dict]) -> Table:
    def by_phase(rung):
        parts = [(phase, saved) for phase, saved in rung["saved_by_phase"].items()
                 if abs(saved) >= max(0.05 * abs(rung["saved"]), 0.005)]  # fmt: skip
        parts.sort(key=lambda part: -abs(part[1]))
        return ", ".join(f"{phase} {saved:.2f}" for phase, saved in parts)

    return Table(
        "Experiment 2: where the speed comes from",
        ["arm", "what it adds", "seconds", "seconds saved", "times faster than the row above",
         "times faster than reference", "saved seconds by phase"],
        [
            [rung["arm"], rung["adds"], f"{rung['seconds']:.2f}"]
            + (
                [f"{rung['saved']:.2f}", f"{rung['ratio']:.2f}", f"{rung['speedup']:.2f}",
                 by_phase(rung)]
                if number
                else [""] * 4
            )
            for number, rung in enumerate(rungs)
        ],
        f"Seconds of training, sums over the first {rungs[0]['epochs']} epochs, the teacher's one "
        "pass included where it is asked once. The rows' ratios multiply to the last one's over "
        "the reference. A negative number is time lost.",
    )  # fmt: skip


def _follow_table(found: dict) -> Table:
    limits = {check["name"]: f"{check['limit']:.2g}" for check in found["checks"]}
    return Table(
        "Experiment 2: does fused follow reference?",
        ["relative difference of the training loss", "value", "must be at most"],
        [
            [text, f"{found['follow'][key]:.2g}",
             limits.get(f"fused follows reference: {text}", "")]
            for key, text in FOLLOW.items()
        ],
        "Both do the same procedure on the same batches and differ by rounding only. Training "
        "magnifies that from step to step, whatever the loss: the control is the reference once "
        "more, with the teacher's predictions rounded otherwise, and fused may stray "
        f"{TIMES_CONTROL:g} times as far in the first epoch.",
    )  # fmt: skip


def _calibration_table(arms: dict) -> Table:
    return Table(
        "Experiment 2: calibration",
        ["arm", "ECE", "mean confidence", "test accuracy", "test loss"],
        [
            [
                name,
                f"{arm['ece']:.2%}",
                f"{sum(arm['reliability'][2]) / sum(arm['reliability'][0]):.1%}",
                f"{sum(arm['reliability'][1]) / sum(arm['reliability'][0]):.1%}",
                f"{arm['test_loss']:.4f}",
            ]
            for name, arm in arms.items()
        ],
        f"{sum(next(iter(arms.values()))['reliability'][0]):,.0f} test images. ECE: expected "
        f"calibration error, {BINS} bins of equal width (Guo et al., arXiv 1706.04599). "
        "Confidence is the largest probability, at temperature 1; above the accuracy is "
        "overconfident. The test loss is the cross-entropy in nats.",
    )


def _confused_table(confusion: dict) -> Table:
    counts = confusion["counts"]
    pairs = sorted(
        ((count, true, guess) for true, row in enumerate(counts) for guess, count in enumerate(row)
         if true != guess and count),
        key=lambda pair: (-pair[0], pair[1], pair[2]),
    )  # fmt: skip
    return Table(
        f"Experiment 2: what {confusion['arm']} confuses most",
        ["true class", "guessed", "images", "of the class"],
        [
            [str(true), str(guess), str(count), f"{count / sum(counts[true]):.1%}"]
            for count, true, guess in pairs[:5]
        ],
        f"{sum(count for count, *_ in pairs):,} of {sum(map(sum, counts)):,} test images are "
        "guessed wrong.",
    )


# ---- plots ---------------------------------------------------------------------------------------


def _first(found: dict) -> list[str]:
    """The students of the first generation."""
    return [name for name in found["arms"] if name != "teacher" and generation(name)[1] == 1]


def _plot_loss(found: dict) -> Figure:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    looks = {"reference": ("-", 3.0), "fused": ("--", 1.5)}
    for name in _first(found):
        style, width = looks.get(name, ("-", 1.3))
        losses = found["losses"][name]
        window = max(1, len(losses) // 40)
        means = [statistics.fmean(losses[max(0, end - window) : end])
                 for end in range(1, len(losses) + 1)]  # fmt: skip
        steps = range(1, len(losses) + 1)
        if window > 1:
            axes.plot(steps, losses, lw=0.6, color=colour(name), alpha=0.2)
        axes.plot(steps, means, style, lw=width, color=colour(name), label=name)
    axes.set(xlabel="step", ylabel="training loss", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: "")
    figure.legend(*axes.get_legend_handles_labels(), ncols=3, loc="outside upper center")
    return figure


def _plot_difference(found: dict) -> Figure:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    looks = {
        "fused": ("fused, its own run", BLUE, "-"),
        CONTROL: ("control: the reference again, rounded otherwise", INK, "--"),
        "same logits": ("fused, on the same logits", GREEN, "-"),
    }
    for name, (label, look, style) in looks.items():
        # Equal losses have no place on a logarithmic axis: the floor stands for them.
        shown = [max(value, 1e-8) for value in found["apart"][name]]
        axes.plot(range(1, len(shown) + 1), shown, style, color=look, lw=1, label=label)
    axes.set(xlabel="step", ylabel="relative difference", yscale="log", ylim=(5e-9, 300))
    axes.legend(loc="upper left")
    return figure


def _plot_accuracy(found: dict, by_time: bool) -> Figure:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(_first(found)):
        lines = found["epochs"][name]
        spent, total = [], 0.0
        for line in lines:
            total += line["seconds"]
            spent.append(total)
        axes.plot(
            spent if by_time else [line["epoch"] for line in lines],
            [line["accuracy"] for line in lines], label=name, color=colour(name), ms=4, lw=1.3,
            marker="osD^vPX"[number % 7], ls="--" if name == "fused" else "-",
        )  # fmt: skip
    if "teacher" in found["arms"]:
        best = found["arms"]["teacher"]["accuracy"]
        axes.axhline(best, color=colour("teacher"), ls=":", lw=1.2, label=f"teacher {best:.1%}")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set(xlabel="seconds of training" if by_time else "epoch", ylabel="test accuracy")
    if by_time:
        axes.set_xlim(0, None)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(*axes.get_legend_handles_labels(), ncols=3, loc="outside upper center")
    return figure


def plot_phases(
    spent: dict[str, dict[str, float]], label: str, total: Callable[[float], str]
) -> Figure:
    """A bar an arm of what it spends in each phase.

    Args:
        spent: arm -> phase of ``PHASES`` -> how much.
        label: of the axis, with the unit.
        total: an arm's sum, as it stands behind its bar.
    """
    figure = Figure(figsize=(SIZE[0], 1.3 + 0.4 * len(spent)), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(spent)
    for phase, look in zip(PHASES, PHASE_COLOURS, strict=True):
        widths = [phases[phase] for phases in spent.values()]
        axes.barh(
            list(spent), widths, left=left, color=look, label=phase, height=0.66, ec=PAPER, lw=0.6
        )
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for row, value in enumerate(left):
        axes.annotate(total(value), (value, row), (4, 0), textcoords="offset points", va="center")
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(xlabel=label, xlim=(0, max(left) * 1.14))
    figure.legend(*axes.get_legend_handles_labels(), ncols=3, loc="outside upper center")
    return figure


def plot_ladder(rungs: list[dict]) -> Figure:
    """The rungs of :func:`ladder` as bars, each with what it saves of the one before.

    Args:
        rungs: where they have ``seconds_spread`` it is drawn as an error bar, and
            ``speedup_spread`` stands beside the speed-up.
    """
    figure = Figure(figsize=(SIZE[0], 0.55 + 0.62 * len(rungs)), layout="constrained")
    axes = figure.subplots()
    most = max(rung["seconds"] + rung.get("seconds_spread", 0) for rung in rungs)
    spread = any("speedup_spread" in rung for rung in rungs)
    for row, rung in enumerate(rungs):
        look, seconds, saved = colour(rung["arm"]), rung["seconds"], rung["saved"]
        axes.barh(row, seconds, color=look, height=0.42, xerr=rung.get("seconds_spread"),
                  error_kw={"ecolor": INK, "capsize": 3, "lw": 1})  # fmt: skip
        if saved > 0:
            axes.barh(row, saved, left=seconds, color=look, height=0.42, alpha=0.22)
            if saved > 0.17 * most and not spread:
                spot = (seconds + saved / 2, row)
                axes.annotate(f"−{saved:.3g} s", spot, ha="center", va="center", fontsize=8)
        label = ("+ " if row else "") + rung["adds"]
        axes.text(0, row - 0.3, f"{label}  ({seconds:.3g} s)", ha="left", va="bottom")
        if row:
            speed = f"{rung['speedup']:.2f}"
            if "speedup_spread" in rung:
                speed += f" ± {rung['speedup_spread']:.2f}"
            axes.text(most * 1.03, row, f"{speed}×", va="center", weight="bold", color=look)
    right = most * (1.36 if spread else 1.2)
    axes.set(xlabel="seconds of training", xlim=(0, right), ylim=(len(rungs) - 0.6, -0.75))
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", visible=False)
    return figure


def _plot_confusion(confusion: dict) -> Figure:
    counts = confusion["counts"]
    classes = len(counts)
    figure = Figure(figsize=(SIZE[0], 4.6), layout="constrained")
    axes = figure.subplots()
    blue, red = (tuple(int(look[i : i + 2], 16) / 255 for i in (1, 3, 5)) for look in (BLUE, RED))
    cells = [
        [
            (*blue, 0.55 * share) if true == guess else (*red, 0.75 * math.sqrt(share))
            for guess, share in enumerate(count / max(1, sum(row)) for count in row)
        ]
        for true, row in enumerate(counts)
    ]
    few = classes <= MANY_CLASSES
    axes.pcolormesh(cells, ec=PAPER if few else "none", lw=0.8 if few else 0, rasterized=not few)
    if few:
        for true, row in enumerate(counts):
            for guess, count in enumerate(row):
                if count:
                    axes.text(guess + 0.5, true + 0.5, f"{count:,}", ha="center", va="center",
                              fontsize=8 if classes <= 10 else 6)  # fmt: skip
        ticks = [place + 0.5 for place in range(classes)]
        labels = [str(place) for place in range(classes)]
        axes.set_xticks(ticks, labels)
        axes.set_yticks(ticks, labels)
        axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="guessed class", ylabel="true class", aspect="equal")
    axes.invert_yaxis()
    return figure


def _plot_generations(found: dict) -> Figure:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    rows = {}
    for name, arm in found["arms"].items():
        base, number = generation(name)
        rows.setdefault(base, []).append((number, arm["accuracy"]))
    for place, (name, points) in enumerate(rows.items()):
        if len(points) > 1:
            axes.plot(
                *zip(*sorted(points), strict=True), color=colour(name), lw=1.4, ms=5, label=name,
                marker="osD^vPX"[place % 7], ls="--" if name == "fused" else "-",
            )  # fmt: skip
    if "teacher" in found["arms"]:
        best = found["arms"]["teacher"]["accuracy"]
        axes.axhline(best, color=colour("teacher"), ls=":", lw=1.2, label=f"teacher {best:.1%}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set(xlabel="generation", ylabel="test accuracy")
    axes.margins(x=0.1)
    figure.legend(*axes.get_legend_handles_labels(), ncols=3, loc="outside upper center")
    return figure


# ---- the page ------------------------------------------------------------------------------------

NAMES = {
    "full": "fused with kept predictions", "cached": "fused loss with kept predictions",
    "fused": "the fused loss",
}  # fmt: skip


def speed(ratio: float) -> str:
    """A speed-up in words."""
    if ratio >= 1.05:
        return f"{ratio:.1f} times faster than" if ratio < 10 else f"{ratio:.0f} times faster than"
    return "as fast as" if ratio >= 0.95 else f"{1 / ratio:.1f} times slower than"


def _accuracy_words(arm: dict, base: dict) -> str:
    if "difference" not in arm:
        return f"with {arm['accuracy']:.1%} test accuracy against {base['accuracy']:.1%}"
    away, error = arm["difference"]["mean"], arm["difference"]["standard_error"]
    if abs(away) <= CLEAR * error or away == 0:
        return f"at equal accuracy ({_points(arm['difference'], 1)} points)"
    return f"at {abs(away) * 100:.1f} points {'higher' if away > 0 else 'lower'} accuracy"


def _headline(found: dict, config: dict) -> tuple[str, list[tuple[str, str]]]:
    """The finding in one sentence, and cards with its numbers."""
    arms, rungs = found["arms"], found["ladder"]
    students = [name for name in arms if name != "teacher"]
    name = next((name for name in reversed(LADDER) if name in arms), students[-1])
    arm, base = arms[name], arms.get("reference")
    if name == "reference":
        base = None

    def beside(text, cell):
        return text if base is None else f"{text}; reference {cell(base)}"

    cards = []
    if base is not None:
        ratio = rungs[-1]["speedup"] if name in LADDER else arm["speedup"]
        sentence = f"{NAMES.get(name, name)}: {speed(ratio)} plain PyTorch "
        sentence += _accuracy_words(arm, base)
        reached = [one["seconds_to_target"] for one in (base, arm)]
        if None not in reached:
            ratio = reached[0] / reached[1]
            sentence = f"{NAMES.get(name, name)}: {config['target_accuracy']:.1%} test accuracy "
            sentence += f"after {reached[1]:.1f} seconds, plain PyTorch after {reached[0]:.1f}"
        cards.append((f"{ratio:.2f}×", f"the speed of plain PyTorch: {name} over reference"))
    else:
        sentence = f"{NAMES.get(name, name)}: {arm['accuracy']:.1%} test accuracy after "
        sentence += f"{arm['seconds']:.1f} seconds of training"
    cards += [
        (f"{arm['accuracy']:.1%}",
         beside(f"test accuracy of {name}", lambda one: f"{one['accuracy']:.1%}")),
        (f"{arm['seconds']:.3g} s",
         beside(f"of training, {arm['epochs']} epochs", lambda one: f"{one['seconds']:.3g} s")),
    ]  # fmt: skip
    if "ece" in arm and (base is None or "ece" in base):
        text = beside("expected calibration error", lambda one: f"{one['ece']:.1%}")
        cards.append((f"{arm['ece']:.1%}", text))
    if "teacher" in arms:
        text = f"test accuracy of the teacher, {config.get('teacher', 'resnet18')}"
        cards.append((f"{arms['teacher']['accuracy']:.1%}", text))
    return sentence[0].upper() + sentence[1:], cards


def sections(folder: RunFolder) -> list[Section]:
    """A distillation, or nothing before a student's first epoch is done."""
    found, config = results(folder), folder.config["distill"]
    if found is None or not _first(found):
        return []
    arms = found["arms"]
    tested = {name: arm for name, arm in arms.items() if "reliability" in arm}
    headline, cards = _headline(found, config)
    size = config["image_size"]
    lead = [
        f"{config.get('student', 'mobilenet_v2')} taught by {config.get('teacher', 'resnet18')} on "
        f"{config['data']} at {size}x{size}, seed {config['seed']}; "
        f"{folder.config['machine']['processor']}."
    ]
    if "difference" in arms.get("full", {}):
        lead.append(
            "Equal accuracy: no difference beyond two standard errors over the test images of this "
            "one run. kdkernels compare puts runs of several seeds together."
        )
    kept = ("arms", "ladder", "follow", "checks", "confusion")
    accuracy = Section(
        "Accuracy",
        [_summary(found, config)],
        {
            "accuracy": functools.partial(_plot_accuracy, found, by_time=False),
            "accuracy_by_time": functools.partial(_plot_accuracy, found, by_time=True),
            "loss": functools.partial(_plot_loss, found),
        },
        {
            "accuracy": ("By epoch", "test accuracy at each epoch's end"),
            "accuracy_by_time": ("By time", "the same, over seconds of training"),
            "loss": (
                "Loss of each step",
                "thick: its mean over a fortieth of the run; alone's loss is the cross-entropy",
            ),
        },
        results={key: found[key] for key in kept},
        checks=found["checks"],
        headline=headline, lead=lead, cards=cards,
    )  # fmt: skip
    if any(generation(name)[1] > 1 for name in arms):
        accuracy.plots["generations"] = functools.partial(_plot_generations, found)
        accuracy.captions["generations"] = (
            "By generation", "each generation's student teaches the next",
        )  # fmt: skip
    spent = {name: arms[name]["phases"] for name in _first(found)}
    speeds = Section(
        "Speed",
        [_phases(found)],
        {"phases": functools.partial(plot_phases, spent, "seconds of training", "{:.1f} s".format)},
        {"phases": ("Where the time goes", "seconds of training by phase")},
    )
    if found["ladder"]:
        speeds.tables.insert(0, _ladder_table(found["ladder"]))
        ladder_plot = {"ladder": functools.partial(plot_ladder, found["ladder"])}
        speeds.plots = ladder_plot | speeds.plots
        speeds.captions["ladder"] = (
            "The speed-up ladder",
            "each bar adds one thing to the one above; pale: what that saves; bold: times "
            "reference's speed",
        )
    made = [speeds, accuracy]
    if tested:
        bins = {name: arm["reliability"] for name, arm in tested.items()
                if generation(name)[1] == 1}  # fmt: skip
        confusion = found["confusion"]
        calibration = Section(
            "Calibration and confusion",
            [_calibration_table(tested)],
            {
                "reliability": functools.partial(
                    plot_reliability, bins, {name: colour(name) for name in bins}
                ),
            },
            {
                "reliability": (
                    "Reliability",
                    f"how often an arm is right when it is so sure; bins of {FEW} images or more",
                ),
            },
        )
        if confusion:
            calibration.tables.append(_confused_table(confusion))
            calibration.plots["confusion"] = functools.partial(_plot_confusion, confusion)
            calibration.captions["confusion"] = (
                f"What {confusion['arm']} takes for what",
                "the most accurate student's test images; blue right, red wrong",
            )
        made.append(calibration)
    if found["follow"]:
        made.append(
            Section(
                "Does fused follow reference?",
                [_follow_table(found)],
                {"loss_difference": functools.partial(_plot_difference, found)},
                {"loss_difference": ("Difference from the reference's loss", "")},
            )
        )
    return made
