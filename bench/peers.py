"""Our losses against the code that people use today: make peers

Each peer runs as its package has it, on fp32 inputs on the CPU; Liger's Triton kernels run as the
PTX that Triton makes of them for an H100, in the emulator of tests/ptx. Where a peer and we differ,
the published formula, evaluated in fp64 from the same inputs, says who is right.

    difference   the largest of a row's settings: of losses |a - b| / |b|; of gradients
                 max |a - b| / max |b|, the largest of all tensors that have one
    convention   what makes a peer's loss ours

Exit status 1 where our loss or gradient is not the formula's, or a peer's is not as said here.
"""

import argparse
import functools
import importlib.metadata
import importlib.util
import itertools
import logging
import math
import os
import sys
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
from torch.nn import functional as F

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
warnings.filterwarnings("ignore")
logging.getLogger("liger_kernel").setLevel(logging.ERROR)  # backends for GPUs that it cannot load

import kdkernels  # noqa: E402

PEERS = ("torch", "trl", "liger-kernel", "torchdistill", "mmrazor", "axolotl", "verl")
TOLERANCE = 5e-5  # relative, of fp32 results; a tail of 1 % is known to 1e-5
CLOSE_TOLERANCE = 1e-4  # likewise, where student and teacher are so close that D is about 1e-8
IGNORED = -100

# ---- the published formulas ----------------------------------------------------------------------
# p and q are the log-probabilities of teacher and student, one row.


def kl(a, b):
    return (a.exp() * (a - b)).sum()


def generalized_js(p, q, beta):  # GKD, arXiv 2306.13649, equation 1; its limits by name
    if beta in (0, 1):
        return kl(q, p) if beta else kl(p, q)
    m = torch.logaddexp(p + math.log(beta), q + math.log1p(-beta))
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def decoupled(p, q, label, alpha, beta):  # DKD, arXiv 2203.08679, equation 7
    others = torch.arange(len(p)) != label
    binary = [torch.stack((x[label], x[others].logsumexp(0))) for x in (p, q)]
    return alpha * kl(*binary) + beta * kl(p[others].log_softmax(0), q[others].log_softmax(0))


DIVERGENCES = {
    "forward_kl": lambda p, q, label, o: kl(p, q),
    "reverse_kl": lambda p, q, label, o: kl(q, p),
    "js": lambda p, q, label, o: generalized_js(p, q, o["beta"]),
    "total_variation": lambda p, q, label, o: (p.exp() - q.exp()).abs().sum() / 2,
    "decoupled": lambda p, q, label, o: decoupled(p, q, label, o["divergence_alpha"], o["beta"]),
}


def on_entries(x, entries, tail):
    """The log-probabilities that are compared where a row's teacher is known at `entries` alone."""
    entries = entries[entries >= 0]
    if tail == "renormalize":
        return x[entries].log_softmax(0)
    if tail == "ignore":
        return x[entries]
    rest = torch.ones(len(x), dtype=torch.bool)
    rest[entries] = False
    return torch.cat((x[entries], x[rest].logsumexp(0, keepdim=True)))


def transformed(z, scale, cap):
    return scale * z if cap is None else cap * (scale * z / cap).tanh()


def row_formula(z, t, label, entries, o):
    """alpha T^2 D + (1 - alpha) CE of one row."""
    u = transformed(z, o["logit_scale"], o["soft_cap"])
    p_q = transformed(t, o["teacher_logit_scale"], o["teacher_soft_cap"]), u
    if o["standardize"]:  # arXiv 2403.01427
        p_q = [(x - x.mean()) / x.std() for x in p_q]
    p, q = ((x / o["temperature"]).log_softmax(0) for x in p_q)
    if entries is not None:
        p, q = (on_entries(x, entries, o["tail"]) for x in (p, q))
    some = ~((p == -math.inf) & (q == -math.inf))  # what both exclude adds nothing
    loss = o["temperature"] ** 2 * DIVERGENCES[o["divergence"]](p[some], q[some], label, o)
    if o["alpha"] == 1:
        return loss
    ce = F.cross_entropy(u, label, label_smoothing=o["label_smoothing"])
    return o["alpha"] * loss + (1 - o["alpha"]) * ce


DEFAULTS = {"temperature": 1, "divergence": "forward_kl", "alpha": 1, "label_smoothing": 0}
DEFAULTS |= {"standardize": False, "logit_scale": 1, "teacher_logit_scale": 1}
DEFAULTS |= {"soft_cap": None, "teacher_soft_cap": None}


def formula(z, t, labels, entries, options):
    """The loss of logits [N, V], in their dtype, which is fp64; options as kdkernels has them."""
    o = DEFAULTS | options
    kept = [i for i in range(len(z)) if labels is None or labels[i] != IGNORED]
    total = 0
    for i in kept:
        label, at = (None if x is None else x[i] for x in (labels, entries))
        total = total + row_formula(z[i], t[i], label, at, o)
    return total if o.get("reduction") == "sum" else total / o.get("num_items", len(kept))


