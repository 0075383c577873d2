"""The ``kdkernels`` command: :func:`main`; ``kdkernels --help`` lists what it does.

Exit status: 0 done; 1 a check failed or a run stopped on the way; 2 bad arguments, or data or
weights that are not there; 130 interrupted. Whatever goes wrong is said in one sentence. Options
are fields of the settings' classes; torch is imported when they are read.
"""

import argparse
import codecs
import dataclasses
import importlib
import json
import sys
from typing import Any

from kdkernels.experiments.settings import LanguageModel, Model, Network, Regression
from kdkernels.tools.settings import Bench, Compare, Export, Predict, Search, Workers
from kdkernels.train import TrainError
from kdkernels.train.settings import Checked, Distil, add_options, expanded, path

__all__ = ["main", "make_parser"]


@dataclasses.dataclass(frozen=True)
class _Folder(Checked):
    out: str | None = path(None, "folder for the run, absent or empty (default: runs/<time>)")


@dataclasses.dataclass(frozen=True)
class _Config(Checked):
    config: str | None = path(
        None,
        "a JSON object of these options, such as tune's best.json; those given here win "
        "(default: none)",
        "FILE",
    )


def _resume(help: str) -> type:
    field = path(None, f"{help} (default: a new run)", "RUN_DIR")
    return dataclasses.make_dataclass("Resume", [("resume", "str | None", field)], bases=(Checked,))


def _fields(settings: type, *without: str) -> tuple[str, ...]:
    return tuple(f.name for f in dataclasses.fields(settings) if f.name not in without)


@dataclasses.dataclass(frozen=True)
class _Command:
    """A command.

    Attributes:
        about: what it does.
        run: ``"module:function"``, called with the command's name and what is given.
        settings: classes of its options, or pairs of a class and the names of some of its fields;
            of two fields of a name the first is the option.
        places: positional arguments: name, metavar, how many, help.
        needs: packages that it imports beside those of the trainer.
    """

    about: str
    run: str
    settings: tuple = ()
    places: tuple[tuple[str, str, str | None, str], ...] = ()
    needs: tuple[str, ...] = ()


_RUNS = "kdkernels.commands.runs:command"
_CONTINUED = (
    "continue the run in this folder from its last checkpoint, with its own settings; of the other "
    "options only --epochs may be given, to train on, and "
)
_SHARED = (
    "teacher",
    "teacher_weights",
    "data",
    "data_dir",
    "image_size",
    "normalize",
    "augment",
    "views",
    "seed",
    "batch_size",
    "train_samples",
    "device",
    "threads",
)
_NOT_TUNED = (
    "validation",
    "teacher_predictions",
    "target_accuracy",
    "budget",
    "generations",
    "arms",
    "checkpoint_every",
    "parallel",
)
COMMANDS = {
    "info": _Command(
        "versions, what was compiled in, instruction set, threads, GPUs", "kdkernels.info:command"
    ),
    "bench": _Command(
        "how fast the ops are on this machine, beside eager PyTorch and the memory's limit",
        "kdkernels.tools.bench:command",
        (Bench,),
    ),
    "reproduce": _Command(
        "run experiments 1 and 2 and write one report",
        _RUNS,
        (
            (Distil, ("epochs", "teacher_epochs")),
            (Regression, ("replicas", "repeats")),
            (Distil, ("train_samples", "test_samples", "seed", "device", "threads")),
            _Folder,
            _resume(_CONTINUED + "--data-dir where the same files lie elsewhere"),
        ),
    ),
    "soft-reg": _Command(
        "experiment 1: soft-regularised linear regression in NumPy, PyTorch and one kernel; "
        "experiment 3: a network without noise and with noise on its input, gradient, parameters "
        "and in its loss",
        _RUNS,
        (
            Model,
            Regression,
            Network,
            _Folder,
            _resume(
                "continue the run of mlp or resnet18 in this folder, with its own settings; of "
                "the other options only --seeds may be given, for more of them"
            ),
        ),
    ),
    "distill": _Command(
        "experiment 2: distil a teacher into a student, in five arms or six",
        _RUNS,
        (
            Distil,
            _Config,
            _Folder,
            _resume(
                _CONTINUED + "--data-dir and --teacher-predictions where the same files lie "
                "elsewhere; its own models are imported from the folder where it was started"
            ),
        ),
    ),
    "predict-teacher": _Command(
        "make a teacher's predictions of the training images once, for any number of runs of "
        "distill --teacher-predictions",
        "kdkernels.tools.predict:command",
        (Predict, (Distil, _SHARED)),
    ),
    "distill-lm": _Command(
        "experiment 4: distil a small GPT into a smaller one, in five arms or six: the reference, "
        "and losses of logits, of top-k teachers and of hidden states",
        _RUNS,
        (LanguageModel, _Folder, _resume(_CONTINUED + "--text where the same text lies elsewhere")),
        needs=("tokenizers",),
    ),
    "tune": _Command(
        "search for distill's settings with Optuna",
        "kdkernels.commands.tune:command",
        (
            Search,
            Workers,
            (Distil, _fields(Distil, *_NOT_TUNED)),
            _Folder,
            _resume(
                "go on with the search in this folder; of the other options --trials, "
                "--confirm, --workers and --threads may be given"
            ),
        ),
        needs=("optuna",),
    ),
    "export": _Command(
        "write a finished run's student as ONNX files in fp32 and int8, and compare them",
        "kdkernels.commands.export:command",
        (Export,),
        (("run_dir", "RUN_DIR", None, "folder of a run of distill"),),
        ("onnx", "onnxscript", "onnxruntime", "torchao"),
    ),
    "compare": _Command(
        "one page that compares runs of distill, with means over seeds",
        "kdkernels.reports.compare:command",
        (Compare,),
        (
            (
                "runs",
                "RUN_DIR",
                "+",
                "folders of finished runs of distill or reproduce; those that "
                "differ only in their seed are averaged",
            ),
        ),
    ),
}
# The ops do without these; pyproject's extra "train" names the distributions that they come in.
_TRAIN_PACKAGES = (
    "torchvision",
    "sklearn",
    "matplotlib",
    "pandas",
    "safetensors",
    "rich",
    "jinja2",
)


