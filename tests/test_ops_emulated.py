"""The ops' own tests, with CUDA kernels in the emulator behind the ops instead of the CPU's."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import ptx
import pytest

HERE = Path(__file__).parent
# What is said of the CPU alone, and what is too large to emulate.
LEFT_OUT = {
    "test_distillation.py": [
        "2_to_the_31",
        "out_of_range",  # a label: an error on the CPU, NaN on CUDA
        "bad_argument_is_named",  # labels among them
        # The same bits for any alignment of the rows, which decides how CUDA kernels add.
        "rows_left_out_are_not_read",
        "any_layout_gives_the_same_bits",
    ],
    "test_divergences.py": [
        "2_to_the_31",
        "out_of_range",
        "bad_argument",
        "any_number_of_threads",  # of the CPU's
        "262",  # V from here on takes minutes
        "32000",
    ],
    "test_linear.py test_log_probs.py test_teacher_index.py": [
        *("ranks", "bad_argument", "out_of_range", "logits_have_the_bits")
    ],
    "test_bits.py": ["isa"],
    "test_noise.py": ["2_to_the_31", "isa", "levels", "bad_address_is_named"],
    "test_regression.py": ["mean_of_theta", "isa", "levels"],
}


@pytest.mark.skipif(ptx.toolkit() is None, reason="needs nvcc")
@pytest.mark.parametrize("files", LEFT_OUT)
def test_on_emulated_device(files):
    chosen = " and ".join(f"not {name}" for name in LEFT_OUT[files])
    command = [sys.executable, "-m", "pytest", "-p", "emulated_ops", "--no-header", "-k", chosen]
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, *(HERE / file for file in files.split())],
        cwd=HERE.parent,
        env=os.environ | {"PYTHONPATH": path, "KDKERNELS_TESTED_AGAIN": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 20


UNWRITTEN, BEYOND = "never written", "out of bounds"
FINDINGS = [
    ("add_noise_(torch.empty(1000), 0.5, seed=1)", rf"{UNWRITTEN}.*byte \d+ of a tensor"),
    ("x[:500] = 1; add_noise_(x, 0.5, seed=1)", f"{UNWRITTEN}.*of a tensor"),
    ("x.fill_(1); x.untyped_storage().resize_(2000); add_noise_(x, 0.5, seed=1)", BEYOND),
    ("x.fill_(1); add_noise_(x, 0.5, seed=1)", None),
]


@pytest.mark.skipif(ptx.toolkit() is None, reason="needs nvcc")
def test_emulated_tensors_have_extents_and_are_written():
    """Each statement alone, in one process: what its op raises."""
    code = f"""
        import emulated_ops, torch
        from kdkernels import add_noise_
        for statement, _ in {FINDINGS!r}:
            x = torch.empty(1000)
            try:
                exec(statement)
                print("nothing")
            except RuntimeError as error:
                print(str(error).splitlines()[0])
            emulated_ops.device.library.c.ptx_take_error()
        """
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=HERE.parent,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for (statement, finding), said in zip(FINDINGS, done.stdout.splitlines(), strict=True):
        assert re.search(finding or "^nothing$", said), f"{statement}: {said}"
