"""Log-probabilities of tokens from hidden states and a head."""

import math
import operator

import torch
from torch import Tensor
from torch.compiler import is_compiling

from kdkernels import reference
from kdkernels.distill.calls import packed
from kdkernels.errors import INT, OPTIONAL_TENSOR, STRING, TENSOR, check
from kdkernels.reference import LogProbs

_HIDDEN, _HEAD, _BIAS, _STATISTICS = 1, 2, 4, 8  # what _linear_distillation_forward is to make


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float | Tensor = 1.0,
    soft_cap: float | Tensor | None = None,
    top_k: int = 0,
    ignore_index: int = -100,
    memory_budget: int | None = None,
    backend: str = "fused",
) -> LogProbs:
    r"""Log-probabilities of given tokens, entropies and the likeliest tokens of the logits that a
    linear layer makes of hidden states, a chunk of rows at a time, without ``[*, V]`` logits.

    q = softmax(u / temperature), with u the logits ``hidden @ weight.T + bias`` after scale and
    cap. For policy gradients, importance ratios and what a sampler records.

    Args:
        hidden: ``[*, H]``, fp32, fp64, bf16 or fp16, on CPU or CUDA.
        weight: ``[V, H]``, its dtype and device.
        token_ids: ``[*]``, int64, classes in [0, V), or ``ignore_index`` for rows to leave out,
            which are in no product (on CUDA read as 0): what they hold does no harm.
        bias: ``[V]``.
        temperature: a number above 0, or a tensor ``[*]`` or ``[]`` of them.
        logit_scale, soft_cap: u is soft_cap * tanh(logit_scale * z / soft_cap) of the logits z;
            without ``soft_cap``, logit_scale * z. Numbers above 0, or tensors of them as above.
        top_k: how many of the likeliest tokens are wanted, from 0 to min(V, 1024).
        ignore_index: the token of rows to leave out.
        memory_budget: bytes of logits at a time, as ``linear_distillation_loss`` has it.
        backend: "fused", or "reference" for plain PyTorch, which makes all logits.

    Returns:
        ``LogProbs``. Gradients flow from ``log_probs`` and ``entropy`` to hidden, weight and bias,
        once: backward makes the chunks' logits again, in smaller chunks where it has a gradient of
        the entropy.

    Logits are fp32 for 16 bits, and only their gradient is rounded for the products that take it
    back. Under autocast the tensors take its dtype, as in ``torch.nn.functional.linear``. Works in
    ``torch.compile``.

    Raises:
        ValueError: a shape or number is not as said; (on CPU) a token is out of range. On CUDA its
            log-probability is NaN.
        TypeError: a dtype is not supported or differs.

    Example:
        >>> hidden, head = torch.zeros(2, 4, requires_grad=True), torch.nn.Linear(4, 10, bias=False)
        >>> out = kdkernels.linear_log_probs(hidden, head.weight, torch.tensor([3, 7]), top_k=2)
        >>> print(f"{out.log_probs[0]:.4f} {out.entropy[0]:.4f}", out.top_indices.shape)
        -2.3026 2.3026 torch.Size([2, 2])
        >>> out.log_probs.sum().backward()
    """
    call = {"logit_scale": logit_scale, "soft_cap": soft_cap, "temperature": temperature}
    top_k = _checked(hidden, weight, token_ids, bias, call, top_k, ignore_index)
    check("backend", backend, STRING)
    if backend not in ("fused", "reference"):
        raise ValueError(f'backend is "{backend}"; it takes "fused" or "reference"')
    hidden, weight, bias = _cast(hidden, weight, bias)
    if backend == "reference":
        rest = {"bias": bias, "top_k": top_k, "ignore_index": ignore_index}
        return reference.linear_log_probs(hidden, weight, token_ids, **rest, **call)
    if memory_budget is not None:
        check("memory_budget", memory_budget, INT)
        memory_budget = operator.index(memory_budget)
        if not 1 <= memory_budget < 2**63:
            raise ValueError(f"memory_budget is {memory_budget}; it takes bytes, at least 1")
    # The cross-entropy is at temperature 1.
    call |= {n: x if x is None or isinstance(x, Tensor) else float(x) for n, x in call.items()}
    call["logit_scale"] = call["logit_scale"] / call["temperature"]
    if soft_cap is not None:
        call["soft_cap"] = call["soft_cap"] / call["temperature"]
    for name in ("logit_scale", "soft_cap"):
        if isinstance(call[name], Tensor):
            call[name] = call[name].to(hidden.device).expand(token_ids.shape)
    call |= {"temperature": 1.0, "alpha": 0.0, "tail": "none", "reduction": "sum"}
    call |= {"labels": token_ids, "memory_budget": memory_budget}
    call["ignore_index"] = operator.index(ignore_index)
    found = _LogProbs.apply(hidden, weight, bias, call, max(top_k, 1))
    log_probs, entropy, logsumexp, top_logits, indices = found
    correct = (indices[..., 0] == token_ids) & (token_ids != ignore_index)
    transform = call["logit_scale"], call["soft_cap"]
    scale, cap = (x[..., None] if isinstance(x, Tensor) else x for x in transform)
    top = scale * top_logits if cap is None else cap * (scale * top_logits / cap).tanh()
    top = torch.where(top_logits == -math.inf, -math.inf, top)  # a class that is excluded stays so
    top = torch.where(indices >= 0, top - logsumexp[..., None], 0.0)
    return LogProbs(log_probs, entropy, logsumexp, correct, top[..., :top_k], indices[..., :top_k])


