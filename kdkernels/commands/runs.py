"""Runs of the experiments from the command line: begun, resumed, shown."""

import dataclasses
import importlib
import os
import sys
from typing import Any

import torch

from kdkernels import info
from kdkernels.experiments import soft_regression
from kdkernels.experiments.settings import LanguageModel, Network, Regression
from kdkernels.reports import report
from kdkernels.train import TrainError, distributed
from kdkernels.train import console as terminal
from kdkernels.train.run_folder import RunFolder
from kdkernels.train.settings import Distil, place


def command(name: str, given: dict[str, Any]) -> int:
    """``kdkernels reproduce``, ``soft-reg``, ``distill`` and ``distill-lm``."""
    rank = distributed.current().rank
    console = terminal.make(quiet=rank > 0)
    if "resume" in given:
        folder = _resumed(name, given)
    else:
        out = given.pop("out", None)
        folder = RunFolder.create(out, _config(name, given))
    console.print(f"this run's folder is {folder.path}")
    config = folder.config
    own = [config.get("distill", {}).get(who, "") for who in ("teacher", "student")]
    if any(":" in who for who in own) and "started_in" in config:
        console.print(f"its models {' and '.join(own)} are imported from {config['started_in']}")
    try:
        _run(folder, console)
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


_EXPERIMENTS = {
    "distill": ("kdkernels.train.distillation", Distil),
    "soft_regularization": ("kdkernels.experiments.soft_regularization", Network),
    "language_model": ("kdkernels.experiments.language_model", LanguageModel),
}
"""Part of config.json -> the module that runs it, imported when it does, and its settings."""


def _run(folder: RunFolder, console) -> None:
    """Run what is left of each experiment that the folder's config has."""
    config = folder.config
    if "soft_reg" in config:
        _regression(folder, console)
    for name, (module, settings) in _EXPERIMENTS.items():
        if name not in config:
            continue
        experiment = importlib.import_module(module)
        try:
            wanted = settings(**config[name] | {"arms": config[name]["arms"]})
        except (KeyError, TypeError) as error:
            raise TrainError(
                f"{folder.path / 'config.json'} must have the settings of {name}: {error}"
            ) from None
        with terminal.progress(console) as show:
            experiment.run(wanted, folder, *show)


def _regression(folder: RunFolder, console) -> None:
    if folder.read_json("soft_reg.json") is not None:
        return
    settings = Regression(**folder.config["soft_reg"])
    before = torch.get_num_threads()
    torch.set_num_threads(folder.config["threads"] or before)
    try:
        with console.status("experiment 1") as status:
            found = soft_regression.run(
                settings, on_step=lambda text: status.update(f"experiment 1: {text}")
            )
    finally:
        torch.set_num_threads(before)
    for row in found["times"]:
        folder.log(kind="time", experiment="soft-reg", **row)
    folder.log(kind="mean", experiment="soft-reg", **found["mean"])
    folder.log(sync=True, kind="agreement", experiment="soft-reg", **found["agreement"])
    folder.write_json("soft_reg.json", found)
    console.print("experiment 1 is done")


_RESUMED = {
    "soft-reg": ("soft_regularization", "soft-reg --model mlp or resnet18", ("seeds",)),
    "distill-lm": ("language_model", "distill-lm", ("epochs", "text")),
    "distill": ("distill", "distill or reproduce", ("epochs", "data_dir", "teacher_predictions")),
}
"""Command -> the part of config.json that it continues, whose runs have that, and the options that
may be given with --resume. What lies at a path is compared with what began the run."""


def _resumed(name: str, given: dict[str, Any]) -> RunFolder:
    """The folder to continue, its config changed by what may be given with --resume."""
    folder = RunFolder.open(given.pop("resume"))
    key, of, names = _RESUMED.get(name, _RESUMED["distill"])
    settings = folder.config.get(key)
    if not isinstance(settings, dict):
        raise TrainError(f"{folder.path} holds no run of {of} to continue")
    if folder.config.get("command") == "distill()":
        raise TrainError(
            f"the models and images of {folder.path} were given in Python: continue it there, with "
            "distill(..., out=..., resume=True)"
        )
    for option in [option for option in given if option not in names]:
        words = [f"--{n.replace('_', '-')}" for n in (option, *names)]
        raise TrainError(
            f"with --resume, {words[0]} is the earlier run's; only {', '.join(words[1:])} may be "
            "given"
        )
    settings |= given
    distributed.current().first(folder.hold)
    import_from(folder.config)
    return folder


def import_from(config: dict[str, Any]) -> None:
    """Find a run's own models where they were when it was started."""
    where = config.get("started_in")
    if isinstance(where, str) and where not in sys.path:
        sys.path[:0] = [where] if "" in sys.path else [where, ""]


def part(settings: type, given: dict[str, Any]) -> dict[str, Any]:
    """The settings of a class, made and checked, as a part of config.json."""
    names = {field.name for field in dataclasses.fields(settings)}
    found = dataclasses.asdict(settings(**{k: v for k, v in given.items() if k in names}))
    return found | absolute(found) if "data_dir" in names else found


def absolute(settings: dict[str, Any]) -> dict[str, str]:
    """Where the images are, for a run that may be resumed elsewhere; empty if they are nowhere."""
    if settings.get("data", "digits") == "digits":
        return {}
    return {"data_dir": place(settings.get("data_dir", "data"))}


def _config(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """What config.json of a new run says: a part an experiment, and what they ran on."""
    config: dict[str, Any] = {"command": name, "started_in": os.getcwd()}
    if name == "soft-reg":
        model = given.get("model", "linear")
        key, settings = "soft_regularization", Network
        if model == "linear":
            key, settings = "soft_reg", Regression
        takes = {field.name for field in dataclasses.fields(settings)} | {"model", "threads"}
        for option in given:
            if option not in takes:
                models = "mlp and resnet18" if model == "linear" else "linear"
                raise TrainError(
                    f"--{option.replace('_', '-')} is for --model {models}, not {model}"
                )
        config[key] = part(settings, given)
    elif name == "distill-lm":
        config["language_model"] = part(LanguageModel, given)
    else:
        config["distill"] = part(Distil, given)
        if name == "reproduce":
            config["soft_reg"] = part(Regression, given)
    config["threads"] = given.get("threads") or config.get("soft_regularization", {}).get("threads")
    config["machine"] = info.machine(config["threads"])
    return config
