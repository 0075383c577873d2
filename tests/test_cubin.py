"""Static gates on the machine code that ptxas makes of csrc/cuda: for Hopper, at night for all.

The PTX is that of the launchers' libraries, which nvcc made with the flags of setup.py: an
architecture takes the newest that it can, as a driver would. What was found is kept in build/cubin
by content, so that only a change is assembled again.
"""

import ctypes
import functools
import hashlib
import itertools
import json
import os
import re
import runpy
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import launchers
import ptx
import pytest
from nightly import of_night

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(ROOT.glob("csrc/cuda/*.cu"))
CACHE = ROOT / "build" / "cubin"
build = SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py")))

VECTOR_LOAD = re.compile(r"(LDG|LDGSTS|UBLKCP)\b(?=.*\.(128|256))|UBLKCP")
VECTOR_STORE = re.compile(r"STG\b.*\.(128|256)|UBLKCP")

# Kernels that need no 16-byte loads, or no such stores, and why.
NO_VECTOR_LOADS = {
    "weight_kernel": "reads a label and a weight a row",
    "inverse_kernel": "reads partial sums",
    "loss_kernel": "reads partial sums",
    "totals_kernel": "reads partial sums",
    "per_step_kernel": "reads the samples once a block",
    "per_sample_kernel": "finds the samples in L1",
}
NO_VECTOR_STORES = {
    **NO_VECTOR_LOADS,
    "round_kernel": "writes eight elements at once, of fp8 8 bytes",
    "dot_kernel": "writes a sum a block",
}


# What a streaming multiprocessor holds: "Technical Specifications per Compute Capability" in
# NVIDIA's CUDA programming guide. CUDA takes `reserved` bytes of shared memory a block for itself.
@dataclass(frozen=True)
class Multiprocessor:
    warps: int
    blocks: int
    shared: int
    reserved: int = 1024
    registers: int = 65536


MULTIPROCESSORS = {
    "75": Multiprocessor(32, 16, 64 << 10, reserved=0),
    "80": Multiprocessor(64, 32, 164 << 10),
    "86": Multiprocessor(48, 16, 100 << 10),
    "89": Multiprocessor(48, 24, 100 << 10),
    "90": Multiprocessor(64, 32, 228 << 10),
    "100": Multiprocessor(64, 32, 228 << 10),
    "120": Multiprocessor(48, 24, 100 << 10),
}
ARCHITECTURES = of_night(tuple(MULTIPROCESSORS), ("90",))
# What runs another architecture's machine code, as the wheels have it: of setup.py's 8.0 and 9.0.
MACHINE_CODE = {"86": "80", "89": "80"}


