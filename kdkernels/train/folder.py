"""A folder of image files, a folder a class: its layout, and its images decoded once."""

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import uuid
import warnings
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdkernels.train import TrainError
from kdkernels.train.images import IMAGENET, Augment, Images, OnStep, held_out, statistics
from kdkernels.train.run_folder import cache_folder, lock

_16_BITS = ("PNG", "PPM")
"""Formats whose grey images have at most so many."""


def _in_rgb(image: Any, format: str | None) -> Any:
    """A Pillow image in RGB; Pillow's own conversion turns all above 255 to white."""
    from PIL import Image

    if image.mode.startswith(("I", "F")):
        # Pillow reads some files of 16 bits into 32.
        if not image.mode.startswith("I;16") and (image.mode == "F" or format not in _16_BITS):
            raise ValueError(
                f"its pixels are 32-bit numbers (Pillow's mode {image.mode}) and do not say what "
                "is white; it must have 8 or 16 bits per channel"
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
            s = os.stat(file)
        except OSError as error:
            raise TrainError(f"the image {file} cannot be read: {error.strerror}") from None
        # The time of the last change, unlike that of the contents, cannot be set.
        name = os.path.relpath(file, root)
        listing.append((name, s.st_size, s.st_ino, s.st_mtime_ns, s.st_ctime_ns))
    key = hashlib.sha256(json.dumps([2, str(root), size, listing]).encode()).hexdigest()[:32]
    cache = cache_folder()
    pixels, known = cache / f"{key}.npy", cache / f"{key}.json"
    shape = (len(files), 3, size, size)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / f"{key}.lock").open("w") as file:
            # A process that comes later waits, and finds the images decoded; without locks it
            # decodes them, too.
            alone = lock(file, fcntl.LOCK_EX)
            if not (known.exists() and pixels.exists()):
                beside = cache / (f"{key}.tmp" if alone else f"{key}-{uuid.uuid4().hex}.tmp")
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
            f"the decoded images of {root} cannot be kept in {cache} ({error.strerror}): they "
            f"take {np.prod(shape, dtype=float) / 1e9:.1f} GB there; set XDG_CACHE_HOME to a "
            "folder with room"
        ) from None
    # Read-only: copy on write would count as memory that the machine must have. Torch warns that
    # it knows no such tensors; this one is not written to.
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
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "val": "val",
    "valid": "val",
    "validation": "val",
}
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

    Each image is decoded once (turned as its EXIF says, RGB, the shorter side resized to ``size``,
    centre cropped), into a memory-mapped file in ``$XDG_CACHE_HOME/kdkernels`` or
    ``~/.cache/kdkernels``; another folder, or a file that is added, taken away or changed, makes a
    new one. Files there may be deleted whenever no run uses them. Classes alternate, so that the
    first N images are of all of them.

    Args:
        path: holds ``train/<class>/*`` and ``test/<class>/*`` (or ``val``; ``training``,
            ``testing``, ``valid`` and ``validation`` do, too, in any case), in the formats that
            torchvision's ImageFolder takes. Without ``test`` and ``val``, or without all three, 20
            % of each class are held out, always the same ones. Names that begin with a dot are left
            out.
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
        raise TrainError(f"{root} is not a folder: data_dir names one with a folder a class")
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
        held = held_out(labels, len(names), 0.2, seed=0)
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
    decoded = [_decoded(root, part, size, on_step) for part in (files, test_files)]
    known = decoded[0][1]
    mean, std = statistics(*(IMAGENET if imagenet else (known["mean"], known["std"])))
    train, test = (
        Images(
            pixels,
            y,
            len(names),
            size,
            255.0,
            mean,
            std,
            names=tuple(names),
            flips=flips,
            _pixels_sha256=about["sha256"],
        )
        for (pixels, about), y in zip(decoded, (labels, test_labels), strict=True)
    )
    return dataclasses.replace(train, augment=augment, views=views, seed=seed), test
