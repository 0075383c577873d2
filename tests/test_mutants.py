"""The list of faults that `make mutants` puts into the sources, and what it makes of a run."""

import re
from pathlib import Path

import pytest
from mutants import run
from mutants.fault import Fault

T = "tests/test_a.py"
ROOT = Path(__file__).parent.parent
FAULT = Fault("name", "csrc/params.h", "text", "other text", "tests/test_noise.py")


def test_list_is_current():
    assert [f"{f.name}: {f.stale(ROOT)}" for f in run.FAULTS if f.stale(ROOT)] == []
    names = [fault.name for fault in run.FAULTS]
    assert len(set(names)) == len(names) >= 60
    assert all(re.fullmatch("[a-z0-9-]+", name) for name in names)
    assert all(fault.text != fault.instead for fault in run.FAULTS)


@pytest.mark.parametrize(
    ("code", "said", "status", "by"),
    [
        (0, f"{T}::test_b PASSED\n1 passed in 1s", "survived", ""),
        (0, f"{T}::test_b SKIPPED\n1 skipped in 1s", "error", "all of its tests were skipped"),
        (1, f"FAILED {T}::test_b[x y] - assert 0\n", "killed", f"{T}::test_b[x y]"),
        (1, f"ERROR {T}::test_b - KernelError\n", "killed", f"{T}::test_b"),
        (2, f"ERROR collecting {T}\nERROR {T} - E\n", "error", "pytest ended with 2"),
        (5, "1 deselected", "error", "its tests are not there"),
        (-11, f"{T}::test_b PASSED\n{T}::test_c ", "killed", f"crash: {T}::test_c"),
        (None, f"{T}::test_b ", "killed", f"timeout: {T}::test_b"),
        (-9, "", "error", "pytest ended with -9"),
    ],
)
def test_verdict(code, said, status, by):
    found = run.verdict(code, said, FAULT)
    assert found[0] == status and found[1].startswith(by)


def test_a_fault_that_is_none():
    fault = Fault(**vars(FAULT) | {"no_fault": "It is the same."})
    assert run.verdict(0, "1 passed", fault) == ("no fault", "It is the same.")
    assert run.verdict(1, "FAILED tests/test_a.py::test_b\n", fault)[0] == "error"
