r"""The noise model: what rounding a layer's weights or inputs brings to a model's output, from a few backward passes.

Rounding moves the weights of a layer by some :math:`\Delta w`. To first order the outputs :math:`f` then move by
:math:`J \Delta w`, and with random numbers :math:`v \sim N(0, I)` and :math:`g = \partial (v \cdot f) / \partial w` it
is :math:`E\,(g \cdot \Delta w)^2 = \lVert J \Delta w \rVert^2`. Two estimates of this come from the same gradients:

*diagonal*
    :math:`\sum_w E\,g_w^2\,\Delta w^2`, as if the errors of different weights had nothing to do with each other. It
    varies little from pass to pass. The score is that of FIT (Zandonati et al., arXiv 2210.08502, section 3), and of
    the empirical Fisher information in general.
*projected*
    :math:`E\,(g \cdot \Delta w)^2` itself, which knows how the errors of this very rounding add up or cancel, but
    needs many passes to be exact.

The damage that is reported lies between them, by how far each can be trusted: see :func:`combine`.

The gradient of a whole batch serves as well as that of a sample. With independent numbers for each sample the mixed
terms have mean zero, so that its square has the mean of the sum over samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from qvis.layers import FloatArray, IntArray
from qvis.running import Grid

BINS = 2048
"""Of the histograms of what enters a layer: eight for each step of an 8-bit grid."""
SAMPLED = 200_000
"""So many numbers of what enters a layer are looked at in one pass, evenly spaced."""
COARSE = 0.25
"""A channel that loses this part of its power is changed too much for a prediction of first order."""
CACHE_BYTES = 2**29
"""Rounding errors are kept from pass to pass up to this size, and computed anew beyond it."""


Granularity = str | int
"""What shares a step: the ``tensor``, each ``channel`` (a row), or so many neighbours within a row."""


class WeightGrid(NamedTuple):
    """A symmetric signed grid for the weights of a layer."""

    bits: int
    granularity: Granularity


def round_weight(weight: FloatArray, grid: WeightGrid, stretch: float = 1.0) -> FloatArray:
    """``weight (channels, elements)`` rounded to nearest on a grid whose step is max|w| / (2^(bits-1) - 1).

    The maximum is over what shares a step (Krishnamoorthi, arXiv 1806.08342, section 2.1, narrow range).
    Weights that are not finite stay as they are. ``stretch`` makes the step larger, for another draw of the rounding.
    """
    return _round(weight, weight_step(weight, grid, stretch))


def weight_step(weight: FloatArray, grid: WeightGrid, stretch: float = 1.0) -> FloatArray:
    """The step of a grid: a number, (channels, 1), or (channels, elements); 0 where all that share it are zero."""
    size = np.abs(np.where(np.isfinite(weight), weight, 0))
    if grid.granularity == "tensor":
        largest: Any = size.max(initial=0)
    elif grid.granularity == "channel":
        largest = size.max(axis=1, keepdims=True, initial=0)
    else:
        starts = np.arange(0, size.shape[1], int(grid.granularity))
        lengths = np.diff([*starts, size.shape[1]])
        largest = np.repeat(np.maximum.reduceat(size, starts, axis=1), lengths, axis=1) if size.size else size
    return np.asarray(stretch * largest / (2 ** (grid.bits - 1) - 1), dtype=weight.dtype)


def _round(weight: FloatArray, step: FloatArray) -> FloatArray:
    with np.errstate(divide="ignore", invalid="ignore"):
        rounded = np.rint(weight / step) * step
    result: FloatArray = np.where((step > 0) & np.isfinite(rounded), rounded, weight)
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Weights


@dataclass
class WeightNoise:
    """What the passes tell of one layer's weights."""

    weight: FloatArray
    """(channels, elements)"""
    grids: Sequence[WeightGrid]
    keep: bool = True
    """Whether rounding errors are kept from pass to pass."""
    each: FloatArray | None = None
    """The sum of squared derivatives by each weight over all passes, (channels, elements), where it is wanted."""
    importance: list[FloatArray] = field(default_factory=list)
    """Of each pass, the sum of squared derivatives, (channels,)."""
    projected: list[FloatArray] = field(default_factory=list)
    """Of each pass, the squared derivative along each grid's rounding error, (grids,)."""
    samples: list[int] = field(default_factory=list)
    """Of each pass, its samples."""
    _errors: FloatArray | None = None
    _noise: FloatArray | None = None
    _steps: list[FloatArray] = field(default_factory=list)

    def add(self, gradient: FloatArray, samples: int) -> None:
        """Take in the gradient (channels, elements) of one pass."""
        gradient = np.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)
        self.importance.append(np.einsum("ij,ij->i", gradient, gradient, dtype=np.float64))
        if self.each is not None:
            self.each += np.square(gradient)
        # of a table of embeddings only the rows that were looked up have a derivative
        rows = slice(None) if self.keep else np.flatnonzero(gradient.any(axis=1))
        along = np.tensordot(self.errors(rows), gradient[rows], axes=2)
        self.projected.append(np.square(along, dtype=np.float64))
        self.samples.append(samples)

    def errors(self, rows: slice | IntArray = slice(None)) -> FloatArray:
        """The rounding errors of all channels or some, (grids, channels, elements)."""
        if self._errors is not None:
            return self._errors[:, rows]
        self._steps = self._steps or [weight_step(self.weight, grid) for grid in self.grids]
        weight = self.weight[rows]
        rounded = [_round(weight, step[rows] if step.ndim else step) for step in self._steps]
        errors = np.stack([one - weight for one in rounded])
        errors = np.nan_to_num(errors.astype(np.float32, copy=False), nan=0.0, posinf=0.0, neginf=0.0)
        if self.keep and len(weight) == len(self.weight):
            self._errors = errors
        return errors

    def noise(self) -> FloatArray:
        """The power of the rounding errors of each channel, (grids, channels)."""
        if self._noise is None:
            self._noise = np.square(self.errors(), dtype=np.float64).sum(axis=2)
        return self._noise

    def by_channel(self) -> FloatArray:
        """The mean over samples of the sum of squared derivatives, (channels,)."""
        mean: FloatArray = np.sum(self.importance, axis=0) / max(1, sum(self.samples))
        return mean

    def coarse(self) -> FloatArray:
        """How much of the diagonal estimate is due to channels that lose a quarter of their power, (grids,).

        To first order only small changes are known; what a channel does that is rounded to next to nothing is not.
        """
        noise = self.noise()
        power = np.nan_to_num(np.square(self.weight, dtype=np.float64)).sum(axis=1)
        damage = noise * np.sum(self.importance, axis=0)
        lost = np.where(noise > COARSE * power, damage, 0).sum(axis=1)
        share: FloatArray = lost / np.maximum(damage.sum(axis=1), np.finfo(float).tiny)
        return share

    def estimates(self) -> tuple[FloatArray, FloatArray]:
        """The diagonal and the projected estimate of each pass for one sample, both (passes, grids)."""
        mean_square = self.noise() / max(1, self.weight.shape[1])
        samples = np.asarray(self.samples, dtype=np.float64)[:, None]
        return np.stack(self.importance) @ mean_square.T / samples, np.stack(self.projected) / samples


