"""Losses of other libraries, by their names and signatures, made by this library's kernels.

One import switches; values are theirs, so the factor T^2 is where they have it, which is not where
``distillation_loss`` has it::

    from torch.nn.functional import kl_div                      # torch
    from torch.nn import KLDivLoss
    from trl.experimental.gkd import GKDTrainer                 # GKDTrainer.generalized_jsd_loss
    from trl.trainer.distillation_trainer import _chunked_divergence_loss
    from liger_kernel.transformers import LigerJSD, LigerKLDIVLoss, LigerFusedLinearJSD
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    from torchdistill.losses.mid_level import KDLoss

    from kdkernels.compat import kl_div, KLDivLoss, generalized_jsd_loss, chunked_divergence_loss
    from kdkernels.compat import LigerJSD, LigerKLDIVLoss, LigerFusedLinearJSD
    from kdkernels.compat import LigerFusedLinearJSDLoss, KDLoss

Different in all of them: the loss is fp32 for 16-bit logits (fp64 for fp64), and nothing between
them is rounded to 16 bits; a class that both sides exclude with -inf adds 0, not NaN; a row that is
ignored may hold NaN; the loss is never negative; and a loss an element, ``[*, V]``, is refused with
ValueError, since no such tensor is made: ``distillation_loss(..., reduction="none")`` has one a
row. Student and teacher may differ in dtype where theirs may.

From 16-bit hidden states the logits are fp32, as TRL's and those of Liger's ``LigerFusedLinearJSD``
are; Liger's ``chunked_loss`` rounds them to 16 bits, and its gradients are off by 10 to 50 % where
the student is near its teacher (`make accuracy`).

Nothing of the other libraries is imported here.
"""

from typing import Any

import torch
from torch import Tensor, nn

from kdkernels.distill import distillation_loss, linear_distillation_loss
from kdkernels.errors import TENSOR, check

__all__ = [
    "KDLoss",
    "KLDivLoss",
    "LigerFusedLinearJSD",
    "LigerFusedLinearJSDLoss",
    "LigerJSD",
    "LigerKLDIVLoss",
    "chunked_divergence_loss",
    "generalized_jsd_loss",
    "kl_div",
]


def _without_t2(loss: Tensor, temperature: float) -> Tensor:
    return loss if temperature == 1 else loss / temperature**2


