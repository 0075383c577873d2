"""Code that people copy runs: the examples of docstrings, the README's blocks in order, and those
blocks of docs/ that the site shows without running them.
"""

import doctest
import importlib
import pkgutil
import re
import types
from pathlib import Path

import ptx
import pytest
import torch
from torch import nn

import kdkernels

ROOT = Path(__file__).resolve().parent.parent
MODULES = [
    module.name
    for module in pkgutil.walk_packages(kdkernels.__path__, "kdkernels.")
    if module.name not in ("kdkernels._C", "kdkernels.__main__")
]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # all of it is small
    yield
    torch.set_num_threads(threads)


def test_docstrings():
    """Every example gives what it says; model, loss_fn, x and y are the reader's."""
    datasets = pytest.importorskip("sklearn.datasets")
    theirs = {
        "kdkernels": kdkernels,
        "torch": torch,
        "nn": nn,
        "sklearn": types.SimpleNamespace(datasets=datasets),
        "loss_fn": nn.functional.cross_entropy,
        "x": torch.randn(32, 64),
        "y": torch.randint(10, (32,)),
    }
    runner, finder = doctest.DocTestRunner(), doctest.DocTestFinder(exclude_empty=True)
    ran = set()
    for name in MODULES:
        for test in finder.find(importlib.import_module(name), globs=theirs):
            test.globs["model"] = nn.Linear(64, 10)
            if test.examples:
                ran.add(test.name.rsplit(".", 1)[-1])
                runner.run(test)
    assert not runner.failures, f"{runner.failures} of {runner.tries} lines of examples fail"
    often_used = {
        "DistillationLoss",
        "GradientNoise",
        "InputNoise",
        "NoisyAdamW",
        "add_noise_",
        "distillation_loss",
        "input_noise",
        "linear_distillation_loss",
        "randn_like",
        "soft_regularization",
        "topk_distillation_loss",
        "topk_teacher",
    }
    assert often_used <= ran


@pytest.fixture
def photos(tmp_path):
    """A folder of images and the weights of a teacher, as the reader of docs/train.md has them."""
    image, models = pytest.importorskip("PIL.Image"), pytest.importorskip("torchvision.models")
    for number in range(12):
        part = "train" if number < 8 else "test"
        path = tmp_path / "photos" / part / f"class {number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.new("RGB", (64, 64), (20 * number, 255 * (number % 2), 0)).save(path)
    torch.save(models.resnet18(num_classes=2).state_dict(), tmp_path / "teacher.pth")


def a_readers():
    """What the README's blocks take from their reader, anew for each of them."""
    images, labels = torch.randn(16, 3, 8, 8), torch.randint(100, (16,))
    nets = [nn.Sequential(nn.Flatten(), nn.Linear(192, 100)) for _ in range(3)]
    student, teacher, model = nets
    teacher_head = nn.Linear(64, 100).requires_grad_(False)
    criterion = nn.CrossEntropyLoss()
    criterion(model(images), labels).backward()
    return {
        "images": images,
        "labels": labels,
        "loader": [(images, labels)] * 2,
        "dataset": images,
        "student": student,
        "teacher": teacher,
        "teacher_a": teacher,
        "teacher_b": model,
        "student_logits": student(images),
        "teacher_logits": teacher(images).detach(),
        "student_hidden": torch.randn(16, 32),
        "student_head": nn.Linear(32, 100),
        "teacher_hidden": torch.randn(16, 64),
        "teacher_head": teacher_head,
        "model": model,
        "optimizer": torch.optim.SGD(student.parameters(), lr=0.1),
        "step": 3,
        "x": images,
        "y": labels,
        "loss_fn": criterion,
        "theta": torch.randn(1000),
        "score": lambda: -criterion(model(images), labels),
        "params": list(model.parameters()),
        "encoder": nn.Conv2d(3, 4, 3),
        "decoder": nn.Flatten(),
        "coefficients": [0.5, -0.5],
        "seeds": [1, 2],
    }


def blocks(page, fence):
    return re.findall(
        rf"^```{fence}\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL
    )


def test_readme():
    imported = {}
    for block in blocks("README.md", "python"):
        namespace = imported | a_readers()
        exec(compile(block, "README.md", "exec"), namespace)
        imported |= {k: v for k, v in namespace.items() if isinstance(v, types.ModuleType)}
    assert {"torch", "kdkernels"} <= imported.keys()


def test_imports_of_the_readme():
    """Those of the table of what to switch from."""
    lines = re.findall(r"`(from kdkernels[^`]+)`", (ROOT / "README.md").read_text())
    assert len(lines) == 4
    for line in lines:
        exec(line, {})


def test_your_own_two_models(photos, tmp_path):
    [block] = blocks("docs/train.md", re.escape("{code-block} python"))
    exec(compile(block, "train.md", "exec"), {})
    assert (tmp_path / "student.pth").exists()


@pytest.mark.skipif(ptx.toolkit() is None, reason="needs nvcc")
def test_a_kernel_of_ones_own_in_the_emulator(tmp_path):
    (tmp_path / "mine.cu").write_text("""
        __global__ void twice(float* x) { x[threadIdx.x] *= 2; }
        extern "C" void launch(float* x) { twice<<<1, 32>>>(x); }
    """)
    [block] = blocks("docs/emulator.md", re.escape("{code-block} python"))
    x = torch.ones(32)
    exec(compile(block, "emulator.md", "exec"), {"x": x})
    assert x.eq(2).all()
