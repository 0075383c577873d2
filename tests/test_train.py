"""The trainer: its experiments small, stopping and continuing, CIFAR-10's files, bad arguments."""

import dataclasses
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import urllib.error

import numpy as np
import pytest
import stopping
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision import models as tv

import kdkernels
from kdkernels import __main__ as command
from kdkernels.experiments import soft_regression, soft_regularization
from kdkernels.experiments.settings import PLACES, Network, Regression
from kdkernels.train import TrainError, data, models
from kdkernels.train.loop import epoch_batches
from kdkernels.train.run_folder import RunFolder
from kdkernels.train.settings import ARMS, NOISE_STD, Distil

# One thread: two that spin on a busy machine's two cores wait for each other most of the time.
TINY = [
    "--train-samples=49",
    "--test-samples=20",
    "--batch-size=16",
    "--image-size=16",
    "--epochs=2",
    "--teacher-epochs=1",
    "--threads=1",
    "--student=networks:Residual",
]


def one_sentence(capsys):
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "Traceback" not in err
    return err


def records(folder, **wanted):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if wanted.items() <= line.items()]


# Experiment 1


def test_data_is_the_articles():
    x, y, theta = soft_regression.make_data()
    assert x.shape == y.shape == (100, 1) and theta.shape == (1, 1)
    random = np.random.RandomState(0)
    assert np.array_equal(x, random.rand(100, 1))
    assert np.abs(y - 2 * x - 1).max() < 0.4


@pytest.mark.parametrize("noise", ["per-step", "per-sample"])
def test_three_paths_agree_and_report(noise):
    found = soft_regression.run(Regression(noise=noise, steps=150, replicas=32, repeats=1))
    assert found["agreement"]["difference"] <= 1e-5
    assert found["checks"][0]["passed"]
    assert {(t["path"], t["replicas"]) for t in found["times"]} == {
        (path, count) for path in ("numpy", "torch", "fused") for count in (1, 32)
    }
    assert len(found["plot"]["paths"]["fused"]) == 151
    json.dumps(found)


@pytest.mark.parametrize("noise", ["per-step", "per-sample"])
@pytest.mark.parametrize(("lr", "lam", "sigma"), [(0.01, 0.01, 1.0), (0.02, 0.5, 0.5)])
def test_stationary_mean_and_spread(noise, lr, lam, sigma):
    x, y, theta = soft_regression.make_data()
    final = kdkernels.noisy_linear_regression(
        torch.from_numpy(x).float(),
        torch.from_numpy(y).float(),
        float(theta[0, 0]),
        steps=800,
        lr=lr,
        lam=lam,
        sigma=sigma,
        seed=torch.arange(2048),
        noise=noise,
    ).double()
    mean, spread = soft_regression.stationary(x, y, lr=lr, lam=lam, sigma=sigma, noise=noise)
    assert mean == pytest.approx((x * y).mean() / ((x * x).mean() + sigma**2 + lam / 2))
    assert abs(final.mean() - mean) < 3.5 * spread / 2048**0.5
    assert final.std().item() == pytest.approx(spread, rel=0.08)


def test_soft_reg_command(tmp_path, capsys):
    out = tmp_path / "run"
    # So few steps have not forgotten the start: the check of the mean must say so.
    assert (
        command.main(["soft-reg", "--steps=5", "--replicas=64", "--repeats=1", f"--out={out}"]) == 1
    )
    shown = capsys.readouterr().out
    assert "E[xy]" in shown and "FAILED" in shown
    assert records(out, kind="mean") and len(records(out, kind="time")) == 6
    for name in (
        "report.html",
        "results.json",
        "plots/theta_path.png",
        "plots/theta_histogram.png",
    ):
        assert (out / name).stat().st_size > 500


