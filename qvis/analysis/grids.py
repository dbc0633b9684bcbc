"""The records of a comparison of grids: what each would do to each layer of a model.

Every result has its size in bytes and its *error*: the damage to the output of the model where that is known, else the
share of the layer's power that rounding turns to noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite, nan

import numpy as np

from qvis.analysis.damage import Damage
from qvis.analysis.frontier import Answer, Point, beaten_by, best_first
from qvis.analysis.schemes import RUNS_ON, label_schemes
from qvis.errors import UnknownLayerError, suggest
from qvis.layers import FloatArray, IntArray, Skipped, decibels
from qvis.quantization.grids import Scheme

NOTHING = Damage()


@dataclass(frozen=True)
class GridResult:
    """One grid for one layer, or for all layers of a model."""

    scheme: Scheme
    bytes: int
    """What the codes take with all that is needed to read them; see :attr:`qvis.quantization.grids.Fitted.bytes`."""
    bits_per_weight: float
    """The same in bits for each weight."""
    noise: float
    """The part of the weights' power that rounding turns to noise; of a model the mean over layers. NaN without any."""
    damage: Damage = NOTHING
    """What it does to the output of the model; all NaN where the model was not run. Of a model, that of all layers
    rounded at once: predicted as the sum over them."""

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise of the weights, in dB: inf without noise, NaN without weights that matter."""
        return decibels(1.0, self.noise)

    @property
    def error(self) -> float:
        """The damage where it is known, else the noise."""
        return self.damage.value if self.damage.value == self.damage.value else self.noise

    @property
    def kept_db(self) -> float:
        """What :attr:`error` leaves, in dB: of the output where the damage is known, else of the weights."""
        return decibels(1.0, self.error)

    @property
    def runs_on(self) -> str:
        """What multiplies with the codes: ``integers``, ``shifts``, ``lookup`` or ``float units``."""
        return RUNS_ON[self.scheme.kind]

    @property
    def point(self) -> Point:
        """Bits for each weight and error."""
        return Point(self.bits_per_weight, self.error)


@dataclass(frozen=True)
class Shown:
    """The weights of a channel, or of the whole layer, and the grids that hold them, for a picture."""

    channel: int | None
    """None for the whole layer."""
    low: float
    high: float
    counts: IntArray
    """Weights in bins of the same width between :attr:`low` and :attr:`high`."""
    scales: FloatArray
    """Of each scheme, what its codes or its table are multiplied with, (schemes,); NaN where the weights have several
    scales. Where a channel has several groups, that of the group with its largest weight."""
    zeros: FloatArray
    """Of each scheme, the code of zero, or the lowest level of kind ``offset``; (schemes,)."""
    codebooks: Mapping[int, FloatArray] = field(default_factory=dict)
    """The levels of a codebook, by the place of its scheme."""


@dataclass(frozen=True)
class LayerGrids:
    """What each grid would do to one layer."""

    name: str
    op: str
    shape: tuple[int, ...]
    dtype: str
    channels: int
    elements: int
    """Weights in each channel."""
    results: tuple[GridResult, ...]
    """One for each scheme, in their order."""
    rows: int
    """On so many channels, evenly spaced by their largest weight, the grids were tried: of large layers not on all."""
    nonfinite: int = 0
    """Weights that are NaN or infinite, and count for nothing."""
    same_as: tuple[int, ...] = ()
    """Of each scheme the place of the first that is the very same here: groups that are longer than a channel."""
    shown: tuple[Shown, ...] = ()
    """First the whole layer, then some channels, from the smallest largest weight to the largest."""
    answers: tuple[Answer, ...] = ()
    why_no_damage: str = ""
    """Why its damage is not known; empty where it is."""
    keep_db: float = 30.0
    """How much is to be kept."""
    digest: str = ""
    """sha256 of the weight's bytes, as hexadecimal digits."""

    @property
    def weights(self) -> int:
        """How many there are."""
        return self.channels * self.elements

    @property
    def judged_by(self) -> str:
        """``damage`` or ``sqnr``."""
        return "sqnr" if self.why_no_damage else "damage"

    @cached_property
    def beaten(self) -> IntArray:
        """Of each of :attr:`results` the place of the best that beats it, -1 on the frontier."""
        return beaten_by([one.point for one in self.results])

    @property
    def frontier(self) -> list[GridResult]:
        """The results that no other beats in size and error at once, the smallest first."""
        found = [one for one, by in zip(self.results, self.beaten, strict=True) if by < 0 and isfinite(one.noise)]
        return sorted(found, key=lambda one: (one.bytes, one.error))

    def beaten_by(self, scheme: Scheme) -> GridResult | None:
        """The best of the results that are no larger and no worse than that of a scheme, if there is one."""
        by = int(self.beaten[[one.scheme for one in self.results].index(scheme)])
        return None if by < 0 else self.results[by]

    def result(self, scheme: Scheme) -> GridResult:
        """What one of the schemes does."""
        return self.results[[one.scheme for one in self.results].index(scheme)]

    @property
    def ranked(self) -> list[GridResult]:
        """Best first: those that keep as much as is asked for, the smallest first; then the rest by what they keep."""
        return [self.results[i] for i in best_first([one.point for one in self.results], self.keep_db)]

    @property
    def best(self) -> GridResult | None:
        """The smallest that keeps as much as is asked for; None where none does, or nothing is known."""
        first = self.ranked[0]
        return first if first.error <= 10 ** (-self.keep_db / 10) else None