# ---- what is compared ----------------------------------------------------------------------------


class Inputs(types.SimpleNamespace):
    """z, t [N, V] logits; h, w, b and th, tw, tb: the hidden states and heads of linear losses."""

    LEAVES = ("z", "h", "w", "b")

    def to(self, dtype):
        def converted(name, x):
            x = x.to(dtype) if x.is_floating_point() else x
            return x.clone().requires_grad_(name in self.LEAVES)

        return Inputs(**{name: converted(name, x) for name, x in vars(self).items()})


# With fewer classes Triton fuses a product into the first step of Liger KLDiv's sum over lanes.
# They then differ in the last bit and write to one address: a race, which the emulator reports.
CLASSES = 300


def ordinary(rows=6, classes=CLASSES, seed=0):
    random = torch.Generator().manual_seed(seed)
    shapes = {"z": (rows, classes), "t": (rows, classes)}
    shapes |= {"h": (rows, 8), "w": (classes, 8), "b": (classes,)}
    shapes |= {"th": (rows, 12), "tw": (classes, 12), "tb": (classes,)}
    x = Inputs(**{k: torch.empty(s).normal_(generator=random) for k, s in shapes.items()})
    x.z, x.t = 3 * x.z, 3 * x.t
    x.labels = torch.randint(classes, (rows,), generator=random)
    x.ignored = x.labels.clone()  # some of them ignored
    x.ignored[::4] = IGNORED
    return x


@dataclass
class Ours:
    """Options of a loss of ours, and what it takes: the same for kdkernels and for the formula."""

    options: dict
    labels: str = ""  # of the inputs: "labels", "ignored" or none
    hidden: str = ""  # from hidden states: "bias" or "no bias"
    support: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None  # of z, t: [N, K]

    def arguments(self, x):
        z, t, labels, entries = getattr(x, "z", None), getattr(x, "t", None), None, None
        if self.hidden:
            bias = self.hidden == "bias"
            z, t = F.linear(x.h, x.w, x.b if bias else None), F.linear(x.th, x.tw)
            t = t + x.tb if bias else t
        if self.labels:
            labels = getattr(x, self.labels)
        if self.support:
            entries = self.support(z.detach(), t)
        return z, t, labels, entries

    def formula(self, x):
        return formula(*self.arguments(x), self.options)

    def loss(self, x):
        z, t, labels, entries = self.arguments(x)
        o = {"alpha": 1} | self.options if labels is not None else self.options
        if entries is not None:
            # What the peers take: normalised, which loses less in fp32 than logits and logsumexp.
            temperature = o.get("temperature", 1)
            values = temperature * (t / temperature).log_softmax(-1)
            values = values.gather(-1, entries.clamp(min=0))
            if o["tail"] != "renormalize":
                o = o | {"teacher_logsumexp": torch.zeros(len(t), dtype=t.dtype)}
        if not self.hidden and entries is None:
            return kdkernels.distillation_loss(z, t, labels, **o)
        if not self.hidden:
            return kdkernels.topk_distillation_loss(z, values, entries, labels, **o)
        if self.hidden == "bias":
            o = o | {"student_bias": x.b}
        if entries is not None:
            teacher = {"teacher_values": values, "teacher_indices": entries}
        else:
            teacher = {"teacher_hidden": x.th, "teacher_weight": x.tw}
            teacher |= {"teacher_bias": x.tb} if self.hidden == "bias" else {}
        return kdkernels.linear_distillation_loss(x.h, x.w, labels=labels, **teacher, **o)


def settings(**axes):
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


@dataclass
class Case:
    """A loss of a peer, peer(inputs, **setting), and ours that it is to be, ours(**setting)."""

    name: str
    what: str
    peer: Callable[..., torch.Tensor]
    ours: Callable[..., Ours]
    settings: list[dict] = field(default_factory=lambda: [{}])
    without_t2: bool = False  # its loss is without the factor T^2
    times: float = 1  # its loss lacks this factor besides
    convention: str = ""
    differs: str = ""  # why it is not the formula, where it is not
    inputs: Callable[[], Inputs] = ordinary

    def factor(self, ours):
        temperature = ours.options.get("temperature", 1)
        return self.times * (temperature**2 if self.without_t2 else 1)


def run(loss_of, x):
    """A loss and its gradients, in fp64."""
    loss = loss_of(x)
    loss.backward()
    leaves = [getattr(x, name) for name in Inputs.LEAVES if hasattr(x, name)]
    return loss.detach().double(), [leaf.grad.double() for leaf in leaves if leaf.grad is not None]


def difference(a, b, factor=1):
    """Of two results of `run`, the first one times a factor: (of the losses, of the gradients)."""
    loss = (factor * a[0] - b[0]).abs() / b[0].abs()
    gradients = [
        (factor * g - want).abs().max() / (want.abs().max() or 1)
        for g, want in zip(a[1], b[1], strict=True)
    ]
    return torch.stack((loss, torch.stack(gradients).max()))  # unlike Python's, this max keeps NaN


