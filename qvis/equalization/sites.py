"""Finds every channel of a model that can be multiplied by a number without changing what the model computes.

Cross-layer equalization scales the output channels of one layer and undoes it in the next (Nagel et al., arXiv
1906.04721; Meller et al., arXiv 1902.01917). Here this is done for whole graphs: each channel of each tensor has a
variable, operations tie variables together or fix them at 1 (:mod:`qvis.equalization.flow`), and those that are left
free are the sites: of pairs of layers, chains, residual sums, concatenations and layers that are used several times.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qvis.equalization.flow import LAYERS, Flow
from qvis.errors import BadArgumentError
from qvis.folding import input_channels
from qvis.layers import FloatArray, Graph, IntArray, Layer, Network, Node, Norm, Skipped
from qvis.rewriting import Rewriting

Affine = tuple["FloatArray | None", "FloatArray | None"]
"""The factor and the shift of a normalization, (channels,); None where it has none."""


@dataclass(frozen=True, eq=False)
class Site:
    """Channels that are scaled by the same layers, each by a number of its own."""

    variables: IntArray
    """(channels,)"""
    producers: tuple[str, ...]
    """The layers, and normalizations with a factor, whose outputs are multiplied by the variables."""
    consumers: tuple[str, ...]
    """The layers whose inputs are multiplied by them, so that their weights are divided by them; also normalizations by
    fixed numbers that are not folded."""
    through: tuple[str, ...]
    """The operations between, in the order of the graph, such as ``("relu", "add")``."""

    @property
    def channels(self) -> int:
        """How many there are."""
        return len(self.variables)


@dataclass(frozen=True, eq=False)
class Sites:
    """What can be scaled in a model. The number of a variable is -1 where a channel cannot be scaled."""

    count: int
    """How many variables there are."""
    outputs: Mapping[str, IntArray]
    """By layer, (channels,)."""
    inputs: Mapping[str, IntArray]
    """By layer, (input channels of all groups,); :func:`qvis.folding.input_channels` tells what they are in the matrix.

    One number for all where none can be scaled and it is not known how many there are.
    """
    norms: Mapping[str, tuple[IntArray, IntArray]]
    """By normalization by fixed numbers, what enters and what leaves it; (channels,) each, the same where it is
    folded."""
    affines: Mapping[str, IntArray]
    """By the name of the node of a layer, RMS or group normalization, (channels,): for its factor and shift.

    Also of a ``mul`` of a vector, for its factors.
    """
    shifts: Mapping[str, IntArray]
    """By the name of the node of an ``add`` or ``sub`` of a vector, (channels,): for what it adds."""
    multiplied: Mapping[str, tuple[IntArray, IntArray]]
    """By layer with a multiplication of its own before it: what reaches that, and what enters the layer; (channels,)
    each. It multiplies by the second over the first."""
    sites: tuple[Site, ...]
    skipped: tuple[Skipped, ...]
    """Connections ``A -> B`` between layers that cannot be equalized, and why."""
    calls: Mapping[str, Node]
    """A node that applies each layer."""


def find_sites(
    graph: Graph,
    network: Network,
    folded_norms: Collection[str] = frozenset(),
    affines: Collection[str] | None = None,
    multiplied: Collection[str] = (),
) -> Sites:
    """Find all channels that can be scaled.

    Parameters
    ----------
    graph
        How data flows, with shapes if possible. Beside the attributes that :func:`qvis.folding.find_folds` names, a
        ``split`` may have ``start`` and ``step`` (where the part lies; else all that is split gets one scale, unless
        ``index`` tells), an ``add`` of a constant ``bias_of`` (the layer whose bias this is, along the last axis or
        ``axis``), and an ``add``, ``sub`` or ``mul`` of a vector that can be rewritten ``axis`` (along which it lies).
    network
        The layers, folded or not.
    folded_norms
        The batch normalizations that are folded into layers, so that they only add a number to each channel.
    affines
        The nodes of layer, RMS and group normalizations, and of sums and products with vectors, whose numbers can be
        rewritten; None for all of them.
    multiplied
        Layers of the kind ``linear`` that get a multiplication before them, which sets what enters them free.
    """
    flow = Flow(graph, network, folded_norms, affines, multiplied)
    flow.follow()
    inserted = {name: ids for name, ids in flow.multiplied.items() if len(ids[1]) and name not in flow.refused}
    sources = [*flow.made.values(), *(entering for _, entering in inserted.values())]
    kept = np.intersect1d(_free(flow, sources), _free(flow, flow.taken.values()))

    def number(ids: IntArray) -> IntArray:
        roots = flow.variables.find(ids)
        found = np.searchsorted(kept, roots)
        found[found == len(kept)] = 0
        return np.where(kept[found] == roots, found, -1) if len(kept) else np.full(roots.shape, -1)

    calls = {node.layer: node for node in reversed(graph.nodes) if node.layer in flow.layers}
    outputs, inputs = {}, {}
    for name, layer in flow.layers.items():
        found = flow.outputs.get(name)
        outputs[name] = np.full(_rows(layer, calls.get(name)), -1) if found is None else number(found)
        inputs[name] = number(flow.inputs[name]) if name in flow.inputs else _none(graph, calls.get(name))
    affine = {name: number(ids) for name, ids in flow.affines.items()}
    fixed = {name: (number(entering), number(leaving)) for name, (entering, leaving) in flow.norms.items()}
    made = {**outputs, **{name: number(ids) for name, ids in flow.made.items()}}
    taken = {**inputs, **{name: number(ids) for name, ids in flow.taken.items()}}
    result = Sites(
        count=len(kept),
        outputs=outputs,
        inputs=inputs,
        norms={name: both for name, both in fixed.items() if any(np.any(ids >= 0) for ids in both)},
        affines={name: ids for name, ids in affine.items() if np.any(ids >= 0)},
        shifts={name: ids for name in flow.shifts if np.any((ids := number(flow.shifts[name])) >= 0)},
        multiplied={name: (number(reaching), number(entering)) for name, (reaching, entering) in inserted.items()},
        sites=(),
        skipped=tuple(_skipped(flow, made, taken)),
        calls=calls,
    )
    passed = [
        (node.op, number(flow.tensors[node.name].ids))
        for node in graph.nodes
        if node.op not in (*LAYERS, "input", "output", "identity", "dropout") and not flow.end_of(node)
    ]
    return replace(result, sites=tuple(_group(result.count, made, taken, passed)))


def _free(flow: Flow, arrays: Iterable[IntArray]) -> IntArray:
    return flow.variables.free(np.concatenate([np.zeros(0, np.intp), *arrays]))


def _rows(layer: Layer, call: Node | None) -> int:
    """The number of output channels, without reading the weight if the graph tells it."""
    if call is not None and call.op in LAYERS and call.shape and not call.attributes.get("transposed"):
        return int(call.shape[call.attributes.get("channel_axis", -1)])
    return len(layer.weight)


def _none(graph: Graph, call: Node | None) -> IntArray:
    """No variables, as many as a layer has input channels; one for each group where that is not known."""
    groups = 1 if call is None else int(call.attributes.get("groups", 1))
    shape = graph.by_name[call.inputs[0]].shape if call is not None and call.inputs and call.op in LAYERS else ()
    if call is not None and shape:
        return np.full(shape[-1 if call.op == "linear" else call.attributes.get("channel_axis", -1)], -1)
    return np.full(groups, -1)


def _group(
    count: int, made: Mapping[str, IntArray], taken: Mapping[str, IntArray], passed: Iterable[tuple[str, IntArray]]
) -> list[Site]:
    """The variables that are made, and used, by the same layers; in the order of their first numbers."""
    labels = np.zeros(count, np.intp)
    fresh = 1
    for ids in (*made.values(), *taken.values()):
        inside = np.unique(ids[ids >= 0])
        names, which = np.unique(labels[inside], return_inverse=True)
        labels[inside] = fresh + which  # apart from the others of the same label
        fresh += len(names)
    passed = [(op, np.unique(ids)) for op, ids in passed]
    found = []
    for label in dict.fromkeys(labels.tolist()):
        variables = np.flatnonzero(labels == label)

        def using(table: Mapping[str, IntArray], first: int = int(variables[0])) -> tuple[str, ...]:
            return tuple(name for name, ids in table.items() if first in ids)

        through = tuple(dict.fromkeys(op for op, ids in passed if np.isin(variables, ids).any()))
        found.append(Site(variables, using(made), using(taken), through))
    return found


def _skipped(flow: Flow, made: Mapping[str, IntArray], taken: Mapping[str, IntArray]) -> list[Skipped]:
    """The connections without a site, one line for all that a layer has for the same reason."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    sources: dict[str, dict[str, None]] = {}
    """The last layers before each result."""
    for node in flow.graph.nodes:
        before = {name: None for one in node.inputs for name in sources[one]}
        users = [name for name in (node.layer, *node.attributes.get("layers", ())) if name]
        users += [name for name in (flow.end_of(node),) if name]
        sources[node.name] = dict.fromkeys(users) if users else before
        for one in before:
            for other in users:
                if other not in flow.multiplied and not _share(made.get(one), taken.get(other)):
                    found.setdefault((one, _reason(flow, one, other)), {})[other] = None
    return [Skipped(f"{one} -> {_listed(list(others))}", reason) for (one, reason), others in found.items()]


