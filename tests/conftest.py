"""What the ops' tests share: hypothesis settings, ISA levels, threads, and the GPU's tests."""

import os

import hypothesis
import pytest
import torch

# The same examples on every run, and no timing limits: machines are busy.
hypothesis.settings.register_profile(
    "kdkernels",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("kdkernels")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        from kdkernels import _C

        reason = None if _C.build_info()["cuda"] else "this build is for the CPU only"
    else:
        reason = "needs a CUDA GPU"
    if reason is not None:
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def cached_memory():
    """Skips where PyTorch asks CUDA for every tensor, as under compute-sanitizer."""
    if "PYTORCH_NO_CUDA_MEMORY_CACHING" in os.environ:
        pytest.skip("a graph, and gigabytes, need PyTorch's own allocator")


@pytest.fixture
def set_isa():
    """Choose an ISA level; the one that was in use comes back after the test."""
    from kdkernels import _C

    before = _C.build_info()["isa"]
    yield _C.set_isa
    _C.set_isa(before)


@pytest.fixture
def set_threads():
    """Choose the number of threads; the one that was in use comes back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def isa_levels():
    """The levels that this machine can run."""
    from kdkernels import _C

    return _C.build_info()["isa_supported"]
