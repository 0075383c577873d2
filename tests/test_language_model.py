"""Distilling a language model: its text, its losses beside each other, stopping and continuing."""

import copy
import dataclasses
import html
import json
import re
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from kdkernels import __main__ as command
from kdkernels.experiments import language_model, step_cost, text
from kdkernels.experiments.gpt import GPT, held_out
from kdkernels.experiments.settings import LM_ARMS, LanguageModel
from kdkernels.reports import language_model as pages
from kdkernels.train import TrainError
from kdkernels.train.loop import Learner
from kdkernels.train.run_folder import RunFolder
from kdkernels.train.session import Interrupt

SOURCES = str(Path(sysconfig.get_paths()["stdlib"], "json"))
DEFAULTS = ("reference", "dense", "topk", "linear", "full")
# One thread: two that spin on a busy machine's two cores wait for each other most of the time.
TINY = {
    "text": SOURCES,
    "vocabulary": 320,
    "context": 16,
    "batch_size": 4,
    "student_width": 32,
    "student_layers": 1,
    "teacher_width": 48,
    "teacher_layers": 2,
    "teacher_steps": 60,
    "k": 8,
    "epochs": 2,
    "train_samples": 26,
    "test_samples": 32,
    "lr": 3e-3,
    "threads": 1,
}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
    """A cache of the tests' own, one for all of them."""
    folder = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "kdkernels"


def options(**changed):
    return [f"--{k.replace('_', '-')}={v}" for k, v in (TINY | changed).items()]


def records(folder, **wanted):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if wanted.items() <= line.items()]


# The text


def test_documents_are_files_of_text(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "b" / "one.txt").write_text("ein Wörterbuch\r\n", newline="")
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / ".hidden" / "no.txt").write_text("no")
    (tmp_path / ".no").write_text("no")
    (tmp_path / "no.bin").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "zero").write_bytes(b"a\0b")
    (tmp_path / "empty").write_text("")
    assert text.documents(str(tmp_path)) == ["x = 1\n", "ein Wörterbuch\r\n"]
    assert text.documents(str(tmp_path / "a.py")) == ["x = 1\n"]


def test_default_text_is_the_standard_library():
    found = text.documents()
    assert Path(json.__file__).read_text() in found
    assert Path(pytest.__file__).read_text() not in found
    assert len(found) > 500 and found == text.documents()


def test_held_out_text_is_other_files():
    texts = [f"document {i}\n" for i in range(100)]
    training, held_out = text._split(texts)
    assert len(held_out) == 5 and sorted(training + held_out) == sorted(texts)
    # Which ones is a matter of each file's own hash: the order of the others changes nothing.
    assert set(text._split(texts[::-1])[1]) == set(held_out)
    one = "".join(f"line {i}\n" for i in range(100))
    begin, end = text._split([one])
    assert begin[0] + end[0] == one and begin[0][-1] == "\n" and 0 < len(end[0]) < len(one) / 10


