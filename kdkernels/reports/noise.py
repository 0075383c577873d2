"""What experiments 1 and 3 have to show: the tables and plots of noise as a regulariser."""

import functools
import math
import statistics

import pandas
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from scipy import stats
from torch.nn import functional as F

from kdkernels.experiments import soft_regularization
from kdkernels.experiments.settings import PLACES, Network
from kdkernels.experiments.soft_regularization import (
    BINS,
    MEASURES,
    calibration_error,
    difference,
    reliability,
)  # fmt: skip
from kdkernels.reports.metrics import curves_of
from kdkernels.reports.page import BLUE, COLOURS, INK, RED, SIZE, canvas, legend, note
from kdkernels.reports.report import Plot, Section, Table, duration, table, with_error
from kdkernels.train.run_folder import RunFolder

FEW = 10
"""A bin of fewer predictions says little about its accuracy and is left out of the plot."""

CLEAR = 2.0
"""Standard errors from which on a difference is called one."""


# ---- experiment 1 --------------------------------------------------------------------------------


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def _times(found: dict) -> Table:
    s = found["settings"]
    names = {"numpy": "NumPy loop", "torch": "PyTorch loop", "fused": "fused, one kernel"}
    rows = (
        {
            "path": names[t["path"]] + f", {t['replicas']:,} replicas" * (t["replicas"] > 1),
            "time a replica": duration(t["seconds_per_replica"]),
            "times the fused path's": _ratio(t["fused_is_faster"]),
            "least .. most": f"{_ratio(t['least'])} .. {_ratio(t['most'])}",
        }
        for t in found["times"]
    )
    return table("Experiment 1: time of one replica", rows, note("regression_times", s=s))


def _theta(found: dict) -> Table:
    s, mean = found["settings"], found["mean"]
    values = {
        f"mean theta over {s['replicas']:,} seeds": f"{mean['theta']:.6f}",
        "its standard error": f"{mean['standard_error']:.6f}",
        "stationary value E[xy] / (E[x²] + σ² + λ/2)": f"{mean['stationary']:.6f}",
        "standard errors between the two": f"{mean['standard_errors_away']:+.2f}",
        "standard deviation of theta": f"{mean['spread']:.4f}",
        "its predicted value": f"{mean['spread_expected']:.4f}",
        "largest difference between paths, same noise": f"{found['agreement']['difference']:.1e}",
    }
    return table(
        "Experiment 1: theta",
        ({"quantity": name, "value": value} for name, value in values.items()),
        note("theta", s=s),
    )


def _plot_theta(found: dict) -> Figure:
    figure, axes = canvas()
    plot, mean = found["plot"], found["mean"]
    steps = range(len(plot["mean"]))
    axes.fill_between(
        steps, plot["low"], plot["high"], color=BLUE, alpha=0.18, lw=0, label="5 % to 95 % of them",
    )  # fmt: skip
    looks = {"numpy": ("NumPy", "-", 4.0, COLOURS["numpy"]),
             "torch": ("PyTorch", "-", 2.2, COLOURS["torch"]),
             "fused": ("fused", "--", 1.0, INK)}  # fmt: skip
    for path, values in plot["paths"].items():
        name, style, width, look = looks[path]
        label = f"one replica, {name}"
        axes.plot(values, style, lw=width, color=look, alpha=0.8, label=label)
    axes.plot(plot["mean"], color=BLUE, lw=2, label="mean over seeds")
    axes.axhline(mean["stationary"], color=RED, lw=1, ls=":", label="stationary value")
    axes.set(xlabel="step", ylabel="theta", xlim=(0, len(plot["mean"]) - 1))
    axes.legend(fontsize=7.5, ncols=2, loc="best")
    return figure


def _plot_histogram(found: dict) -> Figure:
    figure, axes = canvas()
    mean = found["mean"]
    axes.hist(found["plot"]["final"], bins=60, color=BLUE, alpha=0.55)
    stationary = f"stationary value {mean['stationary']:.4f}"
    axes.axvline(mean["stationary"], color=RED, lw=1.5, ls=":", label=stationary)
    label = f"mean {with_error(mean['theta'], mean['standard_error'], 4)}"
    axes.axvline(mean["theta"], color=INK, lw=1, label=label)
    axes.set(xlabel="theta", ylabel="seeds")
    axes.margins(y=0.18)
    axes.legend(loc="upper right")
    return figure


