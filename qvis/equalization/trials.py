"""Tries out models that were written beside the given one: how far their outputs are off, and how they round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from qvis import adapters
from qvis.analysis.damage import Draws, Gain, Key
from qvis.analysis.study import Change, Draw, Study, average
from qvis.layers import FloatArray, Network
from qvis.noise import WeightGrid
from qvis.rewriting import Rewriting

ROUNDS = 4
"""So many times the least number of draws is made where fewer do not tell which of two models rounds better."""


class Trial(NamedTuple):
    """A model that was written."""

    model: Any
    written: Rewriting
    """What is other in it than in the given model."""
    network: Network
    study: Study
    notes: tuple[str, ...]
    """What else is other in it."""


class Trials:
    """Compares models with the given one, on the same samples and the same draws of the rounding."""

    def __init__(self, given: Study, grid: WeightGrid, activations: bool, seed: int) -> None:
        self.given = given
        self.grid = grid
        self.activations = activations
        """Whether what enters layers is rounded too, to the same width."""
        self.seed = seed
        self.rounds = 1
        """How often the least number of draws is made."""
        self._rounds: list[list[Draw]] = []
        self._exact: list[Sequence[FloatArray]] = []
        self._damages: dict[Study, list[float]] = {}

    @property
    def draws(self) -> list[Draw]:
        """The draws of all rounds."""
        while len(self._rounds) < self.rounds:
            self._rounds.append(self.given.draws(self.seed + len(self._rounds)))
        return [draw for one in self._rounds[: self.rounds] for draw in one]

    @property
    def once(self) -> int:
        """How many draws there are in one round."""
        return len(self.draws) // self.rounds

    @property
    def exact(self) -> list[Sequence[FloatArray]]:
        """What the given model puts out for the samples of each draw."""
        draws = self.draws
        for draw in draws[len(self._exact) :]:
            self._exact.append(self.given.runner.run(draw.batch))
        return self._exact[: len(draws)]

    def try_out(self, base: object, network: Network, written: Rewriting) -> Trial:
        """Write a model with other numbers, and make it ready to be run."""
        model, notes = adapters.rewrite(base, network, written)
        network = adapters.read(model)
        study = Study(network, adapters.runner(model, network), self.given.batches, [self.grid], self.given.track)
        if self.activations:
            study.calibrate(locally=False)
        study.power = self.given.power
        return Trial(model, written, network, study, tuple(notes))

    # -- rounded ------------------------------------------------------------------------------------------------------

    def damages(self, study: Study) -> FloatArray:
        """What rounding does to a model's outputs on the grid that it is meant for, relative to the given model's.

        Returns
        -------
        ndarray
            For the mean sample of each draw, (draws,).
        """
        known = self._damages.setdefault(study, [])
        inputs = {name: one.grids[0] for name, one in study.entering.items()} if self.activations else {}
        change = Change(dict.fromkeys(study.weights, self.grid), inputs)
        pairs = list(zip(self.draws, self.exact, strict=True))
        for draw, exact in self.given.track(pairs[len(known) :], "Measuring") if pairs[len(known) :] else ():
            known.append(study.noise_of(change, draw, exact))
        return np.array(known)

    def assess(self, study: Study) -> Draws:
        """The mean of these damages, and their spread."""
        return average(self.damages(study), self.draws)

    def gain(self, before: Study, after: Study) -> Gain:
        """What one model keeps more than another."""
        return Gain.of(self.damages(before), self.damages(after))

    def assess_widths(self, study: Study, grids: Sequence[WeightGrid]) -> Mapping[Key, Draws]:
        """The damage of rounding the weights of a model to several grids."""
        draws, exact = self.draws[: self.once], self.exact[: self.once]
        steps = [(draw, grid) for draw in range(len(draws)) for grid in range(len(grids))]
        found = np.zeros((len(grids), len(draws)))
        for draw, grid in self.given.track(steps, "Measuring all widths"):
            change = Change(dict.fromkeys(study.weights, grids[grid]))
            found[grid, draw] = study.noise_of(change, draws[draw], exact[draw])
        return {(grid.bits, grid.granularity): average(one, draws) for grid, one in zip(grids, found, strict=True)}

    # -- not rounded --------------------------------------------------------------------------------------------------

    def compare(self, trial: Trial) -> tuple[float, float]:
        """The largest change of an output with nothing rounded, as it is and relative to the largest output."""
        largest = worst = 0.0
        for draw, exact in zip(self.draws[: self.once], self.exact, strict=False):
            for one, other in zip(exact, trial.study.runner.run(draw.batch), strict=True):
                change = np.abs(one.astype(np.float64) - other)
                worst = max(worst, float(np.max(np.where(np.isnan(change), np.inf, change), initial=0.0)))
                largest = max(largest, float(np.max(np.abs(one), initial=0.0)))
        return worst, worst / largest if largest else worst
