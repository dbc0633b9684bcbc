"""Statistics of each output channel: exact, in one reading of the weights.

The definitions are those of ``pandas.Series.describe``: sample standard deviation (n - 1) and linearly interpolated
percentiles. Rows are sorted in cache-sized blocks, since a full ``np.sort`` is faster than ``np.partition`` for three
percentiles; sums are taken in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qvis.analysis.blocks import Pool, sum_of_squares
from qvis.layers import BoolArray, ChannelStatistics, FloatArray, Thresholds

COLUMNS = ("min", "max", "mean", "std", "q25", "q50", "q75", "nonfinite")
QUARTILES = (0.25, 0.5, 0.75)
COMFORTABLE = (1e-15, 1e15)
"""Magnitudes whose squares and sums are safe in float32."""


def channel_statistics(
    weight: FloatArray, *, dead: float = Thresholds.dead, quartiles: bool = True, pool: Pool | None = None
) -> ChannelStatistics:
    """Describe each row of ``weight`` (channels, elements).

    Parameters
    ----------
    weight
        Float32 or float64; not written to.
    dead
        A channel whose largest |w| is below this share of the layer's largest is dead.
    quartiles
        Without them the three percentiles are NaN, and no row is sorted.
    pool
        Threads to work on; none by default.
    """
    describe = _describe_sorted if quartiles else _describe_unsorted

    def describe_block(rows: slice) -> NDArray[np.float64]:
        block = weight[rows]
        with np.errstate(invalid="ignore", over="ignore"):
            table = describe(block)
            return table if table is not None else _describe_awkward(block, quartiles)

    tables = (pool or Pool()).map(describe_block, weight)
    columns = dict(zip(COLUMNS, np.concatenate(tables, axis=1), strict=True))
    nonfinite = columns.pop("nonfinite").astype(np.int64)
    peak = np.maximum(np.abs(columns["min"]), np.abs(columns["max"]))
    return ChannelStatistics(**columns, nonfinite=nonfinite, dead=_dead(peak, dead), elements=weight.shape[1])


def _dead(peak: FloatArray, share: float) -> BoolArray:
    # By the largest weight, not by the range: a channel of equal weights has no range and works all the same.
    finite = peak[np.isfinite(peak)]
    largest = finite.max() if finite.size else 0.0
    dead: BoolArray = (peak < share * largest) | (peak == 0)
    return dead


def _describe_sorted(block: FloatArray) -> NDArray[np.float64] | None:
    """The columns of COLUMNS, (8, rows); None where a weight is not finite or squares could leave float32."""
    ordered = np.sort(block, axis=1)  # NaN and inf end up at the two ends
    low, high = ordered[:, 0].astype(np.float64), ordered[:, -1].astype(np.float64)
    if not _comfortable(low, high):
        return None
    percentiles = [_interpolate(ordered, q) for q in QUARTILES]
    mean, std = _moments(ordered)
    return np.stack([low, high, mean, std, *percentiles, np.zeros_like(low)])


def _describe_unsorted(block: FloatArray) -> NDArray[np.float64] | None:
    low, high = block.min(axis=1).astype(np.float64), block.max(axis=1).astype(np.float64)
    if not _comfortable(low, high):
        return None
    mean, std = _moments(block)
    missing = np.full_like(low, np.nan)
    return np.stack([low, high, mean, std, missing, missing, missing, np.zeros_like(low)])


def _comfortable(low: FloatArray, high: FloatArray) -> bool:
    peak = np.maximum(np.abs(low), np.abs(high))
    return bool(np.all((peak == 0) | ((peak > COMFORTABLE[0]) & (peak < COMFORTABLE[1]))))


def _interpolate(ordered: NDArray[np.floating[Any]], q: float) -> NDArray[np.float64]:
    """The ``q`` quantile of sorted rows by linear interpolation (Hyndman and Fan 1996, type 7)."""
    position = q * (ordered.shape[1] - 1)
    below = int(position)
    left = ordered[:, below].astype(np.float64)
    right = ordered[:, min(below + 1, ordered.shape[1] - 1)]
    return np.asarray(left + (right - left) * (position - below))


def _moments(block: NDArray[np.floating[Any]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and sample standard deviation of each row."""
    count = block.shape[1]
    mean = block.sum(axis=1, dtype=np.float64) / count
    if count == 1:
        return mean, np.full_like(mean, np.nan)
    squares = sum_of_squares(block)
    around_mean = squares - count * np.square(mean)
    # where the mean outweighs the deviation, the difference of squares has lost its digits: centre first
    offset = np.flatnonzero(around_mean < 0.5 * squares)
    if offset.size:
        centre = mean[offset].astype(block.dtype)
        around_centre = sum_of_squares(block[offset] - centre[:, None])
        around_mean[offset] = around_centre - count * np.square(mean[offset] - centre)
    return mean, np.sqrt(np.maximum(around_mean, 0) / (count - 1))


def _describe_awkward(block: FloatArray, quartiles: bool) -> NDArray[np.float64]:
    """Rows with NaN, infinities, or magnitudes that are tiny or huge: one by one, in float64, finite weights alone."""
    table = np.full((len(COLUMNS), block.shape[0]), np.nan)
    for i, row in enumerate(block):
        finite = row[np.isfinite(row)].astype(np.float64)
        table[-1, i] = row.size - finite.size
        if finite.size == 0:
            continue
        # an exact power of two brings the largest weight near 1, so that squares neither overflow nor vanish
        exponent = int(np.frexp(np.abs(finite).max())[1])
        scaled = np.sort(np.ldexp(finite, -exponent))[None]
        mean, std = _moments(scaled)
        percentiles = [_interpolate(scaled, q) for q in QUARTILES] if quartiles else [np.full(1, np.nan)] * 3
        values = np.array([scaled[0, :1], scaled[0, -1:], mean, std, *percentiles])
        table[:-1, i] = np.ldexp(values[:, 0], exponent)
    return table
