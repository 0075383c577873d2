"""report.html of a run: what each experiment has to show, on one page."""

import dataclasses
import importlib
from collections.abc import Callable, Iterable
from typing import Any

import matplotlib
import pandas
from matplotlib.figure import Figure

from kdkernels.info import disturbed
from kdkernels.reports import page
from kdkernels.train.run_folder import RunFolder

SECTIONS = {
    "soft_reg": "noise:regression",
    "distill": "distillation:sections",
    "soft_regularization": "noise:networks",
    "language_model": "language_model:sections",
    "export/results.json": "export:sections",
}
"""Which function shows which experiment: a part of config.json, or a file of the folder, ->
``"module:function"``. The function takes the :class:`RunFolder` and returns :class:`Section` s;
its module is only imported where the folder holds that part."""


@dataclasses.dataclass
class Table:
    """A table for the terminal, the page and the JSON; make one with :func:`table`.

    Attributes:
        title: above it.
        frame: cells as they are shown, texts; columns are headings with units, the first a name.
        note: what was measured and how, below it.
    """

    title: str
    frame: pandas.DataFrame
    note: str = ""

    @property
    def columns(self) -> list[str]:
        """The headings."""
        return list(self.frame.columns)

    @property
    def rows(self) -> list[list[str]]:
        """The cells, row by row."""
        return self.frame.to_numpy().tolist()


def table(
    title: str, rows: Iterable[dict[str, Any]], note: str = "", columns: list[str] | None = None
) -> Table:
    """A table of rows that are dictionaries, heading -> text or None.

    A column without any text is left out. ``columns``: their order, and what a table without rows
    has; by default the first row's.
    """
    frame = pandas.DataFrame(list(rows), columns=columns, dtype=object).fillna("").astype(str)
    if len(frame):
        frame = frame.loc[:, (frame != "").any()]
    return Table(title, frame.astype(object), note)


@dataclasses.dataclass
class Plot:
    """A plot of a page.

    Attributes:
        draw: a function without arguments, called within ``matplotlib.rc_context(STYLE)``.
        title, about: above it.
    """

    draw: Callable[[], Figure]
    title: str = ""
    about: str = ""


@dataclasses.dataclass
class Section:
    """A part of a page.

    Attributes:
        title: its heading.
        tables: below the plots.
        plots: by their file names in plots/, without suffix.
        results: what results.json gets under the section's part.
        settings: those of the part, where config.json does not say all of them.
        checks: dictionaries ``name``, ``value``, ``limit``, ``passed``; the page shows them all
            in one table.
        headline: the finding, one sentence. The first section with cards heads the page, or the
            first with a headline.
        lead: lines below that headline.
        cards: pairs (value, what it is), large, below it.
        others: shares of the processors' time that other processes had while it was timed; where
            that was much, the page's head and the first table say so.
    """

    title: str
    tables: list[Table] = dataclasses.field(default_factory=list)
    plots: dict[str, Plot] = dataclasses.field(default_factory=dict)
    results: dict | None = None
    settings: dict | None = None
    checks: list[dict] = dataclasses.field(default_factory=list)
    headline: str = ""
    lead: list[str] = dataclasses.field(default_factory=list)
    cards: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    others: list[float | None] = dataclasses.field(default_factory=list)


def duration(seconds: float) -> str:
    """Three digits and the unit that suits them."""
    for unit, size in (("s", 1), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def with_error(value: float, error: float | None, digits: int = 2, sign: str = "") -> str:
    """``value ± error``, or the value alone."""
    return f"{value:{sign}.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")


def busy(sections: Iterable[Section]) -> list[str]:
    """A line on other work during what was timed, if there was any worth a word.

    The first table of each section that was disturbed gets it too, for the terminal.
    """
    lines = {}
    for section in sections:
        share = max((share for share in section.others if share is not None), default=0.0)
        if said := disturbed(share):
            line = f"The machine was busy {said}: times and speed-ups are not reliable."
            lines[share] = line
            if section.tables:
                section.tables[0].note = f"{line} {section.tables[0].note}"
    return [lines[max(lines)]] if lines else []


