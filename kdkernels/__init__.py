"""Fused kernels for knowledge distillation and Gaussian noise injection in PyTorch."""

import torch  # first: the extension links to its libraries

try:
    from kdkernels import _C  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"kdkernels._C does not load with torch {torch.__version__}; it must be built against the "
        "torch that runs it: pip install --no-build-isolation --force-reinstall --no-deps ."
    ) from error

from kdkernels import reference
from kdkernels.distill import (
    DistillationLoss,
    RowStatistics,
    TopK,
    distillation_loss,
    divergences,
    linear_distillation_loss,
    sample_teacher,
    topk_distillation_loss,
    topk_teacher,
)
from kdkernels.noise import (
    GradientNoiseLayer,
    InputNoise,
    add_noise_,
    combine_noise_,
    gradient_noise,
    input_noise,
    noise_dot,
    noisy_linear_regression,
    perturbed_parameters,
    randn_like,
    soft_regularization,
)
from kdkernels.optim import (
    SGLD,
    GradientNoise,
    NoiseDominatesWarning,
    NoiseNorms,
    NoisyAdamW,
    NoisySGD,
    cosine,
    evolution_step,
    exponential,
    mezo_step,
    neelakantan,
    pSGLD,
)

__version__ = "0.1.0"
__all__ = [
    "DistillationLoss",
    "GradientNoise",
    "GradientNoiseLayer",
    "InputNoise",
    "NoiseDominatesWarning",
    "NoiseNorms",
    "NoisyAdamW",
    "NoisySGD",
    "RowStatistics",
    "SGLD",
    "TopK",
    "add_noise_",
    "combine_noise_",
    "cosine",
    "distillation_loss",
    "divergences",
    "evolution_step",
    "exponential",
    "gradient_noise",
    "input_noise",
    "linear_distillation_loss",
    "mezo_step",
    "neelakantan",
    "noise_dot",
    "noisy_linear_regression",
    "pSGLD",
    "perturbed_parameters",
    "randn_like",
    "reference",
    "sample_teacher",
    "soft_regularization",
    "topk_distillation_loss",
    "topk_teacher",
]
