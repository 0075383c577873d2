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
import io
import json
import os
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from kdkernels.train import TrainError, distributed, said
from kdkernels.train.tensorboard import Events


def cache_folder() -> Path:
    """Where files lie that can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "kdkernels"


# ---- files ---------------------------------------------------------------------------------------


def replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, through a power cut too; folders above it are made."""
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
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _writing(path: Path) -> Generator[None]:
    """Says in one sentence why the system refuses to write a run's file."""
    try:
        yield
    except OSError as error:
        raise TrainError(
            f"cannot write {path}: {error.strerror}; what was saved before is whole: make room "
            "there, or whatever it lacks, and resume the run",
            status=1,
        ) from None


def write_bytes(path: Path, content: bytes) -> None:
    """:func:`replace` a file of a run; TrainError where the system refuses."""
    with _writing(path):
        replace(path, content)


def lock(file: IO | int, kind: int) -> bool:
    """Lock an open file; False where the file system has no locks: then go on without one.

    BlockingIOError: another process has the lock, and ``kind`` has ``fcntl.LOCK_NB``.
    """
    try:
        fcntl.flock(file, kind)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """A safetensors file's tensors, memory-mapped, and its metadata; raises what it may."""
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118


# ---- a model's state as tensors ------------------------------------------------------------------

_PACKED = "_packed"
"""Ends the name of a state that is no tensor, but the bytes that torch.save makes of it."""


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """A model's state_dict as tensors only: any other state is packed into bytes.

    Raises:
        TrainError: a module's extra state is more than tensors, numbers, texts and lists of them.
    """
    found = {}
    for name, value in model.state_dict().items():
        if isinstance(value, torch.Tensor):
            found[name] = value
            continue
        packed = io.BytesIO()
        try:
            torch.save(value, packed)
            found[name + _PACKED] = torch.frombuffer(packed.getbuffer(), dtype=torch.uint8)
            _unpacked(found[name + _PACKED])
        except Exception:  # pickle raises whatever the object does
            raise TrainError(
                f"the model's {name} is a {type(value).__name__} that a checkpoint cannot hold: "
                "get_extra_state must give tensors, numbers, texts, or lists and dicts of them"
            ) from None
    return found


def _unpacked(value: torch.Tensor) -> Any:
    return torch.load(io.BytesIO(value.numpy().tobytes()), weights_only=True)


