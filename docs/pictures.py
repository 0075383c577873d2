"""The site's pictures, each drawn of what the ops compute: ``python docs/pictures.py FOLDER``.

Each is an SVG in two colourings, NAME-light.svg and NAME-dark.svg.
"""

import sys
from pathlib import Path

import matplotlib
import torch
from torch.nn import functional as F

import kdkernels
from kdkernels.measuring import _silent_stderr

matplotlib.use("svg")
from matplotlib import pyplot as plt  # noqa: E402

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999", "#b8a400")
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "kdkernels",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": plt.cycler(color=COLOURS),
    "axes.titlesize": 10,
    "legend.frameon": False,
    "savefig.transparent": True,
    "figure.constrained_layout.use": True,
}
INKS = {"light": "#333333", "dark": "#c8ccd0"}


def axes(columns=2, height=3.0, **options):
    """Axes side by side on one figure."""
    return plt.subplots(1, columns, figsize=(7.6, height), **options)


def gradient_of(loss_of, logits):
    """(loss, gradient) of a loss of one row's logits, for many rows at once."""
    logits = logits.clone().requires_grad_()
    loss = loss_of(logits)
    if not loss.isfinite().all():
        raise ArithmeticError("a loss to be drawn is not finite")
    return loss.detach(), torch.autograd.grad(loss.sum(), logits)[0]


def divergences():
    """Every divergence and its gradient, over one logit of a student."""
    z = torch.zeros(401, 3, dtype=torch.float64)
    z[:, 0] = torch.linspace(-6, 6, 401)
    teacher = torch.tensor([1.5, 0.5, -0.5], dtype=torch.float64).expand(401, 3)
    figure, (left, right) = axes(height=3.4)
    for name in kdkernels.divergences():
        labels = torch.zeros(401, dtype=torch.int64) if name == "decoupled" else None
        share = 1.0 if labels is not None else None

        def loss_of(x, name=name, labels=labels, share=share):
            return kdkernels.distillation_loss(
                x, teacher, labels, alpha=share, divergence=name, reduction="none"
            )

        loss, gradient = gradient_of(loss_of, z)
        style = "--" if name == "decoupled" else "-"
        left.plot(z[:, 0], loss, style, label=name)
        right.plot(z[:, 0], gradient[:, 0], style)
    for ax in (left, right):
        ax.axvline(1.5, color="gray", linewidth=0.7, linestyle=":")
        ax.set_xlabel("the student's logit of a class; the teacher's is 1.5")
    left.set(title="D(p, q)", ylim=(0, 3))
    right.set(title="dD / dz of that logit", ylim=(-0.7, 0.5))
    figure.legend(loc="outside lower center", ncols=4)
    return figure


