"""The distillation losses, from checked arguments to the reduced loss."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kdkernels.reference.arguments import (
    check_choice,
    check_entries,
    check_head,
    check_logsumexp,
    check_numbers,
    check_student,
    check_teacher_index,
    check_teachers,
    check_transform,
    refuse_others,
    teacher_form,
    teacher_heads,
    without_teacher,
)
from kdkernels.reference.divergences import (
    TOP_K_DIVERGENCES,
    divergence_of,
    divergence_parameters,
    finite_logsumexp,
)
from kdkernels.reference.rows import (
    KeptRows,
    RowStatistics,
    as_column,
    as_logits,
    broken_rows,
    cross_entropy_of,
    mixed,
    nothing_of,
    of_share,
    of_teachers,
    poisoned,
    scaled_and_capped,
    shares_of,
    standardized,
    statistics_of,
)


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
    teacher_index: Tensor | None = None,
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
    check_student(student_logits, labels, weight)
    if teacher_index is not None:
        rows = student_logits.shape[:-1]
        teacher_logits = _chosen("teacher_logits", teacher_logits, teacher_index, rows)
    teachers, shares = check_teachers(student_logits, teacher_logits, teacher_weights)
    parameters = divergence_parameters(divergence, divergence_alpha, beta)
    if divergence == "decoupled" and labels is None:
        raise ValueError('labels is None; divergence="decoupled" needs labels')
    check_choice("teacher_kind", teacher_kind, ("logits", "log_probs", "probs"))
    check_choice("teacher_mixture", teacher_mixture, ("probs", "log_probs"))
    check_transform("", logit_scale, soft_cap)
    check_transform("teacher_", teacher_logit_scale, teacher_soft_cap)
    if teacher_kind != "logits":
        for name, value, default in (
            ("teacher_logit_scale", teacher_logit_scale, 1),
            ("teacher_soft_cap", teacher_soft_cap, None),
        ):
            if isinstance(value, Tensor) or value != default:
                raise ValueError(f'{name} is {value}, but teacher_kind is "{teacher_kind}"')
    check_numbers(temperature, alpha, labels, label_smoothing, num_items, reduction)
    if alpha is None:
        alpha = 1.0 if labels is None else 0.5

    rows = KeptRows(student_logits, labels, weight, ignore_index)
    temperature, alpha, logit_scale, soft_cap, teacher_logit_scale, teacher_soft_cap = map(
        rows.number,
        (temperature, alpha, logit_scale, soft_cap, teacher_logit_scale, teacher_soft_cap),
    )
    parameters = {name: rows.number(x) for name, x in parameters.items()}
    soft, hard = shares_of(alpha)
    z, teachers = rows.of(student_logits), [rows.of(t) for t in teachers]
    broken = broken_rows(z)
    if soft:
        raw = [as_logits(t.detach(), teacher_kind) for t in teachers]
        broken = broken | torch.stack([broken_rows(t) for t in raw]).any(0)
        excluded = torch.stack([t == -math.inf for t in raw])
        together = excluded.all(0) if teacher_mixture == "probs" else excluded.any(0)
        broken = broken | together.all(-1)
        teachers = [poisoned(t, broken) for t in teachers]
    u = scaled_and_capped(poisoned(z, broken), logit_scale, soft_cap)

    loss, statistics = nothing_of(z, *teachers), None
    if soft or return_statistics:
        compared = [u]
        for t in teachers:
            t = as_logits(t, teacher_kind)
            compared.append(scaled_and_capped(t, teacher_logit_scale, teacher_soft_cap))
        if standardize:
            compared = [standardized(x) for x in compared]
        compared = [x / as_column(temperature) for x in compared]
        log_q, *log_ps = (x.log_softmax(-1) for x in compared)
        log_p = mixed(log_ps, shares, teacher_mixture)
        d = divergence_of(divergence, log_p, log_q, parameters, rows.labels)
        if soft:
            loss = loss + of_share(alpha, temperature**2 * d)
        if return_statistics:
            # A mixture is one of probabilities; it has no logits.
            both = (compared[0], compared[1] if len(teachers) == 1 else log_p)
            logsumexps = [x.logsumexp(-1) for x in both]
            statistics = statistics_of(both, (log_q, log_p), logsumexps, d)
    if hard:
        loss = loss + of_share(1 - alpha, cross_entropy_of(u, rows.labels, label_smoothing))
    return rows.result(loss, statistics, reduction, num_items)


def topk_distillation_loss(
    student_logits: Tensor,
    teacher_values: Tensor | Sequence[Tensor],
    teacher_indices: Tensor | Sequence[Tensor],
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    alpha: float | Tensor | None = None,
    divergence: str = "forward_kl",
    beta: float | Tensor | None = None,
    tail: str = "renormalize",
    teacher_kind: str = "logits",
    teacher_index: Tensor | None = None,
    teacher_logsumexp: Tensor | Sequence[Tensor] | None = None,
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
    check_student(student_logits, labels, weight)
    check_choice("divergence", divergence, TOP_K_DIVERGENCES)
    parameters = divergence_parameters(divergence, None, beta)
    check_choice("tail", tail, ("renormalize", "bucket", "ignore"))
    check_choice("teacher_kind", teacher_kind, ("logits", "log_probs"))
    check_transform("", logit_scale, soft_cap)
    check_numbers(temperature, alpha, labels, label_smoothing, num_items, reduction)
    teacher_values, teacher_indices, teacher_logsumexp = _entries(
        teacher_values, teacher_indices, teacher_logsumexp, teacher_index, student_logits.shape[:-1]
    )
    check_entries(student_logits, teacher_values, teacher_indices)
    check_logsumexp(student_logits, teacher_logsumexp, tail, teacher_kind, temperature)
    if alpha is None:
        alpha = 1.0 if labels is None else 0.5

    rows = KeptRows(student_logits, labels, weight, ignore_index)
    temperature, alpha, logit_scale, soft_cap = map(
        rows.number, (temperature, alpha, logit_scale, soft_cap)
    )
    parameters = {name: rows.number(x) for name, x in parameters.items()}
    soft, hard = shares_of(alpha)
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
        broken = broken_rows(z)
    if soft and tail == "renormalize":
        broken = broken | (any_entry & (broken_rows(entries_of(z)) | broken_rows(values)))
    elif soft:
        broken = broken | ~((values < math.inf).all(-1) & logsumexp.isfinite())
    z, values = poisoned(z, broken), poisoned(values, broken)
    entries = scaled_and_capped(entries_of(z), logit_scale, soft_cap)

    loss, statistics = nothing_of(z, values), None
    if soft or return_statistics:
        compared = [entries / as_column(temperature), values / as_column(temperature)]
        whole = scaled_and_capped(z, logit_scale, soft_cap) / as_column(temperature)
        if tail == "renormalize":
            logsumexps = [finite_logsumexp(x, -1) for x in compared]
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
            log_rest_q = finite_logsumexp(torch.where(taken, -math.inf, whole), -1) - logsumexps[0]
            log_q = torch.cat((log_q, log_rest_q[:, None]), -1)
            log_p = torch.cat((log_p, log_rest_p[:, None]), -1)
        d = divergence_of(divergence, log_p, log_q, parameters)
        if soft:
            loss = loss + of_share(alpha, temperature**2 * d)
        if return_statistics:
            statistics = statistics_of(compared, (log_q, log_p), logsumexps, d)
    if hard:
        u = scaled_and_capped(z, logit_scale, soft_cap)
        loss = loss + of_share(1 - alpha, cross_entropy_of(u, rows.labels, label_smoothing))
    return rows.result(loss, statistics, reduction, num_items)


def linear_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | Sequence[Tensor] | None = None,
    teacher_weight: Tensor | Sequence[Tensor] | None = None,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | Sequence[Tensor | None] | None = None,
    teacher_logits: Tensor | Sequence[Tensor] | None = None,
    teacher_values: Tensor | Sequence[Tensor] | None = None,
    teacher_indices: Tensor | Sequence[Tensor] | None = None,
    temperature: float | Tensor = 1.0,
    alpha: float | Tensor | None = None,
    divergence: str = "forward_kl",
    divergence_alpha: float | Tensor | None = None,
    beta: float | Tensor | None = None,
    teacher_kind: str = "logits",
    teacher_weights: Sequence[float] | None = None,
    teacher_mixture: str = "probs",
    teacher_index: Tensor | None = None,
    tail: str = "renormalize",
    teacher_logsumexp: Tensor | Sequence[Tensor] | None = None,
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
    student = linear("student_", student_hidden, student_weight, student_bias, student_hidden.dtype)
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
        labels,
    )
    if teacher_values is not None and teacher_indices is not None:
        refuse_others(of_dense, tuple(of_dense), "teacher_values")
        return topk_distillation_loss(
            student,
            teacher_values,
            teacher_indices,
            labels,
            teacher_index=teacher_index,
            **shared,
            **of_top_k,
        )
    refuse_others(of_top_k, tuple(of_top_k), "teacher_" + form)
    if form == "none":
        refuse_others(of_dense, tuple(of_dense), "labels alone")
        shared["alpha"] = without_teacher(alpha, return_statistics)
        return distillation_loss(student, student.detach(), labels, **shared)
    if form == "hidden":
        if teacher_kind != "logits":
            raise ValueError(
                f'teacher_kind is "{teacher_kind}"; with teacher_hidden it takes "logits"'
            )
        heads = teacher_heads(teacher_hidden, teacher_weight, teacher_bias, teacher_index)
        teacher_logits = [linear("teacher_", *head, student_hidden.dtype) for head in heads]
        if teacher_index is None:
            teacher_logits = teacher_logits[0]
    elif isinstance(teacher_logits, Sequence):
        teacher_logits = [t.to(student.dtype) for t in teacher_logits]
    elif teacher_logits is not None:
        teacher_logits = teacher_logits.to(student.dtype)
    assert teacher_logits is not None  # which one of the forms has made
    return distillation_loss(
        student, teacher_logits, labels, teacher_index=teacher_index, **shared, **of_dense
    )


def linear(prefix, hidden, weight, bias, dtype) -> Tensor:
    """Logits ``[*, V]``, in fp32 also from 16 bits."""
    check_head(prefix, hidden, weight, bias, dtype)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    return F.linear(hidden.to(acc), weight.to(acc), None if bias is None else bias.to(acc))


def _entries(values, indices, logsumexp, index, rows) -> tuple[Tensor, Tensor, Tensor | None]:
    """The rows' own of several top-k teachers."""
    if index is None:
        return values, indices, logsumexp
    if logsumexp is not None:
        columns = [x[..., None] for x in logsumexp]
        logsumexp = _chosen("teacher_logsumexp", columns, index, rows).squeeze(-1)
    values = _chosen("teacher_values", values, index, rows)
    return values, _chosen("teacher_indices", indices, index, rows), logsumexp


def _chosen(name, teachers, index, rows) -> Tensor:
    """The rows' own of several teachers."""
    if not isinstance(teachers, (list, tuple)) and not (
        isinstance(teachers, Tensor) and teachers.dim() > len(rows) + 1
    ):
        raise ValueError(f"teacher_index goes with several teachers, and {name} is one")
    check_teacher_index(index, len(teachers), rows, values=True)
    return of_teachers(teachers, index)
