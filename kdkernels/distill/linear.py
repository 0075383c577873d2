"""The loss from hidden states and heads."""

from collections.abc import Sequence
from typing import Literal, Unpack, overload

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.distributed import ProcessGroup

from kdkernels import _C, reference
from kdkernels.distill.calls import (
    OF_TOP_K,
    by_reference,
    check_teacher_weights,
    choose_teachers,
    is_plain,
    listed,
    needs_option_gradient,
    packed,
    result_of,
    take_divisor,
    wishes_of,
)
from kdkernels.distill.options import LinearOptions
from kdkernels.errors import STRING, check, for_floats
from kdkernels.reference import RowStatistics

_OF_DENSE_TEACHERS = (
    *("divergence_alpha", "teacher_weights", "teacher_mixture", "standardize"),
    *("teacher_logit_scale", "teacher_soft_cap"),
)


@overload
def linear_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | Sequence[Tensor] | None = None,
    teacher_weight: Tensor | Sequence[Tensor] | None = None,
    labels: Tensor | None = None,
    *,
    return_statistics: Literal[False] = False,
    **options: Unpack[LinearOptions],
) -> Tensor: ...
@overload
def linear_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | Sequence[Tensor] | None = None,
    teacher_weight: Tensor | Sequence[Tensor] | None = None,
    labels: Tensor | None = None,
    *,
    return_statistics: Literal[True],
    **options: Unpack[LinearOptions],
) -> tuple[Tensor, RowStatistics]: ...
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
    process_group: ProcessGroup | None = None,
    max_rows: int | None = None,
    memory_budget: int | None = None,
    backend: str = "fused",
) -> Tensor | tuple[Tensor, RowStatistics]:
    r"""``distillation_loss`` or ``topk_distillation_loss`` of the logits that a linear layer makes
    of hidden states, ``student_hidden @ student_weight.T + student_bias``, without the logits.

    A chunk of rows at a time: its logits are made by a matrix product, the loss writes their
    gradient over them, and two products more take that to the hidden states and to the weight. The
    gradients that are needed are made in the forward call and scaled in backward. With reduction
    "none", whose incoming gradients are not known before, all of it is done again in backward.

    Args:
        student_hidden: ``[*, H]``, fp32, fp64, bf16 or fp16, on CPU or CUDA.
        student_weight: ``[V, H]``, its dtype and device, as all of the heads' tensors.
        teacher_hidden, teacher_weight: ``[*, Ht]`` and ``[V, Ht]``: the teacher's own head; or, one
            of the following instead; or no teacher, and the loss is the cross-entropy of the
            labels. With ``teacher_index`` lists of them, whose widths may differ.
        teacher_logits: ``[*, V]``, a list of those, or ``[M, *, V]``, of any floating dtype; read
            in fp32 (fp64 for an fp64 student).
        teacher_values, teacher_indices: ``[*, K]``, a top-k teacher.
        teacher_index: ``[*]``, int64: the place of each row's teacher among several. Those with
            heads are multiplied one after another, each with its own rows alone, whose losses are,
            bit for bit, those of a call of their own. Heads take an index on the CPU, which groups
            rows without waiting for the device; one on CUDA is copied, which waits, as it does in
            ``torch.compile``. A scale or soft cap of each teacher's is a tensor of rows,
            ``scales[teacher_index]``.
        labels: ``[*]``, as ``distillation_loss`` has them. Rows that are ignored, or of weight 0,
            are left out of all products (on CUDA read as 0, unless ``max_rows`` is given): what
            they hold does no harm.
        student_bias, teacher_bias: ``[V]``; of several teachers a list, with None for those that
            have none.
        tail, teacher_logsumexp: of a top-k teacher, as ``topk_distillation_loss`` has them.
        temperature, alpha, divergence, divergence_alpha, beta, teacher_kind, teacher_weights,
            teacher_mixture, standardize, logit_scale, soft_cap, teacher_logit_scale,
            teacher_soft_cap, label_smoothing, ignore_index, weight, num_items, reduction,
            return_statistics: as ``distillation_loss`` has them. No gradient flows to a teacher.
        process_group: its ranks share the vocabulary: each has an equal number of rows of the
            weights and biases (columns of ``teacher_logits``), in the order of the ranks, and the
            same hidden states, labels and options. Every rank gets the same loss and gradient of
            the hidden states, and the gradients of its rows.
        max_rows: a bound of how many rows count, where the caller knows one: CUDA then packs those
            to the front and multiplies no more than that many, without waiting for the device.
            Where more count, CPUs raise and on CUDA loss and gradients are NaN. CPUs count rows
            themselves.
        memory_budget: bytes of logits at a time, at least one row's. Default: a 25th of what the
            logits of all rows would take (both sides', where the teacher has a head), at least
            32 MiB; on CUDA, from 1,024 to 4,096 rows of them. Every chunk reads the whole head, so
            that few rows are slow.
        backend: "fused", or "reference" for plain PyTorch, which makes all logits.

    Returns:
        As ``distillation_loss``.

    Memory, beyond arguments and gradients: the budget, and for 16-bit weights that require grad
    their gradient in fp32, 4 bytes per element, where it is added up before it is rounded once
    (kept until backward for fp16, which scales it first).

    16 bits: logits are fp32, and only their gradient is rounded for the products that take it to
    hidden states and weight, which are summed in fp32; on CPUs without bf16 instructions, and for
    fp16 on all CPUs, not even that. On a CPU with them a chunk's share of the weight's gradient is
    rounded once more before it is added. Under autocast the heads' tensors take its dtype, as in
    ``torch.nn.functional.linear``.

    Differentiable once, and through ``torch.compile``.

    Raises:
        ValueError: neither a teacher nor labels, or teachers of several forms; a shape or number is
            not as said; a tensor of the teacher requires grad; more rows count than ``max_rows``;
            as ``distillation_loss``.
        TypeError: a dtype is not supported or differs.

    Example:
        >>> hidden, head = torch.randn(8, 16, requires_grad=True), torch.nn.Linear(16, 1000)
        >>> teacher_hidden, teacher_head = torch.randn(8, 32), torch.randn(1000, 32)
        >>> loss = kdkernels.linear_distillation_loss(
        ...     hidden, head.weight, teacher_hidden, teacher_head, temperature=2.0
        ... )
        >>> loss.backward()
        >>> hidden.grad.shape, head.weight.grad.shape
        (torch.Size([8, 16]), torch.Size([1000, 16]))
    """
    call = locals()
    if is_plain(call, ()):
        return by_reference(reference.linear_distillation_loss, call)
    given = call | {}
    form = reference.teacher_form(
        teacher_hidden,
        teacher_weight,
        teacher_bias,
        teacher_logits,
        teacher_values,
        teacher_indices,
        labels,
    )
    teachers, heads = _teachers_of(call, form)
    if form != "values":
        call["tail"] = "none"
    divisor, group = take_divisor(call) if isinstance(num_items, Tensor) else None, ""
    if process_group is not None:
        classes, group = student_weight.shape[0], process_group.group_name
        call["first_class"] = process_group.rank() * classes
        call["all_classes"] = process_group.size() * classes
    others = [student_bias, call["teacher_index"], None, *heads]
    if is_compiling():
        if needs_option_gradient(call):
            return by_reference(reference.linear_distillation_loss, given)
        op = torch.ops.kdkernels.linear_distillation_loss
        rest = (*packed(call), wishes_of(call), group)
        hidden = for_floats(student_hidden, call.values())
        if others[1] is not None:  # an op's fake tensors are all on one device
            others[1] = others[1].to(student_hidden.device)
        outputs = op(hidden, student_weight, others, teachers, *rest)
    else:
        outputs = _C.linear_distillation_loss(call, "teacher_" + form, teachers, others, group)
        if outputs is None:
            return by_reference(reference.linear_distillation_loss, given)
    return result_of(outputs, divisor)


