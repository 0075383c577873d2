"""What the repository says of itself is so: the stub, targets, versions, which way imports go."""

import ast
import json
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


def slug(heading):
    """A heading's anchor, as GitHub and MyST make it."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def test_links_lead_somewhere():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")]
    links = [
        (page, link)
        for page in pages
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text())
        if not link.startswith("http")
    ]
    assert len(links) > 20
    for page, link in links:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), f"{page.name}: {link}"


def test_readme_is_one_page_and_leads_to_every_op():
    readme = (ROOT / "README.md").read_text()
    assert readme.count("\n") <= 150
    shown = set(re.findall(r"\(docs/(\w+)\.md[#)]", readme))
    pages = {page.stem for page in ROOT.glob("docs/*.md")}
    assert pages - shown == {"index", "contribute", "changelog"}


def cells(page):
    """The rows of a page's tables: {(header, ...): {first cell: [other cells]}}."""
    tables, header = {}, None
    for line in (ROOT / page).read_text().splitlines():
        row = tuple(cell.strip() for cell in line.strip("|").split("|"))
        if not line.startswith("|"):
            header = None
        elif header is None:
            header = row
            tables[header] = {}
        elif not line.startswith("|---"):
            tables[header][row[0]] = row[1:]
    return tables


UNITS = {"ms": 1e3, "µs": 1e6, "%": 100}
CASES = {
    "fused": "kdkernels",
    "fused, in place": "kdkernels in place",
    "ours": "kdkernels",
    "ours, no noise": "kdkernels, no noise",
}


def as_shown(cell, *values):
    """Whether a cell has these values: a speed-up and its interval, or one with a unit."""
    numbers = re.findall(r"[\d.]+", cell)
    unit = UNITS.get(cell.split()[-1], 1)
    return all(
        abs(float(number) - unit * value) <= 0.51 * 10.0 ** -len(number.partition(".")[2])
        for number, value in zip(numbers, values, strict=False)
    )


def test_benchmarks_are_those_of_the_results():
    record = json.loads((ROOT / "bench" / "results" / "amd-epyc-2-cores.json").read_text())
    results = {result["title"]: result["cases"] for result in record["results"]}
    checked = 0
    for header, rows in cells("docs/benchmarks.md").items():
        if "fused" not in header and "torch fused" not in header:
            continue
        for title, row in rows.items():
            title = title.replace("forward KL", "forward_kl").replace("reverse KL", "reverse_kl")
            names = (f"noise on {title}", f"{title} fp32", f"overhead, {title} fp32", title)
            [cases] = [results[name] for name in names if name in results]
            for name, cell in zip(header[1:], row, strict=True):
                if not cell:
                    continue
                case = cases.get(CASES.get(name, name))
                if name.endswith("of the triad"):
                    best = [n for n in ("kdkernels in place", "kdkernels") if n in cases][0]
                    assert as_shown(cell, cases[best]["of_triad"][0]), (title, name)
                elif cell.endswith("s"):
                    assert as_shown(cell, case["median"]), (title, name)
                else:
                    assert as_shown(cell, *case["faster"]), (title, name)
                checked += 1
    assert checked > 80
    sparse = results["top 64 of 64x128256 fp32"]["kdkernels, sparse gradient"]["faster"]
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    [shown] = re.findall(r"takes 1/(\d+ \(\d+ to \d+\))", page)
    assert as_shown(shown, *sparse)


def test_the_accuracy_of_fused_linear_is_that_of_the_results():
    """And what is said of ours: gradients within 0.3 %, losses within 1e-5."""
    of = runpy.run_path(str(ROOT / "bench" / "accuracy.py"))
    record = json.loads((ROOT / "bench" / "results" / "linear-accuracy.json").read_text())
    assert "\n".join(of["markdown"](record)) in (ROOT / "docs" / "linear.md").read_text()
    assert len(record["rows"]) == len(of["BETAS"]) * len(of["STDS"])
    for row in record["rows"]:
        of_loss, of_gradients = row["errors"]["kdkernels"]
        assert of_loss < 1e-5 and of_gradients < 3e-3


def test_figures_of_the_readme_stand_in_the_docs():
    measured = {}
    for page in ("benchmarks", "experiments"):
        for header, rows in cells(f"docs/{page}.md").items():
            for title, row in rows.items():
                measured[title] = dict(zip(header[1:], row, strict=True))
    [table] = [t for header, t in cells("README.md").items() if header[0].startswith("Measured")]
    loss, model, noise = table.values()
    theirs = measured["forward KL 512x32000 bf16"]
    assert loss[0] == theirs["eager"] and loss[1].startswith(theirs["torch.compile"])
    found = [theirs[name].split()[0] for name in ("fused", "fused, in place")]
    assert loss[2] == "{} times faster; {} in place".format(*found)
    text = (ROOT / "docs" / "experiments.md").read_text()
    assert "their gradients to 4e-7" in text and model[2].endswith("4e-7")
    plain = measured["reference: `F.kl_div` and `F.cross_entropy` of logits"]
    theirs = measured["fused linear: no logits"]
    assert model[0] == plain["peak memory of a step"]
    assert f"linear {theirs['peak memory of a step']}, {theirs['speed-up']} times" in model[2]
    theirs = measured["20M elements fp32"]
    assert noise[1].startswith(theirs["torch.compile"])
    assert noise[2].startswith(theirs["fused"].split()[0])


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
