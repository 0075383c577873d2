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
from kdkernels.distill import DistillationLoss, distillation_loss
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
    "add_noise_",
    "distillation_loss",
    "gradient_noise",
    "input_noise",
    "noisy_linear_regression",
    "randn_like",
    "reference",
]
