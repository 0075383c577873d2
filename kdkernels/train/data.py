"""The known data sets: digits, Fashion-MNIST, CIFAR-10 and CIFAR-100; :func:`load`."""

import contextlib
import dataclasses
import gzip
import os
import pickle
import socket
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdkernels.train import TrainError, said
from kdkernels.train.folder import folder
from kdkernels.train.images import IMAGENET, Augment, Images, OnStep, statistics
from kdkernels.train.settings import DATA

# Mean and standard deviation of the training images, by channel.
_FASHION = (0.2860,), (0.3530,)
_CIFAR10 = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
_CIFAR100 = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)

_DEBIAN = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts its files."""


Part = tuple[torch.Tensor, torch.Tensor]
"""Pixels ``[n, channels, height, width]`` uint8 and labels ``[n]`` int64."""


def _images(parts: Iterable[Part], classes: Iterable[str], size: int, mean, std, **more):
    names, white = tuple(classes), more.pop("white", 255.0)
    train, test = (
        Images(x, y, len(names), size, white, *statistics(mean, std), names=names, **more)
        for x, y in parts
    )
    return train, test


def _digits(size: int) -> tuple[Images, Images]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    # The split is fixed, whatever the run's seed: two runs are then tested on the same images.
    parts = train_test_split(pixels, labels, test_size=0.2, stratify=labels, random_state=0)
    train_x, test_x, train_y, test_y = map(torch.from_numpy, parts)
    intensity = train_x.float() / 16
    parts = [
        (x.to(torch.uint8).view(-1, 1, 8, 8), y.long())
        for x, y in ((train_x, train_y), (test_x, test_y))
    ]
    # As fp32 tensors: the statistics must be theirs to the last bit.
    return _images(
        parts, "0123456789", size, intensity.mean(), intensity.std(), white=16.0, flips=False
    )


@contextlib.contextmanager
def _reading(name: str, place: Path, missing: list[str], advice: str) -> Generator[None]:
    """Says in one sentence what went wrong inside, where torchvision reads or downloads."""
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)
    try:
        yield
    except Exception as error:  # unpickling a damaged file raises nearly anything
        if missing and isinstance(error, OSError | RuntimeError):
            raise TrainError(
                f"{name} is not in {place} ({missing[0]} is missing) and could not be "
                f"downloaded: {advice}"
            ) from None
        raise TrainError(f"{name} in {place} cannot be read: {said(error)}") from None
    finally:
        socket.setdefaulttimeout(patience)


class _Arrays(pickle.Unpickler):
    """Reads NumPy arrays, lists and numbers only: a pickle may name any function to call."""

    _NAMES = (
        "numpy.ndarray",
        "numpy.dtype",
        "numpy.core.multiarray._reconstruct",
        "numpy._core.multiarray._reconstruct",
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray.scalar",
        "numpy.core.numeric._frombuffer",
        "numpy._core.numeric._frombuffer",
        "_codecs.encode",
    )

    def find_class(self, module, name):
        if f"{module}.{name}" not in self._NAMES:
            raise pickle.UnpicklingError(f"it names {module}.{name}, and must hold arrays only")
        return super().find_class(module, name)


def _unpickled(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        found = _Arrays(file, encoding="latin1").load()
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} holds a {type(found).__name__}, and must hold a dict")
    return found


def _cifar(base: type, own, size: int, data_dir: str, imagenet: bool) -> tuple[Images, Images]:
    class Files(base):
        # The archive's MD5 is checked when it is downloaded. Files that lie there may be a subset,
        # or pickled again: so their MD5 is not checked, and they are read by _Arrays.
        def __init__(self):
            self.root = data_dir

    layout = Path(data_dir) / base.base_folder
    names = [[name for name, _ in listed] for listed in (base.train_list, base.test_list)]
    every = [*names[0], *names[1], base.meta["filename"]]
    missing = [name for name in every if not (layout / name).is_file()]
    advice = (
        f"put {base.filename} from {base.url} there, unpacked, and name the folder that holds "
        "it with data_dir"
    )
    with _reading(base.__name__.replace("R1", "R-1"), layout, missing, advice):
        if missing:
            Files().download()
        classes = _unpickled(layout / base.meta["filename"])[base.meta["key"]]
        parts = [_cifar_part(layout, part, len(classes)) for part in names]
    # Pretrained weights expect the statistics that they were trained with.
    return _images(parts, classes, size, *(IMAGENET if imagenet else own))


def _cifar_part(layout: Path, names: list[str], classes: int) -> Part:
    """Files in CIFAR's Python format."""
    pixels, labels = [], []
    for name in names:
        found = _unpickled(layout / name)
        pixels.append(np.asarray(found["data"], np.uint8).reshape(-1, 3, 32, 32))
        labels.append(np.asarray(found["labels" if "labels" in found else "fine_labels"], np.int64))
        if len(pixels[-1]) != len(labels[-1]):
            raise ValueError(f"{name} has {len(pixels[-1])} images and {len(labels[-1])} labels")
        if not ((labels[-1] >= 0) & (labels[-1] < classes)).all():
            raise ValueError(f"{name} has labels that are none of its {classes} classes")
    return torch.from_numpy(np.concatenate(pixels)), torch.from_numpy(np.concatenate(labels))


