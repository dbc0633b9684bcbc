"""Codebooks: levels put where the numbers are, by k-means in one dimension."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from qvis.layers import BoolArray, FloatArray, IntArray

ROUNDS = 300
"""Of Lloyd's algorithm, at most."""
RUNS = 128
"""So many runs of numbers that stay together are enough to find where the cells begin."""
EXACT = 32
"""Codebooks of up to so many levels start from the best cells of such runs."""


def codebooks(blocks: FloatArray, count: int) -> FloatArray:
    """The levels, (blocks, count) and ascending, that k-means finds for each block (blocks, numbers) without its NaN.

    Lloyd's algorithm (IEEE Trans. Inf. Theory 28:129, 1982) on the sorted numbers, where a cell is a run of them whose
    mean is a difference of running sums: exact, and nearly as quick for a million numbers as for a thousand. It stops
    where no small change helps, so its start decides. Up to 32 levels that is the best way to cut the numbers, taken
    in 128 runs, into cells, by dynamic programming (Wang and Song, R Journal 3:29, 2011); for up to 128 numbers it is
    the best of all. More levels start as dense as the cube root of the density, which is best for many (Panter and
    Dite, Proc. IRE 39:44, 1951), as the runs do. Nothing is random. A block with no more than ``count`` different
    numbers gets just these, the largest repeated.
    """
    if not blocks.size:
        return np.zeros((len(blocks), count), dtype=blocks.dtype)
    ordered = np.sort(blocks, axis=1).astype(np.float64)  # NaN last
    sizes = np.count_nonzero(~np.isnan(ordered), axis=1)[:, None]
    last = np.take_along_axis(ordered, np.maximum(sizes - 1, 0), axis=1)
    ordered = np.nan_to_num(np.where(np.isnan(ordered), last, ordered), nan=0.0)
    # between -1 and 1, so that no sum overflows and none loses what is small beside the mean
    middle = ordered[:, :1] / 2 + ordered[:, -1:] / 2
    reach = ordered[:, -1:] / 2 - ordered[:, :1] / 2
    reach[reach == 0] = 1
    levels = _each(ordered, count)
    many = _smaller(ordered)[:, -1] >= count
    known = _Sorted.of((ordered[many] - middle[many]) / reach[many], sizes[many])
    found = _lloyd(known, _start(known, count)) * reach[many] + middle[many]
    # in order, and among the numbers, in spite of rounded sums
    levels[many] = np.clip(np.maximum.accumulate(found, axis=1), ordered[many, :1], ordered[many, -1:])
    return levels.astype(blocks.dtype)


class _Sorted(NamedTuple):
    """Sorted numbers of some blocks."""

    numbers: FloatArray
    sums: FloatArray
    """Of all numbers before each place, (blocks, numbers + 1)."""
    sizes: IntArray
    """(blocks, 1)"""

    @classmethod
    def of(cls, numbers: FloatArray, sizes: IntArray) -> _Sorted:
        sums = np.cumsum(numbers, axis=1)
        return cls(numbers, np.concatenate([np.zeros((len(sums), 1)), sums], axis=1), sizes)

    def some(self, rows: IntArray | BoolArray | slice) -> _Sorted:
        return _Sorted(self.numbers[rows], self.sums[rows], self.sizes[rows])

    def below(self, values: FloatArray) -> IntArray:
        """How many numbers of each block are smaller than each of its values."""
        return np.minimum(_search(self.numbers, values), self.sizes)

    def means(self, ends: IntArray, otherwise: FloatArray) -> FloatArray:
        """The means of the numbers between places, ``otherwise`` where there are none."""
        counts = np.diff(ends, axis=1)
        totals = np.diff(np.take_along_axis(self.sums, ends, axis=1), axis=1)
        means: FloatArray = np.divide(totals, counts, out=otherwise.copy(), where=counts > 0)
        return means


