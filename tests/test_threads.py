"""Threads: as many as torch has and the same ones; forks; several Python threads at once."""

import ctypes
import functools
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from kdkernels import (
    NoisyAdamW,
    add_noise_,
    combine_noise_,
    distillation_loss,
    linear_distillation_loss,
    noise_dot,
    noisy_linear_regression,
    topk_distillation_loss,
)

ROOT = Path(__file__).resolve().parent.parent


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Each does work enough for several threads, and returns tensors of it.


def dense(rows=600, classes=1000, **options):
    z, t = randn(rows, classes).requires_grad_(), randn(rows, classes, seed=1)
    labels = torch.arange(rows) % classes
    labels[: rows // 2] = -100  # one part of the rows is no work
    loss = distillation_loss(z, t, labels, temperature=2.0, **options)
    return loss.detach(), *torch.autograd.grad(loss.sum(), z)


def top_k():
    z, values = randn(300, 1000).requires_grad_(), randn(300, 8, seed=1)
    loss = topk_distillation_loss(z, values, torch.arange(8).expand(300, 8).contiguous())
    return loss.detach(), *torch.autograd.grad(loss, z)


def noise():
    x = [torch.zeros(n) for n in (100_003, 5, 0, 40_000)]
    add_noise_(x, 0.5, seed=3, step=2)
    return (*x, noise_dot(x, seed=4))


def combined():
    x = torch.zeros(50_001)
    combine_noise_(x, [0.1] * 8, range(8))
    return (x,)


def updates():
    p = torch.nn.Parameter(randn(80_001))
    optimizer = NoisyAdamW([p], lr=1e-2, std=0.1, seed=5)
    for seed in range(2):
        p.grad = randn(80_001, seed=seed)
        optimizer.step()
    return (p.detach(),)


def regression():
    x, y = randn(50), randn(50, seed=1)
    return (noisy_linear_regression(x, y, torch.ones(1000), steps=40, seed=1),)


WORK = {
    "forward_kl": dense,
    "short rows": functools.partial(dense, 8000, 10),
    "few rows": functools.partial(dense, 3, 50_000),
    "js": functools.partial(dense, divergence="js"),
    "a loss a row": functools.partial(dense, reduction="none"),
    "top_k": top_k,
    "noise": noise,
    "combined": combined,
    "updates": updates,
    "regression": regression,
}
works = pytest.mark.parametrize("name", WORK)


def same(got, want):
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def run_python(code, *arguments, **environment):
    """The words that a fresh process prints; it has this file's names."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", "from test_threads import *\n" + code, *arguments],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=1000,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


# ---- how many -----------------------------------------------------------------------------------


@works
def test_any_number_of_threads_gives_the_same_bits(name, set_threads):
    want = WORK[name]()
    for threads in (1, 2, 3, 8):  # 8: more than some have rows
        set_threads(threads)
        assert same(WORK[name](), want)
        set_threads(1)  # from one call to the next
        assert same(WORK[name](), want)


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")


def thread_ids():
    return set(os.listdir("/proc/self/task"))


COUNT = """
before = thread_ids()
for threads in map(int, sys.argv[2:]) if sys.argv[2:] else [None]:
    if threads:
        torch.set_num_threads(threads)
    WORK[sys.argv[1]]()
    print(torch.get_num_threads(), len(thread_ids() - before))
"""


@needs_proc
@pytest.mark.parametrize(("name", "threads"), [("js", 1), ("noise", 2), ("js", 4)])
def test_as_many_threads_as_the_environment_says(name, threads):
    count, more = map(int, run_python(COUNT, name, OMP_NUM_THREADS=str(threads)))
    assert count <= threads and more == count - 1  # torch cuts it to the cores


@needs_proc
@pytest.mark.parametrize("name", ["js", "noise"])
def test_as_many_threads_as_torch_has(name):
    got = run_python(COUNT, name, "1", "2", "4")
    assert got == ["1", "0", "2", "1", "4", "3"]


POOL = """
torch.set_num_threads(8)
torch.zeros(10**6).exp_()
before = thread_ids()
for work in WORK.values():
    work()
    torch.zeros(10**6).exp_()
print(len(before), thread_ids() == before)
"""


@needs_proc
def test_the_pool_is_torchs():
    """No threads beside torch's, and work for fewer ends none of them: they would start anew."""
    count, same_threads = run_python(POOL, OMP_NUM_THREADS="8")
    assert int(count) >= 8 and same_threads == "True"


@needs_proc
@works
def test_inside_a_parallel_region(name, set_threads):
    """As in at::parallel_for: the loop is the calling thread's own."""
    set_threads(2)
    want = WORK[name]()
    libraries = Path("/proc/self/maps").read_text().split()
    openmp = ctypes.CDLL(next(x for x in libraries if "libgomp" in x))
    if not hasattr(openmp, "GOMP_parallel"):
        pytest.skip("another OpenMP runtime")
    results = []

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def region(_):
        results.append(WORK[name]())

    openmp.GOMP_parallel(region, None, 2, 0)  # whoever starts a thread once has done so now
    before = thread_ids()
    openmp.GOMP_parallel(region, None, 2, 0)
    assert not thread_ids() - before
    assert len(results) == 4 and all(same(got, want) for got in results)


@works
def test_inside_backward(name):
    want, results = WORK[name](), []

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            with torch.enable_grad():
                results.append(WORK[name]())
            return g

    Backward.apply(torch.zeros(3, requires_grad=True)).sum().backward()
    assert same(results[0], want)


# ---- several Python threads ---------------------------------------------------------------------


def test_python_threads_at_once(set_threads):
    set_threads(2)
    want = {name: work() for name, work in WORK.items()}
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda name: (name, WORK[name]()), 3 * list(WORK)))
    assert all(same(x, want[name]) for name, x in got)


