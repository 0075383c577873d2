"""kdkernels tune: what it searches, workers and kills, and what it leaves."""

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from torch import nn

import kdkernels
from kdkernels import __main__ as command
from kdkernels.reports import search
from kdkernels.tools import space as spaces
from kdkernels.tools import tune
from kdkernels.tools.settings import Search
from kdkernels.train import TrainError, console, data, distillation
from kdkernels.train.run_folder import RunFolder
from kdkernels.train.settings import Distil

TINY = {
    "teacher": "tests.test_tune:net",
    "student": "tests.test_tune:net",
    "image_size": 16,
    "epochs": 1,
    "teacher_epochs": 1,
    "train_samples": 96,
    "test_samples": 48,
    "batch_size": 32,
}


def net(num_classes):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, num_classes),
    )


def arguments(**more):
    return [f"--{k.replace('_', '-')}={v}" for k, v in (TINY | {"threads": 1} | more).items()]


def study(out, name=tune.SEARCH):
    storage = optuna.storages.RDBStorage(f"sqlite:///{out / 'study.sqlite'}")
    return optuna.load_study(study_name=name, storage=storage)


def done(out, name=tune.SEARCH):
    return study(out, name).get_trials(deepcopy=False, states=tune.DONE)


def searched(tmp_path, name="run", settings=None, **given):
    """Search in this process, without the comparison on the test images."""
    asked = {"command": "tune", "machine": {}, "distill": TINY | given}
    asked["tune"] = vars(Search(**{"confirm": 0} | (settings or {})))
    tune.check(asked)
    folder = RunFolder.create(str(tmp_path / name), asked)
    tune.run(folder, console.make(quiet=True), threads=1)
    return folder.path


# What is searched


def space(search, **given):
    return spaces.Space(search, given)


def test_a_search_in_words():
    found = space("temperature=1:8:4, alpha, divergence=forward_kl|js ,lr=0.001|0.01").dimensions
    assert found["temperature"] == spaces.Range(1.0, 8.0, log=True, count=4)
    assert list(found["temperature"]) == [1.0, 2.0, 4.0, 8.0]
    assert list(spaces.Range(0.0, 1.0, count=3)) == [0.0, 0.5, 1.0]
    assert found["alpha"] == spaces.SPACE["alpha"] and found["lr"] == (0.001, 0.01)
    assert found["divergence"] == ("forward_kl", "js") and found["beta"] == spaces.SPACE["beta"]
    assert "noise" not in found and not set(spaces.NOISE) & set(found)
    assert set(space("noise=none|input").dimensions) == {"noise", "input_std"}
    assert set(space("beta=0.1|0.2", divergence="js").dimensions) == {"beta"}
    assert set(space(Search().search).dimensions) == set(spaces.SPACE) - {"lr"}


