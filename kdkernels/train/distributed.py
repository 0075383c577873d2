"""One run on several processes, PyTorch's own way: torchrun starts them, DDP or FSDP2 trains.

    torchrun --nproc-per-node=4 -m kdkernels distill --parallel fsdp2

Every rank runs the same program on its share of each batch: a step's loss is the mean over the
whole batch, and kdkernels' noise is a function of where a number stands in it. BatchNorm and
dropout are each rank's own, as DDP and FSDP2 have them; with ``exact`` they are those of the whole
batch, and the result is that of one process, to rounding. Rank 0 alone writes files and prints.
Gloo carries CPU tensors, NCCL CUDA ones.
"""

import atexit
import contextlib
import copy
import dataclasses
import datetime
import functools
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from kdkernels.noise.shards import rows_of_batch
from kdkernels.train import TrainError
from kdkernels.train.whole_batch import WholeBatch

_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

_Found = TypeVar("_Found")


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The processes of a run: this one is ``rank`` of ``world``, alone 0 of 1.

    ``local`` is its number among those of its machine: that of its GPU.
    """

    rank: int = 0
    world: int = 1
    local: int = 0

    def share(self, count: int) -> slice:
        """This rank's part of ``count`` things in a row; parts differ in length by 1 at most."""
        return slice(count * self.rank // self.world, count * (self.rank + 1) // self.world)

    def sum(self, numbers: list[float]) -> list[float]:
        """The sums over ranks of numbers that each has; the same bits on all."""
        if self.world == 1:
            return numbers
        total = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def first(self, function: Callable[[], _Found]) -> _Found:
        """What ``function()`` gives on rank 0, or its TrainError, on every rank."""
        if self.world == 1:
            return function()
        sent: list[Any] = [None, None]
        if self.rank == 0:
            try:
                sent[0] = function()
            except TrainError as error:
                sent[1] = error
        dist.broadcast_object_list(sent, src=0, device=torch.device("cpu"))
        found, error = sent
        if error is not None:
            raise error
        return found

    def gather(self, rows: torch.Tensor, count: int) -> torch.Tensor:
        """All ``count`` rows in order, of which each rank has its :meth:`share`."""
        if self.world == 1:
            return rows
        longest = -(-count // self.world)
        own = rows.new_zeros(longest, *rows.shape[1:])
        own[: len(rows)] = rows
        parts = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(parts, own)
        shares = (Ranks(rank, self.world).share(count) for rank in range(self.world))
        return torch.cat([p[: s.stop - s.start] for p, s in zip(parts, shares, strict=True)])

    def batch(self, count: int, exact: bool):
        """A context for the forward pass of this rank's share of ``count`` samples.

        The noise of kdkernels' layers is that of these rows among all ``count``; with ``exact``,
        all else that the model draws or measures over its batch is so, too.
        """
        if self.world == 1:
            return contextlib.nullcontext()
        rows = self.share(count)
        if exact:
            return WholeBatch(rows, count)
        return rows_of_batch(rows.start, rows.stop - rows.start, self.world)


@functools.cache
def _started() -> tuple[Ranks, dist.Store | None]:
    if not dist.is_available() or not (
        dist.is_initialized() or all(name in os.environ for name in _TORCHRUN)
    ):
        return Ranks(), None
    local = int(os.environ.get("LOCAL_RANK", 0))
    if dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size(), local), None
    if int(os.environ["WORLD_SIZE"]) == 1:
        return Ranks(), None
    store, rank, world = next(dist.rendezvous("env://"))
    cuda = torch.cuda.is_available() and dist.is_nccl_available()
    if cuda:
        torch.cuda.set_device(local)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=dist.PrefixStore("kdkernels", store),
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(hours=2),  # the others wait while rank 0 reads and writes files
    )
    atexit.register(dist.destroy_process_group)
    return Ranks(rank, world, local), store


def current() -> Ranks:
    """The ranks of this process's run: torchrun's, joined on the first call, or one alone.

    A group that the program has joined already is taken as it is.
    """
    return _started()[0]


def first_to_say() -> bool:
    """Whether this rank is the first of its run to ask: the one that says why the run ends."""
    ranks, store = _started()
    if store is None:
        return ranks.rank == 0
    try:
        return store.add("kdkernels-said", 1) == 1
    except RuntimeError:  # the process that keeps the store has ended, and has said why
        return False


def was_cut(error: Exception) -> bool:
    """Whether an error is of a collective that another rank did not live to join."""
    words = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe")
    return (
        current().world > 1
        and isinstance(error, RuntimeError)
        and any(word in str(error) for word in words)
    )


# ---- engines -------------------------------------------------------------------------------------


def engine(
    model: nn.Module, parallel: str, device: torch.device, skips: bool = False, exact: bool = False
) -> nn.Module:
    """What to train instead of ``model`` on several ranks; alone, the model itself.

    ``model`` is whole and the same on each rank. ``parallel``: ``"ddp"``, a wrapper around it, or
    ``"fsdp2"``, a sharded copy, block by block where the model has a list of them; :func:`whole`
    gives its tensors back. ``skips``: the loss leaves parameters out, for which DDP then looks in
    each step. ``exact``: BatchNorm takes its mean and variance from the whole batch.
    """
    if current().world == 1:
        return model
    share(model)
    if exact and device.type == "cuda":  # on the CPU WholeBatch does its work
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if parallel == "ddp":
        return nn.parallel.DistributedDataParallel(model, find_unused_parameters=skips)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 0:
            raise TrainError(
                f"parallel fsdp2 requires parameters of at least one dimension, and {name} has "
                "none: use parallel ddp"
            )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (current().world,))
    # It takes row-major weights only; a convolution of channels_last images wants no other.
    sharded = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    for part in sharded.children():
        if isinstance(part, (nn.Sequential, nn.ModuleList)):
            for block in part:
                if any(True for _ in block.parameters()):
                    fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    return sharded


def share(model: nn.Module) -> None:
    """Give all ranks rank 0's weights, buffers and extra state, such as seeds drawn at random."""
    extra = {}
    for name, value in model.state_dict().items():
        if isinstance(value, torch.Tensor) and not name.endswith("_extra_state"):
            sent = value.detach().contiguous()
            dist.broadcast(sent, 0)
            value.copy_(sent)
        else:
            extra[name] = value
    sent = [extra]
    dist.broadcast_object_list(sent, src=0, device=torch.device("cpu"))
    model.load_state_dict(sent[0], strict=False)


def whole(tensor: Any) -> torch.Tensor:
    """A tensor as one process would have it; all ranks must ask for a DTensor's together."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def like(tensor: torch.Tensor, other: Any) -> torch.Tensor:
    """A new tensor with a whole tensor's values, placed and laid out as ``other`` is.

    What is no tensor, such as a module's extra state, is given back.
    """
    if not isinstance(tensor, torch.Tensor):
        return tensor
    if not hasattr(other, "placements"):
        return torch.empty_like(other).copy_(tensor)
    from torch.distributed.tensor import distribute_tensor

    tensor = tensor.to(other.device, other.dtype)
    # Each rank has the whole, and cuts out its own part.
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)
