"""Chooses how to store all layers at once, and makes changes for real to see what comes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import nan

import numpy as np

from qvis.analysis.answers import labels_of, right_answers, why_no_answers
from qvis.analysis.assignment import choose
from qvis.analysis.sizes import Compressibility, Curve, Trial
from qvis.analysis.study import Study
from qvis.errors import BadArgumentError
from qvis.layers import FloatArray, Network
from qvis.noise import WeightGrid, round_weight
from qvis.running import Batch

PLANNED_DB = (0.0, 1.0, 2.0, 5.0, -5.0, -10.0)
"""All layers at once are planned to keep this many dB more than is asked for; predictions are off by about one."""


def plan_together(found: Compressibility) -> list[Trial]:
    """For each of some damages, the way to store each layer that makes the model smallest.

    What is predicted with little confidence is left aside: choosing by it would choose the mistakes.
    """
    every: list[list[tuple[tuple[str, int] | None, int, float]]] = []
    size: list[FloatArray] = []
    for layer in found.layers:
        options: list[tuple[tuple[str, int] | None, int, float]] = [(None, layer.bytes, layer.damage.predicted)]
        for method, curve in layer.curves.items():
            sure = [one for one in curve.points if one.damage.confidence != "low"]
            options += [((method, one.setting), one.bytes, one.damage.predicted) for one in sure]
        every.append(options)
        size.append(np.array([[option[1], option[2]] for option in options], dtype=np.float64))
    plans: dict[int, Trial] = {}
    base = sum(layer.damage.predicted for layer in found.layers)
    for more in PLANNED_DB:
        try:
            chosen = choose(
                [one[:, 0] for one in size], [one[:, 1] for one in size], 10 ** (-(found.keep_db + more) / 10)
            )
        except BadArgumentError:  # not even the least damage is that small
            continue
        picks = [options[index] for options, index in zip(every, chosen, strict=True)]
        left = sum(pick[1] for pick in picks)
        plans.setdefault(
            left,
            Trial(
                choice={
                    one.name: pick[0] for one, pick in zip(found.layers, picks, strict=True) if pick[0] is not None
                },
                saved=found.bytes - left,
                share=left / found.bytes,
                predicted=sum(pick[2] for pick in picks),
                base=base,
                all_layers=True,
            ),
        )
    return [plan for plan in plans.values() if plan.saved > 0]


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


class Bench:
    """Makes changes for real, and compares the outputs."""

    def __init__(self, study: Study, network: Network, bits: int) -> None:
        self.study = study
        self.network = network
        self.grid = WeightGrid(bits, "channel")
        self.curves: Mapping[str, Mapping[str, Curve]] = {}
        self._exact: list[list[FloatArray]] = []
        """The outputs of each batch, unchanged."""

    def baseline(self) -> tuple[float, float, float]:
        """The damage of the whole model in the common width, and the accuracy without and with that."""
        self._exact = [self.study.runner.run(batch) for batch in self.study.track(self.study.batches, "Running")]
        right = accuracy(self.study.batches, self._exact)
        damage, rounded = self._compare(self._rounded())
        return damage, right, rounded

    def run(self, trial: Trial) -> tuple[float, float]:
        """The damage of a trial, and the accuracy."""
        changed = {name: self.curves[name][method].make(kept) for name, (method, kept) in trial.choice.items()}
        return self._compare({**self._rounded(), **changed} if trial.all_layers else changed)

    def _rounded(self) -> dict[str, FloatArray]:
        served = set(self.study.runner.layers)
        layers = [layer for layer in self.network.layers if layer.name in served]
        return {layer.name: round_weight(np.ascontiguousarray(layer.weight), self.grid) for layer in layers}

    def _compare(self, weights: Mapping[str, FloatArray]) -> tuple[float, float]:
        study = self.study
        outputs = [study.runner.run(batch, weights=weights) for batch in study.batches]
        noise = sum(study.relative_noise(one, exact) for one, exact in zip(outputs, self._exact, strict=True))
        return float(noise) / study.samples, accuracy(study.batches, outputs)


def accuracy(batches: Sequence[Batch], outputs: Sequence[Sequence[FloatArray]]) -> float:
    """The share of samples whose class the first output tells; NaN where the labels are no classes."""
    if why_no_answers(outputs[0], batches):
        return nan
    pairs = zip(batches, outputs, strict=True)
    return float(np.concatenate([right_answers(out[0], labels_of(batch)) for batch, out in pairs]).mean())
