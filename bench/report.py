"""The page of a benchmark run: bench/results/<machine>.json, .html and the plots' .png.

python -m bench.report bench/results/<machine>.json     draws the page again
"""

import argparse
import base64
import io
import json
import re
from pathlib import Path

import jinja2
import markupsafe
import matplotlib
from matplotlib.figure import Figure

from kdkernels import measuring
from kdkernels.measuring import OURS, duration, interval, ratio, times
from kdkernels.reports.page import STYLE

SUITES = {
    "distill": "Distillation losses: loss and gradient",
    "noise": "Noise",
    "optim": "Optimizer steps with noise",
    "train": "The experiments' own loops",
    "overhead": "Next to nothing to compute",
}
ABOUT = {
    "eager": "what people write in plain PyTorch",
    "torch.compile": "the same, compiled by Inductor; for each shape, in the growth plots for any",
    "foreach": "torch._foreach_add_ of a list of torch.randn_like",
    "TRL": "GKDTrainer.generalized_jsd_loss; chunked: DistillationTrainer's loss of hidden states",
    "torchdistill": "KDLoss",
    "Liger, chunked": "chunked_loss.LigerFusedLinearJSDLoss, uncompiled",
    "Opacus": "DPOptimizer.add_noise",
    "torch fused": "torch.optim with fused=True, after noise in plain PyTorch",
    "products": "the matrix products that a linear head's loss takes, and nothing else",
    "in place": "the gradient overwrites the logits",
    "gap 0.1": "standard deviation of the student's logits less the teacher's; else independent",
    "memcpy": "Tensor.copy_ of the same tensors",
    "triad": "c = a + 3 b on as many bytes: the memory's limit",
}

IN_PLACE, NEAR = f"{OURS} in place", f"{OURS} in place, gap 0.1"
LARGE, LARGE16 = "forward_kl 512x32000 fp32", "forward_kl 512x32000 bf16"
DIVERGENCES = f"{IN_PLACE}, divergences, 512x32000 fp32"
NOISE, OVERHEAD = "noise on 20M elements fp32", "overhead, loss and gradient 64x10 fp32"
EXPERIMENT = "experiment 1, 1,000 steps of a replica"
# The comparison, a case over a case, and what the ratio of their times is to be: at least, or where
# negative at most.
GOALS = [
    (LARGE, "eager", IN_PLACE, 40),
    (LARGE, "torch.compile", IN_PLACE, 15),
    (LARGE, IN_PLACE, "triad", -1.5),
    (LARGE16, "eager", IN_PLACE, 10),
    (LARGE16, "torch.compile", IN_PLACE, 10),
    ("forward_kl 128x1000 fp32", "eager", IN_PLACE, 10),
    ("forward_kl 128x1000 fp32, labels", "eager", IN_PLACE, 10),
    ("forward_kl 64x10 fp32", "eager", IN_PLACE, 4.5),
    ("forward_kl 64x10 fp32, labels", "eager", IN_PLACE, 4.5),
    (DIVERGENCES, f"{OURS} js", "forward_kl", -1.4),
    (DIVERGENCES, f"{OURS} reverse_kl", "forward_kl", -1.4),
    ("top 64 of 64x128256 fp32", "eager, all classes", f"{OURS}, sparse gradient", 100),
    ("linear 512x2048x8000 fp32, 128 rows of logits", OURS, "products", -1.1),
    ("linear 512x2048x8000 bf16, 128 rows of logits", OURS, "products", -1.1),
    (NOISE, "eager", OURS, 12),
    (NOISE, OURS, "triad", -2),
    ("32 noises on ResNet-18's 62 tensors fp32", "eager, a pass a seed", OURS, 15),
    ("AdamW step, ResNet-18 fp32", OURS, "torch fused, no noise", -1.15),
    ("SGD step, ResNet-18 fp32", OURS, "torch fused, no noise", -1.15),
    (EXPERIMENT, "NumPy loop", OURS, 100),
    (EXPERIMENT, "NumPy loop", f"{OURS}, 4,096 replicas", 1000),
]
ALLOWED = 8e-6  # seconds that our 64x10 loss may take beyond a C++ Function that does nothing
NOTHING = "C++ Function, nothing"


