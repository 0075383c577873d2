"""Everything a run leaves on disk.

    config.json           what was asked for
    metrics.jsonl         one JSON object a line, flushed as it is written
    checkpoints/*.safetensors
    *.json, plots/*.png, report.html
    tensorboard/          where TensorBoard is installed, see kdkernels.train.tensorboard

A file is either wholly there or not there at all, also after ``kill -9`` or a power cut: it is
written beside its place, synced, and moved over it. Only metrics.jsonl grows line by line; its
last line may be torn, and a reader drops it. One process at a time trains in a folder: it holds
a lock on the file ``lock``, which the kernel takes back when the process ends, however it ends. Of
several ranks rank 0 alone writes.
"""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from kdkernels.train import TrainError, distributed
from kdkernels.train.tensorboard import Events

__all__ = ["RunFolder", "write_bytes"]


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, through a power cut too; folders above it are made.

    Raises:
        TrainError: the disk is full, the folder is read-only, or whatever else the system says;
            what was there before is there still, and nothing else.
    """
    beside = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        # The rename itself lives in the folder's own entry, which needs its own sync.
        entry = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(entry)
        finally:
            os.close(entry)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise _unwritten(path, error) from None


def weights(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The model's state_dict in a checkpoint's tensors, which has the optimizer's beside it."""
    return {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}


def _unwritten(path: Path, error: OSError) -> TrainError:
    return TrainError(
        f"cannot write {path}: {error.strerror}; what was saved before is whole: make room there, "
        "or whatever it lacks, and continue with --resume",
        status=1,
    )


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
        self._metrics = self._lock = None

    @classmethod
    def create(cls, out: str | None, config: dict) -> "RunFolder":
        """Make the folder and its config.json.

        Args:
            out: where; ``runs/<local time>`` by default. It must be absent or empty.
            config: what was asked for, as JSON.

        Raises:
            TrainError: the folder holds something already, or cannot be made.
        """
        return distributed.current().first(lambda: cls._create(out, config))

    @classmethod
    def _create(cls, out: str | None, config: dict) -> "RunFolder":
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
        folder.hold()
        folder.write_json("config.json", config)
        return folder

    def __getstate__(self) -> dict:  # what rank 0 tells the others: they hold no files
        return {"path": self.path, "config": self.config, "_metrics": None, "_lock": None}

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

    def hold(self) -> None:
        """Take the folder's lock, if this process has it not yet; :meth:`close` gives it back.

        Whatever writes metrics or checkpoints takes it; one may read without.

        Raises:
            TrainError: another process has it, or the folder cannot be written to.
        """
        if self._lock is not None:
            return
        path = self.path / "lock"
        try:
            lock = path.open("ab")
        except OSError as error:
            raise _unwritten(path, error) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise TrainError(
                f"another process is training in {self.path}: wait for it or stop it, or begin a "
                "run of its own with --out"
            ) from None
        except OSError:
            pass  # a file system without locks
        self._lock = lock

    def discard(self) -> None:
        """Take the folder away again if it holds no more than :meth:`create` put there."""
        try:
            if distributed.current().rank == 0:
                (self.path / "checkpoints").rmdir()
                if {file.name for file in self.path.iterdir()} <= {"config.json", "lock"}:
                    for name in ("config.json", "lock"):
                        (self.path / name).unlink(missing_ok=True)
                    self.path.rmdir()
        except OSError:
            pass  # it holds more: that stays

    def write_bytes(self, name: str, content: bytes) -> Path:
        """Write one file of the folder whole or not at all; returns its path.

        Raises:
            TrainError: see :func:`write_bytes`.
        """
        target = self.path / name
        if distributed.current().rank == 0:
            write_bytes(target, content)
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

        Raises:
            TrainError: see :func:`write_bytes`.
        """
        if distributed.current().rank != 0:
            return self.path / "checkpoints" / f"{name}.safetensors"
        self.hold()
        self._sync()  # no checkpoint is on the disk before the steps it counts
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
            raise TrainError(
                f"the checkpoint {path} cannot be read: {error}; without the file this part of "
                "the run begins anew"
            ) from None

    def remove(self, name: str) -> None:
        """Take checkpoints/<name>.safetensors away, if it is there."""
        if distributed.current().rank == 0:
            self.hold()
            (self.path / "checkpoints" / f"{name}.safetensors").unlink(missing_ok=True)

    def log(self, sync: bool = False, **record) -> None:
        """Append one line to metrics.jsonl.

        Args:
            sync: wait until the line is on the disk, for records that end an epoch.
            record: the line's fields, as JSON.

        Raises:
            TrainError: see :func:`write_bytes`.
        """
        if distributed.current().rank != 0:
            return
        self.hold()
        path = self.path / "metrics.jsonl"
        before = None
        try:
            if self._metrics is None:
                self._metrics = path.open("ab", buffering=0)
            before = os.fstat(self._metrics.fileno()).st_size
            line = (json.dumps(record) + "\n").encode()
            while line:
                line = line[self._metrics.write(line) :]
        except OSError as error:
            if before is not None:  # part of a line is none
                with contextlib.suppress(OSError):
                    os.truncate(path, before)
            raise _unwritten(path, error) from None
        if sync:
            self._sync()
        self._events = self._events or Events(self.path, self.metrics)
        self._events.add(record)

    def _sync(self) -> None:
        """Wait until metrics.jsonl, if it is open, is on the disk."""
        if self._metrics is None:
            return
        try:
            os.fsync(self._metrics.fileno())
        except OSError as error:
            raise _unwritten(self.path / "metrics.jsonl", error) from None

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
        if distributed.current().rank != 0:
            return
        self.hold()
        lines = [json.dumps(record) + "\n" for record in self.metrics() if keep(record)]
        self._close_metrics()
        self.write_bytes("metrics.jsonl", "".join(lines).encode())

    def close(self) -> None:
        """Close metrics.jsonl and TensorBoard's files, which :meth:`log` opens again, and give the
        lock back.
        """
        self._close_metrics()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _close_metrics(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        if self._events is not None:
            self._events.close()
