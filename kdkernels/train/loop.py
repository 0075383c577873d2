"""One training loop for the teacher, the arms of experiment 2 and the runs of experiment 3."""

import contextlib
import dataclasses
import math
import os
import signal
import time
import zlib
from collections.abc import Callable, Generator, Sequence
from typing import Any, Protocol

import torch
from torch import nn

import kdkernels
from kdkernels.train import TrainError, distributed
from kdkernels.train.data import Images
from kdkernels.train.run_folder import RunFolder, load_state, state_of, weights

__all__ = [
    "PHASES", "Interrupt", "Learner", "Noise", "Samples", "accuracy", "choose_device",
    "epoch_batches", "predictions", "reproducible",
]  # fmt: skip

PHASES = ("data", "teacher", "student forward", "loss", "backward", "optimizer")
"""What a training step spends its time on, in order; "student" is whichever model learns."""

Predict = Callable[[torch.Tensor, torch.Tensor, int | None], Any]
Loss = Callable[[torch.Tensor, Any, torch.Tensor], torch.Tensor]


class Samples(Protocol):
    """What a learner learns from: :class:`kdkernels.train.data.Images`, or anything like it."""

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


@contextlib.contextmanager
def reproducible(seed: int, threads: int | None) -> Generator[None]:
    """Inside, torch gives the same bits for the same seed, device and number of threads.

    Args:
        seed: of torch's generators.
        threads: CPU threads; None leaves torch's own choice.
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
    """The device to train on.

    Args:
        name: ``"auto"`` (CUDA where torch sees it), ``"cpu"`` or ``"cuda"``.

    Raises:
        TrainError: CUDA is asked for and cannot be had.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise TrainError("--device cuda: torch sees no CUDA device; use --device cpu")
    if name == "cuda":
        ranks = distributed.current()
        if ranks.local >= torch.cuda.device_count():
            raise TrainError(
                f"this machine has {torch.cuda.device_count()} GPUs, too few for its ranks: "
                "lower --nproc-per-node, or use --device cpu"
            )
        name = f"cuda:{ranks.local}" if ranks.world > 1 else name
        row = torch.zeros(1, 2, device=name)
        try:
            kdkernels.distillation_loss(row, row)
        except (RuntimeError, ValueError, TypeError) as error:
            raise TrainError(f"--device cuda: {str(error).splitlines()[0]}") from None
    return torch.device(name)


def epoch_batches(count: int, size: int, seed: int, epoch: int, device) -> list[torch.Tensor]:
    """The epoch's batches: a function of seed and epoch alone, so the same for every learner.

    Args:
        count: images in all.
        size: images a batch.

    Returns:
        Image numbers, int64 vectors on ``device``.
    """
    # An odd multiplier keeps (seed, epoch) pairs apart; Generator takes any 64-bit number.
    order = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + epoch) & (2**63 - 1))
    batches = list(torch.randperm(count, generator=order).to(device).split(size))
    # BatchNorm has no variance of one image.
    return batches[:-1] if len(batches) > 1 and len(batches[-1]) == 1 else batches


