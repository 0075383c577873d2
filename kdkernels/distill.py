"""Distillation losses."""

import inspect
import operator
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypedDict, Unpack, overload

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.distributed import ProcessGroup

from kdkernels import _C, reference
from kdkernels.errors import INT, NUMBER, OPTIONAL_TENSOR, STRING, TENSOR, check, for_floats
from kdkernels.reference import Divergence, RowStatistics


def divergences() -> dict[str, Divergence]:
    """The divergences that the losses take as ``divergence``.

    Returns:
        Name -> (formula, source, parameters with their defaults). p is the teacher, q the student.
    """
    return dict(reference.DIVERGENCES)


# ---- keyword arguments, for type checkers --------------------------------------------------------


class CommonOptions(TypedDict, total=False):
    """What all losses take."""

    temperature: float | Tensor
    alpha: float | Tensor | None
    divergence: str
    beta: float | Tensor | None
    teacher_kind: str
    logit_scale: float | Tensor
    soft_cap: float | Tensor | None
    label_smoothing: float
    ignore_index: int
    weight: Tensor | None
    num_items: float | Tensor | None
    reduction: str
    process_group: ProcessGroup | None
    backend: str


class DenseTeacherOptions(CommonOptions, total=False):
    """What goes with a teacher of all classes."""

    divergence_alpha: float | Tensor | None
    teacher_weights: Sequence[float] | None
    teacher_mixture: str
    standardize: bool
    teacher_logit_scale: float | Tensor
    teacher_soft_cap: float | Tensor | None


class TopKTeacherOptions(CommonOptions, total=False):
    """What goes with a teacher of a few classes."""

    tail: str
    teacher_logsumexp: Tensor | None


class DenseOptions(DenseTeacherOptions, total=False):
    """Of ``distillation_loss``."""

    inplace: bool


class TopKOptions(TopKTeacherOptions, total=False):
    """Of ``topk_distillation_loss``."""

    inplace: bool
    sparse_gradient: bool


class LinearOptions(DenseTeacherOptions, TopKTeacherOptions, total=False):
    """Of ``linear_distillation_loss``."""

    student_bias: Tensor | None
    teacher_bias: Tensor | None
    teacher_logits: Tensor | Sequence[Tensor] | None
    teacher_values: Tensor | None
    teacher_indices: Tensor | None
    memory_budget: int | None


# ---- the losses on logits ------------------------------------------------------------------------


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
            accumulation: a number, or a scalar tensor (which is not synchronised with).
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
    teachers, several = _listed(teacher_logits, student_logits)
    _check_teacher_weights(teacher_weights, several)
    if several:
        call["teacher_logits"] = teachers
    # The kernels make the gradient of one teacher.
    if _plain(call, teachers if several else ()):
        return _by_reference(reference.distillation_loss, call)
    return _loss(call, teachers, reference.distillation_loss)


@overload
def topk_distillation_loss(
    student_logits: Tensor,
    teacher_values: Tensor,
    teacher_indices: Tensor,
    labels: Tensor | None = None,
    *,
    return_statistics: Literal[False] = False,
    **options: Unpack[TopKOptions],
) -> Tensor: ...
@overload
def topk_distillation_loss(
    student_logits: Tensor,
    teacher_values: Tensor,
    teacher_indices: Tensor,
    labels: Tensor | None = None,
    *,
    return_statistics: Literal[True],
    **options: Unpack[TopKOptions],
) -> tuple[Tensor, RowStatistics]: ...
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
        teacher_logsumexp: ``[*]``, logsumexp of all V of the teacher's logits / T. For "bucket" and
            "ignore" only, which need it unless the values are log-probabilities and T is 1.
        sparse_gradient: return the gradient as a sparse COO tensor of K columns a row; for
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
    if _plain(call, (teacher_values,)):
        return _by_reference(reference.topk_distillation_loss, call)
    return _loss(call, [teacher_values], reference.topk_distillation_loss)


# ---- from arguments by name to the ops -----------------------------------------------------------

