"""distillation_loss against the plain PyTorch reference in fp64, its gradients, its bad input."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nightly import examples
from torch.nn import functional as F

import kdkernels
from kdkernels import DistillationLoss, distillation_loss, reference

pytestmark = pytest.mark.quick

INF, NAN = math.inf, math.nan
HALF_ULP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # relative


def on_emulator():
    """Whether this run has the ops of tests/emulated_ops.py."""
    return kdkernels._C.build_info()["cuda"] == "emulated"


def generator(seed):
    return torch.Generator().manual_seed(seed)


def logits(*shape, scale=3.0, seed=0, dtype=torch.float32):
    values = torch.randn(shape, generator=generator(seed), dtype=torch.float64)
    return (scale * values).to(dtype)


def pair(*shape, **options):
    return logits(*shape, seed=1, **options), logits(*shape, seed=2, **options)


def loss_and_gradient(loss_fn, student, teacher, labels=None, grad_output=None, **options):
    student = student.detach().requires_grad_()
    loss = loss_fn(student, teacher, labels, **options)
    (gradient,) = torch.autograd.grad(loss, student, grad_output)
    return loss.detach(), gradient


def fp64(student, teacher, labels=None, grad_output=None, **options):
    """What is right: the reference in fp64."""
    if grad_output is not None:
        grad_output = grad_output.double()
    return loss_and_gradient(
        reference.distillation_loss,
        student.double(),
        teacher.double(),
        labels,
        grad_output,
        **options,
    )


# ---- the reference itself -----------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_reference_is_what_pytorch_users_write(temperature, smoothing):
    z, t = pair(6, 9, dtype=torch.float64)
    labels = torch.randint(9, (6,), generator=generator(0))
    kl = F.kl_div(
        F.log_softmax(z / temperature, -1), F.softmax(t / temperature, -1), reduction="batchmean"
    )
    want = 0.3 * temperature**2 * kl + 0.7 * F.cross_entropy(z, labels, label_smoothing=smoothing)
    options = {"temperature": temperature, "alpha": 0.3, "label_smoothing": smoothing}
    for backend in ("reference", "fused"):
        got = distillation_loss(z, t, labels, backend=backend, **options)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


# ---- everything at once -------------------------------------------------------------------------

SHAPES = [(0, 3), (2, 0, 5), (1, 1), (4, 1), (1,), (9,), (1, 2), (3, 15), (5, 16), (4, 17)]
SHAPES += [(2, 3, 33), (3, 4, 70), (40, 10), (3, 1000), (2, 1023), (2, 1024), (3, 1025), (2, 2048)]
SHAPES += [(1, 2, 4113)]


@dataclasses.dataclass
class Problem:
    student: torch.Tensor  # contiguous values; `layout` says how they lie in memory
    teacher: torch.Tensor
    labels: torch.Tensor | None
    layout: str
    inplace: bool
    grad_output: torch.Tensor | None
    options: dict


LAYOUTS = ("contiguous", "sliced", "shifted", "length first", "transposed", "stepped")


@st.composite
def problems(draw, dtypes):
    shape = draw(st.sampled_from(SHAPES))
    dtype = draw(st.sampled_from(dtypes))
    scale = draw(st.sampled_from([0.3, 1.0, 4.0, 20.0]))
    g = generator(draw(st.integers(0, 2**32)))
    rows, classes = shape[:-1], shape[-1]

    def random_logits():
        return (scale * torch.randn(shape, generator=g, dtype=torch.float64)).to(dtype)

    student, teacher = random_logits(), random_logits()
    if shape and len(shape) > 1 and draw(st.booleans()):
        teacher = teacher[:1].expand(shape)
    temperature = draw(st.sampled_from([0.5, 1.0, 1.7, 2.0, 4.0]))
    options = {"temperature": temperature}

    labels = None
    if draw(st.booleans()):
        labels = torch.randint(classes, rows, generator=g)
        ignore_index = draw(st.sampled_from([-100, 0, -1, 10**12]))
        share = draw(st.sampled_from([0.0, 0.0, 0.3, 1.0]))
        labels[torch.rand(rows, generator=g) < share] = ignore_index
        options["ignore_index"] = ignore_index
        options["alpha"] = draw(st.sampled_from([None, 0.0, 0.1, 0.5, 0.9, 1.0]))
        options["label_smoothing"] = draw(st.sampled_from([0.0, 0.1, 1.0]))
    kind = draw(st.sampled_from(["none", "none", "float", "fp64", "int", "bool"]))
    if kind == "float":
        options["weight"] = 2 * torch.rand(rows, generator=g)
    elif kind == "fp64":
        weight = torch.rand(rows, generator=g, dtype=torch.float64)
        options["weight"] = torch.where(weight < 0.3, 0.0, weight)
    elif kind == "int":
        options["weight"] = torch.randint(3, rows, generator=g)
    elif kind == "bool":
        options["weight"] = torch.rand(rows, generator=g) < 0.5
    options["reduction"] = draw(st.sampled_from(["mean", "sum", "none"]))
    if options["reduction"] == "mean":
        items = draw(st.sampled_from([None, None, 7, 2.5, torch.tensor(3.0), torch.tensor(11)]))
        options["num_items"] = items
    grad_output = draw(st.sampled_from([None, None, 1.0, 0.0, -2.5, 100.0]))
    if options["reduction"] == "none":
        grad_output = torch.randn(rows, generator=g)
    elif grad_output is not None:
        grad_output = torch.tensor(grad_output)
    if grad_output is not None and dtype == torch.float64:
        grad_output = grad_output.double()
    layout = draw(st.sampled_from(LAYOUTS))
    inplace = layout not in ("transposed", "stepped") and draw(st.booleans())
    return Problem(student, teacher, labels, layout, inplace, grad_output, options)


def laid_out(values, layout):
    """(base, view): view(base) holds `values` in that layout; view also takes base's gradient."""
    shape = values.shape
    if layout == "sliced":
        base = values.new_full((*shape[:-1], shape[-1] + 4), NAN)

        def view(b):
            return b[..., 1 : 1 + shape[-1]]
    elif layout == "shifted" and len(shape) > 1:  # as logits[:, 1:] is
        base = values.new_full((*shape[:-2], shape[-2] + 1, shape[-1]), NAN)

        def view(b):
            return b[..., 1:, :]
    elif layout == "length first" and len(shape) > 2:
        base = values.new_empty((*shape[:-3], shape[-2], shape[-3], shape[-1]))

        def view(b):
            return b.transpose(-3, -2)
    elif layout == "transposed":
        base = values.new_empty(shape[::-1])

        def view(b):
            return b.permute(*range(b.dim() - 1, -1, -1))
    elif layout == "stepped":
        base = values.new_full([2 * n for n in shape], NAN)

        def view(b):
            return b[tuple(slice(0, 2 * n, 2) for n in shape)]
    else:
        base = torch.empty_like(values)

        def view(b):
            return b

    view(base).copy_(values)
    return base, view


