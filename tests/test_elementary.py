"""csrc/math/elementary.h: accuracy, special values, and the same bits on every ISA level."""

import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from nightly import of_night

from kdkernels import _C

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["exp", "log", "exp2_nonpositive", "expm1_nonpositive", "log1p", "sinpi", "cospi"]
SOFTMAX = "exp,log,exp2_nonpositive"
REST = "expm1_nonpositive,log1p,sinpi,cospi"
INF, NAN = math.inf, math.nan
TINY = 2.0**-149  # the smallest subnormal
MAX = 3.4028234663852886e38


def documented_errors():
    """The numbers in the header's opening comment, so that comment and measurement cannot part."""
    text = (ROOT / "csrc/math/elementary.h").read_text()
    comment = text[: text.index("#pragma once")]
    return {name: float(ulp) for name, ulp in re.findall(r"(\w+) (\d+\.\d+) ulp", comment)}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """sweep(functions, stride, *flags), by elementary_ulp.cpp: {name: (largest error, hash)}."""
    compiler = os.environ.get("CXX", "g++").split()
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"needs a C++ compiler; {compiler[0]} is not on PATH")
    folder, built = tmp_path_factory.mktemp("ulp"), {}

    def run(functions, stride, *flags):
        if flags not in built:
            built[flags] = folder / f"ulp{len(built)}"
            command = [*compiler, "-O3", "-std=c++20", "-fopenmp", "-ffp-contract=off"]
            command += ["-fno-math-errno", "-fno-trapping-math", *flags, "-I", ROOT / "csrc"]
            command += [ROOT / "tests/elementary_ulp.cpp", "-o", built[flags]]
            subprocess.run(command, check=True)
        command = [built[flags], functions, str(stride)]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        lines = [line.split() for line in out.splitlines()]
        assert [line[0] for line in lines] == [n for n in NAMES if n in functions.split(",")]
        return {name: (float(error), bits) for name, error, _, bits in lines}

    return run


def best_flags():
    return ["-mavx2", "-mfma"] if "avx2" in _C.build_info()["isa_supported"] else []


def test_every_function_has_a_documented_error():
    assert set(documented_errors()) == set(NAMES)


def test_largest_errors(sweep):
    """At night exp and log over every fp32 value."""
    limit = documented_errors()
    for functions, stride in (("exp,log", of_night(1, 61)), (f"exp2_nonpositive,{REST}", 61)):
        for name, (error, _) in sweep(functions, stride, *best_flags()).items():
            assert error <= limit[name], name


def test_emulated_fma_gives_the_same_bits(sweep):
    if "avx2" not in _C.build_info()["isa_supported"]:
        pytest.skip("this machine has no FMA to compare with")
    functions = f"{SOFTMAX},{REST}"
    with_fma = sweep(functions, 997, "-mavx2", "-mfma")
    assert sweep(functions, 997, "-mno-fma") == with_fma


def arguments():
    """A spread over all bit patterns, and the neighbourhoods where branches meet."""
    spread = torch.arange(-(2**31), 2**31, 10007, dtype=torch.int64).to(torch.int32)
    near = [0.0, TINY, 2.0**-126, 0.5, 2 / 3, 1.0, 4 / 3, 2.0, 2.0**22, 2.0**23, 2.0**24, MAX]
    near += [-87.0, 88.0, -104.0, 89.0, -18.0, 87.33, 103.97]
    centres = torch.tensor(near + [-v for v in near]).view(torch.int32)
    around = (centres[:, None] + torch.arange(-40, 41, dtype=torch.int32)).reshape(-1)
    return torch.cat([spread, around]).view(torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_every_isa_level_gives_the_same_bits(name, set_isa, isa_levels):
    x = arguments()
    if name == "exp2_nonpositive":
        x = x[x <= 0]
    results = []
    for level in isa_levels:
        set_isa(level)
        # Short tensors too: a vectorised loop's remainder is other code.
        parts = [_C.elementary(name, x), *(_C.elementary(name, x[:n].clone()) for n in (1, 3, 21))]
        y = torch.cat(parts)
        results.append(torch.where(y.isnan(), NAN, y).view(torch.int32))
    for level, y in zip(isa_levels, results, strict=True):
        assert torch.equal(y, results[0]), level


SPECIAL = [
    ("exp", [0.0, -0.0, INF, -INF, 88.8, -104.0, TINY], [1, 1, INF, 0, INF, 0, 1]),
    ("exp2_nonpositive", [0.0, -0.0, -INF, -127.0, -MAX], [1, 1, 0, 0, 0]),
    ("expm1_nonpositive", [0.0, -0.0, -INF, -104.0, -TINY], [0, 0, -1, -1, -TINY]),
    ("log", [1.0, 0.0, -0.0, INF, -1.0, -INF, -TINY], [0, -INF, -INF, INF, NAN, NAN, NAN]),
    ("log1p", [0.0, -0.0, -1.0, INF, -1.5, TINY], [0, -0.0, -INF, INF, NAN, TINY]),
    ("sinpi", [0.0, -0.0, 1.0, 0.5, 1.5, -0.5, 2.0**25], [0, -0.0, 0, 1, -1, -1, 0]),
    ("cospi", [0.0, 0.5, 1.0, -1.0, 1.5, 2.0**25, 2.0**23 + 1], [1, 0, -1, -1, 0, 1, -1]),
    ("sinpi", [INF, -INF], [NAN, NAN]),
    ("cospi", [INF, -INF], [NAN, NAN]),
    *((name, [NAN], [NAN]) for name in NAMES),
]


@pytest.mark.parametrize(("name", "x", "want"), SPECIAL)
def test_special_values(name, x, want, set_isa, isa_levels):
    for level in isa_levels:
        set_isa(level)
        got = _C.elementary(name, torch.tensor(x)).tolist()
        for a, g, w in zip(x, got, want, strict=True):
            same = math.isnan(g) if math.isnan(w) else g == w
            assert same, f"{name}({a}) is {g}, not {w}, on {level}"
            if name == "log1p" and a == 0:
                assert math.copysign(1, g) == math.copysign(1, a)


def test_unknown_function():
    with pytest.raises(ValueError, match="tanh"):
        _C.elementary("tanh", torch.zeros(1))
