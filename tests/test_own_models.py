"""Distillation of one's own: models by name, the Python call, generations, budget, --config."""

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import kdkernels
from kdkernels import __main__ as command
from kdkernels import reports
from kdkernels.train import TrainError, data, distill, models
from kdkernels.train.run_folder import RunFolder
from kdkernels.train.settings import Distil


class Small(nn.Module):
    """A convolution with BatchNorm, dropout and a linear head: quick to train."""

    def __init__(self, num_classes, width=8):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(width * 16, num_classes)

    def forward(self, x):
        x = nn.functional.adaptive_avg_pool2d(self.norm(self.conv(x)).relu(), 4)
        return self.head(self.drop(x.flatten(1)))


def wide(num_classes):
    return Small(num_classes, width=32)


def darker(image):
    """An augmentation of one's own."""
    return (image * torch.rand(())).to(torch.uint8)


def not_a_model(num_classes):
    return num_classes


OWN = ["--teacher=test_own_models:wide", "--student=test_own_models:Small"]
TINY = [*OWN, "--train-samples=200", "--test-samples=60", "--image-size=16", "--threads=1"]


def records(folder, **wanted):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if wanted.items() <= line.items()]


def one_sentence(capsys):
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "Traceback" not in err
    return err


@pytest.fixture(scope="module")
def digits():
    train, test = data.load("digits", size=16)
    return train.first(400), test.first(100)


@pytest.fixture(scope="module")
def teacher(digits):
    torch.manual_seed(0)
    model = wide(10)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(15):
        for index in torch.arange(400).split(50):
            images, labels = digits[0].batch(index)
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step(), optimizer.zero_grad()
    return model


def test_distill_own_models(digits, teacher, tmp_path, capsys):
    student = Small(10)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    out = tmp_path / "run"
    found = distill(
        teacher,
        student,
        *digits,
        epochs=6,
        lr=3e-3,
        threads=1,
        out=str(out),
        progress=False,
        report=reports.write,
    )
    assert found.folder == out and (out / "report.html").exists()
    assert all(torch.equal(before[key], value) for key, value in student.state_dict().items())
    assert found.accuracy > 0.6  # a tenth by chance
    images, labels = digits[1].batch(torch.arange(100))
    with torch.no_grad():
        right = found.student(images).argmax(1) == labels
    assert right.double().mean().item() == found.accuracy
    kept = load_file(out / "checkpoints/full.safetensors")
    assert torch.equal(kept["model.conv.weight"], found.student.conv.weight)
    losses = [line["loss"] for line in records(out, kind="step", learner="full")]
    assert sum(losses[-5:]) / 5 < 0.7 * losses[0]
    capsys.readouterr()
    # More epochs go on from there.
    again = distill(
        teacher,
        student,
        *digits,
        epochs=6,
        lr=3e-3,
        threads=1,
        out=str(out),
        resume=True,
        progress=False,
    )
    assert again.accuracy == found.accuracy and not capsys.readouterr().out
    with pytest.raises(TrainError, match="is in use"):
        distill(teacher, student, *digits, out=str(out))


def test_distill_refuses(digits, teacher, tmp_path):
    train, test = digits
    with pytest.raises(TypeError, match="image_size"):
        distill(teacher, Small(10), train, test, image_size=16)
    with pytest.raises(TypeError, match="epoch"):
        distill(teacher, Small(10), train, test, epoch=3)
    other = data.load("digits", size=24)[1]
    with pytest.raises(TrainError, match="16 pixels.*24"):
        distill(teacher, Small(10), train, other)
    with pytest.raises(TrainError, match="no parameter of the divergence forward_kl"):
        distill(teacher, Small(10), train, test, beta=0.5)


def refused(match, teacher, student, train, test, tmp_path, **settings):
    """One sentence, and no folder of a run that could not start."""
    with pytest.raises(TrainError, match=match):
        distill(
            teacher,
            student,
            train,
            test,
            out=str(tmp_path / "refused"),
            progress=False,
            **{"threads": 1} | settings,
        )
    assert not (tmp_path / "refused").exists()


class Gives(nn.Module):
    """A model whose output is made into something else than logits."""

    def __init__(self, what, classes=10):
        super().__init__()
        self.net, self.what = Small(classes), what

    def forward(self, x):
        return self.what(self.net(x), self.training)


