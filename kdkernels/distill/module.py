"""The loss on logits as a module."""

from collections.abc import Sequence
from typing import Any, Unpack

from torch import Tensor, nn

from kdkernels import reference
from kdkernels.distill.logits import distillation_loss
from kdkernels.distill.options import DenseOptions
from kdkernels.reference import RowStatistics


class ModuleOptions(DenseOptions, total=False):
    """Of ``DistillationLoss``."""

    return_statistics: bool


_MODULE_OPTIONS = ModuleOptions.__annotations__.keys() - {"weight", "num_items", "teacher_index"}


class DistillationLoss(nn.Module):
    """``distillation_loss`` as a module; takes its options, but not those that go with a batch.

    Args:
        options: all keyword arguments of ``distillation_loss`` but ``weight``, ``num_items`` and
            ``teacher_index``, which ``forward`` takes.

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
        teacher_index: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, RowStatistics]:
        """The loss of one batch; see ``distillation_loss``."""
        return distillation_loss(
            student_logits,
            teacher_logits,
            labels,
            weight=weight,
            num_items=num_items,
            teacher_index=teacher_index,
            **self.options,
        )

    def extra_repr(self) -> str:
        """The divergence with its parameters, then the other options, as nn.Module prints them."""
        shown: dict[str, Any] = {"divergence": "forward_kl"} | self.options
        shown |= reference.divergence_parameters(
            shown["divergence"], shown.get("divergence_alpha"), shown.get("beta")
        )
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())
