"""What the operations of ``keras.ops`` are called in a graph: the words of :data:`qvis.layers.OPS`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qvis.adapters.keras import products
from qvis.adapters.keras.steps import Shape, Step

_SAME = {
    **dict.fromkeys(("Cast", "Copy", "Identity", "StopGradient"), "identity"),
    **dict.fromkeys(("Reshape", "Squeeze", "ExpandDims"), "reshape"),
    **{name: name.lower() for name in ("Relu", "Gelu", "Silu", "Sigmoid", "Tanh", "Softmax", "Elu")},
    "HardSilu": "hardswish",
    "HardSigmoid": "hardsigmoid",
    "MaxPool": "max_pool",
    "AveragePool": "avg_pool",
    "Resize": "resize",
}
_OVER_AXES = {"Mean": "avg_pool", "Sum": "sum", **dict.fromkeys(("Max", "Amax", "Min", "Amin"), "max_pool")}
_OF_TWO = {"Add": "add", "Subtract": "sub", "Multiply": "mul", "Divide": "div", "TrueDivide": "div"}


def of_operation(operation: Any, shapes: Sequence[Shape], arguments: Sequence[Any]) -> Step:
    """The step of an operation of ``keras.ops``.

    Parameters
    ----------
    operation
        The operation.
    shapes
        Those of the results that it takes.
    arguments
        All that it was called with, in order.
    """
    name = type(operation).__name__
    if name in _OF_TWO:
        if _OF_TWO[name] == "div" and len(shapes) == 1:
            return Step("div", {"constant": True, "divisor": hasattr(arguments[0], "_keras_history")})
        return Step(_OF_TWO[name], {"constant": len(shapes) == 1})
    if name in ("Maximum", "Minimum") and len(shapes) == 2:
        return Step("maximum", {"constant": False})
    if name == "Maximum" and any(isinstance(one, (int, float)) and one == 0 for one in arguments):
        return Step("relu")
    if name == "Matmul" and len(shapes) == 2:
        return Step("matmul")
    if name == "DotProductAttention":
        # of which Keras says that it has the shape of the query
        return Step("attention", {"tokens": 1}, shape=(*shapes[0][:-1], shapes[2][-1]))
    if name == "GetItem":
        return Step("split", _part(arguments[-1], len(shapes[0])))
    equation = products.of_operation(operation, [len(shape) for shape in shapes])
    if equation is not None:
        return Step("matmul", {"equation": equation})
    if name in ("Max", "Min", "Amax", "Amin") and vars(operation).get("initial") is not None:
        return Step(f"keras.{name}")
    if name == "Cast" and "float" not in str(operation.dtype):
        return Step("keras.Cast")
    if name in _SAME:
        return Step(_SAME[name])
    if name == "Pad" and operation.mode == "constant" and isinstance(_value(arguments), (int, float)):
        return Step("pad", _padding(operation, arguments, len(shapes[0])))
    found = _with_numbers(name, vars(operation), shapes[0] if shapes else ())
    return found if found is not None else Step(f"keras.{name}")


def _part(key: Any, rank: int) -> dict[str, Any]:
    """Where a part lies that is taken along one axis; of several axes, nothing is told."""
    keys = list(key) if isinstance(key, (tuple, list)) else [key]
    numbers = [n for one in keys for n in ((one.start, one.step) if isinstance(one, slice) else (one,))]
    if None in keys or not all(one is None or one is ... or type(one) is int for one in numbers):
        return {"axis": None}
    if ... in keys:
        at = keys.index(...)
        keys[at : at + 1] = [slice(None)] * (rank - len(keys) + 1)
    cut = [(axis, one) for axis, one in enumerate(keys) if one != slice(None)]
    if len(cut) != 1:
        return {"axis": None}
    ((axis, one),) = cut
    if isinstance(one, slice):
        return {"axis": axis, "start": one.start or 0, "step": one.step or 1}
    return {"axis": axis, "start": one}


def _padding(operation: Any, arguments: Sequence[Any], rank: int) -> dict[str, Any]:
    widths = np.broadcast_to(operation.pad_width, (rank, 2)).tolist()
    return {"value": float(_value(arguments)), "widths": tuple((before, after) for before, after in widths)}


def _value(arguments: Sequence[Any]) -> Any:
    """What something is padded with."""
    return 0 if len(arguments) < 2 or arguments[1] is None else arguments[1]


def _with_numbers(name: str, held: Mapping[str, Any], given: Shape) -> Step | None:
    """An operation that is known together with the numbers it holds."""
    if name == "LeakyRelu":
        return Step("leaky_relu", {"slope": float(held["negative_slope"])})
    if name == "Relu6":
        return Step("clip", {"low": 0.0, "high": 6.0})
    if name == "Clip" and all(np.ndim(held[key]) == 0 for key in ("x_min", "x_max")):
        low, high = (None if held[key] is None else float(held[key]) for key in ("x_min", "x_max"))
        return Step("clip", {"low": low, "high": high})
    if name in ("Concatenate", "Stack"):
        return Step("concat", {"axis": held.get("axis")})
    if name in ("Split", "Unstack"):
        return Step("split", {"axis": held.get("axis")})
    if name == "Slice":
        return Step("split", {"axis": None})
    if name in ("Transpose", "Swapaxes", "Moveaxis"):
        return Step("transpose", {"axes": _order(name, held, len(given))})
    if name in ("Roll", "Flip") and held.get("axis") is not None:
        return Step("roll", {"axes": _listed(held["axis"])})
    if name == "Glu":
        return Step("glu", {"axis": int(held["axis"])})
    if name == "Repeat" and held.get("axis") is not None:
        return Step("resize")
    if name in _OVER_AXES and _is_spatial(held.get("axis"), len(given)):
        return Step(_OVER_AXES[name], {"axes": _listed(held["axis"])})
    return None


def _listed(axes: int | Sequence[int]) -> tuple[int, ...]:
    return (axes,) if isinstance(axes, int) else tuple(axes)


def _order(name: str, held: Mapping[str, Any], rank: int) -> tuple[int, ...]:
    """The axes of what is transposed, in the order of the result."""
    order = list(range(rank))
    if name == "Transpose":
        return tuple(order[::-1] if held.get("axes") is None else held["axes"])
    if name == "Swapaxes":
        one, other = held["axis1"], held["axis2"]
        order[one], order[other] = order[other], order[one]
        return tuple(order)
    shape = np.moveaxis(np.empty(range(1, rank + 1), np.bool_), held["source"], held["destination"]).shape
    return tuple(size - 1 for size in shape)


def _is_spatial(axes: int | Sequence[int] | None, rank: int) -> bool:
    """Whether a mean is over places and not over channels, or samples."""
    import keras

    if axes is None or not rank:
        return False
    taken = {axis % rank for axis in _listed(axes)}
    channel = 1 if keras.config.image_data_format() == "channels_first" else rank - 1
    return not taken & {0, channel}
