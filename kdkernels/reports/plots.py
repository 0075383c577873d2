"""Plots that several experiments have, drawn within ``matplotlib.rc_context(page.STYLE)``."""

from collections.abc import Callable, Collection, Sequence

import numpy as np
import pandas
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, PercentFormatter

from kdkernels.reports.page import INK, MARKERS, PAPER, PHASE_COLOURS, SIZE, canvas, colour, legend
from kdkernels.reports.report import with_error
from kdkernels.train.loop import PHASES

FEW = 10
"""A bin of fewer predictions says little about its accuracy and is left out of the plot."""


def measures(
    curves: dict,
    xlabel: str,
    ylabel: str,
    teacher: float | None = None,
    *,
    whole: bool = False,
    percent: bool = True,
) -> Figure:
    """A curve an arm, arm -> (x, y), and the teacher's measure; ``whole``: x are numbers."""
    figure, axes = canvas()
    for place, (name, (x, y)) in enumerate(curves.items()):
        axes.plot(
            x,
            y,
            color=colour(name),
            label=name,
            marker=MARKERS[place % 7],
            ms=4,
            lw=1.3,
            ls="--" if name == "fused" else "-",
        )
    if teacher is not None:
        label = f"teacher {teacher:.1%}" if percent else f"teacher {teacher:.2f}"
        axes.axhline(teacher, color=colour("teacher"), ls=":", lw=1.2, label=label)
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set(xlabel=xlabel, ylabel=ylabel)
    if whole:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        axes.set_xlim(0, None)
    return legend(figure, axes)


def losses(curves: dict[str, list[float]], dashed: Collection[str]) -> Figure:
    """Each step's loss by arm, pale, and its mean over a fortieth of the run."""
    figure, axes = canvas()
    for name, values in curves.items():
        style, width = ("-", 3.0) if name == "reference" else ("-", 1.3)
        if name in dashed:
            style, width = "--", 1.5
        losses = pandas.Series(values)
        losses.index += 1
        window = max(1, len(losses) // 40)
        if window > 1:
            axes.plot(losses, lw=0.6, color=colour(name), alpha=0.2)
        means = losses.rolling(window, min_periods=1).mean()
        axes.plot(means, style, lw=width, color=colour(name), label=name)
    axes.set(xlabel="step", ylabel="training loss", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    return legend(figure, axes)


def differences(curves: dict[str, tuple[list[float], str, str]]) -> Figure:
    """Relative differences by step: label -> values, colour, line style."""
    figure, axes = canvas()
    for label, (values, look, style) in curves.items():
        # Equal losses have no place on a logarithmic axis: the floor stands for them.
        shown = np.maximum(values, 1e-8)
        axes.plot(range(1, len(shown) + 1), shown, style, color=look, lw=1, label=label)
    axes.set(xlabel="step", ylabel="relative difference", yscale="log", ylim=(5e-9, 300))
    axes.legend(loc="upper left")
    return figure


def bars(
    values: dict[str, float], label: str, colours: Sequence[str], texts: Sequence[str] = ()
) -> Figure:
    """A bar for each name, and a text behind it."""
    figure, axes = canvas(SIZE[0], 0.9 + 0.3 * len(values))
    drawn = axes.barh(list(values), list(values.values()), color=colours, height=0.62)
    if texts:
        axes.bar_label(drawn, texts, padding=4, fontsize=8)
        axes.set_xlim(0, max(values.values()) * 1.45)
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(xlabel=label)
    return figure


def phases(spent: dict[str, dict[str, float]], label: str, total: Callable[[float], str]) -> Figure:
    """A bar an arm of what it spends in each phase; ``total`` says its sum behind the bar."""
    figure, axes = canvas(SIZE[0], 1.3 + 0.4 * len(spent))
    frame = pandas.DataFrame(spent).T[list(PHASES)]
    frame.plot.barh(stacked=True, ax=axes, color=PHASE_COLOURS, width=0.66, ec=PAPER, lw=0.6)
    sums = frame.sum(axis=1)
    axes.bar_label(axes.containers[-1], map(total, sums), padding=4)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(xlabel=label, ylabel="", xlim=(0, sums.max() * 1.14))
    return legend(figure, axes)


def ladder(rungs: list[dict]) -> Figure:
    """A ladder's rungs as bars, each with what it saves of the one before."""
    figure, axes = canvas(SIZE[0], 0.55 + 0.62 * len(rungs))
    most = max(rung["seconds"] + rung.get("seconds_spread", 0) for rung in rungs)
    spread = any("speedup_spread" in rung for rung in rungs)
    for row, rung in enumerate(rungs):
        look, seconds, saved = colour(rung["arm"]), rung["seconds"], rung["saved"]
        axes.barh(
            row,
            seconds,
            color=look,
            height=0.42,
            xerr=rung.get("seconds_spread"),
            error_kw={"ecolor": INK, "capsize": 3, "lw": 1},
        )
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


def reliability(arms: dict[str, list]) -> Figure:
    """Accuracy by confidence, and how many predictions are how sure; by arm :func:`reliability`."""
    figure, (axes, below) = canvas(SIZE[0], 4.6, 2, 1, sharex=True, height_ratios=[3, 1])
    axes.plot([0, 1], [0, 1], color=INK, lw=1, ls=":", label="calibrated")
    for number, (name, bins) in enumerate(arms.items()):
        count, right, sure = np.array(bins)
        look, marker, many = colour(name), MARKERS[number % 7], count >= FEW
        x, y = (part[many] / count[many] for part in (sure, right))
        axes.plot(x, y, label=name, color=look, marker=marker, ms=4, lw=1.2)
        middles = (np.arange(len(count)) + 0.5) / len(count)
        below.step(middles, count / count.sum(), where="mid", color=look, lw=1.2)
    axes.set(ylabel="accuracy", ylim=(0, 1.02))
    below.set(xlabel="largest probability", ylabel="share of images", yscale="log", xlim=(0, 1))
    below.yaxis.set_major_formatter(lambda share, _: f"{share * 100:g} %")
    return legend(figure, axes, 4)
