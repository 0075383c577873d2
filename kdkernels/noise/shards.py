"""A DTensor's place in the noise of the whole tensor, and that of a rank's samples in a batch's."""

import functools
import math
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

PLAIN = (Tensor, nn.Parameter)


def shard_of(tensor: Any) -> tuple[Tensor, int, int, int]:
    """A tensor's elements on this rank and their place in the whole tensor's row-major order.

    Returns:
        (local, offset, run, stride): element i of the local tensor is number
        ``offset + i // run * stride + i % run`` of the whole; with run 0 it is ``offset + i``. A
        tensor that is not a DTensor, or is replicated, is whole: (tensor, 0, 0, 0).

    Raises:
        ValueError: the DTensor holds partial sums, or its local elements do not lie in runs of one
            length and distance, as when it is sharded along two inner dimensions.
    """
    if type(tensor) in PLAIN or not hasattr(tensor, "placements"):
        return tensor, 0, 0, 0
    local = tensor.to_local()
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return local, 0, 0, 0
    cuts = zip(tensor.placements, mesh.shape, coordinate, strict=True)
    place = place_of(tuple(tensor.shape), tuple(cuts))
    if math.prod(place[0]) != local.numel():
        raise ValueError(
            f"a DTensor of shape {list(tensor.shape)} and placements {tensor.placements} has "
            f"{local.numel()} elements on this rank; expected {list(place[0])}"
        )
    return local, *place[1:]


@functools.lru_cache(maxsize=4096)
def place_of(shape: tuple[int, ...], cuts: tuple) -> tuple[tuple[int, ...], int, int, int]:
    """(local shape, offset, run, stride) after cuts, each (placement, ranks, this one's index)."""
    # On the CPU, whatever torch's default device is.
    rows = [torch.arange(n, device="cpu") for n in shape]
    for placement, ranks, index in cuts:
        if placement.is_replicate():
            continue
        if placement.is_partial() or not hasattr(placement, "dim"):
            raise ValueError(
                f"a DTensor has the placement {placement}; noise requires whole values, sharded or "
                "replicated: redistribute it first"
            )
        # _StridedShard: the dimension was cut into split_factor parts before.
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
    # From the innermost: a level that continues the one before is merged with it.
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
    """torch.chunk, but always with `count` chunks."""
    size = -(-len(x) // count)
    return [x[i * size : (i + 1) * size] for i in range(count)]


def _regular(x: Tensor) -> list[tuple[int, int]]:
    """Increasing numbers as nested (count, distance) from the innermost."""
    gaps = torch.diff(x)
    run = int((gaps != 1).nonzero()[0]) + 1 if bool((gaps != 1).any()) else len(x)
    if len(x) % run == 0:
        starts = x[::run]
        outer = torch.diff(starts)
        made = starts[:, None] + torch.arange(run, device="cpu")
        if torch.equal(made.reshape(-1), x) and (
            len(outer) == 0 or bool((outer == outer[0]).all())
        ):
            return [(run, 1), (len(starts), int(outer[0]) if len(outer) else 1)]
    raise ValueError("a DTensor is cut unevenly by _StridedShard; shard it in another order")


def like_shard(local: Tensor, tensor: Any) -> Tensor:
    """A local tensor as this rank's shard of a DTensor like `tensor`."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=torch.empty(tensor.shape, device="meta").stride(),
    )


_batch: tuple[int, int, int] | None = None


@contextmanager
def rows_of_batch(first: int, count: int, ranks: int) -> Generator[None]:
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


def first_in_batch(x: Tensor) -> int:
    """The number of x's first element in the batch that it is a part of."""
    if _batch is None or x.dim() == 0 or len(x) % _batch[1] != 0:
        return 0
    return x.numel() // _batch[1] * _batch[0]


def ranks_of_batch() -> int:
    """The number of ranks whose gradients of samples are averaged."""
    return 1 if _batch is None else _batch[2]