@pytest.mark.parametrize(
    ("search", "given", "said"),
    [
        ("heat", {}, "'heat' is not one of temperature"),
        ("", {}, "'' is not one of temperature"),
        ("alpha,alpha", {}, "has alpha twice"),
        ("alpha=0:2", {}, "each in 0..1"),
        ("temperature=8:1", {}, "give low:high"),
        ("temperature=0:8", {}, "above 0"),
        ("temperature=nan:8", {}, "give low:high"),
        ("temperature=1:8:1", {}, "give low:high"),
        ("temperature=1:8:2:3", {}, "give low:high"),
        ("temperature=warm", {}, "give low:high"),
        ("temperature=2|2", {}, "give low:high"),
        ("temperature=1|3|3", {}, "give low:high"),
        ("divergence=js|jd", {}, "give some of forward_kl"),
        ("divergence=", {}, "give some of forward_kl"),
        ("beta=0.1:0.5", {}, "no divergence that is tried takes: forward_kl"),
        ("noise=none|input,gradient_std", {}, "no noise that is tried takes: none, input"),
        ("temperature", {"temperature": 2.0}, "temperature=2.0 in search"),
        ("divergence=js|forward_kl", {"beta": 0.3, "divergence": "js"}, "divergence is given"),
    ],
)
def test_a_wrong_search_is_one_sentence(search, given, said, capsys):
    options = [f"--{name}={value}" for name, value in given.items()]
    assert command.main(["tune", f"--search={search}", *options]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and said in err and "Traceback" not in err


def test_beta_and_std_are_of_their_divergence_and_noise():
    found = space("divergence=forward_kl|js|decoupled,noise=none|input,beta=0.1|0.9,input_std=1|2")
    points = found.grid()
    assert len(points) == (1 + 2 + 1) * (1 + 2)
    assert all(("beta" in p) == (p["divergence"] == "js") for p in points)
    assert all(("input_std" in p) == (p["noise"] == "input") for p in points)
    assert len({json.dumps(p) for p in points}) == len(points)
    for name in kdkernels.divergences():  # every one that is searched, the trainer takes
        values = {"beta": 0.5} if found.needs("beta", {"divergence": name}) else {}
        Distil(divergence=name, **values)


def test_defaults_are_tried_where_they_are_inside():
    usual = {"temperature": 4.0, "alpha": 0.5, "divergence": "forward_kl", "noise": "none"}
    assert space(Search().search).defaults() == [usual]
    assert space("temperature=5:8,alpha").defaults() == []
    assert space("beta,input_std", divergence="js", noise="input").defaults() == [
        {"beta": 0.5, "input_std": 0.1}
    ]


# Searching


def test_command_end_to_end(tmp_path, capsys):
    out = tmp_path / "run"
    options = arguments(
        search="temperature=2|8,noise=none|regularizer,regularizer_lam=0.01|0.1",
        sampler="grid",
        confirm=2,
        seeds=2,
        train_samples=48,
    )
    assert command.main(["tune", *options, f"--out={out}"]) == 0
    shown = capsys.readouterr().out
    assert "search 6 of 6" in shown and "best.json" in shown
    points = [trial.params for trial in done(out)]
    assert len(points) == 6 and len({json.dumps(p) for p in points}) == 6
    best = max(done(out), key=lambda trial: trial.value)
    assert best.value == pytest.approx(sum(best.user_attrs["accuracies"]) / 2)

    kept = json.loads((out / "best.json").read_text())
    assert kept["temperature"] == best.params["temperature"]
    assert kept.get("noise", "none") == best.params["noise"]
    assert kept.get("noise_std") == best.params.get("regularizer_lam")
    assert "train_samples" not in kept and kept["student"] == TINY["student"]
    usual = {"temperature": 4.0, "noise": "none"}
    assert {t.params["seed"] for t in done(out, tune.CONFIRM)} == {2, 3} and best.params != usual
    assert len(done(out, tune.CONFIRM)) == 4 and "Difference" in shown

    for name in ("history", "settings"):
        assert (out / f"plots/{name}.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "report.html").read_text()
    assert page.count("<svg") in (2, 3) and "Search: the best trials" in page
    results = json.loads((out / "results.json").read_text())
    assert len(results["trials"]) == 6 and len(results["confirmation"]) == 4
    assert not list((out / "trials").iterdir())
    # Nothing is left to do, and nothing is done again.
    assert command.main(["tune", f"--resume={out}"]) == 0
    assert len(done(out)) == 6 and len(study(out).trials) == 6

    again = tmp_path / "distill"
    run = ["distill", f"--config={out / 'best.json'}", "--train-samples=32", "--threads=1"]
    assert command.main([*run, f"--out={again}"]) in (0, 1)
    asked = json.loads((again / "config.json").read_text())["distill"]
    assert {name: asked[name] for name in kept if name != "arms"} == {
        name: value for name, value in kept.items() if name != "arms"
    }


def test_trials_are_tested_on_held_out_training_images(tmp_path):
    out = searched(tmp_path, settings={"trials": 2, "validation": 0.5}, test_samples=40)
    for trial in done(out):
        assert trial.value * 40 == pytest.approx(round(trial.value * 40))
    tested, _ = RunFolder(out / "search", {}).load("teacher-test")
    train, _ = data.load("digits", size=16)
    assert tested["labels"].equal(train.split(0.5, seed=0)[1].first(40).labels)


def values(out):
    return [(trial.params, trial.value) for trial in done(out)]


def test_same_seed_same_trials_also_after_a_resume(tmp_path, monkeypatch):
    """Stopped in its third trial and continued, a search gives what it gives at once."""
    settings = {"trials": 12, "search": "temperature,alpha,divergence=forward_kl|js"}
    whole = searched(tmp_path, "whole", settings)
    run, calls = distillation.run, []

    def stopped(*given, **more):
        calls.append(1)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return run(*given, **more)

    monkeypatch.setattr(distillation, "run", stopped)
    with pytest.raises(
        TrainError, match=r"interrupted after 10 of 12 trials of search: .*--resume"
    ) as error:
        searched(tmp_path, "halves", settings)
    assert error.value.status == 130
    folder = RunFolder.open(str(tmp_path / "halves"))
    tune.run(folder, console.make(quiet=True), threads=1)
    assert values(folder.path) == values(whole) and len(values(whole)) == 12
    assert json.loads((whole / "best.json").read_text()) == folder.read_json("best.json")
    other = searched(tmp_path, "other", settings | {"trials": 2, "sampler": "random"}, seed=1)
    assert values(other)[1][0] != values(whole)[1][0]


def test_a_loss_that_is_not_finite_is_the_worst(tmp_path, monkeypatch):
    loss = kdkernels.distillation_loss

    def overflowing(*given, **more):
        return loss(*given, **more) * (float("inf") if more["temperature"] == 2.0 else 1.0)

    monkeypatch.setattr(kdkernels, "distillation_loss", overflowing)
    settings = {"search": "temperature=1|2", "sampler": "grid"}
    out = searched(tmp_path, settings=settings)
    accuracies = {trial.params["temperature"]: trial.value for trial in done(out)}
    assert accuracies[2.0] == 0.0 < accuracies[1.0]


def test_the_hopeless_trial_is_pruned(tmp_path):
    settings = {
        "search": "lr=0.01|0.011|0.012|0.013|0.014|0.0000001",
        "sampler": "grid",
        "prune": "median",
    }
    out = searched(tmp_path, settings=settings, epochs=3, train_samples=480)
    folder = RunFolder.open(str(out))
    search.write(tune.Study(folder, tune.SEARCH), None)
    states = {trial.params["lr"]: trial.state.name for trial in done(out)}
    assert states.pop(1e-7) == "PRUNED" and set(states.values()) == {"COMPLETE"}
    page = (out / "report.html").read_text()
    assert "6 trials by grid, 1 of them stopped early" in page


def finished(out):
    """Read beside the command: Optuna's own way would make tables that are not there yet."""
    with contextlib.suppress(sqlite3.Error):
        file = f"file:{out / 'study.sqlite'}?mode=ro"
        with contextlib.closing(sqlite3.connect(file, uri=True)) as database:
            count = "SELECT COUNT(*) FROM trials WHERE state IN ('COMPLETE', 'PRUNED')"
            return database.execute(count).fetchone()[0]
    return 0


def held(num_classes):
    """The network, once fewer trials are finished than the folder's file ``room`` lets pass.

    So a command cannot finish many trials beyond that before its signal: one a worker, and one of
    each that a killed command left behind.
    """
    folder = Path(os.environ["ROOM"])
    while finished(folder / "run") >= int((folder / "room").read_text()):
        time.sleep(0.02)
    return net(num_classes)


def test_two_workers_killed_and_resumed_share_one_grid(tmp_path, monkeypatch):
    out, points = tmp_path / "run", 24
    monkeypatch.setenv("ROOM", str(tmp_path))
    options = arguments(
        search=f"temperature=1:16:3,alpha=0:1:{points // 3}",
        sampler="grid",
        workers=2,
        confirm=0,
        student="tests.test_tune:held",
    )
    call = [sys.executable, "-m", "kdkernels", "tune"]

    def let(trials):
        (tmp_path / "new").write_text(str(trials))
        (tmp_path / "new").replace(tmp_path / "room")

    def started(*arguments):
        shown = (tmp_path / "shown").open("w")
        return subprocess.Popen(
            [*call, *arguments], stdout=shown, stderr=subprocess.PIPE, text=True
        )

    def wait_for(process, condition):
        while process.poll() is None and not condition():
            time.sleep(0.05)
        assert process.poll() is None, process.stderr.read()

    let(3)
    process = started(*options, f"--out={out}")
    try:
        wait_for(process, lambda: finished(out) >= 2)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()

        process = started(f"--resume={out}", "--workers=2", "--threads=1")
        # The killed command's workers may still finish trials; this one has to be at work itself.
        wait_for(process, lambda: (tmp_path / "shown").read_text())
        # Counted before more may begin: then any number of them may end before this goes on.
        least = finished(out) + 2
        let(10)
        wait_for(process, lambda: finished(out) >= least)
        process.send_signal(signal.SIGINT)
        status, err = process.wait(), process.stderr.read()
        assert status == 130 and err.count("\n") == 1 and f"--resume {out}" in err
        assert least <= finished(out) < points
    finally:
        process.kill()
        process.stderr.close()
    let(points)
    assert command.main(["tune", f"--resume={out}", "--threads=1"]) == 0
    found = [json.dumps(trial.params) for trial in done(out)]
    assert len(found) == len(set(found)) == points
    assert len(study(out).trials) > points  # those that were stopped halfway stand there as failed


def test_bad_arguments(tmp_path, capsys):
    out = tmp_path / "run"
    grid = ["--search=alpha=0|1", "--sampler=grid"]
    other = RunFolder.create(str(tmp_path / "other"), {"command": "distill"})
    for options, said in {
        (*grid, "--trials=3"): "this grid has 2 points",
        (f"--resume={tmp_path / 'absent'}",): "is not the folder of a run",
        (f"--resume={other.path}",): "holds no run of tune",
        (*arguments(student="no.such:net"), f"--out={out}"): "cannot be imported",
        (*arguments(teacher_weights="absent.pth"), f"--out={out}"): "absent.pth cannot be read",
    }.items():
        assert command.main(["tune", *options]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and said in err
        assert not out.exists()