_OPTIONS = tuple(_C.loss_options())  # (name, default, choices, rows may differ, public)
_ROW_OPTIONS = tuple(name for name, _, _, rows_may_differ, _ in _OPTIONS if rows_may_differ)
_ROW_TENSORS = ("labels", "weight", "teacher_indices", "teacher_logsumexp")
_WISHES = {"inplace": 1, "sparse_gradient": 2, "return_statistics": 4}


_TAKES = {
    function: frozenset(inspect.signature(function).parameters)
    for function in (
        reference.distillation_loss,
        reference.topk_distillation_loss,
        reference.linear_distillation_loss,
    )
}


def _taken_by(function, call: dict) -> dict:
    """The arguments that a function of ``reference`` takes."""
    return {name: value for name, value in call.items() if name in _TAKES[function]}


def _plain(call: dict, teachers: Sequence[Tensor]) -> bool:
    """Whether plain PyTorch makes the loss: asked for, or for the gradient of `teachers`."""
    backend, process_group = call["backend"], call["process_group"]
    if not (isinstance(backend, str) and backend in ("fused", "reference")):
        raise ValueError(f'backend is "{backend}"; it takes "fused" or "reference"')
    plain = backend == "reference" or (
        torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in teachers)
    )
    if not plain and is_compiling():
        plain = _needs_option_gradient(call)
    if process_group is None:
        return plain
    if not isinstance(process_group, ProcessGroup):
        kind = type(process_group).__name__
        raise TypeError(f"process_group is a {kind}; it takes a ProcessGroup")
    if plain:
        raise ValueError("process_group goes with kernels only, which need a teacher detached")
    return False


def _needs_option_gradient(call: dict) -> bool:
    """Whether an option is a tensor that requires grad, which eager calls see in C++."""
    options = [call[name] for name in _ROW_OPTIONS if isinstance(call.get(name), Tensor)]
    return torch.is_grad_enabled() and any(option.requires_grad for option in options)


def _by_reference(loss_of, call: dict):
    """The loss by plain PyTorch, which gives every option its gradient."""
    if call["process_group"] is not None:
        raise ValueError(
            "process_group goes with kernels only, which make no gradient of an option; pass it "
            "detached"
        )
    return loss_of(**_taken_by(loss_of, call))


def _listed(teachers, leading: Tensor) -> tuple[list, bool]:
    """Dense teachers as a list, and whether they may be several: a list, or one more dimension than
    `leading`, the student's logits or hidden states, has.
    """
    several = isinstance(teachers, (list, tuple))
    if isinstance(teachers, Tensor) and isinstance(leading, Tensor):
        several = teachers.dim() == leading.dim() + 1 > 1
    return list(teachers) if several else [teachers], several


def _check_teacher_weights(weights, several: bool) -> None:
    """What the ops, to which no weights are an empty list, cannot tell."""
    if weights is None:
        return
    if not several:
        raise ValueError("teacher_weights goes with several teachers only")
    if isinstance(weights, (list, tuple)) and not weights:
        raise ValueError("teacher_weights is empty; it takes a number a teacher")


def _wishes(call: dict) -> int:
    """What is asked for beside the loss, as the ops take it."""
    bits = 0
    for name, bit in _WISHES.items():
        value = call.get(name, False)
        if not isinstance(value, bool):
            raise TypeError(f"{name} is a {type(value).__name__}; it takes a bool")
        bits |= bit if value else 0
    return bits


def _divisor(call: dict) -> Tensor | None:
    """num_items where it is a tensor, which divides the kernels' sum; taken out of the call."""
    num_items = call["num_items"]
    if not isinstance(num_items, Tensor):
        return None
    if num_items.numel() != 1 or num_items.is_complex():
        raise ValueError(
            f"num_items is a tensor of shape {list(num_items.shape)} and dtype {num_items.dtype}; "
            "it takes a number or a real scalar tensor"
        )
    if call["reduction"] != "mean":
        raise ValueError(f'num_items goes with reduction="mean" only, not "{call["reduction"]}"')
    call |= {"num_items": None, "reduction": "sum"}
    return num_items.reshape(())


