"""kdkernels export: the files, what they compute, training with quantisation, bad input."""

import dataclasses
import json
import os
import shutil
import signal
import sys

import networks
import pytest
import torch
from nightly import of_night
from torch import nn

from kdkernels import __main__ as command
from kdkernels.tools import export
from kdkernels.tools.settings import Export
from kdkernels.train import TrainError, data
from kdkernels.train.run_folder import RunFolder
from kdkernels.train.settings import Distil

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
int8 = pytest.importorskip("kdkernels.tools.int8")

# Steps enough for BatchNorm's running averages to catch up with the weights. At night a MobileNet.
DISTILL = [
    "--train-samples=416",
    "--test-samples=200",
    "--batch-size=16",
    "--image-size=16",
    "--teacher-epochs=1",
    "--epochs=5",
    "--threads=1",
    "--arms=full",
    *of_night([], networks.ARGUMENTS),
]
STUDENT = of_night("mobilenet_v2", "networks:Residual")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of distill that export has not seen."""
    out = tmp_path_factory.mktemp("export") / "run"
    assert command.main(["distill", *DISTILL, f"--out={out}"]) == 0
    return out


@pytest.fixture(scope="module")
def run(finished):
    """The same after export of everything."""
    out = finished.with_name("exported")
    shutil.copytree(finished, out)
    assert command.main(["export", str(out), "--epochs=1", "--threads=1"]) == 0
    return out


@pytest.fixture(scope="module")
def images():
    return data.load("digits", size=16)[1].first(200)


@pytest.fixture(scope="module")
def student(finished):
    _, model = export._networks(Distil(image_size=16, student=STUDENT), 10)
    tensors, _ = RunFolder.open(str(finished)).load("full")
    own = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    model.load_state_dict(own)
    return model.eval()


def session(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])


def one_sentence(capsys):
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "Traceback" not in err
    return err


def copy_of(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "run")


@pytest.mark.parametrize("batch", [1, 7])
def test_onnx_is_the_student(run, student, images, batch):
    x = images.batch(torch.arange(batch))[0]
    found = session(run / "export/full.onnx").run(None, {"images": x.numpy()})[0]
    with torch.no_grad():
        expected = student(x)
    assert found.shape == (batch, 10)
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)


def test_files_are_small_and_right(run, student, images):
    with torch.no_grad():
        x, labels = images.batch(torch.arange(len(images)))
        expected = student(x).argmax(1)
    rows = json.loads((run / "export/results.json").read_text())["arms"]["full"]["rows"]
    rows = {row.pop("format"): row for row in rows}
    assert list(rows) == ["pytorch", "onnx", "int8", "int8-qat"]
    # A student that has learned nothing would agree with anything.
    assert rows["pytorch"]["accuracy"] > 0.5
    for name, end in {"onnx": "", "int8": "-int8", "int8-qat": "-int8-qat"}.items():
        path = run / f"export/full{end}.onnx"
        onnx.checker.check_model(str(path), full_check=True)
        logits = session(path).run(None, {"images": x.numpy()})[0]
        chosen = torch.from_numpy(logits).argmax(1)
        row = rows[name]
        assert row["bytes"] == path.stat().st_size
        assert row["accuracy"] == pytest.approx((chosen == labels).double().mean().item())
        assert row["agreement"] == pytest.approx((chosen == expected).double().mean().item())
        assert set(row["latency"]) == {"1", "32"}
        for latency in row["latency"].values():
            assert 0 < latency["low"] <= latency["median"] <= latency["high"]
    assert rows["onnx"]["agreement"] == 1.0
    assert rows["int8"]["agreement"] >= 0.8  # of a student that trained for seconds
    assert rows["int8-qat"]["accuracy"] >= rows["pytorch"]["accuracy"] - 0.03
    for name in ("int8", "int8-qat"):
        assert 3.0 < rows["onnx"]["bytes"] / rows[name]["bytes"] < 4.0


@pytest.mark.parametrize("end", ["-int8", "-int8-qat"])
def test_every_layer_runs_in_integers(run, tmp_path, end):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    path = run / f"export/full{end}.onnx"
    onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
    before = [node.op_type for node in onnx.load(path).graph.node]
    assert kinds.count("QLinearConv") == before.count("Conv") >= of_night(50, 9)
    assert kinds.count("QLinearAdd") == before.count("Add") > 0
    assert kinds.count("QGemm") == 1
    assert not {"Conv", "FusedConv", "Gemm", "MatMul", "Add", "Clip"} & set(kinds)


def test_file_says_how_to_feed_it(run, images):
    said = onnx.load(run / "export/full.onnx").metadata_props
    said = json.loads({entry.key: entry.value for entry in said}["preprocessing"])
    assert said["shape"] == ["batch", 3, 16, 16]
    pixels = images.pixels[:3].float() / said["divide_by"]
    x = nn.functional.interpolate(pixels, size=(16, 16), mode="bilinear", antialias=True)
    x = (x.expand(-1, 3, -1, -1) - said["mean"][0]) / said["std"][0]
    torch.testing.assert_close(x, images.batch(torch.arange(3))[0])


def test_report_has_the_table(run):
    page = (run / "report.html").read_text()
    assert "Export: the student of arm full" in page and "int8, trained for it" in page


class Small(nn.Module):
    """A residual block, a pool and a linear layer."""

    def __init__(self, classes=4):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU6())
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        x = self.stem(x).relu()
        x = x + self.block(x)
        return self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


@pytest.fixture
def small_run(tmp_path, monkeypatch):
    """A run's folder with small networks in it."""

    def networks(settings, classes):
        return Small(classes), Small(classes)

    monkeypatch.setattr(export, "_networks", networks)
    settings = Distil(image_size=8, batch_size=32, train_samples=160, test_samples=40, epochs=1)
    folder = RunFolder.create(tmp_path / "run", {"distill": dataclasses.asdict(settings)})
    torch.manual_seed(1)
    for name in ("teacher", "full"):
        tensors = {f"model.{k}": v for k, v in Small(10).state_dict().items()}
        folder.save(name, tensors, {"epoch": 1, "measures": {"accuracy": 0.1}})
    return folder


