"""Chooses how to store all layers at once, and makes changes for real to see what comes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log, nan

import numpy as np

from qvis.analysis.sizes import Compressibility, Curve, Trial
from qvis.analysis.study import Study
from qvis.layers import FloatArray, Network
from qvis.noise import WeightGrid, round_weight
from qvis.running import Batch

PLANNED_DB = (0.0, 1.0, 2.0, 5.0, -5.0, -10.0)
"""All layers at once are planned to keep this many dB more than is asked for; predictions are off by about one."""
STEPS = 60
"""Of the search for the price of damage, each of which halves what is left."""


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
        chosen = _smallest(size, 10 ** (-(found.keep_db + more) / 10))
        if chosen is None:
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


def _smallest(options: Sequence[FloatArray], allowed: float) -> list[int] | None:
    """Of each layer's options (bytes, damage), the choice with the fewest bytes in all that stays within a damage.

    A price for damage is looked for at which the choices, each the best for itself, just stay within it.
    """
    low, high = log(1e-6), log(1e24)
    best = None
    for _ in range(STEPS):
        price = np.exp((low + high) / 2)
        chosen = [int(np.argmin(one[:, 0] + price * one[:, 1])) for one in options]
        if sum(one[index, 1] for one, index in zip(options, chosen, strict=True)) <= allowed:
            best, high = chosen, (low + high) / 2
        else:
            low = (low + high) / 2
    return best


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
    """The share of samples whose label is the largest of the first output, (samples, classes); else NaN."""
    right = 0
    for batch, out in zip(batches, outputs, strict=True):
        labels = None if batch.labels is None else np.asarray(batch.labels)
        if labels is None or not out or out[0].ndim != 2 or out[0].shape[1] < 2:
            return nan
        labels = labels.reshape(len(labels), -1)
        if labels.shape != (len(out[0]), 1) or labels.dtype.kind not in "iu":
            return nan
        right += int((out[0].argmax(axis=1) == labels[:, 0]).sum())
    return right / sum(batch.size for batch in batches)