def _lloyd(blocks: _Sorted, levels: FloatArray) -> FloatArray:
    """Moves levels to the means of the numbers that are nearest to them until these stay the same.

    A cell without numbers keeps its level.
    """
    ends = np.zeros((len(levels), levels.shape[1] + 1), dtype=np.intp)
    ends[:, -1:] = blocks.sizes
    active, some = np.arange(len(levels)), blocks
    for _ in range(ROUNDS):
        inner = some.below((levels[active, :-1] + levels[active, 1:]) / 2)
        moved = (inner != ends[active, 1:-1]).any(axis=1)
        if not moved.all():
            active, inner, some = active[moved], inner[moved], some.some(moved)
        if not active.size:
            break
        ends[active, 1:-1] = inner
        levels[active] = some.means(ends[active], levels[active])
    return levels


def _start(blocks: _Sorted, count: int) -> FloatArray:
    if count > EXACT:
        return _spread(blocks.numbers, count)
    size = blocks.numbers.shape[1]
    if size <= RUNS:
        runs = np.minimum(np.arange(size + 1)[None], blocks.sizes)
    else:
        spread = _spread(blocks.numbers, RUNS)
        inner = blocks.below((spread[:, :-1] + spread[:, 1:]) / 2)
        runs = np.concatenate([np.zeros_like(blocks.sizes), inner, blocks.sizes], axis=1)
    levels = np.empty((len(runs), count))
    at_once = max(1, 2**21 // runs.shape[1] ** 2)
    for first in range(0, len(runs), at_once):
        some = slice(first, first + at_once)
        sums = np.take_along_axis(blocks.sums[some], runs[some], axis=1)
        ends = np.take_along_axis(runs[some], _cut(runs[some], sums, count), axis=1)
        levels[some] = blocks.some(some).means(ends, np.full((len(ends), count), np.nan))
    # a cell without numbers, should there be one, starts from the smallest
    return np.sort(np.where(np.isnan(levels), blocks.numbers[:, :1], levels), axis=1)


def _cut(places: IntArray, sums: FloatArray, count: int) -> IntArray:
    """The best ends of ``count`` cells among places (blocks, places), (blocks, count + 1), as indices of them.

    With the squared error of a cell being that around zero less (its sum)^2 / its size, the sum of the latter is to be
    as large as can be. ``sums`` are of the numbers before each place.
    """
    sizes = places[:, None] - places[:, :, None]
    gains = np.square(sums[:, None] - sums[:, :, None]) / np.maximum(sizes, 1)
    gains[:, np.tri(places.shape[1], k=-1, dtype=bool)] = -np.inf
    best, before = gains[:, 0], []
    for _ in range(count - 1):
        every = best[:, :, None] + gains
        before.append(every.argmax(axis=1))
        best = np.take_along_axis(every, before[-1][:, None], axis=1)[:, 0]
    ends = [np.full((len(places), 1), places.shape[1] - 1)]
    for choice in reversed(before):
        ends.append(np.take_along_axis(choice, ends[-1], axis=1))
    return np.concatenate([np.zeros_like(ends[0]), *ends[::-1]], axis=1)


def _spread(ordered: FloatArray, count: int) -> FloatArray:
    """Levels at equal steps of the integral of the cube root of the density, which is the inverse of the gaps."""
    along = np.cumsum(np.diff(ordered, axis=1, prepend=ordered[:, :1]) ** (2 / 3), axis=1)
    steps = (np.arange(count) + 0.5) / count
    return np.take_along_axis(ordered, np.minimum(_search(along, steps * along[:, -1:]), ordered.shape[1] - 1), axis=1)


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


def _smaller(ordered: FloatArray) -> IntArray:
    """Of each number, how many different ones are smaller."""
    return np.cumsum(np.diff(ordered, axis=1, prepend=ordered[:, :1]) > 0, axis=1)


def _each(ordered: FloatArray, count: int) -> FloatArray:
    """The different numbers of each row, as many as there is room for, and the last of them repeated."""
    levels = np.repeat(ordered[:, -1:], count, axis=1)
    place = np.minimum(_smaller(ordered), count - 1)
    # backwards, so that the last number of the last place is written first and the first stays
    np.put_along_axis(levels, place[:, ::-1], ordered[:, ::-1], axis=1)
    return levels
