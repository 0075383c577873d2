"""Checks of arguments in Python, with errors that name them; floats that change while traced."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

TENSOR, OPTIONAL_TENSOR, NUMBER, INT = "a tensor", "a tensor or None", "a number", "an int"
LIST, NUMBERS = "a list", "a sequence of numbers"
INTS = "an int or a sequence of ints"
OPTIONAL_NUMBER, STRING, BOOL, DTYPE = "a number or None", "a string", "a bool", "a torch.dtype"


def fits(value, kind: str) -> bool:
    """Whether a value is of a kind, one of this module's constants."""
    if kind == LIST:
        return isinstance(value, list)
    if kind == NUMBERS:
        return isinstance(value, (list, tuple)) and all(fits(item, NUMBER) for item in value)
    if kind == STRING:
        return isinstance(value, str)
    if kind == DTYPE:
        return isinstance(value, torch.dtype)
    if kind == BOOL:
        return isinstance(value, bool)
    if kind == OPTIONAL_NUMBER and value is None:
        return True
    if kind in (NUMBER, OPTIONAL_NUMBER):
        return (hasattr(value, "__float__") or hasattr(value, "__index__")) and _is_one(value)
    if kind == INT:
        return hasattr(value, "__index__") and _is_one(value) and not _is_float(value)
    return isinstance(value, Tensor) or (kind == OPTIONAL_TENSOR and value is None)


def _is_one(value) -> bool:
    """Whether a value is a single real number; arrays have __float__, too."""
    if isinstance(value, (int, float)):
        return True
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex() and not value.is_meta
    return getattr(value, "ndim", 0) == 0


def _is_float(value) -> bool:
    """Whether a value of a type with a dtype is a float, whose __index__ would raise."""
    if isinstance(value, int):
        return False
    if isinstance(value, Tensor):
        return value.is_floating_point()
    return getattr(getattr(value, "dtype", None), "kind", "") == "f"


def check(name: str, value, kind: str):
    """Raise a TypeError that names the argument unless the value is of the kind."""
    if not fits(value, kind):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be {kind}")


def check_number(name: str, value, low: float = 0.0, high: float = math.inf):
    """A finite number or one-element tensor of at least low and below high."""
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"{name} has shape {list(value.shape)}; it must have one element")
    check(name, value, NUMBER)
    if not low <= float(value) < high:
        below = "" if high == math.inf else f" and below {high:g}"
        raise ValueError(
            f"{name} is {float(value):g}; it must be a finite number of at least {low:g}{below}"
        )


def check_count(name: str, value):
    """An int of at least 1."""
    check(name, value, INT)
    if value < 1:
        raise ValueError(f"{name} is {value}; it must be at least 1")


@torch.compiler.allow_in_graph
def _uncached(x: Tensor) -> Tensor:
    """The tensor; a graph with a function of no known name is not looked up in PyTorch's cache."""
    return x


def for_floats(x: Tensor, values: Iterable) -> Tensor:
    """The tensor, for a graph of torch.compile in which its op also takes ``values``.

    PyTorch 2.14 makes a graph anew for each number of a float that may change, and then takes an
    older one, of another number, from its cache.
    """
    from torch.fx.experimental.symbolic_shapes import has_static_value  # slow to import

    for value in values:
        for number in value if isinstance(value, list | tuple) else (value,):
            if isinstance(number, float) and not has_static_value(number):
                return _uncached(x)
    return x


def explain(error: TypeError, **arguments: tuple[object, str]) -> Exception:
    """An error that names an argument, for the binding's refusal of a call, which names none.

    Args:
        error: what the call raised; another error than that refusal is returned as it is.
        arguments: name -> (value, its kind: one of this module's constants).
    """
    if "incompatible function arguments" not in str(error):
        return error
    for name, (value, kind) in arguments.items():
        items: Any = value if kind == INTS else [value]
        for item in items:
            if not fits(item, INT if kind == INTS else kind):
                return TypeError(f"{name} is a {type(item).__name__}; it must be {kind}")
            if kind in (INT, INTS) and not -(2**63) <= item.__index__() < 2**63:
                return ValueError(f"{name} is {item}; it is out of range")
    return error