class Estimate(NamedTuple):
    """Damage of some layers (first axis) on some grids (second), and how sure it is."""

    damage: FloatArray
    spread: FloatArray
    """Standard error of log(damage): 0.1 is about 10 %."""


def combine(diagonal: FloatArray, projected: FloatArray) -> Estimate:
    """Weigh the two estimates of each layer against each other.

    Both are (layers, passes, grids). The projected estimate is right in the mean but varies; the diagonal one is
    steady but off by what the errors of single weights have to do with each other. How far off is learned from all
    layers together, grid by grid: the mean square of log(projected / diagonal), less what the variation of the
    passes explains. The logarithms are then averaged with the inverse of these variances as weights, as in
    empirical Bayes estimation (Efron and Morris, JASA 70:311, 1975).

    Returns
    -------
    Estimate
        Arrays (layers, grids).
    """
    passes = diagonal.shape[1]
    steady, varying = diagonal.mean(axis=1), projected.mean(axis=1)
    usable = (steady > 0) & (varying > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        error_steady = _relative_variance(diagonal, steady)
        error_varying = np.maximum(_relative_variance(projected, varying), 1 / passes)
        ratio = np.where(usable, np.log(varying) - np.log(steady), 0.0)
        layers = np.maximum(usable.sum(axis=0), 1)
        off = (np.where(usable, ratio**2 - error_varying - error_steady, 0.0)).sum(axis=0) / layers
        off = np.maximum(off, 0.05)  # never taken for exact
        trust = off / (off + error_varying)
        damage = np.where(usable, np.exp(np.log(steady) + trust * ratio), steady)
        spread = np.sqrt((1 - trust) ** 2 * (off + error_steady) + trust**2 * error_varying)
    return Estimate(damage, np.where(usable, spread, np.where(steady > 0, np.inf, 0.0)))


def _relative_variance(passes: FloatArray, mean: FloatArray) -> FloatArray:
    """The variance of the logarithm of a mean over passes (axis 1)."""
    count = passes.shape[1]
    if count < 2:
        return np.full(mean.shape, 2.0)  # of the square of one normal number
    relative = passes / np.where(mean > 0, mean, 1)[:, None]
    variance: FloatArray = relative.var(axis=1, ddof=1) / count
    return np.where(mean > 0, variance, 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# What enters a layer


@dataclass
class Histogram:
    """How often values occur in what enters a layer, and how much an error in them matters.

    Zeros, of which a rectifier leaves many, are counted apart: every grid holds them exactly.
    """

    low: float
    high: float
    counts: FloatArray = field(default_factory=lambda: np.zeros(BINS))
    importance: FloatArray = field(default_factory=lambda: np.zeros(BINS))
    """The sum of squared derivatives by the values in each bin."""
    zeros: float = 0.0

    def add(self, values: FloatArray, gradient: FloatArray | None, scale: float = 1.0) -> None:
        """Take in values, with the derivative by each; ``scale`` is how many each of them stands for."""
        values = values.reshape(-1)
        used = (values != 0) & np.isfinite(values)
        self.zeros += scale * float(values.size - np.count_nonzero(values))
        values = values[used]
        width = (self.high - self.low) or 1.0
        bins = np.clip((values - self.low) * (BINS / width), 0, BINS - 1).astype(np.intp)
        self.counts += scale * np.bincount(bins, minlength=BINS)
        if gradient is not None:
            square = np.square(gradient.reshape(-1)[used], dtype=np.float64)
            self.importance += scale * np.bincount(bins, weights=np.nan_to_num(square), minlength=BINS)

    @property
    def edges(self) -> FloatArray:
        """(bins + 1,)"""
        return np.linspace(self.low, self.high, BINS + 1)

    def errors(self, grid: Grid) -> FloatArray:
        """The mean square error of rounding the values in each bin, (bins,), if they are spread evenly in it."""
        width = (self.high - self.low) / BINS
        if not width > 0:
            value = np.array([self.low])
            return np.full(BINS, np.square(value - round_input(value, grid))[0])
        # The integral of (x - rounded x)^2: a step holds step^3 / 12, and beyond the ends it goes on as a cube.
        inside = np.clip(self.edges, *grid.ends)
        steps = inside / grid.step
        whole = np.rint(steps)
        integral = grid.step**3 * (whole / 12 + (steps - whole) ** 3 / 3) + (self.edges - inside) ** 3 / 3
        errors: FloatArray = np.maximum(np.diff(integral) / width, 0)
        return errors


def evenly(values: FloatArray, most: int = SAMPLED) -> tuple[slice, float]:
    """Which of the flattened values to look at, and how many each of them stands for."""
    # an odd stride, since sizes of images and channels are even: it must not hit the same channel each time
    stride = max(1, -(-values.size // most)) | 1
    return slice(None, None, stride), values.size / len(range(0, values.size, stride)) if values.size else 1.0


def span(low: float, high: float, bits: int) -> Grid:
    """The asymmetric grid from ``low`` to ``high``, stretched so that it holds zero exactly (arXiv 1712.05877, 2.1)."""
    low, high = float(min(low, 0.0)), float(max(high, 0.0))
    step = (high - low) / (2**bits - 1)
    return Grid(bits, step or 1.0, int(np.rint(-low / step)) if step else 0)


def round_input(values: FloatArray, grid: Grid) -> FloatArray:
    """Values rounded to the points of a grid, those beyond its ends to the end."""
    step = values.dtype.type(grid.step)
    codes: FloatArray = np.rint(values / step)
    np.clip(codes, -grid.zero, 2**grid.bits - 1 - grid.zero, out=codes)
    codes *= step
    return codes
