"""Nodes that hand a constant on: as it is, with its axes in another order, or as the numbers it was quantized from."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod

from qvis.adapters.onnx.parts import Node
from qvis.adapters.onnx.protos import captured
from qvis.adapters.onnx.tensors import TYPES
from qvis.adapters.values import Grid, Value, dequantize, quantize, reshape, transpose


@dataclass
class Scope:
    """The values that the nodes of a graph see: its own, then those of the graph around it."""

    outer: Scope | None
    values: dict[str, Value | None] = field(default_factory=dict)
    """None for what is no constant."""
    nodes: list[Node] = field(default_factory=list)
    results: set[str] = field(default_factory=set)
    """What is handed on to the outside."""
    products: dict[str, tuple[tuple[Hashable, str], int, int, int]] = field(default_factory=dict)
    """Results of layers to which a bias may be added: the layer's key, which of its uses it is, how many channels it
    has, and along which axis."""

    def find(self, name: str) -> Value | None:
        """The constant of a name."""
        scope: Scope | None = self
        while scope is not None:
            if name in scope.values:
                return scope.values[name]
            scope = scope.outer
        return None

    @cached_property
    def makers(self) -> dict[str, Node]:
        """The node that each value comes from."""
        return {output: node for node in self.nodes for output in node.outputs}

    @cached_property
    def users(self) -> dict[str, list[Node]]:
        """The nodes that take each value."""
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            inner = (graph for one in node.attributes.values() for graph in (one.g, *one.graphs))
            for name in (*node.inputs, *(name for graph in inner for name in captured(graph))):
                found.setdefault(name, []).append(node)
        return found

    def is_private(self, name: str) -> bool:
        """Whether a value goes into one node alone, and nowhere else."""
        return name not in self.results and len(self.users.get(name, ())) == 1


def pass_on(node: Node, inputs: Sequence[Value | None]) -> Value | None:
    """What a node makes of a constant; None for a node that uses it, or whose result is not known beforehand."""
    value = inputs[0] if inputs else None
    if value is None or node.domain not in ("", "ai.onnx", "com.microsoft"):
        return None
    if node.op in ("Identity", "Dropout"):
        return value
    if node.op in ("Cast", "CastLike"):
        return _cast(node, value)
    if node.op == "Transpose":
        return transpose(value, node.integers("perm"))
    if node.op in ("Reshape", "Squeeze", "Unsqueeze", "Flatten"):
        return _reshaped(node, value, inputs)
    if node.op in ("DequantizeLinear", "QuantizeLinear") and len(inputs) > 1 and inputs[1] is not None:
        zero = inputs[2] if len(inputs) > 2 else None
        if len(node.inputs) > 2 and node.inputs[2] and zero is None:
            return None
        grid = Grid(inputs[1], zero, node.integer("axis", 1), node.integer("block_size", 0))
        if node.op == "DequantizeLinear":
            return dequantize(value, grid)
        kind = TYPES.get(node.integer("output_dtype", 0), "uint8") if zero is None else zero.tensor.type
        return quantize(value, grid, kind)
    return None


def _cast(node: Node, value: Value) -> Value | None:
    """A cast between floating types, or of integers to wider ones; the stored numbers are shown, also wider ones."""
    if node.op == "CastLike":
        return value if value.floating else None
    kind = TYPES.get(node.integer("to", 0), "")
    if not value.floating or not kind.startswith(("float", "bfloat")):
        wider = kind in ("int32", "int64") or (kind.endswith("int8") and value.tensor.type.endswith(("int4", "int2")))
        return value if wider and not value.floating else None
    if kind in ("float32", "float64") or kind == value.tensor.type:
        return value
    return replace(value, notes=(*value.notes, f"cast to {kind} in the graph; shown before that"))


def _reshaped(node: Node, value: Value, inputs: Sequence[Value | None]) -> Value | None:
    given = inputs[1].small() if len(inputs) > 1 and inputs[1] is not None else None
    if len(node.inputs) > 1 and node.inputs[1] and given is None:
        return None
    axes = len(value.shape)
    if node.op == "Reshape":
        wanted = given if given is not None else node.integers("shape")
        return None if wanted is None else reshape(value, wanted, bool(node.integer("allowzero", 0)))
    if node.op == "Flatten":
        split = node.integer("axis", 1)
        split = split + axes if split < 0 else split
        return reshape(value, [prod(value.shape[:split]), prod(value.shape[split:])], keep_zero=True)
    chosen = given if given is not None else node.integers("axes")
    if node.op == "Squeeze":
        gone = {axis % axes for axis in chosen} if chosen is not None and axes else None
        kept = [size for i, size in enumerate(value.shape) if (i not in gone if gone is not None else size != 1)]
        return reshape(value, kept, keep_zero=True)
    total = axes + len(chosen or ())
    places = {axis % total for axis in chosen or ()}
    sizes = iter(value.shape)
    if len(places) != total - axes:
        return None
    return reshape(value, [1 if axis in places else next(sizes) for axis in range(total)], keep_zero=True)


def scale_of_result(node: Node, scope: Scope) -> Value | None:
    """The weight's scale in ``Cast(MatMulInteger(x, w)) * (scale_x * scale_w)``, which the quantizer leaves behind."""
    name = node.outputs[0] if node.outputs else ""
    for _ in range(3):
        users = scope.users.get(name, [])
        if len(users) != 1:
            return None
        user = users[0]
        if user.op in ("Cast", "Identity") and user.outputs:
            name = user.outputs[0]
            continue
        if user.op != "Mul":
            return None
        factor = next((other for other in user.inputs if other != name), "")
        maker = scope.makers.get(factor)
        if maker is None or maker.op != "Mul":
            return None
        scales = [scope.find(one) for one in maker.inputs]
        found = [one for one in scales if one is not None and one.floating]
        return found[-1] if found else None  # that of the weight is the second, where both are known
    return None
