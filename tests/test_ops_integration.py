"""The ops inside PyTorch: opcheck, torch.compile, autocast, fake tensors, worker processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

import kdkernels
from kdkernels import (
    _C,
    DistillationLoss,
    add_noise_,
    distillation_loss,
    gradient_noise,
    input_noise,
    noisy_linear_regression,
    randn_like,
    sample_teacher,
    topk_distillation_loss,
    topk_teacher,
)
from kdkernels.distill.calls import packed

ROOT = Path(__file__).resolve().parent.parent
OPS = torch.ops.kdkernels
ADDRESS = {"seed": 1, "step": 2, "stream": 3, "offset": 4}


def noise(*tensors, seed=1, step=2, distribution=0, streams=(3,), offsets=(4,), runs=()):
    """The ops' arguments noise and noise_tensors."""
    counts = [len(streams), len(offsets)]
    return [seed, step, distribution, *counts, *streams, *offsets, *runs], list(tensors)


def randn(*shape, seed=0, **options):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), **options)


# ---- the registered ops --------------------------------------------------------------------------


def update_arguments(update, moments):
    """Of noisy_update_ for two parameters, up to the noise; with as many moments."""
    sizes = [5, 7]
    lists = [[randn(n, seed=k) for n in sizes] for k in range(4)]
    moments = [x.abs() for of_all in lists[2 : 2 + moments] for x in of_all]
    rule = [0.1, 0.2, 0.01, 0.9, 0.1, 0.9, 0.99, 1e-8, 3.0, 0.5, 0.0, 0.0, 0.0]
    return [update, 0, 0, 2, 1], *lists[:2], moments, rule


def loss_options(**options):
    """The losses' options as their ops take them."""
    return packed(options)[1]


