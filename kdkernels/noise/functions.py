"""The noise functions; kdkernels.noise says what their common arguments mean."""

import math
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from kdkernels.errors import INT, NUMBER, check, fits
from kdkernels.noise.arguments import (
    call_op,
    fixed_seed,
    noise_of,
    noise_of_list,
    per_row,
    stds_of,
    tensors_of,
)
from kdkernels.noise.shards import PLAIN, first_in_batch, like_shard, ranks_of_batch


def randn_like(
    x: Tensor,
    *,
    seed: int | Tensor | None = None,
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
    if (first := first_in_batch(x)) and not per_row(seed, step):
        offset += first
    if isinstance(x, Tensor) and type(x) not in PLAIN and hasattr(x, "placements"):
        [local], *noise = noise_of_list([x], seed, step, stream, offset, distribution)
        return like_shard(call_op("randn_like", local.detach(), *noise), x)
    return call_op("randn_like", x, *noise_of(seed, step, distribution, (stream,), (offset,)))


def add_noise_(
    tensors: Tensor | Sequence[Tensor],
    std: float | Sequence[float] | Tensor,
    *,
    seed: int | Tensor | None = None,
    step: int | Tensor = 0,
    stream: int | Sequence[int] = 0,
    offset: int | Sequence[int] = 0,
    distribution: str = "normal",
    multiplicative: bool = False,
) -> None:
    """Add std * eps to each tensor in place; on CUDA in one launch per dtype.

    Call it under ``torch.no_grad()`` where a tensor requires grad.

    Args:
        tensors: a tensor or a list of them, of any shapes and dtypes, on one device; they must not
            share memory.
        std: standard deviation, finite and 0 or more: one number, or one per tensor; or a tensor,
            ``[]``, ``[1]`` or ``[len(tensors)]``, on their device, whose values are not checked.
        multiplicative: multiply each tensor by 1 + std * eps instead.
        seed, step, stream, offset, distribution: see the module.

    Example:
        >>> tensors = [torch.zeros(2), torch.ones(3)]
        >>> kdkernels.add_noise_(tensors, [0.1, 0.2], seed=0, distribution="rademacher")
        >>> tensors
        [tensor([ 0.1000, -0.1000]), tensor([0.8000, 0.8000, 1.2000])]
    """
    tensors = tensors_of("tensors", tensors)
    stds, std_tensor = stds_of(std)
    _add(tensors, stds, std_tensor, seed, step, stream, offset, distribution, multiplicative)


def _add(tensors, stds, std_tensor, seed, step, stream, offset, distribution, multiplicative=False):
    """add_noise_ with a std of either sign, for perturbations that are taken back."""
    local, *noise = noise_of_list(tensors, seed, step, stream, offset, distribution)
    call_op("add_noise_", local, stds, std_tensor, multiplicative, *noise, None)


def input_noise(
    x: Tensor,
    std: float | Tensor,
    *,
    seed: int | Tensor | None = None,
    step: int | Tensor = 0,
    stream: int = 0,
    offset: int = 0,
    distribution: str = "normal",
    multiplicative: bool = False,
) -> Tensor:
    """x + std * eps, in x's memory format. Backward passes the gradient to x unchanged.

    Args:
        x: any shape.
        std: a number, finite and 0 or more; or a tensor on x's device of one element or of a shape
            that broadcasts to x's, such as one std per row, ``[N, 1]``, or per channel of images,
            ``[C, 1, 1]``. It may require grad: its gradient is sum eps_i g_i over the elements
            that share a std, with eps made again rather than kept. The values of a tensor are
            not checked.
        multiplicative: x * (1 + std * eps) instead, Gaussian dropout for the normal (Srivastava et
            al., JMLR 2014, section 10); backward multiplies by the same factor.
        seed, step, stream, offset, distribution: see the module.

    Example:
        >>> images, std = torch.rand(8, 3, 4, 4), torch.full((3, 1, 1), 0.1, requires_grad=True)
        >>> kdkernels.input_noise(images, std, seed=0).mean().backward()
        >>> std.grad.shape
        torch.Size([3, 1, 1])
    """
    return _on_one("input_noise", x, std, multiplicative, seed, step, stream, offset, distribution)


def gradient_noise(
    x: Tensor,
    std: float | Tensor,
    *,
    seed: int | Tensor | None = None,
    step: int | Tensor = 0,
    stream: int = 0,
    offset: int = 0,
    distribution: str = "normal",
    multiplicative: bool = False,
) -> Tensor:
    """x itself; backward adds std * eps to its gradient (Neelakantan et al., arXiv 1511.06807).

    Every backward pass through it adds the noise, including that of a second derivative.

    Args:
        x: any shape. The result is a view of x: clone it before an operation in place.
        std: as in ``input_noise``, but without a gradient.
        multiplicative: multiply the gradient by 1 + std * eps instead of adding.
        seed, step, stream, offset, distribution: see the module.
    """
    if (ranks := ranks_of_batch()) > 1 and not multiplicative:
        std = std * ranks
    return _on_one(
        "gradient_noise", x, std, multiplicative, seed, step, stream, offset, distribution
    )


def _on_one(op, x, std, multiplicative, seed, step, stream, offset, distribution) -> Tensor:
    """An op on one tensor, which may be a rank's part of a batch."""
    std_tensor = None
    if isinstance(std, Tensor):
        std_tensor, std = std, 0.0
    if (first := first_in_batch(x)) and not per_row(seed, step):
        offset += first
    noise = noise_of(seed, step, distribution, (stream,), (offset,))
    return call_op(op, x, std_tensor, std, multiplicative, *noise)


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
        tensors: a tensor or a list of them on one device. Each element of a DTensor counts once;
            all ranks of its mesh must call this, and all get the sum.
        seed, step, stream, offset, distribution: see the module.

    Returns:
        A scalar: fp64 if a tensor is, else fp32; added up in fp64.
    """
    tensors = tensors_of("tensors", tensors)
    local, *noise = noise_of_list(tensors, seed, step, stream, offset, distribution)
    sums = call_op("noise_dot", local, *noise)
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    if local is tensors:
        total = sums.sum()
    else:
        total = _sum_over_meshes(tensors, sums)
    return total if wide else total.float()


def _sum_over_meshes(tensors: list, sums: Tensor) -> Tensor:
    """The sum over all ranks of one number per tensor, each divided as its tensor is sharded."""
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
        tensors: as in ``add_noise_``.
        coefficients: ``[K]`` finite numbers, or a tensor of them on the CPU or the tensors' device.
        seeds: ``[K]`` ints in [-2^63, 2^64), or an int64 tensor of them.
        step, stream, offset, distribution: see the module.
    """
    tensors = tensors_of("tensors", tensors)
    if not isinstance(coefficients, Tensor):
        numbers = _numbers("coefficients", coefficients)
        coefficients = torch.tensor(numbers, dtype=torch.float64, device="cpu")
    if not coefficients.is_floating_point():
        raise TypeError(f"coefficients has dtype {coefficients.dtype}; it must be a floating one")
    if not isinstance(seeds, Tensor):
        numbers = [fixed_seed(seed, "seeds") for seed in _sequence("seeds", seeds)]
        seeds = torch.tensor(numbers, dtype=torch.int64, device="cpu")
    local, *noise = noise_of_list(tensors, 0, step, stream, offset, distribution)
    call_op("combine_noise_", local, coefficients.to(torch.float64), seeds, *noise)


def _sequence(name: str, values) -> list:
    if not hasattr(values, "__iter__") or isinstance(values, str):
        raise TypeError(f"{name} is a {type(values).__name__}; it must be a sequence or a tensor")
    return list(values)


def _numbers(name: str, values) -> list[float]:
    values = _sequence(name, values)
    for value in values:
        if not fits(value, NUMBER):
            raise TypeError(f"{name} holds a {type(value).__name__}; it must hold numbers")
        if not math.isfinite(value):
            raise ValueError(f"{name} holds {value}; it must hold finite numbers")
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
    """A context in which params are theta + scale * eps; afterwards they are theta again.

    They are restored also when the body raises. A backward pass through what the body computed must
    run inside: outside, autograd finds that the parameters have changed.

    Args:
        params: parameters on one device that share no memory.
        scale: a finite number; -scale gives the antithetic pair.
        restore: "copy" keeps a copy of params and restores theta bit for bit. "regenerate" keeps
            nothing and subtracts the same noise: each time, an element is then off by at most half
            an ulp of theta + scale * eps plus half an ulp of the result (16-bit elements by one
            more rounding in fp32), and an element that overflowed is lost.
        seed, step, stream, offset, distribution: see the module.

    Example:
        >>> with kdkernels.perturbed_parameters(model.parameters(), 1e-3, seed=0):
        ...     loss = loss_fn(model(x), y)
    """
    if restore not in ("copy", "regenerate"):
        raise ValueError(f'restore is "{restore}"; it must be "copy" or "regenerate"')
    check("scale", scale, NUMBER)
    scale = float(scale)
    if not math.isfinite(scale):
        raise ValueError(f"scale is {scale}; it must be a finite number")
    params = tensors_of("params", params)
    seed = fixed_seed(seed)
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
    (Pearlmutter, "Fast exact multiplication by the Hessian", 1994). With another ``step``
    in each training step, or a seed of None, the regulariser's mean is zero.
    Inside torch.compile(fullgraph=True) it requires ``torch._dynamo.config.trace_autograd_ops``;
    otherwise Dynamo breaks the graph there.

    Args:
        loss_fn: called once with gradients enabled; returns a scalar. It must be differentiable
            twice.
        params: what to regularise. Parameters that the loss does not use count as 0; the noise of
            the others does not depend on them.
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
    params = tensors_of("params", params)
    for k, param in enumerate(params):
        if not param.requires_grad:
            raise ValueError(
                f"params[{k}] does not require grad; leave it out, or make it require grad"
            )
    check("lam", lam, NUMBER)
    with torch.enable_grad():
        loss = loss_fn()
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"loss_fn returns a {type(loss).__name__}; it must return a scalar tensor"
            )
        if loss.numel() != 1:
            raise ValueError(
                f"loss_fn returns the shape {list(loss.shape)}; it must return a scalar"
            )
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
    """One stream per tensor."""
    if isinstance(stream, (list, tuple)):
        return list(stream)
    check("stream", stream, INT)
    return [stream + k for k in range(count)]
