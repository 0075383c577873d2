"""Runs that are killed, interrupted, out of disk, or two in one folder."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys

import networks
import pytest
import stopping
import torch
from nightly import of_night
from safetensors.torch import load_file
from torch.nn import functional as F

from kdkernels import __main__ as command
from kdkernels.train import TrainError, run_folder
from kdkernels.train.loop import Learner
from kdkernels.train.noise import Noise
from kdkernels.train.run_folder import RunFolder
from kdkernels.train.session import Interrupt

# One thread, as in test_train.
DISTILL = [
    "distill",
    "--train-samples=52",
    "--test-samples=10",
    "--batch-size=4",
    "--image-size=16",
    "--epochs=2",
    "--teacher-epochs=1",
    "--threads=1",
    "--arms=full",
    "--noise=gradient",
    "--checkpoint-every=5",
    *networks.ARGUMENTS,
]


def lines(out, kind):
    path = out / "metrics.jsonl"
    text = path.read_text().splitlines() if path.exists() else []
    found = []
    for line in text:
        try:
            found.append(json.loads(line))
        except ValueError:  # torn
            break
    return [line for line in found if line["kind"] == kind]


def without_times(records):
    names = ("phases", "seconds", "test_seconds", "others")
    kept = [{k: v for k, v in line.items() if k not in names} for line in records]
    return sorted(kept, key=lambda line: (line["learner"], line["step"]))


def one_sentence(text):
    assert text.count("\n") == 1 and "Traceback" not in text, text
    return text


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A whole run, uninterrupted."""
    out = tmp_path_factory.mktemp("robust") / "run"
    assert command.main([*DISTILL, f"--out={out}"]) in (0, 1)
    return out


def assert_same_run(out, run):
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == names
    for name in names:
        found, expected = (load_file(folder / "checkpoints" / name) for folder in (out, run))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected), name
    for kind in ("step", "epoch"):
        assert without_times(lines(out, kind)) == without_times(lines(run, kind))
    assert not list(out.rglob("*.tmp"))


def test_kill_at_any_moment(run, tmp_path):
    """Each time some steps after the last kill, and then at a function that is called in a step."""
    out = tmp_path / "run"
    moments = random.Random(0)
    arguments = [*DISTILL, f"--out={out}"]
    for _ in range(of_night(6, 3)):
        moment = {"times": moments.randint(2, 5), "calls": moments.randint(0, 3_000)}
        running = stopping.start(*arguments, at='"kind": "step"', **moment)
        assert stopping.end(running, signal.SIGKILL)[0] == -signal.SIGKILL
        arguments = ["distill", f"--resume={out}"]
    assert command.main(arguments) in (0, 1)
    assert_same_run(out, run)


def test_sigterm_saves_and_says_where(run, tmp_path):
    out = tmp_path / "run"
    running = stopping.start(*DISTILL, f"--out={out}", at='"kind": "step"')
    # The folder is in use meanwhile.
    with pytest.raises(TrainError, match="another process is training in"):
        RunFolder.open(str(out)).hold()
    status, said = stopping.end(running, signal.SIGTERM)
    assert status == 143
    assert f"saved: continue with --resume {out}" in one_sentence(said)
    assert command.main(["distill", f"--resume={out}"]) in (0, 1)
    assert_same_run(out, run)


def confined(out, limit, handler):
    """A run whose files may have so many bytes, in a process of its own: status, last words."""
    code = (
        "import resource, signal, sys; from kdkernels.__main__ import main;"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}));"
        f"signal.signal(signal.SIGXFSZ, signal.{handler}); sys.exit(main(sys.argv[1:]))"
    )
    call = [sys.executable, "-c", code, *DISTILL, f"--out={out}"]
    path = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        call,
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("kill", [False, True], ids=["full", "killed"])
def test_within_a_checkpoint(run, tmp_path, kill):
    """Files may have no more bytes than the teacher's last checkpoint lacks one of.

    Beyond them the process is told so, as by a full disk, or killed in the middle of the write.
    """
    out = tmp_path / "run"
    limit = (run / "checkpoints/teacher.safetensors").stat().st_size - 1
    status, said = confined(out, limit, "SIG_DFL" if kill else "SIG_IGN")
    if kill:
        assert status == -signal.SIGXFSZ and list(out.rglob("*.tmp"))
    else:
        assert status == 1
        assert "cannot write" in one_sentence(said)
        assert "teacher.safetensors: File too large" in said
        assert not list(out.rglob("*.tmp"))
    assert command.main(["distill", f"--resume={out}"]) in (0, 1)
    assert_same_run(out, run)