def op_calls():
    z, t = randn(4, 7), randn(4, 7, seed=1)
    leaf = z.clone().requires_grad_()
    labels, weight = torch.tensor([0, -100, 6, 3]), torch.tensor([1.0, 2.0, 0.0, 0.5])
    options = loss_options(temperature=2.0, label_smoothing=0.1)
    std = torch.tensor(0.2, requires_grad=True)
    numbers = [torch.rand(3, dtype=torch.float64) for _ in range(4)]
    top = topk_teacher(t, 3)
    packed = loss_options(temperature=2.0, divergence="js", beta=0.5)
    shard = loss_options(
        temperature=2.0, divergence="js", beta=0.5, first_class=7, all_classes=14
    )  # the second half of a vocabulary
    state = torch.zeros(kdkernels._C.row_state, 4, dtype=torch.float64)
    rows, default = [labels, weight], loss_options()
    forward = (z, [t], rows)
    by_row = [labels, None, None, None, torch.rand(4) + 1]  # a temperature a row
    hidden, head = (randn(n, 3, seed=n).requires_grad_() for n in (4, 7))
    linear = (hidden.detach(), head.detach(), [None] * 5, [t], rows)
    regression = (z[0].clone(), t[0].clone(), *numbers, torch.arange(3), 4, 0)
    numbered = noise()
    by_tensor = noise(torch.tensor(5), torch.tensor(6), seed=0, step=0)
    pair = noise(streams=(3, 7), offsets=(4, 0), distribution=1)
    scaled = (True, *noise(distribution=4))
    norms = torch.rand(2, 2, dtype=torch.float64)
    counts = [torch.tensor(2.0), torch.tensor(1.0)]
    return [
        (OPS.distillation_loss, (leaf, [t], [], default), {}),
        (OPS.distillation_loss, (leaf, [t], rows, options), {}),
        (OPS.distillation_loss, (leaf, [t], by_row, default), {}),
        (OPS.distillation_loss, (leaf, [t], [labels], loss_options(reduction="none"), 4), {}),
        (OPS.distillation_loss, (z, [t], [labels], loss_options(reduction="sum")), {}),
        (OPS.distillation_loss, (leaf.half(), [t.half()], [], loss_options(num_items=3.0)), {}),
        (
            OPS.distillation_loss,
            (
                leaf,
                [t.clone().requires_grad_()],
                [],
                loss_options(divergence="js", standardize=True),
            ),
            {},
        ),
        (OPS.distillation_loss, (leaf, [t, z], [], [*default, 1.0, 2.0]), {}),
        (
            OPS.distillation_loss,
            (
                leaf,
                [top.values],
                [labels, None, top.indices, top.logsumexp],
                loss_options(tail="bucket"),
            ),
            {},
        ),
        (OPS._distillation_forward, (*forward, None, packed, 7), {}),
        (OPS._distillation_forward, (*forward, None, packed, 0), {}),
        (OPS._distillation_forward, (*forward, state + 1, shard, 5), {}),
        (OPS._distillation_stage, (*forward, state, shard, 2), {}),
        (
            OPS.linear_distillation_loss,
            (hidden, head, [None, None, None, head.detach(), None], [hidden.detach()], [], default),
            {},
        ),
        (
            OPS.linear_distillation_loss,
            (hidden, head, [head[:, 0], None, None, None, None], [t], [], default, 4),
            {},
        ),
        (OPS._linear_distillation_forward, (*linear, packed, 15, ""), {}),
        (OPS.randn_like, (z, *numbered), {}),
        (OPS.randn_like, (z.t(), *by_tensor), {}),
        (OPS.randn_like, (z, numbered[0], [torch.arange(len(z)), None]), {}),
        (OPS.dropout, (leaf, 0.25, *numbered), {}),
        (OPS.dropout, (leaf, 0.25, *by_tensor), {}),
        (OPS.stochastic_round, (z, torch.bfloat16, *by_tensor), {}),
        (
            OPS.add_noise_,
            ([z.clone(), t.bfloat16(), z.t().clone()], [0.1], None, False, *numbered, None),
            {},
        ),
        (OPS.add_noise_, ([z.clone()], [0.1], None, False, *by_tensor, None), {}),
        (OPS.add_noise_, ([z.clone(), t.clone()], [0.0], norms[0].abs(), True, *pair, norms), {}),
        (OPS.input_noise, (leaf, None, 0.1, False, *numbered), {}),
        (OPS.input_noise, (leaf, std, 0.0, False, *numbered), {}),
        (OPS.input_noise, (leaf, std, 0.0, False, *by_tensor), {}),
        (OPS.gradient_noise, (leaf, None, 0.1, False, *numbered), {}),
        (OPS.gradient_noise, (leaf, None, 0.1, False, *by_tensor), {}),
        (OPS.input_noise, (leaf, torch.rand(4, 1).requires_grad_(), 0.0, *scaled), {}),
        (OPS.gradient_noise, (leaf, std.detach(), 0.0, *scaled), {}),
        (OPS._next_step_, (torch.tensor(4),), {}),
        (OPS._noise, (z, 1, None, 0.1, *numbered), {}),
        (OPS._noise, (z, 0, None, 1.0, *noise(runs=(7, 14))), {}),
        (OPS._noise, (z, 3, torch.rand(7), 1.0, *noise(distribution=2)), {}),
        (OPS.noise_dot, ([leaf, t.bfloat16(), z[0]], *numbered), {}),
        (OPS.noise_dot, ([leaf * 2], *by_tensor), {}),
        (OPS._scaled_noise, ([z, t.bfloat16()], torch.rand(2, dtype=torch.float64), *pair), {}),
        (OPS.combine_noise_, ([z.clone(), t.clone()], numbers[0], torch.arange(3), *pair), {}),
        (OPS.noisy_update_, (*update_arguments(1, 2), *pair, norms), {}),
        (OPS.noisy_update_, (*update_arguments(0, 1), *noise(), None), {}),
        (
            OPS.noisy_update_,
            (
                [3, 0, 0],
                *update_arguments(3, 1)[1:],
                by_tensor[0],
                [*by_tensor[1], None, None, None, None, *counts],
                None,
            ),
            {},
        ),
        (OPS.noisy_linear_regression, (*regression, False, True), {}),
        (OPS.noisy_linear_regression, (*regression, True, False), {}),
    ]


@pytest.mark.parametrize("case", range(len(op_calls())))
def test_opcheck(case):
    op, args, kwargs = op_calls()[case]
    torch.library.opcheck(op.default, args, kwargs)


def counts(value):
    return [torch.full((), value)] * 2


