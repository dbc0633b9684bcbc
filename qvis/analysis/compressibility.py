"""Finds how much smaller each layer of a model can be made, in several ways, and what that does to the output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isfinite
from typing import Any

import numpy as np

from qvis import adapters
from qvis.analysis.answers import why_no_answers
from qvis.analysis.coding import FewerBits
from qvis.analysis.compressing import Compression, Stored
from qvis.analysis.damage import Damage
from qvis.analysis.factorizing import LowRank, why_not
from qvis.analysis.planning import Bench, plan_together
from qvis.analysis.preparing import Ready, open_model, spread_passes
from qvis.analysis.problems import find_flags
from qvis.analysis.pruning import SmallestWeights, TwoOfFour, WholeChannels
from qvis.analysis.rounding import checked_bits, rounding_noise
from qvis.analysis.sensitivity import PROBES, SAMPLES, calibrate, check_whole
from qvis.analysis.sizes import Compressibility, Curve, LayerSizes, Point, plan_trials
from qvis.analysis.statistics import channel_statistics
from qvis.analysis.study import UNSURE, Outcome, Study
from qvis.errors import BadArgumentError
from qvis.layers import FloatArray, Graph, Layer, Network, Skipped, Thresholds
from qvis.noise import Estimate, WeightGrid, combine, round_weight
from qvis.running import Batch, Gradient, Track, silently
from qvis.words import count

WIDTHS = (8, 6, 4, 3, 2)
"""Bits that layers are rounded to, as far as they are no more than the common width."""
BITS = 8
KEEP_DB = 30.0


def compressibility(
    model: Any,
    inputs: Any = None,
    *,
    example_inputs: Any = None,
    labels: Any = None,
    bits: int = BITS,
    keep_db: float = KEEP_DB,
    samples: int = SAMPLES,
    probes: int = PROBES,
    fold: bool = True,
    selected_layers: str | Sequence[str] | None = None,
    name: str | None = None,
    seed: int = 0,
    track: Track = silently,
) -> Compressibility:
    """Find how much smaller each layer can be made: by low rank, by leaving out weights or channels, by fewer bits.

    Predicted for all layers and sizes from the same backward passes, without changing anything.
    :meth:`Compressibility.measure` then makes the most promising ones for real. The model is not changed.

    Parameters
    ----------
    model
        A ``torch.nn.Module``, a Keras or ONNX model, or the path of a file with one.
    inputs
        Data to run it on, as for :func:`qvis.sensitivity`. Without data, inputs are made up.
    example_inputs
        Inputs of which only shapes and types are used. Needed without data only.
    labels
        The classes of the samples, (samples,); those that come with the data by default. With them, and where the
        first output is (samples, classes), measured scores come with the accuracy.
    bits
        The common width, 2 to 16: all that is kept is stored in so many bits, and savings are against the layer in
        this width.
    keep_db
        How many dB of the output are to be left: the damage that is allowed to a layer alone, and to all together.
    samples
        Take so many of the data at most.
    probes
        Differentiate each sample up to so many times.
    fold
        Fold normalizations into the weights before them where the model's graph allows it.
    selected_layers
        Names or glob patterns; all layers by default. The others count as rounded to the common width.
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
    _check(bits, keep_db, samples=samples, probes=probes, seed=seed)
    ready, runner, batches, source = open_model(
        model, inputs, example_inputs, labels=labels, samples=samples, fold=fold, name=name, seed=seed
    )
    whole = ready.network
    if selected_layers is not None:
        ready = replace(ready, network=adapters.select(ready.network, selected_layers))
    widths = (bits, *(width for width in WIDTHS if width < bits))
    study = Study(ready.network, runner, batches, [WeightGrid(width, "channel") for width in widths], track)
    if not study.layers:
        raise BadArgumentError(f"model: none of its {len(ready.network.layers)} layers can be run on other weights")
    calibrate(study, whole, locally=False)
    return _find(study, ready, whole, spread_passes(batches, probes, seed), source, bits, keep_db, seed)


def _check(bits: int, keep_db: float, **least: int) -> None:
    checked_bits(bits)
    if isinstance(keep_db, bool) or not isinstance(keep_db, (int, float)) or not isfinite(keep_db):
        raise BadArgumentError(f"keep_db: got {keep_db!r}, expected a finite number such as {KEEP_DB:g}")
    for name, number in least.items():
        check_whole(name, number, 0 if name == "seed" else 1)


