"""Every divergence, teacher and layout of the losses, against plain PyTorch in fp64."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nightly import examples
from test_distillation import HALF_ULP, generator, logits, on_emulator, pair

import kdkernels
from kdkernels import distillation_loss, linear_distillation_loss, reference, topk_distillation_loss
from kdkernels.tools.comparisons import IGNORED, training_logits

# What rounded exponentials make of the ratio of their sums, which a gradient of a KL feels.
ERROR_OF_SUMS = {"forward_kl": 1e-7, "reverse_kl": 1e-7}


def error_of_logarithms(divergence, z):
    """Of gradients that are rounded to 16 bits, a mixture's logarithms may be off by 1e-6."""
    rounded = z.dtype.itemsize == 2 and divergence in ("js", "skew_forward_kl", "skew_reverse_kl")
    return 2e-6 * z.double().softmax(-1) if rounded else 0


pytestmark = pytest.mark.quick

INF, NAN = math.inf, math.nan
DIVERGENCES = list(reference.DIVERGENCES)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def of(divergence, shape):
    """A divergence's options, with labels where it needs them; D alone is left of the loss."""
    options = {"divergence": divergence}
    if divergence == "decoupled":
        options["labels"] = torch.randint(shape[-1], shape[:-1], generator=generator(9))
        options["alpha"] = 1.0
    return options


def loss_and_gradients(loss_fn, student, teacher, grad_output=None, **options):
    leaves = [x.detach().requires_grad_() for x in (student, teacher)]
    loss = loss_fn(*leaves, **options)
    if grad_output is None:
        grad_output = torch.ones_like(loss)
    return loss.detach(), *torch.autograd.grad(loss, leaves, grad_output)


def loss_and_students_gradient(loss_fn, student, teacher, **options):
    leaf = student.detach().requires_grad_()
    loss = loss_fn(leaf, teacher, **options)
    return loss.detach(), *torch.autograd.grad(loss, leaf, torch.ones_like(loss))


BOTH_WAYS = (loss_and_gradients, loss_and_students_gradient)  # of a frozen teacher: other kernels


def fp64(student, teacher, **options):
    return loss_and_gradients(
        reference.distillation_loss, student.double(), teacher.double(), **options
    )


# ---- where rows lie ------------------------------------------------------------------------------

