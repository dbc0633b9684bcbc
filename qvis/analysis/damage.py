"""The records that say how much the output of a model suffers when one of its layers is quantized.

A *damage* is the power of the output's change relative to the power of the output: 0.01 is 1 %, which leaves 20 dB.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite, log, nan
from typing import NamedTuple

import numpy as np

from qvis.errors import BadArgumentError
from qvis.layers import FloatArray, Network, Skipped, decibels
from qvis.noise import Granularity, Histogram, span
from qvis.running import Grid

WHAT = ("weights", "inputs")
UNRELIABLE = 0.3
"""From here on (5 dB) a prediction is off: it is of first order, and errors this large are not small any more."""

Key = tuple[int, Granularity]
"""Bits and granularity."""


@dataclass(frozen=True)
class Damage:
    """The damage of one change to one layer."""

    predicted: float = nan
    """By the noise model; NaN where nothing could be differentiated."""
    spread: float = nan
    """How sure that is: the standard error of its logarithm, so that 0.1 is about 10 %."""
    measured: float = nan
    """By making this change alone; NaN where it was not measured."""

    @property
    def value(self) -> float:
        """The best figure there is."""
        return self.predicted if self.measured != self.measured else self.measured

    @property
    def confidence(self) -> str:
        """``measured``, ``high`` (within 1.5 times, two times in three), ``fair`` (within 2.5 times), or ``low``."""
        if self.measured == self.measured:
            return "measured"
        if not self.predicted < UNRELIABLE:
            return "low"
        return "high" if self.spread <= log(1.5) else "fair" if self.spread <= log(2.5) else "low"


class Draws(NamedTuple):
    """A damage measured by several draws of the rounding."""

    mean: float
    spread_db: float
    """Standard deviation of the draws in dB; they differ in their samples as well."""


class Gain(NamedTuple):
    """How many dB of the output more one way to round keeps than another, the mean over draws of the rounding."""

    db: float
    error: float
    """The standard error of it."""

    @property
    def is_clear(self) -> bool:
        """Whether it is more than chance might bring, either way."""
        return abs(self.db) > 2 * self.error

    @property
    def is_real(self) -> bool:
        """Whether it is a gain, and not by chance."""
        return self.is_clear and self.db > 0

    @classmethod
    def of(cls, before: FloatArray, after: FloatArray) -> Gain:
        """Of the damages in the same draws, (draws,)."""
        tiny = np.finfo(float).tiny
        gains = 10 * (np.log10(np.maximum(before, tiny)) - np.log10(np.maximum(after, tiny)))
        return cls(float(gains.mean()), float(gains.std(ddof=1) / np.sqrt(len(gains))))


@dataclass(frozen=True)
class InputStatistics:
    """What enters a layer. Arrays are of one value for each input channel."""

    low: FloatArray
    high: FloatArray
    mean: FloatArray
    importance: FloatArray
    """The sum of squared derivatives of the output for one sample."""
    histogram: Histogram
    """Of all channels."""

    def grid(self, bits: int) -> Grid:
        """The asymmetric grid from the smallest to the largest value."""
        return span(self.histogram.low, self.histogram.high, bits)


@dataclass(frozen=True)
class LayerSensitivity:
    """What quantizing one layer brings to the output of the model."""

    name: str
    op: str
    weights: Mapping[Key, Damage]
    """Of rounding the weights."""
    inputs: Mapping[int, Damage]
    """Of rounding what enters the layer, on one grid per tensor, by bits; empty where nothing enters, as in tables."""
    without: Mapping[Key, float]
    """Measured damage of rounding the weights of all layers but this one; empty where it was not measured."""
    importance: FloatArray
    """The sum of squared derivatives of the output by each channel's weights for one sample, (channels,)."""
    weight_histogram: Histogram
    """Of the weights; the importance of a channel is spread evenly over its weights."""
    entering: InputStatistics | None
    operations: int
    """Multiplications for one sample."""
    output_sqnr: Mapping[Granularity, float]
    """dB that the layer's own output keeps with its weights rounded to the first of the widths, by granularity."""

    def damage(self, bits: int, granularity: Granularity = "tensor", what: str = "weights") -> Damage:
        """The damage of rounding the weights, or of rounding what enters; all NaN where there is none."""
        return self.weights.get((bits, granularity), Damage()) if what == "weights" else self.inputs.get(bits, Damage())


