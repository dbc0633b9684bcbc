"""Makes large pictures small enough for a page, in bounded memory."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from qvis.images.quantizing import Samples
from qvis.layers import FloatArray


def shrink(samples: Samples, longest: int) -> Samples:
    """A picture (height, width, channels) with no side above ``longest`` pixels; as it is where that holds already.

    Each new pixel is the mean of the area that it covers. Only a few rows at a time are there as floats.
    """
    height, width = samples.shape[:2]
    if max(height, width) <= longest:
        return samples
    factor = max(height, width) / longest
    new_height, new_width = (max(1, round(side / factor)) for side in (height, width))
    found = np.empty((new_height, new_width, samples.shape[2]), dtype=samples.dtype)
    edges = np.linspace(0, height, new_height + 1)
    for y, (start, stop) in enumerate(pairwise(edges)):
        first, last = int(start), min(height, int(np.ceil(stop)))
        rows = np.arange(first, last)
        weights = np.minimum(rows + 1, stop) - np.maximum(rows, start)
        line = np.tensordot(weights / weights.sum(), samples[first:last].astype(np.float64), axes=1)
        found[y] = np.rint(_areas(line, new_width))
    return found


def _areas(line: FloatArray, count: int) -> FloatArray:
    """Means of ``count`` equal parts of a line (pixels, channels)."""
    sums = np.concatenate([np.zeros((1, line.shape[1])), np.cumsum(line, axis=0)])
    edges = np.linspace(0, len(line), count + 1)
    whole = np.minimum(edges.astype(np.intp), len(line) - 1)
    until = sums[whole] + (edges - whole)[:, None] * line[whole]
    means: FloatArray = np.diff(until, axis=0) * (count / len(line))
    return means
