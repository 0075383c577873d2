"""Noise that is a pure function of (seed, stream, step, element index).

The number of element i of a tensor is made of the words of Philox4x32-10 (Salmon et al., SC 2011)
at the counter (i // 4 low, i // 4 high, stream, step) under the key (seed low, seed high): the
normal of word pair (i % 4) // 2 through the Box-Muller transform, the other distributions of word
i % 4. Elements count in row-major order whatever the strides. Nothing is stored: the same
arguments give the same bits on every CPU and GPU, for any number of threads and any sharding.

Philox passes TestU01's BigCrush, but it is not a cryptographic generator: whoever knows some of
the numbers may find the key, so noise from here makes no claim of privacy.

All functions share these keyword arguments:

seed
    An int in [-2^63, 2^64). None draws one from torch's default generator, so
    ``torch.manual_seed`` governs it; two calls then differ.
step
    The training step, in [0, 2^32). An int, or an int64 scalar tensor on the noise's device,
    which a captured CUDA graph reads anew at each replay. Advance it outside of a function
    that torch.compile traces: a backward pass in there may read the later number.
stream
    The tensor's own number, in [0, 2^32): a parameter's index in its list.
offset
    Global index of the tensor's first element, for a shard of a larger tensor.
distribution
    "normal", "uniform" on [-sqrt(3), sqrt(3)], "rademacher" (-1 or 1), "truncated_normal" (cut off
    at two standard deviations, and scaled) or "laplace". Each has mean 0 and variance 1, so that a
    std means the same for all.

Functions on a list of tensors give tensor k the stream ``stream + k``, so leaving others out does
not shift its noise as long as its stream is given; stream and offset may also be one number a
tensor. A DTensor takes its slice of the whole tensor's noise, so that any mesh gives the same.

Bad numbers raise ValueError and bad dtypes TypeError, naming the argument; x and tensors take fp32,
fp64, bf16 and fp16 on CPU and CUDA. 16-bit tensors are added to in fp32 and rounded once.
"""

import functools
import math
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kdkernels import _C
from kdkernels.errors import (
    BOOL,
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

DISTRIBUTIONS = ("normal", "uniform", "rademacher", "truncated_normal", "laplace")

# The eager functions take their arguments by position; a tracer sees the registered ops.
_OPS = torch.ops.kdkernels
_NOISE = ("seed", "step", "stream", "offset", "seed_tensor", "step_tensor", "distribution")
_NOISE_LIST = ("seed", "step", "streams", "offsets", "runs", *_NOISE[4:])
_ARGUMENTS = {  # those by position, those by keyword
    "randn_like": (("x",), _NOISE),
    "input_noise": (("x", "std_tensor", "std"), (*_NOISE, "multiplicative")),
    "gradient_noise": (("x", "std_tensor", "std"), (*_NOISE, "multiplicative")),
    "add_noise_": (("tensors", "std"), (*_NOISE_LIST, "multiplicative", "std_tensor", "norms")),
    "noise_dot": (("tensors",), _NOISE_LIST),
    "_scaled_noise": (("tensors", "scales"), _NOISE_LIST),
    "combine_noise_": (
        ("tensors", "coefficients", "seeds"),
        ("step", "streams", "offsets", "runs", "step_tensor", "distribution"),
    ),
}
# What an argument takes, and the public name of one that has another.
_KINDS = {
    **dict.fromkeys(("x", "coefficients", "seeds"), (TENSOR, None)),
    **dict.fromkeys(("seed", "step", "stream", "offset"), (INT, None)),
    **dict.fromkeys(("std_tensor", "seed_tensor", "step_tensor"), (OPTIONAL_TENSOR, None)),
    "tensors": (LIST, None),
    "std": (NUMBER, None),
    "streams": (INTS, "stream"),
    "offsets": (INTS, "offset"),
    "multiplicative": (BOOL, None),
}


def _call(name: str, *values):
    """Op `name` on its arguments in order."""
    if torch.compiler.is_compiling():
        by_position, by_keyword = _ARGUMENTS[name]
        count = len(by_position)
        first = values[0]
        if isinstance(first, list):
            first = [for_floats(tensor, values[1:]) for tensor in first]
        else:
            first = for_floats(first, values[1:])
        values = (first, *values[1:])
        keywords = dict(zip(by_keyword, values[count:], strict=True))
        return getattr(_OPS, name)(*values[:count], **keywords)
    try:
        return getattr(_C, name)(*values)
    except TypeError as error:
        by_position, by_keyword = _ARGUMENTS[name]
        arguments = {}
        for argument, value in zip((*by_position, *by_keyword), values, strict=True):
            if argument in _KINDS and not (argument == "std" and name == "add_noise_"):
                kind, public = _KINDS[argument]
                arguments[public or argument] = (value, kind)
        raise explain(error, **arguments) from None


# ---- arguments -----------------------------------------------------------------------------------


def _seed_and_step(seed, step) -> tuple:
    """(seed, step, seed_tensor, step_tensor), as every op takes them."""
    seed_tensor = step_tensor = None
    if seed is None:
        # A tensor, so that a traced graph draws anew each time it runs.
        seed_tensor, seed = _drawn_seed(), 0
    elif isinstance(seed, int):
        seed = _signed(seed)
    if isinstance(step, Tensor):
        step_tensor, step = step, 0
    return seed, step, seed_tensor, step_tensor


def _signed(seed: int) -> int:
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed is {seed}; it takes an int in [-2^63, 2^64)")
    return seed - 2**64 if seed >= 2**63 else seed


def _drawn_seed() -> Tensor:
    # On the CPU whatever torch's default device is.
    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device="cpu")


