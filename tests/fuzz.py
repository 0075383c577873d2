"""Random calls of the public ops: each equals the reference, or names the argument that it refuses.

    make fuzz [N=100000] [SEED=0]

A call is a function of (seed, number). Calls are made in processes of their own, so that one that
ends its process is a finding as well, and the calls after it are made all the same.
"""

import argparse
import inspect
import math
import mmap
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from fractions import Fraction

import numpy
import torch

import kdkernels
from kdkernels import reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OF_NOISE = ("randn_like", "input_noise", "gradient_noise")
OF_NOISE += ("add_noise_", "combine_noise_", "noise_dot", "dropout", "stochastic_round")
DIVERGENCES = tuple(reference.DIVERGENCES)
LIMIT = 120  # seconds of a call; after them its process is ended
NOT_ITS_NAME = "the message names no argument"


# ---- arguments -----------------------------------------------------------------------------------


class Draw(random.Random):
    """What a call is made of."""

    def often(self) -> bool:
        return self.random() < 0.7

    def rarely(self) -> bool:
        return self.random() < 0.1

    def tensor(self, *shape, dtype=torch.float32, scale=1.0) -> torch.Tensor:
        """Random normals, in one of the layouts that users' tensors have."""
        g = torch.Generator().manual_seed(self.getrandbits(32))
        layouts = ["transposed", "cut", "strided", "expanded", "flipped", "shifted", "second first"]
        layout = self.choice(["plain"] * 6 + layouts)
        if layout == "transposed" and len(shape) > 1:
            x = torch.randn(*shape[:-2], shape[-1], shape[-2], generator=g).transpose(-1, -2)
        elif layout == "cut" and shape:
            x = torch.randn(*shape[:-1], shape[-1] + 3, generator=g)[..., 1 : shape[-1] + 1]
        elif layout == "strided" and shape:
            x = torch.randn(*shape[:-1], 2 * shape[-1], generator=g)[..., ::2]
        elif layout == "shifted" and len(shape) > 1:
            x = torch.randn(*shape[:-2], shape[-2] + 1, shape[-1], generator=g)[..., 1:, :]
        elif layout == "second first" and len(shape) > 2:
            x = torch.randn(*shape[:-3], *shape[-2:-4:-1], shape[-1], generator=g).transpose(-3, -2)
        elif layout == "expanded" and len(shape) > 1:
            x = torch.randn(1, *shape[1:], generator=g)
            return (scale * x).to(dtype).expand(shape)
        else:
            x = torch.randn(shape, generator=g)
            x = x.flip(-1) if layout == "flipped" and shape else x
        return (scale * x).to(dtype)

    def shape(self) -> tuple[int, ...]:
        """Of logits: leading dimensions and classes."""
        classes = self.choice([1, 2, 3, 7, 10, 16, 31, 33, 64, 100, 257, 1000])
        rows = self.choice([(), (1,), (2,), (5,), (17,), (2, 3), (1, 1), (3, 1, 2), (0,), (2, 0)])
        if self.random() < 0.01:
            return (self.choice([1, 2]), self.choice([4097, 50257, 262144]))
        return (*rows, classes)

    def with_gradient(self, x: torch.Tensor) -> torch.Tensor:
        return x.detach().requires_grad_() if self.often() and x.is_floating_point() else x

    def odd(self):
        """What should not stand where it stands, or may."""
        ones = torch.ones(2, 3)
        numbers = [-1, 0, 1, 2, 0.5, -0.5, math.inf, -math.inf, math.nan, 1e308, 5e-324, 1j]
        numbers += [2**31, 2**63, 2**70, -(2**63), Fraction(1, 2), numpy.float64(0.5)]
        numbers += [numpy.int64(3), True, False]
        others = [None, "x", "", "mean", "js", b"a", object(), torch.float32, torch.nn.Linear(2, 2)]
        sequences = [(), [], {}, [1], [1.0, 2.0], range(3), numpy.ones(2)]
        sequences += [[ones, None], [ones, torch.ones(3, 2)]]
        tensors = [torch.tensor(x) for x in (1.0, [1.0], [], True, 1, [0, 1], math.nan, -1.0)]
        tensors += [torch.ones(3, 3), torch.zeros(0, 5), torch.ones(2, 2).bool()]
        tensors += [ones.to(torch.complex64), ones.to(torch.float8_e4m3fn)]
        tensors += [torch.empty(2, 3, device="meta"), torch.eye(3).to_sparse()]
        return self.choice([*numbers, *others, *sequences, *tensors])


