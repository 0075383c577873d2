"""One page that puts distillations beside each other: ``kdkernels compare``.

Runs that differ in nothing but their seed make a group. What a group's table and plots say is the
mean over its seeds; speed-ups and differences of accuracy are taken within each run, between arms
that took turns, before they are averaged.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from scipy import stats

from kdkernels.reports import plots, report
from kdkernels.reports.arms import best_of, generation, results
from kdkernels.reports.distillation import NAMES, speed
from kdkernels.reports.page import INK, MARKERS, SIZE, STYLE, canvas, colour, note
from kdkernels.reports.report import Cell, Plot, Section, Table, table, with_error
from kdkernels.tools.settings import Compare
from kdkernels.train import TrainError
from kdkernels.train import console as terminal
from kdkernels.train.run_folder import RunFolder, replace

_NO_SETTINGS = ("seed", "data_dir", "checkpoint_every")
"""Options that make no other experiment of a run."""

FEW_SETTINGS = 3
"""As many are columns of the tables; if more differ, groups are called A, B, C."""

EQUAL = 1.0
"""Points: accuracies are called equal where the interval of their difference is within as many."""


_MEASURES = ("accuracy", "away", "ece", "seconds", "seconds_to_target", "speedup")
Arm = dict[str, np.ndarray]
"""Measure -> its values in the runs of a group; NaN where a run has none."""


@dataclasses.dataclass
class Group:
    """Runs that differ only in their seed, and have ``settings`` in common.

    ``columns`` tell it from the other groups, by heading: settings, or a letter. ``runs``: seed ->
    :func:`kdkernels.reports.arms.results`; ``folders``: seed -> path.
    """

    settings: dict
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    runs: dict[int, dict] = dataclasses.field(default_factory=dict)
    folders: dict[int, str] = dataclasses.field(default_factory=dict)

    @property
    def label(self) -> str:
        """What tells it from the other groups, in words; empty where it is the only one."""
        return ", ".join(f"{name} {value}" for name, value in self.columns.items())

    def arms(self) -> dict[str, Arm]:
        """Learner -> its measures; ``away`` is its accuracy less its reference's."""
        rows: dict[str, list[dict]] = {}
        for run in self.runs.values():
            base = run["arms"].get("reference", {}).get("accuracy")
            for name, arm in run["arms"].items():
                compared = base is not None and name not in ("teacher", "reference")
                away = arm["accuracy"] - base if compared else None
                rows.setdefault(name, []).append(arm | {"away": away})
        return {
            name: {m: np.array([row.get(m) for row in of], float) for m in _MEASURES}
            for name, of in rows.items()
        }

    def ladder(self) -> list[dict]:
        """Means over seeds of :func:`ladder`'s rungs, each with standard deviations ``*_spread``.

        Runs that lack an arm of the others' are left out.
        """
        every = [run["ladder"] for run in self.runs.values() if run["ladder"]]
        longest = max(every, key=len, default=[])
        names = [rung["arm"] for rung in longest]
        every = [rungs for rungs in every if [rung["arm"] for rung in rungs] == names]
        made = []
        for rung, *others in zip(longest, *every, strict=True):
            mean = {"arm": rung["arm"], "adds": rung["adds"], "seeds": len(every)}
            for key in ("seconds", "saved", "ratio", "speedup"):
                values = np.array([one[key] for one in others])
                mean[key] = values.mean()
                if len(every) > 1:
                    mean[f"{key}_spread"] = values.std(ddof=1)
            made.append(mean)
        return made


def _read(path: str) -> tuple[dict, int, dict]:
    """A run's settings without its seed, the seed, and what it found."""
    folder = RunFolder.open(path)
    config = folder.config.get("distill")
    if config is None:
        raise TrainError(
            f"{path} is a run of {folder.config.get('command', 'something else')}: compare takes "
            "runs of distill and reproduce"
        )
    found = results(folder) or {"arms": {}}
    students = {name: arm for name, arm in found["arms"].items() if name != "teacher"}
    if not students:
        raise TrainError(f"{path} has no finished epoch of a student yet; leave it out")
    if config.get("target_accuracy") is None and config.get("budget") is None:
        for name, arm in students.items():
            if arm["epochs"] < config["epochs"]:
                raise TrainError(
                    f"{path} is not finished: {name} has {arm['epochs']} of {config['epochs']} "
                    f"epochs; continue it with kdkernels distill --resume {path}, or leave it out"
                )
    settings = {name: value for name, value in config.items() if name not in _NO_SETTINGS}
    settings |= {name: folder.config["machine"].get(name) for name in ("processor", "versions")}
    return settings, config["seed"], found


