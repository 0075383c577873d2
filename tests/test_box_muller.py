"""The form of Box and Muller's transform that kernels take gives the bits of the plain one."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from kdkernels import _C

ROOT = Path(__file__).resolve().parent.parent


def test_both_forms_over_every_word(tmp_path):
    compiler = os.environ.get("CXX", "g++").split()
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"needs a C++ compiler; {compiler[0]} is not on PATH")
    if "avx2" not in _C.build_info()["isa_supported"]:
        pytest.skip("takes minutes without FMA instructions")
    program = tmp_path / "box_muller"
    command = [*compiler, "-O3", "-std=c++20", "-fopenmp", "-ffp-contract=off", "-mavx2", "-mfma"]
    command += ["-fno-math-errno", "-fno-trapping-math", "-I", ROOT / "csrc"]
    subprocess.run([*command, ROOT / "tests/box_muller.cpp", "-o", program], check=True)
    out = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    tried_a, different_a, tried_b, different_b = map(int, out.split())
    # Exact up to 2^24, then 2^23 floats in each of 8 binades, then 2^32.
    assert tried_a == tried_b == 2**24 + 8 * 2**23 + 1
    assert different_a == 0
    assert different_b == 0
