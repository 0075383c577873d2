"""Every op again in plain PyTorch: the specification, the tests' oracle, and backend="reference".

Written from the formulas, without the library's kernels. Noise agrees with theirs to rounding (the
kernels' own functions are accurate to an ulp, not correctly rounded); everything else to the
dtype's precision. Losses are differentiable to any order in everything that requires grad.
"""

import math
import operator
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kdkernels import _C
from kdkernels.errors import NUMBER, OPTIONAL_TENSOR, TENSOR, fits

# ---- distillation: the divergences ---------------------------------------------------------------

MAX_TEACHERS, MAX_TOP_K = 8, 1024


class Divergence(NamedTuple):
    """What is known about one divergence D(p, q) of a teacher p and a student q."""

    formula: str
    source: str
    parameters: dict[str, float]  # name -> default


DIVERGENCES = {name: Divergence(*entry) for name, *entry in _C.divergences()}
TOP_K_DIVERGENCES = ("forward_kl", "reverse_kl", "js")


def divergence_parameters(
    divergence: str,
    divergence_alpha: float | Tensor | None = None,
    beta: float | Tensor | None = None,
) -> dict[str, float | Tensor]:
    """A divergence's parameters, the defaults where None is given; checked."""
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence is {divergence!r}; it takes one of {', '.join(DIVERGENCES)}")
    parameters: dict[str, float | Tensor] = dict(DIVERGENCES[divergence].parameters)
    largest = math.inf if "divergence_alpha" in parameters else 1
    for name, value in (("divergence_alpha", divergence_alpha), ("beta", beta)):
        if value is None:
            continue
        if name not in parameters:
            raise ValueError(f"{name} is {value}, but {divergence} takes none")
        what = "a number in [0, 1]" if largest == 1 else "a finite number of at least 0"
        _check_range(name, value, what, 0, largest)
        parameters[name] = value if isinstance(value, Tensor) else float(value)
    numbers = [x for x in parameters.values() if not isinstance(x, Tensor)]
    if divergence == "alpha_beta" and len(numbers) == 2 and not any(numbers):
        raise ValueError("divergence_alpha and beta are 0; alpha_beta takes at most one that is 0")
    return parameters


def _check_range(name, value, what, least, largest, open_=False):
    """A number, or a tensor of numbers a row, within limits; infinity never is."""
    if not isinstance(value, Tensor):
        _take(name, value, NUMBER)
    elif value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} has dtype {value.dtype}; it takes a real dtype")
    x = torch.as_tensor(value)
    fits = ((least < x) if open_ else (least <= x)) & (x <= largest) & (x < math.inf)
    if not fits.all():
        raise ValueError(f"{name} is {value}; it takes {what}")


# Below, log_p and log_q may hold -inf. What torch.where does not choose is finite, and so are its
# derivatives: infinity times the 0 that flows into it would be NaN.


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Sum of a (log a - log b) over the last dimension; a class with a = 0 adds nothing."""
    a = log_a.exp()
    some = a != 0
    return (a * (torch.where(some, log_a, 0.0) - torch.where(some, log_b, 0.0))).sum(-1)


def _log_mixture(log_a: Tensor, log_b: Tensor, of_a: float | Tensor) -> Tensor:
    """log(of_a a + (1 - of_a) b); of_a may be a tensor of a number a row, in (0, 1)."""
    if isinstance(of_a, Tensor):
        shares = of_a.log()[:, None], (-of_a).log1p()[:, None]
        return _logsumexp(torch.stack((log_a + shares[0], log_b + shares[1])), 0)
    if of_a in (0, 1):
        return log_a if of_a else log_b
    return _logsumexp(torch.stack((log_a + math.log(of_a), log_b + math.log1p(-of_a))), 0)


def _logsumexp(x: Tensor, dim: int) -> Tensor:
    """torch.logsumexp, with gradient 0 where all are -inf."""
    none = (x == -math.inf).all(dim, keepdim=True)
    return torch.where(none.squeeze(dim), -math.inf, torch.where(none, 0.0, x).logsumexp(dim))


def _js(log_p, log_q, beta):
    if not isinstance(beta, Tensor) and beta in (0, 1):
        return _kl(log_q, log_p) if beta else _kl(log_p, log_q)
    log_m = _log_mixture(log_p, log_q, beta)
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def _alpha_beta(log_p, log_q, a, b):
    if isinstance(a, Tensor):
        of_p, of_q = ((a + b)[:, None] * log_p).exp(), ((a + b)[:, None] * log_q).exp()
        product = (a[:, None] * log_p + b[:, None] * log_q).exp()
        terms = (a / (a + b))[:, None] * of_p + (b / (a + b))[:, None] * of_q - product
        return terms.sum(-1) / (a * b)
    if b == 0:
        return (_kl(a * log_p, a * log_q) + ((a * log_q).exp() - (a * log_p).exp()).sum(-1)) / a**2
    if a == 0:
        return _alpha_beta(log_q, log_p, b, 0)
    both = a + b
    of_p, of_q = (both * log_p).exp(), (both * log_q).exp()
    product = (a * log_p + b * log_q).exp()
    return (a / both * of_p + b / both * of_q - product).sum(-1) / (a * b)


def _decoupled(log_p, log_q, labels, of_target, of_others):
    """Sides that leave nothing beside the label: the teacher's gives a second term of 0."""
    here = F.one_hot(labels, log_p.shape[-1]).bool()
    binary, others = [], []
    for log_side in (log_p, log_q):
        beside = torch.where(here, -math.inf, log_side)
        log_rest = _logsumexp(beside, -1)
        log_label = log_side.gather(-1, labels[:, None]).squeeze(-1)
        binary.append(torch.stack((log_label, log_rest), -1))
        others.append(beside - torch.where(log_rest == -math.inf, 0.0, log_rest)[:, None])
    if not isinstance(of_others, Tensor) and of_others == 0:
        return of_target * _kl(*binary)
    return of_target * _kl(*binary) + of_others * _kl(*others)


