"""Histograms, the grids that calibration chooses, and ranges of what enters layers, as the page carries them.

A thousand layers must fit into a page, so that heights of bars are one byte each, and numbers are float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qvis.layers import FloatArray
from qvis.report.channels import MOST_POINTS, THIN_BITS, float32, planes, round_bits

GRID = ("step", "zero", "low", "high", "sqnr_db", "damage")
"""The numbers of a grid, in this order; ``low`` and ``high`` in steps, which are whole numbers."""
SIDES = ("weight_grids", "entering")
"""Where a layer's ``sensitivity`` has a histogram and grids."""
DECADES = 6
"""Heights are logarithms from the highest bar down to so many decades below it."""
HEIGHTS = 62
"""So many heights are told apart: one is 1.6 px in a figure of 100 px."""
BITS = 16
"""Significant bits of a number, of which four digits need 14."""
PAGE_POINTS = 10_000
"""Points of input channels that all layers together have at most, or 8 each."""

Document = dict[str, Any]


def pack_distributions(layers: Sequence[Document]) -> tuple[Document, bytes]:
    """What the page must know to read the arrays of all layers, and these in one block.

    A part is one of :data:`SIDES` of a layer with a ``sensitivity``, as far as that is known. First stand the grids:
    for each method each number of :data:`GRID`, of all parts. Then, for each layer whose inputs are known, come
    ``min``, ``mean`` and ``max`` of their channels, or of groups of neighbours. So far the numbers are laid out by
    :func:`planes`. Last come the bars of each part, one byte each: counts, then importance.
    """
    known = [layer["sensitivity"] for layer in layers if layer.get("sensitivity")]
    parts = [part for one in known for part in _sides(one)]
    methods = list(dict.fromkeys(grid["method"] for part in parts for grid in part["grids"]))
    entering = [one["entering"] for one in known if one["entering"]]
    most = _points_per_layer([part["channels"] for part in entering])
    grids = float32(np.array([_grids(part["grids"], methods) for part in parts]))
    numbers = [round_bits(grids.reshape(len(parts), len(methods) * len(GRID)).T.ravel(), BITS)]
    bits = THIN_BITS if most < MOST_POINTS else BITS
    numbers += [round_bits(float32(_channels(part, most)).ravel(), bits) for part in entering]
    bars = [_heights(part[name]) for part in parts for name in ("counts", "importance")]
    head = {"methods": methods, "fields": GRID, "bars": bars[0].size if bars else 0, "decades": DECADES}
    head |= {"heights": HEIGHTS, "numbers": sum(array.size for array in numbers), "most": most}
    return head, planes(numbers) + b"".join(array.tobytes() for array in bars)


def lighten(layer: Document) -> Document:
    """A layer of a page's summary without what is packed here or follows from the rest, and with rounded numbers.

    The page puts it back: ``value`` is what was measured, else what was predicted.
    """
    if not layer.get("sensitivity"):
        return layer
    light: Document = _rounded(layer, 6)
    if light["stored"]:
        light["stored"].pop("digest")
        light["stored"] = _rounded(light["stored"], 4)
    known = light["sensitivity"] = _rounded(light["sensitivity"], 5)
    for part in _sides(known):
        part.pop("grids")
    for figures in (*known["weights"].values(), known["inputs"]):
        if figures:
            figures.pop("value")
            figures["spread"] = _rounded(figures["spread"], 3)
    return light


def by_columns(items: list[Any]) -> Any:
    """Objects of the same fields as one object of columns, and so on inside: it deflates to half. Else as it is."""
    known = [item for item in items if item is not None]
    if not any(known) or not all(isinstance(item, dict) and list(item) == list(known[0]) for item in known):
        return items
    columns = {field: by_columns([item[field] for item in known]) for field in known[0]}
    return {"none": [i for i, item in enumerate(items) if item is None], "columns": columns}


def _sides(sensitivity: Document) -> Iterator[Document]:
    return (sensitivity[name] for name in SIDES if sensitivity[name])


def _rounded(value: Any, digits: int) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {key: _rounded(item, digits) for key, item in value.items()}
    return [_rounded(item, digits) for item in value] if isinstance(value, list) else value


def _heights(values: FloatArray) -> NDArray[np.uint8]:
    """0 for an empty bar, else 1 for one :data:`DECADES` below the highest, to 1 + :data:`HEIGHTS` for that one."""
    values = np.nan_to_num(np.asarray(values, dtype=np.float64), nan=0.0, posinf=0.0)
    used = values > 0
    logs = np.log10(values, out=np.full_like(values, -np.inf), where=used)
    codes = 1 + np.rint(np.clip(1 + (logs - logs.max(initial=-300)) / DECADES, 0, 1) * HEIGHTS)
    return np.where(used, codes, 0).astype(np.uint8)


def _grids(grids: Sequence[Document], methods: Sequence[str]) -> FloatArray:
    """The :data:`GRID` of each method, all NaN where there is none, (methods, 6)."""
    found = {grid["method"]: grid for grid in grids}
    rows = np.full((len(methods), len(GRID)), np.nan)
    for row, method in zip(rows, methods, strict=True):
        if method in found:
            grid = found[method]
            ends = (round(grid[end] / grid["step"]) if grid["step"] else 0 for end in ("low", "high"))
            row[:] = grid["step"], grid["zero"], *ends, grid["sqnr_db"], grid["damage"]
    return rows


def _points_per_layer(channels: Sequence[int]) -> int:
    most = MOST_POINTS
    while most > 8 and sum(min(count, most) for count in channels) > PAGE_POINTS:
        most = most * 7 // 8
    return most


def _channels(part: Document, most: int) -> FloatArray:
    """``min``, ``mean`` and ``max`` of each channel, or of ``most`` groups of neighbours, (3, points)."""
    ranges, channels = part["channel_statistics"], part["channels"]
    if channels <= most:
        return np.stack([ranges[name] for name in ("min", "mean", "max")])
    starts = np.arange(most) * channels // most
    means = np.add.reduceat(ranges["mean"], starts) / np.diff(starts, append=channels)
    return np.stack([np.fmin.reduceat(ranges["min"], starts), means, np.fmax.reduceat(ranges["max"], starts)])
