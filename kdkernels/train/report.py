"""The tables, the plots and report.html of a run, made from what its folder holds."""

import base64
import dataclasses
import io
import math
import os
import platform
import statistics
from pathlib import Path

import jinja2
import matplotlib
import torchvision
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from scipy import stats

import kdkernels
from kdkernels import info
from kdkernels.train import export, soft_regularization
from kdkernels.train.distillation import ARMS, CONTROL, NOISY, apart
from kdkernels.train.loop import PHASES
from kdkernels.train.run_folder import RunFolder

__all__ = ["Table", "distillation_results", "machine", "write"]

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

COLOURS = {
    "alone": "#7f7f7f", "reference": "#d95f02", "fused": "#1b6ca8", "full": "#2a9d5c",
    "numpy": "#7f7f7f", "torch": "#d95f02", "teacher": "#6a4c93", "noisy": "#c1121f",
    "none": "#7f7f7f", "input": "#1b6ca8", "gradient": "#d95f02", "parameter": "#2a9d5c",
    "regularizer": "#6a4c93",
}  # fmt: skip
PHASE_COLOURS = ("#bdbdbd", "#6a4c93", "#1b6ca8", "#d62728", "#f0a500", "#2a9d5c")
STYLE = {
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.alpha": 0.25, "legend.frameon": False, "figure.dpi": 130,
}  # fmt: skip


@dataclasses.dataclass
class Table:
    """A table for the terminal and for the report.

    Attributes:
        title: above it.
        columns: headings, with units.
        rows: cells as they are shown; the first is a name, the others are numbers.
        note: what was measured and how, below it.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""


def machine(threads: int | None = None) -> dict[str, str]:
    """What the run ran on: processor, threads, versions."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [r for r in cpuinfo.read_text().splitlines() if r.startswith("model name")]
        name = names[0].split(":", 1)[1].strip() if names else name
    facts = info.collect()
    found = {
        "processor": f"{name}, {os.cpu_count()} cores visible; kernels use {facts['isa']}",
        "threads": str(threads or facts["threads"]),
        "versions": f"kdkernels {kdkernels.__version__}, torch {facts['torch']}, torchvision "
        f"{torchvision.__version__}, Python {facts['python']}",
    }
    if facts["gpus"]:
        found["GPUs"] = ", ".join(facts["gpus"])
    return found


def _time(seconds: float) -> str:
    for unit, size in (("s", 1), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def distillation_results(folder: RunFolder) -> dict | None:
    """Read experiment 2's metrics.

    Returns:
        None where there are none yet; otherwise ``losses`` (learner -> loss of each step),
        ``epochs`` (learner -> its epoch lines), ``arms`` (a row each for the tables),
        ``apart`` (relative difference from the reference's losses, a list a curve), ``follow``
        (the largest of them), and ``checks``.
    """
    losses, epochs, twins = {}, {}, []
    for line in folder.metrics():
        if line["kind"] == "step":
            losses.setdefault(line["learner"], []).append(line["loss"])
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
    base = arms.get("reference")
    for name, arm in arms.items():
        if base is None or name == "teacher":
            continue
        arm["speedup"] = base["seconds"] / arm["seconds"]
        pairs = zip(epochs["reference"], epochs[name], strict=False)
        ratios = [a["seconds"] / b["seconds"] for a, b in pairs]
        arm["epoch_speedup"] = statistics.median(ratios)
        arm["epoch_speedup_range"] = (min(ratios), max(ratios))
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
            "first_epoch": TIMES_CONTROL * followed["control"],
        }
        checks = [
            {
                "name": f"fused follows reference: {FOLLOW[key]}", "value": followed[key],
                "limit": limit, "passed": followed[key] <= limit,
            }
            for key, limit in limits.items()
        ]  # fmt: skip
    return {
        "losses": losses, "epochs": epochs, "arms": arms, "apart": curves, "follow": followed,
        "checks": checks,
    }  # fmt: skip