def test_training_lowers_the_loss_and_goes_on_to_the_same_bits(small_run, tmp_path):
    settings = Export(formats=("int8-qat",), epochs=3, lr=1e-2, threads=1)
    made = small_run.path / "export/full-int8-qat.onnx"
    export.run(settings, small_run, lambda *_: None, print)
    expected = made.read_bytes()
    lines = [json.loads(line) for line in (made.parent / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "epoch"]
    assert len(losses) == 3 and losses[2] < losses[1] < losses[0]
    shutil.rmtree(made.parent)

    def stop(learner, done, total):
        assert (learner, total) == ("full-int8-qat", 15)
        if done == 7:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(TrainError, match="the same command again") as stopped:
        export.run(settings, small_run, stop, print)
    assert stopped.value.status == 130
    assert not made.exists()
    steps = []
    export.run(settings, small_run, lambda learner, done, total: steps.append(done), print)
    # It stops after the step in hand, which may be the next one.
    assert steps in (list(range(8, 16)), list(range(9, 16)))
    assert made.read_bytes() == expected
    # More epochs train on; other settings, or fewer epochs, start anew.
    for change, first in ({"epochs": 4}, 16), ({"lr": 1e-3}, 1), ({"epochs": 1}, 1):
        steps.clear()
        asked = dataclasses.replace(settings, **change)
        export.run(asked, small_run, lambda learner, done, total: steps.append(done), print)
        assert steps[0] == first
        assert made.read_bytes() != expected


def test_wrong_network_is_named(small_run, capsys):
    tensors = {f"model.{k}": v for k, v in Small(7).state_dict().items()}
    small_run.save("full", tensors, {"epoch": 1})
    assert command.main(["export", str(small_run.path)]) == 2
    assert "is of another model: size mismatch" in one_sentence(capsys)


@pytest.fixture
def small():
    torch.manual_seed(0)
    model = Small()
    x = torch.randn(64, 3, 8, 8)
    for _ in range(20):
        model(x)
    return model.eval(), x


def test_fake_quantised_is_near_and_learns_on_its_own(small):
    model, x = small
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        expected = model(x)
    fake = int8.FakeQuantised(model, x).eval()
    spread = expected.max() - expected.min()
    with torch.no_grad():
        first = fake(x)
    assert 0 < (first - expected).abs().max() < 0.05 * spread
    optimizer = torch.optim.Adam(fake.parameters(), 1e-2)
    labels = torch.arange(64) % 4
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(fake.train()(x), labels)
        loss.backward()
        # Weights and biases of three layers with BatchNorm folded in: all of them learn.
        assert [p.grad.abs().max() > 0 for p in fake.parameters()] == [True] * 6
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    # What is deployed is what was trained: the same numbers, but that a sum at the border of two
    # integers may round the other way, which is one step of the output's 255.
    fake.eval()
    with torch.no_grad():
        expected = fake(x)
        found = int8.converted(fake.graph)(x)
    step = (expected.max() - expected.min()) / 255
    assert (found - expected).abs().max() <= 1.01 * step
    assert (found == expected).double().mean() > 0.9


def test_ranges_stay_in_eval_mode(small):
    model, x = small
    fake = int8.FakeQuantised(model, x).eval()
    with torch.no_grad():
        before = fake(x)
        fake(100 * x)
        assert torch.equal(fake(x), before)
        fake.train()(100 * x)
        assert not torch.equal(fake.eval()(x), before)


class Shared(nn.Module):
    """One convolution under two BatchNorms."""

    def __init__(self):
        super().__init__()
        self.first, self.conv = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.one, self.other, self.head = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.Linear(8, 10)

    def forward(self, x):
        x = 3 * self.one(self.conv(self.first(x))).relu()
        return self.head(self.other(self.conv(x)).relu().mean((2, 3)))


class Skip(nn.Module):
    """A convolution whose output goes to BatchNorm, and past it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 10)

    def forward(self, x):
        x = self.conv(x)
        return self.head((self.norm(x) + x).mean((2, 3)))


@pytest.mark.parametrize("make", [Shared, Skip])
def test_a_convolution_that_batch_norm_shares(images, make):
    torch.manual_seed(0)
    model, x = make(), images.batch(torch.arange(32))[0]
    with torch.no_grad():
        for k in range(3):
            model(x * (1 + k) + 0.3 * k)
        model.eval()
        graph = int8.calibrate(model, list(x.split(16)))
        torch.testing.assert_close(graph(x), model(x), rtol=1e-5, atol=1e-5)
        trained = int8.FakeQuantised(model, x)
        assert (trained(x) - model(x)).abs().max() < 0.1 * model(x).abs().max()


class Branches(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.head = nn.Linear(768, num_classes)

    def forward(self, x):
        return self.head(x.flatten(1)) if x.sum() > -1e9 else self.head(-x.flatten(1))


def test_a_student_that_cannot_be_exported(finished, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    call = ["distill", *DISTILL, "--teacher-epochs=0", "--student=test_export:Branches"]
    assert command.main([*call, "--epochs=1", f"--out={out}"]) == 0
    assert command.main(["export", str(out), "--formats=onnx,int8", "--threads=1"]) == 1
    assert "the student Branches cannot be exported" in one_sentence(capsys)
    # What can be made is made.
    made, onnx_of = copy_of(finished, tmp_path / "partly"), export._onnx

    def refuses(model, run):
        if model is run.student:
            raise TrainError("ONNX lacks it", status=1)
        return onnx_of(model, run)

    monkeypatch.setattr(export, "_onnx", refuses)
    assert command.main(["export", str(made), "--formats=onnx,int8", "--threads=1"]) == 1
    assert one_sentence(capsys) == "kdkernels export: onnx: ONNX lacks it\n"
    assert (made / "export/full-int8.onnx").exists()


def test_one_sentence_for_what_is_not_there(finished, tmp_path, capsys, monkeypatch):
    assert command.main(["export", str(tmp_path)]) == 2
    assert "config.json" in one_sentence(capsys)
    assert command.main(["export", str(finished), "--arm=fused"]) == 2
    assert "no checkpoint of an arm fused; there are: full" in one_sentence(capsys)
    assert command.main(["export", str(finished), "--arm=teacher"]) == 2
    assert "there are: full" in one_sentence(capsys)
    assert command.main(["export", str(finished), "--formats=onnx,int4"]) == 2
    assert "int4" in one_sentence(capsys)
    assert command.main(["export"]) == 2
    assert "RUN_DIR" in one_sentence(capsys)
    monkeypatch.setitem(sys.modules, "torchao", None)
    assert command.main(["export", str(finished)]) == 2
    said = one_sentence(capsys)
    assert "needs torchao" in said and "onnx onnxscript onnxruntime torchao" in said
    assert not (finished / "export").exists()


def test_unfinished_and_foreign_runs_are_refused(finished, tmp_path, capsys):
    copy = copy_of(finished, tmp_path)
    config = json.loads((copy / "config.json").read_text())
    config["distill"]["epochs"] = 50
    (copy / "config.json").write_text(json.dumps(config))
    assert command.main(["export", str(copy)]) == 2
    assert "5 of 50 epochs" in (said := one_sentence(capsys)) and f"--resume {copy}" in said
    (copy / "checkpoints/full.safetensors").write_bytes(b"torn")
    assert command.main(["export", str(copy)]) == 2
    assert "cannot be read" in one_sentence(capsys)
    (copy / "config.json").write_text(json.dumps({"command": "soft-reg"}))
    assert command.main(["export", str(copy)]) == 2
    assert "no run of distill" in one_sentence(capsys)
    assert not (copy / "export").exists()


def test_without_a_teacher_the_other_formats_are_named(finished, tmp_path, capsys):
    copy = copy_of(finished, tmp_path)
    (copy / "checkpoints/teacher.safetensors").unlink()
    assert command.main(["export", str(copy), "--formats=int8-qat"]) == 2
    assert "teacher.safetensors" in one_sentence(capsys)