def regression(folder: RunFolder) -> list[Section]:
    """Experiment 1, or nothing before it is done."""
    found = folder.read_json("soft_reg.json")
    if not found:
        return []
    settings = found["settings"]
    alone = next(t for t in found["times"] if t["path"] == "torch" and t["replicas"] == 1)
    away = found["mean"]["standard_errors_away"]
    paths = f"{settings['replicas']:,} seeds, and one replica by three programs with the same noise"
    ends = f"after {settings['steps']:,} steps, {len(found['plot']['final']):,} seeds"
    return [
        Section(
            "Experiment 1: soft-regularised linear regression",
            [_times(found), _theta(found)],
            {
                "theta_path": Plot(functools.partial(_plot_theta, found), "Theta's path", paths),
                "theta_histogram": Plot(
                    functools.partial(_plot_histogram, found), "Where it ends", ends
                ),
            },
            results={key: value for key, value in found.items() if key != "plot"},
            settings=settings,
            checks=found["checks"],
            headline=f"One kernel: {_ratio(alone['fused_is_faster'])} times faster than a PyTorch "
            f"loop, theta {abs(away):.1f} standard errors from the formula's",
            others=[found.get("others")],
        )
    ]


# ---- experiment 3 --------------------------------------------------------------------------------


def results(folder: RunFolder) -> dict:
    """Read experiment 3's predictions and times.

    Returns:
        A dictionary ready for JSON: ``seeds``, and ``arms``: for each arm ``std``, ``seconds``
        (median of its runs' training), ``reliability`` (three lists, all seeds together), with
        noise on gradients ``noise_to_gradient`` (the ratio of the norms at the end of the first
        and of the last epoch, medians over seeds), and for
        each of ``MEASURES`` its ``values`` by seed, ``mean``, standard deviation ``spread`` (None
        for one seed) and, where there is an arm ``"none"``, the ``difference`` to it.
    """
    settings = Network(**folder.config["soft_regularization"])
    _, epochs, _ = curves_of(folder)
    arms = {arm: _arm(settings, folder, arm, epochs) for arm in settings.arms}
    if "none" in arms:
        for arm in arms.values():
            for measure in MEASURES:
                base = arms["none"][measure]["values"]
                arm[measure]["difference"] = difference(arm[measure]["values"], base)
    return {"seeds": list(soft_regularization.seeds(settings)), "arms": arms}


def _arm(settings: Network, folder: RunFolder, arm: str, epochs: dict) -> dict:
    """An arm's entry of :func:`results`, without the difference."""
    rows, bins, runs = [], torch.zeros(3, BINS, dtype=torch.float64), []
    for seed in soft_regularization.seeds(settings):
        name = soft_regularization.learner_name(seed, arm)
        logits, labels = soft_regularization.finished(folder, name)
        rows.append(
            {
                "accuracy": (logits.argmax(1) == labels).double().mean().item(),
                "ece": calibration_error(logits, labels),
                "loss": F.cross_entropy(logits.double(), labels).item(),
            }
        )
        bins += torch.stack(reliability(logits, labels))
        runs.append(epochs[name])
    found = {
        "std": settings.std(arm), "reliability": bins.tolist(),
        "seconds": statistics.median(sum(line["seconds"] for line in run) for run in runs),
    }  # fmt: skip
    ratios = [
        [run[when]["noise_to_gradient"] for run in runs if "noise_to_gradient" in run[when]]
        for when in (0, -1)
    ]
    if all(ratios):
        found["noise_to_gradient"] = [statistics.median(ratio) for ratio in ratios]
    for measure, values in pandas.DataFrame(rows).items():
        spread = values.std() if len(values) > 1 else None
        found[str(measure)] = {"values": values.tolist(), "mean": values.mean(), "spread": spread}
    return found


_SCALES = {"accuracy": (100, 2), "ece": (100, 2), "loss": (1, 4)}
"""Of a measure: what it is multiplied by, percentages by 100, and digits."""


def _cell(measure: str, value: float, error: float | None, sign: str = "") -> str:
    scale, digits = _SCALES[measure]
    return with_error(value * scale, None if error is None else error * scale, digits, sign)


def _heading(measure: str, unit: str) -> str:
    return MEASURES[measure] + f", {unit}" * (_SCALES[measure][0] == 100)


