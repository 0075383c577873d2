"""The ``kdkernels`` command: :func:`main`; ``kdkernels --help`` lists what it does.

Exit status: 0 done; 1 a check failed or a run stopped on the way; 2 bad arguments, or data or
weights that are not there; 130 interrupted. Whatever goes wrong is said in one sentence.
"""

import argparse
import codecs
import dataclasses
import json
import os
import sys
from typing import Any

from kdkernels import divergences

__all__ = ["main"]


class _UsageError(Exception):
    pass


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise _UsageError(f"{self.prog}: {message}; see {self.prog} --help")


def _number(kind, low, high=float("inf"), open_low=False):
    """An argparse type: a number of ``kind`` in [low, high], or in (low, high]."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high or (open_low and value == low):
            noun = "a whole number" if kind is int else "a number"
            least = f"above {low}" if open_low else f"at least {low}"
            most = "" if high == float("inf") else f" and at most {high}"
            raise argparse.ArgumentTypeError(f"{text!r} is not {noun} {least}{most}")
        return value

    return parse


def _list_of(names):
    def parse(text):
        found = tuple(part.strip() for part in text.split(","))
        wrong = [part for part in found if part not in names]
        if wrong or len(set(found)) < len(found):
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a list of different names from {', '.join(names)}"
            )
        return found

    return parse


def _path(text):
    """An argparse type: a path, whose tilde a shell leaves in ``--out=~/run``."""
    return os.path.expanduser(text)


def _source(text):
    """An argparse type: a path that a run reads, also when it is resumed elsewhere."""
    return text if text in ("none", "DEFAULT") else os.path.abspath(_path(text))


# The ops do without these; pyproject's extra "train" names the distributions they come in.
_TRAIN_PACKAGES = (
    "torchvision", "sklearn", "matplotlib", "safetensors", "rich", "jinja2",
)  # fmt: skip
_MORE_PACKAGES = {
    "distill-lm": ("tokenizers",),
    "tune": ("optuna",),
    "export": ("onnx", "onnxscript", "onnxruntime", "torchao"),
}
_COUNT = _number(int, 1)
_STD = _number(float, 0, 1e6)
# Defaults are those of distillation.Settings, soft_regularization.Settings and soft_regression.run,
# repeated in words here so that --help needs no heavy import; a test holds them together.
_OPTIONS = {
    "out": {
        "type": _path,
        "metavar": "DIR",
        "help": "folder for the run, absent or empty (default: runs/<time>)",
    },
    "resume": {
        "type": _path,
        "metavar": "RUN_DIR",
        "help": "continue the run in this folder from its last checkpoint, with its own settings; "
        "of the other options only --epochs may be given, to train on, and --data-dir and "
        "--teacher-predictions where the same files lie elsewhere; its own models are imported "
        "from the folder where it was started",
    },
    "seed": {
        "type": _number(int, 0, 2**62),
        "help": "of weights, batches, dropout and noise (default: 0)",
    },
    "threads": {"type": _COUNT, "help": "CPU threads (default: torch's choice; 1 for mlp)"},
    "device": {
        "choices": ("auto", "cpu", "cuda"),
        "help": "auto is cuda where torch sees one (default: auto)",
    },
    "data": {
        "choices": ("digits", "fashion-mnist", "cifar10", "cifar100", "folder"),
        "help": "images to learn; folder is one of your own, with train/CLASS/*.jpg and "
        "test/CLASS/*.jpg (default: digits)",
    },
    "data_dir": {
        "type": _source,
        "metavar": "DIR",
        "help": "folder that holds the images, or gets them by download (default: data)",
    },
    "augment": {
        "choices": ("none", "crop", "crop-flip", "resized-crop", "trivial"),
        "help": "random changes to the training images (default: none)",
    },
    "views": {
        "type": _COUNT,
        "help": "different augmented images of each, one an epoch in turn, so that the teacher's "
        "predictions of them can be kept (default: new ones each epoch)",
    },
    "normalize": {
        "choices": ("data", "imagenet"),
        "help": "whose mean and deviation images are normalised with (default: data, or imagenet "
        "with --teacher-weights DEFAULT, which were trained so)",
    },
    "validation": {
        "type": _number(float, 0, 0.9),
        "help": "share of the training images that is held out and tested on instead of the test "
        "images (default: 0.0)",
    },
    "teacher": {
        "metavar": "NAME",
        "help": "one of torchvision's classification models, or module:function, which gives your "
        "own for num_classes=N (default: resnet18)",
    },
    "student": {"metavar": "NAME", "help": "the same (default: mobilenet_v2)"},
    "teacher_predictions": {
        "type": _source,
        "metavar": "DIR",
        "help": "what predict-teacher wrote; no teacher is then asked (default: the run's own)",
    },
    "divergence": {
        "choices": tuple(divergences()),
        "help": "of the soft targets (default: forward_kl)",
    },
    "beta": {
        "type": _number(float, 0, 1),
        "help": "of the divergences js and skew_* (default: the divergence's own)",
    },
    "budget": {
        "type": _number(float, 0, open_low=True),
        "metavar": "SECONDS",
        "help": "of training, after which an arm begins no other epoch (default: none)",
    },
    "generations": {
        "type": _COUNT,
        "help": "of students; each one from the second on is taught by the one before (default: 1)",
    },
    "schedule": {
        "choices": ("constant", "cosine"),
        "help": "of the learning rate; cosine falls from --lr to 0 over all epochs "
        "(default: constant)",
    },
    "weight_decay": {
        "type": _number(float, 0),
        "help": "of AdamW; 0 is Adam (default: 0.0)",
    },
    "checkpoint_every": {
        "type": _COUNT,
        "metavar": "STEPS",
        "help": "write a checkpoint within an epoch too (default: at an epoch's end)",
    },
    "config": {
        "type": _path,
        "metavar": "FILE",
        "help": "a JSON object of these options, such as tune's best.json; those given here win",
    },
    "parallel": {
        "choices": ("ddp", "fsdp2"),
        "help": "what trains on several ranks, started by `torchrun --nproc-per-node=N -m "
        "kdkernels distill ...` (default: ddp)",
    },
    "image_size": {
        "type": _number(int, 16, 1024),
        "help": "side in pixels to which images are resized; up to 64 the networks get the "
        "CIFAR stem (default: 32)",
    },
    "batch_size": {"type": _number(int, 2), "help": "images a step (default: 64)"},
    "temperature": {
        "type": _number(float, 0, 1e6, open_low=True),
        "help": "of the soft targets (default: 4.0)",
    },
    "alpha": {
        "type": _number(float, 0, 1),
        "help": "weight of the soft targets, the labels have the rest (default: 0.5)",
    },
    "epochs": {"type": _COUNT, "help": "of each arm, at most (default: 5)"},
    "teacher_epochs": {
        "type": _number(int, 0),
        "help": "of the teacher (default: 3, or 0 for a loaded one that knows the classes)",
    },
    "target_accuracy": {
        "type": _number(float, 0, 1),
        "help": "an arm stops at this test accuracy, 0..1 (default: never early)",
    },
    "teacher_weights": {
        "type": _source,
        "metavar": "DEFAULT|PATH|none",
        "help": "the teacher's first weights: DEFAULT is torchvision's ImageNet ones, PATH a "
        ".safetensors or .pth file, none random (default: none)",
    },
    "arms": {
        "type": _list_of(("alone", "reference", "fused", "cached", "full")),
        "metavar": "A,B",
        "help": "which of alone, reference, fused, cached, full (default: all five)",
    },
    "noise_std": {
        "type": _STD,
        "help": "its standard deviation, of a gradient's in the first step, the regulariser's "
        "weight (default: 0.1 input, 0.01 gradient, 0.01 parameter, 0.01 regularizer)",
    },
    "train_samples": {"type": _number(int, 2), "help": "use the first N only (default: all)"},
    "test_samples": {"type": _COUNT, "help": "use the first N only (default: all)"},
    "noise": {
        "choices": ("per-step", "per-sample"),
        "help": "one eps a step for all samples, or one each (default: per-step)",
    },
    "steps": {"type": _number(int, 1, 2**31), "help": "of a replica (default: 1000)"},
    "lam": {
        "type": _number(float, 0),
        "help": "lambda, the weight decay, per unit of lr (default: 0.01)",
    },
    "sigma": {
        "type": _number(float, 0),
        "help": "standard deviation of the noise, in the unit of x (default: 1.0)",
    },
    "replicas": {"type": _number(int, 2), "help": "seeds for the mean (default: 4096)"},
    "repeats": {"type": _COUNT, "help": "timed runs of each path (default: 5)"},
}  # fmt: skip
# What one command takes in another way than _OPTIONS says.
_OF_DISTILL = {
    "lr": {"type": _number(float, 0, open_low=True), "help": "learning rate (default: 1e-3)"},
    "noise": {
        "choices": ("input", "gradient", "parameter", "regularizer"),
        "help": "one more arm, noisy: full, with this noise on its student (default: no such arm)",
    },
}
_OF_SOFT = {
    "lr": {
        "type": _number(float, 0, open_low=True),
        "help": "learning rate (default: 0.01; mlp, resnet18: 1e-3)",
    },
    "model": {
        "choices": ("linear", "mlp", "resnet18"),
        "help": "linear: experiment 1, the regression; mlp, resnet18: experiment 3, a network "
        "under four kinds of noise (default: linear)",
    },
    "resume": {
        "type": _path,
        "metavar": "RUN_DIR",
        "help": "continue the run of mlp or resnet18 in this folder, with its own settings; of the "
        "other options only --seeds may be given, for more of them",
    },
    "image_size": {
        "type": _number(int, 8, 1024),
        "help": "side in pixels to which images are resized (default: 8 digits, 32 others)",
    },
    "epochs": {"type": _COUNT, "help": "of each run (default: 60 mlp, 6 resnet18)"},
    "seeds": {"type": _COUNT, "help": "runs of each arm, --seed and those after it (default: 5)"},
    "arms": {
        "type": _list_of(("none", "input", "gradient", "parameter", "regularizer")),
        "metavar": "A,B",
        "help": "which of none, input, gradient, parameter, regularizer (default: all five)",
    },
    "input_std": {
        "type": _STD,
        "help": "of the noise on the normalised images (default: 0.5 mlp, 0.5 resnet18)",
    },
    "gradient_std": {
        "type": _STD,
        "help": "of the noise on the gradients, in the first step; its variance falls as "
        "1 / (1 + step)^0.55 (default: 0.003 mlp, 0.01 resnet18)",
    },
    "parameter_std": {
        "type": _STD,
        "help": "of the noise on the weights (default: 0.05 mlp, 0.01 resnet18)",
    },
    "regularizer_lam": {
        "type": _STD,
        "help": "lambda of L + lambda sum eps_i dL/dtheta_i (default: 0.05 mlp, 0.01 resnet18)",
    },
}
_OF_PREDICT = {
    "teacher_weights": {
        "type": _source,
        "metavar": "FILE",
        "required": True,
        "help": "a .safetensors or .pth file, such as a run's checkpoints/teacher.safetensors",
    },
    "top_k": {
        "type": _number(int, 1, 1024),
        "metavar": "K",
        "help": "keep the K largest logits of an image (default: all)",
    },
    "dtype": {
        "choices": ("float16", "bfloat16", "float32"),
        "help": "of the logits (default: float16)",
    },
    "batch_size": {"type": _COUNT, "help": "images a forward pass (default: 256)"},
    "seed": {
        "type": _number(int, 0, 2**62),
        "help": "of the augmentation; distill needs the same (default: 0)",
    },
    "train_samples": {"type": _COUNT, "help": "ask about the first N only (default: all)"},
    "out": {
        "type": _path,
        "metavar": "DIR",
        "required": True,
        "help": "folder for the predictions; the same command continues what it left there",
    },
}
_OF_LM = {
    "text": {
        "type": _source,
        "metavar": "FILE|DIR",
        "help": "text to learn from, in UTF-8: a file, or all files of a folder (default: the "
        "sources of Python's standard library)",
    },
    "vocabulary": {
        "type": _number(int, 257, 2**20),
        "help": "byte-pair tokens, V; trained on the text and kept in ~/.cache/kdkernels "
        "(default: 32000)",
    },
    "context": {"type": _number(int, 2, 2**16), "help": "tokens a window (default: 128)"},
    "batch_size": {"type": _COUNT, "help": "windows a step (default: 8)"},
    "student_width": {
        "type": _number(int, 8, 2**14),
        "help": "of its hidden states, a multiple of 64 or less than that (default: 256)",
    },
    "student_layers": {"type": _number(int, 1, 256), "help": "its blocks (default: 4)"},
    "teacher_width": {"type": _number(int, 8, 2**14), "help": "as the student's (default: 384)"},
    "teacher_layers": {"type": _number(int, 1, 256), "help": "its blocks (default: 6)"},
    "teacher_steps": {
        "type": _number(int, 0),
        "help": "that the teacher learns for, on all of the text (default: 300, or 0 for a loaded "
        "one)",
    },
    "teacher_weights": {
        "type": _source,
        "metavar": "FILE|none",
        "help": "the teacher's first weights: checkpoints/teacher.safetensors of a run with these "
        "sizes and this text, none random (default: none)",
    },
    "lr": {"type": _number(float, 0, open_low=True), "help": "learning rate (default: 5e-4)"},
    "temperature": {
        "type": _number(float, 0, 1e6, open_low=True),
        "help": "of the soft targets (default: 2.0)",
    },
    "k": {
        "type": _number(int, 1, 1024),
        "help": "largest logits of a token's teacher that the arm topk keeps (default: 64)",
    },
    "epochs": {"type": _COUNT, "help": "of each arm, over --train-samples (default: 3)"},
    "train_samples": {
        "type": _COUNT,
        "help": "windows that the arms learn from, drawn at random (default: 240)",
    },
    "test_samples": {
        "type": _COUNT,
        "help": "held-out windows that are tested on, drawn at random (default: 64)",
    },
    "seed": {"type": _number(int, 0, 2**62), "help": "of weights and batches (default: 0)"},
    "threads": {"type": _COUNT, "help": "CPU threads (default: torch's choice)"},
    "arms": {
        "type": _list_of(("reference", "compiled", "dense", "topk", "linear", "full")),
        "metavar": "A,B",
        "help": "which of reference, compiled, dense, topk, linear, full (default: all but "
        "compiled)",
    },
}
_OF_BENCH = {
    "quick": {
        "action": "store_true",
        "help": "what people use most, in a minute; all of it is `make bench` in the source folder",
    },
    "threads": {"type": _COUNT, "help": "CPU threads (default: torch's choice)"},
    "json": {
        "type": _path,
        "metavar": "FILE",
        "help": "write everything that was measured to FILE",
    },
}
_OF_TUNE = {
    "search": {
        "metavar": "SPACE",
        "help": "what to try, such as temperature=1:16,alpha=0:1,divergence=forward_kl|js,lr: "
        "names alone, low:high (low:high:points for a grid) or values separated by |; names: "
        "temperature, alpha, lr, divergence, beta, noise, input_std, gradient_std, parameter_std, "
        "regularizer_lam (default: temperature,alpha,divergence,noise, and what goes with them)",
    },
    "sampler": {
        "choices": ("tpe", "random", "grid"),
        "help": "tpe learns from the trials so far (default: tpe)",
    },
    "trials": {"type": _COUNT, "help": "in all (default: 30, or all points of a grid)"},
    "seeds": {"type": _COUNT, "help": "runs of a trial, whose mean counts (default: 1)"},
    "validation": {
        "type": _number(float, 0.01, 0.9),
        "help": "share of the training images that is held out for the trials' accuracy "
        "(default: 0.2)",
    },
    "prune": {
        "choices": ("none", "median", "hyperband"),
        "help": "stop trials that do badly after an epoch (default: none)",
    },
    "confirm": {
        "type": _number(int, 0),
        "help": "runs each of the best trial's settings and of the defaults, on the test images "
        "(default: 3)",
    },
    "workers": {"type": _COUNT, "help": "processes that run trials beside each other (default: 1)"},
    "threads": {
        "type": _COUNT,
        "help": "CPU threads of a worker (default: torch's choice, shared out among the workers)",
    },
    "lr": {"type": _number(float, 0, open_low=True), "help": "learning rate (default: 1e-3)"},
    "noise": {
        "choices": ("input", "gradient", "parameter", "regularizer"),
        "help": "noise on the student of each trial (default: none)",
    },
    "resume": {
        "type": _path,
        "metavar": "RUN_DIR",
        "help": "go on with the search in this folder; of the other options --trials, --confirm, "
        "--workers and --threads may be given",
    },
}
_OF_EXPORT = {
    "arm": {
        "metavar": "NAME",
        "help": "whose student, as the run's tables call it (default: full)",
    },
    "formats": {
        "type": _list_of(("onnx", "int8", "int8-qat")),
        "metavar": "A,B",
        "help": "which of onnx (fp32), int8 (calibrated), int8-qat (trained on, with int8's "
        "rounding and the teacher) (default: all three)",
    },
    "epochs": {"type": _COUNT, "help": "of int8-qat (default: 3)"},
    "lr": {
        "type": _number(float, 0, open_low=True),
        "help": "learning rate of int8-qat (default: 1e-4)",
    },
    "threads": {
        "type": _COUNT,
        "help": "CPU threads, also of what is timed (default: torch's choice)",
    },
}
_OF_COMPARE = {
    "runs": {
        "type": _path,
        "nargs": "+",
        "metavar": "RUN_DIR",
        "help": "folders of finished runs of distill or reproduce; those that differ only in their "
        "seed are averaged",
    },
    "out": {"type": _path, "metavar": "FILE", "help": "the page (default: compare.html)"},
}
# soft-reg's options by the models that take them, in the order of --help.
_COMMON = ("lr", "seed", "threads", "out")
_LINEAR = ("noise", "steps", "lam", "sigma", "replicas", "repeats")
_NETWORK = (
    "data", "data_dir", "image_size", "batch_size", "epochs", "seeds", "arms", "input_std",
    "gradient_std", "parameter_std", "regularizer_lam", "train_samples", "test_samples", "device",
    "resume",
)  # fmt: skip
_DISTILL = (
    "data", "data_dir", "image_size", "normalize", "augment", "views", "validation", "teacher",
    "student", "teacher_weights", "teacher_predictions", "batch_size", "lr", "schedule",
    "weight_decay", "temperature", "alpha", "divergence", "beta", "epochs", "teacher_epochs",
    "target_accuracy", "budget", "generations", "arms", "noise", "noise_std", "train_samples",
    "test_samples", "seed", "device", "threads", "checkpoint_every", "parallel", "config", "out",
    "resume",
)  # fmt: skip
_PREDICT = (
    "teacher", "teacher_weights", "data", "data_dir", "image_size", "normalize", "augment",
    "views", "seed",
    "top_k", "dtype", "batch_size", "train_samples", "device", "threads", "out",
)  # fmt: skip
_LM = (
    "text", "vocabulary", "context", "batch_size", "student_width", "student_layers",
    "teacher_width", "teacher_layers", "teacher_steps", "teacher_weights", "lr", "temperature",
    "alpha", "k", "epochs", "train_samples", "test_samples", "arms", "seed", "device", "threads",
    "out", "resume",
)  # fmt: skip
_TUNE = (
    "search", "sampler", "trials", "seeds", "validation", "prune", "confirm", "workers", "threads",
    "data", "data_dir", "image_size", "normalize", "augment", "views", "teacher", "student",
    "teacher_weights", "batch_size", "lr", "schedule", "weight_decay", "temperature", "alpha",
    "divergence", "beta", "noise", "noise_std", "epochs", "teacher_epochs", "train_samples",
    "test_samples", "seed", "device", "out", "resume",
)  # fmt: skip
_REPRODUCE = (
    "epochs", "teacher_epochs", "replicas", "repeats", "train_samples", "test_samples", "seed",
    "device", "threads", "out", "resume",
)  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="kdkernels",
        description="Fused distillation losses and noise for PyTorch, and four experiments.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    about = {
        "info": ("versions, what was compiled in, instruction set, threads, GPUs", (), {}),
        "bench": (
            "how fast the ops are on this machine, beside eager PyTorch and the memory's limit",
            tuple(_OF_BENCH),
            _OF_BENCH,
        ),
        "reproduce": ("run experiments 1 and 2 and write one report", _REPRODUCE, {}),
        "soft-reg": (
            "experiment 1: soft-regularised linear regression in NumPy, PyTorch and one kernel; "
            "experiment 3: a network without noise and with noise on its input, gradient, "
            "parameters and in its loss",
            ("model", *_LINEAR, *_NETWORK, *_COMMON),
            _OF_SOFT,
        ),
        "distill": (
            "experiment 2: distil a teacher into a student, in five arms or six",
            _DISTILL,
            _OF_DISTILL,
        ),
        "predict-teacher": (
            "make a teacher's predictions of the training images once, for any number of runs of "
            "distill --teacher-predictions",
            _PREDICT,
            _OF_PREDICT,
        ),
        "distill-lm": (
            "experiment 4: distil a small GPT into a smaller one, in five arms or six: the "
            "reference, and losses of logits, of top-k teachers and of hidden states",
            _LM,
            _OF_LM,
        ),
        "tune": ("search for distill's settings with Optuna", _TUNE, _OF_TUNE),
        "export": (
            "write a finished run's student as ONNX files in fp32 and int8, and compare them",
            tuple(_OF_EXPORT),
            _OF_EXPORT,
        ),
        "compare": (
            "one page that compares runs of distill, with means over seeds",
            tuple(_OF_COMPARE),
            _OF_COMPARE,
        ),
    }
    for name, (text, options, own) in about.items():
        command = commands.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".",
            argument_default=argparse.SUPPRESS, allow_abbrev=False,
        )  # fmt: skip
        if name == "export":
            command.add_argument(
                "run_dir", type=_path, metavar="RUN_DIR", help="folder of a run of distill"
            )
        for option in options:
            extra = own.get(option) or _OPTIONS[option]
            flag = option if "nargs" in extra else "--" + option.replace("_", "-")
            command.add_argument(flag, **extra)
    return parser


def _parse(argv: list[str]) -> dict:
    """The options given, those of a --config file before those of the command line."""
    given = vars(_parser().parse_args(argv))
    path = given.pop("config", None)
    if path is None:
        return given
    command = given["command"]
    try:
        with open(path) as file:
            found = json.load(file)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no JSON"
        raise _UsageError(f"kdkernels {command}: cannot read --config {path}: {reason}") from None
    if not isinstance(found, dict):
        raise _UsageError(f"kdkernels {command}: --config {path} holds no JSON object")
    options = []
    for name, value in found.items():
        if value is not None:
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            options.append(f"--{name.replace('_', '-')}={text}")
    try:
        before = vars(_parser().parse_args([command, *options]))
    except _UsageError as error:
        raise _UsageError(f"--config {path}: {error}") from None
    return before | given


def _soft_reg(folder, settings, threads, console):
    import torch

    from kdkernels.train import soft_regression

    if folder.read_json("soft_reg.json") is not None:
        return
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        with console.status("experiment 1") as status:
            found = soft_regression.run(
                **settings, on_step=lambda text: status.update(f"experiment 1: {text}")
            )
    finally:
        torch.set_num_threads(before)
    for row in found["times"]:
        folder.log(kind="time", experiment="soft-reg", **row)
    folder.log(kind="mean", experiment="soft-reg", **found["mean"])
    folder.log(sync=True, kind="agreement", experiment="soft-reg", **found["agreement"])
    folder.write_json("soft_reg.json", found)
    console.print("experiment 1 is done")


def _resumed(command: str, given: dict):
    """The folder to continue, its config changed by what may be given with --resume."""
    from kdkernels.train import TrainError, distributed
    from kdkernels.train.run_folder import RunFolder

    folder = RunFolder.open(given.pop("resume"))
    part, more, of = "distill", "epochs", "distill or reproduce"
    if command == "soft-reg":
        part, more, of = "soft_regularization", "seeds", "soft-reg --model mlp or resnet18"
    elif command == "distill-lm":
        part, of = "language_model", "distill-lm"
    settings = folder.config.get(part)
    if not isinstance(settings, dict):
        raise TrainError(f"{folder.path} holds no run of {of} to continue")
    if folder.config.get("command") == "distill()":
        raise TrainError(
            f"the models and images of {folder.path} were given in Python: continue it there, with "
            "distill(..., out=..., resume=True)"
        )
    places = {"distill": ("data_dir", "teacher_predictions"), "language_model": ("text",)}
    names = (more, *places.get(part, ()))  # what lies there is compared with what began the run
    for name in given:
        if name not in names:
            words = [f"--{n.replace('_', '-')}" for n in (name, *names)]
            raise TrainError(
                f"with --resume, {words[0]} is the earlier run's; only {', '.join(words[1:])} may "
                "be given"
            )
    settings |= given
    distributed.current().first(folder.hold)
    _import_from(folder.config)
    return folder


def _import_from(config: dict) -> None:
    """Find a run's own models where they were when it was started."""
    place = config.get("started_in")
    if isinstance(place, str) and place not in sys.path:
        sys.path[:0] = [place] if "" in sys.path else [place, ""]