def test_threads_share_a_graph():
    leaf = randn(200, 1000).requires_grad_()
    teacher = randn(200, 1000, seed=1)
    z = leaf * 1.5
    losses = [distillation_loss(z, teacher, temperature=t) for t in (1.0, 2.0, 3.0, 4.0)]
    want = [torch.autograd.grad(loss, leaf, retain_graph=True) for loss in losses]
    with ThreadPoolExecutor(4) as pool:
        got = pool.map(lambda x: torch.autograd.grad(x, leaf, retain_graph=True), losses)
        assert all(same(a, b) for a, b in zip(got, want, strict=True))


def long_loss():
    z = torch.zeros(1000, 20_000)
    return lambda: distillation_loss(z, z, divergence="js")


def long_linear_loss():
    h, w = torch.zeros(2000, 8), torch.zeros(20_000, 8)
    return lambda: linear_distillation_loss(h, w, h, w)


def long_noise():
    x = torch.zeros(10**6)
    return lambda: combine_noise_(x, [0.0] * 64, range(64))


def long_regression():
    x = torch.ones(10)
    return lambda: noisy_linear_regression(x, x, 0.0, steps=10**7, seed=1)


@pytest.mark.parametrize("make", [long_loss, long_linear_loss, long_noise, long_regression])
def test_the_interpreter_is_free_meanwhile(make, set_threads):
    set_threads(1)
    call, turns, done = make(), [0], threading.Event()

    def other():
        while not done.is_set():
            turns[0] += 1
            time.sleep(0)  # gives the interpreter away

    thread = threading.Thread(target=other)
    thread.start()
    while turns[0] == 0:
        time.sleep(0)
    before = turns[0]
    call()
    during = turns[0] - before
    done.set()
    thread.join()
    assert during > 10  # else one or two, before and after


# ---- forks --------------------------------------------------------------------------------------

# The child makes no parallel loop of torch's own, in which it would wait for ever.
FORK = """
import hashlib, pickle, signal
torch.set_num_threads(2)
z, t = randn(300, 1000).requires_grad_(), randn(300, 1000, seed=1)
x, p = torch.zeros(50_000), torch.nn.Parameter(randn(50_000))
p.grad = randn(50_000, seed=2)
optimizer = NoisyAdamW([p], std=0.1, seed=1)
optimizer.step()  # makes its state

def work():
    tensors = []
    for divergence in ("forward_kl", "js"):
        loss = distillation_loss(z, t, divergence=divergence)
        tensors += [loss.detach(), *torch.autograd.grad(loss, z)]
    add_noise_(x, 1.0, seed=1)
    combine_noise_(x, [1.0, 2.0], [5, 6])
    tensors += [x, noise_dot(x, seed=2)]
    theta = torch.linspace(0, 1, 500)
    tensors.append(noisy_linear_regression(x[:50], t[0, :50], theta, steps=50, seed=1))
    optimizer.step()
    return hashlib.sha256(pickle.dumps([y.numpy() for y in (*tensors, p.detach())])).hexdigest()

torch.zeros(10**6).exp_()
distillation_loss(z, t)
reader, writer = os.pipe()
child = os.fork()
if child == 0:
    signal.alarm(1000)
    results = [work()]
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join()
    os.write(writer, " ".join(results).encode())
    os._exit(0)
got = os.read(reader, 1000).decode().split()
os.waitpid(child, 0)
print(got == [work(), work()])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_does_not_wait():
    """The pool's threads stayed in the parent: loops are serial, but not those of new threads."""
    assert run_python(FORK) == ["True"]


class Results(Dataset):
    def __len__(self):
        return len(WORK)

    def __getitem__(self, index):
        return list(WORK.values())[index]()


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_data_loader_workers(start, set_threads):
    set_threads(2)
    want = list(Results())
    loader = DataLoader(
        Results(), num_workers=2, batch_size=None, multiprocessing_context=start, timeout=1000
    )
    assert all(same(a, b) for a, b in zip(loader, want, strict=True))
