"""``kdkernels tune``."""

import dataclasses
import os
import shutil
from typing import Any

from kdkernels import info
from kdkernels.commands.runs import absolute, import_from
from kdkernels.reports import search
from kdkernels.tools import tune
from kdkernels.tools.settings import Search, Workers
from kdkernels.train import TrainError, console
from kdkernels.train.run_folder import RunFolder


def command(_: str, given: dict[str, Any]) -> int:
    """Search, or go on with a search, and show what it found."""
    how = Workers(**{name: given.pop(name) for name in ("workers", "threads") if name in given})
    if "resume" in given:
        folder = RunFolder.open(given.pop("resume"))
        if "tune" not in folder.config:
            raise TrainError(f"{folder.path} holds no run of tune to continue")
        for name in given.keys() - {"trials", "confirm"}:
            raise TrainError(f"with --resume, --{name.replace('_', '-')} is the earlier run's")
        folder.config["tune"] |= given
        import_from(folder.config)
        tune.check(folder.config)
        folder.write_json("config.json", folder.config)
    else:
        out = given.pop("out", None)
        own = {field.name for field in dataclasses.fields(Search)} & given.keys()
        config = {
            "command": "tune",
            "started_in": os.getcwd(),
            "tune": dataclasses.asdict(Search(**{name: given.pop(name) for name in own})),
            "distill": given | absolute(given),
            "machine": info.machine(how.threads),
        }
        tune.check(config)
        folder = RunFolder.create(out, config)
    screen = console.make()
    screen.print(f"this run's folder is {folder.path}")
    try:
        tables = search.write(*tune.run(folder, screen, how.workers, how.threads))
    except TrainError as error:
        if error.status == 2 and not folder.read_json("search/teacher.json"):
            shutil.rmtree(folder.path)  # the settings cannot be used: nothing to go on with
        raise
    console.show(screen, tables)
    screen.print(f"the best settings are {folder.path / 'best.json'}, for distill --config")
    screen.print(f"the report is {folder.path / 'report.html'}")
    return 0
