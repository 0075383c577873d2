"""A teacher per row: in every loss, what a call of that teacher alone gives its rows."""

import pytest
import torch
from test_linear import assert_all_close, labels_of, leaves, randn, results, student, weights_of

from kdkernels import (
    DistillationLoss,
    distillation_loss,
    linear_distillation_loss,
    reference,
    topk_distillation_loss,
)

pytestmark = pytest.mark.quick

ROWS, CLASSES, WIDTHS = 23, 40, (5, 9, 3)
INDEX = torch.randint(3, (ROWS,), generator=torch.Generator().manual_seed(1))
Z = randn(ROWS, CLASSES, seed=1)
TEACHERS = [2 * randn(ROWS, CLASSES, seed=k) for k in (2, 3, 4)]


def heads(dtype=torch.float64, biased=True):
    hidden = [randn(ROWS, n, seed=n, dtype=dtype) for n in WIDTHS]
    weight = [randn(CLASSES, n, seed=n + 1, dtype=dtype) for n in WIDTHS]
    bias = [randn(CLASSES, seed=11, dtype=dtype), None, None]
    out = {"teacher_hidden": hidden, "teacher_weight": weight}
    return out | {"teacher_bias": bias} if biased else out


def top_k():
    return [teacher.topk(8, -1) for teacher in TEACHERS]


def form_of(name):
    """Arguments of several teachers."""
    values, indices = zip(*top_k(), strict=True)
    entries = {"teacher_values": [*values], "teacher_indices": [*indices]}
    return {
        "heads": lambda: heads(),
        "heads without biases": lambda: heads(biased=False),
        "list": lambda: {"teacher_logits": TEACHERS},
        "stack": lambda: {"teacher_logits": torch.stack(TEACHERS)},
        "renormalize": lambda: entries,
        "bucket": lambda: (
            entries
            | {"tail": "bucket", "teacher_logsumexp": [(t / 2).logsumexp(-1) for t in TEACHERS]}
        ),
    }[name]()


def of_teacher(arguments, m, rows):
    """The arguments of one of them, of some rows."""

    def pick(name, x):
        if not isinstance(x, (list, tuple)) and not torch.is_tensor(x):
            return x
        one = x[m]
        return one if one is None or name in ("teacher_weight", "teacher_bias") else one[rows]

    return {name: pick(name, x) for name, x in arguments.items()}


