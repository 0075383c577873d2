"""What a fused linear loss costs on an H100, from a record of what it would do there.

Ours goes its whole way on CUDA, at its true size, with shapes alone: the emulated ops on meta
tensors. TRL's and Liger's ways are written here as their sources have them, on meta tensors too.
What they multiply and what they read and write is noted on the way.

time     the sum over products and other passes, one after another: a product takes the longer of
         its arithmetic at TFLOPS and its bytes, each matrix once, at the memory's bandwidth; all
         else takes its bytes. No launch overhead, and no pass hides behind another
products a call's four at TFLOPS: both sides' logits, and the gradients of hidden states and head
"""

import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .cost import BANDWIDTH

# What cuBLAS reaches in bf16 with fp32 sums on large matrices; the datasheet's peak is 989.
TFLOPS = 680
SHAPES = [  # rows, width of both sides, classes
    (8192, 4096, 128256),
    (4096, 2048, 128256),
    (16384, 1536, 151936),
    (16384, 768, 50257),
]
BF16, FP32 = torch.bfloat16, torch.float32


def nbytes(x):
    """Bytes of a tensor's distinct elements."""
    dims = zip(x.shape, x.stride(), strict=True)
    return x.element_size() * math.prod(n for n, stride in dims if stride or n == 0)


@dataclasses.dataclass
class Pass:
    """Something that a device does: a product of flops, or a pass that has none."""

    what: str
    bytes: float
    flops: float = 0.0

    @property
    def seconds(self):
        return max(self.flops / (1e12 * TFLOPS), self.bytes / BANDWIDTH)


# Ops that make no pass, that write what they are given without reading it, and that touch rows of
# one of their arguments alone.
FREE = ("empty", "empty_strided", "expand")
WRITTEN = ("zero_", "fill_", "copy_")
ROWS = {"index_select": lambda args, out: out, "index_copy_": lambda args, out: args[3]}


class Record(TorchDispatchMode):
    """Notes the ops that run in it, on meta tensors.

    aligned: products must be such as cuBLAS multiplies at full speed.
    """

    def __init__(self, aligned=False):
        super().__init__()
        self.passes, self.aligned = [], aligned

    @property
    def seconds(self):
        return sum(p.seconds for p in self.passes)

    def note(self, what, *tensors):
        self.passes.append(Pass(what, sum(map(nbytes, tensors))))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        if name in ("mm", "addmm"):
            return self.product(name, args, kwargs)
        out = func(*args, **kwargs)
        if name == "detach":  # our loss: two sides are read, and what it returns is written
            self.note("loss", out, out, out)
        elif name in ROWS:
            rows = ROWS[name](args, out)
            self.note(name, rows, rows)
        elif not func.is_view and name not in FREE:
            given = tree_leaves((args[1:] if name in WRITTEN else args, kwargs.get("other")))
            made = tree_leaves(out)
            self.note(name, *(x for x in (*given, *made) if torch.is_tensor(x)))
        return out

    def product(self, name, args, kwargs):
        a, b = args[:2] if name == "mm" else args[1:3]
        out = kwargs.get("out")
        if out is None:
            out = torch.empty(a.shape[0], b.shape[1], dtype=a.dtype, device="meta")
        if self.aligned:
            check_product(a, b, out)
        summed = [out] if name == "addmm" and kwargs.get("beta", 1) else []
        moved = sum(map(nbytes, (a, b, out, *summed)))
        self.passes.append(Pass("product", moved, 2.0 * a.shape[0] * a.shape[1] * b.shape[1]))
        return out


def check_product(a, b, out):
    """What cuBLAS multiplies at full speed: 16 bits into 16 or 32, adjacent elements, and rows that
    begin at multiples of 16 bytes.
    """
    assert a.dtype == b.dtype and a.element_size() == 2, (a.dtype, b.dtype)
    assert out.dtype in (a.dtype, FP32), out.dtype
    assert a.shape[1] == b.shape[0] and out.shape == (a.shape[0], b.shape[1])
    for x in (a, b, out):
        assert 1 in x.stride(), x.stride()
        assert max(x.stride()) * x.element_size() % 16 == 0 or min(x.shape) == 1, x.stride()


def meta(*shape, dtype=BF16):
    return torch.empty(shape, dtype=dtype, device="meta")


# ---- ours ----------------------------------------------------------------------------------------


@functools.cache
def emulated():
    """The ops with their way on CUDA."""
    if "kdkernels._C" in sys.modules:
        raise ImportError("kdkernels was imported before its ops could be replaced")
    os.environ.setdefault("KDKERNELS_EMULATED_ARCH", "90")
    import emulated_ops

    return emulated_ops


