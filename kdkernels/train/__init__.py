"""The thin trainer: distil your own models, and the experiments behind the ``kdkernels`` command.

    from kdkernels.train import distill, image_folder

Models and data are torchvision's and scikit-learn's, files are safetensors and JSON lines; the
modules here only join them:

- ``distillation``: :func:`distill`, and experiment 2, a ResNet-18 to MobileNetV2 in five arms
- ``data``, ``models``, ``loop``: what it trains on, what it trains, and how
- ``predictions``: a teacher's predictions, made once and kept on disk
- ``distributed``: the same over several processes
- ``soft_regression``: experiment 1, linear regression under Gaussian input noise
- ``soft_regularization``: experiment 3, a network with noise in four places
- ``language_model``, ``text``: experiment 4, a language model's loss in four ways
- ``tune``: a search for settings; ``export``, ``int8``: a student as ONNX files in fp32 and int8
- ``run_folder``: everything a run leaves on disk, and how it is read again
- ``report``, ``console``, ``tensorboard``: what a person sees of it
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kdkernels.train.data import Images
    from kdkernels.train.data import folder as image_folder
    from kdkernels.train.data import load as load_images
    from kdkernels.train.distillation import Distilled, distill

__all__ = ["Distilled", "Images", "TrainError", "distill", "image_folder", "load_images"]

# Loaded when asked for: they import torchvision, which the command's --help does without.
_LAZY = {
    "Distilled": ("distillation", "Distilled"),
    "Images": ("data", "Images"),
    "distill": ("distillation", "distill"),
    "image_folder": ("data", "folder"),
    "load_images": ("data", "load"),
}


class TrainError(Exception):
    """A run that cannot start or go on, said in one sentence for the person who started it.

    Args:
        message: the sentence, without a trailing newline.
        status: exit status of the command: 2 for bad arguments or missing data (default), 1 for
            a run that failed on the way, 130 for one that was interrupted.
    """

    def __init__(self, message: str, status: int = 2):
        super().__init__(message)
        self.status = status


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _LAZY[name]
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
