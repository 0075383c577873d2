"""What a forward pass on one rank's share of a batch draws and measures, as one process would.

BatchNorm takes its mean and variance from the whole batch; dropout draws the whole batch's mask and
takes the rank's rows of it.
"""

import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from kdkernels.noise.shards import rows_of_batch
from kdkernels.train import TrainError


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
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.alpha_dropout,
    F.feature_alpha_dropout,
    F.rrelu,
    F.gumbel_softmax,
    torch.rand_like,
    torch.randn_like,
    torch.bernoulli,
}
_DRAWING_IN_PLACE = {
    torch.Tensor.bernoulli_,
    torch.Tensor.normal_,
    torch.Tensor.uniform_,
    torch.Tensor.exponential_,
}
_DRAWING_OF_SIZE = {torch.rand, torch.randn}
# What draws inside, where no mode reaches.
_RECURRENT = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}


class WholeBatch(TorchFunctionMode):
    """Inside, what a forward pass draws or measures over the batch is that of the whole batch.

    That is dropout and all else that draws a number per sample (stochastic depth), the noise of
    kdkernels, and on the CPU BatchNorm, for which PyTorch's SyncBatchNorm takes CUDA tensors only.
    Samples are expected along the first dimension, this rank's ``rows`` among ``count``. Ranks draw
    alike, so their generators stay alike.
    """

    def __init__(self, rows: slice, count: int):
        super().__init__()
        self.count, self.rows = count, rows
        self.own = rows.stop - rows.start
        self._noise = rows_of_batch(rows.start, self.own, dist.get_world_size())

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