def test_outputs_that_are_no_logits(digits, teacher, tmp_path):
    cases = {
        "student gives a tuple in training": Gives(lambda y, training: (y, y) if training else y),
        "student gives a dict in evaluation": Gives(lambda y, _: {"logits": y}),
        r"student gives torch.float32 of shape \[2, 3\].*of shape \[2, 10\]": Small(3),
        "student gives torch.int64": Gives(lambda y, _: y.argmax(1, keepdim=True).expand(-1, 10)),
    }
    for match, student in cases.items():
        refused(match, teacher, student, *digits, tmp_path)
    new_views = data.load("digits", size=16, augment="crop")[0]
    for images in (digits[0], new_views):
        wrong = Small(1000)
        refused(r"the teacher gives .*\[2, 1000\]", wrong, Small(10), images, digits[1], tmp_path)
    refused("teacher gives a tuple", Gives(lambda y, _: (y,)), Small(10), *digits, tmp_path)


def test_models_that_do_not_take_the_images_or_cannot_learn(digits, teacher, tmp_path):
    grey = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.LazyLinear(10))
    refused(
        r"student Sequential does not take images of shape \[2, 3, 16, 16\].*1 channel",
        teacher,
        grey,
        *digits,
        tmp_path,
    )
    refused("must be torch.float32", teacher, Small(10).half(), *digits, tmp_path)
    refused("must be torch.float32", Small(10).double(), Small(10), *digits, tmp_path)
    refused(
        "no parameter that requires grad",
        teacher,
        Small(10).requires_grad_(False),
        *digits,
        tmp_path,
    )
    refused(
        "no parameter that requires grad",
        teacher,
        Gives(lambda y, _: y).requires_grad_(False),
        *digits,
        tmp_path,
    )
    stuck = Small(10)
    stuck.cannot = (torch.ones(2, requires_grad=True) * 2).sum()  # no leaf: it has no copy
    refused("student Small cannot be copied", teacher, stuck, *digits, tmp_path)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside = nn.Linear(48, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.layer(self.inside(x.permute(0, 2, 1, 3).flatten(2))).mean(1))


def test_the_regularizer_needs_a_second_derivative(digits, teacher, tmp_path):
    frozen = Small(10)
    frozen.conv.requires_grad_(False)
    before = frozen.conv.weight.clone()
    options = {"epochs": 1, "threads": 1, "progress": False, "noise": "regularizer"}
    train = digits[0].first(100)
    found = distill(teacher, frozen, train, digits[1], out=str(tmp_path / "a"), **options)
    assert torch.equal(found.student.conv.weight, before)
    assert not torch.equal(found.student.head.weight, frozen.head.weight)
    refused(
        "requires a model that can be differentiated twice",
        teacher,
        Attention(),
        *digits,
        tmp_path,
        noise="regularizer",
    )


def test_a_model_made_by_its_first_images(digits, teacher, tmp_path):
    options = {"epochs": 2, "threads": 1, "progress": False, "lr": 1e-2}
    lazy = nn.Sequential(nn.Flatten(), nn.LazyLinear(10))
    found = distill(teacher, lazy, *digits, out=str(tmp_path / "run"), **options)
    assert found.accuracy > 0.5 and nn.parameter.is_lazy(lazy[1].weight)


@pytest.mark.parametrize(
    "settings",
    [
        {"schedule": "linear"},
        {"schedule": "Cosine"},
        {"weight_decay": -1.0},
        {"target_accuracy": 95},
        {"parallel": "dp"},
        {"epochs": 1.5},
        {"epochs": True},
        {"divergence": "kl"},
        {"noise": "dropout"},
        {"generations": 0},
        {"checkpoint_every": 0},
        {"lr": float("nan")},
        {"lr": "1e-3"},
        {"temperature": 0},
        {"alpha": 1.01},
        {"batch_size": 1},
        {"batch_size": 0},
        {"arms": "full"},
        {"arms": ()},
        {"arms": ("best",)},
        {"arms": ("full", "full")},
        {"seed": -1},
        {"device": "gpu"},
        {"budget": 0},
        {"threads": 0},
        {"train_samples": 1},
        {"noise_std": -1},
        {"beta": 2},
        {"epochs": None},
    ],
    ids=str,
)
def test_settings_that_do_not_exist_are_named(digits, teacher, tmp_path, settings):
    match = f"{next(iter(settings))} is .*must be"
    refused(match, teacher, Small(10), *digits, tmp_path, **{"noise": None} | settings)