BAD_UPDATES = [
    # (what is named, error, {argument's place: what it is instead})
    ("update", ValueError, {0: [4, 0, 0, 2, 1]}),
    ("params", TypeError, {1: [torch.zeros(5, dtype=torch.int64), torch.zeros(7)]}),
    ("params", ValueError, {1: [torch.zeros(1).expand(5), torch.zeros(7)]}),
    ("grads", ValueError, {2: [torch.zeros(5)]}),
    ("grads", ValueError, {2: [torch.zeros(5), torch.zeros(8)]}),
    ("grads", TypeError, {2: [torch.zeros(5), torch.zeros(7).half()]}),
    ("grads", ValueError, {2: [torch.zeros(5), torch.zeros(7, device="meta")]}),
    ("first", ValueError, {3: []}),
    ("moments", ValueError, {3: [torch.zeros(5), torch.zeros(7)]}),
    ("first", ValueError, {3: [torch.zeros(5), torch.zeros(0), torch.zeros(5), torch.zeros(7)]}),
    ("second", ValueError, {3: [torch.zeros(n) for n in (5, 7, 5, 0)]}),
    ("second", ValueError, {3: [torch.zeros(n) for n in (5, 7, 5, 6)]}),
    ("second", TypeError, {3: [*(torch.zeros(n) for n in (5, 7, 5)), torch.zeros(7).double()]}),
    ("steps", ValueError, {0: [1, 0, 0, 1]}),
    ("steps", ValueError, {0: [1, 0, 0, 1, 0]}),
    ("steps", ValueError, {6: [*[None] * 6, *counts(1.0)]}),
    ("step_tensors", TypeError, {0: [1, 0, 0], 6: [*[None] * 6, *counts(1)]}),
    ("rule_of", ValueError, {0: [1, 0]}),
    (r"rule_of\[1\]", ValueError, {0: [1, 0, 1, 2, 1]}),
    ("rules", ValueError, {4: [0.1] * 12}),
    ("lr", ValueError, {4: [-0.1] + [0.1] * 12}),
    ("std", ValueError, {4: [0.1, float("nan")] + [0.1] * 11}),
    ("noise", ValueError, {5: [1, 2, 0, 1]}),
    ("noise", ValueError, {5: [1, 2, 0, 2, 1, 3]}),
    ("stream", ValueError, {5: noise(streams=(1, 2, 3))[0]}),
    ("stream", ValueError, {5: noise(streams=(2**32 - 1,))[0]}),
    ("offset", ValueError, {5: noise(offsets=(-1,))[0]}),
    (r"runs\[0\]", ValueError, {5: noise(runs=(2, 4, 0, 0))[0]}),
    ("runs", ValueError, {5: noise(runs=(5, 5))[0]}),
    ("distribution", ValueError, {5: noise(distribution=5)[0]}),
    ("lr", TypeError, {6: [None, None, torch.ones(1)]}),
    ("std", ValueError, {6: [*[None] * 3, torch.ones(2, dtype=torch.float64)]}),
    ("grad_scale", TypeError, {6: [*[None] * 4, torch.ones(1).double()]}),
    ("found_inf", ValueError, {6: [*[None] * 5, torch.ones(2)]}),
    ("norms", ValueError, {7: torch.ones(2, 3, dtype=torch.float64)}),
    ("norms", TypeError, {7: torch.ones(2, 2)}),
]


@pytest.mark.parametrize("case", range(len(BAD_UPDATES)))
def test_bad_update_is_named(case):
    name, error, instead = BAD_UPDATES[case]
    arguments = [*update_arguments(1, 2), *noise(), None]
    for place, value in instead.items():
        arguments[place] = value
    written = [x for x in (*arguments[1], *arguments[3]) if not x.is_meta]
    before = [x.clone() for x in written]
    with pytest.raises(error, match=rf"\b{name}"):
        OPS.noisy_update_(*arguments)
    assert all(torch.equal(x, y) for x, y in zip(written, before, strict=True))


def test_tensors_of_an_update_that_share_memory_are_refused():
    arguments = list(update_arguments(1, 2))
    arguments[3][0] = arguments[1][0]
    with pytest.raises(ValueError, match=r"shares memory with"):
        OPS.noisy_update_(*arguments, *noise(), None)


