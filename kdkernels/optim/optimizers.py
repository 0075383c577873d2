"""Optimizers whose step adds noise."""

from typing import Unpack

from torch import Tensor

from kdkernels.optim.noisy import UPDATES, NoiseOptions, NoisyOptimizer
from kdkernels.optim.schedules import Std


class NoisySGD(NoisyOptimizer):
    """torch.optim.SGD on gradients with noise, in one pass over memory.

    Args:
        params: as in torch.optim.SGD, parameters or groups; each group may have other values of
            the numbers below.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as in torch.optim.SGD.
        std, seed, distribution, capturable, diagnostics, stochastic_rounding: see the module.

    Example:
        >>> optimizer = kdkernels.NoisySGD(
        ...     model.parameters(), lr=0.1, momentum=0.9, std=kdkernels.neelakantan(0.01), seed=0
        ... )
    """

    _update, _moments = UPDATES.index("sgd"), ("momentum_buffer",)

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        std: Std = 0.0,
        **options: Unpack[NoiseOptions],
    ):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "std": std,
        }
        super().__init__(params, defaults, **options)


class NoisyAdamW(NoisyOptimizer):
    """torch.optim.AdamW on gradients with noise, in one pass over memory.

    Args:
        params: as in torch.optim.AdamW, parameters or groups; each group may have other values of
            the numbers below.
        lr, betas, eps, weight_decay, maximize: as in torch.optim.AdamW; betas are numbers.
        std, seed, distribution, capturable, diagnostics, stochastic_rounding: see the module.

    Example:
        >>> optimizer = kdkernels.NoisyAdamW(model.parameters(), lr=1e-3, std=0.01, seed=0)
        >>> loss_fn(model(x), y).backward()
        >>> optimizer.step()
    """

    _update, _moments = UPDATES.index("adamw"), ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        std: Std = 0.0,
        **options: Unpack[NoiseOptions],
    ):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "std": std}
        super().__init__(params, defaults, **options)


class SGLD(NoisyOptimizer):
    """Stochastic gradient Langevin dynamics (Welling and Teh, ICML 2011).

    With ``U = num_data * loss + weight_decay / 2 |theta|^2``, whose gradient backward estimates on
    a mini-batch, one step is::

        theta <- theta - lr / 2 * dU + sqrt(lr * temperature) * eps

    and samples theta from the density exp(-U / temperature), as lr tends to 0. ``loss`` is the mean
    negative log-likelihood of a datum; weight_decay is the precision of a Gaussian prior.

    Args:
        params: parameters or groups; each group may have other values of the numbers below.
        lr: the step size, epsilon in the paper.
        num_data: the number of data that the loss is the mean of; 1 where it is their sum.
        temperature: 1 samples the posterior, 0 is gradient descent.
        weight_decay: at least 0.
        maximize: the loss is a log-likelihood.
        seed, distribution, capturable, diagnostics, stochastic_rounding: see the module.
    """

    _update = UPDATES.index("sgld")

    def __init__(
        self,
        params,
        lr: float | Tensor,
        *,
        num_data: float = 1,
        temperature: float = 1.0,
        weight_decay: float = 0.0,
        **options: Unpack[NoiseOptions],
    ):
        defaults = {
            "lr": lr,
            "num_data": num_data,
            "temperature": temperature,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults, **options)


class pSGLD(NoisyOptimizer):  # noqa: N801
    """SGLD with RMSprop's preconditioner (Li et al., arXiv 1512.07666, algorithm 1).

    With g the gradient of the loss and U as in ``SGLD``::

        V <- beta2 V + (1 - beta2) g^2,  G = 1 / (eps + sqrt(V))
        theta <- theta - lr / 2 * G dU + sqrt(lr * temperature * G) * eps

    The curvature term Gamma is left out, as the paper does in practice: what it costs in bias
    falls with 1 - beta2.

    Args:
        params, lr, num_data, temperature, weight_decay, maximize: as in ``SGLD``.
        beta2: V's decay, alpha in the paper.
        eps: the paper's lambda.
        seed, distribution, capturable, diagnostics, stochastic_rounding: see the module.
    """

    _update, _moments = UPDATES.index("psgld"), ("square_avg",)

    def __init__(
        self,
        params,
        lr: float | Tensor,
        *,
        num_data: float = 1,
        temperature: float = 1.0,
        weight_decay: float = 0.0,
        beta2: float = 0.99,
        eps: float = 1e-5,
        **options: Unpack[NoiseOptions],
    ):
        defaults = {
            "lr": lr,
            "num_data": num_data,
            "temperature": temperature,
            "weight_decay": weight_decay,
            "beta2": beta2,
            "eps": eps,
        }
        super().__init__(params, defaults, **options)
