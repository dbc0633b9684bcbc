"""Folds normalizations by fixed numbers into the layers beside them, as is done before a model is quantized.

A batch normalization ``(x - mean) / sqrt(variance + epsilon) * scale + shift`` is ``gain * x + offset`` for each
channel, and what comes right before or after it is often linear: then the gain belongs to that layer's weight, and it
is the product that gets quantized. See Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference" (arXiv 1712.05877), section 3.2.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from qvis.layers import FloatArray, Graph, Layer, Network, Node, Norm

if TYPE_CHECKING:
    from qvis.running import Batch, Runner


@dataclass(frozen=True)
class Fold:
    """A normalization and the layer that it is folded into."""

    norm: str
    """Its name in :attr:`Graph.norms`."""
    layer: str
    direction: Literal["backward", "forward"]
    """``backward`` into the rows of the layer before it, ``forward`` into the columns of the layer after it."""


@dataclass(frozen=True)
class Folded:
    """A network with normalizations folded into its layers."""

    network: Network
    """Its layers give the folded weights and biases; :attr:`Layer.stored` is the layer as the model holds it."""
    norms: Mapping[str, Norm] = field(default_factory=dict)
    """What each folded normalization must be, so that the model computes the same with the folded weights.

    The layers' own biases stay in the model as they are. What is left for the normalization is to add a number to each
    channel, so that nothing of the model's structure changes.
    """
    folds: tuple[Fold, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    """Why a normalization was not folded, by its name."""

    @property
    def weights(self) -> dict[str, FloatArray]:
        """The weights that are not the model's own any more, (channels, elements) by layer."""
        return {layer.name: layer.weight for layer in self.network.layers if layer.stored is not None}


_PASSED = ("identity", "dropout")
"""What changes no number in evaluation mode."""


def find_folds(graph: Graph, network: Network) -> tuple[tuple[Fold, ...], dict[str, str]]:
    """The normalizations that can be folded, and why the others cannot.

    Parameters
    ----------
    graph
        How data flows. The node of a layer may have the attributes ``bias`` (whether something is added to its
        channels), ``transposed`` (the rows of the layer's matrix are inputs), ``computed`` (the weight that is applied
        is made from the layer's), ``locked`` (why it cannot be written), ``layers`` (several that it applies) and
        ``columns`` (see :func:`input_channels`); that of an ``add`` of a constant ``bias_of`` (the layer whose bias
        this is); that of a normalization ``shift`` (whether it has one, true by default).
    network
        The layers whose weights the nodes apply.

    Returns
    -------
    folds, refused
        Both in the graph's order; ``refused`` by the name of the normalization.
    """
    finder = _Finder(graph, network)
    folds: list[Fold] = []
    refused: dict[str, str] = {}
    for name, nodes in finder.norms.items():
        found = finder.find(name, nodes)
        if isinstance(found, Fold):
            folds.append(found)
        else:
            refused[name] = found
    return tuple(folds), refused