def worst(differences):
    return torch.stack(differences).amax(0).tolist()


# ---- how the peers run ---------------------------------------------------------------------------


def alone(package, path, **stand_ins):
    """One file of an installed package, with stand-ins for what the rest of it would import."""
    folder = Path(importlib.util.find_spec(package).origin).parent
    spec = importlib.util.spec_from_file_location(f"{package}_alone", folder / path)
    module = importlib.util.module_from_spec(spec)
    modules = {f"{package}.{name}": types.SimpleNamespace(**v) for name, v in stand_ins.items()}
    with mock.patch.dict(sys.modules, modules):
        spec.loader.exec_module(module)
    return module


@functools.cache
def compiled(text):
    import ptx

    return ptx.load(text)


def emulated(launch):
    # Threads that have the same sum write it to shared memory more than once. That is no race while
    # the approximate functions behind it are not perturbed.
    with compiled(launch.ptx).run(same_values=True, perturb=False) as device:
        args = []
        for value in launch.args:
            if torch.is_tensor(value):
                device.buffer(torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage()))
                value = value.data_ptr()
            args.append(0 if value is None else value)
        device.launch(launch.kernel, launch.grid, launch.block, args, shared=launch.shared)


def run_peer(loss_of, x):
    from counting import peers_ptx

    with peers_ptx.on_cpu(emulated, eager=False):
        return run(loss_of, x)


# ---- the peers -----------------------------------------------------------------------------------

BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)
EVERY_BETA = "js, beta 0, 0.1, 0.5, 0.9, 1"


def js(beta=0.5, T=1, labels="", hidden="", support=None, **options):
    options = {"divergence": "js", "beta": beta, "temperature": T, **options}
    return Ours(options, labels, hidden, support)


def log_probs(x, T=1):
    return [(y / T).log_softmax(-1) for y in (x.z, x.t)]


def reduction_of(theirs):
    return "sum" if theirs == "sum" else "mean"


def of_pytorch():
    def kl_div(x, T, reduction, log_target):
        log_q, log_p = log_probs(x, T)
        p = log_p if log_target else log_p.exp()
        return F.kl_div(log_q, p, reduction=reduction, log_target=log_target)

    def forward(T, reduction, log_target):
        return Ours({"temperature": T, "reduction": reduction_of(reduction)})

    every = settings(T=(1, 3), reduction=("batchmean", "sum"), log_target=(False, True))
    what = "forward_kl; T 1, 3; batchmean, sum; log_target or not"
    yield Case("PyTorch kl_div", what, kl_div, forward, every, without_t2=True)

    def swapped(x, T):
        return F.kl_div(*log_probs(x, T)[::-1], reduction="batchmean", log_target=True)

    def reverse(T):
        return Ours({"temperature": T, "divergence": "reverse_kl"})

    what = "reverse_kl: arguments swapped, log_target; T 1, 2"
    yield Case("PyTorch kl_div", what, swapped, reverse, settings(T=(1, 2)), without_t2=True)

    def cross_entropy(x, **options):
        return F.cross_entropy(x.z, x.ignored, **options)

    def hard(**options):
        return Ours({"alpha": 0, **options}, "ignored")

    every = settings(label_smoothing=(0.0, 0.1), reduction=("mean", "sum"))
    what = "alpha 0; ignored labels; label smoothing; mean, sum"
    yield Case("PyTorch cross_entropy", what, cross_entropy, hard, every)


def top_of_teacher(z, t):
    return t.topk(5).indices


def top_of_student(z, t):
    return z.topk(5).indices


def top_of_both(z, t):
    of_t, of_z = top_of_teacher(z, t), top_of_student(z, t)
    twice = (of_z[..., None] == of_t[:, None]).any(-1)
    return torch.cat((of_t, of_z.masked_fill(twice, -1)), -1)


def small_student_tail():
    """Beside the teacher's first five the student has less than 1e-7, the teacher much more."""
    x = ordinary()
    x.z = 6 * x.t + x.z
    return x


