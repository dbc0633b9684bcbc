"""What the layers and operations of Keras are called in a graph: the words of :data:`qvis.layers.OPS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from typing import Any, NamedTuple

import numpy as np

from qvis.adapters.keras import products
from qvis.adapters.keras.parts import kernel_axes


class Step(NamedTuple):
    """An operation; a layer is a chain of them."""

    op: str
    attributes: Mapping[str, Any] = {}
    weight: str = ""
    """The variable that it applies."""
    suffix: str = ""
    """What follows the name of the layer."""
    shape: tuple[int | None, ...] | None = None
    """Of its result, where it is another than the layer's."""


_ACTIVATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ("relu", "gelu", "silu", "sigmoid", "tanh", "softmax", "elu")},
    "relu6": ("clip", {"low": 0.0, "high": 6.0}),
    "leaky_relu": ("leaky_relu", {"slope": 0.2}),
    "hard_sigmoid": ("hardsigmoid", {}),
    "hard_silu": ("hardswish", {}),
}


def activation(function: Any) -> Step | None:
    """The step of an activation, by the function that a layer holds; None where it does nothing."""
    name = str(getattr(function, "__name__", type(function).__name__))
    if function is None or (name == "linear" and _is_keras(function)):
        return None
    if name in _ACTIVATIONS and _is_keras(function):
        op, attributes = _ACTIVATIONS[name]
        return Step(op, attributes, suffix=name)
    if hasattr(function, "_inbound_nodes"):  # a layer
        found = of_layer(function, (), (), {})
        if found is not None and len(found) == 1:
            return found[0]._replace(suffix=str(function.name))
    return Step(f"activation.{name}", suffix=name)


def _is_keras(one: Any) -> bool:
    return str(getattr(one, "__module__", "")).startswith("keras.")


# ---------------------------------------------------------------------------------------------------------------------
# Layers

Shape = tuple[Any, ...]


def of_layer(layer: Any, given: Shape, returned: Shape, kwargs: Mapping[str, Any]) -> list[Step] | None:
    """The steps that a layer of Keras takes; None for one that has to be looked into.

    Parameters
    ----------
    layer
        The layer.
    given, returned
        The shapes of its first input and its result.
    kwargs
        What else it was called with, and the ``shapes`` of all its inputs.
    """
    if not _is_keras(type(layer).call):
        return None
    for cls in type(layer).__mro__:
        if _is_keras(cls) and cls.__name__ in _LAYERS:
            steps = _LAYERS[cls.__name__](layer, given, returned, kwargs)
            applies = any(step.weight for step in steps)
            after = activation(getattr(layer, "activation", None)) if applies else None
            return [*steps, after] if after is not None else steps
    return None


def _word(op: str, **attributes: Any) -> Callable[..., list[Step]]:
    return lambda *_: [Step(op, attributes)]


def _channel_axis(layer: Any) -> int:
    return 1 if layer.data_format == "channels_first" else -1


def _dense(layer: Any, *_: Any) -> list[Step]:
    return [Step("linear", {"channel_axis": -1, "bias": bool(layer.use_bias)}, "kernel")]


def _einsum(layer: Any, given: Shape, *_: Any) -> list[Step]:
    """A matrix times the last axes, several of which count as one; else an operation of its own."""
    left, _, rest = layer.equation.replace(" ", "").partition(",")
    kernel, _, right = rest.partition("->")
    reached = [kernel[axis] for axis in kernel_axes({"equation": layer.equation}, len(kernel)) or ()]
    summed = [letter for letter in kernel if letter not in reached]
    ends = left.endswith("".join(summed)) and right.endswith("".join(reached)) and not set(reached) & set(left)
    plain = ends and left[: len(left) - len(summed)] == right[: len(right) - len(reached)]
    if not (plain and summed and reached and kernel == "".join(summed + reached)):
        return [Step("keras.EinsumDense", {}, "kernel")]
    sizes = dict(zip(kernel, layer.kernel.shape, strict=True))
    outer = tuple(given[: len(given) - len(summed)])
    before, after = prod(sizes[one] for one in summed), prod(sizes[one] for one in reached)
    steps = [Step("reshape", suffix="inputs", shape=(*outer, before))] if len(summed) > 1 else []
    attributes = {"channel_axis": -1, "bias": layer.bias is not None}
    steps.append(Step("linear", attributes, "kernel", shape=(*outer, after)))
    if len(reached) > 1:
        steps.append(Step("reshape", suffix="outputs", shape=(*outer, *(sizes[one] for one in reached))))
    return steps


