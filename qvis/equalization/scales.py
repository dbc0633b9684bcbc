r"""The scales of cross-layer equalization with the least predicted damage.

Scaling channels by :math:`s = e^x` multiplies a layer's weight :math:`W_{oi}` by :math:`e^{x_o - x_i}` and its
importance :math:`F_{oi}`, the mean of squared derivatives by it, by :math:`e^{-2(x_o - x_i)}`. With :math:`A_{oi}` the
largest weight of a pair of channels, rounding to a symmetric grid does to first order the damage (:mod:`qvis.noise`)

.. math:: D = \frac{1}{12} \Big(\frac{\max_{oi} A_{oi}\,e^{x_o - x_i}}{2^{b-1} - 1}\Big)^2
              \sum_{oi} F_{oi}\,e^{-2(x_o - x_i)},

with both the maximum and the sum over a row alone where each channel has a grid of its own. What enters a layer, with
range :math:`r_c` and importance :math:`F_c`, does the same with :math:`e^{x_c}` and :math:`2^b - 1`. The logarithm of
each term is twice a maximum plus a log-sum-exp of linear functions of :math:`x`, thus convex, and so is that of their
sum: a geometric program (Boyd et al., A tutorial on geometric programming, Optimization and Engineering 8, 2007).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, log
from typing import NamedTuple

import numpy as np

from qvis.analysis.rounding import checked_bits
from qvis.equalization.square_root import square_root_scales
from qvis.equalization.terms import InputTerm, LayerTerm, check_terms
from qvis.errors import BadArgumentError, QvisError
from qvis.layers import BoolArray, FloatArray, IntArray

LIMIT = 2.0**10
"""No scale lies beyond this or its inverse."""
POWERS = (5, 20, 80, 300)
"""Of the norms that take the place of the maximum, which has no derivative, one after the other."""
STEPS = 30
"""Iterations of the solver with each norm."""
RIDGE = 1e-6
"""Weight of half the sum of squared x, which keeps those scales near 1 that no damage depends on."""


@dataclass(frozen=True)
class PredictedDamage:
    """What rounding is predicted to add to the squared error of a model's outputs."""

    total: float
    layers: Mapping[str, float]
    """By the weights of each layer."""
    inputs: Mapping[str, float]
    """By what enters each layer."""


@dataclass(frozen=True, eq=False)
class Scales:
    """Scales, and what they are predicted to do."""

    x: FloatArray
    """Their logarithms, (count,)."""
    before: PredictedDamage
    """With all scales 1."""
    after: PredictedDamage
    iterations: int = 0
    """Of the solver."""

    @property
    def factors(self) -> FloatArray:
        """The scales themselves, (count,); those that are powers of two are so exactly."""
        exponents = self.x / log(2)
        whole = np.rint(exponents)
        exact = np.abs(exponents - whole) < 1e-12
        return np.where(exact, np.ldexp(1.0, whole.astype(np.int32)), np.exp(self.x))


def optimal_scales(
    count: int,
    layers: Sequence[LayerTerm],
    inputs: Sequence[InputTerm],
    bits: int,
    granularity: str,
    *,
    input_bits: int | None = None,
    limit: float = LIMIT,
) -> Scales:
    """Find the scales with the least predicted damage.

    The maximum is replaced by p-norms with growing p (:data:`POWERS`), each minimized by L-BFGS-B (Byrd et al., SIAM
    J. Sci. Comput. 16:1190, 1995) from where the last one ended. The problem is convex, so that the start matters for
    the time alone: it is the better of no scaling and the square-root rule, and the result is never predicted to be
    worse than either.

    Parameters
    ----------
    count
        How many variables there are.
    layers
        The layers whose weights are rounded, in the order in which data flows through them.
    inputs
        What enters layers, if it is rounded too.
    bits
        Width of the grids of weights.
    granularity
        ``tensor`` or ``channel``: what shares a step of the weights.
    input_bits
        Width of the grids of inputs; ``bits`` if not given.
    limit
        The largest scale, and the inverse of the smallest.

    Raises
    ------
    BadArgumentError
        An argument is outside what it may be.
    QvisError
        SciPy is not installed.
    """
    if not 1 < limit < inf:
        raise BadArgumentError(f"limit: got {limit!r}, expected a finite number above 1 such as {LIMIT:g}")
    program = _Program.of(count, layers, inputs, bits, granularity, input_bits)
    none = np.zeros(count)
    rule = square_root_scales(count, layers).clip(-log(limit), log(limit))
    # channels whose scales matter to nothing stay as they are, unless the rule is better by moving them
    candidates = [none, np.where(program.matters(), rule, 0), rule]
    iterations = 0
    x = best = min(candidates, key=program.log_damage)
    if count and len(program.starts):
        for power in POWERS:
            x, steps = _minimize(program, power, x, log(limit))
            best = min(best, x, key=program.log_damage)
            iterations += steps
    return Scales(best, program.damage(none), program.damage(best), iterations)