def of_trl():
    from trl.experimental.async_distillation import async_distillation_trainer as server
    from trl.experimental.gkd import GKDTrainer
    from trl.experimental.iw_opd.iw_opd_trainer import IWOPDTrainer
    from trl.experimental.sdpo import loss_utils as sdpo
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    name = "TRL GKDTrainer.generalized_jsd_loss"

    def gkd(x, beta, T, reduction="batchmean", labels="", **num_items):
        labels = getattr(x, labels)[None] if labels else None
        z, t = x.z[None], x.t[None]
        return GKDTrainer.generalized_jsd_loss(z, t, labels, beta, T, reduction, **num_items)

    def ours(beta, T, reduction="batchmean", labels="", num_items_in_batch=None):
        how = {"reduction": reduction_of(reduction)}
        if num_items_in_batch:
            how = {"num_items": num_items_in_batch}
        return js(beta, T, labels, **how)

    every = settings(beta=BETAS, T=(1, 2), reduction=("batchmean", "sum"), labels=["ignored"])
    what = f"{EVERY_BETA}; T 1, 2; ignored labels; batchmean, sum"
    yield Case(name, what, gkd, ours, every, without_t2=True)
    every = settings(beta=BETAS, T=(1, 2), num_items_in_batch=[17])
    yield Case(name, f"{EVERY_BETA}; num_items_in_batch", gkd, ours, every, without_t2=True)
    what = f"{EVERY_BETA}; logits [B, S, V] without labels"
    why = "divide by S: its batchmean is over B"
    yield Case(name, what, gkd, ours, settings(beta=BETAS, T=(2,)), True, 1 / 6, why)

    name = "TRL sdpo/sdft loss_utils"

    def full(x, beta):
        loss = sdpo.compute_full_logit_self_distillation_loss
        return loss(x.z, x.t, distillation_alpha=beta).mean()

    yield Case(name, f"{EVERY_BETA}; full vocabulary", full, js, settings(beta=BETAS))

    def topk(x, beta, tail):
        options = {"distillation_topk": 5, "distillation_alpha": beta}
        options["distillation_add_tail"] = tail == "bucket"
        return sdpo.compute_topk_self_distillation_loss(x.z, x.t, **options).mean()

    every = settings(beta=BETAS, tail=("bucket", "renormalize"))
    what = f"top-k of the student: bucket (add_tail), renormalize; {EVERY_BETA}"
    yield Case(name, what, topk, functools.partial(js, support=top_of_student), every)

    name = "TRL IWOPDTrainer.generalized_jsd_loss"

    def iw_opd(x, beta, tail, T):
        known = x.z[None], x.t[None], x.ignored[None], beta, T
        return IWOPDTrainer.generalized_jsd_loss(*known, top_k=5, add_tail=tail == "bucket")

    def on_support(beta, tail, T):
        support = {0: top_of_teacher, 1: top_of_student}.get(beta, top_of_both)
        return js(beta, T, "ignored", tail=tail, support=support)

    every = settings(beta=BETAS, tail=("bucket", "renormalize"), T=(1, 2))
    what = f"top-k of either or both: bucket (add_tail), renormalize; {EVERY_BETA}; T 1, 2"
    yield Case(name, what, iw_opd, on_support, every, without_t2=True)
    every = settings(beta=[0.0], tail=["bucket"], T=[1])
    what = "top-k: bucket; forward_kl; a student with less than 1e-7 for the tail"
    why = "its tails are at least 1e-7 (_add_tail_bucket)"
    yield Case(name, what, iw_opd, on_support, every, differs=why, inputs=small_student_tail)

    def chunked(x, beta, T, scale, cap):
        hidden = [*(y[None] for y in (x.h, x.th)), x.w, x.tw, (x.ignored != IGNORED)[None]]
        options = (beta, None, x.b, x.tb, scale, 1.0, cap, cap, T)
        return _chunked_divergence_loss(*hidden, *options)[0]

    def linear(beta, T, scale, cap):
        caps = {"soft_cap": cap, "teacher_soft_cap": cap, "logit_scale": scale}
        return js(beta, T, "ignored", "bias", **caps)

    every = settings(beta=BETAS, T=(1.0, 2.0), scale=(0.5,), cap=(None, 5.0))
    what = f"fused linear: {EVERY_BETA}; T 1, 2; logit scale, soft cap, bias, ignored labels"
    name = "TRL DistillationTrainer, chunked divergence"
    yield Case(name, what, chunked, linear, every, without_t2=True)

    def sparse(x, beta, tail):
        t = F.linear(x.th, x.tw, x.tb).log_softmax(-1)
        at = top_of_teacher(None, t)
        known = (at, t.gather(-1, at), torch.ones_like(at, dtype=torch.bool))
        rest = (beta, 1.0, tail == "bucket", None, 1, 4)
        return server._chunked_jsd_loss(x.h, x.w, x.b, 1.0, 5.0, *known, *rest)[0]

    def linear_topk(beta, tail):
        options = {"tail": tail, "soft_cap": 5.0, "reduction": "sum"}
        return js(beta, 1, hidden="bias", support=top_of_teacher, **options)

    every = settings(beta=(0.0, 0.5, 1.0), tail=("bucket", "renormalize"))
    what = "fused linear, top-k: bucket, renormalize; js, beta 0, 0.5, 1; soft cap, bias; sum"
    name = "TRL AsyncDistillationTrainer, chunked divergence"
    yield Case(name, what, sparse, linear_topk, every)


