"""The scales of qvis's square-root rule for exactly those pairs of layers that AIMET scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qvis.analysis.preparing import prepare
from qvis.data import example_batch
from qvis.equalization.sites import Sites, find_sites
from qvis.equalization.square_root import square_root_scales
from qvis.equalization.terms import LayerTerm
from qvis.equalization.weighing import by_pair
from qvis.layers import Layer

Pairs = Mapping[tuple[str, str], Sequence[float]]
"""The scales of the outputs of the first layer, by the names of both."""


def scale_gaps(model: Any, example: Any, theirs: Pairs) -> dict[tuple[str, str], float]:
    """By how much the scales of each pair differ at most, relative to AIMET's; without pairs that qvis does not scale.

    All other channels are left alone, and the layers gone over once, since that is what AIMET does.
    """
    ready = prepare(model, example=example_batch(example))
    network = ready.network
    assert network.graph is not None
    sites = find_sites(network.graph, network, frozenset(ready.folded.norms if ready.folded else ()))
    known = {
        (site.producers[0], site.consumers[0]): site.variables
        for site in sites.sites
        if len(site.producers) == len(site.consumers) == 1
    }
    both = {pair: known[pair] for pair in theirs if pair in known and len(known[pair]) == len(theirs[pair])}
    scaled = np.zeros(sites.count + 1, bool)  # the last is where -1 points
    for variables in both.values():
        scaled[variables] = True
    calls = [node.layer for node in network.graph.nodes if node.layer in sites.calls]
    layers = {layer.name: layer for layer in network.layers}
    terms = [term_of(layers[name], sites, scaled) for name in dict.fromkeys(calls)]
    factors = np.exp(square_root_scales(sites.count, terms, sweeps=1))
    return {
        pair: float(np.max(np.abs(factors[variables] / np.array(theirs[pair]) - 1))) for pair, variables in both.items()
    }


def term_of(layer: Layer, sites: Sites, scaled: Any) -> LayerTerm:
    """The layer with only those variables that are scaled."""
    call = sites.calls[layer.name]
    outputs, inputs = (np.where(scaled[ids], ids, -1) for ids in (sites.outputs[layer.name], sites.inputs[layer.name]))
    groups = int(call.attributes.get("groups", 1))
    magnitude = np.abs(by_pair(layer.weight.astype(np.float64), len(inputs) // groups, call)).max(axis=2)
    return LayerTerm(layer.name, outputs, inputs, magnitude, np.zeros_like(magnitude), groups)