def _find(
    study: Study,
    ready: Ready,
    whole: Network,
    passes: Sequence[Batch],
    source: str,
    bits: int,
    keep_db: float,
    seed: int,
) -> Compressibility:
    runner, graph = study.runner, ready.network.graph
    broken = {name for name, weight in study.weights.items() if not np.isfinite(weight).all()}
    empty = {name for name, weight in study.weights.items() if not np.nan_to_num(weight).any()}
    used = [layer for layer in study.layers if layer.name not in broken | empty]
    ways = {layer.name: Ways(layer, study.weights[layer.name], bits, graph) for layer in study.track(used, "Preparing")}

    def watch(gradient: Gradient, samples: int) -> None:  # noqa: ARG001 (the study keeps them)
        if gradient.layer in ways:
            ways[gradient.layer].see(gradient.weight)

    outcome = study.differentiate(passes, seed, entering=False, watch=watch) if runner.differentiable else Outcome()
    damages = _predict(study, ways, outcome)
    bench = Bench(study, whole, bits)
    baseline, *accuracy = bench.baseline()
    served = set(runner.layers)
    skipped = [
        Skipped(one.name, "cannot be run on other weights") for one in ready.network.layers if one.name not in served
    ]
    skipped += [Skipped(name, "some of its weights are NaN or infinite") for name in study.weights if name in broken]
    skipped += [Skipped(name, "all its weights are zero") for name in study.weights if name in empty - broken]
    notes = [*runner.notes, *ready.notes]
    if not outcome.passes:
        notes.append("The model cannot be differentiated: nothing is predicted, and only what is measured is known.")
    if study.batches[0].labels is not None and not all(isfinite(one) for one in accuracy):
        why = why_no_answers(runner.run(study.batches[0]), study.batches)
        notes.append(f"Answers were not counted: {why}.")
    found = Compressibility(
        name=whole.name,
        framework=whole.framework,
        bits=bits,
        keep_db=float(keep_db),
        layers=tuple(ways[layer.name].describe(layer, damages[layer.name]) for layer in used),
        baseline=baseline,
        accuracy=(accuracy[0], accuracy[1]),
        stored_bytes=sum(study.weights[layer.name].size * _item_bytes(layer) for layer in used),
        samples=study.samples,
        passes=outcome.passes,
        evidence=f"predicted from {source}" if outcome.passes else f"measured on {source}",
        notes=tuple(notes),
        skipped=tuple(skipped),
        run=bench.run,
    )
    bench.curves = {layer.name: layer.curves for layer in found.layers}
    found.trials = plan_trials(found, plan_together(found) if outcome.passes else ())
    return found


def _item_bytes(layer: Layer) -> int:
    """Of one number in the model as it is."""
    with_name = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
    return next((size for word, size in with_name.items() if word in layer.dtype), 4)


# ---------------------------------------------------------------------------------------------------------------------
# Predicting


