"""Settings: dataclass fields that say what they take, and distil's own.

A field made here has a default, a kind, a range or names, and a sentence of help. The same field
checks a value given in Python and makes the option of the command line; torch is not imported.
"""

import argparse
import dataclasses
import functools
import math
import numbers
import os
from collections.abc import Callable, Iterable
from typing import Any

from kdkernels.train import SettingError


@dataclasses.dataclass(frozen=True)
class Takes:
    """What a setting takes.

    Attributes:
        kind: ``int``, ``float``, ``str``, ``bool`` or ``tuple``, of different names.
        help: a phrase; the default is added where it does not name one.
        low, high: of a number, both ends included.
        above: ``low`` itself is not taken.
        names: the texts that are taken, or a function that gives them; None: any.
        metavar: of the option; None: the names, or argparse's.
        read: what is done to a text of the command line.
    """

    kind: type
    help: str
    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    names: tuple[str, ...] | Callable[[], Iterable[str]] | None = None
    metavar: str | None = None
    read: Callable[[str], str] = str

    def known(self) -> tuple[str, ...]:
        """The names that are taken."""
        return tuple(self.names() if callable(self.names) else self.names or ())

    def words(self) -> str:
        """What is taken, as an error says it."""
        if self.kind is tuple:
            return f"different names from {', '.join(self.known())}"
        if self.names is not None:
            return f"one of {', '.join(self.known())}"
        if self.kind not in (int, float):
            return {str: "a text", bool: "true or false"}[self.kind]
        noun = "a whole number" if self.kind is int else "a number"
        low, high = (str(end) if self.kind is int else f"{end:g}" for end in (self.low, self.high))
        least = f"above {low}" if self.above else f"of at least {low}"
        return f"{noun} {least}" + f" and at most {high}" * (self.high < math.inf)

    def fits(self, value: Any) -> bool:
        """Whether a value is taken."""
        if self.kind is tuple:
            one = isinstance(value, tuple | list) and set(value) <= set(self.known())
            return one and len(set(value)) == len(value)
        if self.kind in (int, float):
            known: Any = numbers.Integral if self.kind is int else numbers.Real
            if not isinstance(value, known) or isinstance(value, bool) or not math.isfinite(value):
                return False
            return self.low <= value <= self.high and not (self.above and value == self.low)
        return isinstance(value, self.kind) and (self.names is None or value in self.known())

    def parse(self, text: str) -> Any:
        """A value of the command line; argparse.ArgumentTypeError where it is not taken."""
        try:
            value = (
                tuple(p.strip() for p in text.split(","))
                if self.kind is tuple
                else (self.kind(text) if self.kind in (int, float) else self.read(text))
            )
        except ValueError:
            value = None
        if not self.fits(value):
            raise argparse.ArgumentTypeError(f"{text!r} is given; it must be {self.words()}")
        return value


def _field(kind: type, default, help: str, **takes) -> Any:
    return dataclasses.field(default=default, metadata={"takes": Takes(kind, help, **takes)})


# Fields, made as count(default, help, low=2): the keywords are the attributes of Takes.
count = functools.partial(_field, int, low=1)
real = functools.partial(_field, float, low=0.0)
text = functools.partial(_field, str, metavar="NAME")
choice = functools.partial(_field, str)
several = functools.partial(_field, tuple, metavar="A,B")  # separated by commas
flag = functools.partial(_field, bool, False)  # true if its option is given


def path(default, help: str, metavar: str = "DIR", absolute: bool = False) -> Any:
    """A field of a path; an absolute one is found again when a run is resumed from elsewhere."""
    return _field(str, default, help, metavar=metavar, read=place if absolute else expanded)


def expanded(text: str) -> str:
    """A path whose tilde a shell leaves in ``--out=~/run``."""
    return os.path.expanduser(text)


def place(text: str) -> str:
    """An absolute path; ``none`` and ``DEFAULT``, which stand for others, stay."""
    return text if text in ("none", "DEFAULT") else os.path.abspath(expanded(text))


