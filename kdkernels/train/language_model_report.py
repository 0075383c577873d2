"""The tables and plots of experiment 4, for :func:`kdkernels.train.report.write`."""

import functools

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kdkernels.train import language_model
from kdkernels.train.distillation_report import plot_phases
from kdkernels.train.language_model import ARMS
from kdkernels.train.loop import PHASES
from kdkernels.train.page import COLOURS
from kdkernels.train.report import Section, Table
from kdkernels.train.run_folder import RunFolder

__all__ = ["TITLE", "sections", "tables"]

TITLE = "Experiment 4: a language model"


def _megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:,.0f}"


def tables(found: dict, config: dict) -> list[Table]:
    """The tables of :func:`kdkernels.train.language_model.results`.

    Args:
        found: what it returned.
        config: the experiment's settings, as a dictionary.
    """
    arms, work = found["arms"], found["work"]
    students = {name: arm for name, arm in arms.items() if name != "teacher"}
    rows = config["batch_size"] * config["context"]
    summary = Table(
        f"{TITLE}: speed, memory, held-out loss",
        ["arm", "tokens a second", "times reference", "by epoch: median (range)",
         "peak memory, MB", "of reference's", "with weights and moments",
         "held-out loss", "perplexity", "tokens"],
        [
            [
                name,
                f"{arm['tokens_per_second']:,.0f}",
                f"{arm['speedup']:.2f}" if "speedup" in arm else "",
                "{:.2f} ({:.2f} .. {:.2f})".format(
                    arm["epoch_speedup"], *arm["epoch_speedup_range"]
                )
                if "speedup" in arm
                else "",
                _megabytes(arm["peak_bytes"]),
                f"{arm['memory']:.2f}" if "memory" in arm else "",
                f"{arm['whole_memory']:.2f}" if "memory" in arm else "",
                f"{arm['held_out_loss']:.4f}",
                f"{arm['perplexity']:,.0f}",
                f"{arm['tokens']:,}",
            ]
            for name, arm in arms.items()
        ],
        f"Teacher {config['teacher_layers']} layers of {config['teacher_width']}, student "
        f"{config['student_layers']} of {config['student_width']}, V = {work['vocabulary']:,}, "
        f"{config['batch_size']} windows of {config['context']} tokens a step, fp32, lr "
        f"{config['lr']:g}, temperature {config['temperature']:g}, alpha {config['alpha']:g}. "
        "Speeds are of training steps; testing and checkpoints are left out, what is kept of the "
        "teacher is counted in an arm's first epoch. The arms take turns epoch by epoch, and all "
        "step with Adam's fused kernel. Memory is the most that a step takes beyond what was there "
        "before (weights, Adam's moments, the other arms): on a CPU the peak of the resident set "
        "less the resident set at the epoch's start, so what is read of a kept teacher's file "
        "counts; on CUDA what torch allocated. With weights "
        f"and moments: the same ratio where {_megabytes(found['models_bytes'])} MB "
        "of both models and the student's moments are added to either side. Held-out loss is the "
        "cross-entropy of the next token in nats, over "
        f"{work['held_out_windows']:,} windows of files not trained on. "
        + " ".join(f"{name}: {ARMS[name].about}." for name in students),
    )  # fmt: skip
    phases = Table(
        f"{TITLE}: milliseconds a step, by phase",
        ["arm", *PHASES, "all"],
        [
            [
                name,
                *(f"{arm['phases'][phase] / arm['steps'] * 1e3:,.1f}" for phase in PHASES),
                f"{arm['seconds'] / arm['steps'] * 1e3:,.1f}",
            ]
            for name, arm in arms.items()
        ],
        "Fused losses make the gradient of the logits in the forward call. linear and full have "
        "the heads' products, forward and backward, under loss; the others have them under "
        "teacher, student forward and backward.",
    )
    computed = Table(
        f"{TITLE}: what a step computes",
        ["arm", "matrix products, GFLOP", "loss: passes over [N, V]", "GB",
         "GFLOP of products a second, over the whole step"],
        [
            [
                name,
                f"{arm['operations'] / 1e9:,.1f}",
                "" if arm["logits_bytes"] is None
                else str(round(arm["logits_bytes"] / (4 * rows * work["vocabulary"]))),
                "" if arm["logits_bytes"] is None else f"{arm['logits_bytes'] / 1e9:.2f}",
                f"{arm['operations'] * arm['steps'] / arm['seconds'] / 1e9:,.0f}",
            ]
            for name, arm in students.items()
        ],
        f"N = {rows:,} tokens a step; a tensor of [N, V] in fp32 is "
        f"{4 * rows * work['vocabulary'] / 1e6:,.0f} MB. Products: "
        + ", ".join(f"{part} {value / 1e9:,.1f}" for part, value in work["operations"].items())
        + " GFLOP, the student's forward and backward, the teacher's forward. The reference's "
        "passes are counted op by op as it runs; dense reads both logits and writes the gradient; "
        "linear's logits stay in cache a chunk of rows at a time. The last column says how near an "
        "arm comes to a machine that only multiplies matrices. What is kept of the teacher is "
        f"{4 * config['teacher_width']:,} bytes a token in full, {6 * config['k'] + 4:,} in topk; "
        f"its logits would be {4 * work['vocabulary']:,}.",
    )  # fmt: skip
    made = [summary, phases, computed]
    if found["apart"]:
        made.append(
            Table(
                f"{TITLE}: do the arms follow reference?",
                ["relative difference from the reference's", "loss of the first batch",
                 "its gradient", "loss curve, first two steps", "largest of the run"],
                [
                    [
                        name,
                        *(
                            f"{found['agreement'][name][key]:.1e}"
                            if name in found["agreement"] else ""
                            for key in ("loss", "gradient")
                        ),
                        f"{max(values[:2]):.1e}",
                        f"{max(values):.1e}",
                    ]
                    for name, values in found["apart"].items()
                ],
                "The first batch is from the same weights; the gradient is of all parameters, in "
                "norm. Arms with the reference's loss differ by rounding, which training "
                "magnifies from step to step."
                + (
                    f" topk's loss is another: its teacher is {config['k']} classes, which at "
                    f"temperature {config['temperature']:g} hold {found['topk_share']:.0%} of its "
                    "probability, and the rest as one." if "topk" in found["apart"] else ""
                ),
            )
        )  # fmt: skip
    return made