class _Finder:
    def __init__(self, graph: Graph, network: Network) -> None:
        self.graph = graph
        self.layers = {layer.name: layer for layer in network.layers}
        self.norms: dict[str, list[Node]] = {}
        for node in graph.nodes:
            if node.op == "batch_norm":
                self.norms.setdefault(_norm_name(graph, node), []).append(node)
        self.shared = Counter(
            layer for node in graph.nodes for layer in {node.layer, *node.attributes.get("layers", ())} - {""}
        )
        """How many nodes use each layer."""

    def find(self, name: str, nodes: Sequence[Node]) -> Fold | str:
        """Where a normalization can be folded, or why it cannot."""
        norm = self.graph.norms.get(name)
        if norm is None:
            return "its numbers are not known"
        if len(nodes) > 1:
            return f"it is used {len(nodes)} times"
        with np.errstate(all="ignore"):
            gain, offset = _line(norm)
        if not (np.all(np.isfinite(gain)) and np.all(np.isfinite(offset))):
            return _not_finite(norm)
        (node,) = nodes
        if not node.attributes.get("writable", True):
            return "its numbers are not those of a module of its own, and cannot be exchanged"
        backward = self._backward(node, norm)
        if backward is None:
            return Fold(name, self._before(node).layer, "backward")
        forward = self._forward(node, gain)
        if forward is None:
            return Fold(name, self._after(node)[0].layer, "forward")
        return f"{backward}, and {forward}"

    def _before(self, node: Node) -> Node:
        """The node that a node takes from, past those that change nothing."""
        found = self.graph.by_name[node.inputs[0]]
        while self._is_passed(found) and found.inputs:
            found = self.graph.by_name[found.inputs[0]]
        return found

    def _after(self, node: Node) -> tuple[Node, ...]:
        """The nodes that take from a node, past those that change nothing."""
        users = self.graph.users[node.name]
        while len(users) == 1 and self._is_passed(users[0]):
            users = self.graph.users[users[0].name]
        return users

    def _is_passed(self, node: Node) -> bool:
        """Whether a node changes nothing, or adds what is the bias of a layer."""
        layer = self.layers.get(node.attributes.get("bias_of", ""))
        return node.op in _PASSED or (layer is not None and layer.bias is not None)

    def _backward(self, node: Node, norm: Norm) -> str | None:
        """Why the layer before it cannot take the normalization."""
        if not node.inputs:
            return "nothing stands before it"
        source = self._before(node)
        if source.op not in ("conv", "conv_transpose", "linear"):
            return f"{_describe(source)} stands before it"
        users = self._after(source)
        if len(users) > 1:
            return f"what {source.name!r} gives is used {len(users)} times"
        obstacle = self._obstacle(source)
        if obstacle is not None:
            return obstacle
        if not _same_axis(source, source.attributes.get("channel_axis"), node):
            return f"it normalizes another axis than the channels of {source.name!r}"
        rows = len(self.layers[source.layer].weight)
        if rows != len(norm.variance):
            return f"it has {len(norm.variance)} channels where {source.name!r} has {rows}"
        return None

    def _forward(self, node: Node, gain: FloatArray) -> str | None:
        """Why the layer after it cannot take the normalization."""
        users = self._after(node)
        if len(users) != 1:
            return f"what it gives is used {len(users)} times"
        (user,) = users
        if user.op not in ("conv", "linear"):
            return f"{_describe(user)} follows it"
        if len(user.inputs) != 1:
            return f"{user.name!r} after it takes more than its result"
        obstacle = self._obstacle(user)
        if obstacle is not None:
            return obstacle
        if user.op == "conv" and user.attributes.get("padding", True):
            return f"{user.name!r} after it pads with zeros that were not normalized"
        axis = user.attributes.get("channel_axis")
        if not _same_axis(user, axis, node):
            return f"it normalizes another axis than {user.name!r} after it sums over"
        layer = self.layers[user.layer]
        groups = int(user.attributes.get("groups", 1))
        count, elements = len(gain), layer.weight.shape[1]
        fits = count % groups == 0 and elements % (count // groups) == 0
        if not fits or (user.op == "linear" and elements != count):
            return f"its {count} channels do not fit the {elements} columns of {user.name!r} after it"
        if np.any(gain == 0):
            return f"it multiplies a channel by 0, so that what it adds cannot be put before {user.name!r}"
        return None

    def _obstacle(self, node: Node) -> str | None:
        """Why the weight of a node cannot take a normalization, whatever it is."""
        layer = self.layers.get(node.layer)
        if layer is None:
            return f"the weight of {node.name!r} is not among the layers"
        if self.shared[node.layer] > 1 or layer.aliases:
            times = f"{self.shared[node.layer]} times" if self.shared[node.layer] > 1 else "under several names"
            return f"the weight of {node.name!r} is used {times}"
        if node.attributes.get("locked"):
            return f"the weight of {node.name!r} {node.attributes['locked']}"
        if node.attributes.get("computed"):
            return f"{node.name!r} computes its weight anew in each pass"
        if node.attributes.get("transposed"):
            return f"the rows of {node.name!r} are not its output channels"
        if node.attributes.get("bias") and layer.bias is None:
            return f"what {node.name!r} adds to its channels is not known"
        return None


def _norm_name(graph: Graph, node: Node) -> str:
    """The name of a normalization's module: that of the node without the number of the call."""
    plain, mark, number = node.name.rpartition("@")
    return plain if mark and number.isdigit() and node.name not in graph.norms else node.name


def _describe(node: Node) -> str:
    if node.op in ("input", "output"):
        return f"an {node.op} of the model"
    return repr(node.name) if node.op in node.name else f"{node.name!r} ({node.op})"


def _same_axis(node: Node, axis: int | None, norm: Node) -> bool:
    """Whether two channel axes are the same. Without a shape, -1 may be any axis: then the sizes have to tell."""
    other: int | None = norm.attributes.get("channel_axis")
    if axis is None or other is None:
        return False
    rank = len(norm.shape) or len(node.shape)
    if rank:
        return axis % rank == other % rank
    return axis == other or axis < 0 or other < 0


def _not_finite(norm: Norm) -> str:
    """What is wrong with the numbers of a normalization."""
    spread = np.asarray(norm.variance, np.float64) + norm.epsilon
    if not np.all(spread > 0):
        return "variance + epsilon is 0, negative or NaN in some channel"
    return "its mean, scale or shift is NaN or infinite in some channel"


def _line(norm: Norm) -> tuple[FloatArray, FloatArray]:
    """The gain and offset of a normalization, ``gain * x + offset``, in float64."""
    mean, variance, scale, shift = (
        np.asarray(one, np.float64) for one in (norm.mean, norm.variance, norm.scale, norm.shift)
    )
    gain = scale / np.sqrt(variance + norm.epsilon)
    return gain, shift - mean * gain


# ---------------------------------------------------------------------------------------------------------------------
# The folded network


def fold_network(network: Network) -> Folded:
    """The network with every normalization folded that can be.

    With the gain ``g`` and the offset ``o`` of a normalization, and the layer's own ``W`` and ``b``, the folded layer
    is ``diag(g) W`` and ``g b + o`` backward, and ``W diag(g)`` and ``W o + b`` forward. In the model, which keeps
    ``b``, the normalization then has to add ``(g - 1) b + o`` backward and ``o / g`` forward.

    Parameters
    ----------
    network
        A network; without a graph nothing is folded.
    """
    if network.graph is None:
        return Folded(network)
    graph = network.graph
    folds, refused = find_folds(graph, network)
    layers = {layer.name: layer for layer in network.layers}
    norms: dict[str, Norm] = {}
    # Forward first: what a layer adds to its channels then already is what a normalization after it takes.
    for fold in sorted(folds, key=lambda fold: fold.direction, reverse=True):
        norm, layer, stored = graph.norms[fold.norm], layers[fold.layer], layers[fold.layer].stored
        (call,) = graph.calls[fold.layer]
        gain, offset = _line(norm)
        bias = (stored or layer).bias
        if fold.direction == "backward":
            layers[fold.layer] = _fold_rows(layer, fold.norm, gain, offset)
            rest = offset if bias is None else offset + (gain - 1) * np.asarray(bias(), np.float64)
        else:
            layers[fold.layer] = _fold_columns(layer, fold.norm, gain, offset, call)
            rest = offset / gain
        norms[fold.norm] = _adding(norm, rest, graph.by_name[fold.norm])
    folded = replace(network, layers=tuple(layers[layer.name] for layer in network.layers))
    return Folded(folded, {fold.norm: norms[fold.norm] for fold in folds}, folds, refused)


def _adding(norm: Norm, rest: FloatArray, node: Node) -> Norm:
    """A normalization that only adds ``rest``. One that has no shift of its own takes it as its mean."""
    nothing, one = np.zeros_like(rest), np.ones_like(rest)
    shifts = node.attributes.get("shift", True)
    mean, shift = (nothing, rest) if shifts else (-rest, nothing)
    return Norm(norm.name, mean, one - norm.epsilon, one, shift, norm.epsilon)


def _fold_rows(layer: Layer, norm: str, gain: FloatArray, offset: FloatArray) -> Layer:
    """The layer with a normalization of its output channels folded in."""

    def read() -> FloatArray:
        weight = layer.weight
        return _like(weight.astype(np.float64) * gain[:, None], weight)

    def bias() -> FloatArray:
        own = 0.0 if layer.bias is None else np.asarray(layer.bias(), np.float64)
        return gain * own + offset

    return _with(layer, norm, read, bias)


def _fold_columns(layer: Layer, norm: str, gain: FloatArray, offset: FloatArray, call: Node) -> Layer:
    """The layer with a normalization of its input channels folded in."""

    def read() -> FloatArray:
        weight = layer.weight
        channels = input_channels(weight.shape, len(gain), call)
        return _like(weight.astype(np.float64) * gain[channels], weight)

    def bias() -> FloatArray:
        weight = layer.weight.astype(np.float64)
        channels = input_channels(weight.shape, len(gain), call)
        own = 0.0 if layer.bias is None else np.asarray(layer.bias(), np.float64)
        return np.asarray((weight * offset[channels]).sum(1) + own)

    return _with(layer, norm, read, bias)


def input_channels(shape: tuple[int, ...], count: int, call: Node) -> np.ndarray[tuple[int, int], np.dtype[np.intp]]:
    """The input channel that each number of a layer's matrix multiplies, (channels, elements).

    Parameters
    ----------
    shape
        The shape of the matrix.
    count
        How many input channels there are.
    call
        The node that applies the layer. Its attribute ``groups`` tells how many blocks the channels are split into, the
        rows in their order; its attribute ``columns`` whether the numbers of one input channel stand together
        (``"channels first"``, the default) or those of one place of the kernel (``"channels last"``).

    >>> input_channels((2, 4), 2, Node("conv", "conv", attributes={"groups": 1})).tolist()
    [[0, 0, 1, 1], [0, 0, 1, 1]]
    >>> input_channels((2, 4), 2, Node("conv", "conv", attributes={"columns": "channels last"})).tolist()
    [[0, 1, 0, 1], [0, 1, 0, 1]]
    """
    rows, elements = shape
    groups = int(call.attributes.get("groups", 1))
    each = count // groups
    within = np.arange(elements)
    last = call.attributes.get("columns") == "channels last"
    within = within % each if last else within // (elements // each)
    group = np.arange(rows) // (rows // groups)
    found: np.ndarray[tuple[int, int], np.dtype[np.intp]] = group[:, None] * each + within[None, :]
    return found


def _like(folded: FloatArray, weight: FloatArray) -> FloatArray:
    """In float32 where the stored weight is not float64."""
    with np.errstate(over="ignore"):
        folded = folded.astype(np.result_type(weight.dtype, np.float32), copy=False)
    folded.flags.writeable = False
    return folded


def _with(layer: Layer, norm: str, read: Callable[[], FloatArray], bias: Callable[[], FloatArray]) -> Layer:
    return replace(
        layer,
        read=read,
        bias=bias,
        stored=layer.stored or layer,
        norms=(*layer.norms, norm),
        notes=(*layer.notes, f"BatchNorm {norm} folded in"),
        along=None,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Whether it is the same function


def verify(runner: Runner, batches: Sequence[Batch], folded: Folded) -> float:
    """How far the outputs of the model with folded weights are from its own.

    Afterwards the runner stands on the folded weights and normalizations.

    Parameters
    ----------
    runner
        The model, on its own numbers.
    batches
        Samples to run it on.
    folded
        The same model, folded.

    Returns
    -------
    float
        The largest absolute difference over the largest absolute output, of all outputs and batches; infinite where one
        is NaN and the other is not. In float32, more than 1e-5 means that the fold is wrong.
    """
    own = [runner.run(batch) for batch in batches]
    runner.place(folded.weights, folded.norms)
    worst = largest = 0.0
    for batch, expected in zip(batches, own, strict=True):
        for one, other in zip(expected, runner.run(batch), strict=True):
            worst = max(worst, _distance(one, other))
            largest = max(largest, float(np.max(np.abs(one), initial=0.0, where=np.isfinite(one))))
    return worst if worst == 0 else worst / largest if largest else float("inf")


def _distance(one: FloatArray, other: FloatArray) -> float:
    """The largest difference of numbers that are not the same NaN or infinity."""
    with np.errstate(invalid="ignore"):
        difference = np.abs(np.asarray(one, np.float64) - np.asarray(other, np.float64))
    same = (one == other) | (np.isnan(one) & np.isnan(other))
    difference = np.where(same, 0.0, np.where(np.isnan(difference), np.inf, difference))
    return float(np.max(difference, initial=0.0))