def check(problem):
    dtype, options = problem.student.dtype, problem.options
    want_loss, want_gradient = fp64(
        problem.student, problem.teacher, problem.labels, problem.grad_output, **options
    )
    base, view = laid_out(problem.student, problem.layout)
    base.requires_grad_()
    loss = distillation_loss(
        view(base * 1 if problem.inplace else base),
        problem.teacher,
        problem.labels,
        inplace=problem.inplace,
        **options,
    )
    loss.backward(problem.grad_output)
    gradient = view(base.grad)

    # The largest share of one row in the loss, and of all rows together.
    rows = problem.student.shape[:-1]
    weight = options.get("weight")
    weight = torch.ones(rows).double() if weight is None else weight.double()
    if problem.labels is not None:
        weight = torch.where(problem.labels == options["ignore_index"], 0.0, weight)
    if options["reduction"] == "mean":
        items = options["num_items"]
        weight = weight / (float(items) if items is not None else max(weight.sum().item(), 1e-30))
    share = weight.max().item() if weight.numel() else 0.0
    total = share if options["reduction"] == "none" else weight.sum().item()

    temperature = options["temperature"]
    exact = dtype == torch.float64
    # Of a small divergence only the absolute error can be small: it is T^2 times a sum of terms of
    # either sign that nearly cancel.
    atol = (1e-13 if exact else 4e-7) * temperature**2 * total
    assert loss.dtype == (torch.float64 if exact else torch.float32)
    assert loss.shape == want_loss.shape
    torch.testing.assert_close(loss.double(), want_loss, rtol=1e-12 if exact else 1e-6, atol=atol)

    scale = 1.0
    if problem.grad_output is not None and problem.grad_output.numel():
        scale = problem.grad_output.abs().max().item()
    atol = (1e-13 if exact else 1e-6) * max(1.0, share * max(temperature, 1.0) * scale)
    if dtype == torch.float16:
        atol += 2.0**-24 * max(1.0, scale)  # half of the smallest subnormal, twice
    assert gradient.dtype == dtype and gradient.shape == want_gradient.shape
    # In 16 bits it is rounded when it is made, and when it is scaled.
    is_scaled = problem.grad_output is not None
    is_scaled |= dtype == torch.float16 and torch.is_tensor(options.get("num_items"))
    rtol = HALF_ULP.get(dtype, 0.0) * (2 if is_scaled else 1)
    torch.testing.assert_close(gradient.double(), want_gradient, rtol=1.001 * rtol, atol=atol)

    # Where no gradient is made nothing is written, and the loss is the same to the bit.
    untouched = base.detach().clone()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            again = distillation_loss(
                view(base), problem.teacher, problem.labels, inplace=problem.inplace, **options
            )
        # A CUDA kernel may add in another order where it does not write.
        rtol = (2.0**-50 if exact else 2.0**-21) if on_emulator() else 0
        torch.testing.assert_close(again, loss.detach(), rtol=rtol, atol=rtol * total)
        assert torch.equal(base.detach().nan_to_num(), untouched.nan_to_num())


@settings(max_examples=examples(500))
@given(problems([torch.float32]))
def test_fp32_against_fp64(problem):
    check(problem)


@settings(max_examples=examples(300))
@given(problems([torch.float64]))
def test_fp64_against_fp64(problem):
    check(problem)


@settings(max_examples=examples(500))
@given(problems([torch.bfloat16, torch.float16]))
def test_16_bits_against_fp64(problem):
    check(problem)


