"""The costs of our kernels: a launcher of tests/launchers.py, in the emulator, at any size.

Where all rows would take too long, few run and twice as many: what a launch does is an affine
function of its rows, and how long a block takes is one of the rows that it has. How many blocks a
launch of all rows has is noted from a call whose launches do not run.
"""

import dataclasses
import functools
import math
import re

import launchers
import torch

from kdkernels.tools.comparisons import resnet18

from .cost import RATES, SECTOR, SMS, THREADS_PER_SM, cost, moved

TEMPERATURE, ALPHA = 2.0, 0.5
OPS = {op.name: op for op in launchers.OPS}
SAMPLE = 1 << 15  # elements of a loss of few rows


@functools.cache
def library():
    """The launchers on the emulator, and the PTX of their kernels."""
    built = launchers.build()
    texts = re.findall(rb"\.version [^\0]*", built.path.read_bytes())
    return built, [t.decode() for t in texts if b".entry" in t and b".target sm_90" in t]


def ptx_of(kernel):
    (text,) = [t for t in library()[1] if re.search(rf"\.entry {re.escape(kernel)}\b", t)]
    return text


# ---- launches ------------------------------------------------------------------------------------


def run(op, case):
    """The launches of one case, whose results are what they must be."""
    built, _ = library()
    with built.run(limit=2**32) as device:
        got = op.launch(launchers.emulated(device, built), case)
        device.check()
    op.compare(case, got, op.expected(case))
    return device.launches


class Notes(launchers.Device):
    """A device that nothing runs on: tensors stay where they are, large outputs have no memory."""

    def put(self, tensor, offset=0, name=None):
        return tensor

    def new(self, shape, dtype, offset=0, name=None):
        if math.prod(shape) > 1 << 20:
            return torch.empty((), dtype=dtype).expand(shape)
        return super().new(shape, dtype, offset, name)  # launchers clear some


def note(op, case):
    """The launches that one case would have."""
    built, _ = library()
    with built.run(limit=0) as device:
        op.launch(Notes(built.python, "cpu", device.buffer), case)
        device.check()
    return device.launches


def costs_of(op, case_of, full, some, each_once):
    """The costs of the launches of case_of(full).

    Args:
        case_of: of so many rows or elements; blank=True where it is only noted.
        some: rows, or elements, of the smaller of two runs, or None: all of them run.
        each_once: the bytes of all tensors of case_of(full), each read or written once.
    """
    noted = note(op, case_of(full, blank=True))
    kernels = [launch.kernel for launch in noted]
    while True:
        sizes = [some, 2 * some] if some else [full]
        runs = [run(op, case_of(n)) for n in sizes]
        if not some or all([done.kernel for done in r] == kernels for r in runs):
            break
        some = 2 * some if 4 * some < full else None  # only more rows have these launches
    return [
        extrapolated(launches, sizes, full, each_once)
        for launches in zip(*runs, noted, strict=True)
    ]


def extrapolated(launches, sizes, full, each_once):
    """The cost of the last of the launches, which is noted, from the others, of `sizes` rows."""
    *ran, noted = launches
    costs = [cost(done, ptx_of(done.kernel), math.prod(done.grid), math.inf) for done in ran]
    first, last = costs[0], costs[-1]
    factor = 0 if len(costs) == 1 else (full - sizes[0]) / (sizes[1] - sizes[0])
    grown = {
        name: getattr(first, name) + factor * (getattr(last, name) - getattr(first, name))
        for name in ("useful", "sectors", "memory", *RATES)
    }
    blocks = math.prod(noted.grid)
    grown["moved"] = moved(SECTOR * grown["sectors"], each_once, blocks, last.resident)
    for name in ("path", "mean_path"):
        known = [(n / c.blocks, getattr(c, name)) for n, c in zip(sizes, costs, strict=True)]
        grown[name] = path_of(full / blocks, known)
    return dataclasses.replace(last, blocks=blocks, **grown)


def path_of(rows, known):
    """The cycles of a block of so many rows, from those of [(rows, cycles)]."""
    (few, short), (many, long) = known[0], known[-1]
    if many - few > 0.01 * many:
        return long + (long - short) / (many - few) * (rows - many)
    return long * max(1, rows / many)


# ---- losses --------------------------------------------------------------------------------------

