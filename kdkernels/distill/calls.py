"""From a call's arguments, by name, to the registered ops or to the reference."""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.distributed import ProcessGroup

from kdkernels import _C, reference
from kdkernels.errors import TENSOR, check, for_floats
from kdkernels.reference import RowStatistics

_OPTIONS = tuple(_C.loss_options())  # (name, default, choices, rows may differ, public)
_ROW_OPTIONS = tuple(name for name, _, _, rows_may_differ, _ in _OPTIONS if rows_may_differ)
_ROW_TENSORS = ("labels", "weight", "teacher_indices", "teacher_logsumexp")
OF_TOP_K = ("teacher_values", "teacher_indices", "teacher_logsumexp")  # a teacher's arguments
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


def is_plain(call: dict, teachers: Sequence[Tensor]) -> bool:
    """Whether plain PyTorch makes the loss: asked for, or for the gradient of `teachers`."""
    backend, process_group = call["backend"], call["process_group"]
    if not (isinstance(backend, str) and backend in ("fused", "reference")):
        raise ValueError(f'backend is "{backend}"; it takes "fused" or "reference"')
    plain = backend == "reference"
    if teachers and torch.is_grad_enabled():
        plain |= any(isinstance(t, Tensor) and t.requires_grad for t in teachers)
    if process_group is None:
        return plain
    if not isinstance(process_group, ProcessGroup):
        kind = type(process_group).__name__
        raise TypeError(f"process_group is a {kind}; it takes a ProcessGroup")
    if plain:
        raise ValueError("process_group goes with kernels only, which need a teacher detached")
    return False


def needs_option_gradient(call: dict) -> bool:
    """Whether an option is a tensor that requires grad, which eager calls see in C++."""
    options = [call[name] for name in _ROW_OPTIONS if isinstance(call.get(name), Tensor)]
    return torch.is_grad_enabled() and any(option.requires_grad for option in options)


def by_reference(loss_of, call: dict):
    """The loss by plain PyTorch, which gives every option its gradient."""
    if call["process_group"] is not None:
        raise ValueError(
            "process_group goes with kernels only, which make no gradient of an option; pass it "
            "detached"
        )
    return loss_of(**_taken_by(loss_of, call))


def listed(teachers, leading: Tensor) -> tuple[list, bool]:
    """Dense teachers as a list, and whether they may be several: a list, or one more dimension than
    `leading`, the student's logits or hidden states, has.
    """
    several = isinstance(teachers, (list, tuple))
    if isinstance(teachers, Tensor) and isinstance(leading, Tensor):
        several = teachers.dim() == leading.dim() + 1 > 1
    return list(teachers) if several else [teachers], several


def choose_teachers(call: dict, names: Sequence[str], student: str) -> None:
    """Puts the rows' own of several teachers in the places of all of them, by their index.

    names: the arguments of a teacher, in ``call``; student: the argument whose rows they have.
    """
    index = call["teacher_index"]
    if call["backend"] == "reference":
        return
    check(student, call[student], TENSOR)
    rows = call[student].shape[:-1]
    call["teacher_index"] = None
    if call.get("teacher_weights") is not None:
        raise ValueError("teacher_weights mixes teachers; it does not go with teacher_index")
    for name in names:
        if (given := call[name]) is None:
            continue
        dims = len(rows) + (name != "teacher_logsumexp")
        if isinstance(given, Tensor) and given.dim() == dims + 1:
            given = given.unbind()
        if not isinstance(given, (list, tuple)):
            raise ValueError(f"teacher_index goes with several teachers, and {name} is one")
        if not given:
            raise ValueError(f"{name} is empty; it takes at least one teacher")
        eager = not is_compiling()
        on_cpu = isinstance(index, Tensor) and index.device.type == "cpu"
        reference.check_teacher_index(index, len(given), rows, values=on_cpu and eager)
        call[name] = _of_rows(name, given, index, dims)


