"""What range of the numbers a grid covers: all of them, most of them, or what leaves the least noise."""

from __future__ import annotations

import numpy as np

from qvis.layers import FloatArray
from qvis.quantization.shapes import Shape

OCTAVES = 9
"""Ranges down to 2^-9 of that of the numbers, and up to twice it, are looked at in steps of a fifth of an octave."""
FINE = 24
"""Then up to so many fortieths of an octave to either side of the best of them, which finds the dips of 5 bits."""
FINER = (1 / 320, 1 / 2560)
"""Then near the best of those, seven of these parts of an octave to either side."""
WHOLE = 2**15
"""Of blocks with more numbers, about so many stand for all."""
ENDS = 2**9
"""So many of the smallest and of the largest of them are among these."""


def everything(blocks: FloatArray, *, symmetric: bool, zero: bool = True) -> tuple[FloatArray, FloatArray]:
    """The smallest and the largest number of each block (blocks, numbers) without its NaN, both (blocks, 1).

    ``symmetric`` makes them the same but for the sign. With ``zero`` zero is always between them.
    """
    if not blocks.shape[1]:
        return np.zeros((len(blocks), 1), blocks.dtype), np.zeros((len(blocks), 1), blocks.dtype)
    if symmetric:
        high = np.fmax.reduce(np.abs(blocks), axis=1, keepdims=True, initial=0)
        return -high, high
    low = np.fmin.reduce(blocks, axis=1, keepdims=True)
    high = np.fmax.reduce(blocks, axis=1, keepdims=True)
    return _zeroed(low, high, zero)


def most(blocks: FloatArray, percentile: float, *, symmetric: bool, zero: bool = True) -> tuple[FloatArray, FloatArray]:
    """The range that holds ``percentile`` percent of each block; unless ``symmetric``, what is left out is halved.

    Percentiles are interpolated between the numbers on either side, as np.percentile does. A block most of whose
    numbers are the same, such as zero, so that nothing else would be left, keeps its whole range.
    """
    whole = everything(blocks, symmetric=symmetric, zero=zero)
    if not blocks.shape[1]:
        return whole
    if symmetric:
        high = np.nan_to_num(_percentile(np.sort(np.abs(blocks), axis=1), percentile))
        low = -high
    else:
        ordered = np.sort(blocks, axis=1)
        outside = (100 - percentile) / 2
        low, high = _zeroed(_percentile(ordered, outside), _percentile(ordered, 100 - outside), zero)
    return np.where(low < high, low, whole[0]), np.where(low < high, high, whole[1])


def best(
    blocks: FloatArray, shape: Shape, low: FloatArray, high: FloatArray, *, symmetric: bool, zero: bool = True
) -> tuple[FloatArray, FloatArray]:
    """The range that leaves the least mean square error of rounding to nearest, both (blocks, 1), given the whole.

    What is rounded better as a range shrinks and what is clipped more make a function with many small dips. Ranges from
    1/512 of the whole to twice it are tried (a larger one can put the levels of a table, or of a few numbers, where
    they are wanted), then such near the best of them, and at last the whole itself: so the error is never larger than
    with that. For a symmetric uniform grid of 64 numbers or more it is within 2 % (0.1 dB) of the smallest possible
    up to 5 bits, and within 20 % (0.8 dB) at 8 bits, where few numbers have dips too narrow to find all of them and
    where there is least to gain; many numbers have no such dips.

    An asymmetric range is stretched at both ends at once, and then at each, from zero, or from the mean where it does
    not have to hold zero. What is found is the best near the best of these, mostly that of all pairs and seldom 10 %
    from it.
    """
    values, weights = _thinned(blocks)
    middle = np.zeros_like(low) if zero else _mean(values, weights)
    kept = np.ones((2, len(blocks), 1), dtype=blocks.dtype)
    least = noise(values, weights, shape, low, high)

    def stretched(factors: FloatArray) -> tuple[FloatArray, FloatArray]:
        return middle + (low - middle) * factors[0], middle + (high - middle) * factors[1]

    def attempt(factors: FloatArray) -> None:
        nonlocal least
        found = noise(values, weights, shape, *stretched(factors))
        better = found < least
        kept[:, better] = factors[:, better]
        least = np.where(better, found, least)

    both, ends = np.array([[1.0], [1.0]]), [np.array([[0.0], [1.0]]), np.array([[1.0], [0.0]])]
    moves = [both] if symmetric else [both, *ends]
    for move in moves:
        start = kept.copy()
        for fifths in range(-5 * OCTAVES, 6):
            attempt(np.where(move[:, None] > 0, kept.dtype.type(2 ** (fifths / 5)), start))
    for part, reach in ((1 / 40, FINE), *((part, 7) for part in FINER)):
        for move in moves:
            start = kept.copy()
            for steps in (*range(-reach, 0), *range(1, reach + 1)):
                attempt(start * (2 ** (move * steps * part))[:, None].astype(kept.dtype))
    filled, finite = np.nan_to_num(blocks, nan=0.0), ~np.isnan(blocks)
    better = noise(filled, finite, shape, *stretched(kept)) < noise(filled, finite, shape, low, high)
    found = stretched(kept)
    return np.where(better[:, None], found[0], low), np.where(better[:, None], found[1], high)


