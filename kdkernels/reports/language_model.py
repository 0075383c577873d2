"""The tables and plots of experiment 4, for :func:`kdkernels.reports.report.write`."""

import functools

import pandas
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kdkernels.experiments.settings import LM_ARMS
from kdkernels.reports.distillation import plot_phases
from kdkernels.reports.metrics import apart, curves_of, limited, speedup_cells, speedups, spent
from kdkernels.reports.page import COLOURS, canvas, note
from kdkernels.reports.report import Plot, Section, Table, table
from kdkernels.train.loop import PHASES
from kdkernels.train.run_folder import RunFolder

TITLE = "Experiment 4: a language model"


# Limits on relative differences from the reference; the arms it holds for differ from it by
# rounding only, which training magnifies from step to step.
FIRST_STEPS = 1e-4
AGREE = {"loss": 1e-5, "gradient": 1e-4}


def results(folder: RunFolder) -> dict | None:
    """Read experiment 4's metrics.

    Returns:
        None where there are none yet; otherwise ``losses`` (learner -> loss of each step),
        ``epochs`` (learner -> its epoch lines), ``arms`` (a row each for the tables: tokens,
        seconds, by phase too, tokens a second, peak bytes, held-out loss and perplexity,
        operations of a step's matrix products, bytes that its loss moves of ``[N, V]`` tensors;
        over the reference's, ``speedup``, ``memory`` and, with both models and Adam's moments,
        ``whole_memory``), ``apart`` (arm -> relative difference from the reference's
        losses), ``agreement`` (see the file agreement.json), ``topk_share`` (mean over
        tokens of the probability, at the temperature, that the teacher gives to the classes kept of
        it), ``work`` (see language_model.json),
        ``models_bytes`` (both models and the student's moments) and ``checks``.
    """
    losses, epochs, _ = curves_of(folder)
    work = folder.read_json("language_model.json")
    if work is None or not epochs.keys() - {"teacher"}:
        return None
    config = folder.config["language_model"]
    # In fp32: both models, and Adam's two moments of the student's.
    models = 4 * (3 * work["student_parameters"] + work["teacher_parameters"])
    logits = 4 * config["batch_size"] * config["context"] * work["vocabulary"]  # bytes, fp32
    arms = {}
    for name, lines in epochs.items():
        phases = spent(lines)
        peaks = [line["peak_bytes"] for line in lines if line.get("peak_bytes") is not None]
        seconds, tokens = sum(phases.values()), sum(line["tokens"] for line in lines)
        arms[name] = {
            "epochs": len(lines), "steps": lines[-1]["step"], "tokens": tokens,
            "phases": phases, "seconds": seconds, "tokens_per_second": tokens / seconds,
            "peak_bytes": max(peaks) if peaks else None,
            "held_out_loss": lines[-1]["held_out_loss"], "perplexity": lines[-1]["perplexity"],
        }  # fmt: skip
        if name == "teacher":
            continue
        arm = LM_ARMS[name]
        passes = work["passes"] if arm.loss == "plain" else arm.passes
        arms[name]["operations"] = sum(work["operations"][part] for part in arm.products)
        arms[name]["logits_bytes"] = None if passes is None else passes * logits
    base = arms.get("reference")
    for name, arm in arms.items():
        if base is None or name == "teacher":
            continue
        pairs = list(zip(epochs["reference"], epochs[name], strict=False))
        arm["speedup"] = sum(a["seconds"] for a, _ in pairs) / sum(b["seconds"] for _, b in pairs)
        arm |= speedups(epochs["reference"], epochs[name])
        if arm["peak_bytes"] and base["peak_bytes"]:
            arm["memory"] = arm["peak_bytes"] / base["peak_bytes"]
            arm["whole_memory"] = (models + arm["peak_bytes"]) / (models + base["peak_bytes"])
    top = folder.load("teacher-topk")
    agreement = folder.read_json("agreement.json") or {}
    checks, curves = [], {}
    for name in arms:
        if base is None or name in ("teacher", "reference"):
            continue
        curves[name] = apart(losses["reference"], losses[name])
        if not LM_ARMS[name].exact:
            continue
        found = [
            (f"{key} of the first batch, same weights", agreement[name][key], limit)
            for key, limit in AGREE.items()
            if name in agreement
        ]
        found.append(("loss curves, first two steps", max(curves[name][:2]), FIRST_STEPS))
        checks += [limited(f"{name} follows reference: {text}", *rest) for text, *rest in found]
    return {
        "losses": losses, "epochs": epochs, "arms": arms, "apart": curves, "agreement": agreement,
        "topk_share": None if top is None else top[1]["share"], "work": work,
        "models_bytes": models, "checks": checks,
    }  # fmt: skip


