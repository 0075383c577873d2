"""The benchmarks without their times: statistics of made-up samples, turns, the report."""

import gc
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kdkernels import measuring as benchmark
from kdkernels.__main__ import main
from kdkernels.measuring import OURS, Comparison
from kdkernels.tools import bench
from kdkernels.tools.comparisons import IGNORED, training_logits

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench import report  # noqa: E402


@pytest.fixture
def short_samples(monkeypatch):
    monkeypatch.setattr(benchmark, "SAMPLE_SECONDS", 0.0)


def test_the_interval_is_of_the_median():
    assert benchmark.interval([3.0] * 7) == (3, 3, 3)
    # A binomial distribution's P(X <= 40) of 101 is 0.023, its P(X <= 41) is 0.037.
    assert benchmark.interval(list(range(1, 102))) == (51, 41, 61)
    assert benchmark.interval([1.0, 3.0, 2.0, 5.0]) == (2.5, 1, 5)


@pytest.mark.parametrize("rounds", [6, 7, 25, 101])
def test_the_interval_holds_the_truth(rounds):
    """At least as often as it says, within what 2,000 samples allow."""
    random = np.random.default_rng(0)
    samples = np.exp(0.5 + 0.3 * random.standard_normal((2000, rounds)))
    ends = np.array([benchmark.interval(values)[1:] for values in samples.tolist()])
    held = np.mean((ends[:, 0] <= np.exp(0.5)) & (np.exp(0.5) <= ends[:, 1]))
    assert 0.935 <= held <= 0.99


def test_ratios_are_of_the_same_round():
    """A machine that slows down thirtyfold in the middle leaves the ratios as they are."""
    slow = np.concatenate((np.ones(10), np.linspace(1, 30, 10)))
    rounds = {"eager": 3 * slow, OURS: slow, "triad": slow / 2}
    cases = benchmark.summary({name: s.tolist() for name, s in rounds.items()}, bytes=10**9)
    assert cases["eager"]["faster"] == (1, 1, 1)
    assert cases[OURS]["faster"] == pytest.approx((3, 3, 3), rel=1e-4)
    assert cases[OURS]["of_triad"] == pytest.approx((0.5, 0.5, 0.5), rel=1e-4)
    assert cases[OURS]["median"] == pytest.approx(np.median(slow), rel=1e-4)
    assert cases[OURS]["quartiles"] == pytest.approx(np.quantile(slow, (0.25, 0.75)), rel=1e-4)
    assert cases[OURS]["bytes_per_second"] == 10**9 / cases[OURS]["median"]
    assert "of_triad" not in benchmark.summary({"a": [1.0]})["a"]


def test_everyone_has_a_turn_in_each_round(short_samples):
    order, warm = [], 2
    calls = {name: lambda name=name: order.append((name, gc.isenabled())) for name in "abcd"}
    rounds = benchmark.take_turns(calls, 0, least=30)
    assert {name: len(own) for name, own in rounds.items()} == dict.fromkeys("abcd", 30)
    turns = [order[i : i + 4] for i in range(4 * warm, len(order), 4)]
    assert all({name for name, _ in turn} == set("abcd") for turn in turns)
    assert not any(collecting for turn in turns for _, collecting in turn) and gc.isenabled()
    followers = {(a, b) for a, b in zip(order[4 * warm :], order[4 * warm + 1 :], strict=False)}
    assert len({(a, b) for (a, _), (b, _) in followers if a != b}) == 12  # every pair of neighbours


def test_a_short_call_is_timed_many_times_in_a_row(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])

    def call():
        calls.append(now[0])
        now[0] += 1e-3

    rounds = benchmark.take_turns({"a": call}, 0, least=3)
    assert rounds["a"] == pytest.approx([1e-3] * 3)
    assert len(calls) == 2 + 5 + 3 * 20


def test_what_a_call_spoils_is_made_again_before_each_sample(monkeypatch):
    now, whole = [0.0], [0]
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])

    def call():
        now[0] += 1e-3 if whole[0] > 0 else 1.0
        whole[0] -= 1

    def make():
        whole[0] = 4

    rounds = benchmark.take_turns({"a": call}, 0, least=3, before={"a": (make, 4)})
    assert rounds["a"] == pytest.approx([1e-3] * 3)


def comparison():
    x = torch.zeros(300)
    found = Comparison("adding", lambda call: torch.testing.assert_close(call(), x + 1), bytes=2400)
    found.add("eager", lambda: x + 1)
    found.add(OURS, lambda: torch.ones(300), per=2)
    found.add_peer("a package", "no_such_package", print)
    return found


