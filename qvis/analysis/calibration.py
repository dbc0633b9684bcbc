"""The grids that the usual methods of calibration choose for a distribution, and what each of them costs.

All of them choose where the grid ends: values beyond are clipped, and those inside are rounded the finer the nearer the
ends are. They differ in what they make small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qvis.layers import FloatArray, decibels
from qvis.noise import Histogram, span
from qvis.running import Grid

PERCENTILES = (99.9, 99.99)
CLIPS = np.geomspace(1 / 64, 1, 97)
"""Parts of the largest size that are tried: a half is reached in 16 steps."""
METHODS = {
    "min-max": "from the smallest to the largest value: nothing is clipped",
    **{f"percentile {p:g}": f"the ends leave out {100 - p:.2g} % of the values" for p in PERCENTILES},
    "MSE": "the smallest mean square error",
    "entropy": "the smallest Kullback-Leibler divergence of the rounded distribution from the exact one",
    "damage": "the smallest damage to the model's output",
}
"""Each method in words, in the order in which they are shown."""


@dataclass(frozen=True)
class Candidate:
    """A grid that a method chose."""

    method: str
    """A key of :data:`METHODS`."""
    grid: Grid
    sqnr_db: float
    """What rounding to it leaves of the values' power."""
    damage: float
    """The relative power of the output's change, by the noise model; NaN without derivatives."""


def candidates(histogram: Histogram, bits: int, samples: int, *, symmetric: bool = False) -> list[Candidate]:
    """The grid of each method for a distribution.

    Parameters
    ----------
    histogram
        Counts of the values, and the importance of errors in them.
    bits
        Width of the grids.
    samples
        How many samples the importance was summed over; 0 where there is none.
    symmetric
        Whether the grid ends as far below zero as above it, as weights have it; else it only has to hold zero.

    Notes
    -----
    The MSE and the entropy method are those of TensorRT and of Krishnamoorthi (arXiv 1806.08342, section 3.1.2;
    Migacz, 8-bit inference with TensorRT, GTC 2017), searched over 97 ends for the longer side. "damage" is the
    same search with the noise model's importance in place of equal weights.
    """
    low, high = _ends(histogram, symmetric)
    if not low < high:
        return []
    # the longer side is clipped first: of a rectified distribution with few values below zero, these stay
    beyond = [clip * max(-low, high) for clip in CLIPS]
    tried = [_grid(max(low, -end), min(high, end), bits, symmetric) for end in beyond]
    centers = (histogram.edges[:-1] + histogram.edges[1:]) / 2
    errors = np.stack([histogram.errors(grid) for grid in tried])  # (clips, bins)
    square_error = errors @ histogram.counts
    damage = errors @ histogram.importance / samples if samples else np.full(len(tried), np.nan)
    chosen = {"min-max": tried[-1]}
    for percentile in PERCENTILES:
        ends = _percentile(histogram, percentile, symmetric)
        chosen[f"percentile {percentile:g}"] = _grid(*ends, bits, symmetric)
    chosen["MSE"] = tried[int(np.argmin(square_error))]
    chosen["entropy"] = tried[int(np.argmin([_divergence(histogram.counts, centers, grid) for grid in tried]))]
    if samples:
        chosen["damage"] = tried[int(np.argmin(damage))]
    return [_candidate(histogram, method, grid, samples) for method, grid in chosen.items()]


def _candidate(histogram: Histogram, method: str, grid: Grid, samples: int) -> Candidate:
    errors = histogram.errors(grid)
    centers = (histogram.edges[:-1] + histogram.edges[1:]) / 2
    signal = float(np.square(centers) @ histogram.counts)
    damage = float(errors @ histogram.importance) / samples if samples else float("nan")
    return Candidate(method, grid, decibels(signal, float(errors @ histogram.counts)), damage)


def _ends(histogram: Histogram, symmetric: bool) -> tuple[float, float]:
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    return (-max(-low, high), max(-low, high)) if symmetric else (low, high)


