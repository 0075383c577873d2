"""What experiment 2, a distillation, has to show."""

import numpy as np
import pandas
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from kdkernels.measuring import duration
from kdkernels.reports import metrics, page, plots
from kdkernels.reports.arms import FOLLOW, LADDER, TIMES_CONTROL, best_of, generation, results
from kdkernels.reports.report import Cell, Plot, Section, Table, table, with_error
from kdkernels.train.loop import PHASES
from kdkernels.train.run_folder import RunFolder
from kdkernels.train.settings import ARMS, CONTROL

MANY_CLASSES = 20
"""A confusion matrix of more classes is drawn without numbers."""


# ---- tables --------------------------------------------------------------------------------------


def _points(arm) -> str:
    difference = arm.get("difference")
    return difference and with_error(*difference.values(), sign="+", scale=100)


def _summary(arms: dict, config: dict) -> Table:
    def to_target(arm):
        seconds = arm["seconds_to_target"]
        if config["target_accuracy"] is not None:
            return "not reached" if seconds is None else f"{seconds:.1f}"

    columns: dict[str, Cell] = {
        "arm": "{arm}",
        "test accuracy": "{accuracy:.1%}",
        "best": "{best:.1%}",
        "minus reference's, points": _points,
        "ECE": "{ece:.2%}",
        "epochs": "{epochs}",
        "seconds": "{seconds:.1f}",
        "seconds an epoch (median)": "{epoch_seconds:.2f}",
        "speed-up over reference": "{speedup:.2f}",
        **metrics.BY_EPOCH,
        "seconds to target": to_target,
    }
    bases = dict.fromkeys(generation(name)[0] for name in arms)
    second = any(generation(name)[1] > 1 for name in arms)
    text = page.note("distillation", c=config, arms=arms, bases=bases, about=ARMS, second=second)
    return table("Experiment 2: accuracy and time", metrics.rows(arms), columns, text)


def _phases(arms: dict) -> Table:
    def seconds_of(phase):
        return lambda arm: f"{arm['phases'][phase]:.2f}" if arm["phases"][phase] >= 0.005 else ""

    columns: dict[str, Cell] = {
        "arm": "{arm}",
        **{phase: seconds_of(phase) for phase in PHASES},
        "loss alone, a step": lambda arm: duration(arm["phases"]["loss"] / arm["steps"]),
    }
    return table("Experiment 2: seconds by phase", metrics.rows(arms), columns, page.note("phases"))


def _ladder_table(rungs: list[dict]) -> Table:
    def by_phase(rung):
        parts = rung.get("saved_by_phase", {})
        shown = [p for p in parts if abs(parts[p]) >= max(0.05 * abs(rung["saved"]), 0.005)]
        shown.sort(key=lambda phase: -abs(parts[phase]))
        return ", ".join(f"{phase} {parts[phase]:.2f}" for phase in shown)

    columns: dict[str, Cell] = {
        "arm": "{arm}",
        "what it adds": "{adds}",
        "seconds": "{seconds:.2f}",
        "seconds saved": "{saved:.2f}",
        "times faster than the row above": "{ratio:.2f}",
        "times faster than reference": "{speedup:.2f}",
        "saved seconds by phase": by_phase,
    }
    first = {key: rungs[0][key] for key in ("arm", "adds", "seconds")}
    text = page.note("ladder", epochs=rungs[0]["epochs"])
    title = "Experiment 2: where the speed comes from"
    return table(title, [first, *rungs[1:]], columns, text)


def _follow_table(found: dict) -> Table:
    limits = {check["name"]: check["limit"] for check in found["checks"]}
    lines = [
        {
            "text": text,
            "value": found["follow"][key],
            "limit": limits.get(f"fused follows reference: {text}"),
        }
        for key, text in FOLLOW.items()
    ]
    columns = {
        "relative difference of the training loss": "{text}",
        "value": "{value:.2g}",
        "must be at most": "{limit:.2g}",
    }
    text = page.note("follow", times=f"{TIMES_CONTROL:g}")
    return table("Experiment 2: does fused follow reference?", lines, columns, text)


def _calibration_table(arms: dict) -> Table:
    lines = []
    for arm in metrics.rows(arms):
        count, right, sure = map(sum, arm["reliability"])
        lines.append(arm | {"confidence": sure / count, "right": right / count, "images": count})
    columns = {
        "arm": "{arm}",
        "ECE": "{ece:.2%}",
        "mean confidence": "{confidence:.1%}",
        "test accuracy": "{right:.1%}",
        "test loss": "{test_loss:.4f}",
    }
    text = page.note("calibration", images=f"{lines[0]['images']:,.0f}")
    return table("Experiment 2: calibration", lines, columns, text)


