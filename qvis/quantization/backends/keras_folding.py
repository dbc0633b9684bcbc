"""Folds all that scales channels into kernels, and ReLU into what comes before it, as the engine will compute it.

What training rounds must be what the file holds: the product of a kernel and its normalization (Jacob et al., arXiv
1712.05877, section 3.2), and the result after ReLU.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from qvis.errors import UnsupportedModelError
from qvis.layers import FloatArray
from qvis.quantization.backends import keras_operations as to_do
from qvis.quantization.backends.keras_steps import WAY_OUT, Affine, Step, Steps, Weight


def fold(model: Steps) -> None:
    """Leave no ``affine`` in a model, and a ``clip`` only where its input is used elsewhere too.

    A factor and shift go into the kernel before them, else into the one after them; where neither can take them, they
    become a convolution of each channel by itself.

    Raises
    ------
    UnsupportedModelError
        One is not finite, or can be no convolution.
    """
    for step in _affines(model):
        _merge(model, step)
    for step in _affines(model):
        if step not in model.steps:  # folded with another one
            continue
        affine = _affine(step)
        if not (np.isfinite(affine.gain).all() and np.isfinite(affine.shift).all()):
            raise UnsupportedModelError(
                f"model: {step.name!r} holds NaN or infinite numbers, or a variance below zero, so that nothing can be "
                "computed with it; load or train the model anew"
            )
        if not (_backward(model, step) or _forward(model, step)):
            _stand_alone(model, step)
    for step in [step for step in model.steps if step.kind == "clip"]:
        (before,) = step.inputs
        if before.after is to_do.nothing and before.kind in ("linear", "join") and _is_free(model, before):
            before.after = step.run
            model.replace(step, before)


def _affines(model: Steps) -> list[Step]:
    return [step for step in model.steps if step.kind == "affine"]


def _affine(step: Step) -> Affine:
    assert step.affine is not None
    return step.affine


def _is_free(model: Steps, step: Step) -> bool:
    """Whether one other step alone needs the result of one."""
    return len(model.users(step)) == 1 and not any(one is step for one in model.outputs)


def _merge(model: Steps, step: Step) -> None:
    """Make one of two that follow each other."""
    (before,) = step.inputs
    if before.kind == "affine" and _is_free(model, before):
        first, second = _affine(before), _affine(step)
        step.affine = Affine(second.gain * first.gain, second.shift + second.gain * first.shift)
        model.replace(before, before.inputs[0])


def _backward(model: Steps, step: Step) -> bool:
    """Fold into the kernel before it, and all that do the same after other uses of that kernel."""
    (before,) = step.inputs
    weight, affine = before.weight, _affine(step)
    if weight is None or weight.kernel.shape[weight.axis] != len(affine.gain):
        return False
    pairs = []
    for one in [one for one in model.steps if one.weight is weight]:
        if not _is_free(model, one) or one.after is not to_do.nothing:
            return False
        (user,) = model.users(one)
        if user.affine is None or not user.affine.equals(affine):
            return False
        pairs.append((one, user))
    weight.kernel = _scaled(weight.kernel, affine.gain, weight.axis)
    for one, user in pairs:
        shift = affine.shift if one.bias is None else affine.shift + affine.gain * one.bias
        one.bias = shift.astype(np.float32)
        model.replace(user, one)
    return True


def _forward(model: Steps, step: Step) -> bool:
    """Fold into the kernel after it."""
    if not _is_free(model, step):
        return False
    (after,) = model.users(step)
    weight, affine = after.weight, _affine(step)
    if weight is None or weight.enters is None or sum(one.weight is weight for one in model.steps) > 1:
        return False
    shifts = bool(np.any(affine.shift))
    if (after.pads and shifts) or weight.kernel.shape[weight.enters] != len(affine.gain):
        return False
    if shifts:
        shape = [-1 if axis == weight.enters else 1 for axis in range(weight.kernel.ndim)]
        others = tuple(axis for axis in range(weight.kernel.ndim) if axis != weight.axis)
        bias = (weight.kernel * affine.shift.reshape(shape)).sum(axis=others)
        after.bias = (bias if after.bias is None else bias + after.bias).astype(np.float32)
    weight.kernel = _scaled(weight.kernel, affine.gain, weight.enters)
    model.replace(step, step.inputs[0])
    return True


def _scaled(kernel: FloatArray, gain: FloatArray, axis: int) -> FloatArray:
    scaled: FloatArray = kernel * gain.reshape([-1 if one == axis else 1 for one in range(kernel.ndim)])
    return scaled.astype(np.float32)


def _stand_alone(model: Steps, step: Step) -> None:
    """A convolution of each channel by itself in its place."""
    affine, ones = _affine(step), (1, 1)
    sizes = [size for size in step.shape[1:] if size is not None]
    if len(sizes) < len(step.shape) - 1:
        raise UnsupportedModelError(f"model: {step.name!r} cannot be folded into a layer beside it; {WAY_OUT}")
    run: Any = to_do.depthwise(ones, "valid", ones, 1)
    if len(sizes) != 3:
        run = to_do.in_shape(run, [1, prod(sizes[:-1]), sizes[-1]], sizes)
    step.kind, step.run, step.affine = "linear", run, None
    step.weight = Weight("", affine.gain.reshape(1, 1, 1, -1).astype(np.float32), axis=3)
    step.bias = affine.shift.astype(np.float32)
    model.notes.append(f"{step.name} cannot be folded into a layer beside it: it is a convolution of its own")
