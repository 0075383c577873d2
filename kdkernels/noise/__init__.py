"""Noise that is a pure function of (seed, stream, step, element index).

The number of element i of a tensor is made of the words of Philox4x32-10 (Salmon et al., SC 2011)
at the counter (i // 4 low, i // 4 high, stream, step) under the key (seed low, seed high): the
normal of word pair (i % 4) // 2 through the Box-Muller transform, the other distributions of word
i % 4. Elements count in row-major order whatever the strides. Nothing is stored: the same
arguments give the same bits on every CPU and GPU, for any number of threads and any sharding.

Philox passes TestU01's BigCrush, but it is not a cryptographic generator: the key may be found from
some of the numbers, so this noise gives no privacy guarantee.

Keyword arguments of all functions:

seed
    An int in [-2^63, 2^64). None draws one from torch's default generator, which
    ``torch.manual_seed`` seeds; two calls then differ. ``randn_like``, ``add_noise_``,
    ``input_noise`` and ``gradient_noise`` also take an int64 tensor: of one element on any device,
    or of one per row, ``[len(x)]``. Each row then has the noise that it would have alone, with
    elements counted from its first one, whatever batch it is in.
step
    The training step, in [0, 2^32). An int, or an int64 scalar tensor on the noise's device, which
    a captured CUDA graph reads again at each replay. Advance it outside any function that
    torch.compile traces: a backward pass inside may read the later number. Like seed, it may be
    one per row. While a CUDA graph is being captured it must be a tensor, and seed not None.
stream
    A number that tells tensors apart, in [0, 2^32): a parameter's index in its list.
offset
    Global index of the tensor's first element, for a shard of a larger tensor.
distribution
    "normal", "uniform" on [-sqrt(3), sqrt(3)], "rademacher" (-1 or 1), "truncated_normal" (cut off
    at two standard deviations, and scaled) or "laplace". Each has mean 0 and variance 1, so that
    std means the same for all.

Functions on a list of tensors give tensor k the stream ``stream + k``; stream and offset may also
be one number per tensor, so that a tensor has the same noise when others are left out. A DTensor
gets its slice of the whole tensor's noise, so that every mesh gives the same.

Bad numbers raise ValueError and bad dtypes TypeError, which name the argument; x and tensors must
be fp32, fp64, bf16 or fp16, on CPU or CUDA. Noise is added to 16-bit tensors in fp32 and rounded
once.
"""

from kdkernels.noise.arguments import DISTRIBUTIONS
from kdkernels.noise.bits import dropout, stochastic_round
from kdkernels.noise.functions import (
    add_noise_,
    combine_noise_,
    gradient_noise,
    input_noise,
    noise_dot,
    perturbed_parameters,
    randn_like,
    soft_regularization,
)
from kdkernels.noise.modules import Dropout, GradientNoiseLayer, InputNoise
from kdkernels.noise.regression import noisy_linear_regression
from kdkernels.noise.shards import shard_of

__all__ = [
    "DISTRIBUTIONS",
    "Dropout",
    "GradientNoiseLayer",
    "InputNoise",
    "add_noise_",
    "combine_noise_",
    "dropout",
    "gradient_noise",
    "input_noise",
    "noise_dot",
    "noisy_linear_regression",
    "perturbed_parameters",
    "randn_like",
    "shard_of",
    "soft_regularization",
    "stochastic_round",
]
