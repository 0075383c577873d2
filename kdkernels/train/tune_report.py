"""What ``kdkernels tune`` found: tables, plots, results.json and report.html."""

import math
import statistics
import warnings

import optuna
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter
from optuna.trial import TrialState

from kdkernels.train import report, tune
from kdkernels.train.page import COLOURS, INK, SIZE
from kdkernels.train.report import Table
from kdkernels.train.soft_regularization import difference

__all__ = ["write"]


def _cells(params: dict, names: list[str]) -> list[str]:
    """The columns ``names``; beta stands with its divergence, a std with its noise."""
    beside = {"divergence": f", beta {tune.text(params['beta'])}" if "beta" in params else ""}
    std = [tune.text(value) for name, value in params.items() if name in tune.NOISE]
    beside["noise"] = f", {std[0]}" if std else ""
    return [tune.text(params[name]) + beside.get(name, "") if name in params else ""
            for name in names]  # fmt: skip


def _search_table(search: tune.Study) -> Table:
    settings, plain, usual = search.settings, search.plain, search.space.defaults()
    complete = search.trials(TrialState.COMPLETE)
    complete = sorted(complete, key=lambda trial: (-tune.accuracy(trial), trial.number))
    shown = complete[:10] + [t for t in complete[10:] if [t.params] == usual]
    dimensions = search.space.dimensions
    parents = {"beta": "divergence"} | dict.fromkeys(tune.NOISE, "noise")
    names = [name for name in dimensions if parents.get(name) not in dimensions]
    seeds = f"seeds {plain.seed} to {plain.seed + settings.seeds - 1}"
    count = len(search.trials(*tune.DONE))
    teacher = (search.folder.read_json("search/teacher.json") or {})["accuracy"]
    return Table(
        "Search: the best trials",
        ["trial", "held-out accuracy", *(name.replace("_", " ") for name in names), "seconds"],
        [
            [
                f"{trial.number}{', the defaults' if [trial.params] == usual else ''}",
                tune.score(trial),
                *_cells(trial.params, names),
                f"{trial.user_attrs['seconds']:.1f}",
            ]
            for trial in shown
        ],
        f"{count} trials by {settings.sampler}, {count - len(complete)} of them stopped early; "
        f"{plain.student} taught by {plain.teacher} (accuracy {teacher:.1%}) on {plain.data} at "
        f"{plain.image_size}x{plain.image_size}, {plain.epochs} epochs, "
        f"{seeds if settings.seeds > 1 else f'seed {plain.seed}'}. Accuracies are on "
        f"{settings.validation:.0%} of the training images, held out: on these the best of many "
        "trials looks better than it is.",
    )


def _words(params: dict) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {tune.text(v)}" for name, v in params.items())


def _confirm_table(confirm: tune.Study) -> tuple[Table, str]:
    """The comparison, and the difference in points."""
    values = {which: [] for which in (tune.DEFAULTS, tune.BEST)}
    for trial in sorted(confirm.trials(TrialState.COMPLETE), key=lambda t: t.params["seed"]):
        values[trial.params["settings"]].append(tune.accuracy(trial))
    apart = difference(values[tune.BEST], values[tune.DEFAULTS])
    error = apart["standard_error"]
    bought = f"{apart['mean'] * 100:+.2f}" + (f" ± {error * 100:.2f}" if error is not None else "")
    bought = bought.replace(" ", "\u00a0")
    rows = []
    for which, row in values.items():
        spread = f" ± {statistics.stdev(row) * 100:.2f}" if len(row) > 1 else ""
        each = ", ".join(f"{value * 100:.2f}" for value in row)
        rows.append([which, f"{statistics.fmean(row) * 100:.2f}{spread}", each])
    table = Table(
        "Confirmation on the test images",
        ["settings", "test accuracy, %", "by seed, %"],
        rows,
        f"Difference {bought} points{' (standard error over pairs of a seed)' if error else ''}. "
        f"Trained on all training images, {confirm.plain.epochs} epochs, seeds {confirm.seeds[0]} "
        f"to {confirm.seeds[-1]}, which the search did not see; mean ± standard deviation. The "
        f"best trial's: {_words(confirm.study.user_attrs['best'])}.",
    )
    return table, bought


