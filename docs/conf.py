"""How Sphinx builds these pages. Nothing is fetched, and no framework needs to be installed."""

from __future__ import annotations

import sys
from pathlib import Path

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from typer.testing import CliRunner

from qvis.cli import app as command_line
from qvis.quantization.methods import CELLS, METHODS, NAMES, Cell
from qvis.version import __version__

sys.path.insert(0, str(Path(__file__).parent))
from layer_rules import rows

project = "qvis"
author = "The qvis developers"
copyright = "The qvis developers"
version = release = __version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"qvis {release}"
html_show_copyright = False
html_show_sourcelink = False

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_type_aliases = {name: name for name in ("ArrayLike", "FloatArray", "IntArray", "BoolArray")}
autodoc_typehints = "signature"
python_use_unqualified_type_names = True
maximum_signature_line_length = 80
napoleon_use_ivar = True
# docstrings write the absolute value of a weight as |w|, which reST would take for a substitution
rst_prolog = r".. |w| replace:: \|w\|"

SCREENSHOT = "images/report.png"


class SupportedLayers(SphinxDirective):
    """A table of the layer types that have a rule, made from the rules themselves."""

    def run(self) -> list[nodes.Node]:
        lines = [".. list-table::", "   :header-rows: 1", "   :widths: 14 38 24 24", ""]
        for row in (("Framework", "Layer", "Weight", "Output channels"), *rows()):
            lines += [f"   {'*' if i == 0 else ' '} - {cell}" for i, cell in enumerate(row)]
        node = nodes.container()
        self.state.nested_parse(StringList(lines, source=__file__), self.content_offset, node)
        return node.children


class QuantizationCells(SphinxDirective):
    """What each method does, and a table of what can be quantized to what, made from the cells themselves."""

    def run(self) -> list[nodes.Node]:
        lines = [line for method, does in METHODS.items() for line in (f"``{method}``", f"   {does}.", "")]
        lines += [".. list-table::", "   :header-rows: 1", "   :widths: 14 24 26 22 14", ""]
        head = ("Framework", "Method", "Files", "Bits of weights", "Needs")
        for row in (head, *map(_row, dict.fromkeys((cell.framework, cell.method) for cell in CELLS))):
            lines += [f"   {'*' if i == 0 else ' '} - {text}" for i, text in enumerate(row)]
        node = nodes.container()
        self.state.nested_parse(StringList(lines, source=__file__), self.content_offset, node)
        return node.children


def _row(what: tuple[str, str]) -> tuple[str, ...]:
    cells = [cell for cell in CELLS if (cell.framework, cell.method) == what]
    bits: dict[str, list[str]] = {}
    for cell in cells:
        bits.setdefault(_widths(cell), []).append(cell.suffix)
    most = max(bits, key=lambda widths: len(bits[widths]))
    told = [most, *(f"{widths} in {', '.join(bits[widths])}" for widths in bits if widths != most)]
    return NAMES[what[0]], what[1], ", ".join(cell.suffix for cell in cells), "; ".join(told), cells[0].needs


def _widths(cell: Cell) -> str:
    least, most = min(cell.bits), max(cell.bits)
    between = len(cell.bits) == most - least + 1 > 2
    return str(most) if least == most else f"{least} {'to' if between else 'or'} {most}"


class CommandHelp(SphinxDirective):
    """What ``qvis COMMAND --help`` prints; without an argument, what ``qvis --help`` does."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        result = CliRunner().invoke(
            command_line, [*self.arguments, "--help"], prog_name="qvis", env={"NO_COLOR": "1"}, terminal_width=80
        )
        if result.exit_code != 0:
            raise self.error(f"qvis {' '.join(self.arguments)} --help failed: {result.output}")
        return [nodes.literal_block(result.stdout, result.stdout.strip(), language="text")]


class ReportScreenshot(SphinxDirective):
    """The picture of a report, once there is one."""

    def run(self) -> list[nodes.Node]:
        if not (Path(__file__).parent / SCREENSHOT).is_file():
            return []
        lines = [f".. image:: {SCREENSHOT}", "   :alt: A report: the verdict, an overview of all layers, and a table"]
        node = nodes.container()
        self.state.nested_parse(StringList(lines, source=__file__), self.content_offset, node)
        return node.children


# Napoleon takes what stands before a colon in the first line of an attribute's docstring for its type. These two take
# such docstrings out of its hands, and put them back.
_attributes: dict[str, list[str]] = {}


def before_napoleon(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:  # noqa: ARG001
    if what in ("attribute", "property"):
        _attributes[name] = lines[:]
        lines.clear()


def after_napoleon(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:  # noqa: ARG001
    if what in ("attribute", "property"):
        lines[:] = _attributes.pop(name)


def setup(app: Sphinx) -> None:
    """Add the directives, and keep napoleon away from attributes."""
    app.connect("autodoc-process-docstring", before_napoleon, priority=100)
    app.connect("autodoc-process-docstring", after_napoleon, priority=900)
    app.add_directive("supported-layers", SupportedLayers)
    app.add_directive("command-help", CommandHelp)
    app.add_directive("quantization-cells", QuantizationCells)
    app.add_directive("report-screenshot", ReportScreenshot)
