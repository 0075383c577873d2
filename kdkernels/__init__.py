"""Fused kernels for knowledge distillation and Gaussian noise injection in PyTorch."""

import importlib.util
import os
import sys
from typing import TYPE_CHECKING

__version__ = "0.1.0"


def _is_command() -> bool:
    """Whether this process is the ``kdkernels`` command, or ``python -m kdkernels``."""
    program = sys.argv[0] if getattr(sys, "argv", None) else ""
    if program == "-m":
        return ("-m", "kdkernels") in zip(sys.orig_argv, sys.orig_argv[1:], strict=False)
    return os.path.basename(program) == "kdkernels"


if TYPE_CHECKING or not _is_command():
    from kdkernels.public import *  # noqa: F403
    from kdkernels.public import _C as _C
    from kdkernels.public import __all__ as __all__
else:  # the command reads its arguments, and prints its help, before torch is imported

    def __getattr__(name: str):
        if name.startswith("_") or importlib.util.find_spec(f"kdkernels.{name}") is not None:
            raise AttributeError(name)
        public = importlib.import_module("kdkernels.public")
        globals().update({name: getattr(public, name) for name in public.__all__})
        if name not in public.__all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return globals()[name]
