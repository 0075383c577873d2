"""What ``kdkernels tune`` found: tables, plots, results.json and report.html."""

import math
import statistics
import warnings

import matplotlib
import numpy as np
import optuna
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter
from optuna.trial import TrialState

from kdkernels.experiments.soft_regularization import difference
from kdkernels.reports import plots, report
from kdkernels.reports.page import COLOURS, INK, STYLE, canvas, note
from kdkernels.reports.report import Cell, Plot, Section, Table, table, with_error
from kdkernels.tools import tune
from kdkernels.tools.space import NOISE


def _search_table(search: tune.Study) -> Table:
    usual, dimensions = search.space.defaults(), search.space.dimensions
    complete = search.trials(TrialState.COMPLETE)
    complete.sort(key=lambda trial: (-tune.accuracy(trial), trial.number))
    shown = complete[:10] + [t for t in complete[10:] if [t.params] == usual]

    def cell(name):
        """A setting; beta stands with its divergence, a std with its noise."""

        def say(params):
            if name not in params:
                return None
            beside = [tune.text(params[std]) for std in NOISE if std in params]
            if name == "divergence":
                beside = [f"beta {tune.text(params['beta'])}"] if "beta" in params else []
            beside = beside if name in ("divergence", "noise") else []
            return ", ".join([tune.text(params[name]), *beside])

        return lambda trial: say(trial["params"])

    parents = {"beta": "divergence"} | dict.fromkeys(NOISE, "noise")
    columns: dict[str, Cell] = {
        "trial": "{trial}",
        "held-out accuracy": "{score}",
        **{n.replace("_", " "): cell(n) for n in dimensions if parents.get(n) not in dimensions},
        "seconds": "{seconds:.1f}",
    }
    rows = [
        {
            "trial": f"{trial.number}{', the defaults' * ([trial.params] == usual)}",
            "score": tune.score(trial),
            "params": trial.params,
            "seconds": trial.user_attrs["seconds"],
        }
        for trial in shown
    ]
    count = len(search.trials(*tune.DONE))
    teacher = (search.folder.read_json("search/teacher.json") or {})["accuracy"]
    text = note(
        "search",
        s=search.settings,
        plain=search.plain,
        count=count,
        stopped=count - len(complete),
        teacher=teacher,
    )
    return table("Search: the best trials", rows, columns, text)


def _words(params: dict) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {tune.text(v)}" for name, v in params.items())


def _confirm_table(confirm: tune.Study) -> tuple[Table, str]:
    """The comparison, and the difference in points."""
    values = {which: [] for which in (tune.DEFAULTS, tune.BEST)}
    for trial in sorted(confirm.trials(TrialState.COMPLETE), key=lambda t: t.params["seed"]):
        values[trial.params["settings"]].append(tune.accuracy(trial))
    apart = difference(values[tune.BEST], values[tune.DEFAULTS])
    error = apart["standard_error"]
    bought = with_error(apart["mean"], error, sign="+", scale=100).replace(" ", "\u00a0")

    def mean(row):
        spread = statistics.stdev(row["values"]) if len(row["values"]) > 1 else None
        return with_error(statistics.fmean(row["values"]), spread, scale=100)

    columns: dict[str, Cell] = {
        "settings": "{settings}",
        "test accuracy, %": mean,
        "by seed, %": lambda row: ", ".join(f"{value * 100:.2f}" for value in row["values"]),
    }
    rows = [{"settings": which, "values": found} for which, found in values.items()]
    best = _words(confirm.study.user_attrs["best"])
    text = note(
        "confirmation",
        bought=bought,
        error=error,
        epochs=confirm.plain.epochs,
        seeds=confirm.seeds,
        best=best,
    )
    return table("Confirmation on the test images", rows, columns, text), bought


def _plot_history(search: tune.Study) -> Figure:
    figure, axes = canvas()

    def points(state):
        trials = search.trials(state)
        return [t.number for t in trials], [tune.accuracy(t) for t in trials]

    numbers, values = points(TrialState.COMPLETE)
    axes.plot(
        numbers, values, "o", color=COLOURS["fused"], alpha=0.55, ms=5, mew=0, label="a trial"
    )
    if search.trials(TrialState.PRUNED):
        look = COLOURS["none"]
        axes.plot(*points(TrialState.PRUNED), "x", color=look, ms=5, label="stopped early")
    best = np.maximum.accumulate(values)
    axes.step(numbers, best, where="post", color=COLOURS["full"], lw=1.5, label="best so far")
    for trial in search.trials(TrialState.COMPLETE):
        if [trial.params] == search.space.defaults():
            axes.axhline(tune.accuracy(trial), color=INK, lw=1, ls=":", label="the defaults")
            break
    axes.set(xlabel="trial", ylabel="held-out accuracy")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.legend(loc="best")
    return figure


