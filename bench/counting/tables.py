"""Counts as rows, and rows as JSON, Markdown and a plot."""

import collections
import dataclasses
import json
import math

from . import cost

SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}
HEADER = (
    "size | gap | kernels of | launches | moved / min | requested / min | sectors % | MUFU | FMA "
    "| ALU | memory | slots | ps | x floor | bytes and units | latency | bound by | registers "
    "| spills"
)
ABOUT = """\
MUFU to memory: instructions an element (slots: of a warp). ps: time an element. x floor: over the
time of the minimal bytes at full bandwidth; beside it what the longest of bytes and units alone
would take, and latency alone. Spills: bytes a thread. gap: standard deviation of the student's
logits less the teacher's; far: independent."""


@dataclasses.dataclass
class Row:
    op: str
    dtype: str
    size: str
    who: str
    launches: int
    elements: int
    minimum: float  # bytes an element
    moved: float  # times the minimum; likewise below
    requested: float
    sector_efficiency: float
    mufu: float  # an element; likewise below
    fma: float
    alu: float
    memory: float
    slots: float
    picoseconds: float
    of_floor: float  # the time over that of the minimum at full bandwidth; likewise below
    throughput: float  # of bytes and units alone
    latency: float  # of the critical paths alone
    bound_by: dict  # limit -> share of the time in launches that it binds
    registers: int
    spills: int
    # Of a loss; no gap where the costs do not depend on the numbers.
    divergence: str | None = None
    classes: int | None = None
    rows: int | None = None
    gap: float | None = None
    temperature: float | None = None
    labels: bool | None = None
    options: tuple | None = None

    @property
    def place(self):
        """Where it stands among others."""
        far = math.inf if self.gap is None else self.gap
        size = (self.classes or 0, self.rows or 0, self.size, far)
        return self.op, self.dtype != "float32", *size, self.who != "kdkernels", self.who


def row(op, dtype, size, who, costs, elements, minimum, **of_loss):
    def an_element(name):
        return sum(getattr(c, name) for c in costs) / elements

    floor = minimum * elements / cost.BANDWIDTH
    seconds, throughput, latency, bound_by = 0.0, 0.0, 0.0, collections.Counter()
    for c in costs:
        limits = c.seconds()
        limit, time = max(limits.items(), key=lambda item: item[1])
        seconds += time
        bound_by[limit] += time
        latency += limits.pop("latency")
        throughput += max(limits.values())
    useful, sectors = sum(c.useful for c in costs if c.sectors), sum(c.sectors for c in costs)
    by_pytorch = sum(c.moved for c in costs if not c.sectors)
    requested = cost.SECTOR * sectors
    return Row(
        op,
        dtype,
        size,
        who,
        len(costs),
        elements,
        minimum,
        moved=an_element("moved") / minimum,
        requested=(requested + by_pytorch) / elements / minimum,
        sector_efficiency=useful / requested if sectors else math.nan,
        **{name: an_element(name) for name in ("mufu", "fma", "alu", "memory", "slots")},
        picoseconds=1e12 * seconds / elements,
        of_floor=seconds / floor,
        throughput=throughput / floor,
        latency=latency / floor,
        bound_by={limit: time / seconds for limit, time in bound_by.most_common()},
        registers=max(c.registers for c in costs),
        spills=max(c.spills for c in costs),
        **of_loss,
    )


def gap_text(gap):
    return "" if gap is None else "far" if math.isinf(gap) else f"{gap:g}"


def as_json(rows):
    """A list of objects; a gap is a number, "far" or null."""
    objects = []
    for r in rows:
        fields = dataclasses.asdict(r)
        if math.isnan(r.sector_efficiency):
            fields["sector_efficiency"] = None
        if r.gap is not None and math.isinf(r.gap):
            fields["gap"] = "far"
        objects.append(fields)
    return json.dumps(objects, indent=1, allow_nan=False) + "\n"


def groups(rows):
    grouped = collections.defaultdict(list)
    for r in sorted(rows, key=lambda r: r.place):
        grouped[r.op, r.dtype].append(r)
    return grouped


