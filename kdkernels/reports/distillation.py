"""What experiment 2, a distillation, has to show."""

import functools
import math
import re
import statistics
from collections.abc import Callable
from typing import Any

import pandas
import torch
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, PercentFormatter
from torch.nn import functional as F

from kdkernels.experiments.soft_regularization import calibration_error, reliability
from kdkernels.reports import page
from kdkernels.reports.metrics import apart, curves_of, limited, speedup_cells, speedups, spent
from kdkernels.reports.noise import FEW, plot_reliability
from kdkernels.reports.report import Plot, Section, Table, duration, table, with_error
from kdkernels.train.loop import PHASES
from kdkernels.train.run_folder import RunFolder
from kdkernels.train.settings import ARMS, CONTROL

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

MANY_CLASSES = 20
"""From more on a confusion matrix is drawn without numbers."""

MARKERS = "osD^vPX"


# ---- results -------------------------------------------------------------------------------------


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
    losses, epochs, twins = curves_of(folder)
    if not epochs:
        return None
    target = folder.config["distill"]["target_accuracy"]
    arms = {name: _arm(lines, target) for name, lines in epochs.items() if name != CONTROL}
    for name, arm in arms.items():
        _, number = generation(name)
        base = "reference" if number == 1 else f"reference-g{number}"
        if base in arms and name != "teacher":
            arm["speedup"] = arms[base]["seconds"] / arm["seconds"]
            arm |= speedups(epochs[base], epochs[name])
    confusion = _add_tests(folder, arms)
    found = {
        "losses": losses, "epochs": epochs, "arms": arms, "ladder": ladder(epochs),
        "apart": {}, "follow": None, "checks": [], "confusion": confusion,
    }  # fmt: skip
    if {"reference", "fused", CONTROL} <= epochs.keys():
        found |= _followed(losses, epochs, twins)
    return found


def _arm(lines: list[dict], target: float | None) -> dict[str, Any]:
    """What an arm's epochs say of it."""
    until, reached = 0.0, None
    for line in lines:
        until += line["seconds"]
        if reached is None and target is not None and line["accuracy"] >= target:
            reached = until
    phases = spent(lines)
    return {
        "epochs": len(lines), "steps": lines[-1]["step"], "accuracy": lines[-1]["accuracy"],
        "best": max(line["accuracy"] for line in lines), "phases": phases,
        "seconds": sum(phases.values()), "seconds_to_target": reached,
        "epoch_seconds": statistics.median(line["seconds"] for line in lines),
        "others": max((line.get("others") or 0.0 for line in lines), default=0.0),
    }  # fmt: skip