# Experiment 2


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A whole run of distill, uninterrupted, with a fifth arm."""
    out = tmp_path_factory.mktemp("distill") / "run"
    assert command.main(["distill", *TINY, "--noise=gradient", f"--out={out}"]) in (0, 1)
    return out


def test_distill_end_to_end(run):
    for name in ("loss", "accuracy", "phases"):
        assert (run / f"plots/{name}.png").read_bytes().startswith(b"\x89PNG")
    page = (run / "report.html").read_text()
    assert page.count("<svg") == 8 and 'src="http' not in page
    results = json.loads((run / "results.json").read_text())["distill"]
    assert set(results["arms"]) == {"teacher", *ARMS, "noisy"}
    assert "noisy: full, with gradient noise of std 0.01 / (1 + step)" in page
    for arm in (*ARMS, "noisy"):
        assert len(records(run, kind="epoch", learner=arm)) == 2
        # 49 images in batches of 16 leave one over, which BatchNorm cannot take alone.
        assert len(records(run, kind="step", learner=arm)) == 6
        assert results["arms"][arm]["speedup"] > 0
    assert results["arms"]["alone"]["phases"]["teacher"] < 1e-3
    assert results["arms"]["full"]["phases"]["teacher"] > 0


def test_epochs_have_an_order_each():
    orders = [
        torch.cat(epoch_batches(50, 16, seed, epoch, "cpu")).tolist()
        for seed in (0, 1)
        for epoch in (0, 1, 2)
    ]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len(set(map(tuple, orders))) == len(orders)
    again = epoch_batches(50, 16, 1, 2, "cpu")
    assert torch.cat(again).tolist() == orders[-1] and [len(b) for b in again] == [16, 16, 16, 2]
    # One image alone has no variance for BatchNorm.
    assert [len(b) for b in epoch_batches(49, 16, 1, 2, "cpu")] == [16, 16, 16]


def test_fused_follows_reference(run):
    follow = json.loads((run / "results.json").read_text())["distill"]["follow"]
    assert follow["same_logits"] <= 1e-5
    assert follow["first_steps"] <= 1e-4
    losses = {
        name: [line["loss"] for line in records(run, kind="step", learner=name)]
        for name in ("reference", "full")
    }
    # Same weights, same batch, same teacher: the first loss differs by rounding only.
    assert losses["full"][0] == pytest.approx(losses["reference"][0], rel=1e-4)


def stop_twice(out, first, second, *arguments):
    """Start a run, stop it with Ctrl-C when it wrote ``first``, go on, kill it at ``second``."""
    process = stopping.start(*arguments, f"--out={out}", at=first)
    status, err = stopping.end(process, signal.SIGINT)
    assert status == 130 and f"continue with --resume {out}" in err and err.count("\n") == 1
    process = stopping.start(arguments[0], f"--resume={out}", at=second)
    assert stopping.end(process, signal.SIGKILL)[0] == -signal.SIGKILL
    with (out / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"kind": "step", "lear')  # what a kill in the middle of a write leaves


def assert_same_run(out, run, checkpoints):
    """The checkpoints named, of both folders, hold the same bits, and the steps the same losses."""
    for name in checkpoints:
        expected = load_file(run / f"checkpoints/{name}.safetensors")
        found = load_file(out / f"checkpoints/{name}.safetensors")
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected), name

    def losses(folder):
        lines = sorted(records(folder, kind="step"), key=lambda r: (r["learner"], r["step"]))
        return [(line["learner"], line["step"], line["loss"]) for line in lines]

    assert losses(out) == losses(run)
    assert not list(out.rglob("*.tmp"))


def test_ctrl_c_and_kill_then_resume_give_the_same_weights(run, tmp_path):
    out = tmp_path / "run"
    stop_twice(
        out,
        '"learner": "alone", "step": 1',
        '"learner": "noisy", "step": 4',
        "distill",
        *TINY,
        "--noise=gradient",
    )
    assert command.main(["distill", f"--resume={out}"]) in (0, 1)
    assert_same_run(out, run, ("teacher", "control", "noisy", *ARMS))


@pytest.mark.parametrize("place", NOISE_STD)
def test_distill_with_noise(run, tmp_path, place):
    """The student's noise alone parts the noisy arm from the full one, from where it comes in."""
    out = tmp_path / "run"
    teacher = run / "checkpoints/teacher.safetensors"
    arguments = [*TINY[:4], "--epochs=1", *TINY[6:], f"--teacher-weights={teacher}"]
    noise = ["--arms=full", f"--noise={place}", "--noise-std=0.25", f"--out={out}"]
    assert command.main(["distill", *arguments, *noise]) == 0
    full, noisy = (
        [line["loss"] for line in records(out, kind="step", learner=name)]
        for name in ("full", "noisy")
    )
    assert (full[0] == noisy[0]) == (place == "gradient") and full[1] != noisy[1]
    ratios = [line.get("noise_to_gradient", 0) for line in records(out, kind="epoch")]
    assert (max(ratios) > 0) == (place == "gradient")


