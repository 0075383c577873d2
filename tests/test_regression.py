"""noisy_linear_regression against the reference, and its mean against what theory says."""

import math

import numpy as np
import pytest
import torch

from kdkernels import noisy_linear_regression, reference

pytestmark = pytest.mark.quick

MODES = ["per-step", "per-sample"]


def samples(n=100, dtype=torch.float64):
    """The first experiment's data: X = rand, y = 2X + 1 + 0.1 randn."""
    random = np.random.RandomState(0)  # noqa: NPY002
    x = random.rand(n, 1)
    y = 2 * x + 1 + 0.1 * random.randn(n, 1)
    return torch.from_numpy(x).to(dtype), torch.from_numpy(y).to(dtype)


def replicas(n, seed=0):
    g = torch.Generator().manual_seed(seed)

    def uniform():
        return torch.rand(n, generator=g, dtype=torch.float64)

    return {
        "theta": uniform(),
        "lr": 0.02 * uniform(),
        "lam": 0.1 * uniform(),
        "sigma": 2 * uniform(),
        "seed": torch.randint(-(2**63), 2**63 - 1, (n,), generator=g),
    }


def both(x, y, **arguments):
    return (
        f(x, y, **arguments) for f in (noisy_linear_regression, reference.noisy_linear_regression)
    )


@pytest.mark.parametrize("noise", MODES)
@pytest.mark.parametrize("n", [1, 2, 5, 100, 1030])
@pytest.mark.parametrize("seed", [0, -1, 2**64 - 1])
def test_one_replica(noise, n, seed):
    x, y = samples(n)
    got, want = both(x, y, theta=0.3, steps=150, seed=seed, noise=noise, stream=3)
    assert got.shape == () and got.dtype == torch.float64
    # Noise agrees to a few ulps of fp32.
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("noise", MODES)
@pytest.mark.parametrize("count", [1, 3, 4, 64, 65, 131])
def test_replicas_with_their_own_numbers(noise, count):
    x, y = samples(20)
    got, want = both(x, y, steps=70, noise=noise, trajectory=True, **replicas(count))
    assert got.shape == (71, count)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("noise", MODES)
def test_a_replica_is_the_same_bits_alone_and_in_company(noise, set_threads):
    x, y = samples(20)
    numbers = replicas(200)
    together = noisy_linear_regression(x, y, steps=100, noise=noise, **numbers)
    for k in (0, 63, 64, 130, 199):
        alone = {name: v[k] for name, v in numbers.items()}
        assert torch.equal(
            noisy_linear_regression(x, y, steps=100, noise=noise, **alone), together[k]
        )
    for threads in (1, 2, 3):
        set_threads(threads)
        assert torch.equal(
            noisy_linear_regression(x, y, steps=100, noise=noise, **numbers), together
        )


@pytest.mark.parametrize("noise", MODES)
def test_every_isa_level_agrees(noise, set_isa, isa_levels):
    x, y = samples()
    results = []
    for level in isa_levels:
        set_isa(level)
        results.append(noisy_linear_regression(x, y, steps=300, noise=noise, **replicas(70)))
    for level, result in zip(isa_levels, results, strict=True):
        torch.testing.assert_close(result, results[0], rtol=1e-12, atol=0, msg=level)


@pytest.mark.parametrize("noise", MODES)
@pytest.mark.parametrize("count", [None, 6])
def test_trajectory(noise, count):
    x, y = samples()
    theta = 0.5 if count is None else torch.linspace(0, 1, count)
    arguments = {"theta": theta, "steps": 40, "seed": 1, "noise": noise}
    path = noisy_linear_regression(x, y, trajectory=True, **arguments)
    assert path.shape == (41,) if count is None else (41, count)
    torch.testing.assert_close(path[0], torch.as_tensor(theta, dtype=path.dtype))
    assert torch.equal(path[-1], noisy_linear_regression(x, y, **arguments))
    # A run goes on where a shorter one stopped.
    shorter = noisy_linear_regression(x, y, **{**arguments, "steps": 17})
    assert torch.equal(path[17], shorter)


def test_no_steps():
    x, y = samples()
    assert noisy_linear_regression(x, y, 0.25, steps=0, seed=0) == 0.25
    path = noisy_linear_regression(x, y, 0.25, steps=0, seed=0, trajectory=True)
    assert path.tolist() == [0.25]