def _config(command: str, given: dict) -> dict[str, Any]:
    """What config.json of a new run says: a part an experiment, and what they ran on."""
    from kdkernels.train import TrainError, distillation, report, soft_regularization

    def part(settings):
        names = {field.name for field in dataclasses.fields(settings)}
        found = dataclasses.asdict(settings(**{k: v for k, v in given.items() if k in names}))
        return found | _absolute(found)

    config: dict[str, Any] = {"command": command, "started_in": os.getcwd()}
    if command == "soft-reg":
        linear = given.get("model", "linear") == "linear"
        for option in given:
            if option in (_NETWORK if linear else _LINEAR):
                models = "mlp and resnet18" if linear else "linear"
                name = option.replace("_", "-")
                raise TrainError(
                    f"--{name} is for --model {models}, not {given.get('model', 'linear')}"
                )
        if linear:
            config["soft_reg"] = {k: v for k, v in given.items() if k in (*_LINEAR, "lr", "seed")}
        else:
            config["soft_regularization"] = part(soft_regularization.Settings)
    elif command == "distill-lm":
        from kdkernels.train import language_model

        config["language_model"] = part(language_model.Settings)
    else:
        config["distill"] = part(distillation.Settings)
    if command == "reproduce":
        keys = ("replicas", "repeats", "seed")
        config["soft_reg"] = {k: v for k, v in given.items() if k in keys}
    config["threads"] = given.get("threads") or config.get("soft_regularization", {}).get("threads")
    config["machine"] = report.machine(config["threads"])
    return config


