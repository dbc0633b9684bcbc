"""Turns weights of eight bits back into numbers with the scales that stand beside them.

Names are those of Transformers, vLLM and compressed-tensors (``weight_scale``, ``weight_zero_point``), DeepSeek
(``weight_scale_inv``, for blocks of 128 x 128; despite its name it is multiplied by) and bitsandbytes (``SCB``, 127
times the scale of each output). Where the shapes leave open which scale belongs to which weight, nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from qvis.adapters.checkpoint.stored import Array, Stored

DEFAULT_BLOCK = (128, 128)

_AMBIGUOUS = ("scale", "scales", "zero_point")


class Scaled(NamedTuple):
    """What became of a weight of eight bits."""

    tensor: Stored
    used: tuple[str, ...] = ()
    """Names of the tensors that are no weights of their own."""


def scaled(tensor: Stored, tensors: Mapping[str, Stored], settings: Mapping[str, Any]) -> Scaled | None:
    """The weight with its scale taken in; None where none of this concerns the tensor."""
    eight = tensor.dtype in ("int8", "uint8") or tensor.dtype.startswith("float8")
    if not eight or len(tensor.shape) < 2:
        return None
    owner, dot, last = tensor.name.rpartition(".")
    own = [f"{tensor.name}_scale", f"{tensor.name}_scale_inv"]
    scales = own + ([f"{owner}{dot}{name}" for name in ("scale_weight", "SCB")] if last == "weight" else [])
    scale = next((tensors[name] for name in scales if name in tensors), None)
    zero = tensors.get(f"{tensor.name}_zero_point")
    if scale is None:
        others = (f"{owner}{dot}{name}" for name in _AMBIGUOUS)
        return _unexplained(tensor, [name for name in (*others, f"{tensor.name}.absmax") if name in tensors])
    scale_name = scale.name.rpartition(".")[2]
    block = _block(tensor.shape, scale.shape, settings)
    used = tuple(one.name for one in (scale, zero) if one is not None)
    asymmetric = zero is not None and (zero.shape != scale.shape or zero.dtype not in ("int8", "uint8", "int32"))
    bare = tensor.dtype == "uint8" and zero is None
    wrong_type = bool(scale.obstacle) or (scale_name == "SCB" and tensor.dtype != "int8")
    if block is None or asymmetric or bare or wrong_type:
        why = f"{scale.name!r} has shape {list(scale.shape)}" if block is None else f"of {scale.name!r}"
        return _unread(tensor, why, used)
    factor = 1 / 127 if scale_name == "SCB" else 1.0
    size = " x ".join(map(str, block))
    note = f"dequantized from {tensor.dtype} with {scale_name}, one scale for each block of {size}"
    if scale.size == 1:
        note = f"dequantized from {tensor.dtype} with {scale_name}, one scale for all"
    elif scale.size == tensor.shape[0] and block[0] == 1:
        note = f"dequantized from {tensor.dtype} with {scale_name}, one scale for each output"
    read = partial(_read, tensor, scale, zero, block, factor)
    return Scaled(replace(tensor, read=read, obstacle="", notes=(*tensor.notes, note)), used)


def _unexplained(tensor: Stored, names: list[str]) -> Scaled | None:
    if not names or not tensor.obstacle:
        return None
    listed = " and ".join(map(repr, names))
    packer = " of bitsandbytes" if any(name.endswith("absmax") for name in names) else ""
    return Scaled(
        replace(
            tensor, obstacle=f"holds integers ({tensor.dtype}), and how {listed}{packer} beside it apply is not certain"
        )
    )


def _unread(tensor: Stored, why: str, used: tuple[str, ...]) -> Scaled:
    """Integers mean nothing without their scale; floating numbers are at least proportional to the weight."""
    if tensor.obstacle:
        return Scaled(
            replace(tensor, obstacle=f"holds integers ({tensor.dtype}) whose scale is not certain: {why}"), used
        )
    note = f"shown as stored, without its scale, which does not fit: {why}"
    return Scaled(replace(tensor, notes=(*tensor.notes, note)), used)


def _block(shape: tuple[int, ...], scale: tuple[int, ...], settings: Mapping[str, Any]) -> tuple[int, ...] | None:
    """How many weights along each axis share a scale; None where that is not certain."""
    if set(scale) <= {1}:
        return shape
    if scale == shape[:1]:
        return (1, *shape[1:])
    if len(scale) != len(shape):
        return None
    if all(given in (1, size) for given, size in zip(scale, shape, strict=True)):
        return tuple(size if given == 1 else 1 for given, size in zip(scale, shape, strict=True))
    configured = settings.get("weight_block_size")
    blocks: list[Any] = [configured] if isinstance(configured, list) and len(configured) == 2 else [DEFAULT_BLOCK]
    if len(shape) == 2 and scale[0] == shape[0] and not shape[1] % scale[1]:
        blocks.append((1, shape[1] // scale[1]))
    for block in blocks:
        sizes = (*(1,) * (len(shape) - 2), *block)
        if all(type(size) is int and size > 0 for size in sizes) and all(
            -(-whole // size) == count for whole, size, count in zip(shape, sizes, scale, strict=True)
        ):
            return sizes
    return None


def _read(tensor: Stored, scale: Stored, zero: Stored | None, block: tuple[int, ...], factor: float) -> Array:
    weight = tensor.read().astype(np.float32)
    with np.errstate(all="ignore"):
        if zero is not None:
            _apply(np.subtract, weight, zero.read().astype(np.float32), block)
        _apply(np.multiply, weight, scale.read().astype(np.float32) * np.float32(factor), block)
    return weight


def _apply(operation: np.ufunc, weight: Array, values: Array, block: tuple[int, ...]) -> None:
    """Combine each block of the weight, in place, with its own value; row after row of blocks."""
    if values.size == 1:
        operation(weight, values.reshape(()), out=weight)
        return
    values = values.reshape(*values.shape, *(1,) * (weight.ndim - values.ndim))
    for index in range(values.shape[0]):
        rows = slice(index * block[0], (index + 1) * block[0])
        spread = values[index : index + 1]
        for axis in range(1, weight.ndim):
            if spread.shape[axis] > 1 and block[axis] > 1:
                spread = np.repeat(spread, block[axis], axis=axis)
            spread = spread[(slice(None),) * axis + (slice(weight.shape[axis]),)]
        operation(weight[rows], spread, out=weight[rows])
