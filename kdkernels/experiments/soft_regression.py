"""Experiment 1: linear regression with Gaussian noise on its inputs, by three paths.

One parameter theta, 100 samples, a prediction ``theta * (x + eps)`` and 1,000 steps

    theta <- theta - lr * mean(2 (prediction - y) (x + eps)) - lr * lambda * theta

with a fresh eps ~ N(0, sigma^2) at every step: one for all samples (``per-step``) or one each
(``per-sample``). The three paths are a plain NumPy loop, a plain PyTorch loop, and
:func:`kdkernels.noisy_linear_regression`, where the whole loop is one kernel.
"""

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import kdkernels
from kdkernels import info
from kdkernels.experiments.settings import Regression
from kdkernels.measuring import take_turns

AGREEMENT = 1e-5
"""Largest difference in theta that the three paths may show when fed the same noise."""

STANDARD_ERRORS = 3.0
"""How many standard errors the mean theta may lie from the stationary value."""


def make_data() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The data, and where theta starts: ``x [100, 1]``, ``y [100, 1]``, ``theta [1, 1]``, fp64.

    ``RandomState(0)`` gives, in this order, x uniform in 0..1, the noise of
    y = 2x + 1 + 0.1 N(0, 1), and theta uniform in 0..1.
    """
    random = np.random.RandomState(0)
    x = random.rand(100, 1)
    y = 2 * x + 1 + 0.1 * random.randn(100, 1)
    return x, y, random.rand(1, 1)


def numpy_path(
    x: np.ndarray,
    y: np.ndarray,
    theta: np.ndarray,
    noise: Callable[[int], np.ndarray],
    *,
    steps: int,
    lr: float,
    lam: float,
) -> np.ndarray:
    """The plain NumPy loop over x, y ``[n, 1]`` and theta ``[1, R]``, one column a replica.

    ``noise(step)`` gives that step's eps, ``[1, R]`` per step or ``[n, R]`` per sample. Returns
    every theta, ``[steps + 1, R]``, the first one included.
    """
    path = [theta]
    for step in range(steps):
        moved = x + noise(step)
        prediction = theta * moved
        gradient = np.mean(2 * (prediction - y) * moved, axis=0, keepdims=True)
        theta = theta - lr * gradient - lr * lam * theta
        path.append(theta)
    return np.concatenate(np.broadcast_arrays(*path))


def torch_path(
    x: torch.Tensor,
    y: torch.Tensor,
    theta: torch.Tensor,
    noise: Callable[[int], torch.Tensor],
    *,
    steps: int,
    lr: float,
    lam: float,
) -> torch.Tensor:
    """The plain PyTorch loop; shapes and result as in :func:`numpy_path`."""
    path = [theta]
    for step in range(steps):
        moved = x + noise(step)
        prediction = theta * moved
        gradient = (2 * (prediction - y) * moved).mean(0, keepdim=True)
        theta = theta - lr * gradient - lr * lam * theta
        path.append(theta)
    return torch.cat(torch.broadcast_tensors(*path))


def stationary(
    x: np.ndarray, y: np.ndarray, *, lr: float, lam: float, sigma: float, noise: str
) -> tuple[float, float]:
    """Mean and standard deviation of theta over the noise, once the loop has settled.

    A step is affine in theta, ``theta' = A theta + B`` with

        A = 1 - lr lam - 2 lr mean((x + eps)^2)      B = 2 lr mean(y (x + eps))

    and its eps are independent of theta, so E theta' = E[A] E[theta] + E[B]. With
    E mean((x + eps)^2) = E[x^2] + sigma^2 and E mean(y (x + eps)) = E[xy], the fixed point is

        E theta = E[B] / (1 - E[A]) = E[xy] / (E[x^2] + sigma^2 + lam / 2):

    noise on the inputs acts as weight decay does (Bishop 1995, "Training with noise is
    equivalent to Tikhonov regularization"). For the spread, Var(A theta + B) = Var(theta) at the
    fixed point, with theta independent of A and B, gives

        Var theta = (Var A m^2 + 2 m Cov(A, B) + Var B) / (1 - E[A]^2 - Var A),    m = E theta.

    With q = E[x^2], p = E[xy], and u, v the variances of mean((x + eps)^2) and mean(y (x + eps)),
    c their covariance, Var A = 4 lr^2 u, Var B = 4 lr^2 v, Cov(A, B) = -4 lr^2 c, where

        one eps a step:    u = 4 E[x]^2 s + 2 s^2,       v = E[y]^2 s,      c = 2 E[x] E[y] s
        one eps a sample:  u = (4 q s + 2 s^2) / n,      v = E[y^2] s / n,  c = 2 p s / n

    and s = sigma^2. The mean over R seeds has the standard error sqrt(Var theta / R). The start
    is forgotten as E[A]^t: 1e-12 of it is left after 1,000 steps of the default setting.

    Args:
        x, y: ``[n, 1]``.
        lr, lam, sigma: as in the module's formula.
        noise: ``"per-step"`` or ``"per-sample"``.

    Returns:
        (mean, standard deviation); the latter is infinite where the variance diverges.
    """
    s, q, p, n = sigma**2, np.mean(x * x), np.mean(x * y), len(x)
    if noise == "per-step":
        u = 4 * x.mean() ** 2 * s + 2 * s * s
        v, c = y.mean() ** 2 * s, 2 * x.mean() * y.mean() * s
    else:
        u, v, c = (4 * q * s + 2 * s * s) / n, np.mean(y * y) * s / n, 2 * p * s / n
    mean = p / (q + s + lam / 2)
    shrink = 1 - lr * lam - 2 * lr * (q + s)
    left = 1 - shrink**2 - 4 * lr**2 * u
    variance = 4 * lr**2 * (u * mean**2 - 2 * mean * c + v) / left if left > 0 else np.inf
    return float(mean), float(np.sqrt(variance))


def _shared_noise(seed: int, shape: tuple, sigma: float) -> Callable[[int], torch.Tensor]:
    """The noise that the fused kernel makes for itself, as a column for the plain loops."""
    like = torch.empty(shape)
    return lambda step: (kdkernels.randn_like(like, seed=seed, step=step) * sigma).view(-1, 1)


def run(settings: Regression, on_step: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Run experiment 1: agreement of the paths, mean over many seeds, and times.

    The agreement feeds all three paths the noise of :func:`kdkernels.randn_like`. In the timings
    each path makes its noise as its user would: NumPy's ``standard_normal`` (fp64),
    ``torch.randn`` (fp32), and the kernel's own. "Per replica of R" divides the time of one run
    that carries R replicas at once: vectorised over replicas in NumPy and PyTorch, R seeds in
    one call of the kernel.

    Returns:
        A dictionary ready for JSON; ``plot`` has what the plots need.
    """
    paths = _Paths(settings)
    on_step("agreement of the three paths")
    difference, curves = paths.agreement()
    on_step(f"{settings.replicas:,} seeds")
    seeds = torch.arange(settings.seed, settings.seed + settings.replicas)
    many = paths.fused(seeds, trajectory=True).double().numpy()
    mean = paths.mean(many[-1])
    watch = info.Others()
    on_step("timing")
    times = paths.times(seeds)
    low, high = np.percentile(many, (5, 95), axis=1)
    away = abs(mean["standard_errors_away"])
    return {
        "settings": dataclasses.asdict(settings),
        "agreement": {"difference": difference, "seeds": 3},
        "mean": mean,
        "times": times,
        "others": watch.share(),
        "checks": [
            {
                "name": "the three paths agree in theta when fed the same noise",
                "value": difference,
                "limit": AGREEMENT,
                "passed": difference <= AGREEMENT,
            },
            {
                "name": "mean theta is the stationary value, in standard errors",
                "value": away,
                "limit": STANDARD_ERRORS,
                "passed": away <= STANDARD_ERRORS,
            },
        ],
        "plot": {
            "paths": curves,
            "mean": many.mean(1).tolist(),
            "low": low.tolist(),
            "high": high.tolist(),
            "final": many[-1].tolist(),
        },
    }


class _Paths:
    """The three paths of one setting."""

    def __init__(self, settings: Regression):
        self.settings = settings
        self.loop = {"steps": settings.steps, "lr": settings.lr, "lam": settings.lam}
        self.x, self.y, self.theta = make_data()
        self.x32, self.y32, self.theta32 = (
            torch.from_numpy(v).float() for v in (self.x, self.y, self.theta)
        )
        self.rows = 1 if settings.noise == "per-step" else len(self.x)
        self.generator = np.random.default_rng(settings.seed)
        self.random = torch.Generator().manual_seed(settings.seed)

    def fused(self, seeds, trajectory: bool = False) -> torch.Tensor:
        return kdkernels.noisy_linear_regression(
            self.x32,
            self.y32,
            float(self.theta[0, 0]),
            **self.loop,
            sigma=self.settings.sigma,
            seed=seeds,
            noise=self.settings.noise,
            trajectory=trajectory,
        )

    def run_numpy(self, count: int) -> np.ndarray:
        def noise(_):
            return self.settings.sigma * self.generator.standard_normal((self.rows, count))

        return numpy_path(self.x, self.y, self.theta, noise, **self.loop)

    def run_torch(self, count: int) -> torch.Tensor:
        def noise(_):
            return self.settings.sigma * torch.randn((self.rows, count), generator=self.random)

        return torch_path(self.x32, self.y32, self.theta32, noise, **self.loop)

    def agreement(self) -> tuple[float, dict[str, list[float]]]:
        """The largest difference in theta over three seeds, and the first one's paths."""
        size = () if self.settings.noise == "per-step" else (self.rows,)
        difference, paths = 0.0, {}
        for number in range(3):
            seed = self.settings.seed + number
            shared = _shared_noise(seed, size, self.settings.sigma)
            as_numpy = numpy_path(
                self.x, self.y, self.theta, lambda t, eps=shared: eps(t).numpy(), **self.loop
            )
            found = {
                "numpy": as_numpy[:, 0],
                "torch": torch_path(self.x32, self.y32, self.theta32, shared, **self.loop)[
                    :, 0
                ].numpy(),
                "fused": self.fused(seed, trajectory=True).numpy(),
            }
            for a, b in (("numpy", "torch"), ("numpy", "fused"), ("torch", "fused")):
                difference = max(difference, float(np.abs(found[a] - found[b]).max()))
            paths = paths or {name: values.tolist() for name, values in found.items()}
        return difference, paths

    def mean(self, final: np.ndarray) -> dict[str, float]:
        """Theta's mean and spread over replicas beside what the formula says."""
        s = self.settings
        expected, spread = stationary(
            self.x, self.y, lr=s.lr, lam=s.lam, sigma=s.sigma, noise=s.noise
        )
        error = float(final.std(ddof=1) / np.sqrt(s.replicas))
        return {
            "theta": float(final.mean()),
            "standard_error": error,
            "stationary": expected,
            "standard_errors_away": float((final.mean() - expected) / error),
            "spread": float(final.std(ddof=1)),
            "spread_expected": spread,
        }

    def times(self, seeds: torch.Tensor) -> list[dict]:
        """Seconds a replica of each path, for one replica and for all at once."""
        replicas = self.settings.replicas
        runs: dict[tuple[str, int], Callable] = {
            ("numpy", 1): lambda: self.run_numpy(1),
            ("torch", 1): lambda: self.run_torch(1),
            ("fused", 1): lambda: self.fused(self.settings.seed),
            ("numpy", replicas): lambda: self.run_numpy(replicas),
            ("torch", replicas): lambda: self.run_torch(replicas),
            ("fused", replicas): lambda: self.fused(seeds),
        }
        rounds = take_turns(runs, 0, least=self.settings.repeats)
        times = []
        for (name, count), values in rounds.items():
            ratios = [a / b for a, b in zip(values, rounds["fused", count], strict=True)]
            times.append(
                {
                    "path": name,
                    "replicas": count,
                    "seconds_per_replica": statistics.median(values) / count,
                    "fused_is_faster": statistics.median(ratios),
                    "least": min(ratios),
                    "most": max(ratios),
                }
            )
        return times