def _absolute(settings: dict) -> dict:
    """Where the images are, for a run that may be resumed elsewhere; empty if they are nowhere."""
    if settings.get("data", "digits") == "digits":
        return {}
    return {"data_dir": _source(settings.get("data_dir", "data"))}


def _compare(runs: list[str], out: str = "compare.html") -> int:
    from kdkernels.train import compare
    from kdkernels.train import console as terminal

    console = terminal.make()
    terminal.show(console, compare.write(runs, out))
    console.print(f"the page is {out}")
    return 0


def _experiments(command: str, given: dict) -> int:
    from kdkernels.train import (
        TrainError,
        distillation,
        distributed,
        report,
        soft_regularization,
    )
    from kdkernels.train import console as terminal
    from kdkernels.train.run_folder import RunFolder

    rank = distributed.current().rank
    console = terminal.make(quiet=rank > 0)
    if "resume" in given:
        folder = _resumed(command, given)
    else:
        out = given.pop("out", None)
        folder = RunFolder.create(out, _config(command, given))
    console.print(f"this run's folder is {folder.path}")
    config = folder.config
    own = [config.get("distill", {}).get(name, "") for name in ("teacher", "student")]
    if any(":" in name for name in own) and "started_in" in config:
        console.print(f"its models {' and '.join(own)} are imported from {config['started_in']}")
    try:
        if "soft_reg" in config:
            _soft_reg(folder, config["soft_reg"], config["threads"], console)
        experiments = {"distill": distillation, "soft_regularization": soft_regularization}
        if "language_model" in config:  # its text needs a package more
            from kdkernels.train import language_model

            experiments["language_model"] = language_model
        for name, experiment in experiments.items():
            if name in config:
                try:
                    wanted = config[name] | {"arms": tuple(config[name]["arms"])}
                    settings = experiment.Settings(**wanted)
                except (KeyError, TypeError) as error:
                    raise TrainError(
                        f"{folder.path / 'config.json'} must have the settings of {name}: {error}"
                    ) from None
                terminal.progress(experiment.run, settings, folder, console)
    except BaseException:
        folder.discard()
        raise
    finally:
        folder.close()
    if rank > 0:
        return 0
    tables, passed = report.write(folder)
    terminal.show(console, tables)
    console.print(f"the report is {folder.path / 'report.html'}")
    if not passed:
        print("kdkernels: a check failed: see the table of checks", file=sys.stderr)
    return 0 if passed else 1


