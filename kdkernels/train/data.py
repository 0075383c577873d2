"""Images and labels for experiments 2 and 3: scikit-learn's digits and torchvision's CIFAR-10."""

import dataclasses
import socket
from pathlib import Path

import torch
from torch.nn import functional as F

from kdkernels.train import TrainError

__all__ = ["DATA", "Images", "load"]

DATA = ("digits", "cifar10")


@dataclasses.dataclass
class Images:
    """A labelled set of images, kept as small as it came and made ready one batch at a time.

    Attributes:
        pixels: ``[n, channels, height, width]`` uint8, 1 or 3 channels.
        labels: ``[n]`` int64.
        classes: number of classes.
        size: side in pixels of the square images that :meth:`batch` gives.
        white: the pixel value that stands for full intensity.
        mean, std: ``[1, 3, 1, 1]`` or ``[1, 1, 1, 1]`` fp32, of intensities in 0..1.
        channels: of the images that :meth:`batch` gives: those of ``pixels``, or 3, for which
            grey ones are repeated.
    """

    pixels: torch.Tensor
    labels: torch.Tensor
    classes: int
    size: int
    white: float
    mean: torch.Tensor
    std: torch.Tensor
    channels: int = 3

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "Images":
        """The same images on another device."""
        moved = {k: getattr(self, k).to(device) for k in ("pixels", "labels", "mean", "std")}
        return dataclasses.replace(self, **moved)

    def first(self, count: int | None) -> "Images":
        """The first ``count`` images; all of them for None or where there are fewer."""
        return dataclasses.replace(self, pixels=self.pixels[:count], labels=self.labels[:count])

    def view_of(self, epoch: int) -> int | None:
        """The view that an epoch sees: None, the images as they are."""
        return None

    def batch(
        self,
        index: torch.Tensor,
        memory_format: torch.memory_format = torch.contiguous_format,
        view: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Images resized (bilinear) and normalised, and their labels.

        Args:
            index: ``[b]`` int64, which images.
            memory_format: of the images.
            view: None: the images as they are.

        Returns:
            ``[b, channels, size, size]`` fp32 and ``[b]`` int64.
        """
        x = self.pixels[index].float() / self.white
        if x.shape[-1] != self.size:
            x = F.interpolate(x, size=(self.size, self.size), mode="bilinear", antialias=True)
        x = ((x - self.mean) / self.std).expand(-1, self.channels, -1, -1)
        return x.contiguous(memory_format=memory_format), self.labels[index]


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
        return Images(pixels, torch.from_numpy(y).long(), 10, size, 16.0, mean, std)

    return images(train_x, train_y), images(test_x, test_y)


def _cifar10(size: int, data_dir: str, imagenet: bool) -> tuple[Images, Images]:
    from torchvision.datasets import CIFAR10

    class Cifar10(CIFAR10):
        # torchvision refuses files whose MD5 is not the original's. No MD5 means that presence
        # is enough, so that a subset or a re-pickled copy loads; the archive's own MD5 is still
        # checked when it is downloaded.
        train_list = [[name, None] for name, _ in CIFAR10.train_list]
        test_list = [[name, None] for name, _ in CIFAR10.test_list]
        meta = CIFAR10.meta | {"md5": None}

    layout = Path(data_dir) / CIFAR10.base_folder
    names = [name for name, _ in CIFAR10.train_list + CIFAR10.test_list]
    names.append(CIFAR10.meta["filename"])
    missing = [name for name in names if not (layout / name).is_file()]
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)
    try:
        parts = [Cifar10(data_dir, train=t, download=t and bool(missing)) for t in (True, False)]
    except (OSError, RuntimeError) as error:
        if not missing:
            raise TrainError(f"CIFAR-10 in {layout} cannot be read: {error}") from None
        raise TrainError(
            f"CIFAR-10 is not in {layout} ({missing[0]} is missing) and could not be downloaded "
            f"from {CIFAR10.url}: put {CIFAR10.filename} there, unpacked, and name the folder "
            "that holds it with --data-dir"
        ) from None
    except Exception as error:  # unpickling a damaged file raises nearly anything
        raise TrainError(f"CIFAR-10 in {layout} cannot be read: {error!r}") from None
    finally:
        socket.setdefaulttimeout(patience)

    # Pretrained weights expect the statistics that they were trained with (torchvision's
    # ImageNet presets); otherwise CIFAR-10's own are used.
    mean = (0.485, 0.456, 0.406) if imagenet else (0.4914, 0.4822, 0.4465)
    std = (0.229, 0.224, 0.225) if imagenet else (0.2470, 0.2435, 0.2616)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (mean, std))

    def images(part):
        pixels = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
        return Images(pixels, torch.tensor(part.targets), 10, size, 255.0, mean, std)

    return images(parts[0]), images(parts[1])


def load(
    name: str, *, size: int, data_dir: str = "data", imagenet: bool = False, **_
) -> tuple[Images, Images]:
    """The training and the test images.

    Args:
        name: ``"digits"``: scikit-learn's ``load_digits``, 1,797 grey 8x8 images that come with
            the package, 80 % of each class for training. ``"cifar10"``: 60,000 colour 32x32
            images (Krizhevsky 2009), split as published, read from ``data_dir`` in its Python
            format and downloaded into it where it is missing and a network allows.
        size: side in pixels of the images in a batch.
        data_dir: folder that holds ``cifar-10-batches-py``.
        imagenet: normalise with ImageNet's statistics, for a pretrained teacher.

    Raises:
        TrainError: the data is not there and cannot be had, or cannot be read.
    """
    if name == "digits":
        return _digits(size)
    return _cifar10(size, data_dir, imagenet)
