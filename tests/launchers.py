"""Every CUDA launcher, declared once: how its arguments are made, what must come out, its cases.

An Op in OPS gets emulated tests and GPU tests (test_launchers.py) and can be counted
(bench/counts.py).
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import ptx
import torch

from kdkernels import _C, reference
from kdkernels.tools.comparisons import IGNORED, training_logits

ROOT = Path(__file__).parent.parent
SOURCES = [*sorted(ROOT.glob("csrc/cuda/*.cu")), ROOT / "tests/launchers.cpp"]
HALF_ULP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # relative
DTYPES = ("float32", "bfloat16", "float16", "float64")


# Devices from Hopper on run the last library; each takes its time to build.
PTX_ARCHS = [("75", "80"), ("90",)]
INCLUDE = [ROOT / "csrc"]
HOST = [f"-I{Path(torch.__path__[0]) / 'include'}"]


@functools.cache
def build(older=False):
    """The launchers on the emulator, for devices from Hopper on, or for older ones."""
    archs = PTX_ARCHS[0 if older else 1]
    return ptx.build("launchers", SOURCES, archs, include=INCLUDE, host=HOST)


def objects():
    """The object of each source, by its path, for devices from Hopper on."""
    made = ptx.compiled(SOURCES, PTX_ARCHS[1], include=INCLUDE, host=HOST)
    return dict(zip(map(str, SOURCES), map(str, made), strict=True))


def build_native():
    """The launchers for the GPU of this machine, a Python module."""
    return ptx.build_native("launchers", SOURCES, HOST, INCLUDE)


# ---- devices ------------------------------------------------------------------------------------


class Device:
    """Where a launcher runs: it makes device memory and holds the launchers."""

    def __init__(self, lib, torch_device, announce=None, stream=0):
        self.lib, self.torch_device, self.stream = lib, torch_device, stream
        self._announce = announce or (lambda tensor, written, name: None)

    def _place(self, numel, dtype, offset):
        size = torch.empty((), dtype=dtype).element_size()
        raw = torch.empty(
            (numel + offset) * size + 256, dtype=torch.uint8, device=self.torch_device
        )
        begin = -raw.data_ptr() % 256 + offset * size
        return raw[begin : begin + numel * size].view(dtype)

    def put(self, tensor, offset=0, name=None):
        """A copy of a CPU tensor, `offset` elements past 256 aligned bytes."""
        out = self._place(tensor.numel(), tensor.dtype, offset).view(tensor.shape)
        out.copy_(tensor)
        self._announce(out, True, name)
        return out

    def put_rows(self, matrix, pad, offset, name):
        """A copy of a matrix with `pad` elements of NaN behind each row."""
        return self.put(padded(matrix, pad), offset, name)

    def new_rows(self, shape, dtype, pad, offset, name):
        return self.new((shape[0], shape[1] + pad), dtype, offset, name)

    def new(self, shape, dtype, offset=0, name=None):
        """Memory that counts as never written, full of NaN."""
        out = self._place(math.prod(shape), dtype, offset).view(shape)
        out.fill_(math.nan if dtype.is_floating_point else -1)
        self._announce(out, False, name)
        return out


def emulated(run, lib, stream=0):
    def announce(tensor, written, name):
        run.buffer(tensor, written, name)

    return Device(lib.python, "cpu", announce, stream)


def gpu(module):
    return Device(module, "cuda", stream=torch.cuda.current_stream().cuda_stream)


@dataclass
class Op:
    """One launcher.

    launch(device, case) -> outputs by name, CPU tensors
    expected(case) -> the same, from the CPU op or the fp64 reference
    compare(case, got, want) asserts
    minimum_bytes(case): what must cross global memory at least
    """

    name: str
    launch: Callable
    expected: Callable
    compare: Callable
    minimum_bytes: Callable
    cases: list = field(default_factory=list)
    # At night on every generation; else on one and on another that takes its turn.
    everywhere: bool = True


def address(tensor):
    return 0 if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


def generator(seed):
    return torch.Generator().manual_seed(seed)


def strides_of(lib, rows):
    """Where the rows of a matrix, or of a batch of sequences, lie."""
    if rows.dim() == 2:
        return lib.RowStrides(rows.stride(0))
    return lib.RowStrides(rows.stride(1), rows.stride(0), rows.shape[1])


def fill(struct, **fields):
    for name, value in fields.items():
        setattr(struct, name, value)
    return struct


def cpu(**tensors):
    return {name: tensor.cpu() for name, tensor in tensors.items() if tensor is not None}


# ---- distillation -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Distillation:
    dtype: str
    rows: int
    classes: int
    temperature: float = 2.0
    alpha: float | None = None  # labels where not None
    smoothing: float = 0.0
    weighted: bool = False
    ignored: float = 0.0  # share of the rows
    reduction: str = "mean"
    gradient: bool = True
    inplace: bool = False
    pad: tuple = (0, 0, 0)  # elements between the rows of student, teacher, gradient
    offset: tuple = (0, 0, 0)  # elements past 256 aligned bytes
    values: str = "normal"  # "masked", "nan", "training", "blank"
    scale: float = 3.0
    levels: tuple = (0.0, 0.0)  # what is added to all logits of student and teacher
    # Standard deviation of the teacher's logits less the student's; the first row of "normal" ones
    # is far.
    gap: float = math.inf
    prompts: float = 0.0  # share of the rows of "training" that do not count

    @property
    def torch_dtype(self):
        return getattr(torch, self.dtype)

    @property
    def acc(self):
        return torch.float64 if self.dtype == "float64" else torch.float32

    @property
    def counting_rows(self):
        return self.rows - int(self.prompts * self.rows)


def training_inputs(case):
    """Rows of a prompt have no label, or no weight where there are no labels."""
    z, t, labels = training_logits(
        case.rows, case.classes, case.gap, dtype=case.torch_dtype, prompts=case.prompts
    )
    weight = None
    if case.weighted:
        weight = 0.5 + torch.rand(case.rows, generator=generator(1)).to(case.acc)
    if case.alpha is not None:
        return z, t, labels, weight
    if case.prompts:
        weight = (labels != IGNORED) * (1 if weight is None else weight)
    return z, t, None, None if weight is None else weight.to(case.acc)


def blank_inputs(case):
    """One element stands for all others, for launches that are noted and not run."""

    def blank(*shape, dtype=case.torch_dtype):
        return torch.zeros((), dtype=dtype).expand(shape)

    z = blank(case.rows, case.classes)
    labels = None if case.alpha is None else blank(case.rows, dtype=torch.long)
    weighted = case.weighted or (case.alpha is None and case.prompts)
    return z, z, labels, blank(case.rows, dtype=case.acc) if weighted else None


def distillation_inputs(case):
    if case.values == "training":
        return training_inputs(case)
    if case.values == "blank":
        return blank_inputs(case)
    g = generator(case.rows * 1000003 + case.classes)
    shape = (case.rows, case.classes)
    z = case.scale * torch.randn(shape, generator=g, dtype=torch.float64)
    t = case.scale * torch.randn(shape, generator=g, dtype=torch.float64)
    z, t = z + case.levels[0], t + case.levels[1]
    if case.values == "masked":  # some classes impossible, for both sides alike
        mask = torch.rand(shape, generator=g) < 0.3
        mask[:, 0] = False
        z[mask], t[mask] = -math.inf, -math.inf
    if case.values == "nan" and case.rows:
        z[0, case.classes // 2] = math.nan
    if case.gap < math.inf:
        z = z.to(case.torch_dtype).double()
        noise = torch.randn(shape, generator=g, dtype=torch.float64)
        t[1:] = (z + case.gap * noise)[1:]
    labels = weight = None
    if case.alpha is not None:
        labels = torch.randint(case.classes, (case.rows,), generator=g)
        if case.values == "masked":
            labels[:] = 0
        labels[torch.rand(case.rows, generator=g) < case.ignored] = -100
    if case.weighted:
        weight = torch.rand(case.rows, generator=g).to(case.acc)
        weight[::3] = 0
    return z.to(case.torch_dtype), t.to(case.torch_dtype), labels, weight


def padded(matrix, pad):
    if pad == 0:
        return matrix
    return torch.nn.functional.pad(matrix, (0, pad), value=math.nan)


def denominator(lib, case, counted):
    """What the loss is divided by; `counted`: the kernel adds the kept rows' weights up."""
    if counted:
        return fill(lib.Denominator(), is_kept_weight=True)
    return fill(lib.Denominator(), number=case.rows if case.reduction == "mean" else 1.0)