def test_a_wrong_setting_is_a_value_error(digits, teacher):
    with pytest.raises(
        ValueError, match="batch_size is 0; it must be a whole number of at least 2"
    ):
        distill(teacher, Small(10), *digits, batch_size=0)


def test_what_is_no_model_and_no_images(digits, teacher, tmp_path):
    with pytest.raises(TypeError, match=r"teacher is a function; it must be a torch\.nn"):
        distill(lambda x: x, Small(10), *digits)
    with pytest.raises(
        TypeError, match="train is a list; it must be a kdkernels.train.images.Images"
    ):
        distill(teacher, Small(10), [], digits[1])
    train, test = digits
    labels = train.labels.clone()
    labels[0] = 10
    wrong = dataclasses.replace(train, labels=labels)
    refused(
        "labels from 0 to 10; they must be from 0 to 9", teacher, Small(10), wrong, test, tmp_path
    )
    wrong = dataclasses.replace(train, labels=train.labels.float())
    refused("they must be int64", teacher, Small(10), wrong, test, tmp_path)
    refused("test has 0 images", teacher, Small(10), train, test.first(0), tmp_path)
    other = dataclasses.replace(test, names=tuple("9876543210"))
    refused("as its classes' names, test", teacher, Small(10), train, other, tmp_path)


def test_a_student_that_shares_modules_with_its_teacher(digits, teacher, tmp_path):
    """It starts from them and learns; the teacher stays as it is, twice in a row."""
    options = {"epochs": 1, "threads": 1, "progress": False, "lr": 0.01}
    train = digits[0].first(100)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    for number in range(2):
        student = nn.Sequential(teacher.conv, nn.Flatten(), nn.LazyLinear(10))
        found = distill(
            teacher, student, train, digits[1], out=str(tmp_path / f"{number}"), **options
        )
        assert not torch.equal(found.student[0].weight, before["conv.weight"])
        found = distill(
            teacher, teacher, train, digits[1], out=str(tmp_path / f"{number}s"), **options
        )
        assert not torch.equal(found.student.conv.weight, before["conv.weight"])
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


class Counts(nn.Module):
    """Extra state that is no tensor, and changes."""

    def __init__(self):
        super().__init__()
        self.seen = {"images": 0, "last": torch.zeros(2)}

    def forward(self, x):
        if self.training:
            self.seen = {"images": self.seen["images"] + len(x), "last": x.detach().flatten()[:2]}
        return x

    def get_extra_state(self):
        return self.seen

    def set_extra_state(self, state):
        self.seen = state