def _teachers_of(call: dict, form: str) -> tuple[list, list]:
    """The teachers, of which each row has its own or all, and the weight and bias of each; what
    does not go with their form is refused.
    """
    others = _OF_DENSE_TEACHERS if form == "values" else ("tail", "teacher_logsumexp")
    reference.refuse_others(call, others, "teacher_" + form)
    kind = call["teacher_kind"]
    check("teacher_kind", kind, STRING)
    if form == "none":
        reference.refuse_others(call, _OF_DENSE_TEACHERS, "labels alone")
        call["alpha"] = reference.without_teacher(call["alpha"], call["return_statistics"])
        if call["teacher_index"] is not None:
            raise ValueError("teacher_index goes with several teachers, and there is none")
        return [], []
    if form == "hidden":
        if kind != "logits":
            raise ValueError(f'teacher_kind is "{kind}"; with teacher_hidden it takes "logits"')
        if call["teacher_weights"] is not None:
            check_teacher_weights(call["teacher_weights"], False)
        of = (call[f"teacher_{part}"] for part in ("hidden", "weight", "bias", "index"))
        found = reference.teacher_heads(*of)
        return [hidden for hidden, *_ in found], [x for _, *head in found for x in head]
    names = OF_TOP_K if form == "values" else ("teacher_logits",)
    if call["teacher_index"] is not None:
        choose_teachers(call, names, "student_hidden")
    teachers, several = [call[names[0]]], False
    if form == "logits":
        teachers, several = listed(teachers[0], call["student_hidden"])
        if not teachers:
            raise ValueError("teacher_logits is empty; it takes at least one teacher")
    if call["teacher_weights"] is not None:
        check_teacher_weights(call["teacher_weights"], several)
    return teachers, [None, None] * len(teachers)