def loss_options(r: Draw, rows: tuple, classes: int, dense: bool) -> dict:
    """Of a loss, in their ranges."""
    dtype = r.choice((torch.float32, torch.float64))

    def number(low, high):
        if r.random() < 0.2:
            return torch.empty(rows, dtype=dtype).uniform_(
                low, high, generator=torch.Generator().manual_seed(r.getrandbits(32))
            )
        return r.uniform(low, high)

    every = {
        "temperature": lambda: number(0.5, 4),
        "logit_scale": lambda: number(0.5, 2),
        "soft_cap": lambda: number(3, 30),
        "weight": lambda: r.tensor(*rows).abs() * r.choice([0, 1]),
        "num_items": lambda: r.choice([1, 2.5, 100]),
        "reduction": lambda: r.choice(["mean", "sum", "none"]),
        "return_statistics": lambda: True,
    }
    if dense:
        every |= {
            "teacher_logit_scale": lambda: number(0.5, 2),
            "teacher_soft_cap": lambda: number(3, 30),
            "standardize": lambda: classes > 2,  # of two, both teachers' may have equal logits
        }
    options = {name: draw() for name, draw in every.items() if r.random() < 0.25}
    if options.get("reduction", "mean") != "mean":
        options.pop("num_items", None)
    return options


def with_labels(r: Draw, rows: tuple, classes: int, options: dict, needed: bool) -> None:
    if needed or r.random() < 0.5:
        n = math.prod(rows)
        labels = torch.tensor([r.choice([r.randrange(classes), -100]) for _ in range(n)])
        options["labels"] = labels.long().reshape(rows)
        options["alpha"] = r.choice([0.0, 0.3, 0.5, 1.0])
        if r.random() < 0.3:
            options["label_smoothing"] = r.choice([0.0, 0.1, 1.0])


def divergence(r: Draw, names: Sequence[str], options: dict) -> None:
    options["divergence"] = name = r.choice(names)
    if r.often():
        return
    if name in ("js", "skew_forward_kl", "skew_reverse_kl"):
        options["beta"] = r.choice([0.0, 0.1, 0.5, 0.9])
    elif name == "alpha_beta":
        options["divergence_alpha"] = r.choice([0.0, 0.2, 1.0])
        options["beta"] = r.choice([0.5, 0.7, 1.0])


def dense_loss(r: Draw):
    *rows, classes = r.shape()
    rows, dtype = tuple(rows), r.choice(DTYPES)
    options = loss_options(r, rows, classes, dense=True)
    divergence(r, DIVERGENCES, options)
    with_labels(r, rows, classes, options, options["divergence"] == "decoupled")
    student = r.tensor(*rows, classes, dtype=dtype, scale=3)
    count = r.choice([1, 1, 1, 2, 3])
    teachers = [r.tensor(*rows, classes, dtype=dtype, scale=3) for _ in range(count)]
    kind = r.choice(["logits", "logits", "log_probs", "probs"])
    changed = ("teacher_logit_scale", "teacher_soft_cap", "logit_scale", "soft_cap", "standardize")
    if r.random() < 0.4:  # a student in training is near its teacher
        # Of equal logits that are then changed only rounding would be compared.
        equal = kind == "logits" and not any(name in options for name in changed)
        gap = r.choice([0.0 if equal else 0.01, 0.01, 0.1, 0.3])
        teachers[0] = (student + r.tensor(*rows, classes, scale=gap)).to(dtype)
    student = r.with_gradient(student)
    if kind != "logits":
        f = torch.softmax if kind == "probs" else torch.log_softmax
        teachers = [f(t.float(), -1).to(dtype) for t in teachers]
        options["teacher_kind"] = kind
        for name in ("teacher_logit_scale", "teacher_soft_cap", "standardize"):
            options.pop(name, None)
    if len(teachers) > 1:
        options["teacher_mixture"] = r.choice(["probs", "log_probs"])
    teacher = r.with_gradient(teachers[0]) if len(teachers) == 1 else teachers
    options |= {"student_logits": student, "teacher_logits": teacher}
    if len(teachers) > 1 and r.random() < 0.3:
        options["teacher_index"] = places(r, rows, len(teachers))
    return kdkernels.distillation_loss, options