def _divergence(name, log_p, log_q, parameters, labels=None):
    if any(isinstance(x, Tensor) for x in parameters.values()) and name != "decoupled":
        return _divergence_by_row(name, log_p, log_q, parameters)
    a, b = parameters.get("divergence_alpha"), parameters.get("beta")
    if name == "forward_kl":
        return _kl(log_p, log_q)
    if name == "reverse_kl":
        return _kl(log_q, log_p)
    if name == "js":
        return _js(log_p, log_q, b)
    if name == "skew_forward_kl":
        return _kl(log_p, _log_mixture(log_p, log_q, b))
    if name == "skew_reverse_kl":
        return _kl(log_q, _log_mixture(log_q, log_p, b))
    if name == "total_variation":
        return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2
    if name == "alpha_beta":
        return _alpha_beta(log_p, log_q, a, b)
    return _decoupled(log_p, log_q, labels, a, b)


def _divergence_by_row(name, log_p, log_q, parameters):
    """With parameters that are a number a row: the formula inside their range, and each limit of
    the range where a row's parameter is one. Both are finite where they are not chosen.
    """
    ones = torch.ones_like(log_p[:, 0])
    parameters = {name: x * ones for name, x in parameters.items()}
    inside = {name: torch.where(x > 0, x, 0.5) for name, x in parameters.items()}
    if name != "alpha_beta":
        inside["beta"] = torch.where(parameters["beta"] < 1, inside["beta"], 0.5)
    formulas = {
        "js": _js,
        "skew_forward_kl": lambda p, q, beta: _kl(p, _log_mixture(p, q, beta)),
        "skew_reverse_kl": lambda p, q, beta: _kl(q, _log_mixture(q, p, beta)),
        "alpha_beta": _alpha_beta,
    }
    out = formulas[name](log_p, log_q, *inside.values())
    if name != "alpha_beta":
        for limit in (0.0, 1.0):
            at_limit = _divergence(name, log_p, log_q, {"beta": limit})
            out = torch.where(parameters["beta"] == limit, at_limit, out)
        return out
    a, b = parameters.values()
    for x, sides, other in ((b, (log_p, log_q), a), (a, (log_q, log_p), b)):
        power = torch.where(x == 0, other, 1.0)[:, None]
        log_a, log_b = (power * side for side in sides)
        at_limit = (_kl(log_a, log_b) + (log_b.exp() - log_a.exp()).sum(-1)) / power[:, 0] ** 2
        out = torch.where(x == 0, at_limit, out)
    return out


# ---- distillation: from logits to distributions --------------------------------------------------


def _column(x):
    """A number a row, to go with a matrix of rows; a number for all rows as it is."""
    return x[:, None] if isinstance(x, Tensor) else x


def _transform(z: Tensor, scale: float | Tensor, cap: float | Tensor | None) -> Tensor:
    """The logits as the losses take them; -inf stays."""
    scale, cap = _column(scale), _column(cap)
    if cap is None:
        return scale * z
    excluded = z == -math.inf
    return torch.where(
        excluded, -math.inf, cap * (scale * torch.where(excluded, 0.0, z) / cap).tanh()
    )


def _standardized(u: Tensor) -> Tensor:
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


def _as_logits(teacher: Tensor, kind: str) -> Tensor:
    if kind != "probs":
        return teacher
    none = teacher == 0
    return torch.where(none, -math.inf, torch.where(none, 1.0, teacher).log())


