"""Distillation losses."""

from kdkernels import reference
from kdkernels.distill.linear import linear_distillation_loss
from kdkernels.distill.log_probs import linear_log_probs
from kdkernels.distill.logits import distillation_loss, topk_distillation_loss
from kdkernels.distill.module import DistillationLoss
from kdkernels.distill.teachers import TopK, sample_teacher, topk_teacher
from kdkernels.reference import Divergence, LogProbs, RowStatistics

__all__ = [
    "DistillationLoss",
    "Divergence",
    "LogProbs",
    "RowStatistics",
    "TopK",
    "distillation_loss",
    "divergences",
    "linear_distillation_loss",
    "linear_log_probs",
    "sample_teacher",
    "topk_distillation_loss",
    "topk_teacher",
]


def divergences() -> dict[str, Divergence]:
    """The divergences that the losses take as ``divergence``.

    Returns:
        Name -> (formula, source, parameters with their defaults). p is the teacher, q the student.
    """
    return dict(reference.DIVERGENCES)
