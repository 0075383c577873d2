"""The ``kdkernels`` command: ``info``, ``bench``, ``reproduce``, ``soft-reg``, ``distill`` and
``distill-lm``.

Exit status: 0 done; 1 a check failed or a run stopped on the way; 2 bad arguments, or data or
weights that are not there; 130 interrupted. Whatever goes wrong is said in one sentence.
"""

import argparse
import dataclasses
import sys

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


# The ops do without these; pyproject's extra "train" names the distributions they come in.
_TRAIN_PACKAGES = (
    "torchvision", "sklearn", "matplotlib", "safetensors", "rich", "jinja2", "tokenizers",
)  # fmt: skip
_COUNT = _number(int, 1)
_STD = _number(float, 0, 1e6)
# Defaults are those of distillation.Settings, soft_regularization.Settings and soft_regression.run,
# repeated in words here so that --help needs no heavy import; a test holds them together.
_OPTIONS = {
    "out": {"metavar": "DIR", "help": "folder for the run, absent or empty (default: runs/<time>)"},
    "resume": {
        "metavar": "RUN_DIR",
        "help": "continue the run in this folder from its last checkpoint, with its own settings; "
        "of the other options only --epochs may be given, to train on",
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
    "data": {"choices": ("digits", "cifar10"), "help": "images to learn (default: digits)"},
    "data_dir": {
        "metavar": "DIR",
        "help": "folder that holds cifar-10-batches-py, or gets it by download (default: data)",
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
        "metavar": "DEFAULT|PATH|none",
        "help": "the teacher's first weights: DEFAULT is torchvision's ImageNet ones, PATH a "
        ".safetensors or .pth file, none random (default: none)",
    },
    "arms": {
        "type": _list_of(("alone", "reference", "fused", "full")),
        "metavar": "A,B",
        "help": "which of alone, reference, fused, full (default: all four)",
    },
    "noise_std": {
        "type": _STD,
        "help": "its standard deviation, of a gradient's in the first step (default: 0.1 input, "
        "0.01 gradient, 0.01 parameter)",
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
        "choices": ("input", "gradient", "parameter"),
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
        "metavar": "RUN_DIR",
        "help": "continue the run of mlp or resnet18 in this folder, with its own settings; of the "
        "other options only --seeds may be given, for more of them",
    },
    "image_size": {
        "type": _number(int, 8, 1024),
        "help": "side in pixels to which images are resized (default: 8 digits, 32 cifar10)",
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
_OF_LM = {
    "text": {
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
    "json": {"metavar": "FILE", "help": "write everything that was measured to FILE"},
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
    "data", "data_dir", "image_size", "batch_size", "lr", "temperature", "alpha", "epochs",
    "teacher_epochs", "target_accuracy", "teacher_weights", "arms", "noise", "noise_std",
    "train_samples", "test_samples", "seed", "device", "threads", "out", "resume",
)  # fmt: skip
_LM = (
    "text", "vocabulary", "context", "batch_size", "student_width", "student_layers",
    "teacher_width", "teacher_layers", "teacher_steps", "teacher_weights", "lr", "temperature",
    "alpha", "k", "epochs", "train_samples", "test_samples", "arms", "seed", "device", "threads",
    "out", "resume",
)  # fmt: skip
_REPRODUCE = (
    "epochs", "teacher_epochs", "replicas", "repeats", "train_samples", "test_samples", "seed",
    "device", "threads", "out", "resume",
)  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="kdkernels",
        description="Fused distillation losses and noise for PyTorch, and three experiments.",
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
            "experiment 2: distil ResNet-18 into MobileNetV2, in four arms or five",
            _DISTILL,
            _OF_DISTILL,
        ),
        "distill-lm": (
            "experiment 4: distil a small GPT into a smaller one, in five arms or six: the "
            "reference, and losses of logits, of top-k teachers and of hidden states",
            _LM,
            _OF_LM,
        ),
    }
    for name, (text, options, own) in about.items():
        command = commands.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".",
            argument_default=argparse.SUPPRESS,
        )  # fmt: skip
        for option in options:
            extra = own.get(option) or _OPTIONS[option]
            command.add_argument("--" + option.replace("_", "-"), **extra)
    return parser


def _console():
    from rich.console import Console

    console = Console(markup=False, highlight=False)
    # A pipe or a log file has no width of its own; tables must not be folded at 80.
    return console if console.is_terminal else Console(width=170, markup=False, highlight=False)


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


def _train(run, settings, folder, console):
    """Call an experiment's run(settings, folder, on_step, say) under progress bars."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:>10}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("steps"), TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        tasks = {}

        def on_step(learner, done, total):
            if learner not in tasks:
                tasks[learner] = progress.add_task(learner, total=total)
            progress.update(tasks[learner], completed=done)

        run(settings, folder, on_step, progress.console.print)


def _resumed(command: str, given: dict):
    """The folder to continue, its config changed by what may be given with --resume."""
    from kdkernels.train import TrainError
    from kdkernels.train.run_folder import RunFolder

    folder = RunFolder.open(given.pop("resume"))
    part, more, of = "distill", "epochs", "distill or reproduce"
    if command == "soft-reg":
        part, more, of = "soft_regularization", "seeds", "soft-reg --model mlp or resnet18"
    elif command == "distill-lm":
        part, of = "language_model", "distill-lm"
    value = given.pop(more, None)
    if given:
        name = next(iter(given)).replace("_", "-")
        raise TrainError(
            f"with --resume, --{name} is the earlier run's; only --{more} may be given"
        )
    if part not in folder.config:
        raise TrainError(f"{folder.path} holds no run of {of} to continue")
    if value:
        folder.config[part][more] = value
        folder.write_json("config.json", folder.config)
    return folder


def _config(command: str, given: dict) -> dict:
    """What config.json of a new run says: a part an experiment, and what they ran on."""
    from kdkernels.train import TrainError, distillation, report, soft_regularization

    def part(settings):
        names = {field.name for field in dataclasses.fields(settings)}
        return dataclasses.asdict(settings(**{k: v for k, v in given.items() if k in names}))

    config = {"command": command}
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


def _experiments(command: str, given: dict) -> int:
    from rich import box
    from rich.table import Table

    from kdkernels.train import TrainError, distillation, report, soft_regularization
    from kdkernels.train.run_folder import RunFolder

    console = _console()
    if "resume" in given:
        folder = _resumed(command, given)
    else:
        out = given.pop("out", None)
        folder = RunFolder.create(out, _config(command, given))
    console.print(f"this run's folder is {folder.path}")
    config = folder.config
    try:
        if "soft_reg" in config:
            _soft_reg(folder, config["soft_reg"], config["threads"], console)
        experiments = {"distill": distillation, "soft_regularization": soft_regularization}
        if "language_model" in config:  # its text needs a package more
            from kdkernels.train import language_model

            experiments["language_model"] = language_model
        for name, experiment in experiments.items():
            if name in config:
                wanted = config[name] | {"arms": tuple(config[name]["arms"])}
                _train(experiment.run, experiment.Settings(**wanted), folder, console)
    except TrainError:
        folder.discard()
        raise
    finally:
        folder.close()
    tables, passed = report.write(folder)
    for table in tables:
        drawn = Table(title=table.title, box=box.MARKDOWN, title_justify="left", title_style="bold")
        for number, column in enumerate(table.columns):
            drawn.add_column(column, justify="right" if number else "left", overflow="fold")
        for row in table.rows:
            drawn.add_row(*row)
        console.print(drawn)
        if table.note:
            console.print(table.note, style="dim")
    console.print(f"the report is {folder.path / 'report.html'}")
    if not passed:
        print("kdkernels: a check failed: see the table of checks", file=sys.stderr)
    return 0 if passed else 1


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


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments after the program's name; ``sys.argv[1:]`` by default.

    Returns:
        The exit status, see the module's docstring.
    """
    try:
        given = vars(_parser().parse_args(argv))
    except _UsageError as error:
        print(error, file=sys.stderr)
        return 2
    command = given.pop("command")
    if command == "info":
        from kdkernels import info

        return info.main() or 0
    from kdkernels.train import TrainError

    try:
        return _bench(**given) if command == "bench" else _experiments(command, given)
    except TrainError as error:
        print(f"kdkernels {command}: {error}", file=sys.stderr)
        return error.status
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in _TRAIN_PACKAGES:
            raise
        print(
            f"kdkernels {command}: it needs {error.name}, which is not installed: "
            "pip install torchvision scikit-learn matplotlib safetensors rich jinja2"
            + (" tokenizers" if command == "distill-lm" else ""),
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print(f"kdkernels {command}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