# ---- accuracy -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weighted", [False, True])
def test_num_items_in_a_tensor_is_in_the_gradient_that_forward_makes(dtype, weighted):
    g = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(6, 50, generator=g).to(dtype) for _ in range(2))
    labels = torch.tensor([3, -100, 4, 49, -100, 0])
    weight = 2 * torch.rand(6, generator=g) if weighted else None
    found = []
    for items in (7, torch.tensor(7), torch.tensor([7.0], dtype=torch.float64)):
        z = student.clone().requires_grad_()
        loss = distillation_loss(z, teacher, labels, weight=weight, num_items=items)
        with torch.autograd.profiler.profile() as profile:
            loss.backward()
        is_scaled = dtype == torch.float16 and not weighted  # and waits in a larger range
        # On CUDA a kernel of ours looks at the factor, and may return at once.
        if not on_emulator():
            assert ("aten::mul_" in {e.name for e in profile.function_events}) == is_scaled
        found.append((loss.detach(), z.grad))
    exact = dtype == torch.float64
    tolerance = {"rtol": 1e-14 if exact else 3e-7, "atol": 0}
    for loss, gradient in found[1:]:
        torch.testing.assert_close(loss, found[0][0], **tolerance)
        rtol = max(tolerance["rtol"], 2 * HALF_ULP.get(dtype, 0))
        atol = 2.0**-23 if dtype == torch.float16 else 1e-8  # fp16's smallest subnormal, twice
        torch.testing.assert_close(gradient, found[0][1], rtol=rtol, atol=atol)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_num_items_of_rows_that_are_none(requires_grad):
    """All rows ignored: 0 over 0 is NaN where it must have a derivative, and else no row counts."""
    z = torch.randn(2, 5).requires_grad_()
    items = torch.tensor(0.0, requires_grad=requires_grad)
    labels = torch.tensor([-100, -100])
    loss = distillation_loss(z, torch.randn(2, 5), labels, num_items=items)
    assert loss.isnan() if requires_grad else loss == 0


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize(("rows", "classes", "scale"), [(64, 10, 2), (128, 1000, 3), (8, 32000, 3)])
@pytest.mark.parametrize("with_labels", [False, True])
def test_accuracy_on_usual_sizes(rows, classes, scale, temperature, with_labels):
    z, t = pair(rows, classes, scale=scale)
    labels = torch.randint(classes, (rows,), generator=generator(3)) if with_labels else None
    want_loss, want_gradient = fp64(z, t, labels, temperature=temperature)
    loss, gradient = loss_and_gradient(distillation_loss, z, t, labels, temperature=temperature)
    torch.testing.assert_close(loss.double(), want_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient.double(), want_gradient, rtol=0, atol=1e-6)


@pytest.mark.parametrize("offset", [-1e4, 1e4])
@pytest.mark.parametrize("peak", [0.0, 60.0])
def test_large_and_peaked_logits(offset, peak):
    """The maximum is subtracted, and one dominant class does not swallow the sum of the others."""
    z, t = (v.round(decimals=1) for v in pair(3, 5000, scale=1.0))
    z, t = z + offset, t + offset
    z[:, 17] += peak
    t[:, 4321] += peak
    want_loss, want_gradient = fp64(z, t)
    loss, gradient = loss_and_gradient(distillation_loss, z, t)
    torch.testing.assert_close(loss.double(), want_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient.double(), want_gradient, rtol=0, atol=1e-6)


def test_equal_logits_have_no_divergence():
    z = logits(4, 1000)
    loss, gradient = loss_and_gradient(distillation_loss, z, z.clone(), temperature=2.0)
    assert abs(loss.item()) < 1e-6 and gradient.abs().max() < 1e-9


def test_more_than_2_to_the_31_elements():
    # One row, read again and again through stride 0.
    rows, classes = 2**20 + 1, 2048
    z, t = pair(classes)
    with torch.no_grad():
        loss = distillation_loss(z.expand(rows, classes), t.expand(rows, classes))
        torch.testing.assert_close(loss, distillation_loss(z, t), rtol=1e-6, atol=0)


@pytest.mark.parametrize("classes", [10, 100])
def test_rows_beyond_2_to_the_31_elements(classes):
    z, t = pair(2, classes, dtype=torch.bfloat16)
    apart = 2**31 + 64
    memory = torch.empty(apart + classes, dtype=z.dtype)  # of which what is used takes memory
    far = memory.as_strided(z.shape, (apart, 1)).copy_(z)
    with torch.no_grad():
        for a, b in ((far, t), (t, far)):
            near = (x if x is t else z for x in (a, b))
            assert torch.equal(distillation_loss(a, b), distillation_loss(*near))


@pytest.mark.parametrize("factor", [1.0, 65536.0])
def test_fp16_gradients_do_not_underflow(factor):
    """A mean over many rows makes gradients smaller than fp16 holds until GradScaler's factor."""
    z, t = pair(4096, 50, dtype=torch.float16, scale=1.0)
    labels = torch.randint(50, (4096,), generator=generator(3))
    grad_output = torch.tensor(factor)
    options = {"temperature": 2.0, "alpha": 0.5}
    _, want = fp64(z, t, labels, grad_output, **options)
    _, gradient = loss_and_gradient(distillation_loss, z, t, labels, grad_output, **options)
    # Subnormals where the factor is 1; where it is not, only what fp32 itself loses.
    atol = 2.0**-25 + 1e-6 * factor / 4096
    torch.testing.assert_close(gradient.double(), want, rtol=2 * HALF_ULP[z.dtype], atol=atol)
    assert gradient.count_nonzero() > 0.99 * gradient.numel() or factor == 1


