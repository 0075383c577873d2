"""Experiment 2: distil a teacher into a student, a ResNet-18 into a MobileNetV2 unless others are
named, in five arms; and :func:`distill`, the fastest of them for one's own models and images.

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
import json
import math
import numbers
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import kdkernels
from kdkernels.train import TrainError, console, data, distributed, models
from kdkernels.train.data import Images
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
from kdkernels.train.predictions import Predictions, differences, model_hash, write
from kdkernels.train.run_folder import RunFolder, state_of

__all__ = [
    "ARMS", "CONTROL", "NOISY", "NOISE_STD", "Arm", "Distilled", "Settings", "apart", "distill",
    "images_of", "plain_loss", "run", "try_on",
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
    "cached": Arm("fused loss, teacher's predictions kept", "fused", "once"),
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

NOISE_STD = {"input": 0.1, "gradient": 0.01, "parameter": 0.01, "regularizer": 0.01}
"""Standard deviation where none is given, by the places of the noise."""


# What settings take: names, or a kind of number, its range and whether that leaves out its low end.
# The command's options say the same; a test holds them together.
_NAMES = {
    "schedule": ("constant", "cosine"),
    "divergence": tuple(kdkernels.divergences()),
    "device": ("auto", "cpu", "cuda"),
    "noise": tuple(NOISE_STD),
    "parallel": distributed.PARALLEL,
    "normalize": ("data", "imagenet"),
}
_NUMBERS: dict[str, tuple[type, float, float, bool]] = {
    "views": (int, 1, math.inf, False),
    "validation": (float, 0, 0.9, False),
    "batch_size": (int, 2, math.inf, False),
    "lr": (float, 0, math.inf, True),
    "weight_decay": (float, 0, math.inf, False),
    "temperature": (float, 0, 1e6, True),
    "alpha": (float, 0, 1, False),
    "beta": (float, 0, 1, False),
    "epochs": (int, 1, math.inf, False),
    "teacher_epochs": (int, 0, math.inf, False),
    "target_accuracy": (float, 0, 1, False),
    "budget": (float, 0, math.inf, True),
    "generations": (int, 1, math.inf, False),
    "seed": (int, 0, 2**62, False),
    "threads": (int, 1, math.inf, False),
    "train_samples": (int, 2, math.inf, False),
    "test_samples": (int, 1, math.inf, False),
    "noise_std": (float, 0, 1e6, False),
    "checkpoint_every": (int, 1, math.inf, False),
}


def _number(name: str, value: Any) -> int | float:
    """A setting as Python's own number; TrainError says what it takes."""
    kind, low, high, above = _NUMBERS[name]
    known: Any = numbers.Integral if kind is int else numbers.Real
    fits = isinstance(value, known) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or not low <= value <= high or (above and value == low):
        noun = "a whole number" if kind is int else "a number"
        least = f"above {low}" if above else f"at least {low}"
        most = "" if high == math.inf else f" and at most {high}"
        raise TrainError(f"{name} is {value!r}; it must be {noun} {least}{most}")
    return kind(value)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What experiment 2 is asked for; the command's options, with their defaults.

    Attributes:
        data: one of ``data.DATA``.
        data_dir: where the data lies or goes.
        image_size: side in pixels to which images are resized.
        normalize: ``"data"`` or ``"imagenet"``, whose mean and deviation; None is ImageNet's for
            ImageNet's weights, else the data's.
        augment, views: as in :func:`kdkernels.train.data.load`. Without a number of views each
            epoch sees new images, and no predictions can be kept.
        validation: share of the training images that is held out and tested on instead of the
            test images, 0..1; 0: none is.
        teacher, student: as ``name`` in :func:`kdkernels.train.models.build`.
        teacher_weights: as ``weights`` there.
        teacher_predictions: a folder that ``kdkernels predict-teacher`` wrote; the arms that keep
            predictions use it, and the teacher is not asked. Of a top k, at temperature 1 the rest
            is one class more, at another the k classes share all. None: the run makes its own.
        batch_size: images a step.
        lr: Adam's learning rate, for the teacher and every arm.
        schedule: ``"constant"``, or ``"cosine"``: half a cosine from lr to 0 over all epochs.
        weight_decay: of AdamW, >= 0; 0 is Adam.
        temperature: of the soft targets, > 0.
        alpha: weight of the soft targets, 0..1; the labels have 1 - alpha.
        divergence: one of :func:`kdkernels.divergences`.
        beta: its parameter, where it has one; None is the divergence's default.
        epochs: of each arm, at most.
        teacher_epochs: None is 3 for a teacher that has yet to learn these classes, else 0.
        target_accuracy: an arm stops at this test accuracy, 0..1; None: never early.
        budget: seconds of training after which an arm begins no other epoch; None: no limit.
        generations: of students; from the second one on each is taught by the one before.
        seed: of initial weights, batches, dropout, noise and augmentation.
        arms: names from ``ARMS``; None is all that the other settings allow.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        threads: CPU threads; None is torch's choice.
        train_samples, test_samples: use only the first so many images; None is all.
        noise: of the arm ``NOISY``, a key of ``NOISE_STD``; None: no such arm.
        noise_std: its standard deviation, the weight of the regulariser, see
            :class:`kdkernels.train.loop.Noise`; None is ``NOISE_STD[noise]``.
        checkpoint_every: steps between checkpoints within an epoch; None: at its end only.
        parallel: one of ``distributed.PARALLEL``, what trains where torchrun starts several ranks.
    """

    data: str = "digits"
    data_dir: str = "data"
    image_size: int = 32
    normalize: str | None = None
    augment: str = "none"
    views: int | None = None
    validation: float = 0.0
    teacher: str = "resnet18"
    student: str = "mobilenet_v2"
    teacher_weights: str = "none"
    teacher_predictions: str | None = None
    batch_size: int = 64
    lr: float = 1e-3
    schedule: str = "constant"
    weight_decay: float = 0.0
    temperature: float = 4.0
    alpha: float = 0.5
    divergence: str = "forward_kl"
    beta: float | None = None
    epochs: int = 5
    teacher_epochs: int | None = None
    target_accuracy: float | None = None
    budget: float | None = None
    generations: int = 1
    seed: int = 0
    arms: tuple[str, ...] | None = None
    device: str = "auto"
    threads: int | None = None
    train_samples: int | None = None
    test_samples: int | None = None
    noise: str | None = None
    noise_std: float | None = None
    checkpoint_every: int | None = None
    parallel: str = "ddp"

    def __post_init__(self):
        optional = {f.name for f in dataclasses.fields(self) if f.default is None}
        for name in (*_NUMBERS, *_NAMES):
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            if name == "epochs" and value == 0 and type(value) is int:
                continue  # a search's run, which only trains its teacher
            if name in _NUMBERS:
                object.__setattr__(self, name, _number(name, value))
            elif value not in _NAMES[name]:
                raise TrainError(f"{name} is {value!r}; it must be one of {_words(_NAMES[name])}")
        if self.arms is not None:
            known = isinstance(self.arms, tuple | list) and set(self.arms) <= ARMS.keys()
            if not known or len(set(self.arms)) < len(self.arms):
                raise TrainError(
                    f"arms is {self.arms!r}; it must be a tuple of different names from "
                    f"{_words(ARMS)}"
                )
            object.__setattr__(self, "arms", tuple(self.arms))
        if self.noise is None and self.noise_std is not None:
            raise TrainError("--noise-std is of --noise, which is not given")
        if self.noise is not None and self.noise_std is None:
            object.__setattr__(self, "noise_std", NOISE_STD[self.noise])
        if self.normalize is None:
            usual = "imagenet" if self.teacher_weights == "DEFAULT" else "data"
            object.__setattr__(self, "normalize", usual)
        takes = kdkernels.divergences()[self.divergence].parameters
        if self.beta is not None and "beta" not in takes:
            raise TrainError(f"--beta is no parameter of the divergence {self.divergence}")
        if self.views is not None and self.augment == "none":
            raise TrainError("--views is of --augment, which is not given")
        barred = {}
        if self.augment != "none" and self.views is None:
            barred["once"] = (
                "with --augment each epoch sees new images, of which no predictions can be kept: "
                "give --views, the number of different views of an image"
            )
        if self.teacher_predictions is not None:
            barred["each step"] = "with --teacher-predictions there is no teacher to ask"
        possible = tuple(name for name, arm in ARMS.items() if arm.teacher not in barred)
        arms = possible if self.arms is None else self.arms
        object.__setattr__(self, "arms", arms)
        for name in (*arms, *(["full"] if self.noise else [])):
            if name not in possible:
                reason = barred[ARMS[name].teacher]
                raise TrainError(f"the arm {name} asks its teacher {ARMS[name].teacher}: {reason}")


def _words(names) -> str:
    return ", ".join(names)


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


def _loss(arm: Arm, settings: Settings, regularized: bool = False) -> Loss:
    if arm.loss == "cross-entropy":
        return lambda logits, _, labels: F.cross_entropy(logits, labels)
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
        # The kept logsumexp is of temperature 1; of another nobody knows what the rest has.
        tail: dict[str, Any] = {"tail": "renormalize"}
        if settings.temperature == 1:
            tail = {"tail": "bucket", "teacher_logsumexp": taught.logsumexp}
        return kdkernels.topk_distillation_loss(
            logits, taught.values, taught.indices, labels, **tail, **soft
        )

    return loss


def apart(one: list[float], other: list[float]) -> list[float]:
    """``|other - one| / |one|`` of each step that both have."""
    return [abs(b - a) / abs(a) for a, b in zip(one, other, strict=False)]


def run(
    settings: Settings,
    folder: RunFolder,
    on_step: Callable[[str, int, int], None],
    say: Callable,
    *,
    teacher: nn.Module | None = None,
    student: nn.Module | None = None,
    images: tuple[Images, Images] | None = None,
) -> dict[str, nn.Module]:
    """Run experiment 2, or what is left of it; everything it finds goes to the folder.

    Args:
        settings: what was asked for.
        folder: where metrics, checkpoints and test predictions go. Checkpoints already in it are
            continued.
        on_step: ``on_step(learner, steps done, steps in all)``, called after each step.
        say: called with a line for the person who watches, after each epoch.
        teacher, student: models to take instead of those that the settings name; the teacher is
            ready and stays as it is, the student is where every arm starts, and is left alone.
        images: training and test images to take instead.

    Returns:
        The trained students by name: an arm's, of later generations ``"<arm>-g<generation>"``.

    Raises:
        TrainError: see :meth:`kdkernels.train.loop.Learner.train_epoch`, and missing data.
    """
    device = choose_device(settings.device)
    try:
        with reproducible(settings.seed, settings.threads), Interrupt() as interrupt:
            one = _Run(settings, folder, device, interrupt, on_step, say, images)
            return one.students(teacher, student)
    finally:
        folder.close()


def images_of(
    settings: Settings, images: tuple[Images, Images] | None = None
) -> tuple[Images, Images, Images]:
    """The images that predictions are made of, those trained on and those tested on.

    Args:
        settings: what was asked for.
        images: training and test images to take instead of those that the settings name.
    """
    train, test = images or data.load(
        settings.data, size=settings.image_size, data_dir=settings.data_dir,
        imagenet=settings.normalize == "imagenet",
        augment=settings.augment, views=settings.views, seed=settings.seed,
    )  # fmt: skip
    for part, count in ((train, settings.train_samples), (test, settings.test_samples)):
        _check_first(part, count)
    whole = train.first(settings.train_samples)
    if settings.validation:  # a fixed part, so that runs of other seeds are tested on the same
        whole = train
        train, test = train.split(settings.validation, seed=0)
    return whole, train.first(settings.train_samples), test.first(settings.test_samples)


def _check_first(images: Images, count: int | None) -> None:
    """That the first images, if only they are used, are not of some classes only."""
    labels = images.labels
    if count is None or count >= len(labels) or bool((labels.diff() < 0).any()):
        return
    seen, classes = len(labels[:count].unique()), len(labels.unique())
    if seen < min(classes, count):
        raise TrainError(
            f"the images lie in the order of their classes, and the first {count} are of {seen} of "
            f"{classes}: shuffle them, as with images.take(torch.randperm(len(images)))"
        )


def _check_images(train: Images, test: Images) -> None:
    """That there are images to train and to test on, and that their labels are their classes'."""
    for name, images in (("train", train), ("test", test)):
        if len(images) < (2 if name == "train" else 1):
            raise TrainError(f"{name} has {len(images)} images, too few to {name} on")
        labels = images.labels
        if labels.dtype != torch.int64 or labels.dim() != 1:
            raise TrainError(
                f"{name}'s labels are {labels.dtype} of shape {list(labels.shape)}; they must be "
                "int64 of shape [images]"
            )
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= images.classes:
            raise TrainError(
                f"{name} has labels from {low} to {high}; they must be from 0 to "
                f"{images.classes - 1}, its classes"
            )