def _packed(call: dict) -> tuple[list, list]:
    """The rows' tensors and the options as the registered ops take them, for a tracer."""
    rows = [call.get(name) for name in _ROW_TENSORS]
    options = []
    for name, default, choices, rows_may_differ, _ in _OPTIONS:
        value = call.get(name, default)
        row_tensor = rows_may_differ and isinstance(value, Tensor)
        if rows_may_differ:
            rows.append(value if row_tensor else None)
        if choices:
            if not (isinstance(value, str) and value in choices):
                raise ValueError(f'{name} is "{value}"; it takes one of {", ".join(choices)}')
            value = choices.index(value)
        options.append(None if row_tensor else value)
    return rows, options + list(call.get("teacher_weights") or ())


def _result(outputs: list[Tensor], divisor: Tensor | None):
    """What a loss returns: of the op's loss and, where asked for, statistics."""
    loss = outputs[0] if divisor is None else outputs[0] / divisor
    return loss if len(outputs) == 1 else (loss, RowStatistics(*outputs[1].unbind()))


def _loss(call: dict, teachers: list, loss_of) -> Tensor | tuple[Tensor, RowStatistics]:
    """The kernels' loss of a call: the arguments of one of the functions on logits, by name.
    `loss_of`: the same function of ``reference``.
    """
    given = call
    if isinstance(call["num_items"], Tensor):
        call = dict(call)
    divisor, group = _divisor(call), ""
    if call["process_group"] is not None or type(call["student_logits"]) is not Tensor:
        student_logits, teachers, group, first, classes = vocabulary_shard(
            call["student_logits"], teachers, call["process_group"]
        )
        call = call | {
            "student_logits": student_logits,
            "first_class": first,
            "all_classes": classes,
        }
    if is_compiling():
        op = torch.ops.kdkernels.distillation_loss
        logits = for_floats(call["student_logits"], call.values())
        outputs = op(logits, teachers, *_packed(call), _wishes(call), group)
    else:
        outputs = _C.distillation_loss(call, teachers, group)
        if outputs is None:
            return _by_reference(loss_of, given)
    return _result(outputs, divisor)


def _unwrapped(tensor: Tensor) -> Tensor:
    """The plain tensor that a wrapper of torch.distributed stands for, if this rank has all of it;
    else the tensor itself.
    """
    from torch.distributed._functional_collectives import AsyncCollectiveTensor
    from torch.distributed.tensor import DTensor

    if isinstance(tensor, AsyncCollectiveTensor):
        return tensor.trigger_wait()
    if isinstance(tensor, DTensor) and all(p.is_replicate() for p in tensor.placements):
        return _unwrapped(tensor.to_local())
    return tensor


_C.set_unwrap(_unwrapped)


def vocabulary_shard(
    student_logits: Tensor, teachers: list[Tensor], process_group: ProcessGroup | None
) -> tuple[Tensor, list[Tensor], str, int, int]:
    """This rank's columns of logits, and where they stand in the vocabulary.

    Args:
        student_logits: ``[*, V / p]``, or a DTensor ``[*, V]`` sharded on its last dimension.
        teachers: tensors of that kind, or tensors of rows that all ranks have.
        process_group: who shares the vocabulary; None for a DTensor, which knows.

    Returns:
        (student's columns, teachers' columns, name of the group, first column, V); the group is ""
        where the vocabulary is whole.
    """
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if not isinstance(student_logits, DTensor):
        if process_group is None:
            return student_logits, teachers, "", 0, 0
        own = student_logits.shape[-1]
        first = process_group.rank() * own
        return student_logits, teachers, process_group.group_name, first, process_group.size() * own
    if process_group is not None:
        raise ValueError("process_group is given, but student_logits is a DTensor, which has one")
    mesh, placements = student_logits.device_mesh, student_logits.placements
    last = student_logits.dim() - 1
    split = [d for d, placement in enumerate(placements) if placement == Shard(last)]
    others = [p for d, p in enumerate(placements) if d not in split and not p.is_replicate()]
    if len(split) > 1 or others:
        raise ValueError(
            f"student_logits is a DTensor with placements {list(placements)}; it takes one that is "
            f"sharded on its last dimension, {last}, of one dimension of the mesh"
        )
    local = []
    for name, tensor in [("student_logits", student_logits)] + [
        ("teacher_logits", teacher) for teacher in teachers
    ]:
        if isinstance(tensor, DTensor):
            if tensor.placements != placements or tensor.device_mesh != mesh:
                raise ValueError(f"{name} is placed otherwise than student_logits")
            tensor = tensor.to_local()
        local.append(tensor)
    if not split:
        return local[0], local[1:], "", 0, 0
    _, offset = compute_local_shape_and_global_offset(student_logits.shape, mesh, placements)
    group = mesh.get_group(split[0]).group_name
    return local[0], local[1:], group, offset[-1], student_logits.shape[-1]


