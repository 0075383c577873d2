"""Experiment 4: distil a language model, where the loss is the bottleneck.

A small GPT learns from a larger one over byte-pair tokens: for each of N tokens of a batch the loss
reads 2 V logits, V = 32,000, and V is larger than everything else in the model. The teacher is
trained or loaded first. The arms start from the same student and see the same batches; they differ
only in what the table ``ARMS`` says, and take turns epoch by epoch. All of them, the reference
too, step with Adam's fused kernel.
"""

import contextlib
import copy
import ctypes
import dataclasses
import json
import math
import os
import statistics
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
from kdkernels.train import TrainError, text
from kdkernels.train.distillation import apart, plain_loss
from kdkernels.train.loop import (
    PHASES,
    Interrupt,
    Learner,
    Loss,
    choose_device,
    epoch_batches,
    reproducible,
)
from kdkernels.train.run_folder import RunFolder

__all__ = ["ARMS", "GPT", "Arm", "Settings", "operations", "results", "run", "traffic"]


@dataclasses.dataclass(frozen=True)
class Arm:
    """What one arm does.

    Attributes:
        about: in words.
        loss: ``"plain"`` and ``"compiled"`` (PyTorch's own functions on logits), ``"dense"``,
            ``"top k"`` (kdkernels' losses of logits, in place) or ``"linear"`` (of hidden states
            and heads).
        kept: what the teacher says of a token is computed once, before the first epoch, and kept.
        exact: the loss is the reference's but for rounding.
    """

    about: str
    loss: str
    kept: bool = False
    exact: bool = True

    @property
    def passes(self) -> int | None:
        """How often the loss reads or writes a tensor of ``[N, V]``; None: see :func:`traffic`."""
        return {"dense": 3, "top k": 2, "linear": 0}.get(self.loss)

    @property
    def products(self) -> tuple[str, ...]:
        """The parts of :func:`operations` that its steps compute."""
        teacher = ("teacher body", "teacher head")
        spared = () if not self.kept else teacher[:1] if self.loss == "linear" else teacher
        return ("student body", "student head", *(part for part in teacher if part not in spared))


ARMS = {
    "reference": Arm("F.kl_div, F.log_softmax and F.cross_entropy of [N, V] logits", "plain"),
    "compiled": Arm("the reference's loss under torch.compile", "compiled"),
    "dense": Arm("kdkernels.distillation_loss in place", "dense"),
    "topk": Arm(
        "kdkernels.topk_distillation_loss in place, of the teacher's largest logits, kept once",
        "top k", kept=True, exact=False,
    ),
    "linear": Arm("kdkernels.linear_distillation_loss of hidden states and heads", "linear"),
    "full": Arm("linear, with the teacher's hidden states kept once", "linear", kept=True),
}  # fmt: skip

TURN = 50
"""Steps of the teacher's between checkpoints."""

