"""Options that differ from row to row, and options that take a gradient."""

import pytest
import torch

from kdkernels import (
    distillation_loss,
    linear_distillation_loss,
    topk_distillation_loss,
    topk_teacher,
)

pytestmark = pytest.mark.quick

ROWS, CLASSES = 6, 11
LABELS = torch.tensor([0, 3, -100, 10, 7, 2])


def between(low, high, dtype=torch.float64):
    return torch.linspace(low, high, ROWS, dtype=dtype)


# Limits of a parameter's range stand beside numbers within it.
OPTIONS = [
    {"temperature": between(0.5, 4)},
    {"alpha": between(0, 1)},
    {"logit_scale": between(0.5, 2)},
    {"soft_cap": between(2, 20)},
    {"teacher_logit_scale": between(0.5, 2), "teacher_soft_cap": between(3, 9)},
    {"divergence": "js", "beta": torch.tensor([0, 0.3, 1, 0.9, 1, 0.5])},
    {"divergence": "skew_forward_kl", "beta": torch.tensor([0, 0.3, 1, 0.9, 1, 0.5])},
    {"divergence": "skew_reverse_kl", "beta": torch.tensor([0, 0.3, 1, 0.9, 1, 0.5])},
    {
        "divergence": "alpha_beta",
        "divergence_alpha": torch.tensor([1, 0, 0.4, 0.5, 0, 2.0]),
        "beta": torch.tensor([0, 1, 0.3, 0, 0.7, 1.0]),
    },
    {"divergence": "alpha_beta", "beta": torch.tensor([0, 1, 0.3, 0, 0.7, 1.0])},
    {"divergence": "decoupled", "divergence_alpha": between(1, 2), "beta": between(0, 8)},
    {
        "temperature": between(1, 4),
        "alpha": between(0, 1),
        "divergence": "reverse_kl",
        "standardize": True,
        "label_smoothing": 0.1,
        "weight": between(0, 2),
    },
]


def logits(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(ROWS, CLASSES, generator=generator, dtype=torch.float64)).to(dtype)


def of_row(options, i):
    return {
        name: value[i].item() if torch.is_tensor(value) and name != "weight" else value
        for name, value in options.items()
    }


def loss_and_gradient(loss_of, z, *args, **options):
    z = z.clone().requires_grad_()
    out = loss_of(z, *args, **options)
    out.sum().backward()
    return out.detach(), z.grad


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_row_of_many_is_the_row_alone(options, dtype):
    z, t = logits(dtype), logits(dtype, seed=1)
    got = loss_and_gradient(distillation_loss, z, t, LABELS, reduction="none", **options)
    for i in range(ROWS):
        row = slice(i, i + 1)
        alone = of_row(options, i)
        if "weight" in alone:
            alone["weight"] = options["weight"][row]
        want = loss_and_gradient(
            distillation_loss, z[row], t[row], LABELS[row], reduction="none", **alone
        )
        torch.testing.assert_close(got[0][row], want[0], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(
            got[1][row], want[1], rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6
        )


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o)))
def test_the_reference_agrees(options):
    got, want = (
        loss_and_gradient(distillation_loss, logits(), logits(seed=1), LABELS, backend=b, **options)
        for b in ("fused", "reference")
    )
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("tail", ["renormalize", "bucket"])
def test_topk(tail):
    temperature, t = between(0.5, 4), logits(seed=1)
    top = topk_teacher(t, 4)
    lse = topk_teacher(t, 4, temperature=temperature).logsumexp if tail == "bucket" else None
    options = {"tail": tail, "teacher_logsumexp": lse, "alpha": between(0, 1)}
    got, want = (
        loss_and_gradient(
            topk_distillation_loss,
            logits(),
            *top[:2],
            LABELS,
            temperature=temperature,
            backend=backend,
            **options,
        )
        for backend in ("fused", "reference")
    )
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear(reduction):
    generator = torch.Generator().manual_seed(2)
    hidden, head = (
        torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (ROWS, CLASSES)
    )
    got, want = (
        loss_and_gradient(
            linear_distillation_loss,
            hidden,
            head,
            None,
            None,
            LABELS,
            teacher_logits=logits(seed=1),
            temperature=between(0.5, 4),
            alpha=between(0, 1),
            soft_cap=between(2, 9),
            memory_budget=2 * CLASSES * 8,
            reduction=reduction,
            backend=backend,
        )
        for backend in ("fused", "reference")
    )
    torch.testing.assert_close(got, want)


def test_compiled():
    z, t, temperature = logits(), logits(seed=1), between(0.5, 4)
    compiled = torch.compile(distillation_loss, fullgraph=True)
    want = loss_and_gradient(distillation_loss, z, t, LABELS, temperature=temperature)
    got = loss_and_gradient(compiled, z, t, LABELS, temperature=temperature)
    torch.testing.assert_close(got, want)


# ---- gradients of options -----------------------------------------------------------------------

LEARNABLE = {
    "temperature": (2.0, {}),
    "alpha": (0.4, {}),
    "logit_scale": (1.5, {}),
    "soft_cap": (5.0, {}),
    "teacher_logit_scale": (1.5, {}),
    "teacher_soft_cap": (5.0, {}),
    "beta": (0.3, {"divergence": "js"}),
    "divergence_alpha": (0.3, {"divergence": "alpha_beta"}),
}


@pytest.mark.parametrize("shape", [(), (ROWS,)])
@pytest.mark.parametrize("name", LEARNABLE)
def test_an_option_that_requires_grad_gets_its_gradient(name, shape):
    number, others = LEARNABLE[name]
    z, t = logits().requires_grad_(), logits(seed=1)
    value = torch.full(shape, number, dtype=torch.float64, requires_grad=True)

    def loss(z, value):
        return distillation_loss(z, t, LABELS, **{name: value}, **others)

    assert torch.autograd.gradcheck(loss, (z, value))
    # Without a gradient to make the kernels give the same loss.
    torch.testing.assert_close(loss(z.detach(), value.detach()), loss(z, value).detach())


# ---- bad options --------------------------------------------------------------------------------

BAD = {
    "temperature": torch.tensor([1.0, 2, 0, 1, 1, 1]),
    "alpha": torch.tensor([1.0, 2, 0, 1, 1, 1]),
    "logit_scale": torch.ones(ROWS + 1),
    "soft_cap": torch.ones(ROWS, dtype=torch.complex64),
    "teacher_soft_cap": torch.full((ROWS,), torch.inf),
    "beta": torch.ones(ROWS),  # which forward KL lacks
}


@pytest.mark.parametrize("name", BAD)
def test_bad_option_is_named(name):
    with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b"):
        distillation_loss(logits(), logits(seed=1), LABELS, **{name: BAD[name]})