def _confused_table(arm: str, counts: np.ndarray) -> Table:
    wrong = counts * (1 - np.eye(len(counts), dtype=int))
    order = np.argsort(-wrong, axis=None, kind="stable")[:5]
    pairs = [divmod(place, len(counts)) for place in order.tolist() if wrong.flat[place]]
    lines = [
        {
            "true": true,
            "guess": guess,
            "count": wrong[true, guess],
            "share": wrong[true, guess] / counts[true].sum(),
        }
        for true, guess in pairs
    ]
    columns = {
        "true class": "{true}",
        "guessed": "{guess}",
        "images": "{count}",
        "of the class": "{share:.1%}",
    }
    text = f"{wrong.sum():,} of {counts.sum():,} test images are guessed wrong."
    return table(f"Experiment 2: what {arm} confuses most", lines, columns, text)


# ---- plots ---------------------------------------------------------------------------------------


def _first(arms: dict) -> list[str]:
    """The students of the first generation."""
    return [name for name in arms if name != "teacher" and generation(name)[1] == 1]


def _accuracy_plots(found: dict) -> dict[str, Plot]:
    arms, first = found["arms"], _first(found["arms"])
    lines = {name: pandas.DataFrame(found["epochs"][name]) for name in first}
    by_epoch = {n: (lines[n]["epoch"], lines[n]["accuracy"]) for n in first}
    by_time = {n: (lines[n]["seconds"].cumsum(), lines[n]["accuracy"]) for n in first}

    def curves(points, label, **more):
        teacher = arms.get("teacher", {}).get("accuracy")
        return plots.measures(points, label, "test accuracy", teacher, **more)

    made = {
        "accuracy": Plot(
            curves(by_epoch, "epoch", whole=True), "By epoch", "test accuracy at each epoch's end"
        ),
        "accuracy_by_time": Plot(
            curves(by_time, "seconds of training"), "By time", "the same, over seconds of training"
        ),
        "loss": Plot(
            plots.losses({name: found["losses"][name] for name in first}, {"fused"}),
            "Loss of each step",
            "thick: its mean over a fortieth of the run; alone's loss is the cross-entropy",
        ),
    }
    taught = {}
    for name in arms:
        base, number = generation(name)
        taught.setdefault(base, []).append((number, arms[name]["accuracy"]))
    by_generation = {
        name: tuple(zip(*sorted(points), strict=True))
        for name, points in taught.items()
        if len(points) > 1
    }
    if by_generation:
        figure = curves(by_generation, "generation", whole=True)
        figure.axes[0].margins(x=0.1)
        about = "each generation's student teaches the next"
        made["generations"] = Plot(figure, "By generation", about)
    return made


def _plot_confusion(counts: np.ndarray) -> Figure:
    classes = len(counts)
    figure, axes = page.canvas(page.SIZE[0], 4.6)
    right, shares = np.eye(classes, dtype=bool), counts / counts.sum(1, keepdims=True).clip(1)
    cells = np.empty((classes, classes, 4))
    cells[..., :3] = np.where(right[..., None], to_rgb(page.BLUE), to_rgb(page.RED))
    cells[..., 3] = np.where(right, 0.55 * shares, 0.75 * np.sqrt(shares))
    if classes > MANY_CLASSES:
        axes.pcolormesh(cells, ec="none", lw=0, rasterized=True)
    else:
        axes.pcolormesh(cells, ec=page.PAPER, lw=0.8)
        size = 8 if classes <= 10 else 6
        for true, guess in np.argwhere(counts):
            axes.text(
                guess + 0.5,
                true + 0.5,
                f"{counts[true, guess]:,}",
                ha="center",
                va="center",
                fontsize=size,
            )
        ticks = np.arange(classes)
        axes.set(xticks=ticks + 0.5, xticklabels=ticks, yticks=ticks + 0.5, yticklabels=ticks)
        axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="guessed class", ylabel="true class", aspect="equal")
    axes.invert_yaxis()
    return figure


# ---- the page ------------------------------------------------------------------------------------

NAMES = {
    "full": "fused with kept predictions",
    "cached": "fused loss with kept predictions",
    "fused": "the fused loss",
}


def speed(ratio: float) -> str:
    """A speed-up in words."""
    if ratio >= 1.05:
        return f"{ratio:.1f} times faster than" if ratio < 10 else f"{ratio:.0f} times faster than"
    return "as fast as" if ratio >= 0.95 else f"{1 / ratio:.1f} times slower than"


