"""bench/counts.py: what it takes, how a time is made of counts, and that few rows stand for all."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import ptx
import pytest

if ptx.toolkit() is None:
    pytest.skip("needs nvcc", allow_module_level=True)
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))
import counts  # noqa: E402
from counting import cost, linear, ours, tables  # noqa: E402


@pytest.mark.parametrize(
    "words",
    [
        *("--losses kl", "--classes 0", "--classes 1.5", "--rows no", "--dtypes fp32", "--gap -1"),
        *("--gap near", "--temperature 0", "--options cap", "--options label_smoothing", "--ops ("),
        *("--losses total_variation --options top_k", "--json /no/such/folder/x.json"),
    ],
)
def test_a_wrong_value_gets_one_sentence_that_names_the_argument(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        counts.main(words.split())
    said = capsys.readouterr().err
    name = next(word for word in reversed(words.split()) if word.startswith("--"))
    assert stopped.value.code == 2 and said.count("\n") == 1
    assert f"argument {name}: " in said and "requires" in said


def test_losses_at_any_size_become_rows_of_json(tmp_path, capsys):
    path = tmp_path / "rows.json"
    words = "--losses forward_kl decoupled --classes 7 130 --rows 1 5 --dtypes float32"
    words += " --gap 0.1 far --temperature 1 --options soft_cap,statistics prompts --json"
    counts.main([*words.split(), str(path)])
    rows = json.loads(path.read_text())
    assert len(rows) == 2 * 2 * 2 * 2 * 2
    keys = ("divergence", "classes", "rows", "dtype", "gap", "options")
    assert len({json.dumps([row[key] for key in keys]) for row in rows}) == len(rows)
    for row in rows:
        assert row["who"] == "kdkernels" and row["temperature"] == 1 and row["launches"] >= 1
        assert row["gap"] in (0.1, "far") and row["elements"] == row["rows"] * row["classes"]
        assert row["of_floor"] >= max(row["throughput"], row["latency"]) > 0 and row["moved"] > 0
        assert sum(row["bound_by"].values()) == pytest.approx(1)
        assert max(row["bound_by"], key=row["bound_by"].get) == "latency"  # of so few rows
    shown = capsys.readouterr().out
    assert shown.count("| kdkernels |") == len(rows) and "## Near and far" in shown


@pytest.mark.parametrize(
    "loss",
    [
        ours.Loss("forward_kl", "float32", 100, 640, 0.1),
        ours.Loss("js", "float32", 60, 640, options=("prompts",)),
    ],
)
def test_few_rows_stand_for_all(loss, monkeypatch):
    monkeypatch.setattr(ours, "SAMPLE", 256 * loss.classes)
    few, elements, minimum = ours.count_loss(loss)
    monkeypatch.setattr(ours, "SAMPLE", 1024 * loss.classes)
    every, *same = ours.count_loss(loss)
    assert same == [elements, minimum] and len(few) == len(every)
    for a, b in zip(few, every, strict=True):
        assert (a.kernel, a.blocks, a.resident) == (b.kernel, b.blocks, b.resident)
        for name in ("moved", "slots", "fma", "mufu", "shared", "path", "mean_path"):
            assert getattr(a, name) == pytest.approx(getattr(b, name), rel=0.05, abs=200), name


def test_what_is_noted_is_what_runs():
    loss = ours.Loss("forward_kl", "float16", 300, 70, labels=True)
    op = ours.launcher_of(loss.case(1))
    ran, noted = ours.run(op, loss.case(70)), ours.note(op, loss.case(70, blank=True))
    for a, b in zip(ran, noted, strict=True):
        for name in ("kernel", "grid", "block", "cluster", "static_shared", "dynamic_shared"):
            assert getattr(a, name) == getattr(b, name)
        assert a.counts["opcodes"] and not b.counts["opcodes"]


# Threads, registers, shared memory; blocks of an SM as NVIDIA's occupancy calculator has them.
@pytest.mark.parametrize(
    ("threads", "registers", "shared", "blocks"),
    [
        (32, 16, 0, 32),
        (128, 32, 0, 16),
        (256, 64, 0, 4),
        (256, 65, 0, 3),
        (512, 128, 0, 1),
        (1024, 64, 0, 1),
        (128, 40, 100 << 10, 2),
    ],
)
def test_blocks_of_an_sm(threads, registers, shared, blocks):
    launch = SimpleNamespace(block=(threads, 1, 1), static_shared=0, dynamic_shared=shared)
    assert cost.resident_blocks(launch, registers) == cost.SMS * blocks


def test_the_longest_limit_binds():
    a_wave = {"blocks": 264, "resident": 264, "path": 1000, "mean_path": 1000}
    idle = cost.Cost("k", **a_wave).seconds()
    assert max(idle, key=idle.get) == "latency" and idle["latency"] == 1000 / cost.CLOCK
    waves = cost.Cost("k", **(a_wave | {"blocks": 265})).seconds()
    assert waves["latency"] == 2000 / cost.CLOCK
    uneven = cost.Cost("k", 265, 264, path=9000, mean_path=1000).seconds()
    assert uneven["latency"] == 9000 / cost.CLOCK
    few = cost.Cost("k", 4, 264, slots=1e6, moved=1.0).seconds()
    assert max(few, key=few.get) == "slots" and few["slots"] == 1e6 / (4 * 4 * cost.CLOCK)
    row = tables.row("op", "float32", "s", "x", [cost.Cost("k", moved=3.35e6)], 1000, 3350.0)
    assert row.of_floor == pytest.approx(1) and row.bound_by == {"bytes": 1.0} and row.latency == 0


def test_a_path_grows_with_the_rows_of_a_block():
    assert ours.path_of(32, [(4, 500), (8, 900)]) == 100 + 32 * 100
    assert ours.path_of(4, [(4, 500), (4, 500)]) == 500
    assert ours.path_of(12, [(4, 500), (4, 500)]) == 1500
    assert ours.path_of(12, [(12, 700)]) == 700


def test_the_whole_table_has_every_divergence_near_and_far():
    losses = {loss for grid in counts.STANDARD for loss in grid}
    for name in counts.reference.DIVERGENCES:
        assert {loss.gap for loss in losses if loss.divergence == name} >= {0.1, math.inf}


# Of the four shapes: time over that of the products at most.
OF_PRODUCTS = (1.15, 1.28, 1.33, 1.65)


def test_a_fused_linear_costs_little_beside_its_products():
    found = linear.counted()
    whose = {
        (r["rows x width x classes"], r["rows that count"], r["divergence"], r["kernels of"]): r
        for r in found
    }
    assert len(whose) == len(found) == len(linear.SHAPES) * 3 * len(linear.WAYS)
    page = (ROOT / "docs" / "linear.md").read_text()
    for shape, most in zip(linear.SHAPES, OF_PRODUCTS, strict=True):
        size = " x ".join(map(str, shape))
        shown = [(1, "kdkernels"), (0.5, "kdkernels"), (1, "TRL's way"), (1, "Liger's way")]
        cells = [whose[size, part, "forward_kl", who]["x products"] for part, who in shown]
        assert f"| {size} | {' | '.join(f'{cell:.2f}' for cell in cells)} |" in page
        for divergence in ("forward_kl", "js"):
            ours_, trl = (whose[size, 1, divergence, who] for who in ("kdkernels", "TRL's way"))
            assert 1 < ours_["x products"] <= most < trl["x products"]
        all_rows, half = (whose[size, part, "forward_kl", "kdkernels"] for part in (1, 0.5))
        assert half["ms"] < 0.6 * all_rows["ms"] and half["products"] < all_rows["products"]
    assert "| kdkernels |" in linear.markdown(found)