def _share(one: IntArray | None, other: IntArray | None) -> bool:
    return one is not None and other is not None and bool(np.isin(one[one >= 0], other).any())


def _reason(flow: Flow, one: str, other: str) -> str:
    """Why nothing can be scaled between two layers."""
    if one in flow.refused:
        return flow.refused[one]
    made, taken = flow.made.get(one), flow.taken.get(other)
    reason = "" if made is None else flow.variables.reason(made)
    if not reason and taken is not None:
        reason = flow.variables.reason(taken)
    return reason or flow.refused.get(other) or "none of its channels reaches the other alone"


def _listed(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]}, {names[1]} and {len(names) - 2} more"


# ---------------------------------------------------------------------------------------------------------------------
# Scaling


def scaled(
    sites: Sites,
    scales: FloatArray,
    layers: Iterable[Layer],
    norms: Mapping[str, Norm] | None = None,
    affines: Mapping[str, Affine] | None = None,
) -> Rewriting:
    """The numbers of a model whose channels are scaled.

    With the scale ``s`` of each channel, weights become ``s[o] W[o, i] / s[i]``, and what a layer or normalization adds
    to its channels ``s[o] b[o]``. What has no scaled channel is left out.

    Parameters
    ----------
    sites
        Where channels can be scaled.
    scales
        A number above 0 for each variable, (count,).
    layers
        The layers with the weights that are to be scaled: folded ones where normalizations are folded.
    norms
        What the normalizations by fixed numbers are before scaling: :attr:`qvis.layers.Graph.norms`, and of folded ones
        :attr:`qvis.folding.Folded.norms`.
    affines
        The factors and shifts of :attr:`Sites.affines` and :attr:`Sites.shifts` before scaling, by node.

    Returns
    -------
    Rewriting
        Its biases are those that the layers keep beside folded normalizations, which add the rest.

    Raises
    ------
    BadArgumentError
        ``scales`` has another shape or a number that is not above 0, or a normalization's numbers are missing.
    """
    scales = np.asarray(scales, np.float64)
    if scales.shape != (sites.count,):
        raise BadArgumentError(f"scales: expected {sites.count} numbers, one for each variable, not {scales.shape}")
    if not (np.all(np.isfinite(scales)) and np.all(scales > 0)):
        worst = scales[~(np.isfinite(scales) & (scales > 0))][0]
        raise BadArgumentError(f"scales: expected finite numbers above 0, got {worst}; 1 leaves a channel as it is")
    whole = np.append(scales, 1.0)  # which is where -1 points
    weights: dict[str, FloatArray] = {}
    biases: dict[str, FloatArray] = {}
    for layer in layers:
        outputs, inputs = sites.outputs.get(layer.name), sites.inputs.get(layer.name)
        if outputs is None or inputs is None or (np.all(outputs < 0) and np.all(inputs < 0)):
            continue
        weight = layer.weight
        columns = input_channels(weight.shape, len(inputs), sites.calls[layer.name])
        new = weight.astype(np.float64) * whole[outputs][:, None] / whole[inputs][columns]
        weights[layer.name] = new.astype(np.result_type(weight.dtype, np.float32))
        bias = (layer.stored or layer).bias
        if bias is not None and np.any(outputs >= 0):
            biases[layer.name] = _times(whole[outputs], bias())
    return Rewriting(
        weights,
        biases,
        {
            name: _scale_norm(_given("norms", name, norms), whole[entering], whole[leaving])
            for name, (entering, leaving) in sites.norms.items()
        },
        {
            name: _scale_affine(_given("affines", name, affines), whole[ids])
            for table in (sites.affines, sites.shifts)
            for name, ids in table.items()
        },
        multiplies={
            name: (whole[entering] / whole[reaching]).astype(np.float32)
            for name, (reaching, entering) in sites.multiplied.items()
        },
    )


def _given(argument: str, name: str, numbers: Mapping[str, Any] | None) -> Any:
    if numbers is None or name not in numbers:
        raise BadArgumentError(f"{argument}: the numbers of {name!r}, which are to be scaled, are missing; give them")
    return numbers[name]


def _times(factors: FloatArray, numbers: FloatArray) -> FloatArray:
    """The product, in float32 where the numbers are not float64."""
    numbers = np.asarray(numbers)
    product: FloatArray = (factors * numbers).astype(np.result_type(numbers.dtype, np.float32))
    return product


def _scale_norm(norm: Norm, entering: FloatArray, leaving: FloatArray) -> Norm:
    """A normalization that takes scaled channels and gives scaled ones; the factor of a folded one stays as it is."""
    return replace(
        norm,
        mean=_times(entering, norm.mean),
        scale=_times(leaving / entering, norm.scale),
        shift=_times(leaving, norm.shift),
    )


def _scale_affine(affine: Affine, factors: FloatArray) -> Affine:
    scale, shift = (None if one is None else _times(factors, one) for one in affine)
    return scale, shift