def _plot_history(search: tune.Study) -> Figure:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    trials, stopped = search.trials(TrialState.COMPLETE), search.trials(TrialState.PRUNED)
    numbers, values = [t.number for t in trials], [tune.accuracy(t) for t in trials]
    axes.plot(
        numbers, values, "o", color=COLOURS["fused"], alpha=0.55, ms=5, mew=0, label="a trial"
    )
    if stopped:
        x, y = [t.number for t in stopped], [tune.accuracy(t) for t in stopped]
        axes.plot(x, y, "x", color=COLOURS["none"], ms=5, label="stopped early")
    best = [max(values[: i + 1]) for i in range(len(values))]
    axes.step(numbers, best, where="post", color=COLOURS["full"], lw=1.5, label="best so far")
    for trial in trials:
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
    figure = Figure(figsize=(3.2 * columns + 0.8, 2.9 * rows + 0.3), layout="constrained")
    # A few hopeless trials must not press all others into one line: they lie on the lower edge.
    values = sorted(map(tune.accuracy, trials))
    floor = values[len(values) // 5] - 0.5 * (values[-1] - values[len(values) // 5])
    every = list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)
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
            x, [max(tune.accuracy(t), floor) for t in those], c=[t.number for t in those],
            cmap="viridis_r", s=22, alpha=0.8, lw=0, vmin=0,
            vmax=max(t.number for t in trials) or 1,
        )  # fmt: skip
        axes.set_title(name.replace("_", " "), fontsize=10)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    for axes in every[len(names) :]:
        axes.set_visible(False)
    figure.colorbar(every[0].collections[0], ax=every, label="trial", shrink=0.6)
    figure.supylabel("held-out accuracy", fontsize=10)
    return figure


def _plot_importances(importances: dict) -> Figure:
    figure = Figure(figsize=(SIZE[0], 0.9 + 0.3 * len(importances)), layout="constrained")
    axes = figure.subplots()
    names = [name.replace("_", " ") for name in importances]
    axes.barh(names, list(importances.values()), color=COLOURS["fused"], height=0.62)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set(xlabel="importance")
    return figure


def _row(trial) -> dict:
    found = {"number": trial.number, "state": trial.state.name, "accuracy": trial.value}
    return found | {"settings": trial.params} | trial.user_attrs


def write(search: tune.Study, confirm: tune.Study | None) -> list[Table]:
    """Write results.json, plots/*.png and report.html to the studies' folder.

    Args:
        search: with at least one complete trial.
        confirm: complete; None where there was no comparison on the test images.

    Returns:
        The tables, to be printed.
    """
    folder, importances = search.folder, {}
    complete = search.trials(TrialState.COMPLETE)
    if len({trial.value for trial in complete}) > 1:
        with warnings.catch_warnings():  # of conditional settings that have few trials
            warnings.simplefilter("ignore")
            importances = optuna.importance.get_param_importances(search.study)
    best = search.study.best_trial
    section = report.Section(
        "Search for settings",
        [_search_table(search)],
        {"history": lambda: _plot_history(search)},
        {
            "history": ("The search", "Accuracy on held-out training images, trial after trial."),
            "importances": (
                "Which settings decide",
                "PED-ANOVA (arXiv 2304.10255): how much a setting decides whether a trial is among "
                "the better ones.",
            ),
            "settings": (
                "Each setting against accuracy",
                "A dot a trial, later ones darker; those far below others lie on the lower edge.",
            ),
        },
        headline=f"The best of {len(complete)} trials has {tune.accuracy(best):.1%} on held-out "
        "images",
        lead=[_words(best.params)],
    )
    if confirm is not None:
        table, bought = _confirm_table(confirm)
        section.tables.append(table)
        section.headline = f"The search changed test accuracy by {bought} points"
        section.cards = [(f"{row[1]} %", f"test accuracy, {row[0]}") for row in table.rows[::-1]]
    if importances:
        section.plots["importances"] = lambda: _plot_importances(importances)
    section.plots["settings"] = lambda: _plot_settings(search)
    results = {
        "machine": folder.config["machine"], "best": folder.read_json("best.json"),
        "importances": importances, "trials": [_row(t) for t in search.trials(*tune.DONE)],
        "confirmation": [_row(t) for t in confirm.trials(*tune.DONE)] if confirm else [],
    }  # fmt: skip
    folder.write_json("results.json", results)
    return report.publish(
        folder, [section], {"tune": folder.config["tune"], "distill": search.given}
    )
