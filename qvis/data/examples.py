"""Example inputs, of which only shapes and types matter."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import prod
from typing import Any

import numpy as np

from qvis.data.arrays import convert, is_array
from qvis.errors import BadArgumentError
from qvis.running import Batch

TYPES = ("bool", "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32")
"""The types that the textual form knows."""
_MOST = 2**30  # bytes
_FORM = "expected a shape such as '1x3x224x224', or inputs such as 'input_ids=1x128:int64,attention_mask=1x128:int64'"


def example_batch(example_inputs: object) -> Batch:
    """The example inputs as a batch, as they are.

    Parameters
    ----------
    example_inputs
        An array or a tensor; a tuple or list of several positional inputs; a mapping of inputs by name; a shape such as
        ``(1, 3, 224, 224)``, of float32; or text, see :func:`parse_shapes`.

    Raises
    ------
    BadArgumentError
        It is nothing of that, or holds no array.
    """
    if isinstance(example_inputs, Batch):
        return example_inputs
    if isinstance(example_inputs, str):
        return parse_shapes(example_inputs)
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if is_array(example_inputs):
        args = (example_inputs,)
    elif isinstance(example_inputs, Mapping):
        kwargs = dict(example_inputs)
    elif isinstance(example_inputs, (tuple, list)):
        if example_inputs and all(type(length) is int for length in example_inputs):
            return Batch((_make(tuple(example_inputs), "float32", f"{example_inputs!r}"),), size=example_inputs[0])
        args = tuple(example_inputs)
    lengths = [int(array.shape[0]) for array in _arrays([args, kwargs]) if len(array.shape)]
    if not lengths:
        raise BadArgumentError(
            f"example_inputs: got {_describe(example_inputs)}, expected an array or a tensor with the samples first, "
            f"a tuple of them, a mapping of them by name, or text; {_FORM}"
        )
    return Batch(args, kwargs, size=lengths[0])


def parse_shapes(text: str) -> Batch:
    """A batch of the shapes and types that stand in ``text``, parted by commas, each ``[name=]shape[:type]``.

    Integers are zeros, since a zero is a row of every table; all else is ones. The type is float32 if none is said.

    >>> parse_shapes("input_ids=1x4:int64").kwargs
    {'input_ids': array([[0, 0, 0, 0]])}

    Raises
    ------
    BadArgumentError
        It cannot be read so, or the arrays would take more than 1 GiB.
    """
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for part in text.split(","):
        # Names such as "serving_default_x:0" have colons too.
        name, named, what = part.strip().rpartition("=")
        shape, typed, dtype = what.partition(":")
        sides = shape.strip().split("x")
        if not all(side.isascii() and side.isdigit() and len(side) < 10 for side in sides) or (named and not name):
            raise BadArgumentError(f"example_inputs: cannot read {part.strip()!r} in {text!r}; {_FORM}")
        if name in kwargs or (not named and kwargs):
            problem = f"{name!r} comes twice" if named else f"{part.strip()!r} has no name and comes after names"
            raise BadArgumentError(f"example_inputs: in {text!r}, {problem}; {_FORM}")
        array = _make(tuple(map(int, sides)), dtype.strip() if typed else "float32", part.strip())
        if named:
            kwargs[name] = array
        else:
            args.append(array)
    first = (args + list(kwargs.values()))[0]
    return Batch(tuple(args), kwargs, size=len(first))


def _make(shape: tuple[int, ...], dtype: str, text: str) -> Any:
    if dtype not in TYPES:
        raise BadArgumentError(f"example_inputs: {text!r} is of type {dtype!r}; give one of {', '.join(TYPES)}")
    if any(length < 1 for length in shape):
        raise BadArgumentError(f"example_inputs: {text!r} has an axis shorter than 1")
    if prod(shape) * np.dtype(dtype).itemsize > _MOST:
        raise BadArgumentError(f"example_inputs: {text!r} would take more than 1 GiB; give fewer samples")
    return np.zeros(shape, dtype) if "int" in dtype else np.ones(shape, dtype)


def _arrays(nest: Any) -> list[Any]:
    """The arrays of a nest that may hold anything else too, such as flags of the model."""
    if is_array(nest):
        return [nest]
    if isinstance(nest, Mapping):
        nest = list(nest.values())
    return [array for part in nest for array in _arrays(part)] if isinstance(nest, (list, tuple)) else []


def _describe(value: object) -> str:
    if isinstance(value, (int, float)):
        return f"the number {value!r}"
    empty = "an empty " if isinstance(value, (list, tuple, dict)) and not value else "an object of type "
    return f"{empty}{type(value).__name__}"


def noise_like(example: Batch, samples: int, seed: int = 0, together: int = 16) -> list[Batch]:
    """Noise in the shapes and types of an example: normal numbers, or ones where the example holds no real numbers."""
    generator = np.random.default_rng(seed)

    def make(array: Any, size: int) -> Any:
        shape = (size, *map(int, array.shape[1:])) if len(array.shape) else ()
        dtype = np.asarray(array).dtype
        if dtype.kind == "f":
            return generator.standard_normal(shape).astype(dtype)
        return np.ones(shape, dtype)

    batches = []
    for first in range(0, samples, together):
        size = min(together, samples - first)
        change = partial(make, size=size)
        batches.append(Batch(convert(example.args, change), convert(dict(example.kwargs), change), size=size))
    return batches
