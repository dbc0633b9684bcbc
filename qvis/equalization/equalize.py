"""Equalizes a model: finds what can be scaled, chooses the scales, writes a copy, and proves it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from qvis import adapters
from qvis.analysis import analyze_network
from qvis.analysis.damage import Draws, Key
from qvis.analysis.preparing import Opened, open_model, spread_passes
from qvis.analysis.rounding import checked_bits
from qvis.analysis.sensitivity import PROBES
from qvis.analysis.study import Change, Study
from qvis.equalization.result import KEPT, Equalization, Pair, Verification
from qvis.equalization.scales import Scales, assess_scales, optimal_scales
from qvis.equalization.sites import Sites, find_sites, scaled
from qvis.equalization.square_root import square_root_scales
from qvis.equalization.terms import InputTerm, LayerTerm
from qvis.errors import BadArgumentError, NoGraphError
from qvis.layers import FloatArray, IntArray, Layer, Node
from qvis.noise import WeightGrid
from qvis.running import Track, silently

WIDTHS = (8, 6, 4)
GRANULARITIES = ("tensor", "channel")
METHODS = ("noise", "square root")
SAMPLES = 32


def equalize(
    model: Any,
    inputs: Any = None,
    *,
    example_inputs: Any = None,
    bits: int = 8,
    granularity: str = "tensor",
    activations: bool = False,
    method: str = "noise",
    relu6_as_relu: bool = False,
    samples: int = SAMPLES,
    probes: int = PROBES,
    name: str | None = None,
    inplace: bool = False,
    seed: int = 0,
    track: Track = silently,
) -> Equalization:
    """Scale channels between the layers of a model so that rounding them does least damage to its output.

    What a layer multiplies its output channels by, the next one divides its input channels by: the model computes the
    same, and rounds better. The scales are those with the least damage by the noise model (:mod:`qvis.noise`); they are
    only kept where the measured damage, averaged over draws of the rounding, does not grow. Normalizations are folded
    first.

    Parameters
    ----------
    model
        A ``torch.nn.Module``, a Keras or ONNX model, or the path of a file with one.
    inputs
        Data to run it on; see :func:`qvis.sensitivity`. Without, inputs are made up like ``example_inputs``.
    example_inputs
        Inputs of which only shapes and types are used. Needed without data only.
    bits, granularity
        The grid of the weights to equalize for: its width, and ``"tensor"`` or ``"channel"``.
    activations
        Make the noise of rounded activations small as well, at the same width.
    method
        ``"noise"``, or ``"square root"`` for the rule of Nagel et al. (arXiv 1906.04721, eq. 11), for comparison.
    relu6_as_relu
        Scale through ReLU6 and other clips as if they were ReLU. The model then has to have them replaced; the outputs
        tell whether its function is kept.
    samples, probes, seed
        See :func:`qvis.sensitivity`.
    name
        What a report calls the model.
    inplace
        Write into the given model instead of a copy.
    track
        Shows how far the work has come.

    Raises
    ------
    NoGraphError
        How data flows through the model is not known.
    NotRunnableError
        The model cannot be run.
    BadArgumentError
        An argument is out of bounds.
    """
    bits = checked_bits(bits)
    for argument, value, known in (("granularity", granularity, GRANULARITIES), ("method", method, METHODS)):
        if value not in known:
            raise BadArgumentError(f"{argument}: got {value!r}, expected one of {', '.join(map(repr, known))}")
    opened = open_model(model, inputs, example_inputs, samples=samples, name=name, seed=seed)
    network = opened.ready.network
    if network.graph is None:
        raise NoGraphError(f"model: it cannot be equalized, {network.no_graph.removeprefix('no graph: ')}")
    work = _Work(model, opened, WeightGrid(bits, granularity), seed, track)
    return work.equalize(method, activations, relu6_as_relu, probes, inplace)


class _Work:
    """One model on its way."""

    def __init__(self, model: Any, opened: Opened, judged: WeightGrid, seed: int, track: Track) -> None:
        self.model = model
        self.ready, runner, self.batches, self.source = opened
        self.network = self.ready.network
        self.judged = judged
        self.seed = seed
        self.track = track
        self.notes: list[str] = []
        widths = dict.fromkeys((judged.bits, *WIDTHS))
        self.grids = [WeightGrid(width, one) for width in widths for one in GRANULARITIES]
        self.study = Study(self.network, runner, self.batches, self.grids, track)

    def equalize(
        self, method: str, activations: bool, relu6_as_relu: bool, probes: int, inplace: bool
    ) -> Equalization:
        """Do it all."""
        graph, study, folded = self.network.graph, self.study, self.ready.folded
        assert graph is not None
        study.calibrate()
        if study.runner.differentiable:
            study.differentiate(spread_passes(self.batches, probes, self.seed), self.seed, singly=True)
        elif method == "noise":
            why = "; ".join(study.runner.notes)
            raise BadArgumentError(f"method: got 'noise', which needs derivatives ({why}); give 'square root'")
        norms = frozenset(folded.norms) if folded else frozenset()
        self.affines = adapters.affines(self.model)
        sites = find_sites(graph, self.network, norms, relu6_as_relu, self.affines)
        scales = self._choose(sites, method, activations)
        before = self._measure(study)
        none = np.ones(sites.count)
        plain = self._write(sites, none)
        equalized = self._write(sites, scales.factors) if sites.sites else plain
        largest, relative, after = self._try(equalized)
        judged = (self.judged.bits, self.judged.granularity)
        if relative > KEPT:
            self.notes.append(f"Left out: the outputs changed by {relative:.1e} of the largest, more than {KEPT:.0e}.")
        accepted = bool(sites.sites) and relative <= KEPT and after[judged].mean <= before[judged].mean
        chosen = equalized if accepted else plain
        if inplace:
            chosen = self._write(sites, scales.factors if accepted else none, inplace=True)
        new = adapters.read(chosen, name=f"{self.network.name} equalized")
        return Equalization(
            model=chosen,
            pairs=_pairs(sites, scales.factors) if accepted else [],
            skipped=list(sites.skipped),
            verification=Verification(largest, relative, before, after, study.samples, self.source),
            found=len(sites.sites),
            accepted=accepted,
            method=method,
            bits=self.judged.bits,
            granularity=self.judged.granularity,
            predicted=(scales.before.total, scales.after.total),
            before=analyze_network(self.network, bits=self.judged.bits),
            after=analyze_network(new, bits=self.judged.bits),
            notes=(*study.runner.notes, *self.ready.notes, *self.notes),
        )

    # -- the scales ---------------------------------------------------------------------------------------------------

    def _choose(self, sites: Sites, method: str, activations: bool) -> Scales:
        """The scales by the noise model or by the square-root rule."""
        usable = {layer.name for layer in self.study.layers} & set(sites.calls)
        order = [node.layer for node in self.network.graph.nodes if node.layer in usable]  # type: ignore[union-attr]
        known = {layer.name: layer for layer in self.study.layers}
        layers = [self._term(known[name], sites) for name in dict.fromkeys(order)]
        inputs = [self._input_term(name, sites) for name in self.study.entering if name in usable]
        inputs = inputs if activations else []
        grid = self.judged
        if method == "noise":
            return optimal_scales(sites.count, layers, inputs, grid.bits, grid.granularity)
        x = square_root_scales(sites.count, layers)
        return assess_scales(x, layers, inputs, grid.bits, grid.granularity)

    def _term(self, layer: Layer, sites: Sites) -> LayerTerm:
        """A layer's weights by pairs of channels."""
        assert self.network.graph is not None
        call = sites.calls[layer.name]
        weight, noise = self.study.weights[layer.name], self.study.noise.get(layer.name)
        outputs, inputs = sites.outputs[layer.name], sites.inputs[layer.name]
        groups = int(call.attributes.get("groups", 1))
        columns = len(inputs) // groups
        each = noise.each if noise is not None and noise.each is not None else np.zeros_like(weight)
        importance = by_pair(each.astype(np.float64), columns, call).sum(axis=2) / max(1, self.study.differentiated)
        magnitude = np.abs(by_pair(np.nan_to_num(weight), columns, call)).max(axis=2)
        return LayerTerm.of(layer.name, outputs, inputs, magnitude.astype(np.float64), importance, groups=groups)

    def _input_term(self, name: str, sites: Sites) -> InputTerm:
        known, variable = self.study.entering[name], sites.inputs[name]
        if len(variable) != len(known.low):  # as with a layer after a flatten in another order
            empty: IntArray = np.zeros(0, dtype=np.intp)
            return InputTerm(name, empty, np.zeros(0), np.zeros(0))
        span = np.maximum(known.high, 0) - np.minimum(known.low, 0)
        return InputTerm(name, variable, span.astype(np.float64), known.importance / max(1, self.study.differentiated))

    # -- the model ----------------------------------------------------------------------------------------------------

    def _write(self, sites: Sites, factors: FloatArray, *, inplace: bool = False) -> Any:
        """A model with these scales, and all normalizations folded."""
        folded = self.ready.folded
        norms = dict(folded.norms) if folded else {}
        new = scaled(sites, factors, self.network.layers, norms, self.affines)
        new = replace(new, weights={**(folded.weights if folded else {}), **new.weights}, norms={**norms, **new.norms})
        model, notes = adapters.rewrite(self.model, self.network, new, inplace=inplace)
        self.notes += [note for note in notes if note not in self.notes]
        return model

    def _try(self, equalized: Any) -> tuple[float, float, dict[Key, Draws]]:
        """How far the outputs of another model are from those of the given one, and what rounding does to it."""
        network = adapters.read(equalized)
        runner = adapters.runner(equalized, network)
        largest = worst = 0.0
        self.study.runner.place({}, {})
        for batch in self.batches:
            for one, other in zip(self.study.runner.run(batch), runner.run(batch), strict=True):
                worst = max(worst, float(np.max(np.abs(one.astype(np.float64) - other), initial=0.0)))
                largest = max(largest, float(np.max(np.abs(one), initial=0.0)))
        study = Study(network, runner, self.batches, self.grids, self.track)
        study.power = self.study.power
        return worst, worst / largest if largest else worst, self._measure(study)

    def _measure(self, study: Study) -> dict[Key, Draws]:
        """The damage of all weights rounded at once."""
        names = [layer.name for layer in study.layers]
        draws = study.measure_draws([Change(dict.fromkeys(names, grid)) for grid in self.grids], self.seed)
        return {(grid.bits, grid.granularity): one for grid, one in zip(self.grids, draws, strict=True)}


def by_pair(matrix: FloatArray, columns: int, call: Node) -> FloatArray:
    """``(rows, elements) -> (rows, columns, places)``: the numbers of each pair of an output and an input channel."""
    last = call.attributes.get("columns") == "channels last"
    pairs: FloatArray = matrix.reshape((len(matrix), -1, columns) if last else (len(matrix), columns, -1))
    return pairs.swapaxes(1, 2) if last else pairs


def _pairs(sites: Sites, factors: FloatArray) -> list[Pair]:
    return [Pair(one.producers, one.consumers, one.through, factors[one.variables]) for one in sites.sites]