def _alike(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype that PyTorch's arithmetic would give them."""
    if student.dtype == teacher.dtype:
        return student, teacher
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    return student.to(dtype), teacher.to(dtype)


def _heads(student: tuple, teacher: tuple) -> dict[str, Any]:
    """Hidden states, weight and bias of both sides as the fused linear loss takes them: whole, all
    in the dtype of the student's hidden states, the teacher's without gradient.
    """
    given = {}
    for side, tensors in (("student", student), ("teacher", teacher)):
        for name, x in zip(("hidden", "weight", "bias"), tensors, strict=True):
            if hasattr(x, "full_tensor"):
                x = x.full_tensor()
            if x is not None:
                x = x.to(student[0].dtype)
                x = x.detach() if side == "teacher" else x
            given[f"{side}_{name}"] = x
    return given


def _check(reduction: str) -> None:
    if reduction not in ("batchmean", "mean", "sum"):
        raise ValueError(
            f'reduction is "{reduction}"; here it takes "batchmean", "mean" or "sum", and '
            'kdkernels.distillation_loss(..., reduction="none") gives one loss a row'
        )


def _kl(student, teacher, reduction, dim, temperature=1.0, teacher_kind="logits") -> Tensor:
    """KL(p_t, p_s) over the classes in dimension `dim`, without T^2, reduced as F.kl_div does."""
    _check(reduction)
    items = {"batchmean": student.shape[0], "mean": student.numel()}.get(reduction)
    student, teacher = _alike(student.movedim(dim, -1), teacher.movedim(dim, -1))
    loss = distillation_loss(
        student,
        teacher,
        temperature=temperature,
        teacher_kind=teacher_kind,
        reduction="sum" if reduction == "sum" else "mean",
        num_items=None if items is None else max(items, 1),
    )
    return _without_t2(loss, temperature)


# ---- PyTorch -------------------------------------------------------------------------------------


def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: None = None,
    reduce: None = None,
    reduction: str = "mean",
    log_target: bool = False,
    *,
    dim: int | None = None,
) -> Tensor:
    """``torch.nn.functional.kl_div`` (read in torch 2.14) of distributions, as distillation has it:
    KL(target, exp(input)), where ``input`` comes from ``log_softmax``.

    It keeps your softmaxes, and a factor T^2 if you have one. What both are for is one call, which
    is faster still; for ``[N, V]``::

        F.kl_div(F.log_softmax(s / T, -1), F.softmax(t / T, -1), reduction="batchmean") * T**2
        kdkernels.distillation_loss(s, t, temperature=T)

    The gradient in ``input`` is not PyTorch's, but that of the logits behind it is. PyTorch's is
    -p, with p the target; here log-probabilities are taken as logits, q = softmax(input), and it is
    q - p. What ``log_softmax`` makes of a gradient g is g - q sum(g): of -p it is -p + q sum(p), of
    q - p it is q - p - 0, and sum(p) = 1. Likewise in a ``target`` that came from ``softmax`` or
    ``log_softmax``.

    Args:
        input: log-probabilities, ``[N, V]``, ``[V]``, or of more dimensions with ``dim``.
        target: probabilities, or log-probabilities with ``log_target``; the shape of ``input``.
        size_average, reduce: PyTorch's deprecated ones; refused.
        reduction: "mean", over all N V elements as PyTorch has it; "batchmean", over the first
            dimension; or "sum".
        log_target: whether ``target`` is log-probabilities.
        dim: of the classes. Default: the last one, where there are at most two; with more it has to
            be said, since a sum over elements does not care and softmaxes do.

    Where else it differs from PyTorch: both arguments are scaled to sum 1 (theirs need not have
    it); shapes must be equal; and as the module says.
    """
    if size_average is not None or reduce is not None:
        raise ValueError("size_average and reduce are deprecated in PyTorch; pass reduction")
    check("input", input, TENSOR)
    check("target", target, TENSOR)
    if dim is None:
        if input.dim() > 2:
            raise ValueError(
                f"input has {input.dim()} dimensions; say which one holds the classes: dim=-1 for "
                "[B, S, V], dim=1 for [B, C, H, W]"
            )
        dim = -1
    return _kl(input, target, reduction, dim, teacher_kind="log_probs" if log_target else "probs")