def test_tokens_are_the_text_and_kept(cache, monkeypatch, tmp_path):
    (training, held_out, tokenizer) = text.load(SOURCES, 320, 16, CPU)
    expected, held = text._split(text.documents(SOURCES))
    for part, texts in ((training, expected), (held_out, held)):
        assert part.tokens.dtype == np.int32 and isinstance(part.tokens, np.memmap)
        assert (part.tokens >= 0).all() and (part.tokens < tokenizer.get_vocab_size()).all()
        said = tokenizer.decode(part.tokens.tolist(), skip_special_tokens=False)
        assert said == text.END.join([*texts, ""])
    for odd in ("tab\t\r\n  ÄÖ 漢字 \U0001f600", " leading", "", "<|x|>"):
        assert tokenizer.decode(tokenizer.encode(odd).ids) == odd
    assert tokenizer.get_vocab_size() == 320

    # A second load reads; another cache gets the same bytes; another size is another folder.
    first = next(cache.glob("text-*-320"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    text.load(SOURCES, 320, 16, CPU)
    again = tmp_path / "kdkernels" / first.name
    for file in ("tokenizer.json", "training.i32", "held-out.i32"):
        assert (again / file).read_bytes() == (first / file).read_bytes()
    monkeypatch.setattr(text, "_train_tokenizer", lambda *_: pytest.fail("trained again"))
    assert len(text.load(SOURCES, 320, 16, CPU)[0]) == len(training)
    with pytest.raises(pytest.fail.Exception):
        text.load(SOURCES, 321, 16, CPU)
    assert [folder.name for folder in again.parent.iterdir()] == [first.name]


def test_windows():
    part, _, _ = text.load(SOURCES, 320, 16, CPU)
    inputs, labels = part.batch(torch.tensor([0, 3]))
    assert inputs.shape == labels.shape == (2, 16) and inputs.dtype == labels.dtype == torch.int64
    assert inputs[1].tolist() == part.tokens[48:64].tolist()
    assert labels[1].tolist() == part.tokens[49:65].tolist()
    assert part.view_of(3) is None and (len(part) - 1) * 16 + 17 <= len(part.tokens)
    some = part.sample(5, 0)
    assert len(some) == 5 and len(set(some.first)) == 5
    assert (some.first == part.sample(5, 0).first).all()
    assert (some.first != part.sample(5, 1).first).any()
    assert sorted(part.sample(10**9, 0).first) == sorted(part.first)


@pytest.mark.parametrize(
    ("path", "content", "said"),
    [
        ("absent", None, "no such file or folder"),
        ("binary", b"\0\1", "no text in UTF-8"),
        ("short", b"a few words\n", "fewer than|less than a window"),
    ],
)
def test_text_that_is_none(tmp_path, path, content, said):
    if content is not None:
        (tmp_path / path).write_bytes(content)
    with pytest.raises(TrainError, match=said):
        text.load(str(tmp_path / path), 300, 512, CPU)


# Model and losses


def test_gpt_is_causal_and_tied():
    torch.manual_seed(0)
    model = GPT(50, 8, 128, 2)
    tokens = torch.randint(50, (3, 8))
    logits = model(tokens)
    assert logits.shape == (3, 8, 50)
    assert model.blocks[0].heads == 2
    other = tokens.clone()
    other[:, 5:] = (other[:, 5:] + 1) % 50
    changed = model(other)
    torch.testing.assert_close(changed[:, :5], logits[:, :5])
    assert (changed[:, 5:] - logits[:, 5:]).abs().amax((0, 2)).min() > 1e-3
    model.bare = True
    torch.testing.assert_close(model(tokens) @ model.tokens.weight.T, logits)
    assert len({p.data_ptr() for p in model.parameters()}) == len(list(model.parameters()))
    # An untrained model knows nothing: its loss is the uniform distribution's.
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten() ^ 1)
    assert abs(loss.item() - np.log(50)) < 0.3


def models(vocabulary=320, context=16):
    torch.manual_seed(1)
    student, expert = GPT(vocabulary, context, 32, 1), GPT(vocabulary, context, 48, 2)
    with torch.no_grad():  # far from uniform
        expert.tokens.weight.mul_(20)
    return student, expert.eval().requires_grad_(False)


@pytest.mark.parametrize("arm", [name for name in LM_ARMS if name not in ("reference", "compiled")])
def test_loss_and_gradients_are_the_references(arm):
    """The top k of all classes is all of the teacher, but for fp16."""
    settings = LanguageModel(k=320, vocabulary=320)
    generator = torch.Generator().manual_seed(0)
    tokens, labels = torch.randint(320, (2, 4, 16), generator=generator)
    student, expert = models()
    found = {}
    for name in ("reference", arm):
        model = copy.deepcopy(student)
        model.bare = LM_ARMS[name].loss == "linear"
        ask = language_model._asked(LM_ARMS[name], expert, settings)
        loss = language_model._loss(LM_ARMS[name], model, expert, settings)(
            model(tokens), language_model._packed(ask(tokens)), labels
        )
        loss.backward()
        found[name] = loss, [p.grad for p in model.parameters()]
    tolerance = {"rtol": 1e-5, "atol": 1e-7} if LM_ARMS[arm].exact else {"rtol": 1e-2, "atol": 1e-4}
    torch.testing.assert_close(found[arm][0], found["reference"][0], **tolerance)
    for ours, theirs in zip(found[arm][1], found["reference"][1], strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance | {"atol": tolerance["atol"] * 10})


def test_compiled_loss_is_the_references():
    settings = LanguageModel(vocabulary=320)
    student, expert = models()
    tokens, labels = torch.randint(320, (2, 4, 16))
    logits, taught = student(tokens), expert(tokens)
    plain, compiled = (
        language_model._loss(LM_ARMS[name], student, expert, settings)(logits, taught, labels)
        for name in ("reference", "compiled")
    )
    torch.testing.assert_close(compiled, plain)


def test_operations_are_what_torch_counts():
    settings = LanguageModel(
        context=16,
        batch_size=2,
        student_width=32,
        student_layers=3,
        teacher_width=64,
        teacher_layers=1,
        k=4,
    )
    student = GPT(64, 16, 32, 3)
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        student(tokens).sum().backward()
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    products = sum(n for op, n in counts.items() if op in ("aten.mm", "aten.addmm"))
    ours = step_cost.operations(settings, 64)
    attention = 3 * 3 * 32 * 2 * 16 * 32
    assert ours["student body"] + ours["student head"] - attention == products
    assert ours["teacher head"] == 2 * 32 * 64 * 64


def test_passes_are_counted():
    x = torch.ones(4, 100)
    with step_cost.Passes(400) as passes:
        (x.exp() + x).view(100, 4).sum()
    assert passes.count == 2 + 3 + 1
    # At the least each of two logits is read and a gradient is written.
    assert step_cost.traffic(LanguageModel(), 1000) > 3


def test_held_out_loss_in_chunks():
    _, part, _ = text.load(SOURCES, 320, 16, CPU)
    windows = part.sample(21, 0)
    model = models()[0]
    found = held_out(model, windows, 4)
    tokens, labels = windows.batch(torch.arange(21))
    logits = model(tokens).double().flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, labels.flatten()).item()
    assert found["held_out_loss"] == pytest.approx(expected, rel=1e-5)
    assert found["perplexity"] == pytest.approx(np.exp(expected), rel=1e-4)


