"""linear_distillation_loss: numbers whatever the chunks, place in PyTorch, bad input."""

import functools
import math

import pytest
import torch
import torch.distributed as dist
from test_parallel import spawn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kdkernels import (
    distillation_loss,
    divergences,
    linear_distillation_loss,
    reference,
    topk_distillation_loss,
)
from kdkernels.distill.calls import packed

pytestmark = pytest.mark.quick

NAN = math.nan
HALF_ULP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # relative
ROWS, CLASSES, WIDTH, TEACHER_WIDTH = 11, 37, 8, 5


def randn(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def student(rows=(ROWS,), classes=CLASSES, width=WIDTH, dtype=torch.float64):
    """Hidden states, weight, bias."""
    return (
        randn(*rows, width, seed=1, dtype=dtype),
        randn(classes, width, seed=2, dtype=dtype),
        randn(classes, seed=3, dtype=dtype),
    )


def labels_of(rows=(ROWS,), classes=CLASSES):
    labels = torch.randint(classes, rows, generator=torch.Generator().manual_seed(4))
    labels.view(-1)[2::5] = -100
    return labels


def weights_of(rows=(ROWS,)):
    weight = 2 * randn(*rows, seed=5).abs()
    weight.view(-1)[1::4] = 0
    return weight


def teacher(form, rows=(ROWS,), classes=CLASSES, dtype=torch.float64, temperature=2.0):
    """Arguments of one form of teacher."""
    hidden = randn(*rows, TEACHER_WIDTH, seed=6, dtype=dtype)
    head = randn(classes, TEACHER_WIDTH, seed=7, dtype=dtype)
    logits = hidden @ head.T
    if form == "hidden":
        return {"teacher_hidden": hidden, "teacher_weight": head}
    if form == "bias":
        bias = randn(classes, seed=8, dtype=dtype)
        return {"teacher_hidden": hidden, "teacher_weight": head, "teacher_bias": bias}
    if form == "logits":
        return {"teacher_logits": logits}
    if form == "list":
        return {"teacher_logits": [logits, -logits, logits / 2], "teacher_weights": [1.0, 0.0, 3.0]}
    if form == "stack":
        several = torch.stack([logits, logits.flip(-1) / 2])
        return {"teacher_logits": several, "teacher_mixture": "log_probs"}
    if form == "probs":
        return {"teacher_logits": logits.softmax(-1), "teacher_kind": "probs"}
    values, indices = logits.topk(6, -1)
    indices[..., 4] = -1
    out = {"teacher_values": values, "teacher_indices": indices.int(), "tail": form}
    if form != "renormalize":
        out["teacher_logsumexp"] = (logits / temperature).logsumexp(-1)
    return out


FORMS = ["hidden", "bias", "logits", "list", "stack", "probs", "renormalize", "bucket", "ignore"]


def leaves(tensors):
    return [x.detach().clone().requires_grad_() for x in tensors]


def results(loss_fn, tensors, grad_output=None, **options):
    """Loss, statistics, gradients of hidden states, weight and bias."""
    h, w, b = leaves(tensors)
    loss, statistics = loss_fn(h, w, student_bias=b, return_statistics=True, **options)
    if grad_output is None and loss.dim():
        grad_output = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
    gradients = torch.autograd.grad(loss, (h, w, b), grad_output)
    return loss.detach(), torch.stack(statistics), *gradients


def assert_all_close(got, want, **tolerance):
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        torch.testing.assert_close(a.to(b.dtype), b, **tolerance, msg=lambda m, i=i: f"{i}: {m}")


def exact(tensors, **options):
    options = {
        name: [x.double() for x in value]
        if isinstance(value, list) and name == "teacher_logits"
        else value.double()
        if torch.is_tensor(value) and value.is_floating_point()
        else value
        for name, value in options.items()
    }
    return results(reference.linear_distillation_loss, [x.double() for x in tensors], **options)


# ---- numbers ------------------------------------------------------------------------------------

ROW_BYTES = 2 * CLASSES * 8  # of both sides' logits in fp64
BUDGETS = [None, 1, ROW_BYTES, 3 * ROW_BYTES, 4 * ROW_BYTES]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "items"])
@pytest.mark.parametrize("rows_have", ["nothing", "labels", "weight", "both"])
@pytest.mark.parametrize("form", FORMS)
def test_any_teacher_rows_and_reduction(form, rows_have, reduction):
    options = teacher(form) | {"temperature": 2.0, "logit_scale": 0.7, "soft_cap": 5.0}
    if rows_have in ("labels", "both"):
        options |= {"labels": labels_of(), "alpha": 0.3, "label_smoothing": 0.1}
    if rows_have in ("weight", "both"):
        options["weight"] = weights_of()
    options["reduction"] = "mean" if reduction == "items" else reduction
    if reduction == "items":
        options["num_items"] = 7.5
    want = exact(student(), **options)
    for budget in BUDGETS:
        got = results(linear_distillation_loss, student(), **options, memory_budget=budget)
        assert_all_close(got, want, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("divergence", list(divergences()))
def test_any_divergence(divergence, standardize):
    options = teacher("bias") | {"divergence": divergence, "labels": labels_of()}
    options |= {"standardize": standardize, "temperature": 1.5, "teacher_soft_cap": 4.0}
    want = exact(student(), **options)
    got = results(linear_distillation_loss, student(), **options, memory_budget=2 * ROW_BYTES)
    assert_all_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", ["hidden", "list", "bucket"])
@pytest.mark.parametrize("rows", [(), (1,), (0,), (2, 0), (2, 3), (3, 1, 2)])
def test_leading_shapes(rows, form):
    options = teacher(form, rows) | {"labels": labels_of(rows), "temperature": 2.0}
    for reduction in ("mean", "none"):
        want = exact(student(rows), **options, reduction=reduction)
        got = results(
            linear_distillation_loss, student(rows), **options, reduction=reduction, memory_budget=1
        )
        assert_all_close(got, want, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("classes", [1, 2, 2047, 2048, 2049, 4100])
def test_blocks_of_classes(classes):
    h, w, b = student(classes=classes)
    options = teacher("bias", classes=classes)
    want = exact((h, w, b), **options)
    got = results(linear_distillation_loss, (h, w, b), **options, memory_budget=5 * 16 * classes)
    assert_all_close(got, want, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("form", ["hidden", "logits"])
def test_tensors_of_any_strides(form):
    h, w, b = student()
    options = teacher(form)
    want = exact((h, w, b), **options)
    odd = [x.T.contiguous().T for x in (h, w)] + [torch.stack((b, b), 1)[:, 0]]
    strided = {name: x.T.contiguous().T for name, x in options.items()}
    got = results(linear_distillation_loss, odd, **strided, memory_budget=3 * ROW_BYTES)
    assert_all_close(got, want, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("form", ["hidden", "logits", "stack", "bucket"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype, form):
    rows, classes, width = (40,), 700, 64
    h, w, b = student(rows, classes, width)
    tensors = [x.to(dtype) for x in (h, w / 8, b)]
    options = teacher(form, rows, classes, dtype) | {"labels": labels_of(rows, classes)}
    options |= {"weight": weights_of(rows), "temperature": 2.0}
    unit = HALF_ULP.get(dtype, 2.0**-22)
    for reduction in ("mean", "none"):
        want = exact(tensors, **options, reduction=reduction)
        got = results(
            linear_distillation_loss, tensors, **options, reduction=reduction, memory_budget=50_000
        )
        acc = torch.float32
        assert [x.dtype for x in got] == [acc, acc, dtype, dtype, dtype]
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            # The logits' gradients are rounded, and what they are summed up to once more.
            atol = max(2 * unit if i >= 2 else 0, 2e-6) * b.abs().max().item()
            torch.testing.assert_close(a.double(), b, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("std", [1, 3, 10])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "js"])
def test_logits_of_16_bits_are_not_rounded(divergence, std, dtype):
    """Where student and teacher are close, 16 bits of a logit are most of their difference."""
    rows, classes, width = 32, 1500, 64
    h, w = randn(rows, width, seed=1), randn(classes, width, seed=2) * std / width**0.5
    th = h + 0.05 * randn(rows, width, seed=3)
    tw = w * (1 + 0.02 * randn(classes, width, seed=4))
    tensors = [x.to(dtype) for x in (h, w, th, tw)]

    def run(h, w, th, tw):
        h, w = leaves((h, w))
        loss = linear_distillation_loss(h, w, th, tw, divergence=divergence)
        loss = 2.0**12 * loss  # gradients of fp16 would be subnormal
        return loss.detach(), *torch.autograd.grad(loss, (h, w))

    want = run(*(x.double() for x in tensors))
    got = run(*tensors)
    assert abs(got[0] / want[0] - 1) < 1e-5
    for a, b in zip(got[1:], want[1:], strict=True):
        assert ((a.double() - b).norm() / b.norm()).item() < 3e-3


def test_unequal_vocabularies():
    """A draft's classes are some of the teacher's; those that a teacher lacks do not occur."""
    h, w, b = student()
    options = teacher("hidden", classes=60)
    chosen = torch.randperm(60, generator=torch.Generator().manual_seed(1))[:CLASSES]
    z, t = F.linear(h, w, b), options["teacher_hidden"] @ options["teacher_weight"].T
    options["teacher_weight"] = options["teacher_weight"][chosen]
    loss = linear_distillation_loss(h, w, student_bias=b, **options)
    torch.testing.assert_close(loss, distillation_loss(z, t[:, chosen]))
    narrow = F.pad(options["teacher_weight"][:30], (0, 0, 0, CLASSES - 30))
    bias = F.pad(torch.zeros(30, dtype=h.dtype), (0, CLASSES - 30), value=-math.inf)
    options |= {"teacher_weight": narrow, "teacher_bias": bias}
    loss = linear_distillation_loss(h, w, student_bias=b, **options)
    t = F.pad(t[:, chosen[:30]], (0, CLASSES - 30), value=-math.inf)
    torch.testing.assert_close(loss, distillation_loss(z, t))


# ---- labels alone -------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("alpha", [None, 0.0])
def test_labels_alone_are_cross_entropy(alpha, reduction):
    """Without a teacher, and with one that has no share and is not read."""
    h, w, b = leaves(student())
    labels = labels_of()
    z = 2 * F.linear(h, w, b)
    want = F.cross_entropy(z, labels, reduction=reduction, label_smoothing=0.1)
    factor = torch.linspace(-1, 2, want.numel(), dtype=want.dtype).reshape(want.shape)
    of_want = torch.autograd.grad(want, (h, w, b), factor)
    options = {"alpha": alpha, "reduction": reduction, "label_smoothing": 0.1, "logit_scale": 2.0}
    if alpha is not None:
        options |= teacher("hidden") | {"divergence": "js"}
        options["teacher_hidden"] = options["teacher_hidden"] * NAN
    for backend in ("fused", "reference"):
        for budget in (None, 2 * ROW_BYTES):
            options |= {"backend": backend, "memory_budget": budget}
            loss = linear_distillation_loss(h, w, labels=labels, student_bias=b, **options)
            got = torch.autograd.grad(loss, (h, w, b), factor)
            assert_all_close((loss, *got), (want, *of_want), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("std", [1, 10])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_labels_alone_are_as_exact_as_pytorch_with_fp32_logits(dtype, std):
    rows, classes, width = 48, 1500, 64
    h, w = randn(rows, width, seed=1), randn(classes, width, seed=2) * std / width**0.5
    tensors, labels = [x.to(dtype) for x in (h, w)], labels_of((rows,), classes)

    def run(loss, tensors):
        h, w = leaves(tensors)
        value = 2.0**12 * loss(h, w)  # gradients of fp16 would be subnormal
        return value.detach(), *torch.autograd.grad(value, (h, w))

    def fp32(h, w):
        return F.cross_entropy(F.linear(h.float(), w.float()), labels)

    def fused(h, w):
        return linear_distillation_loss(h, w, labels=labels)

    want = run(lambda h, w: F.cross_entropy(h @ w.T, labels), [x.double() for x in tensors])
    got, plain = run(fused, tensors), run(fp32, tensors)
    assert abs(got[0] / want[0] - 1) < 1e-6
    for a, b, c in zip(got[1:], want[1:], plain[1:], strict=True):
        error, of_plain = (((x.double() - b).norm() / b.norm()).item() for x in (a, c))
        assert error < max(1.5 * of_plain, 3e-3)


@pytest.mark.filterwarnings("ignore:TF32")
@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_large_products(bias, onednn):
    """By MKL and by oneDNN."""
    rows, classes, width = (600,), 2300, 128
    h, w, b = student(rows, classes, width, torch.float32)
    options = teacher("bias" if bias else "hidden", rows, classes, torch.float32)
    options |= {"labels": labels_of(rows, classes), "temperature": 2.0}
    tensors = (h, w / 8, b if bias else 0 * b)
    want = exact(tensors, **options)
    for budget in (None, 400 * 8 * classes):
        with torch.backends.mkldnn.flags(enabled=onednn):
            got = results(linear_distillation_loss, tensors, **options, memory_budget=budget)
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x.double(), y, rtol=0, atol=2e-6 * y.abs().max().item())


def test_any_dtype_of_given_logits():
    h, w, b = (x.float() for x in student())
    logits = teacher("logits")["teacher_logits"].bfloat16()
    want = results(linear_distillation_loss, (h, w, b), teacher_logits=logits.float())
    got = results(linear_distillation_loss, (h, w, b), teacher_logits=logits)
    assert_all_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("form", ["hidden", "logits", "ignore"])
def test_is_the_loss_of_the_logits(form):
    tensors = [x.float() for x in student()]
    options = teacher(form, dtype=torch.float32)
    shared = {"labels": labels_of(), "weight": weights_of(), "temperature": 2.0, "alpha": 0.6}

    def unfused(h, w, *, student_bias, return_statistics, **shared):
        z = F.linear(h, w, student_bias)
        given = dict(options)
        if form == "hidden":
            given = {"teacher_logits": options["teacher_hidden"] @ options["teacher_weight"].T}
        loss_fn = topk_distillation_loss if form == "ignore" else distillation_loss
        return loss_fn(z, **given, **shared, return_statistics=return_statistics)

    for reduction in ("mean", "sum", "none"):
        want = results(unfused, tensors, **shared, reduction=reduction)
        got = results(linear_distillation_loss, tensors, **options, **shared, reduction=reduction)
        assert_all_close(got, want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("form", ["hidden", "logits", "list", "renormalize"])
def test_rows_left_out_may_hold_anything(form, reduction):
    options = teacher(form) | {"labels": labels_of(), "weight": weights_of(), "temperature": 2.0}
    options["reduction"] = reduction
    out = (options["labels"] == -100) | (options["weight"] == 0)
    h, w, b = student()
    want = results(linear_distillation_loss, (h, w, b), **options)
    spoilt = {
        name: [spoil(x, out) for x in value]
        if name == "teacher_logits" and form == "list"
        else spoil(value, out)
        if name in ("teacher_hidden", "teacher_logits", "teacher_values")
        else value
        for name, value in options.items()
    }
    for budget in (None, 2 * ROW_BYTES):
        got = results(
            linear_distillation_loss, (spoil(h, out), w, b), **spoilt, memory_budget=budget
        )
        assert_all_close(got, want, rtol=1e-12, atol=1e-15)
        assert (got[2][out] == 0).all() and (got[1][:, out] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("form", ["hidden", "logits", "stack", "bucket"])
def test_a_bound_of_the_rows_that_count(form, reduction, dtype):
    """On CUDA they are packed to the front, and no others are multiplied beyond the bound."""
    tensors = [x.to(dtype) for x in student()]
    options = teacher(form, dtype=dtype) | {"labels": labels_of(), "temperature": 2.0}
    options |= {"weight": weights_of().to(dtype), "reduction": reduction}
    count = ((options["labels"] != -100) & (options["weight"] != 0)).sum().item()
    want = results(linear_distillation_loss, tensors, **options)
    for bound in (count, count + 1, 10 * ROWS):
        for budget in (None, 2 * ROW_BYTES):
            got = results(
                linear_distillation_loss, tensors, **options, max_rows=bound, memory_budget=budget
            )
            wide = dtype == torch.float64
            rtol, atol = (1e-12, 1e-15) if wide else (1e-2, 1e-2)
            assert_all_close(got, want, rtol=rtol, atol=atol)


def test_more_rows_count_than_their_bound():
    h, w, b = student()
    options = teacher("hidden") | {"labels": labels_of(), "max_rows": 3}
    try:
        loss, _, *gradients = results(linear_distillation_loss, (h, w, b), **options)
    except ValueError as error:
        assert "max_rows is 3, but 9 rows count" in str(error)
    else:  # CUDA does not wait for the device to say so
        assert loss.isnan() and gradients[1].isnan().all()


def spoil(x, rows):
    return x.masked_fill(rows[:, None], NAN)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_row_is_left(reduction):
    tensors, options = student(), teacher("hidden") | {"labels": torch.full((ROWS,), -100)}
    got = results(linear_distillation_loss, tensors, **options, reduction=reduction)
    assert all((x == 0).all() for x in got)


def test_a_row_of_nan_spoils_its_own_gradient_only():
    h, w, b = student()
    h[3] = NAN
    options = teacher("hidden") | {"reduction": "none"}
    loss, _, grad_hidden, grad_weight, _ = results(
        linear_distillation_loss, (h, w, b), **options, memory_budget=3 * ROW_BYTES
    )
    others = torch.arange(ROWS) != 3
    assert loss.isnan().tolist() == grad_hidden.isnan().all(-1).tolist() == (~others).tolist()
    assert loss[others].isfinite().all() and grad_hidden[others].isfinite().all()
    assert grad_weight.isnan().all()  # a sum over rows


# ---- gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("form", ["bias", "stack", "bucket"])
def test_gradcheck(form, reduction):
    options = teacher(form, (4,), 9) | {"labels": labels_of((4,), 9), "reduction": reduction}
    tensors = leaves(student((4,), 9, 3))

    def loss(h, w, b):
        return linear_distillation_loss(
            h, w, student_bias=b, **options, temperature=2.0, soft_cap=6.0, memory_budget=300
        )

    assert torch.autograd.gradcheck(loss, tensors)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("wanted", range(8))
def test_only_what_requires_grad(wanted, reduction):
    options = teacher("hidden") | {"reduction": reduction}
    want = results(linear_distillation_loss, student(), **options)[2:]
    tensors = student()
    for i in range(3):
        tensors[i].requires_grad_(bool(wanted >> i & 1))
    h, w, b = tensors
    loss = linear_distillation_loss(h, w, student_bias=b, **options)
    assert loss.requires_grad == (wanted > 0)
    if wanted:
        grad_output = torch.linspace(-1, 2, ROWS, dtype=loss.dtype)
        loss.backward(grad_output if reduction == "none" else None)
    for i, x in enumerate(tensors):
        if wanted >> i & 1:
            torch.testing.assert_close(x.grad, want[i], rtol=1e-12, atol=1e-15)
        else:
            assert x.grad is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_incoming_gradient(dtype):
    tensors, options = [x.to(dtype) for x in student()], teacher("hidden", dtype=dtype)
    h, w, b = leaves(tensors)
    loss = linear_distillation_loss(h, w, student_bias=b, **options)
    one = torch.autograd.grad(loss, (h, w, b), retain_graph=True)
    more = torch.autograd.grad(loss * -2, (h, w, b), retain_graph=True)
    assert_all_close([x / -2 for x in more], one, rtol=2e-3, atol=1e-6)
    last = torch.autograd.grad(loss / 4, (h, w, b))
    assert_all_close([4 * x for x in last], one, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunks", [1, 7, 200])
def test_gradients_in_16_bits_are_added_up_in_fp32(chunks, dtype):
    rows, classes, width = 400, 300, 32
    h, w = randn(rows, width, seed=1).to(dtype), (randn(classes, width, seed=2) / 5).to(dtype)
    t = (2 * randn(rows, classes, seed=3)).to(dtype)

    def gradients_of(loss):
        def run(h, w):
            h, w = leaves((h, w))
            return torch.autograd.grad(loss(h, w), (h, w))

        return run

    budget = classes * 4 * rows // chunks
    got = gradients_of(
        lambda h, w: linear_distillation_loss(h, w, teacher_logits=t, memory_budget=budget)
    )(h, w)
    whole = gradients_of(lambda h, w: distillation_loss(h @ w.T, t.double()))
    want = whole(h.double(), w.double())
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b).norm() < 2 * (b.to(dtype).double() - b).norm()


def test_gradients_in_fp16_do_not_underflow():
    rows, classes, width = 512, 400, 16
    h, w, _ = student((rows,), classes, width, torch.float16)
    w = w / 4
    t = ((h @ w.T).double() + 0.01 * randn(rows, classes)).half()
    for scale in (1.0, 2.0**16):  # as torch.amp.GradScaler does
        h, w = leaves((h, w))
        loss = linear_distillation_loss(h, w, teacher_logits=t) * scale
        got = torch.autograd.grad(loss, (h, w))
        hd, wd = leaves((h.double(), w.double()))
        want = torch.autograd.grad(distillation_loss(hd @ wd.T, t.double()) * scale, (hd, wd))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(
                a.double(), b, rtol=1e-2, atol=2.0**-24 + 5e-4 * b.abs().max()
            )


def test_no_second_derivative():
    h, w, b = leaves(student())
    loss = linear_distillation_loss(h, w, **teacher("hidden"), student_bias=b)
    with pytest.raises(ValueError, match="second derivative"):
        torch.autograd.grad(loss, h, create_graph=True)


# ---- inside PyTorch -----------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_once_for_any_number_of_rows(reduction):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(h, w, b, th, tw, labels):
        loss, statistics = linear_distillation_loss(
            h * 2, w, th, tw, labels, student_bias=b, reduction=reduction, return_statistics=True
        )
        return loss.sum() * 3, statistics.divergence

    fn = torch.compile(step, fullgraph=True, backend=counter, dynamic=True)
    frames = []
    for rows in (6, 9, 14):  # none of them another dimension's size
        tensors, options = student((rows,)), teacher("hidden", (rows,))
        rest = (*options.values(), labels_of((rows,)))
        want, got = leaves(tensors), leaves(tensors)
        expected, found = step(*want, *rest), fn(*got, *rest)
        expected[0].backward(), found[0].backward()
        assert_all_close(found, expected, rtol=1e-12, atol=1e-15)
        assert_all_close([x.grad for x in got], [x.grad for x in want], rtol=1e-12, atol=1e-15)
        frames.append(counter.frame_count)  # numbers may take a second try at the first call
    assert frames == frames[:1] * 3


@pytest.mark.parametrize("form", ["list", "bucket"])
def test_compiles_with_other_teachers(form):
    options = teacher(form) | {"num_items": torch.tensor(7.0), "weight": weights_of()}
    fn = torch.compile(linear_distillation_loss, fullgraph=True, backend="aot_eager")
    want, got = leaves(student()[:2]), leaves(student()[:2])
    expected = linear_distillation_loss(*want, **options)
    found = fn(*got, **options)
    expected.backward(), found.backward()
    assert_all_close([found, *(x.grad for x in got)], [expected, *(x.grad for x in want)])


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad):
    h, w, b = (x.requires_grad_(requires_grad) for x in student())
    options = teacher("bias")
    heads = [b, None, None, options["teacher_weight"], options["teacher_bias"]]
    arguments = (h, w, heads, [options["teacher_hidden"]])
    arguments += packed({"labels": labels_of(), "memory_budget": 999})
    op = torch.ops.kdkernels.linear_distillation_loss.default
    torch.library.opcheck(op, arguments, {"wishes": 4})


@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast(reduction, lower):
    tensors = [x.float() for x in student((40,), 300, 16)]
    options = teacher("bias", (40,), 300, torch.float32) | {"reduction": reduction}
    cast = {
        name: x.to(lower) if torch.is_tensor(x) and x.is_floating_point() else x
        for name, x in options.items()
    }
    want = results(linear_distillation_loss, [x.to(lower) for x in tensors], **cast)

    def autocast(*args, **kwargs):
        with torch.autocast("cpu", lower):
            return linear_distillation_loss(*args, **kwargs)

    got = results(autocast, tensors, **options)
    assert all(x.dtype == torch.float32 for x in got)
    assert_all_close(got[:2], want[:2], rtol=1e-6, atol=0)
    unit = HALF_ULP[lower]  # gradients in fp32 were not rounded to 16 bits
    assert_all_close([x.to(lower) for x in got[2:]], want[2:], rtol=2 * unit, atol=1e-6)


def test_checkpoint():
    options = teacher("hidden")
    want = results(linear_distillation_loss, student(), **options)

    def again(h, w, **rest):
        fn = functools.partial(linear_distillation_loss, **options, **rest)
        return checkpoint(fn, h, w, use_reentrant=False)

    assert_all_close(results(again, student()), want, rtol=0, atol=0)


def test_without_gradients():
    options = teacher("hidden") | {"labels": labels_of()}
    h, w, b = leaves(student())
    want = linear_distillation_loss(h, w, **options).detach()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            loss = linear_distillation_loss(h, w, **options)
        assert not loss.requires_grad
        assert torch.equal(loss, want)


# ---- a vocabulary that processes share ----------------------------------------------------------


def share_the_vocabulary(rank, world):
    classes = 20 * world
    own = slice(20 * rank, 20 * rank + 20)
    for form in ("bias", "logits", "bucket"):
        for more in ({}, {"divergence": "js", "reduction": "none"}, {"soft_cap": 3.0}):
            options = teacher(form, classes=classes) | more | {"temperature": 2.0}
            options |= {"labels": labels_of(classes=classes), "alpha": 0.4}
            h, w, b = student(classes=classes)
            loss, statistics, grad_hidden, grad_weight, grad_bias = results(
                linear_distillation_loss, (h, w, b), **options
            )
            for name in ("teacher_weight", "teacher_bias"):
                if name in options:
                    options[name] = options[name][own]
            if form == "logits":
                options["teacher_logits"] = options["teacher_logits"][:, own]
            options |= {"process_group": dist.group.WORLD, "memory_budget": 4 * 20 * 16}
            got = results(linear_distillation_loss, (h, w[own], b[own]), **options)
            want = (loss, statistics, grad_hidden, grad_weight[own], grad_bias[own])
            assert_all_close(got, want, rtol=1e-10, atol=1e-13)


def share_with_several_teachers_or_none(rank, world):
    """A teacher per row, whose heads are shared, too, and labels alone."""
    classes = 20 * world
    own, index = slice(20 * rank, 20 * rank + 20), torch.arange(ROWS) % 2
    experts = [randn(classes, n, seed=n) for n in (5, 3)]
    several = {
        "teacher_hidden": [randn(ROWS, n, seed=n + 1) for n in (5, 3)],
        "teacher_weight": experts,
        "teacher_index": index,
    }
    for options in (several, {"labels": labels_of(classes=classes), "label_smoothing": 0.1}):
        h, w, b = leaves(student(classes=classes))
        want = linear_distillation_loss(h, w, student_bias=b, **options)
        of_want = torch.autograd.grad(want, (h, w, b))
        if "teacher_weight" in options:
            options = options | {"teacher_weight": [x[own] for x in experts]}
        h, w, b = leaves((h, w[own], b[own]))
        got = linear_distillation_loss(
            h, w, student_bias=b, process_group=dist.group.WORLD, memory_budget=6400, **options
        )
        of_got = torch.autograd.grad(got, (h, w, b))
        assert_all_close((got, *of_got), (want, of_want[0], of_want[1][own], of_want[2][own]))


def heads_on_dtensors(rank, world):
    """Sharded by FSDP, whose ranks have rows of their own, and by vocabulary, whose share them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Partial, Shard, distribute_tensor

    mesh, classes = init_device_mesh("cpu", (world,)), 10 * world
    h, w, b = student(classes=classes)
    options = teacher("hidden", classes=classes)
    want = results(linear_distillation_loss, (h, w, b), **options)
    whole = distribute_tensor(w, mesh, [Shard(0)])
    got = results(linear_distillation_loss, (h, whole.full_tensor(), b), **options)
    assert_all_close(got, want, rtol=1e-12, atol=1e-14)
    leaf = whole.requires_grad_()
    gathered = leaf.full_tensor(grad_placements=[Partial()])
    loss = linear_distillation_loss(h, gathered, student_bias=b, **options)
    gradient = torch.autograd.grad(loss, leaf)[0]
    torch.testing.assert_close(gradient.full_tensor(), world * want[3])  # a sum over ranks
    own = slice(10 * rank, 10 * rank + 10)
    options["teacher_weight"] = options["teacher_weight"][own]
    loss = linear_distillation_loss(
        h, leaf.to_local(), student_bias=b[own], process_group=mesh.get_group(), **options
    )
    gradient = torch.autograd.grad(loss, leaf)[0]
    torch.testing.assert_close(gradient.full_tensor(), want[3])
    with pytest.raises((TypeError, ValueError), match="student_weight"):
        linear_distillation_loss(h, leaf, **options)


@pytest.mark.parametrize("share", [share_with_several_teachers_or_none, heads_on_dtensors])
def test_more_ranks_that_share(share):
    spawn(share, 2)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_that_share_the_vocabulary(world):
    spawn(share_the_vocabulary, world)


# ---- bad input ----------------------------------------------------------------------------------

H, W, B = torch.zeros(4, 3), torch.zeros(7, 3), torch.zeros(7)
TH, TW, T = torch.zeros(4, 5), torch.zeros(7, 5), torch.zeros(4, 7)
VALUES, INDICES = torch.zeros(4, 2), torch.tensor([[0, 1]] * 4)
Y = torch.zeros(4, dtype=torch.int64)
HEAD = {"teacher_hidden": TH, "teacher_weight": TW}
TOPK = {"teacher_values": VALUES, "teacher_indices": INDICES}


def needs_grad(x):
    return x.clone().requires_grad_()


BAD = [
    ("student_hidden", TypeError, {"student_hidden": None, **HEAD}),
    ("student_hidden", TypeError, {"student_hidden": H.int(), **HEAD}),
    ("student_hidden", ValueError, {"student_hidden": H[0, 0], **HEAD}),
    ("student_hidden", ValueError, {"student_hidden": H[:, :0], **HEAD}),
    ("student_weight", TypeError, {"student_weight": [1.0], **HEAD}),
    ("student_weight", TypeError, {"student_weight": W.double(), **HEAD}),
    ("student_weight", ValueError, {"student_weight": W[:, :2], **HEAD}),
    ("student_weight", ValueError, {"student_weight": W[None], **HEAD}),
    ("student_weight", ValueError, {"student_weight": W[:0], **HEAD}),
    ("student_bias", TypeError, {"student_bias": B.half(), **HEAD}),
    ("student_bias", ValueError, {"student_bias": B[:2], **HEAD}),
    ("teacher_hidden", ValueError, {}),
    ("teacher_hidden", ValueError, {"teacher_weight": TW}),
    ("teacher_hidden", ValueError, {**HEAD, "teacher_hidden": TH[:3]}),
    ("teacher_hidden", ValueError, {**HEAD, "teacher_hidden": TH.view(2, 2, 5)}),
    ("teacher_hidden", ValueError, {**HEAD, "teacher_hidden": needs_grad(TH)}),
    ("teacher_hidden", TypeError, {**HEAD, "teacher_hidden": TH.double()}),
    ("teacher_weight", ValueError, {"teacher_hidden": TH}),
    ("teacher_weight", ValueError, {**HEAD, "teacher_weight": TW[:6]}),
    ("teacher_weight", ValueError, {**HEAD, "teacher_weight": TW[:, :4]}),
    ("teacher_weight", ValueError, {**HEAD, "teacher_weight": needs_grad(TW)}),
    ("teacher_bias", ValueError, {**HEAD, "teacher_bias": B[:3]}),
    ("teacher_bias", ValueError, {**HEAD, "teacher_bias": needs_grad(B)}),
    ("teacher_bias", ValueError, {"teacher_logits": T, "teacher_bias": B}),
    ("teacher_logits", ValueError, {**HEAD, "teacher_logits": T}),
    ("teacher_logits", ValueError, {"teacher_logits": T[:, :6]}),
    ("teacher_logits", ValueError, {"teacher_logits": needs_grad(T)}),
    ("teacher_logits", ValueError, {"teacher_logits": [T] * 9}),
    ("teacher_logits", ValueError, {"teacher_logits": []}),
    ("teacher_logits", TypeError, {"teacher_logits": T.long()}),
    ("teacher_logits", TypeError, {"teacher_logits": [T, 1.0]}),
    ("teacher_kind", ValueError, {**HEAD, "teacher_kind": "probs"}),
    ("teacher_kind", ValueError, {"teacher_logits": T, "teacher_kind": "odds"}),
    ("teacher_weights", ValueError, {"teacher_logits": T, "teacher_weights": [1.0]}),
    ("teacher_weights", ValueError, {"teacher_logits": [T, T], "teacher_weights": [1.0]}),
    ("teacher_values", ValueError, {**HEAD, **TOPK}),
    ("teacher_values", ValueError, {"teacher_indices": INDICES}),
    ("teacher_values", ValueError, {**TOPK, "teacher_values": needs_grad(VALUES)}),
    ("teacher_indices", ValueError, {"teacher_values": VALUES}),
    ("teacher_indices", ValueError, {**TOPK, "teacher_indices": INDICES + 6}),
    ("teacher_indices", ValueError, {**TOPK, "teacher_indices": INDICES * 0}),
    ("teacher_logsumexp", ValueError, {**TOPK, "tail": "bucket"}),
    ("teacher_logsumexp", ValueError, {**TOPK, "teacher_logsumexp": torch.zeros(4)}),
    ("tail", ValueError, {**TOPK, "tail": "rest"}),
    ("tail", ValueError, {**HEAD, "tail": "bucket"}),
    ("standardize", ValueError, {**TOPK, "standardize": True}),
    ("divergence", ValueError, {**TOPK, "divergence": "total_variation"}),
    ("divergence", ValueError, {**HEAD, "divergence": "hellinger"}),
    ("labels", ValueError, {**HEAD, "labels": Y + 7}),
    ("labels", ValueError, {**HEAD, "labels": Y[:3]}),
    ("labels", TypeError, {**HEAD, "labels": Y.int()}),
    ("weight", ValueError, {**HEAD, "weight": torch.ones(3)}),
    ("alpha", ValueError, {**HEAD, "alpha": 0.5}),
    ("temperature", ValueError, {**HEAD, "temperature": 0.0}),
    ("temperature", TypeError, {**HEAD, "temperature": "2"}),
    ("reduction", ValueError, {**HEAD, "reduction": "batchmean"}),
    ("num_items", ValueError, {**HEAD, "num_items": torch.tensor(2.0), "reduction": "sum"}),
    ("alpha", ValueError, {"labels": Y, "alpha": 0.5}),
    ("alpha", ValueError, {"labels": Y, "alpha": torch.zeros(4)}),
    ("return_statistics", ValueError, {"labels": Y, "return_statistics": True}),
    ("standardize", ValueError, {"labels": Y, "standardize": True}),
    ("tail", ValueError, {"labels": Y, "tail": "bucket"}),
    ("teacher_bias", ValueError, {"labels": Y, "teacher_bias": B}),
    ("teacher_index", ValueError, {"labels": Y, "teacher_index": Y}),
    ("max_rows", ValueError, {**HEAD, "max_rows": 0}),
    ("max_rows", ValueError, {**HEAD, "max_rows": 3}),
    ("max_rows", TypeError, {**HEAD, "max_rows": 3.5}),
    ("memory_budget", ValueError, {**HEAD, "memory_budget": 0}),
    ("memory_budget", TypeError, {**HEAD, "memory_budget": "1 GB"}),
    ("backend", ValueError, {**HEAD, "backend": "triton"}),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_argument_is_named(case):
    name, error, arguments = BAD[case]
    arguments = {"student_hidden": H, "student_weight": W} | arguments
    with pytest.raises(error, match=rf"\b{name}\b") as raised:
        linear_distillation_loss(**arguments)
    assert type(raised.value) is error


def test_label_out_of_range_is_counted_over_all_rows():
    labels = Y.clone()
    labels[3] = 9
    labels[0] = -100
    with pytest.raises(ValueError, match="labels holds 9 at position 3"):
        linear_distillation_loss(H, W, TH, TW, labels, memory_budget=1)
