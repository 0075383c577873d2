"""The emulator finds accesses to global memory that nothing orders, and missing fences."""

import ctypes
import re

import numpy as np
import ptx
import pytest

SOURCE = ptx.HERE / "planted_memory.cu"
pytestmark = pytest.mark.skipif(ptx.toolkit() is None, reason="needs nvcc")

RACE = "global-memory race: "
# Kernel, its fault, the comments that mark the lines where the finding may be, and what it says.
PLANTED = [
    (
        "blocks_write_word",
        1,
        ["blocks write word"],
        RACE + ".*a write after a write.*byte 0 of out",
    ),
    ("tiles_overlap", 1, ["tiles overlap"], RACE + ".*a write after a write"),
    ("neighbour_in_place", 1, ["neighbour in place", "neighbour is overwritten"], RACE),
    ("halves_of_words", 1, ["whole word", "half word"], RACE + ".*a write after a write"),
    ("warps_exchange", 1, ["warps exchange", "warps exchange, written"], RACE + ".*warp [01], "),
    ("lanes_exchange", 1, ["lanes exchange"], RACE + ".*lane \\d+, at planted_memory.cu:"),
    ("barrier_of_others", 1, ["barrier of others"], RACE + "|never written"),
    ("sum_without_atomic", 1, ["sum without atomic"], RACE),
    ("plain_read_of_atomics", 1, ["plain read of atomics", "atomic before a plain read"], RACE),
    ("block_scope_atomic", 1, ["block scope atomic"], RACE),
    (
        "source_of_copy",
        1,
        ["source overwritten", "source of copy", "copy at its wait"],
        RACE + "|never written",
    ),
    ("last_block", 1, ["last block"], "missing fence: .*a read after a write.*of out by block"),
    ("last_block_of_threads", 1, ["last block of threads"], "missing fence: "),
    ("last_block_of_threads", 2, ["last block of threads"], "missing fence: "),
    ("announced_before_others", 1, ["before others"], "missing fence: "),
    ("fence_too_early", 1, ["fence too early"], "missing fence: "),
    ("fence_of_block", 1, ["fence of block"], "missing fence: "),
    ("fence_of_lane", 1, ["fence of lane"], "missing fence: "),
    ("warps_announce", 1, ["warps announce"], f"(missing fence: |{RACE}).*warp 1, lane 0"),
    ("flag_without_fence", 1, ["flag without fence"], "missing fence: "),
    ("read_again", 1, ["read again"], "missing fence: .*L1 cache"),
    ("lock_without_fence", 1, ["lock without fence"], "missing fence: "),
    ("relaxed_signal", 1, ["relaxed signal"], "missing fence: "),
    ("passed_on", 1, ["passed on"], RACE),
    ("ldg_of_written", 1, ["ldg of written"], "read-only path: .*of what the launch wrote"),
    ("restrict_in_place", 1, ["restrict in place"], "read-only path: "),
    ("ldg_of_partial_sums", 1, ["ldg of partial sums"], "read-only path: "),
]


@pytest.fixture(scope="module")
def planted():
    return ptx.build("planted_memory", [SOURCE], arch="90")


def run(library, name, bug, seed):
    x = ptx.aligned(np.arange(1024, dtype=np.float32))
    out = ptx.aligned(np.zeros(512, np.float32))
    work = ptx.aligned(np.zeros(64, np.uint32))
    with library.run(seed=seed) as emulated:
        buffers = [(x, "x", True), (out, "out", False), (work, "work", True)]
        pointers = [emulated.buffer(array, written, name) for array, name, written in buffers]
        if name in ("halves_of_words", "lock_without_fence"):
            emulated.buffer(out, name="out")
        getattr(library.c, f"launch_{name}")(bug, *map(ctypes.c_void_p, pointers))
    return b"".join(array.tobytes() for array, _, _ in buffers)


def line_of(mark):
    lines = SOURCE.read_text().splitlines()
    return next(i for i, code in enumerate(lines, 1) if code.endswith(f"// {mark}"))


@pytest.mark.parametrize(
    ("name", "bug", "marks", "finding"), PLANTED, ids=[f"{p[0]}-{p[1]}" for p in PLANTED]
)
def test_planted_fault_is_found(planted, name, bug, marks, finding):
    for seed in range(6):
        with pytest.raises(ptx.KernelError) as caught:
            run(planted, name, bug, seed)
        text = str(caught.value)
        assert re.search(finding, text), text
        # After the kernel's name; an inlined function's own line comes before its caller's.
        where = text.split(f"kernel void {name}<{bug}>(")[1].split(", block (")[0]
        assert any(f"planted_memory.cu:{line_of(mark)}" in where for mark in marks), text


@pytest.mark.parametrize("name", sorted({p[0] for p in PLANTED}))
def test_nothing_is_found_without_the_fault(planted, name):
    results = {run(planted, name, 0, seed) for seed in range(6)}
    assert len(results) == 1


def test_the_writer_is_named_with_its_line(planted):
    with pytest.raises(ptx.KernelError) as caught:
        run(planted, "last_block", 1, 0)
    written = line_of("last block, written")
    assert re.search(
        r"by block \(\d, 0, 0\), warp 0, lane 0, at "
        rf"planted_memory.cu:{written}, announced without",
        str(caught.value),
    )


def test_what_one_launch_wrote_another_may_read(planted):
    """Launches come one after another; what a copy of the host overwrites is no race either."""
    x = ptx.aligned(np.arange(1024, dtype=np.float32))
    out = ptx.aligned(np.zeros(512, np.float32))
    work = ptx.aligned(np.zeros(64, np.uint32))
    with planted.run() as emulated:
        pointers = [ctypes.c_void_p(emulated.buffer(array)) for array in (x, out, work)]
        for _ in range(2):
            planted.c.launch_warps_exchange(0, *pointers)
            planted.c.launch_last_block(0, *pointers)
    assert out[100] == 2 * (x[:8]).sum()
