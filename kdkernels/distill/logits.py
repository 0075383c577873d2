"""The losses on logits: of dense teachers and of teachers of a few classes."""

from collections.abc import Sequence
from typing import Literal, Unpack, overload

from torch import Tensor
from torch.distributed import ProcessGroup

from kdkernels import reference
from kdkernels.distill.calls import (
    OF_TOP_K,
    by_reference,
    check_teacher_weights,
    choose_teachers,
    is_plain,
    listed,
    loss_of_call,
)
from kdkernels.distill.options import DenseOptions, TopKOptions
from kdkernels.reference import RowStatistics


@overload
def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | Sequence[Tensor],
    labels: Tensor | None = None,
    *,
    return_statistics: Literal[False] = False,
    **options: Unpack[DenseOptions],
) -> Tensor: ...
@overload
def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | Sequence[Tensor],
    labels: Tensor | None = None,
    *,
    return_statistics: Literal[True],
    **options: Unpack[DenseOptions],
) -> tuple[Tensor, RowStatistics]: ...
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
    inplace: bool = False,
    return_statistics: bool = False,
    process_group: ProcessGroup | None = None,
    backend: str = "fused",
) -> Tensor | tuple[Tensor, RowStatistics]:
    r"""Distillation loss of Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural
    Network" (arXiv 1503.02531, section 2), for any divergence and teacher.

    For one row, with p_s = softmax(z / T) and p_t = softmax(t / T)::

        loss = alpha * T^2 * D(p_t, p_s) + (1 - alpha) * CE(z, label; label_smoothing)

    T^2 keeps the size of the soft gradient independent of T (the paper's equation 4). The gradient
    is made in the forward call, while the row is in cache: both logits are read once and the
    gradient is written once.

    Args:
        student_logits: z, ``[*, V]``, fp32, fp64, bf16 or fp16, on CPU or CUDA; any strides. A
            DTensor sharded on its last dimension is taken as ``process_group`` says.
        teacher_logits: t, the shape, dtype and device of ``student_logits``. If it requires grad it
            gets its gradient (mutual learning, arXiv 1706.00384), of probabilities the derivative
            in them, 0 where one is 0. Up to 8 teachers: a list, or one
            more leading dimension, ``[M, *, V]``; mixed in the same pass, or by plain PyTorch where
            one of them requires grad.
        labels: ``[*]``, int64 classes in [0, V) or ``ignore_index``. A row that is ignored has loss
            and gradient 0 and its logits are not read. None: the divergence alone.
        temperature: T > 0, from 1e-15 to 1e15. Like ``alpha``, the divergence's parameters, the
            scales and the caps it is a number or a tensor, ``[*]`` for a number per row or ``[]``
            for all, of any real dtype. A tensor that requires grad gets its gradient (a learnable
            temperature or scale); the loss is then made by plain PyTorch.
        alpha: share of the divergence, in [0, 1]. Default 0.5 with labels, 1 without (and no other
            then). With 1 the labels only say which rows are ignored (and the target class of
            "decoupled"); with 0 the teacher is not read.
        divergence: D, one of ``kdkernels.divergences()``, which has formulas and sources:
            "forward_kl", "reverse_kl", "js" (beta), "skew_forward_kl" (beta), "skew_reverse_kl"
            (beta), "total_variation", "alpha_beta" (divergence_alpha, beta) or "decoupled"
            (divergence_alpha, beta; needs labels).
        divergence_alpha: first parameter of "alpha_beta" (default 0.2) and "decoupled" (1).
        beta: parameter of "js" (default 0.5), of the skewed ones (0.1), second one of "alpha_beta"
            (0.7) and "decoupled" (8).
        teacher_kind: what ``teacher_logits`` holds: "logits", "log_probs" or "probs". The last two
            are of temperature 1 and become softmax(log p / T); probabilities need no sum of 1.
        teacher_weights: one number of at least 0 a teacher, scaled to sum 1. Default: equal.
        teacher_mixture: several teachers are mixed as "probs", sum_m w_m p_m, or as "log_probs",
            proportional to prod_m p_m^w_m.
        teacher_index: ``[*]``, int64: of several teachers the place of each row's own, whose logits
            alone count there, as in a call with that teacher (on CPUs bit for bit). They are put
            together in a copy. On CUDA a place that there is not gives NaN. Does not go with
            ``teacher_weights``.
        standardize: z-score every row's logits on both sides before the divergence (Sun et al.,
            arXiv 2403.01427), with the unbiased standard deviation; cross-entropy takes them as
            they are.
        logit_scale, soft_cap: the student's logits are soft_cap * tanh(logit_scale * z / soft_cap),
            for divergence and cross-entropy; without ``soft_cap``, logit_scale * z.
        teacher_logit_scale, teacher_soft_cap: the same for teachers, of kind "logits".
        label_smoothing: share in [0, 1] of the uniform distribution in the hard target.
        ignore_index: the label of rows to leave out.
        weight: ``[*]``, a factor for each row's loss, of any real dtype; a row with weight 0 is not
            read.
        num_items: what "mean" divides by instead of the kept rows' weights, for gradient
            accumulation: a number, or a scalar tensor (which is not synchronised with). The
            gradient that forward makes has it already, whereas a factor that the loss gets
            afterwards, as in ``loss / steps``, costs backward a pass over the gradient: on CUDA
            two thirds of the loss's own. A tensor costs that with fp16 logits without weights, or
            where it requires grad.
        reduction: "mean" (sum of weight * loss over the sum of weights, both over the kept rows; 0
            if there are none), "sum", or "none".
        inplace: allow the gradient to be written over ``student_logits``, so that no ``[*, V]``
            tensor is allocated. The logits are lost; one backward, no second derivative, and
            student_logits must not be a leaf, nor overlap the teacher but row for row; if it is a
            view, differentiate with respect to what it was made from. Has no effect where there is
            no gradient to make, or under a tracer.
        return_statistics: also return numbers of every row, from the same pass.
        process_group: its ranks share the vocabulary: each has an equal number of columns of both
            logits, in the order of the ranks, and the same labels, which are of the whole
            vocabulary. Every rank gets the same loss, and the gradient of its columns. Only numbers
            of rows cross the group. One teacher; no second derivative.
        backend: "fused", or "reference" for plain PyTorch.

    Returns:
        The loss, ``[]``, or ``[*]`` with reduction "none"; fp64 for fp64 logits, else fp32. With
        ``return_statistics`` a pair of it and ``RowStatistics``, each ``[*]``, which are 0 for rows
        left out and have no gradient.

    D is never negative, 0 where student and teacher are equal, and accurate to 1e-4 of itself down
    to 1e-8 in fp32: the fused kernels add up terms that are not negative. (Several teachers'
    mixture has logarithms accurate to 1e-6; "total_variation" and "alpha_beta" of a shared
    vocabulary are accurate to 1e-7 of all probability rather than of D.)

    Non-finite logits: -inf is a class without probability (0 where both sides exclude it). A row
    with NaN, +inf, or only -inf gives NaN for its loss and gradient and leaves other rows alone.

    Memory on a CPU: the gradient is the only tensor of the logits' size. Where it is tens of MB
    glibc gives it back to the system at once, and the page faults of the next one take longer than
    the loss (512 x 32000 in fp32, two cores: 1.6 times the time of ``inplace``, though it comes in
    huge pages where /sys/kernel/mm/transparent_hugepage/enabled is not "never"). A process that is
    started with ``MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296`` keeps such
    memory, at its peak, for the next step: the loss takes the time of ``inplace``, and plain
    PyTorch gains as much. Else ``inplace``, or ``linear_distillation_loss`` in row blocks.

    The same bits come out for any number of threads. Differentiable twice and more, and through
    ``torch.compile``. In fp32, gradients of forward and reverse KL are off by up to 1e-7 of a row's
    largest probability, times T. In 16 bits those of JS and the skewed KLs are off, beside their
    rounding, by up to 1e-6 of the class's probability. On CUDA a label, or a number of a tensor
    option, that is out of range gives NaN loss and zero gradient for its row.

    Raises:
        ValueError: shapes or devices differ, V is 0, a number or (on CPU) a label is out of range,
            a parameter does not belong to the divergence, or ``inplace`` is not possible.
        TypeError: a dtype is not supported or differs, or a tensor is of a subclass without memory
            of its own (a sharded DTensor beside a plain tensor).
        NotImplementedError: forward-mode differentiation, which ``backend="reference"`` has.

    Example:
        >>> student = torch.tensor([[2.0, 1.0, 0.0]], requires_grad=True)
        >>> teacher, labels = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([0])
        >>> loss = kdkernels.distillation_loss(student, teacher, labels, temperature=2.0, alpha=0.5)
        >>> loss.backward()
        >>> print(f"{loss.item():.4f}", student.grad)
        0.4031 tensor([[ 0.0319, -0.0769,  0.0450]])
    """
    call = locals()
    if teacher_index is not None:
        choose_teachers(call, ("teacher_logits",), "student_logits")
    teachers, several = listed(call["teacher_logits"], student_logits)
    if teacher_weights is not None:
        check_teacher_weights(teacher_weights, several)
    if several:
        call["teacher_logits"] = teachers
    # The kernels make the gradient of one teacher.
    if is_plain(call, teachers if several else ()):
        return by_reference(reference.distillation_loss, call)
    return loss_of_call(call, teachers, reference.distillation_loss)


