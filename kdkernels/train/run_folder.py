"""Everything a run leaves on disk.

    config.json           what was asked for
    metrics.jsonl         one JSON object a line, flushed as it is written
    checkpoints/*.safetensors
    *.json, plots/*.png, report.html
    tensorboard/          where TensorBoard is installed, see kdkernels.train.tensorboard

A file is either wholly there or not there at all, also after ``kill -9`` or a power cut: it is
written beside its place, synced, and moved over it. Only metrics.jsonl grows line by line; its
last line may be torn, and a reader drops it.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from kdkernels.train import TrainError
from kdkernels.train.tensorboard import Events

__all__ = ["RunFolder"]


class RunFolder:
    """A run's folder. Make one with :meth:`create` or :meth:`open`.

    Attributes:
        path: the folder.
        config: the dictionary in config.json.
    """

    _events = None

    def __init__(self, path: Path, config: dict):
        self.path = path
        self.config = config
        self._metrics = None

    @classmethod
    def create(cls, out: str | None, config: dict) -> "RunFolder":
        """Make the folder and its config.json.

        Args:
            out: where; ``runs/<local time>`` by default. It must be absent or empty.
            config: what was asked for, as JSON.

        Raises:
            TrainError: the folder holds something already, or cannot be made.
        """
        path = Path(out or time.strftime("runs/%Y%m%d-%H%M%S"))
        try:
            (path / "checkpoints").mkdir(parents=True)
            if len(list(path.iterdir())) > 1:
                raise FileExistsError
        except FileExistsError:
            raise TrainError(
                f"the folder {path} is in use: name a new one with --out, or continue that run "
                f"with --resume {path}"
            ) from None
        except OSError as error:
            raise TrainError(f"cannot make the folder {path}: {error.strerror}") from None
        folder = cls(path, config)
        folder.write_json("config.json", config)
        return folder

    @classmethod
    def open(cls, path: str) -> "RunFolder":
        """Open the folder of an earlier run.

        Raises:
            TrainError: it has no readable config.json.
        """
        try:
            config = json.loads((Path(path) / "config.json").read_text())
        except (OSError, ValueError):
            raise TrainError(f"{path} is not the folder of a run: it has no config.json") from None
        return cls(Path(path), config)

    def discard(self) -> None:
        """Take the folder away again if it holds no more than :meth:`create` put there."""
        try:
            (self.path / "checkpoints").rmdir()
            if [file.name for file in self.path.iterdir()] == ["config.json"]:
                (self.path / "config.json").unlink()
                self.path.rmdir()
        except OSError:
            pass  # it holds more: that stays

    def write_bytes(self, name: str, content: bytes) -> Path:
        """Write one file of the folder whole or not at all; returns its path."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(target.name + ".tmp")
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
        # The rename itself lives in the folder's own entry, which needs its own sync.
        entry = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(entry)
        finally:
            os.close(entry)
        return target

    def write_json(self, name: str, content: dict) -> Path:
        """Write one JSON file of the folder; returns its path."""
        return self.write_bytes(name, (json.dumps(content, indent=1) + "\n").encode())

    def read_json(self, name: str) -> dict | None:
        """Read one JSON file of the folder; None where there is none."""
        path = self.path / name
        return json.loads(path.read_text()) if path.exists() else None

    def save(self, name: str, tensors: dict[str, torch.Tensor], state: dict) -> Path:
        """Write checkpoints/<name>.safetensors.

        Args:
            name: of the checkpoint, without suffix.
            tensors: any shapes, dtypes and devices.
            state: small things beside them, as JSON; kept in the file's metadata.

        Returns:
            The file's path.
        """
        # safetensors stores row-major bytes only, so channels_last tensors are copied here.
        packed = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        content = save(packed, metadata={"state": json.dumps(state)})
        return self.write_bytes(f"checkpoints/{name}.safetensors", content)

    def load(self, name: str) -> tuple[dict[str, torch.Tensor], dict] | None:
        """Read checkpoints/<name>.safetensors as (tensors on the CPU, state); None if absent.

        Raises:
            TrainError: the file is there but cannot be read.
        """
        path = self.path / "checkpoints" / f"{name}.safetensors"
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                return tensors, json.loads(file.metadata()["state"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise TrainError(f"the checkpoint {path} cannot be read: {error}") from None

    def remove(self, name: str) -> None:
        """Take checkpoints/<name>.safetensors away, if it is there."""
        (self.path / "checkpoints" / f"{name}.safetensors").unlink(missing_ok=True)

    def log(self, sync: bool = False, **record) -> None:
        """Append one line to metrics.jsonl.

        Args:
            sync: wait until the line is on the disk, for records that end an epoch.
            record: the line's fields, as JSON.
        """
        if self._metrics is None:
            self._metrics = (self.path / "metrics.jsonl").open("a")
        self._metrics.write(json.dumps(record) + "\n")
        self._metrics.flush()
        if sync:
            os.fsync(self._metrics.fileno())
        self._events = self._events or Events(self.path, self.metrics)
        self._events.add(record)

    def metrics(self) -> Iterator[dict]:
        """The lines of metrics.jsonl; a torn last line is dropped."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return
        with path.open() as file:
            for line in file:
                try:
                    yield json.loads(line)
                except ValueError:
                    return

    def trim(self, keep: Callable[[dict], bool]) -> None:
        """Drop the lines of metrics.jsonl for which ``keep(line)`` is false."""
        self.close()
        lines = [json.dumps(record) + "\n" for record in self.metrics() if keep(record)]
        self.write_bytes("metrics.jsonl", "".join(lines).encode())

    def close(self) -> None:
        """Close metrics.jsonl and TensorBoard's files; :meth:`log` opens them again."""
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        if self._events is not None:
            self._events.close()