def _soft_tables(found: dict) -> list[Table]:
    s, mean = found["settings"], found["mean"]
    away = found["agreement"]["difference"]
    names = {"numpy": "NumPy loop", "torch": "PyTorch loop", "fused": "fused, one kernel"}
    rows = [
        [
            names[t["path"]] + (f", {t['replicas']:,} replicas" if t["replicas"] > 1 else ""),
            _time(t["seconds_per_replica"]),
            _ratio(t["fused_is_faster"]),
            f"{_ratio(t['least'])} .. {_ratio(t['most'])}",
        ]
        for t in found["times"]
    ]
    timed = Table(
        "Experiment 1: time of one replica",
        ["path", "time a replica", "times the fused path's", "least .. most"],
        rows,
        f"{s['steps']:,} steps, 100 samples, noise {s['noise']}. Median of {s['repeats']} runs, "
        "the paths in turn; ratios are of runs of the same turn and the same number of "
        "replicas. Every path draws its own noise: NumPy standard_normal in fp64, torch.randn in "
        "fp32, the kernel's Philox normals in fp32 with fp64 arithmetic. With several replicas "
        "the NumPy and the PyTorch loop are vectorised over them, and the time of the run is "
        "divided by their number."
        + (
            " With one eps for all samples the kernel needs only four moments of the data, so "
            "part of its gain is algebra: its step costs the same for any number of samples."
            if s["noise"] == "per-step"
            else ""
        ),
    )
    values = Table(
        "Experiment 1: theta",
        ["quantity", "value"],
        [
            [f"mean theta over {s['replicas']:,} seeds", f"{mean['theta']:.6f}"],
            ["its standard error", f"{mean['standard_error']:.6f}"],
            ["stationary value E[xy] / (E[x²] + σ² + λ/2)", f"{mean['stationary']:.6f}"],
            ["standard errors between the two", f"{mean['standard_errors_away']:+.2f}"],
            ["standard deviation of theta", f"{mean['spread']:.4f}"],
            ["its predicted value", f"{mean['spread_expected']:.4f}"],
            ["largest difference between paths, same noise", f"{away:.1e}"],
        ],
        f"lr {s['lr']}, λ {s['lam']}, σ {s['sigma']}. The derivation is in the docstring of "
        "kdkernels.train.soft_regression.stationary.",
    )  # fmt: skip
    return [timed, values]


def _distillation_tables(found: dict, config: dict) -> list[Table]:
    arms = found["arms"]
    rows = []
    for name, arm in arms.items():
        spread = arm.get("epoch_speedup_range")
        rows.append(
            [
                name,
                f"{arm['accuracy']:.1%}",
                f"{arm['best']:.1%}",
                str(arm["epochs"]),
                f"{arm['seconds']:.1f}",
                f"{arm['epoch_seconds']:.2f}",
                f"{arm['speedup']:.2f}" if "speedup" in arm else "",
                "{:.2f} ({:.2f} .. {:.2f})".format(arm["epoch_speedup"], *spread) if spread else "",
            ]
        )
        if config["target_accuracy"] is not None:
            reached = arm["seconds_to_target"]
            rows[-1].append("not reached" if reached is None else f"{reached:.1f}")
    size = config["image_size"]
    summary = Table(
        "Experiment 2: accuracy and time",
        ["arm", "test accuracy", "best", "epochs", "seconds", "seconds an epoch (median)",
         "speed-up over reference", "by epoch: median (range)"]
        + (["seconds to target"] if config["target_accuracy"] is not None else []),
        rows,
        f"{config['data']} at {size}x{size}, batch {config['batch_size']}, lr {config['lr']}, "
        f"temperature {config['temperature']}, alpha {config['alpha']}. Seconds are of training "
        "steps; testing and checkpoints are left out, the full arm's one pass of the teacher is "
        "counted in its first epoch. The arms take turns epoch by epoch. In the first epochs "
        "BatchNorm's running averages trail the weights, and tests are near chance. "
        + " ".join(f"{name}: {ARMS[name].about}." for name in arms if name in ARMS)
        + (
            f" {NOISY}: full, with {config['noise']} noise of std {config['noise_std']:g}"
            + (" / (1 + step)^0.275" if config["noise"] == "gradient" else "")
            + " on the student."
            if NOISY in arms
            else ""
        ),
    )  # fmt: skip
    phases = Table(
        "Experiment 2: seconds by phase",
        ["arm", *PHASES, "loss alone, a step"],
        [
            [
                name,
                *(f"{arm['phases'][p]:.2f}" if arm["phases"][p] >= 0.005 else "" for p in PHASES),
                _time(arm["phases"]["loss"] / arm["steps"]),
            ]
            for name, arm in arms.items()
        ],
        "Sums over all epochs. The fused loss makes its gradient in the forward call, so part of "
        "what PyTorch does under backward stands under loss. For the teacher, student forward is "
        "its own.",
    )
    tables = [summary, phases]
    if found["follow"]:
        limits = {check["name"]: f"{check['limit']:.2g}" for check in found["checks"]}
        tables.append(
            Table(
                "Experiment 2: does fused follow reference?",
                ["relative difference of the training loss", "value", "must be at most"],
                [
                    [
                        text,
                        f"{found['follow'][key]:.2g}",
                        limits.get(f"fused follows reference: {text}", ""),
                    ]
                    for key, text in FOLLOW.items()
                ],
                "Both do the same procedure on the same batches and differ by rounding only. "
                "Training magnifies that from step to step, whatever the loss: the control is "
                "the reference once more, with the teacher's predictions rounded otherwise, and "
                f"fused may stray {TIMES_CONTROL:g} times as far in the first epoch.",
            )
        )
    return tables


