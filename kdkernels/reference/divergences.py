"""The divergences D(p, q) of a teacher p and a student q, from the logarithms of both."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kdkernels import _C
from kdkernels.reference.arguments import check_range


class Divergence(NamedTuple):
    """What is known about one divergence D(p, q) of a teacher p and a student q."""

    formula: str
    source: str
    parameters: dict[str, float]  # name -> default


DIVERGENCES = {name: Divergence(*entry) for name, *entry in _C.divergences()}
TOP_K_DIVERGENCES = ("forward_kl", "reverse_kl", "js")


def divergence_parameters(
    divergence: str,
    divergence_alpha: float | Tensor | None = None,
    beta: float | Tensor | None = None,
) -> dict[str, float | Tensor]:
    """A divergence's parameters, the defaults where None is given; checked."""
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence is {divergence!r}; it takes one of {', '.join(DIVERGENCES)}")
    parameters: dict[str, float | Tensor] = dict(DIVERGENCES[divergence].parameters)
    largest = math.inf if "divergence_alpha" in parameters else 1
    for name, value in (("divergence_alpha", divergence_alpha), ("beta", beta)):
        if value is None:
            continue
        if name not in parameters:
            raise ValueError(f"{name} is {value}, but {divergence} takes none")
        what = "a number in [0, 1]" if largest == 1 else "a finite number of at least 0"
        check_range(name, value, what, 0, largest)
        parameters[name] = value if isinstance(value, Tensor) else float(value)
    numbers = [x for x in parameters.values() if not isinstance(x, Tensor)]
    if divergence == "alpha_beta" and len(numbers) == 2 and not any(numbers):
        raise ValueError("divergence_alpha and beta are 0; alpha_beta takes at most one that is 0")
    return parameters


# Below, log_p and log_q may hold -inf. What torch.where does not choose is finite, and so are its
# derivatives: infinity times the 0 that flows into it would be NaN.


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Sum of a (log a - log b) over the last dimension; a class with a = 0 adds nothing."""
    a = log_a.exp()
    some = a != 0
    return (a * (torch.where(some, log_a, 0.0) - torch.where(some, log_b, 0.0))).sum(-1)


def _log_mixture(log_a: Tensor, log_b: Tensor, of_a: float | Tensor) -> Tensor:
    """log(of_a a + (1 - of_a) b); of_a may be a tensor of a number per row, in (0, 1)."""
    if isinstance(of_a, Tensor):
        shares = of_a.log()[:, None], (-of_a).log1p()[:, None]
        return finite_logsumexp(torch.stack((log_a + shares[0], log_b + shares[1])), 0)
    if of_a in (0, 1):
        return log_a if of_a else log_b
    return finite_logsumexp(torch.stack((log_a + math.log(of_a), log_b + math.log1p(-of_a))), 0)


def finite_logsumexp(x: Tensor, dim: int) -> Tensor:
    """torch.logsumexp, with gradient 0 where all are -inf."""
    none = (x == -math.inf).all(dim, keepdim=True)
    return torch.where(none.squeeze(dim), -math.inf, torch.where(none, 0.0, x).logsumexp(dim))


def _js(log_p, log_q, beta):
    if not isinstance(beta, Tensor) and beta in (0, 1):
        return kl(log_q, log_p) if beta else kl(log_p, log_q)
    log_m = _log_mixture(log_p, log_q, beta)
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def _alpha_beta(log_p, log_q, a, b):
    if isinstance(a, Tensor):
        of_p, of_q = ((a + b)[:, None] * log_p).exp(), ((a + b)[:, None] * log_q).exp()
        product = (a[:, None] * log_p + b[:, None] * log_q).exp()
        terms = (a / (a + b))[:, None] * of_p + (b / (a + b))[:, None] * of_q - product
        return terms.sum(-1) / (a * b)
    if b == 0:
        return (kl(a * log_p, a * log_q) + ((a * log_q).exp() - (a * log_p).exp()).sum(-1)) / a**2
    if a == 0:
        return _alpha_beta(log_q, log_p, b, 0)
    both = a + b
    of_p, of_q = (both * log_p).exp(), (both * log_q).exp()
    product = (a * log_p + b * log_q).exp()
    return (a / both * of_p + b / both * of_q - product).sum(-1) / (a * b)


def _decoupled(log_p, log_q, labels, of_target, of_others):
    """Sides that leave nothing beside the label: the teacher's gives a second term of 0."""
    here = F.one_hot(labels, log_p.shape[-1]).bool()
    binary, others = [], []
    for log_side in (log_p, log_q):
        beside = torch.where(here, -math.inf, log_side)
        log_rest = finite_logsumexp(beside, -1)
        log_label = log_side.gather(-1, labels[:, None]).squeeze(-1)
        binary.append(torch.stack((log_label, log_rest), -1))
        others.append(beside - torch.where(log_rest == -math.inf, 0.0, log_rest)[:, None])
    if not isinstance(of_others, Tensor) and of_others == 0:
        return of_target * kl(*binary)
    return of_target * kl(*binary) + of_others * kl(*others)


def divergence_of(name, log_p, log_q, parameters, labels=None):
    """D of each row, from the logarithms of both distributions."""
    if any(isinstance(x, Tensor) for x in parameters.values()) and name != "decoupled":
        return _divergence_by_row(name, log_p, log_q, parameters)
    a, b = parameters.get("divergence_alpha"), parameters.get("beta")
    if name == "forward_kl":
        return kl(log_p, log_q)
    if name == "reverse_kl":
        return kl(log_q, log_p)
    if name == "js":
        return _js(log_p, log_q, b)
    if name == "skew_forward_kl":
        return kl(log_p, _log_mixture(log_p, log_q, b))
    if name == "skew_reverse_kl":
        return kl(log_q, _log_mixture(log_q, log_p, b))
    if name == "total_variation":
        return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2
    if name == "alpha_beta":
        return _alpha_beta(log_p, log_q, a, b)
    return _decoupled(log_p, log_q, labels, a, b)


def _divergence_by_row(name, log_p, log_q, parameters):
    """With parameters that are a number per row: the formula inside their range, and each limit of
    the range where a row's parameter is one. Both are finite where they are not chosen.
    """
    ones = torch.ones_like(log_p[:, 0])
    parameters = {name: x * ones for name, x in parameters.items()}
    inside = {name: torch.where(x > 0, x, 0.5) for name, x in parameters.items()}
    if name != "alpha_beta":
        inside["beta"] = torch.where(parameters["beta"] < 1, inside["beta"], 0.5)
    formulas = {
        "js": _js,
        "skew_forward_kl": lambda p, q, beta: kl(p, _log_mixture(p, q, beta)),
        "skew_reverse_kl": lambda p, q, beta: kl(q, _log_mixture(q, p, beta)),
        "alpha_beta": _alpha_beta,
    }
    out = formulas[name](log_p, log_q, *inside.values())
    if name != "alpha_beta":
        for limit in (0.0, 1.0):
            at_limit = divergence_of(name, log_p, log_q, {"beta": limit})
            out = torch.where(parameters["beta"] == limit, at_limit, out)
        return out
    a, b = parameters.values()
    for x, sides, other in ((b, (log_p, log_q), a), (a, (log_q, log_p), b)):
        power = torch.where(x == 0, other, 1.0)[:, None]
        log_a, log_b = (power * side for side in sides)
        at_limit = (kl(log_a, log_b) + (log_b.exp() - log_a.exp()).sum(-1)) / power[:, 0] ** 2
        out = torch.where(x == 0, at_limit, out)
    return out
