"""Every CUDA launcher, declared once: how its arguments are made, what must come out, its cases.

An Op in OPS gets emulated tests and GPU tests (test_launchers.py) and can be counted
(bench/counts.py).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import ptx
import torch

import kdkernels
from kdkernels import reference

ROOT = Path(__file__).parent.parent
SOURCES = [*sorted(ROOT.glob("csrc/cuda/*.cu")), ROOT / "tests/launchers.cpp"]
HALF_ULP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # relative
DTYPES = ("float32", "bfloat16", "float16", "float64")


INCLUDE = [ROOT / "csrc", Path(torch.__path__[0]) / "include"]


def build(arch=("75", "80", "90")):
    """The launchers on the emulator, with PTX for these architectures."""
    return ptx.build("launchers", SOURCES, arch, include=INCLUDE)


def build_native():
    """The launchers for the GPU of this machine, a Python module."""
    return ptx.build_native("launchers", SOURCES, include=INCLUDE)


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

    def new(self, shape, dtype, offset=0, name=None):
        """Memory that counts as never written, full of NaN."""
        out = self._place(math.prod(shape), dtype, offset).view(shape)
        out.fill_(math.nan if dtype.is_floating_point else -1)
        self._announce(out, False, name)
        return out


def emulated(run, lib):
    def announce(tensor, written, name):
        run.buffer(tensor, written, name)

    return Device(lib.python, "cpu", announce)


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


def address(tensor):
    return 0 if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


def generator(seed):
    return torch.Generator().manual_seed(seed)


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
    values: str = "normal"
    scale: float = 3.0

    @property
    def torch_dtype(self):
        return getattr(torch, self.dtype)

    @property
    def acc(self):
        return torch.float64 if self.dtype == "float64" else torch.float32


def distillation_inputs(case):
    g = generator(case.rows * 1000003 + case.classes)
    shape = (case.rows, case.classes)
    z = case.scale * torch.randn(shape, generator=g, dtype=torch.float64)
    t = case.scale * torch.randn(shape, generator=g, dtype=torch.float64)
    if case.values == "masked":  # some classes impossible, for both sides alike
        mask = torch.rand(shape, generator=g) < 0.3
        mask[:, 0] = False
        z[mask], t[mask] = -math.inf, -math.inf
    if case.values == "nan" and case.rows:
        z[0, case.classes // 2] = math.nan
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
    return torch.nn.functional.pad(matrix, (0, pad), value=math.nan)


def distillation_launch(device, case):
    z, t, labels, weight = distillation_inputs(case)
    dtype, rows, classes = case.torch_dtype, case.rows, case.classes
    student = device.put(padded(z, case.pad[0]), case.offset[0], "student")
    teacher = device.put(padded(t, case.pad[1]), case.offset[1], "teacher")
    gradient = None
    if case.gradient:
        shape = (rows, classes + case.pad[2])
        gradient = student if case.inplace else device.new(shape, dtype, case.offset[2], "gradient")
    labels = None if labels is None else device.put(labels, name="labels")
    weight = None if weight is None else device.put(weight, name="weight")
    none = case.reduction == "none"
    row_loss = device.new((rows,), case.acc, name="row_loss") if none else None
    loss = None if none else device.new((1,), case.acc, name="loss")
    workspace = device.new(
        (max(1, device.lib.distillation_workspace(rows)),), torch.float64, name="workspace"
    )
    counted = case.reduction == "mean" and (labels is not None or weight is not None)
    p = fill(
        device.lib.DistillationParams(),
        dtype=getattr(device.lib.Dtype, case.dtype),
        rows=rows,
        classes=classes,
        student=address(student),
        teacher=address(teacher),
        gradient=address(gradient),
        labels=address(labels),
        weight=address(weight),
        row_loss=address(row_loss),
        loss=address(loss),
        student_stride=classes + case.pad[0],
        teacher_stride=classes + case.pad[1],
        gradient_stride=classes + case.pad[0 if case.inplace else 2],
        temperature=case.temperature,
        alpha=1.0 if case.alpha is None else case.alpha,
        label_smoothing=case.smoothing,
        ignore_index=-100,
        denominator=-1.0 if counted else (rows if case.reduction == "mean" else 1.0),
        gradient_scale=1.0,
        workspace=address(workspace),
    )
    device.lib.distillation(p, device.stream)
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


def distillation_compare(case, got, want):
    exact = case.dtype == "float64"
    # As in test_distillation.py: the largest share of a row in the loss, and of all rows.
    z, t, labels, weight = distillation_inputs(case)
    share = torch.ones(case.rows).double() if weight is None else weight.double()
    if labels is not None:
        share = torch.where(labels == -100, 0.0, share)
    if case.reduction == "mean":
        share = share / max(share.sum().item(), 1e-30)
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
            # Rows that start at any element, alike or not, apart or not.
            yield Distillation(dtype, 5, classes, offset=(1, 1, 1))
            yield Distillation(dtype, 5, classes, offset=(3, 3, 3), pad=(5, 5, 5))
            yield Distillation(dtype, 5, classes, offset=(0, 1, 2), pad=(3, 0, 1))
            yield Distillation(dtype, 5, classes, pad=(8, 16, 24), inplace=True)
        yield Distillation(dtype, 0, 10)
        yield Distillation(dtype, 1500, 10, reduction="mean", alpha=0.5, ignored=0.1)
    yield Distillation("float32", 40000, 5)
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


# ---- scaling of a gradient ----------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    dtype: str
    rows: int
    classes: int
    per_row: bool = True
    factor: float | None = None
    pad: int = 0


def scale_inputs(case):
    g = generator(case.rows + case.classes)
    acc = torch.float64 if case.dtype == "float64" else torch.float32
    data = torch.randn((case.rows, case.classes), generator=g).to(getattr(torch, case.dtype))
    factor = torch.randn(case.rows if case.per_row else 1, generator=g).to(acc)
    if case.factor is not None:
        factor[:] = case.factor
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
        stride=case.classes + case.pad,
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


# ---- noise --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Noise:
    dtype: str
    sizes: tuple
    add: bool = True
    inplace: bool = True
    offsets: tuple = (0,)  # global index of the first element, cycled over the list
    misalign: tuple = (0,)  # elements past 256 aligned bytes, cycled
    std: float = 0.5
    step: int = 7
    on_device: bool = False  # step and std in device memory
    seed: int = 0x123456789ABCDEF


def noise_inputs(case):
    g = generator(len(case.sizes))
    dtype = getattr(torch, case.dtype)
    return [torch.randn(n, generator=g).to(dtype) for n in case.sizes]


def noise_launch(device, case):
    tensors, outs, keep = [], [], []
    for i, x in enumerate(noise_inputs(case)):
        misalign = case.misalign[i % len(case.misalign)]
        if case.add and case.inplace:
            source = out = device.put(x, misalign)
        else:
            source = device.put(x, misalign) if case.add else None
            out = device.new(x.shape, x.dtype, misalign)
        outs.append(out)
        keep.append(source)
        if x.numel() == 0:
            continue
        tensors.append(
            fill(
                device.lib.NoiseTensor(),
                **{"out": address(out), "in": address(source)},
                numel=x.numel(),
                std=0.0 if case.on_device else case.std,
                offset=case.offsets[i % len(case.offsets)],
                stream=i,
            )
        )
    p = fill(
        device.lib.NoiseParams(),
        dtype=getattr(device.lib.Dtype, case.dtype),
        seed_low=case.seed & 0xFFFFFFFF,
        seed_high=case.seed >> 32,
        step=0 if case.on_device else case.step,
    )
    if case.on_device:
        step = device.put(torch.tensor([case.step]))
        std = device.put(torch.tensor([case.std], dtype=torch.float64))
        p.device_step, p.device_std = address(step), address(std)
    device.lib.noise(p, tensors, device.stream)
    return cpu(**{str(i): out for i, out in enumerate(outs)})


def noise_expected(case):
    outs = {}
    for i, x in enumerate(noise_inputs(case)):
        out = x.clone() if case.add else torch.zeros_like(x)
        noise = {"seed": case.seed, "step": case.step, "stream": i}
        noise["offset"] = case.offsets[i % len(case.offsets)]
        if case.add:
            kdkernels.add_noise_(out, case.std, **noise)
        else:
            out = kdkernels.randn_like(x, **noise)
        outs[str(i)] = out
    return outs


def noise_cases():
    sizes = (1000003, 0, 1, 3, 4, 5, 7, 8, 1024, 8191)
    for dtype in DTYPES:
        yield Noise(dtype, sizes)
        yield Noise(dtype, sizes[1:], misalign=(1, 2, 3, 5))
        yield Noise(dtype, (4097, 70000), offsets=(1, 2, 3), misalign=(0, 3, 1))
        yield Noise(dtype, (30001, 16), offsets=(2**34 - 5, 2**40 + 3), add=False, std=1.0)
        yield Noise(dtype, (5000, 12), on_device=True, step=3_000_000_000, inplace=False)
        yield Noise(dtype, tuple(range(1, 97)), misalign=(0, 1))
    yield Noise("float32", tuple(17 + i % 50 for i in range(760)), offsets=(0, 1, 4))


# ---- the dot product with noise -----------------------------------------------------------------


def noise_dot_launch(device, case):
    x = device.put(noise_inputs(case)[0], case.misalign[0])
    acc = torch.float64 if case.dtype == "float64" else torch.float32
    result = device.new((1,), acc)
    partial = device.new((device.lib.noise_dot_blocks,), torch.float64)
    key = {"seed_low": case.seed & 0xFFFFFFFF, "seed_high": case.seed >> 32, "step": case.step}
    p = fill(
        device.lib.NoiseDotParams(),
        dtype=getattr(device.lib.Dtype, case.dtype),
        x=address(x),
        numel=x.numel(),
        offset=case.offsets[0],
        key=fill(device.lib.NoiseKey(), **key, stream=0),
        result=address(result),
        partial=address(partial),
    )
    device.lib.noise_dot(p, device.stream)
    return cpu(result=result)


def noise_dot_terms(case):
    x = noise_inputs(case)[0]
    like = torch.empty(x.shape, dtype=torch.float32)
    noise = {"seed": case.seed, "step": case.step, "offset": case.offsets[0]}
    return x.double() * kdkernels.randn_like(like, **noise).double()


def noise_dot_expected(case):
    return {"result": noise_dot_terms(case).sum().reshape(1)}


def noise_dot_compare(case, got, want):
    exact = case.dtype == "float64"
    scale = noise_dot_terms(case).abs().sum().item()
    torch.testing.assert_close(
        got["result"].double(), want["result"], rtol=1e-12 if exact else 1e-7,
        atol=(1e-14 if exact else 1e-7) * scale,
    )  # fmt: skip


def noise_dot_cases():
    for dtype in DTYPES:
        yield Noise(dtype, (1000003,))
        for size in (0, 1, 5, 4096):
            yield Noise(dtype, (size,), offsets=(3,), misalign=(1,))


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
        case.steps, 5, case.per_sample, True,
    )  # fmt: skip
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
    yield Regression(20000, 2, 3, True)


# ---- all of them --------------------------------------------------------------------------------


def size_of(dtype):
    return torch.empty((), dtype=getattr(torch, dtype)).element_size()


def element_bytes(passes):
    return lambda case: passes * sum(case.sizes) * size_of(case.dtype)


OPS = [
    Op(
        "distillation",
        distillation_launch,
        distillation_expected,
        distillation_compare,
        lambda c: (2 + c.gradient) * c.rows * c.classes * size_of(c.dtype),
        list(distillation_cases()),
    ),
    Op(
        "scale_rows",
        scale_launch,
        scale_expected,
        equal,
        lambda c: 2 * c.rows * c.classes * size_of(c.dtype),
        list(scale_cases()),
    ),
    Op(
        "noise",
        noise_launch,
        noise_expected,
        equal,
        lambda c: (1 + c.add) * sum(c.sizes) * size_of(c.dtype),
        list(noise_cases()),
    ),
    Op(
        "noise_dot",
        noise_dot_launch,
        noise_dot_expected,
        noise_dot_compare,
        element_bytes(1),
        list(noise_dot_cases()),
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
