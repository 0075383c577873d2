"""The first experiment: linear regression under input noise."""

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from kdkernels import _C
from kdkernels.errors import BOOL, INT, NUMBER, STRING, TENSOR, check, explain, fits, for_floats
from kdkernels.noise.arguments import OPS, signed


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
        seed: an int in [-2^63, 2^64), or int64 ``[R]``, one per replica.
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
    check("noise", noise, STRING)
    if noise not in ("per-step", "per-sample"):
        raise ValueError(f'noise is "{noise}"; it must be "per-step" or "per-sample"')
    check("x", x, TENSOR)
    check("y", y, TENSOR)
    if not fits(steps, INT):
        kind = type(steps).__name__
        raise TypeError(
            f"steps is a {kind}; it must be {INT}, the number of steps of the seed's noise"
        )
    if isinstance(seed, int):
        seed = signed(seed)
    elif not isinstance(seed, Tensor) or seed.dtype != torch.int64:
        kind = seed.dtype if isinstance(seed, Tensor) else type(seed).__name__
        raise TypeError(f"seed is {kind}; it must be an int or an int64 tensor")
    named = {"theta": theta, "lr": lr, "lam": lam, "sigma": sigma}
    floats = tuple(named.values())
    for name, value in named.items():
        if not isinstance(value, Tensor) and not fits(value, NUMBER):
            raise TypeError(f"{name} is a {type(value).__name__}; it must be {NUMBER} or a tensor")
    for name, value in {**named, "seed": seed}.items():
        if isinstance(value, Tensor) and value.is_meta != x.is_meta:
            raise ValueError(f"{name} is on {value.device}, x on {x.device}")
    numbers = [torch.as_tensor(v, dtype=torch.float64, device=x.device) for v in named.values()]
    numbers.append(torch.as_tensor(seed, device=x.device))
    for name, value in zip([*named, "seed"], numbers, strict=True):
        if value.dim() > 1:
            raise ValueError(
                f"{name} has shape {list(value.shape)}; it must be a number or [replicas]"
            )
    try:
        shape = torch.broadcast_shapes(*(v.shape for v in numbers))
    except RuntimeError:
        sizes = {name: list(v.shape) for name, v in zip([*named, "seed"], numbers, strict=True)}
        raise ValueError(f"theta, lr, lam, sigma and seed differ in replicas: {sizes}") from None
    theta, lr, lam, sigma, seed = (v.detach().expand(shape).reshape(-1) for v in numbers)
    call: Any = _C
    if is_compiling():
        call, x = OPS, for_floats(x, floats)
    samples, per_sample = (_samples("x", x), _samples("y", y)), noise == "per-sample"
    try:
        out = call.noisy_linear_regression(
            *samples, theta, lr, lam, sigma, seed, steps, stream, per_sample, trajectory
        )
    except TypeError as error:
        kinds = {"steps": (steps, INT), "stream": (stream, INT), "trajectory": (trajectory, BOOL)}
        raise explain(error, **kinds) from None
    return out.reshape(out.shape[:-1] + shape).to(x.dtype)


def _samples(name: str, values: Tensor) -> Tensor:
    if values.dim() == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.dim() != 1:
        raise ValueError(f"{name} has shape {list(values.shape)}; it must be [n] or [n, 1]")
    return values.detach()
