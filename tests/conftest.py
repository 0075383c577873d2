"""What tests share: hypothesis settings, workers, ISA levels, threads, and the GPU's tests."""

import os
from pathlib import Path

import hypothesis
import pytest
from nightly import NIGHTLY

# pytest-xdist's workers share the cores; torch asks when it is imported.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0"))
if WORKERS:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // WORKERS)))

import torch  # noqa: E402

# The same examples on every run, and no timing limits: machines are busy.
hypothesis.settings.register_profile(
    "kdkernels",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("kdkernels")


# A file's tests stay together, for what their fixtures make. But the tests of these share nothing
# beyond a parameter.
SHARED_OUT = ("test_cubin.py", "test_isa_levels.py", "test_launchers.py", "test_ops_emulated.py")
# What takes longest comes first, so that all workers end together.
FIRST = (
    *("test_ops_emulated.py", "test_launchers.py", "test_isa_levels.py", "test_package.py"),
    *("test_cubin.py", "test_instructions.py", "test_train.py", "test_optim.py"),
    *("test_robust.py", "test_train_parallel.py", "test_tune.py", "test_own_models.py"),
    *("test_parallel.py", "test_language_model.py", "test_export.py", "test_elementary.py"),
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file, _, test = nodeid.partition("::")
            return f"{file}[{test.partition('[')[2]}" if Path(file).name in SHARED_OUT else file

    config.option.loadscopereorder = False
    return Scheduling(config, log)


def pytest_collection_modifyitems(config, items):
    if not NIGHTLY:
        left_out = [item for item in items if "nightly" in item.keywords]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if "nightly" not in item.keywords]
    places = {name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(FIRST)))
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
