"""A parameter list on its devices: its parts, their places in the noise, and norms over ranks."""

import math
from collections.abc import Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdkernels.noise.arguments import distribution_index
from kdkernels.noise.shards import shard_of


def local_of(tensor: Any) -> Tensor:
    """This rank's part of a DTensor, once it is there."""
    if hasattr(tensor, "to_local"):
        tensor = tensor.to_local()
    return tensor.wait() if hasattr(tensor, "wait") else tensor


def sharing_groups(tensor: Any) -> tuple:
    """The process groups that a DTensor's elements are divided among."""
    if not hasattr(tensor, "placements"):
        return ()
    mesh = tensor.device_mesh
    return tuple(
        mesh.get_group(dim)
        for dim, placement in enumerate(tensor.placements)
        if placement.is_shard() and mesh.size(dim) > 1
    )


class Part:
    """The parameters of one device that have a gradient, and their places in the noise."""

    def __init__(self, params: Sequence[Tensor], groups: Sequence[int], where: Sequence[int]):
        self.where = where  # places in the list of all parameters: their streams
        self.states: list[dict[str, Any]] = []
        self.groups = [groups[i] for i in where]
        shards = [shard_of(params[i]) for i in where]
        self.offsets = [offset for _, offset, _, _ in shards]
        self.runs = [number for _, _, run, stride in shards for number in (run, stride)]
        self.sharded = any(
            local is not params[i] for i, (local, *_) in zip(where, shards, strict=True)
        )
        if not any(self.offsets):
            self.offsets = [0]
        if not any(self.runs):
            self.runs = []
        counts = [len(self.where), len(self.offsets)]
        self.places = [*counts, *self.where, *self.offsets, *self.runs]
        self.sharers = [sharing_groups(params[i]) for i in where]
        self.device = shards[0][0].device
        self.empty = shards[0][0].new_empty(0)
        # On the device from the start: a copy from the host could not be captured.
        self.group_index = torch.tensor(self.groups, device=self.device)

    def noise(self, seed: int, step: int, distribution: str) -> list[int]:
        """The part's noise as ops take it: see csrc/ops/noise_numbers.h."""
        return [seed, step, distribution_index(distribution), *self.places]

    def of(self, tensors: list[Any]) -> list[Tensor]:
        """This part's share of a list of all parameters' tensors."""
        if len(self.where) != len(tensors):
            tensors = [tensors[i] for i in self.where]
        return [local_of(t) for t in tensors] if self.sharded else tensors


class Layout:
    """The parts of an optimizer's parameters, kept until parameters or gradients change."""

    def __init__(self):
        self.params: list[Tensor] = []
        self.key: tuple = ()
        self.parts: list[Part] = []

    def __call__(self, groups: list[dict]) -> tuple[list[Tensor], list[Tensor | None], bool]:
        """(all parameters, their gradients, whether the parts are new)."""
        params = [p for group in groups for p in group["params"]]
        grads = [p.grad for p in params]
        key = ([g is None for g in grads], [len(group["params"]) for group in groups])
        if key == self.key and all(map(is_, params, self.params)):
            return params, grads, False
        group_of = [k for k, group in enumerate(groups) for _ in group["params"]]
        devices: dict[torch.device, list[int]] = {}
        for i, (p, g) in enumerate(zip(params, grads, strict=True)):
            if g is None:
                continue
            if getattr(g, "placements", None) != getattr(p, "placements", None):
                raise ValueError(
                    f"the gradient of parameter {i} is placed {getattr(g, 'placements', None)}, "
                    f"the parameter {getattr(p, 'placements', None)}; they must have one placement"
                )
            devices.setdefault(p.device, []).append(i)
        self.parts = [Part(params, group_of, where) for where in devices.values()]
        self.params, self.key = params, key
        return params, grads, True


class NoiseNorms(NamedTuple):
    """L2 norms over one parameter group, across all ranks that share it."""

    gradient: float
    noise: float

    @property
    def ratio(self) -> float:
        """noise / gradient; infinite where only the gradient is 0, NaN where both are."""
        if self.gradient == 0:
            return math.inf if self.noise > 0 else math.nan
        return self.noise / self.gradient


def norms_of(parts: Sequence[Part], squares: Sequence[Tensor], groups: int) -> list[NoiseNorms]:
    """One per group, from each part's [n, 2] sums of squares."""
    shared: dict[tuple, Tensor] = {}
    for part, rows in zip(parts, squares, strict=True):
        for sharers in dict.fromkeys(part.sharers):
            mine = [k for k, other in enumerate(part.sharers) if other == sharers]
            sums = rows.new_zeros(groups, 2).index_add_(0, part.group_index[mine], rows[mine])
            sums = sums if sharers else sums.cpu()
            shared[sharers] = shared[sharers] + sums if sharers in shared else sums
    total = torch.zeros(groups, 2, dtype=torch.float64, device="cpu")
    for sharers, sums in shared.items():
        for process_group in sharers:
            torch.distributed.all_reduce(sums, group=process_group)
        total += sums.cpu()
    return [NoiseNorms(*row) for row in total.sqrt().tolist()]


def on_device(values: Sequence[float | Tensor], device: torch.device) -> Tensor | None:
    """fp64 [groups] if there is a tensor among them."""
    if not any(isinstance(v, Tensor) for v in values):
        return None
    kind = {"dtype": torch.float64, "device": device}
    # A fill can be captured, unlike a copy of a number from the host.
    scalars = [v if isinstance(v, Tensor) else torch.full((), v, **kind) for v in values]
    return torch.stack([scalar.to(**kind).reshape(()) for scalar in scalars])


def refuse_gradients(params: Sequence[Tensor], error: Exception) -> Exception:
    """An error that names the gradient that a kernel refused, or else the kernel's error."""
    for i, p in enumerate(params):
        g = p.grad
        if g is None:
            continue
        if g.layout != torch.strided:
            return TypeError(f"the gradient of parameter {i} is sparse; it must be dense")
        if g.dtype != p.dtype or g.is_complex():
            return TypeError(
                f"the gradient of parameter {i} is {g.dtype}, the parameter {p.dtype}; they "
                "must have one dtype, fp32, fp64, bf16 or fp16"
            )
    return error
