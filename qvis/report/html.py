"""From the document of a report on layers to its page, with BokehJS for the figures."""

from __future__ import annotations

import json
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from qvis.analysis.damage import UNRELIABLE
from qvis.errors import QvisError
from qvis.report.channels import BINS, COLUMNS, pack_channels
from qvis.report.distributions import by_columns, lighten, pack_distributions
from qvis.report.document import Document, jsonable
from qvis.report.frame import render_page
from qvis.report.rows import find_overview, find_rows

STYLES = (
    "overview",
    "heatmap",
    "table",
    "detail",
    "damage",
    "exclusions",
    "equalization",
    "left_out",
    "narrow",
    "print",
)
SCRIPTS = (
    "data",
    "canvas",
    "damage",
    "distributions",
    "figures",
    "sorting",
    "listing",
    "choosing",
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
    return render_page(
        "changes.html.jinja" if changes else "report.html.jinja",
        document,
        styles=STYLES,
        scripts=SCRIPTS,
        data={"payload": summary.encode(), "channels": channels, "distributions": distributions},
        code={"bokeh": _bokeh_script()},
        figure_order=FIGURES[document["kind"]],
        unreliable=round(100 * UNRELIABLE),
        rows=find_rows(document),
        overview=find_overview(document),
    )


@cache
def _bokeh_script() -> str:
    """BokehJS's core as installed; found without importing Bokeh, which would cost more than the report itself."""
    spec = find_spec("bokeh")
    for folder in spec.submodule_search_locations or () if spec else ():
        path = Path(folder) / "server" / "static" / "js" / "bokeh.min.js"
        if path.is_file():
            return path.read_text(encoding="utf-8")
    raise QvisError("bokeh: BokehJS was not found, expected bokeh 3.4 or later; try: pip install --upgrade bokeh")