def _idx(path: Path) -> torch.Tensor:
    """The bytes of a file in LeCun's IDX format, packed or not."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        content = file.read()
    shape = np.frombuffer(content, ">i4", content[3], 4)
    pixels = np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
    return torch.from_numpy(pixels.copy())


def _fashion(size: int, data_dir: str, imagenet: bool) -> tuple[Images, Images]:
    from torchvision.datasets import FashionMNIST

    packed = [name for name, _ in FashionMNIST.resources]  # images, labels: to train, to test
    raw = Path(data_dir) / "FashionMNIST" / "raw"

    def present() -> list[Path]:
        for place in (raw, Path(data_dir), _DEBIAN):
            bare = [place / name.removesuffix(".gz") for name in packed]
            for files in (bare, [place / name for name in packed]):
                if all(file.is_file() for file in files):
                    return files
        return []

    files = present()
    advice = (
        f"put {packed[0]} and the three files beside it there, or install Debian's "
        "dataset-fashion-mnist"
    )
    missing = [] if files else [n for n in packed if not (raw / n.removesuffix(".gz")).is_file()]
    with _reading("Fashion-MNIST", files[0].parent if files else raw, missing, advice):
        if not files:
            FashionMNIST(data_dir, download=True)
            files = present()
        train_x, train_y, test_x, test_y = map(_idx, files)
        parts = [(x[:, None], y.long()) for x, y in ((train_x, train_y), (test_x, test_y))]
        for x, y in parts:
            if len(x) != len(y):
                raise ValueError(f"{len(x)} images have {len(y)} labels")
    return _images(parts, FashionMNIST.classes, size, *(IMAGENET if imagenet else _FASHION))


def load(
    name: str,
    *,
    size: int,
    data_dir: str = "data",
    imagenet: bool = False,
    augment: Augment = "none",
    views: int | None = None,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> tuple[Images, Images]:
    """The training and the test images.

    Args:
        name: ``"digits"``: scikit-learn's ``load_digits``, 1,797 grey 8x8 images that come with
            the package, 80 % of each class for training. ``"fashion-mnist"``: 70,000 grey 28x28
            images in 10 classes (Xiao et al., arXiv 1708.07747), from ``data_dir`` (torchvision's
            layout, or the four .gz files), or where Debian's package dataset-fashion-mnist puts
            them. ``"cifar10"``, ``"cifar100"``: 60,000 colour 32x32 images in 10 or 100 classes
            (Krizhevsky 2009), from ``data_dir`` in their Python format. All three are split as
            published, and downloaded into ``data_dir`` where they are missing and a network
            allows. ``"folder"``: see :func:`folder`, of which ``data_dir`` is the path.
        size: side in pixels of the images in a batch.
        data_dir: folder of the files.
        imagenet: normalise with ImageNet's statistics, for a pretrained teacher; digits keep
            their own.
        augment, views, seed: of the training images, see :class:`Images`.
        on_step: see :func:`folder`; the others need no progress.

    Raises:
        TrainError: the data is not there and cannot be had, or cannot be read.
    """
    view = {"augment": augment, "views": views, "seed": seed}
    data_dir = os.path.expanduser(data_dir)
    if name == "folder":
        return folder(data_dir, size=size, imagenet=imagenet, on_step=on_step, **view)
    if name == "digits":
        train, test = _digits(size)
    elif name == "fashion-mnist":
        train, test = _fashion(size, data_dir, imagenet)
    elif name in ("cifar10", "cifar100"):
        from torchvision import datasets

        base, own = {
            "cifar10": (datasets.CIFAR10, _CIFAR10),
            "cifar100": (datasets.CIFAR100, _CIFAR100),
        }[name]
        train, test = _cifar(base, own, size, data_dir, imagenet)
    else:
        raise TrainError(f"data is {name!r}; it takes {', '.join(DATA)}")
    return dataclasses.replace(train, **view), test
