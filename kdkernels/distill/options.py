"""The losses' keyword arguments, for type checkers."""

from collections.abc import Sequence
from typing import TypedDict

from torch import Tensor
from torch.distributed import ProcessGroup


class CommonOptions(TypedDict, total=False):
    """What all losses take."""

    temperature: float | Tensor
    alpha: float | Tensor | None
    teacher_index: Tensor | None
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
    teacher_logsumexp: Tensor | Sequence[Tensor] | None


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
    teacher_bias: Tensor | Sequence[Tensor | None] | None
    teacher_logits: Tensor | Sequence[Tensor] | None
    teacher_values: Tensor | Sequence[Tensor] | None
    teacher_indices: Tensor | Sequence[Tensor] | None
    max_rows: int | None
    memory_budget: int | None
