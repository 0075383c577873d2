"""``kdkernels export``."""

import sys
from typing import Any

from kdkernels.commands.runs import import_from
from kdkernels.reports import report
from kdkernels.reports.export import tables
from kdkernels.tools import export
from kdkernels.tools.settings import Export
from kdkernels.train import console as terminal
from kdkernels.train.run_folder import RunFolder


def command(_: str, given: dict[str, Any]) -> int:
    """Write the files, and show how they compare."""
    console = terminal.make()
    folder = RunFolder.open(given.pop("run_dir"))
    import_from(folder.config)
    settings = Export(**given)
    with terminal.progress(console) as show:
        found = export.run(settings, folder, *show)
    report.write(folder)
    terminal.show(console, tables(found))
    console.print(f"the files are in {folder.path / export.FOLDER}")
    failed = found["arms"][settings.arm]["failed"]
    for name, sentence in failed.items():
        print(f"kdkernels export: {name}: {sentence}", file=sys.stderr)
    return 1 if failed else 0