# ---- a loop of a few milliseconds ----------------------------------------------------------------


class Points:
    """Random numbers with labels."""

    def __init__(self, count=12, inputs=4):
        generator = torch.Generator().manual_seed(0)
        self.x, self.y = torch.randn(count, inputs, generator=generator), torch.arange(count) % 3

    def __len__(self):
        return len(self.y)

    def view_of(self, epoch):
        return None

    def batch(self, index, memory_format=None, view=None):
        return self.x[index], self.y[index]


def learner(inputs=4, width=8, **options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(inputs, width), torch.nn.Dropout(0.5), torch.nn.Linear(width, 3)
    )
    return Learner(
        "net",
        model,
        lambda z, _, y: F.cross_entropy(z, y),
        None,
        lambda model: {},
        0.1,
        0,
        **options,
    )


def batches(size=4, epoch=0):
    order = torch.randperm(12, generator=torch.Generator().manual_seed(epoch))
    return list(order.split(size))


def train(one, folder, epochs=3, size=4):
    while one.epoch < epochs:
        one.train_epoch(Points(), batches(size, one.epoch), folder, Interrupt())


@pytest.fixture
def folder(tmp_path):
    with_lock = RunFolder.create(str(tmp_path / "run"), {})
    yield with_lock
    with_lock.close()


def state_of(folder):
    """The bytes of the run's files; TensorBoard's say again what metrics.jsonl says."""
    files = (path for path in folder.path.rglob("*") if path.is_file())
    return {path.name: path.read_bytes() for path in files if "tfevents" not in path.name}


@pytest.mark.parametrize(
    ("place", "step"),
    [*(("gradient", step) for step in range(1, 9)), ("none", 5), ("input", 5), ("parameter", 5)],
)
def test_every_step_can_be_the_last(place, step, folder, tmp_path):
    """Whatever step a process dies after, with a checkpoint every second step."""
    noise = Noise(place, 0.1, 7)
    expected = learner(noise=noise)
    whole = RunFolder.create(str(tmp_path / "whole"), {})
    train(expected, whole)

    class Death(Exception):
        pass

    one = learner(noise=noise, checkpoint_every=2)

    def dies():
        if one.step == step:
            raise Death

    with pytest.raises(Death):
        while True:
            one.train_epoch(Points(), batches(4, one.epoch), folder, Interrupt(), dies)
    folder.close()
    again = learner(noise=noise, checkpoint_every=2)
    assert again.load(folder) == (step > 2)
    assert again.step in (step - 1, step - 2)
    train(again, folder)
    for a, b in zip(again.parameters, expected.parameters, strict=True):
        assert torch.equal(a, b)
    for kind in ("step", "epoch"):
        assert without_times(lines(folder.path, kind)) == without_times(lines(whole.path, kind))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_disk_that_refuses_leaves_the_last_checkpoint(code, folder, monkeypatch):
    one = learner()
    train(one, folder, epochs=1)
    folder.close()
    before = state_of(folder)

    def refuse(*_):
        raise OSError(code, os.strerror(code))

    one = learner(checkpoint_every=1)
    one.load(folder)
    monkeypatch.setattr(run_folder.os, "fsync", refuse)
    with pytest.raises(TrainError, match=os.strerror(code)) as error:
        train(one, folder)
    assert error.value.status == 1 and str(folder.path) in str(error.value)
    monkeypatch.undo()
    after = state_of(folder)
    # A step was written down before the checkpoint that failed.
    assert after.pop("metrics.jsonl").startswith(before.pop("metrics.jsonl"))
    assert after == before
    one = learner()
    assert one.load(folder) and one.step == 3


