"""The sdist, the wheel that is built from it, and that wheel in a clean environment.

One build serves two ends: the sources have the contributor's page's patch applied before the wheel
is made, so that the new divergence is proven, too. Without a network: the clean environment sees
this one's torch.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("build", reason="needs the extra `package`")
ROOT = Path(__file__).resolve().parent.parent
PATCH = ROOT / "docs" / "add-divergence.patch"
CODE = """
import torch
import kdkernels

z = torch.randn(4, 1000, requires_grad=True)
loss = kdkernels.distillation_loss(z, torch.randn(4, 1000), torch.arange(4), temperature=2.0)
loss.backward()
assert loss > 0 and z.grad.norm() > 0
print(kdkernels.__file__, kdkernels.__version__)
"""


def run(*command, cwd, **env):
    """What a command prints; it must succeed."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | env
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def build(kind, source, out):
    """The archive that `python -m build` makes of a folder."""
    # What is proven here is the packaging, and values of the new divergence: not the optimiser.
    compiler = out / "c++"
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -O0\n')
    compiler.chmod(0o755)
    command = (sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", out)
    run(*command, source, cwd=out, KDKERNELS_CUDA="0", CXX=str(compiler))
    [archive] = out.glob("*.tar.gz" if kind == "sdist" else "*.whl")
    return archive


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The unpacked sdist."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build("sdist", ROOT, folder)) as archive:
        archive.extractall(folder, filter="data")
    [unpacked] = (path for path in folder.iterdir() if path.is_dir())
    return unpacked


@pytest.fixture(scope="module")
def patched(sources, tmp_path_factory):
    """The sdist with the patch, and with a file a folder that includes PyTorch: half the time."""
    folder = shutil.copytree(sources, tmp_path_factory.mktemp("patched") / "kdkernels")
    run("git", "apply", PATCH, cwd=folder)
    for place in ("csrc", "csrc/ops"):
        files = sorted((folder / place).glob("*.cpp"))
        text = "".join(file.read_text() for file in files)
        for file in files:
            file.unlink()
        (folder / place / "together.cpp").write_text(text)
    return folder


@pytest.fixture(scope="module")
def wheel(patched, tmp_path_factory):
    return build("wheel", patched, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """A fresh environment's, with the wheel and with this one's torch."""
    home = tmp_path_factory.mktemp("clean")
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    command = ("install", "--no-index", "--no-deps", "--quiet", wheel)
    run(sys.executable, "-m", "pip", "--python", python, *command, cwd=home)
    # A folder named in a .pth file is searched; its own .pth files, of editable installs, are not
    # read.
    paths = [Path(importlib.util.find_spec(name).origin).parents[1] for name in ("torch", "pytest")]
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home)
    Path(site.strip(), "torch.pth").write_text("\n".join(map(str, paths)))
    return python


def files_below(folder, suffixes):
    return {str(p.relative_to(ROOT)) for p in folder.rglob("*") if p.suffix in suffixes}


def test_sdist_holds_what_a_build_needs(sources):
    names = {str(path.relative_to(sources)) for path in sources.rglob("*") if path.is_file()}
    needed = files_below(ROOT / "csrc", {".h", ".cuh", ".cpp", ".cu"})
    needed |= files_below(
        ROOT / "kdkernels", {".py", ".pyi", ".html", ".jinja", ".j2", ".css", ".js"}
    )
    needed |= {"setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "Makefile"}
    assert len(needed) > 40
    assert needed <= names
    assert not [name for name in names if Path(name).suffix in (".so", ".pyc", ".o")]


def test_wheel_holds_the_package_alone(wheel):
    from packaging.utils import parse_wheel_filename

    import kdkernels

    name, version, _, tags = parse_wheel_filename(wheel.name)
    # An index takes no local version, such as +cpu.
    assert (name, str(version)) == ("kdkernels", kdkernels.__version__)
    [tag] = tags
    assert tag.interpreter == f"cp{sys.version_info.major}{sys.version_info.minor}"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    package = files_below(
        ROOT / "kdkernels", {".py", ".pyi", ".html", ".jinja", ".j2", ".css", ".js"}
    )
    module = f"kdkernels/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    assert package | {"kdkernels/py.typed", module} == {
        name for name in names if ".dist-info/" not in name
    }


def test_wheel_runs_in_a_clean_environment(python, tmp_path):
    file, version = run(python, "-c", CODE, cwd=tmp_path).split()
    assert Path(file).is_relative_to(python.parents[1])
    command = python.parent / "kdkernels"
    facts = run(command, "info", cwd=tmp_path)
    assert re.search(rf"^kdkernels +{re.escape(version)}$", facts, re.MULTILINE)
    assert "CPU only" in facts


def test_the_contributors_divergence(python, patched, tmp_path):
    """Values, gradients, gradcheck, limits: every test that goes over all divergences."""
    added = [line for line in PATCH.read_text().splitlines() if re.match(r"\+(?!\+\+)", line)]
    assert len(added) <= 20
    tests = patched / "tests" / "test_divergences.py"
    options = ("-k", "triangular", "-p", "no:cacheprovider", "--rootdir", patched)
    printed = run(python, "-m", "pytest", tests, *options, cwd=tmp_path, OMP_NUM_THREADS="1")
    assert int(re.search(r"(\d+) passed", printed)[1]) > 50
    assert "failed" not in printed


def test_cibuildwheel_builds_for_the_pythons_that_the_project_takes():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    settings = project["tool"]["cibuildwheel"]
    oldest = project["project"]["requires-python"].removeprefix(">=").replace(".", "")
    assert settings["build"].split()[0].startswith(f"cp{oldest}-manylinux")
    repair = settings["linux"]["repair-wheel-command"]
    assert repair.startswith("auditwheel repair")
    for library in ("libtorch*.so", "libc10*.so", "libgomp.so.1"):
        assert f"--exclude {library}" in repair
