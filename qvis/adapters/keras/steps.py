"""What the layers and operations of Keras are called in a graph: the words of :data:`qvis.layers.OPS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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


def _cropping(layer: Any, given: Shape, *_: Any) -> list[Step]:
    """One part after the other, of one axis each."""
    cropping = layer.cropping if isinstance(layer.cropping[0], tuple) else (layer.cropping,)
    first = 2 if getattr(layer, "data_format", "") == "channels_first" else 1
    steps, shape = list[Step](), list(given)
    for axis, (before, after) in enumerate(cropping, first):
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
    **{f"{kind}MaxPooling{n}D": _word("max_pool") for kind in ("", "Global") for n in (1, 2, 3)},
    **{f"{kind}AveragePooling{n}D": _word("avg_pool") for kind in ("", "Global") for n in (1, 2, 3)},
    **{f"ZeroPadding{n}D": _word("pad", value=0.0) for n in (1, 2, 3)},
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
    **{
        name: _word(f"keras.{name}")
        for name in ("RNN", "TimeDistributed", "Bidirectional", "Average", "Maximum", "Minimum")
    },
}


# ---------------------------------------------------------------------------------------------------------------------
# Operations

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
    if name in _SAME:
        return Step(_SAME[name])
    if name in _OF_TWO:
        divisor = {"divisor": True} if _OF_TWO[name] == "div" and hasattr(arguments[0], "_keras_history") else {}
        return Step(_OF_TWO[name], {"constant": len(shapes) == 1, **divisor})
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
    if name == "Pad" and held.get("mode") == "constant":
        return Step("pad", {"value": float(held.get("constant_values") or 0)})
    if name == "Repeat" and held.get("axis") is not None:
        return Step("resize")
    if name == "Mean" and _is_spatial(held.get("axis"), len(given)):
        return Step("avg_pool")
    return None


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
    taken = {axis % rank for axis in ([axes] if isinstance(axes, int) else axes)}
    channel = 1 if keras.config.image_data_format() == "channels_first" else rank - 1
    return not taken & {0, channel}