def test_fp16_with_weights_of_either_sign():
    """They may sum to little, which makes each row's share large."""
    z, t = pair(4, 7, dtype=torch.float16)
    options = {"weight": torch.tensor([1.0, -0.99, 1.0, -1.0])}
    _, want = fp64(z, t, **options)
    _, gradient = loss_and_gradient(distillation_loss, z, t, **options)
    torch.testing.assert_close(gradient.double(), want, rtol=2 * HALF_ULP[z.dtype], atol=1e-4)


# ---- gradients ----------------------------------------------------------------------------------

GRADIENT_OPTIONS = [
    {},
    {"temperature": 2.0, "reduction": "sum"},
    {"temperature": 0.7, "reduction": "none"},
    {"labels": True, "temperature": 1.0},
    {"labels": True, "temperature": 3.0, "alpha": 0.3, "label_smoothing": 0.2},
    {"labels": True, "temperature": 3.0, "alpha": 0.0, "reduction": "none"},
    {"labels": True, "temperature": 2.0, "alpha": 1.0, "num_items": 5.0},
    {"labels": True, "weight": True, "temperature": 2.0},
    {"labels": True, "weight": True, "temperature": 2.0, "num_items": torch.tensor(3.0)},
    {"weight": True, "reduction": "none"},
]


def gradient_problem(options):
    options = dict(options)
    z, t = pair(4, 6, scale=1.5, dtype=torch.float64)
    labels = torch.tensor([1, -100, 5, 0]) if options.pop("labels", False) else None
    if options.pop("weight", False):
        options["weight"] = torch.tensor([0.5, 1.0, 2.0, 0.0])
    return (
        z.requires_grad_(),
        lambda x: distillation_loss(x, t, labels, **options),
        (lambda x: reference.distillation_loss(x, t, labels, **options)),
    )


@pytest.mark.parametrize("options", GRADIENT_OPTIONS)
def test_gradcheck(options):
    z, loss, _ = gradient_problem(options)
    assert torch.autograd.gradcheck(loss, z)
    assert torch.autograd.gradgradcheck(loss, z)


@pytest.mark.parametrize("options", GRADIENT_OPTIONS)
def test_higher_derivatives(options):
    z, loss, reference_loss = gradient_problem(options)

    def derivatives(fn):
        out, results = fn(z).sum(), []
        for _ in range(3):
            (out,) = torch.autograd.grad(out, z, create_graph=True)
            results.append(out.detach())
            out = (out**2).sum()
        return results

    for got, want in zip(derivatives(loss), derivatives(reference_loss), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_create_graph_in_fp32(reduction):
    """A gradient penalty, in the dtype that people train in."""
    z, t = pair(5, 40)
    z.requires_grad_()

    def penalty(fn, x, teacher):
        out = fn(x, teacher, temperature=2.0, reduction=reduction)
        (g,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        (gg,) = torch.autograd.grad((g**2).sum(), x)
        return gg

    got = penalty(distillation_loss, z, t)
    want = penalty(reference.distillation_loss, z.double(), t.double())
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-7)


def test_retain_graph():
    z, t = pair(5, 40)
    z.requires_grad_()
    loss = distillation_loss(z, t)
    (first,) = torch.autograd.grad(loss, z, retain_graph=True)
    kept = first.clone()
    (scaled,) = torch.autograd.grad(loss, z, torch.tensor(3.0), retain_graph=True)
    (second,) = torch.autograd.grad(loss, z, retain_graph=True)
    assert torch.equal(second, kept)
    torch.testing.assert_close(scaled, 3 * kept, rtol=1e-6, atol=0)
    # What an earlier call gave stays as it was when the last one reuses the graph's memory.
    (last,) = torch.autograd.grad(loss, z, torch.tensor(3.0))
    torch.testing.assert_close(last, 3 * kept, rtol=1e-6, atol=0)
    assert torch.equal(first, kept)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, z)


def test_gradients_accumulate():
    z, t = pair(5, 40)
    z.requires_grad_()
    _, once = loss_and_gradient(distillation_loss, z, t)
    loss = distillation_loss(z, t)
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(z.grad, 3 * once, rtol=1e-6, atol=0)
    # The logits in two losses at once.
    z.grad = None
    (distillation_loss(z, t) + 2 * distillation_loss(z, t)).backward()
    torch.testing.assert_close(z.grad, 3 * once, rtol=1e-6, atol=1e-9)


def test_who_requires_grad_gets_a_gradient():
    z, t = pair(5, 4)
    assert not distillation_loss(z, t).requires_grad
    t.requires_grad_()
    assert distillation_loss(z, t).requires_grad
    with torch.no_grad():
        assert not distillation_loss(z, t).requires_grad


# ---- in place -----------------------------------------------------------------------------------


