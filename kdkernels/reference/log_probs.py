"""Log-probabilities of a linear head's tokens."""

from typing import NamedTuple

import torch
from torch import Tensor

from kdkernels.reference.losses import linear
from kdkernels.reference.rows import as_column, scaled_and_capped


class LogProbs(NamedTuple):
    """What ``linear_log_probs`` returns, of rows that are left out 0, False and index -1.

    Numbers are fp64 for fp64 hidden states, else fp32.
    """

    log_probs: Tensor  #: ``[*]``, log q of the row's token
    entropy: Tensor  #: ``[*]``, -sum q log q, in nats
    logsumexp: Tensor  #: ``[*]``, of the logits / temperature, without gradient
    correct: Tensor  #: ``[*]``, bool: whether the token is the likeliest
    top_log_probs: Tensor  #: ``[*, top_k]``, log q of the likeliest tokens, without gradient
    top_indices: Tensor  #: ``[*, top_k]``, int64: these tokens, the likeliest first


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
) -> LogProbs:
    """``kdkernels.linear_log_probs``; the same arguments, shapes, dtypes and results."""
    logits = linear("", hidden, weight, bias, hidden.dtype).reshape(-1, len(weight))
    keep = (token_ids != ignore_index).reshape(-1)
    ids = token_ids.reshape(-1)[keep]

    def number(x):
        return x.expand(token_ids.shape).reshape(-1)[keep] if isinstance(x, Tensor) else x

    u = scaled_and_capped(logits[keep], number(logit_scale), number(soft_cap))
    u = u / as_column(number(temperature))
    log_q = u.log_softmax(-1)
    q = log_q.exp()
    entropy = -torch.where(q == 0, 0.0, q * torch.where(q == 0, 0.0, log_q)).sum(-1)
    top = log_q.detach().topk(max(top_k, 1), -1)
    rows = token_ids.shape

    def spread(values, fill=0):
        out = torch.full((keep.numel(), *values.shape[1:]), fill).to(values)
        mask = keep.reshape(-1, *[1] * (values.dim() - 1))
        return out.masked_scatter(mask, values).reshape((*rows, *values.shape[1:]))

    return LogProbs(
        spread(log_q.gather(-1, ids[:, None]).squeeze(-1)),
        spread(entropy),
        spread(u.detach().logsumexp(-1)),
        spread(top.indices[:, 0] == ids),
        spread(top.values[:, :top_k]),
        spread(top.indices[:, :top_k], -1),
    )