class Random:
    """Windows of random tokens."""

    def __len__(self):
        return 16

    def view_of(self, epoch):
        return None

    def batch(self, index, memory_format=None, view=None):
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(16384, (16, 129), generator=generator)[index]
        return rows[:, :-1], rows[:, 1:]


def test_linear_takes_less_memory(tmp_path):
    """1,024 tokens of 16,384 classes: logits of 67 MB."""
    folder = RunFolder.create(str(tmp_path / "run"), {})
    settings = LanguageModel(vocabulary=16384, k=4)
    student, expert = models(16384, 128)
    peaks = {}
    for name in ("reference", "linear"):
        model = copy.deepcopy(student)
        model.bare = name == "linear"
        ask = language_model._asked(LM_ARMS[name], expert, settings)
        learner = Learner(
            name,
            model,
            language_model._loss(LM_ARMS[name], model, expert, settings),
            lambda tokens, *_, ask=ask: language_model._packed(ask(tokens)),
            lambda model: {},
            1e-3,
            0,
            tuned=True,
        )
        batches = [torch.arange(8), torch.arange(8, 16)]
        peak = step_cost.Peak(learner)
        with Interrupt() as interrupt:
            learner.train_epoch(Random(), batches, folder, interrupt, peak.read)
        peaks[name] = peak.bytes
    if None in peaks.values():
        pytest.skip("this system keeps no peak of resident memory")
    logits = 4 * 1024 * 16384
    assert peaks["reference"] > 5 * logits
    assert 0 < peaks["linear"] < peaks["reference"] / 2


