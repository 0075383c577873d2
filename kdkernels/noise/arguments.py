"""The arguments of the noise functions, as the ops take them, and calls of ops."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from kdkernels import _C
from kdkernels.errors import (
    BOOL,
    DTYPE,
    INT,
    INTS,
    LIST,
    NUMBER,
    OPTIONAL_TENSOR,
    STRING,
    TENSOR,
    check,
    explain,
    fits,
    for_floats,
)
from kdkernels.noise.shards import PLAIN, shard_of

# In the order of math::Distribution.
DISTRIBUTIONS = ("normal", "uniform", "rademacher", "truncated_normal", "laplace")

OPS = torch.ops.kdkernels
# What the ops' arguments must be; they bear the public names, or `noise`.
_KINDS = {
    **dict.fromkeys(("x", "coefficients", "seeds"), TENSOR),
    "std_tensor": OPTIONAL_TENSOR,
    "tensors": LIST,
    "std": NUMBER,
    "multiplicative": BOOL,
    "dtype": DTYPE,
}


def call_op(name: str, *values):
    """Op `name`: the plain function, or the registered op where a tracer has to see it."""
    if is_compiling():
        first, *rest = values
        if isinstance(first, list):
            first = [for_floats(tensor, rest) for tensor in first]
        else:
            first = for_floats(first, rest)
        return getattr(OPS, name)(first, *rest)
    try:
        return getattr(_C, name)(*values)
    except TypeError as error:
        raise explain(error, **_by_name(name, values)) from None


def _by_name(name: str, values: Sequence) -> dict[str, tuple[object, str]]:
    """What each argument of an op is and must be."""
    schema = getattr(OPS, name).default._schema
    given = {a.name: value for a, value in zip(schema.arguments, values, strict=True)}
    seed, step, _, streams, offsets, *rest = given.pop("noise")
    out: dict[str, tuple[object, str]]
    out = {k: (value, _KINDS[k]) for k, value in given.items() if k in _KINDS}
    if name == "add_noise_":
        del out["std"]  # a list, which is checked already
    out |= {"seed": (seed, INT), "step": (step, INT), "stream": (rest[:streams], INTS)}
    return out | {"offset": (rest[streams : streams + offsets], INTS)}


def noise_of(seed, step, distribution, streams, offsets, runs=()) -> tuple[list, list]:
    """(noise, noise_tensors), as all ops take them: see csrc/ops/noise_numbers.h."""
    tensors: list[Any] = []
    if seed is None:
        # A tensor, so that a traced graph draws another seed each time it runs.
        tensors, seed = [_drawn_seed()], 0
    elif isinstance(seed, int):
        seed = signed(seed)
    elif isinstance(seed, Tensor) and (seed.dim() > 0 or not seed.is_cpu):
        tensors, seed = [seed], 0
    if type(step) is not int and isinstance(step, Tensor):
        tensors, step = [tensors[0] if tensors else None, step], 0
    numbers = [seed, step, distribution_index(distribution), len(streams), len(offsets)]
    return [*numbers, *streams, *offsets, *runs], tensors


def noise_of_list(tensors: list[Tensor], seed, step, stream, offset, distribution) -> tuple:
    """(local tensors, noise, noise_tensors), as ops on lists take them."""
    streams = stream if isinstance(stream, (list, tuple)) else (stream,)
    offsets = offset if isinstance(offset, (list, tuple)) else (offset,)
    for tensor in tensors:
        if type(tensor) not in PLAIN:
            break
    else:
        return tensors, *noise_of(seed, step, distribution, streams, offsets)
    if per_row(seed, step):
        raise ValueError("seed or step is per row, which a DTensor does not take; pass an int")
    shards = [shard_of(tensor) for tensor in tensors]
    if len(offsets) == 1:
        offsets = list(offsets) * len(tensors)
    if len(offsets) == len(tensors):
        offsets = [o + shard[1] for o, shard in zip(offsets, shards, strict=True)]
    runs = [number for shard in shards for number in shard[2:]]
    runs = runs if any(runs) else ()
    local = [shard[0] for shard in shards]
    return local, *noise_of(seed, step, distribution, streams, offsets, runs)


def per_row(seed, step) -> bool:
    """Whether the rows of a tensor have seeds or steps of their own."""
    return any(isinstance(number, Tensor) and number.numel() != 1 for number in (seed, step))


def signed(seed: int, name: str = "seed") -> int:
    """A seed as the int64 of the same bits."""
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"{name} is {seed}; it must be an int in [-2^63, 2^64)")
    return seed - 2**64 if seed >= 2**63 else seed


def _drawn_seed() -> Tensor:
    # On the CPU, whatever torch's default device is.
    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device="cpu")


def fixed_seed(seed: int | None, name: str = "seed") -> int:
    """The seed itself, or for None a random one, as an int that several calls can share."""
    if seed is None:
        return int(_drawn_seed())
    check(name, seed, INT)
    return signed(seed.__index__(), name)


def distribution_index(name: str) -> int:
    """The place of a distribution in math::Distribution."""
    if isinstance(name, str) and name in DISTRIBUTIONS:
        return DISTRIBUTIONS.index(name)
    check("distribution", name, STRING)
    raise ValueError(f'distribution is "{name}"; it must be one of {", ".join(DISTRIBUTIONS)}')


def tensors_of(name: str, tensors: Tensor | Iterable[Tensor]) -> list[Tensor]:
    """One tensor or several as a list; the list is checked."""
    if type(tensors) is not list and isinstance(tensors, Tensor):
        return [tensors]
    if not hasattr(tensors, "__iter__") or isinstance(tensors, (str, bytes)):
        kind = type(tensors).__name__
        raise TypeError(f"{name} is a {kind}; it must be a tensor or a sequence of tensors")
    tensors = list(tensors)
    for tensor in tensors:
        if type(tensor) not in PLAIN and not isinstance(tensor, Tensor):
            raise TypeError(f"{name} holds a {type(tensor).__name__}; it must hold tensors")
    return tensors


def stds_of(std) -> tuple:
    """(std, std_tensor), as add_noise_ takes them."""
    if type(std) is float and std >= 0:
        return [std], None
    if isinstance(std, Tensor):
        if not std.is_floating_point():
            raise TypeError(f"std has dtype {std.dtype}; as a tensor it must be a floating one")
        std = std.detach().reshape(-1) if std.dim() == 0 else std.detach()
        return [0.0], std.to(torch.float64)
    if isinstance(std, (int, float, str, bytes)) or not hasattr(std, "__iter__"):
        stds = [std]
    else:
        stds = list(std)
    for value in stds:
        if not fits(value, NUMBER):
            raise TypeError(f"std holds a {type(value).__name__}; it must hold numbers")
    stds = [float(value) for value in stds]
    for value in stds:
        if value < 0:
            raise ValueError(f"std is {value}; it must be finite and 0 or more")
    return stds, None