IN_RUNS = {
    "two sweeps": {"divergence": "forward_kl"},
    "three sweeps": {"divergence": "js"},
    "short": {"divergence": "js", "classes": 12},
    "general": {"divergence": "reverse_kl", "logit_scale": 0.5, "return_statistics": True},
    "decoupled": {"divergence": "decoupled"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", IN_RUNS)
def test_rows_in_runs_are_read_where_they_lie(name, dtype):
    """logits[:, :-1] against [:, 1:] of a teacher, and batches that come length first."""
    options = dict(IN_RUNS[name])
    z, t = pair(3, 5, options.pop("classes", 300), dtype=dtype)
    labels = torch.randint(z.shape[-1], (3, 4), generator=generator(3))
    options |= {"labels": labels, "alpha": 0.7}
    length_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (z, t)]
    for student, teacher in ((z, t), length_first):
        views = student[:, :-1], teacher[:, 1:]
        got = loss_and_gradients(loss_alone, *views, **options)
        want = loss_and_gradients(loss_alone, *(x.contiguous() for x in views), **options)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def loss_alone(*args, **options):
    out = distillation_loss(*args, **options)
    return out[0] if options.get("return_statistics") else out


# ---- everything at once -------------------------------------------------------------------------


class Call:
    """No dataclass, of which hypothesis would print every number of every tensor."""

    def __init__(self, function, dtype, scale, tensors, leaves, options, fused, grad_output):
        self.function = function
        self.dtype = dtype  # of the logits
        self.scale = scale  # of the logits
        self.tensors = tensors  # name -> tensor, or a list of them
        self.leaves = leaves  # names of those that get a gradient
        self.options = options
        self.fused = fused  # options that the reference does not have
        self.grad_output = grad_output

    def __repr__(self):
        def kind(x):
            return [kind(v) for v in x] if isinstance(x, list) else (x.dtype, *x.shape)

        tensors = {name: kind(x) for name, x in self.tensors.items()}
        return f"{self.function}\n{tensors}\n{self.leaves} {self.options} {self.fused}"


class Draw:
    """What the parts of a call are drawn from."""

    def __init__(self, draw):
        self.draw = draw
        self.g = generator(draw(st.integers(0, 2**32)))

    def __call__(self, *choices):
        return self.draw(st.sampled_from(choices))

    def normal(self, *shape):
        return torch.randn(shape, generator=self.g, dtype=torch.float64)

    def uniform(self, *shape):
        return torch.rand(shape, generator=self.g, dtype=torch.float64)


def draw_divergence(one, names):
    name = one(*names)
    parameters = reference.DIVERGENCES[name].parameters
    options = {"divergence": name}
    if name == "alpha_beta":
        pairs = [(None, None), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (1.0, 2.0)]
        options["divergence_alpha"], options["beta"] = one(*pairs)
    elif name == "decoupled":
        options["divergence_alpha"], options["beta"] = one(None, 0.0, 2.0), one(None, 0.0, 3.0)
    elif "beta" in parameters:
        options["beta"] = one(None, 0.0, 0.1, 0.5, 0.9, 1.0)
    return options


def draw_rows(one, leading, classes, needs_labels):
    """(labels, options): which rows count, and how they are added up."""
    options, labels = {"reduction": one("mean", "sum", "none")}, None
    if needs_labels or one(False, True):
        labels = torch.randint(classes, leading, generator=one.g)
        options["alpha"] = one(None, 0.0, 0.3, 1.0)
        options["label_smoothing"] = one(0.0, 0.1)
        options["ignore_index"] = one(-100, -1)
    weight = one("none", "none", "float", "bool")
    if weight == "float":
        options["weight"] = 2 * one.uniform(*leading).float()
    elif weight == "bool":
        options["weight"] = one.uniform(*leading) < 0.6
    if options["reduction"] == "mean":
        options["num_items"] = one(None, None, 2.5, torch.tensor(3.0))
    return labels, options


def excludable(name):
    """Who may exclude a class without an infinite divergence, whatever its parameters."""
    sides = ["both"]
    if name in ("forward_kl", "skew_forward_kl", "total_variation", "decoupled"):
        sides.append("teacher")
    if name in ("reverse_kl", "skew_reverse_kl", "total_variation"):
        sides.append("student")
    return sides


def draw_entries(one, teacher, indices, tail, temperature, acc, may_pad_first):
    """Values and indices of a top-k teacher, with -1 for a part of them; its logsumexp."""
    tensors = {}
    teacher = teacher.to(one(acc, teacher.dtype))
    if tail != "renormalize":
        tensors["teacher_logsumexp"] = (teacher.double() / temperature).logsumexp(-1).to(acc)
    none = one.uniform(*indices.shape) < one(0.0, 0.3)
    none[..., 0] &= may_pad_first
    tensors["teacher_values"] = teacher.gather(-1, indices).masked_fill(none, NAN)
    tensors["teacher_indices"] = indices.masked_fill(none, -1).to(one(torch.int32, torch.int64))
    return tensors


def draw_linear(one, leading, classes, side, dtype, scale):
    """Hidden states and a head whose logits are of about that scale."""
    width = one(1, 12)
    tensors = {
        f"{side}_hidden": one.normal(*leading, width).to(dtype),
        f"{side}_weight": (scale / width**0.5 * one.normal(classes, width)).to(dtype),
    }
    if one(False, True):
        tensors[f"{side}_bias"] = one.normal(classes).to(dtype)
    return tensors


ROWS = [(), (1,), (5,), (2, 3), (40,), (0,)]
CLASSES = [1, 2, 3, 17, 33, 257, 1000, 1025, 2100]


@st.composite
def calls(draw):
    one = Draw(draw)
    layout = one("dense", "dense", "several", "topk", "topk", "linear")
    form = one("hidden", "dense", "topk") if layout == "linear" else layout
    dtype, leading = one(*DTYPES), one(*ROWS)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    options = draw_divergence(one, reference.TOP_K_DIVERGENCES if form == "topk" else DIVERGENCES)
    name, temperature = options["divergence"], one(0.5, 1.0, 2.0, 4.0)
    options["temperature"] = temperature
    tail = one("renormalize", "bucket", "ignore") if form == "topk" else None
    standardize = form != "topk" and one(False, False, True)
    # A deviation, or a tail, of next to nothing is mostly rounding.
    classes = one(*(n for n in CLASSES if n > 3 or not (standardize or tail == "bucket")))
    rounded = layout == "linear" and dtype in HALF_ULP  # the logits, to their own size
    scale = one(*([0.3, 1.0] if tail == "bucket" or rounded else [0.3, 1.0, 4.0, 20.0]))
    labels, more = draw_rows(one, leading, classes, name == "decoupled")
    options |= more
    if one(False, True):
        options |= {"logit_scale": one(0.5, 1.5), "soft_cap": one(None, 2 * scale)}
    if standardize:
        options["standardize"] = True

    shape = (*leading, classes)
    student = (scale * one.normal(*shape)).to(dtype)
    count = one(2, 3, 8) if form == "several" else 1
    gap = one(None, 0.3, 0.01)  # between student and teachers, relative to the scale
    center, spread = (0, scale) if gap is None else (student.double(), gap * scale)
    teachers = [(center + spread * one.normal(*shape)).to(dtype) for _ in range(count)]
    limit = max(1, classes // 2 if tail == "bucket" else classes)
    entries = one.uniform(*shape).argsort(-1)[..., : draw(st.integers(1, min(40, limit)))]

    excluding = "none" if layout == "linear" else one("none", "none", *excludable(name))
    if excluding != "none":
        away = one.uniform(*shape) < 0.3
        if labels is not None:
            away.scatter_(-1, labels[..., None], False)
        away.scatter_(-1, entries[..., :1], False)
        if excluding != "teacher":
            student = student.masked_fill(away, -INF)
            options |= {"label_smoothing": 0.0} if labels is not None else {}
        if excluding != "student":
            teachers = [t.masked_fill(away, -INF) for t in teachers]

    if form != "hidden":
        kind = one("logits", "log_probs", *(["probs"] if form != "topk" else []))
        options["teacher_kind"] = kind
        if kind != "logits":
            log_probs = [t.double().log_softmax(-1) for t in teachers]
            teachers = [(x if kind == "log_probs" else x.exp()).to(dtype) for x in log_probs]
    if form != "topk" and options.get("teacher_kind", "logits") == "logits" and one(False, True):
        options |= {"teacher_logit_scale": one(0.5, 1.5), "teacher_soft_cap": one(None, 2 * scale)}

    if layout == "linear":
        tensors, fused = draw_linear(one, leading, classes, "student", dtype, scale), {}
        leaves = list(tensors)
        fused["memory_budget"] = one(None, 1, 20_000)
    else:
        tensors, leaves, fused = {"student_logits": student}, ["student_logits"], {}
        sparse = tail == "renormalize" and (labels is None or options["alpha"] == 1)
        fused |= one({}, {"inplace": True}, {"sparse_gradient": True} if sparse else {})
    if form == "hidden":
        teacher = draw_linear(one, leading, classes, "teacher", dtype, scale)
    elif form == "topk":
        options["tail"] = tail
        teacher = draw_entries(
            one, teachers[0], entries, tail, temperature, acc, excluding == "none"
        )
    elif form == "several":
        teacher = {"teacher_logits": one(teachers, torch.stack(teachers))}
        options["teacher_mixture"] = one("probs", "log_probs")
        options["teacher_weights"] = one(None, [1.0, 3.0, 0.0, 2.0, 1.0, 1.0, 1.0, 1.0][:count])
    else:
        teacher = {"teacher_logits": teachers[0]}
    if layout == "dense" and one(False, True):
        leaves += list(teacher)
    tensors |= teacher
    if labels is not None:
        left_out = one.uniform(*leading) < one(0.0, 0.3, 1.0)
        tensors["labels"] = labels.masked_fill(left_out, options["ignore_index"])

    grad_output = None
    if options["reduction"] == "none":
        grad_output = one.normal(*leading)
    elif one(False, True):
        grad_output = torch.tensor(one(-2.5, 100.0))
    functions = {"linear": "linear_distillation_loss", "topk": "topk_distillation_loss"}
    function = functions.get(layout, "distillation_loss")
    return Call(function, dtype, scale, tensors, leaves, options, fused, grad_output)


def evaluated(module, call, cast=lambda x: x, **more):
    """(loss, statistics, {leaf: gradient})"""
    arguments, leaves = {}, {}
    for name, value in call.tensors.items():
        arguments[name] = [cast(v) for v in value] if isinstance(value, list) else cast(value)
        if name in call.leaves:
            leaves[name] = arguments[name] = arguments[name].detach().requires_grad_()
    if more.get("inplace"):
        arguments["student_logits"] = arguments["student_logits"] * 1
    function = getattr(module, call.function)
    loss, statistics = function(**arguments, **call.options, **more, return_statistics=True)
    grad_output = None if call.grad_output is None else call.grad_output.to(loss.dtype)
    gradients = torch.autograd.grad(loss, list(leaves.values()), grad_output)
    gradients = [g.to_dense() for g in gradients]
    return loss.detach(), statistics, dict(zip(leaves, gradients, strict=True))


def shares(call, rows):
    """(largest, all): what rows have of the loss."""
    options, labels = call.options, call.tensors.get("labels")
    weight = options.get("weight")
    weight = torch.ones(rows).double() if weight is None else weight.double()
    if labels is not None:
        weight = torch.where(labels == options["ignore_index"], 0.0, weight)
    if options["reduction"] == "mean":
        items = options["num_items"]
        weight = weight / (float(items) if items is not None else max(weight.sum().item(), 1e-30))
    largest = weight.max().item() if weight.numel() else 0.0
    return largest, largest if options["reduction"] == "none" else weight.sum().item()


@settings(max_examples=examples(600))
@given(calls())
def test_everything_against_fp64(call):
    want_loss, want_statistics, want = evaluated(
        reference, call, lambda x: x.double() if x.is_floating_point() else x
    )
    loss, statistics, got = evaluated(kdkernels, call, **call.fused)
    exact = call.dtype == torch.float64
    dtype = torch.float64 if exact else torch.float32
    largest, total = shares(call, want_statistics.divergence.shape)
    temperature = call.options["temperature"]

    # Of D only the absolute error is of the precision's size: it is a sum of terms of either sign.
    # They are as large as D, and as what a divergence multiplies them with.
    d = want_statistics.divergence
    size = 1 + max((x for x in d.abs().flatten().tolist() if x < INF), default=0.0)
    size *= {"alpha_beta": 10, "decoupled": 12}.get(call.options["divergence"], 1)
    unit, linear = 1e-13 if exact else 4e-7, call.function == "linear_distillation_loss"
    if linear:  # the logits are already rounded
        size *= 10 * max(1.0, call.scale)
        unit = HALF_ULP.get(call.dtype, unit)

    assert loss.dtype == dtype and loss.shape == want_loss.shape
    atol = unit * temperature**2 * total * size
    torch.testing.assert_close(loss.double(), want_loss, rtol=5 * unit, atol=atol)
    for name, value in statistics._asdict().items():
        if name == "top1_agreement" and linear and call.dtype in HALF_ULP:
            continue
        assert value.dtype == dtype and value.shape == d.shape and not value.requires_grad
        right = getattr(want_statistics, name)
        kwargs = {"rtol": 10 * unit, "atol": 10 * unit * size}
        torch.testing.assert_close(value.double(), right, **kwargs, msg=lambda m, n=name: n + m)

    upstream = 1.0
    if call.grad_output is not None and call.grad_output.numel():
        upstream = call.grad_output.abs().max().item()
    slope = max(1.0, temperature) * max(1.0, call.options.get("logit_scale", 1.0))
    if call.options.get("standardize"):
        slope *= max(1.0, 5 / call.scale)
    atol = 2.5 * unit * max(1.0, largest * slope * size * upstream)
    if call.dtype == torch.float16:
        atol += 2.0**-24 * max(1.0, upstream)  # half of the smallest subnormal, twice
    # In 16 bits a gradient is rounded when it is made, and when it is scaled.
    is_scaled = call.grad_output is not None
    is_scaled |= call.dtype == torch.float16 and torch.is_tensor(call.options.get("num_items"))
    rtol = 1.001 * HALF_ULP.get(call.dtype, 0.0) * (2 if is_scaled else 1)
    for name, right in want.items():
        value = got[name]
        assert value.dtype == call.tensors[name].dtype and value.shape == right.shape
        value = value.double()
        if name == "teacher_logits" and call.options["teacher_kind"] == "probs":
            # Compared as the derivative in log p, which p divides; fp16 may not hold that before
            # it is scaled.
            p = call.tensors[name].double()
            limit = 100 if call.dtype == torch.float16 else INF
            value, right = p * value, torch.where(right.abs() < limit, p * right, NAN)
        finite = right.isfinite()
        torch.testing.assert_close(
            value[finite], right[finite], rtol=rtol, atol=atol, msg=lambda m, n=name: n + m
        )


# ---- derivatives --------------------------------------------------------------------------------

DERIVATIVES = {
    "plain": {},
    "temperature": {"temperature": 2.5, "reduction": "none"},
    "labels": {"labels": True, "temperature": 2.0, "alpha": 0.3, "label_smoothing": 0.2},
    "standardize": {"standardize": True, "temperature": 1.5},
    "caps": {
        **{"logit_scale": 0.7, "soft_cap": 2.0},
        **{"teacher_logit_scale": 1.2, "teacher_soft_cap": 3.0},
    },
    "log_probs": {"teacher_kind": "log_probs", "temperature": 2.0},
    "probs": {"teacher_kind": "probs", "temperature": 2.0},
}


@pytest.mark.parametrize("teacher_too", [False, True])
@pytest.mark.parametrize("options", list(DERIVATIVES))
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_first_and_second_derivatives(divergence, options, teacher_too):
    options = {**of(divergence, (3, 5)), **DERIVATIVES[options]}
    if options.get("labels") is True:
        options["labels"] = torch.tensor([1, -100, 4])
    z, t = pair(3, 5, scale=1.5, dtype=torch.float64)
    kind = options.get("teacher_kind")
    t = t.softmax(-1) if kind == "probs" else t.log_softmax(-1) if kind == "log_probs" else t
    z, t = z.requires_grad_(), t.requires_grad_(teacher_too)

    def loss(*x):
        return distillation_loss(x[0], x[1] if teacher_too else t, **options)

    inputs = (z, t) if teacher_too else (z,)
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs, fast_mode=True)


@pytest.mark.parametrize("mixture", ["probs", "log_probs"])
@pytest.mark.parametrize("teachers_too", [False, True])
def test_derivatives_of_several_teachers(mixture, teachers_too):
    z, t = pair(3, 5, scale=1.5, dtype=torch.float64)
    teachers = [x.clone().requires_grad_(teachers_too) for x in (t, t.flip(0), t.flip(1))]

    def loss(z, *teachers_given):
        return distillation_loss(
            z,
            list(teachers_given) or teachers,
            divergence="js",
            temperature=2.0,
            teacher_weights=[1.0, 2.0, 0.5],
            teacher_mixture=mixture,
            teacher_soft_cap=4.0,
        )

    inputs = (z.requires_grad_(), *(teachers if teachers_too else []))
    assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, inputs, fast_mode=True)


