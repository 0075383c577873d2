"""What a distillation is tried on before it begins: its images, and both models on two of them."""

import copy
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from kdkernels.train import TrainError, data, said
from kdkernels.train.images import Images
from kdkernels.train.noise import Noise
from kdkernels.train.run_folder import state_of
from kdkernels.train.settings import Distil


def load_images(settings: Distil) -> tuple[Images, Images]:
    """The training and the test images that the settings name."""
    return data.load(
        settings.data,
        size=settings.image_size,
        data_dir=settings.data_dir,
        imagenet=settings.normalize == "imagenet",
        augment=settings.augment,
        views=settings.views,
        seed=settings.seed,
    )


def images_of(
    settings: Distil, images: tuple[Images, Images] | None = None
) -> tuple[Images, Images, Images]:
    """The images that predictions are made of, those trained on and those tested on.

    ``images``: training and test images to take instead of those that the settings name.
    """
    train, test = images or load_images(settings)
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


def check_images(train: Images, test: Images) -> None:
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

    It stays as it is, but for parameters that it makes in its first forward pass. Returns whether
    the loss in training leaves parameters out. TrainError: the model does not take the images,
    gives no logits, or cannot be trained.
    """
    inputs, labels = images.batch(
        torch.arange(2, device=images.labels.device), view=images.view_of(0)
    )

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

    mode = model.training
    try:
        model.eval()
        with torch.no_grad():
            logits(model)
        model.train(mode)
        if noise is None:
            return False
        return _leaves_out(who, model, lambda trial: F.cross_entropy(logits(trial), labels), noise)
    except TrainError:
        raise
    except Exception as error:  # a model may raise anything
        what = "cannot be trained on" if noise is not None and model.training else "does not take"
        more = "its parameters must be torch.float32, and its input's size image_size"
        if noise is not None and noise.place == "regularizer":
            more = "the noise regularizer requires a model that can be differentiated twice"
        raise TrainError(
            f"the {who} {type(model).__name__} {what} images of shape {list(inputs.shape)} "
            f"({type(error).__name__}: {said(error)}): {more}"
        ) from None
    finally:
        model.train(mode)


def _leaves_out(who: str, model: nn.Module, loss_of: Callable, noise: Noise) -> bool:
    """Whether the loss of a copy of the model, in training, leaves parameters out."""
    if not any(p.requires_grad for p in model.parameters()):
        raise TrainError(f"the {who} has no parameter that requires grad: none can learn")
    trial = copy.deepcopy(model).train()
    state_of(trial)  # which its checkpoints will hold
    parameters = list(trial.parameters())
    device = parameters[0].device
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
        noise.on_loss(lambda: loss_of(trial), parameters, 0).backward()
    return any(p.grad is None for p in parameters if p.requires_grad)
