"""csrc/math/distribution.h: accuracy of each number of a word, symmetry, bounds, variance."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch

from kdkernels import _C

HEADER = Path(__file__).resolve().parent.parent / "csrc/math/distribution.h"
# Every 512th word, evenly, and the ends of both signs.
EDGE = np.arange(4096, dtype=np.uint32)
WORDS = np.concatenate(
    [
        (np.arange(2**23, dtype=np.uint64) * 512 + 77).astype(np.uint32),
        *(edge + EDGE for edge in (np.uint32(0), np.uint32(2**31), np.uint32(2**30))),
        *(edge - EDGE for edge in (np.uint32(2**32 - 1), np.uint32(2**31 - 1))),
    ]
)
TRUNCATED = scipy.stats.truncnorm(-2, 2)


def odd(r):
    return (r | 1).view(np.int32) / 2.0**31


def laplace(r):
    u = ((r & 0x7FFFFFFF).astype(np.float64) + 0.5) / 2**31
    return np.where(r >> 31, -1, 1) * -np.log(u) * math.sqrt(0.5)


# {name: (the number of a word in fp64, its bound)}
EXACT = {
    "uniform": (lambda r: math.sqrt(3) * odd(r), math.sqrt(3)),
    "rademacher": (lambda r: np.where(r >> 31, -1.0, 1.0), 1),
    "truncated_normal": (
        lambda r: scipy.special.erfinv(math.erf(2**0.5) * odd(r)) * 2**0.5 / TRUNCATED.std(),
        2 / TRUNCATED.std(),
    ),
    "laplace": (laplace, 32 * math.log(2) * math.sqrt(0.5)),
}


def numbers(name, words):
    return _C.elementary(name, torch.from_numpy(words.view(np.float32))).numpy()


def documented_errors():
    """The numbers in the header's opening comment, so that comment and measurement cannot part."""
    comment = HEADER.read_text().split("#pragma once")[0].lower()
    return {
        name.strip().replace(" ", "_"): float(ulp)
        for name, ulp in re.findall(r"//   (\w+(?: \w+)?)  .* (\d+\.\d+) ulp", comment)
    }


@pytest.mark.parametrize("name", EXACT)
def test_number_of_a_word(name, set_isa, isa_levels):
    exact, bound = EXACT[name]
    want = exact(WORDS)
    results = []
    for level in isa_levels:
        set_isa(level)
        results.append(numbers(name, WORDS))
        assert results[-1].tobytes() == results[0].tobytes(), level
    got = results[0].astype(np.float64)
    error = np.abs(got - want) / np.spacing(np.maximum(np.abs(want), 1).astype(np.float32))
    assert error.max() <= documented_errors()[name]
    assert np.abs(got).max() <= bound * (1 + 1e-7)


@pytest.mark.parametrize("name", EXACT)
def test_signs_are_symmetric(name):
    """To each word belongs another with the number's negative, so the mean is exactly 0."""
    by_sign = name in ("laplace", "rademacher")
    opposite = WORDS ^ np.uint32(2**31) if by_sign else np.uint32(0) - (WORDS | np.uint32(1))
    a, b = numbers(name, WORDS), numbers(name, opposite)
    assert np.array_equal(a, -b) and (np.signbit(a) != np.signbit(b)).all()


@pytest.mark.parametrize("name", EXACT)
def test_variance_is_one(name):
    """Over evenly spread words, which is numeric integration over u."""
    even = WORDS[: 2**23]
    assert abs(np.mean(numbers(name, even).astype(np.float64) ** 2) - 1) < 2e-5
