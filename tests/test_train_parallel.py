"""Runs on 1, 2 and 4 ranks: the same losses and weights, checkpoints from one number to another.

In fp64 the sums of ranks differ from those of one process by some 1e-16. Adam divides a gradient by
its own size, so where the exact gradient is 0, as of a bias before BatchNorm, a weight moves by up
to lr whatever the rounding; the small network has no such weights, and is compared at 1e-9 after
six steps. MobileNetV2's 52 BatchNorms divide channels that hardly vary by how much they vary, and
Adam again: its first loss is compared at 1e-12, those of three steps at 1e-6, moments of gradients
as large as 1e3 at 1e-3, and weights at lr.
"""

import dataclasses
import json
import os
import shutil
import time
from pathlib import Path

import processes
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torchvision import models as tv
from torchvision.ops import StochasticDepth

import kdkernels
from kdkernels.train import TrainError, distributed
from kdkernels.train.loop import Learner, accuracy, epoch_batches
from kdkernels.train.noise import Noise
from kdkernels.train.run_folder import RunFolder
from kdkernels.train.session import Interrupt
from kdkernels.train.settings import PARALLEL

SAMPLES, BATCH, EPOCHS = 23, 9, 2  # neither 2 nor 4 divides a batch
LR = 1e-2


class Data:
    """Random images with labels."""

    def __init__(self, count, size):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(count, 3, size, size, generator=generator, dtype=torch.float64)
        self.labels = torch.arange(count) % 5

    def __len__(self):
        return len(self.labels)

    def view_of(self, epoch):
        return None

    def batch(self, index, memory_format=torch.contiguous_format, view=None):
        return self.x[index].contiguous(memory_format=memory_format), self.labels[index]


def small():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(
            nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout2d(0.2)
        ),
        nn.Sequential(
            nn.Conv2d(6, 7, 3, stride=2, bias=False),
            nn.BatchNorm2d(7),
            nn.Tanh(),
            StochasticDepth(0.3, "row"),
        ),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(28, 5),
    ).double()


class Draws(nn.Module):
    """Draws with PyTorch and with kdkernels, and uses a layer in some steps and another never."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.noise, self.gradient = kdkernels.InputNoise(0.5), kdkernels.GradientNoiseLayer(0.01)
        self.learnable = kdkernels.InputNoise(
            0.1, learnable=True, shape=(6, 1, 1), multiplicative=True
        )
        self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Linear(216, 5)
        self.sometimes, self.never = nn.Linear(216, 216), nn.Linear(2, 2)
        self.double()

    def forward(self, x):
        if not self.training:
            return self.head(self.conv(x).relu().flatten(1))
        x = self.conv(self.noise(x) + 0.1 * torch.randn_like(x)).relu()
        x = self.learnable(x * (1 + 0.1 * torch.rand(len(x), 1, 1, 1, dtype=x.dtype)))
        x = self.gradient(x).flatten(1)
        x = x + 0.1 * kdkernels.randn_like(x, seed=3) * torch.empty_like(x).exponential_()
        if torch.rand(()) < 0.5:
            x = x + self.sometimes(x)
        return self.head(x)


def mobilenet():
    torch.manual_seed(0)
    return tv.mobilenet_v2(num_classes=5, width_mult=0.1).double()


@dataclasses.dataclass
class Case:
    name: str
    place: str = "none"
    tuned: bool = False
    model: object = small
    size: int = 8
    epochs: int = EPOCHS
    exact: bool = True
    close: float = 1e-9
    moments: float = 1e-9
    weights: float = 1e-9


CASES = [
    Case("plain"),
    Case("tuned", "gradient", tuned=True),
    Case("input", "input"),
    Case("parameter", "parameter", tuned=True),
    Case("regularizer", "regularizer"),
    Case("draws", model=Draws),
    Case(
        "mobilenet",
        "none",
        tuned=True,
        model=mobilenet,
        size=16,
        epochs=1,
        close=1e-6,
        moments=1e-3,
        weights=LR,
    ),
]


def cases(world):
    """All on 2 ranks; on 4, which two cores only run in turns, the first three."""
    return CASES if world == 2 else CASES[:3]


def soft(backend):
    return lambda z, t, y: kdkernels.distillation_loss(
        z, t, y, temperature=2.0, alpha=0.5, backend=backend
    )


def learner(case, data, parallel):
    teacher = case.model().eval()

    def predict(images, *_):
        with torch.no_grad():
            return 3 * teacher(images)

    return Learner(
        case.name,
        case.model(),
        soft("fused"),
        predict,
        lambda model: accuracy(model, data),
        LR,
        3,
        tuned=case.tuned,
        noise=Noise(case.place, 0.1, 5),
        twin=soft("reference"),
        parallel=parallel,
        skips=case.model is Draws,
        exact=case.exact,
    )


def train(case, folder, parallel="ddp", stop=None):
    """Train, or go on; ``stop(step)`` wishes for a stop. Returns the learner."""
    data = Data(SAMPLES, case.size)
    one = learner(case, data, parallel)
    one.load(folder)
    interrupt = Interrupt()

    def on_step():
        interrupt.wished = stop is not None and stop(one.step)

    while one.epoch < case.epochs:
        batches = epoch_batches(SAMPLES, BATCH, 0, one.epoch, "cpu")
        one.train_epoch(data, batches, folder, interrupt, on_step)
    return one


def at(path):
    """A run's folder, made where there is none."""
    there = distributed.current().first(lambda: Path(path).exists())
    return RunFolder.open(path) if there else RunFolder.create(str(path), {})


