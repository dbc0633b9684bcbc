"""A constant of a graph, ONNX's or TensorFlow Lite's, on its way from where it is stored to the node that uses it."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np

from qvis.adapters.encodings import ENCODINGS, Array, Encoding
from qvis.errors import BadArgumentError, QvisError
from qvis.words import count


def mapped(path: Path, start: int, end: int) -> memoryview:
    """A part of a file as memory, whose pages come in when they are looked at and go with the last reference."""
    if start == end:
        return memoryview(b"")
    skipped = start % mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as file:
        view = mmap.mmap(file.fileno(), end - start + skipped, access=mmap.ACCESS_READ, offset=start - skipped)
    return memoryview(view)[skipped:]


Loader = Callable[[], "bytes | memoryview | Array"]


@dataclass(frozen=True)
class Tensor:
    """A constant of the model, whose numbers are read when asked for."""

    name: str
    shape: tuple[int, ...]
    type: str
    """The type of the stored numbers, such as ``bfloat16``."""
    load: Loader
    """Returns the bytes, as ``raw_data`` would hold them."""

    @property
    def encoding(self) -> Encoding | None:
        """How the numbers are stored; None for a type that qvis cannot read."""
        return ENCODINGS.get(self.type)

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return prod(self.shape)

    def read(self) -> Array:
        """The numbers: floating ones as float32 or float64, others as integers."""
        if self.encoding is None:
            raise BadArgumentError(f"model: the tensor {self.name!r} is of type {self.type}, which qvis does not read")
        try:
            return self.encoding.numbers(self.load(), self.shape)
        except (OSError, OverflowError, ValueError) as error:
            if isinstance(error, QvisError):
                raise
            raise BadArgumentError(f"model: the tensor {self.name!r} cannot be read ({error})") from error


@dataclass(frozen=True)
class Value:
    """A tensor as some node sees it: transposed, reshaped or dequantized on the way."""

    tensor: Tensor
    """Where its numbers are stored."""
    key: Hashable
    """Equal for two values exactly when they come from the same tensor."""
    read: Callable[[], Array]
    """Returns the numbers as they arrive."""
    shape: tuple[int, ...]
    """The shape in which they arrive."""
    axes: tuple[int | None, ...]
    """The axis of the stored tensor that each axis is; None where a reshape split or joined it."""
    floating: bool
    """Whether they arrive as real numbers; a quantized tensor must be dequantized first."""
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, tensor: Tensor, key: Hashable) -> Value:
        """A tensor as it is stored."""
        floating = tensor.encoding is not None and tensor.encoding.floating
        return cls(tensor, key, tensor.read, tensor.shape, tuple(range(len(tensor.shape))), floating)

    def axis_name(self, axis: int) -> str:
        """Which axis of the stored tensor an axis is, in words."""
        stored = self.axes[axis]
        return f"axis {stored}" if stored is not None else f"axis {axis % len(self.shape)} after a reshape"

    def small(self) -> list[int]:
        """The numbers of a constant that gives a shape or axes."""
        if prod(self.shape) > 64:
            raise BadArgumentError(f"model: the tensor {self.tensor.name!r} is no list of axes")
        return [int(one) for one in self.read().reshape(-1)]


def transpose(value: Value, order: Sequence[int] | None) -> Value | None:
    """The value with its axes in another order, reversed by default; None where the order is not one of its axes."""
    axes = len(value.shape)
    order = list(reversed(range(axes))) if order is None else [axis + axes if axis < 0 else axis for axis in order]
    if sorted(order) != list(range(axes)):
        return None
    return replace(
        value,
        read=lambda: value.read().transpose(order),
        shape=tuple(value.shape[axis] for axis in order),
        axes=tuple(value.axes[axis] for axis in order),
    )


def reshape(value: Value, wanted: Sequence[int], keep_zero: bool = False) -> Value | None:
    """The value in another shape, where 0 copies a size and -1 is what remains; None where that cannot be."""
    sizes = list(wanted)
    for axis, size in enumerate(sizes):
        if size == 0 and not keep_zero:
            if axis >= len(value.shape):
                return None
            sizes[axis] = value.shape[axis]
    total = prod(value.shape)
    if -1 in sizes:
        known = prod(size for size in sizes if size != -1)
        if sizes.count(-1) > 1 or known <= 0 or total % known:
            return None
        sizes[sizes.index(-1)] = total // known
    if min(sizes, default=0) < 0 or prod(sizes) != total:
        return None
    shape = tuple(sizes)
    return replace(value, read=lambda: value.read().reshape(shape), shape=shape, axes=_kept(value, shape))


def _kept(value: Value, shape: tuple[int, ...]) -> tuple[int | None, ...]:
    """For each axis of a new shape the stored axis that it still is: as long as before, and with as much before it."""
    known: dict[tuple[int, int], int | None] = {}
    for axis, size in enumerate(value.shape):
        known.setdefault((prod(value.shape[:axis]), size), value.axes[axis])
    return tuple(known.get((prod(shape[:axis]), size)) for axis, size in enumerate(shape))


@dataclass(frozen=True)
class Grid:
    """The scales and zero points of a quantized tensor."""

    scale: Value
    zero: Value | None
    axis: int = 1
    """The axis along which there are several scales."""
    block: int = 0
    """How many numbers along the axis share a scale; 0 where the scales are per tensor or per axis."""

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether the scales are as many as a tensor of ``shape`` needs."""
        if not self.scale.floating or (self.zero is not None and self.zero.shape not in (self.scale.shape, (), (1,))):
            return False
        scales, axis = self.scale.shape, self.axis
        if prod(scales) == 1 and len(scales) <= 1:
            return True
        if not -len(shape) <= axis < len(shape):
            return False
        if self.block:
            axis %= len(shape)
            blocks = -(-shape[axis] // self.block)
            return scales == (*shape[:axis], blocks, *shape[axis + 1 :])
        return scales == (shape[axis],) or scales == shape

    def spread(self, part: Array, shape: tuple[int, ...]) -> Array:
        """Scales or zero points so that they broadcast against a tensor of ``shape``."""
        if part.size == 1:
            return part.reshape(())
        axis = self.axis % len(shape)
        if self.block:
            repeated: Array = np.repeat(part, self.block, axis=axis)
            return repeated[(slice(None),) * axis + (slice(shape[axis]),)]
        if part.ndim == 1 and len(shape) > 1:
            return part.reshape(tuple(-1 if one == axis else 1 for one in range(len(shape))))
        return part

    def words(self, stored: str) -> str:
        """What a reader must know: ``int8, dequantized with 32 scales (symmetric)``."""
        scales = prod(self.scale.shape)
        blocks = f" of {self.block} weights each" if self.block else ""
        zeros = None if self.zero is None else self.zero.read()
        if zeros is None or not zeros.any():
            kind = "symmetric"
        else:
            low, high = zeros.min(), zeros.max()
            kind = f"zero point {low}" if low == high else f"zero points {low} to {high}"
        return f"{stored}, dequantized with {count(scales, 'scale')}{blocks} ({kind})"


def dequantize(value: Value, grid: Grid) -> Value | None:
    """``(value - zero) * scale``, in the type of the scales; None where the scales do not fit."""
    if not grid.fits(value.shape):
        return None
    shape = value.shape

    def read() -> Array:
        scale = grid.scale.read()
        numbers = value.read().astype(scale.dtype)
        if grid.zero is not None:
            numbers -= grid.spread(grid.zero.read().astype(scale.dtype), shape)
        with np.errstate(over="ignore", invalid="ignore"):
            numbers *= grid.spread(scale, shape)
        return numbers

    # A float that the graph itself rounds first has its note already.
    notes = value.notes if value.tensor.encoding is None or value.notes else (grid.words(value.tensor.type),)
    return replace(value, read=read, floating=True, notes=notes)


RANGES = {
    **{f"int{bits}": (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) for bits in (2, 4, 8, 16)},
    **{f"uint{bits}": (0, 2**bits - 1) for bits in (2, 4, 8, 16)},
}
"""The lowest and the highest number of each type that a float may be quantized to."""


def quantize(value: Value, grid: Grid, kind: str) -> Value | None:
    """``value / scale + zero``, rounded, as in a graph that quantizes a weight it keeps as float."""
    if not grid.fits(value.shape) or kind not in RANGES:
        return None
    shape, (low, high) = value.shape, RANGES[kind]

    def read() -> Array:
        scale = grid.scale.read()
        with np.errstate(all="ignore"):
            steps = np.rint(value.read().astype(scale.dtype) / grid.spread(scale, shape))
        if grid.zero is not None:
            steps += grid.spread(grid.zero.read().astype(scale.dtype), shape)
        return np.clip(steps, low, high)

    note = f"stored as {value.tensor.type}; the model itself rounds it: {grid.words(kind)}"
    return replace(value, read=read, floating=False, notes=(*value.notes, note))
