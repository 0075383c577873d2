"""The settings of experiments 1, 3 and 4; torch is not imported."""

import dataclasses

from kdkernels.train import SettingError
from kdkernels.train.settings import DATA, Checked, choice, count, path, real, several


# fmt: off
@dataclasses.dataclass(frozen=True)
class Regression(Checked):
    """Experiment 1, linear regression under input noise; see its module for the formula."""

    noise: str = choice("per-step", "one eps a step for all samples, or one each",
                        names=("per-step", "per-sample"))
    steps: int = count(1000, "of a replica", high=2**31)
    lr: float = real(0.01, "learning rate (default: 0.01; mlp, resnet18: 1e-3)", above=True)
    lam: float = real(0.01, "lambda, the weight decay, per unit of lr")
    sigma: float = real(1.0, "standard deviation of the noise, in the unit of x")
    replicas: int = count(4096, "seeds for the mean, the first one and those after it", low=2)
    repeats: int = count(5, "timed runs of each path")
    seed: int = count(0, "of the first replica, or of weights, batches and noise", low=0,
                      high=2**62)


PLACES = {
    "none": "no noise",
    "input": "std * eps on the normalised images",
    "gradient": "noise of variance std² / (1 + step)^0.55 on the gradients",
    "parameter": "std * eps on the weights during forward and backward",
    "regularizer": "the loss L + λ Σ eps_i ∂L/∂θ_i, exact, with parameter's eps",
}
"""The arms of experiment 3: places of :class:`kdkernels.train.noise.Noise`, in words."""

# Chosen with a quarter of digits' training images held out, on seeds from 100 on; the test images
# took no part. mlp's are each the best, or the least harmful, of three or four by held-out loss
# over five seeds; resnet18's do no clear harm, which is all that two seeds could tell.
_OF_MODEL = {
    "mlp": {
        "epochs": 60, "input_std": 0.5, "gradient_std": 0.003, "parameter_std": 0.05,
        "regularizer_lam": 0.05, "threads": 1,
    },
    "resnet18": {
        "epochs": 6, "input_std": 0.5, "gradient_std": 0.01, "parameter_std": 0.01,
        "regularizer_lam": 0.01,
    },
}


def _usual(name: str) -> str:
    values = (f"{values[name]} {model}" for model, values in _OF_MODEL.items())
    return f" (default: {', '.join(values)})"


@dataclasses.dataclass(frozen=True)
class Network(Checked):
    """Experiment 3, a network under four kinds of noise; None is the model's own default."""

    model: str = choice("mlp", "the network", names=tuple(_OF_MODEL))
    data: str = choice("digits", "images to learn", names=DATA)
    data_dir: str = path("data", "folder that holds the images, or gets them by download",
                         absolute=True)
    image_size: int | None = count(None, "side in pixels to which images are resized (default: 8 "
                                   "digits, 32 others)", low=8, high=1024)
    batch_size: int = count(64, "images a step", low=2)
    lr: float = real(1e-3, "Adam's learning rate", above=True)
    epochs: int | None = count(None, "of each run" + _usual("epochs"))
    seeds: int = count(5, "runs of each arm, the first seed and those after it")
    seed: int = count(0, "the first one, of weights, batches and noise", low=0, high=2**62)
    arms: tuple[str, ...] = several(tuple(PLACES), "which of none, input, gradient, parameter, "
                                    "regularizer (default: all five)", names=tuple(PLACES))
    input_std: float | None = real(None, "of the noise on the normalised images"
                                   + _usual("input_std"), high=1e6)
    gradient_std: float | None = real(None, "of the noise on the gradients, in the first step; its "
                                      "variance falls as 1 / (1 + step)^0.55"
                                      + _usual("gradient_std"), high=1e6)
    parameter_std: float | None = real(None, "of the noise on the weights"
                                       + _usual("parameter_std"), high=1e6)
    regularizer_lam: float | None = real(None, "lambda of L + lambda sum eps_i dL/dtheta_i"
                                         + _usual("regularizer_lam"), high=1e6)
    train_samples: int | None = count(None, "use the first N only (default: all)", low=2)
    test_samples: int | None = count(None, "use the first N only (default: all)")
    device: str = choice("auto", "auto is cuda where torch sees one", names=("auto", "cpu", "cuda"))
    threads: int | None = count(None, "CPU threads (default: torch's choice; 1 for mlp)")

    def __post_init__(self):
        super().__post_init__()
        image_size = {"image_size": 8 if self.data == "digits" else 32}
        for name, value in (_OF_MODEL[self.model] | image_size).items():
            if getattr(self, name) is None:
                self._set(name, value)

    def std(self, arm: str) -> float:
        """The standard deviation of an arm's noise, the regulariser's weight; 0 without any."""
        stds = {"regularizer": self.regularizer_lam, "none": 0.0}
        return stds[arm] if arm in stds else getattr(self, f"{arm}_std")