def test_every_op_is_checked():
    names = {str(s).split("(")[0] for s in torch._C._jit_get_all_schemas()}
    registered = {name.split("::")[1] for name in names if name.startswith("kdkernels::")}
    assert registered == {op._qualified_op_name.split("::")[1] for op, _, _ in op_calls()}


# ---- torch.compile -------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def compiled(fn, **options):
    return torch.compile(fn, fullgraph=True, backend="aot_eager", **options)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


LOSS_OPTIONS = [
    {},
    {"labels": True, "temperature": 3.0, "alpha": 0.3, "label_smoothing": 0.1},
    {"labels": True, "weight": True, "reduction": "sum"},
    {"labels": True, "reduction": "none", "temperature": 2.0},
    {"labels": True, "num_items": 5},
    {"num_items": torch.tensor(5.0), "inplace": True},
    *({"divergence": name, "labels": True} for name in kdkernels.divergences()),
    {"divergence": "js", "standardize": True, "soft_cap": 3.0, "logit_scale": 0.5},
]


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("options", LOSS_OPTIONS)
def test_compiled_distillation_loss(options, dynamic):
    options = dict(options)
    labels = torch.tensor([0, -100, 6, 3, 2]) if options.pop("labels", False) else None
    if options.pop("weight", False):
        options["weight"] = torch.tensor([1.0, 2.0, 0.0, 0.5, 1.0])

    def loss(z, t, labels):
        return distillation_loss(z * 2, t, labels, **options).sum() * 3

    z, t = randn(5, 7), randn(5, 7, seed=1)
    results = []
    for fn in (loss, compiled(loss, dynamic=dynamic)):
        leaf = z.clone().requires_grad_()
        out = fn(leaf, t, labels)
        out.backward()
        with torch.no_grad():
            close(fn(leaf, t, labels), out.detach())
        results.append((out.detach(), leaf.grad))
    close(results[1], results[0])


def both(z, t, labels):
    """What one call returns, and a gradient of the teacher's."""
    loss, statistics = distillation_loss(
        z, t, labels, divergence="js", temperature=2.0, return_statistics=True
    )
    return loss, *statistics


def several(z, t, labels):
    return distillation_loss(z, [t, t.flip(0)], teacher_weights=[1, 2], divergence="reverse_kl")


def top_k(z, t, labels):
    top = topk_teacher(t, 3)
    return topk_distillation_loss(
        z, top.values, top.indices, labels, sparse_gradient=labels is None
    )


def top_k_with_tail(z, t, labels):
    top = topk_teacher(t, 3, by=z)
    options = {"tail": "bucket", "teacher_logsumexp": top.logsumexp, "divergence": "reverse_kl"}
    return topk_distillation_loss(z, top.values, top.indices, labels, **options)


def samples(z, t, labels):
    sample = sample_teacher(t, 4)
    return topk_distillation_loss(
        z, sample.values, sample.indices, labels, tail="ignore", teacher_logsumexp=sample.logsumexp
    )


@pytest.mark.parametrize("fn", [both, several, top_k, top_k_with_tail, samples])
def test_compiled_without_a_break(fn):
    z, t, labels = randn(5, 7), randn(5, 7, seed=1), torch.tensor([0, -100, 6, 3, 2])
    results = []
    counter = CompileCounterWithBackend("aot_eager")
    compiled_fn = torch.compile(fn, fullgraph=True, backend=counter, dynamic=True)
    for call in (fn, compiled_fn):
        leaf, teacher = z.clone().requires_grad_(), t.clone()
        teacher.requires_grad_(fn is both)
        out = call(leaf, teacher, labels)
        loss = out[0] if fn is both else out
        loss.backward()
        results.append([loss.detach(), leaf.grad, teacher.grad, *(out[1:] if fn is both else ())])
    for got, want in zip(*results, strict=True):
        if want is not None and fn is not samples:  # a compiler draws other numbers
            close(got, want)
    counts = []
    for rows in (6, 17, 40):
        compiled_fn(randn(rows, 7).requires_grad_(), randn(rows, 7), torch.zeros(rows).long())
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_compiled_distillation_loss_in_other_dtypes(dtype):
    z, t = randn(5, 700).to(dtype), randn(5, 700, seed=1).to(dtype)
    results = []
    for fn in (distillation_loss, compiled(distillation_loss)):
        leaf = z.clone().requires_grad_()
        out = fn(leaf, t, temperature=2.0)
        (128 * out).backward()
        results.append((out.detach(), leaf.grad))
    assert results[0][0].dtype == results[1][0].dtype
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_compiled_loss_with_changing_batches():
    counter = CompileCounterWithBackend("aot_eager")
    fn = torch.compile(distillation_loss, fullgraph=True, backend=counter, dynamic=True)
    counts = []
    for rows in (5, 6, 17, 1024):
        z, t = randn(rows, 9).requires_grad_(), randn(rows, 9, seed=1)
        close(fn(z, t, temperature=2.0), distillation_loss(z, t, temperature=2.0))
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 4


