"""How a time is made of what the emulator counts; the launches of an op come one after another.

moved    bytes from and to memory: the sectors of all requests, or, where all that the blocks on
         the GPU at one time touch fits its L2, each tensor of the launch once; nothing stays
         there from one launch to the next
units    the PTX instructions that ran, by the unit that executes them, times what ptxas made of
         the kernel's innermost loops with special functions (of all of it where there are none):
         SASS instructions of that unit over PTX instructions, both static and relative to those
         of FP32 (it merges logic, drops conversions, adds addressing)
slots    likewise, warp instructions of any unit
latency  the critical path of the blocks that run one after another in one place: as many as
         there are blocks, over those that the GPU holds by ptxas' registers, shared memory and
         threads. Blocks whose paths differ share the places; the longest has one to itself
time     the longest of moved / bandwidth, each unit's instructions over its rate on as many SMs
         as there are blocks, and latency; no launch overhead
"""

import collections
import dataclasses
import functools
import importlib.util
import math
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

# NVIDIA H100 Tensor Core GPU datasheet (SXM): 3.35 TB/s, 67 TFLOPS in FP32. NVIDIA H100 Tensor Core
# GPU Architecture (whitepaper): 132 SMs, 128 FP32 lanes an SM, 50 MB of L2. The boost clock is what
# makes them one: 67e12 / (132 * 128 * 2).
BANDWIDTH, SMS, L2, CLOCK = 3.35e12, 132, 50e6, 1.98e9
SECTOR = 32  # bytes that memory moves at least
# Results a clock and SM. CUDA C++ Programming Guide, "Arithmetic Instructions", throughput table,
# compute capability 9.0: FP32 add, multiply and fma 128, FP64 64; exp2, log2, reciprocal, root 16;
# 32-bit integer arithmetic, comparisons and conversions 64. Nsight Compute documentation,
# "Pipelines": integer multiplication runs beside FP32 on FMA, logic, comparisons and other integer
# work on ALU. The guide's "Compute Capability 9.0": 4 warp schedulers, an instruction a clock each;
# shared memory: 32 banks of 4 bytes a clock, one pass.
RATES = {"slots": 4, "mufu": 16, "fma": 128, "multiply": 64, "alu": 64, "fp64": 64, "shared": 1}
# CUDA C++ Programming Guide, "Technical specifications per compute capability", 9.0.
THREADS_PER_SM, BLOCKS_PER_SM, SHARED_PER_SM = 2048, 32, 228 << 10
# Likewise: a quarter of an SM has 16,384 registers, which warps get 256 at a time; each block takes
# 1 KB of shared memory beside its own.
REGISTERS_PER_QUARTER, REGISTERS_AT_A_TIME, SHARED_OF_A_BLOCK = 16384, 256, 1024

# The unit of a SASS instruction, by the beginning of its name: "CUDA Binary Utilities", the
# instruction set of Hopper, beside the pipelines named above. Those of the uniform datapath, loads
# of constants and control flow take an issue slot only.
SASS = {
    "mufu": ("MUFU",),
    "multiply": ("IMAD", "IDP"),
    "fma": ("FADD", "FMUL", "FFMA", "HADD", "HMUL", "HFMA"),
    "fp64": ("DADD", "DMUL", "DFMA", "DSETP"),
    "memory": (
        "LDG",
        "LDS",
        "LDL",
        "LD.",
        "STG",
        "STS",
        "STL",
        "ST.",
        "ATOM",
        "RED",
        "SHFL",
        "UBLK",
    ),
    "alu": (
        *(
            "LOP",
            "PLOP",
            "IADD",
            "VIADD",
            "ISETP",
            "SEL",
            "FSEL",
            "FSETP",
            "FMNMX",
            "IMNMX",
            "VIMNMX",
        ),
        *("SHF", "LEA", "PRMT", "F2FP", "I2F", "F2I", "F2F", "FRND", "MOV", "IABS", "SGXT", "BMSK"),
        *("HSETP", "HMNMX", "HSET", "FSET", "P2R", "R2P", "VOTE"),
    ),
}
# What one PTX instruction takes in SASS beside an instruction of its own unit, on the path that
# ordinary numbers take, as ptxas 13.0 makes it for sm_90a.
EXPANDED = {
    "div.rn.f32": {"mufu": 1, "fma": 4, "alu": 2},
    "div.full.f32": {"mufu": 1, "fma": 4, "alu": 2},
    "rcp.rn.f32": {"mufu": 1, "fma": 2, "alu": 4},
    "sqrt.rn.f32": {"mufu": 1, "fma": 3, "alu": 3},
    "ex2.approx.f32": {"fma": 2, "alu": 1},
    "lg2.approx.f32": {"fma": 2, "alu": 1},
    "rsqrt.approx.f32": {"fma": 2, "alu": 1},
}


