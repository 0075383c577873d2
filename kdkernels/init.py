"""Initialisers as ``torch.nn.init``'s, with numbers that are a function of their place.

A DTensor gets its slice of the whole tensor's numbers, so that a model begins with the same weights
on every mesh, on every device and in every order of its layers. 16-bit tensors are made in fp32 and
rounded once. Each function fills its tensor in place, without a gradient, and returns it.

seed, step, stream and offset are ``kdkernels.noise``'s: give each parameter a stream of its own, as
``for stream, p in enumerate(model.parameters())``. Fans are those of the whole tensor.
"""

import math
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor
from torch.nn.init import _calculate_fan_in_and_fan_out, calculate_gain

from kdkernels.errors import NUMBER, STRING, TENSOR, check, check_number
from kdkernels.noise.functions import add_noise_

# The standard deviation that is left of a normal within two of them.
_TRUNCATED_STD = 0.8796256610342398


class Place(TypedDict, total=False):
    """Where a tensor's numbers are: see ``kdkernels.noise``."""

    seed: int | None
    step: int
    stream: int
    offset: int


@torch.no_grad()
def _fill(tensor: Tensor, mean: float, std: float, distribution: str, place: Place) -> Tensor:
    check("tensor", tensor, TENSOR)
    check("mean", mean, NUMBER)
    check_number("std", std)
    tensor.fill_(mean)
    add_noise_(tensor, std, distribution=distribution, **place)
    return tensor


def normal_(tensor: Tensor, mean: float = 0.0, std: float = 1.0, **place: Unpack[Place]) -> Tensor:
    """Normal numbers of a mean and a standard deviation.

    Example:
        >>> whole = kdkernels.init.normal_(torch.empty(4), std=0.02, seed=0)
        >>> shard = kdkernels.init.normal_(torch.empty(2), std=0.02, seed=0, offset=2)
        >>> torch.equal(whole[2:], shard)
        True
    """
    return _fill(tensor, mean, std, "normal", place)


def uniform_(tensor: Tensor, a: float = 0.0, b: float = 1.0, **place: Unpack[Place]) -> Tensor:
    """Uniform numbers between a and b, a <= b."""
    for name, value in (("a", a), ("b", b)):
        check(name, value, NUMBER)
    if not a <= b:
        raise ValueError(f"a is {a} and b {b}; a must not be larger")
    return _fill(tensor, (a + b) / 2, (b - a) / math.sqrt(12), "uniform", place)


def trunc_normal_(
    tensor: Tensor, mean: float = 0.0, std: float = 1.0, **place: Unpack[Place]
) -> Tensor:
    """Normal numbers within two standard deviations of the mean.

    As torch's with ``a=mean - 2 * std, b=mean + 2 * std``: std is that of the normal before it is
    cut off, and 0.88 of it is left.
    """
    check_number("std", std)
    return _fill(tensor, mean, std * _TRUNCATED_STD, "truncated_normal", place)


def _std_of_fan(tensor: Tensor, gain: float, mode: str) -> float:
    """gain / sqrt(fan) of a weight."""
    check("tensor", tensor, TENSOR)
    if tensor.dim() < 2:
        raise ValueError(f"tensor has shape {list(tensor.shape)}; it must have two dimensions")
    fan_in, fan_out = _calculate_fan_in_and_fan_out(tensor)
    fans = {"fan_in": fan_in, "fan_out": fan_out, "average": (fan_in + fan_out) / 2}
    return gain / math.sqrt(fans[mode]) if fans[mode] else 0.0


def _he_std(tensor: Tensor, a: float, mode: str, nonlinearity: Any) -> float:
    check("mode", mode, STRING)
    if mode not in ("fan_in", "fan_out"):
        raise ValueError(f'mode is "{mode}"; it must be "fan_in" or "fan_out"')
    return _std_of_fan(tensor, calculate_gain(nonlinearity, a), mode)


def kaiming_normal_(
    tensor: Tensor,
    a: float = 0.0,
    mode: str = "fan_in",
    nonlinearity: str = "leaky_relu",
    **place: Unpack[Place],
) -> Tensor:
    """He et al., arXiv 1502.01852; arguments as in ``torch.nn.init``."""
    return _fill(tensor, 0.0, _he_std(tensor, a, mode, nonlinearity), "normal", place)


def kaiming_uniform_(
    tensor: Tensor,
    a: float = 0.0,
    mode: str = "fan_in",
    nonlinearity: str = "leaky_relu",
    **place: Unpack[Place],
) -> Tensor:
    """``kaiming_normal_``'s standard deviation, uniform."""
    return _fill(tensor, 0.0, _he_std(tensor, a, mode, nonlinearity), "uniform", place)


def xavier_normal_(tensor: Tensor, gain: float = 1.0, **place: Unpack[Place]) -> Tensor:
    """Glorot and Bengio, AISTATS 2010; gain as in ``torch.nn.init``."""
    check_number("gain", gain)
    return _fill(tensor, 0.0, _std_of_fan(tensor, gain, "average"), "normal", place)


def xavier_uniform_(tensor: Tensor, gain: float = 1.0, **place: Unpack[Place]) -> Tensor:
    """``xavier_normal_``'s standard deviation, uniform."""
    check_number("gain", gain)
    return _fill(tensor, 0.0, _std_of_fan(tensor, gain, "average"), "uniform", place)
