"""The losses of kdkernels.compat against those whose names they have, or their formulas in fp64."""

import math
import os

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kdkernels
from kdkernels import compat

pytestmark = pytest.mark.quick

N, V = 6, 33
BETAS = (0.0, 0.1, 0.5, 1.0)
IGNORED = -100


def random(*shape, seed, scale=3.0):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return scale * values


def pair(*shape, dtype=torch.float32):
    return random(*shape, seed=1).to(dtype), random(*shape, seed=2).to(dtype)


def some_ignored(*shape, classes=V, ignored=IGNORED):
    labels = torch.randint(classes, shape, generator=torch.Generator().manual_seed(3))
    return labels.index_fill(-1, torch.tensor([0, 3]), ignored)


def results(loss_of, *leaves):
    """A loss and its gradient in each of `leaves`, which it is called with."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    loss = loss_of(*leaves)
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def check(ours, theirs, *leaves, precision=1e-11):
    """`ours` in fp32 is `theirs` in fp64 of the same numbers, and so is ours in fp64."""
    leaves = [leaf.float() for leaf in leaves]
    want = results(theirs, *(leaf.double() for leaf in leaves))
    got = results(ours, *leaves)
    precise = results(ours, *(leaf.double() for leaf in leaves))
    for a, exact, b in zip(got, precise, want, strict=True):
        size = b.abs().max().item()
        torch.testing.assert_close(a.double(), b.double(), rtol=2e-5, atol=2e-6 * size)
        torch.testing.assert_close(exact, b.double(), rtol=precision, atol=precision * size)


def jsd(log_p, log_q, beta):
    """arXiv 2306.13649, equation 1, of rows; its limits at 0 and 1."""
    if beta in (0, 1):
        a, b = (log_q, log_p) if beta else (log_p, log_q)
        return (a.exp() * (a - b)).sum(-1)
    m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    terms = beta * log_p.exp() * (log_p - m) + (1 - beta) * log_q.exp() * (log_q - m)
    return terms.sum(-1)


# ---- PyTorch -------------------------------------------------------------------------------------


@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
@pytest.mark.parametrize("shape", [(N, V), (V,), (2, 3, V)])
def test_kl_div_is_pytorchs_behind_its_softmaxes(shape, reduction, log_target):
    def loss(kl_div, **options):
        def of(z, t):
            p = (t / 2).log_softmax(-1) if log_target else (t / 2).softmax(-1)
            return 4 * kl_div((z / 2).log_softmax(-1), p, log_target=log_target, **options)

        return of

    dim = {"dim": -1} if len(shape) > 2 else {}
    ours = loss(compat.kl_div, reduction=reduction, **dim)
    # Both sides' gradients: mutual learning has them.
    check(ours, loss(F.kl_div, reduction=reduction), *pair(*shape))
    z, t = pair(*shape)
    module = compat.KLDivLoss(reduction=reduction, log_target=log_target, **dim)
    p = t.log_softmax(-1) if log_target else t.softmax(-1)
    want = compat.kl_div(z.log_softmax(-1), p, None, None, reduction, log_target, **dim)
    assert torch.equal(module(z.log_softmax(-1), p), want)


def test_gradient_in_log_probabilities_is_another_one():
    z, t = pair(N, V, dtype=torch.float64)
    log_q, p = z.log_softmax(-1), t.softmax(-1)
    _, theirs = results(lambda x: F.kl_div(x, p, reduction="sum"), log_q)
    _, ours = results(lambda x: compat.kl_div(x, p, reduction="sum"), log_q)
    torch.testing.assert_close(theirs, -p)
    torch.testing.assert_close(ours, log_q.exp() - p)

    def behind_log_softmax(gradient):
        return gradient - log_q.exp() * gradient.sum(-1, keepdim=True)

    torch.testing.assert_close(behind_log_softmax(ours), behind_log_softmax(theirs))


def test_kl_div_of_one_call_is_the_idiom():
    def idiom(z, t):
        log_q, p = (z / 3).log_softmax(-1), (t / 3).softmax(-1)
        return F.kl_div(log_q, p, reduction="batchmean") * 3 * 3

    check(lambda z, t: kdkernels.distillation_loss(z, t, temperature=3), idiom, *pair(N, V))


def test_kl_div_with_its_arguments_swapped_is_reverse_kl():
    def loss(kl_div):
        def of(z, t):
            p, q = (t / 2).log_softmax(-1), (z / 2).log_softmax(-1)
            return kl_div(p, q, reduction="batchmean", log_target=True)

        return of

    check(loss(compat.kl_div), loss(F.kl_div), *pair(N, V))
    z, t = pair(N, V)
    ours = kdkernels.distillation_loss(z, t, temperature=2, divergence="reverse_kl") / 4
    torch.testing.assert_close(loss(compat.kl_div)(z, t), ours)


def test_kl_div_of_images_needs_the_dimension():
    z, t = pair(2, V, 4, 5)

    def loss(kl_div, **options):
        return lambda z, t: kl_div(z.log_softmax(1), t.softmax(1), reduction="batchmean", **options)

    check(loss(compat.kl_div, dim=1), loss(F.kl_div), z, t)
    with pytest.raises(ValueError, match="say which one holds the classes"):
        loss(compat.kl_div)(z, t)
    with pytest.raises(ValueError, match="say which one holds the classes"):
        compat.KLDivLoss(reduction="batchmean")(z.log_softmax(1), t.softmax(1))


def test_kl_div_close_to_the_teacher_is_accurate_and_never_negative():
    # Already the softmaxes round; what is left of D = 1e-8 is then good to a few per cent.
    t = random(200, V, seed=1)
    z = t + random(200, V, seed=2, scale=1e-4)
    exact = F.kl_div(z.log_softmax(-1), t.softmax(-1), reduction="none").sum(-1)
    log_q, p = z.float().log_softmax(-1), t.float().softmax(-1)
    ours = torch.stack(
        [compat.kl_div(a, b, reduction="sum") for a, b in zip(log_q, p, strict=True)]
    )
    theirs = F.kl_div(log_q, p, reduction="none").sum(-1)
    assert (ours >= 0).all() and (theirs < 0).any()
    assert ((ours - exact).abs() / exact).median() < 0.05
    assert ((theirs - exact).abs() / exact).median() > 1


def test_kl_div_where_a_class_has_no_probability():
    z, t = pair(N, V)
    z[:, 3] = t[:, 3] = -math.inf
    loss = compat.kl_div(z.log_softmax(-1), t.softmax(-1), reduction="batchmean")
    z, t = (torch.cat((x[:, :3], x[:, 4:]), -1) for x in (z, t))
    want = F.kl_div(z.log_softmax(-1), t.softmax(-1), reduction="batchmean")
    torch.testing.assert_close(loss, want)


def test_kl_div_scales_to_sum_1():
    z, t = pair(N, V)
    want = compat.kl_div(z.log_softmax(-1), t.softmax(-1), reduction="batchmean")
    got = compat.kl_div(z, 5 * t.softmax(-1), reduction="batchmean")
    torch.testing.assert_close(got, want)


def test_what_kl_div_refuses():
    log_q, p = random(N, V, seed=1).log_softmax(-1), random(N, V, seed=2).softmax(-1)
    with pytest.raises(ValueError, match=r'reduction is "none"; here it takes "batchmean".*a row'):
        compat.kl_div(log_q, p, reduction="none")
    with pytest.raises(ValueError, match="pass reduction"):
        compat.kl_div(log_q, p, False)
    with pytest.raises(ValueError, match="shape"):
        compat.kl_div(log_q, p[:1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_may_differ(dtype):
    z, t = pair(N, V)
    z = z.to(dtype)
    got = results(lambda z: compat.generalized_jsd_loss(z, t), z)
    want = results(lambda z: compat.generalized_jsd_loss(z, t), z.float())
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[1].float(), want[1], rtol=2.0**-8, atol=1e-7)
    assert got[0].dtype == torch.float32 and got[1].dtype == dtype


# ---- TRL -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trls():
    pytest.importorskip("trl", reason="trl is not installed")
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl.experimental.gkd import GKDTrainer

    return GKDTrainer.generalized_jsd_loss


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("masked", [False, True])
def test_generalized_jsd_loss_is_trls(trls, beta, temperature, masked):
    labels = some_ignored(2, 5) if masked else None
    for how in (
        {},
        {"reduction": "sum"},
        {"reduction": "mean"},
        {"num_items_in_batch": 17},
        {"num_items_in_batch": torch.tensor(17), "reduction": "sum"},
    ):
        options = {"labels": labels, "beta": beta, "temperature": temperature} | how
        check(
            lambda z, t, o=options: compat.generalized_jsd_loss(z, t, **o),
            lambda z, t, o=options: trls(z, t, **o),
            *pair(2, 5, V),
        )


def test_generalized_jsd_loss_takes_trls_arguments_in_their_order(trls):
    z, t = pair(2, 5, V, dtype=torch.float64)
    arguments = (z, t, some_ignored(2, 5), 0.3, 2.0, "sum")
    torch.testing.assert_close(compat.generalized_jsd_loss(*arguments), trls(*arguments))
    torch.testing.assert_close(compat.generalized_jsd_loss(*arguments, 7), trls(*arguments, 7))


@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
def test_generalized_jsd_loss_without_any_position(reduction):
    labels = torch.full((2, 5), IGNORED)

    def loss(z):
        return compat.generalized_jsd_loss(z, pair(2, 5, V)[1], labels, reduction=reduction)

    value, gradient = results(loss, pair(2, 5, V)[0])
    assert value == 0 and not gradient.any()


def test_generalized_jsd_loss_of_masked_nan(trls):
    z, t = pair(2, 5, V)
    labels = some_ignored(2, 5)
    want = results(lambda z: compat.generalized_jsd_loss(z, t, labels), z)
    z[:, 0] = math.nan
    got = results(lambda z: compat.generalized_jsd_loss(z, t, labels), z)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert results(lambda z: trls(z, t, labels), z)[1].isnan().any()


def test_what_generalized_jsd_loss_refuses():
    with pytest.raises(ValueError, match='reduction is "none"'):
        compat.generalized_jsd_loss(*pair(2, 5, V), reduction="none")
    with pytest.raises(ValueError, match="beta"):
        compat.generalized_jsd_loss(*pair(2, 5, V), beta=2.0)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature, scale, cap", [(1.0, 1.0, None), (2.0, 0.5, 5.0)])
@pytest.mark.parametrize("bias", [False, True])
def test_chunked_divergence_loss_is_trls(beta, temperature, scale, cap, bias):
    pytest.importorskip("trl", reason="trl is not installed")
    from trl.trainer.distillation_trainer import _chunked_divergence_loss as trls

    student, teacher = heads()
    mask = torch.tensor([[0, 1, 1], [1, 0, 1]])
    for items in (None, 17, torch.tensor(17)):

        def run(loss, dtype, items=items):
            h, w, b = (x.to(dtype).requires_grad_() for x in student)
            th, tw, tb = (x.to(dtype).requires_grad_() for x in teacher)
            loss, entropy, count = loss(
                h.view(2, 3, -1),
                th.view(2, 3, -1),
                w,
                tw,
                mask,
                beta,
                items,
                *((b, tb) if bias else (None, None)),
                *(scale, 1.0, cap, cap, temperature),
            )
            leaves = (h, w, b) if bias else (h, w)
            gradients = torch.autograd.grad(loss, (*leaves, th, tw), allow_unused=True)
            assert gradients[-2:] == (None, None) and not entropy.requires_grad
            return loss, entropy, count, *gradients[:-2]

        for a, b in zip(
            run(compat.chunked_divergence_loss, torch.float32),
            run(trls, torch.float32),  # which computes in fp32 in any case
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)


def test_chunked_divergence_loss_of_shared_heads():
    """Heads that FSDP2 shards."""
    from torch import distributed
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    (h, w, _), (th, tw, _) = heads()
    h, w, tw = h.float().view(2, 3, -1), w.float().requires_grad_(), tw.requires_grad_()
    rest = th.view(2, 3, -1), torch.ones(2, 3), 0.5
    want = compat.chunked_divergence_loss(h, rest[0], w, tw, *rest[1:])[0]
    want.backward()
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        shared = [distribute_tensor(x.detach(), mesh, [Shard(0)]).requires_grad_() for x in (w, tw)]
        got = compat.chunked_divergence_loss(h, rest[0], *shared, *rest[1:])[0]
        got.backward()
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(shared[0].grad.to_local(), w.grad)
    finally:
        distributed.destroy_process_group()


# ---- Liger-Kernel --------------------------------------------------------------------------------
# Its Triton kernels need a GPU (bench/peers.py runs their PTX); these are their formulas.


def mean_of_kept(rows, labels, ignored=IGNORED):
    kept = torch.ones_like(rows, dtype=torch.bool) if labels is None else labels != ignored
    return rows[kept].sum() / kept.sum()


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("ignored", [None, IGNORED, 7])
def test_liger_jsd(beta, ignored):
    t = random(N, V, seed=2).float()
    labels = None if ignored is None else some_ignored(N, ignored=ignored)
    options = {} if ignored is None else {"ignore_index": ignored}
    module = compat.LigerJSD(beta, **options)

    def theirs(z):
        rows = jsd(t.double().log_softmax(-1), z.log_softmax(-1), beta)
        return mean_of_kept(rows, labels, ignored)

    # The teacher's log-probabilities of fp32 logits, of which the fp64 formula has more digits.
    def ours(z):
        return module(z.log_softmax(-1), t.to(z.dtype).log_softmax(-1), labels)

    check(ours, theirs, random(N, V, seed=1))


def test_liger_teachers_get_no_gradient():
    z, t = pair(N, V)
    t.requires_grad_()
    z.requires_grad_()
    compat.LigerJSD()(z.log_softmax(-1), t.log_softmax(-1)).backward()
    compat.LigerKLDIVLoss(reduction="sum")(z.log_softmax(-1), t.softmax(-1)).backward()
    h, w, th, tw = (nn.Parameter(random(n, 5, seed=n).float()) for n in (N, V, N, V))
    compat.LigerFusedLinearJSD()(h, w, th, tw, None).backward()
    compat.LigerFusedLinearJSDLoss()(h, w, th, tw, some_ignored(N)).backward()
    assert t.grad is None and th.grad is None and tw.grad is None
    assert z.grad is not None and h.grad is not None and w.grad is not None


@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
@pytest.mark.parametrize("log_target", [False, True])
def test_liger_kl_div(reduction, log_target):
    t = random(N, V, seed=2).float()
    module = compat.LigerKLDIVLoss(1e-10, reduction=reduction, log_target=log_target)

    def loss(kl_div):
        def of(z):
            p = t.to(z.dtype).log_softmax(-1) if log_target else t.to(z.dtype).softmax(-1)
            return kl_div(z.log_softmax(-1), p)

        return of

    def theirs(log_q, p):
        terms = p.exp() * (p - log_q) if log_target else p * (p.log() - log_q)
        return terms.sum() / {"batchmean": N, "mean": N * V, "sum": 1}[reduction]

    check(loss(module), loss(theirs), random(N, V, seed=1))


def heads():
    h, w, b = random(N, 5, seed=1, scale=1), random(V, 5, seed=2, scale=1), random(V, seed=3)
    th, tw, tb = random(N, 4, seed=4, scale=1), random(V, 4, seed=5, scale=1), random(V, seed=6)
    return (h, w, b), tuple(x.float() for x in (th, tw, tb))


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("masked", [False, True])
def test_liger_fused_linear_jsd(beta, temperature, masked):
    (h, w, _), teacher = heads()
    labels = some_ignored(N) if masked else None
    module = compat.LigerFusedLinearJSD(beta, IGNORED, temperature, torch.float32)

    def ours(h, w):
        return module(h, w, *(x.to(h.dtype) for x in teacher[:2]), labels)

    def theirs(h, w):
        logits = F.linear(teacher[0].double(), teacher[1].double()), F.linear(h, w)
        rows = jsd(*((x / temperature).log_softmax(-1) for x in logits), beta)
        return mean_of_kept(rows, labels)

    check(ours, theirs, h, w)


@pytest.mark.parametrize("kind", [compat.LigerFusedLinearJSD, compat.LigerFusedLinearJSDLoss])
def test_fused_linear_teachers_of_another_dtype(kind):
    (h, w, _), (th, tw, _) = heads()
    h, w, th, tw = h.float(), w.float(), th.bfloat16(), tw.bfloat16()
    got = results(lambda h, w: kind()(h, w, th, tw, some_ignored(N)), h, w)
    want = results(lambda h, w: kind()(h, w, th.float(), tw.float(), some_ignored(N)), h, w)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_heads_of_another_dtype_than_the_hidden_states():
    """Master weights of a student whose states are bf16, as FSDP2 has them."""
    (h, w, b), (th, tw, tb) = heads()
    h, th, w, b = h.bfloat16(), th.bfloat16(), w.float(), b.float()

    def loss(w, b):
        mask = torch.ones(N)
        return compat.chunked_divergence_loss(h, th, w, tw, mask, 0.5, None, b, tb)[0]

    got, want = results(loss, w, b), results(loss, w.bfloat16(), b.bfloat16())
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b.float())


def test_labels_only_say_what_is_left_out():
    """TRL and Liger compare them with ignore_index, and take any numbers of any type."""
    z, t = pair(N, V)
    labels = some_ignored(N)
    odd = (labels + 1000 * (labels != IGNORED)).int()
    (h, w, _), (th, tw, _) = heads()
    for loss in (
        lambda y: compat.generalized_jsd_loss(z, t, y),
        lambda y: compat.LigerJSD()(z.log_softmax(-1), t.log_softmax(-1), y),
        lambda y: compat.LigerFusedLinearJSD()(h.float(), w.float(), th, tw, y),
    ):
        assert torch.equal(loss(odd), loss(labels))


@pytest.fixture(scope="module")
def ligers():
    reason = "liger-kernel is not installed"
    return pytest.importorskip("liger_kernel.chunked_loss", reason=reason).LigerFusedLinearJSDLoss


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("hard, soft", [(0.5, 0.5), (0.0, 1.0), (1.0, 0.0), (0.3, 4.0)])
@pytest.mark.parametrize("bias", [False, True])
def test_liger_fused_linear_jsd_loss(ligers, beta, temperature, hard, soft, bias):
    student, teacher = heads()
    labels = some_ignored(N)
    options = (hard, soft, beta, IGNORED, temperature, False, 2)

    def loss(kind):
        def of(h, w, *b):
            th, tw, tb = (x.to(h.dtype) for x in teacher)
            return kind(*options)(h, w, th, tw, labels, *b, *([tb] if b else []))

        return of

    student = student if bias else student[:2]
    # Also of fp64 tensors Liger's loss is fp32, and its cross-entropy made in it.
    check(loss(compat.LigerFusedLinearJSDLoss), loss(ligers), *student, precision=2e-6)


def test_liger_fused_linear_jsd_loss_of_two_terms(ligers):
    (h, w, b), (th, tw, tb) = heads()
    h, w, b = (x.float().requires_grad_() for x in (h, w, b))

    def run(kind, several):
        module = kind(0.3, 0.6, temperature=2.0, compiled=False, return_soft_hard_loss=several)
        out = module(h, w, th, tw, some_ignored(N), b, tb)
        loss = out[0] if several else out
        return (*(out if several else [out]), *torch.autograd.grad(loss, (h, w, b)))

    ours, theirs = run(compat.LigerFusedLinearJSDLoss, True), run(ligers, True)
    for a, b_ in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b_)
    for a, b_ in zip(run(compat.LigerFusedLinearJSDLoss, False), ours[:1] + ours[3:], strict=True):
        torch.testing.assert_close(a, b_)
    assert not ours[1].requires_grad and not ours[2].requires_grad


def test_what_liger_fused_linear_jsd_loss_refuses():
    (h, w, _), (th, tw, _) = heads()
    with pytest.raises(ValueError, match=r"weights of hard and soft loss are -1 and 0\.5"):
        compat.LigerFusedLinearJSDLoss(-1)(h.float(), w.float(), th, tw, some_ignored(N))
    with pytest.raises(ValueError, match="shape|classes|teacher_weight"):
        compat.LigerFusedLinearJSDLoss()(h.float(), w.float()[1:], th, tw, some_ignored(N) % 2)


# ---- torchdistill --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torchdistills():
    reason = "torchdistill is not installed"
    return pytest.importorskip("torchdistill.losses.mid_level", reason=reason).KDLoss


WHERE = ("fc", "output", "head", "output")  # of the student's logits, and of the teacher's


def kd_loss(kind, targets, *arguments, **options):
    module = kind(*WHERE, *arguments, **options)
    return lambda z, t: module({"fc": {"output": z}}, {"head": {"output": t}}, targets)


CLASSES = torch.arange(N) % V
SOFT = random(N, V, seed=9).softmax(-1).float()


@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
@pytest.mark.parametrize(
    "arguments, options, targets",
    [
        ((4.0, 0.3), {}, CLASSES),
        ((4.0, 0.3, 2.0), {}, CLASSES),
        ((4.0, 1.0), {}, CLASSES),
        ((4.0, 0.3), {"label_smoothing": 0.1}, CLASSES),
        ((4.0, 0.3), {"weight": torch.linspace(0, 1, V)}, CLASSES),
        ((4.0, 0.3), {"ignore_index": 2}, CLASSES),
        ((4.0, 0.3), {}, SOFT),
        ((4.0, 0.3), {}, None),  # the divergence alone, without T^2
        ((4.0, 0.0, 2.0), {}, CLASSES),
        ((4.0, None, 2.0), {}, CLASSES),
    ],
)
def test_kd_loss_is_torchdistills(torchdistills, arguments, options, targets, reduction):
    def loss(kind):
        def of(z, t):
            def in_dtype(x):
                return x.to(z.dtype) if torch.is_tensor(x) and x.is_floating_point() else x

            how = {name: in_dtype(value) for name, value in options.items()}
            wanted = in_dtype(targets)
            return kd_loss(kind, wanted, *arguments, reduction=reduction, **how)(z, t)

        return of

    check(loss(compat.KDLoss), loss(torchdistills), *pair(N, V))


def test_kd_loss_of_images(torchdistills):
    targets = some_ignored(2, 4, 5)
    check(
        kd_loss(compat.KDLoss, targets, 2.0, 0.3),
        kd_loss(torchdistills, targets, 2.0, 0.3),
        *pair(2, V, 4, 5),
    )


def test_kd_loss_leaves_ignored_samples_out_of_both_terms(torchdistills):
    z, t = pair(N, V, dtype=torch.float64)
    targets = CLASSES.index_fill(0, torch.tensor([1, 4]), IGNORED)
    kept = targets != IGNORED
    got = kd_loss(compat.KDLoss, targets, 2.0, 0.3)(z, t)
    want = kd_loss(torchdistills, targets[kept], 2.0, 0.3)(z[kept], t[kept])
    torch.testing.assert_close(got, want)
    theirs = kd_loss(torchdistills, targets, 2.0, 0.3)(z, t)
    explicit = kd_loss(compat.KDLoss, targets, 2.0, 0.3, ignore_index=IGNORED)(z, t)
    torch.testing.assert_close(explicit, theirs)
    assert not torch.isclose(got, theirs)


def test_kd_loss_without_weights():
    z, t = pair(N, V)
    got = kd_loss(compat.KDLoss, CLASSES, 2.0)(z, t)
    want = F.kl_div((z / 2).log_softmax(1), (t / 2).softmax(1), reduction="batchmean")
    torch.testing.assert_close(got, want)
    with pytest.raises(ValueError, match='reduction is "none"'):
        compat.KDLoss(*WHERE, 2.0, reduction="none")


# ---- all of them ---------------------------------------------------------------------------------


def test_compat_names_are_what_it_says():
    for name in compat.__all__:
        assert getattr(compat, name).__doc__
        assert name in compat.__doc__


def test_compat_compiles_as_one_graph():
    z, t = pair(2, 5, V)
    labels = some_ignored(2, 5)

    distilled = kd_loss(compat.KDLoss, labels[0], 4.0, 0.3)

    def loss(z):
        jsd = compat.generalized_jsd_loss(z, t, labels, 0.3, 2.0)
        kl = compat.kl_div(z.log_softmax(-1), t.softmax(-1), reduction="sum", dim=-1)
        return jsd + kl + distilled(z[0], t[0])

    want = results(loss, z)
    got = results(torch.compile(loss, backend="aot_eager", fullgraph=True), z)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
