"""The emulator finds planted bugs and says where; without them it finds nothing."""

import ctypes
import re

import numpy as np
import ptx
import pytest

SOURCE = ptx.HERE / "planted.cu"
needs_nvcc = pytest.mark.skipif(ptx.toolkit() is None, reason="needs nvcc")

# Kernel, the comment that marks the line (None: any), and what the finding says.
PLANTED = [
    ("block_sum", "missing barrier", "shared-memory race|never written"),
    ("shifted_tail", "shifted tail", "out of bounds.*4 bytes past the end of x"),
    ("misaligned_vector", "misaligned vector", "misaligned.*16 bytes at global address"),
    ("past_the_row", "past the row", "out of bounds.*past the end of x"),
    ("shuffle_mask", "shuffle mask", "shuffle mask.*leaves out lane 8"),
    ("shuffle_inactive", "inactive lane", "shuffle from an inactive lane"),
    ("lanes_never_meet", None, "lanes of a warp that never meet"),
    ("divergent_barrier", None, "divergent barrier"),
    ("barrier_count", "barrier count", "deadlock"),
    ("global_never_written", "never written", "never written.*byte 0 of out|never written.*of out"),
    ("shared_never_written", "shared never written", "never written.*shared address 0x14"),
    ("missing_syncwarp", "missing syncwarp", "shared-memory race|never written"),
    ("write_after_read", None, "shared-memory race: "),
    ("missing_wait", "missing wait", "never written"),
    ("mbarrier_wait", "mbarrier wait", "shared-memory race|never written"),
    ("cluster_before", "cluster before", "shared-memory race.*before a first barrier.cluster"),
    ("cluster_gone", "cluster gone", "shared memory of a block of the cluster that has ended"),
]


@pytest.fixture(scope="module")
def planted():
    return ptx.build("planted", [SOURCE], arch="90")


def run(library, name, bug, seed):
    rows = {"past_the_row": 4}.get(name, 1)
    n = 67
    x = ptx.aligned(np.arange(rows * n, dtype=np.float32) / 7)
    out = ptx.aligned(np.zeros(256, np.float32))
    size = n if name == "shifted_tail" else 256
    with library.run(seed=seed) as emulated:
        pointers = [
            ctypes.c_void_p(emulated.buffer(x, name="x")),
            ctypes.c_void_p(emulated.buffer(out[:size], written=False, name="out")),
        ]
        if name == "order_of_blocks":
            emulated.buffer(out, name="out")
        getattr(library.c, f"launch_{name}")(bug, *pointers, n)
    return x, out


@needs_nvcc
@pytest.mark.parametrize(("name", "mark", "finding"), PLANTED, ids=[p[0] for p in PLANTED])
def test_planted_bug_is_found(planted, name, mark, finding):
    for seed in range(5):
        with pytest.raises(ptx.KernelError) as caught:
            run(planted, name, 1, seed)
        text = str(caught.value)
        assert re.search(finding, text), text
        assert f"kernel void {name}<1>(" in text and re.search(
            r"block \(\d, 0, 0\), thread \(\d", text
        )
        if mark is not None:
            lines = SOURCE.read_text().splitlines()
            line = next(i for i, code in enumerate(lines, 1) if code.endswith(f"// {mark}"))
            # A statement that spans two lines may be named by its first.
            assert re.search(rf"planted.cu:({line}|{line - 1}),", text), text


@needs_nvcc
@pytest.mark.parametrize("name", [*(p[0] for p in PLANTED), "order_of_blocks"])
def test_nothing_is_found_without_the_bug(planted, name):
    results = [run(planted, name, 0, seed)[1].tobytes() for seed in range(5)]
    assert len(set(results)) == 1


@needs_nvcc
def test_the_order_of_blocks_shows_in_the_bits(planted):
    results = {run(planted, "order_of_blocks", 1, seed)[1].tobytes() for seed in range(8)}
    assert len(results) > 1


@needs_nvcc
def test_barriers_that_exchange_and_count(planted):
    x, out = run(planted, "mbarrier_wait", 0, 1)
    np.testing.assert_array_equal(out[:64], x[63::-1] + (x[63::-1] + 1))
    x, out = run(planted, "block_votes", 0, 1)
    leads = np.arange(64) % 32 == 0
    np.testing.assert_array_equal(out[:64], (x[:64] > 4).sum() + 100 + 1000 * leads)


HEADER = ".version 9.0\n.target sm_90\n.address_size 64\n"


def kernel(body):
    return f"{HEADER}.visible .entry k(.param .u64 p) {{\n.reg .b32 %r<9>;\n{body}\n}}"


@needs_nvcc
def test_an_unknown_instruction_is_named():
    library = ptx.load(kernel("wgmma.fence.sync.aligned;\nret;"))
    with pytest.raises(ptx.KernelError, match="unknown instruction.*wgmma"), library.run() as run:
        run.launch("k", (1,), (32,), [0])


@needs_nvcc
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("mov.u32 %r1, %r99;", "PTX line 6: unknown register %r99"),
        ("bra nowhere;", "PTX line 6: unknown name nowhere"),
        ("mov.u32 %r1 %r2;", "PTX line 6: `;` expected before `%r2`"),
    ],
)
def test_bad_ptx_is_refused_with_its_line(body, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ptx.load(kernel(body))


@needs_nvcc
def test_launch_arguments_are_checked():
    library = ptx.load(kernel("ret;"))
    with library.run() as run:
        with pytest.raises(ValueError, match="no kernel other; there are k"):
            run.launch("other", (1,), (32,), [0])
        with pytest.raises(ValueError, match="k takes 1 arguments, not 2"):
            run.launch("k", (1,), (32,), [0, 1])
        with pytest.raises(ValueError, match="an argument of 4 bytes where 8 belong"):
            run.launch("k", (1,), (32,), [np.float32(1)])


@needs_nvcc
def test_counts_of_a_copy():
    """16 bytes a lane are 4 sectors for each 8 lanes, no bank conflict; a stride has conflicts."""
    body = """
    .reg .b64 %rd<9>;
    .shared .align 16 .b8 s[8192];
    ld.param.u64 %rd1, [p];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd2, %r1, 16;
    add.s64 %rd3, %rd1, %rd2;
    ld.global.v4.u32 {%r2, %r3, %r4, %r5}, [%rd3];
    mov.u32 %r6, s;
    mad.lo.u32 %r7, %r1, 16, %r6;
    st.shared.v4.u32 [%r7], {%r2, %r3, %r4, %r5};
    mad.lo.u32 %r8, %r1, 128, %r6;
    st.shared.u32 [%r8+4096], %r2;
    ret;"""
    library = ptx.load(kernel(body))
    x = ptx.aligned(np.arange(128, dtype=np.int32))
    with library.run() as run:
        run.launch("k", (1,), (32,), [run.buffer(x)])
    memory = run.launches[0].counts["memory"]
    assert memory["global load"] == {"requests": 1, "bytes": 512, "sectors": 16, "conflicts": 0}
    assert memory["shared store"] == {"requests": 2, "bytes": 640, "sectors": 0, "conflicts": 31}
    assert run.launches[0].counts["thread_instructions"]["memory"] == 3 * 32