def test_resume_takes_its_own_settings(run, capsys):
    assert command.main(["distill", f"--resume={run}", "--lr=1"]) == 2
    assert "--lr" in one_sentence(capsys)


def test_nan_stops_and_keeps_the_checkpoint(run, tmp_path, capsys):
    teacher = run / "checkpoints/teacher.safetensors"
    out = tmp_path / "run"
    arguments = [*TINY[:5], *TINY[6:], f"--teacher-weights={teacher}", "--arms=full"]
    assert command.main(["distill", *arguments, "--lr=1e30", f"--out={out}"]) == 1
    assert "the loss of full is nan" in one_sentence(capsys)
    kept = load_file(out / "checkpoints/teacher.safetensors")
    expected = load_file(teacher)
    assert all(torch.equal(kept[k], expected[k]) for k in expected if k.startswith("model."))
    assert records(out, learner="full")[-1]["loss"] == "nan"


def test_checkpoints_are_whole_or_absent(tmp_path):
    folder = RunFolder.create(str(tmp_path / "run"), {})
    first = {"x": torch.arange(6.0).view(1, 2, 3, 1).to(memory_format=torch.channels_last)}
    folder.save("a", first, {"epoch": 1})
    tensors, state = folder.load("a")
    assert torch.equal(tensors["x"], first["x"]) and state == {"epoch": 1}
    assert folder.load("b") is None
    path = folder.path / "checkpoints/a.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(TrainError, match="cannot be read"):
        folder.load("a")
    with pytest.raises(TrainError, match="is in use"):
        RunFolder.create(str(tmp_path / "run"), {})


