"""Every CUDA kernel, executed: by the emulator everywhere, on the GPU where there is one."""

import launchers
import ptx
import pytest
import torch

needs_nvcc = pytest.mark.skipif(ptx.toolkit() is None, reason="needs nvcc")
# The PTX for 75, 80 and 90 runs on all of them; shared memory and clusters differ.
ARCHITECTURES = (90, 120, 86, 80, 75)
CASES = [
    pytest.param(op, case, id=f"{op.name}-{i}")
    for op in launchers.OPS
    for i, case in enumerate(op.cases)
]


@pytest.fixture(scope="module")
def emulated_library():
    return launchers.build()


@pytest.fixture(scope="module")
def native():
    return launchers.build_native()


def run_emulated(library, op, case, **options):
    with library.run(**options) as run:
        got = op.launch(launchers.emulated(run, library), case)
    return got, run.launches


def same_bits(one, other):
    for name in one:
        a, b = one[name].contiguous(), other[name].contiguous()
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), f"{name} depends on the order"


def architectures(op, case):
    if op.everywhere:
        return ARCHITECTURES
    first, *others = ARCHITECTURES
    return first, others[op.cases.index(case) % len(others)]


@needs_nvcc
@pytest.mark.parametrize(("op", "case"), CASES)
def test_emulated(emulated_library, op, case):
    """Right on every generation, and the same bits in whatever order blocks and warps run."""
    want = op.expected(case)
    for arch in architectures(op, case):
        got, _ = run_emulated(emulated_library, op, case, arch=arch, seed=1)
        op.compare(case, got, want)
        if arch == ARCHITECTURES[0]:
            again, _ = run_emulated(emulated_library, op, case, arch=arch, seed=2, resident=1)
            same_bits(got, again)


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "case"), CASES)
def test_gpu(native, op, case):
    got = op.launch(launchers.gpu(native), case)
    op.compare(case, got, op.expected(case))