# The experiment


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A whole run of the command, uninterrupted."""
    out = tmp_path_factory.mktemp("language") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        assert command.main(["distill-lm", *options(), f"--out={out}"]) == 0
    return out


def test_arms_learn_and_follow_reference(run):
    found = pages.results(RunFolder.open(str(run)))
    arms = found["arms"]
    assert tuple(arms) == ("teacher", *DEFAULTS)
    assert all(check["passed"] for check in found["checks"]) and len(found["checks"]) == 9
    for name in DEFAULTS:
        before, after = (line["held_out_loss"] for line in found["epochs"][name])
        assert after < before < np.log(320) + 0.1
        assert arms[name]["tokens"] == 2 * 26 * 16 and arms[name]["steps"] == 14
    for name in ("dense", "linear", "full"):
        assert max(found["apart"][name]) < 1e-4
        assert arms[name]["held_out_loss"] == pytest.approx(
            arms["reference"]["held_out_loss"], rel=1e-4
        )
    assert 1e-6 < max(found["apart"]["topk"][:1]) < 0.3
    teacher = found["epochs"]["teacher"]
    assert [line["step"] for line in teacher] == [50, 60]
    assert teacher[-1]["held_out_loss"] < arms["reference"]["held_out_loss"]
    assert arms["full"]["operations"] < arms["linear"]["operations"]
    assert 8 / 320 < found["topk_share"] < 1
    kept = load_file(run / "checkpoints" / "teacher-topk.safetensors")
    assert kept["values"].shape == kept["indices"].shape == (26, 16, 8)
    assert kept["values"].dtype == torch.float16 and kept["indices"].dtype == torch.int32


def test_report(run):
    page = html.unescape((run / "report.html").read_text())
    for name in DEFAULTS:
        assert f"{name}: {LM_ARMS[name].about}" in page
    for name in ("lm_speed", "lm_phases", "lm_losses", "lm_held_out"):
        assert (run / "plots" / f"{name}.png").stat().st_size > 5000
    found = json.loads((run / "results.json").read_text())["language_model"]
    assert found["arms"]["dense"]["speedup"] > 0 and found["work"]["vocabulary"] == 320


class Stop(Exception):
    pass


def test_resumed_run_has_the_same_bits(run, tmp_path):
    """Stopped in the teacher, in an arm's first and in an arm's last epoch."""
    folder = RunFolder.create(str(tmp_path / "run"), RunFolder.open(str(run)).config)
    stops = [("teacher", 55), ("dense", 3), ("topk", 7), ("full", 11)]

    def on_step(learner, done, total):
        assert done <= total
        if stops and (learner, done) == stops[0]:
            stops.pop(0)
            raise Stop

    for _ in range(4):
        with pytest.raises(Stop):
            language_model.run(LanguageModel(**TINY), folder, on_step, lambda line: None)
        folder = RunFolder.open(str(tmp_path / "run"))
    language_model.run(LanguageModel(**TINY), folder, on_step, lambda line: None)
    assert not stops
    for name in ("teacher", *DEFAULTS):
        file = f"checkpoints/{name}.safetensors"
        ours, theirs = load_file(folder.path / file), load_file(run / file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        ours, theirs = (
            [line["loss"] for line in records(path, kind="step", learner=name)]
            for path in (folder.path, run)
        )
        assert ours == theirs


def test_more_epochs_and_given_teacher(run, tmp_path, capsys):
    out = tmp_path / "run"
    weights = run / "checkpoints" / "teacher.safetensors"
    given = options(teacher_weights=weights, arms="linear", epochs=1)
    given = [option for option in given if "--teacher-steps" not in option]
    assert command.main(["distill-lm", *given, f"--out={out}"]) == 0
    assert not records(out, learner="teacher", kind="step")
    # The same teacher and start: the arm's first epoch is that of the run the weights are from.
    theirs = records(run, learner="linear", kind="step")
    assert records(out, learner="linear", kind="step") == theirs[:7]
    assert command.main(["distill-lm", f"--resume={out}", "--epochs=2"]) == 0
    assert records(out, learner="linear", kind="step") == theirs
    assert "report.html" in capsys.readouterr().out


def test_text_shorter_than_the_teachers_steps(tmp_path):
    """The text is gone over again, in another order."""
    (tmp_path / "text").write_text(Path(SOURCES, "scanner.py").read_text()[:3000])
    settings = LanguageModel(
        **TINY | {"text": str(tmp_path / "text"), "vocabulary": 257, "teacher_steps": 120},
        arms=("linear",),
    )
    folder = RunFolder.create(
        str(tmp_path / "run"), {"language_model": dataclasses.asdict(settings)}
    )
    language_model.run(settings, folder, lambda *_: None, lambda line: None)
    steps = records(folder.path, learner="teacher", kind="step")
    assert [line["step"] for line in steps] == [*range(1, 121)]
    assert steps[-1]["loss"] < steps[0]["loss"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"text": "/nowhere"}, "text /nowhere: there is no such file"),
        ({"vocabulary": 5}, "--vocabulary: '5' is given; it must be a whole number of at"),
        ({"student_width": 100}, "student_width is 100; it must be a multiple of 64"),
        ({"k": 400}, "k is 400; it must be at most vocabulary, which is 320"),
        ({"arms": "dense,fused"}, "'dense,fused' is given; it must be different names"),
        ({"teacher_weights": "/nowhere.safetensors"}, "/nowhere.safetensors: there is no such"),
        ({"teacher_weights": __file__}, "test_language_model.py cannot be read"),
        ({"context": 10**4}, "has .* tokens, less than a window of 10000"),
    ],
)
def test_bad_arguments(changed, said, tmp_path, capsys):
    out = tmp_path / "run"
    assert command.main(["distill-lm", *options(**changed), f"--out={out}"]) == 2
    error = capsys.readouterr().err
    assert re.search(said, error) and error.count("\n") == 1 and "Traceback" not in error
    assert not out.exists()


def test_teacher_of_another_size(run, tmp_path, capsys):
    weights = run / "checkpoints" / "linear.safetensors"
    assert command.main(["distill-lm", *options(teacher_weights=weights)]) == 2
    error = capsys.readouterr().err
    assert "is of another model: " in error and error.count("\n") == 1


def test_teacher_of_another_text(run, tmp_path, capsys):
    weights = run / "checkpoints" / "teacher.safetensors"
    (tmp_path / "text").write_text(Path(SOURCES, "decoder.py").read_text())
    given = options(teacher_weights=weights, text=tmp_path / "text")
    assert command.main(["distill-lm", *given, f"--out={tmp_path / 'run'}"]) == 2
    assert "learned another text" in capsys.readouterr().err


def test_text_that_changes_under_a_run(tmp_path, capsys):
    (tmp_path / "text").write_text(Path(SOURCES, "decoder.py").read_text())
    given = options(text=tmp_path / "text", arms="linear", epochs=1, teacher_steps=1)
    assert command.main(["distill-lm", *given, f"--out={tmp_path / 'run'}"]) == 0
    with (tmp_path / "text").open("a") as file:
        file.write("# one line more\n")
    assert command.main(["distill-lm", f"--resume={tmp_path / 'run'}", "--epochs=2"]) == 2
    assert "the text is not what it was" in capsys.readouterr().err


def test_one_process(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command.main(["distill-lm", *options(), f"--out={tmp_path / 'run'}"]) == 2
    assert "without torchrun" in capsys.readouterr().err


def test_resume_takes_no_other_option(run, capsys):
    assert command.main(["distill-lm", f"--resume={run}", "--k=3"]) == 2
    assert "only --epochs, --text may be given" in capsys.readouterr().err
