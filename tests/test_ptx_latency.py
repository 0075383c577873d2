"""The critical path that the emulator reports of a launch, on kernels whose path is plain."""

import numpy as np
import ptx
import pytest

pytestmark = pytest.mark.skipif(ptx.toolkit() is None, reason="needs nvcc")

# Cycles, as ptx/latency.cpp has them.
GLOBAL, COPY, SHARED, FP32, BRANCH, BARRIER, FENCE = 650, 700, 30, 4, 6, 25, 500

HEADER = """.version 9.0
.target sm_90
.address_size 64
.visible .entry k(.param .u64 p) {
.reg .b32 %r<99>;
.reg .f32 %f<99>;
.reg .b64 %rd<9>;
.reg .pred %p<9>;
.shared .align 16 .b8 s[4096];
mov.u32 %r90, s;
mov.u32 %r1, %tid.x;
mad.lo.u32 %r90, %r1, 16, %r90;
mov.u32 %r91, %ctaid.x;
mov.u32 %r92, %ntid.x;
mad.lo.u32 %r91, %r91, %r92, %r1;
mul.wide.u32 %rd2, %r91, 16;
ld.param.u64 %rd1, [p];
add.u64 %rd1, %rd1, %rd2;
"""  # every thread has 16 bytes of shared memory, at %r90, and of global memory, at %rd1


def launch(body, threads=32, blocks=1, seed=0, cluster=1):
    library = ptx.load(f"{HEADER}{body}\nret;\n}}")
    x = ptx.aligned(np.ones(4096, np.float32))
    with library.run(seed=seed, resident=8) as run:
        run.launch("k", (blocks,), (threads,), [run.buffer(x)], cluster=(cluster,))
    return run.launches[0]


def path(body, **options):
    return launch(body, **options).critical_path


def stored(register):
    return f"st.global.f32 [%rd1], {register};"


def fmas(count, dependent):
    """`count` fused multiply-adds and a store that waits for all of them."""
    lines = ["mov.f32 %f0, 0f3F800000;"]
    for i in range(1, count + 1):
        source = i - 1 if dependent else 0
        lines.append(f"fma.rn.f32 %f{i}, %f{source}, %f{source}, %f{source};")
    return "\n".join([*lines, stored(f"%f{count}")])


def test_a_chain_takes_its_latencies_and_independent_instructions_their_issue():
    chain = path(fmas(80, True)) - path(fmas(40, True))
    assert chain == 40 * FP32
    assert path(fmas(80, False)) - path(fmas(40, False)) == 40


def test_loads_overlap_unless_an_address_waits_for_another():
    load = "ld.global.u32 %r{0}, [%rd1+{1}];"
    several = "\n".join(load.format(i, 4 * i) for i in range(2, 9))
    use = "\n".join(f"add.u32 %r2, %r2, %r{i};" for i in range(3, 9)) + "st.global.u32 [%rd1], %r2;"
    assert GLOBAL < path(several + use) < GLOBAL + 60
    chase = """
    ld.global.u32 %r2, [%rd1];
    sub.u32 %r2, %r2, %r2;
    cvt.u64.u32 %rd2, %r2;
    add.u64 %rd2, %rd2, %rd1;
    ld.global.u32 %r3, [%rd2];
    st.global.u32 [%rd1], %r3;"""
    assert 2 * GLOBAL < path(chase) < 2 * GLOBAL + 60


def test_a_load_whose_result_is_not_used_holds_nothing_up():
    unused = path("ld.global.u32 %r2, [%rd1];" + fmas(4, True))
    assert unused < 100


def test_iterations_of_a_loop_come_one_after_another():
    loop = """
    mov.u32 %r2, 0;
    mov.f32 %f1, 0f3F800000;
    again:
    fma.rn.f32 %f1, %f1, %f1, %f1;
    fma.rn.f32 %f1, %f1, %f1, %f1;
    fma.rn.f32 %f1, %f1, %f1, %f1;
    fma.rn.f32 %f1, %f1, %f1, %f1;
    add.u32 %r2, %r2, 1;
    setp.lt.u32 %p1, %r2, {0};
    @%p1 bra again;
    """ + stored("%f1")
    assert path(loop.format(20)) - path(loop.format(10)) == 10 * (3 * FP32 + BRANCH)
    # A store an iteration waits for the load before it, so that iterations do not overlap.
    loop = """
    mov.u32 %r2, 0;
    again:
    ld.global.u32 %r3, [%rd1];
    st.global.u32 [%rd1+4], %r3;
    add.u32 %r2, %r2, 1;
    setp.lt.u32 %p1, %r2, {0};
    @%p1 bra again;
    """
    assert path(loop.format(20)) - path(loop.format(10)) > 10 * GLOBAL


# Warp 0 runs a chain of 60 before the barrier; all others run the chain of 30 after it.
JOIN = """
setp.ge.u32 %p1, %r1, 32;
@%p1 bra meet;
{0}
meet:
{1}
{2}
"""