def distillation_launch(device, case):
    z, t, labels, weight = distillation_inputs(case)
    dtype, rows, classes = case.torch_dtype, case.rows, case.classes
    student = device.put_rows(z, case.pad[0], case.offset[0], "student")
    teacher = device.put_rows(t, case.pad[1], case.offset[1], "teacher")
    gradient = None
    if case.gradient:
        gradient = student
        if not case.inplace:
            gradient = device.new_rows(z.shape, dtype, case.pad[2], case.offset[2], "gradient")
    labels = None if labels is None else device.put(labels, name="labels")
    weight = None if weight is None else device.put(weight, name="weight")
    none = case.reduction == "none"
    row_loss = device.new((rows,), case.acc, name="row_loss") if none else None
    loss = None if none else device.new((1,), case.acc, name="loss")
    workspace = device.new(
        (max(1, device.lib.loss_workspace(rows)),), torch.float64, name="workspace"
    )
    counted = case.reduction == "mean" and (labels is not None or weight is not None)
    p = fill(
        device.lib.LossParams(),
        dtype=getattr(device.lib.Dtype, case.dtype),
        rows=rows,
        classes=classes,
        student=address(student),
        gradient=address(gradient),
        labels=address(labels),
        weight=address(weight),
        row_loss=address(row_loss),
        loss=address(loss),
        student_rows=strides_of(device.lib, student),
        all_classes=classes,
        gradient_rows=0 if gradient is None else strides_of(device.lib, gradient),
        temperature=case.temperature,
        alpha=1.0 if case.alpha is None else case.alpha,
        label_smoothing=case.smoothing,
        ignore_index=-100,
        denominator=denominator(device.lib, case, counted),
        gradient_scale=1.0,
        workspace=address(workspace),
    )
    p.set_teachers([address(teacher)], [strides_of(device.lib, teacher)], [1.0])
    device.lib.loss(p, device.stream)
    return cpu(loss=loss if loss is not None else row_loss, gradient=gradient)


def distillation_expected(case):
    z, t, labels, weight = distillation_inputs(case)
    z = z.double().requires_grad_()
    options = {"weight": None if weight is None else weight.double(), "reduction": case.reduction}
    if labels is not None:
        options |= {"alpha": case.alpha, "label_smoothing": case.smoothing}
    loss = reference.distillation_loss(
        z, t.double(), labels, temperature=case.temperature, **options
    )
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    return {"loss": loss.detach().reshape(-1), "gradient": gradient}


def rows_shares(case):
    """What each row counts in the loss."""
    *_, labels, weight = distillation_inputs(case)
    share = torch.ones(case.rows).double() if weight is None else weight.double()
    if labels is not None:
        share = torch.where(labels == -100, 0.0, share)
    if case.reduction == "mean":
        share = share / max(share.sum().item(), 1e-30)
    return share


def compare_near(case, got, want):
    """Rows of a loss that is all divergence, of students near their teachers."""
    torch.testing.assert_close(got["loss"][1:].double(), want["loss"][1:], rtol=1e-4, atol=1e-14)


def distillation_compare(case, got, want):
    exact = case.dtype == "float64"
    # As in test_distillation.py: the largest share of a row in the loss, and of all rows.
    share = rows_shares(case)
    largest = share.max().item() if case.rows else 0.0
    total = largest if case.reduction == "none" else share.sum().item()
    temperature = case.temperature
    torch.testing.assert_close(
        got["loss"].double(),
        want["loss"],
        rtol=1e-12 if exact else 1e-6,
        atol=(1e-13 if exact else 4e-7) * temperature**2 * total,
        equal_nan=True,
    )
    if case.gap < math.inf and case.alpha is None:
        compare_near(case, got, want)
    if not case.gradient:
        return
    gradient = got["gradient"]
    pad = case.pad[0 if case.inplace else 2]
    if pad:
        assert gradient[:, case.classes :].isnan().all(), "the padding between rows was written"
        gradient = gradient[:, : case.classes]
    atol = (1e-13 if exact else 1e-6) * max(1.0, largest * max(temperature, 1.0))
    if case.dtype == "float16":
        atol += 2.0**-24
    rtol = 1.001 * HALF_ULP.get(case.torch_dtype, 0.0)
    torch.testing.assert_close(
        gradient.double(), want["gradient"], rtol=rtol, atol=atol, equal_nan=True
    )


TRAINING_GAPS = (0.01, 0.1, 0.3, math.inf)


def distillation_cases():
    # Around every limit of the plan, odd and even.
    small = (1, 2, 3, 7, 8, 10, 16, 17, 33, 100, 127, 128, 255, 512)
    middle = (513, 1000, 1023, 1024, 1025, 2049, 4096, 9001)
    for dtype in DTYPES:
        for classes in small:
            yield Distillation(dtype, 21, classes)
        for classes in middle:
            yield Distillation(dtype, 3, classes)
        hard = {"alpha": 0.3}
        for classes in (10, 127, 600, 1025, 3001):
            yield Distillation(dtype, 7, classes, **hard, ignored=0.3)
            yield Distillation(dtype, 7, classes, **hard, temperature=1.0, smoothing=0.1)
            yield Distillation(dtype, 7, classes, **hard, temperature=3.0, smoothing=0.2)
            yield Distillation(dtype, 5, classes, **hard, weighted=True, reduction="none")
            yield Distillation(dtype, 5, classes, weighted=True, reduction="sum")
            yield Distillation(dtype, 5, classes, **hard, ignored=1.0)
            yield Distillation(dtype, 4, classes, gradient=False)
            yield Distillation(dtype, 4, classes, inplace=True, **hard)
            yield Distillation(dtype, 4, classes, values="masked", **hard)
            yield Distillation(dtype, 4, classes, values="nan", reduction="none")
            yield Distillation(dtype, 4, classes, scale=40.0)
            yield Distillation(dtype, 4, classes, gap=1e-3, reduction="none")
            yield Distillation(dtype, 4, classes, gap=1e-3, inplace=True, **hard)
            # Rows that start at any element, alike or not, apart or not.
            yield Distillation(dtype, 5, classes, offset=(1, 1, 1))
            yield Distillation(dtype, 5, classes, offset=(3, 3, 3), pad=(5, 5, 5))
            yield Distillation(dtype, 5, classes, offset=(0, 1, 2), pad=(3, 0, 1))
            yield Distillation(dtype, 5, classes, pad=(8, 16, 24), inplace=True)
        for i, (rows, classes) in enumerate(((70, 10), (9, 127), (5, 1000), (4, 3001))):
            of = {"values": "training", "prompts": 0.5}
            gap, temperature = TRAINING_GAPS[i], (1.0, 2.0, 4.0, 1.0)[i]
            yield Distillation(dtype, rows, classes, temperature, gap=gap, reduction="none", **of)
            yield Distillation(dtype, rows, classes, temperature, alpha=0.5, gap=gap, **of)
        yield Distillation(dtype, 0, 10)
        yield Distillation(dtype, 1500, 10, reduction="mean", alpha=0.5, ignored=0.1)
        yield Distillation(dtype, 2000, 10, alpha=0.5, gap=1e-3, weighted=True, ignored=0.5)
        at = 16 // size_of(dtype)  # of 32 bytes
        yield Distillation(dtype, 3, 1024, offset=(at, at, at), inplace=True)
        yield Distillation(dtype, 150, 520, alpha=0.5, offset=(1, 1, 1))  # labels in rows' edges
    # More rows than one block adds up the weights of.
    yield Distillation("float32", 70000, 5, alpha=0.5, ignored=0.3)
    # Rounded products of logit and scale, whose errors one factor mends: in sums, in gradients.
    for classes in (1100, 3001):
        yield Distillation("float16", 3, classes, temperature=8.0, levels=(3e3, -9e3))
        yield Distillation("float16", 3, classes, temperature=1.0, levels=(4e4, -3e4), scale=40.0)
    for scale in (1e5, 1e25):  # beyond what an exponent in one fma holds
        for options in ({}, {"alpha": 0.4, "smoothing": 0.1}, {"values": "masked"}):
            yield Distillation("bfloat16", 3, 3001, scale=scale, **options)
    for dtype, classes in [
        *(("bfloat16", 32000), ("bfloat16", 50257), ("bfloat16", 128256), ("bfloat16", 200000)),
        *(("float32", 32001), ("float32", 128256), ("float32", 200000), ("float16", 151936)),
        *(("float64", 50257), ("float64", 200000)),
    ]:
        yield Distillation(dtype, 2, classes, alpha=0.5, temperature=3.0)
        yield Distillation(dtype, 2, classes, alpha=None, offset=(1, 1, 1))
    yield Distillation("bfloat16", 2, 50257, alpha=0.5, values="training", gap=0.1, inplace=True)
    yield Distillation("float32", 2, 200000, gap=1e-3, reduction="none")


