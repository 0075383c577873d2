"""Optimizers whose step adds noise, noise for any optimizer, and optimizers made of noise alone.

The noise is ``kdkernels.noise``'s: parameter i, counted over all groups, takes stream i, and the
optimizer's count of steps is the noise's step. So a parameter without a gradient does not change
the noise of others, gradients that accumulate over micro-batches get noise once, a shard of a
DTensor gets its slice, and a resumed run continues bit for bit. Ranks agree without communication
if they have the same seed: pass it, or call ``torch.manual_seed`` with the same number.

Arguments of several of these:

std
    The noise's standard deviation, finite and 0 or more: a number, a one-element tensor, or a
    schedule, any callable from the step (0, 1, ...) to such a value. ``neelakantan``,
    ``cosine`` and ``exponential`` return schedules. A state_dict does not hold schedules.
seed
    An int in [-2^63, 2^64). None draws one from torch's default generator, at construction.
distribution
    One of ``kdkernels.noise.DISTRIBUTIONS``, each of variance 1.
capturable
    Keep step counts on the device, so that a CUDA graph can capture ``step`` and a GradScaler can
    skip a step without synchronisation. A schedule is then called with an int64 tensor; lr and std
    must be tensors if they change between replays.
stochastic_rounding
    Round 16-bit parameters and their moments up or down by chance, as ``stochastic_round`` does, in
    the same pass; parameters of 32 and 64 bits are not touched. Updates too small for the dtype
    then add up. The bits are a function of seed, noise step, parameter and element: ranks agree on
    them, at any sharding. May differ between parameter groups.
diagnostics
    Keep the norms of gradient and noise of each step, see ``norms``.

Bad values raise ValueError and bad types TypeError, which name the argument. Under torch.compile a
step runs eagerly, outside the graph.
"""

from kdkernels.optim.gradient_free import (
    evolution_members,
    evolution_step,
    evolution_update,
    mezo_step,
)
from kdkernels.optim.gradient_noise import GradientNoise, NoiseDominatesWarning
from kdkernels.optim.optimizers import SGLD, NoisyAdamW, NoisySGD, pSGLD
from kdkernels.optim.parts import NoiseNorms
from kdkernels.optim.schedules import Std, cosine, exponential, neelakantan

__all__ = [
    "GradientNoise",
    "NoiseDominatesWarning",
    "NoiseNorms",
    "NoisyAdamW",
    "NoisySGD",
    "SGLD",
    "Std",
    "cosine",
    "evolution_members",
    "evolution_step",
    "evolution_update",
    "exponential",
    "mezo_step",
    "neelakantan",
    "pSGLD",
]