FORMS = ["heads", "heads without biases", "list", "stack", "renormalize", "bucket"]


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("form", FORMS)
def test_linear_against_the_reference(form, reduction):
    options = form_of(form) | {"labels": labels_of((ROWS,), CLASSES), "weight": weights_of((ROWS,))}
    options |= {"teacher_index": INDEX, "temperature": 2.0, "reduction": reduction}
    want = results(reference.linear_distillation_loss, student((ROWS,), CLASSES), **options)
    for budget in (None, 1, 2000):
        got = results(
            linear_distillation_loss, student((ROWS,), CLASSES), **options, memory_budget=budget
        )
        assert_all_close(got, want, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_rows_have_the_bits_of_a_call_of_their_head(biased, dtype):
    """Other teachers' rows are multiplied with those of all, whose number decides how CPUs add."""
    h, w, b = (x.to(dtype) for x in student((ROWS,), CLASSES))
    arguments = heads(dtype, biased)
    options = {"temperature": 2.0, "reduction": "none", "divergence": "js"}
    loss, statistics, grad_hidden, *_ = results(
        linear_distillation_loss, (h, w, b), **arguments, **options, teacher_index=INDEX
    )
    for m in range(3):
        rows = m == INDEX
        of_one, statistics_of_one, *_ = results(
            linear_distillation_loss, (h[rows], w, b), **of_teacher(arguments, m, rows), **options
        )
        assert torch.equal(loss[rows], of_one)
        assert torch.equal(statistics[:, rows], statistics_of_one)
    assert grad_hidden.isfinite().all()


@pytest.mark.parametrize("form", ["list", "stack", "renormalize", "bucket"])
def test_logits_have_the_bits_of_a_call_of_their_teacher(form):
    """Where the place of a row does not decide how it is added up: on CPUs."""
    arguments = form_of(form)
    loss_fn = distillation_loss if "teacher_logits" in arguments else topk_distillation_loss
    options = {"temperature": 2.0, "reduction": "none"}
    z = Z.clone().requires_grad_()
    got = loss_fn(z, **arguments, **options, teacher_index=INDEX)
    (gradient,) = torch.autograd.grad(got.sum(), z)
    by_reference = loss_fn(Z, **arguments, **options, teacher_index=INDEX, backend="reference")
    torch.testing.assert_close(got.detach(), by_reference, rtol=1e-10, atol=1e-13)
    for m in range(3):
        rows, one = m == INDEX, Z[m == INDEX].clone().requires_grad_()
        want = loss_fn(one, **of_teacher(arguments, m, rows), **options)
        assert torch.equal(got[rows], want)
        assert torch.equal(gradient[rows], torch.autograd.grad(want.sum(), one)[0])


def test_gradient_of_the_teachers_that_rows_have():
    teachers = leaves(TEACHERS)
    distillation_loss(Z, teachers, teacher_index=INDEX, reduction="sum").backward()
    for m, teacher in enumerate(teachers):
        assert ((teacher.grad != 0).any(-1) == (m == INDEX)).all()


def test_scales_and_caps_of_teachers_are_tensors_of_rows():
    scales = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    arguments, tensors = heads(), student((ROWS,), CLASSES)
    got = results(
        linear_distillation_loss,
        tensors,
        **arguments,
        teacher_index=INDEX,
        reduction="none",
        teacher_logit_scale=scales[INDEX],
    )
    for m in range(3):
        rows = m == INDEX
        h, w, b = tensors
        want = results(
            linear_distillation_loss,
            (h[rows], w, b),
            **of_teacher(arguments, m, rows),
            reduction="none",
            teacher_logit_scale=scales[m].item(),
        )
        torch.testing.assert_close(got[0][rows], want[0], rtol=1e-12, atol=1e-14)


def test_module():
    loss_fn = DistillationLoss(temperature=2.0)
    want = distillation_loss(Z, TEACHERS, teacher_index=INDEX, temperature=2.0)
    assert torch.equal(loss_fn(Z, TEACHERS, teacher_index=INDEX), want)
    with pytest.raises(TypeError, match="teacher_index"):
        DistillationLoss(teacher_index=INDEX)


def test_a_teacher_without_rows_and_rows_of_several_dimensions():
    index = torch.tensor([[0, 2, 2], [2, 0, 0]])
    arguments = {
        name: [x.reshape(2, 3, -1) if name == "teacher_hidden" else x for x in value]
        for name, value in {
            "teacher_hidden": [randn(6, n, seed=n) for n in WIDTHS],
            "teacher_weight": heads()["teacher_weight"],
        }.items()
    }
    options = arguments | {"teacher_index": index}
    want = results(reference.linear_distillation_loss, student((2, 3), CLASSES), **options)
    got = results(linear_distillation_loss, student((2, 3), CLASSES), **options)
    assert_all_close(got, want, rtol=1e-10, atol=1e-13)


def test_compiles():
    options = heads() | {"teacher_index": INDEX}
    fn = torch.compile(linear_distillation_loss, fullgraph=True, backend="aot_eager")
    dense = torch.compile(distillation_loss, fullgraph=True, backend="aot_eager")
    h, w, _ = student((ROWS,), CLASSES)
    assert torch.equal(fn(h, w, **options), linear_distillation_loss(h, w, **options))
    want = distillation_loss(Z, TEACHERS, teacher_index=INDEX)
    torch.testing.assert_close(dense(Z, TEACHERS, teacher_index=INDEX), want)


H, W = student((ROWS,), CLASSES)[:2]
LINEAR = {"student_hidden": H, "student_weight": W}
DENSE = {"student_logits": Z, "teacher_logits": TEACHERS}
ENTRIES = {"student_logits": Z, **form_of("renormalize")}
BAD = [
    (distillation_loss, "teacher_index", TypeError, DENSE | {"teacher_index": 1}),
    (distillation_loss, "teacher_index", TypeError, DENSE | {"teacher_index": INDEX.int()}),
    (distillation_loss, "teacher_index", ValueError, DENSE | {"teacher_index": INDEX[1:]}),
    (distillation_loss, "teacher_index", ValueError, DENSE | {"teacher_index": INDEX + 1}),
    (distillation_loss, "teacher_index", ValueError, DENSE | {"teacher_logits": Z}),
    (distillation_loss, "teacher_logits", ValueError, DENSE | {"teacher_logits": [Z, Z[1:], Z]}),
    (distillation_loss, "teacher_logits", TypeError, DENSE | {"teacher_logits": [Z, 1.0, Z]}),
    (distillation_loss, "teacher_weights", ValueError, DENSE | {"teacher_weights": [1, 1, 1]}),
    (topk_distillation_loss, "teacher_index", ValueError, ENTRIES | {"teacher_index": INDEX - 1}),
    (topk_distillation_loss, "teacher_values", ValueError, ENTRIES | {"teacher_values": Z}),
    (linear_distillation_loss, "teacher_index", ValueError, LINEAR | form_of("list")),
    (linear_distillation_loss, "teacher_index", ValueError, LINEAR | heads()),
    (linear_distillation_loss, "teacher_index", TypeError, LINEAR | heads()),
    (linear_distillation_loss, "teacher_index", ValueError, LINEAR | heads()),
    (linear_distillation_loss, "teacher_weight", ValueError, LINEAR | heads()),
    (linear_distillation_loss, "max_rows", ValueError, LINEAR | heads()),
]
CHANGES = {
    10: {"teacher_index": INDEX - 1},
    11: {"teacher_index": INDEX + 1},
    12: {"teacher_index": INDEX.double()},
    13: {"teacher_index": None},
    14: {"teacher_weight": heads()["teacher_weight"][:2]},
    15: {"max_rows": 3},
}


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_argument_is_named(case):
    loss_fn, name, error, arguments = BAD[case]
    arguments = {"teacher_index": INDEX} | arguments | CHANGES.get(case, {})
    with pytest.raises(error, match=rf"\b{name}\b") as raised:
        loss_fn(**arguments)
    assert type(raised.value) is error
