"""The table of launch configurations, csrc/cuda/plan.h: a pure function, tested as one."""

import itertools

import launchers
import ptx
import pytest

pytestmark = [pytest.mark.quick, pytest.mark.skipif(ptx.toolkit() is None, reason="needs nvcc")]
SIZES = [*range(1, 1100), *range(1100, 20000, 37), *range(20000, 270000, 997), 10**6, 2**31 + 5]
WALKS = ["tile", "warp", "held", "stream"]
KINDS = list(itertools.product(ptx.DEVICES, (2, 4, 8), (False, True)))


@pytest.fixture(scope="module")
def table():
    return launchers.build().python


def device(table, arch):
    sms, block, multiprocessor, _, _ = ptx.DEVICES[arch]
    sizes = {"shared_per_block": block, "shared_per_sm": multiprocessor}
    return launchers.fill(table.Device(), arch=arch, sms=sms, **sizes)


@pytest.mark.parametrize("extra", ["nothing", "statistics", "transforms"])
@pytest.mark.parametrize("third_sweep", [False, True])
@pytest.mark.parametrize(("arch", "size"), sorted({kind[:2] for kind in KINDS}))
def test_every_row_has_a_place(table, arch, size, third_sweep, extra):
    """Whatever the walk, its threads hold the row, and the device holds its blocks."""
    d = device(table, arch)
    last = 0
    for classes in SIZES:
        p = table.plan_distillation(classes, size, getattr(table.Extra, extra), d, third_sweep)
        assert p.threads % 32 == 0 and 32 <= p.threads <= 1024
        assert p.shared + 2048 <= d.shared_per_block
        assert p.cluster in ((1, 2, 4, 8) if arch >= 90 else (1,))
        walk = WALKS.index(p.walk.name)
        assert walk >= last, "the walks follow each other as rows grow"
        last = walk
        if p.walk.name == "tile":
            assert p.lanes * 16 >= classes and p.rows % (p.threads // p.lanes) == 0
            assert 0 < p.rows * classes <= 2048
        if p.walk.name == "warp":
            assert p.lanes == 32 and classes <= 1024 and p.rows == p.threads // 32
            assert not third_sweep
        if p.walk.name == "held":
            assert p.slots * p.threads * p.cluster * (16 // size) >= classes
            planes = 2 if extra == "transforms" and size == 2 else 1
            assert p.shared >= p.slots * p.threads * 2 * 16 * planes


# V up to which a row is read once, from what a block's or a cluster's shared memory holds.
HELD = {
    **{(75, 2): 12000, (80, 2): 36800, (80, 4): 18400, (86, 2): 20400, (89, 4): 10200},
    **{(90, 2): 425000, (90, 4): 212000, (90, 8): 110000, (100, 2): 425000, (120, 2): 163000},
}


@pytest.mark.parametrize(("arch", "size"), HELD)
def test_long_rows_are_read_once(table, arch, size):
    d, limit = device(table, arch), HELD[arch, size]
    assert table.plan_distillation(limit, size, table.Extra.nothing, d, False).walk.name == "held"
    assert (
        table.plan_distillation(limit * 11 // 10, size, table.Extra.nothing, d, False).walk.name
        == "stream"
    )


@pytest.mark.parametrize("arch", [90, 100])
@pytest.mark.parametrize(("classes", "size"), [(32000, 2), (50257, 2), (128256, 2), (32000, 4)])
def test_blocks_overlap(table, arch, classes, size):
    """Three blocks an SM, so that one's loads hide behind the others' arithmetic."""
    p = table.plan_distillation(classes, size, table.Extra.nothing, device(table, arch), False)
    assert 3 * (p.shared + 3072) <= device(table, arch).shared_per_sm


@pytest.mark.parametrize(("arch", "size", "transformed"), KINDS)
def test_every_row_of_a_divergence_has_a_place(table, arch, size, transformed):
    """A block of its launch fits the device, and holds the row or chunks of it."""
    d = device(table, arch)
    acc = max(size, 4)
    for classes in SIZES:
        for entries, sides in ((0, 2), (0, 1), (1, 0), (64, 1), (1024, 0), (1024, 1)):
            p = table.plan_divergence(classes, entries, size, transformed, sides, d)
            assert p.threads in (32, 64, 128, 256, 512)[: 4 if size == 8 else 5]
            assert p.shared + table.divergence_static + 1024 <= d.shared_per_block
            a_class = (sides * acc + size if transformed else sides * size) if sides else 0
            assert p.shared >= p.capacity * a_class + entries * (2 * acc + 8)
            assert p.capacity * size % 16 == 0
            if sides == 0:
                assert p.capacity == 0
            elif p.capacity < classes:
                assert p.capacity * a_class <= 24 * 1024 < classes * a_class
                blocks = d.shared_per_sm // (p.shared + table.divergence_static + 1024)
                assert blocks >= 3 or arch == 75 or entries > 64
            else:
                assert p.capacity < classes + 16


@pytest.mark.parametrize(("classes", "threads"), [(10, 32), (500, 32), (32000, 512)])
def test_short_rows_of_a_divergence_have_a_warp(table, classes, threads):
    assert table.plan_divergence(classes, 0, 2, False, 2, device(table, 90)).threads == threads


@pytest.mark.parametrize("arch", ptx.DEVICES)
@pytest.mark.parametrize("steps", [0, 1, 131, 5000, 10**6, 2**31, 2**33])
def test_noise_covers_every_step(table, arch, steps):
    chunks = [table.plan_noise(steps, blocks, device(table, arch)) for blocks in (2, 3, 4)]
    for p in (*chunks, table.plan_sums(steps)):
        assert p.steps >= 1 and (p.blocks - 1) * p.steps < max(1, steps) <= max(
            1, p.blocks * p.steps
        )
    assert max(p.steps for p in chunks) <= 32
    assert table.plan_sums(steps).blocks <= table.sum_blocks


def test_replicas_get_warps_until_threads_pay(table):
    d = device(table, 90)
    few, many = (table.plan_regression(n, False, d) for n in (132 * 100, 132 * 200))
    assert few.warp and not many.warp
    assert table.plan_regression(10**6, True, d).warp, "a normal a sample: always a warp"
    assert table.plan_regression(1, False, d).blocks == 1
    assert table.plan_regression(10**9, True, d).blocks == 2 * 132, "no more than lives there"