# ---- any divergence -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Divergence(Distillation):
    values: str = "normal"  # also "equal", "excluded", "tied"

    divergence: str = "reverse_kl"
    divergence_alpha: float | None = None
    beta: float | None = None
    kind: str = "logits"
    teachers: int = 1
    teacher_weights: tuple | None = None
    mixture: str = "probs"
    standardize: bool = False
    logit_scale: float = 1.0
    soft_cap: float | None = None
    teacher_logit_scale: float = 1.0
    teacher_soft_cap: float | None = None
    tail: str | None = None  # a top-k teacher
    entries: int = 0
    wide: bool = True  # int64 indices
    entry_gradient: bool = False
    teacher_gradient: bool = False
    statistics: bool = False
    invalid: bool = False  # one row's label, or index, or option
    by_row: tuple = ()  # options that differ from row to row
    slices: int = 0  # of the vocabulary, one pass a launch; 0: all passes in one

    @property
    def needs_logsumexp(self):
        return self.tail != "renormalize" and (self.kind == "logits" or self.temperature != 1)


def blank_divergence_inputs(case, z, labels, weight):
    if case.tail is None:
        return z, [z] * case.teachers, labels, weight, None, None
    values, index = (
        torch.zeros((), dtype=dtype).expand(case.rows, case.entries)
        for dtype in (case.acc, torch.long)
    )
    return z, [values], labels, weight, index, values[:, 0] if case.needs_logsumexp else None


# The options that may differ from row to row, in the order of RowOption, and their range here.
ROW_OPTIONS = {
    "temperature": (0.5, 4.0),
    "alpha": (0.0, 1.0),
    "divergence_alpha": (0.3, 1.0),
    "beta": (0.2, 0.8),
    "logit_scale": (0.5, 2.0),
    "soft_cap": (3.0, 9.0),
    "teacher_logit_scale": (0.5, 2.0),
    "teacher_soft_cap": (3.0, 9.0),
}


def row_options(case):
    """The numbers of case.by_row, [rows] each."""
    return {
        name: torch.linspace(*ROW_OPTIONS[name], case.rows, dtype=torch.float64).to(case.acc)
        for name in case.by_row
    }


def divergence_inputs(case):
    """student, list of teachers (or of values), labels, weight, indices, logsumexp."""
    z, t, labels, weight = distillation_inputs(case)
    if case.values == "blank":
        return blank_divergence_inputs(case, z, labels, weight)
    g = generator(case.classes * 7 + case.entries)
    shape = (case.rows, case.classes)
    if case.values == "equal":
        z[0], t[0] = 0.5, -2.0
    if case.values == "tied":  # the student's first largest logit is the teacher's
        z[:, [1, -1]] = 20.0
        t[:, 1] = 20.0
    if case.values == "excluded":  # what the teacher has
        z[-1, -1] = -math.inf
    teachers = [t.double()]
    for _ in range(case.teachers - 1):
        more = case.scale * torch.randn(shape, generator=g, dtype=torch.float64)
        if case.values == "training" and case.gap < math.inf:
            more = t + case.gap / case.scale * more
        teachers.append(torch.where(t == -math.inf, -math.inf, more))
    if case.kind != "logits":
        teachers = [x.log_softmax(-1) for x in teachers]
    if case.kind == "probs":
        teachers = [x.exp() for x in teachers]
    if case.tail is None:
        return z, [x.to(case.torch_dtype) for x in teachers], labels, weight, None, None
    values, index = teachers[0].topk(case.entries, -1)
    shuffled = torch.rand(index.shape, generator=g).argsort(-1)
    values, index = values.gather(-1, shuffled), index.gather(-1, shuffled)
    logsumexp = None
    if case.needs_logsumexp:
        logsumexp = (teachers[0] / case.temperature).logsumexp(-1).to(case.acc)
    if case.values != "training":
        index[torch.rand(index.shape, generator=g) < 0.2] = -1
        index[0] = -1  # a row without an entry
    return z, [values.to(case.acc)], labels, weight, index, logsumexp


# Fields of math::RowState, in its order, by how slices of a vocabulary are put together.
MAXIMA, BEST = slice(6, 10), slice(10, 12)
STAGES = {1: slice(0, 6), 2: slice(6, 12), 4: slice(12, 22), 8: slice(22, 33), 16: slice(0, 0)}


def together(states, stage, entries):
    """After a pass over each slice: what all of them then hold."""
    fields = STAGES[stage]
    joined = states[0].clone()
    joined[fields] = sum(state[fields] for state in states)
    if stage == 2:
        maxima = torch.stack([state[MAXIMA] for state in states])
        joined[MAXIMA] = maxima.amax(0)
        first = maxima[:, 2:4] if entries else maxima[:, 0:2]
        best = torch.stack([state[BEST] for state in states])
        joined[BEST] = best.gather(0, first.argmax(0, keepdim=True))[0]
    for state in states:
        state.copy_(joined)