def groups(paths: list[str]) -> list[Group]:
    """Read runs of distill or reproduce, and group them.

    Raises:
        TrainError: one is no such run or not finished, or two have one seed and the same settings.
    """
    made: list[Group] = []
    for path in paths:
        settings, seed, found = _read(path)
        group = next((group for group in made if group.settings == settings), None)
        if group is None:
            made.append(group := Group(settings))
        if seed in group.runs:
            raise TrainError(
                f"{group.folders[seed]} and {path} are runs of the same settings and seed {seed}: "
                "leave one of them out"
            )
        group.runs[seed], group.folders[seed] = found, path
    differing = _differing(made)
    for number, group in enumerate(made):
        group.runs = dict(sorted(group.runs.items()))
        if 0 < len(differing) <= FEW_SETTINGS:
            group.columns = {n.replace("_", " "): _text(group.settings.get(n)) for n in differing}
        elif len(made) > 1:
            group.columns = {"group": chr(ord("A") + number) if number < 26 else str(number + 1)}
    return made


def _text(value) -> str:
    if value is None:
        return "none"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _differing(found: list[Group]) -> list[str]:
    """Names of the settings in which the groups differ; the arms are seen without."""
    names = dict.fromkeys(name for group in found for name in group.settings if name != "arms")
    return [n for n in names if len({_text(g.settings.get(n)) for g in found}) > 1]


# ---- tables --------------------------------------------------------------------------------------


def _known(values: np.ndarray) -> np.ndarray:
    return values[~np.isnan(values)]


def _mean(values: np.ndarray, scale: float = 1, digits: int = 2) -> str:
    """``mean ± standard deviation``; empty without values, without the latter for one."""
    known = _known(values)
    spread = known.std(ddof=1) if len(known) > 1 else None
    return with_error(known.mean(), spread, digits, scale=scale) if len(known) else ""


def _away(arm: Arm) -> tuple[float, float | None] | None:
    """How much more accurate than reference, mean over seeds and its standard error."""
    away = _known(arm["away"])
    error = away.std(ddof=1) / math.sqrt(len(away)) if len(away) > 1 else None
    return (away.mean(), error) if len(away) else None


def _points(arm: Arm) -> str:
    away = _away(arm)
    return with_error(*away, sign="+", scale=100) if away else ""


def _summary(found: list[Group]) -> Table:
    def to_target(row):
        times = row["of"]["seconds_to_target"]
        reached = len(_known(times))
        return reached and f"{_mean(times)} ({reached} of {len(times)})"

    rows = [
        {"arm": name, "of": arm} | group.columns
        for group in found
        for name, arm in group.arms().items()
    ]
    columns: dict[str, Cell] = {
        "arm": "{arm}",
        **{heading: lambda row, h=heading: row[h] for heading in found[0].columns},
        "seeds": lambda row: len(row["of"]["accuracy"]),
        "test accuracy, %": lambda row: _mean(row["of"]["accuracy"], 100),
        "minus reference's, points": lambda row: _points(row["of"]),
        "ECE, %": lambda row: _mean(row["of"]["ece"], 100),
        "seconds": lambda row: _mean(row["of"]["seconds"]),
        "seconds to target (seeds)": lambda row: to_target(row) or None,
        "times reference's speed": lambda row: _mean(row["of"]["speedup"]),
    }
    return table("Accuracy and time over seeds", rows, columns, note("compare"))


