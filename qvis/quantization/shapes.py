"""The two shapes of a grid: levels with one step between them, and levels read from a table.

Both work on blocks, which are the numbers that share a scale: arrays (blocks, numbers), with what :meth:`place` finds
for each of them. Numbers are divided by the scale and rounded to nearest, halves to even: as NumPy and ONNX do, and
PyTorch but for its multiplication by 1 / scale, which can tell in the last digit of a number at a half.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from qvis.layers import FloatArray, IntArray

Codes = FloatArray | IntArray


class Place(NamedTuple):
    """Where the grid of each block lies; arrays (blocks, 1)."""

    scale: FloatArray
    """The step, or what the levels of a table are multiplied with."""
    zero: FloatArray
    """The code of zero, as a float; of an :class:`Offset` the number that code 0 stands for."""


class Shape(Protocol):
    """What a grid must tell."""

    def place(self, low: FloatArray, high: FloatArray) -> Place:
        """The grid that covers the range of each block, both (blocks, 1)."""
        ...

    def encode(self, values: FloatArray, place: Place, generator: np.random.Generator | None = None) -> Codes:
        """The code of each number, as a float or an integer; rounded at random where a generator is given."""
        ...

    def decode(self, codes: Codes, place: Place) -> FloatArray:
        """The numbers that codes (blocks, numbers) stand for, in the type of the scale."""
        ...

    @property
    def codes(self) -> IntArray:
        """All codes, in the order of their levels."""
        ...


def divide(high: FloatArray, by: float) -> FloatArray:
    """``high / by``, but never so small that ``by`` times it falls short; 1 for 0."""
    scale = high / high.dtype.type(by)
    # below the normal numbers a quotient can lose half of itself
    short = (scale < np.finfo(scale.dtype).smallest_normal) & (scale * high.dtype.type(by) < high)
    scale = np.where(short, np.nextafter(scale, scale.dtype.type(np.inf)), scale)
    result: FloatArray = np.where(scale > 0, scale, scale.dtype.type(1))
    return result


def power_of_two(exponent: IntArray, dtype: np.dtype[np.floating]) -> FloatArray:
    """2 to an exponent, which is kept within what the type can hold."""
    info = np.finfo(dtype)
    smallest = info.minexp - info.nmant
    result: FloatArray = np.ldexp(np.ones(exponent.shape, dtype), np.clip(exponent, smallest, info.maxexp - 1))
    return result


def _whole(values: FloatArray, generator: np.random.Generator | None) -> FloatArray:
    """Rounds to whole numbers, in place: to nearest, or up with the fractional part as the probability."""
    if generator is None:
        return np.rint(values, out=values)
    down = np.floor(values)
    # not floor(value + random), whose sum can round up to the next number
    return np.add(down, generator.random(values.shape, dtype=np.float32) < values - down, out=values)


@dataclass(frozen=True)
class Uniform:
    """``step * (code - zero)``: with symmetric codes zero is 0, else it is what makes zero a level."""

    bits: int
    symmetric: bool = True
    narrow: bool = True
    """Without -2^(bits-1), of symmetric codes."""
    shift: bool = False
    """Whether the step is a power of two."""

    @property
    def codes(self) -> IntArray:
        """All codes, in the order of their levels."""
        half = 2 ** (self.bits - 1)
        return np.arange(-half + self.narrow, half) if self.symmetric else np.arange(2 * half)

    def place(self, low: FloatArray, high: FloatArray) -> Place:
        """A step such that no number of the range is further than half of it from a level."""
        steps = 2**self.bits - 1
        step = divide(high, (steps - self.narrow) / 2) if self.symmetric else _span(low, high, steps)
        if self.shift:
            mantissa, exponent = np.frexp(step)
            step = power_of_two(exponent - (mantissa == 0.5), step.dtype)
        zero = np.zeros_like(step) if self.symmetric else np.clip(np.rint(-low / step), 0, steps)
        return Place(step, zero)

    def encode(self, values: FloatArray, place: Place, generator: np.random.Generator | None = None) -> FloatArray:
        """The code of each number, as a float; those beyond the ends get that of the end."""
        codes = _whole(values / place.scale, generator)
        if not self.symmetric:
            codes += place.zero
        ends = self.codes
        return np.clip(codes, ends[0], ends[-1], out=codes)

    def decode(self, codes: Codes, place: Place) -> FloatArray:
        """The numbers that codes stand for."""
        numbers = codes.astype(place.scale.dtype)
        if not self.symmetric:
            numbers -= place.zero
        numbers *= place.scale
        return numbers


@dataclass(frozen=True)
class Offset(Uniform):
    """``step * code + lowest``: evenly from the smallest number to the largest, whether or not zero is among them."""

    symmetric: bool = False

    def place(self, low: FloatArray, high: FloatArray) -> Place:
        """The step, and the lowest level."""
        return Place(_span(low, high, 2**self.bits - 1), low)

    def encode(self, values: FloatArray, place: Place, generator: np.random.Generator | None = None) -> FloatArray:
        """The code of each number, as a float."""
        codes = values - place.zero
        if np.isfinite(codes).all():
            codes /= place.scale
        else:  # further apart than the type can say
            codes = values / place.scale - place.zero / place.scale
        return np.clip(_whole(codes, generator), 0, 2**self.bits - 1)

    def decode(self, codes: Codes, place: Place) -> FloatArray:
        """The numbers that codes stand for."""
        numbers = codes.astype(place.scale.dtype)
        result: FloatArray = numbers * place.scale + place.zero
        return result


def _span(low: FloatArray, high: FloatArray, steps: int) -> FloatArray:
    """The step that goes ``steps`` times from low to high."""
    span = high - low
    step = np.where(np.isfinite(span), divide(span, steps), high / steps - low / steps)
    held: FloatArray = np.minimum(step, np.finfo(high.dtype).max).astype(high.dtype)
    return held


@dataclass(frozen=True, eq=False)
class Table:
    """``scale * levels[code]``."""

    levels: FloatArray
    """In ascending order: (levels,), or (blocks, levels) of a table for each block."""
    shift: bool = False
    """Whether the scale is a power of two: the one nearest to the range."""

    @property
    def codes(self) -> IntArray:
        """All codes, in the order of their levels."""
        return np.arange(self.levels.shape[-1])

    def place(self, low: FloatArray, high: FloatArray) -> Place:  # noqa: ARG002
        """The scale that puts the largest level at the end of the range."""
        if self.shift:
            mantissa, exponent = np.frexp(high)
            scale = power_of_two(exponent - (mantissa < 0.75), high.dtype)
            return Place(np.where(high > 0, scale, high.dtype.type(1)), np.zeros_like(high))
        scale = divide(high, float(self.levels[..., -1].max(initial=0)))
        return Place(scale, np.zeros_like(high))

    def encode(self, values: FloatArray, place: Place, generator: np.random.Generator | None = None) -> Codes:
        """The place of the nearest level in the table; of two, that with the even code, counted from zero."""
        values = values / place.scale
        if generator is None:
            return _count_below(self._borders(values.dtype), values)
        codes = _count_below(np.nextafter(self.levels[..., 1:-1].astype(values.dtype), -np.inf), values)
        if self.levels.shape[-1] > 1:
            below, above = self._take(codes).astype(values.dtype), self._take(codes + 1).astype(values.dtype)
            share = np.divide(values - below, above - below, out=np.zeros_like(values), where=above > below)
            codes = codes + (generator.random(values.shape, dtype=np.float32) < share)
        return codes

    def decode(self, codes: Codes, place: Place) -> FloatArray:
        """The numbers that codes stand for."""
        result: FloatArray = self._take(codes.astype(np.intp)).astype(place.scale.dtype) * place.scale
        return result

    def _take(self, codes: IntArray) -> FloatArray:
        if self.levels.ndim == 1:
            return self.levels[codes]
        return np.take_along_axis(self.levels, codes, axis=1)

    def _borders(self, dtype: np.dtype[np.floating]) -> FloatArray:
        """What a number must exceed for the next level: half-way, and just less where the half itself goes up."""
        middle = (self.levels[..., :-1] / 2 + self.levels[..., 1:] / 2).astype(dtype)
        from_zero = self.codes[1:]
        if self.levels.ndim == 1:
            from_zero = from_zero - np.argmin(np.abs(self.levels))
        borders: FloatArray = np.where(from_zero % 2 == 0, np.nextafter(middle, dtype.type(-np.inf)), middle)
        return borders


def _count_below(borders: FloatArray, values: FloatArray) -> IntArray:
    """How many of the borders, (borders,) or (blocks, borders), lie below each of the values (blocks, numbers)."""
    if borders.ndim == 1:
        return np.searchsorted(borders, values)
    counts = np.empty(values.shape, dtype=np.intp)
    for count, border, row in zip(counts, borders, values, strict=True):
        count[:] = np.searchsorted(border, row)
    return counts
