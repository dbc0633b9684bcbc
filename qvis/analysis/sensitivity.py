"""Finds how much the output of a model suffers when each of its layers is quantized: predicted, or measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import nan
from typing import Any

import numpy as np

from qvis import adapters
from qvis.analysis.calibration import weight_histogram
from qvis.analysis.damage import Damage, Draws, InputStatistics, Key, LayerSensitivity, Sensitivity
from qvis.analysis.preparing import Ready, open_model, spread_passes
from qvis.analysis.rounding import checked_bits
from qvis.analysis.study import Change, Outcome, Study
from qvis.errors import BadArgumentError
from qvis.layers import Network, Skipped
from qvis.noise import Estimate, WeightGrid
from qvis.running import Batch, Runner, Track, silently
from qvis.words import listed_names

GRANULARITIES = ("tensor", "channel")
MEASURE = ("none", "top", "all")
TOP = 8
"""So many layers are measured when the top ones are asked for."""
SAMPLES = 64
PROBES = 4
"""How often each sample is differentiated at most, each time with other random numbers."""


def sensitivity(
    model: Any,
    inputs: Any = None,
    *,
    example_inputs: Any = None,
    labels: Any = None,
    loss: Any = None,
    bits: Sequence[int] | int = (8, 6, 4, 3, 2),
    granularity: Sequence[str] | str = GRANULARITIES,
    measure: str = "none",
    samples: int = SAMPLES,
    probes: int = PROBES,
    fold: bool = True,
    selected_layers: str | Sequence[str] | None = None,
    name: str | None = None,
    seed: int = 0,
    track: Track = silently,
) -> Sensitivity:
    """Find how much the output of a model suffers when each of its layers is quantized.

    Predicted for all layers and widths from one forward and some backward passes over the samples (:mod:`qvis.noise`);
    measured on request, one layer at a time. The damage of all layers together is always measured. The model is not
    changed.

    Parameters
    ----------
    model
        A ``torch.nn.Module``, a Keras or ONNX model, or the path of a file with one.
    inputs
        Data to run it on: arrays or tensors with the samples first, an iterable of batches such as a ``DataLoader``, or
        the path of an ``.npz`` file or of a folder of images; see :func:`qvis.data.load_batches`. Without data, inputs
        are made up in the shapes of ``example_inputs``, and the finding is marked as such.
    example_inputs
        Inputs of which only shapes and types are used: arrays, a shape such as ``(1, 3, 224, 224)``, or text such as
        ``"input_ids=1x128:int64"``. Needed without data only.
    labels
        What the loss compares the outputs with; those that come with the data by default.
    loss
        Judge a loss instead of the outputs: ``"cross_entropy"``, ``"mse"``, or a function of the framework that takes
        outputs and labels and returns a number for each sample. A damage is then the mean square change of the loss,
        relative to its mean square.
    bits
        Widths of the grids, 2 to 16. The first is the one that layers are judged by.
    granularity
        ``"tensor"``, ``"channel"`` or both: what shares a step of the grid of weights.
    measure
        ``"all"`` rounds each layer by itself as well, ``"top"`` only those that are predicted to be the worst, to
        confirm. Where nothing can be differentiated, all are measured.
    samples
        Take so many of the data at most.
    probes
        Differentiate each sample up to so many times. Passes are saved when the ranking of the layers has settled.
    fold
        Fold normalizations into the weights before them where the model's graph allows it, as quantizers do.
    selected_layers
        Names or glob patterns; all layers by default.
    name
        What a report calls the model.
    seed
        Of the random numbers: the same seed gives the same figures.
    track
        Shows how far the work has come.

    Raises
    ------
    NotRunnableError
        The model can be read but not run, such as a bare checkpoint.
    BadArgumentError
        Data that the model cannot take, or an argument out of bounds.
    """
    widths = tuple(dict.fromkeys(checked_bits(one) for one in several(bits)))
    granularities = tuple(dict.fromkeys(several(granularity)))
    _check(widths, granularities, measure, samples=samples, probes=probes, seed=seed)
    ready, runner, batches, source = open_model(
        model, inputs, example_inputs, labels=labels, loss=loss, samples=samples, fold=fold, name=name, seed=seed
    )
    if selected_layers is not None:
        # the others run on folded weights as well
        ready = replace(ready, network=adapters.select(ready.network, selected_layers))
    return study_layers(
        ready,
        runner,
        batches,
        passes=spread_passes(batches, probes, seed),
        bits=widths,
        granularities=granularities,
        measure=measure,
        source=source,
        seed=seed,
        loss=loss is not None,
        track=track,
    )


def several(given: Any) -> list[Any]:
    """What was given as one or as several."""
    return list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]


def _check(
    widths: Sequence[int], granularities: Sequence[str], measure: str, *, samples: int, probes: int, seed: int
) -> None:
    if not widths:
        raise BadArgumentError("bits: got none, expected at least one width such as 8")
    for one in granularities or ("",):
        if one not in GRANULARITIES:
            raise BadArgumentError(f"granularity: got {one!r}, expected some of {', '.join(map(repr, GRANULARITIES))}")
    if measure not in MEASURE:
        raise BadArgumentError(f"measure: got {measure!r}, expected one of {', '.join(map(repr, MEASURE))}")
    for name, number, least in (("samples", samples, 1), ("probes", probes, 1), ("seed", seed, 0)):
        check_whole(name, number, least)


def check_whole(name: str, number: object, least: int) -> None:
    """Refuse what is no whole number of ``least`` or more."""
    if isinstance(number, bool) or not isinstance(number, int) or number < least:
        raise BadArgumentError(f"{name}: got {number!r}, expected a whole number of {least} or more")


def study_layers(
    ready: Ready,
    runner: Runner,
    batches: Sequence[Batch],
    *,
    passes: Sequence[Batch],
    bits: Sequence[int],
    granularities: Sequence[str],
    measure: str,
    source: str,
    seed: int = 0,
    loss: bool = False,
    track: Track = silently,
) -> Sensitivity:
    """Find the sensitivity of a model that is ready to be run; :func:`sensitivity` says what the arguments mean.

    ``passes`` are the samples again, in the batches in which they are differentiated; ``source`` says what they are.
    """
    network = ready.network
    study = Study(network, runner, batches, [WeightGrid(width, one) for width in bits for one in granularities], track)
    if not study.layers:
        raise BadArgumentError(f"model: none of its {len(network.layers)} layers can be run on other weights")
    calibrate(study, network)
    outcome = study.differentiate(passes, seed) if runner.differentiable else Outcome()
    if not runner.differentiable:
        measure = "all"  # nothing is predicted that could tell which to measure
    layers = _measure(study, _predict(study, outcome), measure)
    together = _measure_together(study, seed)
    served = set(runner.layers)
    return Sensitivity(
        name=network.name,
        framework=network.framework,
        layers=layers,
        bits=tuple(bits),
        granularities=tuple(granularities),
        evidence=f"measured on {source}" if measure == "all" else f"predicted from {source}",
        samples=study.samples,
        passes=outcome.passes,
        differentiated=study.differentiated,
        settled=outcome.settled,
        agreement=outcome.agreement,
        total=together["weights"],
        total_inputs={bits: value for (bits, _), value in together["inputs"].items()},
        total_both=together["both"],
        notes=(*runner.notes, *ready.notes),
        loss=loss,
        network=network,
        refused=ready.refused,
        skipped=tuple(
            Skipped(one.name, "cannot be run on other weights") for one in network.layers if one.name not in served
        ),
    )


def calibrate(study: Study, network: Network, *, locally: bool = True) -> None:
    """Run all samples; where the model returns no numbers because ``network``, all of it, holds none, say so."""
    try:
        study.calibrate(locally=locally)
    except BadArgumentError as error:
        broken = [layer.name for layer in network.layers if not np.isfinite(layer.weight).all()]
        if not broken:
            raise
        raise BadArgumentError(
            f"model: weights of {listed_names(broken)} are NaN or infinite, and so it returns no numbers; mend them, or"
            " judge the weights alone, without data"
        ) from error


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
        importance = np.zeros(0) if noise is None else noise.by_channel()
        entering = None
        if known is not None:
            mean = known.total / max(known.count, 1)
            by_channel = known.importance / max(study.differentiated, 1)
            entering = InputStatistics(known.low, known.high, mean, by_channel, known.histogram)
        layers.append(
            LayerSensitivity(
                name=layer.name,
                op=layer.op,
                weights=dict(zip(keys, _damages(weights, index), strict=True)) if outcome.passes else {},
                inputs=by_name.get(layer.name, {}),
                without={},
                importance=importance,
                weight_histogram=weight_histogram(study.weights[layer.name], importance),
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


def _measure_together(study: Study, seed: int) -> dict[str, dict[Key, Draws]]:
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
    found: dict[str, dict[Key, Draws]] = {"weights": {}, "inputs": {}, "both": {}}
    draws = study.measure_draws([one[2] for one in changes], seed)
    for (what, key, _), value in zip(changes, draws, strict=True):
        found[what][key] = value
    return found
