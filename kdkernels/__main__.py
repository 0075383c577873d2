"""The ``kdkernels`` command: ``info``, ``reproduce``, ``soft-reg`` and ``distill``.

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
_TRAIN_PACKAGES = ("torchvision", "sklearn", "matplotlib", "safetensors", "rich", "jinja2")
_COUNT = _number(int, 1)
# Defaults are those of distillation.Settings and soft_regression.run, repeated in words here so
# that --help needs no heavy import; a test holds the two together.
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
    "threads": {"type": _COUNT, "help": "CPU threads (default: torch's choice)"},
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
_LR = {
    "type": _number(float, 0, open_low=True),
    "help": "learning rate (default: {})",
}
_SOFT = ("noise", "steps", "lr", "lam", "sigma", "replicas", "repeats", "seed", "threads", "out")
_DISTILL = (
    "data", "data_dir", "image_size", "batch_size", "lr", "temperature", "alpha", "epochs",
    "teacher_epochs", "target_accuracy", "teacher_weights", "arms", "train_samples",
    "test_samples", "seed", "device", "threads", "out", "resume",
)  # fmt: skip
_REPRODUCE = (
    "epochs", "teacher_epochs", "replicas", "repeats", "train_samples", "test_samples", "seed",
    "device", "threads", "out", "resume",
)  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="kdkernels",
        description="Fused distillation losses and noise for PyTorch, and two experiments.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    about = {
        "info": ("versions, what was compiled in, instruction set, threads, GPUs", (), None),
        "reproduce": ("run both experiments and write one report", _REPRODUCE, None),
        "soft-reg": (
            "experiment 1: soft-regularised linear regression in NumPy, PyTorch and one kernel",
            _SOFT,
            "0.01",
        ),
        "distill": (
            "experiment 2: distil ResNet-18 into MobileNetV2, in four arms",
            _DISTILL,
            "1e-3",
        ),
    }
    for name, (text, options, lr) in about.items():
        command = commands.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".",
            argument_default=argparse.SUPPRESS,
        )  # fmt: skip
        for option in options:
            extra = _OPTIONS.get(option) or _LR | {"help": _LR["help"].format(lr)}
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


def _distill(folder, settings, console):
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from kdkernels.train import distillation

    columns = (
        TextColumn("{task.description:>10}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("steps"), TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        tasks = {}

        def on_step(learner, done, total):
            if learner not in tasks:
                tasks[learner] = progress.add_task(learner, total=total)
            progress.update(tasks[learner], completed=done)

        distillation.run(settings, folder, on_step, progress.console.print)


def _experiments(command: str, given: dict) -> int:
    from rich import box
    from rich.table import Table

    from kdkernels.train import TrainError, distillation, report
    from kdkernels.train.run_folder import RunFolder

    console = _console()
    if "resume" in given:
        folder = RunFolder.open(given.pop("resume"))
        epochs = given.pop("epochs", None)
        if given:
            name = next(iter(given)).replace("_", "-")
            raise TrainError(
                f"with --resume, --{name} is the earlier run's; only --epochs may be given"
            )
        if "distill" not in folder.config:
            raise TrainError(f"{folder.path} holds no run of distill or reproduce to continue")
        if epochs:
            folder.config["distill"]["epochs"] = epochs
            folder.write_json("config.json", folder.config)
    else:
        out = given.pop("out", None)
        config = {"command": command}
        if command != "distill":
            keys = _SOFT if command == "soft-reg" else ("replicas", "repeats", "seed")
            config["soft_reg"] = {k: v for k, v in given.items() if k in keys and k != "threads"}
        if command != "soft-reg":
            names = {field.name for field in dataclasses.fields(distillation.Settings)}
            chosen = {k: v for k, v in given.items() if k in names}
            config["distill"] = dataclasses.asdict(distillation.Settings(**chosen))
        config["threads"] = given.get("threads")
        config["machine"] = report.machine(config["threads"])
        folder = RunFolder.create(out, config)
    console.print(f"this run's folder is {folder.path}")
    config = folder.config
    try:
        if "soft_reg" in config:
            _soft_reg(folder, config["soft_reg"], config["threads"], console)
        if "distill" in config:
            wanted = config["distill"] | {"arms": tuple(config["distill"]["arms"])}
            _distill(folder, distillation.Settings(**wanted), console)
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
        return _experiments(command, given)
    except TrainError as error:
        print(f"kdkernels {command}: {error}", file=sys.stderr)
        return error.status
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in _TRAIN_PACKAGES:
            raise
        print(
            f"kdkernels {command}: it needs {error.name}, which is not installed: "
            "pip install torchvision scikit-learn matplotlib safetensors rich jinja2",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print(f"kdkernels {command}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
