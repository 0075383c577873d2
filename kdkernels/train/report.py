"""report.html of a run: what each experiment has to show, on one page."""

import dataclasses
import importlib
import os
import platform
from collections.abc import Callable
from pathlib import Path

import matplotlib
import torchvision
from matplotlib.figure import Figure

import kdkernels
from kdkernels import info
from kdkernels.train import page
from kdkernels.train.page import COLOURS, STYLE
from kdkernels.train.run_folder import RunFolder

__all__ = [
    "COLOURS", "SECTIONS", "STYLE", "Section", "Table", "draw", "duration", "machine", "publish",
    "write",
]  # fmt: skip

SECTIONS = {
    "soft_reg": "soft_report:regression",
    "distill": "distillation_report:sections",
    "soft_regularization": "soft_report:networks",
    "language_model": "language_model_report:sections",
    "export/results.json": "export:sections",
}
"""Which function shows which experiment: a part of config.json, or a file of the folder, ->
``"module:function"``. The function takes the :class:`RunFolder` and returns :class:`Section` s;
its module is only imported where the folder holds that part."""


@dataclasses.dataclass
class Table:
    """A table for the terminal and for the report.

    Attributes:
        title: above it.
        columns: headings, with units.
        rows: cells as they are shown; the first is a name.
        note: what was measured and how, below it.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""


@dataclasses.dataclass
class Section:
    """A part of a page.

    Attributes:
        title: its heading.
        tables: below the plots.
        plots: file name in plots/, without suffix -> a function without arguments that draws it;
            it is called within ``matplotlib.rc_context(STYLE)``, see :data:`page.SIZE`.
        captions: file name -> (title, explanation), above a plot.
        results: what results.json gets under the section's part.
        settings: what was asked for, where config.json does not say all of it.
        checks: dictionaries ``name``, ``value``, ``limit``, ``passed``; the page shows them all
            in one table.
        headline: the finding, one sentence. The first section with cards heads the page, or the
            first with a headline.
        lead: lines below that headline.
        cards: pairs (value, what it is), large, below it.
    """

    title: str
    tables: list[Table] = dataclasses.field(default_factory=list)
    plots: dict[str, Callable[[], Figure]] = dataclasses.field(default_factory=dict)
    captions: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    results: dict | None = None
    settings: dict | None = None
    checks: list[dict] = dataclasses.field(default_factory=list)
    headline: str = ""
    lead: list[str] = dataclasses.field(default_factory=list)
    cards: list[tuple[str, str]] = dataclasses.field(default_factory=list)


def machine(threads: int | None = None) -> dict[str, str]:
    """What the run ran on: processor, threads, versions."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [r for r in cpuinfo.read_text().splitlines() if r.startswith("model name")]
        name = names[0].split(":", 1)[1].strip() if names else name
    facts = info.collect()
    found = {
        "processor": f"{name}, {os.cpu_count()} cores visible; kernels use {facts['isa']}",
        "threads": str(threads or facts["threads"]),
        "versions": f"kdkernels {kdkernels.__version__}, torch {facts['torch']}, torchvision "
        f"{torchvision.__version__}, Python {facts['python']}",
    }
    if facts["gpus"]:
        found["GPUs"] = ", ".join(facts["gpus"])
    return found


def duration(seconds: float) -> str:
    """Three digits and the unit that suits them."""
    for unit, size in (("s", 1), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def _checks(found: list[dict]) -> Table:
    return Table(
        "Checks",
        ["check", "value", "limit", "result"],
        [
            [
                check["name"],
                f"{check['value']:.2g}",
                f"{check['limit']:.2g}",
                "passed" if check["passed"] else "FAILED",
            ]
            for check in found
        ],
    )


def draw(section: Section, keep: Callable[[str, bytes], object] | None = None) -> dict:
    """A section as :func:`page.render` takes it; ``keep(name, png)`` gets every plot as PNG too."""
    plots = []
    with matplotlib.rc_context(STYLE):
        for name, plot in section.plots.items():
            figure = plot()
            if keep is not None:
                keep(name, page.png(figure))
            wide = figure.get_figwidth() > page.SIZE[0] + 1
            caption = section.captions.get(name)
            plots.append({"svg": page.svg(figure, name), "wide": wide, "caption": caption})
    return {"title": section.title, "tables": section.tables, "plots": plots}


def publish(folder: RunFolder, sections: list[Section], settings: dict[str, dict]) -> list[Table]:
    """Write plots/*.png and report.html.

    Args:
        folder: where to; its config says on which machine.
        sections: in the page's order.
        settings: dictionaries by their heading, for the page's end.

    Returns:
        The sections' tables, to be printed.
    """
    shown = [draw(s, lambda name, png: folder.write_bytes(f"plots/{name}.png", png))
             for s in sections]  # fmt: skip
    tables = [table for section in sections for table in section.tables]
    checks = [check for section in sections for check in section.checks]
    if checks:
        tables.append(_checks(checks))
        shown.append({"title": "Checks", "tables": [tables[-1]], "plots": []})
    heads = sorted((s for s in sections if s.headline), key=lambda s: not s.cards)
    first = heads[0] if heads else None
    failed = sum(not check["passed"] for check in checks)
    lead = list(first.lead) if first else []
    if failed:
        lead.insert(0, f"{failed} of {len(checks)} checks failed: see the table of checks.")
    facts = folder.config["machine"]
    html = page.render(
        title=f"kdkernels: {folder.path.name}",
        kicker=f"kdkernels · {folder.config.get('command', 'run')} · {folder.path.name}",
        headline=first.headline if first else f"The run {folder.path.name}",
        lead=lead,
        cards=first.cards if first else [],
        sections=shown,
        settings=settings | {"machine": facts},
    )
    folder.write_bytes("report.html", html.encode())
    return tables


def write(folder: RunFolder) -> tuple[list[Table], bool]:
    """Write plots/*.png, results.json and report.html from what the folder holds.

    Returns:
        The tables, to be printed, and whether every check passed.
    """
    sections, results, settings = [], {"machine": folder.config["machine"]}, {}
    for part, where in SECTIONS.items():
        results[part] = None
        if part not in folder.config and not (folder.path / part).is_file():
            continue
        module, function = where.split(":")
        found = getattr(importlib.import_module(f"kdkernels.train.{module}"), function)(folder)
        if part in folder.config:
            settings[part] = folder.config[part]
        for section in found:
            results[part] = section.results or results[part]
            settings[part] = section.settings or settings.get(part, {})
        sections += found
    folder.write_json("results.json", results)
    tables = publish(folder, sections, {name: items for name, items in settings.items() if items})
    return tables, all(check["passed"] for section in sections for check in section.checks)
