"""From logits to distributions, and from the losses of rows to their reduction."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kdkernels.reference.divergences import finite_logsumexp, kl


def as_column(x):
    """A number per row, to go with a matrix of rows; a number for all rows as it is."""
    return x[:, None] if isinstance(x, Tensor) else x


def scaled_and_capped(z: Tensor, scale: float | Tensor, cap: float | Tensor | None) -> Tensor:
    """The logits as the losses take them; -inf stays."""
    scale, cap = as_column(scale), as_column(cap)
    if cap is None:
        return scale * z
    excluded = z == -math.inf
    return torch.where(
        excluded, -math.inf, cap * (scale * torch.where(excluded, 0.0, z) / cap).tanh()
    )


def standardized(u: Tensor) -> Tensor:
    """(u - mean) / std over a row's finite logits, 0 where they are all equal; -inf stays."""
    excluded = u == -math.inf
    finite = torch.where(excluded, 0.0, u)
    count = (~excluded).sum(-1, keepdim=True)
    centred = torch.where(excluded, 0.0, finite - finite.sum(-1, keepdim=True) / count)
    lowest = torch.where(excluded, math.inf, u).amin(-1, keepdim=True)
    equal = (lowest == u.amax(-1, keepdim=True)).detach()
    squares = torch.where(equal, 1.0, (centred**2).sum(-1, keepdim=True))
    std = (squares / (count - 1).clamp(min=1)).sqrt()
    return torch.where(excluded, -math.inf, torch.where(equal, 0.0, centred / std))


def as_logits(teacher: Tensor, kind: str) -> Tensor:
    """Logits of a teacher that may be one of probabilities."""
    if kind != "probs":
        return teacher
    none = teacher == 0
    return torch.where(none, -math.inf, torch.where(none, 1.0, teacher).log())


def mixed(log_probs: Sequence[Tensor], weights: Sequence[float], mixture: str) -> Tensor:
    """One teacher of several; all weights > 0, sum 1."""
    if len(log_probs) == 1:
        return log_probs[0]
    if mixture == "probs":
        shares = [x + math.log(w) for x, w in zip(log_probs, weights, strict=True)]
        return finite_logsumexp(torch.stack(shares), 0)
    weighted = (w * x for x, w in zip(log_probs, weights, strict=True))
    return sum(weighted, log_probs[0].new_zeros(())).log_softmax(-1)


def of_teachers(teachers: Tensor | Sequence[Tensor], index: Tensor) -> Tensor:
    """Row r of teacher index[r], of teachers ``[*, X]``."""
    stacked = teachers if isinstance(teachers, Tensor) else torch.stack(list(teachers))
    rows = index.numel()
    flat = stacked.reshape(len(stacked), rows, stacked.shape[-1])
    place = index.reshape(rows).to(stacked.device)
    return flat[place, torch.arange(rows, device=stacked.device)].reshape(stacked.shape[1:])


def broken_rows(logits: Tensor) -> Tensor:
    """Rows with NaN or +inf, or without any logit above -inf."""
    return ~((logits < math.inf).all(-1) & (logits > -math.inf).any(-1))


def poisoned(rows: Tensor, broken: Tensor) -> Tensor:
    """NaN in broken rows, and in their gradient."""
    return rows * torch.where(broken, math.nan, 1.0)[:, None]


def nothing_of(*logits: Tensor) -> Tensor:
    """A loss of 0 a row, which depends on the logits with gradient 0."""
    return sum((x[:, :0].sum(-1) for x in logits), logits[0].new_zeros(()))


def cross_entropy_of(u: Tensor, labels, smoothing: float) -> Tensor:
    """Cross-entropy of rows at temperature 1."""
    log_q = u.log_softmax(-1)
    loss = nothing_of(u)
    if smoothing < 1:
        loss = loss - (1 - smoothing) * log_q.gather(-1, labels[:, None]).squeeze(-1)
    if smoothing > 0:
        loss = loss - smoothing * log_q.mean(-1)
    return loss


def shares_of(alpha: float | Tensor) -> tuple[bool, bool]:
    """Whether any row has a share of the divergence, and of cross-entropy."""
    if isinstance(alpha, Tensor):
        return True, True
    return alpha > 0, alpha < 1


