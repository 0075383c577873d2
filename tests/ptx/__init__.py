"""Run CUDA kernels without a GPU: their PTX, instruction by instruction, with checks and counts.

lib = ptx.build("name", ["kernels.cu"], arch="90")
with lib.run(seed=1) as run:
    x = run.buffer(array)                      # a device address; the array is device memory
    lib.c.launch_something(ctypes.c_void_p(x))  # an extern "C" host function with <<<>>>
run.launches[0].counts["memory"]["global load"]["bytes"]
"""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import importlib.machinery
import importlib.util
import json
import os
import shlex
import subprocess
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CACHE = ROOT / "build" / "ptx"
CXX = os.environ.get("CXX", "c++")
# As in setup.py, with the PTX as text in the fat binary. Warnings are kept: see `compiled`.
NVCC_FLAGS = ("-O3", "-std=c++20", "--fmad=false", "-lineinfo", "--no-compress")
WARNINGS = ("-Xcompiler", "-Wall,-Wextra,-Wno-unknown-pragmas")

# Shared memory a block (opt-in) and a multiprocessor in bytes, multiprocessors, largest portable
# cluster, L2 in bytes. Source: CUDA C++ Programming Guide 13.0, table "Technical Specifications per
# Compute Capability"; data sheets of T4, A100, RTX 3090, RTX 4090, H100 SXM, B200, RTX 5090.
DEVICES = {
    75: (40, 65536, 65536, 1, 4 << 20),
    80: (108, 166912, 167936, 1, 40 << 20),
    86: (82, 101376, 102400, 1, 6 << 20),
    89: (128, 101376, 102400, 1, 72 << 20),
    90: (132, 232448, 233472, 8, 50 << 20),
    100: (148, 232448, 233472, 8, 126 << 20),
    120: (170, 101376, 102400, 8, 96 << 20),
}


def aligned(array, offset=0):
    """A copy of a numpy array as on a device: `offset` elements past 256 aligned bytes."""
    shift = offset * array.itemsize
    raw = np.zeros(array.nbytes + shift + 256, np.uint8)
    begin = -raw.ctypes.data % 256 + shift
    out = raw[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
    out[...] = array
    return out


class KernelError(RuntimeError):
    """What a check found, with kernel, source line, thread and address."""


@dataclass
class Launch:
    """One kernel launch and what it counted."""

    kernel: str
    grid: tuple
    block: tuple
    cluster: tuple
    static_shared: int
    dynamic_shared: int
    # Cycles of the longest block and the mean over blocks, if nothing but latency held them up.
    critical_path: int
    critical_path_mean: float
    counts: dict  # thread_instructions, warp_instructions, opcodes, memory

    def bytes(self, what):
        """Bytes that were asked for: what is "global load", "shared store", ..."""
        return self.counts["memory"].get(what, {}).get("bytes", 0)


@functools.cache
def setup_module():
    """setup.py, for its flags and its way to find a toolkit."""
    spec = importlib.util.spec_from_file_location("kdkernels_setup", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    return setup


@functools.cache
def toolkit():
    """The CUDA toolkit that setup.py would take, or None."""
    setup = setup_module()
    return setup.choose_toolkit("auto", "13.0", setup.nvcc_candidates())[0]


def _run(command):
    """What a command said; it must succeed."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"[:6000])
    return done.stdout + done.stderr


@contextlib.contextmanager
def locked(path):
    """What is kept at `path` is made by one process at a time; the others find it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _pool():
    return ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count()))


@functools.lru_cache(None)
def _content(path, size, changed):
    return hashlib.sha256(Path(path).read_bytes()).digest()


def _digest(paths, *words):
    digest = hashlib.sha256(repr(words).encode())
    for path in paths:
        status = os.stat(path)
        digest.update(_content(path, status.st_size, status.st_mtime_ns))
    return digest.hexdigest()[:16]


_refused = {}  # what the compiler said of a source, for the life of this process