def test_who_is_wrong_or_absent_is_not_timed():
    found = comparison()
    with pytest.raises(AssertionError):
        found.add("wrong", lambda: torch.zeros(300))
    assert list(found.calls) == ["eager", OURS]
    assert found.missing == {"a package": "cannot be imported (No module named 'no_such_package')"}


def test_a_result_goes_to_json_and_back(short_samples):
    found = comparison()
    found.add("memcpy", lambda: None, check=False)
    found.add("peer", lambda: torch.ones(300))  # 1,200 bytes
    result = benchmark.measure(found, 0, least=5)
    assert list(result["cases"]) == ["eager", "peer", OURS, "memcpy", "triad"]
    assert result["cases"]["peer"]["allocations"] == 1
    assert result["cases"]["peer"]["allocated"] == 1200
    record = benchmark.record(benchmark.machine(), [result])
    again = json.loads(json.dumps(record))
    assert benchmark.ratio(again["results"][0], "eager", OURS) == result["cases"][OURS]["faster"]
    assert again["results"][0]["others"] is None or again["results"][0]["others"] >= 0
    assert again["machine"] == record["machine"] and record["machine"]["cores"] > 0
    shown = benchmark.lines(again["results"][0])
    assert len(shown) == 7 and shown == benchmark.lines(result)


def test_times_are_of_a_unit_of_work(monkeypatch):
    found = Comparison("work", lambda call: None)
    monkeypatch.setattr(benchmark, "take_turns", lambda calls, *_: {"eager": [4.0, 8.0, 12.0]})
    found.add("eager", lambda: None, per=4)
    result = benchmark.measure(found)
    assert result["cases"]["eager"]["seconds"] == [1, 2, 3] and list(result["cases"]) == ["eager"]


def test_a_case_may_not_change_the_threads(short_samples):
    before = torch.get_num_threads()
    found = Comparison("threads", lambda call: None)
    found.add("eager", lambda: torch.set_num_threads(before + 1), check=False)
    try:
        with pytest.raises(RuntimeError, match="number of threads"):
            benchmark.measure(found, 0, least=1)
    finally:
        torch.set_num_threads(before)


def test_durations_and_ratios_have_three_digits():
    shown = [benchmark.duration(s) for s in (1.5, 0.0123, 99.96e-6, 2e-9)]
    assert shown == ["1.5 s", "12.3 ms", "100 µs", "2 ns"]
    assert benchmark.duration(0.9e-3, (1.234e-3,)) == "900 to 1234 µs"
    assert [benchmark.times(x) for x in (0.5, 9.949, 9.96, 99.6)] == ["0.50", "9.95", "10.0", "100"]


def test_slug():
    facts = {"processor": "Intel(R) Xeon(R) CPU E5-2690 v4 @ 2.60GHz", "cores": 28}
    assert report.slug(facts) == "intel-xeon-e5-2690-v4-28-cores"


def test_quick(short_samples, tmp_path):
    said, threads = [], torch.get_num_threads()
    path = tmp_path / "x.json"
    record = bench.quick(1, str(path), seconds=0, largest=2000, out=said.append)
    assert torch.get_num_threads() == threads
    assert {result["threads"] for result in record["results"]} == {1}
    assert json.loads(path.read_text()) == json.loads(json.dumps(record))
    text = "\n".join(said)
    assert len(record["results"]) == 10
    for result in record["results"]:
        assert result["title"] in text
        assert any(name.startswith(OURS) for name in result["cases"])
        assert all(len(case["seconds"]) == 6 for case in result["cases"].values())


def test_the_command_names_what_is_wrong(capsys, tmp_path):
    assert main(["bench"]) == 2 and "give --quick" in capsys.readouterr().err
    assert main(["bench", "--quick", "--threads", "0"]) == 2
    assert "'0' is given; it must be a whole number of at least 1" in capsys.readouterr().err
    assert main(["bench", "--quick", "--json", str(tmp_path / "no" / "x.json")]) == 2
    assert "cannot write" in capsys.readouterr().err


