"""Optimizers that need no gradients, only noise."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from kdkernels import _C
from kdkernels.errors import BOOL, INT, NUMBER, check, check_count, check_number, fits
from kdkernels.noise.arguments import fixed_seed
from kdkernels.noise.functions import combine_noise_, perturbed_parameters


def _member_seeds(seed: int | None, step: int, count: int) -> list[int]:
    """Seeds of a step's directions: 64 bits of Philox under the seed, one counter each."""
    seed = fixed_seed(seed)
    check("step", step, INT)
    if not 0 <= step < 2**32:
        raise ValueError(f"step is {step}; it must be an int in [0, 2^32)")
    key = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    words = (_C.philox([k, 0, 0, int(step)], key) for k in range(count))
    return [fixed_seed(low | high << 32) for low, high, *_ in words]


@torch.no_grad()
def evolution_step(
    params: Iterable[Tensor],
    score_fn: Callable[[], float | Tensor],
    *,
    population: int,
    std: float,
    lr: float,
    seed: int,
    step: int,
    antithetic: bool = True,
    shaping: str = "standardize",
    distribution: str = "normal",
) -> Tensor:
    """One step of evolution strategies towards higher scores (Salimans et al., arXiv 1703.03864).

    With s_i the shaped score of theta + std * eps_i (and -eps_i as another member if
    antithetic)::

        theta <- theta + lr / (population * std) * sum_i s_i eps_i

    No gradients, no moments and no noise are kept: a member's noise is made from its seed, again
    for the update, which is one pass over the parameters for any population (as of "Evolution
    strategies at scale", arXiv 2509.24372, which standardizes and counts 1 / std into lr).

    Args:
        params: what score_fn depends on; one copy of it is held.
        score_fn: gives the score of the parameters as they are: a number, or a tensor of one
            element. It is called once per member, without autograd.
        population: how many members; even if antithetic.
        std: how far the members stand from theta, above 0.
        lr: at least 0.
        seed, step: of the noise, an int in [-2^63, 2^64) and one in [0, 2^32).
        antithetic: members in pairs theta +- std * eps_i.
        shaping: "standardize" (mean 0, standard deviation 1), or "ranks" (evenly from -1/2 to 1/2,
            for any scale of the scores, as in OpenAI's; equal scores share a rank).
        distribution: of eps, see the module.

    Returns:
        The members' scores, fp64 ``[population]``; of a pair + and - in turn.

    Raises:
        ValueError: a score is not finite; the parameters are then as they were.

    Example:
        >>> x, y = sklearn.datasets.load_digits(return_X_y=True)
        >>> x, y = torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)
        >>> model = torch.nn.Linear(64, 10)
        >>> def score():
        ...     return -torch.nn.functional.cross_entropy(model(x), y)
        >>> for step in range(80):
        ...     scores = kdkernels.evolution_step(
        ...         model.parameters(), score, population=32, std=0.05, lr=0.02, seed=0, step=step
        ...     )
        >>> (model(x).argmax(1) == y).float().mean() > 0.85
        tensor(True)
    """
    params = list(params)
    _check_above_0("std", std)
    check_number("lr", lr)
    _check_shaping(shaping)
    members = evolution_members(population, seed=seed, step=step, antithetic=antithetic)
    scores = []
    for member, sign in members:
        with perturbed_parameters(
            params, sign * std, seed=member, step=step, distribution=distribution
        ):
            scores.append(_scalar("score_fn", score_fn(), params))
    scores = torch.stack(scores)
    if not torch.isfinite(scores).all():
        raise ValueError(f"score_fn gave {scores[~torch.isfinite(scores)][0].item()}")
    options = {"shaping": shaping, "distribution": distribution}
    evolution_update(
        params, scores, std=std, lr=lr, seed=seed, step=step, antithetic=antithetic, **options
    )
    return scores


