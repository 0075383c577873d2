"""report.html of a run: what each experiment has to show, on one page."""

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Mapping
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


Cell = str | Callable[[Any], Any]


def table(title: str, rows: Iterable[Any], columns: Mapping[str, Cell], note: str = "") -> Table:
    """A table with a line for each row, a mapping of what is known.

    ``columns``: heading -> a format string of the row's entries, such as ``"{accuracy:.1%}"``, or a
    function of the row. The cell is empty where the string's entries are missing or None, or the
    function gives None or False. A column without any text is left out.
    """

    def cell(row: Any, say: Cell) -> str:
        try:
            text = say.format_map(row) if isinstance(say, str) else say(row)
        except (KeyError, TypeError):
            if not isinstance(say, str):
                raise
            return ""
        return "" if text is None or text is False else str(text)

    cells = [[cell(row, say) for say in columns.values()] for row in rows]
    frame = pandas.DataFrame(cells, columns=list(columns), dtype=object)
    return Table(title, frame.loc[:, (frame != "").any()] if cells else frame, note)


@dataclasses.dataclass
class Plot:
    """A plot of a page, drawn within ``matplotlib.rc_context(page.STYLE)``, and words above it."""

    figure: Figure
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
        checks: dictionaries ``name``, ``value``, ``limit``, ``passed``; all stand in one table.
        headline: the finding, one sentence.
        lead: lines below that headline.
        cards: pairs (value, what it is), large, below it.
        others: shares of the processors' time that other processes had while it was timed.
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


def with_error(
    value: float, error: float | None, digits: int = 2, sign: str = "", scale: float = 1
) -> str:
    """``value ± error``, both times ``scale``; the value alone without an error."""
    text = f"{value * scale:{sign}.{digits}f}"
    return text if error is None else f"{text} ± {error * scale:.{digits}f}"


def _busy(sections: Iterable[Section]) -> list[str]:
    """A line on other work during what was timed, if there was much.

    The first table of each section that was disturbed gets it too, for the terminal.
    """
    lines = {}
    for section in sections:
        share = max((share for share in section.others if share is not None), default=0.0)
        if said := disturbed(share):
            lines[share] = f"The machine was busy {said}: times and speed-ups are not reliable."
            if section.tables:
                section.tables[0].note = f"{lines[share]} {section.tables[0].note}"
    return [lines[max(lines)]] if lines else []


def html(
    sections: list[Section],
    name: str,
    kicker: str,
    settings: dict[str, dict],
    lead: Iterable[str] = (),
) -> str:
    """A page of sections in this order; the first one with cards, or a headline, heads it.

    ``name``: of the page, also its headline where no section has one; ``kicker``: above the
    headline; ``settings``: dictionaries by their heading, for the page's end; ``lead``: before the
    section's own.
    """
    heads = sorted((s for s in sections if s.headline), key=lambda s: not s.cards)
    first = heads[0] if heads else Section("", headline=f"The run {name}")
    return page.render(
        title=f"kdkernels: {name}",
        kicker=f"kdkernels · {kicker}",
        headline=first.headline,
        lead=[*lead, *first.lead, *_busy(sections)],
        cards=first.cards,
        settings=settings,
        sections=sections,
    )


def _checks(sections: list[Section]) -> tuple[list[Section], list[str]]:
    """A section of all checks, where there are any, and a line on those that failed."""
    checks = [check for section in sections for check in section.checks]
    if not checks:
        return [], []
    columns: dict[str, Cell] = {
        "check": "{name}",
        "value": "{value:.2g}",
        "limit": "{limit:.2g}",
        "result": lambda check: "passed" if check["passed"] else "FAILED",
    }
    failed = sum(not check["passed"] for check in checks)
    line = f"{failed} of {len(checks)} checks failed: see the table of checks."
    return [Section("Checks", [table("Checks", checks, columns)])], [line] * bool(failed)


def publish(folder: RunFolder, sections: list[Section], settings: dict[str, dict]) -> list[Table]:
    """Write plots/*.png and report.html of sections in this order; their tables, to be printed.

    ``settings``: dictionaries by their heading, for the page's end.
    """
    more, lead = _checks(sections)
    sections, name = [*sections, *more], folder.path.name
    for section in sections:
        for plot, drawn in section.plots.items():
            folder.write_bytes(f"plots/{plot}.png", page.png(drawn.figure))
    kicker = f"{folder.config.get('command', 'run')} · {name}"
    settings = settings | {"machine": folder.config["machine"]}
    folder.write_bytes("report.html", html(sections, name, kicker, settings, lead).encode())
    return [table for section in sections for table in section.tables]


@matplotlib.rc_context(page.STYLE)
def write(folder: RunFolder) -> tuple[list[Table], bool]:
    """Write plots/*.png, results.json and report.html from what the folder holds.

    Returns the tables, to be printed, and whether every check passed.
    """
    sections, settings = [], {}
    results: dict[str, Any] = {"machine": folder.config["machine"]} | dict.fromkeys(SECTIONS)
    for part, where in SECTIONS.items():
        if part not in folder.config and not (folder.path / part).is_file():
            continue
        module, function = where.split(":")
        found = getattr(importlib.import_module(f"kdkernels.reports.{module}"), function)(folder)
        settings[part] = folder.config.get(part, {})
        for section in found:
            results[part] = section.results or results[part]
            settings[part] = section.settings or settings[part]
        sections += found
    tables = publish(folder, sections, {name: items for name, items in settings.items() if items})
    results["tables"] = {t.title: t.frame.to_dict("records") for t in tables}
    folder.write_json("results.json", results)
    return tables, all(check["passed"] for section in sections for check in section.checks)