def _followed(losses: dict, epochs: dict, twins: list[float]) -> dict[str, Any]:
    """How far fused's losses are from reference's, and the checks of that."""
    curves = {
        "fused": apart(losses["reference"], losses["fused"]),
        CONTROL: apart(losses["reference"], losses[CONTROL]),
        "same logits": apart(twins, losses["fused"]),
    }
    an_epoch = epochs["reference"][0]["step"]
    means = [[line["loss"] for line in epochs[name]] for name in ("reference", "fused")]
    follow = {
        "same_logits": max(curves["same logits"]), "first_steps": max(curves["fused"][:2]),
        "first_epoch": max(curves["fused"][:an_epoch]), "control": max(curves[CONTROL][:an_epoch]),
        "first_mean": apart(*means)[0], "run": max(curves["fused"]),
    }  # fmt: skip
    limits = {
        "same_logits": SAME_LOGITS, "first_steps": FIRST_STEPS,
        "first_epoch": max(TIMES_CONTROL * follow["control"], FIRST_STEPS),
    }  # fmt: skip
    checks = [
        limited(f"fused follows reference: {FOLLOW[key]}", follow[key], limit)
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
        phases = spent(epochs[name][:common])
        seconds = sum(phases.values())
        above = rungs[-1] if rungs else {"seconds": seconds, "spent": phases}
        rungs.append(
            {
                "arm": name, "adds": " + ".join(added), "epochs": common, "seconds": seconds,
                "saved": above["seconds"] - seconds, "ratio": above["seconds"] / seconds,
                "speedup": (rungs[0]["seconds"] if rungs else seconds) / seconds, "spent": phases,
                "saved_by_phase": {p: above["spent"][p] - phases[p] for p in PHASES},
            }
        )  # fmt: skip
        added = []
    return rungs


# ---- tables --------------------------------------------------------------------------------------


def _points(difference: dict, digits: int = 2) -> str:
    return with_error(
        difference["mean"] * 100, difference["standard_error"] * 100, digits, sign="+"
    )


def _summary(found: dict, config: dict) -> Table:
    arms, aimed = found["arms"], config["target_accuracy"] is not None

    def row(name, arm):
        reached = arm["seconds_to_target"]
        return {
            "arm": name,
            "test accuracy": f"{arm['accuracy']:.1%}",
            "best": f"{arm['best']:.1%}",
            "minus reference's, points": "difference" in arm and _points(arm["difference"]) or "",
            "ECE": f"{arm['ece']:.2%}" if "ece" in arm else "",
            "epochs": arm["epochs"],
            "seconds": f"{arm['seconds']:.1f}",
            "seconds an epoch (median)": f"{arm['epoch_seconds']:.2f}",
            "speed-up over reference": f"{arm['speedup']:.2f}" if "speedup" in arm else "",
            **speedup_cells(arm),
            "seconds to target": aimed
            and ("not reached" if reached is None else f"{reached:.1f}")
            or "",
        }

    bases = dict.fromkeys(generation(name)[0] for name in arms)
    second = any(generation(name)[1] > 1 for name in arms)
    text = page.note("distillation", c=config, arms=arms, bases=bases, about=ARMS, second=second)
    rows = (row(name, arm) for name, arm in arms.items())
    return table("Experiment 2: accuracy and time", rows, text)


def _phases(found: dict) -> Table:
    return table(
        "Experiment 2: seconds by phase",
        (
            {"arm": name}
            | {p: f"{arm['phases'][p]:.2f}" if arm["phases"][p] >= 0.005 else "" for p in PHASES}
            | {"loss alone, a step": duration(arm["phases"]["loss"] / arm["steps"])}
            for name, arm in found["arms"].items()
        ),
        page.note("phases"),
    )


def _ladder_table(rungs: list[dict]) -> Table:
    def row(rung):
        seconds = {"arm": rung["arm"], "what it adds": rung["adds"],
                   "seconds": f"{rung['seconds']:.2f}"}  # fmt: skip
        if rung is rungs[0]:
            return seconds
        least = max(0.05 * abs(rung["saved"]), 0.005)
        parts = [part for part in rung["saved_by_phase"].items() if abs(part[1]) >= least]
        parts.sort(key=lambda part: -abs(part[1]))
        return seconds | {
            "seconds saved": f"{rung['saved']:.2f}",
            "times faster than the row above": f"{rung['ratio']:.2f}",
            "times faster than reference": f"{rung['speedup']:.2f}",
            "saved seconds by phase": ", ".join(f"{phase} {saved:.2f}" for phase, saved in parts),
        }

    return table(
        "Experiment 2: where the speed comes from",
        map(row, rungs),
        page.note("ladder", epochs=rungs[0]["epochs"]),
    )


def _follow_table(found: dict) -> Table:
    limits = {check["name"]: f"{check['limit']:.2g}" for check in found["checks"]}
    return table(
        "Experiment 2: does fused follow reference?",
        (
            {"relative difference of the training loss": text,
             "value": f"{found['follow'][key]:.2g}",
             "must be at most": limits.get(f"fused follows reference: {text}")}
            for key, text in FOLLOW.items()
        ),
        page.note("follow", times=f"{TIMES_CONTROL:g}"),
    )  # fmt: skip


def _calibration_table(arms: dict) -> Table:
    def row(name, arm):
        count, right, sure = map(sum, arm["reliability"])
        return {
            "arm": name, "ECE": f"{arm['ece']:.2%}", "mean confidence": f"{sure / count:.1%}",
            "test accuracy": f"{right / count:.1%}", "test loss": f"{arm['test_loss']:.4f}",
        }  # fmt: skip

    images = sum(next(iter(arms.values()))["reliability"][0])
    return table(
        "Experiment 2: calibration",
        (row(name, arm) for name, arm in arms.items()),
        page.note("calibration", images=f"{images:,.0f}"),
    )


def _confused_table(confusion: dict) -> Table:
    counts = confusion["counts"]
    pairs = [
        (-count, true, guess)
        for true, row in enumerate(counts)
        for guess, count in enumerate(row)
        if true != guess and count
    ]
    return table(
        f"Experiment 2: what {confusion['arm']} confuses most",
        (
            {"true class": true, "guessed": guess, "images": -count,
             "of the class": f"{-count / sum(counts[true]):.1%}"}
            for count, true, guess in sorted(pairs)[:5]
        ),
        f"{-sum(count for count, *_ in pairs):,} of {sum(map(sum, counts)):,} test images are "
        "guessed wrong.",
        ["true class", "guessed", "images", "of the class"],
    )  # fmt: skip


# ---- plots ---------------------------------------------------------------------------------------


def _first(found: dict) -> list[str]:
    """The students of the first generation."""
    return [name for name in found["arms"] if name != "teacher" and generation(name)[1] == 1]


def _looks(names) -> list[dict[str, Any]]:
    """How each arm's curve over epochs, seconds or generations looks."""
    return [
        {"color": page.colour(name), "label": name, "ms": 4, "lw": 1.3,
         "marker": MARKERS[place % 7], "ls": "--" if name == "fused" else "-"}
        for place, name in enumerate(names)
    ]  # fmt: skip


def _accuracies(found: dict, axes, curves: dict, label: str, whole: bool) -> None:
    """Draw curves of accuracy, arm -> (x, y), and the teacher's accuracy."""
    for (x, y), look in zip(curves.values(), _looks(curves), strict=True):
        axes.plot(x, y, **look)
    if "teacher" in found["arms"]:
        best = found["arms"]["teacher"]["accuracy"]
        axes.axhline(
            best, color=page.colour("teacher"), ls=":", lw=1.2, label=f"teacher {best:.1%}"
        )
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set(xlabel=label, ylabel="test accuracy")
    if whole:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        axes.set_xlim(0, None)


def _plot_accuracy(found: dict, by_time: bool) -> Figure:
    figure, axes = page.canvas()
    curves = {}
    for name in _first(found):
        lines = pandas.DataFrame(found["epochs"][name])
        x = lines["seconds"].cumsum() if by_time else lines["epoch"]
        curves[name] = x, lines["accuracy"]
    _accuracies(found, axes, curves, "seconds of training" if by_time else "epoch", not by_time)
    return page.legend(figure, axes)


def _plot_generations(found: dict) -> Figure:
    figure, axes = page.canvas()
    rows = {}
    for name, arm in found["arms"].items():
        base, number = generation(name)
        rows.setdefault(base, []).append((number, arm["accuracy"]))
    curves = {name: tuple(zip(*sorted(r), strict=True)) for name, r in rows.items() if len(r) > 1}
    _accuracies(found, axes, curves, "generation", True)
    axes.margins(x=0.1)
    return page.legend(figure, axes)


def _plot_loss(found: dict) -> Figure:
    figure, axes = page.canvas()
    looks = {"reference": ("-", 3.0), "fused": ("--", 1.5)}
    for name in _first(found):
        style, width = looks.get(name, ("-", 1.3))
        losses = pandas.Series(found["losses"][name])
        losses.index += 1
        window = max(1, len(losses) // 40)
        if window > 1:
            axes.plot(losses, lw=0.6, color=page.colour(name), alpha=0.2)
        means = losses.rolling(window, min_periods=1).mean()
        axes.plot(means, style, lw=width, color=page.colour(name), label=name)
    axes.set(xlabel="step", ylabel="training loss", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: "")
    return page.legend(figure, axes)


def _plot_difference(found: dict) -> Figure:
    figure, axes = page.canvas()
    looks = {
        "fused": ("fused, its own run", page.BLUE, "-"),
        CONTROL: ("control: the reference again, rounded otherwise", page.INK, "--"),
        "same logits": ("fused, on the same logits", page.GREEN, "-"),
    }
    for name, (label, look, style) in looks.items():
        # Equal losses have no place on a logarithmic axis: the floor stands for them.
        shown = [max(value, 1e-8) for value in found["apart"][name]]
        axes.plot(range(1, len(shown) + 1), shown, style, color=look, lw=1, label=label)
    axes.set(xlabel="step", ylabel="relative difference", yscale="log", ylim=(5e-9, 300))
    axes.legend(loc="upper left")
    return figure


def plot_phases(
    spent: dict[str, dict[str, float]], label: str, total: Callable[[float], str]
) -> Figure:
    """A bar an arm of what it spends in each phase; ``total`` says its sum behind the bar."""
    figure, axes = page.canvas(page.SIZE[0], 1.3 + 0.4 * len(spent))
    frame = pandas.DataFrame(spent).T[list(PHASES)]
    frame.plot.barh(
        stacked=True, ax=axes, color=page.PHASE_COLOURS, width=0.66, ec=page.PAPER, lw=0.6
    )
    sums = frame.sum(axis=1)
    for row, value in enumerate(sums):
        axes.annotate(total(value), (value, row), (4, 0), textcoords="offset points", va="center")
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(xlabel=label, ylabel="", xlim=(0, sums.max() * 1.14))
    return page.legend(figure, axes)


def plot_ladder(rungs: list[dict]) -> Figure:
    """The rungs of :func:`ladder` as bars, each with what it saves of the one before."""
    figure, axes = page.canvas(page.SIZE[0], 0.55 + 0.62 * len(rungs))
    most = max(rung["seconds"] + rung.get("seconds_spread", 0) for rung in rungs)
    spread = any("speedup_spread" in rung for rung in rungs)
    for row, rung in enumerate(rungs):
        look, seconds, saved = page.colour(rung["arm"]), rung["seconds"], rung["saved"]
        axes.barh(row, seconds, color=look, height=0.42, xerr=rung.get("seconds_spread"),
                  error_kw={"ecolor": page.INK, "capsize": 3, "lw": 1})  # fmt: skip
        if saved > 0:
            axes.barh(row, saved, left=seconds, color=look, height=0.42, alpha=0.22)
            if saved > 0.17 * most and not spread:
                spot = (seconds + saved / 2, row)
                axes.annotate(f"−{saved:.3g} s", spot, ha="center", va="center", fontsize=8)
        label = ("+ " if row else "") + rung["adds"]
        axes.text(0, row - 0.3, f"{label}  ({seconds:.3g} s)", ha="left", va="bottom")
        if row:
            speed = with_error(rung["speedup"], rung.get("speedup_spread"))
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
    figure, axes = page.canvas(page.SIZE[0], 4.6)
    cells = [
        [
            to_rgba(page.BLUE, 0.55 * share)
            if true == guess
            else to_rgba(page.RED, 0.75 * share**0.5)
            for guess, share in enumerate(count / max(1, sum(row)) for count in row)
        ]
        for true, row in enumerate(counts)
    ]
    few = classes <= MANY_CLASSES
    axes.pcolormesh(
        cells, ec=page.PAPER if few else "none", lw=0.8 if few else 0, rasterized=not few
    )
    if few:
        place = {"ha": "center", "va": "center", "fontsize": 8 if classes <= 10 else 6}
        for true, row in enumerate(counts):
            for guess, count in enumerate(row):
                if count:
                    axes.text(guess + 0.5, true + 0.5, f"{count:,}", **place)
        ticks = [number + 0.5 for number in range(classes)]
        axes.set_xticks(ticks, [str(number) for number in range(classes)])
        axes.set_yticks(ticks, [str(number) for number in range(classes)])
        axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="guessed class", ylabel="true class", aspect="equal")
    axes.invert_yaxis()
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


def _headline(found: dict, config: dict) -> tuple[str, list[tuple[str, str]]]:
    """The finding in one sentence, and cards with its numbers; one seed proves no equality."""
    arms, rungs = found["arms"], found["ladder"]
    students = [name for name in arms if name != "teacher"]
    name = next((name for name in reversed(LADDER) if name in arms), students[-1])
    arm, base = arms[name], arms.get("reference") if name != "reference" else None
    title, cards = NAMES.get(name, name), []

    def beside(text, cell):
        return text if base is None else f"{text}; reference {cell(base)}"

    if base is None:
        sentence = f"{title}: {arm['accuracy']:.1%} test accuracy after "
        sentence += f"{arm['seconds']:.1f} seconds of training"
    else:
        ratio = rungs[-1]["speedup"] if name in LADDER else arm["speedup"]
        sentence = f"{title}: {speed(ratio)} plain PyTorch with {arm['accuracy']:.1%} test "
        sentence += f"accuracy against {base['accuracy']:.1%}"
        reached = [one["seconds_to_target"] for one in (base, arm)]
        if None not in reached:
            ratio = reached[0] / reached[1]
            sentence = f"{title}: {config['target_accuracy']:.1%} test accuracy after "
            sentence += f"{reached[1]:.1f} seconds, plain PyTorch after {reached[0]:.1f}"
        cards = [(f"{ratio:.2f}×", f"the speed of plain PyTorch: {name} over reference")]
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
    return f"{sentence[0].upper()}{sentence[1:]} (one seed)", cards


def sections(folder: RunFolder) -> list[Section]:
    """A distillation, or nothing before a student's first epoch is done."""
    found, config = results(folder), folder.config["distill"]
    if found is None or not _first(found):
        return []
    made = [_speed_section(found), _accuracy_section(found, folder, config)]
    tested = {name: arm for name, arm in found["arms"].items() if "reliability" in arm}
    if tested:
        made.append(_calibration_section(tested, found["confusion"]))
    if found["follow"]:
        draw = functools.partial(_plot_difference, found)
        plots = {"loss_difference": Plot(draw, "Difference from the reference's loss")}
        made.append(Section("Does fused follow reference?", [_follow_table(found)], plots))
    return made


def _speed_section(found: dict) -> Section:
    phases = {name: found["arms"][name]["phases"] for name in _first(found)}
    tables, plots = [_phases(found)], {}
    if found["ladder"]:
        tables.insert(0, _ladder_table(found["ladder"]))
        plots["ladder"] = Plot(
            functools.partial(plot_ladder, found["ladder"]), "The speed-up ladder",
            "each bar adds one thing to the one above; pale: what that saves; bold: times "
            "reference's speed",
        )  # fmt: skip
    draw = functools.partial(plot_phases, phases, "seconds of training", "{:.1f} s".format)
    plots["phases"] = Plot(draw, "Where the time goes", "seconds of training by phase")
    return Section("Speed", tables, plots)


def _accuracy_section(found: dict, folder: RunFolder, config: dict) -> Section:
    headline, cards = _headline(found, config)
    size = config["image_size"]
    plots = {
        "accuracy": Plot(functools.partial(_plot_accuracy, found, by_time=False), "By epoch",
                         "test accuracy at each epoch's end"),
        "accuracy_by_time": Plot(functools.partial(_plot_accuracy, found, by_time=True), "By time",
                                 "the same, over seconds of training"),
        "loss": Plot(functools.partial(_plot_loss, found), "Loss of each step", "thick: its mean "
                     "over a fortieth of the run; alone's loss is the cross-entropy"),
    }  # fmt: skip
    if any(generation(name)[1] > 1 for name in found["arms"]):
        draw = functools.partial(_plot_generations, found)
        about = "each generation's student teaches the next"
        plots["generations"] = Plot(draw, "By generation", about)
    lead = [
        f"{config.get('student', 'mobilenet_v2')} taught by {config.get('teacher', 'resnet18')} on "
        f"{config['data']} at {size}x{size}, seed {config['seed']}; "
        f"{folder.config['machine']['processor']}. One seed says little about accuracy: kdkernels "
        "compare puts runs of several seeds together."
    ]
    kept = ("arms", "ladder", "follow", "checks", "confusion")
    return Section(
        "Accuracy", [_summary(found, config)], plots, results={key: found[key] for key in kept},
        checks=found["checks"], headline=headline, lead=lead, cards=cards,
        others=[arm["others"] for arm in found["arms"].values()],
    )  # fmt: skip


def _calibration_section(tested: dict, confusion: dict | None) -> Section:
    bins = {n: arm["reliability"] for n, arm in tested.items() if generation(n)[1] == 1}
    looks = {name: page.colour(name) for name in bins}
    about = f"how often an arm is right when it is so sure; bins of {FEW} images or more"
    tables = [_calibration_table(tested)]
    plots = {
        "reliability": Plot(functools.partial(plot_reliability, bins, looks), "Reliability", about)
    }
    if confusion:
        tables.append(_confused_table(confusion))
        plots["confusion"] = Plot(
            functools.partial(_plot_confusion, confusion),
            f"What {confusion['arm']} takes for what",
            "the most accurate student's test images; blue right, red wrong",
        )
    return Section("Calibration and confusion", tables, plots)