def assess_scales(
    x: FloatArray,
    layers: Sequence[LayerTerm],
    inputs: Sequence[InputTerm],
    bits: int,
    granularity: str,
    *,
    input_bits: int | None = None,
) -> Scales:
    """Predict what scales with given logarithms (count,) do; the other arguments as in :func:`optimal_scales`."""
    program = _Program.of(len(x), layers, inputs, bits, granularity, input_bits)
    return Scales(x, program.damage(np.zeros(len(x))), program.damage(x))


def power_of_two(x: FloatArray) -> FloatArray:
    """Round scales to powers of two, by which a multiplication is exact; logarithms in and out, (count,).

    What this costs is the difference in :func:`assess_scales`.
    """
    rounded: FloatArray = np.rint(x / log(2)) * log(2)
    return rounded


def _minimize(program: _Program, power: float, start: FloatArray, bound: float) -> tuple[FloatArray, int]:
    """Where the smoothed damage is least, as far as some iterations get, and their number."""
    try:
        from scipy.optimize import Bounds, minimize
    except ImportError as error:
        raise QvisError("equalization: SciPy is not installed; run: pip install 'qvis[equalize]'") from error
    options = {"maxiter": STEPS, "maxcor": 20, "ftol": 1e-12, "gtol": 1e-9}
    bounds = Bounds(-bound, bound)
    result = minimize(program.smooth, start, (power,), "L-BFGS-B", jac=True, bounds=bounds, options=options)
    return result.x, int(result.nit)


# ---------------------------------------------------------------------------------------------------------------------
# The geometric program