class Tied(nn.Module):
    """One weight under three names, a module under two, seeds and counts beside them."""

    def __init__(self):
        super().__init__()
        self.noise, self.counts = kdkernels.InputNoise(0.5), Counts()
        self.a, self.b, self.c = nn.Linear(768, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.c.weight = self.b.weight
        self.again, self.head = self.b, nn.Linear(32, 10)

    def forward(self, x):
        x = self.a(self.counts(self.noise(x)).flatten(1)).relu()
        return self.head(self.again(self.c(self.b(x))))


def test_states_that_are_no_plain_tensors_resume_with_the_same_bits(digits, teacher, tmp_path):
    options = {"threads": 1, "progress": False}
    train = digits[0].first(100)
    start = Tied()
    go = lambda student, out, **more: distill(  # noqa: E731
        teacher, student, train, digits[1], out=str(tmp_path / out), **options, **more
    )
    whole = go(start, "whole", epochs=2).student
    go(start, "parts", epochs=1)
    parts = go(Tied(), "parts", epochs=2, resume=True).student  # its seed is another
    assert parts.noise.seed == whole.noise.seed == start.noise.seed
    assert parts.c.weight is parts.b.weight and parts.again is parts.b
    assert parts.counts.seen["images"] == whole.counts.seen["images"] == 200
    assert torch.equal(parts.counts.seen["last"], whole.counts.seen["last"])
    for key, value in whole.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(parts.state_dict()[key], value), key
    # The checkpoint is what a teacher's weights may be.
    path = str(tmp_path / "whole/checkpoints/full.safetensors")
    loaded, ready = models.build("test_own_models:tied", 10, 16, path)
    assert ready and loaded.counts.seen["images"] == 200
    assert torch.equal(loaded.b.weight, whole.b.weight) and loaded.noise.seed == start.noise.seed
    odd = Tied()
    odd.counts.get_extra_state = object
    refused(
        "counts._extra_state is a object that a checkpoint cannot",
        teacher,
        odd,
        train,
        digits[1],
        tmp_path,
    )


def tied(num_classes):
    return Tied()


def test_a_resume_with_something_else_is_refused_by_name(digits, teacher, tmp_path):
    out = tmp_path / "run"
    train, test = digits[0].first(100), digits[1]
    options = {"threads": 1, "progress": False, "out": str(out), "temperature": 2.0, "lr": 2e-3}
    distill(teacher, Small(10), train, test, epochs=1, **options)
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def refuse(match, train=train, test=test, teacher=teacher, student=None, **more):
        with pytest.raises(TrainError, match=match):
            distill(
                teacher,
                student or Small(10),
                train,
                test,
                resume=True,
                **options | {"epochs": 2} | more,
            )
        assert files == {path: path.read_bytes() for path in files}

    refuse(
        "temperature is 1.0, and the run in .* began with 2.0: it must be the same", temperature=1
    )
    refuse("lr is 1.0", lr=1.0)
    refuse("divergence is 'js'", divergence="js")
    refuse("student is 'Tied'", student=Tied())
    refuse("another training set: the number of images", train=digits[0].first(90))
    refuse("another test set: the number of images", test=test.first(50))
    refuse(
        "another training set: the images or labels",
        train=dataclasses.replace(train, pixels=train.pixels.flip(0), _pixels_sha256=None),
    )
    refuse("resume=True requires out", out=None)
    with pytest.warns(UserWarning, match="teacher is not the one that the run .* began with"):
        distill(wide(10), Small(10), train, test, resume=True, epochs=2, **options)
    assert RunFolder.open(str(out)).config["distill"]["epochs"] == 2
    crops = data.load("digits", size=16, augment="crop")[0].first(100)  # asks at each step
    options["out"] = str(tmp_path / "asks")
    distill(teacher, Small(10), crops, test, epochs=1, **options)
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    refuse("another teacher model: the model's weights differ", train=crops, teacher=wide(10))


def test_a_run_of_python_is_refused_by_the_command(digits, teacher, tmp_path, capsys):
    out = tmp_path / "run"
    distill(
        teacher,
        Small(10),
        digits[0].first(50),
        digits[1],
        out=str(out),
        epochs=1,
        threads=1,
        progress=False,
    )
    assert command.main(["distill", f"--resume={out}", "--epochs=2"]) == 2
    assert "were given in Python: continue it there" in one_sentence(capsys)


def test_a_tilde_is_the_home_folder(digits, teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    options = {"epochs": 1, "threads": 1, "progress": False, "report": reports.write}
    distill(teacher, Small(10), digits[0].first(50), digits[1], out="~/run", **options)
    torch.save(wide(10).state_dict(), tmp_path / "home/t.pth")
    call = ["distill", *TINY, "--teacher-weights=~/t.pth", "--epochs=1", "--arms=full"]
    assert command.main([*call, "--out=~/other"]) == 0
    assert command.main(["distill", "--resume=~/other"]) == 0
    assert (tmp_path / "home/run/report.html").exists() and not (tmp_path / "~").exists()


def test_augmented_distillation_asks_once_or_each_step(digits, teacher, tmp_path):
    train, test = data.load("digits", size=16, augment="crop-flip")
    found = distill(
        teacher,
        Small(10),
        train.first(100),
        test,
        epochs=2,
        threads=1,
        progress=False,
        out=str(tmp_path / "new"),
    )
    assert records(found.folder, kind="epoch")[0]["learner"] == "fused"
    train, test = data.load("digits", size=16, augment=darker, views=2)
    found = distill(
        teacher,
        Small(10),
        train.first(100),
        test,
        epochs=3,
        threads=1,
        progress=False,
        out=str(tmp_path / "kept"),
    )
    assert records(found.folder, kind="epoch")[0]["learner"] == "full"
    with pytest.raises(TrainError, match="give views"):
        Distil(augment="crop-flip", arms=("full",))
    assert Distil(augment="crop-flip").arms == ("alone", "reference", "fused")


def test_kept_and_asked_teacher_agree(tmp_path):
    """The arms differ in who holds the teacher's predictions, not in what they learn."""
    out = tmp_path / "run"
    call = ["distill", *TINY, "--epochs=1", "--teacher-epochs=1", "--arms=fused,cached"]
    for more in ([], ["--augment=crop-flip", "--views=2", f"--out={out}-views"]):
        assert command.main([*call, f"--out={out}", *more]) == 0
        folder = tmp_path / ("run-views" if more else "run")
        fused, cached = (
            torch.tensor([line["loss"] for line in records(folder, kind="step", learner=name)])
            for name in ("fused", "cached")
        )
        torch.testing.assert_close(fused, cached, rtol=1e-3, atol=0)


def test_generations_and_budget(tmp_path):
    out = tmp_path / "run"
    call = ["distill", *TINY, "--epochs=2", "--teacher-epochs=1", "--arms=alone,full"]
    assert command.main([*call, "--generations=3", f"--out={out}"]) == 0
    names = {line["learner"] for line in records(out, kind="epoch")}
    assert names == {"teacher", "alone", "full", "full-g2", "full-g3"}
    # The second generation learns from the first one's predictions of the training images.
    student = Small(10)
    state = load_file(out / "checkpoints/full.safetensors")
    student.load_state_dict(
        {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
    )
    train = data.load("digits", size=16)[0].first(200)
    with torch.no_grad():
        expected = student.eval()(train.batch(torch.arange(200))[0])
    from kdkernels.train.predictions import Predictions

    rows = Predictions.open(out / "predictions/full").rows(torch.arange(200), None)
    torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-4)
    kept = load_file(out / "checkpoints/full-g3-test.safetensors")
    assert kept["logits"].shape == (60, 10) and kept["labels"].shape == (60,)

    out = tmp_path / "budget"
    call[3:3] = ["--budget=1e-6"]
    assert command.main([*call, "--epochs=5", f"--out={out}"]) == 0
    assert len(records(out, kind="epoch", learner="full")) == 1


def test_cosine_schedule_and_weight_decay(tmp_path):
    runs = {"plain": [], "cosine": ["--schedule=cosine"], "decay": ["--weight-decay=0.1"]}
    weights = {}
    for name, more in runs.items():
        call = ["distill", *TINY, "--epochs=2", "--teacher-epochs=1", "--arms=alone", *more]
        assert command.main([*call, f"--out={tmp_path / name}"]) == 0
        state = load_file(tmp_path / name / "checkpoints/alone.safetensors")
        weights[name] = state["model.head.weight"]
    lines = records(tmp_path / "cosine", kind="epoch", learner="alone")
    steps = lines[-1]["step"]
    expected = [(1 + math.cos(math.pi * (line["step"] - 1) / steps)) / 2 for line in lines]
    assert [line["lr"] for line in lines] == pytest.approx([1e-3 * value for value in expected])
    assert not torch.equal(weights["cosine"], weights["plain"])
    # AdamW takes lr * decay of every weight at each step, and Adam's own steps stay near.
    shrunk = weights["plain"] * (1 - 1e-3 * 0.1) ** steps
    assert (weights["decay"] - shrunk).abs().max() < 0.2 * 1e-3 * steps
    assert not torch.equal(weights["decay"], weights["plain"])


def test_validation_holds_training_images_out(tmp_path):
    out = tmp_path / "run"
    call = ["distill", *TINY, "--epochs=1", "--teacher-epochs=1", "--arms=full"]
    assert command.main([*call, "--validation=0.25", f"--out={out}", "--test-samples=2000"]) == 0
    train, _ = data.load("digits", size=16)
    held_out = load_file(out / "checkpoints/full-test.safetensors")["labels"]
    assert len(held_out) == len(train) - len(train.split(0.25, seed=0)[0])
    assert abs(len(held_out) - 0.25 * len(train)) < 10


@pytest.mark.parametrize("temperature", [1, 4])
def test_all_classes_as_top_k_are_the_dense_predictions(tmp_path, temperature):
    """With k = classes nothing is left out, so the two kinds of predictions teach the same."""
    first = tmp_path / "teacher"
    assert (
        command.main(
            ["distill", *TINY, "--teacher-epochs=2", "--epochs=1", "--arms=alone", f"--out={first}"]
        )
        == 0
    )
    losses = []
    for name, more in {"dense": [], "top": ["--top-k=10"]}.items():
        kept = tmp_path / f"{name}-predictions"
        call = [
            "predict-teacher",
            OWN[0],
            "--train-samples=200",
            "--image-size=16",
            "--threads=1",
            f"--teacher-weights={first}/checkpoints/teacher.safetensors",
        ]
        assert command.main([*call, "--dtype=float32", *more, f"--out={kept}"]) == 0
        out = tmp_path / name
        call = ["distill", *TINY, "--epochs=1", f"--temperature={temperature}"]
        assert (
            command.main([*call, "--arms=full", f"--teacher-predictions={kept}", f"--out={out}"])
            == 0
        )
        losses.append([line["loss"] for line in records(out, kind="step", learner="full")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("divergence", ["reverse_kl", "js", "total_variation"])
def test_divergences_follow_their_reference(tmp_path, divergence):
    out = tmp_path / "run"
    beta = ["--beta=0.2"] if divergence == "js" else []
    call = ["distill", *TINY, "--epochs=1", "--teacher-epochs=1", "--arms=reference,fused"]
    assert command.main([*call, f"--divergence={divergence}", *beta, f"--out={out}"]) == 0
    for line in records(out, kind="step", learner="fused"):
        assert line["twin"] == pytest.approx(line["loss"], rel=1e-5)


def test_config_file(tmp_path, capsys):
    config = tmp_path / "best.json"
    config.write_text(
        json.dumps({"temperature": 2.5, "arms": ["full"], "divergence": "js", "beta": 0.25})
    )
    out = tmp_path / "run"
    call = ["distill", *TINY, f"--config={config}", "--epochs=1", "--teacher-epochs=1"]
    assert command.main([*call, "--beta=0.75", f"--out={out}"]) == 0
    settings = RunFolder.open(str(out)).config["distill"]
    assert settings["temperature"] == 2.5 and settings["arms"] == ["full"]
    assert settings["divergence"] == "js" and settings["beta"] == 0.75
    capsys.readouterr()
    for content, said in (
        ("{", "it is no JSON"),
        ("[1]", "no JSON object"),
        ('{"temperatur": 1}', "temperatur"),
        ('{"alpha": 3}', "at most 1"),
    ):
        config.write_text(content)
        assert command.main([*call, f"--out={out}-2"]) == 2
        err = one_sentence(capsys)
        assert said in err and "best.json" in err
    assert command.main(["distill", "--config=/none/such.json"]) == 2
    assert "No such file" in one_sentence(capsys)


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "resnet50",
        "mobilenet_v2",
        "mobilenet_v3_small",
        "efficientnet_b0",
        "shufflenet_v2_x0_5",
        "squeezenet1_1",
    ],
)
def test_torchvisions_models(name):
    model, ready = models.build(name, 7, 32)
    assert not ready
    with torch.no_grad():
        assert model.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_a_new_last_layer_or_the_old_one(tmp_path):
    torch.manual_seed(1)
    trained, _ = models.build("mobilenet_v3_small", 7, 32)
    path = str(tmp_path / "weights.pth")
    torch.save(trained.state_dict(), path)
    model, ready = models.build("mobilenet_v3_small", 7, 32, path)
    assert ready
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), trained.eval()(x))
    model, ready = models.build("mobilenet_v3_small", 5, 32, path)
    assert not ready
    assert torch.equal(model.features[0][0].weight, trained.features[0][0].weight)
    with pytest.raises(TrainError, match="are not of mobilenet_v2"):
        models.build("mobilenet_v2", 7, 32, path)


