"""Equalizes a model: finds what can be scaled, chooses the scales, writes a copy, and proves it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from qvis import adapters
from qvis.analysis import analyze_network
from qvis.analysis.damage import Draws, Key
from qvis.analysis.preparing import Ready, place, prepare, spread_passes
from qvis.analysis.rounding import checked_bits
from qvis.analysis.sensitivity import PROBES, imitated
from qvis.analysis.study import Change, Study
from qvis.data import example_batch, load_batches, split
from qvis.equalization.result import Equalization, Pair, Verification
from qvis.equalization.scales import InputTerm, LayerTerm, Scales, optimal_scales, square_root_scales
from qvis.equalization.sites import Sites, find_sites, scaled
from qvis.errors import BadArgumentError, NoGraphError
from qvis.folding import input_channels
from qvis.layers import FloatArray, Layer, Network, Skipped
from qvis.noise import WeightGrid
from qvis.rewriting import Rewriting
from qvis.running import Batch, Runner, Track, silently

WIDTHS = (8, 6, 4)
GRANULARITIES = ("tensor", "channel")
METHODS = ("noise", "square root")
SAMPLES = 32
KEPT = 1e-5
"""How far outputs may move, relative to the largest."""


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
        Data to run it on; see :func:`qvis.sensitivity`. Without, inputs of the shapes of ``example_inputs`` are made up.
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
    notes: list[str] = []
    batches: Sequence[Batch] = ()
    if inputs is not None:
        batches = load_batches(inputs, samples=samples, notes=notes)
    elif example_inputs is None:
        raise BadArgumentError("inputs: got none; give data, or example_inputs, of which only the shapes are used")
    example = example_batch(example_inputs) if example_inputs is not None else split(batches[0], 2)[0]
    ready = prepare(model, example=example, name=name)
    if ready.network.graph is None:
        raise NoGraphError(f"model: it cannot be equalized, {ready.network.no_graph.removeprefix('no graph: ')}")
    runner = adapters.runner(model, ready.network)
    source = f"{sum(batch.size for batch in batches)} samples"
    if not batches:
        batches, how = imitated(runner, example, samples, seed)
        source = "made-up inputs"
        notes.append(f"No data: the inputs are made up ({how}).")
    ready = place(ready, model, runner, batches[0], name=name)
    return _Work(model, ready, runner, batches, source, bits, granularity, seed, track, notes).equalize(
        method, activations, relu6_as_relu, probes, inplace
    )


class _Work:
    """One model on its way."""

    def __init__(
        self,
        model: Any,
        ready: Ready,
        runner: Runner,
        batches: Sequence[Batch],
        source: str,
        bits: int,
        granularity: str,
        seed: int,
        track: Track,
        notes: list[str],
    ) -> None:
        self.model = model
        self.ready = ready
        self.network = ready.network
        self.batches = batches
        self.source = source
        self.bits = bits
        self.granularity = granularity
        self.seed = seed
        self.track = track
        self.notes = notes
        widths = dict.fromkeys((bits, *WIDTHS))
        self.grids = [WeightGrid(width, one) for width in widths for one in GRANULARITIES]
        self.study = Study(self.network, runner, batches, self.grids, track)

    def equalize(
        self, method: str, activations: bool, relu6_as_relu: bool, probes: int, inplace: bool
    ) -> Equalization:
        """Do it."""
        self.study.calibrate()
        if self.study.runner.differentiable:
            self.study.differentiate(spread_passes(self.batches, probes, self.seed), self.seed, singly=True)
        elif method == "noise":
            raise BadArgumentError(
                f"method: got 'noise', which needs derivatives ({'; '.join(self.study.runner.notes)}); "
                "give 'square root'"
            )
        assert self.network.graph is not None
        folded = frozenset(self.ready.folded.norms) if self.ready.folded else frozenset()
        sites = find_sites(self.network.graph, self.network, folded, relu6_as_relu=relu6_as_relu)
        layers = [self._term(layer, sites) for layer in self.study.layers]
        inputs = self._input_terms(sites) if activations else []
        if method == "noise":
            scales = optimal_scales(sites.count, layers, inputs, self.bits, self.granularity)
        else:
            scales = square_root_scales(sites.count, layers, self.bits, self.granularity)
        before = self.study.measure_draws(self._everything(self.study), self.seed)
        plain = self._rewritten(sites, np.zeros(sites.count), inplace=False)
        result, after, difference = self._try(sites, scales.log_scales)
        index = self.grids.index(WeightGrid(self.bits, self.granularity))
        kept = difference[1] <= KEPT
        accepted = bool(sites.sites) and kept and after[index].mean <= before[index].mean
        if not kept:
            self.notes.append(f"The outputs changed by {difference[1]:.1e} of the largest, more than {KEPT:.0e}.")
        chosen = result if accepted else plain
        if inplace:
            log_scales = scales.log_scales if accepted else np.zeros(sites.count)
            chosen = self._rewritten(sites, log_scales, inplace=True)
        keys: list[Key] = [(grid.bits, grid.granularity) for grid in self.grids]
        largest, relative = difference
        return Equalization(
            model=chosen,
            pairs=_pairs(sites, scales.log_scales) if accepted else [],
            skipped=list(sites.skipped),
            verification=Verification(
                largest,
                relative,
                dict(zip(keys, before, strict=True)),
                dict(zip(keys, after, strict=True)),
                self.study.samples,
                self.source,
            ),
            accepted=accepted,
            method=method,
            bits=self.bits,
            granularity=self.granularity,
            predicted=(scales.before, scales.after),
            before=analyze_network(self.network, bits=self.bits),
            after=analyze_network(adapters.read(chosen, name=f"{self.network.name} equalized"), bits=self.bits),
            notes=(*self.study.runner.notes, *self.ready.notes, *self.notes),
        )
