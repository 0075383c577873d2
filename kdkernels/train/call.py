"""Distillation from Python, of one's own models and images: :func:`distill`."""

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from torch import nn

from kdkernels import info
from kdkernels.train import SettingError, TrainError, console, distributed, loop, said
from kdkernels.train.distillation import run
from kdkernels.train.images import Images
from kdkernels.train.run_folder import RunFolder
from kdkernels.train.settings import ARMS, Distil


def _resumed(out: str | None, wanted: Distil) -> RunFolder:
    """The folder of a run of :func:`distill`; its settings must be the same."""
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


def _settings(teacher, student, train: Images, test: Images, settings: dict) -> Distil:
    """The settings of :func:`distill`, its arguments checked."""
    ours = (
        "data",
        "data_dir",
        "image_size",
        "normalize",
        "augment",
        "views",
        "teacher",
        "student",
        "teacher_weights",
        "teacher_predictions",
        "teacher_epochs",
        "validation",
    )
    for name in settings:
        if name in ours:
            raise TypeError(f"distill() got {name!r}, which its models and images say already")
    for name, value, kind in (
        ("teacher", teacher, nn.Module),
        ("student", student, nn.Module),
        ("train", train, Images),
        ("test", test, Images),
    ):
        if not isinstance(value, kind):
            given, takes = type(value).__name__, f"{kind.__module__}.{kind.__name__}"
            raise TypeError(f"{name} is a {given}; it must be a {takes}")
    for name, words in (
        ("classes", "classes"),
        ("size", "pixels a side"),
        ("channels", "channels"),
        ("names", "as its classes' names"),
    ):
        here, there = getattr(train, name), getattr(test, name)
        if here != there and not (name == "names" and not (here and there)):
            raise TrainError(f"train has {here} {words}, test {there}: they must be alike")
    new_each_epoch = train.augment != "none" and train.views is None
    settings.setdefault("arms", ("fused",) if new_each_epoch else ("full",))
    wanted = Distil(
        data="own images",
        image_size=train.size,
        augment=train.preprocessing()["augment"],
        views=train.views,
        teacher=type(teacher).__name__,
        student=type(student).__name__,
        **settings,
    )
    if not wanted.arms:
        raise SettingError(f"arms is {wanted.arms}; it must be one or more of {', '.join(ARMS)}")
    return wanted


@dataclasses.dataclass(frozen=True)
class Distilled:
    """What :func:`distill` made.

    Attributes:
        student: the trained student, in eval mode; of the last generation.
        accuracy: its share of right answers on the test images, 0..1.
        folder: the run's folder, with metrics and checkpoints.
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
    report: Callable[[RunFolder], object] | None = None,
    **settings,
) -> Distilled:
    """Distil your teacher into your student on your images, the fastest way there is here.

    The teacher predicts each image (and view) once, the loss is one kernel, the student runs in
    channels_last. With augmentation and no number of views each epoch sees new images, and the
    teacher runs at each step.

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
        progress: show progress bars and a line per epoch.
        report: called with the run's folder at its end, on the first rank;
            :func:`kdkernels.reports.write` makes report.html there.
        settings: fields of :class:`kdkernels.train.settings.Distil`, such as ``epochs=20``,
            ``temperature=4.0``, ``alpha=0.5``, ``generations=2``, ``noise="input"``; not those
            that name data and models.

    Raises:
        TrainError: something is missing, or does not fit; nothing is written then.
        TypeError: a setting does not exist, or an argument is of another kind.
    """
    wanted = _settings(teacher, student, train, test, settings)
    try:  # before the teacher, which may share modules with it, is moved
        student = copy.deepcopy(student)
    except Exception as error:  # a module may raise anything
        reason = said(error)
        raise TrainError(
            f"the student {type(student).__name__} cannot be copied: {reason}"
        ) from None
    if resume:
        folder = _resumed(out, wanted)
    else:
        config = {"command": "distill()", "distill": dataclasses.asdict(wanted)}
        config["machine"] = info.machine(wanted.threads)
        folder = RunFolder.create(out, config)
    screen = console.make(quiet=not progress or distributed.current().rank > 0)
    try:
        with console.progress(screen) as show:
            students = run(
                wanted, folder, *show, teacher=teacher, student=student, images=(train, test)
            )
    except BaseException:
        folder.discard()
        raise
    if report is not None and distributed.current().rank == 0:
        report(folder)
    name = list(students)[-1]
    found = loop.accuracy(students[name], test.to(next(students[name].parameters()).device))
    return Distilled(students[name], found["accuracy"], folder.path)