def boxed(num_classes):
    """A model whose names begin as a wrapper's do."""
    model = Small(num_classes)
    box = nn.Module()
    box.model, box.head, box.forward = nn.Sequential(model.conv, model.norm), model.head, None
    return box


@pytest.mark.parametrize("name", ["Small", "boxed"])
def test_weights_in_usual_wrappings(tmp_path, name):
    maker = {"Small": Small, "boxed": boxed}[name]
    torch.manual_seed(1)
    own = maker(10).state_dict()
    path = str(tmp_path / "t.pth")

    def prefixed(*prefixes):
        return {p + k: v for p in prefixes for k, v in own.items()}

    inner = {"model._orig_mod." + k: v for k, v in own.items()}
    wrapped = [
        own,
        prefixed("module."),
        prefixed("_orig_mod."),
        prefixed("module._orig_mod."),
        prefixed("model."),
        {"model": own, "epoch": 3},
        {"model_state_dict": own, "optimizer": {}},
        {"state_dict": prefixed("model."), "epoch": 3},
        {"weights": own},
        prefixed("net.") | {"loss.weight": torch.ones(3)},
        inner,
        {k.replace(".", "._orig_mod.", 1): v for k, v in own.items()},
    ]
    for number, content in enumerate(wrapped):
        torch.save(content, path)
        model, ready = models.build(f"test_own_models:{name}", 10, 16, path)
        assert ready, number
        assert all(torch.equal(v, own[k]) for k, v in model.state_dict().items()), number

    def refused(content, match):
        torch.save(content, path)
        with pytest.raises(TrainError, match=match):
            models.build(f"test_own_models:{name}", 10, 16, path)

    refused([own], "are a list; they must be a state_dict")
    refused({"state_dict": own, "args": argparse.Namespace()}, "must be saved as model.state_dict")
    refused(maker, "must be saved as model.state_dict")
    refused(prefixed("teacher.", "student."), r"hold several such models \(student., teacher.\)")
    refused({"ema": own, "online": own}, "hold several dicts \\(ema, online\\)")
    (tmp_path / "t.pth").write_bytes(b"no weights")
    with pytest.raises(TrainError, match="t.pth cannot be read"):
        models.build(f"test_own_models:{name}", 10, 16, path)