def _fixed_seed(seed: int | None) -> int:
    """A seed that several calls share."""
    if seed is None:
        return int(_drawn_seed())
    check("seed", seed, INT)
    return _signed(seed.__index__())


def _distribution(name: str) -> int:
    for number, known in enumerate(DISTRIBUTIONS):
        if name == known:
            return number
    check("distribution", name, STRING)
    raise ValueError(f'distribution is "{name}"; it takes one of {", ".join(DISTRIBUTIONS)}')


def _noise(seed, step, stream, offset, distribution) -> tuple:
    """The last arguments of an op on one tensor."""
    seed, step, seed_tensor, step_tensor = _seed_and_step(seed, step)
    return seed, step, stream, offset, seed_tensor, step_tensor, _distribution(distribution)


def _tensors(name: str, tensors: Tensor | Iterable[Tensor]) -> list[Tensor]:
    if not isinstance(tensors, Tensor) and not hasattr(tensors, "__iter__"):
        kind = type(tensors).__name__
        raise TypeError(f"{name} is a {kind}; it takes a tensor or a sequence of tensors")
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} holds a {type(tensor).__name__}; it takes {TENSOR}")
    return tensors


def _places(tensors: list[Tensor], stream, offset) -> tuple:
    """(local tensors, streams, offsets, runs), as ops on lists take them."""
    streams = list(stream) if isinstance(stream, (list, tuple)) else [stream]
    offsets = list(offset) if isinstance(offset, (list, tuple)) else [offset]
    for tensor in tensors:
        if type(tensor) not in _PLAIN:
            break
    else:
        return tensors, streams, offsets, []
    shards = [shard_of(tensor) for tensor in tensors]
    if len(offsets) == 1:
        offsets *= len(tensors)
    if len(offsets) == len(tensors):
        offsets = [o + shard[1] for o, shard in zip(offsets, shards, strict=True)]
    runs = [number for shard in shards for number in shard[2:]]
    return [shard[0] for shard in shards], streams, offsets, runs if any(runs) else []


def _stds(std) -> tuple:
    """(std, std_tensor), as add_noise_ takes them."""
    if type(std) is float and std >= 0:
        return [std], None
    if isinstance(std, Tensor):
        if not std.is_floating_point():
            raise TypeError(f"std has dtype {std.dtype}; as a tensor it takes a floating one")
        std = std.detach().reshape(-1) if std.dim() == 0 else std.detach()
        return [0.0], std.to(torch.float64)
    stds = [std] if isinstance(std, (int, float)) or not hasattr(std, "__iter__") else list(std)
    for value in stds:
        if not fits(value, NUMBER):
            raise TypeError(f"std holds a {type(value).__name__}; it takes {NUMBER}")
    stds = [float(value) for value in stds]
    for value in stds:
        if value < 0:
            raise ValueError(f"std is {value}; it takes a finite number, 0 or more")
    return stds, None


# ---- shards --------------------------------------------------------------------------------------

_PLAIN = (Tensor, nn.Parameter)


def shard_of(tensor: Any) -> tuple[Tensor, int, int, int]:
    """A tensor's elements on this rank and their place in the whole tensor's row-major order.

    Returns:
        (local, offset, run, stride): element i of the local tensor is number
        ``offset + i // run * stride + i % run`` of the whole; with run 0 it is ``offset + i``. A
        tensor that is no DTensor, or a replicated one, is all here: (tensor, 0, 0, 0).

    Raises:
        ValueError: for a DTensor that holds partial sums, or whose elements here do not lie in
            runs of one length and distance, such as one sharded along two inner dimensions.
    """
    if type(tensor) in _PLAIN or not hasattr(tensor, "placements"):
        return tensor, 0, 0, 0
    local = tensor.to_local()
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return local, 0, 0, 0
    cuts = zip(tensor.placements, mesh.shape, coordinate, strict=True)
    place = _place(tuple(tensor.shape), tuple(cuts))
    if math.prod(place[0]) != local.numel():
        raise ValueError(
            f"a DTensor of shape {list(tensor.shape)} and placements {tensor.placements} has "
            f"{local.numel()} elements here; expected {list(place[0])}"
        )
    return local, *place[1:]


