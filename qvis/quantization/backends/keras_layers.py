"""The steps of each layer of Keras that can be trained with rounding in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from qvis.quantization.backends import keras_operations as to_do

if TYPE_CHECKING:
    from qvis.quantization.backends.keras_steps import Step, _Reader

Rule = Callable[["_Reader", Any, list["Step"], Sequence[Any], str], "Step"]
"""(reader, layer, inputs, shape of the result, name)"""


def rule_of(layer: Any) -> Rule | None:
    """The rule for a layer of Keras, or one derived from it that does the same."""
    if not type(layer).call.__module__.startswith("keras."):
        return None
    for cls in type(layer).__mro__:
        if cls.__module__.startswith("keras.") and cls.__name__ in _RULES:
            return _RULES[cls.__name__]
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Layers with weights


def _dense(reader: _Reader, layer: Any, given: list[Step], shape: Sequence[Any], name: str) -> Step:
    weight = reader.weight(layer, "kernel", lambda one: one, axis=1, by_channel=False, enters=0)
    run: to_do.Apply = to_do.dense
    if len(shape) > 2:
        if None in shape[1:]:
            return reader.refuse(name, "Dense over places of which it is not known how many there are")
        inner, outer = [weight.kernel.shape[0]], list(shape[1:])
        run = to_do.in_shape(to_do.dense, inner, outer)
    step = reader.add(name, "linear", given, shape, run=run, weight=weight, bias=_bias(layer))
    return reader.activate(layer.activation, step, name)


def _conv(reader: _Reader, layer: Any, given: list[Step], shape: Sequence[Any], name: str) -> Step:
    why = _why_not(layer)
    if why:
        return reader.refuse(name, why)
    groups = getattr(layer, "groups", 1)
    weight = reader.weight(layer, "kernel", _flat, axis=3, enters=2 if groups == 1 else None)
    step = _placed(reader, layer, given, shape, name, to_do.conv)
    step.weight, step.bias = weight, _bias(layer)
    return reader.activate(layer.activation, step, name)


def _depthwise(reader: _Reader, layer: Any, given: list[Step], shape: Sequence[Any], name: str) -> Step:
    why = _why_not(layer)
    if why:
        return reader.refuse(name, why)
    step = _placed(reader, layer, given, shape, name, _by_channel(layer))
    step.weight, step.bias = reader.weight(layer, "kernel", _side_by_side, axis=3), _bias(layer)
    return reader.activate(layer.activation, step, name)


def _separable(reader: _Reader, layer: Any, given: list[Step], shape: Sequence[Any], name: str) -> Step:
    why = _why_not(layer)
    if why:
        return reader.refuse(name, why)
    middle = (*shape[:-1], given[0].shape[-1] * layer.depth_multiplier)
    first = _placed(reader, layer, given, middle, f"{name}/depthwise", _by_channel(layer))
    first.weight = reader.weight(layer, "depthwise_kernel", _side_by_side, axis=3)
    ones = (1, 1)
    run = to_do.conv(ones, "valid", ones)
    run = to_do.along_one_axis(run) if len(shape) == 3 else run
    weight = reader.weight(layer, "pointwise_kernel", _flat, axis=3, enters=2)
    step = reader.add(name, "linear", [first], shape, run=run, weight=weight, bias=_bias(layer))
    return reader.activate(layer.activation, step, name)


def _transposed(reader: _Reader, layer: Any, given: list[Step], shape: Sequence[Any], name: str) -> Step:
    why = _why_not(layer)
    if not why and (layer.output_padding is not None or any(size != 1 for size in layer.dilation_rate)):
        why = "Conv2DTranspose with output_padding or dilation"
    if why or None in shape[1:]:
        return reader.refuse(name, why or "the size of its result is not known")
    weight = reader.weight(layer, "kernel", lambda one: one, axis=2, by_channel=False, enters=3)
    run = to_do.transposed(layer.strides, layer.padding, shape[1:3])
    step = reader.add(name, "linear", given, shape, run=run, weight=weight, bias=_bias(layer), pads=True)
    return reader.activate(layer.activation, step, name)


def _placed(
    reader: _Reader, layer: Any, given: list[Step], shape: Sequence[Any], name: str, make: Callable[..., to_do.Apply]
) -> Step:
    """A convolution, in the way that a layer goes over its input."""
    strides, dilation, padding, before = list(layer.strides), list(layer.dilation_rate), layer.padding, 0
    is_padded = padding != "valid" and any(size > 1 for size in layer.kernel_size)
    if padding == "causal":
        padding, before = "valid", dilation[0] * (layer.kernel_size[0] - 1)
    if len(shape) == 3:
        # a depthwise convolution takes the same stride along both axes
        strides, dilation = [strides[0]] * 2, [1, dilation[0]]
        run = to_do.along_one_axis(make(strides, padding, dilation), before)
    else:
        run = make(strides, padding, dilation)
    return reader.add(name, "linear", given, shape, run=run, pads=is_padded)


def _by_channel(layer: Any) -> Callable[..., to_do.Apply]:
    return lambda strides, padding, dilation: to_do.depthwise(strides, padding, dilation, layer.depth_multiplier)


def _flat(kernel: Any) -> Any:
    """Of one axis or two, (height, width, input channels, channels)."""
    return kernel[None] if kernel.ndim == 3 else kernel


def _side_by_side(kernel: Any) -> Any:
    """(height, width, input channels, multiplier) as (height, width, 1, channels)."""
    kernel = _flat(kernel)
    return kernel.reshape(*kernel.shape[:2], 1, -1)


def _bias(layer: Any) -> Any:
    return np.asarray(layer.bias).astype(np.float32) if getattr(layer, "use_bias", False) else None


def _why_not(layer: Any) -> str:
    kind = type(layer).__name__
    if layer.data_format == "channels_first":
        return f"{kind} with channels_first, which TensorFlow does not train on a CPU"
    if getattr(layer, "groups", 1) != 1:
        return f"{kind} in groups, which TensorFlow does not train on a CPU"
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# Layers that scale


def _batch_norm(reader: _Reader, layer: Any, given: list[Step], shape: Sequence[Any], name: str) -> Step:
    if layer.axis not in (-1, len(shape) - 1):
        return reader.refuse(name, "BatchNormalization along another axis than the last")
    mean, variance = (np.asarray(one, np.float64) for one in (layer.moving_mean, layer.moving_variance))
    gain = 1 / np.sqrt(variance + layer.epsilon)
    gain = gain * np.asarray(layer.gamma, np.float64) if layer.gamma is not None else gain
    shift = np.asarray(layer.beta, np.float64) if layer.beta is not None else 0.0
    return reader.affine(given[0], gain, shift - mean * gain, name) or reader.refuse(name, "BatchNormalization")


def _normalization(reader: _Reader, layer: Any, given: list[Step], shape: Sequence[Any], name: str) -> Step:  # noqa: ARG001
    if layer.mean is None:
        return reader.refuse(name, "Normalization that was never adapted")
    mean, deviation = (
        np.asarray(layer.mean, np.float64),
        np.maximum(np.sqrt(np.asarray(layer.variance, np.float64)), 1e-7),
    )
    gain, shift = (deviation, mean) if layer.invert else (1 / deviation, -mean / deviation)
    found = reader.affine(given[0], gain, shift, name)
    return found or reader.refuse(name, "Normalization along another axis than the last")


def _rescaling(reader: _Reader, layer: Any, given: list[Step], shape: Sequence[Any], name: str) -> Step:  # noqa: ARG001
    found = reader.affine(given[0], layer.scale, layer.offset, name)
    return found or reader.refuse(name, "Rescaling along another axis than the last")


# ---------------------------------------------------------------------------------------------------------------------
# Layers without


def _relu(reader: _Reader, layer: Any, given: list[Step], shape: Sequence[Any], name: str) -> Step:
    slope, high = float(layer.negative_slope or 0), layer.max_value
    if float(layer.threshold or 0) or (slope and high is not None) or high not in (None, 6):
        return reader.refuse(name, "ReLU with a threshold, or with another limit than 6")
    if slope:
        return reader.unary("leaky_relu", {"slope": slope}, given[0], shape, name)
    return reader.unary("relu" if high is None else "clip", {"low": 0, "high": high}, given[0], shape, name)


def _leaky(reader: _Reader, layer: Any, given: list[Step], shape: Sequence[Any], name: str) -> Step:
    return reader.unary("leaky_relu", {"slope": float(layer.negative_slope)}, given[0], shape, name)


def _softmax(reader: _Reader, layer: Any, given: list[Step], shape: Sequence[Any], name: str) -> Step:
    if layer.axis not in (-1, len(shape) - 1) or len(given) > 1:
        return reader.refuse(name, "Softmax along another axis than the last, or with a mask")
    return reader.unary("softmax", {}, given[0], shape, name)


def _activation(reader: _Reader, layer: Any, given: list[Step], shape: Sequence[Any], name: str) -> Step:  # noqa: ARG001
    return reader.activate(layer.activation, given[0], name)


def _of_several(function: str, mean: bool = False) -> Rule:
    def rule(reader: _Reader, layer: Any, given: list[Step], shape: Sequence[Any], name: str) -> Step:  # noqa: ARG001
        step = given[0]
        for number, other in enumerate(given[1:], 1):
            title = name if number == len(given) - 1 else f"{name}/{number}"
            step = reader.add(title, "join", [step, other], shape, run=to_do.of_tensorflow(function))
        found = reader.affine(step, 1 / len(given), 0.0, f"{name}/mean") if mean else step
        assert found is not None
        return found

    return rule


def _concatenate(reader: _Reader, layer: Any, given: list[Step], shape: Sequence[Any], name: str) -> Step:
    return reader.add(name, "join", given, shape, run=to_do.concat(layer.axis))


def _own(kind: str) -> Rule:
    """What the layer itself computes."""

    def rule(reader: _Reader, layer: Any, given: list[Step], shape: Sequence[Any], name: str) -> Step:
        if getattr(layer, "data_format", "channels_last") == "channels_first":
            return reader.refuse(name, f"{type(layer).__name__} with channels_first")
        return reader.add(name, kind, given, shape, run=layer.call)

    return rule


def _upsampling(reader: _Reader, layer: Any, given: list[Step], shape: Sequence[Any], name: str) -> Step:
    mode = layer.interpolation
    if layer.data_format == "channels_first" or mode not in ("nearest", "bilinear") or None in shape[1:]:
        return reader.refuse(name, f"UpSampling2D with interpolation {mode!r}, channels_first, or of unknown size")
    kind = "keep" if mode == "nearest" else "mix"
    return reader.add(name, kind, given, shape, run=to_do.resize(shape[1:3], mode))


def _reshape(reader: _Reader, layer: Any, given: list[Step], shape: Sequence[Any], name: str) -> Step:
    if getattr(layer, "data_format", "channels_last") == "channels_first":
        return reader.refuse(name, f"{type(layer).__name__} with channels_first")
    if type(layer).__name__ == "Flatten" and None not in given[0].shape[1:]:
        shape = (None, prod(given[0].shape[1:]))
    return reader.reshape(given[0], shape, name)


def _identity(reader: _Reader, layer: Any, given: list[Step], shape: Sequence[Any], name: str) -> Step:  # noqa: ARG001
    return given[0]


def _augmentation(reader: _Reader, layer: Any, given: list[Step], shape: Sequence[Any], name: str) -> Step:  # noqa: ARG001
    reader.notes.append(f"{name}: what it does in training only is left out here; give data that are varied already")
    return given[0]


def _dropout(reader: _Reader, layer: Any, given: list[Step], shape: Sequence[Any], name: str) -> Step:
    kind = type(layer).__name__
    rate = float(getattr(layer, "stddev", 0) if kind == "GaussianNoise" else layer.rate)
    shared = [axis for axis, size in enumerate(getattr(layer, "noise_shape", None) or ()) if size == 1]
    if kind.startswith("Spatial"):
        shared = list(range(1, len(shape) - 1))
    return reader.add(name, "dropout", given, shape, run=to_do.drop(kind, rate, shared)) if rate else given[0]


_RULES: dict[str, Rule] = {
    "Dense": _dense,
    **{f"Conv{n}D": _conv for n in (1, 2)},
    **{f"DepthwiseConv{n}D": _depthwise for n in (1, 2)},
    **{f"SeparableConv{n}D": _separable for n in (1, 2)},
    "Conv2DTranspose": _transposed,
    "BatchNormalization": _batch_norm,
    "Normalization": _normalization,
    "Rescaling": _rescaling,
    "ReLU": _relu,
    "LeakyReLU": _leaky,
    "Softmax": _softmax,
    "Activation": _activation,
    "Add": _of_several("add"),
    "Subtract": _of_several("subtract"),
    "Multiply": _of_several("multiply"),
    "Average": _of_several("add", mean=True),
    "Maximum": _of_several("maximum"),
    "Minimum": _of_several("minimum"),
    "Concatenate": _concatenate,
    **{f"MaxPooling{n}D": _own("keep") for n in (1, 2)},
    **{f"AveragePooling{n}D": _own("mix") for n in (1, 2)},
    **{f"GlobalMaxPooling{n}D": _own("keep") for n in (1, 2)},
    **{f"GlobalAveragePooling{n}D": _own("join") for n in (1, 2)},
    **{f"ZeroPadding{n}D": _own("keep") for n in (1, 2)},
    "UpSampling1D": _own("keep"),
    "UpSampling2D": _upsampling,
    **{f"Cropping{n}D": _own("keep") for n in (1, 2)},
    "Permute": _own("keep"),
    "Flatten": _reshape,
    "Reshape": _reshape,
    **dict.fromkeys(("Identity", "ActivityRegularization", "AlphaDropout", "InputLayer"), _identity),
    **{
        f"Random{what}": _augmentation
        for what in ("Flip", "Rotation", "Zoom", "Translation", "Contrast", "Brightness", "Shear")
    },
    **dict.fromkeys(("Dropout", "SpatialDropout1D", "SpatialDropout2D", "GaussianDropout", "GaussianNoise"), _dropout),
}