FEW = 10
"""A bin of fewer predictions says little about its accuracy and is left out of the plot."""

CLEAR = 2.0
"""Standard errors from which on a difference is called one."""


def _with(value: float, error: float | None, unit: str, sign: str = "") -> str:
    """``value ± error``, percentages for the unit "%"."""
    scale, digits = (100, 2) if unit == "%" else (1, 4)
    text = f"{value * scale:{sign}.{digits}f}"
    return text + (f" ± {error * scale:.{digits}f}" if error is not None else "")


def _noise_tables(found: dict, config: dict) -> list[Table]:
    arms, seeds = found["arms"], len(found["seeds"])
    units = {"accuracy": "%", "ece": "%", "loss": ""}
    names = soft_regularization.MEASURES

    def heading(measure):
        return names[measure] + (", %" if units[measure] else "")

    summary = Table(
        "Experiment 3: accuracy and calibration",
        ["arm", "std, λ", *map(heading, names), "seconds a run (median)"],
        [
            [
                name,
                f"{arm['std']:g}" if name != "none" else "",
                *(_with(arm[m]["mean"], arm[m]["spread"], units[m]) for m in names),
                f"{arm['seconds']:.1f}",
            ]
            for name, arm in arms.items()
        ],
        f"{config['model']} on {config['data']} at {config['image_size']}x{config['image_size']}, "
        f"{config['epochs']} epochs, batch {config['batch_size']}, Adam, lr {config['lr']}; "
        + (
            f"mean ± standard deviation over seeds {found['seeds'][0]} to {found['seeds'][-1]}. "
            if seeds > 1
            else f"seed {found['seeds'][0]}. "
        )
        + f"ECE: expected calibration error, {soft_regularization.BINS} bins of equal width (Guo "
        "et al., arXiv 1706.04599). The test loss is the cross-entropy. Runs follow each other, "
        "so their seconds are rough. "
        + " ".join(f"{name}: {soft_regularization.ARMS[name]}." for name in arms)
        + (
            " Its mean over eps is the plain loss; what parameter's noise does beyond it is of "
            "higher order in std."
            if {"parameter", "regularizer"} <= arms.keys()
            else ""
        )
        + (
            " The noise on the gradients had {:.2g} times their norm after the first epoch and "
            "{:.2g} times after the last (medians over seeds).".format(*ratios)
            if (ratios := arms.get("gradient", {}).get("noise_to_gradient"))
            else ""
        ),
    )
    if "none" not in arms or len(arms) == 1:
        return [summary]

    rows, words = [], []
    for name, arm in arms.items():
        if name == "none":
            continue
        cells, clear = [], []
        for measure in names:
            apart = arm[measure]["difference"]
            away = apart["standard_errors"]
            cells.append(_with(apart["mean"], apart["standard_error"], units[measure], "+"))
            if away is not None:
                cells[-1] += f" ({away:+.1f})"
                if abs(away) > CLEAR:
                    direction = "higher" if away > 0 else "lower"
                    clear.append(f"{names[measure]} {direction}")
        rows.append([name, *cells])
        words.append(f"{name}: {', '.join(clear) or 'nothing'}.")
    note = "Differences of the same seed's runs: same first weights, same batches."
    if seeds > 1:
        chance = 2 * stats.t.sf(CLEAR, seeds - 1)
        note = (
            f"Mean over {seeds} seeds of the same seed's difference (same first weights, same "
            "batches) ± its standard error; in brackets how many of those it is away from 0. "
            f"Away by more than {CLEAR:g}: {' '.join(words)} Without any effect {chance:.0%} of "
            f"such entries would be (Student's t, {seeds - 1} degrees of freedom), about "
            f"{chance * len(rows) * len(names):.1f} of these {len(rows) * len(names)}. The "
            "standard errors are over weights, batches and noise; the test images are always the "
            "same."
        )
    titles = (f"{names[m]}, points" if units[m] else names[m] for m in names)
    return [summary, Table("Experiment 3: differences from none", ["arm", *titles], rows, note)]