@dataclasses.dataclass
class Cost:
    """One launch, or one op that PyTorch runs by itself: only its bytes count."""

    kernel: str
    blocks: float = SMS
    resident: int = SMS  # blocks that the GPU runs at one time
    moved: float = 0  # bytes
    useful: float = 0  # bytes that threads asked for
    sectors: float = 0
    mufu: float = 0  # thread instructions
    fma: float = 0  # FP32 and integer multiplication
    multiply: float = 0  # integer multiplication alone
    alu: float = 0
    fp64: float = 0
    memory: float = 0
    slots: float = 0  # warp instructions
    shared: float = 0  # passes
    path: float = 0  # cycles of the longest block
    mean_path: float = 0  # of a block
    registers: int = 0
    spills: int = 0  # bytes a thread

    def seconds(self):
        sms = min(self.blocks, SMS) * CLOCK
        compute = {name: getattr(self, name) / (sms * rate) for name, rate in RATES.items()}
        waves = math.ceil(self.blocks / self.resident)
        latency = max(self.path, waves * self.mean_path) / CLOCK
        return {"bytes": self.moved / BANDWIDTH, **compute, "latency": latency}


def unit(opcode):
    """The unit that executes a PTX instruction; None where that is an issue slot and no more."""
    name, *words = opcode.split(".")
    if name in ("ex2", "lg2", "sin", "cos", "tanh", "rcp", "sqrt", "rsqrt") and "rn" not in words:
        return "mufu"
    if name in ("ld", "st", "atom", "red", "shfl", "cp"):
        return "memory"
    if name in ("bra", "ret", "bar", "barrier", "call", "membar", "fence", "exit", "trap"):
        return None
    if words[-1:] == ["f64"] and name != "cvt":
        return "fp64"
    if words[-1:] == ["f32"] and name in ("add", "sub", "mul", "fma", "mad", "div", "rcp", "sqrt"):
        return "fma"
    if words[-1:] != ["f32"] and name in ("mul", "mad", "madc", "mul24", "mad24", "dp4a", "dp2a"):
        return "multiply"
    return "alu"


def is_move(opcode):
    """Nothing that a machine does: registers are ptxas' choice, parameters are operands."""
    return re.match(r"mov\b|cvta\b|(ld|st)\.param\b|createpolicy\b", opcode)


def by_unit(opcodes):
    """{unit, and "slots" for all: instructions} of {PTX opcode: how many}."""
    units = collections.Counter()
    for opcode, n in opcodes.items():
        if is_move(opcode):
            continue
        units.update({unit(opcode): n, "slots": n})
        for other, more in EXPANDED.get(opcode, {}).items():
            units.update({other: n * more, "slots": n * more})
    return units


def cost(done, text, blocks, each_once):
    """The Cost of a launch of `blocks` blocks, of which those of `done` ran."""
    counts, scale = done.counts, blocks / math.prod(done.grid)
    registers, spills, ratio = compiled(text, done.kernel)
    ran = by_unit(counts["opcodes"])
    of_unit = {name: scale * ratio[name] * ran[name] for name in SASS}
    of_unit["fma"] += of_unit["multiply"]
    warps, threads = counts["warp_instructions"], counts["thread_instructions"]
    issued = sum(warps.values()) - warps["move"]
    lanes = (sum(threads.values()) - threads["move"]) / issued  # that are active in the mean
    resident = resident_blocks(done, registers)
    traffic = counts["memory"].items()
    of_global = [t for what, t in traffic if what.startswith(("global", "generic"))]
    of_shared = [t for what, t in traffic if what.startswith("shared")]
    sectors = scale * sum(t["sectors"] for t in of_global)
    return Cost(
        done.kernel,
        blocks,
        resident,
        moved=moved(SECTOR * sectors, each_once, blocks, resident),
        useful=scale * sum(min(t["bytes"], SECTOR * t["sectors"]) for t in of_global),
        sectors=sectors,
        slots=scale * ratio["slots"] * ran["slots"] / lanes,
        shared=scale
        * sum(max(t["requests"], t["bytes"] / 128) + t["conflicts"] for t in of_shared),
        path=done.critical_path,
        mean_path=done.critical_path_mean,
        registers=registers,
        spills=spills,
        **of_unit,
    )


