"""One training loop for the teacher, the arms of experiment 2 and the runs of experiment 3."""

import dataclasses
import math
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from kdkernels import info
from kdkernels.train import TrainError, distributed
from kdkernels.train.images import Images, OnStep
from kdkernels.train.noise import Noise
from kdkernels.train.run_folder import RunFolder, load_state, state_of
from kdkernels.train.session import Interrupt

PHASES = ("data", "teacher", "student forward", "loss", "backward", "optimizer")
"""The phases of a training step, in order; "student" is the model that learns."""

Predict = Callable[[torch.Tensor, torch.Tensor, int | None], Any]
Loss = Callable[[torch.Tensor, Any, torch.Tensor], torch.Tensor]


class Samples(Protocol):
    """What a learner learns from, such as :class:`kdkernels.train.images.Images`."""

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def view_of(self, epoch: int) -> int | None:
        """Which view of the samples this epoch sees, None where they have but one."""
        ...

    def batch(
        self, index: torch.Tensor, memory_format: torch.memory_format, view: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs ``[b, ...]`` and labels ``[b, ...]`` of the samples ``index`` (``[b]`` int64)."""
        ...


_STATE = ("epoch", "step", "within", "seconds", "losses", "order", "measures")
"""What a checkpoint holds of a learner beside tensors."""


def epoch_batches(count: int, size: int, seed: int, epoch: int, device) -> list[torch.Tensor]:
    """The epoch's batches: a function of seed and epoch alone, so the same for every learner.

    Numbers of ``count`` samples, ``size`` a batch: int64 vectors on ``device``.
    """
    # An odd multiplier keeps (seed, epoch) pairs apart; Generator takes any 64-bit number.
    order = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + epoch) & (2**63 - 1))
    batches = list(torch.randperm(count, generator=order).to(device).split(size))
    # BatchNorm has no variance of one image.
    return batches[:-1] if len(batches) > 1 and len(batches[-1]) == 1 else batches


class _Clock:
    """Seconds by phase; waits for the device so that a phase is charged for its own work."""

    def __init__(self, device: torch.device, seconds: dict[str, float]):
        self.seconds = seconds
        self._wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)

    def start(self) -> None:
        self._wait()
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        self._wait()
        now = time.perf_counter()
        self.seconds[phase] += now - self._last
        self._last = now


def predictions(
    model: nn.Module, images: Images, batch: int, memory_format=torch.contiguous_format
) -> torch.Tensor:
    """Logits of every image, ``[n, classes]`` fp32, from ``model`` in eval mode without gradient.

    The model stays in eval mode, and must be in ``memory_format``. Of several ranks each runs its
    share of the images; all must call this, and get all rows.
    """
    model.eval()
    ranks = distributed.current()
    if len(images) < ranks.world:
        ranks = distributed.Ranks()
    rows = torch.arange(len(images), device=images.labels.device)[ranks.share(len(images))]
    with torch.no_grad():
        own = [model(images.batch(index, memory_format)[0]) for index in rows.split(batch)]
        return ranks.gather(torch.cat(own), len(images))


def accuracy(
    model: nn.Module, images: Images, memory_format=torch.contiguous_format
) -> dict[str, float]:
    """``{"accuracy": share of images whose largest logit is their label's, 0..1}``."""
    logits = predictions(model, images, 256, memory_format)
    return {"accuracy": (logits.argmax(1) == images.labels).double().mean().item()}


@dataclasses.dataclass
class Learner:
    """A model on its way through training, which can be stopped and continued at any step.

    Attributes:
        name: in metrics and checkpoints.
        model: in train mode while it learns; on the data's device. On several ranks it stays whole
            on each, with the weights of the last checkpoint or epoch's end.
        loss: ``loss(outputs, taught, labels)`` -> scalar, a mean over samples; outputs are the
            model's, taught is what ``predict`` gave.
        predict: ``predict(inputs, index [b], view)`` -> the teacher's output for these samples,
            such as logits ``[b, classes]``; None without a teacher.
        evaluate: ``evaluate(model)`` -> the measures of an epoch's end, by name, such as
            ``{"accuracy": 0.9}``, for the metrics.
        lr: Adam's learning rate.
        seed: of the dropout masks, which are a function of it, the step and, unless ``exact``, the
            rank. Learners with one seed draw the same masks.
        tuned: channels_last memory format and Adam's fused kernel.
        noise: in training; the teacher sees none of it.
        twin: the same loss by other means, of the same logits at each step, off the clock; its
            value stands beside the loss in the metrics.
        schedule: ``schedule(step)`` -> what the learning rate of a step, from 0, is multiplied
            by; None: 1.
        weight_decay: decoupled from the gradient (AdamW, Loshchilov and Hutter, arXiv 1711.05101).
        checkpoint_every: steps between checkpoints within an epoch; None: at its end only.
        parallel, skips, exact: as :func:`kdkernels.train.distributed.engine` has them.
        epoch, step, within: whole epochs done, steps done, steps of the unfinished epoch done.
        seconds, losses: by phase, and of each step, in the unfinished epoch.
        order: tells the unfinished epoch's batches from others.
        measures: what ``evaluate`` found last; empty before the first epoch's end.
    """

    name: str
    model: nn.Module
    loss: Loss
    predict: Predict | None
    evaluate: Callable[[nn.Module], dict[str, float]]
    lr: float
    seed: int
    tuned: bool = False
    noise: Noise = Noise()
    twin: Loss | None = None
    schedule: Callable[[int], float] | None = None
    weight_decay: float = 0.0
    checkpoint_every: int | None = None
    parallel: str = "ddp"
    skips: bool = False
    exact: bool = False
    epoch: int = 0
    step: int = 0
    within: int = 0
    seconds: dict[str, float] = dataclasses.field(
        default_factory=lambda: dict.fromkeys(PHASES, 0.0)
    )
    losses: list[float] = dataclasses.field(default_factory=list)
    order: int = 0
    measures: dict[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        self.memory_format = torch.channels_last if self.tuned else torch.contiguous_format
        self.model = self.model.to(memory_format=self.memory_format)
        self.device = next(self.model.parameters()).device
        self.ranks = distributed.current()
        if self.ranks.world > 1 and self.parallel == "fsdp2" and self.noise.place == "regularizer":
            raise TrainError(
                "the noise regularizer differentiates gradients, which FSDP2 does not: use "
                "parallel ddp"
            )
        self.engine = distributed.engine(
            self.model, self.parallel, self.device, self.skips, self.exact
        )
        self.parameters = list(self.engine.parameters())
        # None, not False: the other arms run what plain torch.optim.Adam(lr=lr) would choose.
        options = {"lr": self.lr, "fused": self.tuned or None}
        if self.weight_decay > 0:
            options["weight_decay"] = self.weight_decay
            self.optimizer = torch.optim.AdamW(self.parameters, **options)
        else:
            self.optimizer = torch.optim.Adam(self.parameters, **options)
        self.gradient_noise = self.noise.on_optimizer(self.optimizer)

    def save(self, folder: RunFolder, optimizer: bool = True) -> None:
        """Write everything that :meth:`load` needs; ``optimizer=False`` for a finished model.

        All ranks must call this together.
        """
        self._gather()
        tensors = {f"model.{k}": v for k, v in state_of(self.model).items()}
        if optimizer:
            for number, parameter in enumerate(self.parameters):
                for key, value in self.optimizer.state[parameter].items():
                    tensors[f"optimizer.{number}.{key}"] = distributed.whole(value)
        folder.save(self.name, tensors, {name: getattr(self, name) for name in _STATE})

    def _gather(self) -> None:
        """Bring the model up to date on every rank, where the engine has weights of its own."""
        if self.engine is self.model:
            return
        if self.parallel == "fsdp2":
            own = self.engine.state_dict()
            self.model.load_state_dict({k: distributed.whole(v) for k, v in own.items()})
        if not self.exact:  # BatchNorm's averages are each rank's own
            distributed.share(self.model)

    def load(self, folder: RunFolder) -> bool:
        """Continue from the checkpoint, if there is one, and drop the metrics written after it.

        It may be of any number of ranks. False where there is none; TrainError where it cannot be
        read, or is of another model.
        """
        found = folder.load(self.name)
        if found is not None:
            tensors, state = found
            load_state(self.model, tensors, folder.checkpoint(self.name))
            for name, value in state.items():
                setattr(self, name, value)
            if self.parallel == "fsdp2" and self.engine is not self.model:
                own = self.engine.state_dict()
                self.engine.load_state_dict(
                    {k: distributed.like(v, own[k]) for k, v in self.model.state_dict().items()}
                )
            self._load_optimizer(tensors)

        def before(line):
            unit = "step" if line["kind"] == "step" else "epoch"
            return line.get("learner") != self.name or line[unit] <= getattr(self, unit)

        folder.trim(before)
        self.ranks.sum([0.0])  # the metrics are not read before they are trimmed
        return found is not None

    def _load_optimizer(self, tensors: dict[str, torch.Tensor]) -> None:
        for number, parameter in enumerate(self.parameters):
            for key in ("step", "exp_avg", "exp_avg_sq"):
                value = tensors.get(f"optimizer.{number}.{key}")
                if value is None:
                    continue
                # Adam's moments must lie in memory as the parameter does: the fused kernel
                # walks all of them by address. Its step counter stays where Adam keeps it.
                if key != "step":
                    value = distributed.like(value, parameter)
                elif self.tuned:
                    value = value.to(self.device)
                self.optimizer.state[parameter][key] = value
        if self.gradient_noise is not None:
            self.gradient_noise.load_state_dict({"seed": self.noise.seed, "step": self.step})

    def epochs(
        self,
        count: int,
        train: Samples,
        size: int,
        seed: int,
        folder: RunFolder,
        interrupt: Interrupt,
        on_step: OnStep,
    ) -> Iterator[float]:
        """Train until ``count`` epochs are done; gives :meth:`train_epoch` 's seconds of each.

        ``size`` and ``seed`` are of the batches, see :func:`epoch_batches`; ``on_step(name, steps
        done, steps in all)`` is called after each step.
        """
        while self.epoch < count:
            batches = epoch_batches(len(train), size, seed, self.epoch, self.device)
            total = len(batches) * count
            yield self.train_epoch(
                train,
                batches,
                folder,
                interrupt,
                lambda total=total: on_step(self.name, self.step, total),
            )

    def train_epoch(
        self,
        train: Samples,
        batches: list[torch.Tensor],
        folder: RunFolder,
        interrupt: Interrupt,
        on_step: Callable[[], None] = lambda: None,
    ) -> float:
        """Train for one epoch, or for what is left of it; test; write metrics and a checkpoint.

        Args:
            train: on the model's device.
            batches: int64 vectors of sample numbers; of several ranks each trains on its share.
            folder: where metrics and the checkpoint go.
            interrupt: checked after each step.
            on_step: called after each step.

        Returns:
            Seconds of the epoch's training, without the test; of rank 0.

        Raises:
            TrainError: the loss is not finite, or a file cannot be written (the last checkpoint
                stays); a signal came (the last step was saved); the batches are not the
                checkpoint's.
        """
        self._begin(batches)
        watch = info.Others()
        clock = _Clock(self.device, self.seconds)
        view = train.view_of(self.epoch)
        for index in batches[self.within :]:
            loss, twin = self._step(train, index, view, clock)
            loss, twin, wished = self.ranks.sum([loss, twin, interrupt.wished])
            self._log_step(folder, loss / self.ranks.world, twin / self.ranks.world)
            on_step()
            self._check_loss(folder)
            due = self.checkpoint_every is not None and self.step % self.checkpoint_every == 0
            if wished or (due and self.within < len(batches)):
                self.save(folder)
            if wished:
                raise TrainError(
                    f"interrupted, and saved: continue with --resume {folder.path}, or resume=True",
                    status=interrupt.status,
                )
        # On several ranks the other ranks' work would count as another process's.
        return self._end(folder, watch.share() if self.ranks.world == 1 else None)

    def _step(
        self, train: Samples, index: torch.Tensor, view: int | None, clock: _Clock
    ) -> tuple[float, float]:
        """One step of training on this rank's share of a batch; its loss, and the twin's."""
        ranks = self.ranks
        clock.start()
        rows = ranks.share(len(index))
        own = index[rows]
        # DDP and FSDP2 average gradients over ranks, and shares may differ in length.
        weight = len(own) * ranks.world / len(index)
        clean, labels = train.batch(own, self.memory_format, view)
        inputs = self.noise.on_input(clean, self.step, rows.start)
        clock.lap("data")
        taught = None if self.predict is None else self.predict(clean, own, view)
        clock.lap("teacher")
        outputs: Any = None

        def objective():
            nonlocal outputs
            with ranks.batch(len(index), self.exact):
                outputs = self._outputs(inputs)
            clock.lap("student forward")
            loss = self.loss(outputs, taught, labels)
            return loss if weight == 1 else loss * weight

        self._seeded()
        with self.noise.on_parameters(self.parameters, self.step):
            loss = self.noise.on_loss(objective, self.parameters, self.step)
            clock.lap("loss")
            loss.backward()
            clock.lap("backward")
        if self.schedule is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * self.schedule(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        clock.lap("optimizer")
        if self.twin is None:
            return loss.item(), 0.0
        return loss.item(), self.twin(outputs.detach(), taught, labels).item() * weight

    def _seeded(self) -> None:
        """Seed torch's generators for this step's dropout."""
        key = np.random.SeedSequence((self.seed, self.step, 0 if self.exact else self.ranks.rank))
        torch.manual_seed(int(key.generate_state(1, np.uint64)[0] >> 1))

    def _log_step(self, folder: RunFolder, loss: float, twin: float) -> None:
        self.step += 1
        self.within += 1
        self.losses.append(loss)
        shown = loss if math.isfinite(loss) else str(loss)  # JSON has no NaN
        line = {"kind": "step", "learner": self.name, "step": self.step, "loss": shown}
        if self.twin is not None and math.isfinite(twin):
            line["twin"] = twin
        folder.log(**line)

    def _check_loss(self, folder: RunFolder) -> None:
        """That the last step's loss is finite."""
        if math.isfinite(self.losses[-1]):
            return
        kept = folder.checkpoint(self.name)
        where = f"its last checkpoint is {kept}" if kept.exists() else "it has no checkpoint yet"
        raise TrainError(
            f"the loss of {self.name} is {self.losses[-1]} at step {self.step}: {where}; a smaller "
            "lr may help",
            status=1,
        )

    def _end(self, folder: RunFolder, others: float | None) -> float:
        """Test, write the epoch's line and a checkpoint; its seconds of training."""
        self._gather()
        self.epoch += 1
        began = time.perf_counter()
        self.measures = self.evaluate(self.model)
        norms = [] if self.gradient_noise is None else self.gradient_noise.norms()
        folder.log(
            sync=True,
            kind="epoch",
            learner=self.name,
            epoch=self.epoch,
            step=self.step,
            loss=sum(self.losses) / len(self.losses),
            **self.measures,
            lr=self.optimizer.param_groups[0]["lr"],
            phases=self.seconds,
            seconds=sum(self.seconds.values()),
            others=others,
            test_seconds=time.perf_counter() - began,
            **({"noise_to_gradient": norms[0].ratio} if norms and norms[0].gradient > 0 else {}),
        )
        spent = self.ranks.first(lambda: sum(self.seconds.values()))
        self.within, self.losses = 0, []
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.save(folder)
        return spent

    def _outputs(self, inputs):
        try:
            return self.engine(inputs)
        except RuntimeError as error:
            if "Expected to have finished reduction" not in str(error):
                raise
            raise TrainError(
                f"{self.name} leaves parameters without a gradient in some steps only, which DDP "
                "does not take: use one process"
            ) from None

    def _begin(self, batches: list[torch.Tensor]) -> None:
        """Ready for the epoch of these batches, or for what is left of it."""
        least = min(map(len, batches))
        if least < self.ranks.world:
            raise TrainError(
                f"a batch of {least} samples is too small for {self.ranks.world} ranks: choose "
                "another batch_size or train_samples, or start fewer ranks"
            )
        sizes = zlib.crc32(repr([len(index) for index in batches]).encode())
        order = zlib.crc32(torch.cat(batches).cpu().numpy().tobytes(), sizes)
        if self.within and self.order != order:
            raise TrainError(
                f"the checkpoint of {self.name} is from the middle of an epoch with other "
                "batches: continue with the data, the seed and the batch size that it began with"
            )
        self.order = order
        self.engine.train()
