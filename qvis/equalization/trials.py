"""Tries out models that were written beside the given one: how far their outputs are off, and how they round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from qvis import adapters
from qvis.analysis.damage import Draws, Key
from qvis.analysis.study import Change, Exact, Study
from qvis.layers import Network
from qvis.noise import WeightGrid
from qvis.rewriting import Rewriting


class Trial(NamedTuple):
    """A model that was written, and how it rounds."""

    model: Any
    written: Rewriting
    """What is other in it than in the given model."""
    network: Network
    study: Study
    judged: Draws
    """The damage of rounding it, on the grid that it is meant for, relative to what the given model puts out."""


class Trials:
    """Compares models with the given one, on the same samples and the same draws of the rounding."""

    def __init__(self, given: Study, grid: WeightGrid, activations: bool, seed: int) -> None:
        self.given = given
        self.grid = grid
        self.activations = activations
        """Whether what enters layers is rounded too, to the same width."""
        self.seed = seed

    @cached_property
    def exact(self) -> Exact:
        """What the given model puts out for the samples of each draw."""
        return [self.given.runner.run(draw.batch) for draw in self.given.draws(self.seed)]

    def assess(self, study: Study) -> Draws:
        """The damage of rounding a model, on the grid that it is meant for."""
        names = [layer.name for layer in study.layers]
        inputs = {name: known.grids[0] for name, known in study.entering.items()} if self.activations else {}
        (found,) = study.measure_draws([Change(dict.fromkeys(names, self.grid), inputs)], self.seed, self.exact)
        return found

    def assess_widths(self, study: Study, grids: Sequence[WeightGrid]) -> Mapping[Key, Draws]:
        """The damage of rounding its weights to several grids."""
        names = [layer.name for layer in study.layers]
        changes = [Change(dict.fromkeys(names, grid)) for grid in grids]
        draws = study.measure_draws(changes, self.seed, self.exact)
        return {(grid.bits, grid.granularity): one for grid, one in zip(grids, draws, strict=True)}

    def try_out(self, model: Any, written: Rewriting) -> Trial:
        """Round a model that was written, and run it beside the given one."""
        network = adapters.read(model)
        study = Study(network, adapters.runner(model, network), self.given.batches, [self.grid], self.given.track)
        if self.activations:
            study.calibrate(locally=False)
        study.power = self.given.power
        return Trial(model, written, network, study, self.assess(study))

    def compare(self, trial: Trial) -> tuple[float, float]:
        """The largest change of an output with nothing rounded, as it is and relative to the largest output."""
        largest = worst = 0.0
        for draw, exact in zip(self.given.draws(self.seed), self.exact, strict=True):
            for one, other in zip(exact, trial.study.runner.run(draw.batch), strict=True):
                change = np.abs(one.astype(np.float64) - other)
                worst = max(worst, float(np.max(np.where(np.isnan(change), np.inf, change), initial=0.0)))
                largest = max(largest, float(np.max(np.abs(one), initial=0.0)))
        return worst, worst / largest if largest else worst