def _differentiable_gradients(
    student, teachers, call, grad_output
) -> tuple[Tensor | None, Tensor | None]:
    """A loss's gradients in the student and in its one teacher, in plain PyTorch."""
    if call["teacher_indices"] is None:
        loss_of, teacher = reference.distillation_loss, teachers
        if len(teachers) == 1:
            teacher, call["teacher_weights"] = teachers[0], None
    else:
        loss_of, teacher = reference.topk_distillation_loss, teachers[0]
        call["teacher_kind"] = "log_probs"  # which may lack a logsumexp, and else are the same
    loss: Any = loss_of(student, teacher, **_taken_by(loss_of, call))
    inputs = [x for x in (student, teachers[0]) if x.requires_grad]
    gradients = iter(torch.autograd.grad(loss, inputs, grad_output, create_graph=True))
    of_student, of_teacher = (
        next(gradients) if x.requires_grad else None for x in (student, teachers[0])
    )
    return of_student, of_teacher


_C.set_differentiable_gradients(_differentiable_gradients)


# ---- teachers of a few classes -------------------------------------------------------------------


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


# ---- the module ----------------------------------------------------------------------------------


class ModuleOptions(DenseOptions, total=False):
    """Of ``DistillationLoss``."""

    return_statistics: bool


_MODULE_OPTIONS = ModuleOptions.__annotations__.keys() - {"weight", "num_items"}


class DistillationLoss(nn.Module):
    """``distillation_loss`` as a module; takes its options, but not those that go with a batch.

    Args:
        options: all keyword arguments of ``distillation_loss`` but ``weight`` and ``num_items``.

    Raises:
        ValueError: the divergence, or a parameter of it, is not one there is.
        TypeError: an option is none.

    Example:
        >>> kdkernels.DistillationLoss(temperature=4.0, divergence="js")
        DistillationLoss(divergence='js', temperature=4.0, beta=0.5)
    """

    def __init__(self, **options: Unpack[ModuleOptions]):
        super().__init__()
        unknown = options.keys() - _MODULE_OPTIONS
        if unknown:
            raise TypeError(f"DistillationLoss takes no argument {sorted(unknown)[0]!r}")
        reference.divergence_parameters(
            options.get("divergence", "forward_kl"),
            options.get("divergence_alpha"),
            options.get("beta"),
        )
        self.options: dict[str, Any] = {**options}

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | Sequence[Tensor],
        labels: Tensor | None = None,
        *,
        weight: Tensor | None = None,
        num_items: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, RowStatistics]:
        """The loss of one batch; see ``distillation_loss``."""
        return distillation_loss(
            student_logits,
            teacher_logits,
            labels,
            weight=weight,
            num_items=num_items,
            **self.options,
        )

    def extra_repr(self) -> str:
        """The divergence with its parameters, then the other options, as nn.Module prints them."""
        shown: dict[str, Any] = {"divergence": "forward_kl"} | self.options
        shown |= reference.divergence_parameters(
            shown["divergence"], shown.get("divergence_alpha"), shown.get("beta")
        )
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


# ---- the loss of heads ---------------------------------------------------------------------------