def _megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:,.0f}"


def tables(found: dict, config: dict) -> list[Table]:
    """The tables of what :func:`results` found."""
    made = [_summary(found, config), _phases(found), _computed(found, config)]
    return made + ([_followed(found, config)] if found["apart"] else [])


def _summary(found: dict, config: dict) -> Table:
    def row(name, arm):
        return {
            "arm": name,
            "tokens a second": f"{arm['tokens_per_second']:,.0f}",
            "times reference": f"{arm['speedup']:.2f}" if "speedup" in arm else "",
            **speedup_cells(arm),
            "peak memory, MB": _megabytes(arm["peak_bytes"]),
            "of reference's": f"{arm['memory']:.2f}" if "memory" in arm else "",
            "with weights and moments": f"{arm['whole_memory']:.2f}" if "memory" in arm else "",
            "held-out loss": f"{arm['held_out_loss']:.4f}",
            "perplexity": f"{arm['perplexity']:,.0f}",
            "tokens": f"{arm['tokens']:,}",
        }

    return table(
        f"{TITLE}: speed, memory, held-out loss",
        (row(name, arm) for name, arm in found["arms"].items()),
        note(
            "language_model",
            c=config,
            work=found["work"],
            students=_students(found),
            megabytes=_megabytes(found["models_bytes"]),
            about=LM_ARMS,
        ),
    )


def _phases(found: dict) -> Table:
    def row(name, arm):
        spent = arm["phases"] | {"all": arm["seconds"]}
        return {"arm": name} | {
            key: f"{spent[key] / arm['steps'] * 1e3:,.1f}" for key in (*PHASES, "all")
        }

    return table(
        f"{TITLE}: milliseconds a step, by phase",
        (row(name, arm) for name, arm in found["arms"].items()),
        note("lm_phases"),
    )


def _computed(found: dict, config: dict) -> Table:
    work, rows = found["work"], config["batch_size"] * config["context"]
    logits = 4 * rows * work["vocabulary"]

    def row(name, arm):
        moved = arm["logits_bytes"]
        return {
            "arm": name,
            "matrix products, GFLOP": f"{arm['operations'] / 1e9:,.1f}",
            "loss: passes over [N, V]": "" if moved is None else round(moved / logits),
            "GB": "" if moved is None else f"{moved / 1e9:.2f}",
            "GFLOP of products a second, over the whole step":
            f"{arm['operations'] * arm['steps'] / arm['seconds'] / 1e9:,.0f}",
        }  # fmt: skip

    return table(
        f"{TITLE}: what a step computes",
        (row(name, arm) for name, arm in _students(found).items()),
        note("lm_computed", c=config, work=work, rows=rows),
    )


def _followed(found: dict, config: dict) -> Table:
    def row(name, values):
        agreement = found["agreement"].get(name)
        return {
            "relative difference from the reference's": name,
            "loss of the first batch": f"{agreement['loss']:.1e}" if agreement else "",
            "its gradient": f"{agreement['gradient']:.1e}" if agreement else "",
            "loss curve, first two steps": f"{max(values[:2]):.1e}",
            "largest of the run": f"{max(values):.1e}",
        }

    share = found["topk_share"] if "topk" in found["apart"] else None
    text = note("lm_follow", c=config, share=share)
    rows = (row(name, values) for name, values in found["apart"].items())
    return table(f"{TITLE}: do the arms follow reference?", rows, text)