def _headline(found: dict, config: dict) -> tuple[str, list[tuple[str, str]]]:
    """The finding in one sentence, and cards with its numbers; one seed proves no equality."""
    arms, rungs = found["arms"], found["ladder"]
    name = best_of(arms) or [name for name in arms if name != "teacher"][-1]
    arm, base = arms[name], arms.get("reference") if name != "reference" else None
    title, cards = NAMES.get(name, name), []

    def card(say, about):
        beside = "" if base is None else f"; reference {say.format_map(base)}"
        return say.format_map(arm), about + beside

    if base is None:
        sentence = "{accuracy:.1%} test accuracy after {seconds:.1f} seconds of training"
        sentence = f"{title}: {sentence.format_map(arm)}"
    else:
        ratio = rungs[-1]["speedup"] if name in LADDER else arm["speedup"]
        sentence = f"{title}: {speed(ratio)} plain PyTorch with {arm['accuracy']:.1%} test "
        sentence += f"accuracy against {base['accuracy']:.1%}"
        reached = [one["seconds_to_target"] for one in (base, arm)]
        if None not in reached:
            ratio = reached[0] / reached[1]
            sentence = f"{title}: {config['target_accuracy']:.1%} test accuracy after "
            sentence += f"{reached[1]:.1f} seconds, plain PyTorch after {reached[0]:.1f}"
        cards = [(f"{ratio:.2f}×", f"the speed of plain PyTorch: {name} over reference")]
    cards += [
        card("{accuracy:.1%}", f"test accuracy of {name}"),
        card("{seconds:.3g} s", f"of training, {arm['epochs']} epochs"),
    ]
    if "ece" in arm and (base is None or "ece" in base):
        cards.append(card("{ece:.1%}", "expected calibration error"))
    if "teacher" in arms:
        text = f"test accuracy of the teacher, {config.get('teacher', 'resnet18')}"
        cards.append((f"{arms['teacher']['accuracy']:.1%}", text))
    return f"{sentence[0].upper()}{sentence[1:]} (one seed)", cards


def sections(folder: RunFolder) -> list[Section]:
    """A distillation, or nothing before a student's first epoch is done."""
    found, config = results(folder), folder.config["distill"]
    if found is None or not _first(found["arms"]):
        return []
    made = [_speed_section(found), _accuracy_section(found, folder, config)]
    tested = {name: arm for name, arm in found["arms"].items() if "reliability" in arm}
    if tested:
        made.append(_calibration_section(tested, found["confusion"]))
    if found["follow"]:
        apart = found["apart"]
        figure = plots.differences(
            {
                "fused, its own run": (apart["fused"], page.BLUE, "-"),
                "control: the reference again, rounded otherwise": (apart[CONTROL], page.INK, "--"),
                "fused, on the same logits": (apart["same logits"], page.GREEN, "-"),
            }
        )
        section = Section("Does fused follow reference?", [_follow_table(found)])
        section.plots["loss_difference"] = Plot(figure, "Difference from the reference's loss")
        made.append(section)
    return made


def _speed_section(found: dict) -> Section:
    arms = found["arms"]
    made = Section("Speed", [_phases(arms)])
    if found["ladder"]:
        made.tables.insert(0, _ladder_table(found["ladder"]))
        made.plots["ladder"] = Plot(
            plots.ladder(found["ladder"]),
            "The speed-up ladder",
            "each bar adds one thing to the one above; pale: what that saves; bold: times "
            "reference's speed",
        )
    phases = {name: arms[name]["phases"] for name in _first(arms)}
    figure = plots.phases(phases, "seconds of training", "{:.1f} s".format)
    made.plots["phases"] = Plot(figure, "Where the time goes", "seconds of training by phase")
    return made


def _accuracy_section(found: dict, folder: RunFolder, config: dict) -> Section:
    headline, cards = _headline(found, config)
    size = config["image_size"]
    lead = [
        f"{config.get('student', 'mobilenet_v2')} taught by {config.get('teacher', 'resnet18')} on "
        f"{config['data']} at {size}x{size}, seed {config['seed']}; "
        f"{folder.config['machine']['processor']}. One seed says little about accuracy: kdkernels "
        "compare puts runs of several seeds together."
    ]
    kept = ("arms", "ladder", "follow", "checks", "confusion")
    return Section(
        "Accuracy",
        [_summary(found["arms"], config)],
        _accuracy_plots(found),
        results={key: found[key] for key in kept},
        checks=found["checks"],
        headline=headline,
        lead=lead,
        cards=cards,
        others=[arm["others"] for arm in found["arms"].values()],
    )


def _calibration_section(tested: dict, confusion: dict | None) -> Section:
    bins = {n: arm["reliability"] for n, arm in tested.items() if generation(n)[1] == 1}
    about = f"how often an arm is right when it is so sure; bins of {plots.FEW} images or more"
    made = Section("Calibration and confusion", [_calibration_table(tested)])
    made.plots["reliability"] = Plot(plots.reliability(bins), "Reliability", about)
    if confusion:
        arm, counts = confusion["arm"], np.array(confusion["counts"])
        made.tables.append(_confused_table(arm, counts))
        made.plots["confusion"] = Plot(
            _plot_confusion(counts),
            f"What {arm} takes for what",
            "the most accurate student's test images; blue right, red wrong",
        )
    return made