def compared(low, high, aim, at_least):
    """What an interval says of an aim."""
    if low >= aim or high <= aim:
        return "reached" if (low >= aim) == at_least else "missed"
    return "undecided"


def kept(result):
    """A result without its samples: medians and intervals, those of the aims' pairs among them."""
    cases, pairs = result["cases"], {}
    for title, over, under, _ in GOALS:
        if title == result["title"] and {over, under} <= cases.keys():
            pairs[f"{over} / {under}"] = ratio(result, over, under)
    if result["title"] == OVERHEAD:
        samples = zip(cases[OURS]["seconds"], cases[NOTHING]["seconds"], strict=True)
        pairs[f"{OURS} - {NOTHING}"] = interval([a - b for a, b in samples])
    without = {
        name: {key: value for key, value in case.items() if key != "seconds"}
        for name, case in cases.items()
    }
    rounds = len(next(iter(cases.values()))["seconds"])
    return result | {"rounds": rounds, "pairs": pairs, "cases": without}


def goals(record):
    """[what, whose time over whose, found with its interval, aim, reached or not]."""
    pairs = {result["title"]: result["pairs"] for result in record["results"]}
    rows = []
    for title, over, under, aim in GOALS:
        if found := pairs.get(title, {}).get(whose := f"{over} / {under}"):
            middle, low, high = found
            shown = f"{times(middle)} ({times(low)} to {times(high)})"
            word = "at least" if aim > 0 else "at most"
            verdict = compared(low, high, abs(aim), aim > 0)
            rows.append([title, whose, shown, f"{word} {abs(aim):g}", verdict])
    if more := pairs.get(OVERHEAD, {}).get(whose := f"{OURS} - {NOTHING}"):
        middle, low, high = (f"{1e6 * s:.1f}" for s in more)
        shown = f"{middle} µs ({low} to {high})"
        rows.append([OVERHEAD, whose, shown, "at most 8 µs", compared(*more[1:], ALLOWED, False)])
    return rows


def goal_lines(record):
    rows = goals(record)
    heads = ("aims", "whose time over whose", "found (95 % interval)", "aim", "")
    lines = [
        f"{what:48}{whose:48}{shown:25}{aim:15}{verdict}".rstrip()
        for what, whose, shown, aim, verdict in (heads, *rows)
    ]
    return ["", *lines, ""] if rows else []


# ---- plots ---------------------------------------------------------------------------------------

COLOURS = {
    "eager": "#d95f02",
    "torch.compile": "#6a4c93",
    OURS: "#1b6ca8",
    IN_PLACE: "#2a9d5c",
    NEAR: "#7fc8a0",
    "triad": "#7f7f7f",
    "memcpy": "#b0b0b0",
    "NumPy": "#c1121f",
}
OTHERS = "#8c6d46"


def colour(case):
    if case in COLOURS:
        return COLOURS[case]
    best = [name for name in COLOURS if case.startswith(name)]
    return COLOURS[max(best, key=len)] if best else OTHERS