def summary(rows):
    """Lines of a table of ours, near and far, beside torch.compile and Liger."""
    names = ("torch.compile", "Liger")
    peers = {
        (r.op, r.dtype, r.classes, name): f"{r.of_floor:.2f}"
        for r in rows
        for name in names
        if r.who.startswith(name)
    }
    ours = collections.defaultdict(dict)
    for r in sorted(rows, key=lambda r: r.place):
        if r.gap is not None:
            title = f"{r.op}, {SHORT.get(r.dtype, r.dtype)}, {r.size}"
            title += f", T = {r.temperature:g}" * (r.temperature != 2)
            ours[title][r.gap] = r
    gaps = sorted({gap for found in ours.values() for gap in found})
    if not gaps:
        return []
    heads = [cell for gap in gaps for cell in (gap_text(gap), "bound by")]
    lines = ["", "## Near and far: x floor", "", f"| | {' | '.join([*heads, *names])} |"]
    lines.append("|" + "---|" * (len(heads) + len(names) + 1))
    for title, found in ours.items():
        cells = [title]
        for gap in gaps:
            r = found.get(gap)
            cells += ["", ""] if r is None else [f"{r.of_floor:.2f}", next(iter(r.bound_by))]
        some = next(iter(found.values()))
        plain = some.temperature == 2
        cells += [
            peers.get((some.op, some.dtype, some.classes, name), "") if plain else ""
            for name in names
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def markdown(rows, missing):
    lines = ["# Counted costs on an H100 SXM", "", cost.__doc__.strip(), "", ABOUT]
    lines += summary(rows)
    for (op, dtype), group in groups(rows).items():
        lines += ["", f"## {op}, {dtype}: at least {group[0].minimum:g} bytes an element", ""]
        lines += [f"| {HEADER} |", "|" + "---|" * (HEADER.count("|") + 1)]
        for r in group:
            bound = ", ".join(f"{k} {v:.0%}" for k, v in r.bound_by.items() if v >= 0.01)
            efficiency = "" if math.isnan(r.sector_efficiency) else f"{r.sector_efficiency:.1%}"
            lines.append(
                f"| {r.size} | {gap_text(r.gap)} | {r.who} | {r.launches} | {r.moved:.3f} "
                f"| {r.requested:.3f} | {efficiency} | {r.mufu:.2f} | {r.fma:.1f} | {r.alu:.1f} "
                f"| {r.memory:.2f} | {r.slots:.3f} | {r.picoseconds:.2f} | {r.of_floor:.2f} "
                f"| {r.throughput:.2f} | {r.latency:.2f} | {bound} | {r.registers} | {r.spills} |"
            )
    if missing:
        lines += ["", "## Not counted", "", *(f"- {line}" for line in missing)]
    return "\n".join(lines) + "\n"


def plot(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    grouped = groups([r for r in rows if math.isfinite(r.of_floor)])
    height = [len(g) for g in grouped.values()]
    figure, axes = plt.subplots(
        len(grouped),
        1,
        figsize=(9, 0.24 * sum(height) + 0.7 * len(height)),
        squeeze=False,
        height_ratios=height,
        sharex=True,
        layout="constrained",
    )
    for axis, ((op, dtype), group) in zip(axes[:, 0], grouped.items(), strict=True):
        labels = [f"{r.size}  {gap_text(r.gap)}  {r.who}" for r in group]
        colors = ["tab:green" if r.who == "kdkernels" else "tab:gray" for r in group]
        axis.barh(range(len(group)), [r.of_floor for r in group], color=colors)
        axis.set_yticks(range(len(group)), labels, fontsize=7)
        axis.invert_yaxis()
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_title(f"{op}, {dtype}", fontsize=8, loc="left")
        axis.set_xscale("log")
    axes[-1, 0].set_xlabel("time that an H100's limits allow / time of the minimal bytes")
    figure.savefig(path, dpi=120)
    plt.close(figure)