def inplace_loss(z, t, labels=None, **options):
    leaf = z.detach().clone().requires_grad_()
    hidden = leaf * 1
    return leaf, hidden, distillation_loss(hidden, t, labels, inplace=True, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inplace_writes_the_gradient_over_the_logits(dtype):
    z, t = pair(6, 1500, dtype=dtype)
    _, want = loss_and_gradient(distillation_loss, z, t)
    leaf, hidden, loss = inplace_loss(z, t)
    seen = []
    hidden.register_hook(lambda g: seen.append((g.data_ptr(), g.clone())))
    loss.backward()
    assert seen[0][0] == hidden.data_ptr()
    assert torch.equal(seen[0][1], want) and torch.equal(leaf.grad, want)


def test_inplace_with_the_teacher_in_the_same_memory():
    z = logits(6, 1500)
    want, _ = loss_and_gradient(distillation_loss, z, z)
    leaf = z.clone().requires_grad_()
    hidden = leaf * 1
    loss = distillation_loss(hidden, hidden.detach(), inplace=True)
    assert torch.equal(loss.detach(), want)


def test_inplace_backward_runs_once():
    z, t = pair(6, 5)
    leaf, _, loss = inplace_loss(z, t)
    with pytest.raises(ValueError, match="inplace is True.*retain_graph"):
        (2 * loss).backward(retain_graph=True)
    leaf, _, loss = inplace_loss(z, t)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_inplace_has_no_second_derivative():
    leaf, _, loss = inplace_loss(*pair(6, 5))
    with pytest.raises(ValueError, match="inplace is True.*create_graph"):
        torch.autograd.grad(loss, leaf, create_graph=True)


def test_inplace_is_found_out_where_the_logits_are_needed():
    z, t = pair(6, 5)
    leaf = z.clone().requires_grad_()
    hidden = leaf * 1
    other = (hidden * hidden).sum()  # keeps the logits for its backward
    loss = distillation_loss(hidden, t, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + other).backward()


def test_inplace_without_a_gradient_to_make():
    z, t = pair(6, 5)
    before, version = z.clone(), z._version
    distillation_loss(z, t, inplace=True)
    with torch.no_grad():
        distillation_loss(z.requires_grad_(), t, inplace=True)
    assert torch.equal(z, before) and z._version == version


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("label", [-1, 7, 2**40])
def test_label_out_of_range_leaves_the_logits(inplace, label):
    z, t = pair(40, 7)
    labels = torch.zeros(40, dtype=torch.int64)
    labels[33] = label
    hidden = z.clone().requires_grad_() * 1
    version = hidden._version
    with pytest.raises(ValueError, match=rf"labels holds {label} at position 33.*\[0, 7\)"):
        distillation_loss(hidden, t, labels, inplace=inplace)
    assert torch.equal(hidden, z) and hidden._version == version


# ---- rows that are left out, and logits that are not finite -------------------------------------


def test_all_rows_ignored():
    z, t = pair(5, 8)
    labels = torch.full((5,), -100)
    for reduction in ("mean", "sum", "none"):
        for num_items in (None, 4) if reduction == "mean" else (None,):
            options = {"reduction": reduction, "num_items": num_items}
            grad_output = torch.ones(5) if reduction == "none" else None
            loss, gradient = loss_and_gradient(
                distillation_loss, z, t, labels, grad_output, **options
            )
            assert not loss.any() and not gradient.any()
    assert distillation_loss(z, t, weight=torch.zeros(5)) == 0


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_rows_left_out_are_not_read(alpha, inplace):
    z, t = pair(6, 1030)
    labels = torch.randint(1030, (6,), generator=generator(0))
    weight = torch.ones(6)
    labels[1], weight[3] = -100, 0
    left = [0, 2, 4, 5]
    want_loss, want_gradient = loss_and_gradient(
        distillation_loss, z[left], t[left], labels[left], alpha=alpha
    )
    z[1], t[3], z[3, 5] = NAN, INF, -INF
    leaf = z.clone().requires_grad_()
    hidden = leaf * 1
    loss = distillation_loss(hidden, t, labels, alpha=alpha, weight=weight, inplace=inplace)
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert torch.equal(loss.detach(), want_loss)
    assert torch.equal(gradient[left], want_gradient)
    assert not gradient[[1, 3]].any()


def test_alpha_0_does_not_read_the_teacher():
    z, t = pair(4, 9)
    labels = torch.tensor([0, 3, 8, 2])
    loss, gradient = loss_and_gradient(
        distillation_loss, z, torch.full_like(t, NAN), labels, alpha=0.0, temperature=3.0
    )
    torch.testing.assert_close(loss, F.cross_entropy(z, labels))
    assert gradient.isfinite().all()


def test_alpha_1_reads_only_ignored_rows_from_labels():
    z, t = pair(4, 9)
    labels = torch.tensor([0, -100, 8, 2])
    loss = distillation_loss(z, t, labels, alpha=1.0)
    left = [0, 2, 3]
    torch.testing.assert_close(loss, distillation_loss(z[left], t[left]))


@pytest.mark.parametrize("bad", [NAN, INF, "all -inf"])
@pytest.mark.parametrize("which", ["student", "teacher"])
@pytest.mark.parametrize("classes", [5, 2500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_bad_row_leaves_other_rows_alone(bad, which, classes, dtype):
    z, t = pair(3, classes, dtype=dtype)
    ones = torch.ones(3)
    want_loss, want_gradient = loss_and_gradient(
        distillation_loss, z, t, None, ones, reduction="none"
    )
    row = (z if which == "student" else t)[1]
    if bad == "all -inf":
        row.fill_(-INF)
    else:
        row[classes - 2] = bad
    loss, gradient = loss_and_gradient(distillation_loss, z, t, None, ones, reduction="none")
    assert loss[1].isnan() and gradient[1].isnan().all()
    assert torch.equal(loss[[0, 2]], want_loss[[0, 2]])
    assert torch.equal(gradient[[0, 2]], want_gradient[[0, 2]])


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("with_labels", [False, True])
@pytest.mark.parametrize("classes", [6, 3000])
def test_classes_without_probability(classes, with_labels, temperature):
    """-inf in both rows takes a class away; in the teacher's alone it is a target of 0."""
    z, t = pair(3, classes)
    labels = torch.tensor([0, 1, 2]) if with_labels else None
    z[:, 4] = t[:, 4] = -INF
    t[1, 3] = -INF
    kept = [i for i in range(classes) if i != 4]
    want_loss, want_gradient = fp64(z[:, kept], t[:, kept], labels, temperature=temperature)
    loss, gradient = loss_and_gradient(distillation_loss, z, t, labels, temperature=temperature)
    torch.testing.assert_close(loss.double(), want_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient[:, kept].double(), want_gradient, rtol=0, atol=1e-6)
    assert not gradient[:, 4].any()


@pytest.mark.parametrize("classes", [6, 3000])
def test_class_that_only_the_student_excludes(classes):
    z, t = pair(3, classes)
    z[1, 2] = -INF
    with torch.no_grad():
        loss = distillation_loss(z, t, reduction="none")
    assert loss[1] == INF and loss[[0, 2]].isfinite().all()


def test_leading_block_without_probability():
    """The first 1,024 classes -inf: sums start from nothing."""
    z, t = pair(3, 2500)
    z[:, :1024] = t[:, :1024] = -INF
    want, _ = fp64(z[:, 1024:], t[:, 1024:])
    loss, gradient = loss_and_gradient(distillation_loss, z, t)
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
    assert gradient.isfinite().all() and not gradient[:, :1024].any()


@pytest.mark.parametrize("level", [0.0, -300.0])
def test_classes_that_a_row_is_guessed_from_have_no_probability(level):
    """A few classes of a row tell where its largest logits may be: here they are excluded, by the
    teacher or by both, and the others are far from 0.
    """
    classes = 1000
    z, t = pair(3, classes)
    looks = torch.zeros(classes, dtype=torch.bool)
    for first in (0, 326, 654, 982):
        looks[first : first + 18] = True
    t[:2, looks] = -INF
    z[0, looks] = -INF
    z[0] += level
    t += level
    x = z.double().requires_grad_()
    want = reference.distillation_loss(x, t.double(), reduction="none")
    (right,) = torch.autograd.grad(want.sum(), x)
    z.requires_grad_()
    loss = distillation_loss(z, t, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.double(), right, rtol=0, atol=1e-6)


# ---- the same bits ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(300, 1000), (3, 50000), (5000, 10)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_threads_gives_the_same_bits(shape, dtype, set_threads):
    z, t = pair(*shape, dtype=dtype)
    labels = torch.randint(shape[1], shape[:1], generator=generator(0))
    results = []
    for threads in (1, 2, 3, 7):
        set_threads(threads)
        results.append(loss_and_gradient(distillation_loss, z, t, labels, temperature=2.0))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7, 10), (5, 1000), (3, 5003)])