def draw(section: Section, keep: Callable[[str, bytes], object] | None = None) -> dict:
    """A section as the template takes it; ``keep(name, png)`` gets every plot as PNG too."""
    plots = []
    with matplotlib.rc_context(page.STYLE):
        for name, plot in section.plots.items():
            figure = plot.draw()
            if keep is not None:
                keep(name, page.png(figure))
            wide = figure.get_figwidth() > page.SIZE[0] + 1
            plots.append({"svg": page.svg(figure, name), "wide": wide, "caption": plot})
    return {"title": section.title, "tables": section.tables, "plots": plots}


def html(
    sections: list[Section],
    name: str,
    kicker: str,
    settings: dict[str, dict],
    lead: Iterable[str] = (),
    keep: Callable[[str, bytes], object] | None = None,
) -> str:
    """A page of sections in this order; the first one with cards, or a headline, heads it.

    Args:
        name: of the page, also its headline where no section has one.
        kicker: above the headline.
        settings: dictionaries by their heading, for the page's end.
        lead: lines before the section's own.
        keep: as :func:`draw` has it.
    """
    heads = sorted((s for s in sections if s.headline), key=lambda s: not s.cards)
    first = heads[0] if heads else Section("", headline=f"The run {name}")
    return page.render(
        title=f"kdkernels: {name}", kicker=f"kdkernels · {kicker}", headline=first.headline,
        lead=[*lead, *first.lead, *busy(sections)], cards=first.cards, settings=settings,
        sections=[draw(section, keep) for section in sections],
    )  # fmt: skip


def publish(folder: RunFolder, sections: list[Section], settings: dict[str, dict]) -> list[Table]:
    """Write plots/*.png and report.html of sections in this order; their tables, to be printed.

    ``settings``: dictionaries by their heading, for the page's end.
    """
    checks = [check for section in sections for check in section.checks]
    failed = sum(not check["passed"] for check in checks)
    lead = [f"{failed} of {len(checks)} checks failed: see the table of checks."] if failed else []
    if checks:
        rows = (
            {"check": check["name"], "value": f"{check['value']:.2g}",
             "limit": f"{check['limit']:.2g}", "result": "passed" if check["passed"] else "FAILED"}
            for check in checks
        )  # fmt: skip
        sections = [*sections, Section("Checks", [table("Checks", rows)])]
    name, settings = folder.path.name, settings | {"machine": folder.config["machine"]}
    made = html(
        sections, name, f"{folder.config.get('command', 'run')} · {name}", settings, lead,
        lambda plot, png: folder.write_bytes(f"plots/{plot}.png", png),
    )  # fmt: skip
    folder.write_bytes("report.html", made.encode())
    return [table for section in sections for table in section.tables]


def write(folder: RunFolder) -> tuple[list[Table], bool]:
    """Write plots/*.png, results.json and report.html from what the folder holds.

    Returns the tables, to be printed, and whether every check passed.
    """
    sections, results, settings = [], {"machine": folder.config["machine"]}, {}
    for part, where in SECTIONS.items():
        results[part] = None
        if part not in folder.config and not (folder.path / part).is_file():
            continue
        module, function = where.split(":")
        found = getattr(importlib.import_module(f"kdkernels.reports.{module}"), function)(folder)
        if part in folder.config:
            settings[part] = folder.config[part]
        for section in found:
            results[part] = section.results or results[part]
            settings[part] = section.settings or settings.get(part, {})
        sections += found
    tables = publish(folder, sections, {name: items for name, items in settings.items() if items})
    results["tables"] = {t.title: t.frame.to_dict("records") for t in tables}
    folder.write_json("results.json", results)
    return tables, all(check["passed"] for section in sections for check in section.checks)
