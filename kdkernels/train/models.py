"""What experiments 2 and 3 train: torchvision's ResNet-18 and MobileNetV2, and an MLP."""

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torchvision import models

from kdkernels.train import TrainError

__all__ = ["SMALL", "mlp", "student", "teacher"]

SMALL = 64
"""Images at most this wide get the CIFAR stem: see :func:`teacher` and :func:`student`."""


def _pretrained(source: str) -> dict[str, torch.Tensor]:
    if source == "DEFAULT":
        weights = models.ResNet18_Weights.DEFAULT
        try:
            return weights.get_state_dict(progress=False, check_hash=True)
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "reason", error)
            place = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
            raise TrainError(
                f"ResNet-18's ImageNet weights could not be downloaded from {weights.url} "
                f"({reason}): put that file at {place}, or use --teacher-weights none"
            ) from None
    try:
        if source.endswith(".safetensors"):
            state = load_file(source)
        else:
            state = torch.load(source, map_location="cpu", weights_only=True)
            state = state.get("state_dict", state)
    except (OSError, SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TrainError(f"the teacher's weights {source} cannot be read: {reason}") from None
    # A checkpoint of this trainer keeps the model beside the optimizer.
    own = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
    return own or state


def teacher(classes: int, size: int, weights: str = "none") -> tuple[nn.Module, bool]:
    """ResNet-18 (He et al., arXiv 1512.03385) and whether it is ready to teach.

    Args:
        classes: number of outputs.
        size: side of the images in pixels. Up to ``SMALL`` the stem is the one that the ResNet
            paper's CIFAR section uses: a 3x3 convolution of stride 1 and no max-pool, since the
            ImageNet stem would leave a 32x32 image a single pixel before the last stage.
        weights: ``"none"``: random, from torch's generator. ``"DEFAULT"``: torchvision's
            ImageNet weights with a new last layer. Otherwise a .safetensors or .pth file of this
            architecture; one whose last layer fits ``classes`` is ready, another gets a new one.

    Returns:
        The model, and True where its weights were trained on these classes already.

    Raises:
        TrainError: the weights cannot be had or do not fit.
    """
    model = models.resnet18(num_classes=classes)
    if size <= SMALL:
        model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    if weights == "none":
        return model, False
    if weights == "DEFAULT" and size <= SMALL:
        raise TrainError(
            f"ImageNet weights need an image size above {SMALL}: below, the first layer is "
            "another one; give --image-size 224 or --teacher-weights none"
        )
    state = _pretrained(weights)
    own = model.state_dict()
    ready = state.get("fc.bias", own["fc.bias"][:0]).shape == own["fc.bias"].shape
    if not ready:
        state = {k: v for k, v in state.items() if not k.startswith("fc.")}
    wrong = [
        name
        for name in own.keys() | state.keys()
        if (ready or not name.startswith("fc."))
        and (name not in own or name not in state or own[name].shape != state[name].shape)
    ]
    if wrong:
        raise TrainError(
            f"the teacher's weights {weights} are not a ResNet-18's for images of {size} pixels: "
            f"{min(wrong)} does not fit"
        )
    model.load_state_dict(state, strict=False)
    return model, ready


def student(classes: int, size: int) -> nn.Module:
    """MobileNetV2 (Sandler et al., arXiv 1801.04381) with random weights from torch's generator.

    Args:
        classes: number of outputs.
        size: side of the images in pixels. Up to ``SMALL`` the first convolution has stride 1
            instead of 2, so that a 32x32 image reaches the last stage as 2x2 and not as 1x1.
    """
    model = models.mobilenet_v2(num_classes=classes)
    if size <= SMALL:
        model.features[0][0].stride = (1, 1)
    return model


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
