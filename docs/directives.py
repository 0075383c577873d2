"""What the pages are made with beside Sphinx: code that runs, pictures, option lists, examples.

Whatever fails in here is a warning, and so, under -W, the end of the build.
"""

import ast
import contextlib
import importlib
import io
import re
import traceback
from pathlib import Path

import latex2mathml.converter
import pictures
from docutils import nodes
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

import kdkernels
from kdkernels.__main__ import make_parser

DOCS = Path(__file__).resolve().parent
PICTURES = DOCS.parent / "build" / "docs-pictures"
logger = logging.getLogger(__name__)


class Python(SphinxDirective):
    """A page's code, run in order in one namespace; what it prints stands below it."""

    has_content = True

    def run(self):
        code = "\n".join(self.content)
        namespace = self.env.temp_data.setdefault("python", {"__name__": "page"})
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                exec(compile(code, f"{self.env.docname}.md", "exec"), namespace)
        except Exception:
            message = f"this code fails:\n{code}\n{traceback.format_exc()}"
            logger.warning(message, location=self.get_location())
        blocks = [nodes.literal_block(code, code, language="python")]
        if printed.getvalue():
            text = printed.getvalue().rstrip()
            blocks.append(nodes.literal_block(text, text, language="text", classes=["printed"]))
        return blocks


class Picture(SphinxDirective):
    """One of pictures.py, in the reader's colouring; the content is its caption."""

    required_arguments = 1
    has_content = True

    def run(self):
        name = self.arguments[0]
        figure = nodes.figure()
        for theme in pictures.INKS:
            path = PICTURES / f"{name}-{theme}.svg"
            if not path.exists():
                logger.warning(f"there is no picture {path}", location=self.get_location())
            # Sphinx takes images by their path from the folder of the sources.
            uri = "/" + str(Path("..", path.relative_to(DOCS.parent)))
            alt = pictures.PICTURES[name].__doc__.strip()
            figure += nodes.image(uri=uri, alt=alt, classes=[f"only-{theme}"])
        caption = nodes.caption()
        caption += self.parse_inline(" ".join(self.content))[0]
        figure += caption
        return [figure]


class Commands(SphinxDirective):
    """Every command and its options, as its own --help has them."""

    def run(self):
        [commands] = (a for a in make_parser()._actions if isinstance(a.choices, dict))
        return [self.command(*item) for item in commands.choices.items()]

    def command(self, name, parser):
        """A section of one command."""
        title = f"kdkernels {name}"
        section = nodes.section(ids=[nodes.make_id(title)])
        section += nodes.title(title, title)
        about = parser.description or ""
        section += nodes.paragraph(about, about[:1].upper() + about[1:])
        items = nodes.definition_list(classes=["options"])
        for action in parser._actions:
            if action.dest == "help":
                continue
            shown = ", ".join(action.option_strings) or action.metavar or action.dest
            text = (action.help or "") % {**vars(action), "prog": parser.prog}
            if action.option_strings and action.nargs != 0:
                choices = "|".join(map(str, action.choices or ()))
                if len(choices) > 40:
                    text = f"{choices.replace('|', ', ')}: {text}"
                    choices = ""
                shown += " " + (action.metavar or choices or action.dest.upper())
            term = nodes.term("", "", nodes.literal(shown, shown))
            about = nodes.definition("", nodes.paragraph(text, text))
            items += nodes.definition_list_item("", term, about)
        if items.children:
            section += items
        return section


class Api(SphinxDirective):
    """Whatever a module's __all__ has."""

    required_arguments = 1

    def run(self):
        try:
            module = importlib.import_module(self.arguments[0])
        except ImportError as error:
            logger.warning(f"{error}", location=self.get_location())
            return []
        lines = []
        for name in module.__all__:
            thing = getattr(module, name)
            kind = "function"
            if isinstance(thing, type):
                kind = "exception" if issubclass(thing, Exception) else "class"
            lines += [f".. auto{kind}:: {module.__name__}.{name}", ""]
        rst = "```{eval-rst}\n" + "\n".join(lines) + "\n```"
        return self.parse_text_to_nodes(rst)


class Examples(SphinxDirective):
    """Every program in examples/, its docstring and its code."""

    def run(self):
        out = []
        for path in sorted((DOCS / "examples").glob("*.py")):
            self.env.note_dependency(str(path))
            code = path.read_text()
            about = (ast.get_docstring(ast.parse(code)) or "").split("\n\n")[0]
            section = nodes.section(ids=[nodes.make_id(path.stem)])
            section += nodes.title(path.name, path.name)
            section += nodes.paragraph(about, " ".join(about.split()))
            shown = nodes.literal_block(code, code, language="python", classes=["long"])
            section += shown
            out.append(section)
        return out


def mathml(translator, node, display):
    """A formula as MathML, which browsers draw without a script or a network."""
    latex = node.astext().replace(r"\log ", r"\log\, ")
    form = "block" if display else "inline"
    translator.body.append(latex2mathml.converter.convert(latex, display=form))
    raise nodes.SkipNode


def join(lines):
    """Arguments' names that go over several lines, on one, where napoleon looks for them."""
    out = []
    for line in lines:
        if out and re.fullmatch(r"\s+(\w+, )*\w+,", out[-1]):
            out[-1] += " " + line.strip()
        else:
            out.append(line)
    return out


NAMES = re.compile(r"``(kdkernels\.)?(" + "|".join(kdkernels.__all__) + r")(\([^`]*\))?``")


def link(app, what, name, obj, options, lines):
    """The library's names in docstrings lead to where they are explained."""
    own = name.rsplit(".", 1)[-1]
    lines[:] = [
        NAMES.sub(lambda m: m[0] if m[2] == own or m[3] else f":py:obj:`~kdkernels.{m[2]}`", line)
        for line in join(lines)
    ]


def setup(app):
    """Called by Sphinx."""
    app.add_directive("python", Python)
    app.add_directive("picture", Picture)
    app.add_directive("commands", Commands)
    app.add_directive("api", Api)
    app.add_directive("examples", Examples)
    app.add_html_math_renderer(
        "mathml",
        inline_renderers=(lambda self, node: mathml(self, node, False), None),
        block_renderers=(lambda self, node: mathml(self, node, True), None),
    )
    app.connect("builder-inited", lambda app: pictures.draw(PICTURES))
    app.connect("autodoc-process-docstring", link, priority=400)  # before napoleon
    return {"parallel_read_safe": True, "parallel_write_safe": True}