def plot_growth(points, name):
    """Time an element and the ratio to eager, against one axis."""
    points = sorted(points, key=lambda result: result["growth"]["value"])
    figure = Figure(figsize=(10, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    values = [result["growth"]["value"] for result in points]
    for case in points[0]["cases"]:
        look = {"color": colour(case), "lw": 1.6, "marker": "o", "ms": 4}
        found = [(result["cases"][case], result["growth"]["elements"]) for result in points]
        middle = [1e9 * c["median"] / n for c, n in found]
        left.plot(values, middle, label=case, ls="--" if case in measuring.LIMITS else "-", **look)
        ends = zip(*([1e9 * q / n for q in c["quartiles"]] for c, n in found), strict=True)
        left.fill_between(values, *ends, color=colour(case), alpha=0.15, lw=0)
        if case != "eager" and case not in measuring.LIMITS:
            middle, low, high = zip(*(c["faster"] for c, _ in found), strict=True)
            right.plot(values, middle, **look)
            right.fill_between(values, low, high, color=colour(case), alpha=0.15, lw=0)
    axis = points[0]["growth"]["axis"]
    left.set(xlabel=axis, ylabel="ns an element", xscale="log", yscale="log", title=name)
    right.set(xlabel=axis, ylabel="times faster than eager", xscale="log", yscale="log")
    right.axhline(1, color=colour("eager"), lw=1.6)
    right.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    left.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    left.legend(fontsize=8)
    return figure


def plot_overview(results):
    """How many times faster than the first case, with intervals, a line a comparison."""
    figure = Figure(figsize=(10, 1.2 + 0.27 * len(results)), layout="constrained")
    axes = figure.subplots()
    shown = {}
    for row, result in enumerate(results):
        for case, facts in result["cases"].items():
            if case in measuring.LIMITS or case == next(iter(result["cases"])):
                continue
            middle, low, high = facts["faster"]
            ours = case.startswith(OURS)
            kind = IN_PLACE if "in place" in case else OURS if ours else case.split(",")[0]
            kind = NEAR if kind == IN_PLACE and ", gap" in case else kind
            kind = kind if kind in COLOURS else "another peer"
            shown[kind] = axes.errorbar(
                middle,
                row,
                xerr=[[middle - low], [high - middle]],
                color=colour(kind),
                fmt="o" if ours else "d",
                ms=6 if ours else 4,
                lw=1.4,
            )
    axes.axvline(1, color=colour("eager"), lw=1.6)
    axes.set_yticks(range(len(results)), [result["title"] for result in results], fontsize=8)
    axes.set(xscale="log", xlabel="times faster than the first case of each table", ylim=(-1, None))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.invert_yaxis()
    figure.legend(
        shown.values(), shown.keys(), ncols=len(shown), fontsize=8, loc="outside lower center"
    )
    return figure


def plots(record):
    """{name: (title, figure)}."""
    drawn, curves = {}, {}
    wide = [r for r in record["results"] if not r["growth"] and r["suite"] != "overhead"]
    wide = [r for r in wide if not next(iter(r["cases"])).startswith((OURS, "forward_kl"))]
    if wide:
        drawn["overview"] = ("", plot_overview(wide))
    for result in record["results"]:
        if result["growth"]:
            curves.setdefault(result["growth"]["plot"], []).append(result)
    for name, points in curves.items():
        drawn[re.sub(r"[^a-z0-9]+", "-", name.lower())] = (name, plot_growth(points, name))
    return drawn


# ---- the page ------------------------------------------------------------------------------------

PAGE = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
    """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>kdkernels on {{ machine.processor }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 72rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { margin-bottom: .2rem; } h2 { margin-top: 2.8rem; }
.note { color: #555; font-size: .88rem; max-width: 54rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums;
  width: 100%; }
th, td { padding: .22rem .6rem; text-align: right; white-space: nowrap; }
th { font-weight: 600; color: #555; border-bottom: 2px solid #ccc; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
tr.title td { padding-top: 1.1rem; font-weight: 600; border-bottom: 1px solid #ddd;
  white-space: normal; }
tr.ours td { background: #eef5fb; } tr.ours td:first-child { font-weight: 600; }
tr.limit td { color: #777; }
tr.missing td { color: #999; font-style: italic; white-space: normal; }
td.bar { min-width: 6.5rem; }
td.bar span { display: block; background: linear-gradient(90deg, #9cc3e0 var(--share),
  transparent var(--share)); padding-right: .2rem; }
tr.limit td.bar span { background: none; }
small { color: #777; font-size: .92em; }
.aims { width: auto; } .aims td, .aims th { border-bottom: 1px solid #eee; }
.aims :nth-child(2) { text-align: left; } .aims td { white-space: normal; }
.reached { color: #1a7f37; } .missed { color: #c1121f; font-weight: 600; }
figure { margin: 1.2rem 0; } img { max-width: 100%; height: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: .88rem; }
dt { font-weight: 600; } dd { margin: 0; color: #555; }
nav a { margin-right: 1.2rem; }
</style></head><body>
<h1>kdkernels on {{ machine.processor }}</h1>
<p class="note">{{ machine.cores }} cores, {{ machine.threads }} threads, {{ machine.isa }};
memory {{ "%.1f"|format(machine.triad_bytes_per_second / 1e9) }} GB/s by a large triad.
kdkernels {{ machine.kdkernels }}, torch {{ machine.torch }}, NumPy {{ machine.numpy }},
Python {{ machine.python }}{% for name, version in (machine.peers or {}).items() %}, {{ name }}
{{ version }}{% endfor %}.<br>
{{ machine.system }}. {{ date }}; load average {{ "%.2f"|format(load[0]) }} before and
{{ "%.2f"|format(load[1]) }} after.</p>
<nav>{% for suite in suites %}<a href="#{{ suite.name }}">{{ suite.name }}</a>{% endfor %}
<a href="#growth">growth</a><a href="#how">how it was measured</a></nav>
{% macro table(results) %}
<div class="scroll"><table><thead><tr><th>case</th><th>median</th><th>quartiles</th>
<th>times faster</th><th>95 % interval</th><th>GB/s</th><th>of the triad</th><th>allocations</th>
<th>MiB</th></tr></thead><tbody>
{% for result in results %}
<tr class="title"><td colspan="9">{{ result.title }}
<small>{{ result.rounds }} rounds{% if result.bytes %}, {{ result.bytes }} to move{% endif %}
{{ result.disturbed }}</small></td></tr>
{% for case in result.cases %}
<tr class="{{ case.kind }}"><td>{{ case.name }}</td><td>{{ case.median }}</td>
<td>{{ case.quartiles }}</td><td>{{ case.faster }}</td><td>{{ case.interval }}</td>
<td>{{ case.rate }}</td><td class="bar">{% if case.share is not none %}
<span style="--share: {{ "%.0f"|format(100 * [case.share, 1.0]|min) }}%">
{{ "%.0f"|format(100 * case.share) }} %</span>{% endif %}</td>
<td>{{ case.allocations }}</td><td>{{ case.allocated }}</td></tr>
{% endfor %}
{% for name, why in result.missing.items() %}
<tr class="missing"><td colspan="9">{{ name }}: {{ why }}</td></tr>
{% endfor %}
{% endfor %}
</tbody></table></div>
{% endmacro %}
{% if goals %}
<h2>Aims</h2>
<table class="aims"><thead><tr><th>what</th><th>whose time over whose</th>
<th>found (95 % interval)</th><th>aim</th><th></th></tr></thead><tbody>
{% for what, whose, found, aim, verdict in goals %}
<tr><td>{{ what }}</td><td>{{ whose }}</td><td>{{ found }}</td><td>{{ aim }}</td>
<td class="{{ verdict }}">{{ verdict }}</td></tr>
{% endfor %}
</tbody></table>
{% endif %}
{% if overview %}
<figure><img src="data:image/png;base64,{{ overview }}" alt="all ratios with intervals"></figure>
{% endif %}
{% for suite in suites %}
<h2 id="{{ suite.name }}">{{ suite.title }}</h2>
{{ table(suite.results) }}
{% endfor %}
{% if growth %}
<h2 id="growth">Growth</h2>
<p class="note">Lines are medians. Bands: on the left quartiles, on the right 95 % intervals.</p>
{% for title, png in growth %}
<figure><img src="data:image/png;base64,{{ png }}" alt="{{ title }}"></figure>
{% endfor %}
<details><summary>The numbers</summary>{{ table(points) }}</details>
{% endif %}
<h2 id="how">How it was measured</h2>
{% for paragraph in how %}<p class="note">{{ paragraph }}</p>{% endfor %}
<p class="note">An aim is reached or missed where the whole interval says so. A comparison is
called disturbed where other work had more than 5 % of the processors' time, or the host took it.
"Times faster" is than the first case of each table. Allocations are how often one
call asks PyTorch's CPU allocator for memory, and for how much in all.</p>
<dl>{% for name, text in about.items() %}<dt>{{ name }}</dt><dd>{{ text }}</dd>{% endfor %}</dl>
</body></html>
"""
)


def row(result, name):
    """A case as the page shows it."""
    case, base = result["cases"][name], next(iter(result["cases"]))
    middle, *ends = case["faster"]
    mib = case["allocated"] / 2**20
    return {
        "name": name,
        "kind": "ours" if name.startswith(OURS) else "limit" if name in measuring.LIMITS else "",
        "median": duration(case["median"]),
        "quartiles": duration(case["quartiles"][0], case["quartiles"][1:]),
        "faster": "" if name == base else times(middle),
        "interval": "" if name == base else " to ".join(map(times, ends)),
        "rate": f"{case['bytes_per_second'] / 1e9:.1f}" if result["bytes"] else "",
        "share": case["of_triad"][0] if result["bytes"] else None,
        "allocations": case["allocations"],
        "allocated": f"{mib:.1f}" if mib >= 0.05 else "",
    }


def shown(result):
    """A comparison as the page shows it."""
    return {
        "title": result["title"],
        "suite": result["suite"],
        "bytes": size(result["bytes"]),
        "rounds": result["rounds"],
        "disturbed": measuring.disturbed(result["others"]),
        "missing": result["missing"],
        "cases": [row(result, case) for case in result["cases"]],
    }


def size(bytes):
    unit = next((u for u in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if bytes >= u[0]), (1, "bytes"))
    return f"{bytes / unit[0]:.3g} {unit[1]}" if bytes else ""


def paragraphs(text):
    """The measuring core's docstring, which says how it measures."""
    for paragraph in text.strip().split("\n\n")[1:]:
        escaped = str(markupsafe.escape(" ".join(paragraph.split())))
        yield markupsafe.Markup(re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", escaped))


def page(record, pictures):
    """The page, {plot's name: (title, PNG)} inside."""
    every = [shown(result) for result in record["results"] if not result["growth"]]
    encoded = {n: (t, base64.b64encode(png).decode()) for n, (t, png) in pictures.items()}
    suites = [
        {"name": name, "title": title, "results": [r for r in every if r["suite"] == name]}
        for name, title in SUITES.items()
    ]
    return PAGE.render(
        machine=record["machine"],
        date=record["date"][:16].replace("T", " "),
        load=record["load"],
        goals=goals(record),
        overview=encoded.pop("overview", ("", ""))[1],
        suites=[suite for suite in suites if suite["results"]],
        about=ABOUT,
        growth=encoded.values(),
        points=[shown(r) for r in record["results"] if r["growth"]],
        how=paragraphs(measuring.__doc__),
    )


def as_json(record):
    """The record as text, a case a line."""

    def on_a_line(found):
        text = re.sub(r"\s*\n\s*", " ", found[0])
        return text[0] + text[1:-1].strip() + text[-1]

    text = json.dumps(record, indent=1)
    for innermost in (r"\[[^][{}]*\]", r"\{[^{}]*\}"):
        text = re.sub(innermost, on_a_line, text)
    return text + "\n"


def slug(machine: dict) -> str:
    """A file's name for a machine: ``amd-epyc-2-cores``."""
    text = f"{machine['processor']} {machine['cores']} cores".lower()
    text = re.sub(r"\(r\)|\(tm\)|\bcpu\b|@.*ghz", " ", text)
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")


def write(record, folder, add=False):
    """Write a machine's JSON, page and plots; returns the JSON's and the page's path.

    Args:
        add: keep what the machine's file holds of other comparisons.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    name = slug(record["machine"])
    path = folder / f"{name}.json"
    if add and path.exists():
        new = {result["title"] for result in record["results"]}
        old = json.loads(path.read_text())["results"]
        kept = [result for result in old if result["title"] not in new]
        record = measuring.record(record["machine"], kept + record["results"])
    path.write_text(as_json(record))
    pictures = {}
    with matplotlib.rc_context(STYLE):
        for plot, (title, figure) in plots(record).items():
            picture = io.BytesIO()
            figure.savefig(picture, format="png")
            pictures[plot] = title, picture.getvalue()
            (folder / f"{name}-{plot}.png").write_bytes(picture.getvalue())
    (folder / f"{name}.html").write_text(page(record, pictures))
    return path, path.with_suffix(".html")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help="a run's .json")
    path = parser.parse_args(arguments).file
    print(*write(json.loads(path.read_text()), path.parent))


if __name__ == "__main__":
    main()
