"""The noise's std by the step."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kdkernels.errors import NUMBER, check_count, check_number, fits

Std = float | Tensor | Callable[[Any], float | Tensor]


def neelakantan(eta: float = 0.3, gamma: float = 0.55) -> Callable:
    """std at step t = sqrt(eta / (1 + t)^gamma) (Neelakantan et al., arXiv 1511.06807, eq. 1-2).

    Their etas are 0.01, 0.3 and 1, their gamma is 0.55.
    """
    check_number("eta", eta)
    check_number("gamma", gamma)
    return partial(_neelakantan, eta=float(eta), gamma=float(gamma))


def _neelakantan(t, eta, gamma):
    if isinstance(t, Tensor):
        return torch.sqrt(eta / (1 + t.double()) ** gamma)
    return math.sqrt(eta / (1 + t) ** gamma)


def cosine(std: float, steps: int, final: float = 0.0) -> Callable:
    """From std to final in `steps` steps along half a cosine, then final."""
    check_number("std", std)
    check_number("final", final)
    check_count("steps", steps)
    return partial(_cosine, std=float(std), steps=int(steps), final=float(final))


def _cosine(t, std, steps, final):
    if isinstance(t, Tensor):
        turn = torch.cos(math.pi * (t.double() / steps).clamp(max=1))
    else:
        turn = math.cos(math.pi * min(t / steps, 1))
    return final + (std - final) * (1 + turn) / 2


def exponential(std: float, decay: float) -> Callable:
    """std * decay^t."""
    check_number("std", std)
    check_number("decay", decay)
    return partial(_exponential, std=float(std), decay=float(decay))


def _exponential(t, std, decay):
    return std * decay ** (t.double() if isinstance(t, Tensor) else t)


def value_at(std: Std, step: int | Tensor) -> float | Tensor:
    """std at a step; a number is checked."""
    value = std(step) if callable(std) else std
    if type(value) is float and 0 <= value < math.inf:
        return value
    if isinstance(step, Tensor) and isinstance(value, Tensor):
        return value
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"std has shape {list(value.shape)}; it must have one element")
    if not fits(value, NUMBER):
        raise TypeError(f"std is a {type(value).__name__} at step {step}; it must be {NUMBER}")
    value = float(value)
    if not 0 <= value < math.inf:
        raise ValueError(f"std is {value} at step {step}; it must be a finite number of at least 0")
    return value


def check_std(std: Std):
    """A number is checked here, a schedule at each step."""
    if not callable(std):
        check_number("std", std)