def of_liger():
    from liger_kernel import chunked_loss
    from liger_kernel import transformers as liger
    from liger_kernel.transformers.fused_ce_tvd import LigerFusedCETVDLoss
    from liger_kernel.transformers.fused_linear_kl_div import LigerFusedLinearKLDivLoss

    def kldiv(x, T, reduction, log_target):
        log_q, log_p = log_probs(x, T)
        module = liger.LigerKLDIVLoss(reduction=reduction, log_target=log_target)
        return module(log_q, log_p if log_target else log_p.exp())

    def forward(T, reduction, log_target):
        return Ours({"temperature": T, "reduction": reduction_of(reduction)})

    every = settings(T=(1, 3), reduction=("batchmean", "sum"), log_target=(False, True))
    what = "forward_kl; T 1, 3; batchmean, sum; log_target or not"
    yield Case("Liger KLDiv", what, kldiv, forward, every, without_t2=True)

    def jsd(x, beta, labels):
        labels = [getattr(x, labels)] if labels else []
        return liger.LigerJSD(beta)(*log_probs(x), *labels)

    every = settings(beta=BETAS, labels=("", "ignored"))
    yield Case("Liger JSD", f"{EVERY_BETA}; ignored labels", jsd, js, every)

    def tvd(x):
        return liger.LigerTVDLoss()(*(y.exp() for y in log_probs(x)))

    total_variation = {"divergence": "total_variation"}
    yield Case("Liger TVD", "total_variation", tvd, lambda: Ours(total_variation))

    def ce_tvd(x):
        ce, tvd = LigerFusedCETVDLoss()(x.z, x.t, x.ignored)
        return (0.4 * ce + 0.6 * tvd).sum()

    with_ce = Ours(total_variation | {"alpha": 0.6, "reduction": "sum"}, "ignored")
    what = "total_variation and cross-entropy; ignored labels"
    yield Case("Liger FusedCETVD", what, ce_tvd, lambda: with_ce)

    def linear_jsd(x, beta, T):
        module = liger.LigerFusedLinearJSD(beta, temperature=T)
        return module(x.h, x.w, x.th, x.tw, x.ignored)

    def linear(beta, T):
        return js(beta, T, "ignored", "no bias")

    every = settings(beta=BETAS, T=(1.0, 2.0))
    what = f"fused linear: {EVERY_BETA}; T 1, 2; ignored labels"
    yield Case("Liger FusedLinearJSD", what, linear_jsd, linear, every, without_t2=True)

    def linear_kl(x, T):
        p = (F.linear(x.th, x.tw) / T).softmax(-1)
        return LigerFusedLinearKLDivLoss(temperature=T)(x.h, x.w, p, x.ignored)

    def linear_forward(T):
        return Ours({"temperature": T}, "ignored", "no bias")

    every = settings(T=(1.0, 2.0))
    what = "fused linear: forward_kl; teacher's probabilities; T 1, 2; ignored labels"
    yield Case("Liger FusedLinearKLDiv", what, linear_kl, linear_forward, every, without_t2=True)

    def chunked(x, beta, T, hard):
        weights = {"weight_hard_loss": hard, "weight_soft_loss": (1 - hard) * T**2}
        module = chunked_loss.LigerFusedLinearJSDLoss(
            **weights, beta=beta, temperature=T, compiled=False, chunk_size=2
        )
        return module(x.h, x.w, x.th, x.tw, x.ignored, x.b, x.tb)

    def linear_with_ce(beta, T, hard):
        return js(beta, T, "ignored", "bias", alpha=1 - hard)

    every = settings(beta=BETAS, T=(1.0, 2.0), hard=(0.0, 0.3))
    what = f"fused linear: {EVERY_BETA}; T 1, 2; hard loss, bias, ignored labels"
    name = "Liger chunked_loss FusedLinearJSD"
    why = "weight_soft_loss = alpha T²"
    yield Case(name, what, chunked, linear_with_ce, every, convention=why)


def of_torchdistill():
    def with_labels(x, kind):
        return torchdistill(kind, x, x.labels)

    def ours(kind):
        standardize = kind == "LogitStdKDLoss"
        return Ours({"temperature": 3, "alpha": 0.9, "standardize": standardize}, "labels")

    def soft(kind):
        return Ours({"temperature": 3, "standardize": kind == "LogitStdKDLoss"})

    for kind, what in (("KDLoss", ""), ("LogitStdKDLoss", ", standardised logits")):
        name, what = f"torchdistill {kind}", f"forward_kl{what}; T 3"
        why = "its alpha is the share of cross-entropy"
        which = settings(kind=[kind])
        yield Case(name, f"{what}; labels", with_labels, ours, which, convention=why)
        yield Case(name, what, lambda x, kind: torchdistill(kind, x), soft, which, without_t2=True)


def torchdistill(kind, x, labels=None, T=3):
    from torchdistill.losses import mid_level

    where = {f"{side}_module_path": side for side in ("student", "teacher")}
    where |= {f"{side}_module_io": "output" for side in ("student", "teacher")}
    module = getattr(mid_level, kind)(**where, temperature=T, alpha=0.1)
    return module({"student": {"output": x.z}}, {"teacher": {"output": x.t}}, labels)