def between_the_kls():
    """The js divergence as beta goes from 0 to 1."""
    generator = torch.Generator().manual_seed(3)
    t, z = (2 * torch.randn(1, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    betas = torch.linspace(0.004, 0.996, 249)
    js = torch.stack(
        [kdkernels.distillation_loss(z, t, divergence="js", beta=float(b)) for b in betas]
    )
    ends = [kdkernels.distillation_loss(z, t, divergence="js", beta=b) for b in (0, 1)]
    figure, ax = axes(1, height=2.9)
    ax.plot(betas, js / (betas * (1 - betas)), label="js / (beta (1 - beta))")
    ax.plot(betas, js, label="js")
    ax.plot(0, ends[0], "o", color=COLOURS[2], label="beta = 0: forward KL", clip_on=False)
    ax.plot(1, ends[1], "o", color=COLOURS[3], label="beta = 1: reverse KL", clip_on=False)
    ax.set(xlabel="beta", xlim=(0, 1), ylim=(0, None))
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def temperature():
    """What the temperature does to the targets and to the gradient."""
    t = torch.tensor([[6.0, 4.0, 3.5, 2.0, 1.0, 0.5, 0.0, -1.0, -1.5, -2.0]], dtype=torch.float64)
    figure, (left, right) = axes()
    for k, temperature in enumerate((1, 2, 4, 8)):
        places = torch.arange(10) + 0.2 * (k - 1.5)
        left.bar(places, (t / temperature).softmax(-1)[0], 0.2, label=f"T = {temperature}")
    left.set(title="the teacher's soft targets", xlabel="class", xticks=range(10))
    left.legend()
    temperatures = torch.logspace(-0.5, 2, 60)
    sizes = []
    for temperature in temperatures.tolist():
        z = torch.zeros_like(t)
        _, gradient = gradient_of(
            lambda x, T=temperature: kdkernels.distillation_loss(x, t, temperature=T), z
        )
        sizes.append(gradient.norm())
    sizes = torch.stack(sizes)
    right.loglog(temperatures, sizes, label="of T² D, as here")
    right.loglog(temperatures, sizes / temperatures**2, label="of D")
    right.set(title="norm of the gradient in the student's logits", xlabel="T")
    right.legend()
    return figure


def top_k():
    """How far a sparse teacher's gradient is from the dense one's."""
    generator = torch.Generator().manual_seed(0)
    rows, classes = 32, 4096
    t = 3 * torch.randn(rows, classes, generator=generator)
    z = t + torch.randn(rows, classes, generator=generator)
    _, dense = gradient_of(lambda x: kdkernels.distillation_loss(x, t, reduction="sum"), z)
    counts = [2**i for i in range(11)]
    error = {"renormalize": [], "bucket": [], "one sample": [], "mean of 64 samples": []}

    def far(gradient):
        return float((gradient - dense).norm() / dense.norm())

    for k in counts:
        top = kdkernels.topk_teacher(t, k)
        for tail in ("renormalize", "bucket"):
            more = {} if tail == "renormalize" else {"teacher_logsumexp": top.logsumexp}

            def loss_of(x, top=top, tail=tail, more=more):
                return kdkernels.topk_distillation_loss(
                    x, top.values, top.indices, tail=tail, reduction="sum", **more
                )

            error[tail].append(far(gradient_of(loss_of, z)[1]))
        drawn = []
        for _ in range(64):
            sample = kdkernels.sample_teacher(t, k, generator=generator)

            def loss_of(x, sample=sample):
                return kdkernels.topk_distillation_loss(
                    x,
                    sample.values,
                    sample.indices,
                    tail="ignore",
                    teacher_kind="log_probs",
                    teacher_logsumexp=sample.logsumexp,
                    reduction="sum",
                )

            drawn.append(gradient_of(loss_of, z)[1])
        error["one sample"].append(far(drawn[0]))
        error["mean of 64 samples"].append(far(torch.stack(drawn).mean(0)))
    figure, ax = axes(1, height=3.2)
    for (name, values), marker in zip(error.items(), "osv^", strict=True):
        ax.loglog(counts, values, marker=marker, markersize=4, label=name)
    ax.set(
        xlabel="classes a row that are kept, or draws, of 4,096",
        ylabel="|gradient - dense| / |dense|",
    )
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def fused_linear():
    """The most memory that the loss of two heads held at a time, as PyTorch's allocator saw it."""
    rows, width, classes = 256, 64, 16000
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    h, th, w, tw = (random(n, width) for n in (rows, rows, classes, classes))
    h.requires_grad_(), w.requires_grad_()

    def plain():
        z, t = h @ w.T, (th @ tw.T)
        loss = F.kl_div(z.log_softmax(-1), t.log_softmax(-1), log_target=True, reduction="sum")
        return loss / rows

    ways = {
        "plain PyTorch": plain,
        "distillation_loss": lambda: kdkernels.distillation_loss(h @ w.T, th @ tw.T),
        "inplace=True": lambda: kdkernels.distillation_loss(h @ w.T, th @ tw.T, inplace=True),
        "linear_distillation_loss": lambda: kdkernels.linear_distillation_loss(h, w, th, tw),
        "memory_budget=2**20": lambda: kdkernels.linear_distillation_loss(
            h, w, th, tw, memory_budget=2**20
        ),
    }
    peaks = [peak_of(lambda way=way: way().backward()) for way in ways.values()]
    figure, ax = axes(1, height=2.2)
    bars = ax.barh(list(ways), [peak / 2**20 for peak in peaks], color=COLOURS[0])
    ax.bar_label(bars, fmt="%.0f MiB", padding=3)
    ax.invert_yaxis()
    ax.axvline(rows * classes * 4 / 2**20, color="gray", linewidth=0.8, linestyle=":")
    ax.set_xlabel(f"MiB, {rows} rows of {classes:,} classes in fp32; dotted: one [rows, classes]")
    return figure


def peak_of(function):
    """Bytes that PyTorch's CPU allocator held at most during a call, beyond what it held before."""
    function()  # leaves' gradients are there from now on
    cpu = torch.profiler.ProfilerActivity.CPU
    with _silent_stderr(), torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        function()
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def shared_vocabulary():
    """The gradient of one loss, cut where four ranks cut it."""
    generator = torch.Generator().manual_seed(1)
    t, z = (1.5 * torch.randn(12, 40, generator=generator) for _ in range(2))
    _, gradient = gradient_of(lambda x: kdkernels.distillation_loss(x, t, reduction="sum"), z)
    largest = float(gradient.abs().max()) / 2
    figure, parts = axes(4, height=2.3)
    for rank, (ax, columns) in enumerate(zip(parts, gradient.chunk(4, -1), strict=True)):
        ax.imshow(columns, cmap="RdBu", vmin=-largest, vmax=largest, aspect="auto")
        ax.set(title=f"rank {rank}: classes {10 * rank} to {10 * rank + 9}", xticks=[], yticks=[])
        if rank:
            ax.annotate(
                "",
                (-0.01, 0.5),
                (-0.2, 0.5),
                "axes fraction",
                arrowprops={"arrowstyle": "<->", "color": "gray"},
                annotation_clip=False,
            )
    figure.get_layout_engine().set(wspace=0.12)
    parts[0].set_ylabel("rows")
    figure.supxlabel("↔ numbers of rows: each side's largest logit, sums, terms", fontsize=9.5)
    return figure


def distributions():
    """Histograms of the noise, all of variance 1."""
    from kdkernels.noise import DISTRIBUTIONS

    figure, parts = axes(5, height=2.0, sharex=True)
    for ax, name in zip(parts, DISTRIBUTIONS, strict=True):
        eps = kdkernels.randn_like(torch.empty(2**20), seed=0, distribution=name)
        ax.hist(eps.numpy(), 121, (-4.03, 4.03), density=True)
        ax.set(title=name, yticks=[], xlabel=f"std {float(eps.std()):.3f}")
        ax.spines.left.set_visible(False)
    return figure


def shards():
    """A tensor's noise, and what four shards of it draw by themselves."""
    whole = kdkernels.randn_like(torch.empty(48), seed=7, step=3)
    figure, ax = axes(1, height=2.4)
    lines = ax.stem(range(48), whole, linefmt="gray", markerfmt=" ", basefmt=" ")
    lines[1].set_label("randn_like(x), 48 elements")
    for rank in range(4):
        offset = 12 * rank
        part = kdkernels.randn_like(torch.empty(12), seed=7, step=3, offset=offset)
        ax.plot(range(offset, offset + 12), part, "o", label=f"12 of offset={offset}")
    ax.set(xlabel="element", ylabel="noise")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def optimizers():
    """Schedules of the noise, and what SGLD samples."""
    figure, (left, right) = axes(height=3.1)
    steps = range(1000)
    for label, schedule in {
        "neelakantan(eta=0.3)": kdkernels.neelakantan(eta=0.3),
        "neelakantan(eta=0.01)": kdkernels.neelakantan(eta=0.01),
        "cosine(0.4, steps=800)": kdkernels.cosine(0.4, steps=800),
        "exponential(0.4, decay=0.995)": kdkernels.exponential(0.4, decay=0.995),
    }.items():
        left.plot(steps, [schedule(t) for t in steps], label=label)
    left.set(title="std over the steps", xlabel="step", ylim=(0, 0.6))
    left.legend()

    theta = torch.zeros(50_000, requires_grad=True)  # as many chains, each of one number
    optimizer = kdkernels.SGLD([theta], lr=0.01, seed=0)
    for _ in range(3000):
        optimizer.zero_grad()
        (2 * (theta**2 - 1) ** 2 + 0.5 * theta).sum().backward()
        optimizer.step()
    x = torch.linspace(-2, 2, 400)
    density = (-(2 * (x**2 - 1) ** 2 + 0.5 * x)).exp()
    right.hist(theta.detach().numpy(), 120, (-2, 2), density=True, label="SGLD, 50,000 chains")
    right.plot(x, density / torch.trapezoid(density, x), label="exp(-U) / Z")
    right.set(title="U = 2 (θ² - 1)² + θ / 2", xlabel="θ", yticks=[])
    right.legend()
    return figure


def regularization():
    """The soft regulariser beside the perturbed loss, and training without gradients."""
    import sklearn.datasets

    x, y = sklearn.datasets.load_digits(return_X_y=True)
    x, y = torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)

    def network():
        torch.manual_seed(0)
        return torch.nn.Linear(64, 10)

    model = network()
    params = list(model.parameters())

    def loss_fn():
        return F.cross_entropy(model(x), y)

    figure, (left, right) = axes(height=3.1)
    lams = torch.linspace(-0.6, 0.6, 41).tolist()
    moved, soft = [], []
    for lam in lams:
        with torch.no_grad(), kdkernels.perturbed_parameters(params, lam, seed=0):
            moved.append(loss_fn().item())
        soft.append(kdkernels.soft_regularization(loss_fn, params, lam, seed=0).item())
    left.plot(lams, moved, label="L(θ + λ eps)")
    left.plot(lams, soft, label="L + λ Σ eps dL/dθ")
    left.set(xlabel="λ", ylabel="loss")
    left.legend()

    def score():
        return -loss_fn()

    for name, steps in {"evolution_step, 32 members": 150, "mezo_step, 8 directions": 300}.items():
        model = network()
        params, curve = list(model.parameters()), []
        for step in range(steps):
            if name.startswith("mezo"):
                kdkernels.mezo_step(params, loss_fn, lr=0.1, directions=8, seed=0, step=step)
                calls = 16
            else:
                kdkernels.evolution_step(
                    params, score, population=32, std=0.05, lr=0.02, seed=0, step=step
                )
                calls = 32
            curve.append(float((model(x).argmax(-1) == y).float().mean()))
        right.plot([calls * (k + 1) for k in range(steps)], curve, label=name)
    right.set(xlabel="forward passes, without any backward", ylabel="accuracy on digits")
    right.legend(loc="lower right")
    return figure


def regression():
    """Experiment 1: theta under noise, one replica and the mean of 4,096."""
    x = torch.linspace(-1, 1, 100, dtype=torch.float64)
    y = 3 * x
    lam, sigma = 0.01, 0.5
    path = kdkernels.noisy_linear_regression(
        x,
        y,
        torch.zeros(4096),
        steps=400,
        lr=0.02,
        lam=lam,
        sigma=sigma,
        seed=torch.arange(4096),
        noise="per-sample",
        trajectory=True,
    )
    ridge = float((x * y).mean() / ((x**2).mean() + sigma**2 + lam / 2))
    low, high = torch.quantile(path, torch.tensor([0.025, 0.975], dtype=path.dtype), dim=1)
    figure, ax = axes(1, height=2.8)
    ax.fill_between(range(401), low, high, alpha=0.3, label="95 % of 4,096 replicas")
    ax.plot(path[:, 0], linewidth=0.8, color=COLOURS[1], label="one replica")
    ax.plot(path.mean(1), color=COLOURS[0], label="their mean")
    ax.axhline(ridge, color="gray", linestyle="--", label="ridge regression")
    ax.axhline(3, color="gray", linestyle=":", label="without noise")
    ax.set(xlabel="step", ylabel="θ")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


PICTURES = {
    "divergences": divergences,
    "js": between_the_kls,
    "temperature": temperature,
    "topk": top_k,
    "linear": fused_linear,
    "vocabulary": shared_vocabulary,
    "noise": distributions,
    "shards": shards,
    "optimizers": optimizers,
    "regularization": regularization,
    "regression": regression,
}


def draw(folder: Path):
    """Write every picture that is not there, or older than this file or the library."""
    folder.mkdir(parents=True, exist_ok=True)
    changed = max(Path(file).stat().st_mtime for file in (__file__, kdkernels._C.__file__))
    for name, make in PICTURES.items():
        paths = {theme: folder / f"{name}-{theme}.svg" for theme in INKS}
        if all(path.exists() and path.stat().st_mtime > changed for path in paths.values()):
            continue
        with plt.rc_context(STYLE):
            figure = make()
            for theme, path in paths.items():
                ink(figure, INKS[theme])
                figure.savefig(path, metadata={"Date": None})
            plt.close(figure)


def ink(figure, colour):
    """Colour what is neither data nor gray."""
    from matplotlib import axis, spines, text

    for item in figure.findobj(lambda x: isinstance(x, (text.Text, spines.Spine, axis.Axis))):
        if isinstance(item, axis.Axis):
            item.set_tick_params(color=colour, labelcolor=colour)
        elif isinstance(item, spines.Spine):
            item.set_edgecolor(colour)
        else:
            item.set_color(colour)


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
