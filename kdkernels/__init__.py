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
    add_noise_,
    gradient_noise,
    input_noise,
    noisy_linear_regression,
    randn_like,
)

__version__ = "0.1.0"
__all__ = [
    "DistillationLoss",
    "RowStatistics",
    "TopK",
    "add_noise_",
    "distillation_loss",
    "divergences",
    "gradient_noise",
    "input_noise",
    "linear_distillation_loss",
    "noisy_linear_regression",
    "randn_like",
    "reference",
    "sample_teacher",
    "topk_distillation_loss",
    "topk_teacher",
]
