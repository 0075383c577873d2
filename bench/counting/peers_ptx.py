"""The peers' Triton kernels, from their own Python, on CPU tensors and without a GPU.

    with on_cpu(launch):
        LigerKLDIVLoss()(log_p, q).backward()  # calls launch(Launch) where a GPU would run a kernel
        compiled(f)(x).backward()              # and so where torch.compile's code would, on an H100

Each kernel is compiled for an H100 and comes as PTX with its grid, block and arguments. What
PyTorch itself runs in between comes as launch(Eager): the bytes of the tensors that an op takes and
makes.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import re
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.backends.driver import GPUDriver

# "NVIDIA H100 Tensor Core GPU Architecture" (the SXM5 part), and the technical specifications of
# compute capability 9.0 in the CUDA C++ Programming Guide; under torch's names for them.
H100 = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10,
    L2_cache_size=50 << 20,
    total_memory=80 << 30,
    gcnArchName="",
)


@dataclasses.dataclass
class Launch:
    ptx: str
    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    args: list  # a CPU tensor for a pointer, None for a null pointer, a NumPy scalar

    def touched(self):
        """Bytes of the arguments that the kernel reads and of those that it writes, once each."""
        reads, writes = _touched(self.ptx)
        return tuple(
            sum(_bytes(x) for i, x in enumerate(self.args) if i in s and torch.is_tensor(x))
            for s in (reads, writes)
        )


@functools.lru_cache
def _touched(ptx):
    """Which parameters (by index) a kernel loads from and stores to: where addresses come from."""
    sources, addresses = {}, []
    steps = []  # (registers made, registers and parameters used)
    for line in ptx.splitlines():
        line = line.split("//")[0]
        access = re.search(r"\b(ld|st|atom|red)\.global[\w.:]*\s+(.*)", line)
        if access:
            addresses.append((access[1], re.search(r"\[\s*(%\w+)", access[2])[1]))
        elif made := re.match(r"\s*(?:@!?%\w+\s+)?[a-z][\w.:]*\s+(\{[^}]*\}|%\w+)\s*,(.*)", line):
            parameters = [int(i) for i in re.findall(r"_param_(\d+)", made[2])]
            steps.append((re.findall(r"%\w+", made[1]), re.findall(r"%\w+", made[2]), parameters))
    changed = True
    while changed:
        changed = False
        for made, used, parameters in steps:
            origin = set(parameters).union(*(sources.get(r, ()) for r in used))
            for r in made:
                if not origin <= sources.setdefault(r, set()):
                    sources[r] |= origin
                    changed = True
    return tuple(
        set().union(*(sources.get(r, ()) for kind, r in addresses if kind in kinds))
        for kinds in (("ld", "atom"), ("st", "atom", "red"))
    )


@dataclasses.dataclass
class Eager:
    op: str
    read: int  # bytes
    written: int


@contextlib.contextmanager
def on_cpu(launch: Callable[[Launch | Eager], None], eager: bool = True):
    """Hand every launch inside to `launch`; torch.compile needs eager=False."""
    drivers, runtime = triton.runtime.driver, triton.knobs.runtime
    before, hook = drivers._active, runtime.kernel_load_end_hook
    drivers.set_active(DRIVER)
    runtime.kernel_load_end_hook = DRIVER.loaded
    DRIVER.launch = launch
    try:
        with _PyTorchOps(launch) if eager else contextlib.nullcontext():
            yield
    finally:
        DRIVER.launch = None
        runtime.kernel_load_end_hook = hook
        if before is not None:  # Triton asks for some driver when it frees a kernel at exit
            drivers.set_active(before)


class _PyTorchOps(TorchDispatchMode):
    def __init__(self, launch):
        super().__init__()
        self.launch = launch

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if func.is_view or name.startswith(("empty", "detach", "_unsafe_view")):
            return out
        read = {t.data_ptr(): t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        written = {t.data_ptr(): t for t in tree_leaves(out) if isinstance(t, torch.Tensor)}
        if name in ("copy_", "zero_", "fill_"):
            read.pop(args[0].data_ptr())
        if name.startswith("nll_loss"):  # looks at the labels' elements only
            read.pop(args[0 if "forward" in name else 1].data_ptr())
        self.launch(Eager(name, *(sum(map(_bytes, d.values())) for d in (read, written))))
        return out


def _bytes(tensor):
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


class _Driver(GPUDriver):
    """Triton's face to a GPU, without one.

    Triton keeps a kernel's launcher as long as the kernel lives, so there is one driver for all.
    """

    def __init__(self):
        self.launch, self.ptx, handles = None, {}, itertools.count(1)
        self.launcher_cls = _Launcher
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0
        self.utils = types.SimpleNamespace(
            # module, function, registers, spills, the most threads a block may have
            load_binary=lambda *_: (0, next(handles), 0, 0, H100.max_threads_per_block),
            unload_module=lambda module: None,
            get_device_properties=lambda device: {
                "max_shared_mem": H100.shared_memory_per_block_optin,
                "multiprocessor_count": H100.multi_processor_count,
            },
        )

    def loaded(self, module, function, name, files, key):
        self.ptx[function] = next(Path(f) for f in files.values() if f.endswith(".ptx")).read_text()

    @staticmethod
    def is_active():
        return True

    def get_current_target(self):
        return GPUTarget("cuda", 10 * H100.major + H100.minor, H100.warp_size)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_benchmarker(self):
        raise NotImplementedError("nothing is timed here")

    def map_python_to_cpp_type(self, ty):
        raise NotImplementedError("no launcher is compiled here")


class _Launcher:
    NUMPY = {
        **{f"i{n}": np.dtype(f"int{n}").type for n in (8, 16, 32, 64)},
        **{f"u{n}": np.dtype(f"uint{n}").type for n in (8, 16, 32, 64)},
        **{"i1": np.uint8, "u1": np.uint8, "fp32": np.float32, "fp64": np.float64},
    }

    def __init__(self, source, metadata):
        self.types, self.metadata = list(source.signature.values()), metadata

    def __call__(self, x, y, z, stream, function, packed, launch_metadata, enter, leave, *args):
        m = self.metadata
        if m.num_ctas != 1 or m.global_scratch_size or m.profile_scratch_size:
            raise NotImplementedError(f"{m.name} asks for a cluster or for scratch memory")
        values = [
            value if kind.startswith("*") else self.NUMPY[kind](value)
            for kind, value in zip(self.types, args, strict=True)
            if kind != "constexpr"
        ]
        values += [None, None]  # Triton's own: pointers to global scratch and to profile scratch
        block = (H100.warp_size * m.num_warps, 1, 1)
        with _disable_current_modes():
            DRIVER.launch(Launch(DRIVER.ptx[function], m.name, (x, y, z), block, m.shared, values))


DRIVER = _Driver()

# ---- torch.compile -------------------------------------------------------------------------------


def compiled(function: Callable) -> Callable:
    """torch.compile of an H100's tensors, here lying on the CPU.

    Dynamo and AOTAutograd trace them where they lie; Inductor then lowers the graphs as if it were
    on the GPU. Of a kernel's configurations the first one runs; on a GPU the fastest would.
    """
    return torch.compile(function, backend=_backend, dynamic=False)


def _backend(graph, inputs):
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(graph, inputs, inner_compile=_lower)


def _gpu_for_cpu(value):
    is_cpu = isinstance(value, torch.device) and value.type == "cpu"
    return torch.device("cuda", 0) if is_cpu else value


class _Generated(Exception):
    pass


def _lower(graph, inputs, **kwargs):
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.graph import GraphLowering
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    for node in graph.graph.nodes:
        node.args = torch.fx.node.map_aggregate(node.args, _gpu_for_cpu)
        node.kwargs = torch.fx.node.map_aggregate(node.kwargs, _gpu_for_cpu)
    fake = torch._guards.detect_fake_mode(inputs) or FakeTensorMode()
    with fake:
        inputs = [
            torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="cuda") for x in inputs
        ]
    sources = []

    def stop(lowering):
        sources.append(lowering.codegen()[0].value)
        raise _Generated

    with _gpu_that_inductor_sees(), mock.patch.object(GraphLowering, "compile_to_module", stop):
        FakeTensorProp(graph, fake).propagate_dont_convert_inputs(*inputs)
        try:
            compile_fx_inner(graph, inputs, **kwargs)
        except Exception:
            if not sources:  # anything but _Generated, which may come wrapped
                raise
        return _bind(sources[-1])


@contextlib.contextmanager
def _gpu_that_inductor_sees():
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.runtime.hints import DeviceProperties
    from torch.utils._triton import has_triton

    here = {"device_count": 1, "current_device": 0, "get_device_properties": H100}
    interface = {"is_available": True, "get_compute_capability": 90, "is_triton_capable": True}
    interface |= {"is_bf16_supported": True, "raise_if_triton_unavailable": None}
    seen = [(torch.cuda, here), (CudaInterface, {**here, **interface})]
    cached = (DeviceProperties.create.__func__, has_triton)
    with contextlib.ExitStack() as stack:
        for owner, values in seen:
            for name, value in values.items():
                answer = staticmethod(lambda *_, value=value, **__: value)
                stack.enter_context(mock.patch.object(owner, name, answer))
        for function in cached:
            function.cache_clear()
            stack.callback(function.cache_clear)
        yield


def _bind(source):
    """The function that Inductor's module is generated for, on CPU tensors."""
    for gpu, cpu in {
        "async_compile = AsyncCompile()": "async_compile = KERNELS",
        "empty_strided_cuda": "empty_strided_cpu",
        "device='cuda'": "device='cpu'",
        "device(type='cuda', index=0)": "device('cpu')",
        "torch.cuda._DeviceGuard(0)": "NO_GUARD",
        "torch.cuda.set_device(0)": "pass",
        "get_raw_stream(0)": "0",
    }.items():
        source = source.replace(gpu, cpu)
    module = {"KERNELS": _Kernels(), "NO_GUARD": contextlib.nullcontext(), "__name__": "inductor"}
    exec(source, module)

    def call(inputs):
        with _PyTorchOps(DRIVER.launch):
            return module["call"](inputs)

    call._boxed_call = True  # it empties the list of its inputs
    return call