class Interrupt:
    """Turns the first Ctrl-C or SIGTERM into a wish to stop after the step in hand.

    A KeyboardInterrupt in the middle of an optimizer step would leave half of the weights new. A
    second signal stops now. SIGTERM is what schedulers send before they kill.

    Attributes:
        wished: True after the first signal.
        status: the exit status that tells which: 130 or 143.
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

    Args:
        model: left in eval mode.
        images: in their own order.
        batch: images a forward pass.
        memory_format: of the images; the model is expected to be in the same.

    Of several ranks each runs its share of the images; all must call this, and get all rows.
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


@dataclasses.dataclass(frozen=True)
class Noise:
    """Noise in one place of training. A step's noise is a function of ``seed`` and the step.

    Attributes:
        place: ``"none"``. ``"input"``: std * eps on the images. ``"gradient"``: on every
            gradient, with variance std^2 / (1 + step)^0.55 (Neelakantan et al., arXiv
            1511.06807). ``"parameter"``: std * eps on the weights, in forward and backward, not
            in the step. ``"regularizer"``: none on the weights; the loss is
            L + std * sum eps_i dL/dtheta_i, with the same eps as ``"parameter"``, whose
            first-order part in eps it is.
        std: standard deviation, >= 0.
        seed: of the noise.
    """

    place: str = "none"
    std: float = 0.0
    seed: int = 0

    def on_input(self, images: torch.Tensor, step: int, first: int = 0) -> torch.Tensor:
        """The images, with noise if that is its place; ``first``: the number of the first one."""
        if self.place != "input":
            return images
        offset = first * images[0].numel()
        return kdkernels.input_noise(images, self.std, seed=self.seed, step=step, offset=offset)

    def on_parameters(self, parameters: Sequence[torch.Tensor], step: int):
        """A context in which the weights have noise, if that is its place."""
        if self.place != "parameter":
            return contextlib.nullcontext()
        return kdkernels.perturbed_parameters(parameters, self.std, seed=self.seed, step=step)

    def on_loss(
        self, loss: Callable[[], torch.Tensor], parameters: Sequence[torch.Tensor], step: int
    ) -> torch.Tensor:
        """What is minimised: the loss, or the regularised loss if that is its place."""
        if self.place != "regularizer":
            return loss()
        numbered = [(k, p) for k, p in enumerate(parameters) if p.requires_grad]
        streams, free = zip(*numbered, strict=True)  # the streams of on_parameters
        return kdkernels.soft_regularization(
            loss, free, self.std, seed=self.seed, step=step, stream=streams
        )

    def on_optimizer(self, optimizer: torch.optim.Optimizer):
        """What adds noise to the gradients before each step, if that is its place; else None."""
        if self.place != "gradient":
            return None
        std = kdkernels.neelakantan(self.std**2, 0.55)
        # Its ratio to the gradient goes into the metrics, which a warning would only repeat.
        return kdkernels.GradientNoise(
            optimizer, std, seed=self.seed, diagnostics=True, warn_above=1e30
        )


@dataclasses.dataclass
class Learner:
    """A model on its way through training, which can be stopped and continued at any step.

    Attributes:
        name: in metrics and checkpoints.
        model: in train mode while it learns; on the data's device.
        loss: ``loss(outputs, taught, labels)`` -> scalar, a mean over samples; outputs are the
            model's, taught is what ``predict`` gave.
        predict: ``predict(inputs, index [b], view)`` -> what the teacher says of these samples,
            such as logits ``[b, classes]``; None where no teacher is asked.
        evaluate: ``evaluate(model)`` -> the measures of an epoch's end, by name, such as
            ``{"accuracy": 0.9}``; they go into the metrics.
        lr: Adam's learning rate.
        schedule: ``schedule(step)`` -> what the learning rate of a step, from 0, is multiplied
            by; None: 1.
        weight_decay: decoupled from the gradient (AdamW, Loshchilov and Hutter, arXiv 1711.05101).
        seed: of the dropout masks. Learners with one seed draw the same masks.
        tuned: channels_last memory format and Adam's fused kernel.
        noise: in training; the teacher sees none of it.
        twin: the same loss by other means, asked at each step for the same logits, off the clock;
            what it says stands beside the loss in the metrics.
        checkpoint_every: steps between checkpoints within an epoch; None: at its end only.
        parallel: one of ``distributed.PARALLEL``, how several ranks train; they are those of
            :func:`kdkernels.train.distributed.current`. ``model`` stays whole on each rank, with
            the weights of the last checkpoint or epoch's end.
        skips: as :func:`kdkernels.train.distributed.engine` has it.
        epoch, step: whole epochs and steps done.
        within: steps done in the unfinished epoch.
        seconds: by phase in the unfinished epoch.
        losses: of the unfinished epoch.
        order: what tells the unfinished epoch's batches from others.
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
                "--parallel ddp"
            )
        self.engine = distributed.engine(self.model, self.parallel, self.device, self.skips)
        self.parameters = list(self.engine.parameters())
        # None, not False: the other arms run what plain torch.optim.Adam(lr=lr) would choose.
        options = {"lr": self.lr, "fused": self.tuned or None}
        if self.weight_decay > 0:
            options["weight_decay"] = self.weight_decay
            self.optimizer = torch.optim.AdamW(self.parameters, **options)
        else:
            self.optimizer = torch.optim.Adam(self.parameters, **options)
        self.gradient_noise = self.noise.on_optimizer(self.optimizer)
        self.random = {"cpu": torch.Generator().manual_seed(self.seed).get_state()}
        if self.device.type == "cuda":
            generator = torch.Generator(self.device).manual_seed(self.seed)
            self.random["cuda"] = generator.get_state()

    def save(self, folder: RunFolder, optimizer: bool = True) -> None:
        """Write everything that :meth:`load` needs; ``optimizer=False`` for a finished model.

        All ranks must call this together; rank 0 writes.
        """
        self._gather()
        tensors = {f"model.{k}": v for k, v in state_of(self.model).items()}
        if optimizer:
            for number, parameter in enumerate(self.parameters):
                for key, value in self.optimizer.state[parameter].items():
                    tensors[f"optimizer.{number}.{key}"] = distributed.whole(value)
        tensors |= {f"random.{k}": v for k, v in self.random.items()}
        names = ("epoch", "step", "within", "seconds", "losses", "order", "measures")
        folder.save(self.name, tensors, {name: getattr(self, name) for name in names})

    def _gather(self) -> None:
        """Bring the model up to date, where the engine has weights of its own."""
        if self.parallel == "fsdp2" and self.engine is not self.model:
            own = self.engine.state_dict()
            self.model.load_state_dict({k: distributed.whole(v) for k, v in own.items()})

    def load(self, folder: RunFolder) -> bool:
        """Continue from the checkpoint, if there is one, and drop the metrics written after it.

        It may be of any number of ranks.

        Returns:
            False where there is none.

        Raises:
            TrainError: it cannot be read, or is of another model.
        """
        found = folder.load(self.name)
        if found is not None:
            tensors, state = found
            self._check(tensors, folder.path / "checkpoints" / f"{self.name}.safetensors")
            for name, value in state.items():
                setattr(self, name, value)
            load_state(self.model, weights(tensors))
            if self.parallel == "fsdp2" and self.engine is not self.model:
                own = self.engine.state_dict()
                self.engine.load_state_dict(
                    {k: distributed.like(v, own[k]) for k, v in self.model.state_dict().items()}
                )
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
            self.random = {
                k.removeprefix("random."): v for k, v in tensors.items() if k.startswith("random.")
            }
            if self.gradient_noise is not None:
                self.gradient_noise.load_state_dict({"seed": self.noise.seed, "step": self.step})

        def before(line):
            unit = "step" if line["kind"] == "step" else "epoch"
            return line.get("learner") != self.name or line[unit] <= getattr(self, unit)

        folder.trim(before)
        self.ranks.sum([0.0])  # nobody reads the metrics before they are trimmed
        return found is not None

    def _check(self, tensors: dict[str, torch.Tensor], path) -> None:
        """That a checkpoint's tensors are of this learner's model."""
        wanted = {
            f"model.{k}": tuple(v.shape)
            for k, v in self.model.state_dict().items()
            if isinstance(v, torch.Tensor)
        }
        for number, parameter in enumerate(self.parameters):
            for key in ("exp_avg", "exp_avg_sq"):
                if f"optimizer.{number}.{key}" in tensors:
                    wanted[f"optimizer.{number}.{key}"] = tuple(parameter.shape)
        for key, shape in wanted.items():
            there = tuple(tensors[key].shape) if key in tensors else "absent"
            if there != shape:
                raise TrainError(
                    f"the checkpoint {path} is of another model: {key} is {there} there, and "
                    f"{shape} here; continue with the settings that it was made with, or begin a "
                    "new run with --out"
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
            batches: the epoch's batches, each an int64 vector of sample numbers; of several ranks
                each trains on its share of each batch.
            folder: where metrics and the checkpoint go.
            interrupt: asked after each step.
            on_step: called after each step, to show progress.

        Returns:
            Seconds of the epoch's training, without the test; of rank 0.

        Raises:
            TrainError: the loss is not finite (the last checkpoint stays), a file cannot be
                written (the same), Ctrl-C or SIGTERM on any rank (the state after the last step
                was saved), or batches that are not those of the checkpoint's unfinished epoch, or
                too small for the ranks.
        """
        ranks = self.ranks
        self._begin(batches)
        clock = _Clock(self.device, self.seconds)
        view = train.view_of(self.epoch)
        for index in batches[self.within :]:
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

            def objective(inputs=inputs, taught=taught, labels=labels, index=index, weight=weight):
                nonlocal outputs
                with ranks.batch(len(index)):
                    outputs = self._outputs(inputs)
                clock.lap("student forward")
                loss = self.loss(outputs, taught, labels)
                return loss if weight == 1 else loss * weight

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

            twin = 0.0
            if self.twin is not None:
                twin = self.twin(outputs.detach(), taught, labels).item() * weight
            value, twin, wished = ranks.sum([loss.item(), twin, interrupt.wished])
            value, twin = value / ranks.world, twin / ranks.world
            self.step += 1
            self.within += 1
            self.losses.append(value)
            finite = math.isfinite(value)
            shown = value if finite else str(value)  # JSON has no NaN
            line = {"kind": "step", "learner": self.name, "step": self.step, "loss": shown}
            if self.twin is not None and math.isfinite(twin):
                line["twin"] = twin
            folder.log(**line)
            # What the step made would otherwise lie beside what the next one makes.
            del outputs, taught, loss, objective
            on_step()
            if not finite:
                kept = folder.path / "checkpoints" / f"{self.name}.safetensors"
                where = (
                    f"its last checkpoint is {kept}"
                    if kept.exists()
                    else "it has no checkpoint yet"
                )
                raise TrainError(
                    f"the loss of {self.name} is {value} at step {self.step}: {where}; a smaller "
                    "--lr may help",
                    status=1,
                )
            due = self.checkpoint_every is not None and self.step % self.checkpoint_every == 0
            if wished or (due and self.within < len(batches)):
                self._keep_random()
                self.save(folder)
            if wished:
                raise TrainError(
                    f"interrupted, and saved: continue with --resume {folder.path}",
                    status=interrupt.status,
                )
        self._keep_random()
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
            test_seconds=time.perf_counter() - began,
            **({"noise_to_gradient": norms[0].ratio} if norms and norms[0].gradient > 0 else {}),
        )
        spent = ranks.first(lambda: sum(self.seconds.values()))
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
                "another --batch-size or --train-samples, or start fewer ranks"
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
        torch.set_rng_state(self.random["cpu"])
        if "cuda" in self.random:
            torch.cuda.set_rng_state(self.random["cuda"], self.device)

    def _keep_random(self) -> None:
        self.random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            self.random["cuda"] = torch.cuda.get_rng_state(self.device)