def _grid(low: float, high: float, bits: int, symmetric: bool) -> Grid:
    if not symmetric:
        return span(low, high, bits)
    # from -(2^(bits-1) - 1) to as much above zero; the grid's last point stays unused
    return Grid(bits, float(high) / (2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1)


def _percentile(histogram: Histogram, percentile: float, symmetric: bool) -> tuple[float, float]:
    """The ends that hold so many percent of the values, zeros included."""
    centers = (histogram.edges[:-1] + histogram.edges[1:]) / 2
    left_out = (1 - percentile / 100) * (histogram.counts.sum() + histogram.zeros)
    if symmetric:
        order = np.argsort(-np.abs(centers))
        beyond = np.cumsum(histogram.counts[order])
        end = float(np.abs(centers[order][np.searchsorted(beyond, left_out, side="right").clip(0, centers.size - 1)]))
        return -end, end
    both = min(histogram.low, 0.0) < 0 < max(histogram.high, 0.0)
    part = left_out / 2 if both else left_out
    below, above = np.cumsum(histogram.counts), np.cumsum(histogram.counts[::-1])
    low = float(centers[np.searchsorted(below, part, side="right").clip(0, centers.size - 1)])
    high = float(centers[::-1][np.searchsorted(above, part, side="right").clip(0, centers.size - 1)])
    return min(low, 0.0), max(high, 0.0)


def _divergence(counts: FloatArray, centers: FloatArray, grid: Grid) -> float:
    """KL(P || Q): P the distribution with what is clipped added to its ends, Q the same spread evenly in each step."""
    low, high = -grid.zero * grid.step, (2**grid.bits - 1 - grid.zero) * grid.step
    inside = (centers >= low - grid.step / 2) & (centers <= high + grid.step / 2)
    if inside.sum() < 2:
        return np.inf
    first, last = np.flatnonzero(inside)[[0, -1]]
    exact = counts[first : last + 1].copy()
    codes = np.rint(centers[first : last + 1] / grid.step).astype(np.intp) + grid.zero
    codes = np.clip(codes, 0, 2**grid.bits - 1)
    filled = exact > 0
    total = np.bincount(codes, weights=exact, minlength=2**grid.bits)
    holding = np.bincount(codes, weights=filled, minlength=2**grid.bits)
    exact[0] += counts[:first].sum()
    exact[-1] += counts[last + 1 :].sum()
    spread = np.where(filled, total[codes] / np.maximum(holding[codes], 1), 0)
    if not spread.sum() or not exact.sum():
        return np.inf
    p, q = exact / exact.sum(), spread / spread.sum()
    used = p > 0
    return float((p[used] * np.log(p[used] / np.maximum(q[used], 1e-12))).sum())


def coarse(values: FloatArray, bars: int) -> FloatArray:
    """Counts of neighbouring bins added up, for a figure."""
    starts = np.linspace(0, values.size, bars, endpoint=False).astype(int)
    summed: FloatArray = np.add.reduceat(values, starts)
    return summed


def weight_histogram(weight: FloatArray, importance: FloatArray | None) -> Histogram:
    """The distribution of weights (channels, elements); importance (channels,) is spread evenly in each channel."""
    finite = np.isfinite(weight)
    values = np.where(finite, weight, 0)
    histogram = Histogram(float(values.min(initial=0)), float(values.max(initial=0)))
    derivative = None
    if importance is not None and importance.size == weight.shape[0]:
        derivative = np.broadcast_to(np.sqrt(importance / weight.shape[1])[:, None], weight.shape)
    histogram.add(values, derivative)
    return histogram


def best(found: Sequence[Candidate]) -> Candidate | None:
    """The one with the least damage, else with the least error; None of none."""
    known = [one for one in found if one.damage == one.damage]
    if known:
        return min(known, key=lambda one: one.damage)
    return max(found, key=lambda one: one.sqnr_db, default=None)