def test_a_barrier_joins_its_slowest_warp():
    first, after = fmas(60, True), fmas(30, True)
    joined = path(JOIN.format(first, "bar.sync 0;", after), threads=128)
    alone = path(JOIN.format(first, "bar.sync 0;", after), threads=32)
    assert joined == alone  # the slow warp, with a barrier that it finds complete
    assert 0 <= joined - (90 * FP32 + BARRIER) < 30
    # A longer chain after the barrier, of a fast warp, adds to the slow one's time before it.
    fast = JOIN.format(first, "bar.sync 0;\n@!%p1 ret;", fmas(60, True))
    assert path(fast, threads=128) > 120 * FP32


def test_a_warp_that_leaves_completes_a_barrier():
    body = JOIN.format(fmas(60, True) + "\nret;", "bar.sync 0;", fmas(30, True))
    assert path(body, threads=64) > 90 * FP32


def test_cp_async_hides_what_runs_before_its_wait():
    copy = """
    cp.async.ca.shared.global [%r90], [%rd1], 16;
    cp.async.commit_group;
    {0}
    cp.async.wait_group {1};
    {2}
    """
    work = fmas(50, True)
    bare = path(copy.format("", 0, ""))
    assert COPY <= bare < COPY + 30
    assert path(copy.format(work, 0, "")) - bare < 10
    assert path(copy.format("", 0, work)) - bare >= 50 * FP32
    assert path(copy.format(work, 1, "")) < 50 * FP32 + 60  # one group may be open


def test_a_prefetching_pipeline_takes_less_than_a_copy_an_iteration():
    """Two stages: the next tile's copy is under way while this one is worked on."""
    copy = "cp.async.ca.shared.global [%r90], [%rd1], 16;\ncp.async.commit_group;"
    loop = """
    mov.u32 %r2, 0;
    {0}
    again:
    {1}
    cp.async.wait_group {2};
    {3}
    add.u32 %r2, %r2, 1;
    setp.lt.u32 %p1, %r2, 10;
    @%p1 bra again;
    """
    work = fmas(90, True)  # 360 cycles: half a copy
    serial = path(loop.format("", copy, 0, work))
    ahead = path(loop.format(copy, copy, 1, work))
    assert serial > 10 * (COPY + 90 * FP32)
    assert ahead < 0.8 * serial


def test_shared_memory_is_read_after_it_was_stored():
    body = """
    ld.global.f32 %f1, [%rd1];
    st.shared.f32 [%r90], %f1;
    ld.shared.f32 %f2, [%r90];
    """ + stored("%f2")
    assert GLOBAL + SHARED < path(body) < GLOBAL + SHARED + 60


def test_an_mbarrier_joins_its_last_arrival():
    """Polls take no time of their own, so the order of warps does not show."""
    body = """
    mov.u32 %r2, s;
    setp.ne.u32 %p1, %r1, 0;
    @%p1 bra ready;
    mbarrier.init.shared.b64 [%r2], 64;
    ready:
    bar.sync 0;
    setp.lt.u32 %p2, %r1, 32;
    @%p2 bra arrive;
    {0}
    arrive:
    mbarrier.arrive.shared.b64 %rd3, [%r2];
    wait:
    mbarrier.try_wait.shared.b64 %p3, [%r2], %rd3;
    @!%p3 bra wait;
    {1}
    """
    chain = fmas(80, True)
    paths = {path(body.format(chain, chain), threads=64, seed=seed) for seed in range(6)}
    assert len(paths) == 1
    assert 160 * FP32 < paths.pop() < 160 * FP32 + 200
    assert path(body.format(chain, ""), threads=64) < 80 * FP32 + 200


def test_a_cluster_barrier_joins_the_blocks():
    body = """
    mov.u32 %r2, %cluster_ctarank;
    setp.ne.u32 %p1, %r2, 0;
    @%p1 bra meet;
    {0}
    meet:
    barrier.cluster.arrive{1}.aligned;
    barrier.cluster.wait.acquire.aligned;
    {2}
    """
    slow = launch(body.format(fmas(80, True), ".relaxed", ""), blocks=4, cluster=4)
    assert slow.critical_path - slow.critical_path_mean < 1  # all of them wait for the first
    fast = path(body.format("", ".relaxed", ""), blocks=4, cluster=4)
    assert slow.critical_path - fast >= 79 * FP32
    released = path(body.format("", ".release", ""), blocks=4, cluster=4)
    assert released - fast == FENCE  # for the stores before it


def test_a_fence_waits_for_memory():
    assert path("membar.gl;") - path("") >= FENCE
    assert path("membar.cta;") - path("") < 100


def test_the_mean_is_over_blocks():
    body = """
    mov.u32 %r2, %ctaid.x;
    setp.ne.u32 %p1, %r2, 0;
    @%p1 bra over;
    {0}
    over:"""
    done = launch(body.format(fmas(90, True)), blocks=4)
    short = path(body.format(fmas(90, True)).replace("setp.ne", "setp.ge"), blocks=4)
    assert done.critical_path > 90 * FP32
    assert done.critical_path_mean == pytest.approx((done.critical_path + 3 * short) / 4)


def test_divergent_paths_add_up_and_their_results_join():
    body = """
    ld.global.f32 %f9, [%rd1];
    setp.lt.u32 %p1, %r1, 16;
    @%p1 bra short;
    mov.f32 %f90, %f9;
    bra.uni join;
    short:
    mov.f32 %f90, 0f3F800000;
    join:
    """ + stored("%f90")
    assert GLOBAL < path(body) < GLOBAL + 60
