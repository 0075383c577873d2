"""linear_log_probs: numbers whatever the chunks, gradients, place in PyTorch, bad input."""

import math

import pytest
import torch
from test_linear import HALF_ULP, assert_all_close, leaves, randn, student

from kdkernels import linear_log_probs, reference

pytestmark = pytest.mark.quick

ROWS, CLASSES, WIDTH = 11, 37, 8
NAN = math.nan


def ids_of(rows=(ROWS,), classes=CLASSES):
    ids = torch.randint(classes, rows, generator=torch.Generator().manual_seed(4))
    ids.view(-1)[2::5] = -100
    return ids


def results(op, tensors, ids, wanted=("log_probs", "entropy"), **options):
    """All that it returns, and the gradients of a sum of what is wanted, with changing signs."""
    h, w, b = leaves(tensors)
    out = op(h, w, ids, bias=b, **options)
    total = 0
    for k, name in enumerate(wanted):
        x = getattr(out, name)
        factors = torch.linspace(-1 + k, 2, x.numel(), dtype=x.dtype).reshape(x.shape)
        total = total + (factors * x).sum()
    return *(x.detach() for x in out), *torch.autograd.grad(total, (h, w, b))


def per_row(seed):
    return 0.5 + randn(ROWS, seed=seed).abs()


OPTIONS = {
    "plain": {},
    "top": {"top_k": 4},
    "temperature": {"temperature": 1.7, "top_k": 2},
    "soft cap": {"logit_scale": 0.7, "soft_cap": 3.0, "temperature": 0.6, "top_k": 37},
    "of rows": {"logit_scale": per_row(7), "soft_cap": per_row(8) * 4, "temperature": per_row(9)},
}


@pytest.mark.parametrize("wanted", [("log_probs",), ("entropy",), ("log_probs", "entropy")])
@pytest.mark.parametrize("name", OPTIONS)
def test_against_the_formula(name, wanted):
    tensors, options = student(), OPTIONS[name]
    want = results(reference.linear_log_probs, tensors, ids_of(), wanted, **options)
    for budget in (None, 1, 1000):
        got = results(linear_log_probs, tensors, ids_of(), wanted, **options, memory_budget=budget)
        assert_all_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rows", [(), (1,), (0,), (2, 3), (3, 1, 2)])
def test_leading_shapes(rows):
    want = results(reference.linear_log_probs, student(rows), ids_of(rows), top_k=3)
    got = results(linear_log_probs, student(rows), ids_of(rows), top_k=3)
    assert_all_close(got, want, rtol=1e-10, atol=1e-12)
    assert [x.shape[: len(rows)] for x in got[:6]] == [rows] * 6


