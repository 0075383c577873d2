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

__all__ = ["COLOURS", "INK", "PHASE_COLOURS", "SIZE", "STYLE", "colour", "png", "render", "svg"]

INK, GRID, PAPER = "#23272e", "#c8cdd5", "#fefefe"
"""Text and lines, the grid, and what lies behind a figure; the page turns them with the screen."""

# Okabe and Ito's colours, which colour-blind people tell apart; an arm has one wherever it stands.
GREY, ORANGE, BLUE, SKY, GREEN, PINK, AMBER, RED = (
    "#7a7f87", "#d55e00", "#0072b2", "#4aa3df", "#009e73", "#c2629b", "#c98a00", "#c1121f",
)  # fmt: skip
COLOURS = {
    "alone": GREY, "reference": ORANGE, "fused": BLUE, "cached": SKY, "full": GREEN,
    "noisy": PINK, "teacher": AMBER, "control": INK,
    "numpy": GREY, "torch": ORANGE,
    "none": GREY, "input": BLUE, "gradient": ORANGE, "parameter": GREEN, "regularizer": PINK,
    "compiled": GREY, "dense": BLUE, "topk": PINK, "linear": SKY,
}  # fmt: skip
PHASE_COLOURS = ("#a9afb8", "#aa4499", "#44aa99", "#d1372c", "#4477aa", "#c9b458")
"""Of :data:`kdkernels.train.loop.PHASES`, in their order."""

_DARK = {
    GREY: "#a0a6b0", ORANGE: "#ff8a3c", BLUE: "#4da3e8", SKY: "#9ad4ff", GREEN: "#2fc79a",
    PINK: "#ec93c6", AMBER: "#e8b13a", RED: "#ff6b6b", "#aa4499": "#cf77c0", "#4477aa": "#6f9fd8",
    "#d1372c": "#f0665c",
}  # fmt: skip
SIZE = (4.8, 3.3)
"""Inches of a figure that keeps its letters' size on a phone; two stand beside each other on a
desk. A wider one is scrolled on a phone."""

STYLE: dict[Any, Any] = {
    "font.size": 9.5, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.alpha": 0.6, "grid.linewidth": 0.6,
    "grid.color": GRID, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK,
    "axes.linewidth": 0.7, "xtick.color": INK, "ytick.color": INK, "legend.frameon": False,
    "legend.fontsize": 8, "figure.dpi": 130, "svg.fonttype": "none",
}  # fmt: skip
"""matplotlib's settings for every figure; draw within ``matplotlib.rc_context(STYLE)``."""


def colour(learner: str) -> str:
    """The colour of an arm; ``full-g2``, its second generation, and ``full-7``, seed 7, have it."""
    return COLOURS.get(learner, COLOURS.get(learner.split("-")[0], GREY))


def png(figure: Figure) -> bytes:
    """A figure as a picture, on white."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def svg(figure: Figure, name: str) -> markupsafe.Markup:
    """A figure to stand in a page.

    Args:
        figure: text and lines in ``INK``, arms in ``COLOURS``.
        name: goes before the ids inside, which a page must not have twice.
    """
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


def _is_number(cell: str) -> bool:
    return not cell or re.match(r"[+\-−]?[\d.]", cell) is not None


def _sides(table) -> list[str]:
    """For each column ``"number"`` where its cells are, else ``"text"``."""
    columns = zip(*table.rows, strict=True) if table.rows else [()] * len(table.columns)
    return [
        "number" if number and any(cells) and all(map(_is_number, cells)) else "text"
        for number, cells in enumerate(columns)
    ]


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


_ENVIRONMENT = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
_ENVIRONMENT.filters |= {"sides": _sides, "anchor": _anchor}
_ENVIRONMENT.globals |= {
    "arm_colour": lambda cell: _PAGE_COLOURS[colour(cell)] if _LEARNER.match(cell) else None,
    "light": {name: light for light, name in _PAGE_COLOURS.items() if light in _DARK},
    "dark": {_PAGE_COLOURS[light]: dark for light, dark in _DARK.items()},
}

_PAGE = _ENVIRONMENT.from_string(
    """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>