def _noise_table(found: dict, config: dict) -> Table:
    arms = found["arms"]
    text = note("networks", c=config, seeds=found["seeds"], arms=arms, places=PLACES)
    rows = (
        {"arm": name, "std, λ": f"{arm['std']:g}" if name != "none" else ""}
        | {_heading(m, "%"): _cell(m, arm[m]["mean"], arm[m]["spread"]) for m in MEASURES}
        | {"seconds a run (median)": f"{arm['seconds']:.1f}"}
        for name, arm in arms.items()
    )
    return table("Experiment 3: accuracy and calibration", rows, text)


def _difference_table(found: dict) -> Table:
    seeds, rows, words = len(found["seeds"]), [], []
    for name, arm in found["arms"].items():
        if name == "none":
            continue
        row, clear = {"arm": name}, []
        for measure in MEASURES:
            apart = arm[measure]["difference"]
            away = apart["standard_errors"]
            cell = _cell(measure, apart["mean"], apart["standard_error"], "+")
            row[_heading(measure, "points")] = cell + (
                f" ({away:+.1f})" if away is not None else ""
            )
            if away is not None and abs(away) > CLEAR:
                clear.append(f"{MEASURES[measure]} {'higher' if away > 0 else 'lower'}")
        rows.append(row)
        words.append(f"{name}: {', '.join(clear) or 'nothing'}.")
    chance = 2 * stats.t.sf(CLEAR, seeds - 1) if seeds > 1 else None
    text = note(
        "differences", seeds=seeds, clear=f"{CLEAR:g}", words=words, chance=chance,
        entries=len(rows) * len(MEASURES),
    )  # fmt: skip
    return table("Experiment 3: differences from none", rows, text)


def _plot_noise(found: dict) -> Figure:
    arms = found["arms"]
    figure, every = canvas(10, 1.1 + 0.4 * len(arms), 1, len(MEASURES), sharey=True)
    for axes, (measure, title) in zip(every, MEASURES.items(), strict=True):
        for row, (name, arm) in enumerate(arms.items()):
            values, mean = arm[measure]["values"], arm[measure]["mean"]
            error, look = (arm[measure]["spread"] or 0.0) / math.sqrt(len(values)), COLOURS[name]
            axes.plot(values, [row] * len(values), "o", color=look, alpha=0.4, ms=5, mew=0)
            axes.errorbar(mean, row, xerr=error, fmt="|", color=look, ms=16, mew=2, capsize=4)
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
    """Accuracy by confidence, and how many predictions are how sure; by arm :func:`reliability`."""
    figure, (axes, below) = canvas(SIZE[0], 4.6, 2, 1, sharex=True, height_ratios=[3, 1])
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
    below.set(xlabel="largest probability", ylabel="share of images", yscale="log", xlim=(0, 1))
    below.yaxis.set_major_formatter(lambda share, _: f"{share * 100:g} %")
    return legend(figure, axes, 4)


def networks(folder: RunFolder) -> list[Section]:
    """Experiment 3."""
    config, found = folder.config["soft_regularization"], results(folder)
    arms, seeds = found["arms"], len(found["seeds"])
    bins = {name: arm["reliability"] for name, arm in arms.items()}
    tables = [_noise_table(found, config)]
    if "none" in arms and len(arms) > 1:
        tables.append(_difference_table(found))
    return [
        Section(
            "Experiment 3: a network under four kinds of noise",
            tables,
            {
                "noise": Plot(functools.partial(_plot_noise, found), "Accuracy and calibration",
                              "a dot a seed; bar: mean ± its standard error"),
                "reliability": Plot(functools.partial(plot_reliability, bins, COLOURS),
                                    "Reliability",
                                    f"all seeds together; bins of {FEW} images or more"),
            },
            results=found,
            headline=f"{config['model']} on {config['data']} with noise in "
            f"{len(arms.keys() - {'none'})} places, {seeds} seed{'s' * (seeds > 1)}: "
            + _best(arms),
        )
    ]  # fmt: skip


def _best(arms: dict) -> str:
    """Which arm is the most accurate and which the best calibrated, without a claim of chance."""
    accuracy = {name: arm["accuracy"]["mean"] for name, arm in arms.items()}
    ece = {name: arm["ece"]["mean"] for name, arm in arms.items()}
    high, low = max(accuracy, key=accuracy.__getitem__), min(ece, key=ece.__getitem__)
    return f"highest accuracy {accuracy[high]:.1%} ({high}), lowest ECE {ece[low]:.1%} ({low})"
