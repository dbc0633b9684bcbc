"""Runs a model over its samples and gathers what its sensitivity is told from.

Three steps, each over the same samples: *calibrate* runs the model and notes what enters each layer; *differentiate*
makes backward passes for the noise model (:mod:`qvis.noise`); *measure* rounds for real.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import nan
from typing import NamedTuple

import numpy as np

from qvis.analysis.damage import Draws
from qvis.data import split
from qvis.errors import BadArgumentError
from qvis.layers import FloatArray, Network, decibels
from qvis.noise import (
    CACHE_BYTES,
    Estimate,
    Granularity,
    Histogram,
    WeightGrid,
    WeightNoise,
    combine,
    evenly,
    round_input,
    round_weight,
    span,
)
from qvis.running import Batch, Gradient, Grid, Passage, Runner, Track

SETTLED = 0.97
"""The ranking has settled when two halves of the passes agree as well as that."""
LEAST_PASSES = 16
UNSURE = 1.5
"""Standard error of the logarithm where most of a damage is due to changes that are too large for a prediction."""
DRAWS = 16
"""So many draws of the rounding a measurement is the mean of, at least."""
LEAST = 1e-6
"""Of the largest noise of some draws: draws with less, such as none where an output is in steps, count as that."""
STRETCH = 0.08
"""A draw makes the step of a grid larger by up to this share."""


class Change(NamedTuple):
    """What is rounded in one measurement."""

    weights: Mapping[str, WeightGrid] = {}
    """The grids of weights, by layer."""
    inputs: Mapping[str, Grid] = {}
    """The grids of what enters layers."""


_NOTHING = Change()


class Draw(NamedTuple):
    """One draw of the rounding."""

    batch: Batch
    """The samples that it is measured on."""
    stretch: Mapping[str, float]
    """By how much larger the step of each layer is."""


class Outcome(NamedTuple):
    """How the backward passes went."""

    passes: int = 0
    settled: bool = False
    """Whether some were saved."""
    agreement: float = nan
    """How well two halves of them rank the layers alike (Spearman), stepped up to the whole (Spearman and Brown)."""


@dataclass
class Entering:
    """What enters a layer, gathered over its calls and all samples. Arrays are of one value for each channel."""

    low: FloatArray
    high: FloatArray
    total: FloatArray
    importance: FloatArray
    """The sum of squared derivatives."""
    count: int = 0
    histogram: Histogram = field(default_factory=lambda: Histogram(0.0, 0.0))
    grids: tuple[Grid, ...] = ()
    bin_errors: tuple[FloatArray, ...] = ()
    diagonal: list[FloatArray] = field(default_factory=list)
    """Of each pass, the damage of each grid as if errors had nothing to do with each other."""
    projected: list[FloatArray] = field(default_factory=list)
    """Of each pass, the squared change of the output along the errors."""

    @classmethod
    def of(cls, channels: int) -> Entering:
        """Nothing seen yet."""
        ends = (np.full(channels, np.inf), np.full(channels, -np.inf))
        return cls(*ends, np.zeros(channels), np.zeros(channels))

    def see(self, rows: FloatArray) -> None:
        """Take in values, (values, channels)."""
        if rows.size:
            self.low = np.fmin(self.low, rows.min(axis=0))
            self.high = np.fmax(self.high, rows.max(axis=0))
            self.total += rows.sum(axis=0, dtype=np.float64)
            self.count += rows.shape[0]

    def settle(self, bits: Sequence[int]) -> None:
        """Choose the grids, now that the range is known."""
        ends = [float(one) for one in (self.low.min(initial=0), self.high.max(initial=0)) if np.isfinite(one)]
        low, high = min(ends, default=0.0), max(ends, default=0.0)
        self.histogram = Histogram(low, high)
        self.grids = tuple(span(low, high, width) for width in bits)
        self.bin_errors = tuple(self.histogram.errors(grid) for grid in self.grids)

    def differentiate(self, gradient: Gradient) -> None:
        """Take in one pass."""
        before, along = self.histogram.importance.copy(), np.zeros(len(self.grids))
        for values, derivative in gradient.inputs:
            if values.shape[gradient.axis] != self.low.size:
                continue
            square = np.square(by_channel(derivative, gradient.axis), dtype=np.float64)
            self.importance += np.nan_to_num(square).sum(axis=0)
            part, weight = evenly(values)
            self.histogram.add(values.reshape(-1)[part], derivative.reshape(-1)[part], weight)
            along += [np.vdot(round_input(values, grid) - values, derivative) for grid in self.grids]
        added = self.histogram.importance - before
        self.diagonal.append(np.array([added @ errors for errors in self.bin_errors]))
        self.projected.append(np.square(np.nan_to_num(along)))


def by_channel(values: FloatArray, axis: int) -> FloatArray:
    """``(values, channels)``"""
    rows: FloatArray = np.moveaxis(values, axis, -1).reshape(-1, values.shape[axis])
    return rows


class Study:
    """A model, the samples to run it on, and what is known so far."""

    def __init__(
        self, network: Network, runner: Runner, batches: Sequence[Batch], grids: Sequence[WeightGrid], track: Track
    ) -> None:
        served = set(runner.layers)
        self.runner = runner
        self.batches = batches
        self.grids = tuple(grids)
        self.bits = tuple(dict.fromkeys(grid.bits for grid in grids))
        self.track = track
        self.layers = [layer for layer in network.layers if layer.name in served]
        self.weights = {layer.name: np.ascontiguousarray(layer.weight) for layer in self.layers}
        self.samples = sum(batch.size for batch in batches)
        self.power: FloatArray = np.zeros(0)
        """The mean power of each output for one sample."""
        self.entering: dict[str, Entering] = {}
        self.operations: dict[str, int] = {}
        """Multiplications of each layer for one sample."""
        self.noise: dict[str, WeightNoise] = {}
        self.differentiated = 0
        """Samples in all backward passes, counted each time."""
        self._local: dict[tuple[str, Granularity], FloatArray] = {}

    # -- calibrate ----------------------------------------------------------------------------------------------------

    def calibrate(self, *, locally: bool = True) -> None:
        """Run all samples for the power of the outputs and what enters the layers.

        With ``locally`` also for what rounding does to each layer's own outputs, see :meth:`output_sqnr`.
        """
        powers: list[list[float]] = []
        for batch in self.track(self.batches, "Calibrating"):
            outputs = self.runner.run(batch, watch=lambda passage, batch=batch: self._see(passage, batch))  # type: ignore[misc]
            powers.append([power(one) for one in outputs])
        if len({len(one) for one in powers}) > 1:
            raise BadArgumentError(
                f"model: it returns {len(powers[0])} outputs for some inputs and another number for others; give a "
                "module that returns the same for all"
            )
        if not powers or not any(any(one) for one in powers):
            raise BadArgumentError("model: its outputs hold no real number other than zero, so that no noise shows")
        self.power = np.sum(powers, axis=0) / self.samples
        if not np.isfinite(self.power).all():
            raise BadArgumentError("inputs: the model returns NaN or infinite numbers for them; give others")
        for granularity in dict.fromkeys(grid.granularity for grid in self.grids if locally):
            # what rounding does to the layers' own outputs varies little between samples: one batch is enough
            grid = WeightGrid(self.bits[0], granularity)
            others = {name: round_weight(weight, grid) for name, weight in self.weights.items()}
            self.runner.run(self.batches[0], watch=lambda p, g=granularity: self._compare(p, g), others=others)  # type: ignore[misc]
        for known in self.entering.values():
            known.settle(self.bits)

    def _see(self, passage: Passage, batch: Batch) -> None:
        if passage.layer not in self.weights:
            return
        if batch is self.batches[0]:
            elements = self.weights[passage.layer].shape[1]
            table = not passage.inputs.size  # an embedding multiplies nothing
            operations = 0 if table else int(passage.outputs.size / batch.size * elements)
            self.operations[passage.layer] = self.operations.get(passage.layer, 0) + operations
        if passage.inputs.size:
            rows = by_channel(passage.inputs, passage.axis)
            known = self.entering.setdefault(passage.layer, Entering.of(rows.shape[1]))
            if known.low.size == rows.shape[1]:
                known.see(rows)

    def _compare(self, passage: Passage, granularity: Granularity) -> None:
        if passage.changed is not None:
            noise = power(passage.changed.astype(np.float64) - passage.outputs)
            sums = self._local.setdefault((passage.layer, granularity), np.zeros(2))
            sums += (power(passage.outputs), noise)

    def output_sqnr(self, name: str) -> dict[Granularity, float]:
        """The dB that a layer's own output keeps when its weights are rounded to the first width, by granularity."""
        return {one: decibels(*map(float, sums)) for (layer, one), sums in self._local.items() if layer == name}

    # -- differentiate ------------------------------------------------------------------------------------------------

    def differentiate(
        self,
        passes: Sequence[Batch],
        seed: int = 0,
        *,
        singly: bool = False,
        entering: bool = True,
        watch: Callable[[Gradient, int], None] | None = None,
        classes: bool = False,
    ) -> Outcome:
        """Make backward passes until the ranking of the layers has settled, or all are made.

        With ``singly`` the importance of each weight is kept, which takes as much memory as the weights; without
        ``entering`` nothing is learned of what enters the layers, which saves time. ``watch`` is shown each gradient,
        and of how many samples it is. With ``classes`` the damage is not that of the outputs but of the classes that
        they stand for, see :func:`class_probe`.
        """
        kept = self._kept()
        self.noise = {
            name: WeightNoise(weight, self.grids, name in kept, np.zeros_like(weight) if singly else None)
            for name, weight in self.weights.items()
        }
        generator = np.random.default_rng(seed)
        used = self.power > 0
        factors = np.where(used, 1 / np.sqrt(np.where(used, self.power, 1) * np.count_nonzero(used)), 0)

        def probe(outputs: Sequence[FloatArray]) -> list[FloatArray]:
            if classes:
                return [class_probe(outputs[0], generator), *map(np.zeros_like, outputs[1:])]
            return [
                (generator.standard_normal(one.shape) * factor).astype(np.float32)
                for one, factor in zip(outputs, factors, strict=True)
            ]

        least = min(LEAST_PASSES, len(passes))
        done, agreement, before = 0, nan, nan
        for batch in self.track(passes, "Differentiating"):
            for gradient in self.runner.differentiate(batch, probe):
                if gradient.layer not in self.noise:
                    continue
                self.noise[gradient.layer].add(gradient.weight, batch.size)
                if watch is not None:
                    watch(gradient, batch.size)
                known = self.entering.get(gradient.layer)
                if known is not None and entering:
                    known.differentiate(gradient)
            done += 1
            self.differentiated += batch.size
            if done >= least and done % 4 == 0:
                before, agreement = agreement, self._agreement()
                if min(before, agreement) >= SETTLED:
                    break
        return Outcome(done, done < len(passes), agreement)

    def _kept(self) -> set[str]:
        """The layers whose rounding errors are kept from pass to pass: the small ones, until the memory is used up."""
        order = sorted(self.weights, key=lambda name: self.weights[name].size)
        used = np.cumsum([4 * self.weights[name].size * len(self.grids) for name in order])
        return {name for name, size in zip(order, used, strict=True) if size <= CACHE_BYTES}

    def predict_weights(self) -> Estimate:
        """Damage of each layer (in the order of :attr:`layers`) on each grid."""
        found = combine(*self._estimates())
        coarse = np.stack([noise.coarse() for noise in self.noise.values()])
        return found._replace(spread=np.where(coarse > 0.5, np.maximum(found.spread, UNSURE), found.spread))

    def predict_inputs(self) -> tuple[list[str], Estimate]:
        """The layers whose inputs were seen, and the damage of rounding them, (layers, bits)."""
        names = [name for name, known in self.entering.items() if known.diagonal]
        per_pass = self.differentiated / max(1, len(self.entering[names[0]].diagonal)) if names else 1.0
        tables = [
            np.stack([np.stack(getattr(self.entering[name], kind)) for name in names]) / per_pass
            for kind in ("diagonal", "projected")
            if names
        ]
        return names, combine(*tables) if names else Estimate(np.zeros((0, 0)), np.zeros((0, 0)))

    def _estimates(self) -> tuple[FloatArray, FloatArray]:
        found = [noise.estimates() for noise in self.noise.values()]
        return np.stack([diagonal for diagonal, _ in found]), np.stack([projected for _, projected in found])

    def _agreement(self) -> float:
        diagonal, projected = self._estimates()
        if len(diagonal) < 3:
            return 1.0
        first, second = (combine(diagonal[:, i::2], projected[:, i::2]).damage for i in (0, 1))
        r = float(np.mean([rank_correlation(first[:, i], second[:, i]) for i in range(len(self.grids))]))
        return 2 * r / (1 + r) if r > 0 else 0.0

    # -- measure ------------------------------------------------------------------------------------------------------

    def measure(self, changes: Sequence[Change]) -> list[float]:
        """The damage of each change, by making it, for the mean sample."""
        noise = np.zeros(len(changes))
        steps = [(batch, change) for batch in self.batches for change in range(-1, len(changes))]
        exact: list[FloatArray] = []
        for batch, index in self.track(steps, "Measuring"):
            if index < 0:
                exact = self.runner.run(batch)
            else:
                noise[index] += self._noise(batch, exact, changes[index])
        return [float(one) for one in noise / self.samples]

    def measure_draws(self, changes: Sequence[Change], seed: int = 0) -> list[Draws]:
        """The damage of each change, as the mean over several draws of the rounding; see :meth:`measure_each`."""
        draws = self.draws(seed)
        return [average(noises, draws) for noises in self.measure_each(changes, draws)]

    def measure_each(self, changes: Sequence[Change], draws: Sequence[Draw]) -> FloatArray:
        """The damage of each change in each draw of the rounding, for the mean sample, (changes, draws).

        How errors add up in one rounding is an accident: a step that is 1 % larger gives others. So each draw makes the
        step of every layer larger by a random share of up to :data:`STRETCH`. Each has a part of the samples of its
        own, as far as they go round, so that all draws together cost no more than one over all samples.
        """
        found = np.zeros((len(changes), len(draws)))
        steps = [(draw, change) for draw in range(len(draws)) for change in range(-1, len(changes))]
        exact: list[FloatArray] = []
        for draw, index in self.track(steps, "Measuring all layers at once"):
            if index < 0:
                exact = self.runner.run(draws[draw].batch)
            else:
                found[index, draw] = self.noise_of(changes[index], draws[draw], exact)
        return found

    def noise_of(self, change: Change, draw: Draw, exact: Sequence[FloatArray]) -> float:
        """The damage of a change in one draw, for the mean sample; ``exact`` are the outputs with nothing rounded."""
        return self._noise(draw.batch, exact, change, draw.stretch) / draw.batch.size

    def draws(self, seed: int = 0) -> list[Draw]:
        """The samples and the steps of each draw of the rounding; the same for the same seed."""
        generator = np.random.default_rng(seed)
        return [Draw(one, {name: 1 + STRETCH * generator.random() for name in self.weights}) for one in self._pieces()]

    def _pieces(self) -> list[Batch]:
        """Batches for the draws, at least :data:`DRAWS`; of few samples each is there several times."""
        size = max(1, min(self.samples // DRAWS, self.batches[0].size))
        pieces = [piece for batch in self.batches for piece in split(batch, size)]
        return pieces * -(-DRAWS // len(pieces))

    def _noise(
        self, batch: Batch, exact: Sequence[FloatArray], change: Change, stretch: Mapping[str, float] | None = None
    ) -> float:
        """The noise that a change brings to the outputs of a batch, relative to a sample's mean output power."""
        return self.relative_noise(self.run(batch, change, stretch), exact)

    def run(
        self, batch: Batch, change: Change = _NOTHING, stretch: Mapping[str, float] | None = None
    ) -> list[FloatArray]:
        """The outputs for a batch with something rounded, on steps that are larger by a factor for each layer."""
        stretch = stretch or {}
        weights = {
            name: round_weight(self.weights[name], grid, stretch.get(name, 1.0))
            for name, grid in change.weights.items()
        }
        inputs = {name: stretched(grid, stretch.get(name, 1.0)) for name, grid in change.inputs.items()}
        return self.runner.run(batch, weights=weights, grids=inputs)

    def relative_noise(self, outputs: Sequence[FloatArray], exact: Sequence[FloatArray]) -> float:
        """How far outputs are from the exact ones, relative to a sample's mean output power; the sum over samples."""
        _check_shapes(outputs, exact)
        moved = np.array([power(a.astype(np.float64) - b) for a, b in zip(outputs, exact, strict=True)])
        used = self.power > 0
        return float((moved[used] / self.power[used]).mean())


def class_probe(scores: FloatArray, generator: np.random.Generator) -> FloatArray:
    """What to multiply scores (samples, classes) with, so that the derivative is that of the likelihood of a class.

    The class is drawn at random by the scores themselves, as logits or, where they are shares already, as these. The
    mean square of the derivative along a change is then twice the Kullback-Leibler divergence that it brings (the
    Fisher information; Martens, arXiv 1412.1193, section 5): samples that could go either way count most.
    """
    scores = scores.astype(np.float64)
    if scores.shape[1] == 1:  # of two classes, as a share or as a logit
        share = bool(np.all((scores >= 0) & (scores <= 1)))
        both = class_probe(np.concatenate([1 - scores if share else np.zeros_like(scores), scores], axis=1), generator)
        single: FloatArray = both[:, 1:] - both[:, :1] if share else both[:, 1:]
        return single
    shares = bool(np.all(scores >= 0)) and bool(np.allclose(scores.sum(axis=1), 1, atol=1e-3))
    likely = scores if shares else np.exp(scores - scores.max(axis=1, keepdims=True))
    likely = likely / likely.sum(axis=1, keepdims=True)
    drawn = (likely.cumsum(axis=1) > generator.random((len(likely), 1))).argmax(axis=1)
    chosen = np.eye(likely.shape[1])[drawn]
    found: FloatArray = (chosen / np.maximum(likely, 1e-6) if shares else chosen - likely).astype(np.float32)
    return found


def stretched(grid: Grid, by: float) -> Grid:
    """The same grid with a larger step."""
    return replace(grid, step=grid.step * by)


def average(noises: FloatArray, draws: Sequence[Draw]) -> Draws:
    """The mean over draws of the noise for one sample, and its spread; (draws,)."""
    sizes = np.array([draw.batch.size for draw in draws], dtype=np.float64)
    mean = float(noises @ sizes / sizes.sum())
    least = max(float(noises.max(initial=0)) * LEAST, np.finfo(float).tiny)
    spread = float(np.log10(np.maximum(noises, least)).std(ddof=1) * 10)
    return Draws(mean, spread if mean > 0 else 0.0)


def _check_shapes(outputs: Sequence[FloatArray], exact: Sequence[FloatArray]) -> None:
    shapes, expected = ([one.shape for one in which] for which in (outputs, exact))
    if shapes != expected:
        raise BadArgumentError(
            f"model: its outputs have the shapes {expected} and, with rounded numbers, {shapes}; they cannot be "
            "compared; give a module that returns what comes before the choice"
        )


def power(values: FloatArray) -> float:
    """The sum of squares."""
    return float(np.square(values, dtype=np.float64).sum())


def rank_correlation(a: FloatArray, b: FloatArray) -> float:
    """Spearman's rank correlation; ties share their mean rank. 1 where either is constant."""
    deviations = [ranks - ranks.mean() for ranks in map(_ranks, (a, b))]
    scale = float(np.sqrt(np.square(deviations[0]).sum() * np.square(deviations[1]).sum()))
    return float(deviations[0] @ deviations[1]) / scale if scale else 1.0


def _ranks(values: FloatArray) -> FloatArray:
    _, index, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    ranks: FloatArray = ((last - count + last - 1) / 2)[index]
    return ranks
