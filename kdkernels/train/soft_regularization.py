"""Experiment 3: a network trained with noise in four places, and without, over several seeds.

The arms of a seed start from the same weights and see the same batches; they differ only in what
the table ``ARMS`` says, and are compared in pairs, seed by seed. Each (seed, arm) is a run of its
own, one after the other: an unfinished run continues from its checkpoint, a finished one is kept
as its predictions on the test images.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from kdkernels.train import data, models
from kdkernels.train.loop import (
    Interrupt,
    Learner,
    Noise,
    accuracy,
    choose_device,
    epoch_batches,
    predictions,
    reproducible,
)
from kdkernels.train.run_folder import RunFolder

__all__ = [
    "ARMS", "BINS", "MEASURES", "MODELS", "Settings", "calibration_error", "difference",
    "reliability", "results", "run",
]  # fmt: skip

ARMS = {
    "none": "no noise",
    "input": "std * eps on the normalised images",
    "gradient": "noise of variance std² / (1 + step)^0.55 on the gradients",
    "parameter": "std * eps on the weights during forward and backward",
    "regularizer": "the loss L + λ Σ eps_i ∂L/∂θ_i, exact, with parameter's eps",
}
"""The places of :class:`kdkernels.train.loop.Noise`, in words."""

BINS = 15
"""Bins of the calibration error, as in Guo et al."""

MEASURES = {
    "accuracy": "test accuracy", "ece": "ECE", "loss": "test loss",
}  # fmt: skip

# Chosen with a quarter of digits' training images held out, on seeds from 100 on; the test images
# took no part. mlp's are each the best, or the least harmful, of three or four by held-out loss
# over five seeds; resnet18's do no clear harm, which is all that two seeds could tell.
_DEFAULTS = {
    "mlp": {
        "epochs": 60, "input_std": 0.5, "gradient_std": 0.003, "parameter_std": 0.05,
        "regularizer_lam": 0.05, "threads": 1,
    },
    "resnet18": {
        "epochs": 6, "input_std": 0.5, "gradient_std": 0.01, "parameter_std": 0.01,
        "regularizer_lam": 0.01,
    },
}  # fmt: skip
MODELS = tuple(_DEFAULTS)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What experiment 3 is asked for; the command's options, with their defaults.

    What is None takes the model's own default when the settings are made.

    Attributes:
        model: one of ``MODELS``: :func:`kdkernels.train.models.mlp`, or ResNet-18 as
            :func:`kdkernels.train.models.build` makes it.
        data: one of ``data.DATA``.
        data_dir: where CIFAR-10 lies or goes.
        image_size: side in pixels to which images are resized; None is their own, 8 or 32.
        batch_size: images a step.
        lr: Adam's learning rate.
        epochs: of each run.
        seeds: runs of each arm.
        seed: of the first one's initial weights, batches and noise; the others count on from it.
        arms: names from ``ARMS``.
        input_std, gradient_std, parameter_std: standard deviations of the arms' noise.
        regularizer_lam: weight of the regulariser.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        threads: CPU threads; None is torch's choice, for an MLP 1: its steps are small.
        train_samples, test_samples: use only the first so many images; None is all.
    """

    model: str = "mlp"
    data: str = "digits"
    data_dir: str = "data"
    image_size: int | None = None
    batch_size: int = 64
    lr: float = 1e-3
    epochs: int | None = None
    seeds: int = 5
    seed: int = 0
    arms: tuple[str, ...] = tuple(ARMS)
    input_std: float | None = None
    gradient_std: float | None = None
    parameter_std: float | None = None
    regularizer_lam: float | None = None
    device: str = "auto"
    threads: int | None = None
    train_samples: int | None = None
    test_samples: int | None = None

    def __post_init__(self):
        image_size = {"image_size": 8 if self.data == "digits" else 32}
        for name, value in (_DEFAULTS[self.model] | image_size).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    def std(self, arm: str) -> float:
        """The standard deviation of an arm's noise, the regulariser's weight; 0 without any."""
        stds = {"regularizer": self.regularizer_lam, "none": 0.0}
        return stds[arm] if arm in stds else getattr(self, f"{arm}_std")