:root { --paper: #f4f5f7; --card: #fff; --ink: #23272e; --soft: #5d6570; --line: #dfe3e8;
  --grid: #c8cdd5; --accent: #00795a; --bad: #b3261e;
  --shade: #0003;
  {% for name, value in light.items() %}{{ name }}: {{ value }}; {% endfor %}}
@media (prefers-color-scheme: dark) { :root { --paper: #12151a; --card: #1b2027; --ink: #e4e7ec;
  --soft: #9aa3b0; --line: #303742; --grid: #454d59; --accent: #2fc79a; --bad: #ff8a80;
  --shade: #000a;
  {% for name, value in dark.items() %}{{ name }}: {{ value }}; {% endfor %}} }
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
  color: var(--ink); background: var(--paper); max-width: 74rem; margin: 0 auto;
  padding: 1.5rem clamp(.75rem, 3vw, 2rem) 3rem; overflow-wrap: break-word; }
header p { margin: .3rem 0; }
.kicker { color: var(--soft); font-size: .85rem; letter-spacing: .02em; }
h1 { font-size: clamp(1.45rem, 1rem + 2.2vw, 2.3rem); line-height: 1.2; margin: .3rem 0 .5rem;
  text-wrap: balance; max-width: 48rem; }
h2 { font-size: 1.3rem; margin: 0 0 .6rem; } h3 { font-size: 1rem; margin: 1.6rem 0 .5rem; }
section > :first-child + h3 { margin-top: .4rem; }
section, .cards div { background: var(--card); border: 1px solid var(--line);
  border-radius: .7rem; }
section { padding: clamp(.9rem, 2.4vw, 1.6rem); margin-top: 1.3rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 10.5rem), 1fr));
  gap: .8rem; margin: 1.3rem 0; padding: 0; }
.cards div { padding: .8rem 1rem; display: flex; flex-direction: column-reverse;
  justify-content: flex-end; }
.cards dt { color: var(--soft); font-size: .84rem; line-height: 1.35; }
.cards dd { margin: 0; font-size: clamp(1.25rem, .9rem + 1.6vw, 1.65rem); font-weight: 650;
  line-height: 1.25; font-variant-numeric: tabular-nums; }
.cards div:first-child dd { color: var(--accent); }
nav { font-size: .9rem; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; }
a { color: var(--accent); }
.plots { display: grid; gap: 1rem 1.6rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
figure { margin: 0; overflow-x: auto; break-inside: avoid; max-width: 34rem; }
figure.wide { grid-column: 1 / -1; max-width: none; } figure.wide svg { min-width: 36rem; }
figure svg { display: block; width: 100%; height: auto; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
figure svg text { font-family: inherit !important; }
figcaption { font-weight: 600; font-size: .95rem; margin-bottom: .3rem; }
figcaption small { display: block; font-weight: 400; color: var(--soft); font-size: .84rem;
  line-height: 1.4; }
/* A shadow at the right while there is more to scroll to. */
.scroll { overflow-x: auto; background: linear-gradient(to left, var(--card) 40%, transparent)
  right / 3rem 100% no-repeat local, linear-gradient(to left, var(--shade), transparent)
  right / .9rem 100% no-repeat scroll; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .75rem; border-bottom: 1px solid var(--line); vertical-align: bottom; }
td { vertical-align: top; }
th { color: var(--soft); font-weight: 600; line-height: 1.3; min-width: 5rem; }
th:first-child, td:first-child { padding-left: 0; min-width: 0; }
tbody tr:hover td { background: color-mix(in srgb, var(--ink) 5%, transparent); }
.number { text-align: right; } td.number { white-space: nowrap; } .text { text-align: left; }
td.text:not(:first-child) { min-width: 13rem; }
td.text:last-child:not(:first-child) { min-width: 18rem; } td.name { white-space: nowrap; }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%;
  margin-right: .5em; }
.later { background: none !important; border: .16em solid; }
.note { color: var(--soft); font-size: .84rem; line-height: 1.5; max-width: 52rem;
  margin: .6rem 0 0; }
details.note summary { cursor: pointer; } details.note p { margin: .3rem 0 0; }
.passed { color: var(--accent); } .FAILED { color: var(--bad); font-weight: 700; }
.settings h3 { margin: 1rem 0 .3rem; }
.settings dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr));
  gap: .15rem 1.5rem; margin: 0; font-size: .84rem; }