def _students(found: dict) -> dict:
    return {name: arm for name, arm in found["arms"].items() if name != "teacher"}


def _plot_speed(found: dict) -> Figure:
    arms = _students(found)
    figure = Figure(figsize=(8.5, 1.4 + 0.45 * len(arms)), layout="constrained")
    measured = all(arm["peak_bytes"] is not None for arm in arms.values())
    panels = figure.subplots(1, 2 if measured else 1, sharey=True, squeeze=False)[0]
    shown = [
        ("tokens a second", [arm["tokens_per_second"] for arm in arms.values()], "speedup", "×"),
        ("peak memory of a step, MB", [(arm["peak_bytes"] or 0) / 1e6 for arm in arms.values()],
         "memory", "× reference"),
    ]  # fmt: skip
    for axes, (title, values, ratio, unit) in zip(panels, shown, strict=False):
        axes.barh(list(arms), values, color=[COLOURS[name] for name in arms], height=0.62)
        for row, (value, arm) in enumerate(zip(values, arms.values(), strict=True)):
            text = f"{value:,.0f}" + (f"  ({arm[ratio]:.2f} {unit})" if ratio in arm else "")
            axes.annotate(
                text, (value, row), (4, 0), textcoords="offset points", va="center", fontsize=8
            )
        axes.set(xlabel=title, xlim=(0, max(values) * 1.45))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.grid(axis="y", visible=False)
    panels[0].invert_yaxis()
    figure.suptitle("Speed and memory", fontsize=12)
    return figure


def _plot_phases(found: dict) -> Figure:
    spent = {
        name: {phase: seconds / arm["steps"] * 1e3 for phase, seconds in arm["phases"].items()}
        for name, arm in _students(found).items()
    }
    return plot_phases(spent, "milliseconds a step", "{:,.0f} ms".format)


def _plot_losses(found: dict) -> Figure:
    figure = Figure(figsize=(8.5, 7), layout="constrained")
    curves, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    looks = {"reference": ("-", 3.5), "topk": ("-", 1.2)}
    for name in _students(found):
        style, width = looks.get(name, ("--", 1.2))
        losses = found["losses"][name]
        curves.plot(
            range(1, len(losses) + 1), losses, style, lw=width, color=COLOURS[name], label=name
        )
        if name in found["apart"]:
            # Equal losses have no place on a logarithmic axis: the floor stands for them.
            values = [max(value, 1e-9) for value in found["apart"][name]]
            below.plot(range(1, len(values) + 1), values, lw=1, color=COLOURS[name], label=name)
    curves.set(ylabel="training loss", title="Loss of each step")
    curves.legend(fontsize=9)
    below.set(xlabel="step", ylabel="relative difference", yscale="log", ylim=(5e-10, 1))
    below.set_title("Difference from the reference's loss")
    if found["apart"]:
        below.legend(fontsize=8)
    return figure


def _plot_held_out(found: dict) -> Figure:
    figure = Figure(figsize=(8.5, 4), layout="constrained")
    axes = figure.subplots()
    for name, lines in found["epochs"].items():
        if name == "teacher":
            continue
        spent, total = [], 0.0
        for line in lines:
            total += line["seconds"]
            spent.append(total)
        values = [line["held_out_loss"] for line in lines]
        axes.plot(spent, values, "o-", ms=4, color=COLOURS[name], label=name)
    if "teacher" in found["arms"]:
        best = found["arms"]["teacher"]["held_out_loss"]
        axes.axhline(best, color=COLOURS["teacher"], ls=":", label=f"teacher {best:.2f}")
    axes.set(
        xlabel="seconds of training", ylabel="held-out loss, nats a token", xlim=(0, None),
        title="Held-out loss by time, a dot an epoch",
    )  # fmt: skip
    axes.legend(fontsize=9)
    return figure


def sections(folder: RunFolder) -> list[Section]:
    """The experiment, or nothing before an arm's first epoch is done."""
    found = language_model.results(folder)
    if not found:
        return []
    plots = {
        "lm_speed": _plot_speed, "lm_phases": _plot_phases, "lm_losses": _plot_losses,
        "lm_held_out": _plot_held_out,
    }  # fmt: skip
    return [
        Section(
            TITLE,
            tables(found, folder.config["language_model"]),
            {name: functools.partial(plot, found) for name, plot in plots.items()},
            results={key: found[key] for key in ("arms", "agreement", "work", "checks")},
            checks=found["checks"],
        )
    ]
