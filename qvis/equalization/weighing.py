"""Weighs channels: what a study found out about layers, by the pairs of channels that scales are chosen for."""

from __future__ import annotations

import numpy as np

from qvis.analysis.study import Study
from qvis.equalization.sites import Sites
from qvis.equalization.terms import InputTerm, LayerTerm
from qvis.layers import FloatArray, Graph, IntArray, Node


def weigh_layers(study: Study, sites: Sites, graph: Graph) -> list[LayerTerm]:
    """The weights of all layers that a graph shows, in the order in which data flows through them."""
    known = {layer.name for layer in study.layers} & set(sites.calls)
    order = dict.fromkeys(node.layer for node in graph.nodes if node.layer in known)
    return [weigh_layer(study, sites, name) for name in order]


def weigh_layer(study: Study, sites: Sites, name: str) -> LayerTerm:
    """The weights of one layer."""
    groups = int(sites.calls[name].attributes.get("groups", 1))
    return LayerTerm(name, sites.outputs[name], sites.inputs[name], *weigh_pairs(study, sites, name), groups)


def weigh_pairs(study: Study, sites: Sites, name: str) -> tuple[FloatArray, FloatArray]:
    """Magnitude and importance of a layer's pairs of channels, (rows, columns); 0 without passes."""
    call = sites.calls[name]
    columns = len(sites.inputs[name]) // int(call.attributes.get("groups", 1))
    weight, noise = study.weights[name], study.noise.get(name)
    magnitude = np.abs(by_pair(np.nan_to_num(weight), columns, call)).max(axis=2).astype(np.float64)
    if noise is None or noise.each is None:
        return magnitude, np.zeros_like(magnitude)
    # in float64 from the start: the squares of small derivatives leave float32
    importance = by_pair(noise.each, columns, call).sum(axis=2, dtype=np.float64) / max(1, study.differentiated)
    return magnitude, importance


def weigh_inputs(study: Study, sites: Sites) -> list[InputTerm]:
    """What enters the layers."""
    return [_weigh_input(study, sites, name) for name in study.entering if name in sites.calls]


def _weigh_input(study: Study, sites: Sites, name: str) -> InputTerm:
    known, variable = study.entering[name], sites.inputs[name]
    if len(variable) != len(known.low):  # as with a layer after a flatten in another order
        empty: IntArray = np.zeros(0, dtype=np.intp)
        return InputTerm(name, empty, np.zeros(0), np.zeros(0))
    span = np.maximum(known.high, 0) - np.minimum(known.low, 0)
    return InputTerm(name, variable, span.astype(np.float64), known.importance / max(1, study.differentiated))


def by_pair(matrix: FloatArray, columns: int, call: Node) -> FloatArray:
    """``(rows, elements) -> (rows, columns, places)``: the numbers of each pair of an output and an input channel."""
    last = call.attributes.get("columns") == "channels last"
    pairs: FloatArray = matrix.reshape((len(matrix), -1, columns) if last else (len(matrix), columns, -1))
    return pairs.swapaxes(1, 2) if last else pairs
