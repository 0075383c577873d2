"""What the CUDA kernels cost on an H100, counted without one: python bench/counts.py

Our kernels and the peers' (Liger, torch.compile) run in the emulator of tests/ptx, which counts the
bytes and instructions of their PTX; the H100's limits make them times. Nothing is timed. Needs nvcc
for ours, Triton for the peers'. The peers' launches have their true size, but only their first
blocks run and stand for the others; of ours few rows run, or a smaller size.

How a time is made of counts; the launches of an op come one after another:

    moved   bytes from and to memory: the sectors of all requests, or, where all that the blocks on
            the GPU at one time touch fits its L2, each tensor of the launch once; nothing stays
            there from one launch to the next
    units   the PTX instructions that ran, by the unit that executes them, times what ptxas made of
            the kernel: its SASS instructions of that unit over its PTX instructions, both static
            and relative to those of FP32 (it merges logic, drops conversions, adds addressing)
    slots   likewise, warp instructions of any unit
    time    the longest of moved / bandwidth and each unit's instructions over its rate, on as many
            SMs as there are blocks; no latency, no launch overhead
"""

import argparse
import collections
import dataclasses
import functools
import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch.nn import functional as F

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
from kdkernels.benchmark import resnet18  # noqa: E402

# NVIDIA H100 Tensor Core GPU datasheet (SXM): 3.35 TB/s, 67 TFLOPS in FP32. NVIDIA H100 Tensor Core
# GPU Architecture (whitepaper): 132 SMs, 128 FP32 lanes an SM, 50 MB of L2. The boost clock is what
# makes them one: 67e12 / (132 * 128 * 2).
BANDWIDTH, SMS, L2, CLOCK = 3.35e12, 132, 50e6, 1.98e9
# Results a clock and SM. CUDA C++ Programming Guide, "Arithmetic Instructions", throughput table,
# compute capability 9.0: FP32 add, multiply and fma 128, FP64 64; exp2, log2, reciprocal, root 16;
# 32-bit integer arithmetic, comparisons and conversions 64. Nsight Compute documentation,
# "Pipelines": integer multiplication runs beside FP32 on FMA, logic, comparisons and other integer
# work on ALU. The guide's "Compute Capability 9.0": 4 warp schedulers, an instruction a clock each;
# shared memory: 32 banks of 4 bytes a clock, one pass.
RATES = {
    "slots": 4,
    "mufu": 16,
    "fma": 128,
    "multiply": 64,
    "alu": 64,
    "fp64": 64,
    "shared": 1,
}
# CUDA C++ Programming Guide, "Technical specifications per compute capability", 9.0.
THREADS_PER_SM, BLOCKS_PER_SM, REGISTERS_PER_SM, SHARED_PER_SM = 2048, 32, 65536, 228 << 10

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
CLASSES = [10, 1000, 32000, 50257, 128256, 200000]
ELEMENTS = 1 << 24  # of a peer's loss, in at least 512 rows: its launches fill the GPU
ELEMENTS_OF_OURS = 1 << 21  # likewise; all of them run, or a few of the 512 rows


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
    registers: int = 0
    spills: int = 0  # bytes a thread

    def seconds(self):
        sms = min(self.blocks, SMS) * CLOCK
        compute = {name: getattr(self, name) / (sms * rate) for name, rate in RATES.items()}
        return {"bytes": self.moved / BANDWIDTH, **compute}


# ---- counting ------------------------------------------------------------------------------------


class Counter:
    """Runs the launches that it is called with in the emulator, their first blocks at least."""

    def __init__(self, blocks=None):
        self.blocks, self.costs = blocks, []

    def __call__(self, launch):
        if not hasattr(launch, "ptx"):
            total = launch.read + launch.written
            self.costs.append(Cost(f"PyTorch's {launch.op}", moved=total, useful=total))
            return
        x, *yz = launch.grid
        part = (min(x, self.blocks or x), *yz)
        with library(launch.ptx).run(same_values=True) as run:
            args = []
            for value in launch.args:
                if torch.is_tensor(value):
                    run.buffer(torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage()))
                    value = value.data_ptr()
                args.append(0 if value is None else value)
            run.launch(launch.kernel, part, launch.block, args, shared=launch.shared)
        (done,) = run.launches
        each_once = sum(launch.touched())
        self.costs.append(cost(done, launch.ptx, math.prod(launch.grid), each_once))


