"""bench/gpu.py without a GPU: its statistics, and a small run on the CPU from case to report."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench import gpu  # noqa: E402


def test_everyone_has_a_turn_and_nobody_the_same_neighbour_always():
    order = []
    samplers = {name: lambda name=name: order.append(name) or 1.0 for name in "abc"}
    rounds = gpu.in_turns(samplers, 0)
    assert order == list("abcbcacababcbca")
    assert rounds == {name: [1.0] * gpu.MIN_ROUNDS for name in "abc"}


def test_ratios_are_of_the_same_round():
    """A clock that halves in the middle leaves the ratio of 3 as it is."""
    ours = [1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0]
    facts = gpu.summary({gpu.OURS: ours, "eager": [3 * x for x in ours]})
    assert facts["eager"]["times"] == [3, 3, 3] and facts[gpu.OURS]["times"] == [1, 1, 1]
    assert facts["eager"]["seconds"] == [3, 6, 6] and facts["eager"]["rounds"] == 7


def test_a_wrong_peer_is_noted_and_ours_stops():
    case = gpu.Case("op", "cpu", ["close", "far", "broken"])
    case.add("close", print, lambda: 0.1, 0.2)
    case.add("far", print, lambda: 0.3, 0.2)
    case.add("nan", print, lambda: float("nan"), 0.2)  # not wanted
    case.add("broken", print, lambda: [][0])
    assert list(case.calls) == ["close", "far"]
    assert case.notes == ["op: far is off by 0.3 (allowed 0.2)"]
    assert case.missing == {"broken": "IndexError: list index out of range"}
    with pytest.raises(SystemExit, match="kdkernels is off by nan"):
        case.add(gpu.OURS, print, lambda: float("nan"), 0.2)


def test_only_the_call_is_timed_on_the_device(monkeypatch):
    """A device that is a clock: what runs on it moves it on, events read it."""
    now = [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = now[0]

        def elapsed_time(self, end):
            return 1e3 * (end.at - self.at)

        def synchronize(self):
            pass

    class Buffer:
        def zero_(self):
            now[0] += 50e-6

        sum = zero_

    def sleep(cycles):
        now[0] += cycles / 1.5e9

    def call():
        now[0] += 7e-6

    facts = SimpleNamespace(
        name="GPU", L2_cache_size=50 << 20, memory_clock_rate=2619000, memory_bus_width=5120
    )
    cuda = SimpleNamespace(
        get_device_properties=lambda device: facts,
        current_device=lambda: 0,
        synchronize=lambda: None,
        Event=Event,
        _sleep=sleep,
    )
    sizes = []
    zeros = lambda size, **kind: sizes.append((size, kind)) or Buffer()  # noqa: E731
    names = {"cuda": cuda, "zeros": zeros, "uint8": 1, "int32": 4}
    monkeypatch.setattr(gpu, "torch", SimpleNamespace(**names))
    clock = gpu.CudaClock()
    assert [size * kind["dtype"] for size, kind in sizes] == [100 << 20, 100 << 20]
    assert clock.cycles_per_second == pytest.approx(1.5e9)
    assert clock.nominal_bandwidth() == pytest.approx(3.352e12, rel=1e-3)  # an H100's
    for mode, before in (("cold", 100e-6), ("warm", 7e-6)):
        sample = clock.sampler(call, mode)
        start = now[0]
        assert sample() == pytest.approx(7e-6)
        assert now[0] - start > before + 7e-6 + 20e-6  # the other data or call, and the sleep
    facts.memory_clock_rate = 0
    assert clock.nominal_bandwidth() is None


def test_a_run_on_the_cpu(tmp_path, capsys):
    only = "x 10 fp32|200000 fp32 labels|ResNet-18|noises GPT-2 bf16|dot 67M bf16|SGD|regression 1 "
    arguments = ["--device", "cpu", "--seconds", "0", "--elements", "20000", "--flush", "1"]
    gpu.main([*arguments, "--only", only, "--peers", "eager", "copy", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "gpu-cpu.json").read_text())
    results = {result["title"]: result for result in report["results"]}
    assert set(results) == {title for title in gpu.CASES if re.search(only, title)}
    assert len(results) == 11 + len(gpu.kdkernels.divergences())
    small = results["distillation 1048576 x 10 fp32"]
    assert list(small["cases"]) == ["kdkernels", "kdkernels in place", "eager", "copy"]
    assert small["bytes"] == 3 * 20000 * 4
    assert small["missing"].keys() == {"Liger", "QuACK"}
    near = results["decoupled 1048576 x 10 fp32, gap 0.1"]
    assert list(near["cases"]) == ["kdkernels", "copy"]
    for result in results.values():
        assert not result["notes"]
        for facts in result["cases"].values():
            assert all(facts[mode]["seconds"][1] > 0 for mode in gpu.MODES)
            if result["bytes"]:
                want = result["bytes"] / facts["cold"]["seconds"][1] / report["copy_bandwidth"]
                assert facts["of_copy"] == pytest.approx(want)
    stepped = results["AdamW ResNet-18 fp32"]
    assert stepped["bytes"] == 7 * 4 * sum(min(n, 20000) for n in gpu.resnet18())
    assert list(stepped["cases"]) == ["kdkernels", "kdkernels, no noise", "copy"]
    text = (tmp_path / "gpu-cpu.md").read_text()
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + sum(len(result["cases"]) for result in results.values())
    assert len({line.count("|") for line in table}) == 1
    assert "- Liger: needs a GPU" in text and text in capsys.readouterr().out
    assert (tmp_path / "gpu-cpu.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "torch sees no CUDA GPU here; --device cpu" in capsys.readouterr().err