def divergence_launch(device, case):
    z, teachers, labels, weight, index, logsumexp = divergence_inputs(case)
    lib, dtype, rows, classes = device.lib, case.torch_dtype, case.rows, case.classes
    if case.invalid and not case.by_row:
        labels, index = (None if x is None else x.clone() for x in (labels, index))
        (labels if index is None else index[:, 0])[1] = classes
    student = device.put(padded(z, case.pad[0]), case.offset[0], "student")
    if case.tail is None:
        data = [padded(t, case.pad[1]) for t in teachers]
        data = [device.put(t, case.offset[1], f"teacher {i}") for i, t in enumerate(data)]
    else:
        data = [device.put(teachers[0], name="values")]
    gradient = entry_gradient = teacher_gradient = None
    if case.entry_gradient:
        entry_gradient = device.new((rows, case.entries), dtype, name="entry gradient")
    elif case.gradient:
        shape = (rows, classes + case.pad[2])
        gradient = student if case.inplace else device.new(shape, dtype, case.offset[2], "gradient")
    if case.teacher_gradient:
        shape = (rows, classes + case.pad[1])
        teacher_gradient = device.new(shape, dtype, case.offset[1], "teacher gradient")
    labels = None if labels is None else device.put(labels, name="labels")
    weight = None if weight is None else device.put(weight, name="weight")
    if index is not None:
        index = device.put(index if case.wide else index.int(), name="indices")
    logsumexp = None if logsumexp is None else device.put(logsumexp, name="logsumexp")
    none = case.reduction == "none"
    row_loss = device.new((rows,), case.acc, name="row_loss") if none else None
    loss = None if none else device.new((1,), case.acc, name="loss")
    statistics = None
    if case.statistics:
        statistics = device.new((lib.statistics, rows), case.acc, name="statistics")
    counted = case.reduction == "mean" and (labels is not None or weight is not None)
    default = reference.divergence_parameters(case.divergence, case.divergence_alpha, case.beta)
    p = fill(
        lib.LossParams(),
        dtype=getattr(lib.Dtype, case.dtype),
        rows=rows,
        labels=address(labels),
        weight=address(weight),
        row_loss=address(row_loss),
        loss=address(loss),
        student_rows=classes + case.pad[0],
        gradient_rows=classes + case.pad[0 if case.inplace else 2],
        temperature=case.temperature,
        alpha=1.0 if case.alpha is None else case.alpha,
        label_smoothing=case.smoothing,
        ignore_index=-100,
        denominator=denominator(lib, case, counted),
        gradient_scale=1.0,
        divergence=getattr(lib.Divergence, case.divergence),
        divergence_alpha=default.get("divergence_alpha", 0.0),
        beta=default.get("beta", 0.0),
        logit_scale=case.logit_scale,
        soft_cap=case.soft_cap or 0.0,
        teacher_logit_scale=case.teacher_logit_scale,
        teacher_soft_cap=case.teacher_soft_cap or 0.0,
        standardize=case.standardize,
        probs=case.kind == "probs",
        log_mix=case.mixture == "log_probs",
        teacher_gradient_rows=classes + case.pad[1],
        statistics=address(statistics),
        tail=getattr(lib.Tail, case.tail or "none"),
        entries=case.entries,
        indices=address(index),
        wide_indices=case.wide,
        teacher_logsumexp=address(logsumexp),
        entry_gradient=address(entry_gradient),
        all_classes=classes,
        stages=31,
    )
    numbers = {}
    for name, of_rows in row_options(case).items():
        if case.invalid:
            of_rows[1] = -1.0
        numbers[name] = device.put(of_rows, name=name)
        p.set_row_option([*ROW_OPTIONS].index(name), address(numbers[name]))
    strides = [classes + case.pad[1] if case.tail is None else case.entries] * len(data)
    shares = torch.tensor(case.teacher_weights or [1.0] * len(data), dtype=torch.float64)
    shares = (shares / shares.sum()).tolist()
    cuts = [classes * i // max(1, case.slices) for i in range(max(1, case.slices) + 1)]
    states = []
    for _ in range(case.slices):
        states.append(device.new((lib.row_state, rows), torch.float64, name="state"))
    for stage in STAGES if case.slices else (31,):
        for i, begin in enumerate(cuts[:-1]):
            here = [0 if begin == 0 else begin * z.element_size()] * 3
            # A launch of its own: nothing of the last is left in the workspace.
            size = max(1, lib.loss_workspace(rows))
            workspace = device.new((size,), torch.float64, name="workspace")
            fill(
                p,
                workspace=address(workspace),
                classes=cuts[i + 1] - begin,
                first_class=begin,
                student=address(student) + here[0],
                gradient=address(gradient) + here[1] if gradient is not None else 0,
                teacher_gradient=address(teacher_gradient) + here[2]
                if case.teacher_gradient
                else 0,
                state=address(states[i]) if case.slices else 0,
                stages=stage,
            )
            at = [address(t) + (here[0] if case.tail is None else 0) for t in data]
            p.set_teachers(at, strides, shares)
            lib.loss(p, device.stream)
        if case.slices:
            together(states, stage, case.tail is not None)
    return cpu(
        loss=loss if loss is not None else row_loss,
        gradient=gradient if entry_gradient is None else entry_gradient,
        teacher_gradient=teacher_gradient,
        statistics=statistics,
    )


def divergence_expected(case):
    z, teachers, labels, weight, index, logsumexp = divergence_inputs(case)
    z = z.double().requires_grad_()
    teachers = [t.double().requires_grad_(case.teacher_gradient) for t in teachers]
    options = {
        "temperature": case.temperature,
        "divergence": case.divergence,
        "beta": case.beta,
        "teacher_kind": case.kind,
        "logit_scale": case.logit_scale,
        "soft_cap": case.soft_cap,
        "weight": None if weight is None else weight.double(),
        "reduction": case.reduction,
        "return_statistics": True,
    }
    if labels is not None:
        options |= {"alpha": case.alpha, "label_smoothing": case.smoothing}
    by_row = {name: numbers.double() for name, numbers in row_options(case).items()}
    if case.tail is None:
        options |= {
            "divergence_alpha": case.divergence_alpha,
            "standardize": case.standardize,
            "teacher_logit_scale": case.teacher_logit_scale,
            "teacher_soft_cap": case.teacher_soft_cap,
            "teacher_weights": case.teacher_weights,
            "teacher_mixture": case.mixture,
        }
        loss, statistics = reference.distillation_loss(z, teachers, labels, **options | by_row)
    else:
        loss, statistics = reference.topk_distillation_loss(
            z,
            teachers[0],
            index,
            labels,
            tail=case.tail,
            teacher_logsumexp=None if logsumexp is None else logsumexp.double(),
            **options | by_row,
        )
    wanted = [z, teachers[0]] if case.teacher_gradient else [z]
    gradient, *of_teacher = torch.autograd.grad(loss.sum(), wanted, materialize_grads=True)
    if case.entry_gradient:
        gradient = torch.where(index < 0, 0.0, gradient.gather(-1, index.clamp(min=0)))
    out = {"loss": loss.detach().reshape(-1), "gradient": gradient}
    if of_teacher:
        out["teacher_gradient"] = of_teacher[0]
    if case.statistics:
        out["statistics"] = torch.stack(statistics)
    if case.invalid:
        out["loss"][1], out["gradient"][1] = math.nan, 0.0
        if case.statistics:
            out["statistics"][:, 1] = math.nan
    return out


def divergence_compare(case, got, want):
    exact = case.dtype == "float64"
    share = rows_shares(case)
    largest = share.max().item() if case.rows else 0.0
    total = largest if case.reduction == "none" else share.sum().item()
    # alpha and beta of DKD are factors; those of ABKD divide, by as much as they lessen.
    factor = 9.0 if case.divergence == "decoupled" else 1.0
    near = case.gap < math.inf and case.alpha in (None, 1.0)
    torch.testing.assert_close(
        got["loss"].double(),
        want["loss"],
        rtol=1e-4 if near else 1e-11 if exact else 2e-6,
        atol=0 if near else (1e-13 if exact else 1e-6) * factor * case.temperature**2 * total,
        equal_nan=True,
    )
    if case.statistics:
        torch.testing.assert_close(
            got["statistics"].double(),
            want["statistics"],
            rtol=1e-11 if exact else 4e-6,
            atol=1e-12 if exact else 4e-6,
            equal_nan=True,
        )
    scale = max(1.0, largest * max(case.temperature, 1.0)) * factor * max(1.0, case.logit_scale)
    atol = (1e-13 if exact else 2e-6) * scale
    for name, pad in (("gradient", 0 if case.inplace else 2), ("teacher_gradient", 1)):
        if name not in got:
            continue
        values = got[name]
        if case.pad[pad] and not case.entry_gradient:
            outside = values[:, case.classes :]
            assert outside.isnan().all(), "the padding between rows was written"
            values = values[:, : case.classes]
        if case.dtype == "float16":
            atol += 2.0**-24
        rtol = 1.001 * HALF_ULP.get(case.torch_dtype, 0.0)
        if near:
            capped = case.soft_cap or case.teacher_soft_cap  # a cap rounds logits once more
            atol = (3e-4 if capped else 1e-4) * want[name].abs().max().item()
            if case.divergence in ("forward_kl", "reverse_kl"):
                atol += 1e-7 * scale  # an error of the sums' ratio moves all of a row's gradient
        if name == "teacher_gradient" and case.kind == "probs":  # over p
            rtol += 1e-12 if exact else 2e-5
        torch.testing.assert_close(
            values.double(), want[name], rtol=rtol, atol=atol, equal_nan=True
        )


def divergence_bytes(case):
    """Each tensor once, of rows that do not count the gradients alone; of a renormalised top-k
    teacher without cross-entropy, only the entries.
    """
    size, acc = size_of(case.dtype), 8 if case.dtype == "float64" else 4
    matrix = case.counting_rows * case.classes * size
    gradients = (case.gradient and not case.entry_gradient) + case.teacher_gradient
    out = gradients * case.rows * case.classes * size
    if case.tail is None:
        return (1 + case.teachers) * matrix + out
    entry = acc + (8 if case.wide else 4) + size * case.entry_gradient
    read = case.tail != "renormalize" or case.alpha is not None
    return case.rows * case.entries * (entry + (0 if read else size)) + read * matrix + out


DIVERGENCES = tuple(reference.DIVERGENCES)


def divergence_cases():
    # A warp a row to a row of many chunks; what shared memory holds differs between generations.
    sizes = (1, 2, 3, 7, 8, 10, 17, 33, 255, 512, 513, 1000, 1025, 2049, 5000, 9001)
    hard = {"alpha": 0.3}
    for d, dtype in enumerate(DTYPES):
        for i, classes in enumerate(sizes):
            name = DIVERGENCES[(i + d) % len(DIVERGENCES)]
            yield Divergence(dtype, 3, classes, divergence=name, **hard, statistics=True)
        for i, name in enumerate(DIVERGENCES):
            of = {"divergence": name, "alpha": 0.3 if name == "decoupled" or i % 2 else None}
            yield Divergence(dtype, 3, 100 + i, **of)
            yield Divergence(dtype, 3, 700 - i, **of, statistics=True, teacher_gradient=True)
        few = {"classes": 130, "dtype": dtype}
        by_row = {"rows": 5, **few, **hard, "temperature": 4.0}
        yield Divergence(**by_row, by_row=("temperature", "alpha"), divergence="forward_kl")
        yield Divergence(
            **by_row,
            by_row=("temperature", "beta", "soft_cap", "logit_scale"),
            divergence="js",
            statistics=True,
            teacher_gradient=True,
        )
        yield Divergence(
            **by_row,
            by_row=("divergence_alpha", "beta", "teacher_soft_cap", "teacher_logit_scale"),
            divergence="alpha_beta" if d % 2 else "decoupled",
            standardize=True,
        )
        yield Divergence(**by_row, by_row=("temperature",), invalid=True, reduction="none")
        top = {"tail": "renormalize", "entries": 7}
        yield Divergence(**by_row, by_row=("temperature", "alpha"), **top, inplace=True)
        for i, name in enumerate(DIVERGENCES):
            if i % 4 != d:  # the options, over divergences that take turns
                continue
            of = few | {"divergence": name, **hard}
            yield Divergence(rows=7, **of, ignored=0.3, smoothing=0.1)
            yield Divergence(rows=5, **of, weighted=True, reduction="none", kind="log_probs")
            yield Divergence(rows=5, **of, kind="probs", teacher_gradient=True, temperature=3.0)
            yield Divergence(rows=5, **of, standardize=True, teacher_gradient=True, statistics=True)
            caps = {"logit_scale": 0.7, "soft_cap": 5.0}
            yield Divergence(rows=5, **of, **caps, smoothing=0.2, teacher_soft_cap=4.0)
            yield Divergence(
                rows=3,
                **of,
                **caps,
                standardize=True,
                teacher_gradient=True,
                teacher_logit_scale=1.5,
                inplace=True,
            )
            yield Divergence(rows=3, **of, teachers=3, statistics=True)
            yield Divergence(
                rows=3,
                **of,
                teachers=3,
                teacher_weights=(0.2, 0.0, 3.0),
                mixture="log_probs",
                standardize=True,
                statistics=True,
            )
            yield Divergence(rows=3, **of, teachers=8, kind="probs", temperature=1.0)
            yield Divergence(rows=3, **of, teachers=2, values="masked", teacher_soft_cap=9.0)
            yield Divergence(rows=5, **of, values="masked", teacher_gradient=True, statistics=True)
            yield Divergence(rows=3, **of, values="nan", reduction="none", statistics=True)
            yield Divergence(
                rows=3, **of, values="equal", reduction="none", standardize=True, statistics=True
            )
            yield Divergence(rows=3, **of, values="excluded", reduction="none")
            yield Divergence(rows=5, **of, offset=(1, 1, 1), pad=(5, 5, 5), teacher_gradient=True)
            yield Divergence(rows=5, **of, offset=(0, 1, 2), pad=(3, 0, 1))
            yield Divergence(rows=5, **of, offset=(1, 2, 0), pad=(8, 16, 24), inplace=True)
            yield Divergence(rows=5, **of, invalid=True, reduction="none")
            yield Divergence(rows=5, **of, slices=1, statistics=True, ignored=0.3)
            yield Divergence(
                rows=3,
                **of,
                slices=3,
                statistics=True,
                smoothing=0.1,
                standardize=True,
                teacher_gradient=True,
                weighted=True,
            )
            yield Divergence(rows=3, **of, slices=2, soft_cap=3.0, inplace=True)
            yield Divergence(rows=3, **(of | {"alpha": 0.0}), smoothing=0.1)
            yield Divergence(rows=3, **(of | {"alpha": 0.0}), statistics=True)
            yield Divergence(rows=3, **of, gradient=False, statistics=True)
            yield Divergence(rows=3, **of, scale=40.0)
        for i, name in enumerate(DIVERGENCES[:-1]):
            for gap in (1e-2, 1e-4) if dtype in ("float32", "float64") else (0.3,):
                of = {"divergence": name, "gap": gap, "reduction": "none"}
                yield Divergence(dtype, 2, 1000 + 100 * i, **of)
        for i, name in enumerate(DIVERGENCES):
            yield Divergence(
                dtype,
                4,
                (10, 100, 1000)[i % 3],
                (1.0, 2.0, 4.0)[(i + d) % 3],
                divergence=name,
                alpha=1.0 if name == "decoupled" else None,
                values="training",
                prompts=0.5,
                gap=TRAINING_GAPS[(i + d) % 4],
                statistics=True,
                reduction="none",
            )
        # Reverse KL of whole rows has the walks of forward KL.
        reverse = {"divergence": "reverse_kl", "reduction": "none"}
        for classes in (10, 100, 700, 1100, 3001, 20000):
            yield Divergence(dtype, 5, classes, **reverse, weighted=True, gap=0.05)
            yield Divergence(dtype, 5, classes, divergence="reverse_kl", **hard, smoothing=0.1)
            yield Divergence(
                dtype, 3, classes, divergence="reverse_kl", offset=(1, 2, 0), inplace=True
            )
            yield Divergence(dtype, 3, classes, **reverse, values="masked", temperature=1.0, **hard)
            yield Divergence(dtype, 3, classes, **reverse, gradient=False)
        # What logits are turned into, and statistics, by every walk.
        turned = (
            {"logit_scale": 0.7, "teacher_logit_scale": 1.5},
            {"soft_cap": 5.0, "teacher_soft_cap": 4.0, "statistics": True},
            {"kind": "probs", "logit_scale": 2.0},
            {"statistics": True, "prompts": 0.3, "values": "training", "gap": 0.1},
        )
        walks = ("forward_kl", "reverse_kl", "js", "total_variation")
        for i, classes in enumerate((10, 100, 700, 1100, 3001, 20000)):
            for k, options in enumerate(turned):
                of = {"divergence": walks[(i + k + d) % 4], "reduction": "none"} | options
                yield Divergence(dtype, 5, classes, **of, **hard, weighted=True, smoothing=0.1)
                of = {"values": "masked"} | of
                yield Divergence(
                    dtype, 3, classes, **of, offset=(1, 2, 0), inplace=True, temperature=1.0
                )
                yield Divergence(dtype, 3, classes, **of, gradient=False, invalid=True, **hard)
        for classes in (11, 600, 1301):
            yield Divergence(dtype, 3, classes, **reverse, values="tied", statistics=True)
        yield Divergence(
            dtype, 3, 1100, **reverse, temperature=8.0, levels=(3e3, -9e3), statistics=True
        )
        yield Divergence(dtype, 3, 1100, **reverse, temperature=8.0, levels=(3e3, -9e3))
        yield Divergence(dtype, 0, 10)
        yield Divergence(dtype, 700, 10, **hard, ignored=0.1)
        yield from top_k_cases(dtype)
    # Rounded products, whose errors would be felt in D: differences of the logits are exact.
    yield Divergence("float16", 3, 1100, **reverse, temperature=1.0, levels=(-3e4, -3e4))
    for name, beta in (("js", 0.1), ("skew_forward_kl", 0.9), ("skew_reverse_kl", 0.0)):
        yield Divergence("float32", 3, 300, divergence=name, beta=beta)
    for alpha, beta in ((0.0, 0.5), (1.0, 0.0), (2.0, 1.5)):
        yield Divergence(
            "float32", 3, 300, divergence="alpha_beta", divergence_alpha=alpha, beta=beta
        )
    decoupled = {"divergence": "decoupled", "divergence_alpha": 2.0}
    yield Divergence("float32", 3, 300, **decoupled, beta=0.0, **hard)
    yield Divergence("bfloat16", 2, 32000, statistics=True)
    yield Divergence("bfloat16", 2, 50257, divergence="js", alpha=0.5, inplace=True)
    yield Divergence("float16", 1, 128256, **decoupled, alpha=0.5, offset=(1, 1, 1))
    yield Divergence("bfloat16", 1, 200000, divergence="total_variation", soft_cap=30.0)
    yield Divergence("float32", 1, 40000, teachers=2, standardize=True)
    yield Divergence("float32", 1, 200000, divergence="skew_forward_kl", slices=2)
    yield Divergence("float32", 2, 300000, divergence="reverse_kl", soft_cap=9.0, statistics=True)
    yield Divergence("float64", 1, 60000, divergence="alpha_beta")
    # More rows than blocks, each with options of its own.
    yield Divergence("float32", 16390, 3, by_row=("temperature",), reduction="none")
    # So near that D feels the rounding of both sums, by every walk.
    for name, gap in (("total_variation", 1e-5), ("alpha_beta", 1e-4)):
        of = {"divergence": name, "gap": gap, "reduction": "none"}
        for rows, classes in ((40, 9), (20, 90), (9, 610), (6, 1610), (3, 60001)):
            yield Divergence("float32", rows, classes, **of)


def top_k_cases(dtype):
    hard = {"alpha": 0.4}
    names = ("forward_kl", "reverse_kl", "js")
    tails = ("renormalize", "bucket", "ignore")
    for i, (name, tail) in enumerate((n, t) for n in names for t in tails):
        of = {"divergence": name, "tail": tail, "wide": i % 2 == 0, "dtype": dtype}
        yield Divergence(rows=4, classes=300 + i, entries=7, **of, statistics=True)
        yield Divergence(rows=4, classes=90, entries=64, **of, **hard, smoothing=0.1, soft_cap=8.0)
        yield Divergence(rows=3, classes=120, entries=5, **of, **hard, kind="log_probs", slices=3)
    for i, tail in enumerate(tails):
        of = {"divergence": names[i], "tail": tail, "dtype": dtype}
        yield Divergence(rows=3, classes=1, entries=1, **of)
        yield Divergence(rows=3, classes=50, entries=50, **of, statistics=True)
        yield Divergence(rows=3, classes=3000, entries=1024, **of, inplace=True)
        yield Divergence(rows=5, classes=200, entries=9, **of, entry_gradient=True)
        yield Divergence(rows=5, classes=200, entries=9, **of, invalid=True, reduction="none")
        yield Divergence(
            rows=4,
            classes=333,
            entries=40,
            **of,
            **hard,
            ignored=0.3,
            offset=(1, 0, 2),
            pad=(3, 0, 2),
        )
        yield Divergence(rows=1 if dtype == "float64" else 2, classes=50257, entries=64, **of)
        yield Divergence(rows=3, classes=200, entries=9, **of, **hard, values="nan")


# ---- scaling of a gradient ----------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    dtype: str
    rows: int
    classes: int
    per_row: bool = True
    factor: float | None = None  # of the rows, but for one in `sparse`
    sparse: int = 2**63 - 1
    pad: int = 0


def scale_inputs(case):
    g = generator(case.rows + case.classes)
    acc = torch.float64 if case.dtype == "float64" else torch.float32
    data = torch.randn((case.rows, case.classes), generator=g).to(getattr(torch, case.dtype))
    factor = torch.randn(case.rows if case.per_row else 1, generator=g).to(acc)
    if case.factor is not None:
        factor[torch.arange(len(factor)) % case.sparse != case.sparse - 1] = case.factor
    return data, factor


def scale_launch(device, case):
    data, factor = scale_inputs(case)
    data, factor = device.put(padded(data, case.pad)), device.put(factor)
    p = fill(
        device.lib.ScaleParams(),
        dtype=getattr(device.lib.Dtype, case.dtype),
        data=address(data),
        rows=case.rows,
        classes=case.classes,
        strides=case.classes + case.pad,
        factor=address(factor),
        per_row=case.per_row,
    )
    device.lib.scale_rows(p, device.stream)
    return cpu(data=data)


def scale_expected(case):
    data, factor = scale_inputs(case)
    return {"data": padded((data * factor[:, None]).to(data.dtype), case.pad)}


def equal(case, got, want):
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=0, equal_nan=True)