def evolution_members(
    population: int, *, seed: int, step: int, antithetic: bool = True
) -> list[tuple[int, int]]:
    """The (seed, sign) of each member of ``evolution_step``'s population, for workers elsewhere.

    Member k stands at theta + sign * std * eps(seed, step): ``perturbed_parameters(params,
    sign * std, seed=seed, step=step)``. A worker that has theta needs no more than these two
    numbers to evaluate it, and ``evolution_update`` no more than the scores.

    Args:
        population, seed, step, antithetic: as in ``evolution_step``.

    Example:
        >>> kdkernels.evolution_members(2, seed=0, step=0)
        [(-2204013331526194987, 1), (-2204013331526194987, -1)]
    """
    check_count("population", population)
    check("antithetic", antithetic, BOOL)
    if antithetic and population % 2 != 0:
        raise ValueError(f"population is {population}; antithetic members come in pairs")
    signs = (1, -1) if antithetic else (1,)
    seeds = _member_seeds(seed, step, population // len(signs))
    return [(member, sign) for member in seeds for sign in signs]


@torch.no_grad()
def evolution_update(
    params: Iterable[Tensor],
    scores: Sequence[float] | Tensor,
    *,
    std: float,
    lr: float,
    seed: int,
    step: int,
    antithetic: bool = True,
    shaping: str = "standardize",
    distribution: str = "normal",
) -> None:
    """The update of ``evolution_step`` from scores that were found elsewhere, in one pass.

    Every process that has theta and the scores comes to the same parameters, bit for bit; nothing
    else has to be sent.

    Args:
        params: theta, unperturbed.
        scores: of the members in the order of ``evolution_members``: ``[population]`` finite
            numbers, or a tensor.
        std, lr, seed, step, antithetic, shaping, distribution: as in ``evolution_step``.

    Example:
        >>> theta, options = [torch.zeros(3)], {"seed": 0, "step": 0}
        >>> def score(member, sign):  # in a worker
        ...     with kdkernels.perturbed_parameters(theta, 0.1 * sign, seed=member, step=0):
        ...         return -(theta[0] - 1).square().sum().item()
        >>> scores = [score(*member) for member in kdkernels.evolution_members(8, **options)]
        >>> kdkernels.evolution_update(theta, scores, std=0.1, lr=0.1, **options)
    """
    params = list(params)
    _check_above_0("std", std)
    check_number("lr", lr)
    _check_shaping(shaping)
    if not isinstance(scores, Tensor):
        if not hasattr(scores, "__iter__") or isinstance(scores, str):
            raise TypeError(f"scores is a {type(scores).__name__}; it must be numbers or a tensor")
        for score in (scores := list(scores)):
            check("scores", score, NUMBER)
        numbers = [float(score) for score in scores]
        scores = torch.tensor(numbers, dtype=torch.float64, device="cpu")
    if scores.dim() != 1:
        raise ValueError(f"scores has shape {list(scores.shape)}; it must be [population]")
    if not torch.isfinite(scores).all():
        raise ValueError(f"scores holds {scores[~torch.isfinite(scores)][0].item()}")
    members = evolution_members(len(scores), seed=seed, step=step, antithetic=antithetic)
    shaped = _shaped(scores.to(torch.float64), shaping)
    signs = 2 if antithetic else 1
    weights = (shaped * shaped.new_tensor([sign for _, sign in members])).reshape(-1, signs).sum(1)
    combine_noise_(
        params,
        weights * (lr / (len(scores) * std)),
        [member for member, _ in members[::signs]],
        step=step,
        distribution=distribution,
    )


def _check_shaping(shaping: str):
    if shaping not in ("standardize", "ranks"):
        raise ValueError(f'shaping is {shaping!r}; it must be "standardize" or "ranks"')


def _shaped(scores: Tensor, shaping: str) -> Tensor:
    """Scores of mean 0, in units of their spread or by their ranks."""
    _, place, equals = scores.unique(return_inverse=True, return_counts=True)
    if len(equals) == 1:  # whose mean may be off by a rounding
        return torch.zeros_like(scores)
    if shaping == "ranks":  # equal scores share the mean of their ranks
        ranks = equals.cumsum(0) - (equals + 1) / 2
        return ranks.to(scores)[place] / (len(scores) - 1) - 0.5
    return (scores - scores.mean()) / scores.std(correction=0)


@torch.no_grad()
def mezo_step(
    params: Iterable[Tensor],
    loss_fn: Callable[[], float | Tensor],
    *,
    lr: float,
    scale: float = 1e-3,
    directions: int = 1,
    seed: int,
    step: int,
    weight_decay: float = 0.0,
    distribution: str = "normal",
    restore: str = "copy",
) -> Tensor:
    """One step of zeroth-order SGD towards lower loss (MeZO: Malladi et al., arXiv 2305.17333).

    With L(x) the loss and n directions::

        g_i = (L(theta + scale * eps_i) - L(theta - scale * eps_i)) / (2 * scale)
        theta <- (1 - lr * weight_decay) * theta - lr / n * sum_i g_i eps_i

    Args:
        params: what loss_fn depends on.
        loss_fn: gives the loss of the parameters as they are, a number or a tensor of one element,
            on the same data in all 2 * directions calls of a step; without autograd.
        lr, weight_decay: at least 0.
        scale: how far to look, above 0.
        directions: n; the update is one pass over the parameters for any.
        seed, step: of the noise, an int in [-2^63, 2^64) and one in [0, 2^32).
        distribution: of eps, see the module.
        restore: how the parameters come back after a look, see ``perturbed_parameters``:
            "regenerate" needs no memory, as MeZO itself.

    Returns:
        The mean of the losses seen, a fp64 scalar. No check: a loss that is not finite makes the
        parameters NaN.

    Example:
        >>> x, y = sklearn.datasets.load_digits(return_X_y=True)
        >>> x, y = torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)
        >>> model = torch.nn.Linear(64, 10)
        >>> def loss():
        ...     return torch.nn.functional.cross_entropy(model(x), y)
        >>> for step in range(200):
        ...     mean = kdkernels.mezo_step(
        ...         model.parameters(), loss, lr=0.1, directions=8, seed=0, step=step
        ...     )
        >>> (model(x).argmax(1) == y).float().mean() > 0.85
        tensor(True)
    """
    params = list(params)
    check_count("directions", directions)
    check_number("lr", lr)
    check_number("weight_decay", weight_decay)
    _check_above_0("scale", scale)
    seeds = _member_seeds(seed, step, directions)
    noise = {"step": step, "distribution": distribution}
    losses = []
    for direction in seeds:
        for sign in (1, -1):
            with perturbed_parameters(
                params, sign * scale, seed=direction, restore=restore, **noise
            ):
                losses.append(_scalar("loss_fn", loss_fn(), params))
    losses = torch.stack(losses)
    slopes = (losses[::2] - losses[1::2]) / (2 * scale)
    if weight_decay != 0 and params:
        torch._foreach_mul_(params, 1 - lr * weight_decay)
    combine_noise_(params, slopes * (-lr / directions), seeds, **noise)
    return losses.mean()


def _check_above_0(name: str, value):
    check_number(name, value)
    if not value > 0:
        raise ValueError(f"{name} is {value}; it must be a number above 0")


def _scalar(name: str, value, params: Sequence[Tensor]) -> Tensor:
    """What a function returned, as an fp64 scalar on the parameters' device."""
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"{name} gave shape {list(value.shape)}; it must have one element")
    if not fits(value, NUMBER):
        raise TypeError(f"{name} gave a {type(value).__name__}; it must be {NUMBER}")
    device = params[0].device if params else "cpu"
    return torch.as_tensor(value, dtype=torch.float64, device=device).reshape(())
