"""Whether the noise is distributed as it says, with fixed seeds and stated significance.

Philox4x32-10 passes TestU01's BigCrush (Salmon et al., SC 2011, section 5); what these tests look
at is what is made of its words, and how addresses that lie close together relate. It is not a
cryptographic generator: whoever knows some of its numbers may find the key, so noise from here
makes no claim of privacy.

SIGNIFICANCE is the chance at which a true generator would fail one check; checks that look at many
numbers at once share it (Bonferroni). Seeds are fixed, so a check that passes always passes.
"""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from scipy.integrate import quad

from kdkernels import randn_like

SIGNIFICANCE = 1e-3
MANY = 2 * 10**7
CHUNK = 4 * 10**6
DISTRIBUTIONS = {
    "normal": scipy.stats.norm(),
    "uniform": scipy.stats.uniform(-math.sqrt(3), 2 * math.sqrt(3)),
    "truncated_normal": scipy.stats.truncnorm(-2, 2, scale=1 / scipy.stats.truncnorm(-2, 2).std()),
    "laplace": scipy.stats.laplace(scale=math.sqrt(0.5)),
}


def draw(n, **noise):
    return randn_like(torch.empty(n), **noise)


def limit(checks=1):
    """Standard normal deviates that `checks` two-sided checks may reach together."""
    return scipy.stats.norm.isf(SIGNIFICANCE / checks / 2)


# ---- one distribution ----------------------------------------------------------------------------


