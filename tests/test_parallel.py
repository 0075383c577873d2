"""Losses and noise across processes, against one: shared vocabularies, DTensors, DDP, FSDP2."""

import copy
import functools
import os

import processes
import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import kdkernels
from kdkernels import (
    GradientNoise,
    NoisyAdamW,
    NoisySGD,
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


# ---- noise ---------------------------------------------------------------------------------------

LAYOUTS = [[Shard(0)], [Shard(1)], [Replicate()]]
LAYOUTS_2D = [
    [Shard(0), Shard(1)],
    [Shard(1), Shard(0)],
    [Shard(0), Shard(0)],
    [Replicate(), Shard(1)],
    [Shard(0), Replicate()],
]


def whole(tensors):
    return [t.full_tensor() if isinstance(t, DTensor) else t for t in tensors]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(whole(a), whole(b), strict=True))


def zeros(dtype):
    """Parameters that no number of ranks divides, with gradients of 0."""
    shapes = [(7, 5), (3, 9, 2), (5, 1), (1, 6), (4, 4)]
    params = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    for p in params:
        p.grad = torch.zeros_like(p)
    return params


def noise_steps(params):
    """What noise makes of parameters and gradients of 0, and the norms of both."""
    results, norms = [], []
    for capturable in (False, True):
        options = {"std": 0.5, "seed": 7, "capturable": capturable, "diagnostics": True}
        optimizer = NoisySGD([{"params": params[:2]}, {"params": params[2:]}], 1.0, **options)
        optimizer.step()
        optimizer.step()
        norms += optimizer.norms()
        plain = torch.optim.SGD([{"params": params[:3]}, {"params": params[3:]}], 0.0)
        noise = GradientNoise(plain, **options)
        plain.step()
        norms += noise.norms()
        results += [p.detach().clone() for p in params] + [p.grad.clone() for p in params]
    return results, norms


def shards_have_their_slice_of_the_noise(rank, world):
    meshes = [(init_device_mesh("cpu", (world,)), LAYOUTS)]
    if world == 4:
        meshes.append((init_device_mesh("cpu", (2, 2)), LAYOUTS_2D))
    for dtype in (torch.float32, torch.bfloat16):
        want, want_norms = noise_steps(zeros(dtype))
        for mesh, layouts in meshes:
            for placements in layouts:
                params = []
                for p in zeros(dtype):
                    own = distribute_tensor(p.detach(), mesh, placements)
                    params.append(torch.nn.Parameter(own))
                    params[-1].grad = distribute_tensor(p.grad, mesh, placements)
                got, norms = noise_steps(params)
                assert same(got, want), placements
                for a, b in zip(norms, want_norms, strict=True):
                    assert a.gradient == pytest.approx(b.gradient, rel=1e-12)
                    assert a.noise == pytest.approx(b.noise, rel=1e-12)


class Silence(TorchDispatchMode):
    """Refuses collectives."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.namespace not in ("c10d", "_c10d_functional"), func
        return func(*args, **(kwargs or {}))


def steps_send_nothing(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    with pytest.raises(AssertionError, match="all_?reduce"), Silence():
        dist.all_reduce(torch.ones(1))
    for placements in LAYOUTS:
        params = []
        for p in zeros(torch.float32):
            params.append(torch.nn.Parameter(distribute_tensor(p.detach(), mesh, placements)))
            params[-1].grad = distribute_tensor(p.grad + 1, mesh, placements)
        optimizers = [NoisySGD(params, std=0.1, seed=0), NoisyAdamW(params, std=0.1, seed=0)]
        optimizers.append(torch.optim.SGD(params))
        noise = GradientNoise(optimizers[-1], 0.1, seed=0, check_every=2)
        optimizers[-1].step()  # looks at the norms of all ranks
        with Silence():
            for optimizer in optimizers:
                optimizer.step()
        assert noise.step == 2


def noise_refuses_what_it_cannot_place(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    params = [torch.nn.Parameter(distribute_tensor(torch.zeros(4, 4), mesh, [Shard(0)]))]
    params[0].grad = distribute_tensor(torch.zeros(4, 4), mesh, [Replicate()])
    with pytest.raises(ValueError, match="gradient of parameter 0 is placed.*Replicate"):
        NoisySGD(params, std=0.1, seed=0).step()
    partial = DTensor.from_local(torch.zeros(4, 4), mesh, [Partial()])
    params = [torch.nn.Parameter(partial)]
    params[0].grad = partial.clone()
    with pytest.raises(ValueError, match="Partial|placement P"):
        NoisySGD(params, std=0.1, seed=0).step()


def net():
    """No number of rows is a multiple of 2 or 4."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))


def noisy_adamw(model):
    options = {"lr": 0.05, "std": kdkernels.cosine(0.05, 10), "seed": 3, "diagnostics": True}
    return NoisyAdamW(model.parameters(), **options), None


def capturable_adamw(model):
    options = {"lr": torch.tensor(0.05), "std": 0.05, "seed": 3, "capturable": True}
    return NoisyAdamW(model.parameters(), **options), None


