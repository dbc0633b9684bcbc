"""From the document of a comparison of grids to its page."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import numpy as np

from qvis.layers import FloatArray
from qvis.quantization.tables import FLOATS, float_levels, logarithmic_levels, quantile_levels
from qvis.report.document import Document, jsonable
from qvis.report.frame import render_page
from qvis.report.grids_text import ranked_schemes, tell_best, tell_damage, tell_decibels
from qvis.words import short, size

STYLES = ("table", "detail", "left_out", "chart", "grids", "narrow", "print")
SCRIPTS = ("chart", "sorting", "listing", "choosing", "grids", "grids_detail", "grids_tools")
COLUMNS = ("sqnr_db", "damage", "confidence", "rank", "beaten_by", "same_as")
"""What the page reads of each grid of a layer."""
CONFIDENCES = ("measured", "high", "fair", "low")


def render_grids(document: Document) -> str:
    """The page; the same bytes for the same document."""
    light = dict(document)
    light["layers"] = [
        {key: value for key, value in layer.items() if key not in ("grids", "shown")}
        | {"shown": [[one["channel"], one["low"], one["high"], len(one["counts"])] for one in layer["shown"]]}
        for layer in document["layers"]
    ]
    light["verdict"] = {"text": document["verdict"]["text"]}
    payload = {"document": jsonable(light), "columns": COLUMNS, "confidences": CONFIDENCES, "tables": _tables(document)}
    first = len(document["verdict"]["details"]) - len(document["notes"]) - len(document["left_out"])
    return render_page(
        "grids.html.jinja",
        {**document, "verdict": {**document["verdict"], "first": first}},
        styles=STYLES,
        scripts=SCRIPTS,
        data={
            "payload": json.dumps(payload, ensure_ascii=False, separators=(",", ":")).encode(),
            "numbers": _pack_numbers(document),
        },
        schemes=list(_scheme_rows(document)),
        rows=list(_layer_rows(document)),
    )


def _tables(document: Document) -> dict[str, list[float]]:
    """The levels, before they are scaled, of each kind and width that has some which are the same everywhere."""
    found = {}
    for one in document["schemes"]:
        kind, bits = one["kind"], one["bits"]
        if kind in FLOATS:
            levels: FloatArray = float_levels(kind)
        elif kind in ("logarithmic", "quantile"):
            levels = logarithmic_levels(bits) if kind == "logarithmic" else quantile_levels(bits)
        else:
            continue
        found[f"{kind} {bits}"] = [float(f"{level:.7g}") for level in levels.tolist()]
    return found


def _pack_numbers(document: Document) -> bytes:
    """All that is there in large numbers, as float32; what a picture cannot show is cut off, which packs smaller.

    Of each layer :data:`COLUMNS`, each for all schemes; then of each part that is shown its counts, scales and
    zeros, and a codebook for each scheme that has one.
    """
    parts: list[list[float]] = []
    for layer in document["layers"]:
        grids = layer["grids"]
        for column in COLUMNS:
            if column == "confidence":
                parts.append([CONFIDENCES.index(one) if one else -1 for one in grids[column]])
            else:
                parts.append([-1 if one is None else one for one in grids[column]])
        for one in layer["shown"]:
            parts += [one["counts"], one["scales"], one["zeros"]]
            for place, scheme in enumerate(document["schemes"]):
                if scheme["kind"] == "kmeans":
                    parts.append(one["codebooks"].get(str(place), [np.nan] * 2 ** scheme["bits"]))
    numbers = (
        np.concatenate([np.asarray(part, dtype=np.float32) for part in parts]) if parts else np.zeros(0, np.float32)
    )
    whole = numbers.view(np.uint32).copy()
    finite = np.isfinite(numbers)
    whole[finite] = (whole[finite] + 0x200) & np.uint32(0xFFFFFC00)
    # the first bytes of all numbers, then the second ones, and so on
    packed: bytes = whole.astype("<u4").view(np.uint8).reshape(-1, 4).T.tobytes()
    return packed


def _scheme_rows(document: Document) -> Iterable[dict[str, Any]]:
    """The table of the whole model, best first."""
    same: dict[str, list[str]] = {}
    for one in document["schemes"]:
        if one["same_as"] is not None:
            same.setdefault(one["same_as"], []).append(one["label"])
    for one in ranked_schemes(document):
        yield {
            **one,
            "bits_text": f"{one['bits_per_weight']:.2f}",
            "size": size(one["bytes"]),
            "sqnr": tell_decibels(one["sqnr_db"], one),
            "damage_text": tell_damage(one),
            "kept": tell_decibels(one["kept_db"], one),
            "how": one["confidence"] or "",
            "also": same.get(one["label"], []),
        }


def _layer_rows(document: Document) -> Iterable[dict[str, Any]]:
    for index, layer in enumerate(document["layers"]):
        grids = layer["grids"]
        best = grids["rank"].index(1)
        known = layer["best"] is not None
        kept = grids["damage"][best] if layer["judged_by"] == "damage" else None
        uniform, shared, bits = (answer["short"] for answer in layer["answers"])
        yield {
            "index": index,
            "name": layer["name"],
            "op": layer["op"],
            "shape": "×".join(map(str, layer["shape"])),
            "weights": layer["weights"],
            "weights_text": short(layer["weights"]),
            "best": tell_best(layer),
            "known": known,
            "bits": grids["bits_per_weight"][best] if known else "",
            "bits_text": f"{grids['bits_per_weight'][best]:.2f}" if known else "",
            "kept": kept,
            "uniform": uniform,
            "shared": shared,
            "width": bits,
        }