def _checks(found: list[dict]) -> Table:
    return Table(
        "Checks",
        ["check", "value", "limit", "result"],
        [
            [
                check["name"],
                f"{check['value']:.2g}",
                f"{check['limit']:.2g}",
                "passed" if check["passed"] else "FAILED",
            ]
            for check in found
        ],
    )


def _plot_theta(found: dict) -> Figure:
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    plot, mean = found["plot"], found["mean"]
    steps = range(len(plot["mean"]))
    axes.fill_between(
        steps, plot["low"], plot["high"], color=COLOURS["fused"], alpha=0.15, lw=0,
        label=f"5 % to 95 % of {found['settings']['replicas']:,} seeds",
    )  # fmt: skip
    looks = {"numpy": ("-", 4.0), "torch": ("-", 2.2), "fused": ("--", 1.0)}
    names = {"numpy": "NumPy", "torch": "PyTorch", "fused": "fused"}
    for name, values in plot["paths"].items():
        style, width = looks[name]
        colour = "black" if name == "fused" else COLOURS[name]
        axes.plot(
            values, style, lw=width, color=colour, alpha=0.8, label=f"one replica, {names[name]}"
        )
    axes.plot(plot["mean"], color=COLOURS["fused"], lw=2, label="mean over seeds")
    axes.axhline(mean["stationary"], color="#c1121f", lw=1, ls=":", label="stationary value")
    axes.set(xlabel="step", ylabel="theta", title="Theta's path", xlim=(0, len(plot["mean"]) - 1))
    axes.legend(fontsize=8, ncols=2, loc="best")
    return figure


def _plot_histogram(found: dict) -> Figure:
    figure = Figure(figsize=(7.5, 3.8), layout="constrained")
    axes = figure.subplots()
    final, mean = found["plot"]["final"], found["mean"]
    axes.hist(final, bins=60, color=COLOURS["fused"], alpha=0.55)
    axes.axvline(
        mean["stationary"], color="#c1121f", lw=1.5, ls=":",
        label=f"stationary value {mean['stationary']:.4f}",
    )  # fmt: skip
    axes.axvline(
        mean["theta"], color="black", lw=1,
        label=f"mean {mean['theta']:.4f} ± {mean['standard_error']:.4f}",
    )  # fmt: skip
    title = f"Theta after {found['settings']['steps']:,} steps, {len(final):,} seeds"
    axes.set(xlabel="theta", ylabel="seeds", title=title)
    axes.legend(fontsize=9)
    return figure


def _plot_loss(found: dict) -> Figure:
    arms = [name for name in found["arms"] if name != "teacher"]
    followed = found["follow"] is not None
    figure = Figure(figsize=(7.5, 7 if followed else 4), layout="constrained")
    rows = figure.subplots(
        2 if followed else 1, 1, sharex=True, squeeze=False,
        height_ratios=[3, 2] if followed else [1],
    )[:, 0]  # fmt: skip
    axes = rows[0]
    looks = {"reference": ("-", 3.0), "fused": ("--", 1.4)}
    for name in arms:
        style, width = looks.get(name, ("-", 1.2))
        label = f"{name} (cross-entropy only)" if name == "alone" else name
        losses = found["losses"][name]
        axes.plot(
            range(1, len(losses) + 1), losses, style, lw=width, color=COLOURS[name], label=label
        )
    axes.set(ylabel="training loss", title="Loss of each step", yscale="log")
    axes.legend(fontsize=9)
    if followed:
        looks = {
            "fused": ("fused, its own run", COLOURS["fused"], "-"),
            CONTROL: ("control: the reference again, rounded otherwise", "black", "--"),
            "same logits": ("fused, on the same logits", COLOURS["full"], "-"),
        }
        for name, (label, colour, style) in looks.items():
            # Equal losses have no place on a logarithmic axis: the floor stands for them.
            shown = [max(value, 1e-8) for value in found["apart"][name]]
            rows[1].plot(range(1, len(shown) + 1), shown, style, color=colour, lw=1, label=label)
        rows[1].set(ylabel="relative difference", yscale="log", ylim=(5e-9, 3))
        rows[1].set_title("Difference from the reference's loss")
        rows[1].legend(fontsize=8, loc="center right")
    rows[-1].set_xlabel("step")
    return figure


