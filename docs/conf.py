"""Sphinx's configuration: what `make docs` builds."""

import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

import kdkernels  # noqa: E402

project = "kdkernels"
copyright = "the kdkernels authors"
version = release = kdkernels.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "directives",
]
exclude_patterns = ["examples"]
html_theme = "furo"
html_title = f"kdkernels {version}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_math_renderer = "mathml"
smartquotes = False  # they would take the hyphens of options

# A fence of Python is run, and the page shows what it prints.
myst_fence_as_directive = ["python"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "none"  # the docstrings say shapes and dtypes, and overloads repeat a signature
napoleon_numpy_docstring = False
napoleon_use_rtype = False
python_maximum_signature_line_length = 80
