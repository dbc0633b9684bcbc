"""Mixes widths: the best ones for a limit, what they are predicted to cost, and what they cost when it is tried."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import log

import numpy as np

from qvis.analysis.assignment import Frontier, choose
from qvis.analysis.damage import Gain
from qvis.analysis.study import Change, Study, average
from qvis.analysis.widths import LayerWidths, Mix, stored_bytes
from qvis.errors import BadArgumentError
from qvis.layers import FloatArray, IntArray
from qvis.noise import Granularity, WeightGrid

FAR = 1e9
"""Times the damage of an option that is not to be taken."""


class Mixer:
    """The options of all layers, and mixes of them.

    Damages add up to first order only, and what a prediction leaves out is much the same for all mixes: so predictions
    are corrected by what was measured of some, first with one width for all layers; see :meth:`learn`.
    """

    def __init__(
        self, study: Study, layers: Sequence[LayerWidths], granularities: Sequence[Granularity], seed: int = 0
    ) -> None:
        self.study = study
        self.layers = layers
        self.granularities = tuple(granularities)
        self.first = self.granularities[0]
        self.options = [[one for one in layer.options if one.grid.granularity in granularities] for layer in layers]
        self.damages: list[FloatArray] = [np.array([one.damage for one in own]) for own in self.options]
        self.bytes: list[FloatArray] = [np.array([one.bytes for one in own], dtype=np.float64) for own in self.options]
        self.weights = sum(layer.weights for layer in layers)
        self.uniform: tuple[Mix, ...] = ()
        """One width for all layers, measured, from the narrowest to the widest."""
        self._draws = study.draws(seed)
        self._measured: dict[tuple[WeightGrid, ...], FloatArray] = {}
        self._known: tuple[FloatArray, FloatArray] = (np.zeros(0), np.zeros(0))

    # -- mixes --------------------------------------------------------------------------------------------------------

    def mix(self, chosen: IntArray) -> Mix:
        """The options at these places, (layers,)."""
        picked = [own[at] for own, at in zip(self.options, chosen, strict=True)]
        made = self._made([one.grid for one in picked])
        return replace(made, predicted=self._correct(sum(one.damage for one in picked)))

    def _made(self, grids: Sequence[WeightGrid]) -> Mix:
        pairs = list(zip(self.layers, grids, strict=True))
        codes = sum(layer.weights * grid.bits for layer, grid in pairs)
        sizes = sum(stored_bytes(layer.channels, layer.elements, grid) for layer, grid in pairs)
        return Mix({layer.name: grid for layer, grid in pairs}, sizes, codes / self.weights)

    def measure_uniform(self, widths: Sequence[int]) -> None:
        """Try one width for all layers, and learn from it how far predictions are off."""
        made = [self._made([WeightGrid(width, self.first)] * len(self.layers)) for width in sorted(widths)]
        self.uniform = tuple(self.learn(self.measure(made)))

    def learn(self, measured: Sequence[Mix]) -> list[Mix]:
        """Correct predictions by these mixes from now on; the same with what is predicted of them then."""
        sums = [self._raw(mix) for mix in measured]
        means = [0.0 if mix.measured is None else mix.measured.mean for mix in measured]
        known = sorted((log(a), log(b)) for a, b in zip(sums, means, strict=True) if a > 0 and b > 0)
        if known:
            a, b = np.array(known).T
            self._known = a, np.maximum.accumulate(b)
        return self.predict(measured)

    def predict(self, mixes: Sequence[Mix]) -> list[Mix]:
        """The mixes with their damage predicted anew, where all their grids were looked at."""
        sums = map(self._raw, mixes)
        return [replace(mix, predicted=self._correct(a)) if a else mix for mix, a in zip(mixes, sums, strict=True)]

    def _raw(self, mix: Mix) -> float:
        """The damage of a mix as the sum over layers; 0 where it was not predicted."""
        found = 0.0
        for layer in self.layers:
            option = next((one for one in layer.options if one.grid == mix.grids[layer.name]), None)
            if option is None:
                return 0.0
            found += option.damage
        return found

    def _correct(self, raw: float) -> float:
        """What a predicted sum means, by what such sums meant with one width for all."""
        sums, means = self._known
        if not sums.size or not raw > 0:
            return raw
        at = np.log(raw)
        # beyond the ends the nearest of them is off by as much
        return float(np.exp(np.interp(at, sums, means) + at - np.clip(at, sums[0], sums[-1])))

    def _uncorrect(self, damage: float) -> float:
        """The predicted sum that means this damage."""
        sums, means = self._known
        if not sums.size:
            return damage
        at = np.log(damage)
        return float(np.exp(np.interp(at, means, sums) + at - np.clip(at, means[0], means[-1])))

    # -- the best -----------------------------------------------------------------------------------------------------

    def frontier(self, most: int) -> list[Mix]:
        """The best mixes of all sizes, from the smallest to the largest; so many at most, evenly spread over sizes."""
        found = Frontier(self.damages, self.bytes)
        ends = np.linspace(found.weights[0], found.weights[-1], most)
        corners = sorted({int(np.abs(found.weights - end).argmin()) for end in ends})
        return [self.mix(found.at(corner)) for corner in corners]

    def within_bits(self, average: float, damages: Sequence[FloatArray] | None = None) -> Mix:
        """The least damage with so many bits for each weight, and the scales that one width for all would take."""
        bits = [
            np.array([layer.stored_bits(one.grid) for one in own], dtype=np.float64)
            for layer, own in zip(self.layers, self.options, strict=True)
        ]
        scales = sum(layer.stored_bits(WeightGrid(0, self.first)) for layer in self.layers)
        least = min(one.grid.bits for own in self.options for one in own)
        if average < least:
            raise BadArgumentError(f"average_bits: got {average:g}, expected at least {least}, the least of bits")
        return self.mix(choose(damages or self.damages, bits, average * self.weights + scales))

    def within_bytes(self, most: float, damages: Sequence[FloatArray] | None = None) -> Mix:
        """The least damage with so many bytes."""
        return self.mix(choose(damages or self.damages, self.bytes, most))

    def within_damage(self, most: float) -> Mix:
        """The smallest of those that are predicted to do no more damage; where none are, that of the least."""
        least = sum(float(own.min()) for own in self.damages)
        return self.mix(choose(self.bytes, self.damages, max(self._uncorrect(most), least)))

    def least(self) -> Mix:
        """The mix of least damage, whatever its size."""
        return self.mix(np.array([int(own.argmin()) for own in self.damages]))

    def alike(self, fits: Callable[[Mix], bool]) -> list[Mix]:
        """One width for all layers where that fits, of the widths to choose from; the narrowest first."""
        widths = {one.grid.bits for own in self.options for one in own}
        return [mix for mix in self.uniform if {grid.bits for grid in mix.grids.values()} <= widths and fits(mix)]

    def select(self, damages: FloatArray) -> list[FloatArray]:
        """Of other damages (layers, grids) those of the options, in the order of :attr:`damages`."""
        kept = [[one.grid.granularity in self.granularities for one in layer.options] for layer in self.layers]
        return [own[which] for own, which in zip(damages, kept, strict=True)]

    def near(self, bits: int, away: int) -> list[FloatArray]:
        """Damages that keep a mix from giving any layer a width that is further away than that from one for all."""
        return [
            np.where([abs(one.grid.bits - bits) <= away for one in own], cost, FAR * (1 + cost.max()))
            for own, cost in zip(self.options, self.damages, strict=True)
        ]

    # -- tried --------------------------------------------------------------------------------------------------------

    def measure(self, mixes: Sequence[Mix]) -> list[Mix]:
        """The mixes with their damage measured, as the mean over draws of the rounding."""
        keys = [tuple(mix.grids.values()) for mix in mixes]
        new = {key: mix for key, mix in zip(keys, mixes, strict=True) if key not in self._measured}
        if new:
            found = self.study.measure_each([Change(mix.grids) for mix in new.values()], self._draws)
            self._measured |= dict(zip(new, found, strict=True))
        return [
            replace(mix, measured=average(self._measured[key], self._draws))
            for key, mix in zip(keys, mixes, strict=True)
        ]

    def gain(self, before: Mix, after: Mix) -> Gain:
        """How many dB more one mix keeps than another, in the same draws."""
        first, second = (self._measured[tuple(mix.grids.values())] for mix in (before, after))
        return Gain.of(first, second)