@pytest.mark.parametrize("tail", ["renormalize", "bucket", "ignore"])
@pytest.mark.parametrize("divergence", reference.TOP_K_DIVERGENCES)
def test_derivatives_of_top_k(divergence, tail):
    z, t = pair(3, 6, scale=1.5, dtype=torch.float64)
    indices = torch.tensor([[0, -1, 3], [5, 2, 1], [-1, -1, -1]])
    options = {"divergence": divergence, "tail": tail, "temperature": 2.0, "soft_cap": 4.0}
    if tail != "renormalize":
        options["teacher_logsumexp"] = (t / 2).logsumexp(-1)
    values = t.gather(-1, indices.clamp(min=0))
    for labels in (None, torch.tensor([1, 2, 0])):

        def loss(z, labels=labels):
            return topk_distillation_loss(z, values, indices, labels, **options)

        assert torch.autograd.gradcheck(loss, z.requires_grad_())
        assert torch.autograd.gradgradcheck(loss, z, fast_mode=True)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_derivatives_of_a_linear_head(divergence):
    h, w = pair(3, 4, scale=1.0, dtype=torch.float64)
    w, b, t = w[[0, 1, 2, 0, 1]] + 0.1 * logits(5, 4, dtype=w.dtype), w[0, :1].expand(5), pair(3, 5)
    leaves = [x.clone().requires_grad_() for x in (h, w, b)]
    options = {**of(divergence, (3, 5)), "teacher_logits": t[0].double(), "temperature": 2.0}

    def loss(h, w, b):
        return linear_distillation_loss(h, w, student_bias=b, **options)

    assert torch.autograd.gradcheck(loss, leaves)