def _object(command, source):
    """A source's object, cached by the content of every file that the compiler reads for it."""
    folder, name = CACHE / "objects", Path(source).name
    words = (*map(str, command), str(source), toolkit().version)

    def read(listing):  # a rule for make
        return shlex.split(listing.read_text().replace("\\\n", " ").split(": ", 1)[1])

    def place(listing):
        return folder / f"{name}-{_digest(read(listing), *words)}.o"

    listing = folder / f"{name}-{_digest([], *words)}.d"
    if listing in _refused:  # every test that needs it would compile it once more
        raise _refused[listing]
    with locked(listing):
        try:
            if (known := place(listing)).exists():
                return known
        except FileNotFoundError:  # the source is new, or one of its headers is gone
            pass
        partial = listing.with_suffix(f".{os.getpid()}.d")
        out = partial.with_suffix(".o")
        for _ in range(3):
            begin = time.time()
            try:
                said = _run([*command, source, "-o", out, "-MD", "-MF", partial])
            except RuntimeError as error:
                _refused[listing] = error
                raise
            if all(os.stat(file).st_mtime < begin for file in read(partial)):
                break  # else a file was edited meanwhile
        known = place(partial)
        known.with_suffix(".said").write_text(said)
        out.rename(known)
        partial.rename(listing)
    return known


@functools.cache
def _emulator():
    """The emulator as an archive, for every library to hold its own."""
    headers = Path(toolkit().home) / "include"
    sources = sorted(HERE.glob("*.cpp"))
    sources = [source for source in sources if source.name != "launchers.cpp"]
    flags = ("-std=c++20", "-O2", "-march=native", "-fPIC", "-ffp-contract=off", "-frounding-math")
    flags += ("-Wall", "-Wextra", f"-I{headers}")
    with open("/proc/cpuinfo") as cpu:  # -march=native is for this machine only
        model = next((line for line in cpu if line.startswith("flags")), "")
    command = [CXX, *flags, f"-DHOST_{_digest([], model)}", "-c"]
    with _pool() as pool:
        objects = list(pool.map(lambda source: _object(command, source), sources))
    folder = CACHE / ("emulator-" + _digest([], *map(str, objects)))
    archive = folder / "libptx.a"
    with locked(archive):
        if not archive.exists():
            partial = folder / f"{os.getpid()}.a"
            _run(["ar", "rcs", partial, *objects])
            partial.rename(archive)
    return archive


def _headers(sources, include):
    """Every header of the project that may matter to a cached library."""
    folders = [Path(folder) for folder in include if Path(folder).is_relative_to(ROOT)]
    found = {path for source in sources for path in Path(source).parent.iterdir()}
    found |= {path for folder in folders for path in folder.rglob("*")}
    return sorted(path for path in found if path.suffix in (".h", ".cuh"))


def _installed(include):
    """Folders of others' headers, which an installation makes anew."""
    return [(str(path), os.stat(path).st_mtime_ns) for path in include if Path(path).exists()]


def compiled(sources, archs=("90",), flags=(), include=(), host=()):
    """Objects of .cu files, with PTX for these architectures, and of .cpp files, in their order.

    Each is cached by its content, and beside it, with the suffix .said, is what the compiler said.
    host: flags for .cpp files alone, so that objects of .cu files serve several libraries.
    """
    targets = [f"-gencode=arch=compute_{a},code=compute_{a}" for a in archs]
    flags = (*NVCC_FLAGS, *targets, *flags, *(f"-I{path}" for path in include))
    nvcc = [toolkit().nvcc, *flags, *WARNINGS, "-Xcompiler", "-fPIC", "-c"]
    host = (*host, f"-I{sysconfig.get_path('include')}")
    kept = json.loads(os.environ.get("KDKERNELS_KEPT_OBJECTS", "{}"))  # whatever the source is now

    def one(source):
        if str(source) in kept:
            return Path(kept[str(source)])
        return _object([*nvcc, *(host if Path(source).suffix == ".cpp" else ())], source)

    with _pool() as pool:
        return list(pool.map(one, sources))


