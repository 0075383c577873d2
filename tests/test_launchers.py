"""Every CUDA kernel, executed: by the emulator everywhere, on the GPU where there is one."""

import ctypes
import itertools
import math
import os
import threading

import launchers
import ptx
import pytest
import torch
from nightly import NIGHTLY, of_night

from kdkernels import reference

needs_nvcc = pytest.mark.skipif(ptx.toolkit() is None, reason="needs nvcc")
# The PTX for 75, 80 and 90 runs on all of them; shared memory and clusters differ. Older ones than
# Hopper take a build of their own, at night.
ARCHITECTURES = of_night([90, 120, 86, 80, 75], [90, 120])
if "KDKERNELS_EMULATED_ARCH" in os.environ:  # no older ones
    ARCHITECTURES = [a for a in ARCHITECTURES if a >= int(os.environ["KDKERNELS_EMULATED_ARCH"])]


def name_of(op, i, case):
    classes = f"-{case.classes}" if hasattr(case, "classes") else ""
    return f"{op.name}-{i}{classes}"


def smallest(op):
    """A small case of every walk over rows, or the one with the fewest elements."""
    if not hasattr(op.cases[0], "classes"):
        return [min(op.cases, key=lambda case: sum(getattr(case, "sizes", ())) or math.inf)]
    ends = itertools.pairwise((3, 64, 1024, 10_000))
    found = [[c for c in op.cases if low < c.classes <= high] for low, high in ends]
    return [min(cases, key=lambda case: case.rows or math.inf) for cases in found if cases]


def cases():
    for op in launchers.OPS:
        quick = smallest(op)
        for i, case in enumerate(op.cases):
            marks = [pytest.mark.quick] if any(case is one for one in quick) else []
            yield pytest.param(op, case, id=name_of(op, i, case), marks=marks)


CASES = list(cases())


@pytest.fixture(scope="module")
def emulated_library():
    return launchers.build()


@pytest.fixture(scope="module")
def native():
    return launchers.build_native()


def run_emulated(op, case, arch, **options):
    library = launchers.build(older=arch < 90)
    with library.run(arch=arch, **options) as run:
        got = op.launch(launchers.emulated(run, library), case)
    return got, run.launches


def same_bits(one, other):
    for name in one:
        a, b = one[name].contiguous(), other[name].contiguous()
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), f"{name} depends on the order"


def architectures(op, case):
    first, *others = ARCHITECTURES
    turn = op.cases.index(case)
    if not NIGHTLY:
        return ARCHITECTURES if turn % 4 == 0 else [first]
    return ARCHITECTURES if op.everywhere else [first, others[turn % len(others)]]


@needs_nvcc
@pytest.mark.parametrize(("op", "case"), CASES)
def test_emulated(op, case):
    """Right on each generation, and the same bits in whatever order blocks and warps run."""
    want = op.expected(case)
    for arch in architectures(op, case):
        got, _ = run_emulated(op, case, arch, seed=1)
        op.compare(case, got, want)
        if arch == ARCHITECTURES[0]:
            again, _ = run_emulated(op, case, arch, seed=2, resident=1)
            same_bits(got, again)


