"""What a layer seems to be by the shapes of its arrays, where a file holds nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qvis.adapters.keras.parts import RULES, projection, type_named

Shape = tuple[int, ...]
GUESSED = "the type of the layer is guessed from the shapes of its arrays"


def identify(name: str, shapes: Mapping[str, Shape], op: str = "") -> tuple[str, dict[str, Any], tuple[str, ...]]:
    """The type of a layer, what its rule must know, and a note on what that rests on.

    Parameters
    ----------
    name
        The names of the layers around it and its own: those that Keras gives tell the type.
    shapes
        The shapes of its arrays by their names.
    op
        The type, as far as it is known.
    """
    outer, _, own = name.rpartition("/")
    op = op or type_named(own) or ""
    if op not in ("", "EinsumDense"):
        return op, {}, ()
    first = max(shapes.values(), key=len, default=())
    summed = projection(own) if outer else None
    if summed is not None and len(first) >= 3:
        return "EinsumDense", dict(summed), ()
    if "depthwise" in own.lower() and len(first) in (3, 4):
        return f"DepthwiseConv{len(first) - 2}D", {}, ()
    kind, config = guess(shapes)
    if op:
        return op, config, ()
    return kind, config, (GUESSED,) if kind in RULES else ()


def guess(shapes: Mapping[str, Shape]) -> tuple[str, dict[str, Any]]:
    """The type of a layer and what its rule must know; an empty type where the shapes tell nothing.

    Parameters
    ----------
    shapes
        The shapes of the layer's arrays by their names, in their order; names are numbers in files of Keras 3.
    """
    numbered = "0" in shapes
    listed = list(shapes.values())
    kernel = listed[0] if numbered and listed else shapes.get("kernel", ())
    second = listed[1] if numbered and len(listed) > 1 else shapes.get("bias", ())
    if len(kernel) < 2 and not ("depthwise_kernel" in shapes or "embeddings" in shapes):
        return "", {}
    if numbered and len(listed) > 2:
        return _three(listed), {}
    if "embeddings" in shapes:
        return "Embedding", {}
    if "depthwise_kernel" in shapes:
        axes = len(shapes["depthwise_kernel"]) - 2
        return (f"SeparableConv{axes}D" if "pointwise_kernel" in shapes else f"DepthwiseConv{axes}D"), {}
    if "recurrent_kernel" in shapes:
        return _recurrent(kernel, shapes["recurrent_kernel"]), {}
    if len(second) >= 2:
        return _with_matrix(kernel, second)
    return _plain(kernel, second), {}


def _three(shapes: list[Shape]) -> str:
    """Two matrices and a bias: separable or recurrent."""
    first, second = shapes[0], shapes[1]
    if len(first) == len(second) and len(first) in (3, 4) and second[-2] == first[-1] * first[-2]:
        return f"SeparableConv{len(first) - 2}D"
    return _recurrent(first, second)


def _recurrent(kernel: Shape, recurrent: Shape) -> str:
    if len(kernel) != 2 or len(recurrent) != 2 or kernel[1] != recurrent[1] or not recurrent[0]:
        return ""
    gates = {4: "LSTM", 3: "GRU", 1: "SimpleRNN"}
    return gates.get(recurrent[1] // recurrent[0], "") if recurrent[1] % recurrent[0] == 0 else ""


def _with_matrix(kernel: Shape, second: Shape) -> tuple[str, dict[str, Any]]:
    """A second array of several axes: the bias of a dense layer with several axes, or the other matrix of a cell."""
    if len(kernel) >= 3 and second == kernel[-len(second) :]:
        return "EinsumDense", {"summed": len(kernel) - len(second)}
    return _recurrent(kernel, second), {}


def _plain(kernel: Shape, bias: Shape) -> str:
    """A kernel, with the bias that shows how many channels there are where it has one."""
    if len(kernel) == 2:
        return "Dense" if not bias or bias == kernel[1:] else ""
    spatial = len(kernel) - 2
    if spatial not in (1, 2, 3) or len(bias) > 1:
        return ""
    if not bias:
        # One filter of several inputs, without a bias, is far less usual than a filter for each input.
        one_each = spatial < 3 and kernel[-1] == 1 < kernel[-2] and max(kernel[:-2]) > 1
        return f"{'Depthwise' if one_each else ''}Conv{spatial}D"
    if spatial < 3 and kernel[-1] == 1 and bias[0] == kernel[-2] > 1:
        return f"DepthwiseConv{spatial}D"
    if bias[0] == kernel[-1]:
        return f"Conv{spatial}D"
    if bias[0] == kernel[-2]:
        return f"Conv{spatial}DTranspose"
    return f"DepthwiseConv{spatial}D" if spatial < 3 and bias[0] == kernel[-1] * kernel[-2] else ""
