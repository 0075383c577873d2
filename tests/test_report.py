"""Pages of runs and of comparisons, from metrics written by hand; TensorBoard's files."""

import dataclasses
import html.parser
import json
import math
import re
import statistics
import sys

import pytest
import torch

from kdkernels import __main__ as command
from kdkernels.reports import compare, page, report
from kdkernels.reports.arms import ladder
from kdkernels.train.loop import PHASES
from kdkernels.train.run_folder import RunFolder
from kdkernels.train.settings import ARMS, Distil

MACHINE = {"processor": "a processor", "threads": "1", "versions": "kdkernels 1"}
# Seconds of each epoch by arm: teacher and backward, all else is nothing.
SECONDS = {
    "reference": [(3.0, 2.0), (3.0, 2.0)],
    "fused": [(3.0, 1.0), (3.0, 1.0)],
    "cached": [(1.0, 1.0), (0.0, 1.0)],
    "full": [(1.0, 0.5), (0.0, 0.5)],
}


def write_run(path, seed=0, seconds=SECONDS, accuracy=None, tests=None, **settings):
    """A run's folder as distill leaves it; ``accuracy``: the last epoch's, by arm."""
    settings = {"epochs": max(map(len, seconds.values())), **settings}
    names = tuple(name for name in seconds if name in ARMS)
    wanted = dataclasses.asdict(Distil(arms=names, seed=seed, **settings))
    folder = RunFolder.create(
        str(path), {"command": "distill", "distill": wanted, "threads": 1, "machine": MACHINE}
    )
    for name, epochs in seconds.items():
        for epoch, (teacher, backward) in enumerate(epochs, 1):
            for step in (2 * epoch - 1, 2 * epoch):
                twin = {"twin": 4.0 / step} if name == "fused" else {}
                folder.log(kind="step", learner=name, step=step, loss=4.0 / step, **twin)
            phases = dict.fromkeys(PHASES, 0.0) | {"teacher": teacher, "backward": backward}
            reached = (accuracy or {}).get(name, 0.75)
            folder.log(
                kind="epoch",
                learner=name,
                epoch=epoch,
                step=2 * epoch,
                loss=1.0,
                accuracy=reached if epoch == len(epochs) else 0.5,
                phases=phases,
                seconds=teacher + backward,
                test_seconds=0.1,
            )
    for name, (logits, labels) in (tests or {}).items():
        folder.save(f"{name}-test", {"logits": logits, "labels": labels}, {})
    folder.close()
    return folder


def guesses(*rows, classes=3, sure=0.9):
    """Logits with the probability ``sure`` on each row's guess."""
    probabilities = torch.full((len(rows), classes), (1 - sure) / (classes - 1))
    probabilities[range(len(rows)), list(rows)] = sure
    return probabilities.log()