def reliability(
    logits: torch.Tensor, labels: torch.Tensor, bins: int = BINS
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """How often a classifier is right, by how sure it is (Guo et al., arXiv 1706.04599, sec. 2).

    Bin m of ``bins``, from 1, holds the rows whose largest probability is in
    ((m - 1) / bins, m / bins].

    Args:
        logits: ``[n, classes]``.
        labels: ``[n]`` int64.

    Returns:
        Of each bin the number of rows, the sum of those that are right and the sum of their
        probabilities: three ``[bins]`` fp64.
    """
    confidence, guess = logits.cpu().double().softmax(1).max(1)
    right = (guess == labels.cpu()).double()
    place = ((confidence * bins).ceil().long() - 1).clamp(0, bins - 1)
    empty = torch.zeros(bins, dtype=torch.float64)
    count, hits, sure = (
        empty.index_add(0, place, x) for x in (torch.ones_like(right), right, confidence)
    )
    return count, hits, sure


def calibration_error(logits: torch.Tensor, labels: torch.Tensor, bins: int = BINS) -> float:
    """Expected calibration error, 0..1 (Guo et al., arXiv 1706.04599, eq. 3).

    The mean over rows of their bin's |accuracy - mean confidence|; bins and arguments as in
    :func:`reliability`.
    """
    _, right, confidence = reliability(logits, labels, bins)
    return ((right - confidence).abs().sum() / len(labels)).item()


def difference(values: list[float], base: list[float]) -> dict[str, Any]:
    """The paired difference ``values - base`` over seeds.

    Returns:
        ``mean``; its ``standard_error`` (standard deviation of the differences over the root of
        their number), None for one seed; and the ``standard_errors`` that the mean is away from
        0, None where that has no value.
    """
    apart = [a - b for a, b in zip(values, base, strict=True)]
    mean = statistics.fmean(apart)
    error = statistics.stdev(apart) / math.sqrt(len(apart)) if len(apart) > 1 else None
    return {
        "mean": mean,
        "standard_error": error,
        "standard_errors": mean / error if error else None,
    }


def run(
    settings: Settings, folder: RunFolder, on_step: Callable[[str, int, int], None], say: Callable
) -> None:
    """Run experiment 3, or what is left of it; everything it finds goes to the folder.

    Args:
        settings: what was asked for.
        folder: where metrics, checkpoints and predictions go. Those already in it are continued.
        on_step: ``on_step("all runs", steps done, steps in all)``, called after each step.
        say: called with a line for the person who watches, after each run.

    Raises:
        TrainError: see :meth:`kdkernels.train.loop.Learner.train_epoch`, and missing data.
    """
    device = choose_device(settings.device)
    try:
        with reproducible(settings.seed, settings.threads), Interrupt() as interrupt:
            _run(settings, folder, device, interrupt, on_step, say)
    finally:
        folder.close()


def _run(settings, folder, device, interrupt, on_step, say):
    train, test = data.load(settings.data, size=settings.image_size, data_dir=settings.data_dir)
    train = train.first(settings.train_samples).to(device)
    test = test.first(settings.test_samples).to(device)
    if settings.model == "mlp":  # the copies of a grey channel would each get noise of their own
        train, test = (
            dataclasses.replace(part, channels=part.pixels.shape[1]) for part in (train, test)
        )

    folder.begin()

    def model(seed):
        torch.manual_seed(seed)
        if settings.model == "mlp":
            return models.mlp(train.classes, train.channels * settings.image_size**2)
        return models.build("resnet18", train.classes, settings.image_size)[0]

    def epoch(seed, number):
        return epoch_batches(len(train), settings.batch_size, seed, number, device)

    steps = len(epoch(0, 0)) * settings.epochs
    runs = [(seed, arm) for seed in _seeds(settings) for arm in settings.arms]
    for number, (seed, arm) in enumerate(runs):
        name = _name(seed, arm)
        if folder.load(_finished(name)) is not None:
            folder.remove(name)
            continue
        learner = Learner(
            name, model(seed).to(device), lambda logits, _, labels: F.cross_entropy(logits, labels),
            None, lambda model: accuracy(model, test), settings.lr, seed,
            noise=Noise(arm, settings.std(arm), seed),
        )  # fmt: skip
        learner.load(folder)

        def show(done=number * steps, learner=learner):
            on_step("all runs", done + learner.step, len(runs) * steps)

        while learner.epoch < settings.epochs:
            learner.train_epoch(train, epoch(seed, learner.epoch), folder, interrupt, show)
        logits = predictions(learner.model, test, 256, learner.memory_format)
        folder.save(_finished(name), {"logits": logits, "labels": test.labels}, {})
        folder.remove(name)
        ece = calibration_error(logits, test.labels)
        say(
            f"run {number + 1} of {len(runs)}: seed {seed}, {arm}: test accuracy "
            f"{learner.measures['accuracy']:.1%}, ECE {ece:.2%}"
        )


def _seeds(settings: Settings) -> range:
    return range(settings.seed, settings.seed + settings.seeds)


def _name(seed: int, arm: str) -> str:
    return f"{arm}-{seed}"


def _finished(name: str) -> str:
    return f"{name}-predictions"


def results(folder: RunFolder) -> dict:
    """Read experiment 3's predictions and times.

    Returns:
        A dictionary ready for JSON: ``seeds``, and ``arms``: for each arm ``std``, ``seconds``
        (median of its runs' training), ``reliability`` (three lists, all seeds together), with
        noise on gradients ``noise_to_gradient`` (the ratio of the norms at the end of the first
        and of the last epoch, medians over seeds), and for
        each of ``MEASURES`` its ``values`` by seed, ``mean``, standard deviation ``spread`` (None
        for one seed) and, where there is an arm ``"none"``, the ``difference`` to it.
    """
    wanted = folder.config["soft_regularization"]
    settings = Settings(**wanted | {"arms": tuple(wanted["arms"])})
    epochs = {}
    for line in folder.metrics():
        if line["kind"] == "epoch":
            epochs.setdefault(line["learner"], []).append(line)
    arms = {}
    for arm in settings.arms:
        values = {measure: [] for measure in MEASURES}
        bins = torch.zeros(3, BINS, dtype=torch.float64)
        for seed in _seeds(settings):
            found = folder.load(_finished(_name(seed, arm)))
            assert found is not None, "the run is not finished"
            logits, labels = found[0]["logits"], found[0]["labels"]
            right = logits.argmax(1) == labels
            values["accuracy"].append(right.double().mean().item())
            values["ece"].append(calibration_error(logits, labels))
            values["loss"].append(F.cross_entropy(logits.double(), labels).item())
            bins += torch.stack(reliability(logits, labels))
        runs = [epochs[_name(seed, arm)] for seed in _seeds(settings)]
        arms[arm] = {
            "std": settings.std(arm),
            "seconds": statistics.median(sum(line["seconds"] for line in run) for run in runs),
            "reliability": bins.tolist(),
        }
        ratios = [
            [run[when]["noise_to_gradient"] for run in runs if "noise_to_gradient" in run[when]]
            for when in (0, -1)
        ]
        if all(ratios):
            arms[arm]["noise_to_gradient"] = [statistics.median(ratio) for ratio in ratios]
        for measure, row in values.items():
            arms[arm][measure] = {
                "values": row,
                "mean": statistics.fmean(row),
                "spread": statistics.stdev(row) if len(row) > 1 else None,
            }
    if "none" in arms:
        for arm in arms.values():
            for measure in MEASURES:
                base = arms["none"][measure]["values"]
                arm[measure]["difference"] = difference(arm[measure]["values"], base)
    return {"seeds": list(_seeds(settings)), "arms": arms}
