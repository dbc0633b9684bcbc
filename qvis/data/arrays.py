"""Arrays and tensors of any framework, alone or in nests of dictionaries, lists and tuples.

No framework is imported: who has a tensor has its framework in ``sys.modules``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import Any

import numpy as np

from qvis.errors import BadArgumentError
from qvis.layers import BoolArray, IntArray


def is_array(value: object) -> bool:
    """Whether it is an array or a tensor, or a data set of a file that is sliced like one."""
    return all(hasattr(value, name) for name in ("shape", "dtype", "__getitem__"))


def arrays(nest: object, name: str) -> Iterator[tuple[str, Any]]:
    """Each array of a nest with what to call it, such as ``inputs['mask']``. None and booleans are passed over.

    Raises
    ------
    BadArgumentError
        The nest holds something else.
    """
    if is_array(nest):
        yield name, nest
    elif isinstance(nest, Mapping):
        for key, value in nest.items():
            yield from arrays(value, f"{name}[{key!r}]")
    elif isinstance(nest, (list, tuple)):
        for place, value in enumerate(nest):
            yield from arrays(value, f"{name}[{place}]")
    elif nest is not None and not isinstance(nest, bool):
        hint = "; make it one with numpy.asarray" if isinstance(nest, (int, float)) else ""
        raise BadArgumentError(f"{name}: expected an array or a tensor, not {_describe(nest)}{hint}")


def convert(nest: Any, change: Callable[[Any], Any]) -> Any:
    """The nest with each array changed, in dictionaries, lists and tuples of their own."""
    if is_array(nest):
        return change(nest)
    if isinstance(nest, Mapping):
        return {key: convert(value, change) for key, value in nest.items()}
    if isinstance(nest, tuple) and hasattr(nest, "_fields"):
        return type(nest)(*(convert(value, change) for value in nest))
    if isinstance(nest, (list, tuple)):
        return type(nest)([convert(value, change) for value in nest])
    return nest


def take(array: Any, places: IntArray) -> Any:
    """Some samples, copied: a tensor of PyTorch or TensorFlow on its device, of all else an array of NumPy."""
    if _is_torch(array):
        return array.detach()[places]
    if _is_tensorflow(array):
        return sys.modules["tensorflow"].gather(array, places)
    return np.asarray(array[places])


def count(array: Any) -> int:
    """How many samples it has; 0 for a single number."""
    return int(array.shape[0]) if len(array.shape) else 0


def bytes_of(array: Any) -> int:
    """The memory that all of it takes, in bytes."""
    width: Any = getattr(array.dtype, "itemsize", None) or getattr(array.dtype, "size", 1)
    return prod(int(length) for length in array.shape) * int(width)


def check_dense(array: Any, name: str) -> None:
    """Accept what has a number at each place of its shape.

    Raises
    ------
    BadArgumentError
        A sparse, ragged or quantized tensor, or one without values.
    """
    problem = ""
    if _is_torch(array):
        if array.is_meta:
            problem = "a tensor on the device 'meta', which has no values"
        elif array.is_quantized or "strided" not in str(array.layout):
            problem = f"a {'quantized' if array.is_quantized else str(array.layout).removeprefix('torch.')} tensor"
    elif None in tuple(array.shape):
        problem = "a ragged tensor, or one without values"
    if problem:
        raise BadArgumentError(f"{name}: got {problem}; give a dense array or tensor of numbers")


def check_numeric(array: Any, name: str) -> None:
    """Accept an array or tensor of numbers.

    Raises
    ------
    BadArgumentError
        Text, objects, records, dates.
    """
    if _is_torch(array):
        return
    dtype = np.asarray(array).dtype
    if dtype.kind not in "biufc" and dtype.type.__module__ != "ml_dtypes":
        raise BadArgumentError(f"{name}: got an array of type {dtype}; give numbers")


def finite_samples(array: Any) -> BoolArray:
    """Which samples hold neither NaN nor infinite numbers, (samples,)."""
    finite = array.isfinite().cpu().numpy() if _is_torch(array) else np.isfinite(np.asarray(array))
    whole: BoolArray = finite.reshape(len(finite), -1).all(axis=1)
    return whole


def _is_torch(value: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _is_tensorflow(value: object) -> bool:
    tensorflow = sys.modules.get("tensorflow")
    return tensorflow is not None and isinstance(value, (tensorflow.Tensor, tensorflow.Variable))


def _describe(value: object) -> str:
    text = repr(value) if isinstance(value, (int, float, str)) else ""
    return f"the {type(value).__name__} {text[:60]}" if text else f"an object of type {type(value).__name__}"