# What --options takes: the fields of a case. A cap and a scale are both sides', as where both are
# models of one family.
OPTIONS = {
    "inplace": {"inplace": True},
    "no_gradient": {"gradient": False},
    "row_losses": {"reduction": "none"},
    "prompts": {"prompts": 0.5},
    "weight": {"weighted": True},
    "label_smoothing": {"smoothing": 0.1},
    "statistics": {"statistics": True},
    "soft_cap": {"soft_cap": 30.0, "teacher_soft_cap": 30.0},
    "logit_scale": {"logit_scale": 0.5, "teacher_logit_scale": 0.5},
    "standardize": {"standardize": True},
    "log_probs": {"kind": "log_probs"},
    "probs": {"kind": "probs"},
    "teachers": {"teachers": 3},
    "teacher_gradient": {"teacher_gradient": True},
    "top_k": {"tail": "renormalize", "entries": 64},
}


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss to be counted."""

    divergence: str
    dtype: str
    classes: int
    rows: int
    gap: float = math.inf
    temperature: float = TEMPERATURE
    labels: bool = False
    options: tuple = ()

    @property
    def op(self):
        return (
            self.divergence + " with labels" * self.labels + "".join(f", {o}" for o in self.options)
        )

    def case(self, rows, blank=False):
        """So many of its rows, as a case of a launcher."""
        fields = {}
        for name in self.options:
            fields |= OPTIONS[name]
        alpha = ALPHA if self.labels else 1.0 if self.divergence == "decoupled" else None
        return launchers.Divergence(
            self.dtype,
            rows,
            self.classes,
            self.temperature,
            alpha,
            divergence=self.divergence,
            values="blank" if blank else "training",
            gap=self.gap,
            **fields,
        )


def launcher_of(case):
    """As csrc/ops/distillation.cpp chooses."""
    plain = case.divergence == "forward_kl" and case.tail is None and case.teachers == 1
    plain = plain and case.kind != "probs" and not (case.standardize or case.statistics)
    plain = plain and case.logit_scale == 1 and case.soft_cap is None
    return OPS["distillation" if plain and not case.teacher_gradient else "divergence"]


def count_loss(loss):
    """(the costs of a loss, elements, minimal bytes an element)."""
    whole = loss.case(loss.rows, blank=True)
    op = launcher_of(whole)
    minimum = op.minimum_bytes(whole)
    # The rows of a launch's blocks are a power of two.
    some = 2 ** round(math.log2(max(2, min(1024, SAMPLE // loss.classes))))
    if loss.rows <= 3 * some:
        some = None
    costs = costs_of(op, loss.case, loss.rows, some, minimum + 8 * loss.rows)
    elements = loss.rows * loss.classes
    return costs, elements, minimum / elements


# ---- noise and regression ------------------------------------------------------------------------

LISTS = {"one tensor": [1 << 24], "ResNet-18's": resnet18()}
# Title, launcher, how often an element is read or written, and the case. An update's rule is the
# first of its kind in tests/launchers.py.
NOISY = [
    (f"noise, {name}", "noise", 2, {"distribution": name})
    for name in ("uniform", "rademacher", "truncated_normal", "laplace")
]
NOISY += [
    ("noise, norms too", "noise", 2, {"norms": True}),
    ("noise, one std per channel", "noise", 2, {"pattern": (64, 49)}),
    ("noise, dot product", "noise_dot", 1, {}),
    ("noises of 8 seeds", "combine", 2, {"terms": 8}),
    ("SGD with momentum and noise", "update", 5, {"update": "sgd"}),
    ("AdamW with noise", "update", 7, {"update": "adamw"}),
    ("AdamW", "update", 7, {"update": "adamw", "std": 0.0}),
    ("pSGLD", "update", 5, {"update": "psgld"}),
]


def count_others(dtype, wanted):
    """(op, dtype, size, costs, elements, minimal bytes an element) of what is no loss."""
    size = launchers.size_of(dtype)
    for title, sizes in LISTS.items() if wanted("noise") else ():

        def case(n, blank=False, sizes=sizes):
            return launchers.Noise(dtype, (n,) if len(sizes) == 1 else tuple(sizes))

        some = 1 << 20 if len(sizes) == 1 else None
        costs = costs_of(OPS["noise"], case, sum(sizes), some, 2 * size * sum(sizes))
        yield "noise", dtype, title, costs, sum(sizes), 2 * size
    elements, some = LISTS["one tensor"][0], 1 << 20
    for title, op, passes, of in NOISY:
        if not wanted(title):
            continue

        def case(n, blank=False, op=op, of=of):
            kind = launchers.Update if op == "update" else launchers.Noise
            return kind(dtype, (n,), **of)

        costs = costs_of(OPS[op], case, elements, some, passes * size * elements)
        yield title, dtype, "one tensor", costs, elements, passes * size
    if dtype == "float32" and wanted("regression"):  # it has no other dtype than fp64
        yield from count_regression()


def count_regression():
    replicas, steps = THREADS_PER_SM // 32 * SMS, 64
    for title, samples, per_sample in (
        ("a normal a step", 100, False),
        ("a normal a sample", 1000, True),
    ):

        def case(n, blank=False, samples=samples, per_sample=per_sample):
            return launchers.Regression(samples, n, steps, per_sample)

        normals = replicas * steps * (samples if per_sample else 1)
        trajectory = 8 * replicas * (steps + 1)
        costs = costs_of(OPS["noisy_linear_regression"], case, replicas, 64, trajectory)
        yield "regression, a normal", "float64", title, costs, normals, trajectory / normals
