"""The settings of the tools; torch is not imported."""

import dataclasses

from kdkernels.train.settings import Checked, choice, count, flag, path, real, several, text


# fmt: off
@dataclasses.dataclass(frozen=True)
class Bench(Checked):
    """``kdkernels bench``."""

    quick: bool = flag("what people use most, in a minute; all of it is `make bench` in the source "
                       "folder")
    threads: int | None = count(None, "CPU threads (default: torch's choice)")
    json: str | None = path(None, "write everything that was measured to FILE (default: to none)",
                            "FILE")


@dataclasses.dataclass(frozen=True)
class Compare(Checked):
    """``kdkernels compare``, beside the runs."""

    out: str = path("compare.html", "the page", "FILE")


@dataclasses.dataclass(frozen=True)
class Predict(Checked):
    """``kdkernels predict-teacher``, beside the settings that it shares with ``distill``."""

    out: str = path(dataclasses.MISSING, "folder for the predictions; the same command continues "
                    "what it left there")
    teacher_weights: str = path(dataclasses.MISSING, "a .safetensors or .pth file, such as a run's "
                                "checkpoints/teacher.safetensors", "FILE", absolute=True)
    top_k: int | None = count(None, "keep the K largest logits of an image (default: all)",
                              high=1024, metavar="K")
    dtype: str = choice("float16", "of the logits", names=("float16", "bfloat16", "float32"))
    batch_size: int = count(256, "images a forward pass")
    train_samples: int | None = count(None, "predict the first N only (default: all)")


FORMATS = {
    "onnx": ("", "fp32"),
    "int8": ("-int8", "int8, calibrated"),
    "int8-qat": ("-int8-qat", "int8, trained for it"),
}
"""What can be exported: the end of the file's name, and what the table calls it."""


@dataclasses.dataclass(frozen=True)
class Export(Checked):
    """``kdkernels export``, beside the run."""

    arm: str = text("full", "whose student, as the run's tables call it")
    formats: tuple[str, ...] = several(tuple(FORMATS), "which of onnx (fp32), int8 (calibrated), "
                                       "int8-qat (trained on, with int8's rounding and the "
                                       "teacher) (default: all three)", names=tuple(FORMATS))
    epochs: int = count(3, "of int8-qat")
    lr: float = real(1e-4, "Adam's learning rate of int8-qat", above=True)
    threads: int | None = count(None, "CPU threads, also of what is timed (default: torch's "
                                "choice)")


@dataclasses.dataclass(frozen=True)
class Search(Checked):
    """``kdkernels tune``."""

    search: str = text("temperature,alpha,divergence,noise", "what to try, such as "
        "temperature=1:16,alpha=0:1,divergence=forward_kl|js,lr: names alone, low:high "
        "(low:high:points for a grid) or values separated by |; names: temperature, alpha, lr, "
        "divergence, beta, noise, input_std, gradient_std, parameter_std, regularizer_lam "
        "(default: temperature,alpha,divergence,noise, and what goes with them)", metavar="SPACE")
    sampler: str = choice("tpe", "tpe (tree-structured Parzen estimator) learns from the trials so "
                          "far; tpe and random begin with the defaults",
                          names=("tpe", "random", "grid"))
    trials: int | None = count(None, "in all (default: 30, or all points of a grid)")
    seeds: int = count(1, "runs of a trial, whose mean counts")
    validation: float = real(0.2, "share of the training images that is held out for the trials' "
                             "accuracy", low=0.01, high=0.9)
    prune: str = choice("none", "stop trials that do badly after an epoch",
                        names=("none", "median", "hyperband"))
    confirm: int = count(3, "runs each of the best trial's settings and of the defaults, on the "
                         "test images", low=0)


@dataclasses.dataclass(frozen=True)
class Workers(Checked):
    """How ``tune`` runs its trials."""

    workers: int = count(1, "processes that run trials beside each other")
    threads: int | None = count(None, "CPU threads of a worker (default: torch's choice, shared "
                                "out among the workers)")
# fmt: on
