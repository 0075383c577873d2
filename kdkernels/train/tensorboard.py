"""TensorBoard's event files beside metrics.jsonl, where the package tensorboard is installed.

    tensorboard/<learner>/events.out.tfevents.*

A learner is a run of TensorBoard's, so that the arms' curves lie over each other: ``loss`` by step;
``epoch/<measure>`` and ``seconds/<phase>`` by epoch. They hold nothing that metrics.jsonl does
not, and a learner that continues from a checkpoint writes its file anew from there.
"""

import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

_NOT_MEASURES = ("kind", "learner", "epoch", "step", "phases")


class Events:
    """Writes a run's lines as scalars; without tensorboard, or on a disk that refuses, nothing.

    ``metrics`` gives all lines of the run's metrics.jsonl.
    """

    def __init__(self, path: Path, metrics: Callable[[], Iterable[dict]]):
        self._path, self._metrics = path / "tensorboard", metrics
        self._writers, self._steps = {}, {}
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:  # it is not installed, or too old
            SummaryWriter = None
        self._make: Any = SummaryWriter

    def add(self, record: dict) -> None:
        """Write a line of metrics.jsonl, which holds it already."""
        learner, step = record.get("learner"), record.get("step")
        if self._make is None or learner is None or step is None:
            return
        try:
            last = self._steps.get(learner)
            if last is None or step < last or (step == last and record["kind"] == "step"):
                # New to this process, or gone back to a checkpoint.
                self._begin(learner, self._metrics() if step > 1 else [record])
            else:
                self._write(record)
            self._steps[learner] = step
        except OSError:  # the run continues without its curves
            self._make = None

    def _begin(self, learner: str, lines: Iterable[dict]) -> None:
        folder = self._path / learner
        if learner in self._writers:
            self._writers.pop(learner).close()
        for file in folder.glob("events.out.tfevents.*"):
            file.unlink()
        # A TensorBoard that watches drops what it read from the files before.
        self._writers[learner] = self._make(str(folder), purge_step=0, flush_secs=5)
        for line in lines:
            if line.get("learner") == learner:
                self._write(line)

    def _write(self, record: dict) -> None:
        writer = self._writers[record["learner"]]
        if record["kind"] == "step":
            writer.add_scalar("loss", float(record["loss"]), record["step"])
            return
        values = {f"epoch/{k}": v for k, v in record.items() if k not in _NOT_MEASURES}
        values |= {f"seconds/{k}": v for k, v in record.get("phases", {}).items()}
        for name, value in values.items():
            if isinstance(value, int | float):
                writer.add_scalar(name, value, record["epoch"])

    def close(self) -> None:
        """Write what is still in memory."""
        with contextlib.suppress(OSError):
            for writer in self._writers.values():
                writer.close()
        self._writers, self._steps = {}, {}
