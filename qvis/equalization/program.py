r"""The geometric program of cross-layer equalization; its formula stands in :mod:`qvis.equalization.scales`.

The sums over pairs of channels are products of matrices and vectors, since :math:`e^{x_o - x_i}` is a product: one
evaluation reads each matrix a few times, and takes no exponential of its numbers. For the p-norms, which take the place
of maxima, :math:`A^p` would leave floating point; what is kept is :math:`(A\,e^{x_o - x_i} / \max)^p` at a point
nearby, and it is computed anew where :math:`x` has gone far from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, log
from typing import NamedTuple

import numpy as np

from qvis.equalization.terms import InputTerm, LayerTerm
from qvis.layers import BoolArray, FloatArray, IntArray

RIDGE = 1e-6
"""Weight of half the sum of squared x, which keeps those scales near 1 that no damage depends on."""
MANY = 2**20
"""Above so many pairs of channels, float32 has to do."""


class Program:
    """The damage of all layers and inputs, as a function of the logarithms of the scales."""

    def __init__(
        self,
        count: int,
        layers: Sequence[LayerTerm],
        inputs: Sequence[InputTerm],
        levels: int,
        input_levels: int,
        by_row: bool,
    ) -> None:
        many = sum(term.magnitude.size for term in layers) > MANY
        made = [_Block.of_layer(term, count, levels, by_row, np.float32 if many else np.float64) for term in layers]
        self.count = count
        self.layers = tuple(term.name for term in layers)
        self.inputs = tuple(term.name for term in inputs)
        self._blocks = [*made, *(_Block.of_input(term, count, input_levels) for term in inputs)]
        self._reach = 40.0 if many else 300.0
        self._near: dict[float, list[_Near]] = {}

    @property
    def is_constant(self) -> bool:
        """Whether no scale has a say."""
        return not self.matters().any()

    def matters(self) -> BoolArray:
        """Whether a scale changes how much anything matters, (count,)."""
        found = np.zeros(self.count + 1, dtype=bool)
        for block in self._blocks:
            found[block.rows[block.importance.any(axis=2)]] |= not block.by_row
            found[block.columns[block.importance.any(axis=1)]] = True
        return found[:-1]

    def log_damage(self, x: FloatArray) -> float:
        """The logarithm of the total damage."""
        found = np.concatenate([np.zeros(0), *(block.log_damages(x) for block in self._blocks)])
        return float(np.logaddexp.reduce(found)) if len(found) else -inf

    def damages(self, x: FloatArray) -> list[float]:
        """The damage by layer, then by input."""
        return [float(np.exp(block.log_damages(x)).sum()) for block in self._blocks]

    def smooth(self, x: FloatArray, power: float) -> tuple[float, FloatArray]:
        """:meth:`log_damage` with p-norms for maxima, plus the ridge; and its gradient, (count,)."""
        nears = self._near.setdefault(power, [_Near() for _ in self._blocks])
        passes = [block.evaluate(x, power, near, self._reach) for block, near in zip(self._blocks, nears, strict=True)]
        constants = [block.constant for block in self._blocks]
        logs = np.concatenate([np.array([one for one in constants if one > -inf]), *(one.logs for one in passes)])
        if not logs.size:
            return RIDGE / 2 * float(x @ x), RIDGE * x
        value = float(np.logaddexp.reduce(logs))
        slope = np.zeros(self.count + 1)
        for block, found in zip(self._blocks, passes, strict=True):
            block.add_slope(slope, found, value)
        return value + RIDGE / 2 * float(x @ x), slope[:-1] + RIDGE * x

    def forget(self) -> None:
        """Give back the memory that evaluations take."""
        self._near.clear()


class _Near:
    """The p-th powers of a block's weights at a point, relative to the largest."""

    rows: FloatArray
    columns: FloatArray
    largest: FloatArray
    powers: FloatArray | None = None

    def is_far(self, rows: FloatArray, columns: FloatArray, reach: float) -> bool:
        """Whether numbers that were too small to be kept may have become large."""
        if self.powers is None:
            return True
        moved = max(np.abs(rows - self.rows).max(initial=0), np.abs(columns - self.columns).max(initial=0))
        return bool(moved > reach)


class _Pass(NamedTuple):
    """One evaluation of a block."""

    logs: FloatArray
    """The logarithms of its terms, (terms,) in order."""
    near: _Near
    rows: FloatArray
    """p-th powers of the rows' scales relative to where the weights' powers were taken, (groups, rows)"""
    columns: FloatArray
    row_nears: FloatArray
    nears: FloatArray
    row_squares: FloatArray
    """Inverse squares of the rows' scales, (groups, rows)."""
    column_squares: FloatArray
    row_shares: FloatArray
    shares: FloatArray