def test_every_isa_level_agrees(shape, dtype, set_isa, isa_levels):
    z, t = pair(*shape, dtype=dtype)
    labels = torch.randint(shape[1], shape[:1], generator=generator(0))
    options = {"temperature": 2.0, "label_smoothing": 0.1}
    want_loss, want_gradient = fp64(z, t, labels, **options)
    for level in isa_levels:
        set_isa(level)
        loss, gradient = loss_and_gradient(distillation_loss, z, t, labels, **options)
        torch.testing.assert_close(loss.double(), want_loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(
            gradient.double(), want_gradient, rtol=HALF_ULP.get(dtype, 0.0), atol=1e-6
        )


def test_any_layout_gives_the_same_bits():
    z, t = pair(2, 3, 1500)
    want = distillation_loss(z, t, temperature=2.0)
    for layout in ("sliced", "transposed", "stepped"):
        views = [view(base) for base, view in (laid_out(v, layout) for v in (z, t))]
        assert torch.equal(distillation_loss(*views, temperature=2.0), want)


# ---- the module, and the other backend ----------------------------------------------------------


def test_module():
    z, t = pair(4, 9)
    labels = torch.tensor([0, 3, 8, 2])
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0])
    options = {"temperature": 2.0, "alpha": 0.3, "label_smoothing": 0.1, "reduction": "mean"}
    module = DistillationLoss(**options)
    assert torch.equal(
        module(z, t, labels, weight=weight, num_items=3),
        distillation_loss(z, t, labels, weight=weight, num_items=3, **options),
    )
    assert torch.equal(DistillationLoss()(z, t), distillation_loss(z, t))
    assert not list(module.parameters()) and not module.state_dict()
    assert "temperature=2.0" in repr(module)
    assert set(DistillationLoss(inplace=True, backend="fused").options) == {"inplace", "backend"}


@pytest.mark.parametrize("name", ["temprature", "weight", "labels"])
def test_module_takes_no_other_option(name):
    with pytest.raises(TypeError, match=name):
        DistillationLoss(**{name: 1})


