"""What a step of experiment 4 costs: memory, operations, passes over the logits."""

import contextlib
import ctypes

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdkernels.experiments.settings import LanguageModel
from kdkernels.train import loop
from kdkernels.train.distillation import plain_loss

# ---- memory --------------------------------------------------------------------------------------


def _resident(field: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) << 10


class Peak:
    """The most memory that steps take beyond what was there before: bytes, or None if unknown.

    On a CPU the peak of the process's resident set (VmHWM, which writing 5 to
    /proc/self/clear_refs resets) less the resident set at the start; on CUDA the peak of what is
    allocated less what was. Adam's moments, which the first step of all makes, are not counted.
    """

    def __init__(self, learner: loop.Learner):
        self._cuda = learner.device if learner.device.type == "cuda" else None
        self.bytes = None
        self._before = None
        moments = 0
        if not learner.optimizer.state:
            moments = 2 * sum(p.nbytes for p in learner.parameters)
        if self._cuda is not None:
            torch.cuda.reset_peak_memory_stats(self._cuda)
            self._before = torch.cuda.memory_allocated(self._cuda) + moments
            return
        # What the C library has kept of earlier arms' memory would hide what this one takes.
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)
        with contextlib.suppress(OSError, StopIteration):
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
            self._before = _resident("VmRSS:") + moments

    def read(self) -> None:
        """Called after a step."""
        if self._before is not None:
            cuda = self._cuda is not None
            peak = torch.cuda.max_memory_allocated(self._cuda) if cuda else _resident("VmHWM:")
            self.bytes = peak - self._before


# ---- how much work a step is ---------------------------------------------------------------------


def operations(settings: LanguageModel, vocabulary: int) -> dict[str, float]:
    """Floating-point operations of the matrix products of one step, by part.

    A product of ``[n, k]`` and ``[k, m]`` is 2 n k m; backward is twice the forward pass; of
    attention's products half is counted, which is all that a causal kernel needs.
    """
    rows = settings.batch_size * settings.context

    def body(width, layers):
        return layers * rows * (2 * 12 * width**2 + 2 * settings.context * width)

    return {
        "student body": 3 * body(settings.student_width, settings.student_layers),
        "student head": 3 * 2.0 * rows * vocabulary * settings.student_width,
        "teacher body": body(settings.teacher_width, settings.teacher_layers),
        "teacher head": 2.0 * rows * vocabulary * settings.teacher_width,
    }


class Passes(TorchDispatchMode):
    """Counts the tensors of at least ``elements`` that ops read and write."""

    def __init__(self, elements: int):
        super().__init__()
        self.elements, self.count = elements, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [x for x in tree_leaves((args, found)) if isinstance(x, torch.Tensor)]
            self.count += sum(x.numel() >= self.elements for x in tensors)
        return found


def traffic(settings: LanguageModel, vocabulary: int) -> int:
    """How often the reference's loss and its gradient read or write a tensor of ``[N, V]``.

    Counted on a few rows, op by op: each op reads and writes each of its tensors once.
    """
    rows, generator = 4, torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, rows, vocabulary, generator=generator)
    student.requires_grad_()
    with Passes(rows * vocabulary) as passes:
        loss = plain_loss(
            student,
            teacher,
            torch.zeros(rows, dtype=torch.int64),
            temperature=settings.temperature,
            alpha=settings.alpha,
        )
        torch.autograd.grad(loss, student)
    return passes.count