@functools.lru_cache(maxsize=4096)
def _place(shape: tuple[int, ...], cuts: tuple) -> tuple[tuple[int, ...], int, int, int]:
    """(local shape, offset, run, stride) after cuts, each (placement, ranks, this one's index)."""
    rows = [torch.arange(n) for n in shape]
    for placement, ranks, index in cuts:
        if placement.is_replicate():
            continue
        if placement.is_partial() or not hasattr(placement, "dim"):
            raise ValueError(
                f"a DTensor has the placement {placement}; noise takes whole numbers, sharded or "
                "replicated: redistribute it first"
            )
        # _StridedShard: as if the dimension had been cut into split_factor parts before.
        parts = _chunks(rows[placement.dim], getattr(placement, "split_factor", 1))
        rows[placement.dim] = torch.cat([_chunks(part, ranks)[index] for part in parts])
    local_shape = tuple(len(r) for r in rows)
    if 0 in local_shape:
        return local_shape, 0, 0, 0
    levels, offset, inner = [], 0, 1
    for size, r in zip(reversed(shape), reversed(rows), strict=True):
        offset += int(r[0]) * inner
        levels += [(count, distance * inner) for count, distance in _regular(r)]
        inner *= size
    # From the innermost: levels that go on where the one before ends are one.
    merged = [(1, 1)]
    for count, distance in levels:
        last, step = merged[-1]
        if last == 1:
            merged[-1] = (count, distance) if count != 1 else merged[-1]
        elif count != 1 and distance == last * step:
            merged[-1] = (last * count, step)
        elif count != 1:
            merged.append((count, distance))
    if merged[0][1] != 1:
        merged.insert(0, (1, 1))
    if len(merged) > 2:
        raise ValueError(
            f"a DTensor of shape {list(shape)} is cut by {[str(cut[0]) for cut in cuts]} into "
            "elements that do not lie in equal runs at equal distances; shard it along one "
            "dimension, or along the first and one other"
        )
    run, stride = (merged[0][0], merged[1][1]) if len(merged) == 2 else (0, 0)
    return local_shape, offset, run, stride


