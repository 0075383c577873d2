"""The emulator refuses what the CUDA runtime refuses, and what it does not promise."""

import ctypes
import re

import numpy as np
import ptx
import pytest

SOURCE = ptx.HERE / "planted_host.cu"
pytestmark = pytest.mark.skipif(ptx.toolkit() is None, reason="needs nvcc")

# Host function, its fault, the device, and what the finding says.
PLANTED = [
    ("static_and_dynamic", 1, 90, r"48640 bytes of dynamic and 1024 of static.*48128 of dynamic"),
    ("more_than_the_device_has", 1, 120, "101376 bytes of dynamic.*which may have 100352"),
    (
        "more_than_was_allowed",
        1,
        90,
        "61441 bytes of dynamic.*61440 of dynamic are allowed by cuda",
    ),
    (
        "blocks_in_y",
        1,
        90,
        r"a grid of \(1, 65536, 1\) blocks; at most 65535 are allowed in y and z",
    ),
    ("blocks_in_z", 1, 90, r"a grid of \(1, 1, 65536\) blocks"),
    (
        "threads_in_z",
        1,
        90,
        r"a block of \(1, 1, 65\) threads; at most 1024 are allowed, and 64 in z",
    ),
    ("threads", 1, 90, r"a block of \(1025, 1, 1\) threads"),
    ("launch_bounds", 1, 90, "a block of 129 threads; the kernel is compiled for at most 128"),
    ("cluster_too_large", 1, 90, "clusters of 16 blocks; this device takes 8"),
    (
        "cluster_does_not_divide",
        1,
        90,
        r"a grid of \(9, 1, 1\) blocks, which clusters of \(4, 1, 1\)",
    ),
    (
        "cluster_of_the_kernel",
        1,
        90,
        r"a grid of \(5, 1, 1\) blocks, which clusters of \(2, 1, 1\)",
    ),
    (
        "lowered_attribute",
        1,
        90,
        "lowers the dynamic shared memory of .* from 81920 to 61440 bytes",
    ),
    ("dependent", 1, 90, "read too early: .* before griddepcontrol.wait: .* writes it"),
    ("dependent", 2, 90, "written too early: .* before griddepcontrol.wait: .* reads it"),
    ("dependent", 3, 90, "never waited: .* before griddepcontrol.wait: .* writes it"),
]


@pytest.fixture(scope="module")
def planted():
    return ptx.build("planted_host", [SOURCE], arch="90")


def run(library, name, bug, arch, seed=0, capture=None):
    x = ptx.aligned(np.ones(2048, np.float32))
    out = ptx.aligned(np.zeros(64, np.float32))
    with library.run(arch=arch, seed=seed) as emulated:
        pointers = [ctypes.c_void_p(emulated.buffer(array)) for array in (x, out)]
        if capture is None:
            return getattr(library.c, name)(bug, *pointers)
        with emulated.capture(capture):
            return getattr(library.c, name)(bug, *pointers, ctypes.c_void_p(capture))


def with_marks(text):
    """The finding, its line replaced by the comment that marks it."""
    lines = SOURCE.read_text().splitlines()

    def mark(place):
        return lines[int(place[1]) - 1].rpartition("// ")[2] + ":"

    return re.sub(r"kernel .*?planted_host.cu:(\d+),.*?thread \(.*?\):", mark, text)


@pytest.mark.parametrize(
    ("name", "bug", "arch", "finding"), PLANTED, ids=[f"{p[0]}-{p[1]}" for p in PLANTED]
)
def test_broken_rule_is_found(planted, name, bug, arch, finding):
    with pytest.raises(ptx.KernelError) as caught:
        run(planted, name, bug, arch)
    assert re.search(finding, with_marks(str(caught.value))), str(caught.value)


@pytest.mark.parametrize(("name", "arch"), sorted({(p[0], p[2]) for p in PLANTED}))
def test_nothing_is_found_where_the_rule_is_kept(planted, name, arch):
    for seed in range(3):
        assert run(planted, name, 0, arch, seed) == 0


def test_host_code_sees_that_it_is_captured(planted):
    assert run(planted, "captured", 0, 90, capture=1) == -1
    with planted.run() as emulated:
        x = ctypes.c_void_p(emulated.buffer(ptx.aligned(np.ones(64, np.float32))))
        assert planted.c.captured(0, x, None, ctypes.c_void_p(1)) == 0


@pytest.mark.parametrize(
    ("bug", "finding"),
    [
        (1, "cudaStreamSynchronize while a stream is being captured"),
        (2, "in the legacy stream while another one is being captured"),
        (3, "cudaMalloc while a stream is being captured"),
    ],
)
def test_what_a_capture_forbids_is_found(planted, bug, finding):
    with pytest.raises(ptx.KernelError, match=finding):
        run(planted, "captured", bug, 90, capture=1)