def ours(rows, width, classes, divergence="forward_kl", kept=None, known=True):
    """Of our op. kept: rows that count, of which the call is told where `known`."""
    from kdkernels.distill.calls import packed

    call = {"divergence": divergence, "alpha": 1.0}
    if kept is not None:
        call |= {"labels": meta(rows, dtype=torch.int64)}
        call |= {"max_rows": kept} if known else {}
    others = [None, None, None, meta(classes, width), None]
    op = torch.ops.kdkernels._linear_distillation_forward.default
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    with Record(aligned=True) as record:
        args = (meta(rows, width), meta(classes, width), others, [meta(rows, width)])
        op.redispatch(keys, *args, *packed(call), 3, "")
    # At the end the head's gradient is rounded.
    record.note("rounding", meta(classes, width, dtype=FP32), meta(classes, width))
    return record


# ---- peers ---------------------------------------------------------------------------------------


def trl(rows, width, classes, divergence="forward_kl", kept=None):
    """TRL 1.16, kernels/chunked_divergence.py: tiles of 4,096 rows and 32,768 classes in fp32,
    projected once more in backward, and once more before for a mixture. Rows that count are
    selected, which waits for the device.
    """
    rows = rows if kept is None else kept
    record = Record()
    forward = 2 if divergence == "js" else 1
    head, hidden = meta(classes, width), meta(rows, width)
    grad_head, grad_hidden = meta(classes, width, dtype=FP32), meta(rows, width, dtype=FP32)
    add = functools.partial(torch.ops.aten.addmm.dtype_out, out_dtype=FP32, beta=1)
    with record:
        for step in range(forward + 1):
            for r in range(0, rows, 4096):
                h = hidden[r : r + 4096]
                for v in range(0, classes, 32768):
                    w = head[v : v + 32768]
                    tile = meta(h.shape[0], w.shape[0], dtype=FP32)
                    for _ in range(2):
                        torch.mm(h, w.t(), out_dtype=FP32, out=tile)
                    record.note("loss", *[tile] * (2 if step < forward else 3))
                    if step < forward:
                        continue
                    g = tile.to(BF16)
                    into = grad_hidden[r : r + 4096]
                    add(into, g, w, out=into)
                    into = grad_head[v : v + 32768]
                    add(into, g.t(), h, out=into)
        grad_head.to(BF16), grad_hidden.to(BF16)
    return record


def liger(rows, width, classes, divergence="forward_kl", kept=None):
    """Liger 0.8.5, chunked_loss: chunks of 1,024 rows whose logits are rounded to 16 bits; each
    chunk's gradient of the head is a product in 16 bits that is then added. Counted as if
    torch.compile made no more passes over the logits than there must be: both sides for the
    normalizers, both for the loss, both again for a gradient.
    """
    record = Record()
    head, hidden, grad_head = (meta(classes, width), meta(rows, width), meta(classes, width))
    with record:
        for r in range(0, rows, 1024):
            h = hidden[r : r + 1024]
            z, t = h @ head.t(), h @ head.t()
            record.note("loss", *[z, t] * 3, z)
            torch.mm(z, head)
            grad_head.add_(torch.mm(z.t(), h))
    return record


WAYS = {"kdkernels": ours, "TRL's way": trl, "Liger's way": liger}


# ---- rows ----------------------------------------------------------------------------------------


def rows():
    """One for each shape, share of the rows that count, divergence and way."""
    for shape in SHAPES:
        for divergence, part in (("forward_kl", 1), ("js", 1), ("forward_kl", 0.5)):
            for who, way in WAYS.items():
                kept = None if part == 1 else int(part * shape[0])
                yield row(shape, divergence, part, who, way(*shape, divergence, kept))


def row(shape, divergence, part, who, record):
    products = [p for p in record.passes if p.flops]
    flops = 8.0 * math.prod(shape)  # of a call's four products, of all rows
    return {
        "rows x width x classes": " x ".join(map(str, shape)),
        "rows that count": part,
        "divergence": divergence,
        "kernels of": who,
        "products": len(products),
        "TFLOP": round(sum(p.flops for p in products) / 1e12, 1),
        "GB beside products": round(sum(p.bytes for p in record.passes if not p.flops) / 1e9, 1),
        "ms": round(1e3 * record.seconds, 1),
        "x products": round(record.seconds / (flops / (1e12 * TFLOPS)), 2),
    }


def counted():
    """The rows, from a process whose ops are the emulated ones."""
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join(str(root / folder) for folder in ("bench", "tests", ""))
    done = subprocess.run(
        [sys.executable, "-m", "counting.linear"],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the fused linear was not counted: {done.stderr[-2000:]}")
    return json.loads(done.stdout)


def markdown(found):
    lines = ["", "## Fused linear, bf16", "", *__doc__.strip().splitlines()[2:], ""]
    lines += [f"TFLOPS is {TFLOPS}.", "", f"| {' | '.join(found[0])} |"]
    lines.append("|" + "---|" * len(found[0]))
    lines += [f"| {' | '.join(map(str, r.values()))} |" for r in found]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    emulated()
    print(json.dumps(list(rows())))