@needs_nvcc
@pytest.mark.parametrize("op", launchers.OPS, ids=lambda op: op.name)
def test_all_work_is_in_the_stream_that_is_captured(emulated_library, op):
    for case in {0: op.cases[0], 1: op.cases[len(op.cases) // 2]}.values():
        with emulated_library.run(seed=1) as run, run.capture() as stream:
            got = op.launch(launchers.emulated(run, emulated_library, stream), case)
        op.compare(case, got, op.expected(case))


def planned_shared(library, op, classes):
    """Bytes of dynamic shared memory of a float32 row of so many classes on an H100."""
    sms, block, multiprocessor, _, _ = ptx.DEVICES[90]
    device = launchers.fill(
        library.Device(), arch=90, sms=sms, shared_per_block=block, shared_per_sm=multiprocessor
    )
    if op == "distillation":
        return library.plan_distillation(classes, 4, library.Extra.nothing, device, False).shared
    return library.plan_divergence(classes, 0, 4, False, 2, device).shared


@needs_nvcc
@pytest.mark.parametrize("name", ["distillation", "divergence"])
def test_shared_memory_that_a_block_has_to_opt_in_to(emulated_library, name):
    """Static shared memory counts, and no thread lowers what another one needs."""
    (op,) = (op for op in launchers.OPS if op.name == name)
    make = {"distillation": launchers.Distillation, "divergence": launchers.Divergence}[name]
    shared = {v: planned_shared(emulated_library.python, name, v) for v in range(600, 40000, 8)}
    most = 48 * 1024
    below = max(size for size in shared.values() if size <= most)
    edge = [v for v, size in shared.items() if size == below]
    large = max(shared, key=shared.get)
    assert shared[large] > most
    with emulated_library.run(seed=1) as run:
        device = launchers.emulated(run, emulated_library)
        for classes in (large, edge[0], edge[-1]):
            case = make("float32", 1, classes)
            got = []
            thread = threading.Thread(target=lambda c=case: got.append(op.launch(device, c)))  # noqa: B023
            thread.start()
            thread.join()
            op.compare(case, *got, op.expected(case))


def check_on(kind, library, case):
    """The distillation loss on an emulated device of another kind, which is returned."""
    (op,) = (op for op in launchers.OPS if op.name == "distillation")
    with library.run() as run:
        device = kind(library.python, "cpu", run.buffer)
        got = op.launch(device, case)
    got["gradient"] = got["gradient"].reshape(case.rows, case.classes)
    op.compare(case, got, op.expected(case))
    return device


class InRuns(launchers.Device):
    """A device on which rows lie as those of logits[:, :-1] do: one of NaN after each three."""

    RUN = 3

    def put_rows(self, matrix, pad, offset, name):
        runs = matrix.view(-1, self.RUN, matrix.shape[1])
        with_gaps = torch.nn.functional.pad(runs, (0, pad, 0, 1), value=float("nan"))
        return self.put(with_gaps, offset, name)[:, :-1, : matrix.shape[1]]

    def new_rows(self, shape, dtype, pad, offset, name):
        rows, classes = shape
        whole = (rows // self.RUN, self.RUN + 1, classes + pad)
        self.gradient = self.new(whole, dtype, offset, name)
        return self.gradient[:, :-1, :classes]


@needs_nvcc
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("classes", [10, 100, 1000, 3000, 70000])
def test_rows_in_runs(emulated_library, classes, dtype):
    rows = 600 if classes == 10 else 6
    for inplace in (False, True):
        case = launchers.Distillation(dtype, rows, classes, alpha=0.5, inplace=inplace)
        device = check_on(InRuns, emulated_library, case)
        if not inplace:
            assert device.gradient[:, -1].isnan().all(), "rows between runs were written"


class LengthFirst(launchers.Device):
    """A device on which rows of three sequences take turns, and gradients lie one after another."""

    def put_rows(self, matrix, pad, offset, name):
        turns = matrix.view(3, -1, matrix.shape[1]).transpose(0, 1).contiguous()
        return self.put(turns, offset, name).transpose(0, 1)


@needs_nvcc
@pytest.mark.parametrize("classes", [10, 100, 1000])
def test_sequences_that_come_length_first(emulated_library, classes):
    check_on(
        LengthFirst, emulated_library, launchers.Distillation("float32", 12, classes, alpha=0.5)
    )


class Far(launchers.Device):
    """A device on which rows lie beyond 2^31 elements of each other, in memory that no one uses."""

    def _rows(self, shape, dtype, written, name):
        rows, classes = shape
        apart = 2**31 + 64
        memory = torch.empty((rows - 1) * apart + classes, dtype=dtype)
        out = memory.as_strided(shape, (apart, 1))
        out.fill_(float("nan"))
        for row in out:
            self._announce(row, written, name)
        return out

    def put_rows(self, matrix, pad, offset, name):
        return self._rows(matrix.shape, matrix.dtype, True, name).copy_(matrix)

    def new_rows(self, shape, dtype, pad, offset, name):
        return self._rows(shape, dtype, False, name)


@needs_nvcc
@pytest.mark.parametrize("classes", [100, 1000, 3000])
def test_rows_beyond_2_to_the_31_elements(emulated_library, classes):
    check_on(Far, emulated_library, launchers.Distillation("float16", 2, classes, alpha=0.5))


@pytest.fixture(scope="module")
def few_blocks():
    source = launchers.ROOT / "tests/few_blocks.cu"
    return ptx.build("few_blocks", [source], "90", include=launchers.INCLUDE)


@needs_nvcc
@pytest.mark.parametrize("capped", [False, True], ids=["", "capped"])
@pytest.mark.parametrize("divergence", ["forward_kl", "total_variation"])
@pytest.mark.parametrize(
    ("classes", "cluster", "blocks"),
    [(101, 1, 1), (700, 1, 1), (1300, 1, 2), (1300, 2, 1), (1301, 4, 2), (1300, 0, 1)],
    ids=["tile", "warp", "held", "cluster-of-2", "cluster-of-4", "stream"],
)
def test_more_rows_than_blocks(few_blocks, classes, cluster, blocks, divergence, capped):
    """One row after the other in a block, the last of them left out or not.

    The last tile ends, as one of 101 classes does not always, in the middle of 16 bytes.
    """
    rows = 70 if classes == 101 else 11
    g = launchers.generator(classes)
    z, t = (3 * torch.randn((rows, classes), generator=g) for _ in range(2))
    all_labels = torch.randint(classes, (rows,), generator=g)
    options = {"temperature": 2.0, "alpha": 0.5, "reduction": "none", "divergence": divergence}
    options |= {"soft_cap": 5.0 if capped else None, "return_statistics": True}
    three = divergence == "total_variation"
    for seed in range(8):
        # The last rows are left out, or they are not: then a cluster parts at another barrier.
        labels = all_labels.clone()
        labels[[1, -2, -1] if seed < 4 else [1]] = -100
        x = z.double().requires_grad_()
        want, of_rows_alone = reference.distillation_loss(x, t.double(), labels, **options)
        want.sum().backward()
        with few_blocks.run(seed=seed) as run:
            device = launchers.Device(None, "cpu", run.buffer)
            outs = [device.new(z.shape, z.dtype), device.new((rows,), z.dtype)]
            sums = device.new((blocks * max(cluster, 1),), torch.float64)
            statistics = device.new((6, rows), z.dtype) if capped else None
            tensors = [device.put(z), device.put(t), device.put(labels), *outs, sums]
            pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
            of_rows = seed % 2 == 0
            if not of_rows:  # nothing then keeps the blocks together between rows
                pointers[4] = None
            pointers.append(ctypes.c_void_p(launchers.address(statistics)))
            sizes = ctypes.c_int64(rows), ctypes.c_int64(classes)
            assert few_blocks.c.launch_few(three, cluster, blocks, *pointers, *sizes) == 0
        torch.testing.assert_close(outs[0].double(), x.grad, rtol=0, atol=2e-6)
        if of_rows:
            torch.testing.assert_close(outs[1].double(), want.detach(), rtol=1e-6, atol=2e-6)
        torch.testing.assert_close(sums.sum(), want.detach().sum(), rtol=1e-6, atol=2e-6)
        if capped:
            right = torch.stack(of_rows_alone)
            torch.testing.assert_close(statistics.double(), right, rtol=4e-6, atol=4e-6)


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "case"), CASES)
def test_gpu(native, op, case):
    got = op.launch(launchers.gpu(native), case)
    op.compare(case, got, op.expected(case))
