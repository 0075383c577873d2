"""A pytest plugin: kdkernels' ops run their CUDA kernels on CPU tensors, in the emulator.

    python -m pytest -p emulated_ops tests/test_noise.py

The ops are built a second time, so that what stands between PyTorch and the kernels' launchers runs
as it would on a GPU: what they allocate, fill in and choose. Every CPU tensor is a buffer of the
emulated device with its own extent, and what neither a kernel nor the CPU wrote counts as never
written.
"""

import os
import sys
from pathlib import Path

import ptx
import pytest
import torch
from nightly import NIGHTLY
from torch.utils import cpp_extension

ROOT = Path(__file__).parent.parent
ARCH = os.environ.get("KDKERNELS_EMULATED_ARCH", "90")
# oneDNN's bf16 products by AMX read rows beyond their end and multiply what stands there by 0; here
# it is not a number.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")


def together(name, sources):
    """A file that includes others: alone, each would read PyTorch's headers, for ten seconds."""
    text = "".join(f'#include "{source}"\n' for source in sources)
    file = ptx.CACHE / f"{name}.cpp"
    with ptx.locked(file):
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
    return file


def build():
    setup = ptx.setup_module()
    source = ROOT / "csrc"
    memory = Path(__file__).with_name("emulated_memory.cpp")
    sources = [
        together("ops", [memory, *sorted(source.glob("ops/*.cpp"))]),
        together("bindings", sorted(source.glob("*.cpp"))),
        *(source / "cpu/dispatch.cpp", source / "cpu/isa_baseline.cpp"),
        Path(__file__).with_name("emulated_levels.cpp"),
        *sorted(source.glob("cuda/*.cu")),
    ]
    # Without optimisation: the compiler takes minutes for kernels that run on no CPU here.
    host = [flag for flag in setup.CXX_FLAGS if not flag.startswith(("-O", "-std", "-W", "-fvis"))]
    host = [word for flag in [*host, "-O0"] for word in ("-Xcompiler", flag)]
    host += ["-DKDKERNELS_WITH_CUDA", "-DKDKERNELS_EMULATED", "-DTORCH_EXTENSION_NAME=_C"]
    host += ['-DKDKERNELS_CUDA_VERSION="emulated"', f'-DKDKERNELS_CUDA_ARCHS="{ARCH}"']
    for path in (*cpp_extension.include_paths(), f"{ptx.toolkit().home}/include"):
        host += ["-isystem", path]
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    libraries += ["-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python", "-fopenmp"]
    return ptx.build("_C", sources, ARCH, include=[source], host=host, link=libraries)


if "kdkernels" in sys.modules:
    raise ImportError("kdkernels was imported before its ops could be replaced")
library = build()
device = library.run(limit=2**31, seed=os.getpid()).__enter__()
sys.modules["kdkernels._C"] = library.python
library.c.track_tensors()
# Memory of numpy's is copied, as it would be to a GPU.
share_memory = torch.from_numpy
torch.from_numpy = lambda array: share_memory(array).clone()


@pytest.fixture(autouse=True)
def findings():
    """A finding fails its test, even where an op's error was expected."""
    yield
    device.check()


def pytest_collection_modifyitems(config, items):
    """By day, of a test's cases those that have a value of a parameter that none before had: what
    values do to kernels is for the launchers' own tests.
    """
    if NIGHTLY:
        return
    seen, left_out = set(), []
    for item in items:
        values = item.callspec.params.items() if hasattr(item, "callspec") else ()
        new = {(item.function, name, repr(value)) for name, value in values} - seen
        seen |= new
        if values and not new:
            left_out.append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]