class Checked:
    """A dataclass whose fields are checked when it is made; None is taken where it is the default.

    SettingError: a ValueError that names the setting, what it got and what it takes.
    """

    def __post_init__(self):
        for field in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            value, takes = getattr(self, field.name), field.metadata["takes"]
            if value is None and field.default is None:
                continue
            if not takes.fits(value):
                raise SettingError(f"{field.name} is {value!r}; it must be {takes.words()}")
            object.__setattr__(self, field.name, takes.kind(value))

    def _set(self, name: str, value: Any) -> None:
        """Replace what follows from other settings, in a frozen dataclass."""
        object.__setattr__(self, name, value)


def add_options(
    parser: argparse.ArgumentParser, settings: type, names: Iterable[str] | None = None
):
    """Add an option for each field of a settings class, or those in ``names``, but for those there
    are.

    The parser must have ``argument_default=argparse.SUPPRESS``: only what is given is in its
    result.
    """
    there = {action.dest for action in parser._actions}
    fields = {field.name: field for field in dataclasses.fields(settings)}
    for name in fields if names is None else names:
        if name in there:
            continue
        field = fields[name]
        takes: Takes = field.metadata["takes"]
        help = takes.help.replace("%", "%%")
        required = field.default is dataclasses.MISSING
        if "(default" not in help and not required and takes.kind is not bool:
            help += f" (default: {field.default})"
        option = "--" + name.replace("_", "-")
        if takes.kind is bool:
            parser.add_argument(option, action="store_true", help=help)
            continue
        more: dict[str, Any] = {"type": takes.parse}
        if isinstance(takes.names, tuple) and takes.kind is str and takes.metavar is None:
            more = {"choices": takes.names}
        if required:
            more["required"] = True
        parser.add_argument(option, help=help, metavar=takes.metavar, **more)


# ---- distil --------------------------------------------------------------------------------------

DATA = ("digits", "fashion-mnist", "cifar10", "cifar100", "folder")
AUGMENT = ("none", "crop", "crop-flip", "resized-crop", "trivial")
PARALLEL = ("ddp", "fsdp2")
"""DistributedDataParallel, or fully_shard: each rank keeps its share of weights and moments."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """What one arm of experiment 2 does.

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
        "fused",
        "once",
        tuned=True,
    ),
}
CONTROL = "control"
"""The reference arm but for the rounding of the teacher's predictions, one epoch: how far two
curves of one procedure part for no better reason. Run where the arms reference and fused are."""
NOISY = "noisy"
"""The full arm with noise on its student. Run where the settings name a noise."""
NOISE_STD = {"input": 0.1, "gradient": 0.01, "parameter": 0.01, "regularizer": 0.01}
"""Standard deviation where none is given, by the places of the noise."""


def divergences() -> tuple[str, ...]:
    """The names of the library's divergences."""
    import kdkernels

    return tuple(kdkernels.divergences())


