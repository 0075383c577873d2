"""Experiment 2: distil a ResNet-18 into a MobileNetV2, in four arms.

The teacher is trained or loaded; it predicts; the student is trained on its predictions and the
labels; epoch after epoch, until a target accuracy or a number of epochs (Hinton et al.,
arXiv 1503.02531). The arms start from the same weights and see the same batches; they differ only
in what the table ``ARMS`` says. They take turns epoch by epoch, so that whatever else the machine
does in the meantime slows all of them alike. With noise asked for there is one more arm, the last
one of the table with that noise on its student.
"""

import copy
import dataclasses
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

import kdkernels
from kdkernels.train import TrainError, data, models
from kdkernels.train.loop import (
    Interrupt,
    Learner,
    Loss,
    Noise,
    accuracy,
    choose_device,
    epoch_batches,
    predictions,
    reproducible,
)
from kdkernels.train.run_folder import RunFolder

__all__ = [
    "ARMS", "CONTROL", "NOISY", "NOISE_STD", "Arm", "Settings", "apart", "plain_loss", "run",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Arm:
    """What one arm does.

    Attributes:
        about: in words.
        loss: ``"cross-entropy"``, ``"plain"`` (PyTorch's own functions) or ``"fused"``.
        teacher: ``"never"``, ``"each step"``, or ``"once"`` (predictions made once and kept).
        tuned: channels_last memory format, Adam's fused kernel, and the loss writes its gradient
            over the logits.
        epochs: stop after so many, whatever the settings say; None: no such limit.
    """

    about: str
    loss: str
    teacher: str
    tuned: bool = False
    epochs: int | None = None


ARMS = {
    "alone": Arm("student alone, cross-entropy", "cross-entropy", "never"),
    "reference": Arm("plain PyTorch loss, teacher runs at each step", "plain", "each step"),
    "fused": Arm("fused loss, teacher runs at each step", "fused", "each step"),
    "full": Arm(
        "fused loss in place, teacher's predictions kept, channels_last, fused Adam",
        "fused", "once", tuned=True,
    ),
}  # fmt: skip

CONTROL = "control"
_CONTROL = Arm("the reference with kept predictions, one epoch", "plain", "once", epochs=1)
"""The reference arm but for the rounding of the teacher's predictions: how far two curves of one
procedure part for no better reason. Run where the arms reference and fused are."""

NOISY = "noisy"
"""The full arm with noise on its student. Run where noise is asked for."""

NOISE_STD = {"input": 0.1, "gradient": 0.01, "parameter": 0.01}
"""Standard deviation where none is given, by the places of the noise."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What experiment 2 is asked for; the command's options, with their defaults.

    Attributes:
        data: one of ``data.DATA``.
        data_dir: where CIFAR-10 lies or goes.
        image_size: side in pixels to which images are resized.
        batch_size: images a step.
        lr: Adam's learning rate, for the teacher and every arm.
        temperature: of the soft targets, > 0.
        alpha: weight of the soft targets, 0..1; the labels have 1 - alpha.
        epochs: of each arm, at most.
        teacher_epochs: None is 3 for a teacher that has yet to learn these classes, else 0.
        target_accuracy: an arm stops at this test accuracy, 0..1; None: never early.
        teacher_weights: as in :func:`kdkernels.train.models.teacher`.
        seed: of initial weights, batches and dropout.
        arms: names from ``ARMS``.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        threads: CPU threads; None is torch's choice.
        train_samples, test_samples: use only the first so many images; None is all.
        noise: of the arm ``NOISY``, a key of ``NOISE_STD``; None: no such arm.
        noise_std: its standard deviation, see :class:`kdkernels.train.loop.Noise`; None is
            ``NOISE_STD[noise]``.
        checkpoint_every: steps between checkpoints within an epoch; None: at its end only.
        parallel: one of ``distributed.PARALLEL``, what trains where torchrun starts several ranks.
    """

    data: str = "digits"
    data_dir: str = "data"
    image_size: int = 32
    batch_size: int = 64
    lr: float = 1e-3
    temperature: float = 4.0
    alpha: float = 0.5
    epochs: int = 5
    teacher_epochs: int | None = None
    target_accuracy: float | None = None
    teacher_weights: str = "none"
    seed: int = 0
    arms: tuple[str, ...] = tuple(ARMS)
    device: str = "auto"
    threads: int | None = None
    train_samples: int | None = None
    test_samples: int | None = None
    noise: str | None = None
    noise_std: float | None = None
    checkpoint_every: int | None = None
    parallel: str = "ddp"

    def __post_init__(self):
        if self.noise is None and self.noise_std is not None:
            raise TrainError("--noise-std is of --noise, which is not given")
        if self.noise is not None and self.noise_std is None:
            object.__setattr__(self, "noise_std", NOISE_STD[self.noise])


def plain_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float,
    alpha: float,
) -> torch.Tensor:
    """Hinton's loss with PyTorch's own functions, as a training script would spell it.

    ``alpha T^2 KL(p_t || p_s) + (1 - alpha) CE``, mean over rows, with softmaxes at temperature T
    and the cross-entropy at 1.

    Args:
        student, teacher: logits ``[b, classes]``.
        labels: ``[b]`` int64.
    """
    soft = F.kl_div(
        F.log_softmax(student / temperature, 1),
        F.softmax(teacher / temperature, 1),
        reduction="batchmean",
    )
    return alpha * temperature**2 * soft + (1 - alpha) * F.cross_entropy(student, labels)