@overload
def topk_distillation_loss(
    student_logits: Tensor,
    teacher_values: Tensor | Sequence[Tensor],
    teacher_indices: Tensor | Sequence[Tensor],
    labels: Tensor | None = None,
    *,
    return_statistics: Literal[False] = False,
    **options: Unpack[TopKOptions],
) -> Tensor: ...
@overload
def topk_distillation_loss(
    student_logits: Tensor,
    teacher_values: Tensor | Sequence[Tensor],
    teacher_indices: Tensor | Sequence[Tensor],
    labels: Tensor | None = None,
    *,
    return_statistics: Literal[True],
    **options: Unpack[TopKOptions],
) -> tuple[Tensor, RowStatistics]: ...
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
    inplace: bool = False,
    sparse_gradient: bool = False,
    return_statistics: bool = False,
    process_group: ProcessGroup | None = None,
    backend: str = "fused",
) -> Tensor | tuple[Tensor, RowStatistics]:
    r"""``distillation_loss`` from a few classes a row of the teacher: its top k, the student's own
    top k (for reverse KL), or samples (``sample_teacher``).

    With v the values, i a row's classes and u the student's transformed logits, p and q are, by
    ``tail``::

        "renormalize"  softmax(v / T) and softmax(u[i] / T): the entries alone; no other column is
                       read, unless cross-entropy needs it
        "bucket"       exp(v / T - teacher_logsumexp) and softmax(u / T)[i], and one more class with
                       what is left of 1 on either side
        "ignore"       the same p and q, and the sum over the entries only, which may be negative

    "renormalize" agrees with TRL's losses (add_tail=False), axolotl's and NeMo-RL's default;
    "bucket" with TRL's (add_tail=True) and Megatron-LM's ghost token, without their floor under the
    rest; "ignore" with verl's forward_kl_topk before its clamp at 0 and axolotl's forward_kl.

    Args:
        student_logits: z, ``[*, V]``, as ``distillation_loss`` has it.
        teacher_values: v, ``[*, K]``, K from 1 to 1024, fp32, fp64, bf16 or fp16 (not necessarily
            the student's): logits, or log-probabilities. If it requires grad the loss is made by
            plain PyTorch.
        teacher_indices: ``[*, K]``, int32 or int64, classes in [0, V) that differ within a row, or
            -1 for no entry. A row without entries has no divergence.
        labels, temperature, alpha, logit_scale, soft_cap, label_smoothing, ignore_index, weight,
            num_items, reduction, inplace, return_statistics, process_group, backend: as
            ``distillation_loss`` has them. The hard loss is over all V classes.
        divergence: "forward_kl", "reverse_kl" or "js".
        beta: parameter of "js", default 0.5.
        tail: "renormalize", "bucket" or "ignore".
        teacher_kind: what ``teacher_values`` holds, "logits" or "log_probs".
        teacher_index: ``[*]``, int64: ``teacher_values``, ``teacher_indices`` and
            ``teacher_logsumexp`` are then of several teachers, lists or with one more dimension
            first, and this is the place of the one of each row.
        teacher_logsumexp: ``[*]``, logsumexp of all V of the teacher's logits / T. For "bucket" and
            "ignore" only, which need it unless the values are log-probabilities and T is 1.
        sparse_gradient: return the gradient as a sparse COO tensor of K columns per row; for
            "renormalize" and alpha 1. Has no effect under a tracer.

    Returns:
        As ``distillation_loss``. Statistics are of the distributions compared: of the entries, with
        "bucket" of the rest as one class too; the student's logsumexp is of all classes but with
        "renormalize"; the top 1 is among the entries.

    On CUDA an index out of range, as a label, gives NaN loss and zero gradient for its row, and
    that a row's classes differ is not checked.

    Raises:
        ValueError, TypeError: as ``distillation_loss``; K or ``teacher_logsumexp`` is not as said,
            or (on CPU) an index is out of range or twice in a row.

    Example:
        >>> student = torch.tensor([[2.0, 1.0, 0.5, 0.0]], requires_grad=True)
        >>> top = kdkernels.topk_teacher(torch.tensor([[1.0, 3.0, 2.0, 0.0]]), 2)
        >>> loss = kdkernels.topk_distillation_loss(student, top.values, top.indices)
        >>> loss.backward()
        >>> student.grad
        tensor([[ 0.0000, -0.1086,  0.1086,  0.0000]])
    """
    call = locals()
    if teacher_index is not None:
        choose_teachers(call, OF_TOP_K, "student_logits")
    if is_plain(call, (call["teacher_values"],)):
        return by_reference(reference.topk_distillation_loss, call)
    return loss_of_call(call, [call["teacher_values"]], reference.topk_distillation_loss)
