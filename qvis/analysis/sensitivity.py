"""Finds how much the output of a model suffers when each of its layers is quantized: predicted, or measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import nan
from typing import Any

import numpy as np

from qvis.analysis.damage import Damage, InputStatistics, Key, LayerSensitivity, Sensitivity
from qvis.analysis.rounding import checked_bits
from qvis.analysis.study import Change, Outcome, Study
from qvis.errors import BadArgumentError
from qvis.layers import Network, Norm, Skipped
from qvis.noise import Estimate, WeightGrid
from qvis.running import Batch, Grid, Runner, Track, silently

GRANULARITIES = ("tensor", "channel")
MEASURE = ("none", "top", "all")
TOP = 8
"""So many layers are measured when the top ones are asked for."""
PASSES = 64
"""Backward passes that the samples are spread over: more give no better ranking."""


def study_layers(
    network: Network,
    runner: Runner,
    batches: Sequence[Batch],
    *,
    passes: Sequence[Batch],
    bits: Sequence[int],
    granularities: Sequence[str],
    measure: str,
    evidence: Callable[[Outcome], str],
    seed: int = 0,
    loss: bool = False,
    notes: Sequence[str] = (),
    norms: Mapping[str, Norm] | None = None,
    track: Track = silently,
) -> Sensitivity:
    """Find the sensitivity of a model that is ready to be run; :func:`qvis.sensitivity` says what the arguments mean.

    ``passes`` are the samples again, in the batches in which they are differentiated.
    """
    study = Study(network, runner, batches, [WeightGrid(width, one) for width in bits for one in granularities], track)
    if not study.layers:
        raise BadArgumentError(f"model: none of its {len(network.layers)} layers can be run on other weights")
    study.calibrate()
    outcome = study.differentiate(passes, seed) if runner.differentiable else Outcome()
    if not runner.differentiable and measure == "none":
        measure = "all"
    layers = _measure(study, _predict(study, outcome), measure)
    together = _measure_together(study)
    served = set(runner.layers)
    return Sensitivity(
        name=network.name,
        framework=network.framework,
        layers=layers,
        bits=tuple(bits),
        granularities=tuple(granularities),
        evidence=("measured" if measure == "all" else "predicted") + evidence(outcome),
        samples=study.samples,
        passes=outcome.passes,
        settled=outcome.settled,
        agreement=outcome.agreement,
        total=together["weights"],
        total_inputs={bits: value for (bits, _), value in together["inputs"].items()},
        total_both=together["both"],
        notes=(*runner.notes, *notes),
        loss=loss,
        skipped=tuple(
            Skipped(layer.name, "cannot be run on other weights") for layer in network.layers if layer.name not in served
        ),
        folded=norms or {},
    )


def _predict(study: Study, outcome: Outcome) -> list[LayerSensitivity]:
    """What the noise model says of each layer, in the order of ``study.layers``."""
    keys: list[Key] = [(grid.bits, grid.granularity) for grid in study.grids]
    nothing = Estimate(np.zeros((0, 0)), np.zeros((0, 0)))
    weights = study.predict_weights() if outcome.passes else nothing
    names, inputs = study.predict_inputs() if outcome.passes else ([], nothing)
    by_name = {name: dict(zip(study.bits, _damages(inputs, row), strict=True)) for row, name in enumerate(names)}
    layers = []
    for index, layer in enumerate(study.layers):
        known, noise = study.entering.get(layer.name), study.noise.get(layer.name)
        entering = None
        if known is not None:
            mean, importance = known.total / max(known.count, 1), known.importance / max(study.differentiated, 1)
            entering = InputStatistics(known.low, known.high, mean, importance, known.histogram)
        layers.append(
            LayerSensitivity(
                name=layer.name,
                op=layer.op,
                weights=dict(zip(keys, _damages(weights, index), strict=True)) if outcome.passes else {},
                inputs=by_name.get(layer.name, {}),
                without={},
                importance=np.zeros(0) if noise is None else noise.by_channel(),
                entering=entering,
                operations=study.operations.get(layer.name, 0),
                output_sqnr=study.output_sqnr(layer.name),
            )
        )
    return layers


def _damages(estimate: Estimate, row: int) -> list[Damage]:
    return [Damage(float(d), float(s)) for d, s in zip(estimate.damage[row], estimate.spread[row], strict=True)]


def _measure(study: Study, layers: list[LayerSensitivity], measure: str) -> tuple[LayerSensitivity, ...]:
    """The layers with what was measured of all of them, or of the worst."""
    judged: Key = (study.grids[0].bits, study.grids[0].granularity)
    order = sorted(layers, key=lambda layer: -np.nan_to_num(layer.damage(*judged).value, nan=np.inf))
    chosen = {layer.name for layer in order[: {"none": 0, "top": TOP, "all": len(order)}[measure]]}
    everything = [layer.name for layer in layers]
    changes: list[tuple[str, str, Any, Change]] = []
    for name in (name for name in everything if name in chosen):
        for grid in study.grids:
            key = (grid.bits, grid.granularity)
            changes.append((name, "weights", key, Change({name: grid})))
            if grid.bits == study.bits[0]:
                rest = {other: grid for other in everything if other != name}
                changes.append((name, "without", key, Change(rest)))
        if name in study.entering:
            grids = zip(study.bits, study.entering[name].grids, strict=True)
            changes += [(name, "inputs", width, Change(inputs={name: grid})) for width, grid in grids]
    found: dict[tuple[str, str], dict[Any, float]] = {}
    for (name, what, key, _), value in zip(changes, study.measure([one[3] for one in changes]), strict=True):
        found.setdefault((name, what), {})[key] = value
    return tuple(
        replace(
            layer,
            weights=_with(layer.weights, found.get((layer.name, "weights"), {})),
            inputs=_with(layer.inputs, found.get((layer.name, "inputs"), {})),
            without=found.get((layer.name, "without"), {}),
        )
        for layer in layers
    )


def _with(predicted: Mapping[Any, Damage], measured: Mapping[Any, float]) -> dict[Any, Damage]:
    keys = dict.fromkeys([*predicted, *measured])
    return {key: replace(predicted.get(key, Damage()), measured=measured.get(key, nan)) for key in keys}


def _measure_together(study: Study) -> dict[str, dict[Key, float]]:
    """The damage of all layers at once."""
    names = [layer.name for layer in study.layers]
    entering = [{name: known.grids[i] for name, known in study.entering.items()} for i in range(len(study.bits))]
    changes: list[tuple[str, Key, Change]] = []
    for grid in study.grids:
        weights, inputs = dict.fromkeys(names, grid), entering[study.bits.index(grid.bits)]
        key = (grid.bits, grid.granularity)
        changes += [("weights", key, Change(weights)), ("both", key, Change(weights, inputs))]
    for width, inputs in zip(study.bits, entering, strict=True):
        changes.append(("inputs", (width, "tensor"), Change(inputs=inputs)))
    found: dict[str, dict[Key, float]] = {"weights": {}, "inputs": {}, "both": {}}
    for (what, key, _), value in zip(changes, study.measure([one[2] for one in changes]), strict=True):
        found[what][key] = value
    return found