def test_no_noise_is_ridge_regression():
    x, y = samples()
    for noise in MODES:
        theta = noisy_linear_regression(
            x, y, 0.0, steps=20000, sigma=0.0, lam=0.2, seed=0, noise=noise
        )
        want = (x * y).mean() / ((x * x).mean() + 0.1)
        torch.testing.assert_close(theta, want, rtol=1e-10, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_result_has_the_dtype_of_x(dtype):
    x, y = samples(dtype=dtype)
    arguments = {"theta": 0.5, "steps": 100, "seed": 4}
    got = noisy_linear_regression(x, y, **arguments)
    assert got.dtype == dtype
    want = noisy_linear_regression(x.double(), y.double(), **arguments)
    assert got == want.to(dtype)  # computed in fp64 all the same


def test_shapes():
    x, y = samples()
    want = noisy_linear_regression(x, y, 0.5, steps=10, seed=1)
    assert torch.equal(noisy_linear_regression(x[:, 0], y, 0.5, steps=10, seed=1), want)
    wide = torch.cat([x, y], 1)
    assert torch.equal(noisy_linear_regression(wide[:, 0], wide[:, 1], 0.5, steps=10, seed=1), want)
    assert torch.equal(
        noisy_linear_regression(x, y, torch.tensor([0.5]), steps=10, seed=1), want[None]
    )
    seeds = torch.arange(3)
    many = noisy_linear_regression(x, y, 0.5, steps=10, seed=seeds)
    assert many.shape == (3,) and torch.equal(many[1], want)


def test_no_gradient_flows():
    x, y = samples()
    theta = torch.tensor([0.5], requires_grad=True)
    out = noisy_linear_regression(x.requires_grad_(), y, theta, steps=3, seed=0)
    assert not out.requires_grad


@pytest.mark.parametrize("noise", MODES)
@pytest.mark.parametrize(("lr", "lam", "sigma"), [(0.01, 0.01, 1.0), (0.02, 0.5, 0.5)])
def test_mean_of_theta_over_seeds(noise, lr, lam, sigma):
    """Noise is independent of theta, so theta's mean is a linear recursion with one fixed point."""
    x, y = samples()
    theta = noisy_linear_regression(
        x, y, 0.5, steps=1500, lr=lr, lam=lam, sigma=sigma, seed=torch.arange(4096), noise=noise
    )
    want = (x * y).mean() / ((x * x).mean() + sigma**2 + lam / 2)
    standard_error = theta.std() / math.sqrt(4096)
    assert abs(theta.mean() - want) < 5 * standard_error
    assert standard_error < 0.01 * want  # so that the line above says something


X, Y = samples(4)
GOOD = {"x": X, "y": Y, "theta": 0.5, "steps": 1, "seed": 0}
BAD = [
    ("x", TypeError, {"x": X.int()}),
    ("x", ValueError, {"x": torch.zeros(4, 2)}),
    ("x", ValueError, {"x": torch.zeros(())}),
    ("x", ValueError, {"x": X[:0], "y": Y[:0]}),
    ("x", TypeError, {"x": [1.0, 2.0]}),
    ("y", TypeError, {"y": Y.int()}),
    ("y", ValueError, {"y": Y[:3]}),
    ("y", ValueError, {"y": torch.zeros(4, 2)}),
    ("y", ValueError, {"y": Y.to("meta")}),
    ("theta", ValueError, {"theta": torch.zeros(2, 2)}),
    ("theta", TypeError, {"theta": "a"}),
    ("lr", ValueError, {"lr": torch.zeros(2, 1)}),
    ("lam", ValueError, {"lam": torch.zeros(2, 1)}),
    ("sigma", ValueError, {"sigma": torch.zeros(2, 1)}),
    ("seed", ValueError, {"seed": torch.zeros(2, 1, dtype=torch.int64)}),
    ("seed", ValueError, {"seed": 2**64}),
    ("seed", TypeError, {"seed": torch.tensor([1.5])}),
    ("seed", TypeError, {"seed": 1.5}),
    ("lr", ValueError, {"lr": torch.zeros(3), "theta": torch.zeros(2)}),
    ("steps", ValueError, {"steps": -1}),
    ("steps", ValueError, {"steps": 2**32}),
    ("steps", TypeError, {"steps": 1.5}),
    ("stream", ValueError, {"stream": -1}),
    ("stream", ValueError, {"stream": 2**32}),
    ("noise", ValueError, {"noise": "none"}),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_argument_is_named(case):
    name, error, change = BAD[case]
    with pytest.raises(error, match=rf"\b{name}\b"):
        noisy_linear_regression(**{**GOOD, **change})


@pytest.mark.gpu
@pytest.mark.parametrize("noise", MODES)
@pytest.mark.parametrize("count", [1, 100, 4097])
def test_cuda_agrees_with_the_cpu(noise, count):
    x, y = samples()
    arguments = {"steps": 50, "noise": noise, "trajectory": True, **replicas(count)}
    want = noisy_linear_regression(x, y, **arguments)
    arguments = {k: v.cuda() if torch.is_tensor(v) else v for k, v in arguments.items()}
    got = noisy_linear_regression(x.cuda(), y.cuda(), **arguments)
    torch.testing.assert_close(got.cpu(), want, rtol=1e-12, atol=1e-14)
