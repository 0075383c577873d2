"""Experiment 4: distil a language model, where the loss is the bottleneck.

A small GPT learns from a larger one over byte-pair tokens: for each of N tokens of a batch the loss
reads 2 V logits, V = 32,000, and V is larger than everything else in the model. The teacher is
trained or loaded first. The arms start from the same student and see the same batches; they differ
only in what the table ``LM_ARMS`` says, and take turns epoch by epoch. All of them, the reference
too, step with Adam's fused kernel.
"""

import copy
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.nn import functional as F

import kdkernels
from kdkernels.experiments import text
from kdkernels.experiments.gpt import GPT, held_out
from kdkernels.experiments.settings import LM_ARMS, LanguageModel, LmArm
from kdkernels.experiments.step_cost import Peak, operations, traffic
from kdkernels.train import TrainError, loop, session
from kdkernels.train.distillation import plain_loss
from kdkernels.train.images import OnStep
from kdkernels.train.run_folder import RunFolder, load_state, read_tensors

TURN = 50
"""Steps of the teacher's between checkpoints."""


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
            logits,
            taught.values,
            taught.indices,
            labels,
            **soft,
            inplace=True,
            tail="bucket",
            teacher_logsumexp=taught.logsumexp,
        )
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


def run(settings: LanguageModel, folder: RunFolder, on_step: OnStep, say: Callable) -> None:
    """Run experiment 4, or what is left of it; as :func:`kdkernels.train.distillation.run`."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise TrainError("distill-lm runs in one process: start it without torchrun")
    with session.running(settings, folder) as (device, interrupt):
        one = _Run(settings, folder, device, interrupt, on_step, say)
        one.teach()
        one.arms()


def _given(model: GPT, path: str, digest: str) -> None:
    """Load a teacher's weights: a checkpoint of a run, which must be of this text, or any
    state_dict, whose text is not known.
    """
    if not Path(path).exists():
        raise TrainError(f"teacher_weights {path}: there is no such file")
    run = Path(path).absolute().parent.parent / "language_model.json"
    if run.exists() and json.loads(run.read_text()).get("digest") != digest:
        raise TrainError(
            f"teacher_weights {path} learned another text or vocabulary: its tokens mean others"
        )
    try:
        found, _ = read_tensors(Path(path))
    except (SafetensorError, OSError) as error:
        raise TrainError(f"teacher_weights {path} cannot be read: {error}") from None
    if not any(name.startswith("model.") for name in found):
        found = {f"model.{name}": value for name, value in found.items()}
    load_state(model, found, path)


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
            "digest": self.train.digest,
            "vocabulary": self.vocabulary,
            "text_tokens": len(self.everything.tokens),
            "windows": len(self.train),
            "held_out_windows": len(self.held),
            "teacher_parameters": sum(p.numel() for p in self.expert.parameters()),
            "student_parameters": sum(p.numel() for p in self.start.parameters()),
            "operations": operations(self.settings, self.vocabulary),
            "passes": traffic(self.settings, self.vocabulary),
        }

    def made(self, seed: int, width: int, layers: int) -> GPT:
        torch.manual_seed(seed)
        return GPT(self.vocabulary, self.settings.context, width, layers)

    def tested(self, batches, peak: Peak | None = None) -> Callable:
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
            "teacher",
            self.expert.to(self.device),
            lambda logits, _, labels: F.cross_entropy(logits.flatten(0, 1), labels.flatten()),
            None,
            self.tested(()),
            settings.lr,
            settings.seed,
            tuned=True,
        )
        teacher.load(self.folder)
        steps = settings.teacher_steps or 0  # None only until the settings are made
        a_pass = len(self.batches(0, self.everything))
        while teacher.epoch < math.ceil(steps / TURN):
            # A text that is shorter than all steps is read again, in another order.
            begin = teacher.epoch * TURN
            end = min(begin + TURN, steps)
            passes = range(begin // a_pass, (end - 1) // a_pass + 1)
            batches = [
                batch for number in passes for batch in self.batches(number, self.everything)
            ]
            batches = batches[begin - passes[0] * a_pass :][: end - begin]
            teacher.evaluate = self.tested(batches)
            teacher.train_epoch(
                self.everything,
                batches,
                self.folder,
                self.interrupt,
                lambda: self.on_step("teacher", teacher.step, steps),
            )
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
            name,
            student,
            _loss(arm, student, self.expert, settings),
            predict,
            self.tested(()),
            settings.lr,
            settings.seed + 2,
            tuned=True,
        )
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
                peak = Peak(learner)

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