# ---- limits that are another divergence ---------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_js_at_0_and_1_is_forward_and_reverse_kl_to_the_bit(dtype):
    z, t = pair(5, 1000, dtype=dtype)
    for beta, other in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
        options = {"temperature": 2.0, "reduction": "none"}
        got = loss_and_gradients(distillation_loss, z, t, divergence="js", beta=beta, **options)
        want = loss_and_gradients(distillation_loss, z, t, divergence=other, **options)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("options", "other"),
    [
        ({"divergence": "skew_forward_kl", "beta": 0.0}, "forward_kl"),
        ({"divergence": "skew_reverse_kl", "beta": 0.0}, "reverse_kl"),
        ({"divergence": "alpha_beta", "divergence_alpha": 1.0, "beta": 0.0}, "forward_kl"),
        ({"divergence": "alpha_beta", "divergence_alpha": 0.0, "beta": 1.0}, "reverse_kl"),
    ],
)
def test_limits(options, other):
    z, t = pair(5, 1000)
    shared = {"temperature": 2.0, "reduction": "none"}
    got = loss_and_gradients(distillation_loss, z, t, **options, **shared)
    want = loss_and_gradients(distillation_loss, z, t, divergence=other, **shared)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-7)


def test_skew_at_1_is_nothing():
    z, t = pair(5, 1000)
    for divergence in ("skew_forward_kl", "skew_reverse_kl"):
        for value in loss_and_gradients(distillation_loss, z, t, divergence=divergence, beta=1.0):
            assert value.abs().max() < 1e-9