def _loss(arm: Arm, settings: Settings) -> Loss:
    if arm.loss == "cross-entropy":
        return lambda logits, _, labels: F.cross_entropy(logits, labels)
    soft = {"temperature": settings.temperature, "alpha": settings.alpha}
    if arm.loss == "plain":
        return lambda logits, taught, labels: plain_loss(logits, taught, labels, **soft)
    return lambda logits, taught, labels: kdkernels.distillation_loss(
        logits, taught, labels, **soft, inplace=arm.tuned
    )


def apart(one: list[float], other: list[float]) -> list[float]:
    """``|other - one| / |one|`` of each step that both have."""
    return [abs(b - a) / abs(a) for a, b in zip(one, other, strict=False)]


def run(
    settings: Settings, folder: RunFolder, on_step: Callable[[str, int, int], None], say: Callable
) -> None:
    """Run experiment 2, or what is left of it; everything it finds goes to the folder.

    Args:
        settings: what was asked for.
        folder: where metrics and checkpoints go. Checkpoints already in it are continued.
        on_step: ``on_step(learner, steps done, steps in all)``, called after each step.
        say: called with a line for the person who watches, after each epoch.

    Raises:
        TrainError: see :meth:`kdkernels.train.loop.Learner.train_epoch`, and missing data.
    """
    device = choose_device(settings.device)
    with reproducible(settings.seed, settings.threads), Interrupt() as interrupt:
        _run(settings, folder, device, interrupt, on_step, say)
    folder.close()


def _run(settings, folder, device, interrupt, on_step, say):
    pretrained = settings.teacher_weights == "DEFAULT"
    train, test = data.load(
        settings.data, size=settings.image_size, data_dir=settings.data_dir, imagenet=pretrained
    )
    train = train.first(settings.train_samples).to(device)
    test = test.first(settings.test_samples).to(device)

    def tested(memory_format):
        return lambda model: accuracy(model, test, memory_format)

    def epochs(learner: Learner, limit: int):
        """One epoch at a time, so that the caller can take turns."""
        while learner.epoch < limit and not (
            settings.target_accuracy is not None
            and learner.measures.get("accuracy", -1) >= settings.target_accuracy
            and learner.name != "teacher"
        ):
            batches = epoch_batches(
                len(train), settings.batch_size, settings.seed, learner.epoch, device
            )
            steps = len(batches) * limit
            learner.train_epoch(
                train, batches, folder, interrupt,
                lambda steps=steps: on_step(learner.name, learner.step, steps),
            )  # fmt: skip
            say(
                f"{learner.name}: epoch {learner.epoch} of {limit}, test accuracy "
                f"{learner.measures['accuracy']:.1%}"
            )
            yield

    torch.manual_seed(settings.seed)
    model, ready = models.teacher(train.classes, settings.image_size, settings.teacher_weights)
    limit = settings.teacher_epochs
    if limit is None:
        limit = 0 if ready else 3
    teacher = Learner(
        "teacher", model.to(device), lambda logits, _, labels: F.cross_entropy(logits, labels),
        None, tested(torch.channels_last), settings.lr, settings.seed, tuned=True,
        checkpoint_every=settings.checkpoint_every, parallel=settings.parallel,
    )  # fmt: skip
    teacher.load(folder)
    for _ in epochs(teacher, limit):
        pass
    if not teacher.measures:
        teacher.measures = teacher.evaluate(teacher.model)
    teacher.save(folder, optimizer=False)
    expert = teacher.model.eval().requires_grad_(False)

    def kept() -> tuple[torch.Tensor, float]:
        """The teacher's predictions, made once, and the seconds that took."""
        found = folder.load("teacher-predictions")
        if found is None:
            if device.type == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            rows = predictions(expert, train, settings.batch_size, torch.channels_last)
            if device.type == "cuda":
                torch.cuda.synchronize()
            took = time.perf_counter() - began
            folder.save("teacher-predictions", {"logits": rows}, {"seconds": took})
            return rows, took
        return found[0]["logits"].to(device), found[1]["seconds"]

    # The arms that ask at each step get what a plain script has: torch's default memory format.
    plain_expert = copy.deepcopy(expert).to(memory_format=torch.contiguous_format)

    def ask(images, *_):
        with torch.no_grad():
            return plain_expert(images)

    torch.manual_seed(settings.seed + 1)
    start = models.student(train.classes, settings.image_size)
    learners = []
    arms = {name: ARMS[name] for name in settings.arms}
    if {"reference", "fused"} <= arms.keys():
        arms[CONTROL] = _CONTROL
    if settings.noise is not None:
        arms[NOISY] = ARMS["full"]
    for name, arm in arms.items():
        predict, took = None, 0.0
        if arm.teacher == "each step":
            predict = ask
        elif arm.teacher == "once":
            rows, took = kept()
            predict = lambda _, index, view, rows=rows: rows[index]  # noqa: E731
        noise = Noise()
        if name == NOISY:
            noise = Noise(settings.noise, settings.noise_std, settings.seed)
        learner = Learner(
            name, copy.deepcopy(start).to(device), _loss(arm, settings), predict,
            tested(torch.channels_last if arm.tuned else torch.contiguous_format),
            settings.lr, settings.seed + 2, tuned=arm.tuned, noise=noise,
            checkpoint_every=settings.checkpoint_every, parallel=settings.parallel,
            twin=_loss(ARMS["reference"], settings) if name == "fused" else None,
        )  # fmt: skip
        learner.load(folder)
        if learner.step == 0 and name != CONTROL:
            learner.seconds["teacher"] += took
        learners.append(learner)

    turns = [
        epochs(learner, min(settings.epochs, arms[learner.name].epochs or settings.epochs))
        for learner in learners
    ]
    while turns:  # a generator that still has an epoch to give gives None, one that ends itself
        turns = [turn for turn in turns if next(turn, turn) is None]
