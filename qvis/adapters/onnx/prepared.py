"""An ONNX model made ready to be edited: a copy of its own, with where each layer's weight is stored and used."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from qvis.adapters.encodings import Array
from qvis.adapters.matrices import Part
from qvis.adapters.onnx.graph import Walk
from qvis.adapters.onnx.parts import RULES, Inputs, Node
from qvis.adapters.onnx.passes import Scope
from qvis.adapters.onnx.protos import LIMIT, REAL, first_result
from qvis.adapters.onnx.tensors import Live
from qvis.adapters.values import Loader
from qvis.errors import BadArgumentError, QvisError
from qvis.layers import FloatArray, Layer

_CONVOLUTIONS = ("Conv", "ConvTranspose", "FusedConv", "NhwcConv", "DeformConv")
_PRODUCTS = ("Gemm", "MatMul", "FusedMatMul", "TransposeMatMul", "FusedGemm")


@dataclass(frozen=True)
class Use:
    """A node that applies a layer's weight."""

    layer: str
    node: str
    """The name of the node's first result, by which it is known."""
    slot: int
    """Which of its inputs the weight is."""
    data: int | None
    """Which of its inputs the weight is applied to; None where that is no real tensor."""
    axis: int
    """The axis of that input that the node sums over."""
    watched: bool
    """Whether what enters and leaves the node is all that the layer does."""
    places: Callable[[], Array] = field(repr=False, compare=False)
    """Returns the places in the stored tensor of the numbers that arrive at the node, in the shape they have there."""
    turned: bool = False
    """Whether the layer's rows are other channels here than at its first use."""


@dataclass(frozen=True)
class Held:
    """Where the numbers of a layer are stored."""

    tensor: str
    """The name of the initializer."""
    layer: Layer
    """Has the places of the numbers in that tensor instead of the numbers."""

    @cached_property
    def index(self) -> Array | None:
        """For each number of the matrix its place in the tensor; None where they lie in the same order."""
        places = self.layer.weight
        index: Array = places.astype(np.int32 if places.size < LIMIT else np.int64)
        plain = index.size and index[-1, -1] == index.size - 1 and bool((np.diff(index.reshape(-1)) == 1).all())
        return None if plain else index

    def write(self, matrix: FloatArray, tensor: Array) -> Array:
        """The tensor, as it is stored, with the matrix in it."""
        matrix = np.asarray(matrix)
        if matrix.shape != self.shape:
            raise BadArgumentError(
                f"weights: {self.layer.name!r} has the shape {self.shape} (channels, elements), got {matrix.shape}"
            )
        if self.index is None and matrix.size == tensor.size:
            return np.ascontiguousarray(matrix.reshape(tensor.shape), dtype=tensor.dtype)
        written: Array = tensor.copy()
        flat = written.reshape(-1)
        flat[slice(matrix.size) if self.index is None else self.index] = (
            matrix.reshape(-1) if self.index is None else matrix
        )
        return written

    def take(self, tensor: Array) -> FloatArray:
        """The matrix out of a tensor as it is stored."""
        rows, elements = self.shape
        flat: FloatArray = tensor.reshape(-1)
        matrix: FloatArray = flat[: rows * elements].reshape(rows, elements) if self.index is None else flat[self.index]
        return matrix

    @cached_property
    def shape(self) -> tuple[int, int]:
        """(channels, elements)."""
        rows, elements = (self.layer.weight if self.index is None else self.index).shape
        return rows, elements