def _predict_teacher(**given) -> int:
    import torch

    from kdkernels.train import TrainError, distillation, models, predictions
    from kdkernels.train import console as terminal
    from kdkernels.train.loop import choose_device, reproducible

    console = terminal.make()
    out = given.pop("out")
    kept = {name: given.pop(name) for name in ("top_k", "dtype") if name in given}
    batch_size = given.pop("batch_size", 256)
    asked = distillation.Settings(**given)  # so that distill's images are these

    def run(_, __, on_step, say):
        train = distillation.images_of(asked)[0].to(device)
        if kept.get("top_k", 1) > train.classes:
            raise TrainError(f"--top-k {kept['top_k']}: the images have {train.classes} classes")
        weights = asked.teacher_weights
        model, ready = models.build(asked.teacher, train.classes, asked.image_size, weights)
        if not ready:
            raise TrainError(
                f"--teacher-weights {weights}: this teacher has not learnt these {train.classes} "
                "classes; distill trains one and leaves checkpoints/teacher.safetensors"
            )
        model = model.to(device).to(memory_format=torch.channels_last)
        distillation.try_on("teacher", model, train)
        return train, predictions.write(
            out, model, train, batch_size=batch_size, memory_format=torch.channels_last,
            on_step=on_step, **kept,
        )  # fmt: skip

    device = choose_device(asked.device)
    try:
        with reproducible(asked.seed, asked.threads):
            train, found = terminal.progress(run, None, None, console)
    except KeyboardInterrupt:
        raise TrainError("interrupted: the same command continues", status=130) from None
    views = asked.views or 1
    console.print(
        f"{out} holds the predictions of {len(found):,} images in {views} "
        f"{'view' if views == 1 else 'views'}: {found.nbytes / 1e6:,.2f} MB, "
        f"{found.nbytes / (len(found) * views):,.1f} bytes an image and view; the teacher is right "
        f"about {found.accuracy(train):.1%} of them"
    )
    return 0


