"""What goes into an engine and what comes out, in the forms that engines share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from qvis.layers import FloatArray


def of_samples(outputs: Iterable[Any], size: int) -> list[FloatArray]:
    """The outputs that are numbers, as floats; what is not one of each sample, along the first axis, is left out."""
    arrays = [np.asarray(one) for one in outputs]
    kept = [one for one in arrays if one.ndim and len(one) == size and one.dtype.kind in "fiub"]
    return [one.astype(np.float32 if one.dtype.kind == "f" or one.itemsize < 4 else np.float64) for one in kept]


def in_parts(arrays: Sequence[Any], size: int, step: int | None) -> list[list[Any]]:
    """A batch as a model takes it: at once, or ``step`` samples at a time, the last one repeated to fill a part."""
    if step is None or step == size:
        return [list(arrays)]
    places = [np.minimum(np.arange(start, start + step), size - 1) for start in range(0, size, step)]
    return [[one[place] if one.ndim else one for one in arrays] for place in places]


def joined(parts: Sequence[Sequence[Any]], size: int) -> list[Any]:
    """The outputs of all parts, one after another, without those of repeated samples."""
    found = []
    for one in zip(*parts, strict=True):
        together = len(parts) == 1 or not one[0].ndim
        found.append(one[0] if together else np.concatenate(one)[:size])
    return found