def assert_same(case, found, expected):
    """Two runs' metrics and checkpoints are equal to rounding."""

    def lines(path):
        return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]

    for a, b in zip(lines(found), lines(expected), strict=True):
        for key in ("kind", "learner", "step"):
            assert a[key] == b[key]
        for key in ("loss", "twin", "accuracy", "noise_to_gradient"):
            if key in b:
                close = 1e-12 if b["step"] == 1 else case.close
                assert a[key] == pytest.approx(b[key], rel=close), (found, key)
    for path in (expected / "checkpoints").iterdir():
        a, b = load_file(found / "checkpoints" / path.name), load_file(path)
        assert a.keys() == b.keys()
        for key in a:
            close = case.moments if "optimizer" in key else case.weights
            torch.testing.assert_close(a[key], b[key], rtol=close, atol=close, msg=key)


# ---- what ranks do -------------------------------------------------------------------------------


def joins_a_group(rank, world, out):
    ranks = distributed.current()
    assert (ranks.rank, ranks.world) == (rank, world)
    assert ranks.sum([1.0, float(rank)]) == [world, world * (world - 1) / 2]
    for count in (5, 6, 13):
        rows = torch.arange(count * 2).view(count, 2)
        assert torch.equal(ranks.gather(rows[ranks.share(count)], count), rows)
    assert ranks.first(lambda: rank) == 0

    def refuse():
        raise TrainError("no", status=7)

    with pytest.raises(TrainError, match="no") as error:
        ranks.first(refuse)
    assert error.value.status == 7
    assert ranks.sum([distributed.first_to_say()]) == [1]


def trains_as_one(rank, world, out):
    for case in cases(world):
        for parallel in PARALLEL:
            folder = at(out / f"{case.name}-{parallel}-{world}")
            if case.place == "regularizer" and parallel == "fsdp2":
                with pytest.raises(TrainError, match="parallel ddp"):
                    train(case, folder, parallel)
            else:
                train(case, folder, parallel)


def continues_one(rank, world, out):
    """From a checkpoint that one process wrote in the middle of an epoch."""
    for parallel in PARALLEL:
        train(CASES[1], at(out / f"from-one-{parallel}-{world}"), parallel)


def stops_together(rank, world, out):
    """A wish of one rank stops all, and one process goes on."""
    for parallel in PARALLEL:
        folder = at(out / f"to-one-{parallel}-{world}")
        with pytest.raises(TrainError, match="interrupted, and saved"):
            train(CASES[1], folder, parallel, stop=lambda step: rank == world - 1 and step == 3)
        folder.close()