# Limits on relative differences from the reference; the arms it holds for differ from it by
# rounding only, which training magnifies from step to step.
FIRST_STEPS = 1e-4
AGREE = {"loss": 1e-5, "gradient": 1e-4}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What experiment 4 is asked for; the command's options, with their defaults.

    Attributes:
        text: a file or a folder, see :func:`kdkernels.train.text.documents`; None is the standard
            library's sources.
        vocabulary: V, entries of the byte-pair vocabulary.
        context: tokens a window.
        batch_size: windows a step.
        student_width, student_layers, teacher_width, teacher_layers: of the two GPTs; a width is
            below 64 or a multiple of it, 64 being a head's.
        lr: Adam's learning rate, for the teacher and every arm; there is no warm-up and no
            clipping, and with 1e-3 the loss jumps at single steps.
        temperature: of the soft targets, > 0.
        alpha: weight of the soft targets, 0..1; the next tokens have 1 - alpha.
        k: largest classes of a token's teacher that the arm topk keeps.
        epochs: of each arm, over its windows.
        teacher_steps: of the teacher; None is 300, or 0 for a loaded one.
        teacher_weights: ``"none"``, or a .safetensors file such as an earlier run's
            checkpoints/teacher.safetensors.
        train_samples: windows that the arms learn from, drawn at random; None is all.
        test_samples: held-out windows that are tested on, drawn at random; None is all.
        seed: of initial weights, windows and batches.
        arms: names from ``ARMS``.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        threads: CPU threads; None is torch's choice.
    """

    text: str | None = None
    vocabulary: int = 32_000
    context: int = 128
    batch_size: int = 8
    student_width: int = 256
    student_layers: int = 4
    teacher_width: int = 384
    teacher_layers: int = 6
    lr: float = 5e-4
    temperature: float = 2.0
    alpha: float = 0.5
    k: int = 64
    epochs: int = 3
    teacher_steps: int | None = None
    teacher_weights: str = "none"
    train_samples: int | None = 240
    test_samples: int | None = 64
    seed: int = 0
    arms: tuple[str, ...] = ("reference", "dense", "topk", "linear", "full")
    device: str = "auto"
    threads: int | None = None

    def __post_init__(self):
        for name in ("student_width", "teacher_width"):
            if getattr(self, name) > 64 and getattr(self, name) % 64:
                option = name.replace("_", "-")
                raise TrainError(
                    f"--{option} {getattr(self, name)}: it takes a multiple of 64, or less than 64"
                )
        if self.k > self.vocabulary:
            raise TrainError(f"--k {self.k} is more than the {self.vocabulary} of --vocabulary")
        if self.teacher_steps is None:
            steps = 300 if self.teacher_weights == "none" else 0
            object.__setattr__(self, "teacher_steps", steps)


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
    model's parameters would be spent twice, and Adam's step with them.

    Args:
        vocabulary: V.
        context: most tokens of a window.
        width: d of the hidden states; heads have 64 each.
        layers: blocks.

    Attributes:
        bare: :meth:`forward` gives hidden states, for a loss that has the heads.
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

    def __init__(self, learner: Learner):
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


def operations(settings: Settings, vocabulary: int) -> dict[str, float]:
    """Floating-point operations of the matrix products of one step, by part.

    A product of ``[n, k]`` and ``[k, m]`` is 2 n k m; backward is twice the forward pass; of
    attention's products half is counted, which is all that a causal kernel needs.

    Args:
        settings: of the models and the batch.
        vocabulary: V.
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


def traffic(settings: Settings, vocabulary: int) -> int:
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


def _loss(arm: Arm, student: GPT, expert: GPT, settings: Settings) -> Loss:
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


