"""What experiments 2 and 3 train: torchvision's classification models, one's own, and an MLP."""

import importlib
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torchvision import models

from kdkernels.train import TrainError, run_folder

__all__ = ["SMALL", "build", "mlp"]

SMALL = 64
"""Images at most this wide get the CIFAR stem: see :func:`build`."""


def _read(name: str, weights: str) -> dict[str, torch.Tensor]:
    if weights == "DEFAULT":
        published = models.get_model_weights(name)["DEFAULT"]
        try:
            return published.get_state_dict(progress=False, check_hash=True)
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "reason", error)
            place = Path(torch.hub.get_dir()) / "checkpoints" / Path(published.url).name
            raise TrainError(
                f"{name}'s ImageNet weights could not be downloaded from {published.url} "
                f"({reason}): put that file at {place}, or use --teacher-weights none"
            ) from None
    try:
        if weights.endswith(".safetensors"):
            state = load_file(weights)
        else:
            state = torch.load(weights, map_location="cpu", weights_only=True)
            state = state.get("state_dict", state)
    except (OSError, SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TrainError(f"the weights {weights} cannot be read: {reason}") from None
    return run_folder.weights(state) or state


def _maker(name: str) -> Callable[..., nn.Module]:
    module, colon, function = name.partition(":")
    if not colon:
        if name not in models.list_models(module=models):
            raise TrainError(
                f"{name!r} is neither one of torchvision's classification models, such as "
                "resnet18 and mobilenet_v2, nor module:function, which names your own"
            )
        return lambda num_classes: models.get_model(name, num_classes=num_classes)
    if "" not in sys.path:  # an installed command has its own folder there, not the user's
        sys.path.insert(0, "")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise TrainError(f"the model {name} cannot be imported: {error}") from None


def _small_stem(model: nn.Module) -> None:
    first = getattr(model, "features", [None])[0]
    if isinstance(model, models.ResNet):
        width = model.conv1.out_channels
        model.conv1 = nn.Conv2d(3, width, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.add_module("maxpool", nn.Identity())
    elif isinstance(first, nn.Sequential) and isinstance(convolution := first[0], nn.Conv2d):
        convolution.stride = (1, 1)


def build(name: str, classes: int, size: int, weights: str = "none") -> tuple[nn.Module, bool]:
    """A model and whether it knows these classes already.

    Args:
        name: one of torchvision's classification models, such as ``"resnet18"`` (He et al., arXiv
            1512.03385) or ``"mobilenet_v2"`` (Sandler et al., arXiv 1801.04381), or
            ``"module:function"``, one's own, called as ``function(num_classes=classes)``; it takes
            images ``[b, 3, size, size]`` and gives logits ``[b, classes]``.
        classes: number of outputs.
        size: side of the images in pixels. Up to ``SMALL`` torchvision's models get a stem that
            keeps the resolution: a ResNet the one of its paper's CIFAR section, a 3x3 convolution
            of stride 1 and no max-pool; MobileNets and EfficientNets stride 1 in their first
            convolution. The ImageNet stem would leave a 32x32 image a single pixel before the
            last stage.
        weights: ``"none"``: random, from torch's generator. ``"DEFAULT"``: torchvision's ImageNet
            weights with a new last layer. Otherwise a .safetensors or .pth file of this
            architecture; one whose last layer fits ``classes`` is ready, another gets a new one.

    Raises:
        TrainError: there is no such model, or its weights cannot be had or do not fit.
    """
    make = _maker(name)
    try:
        model = make(num_classes=classes)
    except TypeError as error:
        raise TrainError(f"the model {name} takes no num_classes={classes}: {error}") from None
    if not isinstance(model, nn.Module):
        raise TrainError(f"{name} gave a {type(model).__name__}, not a torch.nn.Module")
    own = ":" in name
    if size <= SMALL and not own:
        _small_stem(model)
    if weights == "none":
        return model, False
    if weights == "DEFAULT" and (own or size <= SMALL):
        raise TrainError(
            f"ImageNet weights are of torchvision's models and need an image size above {SMALL}: "
            "below, the first layer is another one; give --image-size 224 or --teacher-weights none"
        )
    state, wanted = _read(name, weights), model.state_dict()
    layers = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    last = layers[-1] + "." if layers else "."

    def fits(key):
        return key in wanted and key in state and wanted[key].shape == state[key].shape

    keys = wanted.keys() | state.keys()
    ready = all(fits(key) for key in keys if key.startswith(last))
    wrong = [key for key in keys if not key.startswith(last) and not fits(key)]
    if wrong:
        raise TrainError(
            f"the weights {weights} are not of {name} for images of {size} pixels: {min(wrong)} "
            "does not fit"
        )
    if not ready:
        state = {key: value for key, value in state.items() if not key.startswith(last)}
    model.load_state_dict(state, strict=False)
    return model, ready


def mlp(classes: int, inputs: int) -> nn.Module:
    """Two hidden layers of 256 ReLUs, with random weights from torch's generator.

    Args:
        classes: number of outputs.
        inputs: values an image, all its channels and pixels.
    """
    return nn.Sequential(
        nn.Flatten(), nn.Linear(inputs, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(),
        nn.Linear(256, classes),
    )  # fmt: skip
