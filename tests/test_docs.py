"""The site: it builds without a warning, and its code runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sphinx", reason="needs the extra `docs`")
ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(path.stem for path in (ROOT / "docs").glob("*.md"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-b",
        "html",
        "docs",
        out,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize("page", PAGES)
def test_page(site, page):
    html = (site / f"{page}.html").read_text()
    source = (ROOT / "docs" / f"{page}.md").read_text()
    code = re.findall(r"^```python\n(.*?)^```", source, re.MULTILINE | re.DOTALL)
    printed = html.count('class="printed')
    assert printed == sum("print(" in block for block in code)
    assert html.count("<math ") >= source.count("$$") // 2
    # Nothing is fetched from elsewhere, so that it reads the same without a network.
    assert not re.findall(r'(?:src|href)="(https?://[^"]+\.(?:js|css|svg|png))', html)
    for picture in re.findall(r"```{picture} (\w+)", source):
        for theme in ("light", "dark"):
            assert f"{picture}-{theme}.svg" in html


def test_every_public_name_is_explained(site):
    import kdkernels

    ids = set(
        re.findall(
            r'id="(kdkernels\.\w+)"', "".join((site / f"{page}.html").read_text() for page in PAGES)
        )
    )
    missing = {f"kdkernels.{name}" for name in kdkernels.__all__} - ids - {"kdkernels.reference"}
    assert not missing
