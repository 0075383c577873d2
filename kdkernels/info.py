"""What this build of kdkernels is and what it runs on: ``python -m kdkernels info``."""

import importlib.metadata
import platform

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


def _version():
    try:
        return importlib.metadata.version("kdkernels")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
