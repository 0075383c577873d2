"""Labelled images and their augmented views.

An augmented image is a pure function of the augmentation's seed, the image's number and the view:
what a teacher said of it once is right for as long as these three stay the same.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from kdkernels.train import TrainError
from kdkernels.train.settings import AUGMENT

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_MOVED = 2**31
"""Pixels of more bytes than this stay in host memory, and batches go to the device one by one."""

_MADE_LATER = cast(torch.Tensor, None)
"""A field that __post_init__ makes of the others."""

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
                raise TrainError("views requires augment, which is not given")
        elif self.views is not None and self.views < 1:
            raise TrainError(f"views is {self.views}; it takes at least 1")
        if self.augment == "trivial" and (self.white != 255 or not self.flips):
            # It turns by up to 135 degrees, and its colours are out of 255.
            raise TrainError(
                "augment trivial turns images by up to 135 degrees, after which a 6 is a 9: "
                "use augment crop for these"
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
        """Hold out a share, 0..1, of each class's images, rounded to a whole number, chosen by the
        seed.

        Returns the rest, to train on, and the held-out images, never augmented. TrainError: one of
        the two would be empty.
        """
        held = held_out(self.labels.cpu(), self.classes, share, seed)
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


def held_out(labels: torch.Tensor, classes: int, share: float, seed: int) -> torch.Tensor:
    """``[n]`` bool: a share of each class, rounded, chosen by the seed."""
    generator = torch.Generator().manual_seed(seed)
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(classes):
        members = (labels == label).nonzero()[:, 0]
        order = torch.randperm(len(members), generator=generator)
        held[members[order[: round(share * len(members))]]] = True
    return held


def statistics(mean, std) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers a channel as :class:`Images` takes them."""
    mean, std = (torch.as_tensor(value).view(1, -1, 1, 1) for value in (mean, std))
    return mean, std