def places(r: Draw, rows: tuple, count: int) -> torch.Tensor:
    """Whose of several teachers each row is."""
    found = [r.randrange(count) for _ in range(math.prod(rows))]
    return torch.tensor(found, dtype=torch.int64).reshape(rows)


def top_k_loss(r: Draw):
    *rows, classes = r.shape()
    rows, dtype = tuple(rows), r.choice(DTYPES)
    options = loss_options(r, rows, classes, dense=False)
    divergence(r, reference.TOP_K_DIVERGENCES, options)
    with_labels(r, rows, classes, options, False)
    k = r.randint(1, min(classes, 9))
    teacher = r.tensor(*rows, classes, scale=3)
    top = kdkernels.topk_teacher(teacher, k)
    options["tail"] = tail = r.choice(["renormalize", "bucket", "ignore"])
    if tail != "renormalize":
        options["teacher_logsumexp"] = top.logsumexp
        options.pop("temperature", None)
    student = r.with_gradient(r.tensor(*rows, classes, dtype=dtype, scale=3))
    return kdkernels.topk_distillation_loss, {
        "student_logits": student,
        "teacher_values": top.values,
        "teacher_indices": top.indices.to(r.choice([torch.int32, torch.int64])),
        **options,
    }


def linear_loss(r: Draw):
    *rows, classes = r.shape()
    rows, dtype, hidden = tuple(rows), r.choice(DTYPES), r.choice([1, 3, 8, 16])
    options = loss_options(r, rows, classes, dense=True)
    options.pop("standardize", None)
    divergence(r, DIVERGENCES, options)
    with_labels(r, rows, classes, options, options["divergence"] == "decoupled")
    call = {
        "student_hidden": r.with_gradient(r.tensor(*rows, hidden, dtype=dtype)),
        # Not of equal rows, over which a gradient's rounded elements would cancel.
        "student_weight": r.with_gradient(r.tensor(hidden, classes, dtype=dtype).t().clone()),
        "teacher_hidden": r.tensor(*rows, hidden + 1, dtype=dtype),
        "teacher_weight": r.tensor(classes, hidden + 1, dtype=dtype),
        **options,
    }
    if r.rarely():
        call["student_bias"] = r.with_gradient(r.tensor(classes, dtype=dtype))
    if r.rarely():
        call["memory_budget"] = r.choice([1, 1000, 10**6])
    if r.rarely():
        call["teacher_hidden"] = [call["teacher_hidden"], r.tensor(*rows, 2, dtype=dtype)]
        call["teacher_weight"] = [call["teacher_weight"], r.tensor(classes, 2, dtype=dtype)]
        call["teacher_index"] = places(r, rows, 2)
    elif "labels" in call and r.rarely():  # which are a target alone
        left_out = ("teacher_", "return_statistics", "alpha", "divergence", "beta")
        call = {name: x for name, x in call.items() if not name.startswith(left_out)}
    return kdkernels.linear_distillation_loss, call


def log_probs(r: Draw):
    *rows, classes = r.shape()
    rows, dtype, hidden = tuple(rows), r.choice(DTYPES), r.choice([1, 3, 8, 16])
    drawn = loss_options(r, rows, classes, dense=False)
    options = {name: drawn[name] for name in drawn.keys() & {"temperature", "soft_cap"}}
    with_labels(r, rows, classes, drawn, needed=True)
    call = {
        "hidden": r.with_gradient(r.tensor(*rows, hidden, dtype=dtype)),
        "weight": r.with_gradient(r.tensor(hidden, classes, dtype=dtype).t().clone()),
        "token_ids": drawn["labels"],
        **options,
    }
    if r.rarely():
        call["bias"] = r.with_gradient(r.tensor(classes, dtype=dtype))
    if r.rarely():
        call["memory_budget"] = r.choice([1, 1000, 10**6])
    return kdkernels.linear_log_probs, call


def noise_options(r: Draw, *, seeded=True) -> dict:
    options = {"seed": r.getrandbits(60)} if seeded else {}
    every = {
        "step": lambda: r.choice([0, 1, 2**31, torch.tensor(3)]),
        "stream": lambda: r.choice([0, 7, 2**31]),
        "offset": lambda: r.choice([0, 1, 5, 2**33]),
        "distribution": lambda: r.choice(list(reference.DISTRIBUTIONS)),
    }
    return options | {name: draw() for name, draw in every.items() if r.random() < 0.3}