def build(name, sources, arch="90", flags=(), include=(), host=(), link=()):
    """Compile .cu and .cpp files to PTX and host code: a library, cached as its objects are.

    arch: one compute capability or several, of which a run takes the highest that its device has.
    """
    archs = [arch] if isinstance(arch, str) else list(arch)
    archive = _emulator()
    objects = compiled(sources, archs, flags, include, host)
    digest = _digest([], *map(str, [*objects, *link, archive]))  # their names tell their contents
    library = CACHE / f"{name}-{digest}" / f"{name}.so"
    with locked(library):
        if not library.exists():
            partial = library.with_name(f"{os.getpid()}.so")
            # Its own symbols first: torch brings the real CUDA runtime into the same process.
            whole = ["-shared", "-Wl,-Bsymbolic-functions", "-Wl,--whole-archive", archive]
            whole.append("-Wl,--no-whole-archive")
            _run([CXX, *whole, *objects, *link, "-o", partial])
            partial.rename(library)
    return Library(library, name, int(archs[-1].rstrip("a")))


def build_native(name, sources, flags=(), include=()):
    """The same sources for the GPU of this machine, as a Python module."""
    home = toolkit()
    python = f"-I{sysconfig.get_path('include')}"
    flags = (*NVCC_FLAGS, "-arch=native", *flags, *(f"-I{path}" for path in include), python)
    files = [*sources, *_headers(sources, include)]
    digest = _digest(files, flags, home.version, _installed(include))
    library = CACHE / f"{name}-native-{digest}" / f"{name}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        _run([home.nvcc, *flags, "-Xcompiler", "-fPIC", "-shared", *sources, "-o", library])
    return _import(library, name)


def _import(path, name):
    name = f"{path.parent.name}.{name}"  # pybind11 keeps a module by its name
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@functools.cache
def _bare():
    library = _emulator().parent / "libptx.so"
    with locked(library):
        if not library.exists():
            partial = library.with_name(f"{os.getpid()}.so")
            link = [CXX, "-shared", "-Wl,-Bsymbolic", "-Wl,--whole-archive", _emulator()]
            _run([*link, "-Wl,--no-whole-archive", "-o", partial])
            partial.rename(library)
    return library


def load(text, name="module", arch=90):
    """PTX from elsewhere: its kernels are launched by Run.launch."""
    library = Library(_bare(), name, arch)
    library.module = library.c.ptx_load(text.encode(), name.encode())
    if library.module < 0:
        raise ValueError(library.c.ptx_error().decode())
    return library


class Library:
    """Kernels with an emulated device of their own."""

    def __init__(self, path, name, arch):
        self.path, self.name, self.arch = path, name, arch
        self.module = None
        self.c = ctypes.CDLL(str(path))
        for function in ("error", "take_error", "output", "launches", "parameters", "kernels"):
            getattr(self.c, f"ptx_{function}").restype = ctypes.c_char_p
        self.c.ptx_begin.argtypes = (
            [ctypes.c_int] * 6 + [ctypes.c_uint64] + [ctypes.c_int] * 5 + [ctypes.c_uint64]
        )
        self.c.ptx_buffer.argtypes = [
            *(ctypes.c_uint64, ctypes.c_uint64, ctypes.c_char_p, ctypes.c_int)
        ]

    @functools.cached_property
    def python(self):
        """The pybind11 module that the library defines under its name."""
        return _import(self.path, self.name)

    def run(self, arch=None, seed=0, **options):
        """A fresh device, as a context manager; see Run."""
        return Run(self, arch or self.arch, seed, **options)