@dataclass(frozen=True)
class GridComparison:
    """What each grid would do to a model; made by :func:`qvis.compare_grids`."""

    name: str
    framework: str
    schemes: tuple[Scheme, ...]
    layers: tuple[LayerGrids, ...]
    """In the model's own order."""
    totals: tuple[GridResult, ...]
    """Each scheme for all layers at once."""
    answers: tuple[Answer, ...]
    """Of the whole model."""
    evidence: str
    """``from the weights alone``, or ``predicted from 64 samples``."""
    keep_db: float = 30.0
    """How much each layer is to keep."""
    keep_total_db: float = 20.0
    """How much all layers together are to keep."""
    parameters: int = 0
    passes: int = 0
    """Backward passes; 0 where the model was not differentiated."""
    notes: tuple[str, ...] = ()
    """What a reader must know."""
    left_out: tuple[str, ...] = ()
    """Which grids were not tried, and why."""
    skipped: tuple[Skipped, ...] = ()
    """Tensors that were not looked at, and why."""
    fingerprint: str = ""

    @cached_property
    def labels(self) -> list[str]:
        """What each scheme is called."""
        return label_schemes(self.schemes)

    @cached_property
    def same_as(self) -> list[int]:
        """Of each scheme the place of the first that is the very same for all layers."""
        return same_everywhere(self.layers)

    @property
    def ran(self) -> bool:
        """Whether damages are known."""
        return self.evidence != "from the weights alone"

    @cached_property
    def by_name(self) -> dict[str, LayerGrids]:
        """Each layer by its name."""
        return {layer.name: layer for layer in self.layers}

    def layer(self, name: str) -> LayerGrids:
        """One layer; raises :exc:`~qvis.UnknownLayerError` for a name that it does not have."""
        if name not in self.by_name:
            raise UnknownLayerError(f"name: got {name!r}, expected a layer{suggest(name, self.by_name)}")
        return self.by_name[name]

    @property
    def ranked(self) -> list[GridResult]:
        """The whole-model results, best first; see :attr:`LayerGrids.ranked`."""
        return [self.totals[i] for i in best_first([one.point for one in self.totals], self.keep_total_db)]

    @cached_property
    def beaten(self) -> IntArray:
        """Of each of :attr:`totals` the place of the best that beats it, -1 on the frontier."""
        return beaten_by([one.point for one in self.totals])


def same_everywhere(layers: Sequence[LayerGrids]) -> list[int]:
    """Of each scheme the place of the first that is the very same for all layers."""
    first: dict[tuple[int, ...], int] = {}
    keys = zip(*(layer.same_as for layer in layers), strict=True)
    return [first.setdefault(key, place) for place, key in enumerate(keys)]


def add_up(layers: Sequence[LayerGrids], place: int, scheme: Scheme) -> GridResult:
    """One scheme for all layers: sizes and damages add up, noise is the mean of the layers'."""
    results = [layer.results[place] for layer in layers]
    weights = sum(layer.weights for layer in layers)
    size = sum(one.bytes for one in results)
    noise = [one.noise for one in results if one.noise == one.noise]
    damages = [one.damage for one in results if one.damage.predicted == one.damage.predicted]
    damage = NOTHING
    if damages:
        total = sum(one.predicted for one in damages)
        # of independent errors: the variances of the parts add up
        spread = float(np.sqrt(sum((one.predicted * min(one.spread, 10.0)) ** 2 for one in damages)))
        damage = Damage(total, spread / total if total else 0.0)
    return GridResult(
        scheme, size, 8 * size / weights if weights else nan, float(np.mean(noise)) if noise else nan, damage
    )