def _conv(layer: Any, given: Shape, *_: Any) -> list[Step]:
    groups = given[_channel_axis(layer)] if hasattr(layer, "depth_multiplier") else layer.groups
    return [_convolution(layer, groups, _pads(layer), bool(layer.use_bias), "kernel")]


def _convolution(layer: Any, groups: int, padding: bool, bias: bool, weight: str, suffix: str = "") -> Step:
    attributes = {
        "groups": groups,
        "padding": padding,
        "channel_axis": _channel_axis(layer),
        "columns": "channels last",
        "bias": bias,
    }
    return Step("conv", attributes, weight, suffix)


def _pads(layer: Any) -> bool:
    return layer.padding != "valid" and any(size > 1 for size in layer.kernel_size)


def _separable(layer: Any, given: Shape, returned: Shape, _: Any) -> list[Step]:
    axis = _channel_axis(layer)
    middle = list(returned)
    middle[axis] = given[axis] * layer.depth_multiplier
    first = _convolution(layer, given[axis], _pads(layer), False, "depthwise_kernel", "depthwise_kernel")
    second = _convolution(layer, 1, False, bool(layer.use_bias), "pointwise_kernel", "pointwise_kernel")
    return [first._replace(shape=tuple(middle)), second]


def _transposed(layer: Any, *_: Any) -> list[Step]:
    attributes = {"groups": 1, "channel_axis": _channel_axis(layer), "columns": "channels last"}
    return [Step("conv_transpose", {**attributes, "bias": bool(layer.use_bias)}, "kernel")]


def _lookup(layer: Any, _given: Shape, _returned: Shape, kwargs: Mapping[str, Any]) -> list[Step]:
    if not kwargs.get("reverse"):
        return [Step("embedding", {}, "embeddings")]
    own = getattr(layer, "reverse_embeddings", None) is not None
    return [Step("linear", {"channel_axis": -1}, "reverse_embeddings" if own else "embeddings")]


def _norm(layer: Any, *_: Any) -> list[Step]:
    return [Step("batch_norm", {"channel_axis": int(layer.axis), "shift": bool(layer.center)})]


def _layer_norm(layer: Any, *_: Any) -> list[Step]:
    axes = tuple(layer.axis) if isinstance(layer.axis, (list, tuple)) else (layer.axis,)
    if hasattr(layer, "center"):
        return [Step("layer_norm", {"axes": axes, **_affine(layer)})]
    return [Step("rms_norm", {"axes": axes, "scale": True, "shift": False})]


def _affine(layer: Any) -> dict[str, bool]:
    return {"scale": layer.gamma is not None, "shift": layer.beta is not None}


def _group_norm(layer: Any, *_: Any) -> list[Step]:
    return [Step("group_norm", {"channel_axis": int(layer.axis), **_affine(layer)})]


def _rescaling(layer: Any, *_: Any) -> list[Step]:
    steps = [Step("mul", {"constant": True})]
    return [*steps, Step("add", {"constant": True}, suffix="offset")] if np.any(layer.offset) else steps


def _global_pool(op: str, layer: Any, given: Shape, *_: Any) -> list[Step]:
    first = 2 if layer.data_format == "channels_first" else 1
    return [Step(op, {"axes": tuple(range(first, first + len(given) - 2))})]


def _padding(layer: Any, given: Shape, *_: Any) -> list[Step]:
    widths = _by_axis(layer, layer.padding)
    return [Step("pad", {"value": 0.0, "widths": tuple(widths.get(axis, (0, 0)) for axis in range(len(given)))})]


def _by_axis(layer: Any, numbers: Any) -> dict[int, tuple[int, int]]:
    """What is added or cut before and after, by axis."""
    pairs = numbers if isinstance(numbers[0], (tuple, list)) else (numbers,)
    first = 2 if getattr(layer, "data_format", "") == "channels_first" else 1
    return {axis: (int(before), int(after)) for axis, (before, after) in enumerate(pairs, first)}


def _cropping(layer: Any, given: Shape, *_: Any) -> list[Step]:
    """One part after the other, of one axis each."""
    steps, shape = list[Step](), list(given)
    for axis, (before, after) in _by_axis(layer, layer.cropping).items():
        if before or after:
            shape[axis] = None if shape[axis] is None else shape[axis] - before - after
            steps.append(Step("split", {"axis": axis, "start": before}, suffix=f"axis{axis}", shape=tuple(shape)))
    # the last one has the layer's name
    return [*steps[:-1], steps[-1]._replace(suffix="")] if steps else [Step("identity")]