def of_others():
    """DKD, which torchdistill lacks, and the top-k terms alone, which TRL lacks."""
    models = types.SimpleNamespace(register_module=lambda: lambda kind: kind)
    dkd = alone("mmrazor", "models/losses/decoupled_kd.py", registry={"MODELS": models})

    def decoupled_loss(x, T, alpha, beta):
        return dkd.DKDLoss(T, alpha, beta)(x.z, x.t, x.labels)

    def ours(T, alpha, beta):
        options = {"divergence": "decoupled", "divergence_alpha": alpha, "beta": beta}
        return Ours(options | {"temperature": T}, "labels")

    every = settings(T=(1.0, 4.0), alpha=(1.0, 0.5), beta=(8.0, 2.0))
    what = "decoupled; T 1, 4; weights 1 and 0.5, 8 and 2"
    yield Case("mmrazor DKDLoss", what, decoupled_loss, ours, every)

    axolotl = alone("axolotl", "integrations/kd/topk_logprob/forward_kl.py")
    utils = vars(alone("axolotl", "integrations/kd/utils.py"))
    path = "integrations/kd/kernels/liger.py"
    axolotl_linear = alone("axolotl", path, **{"integrations.kd.utils": utils})
    clamps = types.SimpleNamespace(log_prob_min_clamp=None)
    config = types.SimpleNamespace(distillation_loss=clamps)
    stand_ins = {
        "utils.ulysses": {
            "get_ulysses_sequence_parallel_world_size": lambda: 1,
            "slice_input_tensor": None,
        },
        "workers.config": {"DistillationConfig": None, "DistillationLossConfig": None},
    }
    verl = alone("verl", "trainer/distillation/fsdp/losses.py", **stand_ins)

    def entries(x):
        at = top_of_teacher(None, x.t)
        return x.t.log_softmax(-1).gather(-1, at), at

    def by_axolotl(x):
        values, at = entries(x)
        every = torch.ones_like(at)
        return axolotl.loss(x.z[None], at[None], values[None], every[None], len(x.z), 1.0)

    def by_verl(x):
        jagged = [torch.nested.nested_tensor([y], layout=torch.jagged) for y in entries(x)]
        losses = verl.compute_forward_kl_topk(x.z[None], *jagged, config, "thd")
        return losses["distillation_losses"].mean()

    terms = Ours({"tail": "ignore"}, support=top_of_teacher)
    what = "top-k: ignore; forward_kl"
    yield Case("axolotl kd topk_logprob", f"{what}; num_items_in_batch", by_axolotl, lambda: terms)
    yield Case("verl compute_forward_kl_topk", what, by_verl, lambda: terms)

    def linear(x, beta, T):
        t = F.linear(x.th, x.tw, x.tb) / T
        at = top_of_teacher(None, t)
        known = at, t.gather(-1, at).log_softmax(-1), torch.ones_like(at), x.labels
        module = axolotl_linear.LigerFusedLinearKLTopKLogprobLoss(0.0, 1.0, T, beta, compiled=False)
        return module(x.w, x.h[None], *(y[None] for y in known), x.b)

    def linear_topk(beta, T):
        options = {"tail": "renormalize", "reduction": "sum"}
        return js(beta, T, hidden="bias", support=top_of_teacher, **options)

    name = "axolotl kd LigerFusedLinearKLTopKLogprobLoss"
    what = "fused linear, top-k: renormalize; js, beta 0, 0.5, 1"
    every = functools.partial(settings, beta=(0.0, 0.5, 1.0))
    yield Case(name, f"{what}; T 1", linear, linear_topk, every(T=[1.0]))
    why = "its loss has the factor T², its gradient has not"
    yield Case(name, f"{what}; T 2", linear, linear_topk, every(T=[2.0]), differs=why)


# ---- known failures ------------------------------------------------------------------------------


@dataclass
class Failure:
    """Where others are known to fail, and what a peer gives there, a row at a time."""

    where: str
    name: str
    peer: Callable[[Inputs], torch.Tensor]
    ours: Ours
    gives: str  # how what `symptom` says begins
    inputs: Callable[[int], Inputs]  # of the row's number
    rows: int = 1
    factor: float = 1


def one_row(change=None, classes=CLASSES):
    def make(row):
        x = ordinary(1, classes, seed=row + 1)
        if change:
            change(x)
        return x

    return make


def close(x):
    x.z = x.t + 2.5e-4 * x.z
    # So few bits that the logits are exact in fp32: what is lost is lost by the divergence.
    x.h, x.tw = (x.h * 4).round() / 4, (x.w * 64).round() / 64
    random = torch.Generator().manual_seed(0)
    x.th, x.w = x.h, x.tw + torch.randint(-4, 5, x.w.shape, generator=random) * 2.0**-14


def rare(x):
    """A class that is below fp32's smallest number on both sides."""
    x.z[0, 5], x.t[0, 5] = -140, -130
    x.h, x.th = torch.ones(1, 1), torch.ones(1, 1)
    x.w, x.tw = x.z.T, x.t.T


