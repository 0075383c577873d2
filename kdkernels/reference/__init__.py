"""Every op again in plain PyTorch: the specification, the tests' oracle, and backend="reference".

Written from the formulas, without the library's kernels. Noise agrees with theirs to rounding (the
kernels' own functions are accurate to an ulp, not correctly rounded); everything else to the
dtype's precision. Losses are differentiable to any order in everything that requires grad.
"""

from kdkernels.reference.arguments import (
    MAX_TEACHERS,
    MAX_TOP_K,
    check_floating,
    check_head,
    check_range,
    check_teacher_index,
    refuse_others,
    teacher_form,
    teacher_heads,
    without_teacher,
)
from kdkernels.reference.divergences import (
    DIVERGENCES,
    TOP_K_DIVERGENCES,
    Divergence,
    divergence_parameters,
)
from kdkernels.reference.log_probs import LogProbs, linear_log_probs
from kdkernels.reference.losses import (
    distillation_loss,
    linear_distillation_loss,
    topk_distillation_loss,
)
from kdkernels.reference.noise import (
    DISTRIBUTIONS,
    add_noise_,
    combine_noise_,
    dropout,
    gradient_noise,
    input_noise,
    noise_dot,
    noisy_linear_regression,
    perturbed_parameters,
    philox4x32_10,
    randn_like,
    rounded_by_chance,
    soft_regularization,
    stochastic_round,
)
from kdkernels.reference.optimizers import noisy_update_
from kdkernels.reference.rows import RowStatistics

__all__ = [
    "DISTRIBUTIONS",
    "DIVERGENCES",
    "Divergence",
    "LogProbs",
    "MAX_TEACHERS",
    "MAX_TOP_K",
    "RowStatistics",
    "TOP_K_DIVERGENCES",
    "add_noise_",
    "check_floating",
    "check_head",
    "check_range",
    "check_teacher_index",
    "combine_noise_",
    "distillation_loss",
    "divergence_parameters",
    "dropout",
    "gradient_noise",
    "input_noise",
    "linear_distillation_loss",
    "linear_log_probs",
    "noise_dot",
    "noisy_linear_regression",
    "noisy_update_",
    "perturbed_parameters",
    "philox4x32_10",
    "randn_like",
    "refuse_others",
    "rounded_by_chance",
    "soft_regularization",
    "stochastic_round",
    "teacher_form",
    "teacher_heads",
    "topk_distillation_loss",
    "without_teacher",
]