def test_weights_that_are_tied_may_be_there_once(tmp_path):
    own = Tied().state_dict()
    path = str(tmp_path / "t.pth")
    torch.save({k: v for k, v in own.items() if k != "c.weight"}, path)
    model, ready = models.build("test_own_models:tied", 10, 16, path)
    assert ready and torch.equal(model.c.weight, own["b.weight"])


@pytest.mark.parametrize("student", ["alexnet", "vit_b_16", "googlenet"])
def test_students_that_do_not_fit_get_one_sentence(tmp_path, capsys, student):
    call = ["distill", *TINY, f"--student={student}", f"--out={tmp_path / 'run'}"]
    assert command.main(call) == 2
    err = one_sentence(capsys)
    assert "the student" in err and ("image_size" in err or "gives a" in err)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("resnet81", "neither one of torchvision's"),
        ("test_own_models:nothing", "cannot be imported"),
        ("no_such_module:model", "cannot be imported"),
        ("test_own_models:not_a_model", "gave a int"),
        ("test_own_models:records", "takes no num_classes"),
    ],
)
def test_wrong_models_get_one_sentence(name, said):
    with pytest.raises(TrainError, match=said):
        models.build(name, 10, 32)


def test_the_readmes_path_with_your_own_images(tmp_path):
    """docs/examples/own_images.py, as it stands, on a folder of PNGs and a saved teacher."""
    parts = zip(("train", "test"), data.load("digits", size=16), (60, 20), strict=True)
    for name, images, count in parts:
        for number in range(count):
            folder = tmp_path / "photos" / name / f"digit {images.labels[number]}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = (images.pixels[number, 0].float() / 16 * 255).byte().numpy()
            Image.fromarray(pixels).save(folder / f"{number}.png")
    teacher = tmp_path / "teacher.pth"
    torch.save(torchvision.models.resnet18(num_classes=10).state_dict(), teacher)
    example = Path(__file__).parent.parent / "docs/examples/own_images.py"
    done = subprocess.run(
        [sys.executable, example, tmp_path / "photos", teacher],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "test accuracy" in done.stdout and "report.html" in done.stdout
    student = torchvision.models.mobilenet_v3_small(num_classes=10)
    student.load_state_dict(torch.load(tmp_path / "student.pth"))