def noise(r: Draw):
    shape, dtype = r.choice([(), (1,), (7,), (64, 3), (0,), (2, 3, 4), (1000,)]), r.choice(DTYPES)
    x = r.tensor(*shape, dtype=dtype)
    if r.rarely():
        return bits(r, x)
    name = r.choice(["randn_like", "input_noise", "gradient_noise", "add_noise_", "noise_dot"])
    call = {("tensors" if name in ("add_noise_", "noise_dot") else "x"): x, **noise_options(r)}
    if name == "add_noise_":
        call["tensors"] = x.contiguous().clone()
    if name not in ("randn_like", "noise_dot"):
        call["std"] = r.choice([0.0, 0.1, 2.0])
        if r.rarely():
            call["multiplicative"] = True
    if name in ("input_noise", "gradient_noise"):
        call["x"] = r.with_gradient(x)
    if name in ("randn_like", "input_noise", "add_noise_") and x.dim() > 1 and r.rarely():
        call["seed"] = torch.tensor([r.getrandbits(60) for _ in range(len(x))])
    return getattr(kdkernels, name), call


def bits(r: Draw, x: torch.Tensor):
    options = noise_options(r)
    options.pop("distribution", None)
    if r.random() < 0.5:
        p = r.choice([0.0, 0.1, 0.5, 1.0])
        return kdkernels.dropout, {"x": r.with_gradient(x), "p": p, **options}
    dtype = r.choice([torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
    return kdkernels.stochastic_round, {"x": x.float(), "dtype": dtype, **options}


def combined_noise(r: Draw):
    k = r.randint(0, 4)
    tensors = [r.tensor(r.choice([0, 1, 5, 100])) for _ in range(r.randint(1, 3))]
    call = {
        "tensors": [t.contiguous().clone() for t in tensors],
        "coefficients": [r.uniform(-1, 1) for _ in range(k)],
        "seeds": [r.getrandbits(60) for _ in range(k)],
        **noise_options(r, seeded=False),
    }
    if "stream" in call:
        call["stream"] = [r.randrange(100) for _ in tensors]
    if "offset" in call:
        call["offset"] = [r.randrange(100) for _ in tensors]
    return kdkernels.combine_noise_, call


def regression(r: Draw):
    n = r.choice([1, 2, 10, 33])
    replicas = r.choice([1, 3])
    return kdkernels.noisy_linear_regression, {
        "x": r.tensor(n, dtype=torch.float64),
        "y": r.tensor(n, dtype=torch.float64),
        "theta": r.uniform(-1, 1),
        "steps": r.choice([0, 1, 5]),
        "lr": r.choice([0.01, torch.full((replicas,), 0.02, dtype=torch.float64)]),
        "seed": r.choice([3, torch.arange(replicas)]),
        "noise": r.choice(["per-step", "per-sample"]),
        "trajectory": r.rarely(),
    }


def optimizer(r: Draw):
    name = r.choice(["NoisySGD", "NoisyAdamW", "SGLD", "pSGLD"])
    every = {
        "NoisySGD": {"momentum": [0.0, 0.9], "dampening": [0.0, 0.5], "weight_decay": [0.0, 0.1]},
        "NoisyAdamW": {"betas": [(0.9, 0.99), (0.0, 0.5)], "weight_decay": [0.0, 0.1]},
        "SGLD": {"temperature": [0.0, 1.0]},
        "pSGLD": {"alpha": [0.9, 0.99]},
    }[name]
    known = inspect.signature(getattr(kdkernels, name)).parameters
    options = {k: r.choice(v) for k, v in every.items() if k in known and r.random() < 0.5}
    params = [torch.nn.Parameter(r.tensor(r.choice([1, 5, 33]))) for _ in range(r.randint(1, 3))]

    def step(**call):
        optimizer = getattr(kdkernels, name)(**call)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()

    step.__signature__ = inspect.signature(getattr(kdkernels, name))
    step.__name__ = name
    return step, {"params": params, "lr": r.choice([0.0, 0.1]), **options}


def teachers_entries(r: Draw):
    shape = r.shape()
    return kdkernels.topk_teacher, {
        "teacher_logits": r.tensor(*shape, dtype=r.choice(DTYPES)),
        "k": r.randint(1, min(shape[-1], 20)),
        "temperature": r.choice([0.5, 1.0, 2.0]),
    }


CASES = [dense_loss] * 6 + [top_k_loss] * 3 + [linear_loss] * 2 + [log_probs] + [noise] * 3
CASES += [combined_noise, regression, optimizer, teachers_entries]


def call_of(seed: int, number: int):
    """(function, keyword arguments, whether all of them are in their ranges)."""
    r = Draw(seed * 1_000_003 + number)
    function, call = r.choice(CASES)(r)
    if r.random() < 0.5:
        return function, call, True
    names = list(inspect.signature(function).parameters)
    # Arguments of the call are spoiled more often than those that it leaves out.
    name, value = r.choice(list(call) if r.random() < 0.7 else names), r.odd()
    large = isinstance(value, int) and value > 1000
    if name == "steps" and large:
        value = 3  # all steps would be made
    call[name] = 0.5 if name == "std" and callable(value) else value  # which is a schedule
    return function, call, False


# ---- verdicts ------------------------------------------------------------------------------------


def copied(value):
    """With a leaf of its own for each tensor with a gradient."""
    if isinstance(value, torch.Tensor) and type(value) is torch.Tensor:
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, list):
        return [copied(x) for x in value]
    return value


def plain(value):
    """A number that only looks odd as a plain one; tensors in fp64."""
    if isinstance(value, torch.Tensor):
        real = value.is_floating_point() and not value.is_meta
        return value.detach().double().requires_grad_(value.requires_grad) if real else value
    if isinstance(value, list):
        return [plain(x) for x in value]
    if isinstance(value, int) and abs(value) > 2**63:
        return float(value)
    return float(value) if isinstance(value, Fraction) else value


def moderate(value) -> bool:
    """Whether fp32 can be expected to hold what comes of it."""
    if isinstance(value, (int, float)):
        return math.isfinite(value) and (value == 0 or 1e-3 <= abs(value) <= 1e4)
    if isinstance(value, torch.Tensor) and value.numel() and not value.is_meta:
        return not value.is_floating_point() or bool(value.double().isfinite().all())
    return True


def tensors_of(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [x for v in value for x in tensors_of(v)] if isinstance(value, (list, tuple)) else []


def results(function, call: dict) -> list[torch.Tensor]:
    """What it returns, what it wrote, and the gradients of its arguments."""
    got = function(**call)
    found = tensors_of(list(got) if isinstance(got, tuple) else got)
    leaves = [x for x in tensors_of(list(call.values())) if x.requires_grad and x.is_leaf]
    loss = [x for x in found if x.requires_grad]
    if loss and leaves:
        sum(x.double().sum() for x in loss[:1]).backward()
        gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
        found += [x.to_dense() if x.is_sparse else x for x in gradients]
    if function.__name__.endswith("_"):
        found += tensors_of(call["tensors"])
    return [x.detach() for x in found]


def reference_of(function, call: dict):
    """The reference's call, or None where there is none."""
    name = function.__name__
    if "backend" in inspect.signature(function).parameters:
        call = {k: plain(v) for k, v in call.items() if k != "memory_budget"}
        for name, x in call.items():
            if isinstance(x, torch.Tensor) and x.dtype == torch.bool and name != "weight":
                call[name] = x.int()
        for name in ("alpha", "teacher_logit_scale"):  # whose 1 goes where other numbers do not
            if isinstance(x := call.get(name), torch.Tensor) and x.numel() == 1:
                call[name] = x.item()
        return function, call | {"backend": "reference"}
    if name in OF_NOISE:
        if isinstance(call.get("tensors"), (list, dict, tuple)) and not call["tensors"]:
            return None  # where nothing else is looked at
        numbers = {k: plain(v) if k not in ("x", "tensors") else copied(v) for k, v in call.items()}
        if isinstance(seed := numbers.get("seed"), torch.Tensor) and seed.numel() == 1:
            numbers["seed"] = int(numbers["seed"])
        return getattr(reference, name), numbers
    return None


def copied_call(call: dict) -> dict:
    return {name: copied(value) for name, value in call.items()}


def close(got: torch.Tensor, want: torch.Tensor, name: str) -> bool:
    """To what the dtype holds, as part of the largest number."""
    fp32 = name in OF_NOISE  # whatever the dtype is
    terms = 20 if name.startswith("linear") else 2  # of the products, which may cancel
    if got.shape != want.shape:
        return False
    eps = torch.finfo(got.dtype).eps if got.dtype.is_floating_point else 0.0
    a, b = got.double(), want.double()
    scale = b[b.isfinite()].abs().max().item() if b.isfinite().any() else 0.0
    tolerance = max(2e-4, terms * eps) * (b.abs() + scale) + 1e-6
    tolerance = tolerance if fp32 or got.dtype != torch.float64 else 1e-6 * (b.abs() + scale) + 1e-9
    same = (a == b) | (a.isnan() & b.isnan()) | ((a - b).abs() <= tolerance)
    largest = torch.finfo(got.dtype).max if got.dtype.is_floating_point else math.inf
    return bool((same | ((b.abs() > 0.9 * largest) & (a.abs() >= 0.9 * largest))).all())


def finding(seed: int, number: int) -> str | None:
    """What is wrong with this call, or None."""
    function, call, valid = call_of(seed, number)
    try:
        got = results(function, copied_call(call))
    except (ValueError, TypeError) as error:
        if valid:
            return f"refused: {type(error).__name__}: {error}"
        names = inspect.signature(function).parameters
        if not any(re.search(rf"\b{re.escape(name)}\b", str(error)) for name in names):
            return f"{NOT_ITS_NAME}: {type(error).__name__}: {error}"
        return None
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    other = None if any(x.is_meta for x in got) else reference_of(function, call)
    places = ("seed", "step", "stream", "offset")
    chosen = [v for k, v in call.items() if k not in places and getattr(v, "ndim", 0) == 0]
    if other is None or call.get("seed", 0) is None or not all(map(moderate, chosen)):
        return None
    try:
        want = results(*other)
    except Exception as error:
        return f"taken, where the reference says {type(error).__name__}: {str(error)[:300]}"
    if len(got) != len(want):
        return f"{len(got)} results, of the reference {len(want)}"
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if not close(a, b, function.__name__):
            few, right = a.flatten()[:6].tolist(), b.flatten()[:6].tolist()
            return f"result {i} of {len(got)}: {few}, right {right}"
    return None


def described(value) -> str:
    if isinstance(value, torch.Tensor):
        grad = ", with gradient" if value.requires_grad else ""
        few = f" {value.tolist()}" if value.numel() <= 4 and value.device.type == "cpu" else ""
        layout = "sparse" if value.is_sparse else f"strides {value.stride()}"
        return f"<{value.dtype} {tuple(value.shape)} {layout}, {value.device}{grad}{few}>"
    if isinstance(value, list):
        return "[" + ", ".join(map(described, value)) + "]"
    return repr(value)


def told(seed: int, number: int, what: str) -> str:
    function, call, _ = call_of(seed, number)
    arguments = ", ".join(f"{k}={described(v)}" for k, v in call.items())
    return f"call {number} (seed {seed}): {function.__name__}({arguments})\n    {what}"


# ---- processes -----------------------------------------------------------------------------------


def make(seed: int, first: int, last: int, at: mmap.mmap) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for number in range(first, last):
        at[:8] = number.to_bytes(8, "little")
        signal.alarm(LIMIT)
        what = finding(seed, number)
        if what is not None:
            print(told(seed, number, what), flush=True)


def run(calls: int, seed: int = 0, first: int = 0) -> list[str]:
    """The findings among so many calls."""
    found, number, last = [], first, first + calls
    with tempfile.NamedTemporaryFile() as file:
        file.write(bytes(8))
        file.flush()
        while number < last:
            command = [sys.executable, "-m", "fuzz", "--seed", str(seed), "--within", file.name]
            command += ["--first", str(number), "--calls", str(last - number)]
            here = os.path.dirname(__file__)
            done = subprocess.run(command, capture_output=True, text=True, cwd=here)
            found += re.split(r"\n(?=call )", done.stdout.strip()) if done.stdout.strip() else []
            if done.returncode == 0:
                break
            with open(file.name, "rb") as f:
                number = int.from_bytes(f.read(8), "little")
            end = done.stderr.strip().splitlines()[-1:] or [""]
            found.append(told(seed, number, f"the process ended with {done.returncode}: {end[0]}"))
            number += 1
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--within", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.within:
        with open(args.within, "r+b") as file:
            make(args.seed, args.first, args.first + args.calls, mmap.mmap(file.fileno(), 8))
        return 0
    found = run(args.calls, args.seed, args.first)
    print(*found, f"{len(found)} findings in {args.calls} calls", sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
