"""Build kdkernels._C against the installed torch: the CPU kernels always, CUDA where it can be.

KDKERNELS_CUDA=0|1|auto       leave CUDA out, insist on it, or take it if a toolkit is found (auto)
TORCH_CUDA_ARCH_LIST="9.0"    GPU architectures; default the visible GPUs', else 8.0;9.0+PTX
MAX_JOBS=N                    compilers at a time; default as cores and free memory allow

Whatever prevents a build ends it with one sentence that names the command that works.
"""

import glob
import importlib.util
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

MINIMUM_TORCH = (2, 11)
DEFAULT_ARCHS = "8.0;9.0+PTX"
GB_PER_JOB = 2  # what one compiler needs at its peak on a file with torch headers

ROOT = Path(__file__).resolve().parent
INIT = (ROOT / "kdkernels" / "__init__.py").read_text()
VERSION = re.search('^__version__ = "(.+)"$', INIT, re.MULTILINE)[1]
PIP_BUILD = "pip install --no-build-isolation ."

CXX_FLAGS = [
    *("-O3", "-std=c++20", "-g0", "-fopenmp", "-fvisibility=hidden"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    *("-Wall", "-Wextra", "-Wno-unknown-pragmas"),
]
# The kernels round as the CPU does: --fmad=false, fused multiply-adds are written out. torch turns
# the operators of the 16-bit types off for every .cu file; -U turns them on again.
NVCC_FLAGS = [
    *("-O3", "-std=c++20", "--fmad=false", "-lineinfo", "-Xcompiler", "-fvisibility=hidden"),
    *("-U__CUDA_NO_HALF_OPERATORS__", "-U__CUDA_NO_HALF_CONVERSIONS__"),
    *("-U__CUDA_NO_HALF2_OPERATORS__", "-U__CUDA_NO_BFLOAT16_CONVERSIONS__"),
]


def stop(sentence):
    """End the build with one sentence instead of a traceback."""
    raise SystemExit(f"kdkernels: {sentence}")


def output_of(*command, env=None):
    """What a command prints, stdout and stderr together; empty if it cannot run."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    try:
        return subprocess.run(command, env=env, text=True, timeout=600, **pipes).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


# ---- torch and the tools --------------------------------------------------------------------


def import_torch():
    """Import the torch that the extension will run with, also from within pip's isolated build."""
    if importlib.util.find_spec("torch") is None:
        # An isolated build hides the environment that it builds for; the same interpreter without
        # the isolation's variables sees it.
        env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
        code = "import sys; print('\\n'.join(sys.path[1:]))"
        paths = output_of(sys.executable, "-c", code, env=env).splitlines()
        sys.path += [path for path in paths if path not in sys.path]
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        stop(
            f"{sys.executable} has no torch, and the extension is built against the torch that it "
            f"will run with: run `pip install torch wheel ninja`, then `{PIP_BUILD}`."
        )
    check_torch_version(torch.__version__)
    return torch


def check_torch_version(version):
    """Stop if this torch is too old."""
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if found < MINIMUM_TORCH:
        stop(
            f"torch {version} is too old: run `pip install 'torch>={dotted(MINIMUM_TORCH)}'`, "
            f"then `{PIP_BUILD}`."
        )


def choose_compilers(folder=ROOT / "build" / "compilers"):
    """Make CC and CXX name one program each: of several words, as `ccache g++`, a script of them.

    torch takes CXX for one program, and what follows CC's first word for flags.
    """
    for name in ("CC", "CXX"):
        try:
            words = shlex.split(os.environ.get(name, ""))
        except ValueError as error:
            stop(f"{name} is '{os.environ[name]}', which is no command: {error}.")
        if not words:
            os.environ.pop(name, None)  # an empty one is as good as none
        elif len(words) > 1:
            if not runs(*words, "--version"):
                stop(f"{name} is '{os.environ[name]}', which does not run: set it to a compiler.")
            script = Path(folder, name.lower())
            script.parent.mkdir(parents=True, exist_ok=True)
            script.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
            script.chmod(0o755)
            os.environ[name] = str(script)


def runs(*command):
    """Whether a command ends well."""
    try:
        return subprocess.run(command, capture_output=True, timeout=600).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def check_tools():
    """Stop if the compiler, Python's headers or setuptools' wheel command is missing."""
    import setuptools

    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        stop(
            f"there is no C++ compiler `{compiler}`: run `apt-get install g++`, or set CXX to one."
        )
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        stop(
            f"{sys.executable} has no Python.h: run "
            f"`apt-get install python{dotted(sys.version_info[:2])}-dev`."
        )
    # Before 70.1 the command bdist_wheel came from the package wheel.
    old = tuple(int(part) for part in setuptools.__version__.split(".")[:2]) < (70, 1)
    in_place = "build_ext" in sys.argv  # makes no wheel
    if old and not in_place and importlib.util.find_spec("wheel") is None:
        stop(
            f"setuptools {setuptools.__version__} needs wheel: "
            f"run `pip install wheel ninja`, then `{PIP_BUILD}`."
        )


def dotted(numbers):
    """(2, 11) -> "2.11"."""
    return ".".join(str(number) for number in numbers)


# ---- the CUDA toolkit -----------------------------------------------------------------------


@dataclass
class Toolkit:
    """A folder with bin/nvcc, and the version that nvcc reports."""

    home: Path
    version: str

    @property
    def nvcc(self):
        """The compiler itself, not a wrapper."""
        return str(self.home / "bin" / "nvcc")


def toolkit_of(nvcc):
    """Return the Toolkit behind an nvcc, which may be a link or a wrapper script, or None."""
    release = re.search(r"release (\d+\.\d+)", output_of(str(nvcc), "--version"))
    if release is None:
        return None
    # nvcc says where it is at home, whatever stands in front of it.
    top = re.search(r"^#\$ TOP=(.+)$", output_of(str(nvcc), "--dryrun", "x.cu"), re.MULTILINE)
    home = Path(top[1].strip()) if top else Path(nvcc).resolve().parent.parent
    return Toolkit(home.resolve(), release[1]) if (home / "bin" / "nvcc").exists() else None


def nvidia_wheel_folders():
    """The folders under site-packages/nvidia: cu13 with torch for CUDA 13, one a library before."""
    spec = importlib.util.find_spec("nvidia")
    roots = spec.submodule_search_locations if spec else []
    return sorted(Path(folder) for root in roots for folder in glob.glob(f"{root}/*/"))


def nvcc_candidates(usr_local="/usr/local"):
    """Every nvcc there is, in the order in which they are preferred."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    found = [Path(home, "bin", "nvcc") for home in homes if home]
    found += [Path(folder, "nvcc") for folder in os.environ.get("PATH", "").split(os.pathsep)]
    found += sorted(Path(usr_local).glob("cuda*/bin/nvcc"), reverse=True)
    found += [folder / "bin" / "nvcc" for folder in nvidia_wheel_folders()]
    return [nvcc for nvcc in dict.fromkeys(found) if os.access(nvcc, os.X_OK) and nvcc.is_file()]


def problem_with(toolkit, torch_cuda):
    """Why this toolkit cannot build for this torch; empty if it can."""
    if toolkit.version.split(".")[0] != torch_cuda.split(".")[0]:
        return "is of another CUDA version"
    # A toolkit may be half there, its parts of different versions, or older than the compiler.
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cu")
        source.write_text("#include <cuda_fp16.h>\n__global__ void probe(__half* x) { *x = 1; }\n")
        host = ["-ccbin", os.environ["CC"]] if os.environ.get("CC") else []
        command = [toolkit.nvcc, *host, "-std=c++20", "-c", str(source), "-o", f"{folder}/probe.o"]
        printed = output_of(*command)
        if Path(folder, "probe.o").exists():
            return ""
    lines = [line for line in printed.splitlines() if re.search("error|fatal", line)] or [printed]
    return f"cannot compile a test file ({lines[0].split('rror: ')[-1].strip()})"


def choose_toolkit(setting, torch_cuda, candidates):
    """Return (Toolkit, "") to build CUDA with, or (None, why not); stop where that is an error."""
    if setting not in ("0", "1", "auto"):
        stop(f"KDKERNELS_CUDA is '{setting}'; it takes 0, 1 or auto.")
    if setting == "0":
        return None, "KDKERNELS_CUDA=0"
    if torch_cuda is None:
        reason = "this torch is built without CUDA"
        if setting == "1":
            stop(
                f"KDKERNELS_CUDA=1, but {reason}: install a CUDA one from https://pytorch.org, "
                f"then run `KDKERNELS_CUDA=1 {PIP_BUILD}`."
            )
        return None, reason

    problems = {}
    for nvcc in candidates:
        toolkit = toolkit_of(nvcc)
        if toolkit is None or toolkit.home in problems:
            continue
        problem = problem_with(toolkit, torch_cuda)
        if not problem:
            return toolkit, ""
        problems[toolkit.home] = f"nvcc {toolkit.version} in {toolkit.home} {problem}"

    install = f"`pip install 'cuda-toolkit[nvcc,crt,nvvm,cccl]=={torch_cuda}.*'`"
    if problems:
        told = " and ".join(problems.values())
        if "unsupported GNU version" in told:
            install = f"`apt-get install g++-13` and `CC=gcc-13 CXX=g++-13 {PIP_BUILD}`"
        stop(
            f"this torch is built for CUDA {torch_cuda}, but {told}: run {install} and build "
            f"again, or build for the CPU only with `KDKERNELS_CUDA=0 {PIP_BUILD}`."
        )
    reason = (
        "no nvcc was found in $CUDA_HOME, $CUDA_PATH, $PATH, /usr/local/cuda* or "
        "site-packages/nvidia"
    )
    if setting == "1":
        stop(
            f"KDKERNELS_CUDA=1, but {reason}: run {install}, or install NVIDIA's CUDA {torch_cuda} "
            f"toolkit and set CUDA_HOME, then run `KDKERNELS_CUDA=1 {PIP_BUILD}`."
        )
    return None, f"{reason}; for CUDA run {install} and build again"


# ---- what to compile, and how ---------------------------------------------------------------


def arch_list(capabilities):
    """TORCH_CUDA_ARCH_LIST, else what the visible GPUs are, else DEFAULT_ARCHS."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if asked.strip() and asked != "native":
        return ";".join(re.split(r"[;, ]+", asked.strip(";, ")))
    if not capabilities:
        return DEFAULT_ARCHS
    return ";".join(f"{major}.{minor}" for major, minor in sorted(set(capabilities))) + "+PTX"


def gencode(archs):
    """Flags of nvcc for an architecture list, "8.0;9.0+PTX"."""
    flags = []
    for arch in archs.split(";"):
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", arch)
        if match is None:
            stop(f"TORCH_CUDA_ARCH_LIST has '{arch}'; it takes a list such as '8.0;9.0+PTX'.")
        number = match[1] + match[2]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def free_memory_gb(proc="/proc/meminfo", cgroup="/sys/fs/cgroup"):
    """Memory that this process may still take, in GB: the machine's, or its container's if less."""
    text = Path(proc).read_text() if Path(proc).exists() else ""
    available = re.search(r"MemAvailable:\s+(\d+) kB", text)
    free = [int(available[1]) * 1024] if available else []
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            free.append(int(Path(cgroup, limit).read_text()) - int(Path(cgroup, used).read_text()))
        except (OSError, ValueError):  # no such cgroup, or "max"
            continue
    return max(0, min(free)) / 2**30 if free else float("inf")


def max_jobs(cores, memory_gb):
    """Compilers at a time: MAX_JOBS if set, else one a core and a GB_PER_JOB of free memory."""
    asked = os.environ.get("MAX_JOBS", "")
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    return max(1, int(min(cores, memory_gb // GB_PER_JOB)))


def cudart_link_args(toolkit):
    """Link the CUDA runtime that torch itself loads, else the toolkit's."""
    for folder in nvidia_wheel_folders():
        for library in sorted(folder.glob("lib/libcudart.so.*")):
            return [str(library)]
    return [f"-L{toolkit.home / lib}" for lib in ("lib64", "lib")] + ["-lcudart"]


def make_extension(torch, toolkit):
    """The setuptools Extension for kdkernels._C."""
    from setuptools import Extension
    from torch.utils import cpp_extension

    patterns = ["csrc/*.cpp", "csrc/ops/*.cpp", "csrc/cpu/*.cpp"]
    # torch's headers, and in the nvidia wheels the CUDA headers that those include. Only C++ files
    # see them: a .cu file includes no torch header.
    system = cpp_extension.include_paths()
    libraries = ["c10", "torch", "torch_cpu", "torch_python"]
    cxx, nvcc, link = list(CXX_FLAGS), list(NVCC_FLAGS), ["-fopenmp"]
    if toolkit:
        patterns.append("csrc/cuda/*.cu")
        capabilities = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
        archs = arch_list(list(capabilities))
        nvcc += gencode(archs)
        system += [str(path) for path in (f / "include" for f in nvidia_wheel_folders())]
        system.append(str(toolkit.home / "include"))
        libraries += ["c10_cuda", "torch_cuda"]
        link += cudart_link_args(toolkit)
        cxx += [
            "-DKDKERNELS_WITH_CUDA",
            f'-DKDKERNELS_CUDA_VERSION="{toolkit.version}"',
            f'-DKDKERNELS_CUDA_ARCHS="{archs}"',
        ]
    for path in system:
        cxx += ["-isystem", path]
    return Extension(
        "kdkernels._C",
        sorted(source for pattern in patterns for source in glob.glob(pattern, root_dir=ROOT)),
        include_dirs=[str(ROOT / "csrc")],
        library_dirs=cpp_extension.library_paths(),
        libraries=libraries,
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        extra_link_args=link,
        language="c++",
    )


def make_build_ext(torch, toolkit, summary):
    """A BuildExtension with one sentence for a failure and objects kept between builds."""
    from torch.utils import cpp_extension

    cpp_extension.CUDA_HOME = str(toolkit.home) if toolkit else None
    tag = f"torch{torch.__version__}-{sys.implementation.cache_tag}-{cuda_tag(toolkit)}"

    class BuildExt(cpp_extension.BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            # An editable install would compile in a temporary folder, everything each time.
            self.build_temp = str(ROOT / "build" / tag)

        def run(self):
            print(summary, flush=True)
            try:
                super().run()
            except RuntimeError as error:
                detail = " ".join(str(part) for part in error.args)
                stop(
                    f"{detail} (the compiler's own message is above; if it was killed, memory ran "
                    f"out: run `MAX_JOBS=1 {PIP_BUILD}`)."
                )

    return BuildExt


def cuda_tag(toolkit):
    """What was built, in a word: cpu, cu130."""
    return "cu" + toolkit.version.replace(".", "") if toolkit else "cpu"


def version_of(toolkit, root=ROOT):
    """Return 0.1.0+cpu or 0.1.0+cu130: pip hides what a build prints, but shows the version.

    A source archive is neither, and what is built from one keeps the archive's version.
    """
    archive = "sdist" in sys.argv or (root / "PKG-INFO").exists()
    return VERSION if archive else f"{VERSION}+{cuda_tag(toolkit)}"


def main():
    """Decide what to build, say so, and build it."""
    from setuptools import find_packages, setup

    torch = import_torch()
    choose_compilers()
    check_tools()
    setting = os.environ.get("KDKERNELS_CUDA") or "auto"
    toolkit, reason = choose_toolkit(setting, torch.version.cuda, nvcc_candidates())
    os.environ["MAX_JOBS"] = jobs = str(max_jobs(len(os.sched_getaffinity(0)), free_memory_gb()))
    kind = f"CPU and CUDA {toolkit.version} from {toolkit.home}" if toolkit else "CPU only"
    summary = f"kdkernels: building for {kind}{f' ({reason})' if reason else ''}"
    summary += f", with torch {torch.__version__}, {jobs} compilers at a time."

    # torch guesses a CUDA_HOME while it is imported and warns about the guess; ours replaces it.
    logger = logging.getLogger("torch.utils.cpp_extension")
    logger.setLevel(logging.ERROR)
    extension = make_extension(torch, toolkit)
    logger.setLevel(logging.NOTSET)

    setup(
        version=version_of(toolkit),
        packages=find_packages(include=["kdkernels", "kdkernels.*"]),
        ext_modules=[extension],
        cmdclass={"build_ext": make_build_ext(torch, toolkit, summary)},
    )


if __name__ == "__main__":
    main()