class KLDivLoss(nn.KLDivLoss):
    """``torch.nn.KLDivLoss`` (read in torch 2.14); differs from it as ``kl_div`` does.

    Args:
        args, kwargs: those of ``torch.nn.KLDivLoss``.
        dim: of the classes, as ``kl_div`` has it.
    """

    def __init__(self, *args, dim: int | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.dim = dim

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of one batch; see ``kl_div``."""
        return kl_div(
            input, target, reduction=self.reduction, log_target=self.log_target, dim=self.dim
        )


# ---- TRL -----------------------------------------------------------------------------------------


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: float | Tensor | None = None,
) -> Tensor:
    """TRL's ``GKDTrainer.generalized_jsd_loss`` (read in trl 1.16.0, ``trl.experimental.gkd``): the
    generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649, equation 1), without T^2.

    In place of theirs: ``class Trainer(GKDTrainer): generalized_jsd_loss =
    staticmethod(kdkernels.compat.generalized_jsd_loss)``.

    Args:
        student_logits, teacher_logits: ``[B, S, V]``, or any ``[*, V]``.
        labels: ``[B, S]``; positions with -100 are left out.
        beta: 0 is KL(p_t, p_s), 1 is KL(p_s, p_t).
        temperature: of both softmaxes.
        reduction: "batchmean", over the kept positions, or without ``labels`` over the first
            dimension, B, as TRL has it; "mean", over the kept positions' elements; or "sum".
        num_items_in_batch: what the sum is divided by instead, whatever the reduction.

    Differs from TRL as the module says, and where no position is kept, "mean" is 0, not NaN. GOLD's
    variant with ``logits_are_probs=True``, whose probabilities
    are raised to 1e-8 and then not scaled again, is not made.
    """
    if num_items_in_batch is None:
        _check(reduction)
    items = num_items_in_batch
    if isinstance(items, Tensor):
        items = items.to(student_logits.device)
    elif items is None and labels is None and reduction != "sum":
        rows = len(student_logits) if reduction == "batchmean" else student_logits[..., 0].numel()
        items = max(rows, 1)
    student_logits, teacher_logits = _alike(student_logits, teacher_logits)
    loss = distillation_loss(
        student_logits,
        teacher_logits,
        divergence="js",
        beta=beta,
        temperature=temperature,
        weight=None if labels is None else labels != -100,
        reduction="sum" if reduction == "sum" and items is None else "mean",
        num_items=items,
    )
    if reduction == "mean" and num_items_in_batch is None:
        loss = loss / student_logits.shape[-1]
    return _without_t2(loss, temperature)


def chunked_divergence_loss(
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    student_lm_head_weight: Tensor,
    teacher_lm_head_weight: Tensor,
    completion_mask: Tensor,
    beta: float,
    num_items_in_batch: float | Tensor | None = None,
    student_lm_head_bias: Tensor | None = None,
    teacher_lm_head_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """What TRL's ``DistillationTrainer`` makes its loss with, ``_chunked_divergence_loss`` (read in
    trl 1.16.0, ``trl.trainer.distillation_trainer``): the generalised Jensen-Shannon divergence of
    GKD from hidden states and heads, without T^2, and without the logits in memory.

    TRL has no place to choose it, and the name is private, so of that version::

        from trl.trainer import distillation_trainer

        distillation_trainer._chunked_divergence_loss = kdkernels.compat.chunked_divergence_loss

    Args:
        student_hidden_states, teacher_hidden_states: ``[B, K, H]`` and ``[B, K, Ht]``.
        student_lm_head_weight, teacher_lm_head_weight: ``[V, H]`` and ``[V, Ht]``; DTensors (FSDP2)
            are gathered, as TRL does.
        completion_mask: ``[B, K]``; positions with 0 are left out.
        beta: 0 is KL(p_t, p_s), 1 is KL(p_s, p_t).
        num_items_in_batch: what the sum is divided by; default: the kept positions.
        student_lm_head_bias, teacher_lm_head_bias: ``[V]``.
        student_logit_scale, teacher_logit_scale, student_final_logit_softcapping,
            teacher_final_logit_softcapping: the logits are cap * tanh(scale * z / cap).
        temperature: of both softmaxes.

    Returns:
        (loss, sum of the student's entropies in nats, number of kept positions); only the loss has
        a gradient, which goes to the student.

    Differs from TRL as the module says, and the teacher's tensors are taken in the dtype of the
    student's hidden states.
    """
    kept = completion_mask != 0
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(student_hidden_states.device)
    loss, rows = linear_distillation_loss(
        **_heads(
            (student_hidden_states, student_lm_head_weight, student_lm_head_bias),
            (teacher_hidden_states, teacher_lm_head_weight, teacher_lm_head_bias),
        ),
        divergence="js",
        beta=beta,
        temperature=temperature,
        logit_scale=student_logit_scale,
        soft_cap=student_final_logit_softcapping,
        teacher_logit_scale=teacher_logit_scale,
        teacher_soft_cap=teacher_final_logit_softcapping,
        weight=kept,
        num_items=num_items_in_batch,
        return_statistics=True,
    )
    return _without_t2(loss, temperature), rows.student_entropy.sum(), kept.sum()


# ---- Liger-Kernel --------------------------------------------------------------------------------


class LigerJSD(nn.Module):
    """Liger's ``LigerJSD`` (read in liger-kernel 0.8.5, ``liger_kernel.transformers``): the
    generalised Jensen-Shannon divergence of log-probabilities, averaged over the kept rows.

    From logits in one call, without the two softmaxes before it: ``kdkernels.distillation_loss(s,
    t, labels, alpha=1, divergence="js", beta=beta)``.

    The gradient in ``log_q`` is another one than Liger's, the gradient of the logits behind its
    ``log_softmax`` is the same (see ``kl_div``). Nothing flows to ``log_p``, as with Liger.

    Args:
        beta: 0 is KL(p, q), 1 is KL(q, p), with p the teacher.
        ignore_index: the label of rows to leave out.
    """

    def __init__(self, beta: float = 0.5, ignore_index: int = -100):
        super().__init__()
        self.beta = beta
        self.ignore_index = ignore_index

    def forward(self, log_q: Tensor, log_p: Tensor, shift_labels: Tensor | None = None) -> Tensor:
        """The loss of ``[BT, V]`` log-probabilities of student and teacher, ``[BT]`` labels."""
        log_q, log_p = _alike(log_q, log_p.detach())
        return distillation_loss(
            log_q,
            log_p,
            divergence="js",
            beta=self.beta,
            teacher_kind="log_probs",
            weight=None if shift_labels is None else shift_labels != self.ignore_index,
        )


class LigerKLDIVLoss(KLDivLoss):
    """Liger's ``LigerKLDIVLoss`` (read in liger-kernel 0.8.5, ``liger_kernel.transformers``).

    Differs from it as ``kl_div`` does from PyTorch's: nothing flows to the target, as with Liger;
    a probability below ``eps`` counts as what it is, not with the logarithm of ``eps``.

    Args:
        eps: taken, and without effect.
        args, kwargs: those of ``torch.nn.KLDivLoss``.
    """

    def __init__(self, eps: float = 1e-10, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.eps = eps

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        """The loss of ``[BT, V]`` log-probabilities and target; see ``kl_div``."""
        return super().forward(y_pred, y_true.detach())


class LigerFusedLinearJSD(nn.Module):
    """Liger's ``LigerFusedLinearJSD`` (read in liger-kernel 0.8.5, ``liger_kernel.transformers``):
    the generalised Jensen-Shannon divergence from hidden states and heads, averaged over the kept
    rows, without T^2.

    Nothing flows to the teacher, as with Liger; its tensors are taken in the dtype of the student's
    hidden states, where Liger makes each side's logits in its own. 16-bit gradients of the weight
    are added up in fp32, whatever ``accum_dtype`` is; how much memory logits take is
    ``memory_budget`` of ``linear_distillation_loss``.

    Args:
        jsd_beta: 0 is KL(p, q), 1 is KL(q, p), with p the teacher.
        ignore_index: the label of rows to leave out.
        temperature: of both softmaxes.
        accum_dtype: taken, and without effect.
    """

    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.jsd_beta = jsd_beta
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.accum_dtype = accum_dtype

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        shift_labels: Tensor | None = None,
    ) -> Tensor:
        """The loss of hidden states ``[BT, H]``, ``[BT, Ht]``, heads ``[V, H]``, ``[V, Ht]``."""
        loss = linear_distillation_loss(
            **_heads((student_input, student_weight, None), (teacher_input, teacher_weight, None)),
            divergence="js",
            beta=self.jsd_beta,
            temperature=self.temperature,
            weight=None if shift_labels is None else shift_labels != self.ignore_index,
        )
        return _without_t2(loss, self.temperature)


class LigerFusedLinearJSDLoss(nn.Module):
    """Liger's ``LigerFusedLinearJSDLoss`` (``liger_kernel.chunked_loss``, read in liger-kernel
    0.8.5)::

        loss = weight_hard_loss * CE(z, label) + weight_soft_loss * JSD(p_t, p_s)

    from hidden states and heads, both terms averaged over the kept rows, the softmaxes of the
    second at the temperature, without T^2.

    Differences: the student's vocabulary must be the teacher's (Liger gives classes that it lacks
    the logit 0); the teacher's tensors are taken in the dtype of the student's hidden states; the
    two weights are not negative, and not both 0.

    Args:
        weight_hard_loss, weight_soft_loss: the two weights.
        beta: 0 is KL(p_t, p_s), 1 is KL(p_s, p_t).
        ignore_index: the label of rows to leave out.
        temperature: of the divergence.
        compiled, chunk_size: taken, and without effect; ``linear_distillation_loss`` has
            ``memory_budget``.
        return_soft_hard_loss: return (loss, JSD, CE), the last two without gradient. The two terms
            are then made one after the other, in twice the time.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ):
        super().__init__()
        self.weight_hard_loss = weight_hard_loss
        self.weight_soft_loss = weight_soft_loss
        self.beta = beta
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.compiled = compiled
        self.chunk_size = chunk_size
        self.return_soft_hard_loss = return_soft_hard_loss

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """The loss of hidden states ``[BT, H]``, ``[BT, Ht]``, heads ``[V, H]``, ``[V, Ht]``,
        labels ``[BT]`` and biases ``[V]``.
        """
        student = student_input, student_weight, student_bias
        heads = _heads(student, (teacher_input, teacher_weight, teacher_bias))

        def loss(alpha: float) -> Tensor:
            return linear_distillation_loss(
                **heads,
                labels=true_labels,
                alpha=alpha,
                divergence="js",
                beta=self.beta,
                temperature=self.temperature,
                ignore_index=self.ignore_index,
            )

        hard, soft = self.weight_hard_loss, self.weight_soft_loss
        if self.return_soft_hard_loss:
            jsd, ce = _without_t2(loss(1.0), self.temperature), loss(0.0)
            return hard * ce + soft * jsd, jsd.detach(), ce.detach()
        return _weighted(loss, hard, soft / self.temperature**2)


