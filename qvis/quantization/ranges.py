"""What range of the numbers a grid covers: all of them, most of them, or as many as leaves the least noise."""

from __future__ import annotations

import numpy as np

from qvis.layers import FloatArray
from qvis.quantization.shapes import Shape

OCTAVES = 9
"""Ranges down to 2^-9 of the whole are looked at, in steps of a fifth of an octave."""
REFINEMENTS = 3
"""Then near the best of them, each time eight times as closely: in the end to 2^(1/5/8^3), a thirtieth of a percent."""
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

    Percentiles are interpolated between the numbers on either side, as np.percentile does.
    """
    if not blocks.shape[1]:
        return everything(blocks, symmetric=symmetric, zero=zero)
    if symmetric:
        high = np.nan_to_num(_percentile(np.sort(np.abs(blocks), axis=1), percentile))
        return -high, high
    ordered = np.sort(blocks, axis=1)
    outside = (100 - percentile) / 2
    return _zeroed(_percentile(ordered, outside), _percentile(ordered, 100 - outside), zero)


def best(
    blocks: FloatArray, shape: Shape, low: FloatArray, high: FloatArray, *, symmetric: bool, zero: bool = True
) -> tuple[FloatArray, FloatArray]:
    """The part of a range that leaves the least mean square error of rounding to nearest, both (blocks, 1).

    What is rounded better as the range shrinks and what is clipped more make a function with many small dips. Parts
    down to 1/512 are tried, then such near the best of them, and finally compared with the whole: so the error is
    never larger than with the whole range, and it is within 2 % (0.1 dB) of the smallest possible for 64 numbers or
    more; for fewer, where single numbers decide, it can be further from it. An asymmetric range is shrunk from both
    ends at once, and then from each: towards zero, or towards the mean where it does not have to hold zero.
    """
    values, weights = _thinned(blocks)
    middle = np.zeros_like(low) if zero else _mean(values, weights)
    kept = np.ones((2, len(blocks), 1), dtype=blocks.dtype)
    least = noise(values, weights, shape, low, high)

    def shrunk(parts: FloatArray) -> tuple[FloatArray, FloatArray]:
        return middle + (low - middle) * parts[0], middle + (high - middle) * parts[1]

    def attempt(parts: FloatArray) -> None:
        nonlocal least
        parts = np.minimum(parts, 1)
        found = noise(values, weights, shape, *shrunk(parts))
        better = found < least
        kept[:, better] = parts[:, better]
        least = np.where(better, found, least)

    both, ends = np.array([[1.0], [1.0]]), [np.array([[0.0], [1.0]]), np.array([[1.0], [0.0]])]
    moves = [both] if symmetric else [both, *ends]
    for move in moves:
        start = kept.copy()
        for octave in range(1, 5 * OCTAVES + 1):
            attempt(np.where(move[:, None] > 0, kept.dtype.type(2 ** (-octave / 5)), start))
    for closer in range(REFINEMENTS):
        for move in moves:
            start = kept.copy()
            for eighths in (*range(-7, 0), *range(1, 8)):
                attempt(start * (2 ** (move * eighths / 5 / 8 ** (closer + 1)))[:, None].astype(kept.dtype))
    filled, finite = np.nan_to_num(blocks, nan=0.0), ~np.isnan(blocks)
    better = noise(filled, finite, shape, *shrunk(kept)) < noise(filled, finite, shape, low, high)
    narrow = shrunk(kept)
    return np.where(better[:, None], narrow[0], low), np.where(better[:, None], narrow[1], high)


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