def try_on(who: str, model: nn.Module, images: Images, noise: Noise | None = None) -> bool:
    """Try a model on two images, in evaluation and with ``noise`` also in training.

    It stays as it is, but for parameters that it makes in its first forward pass.

    Returns:
        Whether the loss in training leaves parameters out.

    Raises:
        TrainError: it does not take the images, gives no logits, or cannot be trained.
    """
    device = images.labels.device
    inputs, labels = images.batch(torch.arange(2, device=device), view=images.view_of(0))

    def logits(model):
        found = model(inputs)
        wanted = [len(inputs), images.classes]
        if not isinstance(found, torch.Tensor):
            got = f"a {type(found).__name__}"
        elif list(found.shape) != wanted or not found.is_floating_point():
            got = f"{found.dtype} of shape {list(found.shape)}"
        else:
            return found
        mode = "in training" if model.training else "in evaluation"
        raise TrainError(
            f"the {who} gives {got} {mode} for images of shape {list(inputs.shape)}; it must give "
            f"logits of shape {wanted}, and nothing else"
        )

    mode, skips = model.training, False
    try:
        model.eval()
        with torch.no_grad():
            logits(model)
        model.train(mode)
        if noise is not None:
            trained = [p for p in model.parameters() if p.requires_grad]
            if not trained:
                raise TrainError(f"the {who} has no parameter that requires grad: none can learn")
            trial = copy.deepcopy(model).train()
            state_of(trial)  # which its checkpoints will hold
            parameters = list(trial.parameters())
            cuda = [device] if device.type == "cuda" else []
            with torch.random.fork_rng(cuda), torch.enable_grad():
                loss = noise.on_loss(lambda: F.cross_entropy(logits(trial), labels), parameters, 0)
                loss.backward()
            skips = any(p.grad is None for p in parameters if p.requires_grad)
    except TrainError:
        raise
    except Exception as error:  # a model may raise anything
        said = str(error).strip().splitlines()
        what = "cannot be trained on" if noise is not None and model.training else "does not take"
        more = "its parameters must be torch.float32, and its input's size --image-size"
        if noise is not None and noise.place == "regularizer":
            more = "the noise regularizer requires a model that can be differentiated twice"
        raise TrainError(
            f"the {who} {type(model).__name__} {what} images of shape {list(inputs.shape)} "
            f"({type(error).__name__}: {said[0] if said else ''}): {more}"
        ) from None
    finally:
        model.train(mode)
    return skips


