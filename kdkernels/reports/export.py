"""The table of what ``kdkernels export`` wrote."""

import math

from kdkernels.reports.page import note
from kdkernels.reports.report import Section, Table, table
from kdkernels.tools.export import BATCHES, FOLDER
from kdkernels.tools.settings import FORMATS
from kdkernels.train.run_folder import RunFolder


def _milliseconds(latency: dict) -> str:
    digits = max(0, 2 - math.floor(math.log10(latency["median"] * 1e3)))
    texts = (f"{latency[key] * 1e3:.{digits}f}" for key in ("median", "low", "high"))
    return "{} ({} .. {})".format(*texts)


def _row(row: dict) -> dict[str, str]:
    made = {
        "format": FORMATS.get(row["format"], ("", "PyTorch, fp32"))[1],
        "test accuracy": f"{row['accuracy']:.2%}",
        "agrees with fp32": f"{row['agreement']:.2%}",
        "bytes": f"{row['bytes']:,}",
    }
    for size in BATCHES:
        latency = row["latency"][str(size)]
        made[f"ms, batch {size}"] = _milliseconds(latency)
        made[f"speed-up, batch {size}"] = f"{latency['speedup']:.2f}"
    return made


def tables(found: dict) -> list[Table]:
    """A table an arm of what export/results.json says, for the terminal and the page."""
    return [_of(arm, of) for arm, of in found["arms"].items()]


def _of(arm: str, of: dict) -> Table:
    against = "ONNX" if any(row["format"] == "onnx" for row in of["rows"]) else "PyTorch"
    return table(
        f"Export: the student of arm {arm}",
        map(_row, of["rows"]),
        note("export", of=of, against=against),
    )


def sections(folder: RunFolder) -> list[Section]:
    """What was exported, for :func:`kdkernels.reports.report.write`."""
    found = folder.read_json(f"{FOLDER}/results.json") or {"arms": {}}
    return [Section("Export", tables(found), results=found)]
