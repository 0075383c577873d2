"""Write kdkernels/_C.pyi, what type checkers know of bindings.cpp: `make stubs`.

What pybind11 defines has its signature in a docstring. The ops that bindings.cpp calls without
pybind11 have none, so that pybind11-stubgen would know nothing of them: they have a schema.
"""

import re
import subprocess
import sys
from pathlib import Path

import torch

from kdkernels import _C

STUB = Path(__file__).resolve().parent.parent / "kdkernels" / "_C.pyi"
HEAD = '''"""The extension module. `make stubs` writes this file."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

'''
# pybind11's words, which differ between its versions -> the stub's.
WORDS = {
    r"typing\.Annotated\[(.+?), \"FixedSize\(\d+\)\"\]": r"\1",
    r"typing\.SupportsInt( \| typing\.SupportsIndex)?": "int",
    r"typing\.|collections\.abc\.|torch\.": "",
    r"\bdict\b(?!\[)": "dict[str, Any]",
    r"\blist\b(?!\[)": "list[Any]",
    r"\bCallable\b(?!\[)": "Callable[..., Any]",
    r"(?<=[^(])\) ->": ", /) ->",
}


def python_type(kind: torch.Type, sequence: str) -> str:
    """A schema's type in Python's words, with `sequence` for a list."""
    if kind.kind() == "ListType":
        return f"{sequence}[{python_type(kind.getElementType(), sequence)}]"
    if kind.kind() == "OptionalType":
        return f"{python_type(kind.getElementType(), sequence)} | None"
    return "float" if kind.kind() == "NumberType" else str(kind)


def of_schema(name: str, schema: torch.FunctionSchema) -> str:
    """The signature of a registered op, whose arguments are all given, and by position."""
    arguments = [f"{a.name}: {python_type(a.type, 'Sequence')}" for a in schema.arguments]
    results = [python_type(result.type, "list") for result in schema.returns]
    result = f"tuple[{', '.join(results)}]" if len(results) > 1 else "".join(results) or "None"
    return f"def {name}({', '.join([*arguments, '/'])}) -> {result}: ..."


def of_docstring(docstring: str) -> str:
    """The signature that pybind11 writes into a docstring's first line."""
    signature = docstring.splitlines()[0]
    for pattern, word in WORDS.items():
        signature = re.sub(pattern, word, signature)
    return f"def {signature}: ..."


def stub() -> str:
    """The text of _C.pyi."""
    lines = []
    for name, value in sorted(vars(_C).items()):
        if name.startswith("__"):
            continue
        if not callable(value):
            lines.append(f"{name}: {type(value).__name__}")
        elif value.__doc__:
            lines.append(of_docstring(value.__doc__))
        else:
            lines.append(of_schema(name, getattr(torch.ops.kdkernels, name).default._schema))
    command = [sys.executable, "-m", "ruff", "format", "--stdin-filename", STUB, "-"]
    text = HEAD + "\n".join(lines)
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    STUB.write_text(stub())
