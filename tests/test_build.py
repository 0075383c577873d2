"""setup.py: finding torch and a CUDA toolkit, what it says when it cannot, flags and jobs."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("kdkernels_setup", ROOT / "setup.py")
build = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = build  # a dataclass looks its module up
spec.loader.exec_module(build)

# An nvcc that knows its home and its version, and compiles anything to an empty file.
FAKE_NVCC = """#!/bin/sh
case "$*" in
  *--version*) echo "Cuda compilation tools, release {version}, V{version}.1" ;;
  *--dryrun*) echo '#$ _HERE_={home}/bin'; echo '#$ TOP={home}/bin/..' ;;
  *) {compile} ;;
esac
"""
COMPILES = 'while [ "$1" != -o ]; do shift; done; : > "$2"'
NO_CCCL = "echo 'cuda_fp16.h:4492:10: fatal error: nv/target: No such file or directory'; exit 1"
NEW_GCC = "echo 'host_config.h:159:2: error: #error -- unsupported GNU version! gcc 99'; exit 1"


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    for name in ("CUDA_HOME", "CUDA_PATH", "CC", "CXX", "MAX_JOBS", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def fake_toolkit(tmp_path):
    def make(name, version="13.0", compiles=COMPILES):
        home = tmp_path / name
        text = FAKE_NVCC.format(home=home, version=version, compile=compiles)
        return script(home / "bin" / "nvcc", text)

    return make


def sentence_of(function, *arguments):
    with pytest.raises(SystemExit) as stopped:
        function(*arguments)
    text = str(stopped.value)
    assert text.startswith("kdkernels: ") and text.endswith(".") and "\n" not in text
    return text


# ---- finding a toolkit ----------------------------------------------------------------------


def test_toolkit_behind_a_plain_nvcc(fake_toolkit, tmp_path):
    toolkit = build.toolkit_of(fake_toolkit("cuda-13.0"))
    assert (toolkit.home, toolkit.version) == (tmp_path / "cuda-13.0", "13.0")
    assert toolkit.nvcc == str(tmp_path / "cuda-13.0" / "bin" / "nvcc")


def test_toolkit_behind_a_wrapper_script(fake_toolkit, tmp_path):
    nvcc = fake_toolkit("opt/cuda")
    wrapper = script(tmp_path / "bin" / "nvcc", f'#!/bin/sh\nexec {nvcc} "$@"\n')
    assert build.toolkit_of(wrapper).home == tmp_path / "opt" / "cuda"


def test_toolkit_behind_a_link(fake_toolkit, tmp_path):
    nvcc = fake_toolkit("opt/cuda")
    nvcc.write_text(nvcc.read_text().replace("--dryrun", "--nothing"))  # so only the link tells
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").symlink_to(nvcc)
    assert build.toolkit_of(tmp_path / "bin" / "nvcc").home == tmp_path / "opt" / "cuda"


@pytest.mark.parametrize("text", ["#!/bin/sh\nexit 1\n", "#!/no/such/shell\n", "not a program"])
def test_a_broken_nvcc_is_no_toolkit(tmp_path, text):
    assert build.toolkit_of(script(tmp_path / "bin" / "nvcc", text)) is None


def test_candidates_in_order(fake_toolkit, tmp_path, monkeypatch):
    home, path = fake_toolkit("home"), fake_toolkit("path")
    old, new = fake_toolkit("local/cuda-12.4"), fake_toolkit("local/cuda-13.0")
    wheel = fake_toolkit("site-packages/nvidia/cu13")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "nothing-here"))
    monkeypatch.setenv("PATH", f"{tmp_path}/empty:{path.parent}")
    monkeypatch.setattr(build, "nvidia_wheel_folders", lambda: [wheel.parent.parent])
    assert build.nvcc_candidates(tmp_path / "local") == [home, path, new, old, wheel]


def test_nvidia_wheels(tmp_path, monkeypatch):
    (tmp_path / "nvidia" / "cu13" / "include").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    assert tmp_path / "nvidia" / "cu13" in build.nvidia_wheel_folders()


# ---- choosing one, and what is said otherwise -----------------------------------------------


@pytest.mark.parametrize("setting", ["auto", "1"])
def test_the_first_toolkit_that_fits_is_taken(fake_toolkit, setting):
    nvccs = [
        fake_toolkit("other", version="12.4"),
        fake_toolkit("half", compiles=NO_CCCL),
        fake_toolkit("good", version="13.2"),
        fake_toolkit("later"),
    ]
    toolkit, reason = build.choose_toolkit(setting, "13.0", nvccs)
    assert (toolkit.nvcc, reason) == (str(nvccs[2]), "")


def test_cuda_left_out(fake_toolkit):
    assert build.choose_toolkit("0", "13.0", [fake_toolkit("good")]) == (None, "KDKERNELS_CUDA=0")


def test_no_toolkit():
    toolkit, reason = build.choose_toolkit("auto", "13.0", [])
    assert toolkit is None
    assert "$CUDA_HOME" in reason and "/usr/local/cuda*" in reason
    assert "`pip install 'cuda-toolkit[nvcc,crt,nvvm,cccl]==13.0.*'`" in reason
    text = sentence_of(build.choose_toolkit, "1", "13.0", [])
    assert "KDKERNELS_CUDA=1, but no nvcc was found in $CUDA_HOME" in text
    assert "`pip install 'cuda-toolkit[nvcc,crt,nvvm,cccl]==13.0.*'`" in text


@pytest.mark.parametrize("setting", ["auto", "1"])
def test_a_toolkit_of_another_major_version(fake_toolkit, tmp_path, setting):
    nvcc = fake_toolkit("cuda-12.4", version="12.4")
    text = sentence_of(build.choose_toolkit, setting, "13.0", [nvcc, nvcc])
    assert f"nvcc 12.4 in {tmp_path / 'cuda-12.4'} is of another CUDA version: run" in text
    assert "`pip install 'cuda-toolkit[nvcc,crt,nvvm,cccl]==13.0.*'`" in text
    assert "`KDKERNELS_CUDA=0 pip install --no-build-isolation .`" in text


def test_a_toolkit_that_is_half_there(fake_toolkit):
    nvcc = fake_toolkit("half", compiles=NO_CCCL)
    text = sentence_of(build.choose_toolkit, "auto", "13.0", [nvcc])
    assert "cannot compile a test file (nv/target: No such file or directory): run" in text


def test_a_compiler_that_is_too_new(fake_toolkit):
    nvcc = fake_toolkit("strict", compiles=NEW_GCC)
    text = sentence_of(build.choose_toolkit, "auto", "13.0", [nvcc])
    assert "unsupported GNU version" in text and "CC=gcc-13 CXX=g++-13 pip install" in text


def test_a_torch_without_cuda(fake_toolkit):
    nvccs = [fake_toolkit("good")]
    assert build.choose_toolkit("auto", None, nvccs) == (None, "this torch is built without CUDA")
    assert "https://pytorch.org" in sentence_of(build.choose_toolkit, "1", None, nvccs)


@pytest.mark.parametrize("setting", ["yes", "2", "AUTO", " 1"])
def test_an_unknown_setting(setting):
    assert "takes 0, 1 or auto" in sentence_of(build.choose_toolkit, setting, "13.0", [])


# ---- torch and the tools --------------------------------------------------------------------


@pytest.mark.parametrize("version", ["2.11.0", "2.14.1+cu130", "2.15.0a0+git1234", "3.0"])
def test_torch_new_enough(version):
    build.check_torch_version(version)


@pytest.mark.parametrize("version", ["2.10.9", "1.13.1+cu117"])
def test_torch_too_old(version):
    text = sentence_of(build.check_torch_version, version)
    assert version in text and "`pip install 'torch>=2.11'`" in text


def test_torch_of_the_environment_is_found_in_isolation(tmp_path):
    """As pip isolates: a sitecustomize on PYTHONPATH takes site-packages away."""
    hide = "import sys; sys.path = [p for p in sys.path if not p.endswith('site-packages')]"
    (tmp_path / "sitecustomize.py").write_text(hide)
    code = (
        "import importlib.util as u, runpy; assert u.find_spec('torch') is None\n"
        "build = runpy.run_path('setup.py')\n"
        "print(build['import_torch']().__file__)"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONNOUSERSITE": "1"}
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert Path(found.stdout.strip()).samefile(importlib.util.find_spec("torch").origin)


def test_no_torch_anywhere():
    """-S: an interpreter without site-packages."""
    code = (
        "import runpy, sys; build = runpy.run_path('setup.py')\n"
        "sys.executable = '/no/python'; build['import_torch']()"
    )
    command = [sys.executable, "-I", "-S", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "/no/python has no torch" in done.stderr
    assert (
        "`pip install torch wheel ninja`, then `pip install --no-build-isolation .`" in done.stderr
    )


def test_no_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "/no/such/g++ -m64")
    assert "`apt-get install g++`" in sentence_of(build.check_tools)


@pytest.mark.parametrize("name", ["CC", "CXX"])
def test_a_compiler_behind_a_launcher(monkeypatch, tmp_path, name):
    monkeypatch.setenv(name, "env LANG=C c++ -DWORD='a b'")
    build.choose_compilers(tmp_path)
    (tmp_path / "x.cpp").write_text("")
    script = os.environ[name]
    command = [script, "-dM", "-E", str(tmp_path / "x.cpp")]
    assert "#define WORD a b\n" in subprocess.run(command, capture_output=True, text=True).stdout
    build.choose_compilers(tmp_path)
    assert os.environ[name] == script  # one word is left as it is
    monkeypatch.setenv(name, "")
    build.choose_compilers(tmp_path)
    assert name not in os.environ
    for command in ("env /no/such/g++", "'"):
        monkeypatch.setenv(name, command)
        assert f"{name} is '{command}'" in sentence_of(lambda: build.choose_compilers(tmp_path))


def test_no_python_headers(monkeypatch, tmp_path):
    monkeypatch.setattr(build.sysconfig, "get_path", lambda name: str(tmp_path))
    assert "has no Python.h: run `apt-get install python3." in sentence_of(build.check_tools)


def test_setuptools_without_wheel(monkeypatch):
    import setuptools

    monkeypatch.setattr(setuptools, "__version__", "65.5.0")
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    assert "`pip install wheel ninja`" in sentence_of(build.check_tools)


# ---- architectures and jobs -----------------------------------------------------------------


def test_architectures(monkeypatch):
    assert build.arch_list([]) == "8.0;9.0+PTX"
    assert build.arch_list([(9, 0), (8, 6), (9, 0)]) == "8.6;9.0+PTX"
    assert build.arch_list([(12, 0), (9, 0)]) == "9.0;12.0+PTX"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5 8.6, 9.0a+PTX;")
    assert build.arch_list([(8, 0)]) == "7.5;8.6;9.0a+PTX"


def test_architecture_flags():
    assert build.gencode("8.0;9.0+PTX") == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    assert build.gencode("12.0a") == ["-gencode=arch=compute_120a,code=sm_120a"]
    assert "has 'Hopper'; it takes a list such as" in sentence_of(build.gencode, "Hopper")


@pytest.mark.parametrize(
    ("cores", "memory", "jobs"),
    [(2, 24, 2), (64, 9.5, 4), (64, float("inf"), 64), (8, 1.5, 1), (1, 100, 1)],
)
def test_jobs_are_bounded_by_cores_and_memory(cores, memory, jobs):
    assert build.max_jobs(cores, memory) == jobs


def test_max_jobs_is_respected(monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "7")
    assert build.max_jobs(2, 4) == 7
    monkeypatch.setenv("MAX_JOBS", "many")
    assert build.max_jobs(2, 4) == 2


def test_free_memory_is_the_containers_if_that_is_less(tmp_path):
    proc = tmp_path / "meminfo"
    proc.write_text("MemTotal: 99999999 kB\nMemAvailable:   16777216 kB\n")
    assert build.free_memory_gb(proc, tmp_path) == 16
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text(f"{2**30}\n")
    assert build.free_memory_gb(proc, tmp_path) == 16
    (tmp_path / "memory.max").write_text(f"{5 * 2**30}\n")
    assert build.free_memory_gb(proc, tmp_path) == 4
    assert build.free_memory_gb(tmp_path / "none", tmp_path / "none") == float("inf")


def test_version_tells_what_was_built(fake_toolkit, tmp_path, monkeypatch):
    toolkit = build.toolkit_of(fake_toolkit("cuda"))
    assert build.version_of(toolkit, tmp_path) == f"{build.VERSION}+cu130"
    assert build.version_of(None, tmp_path) == f"{build.VERSION}+cpu"
    (tmp_path / "PKG-INFO").touch()
    assert build.version_of(toolkit, tmp_path) == build.VERSION
    monkeypatch.setattr(sys, "argv", ["setup.py", "sdist"])
    assert build.version_of(None, tmp_path / "elsewhere") == build.VERSION


# ---- what was built -------------------------------------------------------------------------


def test_info():
    command = [sys.executable, "-m", "kdkernels", "info"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    facts = dict(
        re.split(r"\s{2,}|(?<=CPU levels) ", line, maxsplit=1) for line in done.stdout.splitlines()
    )
    import torch

    from kdkernels import _C

    assert facts["torch"].startswith(torch.__version__)
    assert facts["in use"].split()[0] == _C.build_info()["isa"]
    assert "baseline" in facts["CPU levels"]
    assert facts["threads"].isdigit()


def test_info_says_cpu_only_and_how_to_get_cuda():
    from kdkernels import info

    facts = {**info.collect(), "cuda": None, "cuda_archs": None, "gpus": []}
    text = "\n".join(info.describe(facts))
    assert "CPU only: for CUDA, run `KDKERNELS_CUDA=1 pip install --no-build-isolation .`" in text
    assert "none visible to torch" in text
    facts.update(cuda="13.0", cuda_archs="8.0;9.0+PTX", gpus=["NVIDIA H100 (9.0)"])
    text = "\n".join(info.describe(facts))
    assert "CPU only" not in text
    assert "13.0, compiled for 8.0;9.0+PTX" in text and "NVIDIA H100 (9.0)" in text


def test_one_openmp_runtime():
    """The threads of the kernels are torch's: a second libgomp would bring its own."""
    code = (
        "import torch, kdkernels._C\n"
        "print(*{line.split()[-1] for line in open('/proc/self/maps') if 'omp' in line})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    found = re.findall(r"\S*/lib[gi]?omp\d*[.-]\S*", done.stdout)
    assert len(found) == 1, done.stdout + done.stderr