def noisy_sgd(model):
    return NoisySGD(model.parameters(), 0.1, momentum=0.9, std=0.05, seed=3), None


def adam_with_noise(model):
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    return optimizer, GradientNoise(optimizer, 0.05, seed=3, diagnostics=True)


OPTIMIZERS = [noisy_adamw, capturable_adamw, noisy_sgd, adam_with_noise]


def train(model, optimizer, noise, steps, rows=slice(None)):
    """The mean loss of each step."""
    losses = []
    for step in steps:
        x = randn(8, 6, seed=step, dtype=torch.float32)
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x[rows]), (torch.arange(8) % 3)[rows])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.2)
        optimizer.step()
        losses.append(loss.detach())
    losses = torch.stack(losses)
    dist.all_reduce(losses)
    return losses / dist.get_world_size()


def sharded(model):
    return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def training_is_that_of_one_process(rank, world):
    mine = slice(8 // world * rank, 8 // world * (rank + 1))
    for make in OPTIMIZERS:
        alone = net()
        optimizer, noise = make(alone)
        want = train(alone, optimizer, noise, range(6))
        want_norms = (noise or optimizer).norms()
        for wrap in (sharded, DistributedDataParallel):
            model = wrap(net())
            optimizer, noise = make(model)
            losses = train(model, optimizer, noise, range(6), mine)
            torch.testing.assert_close(losses, want, rtol=1e-4, atol=1e-5)
            params = whole(model.parameters())
            torch.testing.assert_close(params, list(alone.parameters()), rtol=1e-3, atol=1e-4)
            for a, b in zip((noise or optimizer).norms(), want_norms, strict=True):
                assert a.gradient == pytest.approx(b.gradient, rel=1e-3)
                assert a.noise == pytest.approx(b.noise, rel=1e-6)
            for p in params:  # replicas have the same bits
                copies = [torch.empty_like(p) for _ in range(world)]
                dist.all_gather(copies, p.detach().contiguous())
                assert all(torch.equal(c, p) for c in copies)


def checkpoints_resume_with_the_same_bits(rank, world):
    mine = slice(8 // world * rank, 8 // world * (rank + 1))
    kinds = [{}, {"full_state_dict": True, "cpu_offload": False}]
    kinds += [{"flatten_optimizer_state_dict": True}]
    for make in OPTIMIZERS:
        straight = sharded(net())
        optimizer, noise = make(straight)
        train(straight, optimizer, noise, range(5), mine)
        for kind in kinds:
            options = StateDictOptions(**kind)
            model = sharded(net())
            optimizer, noise = make(model)
            train(model, optimizer, noise, range(2), mine)
            optimizer.zero_grad()
            states = copy.deepcopy(get_state_dict(model, optimizer, options=options))
            noise_state = noise.state_dict() if noise is not None else None
            train(model, optimizer, noise, range(2, 5), mine)  # saving moved nothing
            assert same(model.parameters(), straight.parameters()), make.__name__

            torch.manual_seed(5)
            model = sharded(torch.nn.Sequential(*(copy.deepcopy(m) for m in net())))
            optimizer, noise = make(model)
            model_state, optimizer_state = states
            set_state_dict(
                model,
                optimizer,
                model_state_dict=model_state,
                optim_state_dict=optimizer_state,
                options=options,
            )
            if noise is not None:
                noise.load_state_dict(noise_state)
            train(model, optimizer, noise, range(2, 5), mine)
            assert same(model.parameters(), straight.parameters()), (make.__name__, kind)


def steps_without_gradients(params):
    """Evolution and MeZO on a loss of all parameters."""

    def loss():
        return sum((p - 1).square().sum().item() for p in whole(params))

    for step in range(2):
        shared = {"seed": 5, "step": step}
        kdkernels.evolution_step(params, lambda: -loss(), population=4, std=0.1, lr=0.1, **shared)
        kdkernels.mezo_step(params, loss, lr=0.001, directions=2, **shared)
    return params


def no_gradients(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    want = steps_without_gradients(zeros(torch.float32))
    for placements in LAYOUTS:
        params = [
            torch.nn.Parameter(distribute_tensor(p.detach(), mesh, placements))
            for p in zeros(torch.float32)
        ]
        assert same(steps_without_gradients(params), want), placements


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
    processes.ranks(in_group, world, function)


NOISE_CHECKS = [
    shards_have_their_slice_of_the_noise,
    steps_send_nothing,
    noise_refuses_what_it_cannot_place,
    training_is_that_of_one_process,
    checkpoints_resume_with_the_same_bits,
    no_gradients,
]


def all_checks(rank, world):
    for check in CHECKS:
        check(rank, world)


def noise_checks(rank, world):
    for check in NOISE_CHECKS:
        check(rank, world)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_agree_with_one_process(world):
    spawn(all_checks, world)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_noise_is_that_of_one_process(world):
    spawn(noise_checks, world)
