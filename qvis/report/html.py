"""From a document to one self-contained page: words, arrays, styles and scripts in a single file."""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from qvis.analysis.damage import UNRELIABLE
from qvis.errors import QvisError
from qvis.report.channels import BINS, COLUMNS, pack_channels
from qvis.report.distributions import by_columns, lighten, pack_distributions
from qvis.report.document import Document, jsonable
from qvis.report.rows import find_overview, find_rows
from qvis.words import count, visible

STYLES = (
    "page",
    "tools",
    "verdict",
    "overview",
    "heatmap",
    "table",
    "detail",
    "damage",
    "exclusions",
    "equalization",
    "glossary",
    "left_out",
    "help",
    "narrow",
    "print",
)
SCRIPTS = (
    "page",
    "canvas",
    "damage",
    "distributions",
    "figures",
    "table",
    "overview",
    "heatmap",
    "detail",
    "exclusions",
    "tools",
    "start",
)
"""Files in ``templates/widgets``, in the order in which they are joined."""

FIGURES = {
    "sensitivity": ("ranges", "relative", "levels"),
    "relative_weight_ranges": ("relative", "ranges", "levels"),
    "weight_ranges": ("ranges", "relative", "levels"),
    "changes_after_optimization": ("ranges", "relative", "levels"),
}


def render_html(document: Document) -> str:
    """The page for a document of any kind; the same bytes for the same document."""
    changes = document["kind"] == "changes_after_optimization"
    series = ("before", "after") if changes else (None, "stored")
    points, channels = pack_channels(document["layers"], series)
    head, distributions = pack_distributions(document["layers"])
    light: Document = jsonable(document, statistics=False)
    light["layers"] = by_columns([lighten(layer) for layer in light["layers"]])
    payload = {"document": light, "columns": COLUMNS, "bins": BINS, "points": points, "distributions": head}
    summary = json.dumps(payload | {"unreliable": UNRELIABLE}, ensure_ascii=False, separators=(",", ":"))
    bokeh = _bokeh_script()
    theme, script = read_widget("theme.js"), _join_scripts()
    page = {
        "css": Markup("\n".join(read_widget(f"{name}.css") for name in STYLES)),
        "theme": Markup(theme),
        "script": Markup(script),
        "hashes": [_hash(text) for text in (theme, script, bokeh)],
        "payload": _pack(summary.encode()),
        "channels": _pack(channels),
        "distributions": _pack(distributions),
        "bokeh": _packed_bokeh(),
        "figure_order": FIGURES[document["kind"]],
        "unreliable": round(100 * UNRELIABLE),
    }
    template = "changes.html.jinja" if changes else "report.html.jinja"
    return (
        environment()
        .get_template(template)
        .render(document=document, page=page, rows=find_rows(document), overview=find_overview(document))
    )


# ---------------------------------------------------------------------------------------------- static parts


@cache
def environment() -> Environment:
    """Where all pages' templates are found, with the filters that they use."""
    made = Environment(
        loader=PackageLoader("qvis.templates", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    made.filters["thousands"] = "{:,}".format
    made.filters["counted"] = count
    made.filters["visible"] = visible
    made.filters["unbroken"] = lambda text: text.replace(" %", "\N{NO-BREAK SPACE}%")
    return made


@cache
def read_widget(name: str) -> str:
    """A style sheet or script of ``templates/widgets``."""
    text = (files("qvis.templates") / "widgets" / name).read_text(encoding="utf-8")
    if "</script" in text.lower():
        raise QvisError(f"{name}: a script inside a page cannot contain '</script'")
    return text


@cache
def _join_scripts() -> str:
    parts = "\n".join(read_widget(f"{name}.js") for name in SCRIPTS)
    return f'"use strict";\n(async () => {{\n{parts}\n}})();\n'


@cache
def _bokeh_script() -> str:
    """BokehJS's core as installed; found without importing Bokeh, which would cost more than the report itself."""
    spec = find_spec("bokeh")
    for folder in spec.submodule_search_locations or () if spec else ():
        path = Path(folder) / "server" / "static" / "js" / "bokeh.min.js"
        if path.is_file():
            return path.read_text(encoding="utf-8")
    raise QvisError("bokeh: BokehJS was not found, expected bokeh 3.4 or later; try: pip install --upgrade bokeh")


@cache
def _packed_bokeh() -> str:
    return _pack(_bokeh_script().encode())


def _pack(content: bytes) -> str:
    """Deflated (zlib, RFC 1950) and in base64: what the page's ``unpack`` reads."""
    return base64.b64encode(zlib.compress(content, 6)).decode("ascii")


def _hash(script: str) -> Markup:
    """The source expression that lets a page's security policy run this script and no other."""
    # a browser hashes what its parser saw, in which every line end is a line feed
    digest = hashlib.sha256(script.replace("\r\n", "\n").encode()).digest()
    return Markup(f"'sha256-{base64.b64encode(digest).decode('ascii')}'")
