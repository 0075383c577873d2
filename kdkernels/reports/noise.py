"""What experiments 1 and 3 have to show: the tables and plots of noise as a regulariser."""

import math
import statistics

import numpy as np
import pandas
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from scipy import stats
from torch.nn import functional as F

from kdkernels.experiments import soft_regularization
from kdkernels.experiments.settings import PLACES, Network
from kdkernels.experiments.soft_regularization import (
    MEASURES,
    calibration_error,
    difference,
    reliability,
)
from kdkernels.measuring import duration
from kdkernels.reports import metrics, page, plots
from kdkernels.reports.page import BLUE, COLOURS, INK, RED, note
from kdkernels.reports.report import Cell, Plot, Section, Table, table, with_error
from kdkernels.train.run_folder import RunFolder

CLEAR = 2.0
"""Standard errors from which on a difference is called one."""


# ---- experiment 1 --------------------------------------------------------------------------------


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def _times(found: dict) -> Table:
    names = {"numpy": "NumPy loop", "torch": "PyTorch loop", "fused": "fused, one kernel"}
    columns: dict[str, Cell] = {
        "path": lambda t: names[t["path"]] + f", {t['replicas']:,} replicas" * (t["replicas"] > 1),
        "time a replica": lambda t: duration(t["seconds_per_replica"]),
        "times the fused path's": lambda t: _ratio(t["fused_is_faster"]),
        "least .. most": lambda t: f"{_ratio(t['least'])} .. {_ratio(t['most'])}",
    }
    text = note("regression_times", s=found["settings"])
    return table("Experiment 1: time of one replica", found["times"], columns, text)


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
    rows = [{"quantity": name, "value": value} for name, value in values.items()]
    columns = {"quantity": "{quantity}", "value": "{value}"}
    return table("Experiment 1: theta", rows, columns, note("theta", s=s))


def _plot_theta(plot: dict, stationary: float) -> Figure:
    figure, axes = page.canvas()
    steps = range(len(plot["mean"]))
    axes.fill_between(
        steps, plot["low"], plot["high"], color=BLUE, alpha=0.18, lw=0, label="5 % to 95 % of them"
    )
    looks = {
        "numpy": ("NumPy", "-", 4.0, COLOURS["numpy"]),
        "torch": ("PyTorch", "-", 2.2, COLOURS["torch"]),
        "fused": ("fused", "--", 1.0, INK),
    }
    for path, values in plot["paths"].items():
        name, style, width, look = looks[path]
        label = f"one replica, {name}"
        axes.plot(values, style, lw=width, color=look, alpha=0.8, label=label)
    axes.plot(plot["mean"], color=BLUE, lw=2, label="mean over seeds")
    axes.axhline(stationary, color=RED, lw=1, ls=":", label="stationary value")
    axes.set(xlabel="step", ylabel="theta", xlim=(0, len(plot["mean"]) - 1))
    axes.legend(fontsize=7.5, ncols=2, loc="best")
    return figure


def _plot_histogram(final: list[float], mean: dict) -> Figure:
    figure, axes = page.canvas()
    axes.hist(final, bins=60, color=BLUE, alpha=0.55)
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
    settings, mean, plot = found["settings"], found["mean"], found["plot"]
    alone = next(t for t in found["times"] if t["path"] == "torch" and t["replicas"] == 1)
    paths = f"{settings['replicas']:,} seeds, and one replica by three programs with the same noise"
    ends = f"after {settings['steps']:,} steps, {len(plot['final']):,} seeds"
    return [
        Section(
            "Experiment 1: soft-regularised linear regression",
            [_times(found), _theta(found)],
            {
                "theta_path": Plot(_plot_theta(plot, mean["stationary"]), "Theta's path", paths),
                "theta_histogram": Plot(
                    _plot_histogram(plot["final"], mean), "Where it ends", ends
                ),
            },
            results={key: value for key, value in found.items() if key != "plot"},
            settings=settings,
            checks=found["checks"],
            headline=f"One kernel: {_ratio(alone['fused_is_faster'])} times faster than a PyTorch "
            f"loop, theta {abs(mean['standard_errors_away']):.1f} standard errors from the "
            "formula's",
            others=[found.get("others")],
        )
    ]


# ---- experiment 3 --------------------------------------------------------------------------------


def results(folder: RunFolder) -> dict:
    """Read experiment 3's predictions and times.

    Returns:
        ``seeds``, and ``arms``: for each arm ``std``, ``seconds`` (median of its runs' training),
        ``reliability`` (three lists, all seeds together), with noise on gradients
        ``noise_to_gradient`` (the ratio of the norms after the first and after the last epoch,
        medians over seeds), and for each of ``MEASURES`` its ``values`` by seed, ``mean``, standard
        deviation ``spread`` (None for one seed) and, where there is an arm ``"none"``, the
        ``difference`` to it.
    """
    settings = Network(**folder.config["soft_regularization"])
    _, epochs, _ = metrics.curves_of(folder)
    arms = {arm: _arm(settings, folder, arm, epochs) for arm in settings.arms}
    if "none" in arms:
        for arm in arms.values():
            for measure in MEASURES:
                base = arms["none"][measure]["values"]
                arm[measure]["difference"] = difference(arm[measure]["values"], base)
    return {"seeds": list(soft_regularization.seeds(settings)), "arms": arms}


