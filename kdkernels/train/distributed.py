"""One run on several processes, PyTorch's own way: torchrun starts them, DDP or FSDP2 trains.

    torchrun --nproc-per-node=4 -m kdkernels distill --parallel fsdp2

Every rank runs the same program on its share of each batch, and the result is that of one process,
to rounding: a step's loss is the mean over the whole batch, BatchNorm takes its mean and variance
from the whole batch, dropout draws the whole batch's mask and takes the rank's rows of it, noise
is a function of where a number stands in the whole. Rank 0 alone writes files and prints. Gloo
carries CPU tensors, NCCL CUDA ones.
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
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from kdkernels.noise.shards import rows_of_batch
from kdkernels.train import TrainError

__all__ = ["PARALLEL", "Ranks", "current", "engine", "first_to_say", "like", "was_cut", "whole"]

PARALLEL = ("ddp", "fsdp2")
"""DistributedDataParallel, or fully_shard: each rank keeps its share of weights and moments."""

_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

_Found = TypeVar("_Found")


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The processes of a run, this one among them. A process alone is rank 0 of 1.

    Attributes:
        rank: of this process, from 0.
        world: how many there are.
        local: of this process among those of its machine: the number of its GPU.
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

    def batch(self, count: int):
        """A context for the forward pass of this rank's share of ``count`` samples.

        What the model draws or measures over its batch is that of all ``count``.
        """
        return contextlib.nullcontext() if self.world == 1 else _WholeBatch(self, count)


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
        store=dist.PrefixStore("kdkernels", store), rank=rank, world_size=world,
        timeout=datetime.timedelta(hours=2),  # the others wait while rank 0 reads and writes files
    )  # fmt: skip
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


def engine(model: nn.Module, parallel: str, device: torch.device, skips: bool = False) -> nn.Module:
    """What to train instead of ``model`` on several ranks; alone, the model itself.

    Args:
        model: whole, the same on each rank.
        parallel: ``"ddp"``: a wrapper around the model. ``"fsdp2"``: a sharded copy, block by
            block where the model has a list of them; :func:`whole` gives its tensors back.
        device: the model's.
        skips: whether the loss leaves parameters out, for which DDP then looks in each step.
    """
    if current().world == 1:
        return model
    _share(model)
    if device.type == "cuda":  # on the CPU _WholeBatch does its work
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if parallel == "ddp":
        return nn.parallel.DistributedDataParallel(model, find_unused_parameters=skips)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 0:
            raise TrainError(
                f"--parallel fsdp2 requires parameters of at least one dimension, and {name} has "
                "none: use --parallel ddp"
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


def _share(model: nn.Module) -> None:
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


# ---- the whole batch -----------------------------------------------------------------------------


class _Sum(torch.autograd.Function):
    """The sum over ranks, whose gradient is the sum of their gradients."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient):
        return _Sum.apply(gradient)


# What draws a number for each element of its first argument.
_DRAWING = {
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
    F.rrelu, F.gumbel_softmax, torch.rand_like, torch.randn_like, torch.bernoulli,
}  # fmt: skip
_DRAWING_IN_PLACE = {
    torch.Tensor.bernoulli_, torch.Tensor.normal_, torch.Tensor.uniform_,
    torch.Tensor.exponential_,
}  # fmt: skip
_DRAWING_OF_SIZE = {torch.rand, torch.randn}
# What draws inside, where no mode reaches.
_RECURRENT = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}