def _plot_accuracy(found: dict) -> Figure:
    figure = Figure(figsize=(7.5, 4), layout="constrained")
    axes, over = figure.subplots(1, 2, sharey=True)
    for name, lines in found["epochs"].items():
        if name in ("teacher", CONTROL):
            continue
        values = [line["accuracy"] for line in lines]
        style = "--" if name == "fused" else "-"
        look = {"color": COLOURS[name], "marker": "o", "ms": 4, "ls": style}
        axes.plot([line["epoch"] for line in lines], values, label=name, **look)
        spent, total = [], 0.0
        for line in lines:
            total += line["seconds"]
            spent.append(total)
        over.plot(spent, values, **look)
    if "teacher" in found["arms"]:
        best = found["arms"]["teacher"]["accuracy"]
        for axis in (axes, over):
            axis.axhline(
                best, color=COLOURS["teacher"], ls=":", lw=1.2, label=f"teacher {best:.1%}"
            )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set(xlabel="epoch", ylabel="test accuracy", title="By epoch")
    over.set(xlabel="seconds of training", title="By time", xlim=(0, None))
    axes.legend(fontsize=9, loc="lower right")
    return figure


def _plot_phases(found: dict) -> Figure:
    arms = {n: a for n, a in found["arms"].items() if n != "teacher"}
    figure = Figure(figsize=(7.5, 1.5 + 0.55 * len(arms)), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(arms)
    for phase, colour in zip(PHASES, PHASE_COLOURS, strict=True):
        widths = [arm["phases"][phase] for arm in arms.values()]
        axes.barh(list(arms), widths, left=left, color=colour, label=phase, height=0.62)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for row, total in enumerate(left):
        axes.annotate(
            f"{total:.1f} s", (total, row), (4, 0), textcoords="offset points", va="center"
        )
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(xlabel="seconds of training", xlim=(0, max(left) * 1.12))
    figure.suptitle("Where the time goes", fontsize=12)
    figure.legend(
        *axes.get_legend_handles_labels(), ncols=6, fontsize=8, loc="outside lower center"
    )
    return figure


def _plot_noise(found: dict) -> Figure:
    arms = found["arms"]
    figure = Figure(figsize=(9, 1.2 + 0.5 * len(arms)), layout="constrained")
    titles = soft_regularization.MEASURES
    for axes, (measure, title) in zip(
        figure.subplots(1, len(titles), sharey=True), titles.items(), strict=True
    ):
        for row, (name, arm) in enumerate(arms.items()):
            values, mean = arm[measure]["values"], arm[measure]["mean"]
            error = (arm[measure]["spread"] or 0.0) / math.sqrt(len(values))
            axes.plot(values, [row] * len(values), "o", color=COLOURS[name], alpha=0.4, ms=5, mew=0)
            axes.errorbar(
                mean, row, xerr=error, fmt="|", color=COLOURS[name], ms=16, mew=2, capsize=4
            )
        if "none" in arms:
            axes.axvline(arms["none"][measure]["mean"], color=COLOURS["none"], lw=1, ls=":")
        if measure != "loss":
            axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        axes.grid(axis="y", visible=False)
        axes.set(title=title[0].upper() + title[1:], yticks=range(len(arms)))
        axes.set_yticklabels(list(arms))
        axes.margins(y=0.15)
    axes.invert_yaxis()
    figure.supxlabel("a dot a seed; bar: mean ± its standard error", fontsize=9)
    return figure


def _plot_reliability(found: dict) -> Figure:
    figure = Figure(figsize=(5.5, 5.5), layout="constrained")
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    axes.plot([0, 1], [0, 1], color="black", lw=1, ls=":", label="calibrated")
    for name, arm in found["arms"].items():
        bins = zip(*arm["reliability"], strict=True)
        points = [(confidence / n, right / n) for n, right, confidence in bins if n >= FEW]
        look = {"color": COLOURS[name], "marker": "o", "ms": 4, "lw": 1.2}
        axes.plot([x for x, _ in points], [y for _, y in points], label=name, **look)
        counts = arm["reliability"][0]
        middles = [(m + 0.5) / len(counts) for m in range(len(counts))]
        shares = [count / sum(counts) for count in counts]
        below.step(middles, shares, where="mid", color=COLOURS[name], lw=1.2)
    axes.set(ylabel="accuracy", ylim=(0, 1.02))
    axes.set_title(f"Reliability: all seeds, bins of {FEW} images or more")
    axes.legend(fontsize=9)
    below.set(xlabel="largest probability", ylabel="share of images", yscale="log", xlim=(0, 1))
    below.yaxis.set_major_formatter(lambda share, _: f"{share * 100:g} %")
    return figure


PAGE = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
    """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>kdkernels: {{ name }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; }
h3 { margin-bottom: .4rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #e5e5e5; text-align: right;
  vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
.note { color: #666; font-size: .85rem; max-width: 50rem; }
figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; }
.passed { color: #1a7f37; } .FAILED { color: #c1121f; font-weight: bold; }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: .85rem; }
</style></head><body>
<h1>kdkernels: {{ name }}</h1>
<p class="note">{% for key, value in machine.items() %}{{ key }}: {{ value }}<br>{% endfor %}</p>
{% for section in sections %}
<h2>{{ section.title }}</h2>
{% for table in section.tables %}
<h3>{{ table.title }}</h3>
<div class="scroll"><table><thead><tr>
{% for column in table.columns %}<th>{{ column }}</th>{% endfor %}

</tr></thead><tbody>
{% for row in table.rows %}
<tr>{% for cell in row %}<td class="{{ cell }}">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% if table.note %}<p class="note">{{ table.note }}</p>{% endif %}
{% endfor %}
{% for plot in section.plots %}
<figure><img src="data:image/png;base64,{{ plot.png }}" alt="{{ plot.alt }}"></figure>
{% endfor %}
{% endfor %}
<h2>Settings</h2>
<pre>{{ settings }}</pre>
</body></html>
"""
)