def _chunks(x: Tensor, count: int) -> list[Tensor]:
    """torch.chunk, always of so many."""
    size = -(-len(x) // count)
    return [x[i * size : (i + 1) * size] for i in range(count)]


def _regular(x: Tensor) -> list[tuple[int, int]]:
    """Increasing numbers as nested (count, distance) from the innermost."""
    gaps = torch.diff(x)
    run = int((gaps != 1).nonzero()[0]) + 1 if bool((gaps != 1).any()) else len(x)
    if len(x) % run == 0:
        starts = x[::run]
        outer = torch.diff(starts)
        made = starts[:, None] + torch.arange(run)
        if torch.equal(made.reshape(-1), x) and (
            len(outer) == 0 or bool((outer == outer[0]).all())
        ):
            return [(run, 1), (len(starts), int(outer[0]) if len(outer) else 1)]
    raise ValueError("a DTensor is cut unevenly by _StridedShard; shard it in another order")


def _like(local: Tensor, tensor: Any) -> Tensor:
    """A local tensor as the shard of a DTensor like `tensor`."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=torch.empty(tensor.shape, device="meta").stride(),
    )


# ---- ranks ---------------------------------------------------------------------------------------

_batch: tuple[int, int, int] | None = None


@contextmanager
def _rows_of_batch(first: int, count: int, ranks: int) -> Generator[None]:
    """A context in which tensors hold ``count`` samples of a batch, from number ``first`` on.

    Their noise is then that of the whole batch, which several ranks share. Gradients of samples
    are ``ranks`` times what they are in one process, since their mean is taken over ranks.
    """
    global _batch
    before, _batch = _batch, (first, count, ranks)
    try:
        yield
    finally:
        _batch = before


def _first_of(x: Tensor) -> int:
    """The number of x's first element in the batch that it is a part of."""
    if _batch is None or x.dim() == 0 or len(x) % _batch[1] != 0:
        return 0
    return x.numel() // _batch[1] * _batch[0]


# ---- functions -----------------------------------------------------------------------------------


def randn_like(
    x: Tensor,
    *,
    seed: int | None = None,
    step: int | Tensor = 0,
    stream: int = 0,
    offset: int = 0,
    distribution: str = "normal",
) -> Tensor:
    """Noise of x's shape, dtype and device, contiguous; x's values are not read.

    Args:
        x: any shape; a DTensor gives one of the same placements.
        seed, step, stream, offset, distribution: see the module.

    Example:
        >>> kdkernels.randn_like(torch.empty(4), seed=0)
        tensor([ 0.9911, -0.9247, -0.6176, -0.4821])
        >>> kdkernels.randn_like(torch.empty(2), seed=0, offset=2)  # a shard of it
        tensor([-0.6176, -0.4821])
    """
    if _batch is not None:
        offset += _first_of(x)
    noise = _noise(seed, step, stream, offset, distribution)
    if isinstance(x, Tensor) and type(x) not in _PLAIN and hasattr(x, "placements"):
        [local], streams, offsets, runs = _places([x], stream, offset)
        one = torch.ones(1, dtype=torch.float64, device=local.device)
        noise = (*noise[:2], streams, offsets, runs, *noise[4:])
        return _like(_call("_scaled_noise", [local.detach()], one, *noise)[0], x)
    return _call("randn_like", x, *noise)


def add_noise_(
    tensors: Tensor | Sequence[Tensor],
    std: float | Sequence[float] | Tensor,
    *,
    seed: int | None = None,
    step: int | Tensor = 0,
    stream: int | Sequence[int] = 0,
    offset: int | Sequence[int] = 0,
    distribution: str = "normal",
    multiplicative: bool = False,
) -> None:
    """Add std * eps to each tensor in place; on CUDA in one launch a dtype.

    Call it under ``torch.no_grad()`` where a tensor requires grad.

    Args:
        tensors: a tensor or a list of them, of any shapes and dtypes, on one device, apart in
            memory.
        std: standard deviation, finite and 0 or more: one number, or one a tensor; or a tensor of
            one or of one a tensor, ``[]``, ``[1]`` or ``[len(tensors)]``, on their device, whose
            values are not checked.
        multiplicative: multiply each tensor by 1 + std * eps instead.
        seed, step, stream, offset, distribution: see the module.

    Example:
        >>> tensors = [torch.zeros(2), torch.ones(3)]
        >>> kdkernels.add_noise_(tensors, [0.1, 0.2], seed=0, distribution="rademacher")
        >>> tensors
        [tensor([ 0.1000, -0.1000]), tensor([0.8000, 0.8000, 1.2000])]
    """
    tensors = _tensors("tensors", tensors)
    stds, std_tensor = _stds(std)
    _add(tensors, stds, std_tensor, seed, step, stream, offset, distribution, multiplicative)


def _add(tensors, stds, std_tensor, seed, step, stream, offset, distribution, multiplicative=False):
    """add_noise_ with whatever sign of std."""
    seed, step, seed_tensor, step_tensor = _seed_and_step(seed, step)
    local, streams, offsets, runs = _places(tensors, stream, offset)
    _call(
        "add_noise_",
        local,
        stds,
        seed,
        step,
        streams,
        offsets,
        runs,
        seed_tensor,
        step_tensor,
        _distribution(distribution),
        multiplicative,
        std_tensor,
        None,
    )


def input_noise(
    x: Tensor,
    std: float | Tensor,
    *,
    seed: int | None = None,
    step: int | Tensor = 0,
    stream: int = 0,
    offset: int = 0,
    distribution: str = "normal",
    multiplicative: bool = False,
) -> Tensor:
    """x + std * eps, in x's memory format. Backward hands x's gradient on unchanged.

    Args:
        x: any shape.
        std: a number, finite and 0 or more; or a tensor on x's device of one element or of a shape
            that broadcasts to x's, such as one std a row, ``[N, 1]``, or one a channel of images,
            ``[C, 1, 1]``. It may require grad: its gradient is sum eps_i g_i over the elements
            that share a std, with eps made again rather than kept. A tensor's values are not
            checked.
        multiplicative: x * (1 + std * eps) instead, Gaussian dropout for the normal (Srivastava et
            al., JMLR 2014, section 10); backward multiplies alike.
        seed, step, stream, offset, distribution: see the module.

    Example:
        >>> images, std = torch.rand(8, 3, 4, 4), torch.full((3, 1, 1), 0.1, requires_grad=True)
        >>> kdkernels.input_noise(images, std, seed=0).mean().backward()
        >>> std.grad.shape
        torch.Size([3, 1, 1])
    """
    std_tensor = None
    if isinstance(std, Tensor):
        std_tensor, std = std, 0.0
    if _batch is not None:
        offset += _first_of(x)
    noise = _noise(seed, step, stream, offset, distribution)
    return _call("input_noise", x, std_tensor, std, *noise, multiplicative)


def gradient_noise(
    x: Tensor,
    std: float | Tensor,
    *,
    seed: int | None = None,
    step: int | Tensor = 0,
    stream: int = 0,
    offset: int = 0,
    distribution: str = "normal",
    multiplicative: bool = False,
) -> Tensor:
    """x itself; backward adds std * eps to its gradient (Neelakantan et al., arXiv 1511.06807).

    Every backward pass through it adds the noise, so that of a second derivative, too.

    Args:
        x: any shape. The result is a view of it: clone it before an operation in place.
        std: as of ``input_noise``; no gradient flows to it.
        multiplicative: multiply the gradient by 1 + std * eps instead.
        seed, step, stream, offset, distribution: see the module.
    """
    if _batch is not None:
        offset += _first_of(x)
        std = std if multiplicative else std * _batch[2]
    std_tensor = None
    if isinstance(std, Tensor):
        std_tensor, std = std, 0.0
    noise = _noise(seed, step, stream, offset, distribution)
    return _call("gradient_noise", x, std_tensor, std, *noise, multiplicative)


def noise_dot(
    tensors: Tensor | Sequence[Tensor],
    *,
    seed: int | None = None,
    step: int | Tensor = 0,
    stream: int | Sequence[int] = 0,
    offset: int | Sequence[int] = 0,
    distribution: str = "normal",
) -> Tensor:
    """The sum of eps_i * x_i over all elements of all tensors, with eps made in registers.

    Differentiable, also twice: it is linear, and its gradient is eps. With x a gradient it is the
    directional derivative along eps, of which forward gradients (Baydin et al., arXiv 2202.08587)
    and ``soft_regularization`` are made.

    Args:
        tensors: a tensor or a list of them on one device. Of a DTensor's shards every element
            counts once; all ranks of its mesh must call, and all get the sum.
        seed, step, stream, offset, distribution: see the module.

    Returns:
        A scalar: fp64 if a tensor is, else fp32; added up in fp64.
    """
    tensors = _tensors("tensors", tensors)
    seed, step, seed_tensor, step_tensor = _seed_and_step(seed, step)
    local, *places = _places(tensors, stream, offset)
    sums = _call(
        "noise_dot",
        local,
        seed,
        step,
        *places,
        seed_tensor,
        step_tensor,
        _distribution(distribution),
    )
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    if local is tensors:
        total = sums.sum()
    else:
        total = _sum_over_meshes(tensors, sums)
    return total if wide else total.float()


def _sum_over_meshes(tensors: list, sums: Tensor) -> Tensor:
    """The sum of numbers that ranks hold parts of, each as its tensor is sharded."""
    groups = {}
    for tensor, part in zip(tensors, sums.unbind(), strict=True):
        placements = getattr(tensor, "placements", ())
        sharded = tuple(not placement.is_replicate() for placement in placements)
        mesh = tensor.device_mesh if any(sharded) else None
        groups.setdefault((mesh, sharded if any(sharded) else ()), []).append(part)
    total = sums.new_zeros(())
    for (mesh, sharded), parts in groups.items():
        part = torch.stack(parts).sum()
        if mesh is not None:
            from torch.distributed.tensor import DTensor, Partial, Replicate

            kinds = [Partial() if cut else Replicate() for cut in sharded]
            part = DTensor.from_local(part, mesh, kinds, run_check=False).full_tensor()
        total = total + part
    return total


def combine_noise_(
    tensors: Tensor | Sequence[Tensor],
    coefficients: Sequence[float] | Tensor,
    seeds: Sequence[int] | Tensor,
    *,
    step: int | Tensor = 0,
    stream: int | Sequence[int] = 0,
    offset: int | Sequence[int] = 0,
    distribution: str = "normal",
) -> None:
    """Add sum_k coefficients[k] * eps(seeds[k]) to each tensor, in one pass for any K.

    Every eps is made in registers, so memory is read and written once: the update of evolution
    strategies (Salimans et al., arXiv 1703.03864) and of MeZO (Malladi et al., arXiv 2305.17333).
    The terms are added in order, and the sum is rounded once into the tensor. Call it under
    ``torch.no_grad()`` where a tensor requires grad.

    Args:
        tensors: as of ``add_noise_``.
        coefficients: ``[K]`` finite numbers, or a tensor of them, here or on the tensors' device.
        seeds: ``[K]`` ints in [-2^63, 2^64), or an int64 tensor of them.
        step, stream, offset, distribution: see the module.
    """
    tensors = _tensors("tensors", tensors)
    if not isinstance(coefficients, Tensor):
        coefficients = torch.tensor(_numbers("coefficients", coefficients), dtype=torch.float64)
    if not coefficients.is_floating_point():
        raise TypeError(f"coefficients has dtype {coefficients.dtype}; it takes a floating one")
    if not isinstance(seeds, Tensor):
        seeds = torch.tensor(
            [_fixed_seed(seed) for seed in _sequence("seeds", seeds)], dtype=torch.int64
        )
    _, step, _, step_tensor = _seed_and_step(0, step)
    local, *places = _places(tensors, stream, offset)
    _call(
        "combine_noise_",
        local,
        coefficients.to(torch.float64),
        seeds,
        step,
        *places,
        step_tensor,
        _distribution(distribution),
    )


def _sequence(name: str, values) -> list:
    if not hasattr(values, "__iter__") or isinstance(values, str):
        raise TypeError(f"{name} is a {type(values).__name__}; it takes a sequence or a tensor")
    return list(values)


def _numbers(name: str, values) -> list[float]:
    values = _sequence(name, values)
    for value in values:
        if not fits(value, NUMBER):
            raise TypeError(f"{name} holds a {type(value).__name__}; it takes {NUMBER}")
        if not math.isfinite(value):
            raise ValueError(f"{name} holds {value}; it takes finite numbers")
    return [float(value) for value in values]


@contextmanager
def perturbed_parameters(
    params: Tensor | Iterable[Tensor],
    scale: float,
    *,
    seed: int | None = None,
    step: int | Tensor = 0,
    stream: int | Sequence[int] = 0,
    offset: int | Sequence[int] = 0,
    distribution: str = "normal",
    restore: str = "copy",
) -> Generator[None]:
    """A context in which params are theta + scale * eps; on leaving they are theta again.

    That is so also when the body raises. A backward pass through what the body computed belongs
    inside: autograd notices that the parameters have changed since.

    Args:
        params: parameters, on one device, apart in memory.
        scale: a finite number; -scale gives the antithetic pair.
        restore: "copy" keeps a copy of params, and theta has its own bits back. "regenerate" keeps
            nothing and subtracts the same noise: an element is then off by at most half an ulp of
            theta + scale * eps plus half an ulp of what it comes back to, each time (16-bit ones by
            a rounding in fp32 more), and what overflowed is lost.
        seed, step, stream, offset, distribution: see the module.

    Example:
        >>> with kdkernels.perturbed_parameters(model.parameters(), 1e-3, seed=0):
        ...     loss = loss_fn(model(x), y)
    """
    if restore not in ("copy", "regenerate"):
        raise ValueError(f'restore is "{restore}"; it takes "copy" or "regenerate"')
    check("scale", scale, NUMBER)
    scale = float(scale)
    if not math.isfinite(scale):
        raise ValueError(f"scale is {scale}; it takes a finite number")
    params = _tensors("params", params)
    seed = _fixed_seed(seed)
    if isinstance(step, Tensor):
        step = step.clone()  # the body may advance it

    def add(factor):
        _add(params, [factor], None, seed, step, stream, offset, distribution)

    with torch.no_grad():
        kept = [param.detach().clone() for param in params] if restore == "copy" else None
        add(scale)
    try:
        yield
    finally:
        with torch.no_grad():
            if kept is None:
                add(-scale)
            else:
                for param, old in zip(params, kept, strict=True):
                    param.copy_(old)


def soft_regularization(
    loss_fn: Callable[[], Tensor],
    params: Tensor | Iterable[Tensor],
    lam: float | Tensor,
    *,
    seed: int | None = None,
    step: int | Tensor = 0,
    stream: int | Sequence[int] = 0,
    offset: int | Sequence[int] = 0,
    distribution: str = "normal",
) -> Tensor:
    """L + lam * sum_i eps_i dL/dtheta_i, the loss with its derivative along the noise, exactly.

    To first order that is the loss at theta + lam * eps, but its gradient is that of the derivative
    itself: backward gives grad L + lam * H eps, H the Hessian of L, by one Hessian-vector product
    (Pearlmutter, "Fast exact multiplication by the Hessian", 1994). Give each training step its own
    ``step``, or a seed of None, and the regulariser's mean is zero.
    Inside of torch.compile(fullgraph=True) it needs ``torch._dynamo.config.trace_autograd_ops``;
    else Dynamo breaks the graph there.

    Args:
        loss_fn: called once with gradients enabled; returns a scalar. What it is made of must be
            differentiable twice.
        params: what to regularise. Parameters that the loss does not use count as 0, and shift
            nobody's noise.
        lam: the regulariser's factor, of any sign.
        seed, step, stream, offset, distribution: see the module.

    Returns:
        A scalar in the loss's dtype; without a graph under ``torch.no_grad()``.

    Example:
        >>> loss = kdkernels.soft_regularization(
        ...     lambda: loss_fn(model(x), y), model.parameters(), 1e-2, seed=0, step=3
        ... )
        >>> loss.backward()
    """
    params = _tensors("params", params)
    for k, param in enumerate(params):
        if not param.requires_grad:
            raise ValueError(f"params[{k}] does not require grad; leave it out or let it")
    check("lam", lam, NUMBER)
    with torch.enable_grad():
        loss = loss_fn()
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss_fn returns a {type(loss).__name__}; it takes a scalar tensor")
        if loss.numel() != 1:
            raise ValueError(f"loss_fn returns the shape {list(loss.shape)}; it takes a scalar")
        grads = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
        used = [k for k, grad in enumerate(grads) if grad is not None]
        streams, offsets = (
            [number[k] for k in used] if isinstance(number, (list, tuple)) else number
            for number in (_streams(stream, len(params)), offset)
        )
        derivative = noise_dot(
            [grads[k] for k in used],
            seed=seed,
            step=step,
            stream=streams,
            offset=offsets,
            distribution=distribution,
        )
        total = loss + (lam * derivative).to(loss.dtype)
    return total if torch.is_grad_enabled() else total.detach()


def _streams(stream, count: int) -> list[int]:
    """One stream a tensor."""
    if isinstance(stream, (list, tuple)):
        return list(stream)
    check("stream", stream, INT)
    return [stream + k for k in range(count)]


# ---- modules -------------------------------------------------------------------------------------


class _NoiseLayer(nn.Module):
    """What the modules share: which noise, and their own count of steps."""

    _op: Callable[..., Tensor]
    std: float | Tensor
    step: Tensor

    def __init__(self, seed, stream, distribution, multiplicative):
        super().__init__()
        check("stream", stream, INT)
        if not 0 <= stream < 2**32:
            raise ValueError(f"stream is {stream}; it takes 0 to 2^32 - 1")
        check("multiplicative", multiplicative, BOOL)
        _distribution(distribution)
        self.seed = _fixed_seed(seed)
        self.stream = stream
        self.distribution = distribution
        self.multiplicative = multiplicative
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def reset_parameters(self) -> None:
        """Set step and std to what they were at first, as after ``to_empty``."""
        with torch.no_grad():
            self.step.zero_()
            if isinstance(self.std, Tensor):
                if isinstance(self._first_std, Tensor) and self._first_std.is_meta:
                    raise ValueError("std was given as a meta tensor, which holds no numbers")
                self.std.copy_(torch.as_tensor(self._first_std, device=self.std.device))

    def forward(self, x: Tensor) -> Tensor:
        """The op on x in training mode, and the next step; x itself in evaluation mode."""
        if not self.training:
            return x
        return self._op(
            x,
            self.std,
            seed=self.seed,
            step=_OPS._next_step_(self.step),
            stream=self.stream,
            distribution=self.distribution,
            multiplicative=self.multiplicative,
        )

    def get_extra_state(self):
        return torch.tensor(self.seed, device="cpu")

    def set_extra_state(self, state):
        self.seed = int(state)

    def extra_repr(self):
        std = list(self.std.shape) if isinstance(self.std, Tensor) else self.std
        more = ", multiplicative=True" if self.multiplicative else ""
        return f"std={std}, distribution={self.distribution}, seed={self.seed}{more}"


def _checked_std(std) -> float:
    if not fits(std, NUMBER):
        raise TypeError(f"std is a {type(std).__name__}; it takes {NUMBER} or a tensor")
    std = float(std)
    if not 0 <= std < math.inf:
        raise ValueError(f"std is {std}; it takes a finite number, 0 or more")
    return std


class InputNoise(_NoiseLayer):
    """``input_noise`` as a module: noise in training mode, the input itself in evaluation mode.

    Every forward in training has the next step's noise. state_dict carries the seed and the step,
    so that a resumed run draws what it would have drawn. Ranks that train on data of their own want
    a seed each; where forward runs again under activation checkpointing the step has moved on, so
    call ``input_noise`` there with a step of your own.

    Args:
        std: the noise's standard deviation, finite and 0 or more; or a tensor of a shape that
            broadcasts to the input's.
        learnable: make std a parameter.
        shape: std's shape, all filled with a number std: ``(C, 1, 1)`` for one std a channel.
        multiplicative: x * (1 + std * eps) instead of x + std * eps.
        distribution, stream: see ``kdkernels.noise``.
        seed: an int in [-2^63, 2^64). None draws one from torch's default generator, once, here.

    Example:
        >>> model = nn.Sequential(kdkernels.InputNoise(0.1, seed=0), nn.Linear(64, 10))
        >>> model[0]
        InputNoise(std=0.1, distribution=normal, seed=0)
    """

    _op = staticmethod(input_noise)

    def __init__(
        self,
        std: float | Tensor = 0.1,
        *,
        learnable: bool = False,
        shape: Sequence[int] = (),
        distribution: str = "normal",
        multiplicative: bool = False,
        seed: int | None = None,
        stream: int = 0,
    ):
        super().__init__(seed, stream, distribution, multiplicative)
        check("learnable", learnable, BOOL)
        if isinstance(std, Tensor):
            if not std.is_floating_point():
                raise TypeError(f"std has dtype {std.dtype}; it takes a floating one")
            if tuple(shape) not in ((), tuple(std.shape)):
                raise ValueError(f"shape is {tuple(shape)}, and std has its own, {list(std.shape)}")
            std = std.detach().clone()
            self._first_std = std.clone()
        else:
            self._first_std = std = _checked_std(std)
            if learnable or tuple(shape) != ():
                std = torch.full(tuple(shape), std)
        if learnable:
            self.std = nn.Parameter(torch.as_tensor(std))
        elif isinstance(std, Tensor):
            self.register_buffer("std", std)
        else:
            self.std = std


class GradientNoiseLayer(_NoiseLayer):
    """``gradient_noise`` as a module: noise in the gradient of what it passes on.

    In training mode; steps, state_dict and arguments as of ``InputNoise``.
    """

    @staticmethod
    def _op(x: Tensor, std: float | Tensor, **noise) -> Tensor:
        # A copy: the op's view may not be changed in place, as by ReLU(inplace=True).
        return gradient_noise(x, std, **noise).clone()

    def __init__(
        self,
        std: float = 0.1,
        *,
        distribution: str = "normal",
        multiplicative: bool = False,
        seed: int | None = None,
        stream: int = 0,
    ):
        super().__init__(seed, stream, distribution, multiplicative)
        self.std = _checked_std(std)


# ---- the first experiment ------------------------------------------------------------------------


def noisy_linear_regression(
    x: Tensor,
    y: Tensor,
    theta: float | Tensor,
    *,
    steps: int,
    lr: float | Tensor = 0.01,
    lam: float | Tensor = 0.01,
    sigma: float | Tensor = 1.0,
    seed: int | Tensor,
    noise: str = "per-step",
    stream: int = 0,
    trajectory: bool = False,
) -> Tensor:
    """Gradient descent on y ~ theta (x + e) with fresh input noise e at each step, in one kernel.

    At step t, with e = sigma * eps(seed, stream, t)::

        theta <- theta - lr * (mean_i 2 (theta (x_i + e_i) - y_i) (x_i + e_i) + lam * theta)

    Averaged over the noise this is ridge regression: the mean of theta tends to
    E[xy] / (E[x^2] + sigma^2 + lam / 2) (Bishop, "Training with noise is equivalent to Tikhonov
    regularization", 1995). Computed in fp64; no gradient flows through it.

    Args:
        x, y: ``[n]`` or ``[n, 1]``, n >= 1.
        theta: initial weight, a number, or ``[R]`` for R replicas.
        steps: number of steps, in [0, 2^32).
        lr, lam, sigma: learning rate, weight decay and noise's standard deviation: numbers, or
            ``[R]``.
        seed: an int in [-2^63, 2^64), or int64 ``[R]``: each replica's own noise.
        noise: "per-step" (one normal for all samples, element 0 of the noise) or "per-sample"
            (element i for sample i).
        stream: the noise's stream.
        trajectory: return theta before the first and after every step.

    Returns:
        theta after the last step, in x's dtype: ``[]``, or ``[R]`` where any argument has replicas.
        With ``trajectory`` a leading dimension of ``steps + 1``.

    Example:
        >>> x = torch.linspace(-1, 1, 100, dtype=torch.float64)
        >>> theta = kdkernels.noisy_linear_regression(
        ...     x, 2 * x, 0.0, steps=1000, sigma=0.5, seed=torch.arange(1000)
        ... )
        >>> ridge = 2 * x.square().mean() / (x.square().mean() + 0.5**2 + 0.01 / 2)
        >>> print(f"{theta.mean().item():.2f} {ridge.item():.2f}")
        1.14 1.14
    """
    if noise not in ("per-step", "per-sample"):
        raise ValueError(f'noise is "{noise}"; it takes "per-step" or "per-sample"')
    check("x", x, TENSOR)
    check("y", y, TENSOR)
    if not fits(steps, INT):
        kind = type(steps).__name__
        raise TypeError(f"steps is a {kind}; it takes {INT}: how many steps of the seed's noise")
    if isinstance(seed, int):
        seed = _signed(seed)
    elif not isinstance(seed, Tensor) or seed.dtype != torch.int64:
        kind = seed.dtype if isinstance(seed, Tensor) else type(seed).__name__
        raise TypeError(f"seed is {kind}; it takes an int or an int64 tensor")
    named = {"theta": theta, "lr": lr, "lam": lam, "sigma": sigma}
    floats = tuple(named.values())
    for name, value in named.items():
        if not isinstance(value, Tensor) and not fits(value, NUMBER):
            raise TypeError(f"{name} is a {type(value).__name__}; it takes {NUMBER} or a tensor")
    numbers = [torch.as_tensor(v, dtype=torch.float64, device=x.device) for v in named.values()]
    numbers.append(torch.as_tensor(seed, device=x.device))
    for name, value in zip([*named, "seed"], numbers, strict=True):
        if value.dim() > 1:
            raise ValueError(
                f"{name} has shape {list(value.shape)}; it takes a number or [replicas]"
            )
    try:
        shape = torch.broadcast_shapes(*(v.shape for v in numbers))
    except RuntimeError:
        sizes = {name: list(v.shape) for name, v in zip([*named, "seed"], numbers, strict=True)}
        raise ValueError(f"theta, lr, lam, sigma and seed differ in replicas: {sizes}") from None
    theta, lr, lam, sigma, seed = (v.detach().expand(shape).reshape(-1) for v in numbers)
    call: Any = _C
    if torch.compiler.is_compiling():
        call, x = _OPS, for_floats(x, floats)
    out = call.noisy_linear_regression(
        _samples("x", x),
        _samples("y", y),
        theta,
        lr,
        lam,
        sigma,
        seed,
        steps,
        stream,
        noise == "per-sample",
        trajectory,
    )
    return out.reshape(out.shape[:-1] + shape).to(x.dtype)


def _samples(name: str, values: Tensor) -> Tensor:
    if values.dim() == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.dim() != 1:
        raise ValueError(f"{name} has shape {list(values.shape)}; it takes [n] or [n, 1]")
    return values.detach()
