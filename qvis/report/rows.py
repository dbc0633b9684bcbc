"""What the table and the overview of a page show: one dict for each row, and positions in percent."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil, floor, isfinite, log10, nan
from typing import Any

import numpy as np

from qvis.layers import FloatArray, Severity
from qvis.report.document import Document
from qvis.words import percent, short, visible

SPARK_STROKES = 28
SPARK_HEIGHT = 36
HOW = {
    "measured": ("measured", "measured: this layer was rounded alone"),
    "high": ("predicted", "predicted, within 1.5 times or so"),
    "fair": ("predicted", "predicted, within 2.5 times or so"),
    "low": ("low", "predicted, may be far off"),
}
"""The sign of each confidence, and what it says."""


def find_rows(document: Document) -> Iterable[dict[str, Any]]:
    """The rows of ``widgets/table.html.jinja``, worst first."""
    if document["kind"] == "changes_after_optimization":
        return _change_rows(document)
    return _rows(document) if document["sensitivity"] is None else _damage_rows(document)


def _rows(document: Document) -> Iterable[dict[str, Any]]:
    """The table of a report on the weights alone."""
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


def _damage_rows(document: Document) -> Iterable[dict[str, Any]]:
    """The table of a report for which the model was run."""
    found = {index: _damages(layer, document) for index, layer in enumerate(document["layers"])}
    worst = max((one["damage"] for one in found.values() if isfinite(one["damage"])), default=0)
    for index, layer in _by_rank(document):
        damages = found[index]
        how, how_title = HOW.get(damages.pop("confidence"), ("", ""))
        row = {**_identity(index, layer, layer), **_measures(layer), "how": how, "how_title": how_title}
        row["bar"] = f"{100 * damages['damage'] / worst:.1f}" if worst and isfinite(damages["damage"]) else "0"
        for name, value in damages.items():
            row |= {name: _sortable(value), f"{name}_text": _share(value)}
        yield row


def _damages(layer: dict[str, Any], document: Document) -> dict[str, Any]:
    """The figures of a layer at the width that is judged; NaN where they are not known."""
    known = layer["sensitivity"]
    if known is None:
        return {"damage": nan, "channel": nan, "inputs": nan, "operations": nan, "confidence": ""}
    at = document["sensitivity"]["bits"].index(document["bits"])
    channel = known["weights"].get("channel")
    return {
        "damage": known["damage"],
        "channel": channel["value"][at] if channel else nan,
        "inputs": known["damage_inputs"],
        "operations": known["share_of_operations"],
        "confidence": known["confidence"] if isfinite(known["damage"]) else "",
    }


def _change_rows(document: Document) -> Iterable[dict[str, Any]]:
    """The table of a comparison."""
    for index, layer in _by_rank(document):
        gain = layer["gain_db"]
        yield {
            **_identity(index, layer, layer["after"]),
            "name_before": layer["name_before"],
            "severity_before": layer["severity_before"],
            "verdict": layer["verdict"],
            "gain": _sortable(gain),
            "gain_text": layer["verdict"]
            if layer["verdict"] in ("same", "unchanged", "rounded") or not isfinite(gain)
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


def _share(value: float) -> str:
    """A percentage that fits into a narrow cell."""
    return percent(value).replace("less than ", "<\N{NO-BREAK SPACE}") if isfinite(value) else "n/a"


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


def find_overview(document: Document) -> dict[str, Any]:
    """Positions in percent for ``widgets/overview.html.jinja``: of damages where the model was run, else of noise."""
    layers = document["layers"]
    changes, ran = document["kind"] == "changes_after_optimization", document.get("sensitivity") is not None
    after = [_height(layer["after"] if changes else layer, ran) for layer in layers]
    before = [_height(layer["before"], ran) if changes else None for layer in layers]
    shares = [share for share in (*after, *before) if share is not None and isfinite(share) and share > 0]
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
        "limits": [
            {"y": y(share), "level": level, "share": f"{100 * share:.3g} %"}
            for level, share in limits.items()
            if 10.0**low < share
        ],
        "stems": [
            {"level": layer["severity"], "y": y(a), "before": None if b is None else y(b)}
            for layer, a, b in zip(layers, after, before, strict=True)
        ],
        "levels": [str(level) for level in Severity if any(layer["severity"] == level for layer in layers)],
        "groups": _groups([layer["name"] for layer in layers]),
        "before": changes,
        "longest_name": max((len(layer["name"]) for layer in layers), default=0),
    }


def _height(layer: dict[str, Any], ran: bool) -> float:
    """What a stem shows; NaN for an unusable layer, whose stem goes to the top, and 0 where nothing is known."""
    if not ran:
        share: float = layer["noise_share"]
        return share
    damage: float = nan if layer["sensitivity"] is None else layer["sensitivity"]["damage"]
    return damage if isfinite(damage) or layer["severity"] == "unusable" else 0.0


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
