"""A teacher's predictions, made once and kept in a folder.

    manifest.json                   which model, data and preprocessing they are of, and the shards
    00000.safetensors, ...          raw logits, of no temperature: "logits" [rows, classes], or
                                    "values" [rows, k], "indices" [rows, k] int32 and "logsumexp"
                                    [rows] fp32

The manifest comes first and the shards follow, each whole or not there at all: what is missing is
made by the same call again.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import nn

import kdkernels
from kdkernels.train import TrainError
from kdkernels.train.images import Images
from kdkernels.train.run_folder import RunFolder, lock, read_tensors, state_of

DTYPES = ("float16", "bfloat16", "float32")
_FORMAT = "kdkernels teacher predictions 1"


def model_hash(model: nn.Module) -> str:
    """SHA-256, in hex, of a model's parameters and buffers: names, dtypes, shapes and bits."""
    found = hashlib.sha256()
    for name, value in sorted(state_of(model).items()):
        found.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        flat = value.detach().cpu().contiguous().flatten()
        found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()


def about(images: Images) -> dict:
    """What tells these images from others."""
    return {
        "data": images.fingerprint(),
        "classes": images.classes,
        "preprocessing": images.preprocessing(),
    }


def views_of(images: Images) -> list[int | None]:
    """The views that a teacher has to predict: ``[None]`` for images as they are."""
    if images.augment == "none":
        return [None]
    if images.views is None:
        raise TrainError(
            "each epoch augments the images anew, so that the teacher's predictions cannot be made "
            "once: give views N for N views in turn, or arms that ask the teacher at each step"
        )
    return list(range(images.views))


def write(
    path: str | os.PathLike,
    model: nn.Module,
    images: Images,
    *,
    top_k: int | None = None,
    dtype: str = "float16",
    batch_size: int = 256,
    shard_rows: int = 4096,
    memory_format: torch.memory_format = torch.contiguous_format,
    on_step: Callable[[str, int, int], None] = lambda *_: None,
) -> "Predictions":
    """Make the teacher's predictions of all views of all images, or those not in the folder yet.

    Args:
        path: of the folder; absent, empty, or of an earlier call with the same arguments, which is
            continued after its last whole shard.
        model: the teacher, on the device of ``images``; run in eval mode.
        images: a whole set, or its first images.
        top_k: keep the k largest logits of each row, 1..min(classes, 1024); None: all.
        dtype: of the logits, one of ``DTYPES``.
        batch_size: images a forward pass.
        shard_rows: images a file, and what is lost at most where the work is cut off.
        memory_format: of the images and of the model.
        on_step: ``on_step("teacher", rows done, rows in all)``, called after each batch.

    Raises:
        TrainError: the folder holds other predictions, or cannot be written; the images have no
            fixed views, or are not the first of their set; a logit is not finite or too large for
            ``dtype``.
        ValueError: ``top_k``, ``dtype``, ``batch_size`` or ``shard_rows`` is out of range.
    """
    limit = min(images.classes, 1024)
    if top_k is not None and not 1 <= top_k <= limit:
        raise ValueError(f"top_k is {top_k}; it takes from 1 to {limit}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it takes {', '.join(DTYPES)}")
    if batch_size < 1 or shard_rows < 1:
        raise ValueError(f"batch_size {batch_size} and shard_rows {shard_rows} must be at least 1")
    views = views_of(images)
    count = len(images)
    if not torch.equal(images.ids.cpu(), torch.arange(count)):
        raise TrainError(
            "predictions are made of a whole set of images or its first ones: make them before "
            "a part is held out; each part may then use them"
        )
    shards = [
        {"view": view, "first": first, "rows": min(shard_rows, count - first)}
        for view in views
        for first in range(0, count, shard_rows)
    ]
    manifest = {
        "format": _FORMAT,
        "model": model_hash(model),
        "images": count,
        **about(images),
        "dtype": dtype,
        "top_k": top_k,
        "shards": [{"file": f"{n:05}.safetensors"} | shard for n, shard in enumerate(shards)],
    }
    folder = RunFolder(Path(path).expanduser(), {})
    with _alone(folder.path):
        _begin(folder, manifest)
        training = model.training
        try:
            _ask(folder, manifest, model.eval(), images, batch_size, memory_format, on_step)
        finally:
            model.train(training)
    found = Predictions.open(path)
    found.check(images, manifest["model"])
    return found