def excluded(x):
    x.z[0, 5] = x.t[0, 5] = -math.inf


def cold(x):
    x.z = x.t + 0.1 * x.z


def failures():
    from liger_kernel import chunked_loss
    from liger_kernel import transformers as liger
    from liger_kernel.transformers.fused_linear_kl_div import LigerFusedLinearKLDivLoss
    from trl.experimental.gkd import GKDTrainer
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    forward, reverse = Ours({}), Ours({"divergence": "reverse_kl"})
    js_of_hidden = js(hidden="no bias")

    def kl_div(x):
        return kl_div_of(log_probs(x)[0], log_probs(x)[1].exp())

    def kl_div_of(log_q, p, log_target=False):
        return F.kl_div(log_q, p, reduction="batchmean", log_target=log_target)

    def gkd(x, beta=0.5, T=1):
        return GKDTrainer.generalized_jsd_loss(x.z[None], x.t[None], beta=beta, temperature=T)

    def jsd(x, beta=0.5, T=1):
        return liger.LigerJSD(beta)(*log_probs(x, T))

    def kldiv(x):
        return liger.LigerKLDIVLoss(reduction="batchmean")(log_probs(x)[0], log_probs(x)[1].exp())

    def chunked_jsd(x, **options):
        module = chunked_loss.LigerFusedLinearJSDLoss(compiled=False, **options)
        return module(x.h, x.w, x.th, x.tw, x.labels)

    def soft_jsd(x):
        return chunked_jsd(x, weight_hard_loss=0, weight_soft_loss=1)

    def linear_kl(x):
        return LigerFusedLinearKLDivLoss()(x.h, x.w, F.linear(x.th, x.tw).softmax(-1))

    def chunked(x, beta):
        mask = torch.ones(1, 1)
        return _chunked_divergence_loss(x.h[None], x.th[None], x.w, x.tw, mask, beta, None)[0]

    where = "js, a class that underflows on both sides (Liger issues 1453, 769)"
    make = one_row(rare)
    yield Failure(where, "Liger JSD", jsd, js(), "right", make)
    name = "Liger chunked_loss FusedLinearJSD"
    yield Failure(where, name, soft_jsd, js_of_hidden, "right", make)

    where = "a class that both sides exclude with -inf"
    make = one_row(excluded)
    yield Failure(where, "PyTorch kl_div", kl_div, forward, "NaN", make)
    yield Failure(where, "TRL generalized_jsd_loss", gkd, js(), "NaN", make)
    yield Failure(where, "Liger KLDiv", kldiv, forward, "NaN", make)
    yield Failure(where, "Liger JSD", jsd, js(), "NaN", make)

    where = "student close to the teacher, D of 1e-8 to 1e-6"
    make = one_row(close, classes=1000)
    linear_forward, linear_reverse = Ours({}, hidden="no bias"), js(1.0, hidden="no bias")
    for name, peer, ours in (
        ("PyTorch kl_div", kl_div, forward),
        ("TRL generalized_jsd_loss", gkd, js()),
        ("TRL DistillationTrainer, beta 0", lambda x: chunked(x, 0.0), linear_forward),
        ("TRL DistillationTrainer, beta 1", lambda x: chunked(x, 1.0), linear_reverse),
        ("Liger KLDiv", kldiv, forward),
        ("Liger JSD", jsd, js()),
        ("Liger FusedLinearKLDiv", linear_kl, linear_forward),
    ):
        yield Failure(where, name, peer, ours, "off", make, rows=32)

    def of_probabilities(x):
        return kl_div_of(log_probs(x, 0.05)[1], (x.z / 0.05).softmax(-1))

    def of_logs(x):
        return kl_div_of(*log_probs(x, 0.05)[::-1], log_target=True)

    def plain_js(x):
        q, p = ((y / 0.05).softmax(-1) for y in (x.z, x.t))
        m = ((p + q) / 2).log()
        return (kl_div_of(m, p) + kl_div_of(m, q)) / 2

    for where, ours, gives_of in (
        (
            "reverse_kl at T = 0.05",
            Ours(reverse.options | {"temperature": 0.05}),
            {
                "PyTorch kl_div(log p, q)": ("NaN gradient", of_probabilities),
                "PyTorch kl_div(log p, log q, log_target)": ("right", of_logs),
                "TRL generalized_jsd_loss, beta 1": ("right", lambda x: gkd(x, 1, 0.05)),
                "Liger JSD, beta 1": ("right", lambda x: jsd(x, 1.0, 0.05)),
            },
        ),
        (
            "js at T = 0.05",
            js(0.5, 0.05),
            {
                "PyTorch kl_div(log((p + q) / 2), p)": ("NaN", plain_js),
                "TRL generalized_jsd_loss": ("right", lambda x: gkd(x, 0.5, 0.05)),
                "Liger JSD": ("right", lambda x: jsd(x, 0.5, 0.05)),
            },
        ),
    ):
        for name, (gives, peer) in gives_of.items():
            yield Failure(where, name, peer, ours, gives, one_row(cold), factor=0.05**2)

    # TRL's trainers had a path through Liger; this is what it computed.
    gives, name = ("off" if trl_is_without_liger_jsd() else "gone"), "Liger, as TRL once called it"
    where = "TRL's former path through Liger: half of it cross-entropy (TRL 5731)"
    half = js(0.5, 1, "labels", "no bias")
    yield Failure(where, name, chunked_jsd, half, gives, one_row())
    where = "TRL's former path through Liger: neither logit scale nor soft cap (TRL 6629)"
    caps = js(hidden="no bias", logit_scale=0.5, soft_cap=2.0, teacher_soft_cap=2.0)
    yield Failure(where, name, soft_jsd, caps, gives, one_row())