def _students(found: dict) -> dict:
    return {name: arm for name, arm in found["arms"].items() if name != "teacher"}


def _plot_speed(found: dict) -> Figure:
    arms = _students(found)
    shown = [("tokens a second", "tokens_per_second", 1.0, "speedup", "×")]
    if all(arm["peak_bytes"] is not None for arm in arms.values()):
        shown.append(("peak memory of a step, MB", "peak_bytes", 1e-6, "memory", "× reference"))
    size = 8.5, 1.4 + 0.45 * len(arms)
    figure, panels = canvas(*size, 1, len(shown), sharey=True, squeeze=False)
    for axes, (title, key, scale, ratio, unit) in zip(panels[0], shown, strict=True):
        values = [arm[key] * scale for arm in arms.values()]
        axes.barh(list(arms), values, color=[COLOURS[name] for name in arms], height=0.62)
        for row, (value, arm) in enumerate(zip(values, arms.values(), strict=True)):
            text = f"{value:,.0f}" + (f"  ({arm[ratio]:.2f} {unit})" if ratio in arm else "")
            axes.annotate(
                text, (value, row), (4, 0), textcoords="offset points", va="center", fontsize=8
            )
        axes.set(xlabel=title, xlim=(0, max(values) * 1.45))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.grid(axis="y", visible=False)
    panels[0][0].invert_yaxis()
    return figure


def _plot_phases(found: dict) -> Figure:
    spent = {
        name: {phase: seconds / arm["steps"] * 1e3 for phase, seconds in arm["phases"].items()}
        for name, arm in _students(found).items()
    }
    return plot_phases(spent, "milliseconds a step", "{:,.0f} ms".format)


def _plot_losses(found: dict) -> Figure:
    figure, (curves, below) = canvas(8.5, 7, 2, 1, sharex=True, height_ratios=[3, 2])
    looks = {"reference": ("-", 3.5), "topk": ("-", 1.2)}
    for name in _students(found):
        style, width = looks.get(name, ("--", 1.2))
        losses = found["losses"][name]
        steps = range(1, len(losses) + 1)
        curves.plot(steps, losses, style, lw=width, color=COLOURS[name], label=name)
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
    figure, axes = canvas(8.5, 4)
    for name in _students(found):
        lines = pandas.DataFrame(found["epochs"][name])
        spent, losses = lines["seconds"].cumsum(), lines["held_out_loss"]
        axes.plot(spent, losses, "o-", ms=4, color=COLOURS[name], label=name)
    if "teacher" in found["arms"]:
        best = found["arms"]["teacher"]["held_out_loss"]
        axes.axhline(best, color=COLOURS["teacher"], ls=":", label=f"teacher {best:.2f}")
    axes.set(xlabel="seconds of training", ylabel="held-out loss, nats a token", xlim=(0, None))
    axes.legend(fontsize=9)
    return figure


def sections(folder: RunFolder) -> list[Section]:
    """The experiment, or nothing before an arm's first epoch is done."""
    found = results(folder)
    if not found:
        return []
    plots = {
        "lm_speed": (_plot_speed, "Speed and memory"), "lm_losses": (_plot_losses, "Losses"),
        "lm_phases": (_plot_phases, "Where the time goes"),
        "lm_held_out": (_plot_held_out, "Held-out loss by time, a dot an epoch"),
    }  # fmt: skip
    lines = [line for lines in found["epochs"].values() for line in lines]
    return [
        Section(
            TITLE,
            tables(found, folder.config["language_model"]),
            {name: Plot(functools.partial(f, found), title) for name, (f, title) in plots.items()},
            results={key: found[key] for key in ("arms", "agreement", "work", "checks")},
            checks=found["checks"],
            others=[line.get("others") for line in lines],
        )
    ]
