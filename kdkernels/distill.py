"""Distillation losses."""

import torch
from torch import Tensor, nn

from kdkernels import _C, reference
from kdkernels.errors import INT, NUMBER, OPTIONAL_TENSOR, TENSOR, explain


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 1.0,
    alpha: float | None = None,
    divergence: str = "forward_kl",
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    num_items: float | Tensor | None = None,
    reduction: str = "mean",
    inplace: bool = False,
    backend: str = "fused",
) -> Tensor:
    r"""Distillation loss of Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural
    Network" (arXiv 1503.02531, section 2).

    For one row, with p_s = softmax(z / T) and p_t = softmax(t / T)::

        loss = alpha * T^2 * KL(p_t || p_s) + (1 - alpha) * CE(z, label; label_smoothing)

    T^2 keeps the size of the soft gradient independent of T (the paper's equation 4). The gradient
    flows to the student only, and is made in the forward call, while the row is in cache: both
    logits are read once and the gradient is written once.

    Args:
        student_logits: z, ``[*, V]``, fp32, fp64, bf16 or fp16, on CPU or CUDA; any strides.
        teacher_logits: t, the shape, dtype and device of ``student_logits``; detached.
        labels: ``[*]``, int64 classes in [0, V) or ``ignore_index``. A row that is ignored has loss
            and gradient 0 and its logits are not read. None: the divergence alone.
        temperature: T > 0, from 1e-15 to 1e15.
        alpha: share of the divergence, in [0, 1]. Default 0.5 with labels, 1 without (and no other
            then). With 1 the labels only say which rows are ignored; with 0 the teacher is not
            read.
        divergence: "forward_kl".
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
        backend: "fused", or "reference" for plain PyTorch.

    Returns:
        The loss, ``[]``, or ``[*]`` with reduction "none"; fp64 for fp64 logits, else fp32.

    Non-finite logits: -inf is a class without probability (0 where the teacher, too, excludes it;
    an infinite loss where only the student does). A row with NaN, +inf, or only -inf gives NaN for
    its loss and gradient and leaves other rows alone.

    The same bits come out for any number of threads. Differentiable twice and more, and through
    ``torch.compile``. On CUDA a label out of range gives NaN loss and zero gradient for its row.

    Raises:
        ValueError: shapes or devices differ, V is 0, a number or (on CPU) a label is out of range,
            the teacher requires grad, or ``inplace`` is not possible.
        TypeError: a dtype is not supported or differs.
    """
    if divergence != "forward_kl":
        raise ValueError(f'divergence is "{divergence}"; it takes "forward_kl"')
    if backend not in ("fused", "reference"):
        raise ValueError(f'backend is "{backend}"; it takes "fused" or "reference"')
    compiling = torch.compiler.is_compiling()
    if compiling or backend == "reference" or isinstance(num_items, Tensor):
        logits = (student_logits, teacher_logits, labels)
        options = {
            "temperature": temperature,
            "alpha": alpha,
            "label_smoothing": label_smoothing,
            "ignore_index": ignore_index,
            "weight": weight,
        }
        if backend == "reference":
            return reference.distillation_loss(
                *logits, **options, num_items=num_items, reduction=reduction
            )
        if isinstance(num_items, Tensor):
            if reduction != "mean":
                raise ValueError(f'num_items goes with reduction="mean" only, not "{reduction}"')
            total = distillation_loss(*logits, **options, reduction="sum", inplace=inplace)
            return total / num_items
        op = torch.ops.kdkernels.distillation_loss
        return op(*logits, **options, num_items=num_items, reduction=reduction)
    try:
        return _C.distillation_loss(
            student_logits,
            teacher_logits,
            labels,
            temperature,
            alpha,
            label_smoothing,
            ignore_index,
            weight,
            num_items,
            reduction,
            inplace,
        )
    except TypeError as error:
        raise explain(
            error,
            student_logits=(student_logits, TENSOR),
            teacher_logits=(teacher_logits, TENSOR),
            labels=(labels, OPTIONAL_TENSOR),
            temperature=(temperature, NUMBER),
            alpha=(0 if alpha is None else alpha, NUMBER),
            label_smoothing=(label_smoothing, NUMBER),
            ignore_index=(ignore_index, INT),
            weight=(weight, OPTIONAL_TENSOR),
            num_items=(1 if num_items is None else num_items, NUMBER),
        ) from None


_MODULE_OPTIONS = {
    *("temperature", "alpha", "divergence", "label_smoothing", "ignore_index"),
    *("reduction", "inplace", "backend"),
}


class DistillationLoss(nn.Module):
    """``distillation_loss`` as a module; takes its options, but not those that go with a batch.

    Args:
        options: ``temperature``, ``alpha``, ``divergence``, ``label_smoothing``, ``ignore_index``,
            ``reduction``, ``inplace``, ``backend``, as ``distillation_loss`` has them.
    """

    def __init__(self, **options):
        super().__init__()
        unknown = options.keys() - _MODULE_OPTIONS
        if unknown:
            raise TypeError(f"DistillationLoss takes no argument {sorted(unknown)[0]!r}")
        self.options = options

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        *,
        weight: Tensor | None = None,
        num_items: float | Tensor | None = None,
    ) -> Tensor:
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
        """The options, as nn.Module prints them."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
