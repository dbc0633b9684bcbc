"""Channel statistics as the page carries them: float32 arrays, thinned to envelopes where there are many channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qvis.layers import FloatArray, IntArray

COLUMNS = ("channel", "min", "q25", "q50", "mean", "q75", "max", "std", "relative_range", "flags")
"""The arrays of a layer, in this order; ``channel`` is the first channel that a point stands for."""
FLAGS = {"outliers": 1, "starved": 2, "near_dead": 4, "dead": 8, "nonfinite": 16}
"""Bits of the column ``flags``."""
BINS = 75
"""Bins of the histogram of relative ranges, as many as AIMET draws, over the logarithm from 1 to the largest."""
MOST_POINTS = 512
"""A layer of more channels becomes an envelope of so many points."""
PAGE_POINTS = 30_000
"""All layers together have about so many at most, which keeps a page of 1,000 layers below 3 MB."""

Float32 = NDArray[np.float32]


def pack_channels(layers: Sequence[dict[str, Any]], series: Sequence[str | None]) -> tuple[list[int], bytes]:
    """The number of points of each layer, and the arrays of all layers in one block of little-endian float32.

    For each layer and each of its ``series`` (``None`` for the layer itself, else the key of a part such as
    ``"before"``) stand the :data:`COLUMNS`, one after the other, and then the histogram. In the block the first bytes
    of all numbers stand together, then the second ones, and so on: signs and exponents are alike, and deflate well.
    """
    most = _points_per_layer([layer["channels"] for layer in layers], len(series))
    points, blocks = [], []
    for layer in layers:
        parts = [layer[name] if name else layer for name in series]
        starts = _starts(parts, most)
        points.append(starts.size)
        end = _end_of_histogram(parts)
        for part in parts:
            blocks += [_columns(part, starts).ravel(), _histogram(part, end)]
    whole = np.concatenate(blocks) if blocks else np.empty(0, np.float32)
    return points, whole.astype("<f4").view(np.uint8).reshape(-1, 4).T.tobytes()


def _points_per_layer(channels: Sequence[int], series: int) -> int:
    """The largest number of points up to :data:`MOST_POINTS` with which all layers fit into :data:`PAGE_POINTS`."""
    most = MOST_POINTS
    while most > 16 and series * sum(min(count, most) for count in channels) > PAGE_POINTS:
        most = most * 7 // 8
    return most


def _starts(parts: Sequence[dict[str, Any]], most: int) -> IntArray:
    """The first channel of each point: all channels, or groups of neighbours between which flagged ones stand alone."""
    channels = parts[0]["channels"]
    if channels <= most:
        return np.arange(channels)
    flagged = np.unique(np.concatenate([np.array(x, dtype=np.int64) for p in parts for x in p["flags"].values()]))
    room = most // 3
    if flagged.size > room:
        ranges = np.nan_to_num(parts[-1]["statistics"]["range"][flagged], nan=np.inf)
        flagged = np.sort(flagged[np.argsort(-ranges, kind="stable")[:room]])
    alone = np.concatenate([flagged, flagged + 1])
    groups = np.linspace(0, channels, most - alone.size, endpoint=False).astype(np.int64)
    starts = np.union1d(groups, alone)
    below: IntArray = starts[starts < channels]
    return below


def _columns(part: dict[str, Any], starts: IntArray) -> Float32:
    """The :data:`COLUMNS` of one layer, (10, points)."""
    s: dict[str, FloatArray] = part["statistics"]
    flags = np.zeros(part["channels"])
    for name, bit in FLAGS.items():
        flags[part["flags"][name]] += bit
    if starts.size == part["channels"]:
        return _float32([starts, *(s[name] for name in COLUMNS[1:-1]), flags])
    lows = [np.fmin.reduceat(s[name], starts) for name in ("min", "q25")]
    means = [_mean(s[name], starts) for name in ("q50", "mean")]
    highs = [np.fmax.reduceat(s[name], starts) for name in ("q75", "max", "std", "relative_range")]
    # a flag belongs to a channel that stands alone; what a group hides, the table of findings still counts
    alone = np.diff(starts, append=part["channels"]) == 1
    return _float32([starts, *lows, *means, *highs, np.where(alone, flags[starts], 0)])


def _float32(columns: Sequence[FloatArray | IntArray]) -> Float32:
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite
        return np.array(columns, dtype=np.float32)


def _mean(values: FloatArray, starts: IntArray) -> FloatArray:
    finite = np.isfinite(values)
    total = np.add.reduceat(np.where(finite, values, 0), starts)
    number = np.add.reduceat(finite.astype(np.float64), starts)
    return np.divide(total, number, out=np.full_like(total, np.nan), where=number > 0)


def _end_of_histogram(parts: Sequence[dict[str, Any]]) -> float:
    """The logarithm of the largest relative range of all series, which the page draws on one axis."""
    largest = [part["largest_relative_range"] for part in parts]
    return max([float(np.log10(value)) for value in largest if np.isfinite(value)], default=0.0)


def _histogram(part: dict[str, Any], end: float) -> Float32:
    """Channels in :data:`BINS` bins of log relative range; those below 1, narrower than any live one, are left out."""
    relative = part["statistics"]["relative_range"]
    logs = np.log10(relative[np.isfinite(relative) & (relative >= 1)])
    end = max(end, 1e-9)
    return np.histogram(np.minimum(logs, end), bins=BINS, range=(0.0, end))[0].astype(np.float32)