def _tune(**given) -> int:
    import shutil

    from kdkernels.train import TrainError, console, report, tune
    from kdkernels.train.run_folder import RunFolder

    workers, threads = given.pop("workers", 1), given.pop("threads", None)
    own = {f.name for f in dataclasses.fields(tune.Settings)}
    if "resume" in given:
        folder = RunFolder.open(given.pop("resume"))
        if "tune" not in folder.config:
            raise TrainError(f"{folder.path} holds no run of tune to continue")
        for name in given.keys() - {"trials", "confirm"}:
            raise TrainError(f"with --resume, --{name.replace('_', '-')} is the earlier run's")
        folder.config["tune"] |= given
        _import_from(folder.config)
        tune.check(folder.config)
        folder.write_json("config.json", folder.config)
    else:
        out = given.pop("out", None)
        config = {
            "command": "tune",
            "tune": dataclasses.asdict(
                tune.Settings(**{name: given.pop(name) for name in own & given.keys()})
            ),
            "started_in": os.getcwd(),
            "distill": given | _absolute(given),
            "machine": report.machine(threads),
        }
        tune.check(config)
        folder = RunFolder.create(out, config)
    screen = console.make()
    screen.print(f"this run's folder is {folder.path}")
    try:
        tables = tune.run(folder, screen, workers, threads)
    except TrainError as error:
        if error.status == 2 and not folder.read_json("search/teacher.json"):
            shutil.rmtree(folder.path)  # what was asked for cannot be: nothing to go on with
        raise
    console.show(screen, tables)
    screen.print(f"the best settings are {folder.path / 'best.json'}, for distill --config")
    screen.print(f"the report is {folder.path / 'report.html'}")
    return 0