def _plot_settings(search: tune.Study) -> Figure:
    trials = search.trials(TrialState.COMPLETE)
    names = [n for n in search.space.dimensions if any(n in t.params for t in trials)]
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    size = 3.2 * columns + 0.8, 2.9 * rows + 0.3
    figure, grid = canvas(*size, rows, columns, sharey=True, squeeze=False)
    # A few hopeless trials must not press all others into one line: they lie on the lower edge.
    values = sorted(map(tune.accuracy, trials))
    floor = values[len(values) // 5] - 0.5 * (values[-1] - values[len(values) // 5])
    every = list(grid.flat)
    for axes, name in zip(every, names, strict=False):
        dimension = search.space.dimensions[name]
        those = [t for t in trials if name in t.params]
        x = [t.params[name] for t in those]
        if isinstance(dimension, tuple):
            x = [dimension.index(value) for value in x]
            labels = [tune.text(value).replace("_", " ") for value in dimension]
            axes.set_xticks(range(len(labels)), labels, fontsize=8)
            if len(labels) > 4:
                axes.tick_params(axis="x", rotation=90)
            axes.set_xlim(-0.5, len(labels) - 0.5)
        else:
            axes.set_xscale("log" if dimension.log else "linear")
            axes.set_xticks(list(dimension), [f"{value:.2g}" for value in dimension], fontsize=8)
            axes.xaxis.set_minor_locator(NullLocator())
            axes.axvspan(dimension.low, dimension.high, alpha=0)  # all of the range is shown
        axes.scatter(
            x,
            [max(tune.accuracy(t), floor) for t in those],
            c=[t.number for t in those],
            cmap="viridis_r",
            s=22,
            alpha=0.8,
            lw=0,
            vmin=0,
            vmax=max(t.number for t in trials) or 1,
        )
        axes.set_title(name.replace("_", " "), fontsize=10)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    for axes in every[len(names) :]:
        axes.set_visible(False)
    figure.colorbar(every[0].collections[0], ax=every, label="trial", shrink=0.6)
    figure.supylabel("held-out accuracy", fontsize=10)
    return figure


def _plot_importances(importances: dict) -> Figure:
    shown = {name.replace("_", " "): value for name, value in importances.items()}
    figure = plots.bars(shown, "importance", [COLOURS["fused"]])
    figure.axes[0].xaxis.set_major_formatter(PercentFormatter(1.0))
    return figure


def _importances(search: tune.Study) -> dict[str, float]:
    if len({trial.value for trial in search.trials(TrialState.COMPLETE)}) == 1:
        return {}
    with warnings.catch_warnings():  # of conditional settings that have few trials
        warnings.simplefilter("ignore")
        return optuna.importance.get_param_importances(search.study)


def _row(trial) -> dict:
    found = {"number": trial.number, "state": trial.state.name, "accuracy": trial.value}
    return found | {"settings": trial.params} | trial.user_attrs


@matplotlib.rc_context(STYLE)
def write(search: tune.Study, confirm: tune.Study | None) -> list[Table]:
    """Write results.json, plots/*.png and report.html to the studies' folder; the tables.

    ``confirm`` is None where there was no comparison on the test images.
    """
    folder, best, importances = search.folder, search.study.best_trial, _importances(search)
    count = len(search.trials(TrialState.COMPLETE))
    section = Section("Search for settings", [_search_table(search)], lead=[_words(best.params)])
    section.headline = (
        f"The best of {count} trials has {tune.accuracy(best):.1%} on held-out images"
    )
    section.plots["history"] = Plot(
        _plot_history(search),
        "The search",
        "Accuracy on held-out training images, trial after trial.",
    )
    if confirm is not None:
        made, bought = _confirm_table(confirm)
        section.tables.append(made)
        section.headline = f"The search changed test accuracy by {bought} points"
        section.headline += " (one seed)" * (len(confirm.seeds) == 1)
        section.cards = [(f"{row[1]} %", f"test accuracy, {row[0]}") for row in made.rows[::-1]]
    if importances:
        section.plots["importances"] = Plot(
            _plot_importances(importances),
            "Which settings decide",
            "PED-ANOVA (arXiv 2304.10255): how much a setting decides whether a trial is among the "
            "better ones.",
        )
    section.plots["settings"] = Plot(
        _plot_settings(search),
        "Each setting against accuracy",
        "A dot a trial, later ones darker; those far below others lie on the lower edge.",
    )
    results = {
        "machine": folder.config["machine"],
        "best": folder.read_json("best.json"),
        "importances": importances,
        "trials": [_row(t) for t in search.trials(*tune.DONE)],
        "confirmation": [_row(t) for t in confirm.trials(*tune.DONE)] if confirm else [],
    }
    folder.write_json("results.json", results)
    return report.publish(
        folder, [section], {"tune": folder.config["tune"], "distill": search.given}
    )
