"""Fused kernels for knowledge distillation and Gaussian noise injection in PyTorch.

The import registers the ops with PyTorch. For the command alone, whose help does without torch,
both wait until a name is first used.
"""

import importlib
import importlib.util
import os.path
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from kdkernels.public import *  # noqa: F403
    from kdkernels.public import __all__ as __all__


def __getattr__(name: str) -> Any:
    if name == "_C":
        return _extension()
    if name.startswith("__") and name != "__all__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f"{__name__}.{name}")
    public = importlib.import_module(f"{__name__}.public")
    globals().update({known: getattr(public, known) for known in ("__all__", *public.__all__)})
    if name not in globals():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})


def _extension() -> Any:
    import torch  # first: the extension links to its libraries

    try:
        return importlib.import_module(f"{__name__}._C")
    except ImportError as error:
        raise ImportError(
            f"kdkernels._C does not load with torch {torch.__version__}; it must be built against "
            "the torch that runs it: pip install --no-build-isolation --force-reinstall --no-deps ."
        ) from error


# What argv starts with while the package is imported by its script, and by python -m kdkernels.
if os.path.basename((sys.argv or [""])[0]) not in ("kdkernels", "-m"):
    from kdkernels.public import *  # noqa: F403