def _weighted(loss, hard: float, soft: float) -> Tensor:
    """hard CE + soft T^2 D, from ``loss(alpha)``, which is alpha T^2 D + (1 - alpha) CE."""
    total = hard + soft
    if not (hard >= 0 and soft >= 0 and total > 0):
        raise ValueError(
            f"the weights of hard and soft loss are {hard} and {soft}; they take numbers of at "
            "least 0, and not both 0"
        )
    made = loss(soft / total)
    return made if total == 1 else total * made


# ---- torchdistill --------------------------------------------------------------------------------


class KDLoss(nn.Module):
    """torchdistill's ``KDLoss`` (read in torchdistill 1.1.5, ``torchdistill.losses.mid_level``)::

        loss = alpha * CE(z, label) + beta * T^2 * KL(p_t, p_s)

    and, as torchdistill has it, KL(p_t, p_s) alone, with neither ``beta`` nor T^2, where ``alpha``
    is None or 0 or there are no targets.

    For configurations to find it instead of theirs:
    ``torchdistill.losses.registry.register_mid_level_loss(key="KDLoss")(kdkernels.compat.KDLoss)``.

    Logits are ``[N, C]``, or ``[N, C, *]``. One kernel makes both terms for ``[N, C]`` and targets
    ``[N]`` of classes, where ``kwargs`` has no more than ``label_smoothing``. It leaves a sample
    whose target is -100 out of both terms, where torchdistill leaves it out of the first only.
    With any other of ``kwargs``, targets or logits the first term is PyTorch's, in a second pass,
    and such a sample is in the second.

    Args:
        student_module_path, student_module_io, teacher_module_path, teacher_module_io: where the
            logits are in the two dictionaries that ``forward`` gets.
        temperature: T.
        alpha: weight of the cross-entropy: not ``alpha`` of ``distillation_loss``.
        beta: weight of the divergence; default 1 - alpha.
        reduction: "batchmean", "mean" (where KL is a mean over N C elements and CE one over N) or
            "sum".
        kwargs: those of ``torch.nn.CrossEntropyLoss``.

    Differences besides: ``alpha`` may be None without ``beta``.
    """

    def __init__(
        self,
        student_module_path: str,
        student_module_io: str,
        teacher_module_path: str,
        teacher_module_io: str,
        temperature: float,
        alpha: float | None = None,
        beta: float | None = None,
        reduction: str = "batchmean",
        **kwargs,
    ):
        super().__init__()
        self.student_module_path = student_module_path
        self.student_module_io = student_module_io
        self.teacher_module_path = teacher_module_path
        self.teacher_module_io = teacher_module_io
        self.temperature = temperature
        self.alpha = alpha
        self.beta = beta if beta is not None or alpha is None else 1 - alpha
        self.reduction = reduction
        _check(reduction)
        self.one_pass = not kwargs.keys() - {"label_smoothing"}
        self.cross_entropy_loss = nn.CrossEntropyLoss(
            reduction="mean" if reduction == "batchmean" else reduction, **kwargs
        )

    def forward(
        self, student_io_dict: dict, teacher_io_dict: dict, targets=None, *args, **kwargs
    ) -> Tensor:
        """The loss of one batch, as torchdistill's boxes call it."""
        student = student_io_dict[self.student_module_path][self.student_module_io]
        teacher = teacher_io_dict[self.teacher_module_path][self.teacher_module_io]
        alpha, beta = self.alpha, self.beta
        if alpha is None or beta is None or alpha == 0 or targets is None:
            return _kl(student, teacher, self.reduction, 1, self.temperature)
        if not self.one_pass or student.dim() != 2 or targets.dim() != 1:
            divergence = _kl(student, teacher, self.reduction, 1, self.temperature)
            hard = self.cross_entropy_loss(student, targets)
            return alpha * hard + beta * self.temperature**2 * divergence
        student, teacher = _alike(student, teacher)

        def loss(alpha: float) -> Tensor:
            return distillation_loss(
                student,
                teacher,
                targets,
                temperature=self.temperature,
                alpha=alpha,
                label_smoothing=self.cross_entropy_loss.label_smoothing,
                reduction="sum" if self.reduction == "sum" else "mean",
            )

        # "mean" is one over N C elements in the divergence and over N rows in the cross-entropy.
        classes = student.shape[1] if self.reduction == "mean" else 1
        return _weighted(loss, alpha, beta / classes)