def _of_rows(name: str, teachers: Sequence[Tensor], index: Tensor, dims: int) -> Tensor:
    """Row r of teacher index[r]; of an index that names none NaN, or no class."""
    first = teachers[0]
    for teacher in teachers:
        check(name, teacher, TENSOR)
        same = (first.shape, first.dtype, first.device)
        if (teacher.shape, teacher.dtype, teacher.device) != same or teacher.dim() != dims:
            raise ValueError(
                f"{name} holds a teacher of shape {list(teacher.shape)} and dtype {teacher.dtype} "
                f"on {teacher.device}; with teacher_index all are alike, and of {dims} dimensions"
            )
    index = index.to(first.device, non_blocking=True)
    if dims > index.dim():
        index = index[..., None]
    out = torch.full_like(first, math.nan if first.is_floating_point() else 2**31 - 1)
    for m, teacher in enumerate(teachers):
        out = torch.where(index == m, teacher, out)
    return out


def check_teacher_weights(weights, several: bool) -> None:
    """What the ops, to which no weights are an empty list, cannot tell."""
    if not several:
        raise ValueError("teacher_weights goes with several teachers only")
    if isinstance(weights, (list, tuple)) and not weights:
        raise ValueError("teacher_weights is empty; it takes a number per teacher")


def wishes_of(call: dict) -> int:
    """What is asked for beside the loss, as the ops take it."""
    bits = 0
    for name, bit in _WISHES.items():
        value = call.get(name, False)
        if not isinstance(value, bool):
            raise TypeError(f"{name} is a {type(value).__name__}; it takes a bool")
        bits |= bit if value else 0
    return bits


def take_divisor(call: dict) -> Tensor:
    """num_items, a tensor, which divides the kernels' sum; taken out of the call."""
    num_items = call["num_items"]
    if num_items.numel() != 1 or num_items.is_complex():
        raise ValueError(
            f"num_items is a tensor of shape {list(num_items.shape)} and dtype {num_items.dtype}; "
            "it takes a number or a real scalar tensor"
        )
    if call["reduction"] != "mean":
        raise ValueError(f'num_items goes with reduction="mean" only, not "{call["reduction"]}"')
    call |= {"num_items": None, "reduction": "sum"}
    return num_items.reshape(())


def _fits_weight(divisor: Tensor, call: dict) -> bool:
    """Whether rows' weights may be divided instead of the loss, so that backward finds gradients
    that need no factor: unless the divisor has a gradient, and but for fp16 without weights, whose
    gradients are kept above underflow by a factor that weights do not allow.
    """
    student_logits = call["student_logits"]
    if not isinstance(student_logits, Tensor) or divisor.requires_grad:
        return False
    is_kept_large = student_logits.dtype == torch.float16 and call["weight"] is None
    return student_logits.dim() > 0 and not is_kept_large


def _divided_weight(call: dict, divisor: Tensor) -> Tensor:
    """The rows' weights over the divisor, which may be on another device only if it is the CPU."""
    student_logits, weight = call["student_logits"], call["weight"]
    acc = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
    if weight is None:
        weight = torch.ones(student_logits.shape[:-1], dtype=acc, device=student_logits.device)
    check("weight", weight, TENSOR)
    return weight.to(torch.promote_types(weight.dtype, acc)) / divisor


def packed(call: dict) -> tuple[list, list]:
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


def result_of(outputs: list[Tensor], divisor: Tensor | None):
    """What a loss returns: of the op's loss and, where asked for, statistics."""
    loss = outputs[0]
    if divisor is not None:
        loss = (loss / divisor).to(loss.dtype)  # which a divisor without dimensions would widen
    return loss if len(outputs) == 1 else (loss, RowStatistics(*outputs[1].unbind()))


def loss_of_call(call: dict, teachers: list, loss_of) -> Tensor | tuple[Tensor, RowStatistics]:
    """The kernels' loss of a call: the arguments of one of the functions on logits, by name.
    `loss_of`: the same function of ``reference``.
    """
    given, divisor, group = call, None, ""
    if isinstance(call["num_items"], Tensor):
        call = dict(call)
        divisor = take_divisor(call)
        if _fits_weight(divisor, call):
            call["weight"], divisor = _divided_weight(call, divisor), None
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
        if needs_option_gradient(call):
            return by_reference(loss_of, given)
        op = torch.ops.kdkernels.distillation_loss
        logits = for_floats(call["student_logits"], call.values())
        outputs = op(logits, teachers, *packed(call), wishes_of(call), group)
    else:
        outputs = _C.distillation_loss(call, teachers, group)
        if outputs is None:
            return by_reference(loss_of, given)
    return result_of(outputs, divisor)


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