@pytest.mark.parametrize("wanted", [("log_probs",), ("log_probs", "entropy")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype, wanted):
    rows, classes, width = (40,), 700, 64
    h, w, b = student(rows, classes, width)
    tensors = [x.to(dtype) for x in (h, w / 8, b)]
    ids = ids_of(rows, classes)
    exact = [x.double() for x in tensors]
    want = results(reference.linear_log_probs, exact, ids, wanted, top_k=5)
    got = results(linear_log_probs, tensors, ids, wanted, top_k=5, memory_budget=50_000)
    assert [x.dtype for x in got[:3]] == [torch.float32] * 3
    assert [x.dtype for x in got[6:]] == [dtype] * 3
    unit = HALF_ULP.get(dtype, 2.0**-22)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if a.is_floating_point():
            atol = max(2 * unit if i >= 6 else 0, 2e-6) * b.abs().max().item()
            torch.testing.assert_close(a.double(), b, rtol=0, atol=atol)
        else:
            assert (a == b).float().mean() > 0.99  # of equal logits any may be the larger


def test_gradcheck():
    h, w, b = leaves(student((4,), 9, 3))
    ids = ids_of((4,), 9)

    def both(h, w, b):
        out = linear_log_probs(h, w, ids, bias=b, temperature=1.3, soft_cap=5.0, memory_budget=300)
        return out.log_probs, out.entropy

    assert torch.autograd.gradcheck(both, (h, w, b))
    with pytest.raises(ValueError, match="second derivative"):
        torch.autograd.grad(both(h, w, b)[0].sum(), h, create_graph=True)


def test_excluded_classes_and_rows_left_out():
    """A class of logit -inf has no probability; what rows hold that are left out does no harm."""
    h, w, b = student()
    b[3] = -math.inf
    ids = ids_of().masked_fill(ids_of() == 3, 4)
    out = ids == -100
    for options in ({"top_k": 37}, {"top_k": 37, "soft_cap": 4.0}):
        want = results(reference.linear_log_probs, (h, w, b), ids, **options)
        got = results(linear_log_probs, (h.masked_fill(out[:, None], NAN), w, b), ids, **options)
        assert_all_close(got, want, rtol=1e-10, atol=1e-12)
        assert (got[4][~out, -1] == -math.inf).all() and (got[5][~out, -1] == 3).all()
        assert (got[6][out] == 0).all() and (got[5][out] == -1).all() and not got[3][out].any()


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_only_what_requires_grad(needs):
    h, w, _ = student()
    for x, need in zip((h, w), needs, strict=True):
        x.requires_grad_(need)
    out = linear_log_probs(h, w, ids_of())
    assert out.log_probs.requires_grad == any(needs)
    if any(needs):
        out.log_probs.sum().backward()
    assert [x.grad is not None for x in (h, w)] == [*needs]


def test_compiles():
    h, w, b = leaves(student())

    def step(h, w, b, ids):
        out = linear_log_probs(h * 2, w, ids, bias=b, temperature=0.8, top_k=2)
        return (out.log_probs - 0.1 * out.entropy).sum() + out.top_log_probs.sum()

    fn = torch.compile(step, fullgraph=True, backend="aot_eager")
    want, got = step(h, w, b, ids_of()), fn(h, w, b, ids_of())
    torch.testing.assert_close(got, want)
    of_want, of_got = (torch.autograd.grad(x, (h, w, b)) for x in (want, got))
    assert_all_close(of_got, of_want, rtol=1e-12, atol=1e-14)


def test_autocast():
    h, w, b = (x.float() for x in student())
    lower = [x.bfloat16() for x in (h, w, b)]
    want = results(linear_log_probs, lower, ids_of())
    with torch.autocast("cpu", torch.bfloat16):
        got = results(linear_log_probs, (h, w, b), ids_of())
    assert_all_close(got[:3], want[:3], rtol=1e-6, atol=1e-6)
    assert all(x.dtype == torch.float32 for x in got[6:])


H, W, IDS = torch.zeros(4, 3), torch.zeros(7, 3), torch.zeros(4, dtype=torch.int64)
BAD = [
    ("hidden", TypeError, {"hidden": [1.0]}),
    ("hidden", TypeError, {"hidden": H.int()}),
    ("hidden", ValueError, {"hidden": H[0, 0]}),
    ("weight", TypeError, {"weight": W.double()}),
    ("weight", ValueError, {"weight": W[:, :2]}),
    ("weight", ValueError, {"weight": W[:0]}),
    ("bias", ValueError, {"bias": W[:3, 0]}),
    ("bias", TypeError, {"bias": 1.0}),
    ("token_ids", TypeError, {"token_ids": IDS.int()}),
    ("token_ids", TypeError, {"token_ids": None}),
    ("token_ids", ValueError, {"token_ids": IDS[:3]}),
    ("top_k", ValueError, {"top_k": 8}),
    ("top_k", ValueError, {"top_k": -1}),
    ("top_k", TypeError, {"top_k": 1.5}),
    ("temperature", ValueError, {"temperature": 0.0}),
    ("temperature", TypeError, {"temperature": "1"}),
    ("temperature", ValueError, {"temperature": torch.ones(3)}),
    ("temperature", ValueError, {"temperature": torch.ones(4, requires_grad=True)}),
    ("soft_cap", ValueError, {"soft_cap": -1.0}),
    ("logit_scale", ValueError, {"logit_scale": math.inf}),
    ("ignore_index", TypeError, {"ignore_index": None}),
    ("memory_budget", ValueError, {"memory_budget": 0}),
    ("memory_budget", TypeError, {"memory_budget": "1 GB"}),
    ("backend", ValueError, {"backend": "triton"}),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_argument_is_named(case):
    name, error, arguments = BAD[case]
    with pytest.raises(error, match=rf"\b{name}\b") as raised:
        linear_log_probs(**({"hidden": H, "weight": W, "token_ids": IDS} | arguments))
    assert type(raised.value) is error


def test_token_out_of_range():
    with pytest.raises(ValueError, match="token_ids holds 7"):
        linear_log_probs(H, W, torch.tensor([0, 1, 7, 2]))