@contextmanager
def _alone(path: Path) -> Generator[None]:
    """Inside, no other process writes to the folder, where its file system has locks."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        place = os.open(path, os.O_RDONLY)
        try:
            lock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        finally:
            os.close(place)
    except BlockingIOError:
        raise TrainError(f"another process is writing predictions to {path}") from None
    except OSError as error:
        raise TrainError(
            f"predictions cannot be written to {path}: {error.strerror}; the shards that are whole "
            "stay, and the same command continues after them",
            status=1,
        ) from None


def _begin(folder: RunFolder, manifest: dict) -> None:
    if (folder.path / "manifest.json").exists():
        before = _manifest(folder.path)
        differs = differences(before, manifest)
        if differs:
            raise TrainError(
                f"{folder.path} holds other predictions ({differs}): out must name another folder"
            )
    elif any(not p.name.endswith(".tmp") for p in folder.path.iterdir()):
        raise TrainError(
            f"{folder.path} holds something else than predictions: out must name a new folder"
        )
    else:
        folder.write_json("manifest.json", manifest)


def _ask(folder, manifest, model, images, batch_size, memory_format, on_step) -> None:
    done, total = 0, sum(shard["rows"] for shard in manifest["shards"])
    for shard in manifest["shards"]:
        if _read(folder.path, manifest, shard) is not None:
            done += shard["rows"]
            on_step("teacher", done, total)
            continue
        numbers = torch.arange(shard["first"], shard["first"] + shard["rows"])
        parts = []
        for index in numbers.to(images.labels.device).split(batch_size):
            with torch.no_grad():
                logits = model(images.batch(index, memory_format, shard["view"])[0])
            parts.append(_kept(logits.float(), manifest))
            done += len(index)
            on_step("teacher", done, total)
        content = {k: torch.cat([p[k] for p in parts]).contiguous() for k in parts[0]}
        folder.write_bytes(shard["file"], save(content))


def _kept(logits: torch.Tensor, manifest: dict) -> dict[str, torch.Tensor]:
    """What a shard keeps of a batch of logits, on the CPU."""
    if logits.dim() != 2 or logits.shape[1] != manifest["classes"]:
        raise TrainError(
            f"the teacher gives {list(logits.shape[1:])} values per image, not one for each of the "
            f"{manifest['classes']} classes"
        )
    if not logits.isfinite().all():
        raise TrainError("a logit of the teacher is not finite: its weights are of no use")
    found, values = {"logits": logits}, "logits"
    if manifest["top_k"] is not None:
        found, values = kdkernels.topk_teacher(logits, manifest["top_k"])._asdict(), "values"
    found[values] = found[values].to(getattr(torch, manifest["dtype"]))
    if not found[values].isfinite().all():
        raise TrainError(
            f"a logit of the teacher is {logits.abs().max().item():g}, too large for "
            f"{manifest['dtype']}: use dtype bfloat16 or float32"
        )
    return {name: value.cpu() for name, value in found.items()}


def _manifest(path: Path) -> dict:
    try:
        found = json.loads((path / "manifest.json").read_bytes())
    except OSError:
        raise TrainError(
            f"{path} holds no predictions: it has no manifest.json; "
            "`kdkernels predict-teacher --out` makes such a folder"
        ) from None
    except ValueError as error:
        raise TrainError(f"{path / 'manifest.json'} cannot be read: {error}") from None
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        raise TrainError(f"{path / 'manifest.json'} is not of the format {_FORMAT!r}")
    return found


def _read(path: Path, manifest: dict, shard: dict) -> dict[str, torch.Tensor] | None:
    """A shard's tensors, memory-mapped; None where it is not there or not whole."""
    rows, k, dtype = shard["rows"], manifest["top_k"], getattr(torch, manifest["dtype"])
    wanted = {"logits": ([rows, manifest["classes"]], dtype)}
    if k is not None:
        wanted = {
            "values": ([rows, k], dtype),
            "indices": ([rows, k], torch.int32),
            "logsumexp": ([rows], torch.float32),
        }
    try:
        found, _ = read_tensors(path / shard["file"])
    except (SafetensorError, OSError):
        return None
    got = {name: (list(value.shape), value.dtype) for name, value in found.items()}
    return found if got == wanted else None


_DIFFER = {
    "model": "the model's weights differ",
    "data": "the images or labels differ",
    "shards": "the rows of a shard differ",
}
_NAMES = {"images": "the number of images", "classes": "the number of classes"}


