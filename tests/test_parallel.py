"""Losses across processes, against one: a vocabulary whose columns ranks share, DDP, FSDP2."""

import functools
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import kdkernels
from kdkernels import (
    distillation_loss,
    topk_distillation_loss,
    topk_teacher,
)

ROWS, CLASSES = 6, 48


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def labels_and_weight():
    labels = torch.tensor([0, 47, -100, 13, 24, 23])
    return labels, torch.tensor([1.0, 2.0, 0.5, 0.0, 3.0, 1.0])


DENSE = [
    {},
    {"divergence": "reverse_kl", "temperature": 3.0},
    {"divergence": "js", "beta": 0.3, "labels": True},
    {"divergence": "skew_forward_kl", "labels": True, "label_smoothing": 0.1},
    {"divergence": "skew_reverse_kl", "standardize": True, "temperature": 2.0},
    {"divergence": "total_variation", "weight": True},
    {"divergence": "alpha_beta", "labels": True, "weight": True, "reduction": "sum"},
    {"divergence": "decoupled", "labels": True, "temperature": 2.0, "standardize": True},
    {"divergence": "decoupled", "labels": True, "alpha": 1.0, "reduction": "none"},
    {"soft_cap": 5.0, "logit_scale": 0.5, "teacher_soft_cap": 3.0, "labels": True, "alpha": 0.2},
    {"labels": True, "alpha": 0.0},
    {"teacher_kind": "probs", "divergence": "js"},
    {"masked": True, "divergence": "js", "labels": True},
    {"num_items": 11.0, "labels": True, "standardize": True},
]
TOP_K = [
    {"tail": tail, "divergence": divergence, **more}
    for tail in ("renormalize", "bucket", "ignore")
    for divergence, more in (
        ("forward_kl", {"labels": True}),
        ("reverse_kl", {"temperature": 2.0}),
        ("js", {"labels": True, "alpha": 0.7, "label_smoothing": 0.2, "soft_cap": 4.0}),
    )
]


def problem(options):
    """(student, teacher, options) of the whole vocabulary."""
    options = dict(options)
    z, t = 2 * randn(ROWS, CLASSES, seed=1), 2 * randn(ROWS, CLASSES, seed=2)
    if options.pop("masked", False):
        mask = torch.zeros(CLASSES, dtype=torch.bool)
        mask[list(range(12, 24)) + [30]] = True  # all columns of one of four ranks
        mask[13] = False
        z, t = (x.masked_fill(mask, -torch.inf) for x in (z, t))
    labels, weight = labels_and_weight()
    options["labels"] = labels if options.pop("labels", False) else None
    options["weight"] = weight if options.pop("weight", False) else None
    if options.get("teacher_kind") == "probs":
        t = t.softmax(-1)
    return z, t, options


def columns(x, rank, world):
    return x.chunk(world, -1)[rank].clone()


def results(loss_fn, student, **options):
    """Loss, gradient of the student and statistics."""
    student = student.requires_grad_()
    loss, statistics = loss_fn(student * 1, return_statistics=True, **options)
    grad_output = torch.arange(1.0, loss.numel() + 1, dtype=loss.dtype).reshape(loss.shape)
    (gradient,) = torch.autograd.grad(loss, student, grad_output)
    return loss.detach(), gradient, torch.stack(statistics)