class _UsageError(Exception):
    pass


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise _UsageError(f"{self.prog}: {message}; see {self.prog} --help")


def make_parser() -> argparse.ArgumentParser:
    """The command's parser; what is not given is not in its result."""
    parser = _Parser(
        prog="kdkernels",
        description="Fused distillation losses and noise for PyTorch, and four experiments.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, command in COMMANDS.items():
        about = command.about
        made = commands.add_parser(
            name,
            help=about,
            description=about[0].upper() + about[1:] + ".",
            argument_default=argparse.SUPPRESS,
            allow_abbrev=False,
        )
        for dest, metavar, nargs, help in command.places:
            made.add_argument(dest, metavar=metavar, nargs=nargs, help=help, type=expanded)
        for settings in command.settings:
            add_options(made, *(settings if isinstance(settings, tuple) else (settings,)))
    return parser


def _parse(argv: list[str]) -> dict[str, Any]:
    """The options given, those of a --config file before those of the command line."""
    given = vars(make_parser().parse_args(argv))
    config = given.pop("config", None)
    if config is None:
        return given
    command = given["command"]
    try:
        with open(config) as file:
            found = json.load(file)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no JSON"
        raise _UsageError(f"kdkernels {command}: cannot read --config {config}: {reason}") from None
    if not isinstance(found, dict):
        raise _UsageError(f"kdkernels {command}: --config {config} holds no JSON object")
    options = []
    for name, value in found.items():
        if value is not None:
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            options.append(f"--{name.replace('_', '-')}={text}")
    try:
        before = vars(make_parser().parse_args([command, *options]))
    except _UsageError as error:
        raise _UsageError(f"--config {config}: {error}") from None
    return before | given


_ASCII = {"µ": "u", "×": "x", "±": "+-", "–": "-", "…": "...", "²": "^2", "≤": "<=", "≥": ">="}


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    """What codecs write for characters that the output has not."""
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end]
    return "".join(_ASCII.get(character, "?") for character in text), error.end


def _cut(error: Exception) -> bool:
    """Whether an error is of a collective that another rank did not live to join."""
    distributed = sys.modules.get("kdkernels.train.distributed")
    return distributed is not None and distributed.was_cut(error)


def _say(text: str) -> None:
    """Print to stderr, of several ranks on the first to say why the run ends."""
    distributed = sys.modules.get("kdkernels.train.distributed")
    if distributed is None or distributed.first_to_say():
        print(text, file=sys.stderr)


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
    name = given.pop("command")
    command = COMMANDS[name]
    module, function = command.run.split(":")
    try:
        return getattr(importlib.import_module(module), function)(name, given)
    except TrainError as error:
        _say(f"kdkernels {name}: {error}")
        return error.status
    except RuntimeError as error:
        if not _cut(error):
            raise
        _say(f"kdkernels {name}: a rank ended without a word; continue with --resume")
        return 1
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in (*_TRAIN_PACKAGES, *command.needs):
            raise
        packages = ("torchvision", "scikit-learn", *_TRAIN_PACKAGES[2:], *command.needs)
        _say(
            f"kdkernels {name}: it needs {error.name}, which is not installed: "
            f"pip install {' '.join(packages)}"
        )
        return 2
    except KeyboardInterrupt:
        print(f"kdkernels {name}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