def differences(there: dict, here: dict) -> str:
    """What differs between two manifests, in words; empty if nothing does."""
    said = []
    for name, value in here.items():
        pairs = {name: (there[name], value)}
        if name == "preprocessing":
            keys = sorted(there[name].keys() | value.keys())
            pairs = {key: (there[name].get(key), value.get(key)) for key in keys}
        said += [
            _DIFFER.get(key) or f"{_NAMES.get(key, key)} is {one} there and {other} here"
            for key, (one, other) in pairs.items()
            if one != other
        ]
    return "; ".join(said)


class Predictions:
    """A folder of predictions, memory-mapped. Get one with :meth:`open` or from :func:`write`."""

    def __init__(self, path: Path, manifest: dict, shards: list[dict[str, torch.Tensor]]):
        self.path = path
        self.manifest = manifest
        self._ids: torch.Tensor | None = None
        self._views = {}
        for shard, content in zip(manifest["shards"], shards, strict=True):
            self._views.setdefault(shard["view"], []).append(content)
        self._rows = manifest["shards"][0]["rows"]  # of every shard but a view's last

    @classmethod
    def open(cls, path: str | os.PathLike) -> "Predictions":
        """Open a folder; TrainError where its predictions, or a shard, are missing or damaged."""
        path = Path(path).expanduser()
        manifest = _manifest(path)
        shards = []
        for shard in manifest["shards"]:
            content = _read(path, manifest, shard)
            if content is None:
                raise TrainError(
                    f"{path / shard['file']} is missing or damaged: the same predict-teacher "
                    "command makes what is missing"
                )
            shards.append(content)
        return cls(path, manifest, shards)

    def __len__(self) -> int:
        """Number of images."""
        return self.manifest["images"]

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        names = ["manifest.json", *(shard["file"] for shard in self.manifest["shards"])]
        return sum((self.path / name).stat().st_size for name in names)

    def accuracy(self, images: Images) -> float:
        """The share, 0..1, of all views whose largest logit is that of the image's label."""
        right = 0.0
        for view in self._views:
            index = torch.arange(len(images))
            found = self.rows(index, view)
            top = found.argmax(1) if isinstance(found, torch.Tensor) else found.indices[:, 0]
            right += (top == images.labels.cpu()).double().mean().item()
        return right / len(self._views)

    def check(self, images: Images, model_hash: str | None = None) -> None:
        """Raise TrainError unless these are predictions of these images; :meth:`rows` then takes
        theirs.

        ``images`` are all of the set, or a part; ``model_hash`` is of the teacher, None for any.
        """
        views_of(images)
        here = about(images)
        if model_hash is not None:
            here["model"] = model_hash
        differs = differences(self.manifest, here)
        if not differs and len(images) and images.ids.max() >= len(self):
            differs = f"the first {len(self)} images there and others here"
        if differs:
            raise TrainError(
                f"the predictions in {self.path} are not of this run's images and teacher: "
                f"{differs}; make them again with predict-teacher"
            )
        self._ids = images.ids.cpu()

    def rows(self, index: torch.Tensor, view: int | None = None) -> torch.Tensor | kdkernels.TopK:
        """The teacher's predictions of the images ``index`` (``[b]`` int64) in a view of theirs.

        Numbers are of the images that :meth:`check` was given; before it, of the whole set's.
        Returns logits ``[b, classes]`` fp32, or ``TopK`` (values ``[b, k]`` fp32, indices ``[b,
        k]`` int32, logsumexp ``[b]`` fp32 of temperature 1), on the device of ``index``.
        """
        if view not in self._views:
            raise TrainError(f"the predictions in {self.path} have no view {view}")
        ids = index.cpu() if self._ids is None else self._ids[index.cpu()]
        shards = self._views[view]
        number, row = ids // self._rows, ids % self._rows
        found = {k: v.new_empty(len(ids), *v.shape[1:]) for k, v in shards[0].items()}
        for shard in number.unique().tolist():
            here = (number == shard).nonzero()[:, 0]
            for name, whole in shards[shard].items():
                found[name][here] = whole[row[here]]
        found = {k: v.to(index.device) for k, v in found.items()}
        if "logits" in found:
            return found["logits"].float()
        return kdkernels.TopK(found["values"].float(), found["indices"], found["logsumexp"])