class Outline(html.parser.HTMLParser):
    """Checks that tags are closed in order; collects ids, links and rows of cells."""

    VOID = {"meta", "br", "img", "link", "hr", "input"}

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.tags, self.rows = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        found = dict(attributes)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [v for k, v in found.items() if k in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += text.strip()


def assert_alone(text):
    """The page needs no file and no network beside it, and is well-formed; its outline."""
    outline = Outline(text)
    assert "script" not in outline.tags and "@import" not in text and "url(http" not in text
    assert len(set(outline.ids)) == len(outline.ids)
    for link in outline.links:
        assert link.startswith("data:") or link[1:] in outline.ids, link
    assert not re.search(r"var\((?!--)", text)
    used = set(re.findall(r"var\((--[a-z0-9]+)\)", text))
    assert all(f"{name}:" in text for name in used)
    return outline


def by_title(tables, title):
    return next(table for table in tables if title in table.title)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    labels = torch.tensor([0, 1, 2, 0])
    tests = {
        "reference": (guesses(0, 1, 2, 1), labels),
        "full": (guesses(0, 1, 2, 0), labels),
        "fused": (guesses(0, 2, 2, 1), labels),
    }
    path = tmp_path_factory.mktemp("report") / "run"
    accuracy = {"full": 1.0, "fused": 0.5, "full-g2": 0.8}
    seconds = {**SECONDS, "full-g2": [(0.5, 0.5)] * 2, "control": [(0.1, 1.0)]}
    folder = write_run(path, seconds=seconds, accuracy=accuracy, tests=tests)
    return folder, *report.write(folder)


def test_page_is_whole_and_alone(run):
    folder, tables, _ = run
    outline = assert_alone((folder.path / "report.html").read_text())
    drawn = {path.stem for path in (folder.path / "plots").iterdir()}
    assert drawn == {
        "accuracy",
        "accuracy_by_time",
        "confusion",
        "generations",
        "ladder",
        "loss",
        "loss_difference",
        "phases",
        "reliability",
    }
    assert outline.tags.count("svg") == len(drawn)
    for table in tables:
        assert table.columns in outline.rows
        for row in table.rows:
            assert row in outline.rows, row


def test_ladder_by_hand(run):
    _, tables, _ = run
    rows = by_title(tables, "where the speed comes from").rows
    # 10 s, 8 s, 3 s, 2 s.
    assert rows == [
        ["reference", "plain PyTorch", "10.00", "", "", "", ""],
        ["fused", "fused loss", "8.00", "2.00", "1.25", "1.25", "backward 2.00"],
        ["cached", "teacher asked once", "3.00", "5.00", "2.67", "3.33", "teacher 5.00"],
        [
            "full",
            "channels_last, fused Adam, in place",
            "2.00",
            "1.00",
            "1.50",
            "5.00",
            "backward 1.00",
        ],
    ]


@pytest.mark.parametrize(
    ("arms", "names"),
    [
        (["full", "reference"], ["reference", "full"]),
        (["reference", "cached", "alone"], ["reference", "cached"]),
        (["reference"], []),
        (["fused", "full"], []),
        ([], []),
    ],
)
def test_ladder_without_some_arms(arms, names):
    seconds = {**SECONDS, "alone": SECONDS["full"]}
    epochs = {
        name: [
            {"phases": dict.fromkeys(PHASES, 0.0) | {"teacher": a, "backward": b}}
            for a, b in seconds[name]
        ]
        for name in arms
    }
    rungs = ladder(epochs)
    assert [rung["arm"] for rung in rungs] == names
    if not rungs:
        return
    total = math.prod(rung["ratio"] for rung in rungs)
    assert total == pytest.approx(rungs[0]["seconds"] / rungs[-1]["seconds"])
    assert total == pytest.approx(rungs[-1]["speedup"])
    saved = sum(rung["saved"] for rung in rungs)
    assert saved == pytest.approx(rungs[0]["seconds"] - rungs[-1]["seconds"])
    for rung in rungs:
        assert sum(rung["saved_by_phase"].values()) == pytest.approx(rung["saved"])
    if names == ["reference", "full"]:
        assert rungs[1]["adds"] == (
            "fused loss + teacher asked once + channels_last, fused Adam, in place"
        )


def test_ladder_compares_the_epochs_that_all_have():
    phases = dict.fromkeys(PHASES, 0.0)
    epochs = {
        "reference": [{"phases": phases | {"loss": 3.0}}] * 5,
        "fused": [{"phases": phases | {"loss": 2.0}}] * 2,
    }
    assert [rung["seconds"] for rung in ladder(epochs)] == [6.0, 4.0]


def test_summary_by_hand(run):
    _, tables, _ = run
    table = by_title(tables, "accuracy and time")
    rows = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert list(rows) == ["reference", "fused", "cached", "full", "full-g2"]
    full = rows["full"]
    assert (full["test accuracy"], full["best"], full["seconds"]) == ("100.0%", "100.0%", "2.0")
    assert full["speed-up over reference"] == "5.00"
    # Epochs of 1.5 and 0.5 seconds against 5.
    middle = statistics.median([5 / 1.5, 5 / 0.5])
    assert full["by epoch: median (range)"] == f"{middle:.2f} ({5 / 1.5:.2f} .. 10.00)"
    # Four images, one of which reference alone gets wrong: differences 0, 0, 0, 1.
    assert full["minus reference's, points"] == f"+25.00 ± {100 * 0.5 / 2:.2f}"
    assert rows["fused"]["minus reference's, points"] == "-25.00 ± 25.00"
    # All images in the bin of 0.9; all of them are right, or two of four.
    assert full["ECE"] == "10.00%" and rows["fused"]["ECE"] == "40.00%"
    assert rows["cached"]["ECE"] == ""
    # There is no reference of the second generation to be compared with.
    assert rows["full-g2"]["speed-up over reference"] == ""


def test_calibration_and_confusion_by_hand(run):
    folder, tables, _ = run
    rows = by_title(tables, "calibration").rows
    loss = -(3 * math.log(0.9) + math.log(0.05)) / 4
    assert ["reference", "15.00%", "90.0%", "75.0%", f"{loss:.4f}"] in rows
    confusion = folder.read_json("results.json")["distill"]["confusion"]
    assert confusion == {"arm": "full", "counts": [[2, 0, 0], [0, 1, 0], [0, 0, 1]]}
    assert by_title(tables, "what full confuses").rows == []


def test_confusion_names_the_commonest_pairs(tmp_path):
    labels = torch.tensor([0, 0, 0, 1, 2, 2])
    tests = {"full": (guesses(1, 1, 0, 1, 0, 2), labels)}
    tables, _ = report.write(write_run(tmp_path / "run", tests=tests, seconds={"full": [(1, 1)]}))
    assert by_title(tables, "what full confuses").rows == [
        ["0", "1", "2", "66.7%"],
        ["2", "0", "1", "50.0%"],
    ]


def test_many_classes_and_long_runs_are_drawn(tmp_path):
    labels = torch.arange(40)
    tests = {"full": (guesses(*range(40), classes=40), labels)}
    folder = write_run(tmp_path / "run", tests=tests, seconds={"full": [(0.1, 0.1)] * 60})
    report.write(folder)
    assert_alone((folder.path / "report.html").read_text())


def headline(folder):
    report.write(folder)
    text = (folder.path / "report.html").read_text()
    return re.search("<h1>(.*?)</h1>", text, re.S)[1]


def test_headlines(tmp_path, run):
    assert headline(run[0]) == (
        "Fused with kept predictions: 5.0 times faster than plain PyTorch with 100.0% test "
        "accuracy against 75.0% (one seed)"
    )
    labels = torch.zeros(400, dtype=torch.long)
    wrong = torch.ones(400, dtype=torch.long)
    tests = {"reference": (guesses(*wrong), labels), "fused": (guesses(*labels), labels)}
    slow = {"reference": [(1.0, 1.0)], "fused": [(2.0, 2.0)]}
    found = headline(write_run(tmp_path / "slow", seconds=slow, tests=tests))
    assert found == (
        "The fused loss: 2.0 times slower than plain PyTorch with 75.0% test accuracy against "
        "75.0% (one seed)"
    )
    one = write_run(tmp_path / "one", seconds={"full": SECONDS["full"]})
    assert headline(one) == (
        "Fused with kept predictions: 75.0% test accuracy after 2.0 seconds of training (one seed)"
    )
    two = {name: SECONDS[name] for name in ("reference", "full")}
    plain = headline(write_run(tmp_path / "plain", seconds=two, accuracy={"full": 0.7}))
    assert plain.endswith("with 70.0% test accuracy against 75.0% (one seed)")
    aimed = write_run(tmp_path / "aimed", seconds=two, target_accuracy=0.6)
    assert headline(aimed) == (
        "Fused with kept predictions: 60.0% test accuracy after 2.0 seconds, plain PyTorch after "
        "10.0 (one seed)"
    )


def test_a_run_without_a_student_has_a_page(tmp_path):
    tables, passed = report.write(write_run(tmp_path / "run", seconds={"teacher": [(0, 1)]}))
    assert tables == [] and passed
    assert_alone((tmp_path / "run/report.html").read_text())


def test_an_experiment_joins_by_one_line(tmp_path, monkeypatch):
    """Its module is asked for sections where the folder holds its part, or its file."""
    module = type(sys)("kdkernels.reports.extra")
    section = report.Section(
        "Extra",
        [report.table("An extra table", [{"a": 1}], {"a": "{a}"})],
        results={"value": 1},
        checks=[{"name": "wrong", "value": 2.0, "limit": 1.0, "passed": False}],
    )
    module.sections = lambda folder: [section]
    monkeypatch.setitem(sys.modules, "kdkernels.reports.extra", module)
    monkeypatch.setitem(report.SECTIONS, "extra/results.json", "extra:sections")
    folder = write_run(tmp_path / "run")
    tables, passed = report.write(folder)
    assert passed and all(table.title != "An extra table" for table in tables)
    folder.write_json("extra/results.json", {})
    tables, passed = report.write(folder)
    assert not passed and by_title(tables, "An extra table").rows == [["1"]]
    assert "1 of 1 checks failed" in (folder.path / "report.html").read_text()
    assert folder.read_json("results.json")["extra/results.json"] == {"value": 1}


def test_numbers_in_plots_keep_their_digits():
    figure = page.canvas()[0]
    figure.text(0.123456, 0.5, "0.987654 ± 0.001234", color=page.INK)
    text = page.svg(figure, "digits")
    assert "0.987654 ± 0.001234" in text and "var(--ink)" in text
    assert not re.search(r'="[^"]*\d\.\d{3}', text)


def test_colours_turn_with_the_screen():
    assert len({page.COLOURS[name] for name in ARMS}) == len(ARMS)
    assert page.colour("full-g2") == page.colour("full-3") == page.COLOURS["full"]
    for light in {*page.COLOURS.values()} - {page.INK}:
        assert light in page._DARK, light


# Comparisons


def three(tmp_path):
    """Three seeds; the second has no arm cached, full's accuracy is 1, 2 and 6 points higher."""
    paths = []
    for seed, (away, faster) in enumerate([(0.01, 1.0), (0.02, 2.0), (0.06, 4.0)]):
        seconds = dict(SECONDS)
        seconds["full"] = [(0.0, 2.0 / faster)] * 2
        if seed == 1:
            del seconds["cached"]
        accuracy = {"reference": 0.7 + seed / 100, "full": 0.7 + seed / 100 + away}
        folder = write_run(tmp_path / f"run{seed}", seed, seconds, accuracy)
        folder.config["distill"]["arms"] = ["reference"]  # so that they are one group
        folder.write_json("config.json", folder.config)
        paths.append(str(folder.path))
    return paths


def test_a_group_by_hand(tmp_path):
    paths = three(tmp_path)
    (group,) = compare.groups(paths[::-1])
    assert list(group.runs) == [0, 1, 2]
    tables = compare.write(paths, str(tmp_path / "page.html"))
    table = tables[0]
    rows = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    full = rows["full"]
    accuracy = [71, 73, 78]
    assert full["seeds"] == "3" and rows["cached"]["seeds"] == "2"
    assert full["test accuracy, %"] == f"74.00 ± {statistics.stdev(accuracy):.2f}"
    error = statistics.stdev([1, 2, 6]) / 3**0.5
    assert full["minus reference's, points"] == f"+3.00 ± {error:.2f}"
    # Seconds 4, 2 and 1 against 10 in each: the mean of the ratios, not their means' ratio.
    speeds = [10 / 4, 10 / 2, 10 / 1]
    assert full["times reference's speed"] == (
        f"{statistics.fmean(speeds):.2f} ± {statistics.stdev(speeds):.2f}"
    )
    assert full["seconds"] == f"2.33 ± {statistics.stdev([4, 2, 1]):.2f}"
    assert "ECE, %" not in table.columns
    # The ladder is of the runs that have all rungs.
    ladder = by_title(tables, "Where the speed comes from")
    assert "2 seeds" in ladder.note
    saved = [3 - 4, 3 - 1]
    assert ladder.rows[-1][3] == f"0.50 ± {statistics.stdev(saved):.2f}"
    outline = assert_alone((tmp_path / "page.html").read_text())
    assert all(row in outline.rows for table in tables for row in table.rows)


def test_what_differs_between_groups_is_a_column(tmp_path):
    paths = [
        str(write_run(tmp_path / f"{seed}-{t:g}", seed, temperature=t).path)
        for t in (1.0, 4.0)
        for seed in (0, 1)
    ]
    assert [list(group.runs) for group in compare.groups(paths)] == [[0, 1], [0, 1]]
    (table, *_) = compare.write(paths, str(tmp_path / "page.html"))
    assert table.columns[:3] == ["arm", "temperature", "seeds"]
    assert [row[:3] for row in table.rows if row[0] == "full"] == [
        ["full", "1.0", "2"],
        ["full", "4.0", "2"],
    ]
    assert "in 2 of 2 settings" in (tmp_path / "page.html").read_text()


def test_groups_that_differ_in_much_get_letters(tmp_path):
    more = {"temperature": 1.0, "alpha": 0.9, "lr": 0.01, "batch_size": 8}
    paths = [
        str(write_run(tmp_path / "one").path),
        str(write_run(tmp_path / "two", **more).path),
        str(write_run(tmp_path / "three", seconds={"full": SECONDS["full"]}).path),
    ]
    tables = compare.write(paths, str(tmp_path / "page.html"))
    assert by_title(tables, "Settings that differ").rows == [
        ["batch size", "64", "8", "64"],
        ["lr", "0.001", "0.01", "0.001"],
        ["temperature", "4.0", "1.0", "4.0"],
        ["alpha", "0.5", "0.9", "0.5"],
    ]
    rows = [row[1] for row in tables[0].rows if row[0] == "full"]
    assert tables[0].columns[1] == "group" and rows == ["A", "B", "C"]
    # Runs with other arms only are groups too.
    (table, *_) = compare.write([paths[0], paths[2]], str(tmp_path / "page.html"))
    assert [row[1] for row in table.rows if row[0] == "full"] == ["A", "B"]
    assert_alone((tmp_path / "page.html").read_text())


def test_compare_command(tmp_path, capsys):
    path = write_run(tmp_path / "run").path
    out = tmp_path / "deep/page.html"
    assert command.main(["compare", str(path), f"--out={out}"]) == 0
    shown = capsys.readouterr().out
    assert "Accuracy and time over seeds" in shown and str(out) in shown
    assert "±" not in re.sub(r"Mean ±.*|over seeds ±.*", "", shown)  # one seed has no spread
    assert_alone(out.read_text())
    with pytest.raises(SystemExit):
        command.main(["compare", "--help"])
    assert "RUN_DIR" in capsys.readouterr().out


def test_compare_refuses_in_one_sentence(tmp_path, capsys):
    good = str(write_run(tmp_path / "good").path)
    same = str(write_run(tmp_path / "same").path)
    teacher = str(write_run(tmp_path / "teacher", seconds={"teacher": [(0, 1)]}).path)
    stopped = str(write_run(tmp_path / "stopped", epochs=9).path)
    other = RunFolder.create(str(tmp_path / "other"), {"command": "soft-reg"}).path
    for arguments, said in (
        ([str(tmp_path / "none")], "no config.json"),
        ([str(other)], "is a run of soft-reg"),
        ([teacher], "no finished epoch"),
        ([stopped], "has 2 of 9 epochs"),
        ([good, same], "leave one of them out"),
        ([good, good], "leave one of them out"),
        ([good, f"--out={other}"], "cannot write"),
        ([], "RUN_DIR"),
    ):
        assert command.main(["compare", *arguments]) == 2, said
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1, err


def test_a_budget_may_end_a_run_early(tmp_path):
    path = str(write_run(tmp_path / "run", epochs=9, target_accuracy=0.7).path)
    (table, *_) = compare.write([path], str(tmp_path / "page.html"))
    column = table.columns.index("seconds to target (seeds)")
    assert [row[column] for row in table.rows if row[0] == "full"] == ["2.00 (1 of 1)"]


# TensorBoard


def scalars(folder, learner):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulators.EventAccumulator(str(folder.path / "tensorboard" / learner)).Reload()
    return {
        tag: [(event.step, pytest.approx(event.value)) for event in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
    }


def log_epoch(folder, epoch, loss):
    for step in (2 * epoch - 1, 2 * epoch):
        folder.log(kind="step", learner="full", step=step, loss=loss)
    folder.log(
        kind="epoch",
        learner="full",
        epoch=epoch,
        step=2 * epoch,
        loss=loss,
        accuracy=epoch / 10,
        phases={"loss": 0.5},
        seconds=0.5,
    )


def test_tensorboard_has_the_metrics(tmp_path):
    folder = write_run(tmp_path / "run")
    found = scalars(folder, "full")
    assert found["loss"] == [(step, 4.0 / step) for step in (1, 2, 3, 4)]
    assert found["epoch/accuracy"] == [(1, 0.5), (2, 0.75)]
    assert found["seconds/teacher"] == [(1, 1.0), (2, 0.0)]
    assert found["epoch/test_seconds"] == [(1, 0.1), (2, 0.1)]
    assert scalars(folder, "reference").keys() == found.keys()


@pytest.mark.parametrize("again", [True, False])
def test_tensorboard_follows_a_run_that_goes_back(tmp_path, again):
    """What came after the checkpoint is dropped, by a new process or by the same one."""
    folder = RunFolder.create(str(tmp_path / "run"), {})
    for epoch in (1, 2, 3):
        log_epoch(folder, epoch, 1.0)
    if again:
        folder.close()
        folder = RunFolder.open(str(folder.path))
    folder.trim(lambda line: line["step"] <= 2)
    log_epoch(folder, 2, 5.0)
    folder.log(kind="step", learner="full", step=5, loss="nan")
    folder.close()
    found = scalars(folder, "full")
    assert found["loss"][:4] == [(1, 1.0), (2, 1.0), (3, 5.0), (4, 5.0)]
    assert len(found["loss"]) == 5 and found["epoch/accuracy"] == [(1, 0.1), (2, 0.2)]
    assert len(list((folder.path / "tensorboard/full").iterdir())) == 1


def test_without_tensorboard_there_are_no_files(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    folder = write_run(tmp_path / "run")
    assert not (folder.path / "tensorboard").exists()


def test_a_full_disk_stops_the_curves_not_the_run(tmp_path):
    folder = RunFolder.create(str(tmp_path / "run"), {})
    (folder.path / "tensorboard").write_text("a file where the folder would be")
    log_epoch(folder, 1, 1.0)
    log_epoch(folder, 2, 1.0)
    folder.close()
    assert len(list(folder.metrics())) == 6


def test_equality_needs_an_interval_over_seeds(tmp_path):
    def said(name, aways):
        paths = [
            str(write_run(tmp_path / f"{name}{seed}", seed, accuracy={"full": 0.75 + away}).path)
            for seed, away in enumerate(aways)
        ]
        compare.write(paths, str(tmp_path / "page.html"))
        return re.search("<h1>(.*?)</h1>", (tmp_path / "page.html").read_text(), re.S)[1]

    assert "at equal accuracy (-0.2 to +0.2 points, 3 seeds)" in said("a", [0.001, -0.001, 0.0])
    assert "with no difference of accuracy shown (" in said("b", [0.05, -0.04, 0.01])
    assert "at higher accuracy (+" in said("c", [0.05, 0.05, 0.06])
    assert "with +0.0 points of accuracy (one seed)" in said("d", [0.0])


def test_a_busy_machine_is_named(tmp_path):
    folder = write_run(tmp_path / "run")
    lines = [
        line | ({"others": 0.4} if line["kind"] == "epoch" else {}) for line in folder.metrics()
    ]
    (folder.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report.write(folder)
    text = (folder.path / "report.html").read_text()
    assert "The machine was busy (disturbed: other work had 40% of the processors)" in text