def test_compiled_module():
    torch.manual_seed(0)
    student = torch.nn.Linear(6, 9)
    criterion = DistillationLoss(temperature=2.0, alpha=0.3)
    x, t, labels = randn(5, 6), randn(5, 9), torch.tensor([0, 1, 2, 8, 4])

    def step(x, t, labels):
        return criterion(student(x), t, labels)

    gradients = []
    for fn in (step, compiled(step)):
        student.zero_grad()
        fn(x, t, labels).backward()
        gradients.append(student.weight.grad.clone())
    close(*gradients)


def compiled_errors():
    z, t = randn(4, 7), randn(4, 7)
    return [
        lambda: compiled(distillation_loss)(z, t[:3]),
        lambda: compiled(distillation_loss)(z, t, temperature=0.0),
        lambda: compiled(input_noise)(z, -1.0, seed=0),
    ]


@pytest.mark.parametrize("case", range(3))
def test_compiled_bad_arguments(case):
    with pytest.raises(Exception, match="teacher_logits|temperature|std"):
        compiled_errors()[case]()


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_compiled_noise(dynamic, memory_format):
    x = randn(2, 3, 4, 5).to(memory_format=memory_format)

    def all_of_them(x, std):
        noise = randn_like(x, **ADDRESS)
        changed = [x.detach().clone(), x.detach().bfloat16()]
        add_noise_(changed, [0.1, 0.2], **ADDRESS)
        by_number = input_noise(x, 0.3, **ADDRESS)
        by_tensor = input_noise(x, std, **ADDRESS)
        back = gradient_noise(x, 0.4, **ADDRESS)
        return noise, *changed, by_number, by_tensor, back

    results = []
    for fn in (all_of_them, compiled(all_of_them, dynamic=dynamic)):
        leaf = x.clone().requires_grad_()
        std = torch.tensor(0.5, requires_grad=True)
        outputs = fn(leaf, std)
        sum((out.float() ** 2).sum() for out in outputs if out.requires_grad).backward()
        results.append([out.detach() for out in outputs] + [leaf.grad, std.grad])
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want)
    # The noise itself is the same to the bit.
    assert torch.equal(results[1][0], results[0][0])


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_noise_family(dynamic):
    """Every way of noise in one graph, its gradients too."""
    options = {"seed": 5, "distribution": "laplace"}

    def family(x, std, w, step):
        y = input_noise(x, std, step=step, multiplicative=True, **options)
        y = gradient_noise(y, 0.1, step=step, **options)
        changed = [x.detach() * 2, w * 3]
        kdkernels.combine_noise_(changed, [0.5, -1.0], [7, 8], step=step)
        return y, kdkernels.noise_dot([y, w], step=step, **options), *changed

    x, w, step = randn(6, 4), randn(9), torch.tensor(3)
    results = []
    for fn in (family, compiled(family, dynamic=dynamic)):
        std = torch.tensor([[0.1], [0.2], [0.0], [1.0], [0.5], [0.3]], requires_grad=True)
        leaf = x.clone().requires_grad_()
        y, dot, *changed = fn(leaf, std, w, step)
        (y.square().sum() + dot).backward()
        results.append((y, dot, *changed, leaf.grad, std.grad))
    close(results[1], results[0])