.settings dl div { display: flex; gap: .6rem; border-bottom: 1px solid var(--line); }
.settings dt { color: var(--soft); } .settings dd { margin: 0 0 0 auto; text-align: right;
  overflow-wrap: anywhere; }
summary h2 { display: inline; } summary { cursor: pointer; }
@media print { :root { --paper: #fff; } body { max-width: none; padding: 0; font-size: 10pt; }
  section { border: none; padding: .5rem 0; } nav { display: none; }
  .scroll, figure { overflow: visible; background: none; }
  .plots { grid-template-columns: 1fr 1fr; } figure.wide svg { min-width: 0; }
  table { font-size: 7.5pt; } th, td { padding: .15rem .3rem; min-width: 0 !important; }
  tr { break-inside: avoid; } h2, h3, figcaption { break-after: avoid; }
  details::details-content { content-visibility: visible; display: block; } }
</style></head><body>
<header>
<p class="kicker">{{ kicker }}</p>
<h1>{{ headline }}</h1>
{% for line in lead %}<p class="note">{{ line }}</p>{% endfor %}
</header>
{% if cards %}
<dl class="cards">
{% for value, about in cards %}
<div><dt>{{ about }}</dt><dd>{{ value }}</dd></div>
{% endfor %}
</dl>
{% endif %}
<nav>{% for section in sections %}<a href="#{{ section.title|anchor }}">{{ section.title }}</a>
{% endfor %}<a href="#settings">Settings</a></nav>
{% macro show(table) %}
{% set sides = table|sides %}
<div class="scroll"><table><thead><tr>
{% for column in table.columns %}<th class="{{ sides[loop.index0] }}">{{ column }}</th>{% endfor %}

</tr></thead><tbody>
{% for row in table.rows %}
<tr>{% for cell in row %}
<td class="{{ sides[loop.index0] }}{{ " " + cell if cell in ("passed", "FAILED") }}
{{- " name" if loop.first and cell|length < 30 }}">
{%- if loop.first and arm_colour(cell) %}<span class="dot{{ " later" if "-g" in cell }}"
style="background: var({{ arm_colour(cell) }}); border-color: var({{ arm_colour(cell) }})"></span>
{%- endif %}{{ cell }}</td>
{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% if table.note|length > 260 %}
<details class="note"><summary>What was measured, and how</summary><p>{{ table.note }}</p></details>
{% elif table.note %}
<p class="note">{{ table.note }}</p>
{% endif %}
{% endmacro %}
{% for section in sections %}
<section id="{{ section.title|anchor }}">
<h2>{{ section.title }}</h2>
{% if section.plots %}
<div class="plots">
{% for plot in section.plots %}
<figure{% if plot.wide %} class="wide"{% endif %}>
{% if plot.caption %}
<figcaption>{{ plot.caption[0] }}{% if plot.caption[1] %}<small>{{ plot.caption[1] }}</small>
{% endif %}</figcaption>
{% endif %}
{{ plot.svg }}
</figure>
{% endfor %}
</div>
{% endif %}
{% for table in section.tables %}
{% if table.title != section.title %}<h3>{{ table.title }}</h3>{% endif %}

{{ show(table) }}
{% endfor %}
</section>
{% endfor %}
<section class="settings" id="settings"><details><summary><h2>Settings</h2></summary>
{% for part, items in settings.items() %}
<h3>{{ part }}</h3>
<dl>{% for key, value in items.items() %}<div><dt>{{ key }}</dt><dd>{{ value }}</dd></div>
{% endfor %}</dl>
{% endfor %}
</details></section>
</body></html>
"""
)


def render(**content) -> str:
    """A page.

    Args:
        title: of the browser's window.
        kicker: small, above the headline.
        headline: the finding, one sentence.
        lead: lines below it.
        cards: pairs (value, what it is).
        sections: with ``title``, ``tables`` (:class:`kdkernels.train.report.Table`) and ``plots``:
            dictionaries ``svg``, ``wide`` and ``caption`` (a pair of title and explanation, or
            None).
        settings: dictionaries by their heading, at the end, folded.
    """
    return _PAGE.render(**content)