@dataclass(frozen=True)
class Sensitivity:
    """The finding about a whole model; made by :func:`qvis.sensitivity`."""

    name: str
    framework: str
    layers: tuple[LayerSensitivity, ...]
    """In the model's own order."""
    bits: tuple[int, ...]
    granularities: tuple[str, ...]
    evidence: str
    """``predicted from 32 samples`` or ``measured on 32 samples``, or the same of ``made-up inputs``."""
    samples: int
    passes: int
    """Backward passes; 0 where nothing could be differentiated."""
    differentiated: int
    """Samples in all of them, each counted as often as it was in one."""
    settled: bool
    """Whether passes were saved because the ranking of the layers had settled."""
    agreement: float
    """Spearman's rank correlation of two halves of the passes, stepped up to the whole (Spearman and Brown)."""
    total: Mapping[Key, Draws]
    """Damage of the weights of all layers rounded at once, measured; the mean over draws of the rounding."""
    total_inputs: Mapping[int, Draws]
    """Damage of what enters all layers rounded at once, measured likewise."""
    total_both: Mapping[Key, Draws]
    """Damage of both at once, measured likewise."""
    notes: tuple[str, ...] = ()
    """What a reader must know, such as outputs that were left out."""
    loss: bool = False
    """Whether damages are of a loss, not of the outputs."""
    skipped: tuple[Skipped, ...] = ()
    """Layers of which nothing can be said, and why."""
    network: Network | None = field(default=None, repr=False, compare=False)
    """The layers as they were judged, with normalizations folded in."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Why a normalization was not folded, by its name."""

    @cached_property
    def by_name(self) -> dict[str, LayerSensitivity]:
        """Each layer by its name."""
        return {layer.name: layer for layer in self.layers}

    @property
    def measured(self) -> str:
        """What a figure rests on that was measured: ``measured on 32 samples``."""
        return self.evidence.replace("predicted from", "measured on")

    @property
    def what(self) -> str:
        """What damages are of: ``output`` or ``loss``."""
        return "loss" if self.loss else "output"

    def damage(self, bits: int = 8, granularity: Granularity = "tensor", what: str = "weights") -> dict[str, float]:
        """The damage of each layer, by name: measured where it was, else predicted.

        Parameters
        ----------
        bits
            One of :attr:`bits`.
        granularity
            One of :attr:`granularities`; of no account for inputs, which have one grid per tensor.
        what
            ``"weights"``, or ``"inputs"`` for what enters the layers; layers that nothing enters are not among those.

        Raises
        ------
        BadArgumentError
            That was not looked at.
        """
        return {layer.name: found.value for layer, found in self._figures(bits, granularity, what)}

    def spread(self, bits: int = 8, granularity: Granularity = "tensor", what: str = "weights") -> dict[str, float]:
        """How sure each predicted damage is: the standard error of its logarithm; 0.1 is about 10 %."""
        return {layer.name: found.spread for layer, found in self._figures(bits, granularity, what)}

    def predicted_total(self, bits: int = 8, granularity: Granularity = "tensor", what: str = "weights") -> float:
        """The sum over layers, which is the damage of all of them to first order."""
        values = [found.predicted for _, found in self._figures(bits, granularity, what)]
        return float(np.nansum(values)) if any(map(isfinite, values)) else nan

    def ranked(
        self, bits: int = 8, granularity: Granularity = "tensor", what: str = "weights"
    ) -> list[LayerSensitivity]:
        """The layers, the most damaging first."""
        found = self._figures(bits, granularity, what)
        return [layer for layer, _ in sorted(found, key=lambda one: -np.nan_to_num(one[1].value, nan=-1.0))]

    def _figures(self, bits: int, granularity: Granularity, what: str) -> list[tuple[LayerSensitivity, Damage]]:
        for argument, value, known in (
            ("bits", bits, self.bits),
            ("granularity", granularity, self.granularities),
            ("what", what, WHAT),
        ):
            if value not in known:
                raise BadArgumentError(f"{argument}: got {value!r}, expected one of {', '.join(map(repr, known))}")
        layers = self.layers if what == "weights" else [layer for layer in self.layers if layer.inputs]
        return [(layer, layer.damage(bits, granularity, what)) for layer in layers]

    def __repr__(self) -> str:
        bits, granularity = self.bits[0], self.granularities[0]
        worst = self.ranked(bits, granularity)[0]
        kept = decibels(1.0, worst.damage(bits, granularity).value)
        return (
            f"<sensitivity of {self.name}, {self.evidence}: {len(self.layers)} layers, int{bits} hurts"
            f" {worst.name!r} most ({kept:.1f} dB)>"
        )