def test_compiled_module_with_noise_moves_on_without_recompiling():
    counter = CompileCounterWithBackend("aot_eager")
    results = []
    for compile_it in (False, True):
        model = torch.nn.Sequential(
            kdkernels.InputNoise(0.1, learnable=True, shape=(4,), seed=1),
            torch.nn.Linear(4, 4, bias=False),
            kdkernels.GradientNoiseLayer(0.1, seed=2),
        )
        with torch.no_grad():
            model[1].weight.copy_(torch.eye(4))
        run = torch.compile(model, fullgraph=True, backend=counter) if compile_it else model
        outputs = []
        for _ in range(3):
            out = run(torch.ones(3, 4))
            out.square().sum().backward()
            outputs.append(out.detach())
        results.append((*outputs, model[0].std.grad, model[1].weight.grad, model[0].step))
    close(results[1], results[0])
    assert counter.frame_count == 1 and not torch.equal(outputs[0], outputs[1])


def test_compiled_parameter_noise():
    """The regulariser differentiates within its forward pass, which a tracer must be allowed."""
    torch.manual_seed(0)
    model, x = torch.nn.Linear(3, 2), randn(4, 3)
    params = list(model.parameters())

    def loss():
        return model(x).square().sum()

    def perturbed(step):
        with kdkernels.perturbed_parameters(params, 0.1, seed=1, step=step):
            return loss().detach()

    def regularized(step):
        return kdkernels.soft_regularization(loss, params, 0.1, seed=1, step=step)

    step = torch.tensor(3)
    before = [p.detach().clone() for p in params]
    close(compiled(perturbed)(step), perturbed(step))
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        pytest.skip("this torch traces no autograd.grad")
    results = []
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        for fn in (regularized, compiled(regularized)):
            out = fn(step)
            results.append([out.detach(), *torch.autograd.grad(out, params)])
    close(*results)


def test_compiled_add_noise_writes_to_its_argument():
    def step(tensors):
        add_noise_(tensors, 0.1, seed=3)

    a, b = [torch.ones(5), torch.ones(2, 3)], [torch.ones(5), torch.ones(2, 3)]
    step(a)
    compiled(step)(b)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_new_step_is_not_a_new_graph():
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def fn(x, step):
        return input_noise(x, 0.1, seed=7, step=step)

    x = randn(10)
    for step in range(20):
        assert torch.equal(fn(x, step), input_noise(x, 0.1, seed=7, step=step))
    # 0 and 1 and the first other number are compiled as constants before the step becomes dynamic.
    assert counter.frame_count <= 4


def test_a_step_tensor_is_one_graph():
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def fn(x, step):
        noise = randn_like(x, seed=7, step=step)
        step += 1
        return noise

    x, step = randn(10), torch.tensor(0)
    for k in range(5):
        assert torch.equal(fn(x, step), randn_like(x, seed=7, step=k))
    assert counter.frame_count == 1 and step == 5


def test_compiled_without_a_seed_draws_anew():
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def fn(x):
        return randn_like(x), input_noise(x, 1.0)

    x = torch.zeros(10)
    draws = [draw for _ in range(3) for draw in fn(x)]
    assert counter.frame_count == 1
    assert all(not torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])


