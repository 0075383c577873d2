"""A fault that is put into the sources."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One fault.

    name: for the command line; file: where; text: what stands there exactly once; instead: the
    fault; tests: pytest's arguments; no_fault: why nothing can notice, where nothing can; source:
    the .cu file that is compiled with a header's fault, where it is not the usual one.
    """

    name: str
    file: str
    text: str
    instead: str
    tests: str
    no_fault: str = ""
    source: str = ""

    def stale(self, root):
        """What no longer fits the tree, or None."""
        file = root / self.file
        times = file.read_text().count(self.text) if file.exists() else 0
        if times != 1:
            return f"its text stands {times} times in {self.file}, not once"
        files = re.findall(r"tests/\w+\.py", self.tests)
        return next((f"{name} is gone" for name in files if not (root / name).exists()), None)
