"""Optimizers whose step adds noise, noise for any optimizer, and optimizers made of noise alone.

The noise is ``kdkernels.noise``'s: parameter i, counted over all groups, takes stream i, and the
optimizer's own count of steps is the noise's step. So a parameter without a gradient shifts nobody
else's noise, gradients that accumulate over micro-batches get it once, a shard of a DTensor takes
its own slice, and a run that is stopped and resumed gets the bits it would have got. Ranks agree
without communication if they have the same seed: give it, or call ``torch.manual_seed`` alike.

What several of these take:

std
    The noise's standard deviation, finite and 0 or more: a number, a one-element tensor, or a
    schedule, any callable from the step (0, 1, ...) to such a value. ``neelakantan``,
    ``cosine`` and ``exponential`` make some. Schedules are code: a state_dict leaves them out.
seed
    An int in [-2^63, 2^64). None draws one from torch's default generator, at construction.
distribution
    One of ``kdkernels.noise.DISTRIBUTIONS``, each of variance 1.
capturable
    Keep step counts on the device, so that a CUDA graph may capture ``step`` and that a GradScaler
    skips a step without a synchronisation. A schedule is then called with an int64 tensor, and lr
    and std should be tensors where they are to change between replays.
diagnostics
    Keep the norms of gradient and noise of every step, see ``norms``.

Bad values raise ValueError and bad types TypeError that name the argument. Under torch.compile a
step runs as it is, outside the graph.
"""

from kdkernels.optim.gradient_free import evolution_step, mezo_step
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
    "evolution_step",
    "exponential",
    "mezo_step",
    "neelakantan",
    "pSGLD",
]