def test_compiled_backward_sees_the_forwards_noise():
    std = torch.tensor(2.0, requires_grad=True)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def fn(std):
        return input_noise(torch.zeros(1000), std)

    for _ in range(2):
        std.grad = None
        y = fn(std)
        y.sum().backward()
        torch.testing.assert_close(std.grad, y.detach().sum() / 2, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("noise", ["per-step", "per-sample"])
def test_compiled_regression(noise):
    x, y = torch.rand(20, 1), torch.rand(20, 1)
    lr = torch.tensor([0.01, 0.02])

    def fn(x, y, lr):
        return noisy_linear_regression(
            x, y, 0.5, steps=10, lr=lr, seed=3, noise=noise, trajectory=True
        )

    assert torch.equal(compiled(fn)(x, y, lr), fn(x, y, lr))


def test_inductor():
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 9)
    x, t, labels = randn(5, 6), randn(5, 9), torch.tensor([0, 1, 2, 8, 4])

    def step(x, t, labels):
        z = model(input_noise(x, 0.1, seed=1, step=2))
        return distillation_loss(z, t, labels, temperature=2.0)

    results = []
    for fn in (step, torch.compile(step, fullgraph=True)):
        model.zero_grad()
        loss = fn(x, t, labels)
        loss.backward()
        results.append((loss.detach(), model.weight.grad.clone()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


# ---- autocast, checkpointing, fake tensors -------------------------------------------------------


def changing_floats():
    z, t, y = randn(4, 8), randn(4, 8, seed=1), torch.arange(4)

    def added(s):
        out = z.clone()
        add_noise_([out], [s / 2], seed=0)
        return out * s

    return {
        "temperature": lambda s: distillation_loss(z, t, y, temperature=s + 1) * s,
        "label_smoothing": lambda s: distillation_loss(z * s, t, y, label_smoothing=s / 8),
        "teacher_weights": lambda s: distillation_loss(z * s, [t, z], teacher_weights=[s, 9 - s]),
        "linear": lambda s: kdkernels.linear_distillation_loss(
            z * s, t, teacher_hidden=z, teacher_weight=t + 1, temperature=s + 1
        ),
        "std": lambda s: input_noise(z * s, s / 2, seed=0),
        "stds": added,
        "sigma": lambda s: (
            s
            * kdkernels.noisy_linear_regression(z[:, 0], z[:, 1], 0.0, steps=3, seed=0, sigma=s / 4)
        ),
    }


@pytest.mark.parametrize("name", changing_floats())
def test_floats_that_change_in_a_compiled_function(name):
    """A schedule's number also takes part in arithmetic: no graph of an older number is used."""
    torch._dynamo.reset()
    fn = changing_floats()[name]
    made = torch.compile(fn)
    for value in (1.0, 2.0, 3.0, 4.0):
        torch.testing.assert_close(made(value), fn(value), rtol=1e-4, atol=1e-5)


def test_autocast():
    torch.manual_seed(0)
    student = torch.nn.Linear(6, 9)
    x, t = randn(5, 6), randn(5, 9)  # a teacher in fp32, a student that autocast makes bf16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = student(x)
        loss = distillation_loss(z, t, temperature=2.0)
    assert z.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert torch.equal(loss, distillation_loss(z.float(), t, temperature=2.0))
    loss.backward()
    assert student.weight.grad.dtype == torch.float32 and student.weight.grad.any()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        both = distillation_loss(z.detach(), t.bfloat16(), temperature=2.0)
    assert torch.equal(both, distillation_loss(z.detach(), t.bfloat16(), temperature=2.0))


def test_autocast_of_noise():
    x = randn(50).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = input_noise(x, 0.1, seed=1)
        low = input_noise(x.bfloat16(), 0.1, seed=1)
    assert y.dtype == torch.float32 and low.dtype == torch.bfloat16
    assert torch.equal(y, input_noise(x, 0.1, seed=1))


@pytest.mark.parametrize("seed", [3, None])
def test_checkpointing_makes_the_same_noise_again(seed):
    w = randn(50).requires_grad_()

    def layer(w):
        return input_noise(w, 1.0, seed=seed).square()

    torch.manual_seed(0)
    (want,) = torch.autograd.grad(layer(w).sum(), w)
    torch.manual_seed(0)
    (got,) = torch.autograd.grad(checkpoint(layer, w, use_reentrant=False).sum(), w)
    assert torch.equal(got, want)


@pytest.mark.parametrize("inplace", [False, True])
def test_checkpointed_loss(inplace):
    w, t = randn(6, 9).requires_grad_(), randn(5, 9, seed=1)
    x = randn(5, 6, seed=2)

    def loss(w):
        return distillation_loss(x @ w, t, divergence="reverse_kl", inplace=inplace)

    want_loss = loss(w)
    (want,) = torch.autograd.grad(want_loss, w)
    got_loss = checkpoint(loss, w, use_reentrant=False)
    assert torch.equal(got_loss, want_loss)
    assert torch.equal(torch.autograd.grad(got_loss, w)[0], want)


def test_autocast_of_every_teacher():
    z, t = randn(5, 9).bfloat16(), randn(5, 9, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = distillation_loss(z, [t, t.bfloat16()], divergence="js")
        top = topk_distillation_loss(z, *topk_teacher(t, 3)[:2])
    want = distillation_loss(z.float(), [t, t.bfloat16().float()], divergence="js")
    assert torch.equal(mixed, want)
    assert torch.equal(top, topk_distillation_loss(z, *topk_teacher(t, 3)[:2]))


def test_fake_tensors():
    with FakeTensorMode():
        z, t = torch.empty(4, 3, 7, requires_grad=True), torch.empty(4, 3, 7)
        labels = torch.empty(4, 3, dtype=torch.int64)
        loss = distillation_loss(z, t, labels, reduction="none")
        assert loss.shape == (4, 3) and loss.dtype == torch.float32
        loss.sum().backward()
        assert z.grad.shape == z.shape
        assert distillation_loss(z.half(), t.half(), inplace=True).shape == ()
        assert distillation_loss(z.double(), t.double()).dtype == torch.float64
        x = torch.empty(5, 4).t()
        assert randn_like(x, seed=0).is_contiguous() and randn_like(x).shape == (4, 5)
        assert input_noise(x.bfloat16(), 0.1, seed=0).dtype == torch.bfloat16
        assert gradient_noise(x, 0.1, seed=0).shape == (4, 5)
        add_noise_([x], 0.1, seed=0)
        path = noisy_linear_regression(
            torch.empty(9), torch.empty(9), 0.0, steps=3, seed=0, trajectory=True
        )
        assert path.shape == (4,)


@pytest.mark.skipif(_C.build_info()["cuda"] is not None, reason="this build is for CUDA, too")
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("student_logits", lambda x: distillation_loss(x, x)),
        ("student_logits", lambda x: distillation_loss(x.clone().requires_grad_(), x)),
        ("x", lambda x: randn_like(x, seed=0)),
        ("x", lambda x: input_noise(x, 0.1, seed=0)),
        ("x", lambda x: gradient_noise(x, 0.1, seed=0)),
    ],
)
def test_cuda_tensor_on_a_cpu_build(name, call):
    """Fake tensors stand in for CUDA's; the ops without autograd see them as meta tensors."""
    with FakeTensorMode():
        x = torch.empty(4, 7, device="cuda")
        with pytest.raises(ValueError, match=rf"{name} is on cuda:0.*CPU only.*KDKERNELS_CUDA=1"):
            call(x)


# ---- processes -----------------------------------------------------------------------------------


class NoisyImages(Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return input_noise(torch.zeros(100000), 0.1, seed=0, step=index)


def test_data_loader_workers():
    """A forked worker inherits the parent's OpenMP pool without its threads."""
    want = [NoisyImages()[k] for k in range(3)]
    loader = DataLoader(NoisyImages(), num_workers=1, batch_size=None, timeout=1000)
    assert all(torch.equal(got, w) for got, w in zip(loader, want, strict=True))


def run_python(code, **environment):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_import_without_torch_first():
    done = run_python("import kdkernels; print(kdkernels.__version__)")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == kdkernels.__version__


ISA_CODE = """
import torch, kdkernels
print(kdkernels._C.build_info()["isa"])
print(kdkernels.randn_like(torch.empty(5), seed=1).tolist())
"""


@pytest.mark.parametrize("level", _C.build_info()["isa_supported"])
def test_kdkernels_isa(level):
    done = run_python(ISA_CODE, KDKERNELS_ISA=level)
    assert done.returncode == 0, done.stderr
    isa, noise = done.stdout.splitlines()
    assert isa == level and noise == str(randn_like(torch.empty(5), seed=1).tolist())


def test_kdkernels_isa_wrong():
    done = run_python(ISA_CODE, KDKERNELS_ISA="sse9")
    assert done.returncode == 1
    levels = ", ".join(_C.build_info()["isa_supported"])
    last = done.stderr.strip().splitlines()[-1]
    assert last == f'ValueError: KDKERNELS_ISA is "sse9"; this machine runs {levels}'


def test_set_isa_wrong():
    with pytest.raises(ValueError, match='isa is "sse9"; this machine runs baseline'):
        _C.set_isa("sse9")


def test_the_import_registers_the_ops():
    """As loading an exported program needs, which uses no name of the package."""
    script = "import kdkernels, torch; assert torch.ops.kdkernels.noise_dot.default"
    subprocess.run([sys.executable, "-c", script], check=True)