def noise(values: FloatArray, weights: FloatArray, shape: Shape, low: FloatArray, high: FloatArray) -> FloatArray:
    """The sum of the squared errors of each block, each times its weight, (blocks,)."""
    place = shape.place(low, high)
    errors = shape.decode(shape.encode(values, place), place)
    errors -= values
    squares: FloatArray = np.einsum("ij,ij,ij->i", errors, errors, weights, dtype=np.float64)
    return squares


def _mean(values: FloatArray, weights: FloatArray) -> FloatArray:
    """Of each row, (blocks, 1)."""
    count = np.maximum(weights.sum(axis=1, dtype=np.float64), 1)
    mean: FloatArray = np.einsum("ij,ij->i", values, weights, dtype=np.float64) / count
    return mean[:, None].astype(values.dtype)


def _thinned(blocks: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Numbers that stand for those of each block, and how many each of them stands for: 0 in place of NaN."""
    count = blocks.shape[1]
    ordered = np.sort(blocks, axis=1)  # NaN last; a table is searched twice as fast in order
    finite = ~np.isnan(ordered)
    if count <= 2 * WHOLE:
        return np.where(finite, ordered, 0), finite.astype(blocks.dtype)
    every = -(-count // WHOLE)
    chosen = np.unique(np.r_[:ENDS, ENDS + every // 2 : count - ENDS : every, count - ENDS : count])
    values, weights = np.zeros((2, len(blocks), len(chosen)), dtype=blocks.dtype)
    for block, (row, size) in enumerate(zip(ordered, np.count_nonzero(finite, axis=1).tolist(), strict=True)):
        # spread over the numbers that there are
        places = np.unique(chosen * max(size - 1, 0) // (count - 1))[:size]
        values[block, : len(places)] = row[places]
        weights[block, : len(places)] = np.gradient(places) if len(places) > 1 else 1
    return values, weights


def _percentile(ordered: FloatArray, percentile: float) -> FloatArray:
    """Of each row in ascending order, NaN last; NaN for a row of nothing else."""
    last = np.maximum(np.count_nonzero(~np.isnan(ordered), axis=1) - 1, 0)[:, None]
    place = last * (percentile / 100)
    below = np.floor(place).astype(np.intp)
    first = np.take_along_axis(ordered, below, axis=1)
    second = np.take_along_axis(ordered, np.minimum(below + 1, last), axis=1)
    share = (place - below).astype(ordered.dtype)
    result: FloatArray = first * (1 - share) + second * share
    return result


def _zeroed(low: FloatArray, high: FloatArray, zero: bool) -> tuple[FloatArray, FloatArray]:
    low, high = np.nan_to_num(low), np.nan_to_num(high)
    return (np.minimum(low, 0), np.maximum(high, 0)) if zero else (low, high)
