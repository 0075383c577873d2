"""Labelled images: known data sets, a folder of image files, and their augmented views.

An augmented image is a pure function of the augmentation's seed, the image's number and the view:
what a teacher said of it once is right for as long as these three stay the same.
"""

import contextlib
import dataclasses
import fcntl
import gzip
import hashlib
import itertools
import json
import os
import pickle
import shutil
import socket
import tempfile
import uuid
import warnings
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from kdkernels.train import TrainError
from kdkernels.train.run_folder import lock

__all__ = ["AUGMENT", "DATA", "Images", "folder", "load"]

DATA = ("digits", "fashion-mnist", "cifar10", "cifar100", "folder")
AUGMENT = ("none", "crop", "crop-flip", "resized-crop", "trivial")

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Of the training images, by channel.
_FASHION = (0.2860,), (0.3530,)
_CIFAR10 = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
_CIFAR100 = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)

_DEBIAN = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts its files."""

_MOVED = 2**31
"""Pixels of more bytes than this stay in host memory, and batches go to the device one by one."""

_MADE_LATER = cast(torch.Tensor, None)
"""A field that __post_init__ makes of the others."""

_16_BITS = ("PNG", "PPM")
"""Formats whose grey images have at most so many."""

Augment = str | Callable[[torch.Tensor], torch.Tensor]
OnStep = Callable[[str, int, int], None]


@dataclasses.dataclass
class Images:
    """A labelled set of images, kept as small as it came and made ready one batch at a time.

    Attributes:
        pixels: ``[N, channels, height, width]`` uint8, 1 or 3 channels, of the whole set from
            which these images are taken; may be a memory-mapped file.
        labels: ``[n]`` int64.
        classes: number of classes.
        size: side in pixels of the square images that :meth:`batch` gives.
        white: the pixel value that stands for full intensity.
        mean, std: ``[1, 3, 1, 1]`` or ``[1, 1, 1, 1]`` fp32, of intensities in 0..1.
        channels: of the images that :meth:`batch` gives: those of ``pixels``, or 3, for which
            grey ones are repeated.
        ids: ``[n]`` int64, the images' numbers in the whole set; left out: all of it, in order.
        names: of the classes, in order; empty where they have none.
        augment: ``"none"``; ``"crop"``: an eighth of the side is padded in black and a square of
            the old side cropped at random; ``"crop-flip"``: and half of them flipped left to
            right; ``"resized-crop"``: 8 % to 100 % of the area at 3:4 to 4:3, resized, and half of
            them flipped; ``"trivial"``: crop-flip, then TrivialAugmentWide (Müller and Hutter,
            arXiv 2103.10158). Or a callable that takes ``[channels, height, width]`` uint8 and
            gives the same (any size, if always the same), all of its randomness drawn from
            torch's global generator, as torchvision.transforms.v2 does. ``pixels`` are
            augmented, then resized to ``size``.
        views: epoch e sees view ``e % views``; None: each epoch a new one. Of an augmentation.
        seed: of the augmentation.
        flips: whether an image flipped left to right keeps its label; otherwise no flips.
    """

    pixels: torch.Tensor
    labels: torch.Tensor
    classes: int
    size: int
    white: float
    mean: torch.Tensor
    std: torch.Tensor
    channels: int = 3
    ids: torch.Tensor = _MADE_LATER
    names: tuple[str, ...] = ()
    augment: Augment = "none"
    views: int | None = None
    seed: int = 0
    flips: bool = True
    _whole_labels: torch.Tensor = dataclasses.field(default=_MADE_LATER, repr=False)
    _pixels_sha256: str | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self):
        if self.ids is None:
            self.ids = torch.arange(len(self.labels), device=self.labels.device)
        if self._whole_labels is None:
            self._whole_labels = self.labels
        if isinstance(self.augment, str) and self.augment not in AUGMENT:
            raise TrainError(f"augment is {self.augment!r}; it takes {', '.join(AUGMENT)}")
        if self.augment == "none":
            if self.views is not None:
                raise TrainError("--views is of --augment, which is not given")
        elif self.views is not None and self.views < 1:
            raise TrainError(f"views is {self.views}; it takes at least 1")
        if self.augment == "trivial" and (self.white != 255 or not self.flips):
            # It turns by up to 135 degrees, and its colours are out of 255.
            raise TrainError(
                "--augment trivial turns images by up to 135 degrees, after which a 6 is a 9: "
                "use --augment crop for these"
            )
        self._transform = None

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "Images":
        """The same images for another device, to which :meth:`batch` takes them.

        Pixels that are augmented, or of more than 2 GiB, stay where they are.
        """
        names = ["labels", "mean", "std", "ids", "_whole_labels"]
        if self.augment == "none" and self.pixels.nbytes <= _MOVED:
            names.append("pixels")
        return dataclasses.replace(self, **{k: getattr(self, k).to(device) for k in names})

    def take(self, index: torch.Tensor) -> "Images":
        """The images ``index`` (``[m]`` int64, or a mask ``[n]``), without a copy of the pixels."""
        return dataclasses.replace(self, labels=self.labels[index], ids=self.ids[index])

    def first(self, count: int | None) -> "Images":
        """The first ``count`` images; all of them for None or where there are fewer."""
        return dataclasses.replace(self, labels=self.labels[:count], ids=self.ids[:count])

    def split(self, share: float, seed: int) -> tuple["Images", "Images"]:
        """Hold out a share of each class.

        Args:
            share: between 0 and 1; of each class's images, rounded to a whole number.
            seed: of the choice.

        Returns:
            The rest, to train on, and the held-out images, never augmented.

        Raises:
            TrainError: one of the two would be empty.
        """
        held = _held_out(self.labels.cpu(), self.classes, share, seed)
        if held.all() or not held.any():
            raise TrainError(
                f"a share of {share:g} of {len(self)} images in {self.classes} classes leaves "
                "nothing to train on or nothing to test on"
            )
        held = held.to(self.labels.device)
        rest, out = self.take(~held), self.take(held)
        return rest, dataclasses.replace(out, augment="none", views=None)

    def view_of(self, epoch: int) -> int | None:
        """The view that an epoch sees: None, the images as they are, where none is augmented."""
        if self.augment == "none":
            return None
        return epoch if self.views is None else epoch % self.views

    def batch(
        self,
        index: torch.Tensor,
        memory_format: torch.memory_format = torch.contiguous_format,
        view: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Images augmented, resized (bilinear) and normalised, and their labels.

        Args:
            index: ``[b]`` int64, which images.
            memory_format: of the images.
            view: which of their augmented views, >= 0; None: the images as they are.

        Returns:
            ``[b, channels, size, size]`` fp32 and ``[b]`` int64.
        """
        ids = self.ids[index].to(self.pixels.device)
        pixels = self.pixels[ids]
        if view is not None and self.augment != "none":
            pixels = self._augmented(pixels, ids, view)
        x = pixels.to(self.labels.device).float() / self.white
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, size=(self.size, self.size), mode="bilinear", antialias=True)
        x = ((x - self.mean) / self.std).expand(-1, self.channels, -1, -1)
        return x.contiguous(memory_format=memory_format), self.labels[index]

    def _augmented(self, pixels, ids, view):
        if self._transform is None:
            self._transform = self._make_transform()
        # torchvision's transforms draw from torch's global generator, which also draws dropout's
        # masks: it is lent to each image in turn and given back as it was.
        generator = torch.default_generator
        before = generator.get_state()
        views = []
        try:
            for image, number in zip(pixels.cpu(), ids.tolist(), strict=True):
                key = np.random.SeedSequence((self.seed, number, view))
                generator.manual_seed(int(key.generate_state(1)[0]))
                views.append(self._transform(image))
        finally:
            generator.set_state(before)
        stacked = torch.stack(views)
        if stacked.dtype != torch.uint8 or stacked.dim() != 4:
            raise TrainError(
                f"augment gave {stacked.dtype} of shape {list(stacked.shape[1:])}: it takes and "
                "gives uint8 [channels, height, width]"
            )
        return stacked

    def _make_transform(self):
        if not isinstance(self.augment, str):
            return self.augment
        from torchvision.transforms import v2

        flip = [v2.RandomHorizontalFlip()] if self.flips and self.augment != "crop" else []
        if self.augment == "resized-crop":
            return v2.Compose([v2.RandomResizedCrop(self.size, antialias=True), *flip])
        side = self.pixels.shape[-1]
        more = [v2.TrivialAugmentWide()] if self.augment == "trivial" else []
        return v2.Compose([v2.RandomCrop(side, padding=side // 8), *flip, *more])

    def preprocessing(self) -> dict:
        """All that happens to a pixel before a model sees it, as JSON."""
        found = {
            "size": self.size,
            "channels": self.channels,
            "white": self.white,
            "mean": [round(v, 6) for v in self.mean.flatten().tolist()],
            "std": [round(v, 6) for v in self.std.flatten().tolist()],
            "augment": "none",
        }
        if self.augment == "none":
            return found
        import torchvision

        if isinstance(self.augment, str | nn.Module):
            name = str(self.augment)
        else:
            kind = self.augment if hasattr(self.augment, "__qualname__") else type(self.augment)
            name = f"{kind.__module__}.{kind.__qualname__}"
        return found | {
            "augment": name,
            "views": self.views,
            "seed": self.seed,
            "flips": self.flips,
            # Another version may draw other numbers.
            "torchvision": torchvision.__version__.split("+")[0],
        }

    def fingerprint(self) -> str:
        """SHA-256, in hex, of pixels and labels of the whole set these images are taken from."""
        if self._pixels_sha256 is None:
            pixels = hashlib.sha256()
            for part in self.pixels.split(1024):
                pixels.update(part.cpu().contiguous().numpy().data)
            self._pixels_sha256 = pixels.hexdigest()
        shape = (list(self.pixels.shape), self._pixels_sha256)
        whole = hashlib.sha256(json.dumps(shape).encode())
        whole.update(self._whole_labels.cpu().contiguous().numpy().data)
        return whole.hexdigest()


def _held_out(labels: torch.Tensor, classes: int, share: float, seed: int) -> torch.Tensor:
    """``[n]`` bool: a share of each class, rounded, chosen by the seed."""
    generator = torch.Generator().manual_seed(seed)
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(classes):
        members = (labels == label).nonzero()[:, 0]
        order = torch.randperm(len(members), generator=generator)
        held[members[order[: round(share * len(members))]]] = True
    return held


def _statistics(mean, std) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(mean).view(1, -1, 1, 1), torch.tensor(std).view(1, -1, 1, 1)


def _digits(size: int) -> tuple[Images, Images]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    # The split is fixed, whatever the run's seed: two runs are then tested on the same images.
    parts = train_test_split(pixels, labels, test_size=0.2, stratify=labels, random_state=0)
    train_x, test_x, train_y, test_y = parts
    intensity = torch.from_numpy(train_x).float() / 16
    mean, std = (v.view(1, 1, 1, 1) for v in (intensity.mean(), intensity.std()))

    def images(x, y):
        pixels = torch.from_numpy(x).to(torch.uint8).view(-1, 1, 8, 8)
        return Images(
            pixels, torch.from_numpy(y).long(), 10, size, 16.0, mean, std,
            names=tuple("0123456789"), flips=False,
        )  # fmt: skip

    return images(train_x, train_y), images(test_x, test_y)


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
        said = str(error).splitlines()[0] if str(error) else repr(error)
        raise TrainError(f"{name} in {place} cannot be read: {said}") from None
    finally:
        socket.setdefaulttimeout(patience)


class _Arrays(pickle.Unpickler):
    """Reads NumPy arrays, lists and numbers only: a pickle may name any function to call."""

    _NAMES = (
        "numpy.ndarray", "numpy.dtype", "numpy.core.multiarray._reconstruct",
        "numpy._core.multiarray._reconstruct", "numpy.core.multiarray.scalar",
        "numpy._core.multiarray.scalar", "numpy.core.numeric._frombuffer",
        "numpy._core.numeric._frombuffer", "_codecs.encode",
    )  # fmt: skip

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
    names = {
        part: [name for name, _ in listed]
        for part, listed in (("train", base.train_list), ("test", base.test_list))
    }
    every = [*names["train"], *names["test"], base.meta["filename"]]
    missing = [name for name in every if not (layout / name).is_file()]
    advice = (
        f"put {base.filename} from {base.url} there, unpacked, and name the folder that holds "
        "it with --data-dir"
    )
    with _reading(base.__name__.replace("R1", "R-1"), layout, missing, advice):
        if missing:
            Files().download()
        classes = _unpickled(layout / base.meta["filename"])[base.meta["key"]]
        parts = [_cifar_part(layout, names[part], len(classes)) for part in ("train", "test")]

    # Pretrained weights expect the statistics that they were trained with.
    mean, std = _statistics(*(_IMAGENET if imagenet else own))

    train, test = (
        Images(pixels, labels, len(classes), size, 255.0, mean, std, names=tuple(classes))
        for pixels, labels in parts
    )
    return train, test


def _cifar_part(layout: Path, names: list[str], classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels ``[n, 3, 32, 32]`` and labels of files in CIFAR's Python format."""
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


def _fashion(size: int, data_dir: str, imagenet: bool) -> tuple[Images, Images]:
    from torchvision.datasets import FashionMNIST

    packed = [name for name, _ in FashionMNIST.resources]
    raw = Path(data_dir) / "FashionMNIST" / "raw"
    missing = [name for name in packed if not (raw / name.removesuffix(".gz")).is_file()]
    # The loader reads unpacked files only: packed ones that lie ready are unpacked for it.
    ready = [
        place
        for place in (raw, Path(data_dir), _DEBIAN)
        if missing and all((place / name).is_file() for name in packed)
    ]
    advice = (
        f"put {packed[0]} and its three fellows there, or install Debian's dataset-fashion-mnist"
    )
    with (
        tempfile.TemporaryDirectory() as unpacked,
        _reading("Fashion-MNIST", ready[0] if ready else raw, missing if not ready else [], advice),
    ):
        root = data_dir
        if ready:
            root = unpacked
            place = Path(unpacked) / "FashionMNIST" / "raw"
            place.mkdir(parents=True)
            for name in packed:
                with (
                    gzip.open(ready[0] / name) as source,
                    (place / name.removesuffix(".gz")).open("wb") as target,
                ):
                    shutil.copyfileobj(source, target)
        download = bool(missing) and not ready
        parts = [FashionMNIST(root, train=t, download=t and download) for t in (True, False)]
        for part in parts:
            if len(part.data) != len(part.targets):
                raise ValueError(f"{len(part.data)} images have {len(part.targets)} labels")

    mean, std = _statistics(*(_IMAGENET if imagenet else _FASHION))
    train, test = (
        Images(
            part.data[:, None].contiguous(), part.targets, 10, size, 255.0, mean, std,
            names=tuple(FashionMNIST.classes),
        )
        for part in parts
    )  # fmt: skip
    return train, test


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "kdkernels"


def _in_rgb(image: Any, format: str | None) -> Any:
    """A Pillow image in RGB; Pillow's own conversion turns all above 255 to white."""
    from PIL import Image

    if image.mode.startswith(("I", "F")):
        # Pillow reads some files of 16 bits into 32.
        if not image.mode.startswith("I;16") and (image.mode == "F" or format not in _16_BITS):
            raise ValueError(
                f"its pixels are 32-bit numbers (Pillow's mode {image.mode}) and do not say what "
                "is white; it must have 8 or 16 bits a channel"
            )
        image = Image.fromarray((np.asarray(image) / 257.0).round().astype(np.uint8))
    return image.convert("RGB")


def _decode(path: str, size: int) -> np.ndarray:
    """One file as ``[3, size, size]`` uint8: shorter side resized to size, centre cropped."""
    from PIL import Image, ImageOps
    from torchvision.transforms.v2 import functional

    with Image.open(path) as opened:
        # JPEG can be decoded at a fraction of its size; twice the wanted size loses nothing.
        opened.draft("RGB", (2 * size, 2 * size))
        image = _in_rgb(ImageOps.exif_transpose(opened), opened.format)
    image = functional.center_crop(functional.resize(image, [size]), [size, size])
    return np.asarray(image).transpose(2, 0, 1)


def _decoded(root: Path, files: list[str], size: int, on_step: OnStep | None):
    """The files' pixels, memory-mapped from the cache, and what is known of them; decodes once.

    Known are their SHA-256, and by channel the mean and standard deviation of intensities.
    """
    listing = []
    for file in files:
        try:
            found = os.stat(file)
        except OSError as error:
            raise TrainError(f"the image {file} cannot be read: {error.strerror}") from None
        # The time of the last change, unlike that of the contents, cannot be set.
        times = (found.st_mtime_ns, found.st_ctime_ns)
        listing.append((os.path.relpath(file, root), found.st_size, found.st_ino, *times))
    key = hashlib.sha256(json.dumps([2, str(root), size, listing]).encode()).hexdigest()[:32]
    pixels, known = _cache() / f"{key}.npy", _cache() / f"{key}.json"
    shape = (len(files), 3, size, size)
    try:
        _cache().mkdir(parents=True, exist_ok=True)
        with (_cache() / f"{key}.lock").open("w") as file:
            # A process that comes later waits, and finds the images decoded; without locks it
            # decodes them, too.
            alone = lock(file, fcntl.LOCK_EX)
            if not (known.exists() and pixels.exists()):
                beside = _cache() / (f"{key}.tmp" if alone else f"{key}-{uuid.uuid4().hex}.tmp")
                try:
                    found = _decode_into(beside, shape, files, on_step)
                    os.replace(beside, pixels)
                finally:
                    beside.unlink(missing_ok=True)
                # Written last: where it is, the pixels are whole.
                beside.write_text(json.dumps(found))
                os.replace(beside, known)
    except OSError as error:
        raise TrainError(
            f"the decoded images of {root} cannot be kept in {_cache()} ({error.strerror}): they "
            f"take {np.prod(shape, dtype=float) / 1e9:.1f} GB there; set XDG_CACHE_HOME to a "
            "folder with room"
        ) from None
    # Read-only: copy on write would count as memory that the machine must have. Torch warns that
    # it knows no such tensors; nobody writes to this one.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(np.load(pixels, mmap_mode="r")), json.loads(known.read_text())


def _decode_into(target: Path, shape, files: list[str], on_step: OnStep | None) -> dict:
    mapped = np.lib.format.open_memmap(target, "w+", np.uint8, shape)
    with target.open("r+b") as file:
        # Without its space the file would be found too large for the disk by a bus error.
        os.posix_fallocate(file.fileno(), 0, target.stat().st_size)

    def decode(number):
        try:
            found = _decode(files[number], shape[-1])
        except Exception as error:  # Pillow's formats raise nearly anything on a damaged file
            raise TrainError(
                f"the image {files[number]} cannot be read ({error}): repair it or take it away"
            ) from None
        mapped[number] = found
        intensity = found.astype(np.float64) / 255
        return intensity.sum((1, 2)), np.square(intensity).sum((1, 2))

    with contextlib.ExitStack() as stack:
        if on_step is None:
            on_step = stack.enter_context(_bar())
        pool = ThreadPoolExecutor(os.cpu_count())
        # After an error or Ctrl-C the files that are still waiting are not decoded.
        stack.callback(pool.shutdown, cancel_futures=True)
        digest, sums = hashlib.sha256(), np.zeros((2, 3))
        for number, more in enumerate(pool.map(decode, range(len(files)))):
            digest.update(mapped[number])
            sums += more
            on_step("images", number + 1, len(files))
    mapped.flush()
    mean, square = sums / (shape[0] * shape[2] * shape[3])
    std = np.sqrt(np.maximum(square - mean**2, 1e-6))
    return {"sha256": digest.hexdigest(), "mean": mean.tolist(), "std": std.tolist()}


@contextlib.contextmanager
def _bar() -> Generator[OnStep]:
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("decoding images", total=None)
        yield lambda _, done, total: progress.update(task, completed=done, total=total)


def _class_folders(path: Path) -> list[str]:
    return sorted(e.name for e in os.scandir(path) if e.is_dir() and not e.name.startswith("."))


def _listed(path: Path, names: list[str], allow_empty: bool) -> tuple[list[str], torch.Tensor]:
    """The images below each class's folder, and their labels.

    Classes alternate as their sizes have it, so that the first N images are of all classes.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    def unreadable(error: OSError):
        if not isinstance(error, FileNotFoundError):  # a class that is not there has no images
            raise TrainError(f"{error.filename} cannot be read: {error.strerror}")

    found, seen = [], {}
    for label, name in enumerate(names):
        files = []
        for place, inside, here in os.walk(path / name, onerror=unreadable, followlinks=True):
            real = os.path.realpath(place)
            if real in seen:
                raise TrainError(
                    f"{place} and {seen[real]} are the same folder, whose images would count "
                    "twice: take the link away"
                )
            seen[real] = place
            inside[:] = sorted(i for i in inside if not i.startswith("."))
            for split in inside if place == str(path / name) else ():
                if split.lower() in _SPLITS:
                    raise TrainError(
                        f"{place} has the folder {split}: a part must stand above its classes, as "
                        f"in {split}/{name}"
                    )
            files += [
                os.path.join(place, file)
                for file in sorted(here)
                if file.lower().endswith(IMG_EXTENSIONS) and not file.startswith(".")
            ]
        if not files and not allow_empty:
            raise TrainError(
                f"in {path}: found no image for the classes {name}: it takes "
                f"{', '.join(IMG_EXTENSIONS)} files"
            )
        found += [((number + 0.5) / len(files), label, f) for number, f in enumerate(files)]
    if not found:
        raise TrainError(f"{path} has no images: it takes {', '.join(IMG_EXTENSIONS)} files")
    _, labels, files = zip(*sorted(found), strict=True)
    return list(files), torch.tensor(labels)


_SPLITS = {
    "train": "train", "training": "train", "test": "test", "testing": "test",
    "val": "val", "valid": "val", "validation": "val",
}  # fmt: skip
"""The usual names of a set's parts, in any case."""


def _splits(root: Path) -> dict[str, Path]:
    """The folders of a set's parts by "train", "test" and "val"; none where classes lie in root."""
    found: dict[str, Path] = {}
    names = _class_folders(root)
    named = [name for name in names if name.lower() in _SPLITS]
    hold = [name for name in named if _class_folders(root / name)]
    if not hold:
        if named and named == names:
            raise TrainError(f"{root / named[0]} holds no folders: it takes a folder a class")
        return {}  # a class may be called train
    for name in named:
        part = _SPLITS[name.lower()]
        if name not in hold:
            raise TrainError(
                f"{root / name} holds no folders: it takes a folder a class; move it away if it is "
                "not to be used"
            )
        if part in found:
            raise TrainError(f"{root} has both {found[part].name} and {name}: it takes one")
        found[part] = root / name
    if "train" not in found:
        raise TrainError(f"{root} has the folder {hold[0]}, but no train beside it")
    if len(found) == 1:
        classes = set(_class_folders(found["train"]))
        for name in names:
            if name not in named and classes & set(_class_folders(root / name)):
                raise TrainError(
                    f"{root} has the folder {name} beside {found['train'].name}: call it test or "
                    "val, or move it away if it is not to be used"
                )
    return found


def folder(
    path: str | os.PathLike,
    *,
    size: int,
    imagenet: bool = False,
    flips: bool | None = None,
    augment: Augment = "none",
    views: int | None = None,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> tuple[Images, Images]:
    """The training and the test images of a folder, a folder a class.

    Each image is decoded once (turned as its EXIF says, RGB, the shorter side resized to
    ``size``, centre cropped), into a memory-mapped file in ``$XDG_CACHE_HOME/kdkernels`` or
    ``~/.cache/kdkernels``; another folder, or a file that is added, taken away or changed, makes a
    new one. Files there may be deleted whenever no run uses them. Classes alternate, so that the
    first N images are of all of them.

    Args:
        path: holds ``train/<class>/*`` and ``test/<class>/*`` (or ``val``; ``training``,
            ``testing``, ``valid`` and ``validation`` do, too, in any case), in the formats that
            torchvision's ImageFolder takes. Without ``test`` and ``val``, or without all three,
            20 % of each class are held out, always the same ones. Files and folders whose names
            begin with a dot are left out.
        size: side in pixels.
        imagenet: normalise with ImageNet's statistics, for a pretrained teacher, instead of those
            of the training images.
        flips: whether an image flipped left to right keeps its label. None: it does, unless all
            classes are called by one character, as digits and letters are.
        augment, views, seed: of the training images, see :class:`Images`.
        on_step: ``on_step("images", done, in all)``, called after each decoded image; None: a
            progress bar on stderr.

    Raises:
        TrainError: the folder has not this layout, or an image cannot be read; it is named.
    """
    root = Path(path).expanduser().resolve()
    if not root.is_dir():
        raise TrainError(f"{root} is not a folder: --data-dir names one with a folder a class")
    split = _splits(root)
    place = split.get("train", root)
    test_place = split.get("test", split.get("val"))
    names = _class_folders(place)
    if not names:
        raise TrainError(
            f"{place} holds no folders: it takes a folder a class, or train and test with those"
        )
    if len(names) == 1:
        raise TrainError(f"{place} holds one class only, {names[0]}: it takes two or more")
    files, labels = _listed(place, names, allow_empty=False)
    if test_place is None:
        held = _held_out(labels, len(names), 0.2, seed=0)
        if not held.any():
            raise TrainError(f"{place} has too few images of each class to hold 20 % out for tests")
        test_files, test_labels = list(itertools.compress(files, held)), labels[held]
        files, labels = list(itertools.compress(files, ~held)), labels[~held]
    else:
        strange = set(_class_folders(test_place)) - set(names)
        if strange:
            raise TrainError(f"{test_place} has the class {min(strange)}, which {place} has not")
        test_files, test_labels = _listed(test_place, names, allow_empty=True)
    if flips is None:
        flips = not all(len(name) == 1 for name in names)

    pixels, known = _decoded(root, files, size, on_step)
    test_pixels, test_known = _decoded(root, test_files, size, on_step)
    mean, std = _statistics(*(_IMAGENET if imagenet else (known["mean"], known["std"])))

    def images(pixels, labels, known):
        return Images(
            pixels, labels, len(names), size, 255.0, mean, std, names=tuple(names), flips=flips,
            _pixels_sha256=known["sha256"],
        )  # fmt: skip

    train = images(pixels, labels, known)
    test = images(test_pixels, test_labels, test_known)
    return dataclasses.replace(train, augment=augment, views=views, seed=seed), test


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
