"""Weights that are given as arrays of NumPy, with no model and no file around them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from qvis.errors import BadArgumentError, UnsupportedModelError
from qvis.layers import FloatArray, Layer, Network, Skipped

Array = NDArray[Any]


def handles(weights: object) -> TypeGuard[Array | Mapping[str, Array]]:
    """Whether this is an array, or a mapping, which is to hold arrays by name."""
    return isinstance(weights, (np.ndarray, Mapping))


def read(weights: Array | Mapping[str, Array], name: str | None = None) -> Network:
    """Each array as a layer with its output channels along axis 0; one of a single axis is one channel.

    Raises
    ------
    UnsupportedModelError
        There are none, or one is no array of real numbers.
    """
    arrays = {"weights": weights} if isinstance(weights, np.ndarray) else {str(k): v for k, v in weights.items()}
    if not arrays:
        raise UnsupportedModelError("model: got an empty mapping, expected arrays of weights by name, or a model")
    layers = tuple(_layer(key, array) for key, array in arrays.items())
    empty = tuple(Skipped(layer.name, "it has no numbers") for layer in layers if 0 in layer.shape)
    layers = tuple(layer for layer in layers if 0 not in layer.shape)
    if not layers:
        raise UnsupportedModelError(f"model: no array has a number in it, such as {empty[0].name!r}; give others")
    return Network(
        name=name or "weights",
        framework=f"NumPy {np.__version__}",
        layers=layers,
        skipped=empty,
        parameters=sum(array.size for array in arrays.values()),
        no_graph="arrays of weights have no operations between them.",
    )


def _layer(name: str, array: Array) -> Layer:
    if not isinstance(array, np.ndarray):
        got = f"an object of type {type(array).__name__}"
    elif array.dtype.kind not in "fiub":
        got = f"an array of type {array.dtype}"
    elif array.ndim == 0:
        got = "an array without axes"
    else:
        layer = _along(name, array, 0)
        return layer if array.ndim == 1 else replace(layer, along=partial(_along, name, array))
    raise UnsupportedModelError(f"model: {name!r} is {got}, expected an array of real numbers (channels, ...)")


def _along(name: str, array: Array, axis: int) -> Layer:
    """The layer with its channels along an axis, which may count from the end."""
    if not -array.ndim <= axis < array.ndim:
        raise BadArgumentError(
            f"channel_axis: {name!r} has {array.ndim} axes, shape {array.shape}, and got axis {axis}; "
            f"give one from {-array.ndim} to {array.ndim - 1}"
        )
    return Layer(
        name=name,
        op="array",
        shape=array.shape,
        dtype=str(array.dtype),
        read=partial(_matrix, array, axis),
        channels=f"axis {axis % array.ndim}" if array.ndim > 1 else "one channel",
    )


def _matrix(array: Array, axis: int) -> FloatArray:
    rows = array[None] if array.ndim == 1 else np.moveaxis(array, axis, 0)
    matrix = rows.reshape(len(rows), -1)
    if matrix.dtype in (np.float32, np.float64):
        return matrix
    exact: FloatArray = matrix.astype(np.float32 if matrix.dtype.itemsize < 4 else np.float64)
    return exact