@dataclass
class Prepared:
    """A model of one's own, without functions and without constants that are nodes."""

    model: Any
    """The ``ModelProto``."""
    layers: dict[str, Held] = field(default_factory=dict)
    obstacles: dict[str, str] = field(default_factory=dict)
    """Why the weight of a layer cannot be replaced."""
    uses: list[Use] = field(default_factory=list)
    biases: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    """What holds the bias of each layer that has one: nodes, by their first results, and the numbers of inputs."""
    inner: set[str] = field(default_factory=set)
    """Layers that are used inside branches and loops."""
    sizes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Shapes of values that were measured."""
    numbers: dict[str, Array] = field(default_factory=dict)
    """Values that were measured, and that are the same for all inputs of the same shapes."""
    own_nodes: set[str] = field(default_factory=set)
    """The names of the nodes that the model had itself, outside of functions."""

    @cached_property
    def nodes(self) -> dict[str, Any]:
        """The ``NodeProto`` by the name of its first result."""
        return {first_result(node): node for node in self.model.graph.node}

    @cached_property
    def added(self) -> dict[str, str]:
        """The layer whose bias an Add adds, by the name of its result."""
        return {
            node: layer
            for layer, slots in self.biases.items()
            for node, _ in slots
            if self.nodes[node].op_type == "Add"
        }

    @cached_property
    def constants(self) -> dict[str, Any]:
        """The ``TensorProto`` of each initializer."""
        return {tensor.name: tensor for tensor in self.model.graph.initializer}

    @cached_property
    def inputs(self) -> list[Any]:
        """The ``ValueInfoProto`` of each input that must be given."""
        return [one for one in self.model.graph.input if one.name not in self.constants]

    @cached_property
    def infos(self) -> dict[str, Any]:
        """The ``TypeProto`` of every value whose type is known."""
        import onnx

        try:
            graph = onnx.shape_inference.infer_shapes(self.model, data_prop=True).graph
        except Exception:  # of a model with unknown operators, or one that is too large
            graph = self.model.graph
        infos = {one.name: one.type for part in (graph.value_info, graph.output, graph.input) for one in part}
        for tensor in self.model.graph.initializer:
            infos[tensor.name] = onnx.helper.make_tensor_type_proto(tensor.data_type, list(tensor.dims))
        return infos

    def type_of(self, name: str) -> int:
        """ONNX's number for the type of a value, float32 where nothing says."""
        info = self.infos.get(name)
        return int(info.tensor_type.elem_type) or 1 if info is not None else 1

    def shape_of(self, name: str) -> tuple[int | None, ...] | None:
        """The sizes of a value, None for one that is not known."""
        if name in self.sizes:
            return self.sizes[name]
        info = self.infos.get(name)
        if info is None or not info.tensor_type.HasField("shape"):
            return None
        return tuple(one.dim_value if one.HasField("dim_value") else None for one in info.tensor_type.shape.dim)

    def opset(self, domain: str = "") -> int:
        """The version of the operators of a domain."""
        domains = ("", "ai.onnx") if domain in ("", "ai.onnx") else (domain,)
        return max((entry.version for entry in self.model.opset_import if entry.domain in domains), default=1)

    def read(self, name: str) -> Array:
        """The numbers of an initializer."""
        import onnx

        array: Array = onnx.numpy_helper.to_array(self.constants[name])
        return array

    def arriving(self, use: Use, tensor: Array) -> Array:
        """A stored tensor as it arrives at a node: transposed, reshaped and cast on the way."""
        kind = REAL[self.type_of(self.nodes[use.node].input[use.slot])]
        arrived: Array = tensor.reshape(-1)[use.places().astype(np.int64)].astype(kind)
        return arrived


def prepare(model: Any, refuse: Callable[[str], QvisError]) -> Prepared:
    """Copy a model and find where its layers are.

    Parameters
    ----------
    model
        A path, a ``ModelProto``, or what ``torch.onnx.export`` returns; it is not changed.
    refuse
        Makes the error to raise from a message.
    """
    try:
        import onnx
        import onnx.inliner
    except ImportError:
        raise refuse("model: the package onnx is not installed; run: pip install 'qvis[onnx]'") from None
    proto = _copy(model, refuse)
    # Before version 4 initializers had to be inputs; later ones than 10 add nothing that onnxruntime may need to know.
    proto.ir_version = min(max(proto.ir_version, 4), 10)
    own = {node.name for node in proto.graph.node if node.name}
    if proto.functions:
        proto = onnx.inliner.inline_local_functions(proto)
    _lift_constants(proto.graph)
    _skip_copies(proto.graph)
    walk = _Places(_Numbering(proto))
    walk.graph(walk.place.skeleton)
    prepared = Prepared(proto, uses=walk.uses, inner=walk.inner, own_nodes=own)
    for (key, label), layer in walk.layers.items():
        reason = _obstacle(key, layer, prepared)
        if reason:
            prepared.obstacles[layer.name] = reason
        else:
            assert isinstance(key, tuple)
            prepared.layers[layer.name] = Held(key[1], layer)
        slots = [(bias.node, bias.slot) for bias in walk.biases((key, label))]
        if slots and all(node in prepared.nodes for node, _ in slots):
            prepared.biases[layer.name] = slots
    return prepared


def _copy(model: Any, refuse: Callable[[str], QvisError]) -> Any:
    import onnx

    large = "model: it has {:.1f} GB, and onnxruntime takes edited models of up to 2 GB only; give the model of the "
    large += "framework that it was exported from"
    if isinstance(model, Path):
        proto = onnx.load(str(model), load_external_data=False)
        size = model.stat().st_size + sum(
            int(entry.value) for one in proto.graph.initializer for entry in one.external_data if entry.key == "length"
        )
        if size > LIMIT:
            raise refuse(large.format(size / 1e9))
        onnx.external_data_helper.load_external_data_for_model(proto, str(model.parent))
        return proto
    given = model if isinstance(model, onnx.ModelProto) else model.model_proto
    size = given.ByteSize()
    if size > LIMIT:
        raise refuse(large.format(size / 1e9))
    proto = onnx.ModelProto()
    proto.CopyFrom(given)
    return proto