@dataclasses.dataclass(frozen=True)
class Model(Checked):
    """Which experiment ``soft-reg`` runs."""

    model: str = choice("linear", "linear: experiment 1, the regression; mlp, resnet18: experiment "
                        "3, a network under four kinds of noise", names=("linear", *_OF_MODEL))


@dataclasses.dataclass(frozen=True)
class LmArm:
    """What one arm of experiment 4 does.

    Attributes:
        about: in words.
        loss: ``"plain"`` and ``"compiled"`` (PyTorch's own functions on logits), ``"dense"``,
            ``"top k"`` (kdkernels' losses of logits, in place) or ``"linear"`` (of hidden states
            and heads).
        kept: the teacher's output for a token is computed once, before the first epoch, and kept.
        exact: the loss is the reference's but for rounding.
    """

    about: str
    loss: str
    kept: bool = False
    exact: bool = True

    @property
    def passes(self) -> int | None:
        """How often the loss reads or writes a tensor of ``[N, V]``; None: it is counted."""
        return {"dense": 3, "top k": 2, "linear": 0}.get(self.loss)

    @property
    def products(self) -> tuple[str, ...]:
        """The parts of ``language_model.operations`` that its steps compute."""
        teacher = ("teacher body", "teacher head")
        spared = () if not self.kept else teacher[:1] if self.loss == "linear" else teacher
        return ("student body", "student head", *(part for part in teacher if part not in spared))


LM_ARMS = {
    "reference": LmArm("F.kl_div, F.log_softmax and F.cross_entropy of [N, V] logits", "plain"),
    "compiled": LmArm("the reference's loss under torch.compile", "compiled"),
    "dense": LmArm("kdkernels.distillation_loss in place", "dense"),
    "topk": LmArm(
        "kdkernels.topk_distillation_loss in place, of the teacher's largest logits, kept once",
        "top k", kept=True, exact=False,
    ),
    "linear": LmArm("kdkernels.linear_distillation_loss of hidden states and heads", "linear"),
    "full": LmArm("linear, with the teacher's hidden states kept once", "linear", kept=True),
}


@dataclasses.dataclass(frozen=True)
class LanguageModel(Checked):
    """Experiment 4, a language model's loss in six ways.

    There is no warm-up and no clipping; with an lr of 1e-3 the loss jumps at single steps.
    """

    text: str | None = path(None, "text to learn from, in UTF-8: a file, or all files of a folder "
                            "(default: the sources of Python's standard library)", "FILE|DIR",
                            absolute=True)
    vocabulary: int = count(32_000, "entries of the byte-pair vocabulary", low=257, high=2**20)
    context: int = count(128, "tokens a window", low=2, high=2**16)
    batch_size: int = count(8, "windows a step")
    student_width: int = count(256, "of its hidden states, a multiple of 64 or less than that",
                               low=8, high=2**14)
    student_layers: int = count(4, "its blocks", high=256)
    teacher_width: int = count(384, "as the student's", low=8, high=2**14)
    teacher_layers: int = count(6, "its blocks", high=256)
    teacher_steps: int | None = count(None, "that the teacher learns for, on all of the text "
                                      "(default: 300, or 0 for a loaded one)", low=0)
    teacher_weights: str = path("none", "the teacher's first weights: checkpoints/"
                                "teacher.safetensors of a run with these sizes and this text, none "
                                "random", "FILE|none", absolute=True)
    lr: float = real(5e-4, "Adam's learning rate", above=True)
    temperature: float = real(2.0, "of the soft targets", high=1e6, above=True)
    alpha: float = real(0.5, "weight of the soft targets, the next tokens have the rest", high=1)
    k: int = count(64, "largest classes of a token's teacher that the arm topk keeps", high=1024)
    epochs: int = count(3, "of each arm, over train_samples")
    train_samples: int | None = count(240, "windows that the arms learn from, drawn at random")
    test_samples: int | None = count(64, "held-out windows that are tested on, drawn at random")
    arms: tuple[str, ...] = several(("reference", "dense", "topk", "linear", "full"),
                                    "which of reference, compiled, dense, topk, linear, full "
                                    "(default: all but compiled)", names=tuple(LM_ARMS))
    seed: int = count(0, "of weights, windows and batches", low=0, high=2**62)
    device: str = choice("auto", "auto is cuda where torch sees one", names=("auto", "cpu", "cuda"))
    threads: int | None = count(None, "CPU threads (default: torch's choice)")

    def __post_init__(self):
        super().__post_init__()
        for name in ("student_width", "teacher_width"):
            value = getattr(self, name)
            if value > 64 and value % 64:
                raise SettingError(
                    f"{name} is {value}; it must be a multiple of 64, or less than 64"
                )
        if self.k > self.vocabulary:
            raise SettingError(
                f"k is {self.k}; it must be at most vocabulary, which is {self.vocabulary}"
            )
        if self.teacher_steps is None:
            self._set("teacher_steps", 300 if self.teacher_weights == "none" else 0)
# fmt: on
