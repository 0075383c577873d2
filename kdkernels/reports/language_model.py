"""The tables and plots of experiment 4, for :func:`kdkernels.reports.report.write`."""

from typing import Any

import pandas
from matplotlib.figure import Figure

from kdkernels.experiments.settings import LM_ARMS
from kdkernels.reports import metrics, plots
from kdkernels.reports.page import COLOURS, note
from kdkernels.reports.report import Cell, Plot, Section, Table, table
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
        ``epochs`` (learner -> its epoch lines), ``arms`` (see :func:`_arm`), ``apart`` (arm ->
        relative difference from the reference's losses), ``agreement`` (see agreement.json),
        ``topk_share`` (mean over tokens of the probability, at the temperature, of the classes kept
        of the teacher), ``work`` (see language_model.json), ``models_bytes`` (both models and the
        student's moments) and ``checks``.
    """
    losses, epochs, _ = metrics.curves_of(folder)
    work = folder.read_json("language_model.json")
    if work is None or not epochs.keys() - {"teacher"}:
        return None
    config = folder.config["language_model"]
    # In fp32: both models, and Adam's two moments of the student's.
    models = 4 * (3 * work["student_parameters"] + work["teacher_parameters"])
    logits = 4 * config["batch_size"] * config["context"] * work["vocabulary"]  # bytes, fp32
    arms = {name: _arm(name, lines, work, logits) for name, lines in epochs.items()}
    for name in _students(arms) if "reference" in arms else ():
        arms[name] |= _beside_reference(name, arms, epochs, models)
    top = folder.load("teacher-topk")
    agreement = folder.read_json("agreement.json") or {}
    curves = {
        name: metrics.apart(losses["reference"], losses[name])
        for name in _students(arms)
        if "reference" in arms and name != "reference"
    }
    return {
        "losses": losses,
        "epochs": epochs,
        "arms": arms,
        "apart": curves,
        "agreement": agreement,
        "topk_share": None if top is None else top[1]["share"],
        "work": work,
        "models_bytes": models,
        "checks": _checks(curves, agreement),
    }


def _arm(name: str, lines: list[dict], work: dict, logits: int) -> dict[str, Any]:
    arm = metrics.timed(lines)
    peaks = [line["peak_bytes"] for line in lines if line.get("peak_bytes") is not None]
    tokens = sum(line["tokens"] for line in lines)
    arm |= {
        "tokens": tokens,
        "tokens_per_second": tokens / arm["seconds"],
        "peak_bytes": max(peaks) if peaks else None,
        "held_out_loss": lines[-1]["held_out_loss"],
        "perplexity": lines[-1]["perplexity"],
    }
    if name != "teacher":
        kind = LM_ARMS[name]
        passes = work["passes"] if kind.loss == "plain" else kind.passes
        arm["operations"] = sum(work["operations"][part] for part in kind.products)
        arm["logits_bytes"] = None if passes is None else passes * logits
    return arm


def _beside_reference(name: str, arms: dict, epochs: dict, models: int) -> dict[str, Any]:
    arm, base = arms[name], arms["reference"]
    pairs = list(zip(epochs["reference"], epochs[name], strict=False))
    found = metrics.speedups(epochs["reference"], epochs[name]) | {
        "speedup": sum(a["seconds"] for a, _ in pairs) / sum(b["seconds"] for _, b in pairs)
    }
    if arm["peak_bytes"] and base["peak_bytes"]:
        found["memory"] = arm["peak_bytes"] / base["peak_bytes"]
        found["whole_memory"] = (models + arm["peak_bytes"]) / (models + base["peak_bytes"])
    return found


def _checks(curves: dict[str, list[float]], agreement: dict) -> list[dict]:
    checks = []
    for name in [name for name in curves if LM_ARMS[name].exact]:
        found = [
            (f"{key} of the first batch, same weights", agreement[name][key], limit)
            for key, limit in AGREE.items()
            if name in agreement
        ]
        found.append(("loss curves, first two steps", max(curves[name][:2]), FIRST_STEPS))
        checks += [
            metrics.limited(f"{name} follows reference: {text}", *rest) for text, *rest in found
        ]
    return checks


def _students(arms: dict) -> dict:
    return {name: arm for name, arm in arms.items() if name != "teacher"}


# ---- tables --------------------------------------------------------------------------------------


def _megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:,.0f}"


def _tables(found: dict, config: dict) -> list[Table]:
    arms, work, students = found["arms"], found["work"], _students(found["arms"])
    rows = config["batch_size"] * config["context"]
    speed: dict[str, Cell] = {
        "arm": "{arm}",
        "tokens per second": "{tokens_per_second:,.0f}",
        "times reference": "{speedup:.2f}",
        **metrics.BY_EPOCH,
        "peak memory, MB": lambda arm: _megabytes(arm["peak_bytes"]),
        "of reference's": "{memory:.2f}",
        "with weights and moments": "{whole_memory:.2f}",
        "held-out loss": "{held_out_loss:.4f}",
        "perplexity": "{perplexity:,.0f}",
        "tokens": "{tokens:,}",
    }
    phases: dict[str, Cell] = {
        "arm": "{arm}",
        **{
            phase: lambda arm, phase=phase: f"{arm['phases'][phase] / arm['steps'] * 1e3:,.1f}"
            for phase in PHASES
        },
        "all": lambda arm: f"{arm['seconds'] / arm['steps'] * 1e3:,.1f}",
    }
    computed: dict[str, Cell] = {
        "arm": "{arm}",
        "matrix products, GFLOP": lambda arm: f"{arm['operations'] / 1e9:,.1f}",
        "loss: passes over [N, V]": lambda arm: (
            arm["logits_bytes"] is not None
            and round(arm["logits_bytes"] / (4 * rows * work["vocabulary"]))
        ),
        "GB": lambda arm: arm["logits_bytes"] is not None and f"{arm['logits_bytes'] / 1e9:.2f}",
        "GFLOP of products a second, over the whole step": lambda arm: (
            f"{arm['operations'] * arm['steps'] / arm['seconds'] / 1e9:,.0f}"
        ),
    }
    text = note(
        "language_model",
        c=config,
        work=work,
        students=students,
        about=LM_ARMS,
        megabytes=_megabytes(found["models_bytes"]),
    )
    made = [
        table(f"{TITLE}: speed, memory, held-out loss", metrics.rows(arms), speed, text),
        table(
            f"{TITLE}: milliseconds a step, by phase", metrics.rows(arms), phases, note("lm_phases")
        ),
        table(
            f"{TITLE}: what a step computes",
            metrics.rows(students),
            computed,
            note("lm_computed", c=config, work=work, rows=rows),
        ),
    ]
    if found["apart"]:
        made.append(_followed(found, config))
    return made


def _followed(found: dict, config: dict) -> Table:
    rows = [
        {"arm": name, "first": max(values[:2]), "run": max(values)}
        | found["agreement"].get(name, {})
        for name, values in found["apart"].items()
    ]
    columns = {
        "relative difference from the reference's": "{arm}",
        "loss of the first batch": "{loss:.1e}",
        "its gradient": "{gradient:.1e}",
        "loss curve, first two steps": "{first:.1e}",
        "largest of the run": "{run:.1e}",
    }
    share = found["topk_share"] if "topk" in found["apart"] else None
    text = note("lm_follow", c=config, share=share)
    return table(f"{TITLE}: do the arms follow reference?", rows, columns, text)


# ---- plots ---------------------------------------------------------------------------------------


def _bars(arms: dict, key: str, scale: float, ratio: str, unit: str, label: str) -> Figure:
    values = {name: arm[key] * scale for name, arm in arms.items()}
    texts = [
        f"{values[name]:,.0f}" + (f"  ({arm[ratio]:.2f} {unit})" if ratio in arm else "")
        for name, arm in arms.items()
    ]
    return plots.bars(values, label, [COLOURS[name] for name in arms], texts)


def _plots(found: dict) -> dict[str, Plot]:
    arms, students = found["arms"], _students(found["arms"])
    speed = _bars(students, "tokens_per_second", 1.0, "speedup", "×", "tokens per second")
    made = {"lm_speed": Plot(speed, "Speed")}
    if all(arm["peak_bytes"] is not None for arm in students.values()):
        label = "peak memory of a step, MB"
        memory = _bars(students, "peak_bytes", 1e-6, "memory", "× reference", label)
        made["lm_memory"] = Plot(memory, "Memory")
    spent = {
        name: {phase: seconds / arm["steps"] * 1e3 for phase, seconds in arm["phases"].items()}
        for name, arm in students.items()
    }
    lines = {name: pandas.DataFrame(found["epochs"][name]) for name in students}
    held_out = {n: (lines[n]["seconds"].cumsum(), lines[n]["held_out_loss"]) for n in students}
    teacher = arms.get("teacher", {}).get("held_out_loss")
    exact = {name for name in students if LM_ARMS[name].exact} - {"reference"}
    made["lm_phases"] = Plot(
        plots.phases(spent, "milliseconds a step", "{:,.0f} ms".format), "Where the time goes"
    )
    made["lm_held_out"] = Plot(
        plots.measures(
            held_out, "seconds of training", "held-out loss, nats a token", teacher, percent=False
        ),
        "Held-out loss by time",
        "a dot an epoch",
    )
    made["lm_losses"] = Plot(
        plots.losses({name: found["losses"][name] for name in students}, exact),
        "Loss of each step",
        "thick: its mean over a fortieth of the run",
    )
    if found["apart"]:
        curves = {name: (values, COLOURS[name], "-") for name, values in found["apart"].items()}
        made["lm_loss_difference"] = Plot(
            plots.differences(curves), "Difference from the reference's loss"
        )
    return made


def sections(folder: RunFolder) -> list[Section]:
    """The experiment, or nothing before an arm's first epoch is done."""
    found = results(folder)
    if not found:
        return []
    return [
        Section(
            TITLE,
            _tables(found, folder.config["language_model"]),
            _plots(found),
            results={key: found[key] for key in ("arms", "agreement", "work", "checks")},
            checks=found["checks"],
            others=[line.get("others") for lines in found["epochs"].values() for line in lines],
        )
    ]
