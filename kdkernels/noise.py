"""Gaussian noise that is a pure function of (seed, stream, step, element index).

The normal of element i of a tensor is Philox4x32-10 (Salmon et al., SC 2011) at the counter
(i // 4 low, i // 4 high, stream, step) under the key (seed low, seed high), word pair (i % 4) // 2,
through the Box-Muller transform. Elements count in row-major order whatever the strides. Nothing is
stored: the same arguments give the same bits on every CPU and GPU, for any number of threads and
any sharding.

All functions share these keyword arguments:

    seed: an int in [-2^63, 2^64). None draws one from torch's default generator, so
        ``torch.manual_seed`` governs it; two calls then differ.
    step: the training step, in [0, 2^32). An int, or an int64 scalar tensor on the noise's device,
        which a captured CUDA graph reads anew at each replay.
    stream: the tensor's own number, in [0, 2^32): a parameter's index in its list.
    offset: global index of the tensor's first element, for a shard of a larger tensor.

Bad numbers raise ValueError and bad dtypes TypeError, naming the argument; x and tensors take fp32,
fp64, bf16 and fp16 on CPU and CUDA. 16-bit tensors are added to in fp32 and rounded once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kdkernels import _C
from kdkernels.errors import INT, LIST, NUMBER, OPTIONAL_TENSOR, TENSOR, explain, fits

# The eager functions take their arguments by position; a tracer sees the registered ops.
_OPS = torch.ops.kdkernels
_NOISE_NAMES = ("seed", "step", "stream", "offset", "seed_tensor", "step_tensor")


def _noise_args(seed: int | None, step: int | Tensor, stream: int, offset: int) -> tuple:
    """(seed, step, stream, offset, seed_tensor, step_tensor), as every op takes them."""
    seed_tensor = step_tensor = None
    if seed is None:
        # A tensor, so that a traced graph draws anew each time it runs.
        seed_tensor, seed = torch.randint(0, 2**63 - 1, (), dtype=torch.int64), 0
    elif isinstance(seed, int) and not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed is {seed}; it takes an int in [-2^63, 2^64)")
    elif isinstance(seed, int) and seed >= 2**63:
        seed -= 2**64
    if isinstance(step, Tensor):
        step_tensor, step = step, 0
    return seed, step, stream, offset, seed_tensor, step_tensor


def randn_like(
    x: Tensor, *, seed: int | None = None, step: int | Tensor = 0, stream: int = 0, offset: int = 0
) -> Tensor:
    """Standard normal noise of x's shape, dtype and device, contiguous; x's values are not read.

    Example:
        >>> kdkernels.randn_like(torch.empty(2), seed=0)
    """
    args = _noise_args(seed, step, stream, offset)
    return _call("randn_like", args, x=(x, TENSOR))


def add_noise_(
    tensors: Tensor | Sequence[Tensor],
    std: float | Sequence[float],
    *,
    seed: int | None = None,
    step: int | Tensor = 0,
    stream: int = 0,
    offset: int = 0,
) -> None:
    """Add std * eps to each tensor in place; on CUDA in one launch a dtype.

    Tensor k of the list takes ``stream + k``, so leaving others out does not shift its noise as
    long as its stream is given. Call it under ``torch.no_grad()`` where a tensor requires grad.

    Args:
        tensors: a tensor or a list of them, of any shapes and dtypes, on one device, apart in
            memory.
        std: standard deviation, finite and 0 or more: one number, or one a tensor.
        seed, step, stream, offset: see the module.
    """
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    std = [std] if isinstance(std, (int, float)) or not hasattr(std, "__iter__") else list(std)
    for name, values, kind in (("tensors", tensors, TENSOR), ("std", std, NUMBER)):
        for value in values:
            if not fits(value, kind):
                raise TypeError(f"{name} holds a {type(value).__name__}; it takes {kind}")
    std = [float(s) for s in std]
    args = _noise_args(seed, step, stream, offset)
    _call("add_noise_", args, tensors=(tensors, LIST), std=(std, LIST))


def input_noise(
    x: Tensor,
    std: float | Tensor,
    *,
    seed: int | None = None,
    step: int | Tensor = 0,
    stream: int = 0,
    offset: int = 0,
) -> Tensor:
    """x + std * eps. Backward hands x's gradient on unchanged.

    Args:
        x: any shape.
        std: a number, finite and 0 or more; or a one-element tensor on x's device, which may
            require grad: its gradient is sum eps_i g_i, with eps made again rather than kept.
        seed, step, stream, offset: see the module.
    """
    std_tensor = None
    if isinstance(std, Tensor):
        std_tensor, std = std, 0.0
    args = _noise_args(seed, step, stream, offset)
    return _call(
        "input_noise",
        args,
        x=(x, TENSOR),
        std_tensor=(std_tensor, OPTIONAL_TENSOR),
        std=(std, NUMBER),
    )


def gradient_noise(
    x: Tensor,
    std: float,
    *,
    seed: int | None = None,
    step: int | Tensor = 0,
    stream: int = 0,
    offset: int = 0,
) -> Tensor:
    """x itself; backward adds std * eps to its gradient (Neelakantan et al., arXiv 1511.06807).

    Every backward pass through it adds the noise, so that of a second derivative, too.

    Args:
        x: any shape. The result is a view of it.
        std: a number, finite and 0 or more.
        seed, step, stream, offset: see the module.
    """
    args = _noise_args(seed, step, stream, offset)
    return _call("gradient_noise", args, x=(x, TENSOR), std=(std, NUMBER))


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
    """
    if noise not in ("per-step", "per-sample"):
        raise ValueError(f'noise is "{noise}"; it takes "per-step" or "per-sample"')
    for name, value, kind in (("x", x, TENSOR), ("y", y, TENSOR), ("steps", steps, INT)):
        if not fits(value, kind):
            raise TypeError(f"{name} is a {type(value).__name__}; it takes {kind}")
    if isinstance(seed, int):
        seed = _noise_args(seed, 0, 0, 0)[0]
    elif not isinstance(seed, Tensor) or seed.dtype != torch.int64:
        kind = seed.dtype if isinstance(seed, Tensor) else type(seed).__name__
        raise TypeError(f"seed is {kind}; it takes an int or an int64 tensor")
    named = {"theta": theta, "lr": lr, "lam": lam, "sigma": sigma}
    for name, value in named.items():
        if not fits(value, NUMBER):
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
    call = _OPS if torch.compiler.is_compiling() else _C
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


def _call(name: str, noise: tuple, **head: tuple[object, str]):
    """Op `name` on the values in `head`, (value, what it takes), and on _noise_args' result."""
    values = [value for value, _ in head.values()]
    if torch.compiler.is_compiling():
        return getattr(_OPS, name)(*values, **dict(zip(_NOISE_NAMES, noise, strict=True)))
    try:
        return getattr(_C, name)(*values, *noise)
    except TypeError as error:
        ints = {n: (v, INT) for n, v in zip(_NOISE_NAMES[:4], noise[:4], strict=True)}
        raise explain(error, **head, **ints) from None
