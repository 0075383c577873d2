"""The thin trainer: distil your own models, and the experiments behind the ``kdkernels`` command.

    from kdkernels.train import distill, image_folder

Models and data are torchvision's and scikit-learn's, files are safetensors and JSON lines; the
modules here only join them:

- ``settings``: those of ``distill``, and how settings are checked and become options
- ``images``, ``data``, ``folder``: what it trains on; ``models``: what it trains
- ``loop``: a learner's steps and epochs; ``noise``: in them; ``session``: around them
- ``call``: :func:`distill`
- ``distillation``: experiment 2, a ResNet-18 to MobileNetV2 in five arms; ``checks``: before it
- ``predictions``: a teacher's predictions, made once and kept on disk
- ``distributed``: the same over several processes; ``whole_batch``: with the result of one
- ``run_folder``: everything a run leaves on disk, and how it is read again
- ``console``, ``tensorboard``: what is shown of it while it runs

``kdkernels.experiments``, ``tools``, ``reports`` and ``commands`` stand on it.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kdkernels.train.call import Distilled, distill
    from kdkernels.train.data import load as load_images
    from kdkernels.train.folder import folder as image_folder
    from kdkernels.train.images import Images

__all__ = [
    "Distilled",
    "Images",
    "SettingError",
    "TrainError",
    "distill",
    "image_folder",
    "load_images",
]

# Imported on first use: they import torchvision, which the command's --help does without. What
# stands on the trainer is found here, too.
_LAZY = {
    "Distilled": "train.call:Distilled",
    "distill": "train.call:distill",
    "Images": "train.images:Images",
    "image_folder": "train.folder:folder",
    "load_images": "train.data:load",
    "export": "tools.export",
    "int8": "tools.int8",
    "tune": "tools.tune",
    "language_model": "experiments.language_model",
    "soft_regression": "experiments.soft_regression",
    "soft_regularization": "experiments.soft_regularization",
    "compare": "reports.compare",
}


class TrainError(Exception):
    """A run that cannot start or go on; the message is one sentence.

    Args:
        message: the sentence, without a trailing newline.
        status: exit status of the command: 2 for bad arguments or missing data (default), 1 for
            a run that failed on the way, 130 for one that was interrupted.
    """

    def __init__(self, message: str, status: int = 2):
        super().__init__(message)
        self.status = status


class SettingError(TrainError, ValueError):
    """A setting has a value that it does not take."""


def said(error: BaseException) -> str:
    """The first line of what an error says, its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _LAZY[name].partition(":")
    found = importlib.import_module(f"kdkernels.{module}")
    return getattr(found, attribute) if attribute else found