def _ladder_table(group: Group) -> Table:
    rungs = group.ladder()

    def cell(key):
        return lambda rung: key in rung and with_error(rung[key], rung.get(f"{key}_spread"))

    columns: dict[str, Cell] = {
        "arm": "{arm}",
        "what it adds": "{adds}",
        "seconds": cell("seconds"),
        "seconds saved": cell("saved"),
        "times faster than the row above": cell("ratio"),
        "times faster than reference": cell("speedup"),
    }
    first = {k: v for k, v in rungs[0].items() if k in ("arm", "adds", "seconds", "seconds_spread")}
    title = "Where the speed comes from" + f": {group.label}" * bool(group.label)
    text = (
        f"Mean ± standard deviation over {rungs[0]['seeds']} seeds; the ratios are taken in each "
        "run."
    )
    return table(title, [first, *rungs[1:]], columns, text * (rungs[0]["seeds"] > 1))


def _settings_table(found: list[Group], differing: list[str]) -> Table:
    columns: dict[str, Cell] = {"setting": lambda name: name.replace("_", " ")}
    for group in found:
        columns[group.label] = lambda name, s=group.settings: _text(s.get(name))
    return table("Settings that differ", differing, columns)


# ---- the page ------------------------------------------------------------------------------------


def _plot_accuracy(found: list[Group]) -> Figure:
    figure, axes = canvas(SIZE[0], SIZE[1] + 0.2 * (len(found) > 1))
    seen, teachers = {}, []
    for number, group in enumerate(found):
        for name, arm in group.arms().items():
            if name == "teacher":
                teachers += arm["accuracy"].tolist()
            if name == "teacher" or generation(name)[1] > 1:
                continue
            points = [arm["seconds"], arm["accuracy"]]
            x, y = (values.mean() for values in points)
            wide, high = (values.std(ddof=1) if len(values) > 1 else 0 for values in points)
            look: dict[str, Any] = {"color": colour(name), "marker": MARKERS[number % 7]}
            axes.plot(*points, ls="", ms=3.5, alpha=0.35, mew=0, **look)
            axes.errorbar(x, y, high, wide, ms=6.5, lw=1.2, capsize=2.5, **look)
            seen[name] = axes.plot([], [], "o", color=colour(name), ms=5)[0]
    if len(found) > 1:
        for number, group in enumerate(found):
            seen[group.label] = axes.plot([], [], MARKERS[number % 7], color=INK, ms=5)[0]
    if teachers:
        mean = float(np.mean(teachers))
        seen["teacher"] = axes.axhline(mean, color=colour("teacher"), ls=":", lw=1.2)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set(xlabel="seconds of training", ylabel="test accuracy")
    axes.set_xlim(0, None)
    figure.legend(seen.values(), seen.keys(), ncols=3, loc="outside upper center")
    return figure


def _accuracy_words(arm: Arm) -> str:
    """What the 95 % interval of the difference of accuracy over seeds (Student's t) says."""
    away, seeds = _away(arm), len(arm["away"])
    if away is None:
        return ""
    mean, error = away[0] * 100, (away[1] or 0.0) * 100
    if seeds == 1:
        return f" with {mean:+.1f} points of accuracy (one seed)"
    wide = stats.t.ppf(0.975, seeds - 1) * error
    low, high = mean - wide, mean + wide
    interval = f"({low:+.1f} to {high:+.1f} points, {seeds} seeds)"
    if low >= -EQUAL and high <= EQUAL:
        return f" at equal accuracy {interval}"
    if low <= 0 <= high:
        return f" with no difference of accuracy shown {interval}"
    return f" at {'higher' if low > 0 else 'lower'} accuracy {interval}"