class _WholeBatch(TorchFunctionMode):
    """Inside, what a forward pass draws or measures over the batch is that of the whole batch.

    That is dropout and what else draws a number a sample (stochastic depth), the noise of
    kdkernels, and on the CPU BatchNorm, for which PyTorch's SyncBatchNorm takes CUDA tensors only.
    Samples are expected along the first dimension. Ranks draw alike, so their generators stay
    alike.
    """

    def __init__(self, ranks: Ranks, count: int):
        super().__init__()
        self.count, self.rows = count, ranks.share(count)
        self.own = self.rows.stop - self.rows.start
        self._noise = rows_of_batch(self.rows.start, self.own, ranks.world)

    def __enter__(self):
        self._noise.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._noise.__exit__(None, None, None)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.batch_norm and kwargs.get("training") and not args[0].is_cuda:
            kwargs.pop("training")
            return self._batch_norm(*args, **kwargs)
        if function in _DRAWING and kwargs.get("training", True) and self._samples(args[0]):
            x = args[0]
            kwargs.pop("inplace", None)
            return function(self._among_all(x), *args[1:], **kwargs)[self._place(x)]
        if function in _DRAWING_IN_PLACE and self._samples(args[0]):
            x = args[0]
            drawn = function(self._among_all(x), *args[1:], **kwargs)
            return x.copy_(drawn[self._place(x)])
        if function in _DRAWING_OF_SIZE:
            kept = dict(kwargs)
            size = kept.pop("size", args[0] if args and not isinstance(args[0], int) else args)
            if len(size) > 0 and self._samples(torch.empty(size[0], 0)):
                whole = (size[0] // self.own * self.count, *size[1:])
                return function(whole, **kept)[self._place(torch.empty(size[0], 0))]
        self._refuse(function, args, kwargs)
        return function(*args, **kwargs)

    def _refuse(self, function, args, kwargs) -> None:
        if function is F.scaled_dot_product_attention:
            draws = kwargs.get("dropout_p", 0) > 0
        elif function is F.multi_head_attention_forward:
            dropout = args[10] if len(args) > 10 else kwargs["dropout_p"]
            draws = kwargs.get("training", True) and dropout > 0
        elif function in _RECURRENT:  # the dropout's share is the only float, and training is next
            place = next(i for i, value in enumerate(args) if isinstance(value, float))
            draws = args[place] > 0 and args[place + 1]
        else:
            return
        if draws:
            raise TrainError(
                f"{function.__name__} with dropout draws a mask of its own on each rank: take a "
                "model without, or one process"
            )

    def _samples(self, x: torch.Tensor) -> bool:
        return x.dim() > 0 and len(x) > 0 and len(x) % self.own == 0

    def _place(self, x: torch.Tensor) -> slice:
        """Where this rank's rows stand among all, several a sample or one."""
        each = len(x) // self.own
        return slice(self.rows.start * each, self.rows.stop * each)

    def _among_all(self, x: torch.Tensor) -> torch.Tensor:
        """The whole batch's rows, 0 but for those of this rank."""
        # torch draws in the order of memory, which channels_last images have their own of.
        layout = torch.contiguous_format
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            layout = torch.channels_last
        rows = len(x) // self.own * self.count
        everything = x.new_zeros(rows, *x.shape[1:]).contiguous(memory_format=layout)
        everything[self._place(x)] = x
        return everything

    def _batch_norm(
        self, x, running_mean, running_var, weight=None, bias=None, momentum=0.1, eps=1e-5
    ):
        """``torch.nn.functional.batch_norm`` in training, over all ranks' rows."""
        over = [0, *range(2, x.dim())]
        shape = [1, -1, *[1] * (x.dim() - 2)]
        total = x.numel() // x.shape[1] // self.own * self.count
        # Sums in fp64, as PyTorch has them on the CPU.
        mean = _Sum.apply(x.sum(over, dtype=torch.float64)) / total
        centred = x - mean.to(x.dtype).view(shape)
        variance = _Sum.apply(centred.square().sum(over, dtype=torch.float64)) / total
        out = centred * (variance + eps).rsqrt().to(x.dtype).view(shape)
        if weight is not None:
            out = out * weight.view(shape)
        if bias is not None:
            out = out + bias.view(shape)
        if running_mean is not None:
            with torch.no_grad():
                unbiased = variance * (total / max(total - 1, 1))
                running_mean.mul_(1 - momentum).add_(momentum * mean.to(x.dtype))
                running_var.mul_(1 - momentum).add_(momentum * unbiased.to(x.dtype))
        return out