def unpacked(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The state_dict in what :func:`state_of` gave."""
    return {
        name.removesuffix(_PACKED): _unpacked(value) if name.endswith(_PACKED) else value
        for name, value in tensors.items()
    }


def load_state(model: nn.Module, tensors: dict[str, torch.Tensor], path: object) -> None:
    """Load the model's part of a checkpoint; TrainError where it is of another model."""
    own = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    try:
        model.load_state_dict(unpacked(own))
    except RuntimeError as error:
        reason = " ".join(str(error).splitlines()[1:2]).strip()
        raise TrainError(
            f"the checkpoint {path} is of another model: {reason}; continue with the settings that "
            "it was made with, or begin a new run in another out"
        ) from None


# ---- the folder ----------------------------------------------------------------------------------


def _first_rank() -> bool:
    return distributed.current().rank == 0


class RunFolder:
    """A run's folder. Make one with :meth:`create` or :meth:`open`.

    Attributes:
        path: the folder.
        config: the dictionary in config.json.
    """

    _metrics = _lock = _events = None

    def __init__(self, path: Path, config: dict):
        self.path, self.config = path, config

    @classmethod
    def create(cls, out: str | None, config: dict) -> "RunFolder":
        """Make the folder (``runs/<local time>`` by default) and its config.json.

        Raises:
            TrainError: the folder holds something already, or cannot be made.
        """
        return distributed.current().first(lambda: cls._create(out, config))

    @classmethod
    def _create(cls, out: str | None, config: dict) -> "RunFolder":
        usual = time.strftime("runs/%Y%m%d-%H%M%S")
        path = Path(usual if out is None else out).expanduser()
        number = 1
        while out is None and path.exists():  # several runs may begin in one second
            number += 1
            path = Path(f"{usual}-{number}")
        try:
            (path / "checkpoints").mkdir(parents=True)
            if len(list(path.iterdir())) > 1:
                raise FileExistsError
        except FileExistsError:
            if out is None:  # another process was faster
                return cls._create(out, config)
            raise TrainError(
                f"the folder {path} is in use: out must name a new one, or resume that run"
            ) from None
        except OSError as error:
            raise TrainError(f"cannot make the folder {path}: {error.strerror}") from None
        folder = cls(path, config)
        folder.hold()
        folder.write_json("config.json", config)
        return folder

    def __getstate__(self) -> dict:  # what rank 0 sends to the others, who hold no files
        return {"path": self.path, "config": self.config}

    @classmethod
    def open(cls, path: str) -> "RunFolder":
        """Open the folder of an earlier run; TrainError where it has no readable config.json."""
        folder = cls(Path(path).expanduser(), {})
        if not (folder.path / "config.json").exists():
            raise TrainError(f"{path} is not the folder of a run: it has no config.json")
        config = folder.read_json("config.json")
        if not isinstance(config, dict):
            raise TrainError(f"{folder.path / 'config.json'} must hold a JSON object")
        folder.config = config
        return folder

    def begin(self) -> None:
        """Write config.json, if this process changed it: what was asked for can be done."""
        if self.read_json("config.json") != self.config:
            self.write_json("config.json", self.config)

    def hold(self) -> None:
        """Take the folder's lock, if this process has it not yet; :meth:`close` gives it back.

        Whatever writes metrics or checkpoints takes it; one may read without. TrainError: another
        process has it, or the folder cannot be written to.
        """
        if self._lock is not None:
            return
        path = self.path / "lock"
        with _writing(path):
            file = path.open("ab")
        try:
            lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise TrainError(
                f"another process is training in {self.path}: wait for it or stop it, or begin a "
                "run in another out"
            ) from None
        self._lock = file

    def discard(self) -> None:
        """Take the folder away again if it holds no more than :meth:`create` put there."""
        if not _first_rank():
            return
        with contextlib.suppress(OSError):  # it holds more: that stays
            (self.path / "checkpoints").rmdir()
            if {file.name for file in self.path.iterdir()} <= {"config.json", "lock"}:
                for name in ("config.json", "lock"):
                    (self.path / name).unlink(missing_ok=True)
                self.path.rmdir()

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write one file of the folder as :func:`write_bytes` does."""
        if _first_rank():
            write_bytes(self.path / name, content)

    def write_json(self, name: str, content: dict) -> None:
        """Write one JSON file of the folder."""
        self.write_bytes(name, (json.dumps(content, indent=1) + "\n").encode())

    def read_json(self, name: str) -> dict | None:
        """Read one JSON file of the folder; None where there is none."""
        path = self.path / name
        try:
            return json.loads(path.read_bytes()) if path.exists() else None
        except (OSError, ValueError) as error:
            raise TrainError(f"{path} cannot be read: {error}") from None

    def checkpoint(self, name: str) -> Path:
        """Where :meth:`save` puts it."""
        return self.path / "checkpoints" / f"{name}.safetensors"

    def save(self, name: str, tensors: dict[str, torch.Tensor], state: dict) -> None:
        """Write checkpoints/<name>.safetensors, with ``state``, small things, as JSON in it."""
        if not _first_rank():
            return
        self.hold()
        self._sync()  # no checkpoint is on the disk before the steps it counts
        # safetensors stores row-major bytes only, and no memory twice: channels_last tensors and
        # tied ones are copied here.
        packed, memory = {}, set()
        for key, value in tensors.items():
            value = value.detach().cpu().contiguous()
            place = value.untyped_storage().data_ptr()
            packed[key] = value.clone() if place in memory else value
            memory.add(place)
        try:
            content = save(packed, metadata={"state": json.dumps(state)})
        except (RuntimeError, ValueError, KeyError, SafetensorError) as error:
            raise TrainError(f"the checkpoint {name} cannot be written: {said(error)}") from None
        write_bytes(self.checkpoint(name), content)

    def load(self, name: str) -> tuple[dict[str, torch.Tensor], dict] | None:
        """Read checkpoints/<name>.safetensors as (tensors on the CPU, state); None if absent."""
        path = self.checkpoint(name)
        if not path.exists():
            return None
        try:
            tensors, metadata = read_tensors(path)
            return tensors, json.loads(metadata["state"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise TrainError(
                f"the checkpoint {path} cannot be read: {error}; without the file this part of "
                "the run begins anew"
            ) from None

    def remove(self, name: str) -> None:
        """Take checkpoints/<name>.safetensors away, if it is there."""
        if _first_rank():
            self.hold()
            self.checkpoint(name).unlink(missing_ok=True)

    def log(self, sync: bool = False, **record) -> None:
        """Append one line to metrics.jsonl; ``sync``: wait until it is on the disk."""
        if not _first_rank():
            return
        self.hold()
        path = self.path / "metrics.jsonl"
        with _writing(path):
            if self._metrics is None:
                self._metrics = path.open("ab", buffering=0)
            before = os.fstat(self._metrics.fileno()).st_size
            line = (json.dumps(record) + "\n").encode()
            try:
                while line:
                    line = line[self._metrics.write(line) :]
            except OSError:  # part of a line is none
                with contextlib.suppress(OSError):
                    os.truncate(path, before)
                raise
        if sync:
            self._sync()
        self._events = self._events or Events(self.path, self.metrics)
        self._events.add(record)

    def _sync(self) -> None:
        """Wait until metrics.jsonl, if it is open, is on the disk."""
        if self._metrics is not None:
            with _writing(self.path / "metrics.jsonl"):
                os.fsync(self._metrics.fileno())

    def metrics(self) -> Iterator[dict]:
        """The lines of metrics.jsonl; a torn last line is dropped."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return
        with path.open("rb") as file, contextlib.suppress(ValueError):
            for line in file:
                yield json.loads(line)

    def trim(self, keep: Callable[[dict], bool]) -> None:
        """Drop the lines of metrics.jsonl for which ``keep(line)`` is false."""
        if not _first_rank():
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