def has_rank_0s_model(rank, world, out):
    """Each rank made a model of its own, and seeds of its own in it."""
    for parallel in PARALLEL:
        torch.manual_seed(rank)
        model = nn.Sequential(nn.Linear(2, 3), kdkernels.InputNoise(0.1), nn.BatchNorm1d(3))
        model[0].weight.data += rank
        distributed.engine(model, parallel, torch.device("cpu"))
        torch.manual_seed(0)
        first = nn.Sequential(nn.Linear(2, 3), kdkernels.InputNoise(0.1))
        if parallel == "fsdp2":
            scalar = kdkernels.InputNoise(0.1, learnable=True)
            with pytest.raises(TrainError, match="fsdp2 requires parameters of at least one dim"):
                distributed.engine(scalar, parallel, torch.device("cpu"))
        assert model[1].seed == first[1].seed
        assert torch.equal(model[0].weight, first[0].weight)


def has_masks_and_batchnorms_of_its_own(rank, world, out):
    """Plain DDP and FSDP2, as torchrun's users expect; all ranks end with the same model."""
    for parallel in PARALLEL:
        case = dataclasses.replace(CASES[0], name="own", exact=False)
        folder = at(out / f"own-{parallel}-{world}")
        one = train(case, folder, parallel)
        for name, value in one.model.state_dict().items():
            everywhere = distributed.current().gather(value.flatten()[None].double(), world)
            assert torch.equal(everywhere, everywhere[:1].expand(world, -1)), name
        assert at(out / f"own-{parallel}-{world}").load("own") is not None
        # The ranks' masks differ.
        torch.manual_seed(0)
        one._seeded()
        drawn = distributed.current().gather(torch.rand(1, 4), world)
        assert len({tuple(row) for row in drawn.tolist()}) == world


def refuses_masks_of_their_own(rank, world, out):
    x = torch.zeros(2, 3, 8)
    for model in (
        nn.TransformerEncoderLayer(8, 2, 8, batch_first=True),
        nn.LSTM(8, 8, num_layers=2, dropout=0.5, batch_first=True),
    ):
        with distributed.current().batch(2 * world, exact=True):
            with pytest.raises(TrainError, match="draws a mask of its own on each rank"):
                model(x)
            model.eval()(x)


def too_small_a_batch(rank, world, out):
    folder = at(out / f"small-{world}")
    data = Data(SAMPLES, 8)
    one = learner(CASES[0], data, "ddp")
    with pytest.raises(TrainError, match=f"of 1 samples is too small for {world} ranks"):
        one.train_epoch(data, [torch.arange(8), torch.arange(1)], folder, Interrupt())


def notices_an_end(rank, world, out):
    """The last check: a rank that ends without a word leaves the others no hang."""
    if rank == world - 1:
        os._exit(0)
    began = time.monotonic()
    with pytest.raises(RuntimeError) as error:
        distributed.current().sum([1.0])
    assert distributed.was_cut(error.value) and time.monotonic() - began < 60


CHECKS = [
    joins_a_group,
    trains_as_one,
    continues_one,
    stops_together,
    has_rank_0s_model,
    has_masks_and_batchnorms_of_its_own,
    refuses_masks_of_their_own,
    too_small_a_batch,
    notices_an_end,
]


def all_checks(rank, world, port, out):
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    for check in CHECKS:
        check(rank, world, out)


# ---- tests ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Every case on one process."""
    out = tmp_path_factory.mktemp("alone")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    for case in CASES:
        folder = RunFolder.create(str(out / case.name), {})
        train(case, folder)
        folder.close()
    yield out
    torch.set_num_threads(before)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_train_as_one_process(world, alone, tmp_path):
    begun = RunFolder.create(str(tmp_path / "begun"), {})
    with pytest.raises(TrainError, match="interrupted"):
        train(CASES[1], begun, stop=lambda step: step == 4)
    begun.close()
    for parallel in PARALLEL:
        shutil.copytree(begun.path, tmp_path / f"from-one-{parallel}-{world}")
    processes.ranks(all_checks, world, tmp_path)

    for parallel in PARALLEL:
        for case in cases(world):
            if (case.place, parallel) != ("regularizer", "fsdp2"):
                assert_same(case, tmp_path / f"{case.name}-{parallel}-{world}", alone / case.name)
        assert_same(CASES[1], tmp_path / f"from-one-{parallel}-{world}", alone / CASES[1].name)
        folder = at(tmp_path / f"to-one-{parallel}-{world}")
        assert learner(CASES[1], Data(SAMPLES, 8), parallel).load(folder)
        train(CASES[1], folder)
        assert_same(CASES[1], folder.path, alone / CASES[1].name)
