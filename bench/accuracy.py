"""What a fused linear loss in bf16 loses, beside peers: make accuracy

Relative errors of the loss, and of the gradients in the student's hidden states and head (the norm
of the difference over the norm, the larger of both), against the formula in fp64 from the same bf16
inputs; the student is near its teacher (hidden states 5 % apart, heads 2 %). TRL's and Liger's
chunked losses run as their packages have them, on the CPU.
"""

import argparse
import importlib.metadata
import json
import logging
import os
import sys
import warnings
from pathlib import Path

import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
warnings.filterwarnings("ignore")
logging.getLogger("liger_kernel").setLevel(logging.ERROR)  # backends for GPUs that it cannot load

import kdkernels  # noqa: E402

ROWS, WIDTH, CLASSES = 256, 512, 8000
BETAS = {"forward_kl": 0.0, "reverse_kl": 1.0, "js": 0.5}
STDS = (1, 3, 10)


def inputs(std):
    """Hidden states and heads of both sides, in bf16; std of the logits."""
    g = torch.Generator().manual_seed(0)
    h, w = torch.randn(ROWS, WIDTH, generator=g), torch.randn(CLASSES, WIDTH, generator=g)
    th = h + 0.05 * torch.randn(ROWS, WIDTH, generator=g)
    w = w * std / WIDTH**0.5
    tw = w * (1 + 0.02 * torch.randn(CLASSES, WIDTH, generator=g))
    return [x.bfloat16() for x in (h, w, th, tw)]


# ---- the ways ------------------------------------------------------------------------------------


def ours(h, w, th, tw, divergence):
    return kdkernels.linear_distillation_loss(h, w, th, tw, divergence=divergence)


def plain(h, w, th, tw, divergence):
    """Plain PyTorch on logits in the inputs' dtype."""
    z, t = F.linear(h, w), F.linear(th, tw)
    wide = torch.float64 if h.dtype == torch.float64 else torch.float32
    return kdkernels.distillation_loss(
        z.to(wide), t.to(wide), divergence=divergence, backend="reference"
    )


def with_fp32_logits(h, w, th, tw, divergence):
    wide = torch.float64 if h.dtype == torch.float64 else torch.float32
    return plain(*(x.to(wide) for x in (h, w, th, tw)), divergence)


def trl(h, w, th, tw, divergence):
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    mask = torch.ones(1, ROWS, dtype=torch.long)
    return _chunked_divergence_loss(h[None], th[None], w, tw, mask, BETAS[divergence])[0]


def liger(h, w, th, tw, divergence):
    from liger_kernel import chunked_loss

    module = chunked_loss.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=BETAS[divergence],
        temperature=1.0,
        compiled=False,
    )
    return module(h, w, th, tw, torch.zeros(ROWS, dtype=torch.long))


WAYS = {
    "kdkernels": ours,
    "Liger, chunked": liger,
    "TRL, chunked": trl,
    "PyTorch, bf16 logits": plain,
    "PyTorch, fp32 logits": with_fp32_logits,
}


def run(way, tensors, divergence):
    """(loss, gradients of hidden states and head), in fp64."""
    h, w, *teacher = tensors
    leaves = [x.clone().requires_grad_() for x in (h, w)]
    loss = way(*leaves, *teacher, divergence)
    gradients = torch.autograd.grad(loss, leaves)
    return loss.detach().double(), [x.double() for x in gradients]


def errors(way, tensors, divergence, want):
    """Of the loss and of the gradients."""
    loss, gradients = run(way, tensors, divergence)
    pairs = zip(gradients, want[1], strict=True)
    of_gradients = max(((a - b).norm() / b.norm()).item() for a, b in pairs)
    return (loss / want[0] - 1).abs().item(), of_gradients


# ---- the table -----------------------------------------------------------------------------------


def cell(of_loss, of_gradients):
    return f"{of_loss:.0e}; {100 * of_gradients:.2g} %"


def markdown(record):
    """Lines of the table that docs/linear.md has."""
    lines = [f"| loss; gradients | {' | '.join(WAYS)} |", "|" + "---|" * (len(WAYS) + 1)]
    for row in record["rows"]:
        cells = [cell(*row["errors"][name]) for name in WAYS]
        title = f"{row['divergence'].replace('_kl', ' KL').replace('js', 'JS')}, std {row['std']}"
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = ROOT / "bench" / "results" / "linear-accuracy.json"
    parser.add_argument("--out", type=Path, default=default)
    given = parser.parse_args(words)
    names = ("torch", "trl", "liger-kernel")
    record = {"versions": {name: importlib.metadata.version(name) for name in names}, "rows": []}
    for divergence in BETAS:
        for std in STDS:
            tensors = inputs(std)
            want = run(with_fp32_logits, [x.double() for x in tensors], divergence)
            found = {n: errors(way, tensors, divergence, want) for n, way in WAYS.items()}
            record["rows"].append({"divergence": divergence, "std": std, "errors": found})
            print(divergence, std, {n: cell(*e) for n, e in found.items()}, file=sys.stderr)
    given.out.write_text(json.dumps(record, indent=1) + "\n")
    print("\n".join(markdown(record)))


if __name__ == "__main__":
    main()
