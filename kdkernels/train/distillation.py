"""Experiment 2: distil a teacher into a student, a ResNet-18 into a MobileNetV2 unless others are
named, in five arms; ``distill`` of one's own models runs the fastest of them.

The teacher is trained or loaded; it predicts; the student is trained on its predictions and the
labels; epoch after epoch, until a target accuracy, a number of epochs or a budget (Hinton et al.,
arXiv 1503.02531). With several generations the student then teaches the next one (born-again
networks, Furlanello et al., arXiv 1805.04770). The arms start from the same weights and see the
same batches; they differ only in what the table ``ARMS`` says. They take turns epoch by epoch, so
that whatever else the machine does in the meantime slows all of them alike. With noise asked for
there is one more arm, the last one of the table with that noise on its student.
"""

import copy
import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import kdkernels
from kdkernels.train import TrainError, distributed, loop, models, session
from kdkernels.train.checks import check_images, images_of, try_on
from kdkernels.train.images import Images, OnStep
from kdkernels.train.noise import Noise
from kdkernels.train.predictions import Predictions, about, differences, model_hash, write
from kdkernels.train.run_folder import RunFolder
from kdkernels.train.settings import ARMS, CONTROL, NOISY, Arm
from kdkernels.train.settings import Distil as Settings

_CONTROL = Arm("the reference with kept predictions, one epoch", "plain", "once", epochs=1)


def plain_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float,
    alpha: float,
) -> torch.Tensor:
    """Hinton's loss with PyTorch's own functions, as a training script would spell it.

    ``alpha T^2 KL(p_t || p_s) + (1 - alpha) CE`` of logits ``[b, classes]`` and labels ``[b]``, a
    mean over rows, with softmaxes at temperature T and the cross-entropy at 1.
    """
    soft = F.kl_div(
        F.log_softmax(student / temperature, 1),
        F.softmax(teacher / temperature, 1),
        reduction="batchmean",
    )
    return alpha * temperature**2 * soft + (1 - alpha) * F.cross_entropy(student, labels)


def _loss(arm: Arm, settings: Settings, regularized: bool = False) -> loop.Loss:
    if arm.loss == "cross-entropy":
        return _cross_entropy
    soft: dict[str, Any] = {"temperature": settings.temperature, "alpha": settings.alpha}
    if arm.loss == "plain" and settings.divergence == "forward_kl":
        return lambda logits, taught, labels: plain_loss(logits, taught, labels, **soft)
    soft |= {"divergence": settings.divergence}
    if settings.beta is not None:
        soft["beta"] = settings.beta
    if arm.loss == "plain":
        soft["backend"] = "reference"
    else:  # the regulariser differentiates the gradient, which must not lie over the logits
        soft["inplace"] = arm.tuned and not regularized

    def loss(logits, taught, labels):
        if isinstance(taught, torch.Tensor):
            return kdkernels.distillation_loss(logits, taught, labels, **soft)
        # The kept logsumexp is of temperature 1; of another the rest's share is not known.
        tail: dict[str, Any] = {"tail": "renormalize"}
        if settings.temperature == 1:
            tail = {"tail": "bucket", "teacher_logsumexp": taught.logsumexp}
        return kdkernels.topk_distillation_loss(
            logits, taught.values, taught.indices, labels, **tail, **soft
        )

    return loss


def run(
    settings: Settings,
    folder: RunFolder,
    on_step: OnStep,
    say: Callable,
    *,
    teacher: nn.Module | None = None,
    student: nn.Module | None = None,
    images: tuple[Images, Images] | None = None,
) -> dict[str, nn.Module]:
    """Run experiment 2, or what is left of it.

    Args:
        settings: of the run.
        folder: for metrics, checkpoints and test predictions. Checkpoints in it are continued.
        on_step: ``on_step(learner, steps done, steps in all)``, called after each step.
        say: called with a line for the terminal, after each epoch.
        teacher, student: models to take instead of those that the settings name; the teacher is
            ready and stays as it is, a copy of the student is where every arm starts.
        images: training and test images to take instead.

    Returns:
        The trained students by name: an arm's, of later generations ``"<arm>-g<generation>"``.
    """
    with session.running(settings, folder) as (device, interrupt):
        one = _Run(settings, folder, device, interrupt, on_step, say, images)
        return one.students(teacher, student)


def _cross_entropy(logits, _, labels):
    return F.cross_entropy(logits, labels)


def _asking(expert: nn.Module) -> loop.Predict:
    """``predict`` of a learner whose teacher runs at each step."""

    def ask(images, *_):
        with torch.no_grad():
            return expert(images)

    return ask