def _checked(hidden, weight, token_ids, bias, numbers: dict, top_k, ignore_index) -> int:
    """top_k as an int, after a check of what the op takes for granted."""
    check("hidden", hidden, TENSOR)
    check("weight", weight, TENSOR)
    check("token_ids", token_ids, TENSOR)
    check("bias", bias, OPTIONAL_TENSOR)
    autocast = _autocasts(hidden)
    heads = [x if not autocast or x is None else x.to(hidden.dtype) for x in (weight, bias)]
    reference.check_head("", hidden, heads[0], heads[1], hidden.dtype)
    if token_ids.dtype != torch.int64:
        raise TypeError(f"token_ids has dtype {token_ids.dtype}; it takes int64")
    rows = hidden.shape[:-1]
    if token_ids.shape != rows:
        raise ValueError(f"token_ids has shape {list(token_ids.shape)}; it takes {list(rows)}")
    if token_ids.device != hidden.device:
        raise ValueError(f"token_ids is on {token_ids.device}, hidden on {hidden.device}")
    for name, value in (("top_k", top_k), ("ignore_index", ignore_index)):
        check(name, value, INT)
        if not -(2**63) <= operator.index(value) < 2**63:
            raise ValueError(f"{name} is {value}; it is out of range")
    top_k, most = operator.index(top_k), min(len(weight), reference.MAX_TOP_K)
    if not 0 <= top_k <= most:
        raise ValueError(f"top_k is {top_k}; it takes from 0 to {most}")
    for name, value in numbers.items():
        if isinstance(value, Tensor):
            if value.requires_grad and torch.is_grad_enabled():
                raise ValueError(f"{name} requires grad, but no gradient flows to it; detach it")
            if value.shape not in ((), rows):
                raise ValueError(
                    f"{name} has shape {list(value.shape)}; it takes [] or {list(rows)}"
                )
        if name != "soft_cap" or value is not None:
            on_device = isinstance(value, Tensor) and value.device.type != "cpu"
            if not (on_device or is_compiling()):
                reference.check_range(name, value, "a finite number above 0", 0, float("inf"), True)
    outside = (token_ids != ignore_index) & ((token_ids < 0) | (token_ids >= len(weight)))
    if token_ids.device.type == "cpu" and not is_compiling() and outside.any():
        raise ValueError(
            f"token_ids holds {token_ids[outside][0]}; it takes classes in [0, {len(weight)}) or "
            f"ignore_index={ignore_index}"
        )
    return top_k


def _autocasts(hidden: Tensor) -> bool:
    device = hidden.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _cast(hidden: Tensor, weight: Tensor, bias: Tensor | None):
    """The tensors in the dtype that a linear layer would have them in."""
    if not _autocasts(hidden) or hidden.dtype == torch.float64:
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(hidden.device.type)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


class _LogProbs(torch.autograd.Function):
    """(log_probs, entropy, logsumexp, top logits, their indices), by the loss without a teacher."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, call, top_k):
        rows, options = packed(call | {"reduction": "none", "top_k": top_k})
        ctx.save_for_backward(hidden, weight, bias)
        ctx.call = call
        ctx.set_materialize_grads(False)
        op = torch.ops.kdkernels._linear_distillation_forward
        others = [bias, None, None]
        loss, _, _, _, statistics, top_logits, indices = op(
            hidden, weight, others, [], rows, options, _STATISTICS, ""
        )
        logsumexp = statistics[0].clone()
        ctx.mark_non_differentiable(logsumexp, top_logits, indices)
        return -loss, statistics[2].clone(), logsumexp, top_logits, indices

    @staticmethod
    def backward(ctx, of_log_probs, of_entropy, *_):
        if torch.is_grad_enabled():
            raise ValueError(
                "linear_log_probs has no second derivative; pass create_graph=False, or "
                'backend="reference"'
            )
        hidden, weight, bias = ctx.saved_tensors
        if of_log_probs is None and of_entropy is None:
            return None, None, None, None, None
        if of_log_probs is None:
            of_log_probs = torch.zeros_like(of_entropy)
        rows, options = packed(ctx.call | {"weight": -of_log_probs})
        want = (_HIDDEN, _HEAD, _BIAS)
        needed = sum(bit for bit, need in zip(want, ctx.needs_input_grad, strict=False) if need)
        op = torch.ops.kdkernels._linear_distillation_forward
        others = [bias, None, of_entropy]
        _, *gradients = op(hidden, weight, others, [], rows, options, needed, "")
        found = (
            gradient.to(hidden.dtype) if need else None
            for gradient, need in zip(gradients, ctx.needs_input_grad[:3], strict=False)
        )
        return *found, None, None
