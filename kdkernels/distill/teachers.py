"""Teachers of a few classes, made of dense ones."""

import operator
from typing import NamedTuple

import torch
from torch import Tensor

from kdkernels import reference
from kdkernels.errors import INT, NUMBER, OPTIONAL_TENSOR, TENSOR, check


class TopK(NamedTuple):
    """A teacher of a few classes a row, as ``topk_distillation_loss`` takes it.

    values ``[*, K]``, indices ``[*, K]`` (int32), logsumexp ``[*]``: of all logits / temperature.
    """

    values: Tensor
    indices: Tensor
    logsumexp: Tensor


def topk_teacher(
    teacher_logits: Tensor, k: int, *, temperature: float = 1.0, by: Tensor | None = None
) -> TopK:
    """The k largest classes of each row.

    Args:
        teacher_logits: ``[*, V]``.
        k: classes a row, from 1 to min(V, 1024).
        temperature: T of the loss that will use it, a number or ``[*]``; ``logsumexp`` depends on
            it.
        by: ``[*, V]``, whose k largest classes are taken instead of the teacher's own: the
            student's logits, for a reverse KL on the student's support.

    Returns:
        The teacher's logits at those classes.

    Raises:
        ValueError: k or a shape is not as said.

    Example:
        >>> top = kdkernels.topk_teacher(torch.tensor([[1.0, 3.0, 2.0, 0.0]]), 2)
        >>> top.values, top.indices
        (tensor([[3., 2.]]), tensor([[1, 2]], dtype=torch.int32))
    """
    k = _count(teacher_logits, k, temperature, repeated=False)
    check("by", by, OPTIONAL_TENSOR)
    if by is not None and by.shape != teacher_logits.shape:
        raise ValueError(
            f"by has shape {list(by.shape)}; it takes that of teacher_logits, "
            f"{list(teacher_logits.shape)}"
        )
    indices = (teacher_logits if by is None else by.detach()).topk(k, -1).indices
    return TopK(
        teacher_logits.gather(-1, indices),
        indices.int(),
        _tempered(teacher_logits, temperature).logsumexp(-1),
    )


def sample_teacher(
    teacher_logits: Tensor,
    k: int,
    *,
    temperature: float | Tensor = 1.0,
    proposal_power: float = 1.0,
    generator: torch.Generator | None = None,
) -> TopK:
    """Classes drawn from the teacher, with importance weights: "Sparse Logit Sampling" (Anshumann
    et al., arXiv 2503.16870), whose gradient of the forward KL has the dense one's expectation.

    k classes a row are drawn, with replacement, from a proposal proportional to p^proposal_power,
    p = softmax(t / T). Each draw of class i weighs p_i / proposal_i; a class's draws are added up,
    and a row's weights are scaled to sum 1.

    Args:
        teacher_logits: t, ``[*, V]``.
        k: draws a row, from 1 to 1024.
        temperature: T, that of the loss, a number or ``[*]``.
        proposal_power: 1 draws from the teacher itself, 0 from all classes alike.
        generator: of the draws; None: PyTorch's own.

    Returns:
        What ``topk_distillation_loss(..., tail="ignore", teacher_kind="log_probs",
        teacher_logsumexp=sample.logsumexp, temperature=T)`` takes; classes that were drawn twice
        leave entries with index -1 at the end of a row.

    Raises:
        ValueError: k or ``proposal_power`` is not as said.
    """
    k = _count(teacher_logits, k, temperature, repeated=True)
    check("proposal_power", proposal_power, NUMBER)
    if not 0 <= proposal_power < float("inf"):
        raise ValueError(f"proposal_power is {proposal_power}; it takes a number of at least 0")
    log_p = torch.log_softmax(_tempered(teacher_logits.detach(), temperature), -1)
    log_p = log_p.reshape(-1, log_p.shape[-1])
    proposal = torch.softmax(log_p * proposal_power, -1).masked_fill(log_p == -torch.inf, 0)
    drawn = torch.multinomial(proposal, k, replacement=True, generator=generator).sort(-1).values
    weight = (
        log_p.gather(-1, drawn) * (1 - proposal_power)
    ).exp()  # times what is the same in a row
    new = torch.ones_like(drawn, dtype=torch.bool)
    new[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    place = new.cumsum(-1) - 1
    weights = torch.zeros_like(weight).scatter_add_(-1, place, weight)
    indices = torch.full_like(drawn, -1).scatter_(-1, place, drawn)
    if isinstance(temperature, Tensor) and temperature.dim() > 0:
        temperature = temperature.reshape(-1, 1)
    values = temperature * (weights / weights.sum(-1, keepdim=True)).log()
    shape = (*teacher_logits.shape[:-1], k)
    return TopK(
        values.masked_fill(indices < 0, 0).reshape(shape),
        indices.int().reshape(shape),
        values.new_zeros(shape[:-1]),
    )


def _count(teacher_logits: Tensor, k: int, temperature: float | Tensor, repeated: bool) -> int:
    """k as an int, after a check of all three; repeated: a class may be drawn more than once."""
    check("k", k, INT)
    check("teacher_logits", teacher_logits, TENSOR)
    reference.check_floating("teacher_logits", teacher_logits)
    if teacher_logits.dim() == 0:
        raise ValueError("teacher_logits has shape []; it takes [*, V]")
    k, most = operator.index(k), reference.MAX_TOP_K
    if not repeated:
        most = min(most, teacher_logits.shape[-1])
    if not 1 <= k <= most:
        raise ValueError(f"k is {k}; it takes from 1 to {most}")
    rows = teacher_logits.shape[:-1]
    if isinstance(temperature, Tensor):  # the loss checks its numbers
        if temperature.is_complex():
            raise TypeError(f"temperature has dtype {temperature.dtype}; it takes a real dtype")
        if temperature.dim() > 0 and temperature.device != teacher_logits.device:
            raise ValueError(
                f"temperature is on {temperature.device}, teacher_logits on {teacher_logits.device}"
            )
        if temperature.shape not in ((), rows) or temperature.layout != torch.strided:
            raise ValueError(
                f"temperature has shape {list(temperature.shape)}; it takes [] or {list(rows)}"
            )
        return k
    check("temperature", temperature, NUMBER)
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; it takes a finite number above 0")
    return k


def _tempered(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """logits / temperature, in fp32 also of 16 bits; a tensor has a temperature per row."""
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    if isinstance(temperature, Tensor) and temperature.dim() > 0:
        temperature = temperature.unsqueeze(-1)
    # A Fraction, too, is a number.
    temperature = temperature.to(acc) if isinstance(temperature, Tensor) else float(temperature)
    return logits.to(acc) / temperature