class _Run:
    """A run under way: what all learners share."""

    def __init__(self, settings, folder, device, interrupt, on_step, say, images):
        self.settings, self.folder, self.device = settings, folder, device
        self.interrupt, self.on_step, self.say = interrupt, on_step, say
        self.ranks = distributed.current()
        self.keeps_teacher, self.skips = False, {"teacher": False, "student": False}
        self.whole, train, test = images_of(settings, images)
        check_images(train, test)
        self.inputs: dict[str, dict] = {
            name: {"images": len(part)} | about(part)
            for name, part in (("training", train), ("test", test))
        }
        # The pixels are hashed once.
        self.whole = dataclasses.replace(self.whole, _pixels_sha256=train._pixels_sha256)
        self.train, self.test = train.to(device), test.to(device)

    def begin(self, teacher: nn.Module | None) -> None:
        """Begin to write: all that was given can be used, and is what an earlier start had."""
        if teacher is not None:
            self.inputs["teacher"] = {"model": model_hash(teacher)}
        before = self.ranks.first(lambda: self.folder.read_json("inputs.json")) or {}
        for name, here in self.inputs.items():
            differs = differences(before.get(name, here), here)
            if differs and name == "teacher" and self.all_kept():
                warnings.warn(
                    f"the teacher is not the one that the run in {self.folder.path} began with, "
                    "whose kept predictions it goes on with",
                    stacklevel=2,
                )
                self.inputs["teacher"] = before["teacher"]
                self.keeps_teacher = True
            elif differs:
                raise TrainError(
                    f"the run in {self.folder.path} began with another {name} "
                    f"{'model' if name == 'teacher' else 'set'}: {differs}; continue with what it "
                    "began with, or begin a run of its own"
                )
        self.folder.begin()
        self.folder.write_json("inputs.json", self.inputs)

    def all_kept(self) -> bool:
        """Whether the folder has all of the teacher's predictions that the arms need."""
        try:
            Predictions.open(self.folder.path / "predictions" / "teacher")
        except TrainError:
            return False
        return all(ARMS[name].teacher != "each step" for name in self.settings.arms)

    def learner(self, name, model, loss, predict, tuned, seed, limit, **more) -> loop.Learner:
        """A learner of up to ``limit`` epochs, continued from its checkpoint."""
        settings = self.settings
        memory_format = torch.channels_last if tuned else torch.contiguous_format
        size = settings.batch_size
        steps = limit * len(loop.epoch_batches(len(self.train), size, settings.seed, 0, "cpu"))

        def cosine(step):
            return 0.5 + 0.5 * math.cos(math.pi * step / steps)

        learner = loop.Learner(
            name,
            model.to(self.device),
            loss,
            predict,
            lambda model: loop.accuracy(model, self.test, memory_format),
            settings.lr,
            seed,
            tuned=tuned,
            weight_decay=settings.weight_decay,
            schedule=cosine if settings.schedule == "cosine" else None,
            checkpoint_every=settings.checkpoint_every,
            parallel=settings.parallel,
            exact=settings.exact_ranks,
            skips=self.skips["teacher" if name == "teacher" else "student"],
            **more,
        )
        learner.load(self.folder)
        return learner

    def epochs(self, learner: loop.Learner, limit: int) -> Iterator[None]:
        """Train one epoch at a time, so that the caller can take turns."""
        settings = self.settings
        spent = self.ranks.first(
            lambda: sum(
                line["seconds"]
                for line in self.folder.metrics()
                if line["kind"] == "epoch" and line["learner"] == learner.name
            )
        )
        turns = learner.epochs(
            limit,
            self.train,
            settings.batch_size,
            settings.seed,
            self.folder,
            self.interrupt,
            self.on_step,
        )
        while learner.epoch < limit:
            over = settings.budget is not None and spent >= settings.budget
            if learner.name != "teacher" and (over or self.reached(learner)):
                return
            spent += next(turns)
            self.say(
                f"{learner.name}: epoch {learner.epoch} of {limit}, test accuracy "
                f"{learner.measures['accuracy']:.1%}"
            )
            yield

    def reached(self, learner: loop.Learner) -> bool:
        """Whether a learner has the target accuracy."""
        target = self.settings.target_accuracy
        return target is not None and learner.measures.get("accuracy", -1.0) >= target

    def tried(self, who: str, model: nn.Module, trains: bool) -> nn.Module:
        """A model on the device, after its trial: see :func:`try_on`."""
        noise = Noise() if trains else None
        if trains and who == "student" and self.settings.noise == "regularizer":
            noise = Noise("regularizer", self.settings.noise_std or 0.0)
        model = model.to(self.device)
        self.skips[who] = try_on(who, model, self.train, noise)
        return model

    def expert(self, model: nn.Module | None) -> nn.Module | None:
        """The teacher, trained and ready; None where its predictions are given and it is not."""
        settings = self.settings
        if model is not None:
            model = self.tried("teacher", model.eval(), trains=False)
            self.begin(model)
            return model.to(memory_format=torch.channels_last)
        if settings.teacher_predictions is not None and settings.teacher_weights == "none":
            self.kept("teacher", None, torch.channels_last)
            self.begin(None)
            return None
        torch.manual_seed(settings.seed)
        model, ready = models.build(
            settings.teacher, self.train.classes, settings.image_size, settings.teacher_weights
        )
        limit = settings.teacher_epochs
        if limit is None:
            limit = 0 if ready else 3
        self.tried("teacher", model, trains=limit > 0)
        self.begin(None)
        teacher = self.learner("teacher", model, _cross_entropy, None, True, settings.seed, limit)
        for _ in self.epochs(teacher, limit):
            pass
        if not teacher.measures:
            teacher.measures = teacher.evaluate(teacher.model)
        teacher.save(self.folder, optimizer=False)
        self.keep_test(teacher)
        return teacher.model.eval()

    def kept(self, name: str, expert: nn.Module | None, memory_format) -> tuple[Predictions, float]:
        """An expert's predictions, made once, and the seconds that took."""
        given = self.settings.teacher_predictions
        if given is not None and name == "teacher":
            rows = Predictions.open(given)
            rows.check(self.train, None if expert is None else model_hash(expert))
            return rows, 0.0
        path = self.folder.path / "predictions" / name
        assert expert is not None  # only given predictions do without

        def predict() -> float:
            if name == "teacher" and self.keeps_teacher:
                return 0.0
            began = time.perf_counter()
            write(
                path,
                expert,
                self.whole.to(self.device),
                dtype="float32",
                batch_size=self.settings.batch_size,
                memory_format=memory_format,
                on_step=lambda _, *steps: self.on_step(f"{name} asked", *steps),
            )
            took = self.folder.read_json(f"predictions/{name}.json")
            if took is None:  # a run that was stopped meanwhile counts what was left
                took = {"seconds": time.perf_counter() - began}
                self.folder.write_json(f"predictions/{name}.json", took)
            return took["seconds"]

        took = self.ranks.first(predict)
        rows = Predictions.open(path)
        rows.check(self.train)
        return rows, took

    def keep_test(self, learner: loop.Learner) -> None:
        """Write a learner's predictions on the test images."""
        logits = loop.predictions(learner.model, self.test, 256, learner.memory_format)
        tensors = {"logits": logits, "labels": self.test.labels}
        self.folder.save(f"{learner.name}-test", tensors, {})

    def students(self, teacher: nn.Module | None, student: nn.Module | None) -> dict:
        """Train every arm, in turns; returns the students by name."""
        settings = self.settings
        # Before a teacher learns for hours.
        if student is None:
            self.tried("student", self.made(settings.seed + 1), trains=True)
        else:
            student = self.tried("student", student, trains=True)
        expert = self.expert(teacher)
        # In the arms that run it at each step it is as in a plain script: in torch's default memory
        # format.
        plain = None
        if expert is not None:
            plain = copy.deepcopy(expert).to(memory_format=torch.contiguous_format)
        arms = {name: ARMS[name] for name in settings.arms}
        if {"reference", "fused"} <= arms.keys() and "once" in {a.teacher for a in arms.values()}:
            arms[CONTROL] = _CONTROL
        if settings.noise is not None:
            arms[NOISY] = ARMS["full"]
        trained = {}
        turns = [
            self.generations(
                name, arm, plain if arm.teacher == "each step" else expert, student, trained
            )
            for name, arm in arms.items()
        ]
        while turns:  # a generator that still has an epoch to give gives None, one that ends itself
            turns = [turn for turn in turns if next(turn, turn) is None]
        return trained

    def made(self, seed: int) -> nn.Module:
        """The settings' student with the weights that it starts with."""
        torch.manual_seed(seed)
        settings = self.settings
        model, _ = models.build(settings.student, self.train.classes, settings.image_size)
        try_on("student", model.to(self.device), self.train)
        return model

    def generations(self, arm_name: str, arm: Arm, expert, student, trained) -> Iterator[None]:
        """One arm's students, an epoch at a time; from the second on taught by the one before."""
        settings = self.settings
        limit = min(settings.epochs, arm.epochs or settings.epochs)
        count = settings.generations if arm.teacher != "never" and arm_name != CONTROL else 1
        noise = Noise()
        if arm_name == NOISY:
            noise = Noise(settings.noise, settings.noise_std, settings.seed)
        loss = _loss(arm, settings, noise.place == "regularizer")
        name, source, taught_in = arm_name, "teacher", torch.channels_last
        for generation in range(1, count + 1):
            if generation > 1:
                source, name = name, f"{arm_name}-g{generation}"
            predict, took = None, 0.0
            if arm.teacher == "each step":
                predict = _asking(expert)
            elif arm.teacher == "once":
                rows, took = self.kept(source, expert, taught_in)
                predict = lambda _, index, view, rows=rows: rows.rows(index, view)  # noqa: E731
            start = copy.deepcopy(student)
            if start is None:
                start = self.made(settings.seed + generation)
            learner = self.learner(
                name,
                start,
                loss,
                predict,
                arm.tuned,
                settings.seed + 2,
                limit,
                noise=noise,
                twin=_loss(ARMS["reference"], settings) if name == "fused" else None,
            )
            if learner.step == 0 and name != CONTROL:
                learner.seconds["teacher"] += took
            yield from self.epochs(learner, limit)
            if name != CONTROL:
                self.keep_test(learner)
                trained[name] = learner.model.eval()
            if self.reached(learner):
                return
            expert, taught_in = copy.deepcopy(learner.model).eval(), learner.memory_format