class _Program(NamedTuple):
    """Terms of damage, each of consecutive pairs. A channel of an input is a pair without anything to subtract."""

    unknowns: int
    up: IntArray
    """(pairs,) the variable that is added; ``unknowns`` for none."""
    down: IntArray
    """(pairs,) the variable that is subtracted; ``unknowns`` for none."""
    size: FloatArray
    """(pairs,) log A"""
    importance: FloatArray
    """(pairs,)"""
    starts: IntArray
    """(terms,) the first pair of each."""
    lengths: IntArray
    """(terms,)"""
    constant: FloatArray
    """(terms,) -log(12 qmax^2)"""
    source: IntArray
    """(terms,) the index into the layers, followed by the inputs."""
    layers: tuple[str, ...]
    inputs: tuple[str, ...]

    @classmethod
    def of(
        cls,
        count: int,
        layers: Sequence[LayerTerm],
        inputs: Sequence[InputTerm],
        bits: int,
        granularity: str,
        input_bits: int | None,
    ) -> _Program:
        if granularity not in ("tensor", "channel"):
            raise BadArgumentError(f"granularity: got {granularity!r}, expected 'tensor' or 'channel'")
        check_terms(count, layers, inputs)
        levels = 2 ** (checked_bits(bits) - 1) - 1
        input_levels = 2 ** checked_bits(bits if input_bits is None else input_bits) - 1
        parts = []
        for term in layers:
            by_row = granularity == "channel"  # then what scales a row cancels
            up = np.full_like(term.row_variable, -1) if by_row else term.row_variable
            row = term.row if by_row else np.zeros_like(term.row)
            parts.append(_Part.of(count, up, term.column_variable, term.magnitude, term.importance, row, levels))
        for entering in inputs:
            up, none = entering.variable, np.full_like(entering.variable, -1)
            one = np.zeros_like(up)
            parts.append(_Part.of(count, up, none, entering.range, entering.importance, one, input_levels))
        source = np.repeat(np.arange(len(parts)), [len(part.lengths) for part in parts])
        joined = _Part(*map(np.concatenate, zip(_Part.none(), *parts, strict=True)))
        names = tuple(term.name for term in layers), tuple(entering.name for entering in inputs)
        starts = np.cumsum(joined.lengths) - joined.lengths
        return cls(count, *joined[:4], starts, *joined[4:], source, *names)

    def log_terms(self, x: FloatArray) -> FloatArray:
        """The logarithm of each term's damage, (terms,)."""
        if not len(self.starts):
            return np.zeros(0)
        full = np.append(x, 0.0)
        shift = full[self.up] - full[self.down]
        largest = np.maximum.reduceat(self.size + shift, self.starts)
        total = np.add.reduceat(self.importance * np.exp(-2 * shift), self.starts)
        result: FloatArray = self.constant + 2 * largest + np.log(total)
        return result

    def log_damage(self, x: FloatArray) -> float:
        """The logarithm of the total damage."""
        return float(np.logaddexp.reduce(self.log_terms(x)))

    def damage(self, x: FloatArray) -> PredictedDamage:
        """The damage, in all and by source."""
        by_source = np.bincount(self.source, np.exp(self.log_terms(x)), len(self.layers) + len(self.inputs)).tolist()
        layers, inputs = dict.fromkeys(self.layers, 0.0), dict.fromkeys(self.inputs, 0.0)
        for i, value in enumerate(by_source):
            if i < len(self.layers):
                layers[self.layers[i]] += value
            else:
                inputs[self.inputs[i - len(self.layers)]] += value
        return PredictedDamage(sum(by_source), layers, inputs)

    def matters(self) -> BoolArray:
        """Whether a scale changes how much anything matters, (count,)."""
        important = self.importance > 0
        used = np.append(self.up[important], self.down[important])
        return np.bincount(used, minlength=self.unknowns + 1)[: self.unknowns] > 0

    def smooth(self, x: FloatArray, power: float) -> tuple[float, FloatArray]:
        """:meth:`log_damage` with p-norms for maxima, plus the ridge; and its gradient, (count,)."""
        full = np.append(x, 0.0)
        shift = full[self.up] - full[self.down]
        near = self.size + shift
        largest = np.maximum.reduceat(near, self.starts)
        near -= np.repeat(largest, self.lengths)
        near *= power
        np.exp(near, out=near)
        shift *= -2
        share = np.exp(shift, out=shift)
        share *= self.importance
        nears, shares = np.add.reduceat(near, self.starts), np.add.reduceat(share, self.starts)
        terms = self.constant + 2 * (largest + np.log(nears) / power) + np.log(shares)
        value = float(np.logaddexp.reduce(terms))
        weight = 2 * np.exp(terms - value)
        near *= np.repeat(weight / nears, self.lengths)
        share *= np.repeat(weight / shares, self.lengths)
        near -= share
        size = self.unknowns + 1
        slope = (np.bincount(self.up, near, size) - np.bincount(self.down, near, size))[: self.unknowns]
        return value + RIDGE / 2 * float(x @ x), slope + RIDGE * x


class _Part(NamedTuple):
    """What one source adds to a program; see there."""

    up: IntArray
    down: IntArray
    size: FloatArray
    importance: FloatArray
    lengths: IntArray
    constant: FloatArray

    @classmethod
    def none(cls) -> _Part:
        whole, real = np.zeros(0, np.intp), np.zeros(0)
        return cls(whole, whole, real, real, whole, real)

    @classmethod
    def of(
        cls,
        count: int,
        up: IntArray,
        down: IntArray,
        magnitude: FloatArray,
        importance: FloatArray,
        grid: IntArray,
        levels: int,
    ) -> _Part:
        """Sort pairs by ``grid`` (pairs,), and leave out what does no damage whatever the scales."""
        # zeros lie on every grid
        order = np.argsort(grid, kind="stable")
        order = order[magnitude[order] > 0]
        _, term = np.unique(grid[order], return_inverse=True)
        costly = np.bincount(term, importance[order]) > 0
        order = order[costly[term]]
        _, lengths = np.unique(grid[order], return_counts=True)
        # and scaling a grid that holds one pair changes nothing
        alone = np.repeat(lengths == 1, lengths)
        up, down = (np.where(alone | (one[order] < 0), count, one[order]) for one in (up, down))
        sizes = np.log(magnitude[order].astype(np.float64))
        constant = np.full(len(lengths), -log(12) - 2 * log(levels))
        return cls(up, down, sizes, importance[order].astype(np.float64), lengths, constant)
