"""What the losses require of their arguments."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdkernels.errors import NUMBER, OPTIONAL_TENSOR, TENSOR, fits

MAX_TEACHERS, MAX_TOP_K = 8, 1024

_DEFAULTS = {
    "divergence_alpha": None,
    "teacher_weights": None,
    "teacher_mixture": "probs",
    "standardize": False,
    "teacher_logit_scale": 1,
    "teacher_soft_cap": None,
    "tail": "renormalize",
    "teacher_logsumexp": None,
}


def teacher_form(hidden, weight, bias, logits, values, indices, labels=None) -> str:
    """Which teacher linear_distillation_loss was given: "hidden", "logits" or "values"; or "none",
    where there are labels.
    """
    forms = {"hidden": (hidden, weight), "logits": (logits, logits), "values": (values, indices)}
    given = [form for form, parts in forms.items() if any(x is not None for x in parts)]
    if not given and labels is not None:
        if bias is not None:
            raise ValueError("teacher_bias goes with teacher_hidden, and there is no teacher")
        return "none"
    if len(given) != 1:
        what = " and ".join(f"teacher_{form}" for form in given) or "teacher_hidden"
        raise ValueError(
            f"{what} {'are' if len(given) > 1 else 'is'} {'given' if given else 'None'}; it takes "
            "one teacher: teacher_hidden with teacher_weight, teacher_logits, or teacher_values "
            "with teacher_indices; or labels alone"
        )
    second = {"hidden": "weight", "logits": "logits", "values": "indices"}[given[0]]
    for name, x in zip((given[0], second), forms[given[0]], strict=True):
        if x is None:
            raise ValueError(f"teacher_{name} is None, but its other half is given")
    if bias is not None and given[0] != "hidden":
        raise ValueError(f"teacher_bias goes with teacher_hidden, not with teacher_{given[0]}")
    return given[0]


def teacher_heads(hidden, weight, bias, index) -> list[tuple[Any, Any, Any]]:
    """(hidden states, weight, bias) of each teacher with a head; without an index there is one."""
    if not isinstance(hidden, (list, tuple)):
        if index is not None:
            raise ValueError("teacher_index goes with several teachers, and teacher_hidden is one")
        return [(hidden, weight, bias)]
    if index is None:
        raise ValueError("teacher_index is None; a list of teacher_hidden needs it")
    if not hidden:
        raise ValueError("teacher_hidden is empty; it takes at least one teacher")
    if bias is None:
        bias = [None] * len(hidden)
    for name, parts in (("teacher_weight", weight), ("teacher_bias", bias)):
        if not isinstance(parts, (list, tuple)) or len(parts) != len(hidden):
            raise ValueError(
                f"{name} takes a list of {len(hidden)}, one for each of teacher_hidden"
            )
    return list(zip(hidden, weight, bias, strict=True))


def without_teacher(alpha, return_statistics) -> float:
    """alpha of labels alone."""
    if return_statistics is True:
        raise ValueError("return_statistics is True, but there is no teacher to compare with")
    if alpha is not None and (isinstance(alpha, Tensor) or alpha != 0):
        raise ValueError(f"alpha is {alpha}; without a teacher it takes 0")
    return 0.0


def refuse_others(call: dict, names: Sequence[str], teacher: str) -> None:
    """Options that do not go with a form of teacher must be the defaults."""
    for name in names:
        value, default = call[name], _DEFAULTS[name]
        same = isinstance(value, (bool, int, float, str)) and value == default
        if value is not default and not same:
            raise ValueError(f"{name} does not go with {teacher}")


def check_teacher_index(index, teachers: int, rows, values: bool) -> None:
    """The teacher of each row. values: look at its numbers, too."""
    check_type("teacher_index", index, TENSOR)
    if index.dtype != torch.int64:
        raise TypeError(f"teacher_index has dtype {index.dtype}; it takes int64")
    if index.shape != rows:
        raise ValueError(f"teacher_index has shape {list(index.shape)}; it takes {list(rows)}")
    if values and ((index < 0) | (index >= teachers)).any():
        raise ValueError(
            f"teacher_index holds {index.tolist()}; it takes places in [0, {teachers})"
        )


def check_head(prefix: str, hidden, weight, bias, dtype) -> None:
    """Hidden states [*, H], weight [V, H] and bias [V] or None, whose names begin with a prefix."""
    for name, x, dims in (("hidden", hidden, None), ("weight", weight, 2), ("bias", bias, 1)):
        name = prefix + name
        if dims == 1 and x is None:
            continue
        check_type(name, x, TENSOR)
        check_floating(name, x)
        if x.dtype != dtype:
            raise TypeError(f"{name} has dtype {x.dtype}; it takes that of the student, {dtype}")
        if x.dim() != dims if dims else x.dim() == 0:
            shape = {None: "[*, H]", 2: "[V, H]", 1: "[V]"}[dims]
            raise ValueError(f"{name} has shape {list(x.shape)}; it takes {shape}")
        if x.device != hidden.device:
            raise ValueError(f"{name} is on {x.device}, {prefix}hidden on {hidden.device}")
    if hidden.shape[-1] != weight.shape[1] or 0 in weight.shape:
        raise ValueError(
            f"{prefix}weight has shape {list(weight.shape)}; it takes [V, {hidden.shape[-1]}], "
            "V and H >= 1"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{prefix}bias has shape {list(bias.shape)}; it takes {list(weight.shape[:1])}"
        )


def check_type(name, value, kind):
    """A value of a kind of kdkernels.errors."""
    if not fits(value, kind):
        raise TypeError(f"{name} is a {type(value).__name__}; it takes {kind}")


def check_choice(name, value, choices):
    """One of a few strings."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it takes one of {', '.join(choices)}")


