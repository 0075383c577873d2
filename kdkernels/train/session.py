"""What a run does around its training: device, repeatable bits, and an end at a step's end."""

import contextlib
import os
import signal
from collections.abc import Generator
from typing import Any

import torch

import kdkernels
from kdkernels.train import TrainError, distributed, said
from kdkernels.train.run_folder import RunFolder


@contextlib.contextmanager
def reproducible(seed: int, threads: int | None) -> Generator[None]:
    """Inside, torch gives the same bits for the same seed, device and number of threads.

    ``threads``: of the CPU; None leaves torch's own choice.
    """
    deterministic: Any = torch.utils.deterministic  # a module with a property
    before = (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        deterministic.fill_uninitialized_memory,
        torch.backends.cudnn.benchmark,
    )
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if threads:
        torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Filling fresh memory helps to find bugs, not to repeat a run, and would be timed.
    deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False
    torch.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1], warn_only=before[2])
        deterministic.fill_uninitialized_memory = before[3]
        torch.backends.cudnn.benchmark = before[4]


def choose_device(name: str) -> torch.device:
    """The device to train on: ``"auto"`` (CUDA where torch sees it), ``"cpu"`` or ``"cuda"``.

    TrainError: there is no CUDA device that kdkernels can use.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise TrainError("device cuda: torch sees no CUDA device; use device cpu")
    if name == "cuda":
        ranks = distributed.current()
        if ranks.local >= torch.cuda.device_count():
            raise TrainError(
                f"this machine has {torch.cuda.device_count()} GPUs, too few for its ranks: "
                "lower --nproc-per-node, or use device cpu"
            )
        name = f"cuda:{ranks.local}" if ranks.world > 1 else name
        row = torch.zeros(1, 2, device=name)
        try:
            kdkernels.distillation_loss(row, row)
        except (RuntimeError, ValueError, TypeError) as error:
            raise TrainError(f"device cuda: {said(error)}") from None
    return torch.device(name)


class Interrupt:
    """Turns the first Ctrl-C or SIGTERM into a wish to stop after the step in hand.

    A KeyboardInterrupt in the middle of an optimizer step would leave half of the weights new. A
    second signal stops now. ``status`` is the exit status that tells which came: 130 or 143.
    """

    def __init__(self):
        self.wished = False
        self.status = 130

    def _handle(self, number, frame):
        self.wished = True
        self.status = 128 + number
        self._restore()

    def _restore(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def __enter__(self) -> "Interrupt":
        self._before = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        except ValueError:  # not in the main thread: the caller has its own way to stop
            self._before = {}
        return self

    def __exit__(self, *_) -> None:
        self._restore()


@contextlib.contextmanager
def running(settings: Any, folder: RunFolder) -> Generator[tuple[torch.device, Interrupt]]:
    """Inside, a run is reproducible and stops at a step's end; gives its device.

    ``settings`` have ``device``, ``seed`` and ``threads``; ``folder`` is closed at the end.
    """
    device = choose_device(settings.device)
    try:
        with reproducible(settings.seed, settings.threads), Interrupt() as interrupt:
            yield device, interrupt
    finally:
        folder.close()
