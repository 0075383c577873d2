"""The steps of the noisy optimizers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kdkernels.reference.noise import rounded_by_chance


def noisy_update_(
    update: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    first: Sequence[Tensor | None],
    second: Sequence[Tensor | None],
    steps: Sequence[int],
    rules: Sequence[dict[str, float]],
    eps: Sequence[Tensor],
    bits: Sequence[Tensor] | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """One optimizer step in place, one rule (keyword arguments of the functions below) a parameter.

    Args:
        update: "sgd", "adamw", "sgld" or "psgld".
        params, grads: of one shape a pair.
        first: SGD's momentum buffers, AdamW's first moments; second: second moments.
        steps: how many updates each parameter has had, this one included.
        rules: see ``_sgd``, ``_adamw`` and ``_langevin``.
        eps: the noise of each parameter, of variance 1.
        bits: 16 bits for each element of each parameter; 16-bit parameters and moments are then
            rounded by chance, moments by multiples of them.

    Returns:
        For each parameter what gradient and noise added: to the gradient, or for Langevin updates
        to the parameter.
    """
    one_step = {"sgd": _sgd, "adamw": _adamw, "sgld": _langevin, "psgld": _langevin}[update]
    shares = []
    for k, (param, grad, m, v, step, rule, e) in enumerate(
        zip(params, grads, first, second, steps, rules, eps, strict=True)
    ):
        acc = torch.float64 if param.dtype == torch.float64 else torch.float32
        p, g, m_, v_, e = (None if x is None else x.to(acc) for x in (param, grad, m, v, e))
        *new, added, noise = one_step(p, g, m_, v_, e, step, **rule)
        for old, value, factor in zip((param, m, v), new, (1, 34009, 55081), strict=True):
            if old is not None and bits is not None and old.itemsize == 2:
                value = rounded_by_chance(value, bits[k] * factor % 2**16, old.dtype)
            if old is not None:
                old.copy_(value)
        shares.append((added, noise))
    return shares


def _sgd(
    param,
    grad,
    momentum_buffer,
    _,
    eps,
    step,
    *,
    lr,
    std=0.0,
    momentum=0.0,
    dampening=0.0,
    weight_decay=0.0,
    nesterov=False,
    maximize=False,
):
    """torch.optim.SGD on grad + std * eps."""
    g = (grad + std * eps) * (-1 if maximize else 1) + weight_decay * param
    if momentum != 0:
        buffer = g if step == 1 else momentum * momentum_buffer + (1 - dampening) * g
        momentum_buffer, g = buffer, (g + momentum * buffer if nesterov else buffer)
    return param - lr * g, momentum_buffer, None, grad, std * eps


def _adamw(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    eps_,
    step,
    *,
    lr,
    std=0.0,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=1e-2,
    maximize=False,
):
    """torch.optim.AdamW on grad + std * eps_."""
    g = (grad + std * eps_) * (-1 if maximize else 1)
    exp_avg = betas[0] * exp_avg + (1 - betas[0]) * g
    exp_avg_sq = betas[1] * exp_avg_sq + (1 - betas[1]) * g * g
    corrected = exp_avg / (1 - betas[0] ** step)
    root = (exp_avg_sq / (1 - betas[1] ** step)).sqrt()
    param = param * (1 - lr * weight_decay) - lr * corrected / (root + eps)
    return param, exp_avg, exp_avg_sq, grad, std * eps_


def _langevin(
    param,
    grad,
    _,
    square_avg,
    eps_,
    step,
    *,
    lr,
    num_data=1.0,
    temperature=1.0,
    weight_decay=0.0,
    beta2=0.99,
    eps=1e-5,
    maximize=False,
):
    """SGLD, or pSGLD where square_avg is not None: csrc/math/update.h says which papers."""
    preconditioner = torch.ones_like(param)
    if square_avg is not None:
        square_avg = beta2 * square_avg + (1 - beta2) * grad * grad
        preconditioner = 1 / (eps + square_avg.sqrt())
    slope = num_data * (-grad if maximize else grad) + weight_decay * param
    drift = lr / 2 * preconditioner * slope
    noise = (lr * temperature * preconditioner).sqrt() * eps_
    return param - drift + noise, None, square_avg, drift, noise