class Ways:
    """All ways to make one layer smaller."""

    def __init__(self, layer: Layer, weight: FloatArray, bits: int, graph: Graph | None) -> None:
        self.stored = Stored(weight, round_weight(weight, WeightGrid(bits, "channel")), bits)
        self.bits = FewerBits(weight, tuple(sorted({width for width in WIDTHS if width < bits} | {bits})))
        self.refused: dict[str, str] = {}
        kinds: dict[str, type[Compression]] = {"weights": SmallestWeights, "pattern": TwoOfFour}
        if weight.shape[1] < 4:
            self.refused["pattern"] = "it has fewer than four weights for each channel"
        if _is_table(layer, graph):
            self.refused["channels"] = "the rows of a table are its entries, and no channels"
        elif len(weight) < 2:
            self.refused["channels"] = "it has one channel"
        else:
            kinds["channels"] = WholeChannels
        reason = why_not(layer, graph)
        if reason:
            self.refused["rank"] = reason
        else:
            kinds["rank"] = LowRank
        self.changes = {name: make(self.stored) for name, make in kinds.items() if name not in self.refused}
        if "rank" in self.changes and not any(self.changes["rank"].settings):
            self.refused["rank"] = "it is so small that even rank 1 takes no fewer bytes"
            del self.changes["rank"]
        self.seen = np.zeros(len(weight), dtype=bool)
        self.table = _is_table(layer, graph)

    def see(self, gradient: FloatArray) -> None:
        """Take in the gradient of one pass."""
        if not np.isfinite(gradient.sum()):
            gradient = np.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)
        used = gradient.any(axis=1)
        self.seen |= used
        # of a table only the rows that were looked up have a derivative
        rows = slice(None) if used.mean() > 0.5 else np.flatnonzero(used)
        for change in self.changes.values():
            change.see(gradient[rows], rows)

    def describe(self, layer: Layer, damages: Mapping[str, list[Damage]]) -> LayerSizes:
        """The layer's record; ``damages`` are of the options of each method."""
        weight, stored = self.stored.weight, self.stored
        statistics = channel_statistics(weight, quartiles=False)
        thresholds = Thresholds()
        flags = find_flags(statistics, rounding_noise(weight, statistics, bits=stored.bits), thresholds)
        by_bits = damages["rounding"]
        curves = {
            "coding": _curve("coding", self.bits.widths, self.bits.coded, by_bits, self.bits.make),
            "rounding": _curve("rounding", self.bits.widths, self.bits.packed, by_bits, self.bits.make),
        }
        for method, change in self.changes.items():
            curves[method] = _curve(method, change.settings, change.sizes, damages[method], change.make)
        rank = self.changes.get("rank")
        notes = list(layer.notes)
        if self.table and self.seen.any():
            notes.append(f"{int(self.seen.sum()):,} of {count(len(self.seen), 'row')} were looked up")
        elif by_bits and by_bits[0].predicted == 0:
            notes.append("The output did not depend on this layer for these samples")
        return LayerSizes(
            name=layer.name,
            op=layer.op,
            shape=layer.shape,
            weights=weight.size,
            channels=len(weight),
            bytes=stored.bytes,
            damage=by_bits[-1],
            entropies=dict(zip(self.bits.widths, self.bits.entropies, strict=True)),
            zeros=int(np.count_nonzero(stored.rounded == 0)),
            dead=tuple(int(one) for one in flags["dead"]),
            near_dead=tuple(int(one) for one in flags["near_dead"]),
            spectrum=rank.spectrum if isinstance(rank, LowRank) else None,
            curves=curves,
            refused=self.refused,
            notes=tuple(notes),
        )


def _is_table(layer: Layer, graph: Graph | None) -> bool:
    calls = graph.calls.get(layer.name, ()) if graph is not None else ()
    return "embedding" in layer.op.lower() or any(call.op == "embedding" for call in calls)


def _curve(method: str, settings: Sequence[int], sizes: Sequence[int], damages: Sequence[Damage], make: Any) -> Curve:
    """The points, each setting once, the smallest first."""
    found = {
        setting: Point(setting, size, damage)
        for setting, size, damage in zip(settings, sizes, damages, strict=True)
        if setting > 0
    }
    return Curve(method, sorted(found.values(), key=lambda point: (point.bytes, point.setting)), make)


def _predict(study: Study, ways: Mapping[str, Ways], outcome: Outcome) -> dict[str, dict[str, list[Damage]]]:
    """The damage of all options, by layer and method."""
    found: dict[str, dict[str, list[Damage]]] = {name: {} for name in ways}
    for name, one in ways.items():
        importance = study.noise[name].by_channel() if outcome.passes else np.zeros(len(one.stored.weight))
        for change in one.changes.values():
            change.settle(importance)
    if not outcome.passes:
        for name, one in ways.items():
            found[name] = {method: [Damage()] * len(change.settings) for method, change in one.changes.items()}
            found[name]["rounding"] = [Damage()] * len(one.bits.widths)
        return found
    rounded = study.predict_weights()
    for row, layer in enumerate(study.layers):
        if layer.name in found:
            # the study's grids begin with the widest
            found[layer.name]["rounding"] = _damages(rounded, row)[::-1]
    for method in ("weights", "pattern", "channels", "rank"):
        names = [name for name, one in ways.items() if method in one.changes]
        if not names:
            continue
        tables = []
        for name in names:
            noise = study.noise[name]
            samples = np.asarray(noise.samples, dtype=np.float64)
            tables.append(ways[name].changes[method].estimates(np.stack(noise.importance), samples))
        diagonal, projected, coarse = (np.stack(one) for one in zip(*tables, strict=True))
        estimate = combine(diagonal, projected)
        spread = np.where(coarse > 0.5, np.maximum(estimate.spread, UNSURE), estimate.spread)
        for row, name in enumerate(names):
            found[name][method] = _damages(Estimate(estimate.damage, spread), row)
    return found


def _damages(estimate: Estimate, row: int) -> list[Damage]:
    return [Damage(float(d), float(s)) for d, s in zip(estimate.damage[row], estimate.spread[row], strict=True)]
