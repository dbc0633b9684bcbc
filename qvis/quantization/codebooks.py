"""Codebooks: levels put where the numbers are, by k-means in one dimension."""

from __future__ import annotations

import numpy as np

from qvis.layers import FloatArray, IntArray

ROUNDS = 300
"""Of Lloyd's algorithm, at most. What it can still gain is then in the third digit of the noise."""


def codebooks(blocks: FloatArray, count: int) -> FloatArray:
    """The levels, (blocks, count) and ascending, that k-means finds for each block (blocks, numbers) without its NaN.

    Lloyd's algorithm (IEEE Trans. Inf. Theory 28:129, 1982) on the sorted numbers, where a cell is a run of them whose
    mean is a difference of running sums: exact, and as quick for a million numbers as for a thousand. It starts from
    the spacing that is best for many levels, as dense as the cube root of the density (Panter and Dite, Proc. IRE
    39:44, 1951). Nothing is random. A block with no more than ``count`` different numbers gets just these, the largest
    repeated.
    """
    ordered = np.sort(blocks, axis=1).astype(np.float64)  # NaN last
    counts = np.count_nonzero(~np.isnan(ordered), axis=1)[:, None]
    if not ordered.size:
        return np.zeros((len(blocks), count), dtype=blocks.dtype)
    last = np.take_along_axis(ordered, np.maximum(counts - 1, 0), axis=1)
    ordered = np.where(np.isnan(ordered), last, ordered)
    ordered = np.nan_to_num(ordered, nan=0.0)
    largest = np.maximum(np.abs(ordered[:, :1]), np.abs(ordered[:, -1:]))
    largest[largest == 0] = 1
    ordered /= largest
    sums = np.concatenate([np.zeros((len(ordered), 1)), np.cumsum(ordered, axis=1)], axis=1)
    levels = _start(ordered, count)
    ends = np.zeros((len(ordered), count + 1), dtype=np.intp)
    ends[:, -1:] = counts
    active = np.arange(len(ordered))
    for _ in range(ROUNDS):
        inner = np.minimum(_search(ordered[active], _middles(levels[active])), counts[active])
        moved = (inner != ends[active, 1:-1]).any(axis=1)
        active, inner = active[moved], inner[moved]
        if not active.size:
            break
        ends[active, 1:-1] = inner
        numbers = np.diff(ends[active], axis=1)
        totals = np.diff(np.take_along_axis(sums[active], ends[active], axis=1), axis=1)
        # a cell without numbers keeps its level
        levels[active] = np.divide(totals, numbers, out=levels[active], where=numbers > 0)
    levels = np.where(_distinct(ordered)[:, -1:] < count, _each(ordered, count), levels)
    # in order and among the numbers in spite of rounded sums
    levels = np.clip(np.maximum.accumulate(levels, axis=1), ordered[:, :1], ordered[:, -1:])
    result: FloatArray = (levels * largest).astype(blocks.dtype)
    return result


def _start(ordered: FloatArray, count: int) -> FloatArray:
    """Levels at equal steps of the integral of the cube root of the density, which is the inverse of the gaps."""
    along = np.cumsum(np.diff(ordered, axis=1, prepend=ordered[:, :1]) ** (2 / 3), axis=1)
    steps = (np.arange(count) + 0.5) / count
    return np.take_along_axis(ordered, np.minimum(_search(along, steps * along[:, -1:]), ordered.shape[1] - 1), axis=1)


def _middles(levels: FloatArray) -> FloatArray:
    middles: FloatArray = (levels[:, :-1] + levels[:, 1:]) / 2
    return middles


def _search(ordered: FloatArray, values: FloatArray) -> IntArray:
    """How many numbers of each row lie below each of its values: np.searchsorted for all rows at once."""
    low = np.zeros(values.shape, dtype=np.intp)
    high = np.full(values.shape, ordered.shape[1])
    for _ in range(int(ordered.shape[1]).bit_length()):
        middle = (low + high) // 2
        below = np.take_along_axis(ordered, np.minimum(middle, ordered.shape[1] - 1), axis=1) < values
        below &= middle < high
        low, high = np.where(below, middle + 1, low), np.where(below, high, middle)
    return low


def _distinct(ordered: FloatArray) -> IntArray:
    """Of each number, how many different ones are smaller."""
    return np.cumsum(np.diff(ordered, axis=1, prepend=ordered[:, :1]) > 0, axis=1)


def _each(ordered: FloatArray, count: int) -> FloatArray:
    """The different numbers of each row, as many as there is room for, and the last of them repeated."""
    levels = np.repeat(ordered[:, -1:], count, axis=1)
    place = np.minimum(_distinct(ordered), count - 1)
    # backwards, so that the last number of the last place is written first and the first stays
    np.put_along_axis(levels, place[:, ::-1], ordered[:, ::-1], axis=1)
    return levels
