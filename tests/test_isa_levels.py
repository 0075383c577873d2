"""The ops' own tests of values on every ISA level below the one that this machine takes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kdkernels import _C

HERE = Path(__file__).parent
FILES = ["test_distillation.py", "test_divergences.py", "test_linear.py", "test_regression.py"]
# What is the same on every level, and what goes over the levels itself.
LEFT_OUT = ["bad_argument", "compiles", "gradcheck", "isa", "opcheck", "ranks", "2_to_the_31"]
LEFT_OUT += ["mean_of_theta"]  # of many seeds, each of which has the same bits on every level


@pytest.mark.parametrize("level", _C.build_info()["isa_supported"][:-1])
def test_values(level):
    chosen = " and ".join(f"not {name}" for name in LEFT_OUT)
    command = [sys.executable, "-m", "pytest", "--no-header", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-k", chosen, *(HERE / file for file in FILES)],
        cwd=HERE.parent,
        env=os.environ | {"KDKERNELS_ISA": level, "KDKERNELS_TESTED_AGAIN": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 700