def _export(run_dir: str, **given) -> int:
    from kdkernels.train import console as terminal
    from kdkernels.train import export, report
    from kdkernels.train.run_folder import RunFolder

    console = terminal.make()
    folder = RunFolder.open(run_dir)
    _import_from(folder.config)
    found = {}

    def run(settings, folder, on_step, say):
        found.update(export.run(folder, settings, on_step, say))

    terminal.progress(run, export.Settings(**given), folder, console)
    report.write(folder)
    terminal.show(console, export.tables(found))
    console.print(f"the files are in {folder.path / export.FOLDER}")
    failed = found["arms"][given.get("arm", export.Settings.arm)]["failed"]
    for name, sentence in failed.items():
        print(f"kdkernels export: {name}: {sentence}", file=sys.stderr)
    return 1 if failed else 0


def _bench(quick: bool = False, threads: int | None = None, json: str | None = None) -> int:
    from kdkernels import benchmark

    if not quick:
        print(
            "kdkernels bench: give --quick for a table in a minute; the whole suite is "
            "`make bench` in kdkernels' source folder",
            file=sys.stderr,
        )
        return 2
    try:
        benchmark.quick(threads, json)
    except OSError as error:
        print(f"kdkernels bench: cannot write {json}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


_ASCII = {"µ": "u", "×": "x", "±": "+-", "–": "-", "…": "...", "²": "^2", "≤": "<=", "≥": ">="}


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    """What codecs write for characters that the output has not."""
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end]
    return "".join(_ASCII.get(character, "?") for character in text), error.end


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments after the program's name; ``sys.argv[1:]`` by default.

    Returns:
        The exit status, see the module's docstring.
    """
    reconfigure: Any = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:  # a terminal or file that may know ASCII only
        codecs.register_error("kdkernels", _in_ascii)
        reconfigure(errors="kdkernels")
    try:
        given = _parse(sys.argv[1:] if argv is None else argv)
    except _UsageError as error:
        print(error, file=sys.stderr)
        return 2
    command = given.pop("command")
    if command == "info":
        from kdkernels import info

        return info.main() or 0
    from kdkernels.train import TrainError, distributed

    try:
        own = {
            "bench": _bench, "compare": _compare, "export": _export,
            "predict-teacher": _predict_teacher, "tune": _tune,
        }  # fmt: skip
        return own[command](**given) if command in own else _experiments(command, given)
    except TrainError as error:
        if distributed.first_to_say():
            print(f"kdkernels {command}: {error}", file=sys.stderr)
        return error.status
    except RuntimeError as error:
        if not distributed.was_cut(error):
            raise
        if distributed.first_to_say():
            print(
                f"kdkernels {command}: a rank ended without a word; continue with --resume",
                file=sys.stderr,
            )
        return 1
    except ModuleNotFoundError as error:
        more = _MORE_PACKAGES.get(command, ())
        if (error.name or "").split(".")[0] not in (*_TRAIN_PACKAGES, *more):
            raise
        packages = ("torchvision", "scikit-learn", *_TRAIN_PACKAGES[2:], *more)
        print(
            f"kdkernels {command}: it needs {error.name}, which is not installed: "
            f"pip install {' '.join(packages)}",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print(f"kdkernels {command}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