def _dot(layer: Any, _given: Shape, _returned: Shape, kwargs: Mapping[str, Any]) -> list[Step]:
    equation = products.of_operation(layer, [len(shape) for shape in kwargs.get("shapes", ())])
    return [Step("keras.Dot") if equation is None else Step("matmul", {"equation": equation})]


def _relu(layer: Any, *_: Any) -> list[Step]:
    slope, high, threshold = float(layer.negative_slope or 0), layer.max_value, float(layer.threshold or 0)
    if threshold or (slope and high is not None):
        return [Step("keras.ReLU")]
    if slope:
        return [Step("leaky_relu", {"slope": slope})]
    return [Step("relu") if high is None else Step("clip", {"low": 0.0, "high": float(high)})]


def _prelu(layer: Any, *_: Any) -> list[Step]:
    slopes = np.asarray(layer.alpha)
    return [Step("prelu", {"slopes": slopes.reshape(-1) if slopes.size == slopes.shape[-1] else slopes})]


def _activation(layer: Any, *_: Any) -> list[Step]:
    step = activation(layer.activation)
    return [Step("identity") if step is None else step._replace(suffix="")]


def _flatten(layer: Any, given: Shape, *_: Any) -> list[Step]:
    turned = layer.data_format == "channels_first" and len(given) > 2
    return [Step("keras.Flatten") if turned else Step("flatten", {"start": 1})]


_LAYERS: dict[str, Callable[..., list[Step]]] = {
    "Dense": _dense,
    "EinsumDense": _einsum,
    **{f"Conv{n}D": _conv for n in (1, 2, 3)},
    **{f"DepthwiseConv{n}D": _conv for n in (1, 2)},
    **{f"SeparableConv{n}D": _separable for n in (1, 2)},
    **{f"Conv{n}DTranspose": _transposed for n in (1, 2, 3)},
    "Embedding": _lookup,
    "ReversibleEmbedding": _lookup,
    "BatchNormalization": _norm,
    "LayerNormalization": _layer_norm,
    "RMSNormalization": _layer_norm,
    "GroupNormalization": _group_norm,
    "Rescaling": _rescaling,
    "ReLU": _relu,
    "LeakyReLU": lambda layer, *_: [Step("leaky_relu", {"slope": float(layer.negative_slope)})],
    "PReLU": _prelu,
    "ELU": _word("elu"),
    "Softmax": _word("softmax"),
    "Activation": _activation,
    "Add": _word("add", constant=False),
    "Subtract": _word("sub", constant=False),
    "Multiply": _word("mul", constant=False),
    "Concatenate": lambda layer, *_: [Step("concat", {"axis": int(layer.axis)})],
    "Dot": _dot,
    "Maximum": _word("maximum", constant=False),
    "Minimum": _word("maximum", constant=False),
    "Average": lambda *_: [Step("add", {"constant": False}), Step("mul", {"constant": True}, suffix="mean")],
    **{f"MaxPooling{n}D": _word("max_pool") for n in (1, 2, 3)},
    **{f"AveragePooling{n}D": _word("avg_pool") for n in (1, 2, 3)},
    **{f"GlobalMaxPooling{n}D": partial(_global_pool, "max_pool") for n in (1, 2, 3)},
    **{f"GlobalAveragePooling{n}D": partial(_global_pool, "avg_pool") for n in (1, 2, 3)},
    **{f"ZeroPadding{n}D": _padding for n in (1, 2, 3)},
    **{f"UpSampling{n}D": _word("resize") for n in (1, 2, 3)},
    **{f"Cropping{n}D": _cropping for n in (1, 2, 3)},
    "Flatten": _flatten,
    "Reshape": _word("reshape"),
    "Permute": lambda layer, *_: [Step("transpose", {"axes": (0, *layer.dims)})],
    "Identity": _word("identity"),
    **{
        name: _word("dropout")
        for name in ("Dropout", "GaussianDropout", "GaussianNoise", "AlphaDropout", "ActivityRegularization")
    },
    **{f"SpatialDropout{n}D": _word("dropout") for n in (1, 2, 3)},
    **{name: _word(f"keras.{name}") for name in ("RNN", "TimeDistributed", "Bidirectional")},
}
