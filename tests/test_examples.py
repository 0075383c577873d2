"""docs/examples as people run them: each loss falls, and as it does with the loss it replaces."""

import contextlib
import os
import re
import runpy
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import kdkernels.compat

os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"


def needs(*packages):
    for name in packages:
        pytest.importorskip(name, reason=f"{name} is not installed")


def plain(student, teacher, labels, *, num_items=None, inplace=False, **options):
    """What people write without this library."""
    asked = {name for name, value in options.items() if value is not None}
    assert asked == {"temperature", "alpha"}
    kept, T = labels != -100, options["temperature"]
    z, t = student[kept], teacher[kept]
    kl = F.kl_div((z / T).log_softmax(-1), (t / T).softmax(-1), reduction="sum")
    ce = F.cross_entropy(z, labels[kept], reduction="sum")
    total = options["alpha"] * T * T * kl + (1 - options["alpha"]) * ce
    return total / (kept.sum() if num_items is None else num_items)


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs an example as a script: (first loss, last loss, how often our loss was made)."""

    def run(name):
        calls = []

        def counted(made):
            return lambda *arguments: calls.append(1) or made(*arguments)

        with monkeypatch.context() as patch:
            # All fused losses pass there.
            for module in (kdkernels.distill.calls, kdkernels.distill.linear):
                patch.setattr(module, "result_of", counted(kdkernels.distill.calls.result_of))
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        found = re.search(r"^loss ([\d.]+) -> ([\d.]+)$", capsys.readouterr().out, re.MULTILINE)
        return float(found[1]), float(found[2]), len(calls)

    return run


def check(run, name, theirs):
    """Runs an example, and with `theirs`, a context that puts the other loss in place of ours."""
    first, last, calls = run(name)
    assert last < 0.8 * first and calls > 0
    with theirs:
        other_first, other_last, calls = run(name)
    assert calls == 0
    assert first == pytest.approx(other_first, abs=1e-3)
    assert last == pytest.approx(other_last, abs=5e-3)


@contextlib.contextmanager
def replaced(*places):
    """Puts something else at (object, attribute, something else)."""
    with pytest.MonkeyPatch.context() as patch:
        for place in places:
            patch.setattr(*place)
        yield


PLAIN = [(module, "distillation_loss", plain) for module in (kdkernels, kdkernels.distill.module)]


def test_bare_loop(run):
    needs("sklearn")
    check(run, "bare_loop.py", replaced(*PLAIN))


def test_lightning_module(run):
    needs("sklearn", "lightning")
    check(run, "lightning_module.py", replaced(*PLAIN))


def test_lightning_module_leaves_the_teacher_alone():
    needs("sklearn", "lightning")
    example = runpy.run_path(str(EXAMPLES / "lightning_module.py"))
    teacher = torch.nn.Sequential(example["network"](8), torch.nn.Dropout())
    module = example["Distillation"](teacher, example["network"](4))
    module.train()
    assert not teacher.training
    assert {name.split(".")[0] for name in module.state_dict()} == {"student"}
    assert len(module.configure_optimizers().param_groups[0]["params"]) == 4


def test_torchdistill_config(run, monkeypatch):
    needs("sklearn", "torchdistill")
    from torchdistill.losses import mid_level, registry

    monkeypatch.setitem(registry.MIDDLE_LEVEL_LOSS_DICT, "KDLoss", mid_level.KDLoss)
    theirs = replaced((kdkernels.compat, "KDLoss", mid_level.KDLoss))
    check(run, "torchdistill_config.py", theirs)


def test_hf_trainer(run):
    needs("transformers", "accelerate")
    check(run, "hf_trainer.py", replaced(*PLAIN))


def test_hf_trainer_accumulates_as_one_batch(tmp_path):
    """With different numbers of labels in the two halves, which a mean of means gets wrong."""
    needs("transformers", "accelerate")
    example = runpy.run_path(str(EXAMPLES / "hf_trainer.py"))
    from transformers import TrainingArguments

    torch.manual_seed(0)
    teacher, student = example["gpt2"](16), example["gpt2"](8).state_dict()
    samples = example["text"]()[:8]
    for number, sample in enumerate(samples):
        sample["labels"] = sample["labels"].masked_fill(torch.arange(64) < 8 * number, -100)

    def trained(size, steps):
        model = example["gpt2"](8)
        model.load_state_dict(student)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        arguments = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=2,
            logging_steps=1,
            save_strategy="no",
            use_cpu=True,
            report_to=[],
        )
        trainer = example["DistillationTrainer"](
            model, arguments, train_dataset=samples, eval_dataset=samples, teacher=teacher
        )
        trainer.train()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        return losses, trainer.evaluate()["eval_loss"], model.transformer.wte.weight.detach()

    torch.testing.assert_close(trained(8, 1), trained(2, 4), rtol=1e-4, atol=1e-6)


def test_hf_trainer_first_loss_is_the_formula(tmp_path):
    needs("transformers", "accelerate")
    example = runpy.run_path(str(EXAMPLES / "hf_trainer.py"))
    from transformers import TrainingArguments

    torch.manual_seed(0)
    teacher, student = example["gpt2"](16), example["gpt2"](8).eval()
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    trainer = example["DistillationTrainer"](student, arguments, teacher=teacher, temperature=3.0)
    tokens = torch.randint(256, (2, 20))
    labels = tokens.index_fill(1, torch.arange(6), -100)
    loss, outputs = trainer.compute_loss(student, {"input_ids": tokens, "labels": labels}, True, 11)
    z, t = (x[:, 5:-1].flatten(0, 1).double() for x in (outputs.logits, teacher(tokens).logits))
    kl = F.kl_div((z / 3).log_softmax(-1), (t / 3).softmax(-1), reduction="sum")
    want = (9 * kl + F.cross_entropy(z, tokens[:, 6:].flatten(), reduction="sum")) / 2 / 11
    torch.testing.assert_close(loss.double(), want)


def test_trl_gkd(run):
    needs("trl")
    from trl.experimental.gkd import GKDTrainer

    theirs = (kdkernels.compat, "generalized_jsd_loss", GKDTrainer.generalized_jsd_loss)
    check(run, "trl_gkd.py", replaced(theirs))


def test_trl_distillation(run, monkeypatch):
    needs("trl")
    from trl.trainer import distillation_trainer

    trls = distillation_trainer._chunked_divergence_loss
    monkeypatch.setattr(distillation_trainer, "_chunked_divergence_loss", trls)  # as it was
    monkeypatch.syspath_prepend(EXAMPLES)  # where it finds trl_gkd, as a script does
    theirs = (kdkernels.compat, "chunked_divergence_loss", trls)
    check(run, "trl_distillation.py", replaced(theirs))


def test_every_example_is_tested():
    text = Path(__file__).read_text()
    names = {path.name for path in EXAMPLES.glob("*.py")} - {"own_images.py"}
    assert names and all(f'"{name}"' in text for name in names)
