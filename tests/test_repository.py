"""What the repository says of itself is so: the stub, targets, versions, which way imports go."""

import ast
import re
import runpy
import tomllib
from pathlib import Path

import pytest

import kdkernels

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / ".github").is_dir():
    pytest.skip("the sdist holds no workflows", allow_module_level=True)
TEXTS = ["README.md", "CONTRIBUTING.md", ".pre-commit-config.yaml", "docs/*.md", ".github/**/*.*"]
YAML = [*ROOT.glob(".github/**/*.yml"), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"]


def of(path):
    return yaml.safe_load((ROOT / path).read_text())


def test_stub_is_current():
    pytest.importorskip("ruff")
    stubs = runpy.run_path(str(ROOT / "csrc" / "stubs.py"))
    assert stubs["STUB"].read_text() == stubs["stub"](), "run `make stubs`"


def test_named_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    texts = {p: p.read_text() for pattern in TEXTS for p in ROOT.glob(pattern)}
    named = [
        (path.name, target)
        for path, text in texts.items()
        for target in re.findall(r"(?:`|\$ |: |^)make (?:\w+=\S+ )*([a-z-]+)", text, re.MULTILINE)
    ]
    [job] = of(".github/workflows/nightly.yml")["jobs"].values()
    named += [("nightly.yml", target) for target in job["strategy"]["matrix"]["target"]]
    assert len(named) > 20
    assert not [pair for pair in named if pair[1] not in targets]


@pytest.mark.parametrize("path", YAML, ids=lambda path: path.name)
def test_yaml(path):
    found = of(path)
    for job in found.get("jobs", {}).values():
        assert job["runs-on"] and job["timeout-minutes"]
        assert all(("uses" in step) != ("run" in step) for step in job["steps"])


def test_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    citation = of("CITATION.cff")
    assert citation["version"] == kdkernels.__version__
    assert citation["license"] == "BSD-3-Clause"
    pythons = of(".github/workflows/cpu.yml")["jobs"]["quick"]["strategy"]["matrix"]["python"]
    assert f">={pythons[0]}" == project["project"]["requires-python"]
    wheels = project["tool"]["cibuildwheel"]["build"].split()
    assert wheels == [f"cp{python.replace('.', '')}-manylinux*" for python in pythons]


# Of the package's parts, which others each may import; the ops are everything that is no part.
MAY_IMPORT = {
    "train": {"ops"},
    "experiments": {"ops", "train"},
    "tools": {"ops", "train", "experiments"},
    "reports": {"ops", "train", "experiments", "tools"},
    "commands": {"ops", "train", "experiments", "tools", "reports"},
    "ops": set(),
}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            if node.module == "kdkernels":
                yield from (f"kdkernels.{name.name}" for name in node.names)


def test_imports_go_one_way():
    package = ROOT / "kdkernels"
    for path in package.rglob("*.py"):
        own = path.relative_to(package).parts[0]
        if own == "__main__.py":
            continue
        own = own if own in MAY_IMPORT else "ops"
        for name in imported(path):
            parts = name.split(".")
            if parts[0] == "kdkernels" and len(parts) > 1:
                part = parts[1] if parts[1] in MAY_IMPORT else "ops"
                assert part in MAY_IMPORT[own] | {own}, f"{path} imports {name}"
