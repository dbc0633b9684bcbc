"""Follows scale variables through a graph: what each operation makes equal, what it fixes, and where it sets free.

An operation may be scaled through where ``f(s x) = s f(x)`` for ``s > 0``, channel by channel; this is the positive
homogeneity that cross-layer equalization rests on (Nagel et al., arXiv 1906.04721, section 4.1; Meller et al., arXiv
1902.01917, section 3). A layer with a weight sets its output free from its input, since both can be put into it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import combinations
from math import nan, prod

import numpy as np

from qvis.equalization.channels import Channels, Variables, compress, reshape
from qvis.layers import Graph, IntArray, Layer, Network, Node

LAYERS = ("conv", "conv_transpose", "linear")
NORMS = ("layer_norm", "rms_norm", "group_norm")
NO_SHAPE = "its shape is not known: give example_inputs"
_ELEMENTWISE = ("relu", "leaky_relu", "prelu", "identity", "dropout")
_POOLS = ("max_pool", "avg_pool")


class Flow:
    """The variables of all tensors of a graph."""

    def __init__(
        self,
        graph: Graph,
        network: Network,
        folded_norms: Collection[str],
        affines: Collection[str] | None,
        relu6_as_relu: bool,
    ) -> None:
        self.graph = graph
        self.layers = {layer.name: layer for layer in network.layers}
        self.folded_norms = folded_norms
        self.writable = affines
        self.relu6_as_relu = relu6_as_relu
        self.by_numpy_rules = not network.framework.startswith("Keras")
        """Whether the last two axes are those that a product of two results, or attention, sums over."""
        self.variables = Variables()
        self.tensors: dict[str, Channels] = {}
        self.outputs: dict[str, IntArray] = {}
        self.inputs: dict[str, IntArray] = {}
        self.norms: dict[str, IntArray] = {}
        self.affines: dict[str, IntArray] = {}
        self._products: list[tuple[Node, Channels, Channels, Channels]] = []
        self.refused: dict[str, str] = {}
        """Why a layer's weight cannot be scaled at all."""
        for name, reason in self._refusals():
            self.refused.setdefault(name, reason)
        self._channel_axes = {
            (len(node.shape), node.attributes["channel_axis"] % len(node.shape))
            for node in graph.nodes
            if node.op in ("conv", "conv_transpose") and node.shape and "channel_axis" in node.attributes
        }
        """(rank, axis) of the channels of images here."""

    def follow(self) -> None:
        """Go through the graph."""
        for node in self.graph.nodes:
            self.tensors[node.name] = self._result(node, [self.tensors[name] for name in node.inputs])
        self._settle_products()

    def _result(self, node: Node, given: list[Channels]) -> Channels:
        if node.op == "input":
            return self._fixed(node, "it is tied to an input of the model")
        if node.op == "output":
            return self._stop(node, given, "its output is an output of the model")
        if node.op in LAYERS and node.layer:
            return self._layer(node, given)
        if node.op in NORMS:
            return self._norm(node, given)
        if not given:
            return self._fixed(node, f"it is tied to the result of {node.op} {node.name!r}")
        rules = {
            **dict.fromkeys(_ELEMENTWISE, self._elementwise),
            **dict.fromkeys((*_POOLS, "resize", "pad"), self._local),
            **dict.fromkeys(("add", "sub"), self._sum),
            **dict.fromkeys(("mul", "div"), self._product),
            **dict.fromkeys(("flatten", "reshape"), self._reshape),
            "clip": self._clip,
            "batch_norm": self._batch_norm,
            "concat": self._concat,
            "split": self._split,
            "transpose": self._transpose,
            "attention": self._attention,
            "matmul": self._matmul,
        }
        rule = rules.get(node.op)
        found = None if rule is None else rule(node, given)
        return self._stop(node, given) if found is None else found

    # -- where scaling ends

    def _fixed(self, node: Node, reason: str) -> Channels:
        ids = self.variables.new(1, reason)
        return Channels(ids.reshape((1,) * len(node.shape)) if node.shape else ids, node.shape)

    def _stop(self, node: Node, given: Sequence[Channels], reason: str = "") -> Channels:
        """What goes in cannot be scaled, nor what comes out."""
        for one in given:
            self.variables.fix(one.ids, reason or f"{node.op} {node.name!r} follows it")
        return self._fixed(node, reason or f"it is tied to the result of {node.op} {node.name!r}")

    def _tie_along(self, ids: IntArray, axis: int) -> IntArray:
        """Make the variables along an axis equal, so that it does not matter what an operation does there."""
        first = ids.take([0], axis)
        if ids.shape[axis] > 1:
            self.variables.tie(ids, first)
        return first

    def _vector(self, tensor: Channels, axis: int) -> IntArray | None:
        """The variables along one axis, made equal along all others; None where it is not known which they are."""
        if not tensor.shape:
            return tensor.ids if tensor.is_uniform or axis == tensor.axis else None
        axis %= len(tensor.shape)
        ids = tensor.ids
        for other in range(ids.ndim):
            if other != axis:
                ids = self._tie_along(ids, other)
        return np.array(np.broadcast_to(ids.ravel(), tensor.shape[axis]))

    # -- layers

    def _refusals(self) -> Iterator[tuple[str, str]]:
        """The layers whose weights cannot be scaled, and why."""
        forms: dict[str, tuple[object, ...]] = {}
        for layer in self.layers.values():
            if layer.aliases:
                yield layer.name, f"the weight of {layer.name!r} is held under several names"
        for node in self.graph.nodes:
            for name in node.attributes.get("layers", ()):
                yield name, f"{node.op} {node.name!r} uses the weight of {name!r} in its own way"
            if not node.layer:
                continue
            form = (node.op, *(node.attributes.get(one) for one in ("groups", "columns")))
            if node.layer not in self.layers:
                yield node.layer, f"the weight of {node.layer!r} is not among the layers"
            elif node.op not in LAYERS:
                yield node.layer, f"{node.op} {node.name!r} uses the weight of {node.layer!r}"
            elif node.attributes.get("computed"):
                yield node.layer, f"the weight of {node.layer!r} is computed anew in each pass"
            elif node.attributes.get("transposed"):
                yield node.layer, f"the rows of the weight of {node.layer!r} are not its output channels"
            elif forms.setdefault(node.layer, form) != form:
                yield node.layer, f"the weight of {node.layer!r} is used in several ways"

    def _layer(self, node: Node, given: list[Channels]) -> Channels:
        """Both what enters a weight and what leaves it can be scaled, each for itself."""
        reason = self.refused.get(node.layer) or self._apply(node, given)
        if not reason:
            return Channels.along(self.outputs[node.layer], node.attributes["channel_axis"], node.shape)
        self.refused.setdefault(node.layer, reason)
        for known in (self.outputs.get(node.layer), self.inputs.get(node.layer)):
            if known is not None:  # of an earlier call
                self.variables.fix(known, reason)
        return self._stop(node, given, reason)

    def _apply(self, node: Node, given: list[Channels]) -> str:
        """Give a layer its variables, the same in all its calls; returns why it can have none."""
        layer, axis = self.layers[node.layer], node.attributes.get("channel_axis")
        if axis is None or len(given) > 1:
            return f"it is not known what {node.name!r} sums over"
        rows = node.shape[axis] if node.shape else len(layer.weight)
        source = given[0] if given else Channels(self.variables.new(1, "it is tied to a constant"))
        columns = self._vector(source, axis if node.op != "linear" else -1)
        count = _input_count(layer, node, source, rows)
        if columns is None or count is None or len(columns) not in (1, count):
            fits = f"the weight of {node.layer!r} does not fit what it takes"
            return fits if node.shape and source.shape else NO_SHAPE
        columns = np.array(np.broadcast_to(columns, count))
        if node.layer not in self.outputs:
            self.inputs[node.layer], self.outputs[node.layer] = columns, self.variables.new(rows)
            if node.attributes.get("bias", True) and (layer.stored or layer).bias is None:
                self.variables.fix(self.outputs[node.layer], f"what {node.name!r} adds to its channels is not known")
        if (len(self.inputs[node.layer]), len(self.outputs[node.layer])) != (count, rows):
            return f"the weight of {node.layer!r} is used in several ways"
        self.variables.tie(self.inputs[node.layer], columns)
        return ""

    # -- normalizations

    def _batch_norm(self, node: Node, given: list[Channels]) -> Channels | None:
        """One that was folded only adds a number to each channel, which then is scaled too."""
        if node.name not in self.folded_norms or len(given) != 1 or node.name not in self.graph.norms:
            return None
        axis = node.attributes.get("channel_axis")
        if axis is None:
            return None
        ids, count = self._vector(given[0], axis), len(self.graph.norms[node.name].shift)
        if ids is None or len(ids) not in (1, count):
            return None if node.shape else self._stop(node, given, NO_SHAPE)
        self.norms[node.name] = np.array(np.broadcast_to(ids, count))
        return Channels.along(ids, axis, node.shape)

    def _norm(self, node: Node, given: list[Channels]) -> Channels:
        """A normalization by the numbers it is given: its scale and shift take what comes after it."""
        result = self._stop(node, given)
        facts = node.attributes
        axes = facts.get("axes", ()) if node.op != "group_norm" else (facts.get("channel_axis"),)
        axis = axes[0] if len(axes) == 1 else None
        calls = [one for one in self.graph.nodes if one.name.partition("@")[0] == node.name.partition("@")[0]]
        is_writable = self.writable is None or node.name in self.writable
        if axis is None or not (facts.get("scale") and node.shape and len(calls) == 1 and is_writable):
            return result
        self.affines[node.name] = self.variables.new(node.shape[axis])
        return Channels.along(self.affines[node.name], axis, node.shape)

    # -- what is homogeneous

    def _elementwise(self, node: Node, given: list[Channels]) -> Channels | None:
        source = given[0]
        if len(given) > 1 or (node.shape != source.shape and not source.is_uniform):
            return None
        return Channels(source.aligned(len(node.shape) or 1), node.shape, source.axis)

    def _clip(self, node: Node, given: list[Channels]) -> Channels | None:
        low, high = (node.attributes.get(one, nan) for one in ("low", "high"))
        bounded = low == 0 and high is not None and high > 0
        if {low, high} <= {0, None} or (bounded and self.relu6_as_relu):
            return self._elementwise(node, given)
        if not bounded:
            return None
        name = "ReLU6" if high == 6 else f"a ReLU up to {high:g}"
        return self._stop(
            node, given, f"clip {node.name!r} is not homogeneous ({name}): replace it by ReLU to equalize here"
        )

    def _local(self, node: Node, given: list[Channels]) -> Channels | None:
        """Pooling, resizing and padding, which may mix places but not channels."""
        source = given[0]
        if len(given) > 1 or (node.op == "pad" and node.attributes.get("value") not in (0, None)):
            return None
        if not (node.shape and source.is_known):
            keeps = not node.shape and (source.is_uniform or (source.axis == 1 and node.op != "pad"))
            return source if keeps else self._stop(node, given, NO_SHAPE)
        if source.is_uniform:
            return Channels(source.aligned(len(node.shape)), node.shape)
        if len(source.shape) != len(node.shape):
            return self._mean(node, source)
        ids, rank = source.ids, len(node.shape)
        changed = [axis for axis in range(rank) if source.shape[axis] != node.shape[axis]]
        for axis in range(rank):
            others = any(one != axis for one in changed)
            keeps = node.op not in _POOLS or others or (rank, axis) in self._channel_axes
            if ids.shape[axis] > 1 and (axis in changed or not keeps):
                ids = self._tie_along(ids, axis)
        return Channels(ids, node.shape)

    def _mean(self, node: Node, source: Channels) -> Channels | None:
        """A mean that drops axes: the sizes must tell which are left."""
        before, rank = source.shape, len(node.shape)
        ways = [kept for kept in combinations(range(len(before)), rank) if _sizes(before, kept) == node.shape]
        if not ways:
            return None
        ids = source.ids
        for axis in range(len(before)):
            # Where sizes do not tell, an image's channels are those that the graph says are not averaged over.
            named = len(before) > 3 and (len(before), axis) in self._channel_axes
            if ids.shape[axis] > 1 and not named and not all(axis in way for way in ways):
                ids = self._tie_along(ids, axis)
        varying = {axis for axis in range(ids.ndim) if ids.shape[axis] > 1}
        ways = [way for way in ways if varying <= set(way)]
        found = {tuple(ids.shape[axis] for axis in way) for way in ways}
        if len(found) != 1:
            return None
        return Channels(ids.reshape(found.pop()), node.shape)

    def _sum(self, node: Node, given: list[Channels]) -> Channels | None:
        """All that is added has the same scale."""
        bias = self.outputs.get(node.attributes.get("bias_of", ""))
        if node.attributes.get("constant") and bias is not None and len(given) == 1:
            ids = self._vector(given[0], -1)
            if ids is None or len(ids) != len(bias):
                return None
            self.variables.tie(ids, bias)
            return self._elementwise(node, given)
        if len(given) < 2 or node.attributes.get("constant"):
            return self._stop(node, given, f"{node.op} {node.name!r} of a constant follows it")
        parts = self._broadcast(node, given)
        if parts is None:
            return None
        first, *others = np.broadcast_arrays(*parts)
        for one in others:
            self.variables.tie(first, one)
        return Channels(first, node.shape, _axis_of(given))

    def _broadcast(self, node: Node, given: Sequence[Channels]) -> list[IntArray] | None:
        """The ids of operands, with as many axes each."""
        if node.shape and all(one.is_known for one in given):
            if any(one.ids.ndim > len(node.shape) and not one.is_uniform for one in given):
                return None
            return [one.aligned(len(node.shape)) for one in given]
        varying = [one for one in given if not one.is_uniform]
        alike = len({(len(one.ids), one.axis) for one in varying}) <= 1
        if node.shape or any(one.shape for one in varying) or not alike:
            self._stop(node, given, NO_SHAPE)
            return None
        return [one.aligned(1) for one in given]

    def _product(self, node: Node, given: list[Channels]) -> Channels | None:
        if len(given) == 1 and node.attributes.get("constant"):
            # A quotient may have the constant above, which is not homogeneous.
            if node.op == "div":
                return self._stop(node, given, f"div {node.name!r} with a constant follows it")
            parts = self._broadcast(node, given)
            return None if parts is None else Channels(parts[0], node.shape, given[0].axis)
        parts = self._broadcast(node, given) if len(given) == 2 else None
        if parts is None:
            return None
        sizes = np.broadcast_shapes(*(part.shape for part in parts))
        result = Channels(self.variables.new(prod(sizes)).reshape(sizes), node.shape, _axis_of(given))
        one, other = (Channels(part, node.shape) for part in parts)
        self._products.append((node, one, other, result))
        self._settle_products(False)
        if not node.shape:
            return result
        return Channels(compress(self.variables.find(result.ids)), node.shape)

    def _settle_products(self, finally_: bool = True) -> None:
        """The result takes the scale of one factor where the other has none. In the end, one must have none."""
        while self._products:
            left = []
            for node, one, other, result in self._products:
                if self.variables.is_fixed(other.ids):
                    self.variables.tie(result.ids, one.ids)
                elif node.op == "mul" and self.variables.is_fixed(one.ids):
                    self.variables.tie(result.ids, other.ids)
                else:
                    left.append((node, one, other, result))
            if len(left) == len(self._products):
                if not finally_:
                    return
                node, _, other, _ = left[0]
                self.variables.fix(other.ids, f"{node.op} {node.name!r} takes it, of which only one side can be scaled")
            self._products = left

    # -- what moves elements

    def _moved(self, node: Node, source: Channels, ids: IntArray | None) -> Channels | None:
        """The result; where it is not known what goes where, everything has one scale."""
        if ids is None and not source.is_known:
            return None
        if ids is None:
            self.variables.tie(source.ids, source.ids.ravel()[:1])
            ids = source.ids.ravel()[:1].reshape((1,) * len(node.shape) or (1,))
        return Channels(compress(ids), node.shape)

    def _reshape(self, node: Node, given: list[Channels]) -> Channels | None:
        source = given[0]
        if len(given) > 1:
            return None
        if not (node.shape and source.shape):
            return self._moved(node, source, None) or self._stop(node, given, NO_SHAPE)
        return self._moved(node, source, reshape(source.ids, source.shape, node.shape))

    def _transpose(self, node: Node, given: list[Channels]) -> Channels | None:
        source, axes = given[0], node.attributes.get("axes")
        if not (node.shape and source.shape):
            return self._moved(node, source, None) or self._stop(node, given, NO_SHAPE)
        fits = axes is not None and tuple(source.shape[axis] for axis in axes) == node.shape
        return self._moved(node, source, source.ids.transpose(axes) if fits else None)

    def _concat(self, node: Node, given: list[Channels]) -> Channels | None:
        axis = node.attributes.get("axis")
        if axis is None or node.attributes.get("constant"):
            return None
        if not node.shape or not all(one.shape for one in given):
            return self._concat_unknown(node, given, axis)
        rank = len(node.shape)
        axis %= rank
        if sum(one.shape[axis] for one in given) != node.shape[axis]:
            return self._stop(node, given, f"{node.op} {node.name!r} with a constant follows it")
        parts = [one.full(axis) for one in given]
        common = np.broadcast_shapes(*((*part.shape[:axis], 1, *part.shape[axis + 1 :]) for part in parts))
        spread = [np.broadcast_to(part, (*common[:axis], part.shape[axis], *common[axis + 1 :])) for part in parts]
        return Channels(compress(np.concatenate(spread, axis)), node.shape)

    def _concat_unknown(self, node: Node, given: list[Channels], axis: int) -> Channels:
        if node.shape or any(one.shape or one.axis != axis or one.is_uniform for one in given):
            return self._stop(node, given, NO_SHAPE)
        return Channels(np.concatenate([one.ids for one in given]), (), axis)

    def _split(self, node: Node, given: list[Channels]) -> Channels | None:
        source, axis = given[0], node.attributes.get("axis")
        if not (node.shape and source.shape):
            return self._moved(node, source, None) or self._stop(node, given, NO_SHAPE)
        fewer = len(source.shape) - len(node.shape)
        if axis is None or len(given) > 1 or fewer not in (0, 1):
            return self._moved(node, source, None)
        axis %= len(source.shape)
        left = list(source.shape)
        size = node.shape[axis] if not fewer else 1
        left[axis : axis + 1] = [] if fewer else [size]
        if tuple(left) != node.shape:
            return self._moved(node, source, None)
        start = self._start(node, source, axis, size)
        if start is None or source.ids.shape[axis] == 1:
            ids = self._tie_along(source.ids, axis)
        else:
            ids = source.ids.take(range(start, start + size), axis)
        return self._moved(node, source, ids.squeeze(axis) if fewer else ids)

    def _start(self, node: Node, source: Channels, axis: int, size: int) -> int | None:
        """Where a part begins; None where the graph does not tell."""
        start, index = node.attributes.get("start"), node.attributes.get("index")
        if start is None and index is not None:
            parts: dict[int | None, set[int]] = {}
            for user in self.graph.users[node.inputs[0]]:
                if user.op == "split" and user.attributes.get("axis") == node.attributes["axis"]:
                    number = user.attributes.get("index")
                    sole = len(user.shape) < len(source.shape)
                    parts.setdefault(number, set()).add(1 if sole or not user.shape else user.shape[axis])
            if index == 0 or len(node.shape) < len(source.shape):
                start = index
            elif set(parts) == set(range(len(parts))) and all(len(sizes) == 1 for sizes in parts.values()):
                # All parts are there: those before it tell where it begins.
                sizes = [next(iter(parts[number])) for number in range(len(parts))]
                start = sum(sizes[:index]) if sum(sizes) == source.shape[axis] else None
        if start is None or node.attributes.get("step", 1) != 1:
            return None
        start = start % source.shape[axis]
        return start if start + size <= source.shape[axis] else None

    # -- products of two results

    def _attention(self, node: Node, given: list[Channels]) -> Channels | None:
        """A mean of values over tokens, weighted by what query and key say."""
        if not 3 <= len(given) <= 4 or not node.shape:
            return None
        value = given[2]
        if len(value.shape) != len(node.shape) or value.shape[-1] != node.shape[-1]:
            return None
        for one in (*given[:2], *given[3:]):
            self.variables.fix(one.ids, f"the softmax of attention {node.name!r} follows it")
        ids, rank = value.ids, len(node.shape)
        for axis in range(rank - 1):
            if axis == rank - 2 or value.shape[axis] != node.shape[axis] or not self.by_numpy_rules:
                ids = self._tie_along(ids, axis)
        return Channels(ids, node.shape)

    def _matmul(self, node: Node, given: list[Channels]) -> Channels | None:
        """A result times one that is not scaled."""
        if len(given) != 2 or not self.by_numpy_rules:
            return None
        one, other = given
        if min(len(one.shape), len(other.shape), len(node.shape)) < 2:
            return None
        if one.shape[-1] != other.shape[-2] or node.shape[-2:] != (one.shape[-2], other.shape[-1]):
            return None
        rank = len(node.shape)
        if max(one.ids.ndim, other.ids.ndim) > rank:
            return None
        if self.variables.is_fixed(one.ids):
            ids = self._tie_along(other.ids, -2)
        elif self.variables.is_fixed(other.ids):
            ids = self._tie_along(one.ids, -1)
        else:
            return None
        return Channels(ids.reshape((1,) * (rank - ids.ndim) + ids.shape), node.shape)


def _axis_of(given: Sequence[Channels]) -> int:
    """The axis of operands without shapes."""
    return next((one.axis for one in given if not one.is_uniform), 0)


def _sizes(shape: Sequence[int], axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(shape[axis] for axis in axes)


def _input_count(layer: Layer, node: Node, source: Channels, rows: int) -> int | None:
    """How many input channels a layer has; None where that does not fit its weight."""
    groups, total = int(node.attributes.get("groups", 1)), prod(layer.shape)
    if node.op == "linear":
        count = total // rows if rows else 0
        fits = count * rows == total and (not source.shape or source.shape[-1] == count)
        return count if fits else None
    if source.shape and node.shape:
        axis = node.attributes["channel_axis"]
        if len(source.shape) != len(node.shape):
            return None
        count = source.shape[axis]
        each = rows * (count // groups)
        return count if count % groups == 0 and each and total % each == 0 else None
    if node.attributes.get("columns") == "channels last" or len(layer.shape) < 2:
        return None
    return layer.shape[0] if node.op == "conv_transpose" else layer.shape[1] * groups
