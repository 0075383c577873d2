"""What experiments 2 and 3 train: torchvision's classification models, one's own, and an MLP."""

import importlib
import os
import pickle
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torchvision import models

from kdkernels.train import TrainError, run_folder, said

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
                f"({reason}): put that file at {place}, or use teacher_weights none"
            ) from None
    weights = os.path.expanduser(weights)
    try:
        if weights.endswith(".safetensors"):
            state = load_file(weights)
        else:
            state = torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises nearly anything
        reason = said(error)
        if isinstance(error, pickle.UnpicklingError):
            reason = (
                "it holds more than tensors, or is no file of torch.save, and pickled objects are "
                "not loaded since they may run code; it must be saved as model.state_dict()"
            )
        raise TrainError(f"the weights {weights} cannot be read: {reason}") from None
    while True:  # down to the tensors, through what training scripts save beside them
        if not isinstance(state, Mapping):
            raise TrainError(
                f"the weights {weights} are a {type(state).__name__}; they must be a state_dict"
            )
        inner = {key: value for key, value in state.items() if isinstance(value, Mapping)}
        named = [inner[key] for key in _WRAPPINGS if key in inner]
        tensors = any(isinstance(value, torch.Tensor) for value in state.values())
        if tensors or not inner:
            break
        if not named and len(inner) > 1:
            raise TrainError(
                f"the weights {weights} hold several dicts ({', '.join(map(str, inner))}); they "
                "must be one state_dict"
            )
        state = (named or list(inner.values()))[0]
    return run_folder.unpacked({str(key): value for key, value in state.items()})


_WRAPPINGS = ("state_dict", "model_state_dict", "model", "module", "net", "student", "teacher")
"""The usual names of a state_dict among other things, best first."""

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""What torch.compile, FSDP and activation checkpointing add to names, anywhere."""


def _fitted(state: dict[str, Any], wanted: dict[str, Any], what: str) -> dict[str, Any]:
    """A state's entries under the names that a model has for them.

    All of a model's names may have one beginning more, such as "module." and "model.", that of
    the object which held the model; there may be other objects' entries beside them.
    """

    def bare(name):
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        return name

    state, names = {bare(key): value for key, value in state.items()}, {bare(k): k for k in wanted}
    begins = {""} | {
        key[: -len(name)] for name in names for key in state if key.endswith("." + name)
    }
    found = {
        begin: {
            names.get(key, key): state[begin + key]
            for key in [key.removeprefix(begin) for key in state if key.startswith(begin)]
        }
        for begin in begins
    }
    fits = {begin: len(wanted.keys() & part.keys()) for begin, part in found.items()}
    best = [begin for begin in begins if fits[begin] == max(fits.values())]
    if len(best) > 1 and "" not in best and fits[best[0]]:
        raise TrainError(
            f"{what} hold several such models ({', '.join(sorted(best))}); they must be one's "
            "state_dict"
        )
    state = found["" if "" in best else best[0]]
    memory = {v.data_ptr(): state[k] for k, v in wanted.items() if k in state and _shape(v)}
    for key, value in wanted.items():  # a file may have tied tensors once
        if key not in state and _shape(value) and value.data_ptr() in memory:
            state[key] = memory[value.data_ptr()]
    return state


def _shape(value: Any) -> tuple[int, ...] | None:
    """A tensor's shape; None for extra state and for what its first forward pass makes."""
    if not isinstance(value, torch.Tensor) or nn.parameter.is_lazy(value):
        return None
    return tuple(value.shape)


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
        name: one of torchvision's classification models, or ``"module:function"``, one's own,
            called as ``function(num_classes=classes)``; it takes images ``[b, 3, size, size]`` and
            gives logits ``[b, classes]``.
        classes: number of outputs.
        size: side of the images in pixels. Up to ``SMALL`` torchvision's models get a stem that
            keeps the resolution: a ResNet that of its paper's CIFAR section, a 3x3 convolution of
            stride 1 and no max-pool; MobileNets and EfficientNets stride 1 in their first
            convolution. The ImageNet stem would leave a 32x32 image a single pixel before the last
            stage.
        weights: ``"none"``: random, from torch's generator. ``"DEFAULT"``: torchvision's ImageNet
            weights with a new last layer. Otherwise a .safetensors or .pth file of this
            architecture; one whose last layer fits ``classes`` is ready, another gets a new one.
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
            "below, the first layer is another one; give image_size 224 or teacher_weights none"
        )
    what, wanted = f"the weights {weights}", model.state_dict()
    state = _fitted(_read(name, weights), wanted, what)
    layers = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    last = layers[-1] + "." if layers else "."

    def fits(key):
        if key not in wanted or key not in state:
            return False
        shape = None if key.endswith("_extra_state") else _shape(wanted[key])
        return shape is None or shape == _shape(state[key])

    keys = wanted.keys() | state.keys()
    ready = all(fits(key) for key in keys if key.startswith(last))
    wrong = [key for key in keys if not key.startswith(last) and not fits(key)]
    if wrong:
        raise TrainError(
            f"{what} are not of {name} for images of {size} pixels: {min(wrong)} does not fit"
        )
    if not ready:
        state = {key: value for key, value in state.items() if not key.startswith(last)}
    model.load_state_dict(state, strict=False)
    return model, ready


def mlp(classes: int, inputs: int) -> nn.Module:
    """Two hidden layers of 256 ReLUs, with random weights, of ``inputs`` values per image."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(inputs, 256),
        nn.ReLU(),
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Linear(256, classes),
    )