def check(got, want, rank, world):
    torch.testing.assert_close(got[0], want[0], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(got[1], columns(want[1], rank, world), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(got[2], want[2], rtol=1e-10, atol=1e-12)


# ---- what ranks run ------------------------------------------------------------------------------


def dense(rank, world):
    for options in DENSE:
        z, t, options = problem(options)
        for inplace in (False, True):
            want = results(functools.partial(distillation_loss, teacher_logits=t), z, **options)
            loss = functools.partial(
                distillation_loss,
                teacher_logits=columns(t, rank, world),
                process_group=dist.group.WORLD,
                inplace=inplace,
            )
            check(results(loss, columns(z, rank, world), **options), want, rank, world)


def gradient_of_the_teacher(rank, world):
    for divergence in kdkernels.divergences():
        z, t, options = problem({"divergence": divergence, "labels": True, "temperature": 2.0})
        t.requires_grad_()
        (want,) = torch.autograd.grad(distillation_loss(z, t, **options), t)
        own = columns(t.detach(), rank, world).requires_grad_()
        z = columns(z, rank, world)
        loss = distillation_loss(z, own, process_group=dist.group.WORLD, **options)
        (got,) = torch.autograd.grad(loss, own)
        torch.testing.assert_close(got, columns(want, rank, world), rtol=1e-10, atol=1e-14)


def top_k(rank, world):
    for options in TOP_K:
        z, t, options = problem(options)
        top = topk_teacher(t, 7, temperature=options.get("temperature", 1.0))
        indices = top.indices.clone()
        indices[1, 4:] = -1
        indices[2] = -1
        options |= {"teacher_values": top.values, "teacher_indices": indices}
        if options["tail"] != "renormalize":
            options["teacher_logsumexp"] = top.logsumexp
        want = results(topk_distillation_loss, z, **options)
        loss = functools.partial(topk_distillation_loss, process_group=dist.group.WORLD)
        check(results(loss, columns(z, rank, world), **options), want, rank, world)


def other_dtypes(rank, world):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        z, t = (2 * randn(ROWS, 4800, seed=s).to(dtype) for s in (1, 2))
        want = results(functools.partial(distillation_loss, teacher_logits=t), z, divergence="js")
        t = columns(t, rank, world)
        loss = functools.partial(
            distillation_loss, teacher_logits=t, process_group=dist.group.WORLD, divergence="js"
        )
        got = results(loss, columns(z, rank, world))
        torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(got[1], columns(want[1], rank, world))


def close_student(rank, world):
    """Where formulas of differences of logsumexps lose all digits."""
    z = 3 * randn(ROWS, CLASSES, seed=1, dtype=torch.float32)
    t = z + 1e-4 * randn(ROWS, CLASSES, seed=2, dtype=torch.float32)
    want = kdkernels.reference.distillation_loss(z.double(), t.double())
    z, t = columns(z, rank, world), columns(t, rank, world)
    got = distillation_loss(z, t, process_group=dist.group.WORLD)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=0)
    assert 0 < want < 1e-7
    assert distillation_loss(z, z.clone(), process_group=dist.group.WORLD) == 0


def distributed_tensors(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    for classes in (CLASSES, CLASSES - 3):  # the last rank may have fewer columns
        z, t, options = problem({"divergence": "js", "temperature": 2.0})
        z, t = z[:, :classes], t[:, :classes].contiguous()
        z = z.contiguous().requires_grad_()
        want_loss = distillation_loss(z, t, **options)
        (want,) = torch.autograd.grad(want_loss, z)
        own = distribute_tensor(z.detach(), mesh, [Shard(1)]).requires_grad_()
        loss = distillation_loss(own, distribute_tensor(t, mesh, [Shard(1)]), **options)
        (gradient,) = torch.autograd.grad(loss, own)
        torch.testing.assert_close(loss, want_loss, rtol=1e-12, atol=0)
        assert gradient.placements == (Shard(1),)
        torch.testing.assert_close(gradient.full_tensor(), want, rtol=1e-10, atol=1e-15)
    with pytest.raises(ValueError, match="student_logits.*Shard"):
        rows = distribute_tensor(z.detach(), mesh, [Shard(0)])
        distillation_loss(rows, rows)
    with pytest.raises(ValueError, match="teacher_logits.*placed otherwise"):
        distillation_loss(own, distribute_tensor(t, mesh, [Shard(0)]))


class Traffic(TorchDispatchMode):
    """Numbers that a rank gives to its group."""

    def __init__(self):
        super().__init__()
        self.numbers = self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops._c10d_functional.all_reduce.default:
            self.calls += 1
            self.numbers += args[0].numel()
        return func(*args, **(kwargs or {}))


def traffic(rank, world):
    """Numbers of rows cross the group, whatever the vocabulary."""
    counts = []
    for classes in (CLASSES, 100 * CLASSES):
        own = classes // world
        z = randn(ROWS, own, seed=rank).requires_grad_()
        with Traffic() as seen:
            distillation_loss(
                z, randn(ROWS, own, seed=9 + rank), process_group=dist.group.WORLD
            ).backward()
        counts.append(seen.numbers)
        assert seen.calls == 4
    assert counts[0] == counts[1] <= 40 * ROWS


def compiled(rank, world):
    z, t, options = problem({"divergence": "js", "labels": True, "temperature": 2.0})
    z, t = columns(z, rank, world).requires_grad_(), columns(t, rank, world)

    def loss(z, t):
        return distillation_loss(z * 2, t, process_group=dist.group.WORLD, **options)

    want = torch.autograd.grad(loss(z, t), z)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(z, t), z)
    torch.testing.assert_close(got, want)


def refusals(rank, world):
    z, t, _ = problem({})
    z, t = columns(z, rank, world), columns(t, rank, world)
    group = {"process_group": dist.group.WORLD}
    with pytest.raises(ValueError, match="teacher_logits holds several.*process_group"):
        distillation_loss(z, [t, t], **group)
    with pytest.raises(ValueError, match="process_group"):
        distillation_loss(z, t, backend="reference", **group)
    with pytest.raises(ValueError, match="labels holds 48"):
        distillation_loss(z, t, torch.full((ROWS,), CLASSES), **group)
    leaf = z.clone().requires_grad_()
    with pytest.raises(ValueError, match="process_group.*second derivative"):
        torch.autograd.grad(distillation_loss(leaf, t, **group), leaf, create_graph=True)


# ---- PyTorch's own engines -----------------------------------------------------------------------


def step(student, x, t, labels, inplace):
    """The gradients of one step."""
    loss = distillation_loss(
        student(x), t, labels, divergence="js", temperature=2.0, inplace=inplace
    )
    loss.backward()
    gradients = [p.grad for p in student.parameters()]
    return [g.full_tensor() if isinstance(g, DTensor) else g for g in gradients]


def engines(rank, world):
    """Ranks with a share of the batch each get the gradients of the whole batch."""
    if world != 2:
        return
    x, t = randn(8, 6, seed=1, dtype=torch.float32), randn(8, 9, seed=2, dtype=torch.float32)
    labels = torch.tensor([0, 1, 8, 3, 4, 5, 6, 7])

    def model():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 9))

    want = step(model(), x, t, labels, False)
    mine = slice(4 * rank, 4 * rank + 4)
    mesh = init_device_mesh("cpu", (world,))
    for inplace in (False, True):
        for wrap in (DistributedDataParallel, lambda m: fully_shard(m, mesh=mesh)):
            got = step(wrap(model()), x[mine], t[mine], labels[mine], inplace)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


CHECKS = [
    engines,
    dense,
    gradient_of_the_teacher,
    top_k,
    other_dtypes,
    close_student,
    traffic,
    refusals,
]
CHECKS += [distributed_tensors, compiled]


def in_group(rank, world, port, function):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    function(rank, world)
    dist.destroy_process_group()


def spawn(function, world):
    """function(rank, world) in `world` processes of one group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(in_group, (world, port, function), nprocs=world)


def all_checks(rank, world):
    for check in CHECKS:
        check(rank, world)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_agree_with_one_process(world):
    spawn(all_checks, world)
