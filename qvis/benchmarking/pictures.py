"""Samples as small pictures, where they look like pictures."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qvis.data.arrays import arrays
from qvis.images.shrinking import shrink
from qvis.layers import FloatArray
from qvis.running import Batch

LONGEST = 64
"""Pixels of a side at most; larger pictures are shrunk."""
SHORTEST = 4
"""What has shorter sides is no picture."""


def picture_of(batch: Batch, place: int) -> NDArray[np.uint8] | None:
    """A sample as a picture (height, width, 3), its values stretched to 0..255; None where no input looks like one.

    That does a first input with three axes for each sample, of which the last or else the first has length 1 or 3.
    """
    for _, array in arrays([batch.args, dict(batch.kwargs)], ""):
        values = _channels_last(np.asarray(array[place])) if array.ndim == 4 else None
        if values is not None:
            return draw(values)
    return None


def _channels_last(values: FloatArray) -> FloatArray | None:
    for picture in (values, np.moveaxis(values, 0, -1)):
        height, width, channels = picture.shape
        if channels in (1, 3) and min(height, width) >= SHORTEST:
            return picture
    return None


def draw(values: FloatArray) -> NDArray[np.uint8]:
    """Values (height, width, 1 or 3) stretched to 0..255, (height, width, 3), shrunk to :data:`LONGEST` pixels."""
    numbers = values.astype(np.float64)
    low, high = numbers.min(), numbers.max()
    scaled = np.rint((numbers - low) / (high - low) * 255 if high > low else np.zeros_like(numbers)).astype(np.uint8)
    small = shrink(scaled, LONGEST)
    return np.ascontiguousarray(np.broadcast_to(small, (*small.shape[:2], 3)))
