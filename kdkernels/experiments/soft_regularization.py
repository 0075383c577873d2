"""Experiment 3: a network trained with noise in four places, and without, over several seeds.

The arms of a seed start from the same weights and see the same batches; they differ only in what
the table ``PLACES`` says, and are compared in pairs, seed by seed. Each (seed, arm) is a run of its
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

from kdkernels.experiments.settings import Network
from kdkernels.train import data, loop, models, session
from kdkernels.train.images import OnStep
from kdkernels.train.noise import Noise
from kdkernels.train.run_folder import RunFolder

BINS = 15
"""Bins of the calibration error, as in Guo et al."""

MEASURES = {"accuracy": "test accuracy", "ece": "ECE", "loss": "test loss"}


def reliability(
    logits: torch.Tensor, labels: torch.Tensor, bins: int = BINS
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """How often a classifier is right, by how sure it is (Guo et al., arXiv 1706.04599, sec. 2).

    Bin m of ``bins``, from 1, holds the rows of logits ``[n, classes]`` whose largest probability
    is in ((m - 1) / bins, m / bins]. Three ``[bins]`` fp64: of each bin the number of rows, the
    sum of those that are right and the sum of their probabilities.
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

    Its ``mean``, the mean's ``standard_error`` (None for one seed), and the ``standard_errors``
    that the mean is away from 0 (None where that has no value).
    """
    apart = [a - b for a, b in zip(values, base, strict=True)]
    mean = statistics.fmean(apart)
    error = statistics.stdev(apart) / math.sqrt(len(apart)) if len(apart) > 1 else None
    return {
        "mean": mean,
        "standard_error": error,
        "standard_errors": mean / error if error else None,
    }


def run(settings: Network, folder: RunFolder, on_step: OnStep, say: Callable) -> None:
    """Run experiment 3, or what is left of it; as :func:`kdkernels.train.distillation.run`."""
    size, epochs = settings.image_size or 0, settings.epochs or 0  # None until they are made
    with session.running(settings, folder) as (device, interrupt):
        train, test = data.load(settings.data, size=size, data_dir=settings.data_dir)
        train = train.first(settings.train_samples).to(device)
        test = test.first(settings.test_samples).to(device)
        if settings.model == "mlp":  # a grey channel's copies would each get noise of their own
            train, test = (
                dataclasses.replace(part, channels=part.pixels.shape[1]) for part in (train, test)
            )
        folder.begin()
        runs = [(seed, arm) for seed in seeds(settings) for arm in settings.arms]
        for number, (seed, arm) in enumerate(runs):
            learner = _learner(settings, seed, arm, train, test, device)
            if folder.load(_finished(learner.name)) is not None:
                folder.remove(learner.name)
                continue
            learner.load(folder)

            def show(_, done, steps, number=number):
                on_step("all runs", number * steps + done, len(runs) * steps)

            for _ in learner.epochs(
                epochs, train, settings.batch_size, seed, folder, interrupt, show
            ):
                pass
            logits = loop.predictions(learner.model, test, 256, learner.memory_format)
            folder.save(_finished(learner.name), {"logits": logits, "labels": test.labels}, {})
            folder.remove(learner.name)
            say(
                f"run {number + 1} of {len(runs)}: seed {seed}, {arm}: test accuracy "
                f"{learner.measures['accuracy']:.1%}, ECE "
                f"{calibration_error(logits, test.labels):.2%}"
            )


def _learner(settings, seed, arm, train, test, device) -> loop.Learner:
    torch.manual_seed(seed)
    if settings.model == "mlp":
        model = models.mlp(train.classes, train.channels * settings.image_size**2)
    else:
        model, _ = models.build("resnet18", train.classes, settings.image_size)
    return loop.Learner(
        learner_name(seed, arm),
        model.to(device),
        lambda logits, _, labels: F.cross_entropy(logits, labels),
        None,
        lambda model: loop.accuracy(model, test),
        settings.lr,
        seed,
        noise=Noise(arm, settings.std(arm), seed),
    )


def seeds(settings: Network) -> range:
    """Those of each arm's runs."""
    return range(settings.seed, settings.seed + settings.seeds)


def learner_name(seed: int, arm: str) -> str:
    """What a run is called in metrics and checkpoints."""
    return f"{arm}-{seed}"


def _finished(name: str) -> str:
    return f"{name}-predictions"


def finished(folder: RunFolder, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A finished run's logits of the test images, and their labels."""
    found = folder.load(_finished(name))
    assert found is not None, "the run is not finished"
    return found[0]["logits"], found[0]["labels"]