def test_decoupled_is_forward_kl_where_its_weight_is_the_teachers_rest():
    z, t = pair(1, 50)
    label = torch.tensor([7])
    rest = 1 - (t / 2).double().softmax(-1)[0, 7].item()
    shared = {"temperature": 2.0, "alpha": 1.0, "labels": label}
    got = loss_and_gradients(
        distillation_loss, z, t, divergence="decoupled", divergence_alpha=1.0, beta=rest, **shared
    )
    want = loss_and_gradients(distillation_loss, z, t, **shared)
    # The weight is a number here: the teacher's gradient does not go through it.
    for a, b in zip(got[:2], want[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6)


# ---- accuracy -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_never_negative(divergence, dtype):
    z, noise = pair(10_000, 50)
    sizes = 10 ** (-9 * torch.rand(10_000, 1, generator=generator(5)))
    t = (z + sizes * noise).to(dtype)
    with torch.no_grad():
        loss = distillation_loss(z.to(dtype), t, **of(divergence, z.shape), reduction="none")
    assert loss.min() >= 0


def close_pairs(divergence, dtype, classes, target):
    """Student and teacher with D of about `target`: usual logits that differ by little, and little
    logits that differ by about themselves.
    """
    order = 1 if divergence == "total_variation" else 2
    options = {**of(divergence, (1, classes)), "reduction": "none"}
    z, e = pair(1, classes, dtype=torch.float64)

    def scaled(build):
        size = 1e-2
        for _ in range(4):
            pair = [x.to(dtype) for x in build(size)]
            d = reference.distillation_loss(*(x.double() for x in pair), **options).item()
            size = size * (target / d) ** (1 / order) if d > 0 else 2 * size
        return pair

    pairs = [scaled(lambda size: (size * z, size * e))]
    if dtype == torch.float32:
        pairs.append(scaled(lambda size: (z, z + size * e)))
    else:
        # One class's logit by one unit in the last place, or by more of them.
        z = z.to(dtype)
        p = z.double().softmax(-1)
        unit = (z.abs() * torch.finfo(dtype).eps).double()
        change = torch.maximum(unit, (2 * target / p) ** (1 / order))
        miss = (p * change**order / 2 / target).log().abs().masked_fill(change > 1, INF)
        there = torch.zeros_like(z, dtype=torch.bool).scatter_(-1, miss.argmin(-1)[:, None], True)
        if miss.min() < math.log(10):
            pairs.append((z, torch.where(there, z + change, z.double()).to(dtype)))
    return (torch.cat(side) for side in zip(*pairs, strict=True))


@pytest.mark.parametrize("classes", [10, 1000, 32000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_small_divergences_keep_four_digits(divergence, dtype, classes):
    for target in (1e-8, 1e-6, 1e-4, 1e-2):
        z, t = close_pairs(divergence, dtype, classes, target)
        options = {**of(divergence, z.shape), "reduction": "none"}
        want, *want_gradients = fp64(z, t, **options)
        assert want.min() > target / 30 and want.max() < target * 30
        # Total variation is the differences' size, others are its square: at 1e-8 fp32 ends.
        atol = 3e-8 if divergence == "total_variation" else 0
        for call in BOTH_WAYS:
            loss, *gradients = call(distillation_loss, z, t, **options)
            torch.testing.assert_close(loss.double(), want, rtol=1e-4, atol=atol)
            if atol > 0.01 * target:
                continue
            for got, right in zip(gradients, want_gradients, strict=False):
                largest = right.abs().amax(-1, keepdim=True)
                allowed = (
                    1e-4 * largest
                    + HALF_ULP.get(dtype, 0) * right.abs()
                    + ERROR_OF_SUMS.get(divergence, 0)
                    + error_of_logarithms(divergence, z)
                )
                assert ((got.double() - right).abs() <= allowed).all()


@pytest.mark.parametrize("classes", [9, 90, 1610])
@pytest.mark.parametrize("divergence", ["total_variation", "alpha_beta"])
def test_the_rounding_of_sums_is_not_felt(divergence, classes):
    """Where a logit differs by little more than the sums of both sides are rounded by."""
    z, e = pair(40, classes)
    t = z + (1e-5 if divergence == "total_variation" else 1e-4) * e
    options = {"divergence": divergence, "reduction": "none"}
    want = fp64(z, t, **options)[0]
    for call in BOTH_WAYS:
        loss = call(distillation_loss, z, t, **options)[0]
        torch.testing.assert_close(loss.double(), want, rtol=1e-4, atol=0)


@pytest.mark.parametrize("classes", [13, 1000, 5003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "js"])
def test_frozen_teacher_from_near_to_far(divergence, dtype, classes):
    """Rows on both sides of where kernels change their ways, with logits that grow along the row by
    more than exponentials relative to its first classes could bear, and with excluded classes.
    """
    z, e = pair(40, classes, dtype=torch.float64)
    rise = torch.linspace(0, 150, classes, dtype=torch.float64) * (torch.arange(40) % 2)[:, None]
    z = z + rise
    t = z + e * torch.logspace(-4, 0.5, 40, dtype=torch.float64)[:, None]
    z[::3, 5:9] = t[::3, 5:9] = -INF
    z, t = z.to(dtype), t.to(dtype)
    labels = torch.full((40,), classes - 1)
    for options in ({"temperature": 1.0}, {"temperature": 3.0, "labels": labels, "alpha": 0.4}):
        options |= {"divergence": divergence, "reduction": "none"}
        want, right, _ = fp64(z, t, **options)
        loss, got = loss_and_students_gradient(distillation_loss, z, t, **options)
        torch.testing.assert_close(loss.double(), want, rtol=2e-5, atol=1e-7)
        largest = right.abs().amax(-1, keepdim=True)
        allowed = (
            1e-4 * largest
            + HALF_ULP.get(dtype, 0) * right.abs()
            + 1e-7
            + ERROR_OF_SUMS.get(divergence, 0)
            + error_of_logarithms(divergence, z)
        )
        assert ((got.double() - right).abs() <= allowed).all()


@pytest.mark.skipif(on_emulator(), reason="the launchers' own tests have such rows")
@settings(max_examples=examples(100))
@given(
    divergence=st.sampled_from(DIVERGENCES),
    dtype=st.sampled_from(DTYPES),
    shape=st.sampled_from(
        [
            *((1, 10), (16_384, 10), (33, 100), (9, 1000), (4, 5003), (2, 32_000)),
            *((1, 50_257), (1, 128_256), (2, 151_936), (1, 262_144)),
        ]
    ),
    gap=st.sampled_from([0.01, 0.1, 0.3, INF]),
    temperature=st.sampled_from([1.0, 2.0, 4.0]),
    by=st.sampled_from(["labels", "weight"]),
    frozen=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_rows_of_training_keep_four_digits(
    divergence, dtype, shape, gap, temperature, by, frozen, seed
):
    """Peaked predictions, a student near its teacher, and prompts, whose rows do not count."""
    z, t, labels = training_logits(*shape, gap, dtype=dtype, prompts=0.5, seed=seed)
    counts = labels != IGNORED
    options = {"divergence": divergence, "temperature": temperature, "reduction": "none"}
    if by == "labels" or divergence == "decoupled":
        options |= {"labels": labels, "alpha": 1.0}
    else:
        options |= {"weight": counts}
    want, *want_gradients = fp64(z, t, **options)
    call = loss_and_students_gradient if frozen else loss_and_gradients
    loss, *gradients = call(distillation_loss, z, t, **options)
    assert not loss[~counts].any() and not any(g[~counts].any() for g in gradients)
    rtol = 1e-8 if dtype == torch.float64 else 1e-4
    atol = (1e-14 if dtype == torch.float64 else 3e-8) * temperature**2  # 1e-14: the right one's
    torch.testing.assert_close(loss.double(), want, rtol=rtol, atol=atol)
    # Of a class with nearly all of the probability terms as large as q or as D cancel.
    lost = rtol * 3e-3 * want[:, None] + (0 if dtype == torch.float64 else 2e-7 * temperature**2)
    lost = lost + error_of_logarithms(divergence, z)
    if divergence == "total_variation":  # whose gradient is not continuous where p = q
        log_p, log_q = ((x.double() / temperature).log_softmax(-1) for x in (t, z))
        ties = (log_p - log_q).abs() < 1e-5
        lost = lost + temperature * (ties * log_q.exp()).sum(-1, keepdim=True)
    for got, right in zip(gradients, want_gradients, strict=False):
        largest = right.abs().amax(-1, keepdim=True)
        allowed = rtol * largest + 1.001 * HALF_ULP.get(dtype, 0) * right.abs() + atol + lost
        allowed += 2.0**-24 if dtype == torch.float16 else 0  # its smallest number
        assert ((got.double() - right).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equal_logits_have_no_divergence(divergence, dtype):
    for classes, temperature in ((1, 1.0), (2, 3.0), (10, 0.05), (1000, 1.0), (3001, 2.0)):
        z = logits(4, classes, dtype=dtype)
        options = {**of(divergence, z.shape), "reduction": "none", "temperature": temperature}
        loss, *gradients = loss_and_gradients(distillation_loss, z, z.clone(), **options)
        assert not loss.any() and not any(g.any() for g in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.1, -7.3, 1234.5])
def test_equal_logits_standardized_are_0(dtype, value):
    """Whatever rounding leaves of their spread."""
    for classes in (3, 10, 1000, 3001):
        z, t = torch.full((4, classes), value, dtype=dtype), logits(4, classes, dtype=dtype)
        options = {"standardize": True, "reduction": "none"}
        loss, gradient, _ = loss_and_gradients(distillation_loss, z, t, **options)
        want, *_ = fp64(torch.zeros_like(z), t, **options)
        torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=0)
        assert not gradient.any()


@pytest.mark.parametrize("divergence", reference.TOP_K_DIVERGENCES)
def test_a_bucket_of_no_class_is_empty(divergence):
    """With an entry for every class, whatever rounding leaves beside their probabilities."""
    z, t = pair(20, 6)
    options = {**of(divergence, z.shape), "reduction": "none"}
    want, want_gradient, _ = loss_and_gradients(distillation_loss, z, t, **options)
    leaf, indices = z.clone().requires_grad_(), t.argsort(-1)
    loss = topk_distillation_loss(
        leaf,
        t.gather(-1, indices),
        indices,
        tail="bucket",
        teacher_logsumexp=t.logsumexp(-1),
        **options,
    )
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    torch.testing.assert_close(loss.detach(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, want_gradient, rtol=1e-5, atol=1e-5)


HARD = {
    "large": ((6, 100), {"scale": 4e3}, {}),
    "cold": ((6, 100), {}, {"temperature": 0.05}),
    "hot": ((6, 100), {}, {"temperature": 100.0}),
    "hotter than the logits": ((6, 1000), {"scale": 0.1}, {"temperature": 100.0}),
    "all of a vocabulary": ((2, 262_144), {}, {"temperature": 2.0}),
}


@pytest.mark.parametrize("name", list(HARD))
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_hard_numbers(divergence, name):
    shape, values, options = HARD[name]
    z, t = (v.clamp(-1e4, 1e4) for v in pair(*shape, **values))
    options = {**of(divergence, shape), "reduction": "none", **options}
    want, *want_gradients = fp64(z, t, **options)
    loss, *gradients = loss_and_gradients(distillation_loss, z, t, **options)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=0)
    for got, right in zip(gradients, want_gradients, strict=True):
        atol = 1e-5 * right.abs().max().item() + 1e-7 * max(1.0, want.max().item())
        torch.testing.assert_close(got.double(), right, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("offset", [-1e4, 1e4])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_offsets_of_either_sign(divergence, offset):
    """Integers stay exact, so that an offset changes nothing once the maximum is subtracted."""
    z, t = (v.round(decimals=0) for v in pair(3, 1000))
    options = {**of(divergence, z.shape), "reduction": "none"}
    want = loss_and_gradients(distillation_loss, z, t, **options)
    got = loss_and_gradients(distillation_loss, z + offset, t - offset, **options)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("options", [{}, {"logit_scale": 0.7}, {"soft_cap": 500.0}])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_logits_around_where_exp_overflows(divergence, options):
    """Each value in fp32 between, whether or not there is cross-entropy to take its exponential."""
    z = torch.linspace(60.0, 140.0, 3000).reshape(3, 1000)
    t = z.flip(-1) / 10
    options = {**of(divergence, z.shape), "reduction": "none", **options}
    for got, want in zip(
        loss_and_gradients(distillation_loss, z, t, **options), fp64(z, t, **options), strict=True
    ):
        torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5)


# ---- classes without probability ----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["probs", "log_probs", "logits"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_one_hot_teacher(divergence, kind):
    z = logits(4, 300)
    hot = torch.tensor([0, 5, 299, 7])
    teacher = torch.zeros(4, 300).scatter_(-1, hot[:, None], 1.0)
    if kind != "probs":
        teacher = teacher.log()
    options = {**of(divergence, z.shape), "teacher_kind": kind, "reduction": "none"}
    if divergence == "decoupled":
        options["labels"][:2] = hot[:2]  # nothing beside the label, and something
    want, want_gradient, _ = fp64(z, teacher, **options)
    loss, gradient, _ = loss_and_gradients(distillation_loss, z, teacher, **options)
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=1e-6)
    finite = want.isfinite()
    assert finite.all() == (divergence != "reverse_kl")
    atol = 1e-6 * (8 if divergence == "decoupled" else 1)
    torch.testing.assert_close(
        gradient[finite].double(), want_gradient[finite], rtol=1e-5, atol=atol
    )


@pytest.mark.parametrize("classes", [6, 1500])
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_excluded_classes(divergence, side, classes):
    z, t = pair(3, classes)
    if side != "teacher":
        z[1, 2:4] = -INF
    if side != "student":
        t[1, 2:4] = -INF
    options = {**of(divergence, z.shape), "reduction": "none", "temperature": 2.0}
    if divergence == "decoupled":
        options["labels"] = torch.tensor([0, 1, 4])
    want, *want_gradients = fp64(z, t, **options)
    assert not want.isnan().any()
    finite = want.isfinite()
    assert all(right[finite].isfinite().all() for right in want_gradients)
    for call in BOTH_WAYS:
        loss, *gradients = call(distillation_loss, z, t, **options)
        torch.testing.assert_close(loss.double(), want, rtol=2e-6, atol=1e-6)
        for got, right in zip(gradients, want_gradients, strict=False):
            torch.testing.assert_close(got[finite].double(), right[finite], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_bad_rows_are_nan_and_leave_others_alone(divergence, side, bad):
    for call, classes in itertools.product(BOTH_WAYS, (7, 700)):
        inputs = pair(3, classes)
        options = {**of(divergence, (3, classes)), "reduction": "none"}
        want = call(distillation_loss, *inputs, **options)
        inputs[side][1, 5 if bad != -INF else slice(None)] = bad
        got = call(distillation_loss, *inputs, **options)
        for a, b in zip(got, want, strict=True):
            assert a[1].isnan().all() and torch.equal(a[[0, 2]], b[[0, 2]])


# ---- what goes wrong elsewhere ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_js_is_nan_where_an_entry_underflows_under_both(dtype):
    # linkedin/Liger-Kernel issues 1453 and 769: the logarithm of a mixture made of probabilities.
    z, t = logits(1, 4, dtype=dtype), logits(1, 4, seed=1, dtype=dtype)
    z[0, 2], t[0, 2] = -900.0, -1100.0
    for temperature in (1.0, 0.5, 4.0):
        options = {"divergence": "js", "beta": 0.3, "temperature": temperature}
        want = fp64(z, t, **options)
        got = loss_and_gradients(distillation_loss, z, t, **options)
        for a, b in zip(got, want, strict=True):
            rtol = 1e-6 + HALF_ULP.get(dtype, 0.0)
            torch.testing.assert_close(a.double(), b, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("divergence", ["reverse_kl", "js"])
def test_finite_loss_with_nan_gradients_at_a_low_temperature(divergence, dtype):
    # MakazhanAlpamys/Soup issue 719: the derivative of softmax where it underflows, at T = 0.05.
    z = torch.tensor([[8.0, -2.0, 0.5], [0.0, 30.0, -30.0]], dtype=dtype)
    t = torch.tensor([[6.0, 1.0, -9.0], [20.0, 25.0, -1.0]], dtype=dtype)
    options = {"divergence": divergence, "temperature": 0.05}
    want = fp64(z, t, **options)
    got = loss_and_gradients(distillation_loss, z, t, **options)
    for a, b in zip(got, want, strict=True):
        rtol = 1e-5 + HALF_ULP.get(dtype, 0.0)
        torch.testing.assert_close(a.double(), b, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("teacher", ["hidden", "logits", "values"])
def test_fused_head_forgets_scale_cap_temperature_or_weight_of_the_hard_loss(teacher):
    # huggingface/trl PR 6629: the fused path applies no logit_scale and no final_logit_softcapping;
    # PR 5731: it has a temperature and a weight of the hard loss of its own.
    h, th = pair(6, 16, scale=1.0)
    w, tw = (x / 4 for x in pair(40, 16))
    labels = torch.tensor([3, -100, 0, 39, 8, 8])
    t = th @ tw.t()
    values, indices = t.topk(5)
    shared = {"divergence": "js", "logit_scale": 0.25, "soft_cap": 1.5, "temperature": 0.9}
    of_teacher = {"teacher_logit_scale": 0.5, "teacher_soft_cap": 3.0}
    given = {
        "hidden": {"teacher_hidden": th, "teacher_weight": tw, **of_teacher},
        "logits": {"teacher_logits": t, **of_teacher},
        "values": {"teacher_values": values, "teacher_indices": indices},
    }[teacher]
    for alpha in (1.0, 0.5, 0.0):
        leaves = [x.clone().requires_grad_() for x in (h, w)]
        fused = linear_distillation_loss(*leaves, labels=labels, alpha=alpha, **shared, **given)
        got = torch.autograd.grad(fused, leaves)
        z = leaves[0] @ leaves[1].t()
        if teacher == "values":
            plain = topk_distillation_loss(z, values, indices, labels, alpha=alpha, **shared)
        else:
            plain = distillation_loss(z, t, labels, alpha=alpha, **shared, **of_teacher)
        torch.testing.assert_close(fused, plain, rtol=1e-6, atol=1e-7)
        for a, b in zip(got, torch.autograd.grad(plain, leaves), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
        # And what both say is the formula.
        cap = [c * torch.tanh(s * x / c) for c, s, x in ((1.5, 0.25, z), (3.0, 0.5, t))]
        if teacher == "values":
            sides = [x.gather(-1, indices) for x in (cap[0], t)]
        else:
            sides = cap
        q, p = ((x.detach().double() / 0.9).softmax(-1) for x in sides)
        m = (p + q) / 2
        js = ((p * (p / m).log() + q * (q / m).log()).sum(-1) / 2)[labels >= 0].mean()
        hard = torch.nn.functional.cross_entropy(cap[0].double(), labels)
        want = alpha * 0.81 * js + (1 - alpha) * hard
        torch.testing.assert_close(fused.double(), want, rtol=1e-6, atol=1e-7)


# ---- the same bits, the same numbers ------------------------------------------------------------


def variants(shape, dtype):
    """(name, function without arguments): each divergence, and some other kinds of rows."""
    z, t = pair(*shape, dtype=dtype)
    entries = t.topk(min(20, shape[-1]))
    lse = (
        (t.double() / 2)
        .logsumexp(-1)
        .to(torch.float64 if dtype == torch.float64 else torch.float32)
    )

    def run(function, *teacher, **options):
        leaf = z.detach().requires_grad_()
        loss, statistics = function(
            leaf, *teacher, temperature=2.0, reduction="none", return_statistics=True, **options
        )
        (gradient,) = torch.autograd.grad(loss, leaf, torch.ones_like(loss))
        return loss.detach(), gradient, *statistics

    for divergence in DIVERGENCES:
        yield divergence, lambda d=divergence: run(distillation_loss, t, **of(d, shape))
    yield "standardize", lambda: run(distillation_loss, t, standardize=True, divergence="js")
    yield "several", lambda: run(distillation_loss, [t, t.flip(0)], soft_cap=9.0)
    yield (
        "bucket",
        lambda: run(
            topk_distillation_loss, *entries, tail="bucket", teacher_logsumexp=lse, divergence="js"
        ),
    )


@pytest.mark.parametrize("shape", [(300, 1000), (3, 20000)])
def test_any_number_of_threads_gives_the_same_bits(shape, set_threads):
    for name, run in variants(shape, torch.float32):
        results = []
        for threads in (1, 2, 3, 7):
            set_threads(threads)
            results.append(run())
        for result in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True)), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 10), (3, 1003)])
def test_every_isa_level_agrees(shape, dtype, set_isa, isa_levels):
    tolerance = 1e-12 if dtype == torch.float64 else 4e-6
    for name, run in variants(shape, dtype):
        set_isa(isa_levels[0])
        want = run()
        for level in isa_levels[1:]:
            set_isa(level)
            got = run()
            for i, (a, b) in enumerate(zip(got, want, strict=True)):
                # A gradient in 16 bits may be rounded to the other side.
                rtol = max(tolerance, 2 * HALF_ULP.get(dtype, 0.0)) if i == 1 else tolerance
                torch.testing.assert_close(a, b, rtol=rtol, atol=tolerance, msg=f"{name} {level}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_nothing_of_a_longer_row_is_left(divergence, dtype, set_isa, isa_levels):
    """A row's last vectors lie where the row before had classes."""
    for level in isa_levels:
        set_isa(level)
        for classes in (64, 1, 17, 33, 5, 1040, 1030):
            z, t = pair(3, classes, dtype=dtype)
            options = {**of(divergence, z.shape), "reduction": "none"}
            want = distillation_loss(z.double(), t.double(), **options, backend="reference")
            got = distillation_loss(z, t, **options).double()
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


# ---- bad input ----------------------------------------------------------------------------------

Z, T = torch.zeros(4, 7), torch.ones(4, 7)
Y, W = torch.zeros(4, dtype=torch.int64), torch.ones(4)
V, INDEX = torch.ones(4, 2), torch.tensor([[0, 1]] * 4)
H, HEAD, TH, THEAD = torch.zeros(4, 3), torch.zeros(7, 3), torch.zeros(4, 5), torch.zeros(7, 5)


def dense(*arguments, **options):
    return lambda: distillation_loss(*(arguments or (Z, T)), **options)


def topk(*arguments, **options):
    return lambda: topk_distillation_loss(*(arguments or (Z, V, INDEX)), **options)


def linear(*arguments, **options):
    return lambda: linear_distillation_loss(*(arguments or (H, HEAD, TH, THEAD)), **options)


def index_with(value):
    index = INDEX.clone()
    index[2, 1] = value
    return index


BAD = [
    *(
        ("divergence", ValueError, f(divergence=d))
        for f in (dense, topk, linear)
        for d in ("kl", "")
    ),
    *(
        ("divergence", ValueError, topk(divergence=d))
        for d in ("total_variation", "skew_forward_kl", "alpha_beta")
    ),
    # Parameters: one that a divergence does not have, and out of range.
    *(
        ("beta", ValueError, f(divergence=d, beta=0.5))
        for f in (dense, linear)
        for d in ("forward_kl", "reverse_kl", "total_variation")
    ),
    ("beta", ValueError, topk(beta=0.5)),
    *(
        ("divergence_alpha", ValueError, dense(divergence=d, divergence_alpha=0.5))
        for d in ("forward_kl", "js", "skew_reverse_kl")
    ),
    *(
        ("beta", ValueError, dense(divergence=d, beta=v))
        for d in ("js", "skew_forward_kl", "skew_reverse_kl")
        for v in (-0.1, 1.1, NAN, INF)
    ),
    *(("beta", ValueError, dense(divergence="alpha_beta", beta=v)) for v in (-0.1, NAN, INF)),
    *(
        ("divergence_alpha", ValueError, dense(Z, T, Y, divergence="decoupled", divergence_alpha=v))
        for v in (-0.1, NAN, INF)
    ),
    ("beta", ValueError, dense(divergence="alpha_beta", divergence_alpha=0.0, beta=0.0)),
    ("beta", TypeError, dense(divergence="js", beta="0.5")),
    ("divergence_alpha", TypeError, dense(divergence="alpha_beta", divergence_alpha="1")),
    ("labels", ValueError, dense(divergence="decoupled")),
    ("labels", ValueError, linear(divergence="decoupled")),
    # The transforms.
    *(
        (name, ValueError, dense(**{name: v}))
        for name in ("logit_scale", "soft_cap", "teacher_logit_scale", "teacher_soft_cap")
        for v in (0.0, -1.0, NAN, INF)
    ),
    *(
        (name, TypeError, f(**{name: "1"}))
        for name in ("logit_scale", "soft_cap")
        for f in (dense, topk, linear)
    ),
    *(
        (name, ValueError, dense(teacher_kind=kind, **{name: 2.0}))
        for name in ("teacher_logit_scale", "teacher_soft_cap")
        for kind in ("probs", "log_probs")
    ),
    # The teacher.
    *(("teacher_kind", ValueError, f(teacher_kind="logit")) for f in (dense, topk, linear)),
    ("teacher_kind", ValueError, topk(teacher_kind="probs")),
    ("teacher_mixture", ValueError, dense(Z, [T, T], teacher_mixture="mean")),
    ("teacher_logits", ValueError, dense(Z, [])),
    ("teacher_logits", ValueError, dense(Z, [T] * 9)),
    ("teacher_logits", ValueError, dense(Z, torch.stack([T] * 9))),
    ("teacher_logits", ValueError, dense(Z, [T, T[:2]])),
    ("teacher_logits", TypeError, dense(Z, [T, T.double()])),
    ("teacher_logits", TypeError, dense(Z, [T, None])),
    ("teacher_weights", ValueError, dense(Z, [T, T], teacher_weights=[1.0])),
    ("teacher_weights", ValueError, dense(Z, T, teacher_weights=[1.0])),
    *(
        ("teacher_weights", ValueError, dense(Z, [T, T], teacher_weights=[1.0, v]))
        for v in (-1.0, NAN, INF)
    ),
    ("teacher_weights", ValueError, dense(Z, [T, T], teacher_weights=[0.0, 0.0])),
    ("teacher_weights", TypeError, dense(Z, [T, T], teacher_weights=["1", "2"])),
    # Top-k.
    ("teacher_values", TypeError, topk(Z, V.int(), INDEX)),
    ("teacher_values", TypeError, topk(Z, None, INDEX)),
    ("teacher_values", ValueError, topk(Z, V[:2], INDEX)),
    ("teacher_values", ValueError, topk(Z, V[:, :0], INDEX[:, :0])),
    ("teacher_values", ValueError, topk(Z, torch.ones(4, 1025), torch.zeros(4, 1025).int())),
    ("teacher_indices", TypeError, topk(Z, V, V)),
    ("teacher_indices", TypeError, topk(Z, V, None)),
    ("teacher_indices", TypeError, topk(Z, V, INDEX.short())),
    ("teacher_indices", ValueError, topk(Z, V, INDEX[:, :1])),
    *(("teacher_indices", ValueError, topk(Z, V, index_with(v))) for v in (7, -2, 2**40)),
    ("teacher_indices", ValueError, topk(Z, V, index_with(7).int())),
    ("teacher_indices", ValueError, topk(Z, V, index_with(0))),
    ("tail", ValueError, topk(tail="rest")),
    ("teacher_logsumexp", ValueError, topk(teacher_logsumexp=W)),
    *(
        ("teacher_logsumexp", ValueError, topk(tail=tail, **options))
        for tail in ("bucket", "ignore")
        for options in ({}, {"teacher_kind": "log_probs", "temperature": 2.0})
    ),
    ("teacher_logsumexp", ValueError, topk(tail="bucket", teacher_logsumexp=W[:2])),
    ("teacher_logsumexp", TypeError, topk(tail="bucket", teacher_logsumexp=W.int())),
    ("teacher_logsumexp", TypeError, topk(tail="bucket", teacher_logsumexp=1.0)),
    # The heads.
    ("student_hidden", TypeError, linear(H.int(), HEAD, TH, THEAD)),
    ("student_weight", TypeError, linear(H, HEAD.double(), TH, THEAD)),
    ("student_weight", ValueError, linear(H, HEAD[:, :2], TH, THEAD)),
    ("student_weight", ValueError, linear(H, HEAD[:0], TH, THEAD)),
    ("student_bias", ValueError, linear(student_bias=W)),
    ("student_bias", TypeError, linear(student_bias=torch.zeros(7).double())),
    ("teacher_weight", ValueError, linear(H, HEAD, TH)),
    ("teacher_weight", ValueError, linear(H, HEAD, TH, THEAD[:, :4])),
    ("teacher_hidden", ValueError, linear(H, HEAD)),
    ("teacher_hidden", ValueError, linear(H, HEAD, None, THEAD)),
    ("teacher_logits", ValueError, linear(teacher_logits=T)),
    ("teacher_values", ValueError, linear(teacher_values=V, teacher_indices=INDEX)),
    ("teacher_indices", ValueError, linear(H, HEAD, teacher_values=V)),
    ("teacher_bias", ValueError, linear(teacher_bias=W)),
    ("teacher_bias", ValueError, linear(H, HEAD, teacher_logits=T, teacher_bias=torch.zeros(7))),
    *(
        (f"teacher_{name}", ValueError, linear(H, HEAD, **{**given, f"teacher_{name}": grad}))
        for name, given, grad in (
            ("logits", {}, T.clone().requires_grad_()),
            ("hidden", {"teacher_weight": THEAD}, TH.clone().requires_grad_()),
            ("weight", {"teacher_hidden": TH}, THEAD.clone().requires_grad_()),
        )
    ),
    ("tail", ValueError, linear(tail="bucket")),
    ("teacher_logsumexp", ValueError, linear(teacher_logsumexp=W)),
    *(
        (
            name,
            ValueError,
            linear(H, HEAD, teacher_values=V, teacher_indices=INDEX, **{name: value}),
        )
        for name, value in (
            ("standardize", True),
            ("teacher_soft_cap", 2.0),
            ("teacher_logit_scale", 2.0),
            ("teacher_weights", [1.0]),
        )
    ),
    *(
        ("sparse_gradient", ValueError, topk(Z * 1, V, INDEX, sparse_gradient=True, **options))
        for options in ({"tail": "bucket", "teacher_logsumexp": W}, {"labels": Y, "alpha": 0.5})
    ),
    *(("backend", ValueError, f(backend="cuda")) for f in (topk, linear)),
    *(("memory_budget", ValueError, linear(memory_budget=v)) for v in (0, -1)),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_argument_is_named(case):
    name, error, call = BAD[case]
    with pytest.raises(error, match=rf"\b{name}\b") as raised:
        call()
    assert type(raised.value) is error


# ---- a sampled teacher --------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 1.5])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_samples_weigh_what_their_draw_was_worth(power, temperature):
    """Over many rows alike they are the teacher, whatever they were drawn from."""
    teacher = logits(1, 12, scale=2.0).expand(2000, 12)
    p = (teacher[0].double() / temperature).softmax(-1)
    sample = kdkernels.sample_teacher(
        teacher, 256, temperature=temperature, proposal_power=power, generator=generator(3)
    )
    shares = (sample.values.double() / temperature).exp() * (sample.indices >= 0)
    torch.testing.assert_close(shares.sum(-1), torch.ones(2000).double(), rtol=0, atol=1e-5)
    assert (sample.logsumexp == 0).all()
    found = torch.zeros(2000, 12, dtype=torch.float64)
    found.scatter_add_(-1, sample.indices.clamp(min=0).long(), shares)
    # Weights that are scaled to sum 1 leave a bias of about one in the number of draws.
    torch.testing.assert_close(found.mean(0), p, rtol=0, atol=0.01)


def test_defaults_are_those_of_the_papers():
    parameters = {name: entry.parameters for name, entry in reference.DIVERGENCES.items()}
    assert {name: numbers for name, numbers in parameters.items() if numbers} == {
        "js": {"beta": 0.5},
        "skew_forward_kl": {"beta": 0.1},
        "skew_reverse_kl": {"beta": 0.1},
        "alpha_beta": {"divergence_alpha": 0.2, "beta": 0.7},
        "decoupled": {"divergence_alpha": 1.0, "beta": 8.0},
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("divergence", ["js", "skew_forward_kl", "skew_reverse_kl"])
def test_mixtures_that_are_almost_one_side_keep_four_digits(divergence, dtype):
    """Where D falls with the other side's share or with its square, and is still not negative."""
    z, t = pair(6, 1000, dtype=dtype)
    for beta in (0.0003, 0.01, 0.1, 0.4, 0.6, 0.9, 0.99, 0.9997):
        options = {"divergence": divergence, "beta": beta, "reduction": "none"}
        want, right, _ = fp64(z, t, **options)
        loss, got = loss_and_students_gradient(distillation_loss, z, t, **options)
        assert (loss >= 0).all()
        torch.testing.assert_close(loss.double(), want, rtol=2e-4, atol=1e-12)
        largest = right.abs().amax(-1, keepdim=True)
        allowed = 1e-3 * largest + HALF_ULP.get(dtype, 0) * right.abs() + 2.0**-24
        assert ((got.double() - right).abs() <= allowed).all()
        if not 0.01 <= beta <= 0.99:
            continue
        close = (z + 0.7 * t.double() / 3).to(dtype)  # many classes where no series helps yet
        want, *_ = fp64(z, close, **options)
        loss = distillation_loss(z, close, **options)
        torch.testing.assert_close(loss.double(), want, rtol=4e-5, atol=0)