def check_moments(x, law, highest=6):
    """Means of x^k against the law's moments, in their standard errors."""
    powers = np.zeros(highest)
    for part in np.array_split(x, max(1, len(x) // CHUNK)):
        part = part.astype(np.float64)
        power = part.copy()
        for k in range(highest):
            powers[k] += power.sum()
            power *= part
    end = min(law.support()[1], 60)
    half = [quad(lambda v, k=k: v**k * law.pdf(v), 0, end)[0] for k in range(1, 2 * highest + 1)]
    true = [2 * moment if k % 2 else 0.0 for k, moment in enumerate(half)]  # all are symmetric
    for k in range(1, highest + 1):
        error = math.sqrt((true[2 * k - 1] - true[k - 1] ** 2) / len(x))
        deviate = (powers[k - 1] / len(x) - true[k - 1]) / error
        assert abs(deviate) < limit(highest), (k, deviate)


def kolmogorov_smirnov_and_anderson_darling(x, log_cdf):
    """D sqrt(n) and A^2 of x against the law whose logarithms of F and 1 - F log_cdf gives."""
    x = np.sort(x)
    n, distance, total = len(x), 0.0, 0.0
    for begin in range(0, n, CHUNK):
        low, high = (
            v.double().numpy() for v in log_cdf(torch.from_numpy(x[begin : begin + CHUNK]))
        )
        rank = np.arange(begin, begin + len(low), dtype=np.float64)
        f = np.exp(low)
        distance = max(distance, np.max((rank + 1) / n - f), np.max(f - rank / n))
        # A^2 = -n - sum; n is taken off term by term, so that its rounding is not what is left.
        total += np.sum(1 + (2 * rank + 1) / n * low + (2 * (n - rank) - 1) / n * high)
    return distance * math.sqrt(n), -total


def check_fit(x, log_cdf):
    ks, ad = kolmogorov_smirnov_and_anderson_darling(x, log_cdf)
    assert scipy.stats.kstwobign.sf(ks) > SIGNIFICANCE, ks
    # Of the fully specified case: 0.001 of true samples lie beyond 6.000 (Marsaglia and Marsaglia,
    # "Evaluating the Anderson-Darling distribution", 2004).
    assert ad < 6.0, ad


def normal_log_cdf(x):
    x = x.double()
    return torch.special.log_ndtr(x), torch.special.log_ndtr(-x)


@pytest.mark.parametrize("address", [{"seed": 0}, {"seed": -7, "step": 12345, "stream": 77}])
def test_normals(address):
    x = draw(MANY, **address).numpy()
    check_moments(x, DISTRIBUTIONS["normal"])
    check_fit(x, normal_log_cdf)


@pytest.mark.parametrize("name", ["uniform", "truncated_normal", "laplace"])
def test_other_distributions(name):
    law = DISTRIBUTIONS[name]
    x = draw(CHUNK, seed=1, distribution=name).numpy()
    check_moments(x, law)
    # An end of the range that fp32 rounds to lies on or just beyond the law's.
    low, high = law.support()
    inside = np.clip(x.astype(np.float64), np.nextafter(low, 0), np.nextafter(high, 0))

    def log_cdf(sorted_x):
        v = np.clip(sorted_x.double().numpy(), np.nextafter(low, 0), np.nextafter(high, 0))
        return torch.from_numpy(law.logcdf(v)), torch.from_numpy(law.logsf(v))

    assert np.abs(inside - x).max() < 1e-6
    check_fit(x, log_cdf)


def test_rademacher():
    x = draw(CHUNK, seed=1, distribution="rademacher").double()
    assert set(x.unique().tolist()) == {-1.0, 1.0}
    assert abs(x.sum()) < limit() * math.sqrt(CHUNK)
    # Runs of equal signs: one more than the changes, which are binomial.
    changes = (x[1:] != x[:-1]).sum().item()
    assert abs(changes - (CHUNK - 1) / 2) < limit() * math.sqrt(CHUNK / 4)


# ---- the tails -----------------------------------------------------------------------------------


def test_tails_by_count():
    """Beyond 4, 5 and 5.5 standard deviations, of 3 * 10^8 numbers: Poisson counts."""
    bounds = (4.0, 5.0, 5.5)
    n, part = 3 * 10**8, 5 * 10**7
    x = torch.empty(part)
    found = np.zeros(len(bounds))
    for offset in range(0, n, part):
        y = randn_like(x, seed=2, offset=offset).abs_()
        far = y[y > bounds[0]]
        found += [(far > bound).sum().item() for bound in bounds]
    for bound, count in zip(bounds, found, strict=True):
        expected = 2 * scipy.stats.norm.sf(bound) * n
        low, high = scipy.stats.poisson.interval(1 - SIGNIFICANCE / len(bounds), expected)
        assert low <= count <= high, (bound, count, expected)


def test_tails_by_word():
    """Over all 2^32 words: with u = (r + 1/2) / 2^32 the radius is sqrt(-2 log u), and of a radius
    R beyond t the share 2 acos(t / R) / pi of angles leaves the component beyond t."""
    for t, most in ((4.0, 1e-4), (5.0, 1e-3), (6.0, 0.02)):
        words = math.ceil(2**32 * math.exp(-t * t / 2))
        radius = np.sqrt(-2 * np.log((np.arange(words) + 0.5) / 2**32))
        share = np.arccos(np.minimum(t / radius, 1)).sum() * 2 / math.pi / 2**32
        true = 2 * scipy.stats.norm.sf(t)
        assert abs(share / true - 1) < most, (t, share, true)


# ---- independence --------------------------------------------------------------------------------

LENGTH = 2**20


def families():
    """Addresses that differ in one thing by a little, and addresses at a distance."""
    seeds = [0, 1, 2, 3, 4, 7, 8, 2**31, 2**32, 2**32 + 1, 2**63, -1, -2, -(2**32)]
    numbers = [0, 1, 2, 3, 4, 5, 8, 16, 255, 256, 2**16, 2**31, 2**32 - 2, 2**32 - 1]
    yield "seeds", [{"seed": s} for s in seeds]
    yield "streams", [{"seed": 1, "stream": s} for s in numbers]
    yield "steps", [{"seed": 1, "step": s} for s in numbers]
    offsets = [k * 2**22 for k in range(8)] + [2**34 - 2**22, 2**34, 2**62]
    yield "offsets", [{"seed": 1, "offset": o} for o in offsets]
    # What exchanging two words of the counter, or one of them with the key, would leave equal.
    mixed = [{"seed": 5, "stream": 6, "step": 7}, {"seed": 5, "stream": 7, "step": 6}]
    mixed += [{"seed": 6, "stream": 5, "step": 7}, {"seed": 7, "stream": 6, "step": 5}]
    yield "exchanged", mixed + [{"seed": 6 * 2**32 + 5, "stream": 0, "step": 7}]


TRANSFORMS = (torch.clone, torch.square, torch.abs, torch.sign)


def check_uncorrelated(series):
    """Pearson's r of every pair of rows, as they are and transformed."""
    n = series.shape[1]
    pairs = np.triu_indices(len(series), 1)
    for transform in TRANSFORMS:
        r = torch.corrcoef(transform(series)).numpy()[pairs]
        worst = np.abs(r).max() * math.sqrt(n)
        assert worst < limit(len(r) * len(TRANSFORMS)), (transform.__name__, worst)


@pytest.mark.parametrize("family", list(families()), ids=lambda f: f[0])
def test_addresses_are_uncorrelated(family):
    check_uncorrelated(torch.stack([draw(LENGTH, **address) for address in family[1]]).double())


def test_places_within_counters_are_uncorrelated():
    """A counter's four numbers, and those of the next three counters."""
    x = draw(16 * LENGTH, seed=3).double()
    check_uncorrelated(x.view(LENGTH, 16).t())


def test_lags_are_uncorrelated():
    """Up to 64, then powers of two: rows of matrices, warps, chunks."""
    x = draw(4 * LENGTH, seed=5).double()
    lags = [*range(1, 65), *(2**k for k in range(7, 21))]
    for transform in TRANSFORMS[:2]:
        y = transform(x)
        y = (y - y.mean()) / y.std()
        for lag in lags:
            r = (y[:-lag] * y[lag:]).mean().item()
            assert abs(r) * math.sqrt(len(y) - lag) < limit(2 * len(lags)), (lag, r)


@pytest.mark.parametrize(
    "neighbour", [{"seed": 1}, {"stream": 1}, {"step": 1}, {"offset": 1}], ids=str
)
def test_neighbours_fill_the_square_evenly(neighbour):
    """Chi-squared over 64 x 64 equally likely cells of (F(x), F(y)), beyond what r can see."""
    base = {"seed": 0, "stream": 0, "step": 0, "offset": 0}
    n = 4 * LENGTH
    x, y = (torch.special.ndtr(draw(n, **a)) for a in (base, base | neighbour))
    cell = (x * 64).long().clamp_(max=63) * 64 + (y * 64).long().clamp_(max=63)
    counts = torch.bincount(cell, minlength=64 * 64).numpy()
    p = scipy.stats.chisquare(counts).pvalue
    assert SIGNIFICANCE / 2 < p < 1 - SIGNIFICANCE / 2, p