class _Run:
    """A run under way: what all learners share."""

    def __init__(self, settings, folder, device, interrupt, on_step, say, images):
        self.settings, self.folder, self.device = settings, folder, device
        self.interrupt, self.on_step, self.say = interrupt, on_step, say
        self.ranks = distributed.current()
        self.stays_unasked, self.skips = False, {"teacher": False, "student": False}
        self.whole, train, test = images_of(settings, images)
        _check_images(train, test)
        self.inputs: dict[str, dict] = {
            name: {
                "data": part.fingerprint(), "images": len(part), "classes": part.classes,
                "preprocessing": part.preprocessing(),
            }
            for name, part in (("training", train), ("test", test))
        }  # fmt: skip
        # The pixels are hashed once.
        self.whole = dataclasses.replace(self.whole, _pixels_sha256=train._pixels_sha256)
        self.train, self.test = train.to(device), test.to(device)

    def begin(self, teacher: nn.Module | None) -> None:
        """Begin to write: all that was given can be used, and is what an earlier start was given.

        Args:
            teacher: given ready; None: the run's own, which its folder has.
        """
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
                self.stays_unasked = True
            elif differs:
                raise TrainError(
                    f"the run in {self.folder.path} began with another {name} "
                    f"{'model' if name == 'teacher' else 'set'}: {differs}; continue with what it "
                    "began with, or begin a run of its own"
                )
        self.folder.begin()
        self.folder.write_json("inputs.json", self.inputs)

    def all_kept(self) -> bool:
        """Whether the folder has all that a teacher has to say."""
        try:
            Predictions.open(self.folder.path / "predictions" / "teacher")
        except TrainError:
            return False
        return all(ARMS[name].teacher != "each step" for name in self.settings.arms)

    def learner(self, name: str, model: nn.Module, loss: Loss, predict, tuned: bool, seed: int,
                **more) -> Learner:  # fmt: skip
        memory_format = torch.channels_last if tuned else torch.contiguous_format
        return Learner(
            name, model.to(self.device), loss, predict,
            lambda model: accuracy(model, self.test, memory_format),
            self.settings.lr, seed, tuned=tuned,
            weight_decay=self.settings.weight_decay,
            checkpoint_every=self.settings.checkpoint_every, parallel=self.settings.parallel,
            skips=self.skips["teacher" if name == "teacher" else "student"], **more,
        )  # fmt: skip

    def epochs(self, learner: Learner, limit: int) -> Iterator[None]:
        """Train one epoch at a time, so that the caller can take turns."""
        settings = self.settings
        spent = self.ranks.first(
            lambda: sum(
                line["seconds"]
                for line in self.folder.metrics()
                if line["kind"] == "epoch" and line["learner"] == learner.name
            )
        )
        while learner.epoch < limit:
            if learner.name != "teacher":
                if self.reached(learner):
                    return
                if settings.budget is not None and spent >= settings.budget:
                    return
            batches = epoch_batches(
                len(self.train), settings.batch_size, settings.seed, learner.epoch, self.device
            )
            steps = len(batches) * limit
            if settings.schedule == "cosine":
                learner.schedule = lambda step, steps=steps: (
                    0.5 + 0.5 * math.cos(math.pi * step / steps)
                )
            spent += learner.train_epoch(
                self.train, batches, self.folder, self.interrupt,
                lambda steps=steps: self.on_step(learner.name, learner.step, steps),
            )  # fmt: skip
            self.say(
                f"{learner.name}: epoch {learner.epoch} of {limit}, test accuracy "
                f"{learner.measures['accuracy']:.1%}"
            )
            yield

    def reached(self, learner: Learner) -> bool:
        """Whether a learner has the accuracy that was asked for."""
        target = self.settings.target_accuracy
        return target is not None and learner.measures.get("accuracy", -1.0) >= target

    def tried(self, who: str, model: nn.Module, trains: bool) -> nn.Module:
        """A model on the device, after its trial: see :func:`try_on`."""
        noise = None
        if trains:
            regularized = who == "student" and self.settings.noise == "regularizer"
            noise = Noise("regularizer", self.settings.noise_std or 0.0) if regularized else Noise()
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
        teacher = self.learner(
            "teacher", model, lambda logits, _, labels: F.cross_entropy(logits, labels), None,
            tuned=True, seed=settings.seed,
        )  # fmt: skip
        teacher.load(self.folder)
        for _ in self.epochs(teacher, limit):
            pass
        if not teacher.measures:
            teacher.measures = teacher.evaluate(teacher.model)
        teacher.save(self.folder, optimizer=False)
        self.keep_test("teacher", teacher.model, torch.channels_last)
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

        def ask() -> float:
            if name == "teacher" and self.stays_unasked:
                return 0.0
            began = time.perf_counter()
            write(
                path, expert, self.whole.to(self.device), dtype="float32",
                batch_size=self.settings.batch_size, memory_format=memory_format,
                on_step=lambda _, *steps: self.on_step(f"{name} asked", *steps),
            )  # fmt: skip
            took = self.folder.read_json(f"predictions/{name}.json")
            if took is None:  # a run that was stopped meanwhile counts what was left
                took = {"seconds": time.perf_counter() - began}
                self.folder.write_json(f"predictions/{name}.json", took)
            return took["seconds"]

        took = self.ranks.first(ask)
        rows = Predictions.open(path)
        rows.check(self.train)
        return rows, took

    def keep_test(self, name: str, model: nn.Module, memory_format) -> None:
        """Write a model's predictions on the test images."""
        logits = predictions(model, self.test, 256, memory_format)
        self.folder.save(f"{name}-test", {"logits": logits, "labels": self.test.labels}, {})

    def students(self, teacher: nn.Module | None, student: nn.Module | None) -> dict:
        """Train every arm, in turns; returns the students by name."""
        settings = self.settings
        # Before a teacher learns for hours.
        if student is None:
            self.tried("student", self.made(settings.seed + 1), trains=True)
        else:
            student = self.tried("student", student, trains=True)
        expert = self.expert(teacher)
        # The arms that ask at each step get what a plain script has: torch's default memory format.
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
            self.generations(name, arm, plain if arm.teacher == "each step" else expert, student,
                             trained)
            for name, arm in arms.items()
        ]  # fmt: skip
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
        memory_format = torch.channels_last if arm.tuned else torch.contiguous_format
        count = settings.generations if arm.teacher != "never" and arm_name != CONTROL else 1
        noise = Noise()
        if arm_name == NOISY:
            noise = Noise(settings.noise, settings.noise_std, settings.seed)
        name, source, taught_in = arm_name, "teacher", torch.channels_last
        for generation in range(1, count + 1):
            if generation > 1:
                source, name, taught_in = name, f"{arm_name}-g{generation}", memory_format
            predict, took = None, 0.0
            if arm.teacher == "each step":
                predict = self.asking(expert)
            elif arm.teacher == "once":
                rows, took = self.kept(source, expert, taught_in)
                predict = lambda _, index, view, rows=rows: rows.rows(index, view)  # noqa: E731
            seed = settings.seed + generation
            start = self.made(seed) if student is None else copy.deepcopy(student)
            learner = self.learner(
                name, start, _loss(arm, settings, noise.place == "regularizer"), predict,
                tuned=arm.tuned, seed=settings.seed + 2, noise=noise,
                twin=_loss(ARMS["reference"], settings) if name == "fused" else None,
            )  # fmt: skip
            learner.load(self.folder)
            if learner.step == 0 and name != CONTROL:
                learner.seconds["teacher"] += took
            yield from self.epochs(learner, min(settings.epochs, arm.epochs or settings.epochs))
            if name != CONTROL:
                self.keep_test(name, learner.model, memory_format)
                trained[name] = learner.model.eval()
            if self.reached(learner):
                return
            expert = copy.deepcopy(learner.model).eval()

    def asking(self, expert: nn.Module):
        """``predict`` of a learner whose teacher runs at each step."""

        def ask(images, *_):
            with torch.no_grad():
                return expert(images)

        return ask


