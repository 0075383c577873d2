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

from kdkernels.train import TrainError, distillation_report, page, report
from kdkernels.train.distillation_report import CLEAR, LADDER, NAMES, generation, plot_ladder, speed
from kdkernels.train.page import INK, SIZE, colour
from kdkernels.train.report import Section, Table
from kdkernels.train.run_folder import RunFolder
from kdkernels.train.soft_regularization import difference

__all__ = ["Group", "groups", "write"]

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
        runs: seed -> :func:`kdkernels.train.distillation_report.results`.
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
    found = distillation_report.results(folder)
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
    """Read runs and group them.

    Args:
        paths: folders of runs of ``distill`` or ``reproduce``.

    Raises:
        TrainError: one of them is no such run or not finished, or two are of one seed and the same
            settings.
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
    return Table(
        "Settings that differ",
        ["setting", *(group.label() for group in found)],
        [
            [name.replace("_", " "), *(_text(group.settings.get(name)) for group in found)]
            for name in differing
        ],
    )


def _mean(values, scale: float = 1, digits: int = 2) -> str:
    """``mean ± standard deviation``; empty without values, without the latter for one."""
    values = [value * scale for value in values]
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def _less(apart: dict | None, digits: int = 2) -> str:
    if apart is None:
        return ""
    error = apart["standard_error"]
    text = f"{apart['mean'] * 100:+.{digits}f}"
    return text + (f" ± {error * 100:.{digits}f}" if error is not None else "")


def _summary(found: list[Group]) -> Table:
    tested = any(group.values(arm, "ece") for group in found for arm in group.arms())
    aimed = any(group.values(arm, "seconds_to_target") for group in found for arm in group.arms())
    rows = []
    for group in found:
        for arm in group.arms():
            reached = group.values(arm, "seconds_to_target")
            accuracy = group.values(arm, "accuracy")
            rows.append(
                [arm]
                + list(group.columns.values())
                + [str(len(accuracy)), _mean(accuracy.values(), 100)]
                + [_less(group.less_reference(arm))]
                + ([_mean(group.values(arm, "ece").values(), 100)] if tested else [])
                + [_mean(group.values(arm, "seconds").values())]
                + (
                    [
                        _mean(reached.values())
                        + f" ({len(reached)} of {len(accuracy)})" * bool(reached)
                    ]
                    * aimed
                )
                + [_mean(group.values(arm, "speedup").values())]
            )
    return Table(
        "Accuracy and time over seeds",
        ["arm", *found[0].columns, "seeds", "test accuracy, %",
         "minus reference's, points"]
        + (["ECE, %"] if tested else [])
        + ["seconds"]
        + (["seconds to target (seeds)"] if aimed else [])
        + ["times reference's speed"],
        rows,
        "Mean ± standard deviation over seeds. A seed sets weights, batches, dropout and noise, of "
        "teacher and students. Minus reference's: the difference of accuracy within each run, mean "
        "over seeds ± its standard error. Speed: reference's seconds over the arm's, in each run, "
        "whose arms took turns epoch by epoch. Seconds are of training steps; testing and "
        "checkpoints are left out, and the teacher's training is nobody's. Generations after the "
        "first are compared with reference's of the first by accuracy and with its own of that "
        "generation by time.",
    )  # fmt: skip


def _ladder_table(group: Group) -> Table:
    rungs, label = group.ladder(), group.label()

    def cell(rung, key):
        spread = rung.get(f"{key}_spread")
        return f"{rung[key]:.2f}" + (f" ± {spread:.2f}" if spread is not None else "")

    return Table(
        "Where the speed comes from" + (f": {label}" if label else ""),
        ["arm", "what it adds", "seconds", "seconds saved", "times faster than the row above",
         "times faster than reference"],
        [
            [rung["arm"], rung["adds"], cell(rung, "seconds")]
            + ([cell(rung, key) for key in ("saved", "ratio", "speedup")] if row else [""] * 3)
            for row, rung in enumerate(rungs)
        ],
        f"Mean ± standard deviation over {rungs[0]['seeds']} seeds; the ratios are taken in each "
        "run." * (rungs[0]["seeds"] > 1),
    )  # fmt: skip


def _plot_accuracy(found: list[Group]) -> Figure:
    figure = Figure(figsize=(SIZE[0], SIZE[1] + 0.2 * (len(found) > 1)), layout="constrained")
    axes = figure.subplots()
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
    clear = []
    for group in shown:
        apart = group.less_reference(name) or {}
        if abs(apart.get("standard_errors") or 0.0) > CLEAR:
            clear.append(apart["mean"])
    known = all(len(group.values(name, "speedup")) > 1 for group in shown)
    if known and not clear and len(shown) == 1:
        sentence += f" at equal accuracy ({_less(shown[0].less_reference(name), 1)} points)"
    elif known and not clear:
        several = "both" if len(shown) == 2 else f"all {len(shown)}"
        sentence += f" at equal accuracy in {several} settings"
    elif known and len(shown) == 1:
        word = "higher" if clear[0] > 0 else "lower"
        sentence += f" at {abs(clear[0]) * 100:.1f} points {word} accuracy"
    elif known:
        word = "another" if len(clear) == 1 else "other"
        sentence += f", with {word} accuracy in {len(clear)} of {len(shown)} settings"
    cards = []
    if len(shown) == 1:
        group = shown[0]
        text = _mean(group.values(name, "speedup").values())
        cards = [
            (f"{text}×", f"the speed of plain PyTorch: {name} over reference"),
            (f"{_less(group.less_reference(name))}", f"points of accuracy: {name} minus reference"),
            (f"{_mean(group.values(name, 'accuracy').values(), 100, 1)} %",
             f"test accuracy of {name}"),
            (str(len(group.runs)), "seeds" if len(group.runs) > 1 else "seed"),
        ]  # fmt: skip
    return sentence[0].upper() + sentence[1:], cards


def write(paths: list[str], out: str = "compare.html") -> list[Table]:
    """Compare runs on one page.

    Args:
        paths: see :func:`groups`.
        out: the page.

    Returns:
        Its tables, to be printed.

    Raises:
        TrainError: see :func:`groups`, and a page that cannot be written.
    """
    found = groups(paths)
    headline, cards = _headline(found)
    main = Section(
        "Accuracy and time",
        [_summary(found)],
        {"accuracy_and_time": functools.partial(_plot_accuracy, found)},
        {
            "accuracy_and_time": (
                "Accuracy against time",
                "large: mean ± standard deviation over seeds; small: each seed",
            )
        },
    )
    ladders = Section("Where the speed comes from")
    for number, group in enumerate(found, 1):
        if group.ladder():
            label = group.label()
            ladders.tables.append(_ladder_table(group))
            ladders.plots[f"ladder_{number}"] = functools.partial(plot_ladder, group.ladder())
            ladders.captions[f"ladder_{number}"] = (
                "The speed-up ladder", f"{label}{'; ' * bool(label)}mean ± standard deviation",
            )  # fmt: skip
    differing = _differing(found)
    if "group" in found[0].columns:
        main.tables.append(_settings_table(found, differing))
    listed = Section(
        "Runs",
        [
            Table(
                "Folders",
                ["folder", "seed", *found[0].columns],
                [
                    [group.folders[seed], str(seed), *group.columns.values()]
                    for group in found
                    for seed in group.runs
                ],
            )
        ],
    )
    if len(found) == 1:  # then both plots stand beside each other
        main.plots |= ladders.plots
        main.captions |= ladders.captions
        main.tables += ladders.tables
        ladders.plots = {}
    sections = [main, *([ladders] if ladders.plots else []), listed]
    common = {n: v for n, v in found[0].settings.items() if n not in differing and n != "arms"}
    seeds = sorted({seed for group in found for seed in group.runs})
    lead = "{} taught by {} on {}".format(
        *(_text(common[n]) if n in common else f"several {n}s" if n != "data" else "several data"
          for n in ("student", "teacher", "data"))
    )  # fmt: skip
    html = page.render(
        title="kdkernels: runs compared",
        kicker=f"kdkernels · compare · {sum(len(group.runs) for group in found)} runs",
        headline=headline,
        lead=[f"{lead}; seeds {', '.join(map(str, seeds))}."
              + " Equal accuracy: no difference beyond two standard errors over seeds."
              * ("equal accuracy" in headline)],
        cards=cards,
        sections=[report.draw(section) for section in sections],
        settings={"in all runs": {name: _text(value) for name, value in common.items()}},
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
