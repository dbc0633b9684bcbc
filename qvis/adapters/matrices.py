"""From a constant of a graph to the layers in it: where its output channels are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import NamedTuple

import numpy as np

from qvis.adapters.encodings import Array
from qvis.adapters.values import Value
from qvis.layers import FloatArray, Layer

View = Callable[[Array], Array]


class Part(NamedTuple):
    """A matrix inside a weight."""

    value: Value
    view: View
    """Makes the (channels, elements) matrix of the value as it arrives."""
    channels: str
    """The same in words."""
    label: str = ""
    """Tells apart several matrices of one node."""
    shape: tuple[int, ...] | None = None
    """The shape of one matrix among several that are stored in one tensor."""


def along(value: Value, axes: Sequence[int], label: str = "") -> Part:
    """The matrix whose rows lie along some of the axes."""
    axes = [axis % len(value.shape) for axis in axes]
    return Part(value, partial(_along, axes=axes), " x ".join(map(value.axis_name, axes)), label)


def _along(array: Array, axes: Sequence[int]) -> Array:
    rows = prod(array.shape[axis] for axis in axes)
    first: Array = np.moveaxis(array, axes, range(len(axes)))
    return first.reshape(rows, -1 if rows else 0)


def layer(name: str, op: str, part: Part) -> Layer:
    """The layer that a matrix is."""
    value = part.value
    return Layer(
        name=name,
        op=op,
        shape=part.shape or value.tensor.shape,
        dtype=value.tensor.type,
        read=partial(_matrix, part),
        channels=part.channels,
        notes=value.notes,
    )


def _matrix(part: Part) -> FloatArray:
    array: FloatArray = part.view(part.value.read())
    array.flags.writeable = False
    return array