@functools.cache
def library(text):
    import ptx

    return ptx.load(text)


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
    block_threads = math.prod(done.block)
    resident = SMS * min(
        BLOCKS_PER_SM,
        THREADS_PER_SM // block_threads,
        REGISTERS_PER_SM // (registers * block_threads),
        SHARED_PER_SM // (1024 + done.static_shared + done.dynamic_shared),
    )
    traffic = counts["memory"].items()
    of_global = [t for what, t in traffic if what.startswith(("global", "generic"))]
    of_shared = [t for what, t in traffic if what.startswith("shared")]
    sectors = scale * sum(t["sectors"] for t in of_global)
    return Cost(
        done.kernel,
        blocks,
        resident,
        moved=moved(32 * sectors, each_once, blocks, resident),
        useful=scale * sum(min(t["bytes"], 32 * t["sectors"]) for t in of_global),
        sectors=sectors,
        slots=scale * ratio["slots"] * ran["slots"] / lanes,
        shared=scale
        * sum(max(t["requests"], t["bytes"] / 128) + t["conflicts"] for t in of_shared),
        registers=registers,
        spills=spills,
        **of_unit,
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
    made = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", listing)
    made = [name for name in made if name != "NOP"]
    given = re.findall(r"(?m)^\s*(?:\{\s*)?(?:@!?%\w+\s+)?([a-z][\w:.]*)(?=[\s;])", body)
    units = by_unit(collections.Counter(given))
    ratio = {u: sum(n.startswith(SASS[u]) for n in made) / max(1, units[u]) for u in SASS}
    ratio["slots"] = len(made) / units["slots"]
    # ptxas repeats the bodies of loops too, which FP32 shows: it merges some of it, and adds none.
    repeated = max(1.0, ratio["fma"])
    ratio = {u: r / repeated for u, r in ratio.items()} | {"mufu": 1.0, "memory": 1.0}
    return registers, sum(map(int, spilled.groups())), ratio


@functools.cache
def tool(name):
    """A program of the CUDA toolkit; Triton brings its own, and the toolkit may lack some."""
    import ptx

    folders = [Path(ptx.toolkit().nvcc).parent]
    if triton := importlib.util.find_spec("triton"):
        folders.append(Path(triton.origin).parent / "backends/nvidia/bin")
    return shutil.which(name, path=":".join(map(str, folders))) or name


# ---- the peers -----------------------------------------------------------------------------------

TEMPERATURE, ALPHA, STD = 2.0, 0.5, 0.1


def rows_of(classes):
    return max(512, ELEMENTS // classes)


LISTS = {
    "one tensor": [1 << 24],
    "ResNet-18's": resnet18(),
}


def distillation(z, t, labels):
    """What people write; kdkernels.reference without the rows that it drops."""
    log_q, p = F.log_softmax(z / TEMPERATURE, -1), F.softmax(t / TEMPERATURE, -1)
    return TEMPERATURE**2 * F.kl_div(log_q, p, reduction="batchmean")


def with_labels(z, t, labels):
    return ALPHA * distillation(z, t, labels) + (1 - ALPHA) * F.cross_entropy(z, labels)


def divergence(log_q, p, labels):
    return F.kl_div(log_q, p, reduction="batchmean")


def jsd(z, t, labels):
    return jsd_of_logs(F.log_softmax(z, -1), F.log_softmax(t, -1), labels)


def jsd_of_logs(log_q, log_p, labels):
    log_m = torch.logaddexp(log_q, log_p) - math.log(2)
    return sum((x.exp() * (x - log_m)).sum(-1).mean() / 2 for x in (log_q, log_p))


def cross_entropy(z, t, labels):
    return F.cross_entropy(z, labels)


# The tensors of [rows, classes] that an op must move (two read and one written; one and one), what
# is made of the logits before counting starts, and the op as people write it.
LOSSES = {
    "distillation": (3, lambda z, t: (z, t), distillation),
    "distillation with labels": (3, lambda z, t: (z, t), with_labels),
    "KL of log-probabilities": (3, lambda z, t: (z.log_softmax(-1), t.softmax(-1)), divergence),
    "JSD": (3, lambda z, t: (z, t), jsd),
    "JSD of log-probabilities": (
        3,
        lambda z, t: (z.log_softmax(-1), t.log_softmax(-1)),
        jsd_of_logs,
    ),
    "cross-entropy": (2, lambda z, t: (z, t), cross_entropy),
}


try:
    from liger_kernel import transformers as liger
except ImportError:
    liger = None


def loss_peers():
    """(op, name, whether torch.compile compiles it, call); calls take what LOSSES prepares."""
    for op in ("distillation", "distillation with labels", "JSD", "cross-entropy"):
        yield op, "PyTorch (its bytes alone)", False, LOSSES[op][2]
        yield op, "torch.compile", True, LOSSES[op][2]
    if liger is None:
        return
    kl, js = liger.LigerKLDIVLoss(reduction="batchmean"), liger.LigerJSD()
    ce = liger.LigerCrossEntropyLoss()

    def kl_of_logits(z, t, labels):
        log_q, p = F.log_softmax(z / TEMPERATURE, -1), F.softmax(t / TEMPERATURE, -1)
        return TEMPERATURE**2 * kl(log_q, p)

    yield "distillation", "Liger KLDiv, PyTorch's softmax", False, kl_of_logits
    yield "KL of log-probabilities", "Liger KLDiv", False, lambda q, p, labels: kl(q, p)
    yield (
        "JSD",
        "Liger JSD, PyTorch's softmax",
        False,
        lambda z, t, labels: js(F.log_softmax(z, -1), F.log_softmax(t, -1)),
    )
    yield "JSD of log-probabilities", "Liger JSD", False, lambda q, p, labels: js(q, p)
    yield "cross-entropy", "Liger", False, lambda z, t, labels: ce(z, labels)


def loss_inputs(op, rows, classes, dtype):
    random = torch.Generator().manual_seed(0)
    z, t = (torch.empty(rows, classes).normal_(0, 3, generator=random) for _ in range(2))
    z, t = LOSSES[op][1](z, t)
    labels = torch.randint(classes, (rows,), generator=random)
    return z.to(dtype).requires_grad_(), t.to(dtype), labels


def count_loss(op, compile_it, call, rows, classes, dtype, blocks):
    """The costs of a peer's forward and backward, its loss and its gradient."""
    import peers_ptx

    z, t, labels = loss_inputs(op, rows, classes, dtype)
    torch._dynamo.reset()
    counter = Counter(blocks)
    with peers_ptx.on_cpu(counter, eager=not compile_it):
        loss = (peers_ptx.compiled(call) if compile_it else call)(z, t, labels)
        loss.backward()
    return counter.costs, loss, z.grad


def check_loss(op, name, compile_it, call, dtype):
    """What the emulated kernels of a peer compute is what PyTorch does in fp64."""
    rows, classes = 5, 1000
    _, loss, gradient = count_loss(op, compile_it, call, rows, classes, dtype, None)
    z, t, labels = loss_inputs(op, rows, classes, dtype)
    z = z.detach().double().requires_grad_()
    want = LOSSES[op][2](z, t.double(), labels)
    want.backward()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    message = f"{name}'s {op}: {{}}".format
    torch.testing.assert_close(
        loss.double(), want, rtol=tolerance, atol=tolerance, msg=lambda m: message(m)
    )
    torch.testing.assert_close(
        gradient.double(), z.grad, rtol=tolerance, atol=tolerance / rows, msg=lambda m: message(m)
    )


def count_noise(sizes, dtype, blocks):
    import peers_ptx

    tensors = [torch.zeros(n, dtype=dtype) for n in sizes]
    torch._dynamo.reset()
    counter = Counter(blocks)
    add = peers_ptx.compiled(lambda tensors: [x + STD * torch.randn_like(x) for x in tensors])
    with peers_ptx.on_cpu(counter, eager=False):
        return counter.costs, add(tensors)


# ---- ours ----------------------------------------------------------------------------------------

# Title, launcher, how often an element is read or written, and the case. An update's rule is the
# first of its kind in tests/launchers.py.
NOISY = [
    (f"noise, {name}", "noise", 2, {"distribution": name})
    for name in ("uniform", "rademacher", "truncated_normal", "laplace")
]
NOISY += [
    ("noise, norms too", "noise", 2, {"norms": True}),
    ("noise, a std a channel", "noise", 2, {"pattern": (64, 49)}),
    ("noise, dot product", "noise_dot", 1, {}),
    ("noises of 8 seeds", "combine", 2, {"terms": 8}),
    ("SGD with momentum and noise", "update", 5, {"update": "sgd"}),
    ("AdamW with noise", "update", 7, {"update": "adamw"}),
    ("AdamW", "update", 7, {"update": "adamw", "std": 0.0}),
    ("pSGLD", "update", 5, {"update": "psgld"}),
]


@functools.cache
def ours():
    import launchers

    library = launchers.build()
    texts = re.findall(rb"\.version [^\0]*", library.path.read_bytes())
    return library, [text.decode() for text in texts if b".entry" in text]


def launches_of(op, case):
    """The launches of one case, whose results are what they must be."""
    import launchers

    library, _ = ours()
    with library.run() as run:
        got = op.launch(launchers.emulated(run, library), case)
        run.check()
    op.compare(case, got, op.expected(case))
    return run.launches


def our_costs(op, case_of, each_once, full, some=None):
    """The costs of case_of(full), or what those of `some` and twice as much extrapolate to.

    each_once: the bytes of all tensors of case_of(full), each read or written once.
    """
    _, texts = ours()
    runs = []
    for n in [full] if some is None else [some, 2 * some]:
        runs.append([])
        for done in launches_of(op, case_of(n)):
            (text,) = [t for t in texts if re.search(rf"\.entry {re.escape(done.kernel)}\b", t)]
            runs[-1].append(cost(done, text, math.prod(done.grid), math.inf))
    factor = 0 if some is None else (full - some) / some
    costs = []
    for c, d in zip(runs[0], runs[-1], strict=True):
        grown = {
            name: getattr(c, name) + factor * (getattr(d, name) - getattr(c, name))
            for name in ("blocks", "useful", "sectors", "memory", *RATES)
        }
        requested = 32 * grown["sectors"]
        grown["moved"] = moved(requested, each_once, grown["blocks"], c.resident)
        costs.append(dataclasses.replace(c, **grown))
    return costs


def divergences(size):
    """(op, options, V, entries of a top-k teacher, minimal bytes an element) of other losses."""
    for divergence in ("reverse_kl", "js"):
        yield f"divergence {divergence}", {"divergence": divergence}, 32000, 0, 3 * size
    top_k = {"divergence": "forward_kl", "tail": "renormalize", "entries": 64}
    # It writes a gradient, and reads little.
    yield "top-64 forward_kl, renormalized", top_k, 128256, 64, size


def count_ours(dtype, classes, wanted):
    """(op, size, costs, elements, minimal bytes an element) of our kernels."""
    import launchers

    ops = {op.name: op for op in launchers.OPS}
    name, size = str(dtype).removeprefix("torch."), dtype.itemsize

    for title, alpha in (("distillation", None), ("distillation with labels", ALPHA)):
        for v in classes if wanted(title) else ():

            def case(rows, v=v, alpha=alpha):
                return launchers.Distillation(name, rows, v, TEMPERATURE, alpha)

            rows = max(512, ELEMENTS_OF_OURS // v)
            some = None if rows * v <= ELEMENTS_OF_OURS else 4
            each_once = rows * (3 * v * size + 8 * (alpha is not None))
            costs = our_costs(ops["distillation"], case, each_once, rows, some)
            yield title, f"V = {v}", costs, rows * v, 3 * size
    for title, of, v, entries, minimum in divergences(size):
        if not wanted(title):
            continue

        def case(rows, v=v, of=of):
            return launchers.Divergence(name, rows, v, TEMPERATURE, **of)

        rows = max(512, ELEMENTS_OF_OURS // v)
        each_once = rows * v * minimum + rows * entries * 12
        costs = our_costs(ops["divergence"], case, each_once, rows, 4)
        yield title, f"V = {v}", costs, rows * v, minimum
    for title, sizes in LISTS.items() if wanted("noise") else ():

        def case(n, sizes=sizes):
            return launchers.Noise(name, (n,) if len(sizes) == 1 else tuple(sizes))

        some = 1 << 20 if len(sizes) == 1 else None
        costs = our_costs(ops["noise"], case, 2 * size * sum(sizes), sum(sizes), some)
        yield "noise", title, costs, sum(sizes), 2 * size
    elements, some = LISTS["one tensor"][0], 1 << 20
    for title, op, passes, of in NOISY:
        if not wanted(title):
            continue

        def case(n, op=op, of=of):
            kind = launchers.Update if op == "update" else launchers.Noise
            return kind(name, (n,), **of)

        costs = our_costs(ops[op], case, passes * size * elements, elements, some)
        yield title, "one tensor", costs, elements, passes * size
    if dtype == torch.float32 and wanted("regression"):  # it has no other dtype than fp64
        replicas, steps = THREADS_PER_SM // 32 * SMS, 64
        for title, samples, per_sample in (
            ("a normal a step", 100, False),
            ("a normal a sample", 1000, True),
        ):

            def case(n, samples=samples, per_sample=per_sample):
                return launchers.Regression(samples, n, steps, per_sample)

            normals = replicas * steps * (samples if per_sample else 1)
            trajectory = 8 * replicas * (steps + 1)
            costs = our_costs(ops["noisy_linear_regression"], case, trajectory, replicas, 64)
            yield "regression, a normal", title, costs, normals, trajectory / normals


# ---- the table -----------------------------------------------------------------------------------


@dataclasses.dataclass
class Row:
    op: str
    dtype: str
    size: str
    who: str
    launches: int
    elements: int
    minimum: float  # bytes an element
    moved: float  # times the minimum; likewise below
    requested: float
    sector_efficiency: float
    mufu: float  # an element; likewise below
    fma: float
    alu: float
    memory: float
    slots: float
    picoseconds: float
    of_floor: float  # the time over that of the minimum at full bandwidth
    bound_by: dict  # limit -> share of the time in launches that it binds
    registers: int
    spills: int


def row(op, dtype, size, who, costs, elements, minimum):
    def an_element(name):
        return sum(getattr(c, name) for c in costs) / elements

    seconds, bound_by = 0.0, collections.Counter()
    for c in costs:
        limit, time = max(c.seconds().items(), key=lambda item: item[1])
        seconds += time
        bound_by[limit] += time
    useful, sectors = sum(c.useful for c in costs if c.sectors), sum(c.sectors for c in costs)
    by_pytorch = sum(c.moved for c in costs if not c.sectors)
    return Row(
        op,
        str(dtype).removeprefix("torch."),
        size,
        who,
        len(costs),
        elements,
        minimum,
        moved=an_element("moved") / minimum,
        requested=(32 * sectors + by_pytorch) / elements / minimum,
        sector_efficiency=useful / (32 * sectors) if sectors else math.nan,
        **{name: an_element(name) for name in ("mufu", "fma", "alu", "memory", "slots")},
        picoseconds=1e12 * seconds / elements,
        of_floor=seconds / (minimum * elements / BANDWIDTH),
        bound_by={limit: time / seconds for limit, time in bound_by.most_common()},
        registers=max(c.registers for c in costs),
        spills=max(c.spills for c in costs),
    )


HEADER = (
    "size | kernels of | launches | moved / min | requested / min | sectors % | MUFU | FMA | ALU "
    "| memory | slots | ps | x floor | bound by | registers | spills"
)


def markdown(rows, missing):
    lines = [
        "# Counted costs on an H100 SXM",
        "",
        __doc__.split("\n\n", 1)[1].strip(),
        "",
        "MUFU to memory: instructions an element (slots: of a warp); ps: time an element; x floor:",
        "over the time of the minimal bytes at full bandwidth; spills: bytes a thread.",
    ]
    for (op, dtype), group in groups(rows).items():
        lines += ["", f"## {op}, {dtype}: at least {group[0].minimum:g} bytes an element", ""]
        lines += [f"| {HEADER} |", "|" + "---|" * (HEADER.count("|") + 1)]
        for r in group:
            bound = ", ".join(f"{k} {v:.0%}" for k, v in r.bound_by.items() if v >= 0.01)
            efficiency = "" if math.isnan(r.sector_efficiency) else f"{r.sector_efficiency:.1%}"
            lines.append(
                f"| {r.size} | {r.who} | {r.launches} | {r.moved:.3f} | {r.requested:.3f} "
                f"| {efficiency} | {r.mufu:.2f} | {r.fma:.1f} | {r.alu:.1f} | {r.memory:.2f} "
                f"| {r.slots:.3f} | {r.picoseconds:.2f} | {r.of_floor:.2f} | {bound} "
                f"| {r.registers} | {r.spills} |"
            )
    if missing:
        lines += ["", "## Not counted", "", *(f"- {line}" for line in missing)]
    return "\n".join(lines) + "\n"


def groups(rows):
    grouped = collections.defaultdict(list)
    for r in rows:
        grouped[r.op, r.dtype].append(r)
    return grouped


def plot(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    grouped = groups([r for r in rows if math.isfinite(r.of_floor)])
    height = [len(g) for g in grouped.values()]
    figure, axes = plt.subplots(
        len(grouped), 1, figsize=(9, 0.24 * sum(height) + 0.7 * len(height)), squeeze=False,
        height_ratios=height, sharex=True, layout="constrained",
    )  # fmt: skip
    for axis, ((op, dtype), group) in zip(axes[:, 0], grouped.items(), strict=True):
        labels = [f"{r.size}  {r.who}" for r in group]
        colors = ["tab:green" if r.who == "kdkernels" else "tab:gray" for r in group]
        axis.barh(range(len(group)), [r.of_floor for r in group], color=colors)
        axis.set_yticks(range(len(group)), labels, fontsize=7)
        axis.invert_yaxis()
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_title(f"{op}, {dtype}", fontsize=8, loc="left")
        axis.set_xscale("log")
    axes[-1, 0].set_xlabel("time that an H100's limits allow / time of the minimal bytes")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--classes", type=int, nargs="*", default=CLASSES)
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--ops", default=".", help="a regular expression: only ops that match it")
    parser.add_argument("--who", default=".", help="likewise, whose kernels")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    options = parser.parse_args()
    rows, missing = [], []
    if liger is None:
        missing.append("Liger: liger_kernel is not installed")

    def add(*row_of):
        rows.append(row(*row_of))
        print(f"{rows[-1].op}, {rows[-1].dtype}, {rows[-1].size}, {rows[-1].who}", file=sys.stderr)

    def wanted(op, who="kdkernels"):
        return re.search(options.ops, op) and re.search(options.who, who)

    for dtype in (getattr(torch, name) for name in options.dtypes):
        for op, size, costs, elements, minimum in count_ours(dtype, options.classes, wanted):
            held = torch.float64 if op.startswith("regression") else dtype
            add(op, held, size, "kdkernels", costs, elements, minimum)
        for op, who, compile_it, call in loss_peers():
            if not wanted(op, who):
                continue
            check_loss(op, who, compile_it, call, dtype)
            for v in options.classes:
                blocks = min(16, max(2, (1 << 18) // v))
                try:
                    costs, *_ = count_loss(op, compile_it, call, rows_of(v), v, dtype, blocks)
                # An instruction that the emulator lacks; strides that Inductor pads on a GPU alone.
                except (RuntimeError, AssertionError) as error:
                    missing.append(f"{op}, {dtype}, V = {v}, {who}: {str(error).splitlines()[0]}")
                    print(missing[-1], file=sys.stderr)
                    continue
                minimum = LOSSES[op][0] * dtype.itemsize
                add(op, dtype, f"V = {v}", who, costs, rows_of(v) * v, minimum)
        for size, sizes in LISTS.items() if wanted("noise", "torch.compile") else ():
            costs, _ = count_noise(sizes, dtype, 16)
            add("noise", dtype, size, "torch.compile", costs, sum(sizes), 2 * dtype.itemsize)
    rows.sort(key=lambda r: (r.op, r.dtype != "float32", r.size.rjust(20), r.who != "kdkernels"))
    options.out.mkdir(parents=True, exist_ok=True)
    text = markdown(rows, missing)
    print(text)
    (options.out / "counts.md").write_text(text)
    (options.out / "counts.json").write_text(
        json.dumps([dataclasses.asdict(r) for r in rows], indent=1)
    )
    if rows:
        plot(rows, options.out / "counts.png")


if __name__ == "__main__":
    main()
