"""Noise in one place of training: on images, gradients or weights, or in the loss."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence

import torch

import kdkernels


@dataclasses.dataclass(frozen=True)
class Noise:
    """Noise in one place of training. A step's noise is a function of ``seed`` and the step.

    Attributes:
        place: ``"none"``. ``"input"``: std * eps on the images. ``"gradient"``: on every
            gradient, with variance std^2 / (1 + step)^0.55 (Neelakantan et al., arXiv
            1511.06807). ``"parameter"``: std * eps on the weights, in forward and backward, not
            in the step. ``"regularizer"``: none on the weights; the loss is
            L + std * sum eps_i dL/dtheta_i, with the same eps as ``"parameter"``, whose
            first-order part in eps it is.
        std: standard deviation, >= 0.
        seed: of the noise.
    """

    place: str = "none"
    std: float = 0.0
    seed: int = 0

    def on_input(self, images: torch.Tensor, step: int, first: int = 0) -> torch.Tensor:
        """The images, with noise if that is its place; ``first``: the number of the first one."""
        if self.place != "input":
            return images
        offset = first * images[0].numel()
        return kdkernels.input_noise(images, self.std, seed=self.seed, step=step, offset=offset)

    def on_parameters(self, parameters: Sequence[torch.Tensor], step: int):
        """A context in which the weights have noise, if that is its place."""
        if self.place != "parameter":
            return contextlib.nullcontext()
        return kdkernels.perturbed_parameters(parameters, self.std, seed=self.seed, step=step)

    def on_loss(
        self, loss: Callable[[], torch.Tensor], parameters: Sequence[torch.Tensor], step: int
    ) -> torch.Tensor:
        """What is minimised: the loss, or the regularised loss if that is its place."""
        if self.place != "regularizer":
            return loss()
        numbered = [(k, p) for k, p in enumerate(parameters) if p.requires_grad]
        streams, free = zip(*numbered, strict=True)  # the streams of on_parameters
        return kdkernels.soft_regularization(
            loss, free, self.std, seed=self.seed, step=step, stream=streams
        )

    def on_optimizer(self, optimizer: torch.optim.Optimizer):
        """What adds noise to the gradients before each step, if that is its place; else None."""
        if self.place != "gradient":
            return None
        std = kdkernels.neelakantan(self.std**2, 0.55)
        # Its ratio to the gradient goes into the metrics, which a warning would only repeat.
        return kdkernels.GradientNoise(
            optimizer, std, seed=self.seed, diagnostics=True, warn_above=1e30
        )
