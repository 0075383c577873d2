"""What takes 16 random bits per element: dropout and stochastic rounding."""

import torch
from torch import Tensor

from kdkernels.errors import NUMBER, check
from kdkernels.noise.arguments import call_op, noise_of, noise_of_list
from kdkernels.noise.shards import PLAIN, first_in_batch, like_shard


def stochastic_round(
    x: Tensor,
    dtype: torch.dtype = torch.bfloat16,
    *,
    seed: int | None = None,
    step: int | Tensor = 0,
    stream: int = 0,
    offset: int = 0,
) -> Tensor:
    """x in a dtype of fewer bits, each element rounded up or down by chance; its mean is x.

    It is rounded away from 0 with the probability of what is cut off, to a multiple of 2^-16 (Gupta
    et al., arXiv 1502.02551): updates too small for bf16 then add up, where rounding to nearest
    loses them. What dtype can hold stays as it is, as do infinities and NaN; finite numbers beyond
    the largest one become that. e4m3 has no infinity, which becomes NaN.

    Args:
        x: fp32, any shape; a DTensor gives one of the same placements. Not differentiable: call it
            under ``torch.no_grad()``, or detach x.
        dtype: bfloat16, float16, float8_e4m3fn or float8_e5m2.
        seed, step, stream, offset: see the module. The bits are others than those that noise of
            the same numbers is made of, and equal for any sharding.

    Returns:
        A tensor of x's shape and memory format.

    Example:
        >>> kdkernels.stochastic_round(torch.full((6,), 1.001), seed=0)
        tensor([1.0000, 1.0000, 1.0000, 1.0000, 1.0078, 1.0000], dtype=torch.bfloat16)
        >>> kdkernels.stochastic_round(torch.full((10000,), 1.001), seed=0).float().mean()
        tensor(1.0010)
    """
    return _on_one("stochastic_round", x, dtype, seed, step, stream, offset)


def dropout(
    x: Tensor,
    p: float = 0.5,
    *,
    seed: int | None = None,
    step: int | Tensor = 0,
    stream: int = 0,
    offset: int = 0,
) -> Tensor:
    """x with elements zeroed with probability p, and the others divided by 1 - p.

    No mask is kept: backward makes the same bits again (Srivastava et al., JMLR 2014). An element's
    bits are those of its place in the whole tensor, so that ranks that share one, by tensor or
    context parallelism, drop what one rank would: pass ``offset``.

    Args:
        x: any shape, fp32, fp64, bf16 or fp16. Differentiable, also twice.
        p: from 0 to 1; it is rounded to a multiple of 2^-16, and so is what the others are divided
            by, so that the mean of the result is x.
        seed, step, stream, offset: see the module. The bits are others than those that noise or
            rounding of the same numbers is made of.

    Returns:
        A tensor of x's shape and memory format; an element that is dropped is 0 even where x is not
        finite.

    Example:
        >>> kdkernels.dropout(torch.ones(8), 0.5, seed=0)
        tensor([2., 2., 0., 0., 0., 2., 0., 0.])
        >>> kdkernels.dropout(torch.ones(4), 0.5, seed=0, offset=4)  # a shard of it
        tensor([0., 2., 0., 0.])
    """
    check("p", p, NUMBER)
    return _on_one("dropout", x, float(p), seed, step, stream, offset)


def _on_one(op: str, x: Tensor, option, seed, step, stream, offset) -> Tensor:
    """An op on one tensor, which may be a shard or a rank's part of a batch."""
    if first := first_in_batch(x):
        offset += first
    if isinstance(x, Tensor) and type(x) not in PLAIN and hasattr(x, "placements"):
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError("x is a DTensor that requires grad; pass its local tensor and offset")
        [local], *noise = noise_of_list([x], seed, step, stream, offset, "normal")
        return like_shard(call_op(op, local, option, *noise), x)
    return call_op(op, x, option, *noise_of(seed, step, "normal", (stream,), (offset,)))