def _mixed(log_probs: Sequence[Tensor], weights: Sequence[float], mixture: str) -> Tensor:
    """One teacher of several; all weights > 0, sum 1."""
    if len(log_probs) == 1:
        return log_probs[0]
    if mixture == "probs":
        shares = [x + math.log(w) for x, w in zip(log_probs, weights, strict=True)]
        return _logsumexp(torch.stack(shares), 0)
    weighted = (w * x for x, w in zip(log_probs, weights, strict=True))
    return sum(weighted, log_probs[0].new_zeros(())).log_softmax(-1)


def _broken(logits: Tensor) -> Tensor:
    """Rows with NaN or +inf, or without any logit above -inf."""
    return ~((logits < math.inf).all(-1) & (logits > -math.inf).any(-1))


def _poison(rows: Tensor, broken: Tensor) -> Tensor:
    """NaN in broken rows, and in their gradient."""
    return rows * torch.where(broken, math.nan, 1.0)[:, None]


def _nothing_of(*logits: Tensor) -> Tensor:
    """A loss of 0 a row, which depends on the logits with gradient 0."""
    return sum((x[:, :0].sum(-1) for x in logits), logits[0].new_zeros(()))


def _cross_entropy(u: Tensor, labels, smoothing: float) -> Tensor:
    log_q = u.log_softmax(-1)
    loss = _nothing_of(u)
    if smoothing < 1:
        loss = loss - (1 - smoothing) * log_q.gather(-1, labels[:, None]).squeeze(-1)
    if smoothing > 0:
        loss = loss - smoothing * log_q.mean(-1)
    return loss


def _shares(alpha: float | Tensor) -> tuple[bool, bool]:
    """Whether any row has a share of the divergence, and of cross-entropy."""
    if isinstance(alpha, Tensor):
        return True, True
    return alpha > 0, alpha < 1


def _of_share(share: float | Tensor, loss: Tensor) -> Tensor:
    """share * loss, and 0 where a row's share is 0, whatever the loss."""
    if isinstance(share, Tensor):
        loss = torch.where(share.detach() == 0, torch.where(loss.isinf(), 0.0, loss), loss)
    return share * loss


# ---- distillation: rows and their reduction ------------------------------------------------------