class _Block(NamedTuple):
    """The weights of one layer, in groups, or what enters one."""

    rows: IntArray
    """(groups, rows) variables that are added; ``count`` for none."""
    columns: IntArray
    """(groups, columns) variables that are subtracted."""
    size: FloatArray
    """(groups, rows, columns) log A; -inf where there is nothing."""
    importance: FloatArray
    """(groups, rows, columns)"""
    offset: float
    """-log(12 qmax^2)"""
    by_row: bool
    """Whether each row has a grid of its own."""
    constant: float
    """The logarithm of what grids do that hold one number, which no scale changes."""

    @classmethod
    def of_layer(cls, term: LayerTerm, count: int, levels: int, by_row: bool, kind: type) -> _Block:
        shape = (term.groups, len(term.outputs) // term.groups, term.magnitude.shape[1])
        magnitude, importance = (
            np.asarray(one, np.float64).reshape(shape) for one in (term.magnitude, term.importance)
        )
        # zeros lie on every grid
        there = magnitude > 0
        importance = np.where(there, importance, 0.0)
        held = there.sum(axis=2, keepdims=True) if by_row else there.sum(keepdims=True)
        alone = there & (held == 1)
        offset = -log(12) - 2 * log(levels)
        with np.errstate(divide="ignore"):
            constant = float(np.log((np.square(magnitude[alone]) * importance[alone]).sum()) + offset)
            size: FloatArray = np.where(alone, -inf, np.log(magnitude)).astype(kind)
        return cls(
            np.where(term.outputs < 0, count, term.outputs).reshape(shape[:2]),
            np.where(term.inputs < 0, count, term.inputs).reshape(shape[0], shape[2]),
            size,
            np.where(alone, 0.0, importance).astype(kind),
            offset,
            by_row,
            constant,
        )

    @classmethod
    def of_input(cls, term: InputTerm, count: int, levels: int) -> _Block:
        """Rows of one number each, all on one grid."""
        layer = LayerTerm("", term.variable, np.full(1, -1), term.range[:, None], term.importance[:, None])
        block = cls.of_layer(layer, count, levels, False, np.float64)
        return block if len(term.variable) else block._replace(columns=np.full((1, 1), count))

    def log_damages(self, x: FloatArray) -> FloatArray:
        """The logarithms of the terms, with true maxima, (terms,)."""
        alone = np.array([self.constant] if self.constant > -inf else [])
        full = np.append(x, 0.0)
        rows, columns = full[self.rows], full[self.columns]
        moved = self.size + (rows[:, :, None] - columns[:, None, :]).astype(self.size.dtype)
        largest = moved.max(axis=2, initial=-inf)
        shares = np.exp(-2 * rows) * _times(self.importance, np.exp(2 * columns))
        if not self.by_row:
            largest, shares = largest.max(keepdims=True, initial=-inf), shares.sum(keepdims=True)
        used = shares > 0
        return np.append(alone, self.offset + 2 * largest[used].astype(np.float64) + np.log(shares[used]))

    def evaluate(self, x: FloatArray, power: float, near: _Near, reach: float) -> _Pass:
        """The smoothed terms, and what their slopes are made of."""
        full = np.append(x, 0.0)
        rows, columns = full[self.rows], full[self.columns]
        if near.is_far(power * rows, power * columns, reach):
            moved = self.size + (rows[:, :, None] - columns[:, None, :]).astype(self.size.dtype)
            largest = moved.max(axis=2, keepdims=True) if self.by_row else moved.max(keepdims=True, initial=-inf)
            largest = np.where(np.isfinite(largest), largest, 0)
            moved -= largest
            moved *= power
            near.rows, near.columns = power * rows, power * columns
            near.largest = largest[:, :, 0].astype(np.float64)
            near.powers = np.exp(moved, out=moved)
        assert near.powers is not None
        up, down = np.exp(power * rows - near.rows), np.exp(near.columns - power * columns)
        row_nears = up * _times(near.powers, down)
        row_squares, column_squares = np.exp(-2 * rows), np.exp(2 * columns)
        row_shares = row_squares * _times(self.importance, column_squares)
        nears, shares = (
            (row_nears, row_shares) if self.by_row else (row_nears.sum(keepdims=True), row_shares.sum(keepdims=True))
        )
        largest = np.broadcast_to(near.largest, nears.shape)
        used = shares > 0
        logs = self.offset + 2 * (largest[used] + np.log(nears[used]) / power) + np.log(shares[used])
        return _Pass(logs, near, up, down, row_nears, nears, row_squares, column_squares, row_shares, shares)

    def add_slope(self, slope: FloatArray, found: _Pass, value: float) -> None:
        """Add to the derivatives by all variables, (count + 1,), of the logarithm of the sum."""
        used = found.shares > 0
        if not used.any():
            return
        weight = np.zeros(found.shares.shape)
        weight[used] = 2 * np.exp(found.logs - value)
        by_near, by_share = (
            np.divide(weight, one, out=np.zeros_like(weight), where=used) for one in (found.nears, found.shares)
        )
        assert found.near.powers is not None
        size = len(slope)
        of_rows = by_near * found.row_nears - by_share * found.row_shares
        slope += np.bincount(self.rows.ravel(), of_rows.ravel(), size)
        of_columns = found.column_squares * _times(self.importance, by_share * found.row_squares, turned=True)
        of_columns -= found.columns * _times(found.near.powers, by_near * found.rows, turned=True)
        slope += np.bincount(self.columns.ravel(), of_columns.ravel(), size)


def _times(matrices: FloatArray, vectors: FloatArray, turned: bool = False) -> FloatArray:
    """(groups, rows, columns) times (groups, columns), or turned (groups, rows), in float64."""
    vectors = vectors.astype(matrices.dtype, copy=False)
    if len(matrices) == 1:
        product: FloatArray = (matrices[0].T @ vectors[0] if turned else matrices[0] @ vectors[0])[None]
    else:
        product = np.einsum("grc,gr->gc" if turned else "grc,gc->gr", matrices, vectors)
    return product.astype(np.float64, copy=False)
