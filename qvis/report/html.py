"""From a document to one self-contained page: rows, overview, arrays, styles and scripts in a single file."""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Iterable
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from math import ceil, floor, isfinite, log10
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from qvis.errors import QvisError
from qvis.layers import FloatArray, Severity
from qvis.report.channels import BINS, COLUMNS, pack_channels
from qvis.report.document import Document, jsonable
from qvis.words import count, percent, short, visible

STYLES = ("page", "tools", "verdict", "overview", "table", "detail", "glossary", "left_out", "help", "narrow", "print")
SCRIPTS = ("page", "figures", "table", "overview", "detail", "tools", "start")
"""Files in ``templates/widgets``, in the order in which they are joined."""

FIGURES = {
    "sensitivity": ("ranges", "relative", "levels"),
    "relative_weight_ranges": ("relative", "ranges", "levels"),
    "weight_ranges": ("ranges", "relative", "levels"),
    "changes_after_optimization": ("ranges", "relative", "levels"),
}
SPARK_STROKES = 28
SPARK_HEIGHT = 36


def render_html(document: Document) -> str:
    """The page for a document of any kind; the same bytes for the same document."""
    changes = document["kind"] == "changes_after_optimization"
    series = ("before", "after") if changes else (None,)
    points, channels = pack_channels(document["layers"], series)
    summary = json.dumps(
        {"document": jsonable(document, statistics=False), "columns": COLUMNS, "bins": BINS, "points": points},
        ensure_ascii=False,
        separators=(",", ":"),
    )
    bokeh = _bokeh_script()
    theme, script = read_widget("theme.js"), _join_scripts()
    page = {
        "css": Markup("\n".join(read_widget(f"{name}.css") for name in STYLES)),
        "theme": Markup(theme),
        "script": Markup(script),
        "hashes": [_hash(text) for text in (theme, script, bokeh)],
        "payload": _pack(summary.encode()),
        "channels": _pack(channels),
        "bokeh": _packed_bokeh(),
        "figure_order": FIGURES[document["kind"]],
    }
    template = "changes.html.jinja" if changes else "report.html.jinja"
    rows = _change_rows(document) if changes else _rows(document)
    return environment().get_template(template).render(
        document=document, page=page, rows=rows, overview=_overview(document, changes)
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


# ---------------------------------------------------------------------------------------------- rows of the table


def _rows(document: Document) -> Iterable[dict[str, Any]]:
    """The table of a report, worst first: one dict for each row of ``widgets/table.html.jinja``."""
    worst = max((layer["noise_share"] for layer in document["layers"] if isfinite(layer["noise_share"])), default=0)
    for index, layer in _by_rank(document):
        yield {
            **_identity(index, layer, layer),
            **_measures(layer),
            "bar": f"{100 * layer['noise_share'] / worst:.1f}" if worst and isfinite(layer["noise_share"]) else "0",
            "sqnr_tensor": _sortable(layer["sqnr_tensor_db"]),
            "sqnr_tensor_text": _decibels(layer["sqnr_tensor_db"]),
            "sqnr_channel": _sortable(layer["sqnr_channel_db"]),
            "sqnr_channel_text": _decibels(layer["sqnr_channel_db"]),
            "levels": layer["median_levels"],
            "levels_text": f"{layer['median_levels']:g}",
            "starved": len(layer["flags"]["starved"]),
        }


def _change_rows(document: Document) -> Iterable[dict[str, Any]]:
    """The table of a comparison, worst first."""
    for index, layer in _by_rank(document):
        gain = layer["gain_db"]
        yield {
            **_identity(index, layer, layer["after"]),
            "name_before": layer["name_before"],
            "severity_before": layer["severity_before"],
            "verdict": layer["verdict"],
            "gain": _sortable(gain),
            "gain_text": layer["verdict"] if layer["verdict"] in ("same", "unchanged", "rounded") or not isfinite(gain)
            else f"{gain:+.1f} dB".replace("-", "−"),
            "before": _measures(layer["before"]),
            "after": _measures(layer["after"]),
        }


def _by_rank(document: Document) -> list[tuple[int, dict[str, Any]]]:
    return sorted(enumerate(document["layers"]), key=lambda item: item[1]["rank"])


def _identity(index: int, layer: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    return {
        "index": index,
        "rank": layer["rank"],
        "name": layer["name"],
        "op": layer["op"],
        "shape": "×".join(map(str, part["shape"])),
        "severity": layer["severity"],
        "severity_rank": Severity(layer["severity"]).rank,
    }


def _measures(layer: dict[str, Any]) -> dict[str, Any]:
    share, relative = layer["noise_share"], layer["largest_relative_range"]
    path, width = _spark(layer["statistics"]["min"], layer["statistics"]["max"])
    return {
        "noise": _sortable(share),
        "noise_text": percent(share) if isfinite(share) else "n/a",
        "relative": _sortable(relative),
        "relative_text": short(relative) if isfinite(relative) else "n/a",
        "spark": path,
        "spark_width": width,
    }


def _sortable(value: float) -> str:
    """What a column sorts by, as JavaScript spells it; empty for NaN, which then stays last."""
    return "" if value != value else f"{value:.6g}".replace("inf", "Infinity")


def _decibels(value: float) -> str:
    return "n/a" if value != value else "∞" if value > 1e9 else f"{value:.1f}"


def _spark(low: FloatArray, high: FloatArray) -> tuple[str, int]:
    """A stroke from minimum to maximum for each channel or group of neighbours, in whole units, which are short."""
    finite = np.isfinite(low)
    if not finite.any():
        return "", 1
    if low.size > SPARK_STROKES:
        starts = np.linspace(0, low.size, SPARK_STROKES, endpoint=False).astype(int)
        low, high = np.fmin.reduceat(low, starts), np.fmax.reduceat(high, starts)
        finite = np.isfinite(low)
    bottom, top = float(np.nanmin(low)), float(np.nanmax(high))
    scale = SPARK_HEIGHT / ((top - bottom) or 1)
    with np.errstate(invalid="ignore"):
        starts = np.rint((top - high) * scale)
        lengths = np.maximum(np.rint((high - low) * scale), 1)
    return "".join(f"M{i} {starts[i]:.0f}v{lengths[i]:.0f}" for i in np.flatnonzero(finite)), int(low.size)


# ---------------------------------------------------------------------------------------------- overview


def _overview(document: Document, changes: bool) -> dict[str, Any]:
    """Positions in percent for ``widgets/overview.html.jinja``."""
    layers = document["layers"]
    after = [layer["after"] if changes else layer for layer in layers]
    before = [layer["before"] if changes else None for layer in layers]
    shares = [x["noise_share"] for x in (*after, *before) if x and isfinite(x["noise_share"]) and x["noise_share"] > 0]
    thresholds = document["thresholds"]
    limits = {level: 10 ** (-thresholds[f"{level}_db"] / 10) for level in ("problem", "watch")}
    high = max([ceil(log10(share) - 1e-3) for share in (*shares, *limits.values())], default=0)
    low = min([floor(log10(share)) for share in shares], default=-5)
    low = max(min(low, high - 3), high - 8)

    def y(share: float) -> str:
        if not isfinite(share):
            return "100"
        return f"{min(100.0, max(0.0, 100 * (log10(share) - low) / (high - low))) if share > 0 else 0:.1f}"

    return {
        "decades": [{"y": y(10.0**d), "label": f"{100 * 10.0**d:.{max(0, -2 - d)}f} %"} for d in range(low, high + 1)],
        "limits": [{"y": y(share), "level": level} for level, share in limits.items() if 10.0**low < share],
        "stems": [
            {"level": layer["severity"], "y": y(a["noise_share"]), "before": y(b["noise_share"]) if b else None}
            for layer, a, b in zip(layers, after, before, strict=True)
        ],
        "levels": [str(level) for level in Severity if any(layer["severity"] == level for layer in layers)],
        "groups": _groups([layer["name"] for layer in layers]),
        "before": changes,
        "longest_name": max((len(layer["name"]) for layer in layers), default=0),
    }


def _groups(names: list[str]) -> list[dict[str, Any]]:
    """Neighbouring layers of the same outer module, for the axis; the part that all names share is left away."""
    if not names:
        return []
    paths = [name.split(".") for name in names]
    shared = 0
    while all(len(path) > shared + 1 for path in paths) and len({path[shared] for path in paths}) == 1:
        shared += 1
    groups: list[list[Any]] = []
    for i, path in enumerate(paths):
        if groups and groups[-1][0] == path[shared]:
            groups[-1][2] = i + 1
        else:
            groups.append([path[shared], i, i + 1])
    each = 100 / len(names)
    return [{"name": visible(n), "x": f"{a * each:.3f}", "width": round((b - a) * each, 3)} for n, a, b in groups]
