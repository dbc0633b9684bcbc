"""Finds what each layer of a quantized file loses while it runs in its engine, beside the baseline's layers.

A layer of the file is found in the baseline by its weights (:mod:`qvis.analysis.matching`). The baseline runs with its
normalizations folded, as they are in the file; what the engine has fused into a layer is done to the baseline's output
too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from qvis.analysis import analyze_network
from qvis.analysis.matching import match_layers
from qvis.analysis.preparing import open_model, prepare
from qvis.benchmarking.contenders import Contender, first_line, gather
from qvis.benchmarking.records import LayerError
from qvis.data import split
from qvis.errors import QvisError
from qvis.folding import Folded
from qvis.layers import Analysis, FloatArray, Network, decibels
from qvis.quantization.engines import Looked
from qvis.running import Batch, Passage, Runner
from qvis.words import count, listed_names

SAMPLES = 64
"""So many are looked at."""
TOGETHER = 16
"""So many at once, since the outputs of all layers are in memory."""
ACTIVATIONS: Mapping[str, Callable[[FloatArray], FloatArray]] = {
    "": lambda values: values,
    "relu": lambda values: np.maximum(values, 0),
    "relu6": lambda values: np.clip(values, 0, 6),
}
"""What engines fuse into layers. Doing it twice changes nothing."""


@dataclass(frozen=True)
class Layers:
    """The errors of a file's layers."""

    errors: tuple[LayerError, ...] = ()
    """In the baseline's order."""
    no_layers: str = ""
    """Why there are none."""
    notes: tuple[str, ...] = ()


class Reference:
    """The baseline, ready to show what its layers put out."""

    def __init__(self, contender: Contender, batch: Batch) -> None:
        self.contender = contender
        self.runner: Runner | None = None
        self.folded: Folded | None = None
        try:
            opened = open_model(contender.model, contender.arrange(batch), None, samples=batch.size)
            opened.runner.run(opened.batches[0])
        except QvisError:
            # its engine may let one look where qvis cannot run it by itself
            if not hasattr(contender.engine, "look"):
                raise
            network = read(contender.model)
        else:
            network, self.runner = opened.ready.network, opened.runner
            self.folded = opened.ready.folded if any(layer.norms for layer in network.layers) else None
        self.network = network
        self.unfolded = _before_norms(network)
        self.analysis = analyze_network(network)
        self.rows = {layer.name: layer.statistics.min.size for layer in self.analysis.layers}

    def look(self, batch: Batch, *, folded: bool = True) -> dict[str, list[Looked]]:
        """What each call of each layer put out; ``folded`` with the normalizations that are folded into it."""
        batch = self.contender.arrange(batch)
        if self.runner is None:
            return {name: [one] for name, one in look(self.contender, batch).items()}
        found: dict[str, list[Looked]] = {}

        def watch(passage: Passage) -> None:
            shown = self._shown(passage, folded)
            found.setdefault(passage.layer, []).append(shown)

        if self.folded is not None:
            self.runner.place(*((self.folded.weights, self.folded.norms) if folded else ({}, {})))
        self.runner.run(batch, watch=watch)
        return found

    def _shown(self, passage: Passage, folded: bool) -> Looked:
        values = passage.outputs
        axis = _channel_axis(passage, self.rows.get(passage.layer, 0))
        if folded and self.folded is not None:
            shape = [1] * values.ndim
            shape[axis] = -1
            for fold in self.folded.folds:
                if fold.layer == passage.layer and fold.direction == "backward":
                    # what folding leaves to the normalization: adding a number to each channel
                    norm = self.folded.norms[fold.norm]
                    gain = norm.scale / np.sqrt(norm.variance + norm.epsilon)
                    values = values * gain.reshape(shape) + (norm.shift - norm.mean * gain).reshape(shape)
        return Looked(values, axis)


def _before_norms(network: Network) -> set[str]:
    """The layers with a normalization right behind them that is not folded."""
    graph = network.graph
    folded = {norm for layer in network.layers for norm in layer.norms}
    if graph is None:
        return set()
    norms = [node for node in graph.nodes if node.op == "batch_norm" and node.name.partition("@")[0] not in folded]
    return {graph.by_name[node.inputs[0]].layer for node in norms} - {""}


