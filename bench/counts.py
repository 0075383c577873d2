"""What the CUDA kernels cost on an H100, counted without one.

    python bench/counts.py                          ours and the peers', into bench/results
    python bench/counts.py --losses js --classes 1000 32000 --gap 0.1 far --json rows.json

Our kernels and the peers' (Liger, torch.compile) run in the emulator of tests/ptx, which counts the
bytes, the instructions and the critical paths of their PTX; the H100's limits make them times.
Nothing is timed. Needs nvcc for ours, Triton for the peers'.
"""

import argparse
import dataclasses
import itertools
import math
import re
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from counting import linear, ours, tables  # noqa: E402

from kdkernels import reference  # noqa: E402

DTYPES = ("float32", "bfloat16", "float16", "float64")
CLASSES = (10, 1000, 32000, 128256)
GAPS = (0.1, math.inf)
OURS = "kdkernels"


def rows_of(classes):
    return min(16384, max(4096, (1 << 24) // classes))


@dataclasses.dataclass
class Grid:
    """Losses to be counted: each value with each other. Without rows: rows_of(classes)."""

    losses: tuple
    classes: tuple = CLASSES
    dtypes: tuple = DTYPES[:2]
    gaps: tuple = GAPS
    rows: tuple = ()
    temperatures: tuple = (ours.TEMPERATURE,)
    labels: bool = False
    options: tuple = ((),)

    def __iter__(self):
        for divergence, options, dtype, classes in itertools.product(
            self.losses, self.options, self.dtypes, self.classes
        ):
            for rows, temperature, gap in itertools.product(
                self.rows or (rows_of(classes),), self.temperatures, self.gaps
            ):
                yield ours.Loss(
                    divergence, dtype, classes, rows, gap, temperature, self.labels, options
                )


# The whole table: what most people use at all sizes, the rest at that of a language model.
COMMON = ("forward_kl", "reverse_kl", "js")
LANGUAGE = {"classes": (32000,), "dtypes": ("bfloat16",)}
STANDARD = [
    Grid(COMMON),
    Grid(("forward_kl",), labels=True),
    Grid(("forward_kl",), classes=(100, 50257, 151936, 262144), dtypes=("bfloat16",)),
    Grid(tuple(name for name in reference.DIVERGENCES if name not in COMMON), **LANGUAGE),
    Grid(COMMON, rows=(1, 64, 512, 16384), **LANGUAGE),
    Grid(COMMON[:1], classes=(10, 1000), dtypes=("bfloat16",), rows=(128,)),
    Grid(COMMON, gaps=(0.01, 0.3), temperatures=(1.0, 4.0), **LANGUAGE),
    Grid(
        COMMON[:1],
        options=tuple(
            (name,)
            for name in ours.OPTIONS
            if name not in ("label_smoothing", "top_k", "row_losses")
        ),
        **LANGUAGE,
    ),
    Grid(COMMON[:1], classes=(128256,), options=(("top_k",),)),
]


# ---- what is asked for ---------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One sentence, and no usage before it."""
        self.exit(2, f"counts.py: {message}\n")


def number(takes, convert, fits):
    """A parser of one argument's value."""

    def parse(text):
        try:
            value = convert(text)
        except ValueError:
            value = None
        if value is None or not fits(value):
            raise argparse.ArgumentTypeError(f"requires {takes}, got {text!r}")
        return value

    return parse


def choice(*names):
    return number(f"one of {', '.join(names)}", str, lambda name: name in names)


def gap(text):
    takes = "a number of at least 0, or far"
    return number(takes, lambda s: math.inf if s == "far" else float(s), lambda x: x >= 0)(text)


def combination(text):
    return tuple(choice(*ours.OPTIONS)(name) for name in text.split(",") if name)


def pattern(text):
    try:
        return re.compile(text)
    except re.error as error:
        message = f"requires a regular expression, got {text!r}: {error}"
        raise argparse.ArgumentTypeError(message) from None


def arguments(words=None):
    parser = Parser(
        description=__doc__.split("\n")[0],
        allow_abbrev=False,
        epilog="Without any of --losses, --rows, --gap, --temperature, --labels and --options all "
        "ops are counted, beside their peers.",
    )
    add = parser.add_argument
    whole = number("a whole number of at least 1", int, lambda n: n >= 1)
    names = choice(*reference.DIVERGENCES)
    add("--losses", nargs="+", type=names, metavar="NAME", help="divergences; default all")
    add("--classes", nargs="+", type=whole, metavar="V", help=f"default {CLASSES}")
    add("--rows", nargs="+", type=whole, metavar="N", help="default 4,096 to 16,384")
    add("--dtypes", nargs="+", type=choice(*DTYPES), metavar="NAME", help="default fp32 and bf16")
    add(
        "--gap",
        nargs="+",
        type=gap,
        metavar="NUMBER",
        help="standard deviation of the student's logits less the teacher's, or far: independent; "
        "default 0.1 and far",
    )
    add(
        "--temperature",
        nargs="+",
        metavar="T",
        type=number("a positive number", float, lambda x: 0 < x < math.inf),
    )
    add("--labels", action="store_true", help="cross-entropy too, alpha 0.5")
    add(
        "--options",
        nargs="+",
        type=combination,
        metavar="NAME,...",
        help=f"all of a list at a time, list after list: {', '.join(ours.OPTIONS)}",
    )
    add("--ops", type=pattern, default=".", help="a regular expression: only ops that match it")
    add("--who", type=pattern, help="likewise, whose kernels; default all, of losses alone ours")
    add("--json", type=Path, metavar="FILE", help="the rows as JSON")
    add("--out", type=Path, metavar="FOLDER", help="of counts.md, .json and .png")
    given = parser.parse_args(words)
    given.selected = any(
        (given.losses, given.rows, given.gap, given.temperature, given.labels, given.options)
    )
    for names in given.options or ():
        if clash := clashing(names, given.losses or tuple(reference.DIVERGENCES), given.labels):
            parser.error(f"argument --options: {clash}")
    if given.who is None:
        given.who = re.compile(OURS if given.selected else ".")
    if given.out is None and not given.selected:
        given.out = ROOT / "bench" / "results"
    if given.json and not given.json.resolve().parent.is_dir():
        parser.error(f"argument --json: requires a folder that exists, not {given.json.parent}")
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
    return given


def clashing(names, losses, labels):
    """Why these options do not go together, or None."""
    if "label_smoothing" in names and not labels:
        return "label_smoothing requires --labels"
    if "probs" in names and "log_probs" in names:
        return "probs requires a teacher that is not log_probs"
    if "top_k" in names:
        if others := {"teachers", "teacher_gradient", "standardize", "probs"} & {*names}:
            return f"top_k requires that there is no {min(others)}"
        if others := {*losses} - {*reference.TOP_K_DIVERGENCES}:
            takes = ", ".join(reference.TOP_K_DIVERGENCES)
            return f"top_k requires --losses among {takes}, not {min(others)}"
    if "teacher_gradient" in names and "teachers" in names:
        return "teacher_gradient requires one teacher"
    return None


def grids(given):
    """The losses to be counted."""
    narrowed = {
        name: tuple(value) for name in ("classes", "dtypes") if (value := getattr(given, name))
    }
    if not given.selected:
        return [dataclasses.replace(grid, **narrowed) for grid in STANDARD]
    for name, value in (
        ("gaps", given.gap),
        ("rows", given.rows),
        ("temperatures", given.temperature),
        ("options", given.options),
    ):
        if value:
            narrowed[name] = tuple(value)
    losses = tuple(given.losses or reference.DIVERGENCES)
    return [Grid(losses, labels=given.labels, **narrowed)]


# ---- counting ------------------------------------------------------------------------------------


def our_rows(given):
    """Rows of our kernels."""
    counted = set()
    for loss in itertools.chain(*grids(given)):
        if not given.ops.search(loss.op) or loss in counted:
            continue
        counted.add(loss)
        costs, elements, minimum = ours.count_loss(loss)
        of_loss = dataclasses.asdict(loss)
        dtype, size = of_loss.pop("dtype"), f"{loss.rows} x {loss.classes}"
        yield tables.row(loss.op, dtype, size, OURS, costs, elements, minimum, **of_loss)
    for dtype in () if given.selected else given.dtypes or DTYPES[:2]:
        for op, of, size, costs, elements, minimum in ours.count_others(dtype, given.ops.search):
            yield tables.row(op, of, size, OURS, costs, elements, minimum)


def peers_rows(given, missing):
    """Rows of the peers' kernels; what cannot be counted is added to `missing`."""
    try:
        from counting import peers
    except ImportError as error:
        missing.append(f"the peers: {error}")
        return
    if peers.liger is None and given.who.search("Liger"):
        missing.append("Liger: liger_kernel is not installed")
    wanted = {loss.op for loss in itertools.chain(*grids(given))} if given.selected else None
    for name in given.dtypes or DTYPES[:2]:
        dtype = getattr(torch, name)
        for op, who, compile_it, call in peers.losses():
            if not (given.ops.search(op) and given.who.search(who)):
                continue
            if wanted is None or op in wanted:
                peers.check_loss(op, who, compile_it, call, dtype)
                for v in given.classes or CLASSES:
                    try:
                        counted = peers.count_loss(op, compile_it, call, v, dtype)
                    # An instruction that the emulator lacks; strides that Inductor pads on a GPU.
                    except (RuntimeError, AssertionError) as error:
                        said = str(error).splitlines()[0]
                        missing.append(f"{op}, {name}, V = {v}, {who}: {said}")
                        print(missing[-1], file=sys.stderr)
                        continue
                    yield peer_row(op, name, who, v, peers.rows_of(v), counted)
        if wanted is None and given.ops.search("noise") and given.who.search("torch.compile"):
            for size, sizes in ours.LISTS.items():
                costs = peers.count_noise(sizes, dtype)
                minimum = 2 * dtype.itemsize
                yield tables.row("noise", name, size, "torch.compile", costs, sum(sizes), minimum)


def peer_row(op, dtype, who, classes, rows, counted):
    divergence = op.split()[0]
    return tables.row(
        op,
        dtype,
        f"{rows} x {classes}",
        who,
        *counted,
        classes=classes,
        rows=rows,
        divergence=divergence if divergence in reference.DIVERGENCES else None,
        temperature=ours.TEMPERATURE,
        labels="labels" in op,
        options=(),
    )


def main(words=None):
    given = arguments(words)
    rows, missing = [], []
    found = our_rows(given) if given.who.search(OURS) else ()
    others = peers_rows(given, missing) if given.who.pattern != OURS else ()
    for row in itertools.chain(found, others):
        rows.append(row)
        words = row.op, row.dtype, row.size, tables.gap_text(row.gap), row.who
        print(f"{', '.join(filter(None, words))}: {row.of_floor:.2f}", file=sys.stderr, flush=True)
    text = tables.markdown(rows, missing)
    if not given.selected and given.ops.search("fused linear") and given.who.search(OURS):
        text += linear.markdown(linear.counted())
    print(text)
    if given.json:
        given.json.write_text(tables.as_json(rows))
    if given.out:
        (given.out / "counts.md").write_text(text)
        (given.out / "counts.json").write_text(tables.as_json(rows))
        if rows:
            tables.plot(rows, given.out / "counts.png")


if __name__ == "__main__":
    main()