def _headline(found: list[Group]) -> tuple[str, list[tuple[str, str]]]:
    runs = sum(len(group.runs) for group in found)
    every = [group.arms() for group in found]
    name = best_of({name for arms in every for name in arms}) or "reference"
    shown = [arms[name] for arms in every if name in arms and len(_known(arms[name]["speedup"]))]
    if name == "reference" or not shown:
        return f"{runs} runs in {len(found)} settings", []
    speeds = [_known(arm["speedup"]).mean() for arm in shown]
    ends = sorted({f"{value:.2f}" for value in speeds}, key=float)
    sentence = f"{NAMES[name]}: {speed(speeds[0])} plain PyTorch"
    if len(ends) > 1:
        sentence = f"{NAMES[name]}: {ends[0]} to {ends[-1]} times the speed of plain PyTorch"
    if len(shown) > 1:
        count = sum("equal" in _accuracy_words(arm) for arm in shown)
        sentence += f", at equal accuracy in {count} of {len(shown)} settings"
        return sentence[0].upper() + sentence[1:], []
    arm = shown[0]
    sentence += _accuracy_words(arm)
    cards = [
        (f"{_mean(arm['speedup'])}×", f"the speed of plain PyTorch: {name} over reference"),
        (_points(arm), f"points of accuracy: {name} minus reference"),
        (f"{_mean(arm['accuracy'], 100, 1)} %", f"test accuracy of {name}"),
        (str(len(arm["away"])), "seeds" if len(arm["away"]) > 1 else "seed"),
    ]
    return sentence[0].upper() + sentence[1:], cards


def _lead(found: list[Group], common: dict, headline: str) -> str:
    """Whose runs these are, and what the headline's words mean."""
    student, teacher, data = (
        _text(common[name]) if name in common else several
        for name, several in (
            ("student", "several students"),
            ("teacher", "several teachers"),
            ("data", "several data"),
        )
    )
    seeds = sorted({seed for group in found for seed in group.runs})
    text = f"{student} taught by {teacher} on {data}; seeds {', '.join(map(str, seeds))}."
    if "equal accuracy" in headline:
        text += " Equal accuracy: the 95 % interval of the difference over seeds is within "
        text += f"{EQUAL:g} point."
    return text


@matplotlib.rc_context(STYLE)
def write(paths: list[str], out: str = "compare.html") -> list[Table]:
    """Compare runs on one page, ``out``; its tables, to be printed."""
    found = groups(paths)
    differing = _differing(found)
    main, ladders = Section("Accuracy and time"), Section("Where the speed comes from")
    main.tables.append(_summary(found))
    main.plots["accuracy_and_time"] = Plot(
        _plot_accuracy(found),
        "Accuracy against time",
        "large: mean ± standard deviation over seeds; small: each seed",
    )
    for number, group in enumerate(found, 1):
        if group.ladder():
            ladders.tables.append(_ladder_table(group))
            about = f"{group.label}{'; ' * bool(group.label)}mean ± standard deviation"
            ladder = Plot(plots.ladder(group.ladder()), "The speed-up ladder", about)
            ladders.plots[f"ladder_{number}"] = ladder
    if "group" in found[0].columns:
        main.tables.append(_settings_table(found, differing))
    rows = [
        {"folder": group.folders[seed], "seed": seed} | group.columns
        for group in found
        for seed in group.runs
    ]
    columns = {name: lambda row, name=name: row[name] for name in rows[0]}
    listed = Section("Runs", [table("Folders", rows, columns)])
    if len(found) == 1:  # then both plots stand beside each other
        main.plots |= ladders.plots
        main.tables += ladders.tables
        ladders.plots = {}
    main.others = [
        arm["others"] for g in found for run in g.runs.values() for arm in run["arms"].values()
    ]
    common = {n: v for n, v in found[0].settings.items() if n not in differing and n != "arms"}
    main.headline, main.cards = _headline(found)
    main.lead = [_lead(found, common, main.headline)]
    sections = [main, *([ladders] if ladders.plots else []), listed]
    html = report.html(
        sections,
        "runs compared",
        f"compare · {len(rows)} runs",
        {"in all runs": {name: _text(value) for name, value in common.items()}},
    )
    try:
        replace(Path(out), html.encode())
    except OSError as error:
        raise TrainError(f"cannot write {out}: {error.strerror}") from None
    return [table for section in sections[:-1] for table in section.tables]


def command(_: str, given: dict[str, Any]) -> int:
    """``kdkernels compare``."""
    console = terminal.make()
    settings = Compare(**{name: given[name] for name in given.keys() - {"runs"}})
    terminal.show(console, write(given["runs"], settings.out))
    console.print(f"the page is {settings.out}")
    return 0
