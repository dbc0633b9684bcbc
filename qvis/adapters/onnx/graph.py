"""Walks an ONNX graph, its subgraphs and its functions, and gathers the weights: as data, nothing is computed."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import Any

import numpy as np

from qvis.adapters.encodings import Array
from qvis.adapters.matrices import Part, along
from qvis.adapters.matrices import layer as layer_of
from qvis.adapters.onnx import names
from qvis.adapters.onnx.parts import RULES, Inputs, Node
from qvis.adapters.onnx.passes import Scope, pass_on, scale_of_result
from qvis.adapters.onnx.tensors import Place, tensor
from qvis.adapters.values import Grid, Tensor, Value, dequantize, reshape
from qvis.errors import BadArgumentError
from qvis.layers import FloatArray, Layer, Skipped

_NODES, _DEPTH = 1_000_000, 50
"""More than a model has that was not made to keep its reader busy: functions may call each other."""

_NO_WEIGHTS = {
    **dict.fromkeys(("LSTM", "GRU", "RNN", "DynamicQuantizeLSTM"), (3, 4, 5, 6, 7)),  # biases and states
    **dict.fromkeys(("Where", "Equal", "Less", "Greater", "Pad", "Clip", "Resize", "QuantizeLinear"), tuple(range(5))),
    **dict.fromkeys(("Conv", "ConvTranspose", "Gemm"), (2,)),
    "DequantizeLinear": (1, 2),
    "BatchNormalization": (1, 2, 3, 4),
}
"""Inputs that are no matrices, whatever their shape."""
_NOT_LEARNED = {
    **dict.fromkeys(("LSTM", "GRU", "RNN"), (5, 6)),
    "DynamicQuantizeLSTM": (5, 6, 8, 9, 10, 11),
    "QAttention": (3, 4, 6, 7),
    **dict.fromkeys(
        (
            "QuantizeLinear",
            "DequantizeLinear",
        ),
        (1, 2),
    ),
    "DynamicQuantizeMatMul": (2, 3),
    **dict.fromkeys(("QLinearConv", "QLinearMatMul", "QGemm"), (1, 2, 4, 5, 6, 7)),
    "MatMulIntegerToFloat": (2, 3, 4, 5),
    "MatMulNBits": (2, 3),
    "BatchNormalization": (3, 4),
}
"""Inputs that are no parameters: states, statistics, scales and zero points."""
_STORED_AS_INTEGERS = {"QLinearConv": (8,), "QGemm": (6,)}
"""Inputs that are parameters although they are integers: biases."""
_BIASED = ("Conv", "ConvTranspose", "FusedConv", "NhwcConv", "NhwcFusedConv", "Gemm", "FusedGemm")
"""Operators that take what they add to their channels as their third input."""
_PLAIN = ("MatMul", "FusedMatMul", "Gemm", "Conv", "ConvTranspose")
"""Operators after which an Add of a vector is what a layer adds to its channels."""


@dataclass(frozen=True)
class Bias:
    """What one use of a layer adds to its output channels."""

    value: Value
    node: str
    """The first result of the node that adds it: the layer's own, or an Add after it."""
    slot: int
    """Which input of that node it is."""


def _bias(node: Node, inputs: Sequence[Value | None]) -> Bias | None:
    """What a node itself adds to its output channels, where that is a constant."""
    if node.op not in _BIASED or len(inputs) < 3:
        return None
    value = inputs[2]
    if value is None or prod(value.shape) != (value.shape[-1] if value.shape else 1):
        return None
    scaled = "Gemm" in node.op and "beta" in node.attributes and node.attributes["beta"].f != 1
    return Bias(value, _first(node), 2) if value.floating and not scaled else None


def _first(node: Node) -> str:
    """The name of a node's first result."""
    return next(filter(None, node.outputs), "")


def _vector(value: Value) -> FloatArray:
    numbers: FloatArray = value.read().reshape(-1)
    return numbers


