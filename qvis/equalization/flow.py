"""Follows scale variables through a graph: what each operation makes equal, what it fixes, and where it sets free.

An operation may be scaled through where ``f(s x) = s f(x)`` for ``s > 0``, channel by channel; this is the positive
homogeneity that cross-layer equalization rests on (Nagel et al., arXiv 1906.04721, section 4.1; Meller et al., arXiv
1902.01917, section 3). A layer with a weight sets its output free from its input, since both can be put into it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from math import inf, nan, prod

import numpy as np

from qvis.equalization.channels import Channels, compress
from qvis.equalization.moving import POOLS, Moving
from qvis.layers import Graph, IntArray, Layer, Network, Node

LAYERS = ("conv", "conv_transpose", "linear")
NORMS = ("layer_norm", "rms_norm", "group_norm")
NO_SHAPE = "its shape is not known: give example_inputs"
_NOTHING: tuple[IntArray, IntArray] = (np.zeros(0, np.intp), np.zeros(0, np.intp))
_ELEMENTWISE = ("relu", "leaky_relu", "prelu", "identity", "dropout")


class Flow(Moving):
    """The variables of all tensors of a graph."""

    def __init__(
        self,
        graph: Graph,
        network: Network,
        folded_norms: Collection[str],
        affines: Collection[str] | None,
        multiplied: Collection[str],
    ) -> None:
        super().__init__(graph)
        self.layers = {layer.name: layer for layer in network.layers}
        self.folded_norms = folded_norms
        self.writable = affines
        self.multiplied: dict[str, tuple[IntArray, IntArray]] = dict.fromkeys(multiplied, _NOTHING)
        """By layer with a multiplication of its own before it: what reaches that, and what enters the layer."""
        self.shares_tensors = network.framework.startswith("ONNX")
        """Whether a weight of several names is one tensor, which all that use it take from one place."""
        self.tensors: dict[str, Channels] = {}
        self.outputs: dict[str, IntArray] = {}
        self.inputs: dict[str, IntArray] = {}
        self.norms: dict[str, tuple[IntArray, IntArray]] = {}
        """By normalization by fixed numbers, what enters and what leaves it: the same where it is folded."""
        self.affines: dict[str, IntArray] = {}
        self.shifts: dict[str, IntArray] = {}
        self._products: list[tuple[Node, Channels, Channels, Channels]] = []
        self.refused: dict[str, str] = {}
        """Why a layer's weight cannot be scaled at all."""
        for name, reason in self._refusals():
            self.refused.setdefault(name, reason)
        self._calls = Counter(_plain(node) for node in graph.nodes)

    def follow(self) -> None:
        """Go through the graph."""
        for node in self.graph.nodes:
            self.tensors[node.name] = self._result(node, [self.tensors[name] for name in node.inputs])
        self._settle_products()

    @property
    def made(self) -> dict[str, IntArray]:
        """What leaves the layers and normalizations whose outputs can have scales of their own, by name."""
        return {**self.outputs, **self.affines, **{name: self.norms[name][1] for name in self._free_norms}}

    @property
    def taken(self) -> dict[str, IntArray]:
        """What enters the layers and normalizations that can undo scales, by name."""
        return {**self.inputs, **{name: self.norms[name][0] for name in self._free_norms}}

    @property
    def _free_norms(self) -> list[str]:
        return [name for name in self.norms if name not in self.folded_norms]

    def end_of(self, node: Node) -> str:
        """The name under which :attr:`made` or :attr:`taken` know a normalization; empty for all else."""
        if node.name in self.affines:
            return node.name
        name = self._norm_name(node)
        return name if node.op == "batch_norm" and name in self.norms and name not in self.folded_norms else ""

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
            **dict.fromkeys((*POOLS, "resize", "pad"), self._local),
            **dict.fromkeys(("add", "sub", "maximum"), self._sum),
            **dict.fromkeys(("mul", "div"), self._product),
            **dict.fromkeys(("flatten", "reshape"), self._reshape),
            "clip": self._clip,
            "batch_norm": self._batch_norm,
            "concat": self._concat,
            "split": self._split,
            "transpose": self._transpose,
            "glu": self._glu,
            "roll": self._roll,
            "pixel_shuffle": self._pixel_shuffle,
            "attention": self._attention,
            "matmul": self._matmul,
        }
        rule = rules.get(node.op)
        if rule is None:
            return self._stop(node, given)
        missing = not node.shape or not all(one.is_known for one in given)
        return rule(node, given) or self._stop(node, given, NO_SHAPE if missing else "")

    # -- layers

    def _refusals(self) -> Iterator[tuple[str, str]]:
        """The layers whose weights cannot be scaled, and why."""
        forms: dict[str, tuple[object, ...]] = {}
        for layer in self.layers.values():
            if layer.aliases and not self.shares_tensors:
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
            elif node.attributes.get("locked"):
                yield node.layer, f"the weight of {node.layer!r} {node.attributes['locked']}"
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
        if node.layer in self.multiplied:
            columns = self._multiplied(node, columns)
        if node.layer not in self.outputs:
            self.inputs[node.layer], self.outputs[node.layer] = columns, self.variables.new(rows)
            if node.attributes.get("bias", True) and (layer.stored or layer).bias is None:
                self.variables.fix(self.outputs[node.layer], f"what {node.name!r} adds to its channels is not known")
        if (len(self.inputs[node.layer]), len(self.outputs[node.layer])) != (count, rows):
            return f"the weight of {node.layer!r} is used in several ways"
        self.variables.tie(self.inputs[node.layer], columns)
        return ""

    def _multiplied(self, node: Node, reaching: IntArray) -> IntArray:
        """What enters a layer has variables of its own where a multiplication by any numbers comes before."""
        known, entering = self.multiplied[node.layer]
        if not len(entering):
            known, entering = reaching, self.variables.new(len(reaching))
            self.multiplied[node.layer] = known, entering
        if len(known) == len(reaching):  # else the layer is refused
            self.variables.tie(known, reaching)
        return entering

    # -- normalizations

    def _batch_norm(self, node: Node, given: list[Channels]) -> Channels | None:
        """One that was folded only adds a number to each channel, which then is scaled too.

        Any other takes channels of any scales and gives them new ones: its mean, factor and shift can be written.
        """
        axis, name = node.attributes.get("channel_axis"), self._norm_name(node)
        if name not in self.graph.norms or not node.attributes.get("writable", True) or axis is None or len(given) > 1:
            return self._stop(node, given)
        ids, count = self._vector(given[0], axis), len(self.graph.norms[name].shift)
        if ids is None or len(ids) not in (1, count):
            return None
        entering = np.array(np.broadcast_to(ids, count))
        if name not in self.norms:
            leaving = entering if name in self.folded_norms else self.variables.new(count)
            self.norms[name] = entering, leaving
        known, leaving = self.norms[name]
        self.variables.tie(known, entering)
        return Channels.along(leaving, axis, node.shape)

    def _norm_name(self, node: Node) -> str:
        """Under which a normalization's numbers are known, which are the same in all its calls."""
        return node.name if node.name in self.graph.norms else _plain(node)

    def _norm(self, node: Node, given: list[Channels]) -> Channels:
        """A normalization by the numbers it is given: its scale and shift take what comes after it."""
        result = self._stop(node, given)
        facts = node.attributes
        axes = facts.get("axes", ()) if node.op != "group_norm" else (facts.get("channel_axis"),)
        axis = axes[0] if len(axes) == 1 else None
        return self._affine(node, axis) if axis is not None and facts.get("scale") and node.shape else result

    def _affine(self, node: Node, axis: int) -> Channels:
        """What is multiplied by a factor of its own for each channel, with nothing scaled before."""
        if self._calls[_plain(node)] > 1 or not self._is_writable(node):
            return self._fixed(node, f"it is tied to the result of {node.op} {node.name!r}")
        self.affines[node.name] = self.variables.new(node.shape[axis])
        return Channels.along(self.affines[node.name], axis, node.shape)

    def _is_writable(self, node: Node) -> bool:
        return self.writable is None or node.name in self.writable

    # -- what is homogeneous

    def _elementwise(self, node: Node, given: list[Channels]) -> Channels | None:
        source = given[0]
        if len(given) > 1 or (node.shape != source.shape and not source.is_uniform):
            return None
        return Channels(source.aligned(len(node.shape) or 1), node.shape, source.axis)

    def _clip(self, node: Node, given: list[Channels]) -> Channels | None:
        low, high = (node.attributes.get(one, nan) for one in ("low", "high"))
        if {low, high} <= {0, None, inf, -inf}:
            return self._elementwise(node, given)
        if not (low == 0 and high is not None and high > 0):
            return self._stop(node, given)
        name = "ReLU6" if high == 6 else f"a ReLU up to {high:g}"
        return self._stop(
            node, given, f"clip {node.name!r} is not homogeneous ({name}): replace it by ReLU to equalize here"
        )

    def _sum(self, node: Node, given: list[Channels]) -> Channels | None:
        """All that is added has the same scale."""
        owner = node.attributes.get("bias_of", "")
        layer = self.layers.get(owner)
        has_bias = layer is not None and (layer.stored or layer).bias is not None
        bias = self.outputs.get(owner) if has_bias else self.affines.get(owner)
        if node.attributes.get("constant") and bias is not None and len(given) == 1:
            ids = self._vector(given[0], node.attributes.get("axis", -1))
            if ids is None or len(ids) != len(bias):
                return None
            self.variables.tie(ids, bias)
            return self._elementwise(node, given)
        if len(given) == 1 and node.attributes.get("axis") is not None and self._is_writable(node):
            ids = self._vector(given[0], node.attributes["axis"]) if node.shape else None
            if ids is not None and node.shape == given[0].shape:
                self.shifts[node.name] = ids
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
            return None
        return [one.aligned(1) for one in given]

    def _glu(self, node: Node, given: list[Channels]) -> Channels | None:
        """The half that a sigmoid does not take."""
        source, axis = given[0], node.attributes.get("axis")
        if axis is None or not source.shape:
            return None
        half = source.shape[axis] // 2
        kept, gate = (source.full(axis).take(range(*ends), axis) for ends in ((0, half), (half, 2 * half)))
        self.variables.fix(gate, f"the sigmoid of glu {node.name!r} follows it")
        return Channels(compress(kept), node.shape)

    def _product(self, node: Node, given: list[Channels]) -> Channels | None:
        if len(given) == 1 and node.attributes.get("constant"):
            # A quotient may have the constant above, which is not homogeneous.
            if node.op == "div" and not node.attributes.get("divisor"):
                return self._stop(node, given, f"div {node.name!r} with a constant follows it")
            parts, axis = self._broadcast(node, given), node.attributes.get("axis")
            if parts is not None and axis is not None and node.shape and self.variables.is_fixed(parts[0]):
                return self._affine(node, axis)  # as in a normalization that is written out
            return None if parts is None else Channels(parts[0], node.shape, given[0].axis)
        parts = self._broadcast(node, given) if len(given) == 2 else None
        if parts is None:
            return None
        one, other = (Channels(part, node.shape) for part in parts)
        sizes = np.broadcast_shapes(*(part.shape for part in parts))
        if self.variables.is_fixed(other.ids):
            return Channels(one.ids, node.shape, _axis_of(given))
        result = Channels(self.variables.new(prod(sizes)).reshape(sizes), node.shape, _axis_of(given))
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


def _plain(node: Node) -> str:
    """Its name without the number of the call."""
    return node.name.partition("@")[0]


def _axis_of(given: Sequence[Channels]) -> int:
    """The axis of operands without shapes."""
    return next((one.axis for one in given if not one.is_uniform), 0)


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