def _asked(arm: Arm, expert: GPT, settings: Settings) -> Callable:
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
    settings: Settings, folder: RunFolder, on_step: Callable[[str, int, int], None], say: Callable
) -> None:
    """Run experiment 4, or what is left of it; everything it finds goes to the folder.

    Args:
        settings: what was asked for.
        folder: where metrics and checkpoints go. Checkpoints already in it are continued.
        on_step: ``on_step(learner, steps done, steps in all)``, called after each step.
        say: called with a line for the person who watches, after each epoch.

    Raises:
        TrainError: see :meth:`kdkernels.train.loop.Learner.train_epoch`,
            :func:`kdkernels.train.text.load`, and the teacher's weights.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise TrainError("distill-lm runs in one process: start it without torchrun")
    device = choose_device(settings.device)
    try:
        with reproducible(settings.seed, settings.threads), Interrupt() as interrupt:
            _run(settings, folder, device, interrupt, on_step, say)
    finally:
        folder.close()


def _given(model: GPT, path: str, digest: str) -> None:
    """Load a teacher's weights: a checkpoint of a run, which must be of this text, or any
    state_dict, of which nobody knows.
    """
    if not Path(path).exists():
        raise TrainError(f"--teacher-weights {path}: there is no such file")
    run = Path(path).absolute().parent.parent / "language_model.json"
    if run.exists() and json.loads(run.read_text()).get("digest") != digest:
        raise TrainError(
            f"--teacher-weights {path} learned another text or vocabulary: its tokens mean others"
        )
    try:
        found = {name.removeprefix("model."): value for name, value in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise TrainError(f"--teacher-weights {path} cannot be read: {error}") from None
    for name, weight in model.state_dict().items():
        shape = tuple(found[name].shape) if name in found else None
        if shape != tuple(weight.shape):
            what = "no such tensor" if shape is None else f"one of {list(shape)}"
            raise TrainError(
                f"--teacher-weights {path} is of another model: {name} should be "
                f"{list(weight.shape)}, and the file has {what}"
            )
        with torch.no_grad():
            weight.copy_(found[name])


def _run(settings, folder, device, interrupt, on_step, say):
    everything, held, tokenizer = text.load(
        settings.text, settings.vocabulary, settings.context, device, say
    )
    vocabulary = tokenizer.get_vocab_size()
    if settings.k > vocabulary:
        raise TrainError(f"--k {settings.k} is more than the vocabulary's {vocabulary} entries")
    train = everything.sample(settings.train_samples, settings.seed)
    held = held.sample(settings.test_samples, settings.seed)

    def tested(batches, peak=None):
        """What an epoch of these batches adds to its line of the metrics."""

        def evaluate(model):
            found = held_out(model, held, settings.batch_size)
            found["tokens"] = sum(map(len, batches)) * settings.context
            return found if peak is None else found | {"peak_bytes": peak.bytes}

        return evaluate

    def line(learner, when):
        say(
            f"{learner.name}: {when}, held-out loss {learner.measures['held_out_loss']:.3f}, "
            f"perplexity {learner.measures['perplexity']:,.0f}"
        )

    started = folder.read_json("language_model.json")
    if started is not None and started["digest"] != train.digest:
        raise TrainError("the text is not what it was when this run began: start a new one")

    def made(seed, width, layers):
        torch.manual_seed(seed)
        return GPT(vocabulary, settings.context, width, layers)

    model = made(settings.seed, settings.teacher_width, settings.teacher_layers)
    start = made(settings.seed + 1, settings.student_width, settings.student_layers)
    if settings.teacher_weights != "none" and folder.load("teacher") is None:
        _given(model, settings.teacher_weights, train.digest)
    folder.begin()
    if started is None:
        folder.write_json(
            "language_model.json",
            {
                "digest": train.digest, "vocabulary": vocabulary,
                "text_tokens": len(everything.tokens),
                "windows": len(train), "held_out_windows": len(held),
                "teacher_parameters": sum(p.numel() for p in model.parameters()),
                "student_parameters": sum(p.numel() for p in start.parameters()),
                "operations": operations(settings, vocabulary),
                "passes": traffic(settings, vocabulary),
            },
        )  # fmt: skip
    teacher = Learner(
        "teacher", model.to(device),
        lambda logits, _, labels: F.cross_entropy(logits.flatten(0, 1), labels.flatten()),
        None, tested(()), settings.lr, settings.seed, tuned=True,
    )  # fmt: skip
    teacher.load(folder)
    turns = math.ceil(settings.teacher_steps / TURN)
    while teacher.epoch < turns:
        # The text may be shorter than all steps: then it is gone over again, in another order.
        begin, batches = teacher.epoch * TURN, []
        end = min(begin + TURN, settings.teacher_steps)
        a_pass = len(epoch_batches(len(everything), settings.batch_size, 0, 0, "cpu"))
        for number in range(begin // a_pass, (end - 1) // a_pass + 1):
            these = epoch_batches(
                len(everything), settings.batch_size, settings.seed, number, device
            )
            first = number * a_pass
            batches += these[max(begin - first, 0) : end - first]
        teacher.evaluate = tested(batches)
        teacher.train_epoch(
            everything, batches, folder, interrupt,
            lambda: on_step("teacher", teacher.step, settings.teacher_steps),
        )  # fmt: skip
        line(teacher, f"step {teacher.step} of {settings.teacher_steps}")
    if not teacher.measures:
        teacher.measures = teacher.evaluate(teacher.model)
        line(teacher, "as it is")
    teacher.save(folder, optimizer=False)
    expert = model.eval().requires_grad_(False)
    teacher.optimizer.state.clear()

    def kept(arm: Arm) -> tuple[dict[str, torch.Tensor], float]:
        """What the teacher says of all windows, made once, and the seconds that took."""
        name = "teacher-" + ("topk" if arm.loss == "top k" else "hidden")
        found = folder.load(name)
        if found is None:
            ask, parts = _asked(arm, expert, settings), []
            began = time.perf_counter()
            for index in torch.arange(len(train), device=device).split(settings.batch_size):
                parts.append({k: v.cpu() for k, v in ask(train.batch(index)[0]).items()})
            rows = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
            state = {"seconds": time.perf_counter() - began}
            if arm.loss == "top k":
                inside = (rows["values"].float() / settings.temperature).logsumexp(-1)
                state["share"] = (inside - rows["logsumexp"]).exp().mean().item()
            folder.save(name, rows, state)
            found = rows, state
        return found[0], found[1]["seconds"]

    batches = [
        epoch_batches(len(train), settings.batch_size, settings.seed, number, device)
        for number in range(settings.epochs)
    ]
    steps = sum(len(found) for found in batches)
    learners = []
    for name in settings.arms:
        arm = ARMS[name]
        student = copy.deepcopy(start).to(device)
        student.bare = arm.loss == "linear"
        ask, took = _asked(arm, expert, settings), 0.0
        predict = lambda tokens, index, view, ask=ask: _packed(ask(tokens))  # noqa: E731
        if arm.kept:
            rows, took = kept(arm)
            predict = lambda tokens, index, view, rows=rows: _packed(  # noqa: E731
                {key: value[index.cpu()].to(device) for key, value in rows.items()}
            )
        learner = Learner(
            name, student, _loss(arm, student, expert, settings), predict, tested(()),
            settings.lr, settings.seed + 2, tuned=True,
        )  # fmt: skip
        learner.load(folder)
        if learner.step == 0:
            learner.seconds["teacher"] += took
        if arm.loss == "compiled" and learner.step < steps:  # compiles off the clock
            _asked_once(learner, train, batches[0][0])
        learners.append(learner)

    if folder.read_json("agreement.json") is None:
        folder.write_json("agreement.json", _agreement(learners, train, batches[0][0]))

    for epoch in range(settings.epochs):
        for learner in learners:
            if learner.epoch > epoch:
                continue
            peak = _Peak(learner)

            def stepped(learner=learner, peak=peak):
                peak.read()
                on_step(learner.name, learner.step, steps)

            learner.evaluate = tested(batches[epoch], peak)
            learner.train_epoch(train, batches[epoch], folder, interrupt, stepped)
            line(learner, f"epoch {learner.epoch} of {settings.epochs}")


def _asked_once(learner: Learner, train: text.Text, index: torch.Tensor):
    """The loss of the windows ``index``, and its gradients in all parameters."""
    tokens, labels = train.batch(index)
    learner.model.train()
    taught = None if learner.predict is None else learner.predict(tokens, index, None)
    loss = learner.loss(learner.model(tokens), taught, labels)
    return loss.detach().double(), torch.autograd.grad(loss, learner.parameters)


def _agreement(learners: list[Learner], train: text.Text, index: torch.Tensor) -> dict:
    """How far arms are from the reference on one batch and the same weights.

    Returns:
        For each arm with the reference's loss, relative: ``loss``, and ``gradient``, the norm of
        the difference of all parameters' gradients over the norm of the reference's.
    """
    found = {
        learner.name: _asked_once(learner, train, index)
        for learner in learners
        if ARMS[learner.name].exact and learner.step == 0
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


def results(folder: RunFolder) -> dict | None:
    """Read experiment 4's metrics.

    Returns:
        None where there are none yet; otherwise ``losses`` (learner -> loss of each step),
        ``epochs`` (learner -> its epoch lines), ``arms`` (a row each for the tables: tokens,
        seconds, by phase too, tokens a second, peak bytes, held-out loss and perplexity,
        operations of a step's matrix products, bytes that its loss moves of ``[N, V]`` tensors;
        over the reference's, ``speedup``, ``memory`` and, with both models and Adam's moments,
        ``whole_memory``), ``apart`` (arm -> relative difference from the reference's
        losses), ``agreement`` (see the file agreement.json), ``topk_share`` (mean over
        tokens of the probability, at the temperature, that the teacher gives to the classes kept of
        it), ``work`` (see language_model.json),
        ``models_bytes`` (both models and the student's moments) and ``checks``.
    """
    losses, epochs = {}, {}
    for line in folder.metrics():
        if line["kind"] == "step":
            losses.setdefault(line["learner"], []).append(line["loss"])
        elif line["kind"] == "epoch":
            epochs.setdefault(line["learner"], []).append(line)
    work = folder.read_json("language_model.json")
    if work is None or not epochs.keys() - {"teacher"}:
        return None
    config = folder.config["language_model"]
    # In fp32: both models, and Adam's two moments of the student's.
    models = 4 * (3 * work["student_parameters"] + work["teacher_parameters"])
    logits = 4 * config["batch_size"] * config["context"] * work["vocabulary"]  # bytes, fp32
    arms = {}
    for name, lines in epochs.items():
        phases = {p: sum(line["phases"][p] for line in lines) for p in PHASES}
        peaks = [line["peak_bytes"] for line in lines if line.get("peak_bytes") is not None]
        seconds, tokens = sum(phases.values()), sum(line["tokens"] for line in lines)
        arms[name] = {
            "epochs": len(lines), "steps": lines[-1]["step"], "tokens": tokens,
            "phases": phases, "seconds": seconds, "tokens_per_second": tokens / seconds,
            "peak_bytes": max(peaks) if peaks else None,
            "held_out_loss": lines[-1]["held_out_loss"], "perplexity": lines[-1]["perplexity"],
        }  # fmt: skip
        if name == "teacher":
            continue
        arm = ARMS[name]
        passes = work["passes"] if arm.loss == "plain" else arm.passes
        arms[name]["operations"] = sum(work["operations"][part] for part in arm.products)
        arms[name]["logits_bytes"] = None if passes is None else passes * logits
    base = arms.get("reference")
    for name, arm in arms.items():
        if base is None or name == "teacher":
            continue
        pairs = list(zip(epochs["reference"], epochs[name], strict=False))
        ratios = [a["seconds"] / b["seconds"] for a, b in pairs]
        arm["speedup"] = sum(a["seconds"] for a, _ in pairs) / sum(b["seconds"] for _, b in pairs)
        arm["epoch_speedup"] = statistics.median(ratios)
        arm["epoch_speedup_range"] = (min(ratios), max(ratios))
        if arm["peak_bytes"] and base["peak_bytes"]:
            arm["memory"] = arm["peak_bytes"] / base["peak_bytes"]
            arm["whole_memory"] = (models + arm["peak_bytes"]) / (models + base["peak_bytes"])
    top = folder.load("teacher-topk")
    agreement = folder.read_json("agreement.json") or {}
    checks, curves = [], {}
    for name in arms:
        if base is None or name in ("teacher", "reference"):
            continue
        curves[name] = apart(losses["reference"], losses[name])
        if not ARMS[name].exact:
            continue
        found = [
            (f"{key} of the first batch, same weights", agreement[name][key], limit)
            for key, limit in AGREE.items()
            if name in agreement
        ]
        found.append(("loss curves, first two steps", max(curves[name][:2]), FIRST_STEPS))
        checks += [
            {"name": f"{name} follows reference: {text}", "value": value, "limit": limit,
             "passed": value <= limit}
            for text, value, limit in found
        ]  # fmt: skip
    return {
        "losses": losses, "epochs": epochs, "arms": arms, "apart": curves, "agreement": agreement,
        "topk_share": None if top is None else top[1]["share"], "work": work,
        "models_bytes": models, "checks": checks,
    }  # fmt: skip
