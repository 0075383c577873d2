"""Every op again in plain PyTorch: the specification, the tests' oracle, and backend="reference".

Written from the formulas, without the library's kernels. Noise agrees with theirs to rounding (the
kernels' own functions are accurate to an ulp, not correctly rounded); everything else to the
dtype's precision.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 1.0,
    alpha: float | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    num_items: float | Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """``kdkernels.distillation_loss``; the same arguments, shapes, dtypes and results."""
    _check(student_logits, teacher_logits, labels, weight)
    _check_numbers(temperature, alpha, labels, label_smoothing, num_items, reduction)
    if alpha is None:
        alpha = 1.0 if labels is None else 0.5
    leading, classes = student_logits.shape[:-1], student_logits.shape[-1]
    acc = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
    z = student_logits.reshape(-1, classes)
    t = teacher_logits.detach().reshape(-1, classes)
    w = torch.ones(z.shape[0], dtype=acc, device=z.device)
    if weight is not None:
        w = weight.reshape(-1).to(acc)
    keep = w != 0
    if labels is not None:
        labels = labels.reshape(-1)
        outside = (labels != ignore_index) & ((labels < 0) | (labels >= classes))
        if outside.any():
            raise ValueError(
                f"labels holds {labels[outside][0]}; it takes classes in [0, {classes})"
            )
        keep &= labels != ignore_index
        kept_weight = w[labels != ignore_index].sum()
    else:
        kept_weight = w.sum()

    # Only kept rows are touched, so that a NaN elsewhere does no harm.
    z, t, w = z[keep].to(acc), t[keep].to(acc), w[keep]
    loss = torch.zeros(z.shape[0], dtype=acc, device=z.device)
    if alpha > 0:
        log_ps = F.log_softmax(z / temperature, -1)
        log_pt = F.log_softmax(t / temperature, -1)
        pt = log_pt.exp()
        difference = torch.where(pt == 0, 0.0, log_pt - log_ps)  # p log p = 0 at p = 0
        loss = loss + alpha * temperature**2 * (pt * difference).sum(-1)
    if alpha < 1:
        hard = F.cross_entropy(z, labels[keep], reduction="none", label_smoothing=label_smoothing)
        loss = loss + (1 - alpha) * hard
    loss = w * loss

    if reduction == "none":
        out = torch.zeros(keep.shape[0], dtype=acc, device=z.device)
        return out.masked_scatter(keep, loss).reshape(leading)
    total = loss.sum()
    if reduction == "mean":
        divisor = kept_weight if num_items is None else num_items
        total = total / divisor if num_items is not None or divisor != 0 else total * 0
    return total


def _check(student, teacher, labels, weight):
    floating = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    for name, logits in (("student_logits", student), ("teacher_logits", teacher)):
        if logits.dtype not in floating:
            raise TypeError(f"{name} has dtype {logits.dtype}; it takes a floating-point dtype")
        if logits.layout != torch.strided:
            raise ValueError(f"{name} has layout {logits.layout}; it takes a dense tensor")
    if student.dtype != teacher.dtype:
        raise TypeError(f"teacher_logits has dtype {teacher.dtype}, student_logits {student.dtype}")
    if student.dim() == 0 or student.shape[-1] == 0:
        raise ValueError(f"student_logits has shape {list(student.shape)}; it takes [*, V], V >= 1")
    if student.shape != teacher.shape:
        raise ValueError(
            f"teacher_logits has shape {list(teacher.shape)}, student_logits {list(student.shape)}"
        )
    for name, rows in (("labels", labels), ("weight", weight)):
        if rows is not None and rows.shape != student.shape[:-1]:
            raise ValueError(
                f"{name} has shape {list(rows.shape)}; it takes {list(student.shape[:-1])}"
            )
    if labels is not None and labels.dtype != torch.int64:
        raise TypeError(f"labels has dtype {labels.dtype}; it takes int64")
    for name, tensor in (("teacher_logits", teacher), ("weight", weight)):
        if tensor is not None and torch.is_grad_enabled() and tensor.requires_grad:
            raise ValueError(f"{name} requires grad, but no gradient flows to it; detach it")


def _check_numbers(temperature, alpha, labels, label_smoothing, num_items, reduction):
    if not 1e-15 <= temperature <= 1e15:
        raise ValueError(f"temperature is {temperature}; it takes a number from 1e-15 to 1e15")
    if alpha is not None and not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; it takes a number in [0, 1]")
    if labels is None and alpha not in (None, 1):
        raise ValueError(f"alpha is {alpha} without labels")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing is {label_smoothing}; it takes a number in [0, 1]")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction is "{reduction}"; it takes "mean", "sum" or "none"')
    if num_items is not None and reduction != "mean":
        raise ValueError(f'num_items goes with reduction="mean" only, not "{reduction}"')
    if num_items is not None and not isinstance(num_items, Tensor) and not 0 < num_items < math.inf:
        raise ValueError(f"num_items is {num_items}; it takes a finite number above 0")


# ---- noise ---------------------------------------------------------------------------------------

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


def _normals(index: Tensor, seed: Tensor, step: Tensor, stream: int) -> Tensor:
    """fp32 normals of the elements `index` (int64); seed and step broadcast with it."""
    counter = [(index // 4) & _MASK, (index // 4) >> 32, torch.full_like(index, stream), step]
    words = philox4x32_10(counter, [seed & _MASK, (seed >> 32) & _MASK])
    words = torch.stack([w + torch.zeros_like(index) for w in words])
    pair = (index % 4) // 2 * 2
    r_a = words.gather(0, pair.expand(words.shape[1:])[None])[0]
    r_b = words.gather(0, (pair + 1).expand(words.shape[1:])[None])[0]
    u = (r_a.to(torch.float32) + 0.5) * 2.0**-32
    turn = r_b.to(torch.float32) * 2.0**-31
    radius = torch.sqrt(-2 * torch.log(u.double()))
    angle = torch.pi * turn.double()
    return (radius * torch.where(index % 2 == 0, torch.cos(angle), torch.sin(angle))).float()


def randn_like(
    x: Tensor, *, seed: int, step: int | Tensor = 0, stream: int = 0, offset: int = 0
) -> Tensor:
    """``kdkernels.randn_like``."""
    index = torch.arange(x.numel(), dtype=torch.int64, device=x.device) + offset
    seed = seed - 2**64 if seed >= 2**63 else seed
    seed = torch.tensor(seed, dtype=torch.int64, device=x.device)
    step = torch.as_tensor(step, dtype=torch.int64, device=x.device)
    return _normals(index, seed, step, stream).reshape(x.shape).to(x.dtype)


def add_noise_(
    tensors: Tensor | Sequence[Tensor],
    std: float | Sequence[float],
    *,
    seed: int,
    step: int | Tensor = 0,
    stream: int = 0,
    offset: int = 0,
) -> None:
    """``kdkernels.add_noise_``."""
    tensors = [tensors] if isinstance(tensors, Tensor) else tensors
    std = [std] * len(tensors) if isinstance(std, (int, float)) else std
    for k, (tensor, s) in enumerate(zip(tensors, std, strict=True)):
        tensor.copy_(_add(tensor, s, seed=seed, step=step, stream=stream + k, offset=offset))


def _add(x: Tensor, std: float | Tensor, **noise) -> Tensor:
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    eps = randn_like(x.detach().to(acc), **noise)
    return (x.to(acc) + std * eps).to(x.dtype)


def input_noise(
    x: Tensor,
    std: float | Tensor,
    *,
    seed: int,
    step: int | Tensor = 0,
    stream: int = 0,
    offset: int = 0,
) -> Tensor:
    """``kdkernels.input_noise``."""
    return _add(x, std, seed=seed, step=step, stream=stream, offset=offset)


class _GradientNoise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, std, noise):
        ctx.std, ctx.noise = std, noise
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return _add(grad, ctx.std, **ctx.noise), None, None


def gradient_noise(
    x: Tensor,
    std: float,
    *,
    seed: int,
    step: int | Tensor = 0,
    stream: int = 0,
    offset: int = 0,
) -> Tensor:
    """``kdkernels.gradient_noise``."""
    noise = {"seed": seed, "step": step, "stream": stream, "offset": offset}
    return _GradientNoise.apply(x, std, noise)


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
        eps = _normals(index, seed[..., None] + torch.zeros_like(index), at, stream).double()
        noisy = x + sigma[..., None] * eps  # [*, n]
        residual = theta[..., None] * noisy - y
        gradient = (2 * residual * noisy).mean(-1)
        theta = theta - lr * (gradient + lam * theta)
        path.append(theta)
    return (torch.stack(path) if trajectory else theta).to(dtype)
