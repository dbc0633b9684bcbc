"""Brings a batch to what an ONNX model takes: by name, of its types, and as many samples as it takes at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qvis.adapters.encodings import Array
from qvis.adapters.onnx.prepared import Prepared
from qvis.errors import BadArgumentError
from qvis.running import Batch
from qvis.words import listed_names

_TYPES: dict[str, Any] = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64,
    **{f"tensor({name})": np.dtype(name).type for name in ("int8", "int16", "int32", "int64", "uint8", "bool")},
}  # fmt: skip


def split(prepared: Prepared, types: Mapping[str, str], batch: Batch) -> tuple[list[dict[str, Array]], int]:
    """The inputs by name, in as many parts as the model needs, and how many samples a part has.

    Raises
    ------
    BadArgumentError
        The batch has other inputs than the model.
    """
    names = [one.name for one in prepared.inputs]
    arrays = arrays_of(names, types, batch)
    size = next((one for one in (_fixed(prepared, name, arrays[name], batch) for name in names) if one), batch.size)
    if size == batch.size:
        return [arrays], size
    parts = []
    for start in range(0, batch.size, size):
        places = np.minimum(np.arange(start, start + size), batch.size - 1)  # the last part is filled up
        shares = {name: _samples(array, places, batch.size) for name, array in arrays.items()}
        parts.append(shares)
    return parts, size


def arrays_of(names: Sequence[str], types: Mapping[str, str], batch: Batch) -> dict[str, Array]:
    """The inputs by name, each an array of the type that the model takes.

    Raises
    ------
    BadArgumentError
        The batch has other inputs than the model.
    """
    wrong = [repr(name) for name in batch.kwargs if name not in names]
    if len(batch.args) > len(names) or wrong:
        what = f"one called {wrong[0]}" if wrong else f"{len(batch.args)} of them"
        raise BadArgumentError(f"inputs: got {what}, the model takes {listed_names(names)}")
    given = {**dict(zip(names, batch.args, strict=False)), **batch.kwargs}
    missing = [name for name in names if name not in given]
    if missing:
        raise BadArgumentError(f"inputs: {listed_names(missing)} is missing; the model takes {listed_names(names)}")
    return {name: _array(given[name], types[name], name) for name in names}


def _samples(array: Array, places: Array, size: int) -> Array:
    return array[places] if array.ndim and array.shape[0] == size else array


def _fixed(prepared: Prepared, name: str, array: Array, batch: Batch) -> int:
    """The number of samples that the model wants, 0 where it takes any."""
    sizes = prepared.shape_of(name)
    if not sizes or not sizes[0] or len(sizes) != array.ndim or array.shape[0] != batch.size:
        return 0
    return sizes[0]


def _array(value: Any, kind: str, name: str) -> Array:
    if kind not in _TYPES:
        raise BadArgumentError(
            f"inputs: {name!r} is of type {kind}, which cannot be given; give a model that takes tensors of numbers"
        )
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() else value).numpy()
    array: Array = np.array(value, dtype=_TYPES[kind], order="C")
    return array
