"""What a layer seems to be by the shapes of its arrays, where a file holds nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Shape = tuple[int, ...]


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
    if spatial not in (1, 2, 3) or len(bias) != 1:
        return ""
    if spatial < 3 and kernel[-1] == 1 and bias[0] == kernel[-2] > 1:
        return f"DepthwiseConv{spatial}D"
    if bias[0] == kernel[-1]:
        return f"Conv{spatial}D"
    if bias[0] == kernel[-2]:
        return f"Conv{spatial}DTranspose"
    return f"DepthwiseConv{spatial}D" if spatial < 3 and bias[0] == kernel[-1] * kernel[-2] else ""