@dataclass
class Walk:
    """What is gathered on the way."""

    place: Place
    functions: Mapping[tuple[str, str], Any] = field(default_factory=dict)
    """The ``FunctionProto`` of each domain and name."""
    layers: dict[tuple[Hashable, str], Layer] = field(default_factory=dict)
    """By the key of the tensor and the label of the matrix in it."""
    others: dict[Hashable, tuple[Value, Node | None]] = field(default_factory=dict)
    """Constants that no rule knows, by their key, with the first node that uses them."""
    skipped: dict[str, Skipped] = field(default_factory=dict)
    constants: dict[Hashable, Value] = field(default_factory=dict)
    """All initializers."""
    order: list[tuple[Hashable, str | None]] = field(default_factory=list)
    """The keys of layers as they came, and those of others with None for a label."""
    used: set[Hashable] = field(default_factory=set)
    learned: set[Hashable] = field(default_factory=set)
    """Keys of integers that are parameters."""
    locked: set[Hashable] = field(default_factory=set)
    """Keys of integers in the place of a weight that no rule could turn into numbers."""
    not_learned: set[Hashable] = field(default_factory=set)
    """Keys of floats that are no parameters."""
    added: dict[tuple[Hashable, str], list[Bias | None]] = field(default_factory=dict)
    """What each use of a layer adds."""
    taken: dict[str, Hashable] = field(default_factory=dict)
    """Names, and what has them: a tensor, or a node with several matrices."""
    nodes: int = 0

    # -----------------------------------------------------------------------------------------------------------------
    # Graphs

    def graph(self, graph: Any, outer: Scope | None = None, path: str = "", depth: int = 0) -> None:
        """Walk a graph inside ``outer``; ``path`` tells it from all others."""
        scope = Scope(outer)
        for proto in graph.sparse_initializer:
            self.skipped.setdefault(proto.values.name, Skipped(proto.values.name, "is a sparse tensor"))
            scope.values[proto.values.name] = None
        for given in graph.input:
            scope.values[given.name] = None
        for proto in graph.initializer:
            value = Value.of(tensor(proto, self.place), (path, proto.name))
            scope.values[proto.name] = self.constants[value.key] = value
        scope.results = {one.name for one in graph.output}
        self._nodes([_node(proto, {}) for proto in graph.node], scope, path, depth)

    def _nodes(self, nodes: list[Node], scope: Scope, path: str, depth: int) -> None:
        if depth > _DEPTH:
            raise BadArgumentError(f"model: its graphs are nested deeper than {_DEPTH} levels")
        scope.nodes = nodes
        for index, node in enumerate(nodes):
            self.nodes += 1
            if self.nodes > _NODES:
                raise BadArgumentError(f"model: it has more than {_NODES:,} nodes, counted at each call of a function")
            self._visit(node, scope, path, depth)
            for name, attribute in node.attributes.items():
                inners = [attribute.g, *attribute.graphs] if attribute.HasField("g") else list(attribute.graphs)
                for number, inner in enumerate(inners):
                    self.graph(inner, scope, f"{path}/{index}.{name}.{number}", depth + 1)

    def _visit(self, node: Node, scope: Scope, path: str, depth: int) -> None:
        inputs = [scope.find(name) if name else None for name in node.inputs]
        self.used |= {value.key for value in inputs if value is not None}
        for output in node.outputs:
            scope.values[output] = None
        function = self.functions.get((node.domain, node.op))
        if function is not None:
            self._call(node, function, scope, inputs, depth)
            return
        if node.op == "Constant" and node.domain in ("", "ai.onnx"):
            self._constant(node, scope, path)
            return
        self._note_learned(node, inputs)
        passed = pass_on(node, inputs)
        if passed is not None and node.outputs:
            scope.values[node.outputs[0]] = passed
            return
        self._use(node, scope, inputs)

    def _call(self, node: Node, function: Any, scope: Scope, inputs: list[Value | None], depth: int) -> None:
        defaults = {proto.name: proto for proto in function.attribute_proto}
        inner = Scope(None, dict(zip(function.input, inputs, strict=False)), results=set(function.output))
        nodes = [_node(proto, {**defaults, **node.attributes}) for proto in function.node]
        self._nodes(nodes, inner, f"{node.domain}::{node.op}", depth + 1)
        for output, result in zip(node.outputs, function.output, strict=False):
            scope.values[output] = inner.find(result)

    def _constant(self, node: Node, scope: Scope, path: str) -> None:
        attribute = node.attributes.get("value")
        if attribute is not None and attribute.HasField("t") and node.outputs:
            value = Value.of(tensor(attribute.t, self.place, node.outputs[0]), (path, node.outputs[0]))
            scope.values[node.outputs[0]] = value
        elif "value_ints" in node.attributes and node.outputs:
            scope.values[node.outputs[0]] = _listed(node, node.integers("value_ints") or [])
        elif "value_int" in node.attributes and node.outputs:
            scope.values[node.outputs[0]] = _listed(node, [node.integer("value_int", 0)])
        elif "sparse_value" in node.attributes and node.outputs:
            self.skipped.setdefault(node.outputs[0], Skipped(node.outputs[0], "is a sparse tensor"))

    def _note_learned(self, node: Node, inputs: list[Value | None]) -> None:
        def keys(table: Mapping[str, tuple[int, ...]]) -> set[Hashable]:
            chosen = (inputs[index] for index in table.get(node.op, ()) if index < len(inputs))
            return {value.key for value in chosen if value is not None}

        self.not_learned |= keys(_NOT_LEARNED)
        self.learned |= keys(_STORED_AS_INTEGERS)
        if node.op == "DequantizeLinear" and inputs and inputs[0] is not None:
            self.learned.add(inputs[0].key)

    # -----------------------------------------------------------------------------------------------------------------
    # Weights

    def _use(self, node: Node, scope: Scope, inputs: list[Value | None]) -> None:
        inputs = self._with_grids(node, scope, inputs)
        rule = RULES.get(node.domain, {}).get(node.op)
        parts = list(rule(node, inputs)) if rule is not None else []
        for part in parts:
            self._add(node, part)
            self._note_bias(node, part, _bias(node, inputs), scope, inputs)
        if node.op == "Add" and node.domain in ("", "ai.onnx") and "axis" not in node.attributes:
            self._note_added(node, scope, inputs)
        known = {part.value.key for part in parts}
        if rule is not None and not any(part.value.floating for part in parts) and node.op != "Gather":
            self.locked |= {value.key for value in inputs if value is not None and not value.floating}
        for index, value in enumerate(inputs):
            plain = index not in _NO_WEIGHTS.get(node.op, ()) + _NOT_LEARNED.get(node.op, ())
            if value is not None and plain and value.key not in known and value.key not in self.others:
                self.others[value.key] = (value, node)
                self.order.append((value.key, None))

    def _note_bias(self, node: Node, part: Part, bias: Bias | None, scope: Scope, inputs: Inputs) -> None:
        """What this use of a layer adds; for one that adds nothing itself an Add may follow."""
        key, sizes = (part.value.key, part.label), part.value.shape
        uses = self.added.setdefault(key, [])
        uses.append(bias)
        is_right = len(inputs) > 1 and inputs[1] is not None and inputs[1].key == part.value.key
        if node.op not in _PLAIN or not is_right or any(node.inputs[2:]):
            return
        if "Conv" in node.op:
            rows = sizes[0] if node.op == "Conv" else sizes[1] * node.integer("group", 1)
            scope.products[_first(node)] = (key, len(uses) - 1, rows, 1 - len(sizes))
        elif len(sizes) == 2:
            rows = sizes[0 if node.integer("transB", 0) else 1]
            scope.products[_first(node)] = (key, len(uses) - 1, rows, -1)

    def _note_added(self, node: Node, scope: Scope, inputs: Inputs) -> None:
        """Whether an Add is what a layer before it, which nothing else uses there, adds to its channels."""
        for slot, value in enumerate(inputs):
            product = scope.products.get(node.inputs[1 - slot]) if len(inputs) == 2 else None
            if value is None or not value.floating or product is None or not scope.is_private(node.inputs[1 - slot]):
                continue
            key, use, rows, axis = product
            if len(value.shape) >= -axis and value.shape[axis] == prod(value.shape) == rows:
                self.added[key][use] = Bias(value, _first(node), slot)

    def biases(self, key: tuple[Hashable, str]) -> list[Bias]:
        """Where a layer's bias is, for each of its uses; none where one has no bias, or another."""
        found = [one for one in self.added.get(key, ()) if one is not None]
        alike = len({one.value.key for one in found}) == 1 and len(found) == len(self.added[key])
        return found if alike else []

    def _with_grids(self, node: Node, scope: Scope, inputs: Inputs) -> list[Value | None]:
        """The inputs of a node, integers that later nodes dequantize as the floats that they mean."""
        if node.op in ("ConvInteger", "MatMulInteger"):
            return self._with_scale(node, scope, list(inputs))
        return _dequantized_behind(node, scope, list(inputs)) if node.op == "Gather" else list(inputs)

    def _with_scale(self, node: Node, scope: Scope, inputs: list[Value | None]) -> list[Value | None]:
        """The weight of an operator on integers with the scale that its result is multiplied with later."""
        value = inputs[1] if len(inputs) > 1 else None
        if value is None or value.floating or len(value.shape) < 2:
            return inputs
        axis = 0 if node.op == "ConvInteger" else -1
        zero = inputs[3] if len(inputs) > 3 else None
        scale = scale_of_result(node, scope)
        if scale is not None and prod(scale.shape) == value.shape[axis]:
            scale = reshape(scale, [value.shape[axis]])
        found = None if scale is None else dequantize(value, Grid(scale, zero, axis))
        if scale is not None and found is not None:
            self.not_learned.add(scale.key)
        else:
            one = replace(value, read=lambda: np.ones((), dtype=np.float32), shape=(), axes=(), floating=True)
            found = dequantize(value, Grid(one, zero, axis))
            note = f"{value.tensor.type}, in steps of its grid: the graph shows no scale for it"
            found = None if found is None else replace(found, notes=(note,))
        return [inputs[0], found, *inputs[2:]]

    def _add(self, node: Node, part: Part) -> None:
        key = (part.value.key, part.label)
        if not part.value.floating or part.value.tensor.encoding is None or prod(part.value.shape) == 0:
            return
        if key in self.layers:
            self.layers[key] = self._with_alias(self.layers[key], node, part)
            return
        self.learned.add(part.value.key)
        self.order.append(key)
        wanted = names.choose(part.value.tensor.name, node)
        if part.label:
            # All matrices of a node share its name, so that it must be the only node of that name.
            name = self._unique(wanted[:1], f"node {self.nodes}") + f".{part.label}"
            self.taken[name] = key
        else:
            name = self._unique(wanted, key)
        held = part.value.tensor
        plain = not part.label and part.value.key == ("", held.name) and held.name in node.inputs
        stored = plain and held.encoding is not None and held.encoding.floating
        self.layers[key] = replace(layer_of(name, node.op, part), tensor=held.name if stored else "")

    def _unique(self, wanted: list[str], owner: Hashable) -> str:
        """The first of the names that nobody else has, or that the owner has already."""
        numbered = (f"{wanted[0]}#{number}" for number in range(2, len(self.taken) + 3))
        name = next(name for name in (*wanted, *numbered) if self.taken.get(name, owner) == owner)
        self.taken[name] = owner
        return name

    def _with_alias(self, layer: Layer, node: Node, part: Part) -> Layer:
        name = names.of_node(node) or node.name or next(iter(node.outputs), "")
        name = ".".join(filter(None, (name, part.label)))
        if not name or name in (layer.name, *layer.aliases) or name in self.taken:
            return layer
        self.taken[name] = part.value.key
        notes = layer.notes
        if part.channels != layer.channels:
            notes = (*notes, f"{name} ({node.op}) uses the same tensor with its output channels along {part.channels}")
        return replace(layer, aliases=(*layer.aliases, name), notes=notes)

    # -----------------------------------------------------------------------------------------------------------------
    # What is left

    def finish(self) -> tuple[Layer, ...]:
        """All layers in the order in which the graph uses them; then matrices that it does not use."""
        for key, value in self.constants.items():
            if key not in self.used:
                self.others[key] = (value, None)
                self.order.append((key, None))
        ruled = {key for key, _ in self.layers} | self.not_learned
        found: list[Layer] = []
        for key, label in self.order:
            if label is not None:
                biases = self.biases((key, label))
                bias = partial(_vector, biases[0].value) if biases else None
                found.append(replace(self.layers[key, label], bias=bias))
            elif key not in ruled:
                layer = self._other(*self.others[key])
                found += [] if layer is None else [layer]
        return tuple(found)

    def _other(self, value: Value, node: Node | None) -> Layer | None:
        """A constant with at least two axes longer than 1; a row or a column alone is a bias or a scale."""
        if sum(size > 1 for size in value.shape) < 2 or 0 in value.shape:
            return None
        name = value.tensor.name
        if value.tensor.encoding is None:
            if value.tensor.type != "string":
                self.skipped[name] = Skipped(name, f"is of type {value.tensor.type}, which qvis does not read")
            return None
        if not value.floating:
            if node is not None and value.key in self.locked:
                reason = f"holds {value.tensor.type} numbers of {node.op}, packed or of a grid that is not certain"
                self.skipped[name] = Skipped(name, reason)
            return None
        if node is not None and node.op == "Expand" and not value.read().any():
            return None  # the state that a recurrent layer begins with
        if node is not None and node.op == "Add" and _is_mask(value.read()):
            self.skipped[name] = Skipped(name, "is a mask: its values hide what they are added to")
            return None
        title = (names.of_tensor(name) or name).removeprefix("(root)") or name
        return layer_of(self._unique([name if node is None else title, name], value.key), "other", along(value, [0]))

    def parameters(self) -> int:
        """How many numbers were learned, as far as the graph tells."""
        total = 0
        for key, value in self.constants.items():
            floating = value.floating and value.shape != () and key not in self.not_learned
            total += value.tensor.size if floating or key in self.learned else 0
        return total


