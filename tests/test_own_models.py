"""Distillation of one's own: models by name, the Python call, generations, budget, --config."""

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

from kdkernels import __main__ as command
from kdkernels.train import TrainError, data, distill, distillation, models
from kdkernels.train.run_folder import RunFolder


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
        teacher, student, *digits, epochs=6, lr=3e-3, threads=1, out=str(out), progress=False
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
        teacher, student, *digits, epochs=6, lr=3e-3, threads=1, out=str(out), resume=True,
        progress=False,
    )  # fmt: skip
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


def test_augmented_distillation_asks_once_or_each_step(digits, teacher, tmp_path):
    train, test = data.load("digits", size=16, augment="crop-flip")
    found = distill(
        teacher, Small(10), train.first(100), test, epochs=2, threads=1, progress=False,
        out=str(tmp_path / "new"),
    )  # fmt: skip
    assert records(found.folder, kind="epoch")[0]["learner"] == "fused"
    train, test = data.load("digits", size=16, augment=darker, views=2)
    found = distill(
        teacher, Small(10), train.first(100), test, epochs=3, threads=1, progress=False,
        out=str(tmp_path / "kept"),
    )  # fmt: skip
    assert records(found.folder, kind="epoch")[0]["learner"] == "full"
    with pytest.raises(TrainError, match="--views"):
        distillation.Settings(augment="crop-flip", arms=("full",))
    assert distillation.Settings(augment="crop-flip").arms == ("alone", "reference", "fused")


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
    assert command.main(["distill", *TINY, "--teacher-epochs=2", "--epochs=1", "--arms=alone",
                         f"--out={first}"]) == 0  # fmt: skip
    losses = []
    for name, more in {"dense": [], "top": ["--top-k=10"]}.items():
        kept = tmp_path / f"{name}-predictions"
        call = ["predict-teacher", OWN[0], "--train-samples=200", "--image-size=16", "--threads=1",
                f"--teacher-weights={first}/checkpoints/teacher.safetensors"]  # fmt: skip
        assert command.main([*call, "--dtype=float32", *more, f"--out={kept}"]) == 0
        out = tmp_path / name
        call = ["distill", *TINY, "--epochs=1", f"--temperature={temperature}"]
        assert command.main([*call, "--arms=full", f"--teacher-predictions={kept}",
                             f"--out={out}"]) == 0  # fmt: skip
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
        ("{", "it is no JSON"), ("[1]", "no JSON object"), ('{"temperatur": 1}', "temperatur"),
        ('{"alpha": 3}', "at most 1"),
    ):  # fmt: skip
        config.write_text(content)
        assert command.main([*call, f"--out={out}-2"]) == 2
        err = one_sentence(capsys)
        assert said in err and "best.json" in err
    assert command.main(["distill", "--config=/none/such.json"]) == 2
    assert "No such file" in one_sentence(capsys)


@pytest.mark.parametrize(
    "name",
    ["resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0",
     "shufflenet_v2_x0_5", "squeezenet1_1"],
)  # fmt: skip
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
        [sys.executable, example, tmp_path / "photos", teacher], cwd=tmp_path, text=True,
        capture_output=True,
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "test accuracy" in done.stdout and "report.html" in done.stdout
    student = torchvision.models.mobilenet_v3_small(num_classes=10)
    student.load_state_dict(torch.load(tmp_path / "student.pth"))