@overload
def linear_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    return_statistics: Literal[False] = False,
    **options: Unpack[LinearOptions],
) -> Tensor: ...
@overload
def linear_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    return_statistics: Literal[True],
    **options: Unpack[LinearOptions],
) -> tuple[Tensor, RowStatistics]: ...
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
    process_group: ProcessGroup | None = None,
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
            of the following instead.
        teacher_logits: ``[*, V]``, a list of those, or ``[M, *, V]``, of any floating dtype; read
            in fp32 (fp64 for an fp64 student).
        teacher_values, teacher_indices: ``[*, K]``, a top-k teacher.
        labels: ``[*]``, as ``distillation_loss`` has them. Rows that are ignored, or of weight 0,
            are left out of all products (on CUDA read as 0): what they hold does no harm.
        student_bias, teacher_bias: ``[V]``.
        tail, teacher_logsumexp: of a top-k teacher, as ``topk_distillation_loss`` has them.
        temperature, alpha, divergence, divergence_alpha, beta, teacher_kind, teacher_weights,
            teacher_mixture, standardize, logit_scale, soft_cap, teacher_logit_scale,
            teacher_soft_cap, label_smoothing, ignore_index, weight, num_items, reduction,
            return_statistics: as ``distillation_loss`` has them. No gradient flows to a teacher.
        process_group: its ranks share the vocabulary: each has an equal number of rows of the
            weights and biases (columns of ``teacher_logits``), in the order of the ranks, and the
            same hidden states, labels and options. Every rank gets the same loss and gradient of
            the hidden states, and the gradients of its rows.
        memory_budget: bytes of logits at a time, at least one row's. Default: a 25th of what the
            logits of all rows would take (both sides', where the teacher has a head), at least
            32 MiB; on CUDA, from 1,024 to 4,096 rows of them. Every chunk reads the whole head, so
            that few rows are slow.
        backend: "fused", or "reference" for plain PyTorch, which makes all logits.

    Returns:
        As ``distillation_loss``.

    Memory, beyond arguments and gradients: the budget, and for 16-bit weights that require grad
    their gradient in fp32, 4 bytes an element, where it is added up before it is rounded once (kept
    until backward for fp16, which scales it first).

    16 bits: logits are fp32, and only their gradient is rounded for the products that take it to
    hidden states and weight, which are summed in fp32; on CPUs without bf16 instructions, and for
    fp16 on all CPUs, not even that. On a CPU with them a chunk's share of the weight's gradient is
    rounded once more before it is added. Under autocast the heads' tensors take its dtype, as in
    ``torch.nn.functional.linear``.

    Differentiable once, and through ``torch.compile``.

    Raises:
        ValueError: none or several teachers; a shape or number is not as said; a tensor of the
            teacher requires grad; as ``distillation_loss``.
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
    if _plain(call, ()):
        return _by_reference(reference.linear_distillation_loss, call)
    given = call | {}
    form = reference.teacher_form(
        teacher_hidden,
        teacher_weight,
        teacher_bias,
        teacher_logits,
        teacher_values,
        teacher_indices,
    )
    others = _OF_DENSE_TEACHERS if form == "values" else ("tail", "teacher_logsumexp")
    reference.refuse_others(call, others, "teacher_" + form)
    check("teacher_kind", teacher_kind, STRING)
    if form == "hidden" and teacher_kind != "logits":
        raise ValueError(f'teacher_kind is "{teacher_kind}"; with teacher_hidden it takes "logits"')
    teachers, several = [call["teacher_" + form]], False
    if form == "logits":
        teachers, several = _listed(teacher_logits, student_hidden)
    _check_teacher_weights(teacher_weights, several)
    if form != "values":
        call["tail"] = "none"
    divisor, group = _divisor(call), ""
    if process_group is not None:
        classes, group = student_weight.shape[0], process_group.group_name
        call["first_class"] = process_group.rank() * classes
        call["all_classes"] = process_group.size() * classes
    if is_compiling():
        biases = [student_bias, teacher_weight, teacher_bias]
        op = torch.ops.kdkernels.linear_distillation_loss
        packed = (*_packed(call), _wishes(call), group)
        hidden = for_floats(student_hidden, call.values())
        outputs = op(hidden, student_weight, biases, teachers, *packed)
    else:
        outputs = _C.linear_distillation_loss(call, "teacher_" + form, teachers, group)
        if outputs is None:
            return _by_reference(reference.linear_distillation_loss, given)
    return _result(outputs, divisor)


_OF_DENSE_TEACHERS = (
    *("divergence_alpha", "teacher_weights", "teacher_mixture", "standardize"),
    *("teacher_logit_scale", "teacher_soft_cap"),
)
