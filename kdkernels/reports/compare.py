"""One page that puts distillations beside each other: ``kdkernels compare``.

Runs that differ in nothing but their seed make a group. What a group's table and plots say is the
mean over its seeds; speed-ups and differences of accuracy are taken within each run, between arms
that took turns, before they are averaged.
"""

import dataclasses
import functools
import os
import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from scipy import stats

from kdkernels.experiments.soft_regularization import difference
from kdkernels.reports import distillation, report
from kdkernels.reports.distillation import LADDER, NAMES, generation, plot_ladder, speed
from kdkernels.reports.page import INK, SIZE, canvas, colour, note
from kdkernels.reports.report import Plot, Section, Table, table, with_error
from kdkernels.tools.settings import Compare
from kdkernels.train import TrainError
from kdkernels.train import console as terminal
from kdkernels.train.run_folder import RunFolder

_NO_SETTINGS = ("seed", "data_dir", "checkpoint_every")
"""Options that make no other experiment of a run."""

FEW_SETTINGS = 3
"""As many are columns of the tables; if more differ, groups are called A, B, C."""

_MARKERS = "osD^vPX"


@dataclasses.dataclass
class Group:
    """Runs that differ only in their seed.

    Attributes:
        settings: what they have in common.
        columns: what tells it from the other groups, by heading: settings, or a letter.
        runs: seed -> :func:`kdkernels.reports.distillation.results`.
        folders: seed -> path.
    """

    settings: dict
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    runs: dict[int, dict] = dataclasses.field(default_factory=dict)
    folders: dict[int, str] = dataclasses.field(default_factory=dict)

    def arms(self) -> list[str]:
        """Learners of any of the runs, in their order."""
        names = dict.fromkeys(name for run in self.runs.values() for name in run["arms"])
        return list(names)

    def label(self) -> str:
        """What tells it from the other groups, in words; empty where it is the only one."""
        return ", ".join(f"{name} {value}" for name, value in self.columns.items())

    def values(self, arm: str, measure: str) -> dict[int, float]:
        """A measure of an arm, by seed, where it is there."""
        found = {seed: run["arms"].get(arm, {}).get(measure) for seed, run in self.runs.items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def less_reference(self, arm: str) -> dict | None:
        """:func:`difference` of the accuracy of an arm to reference's of the same run."""
        base = self.values("reference", "accuracy")
        own = self.values(arm, "accuracy")
        seeds = [seed for seed in own if seed in base]
        if not seeds or arm in ("teacher", "reference"):
            return None
        return difference([own[seed] for seed in seeds], [base[seed] for seed in seeds])

    def ladder(self) -> list[dict]:
        """Means over seeds of :func:`ladder`'s rungs, each with standard deviations ``*_spread``.

        Runs that lack an arm of the others' are left out.
        """
        every = [run["ladder"] for run in self.runs.values() if run["ladder"]]
        longest = max(every, key=len, default=[])
        names = [rung["arm"] for rung in longest]
        every = [rungs for rungs in every if [rung["arm"] for rung in rungs] == names]
        made = []
        for place, rung in enumerate(longest):
            mean = {"arm": rung["arm"], "adds": rung["adds"], "seeds": len(every)}
            for key in ("seconds", "saved", "ratio", "speedup"):
                values = [rungs[place][key] for rungs in every]
                mean[key] = statistics.fmean(values)
                if len(values) > 1:
                    mean[f"{key}_spread"] = statistics.stdev(values)
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
    found = distillation.results(folder)
    students = {} if found is None else {n: a for n, a in found["arms"].items() if n != "teacher"}
    if found is None or not students:
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
    made = []
    for path in paths:
        settings, seed, found = _read(path)
        group = next((group for group in made if group.settings == settings), None)
        if group is None:
            group = Group(settings)
            made.append(group)
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
            group.columns = {
                name.replace("_", " "): _text(group.settings.get(name)) for name in differing
            }
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


def _settings_table(found: list[Group], differing: list[str]) -> Table:
    return table(
        "Settings that differ",
        (
            {"setting": name.replace("_", " ")}
            | {group.label(): _text(group.settings.get(name)) for group in found}
            for name in differing
        ),
    )


def _mean(values, scale: float = 1, digits: int = 2) -> str:
    """``mean ± standard deviation``; empty without values, without the latter for one."""
    values = [value * scale for value in values]
    if not values:
        return ""
    spread = statistics.stdev(values) if len(values) > 1 else None
    return with_error(statistics.fmean(values), spread, digits)


def _less(apart: dict | None, digits: int = 2) -> str:
    if apart is None:
        return ""
    error = apart["standard_error"]
    return with_error(apart["mean"] * 100, None if error is None else error * 100, digits, "+")


def _summary(found: list[Group]) -> Table:
    def row(group, arm):
        reached = group.values(arm, "seconds_to_target")
        accuracy = group.values(arm, "accuracy")
        return {
            "arm": arm,
            **group.columns,
            "seeds": len(accuracy),
            "test accuracy, %": _mean(accuracy.values(), 100),
            "minus reference's, points": _less(group.less_reference(arm)),
            "ECE, %": _mean(group.values(arm, "ece").values(), 100),
            "seconds": _mean(group.values(arm, "seconds").values()),
            "seconds to target (seeds)": _mean(reached.values())
            + f" ({len(reached)} of {len(accuracy)})" * bool(reached),
            "times reference's speed": _mean(group.values(arm, "speedup").values()),
        }

    return table(
        "Accuracy and time over seeds",
        (row(group, arm) for group in found for arm in group.arms()),
        note("compare"),
    )


def _ladder_table(group: Group) -> Table:
    rungs, label = group.ladder(), group.label()

    def row(rung):
        names = {"seconds": "seconds"}
        if rung is not rungs[0]:
            names |= {
                "saved": "seconds saved", "ratio": "times faster than the row above",
                "speedup": "times faster than reference",
            }  # fmt: skip
        return {"arm": rung["arm"], "what it adds": rung["adds"]} | {
            heading: with_error(rung[key], rung.get(f"{key}_spread"))
            for key, heading in names.items()
        }

    return table(
        "Where the speed comes from" + (f": {label}" if label else ""),
        map(row, rungs),
        f"Mean ± standard deviation over {rungs[0]['seeds']} seeds; the ratios are taken in each "
        "run." * (rungs[0]["seeds"] > 1),
    )


def _plot_accuracy(found: list[Group]) -> Figure:
    figure, axes = canvas(SIZE[0], SIZE[1] + 0.2 * (len(found) > 1))
    seen = {}
    for number, group in enumerate(found):
        marker = _MARKERS[number % len(_MARKERS)]
        for arm in group.arms():
            if arm == "teacher" or generation(arm)[1] > 1:
                continue
            accuracy = list(group.values(arm, "accuracy").values())
            seconds = list(group.values(arm, "seconds").values())
            look: dict[str, Any] = {"color": colour(arm), "marker": marker}
            axes.plot(seconds, accuracy, ls="", ms=3.5, alpha=0.35, mew=0, **look)
            spread = [statistics.stdev(v) if len(v) > 1 else 0 for v in (seconds, accuracy)]
            axes.errorbar(
                statistics.fmean(seconds), statistics.fmean(accuracy), spread[1], spread[0], ms=6.5,
                lw=1.2, capsize=2.5, **look,
            )  # fmt: skip
            seen[arm] = axes.plot([], [], "o", color=colour(arm), ms=5)[0]
    if len(found) > 1:
        for number, group in enumerate(found):
            marker = _MARKERS[number % len(_MARKERS)]
            seen[group.label()] = axes.plot([], [], marker, color=INK, ms=5)[0]
    teacher = [a for group in found for a in group.values("teacher", "accuracy").values()]
    if teacher:
        seen["teacher"] = axes.axhline(
            statistics.fmean(teacher), color=colour("teacher"), ls=":", lw=1.2
        )
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set(xlabel="seconds of training", ylabel="test accuracy")
    axes.set_xlim(0, None)
    figure.legend(seen.values(), seen.keys(), ncols=3, loc="outside upper center")
    return figure


EQUAL = 1.0
"""Points: accuracies are called equal where the interval of their difference is within as many."""


def _accuracy_words(group: Group, name: str) -> str:
    """What the 95 % interval of the difference of accuracy over seeds (Student's t) says."""
    apart = group.less_reference(name)
    if apart is None:
        return ""
    points, seeds = apart["mean"] * 100, len(group.values(name, "accuracy"))
    if seeds == 1:
        return f" with {points:+.1f} points of accuracy (one seed)"
    wide = stats.t.ppf(0.975, seeds - 1) * (apart["standard_error"] or 0.0) * 100
    low, high = points - wide, points + wide
    interval = f"({low:+.1f} to {high:+.1f} points, {seeds} seeds)"
    if low >= -EQUAL and high <= EQUAL:
        return f" at equal accuracy {interval}"
    if low <= 0 <= high:
        return f" with no difference of accuracy shown {interval}"
    return f" at {'higher' if low > 0 else 'lower'} accuracy {interval}"


def _headline(found: list[Group]) -> tuple[str, list[tuple[str, str]]]:
    runs = sum(len(group.runs) for group in found)
    arms = {name for group in found for name in group.arms()}
    name = next((name for name in reversed(LADDER) if name in arms), "reference")
    shown = [group for group in found if group.values(name, "speedup")]
    if name == "reference" or not shown:
        return f"{runs} runs in {len(found)} settings", []
    speeds = [statistics.fmean(group.values(name, "speedup").values()) for group in shown]
    ends = sorted({f"{value:.2f}" for value in speeds}, key=float)
    sentence = f"{NAMES[name]}: {speed(speeds[0])} plain PyTorch"
    if len(ends) > 1:
        sentence = f"{NAMES[name]}: {ends[0]} to {ends[-1]} times the speed of plain PyTorch"
    if len(shown) > 1:
        said = [_accuracy_words(group, name) for group in shown]
        count = sum("equal" in words for words in said)
        sentence += f", at equal accuracy in {count} of {len(shown)} settings"
        return sentence[0].upper() + sentence[1:], []
    sentence += _accuracy_words(shown[0], name)
    group, values = shown[0], shown[0].values
    cards = [
        (f"{_mean(values(name, 'speedup').values())}×",
         f"the speed of plain PyTorch: {name} over reference"),
        (_less(group.less_reference(name)), f"points of accuracy: {name} minus reference"),
        (f"{_mean(values(name, 'accuracy').values(), 100, 1)} %", f"test accuracy of {name}"),
        (str(len(group.runs)), "seeds" if len(group.runs) > 1 else "seed"),
    ]  # fmt: skip
    return sentence[0].upper() + sentence[1:], cards


def write(paths: list[str], out: str = "compare.html") -> list[Table]:
    """Compare runs on one page, ``out``; its tables, to be printed."""
    found = groups(paths)
    main = Section("Accuracy and time", [_summary(found)])
    main.plots["accuracy_and_time"] = Plot(
        functools.partial(_plot_accuracy, found), "Accuracy against time",
        "large: mean ± standard deviation over seeds; small: each seed",
    )  # fmt: skip
    ladders = Section("Where the speed comes from")
    for number, group in enumerate(found, 1):
        if group.ladder():
            label = group.label()
            ladders.tables.append(_ladder_table(group))
            ladders.plots[f"ladder_{number}"] = Plot(
                functools.partial(plot_ladder, group.ladder()), "The speed-up ladder",
                f"{label}{'; ' * bool(label)}mean ± standard deviation",
            )  # fmt: skip
    differing = _differing(found)
    if "group" in found[0].columns:
        main.tables.append(_settings_table(found, differing))
    rows = (
        {"folder": group.folders[seed], "seed": seed, **group.columns}
        for group in found
        for seed in group.runs
    )
    listed = Section("Runs", [table("Folders", rows)])
    if len(found) == 1:  # then both plots stand beside each other
        main.plots |= ladders.plots
        main.tables += ladders.tables
        ladders.plots = {}
    sections = [main, *([ladders] if ladders.plots else []), listed]
    main.others = [
        arm["others"] for g in found for run in g.runs.values() for arm in run["arms"].values()
    ]
    common = {n: v for n, v in found[0].settings.items() if n not in differing and n != "arms"}
    seeds = sorted({seed for group in found for seed in group.runs})
    lead = "{} taught by {} on {}".format(
        *(_text(common[n]) if n in common else f"several {n}s" if n != "data" else "several data"
          for n in ("student", "teacher", "data"))
    )  # fmt: skip
    main.headline, main.cards = _headline(found)
    main.lead = [f"{lead}; seeds {', '.join(map(str, seeds))}."]
    if "equal accuracy" in main.headline:
        main.lead[0] += " Equal accuracy: the 95 % interval of the difference over seeds is within "
        main.lead[0] += f"{EQUAL:g} point."
    html = report.html(
        sections, "runs compared", f"compare · {sum(len(group.runs) for group in found)} runs",
        {"in all runs": {name: _text(value) for name, value in common.items()}},
    )  # fmt: skip
    try:
        path = Path(out)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(path.name + ".tmp")
        beside.write_text(html, encoding="utf-8")
        os.replace(beside, path)
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
