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

import numpy as np

from qvis.analysis.rounding import checked_bits
from qvis.equalization.program import Program
from qvis.equalization.square_root import square_root_scales
from qvis.equalization.terms import InputTerm, LayerTerm, check_terms
from qvis.errors import BadArgumentError, QvisError
from qvis.layers import FloatArray
from qvis.noise import Granularity

LIMIT = 2.0**10
"""No scale lies beyond this or its inverse."""
POWERS = (5, 20, 80, 300)
"""Of the norms that take the place of the maximum, which has no derivative, one after the other."""
STEPS = 30
"""Iterations of the solver with each norm."""


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
    granularity: Granularity,
    *,
    input_bits: int | None = None,
    limit: float = LIMIT,
    start: FloatArray | None = None,
) -> Scales:
    """Find the scales with the least predicted damage.

    The maximum is replaced by p-norms with growing p (:data:`POWERS`), each minimized by L-BFGS-B (Byrd et al., SIAM
    J. Sci. Comput. 16:1190, 1995) from where the last one ended. The problem is convex, so that the start matters for
    the time alone: it is the better of no scaling and ``start``, and the result is never predicted to be worse than
    either.

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
    start
        Logarithms of scales to begin with, (count,); those of the square-root rule if not given.

    Raises
    ------
    BadArgumentError
        An argument is outside what it may be.
    QvisError
        SciPy or threadpoolctl is not installed.
    """
    if not 1 < limit < inf:
        raise BadArgumentError(f"limit: got {limit!r}, expected a finite number above 1 such as {LIMIT:g}")
    program = formulate(count, layers, inputs, bits, granularity, input_bits)
    none = np.zeros(count)
    rule = square_root_scales(count, layers, sweeps=1) if start is None else start
    rule = rule.clip(-log(limit), log(limit))
    # channels whose scales matter to nothing stay as they are, unless the rule is better by moving them
    candidates = [none, np.where(program.matters(), rule, 0), rule]
    iterations = 0
    x = best = min(candidates, key=program.log_damage)
    for power in () if program.is_constant else POWERS:
        x, steps = _minimize(program, power, x, log(limit))
        program.forget()
        best = min(best, x, key=program.log_damage)
        iterations += steps
    return Scales(best, _predict(program, none), _predict(program, best), iterations)


def assess_scales(
    x: FloatArray,
    layers: Sequence[LayerTerm],
    inputs: Sequence[InputTerm],
    bits: int,
    granularity: Granularity,
    *,
    input_bits: int | None = None,
) -> Scales:
    """Predict what scales with given logarithms (count,) do; the other arguments as in :func:`optimal_scales`."""
    program = formulate(len(x), layers, inputs, bits, granularity, input_bits)
    return Scales(x, _predict(program, np.zeros(len(x))), _predict(program, x))


def formulate(
    count: int,
    layers: Sequence[LayerTerm],
    inputs: Sequence[InputTerm],
    bits: int,
    granularity: Granularity,
    input_bits: int | None = None,
) -> Program:
    """The geometric program; the arguments are those of :func:`optimal_scales`."""
    if granularity not in ("tensor", "channel"):
        raise BadArgumentError(f"granularity: got {granularity!r}, expected 'tensor' or 'channel'")
    check_terms(count, layers, inputs)
    levels = 2 ** (checked_bits(bits) - 1) - 1
    input_levels = 2 ** checked_bits(bits if input_bits is None else input_bits) - 1
    return Program(count, layers, inputs, levels, input_levels, granularity == "channel")


def _predict(program: Program, x: FloatArray) -> PredictedDamage:
    damages = program.damages(x)
    found: tuple[dict[str, float], dict[str, float]] = {}, {}
    names = [(0, name) for name in program.layers] + [(1, name) for name in program.inputs]
    for (which, name), damage in zip(names, damages, strict=True):
        found[which][name] = found[which].get(name, 0.0) + damage
    return PredictedDamage(sum(damages), *found)


def power_of_two(x: FloatArray) -> FloatArray:
    """Round scales to powers of two, by which a multiplication is exact; logarithms in and out, (count,).

    What this costs is the difference in :func:`assess_scales`.
    """
    rounded: FloatArray = np.rint(x / log(2)) * log(2)
    return rounded


def _minimize(program: Program, power: float, start: FloatArray, bound: float) -> tuple[FloatArray, int]:
    """Where the smoothed damage is least, as far as some iterations get, and their number."""
    try:
        from scipy.optimize import Bounds, minimize
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        missing = "SciPy" if "scipy" in str(error) else "threadpoolctl"
        raise QvisError(f"equalization: {missing} is not installed; run: pip install 'qvis[equalize]'") from error
    options = {"maxiter": STEPS, "maxcor": 20, "ftol": 1e-12, "gtol": 1e-9}
    bounds = Bounds(-bound, bound)
    # so many small products are quicker on one thread than on several that wait for each other
    with threadpool_limits(1, user_api="blas"):
        result = minimize(program.smooth, start, (power,), "L-BFGS-B", jac=True, bounds=bounds, options=options)
    return result.x, int(result.nit)