def _channel_axis(passage: Passage, rows: int) -> int:
    """The axis of a layer's output channels: where its input channels are, else the last that has their number."""
    shape = passage.outputs.shape
    candidates = (passage.axis, -1, 1) if passage.inputs.ndim == len(shape) else (-1, 1)
    fitting = [axis for axis in candidates if -len(shape) <= axis < len(shape) and shape[axis] == rows]
    return fitting[0] % len(shape) if fitting else len(shape) - 1


def read(model: Any) -> Network:
    """The layers of a file or model, with normalizations folded where its graph is known."""
    return prepare(model).network


def look(contender: Contender, batch: Batch) -> Mapping[str, Looked]:
    """What the engine shows of the layers."""
    found: Mapping[str, Looked] = contender.engine.look(batch)  # type: ignore[attr-defined]
    return found


@dataclass
class Sums:
    """Power and noise of one layer's channels, (channels,)."""

    power: FloatArray
    noise: FloatArray

    def add(self, exact: FloatArray, found: FloatArray) -> None:
        """Rows (positions, channels) of both."""
        exact = exact.astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            self.power += np.square(exact).sum(axis=0)
            self.noise += np.square(exact - found).sum(axis=0)

    @property
    def sqnr_db(self) -> float:
        """Of all channels together."""
        return decibels(float(self.power.sum()), float(self.noise.sum()))

    @property
    def channels(self) -> FloatArray:
        """Of each channel, (channels,)."""
        return np.array([decibels(*pair) for pair in zip(self.power.tolist(), self.noise.tolist(), strict=True)])


@dataclass
class Comparer:
    """Compares the layers of one file with the baseline's, over several batches."""

    sums: dict[tuple[str, str], list[Sums]] = field(default_factory=dict)
    """By the names in the baseline and in the file; one for each way in which the baseline shows a layer."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Why, by the name in the file."""

    def add(self, name: str, ways: Sequence[Sequence[Looked]], found: str, seen: Looked | None) -> None:
        """Take in what the baseline's layer ``name`` and the file's layer ``found`` put out.

        There are two ways where it is not known whether the file shows a layer before or behind its normalization.
        """
        why = _why_not(ways, seen)
        if why or seen is None:
            self.left_out[found] = why
            return
        pairs = [_rows(way[0], seen) for way in ways]
        if any(ours.shape != theirs.shape for ours, theirs in pairs):
            (positions, channels), (other_positions, other_channels) = (one.shape for one in pairs[0])
            self.left_out[found] = (
                f"it puts out {other_positions} × {other_channels} numbers where the baseline puts out "
                f"{positions} × {channels}"
            )
            return
        if (name, found) not in self.sums:
            self.sums[name, found] = [Sums(*np.zeros((2, ours.shape[1]))) for ours, _ in pairs]
        for sums, (ours, theirs) in zip(self.sums[name, found], pairs, strict=True):
            sums.add(ours, theirs)

    def errors(self, ops: Mapping[str, str]) -> tuple[LayerError, ...]:
        """The layers in the order of ``ops``, which has the kind of each of the baseline's."""
        order = {name: place for place, name in enumerate(ops)}
        errors = []
        for (name, found), ways in sorted(self.sums.items(), key=lambda item: order[item[0][0]]):
            if found not in self.left_out:
                sums = max(ways, key=lambda one: np.nan_to_num(one.sqnr_db, nan=-np.inf))
                errors.append(LayerError(name, found, ops[name], sums.sqnr_db, sums.channels))
        return tuple(errors)


def _why_not(ways: Sequence[Sequence[Looked]], seen: Looked | None) -> str:
    """Why a layer cannot be compared; empty where it can."""
    if seen is None:
        return "the engine does not show what it puts out"
    if not all(ways):
        return "the baseline does not show what it puts out"
    if any(len(way) > 1 for way in ways):
        return "it is called several times"
    unknown = [one.activation for one in (*(way[0] for way in ways), seen) if one.activation not in ACTIVATIONS]
    return f"{unknown[0]} is fused into it" if unknown else ""


