"""Noise as a pure function of seed, stream, step and element, and what is made of it."""

import math
import operator
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


def philox4x32_10(counter: Sequence[Tensor], key: Sequence[Tensor]) -> list[Tensor]:
    """Philox4x32-10 (Salmon et al., SC 2011): four counter words and two key words, int64 tensors
    holding unsigned 32-bit values that broadcast, to four output words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # An int64 product keeps its 64 bits; shifting and masking reads them as unsigned.
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return [c0, c1, c2, c3]


DISTRIBUTIONS = ("normal", "uniform", "rademacher", "truncated_normal", "laplace")
_TRUNCATED_STD = 0.8796256610342398  # of a normal within two standard deviations


def _numbers(
    index: Tensor, seed: Tensor, step: Tensor, stream: int, distribution: str = "normal"
) -> Tensor:
    """fp32 noise of the elements `index` (int64); seed and step broadcast with it."""
    counter = [(index // 4) & _MASK, (index // 4) >> 32, torch.full_like(index, stream), step]
    words = philox4x32_10(counter, [seed & _MASK, (seed >> 32) & _MASK])
    words = torch.stack([w + torch.zeros_like(index) for w in words])

    def word(k):
        return words.gather(0, k.expand(words.shape[1:])[None])[0]

    if distribution == "normal":
        pair = (index % 4) // 2 * 2
        u = (word(pair).to(torch.float32) + 0.5) * 2.0**-32
        turn = word(pair + 1).to(torch.float32) * 2.0**-31
        radius = torch.sqrt(-2 * torch.log(u.double()))
        angle = torch.pi * turn.double()
        return (radius * torch.where(index % 2 == 0, torch.cos(angle), torch.sin(angle))).float()
    r = word(index % 4)
    sign = torch.where(r >= 2**31, -1.0, 1.0).double()
    # The word as an odd 32-bit integer with a sign, over 2^31: symmetric about 0.
    odd = (r | 1) - torch.where(r >= 2**31, 2**32, 0)
    symmetric = odd.to(torch.float32).double() * 2.0**-31
    if distribution == "uniform":
        return (math.sqrt(3) * symmetric).float()
    if distribution == "rademacher":
        return sign.float()
    if distribution == "truncated_normal":
        normal = math.sqrt(2) * torch.erfinv(math.erf(math.sqrt(2)) * symmetric)
        return (normal / _TRUNCATED_STD).float()
    if distribution == "laplace":
        u = ((r & 0x7FFFFFFF).to(torch.float32).double() * 2.0**-31 + 2.0**-32).float()
        return (-sign * math.sqrt(0.5) * torch.log(u.double())).float()
    raise ValueError(f'distribution is "{distribution}"; it takes one of {DISTRIBUTIONS}')


def randn_like(
    x: Tensor,
    *,
    seed: int | Tensor,
    step: int | Tensor = 0,
    stream: int = 0,
    offset: int = 0,
    distribution: str = "normal",
) -> Tensor:
    """``kdkernels.randn_like``."""
    index = torch.arange(x.numel(), dtype=torch.int64, device=x.device)
    seed = seed - 2**64 if not isinstance(seed, Tensor) and seed >= 2**63 else seed
    key = torch.as_tensor(seed, dtype=torch.int64, device=x.device)
    step = torch.as_tensor(step, dtype=torch.int64, device=x.device)
    if key.numel() > 1 or step.numel() > 1:  # each row counts from its first element
        row_size = max(x[0].numel(), 1)
        row, index = index // row_size, index % row_size
        key, step = (n[row] if n.numel() > 1 else n.reshape(()) for n in (key, step))
    index = index + offset
    return _numbers(index, key, step, stream, distribution).reshape(x.shape).to(x.dtype)


# The upper bits of a counter's high word say what its words are for.
_FOR_ROUNDING, _FOR_DROPOUT = 2**31, 2**30


def _bits(numel: int, purpose: int, *, seed, step=0, stream=0, offset=0) -> Tensor:
    """16 bits for each of so many elements, int64: eight elements a counter, low halves first."""
    index = torch.arange(numel, dtype=torch.int64) + offset
    counter = index // 8
    counter = [counter & _MASK, (counter >> 32) | purpose, torch.tensor(stream)]
    seed = torch.tensor(seed - 2**64 if seed >= 2**63 else seed)
    key = [seed & _MASK, (seed >> 32) & _MASK]
    words = philox4x32_10([*counter, torch.as_tensor(step, device="cpu")], key)
    word = torch.stack([w + torch.zeros_like(index) for w in words])
    word = word.gather(0, (index % 8 // 2)[None])[0]
    return torch.where(index % 2 == 0, word & 0xFFFF, word >> 16)


# Of the formats that are rounded to: the bits of the mantissa, and the exponent of the least normal
# number.
_FORMATS = {
    torch.bfloat16: (7, -126),
    torch.float16: (10, -14),
    torch.float8_e4m3fn: (3, -6),
    torch.float8_e5m2: (2, -14),
}


def rounded_by_chance(x: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """x in dtype: away from 0 where ``bits``, in [0, 2^16), are at least 2^16 less 2^16 times the
    share that is cut off, rounded.
    """
    mantissa, least = _FORMATS[dtype]
    magnitude = x.detach().double().abs()
    finite = torch.isfinite(magnitude)
    magnitude = torch.where(finite, magnitude, 0.0)
    exponent = torch.frexp(magnitude).exponent - 1  # magnitude is in [2^exponent, 2 * 2^exponent)
    ulp = torch.ldexp(torch.ones_like(magnitude), exponent.clamp(min=least) - mantissa)
    below = (magnitude / ulp).floor()
    share = ((magnitude / ulp - below) * 2**16 + 0.5).floor()
    rounded = (below + (bits.reshape(x.shape).to(x.device) >= 2**16 - share)) * ulp
    rounded = rounded.clamp(max=torch.finfo(dtype).max).copysign(x.detach().double())
    special = x.detach().double()
    if dtype == torch.float8_e4m3fn:  # has no infinity
        special = torch.full_like(special, math.nan)
    return torch.where(finite, rounded, special).to(dtype)


def stochastic_round(x: Tensor, dtype: torch.dtype = torch.bfloat16, **noise) -> Tensor:
    """``kdkernels.stochastic_round``."""
    return rounded_by_chance(x, _bits(x.numel(), _FOR_ROUNDING, **noise), dtype)


def dropout(x: Tensor, p: float = 0.5, **noise) -> Tensor:
    """``kdkernels.dropout``."""
    dropped = round(float(p) * 2**16)
    kept = (_bits(x.numel(), _FOR_DROPOUT, **noise) >= dropped).reshape(x.shape).to(x.device)
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    scale = 0.0 if dropped == 2**16 else 2**16 / (2**16 - dropped)
    return torch.where(kept, x.to(acc) * scale, torch.zeros((), dtype=acc)).to(x.dtype)


def _listed(tensors, stream, offset) -> list:
    """(tensor, its stream and offset) for each of a list."""
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    streams = list(stream) if isinstance(stream, (list, tuple)) else [stream]
    offsets = list(offset) if isinstance(offset, (list, tuple)) else [offset]
    if len(streams) == 1:
        streams = [operator.index(streams[0]) + k for k in range(len(tensors))]
    if len(offsets) == 1:
        offsets *= len(tensors)
    places = [{"stream": s, "offset": o} for s, o in zip(streams, offsets, strict=True)]
    return list(zip(tensors, places, strict=True))


def add_noise_(
    tensors: Tensor | Sequence[Tensor],
    std: float | Sequence[float] | Tensor,
    *,
    stream: int | Sequence[int] = 0,
    offset: int | Sequence[int] = 0,
    multiplicative: bool = False,
    **noise,
) -> None:
    """``kdkernels.add_noise_``."""
    listed = _listed(tensors, stream, offset)
    std = torch.as_tensor(std, dtype=torch.float64).expand(len(listed)).tolist()
    for (tensor, place), s in zip(listed, std, strict=True):
        tensor.copy_(_add(tensor, s, multiplicative, **place, **noise))


def _add(x: Tensor, std: float | Tensor, multiplicative: bool, **noise) -> Tensor:
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    eps = randn_like(x.detach().to(acc), **noise)
    std = std.to(acc) if isinstance(std, Tensor) else std
    y = x.to(acc)
    return (y * (1 + std * eps) if multiplicative else y + std * eps).to(x.dtype)


def input_noise(x: Tensor, std: float | Tensor, *, multiplicative: bool = False, **noise) -> Tensor:
    """``kdkernels.input_noise``."""
    return _add(x, std, multiplicative, **noise)


class _GradientNoise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, std, multiplicative, noise):
        ctx.arguments = std, multiplicative, noise
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        std, multiplicative, noise = ctx.arguments
        return _add(grad, std, multiplicative, **noise), None, None, None


def gradient_noise(
    x: Tensor, std: float | Tensor, *, multiplicative: bool = False, **noise
) -> Tensor:
    """``kdkernels.gradient_noise``."""
    std = std.detach() if isinstance(std, Tensor) else std
    return _GradientNoise.apply(x, std, multiplicative, noise)


def noise_dot(
    tensors: Tensor | Sequence[Tensor],
    *,
    stream: int | Sequence[int] = 0,
    offset: int | Sequence[int] = 0,
    **noise,
) -> Tensor:
    """``kdkernels.noise_dot``."""
    listed = _listed(tensors, stream, offset)
    wide = any(tensor.dtype == torch.float64 for tensor, _ in listed)
    total = sum(
        (tensor.double() * randn_like(tensor.detach().double(), **place, **noise)).sum()
        for tensor, place in listed
    )
    return torch.as_tensor(total, dtype=torch.float64 if wide else torch.float32)


def combine_noise_(
    tensors: Tensor | Sequence[Tensor],
    coefficients: Sequence[float],
    seeds: Sequence[int],
    *,
    stream: int | Sequence[int] = 0,
    offset: int | Sequence[int] = 0,
    **noise,
) -> None:
    """``kdkernels.combine_noise_``, one seed after the other."""
    for tensor, place in _listed(tensors, stream, offset):
        total = torch.zeros(tensor.shape, dtype=torch.float64, device=tensor.device)
        for coefficient, seed in zip(coefficients, seeds, strict=True):
            total += float(coefficient) * randn_like(total, seed=int(seed), **place, **noise)
        tensor.copy_((tensor.double() + total).to(tensor.dtype))


@contextmanager
def perturbed_parameters(params: Sequence[Tensor], scale: float, **noise) -> Generator[None]:
    """``kdkernels.perturbed_parameters``."""
    params = list(params)
    kept = [param.detach().clone() for param in params]
    with torch.no_grad():
        add_noise_(params, scale, **noise)
    try:
        yield
    finally:
        with torch.no_grad():
            for param, old in zip(params, kept, strict=True):
                param.copy_(old)


def soft_regularization(
    loss_fn: Callable[[], Tensor], params: Sequence[Tensor], lam: float, **noise
) -> Tensor:
    """``kdkernels.soft_regularization``."""
    params = list(params)
    loss = loss_fn()
    grads = torch.autograd.grad(
        loss, params, create_graph=True, allow_unused=True, materialize_grads=True
    )
    return loss + (lam * noise_dot(grads, **noise)).to(loss.dtype)


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
    """``kdkernels.noisy_linear_regression``; one step at a time, all replicas together."""
    if noise not in ("per-step", "per-sample"):
        raise ValueError(f'noise is "{noise}"; it takes "per-step" or "per-sample"')
    dtype = x.dtype
    x, y = x.detach().reshape(-1).double(), y.detach().reshape(-1).double()
    if isinstance(seed, int) and seed >= 2**63:
        seed -= 2**64
    seed = torch.as_tensor(seed, dtype=torch.int64, device=x.device)
    theta, lr, lam, sigma = (
        torch.as_tensor(v, dtype=torch.float64, device=x.device) for v in (theta, lr, lam, sigma)
    )
    shape = torch.broadcast_shapes(theta.shape, lr.shape, lam.shape, sigma.shape, seed.shape)
    theta = theta.expand(shape).clone()
    index = torch.arange(x.numel() if noise == "per-sample" else 1, device=x.device)
    path = [theta]
    for step in range(steps):
        at = torch.tensor(step, device=x.device)
        eps = _numbers(index, seed[..., None] + torch.zeros_like(index), at, stream).double()
        noisy = x + sigma[..., None] * eps  # [*, n]
        residual = theta[..., None] * noisy - y
        gradient = (2 * residual * noisy).mean(-1)
        theta = theta - lr * (gradient + lam * theta)
        path.append(theta)
    return (torch.stack(path) if trajectory else theta).to(dtype)
