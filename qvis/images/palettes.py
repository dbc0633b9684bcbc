"""Palettes learned from a picture: boxes of colours cut where that helps most, then k-means.

A palette is to colours what a codebook is to weights. Everything is whole numbers, so that it comes out the same
wherever it is computed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qvis.layers import FloatArray, IntArray

CELL_BITS = {1: 12, 3: 5}
"""Colours are gathered in cells of so many bits of each channel, by the number of channels."""
ROUNDS = 12
"""Of k-means, at most."""
AT_ONCE = 2**22


def learn(samples: np.ndarray[Any, Any], count: int) -> FloatArray:
    """The palette of a picture, (colours, channels) in order, whole numbers in float64.

    A picture of no more than ``count`` colours gets just these. For any other, the box of colours that is furthest from
    its mean in one channel is cut in two, where that leaves the least squared error, until there are enough
    (after Heckbert, SIGGRAPH 1982, and Wu, Graphics Gems II, 1991); then the colours move to the means of the pixels
    that are nearest to them, as in k-means.
    """
    pixels = samples.reshape(-1, samples.shape[2])
    colours = distinct(pixels)
    if len(colours) <= count:
        return colours.astype(np.float64)
    places, counts, sums, squares = _cells(pixels, 8 * samples.dtype.itemsize)
    palette = _cut(places, counts, sums, squares, count)
    means = np.rint(sums / counts[:, None])
    for _ in range(ROUNDS):
        moved = _means(nearest(means, palette), counts, sums, palette)
        if np.array_equal(moved, palette):
            break
        palette = moved
    return np.unique(palette, axis=0)


def distinct(pixels: np.ndarray[Any, Any]) -> IntArray:
    """The colours of pixels (pixels, channels), each once, in order."""
    found = np.unique(pack_colours(pixels))
    shifts = 16 * np.arange(pixels.shape[1])[::-1]
    colours: IntArray = found[:, None] >> shifts & 0xFFFF
    return colours


def pack_colours(pixels: np.ndarray[Any, Any]) -> IntArray:
    """Each colour as one number; they are ordered as the colours are."""
    packed = np.zeros(len(pixels), dtype=np.int64)
    for channel in pixels.T:
        packed = packed << 16 | channel.astype(np.int64)
    return packed


def nearest(pixels: np.ndarray[Any, Any], palette: FloatArray) -> IntArray:
    """Which colour of a palette is the nearest to each pixel (pixels, channels) of whole numbers; of two, the first."""
    pixels = pixels.astype(np.float64)
    lengths = np.square(palette).sum(axis=1)
    found = np.empty(len(pixels), dtype=np.intp)
    size = max(1, AT_ONCE // len(palette))
    for start in range(0, len(pixels), size):
        # |x - p|² without |x|², exact since these are whole numbers below 2^53
        found[start : start + size] = np.argmin(lengths - 2 * (pixels[start : start + size] @ palette.T), axis=1)
    return found


def _cells(pixels: np.ndarray[Any, Any], depth: int) -> tuple[IntArray, FloatArray, FloatArray, FloatArray]:
    """Of each cell that holds pixels: its place, how many there are, their sums and sums of squares."""
    channels = pixels.shape[1]
    width = min(CELL_BITS[channels], depth)
    cell = np.zeros(len(pixels), dtype=np.int64)
    for channel in pixels.T:
        cell = cell << width | channel.astype(np.int64) >> (depth - width)
    size = 1 << width * channels
    counts: FloatArray = np.bincount(cell, minlength=size).astype(np.float64)
    used = np.flatnonzero(counts)
    numbers = pixels.astype(np.float64)
    sums, squares = (
        np.stack(
            [np.bincount(cell, weights=column, minlength=size)[used] for column in power.T], axis=1, dtype=np.float64
        )
        for power in (numbers, np.square(numbers))
    )
    places: IntArray = used[:, None] >> width * np.arange(channels)[::-1] & ((1 << width) - 1)
    return places, counts[used], sums, squares


def _cut(places: IntArray, counts: FloatArray, sums: FloatArray, squares: FloatArray, count: int) -> FloatArray:
    """Means of boxes, (boxes, channels), rounded; fewer than ``count`` where every box is a single cell."""
    box_of = np.zeros(len(places), dtype=np.intp)
    spreads = [_spread(counts, sums, squares, places)]
    while len(spreads) < count:
        by_box = np.array([spread.max() for spread in spreads])
        chosen = int(np.argmax(by_box))
        if by_box[chosen] <= 0:
            break
        inside = np.flatnonzero(box_of == chosen)
        axis = int(np.argmax(spreads[chosen]))
        at = places[inside, axis]
        low = at.min()
        n, total = (np.cumsum(np.bincount(at - low, weights=of[inside]))[:-1] for of in (counts, sums[:, axis]))
        rest_n, rest = counts[inside].sum() - n, sums[inside, axis].sum() - total
        border = low + int(np.argmax(total * total / n + rest * rest / rest_n))
        above = inside[at > border]
        box_of[above] = len(spreads)
        spreads.append(_spread(counts[above], sums[above], squares[above], places[above]))
        below = inside[at <= border]
        spreads[chosen] = _spread(counts[below], sums[below], squares[below], places[below])
    start = np.zeros((len(spreads), places.shape[1]))
    return _means(box_of, counts, sums, start)


def _spread(counts: FloatArray, sums: FloatArray, squares: FloatArray, places: IntArray) -> FloatArray:
    """The squared error of a box in each channel, when its mean stands for it; 0 where it cannot be cut."""
    total = sums.sum(axis=0)
    error: FloatArray = squares.sum(axis=0) - total * total / counts.sum()
    return np.where(places.min(axis=0) < places.max(axis=0), error, 0.0)


def _means(group: IntArray, counts: FloatArray, sums: FloatArray, otherwise: FloatArray) -> FloatArray:
    """The rounded mean colour of each group of cells; where a group has none, what it had."""
    size = len(otherwise)
    n = np.bincount(group, weights=counts, minlength=size)
    totals = np.stack([np.bincount(group, weights=column, minlength=size) for column in sums.T], axis=1)
    return np.where(n[:, None] > 0, np.rint(totals / np.maximum(n, 1)[:, None]), otherwise)