def resident_blocks(done, registers):
    """How many blocks of a launch the GPU holds at one time."""
    warps = math.ceil(math.prod(done.block) / 32)
    a_warp = math.ceil(32 * registers / REGISTERS_AT_A_TIME) * REGISTERS_AT_A_TIME
    shared = SHARED_OF_A_BLOCK + done.static_shared + done.dynamic_shared
    return SMS * min(
        BLOCKS_PER_SM,
        THREADS_PER_SM // (32 * warps),
        4 * (REGISTERS_PER_QUARTER // a_warp) // warps,
        SHARED_PER_SM // shared,
    )


def moved(requested, each_once, blocks, resident):
    at_least = min(requested, each_once)
    return at_least if at_least * min(1, resident / blocks) <= L2 else requested


def closing(text):
    """Where the first brace of a text is closed; inline assembly has braces of its own."""
    depth = 0
    for brace in re.finditer(r"[{}]", text[(begin := text.index("\n{")) :]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return begin + brace.start()
    raise ValueError("a kernel without end")


# An instruction with what it jumps to, or a label.
PTX_LINE = re.compile(
    r"^(?P<label>\$L\w+):|^\s*(?:\{\s*)?(?:@!?%\w+\s+)?(?P<name>[a-z][\w:.]*)(?=[\s;])"
    r"(?:\s+(?P<target>\$L\w+);)?"
)
SASS_LINE = re.compile(
    r"^(?P<label>\.L_\w+):|/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(?P<name>[A-Z][\w.]*)"
    r"(?:.*`\((?P<target>\.L_\w+)\))?"
)


def instructions(listing, line, special):
    """All of a listing, and those of the innermost loops with special functions."""
    names, jumps, labels = [], [], {}
    for found in filter(None, map(line.search, listing.splitlines())):
        if found["label"]:
            labels[found["label"]] = len(names)
        elif found["name"] != "NOP":
            jumps.append((found["target"], len(names)))
            names.append(found["name"])
    loops = [(labels[to], end + 1) for to, end in jumps if labels.get(to, end + 1) <= end]
    loops = [loop for loop in loops if any(re.match(special, x) for x in names[slice(*loop)])]
    inner = [
        (a, b)
        for a, b in loops
        if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops)
    ]
    return names, [name for loop in inner for name in names[slice(*loop)]]


@functools.cache
def compiled(text, kernel):
    """Registers and bytes spilled a thread, and {unit or "slots": SASS over PTX instructions}."""
    common, *functions = re.split(r"(?m)^(?=(?:\.visible |\.weak )?\.entry )", text)
    (body,) = [f for f in functions if re.match(rf"[.a-z ]*{re.escape(kernel)}\(", f)]
    body = re.sub(r"(?m)^\s*\.loc\b.*|//.*", "", body[: closing(body) + 1])
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "k.ptx").write_text(common + body)

        def output(*command):
            return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)

        arch = re.search(r"(?m)^\.target (\w+)", common)[1]
        said = output(tool("ptxas"), "-v", f"-arch={arch}", "k.ptx", "-o", "k.cubin").stderr
        listing = output(tool("nvdisasm"), "-c", "k.cubin").stdout
        listing = re.split(r"(?m)^\$__internal\S*:", listing)[0]
    registers = int(re.search(r"Used (\d+) registers", said)[1])
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    made, hot_made = instructions(listing, SASS_LINE, r"MUFU\.(EX2|LG2)")
    given, hot_given = instructions(body, PTX_LINE, r"(ex2|lg2)\.approx")
    ratio = (
        of_units(made, given, least=0)
        | of_units(hot_made, hot_given)
        | {"mufu": 1.0, "memory": 1.0}
    )
    return registers, sum(map(int, spilled.groups())), ratio


def of_units(made, given, least=8):
    """{unit or "slots": SASS over PTX instructions} of the units with so many PTX instructions."""
    units = by_unit(collections.Counter(given))
    ratio = {u: sum(n.startswith(SASS[u]) for n in made) / max(1, units[u]) for u in SASS}
    ratio["slots"] = len(made) / max(1, units["slots"])
    # ptxas repeats the bodies of loops too, which FP32 shows: it merges some of it, and adds none.
    repeated = max(1.0, ratio["fma"])
    return {u: r / repeated for u, r in ratio.items() if units[u] >= least}


@functools.cache
def tool(name):
    """A program of the CUDA toolkit; Triton brings its own, and the toolkit may lack some."""
    import ptx

    folders = [Path(ptx.toolkit().nvcc).parent]
    if triton := importlib.util.find_spec("triton"):
        folders.append(Path(triton.origin).parent / "backends/nvidia/bin")
    return shutil.which(name, path=":".join(map(str, folders))) or name