def check_floating(name: str, tensor: Tensor) -> None:
    """Of a dtype that the losses take, and dense."""
    if tensor.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise TypeError(f"{name} has dtype {tensor.dtype}; it takes a floating-point dtype")
    if tensor.layout != torch.strided:
        raise ValueError(f"{name} has layout {tensor.layout}; it takes a dense tensor")


def check_student(student, labels, weight):
    """Student logits with the labels and weights of their rows."""
    check_type("student_logits", student, TENSOR)
    check_floating("student_logits", student)
    if student.dim() == 0 or student.shape[-1] == 0:
        raise ValueError(f"student_logits has shape {list(student.shape)}; it takes [*, V], V >= 1")
    for name, rows in (("labels", labels), ("weight", weight)):
        check_type(name, rows, OPTIONAL_TENSOR)
        if rows is not None:
            _check_rows(name, rows, student)
    if labels is not None and labels.dtype != torch.int64:
        raise TypeError(f"labels has dtype {labels.dtype}; it takes int64")
    if weight is not None and weight.is_complex():
        raise TypeError(f"weight has dtype {weight.dtype}; it takes a real dtype")
    _check_detached("weight", weight)


def _check_rows(name, rows, student):
    if rows.shape != student.shape[:-1]:
        raise ValueError(
            f"{name} has shape {list(rows.shape)}; it takes {list(student.shape[:-1])}"
        )
    _check_device(name, rows, student)


def _check_device(name, tensor, student):
    if tensor.device != student.device:
        raise ValueError(f"{name} is on {tensor.device}, student_logits on {student.device}")


def _check_detached(name, tensor):
    if tensor is not None and torch.is_grad_enabled() and tensor.requires_grad:
        raise ValueError(f"{name} requires grad, but no gradient flows to it; detach it")


def check_teachers(student, teacher, weights) -> tuple[list[Tensor], list[float]]:
    """The teachers with a weight above 0, and their weights, sum 1."""
    several = isinstance(teacher, (list, tuple))
    if not several:
        check_type("teacher_logits", teacher, TENSOR)
        several = teacher.dim() == student.dim() + 1
    teachers = list(teacher) if several else [teacher]
    if not 1 <= len(teachers) <= MAX_TEACHERS:
        raise ValueError(
            f"teacher_logits holds {len(teachers)} teachers; it takes 1 to {MAX_TEACHERS}"
        )
    for one in teachers:
        check_type("teacher_logits", one, TENSOR)
        check_floating("teacher_logits", one)
        if one.dtype != student.dtype:
            raise TypeError(f"teacher_logits has dtype {one.dtype}, student_logits {student.dtype}")
        if one.shape != student.shape:
            raise ValueError(
                f"teacher_logits has shape {list(one.shape)}, student_logits {list(student.shape)}"
            )
        _check_device("teacher_logits", one, student)
    if weights is None:
        return teachers, [1 / len(teachers)] * len(teachers)
    if not several:
        raise ValueError("teacher_weights goes with several teachers only")
    if not isinstance(weights, (Sequence, Tensor)) or isinstance(weights, str):
        raise TypeError(
            f"teacher_weights is a {type(weights).__name__}; it takes a list of numbers"
        )
    weights = list(weights)
    for w in weights:
        check_type("teacher_weights", w, NUMBER)
    weights = [float(w) for w in weights]
    if len(weights) != len(teachers):
        raise ValueError(
            f"teacher_weights holds {len(weights)} numbers for {len(teachers)} teachers"
        )
    if not all(0 <= w < math.inf for w in weights) or not 0 < sum(weights) < math.inf:
        raise ValueError(
            f"teacher_weights is {weights}; it takes finite numbers of at least 0, one above"
        )
    kept = [(t, w / sum(weights)) for t, w in zip(teachers, weights, strict=True) if w > 0]
    return [t for t, _ in kept], [w for _, w in kept]


