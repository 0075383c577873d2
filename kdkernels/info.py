"""What this build of kdkernels is and what it runs on: ``python -m kdkernels info``."""

import importlib.metadata
import os
import platform
import time
from pathlib import Path

CPU_ONLY = (
    "CPU only: for CUDA, run `KDKERNELS_CUDA=1 pip install --no-build-isolation .` "
    "in kdkernels' source folder"
)


def collect():
    """Return versions, what was compiled in, the ISA level in use, threads and GPUs, as a dict."""
    import torch

    from kdkernels import _C

    build = _C.build_info()
    return {
        "kdkernels": _version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "torch_built_with": build["torch"],
        "compiler": build["compiler"],
        "cuda": build["cuda"],
        "cuda_archs": build["cuda_archs"],
        "isa_levels": list(build["isa_levels"]),
        "isa_supported": list(build["isa_supported"]),
        "isa": build["isa"],
        "threads": torch.get_num_threads(),
        "gpus": [
            f"{torch.cuda.get_device_name(i)} ({'.'.join(map(str, capability))})"
            for i in range(torch.cuda.device_count())
            for capability in [torch.cuda.get_device_capability(i)]
        ],
    }


def processor() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine(threads: int | None = None) -> dict[str, str]:
    """What a run ran on: processor, threads, versions, GPUs."""
    facts = collect()
    found = {
        "processor": f"{processor()}, {os.cpu_count()} cores visible; kernels use {facts['isa']}",
        "threads": str(threads or facts["threads"]),
        "versions": f"kdkernels {_version()}, torch {facts['torch']}, torchvision "
        f"{_version('torchvision')}, Python {facts['python']}",
    }
    if facts["gpus"]:
        found["GPUs"] = ", ".join(facts["gpus"])
    return found


def _others() -> float | None:
    """Processor seconds that were not this process's, stolen ones included; None: not Linux."""
    try:
        spent = list(map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]))
    except (OSError, ValueError):
        return None
    idle, waiting = spent[3:5]
    return (sum(spent) - idle - waiting) / os.sysconf("SC_CLK_TCK") - time.process_time()


class Others:
    """Watches what other processes take of the processors' time, from when it is made."""

    def __init__(self):
        self._before, self._began = _others(), time.perf_counter()

    def share(self) -> float | None:
        """Their share until now, 0..1; None where the system does not tell."""
        after = _others()
        if self._before is None or after is None:
            return None
        processors = (os.cpu_count() or 1) * (time.perf_counter() - self._began)
        return max(0.0, (after - self._before) / processors)


def disturbed(share: float | None) -> str:
    """Says so where other work had more than 5 % of the processors' time; else empty."""
    share = share or 0.0
    return f"(disturbed: other work had {share:.0%} of the processors)" * (share > 0.05)


def describe(facts):
    """Return the lines that ``kdkernels info`` prints."""
    if facts["cuda"]:
        cuda = f"{facts['cuda']}, compiled for {facts['cuda_archs']}"
    else:
        cuda = CPU_ONLY
    torch_cuda = f"CUDA {facts['torch_cuda']}" if facts["torch_cuda"] else "no CUDA"
    rows = {
        "kdkernels": facts["kdkernels"],
        "python": facts["python"],
        "torch": f"{facts['torch']}, {torch_cuda}; built with {facts['torch_built_with']}",
        "compiler": facts["compiler"],
        "CUDA": cuda,
        "CPU levels": f"{', '.join(facts['isa_levels'])} compiled, "
        f"{', '.join(facts['isa_supported'])} run here",
        "in use": f"{facts['isa']} (KDKERNELS_ISA chooses another)",
        "threads": facts["threads"],
        "GPUs": ", ".join(facts["gpus"]) or "none visible to torch",
    }
    return [f"{name:<11}{value}" for name, value in rows.items()]


def main():
    """Print what ``collect`` finds."""
    try:
        facts = collect()
    except ImportError as error:
        print(
            f"kdkernels._C does not load ({error}): "
            "run `pip install --no-build-isolation .` in kdkernels' source folder."
        )
        return 1
    print("\n".join(describe(facts)))
    return 0


def command(_name: str, _given: dict) -> int:
    """``kdkernels info``."""
    return main()


def _version(package="kdkernels"):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