def scale_cases():
    for dtype in DTYPES:
        yield Scale(dtype, 3, 1000)
        yield Scale(dtype, 5, 33, per_row=False, pad=3)
        yield Scale(dtype, 2, 40000, per_row=False, factor=1.0)
    # More rows than a launch may have blocks in y.
    yield Scale("bfloat16", 70000, 3, factor=1.0, sparse=1000)


# ---- noise --------------------------------------------------------------------------------------

# In the order of math::Distribution, NoiseMode and math::Update, as the ops number them.
DISTRIBUTIONS = ("normal", "uniform", "rademacher", "truncated_normal", "laplace")
MODES = ("only", "add", "scale", "times")
UPDATES = ("sgd", "adamw", "sgld", "psgld")


@dataclass(frozen=True)
class Noise:
    dtype: str
    sizes: tuple
    mode: str = "add"
    distribution: str = "normal"
    inplace: bool = True
    offsets: tuple = (0,)  # global index of the first element, cycled over the list
    misalign: tuple = (0,)  # elements past 256 aligned bytes, cycled
    std: float = 0.5
    pattern: tuple | None = None  # (size, inner) of one tensor's stds
    step: int = 7
    on_device: bool = False  # step and std in device memory
    norms: bool = False
    runs: int = 1  # neighbours of the list that are one tensor
    terms: int = 8  # of a sum of noises
    seed: int = 0x123456789ABCDEF

    @property
    def torch_dtype(self):
        return getattr(torch, self.dtype)

    @property
    def acc(self):
        return torch.float64 if self.dtype == "float64" else torch.float32

    @property
    def indices(self):
        return -(-len(self.sizes) // self.runs)

    def offset(self, i):
        return self.offsets[i % len(self.offsets)]


def noise_inputs(case):
    g = generator(len(case.sizes))
    return [torch.randn(n, generator=g).to(case.torch_dtype) for n in case.sizes]


def noise_stds(case):
    """acc [indices, size], or None where all tensors have the case's own."""
    if case.pattern is not None:
        g = generator(case.pattern[0])
        return torch.rand((case.indices, case.pattern[0]), generator=g).to(case.acc)
    each = case.std * (1 + torch.arange(case.indices).to(case.acc)).view(-1, 1)
    return each if case.on_device else None


def noise_source(device, case):
    """The struct; what it points to must live as long: it is in the second."""
    on_device = device.put(torch.tensor([case.step])) if case.on_device else None
    source = fill(
        device.lib.NoiseSource(),
        distribution=getattr(device.lib.Distribution, case.distribution),
        seed_low=case.seed & 0xFFFFFFFF,
        seed_high=case.seed >> 32,
        step=0 if case.on_device else case.step,
        device_step=address(on_device),
    )
    return source, on_device


def noise_tensors(device, case, inputs, outputs):
    """The runs of a list, those that have elements."""
    return [
        fill(
            device.lib.NoiseTensor(),
            **{"out": address(outputs[i]), "in": address(inputs[i])},
            numel=case.sizes[i],
            std=case.std,
            offset=case.offset(i),
            stream=i,
            index=i // case.runs,
        )
        for i in range(len(case.sizes))
        if case.sizes[i] > 0
    ]


def workspace_of(device, size):
    return device.new((max(1, size),), torch.float64, name="workspace")


def noise_launch(device, case):
    inputs, outputs = [], []
    for i, x in enumerate(noise_inputs(case)):
        misalign = case.misalign[i % len(case.misalign)]
        inputs.append(None if case.mode == "only" else device.put(x, misalign))
        inplace = case.inplace and case.mode != "only"
        outputs.append(inputs[i] if inplace else device.new(x.shape, x.dtype, misalign))
    source, kept = noise_source(device, case)
    stds = noise_stds(case)
    stds = None if stds is None else device.put(stds, name="stds")
    norms = device.new((case.indices, 2), torch.float64, name="norms") if case.norms else None
    tensors = noise_tensors(device, case, inputs, outputs)
    size, inner = case.pattern or (1, 1)
    p = fill(
        device.lib.NoiseParams(),
        dtype=getattr(device.lib.Dtype, case.dtype),
        mode=getattr(device.lib.NoiseMode, case.mode),
        source=source,
        stds=address(stds),
        std_size=size,
        std_inner=inner,
        norms=address(norms),
        indices=case.indices,
        count=len(tensors),
    )
    workspace = workspace_of(device, device.lib.noise_workspace(p))
    p.workspace = address(workspace)
    device.lib.noise(p, tensors, device.stream)
    return cpu(norms=norms, **{str(i): out for i, out in enumerate(outputs)})


def cpu_noise(case, i, x, mode, std, std_tensor=None):
    """The CPU op on tensor i of the list."""
    noise = [case.seed, case.step, DISTRIBUTIONS.index(case.distribution), 1, 1, i, case.offset(i)]
    return torch.ops.kdkernels._noise(x, MODES.index(mode), std_tensor, std, noise, [])


def noise_numbers(case, i):
    """eps of tensor i of the list, fp64."""
    like = torch.empty(case.sizes[i], dtype=torch.float32)
    return cpu_noise(case, i, like, "only", 1.0).double()


def noise_expected(case):
    outs, norms = {}, torch.zeros(case.indices, 2, dtype=torch.float64)
    stds = noise_stds(case)
    for i, x in enumerate(noise_inputs(case)):
        std = torch.full_like(x, case.std, dtype=case.acc)
        if stds is not None:
            size, inner = case.pattern or (1, 1)
            std = stds[i // case.runs][torch.arange(x.numel()) // inner % size]
        outs[str(i)] = cpu_noise(case, i, x, case.mode, 0.0, std)
        if case.norms:
            noise = std.double() * noise_numbers(case, i)
            squares = [x.double().square().sum(), noise.square().sum()]
            norms[i // case.runs] += torch.stack(squares)
    return outs | ({"norms": norms} if case.norms else {})


def equal_but_norms(case, got, want):
    assert got.keys() == want.keys()
    if "norms" in want:
        torch.testing.assert_close(got["norms"], want["norms"], rtol=1e-6, atol=1e-12)
    equal(case, got, {name: value for name, value in want.items() if name != "norms"})


def noise_cases():
    sizes = (1000003, 0, 1, 3, 4, 5, 7, 8, 1024, 8191)
    for dtype in DTYPES:
        # A chunk of several steps, between which the counter's high word changes.
        yield Noise(dtype, sizes, offsets=(2**34 - 400_000,))
        yield Noise(dtype, sizes[1:], misalign=(1, 2, 3, 5))
        yield Noise(dtype, (4097, 70000), offsets=(1, 2, 3), misalign=(0, 3, 1))
        yield Noise(dtype, (30001, 16), offsets=(2**34 - 5, 2**40 + 3), mode="only", std=1.0)
        yield Noise(dtype, (5000, 12), on_device=True, step=3_000_000_000, inplace=False)
        yield Noise(dtype, tuple(range(1, 97)), misalign=(0, 1))
        for i, distribution in enumerate(DISTRIBUTIONS):
            of = {"distribution": distribution}
            for mode in MODES:
                yield Noise(dtype, (4099, 0, 3000), mode, **of, misalign=(0, 3), offsets=(4, 1, 2))
            yield Noise(dtype, (9000, 2), MODES[i % 4], **of, offsets=(2**34 - 4000,), step=2**31)
            yield Noise(dtype, (6001, 70), **of, norms=True, misalign=(i,), on_device=i % 2 == 0)
        for size, inner, numel in (
            *((7, 1, 5000), (4096, 1, 20000), (64, 49, 64 * 49 * 3), (3, 5000, 40001)),
            *((5003, 1, 5003), (6000, 1, 6000), (1000, 3, 6000), (5, 4, 4099)),
        ):
            mode = MODES[size % 4]
            yield Noise(dtype, (numel,), mode, pattern=(size, inner), misalign=(size % 3,))
        yield Noise(dtype, (4096,), "add", "laplace", pattern=(4096, 1), inplace=False)
        yield Noise(dtype, (5000, 0, 301, 2, 9000), norms=True, runs=2, offsets=(7,))
    # Chunks of several steps, whose stds go on where the last step's ended.
    yield Noise("float32", (600_007,), "add", pattern=(1000, 3), inplace=False)
    yield Noise("float32", tuple(17 + i % 50 for i in range(760)), offsets=(0, 1, 4))
    many = tuple(17 + i % 50 for i in range(1300))
    yield Noise("float32", many, offsets=(0, 1, 4), norms=True, runs=3, distribution="uniform")


# ---- the dot product with noise -----------------------------------------------------------------


def noise_dot_launch(device, case):
    inputs = [
        device.put(x, case.misalign[i % len(case.misalign)])
        for i, x in enumerate(noise_inputs(case))
    ]
    result = device.new((case.indices,), torch.float64)
    source, kept = noise_source(device, case)
    tensors = noise_tensors(device, case, inputs, [None] * len(inputs))
    p = fill(
        device.lib.NoiseDotParams(),
        dtype=getattr(device.lib.Dtype, case.dtype),
        source=source,
        result=address(result),
        indices=case.indices,
        count=len(tensors),
    )
    workspace = workspace_of(device, device.lib.noise_dot_workspace(p))
    p.workspace = address(workspace)
    device.lib.noise_dot(p, tensors, device.stream)
    return cpu(result=result)


def noise_dot_terms(case):
    """Sums of terms and of their magnitudes, [2, indices]."""
    sums = torch.zeros(2, case.indices, dtype=torch.float64)
    for i, x in enumerate(noise_inputs(case)):
        terms = x.double() * noise_numbers(case, i)
        sums[:, i // case.runs] += torch.stack([terms.sum(), terms.abs().sum()])
    return sums


def noise_dot_expected(case):
    sums, scale = noise_dot_terms(case)
    return {"result": sums, "scale": scale}


def noise_dot_compare(case, got, want):
    error = (got["result"] - want["result"]).abs()
    assert (error <= (1e-14 if case.dtype == "float64" else 1e-7) * want["scale"]).all()


def noise_dot_cases():
    for dtype in DTYPES:
        yield Noise(dtype, (1000003,))
        for size in (0, 1, 5, 4096):
            yield Noise(dtype, (size,), offsets=(3,), misalign=(1,))
        for i, distribution in enumerate(DISTRIBUTIONS):
            yield Noise(dtype, (6001, 0, 17, 2048), distribution=distribution, misalign=(0, i))
        yield Noise(dtype, (9000, 5, 800), runs=2, offsets=(2**34 - 4000, 1), on_device=True)
    yield Noise("float32", tuple(17 + i % 50 for i in range(1300)), runs=5)


# ---- sums of several noises ---------------------------------------------------------------------


def combine_terms(case):
    g = generator(case.terms)
    seeds = torch.randint(-(2**63), 2**63 - 1, (case.terms,), generator=g)
    return seeds, torch.randn(case.terms, generator=g, dtype=torch.float64)


def combine_launch(device, case):
    outputs = [
        device.put(x, case.misalign[i % len(case.misalign)])
        for i, x in enumerate(noise_inputs(case))
    ]
    seeds, coefficients = (device.put(x) for x in combine_terms(case))
    source, kept = noise_source(device, case)
    p = fill(
        device.lib.CombineParams(),
        dtype=getattr(device.lib.Dtype, case.dtype),
        source=source,
        seeds=address(seeds),
        coefficients=address(coefficients),
        terms=case.terms,
    )
    tensors = noise_tensors(device, case, [None] * len(outputs), outputs)
    device.lib.combine(p, tensors, device.stream)
    return cpu(**{str(i): out for i, out in enumerate(outputs)})


def combine_expected(case):
    outs = noise_inputs(case)
    seeds, coefficients = combine_terms(case)
    count = len(outs)
    noise = [0, case.step, DISTRIBUTIONS.index(case.distribution), 1, count, 0]
    noise += [case.offset(i) for i in range(count)]
    torch.ops.kdkernels.combine_noise_(outs, coefficients, seeds, noise, [])
    return {str(i): out for i, out in enumerate(outs)}


def combine_cases():
    for dtype in DTYPES:
        for i, distribution in enumerate(DISTRIBUTIONS):
            of = {"distribution": distribution, "misalign": (0, i)}
            yield Noise(dtype, (4099, 0, 300), terms=(1, 3, 16)[i % 3], **of, offsets=(0, 3, 4))
        yield Noise(dtype, (3001, 9), terms=37, offsets=(2**34 - 1600,), on_device=True)
        yield Noise(dtype, (100,), terms=0)
    yield Noise("float32", tuple(17 + i % 50 for i in range(700)), terms=2)


# ---- optimizer steps ----------------------------------------------------------------------------

RULE = (
    *("lr", "std", "weight_decay", "momentum", "dampening", "beta1", "beta2", "eps", "num_data"),
    *("temperature", "nesterov", "maximize", "stochastic_rounding"),
)
BASE_RULE = dict.fromkeys(RULE, 0.0) | {"nesterov": False, "maximize": False, "lr": 0.02}
BASE_RULE["stochastic_rounding"] = False
RULES = {
    "sgd": [
        {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01},
        {"maximize": True},
        {"momentum": 0.8, "nesterov": True},
    ],
    "adamw": [
        {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01},
        {"beta1": 0.4, "beta2": 0.95, "eps": 1e-6, "maximize": True},
    ],
    "sgld": [
        {"num_data": 50.0, "temperature": 1.0, "weight_decay": 0.1},
        {"num_data": 7.0, "temperature": 0.0, "maximize": True},
    ],
    "psgld": [
        {"num_data": 50.0, "temperature": 1.0, "beta2": 0.99, "eps": 1e-5},
        {"num_data": 7.0, "temperature": 0.1, "beta2": 0.9, "eps": 1e-3, "weight_decay": 0.1},
    ],
}


@dataclass(frozen=True)
class Update(Noise):
    update: str = "adamw"
    first_step: int = 3  # the parameters' own count
    steps_differ: bool = False
    many_rules: bool = False  # each tensor has its own lr
    device: tuple = ()  # of "step", "lr", "std": what is in device memory
    grad_scale: float | None = None
    found_inf: float | None = None
    rounding: bool = False

    @property
    def rules(self):
        base = BASE_RULE | {"std": self.std, "stochastic_rounding": self.rounding}
        rules = [base | rule for rule in RULES[self.update]]
        if self.many_rules:
            count = len(self.sizes)
            rules = [rules[i % len(rules)] | {"lr": 0.01 + 0.001 * i} for i in range(count)]
        return rules

    def rule_of(self, i):
        return i // self.runs % len(self.rules)

    def steps(self):
        return [
            self.first_step + (i % 3 if self.steps_differ else 0) for i in range(len(self.sizes))
        ]

    def has_first(self, i):
        momentum = self.update == "sgd" and self.rules[self.rule_of(i)]["momentum"] > 0
        return self.update == "adamw" or momentum

    @property
    def has_second(self):
        return self.update in ("adamw", "psgld")


def update_inputs(case):
    """Lists of params, grads, first and second moments; a moment that there is not is empty."""
    g = generator(len(case.sizes))
    scale = case.grad_scale or 1.0
    lists = [], [], [], []
    for i, n in enumerate(case.sizes):
        values = [torch.randn(n, generator=g) for _ in range(4)]
        values[1] = scale * values[1]
        values[2] = values[2] if case.has_first(i) else torch.empty(0)
        values[3] = 0.1 * values[3].square() if case.has_second else torch.empty(0)
        for of_all, x in zip(lists, values, strict=True):
            of_all.append(x.to(case.torch_dtype))
    return lists


def update_launch(device, case):
    def put(x, i):
        return device.put(x, case.misalign[i % len(case.misalign)])

    lists = [[put(x, i) for i, x in enumerate(xs)] for xs in update_inputs(case)]
    source, kept = noise_source(device, case)
    steps = [device.put(torch.tensor([float(s)])) for s in case.steps()]

    def rules_on_device(name):
        values = [rule[name] for rule in case.rules]
        return device.put(torch.tensor(values, dtype=torch.float64), name=name)

    lr = rules_on_device("lr") if "lr" in case.device else None
    std = rules_on_device("std") if "std" in case.device else None
    tensors = [
        fill(
            device.lib.UpdateTensor(),
            **{
                name: address(of_all[i])
                for name, of_all in zip(("param", "grad", "first", "second"), lists, strict=True)
            },
            numel=n,
            offset=case.offset(i),
            stream=i,
            index=i // case.runs,
            rule=case.rule_of(i),
            step=0 if "step" in case.device else case.steps()[i],
            device_step=address(steps[i]) if "step" in case.device else 0,
        )
        for i, n in enumerate(case.sizes)
        if n > 0
    ]
    hidden = {name: -1.0 for name in ("lr", "std") if name in case.device}
    rules = [fill(device.lib.UpdateRule(), **(rule | hidden)) for rule in case.rules]
    norms = device.new((case.indices, 2), torch.float64, name="norms") if case.norms else None
    scalars = [
        None if x is None else device.put(torch.tensor([x]))
        for x in (case.grad_scale, case.found_inf)
    ]
    p = fill(
        device.lib.UpdateParams(),
        dtype=getattr(device.lib.Dtype, case.dtype),
        update=getattr(device.lib.Update, case.update),
        source=source,
        device_lr=address(lr),
        device_std=address(std),
        grad_scale=address(scalars[0]),
        found_inf=address(scalars[1]),
        norms=address(norms),
        indices=case.indices,
        count=len(tensors),
    )
    workspace = workspace_of(device, device.lib.update_workspace(p))
    p.workspace = address(workspace)
    device.lib.update(p, tensors, rules, device.stream)
    return update_outputs(lists, norms)


def update_outputs(lists, norms):
    names = ("param", "grad", "first", "second")
    outs = {
        f"{name} {i}": x
        for name, of_all in zip(names, lists, strict=True)
        for i, x in enumerate(of_all)
    }
    return cpu(norms=norms, **outs)


def update_expected(case):
    lists = update_inputs(case)
    norms = torch.empty(len(case.sizes), 2, dtype=torch.float64) if case.norms else None
    scalars = {
        name: None if x is None else torch.tensor([x])
        for name, x in (("grad_scale", case.grad_scale), ("found_inf", case.found_inf))
    }
    params, grads, first, second = lists
    moments = [*(first if case.update in ("sgd", "adamw") else ())]
    moments += second if case.has_second else []
    count = len(case.sizes)
    offsets = [case.offset(i) for i in range(count)]
    rule_of = [case.rule_of(i) for i in range(count)]
    distribution = DISTRIBUTIONS.index(case.distribution)
    _C.noisy_update_(
        [UPDATES.index(case.update), *rule_of, *case.steps()],
        params,
        grads,
        moments,
        case.rules,
        [case.seed, case.step, distribution, 1, count, 0, *offsets],
        [None, None, None, None, scalars["grad_scale"], scalars["found_inf"]],
        norms,
    )
    if norms is not None:
        at = torch.arange(len(case.sizes)) // case.runs
        norms = torch.zeros(case.indices, 2, dtype=norms.dtype).index_add_(0, at, norms)
    return update_outputs(lists, norms)


def update_cases():
    for dtype in DTYPES:
        for u, update in enumerate(UPDATES):
            of = {"dtype": dtype, "update": update}
            sizes = (5003, 0, 1, 300, 2048)
            yield Update(sizes=sizes, **of, offsets=(0, 1, 7), misalign=(0, 1, 2))
            yield Update(sizes=sizes, **of, first_step=1, steps_differ=True, inplace=True)
            yield Update(sizes=sizes, **of, std=0.0, norms=True)
            yield Update(sizes=sizes, **of, grad_scale=1024.0, found_inf=0.0, norms=True, runs=2)
            yield Update(sizes=sizes, **of, grad_scale=3.0, found_inf=1.0, norms=True)
            yield Update(sizes=(9000,), **of, offsets=(2**34 - 4000,), step=3_000_000_000)
            for device in (("step",), ("lr",), ("std",), ("step", "lr", "std")):
                name = DISTRIBUTIONS[(u + len(device)) % 5]
                yield Update(
                    sizes=(2600, 77), **of, device=device, on_device=True, distribution=name
                )
            for name in DISTRIBUTIONS[1:]:
                yield Update(sizes=(3001, 90), **of, distribution=name, misalign=(0, u % 3))
            if size_of(dtype) == 2:
                of["rounding"] = True
                # Groups of the second and third tensor begin in the middle of a counter of bits.
                yield Update(sizes=sizes, **of, offsets=(0, 4, 12), misalign=(0, 0, 1))
                yield Update(sizes=(9000,), **of, std=0.0, offsets=(2**35 - 4000,))
                yield Update(sizes=(2600, 77), **of, device=("step",), on_device=True)
    many = tuple(1 + i % 37 for i in range(700))
    yield Update("float32", many, norms=True, runs=3)
    yield Update("bfloat16", many[:300], many_rules=True, update="sgd")
    yield Update("float32", many[:200], many_rules=True, device=("lr",))


# ---- linear regression --------------------------------------------------------------------------


@dataclass(frozen=True)
class Regression:
    samples: int
    replicas: int
    steps: int
    per_sample: bool = False
    trajectory: bool = True


def regression_inputs(case):
    g = generator(case.samples)
    x = torch.randn(case.samples, generator=g, dtype=torch.float64)
    y = 0.9 * x + 0.1 * torch.randn(case.samples, generator=g, dtype=torch.float64)
    replica = torch.arange(case.replicas, dtype=torch.float64)
    return {
        "x": x,
        "y": y,
        "theta": 0.1 * replica / (1 + case.replicas),
        "lr": 0.01 + 0.001 * (replica % 5),
        "lam": 0.001 * (replica % 3),
        "sigma": 0.1 + 0.1 * (replica % 4),
        "seed": torch.arange(case.replicas) * 7919 - 3,
    }


def regression_launch(device, case):
    inputs = {name: device.put(v, name=name) for name, v in regression_inputs(case).items()}
    result = device.new((case.replicas,), torch.float64, name="result")
    shape = (case.steps + 1, case.replicas)
    trajectory = device.new(shape, torch.float64, name="trajectory") if case.trajectory else None
    p = fill(
        device.lib.RegressionParams(),
        samples=case.samples,
        replicas=case.replicas,
        steps=case.steps,
        per_sample=case.per_sample,
        stream=5,
        result=address(result),
        trajectory=address(trajectory),
        **{name: address(value) for name, value in inputs.items()},
    )
    device.lib.regression(p, device.stream)
    return cpu(result=result, trajectory=trajectory)


def regression_expected(case):
    inputs = regression_inputs(case)
    trajectory = torch.ops.kdkernels.noisy_linear_regression(
        *(inputs[name] for name in ("x", "y", "theta", "lr", "lam", "sigma", "seed")),
        case.steps,
        5,
        case.per_sample,
        True,
    )
    want = {"result": trajectory[-1]}
    return want | ({"trajectory": trajectory} if case.trajectory else {})


def regression_compare(case, got, want):
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-12, atol=1e-13)


def regression_cases():
    for per_sample in (False, True):
        yield Regression(100, 1, 70, per_sample)
        yield Regression(7, 37, 33, per_sample)
        yield Regression(1000, 5, 9, per_sample, trajectory=False)
        yield Regression(3, 700, 3, per_sample)
        yield Regression(5, 2, 0, per_sample)
    yield Regression(5, 3, 70, trajectory=False)
    yield Regression(20000, 2, 3, True)


# ---- all of them --------------------------------------------------------------------------------


def size_of(dtype):
    return torch.empty((), dtype=getattr(torch, dtype)).element_size()


def element_bytes(passes):
    return lambda case: passes * sum(case.sizes) * size_of(case.dtype)


def update_bytes(case):
    """Parameter and moments, read and written, and the gradient, read."""
    return size_of(case.dtype) * sum(
        n * (3 + 2 * case.has_first(i) + 2 * case.has_second + (case.grad_scale is not None))
        for i, n in enumerate(case.sizes)
    )


OPS = [
    Op(
        "distillation",
        distillation_launch,
        distillation_expected,
        distillation_compare,
        lambda c: (2 * c.counting_rows + c.gradient * c.rows) * c.classes * size_of(c.dtype),
        list(distillation_cases()),
    ),
    Op(
        "divergence",
        divergence_launch,
        divergence_expected,
        divergence_compare,
        divergence_bytes,
        list(divergence_cases()),
        everywhere=False,
    ),
    Op(
        "scale_rows",
        scale_launch,
        scale_expected,
        equal,
        lambda c: 2 * c.rows * c.classes * size_of(c.dtype),
        list(scale_cases()),
        everywhere=False,
    ),
    Op(
        "noise",
        noise_launch,
        noise_expected,
        equal_but_norms,
        lambda c: (2 - (c.mode == "only")) * sum(c.sizes) * size_of(c.dtype),
        list(noise_cases()),
        everywhere=False,
    ),
    Op(
        "noise_dot",
        noise_dot_launch,
        noise_dot_expected,
        noise_dot_compare,
        element_bytes(1),
        list(noise_dot_cases()),
        everywhere=False,
    ),
    Op(
        "combine",
        combine_launch,
        combine_expected,
        equal,
        element_bytes(2),
        list(combine_cases()),
        everywhere=False,
    ),
    Op(
        "update",
        update_launch,
        update_expected,
        equal_but_norms,
        update_bytes,
        list(update_cases()),
        everywhere=False,
    ),
    Op(
        "noisy_linear_regression",
        regression_launch,
        regression_expected,
        regression_compare,
        lambda c: 8 * (2 * c.samples + 7 * c.replicas),
        list(regression_cases()),
    ),
]