def trl_is_without_liger_jsd():
    folder = Path(importlib.util.find_spec("trl").origin).parent
    return not any("FusedLinearJSD" in file.read_text() for file in folder.rglob("*.py"))


def symptom(results):
    """What is wrong with (loss, gradients, the exact loss) of rows."""
    if any(loss.isnan() for loss, *_ in results):
        return "NaN"
    if any(g.isnan().any() for _, gradients, _ in results for g in gradients):
        return "NaN gradient"
    off = max(abs(loss - exact) / abs(exact) for loss, _, exact in results)
    if off <= CLOSE_TOLERANCE:
        return "right"
    negative = sum(loss < 0 for loss, *_ in results)
    of_rows = f", negative in {negative} of {len(results)} rows" if negative else ""
    return f"off by up to {off:.0%}{of_rows}"


# ---- the tables ----------------------------------------------------------------------------------


def shown(differences):
    return ", ".join("NaN" if math.isnan(d) else f"{d:.0e}" for d in differences)


def fit(differences, tolerance=TOLERANCE):
    return all(d <= tolerance for d in differences)  # NaN does not


def case_row(case):
    """A row of the table, and whether all is as it is said to be."""
    ours_peer, ours_exact, peer_exact = [], [], []
    for setting in case.settings:
        ours, base = case.ours(**setting), case.inputs()
        mine = run(ours.loss, base.to(torch.float32))
        exact = run(ours.formula, base.to(torch.float64))
        peer = run_peer(functools.partial(case.peer, **setting), base.to(torch.float32))
        ours_peer.append(difference(peer, mine, case.factor(ours)))
        ours_exact.append(difference(mine, exact))
        peer_exact.append(difference(peer, exact, case.factor(ours)))
    columns = [worst(column) for column in (ours_peer, ours_exact, peer_exact)]
    if not fit(columns[1]):
        verdict = "OURS IS WRONG"
    elif fit(columns[2]):
        verdict = "DIFFERS NO MORE" if case.differs else "agree"
    else:
        verdict = f"ours is right: {case.differs}" if case.differs else "THE PEER DIFFERS"
    convention = "; ".join(filter(None, ("times T²" if case.without_t2 else "", case.convention)))
    row = (case.name, case.what, convention, *map(shown, columns), verdict)
    return row, not verdict.isupper()


def failure_row(failure):
    results, off = [], []
    for number in range(failure.rows):
        base = failure.inputs(number)
        exact = run(failure.ours.formula, base.to(torch.float64))
        mine = run(failure.ours.loss, base.to(torch.float32))
        loss, gradients = run_peer(failure.peer, base.to(torch.float32))
        results.append((failure.factor * loss, gradients, exact[0]))
        off.append(difference(mine, exact))
    gives, verdict = symptom(results), shown(worst(off))
    as_known, right = gives.startswith(failure.gives), fit(worst(off), CLOSE_TOLERANCE)
    gives += "" if as_known else f" (KNOWN: {failure.gives})"
    verdict += "" if right else " (OURS IS WRONG)"
    return (failure.where, failure.name, gives, verdict), as_known and right


CASES = ("peer", "what", "convention", "ours, peer", "ours, fp64", "peer, fp64", "verdict")
FAILURES = ("where", "peer", "the peer is", "ours, fp64")


def all_cases():
    for peer in (of_pytorch, of_trl, of_liger, of_torchdistill, of_others):
        yield from peer()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    options = parser.parse_args()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PEERS)
    lines, wrong = [f"fp32; {versions}."], 0
    for title, header, things, row_of in (
        ("Agreement (differences of loss, gradient)", CASES, all_cases, case_row),
        ("Known failures", FAILURES, failures, failure_row),
    ):
        lines += ["", f"## {title}", "", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
        for thing in things():
            row, good = row_of(thing)
            wrong += not good
            lines.append(f"| {' | '.join(row)} |")
            print(f"{'ok' if good else 'WRONG'}: {row[0]}, {row[1]}", file=sys.stderr)
    text = "\n".join(lines) + "\n"
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "peers.md").write_text(text)
    raise SystemExit(f"kdkernels: {wrong} rows are not as they are said to be" if wrong else 0)


if __name__ == "__main__":
    main()
