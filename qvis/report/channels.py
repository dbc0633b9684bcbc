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
RUN_POINTS = 20_000
"""The same where the model was run, as the page then carries more besides."""
THIN_BITS = 12
"""Significant bits of a number where layers have to be thinned for the sake of the page: enough for a figure."""

Float32 = NDArray[np.float32]


def pack_channels(layers: Sequence[dict[str, Any]], series: Sequence[str | None]) -> tuple[list[int], bytes]:
    """The number of points of each layer, and the arrays of all layers in one block of little-endian float32.

    For each layer and each of its ``series`` (``None`` for the layer itself, else the key of a part such as
    ``"before"``; a part that is ``None`` is left out) stand the :data:`COLUMNS`, one after the other, and then the
    histogram. The block is laid out by :func:`planes`.
    """
    shown = [[layer[name] if name else layer for name in series if name is None or layer[name]] for layer in layers]
    run = any(layer.get("sensitivity") for layer in layers)
    most = _points_per_layer([_count(parts) for parts in shown for _ in parts], RUN_POINTS if run else PAGE_POINTS)
    bits = THIN_BITS if run and most < MOST_POINTS else 24
    points, blocks = [], []
    for parts in shown:
        starts = _starts(parts, most)
        points.append(starts.size)
        for part in parts:
            # before and after are drawn on one axis, a layer as quantized and as stored in turns
            end = _end_of_histogram([part] if None in series else parts)
            blocks += [_columns(part, starts, bits).ravel(), _histogram(part, end)]
    return points, planes(blocks)


def planes(blocks: Sequence[Float32]) -> bytes:
    """Numbers one after the other, as little-endian float32: first the first bytes of all, then the second ones.

    Signs and exponents are alike, and deflate well; so do the last bytes of numbers that were rounded.
    """
    whole = np.concatenate(blocks) if blocks else np.empty(0, np.float32)
    packed: bytes = whole.astype("<f4").view(np.uint8).reshape(-1, 4).T.tobytes()
    return packed


def round_bits(values: Float32, bits: int) -> Float32:
    """Rounded to so many significant bits, of which float32 has 24; what would become infinite stays as it is."""
    fraction, exponent = np.frexp(values)
    with np.errstate(over="ignore"):
        rounded = np.ldexp(np.rint(fraction * np.float32(2**bits)) * np.float32(2.0**-bits), exponent)
    result: Float32 = np.where(np.isinf(rounded), values, rounded)
    return result


def _count(parts: Sequence[dict[str, Any]]) -> int:
    return int(parts[0]["statistics"]["min"].size)


def _points_per_layer(channels: Sequence[int], page: int) -> int:
    """The largest number of points up to :data:`MOST_POINTS` with which all layers fit into ``page``."""
    most = MOST_POINTS
    while most > 8 and sum(min(count, most) for count in channels) > page:
        most = most * 7 // 8
    return most


def _starts(parts: Sequence[dict[str, Any]], most: int) -> IntArray:
    """The first channel of each point: all channels, or groups of neighbours between which flagged ones stand alone."""
    channels = _count(parts)
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


def _columns(part: dict[str, Any], starts: IntArray, bits: int) -> Float32:
    """The :data:`COLUMNS` of one layer, (10, points)."""
    s: dict[str, FloatArray] = part["statistics"]
    flags = np.zeros(_count([part]))
    for name, bit in FLAGS.items():
        flags[part["flags"][name]] += bit
    channels = flags.size
    if starts.size == channels:
        return _rounded([starts, *(s[name] for name in COLUMNS[1:-1]), flags], bits)
    lows = [np.fmin.reduceat(s[name], starts) for name in ("min", "q25")]
    means = [_mean(s[name], starts) for name in ("q50", "mean")]
    highs = [np.fmax.reduceat(s[name], starts) for name in ("q75", "max", "std", "relative_range")]
    # a flag belongs to a channel that stands alone; what a group hides, the table of findings still counts
    alone = np.diff(starts, append=channels) == 1
    return _rounded([starts, *lows, *means, *highs, np.where(alone, flags[starts], 0)], bits)


def _rounded(columns: Sequence[FloatArray | IntArray], bits: int) -> Float32:
    """As float32, all but the first and the last column with so many significant bits."""
    table = float32(columns)
    if bits < 24:
        table[1:-1] = round_bits(table[1:-1], bits)
    return table


def float32(columns: Sequence[FloatArray | IntArray] | FloatArray) -> Float32:
    """Columns as one table of float32."""
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
