"""Files of each data set, augmented views, and a teacher's predictions kept on disk."""

import dataclasses
import errno
import fcntl
import gzip
import hashlib
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import urllib.error

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torchvision import datasets

import kdkernels
from kdkernels import __main__ as command
from kdkernels.train import TrainError, checks, data, models, predictions
from kdkernels.train.settings import AUGMENT, Distil


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kdkernels"


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.CIFAR10.download", refuse)
    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", refuse)


# ---- the known data sets -------------------------------------------------------------------------


def test_cifar100(tmp_path, offline):
    with pytest.raises(TrainError, match=r"CIFAR-100 is not in .*train is missing.*data_dir"):
        data.load("cifar100", size=32, data_dir=str(tmp_path))
    layout = tmp_path / "cifar-100-python"
    layout.mkdir()
    random = np.random.RandomState(0)
    content = {}
    for name, count in (("train", 12), ("test", 5)):
        content[name] = {
            "data": random.randint(0, 256, (count, 3072), dtype=np.uint8),
            "fine_labels": random.randint(0, 100, count).tolist(),
        }
        (layout / name).write_bytes(pickle.dumps(content[name]))
    names = [f"class {n}" for n in range(100)]
    (layout / "meta").write_bytes(pickle.dumps({"fine_label_names": names}))

    train, test = data.load("cifar100", size=32, data_dir=str(tmp_path))
    assert (len(train), len(test), train.classes, train.names[3]) == (12, 5, 100, "class 3")
    assert train.labels.tolist() == content["train"]["fine_labels"]
    assert torch.equal(test.pixels, torch.from_numpy(content["test"]["data"]).view(5, 3, 32, 32))
    (layout / "train").write_bytes(b"not a pickle")
    with pytest.raises(TrainError, match="CIFAR-100 in .* cannot be read"):
        data.load("cifar100", size=32, data_dir=str(tmp_path))


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_files_run_no_code(tmp_path, offline, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    base = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    layout = tmp_path / base.base_folder
    layout.mkdir()
    files = [file for file, _ in base.train_list + base.test_list]
    for file in (*files, base.meta["filename"]):
        (layout / file).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(TrainError, match="it names posix.mkdir, and must hold arrays only"):
        data.load(name, size=32, data_dir=str(tmp_path))
    labels = {"cifar10": "labels", "cifar100": "fine_labels"}[name]
    key = base.meta["key"]
    (layout / base.meta["filename"]).write_bytes(pickle.dumps({key: ["cat", "dog"]}))
    pixels = np.zeros((3, 3072), np.uint8)

    def refused(match, **content):
        for file in files:
            (layout / file).write_bytes(pickle.dumps({"data": pixels, **content}, protocol=5))
        with pytest.raises(TrainError, match=match):
            data.load(name, size=32, data_dir=str(tmp_path))

    refused("posix.mkdir", **{labels: Evil()})
    refused("has 3 images and 2 labels", **{labels: [0, 1]})
    refused("labels that are none of its 2 classes", **{labels: [0, 1, 2]})
    assert not (tmp_path / "pwned").exists()


def idx(values):
    """Bytes of an IDX file: magic number, dimensions (big endian), values."""
    head = bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    return head + values.tobytes()


@pytest.mark.parametrize("place", ["data-dir", "torchvision", "packed", "debian"])
def test_fashion_mnist(tmp_path, offline, monkeypatch, place):
    monkeypatch.setattr(data, "_DEBIAN", tmp_path / "debian")
    root = tmp_path / "data"
    with pytest.raises(TrainError, match="Fashion-MNIST is not in .*dataset-fashion-mnist"):
        data.load("fashion-mnist", size=28, data_dir=str(root))
    where = {
        "data-dir": root,
        "torchvision": root / "FashionMNIST" / "raw",
        "packed": root / "FashionMNIST" / "raw",
        "debian": tmp_path / "debian",
    }[place]
    where.mkdir(parents=True, exist_ok=True)
    random = np.random.RandomState(0)
    found = {}
    for part, count in (("train", 9), ("t10k", 4)):
        found[part] = (
            random.randint(0, 256, (count, 28, 28), dtype=np.uint8),
            random.randint(0, 10, count, dtype=np.uint8),
        )
        for kind, values in zip(("images-idx3", "labels-idx1"), found[part], strict=True):
            file = where / f"{part}-{kind}-ubyte"
            if place == "torchvision":
                file.write_bytes(idx(values))
            else:
                file.with_name(file.name + ".gz").write_bytes(gzip.compress(idx(values)))

    parts = data.load("fashion-mnist", size=28, data_dir=str(root))
    for images, name in zip(parts, ("train", "t10k"), strict=True):
        assert np.array_equal(images.pixels[:, 0].numpy(), found[name][0])
        assert images.labels.tolist() == found[name][1].tolist()
    x, _ = parts[0].batch(torch.arange(2))
    raw = torch.from_numpy(found["train"][0][:2, None]) / 255
    torch.testing.assert_close(x, ((raw - 0.2860) / 0.3530).expand(-1, 3, -1, -1))
    x, _ = data.load("fashion-mnist", size=28, data_dir=str(root), imagenet=True)[0].batch(
        torch.arange(2)
    )
    torch.testing.assert_close(x[:, 2], (raw[:, 0] - 0.406) / 0.225)

    victim = next(where.glob("train-images*"))
    victim.write_bytes(victim.read_bytes()[:50])
    with pytest.raises(TrainError, match="Fashion-MNIST in .* cannot be read"):
        data.load("fashion-mnist", size=28, data_dir=str(root))


def test_unknown_data():
    with pytest.raises(TrainError, match="digits, fashion-mnist, cifar10, cifar100, folder"):
        data.load("mnist", size=28)


# ---- folders of images ---------------------------------------------------------------------------


def fill(root, classes=("cat", "dog"), count=5, size=(40, 30), suffix=".png", seed=0):
    """Random images, ``count`` a class."""
    random = np.random.RandomState(seed)
    for name in classes:
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = random.randint(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}{suffix}")
    return root


def test_folder_is_decoded_resized_and_cropped(tmp_path, cache, monkeypatch):
    root = tmp_path / "photos"
    fill(root / "train")
    fill(root / "val", count=2, suffix=".jpg", seed=1)
    # Left half red, right half blue, twice as wide as high: the middle of it stays.
    pixels = np.zeros((60, 120, 3), np.uint8)
    pixels[:, :60, 0] = pixels[:, 60:, 2] = 255
    Image.fromarray(pixels).save(root / "train" / "cat" / "0.png")
    # Turned by its EXIF tag: stored lying, shown standing, red on top.
    turned = Image.fromarray(np.rot90(pixels, 1).copy())
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(root / "train" / "cat" / "1.png", exif=exif)
    Image.fromarray(np.full((8, 8), 100, np.uint8)).save(root / "train" / "dog" / "0.png")

    told = []
    train, test = data.folder(root, size=20, on_step=lambda *args: told.append(args))
    assert ("images", 10, 10) in told and ("images", 4, 4) in told
    assert (len(train), len(test), train.names) == (10, 4, ("cat", "dog"))
    assert train.pixels.shape == (10, 3, 20, 20) and train.pixels.dtype == torch.uint8
    # Classes alternate, so that the first images are of all of them.
    assert train.labels.tolist() == [0, 1] * 5 and test.labels.tolist() == [0, 1, 0, 1]
    red, blue = torch.tensor([255, 0, 0]), torch.tensor([0, 0, 255])
    assert torch.equal(train.pixels[0, :, 10, 2].long(), red)
    assert torch.equal(train.pixels[0, :, 10, 18].long(), blue)
    # Rotated once by hand and once by EXIF: two quarter turns, so the halves changed sides.
    seen = np.asarray(Image.open(root / "train" / "cat" / "1.png").convert("RGB"))
    upright = np.rot90(seen, -1)
    middle = torch.from_numpy(upright[30, [31, 89]].copy()).long()
    assert torch.equal(train.pixels[2, :, 10, [2, 18]].T.long(), middle)
    assert (train.pixels[1] == 100).all()
    intensity = train.pixels.float() / 255
    torch.testing.assert_close(train.mean, intensity.mean((0, 2, 3), keepdim=True))
    deviation = intensity.std((0, 2, 3), correction=0, keepdim=True)
    torch.testing.assert_close(train.std, deviation)
    assert train.fingerprint() == dataclasses.replace(train, _pixels_sha256=None).fingerprint()

    def never(*_):
        raise AssertionError("decoded twice")

    with monkeypatch.context() as patch:
        patch.setattr("kdkernels.train.folder._decode", never)
        again, _ = data.load("folder", data_dir=str(root), size=20)
        assert torch.equal(again.pixels, train.pixels)
        with pytest.raises(TrainError, match="decoded twice"):  # of another size it is not
            data.folder(root, size=24)
    # A changed file is decoded again.
    Image.fromarray(np.zeros((60, 60, 3), np.uint8)).save(root / "train" / "cat" / "0.png")
    assert (data.folder(root, size=20)[0].pixels[0] == 0).all()
    # What is deleted from the cache is made again.
    for file in cache.glob("*.npy"):
        file.unlink()
    assert torch.equal(data.folder(root, size=20)[0].pixels[1:], train.pixels[1:])
    assert not list(cache.glob("*.tmp"))


def test_folder_without_a_split(tmp_path):
    root = fill(tmp_path / "photos", ("a", "b", "c"), 10)
    train, test = data.folder(root, size=16)
    assert [part.labels.bincount().tolist() for part in (train, test)] == [[8] * 3, [2] * 3]
    apart = {image.numpy().tobytes() for part in (train, test) for image in part.pixels}
    assert len(apart) == 30
    again = data.folder(root, size=16)[0]
    assert torch.equal(again.pixels, train.pixels)
    assert not train.flips and data.folder(root, size=16, flips=True)[0].flips


def test_a_folder_that_is_none(tmp_path):
    def refused(match, root):
        with pytest.raises(TrainError, match=match):
            data.folder(root, size=16)

    refused("nowhere is not a folder", tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused("empty holds no folders", empty)
    refused("one class only, cat", fill(tmp_path / "one", ("cat",)))
    hollow = fill(tmp_path / "hollow")
    (hollow / "emu").mkdir()
    refused("hollow.*the classes emu", hollow)
    refused("has the folder Testing, but no train", fill(tmp_path / "untrained" / "Testing").parent)
    strange = tmp_path / "strange"
    fill(strange / "train")
    fill(strange / "test", ("cat", "emu"))
    refused("the class emu, which .*train has not", strange)
    torn = fill(tmp_path / "torn", suffix=".jpg")
    victim = torn / "dog" / "3.jpg"
    victim.write_bytes(victim.read_bytes()[:300])
    refused("the image .*dog/3.jpg cannot be read", torn)
    victim.write_bytes(b"GIF?")
    refused("the image .*dog/3.jpg cannot be read", torn)
    victim.unlink()
    victim.symlink_to(tmp_path / "gone.jpg")
    refused("the image .*dog/3.jpg cannot be read", torn)
    victim.unlink()
    assert len(data.folder(torn, size=16)[0]) == 7


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [
        ("uint16", ".png"),
        ("uint16", ".tiff"),
        ("uint16", ".pgm"),
        ("int32", ".tif"),
        ("float32", ".tif"),
        ("bool", ".png"),
    ],
)
def test_images_of_other_than_8_bits(tmp_path, kind, suffix):
    """A ramp of 64 shades stays one; what does not say which number is white is refused."""
    root = fill(tmp_path / "photos", count=5)
    shades = np.linspace(0, 65535, 64)
    ramp = {"float32": shades / 65535, "bool": shades > 32767}.get(kind, shades)
    pixels = np.broadcast_to(ramp, (64, 64)).astype(kind)
    Image.fromarray(pixels).save(root / "cat" / f"0{suffix}")
    if suffix != ".png":
        (root / "cat" / "0.png").unlink()
    if kind in ("int32", "float32"):
        with pytest.raises(TrainError, match="do not say what is white"):
            data.folder(root, size=64)
        return
    whole, test = data.folder(root, size=64)
    seen = [image for part in (whole, test) for image in part.pixels if len(image.unique()) < 70]
    assert len(seen) == 1
    expected = np.round(shades / 257) if kind == "uint16" else 255.0 * ramp
    assert seen[0][0, 5].tolist() == expected.tolist()


def test_a_cache_is_of_one_folder_and_its_contents(tmp_path):
    """Names, sizes and times that agree do not make two folders, or two contents, one."""
    for seed, name in enumerate(("first", "second")):
        for file in fill(tmp_path / name / "train", suffix=".bmp", seed=seed).rglob("*.bmp"):
            os.utime(file, (1e9, 1e9))
        fill(tmp_path / name / "test", suffix=".bmp")
    first = data.folder(tmp_path / "first", size=30)[0].pixels.clone()
    second = data.folder(tmp_path / "second", size=30)[0].pixels
    image = np.asarray(Image.open(tmp_path / "second/train/cat/0.bmp")).transpose(2, 0, 1)
    assert np.array_equal(second[0], image[:, :, 5:35])
    victim = tmp_path / "first/train/cat/0.bmp"
    victim.write_bytes((tmp_path / "second/train/cat/0.bmp").read_bytes())
    os.utime(victim, (1e9, 1e9))
    again = data.folder(tmp_path / "first", size=30)[0].pixels
    assert torch.equal(again[0], second[0]) and torch.equal(again[1:], first[1:])


@pytest.mark.parametrize(
    "parts",
    [("Train", "Test"), ("training", "testing"), ("train", "valid"), ("TRAIN", "Validation")],
)
def test_parts_by_other_usual_names(tmp_path, parts):
    for part in parts:
        fill(tmp_path / part)
    train, test = data.folder(tmp_path, size=16)
    assert (len(train), len(test), train.names) == (10, 10, ("cat", "dog"))


def test_parts_that_are_none(tmp_path):
    def refused(match, root):
        with pytest.raises(TrainError, match=match):
            data.folder(root, size=16)

    flat = fill(tmp_path / "flat", ("train", "test"))
    refused("flat/test holds no folders: it takes a folder a class", flat)
    kaggle = fill(tmp_path / "kaggle" / "train").parent
    fill(kaggle, ("test",))
    refused("kaggle/test holds no folders.*move it away", kaggle)
    other = fill(tmp_path / "other" / "train").parent
    fill(other / "dev")
    refused("the folder dev beside train: call it test or val", other)
    both = fill(tmp_path / "both" / "train").parent
    fill(both / "Train")
    refused("has both Train and train", both)
    turned = tmp_path / "turned"
    for name in ("cat", "dog"):
        fill(turned / name, ("train", "test"))
    refused("cat has the folder test.*as in test/cat", turned)
    few = fill(tmp_path / "few" / "train").parent
    fill(few / "test", ("dog",))
    assert data.folder(few, size=16)[1].labels.tolist() == [1] * 5
    # A class may be called train.
    train, _ = data.folder(fill(tmp_path / "traffic", ("bus", "train")), size=16)
    assert train.names == ("bus", "train")


def test_links_and_hidden_folders(tmp_path):
    root = fill(tmp_path / "photos")
    hidden = root / "cat" / ".ipynb_checkpoints"
    hidden.mkdir()
    (hidden / "0-checkpoint.png").write_bytes((root / "cat/0.png").read_bytes())
    (root / "cat" / "._0.png").write_bytes(b"what macOS leaves beside a file")
    elsewhere = fill(tmp_path / "more", ("cats",), seed=2)
    (root / "cat" / "more").symlink_to(elsewhere / "cats")
    train, test = data.folder(root, size=16)
    assert len(train) + len(test) == 15
    for target in ("..", "../dog"):
        link = root / "cat" / "again"
        link.symlink_to(target)
        with pytest.raises(TrainError, match="are the same folder"):
            data.folder(root, size=16)
        link.unlink()


def test_the_first_images_of_a_folder_are_of_all_classes(tmp_path):
    root = tmp_path / "photos"
    for name, count in {"ant": 20, "bee": 10, "cat": 5}.items():
        for part in ("train", "test"):
            fill(root / part, (name,), count)
    train, test = data.folder(root, size=16)
    for images in (train, test):
        assert images.first(14).labels.bincount().tolist() == [8, 4, 2]
    in_order = train.take(train.labels.argsort(stable=True))
    with pytest.raises(TrainError, match="the first 12 are of 1 of 3: shuffle them"):
        checks.images_of(Distil(train_samples=12), (in_order, test))


def test_a_file_system_without_locks(tmp_path, monkeypatch, cache):
    def no(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no)
    root = fill(tmp_path / "photos")
    images = data.folder(root, size=16)[0]
    assert len(images) == 8 and not list(cache.glob("*.tmp"))
    assert len(predictions.write(tmp_path / "kept", teacher(classes=2, size=16), images)) == 8


def test_no_room_for_the_decoded_images(tmp_path, monkeypatch, cache):
    def full(*_):
        raise OSError(28, "No space left on device")

    root = fill(tmp_path / "photos")
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(TrainError, match=r"No space left.*XDG_CACHE_HOME"):
        data.folder(root, size=16)
    assert not list(cache.glob("*.npy")) and not list(cache.glob("*.tmp"))


# ---- augmented views -----------------------------------------------------------------------------


def noise_images(count=12, side=16, channels=3, **options):
    pixels = torch.randint(
        0, 256, (count, channels, side, side), generator=torch.Generator().manual_seed(1)
    )
    return data.Images(
        pixels.to(torch.uint8),
        torch.arange(count) % 4,
        4,
        options.pop("size", side),
        255.0,
        torch.zeros(1, 1, 1, 1),
        torch.ones(1, 1, 1, 1),
        **options,
    )


def half_dark(image):
    """An augmentation of one's own."""
    return image // 2 if torch.rand(()) < 0.5 else image


@pytest.mark.parametrize("augment", [*AUGMENT[1:], half_dark])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_view_is_a_function_of_seed_number_and_view(augment, channels):
    images = noise_images(channels=channels, augment=augment, views=3, seed=5)
    assert [images.view_of(epoch) for epoch in range(5)] == [0, 1, 2, 0, 1]
    everything, _ = images.batch(torch.arange(12), view=1)
    some = torch.tensor([7, 2, 2, 11])
    torch.manual_seed(3)
    before = torch.get_rng_state()
    x, labels = images.batch(some, view=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(x, everything[some]) and torch.equal(labels, images.labels[some])
    # A part of the set sees the same views.
    rest, held = images.split(0.34, seed=0)
    assert torch.equal(rest.batch(torch.arange(len(rest)), view=1)[0], everything[rest.ids])
    other = images.batch(torch.arange(12), view=2)[0]
    reseeded = dataclasses.replace(images, seed=6).batch(torch.arange(12), view=1)[0]
    assert not torch.equal(other, everything) and not torch.equal(reseeded, everything)
    # As they are for tests, and where they are held out.
    plain = noise_images(channels=channels).batch(torch.arange(12))[0]
    assert torch.equal(images.batch(torch.arange(12))[0], plain)
    assert held.view_of(0) is None
    assert torch.equal(held.batch(torch.arange(len(held)), view=1)[0], plain[held.ids])
    assert dataclasses.replace(images, views=None).view_of(7) == 7


@pytest.mark.parametrize("augment", ["crop", "crop-flip"])
@pytest.mark.parametrize("flips", [True, False])
def test_crop_and_flip_do_what_they_say(augment, flips):
    images = noise_images(40, augment=augment, flips=flips)
    padded = torch.nn.functional.pad(images.pixels, (2, 2, 2, 2)).float() / 255
    seen, flipped, places = images.batch(torch.arange(40), view=0)[0], 0, set()
    for number in range(40):
        found = []
        for place in itertools.product(range(5), range(5), (False, True)):
            top, left, flip = place
            crop = padded[number, :, top : top + 16, left : left + 16]
            if torch.equal(seen[number], crop.flip(-1) if flip else crop):
                found.append(place)
        assert len(found) == 1
        flipped += found[0][2]
        places.add(found[0][:2])
    assert len(places) > 10
    assert 8 <= flipped <= 32 if flips and augment == "crop-flip" else flipped == 0


def test_resized_crop_gives_the_size_asked_for():
    images = noise_images(4, side=48, size=32, augment="resized-crop")
    assert images.batch(torch.arange(4), view=0)[0].shape == (4, 3, 32, 32)
    assert images.batch(torch.arange(4))[0].shape == (4, 3, 32, 32)


def test_digits_are_not_flipped():
    train, test = data.load("digits", size=16, augment="crop-flip", views=2)
    assert not train.flips and test.augment == "none" and train.names[3] == "3"
    with pytest.raises(TrainError, match="a 6 is a 9"):
        data.load("digits", size=16, augment="trivial")


def test_augmentations_that_make_no_sense():
    with pytest.raises(TrainError, match="views requires augment"):
        data.load("digits", size=16, views=2)
    with pytest.raises(TrainError, match="augment is 'mixup'; it takes none, crop"):
        noise_images(augment="mixup")
    with pytest.raises(TrainError, match="views is 0"):
        noise_images(augment="crop", views=0)
    with pytest.raises(TrainError, match="augment gave torch.float32"):
        noise_images(augment=lambda image: image / 2).batch(torch.arange(2), view=0)


def test_split_is_stratified_and_fixed():
    train = data.load("digits", size=8)[0]
    rest, held = train.split(0.1, seed=1)
    each = train.labels.bincount()
    assert torch.equal(held.labels.bincount(), (0.1 * each).round().long())
    both = torch.cat([rest.ids, held.ids])
    assert torch.equal(both.sort().values, torch.arange(len(train)))
    assert torch.equal(rest.batch(torch.arange(3))[0], train.batch(rest.ids[:3])[0])
    assert torch.equal(train.split(0.1, seed=1)[1].ids, held.ids)
    assert not torch.equal(train.split(0.1, seed=2)[1].ids, held.ids)
    assert rest.fingerprint() == held.fingerprint() == train.fingerprint()
    for share in (0.001, 1.0):
        with pytest.raises(TrainError, match="leaves nothing"):
            train.split(share, seed=0)


# ---- predictions ---------------------------------------------------------------------------------


def teacher(classes=10, size=8, seed=0, scale=10.0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * size * size, classes), nn.Dropout(0.5))
    with torch.no_grad():
        model[1].weight.mul_(scale)
    return model.train()


def asked(model, images, view=None):
    with torch.no_grad():
        return model.eval()(images.batch(torch.arange(len(images)), view=view)[0])


@pytest.mark.parametrize("dtype", predictions.DTYPES)
@pytest.mark.parametrize("top_k", [None, 4])
def test_rows_are_the_teachers_logits(tmp_path, dtype, top_k):
    images = data.load("digits", size=8, augment="crop", views=2)[0].first(130)
    model = teacher()
    told = []
    found = predictions.write(
        tmp_path / "kept",
        model,
        images,
        top_k=top_k,
        dtype=dtype,
        batch_size=32,
        shard_rows=50,
        on_step=lambda *step: told.append(step),
    )
    assert model.training and told[-1] == ("teacher", 260, 260)
    assert len(found) == 130 and len(list((tmp_path / "kept").glob("*.safetensors"))) == 6
    found = predictions.Predictions.open(tmp_path / "kept")
    found.check(images, predictions.model_hash(model))
    index = torch.tensor([129, 3, 50, 49, 3])
    for view in (0, 1):
        logits = asked(model, images, view)[index]
        rows = found.rows(index, view)
        kept = getattr(torch, dtype)
        if top_k is None:
            assert rows.dtype == torch.float32 and rows.shape == (5, 10)
            torch.testing.assert_close(rows, logits.to(kept).float(), rtol=1e-5, atol=1e-4)
            assert torch.equal(rows, rows.to(kept).float())
        else:
            whole = kdkernels.topk_teacher(logits, 4)
            assert isinstance(rows, kdkernels.TopK) and rows.indices.dtype == torch.int32
            assert torch.equal(rows.indices, whole.indices)
            expected = whole.values.to(kept).float()
            torch.testing.assert_close(rows.values, expected, rtol=8e-3, atol=1e-4)
            torch.testing.assert_close(rows.logsumexp, whole.logsumexp)
            loss = kdkernels.topk_distillation_loss(torch.zeros(5, 10), rows.values, rows.indices)
            assert loss.isfinite()
    right = [(asked(model, images, v).argmax(1) == images.labels).double().mean() for v in (0, 1)]
    assert found.accuracy(images) == pytest.approx(sum(right).item() / 2)
    with pytest.raises(TrainError, match="no view None"):
        found.rows(index)


def test_a_part_of_the_set_finds_its_rows(tmp_path):
    train = data.load("digits", size=8)[0]
    model = teacher()
    found = predictions.write(tmp_path, model, train, dtype="float32")
    rest, held = train.split(0.2, seed=0)
    found.check(rest)
    torch.testing.assert_close(found.rows(torch.arange(len(rest))), asked(model, rest))
    found.check(held.first(9))
    torch.testing.assert_close(found.rows(torch.arange(9)), asked(model, held)[:9])
    with pytest.raises(TrainError, match="before a part is held out"):
        predictions.write(tmp_path / "part", model, rest)
    few = predictions.write(tmp_path / "few", model, train.first(30))
    few.check(train.first(20))
    with pytest.raises(TrainError, match="the first 30 images there and others here"):
        few.check(train)


def test_a_mismatch_is_named(tmp_path):
    options = {"size": 8, "augment": "crop", "views": 2}
    train = data.load("digits", **options)[0]
    model = teacher()
    found = predictions.write(tmp_path / "kept", model, train)

    def refused(match, images=train, model=model):
        with pytest.raises(TrainError, match=match):
            found.check(images, predictions.model_hash(model))

    refused("the model's weights differ", model=teacher(seed=1))
    refused("size is 8 there and 16 here", data.load("digits", **options | {"size": 16})[0])
    refused("views is 2 there and 3 here", data.load("digits", **options | {"views": 3})[0])
    refused("seed is 0 there and 4 here", data.load("digits", **options, seed=4)[0])
    refused("augment is crop there and none here", data.load("digits", size=8)[0])
    refused("give views", data.load("digits", size=8, augment="crop")[0])
    relabelled = train.labels.clone()
    relabelled[0] += 1
    changed = dataclasses.replace(train, labels=relabelled, _whole_labels=relabelled)
    refused("the images or labels differ", changed)
    darker = dataclasses.replace(train, pixels=train.pixels // 2, _pixels_sha256=None)
    refused("the images or labels differ", darker)
    refused("mean is", dataclasses.replace(train, mean=train.mean + 0.1))

    for images, more, said in (
        (train, {"top_k": 3}, "top_k is None there and 3 here"),
        (train, {"dtype": "float32"}, "dtype is float16 there and float32 here"),
        (train.first(10), {}, "the number of images is 1437 there and 10 here"),
    ):
        with pytest.raises(TrainError, match=said):
            predictions.write(tmp_path / "kept", model, images, **more)
    with pytest.raises(TrainError, match="cannot be made once"):
        predictions.write(tmp_path / "new", model, dataclasses.replace(train, views=None))


def test_folders_that_hold_no_predictions(tmp_path):
    train = data.load("digits", size=8)[0].first(40)
    with pytest.raises(TrainError, match="no manifest.json"):
        predictions.Predictions.open(tmp_path)
    (tmp_path / "holiday.txt").write_text("")
    with pytest.raises(TrainError, match="something else"):
        predictions.write(tmp_path, teacher(), train)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(TrainError, match="cannot be read"):
        predictions.Predictions.open(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(TrainError, match="not of the format"):
        predictions.Predictions.open(tmp_path)
    with pytest.raises(TrainError, match="cannot be written to /proc/none"):
        predictions.write("/proc/none", teacher(), train)
    place = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(place, fcntl.LOCK_EX)
    with pytest.raises(TrainError, match="another process"):
        predictions.write(tmp_path, teacher(), train)
    os.close(place)


def test_logits_that_cannot_be_kept(tmp_path):
    train = data.load("digits", size=8)[0].first(40)
    large = teacher(scale=1e6)
    with pytest.raises(TrainError, match="too large for float16: use dtype bfloat16"):
        predictions.write(tmp_path / "a", large, train)
    predictions.write(tmp_path / "b", large, train, dtype="bfloat16")
    with pytest.raises(TrainError, match="not finite"):
        predictions.write(tmp_path / "c", teacher(scale=float("nan")), train)
    with pytest.raises(TrainError, match="not one for each of the 10 classes"):
        predictions.write(tmp_path / "d", teacher(classes=7), train)
    for wrong in ({"top_k": 11}, {"dtype": "float64"}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            predictions.write(tmp_path / "e", teacher(), train, **wrong)


WRITER = """
import hashlib, os, signal, sys
sys.path.insert(0, {tests!r})
import test_data
from kdkernels.train import data, predictions
images = data.load("digits", size=8, augment="crop", views=2)[0].first(100)
print(hashlib.sha256(images.batch(images.ids, view=1)[0].numpy()).hexdigest(), flush=True)
died = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
replaced, moves = os.replace, []
def replace(source, target):
    moves.append(target)
    if {kill_at!r} == len(moves):  # the manifest is the first file
        died()
    replaced(source, target)
os.replace = replace
def on_step(name, done, total):
    if {kill_after!r} == done:
        died()
predictions.write(
    {folder!r}, test_data.teacher(), images, batch_size=10, shard_rows=30, on_step=on_step
)
"""


def test_killed_and_continued(tmp_path):
    """kill -9 within a shard, and between a shard's bytes and its name; then the rest is made."""

    def killed(**when):
        script = WRITER.format(
            tests=os.path.dirname(__file__),
            folder=str(tmp_path / "kept"),
            **{"kill_at": None, "kill_after": None} | when,
        )
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, timeout=1000
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
        return done.stdout.strip()

    images = data.load("digits", size=8, augment="crop", views=2)[0].first(100)
    # Another process sees the same bits of a view.
    view = hashlib.sha256(images.batch(images.ids, view=1)[0].numpy()).hexdigest()
    assert killed(kill_after=50) == view
    whole = tmp_path / "kept" / "00000.safetensors"
    first = whole.stat()
    assert len(list(tmp_path.glob("kept/*.safetensors"))) == 1
    with pytest.raises(TrainError, match="00001.safetensors is missing or damaged"):
        predictions.Predictions.open(tmp_path / "kept")
    killed(kill_at=3)
    assert len(list(tmp_path.glob("kept/*.safetensors"))) == 3
    # A shard cut short, as by a disk that lies about what it has written, is made again.
    third = tmp_path / "kept" / "00002.safetensors"
    third.write_bytes(third.read_bytes()[:-8])

    model, batches = teacher(), []
    model.register_forward_hook(lambda *_: batches.append(1))
    found = predictions.write(tmp_path / "kept", model, images, batch_size=10, shard_rows=30)
    assert len(batches) == 3 + 1 + 10  # two shards of eight are kept
    assert (whole.stat().st_ino, whole.stat().st_mtime_ns) == (first.st_ino, first.st_mtime_ns)
    alone = predictions.write(tmp_path / "alone", teacher(), images, batch_size=10, shard_rows=30)
    for view in (0, 1):
        assert torch.equal(found.rows(images.ids, view), alone.rows(images.ids, view))
    assert json.loads((tmp_path / "kept/manifest.json").read_text()) == alone.manifest


# ---- the command ---------------------------------------------------------------------------------


def test_predict_teacher(tmp_path, capsys):
    torch.manual_seed(0)
    model, _ = models.build("resnet18", 10, 16)
    torch.save(model.state_dict(), tmp_path / "teacher.pth")
    call = [
        "predict-teacher",
        f"--teacher-weights={tmp_path / 'teacher.pth'}",
        "--image-size=16",
        "--train-samples=40",
        "--threads=1",
        f"--out={tmp_path / 'kept'}",
    ]
    assert command.main([*call, "--top-k=2", "--augment=crop", "--views=2", "--seed=3"]) == 0
    shown = capsys.readouterr().out
    assert "40 images in 2 views" in shown and "bytes per image" in shown
    images = data.load("digits", size=16, augment="crop", views=2, seed=3)[0].first(40)
    found = predictions.Predictions.open(tmp_path / "kept")
    found.check(images, predictions.model_hash(model))
    expected = kdkernels.topk_teacher(asked(model, images, 1), 2)
    rows = found.rows(torch.arange(40), 1)
    torch.testing.assert_close(rows.values, expected.values, rtol=2e-3, atol=2e-3)
    assert set(load_file(tmp_path / "kept/00000.safetensors")) == {"values", "indices", "logsumexp"}

    for more, said in (
        (["--top-k=11"], "top_k 11: the images have 10 classes"),
        (["--augment=crop"], "views N"),
        (["--top-k=2"], "holds other predictions"),
        (["--teacher-weights=none"], "has not learnt these 10 classes"),
        (["--data=folder", f"--data-dir={tmp_path / 'none'}"], "is not a folder"),
    ):
        assert command.main([*call, *more]) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1
    assert command.main(call[:2]) == 2
    assert "--out" in capsys.readouterr().err


def pair(num_classes):
    """A teacher that gives no logits."""
    model = teacher(num_classes, size=16)
    model.append(nn.Unflatten(1, (num_classes, 1)))
    return model


def test_predict_teacher_of_what_gives_no_logits(tmp_path, capsys):
    torch.save(pair(10).state_dict(), tmp_path / "teacher.pth")
    call = [
        "predict-teacher",
        "--teacher=test_data:pair",
        "--image-size=16",
        "--threads=1",
        f"--teacher-weights={tmp_path / 'teacher.pth'}",
        f"--out={tmp_path / 'kept'}",
    ]
    assert command.main(call) == 2
    err = capsys.readouterr().err
    assert "must give logits of shape [2, 10]" in err and err.count("\n") == 1
    assert not (tmp_path / "kept").exists()


def test_predict_teacher_of_a_folder(tmp_path):
    root = fill(tmp_path / "photos", ("cat", "dog", "emu"), 5)
    model, _ = models.build("resnet18", 3, 16)
    torch.save(model.state_dict(), tmp_path / "teacher.pth")
    status = command.main(
        [
            "predict-teacher",
            f"--teacher-weights={tmp_path / 'teacher.pth'}",
            "--image-size=16",
            "--data=folder",
            f"--data-dir={root}",
            "--threads=1",
            "--normalize=imagenet",
            f"--out={tmp_path / 'kept'}",
        ]
    )
    assert status == 0
    images = data.folder(root, size=16, imagenet=True)[0]
    found = predictions.Predictions.open(tmp_path / "kept")
    found.check(images)
    torch.testing.assert_close(
        found.rows(torch.arange(12)), asked(model, images), rtol=2e-3, atol=2e-3
    )