def _resumed(out: str | None, wanted: Settings) -> RunFolder:
    """The folder of a run of :func:`distill`, which only goes on with its own settings."""
    if out is None:
        raise TrainError("resume=True requires out, the folder of the run to continue")
    folder = RunFolder.open(out)
    if folder.config.get("command") != "distill()" or "distill" not in folder.config:
        raise TrainError(f"{out} holds no run of distill() in Python to continue")
    here = json.loads(json.dumps(dataclasses.asdict(wanted)))
    there = folder.config["distill"]
    for name, value in here.items():
        if name != "epochs" and there.get(name, value) != value:
            raise TrainError(
                f"{name} is {value!r}, and the run in {out} began with {there[name]!r}: it must be "
                "the same with resume=True; only epochs may change"
            )
    folder.config["distill"] = here
    distributed.current().first(folder.hold)
    return folder


@dataclasses.dataclass(frozen=True)
class Distilled:
    """What :func:`distill` made.

    Attributes:
        student: the trained student, in eval mode; of the last generation.
        accuracy: its share of right answers on the test images, 0..1.
        folder: the run's folder, with report.html, metrics and checkpoints.
    """

    student: nn.Module
    accuracy: float
    folder: Path


def distill(
    teacher: nn.Module,
    student: nn.Module,
    train: Images,
    test: Images,
    *,
    out: str | None = None,
    resume: bool = False,
    progress: bool = True,
    **settings,
) -> Distilled:
    """Distil your teacher into your student on your images, the fastest way there is here.

    The teacher is asked once about each image (and view), the loss is one kernel, the student
    runs in channels_last. With augmentation and no number of views each epoch sees new images,
    and the teacher is asked at each step.

    Args:
        teacher: trained; takes images ``[b, 3, s, s]`` fp32, gives logits ``[b, classes]``. It is
            moved to the device and put into eval mode.
        student: the same, untrained or not; it is copied and stays as it is, also where it shares
            modules with the teacher.
        train, test: of one size and the same classes, from :func:`kdkernels.train.image_folder` or
            :func:`kdkernels.train.load_images`.
        out: folder of the run; ``runs/<time>`` by default.
        resume: continue the run in ``out`` from its last checkpoint; models, images and settings
            must be the same, but for ``epochs``.
        progress: show progress bars and a line an epoch.
        settings: fields of :class:`Settings`, such as ``epochs=20``, ``temperature=4.0``,
            ``alpha=0.5``, ``generations=2``, ``noise="input"``; not those that name data and
            models.

    Raises:
        TrainError: something is missing, or does not fit; nothing is written then.
        TypeError: a setting that there is not, or an argument of another kind.
    """
    from kdkernels.train import report  # it needs this module

    ours = ("data", "data_dir", "image_size", "normalize", "augment", "views", "teacher", "student",
            "teacher_weights", "teacher_predictions", "teacher_epochs", "validation")  # fmt: skip
    for name in settings:
        if name in ours:
            raise TypeError(f"distill() got {name!r}, which its models and images say already")
    for name, value, kind in (
        ("teacher", teacher, nn.Module), ("student", student, nn.Module), ("train", train, Images),
        ("test", test, Images),
    ):  # fmt: skip
        if not isinstance(value, kind):
            given, takes = type(value).__name__, f"{kind.__module__}.{kind.__name__}"
            raise TypeError(f"{name} is a {given}; it must be a {takes}")
    for name, words in (
        ("classes", "classes"), ("size", "pixels a side"), ("channels", "channels"),
        ("names", "as its classes' names"),
    ):  # fmt: skip
        here, there = getattr(train, name), getattr(test, name)
        if here != there and not (name == "names" and not (here and there)):
            raise TrainError(f"train has {here} {words}, test {there}: they must be alike")
    new_each_epoch = train.augment != "none" and train.views is None
    settings.setdefault("arms", ("fused",) if new_each_epoch else ("full",))
    wanted = Settings(
        data="own images", image_size=train.size,
        augment=train.preprocessing()["augment"], views=train.views,
        teacher=type(teacher).__name__, student=type(student).__name__, **settings,
    )  # fmt: skip
    if not wanted.arms:
        raise TrainError(f"arms is {wanted.arms}; it must be one or more of {_words(ARMS)}")
    _number("epochs", wanted.epochs)
    try:  # before the teacher, which may share modules with it, is moved
        student = copy.deepcopy(student)
    except Exception as error:  # a module may raise anything
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TrainError(f"the student {type(student).__name__} cannot be copied: {said}") from None
    if resume:
        folder = _resumed(out, wanted)
    else:
        config = {"command": "distill()", "distill": dataclasses.asdict(wanted)}
        config["machine"] = report.machine(wanted.threads)
        folder = RunFolder.create(out, config)
    screen = console.make(quiet=not progress or distributed.current().rank > 0)
    try:
        students = console.progress(
            run, wanted, folder, screen, teacher=teacher, student=student, images=(train, test)
        )
    except BaseException:
        folder.discard()
        raise
    if distributed.current().rank == 0:
        report.write(folder)
    name = list(students)[-1]
    found = accuracy(students[name], test.to(next(students[name].parameters()).device))
    return Distilled(students[name], found["accuracy"], folder.path)
