"""Folds all that scales channels into kernels, and ReLU into what comes before it, as the engine will compute it.

What training rounds must be what the file holds: the product of a kernel and its normalization (Jacob et al., arXiv
1712.05877, section 3.2), and the result after ReLU.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from qvis.errors import UnsupportedModelError
from qvis.layers import FloatArray
from qvis.quantization.backends import keras_operations as to_do
from qvis.quantization.backends.keras_steps import WAY_OUT, Step, Steps, Weight

_CLIPPED = ("linear", "join")
"""What the engine computes ReLU together with."""


def fold(model: Steps) -> None:
    """Leave no ``affine`` in a model, and a ``clip`` only where its input is used elsewhere too.

    A factor and shift go into the kernel before them, else into the one after them; where neither can take them, they
    become a convolution of each channel by itself.

    Raises
    ------
    UnsupportedModelError
        One is not finite.
    """
    for step in [step for step in model.steps if step.kind == "affine"]:
        _merge(model, step)
    for step in [step for step in model.steps if step.kind == "affine"]:
        assert step.gain is not None and step.bias is not None
        if not (np.isfinite(step.gain).all() and np.isfinite(step.bias).all()):
            raise UnsupportedModelError(
                f"model: {step.name!r} holds NaN or infinite numbers, or a variance below zero; {WAY_OUT} no better, so "
                "train or load the model anew"
            )
        if not (_backward(model, step) or _forward(model, step)):
            _stand_alone(model, step)
    for step in [step for step in model.steps if step.kind == "clip"]:
        (before,) = step.inputs
        is_free = before.after is to_do.nothing and before.kind in _CLIPPED
        if is_free and len(model.users(before)) == 1 and not _is_output(model, before):
            before.after = step.run
            model.replace(step, before)


def _is_output(model: Steps, step: Step) -> bool:
    return any(one is step for one in model.outputs)


def _merge(model: Steps, step: Step) -> None:
    """Make one of two that follow each other."""
    (before,) = step.inputs
    if before.kind != "affine" or len(model.users(before)) > 1 or _is_output(model, before):
        return
    assert step.gain is not None and before.gain is not None
    step.bias = step.bias + step.gain * before.bias
    step.gain = step.gain * before.gain
    model.replace(before, before.inputs[0])


def _sole(model: Steps, weight: Weight) -> bool:
    """Whether a kernel is used once."""
    return sum(step.weight is weight for step in model.steps) == 1


def _backward(model: Steps, step: Step) -> bool:
    """Fold into the kernel before it."""
    (before,) = step.inputs
    if before.weight is None or not _sole(model, before.weight):
        return False
    if len(model.users(before)) > 1 or _is_output(model, before) or before.after is not to_do.nothing:
        return False
    assert step.gain is not None and step.bias is not None
    weight, gain = before.weight, step.gain
    if weight.kernel.shape[weight.axis] != len(gain):
        return False
    weight.kernel = _scaled(weight.kernel, gain, weight.axis)
    bias = step.bias if before.bias is None else step.bias + gain * before.bias
    before.bias = bias.astype(np.float32)
    model.replace(step, before)
    return True


def _forward(model: Steps, step: Step) -> bool:
    """Fold into the kernel after it."""
    users = model.users(step)
    if len(users) != 1 or _is_output(model, step):
        return False
    (after,) = users
    assert step.gain is not None and step.bias is not None
    if after.weight is None or after.weight.enters is None or not _sole(model, after.weight):
        return False
    weight = after.weight
    if (after.pads and np.any(step.bias)) or weight.kernel.shape[weight.enters or 0] != len(step.gain):
        return False
    shape = [-1 if axis == weight.enters else 1 for axis in range(weight.kernel.ndim)]
    others = tuple(axis for axis in range(weight.kernel.ndim) if axis != weight.axis)
    shift = (weight.kernel.astype(np.float64) * step.bias.reshape(shape)).sum(axis=others)
    weight.kernel = _scaled(weight.kernel, step.gain, weight.enters or 0)
    if np.any(step.bias):
        after.bias = (shift if after.bias is None else shift + after.bias).astype(np.float32)
    model.replace(step, step.inputs[0])
    return True


def _scaled(kernel: FloatArray, gain: FloatArray, axis: int) -> FloatArray:
    scaled: FloatArray = kernel * gain.reshape([-1 if one == axis else 1 for one in range(kernel.ndim)])
    return scaled.astype(np.float32)


def _stand_alone(model: Steps, step: Step) -> None:
    """A convolution of each channel by itself in its place."""
    assert step.gain is not None and step.bias is not None
    ones, sizes = (1, 1), step.shape[1:]
    if None in sizes:
        raise UnsupportedModelError(f"model: {step.name!r} cannot be folded into a layer beside it; {WAY_OUT}")
    run: Any = to_do.depthwise(ones, "valid", ones, 1)
    if len(sizes) != 3:
        run = to_do.in_shape(run, [1, prod(sizes[:-1]), sizes[-1]], list(sizes))  # type: ignore[arg-type, list-item]
    step.kind, step.run = "linear", run
    step.weight = Weight("", step.gain.reshape(1, 1, 1, -1).astype(np.float32), axis=3)
    step.bias, step.gain = step.bias.astype(np.float32), None
    model.notes.append(f"{step.name} cannot be folded into a layer beside it: it is a convolution of its own")


def copied(model: Steps) -> Steps:
    """The same before anything is folded into it."""
    weights: dict[int, Weight] = {}
    made: dict[int, Step] = {}
    for step in model.steps:
        if step.weight is not None and id(step.weight) not in weights:
            weights[id(step.weight)] = replace(step.weight)
        weight = None if step.weight is None else weights[id(step.weight)]
        made[id(step)] = replace(step, weight=weight, inputs=[made[id(one)] for one in step.inputs])
    steps, outputs = ([made[id(one)] for one in some] for some in (model.steps, model.outputs))
    return Steps(steps, outputs, list(model.notes))
