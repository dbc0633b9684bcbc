"""From the document of a choice of bit widths to its page."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from math import isfinite
from typing import Any

from qvis.report.bit_widths_text import by_width, tell_db, tell_granularity, tell_share
from qvis.report.document import Document, jsonable
from qvis.report.frame import render_page
from qvis.words import count, size

STYLES = ("table", "left_out", "chart", "widths", "narrow", "print")
SCRIPTS = ("chart", "sorting", "listing", "widths", "widths_table", "widths_tools")
LABELLED = 0.02
"""A layer with a smaller share of the weights has no number in the picture of the mix."""
NAMED = 0.06
"""A layer with a smaller one has no name there."""
DENSE = 150
"""More layers have no lines between them there."""
ALL_KEPT = 9999
"""What a column of dB sorts by where nothing is lost."""


def render_widths(document: Document) -> str:
    """The page; the same bytes for the same document."""
    light = {key: value for key, value in document.items() if key not in ("exports", "notes", "skipped", "corrected")}
    shown = _shown(document)
    payload = {"document": jsonable(light), "columns": [grid for grid, _ in shown]}
    return render_page(
        "bit_widths.html.jinja",
        document,
        styles=STYLES,
        scripts=SCRIPTS,
        data={"payload": json.dumps(payload, ensure_ascii=False, separators=(",", ":")).encode()},
        granularities=list(dict.fromkeys(grid["granularity"] for _, grid in _looked_at(document))),
        columns=[grid["bits"] for _, grid in shown],
        rows=list(_rows(document, [place for place, _ in shown])),
        bars=list(_bars(document)),
        widths=tell_widths(document),
        figures=list(_figures(document)),
        dense=len(document["layers"]) > DENSE,
        several=len({layer["granularity"] for layer in document["layers"]}) > 1 or len(document["granularities"]) > 1,
        lines=[round(bits) for bits in sorted({grid["bits"] for _, grid in _looked_at(document)})],
        highest=_highest(document),
        tell_granularity=tell_granularity,
        size=size,
    )


def _looked_at(document: Document) -> list[tuple[int, dict[str, Any]]]:
    """The grids whose damage is known, with their places."""
    layers = document["layers"]
    return [
        (place, grid)
        for place, grid in enumerate(document["grids"])
        if any(layer["options"]["damage"][place] == layer["options"]["damage"][place] for layer in layers)
    ]


def _shown(document: Document) -> list[tuple[int, dict[str, Any]]]:
    """The grids of the table's columns: those of the first granularity, the widest first."""
    known = dict(_looked_at(document))
    places = by_width(document, document["granularities"][0])
    return [(place, known[place]) for place in places if place in known]


def _rows(document: Document, columns: list[int]) -> Iterator[dict[str, Any]]:
    """The rows of ``widgets/widths.html.jinja``, in the model's own order."""
    for index, layer in enumerate(document["layers"]):
        place = document["chosen"]["grids"][index]
        cells = [(layer["options"]["damage_db"][at], _mark(document, at, place)) for at in columns]
        yield {
            **{key: layer[key] for key in ("name", "op", "weights", "bits", "bytes")},
            "shape": " × ".join(map(str, layer["shape"])),
            "granularity": tell_granularity(layer["granularity"]),
            "sorts": sort_key(layer["damage_db"]),
            "kept": tell_number(layer["damage_db"]),
            "cells": [(sort_key(value), tell_number(value), mark) for value, mark in cells],
        }


def _mark(document: Document, place: int, chosen: int) -> str:
    """How the cell of a grid is marked: where the mix has that grid, and where it has that width on another."""
    if place == chosen:
        return "on"
    return "near" if document["grids"][place]["bits"] == document["grids"][chosen]["bits"] else ""


def sort_key(value: float) -> str:
    """What a cell sorts by; empty where nothing is known."""
    if value != value:
        return ""
    return f"{value:.4g}" if isfinite(value) else str(ALL_KEPT)


def tell_number(value: float) -> str:
    """dB without their unit, for a column that names it."""
    return tell_db(value).removesuffix(" dB")


def _highest(document: Document) -> int:
    return max((grid["bits"] for grid in document["grids"]), default=8)


def _bars(document: Document) -> Iterator[dict[str, Any]]:
    """The picture of the mix: a bar for each layer, as broad as its share of the weights and as high as its width."""
    highest, whole = _highest(document), max(1, document["model"]["weights"])
    for layer in document["layers"]:
        share = layer["weights"] / whole
        yield {
            "name": layer["name"],
            "bits": layer["bits"],
            "share": f"{100 * share:.4g}",
            "height": f"{100 * layer['bits'] / highest:.4g}",
            "labelled": share >= LABELLED,
            "named": share >= NAMED,
        }


def tell_widths(document: Mapping[str, Any]) -> str:
    """How many layers and weights have each width, in words; the page's script says the same of other mixes."""
    layers, weights = Counter[int](), Counter[int]()
    for layer in document["layers"]:
        layers[layer["bits"]] += 1
        weights[layer["bits"]] += layer["weights"]
    whole = max(1, sum(weights.values()))
    parts = [
        f"{bits} bits: {count(layers[bits], 'layer')} with {100 * weights[bits] / whole:.0f} % of the weights"
        for bits in sorted(layers, reverse=True)
    ]
    return "; ".join(parts) + "."


def _tell_gain(gain: float) -> str:
    if not isfinite(gain):
        return ""
    apart = f"{abs(gain):.1f}"
    if apart == "0.0":
        return "the mix keeps as much"
    return f"the mix keeps {apart} dB {'more' if gain > 0 else 'less'}"


def _figures(document: Document) -> Iterator[tuple[str, str, str, str]]:
    """What is told of the chosen mix beside the chart: the name in tests, the term, the figure, and a remark."""
    chosen, sizes, found = document["chosen"], document["sizes"], document["verified"]
    yield "average", "Average width", f"{chosen['average_bits']:.2f} bits", "scales not counted"
    whole = sizes["bytes"] / sizes["float_bytes"] if sizes["float_bytes"] else 1
    yield (
        "size",
        "Size of the model",
        size(sizes["bytes"]),
        f"{100 * whole:.0f} % of {size(sizes['float_bytes'])} in float",
    )
    yield "kept", "The output keeps", tell_db(found["sqnr_db"]), f"measured, ± {found['spread_db']:.1f}"
    other = found["uniform_db"]
    remark = _tell_gain(found["gain_db"]) if other == other else "none takes as many bytes"
    yield "uniform", "One width, equal size", tell_db(other), remark
    if found["accuracy"] is not None:
        share = found["accuracy"]["share"]
        remark = f"{tell_share(found['float_accuracy'])} in float"
        if found["uniform_accuracy"] == found["uniform_accuracy"]:
            remark += f", {tell_share(found['uniform_accuracy'])} with one width"
        yield "accuracy", "Right answers", tell_share(share), remark