@settings(max_examples=examples(50))
@given(problems([torch.float32, torch.float64]))
def test_reference_backend(problem):
    student = problem.student.requires_grad_()
    fused, plain = (
        loss_and_gradient(
            distillation_loss,
            student,
            problem.teacher,
            problem.labels,
            problem.grad_output,
            backend=backend,
            **problem.options,
        )
        for backend in ("fused", "reference")
    )
    tolerance = 1e-10 if student.dtype == torch.float64 else 1e-4
    for got, want in zip(fused, plain, strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


# ---- bad input ----------------------------------------------------------------------------------

Z, T = torch.zeros(4, 7), torch.ones(4, 7)
Y, W = torch.zeros(4, dtype=torch.int64), torch.ones(4)
COLUMNS = torch.zeros(7, 4)


def non_leaf(x):
    return x.clone().requires_grad_() * 1


BAD = [
    ("student_logits", TypeError, lambda: distillation_loss(Z.int(), T.int())),
    ("student_logits", TypeError, lambda: distillation_loss(Z.cfloat(), T.cfloat())),
    ("student_logits", ValueError, lambda: distillation_loss(Z[0, 0], T[0, 0])),
    ("student_logits", ValueError, lambda: distillation_loss(Z[:, :0], T[:, :0])),
    ("student_logits", ValueError, lambda: distillation_loss(Z.to_sparse(), T)),
    ("student_logits", TypeError, lambda: distillation_loss([[0.0, 1.0]], T)),
    ("student_logits", TypeError, lambda: distillation_loss(None, T)),
    ("teacher_logits", TypeError, lambda: distillation_loss(Z, T.double())),
    ("teacher_logits", TypeError, lambda: distillation_loss(Z, T.bfloat16())),
    ("teacher_logits", TypeError, lambda: distillation_loss(Z, None)),
    ("teacher_logits", ValueError, lambda: distillation_loss(Z, T[:, :6])),
    ("teacher_logits", ValueError, lambda: distillation_loss(Z, T[:1])),
    ("teacher_logits", ValueError, lambda: distillation_loss(Z, T[0])),
    ("teacher_logits", ValueError, lambda: distillation_loss(Z, T.to("meta"))),
    ("teacher_logits", TypeError, lambda: distillation_loss(Z, [T, 1.0])),
    ("teacher_logits", ValueError, lambda: distillation_loss(Z, [])),
    ("labels", TypeError, lambda: distillation_loss(Z, T, Y.int())),
    ("labels", TypeError, lambda: distillation_loss(Z, T, Y.float())),
    ("labels", TypeError, lambda: distillation_loss(Z, T, [0, 0, 0, 0])),
    ("labels", ValueError, lambda: distillation_loss(Z, T, Y[:3])),
    ("labels", ValueError, lambda: distillation_loss(Z, T, Y[:, None])),
    ("labels", ValueError, lambda: distillation_loss(Z, T, Y + 7)),
    ("labels", ValueError, lambda: distillation_loss(Z, T, Y - 1)),
    ("labels", ValueError, lambda: distillation_loss(Z, T, Y - 1, alpha=1.0)),
    ("labels", ValueError, lambda: distillation_loss(Z, T, Y.to("meta"))),
    ("weight", TypeError, lambda: distillation_loss(Z, T, weight=W.cfloat())),
    ("weight", ValueError, lambda: distillation_loss(Z, T, weight=W[:3])),
    ("weight", ValueError, lambda: distillation_loss(Z, T, weight=W.to("meta"))),
    ("weight", ValueError, lambda: distillation_loss(Z, T, weight=W.clone().requires_grad_())),
    *(
        ("temperature", ValueError, lambda v=v: distillation_loss(Z, T, temperature=v))
        for v in (0, -1.0, NAN, INF)
    ),
    ("temperature", TypeError, lambda: distillation_loss(Z, T, temperature="2")),
    *(
        ("alpha", ValueError, lambda v=v: distillation_loss(Z, T, Y, alpha=v))
        for v in (-0.1, 1.1, NAN)
    ),
    *(("alpha", ValueError, lambda v=v: distillation_loss(Z, T, alpha=v)) for v in (0.0, 0.5, 2.0)),
    *(
        ("label_smoothing", ValueError, lambda v=v: distillation_loss(Z, T, Y, label_smoothing=v))
        for v in (-0.1, 1.1, NAN)
    ),
    *(
        ("num_items", ValueError, lambda v=v: distillation_loss(Z, T, num_items=v))
        for v in (0, -1.0, NAN, INF)
    ),
    *(
        (
            "num_items",
            ValueError,
            lambda v=v, r=r: distillation_loss(Z, T, num_items=v, reduction=r),
        )
        for v in (3, torch.tensor(3.0))
        for r in ("sum", "none")
    ),
    ("reduction", ValueError, lambda: distillation_loss(Z, T, reduction="average")),
    ("divergence", ValueError, lambda: distillation_loss(Z, T, divergence="kl")),
    ("backend", ValueError, lambda: distillation_loss(Z, T, backend="cuda")),
    ("inplace", ValueError, lambda: distillation_loss(Z.clone().requires_grad_(), T, inplace=True)),
    ("inplace", ValueError, lambda: distillation_loss(non_leaf(COLUMNS).t(), T, inplace=True)),
    (
        "inplace",
        ValueError,
        lambda: distillation_loss(non_leaf(Z[0]).expand(4, 7), T, inplace=True),
    ),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_argument_is_named(case):
    name, error, call = BAD[case]
    with pytest.raises(error, match=rf"\b{name}\b") as raised:
        call()
    assert type(raised.value) is error


# ---- CUDA ---------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(0, 5), (5, 1), (64, 10), (33, 1000), (2, 3, 1025), (3, 50257)])
@pytest.mark.parametrize("inplace", [False, True])
def test_cuda_against_fp64(shape, dtype, inplace):
    z, t = pair(*shape, dtype=dtype)
    labels = torch.randint(shape[-1], shape[:-1], generator=generator(0))
    labels[torch.rand(shape[:-1], generator=generator(1)) < 0.2] = -100
    for options in (
        {"temperature": 2.0},
        {"temperature": 2.0, "labels": labels, "label_smoothing": 0.1, "alpha": 0.3},
        {"labels": labels, "weight": torch.rand(shape[:-1], generator=generator(2))},
        {"labels": labels, "reduction": "sum"},
    ):
        options = dict(options)
        y = options.pop("labels", None)
        want_loss, want_gradient = fp64(z, t, y, **options)
        options = {k: v.cuda() if torch.is_tensor(v) else v for k, v in options.items()}
        leaf = z.cuda().requires_grad_()
        y = None if y is None else y.cuda()
        loss = distillation_loss(leaf * 1, t.cuda(), y, inplace=inplace, **options)
        loss.backward()
        torch.testing.assert_close(loss.cpu().double(), want_loss, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(
            leaf.grad.cpu().double(),
            want_gradient,
            rtol=HALF_ULP.get(dtype, 0.0),
            atol=4e-6 if options.get("reduction") == "sum" else 1e-6,
        )


@pytest.mark.gpu
def test_cuda_scales_and_repeats():
    z, t = (v.cuda() for v in pair(40, 3000))
    z.requires_grad_()
    loss = distillation_loss(z, t)
    (first,) = torch.autograd.grad(loss, z, retain_graph=True)
    kept = first.clone()
    (scaled,) = torch.autograd.grad(loss, z, torch.tensor(3.0, device="cuda"))
    torch.testing.assert_close(scaled, 3 * kept, rtol=1e-6, atol=0)
    assert torch.equal(first, kept)
    again = distillation_loss(z, t)
    assert torch.equal(again, loss)
    assert torch.equal(torch.autograd.grad(again, z)[0], kept)


@pytest.mark.gpu
def test_cuda_label_out_of_range():
    z, t = pair(4, 7)
    labels = torch.tensor([0, 7, -1, 6])
    for inplace in (False, True):
        leaf = z.cuda().requires_grad_()
        loss = distillation_loss(
            leaf * 1, t.cuda(), labels.cuda(), reduction="none", inplace=inplace
        )
        loss[[0, 3]].sum().backward()
        assert loss.isnan().tolist() == [False, True, True, False]
        assert not leaf.grad[[1, 2]].any() and leaf.grad[[0, 3]].all()


@pytest.mark.gpu
def test_cuda_bad_rows_and_layouts():
    z, t = pair(4, 2500)
    z[1, 3], t[2] = NAN, -INF
    want = distillation_loss(z, t, reduction="none")
    for layout in LAYOUTS:
        views = [view(base) for base, view in (laid_out(v.cuda(), layout) for v in (z, t))]
        got = distillation_loss(*views, reduction="none").cpu()
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7, equal_nan=True)


@pytest.mark.gpu
def test_cuda_second_derivative():
    z, t = (v.cuda() for v in pair(3, 5, dtype=torch.float64))
    labels = torch.tensor([0, -100, 4], device="cuda")
    z.requires_grad_()

    def loss(x):
        return kdkernels.distillation_loss(x, t, labels, temperature=2.0)

    assert torch.autograd.gradcheck(loss, z) and torch.autograd.gradgradcheck(loss, z)


@pytest.mark.gpu
def test_cuda_devices_must_agree():
    with pytest.raises(ValueError, match="teacher_logits"):
        distillation_loss(Z.cuda(), T)
    with pytest.raises(ValueError, match="labels"):
        distillation_loss(Z.cuda(), T.cuda(), Y)


@pytest.mark.gpu
def test_cuda_in_a_graph(cached_memory):
    """Capture allows no launch on another stream and no wait for the device."""
    z, t = (v.cuda() for v in pair(6, 700))
    z.requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        loss_and_gradient(distillation_loss, z, t)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = distillation_loss(z, t)
        (gradient,) = torch.autograd.grad(loss, z)
    for seed in (7, 8):
        with torch.no_grad():
            z.copy_(logits(6, 700, seed=seed))
        graph.replay()
        want_loss, want_gradient = loss_and_gradient(distillation_loss, z, t)
        assert torch.equal(loss, want_loss) and torch.equal(gradient, want_gradient)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_cuda_on_another_device_than_the_current_one():
    z, t = pair(3, 900)
    want = loss_and_gradient(distillation_loss, z, t)
    got = loss_and_gradient(distillation_loss, z.to("cuda:1"), t.to("cuda:1"))
    assert all(value.device.index == 1 for value in got)
    for value, right in zip(got, want, strict=True):
        torch.testing.assert_close(value.cpu(), right, rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
def test_cuda_beyond_2_to_the_31_elements(cached_memory):
    rows, classes = 2**15 + 3, 2**16
    if torch.cuda.mem_get_info()[0] < 20e9:
        pytest.skip("needs 20 GB of GPU memory")
    z, t = (torch.randn(rows, classes, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    ones = torch.ones(rows, device="cuda")
    loss, gradient = loss_and_gradient(distillation_loss, z, t, None, ones, reduction="none")
    last = loss_and_gradient(distillation_loss, z[-3:], t[-3:], None, ones[-3:], reduction="none")
    assert torch.equal(loss[-3:], last[0]) and torch.equal(gradient[-3:], last[1])


def test_inplace_refuses_a_teacher_that_overlaps_by_other_rows():
    leaf = torch.randn(6, 10, requires_grad=True)
    hidden = leaf * 1
    with pytest.raises(ValueError, match="teacher_logits overlaps student_logits"):
        distillation_loss(hidden[:-1], hidden.detach()[1:], inplace=True)
    assert torch.equal(hidden, leaf)
