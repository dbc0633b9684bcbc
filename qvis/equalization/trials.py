"""Tries out models that were written beside the given one: how far their outputs are off, and how they round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from qvis import adapters
from qvis.analysis.damage import Draws, Key
from qvis.analysis.study import Change, Study
from qvis.layers import Network
from qvis.noise import WeightGrid
from qvis.rewriting import Rewriting
from qvis.running import Runner


class Trial(NamedTuple):
    """A model that was written, and what became of its outputs."""

    model: Any
    written: Rewriting
    """What is other in it than in the given model."""
    network: Network
    study: Study
    difference: float
    """The largest change of an output, with nothing rounded."""
    relative: float
    """The same relative to the largest output."""
    judged: Draws
    """The damage of rounding it, on the grid that it is meant for."""


class Trials:
    """Compares models with the given one, on the same samples and the same draws of the rounding."""

    def __init__(self, given: Study, grid: WeightGrid, activations: bool, seed: int) -> None:
        self.given = given
        self.grid = grid
        self.activations = activations
        """Whether what enters layers is rounded too, to the same width."""
        self.seed = seed

    def assess(self, study: Study) -> Draws:
        """The damage of rounding a model, on the grid that it is meant for."""
        names = [layer.name for layer in study.layers]
        inputs = {name: known.grids[0] for name, known in study.entering.items()} if self.activations else {}
        (found,) = study.measure_draws([Change(dict.fromkeys(names, self.grid), inputs)], self.seed)
        return found

    def assess_widths(self, study: Study, grids: Sequence[WeightGrid]) -> Mapping[Key, Draws]:
        """The damage of rounding its weights to several grids."""
        names = [layer.name for layer in study.layers]
        draws = study.measure_draws([Change(dict.fromkeys(names, grid)) for grid in grids], self.seed)
        return {(grid.bits, grid.granularity): one for grid, one in zip(grids, draws, strict=True)}

    def try_out(self, model: Any, written: Rewriting) -> Trial:
        """Run a model beside the given one."""
        network = adapters.read(model)
        runner = adapters.runner(model, network)
        study = Study(network, runner, self.given.batches, [self.grid], self.given.track)
        if self.activations:
            study.calibrate(locally=False)
        study.reference, study.power = self.given.runner, self.given.power
        difference, relative = self._compare(runner)
        return Trial(model, written, network, study, difference, relative, self.assess(study))

    def _compare(self, runner: Runner) -> tuple[float, float]:
        """How far the outputs of another model are from those of the given one."""
        largest = worst = 0.0
        for batch in self.given.batches:
            for one, other in zip(self.given.runner.run(batch), runner.run(batch), strict=True):
                change = np.abs(one.astype(np.float64) - other)
                worst = max(worst, float(np.max(np.where(np.isnan(change), np.inf, change), initial=0.0)))
                largest = max(largest, float(np.max(np.abs(one), initial=0.0)))
        return worst, worst / largest if largest else worst
