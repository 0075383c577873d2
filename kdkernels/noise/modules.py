"""Noise as modules."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from kdkernels.errors import BOOL, INT, NUMBER, check, check_number, fits
from kdkernels.noise.arguments import OPS, distribution_index, fixed_seed
from kdkernels.noise.bits import dropout
from kdkernels.noise.functions import gradient_noise, input_noise


class _SteppedLayer(nn.Module):
    """What the modules share: a seed and a count of steps."""

    step: Tensor

    def __init__(self, seed, stream):
        super().__init__()
        check("stream", stream, INT)
        if not 0 <= stream < 2**32:
            raise ValueError(f"stream is {stream}; it must be from 0 to 2^32 - 1")
        self.seed = fixed_seed(seed)
        self.stream = stream
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def reset_parameters(self) -> None:
        """Set step to what it was at first, as after ``to_empty``."""
        with torch.no_grad():
            self.step.zero_()

    def _next(self) -> dict:
        """Where this step's noise is; the next call gives the next step's."""
        return {"seed": self.seed, "step": OPS._next_step_(self.step), "stream": self.stream}

    def get_extra_state(self):
        return torch.tensor(self.seed, device="cpu")

    def set_extra_state(self, state):
        self.seed = int(state)


class Dropout(_SteppedLayer):
    """``dropout`` as a module: in training mode, with the next step's bits in every forward.

    No mask is kept between forward and backward. state_dict holds the seed and the step, so that a
    resumed run drops the same. Activation checkpointing runs forward again after the step has
    advanced: call ``dropout`` with an explicit step there.

    Args:
        p: the probability that an element is zeroed, from 0 to 1.
        seed: an int in [-2^63, 2^64). None draws one from torch's default generator, once, here.
        stream: see ``kdkernels.noise``.

    Example:
        >>> kdkernels.Dropout(0.1, seed=0)
        Dropout(p=0.1, seed=0)
    """

    def __init__(self, p: float = 0.5, *, seed: int | None = None, stream: int = 0):
        super().__init__(seed, stream)
        check_number("p", p)
        if p > 1:
            raise ValueError(f"p is {p}; it must be from 0 to 1")
        self.p = float(p)

    def forward(self, x: Tensor) -> Tensor:
        """``dropout`` of x in training mode; x itself in evaluation mode."""
        return dropout(x, self.p, **self._next()) if self.training else x

    def extra_repr(self) -> str:
        """What tells this module from others."""
        return f"p={self.p}, seed={self.seed}"


class _NoiseLayer(_SteppedLayer):
    """What the modules that add noise share."""

    _op: Callable[..., Tensor]
    std: float | Tensor

    def __init__(self, seed, stream, distribution, multiplicative):
        super().__init__(seed, stream)
        check("multiplicative", multiplicative, BOOL)
        distribution_index(distribution)
        self.distribution = distribution
        self.multiplicative = multiplicative

    def reset_parameters(self) -> None:
        """Set step and std to what they were at first, as after ``to_empty``."""
        super().reset_parameters()
        with torch.no_grad():
            if isinstance(self.std, Tensor):
                if isinstance(self._first_std, Tensor) and self._first_std.is_meta:
                    raise ValueError("std was given as a meta tensor, which holds no numbers")
                self.std.copy_(torch.as_tensor(self._first_std, device=self.std.device))

    def forward(self, x: Tensor) -> Tensor:
        """The op on x in training mode, and the next step; x itself in evaluation mode."""
        if not self.training:
            return x
        return self._op(
            x,
            self.std,
            distribution=self.distribution,
            multiplicative=self.multiplicative,
            **self._next(),
        )

    def extra_repr(self):
        std = list(self.std.shape) if isinstance(self.std, Tensor) else self.std
        more = ", multiplicative=True" if self.multiplicative else ""
        return f"std={std}, distribution={self.distribution}, seed={self.seed}{more}"


def _checked_std(std) -> float:
    if not fits(std, NUMBER):
        raise TypeError(f"std is a {type(std).__name__}; it must be {NUMBER} or a tensor")
    std = float(std)
    if not 0 <= std < math.inf:
        raise ValueError(f"std is {std}; it must be finite and 0 or more")
    return std


class InputNoise(_NoiseLayer):
    """``input_noise`` as a module: noise in training mode, the input itself in evaluation mode.

    Every forward in training uses the next step's noise. state_dict holds the seed and the step, so
    that a resumed run continues with the same noise. Ranks that train on different data need
    different seeds. Activation checkpointing runs forward again after the step has advanced: call
    ``input_noise`` with an explicit step there.

    Args:
        std: the noise's standard deviation, finite and 0 or more; or a tensor of a shape that
            broadcasts to the input's.
        learnable: make std a parameter.
        shape: the shape of std where std is a number: ``(C, 1, 1)`` for one std per channel.
        multiplicative: x * (1 + std * eps) instead of x + std * eps.
        distribution, stream: see ``kdkernels.noise``.
        seed: an int in [-2^63, 2^64). None draws one from torch's default generator, once, here.

    Example:
        >>> model = nn.Sequential(kdkernels.InputNoise(0.1, seed=0), nn.Linear(64, 10))
        >>> model[0]
        InputNoise(std=0.1, distribution=normal, seed=0)
    """

    _op = staticmethod(input_noise)

    def __init__(
        self,
        std: float | Tensor = 0.1,
        *,
        learnable: bool = False,
        shape: Sequence[int] = (),
        distribution: str = "normal",
        multiplicative: bool = False,
        seed: int | None = None,
        stream: int = 0,
    ):
        super().__init__(seed, stream, distribution, multiplicative)
        check("learnable", learnable, BOOL)
        if isinstance(std, Tensor):
            if not std.is_floating_point():
                raise TypeError(f"std has dtype {std.dtype}; it must be a floating one")
            if tuple(shape) not in ((), tuple(std.shape)):
                raise ValueError(f"shape is {tuple(shape)}, but std has shape {list(std.shape)}")
            std = std.detach().clone()
            self._first_std = std.clone()
        else:
            self._first_std = std = _checked_std(std)
            if learnable or tuple(shape) != ():
                std = torch.full(tuple(shape), std)
        if learnable:
            self.std = nn.Parameter(torch.as_tensor(std))
        elif isinstance(std, Tensor):
            self.register_buffer("std", std)
        else:
            self.std = std


class GradientNoiseLayer(_NoiseLayer):
    """``gradient_noise`` as a module: in training mode, noise in the gradient.

    Steps, state_dict and arguments are those of ``InputNoise``.
    """

    @staticmethod
    def _op(x: Tensor, std: float | Tensor, **noise) -> Tensor:
        # A copy: the op's view may not be changed in place, as by ReLU(inplace=True).
        return gradient_noise(x, std, **noise).clone()

    def __init__(
        self,
        std: float = 0.1,
        *,
        distribution: str = "normal",
        multiplicative: bool = False,
        seed: int | None = None,
        stream: int = 0,
    ):
        super().__init__(seed, stream, distribution, multiplicative)
        self.std = _checked_std(std)