def _lift_constants(graph: Any) -> None:
    """Make initializers of the constants that are nodes."""
    kept = []
    for node in graph.node:
        values = [one.t for one in node.attribute if one.name == "value"]
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx") and values and values[0].data_type in REAL:
            values[0].name = node.output[0]
            graph.initializer.append(values[0])
        else:
            kept.append(node)
    if len(kept) < len(graph.node):
        kept = [type(node).FromString(node.SerializeToString()) for node in kept]
        del graph.node[:]
        graph.node.extend(kept)


def _skip_copies(graph: Any) -> None:
    """Let nodes take constants themselves in place of copies of them, as exporters make where constants are equal."""
    constants = {tensor.name for tensor in graph.initializer}
    copies: dict[str, str] = {}
    for node in graph.node:
        for slot, name in enumerate(node.input):
            node.input[slot] = copies.get(name, name)
        if node.op_type == "Identity" and node.domain in ("", "ai.onnx") and node.input[0] in constants:
            copies[node.output[0]] = node.input[0]


def _obstacle(key: Hashable, layer: Layer, prepared: Prepared) -> str:
    path, name = key if isinstance(key, tuple) and len(key) == 2 else ("", "")
    if path != "" or name not in prepared.constants:
        return "is stored inside a branch or a loop"
    if any(not note.startswith("cast to") for note in layer.notes):
        return "is quantized already; give the model before quantization"
    if prepared.constants[name].data_type not in REAL:
        return "is stored in a type that cannot be replaced; give the model in float32"
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# The places of numbers


class _Numbering(Live):
    """Numbers the elements of real tensors, so that what a view makes of the numbers tells where they come from."""

    def __init__(self, proto: Any) -> None:
        import onnx

        graph = onnx.GraphProto()
        graph.node.extend(proto.graph.node)
        graph.input.extend(proto.graph.input)
        graph.output.extend(proto.graph.output)
        graph.sparse_initializer.extend(proto.graph.sparse_initializer)
        for tensor in proto.graph.initializer:
            if tensor.data_type in REAL:
                graph.initializer.add(name=tensor.name, dims=tensor.dims, data_type=onnx.TensorProto.DOUBLE)
            else:
                graph.initializer.append(tensor)
        object.__setattr__(self, "skeleton", graph)

    skeleton: Any

    def loader(self, proto: Any, field: str) -> tuple[Loader, int | None]:
        """See :class:`qvis.adapters.onnx.tensors.Place`."""
        size = prod(proto.dims)
        if proto.data_type == 11 and field == "raw_data" and not proto.raw_data and not proto.double_data:
            return lambda: np.arange(size, dtype="<f8"), 8 * size
        return super().loader(proto, field)


@dataclass
class _Places(Walk):
    """Notes the nodes that use each layer."""

    place: _Numbering
    uses: list[Use] = field(default_factory=list)
    inner: set[str] = field(default_factory=set)

    def _use(self, node: Node, scope: Scope, inputs: Inputs) -> None:
        super()._use(node, scope, list(inputs))
        inputs = self._with_grids(node, scope, inputs)
        rule = RULES.get(node.domain, {}).get(node.op)
        for part in rule(node, inputs) if rule is not None else ():
            layer = self.layers.get((part.value.key, part.label))
            slot = _slot(part, inputs)
            if layer is not None and scope.outer is not None:
                self.inner.add(layer.name)
            elif layer is not None and slot is not None:
                data, axis = _data(node, slot, inputs)
                watched = not part.label and (data is not None or node.op == "Gather")
                name = next(filter(None, node.outputs), "")
                turned = self._is_turned(part, layer)
                self.uses.append(Use(layer.name, name, slot, data, axis, watched, part.value.read, turned))

    def _is_turned(self, part: Part, layer: Layer) -> bool:
        if not any(use.layer == layer.name for use in self.uses):
            return False
        return not np.array_equal(part.view(part.value.read()), layer.weight)


def _slot(part: Part, inputs: Inputs) -> int | None:
    return next((i for i, value in enumerate(inputs) if value is not None and value.key == part.value.key), None)


def _data(node: Node, slot: int, inputs: Inputs) -> tuple[int | None, int]:
    """What the weight is applied to, and the axis of that input that the node sums over."""
    if node.op in _CONVOLUTIONS:
        return 0, -1 if node.op.startswith("Nhwc") else 1
    if node.op in _PRODUCTS and slot in (0, 1):
        turned = bool(node.integer("transA" if slot else "transB", 0))
        return 1 - slot, -1 if turned != bool(slot) else -2
    if node.op == "Einsum" and len(inputs) == 2:
        left, _, result = node.text("equation").replace(" ", "").partition("->")
        terms = left.split(",")
        summed = [i for i, one in enumerate(terms[1 - slot]) if one in terms[slot] and one not in result]
        if len(summed) == 1:
            return 1 - slot, summed[0]
    return None, -1