def write(folder: RunFolder) -> tuple[list[Table], bool]:
    """Write plots/*.png, results.json and report.html from what the folder holds.

    Returns:
        The tables, to be printed, and whether every check passed.
    """
    soft = folder.read_json("soft_reg.json")
    distilled = distillation_results(folder) if "distill" in folder.config else None
    regularised = None
    if "soft_regularization" in folder.config:
        regularised = soft_regularization.results(folder)
    sections, checks = [], []
    if soft:
        plots = {"theta_path": _plot_theta, "theta_histogram": _plot_histogram}
        title = "Experiment 1: soft-regularised linear regression"
        sections.append((title, _soft_tables(soft), plots, soft))
        checks += soft["checks"]
    if distilled:
        plots = {"loss": _plot_loss, "accuracy": _plot_accuracy, "phases": _plot_phases}
        tables = _distillation_tables(distilled, folder.config["distill"])
        title = "Experiment 2: ResNet-18 to MobileNetV2"
        if any(name != "teacher" for name in distilled["arms"]):
            sections.append((title, tables, plots, distilled))
        checks += distilled["checks"]
    if regularised:
        plots = {"noise": _plot_noise, "reliability": _plot_reliability}
        tables = _noise_tables(regularised, folder.config["soft_regularization"])
        title = "Experiment 3: a network under four kinds of noise"
        sections.append((title, tables, plots, regularised))

    exported = folder.read_json("export/results.json")
    if exported:
        sections.append(("Export", export.tables(exported), {}, exported))

    shown, every = [], []
    with matplotlib.rc_context(STYLE):
        for title, tables, plots, found in sections:
            pictures = []
            for name, draw in plots.items():
                picture = io.BytesIO()
                draw(found).savefig(picture, format="png")
                folder.write_bytes(f"plots/{name}.png", picture.getvalue())
                encoded = base64.b64encode(picture.getvalue()).decode()
                pictures.append({"png": encoded, "alt": name.replace("_", " ")})
            shown.append({"title": title, "tables": tables, "plots": pictures})
            every += tables
    if checks:
        every.append(_checks(checks))
        shown.insert(0, {"title": "Summary", "tables": [every[-1]], "plots": []})
    results = {
        "machine": folder.config["machine"],
        "soft_reg": {k: v for k, v in soft.items() if k != "plot"} if soft else None,
        "distill": {k: distilled[k] for k in ("arms", "follow", "checks")} if distilled else None,
        "soft_regularization": regularised,
    }
    folder.write_json("results.json", results)
    asked = {
        "soft-reg": folder.config.get("soft_regularization", soft["settings"] if soft else {}),
        "distill": folder.config.get("distill", {}),
    }
    settings = "\n".join(
        f"{group}: {key} = {value}"
        for group, found in asked.items()
        for key, value in found.items()
    )
    page = PAGE.render(
        name=folder.path.name, machine=folder.config["machine"], sections=shown, settings=settings
    )
    folder.write_bytes("report.html", page.encode())
    return every, all(check["passed"] for check in checks)