class RowStatistics(NamedTuple):
    """What ``return_statistics=True`` returns beside the loss: one number a row, each ``[*]``, fp64
    for fp64 logits, else fp32, without gradient; 0 for rows that are left out.

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


def _statistics(logits, log_probs, logsumexps, divergence) -> list[Tensor]:
    """RowStatistics of rows, from lists of two: the student's and the teacher's."""
    zero = torch.zeros_like(log_probs[0])
    entropy = [-_kl(x, zero) for x in log_probs]
    best = [x.argmax(-1) for x in logits]  # the first of equals
    return [*logsumexps, *entropy, divergence, (best[0] == best[1]).to(divergence.dtype)]


class _Rows:
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
        """An option of the kept rows: a number for all, or a tensor of one a row."""
        if not isinstance(x, Tensor):
            return x
        if x.shape not in ((), self.leading):
            raise ValueError(
                f"an option is a tensor of shape {list(x.shape)}; it takes [] or "
                f"{list(self.leading)}, a number a row"
            )
        return x.to(self.weight).expand(self.leading).reshape(-1)[self.keep]

    def spread(self, values: Tensor) -> Tensor:
        """One value a kept row to one a row, 0 for the others."""
        out = torch.zeros(self.keep.shape[0], dtype=self.acc, device=values.device)
        return out.masked_scatter(self.keep, values).reshape(self.leading)

    def reduce(self, loss: Tensor, reduction: str, num_items) -> Tensor:
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
        loss = self.reduce(loss, reduction, num_items)
        if statistics is None:
            return loss
        return loss, RowStatistics(*(self.spread(s.detach()) for s in statistics))


# ---- distillation: the losses --------------------------------------------------------------------


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | Sequence[Tensor],
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    alpha: float | Tensor | None = None,
    divergence: str = "forward_kl",
    divergence_alpha: float | Tensor | None = None,
    beta: float | Tensor | None = None,
    teacher_kind: str = "logits",
    teacher_weights: Sequence[float] | None = None,
    teacher_mixture: str = "probs",
    standardize: bool = False,
    logit_scale: float | Tensor = 1.0,
    soft_cap: float | Tensor | None = None,
    teacher_logit_scale: float | Tensor = 1.0,
    teacher_soft_cap: float | Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    num_items: float | Tensor | None = None,
    reduction: str = "mean",
    return_statistics: bool = False,
) -> Tensor | tuple[Tensor, RowStatistics]:
    """``kdkernels.distillation_loss``; the same arguments, shapes, dtypes and results."""
    _check_student(student_logits, labels, weight)
    teachers, shares = _check_teachers(student_logits, teacher_logits, teacher_weights)
    parameters = divergence_parameters(divergence, divergence_alpha, beta)
    if divergence == "decoupled" and labels is None:
        raise ValueError('labels is None; divergence="decoupled" needs labels')
    _check_choice("teacher_kind", teacher_kind, ("logits", "log_probs", "probs"))
    _check_choice("teacher_mixture", teacher_mixture, ("probs", "log_probs"))
    _check_transform("", logit_scale, soft_cap)
    _check_transform("teacher_", teacher_logit_scale, teacher_soft_cap)
    if teacher_kind != "logits":
        for name, value, default in (
            ("teacher_logit_scale", teacher_logit_scale, 1),
            ("teacher_soft_cap", teacher_soft_cap, None),
        ):
            if isinstance(value, Tensor) or value != default:
                raise ValueError(f'{name} is {value}, but teacher_kind is "{teacher_kind}"')
    _check_numbers(temperature, alpha, labels, label_smoothing, num_items, reduction)
    if alpha is None:
        alpha = 1.0 if labels is None else 0.5

    rows = _Rows(student_logits, labels, weight, ignore_index)
    temperature, alpha, logit_scale, soft_cap, teacher_logit_scale, teacher_soft_cap = map(
        rows.number,
        (temperature, alpha, logit_scale, soft_cap, teacher_logit_scale, teacher_soft_cap),
    )
    parameters = {name: rows.number(x) for name, x in parameters.items()}
    soft, hard = _shares(alpha)
    z, teachers = rows.of(student_logits), [rows.of(t) for t in teachers]
    broken = _broken(z)
    if soft:
        raw = [_as_logits(t.detach(), teacher_kind) for t in teachers]
        broken = broken | torch.stack([_broken(t) for t in raw]).any(0)
        excluded = torch.stack([t == -math.inf for t in raw])
        together = excluded.all(0) if teacher_mixture == "probs" else excluded.any(0)
        broken = broken | together.all(-1)
        teachers = [_poison(t, broken) for t in teachers]
    u = _transform(_poison(z, broken), logit_scale, soft_cap)

    loss, statistics = _nothing_of(z, *teachers), None
    if soft or return_statistics:
        compared = [u]
        for t in teachers:
            t = _as_logits(t, teacher_kind)
            compared.append(_transform(t, teacher_logit_scale, teacher_soft_cap))
        if standardize:
            compared = [_standardized(x) for x in compared]
        compared = [x / _column(temperature) for x in compared]
        log_q, *log_ps = (x.log_softmax(-1) for x in compared)
        log_p = _mixed(log_ps, shares, teacher_mixture)
        d = _divergence(divergence, log_p, log_q, parameters, rows.labels)
        if soft:
            loss = loss + _of_share(alpha, temperature**2 * d)
        if return_statistics:
            # A mixture is one of probabilities; it has no logits.
            both = (compared[0], compared[1] if len(teachers) == 1 else log_p)
            logsumexps = [x.logsumexp(-1) for x in both]
            statistics = _statistics(both, (log_q, log_p), logsumexps, d)
    if hard:
        loss = loss + _of_share(1 - alpha, _cross_entropy(u, rows.labels, label_smoothing))
    return rows.result(loss, statistics, reduction, num_items)


def topk_distillation_loss(
    student_logits: Tensor,
    teacher_values: Tensor,
    teacher_indices: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    alpha: float | Tensor | None = None,
    divergence: str = "forward_kl",
    beta: float | Tensor | None = None,
    tail: str = "renormalize",
    teacher_kind: str = "logits",
    teacher_logsumexp: Tensor | None = None,
    logit_scale: float | Tensor = 1.0,
    soft_cap: float | Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    num_items: float | Tensor | None = None,
    reduction: str = "mean",
    return_statistics: bool = False,
) -> Tensor | tuple[Tensor, RowStatistics]:
    """``kdkernels.topk_distillation_loss``; the same arguments, shapes, dtypes and results."""
    _check_student(student_logits, labels, weight)
    _check_choice("divergence", divergence, TOP_K_DIVERGENCES)
    parameters = divergence_parameters(divergence, None, beta)
    _check_choice("tail", tail, ("renormalize", "bucket", "ignore"))
    _check_choice("teacher_kind", teacher_kind, ("logits", "log_probs"))
    _check_transform("", logit_scale, soft_cap)
    _check_numbers(temperature, alpha, labels, label_smoothing, num_items, reduction)
    _check_entries(student_logits, teacher_values, teacher_indices)
    _check_logsumexp(student_logits, teacher_logsumexp, tail, teacher_kind, temperature)
    if alpha is None:
        alpha = 1.0 if labels is None else 0.5

    rows = _Rows(student_logits, labels, weight, ignore_index)
    temperature, alpha, logit_scale, soft_cap = map(
        rows.number, (temperature, alpha, logit_scale, soft_cap)
    )
    parameters = {name: rows.number(x) for name, x in parameters.items()}
    soft, hard = _shares(alpha)
    z, values = rows.of(student_logits), rows.of(teacher_values)
    index, classes = rows.of(teacher_indices).long(), z.shape[-1]
    outside = (index < -1) | (index >= classes)
    if outside.any():
        raise ValueError(
            f"teacher_indices holds {index[outside][0]}; it takes classes in [0, {classes}), and "
            "-1 where there is none"
        )
    ordered = index.sort(-1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if twice.any():
        raise ValueError(f"teacher_indices holds {ordered[:, 1:][twice][0]} twice in a row")
    is_entry, at = index >= 0, index.clamp(min=0)
    any_entry = is_entry.any(-1)
    logsumexp = torch.zeros_like(rows.weight)
    if teacher_logsumexp is not None:
        logsumexp = rows.of(teacher_logsumexp[..., None]).squeeze(-1)

    def entries_of(x):
        return torch.where(is_entry, x.gather(-1, at), -math.inf)

    values = torch.where(is_entry, values, -math.inf)
    broken = torch.zeros_like(any_entry)
    if hard or tail != "renormalize":
        broken = _broken(z)
    if soft and tail == "renormalize":
        broken = broken | (any_entry & (_broken(entries_of(z)) | _broken(values)))
    elif soft:
        broken = broken | ~((values < math.inf).all(-1) & logsumexp.isfinite())
    z, values = _poison(z, broken), _poison(values, broken)
    entries = _transform(entries_of(z), logit_scale, soft_cap)

    loss, statistics = _nothing_of(z, values), None
    if soft or return_statistics:
        compared = [entries / _column(temperature), values / _column(temperature)]
        whole = _transform(z, logit_scale, soft_cap) / _column(temperature)
        if tail == "renormalize":
            logsumexps = [_logsumexp(x, -1) for x in compared]
        else:
            logsumexps = [whole.logsumexp(-1), logsumexp]
        log_q, log_p = (
            torch.where(is_entry, x - torch.where(any_entry, lse, 0.0)[:, None], -math.inf)
            for x, lse in zip(compared, logsumexps, strict=True)
        )
        if tail == "bucket":
            # Rows whose entries are all of the vocabulary have no rest, whatever rounding leaves.
            rest = 1 - log_p.exp().sum(-1)
            none = (rest <= 0) | (is_entry.sum(-1) == classes)
            log_rest_p = torch.where(none, -math.inf, torch.where(none, 1.0, rest).log())
            # Columns beside the entries; what is no entry marks one column more.
            taken = torch.zeros(*z.shape[:1], classes + 1, dtype=torch.bool, device=z.device)
            taken = taken.scatter(-1, torch.where(is_entry, index, classes), True)[:, :classes]
            log_rest_q = _logsumexp(torch.where(taken, -math.inf, whole), -1) - logsumexps[0]
            log_q = torch.cat((log_q, log_rest_q[:, None]), -1)
            log_p = torch.cat((log_p, log_rest_p[:, None]), -1)
        d = _divergence(divergence, log_p, log_q, parameters)
        if soft:
            loss = loss + _of_share(alpha, temperature**2 * d)
        if return_statistics:
            statistics = _statistics(compared, (log_q, log_p), logsumexps, d)
    if hard:
        u = _transform(z, logit_scale, soft_cap)
        loss = loss + _of_share(1 - alpha, _cross_entropy(u, rows.labels, label_smoothing))
    return rows.result(loss, statistics, reduction, num_items)


def linear_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_logits: Tensor | Sequence[Tensor] | None = None,
    teacher_values: Tensor | None = None,
    teacher_indices: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    alpha: float | Tensor | None = None,
    divergence: str = "forward_kl",
    divergence_alpha: float | Tensor | None = None,
    beta: float | Tensor | None = None,
    teacher_kind: str = "logits",
    teacher_weights: Sequence[float] | None = None,
    teacher_mixture: str = "probs",
    tail: str = "renormalize",
    teacher_logsumexp: Tensor | None = None,
    standardize: bool = False,
    logit_scale: float | Tensor = 1.0,
    soft_cap: float | Tensor | None = None,
    teacher_logit_scale: float | Tensor = 1.0,
    teacher_soft_cap: float | Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    num_items: float | Tensor | None = None,
    reduction: str = "mean",
    return_statistics: bool = False,
) -> Tensor | tuple[Tensor, RowStatistics]:
    """``kdkernels.linear_distillation_loss``; the same arguments, shapes, dtypes and results."""
    student = _linear("student", student_hidden, student_weight, student_bias, student_hidden.dtype)
    shared = {
        "temperature": temperature,
        "alpha": alpha,
        "divergence": divergence,
        "beta": beta,
        "teacher_kind": teacher_kind,
        "logit_scale": logit_scale,
        "soft_cap": soft_cap,
        "label_smoothing": label_smoothing,
        "ignore_index": ignore_index,
        "weight": weight,
        "num_items": num_items,
        "reduction": reduction,
        "return_statistics": return_statistics,
    }
    of_dense = {
        "divergence_alpha": divergence_alpha,
        "teacher_weights": teacher_weights,
        "teacher_mixture": teacher_mixture,
        "standardize": standardize,
        "teacher_logit_scale": teacher_logit_scale,
        "teacher_soft_cap": teacher_soft_cap,
    }
    of_top_k = {"tail": tail, "teacher_logsumexp": teacher_logsumexp}
    form = teacher_form(
        teacher_hidden,
        teacher_weight,
        teacher_bias,
        teacher_logits,
        teacher_values,
        teacher_indices,
    )
    if teacher_values is not None and teacher_indices is not None:
        refuse_others(of_dense, tuple(of_dense), "teacher_values")
        return topk_distillation_loss(
            student, teacher_values, teacher_indices, labels, **shared, **of_top_k
        )
    refuse_others(of_top_k, tuple(of_top_k), "teacher_" + form)
    if form == "hidden":
        if teacher_kind != "logits":
            raise ValueError(
                f'teacher_kind is "{teacher_kind}"; with teacher_hidden it takes "logits"'
            )
        teacher_logits = _linear(
            "teacher", teacher_hidden, teacher_weight, teacher_bias, student_hidden.dtype
        )
    elif isinstance(teacher_logits, Sequence):
        teacher_logits = [t.to(student.dtype) for t in teacher_logits]
    else:
        assert teacher_logits is not None  # the form that is left
        teacher_logits = teacher_logits.to(student.dtype)
    return distillation_loss(student, teacher_logits, labels, **shared, **of_dense)


def _linear(side, hidden, weight, bias, dtype) -> Tensor:
    """Logits ``[*, V]``, in fp32 also from 16 bits."""
    for name, x, dims in (("hidden", hidden, None), ("weight", weight, 2), ("bias", bias, 1)):
        name = f"{side}_{name}"
        if dims == 1 and x is None:
            continue
        _take(name, x, TENSOR)
        check_floating(name, x)
        if x.dtype != dtype:
            raise TypeError(f"{name} has dtype {x.dtype}, student_hidden {dtype}")
        if x.dim() != dims if dims else x.dim() == 0:
            shape = {None: "[*, H]", 2: "[V, H]", 1: "[V]"}[dims]
            raise ValueError(f"{name} has shape {list(x.shape)}; it takes {shape}")
    if hidden.shape[-1] != weight.shape[1] or 0 in weight.shape:
        raise ValueError(
            f"{side}_weight has shape {list(weight.shape)}; it takes [V, {hidden.shape[-1]}], "
            "V and H >= 1"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{side}_bias has shape {list(bias.shape)}; it takes {list(weight.shape[:1])}"
        )
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    return F.linear(hidden.to(acc), weight.to(acc), None if bias is None else bias.to(acc))


# ---- distillation: what the arguments must be ----------------------------------------------------

_DEFAULTS = {
    "divergence_alpha": None,
    "teacher_weights": None,
    "teacher_mixture": "probs",
    "standardize": False,
    "teacher_logit_scale": 1,
    "teacher_soft_cap": None,
    "tail": "renormalize",
    "teacher_logsumexp": None,
}


def teacher_form(hidden, weight, bias, logits, values, indices) -> str:
    """Which teacher linear_distillation_loss was given: "hidden", "logits" or "values"."""
    forms = {"hidden": (hidden, weight), "logits": (logits, logits), "values": (values, indices)}
    given = [form for form, parts in forms.items() if any(x is not None for x in parts)]
    if len(given) != 1:
        what = " and ".join(f"teacher_{form}" for form in given) or "teacher_hidden"
        raise ValueError(
            f"{what} {'are' if len(given) > 1 else 'is'} {'given' if given else 'None'}; it takes "
            "one teacher: teacher_hidden with teacher_weight, teacher_logits, or teacher_values "
            "with teacher_indices"
        )
    second = {"hidden": "weight", "logits": "logits", "values": "indices"}[given[0]]
    for name, x in zip((given[0], second), forms[given[0]], strict=True):
        if x is None:
            raise ValueError(f"teacher_{name} is None, but its other half is given")
    if bias is not None and given[0] != "hidden":
        raise ValueError(f"teacher_bias goes with teacher_hidden, not with teacher_{given[0]}")
    return given[0]


def refuse_others(call: dict, names: Sequence[str], teacher: str) -> None:
    """Options that do not go with a form of teacher must be the defaults."""
    for name in names:
        value, default = call[name], _DEFAULTS[name]
        same = isinstance(value, (bool, int, float, str)) and value == default
        if value is not default and not same:
            raise ValueError(f"{name} does not go with {teacher}")


def _take(name, value, kind):
    if not fits(value, kind):
        raise TypeError(f"{name} is a {type(value).__name__}; it takes {kind}")


def _check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it takes one of {', '.join(choices)}")


def check_floating(name: str, tensor: Tensor) -> None:
    """Of a dtype that the losses take, and dense."""
    if tensor.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise TypeError(f"{name} has dtype {tensor.dtype}; it takes a floating-point dtype")
    if tensor.layout != torch.strided:
        raise ValueError(f"{name} has layout {tensor.layout}; it takes a dense tensor")


def _check_student(student, labels, weight):
    _take("student_logits", student, TENSOR)
    check_floating("student_logits", student)
    if student.dim() == 0 or student.shape[-1] == 0:
        raise ValueError(f"student_logits has shape {list(student.shape)}; it takes [*, V], V >= 1")
    for name, rows in (("labels", labels), ("weight", weight)):
        _take(name, rows, OPTIONAL_TENSOR)
        if rows is not None:
            _check_rows(name, rows, student)
    if labels is not None and labels.dtype != torch.int64:
        raise TypeError(f"labels has dtype {labels.dtype}; it takes int64")
    if weight is not None and weight.is_complex():
        raise TypeError(f"weight has dtype {weight.dtype}; it takes a real dtype")
    _check_detached("weight", weight)


def _check_rows(name, rows, student):
    if rows.shape != student.shape[:-1]:
        raise ValueError(
            f"{name} has shape {list(rows.shape)}; it takes {list(student.shape[:-1])}"
        )
    _check_device(name, rows, student)


def _check_device(name, tensor, student):
    if tensor.device != student.device:
        raise ValueError(f"{name} is on {tensor.device}, student_logits on {student.device}")


def _check_detached(name, tensor):
    if tensor is not None and torch.is_grad_enabled() and tensor.requires_grad:
        raise ValueError(f"{name} requires grad, but no gradient flows to it; detach it")


def _check_teachers(student, teacher, weights) -> tuple[list[Tensor], list[float]]:
    """The teachers with a weight above 0, and their weights, sum 1."""
    several = isinstance(teacher, (list, tuple))
    if not several:
        _take("teacher_logits", teacher, TENSOR)
        several = teacher.dim() == student.dim() + 1
    teachers = list(teacher) if several else [teacher]
    if not 1 <= len(teachers) <= MAX_TEACHERS:
        raise ValueError(
            f"teacher_logits holds {len(teachers)} teachers; it takes 1 to {MAX_TEACHERS}"
        )
    for one in teachers:
        _take("teacher_logits", one, TENSOR)
        check_floating("teacher_logits", one)
        if one.dtype != student.dtype:
            raise TypeError(f"teacher_logits has dtype {one.dtype}, student_logits {student.dtype}")
        if one.shape != student.shape:
            raise ValueError(
                f"teacher_logits has shape {list(one.shape)}, student_logits {list(student.shape)}"
            )
        _check_device("teacher_logits", one, student)
    if weights is None:
        return teachers, [1 / len(teachers)] * len(teachers)
    if not several:
        raise ValueError("teacher_weights goes with several teachers only")
    if not isinstance(weights, (Sequence, Tensor)) or isinstance(weights, str):
        raise TypeError(
            f"teacher_weights is a {type(weights).__name__}; it takes a list of numbers"
        )
    weights = list(weights)
    for w in weights:
        _take("teacher_weights", w, NUMBER)
    weights = [float(w) for w in weights]
    if len(weights) != len(teachers):
        raise ValueError(
            f"teacher_weights holds {len(weights)} numbers for {len(teachers)} teachers"
        )
    if not all(0 <= w < math.inf for w in weights) or not 0 < sum(weights) < math.inf:
        raise ValueError(
            f"teacher_weights is {weights}; it takes finite numbers of at least 0, one above"
        )
    kept = [(t, w / sum(weights)) for t, w in zip(teachers, weights, strict=True) if w > 0]
    return [t for t, _ in kept], [w for _, w in kept]


def _check_entries(student, values, indices):
    _take("teacher_values", values, TENSOR)
    _take("teacher_indices", indices, TENSOR)
    check_floating("teacher_values", values)
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"teacher_indices has dtype {indices.dtype}; it takes int32 or int64")
    if values.dim() == 0 or values.shape[:-1] != student.shape[:-1]:
        raise ValueError(
            f"teacher_values has shape {list(values.shape)}; it takes "
            f"[{', '.join(map(str, student.shape[:-1]))}, K]"
        )
    if not 1 <= values.shape[-1] <= MAX_TOP_K:
        raise ValueError(
            f"teacher_values has shape {list(values.shape)}; it takes 1 to {MAX_TOP_K} a row"
        )
    if indices.shape != values.shape:
        raise ValueError(
            f"teacher_indices has shape {list(indices.shape)}, teacher_values {list(values.shape)}"
        )
    _check_device("teacher_values", values, student)
    _check_device("teacher_indices", indices, student)


def _check_logsumexp(student, logsumexp, tail, kind, temperature):
    _take("teacher_logsumexp", logsumexp, OPTIONAL_TENSOR)
    if logsumexp is not None:
        if tail == "renormalize":
            raise ValueError('teacher_logsumexp does not go with tail="renormalize"')
        check_floating("teacher_logsumexp", logsumexp)
        _check_rows("teacher_logsumexp", logsumexp, student)
    elif tail != "renormalize" and (
        kind != "log_probs" or isinstance(temperature, Tensor) or temperature != 1
    ):
        raise ValueError(
            f'teacher_logsumexp is None; tail="{tail}" needs it, but for teacher_kind="log_probs" '
            "at temperature 1"
        )


def _check_transform(side, scale, cap):
    what = "a finite number above 0"
    _check_range(f"{side}logit_scale", scale, what, 0, math.inf, open_=True)
    if cap is not None:
        _check_range(f"{side}soft_cap", cap, what, 0, math.inf, open_=True)


def _check_numbers(temperature, alpha, labels, label_smoothing, num_items, reduction):
    _take("label_smoothing", label_smoothing, NUMBER)
    _take("num_items", 1 if num_items is None else num_items, NUMBER)
    _check_range("temperature", temperature, "a number from 1e-15 to 1e15", 1e-15, 1e15)
    if alpha is not None:
        _check_range("alpha", alpha, "a number in [0, 1]", 0, 1)
    if labels is None and alpha is not None and (isinstance(alpha, Tensor) or alpha != 1):
        raise ValueError(f"alpha is {alpha} without labels")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing is {label_smoothing}; it takes a number in [0, 1]")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction is "{reduction}"; it takes "mean", "sum" or "none"')
    if num_items is not None and reduction != "mean":
        raise ValueError(f'num_items goes with reduction="mean" only, not "{reduction}"')
    if isinstance(num_items, Tensor) and (num_items.numel() != 1 or num_items.is_complex()):
        raise ValueError("num_items is a tensor that is no real scalar; it takes a number")
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
    seed: int,
    step: int | Tensor = 0,
    stream: int = 0,
    offset: int = 0,
    distribution: str = "normal",
) -> Tensor:
    """``kdkernels.randn_like``."""
    index = torch.arange(x.numel(), dtype=torch.int64, device=x.device) + offset
    seed = seed - 2**64 if seed >= 2**63 else seed
    key = torch.tensor(seed, dtype=torch.int64, device=x.device)
    step = torch.as_tensor(step, dtype=torch.int64, device=x.device)
    return _numbers(index, key, step, stream, distribution).reshape(x.shape).to(x.dtype)


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


# ---- optimizers ----------------------------------------------------------------------------------


def noisy_update_(
    update: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    first: Sequence[Tensor | None],
    second: Sequence[Tensor | None],
    steps: Sequence[int],
    rules: Sequence[dict[str, float]],
    eps: Sequence[Tensor],
) -> list[tuple[Tensor, Tensor]]:
    """One optimizer step in place, one rule (keyword arguments of the functions below) a parameter.

    Args:
        update: "sgd", "adamw", "sgld" or "psgld".
        params, grads: of one shape a pair.
        first: SGD's momentum buffers, AdamW's first moments; second: second moments.
        steps: how many updates each parameter has had, this one included.
        rules: see ``_sgd``, ``_adamw`` and ``_langevin``.
        eps: the noise of each parameter, of variance 1.

    Returns:
        For each parameter what gradient and noise added: to the gradient, or for Langevin updates
        to the parameter.
    """
    one_step = {"sgd": _sgd, "adamw": _adamw, "sgld": _langevin, "psgld": _langevin}[update]
    shares = []
    for param, grad, m, v, step, rule, e in zip(
        params, grads, first, second, steps, rules, eps, strict=True
    ):
        acc = torch.float64 if param.dtype == torch.float64 else torch.float32
        p, g, m_, v_, e = (None if x is None else x.to(acc) for x in (param, grad, m, v, e))
        *new, added, noise = one_step(p, g, m_, v_, e, step, **rule)
        for old, value in zip((param, m, v), new, strict=True):
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