class _Kernels:
    """In the place of Inductor's AsyncCompile."""

    def triton(self, name, source, device_str):
        from torch._inductor.runtime import triton_helpers

        with tempfile.NamedTemporaryFile("w", suffix=".py", delete=False) as file:
            file.write(source)  # Triton reads a kernel's source from its file
        spec = importlib.util.spec_from_file_location(name, file.name)
        module = importlib.util.module_from_spec(spec)
        with mock.patch.object(triton_helpers, "set_driver_to_gpu", lambda: None):
            spec.loader.exec_module(module)
        return _Kernel(getattr(module, name))

    def wait(self, module):
        pass


class _Kernel:
    """In the place of Inductor's CachingAutotuner: its first configuration, and no other."""

    def __init__(self, tuner):
        self.tuner, self.config = tuner, tuner.configs[0]
        meta = tuner._create_compile_meta(self.config)
        parts = (meta["signature"], meta["constants"], meta["configs"][0])
        self.signature = meta["signature"]
        self.compiled = triton.compile(
            triton.compiler.ASTSource(tuner.fn, *parts),
            target=DRIVER.get_current_target(),
            options=tuner._create_compile_options(self.config, meta),
        )

    def run(self, *args, stream):
        from torch._inductor.runtime.triton_heuristics import GridExpr

        tunable = self.config.all_kwargs()
        names = [name for name in self.tuner.fn.arg_names if name not in tunable]
        values = dict(zip(names, args, strict=True))
        grid = GridExpr.from_meta(self.tuner.inductor_meta, self.config).eval_slow(values)
        self.compiled[grid](*(values.get(name) for name in self.signature), stream=stream)