def round_up(value, unit):
    return -(-value // unit) * unit


def blocks_per_sm(arch, threads, registers, shared):
    """Blocks of so many threads, registers a thread and bytes of shared memory that an SM holds.

    Registers are handed out 256 to a warp at a time and lie in the SM's four quarters, so that a
    quarter holds whole warps; shared memory is handed out in 128 bytes, 256 before Ampere.
    """
    sm = MULTIPROCESSORS[arch]
    warps = -(-threads // 32)
    room = 4 * (sm.registers // 4 // round_up(32 * registers, 256))
    memory = round_up(shared + sm.reserved, 256 if arch == "75" else 128)
    by_memory = sm.shared // memory if memory else sm.blocks
    return min(sm.blocks, sm.warps // warps, room // warps, by_memory)


# ---- what nvcc made -----------------------------------------------------------------------------


@dataclass
class Kernel:
    """What ptxas and cuobjdump say of a kernel on an architecture."""

    name: str  # mangled
    arch: str  # "90"
    registers: int
    stack: int
    shared: int  # bytes, static
    spills: int  # bytes, stores and loads
    threads: (
        int  # a block at most, and blocks an SM at least: its __launch_bounds__; 0 if not given
    )
    blocks: int
    opcodes: dict = field(default_factory=dict)  # {"LDG.E.128.CONSTANT": how many in the text}
    local_in_loops: int = 0  # accesses to local memory in innermost loops, which go over elements

    def __str__(self):
        return f"sm_{self.arch} {demangled(self.name)}"

    @property
    def function(self):
        """tile_kernel of tile_kernel<float, ...>(...)."""
        return re.match(r"\w+", demangled(self.name))[0]

    def has(self, opcode):
        return any(opcode.match(name) for name in self.opcodes)


@functools.cache
def demangled(name):
    text = build.output_of("c++filt", "-p", name).strip() or name
    for scope in ("(anonymous namespace)::", "kdkernels::cuda::", "kdkernels::math::"):
        text = text.replace(scope, "")
    return text.removeprefix("void ")


def tool(name):
    """The toolkit's, PATH's or PyPI's; a cuobjdump is one with nvdisasm beside it."""
    if ptx.toolkit() is None:
        pytest.skip("needs nvcc")
    folders = [Path(ptx.toolkit().nvcc).parent, *os.environ.get("PATH", "").split(os.pathsep)]
    folders += [folder / "bin" for folder in build.nvidia_wheel_folders()]
    wanted = (name, "nvdisasm") if name == "cuobjdump" else (name,)
    for folder in folders:
        if all(os.access(Path(folder, program), os.X_OK) for program in wanted):
            return str(Path(folder, name))
    return pytest.skip(f"no {name}: `pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm`")


def wrong_lines(said):
    """What is no mere remark in what a compiler said."""
    return [line for line in said.splitlines() if re.search(r"\b(warning|error|fatal)\b", line)]


def compiled(source):
    """The objects of a .cu file, oldest PTX first; the compilers must have no warning."""
    include = launchers.INCLUDE
    archs = of_night(launchers.PTX_ARCHS, launchers.PTX_ARCHS[-1:])
    objects = [ptx.compiled([source], a, include=include)[0] for a in archs]
    wrong = [
        line for path in objects for line in wrong_lines(path.with_suffix(".said").read_text())
    ]
    assert not wrong, "\n".join(wrong)
    return objects


def assembled(objects, folder):
    """The kernels of a .cu file on each of ARCHITECTURES."""
    texts = {}
    for number, path in enumerate(objects):
        (folder / str(number)).mkdir()
        command = [tool("cuobjdump"), "-xptx", "all", path]
        subprocess.run(command, cwd=folder / str(number), check=True, capture_output=True)
        for text in (folder / str(number)).glob("*.ptx"):
            texts[int(re.search(r"sm_(\d+)", text.name)[1])] = text

    def on(arch):
        text = texts[max(number for number in texts if number <= int(arch))]
        return kernels_of(text, arch, folder / f"{arch}.cubin")

    own = sorted({MACHINE_CODE.get(arch, arch) for arch in ARCHITECTURES}, key=int)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found = dict(zip(own, pool.map(on, own), strict=True))
    return [
        replace(kernel, arch=arch)
        for arch in ARCHITECTURES
        for kernel in found[MACHINE_CODE.get(arch, arch)]
    ]


def kernels_of(text, arch, cubin):
    """The kernels of PTX on an architecture, with what ptxas says of them, and their opcodes."""
    flags = [flag for flag in build.NVCC_FLAGS if "fmad" in flag]
    command = [tool("ptxas"), f"-arch=sm_{arch}", *flags, "-v", text, "-o", cubin]
    done = subprocess.run(command, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0 and not wrong_lines(said), said
    bounds, kernels = launch_bounds(text), {}
    pattern = (
        r"entry function '(\S+)' for 'sm_\w+'.*?(\d+) bytes stack.*?(\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)"
    )
    for name, stack, stores, loads, registers, rest in re.findall(pattern, said, re.DOTALL):
        shared = re.search(r"(\d+) bytes smem", rest)
        kernels[name] = Kernel(
            *(name, arch, int(registers), int(stack), int(shared[1]) if shared else 0),
            *(int(stores) + int(loads), *bounds[name]),
        )
    for name, text in disassembled(cubin):
        kernels[name].opcodes = dict(Counter(opcode for _, opcode, _ in text))
        kernels[name].local_in_loops = local_in_loops(text)
    return kernels.values()


def launch_bounds(path):
    """{kernel: (threads, blocks)} in PTX."""
    bounds = {}
    text = path.read_text()
    for name, directives in re.findall(r"\.entry (\S+?)\(.*?\)([^{]*)\{", text, re.DOTALL):
        found = [re.search(rf"\.{kind} (\d+)", directives) for kind in ("maxntid", "minnctapersm")]
        bounds[name] = tuple(int(match[1]) if match else 0 for match in found)
    return bounds


def disassembled(cubin):
    """(name, [(address, opcode, operands)]) of each kernel in a cubin."""
    instruction = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*)")
    command = [tool("cuobjdump"), "-sass", cubin]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for function in text.split("Function : ")[1:]:
        found = map(instruction.match, function.splitlines())
        yield function.split()[0], [(int(m[1], 16), m[2], m[3]) for m in found if m]


def local_in_loops(text):
    """How many instructions in loops that hold no other loop access local memory."""
    loops = set()
    for address, opcode, operands in text:
        target = re.search(r"\b0x([0-9a-f]+)", operands) if opcode.startswith("BRA") else None
        if target and int(target[1], 16) <= address:
            loops.add((int(target[1], 16), address))
    inner = [
        (first, last)
        for first, last in loops
        if not any((a, b) != (first, last) and first <= a and b <= last for a, b in loops)
    ]
    local = [address for address, opcode, _ in text if re.match("LDL|STL", opcode)]
    return sum(any(first <= address <= last for first, last in inner) for address in local)


@pytest.fixture(scope="module", params=SOURCES, ids=lambda path: path.name)
def kernels(request, tmp_path_factory):
    """Every kernel of a file on each of ARCHITECTURES."""
    objects = compiled(request.param)  # their names tell their contents
    words = [Path(__file__).read_text(), tool("ptxas"), tool("cuobjdump")]
    words += map(str, (ARCHITECTURES, *objects))
    key = hashlib.sha256(" ".join(words).encode()).hexdigest()[:16]
    kept = CACHE / f"{request.param.stem}-{key}.json"
    if not kept.exists():
        found = assembled(objects, tmp_path_factory.mktemp("cubin"))
        CACHE.mkdir(parents=True, exist_ok=True)
        for old in CACHE.glob(f"{request.param.stem}-*.json"):
            old.unlink()
        kept.with_suffix(".new").write_text(json.dumps([vars(kernel) for kernel in found]))
        kept.with_suffix(".new").replace(kept)
    return [Kernel(**facts) for facts in json.loads(kept.read_text())]


MOST_SPILLED = 96  # bytes, stores and loads


PLANTED = """
__global__ void four(const float4* x, float4* y) { y[threadIdx.x] = x[threadIdx.x]; }
__global__ void __launch_bounds__(256, 4) one(float* x) { x[threadIdx.x] += 1; }
__global__ void local(int* x) {
  int kept[64] = {};
  for (int i = 0; i < 1000; ++i) kept[x[i] & 63] += i;
  for (int i = 0; i < 64; ++i) x[i] = kept[i];
}
"""


def test_the_ptx_is_made_as_setup_makes_it():
    """But for flags of the host's compiler, and for the types of 16 bits, which torch restricts."""
    device = {flag for flag in build.NVCC_FLAGS if not flag.startswith(("-X", "-f", "-U"))}
    assert {"-O3", "--fmad=false"} <= device == set(ptx.NVCC_FLAGS) - {"--no-compress"}


def test_faults_would_be_found(tmp_path):
    source = tmp_path / "planted.cu"
    source.write_text(PLANTED)
    found = {(k.function, k.arch): k for k in assembled(compiled(source), tmp_path)}
    assert len(found) == 3 * len(ARCHITECTURES)
    for (function, _), kernel in found.items():
        vector = kernel.has(VECTOR_LOAD), kernel.has(VECTOR_STORE)
        assert vector == (function == "four",) * 2
        assert (kernel.stack > 0) == (kernel.local_in_loops > 0) == (function == "local")
        assert (kernel.threads, kernel.blocks) == ((256, 4) if function == "one" else (0, 0))
    source.write_text("__global__ void k(int* x) { int unused = 1; x[0] = 2; }")
    with pytest.raises(AssertionError, match="unused"):
        compiled(source)


def none_of(kernels, said=""):
    assert not kernels, "\n".join(f"{kernel}{said and ': '}{said}" for kernel in kernels)


# ---- the gates ----------------------------------------------------------------------------------


def test_every_architecture_has_every_kernel(kernels):
    names = {
        arch: {k.name for k in kernels if k.arch == arch} for arch in {k.arch for k in kernels}
    }
    assert set(names) == set(ARCHITECTURES)
    assert len(set(map(frozenset, names.values()))) == 1
    assert all(kernel.opcodes for kernel in kernels)


def test_values_stay_in_registers(kernels):
    """But for some that are used once a row."""
    none_of([k for k in kernels if k.local_in_loops or max(k.spills, k.stack) > MOST_SPILLED])


def test_global_memory_moves_16_bytes_at_a_time(kernels):
    wanted = [k for k in kernels if k.function not in NO_VECTOR_LOADS]
    none_of([k for k in wanted if not k.has(VECTOR_LOAD)], "no 16-byte load")
    wanted = [k for k in kernels if k.function not in NO_VECTOR_STORES]
    none_of([k for k in wanted if not k.has(VECTOR_STORE)], "no 16-byte store")


def test_launch_bounds_hold(kernels):
    """As many blocks live on an SM as __launch_bounds__ asks for, with static shared memory.

    But for Turing, whose 64 KB of shared memory hold fewer than its registers do.
    """
    assert all(kernel.threads for kernel in kernels)

    def fits(k):
        shared = 0 if k.arch == "75" else k.shared
        return blocks_per_sm(k.arch, k.threads, k.registers, shared) >= k.blocks

    none_of([kernel for kernel in kernels if not fits(kernel)])


# ---- occupancy, as csrc/cuda/plan.h counts on it ------------------------------------------------

CLASSES = [
    1,
    2,
    3,
    7,
    10,
    32,
    33,
    100,
    129,
    257,
    500,
    512,
    513,
    1000,
    1024,
    1025,
    2048,
    5000,
    10000,
]
CLASSES += [16384, 21841, 32000, 32001, 50257, 65536, 100000, 128256, 151936, 200000, 256000, 10**6]
SIZES = {"float": 4, "double": 8, "__half": 2, "__nv_bfloat16": 2}
# The kernel of each Walk, in their order.
WALKS = ["tile_kernel<", "warp_kernel<", "row_kernel<.*true, ", "row_kernel<.*false, "]

PLAN = """
#include "cuda/plan.h"
using namespace kdkernels::cuda;
extern "C" void distillation(long classes, int size, int extra, bool third_sweep, int arch,
                             int shared_per_block, int shared_per_sm, int* out) {
  Device device = {arch, 100, shared_per_block, shared_per_sm};
  DistillationPlan p =
      plan_distillation(classes, size, static_cast<Extra>(extra), device, third_sweep);
  out[0] = static_cast<int>(p.walk);
  out[1] = p.threads;
  out[2] = p.shared;
  out[3] = kBusyThreads;
}
extern "C" void divergence(long classes, long entries, int size, bool transformed, int sides,
                           int arch, int shared_per_block, int shared_per_sm, int* out) {
  Device device = {arch, 100, shared_per_block, shared_per_sm};
  DivergencePlan p = plan_divergence(classes, entries, size, transformed, sides, device);
  out[0] = p.threads;
  out[1] = p.shared;
  out[2] = kDivergenceStatic;
}
"""

OCCUPANCY = """
#include <cuda_occupancy.h>
extern "C" int blocks(int major, int minor, int warps, long shared_per_sm, long reserved,
                      int threads, int registers, long shared) {
  cudaOccDeviceProp device;
  device.computeMajor = major;
  device.computeMinor = minor;
  device.maxThreadsPerBlock = 1024;
  device.maxThreadsPerMultiprocessor = 32 * warps;
  device.regsPerBlock = device.regsPerMultiprocessor = 65536;
  device.warpSize = 32;
  device.sharedMemPerBlock = 48 << 10;
  device.sharedMemPerMultiprocessor = shared_per_sm;
  device.numSms = 100;
  device.sharedMemPerBlockOptin = shared_per_sm - reserved;
  device.reservedSharedMemPerBlock = reserved;
  cudaOccFuncAttributes kernel;
  kernel.maxThreadsPerBlock = 1024;
  kernel.numRegs = registers;
  kernel.sharedSizeBytes = 0;
  kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
  kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
  kernel.maxDynamicSharedSizeBytes = shared_per_sm - reserved;
  kernel.numBlockBarriers = 1;
  cudaOccDeviceState state;
  state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
  cudaOccResult r;
  if (cudaOccMaxActiveBlocksPerMultiprocessor(&r, &device, &kernel, &state, threads, shared))
    return -1;
  return r.activeBlocksPerMultiprocessor;
}
"""


def library(text, folder, *includes):
    """A shared library of a piece of C++."""
    source, target = folder / "code.cpp", folder / "code.so"
    source.write_text(text)
    compiler = os.environ.get("CXX", "c++").split()
    flags = ["-std=c++20", "-shared", "-fPIC", *(f"-I{path}" for path in includes)]
    subprocess.run([*compiler, *flags, str(source), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


def test_blocks_per_sm_is_what_nvidia_computes(tmp_path):
    blocks = library(OCCUPANCY, tmp_path, Path(ptx.toolkit().home, "include")).blocks
    blocks.argtypes = (
        [ctypes.c_int] * 3 + [ctypes.c_long] * 2 + [ctypes.c_int] * 2 + [ctypes.c_long]
    )
    for arch, sm in MULTIPROCESSORS.items():
        major, minor = divmod(int(arch), 10)
        for threads in (32, 96, 128, 256, 384, 512, 1024):
            for registers in (16, 32, 33, 40, 56, 57, 64, 72, 80, 81, 96, 128, 168, 255):
                for shared in (0, 1000, 8 << 10, 20000, 48 << 10, 63 << 10, 99 << 10, 200000):
                    if shared > sm.shared - sm.reserved:
                        continue
                    want = blocks(
                        major, minor, sm.warps, sm.shared, sm.reserved, threads, registers, shared
                    )
                    got = blocks_per_sm(arch, threads, registers, shared)
                    assert got == want, (arch, threads, registers, shared)


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    """{(arch, element size, Extra, three sweeps, walk): {(threads, dynamic shared bytes)}} over
    CLASSES; "busy"."""
    plan = library(PLAN, tmp_path_factory.mktemp("plan"), ROOT / "csrc").distillation
    found = {}
    for arch in ARCHITECTURES:
        sm = MULTIPROCESSORS[arch]
        shared = (ctypes.c_int(sm.shared - sm.reserved), ctypes.c_int(sm.shared))
        for classes in CLASSES:
            for size, extra, three in itertools.product((2, 4, 8), range(3), (False, True)):
                if size == 8 and (extra or three):
                    continue  # of fp64 there are no such kernels
                out = (ctypes.c_int * 4)()
                plan(ctypes.c_long(classes), size, extra, three, int(arch), *shared, out)
                found.setdefault((arch, size, extra, three, out[0]), set()).add((out[1], out[2]))
                found["busy"] = out[3]
    return found


@pytest.mark.parametrize(
    "kernels", [ROOT / "csrc/cuda/divergence.cu"], ids=["divergence.cu"], indirect=True
)
def test_a_divergence_has_room_for_its_kernel(kernels, tmp_path):
    """A block of any plan starts, with the static shared memory that the plan leaves room for."""
    plan = library(PLAN, tmp_path, ROOT / "csrc").divergence
    for kernel in kernels:
        sm, size = (
            MULTIPROCESSORS[kernel.arch],
            SIZES[re.search(r"<(\w+)", demangled(kernel.name))[1]],
        )
        for classes, transformed, (entries, sides) in itertools.product(
            CLASSES, (False, True), ((0, 2), (0, 1), (1, 0), (64, 1), (1024, 0), (1024, 1))
        ):
            out = (ctypes.c_int * 3)()
            plan(
                *(ctypes.c_long(classes), ctypes.c_long(entries), size, ctypes.c_bool(transformed)),
                *(sides, int(kernel.arch), sm.shared - sm.reserved, sm.shared, out),
            )
            threads, shared, static = out
            if ", true>" in demangled(kernel.name):  # options per row
                threads = min(threads, kernel.threads)  # as the launcher has it
            assert kernel.shared <= static, str(kernel)
            blocks = blocks_per_sm(kernel.arch, threads, kernel.registers, shared + kernel.shared)
            assert threads <= kernel.threads and blocks >= 1, (
                str(kernel),
                classes,
                threads,
                shared,
            )


# The files of each Extra of cuda/plan.h, in its order.
SWEEPS = ["sweeps.cu", "sweeps_statistics.cu", "sweeps_transforms.cu"]


@pytest.mark.parametrize(
    "kernels", [ROOT / "csrc/cuda" / name for name in SWEEPS], ids=SWEEPS, indirect=True
)
def test_a_plan_has_room_for_its_kernel(kernels, plans):
    """A block starts; and registers leave as many on an SM as the plan's table counts on."""
    wrong, used = [], set()
    for kernel in kernels:
        name = demangled(kernel.name)
        walk = next((i for i, pattern in enumerate(WALKS) if re.search(pattern, name)), None)
        if walk is None:
            continue
        size, three = SIZES[re.search(r"<(\w+)", name)[1]], "AnySweeps" in name
        kind = (kernel.arch, size, int(re.search(r"\(Extra\)(\d)", name)[1]), three, walk)
        used.add(kind)
        for threads, shared in plans.get(kind, ()):
            shared += kernel.shared
            limit = MULTIPROCESSORS[kernel.arch].shared - MULTIPROCESSORS[kernel.arch].reserved
            blocks = blocks_per_sm(kernel.arch, threads, kernel.registers, shared)
            by_memory = blocks_per_sm(kernel.arch, threads, 16, shared)
            wanted = min(by_memory, kernel.blocks or -(-plans["busy"] // threads))
            if threads > kernel.threads or shared > limit or blocks < max(wanted, 1):
                wrong.append(
                    f"{kernel}: {kernel.registers} registers, {threads} threads, {shared} bytes: "
                    f"{blocks} blocks an SM, {wanted} wanted"
                )
    assert not wrong, "\n".join(wrong)
    (extra,) = {kind[2] for kind in used}
    assert used >= {kind for kind in plans if kind != "busy" and kind[2] == extra}
