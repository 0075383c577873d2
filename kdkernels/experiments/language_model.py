"""Experiment 4: distil a language model, where the loss is the bottleneck.

A small GPT learns from a larger one over byte-pair tokens: for each of N tokens of a batch the loss
reads 2 V logits, V = 32,000, and V is larger than everything else in the model. The teacher is
trained or loaded first. The arms start from the same student and see the same batches; they differ
only in what the table ``LM_ARMS`` says, and take turns epoch by epoch. All of them, the reference
too, step with Adam's fused kernel.
"""

import contextlib
import copy
import ctypes
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kdkernels
from kdkernels.experiments import text
from kdkernels.experiments.settings import LM_ARMS, LanguageModel, LmArm
from kdkernels.train import TrainError, loop, session
from kdkernels.train.distillation import plain_loss
from kdkernels.train.run_folder import RunFolder

TURN = 50
"""Steps of the teacher's between checkpoints."""


class _Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.heads = max(1, width // 64)
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [b, c, width]
        b, c, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(b, c, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [b, heads, c, width / heads] each
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, c, width))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class GPT(nn.Module):
    """A decoder of pre-norm blocks, with learned positions and without dropout, as GPT-2 has them
    (Radford et al., 2019), and its initial weights: normal with std 0.02, those of the layers that
    write to the residual stream divided by sqrt(2 layers).

    The head is the token embedding, transposed: with two matrices of V rows most of a small
    model's parameters would be spent twice. Attention heads have 64 each. With ``bare``,
    :meth:`forward` gives hidden states, for a loss that has the heads.
    """

    def __init__(self, vocabulary: int, context: int, width: int, layers: int):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(_Block(width) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.bare = False
        for name, weight in self.named_parameters():
            if name.endswith(("out.weight", "down.weight")):
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * layers))
            elif weight.dim() == 2:
                nn.init.normal_(weight, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    @property
    def head(self) -> torch.Tensor:
        """``[V, d]``."""
        return self.tokens.weight

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        """``[b, c]`` int64 to ``[b, c, d]``."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.norm(self.blocks(self.tokens(tokens) + self.positions(places)))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """``[b, c]`` int64 to logits ``[b, c, V]``, or hidden states ``[b, c, d]`` if ``bare``."""
        hidden = self.hidden(tokens)
        return hidden if self.bare else F.linear(hidden, self.head)


def held_out(model: GPT, windows: text.Text, batch: int) -> dict[str, float]:
    """``{"held_out_loss": cross-entropy a token in nats, "perplexity": its exponential}``.

    Logits are made of 256 tokens at a time.
    """
    model.eval()
    total = 0.0
    with torch.no_grad():
        for index in torch.arange(len(windows)).split(batch):
            tokens, labels = windows.batch(index)
            rows = model.hidden(tokens).flatten(0, 1).split(256)
            for hidden, label in zip(rows, labels.flatten().split(256), strict=True):
                logits = F.linear(hidden, model.head)
                total += F.cross_entropy(logits, label, reduction="sum").item()
    loss = total / (len(windows) * windows.context)
    return {"held_out_loss": loss, "perplexity": math.exp(min(loss, 700.0))}


# ---- memory --------------------------------------------------------------------------------------


def _resident(field: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) << 10


class _Peak:
    """The most memory that steps take beyond what was there before: bytes, or None if unknown.

    On a CPU the peak of the process's resident set (VmHWM, which writing 5 to
    /proc/self/clear_refs resets) less the resident set at the start; on CUDA the peak of what is
    allocated less what was. Adam's moments, which the first step of all makes, are not counted.
    """

    def __init__(self, learner: loop.Learner):
        self._cuda = learner.device if learner.device.type == "cuda" else None
        self.bytes = None
        self._before = None
        moments = 0
        if not learner.optimizer.state:
            moments = 2 * sum(p.nbytes for p in learner.parameters)
        if self._cuda is not None:
            torch.cuda.reset_peak_memory_stats(self._cuda)
            self._before = torch.cuda.memory_allocated(self._cuda) + moments
            return
        # What the C library has kept of earlier arms' memory would hide what this one takes.
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)
        with contextlib.suppress(OSError, StopIteration):
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
            self._before = _resident("VmRSS:") + moments

    def read(self) -> None:
        """Called after a step."""
        if self._before is not None:
            cuda = self._cuda is not None
            peak = torch.cuda.max_memory_allocated(self._cuda) if cuda else _resident("VmHWM:")
            self.bytes = peak - self._before


# ---- how much work a step is ---------------------------------------------------------------------


def operations(settings: LanguageModel, vocabulary: int) -> dict[str, float]:
    """Floating-point operations of the matrix products of one step, by part.

    A product of ``[n, k]`` and ``[k, m]`` is 2 n k m; backward is twice the forward pass; of
    attention's products half is counted, which is all that a causal kernel needs.
    """
    rows = settings.batch_size * settings.context

    def body(width, layers):
        return layers * rows * (2 * 12 * width**2 + 2 * settings.context * width)

    return {
        "student body": 3 * body(settings.student_width, settings.student_layers),
        "student head": 3 * 2.0 * rows * vocabulary * settings.student_width,
        "teacher body": body(settings.teacher_width, settings.teacher_layers),
        "teacher head": 2.0 * rows * vocabulary * settings.teacher_width,
    }


class _Passes(TorchDispatchMode):
    """Counts the tensors of at least ``elements`` that ops read and write."""

    def __init__(self, elements: int):
        super().__init__()
        self.elements, self.count = elements, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [x for x in tree_leaves((args, found)) if isinstance(x, torch.Tensor)]
            self.count += sum(x.numel() >= self.elements for x in tensors)
        return found


def traffic(settings: LanguageModel, vocabulary: int) -> int:
    """How often the reference's loss and its gradient read or write a tensor of ``[N, V]``.

    Counted on a few rows, op by op: each op reads and writes each of its tensors once.
    """
    rows, generator = 4, torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, rows, vocabulary, generator=generator)
    student.requires_grad_()
    with _Passes(rows * vocabulary) as passes:
        loss = plain_loss(
            student, teacher, torch.zeros(rows, dtype=torch.int64),
            temperature=settings.temperature, alpha=settings.alpha,
        )  # fmt: skip
        torch.autograd.grad(loss, student)
    return passes.count


# ---- the experiment ------------------------------------------------------------------------------


def _loss(arm: LmArm, student: GPT, expert: GPT, settings: LanguageModel) -> loop.Loss:
    soft: dict[str, Any] = {"temperature": settings.temperature, "alpha": settings.alpha}
    if arm.loss in ("plain", "compiled"):
        plain = torch.compile(plain_loss, dynamic=False) if arm.loss == "compiled" else plain_loss
        return lambda logits, taught, labels: plain(
            logits.flatten(0, 1), taught.flatten(0, 1), labels.flatten(), **soft
        )
    if arm.loss == "dense":
        return lambda logits, taught, labels: kdkernels.distillation_loss(
            logits, taught, labels, **soft, inplace=True
        )
    if arm.loss == "top k":
        return lambda logits, taught, labels: kdkernels.topk_distillation_loss(
            logits, taught.values, taught.indices, labels, **soft, inplace=True,
            tail="bucket", teacher_logsumexp=taught.logsumexp,
        )  # fmt: skip
    return lambda hidden, taught, labels: kdkernels.linear_distillation_loss(
        hidden, student.head, taught, expert.head, labels, **soft
    )


def _asked(arm: LmArm, expert: GPT, settings: LanguageModel) -> Callable:
    """What the teacher says of windows ``[b, c]``: logits, the k largest of them, or hidden states,
    by name.
    """

    def ask(tokens, *_):
        with torch.no_grad():
            hidden = expert.hidden(tokens)
            if arm.loss == "linear":
                return {"hidden": hidden}
            logits = F.linear(hidden, expert.head)
            if arm.loss == "top k":
                top = kdkernels.topk_teacher(logits, settings.k, temperature=settings.temperature)
                return top._asdict() | {"values": top.values.half()}
            return {"logits": logits}

    return ask


def _packed(said: dict[str, torch.Tensor]):
    """What a loss takes of what the teacher said."""
    return kdkernels.TopK(**said) if len(said) > 1 else next(iter(said.values()))


def run(
    settings: LanguageModel,
    folder: RunFolder,
    on_step: Callable[[str, int, int], None],
    say: Callable,
) -> None:
    """Run experiment 4, or what is left of it; as :func:`kdkernels.train.distillation.run`."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise TrainError("distill-lm runs in one process: start it without torchrun")
    with session.running(settings, folder) as (device, interrupt):
        one = _Run(settings, folder, device, interrupt, on_step, say)
        one.teach()
        one.arms()