def test_teacher_weights(run, tmp_path, monkeypatch):
    assert models.build("resnet18", 10, 16, str(run / "checkpoints/teacher.safetensors"))[1]
    imagenet = tmp_path / "imagenet.pth"
    torch.save(tv.resnet18().state_dict(), imagenet)
    model, ready = models.build("resnet18", 10, 96, str(imagenet))
    assert not ready and model.fc.out_features == 10
    with pytest.raises(TrainError, match=r"conv1\.weight does not fit"):
        models.build("resnet18", 10, 32, str(imagenet))
    save_file({"y": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(TrainError, match="does not fit"):
        models.build("resnet18", 10, 32, str(tmp_path / "other.safetensors"))

    def offline(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(tv.ResNet18_Weights, "get_state_dict", offline)
    with pytest.raises(TrainError, match="could not be downloaded"):
        models.build("resnet18", 10, 224, "DEFAULT")


# Experiment 3


def logits_of(*probabilities):
    return torch.tensor(probabilities, dtype=torch.float64).log()


@pytest.mark.parametrize(
    ("probabilities", "labels", "error"),
    [
        ([[1, 0], [0, 1]], [0, 1], 0),  # sure and right
        ([[1, 0], [0, 1]], [1, 0], 1),  # sure and wrong
        ([[0.8, 0.2], [0.8, 0.2]], [0, 1], 0.3),  # one bin: half are right, 0.8 promised
        ([[0.8, 0.2], [0.6, 0.4]], [0, 0], (0.2 + 0.4) / 2),  # a bin each
        ([[0.81, 0.19], [0.85, 0.15]], [0, 1], 0.33),  # both in (12/15, 13/15]
        ([[0.25, 0.25, 0.25, 0.25]], [0], 0.75),  # the first of equals is the guess
    ],
)
def test_calibration_error_by_hand(probabilities, labels, error):
    found = soft_regularization.calibration_error(logits_of(*probabilities), torch.tensor(labels))
    assert found == pytest.approx(error, abs=1e-12)


def test_calibration_error_is_the_papers():
    """Eq. 3 of Guo et al. as it is written, a bin after the other."""
    logits = 3 * torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(500) % 4
    confidence, guess = logits.double().softmax(1).max(1)
    expected = 0.0
    for m in range(1, 16):
        inside = (confidence > (m - 1) / 15) & (confidence <= m / 15)
        if inside.any():
            acc = (guess == labels)[inside].double().mean()
            expected += inside.sum() / 500 * (acc - confidence[inside].mean()).abs()
    assert soft_regularization.calibration_error(logits, labels) == pytest.approx(float(expected))
    count, right, _ = soft_regularization.reliability(logits, labels)
    assert count.sum() == 500 and right.sum() == (guess == labels).sum()


def test_difference_by_hand():
    found = soft_regularization.difference([3.0, 5.0, 7.0], [2.0, 3.0, 4.0])
    assert found["mean"] == 2 and found["standard_error"] == pytest.approx(1 / 3**0.5)
    assert found["standard_errors"] == pytest.approx(2 * 3**0.5)
    assert soft_regularization.difference([3.0], [1.0])["standard_error"] is None
    assert soft_regularization.difference([1.0, 2.0], [1.0, 2.0])["standard_errors"] is None


NETWORK = [
    "soft-reg",
    "--model=mlp",
    "--train-samples=65",
    "--test-samples=40",
    "--batch-size=16",
    "--threads=1",
]


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """A whole run of experiment 3, uninterrupted."""
    out = tmp_path_factory.mktemp("networks") / "run"
    assert command.main([*NETWORK, "--seeds=2", "--epochs=3", f"--out={out}"]) == 0
    return out


RUNS = [f"{arm}-{seed}" for seed in (0, 1) for arm in PLACES]


def test_networks_end_to_end(networks, capsys):
    for name in ("noise", "reliability"):
        assert (networks / f"plots/{name}.png").read_bytes().startswith(b"\x89PNG")
    page = (networks / "report.html").read_text()
    assert "Mean over 2 seeds" in page and page.count("<svg") == 2
    results = json.loads((networks / "results.json").read_text())["soft_regularization"]
    assert results["seeds"] == [0, 1] and list(results["arms"]) == list(PLACES)
    settings = json.loads((networks / "config.json").read_text())["soft_regularization"]
    assert settings["image_size"] == 8 and settings["input_std"] == 0.5
    for name, arm in results["arms"].items():
        assert arm["accuracy"]["mean"] == pytest.approx(sum(arm["accuracy"]["values"]) / 2)
        assert sum(arm["reliability"][0]) == 80
        away = arm["loss"]["difference"]["mean"]
        assert away == 0 if name == "none" else away != 0
    # A finished run leaves its predictions, and no weights.
    kept = {path.stem for path in (networks / "checkpoints").iterdir()}
    assert kept == {f"{name}-predictions" for name in RUNS}


def test_arms_of_a_seed_share_weights_and_batches(tmp_path):
    """Noise of no size changes nothing, so the arms differ by their noise alone."""
    out = tmp_path / "run"
    none = ["--input-std=0", "--gradient-std=0", "--parameter-std=0", "--regularizer-lam=0"]
    assert command.main([*NETWORK, *none, "--seeds=1", "--epochs=2", f"--out={out}"]) == 0
    logits = {
        arm: load_file(out / f"checkpoints/{arm}-0-predictions.safetensors")["logits"]
        for arm in PLACES
    }
    for arm in ("input", "gradient", "parameter"):
        assert torch.equal(logits[arm], logits["none"]), arm
    torch.testing.assert_close(logits["regularizer"], logits["none"], rtol=1e-4, atol=1e-5)


def test_regularizer_is_the_first_order_of_parameter_noise(tmp_path):
    """At the first step both losses part from the plain one by std * sum eps_i dL/dtheta_i."""
    out = tmp_path / "run"
    small = ["--parameter-std=1e-4", "--regularizer-lam=1e-4"]
    assert command.main([*NETWORK, *small, "--seeds=1", "--epochs=1", f"--out={out}"]) == 0
    plain, parameter, regularizer, gradient = (
        records(out, kind="step", learner=f"{arm}-0")[0]["loss"]
        for arm in ("none", "parameter", "regularizer", "gradient")
    )
    assert gradient == plain
    assert abs(regularizer - plain) > 1e-6
    assert parameter - plain == pytest.approx(regularizer - plain, rel=0.2)


def test_networks_resume_with_the_same_bits(networks, tmp_path, capsys):
    out = tmp_path / "run"
    stop_twice(
        out,
        '"learner": "gradient-0", "step": 2',
        '"learner": "parameter-0", "step": 9',
        *NETWORK,
        "--epochs=3",
        "--seeds=2",
    )
    # More seeds may be asked for; what is finished stays.
    assert command.main(["soft-reg", f"--resume={out}", "--seeds=1"]) == 0
    first = out / "checkpoints/none-0-predictions.safetensors"
    before = first.stat().st_mtime_ns
    assert command.main(["soft-reg", f"--resume={out}", "--seeds=2"]) == 0
    assert first.stat().st_mtime_ns == before
    assert_same_run(out, networks, [f"{name}-predictions" for name in RUNS])
    assert command.main(["soft-reg", f"--resume={out}", "--epochs=9"]) == 2
    assert "only --seeds may be given" in one_sentence(capsys)


def test_resnet18_in_all_arms(tmp_path):
    out = tmp_path / "run"
    arguments = [*NETWORK[:1], "--model=resnet18", "--train-samples=16", *NETWORK[3:]]
    assert command.main([*arguments, "--seeds=1", "--epochs=1", f"--out={out}"]) == 0
    assert len(records(out, kind="epoch")) == len(PLACES)
    results = json.loads((out / "results.json").read_text())["soft_regularization"]
    assert all(arm["accuracy"]["spread"] is None for arm in results["arms"].values())


# CIFAR-10's files


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    """A folder in CIFAR-10's Python format: five batches of 8 images and a test batch."""
    root = tmp_path_factory.mktemp("cifar")
    layout = root / "cifar-10-batches-py"
    layout.mkdir()
    random = np.random.RandomState(0)
    for name in [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]:
        pixels = random.randint(0, 256, (8, 3072), dtype=np.uint8)
        content = {"data": pixels, "labels": random.randint(0, 10, 8).tolist()}
        (layout / name).write_bytes(pickle.dumps(content))
    names = {"label_names": [f"class {n}" for n in range(10)]}
    (layout / "batches.meta").write_bytes(pickle.dumps(names))
    return root


def test_cifar10_loader(cifar):
    train, test = data.load("cifar10", size=32, data_dir=str(cifar), imagenet=True)
    assert (len(train), len(test), train.classes) == (40, 8, 10)
    with (cifar / "cifar-10-batches-py/data_batch_2").open("rb") as file:
        second = pickle.load(file)
    images, labels = train.batch(torch.arange(8, 16))
    assert labels.tolist() == second["labels"]
    # Each row of the file is 1,024 red, then green, then blue values, row by row.
    raw = torch.from_numpy(second["data"]).view(8, 3, 32, 32) / 255
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    torch.testing.assert_close(images, (raw - mean) / std)
    large = dataclasses.replace(train, size=80).batch(torch.arange(2), torch.channels_last)[0]
    assert large.shape == (2, 3, 80, 80) and large.is_contiguous(memory_format=torch.channels_last)


def test_cifar10_run_stops_at_the_target(cifar, tmp_path):
    out = tmp_path / "run"
    status = command.main(
        [
            "distill",
            "--data=cifar10",
            f"--data-dir={cifar}",
            "--image-size=72",
            "--batch-size=20",
            "--teacher-epochs=1",
            "--epochs=3",
            "--target-accuracy=0",
            "--arms=reference,full",
            "--threads=1",
            f"--out={out}",
        ]
    )
    assert status == 0
    assert [len(records(out, kind="epoch", learner=arm)) for arm in ("reference", "full")] == [1, 1]
    assert "seconds_to_target" in (out / "results.json").read_text()


def test_cifar10_missing_or_damaged(cifar, tmp_path, capsys, monkeypatch):
    def offline(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.CIFAR10.download", offline)
    call = ["distill", "--data=cifar10", f"--data-dir={tmp_path}", f"--out={tmp_path / 'run'}"]
    assert command.main(call) == 2
    assert "data_batch_1 is missing" in one_sentence(capsys)
    damaged = tmp_path / "cifar-10-batches-py"
    damaged.mkdir()
    for path in (cifar / "cifar-10-batches-py").iterdir():
        (damaged / path.name).write_bytes(b"not a pickle")
    with pytest.raises(TrainError, match="cannot be read"):
        data.load("cifar10", size=32, data_dir=str(tmp_path))


# Resuming elsewhere


MINE = """from torch import nn
def net(num_classes): return nn.Sequential(nn.Flatten(), nn.Linear(768, num_classes))
"""
FOLDER = [
    "--data=folder",
    "--data-dir=photos",
    "--image-size=16",
    "--teacher=its_own:net",
    "--student=its_own:net",
    "--teacher-epochs=1",
    "--batch-size=8",
    "--epochs=1",
    "--threads=1",
    "--arms=full",
    "--out=run",
]


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A folder of images, and the folder above it, where a run is started."""
    random = np.random.RandomState(0)
    for part, name in itertools.product(("train", "test"), ("cat", "dog")):
        place = tmp_path / "photos" / part / name
        place.mkdir(parents=True)
        for number in range(6):
            pixels = random.randint(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / f"{number}.png")
    (tmp_path / "its_own.py").write_text(MINE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def kdkernels_in(folder, *words, **environment):
    return subprocess.run(
        [sys.executable, "-m", "kdkernels", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )


def test_a_run_in_ascii_resumes_from_another_folder(photos, monkeypatch, capsys):
    done = kdkernels_in(photos, "distill", *FOLDER, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "us" in done.stdout and done.stdout.isascii()
    elsewhere = photos / "elsewhere"
    elsewhere.mkdir()
    resume = ["distill", f"--resume={photos / 'run'}"]
    done = kdkernels_in(elsewhere, *resume, "--epochs=2")
    assert done.returncode == 0, done.stderr
    assert f"its models its_own:net and its_own:net are imported from {photos}" in done.stdout
    assert not list(elsewhere.iterdir())
    # The images may move; others are refused, and then nothing changes.
    (photos / "photos").rename(photos / "moved")
    files = {path: path.read_bytes() for path in (photos / "run").rglob("*") if path.is_file()}
    monkeypatch.chdir(elsewhere)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert command.main([*resume, "--epochs=9"]) == 2
    assert "photos is not a folder" in one_sentence(capsys)
    for place in (photos / "moved").glob("*/cat"):
        Image.new("RGB", (16, 16)).save(place / "black.png")
    resume.append(f"--data-dir={photos / 'moved'}")
    assert command.main([*resume, "--epochs=9"]) == 2
    assert "began with another training set" in capsys.readouterr().err
    assert files == {path: path.read_bytes() for path in files}
    for place in (photos / "moved").glob("*/cat/black.png"):
        place.unlink()
    assert command.main([*resume, "--epochs=3"]) == 0
    assert len(records(photos / "run", kind="epoch", learner="full")) == 3


def test_runs_that_begin_in_one_second(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda format: format.replace("%Y%m%d-%H%M%S", "now"))
    names = [RunFolder.create(None, {}).path.name for _ in range(3)]
    assert names == ["now", "now-2", "now-3"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read"),
        ("[1]", "must hold a JSON object"),
        ("{}", "holds no run"),
        ('{"distill": 3}', "holds no run"),
        ('{"distill": {}}', "must have the settings of distill"),
        ('{"distill": {"arms": ["full"], "colour": 1}}', "colour"),
        ('{"distill": {"arms": ["full"], "lr": "fast"}}', "lr is 'fast'; it must be a number"),
    ],
)
def test_damaged_configs_are_named(tmp_path, capsys, content, said):
    (tmp_path / "config.json").write_text(content)
    assert command.main(["distill", f"--resume={tmp_path}"]) == 2
    assert said in one_sentence(capsys)
    assert (tmp_path / "config.json").read_text() == content


# The command line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "command"),
        (["nonsense"], "nonsense"),
        (["distill", "--alpha=1.5"], "at most 1"),
        (["distill", "--alpha=nan"], "nan"),
        (["distill", "--temperature=0"], "above 0"),
        (["distill", "--epochs=0"], "--epochs"),
        (["distill", "--lr=fast"], "fast"),
        (["distill", "--arms=fused,best"], "alone, reference, fused, cached, full"),
        (["distill", "--data=imagenet"], "imagenet"),
        (["distill", "--teacher-weights=DEFAULT"], "image_size 224"),
        (["distill", "--teacher-weights=/none/such.pth"], "such.pth"),
        (["distill", "--resume=/none/such"], "no config.json"),
        (["distill", "--noise=per-step"], "per-step"),
        (["distill", "--noise-std=0.1"], "noise_std requires noise"),
        (["distill", "--noise=input", "--noise-std=-1"], "at least 0"),
        (["soft-reg", "--noise=pink"], "pink"),
        (["soft-reg", "--epochs=3"], "--epochs is for --model mlp and resnet18, not linear"),
        (["soft-reg", "--model=mlp", "--steps=9"], "--steps is for --model linear, not mlp"),
        (["soft-reg", "--model=vgg"], "vgg"),
        (["soft-reg", "--model=mlp", "--arms=none,pink"], "regularizer"),
        (["soft-reg", "--model=mlp", "--seeds=0"], "--seeds"),
        (["soft-reg", "--model=mlp", "--input-std=inf"], "--input-std"),
        (["soft-reg", "--model=mlp", "--data=cifar10"], "could not be downloaded"),
        (["soft-reg", "--out=/proc/none/such"], "/proc/none/such"),
        (["reproduce", "--sigma=-1"], "--sigma"),
    ],
)
def test_bad_arguments_get_one_sentence(arguments, said, tmp_path, monkeypatch, capsys):
    def offline(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.CIFAR10.download", offline)
    monkeypatch.chdir(tmp_path)
    assert command.main(arguments) == 2
    assert said in one_sentence(capsys)
    # A run that could not start leaves no folder that is then in its own way.
    assert not list(tmp_path.glob("runs/*"))


@pytest.mark.parametrize("name", ["", *command.COMMANDS])
def test_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main([*name.split(), "--help"])
    assert stop.value.code == 0
    assert "usage: kdkernels" in capsys.readouterr().out


def test_help_names_every_default():
    [commands] = (a for a in command.make_parser()._actions if isinstance(a.choices, dict))
    for name, parser in commands.choices.items():
        for action in parser._actions:
            optional = action.option_strings and not action.required and action.nargs != 0
            assert not optional or "(default" in action.help, (name, action.dest)


@pytest.mark.parametrize(
    ("settings", "value", "must"),
    [
        (Distil, {"batch_size": 0}, "a whole number of at least 2"),
        (Distil, {"arms": ("full", "full")}, "different names from alone"),
        (Network, {"input_std": float("nan")}, "a number of at least 0 and at most 1e+06"),
        (Regression, {"noise": "pink"}, "one of per-step, per-sample"),
    ],
    ids=str,
)
def test_ranges_guard_python_as_well(settings, value, must):
    [(name, given)] = value.items()
    with pytest.raises(ValueError) as error:
        settings(**value)
    assert str(error.value).startswith(f"{name} is {given!r}; it must be {must}")


def test_help_needs_no_torch():
    program = (
        "import sys; sys.argv = ['kdkernels']; from kdkernels.__main__ import make_parser; "
        "make_parser().format_help(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_the_command_imports_the_library_when_it_is_used():
    program = (
        "import sys; sys.argv = ['kdkernels']; import kdkernels; "
        "assert 'torch' not in sys.modules; kdkernels.InputNoise(0.1); "
        "sys.exit(not set(kdkernels.__all__) <= set(dir(kdkernels)) or hasattr(kdkernels, 'no'))"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_missing_package_gets_one_sentence(tmp_path):
    program = (
        "import sys; sys.modules['rich'] = None; from kdkernels.__main__ import main; "
        f"sys.exit(main(['soft-reg', '--out', {str(tmp_path / 'run')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "it needs rich" in done.stderr and "pip install torchvision" in done.stderr