def _dequantized_behind(node: Node, scope: Scope, inputs: list[Value | None]) -> list[Value | None]:
    """A table of integers, of which the rows that were taken are dequantized all alike."""
    table = inputs[0] if inputs else None
    users = scope.users.get(node.outputs[0], []) if node.outputs else []
    back = next((user for user in users if user.op == "DequantizeLinear"), None)
    if table is None or table.floating or back is None:
        return inputs
    scale, *zeros = (scope.find(name) for name in back.inputs[1:] if name)
    if scale is None or not scale.floating or prod(scale.shape) != 1 or (zeros and zeros[0] is None):
        return inputs
    return [dequantize(table, Grid(scale, zeros[0] if zeros else None)), *inputs[1:]]


def _node(proto: Any, given: Mapping[str, Any]) -> Node:
    """The node with attributes that refer to those of the function around it filled in."""
    attributes = {}
    for attribute in proto.attribute:
        chosen = given.get(attribute.ref_attr_name) if attribute.ref_attr_name else attribute
        if chosen is not None:
            attributes[attribute.name] = chosen
    metadata = {entry.key: entry.value for entry in getattr(proto, "metadata_props", ())}
    return Node(proto.op_type, proto.domain, proto.name, tuple(proto.input), tuple(proto.output), attributes, metadata)


def _listed(node: Node, numbers: list[int]) -> Value:
    held = Tensor(node.outputs[0], (len(numbers),), "int64", lambda: np.array(numbers, dtype="<i8"))
    return Value.of(held, ("list", node.outputs[0]))


def _is_mask(array: Array) -> bool:
    return bool((array <= -1e4).any()) and not bool((array > 0).any())


def named_functions(protos: Iterable[Any]) -> dict[tuple[str, str], Any]:
    """The functions by what a node calls them."""
    return {(proto.domain, proto.name): proto for proto in protos}