@pytest.mark.parametrize("classes", [1000, 32000])
def test_training_logits_are_peaked_and_as_far_apart_as_asked(classes):
    """Two draws from a row agree half of the time, and so do the label and the next draw."""
    made = training_logits(200, classes, 0.1, prompts=0.25, dtype=torch.float64)
    p = made.teacher.softmax(-1)
    assert p.square().sum(-1).mean() == pytest.approx(0.5, abs=0.07)
    assert (made.student - made.teacher).std() == pytest.approx(0.1, rel=0.01)
    assert (made.labels[:50] == IGNORED).all() and (made.labels[50:] >= 0).all()
    at_label = p[50:].gather(-1, made.labels[50:, None])
    assert at_label.mean() == pytest.approx(0.5, abs=0.1)
    far = training_logits(200, classes, math.inf, dtype=torch.bfloat16, seed=1)
    assert far.student.dtype == torch.bfloat16
    both = torch.stack((far.student.flatten(), far.teacher.flatten())).float()
    assert abs(torch.corrcoef(both)[0, 1]) < 0.02 and both.std() == pytest.approx(2, rel=0.02)


def made_up(title, suite, names, bytes=0, growth=None, missing=None):
    rounds = {name: [(n + 1) * 1e-3 + k * 1e-5 for k in range(9)] for n, name in enumerate(names)}
    cases = benchmark.summary(rounds, bytes)
    for case in cases.values():
        case |= {"allocations": 3, "allocated": 2**20}
    return report.kept(
        {
            "title": title,
            "suite": suite,
            "bytes": bytes,
            "growth": growth,
            "missing": missing or {},
            "date": "2026-01-02T03:04:05+00:00",
            "threads": 2,
            "load": [0.5, 1.5],
            "others": 0.25,
            "cases": cases,
        }
    )


def test_the_page_shows_every_case(tmp_path):
    facts = {
        "processor": "A <processor>",
        "cores": 2,
        "isa": "avx2",
        "threads": 2,
        "kdkernels": "1",
        "torch": "2",
        "numpy": "3",
        "python": "4",
        "compiler": "c",
        "system": "s",
        "triad_bytes_per_second": 2e10,
        "peers": {"trl": "5"},
    }
    growth = [
        {"plot": "loss, 1 & 2", "axis": "rows", "value": 10**k, "elements": 10**k} for k in range(3)
    ]
    in_place = f"{OURS} in place"
    first = made_up(report.LARGE, "distill", ["eager", "TRL", in_place, "triad"], bytes=10**6)
    overhead = made_up(report.OVERHEAD, "overhead", [report.NOTHING, OURS])
    results = [
        first,
        made_up(report.EXPERIMENT, "train", ["NumPy loop", OURS], missing={"Opacus": "not there"}),
        overhead,
        *(
            made_up(f"growth {k}", "noise", ["eager", OURS, "triad"], 8, g)
            for k, g in enumerate(growth)
        ),
    ]
    record = benchmark.record(facts, results)
    json_path, html_path = report.write(record, tmp_path)
    assert json_path.name == "a-processor-2-cores.json"
    assert json.loads(json_path.read_text()) == json.loads(json.dumps(record))
    assert json_path.read_text().count("\n") < 200 and '"seconds"' not in json_path.read_text()
    text = html_path.read_text()
    for result in results:
        assert result["title"] in text
        assert all(f"<td>{name}</td>" in text for name in result["cases"])
    assert text.count("(disturbed: other work had 25% of the processors)") == len(results)
    assert "A &lt;processor&gt;" in text and "trl\n5" in text and "Opacus: not there" in text
    assert text.count("data:image/png;base64,") == 2  # all ratios, and the growth plot
    pictures = list(tmp_path.glob("*.png"))
    assert len(pictures) == 2 and all(p.read_bytes().startswith(b"\x89PNG") for p in pictures)
    assert text.count('class="missed"') == 3 and text.count('class="reached"') == 1
    assert "http" not in text  # one page, nothing to load
    lines = report.goal_lines(record)
    assert sum(line.endswith("missed") for line in lines) == 3
    words = [
        report.compared(*ends, 2, at_least) for ends in ((2, 3), (1, 3)) for at_least in (1, 0)
    ]
    assert words == ["reached", "missed", "undecided", "undecided"]

    newer = made_up(report.OVERHEAD, "overhead", [report.NOTHING, OURS, "eager"])
    report.write(benchmark.record(facts, [newer]), tmp_path, add=True)
    merged = json.loads(json_path.read_text())["results"]
    assert [r["title"] for r in merged] == [r["title"] for r in results if r is not overhead] + [
        report.OVERHEAD
    ]
    assert "eager" in merged[-1]["cases"]