def test_a_file_is_replaced_whole(tmp_path):
    """Whoever holds the old one keeps it, to its last byte."""
    path, old = tmp_path / "file", tmp_path / "old"
    run_folder.write_bytes(path, b"what was there")
    os.link(path, old)
    run_folder.write_bytes(path, b"new")
    assert path.read_bytes() == b"new" and old.read_bytes() == b"what was there"


def test_metrics_that_cannot_be_written(folder, monkeypatch):
    """A line is there whole or not at all."""
    folder.log(kind="step", learner="net", step=1, loss=1.0)
    written = state_of(folder)

    class Full:
        """A file on a disk that is full after three more bytes."""

        def __init__(self, file):
            self.file, self.room = file, 3

        def write(self, line):
            if not self.room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.room -= (size := self.file.write(line[: self.room]))
            return size

        def fileno(self):
            return self.file.fileno()

        def close(self):
            self.file.close()

    folder._metrics = Full(folder._metrics)
    with pytest.raises(TrainError, match=r"metrics\.jsonl: No space left"):
        folder.log(kind="step", learner="net", step=2, loss=1.0)
    assert state_of(folder) == written


def test_a_folder_that_is_read_only_or_gone(folder, tmp_path):
    with pytest.raises(TrainError, match=r"cannot write /proc/none: "):
        run_folder.write_bytes(tmp_path.__class__("/proc/none"), b"x")
    folder.close()
    shutil.rmtree(folder.path)
    with pytest.raises(TrainError, match="cannot write .*No such file"):
        folder.log(kind="step")
    with pytest.raises(TrainError, match="has no config.json"):
        RunFolder.open(str(folder.path))


def test_nan_keeps_the_checkpoint(folder):
    one = learner()
    train(one, folder, epochs=1)
    before = load_file(folder.path / "checkpoints/net.safetensors")
    one.loss = lambda z, _, y: z.sum() * float("nan")
    with pytest.raises(TrainError, match="the loss of net is nan at step 4: its last checkpoint"):
        train(one, folder)
    again = learner()
    assert again.load(folder) and again.step == 3
    after = load_file(folder.path / "checkpoints/net.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert [line["step"] for line in lines(folder.path, "step")] == [1, 2, 3]


def test_damaged_checkpoints_are_named(folder):
    train(learner(), folder, epochs=1)
    path = folder.path / "checkpoints/net.safetensors"
    content = path.read_bytes()
    for size in (0, 7, 100, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(TrainError, match=r"net\.safetensors cannot be read: .*begins anew"):
            learner().load(folder)
    path.unlink()
    assert not learner().load(folder) and not lines(folder.path, "step")


def test_other_settings_are_refused(folder):
    one = learner(checkpoint_every=2)
    with pytest.raises(ZeroDivisionError):
        one.train_epoch(Points(), batches(), folder, Interrupt(), lambda: 1 / (one.step < 3))
    with pytest.raises(TrainError, match=r"another model: size mismatch for 0\.weight"):
        learner(width=9).load(folder)
    again = learner()
    assert again.load(folder) and again.within == 2
    for other in (batches(size=3), batches(epoch=1)):
        with pytest.raises(TrainError, match="an epoch with other batches"):
            again.train_epoch(Points(), other, folder, Interrupt())
    again.train_epoch(Points(), batches(), folder, Interrupt())


def test_one_trains_at_a_time(folder):
    again = RunFolder.open(str(folder.path))
    with pytest.raises(TrainError, match="another process is training in"):
        again.log(kind="step")
    assert list(again.metrics()) == []  # reading is free
    folder.close()
    again.log(kind="step")
    with pytest.raises(TrainError, match="another process"):
        folder.hold()
    again.close()


def test_signals_are_wishes_once(monkeypatch):
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        before = signal.getsignal(number)
        with Interrupt() as interrupt:
            os.kill(os.getpid(), number)
            assert interrupt.wished and interrupt.status == status
            assert signal.getsignal(number) is before
        assert signal.getsignal(number) is before
