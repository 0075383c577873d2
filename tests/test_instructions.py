"""No change makes a hot loop of the CPU kernels execute many more instructions unnoticed."""

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench import instructions  # noqa: E402


@pytest.mark.nightly
def test_hot_loops_execute_no_more_instructions_than_kept():
    if shutil.which("valgrind") is None:
        pytest.skip("needs valgrind")
    version, kept = instructions.compiler()[1], instructions.kept()
    if version != kept["compiler"]:
        pytest.skip(f"the figures are of {kept['compiler']}; here is {version}")
    now, before = instructions.counts(), kept["an element"]
    assert now.keys() == before.keys()
    worse = {
        case: f"{figure} instead of {before[case]}"
        for case, figure in now.items()
        if figure > instructions.WORSE * before[case]
    }
    assert not worse, "find out why, or keep the new figures: python bench/instructions.py --write"
