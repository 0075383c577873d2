"""The table of what ``kdkernels export`` wrote."""

import math

from kdkernels.reports.page import note
from kdkernels.reports.report import Cell, Section, Table, table
from kdkernels.tools.export import BATCHES, FOLDER
from kdkernels.tools.settings import FORMATS
from kdkernels.train.run_folder import RunFolder


def _milliseconds(latency: dict) -> str:
    digits = max(0, 2 - math.floor(math.log10(latency["median"] * 1e3)))
    texts = (f"{latency[key] * 1e3:.{digits}f}" for key in ("median", "low", "high"))
    return "{} ({} .. {})".format(*texts)


def tables(found: dict) -> list[Table]:
    """A table an arm of what export/results.json says, for the terminal and the page."""
    columns: dict[str, Cell] = {
        "format": lambda row: FORMATS.get(row["format"], ("", "PyTorch, fp32"))[1],
        "test accuracy": "{accuracy:.2%}",
        "agrees with fp32": "{agreement:.2%}",
        "bytes": "{bytes:,}",
    }
    for size in map(str, BATCHES):
        columns[f"ms, batch {size}"] = lambda row, s=size: _milliseconds(row["latency"][s])
        columns[f"speed-up, batch {size}"] = lambda row, s=size: (
            f"{row['latency'][s]['speedup']:.2f}"
        )
    made = []
    for arm, of in found["arms"].items():
        has_onnx = any(row["format"] == "onnx" for row in of["rows"])
        text = note("export", of=of, against="ONNX" if has_onnx else "PyTorch")
        made.append(table(f"Export: the student of arm {arm}", of["rows"], columns, text))
    return made


def sections(folder: RunFolder) -> list[Section]:
    """What was exported, for :func:`kdkernels.reports.report.write`."""
    found = folder.read_json(f"{FOLDER}/results.json") or {"arms": {}}
    return [Section("Export", tables(found), results=found)]
