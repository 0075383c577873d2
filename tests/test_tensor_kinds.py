"""Tensors of other kinds: wrappers, zero tensors, negated views, meta tensors, tangents."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from kdkernels import (
    add_noise_,
    distillation_loss,
    linear_distillation_loss,
    topk_distillation_loss,
    topk_teacher,
)

pytestmark = pytest.mark.quick

Z, T = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.tensor([0, 5, 2, 2])
HEAD = torch.eye(6, dtype=torch.float64)
TOP = topk_teacher(T, 3)


@pytest.fixture(scope="module", autouse=True)
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def d_tensor(x):
    return distribute_tensor(x, init_device_mesh("cpu", (1,)), [Replicate()])


def collective(x):
    return collectives.all_reduce(x, "sum", dist.group.WORLD)


def masked(x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.masked.masked_tensor(x, torch.ones_like(x, dtype=torch.bool))


def bucket(**options):
    return topk_distillation_loss(Z, *TOP[:2], tail="bucket", **options)


CALLS = {  # the argument, what it usually is, the call
    "teacher_logits": (T, lambda x: distillation_loss(Z, x)),
    "one of several": (T, lambda x: distillation_loss(Z, [T, x])),
    "labels": (LABELS, lambda x: distillation_loss(Z, T, x)),
    "weight": (torch.rand(4), lambda x: distillation_loss(Z, T, weight=x)),
    "temperature": (torch.rand(4) + 1, lambda x: distillation_loss(Z, T, temperature=x)),
    "teacher_values": (TOP.values, lambda x: topk_distillation_loss(Z, x, TOP.indices)),
    "teacher_indices": (TOP.indices, lambda x: topk_distillation_loss(Z, TOP.values, x)),
    "teacher_logsumexp": (TOP.logsumexp, lambda x: bucket(teacher_logsumexp=x)),
    "student_weight": (HEAD, lambda x: linear_distillation_loss(Z, x, teacher_logits=T)),
    "teacher_weight": (HEAD, lambda x: linear_distillation_loss(Z, HEAD, T, x)),
}


def sharded(x):
    return distribute_tensor(x, init_device_mesh("cpu", (1,)), [Shard(0)])


@pytest.mark.parametrize("wrap", [sharded, masked])
@pytest.mark.parametrize("name", CALLS)
def test_a_wrapper_of_a_part_is_refused_beside_plain_tensors(name, wrap):
    value, call = CALLS[name]
    argument = name if name != "one of several" else "teacher_logits"
    with pytest.raises((TypeError, ValueError), match=rf"\b{argument}\b"):
        call(wrap(value))


@pytest.mark.parametrize("wrap", [d_tensor, collective])
@pytest.mark.parametrize("name", CALLS)
def test_a_wrapper_of_a_whole_tensor_is_that_tensor(name, wrap):
    value, call = CALLS[name]
    torch.testing.assert_close(call(wrap(value)), call(value))


def negated(x):
    return torch.complex(torch.zeros_like(x), -x).conj().imag


@pytest.mark.parametrize("name", [n for n in CALLS if CALLS[n][0].is_floating_point()])
def test_a_negated_view_is_read_with_its_sign(name):
    value, call = CALLS[name]
    value = value.to(torch.float64)
    assert negated(value).is_neg()
    torch.testing.assert_close(call(negated(value)), call(value))


def test_a_zero_tensor_is_zeros():
    zero = torch._efficientzerotensor((4, 6), dtype=torch.float64)
    zeros = torch.zeros(4, 6, dtype=torch.float64)
    torch.testing.assert_close(distillation_loss(Z, zero), distillation_loss(Z, zeros))
    torch.testing.assert_close(distillation_loss(zero, T), distillation_loss(zeros, T))


def test_meta_tensors_give_meta_tensors():
    z, t = (torch.empty(4, 6, device="meta", requires_grad=grad) for grad in (True, False))
    loss = distillation_loss(z, t)
    loss.backward()
    assert loss.device.type == z.grad.device.type == "meta"
    assert loss.shape == () and z.grad.shape == z.shape


def test_a_teacher_asked_in_inference_mode():
    with torch.inference_mode():
        t, labels, temperature = T.clone(), LABELS.clone(), torch.rand(4) + 1
    z, head = Z.clone().requires_grad_(), HEAD.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(
        distillation_loss(z, t, labels, temperature=temperature), z, create_graph=True
    )
    gradient.square().sum().backward()  # a second derivative reads the teacher again
    again = Z.clone().requires_grad_()
    (want,) = torch.autograd.grad(
        distillation_loss(again, T, LABELS, temperature=temperature.clone()),
        again,
        create_graph=True,
    )
    want.square().sum().backward()
    torch.testing.assert_close(z.grad, again.grad)
    loss = linear_distillation_loss(Z, head, teacher_logits=t, labels=labels, reduction="none")
    loss.sum().backward()
    assert head.grad.norm() > 0


FORWARD = {
    "distillation_loss": lambda z: distillation_loss(z, T),
    "topk_distillation_loss": lambda z: topk_distillation_loss(z, *TOP[:2]),
    "linear_distillation_loss": lambda z: linear_distillation_loss(z, HEAD, teacher_logits=T),
}


@pytest.mark.parametrize("name", FORWARD)
def test_forward_mode_is_refused(name):
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(FORWARD[name], (Z,), (T,))


def test_forward_mode_of_the_reference():
    def loss(backend, z):
        return distillation_loss(z, T, backend=backend)

    tangent = torch.func.jvp(lambda z: loss("reference", z), (Z,), (T,))[1]
    z = Z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss("fused", z), z)
    torch.testing.assert_close(tangent, (gradient * T).sum())


@pytest.mark.parametrize("cap", ["soft_cap", "teacher_soft_cap"])
def test_a_cap_hides_no_infinity(cap):
    z, t = Z.clone(), T.clone()
    (z if cap == "soft_cap" else t)[1, 2] = torch.inf
    loss = distillation_loss(z, t, reduction="none", **{cap: 20.0})
    assert loss.isnan().tolist() == [False, True, False, False]


def test_inplace_refuses_rows_that_overlap():
    base = torch.randn(407, requires_grad=True)
    rows = (base * 1).as_strided((400, 8), (1, 1))
    with pytest.raises(ValueError, match="inplace"):
        distillation_loss(rows, torch.randn(400, 8), inplace=True)


def test_strided_views_of_one_memory():
    x = torch.zeros(4, 8)
    with pytest.raises(ValueError, match="shares memory"):
        add_noise_([x[:, ::2], x[:, ::2]], 1.0, seed=0)
    with pytest.raises(ValueError, match="shares memory"):
        add_noise_([x[:, ::2], x], 1.0, seed=0)
    add_noise_([x[:, ::2], x[:, 1::2]], 1.0, seed=0)  # interleaved, but apart
    want = torch.zeros(2, 4, 4)
    add_noise_(list(want), 1.0, seed=0)
    torch.testing.assert_close(torch.stack((x[:, ::2], x[:, 1::2])), want)
