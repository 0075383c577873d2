"""What experiments 1 and 3 have to show: the tables and plots of noise as a regulariser."""

import functools
import math

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from scipy import stats

from kdkernels.train import soft_regularization
from kdkernels.train.page import BLUE, COLOURS, INK, RED, SIZE
from kdkernels.train.report import Section, Table, duration
from kdkernels.train.run_folder import RunFolder

__all__ = ["FEW", "networks", "plot_reliability", "regression"]


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def _soft_tables(found: dict) -> list[Table]:
    s, mean = found["settings"], found["mean"]
    away = found["agreement"]["difference"]
    names = {"numpy": "NumPy loop", "torch": "PyTorch loop", "fused": "fused, one kernel"}
    rows = [
        [
            names[t["path"]] + (f", {t['replicas']:,} replicas" if t["replicas"] > 1 else ""),
            duration(t["seconds_per_replica"]),
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


def _plot_theta(found: dict) -> Figure:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    plot, mean = found["plot"], found["mean"]
    steps = range(len(plot["mean"]))
    axes.fill_between(
        steps, plot["low"], plot["high"], color=BLUE, alpha=0.18, lw=0, label="5 % to 95 % of them",
    )  # fmt: skip
    looks = {"numpy": ("-", 4.0), "torch": ("-", 2.2), "fused": ("--", 1.0)}
    names = {"numpy": "NumPy", "torch": "PyTorch", "fused": "fused"}
    for name, values in plot["paths"].items():
        style, width = looks[name]
        colour = INK if name == "fused" else COLOURS[name]
        label = f"one replica, {names[name]}"
        axes.plot(values, style, lw=width, color=colour, alpha=0.8, label=label)
    axes.plot(plot["mean"], color=BLUE, lw=2, label="mean over seeds")
    axes.axhline(mean["stationary"], color=RED, lw=1, ls=":", label="stationary value")
    axes.set(xlabel="step", ylabel="theta", xlim=(0, len(plot["mean"]) - 1))
    axes.legend(fontsize=7.5, ncols=2, loc="best")
    return figure


def _plot_histogram(found: dict) -> Figure:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    final, mean = found["plot"]["final"], found["mean"]
    axes.hist(final, bins=60, color=BLUE, alpha=0.55)
    axes.axvline(
        mean["stationary"], color=RED, lw=1.5, ls=":",
        label=f"stationary value {mean['stationary']:.4f}",
    )  # fmt: skip
    axes.axvline(
        mean["theta"], color=INK, lw=1,
        label=f"mean {mean['theta']:.4f} ± {mean['standard_error']:.4f}",
    )  # fmt: skip
    axes.set(xlabel="theta", ylabel="seeds")
    axes.margins(y=0.18)
    axes.legend(loc="upper right")
    return figure


def regression(folder: RunFolder) -> list[Section]:
    """Experiment 1, or nothing before it is done."""
    found = folder.read_json("soft_reg.json")
    if not found:
        return []
    settings, times = found["settings"], found["times"]
    alone = next(t for t in times if t["path"] == "torch" and t["replicas"] == 1)
    away = found["mean"]["standard_errors_away"]
    many = len(found["plot"]["final"])
    section = Section(
        "Experiment 1: soft-regularised linear regression",
        _soft_tables(found),
        {
            "theta_path": functools.partial(_plot_theta, found),
            "theta_histogram": functools.partial(_plot_histogram, found),
        },
        {
            "theta_path": ("Theta's path", f"{settings['replicas']:,} seeds, and one replica by "
                           "three programs with the same noise"),
            "theta_histogram": ("Where it ends", f"after {settings['steps']:,} steps, {many:,} "
                                "seeds"),
        },
        results={key: value for key, value in found.items() if key != "plot"},
        settings=settings,
        checks=found["checks"],
        headline=f"One kernel: {_ratio(alone['fused_is_faster'])} times faster than a PyTorch "
        f"loop, theta {abs(away):.1f} standard errors from the formula's",
    )  # fmt: skip
    return [section]


def _plot_noise(found: dict) -> Figure:
    arms = found["arms"]
    figure = Figure(figsize=(10, 1.1 + 0.4 * len(arms)), layout="constrained")
    titles = soft_regularization.MEASURES
    every = figure.subplots(1, len(titles), sharey=True)
    for axes, (measure, title) in zip(every, titles.items(), strict=True):
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
    every[0].invert_yaxis()
    return figure


def plot_reliability(arms: dict[str, list], colours: dict[str, str]) -> Figure:
    """Accuracy by confidence, and how many predictions are how sure.

    Args:
        arms: name -> the three lists of :func:`soft_regularization.reliability`.
        colours: name -> colour.
    """
    figure = Figure(figsize=(SIZE[0], 4.6), layout="constrained")
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    axes.plot([0, 1], [0, 1], color=INK, lw=1, ls=":", label="calibrated")
    for number, (name, bins) in enumerate(arms.items()):
        points = [(sure / n, right / n) for n, right, sure in zip(*bins, strict=True) if n >= FEW]
        look = {"color": colours[name], "marker": "osD^vPX"[number % 7], "ms": 4, "lw": 1.2}
        axes.plot([x for x, _ in points], [y for _, y in points], label=name, **look)
        counts = bins[0]
        middles = [(m + 0.5) / len(counts) for m in range(len(counts))]
        shares = [count / sum(counts) for count in counts]
        below.step(middles, shares, where="mid", color=colours[name], lw=1.2)
    axes.set(ylabel="accuracy", ylim=(0, 1.02))
    figure.legend(*axes.get_legend_handles_labels(), ncols=4, loc="outside upper center")
    below.set(xlabel="largest probability", ylabel="share of images", yscale="log", xlim=(0, 1))
    below.yaxis.set_major_formatter(lambda share, _: f"{share * 100:g} %")
    return figure


def networks(folder: RunFolder) -> list[Section]:
    """Experiment 3."""
    config, found = folder.config["soft_regularization"], soft_regularization.results(folder)
    bins = {name: arm["reliability"] for name, arm in found["arms"].items()}
    seeds = len(found["seeds"])
    section = Section(
        "Experiment 3: a network under four kinds of noise",
        _noise_tables(found, config),
        {
            "noise": functools.partial(_plot_noise, found),
            "reliability": functools.partial(plot_reliability, bins, COLOURS),
        },
        {
            "noise": ("Accuracy and calibration", "a dot a seed; bar: mean ± its standard error"),
            "reliability": ("Reliability", f"all seeds together; bins of {FEW} images or more"),
        },
        results=found,
        headline=f"{config['model']} on {config['data']} with noise in "
        f"{len(found['arms'].keys() - {'none'})} places, {seeds} seed{'s' * (seeds > 1)}: "
        + _best(found),
    )
    return [section]


def _best(found: dict) -> str:
    """Which arm is the most accurate and which the best calibrated, without a claim of chance."""
    by_accuracy, by_ece = (
        choose(found["arms"], key=lambda name: found["arms"][name][measure]["mean"])
        for choose, measure in ((max, "accuracy"), (min, "ece"))
    )
    accuracy, ece = (
        f"{found['arms'][name][measure]['mean']:.1%}"
        for name, measure in ((by_accuracy, "accuracy"), (by_ece, "ece"))
    )
    return f"highest accuracy {accuracy} ({by_accuracy}), lowest ECE {ece} ({by_ece})"
