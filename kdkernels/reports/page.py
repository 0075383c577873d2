"""How a page looks: its HTML and CSS, the colours of arms, and figures as SVG that follow both.

A page is one file: no scripts, nothing from a network. Its figures are matplotlib's, whose text
stays text and whose colours become the page's, so that they turn with a dark screen.
"""

import io
import re
from typing import Any

import jinja2
import markupsafe
import matplotlib
from matplotlib.figure import Figure

from kdkernels.experiments.soft_regularization import BINS

INK, GRID, PAPER = "#23272e", "#c8cdd5", "#fefefe"
"""Text and lines, the grid, and what lies behind a figure; the page turns them with the screen."""

# Okabe and Ito's colours, which colour-blind people tell apart; an arm has one in all plots.
GREY, ORANGE, BLUE, SKY, GREEN, PINK, AMBER, RED = (
    "#7a7f87",
    "#d55e00",
    "#0072b2",
    "#4aa3df",
    "#009e73",
    "#c2629b",
    "#c98a00",
    "#c1121f",
)
COLOURS = {
    "alone": GREY,
    "reference": ORANGE,
    "fused": BLUE,
    "cached": SKY,
    "full": GREEN,
    "noisy": PINK,
    "teacher": AMBER,
    "control": INK,
    "numpy": GREY,
    "torch": ORANGE,
    "none": GREY,
    "input": BLUE,
    "gradient": ORANGE,
    "parameter": GREEN,
    "regularizer": PINK,
    "compiled": GREY,
    "dense": BLUE,
    "topk": PINK,
    "linear": SKY,
}
PHASE_COLOURS = ("#a9afb8", "#aa4499", "#44aa99", "#d1372c", "#4477aa", "#c9b458")
"""Of :data:`kdkernels.train.loop.PHASES`, in their order."""

_DARK = {
    GREY: "#a0a6b0",
    ORANGE: "#ff8a3c",
    BLUE: "#4da3e8",
    SKY: "#9ad4ff",
    GREEN: "#2fc79a",
    PINK: "#ec93c6",
    AMBER: "#e8b13a",
    RED: "#ff6b6b",
    "#aa4499": "#cf77c0",
    "#4477aa": "#6f9fd8",
    "#d1372c": "#f0665c",
}
MARKERS = "osD^vPX"
"""Markers of curves that lie over each other, in order."""

SIZE = (4.8, 3.3)
"""Inches of a figure that keeps its letters' size on a phone; two stand beside each other on a
desk. A wider one is scrolled on a phone."""

STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.6,
    "grid.linewidth": 0.6,
    "grid.color": GRID,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.dpi": 130,
    "svg.fonttype": "none",
}
"""matplotlib's settings for every figure; draw within ``matplotlib.rc_context(STYLE)``."""


def canvas(width: float = SIZE[0], height: float = SIZE[1], *panels: int, **more) -> tuple:
    """A figure and its axes, of ``panels`` rows and columns."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(*panels, **more)


def legend(figure: Figure, axes, columns: int = 3) -> Figure:
    """The figure, with the legend of ``axes`` above it."""
    if axes.get_legend() is not None:
        axes.get_legend().remove()
    figure.legend(*axes.get_legend_handles_labels(), ncols=columns, loc="outside upper center")
    return figure


def colour(learner: str) -> str:
    """The colour of an arm; ``full-g2``, its second generation, and ``full-7``, seed 7, have it."""
    return COLOURS.get(learner, COLOURS.get(learner.split("-")[0], GREY))


def png(figure: Figure) -> bytes:
    """A figure as a picture, on white."""
    figure.savefig(picture := io.BytesIO(), format="png")
    return picture.getvalue()


def svg(figure: Figure, name: str) -> markupsafe.Markup:
    """A figure to stand in a page; ``name`` goes before its ids, which a page must not repeat."""
    picture = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(picture, format="svg", transparent=True, metadata={"Date": None})
    text = picture.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r"<style[^>]*>.*?</style>", "", text, flags=re.S)
    text = re.sub(r' (?:xmlns(?::xlink)?|version)="[^"]*"', "", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text)
    text = text.replace("<svg", f'<svg role="img" aria-label="{name.replace("_", " ")}"', 1)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    # Coordinates to a hundredth of a point; what stands between the tags is for people.
    text = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0]), text)
    text = re.sub(r"\n\s*", "\n", text)
    for light, name in _PAGE_COLOURS.items():
        text = text.replace(light, f"var({name})")
    return markupsafe.Markup(text)


_PAGE_COLOURS = {INK: "--ink", GRID: "--grid", PAPER: "--card"} | {
    light: f"--c{light[1:]}" for light in _DARK
}


_LEARNER = re.compile(rf"({'|'.join(COLOURS)})(-g\d+)?$")


def _sides(table) -> list[str]:
    """For each column ``"number"`` where its cells are, else ``"text"``; the first is a name."""
    return [
        "number" if number and cells.any() and cells.str.match(r"$|[+\-−]?[\d.]").all() else "text"
        for number, (_, cells) in enumerate(table.frame.items())
    ]


_TEMPLATES: Any = jinja2.Environment(
    loader=jinja2.PackageLoader("kdkernels.reports", "."),
    trim_blocks=True,
    lstrip_blocks=True,
    autoescape=True,
    undefined=jinja2.StrictUndefined,
)
_TEMPLATES.filters |= {
    "sides": _sides,
    "anchor": lambda title: re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-"),
    "is_wide": lambda figure: figure.get_figwidth() > SIZE[0] + 1,
    "svg": svg,
}
_TEMPLATES.globals |= {
    "arm_colour": lambda cell: _PAGE_COLOURS[colour(cell)] if _LEARNER.match(cell) else None,
    "light": {name: light for light, name in _PAGE_COLOURS.items() if light in _DARK},
    "dark": {_PAGE_COLOURS[light]: dark for light, dark in _DARK.items()},
    "bins": BINS,
}
_NOTES = _TEMPLATES.overlay(trim_blocks=False, lstrip_blocks=False, autoescape=False)


def render(**content) -> str:
    """A page of the template page.html.j2; ``sections`` are :class:`report.Section` s."""
    return _TEMPLATES.get_template("page.html.j2").render(**content)


def note(name: str, **values) -> str:
    """The text below a table: a macro of the template notes.j2, on one line."""
    macros: Any = _NOTES.get_template("notes.j2").module
    return re.sub(r"[ \n]+", " ", getattr(macros, name)(**values)).strip()