class Run:
    """A device with its memory.

    arch: what the device says it is, which may be more than the PTX's own; seed: the order of
    blocks and warps, and all else that a device may choose. shuffle=False: blocks start in
    ascending order. resident: blocks or clusters that run at the same time. perturb=False:
    approximate functions are correctly rounded instead of as wrong as documented.
    undefined_shuffles=True: a shuffle from a lane that takes no part gives random bits, which the
    PTX ISA allows, and is no finding. same_values=True: a store of what shared memory holds already
    is no race. limit: warp instructions of a launch, beyond which it is found to make no progress;
    with 0 launches are noted and not run.
    """

    def __init__(self, library, arch, seed, shuffle=True, resident=3, perturb=True, **more):
        self.library, self.arch, self.seed = library, int(str(arch).rstrip("a")), seed
        flags = {"undefined_shuffles": False, "same_values": False, "limit": 2**28}
        if more.keys() - flags.keys():
            raise TypeError(f"unknown options {more.keys() - flags.keys()}")
        self.options = (int(shuffle), resident, int(perturb), *map(int, (flags | more).values()))
        self.launches, self.output = [], ""
        self._keep = []

    def __enter__(self):
        sms, block, multiprocessor, cluster, l2 = DEVICES[self.arch]
        self.library.c.ptx_begin(
            self.arch, sms, block, multiprocessor, cluster, l2, self.seed, *self.options
        )
        return self

    def buffer(self, array, written=True, name=None):
        """Make a numpy array or CPU tensor device memory; returns its address.

        written=False: its contents count as never written until a kernel writes them.
        """
        self._keep.append(array)
        name = name or f"buffer {len(self._keep)}"
        if isinstance(array, np.ndarray):
            address, size = array.ctypes.data, array.nbytes
        else:
            address, size = array.data_ptr(), array.numel() * array.element_size()
        if size > 0:
            self.library.c.ptx_buffer(address, size, name.encode(), int(written))
        return address

    def launch(self, kernel, grid, block, args, shared=0, cluster=(1, 1, 1)):
        """Launch a kernel of a loaded module; args are addresses (int), numpy scalars or bytes."""
        sizes = json.loads(self.library.c.ptx_parameters(self.library.module, kernel.encode()))
        if sizes is None:
            names = self.library.c.ptx_kernels(self.library.module).decode()
            raise ValueError(f"no kernel {kernel}; there are {names}")
        if len(sizes) != len(args):
            raise ValueError(f"{kernel} takes {len(sizes)} arguments, not {len(args)}")
        blobs = []
        for size, value in zip(sizes, args, strict=True):
            if isinstance(value, int):
                value = value.to_bytes(size, "little", signed=value < 0)
            elif isinstance(value, np.generic):
                value = value.tobytes()
            if len(value) != size:
                raise ValueError(f"{kernel}: an argument of {len(value)} bytes where {size} belong")
            blobs.append(ctypes.create_string_buffer(value, size))
        pointers = (ctypes.c_void_p * len(blobs))(*(ctypes.addressof(blob) for blob in blobs))
        dims = [(ctypes.c_uint * 3)(*(*d, 1, 1)[:3]) for d in (grid, block, cluster)]
        module = self.library.module
        self.library.c.ptx_launch(module, kernel.encode(), *dims, ctypes.c_uint64(shared), pointers)
        self.check()

    @contextlib.contextmanager
    def capture(self, stream=1):
        """A stream, an address, is being captured: waiting for the device is a finding meanwhile,
        and so is work in the legacy stream."""
        self.library.c.ptx_capture(ctypes.c_uint64(stream))
        try:
            yield stream
        finally:
            self.library.c.ptx_capture(ctypes.c_uint64(0))

    def check(self):
        """Raise what a check found since the last call."""
        error = self.library.c.ptx_take_error().decode()
        if error:
            raise KernelError(error)

    def __exit__(self, kind, *_):
        launches = json.loads(self.library.c.ptx_launches())
        keys = ("kernel", "grid", "block", "cluster", "static_shared", "dynamic_shared")
        keys += ("critical_path", "critical_path_mean")
        self.launches = [
            Launch(*(launch.pop(key) for key in keys), counts=launch) for launch in launches
        ]
        self.output = self.library.c.ptx_output().decode()
        if kind is None:
            self.check()
