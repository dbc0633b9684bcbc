"""Tries grids on the weights of one layer.

A large layer is tried on some of its channels, evenly spaced in the order of their largest weight, each of which stands
for as many. The channels with the smallest and the largest weight of all are rounded with them, so that a grid per
tensor is the one of the whole tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import nan
from typing import NamedTuple

import numpy as np

from qvis.analysis import digest_weight
from qvis.analysis.blocks import Pool
from qvis.analysis.grids import GridResult, LayerGrids, Shown
from qvis.layers import FloatArray, IntArray, Layer
from qvis.noise import COARSE
from qvis.quantization.grids import Fitted, Scheme
from qvis.words import encodable

TRIED = 2**16
"""Layers of more weights are tried on as many channels as hold about so many."""
BARS = 100
"""Of the histogram of a layer."""
CHANNEL_BARS = 40


@dataclass
class Derivatives:
    """What the backward passes told of the weights of one layer."""

    importance: FloatArray
    """The sum of squared derivatives by each weight, (channels, elements)."""
    by_pass: FloatArray
    """The same of each pass and channel, (passes, channels)."""
    rows: IntArray
    """The channels, in ascending order, whose derivatives are in :attr:`gradients`; among those that are tried."""
    gradients: FloatArray
    """Of each pass, (passes, rows, elements)."""
    samples: FloatArray
    """Of each pass."""


class Tried(NamedTuple):
    """What a scheme does to a layer."""

    noise: float
    """Relative to the power of the weights; NaN without any."""
    places: list[tuple[float, float, FloatArray | None]]
    """The scale, the zero and maybe the codebook for each part that is shown."""
    diagonal: FloatArray = np.zeros(0)
    """The damage by each pass as if errors had nothing to do with each other, (passes,); empty without passes."""
    projected: FloatArray = np.zeros(0)
    """The damage by each pass of these very errors."""
    coarse: bool = False
    """Whether most of the damage is due to channels that lose too much for a prediction of first order."""


@dataclass(frozen=True)
class Sample:
    """The channels of a layer that grids are tried on."""

    matrix: FloatArray
    """(rows, elements)"""
    rows: IntArray
    """Which channels those are that stand for all, ascending; the rest of the matrix is there for its range."""
    shown: list[tuple[int, int]]
    """The places in :attr:`matrix` of the channels that can be looked at, and where in each the largest weight is."""

    @classmethod
    def of(cls, weight: FloatArray, shown: int) -> Sample:
        """Choose them."""
        rows = spread_rows(weight, TRIED)
        finite = np.where(np.isfinite(weight), weight, 0)
        ends = [int(one) // weight.shape[1] for one in (finite.argmin(), finite.argmax())] if weight.size else []
        more = [one for one in dict.fromkeys(ends) if one not in rows]
        peaks = np.abs(finite[rows]).max(axis=1, initial=0)
        order = np.argsort(peaks, kind="stable")
        chosen = order[np.unique(np.linspace(0, len(order) - 1, min(shown, len(order))).round().astype(int))]
        places = [(int(one), int(np.abs(finite[rows[one]]).argmax())) for one in chosen] if weight.size else []
        return cls(weight[np.r_[rows, more].astype(int)] if more else weight[rows], rows, places)


def spread_rows(weight: FloatArray, numbers: int) -> IntArray:
    """Channels of about so many weights that stand for all: evenly spaced in the order of their largest weight."""
    channels, elements = weight.shape
    wanted = max(1, numbers // max(1, elements))
    if wanted >= channels:
        return np.arange(channels)
    size = np.abs(np.where(np.isfinite(weight), weight, 0)).max(axis=1, initial=0)
    middles = ((np.arange(wanted) + 0.5) * channels / wanted).astype(int)
    return np.sort(np.argsort(size, kind="stable")[middles])


def try_layer(
    layer: Layer, schemes: Sequence[Scheme], derivatives: Derivatives | None, shown: int, workers: Pool
) -> tuple[LayerGrids, list[Tried]]:
    """What each scheme does to a layer; ``shown`` is how many of its channels can be looked at."""
    weight = np.ascontiguousarray(layer.weight)
    channels, elements = weight.shape
    sample = Sample.of(weight, shown)
    first: dict[Scheme, int] = {}
    same_as = tuple(first.setdefault(_simplest(one, channels, elements), i) for i, one in enumerate(schemes))
    waiting = {i: workers.submit(lambda i=i: _try(schemes[i], sample, derivatives)) for i in sorted(set(same_as))}  # type: ignore[misc]
    done = {i: wait() for i, wait in waiting.items()}
    tried = [done[i] for i in same_as]
    results = []
    for scheme, one in zip(schemes, tried, strict=True):
        size = scheme.bytes(channels, elements)
        results.append(GridResult(scheme, size, 8 * size / weight.size if weight.size else nan, one.noise))
    found = LayerGrids(
        name=encodable(layer.name),
        op=layer.op,
        shape=layer.shape,
        dtype=layer.dtype,
        channels=channels,
        elements=elements,
        results=tuple(results),
        rows=len(sample.rows),
        nonfinite=int(weight.size - np.count_nonzero(np.isfinite(weight))),
        same_as=same_as,
        shown=_show(weight, sample, tried),
        digest=digest_weight(weight),
        why_no_damage="" if derivatives is not None else "the model was not run",
    )
    return found, tried


def _simplest(scheme: Scheme, channels: int, elements: int) -> Scheme:
    """The scheme that is the very same for a layer: a group longer than a row is the row."""
    if not isinstance(scheme.granularity, str) and scheme.granularity >= elements:
        scheme = replace(scheme, granularity="channel")
    return replace(scheme, granularity="tensor") if scheme.granularity == "channel" and channels == 1 else scheme


def _try(scheme: Scheme, sample: Sample, derivatives: Derivatives | None) -> Tried:
    counted = len(sample.rows)
    fitted = scheme.fit(sample.matrix)
    matrix = sample.matrix[:counted]
    with np.errstate(invalid="ignore", over="ignore"):
        errors = np.nan_to_num(fitted.rounded()[:counted] - matrix, nan=0.0, posinf=0.0, neginf=0.0)
    finite = np.where(np.isfinite(matrix), matrix, 0)
    # in parts of the largest weight, whose square cannot overflow
    peak = float(np.abs(finite).max(initial=0)) or 1.0
    noise, power = (np.square(one.astype(np.float64) / peak).sum(axis=1) for one in (errors, finite))
    total = float(power.sum())
    found = Tried(float(noise.sum()) / total if total else nan, _places(fitted, sample))
    if derivatives is None:
        return found
    diagonal, projected, coarse = _damage(errors, derivatives, sample.rows, noise > COARSE * power)
    return found._replace(diagonal=diagonal, projected=projected, coarse=coarse)


def _damage(
    errors: FloatArray, known: Derivatives, rows: IntArray, lost: np.ndarray
) -> tuple[FloatArray, FloatArray, bool]:
    """The two estimates of each pass, and whether what is lost is most of it; see :mod:`qvis.noise`."""
    importance = known.importance[rows]
    square = np.square(errors, dtype=np.float64)
    by_row = np.einsum("ij,ij->i", importance, square)
    # what was not tried is as sensitive to its errors as what was
    stands_for = float(known.importance.sum(dtype=np.float64)) / (float(importance.sum(dtype=np.float64)) or 1.0)
    total = float(by_row.sum()) * stands_for / known.samples.sum()
    none = np.zeros(len(known.samples))
    if not total > 0:
        return none, none, False
    diagonal = known.by_pass[:, rows] @ square.mean(axis=1) / known.samples
    diagonal = diagonal * (total / diagonal.mean()) if diagonal.mean() > 0 else none + total
    places = np.searchsorted(rows, known.rows)
    along = np.tensordot(known.gradients, errors[places].astype(np.float32), axes=2)
    projected = np.square(along, dtype=np.float64) / known.samples
    there = float(by_row[places].sum()) / known.samples.sum()
    return diagonal, projected * (total / there) if there > 0 else none, float(by_row[lost].sum()) > by_row.sum() / 2


# ---------------------------------------------------------------------------------------------------------------------
# What is shown


def _places(fitted: Fitted, sample: Sample) -> list[tuple[float, float, FloatArray | None]]:
    """The grids of the whole layer, if there is one for it, and of each channel that is shown."""
    scales, zeros, kind = fitted.scale, fitted.zero_point, fitted.scheme.kind
    if not scales.size or not sample.matrix.size:
        return [(nan, nan, None)]
    found: list[tuple[float, float, FloatArray | None]] = [(nan, nan, None)]
    size = fitted.scheme.granularity if not isinstance(fitted.scheme.granularity, str) else sample.matrix.shape[1]
    whole = fitted.scheme.granularity == "tensor"
    for row, place in ([(0, 0)] if whole else []) + sample.shown:
        at = (0, 0) if whole else (row, place // min(int(size), sample.matrix.shape[1]))
        found.append((float(scales[at]), float(zeros[at]), fitted.levels(*at) if kind == "kmeans" else None))
    return found[1:] if whole else found


def _show(weight: FloatArray, sample: Sample, tried: Sequence[Tried]) -> tuple[Shown, ...]:
    found = []
    parts = [(None, weight), *((int(sample.rows[row]), sample.matrix[row]) for row, _ in sample.shown)]
    for at, (channel, numbers) in enumerate(parts):
        numbers = numbers[np.isfinite(numbers)].astype(np.float64)
        low, high = (float(numbers.min()), float(numbers.max())) if numbers.size else (0.0, 0.0)
        bars = BARS if channel is None else CHANNEL_BARS
        if low < high:
            places = np.minimum(((numbers - low) / (high - low) * bars).astype(np.intp), bars - 1)
        else:
            places = np.zeros(numbers.size, dtype=np.intp)
        places_of = [one.places[at] for one in tried]
        found.append(
            Shown(
                channel,
                low,
                high,
                np.bincount(places, minlength=bars),
                np.array([one[0] for one in places_of]),
                np.array([one[1] for one in places_of]),
                {i: one[2] for i, one in enumerate(places_of) if one[2] is not None},
            )
        )
    return tuple(found)