def _arm(settings: Network, folder: RunFolder, arm: str, epochs: dict) -> dict:
    """An arm's entry of :func:`results`, without the difference."""
    names = [soft_regularization.learner_name(s, arm) for s in soft_regularization.seeds(settings)]
    tests = [soft_regularization.finished(folder, name) for name in names]
    runs = [epochs[name] for name in names]
    bins = np.sum([np.stack(reliability(*test)) for test in tests], axis=0)
    found = {
        "std": settings.std(arm),
        "reliability": bins.tolist(),
        "seconds": statistics.median(sum(line["seconds"] for line in run) for run in runs),
    }
    ratios = [
        [run[when]["noise_to_gradient"] for run in runs if "noise_to_gradient" in run[when]]
        for when in (0, -1)
    ]
    if all(ratios):
        found["noise_to_gradient"] = [statistics.median(ratio) for ratio in ratios]
    measured = pandas.DataFrame(
        {
            "accuracy": (logits.argmax(1) == labels).double().mean().item(),
            "ece": calibration_error(logits, labels),
            "loss": F.cross_entropy(logits.double(), labels).item(),
        }
        for logits, labels in tests
    )
    for measure, values in measured.items():
        spread = values.std() if len(values) > 1 else None
        found[str(measure)] = {"values": values.tolist(), "mean": values.mean(), "spread": spread}
    return found


_SCALES = {"accuracy": (100, 2), "ece": (100, 2), "loss": (1, 4)}
"""Measure -> its factor, 100 for percentages, and its digits."""


def _cell(measure: str, value: float, error: float | None, sign: str = "") -> str:
    scale, digits = _SCALES[measure]
    return with_error(value, error, digits, sign, scale)


def _heading(measure: str, unit: str) -> str:
    return MEASURES[measure] + f", {unit}" * (_SCALES[measure][0] == 100)


def _noise_table(found: dict, config: dict) -> Table:
    arms = found["arms"]
    columns: dict[str, Cell] = {
        "arm": "{arm}",
        "std, λ": lambda arm: f"{arm['std']:g}" if arm["arm"] != "none" else "",
        **{
            _heading(m, "%"): lambda arm, m=m: _cell(m, arm[m]["mean"], arm[m]["spread"])
            for m in MEASURES
        },
        "seconds a run (median)": "{seconds:.1f}",
    }
    text = note("networks", c=config, seeds=found["seeds"], arms=arms, places=PLACES)
    return table("Experiment 3: accuracy and calibration", metrics.rows(arms), columns, text)


def _difference_table(found: dict) -> Table:
    seeds = len(found["seeds"])
    rows = [row for row in metrics.rows(found["arms"]) if row["arm"] != "none"]

    def away(arm, measure):
        apart = arm[measure]["difference"]
        text = _cell(measure, apart["mean"], apart["standard_error"], "+")
        errors = apart["standard_errors"]
        return text if errors is None else f"{text} ({errors:+.1f})"

    def clear(arm):
        errors = {m: arm[m]["difference"]["standard_errors"] or 0.0 for m in MEASURES}
        words = [
            f"{MEASURES[m]} {'higher' if value > 0 else 'lower'}"
            for m, value in errors.items()
            if abs(value) > CLEAR
        ]
        return f"{arm['arm']}: {', '.join(words) or 'nothing'}."

    columns: dict[str, Cell] = {"arm": "{arm}"} | {
        _heading(m, "points"): lambda arm, m=m: away(arm, m) for m in MEASURES
    }
    text = note(
        "differences",
        seeds=seeds,
        clear=f"{CLEAR:g}",
        words=map(clear, rows),
        chance=2 * stats.t.sf(CLEAR, seeds - 1) if seeds > 1 else None,
        entries=len(rows) * len(MEASURES),
    )
    return table("Experiment 3: differences from none", rows, columns, text)


def _plot_noise(arms: dict) -> Figure:
    figure, every = page.canvas(10, 1.1 + 0.4 * len(arms), 1, len(MEASURES), sharey=True)
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
        axes.set(title=title[0].upper() + title[1:], yticks=range(len(arms)), yticklabels=arms)
        axes.margins(y=0.15)
    every[0].invert_yaxis()
    return figure


def networks(folder: RunFolder) -> list[Section]:
    """Experiment 3."""
    config, found = folder.config["soft_regularization"], results(folder)
    arms, seeds = found["arms"], len(found["seeds"])
    made = Section("Experiment 3: a network under four kinds of noise", results=found)
    made.tables.append(_noise_table(found, config))
    if "none" in arms and len(arms) > 1:
        made.tables.append(_difference_table(found))
    bins = {name: arm["reliability"] for name, arm in arms.items()}
    made.plots = {
        "noise": Plot(
            _plot_noise(arms),
            "Accuracy and calibration",
            "a dot a seed; bar: mean ± its standard error",
        ),
        "reliability": Plot(
            plots.reliability(bins),
            "Reliability",
            f"all seeds together; bins of {plots.FEW} images or more",
        ),
    }
    # Which arm is the most accurate and which the best calibrated, without a claim of chance.
    accuracy, ece = ({n: arms[n][measure]["mean"] for n in arms} for measure in ("accuracy", "ece"))
    high, low = max(accuracy, key=accuracy.__getitem__), min(ece, key=ece.__getitem__)
    made.headline = (
        f"{config['model']} on {config['data']} with noise in {len(arms.keys() - {'none'})} "
        f"places, {seeds} seed{'s' * (seeds > 1)}: highest accuracy {accuracy[high]:.1%} ({high}), "
        f"lowest ECE {ece[low]:.1%} ({low})"
    )
    return [made]