def _rows(exact: Looked, seen: Looked) -> tuple[FloatArray, FloatArray]:
    """Both with a row for each position, behind what is fused into either of them."""
    first, second = ACTIVATIONS[exact.activation], ACTIVATIONS[seen.activation]
    return first(second(rows_of(exact))), first(second(rows_of(seen)))


def rows_of(looked: Looked) -> FloatArray:
    """What a layer put out, with a row for each position, (positions, channels)."""
    values = np.moveaxis(looked.values, looked.axis, -1)
    return values.reshape(-1, values.shape[-1])


def compare_layers(reference: Reference | str, contender: Contender, batches: Sequence[Batch]) -> Layers:
    """The error of each layer of a file. Nothing is raised: where it cannot be found, it is said why.

    Parameters
    ----------
    reference
        The baseline, or why its layers cannot be looked at.
    contender
        The file in its engine.
    batches
        The data.
    """
    if not hasattr(contender.engine, "look"):
        return Layers(no_layers=f"{contender.engine.name} does not show what single layers put out")
    if isinstance(reference, str):
        return Layers(no_layers=reference)
    try:
        return _compare(reference, contender, batches)
    except Exception as error:  # a model that ran must not fail for being looked at
        return Layers(no_layers=first_line(error))


def open_reference(contender: Contender, batches: Sequence[Batch]) -> Reference | str:
    """The baseline, ready to be looked at, or why that cannot be."""
    try:
        return Reference(contender, gather(batches, min(TOGETHER, batches[0].size)))
    except Exception as error:  # the same
        return f"the layers of the baseline cannot be looked at: {first_line(error)}"


def _compare(reference: Reference, contender: Contender, batches: Sequence[Batch]) -> Layers:
    network = read(contender.model)
    pairs, names = _match(reference.analysis, analyze_network(network))
    if not pairs:
        return Layers(no_layers="no layer of it is known again in the baseline by its weights")
    # a file that has its normalizations still may show what comes before them, or what is behind: the nearer one counts
    normalized = {layer.name for layer in reference.network.layers if layer.norms}
    unfolded = _before_norms(network)
    comparer = Comparer()
    for piece in _pieces(batches, contender.engine.fixed_batch):
        seen = look(contender, contender.arrange(piece))
        exact = reference.look(piece)
        stored = reference.look(piece, folded=False) if normalized else {}
        for name, found in pairs:
            if name in reference.unfolded and found not in unfolded:
                comparer.left_out[found] = "the normalization behind it could not be folded in the baseline"
                continue
            ways = [exact, stored] if name in normalized else [exact]
            comparer.add(name, [way.get(name, ()) for way in ways], found, seen.get(found))
    errors = comparer.errors({layer.name: layer.op for layer in reference.network.layers})
    missing = {**dict.fromkeys(names, "no layer of the baseline has weights like these"), **comparer.left_out}
    notes = [
        f"{count(len(layers), 'layer')} not compared, since {why}: {listed_names(layers)}."
        for why, layers in _by_reason(missing).items()
    ]
    if not errors:
        return Layers(no_layers=next(iter(missing.values())), notes=tuple(notes))
    return Layers(errors, notes=tuple(notes))


def _match(before: Analysis, after: Analysis) -> tuple[list[tuple[str, str]], list[str]]:
    """Pairs of names, and the file's layers without a partner."""
    # as if of two frameworks: by name, and else by weights, since writers rename within a framework too
    pairs, _ = match_layers(replace(before, framework="baseline"), replace(after, framework="file"))
    known = {new.name for _, new in pairs}
    return [(old.name, new.name) for old, new in pairs], [one.name for one in after.layers if one.name not in known]


def _pieces(batches: Sequence[Batch], fixed: int | None) -> list[Batch]:
    whole = gather(batches, min(SAMPLES, sum(batch.size for batch in batches)))
    return [piece if fixed is None else gather([piece], fixed) for piece in split(whole, fixed or TOGETHER)]


def _by_reason(missing: Mapping[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, why in missing.items():
        found.setdefault(why, []).append(name)
    return found