@dataclasses.dataclass(frozen=True)
class Distil(Checked):
    """The settings of ``distill``, in Python and on the command line."""

    # fmt: off
    data: str = choice("digits", "images to learn; folder is one of your own, with "
        "train/CLASS/*.jpg and test/CLASS/*.jpg", names=(*DATA, "own images"),
        metavar=f"{{{','.join(DATA)}}}")
    data_dir: str = path("data", "folder that holds the images, or gets them by download",
        absolute=True)
    image_size: int = count(32, "side in pixels to which images are resized; up to 64 the "
        "networks get the CIFAR stem")
    normalize: str | None = choice(None, "whose mean and deviation images are normalised with "
        "(default: data, or imagenet with teacher weights DEFAULT, which were trained so)",
        names=("data", "imagenet"))
    augment: str = text("none", "random changes to the training images: none, crop, crop-flip, "
        "resized-crop or trivial")
    views: int | None = count(None, "different augmented images of each, one per epoch in turn, so "
        "that the teacher's predictions of them can be kept (default: new ones each epoch)")
    validation: float = real(0.0, "share of the training images that is held out and tested on "
        "instead of the test images", high=0.9)
    teacher: str = text("resnet18", "one of torchvision's classification models, or "
        "module:function, which gives your own for num_classes=N")
    student: str = text("mobilenet_v2", "the same")
    teacher_weights: str = path("none", "the teacher's first weights: DEFAULT is torchvision's "
        "ImageNet ones, PATH a .safetensors or .pth file, none random", "DEFAULT|PATH|none",
        absolute=True)
    teacher_predictions: str | None = path(None, "what predict-teacher wrote; the teacher is then "
        "not run (default: the run's own)", absolute=True)
    batch_size: int = count(64, "images a step", low=2)
    lr: float = real(1e-3, "Adam's learning rate", above=True)
    schedule: str = choice("constant", "of the learning rate; cosine falls from lr to 0 over all "
        "epochs", names=("constant", "cosine"))
    weight_decay: float = real(0.0, "of AdamW; 0 is Adam")
    temperature: float = real(4.0, "of the soft targets", high=1e6, above=True)
    alpha: float = real(0.5, "weight of the soft targets, the labels have the rest", high=1)
    divergence: str = choice("forward_kl", "of the soft targets: forward_kl, reverse_kl, js or "
        "another of kdkernels.divergences()", names=divergences, metavar="NAME")
    beta: float | None = real(None, "of the divergences js and skew_* (default: the divergence's "
        "own)", high=1)
    epochs: int = count(5, "of each arm, at most")
    teacher_epochs: int | None = count(None, "of the teacher (default: 3, or 0 for a loaded one "
        "that knows the classes)", low=0)
    target_accuracy: float | None = real(None, "an arm stops at this test accuracy, 0..1 "
        "(default: never early)", high=1)
    budget: float | None = real(None, "of training, after which an arm begins no other epoch "
        "(default: none)", above=True, metavar="SECONDS")
    generations: int = count(1, "of students; each one from the second on is taught by the one "
        "before")
    arms: tuple[str, ...] | None = several(None, "which of alone, reference, fused, cached, full "
        "(default: all five)", names=tuple(ARMS))
    noise: str | None = choice(None, "one more arm, noisy: full, with this noise on its student "
        "(default: no such arm)", names=tuple(NOISE_STD))
    noise_std: float | None = real(None, "its standard deviation, of a gradient's in the first "
        "step, the regulariser's weight (default: " + ", ".join(f"{std} {where}" for where, std in
        NOISE_STD.items()) + ")", low=0, high=1e6)
    train_samples: int | None = count(None, "use the first N only (default: all)", low=2)
    test_samples: int | None = count(None, "use the first N only (default: all)")
    seed: int = count(0, "of weights, batches, dropout, augmentation and noise", low=0, high=2**62)
    device: str = choice("auto", "auto is cuda where torch sees one", names=("auto", "cpu", "cuda"))
    threads: int | None = count(None, "CPU threads (default: torch's choice)")
    checkpoint_every: int | None = count(None, "write a checkpoint within an epoch too (default: "
        "at an epoch's end)", metavar="STEPS")
    parallel: str = choice("ddp", "what trains on several ranks, started by `torchrun "
        "--nproc-per-node=N -m kdkernels distill ...`", names=PARALLEL)
    exact_ranks: bool = flag("several ranks give the result of one process, to rounding: BatchNorm "
        "and dropout are those of the whole batch, and not each rank's own as DDP has them")
    # fmt: on

    def __post_init__(self):
        super().__post_init__()
        if self.noise is None and self.noise_std is not None:
            raise SettingError("noise_std requires noise, which is not given")
        if self.noise is not None and self.noise_std is None:
            self._set("noise_std", NOISE_STD[self.noise])
        if self.normalize is None:
            usual = "imagenet" if self.teacher_weights == "DEFAULT" else "data"
            self._set("normalize", usual)
        if self.beta is not None:
            import kdkernels

            if "beta" not in kdkernels.divergences()[self.divergence].parameters:
                raise SettingError(f"beta is no parameter of the divergence {self.divergence}")
        if self.views is not None and self.augment == "none":
            raise SettingError("views requires augment, which is not given")
        barred = {}
        if self.augment != "none" and self.views is None:
            barred["once"] = (
                "with augment each epoch sees new images, of which no predictions can be kept: "
                "give views, the number of different views of an image"
            )
        if self.teacher_predictions is not None:
            barred["each step"] = "with teacher_predictions no teacher runs"
        possible = tuple(name for name, arm in ARMS.items() if arm.teacher not in barred)
        arms = possible if self.arms is None else self.arms
        self._set("arms", arms)
        for name in (*arms, *(["full"] if self.noise else [])):
            if name not in possible:
                reason = barred[ARMS[name].teacher]
                raise SettingError(
                    f"the arm {name} asks its teacher {ARMS[name].teacher}: {reason}"
                )