def _given(model: GPT, path: str, digest: str) -> None:
    """Load a teacher's weights: a checkpoint of a run, which must be of this text, or any
    state_dict, of which nobody knows.
    """
    if not Path(path).exists():
        raise TrainError(f"teacher_weights {path}: there is no such file")
    run = Path(path).absolute().parent.parent / "language_model.json"
    if run.exists() and json.loads(run.read_text()).get("digest") != digest:
        raise TrainError(
            f"teacher_weights {path} learned another text or vocabulary: its tokens mean others"
        )
    try:
        found = {name.removeprefix("model."): value for name, value in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise TrainError(f"teacher_weights {path} cannot be read: {error}") from None
    for name, weight in model.state_dict().items():
        shape = tuple(found[name].shape) if name in found else None
        if shape != tuple(weight.shape):
            what = "no such tensor" if shape is None else f"one of {list(shape)}"
            raise TrainError(
                f"teacher_weights {path} is of another model: {name} should be "
                f"{list(weight.shape)}, and the file has {what}"
            )
        with torch.no_grad():
            weight.copy_(found[name])


class _Run:
    """A run under way: the text, the teacher, and what the arms share."""

    def __init__(self, settings: LanguageModel, folder, device, interrupt, on_step, say):
        self.settings, self.folder, self.device = settings, folder, device
        self.interrupt, self.on_step, self.say = interrupt, on_step, say
        self.everything, held, tokenizer = text.load(
            settings.text, settings.vocabulary, settings.context, device, say
        )
        self.vocabulary = tokenizer.get_vocab_size()
        if settings.k > self.vocabulary:
            raise TrainError(
                f"k is {settings.k}; the vocabulary of this text has {self.vocabulary} entries"
            )
        self.train = self.everything.sample(settings.train_samples, settings.seed)
        self.held = held.sample(settings.test_samples, settings.seed)
        started = folder.read_json("language_model.json")
        if started is not None and started["digest"] != self.train.digest:
            raise TrainError("the text is not what it was when this run began: start a new one")
        self.expert = self.made(settings.seed, settings.teacher_width, settings.teacher_layers)
        self.start = self.made(settings.seed + 1, settings.student_width, settings.student_layers)
        if settings.teacher_weights != "none" and folder.load("teacher") is None:
            _given(self.expert, settings.teacher_weights, self.train.digest)
        folder.begin()
        if started is None:
            folder.write_json("language_model.json", self.work())

    def work(self) -> dict[str, Any]:
        """What the run learns from and computes, as JSON."""
        return {
            "digest": self.train.digest, "vocabulary": self.vocabulary,
            "text_tokens": len(self.everything.tokens),
            "windows": len(self.train), "held_out_windows": len(self.held),
            "teacher_parameters": sum(p.numel() for p in self.expert.parameters()),
            "student_parameters": sum(p.numel() for p in self.start.parameters()),
            "operations": operations(self.settings, self.vocabulary),
            "passes": traffic(self.settings, self.vocabulary),
        }  # fmt: skip

    def made(self, seed: int, width: int, layers: int) -> GPT:
        torch.manual_seed(seed)
        return GPT(self.vocabulary, self.settings.context, width, layers)

    def tested(self, batches, peak: _Peak | None = None) -> Callable:
        """What an epoch of these batches adds to its line of the metrics."""

        def evaluate(model):
            found = held_out(model, self.held, self.settings.batch_size)
            found["tokens"] = sum(map(len, batches)) * self.settings.context
            return found if peak is None else found | {"peak_bytes": peak.bytes}

        return evaluate

    def line(self, learner: loop.Learner, when: str) -> None:
        self.say(
            f"{learner.name}: {when}, held-out loss {learner.measures['held_out_loss']:.3f}, "
            f"perplexity {learner.measures['perplexity']:,.0f}"
        )

    def batches(self, number: int, samples=None) -> list[torch.Tensor]:
        count = len(self.train if samples is None else samples)
        size, seed = self.settings.batch_size, self.settings.seed
        return loop.epoch_batches(count, size, seed, number, self.device)

    def teach(self) -> None:
        """Train the teacher for what is left of its steps."""
        settings = self.settings
        teacher = loop.Learner(
            "teacher", self.expert.to(self.device),
            lambda logits, _, labels: F.cross_entropy(logits.flatten(0, 1), labels.flatten()),
            None, self.tested(()), settings.lr, settings.seed, tuned=True,
        )  # fmt: skip
        teacher.load(self.folder)
        steps = settings.teacher_steps or 0  # None only until the settings are made
        a_pass = len(self.batches(0, self.everything))
        while teacher.epoch < math.ceil(steps / TURN):
            # The text may be shorter than all steps: then it is gone over again, in another order.
            begin, batches = teacher.epoch * TURN, []
            end = min(begin + TURN, steps)
            for number in range(begin // a_pass, (end - 1) // a_pass + 1):
                first = number * a_pass
                these = self.batches(number, self.everything)
                batches += these[max(begin - first, 0) : end - first]
            teacher.evaluate = self.tested(batches)
            teacher.train_epoch(
                self.everything, batches, self.folder, self.interrupt,
                lambda: self.on_step("teacher", teacher.step, steps),
            )  # fmt: skip
            self.line(teacher, f"step {teacher.step} of {steps}")
        if not teacher.measures:
            teacher.measures = teacher.evaluate(teacher.model)
            self.line(teacher, "as it is")
        teacher.save(self.folder, optimizer=False)
        self.expert.eval().requires_grad_(False)

    def kept(self, arm: LmArm) -> tuple[dict[str, torch.Tensor], float]:
        """The teacher's output for all windows, made once, and the seconds that took."""
        name = "teacher-" + ("topk" if arm.loss == "top k" else "hidden")
        found = self.folder.load(name)
        if found is None:
            settings, parts = self.settings, []
            ask = _asked(arm, self.expert, settings)
            began = time.perf_counter()
            for index in torch.arange(len(self.train), device=self.device).split(
                settings.batch_size
            ):
                parts.append({k: v.cpu() for k, v in ask(self.train.batch(index)[0]).items()})
            rows = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
            state = {"seconds": time.perf_counter() - began}
            if arm.loss == "top k":
                inside = (rows["values"].float() / settings.temperature).logsumexp(-1)
                state["share"] = (inside - rows["logsumexp"]).exp().mean().item()
            self.folder.save(name, rows, state)
            found = rows, state
        return found[0], found[1]["seconds"]

    def learner(self, name: str, steps: int) -> loop.Learner:
        """An arm's student, where its checkpoint left it."""
        arm, settings = LM_ARMS[name], self.settings
        student = copy.deepcopy(self.start).to(self.device)
        student.bare = arm.loss == "linear"
        ask, took = _asked(arm, self.expert, settings), 0.0

        def predict(tokens, index, view):
            return _packed(ask(tokens))

        if arm.kept:
            rows, took = self.kept(arm)

            def predict(tokens, index, view):
                return _packed({k: v[index.cpu()].to(self.device) for k, v in rows.items()})

        learner = loop.Learner(
            name, student, _loss(arm, student, self.expert, settings), predict, self.tested(()),
            settings.lr, settings.seed + 2, tuned=True,
        )  # fmt: skip
        learner.load(self.folder)
        if learner.step == 0:
            learner.seconds["teacher"] += took
        if arm.loss == "compiled" and learner.step < steps:  # compiles off the clock
            _asked_once(learner, self.train, self.batches(0)[0])
        return learner

    def arms(self) -> None:
        """Train the arms in turns, epoch by epoch."""
        settings, folder = self.settings, self.folder
        batches = [self.batches(number) for number in range(settings.epochs)]
        steps = sum(map(len, batches))
        learners = [self.learner(name, steps) for name in settings.arms]
        if folder.read_json("agreement.json") is None:
            folder.write_json("agreement.json", _agreement(learners, self.train, batches[0][0]))
        for epoch in range(settings.epochs):
            for learner in learners:
                if learner.epoch > epoch:
                    continue
                peak = _Peak(learner)

                def stepped(learner=learner, peak=peak):
                    peak.read()
                    self.on_step(learner.name, learner.step, steps)

                learner.evaluate = self.tested(batches[epoch], peak)
                learner.train_epoch(self.train, batches[epoch], folder, self.interrupt, stepped)
                self.line(learner, f"epoch {learner.epoch} of {settings.epochs}")


def _asked_once(learner: loop.Learner, train: text.Text, index: torch.Tensor):
    """The loss of the windows ``index``, and its gradients in all parameters."""
    tokens, labels = train.batch(index)
    learner.model.train()
    taught = None if learner.predict is None else learner.predict(tokens, index, None)
    loss = learner.loss(learner.model(tokens), taught, labels)
    return loss.detach().double(), torch.autograd.grad(loss, learner.parameters)


def _agreement(learners: list[loop.Learner], train: text.Text, index: torch.Tensor) -> dict:
    """How far arms are from the reference on one batch and the same weights: relative ``loss``, and
    ``gradient``, the norm of the difference of all gradients over the norm of the reference's.
    """
    found = {
        learner.name: _asked_once(learner, train, index)
        for learner in learners
        if LM_ARMS[learner.name].exact and learner.step == 0
    }
    if "reference" not in found:
        return {}
    base, gradients = found.pop("reference")
    norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients))

    def away(others):
        pairs = zip(others, gradients, strict=True)
        return math.sqrt(sum((a - b).double().square().sum().item() for a, b in pairs)) / norm

    return {
        name: {"loss": (abs(loss - base) / base).item(), "gradient": away(others)}
        for name, (loss, others) in found.items()
    }
