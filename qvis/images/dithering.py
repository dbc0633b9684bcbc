"""Dithering: what rounding takes from a pixel is given to its neighbours, so that areas keep their mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from qvis.layers import FloatArray, IntArray
from qvis.quantization.shapes import Offset, Place

Round = Callable[[FloatArray, IntArray, IntArray], FloatArray]
"""Rounds colours (pixels, channels) that stand in these rows and columns, to whole numbers."""


def dither(samples: np.ndarray[Any, Any], round_: Round) -> FloatArray:
    """Error diffusion by Floyd and Steinberg (Proc. SID 17:75, 1976), rows from left to right.

    Whatever is beyond black or white is cut off before rounding, so that errors cannot pile up. Pixels that do not wait
    for each other are done at once: those on a line that goes two to the left for each row down.
    """
    height, width, channels = samples.shape
    top = float(np.iinfo(samples.dtype).max)
    found = np.zeros(samples.shape)
    errors = np.zeros((height + 1, width + 2, channels))  # a row above and a column at each side without error
    for line in range(width + 2 * (height - 1)):
        y = np.arange(max(0, (line - width + 2) // 2), min(height, line // 2 + 1))
        x = line - 2 * y
        handed = (
            7 * errors[y + 1, x] + 3 * errors[y, x + 2] + 5 * errors[y, x + 1] + errors[y, x]
        )  # from the left, from above right, above, and above left
        wanted = np.clip(samples[y, x] + handed / 16, 0.0, top)
        found[y, x] = rounded = round_(wanted, y, x)
        errors[y + 1, x + 1] = wanted - rounded
    return found


def to_grid(step: FloatArray, low: FloatArray, bits: int) -> Round:
    """Rounds on the even grid of each pixel; ``step`` and ``low`` in the shape of the picture."""
    grid = Offset(bits)

    def round_(wanted: FloatArray, y: IntArray, x: IntArray) -> FloatArray:
        place = Place(step[y, x], low[y, x])
        rounded: FloatArray = np.rint(grid.decode(grid.encode(wanted, place), place))
        return rounded

    return round_


def to_palette(palette: FloatArray) -> Round:
    """Takes the nearest colour of a palette (colours, channels); of two, the first."""

    def round_(wanted: FloatArray, y: IntArray, x: IntArray) -> FloatArray:  # noqa: ARG001
        distance = np.zeros((len(wanted), len(palette)))
        for channel in range(palette.shape[1]):
            distance += np.square(wanted[:, [channel]] - palette[:, channel])
        nearest: FloatArray = palette[np.argmin(distance, axis=1)]
        return nearest

    return round_