def of_share(share: float | Tensor, loss: Tensor) -> Tensor:
    """share * loss, and 0 where a row's share is 0, whatever the loss."""
    if isinstance(share, Tensor):
        loss = torch.where(share.detach() == 0, torch.where(loss.isinf(), 0.0, loss), loss)
    return share * loss


class RowStatistics(NamedTuple):
    """What ``return_statistics=True`` returns beside the loss: one number per row, each ``[*]``,
    fp64 for fp64 logits, else fp32, without gradient; 0 for rows that are left out.

    They are of p_t and p_s, the distributions that the divergence compares: at temperature T, after
    scale, cap and standardisation; entropies in nats. Of a top-k teacher: with tail "renormalize"
    of the distributions over the entries, with "bucket" of those over the entries and one class for
    all others, with "ignore" the entries' terms alone; with the latter two the logsumexp is the
    whole vocabulary's.
    """

    student_logsumexp: Tensor  #: logsumexp(z / T), z transformed
    teacher_logsumexp: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    divergence: Tensor  #: D, without T^2 and alpha
    top1_agreement: Tensor  #: 1 where both sides' largest logit is the same class's, else 0


def statistics_of(logits, log_probs, logsumexps, divergence) -> list[Tensor]:
    """RowStatistics of rows, from lists of two: the student's and the teacher's."""
    zero = torch.zeros_like(log_probs[0])
    entropy = [-kl(x, zero) for x in log_probs]
    best = [x.argmax(-1) for x in logits]  # the first of equals
    return [*logsumexps, *entropy, divergence, (best[0] == best[1]).to(divergence.dtype)]


class KeptRows:
    """The rows that count: only they are touched, so that a NaN elsewhere does no harm."""

    def __init__(self, student, labels, weight, ignore_index):
        self.leading, classes = student.shape[:-1], student.shape[-1]
        self.acc = torch.float64 if student.dtype == torch.float64 else torch.float32
        count = math.prod(self.leading)
        w = torch.ones(count, dtype=self.acc, device=student.device)
        if weight is not None:
            w = weight.reshape(-1).to(self.acc)
        self.keep = w != 0
        self.total_weight = w.sum()
        self.labels = None
        if labels is not None:
            labels = labels.reshape(-1)
            outside = (labels != ignore_index) & ((labels < 0) | (labels >= classes))
            if outside.any():
                raise ValueError(
                    f"labels holds {labels[outside][0]}; it takes classes in [0, {classes})"
                )
            self.keep = self.keep & (labels != ignore_index)
            self.total_weight = w[labels != ignore_index].sum()
            self.labels = labels[self.keep]
        self.weight = w[self.keep]

    def of(self, x: Tensor) -> Tensor:
        """The kept rows of a tensor whose last dimension is not of rows."""
        x = x.reshape(self.keep.shape[0], x.shape[-1])[self.keep]
        return x.to(self.acc) if x.is_floating_point() else x

    def number(self, x):
        """An option of the kept rows: a number for all, or a tensor of one per row."""
        if not isinstance(x, Tensor):
            return x
        if x.shape not in ((), self.leading):
            raise ValueError(
                f"an option is a tensor of shape {list(x.shape)}; it takes [] or "
                f"{list(self.leading)}, a number per row"
            )
        return x.to(self.weight).expand(self.leading).reshape(-1)[self.keep]

    def spread(self, values: Tensor) -> Tensor:
        """One value per kept row to one per row, 0 for the others."""
        out = torch.zeros(self.keep.shape[0], dtype=self.acc, device=values.device)
        return out.masked_scatter(self.keep, values).reshape(self.leading)

    def reduce(self, loss: Tensor, reduction: str, num_items) -> Tensor:
        """The loss of a call from the losses of its kept rows."""
        loss = self.weight * loss
        if reduction == "none":
            return self.spread(loss)
        total = loss.sum()
        if reduction == "mean":
            divisor = self.total_weight if num_items is None else num_items
            divisor = divisor.reshape(()) if isinstance(divisor, Tensor) else divisor
            total = total / divisor if num_items is not None or divisor != 0 else total * 0
        return total

    def result(self, loss, statistics, reduction, num_items):
        """The reduced loss, and statistics where there are some."""
        loss = self.reduce(loss, reduction, num_items)
        if statistics is None:
            return loss
        return loss, RowStatistics(*(self.spread(s.detach()) for s in statistics))