def check_entries(student, values, indices):
    """Values and indices of a top-k teacher."""
    check_type("teacher_values", values, TENSOR)
    check_type("teacher_indices", indices, TENSOR)
    check_floating("teacher_values", values)
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"teacher_indices has dtype {indices.dtype}; it takes int32 or int64")
    if values.dim() == 0 or values.shape[:-1] != student.shape[:-1]:
        raise ValueError(
            f"teacher_values has shape {list(values.shape)}; it takes "
            f"[{', '.join(map(str, student.shape[:-1]))}, K]"
        )
    if not 1 <= values.shape[-1] <= MAX_TOP_K:
        raise ValueError(
            f"teacher_values has shape {list(values.shape)}; it takes 1 to {MAX_TOP_K} a row"
        )
    if indices.shape != values.shape:
        raise ValueError(
            f"teacher_indices has shape {list(indices.shape)}, teacher_values {list(values.shape)}"
        )
    _check_device("teacher_values", values, student)
    _check_device("teacher_indices", indices, student)


def check_logsumexp(student, logsumexp, tail, kind, temperature):
    """teacher_logsumexp, which goes with some tails and kinds of values only."""
    check_type("teacher_logsumexp", logsumexp, OPTIONAL_TENSOR)
    if logsumexp is not None:
        if tail == "renormalize":
            raise ValueError('teacher_logsumexp does not go with tail="renormalize"')
        check_floating("teacher_logsumexp", logsumexp)
        _check_rows("teacher_logsumexp", logsumexp, student)
    elif tail != "renormalize" and (
        kind != "log_probs" or isinstance(temperature, Tensor) or temperature != 1
    ):
        raise ValueError(
            f'teacher_logsumexp is None; tail="{tail}" needs it, but for teacher_kind="log_probs" '
            "at temperature 1"
        )


def check_transform(side, scale, cap):
    """Scale and cap of one side; side: "" or "teacher_"."""
    what = "a finite number above 0"
    check_range(f"{side}logit_scale", scale, what, 0, math.inf, open_=True)
    if cap is not None:
        check_range(f"{side}soft_cap", cap, what, 0, math.inf, open_=True)


def check_numbers(temperature, alpha, labels, label_smoothing, num_items, reduction):
    """The options that are numbers."""
    check_type("label_smoothing", label_smoothing, NUMBER)
    check_type("num_items", 1 if num_items is None else num_items, NUMBER)
    check_range("temperature", temperature, "a number from 1e-15 to 1e15", 1e-15, 1e15)
    if alpha is not None:
        check_range("alpha", alpha, "a number in [0, 1]", 0, 1)
    if labels is None and alpha is not None and (isinstance(alpha, Tensor) or alpha != 1):
        raise ValueError(f"alpha is {alpha} without labels")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing is {label_smoothing}; it takes a number in [0, 1]")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction is "{reduction}"; it takes "mean", "sum" or "none"')
    if num_items is not None and reduction != "mean":
        raise ValueError(f'num_items goes with reduction="mean" only, not "{reduction}"')
    if isinstance(num_items, Tensor) and (num_items.numel() != 1 or num_items.is_complex()):
        raise ValueError("num_items is a tensor that is no real scalar; it takes a number")
    if num_items is not None and not isinstance(num_items, Tensor) and not 0 < num_items < math.inf:
        raise ValueError(f"num_items is {num_items}; it takes a finite number above 0")


def check_range(name, value, what, least, largest, open_=False):
    """A number, or a tensor of numbers per row, within limits; infinity never is."""
    if not isinstance(value, Tensor):
        check_type(name, value, NUMBER)
    elif value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} has dtype {value.dtype}; it takes a real dtype")
    x = torch.as_tensor(value)
    fits = ((least < x) if open_ else (least <= x)) & (x <= largest) & (x < math.inf)
    if not fits.all():
        raise ValueError(f"{name} is {value}; it takes {what}")
