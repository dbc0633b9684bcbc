"""Grids that numbers are rounded to: a :class:`Scheme` says of what sort, and fits one to the numbers of a layer.

.. code-block:: python

   fitted = Scheme("uniform", bits=4, granularity=32, range="mse").fit(layer.weight)
   fitted.rounded(), fitted.codes, fitted.levels(row=0), fitted.bytes
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from qvis.errors import BadArgumentError
from qvis.layers import FloatArray, IntArray
from qvis.quantization import ranges
from qvis.quantization.codebooks import codebooks
from qvis.quantization.shapes import Offset, Place, Shape, Table, Uniform
from qvis.quantization.tables import FLOATS, float_levels, logarithmic_levels, quantile_levels

KINDS = {
    "uniform": "integers times a step",
    "power_of_two": "the same with a step that is a power of two, so that scaling is a shift of bits",
    "offset": "even steps from the smallest number to the largest, which need not hold zero",
    "kmeans": "a codebook for each block: levels put where the numbers are",
    "logarithmic": "zero and powers of two with either sign",
    "quantile": "levels that normal numbers would use equally often, as in NF4",
    "float8_e4m3fn": "8-bit floating point with 3 bits of mantissa, up to 448, times a scale",
    "float8_e5m2": "8-bit floating point with 2 bits of mantissa, up to 57344, times a scale",
    "float4_e2m1": "4-bit floating point with 1 bit of mantissa, up to 6, times a scale",
}
"""The kinds of grid."""
ROUNDINGS = ("nearest", "stochastic")
RANGES = ("minmax", "percentile", "mse")
SCALE_BITS = 16
"""Of a scale, of the lowest level of ``offset`` and of each level of a codebook: a 16-bit float."""
EXPONENT_BITS = 8
"""Of a scale that is a power of two."""
ZERO_BITS = 8
"""Of a zero point, or as many as its grid has where that is more."""

_BITS = {"uniform": 16, "power_of_two": 16, "offset": 16, "kmeans": 8, "logarithmic": 8, "quantile": 8}
"""The most bits of each kind that leaves a choice."""


@dataclass(frozen=True)
class Scheme:
    """A sort of grid, before it is fitted to numbers.

    Raises :exc:`~qvis.BadArgumentError` for settings that do not exist or do not go together.
    """

    kind: str = "uniform"
    """A word of :data:`KINDS`."""
    bits: int = 8
    """Of a code: 1 to 16, to 8 for tables; at least 2 where the levels have signs; what its name says for a float."""
    granularity: str | int = "channel"
    """What shares a scale: the whole ``tensor``, each ``channel`` (a row), or so many neighbours within a row, such as
    32, 64 or 128; the last group of a row may be shorter."""
    symmetric: bool = True
    """Whether zero has code 0. If not, the grid goes from the smallest number to the largest, zero being one of its
    levels, and has a zero point. Only for ``uniform`` and ``power_of_two``; other kinds are what they are."""
    narrow: bool = True
    """Whether a symmetric grid does without the code -2^(bits-1), for which there is no positive one. If not, the step
    is 2 max|w| / (2^bits - 1), as PyTorch's observers have it."""
    rounding: str = "nearest"
    """``nearest``, with halves to even codes, or ``stochastic``: up or down at random so that the mean is right."""
    range: str = "minmax"
    """``minmax`` covers all numbers, ``percentile`` all but a few, ``mse`` what leaves the least noise when rounded to
    nearest: see :func:`qvis.quantization.ranges.best`. A codebook has no range."""
    percentile: float = 99.9
    """How many percent of the numbers, or of their magnitudes where the grid is symmetric, ``percentile`` covers."""
    seed: int = 0
    """Of ``stochastic`` rounding."""

    def __post_init__(self) -> None:
        _check_one_of("kind", self.kind, tuple(KINDS))
        _check_one_of("rounding", self.rounding, ROUNDINGS)
        _check_one_of("range", self.range, RANGES)
        if self.kind in FLOATS:
            least = most = int(self.kind[5])
        else:
            signed = self.kind in ("logarithmic", "quantile") or (self._symmetric and self.kind != "kmeans")
            least, most = 1 + signed, _BITS[self.kind]
        if not _is_whole(self.bits) or not least <= self.bits <= most:
            expected = f"{least}" if least == most else f"a whole number from {least} to {most}"
            way_out = (
                "; one bit takes symmetric=False" if self.bits == 1 and self.kind in ("uniform", "power_of_two") else ""
            )
            raise BadArgumentError(f"bits: got {self.bits!r}, expected {expected} for kind {self.kind!r}{way_out}")
        if self.granularity not in ("tensor", "channel") and not (_is_whole(self.granularity) and self.granularity > 0):  # type: ignore[operator]
            raise BadArgumentError(
                f"granularity: got {self.granularity!r}, expected 'tensor', 'channel' or how many numbers share a scale"
            )
        if not isinstance(self.percentile, Real) or not 0 < self.percentile <= 100:
            raise BadArgumentError(f"percentile: got {self.percentile!r}, expected a number above 0 and up to 100")
        if self.kind == "kmeans" and self.range != "minmax":
            raise BadArgumentError(
                f"range: got {self.range!r}, but a codebook has none: its levels are where the numbers are; "
                "leave range='minmax'"
            )

    @property
    def _symmetric(self) -> bool:
        """Whether the range is given by the largest magnitude."""
        return self.symmetric if self.kind in ("uniform", "power_of_two") else self.kind not in ("offset", "kmeans")

    def __str__(self) -> str:
        side = "" if self.symmetric or self.kind not in ("uniform", "power_of_two") else "asymmetric "
        shared = f"groups of {self.granularity}" if _is_whole(self.granularity) else f"per {self.granularity}"
        more = [name for name, usual in ((self.rounding, "nearest"), (self.range, "minmax")) if name != usual]
        return ", ".join([f"{self.bits}-bit {side}{self.kind.replace('_', ' ')}", shared, *more])

    def fit(self, matrix: ArrayLike) -> Fitted:
        """The grid of this sort for the numbers of one layer, or of any matrix.

        Parameters
        ----------
        matrix
            (channels, elements). It is not written to. Numbers that are not finite stay as they are, and count for
            nothing. float32 and float64 are computed in themselves, other types in the smallest of the two that
            holds them.
        """
        matrix = _as_matrix(matrix)
        blocks = _blocks(np.where(np.isfinite(matrix), matrix, matrix.dtype.type(np.nan)), self.granularity)
        with np.errstate(all="ignore"):
            if self.kind == "kmeans":
                shape: Shape = Table(codebooks(blocks, 2**self.bits))
                one = np.ones((len(blocks), 1), dtype=matrix.dtype)
                place = Place(one, np.zeros_like(one))
            else:
                shape = self._shape()
                place = shape.place(*self._range(blocks, shape))
        return Fitted(self, matrix, shape, place)

    @property
    def block_bits(self) -> int:
        """What is needed to read the codes of each block, beside them.

        A 16-bit float as the scale, or 8 bits where it is a power of two; 8 bits as the zero point of an asymmetric
        grid, or as many as the grid has; 16 bits as the lowest level of ``offset``; 16 bits for each level of a
        codebook, which has no scale. What is the same for all layers, such as the quantiles, is free.
        """
        if self.kind == "kmeans":
            return SCALE_BITS << self.bits
        scale = EXPONENT_BITS if self.kind in ("power_of_two", "logarithmic") else SCALE_BITS
        if self.kind == "offset":
            return scale + SCALE_BITS
        asymmetric = self.kind in ("uniform", "power_of_two") and not self.symmetric
        return scale + max(ZERO_BITS, self.bits) if asymmetric else scale

    def bytes(self, channels: int, elements: int) -> int:
        """What a matrix takes: its codes packed without gaps, and :attr:`block_bits` for each block."""
        blocks = 1
        if self.granularity != "tensor":
            size = elements if self.granularity == "channel" else min(int(self.granularity), elements)
            blocks = channels * -(-elements // size) if size else channels
        return -(-(channels * elements * self.bits + blocks * self.block_bits) // 8)

    def _shape(self) -> Shape:
        if self.kind in FLOATS:
            return Table(float_levels(self.kind))
        if self.kind == "quantile":
            return Table(quantile_levels(self.bits))
        if self.kind == "logarithmic":
            return Table(logarithmic_levels(self.bits), shift=True)
        if self.kind == "offset":
            return Offset(self.bits)
        return Uniform(self.bits, self.symmetric, self.narrow, shift=self.kind == "power_of_two")

    def _range(self, blocks: FloatArray, shape: Shape) -> tuple[FloatArray, FloatArray]:
        symmetric, zero = self._symmetric, self.kind != "offset"
        if self.range == "percentile":
            return ranges.most(blocks, self.percentile, symmetric=symmetric, zero=zero)
        low, high = ranges.everything(blocks, symmetric=symmetric, zero=zero)
        if self.range == "mse":
            return ranges.best(blocks, shape, low, high, symmetric=symmetric, zero=zero)
        return low, high


@dataclass(frozen=True, eq=False)
class Fitted:
    """A grid that was fitted to a matrix; made by :meth:`Scheme.fit`."""

    scheme: Scheme
    """What was asked for."""
    matrix: FloatArray = field(repr=False)
    """The numbers, (channels, elements)."""
    _shape: Shape = field(repr=False)
    _place: Place = field(repr=False)

    @cached_property
    def codes(self) -> IntArray:
        """The code of each number, int32 (channels, elements).

        The integers of a uniform grid, signed where it is symmetric; elsewhere the places of the levels, in ascending
        order. That of a number that is not finite means nothing.
        """
        return self._encode(self.matrix)

    @property
    def scale(self) -> FloatArray:
        """The step, or what the levels of a table are multiplied with; 1 where all is zero.

        (1, 1) of a tensor, (channels, 1) or (channels, groups).
        """
        return self._by_row(self._place.scale)

    @property
    def zero_point(self) -> FloatArray:
        """In the shape of :attr:`scale`: the code of zero; of kind ``offset`` the number that has code 0."""
        return self._by_row(self._place.zero)

    def rounded(self) -> FloatArray:
        """The numbers that the codes stand for, in the type of :attr:`matrix`; what is not finite is as it was."""
        return self._decode(self.codes, self.matrix)

    def round(self, matrix: ArrayLike) -> FloatArray:
        """Other numbers rounded on this grid: in the shape of :attr:`matrix`, or in any where one grid is for all.

        Those beyond its ends become the end. Stochastic rounding draws the same random numbers each time.
        """
        matrix = _as_matrix(matrix).astype(self.matrix.dtype)
        if matrix.shape != self.matrix.shape and self.scheme.granularity != "tensor":
            raise BadArgumentError(
                f"matrix: got shape {matrix.shape}, expected {self.matrix.shape}, the one the grid was fitted to"
            )
        return self._decode(self._encode(matrix), matrix)

    def levels(self, row: int = 0, group: int = 0) -> FloatArray:
        """All numbers that the grid of a row, or of a group within it, can hold, in ascending order.

        A codebook of fewer different numbers than it has room for repeats the largest.
        """
        rows, groups = self.scale.shape
        channels = len(self.matrix)
        if not 0 <= row < channels or not 0 <= group < groups:
            raise BadArgumentError(
                f"row, group: got {row!r}, {group!r}, expected a row below {channels} and a group below {groups}"
            )
        block = (row if rows > 1 else 0) * groups + group
        shape = self._shape
        if isinstance(shape, Table) and shape.levels.ndim == 2:
            own: FloatArray = shape.levels[block]
            return own
        with np.errstate(all="ignore"):
            place = Place(self._place.scale[block : block + 1], self._place.zero[block : block + 1])
            levels: FloatArray = self._finite(shape.decode(shape.codes[None], place))[0]
            return levels

    @property
    def bytes(self) -> int:
        """What the matrix takes; see :meth:`Scheme.bytes`."""
        return self.scheme.bytes(*self.matrix.shape)

    @property
    def bits_per_weight(self) -> float:
        """:attr:`bytes` in bits for each number; NaN where there is none."""
        return 8 * self.bytes / self.matrix.size if self.matrix.size else float("nan")

    def _by_row(self, blocks: FloatArray) -> FloatArray:
        per_tensor = self.scheme.granularity == "tensor"
        return blocks.reshape(1 if per_tensor else len(self.matrix), -1) if blocks.size else blocks

    def _encode(self, matrix: FloatArray) -> IntArray:
        blocks = _blocks(np.where(np.isfinite(matrix), matrix, 0), self.scheme.granularity, fill=0)
        generator = np.random.default_rng(self.scheme.seed) if self.scheme.rounding == "stochastic" else None
        with np.errstate(all="ignore"):
            codes = self._shape.encode(blocks, self._place, generator)
        return _unblocked(codes, matrix.shape).astype(np.int32)

    def _decode(self, codes: IntArray, matrix: FloatArray) -> FloatArray:
        with np.errstate(all="ignore"):
            numbers = self._shape.decode(_blocks(codes, self.scheme.granularity, fill=0), self._place)
            numbers = self._finite(_unblocked(numbers, matrix.shape))
        rounded: FloatArray = np.where(np.isfinite(matrix), numbers, matrix)
        return rounded

    def _finite(self, numbers: FloatArray) -> FloatArray:
        """A step that was rounded up can lead past the largest number of its type."""
        limits = np.finfo(numbers.dtype)
        clipped: FloatArray = np.clip(numbers, limits.min, limits.max)
        return clipped


def _blocks(matrix: np.ndarray[Any, Any], granularity: str | int, fill: float = np.nan) -> np.ndarray[Any, Any]:
    """A matrix (channels, elements) as (blocks, numbers), the last group of each row filled up."""
    if granularity == "tensor":
        return matrix.reshape(1, -1)
    elements = matrix.shape[1]
    if granularity == "channel" or not elements:
        return matrix
    size = min(int(granularity), elements)
    missing = -elements % size
    if missing:
        matrix = np.pad(matrix, ((0, 0), (0, missing)), constant_values=fill)
    return matrix.reshape(-1, size)


def _unblocked(blocks: np.ndarray[Any, Any], shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    if blocks.size == shape[0] * shape[1]:
        return blocks.reshape(shape)
    return blocks.reshape(shape[0], -1)[:, : shape[1]]


def _as_matrix(matrix: ArrayLike) -> FloatArray:
    array = np.asarray(matrix)
    if array.ndim != 2:
        raise BadArgumentError(
            f"matrix: got shape {array.shape}, expected (channels, elements); reshape(len(w), -1) makes one of a tensor"
        )
    if array.dtype.kind not in "fiub":
        raise BadArgumentError(f"matrix: got type {array.dtype}, expected real numbers")
    dtype = np.float64 if np.result_type(array.dtype, np.float32) != np.float32 else np.float32
    return array.astype(dtype, copy=False)


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _check_one_of(name: str, value: object, words: tuple[str, ...]) -> None:
    if value not in words:
        raise BadArgumentError(f"{name}: got {value!r}, expected one of {', '.join(words)}")
