"""How data flows through an ONNX graph, in the words that all adapters share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qvis.adapters.onnx import names
from qvis.adapters.onnx.measured import measure
from qvis.adapters.onnx.moving import Moving
from qvis.adapters.onnx.names import norm_names
from qvis.adapters.onnx.prepared import Prepared, Use, prepare
from qvis.adapters.onnx.protos import attribute, captured_names
from qvis.errors import NoGraphError
from qvis.layers import Graph, Node, Norm
from qvis.running import Batch
from qvis.words import count

_SAME = {
    "Relu": "relu", "Gelu": "gelu", "FastGelu": "gelu", "Swish": "silu", "Sigmoid": "sigmoid", "Tanh": "tanh",
    "Softmax": "softmax", "HardSwish": "hardswish", "HardSigmoid": "hardsigmoid", "Elu": "elu", "MatMul": "matmul",
    "MaxPool": "max_pool", "GlobalMaxPool": "max_pool", "AveragePool": "avg_pool", "GlobalAveragePool": "avg_pool",
    "Upsample": "resize", "Reshape": "reshape", "Squeeze": "reshape", "Unsqueeze": "reshape",
    "Identity": "identity", "Dropout": "dropout",
}  # fmt: skip
"""Operators that need no more than a word."""
_PLACES = {
    "Reshape", "Squeeze", "Unsqueeze", "Expand", "Slice", "Split", "Pad", "Resize", "Upsample", "CastLike", "Tile",
    "Clip", "TopK", "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "CumSum", "Dropout",
}  # fmt: skip
"""Operators of which only the first input is data: the others are shapes, axes and bounds."""
_SHAPES = {"Shape", "Size", "NonZero"}
"""Operators whose results are no data any more."""
_BRANCHING = ("If", "Loop", "Scan", "SequenceMap")
_REAL_TYPES = (1, 10, 11, 16)
"""ONNX's numbers for float32, float16, float64 and bfloat16."""
_DOMAINS = ("", "ai.onnx")
_FUSED = {"FastGelu", "Gelu", "SimplifiedLayerNormalization"}
"""Operators of other domains that compute what their names say."""
_ARITHMETIC = {"Add": "add", "Sum": "add", "Sub": "sub", "Mul": "mul", "Div": "div"}
_NORMS = {
    "LayerNormalization": "layer_norm",
    **dict.fromkeys(("RMSNormalization", "SimplifiedLayerNormalization"), "rms_norm"),
}
_MOVING = {"reshape", "flatten", "split", "concat", "pad", "attention"}
"""Words for what may move the channels to where they can no longer be told."""


def graph_of(model: Any, example: Batch | None = None) -> Graph:
    """How data flows through an ONNX model, with shapes for the samples of ``example`` where it is given.

    The model is only run on them where it computes shapes in a way that ONNX's own rules do not follow.
    """
    prepared = prepare(model, lambda message: NoGraphError(f"no graph: {message.removeprefix('model: ')}"))
    if example is not None:
        _give_shapes(prepared, example)
    flow = Following(prepared)
    flow.walk()
    if example is not None and (flow.shapeless or flow.computed):
        measure(prepared, example, flow.shapeless, flow.computed)
        flow = Following(prepared)
        flow.walk()
    unnamed = sum(not node.name for node in prepared.model.graph.node)
    source = "ONNX graph" + (f", in which {count(unnamed, 'node')} bear no name" if unnamed else "")
    return Graph(tuple(_needed(flow.nodes)), flow.norms, source)


def _give_shapes(prepared: Prepared, example: Batch) -> None:
    """Put the sizes of the example where the model leaves them open."""
    infos = prepared.inputs
    given = {**dict(zip((one.name for one in infos), example.args, strict=False)), **example.kwargs}
    for info in infos:
        shape = getattr(given.get(info.name), "shape", ())
        sizes = info.type.tensor_type.shape.dim
        for have, size in zip(sizes, shape, strict=False) if len(shape) == len(sizes) else ():
            if not have.HasField("dim_value"):
                have.dim_value = int(size)
    # what the exporter noted for any size would take the place of what is found for this one
    del prepared.model.graph.value_info[:]
    for info in prepared.model.graph.output:
        info.type.tensor_type.ClearField("shape")


@dataclass
class Following(Moving):
    """What is gathered on the way through a graph."""

    nodes: list[Node] = field(default_factory=list)
    norms: dict[str, Norm] = field(default_factory=dict)
    _ops: dict[str, str] = field(default_factory=dict)
    """The word for each node."""
    _taken: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._uses: dict[str, Use] = {use.node: use for use in reversed(self.prepared.uses) if use.watched}
        self._held: dict[str, list[str]] = {}
        """The layers in each tensor."""
        for name, held in self.prepared.layers.items():
            self._held.setdefault(held.tensor, []).append(name)
        self._norm_names = norm_names(self.prepared)
        self._reserved = {use.layer for use in self._uses.values()} | set(self._norm_names.values())

    def walk(self) -> None:
        """Go through the graph."""
        graph = self.prepared.model.graph
        for info in self.prepared.inputs:
            self._add(info.name, "input", (), info.name)
        for node in graph.node:
            self._visit(node)
        for info in graph.output:
            if info.name in self.makers:
                name = info.name if info.name not in self._taken | self._reserved else f"{info.name}:output"
                node = Node(self._unique(name), "output", (self.makers[info.name],), "", self.shape(info.name))
                self.nodes.append(node)

    def _visit(self, node: Any) -> None:
        given = node.input[:1] if node.op_type in _PLACES else node.input
        inputs = [name for name in (*given, *captured_names(node)) if name in self.makers]
        results = [name for name in node.output if name]
        if not inputs or not results or node.op_type in _SHAPES:
            return
        op, attributes = self._describe(node, inputs)
        use = self._uses.get(results[0])
        layer = use.layer if use is not None and op in _WEIGHTED else ""
        shown = self._title(node, results[0], op, layer, "axis" in attributes)
        starts = self.starts(node) if op == "split" and len(node.output) > 1 else {}
        for result in results:
            name = shown if len(results) == 1 or result == results[0] else f"{shown}:{result}"
            if result in starts:
                self._add(result, op, inputs, name, "", {**attributes, **starts[result]}, node.name)
            elif result == results[0] or op == "split":
                self._add(result, op, inputs, name, layer, attributes, node.name)
            else:  # indices, masks and statistics
                rest = {key: one for key, one in attributes.items() if key == "layers"}
                self._add(result, node.op_type, inputs, name, "", rest, node.name)

    def _add(
        self,
        result: str,
        op: str,
        inputs: list[str] | tuple[str, ...],
        name: str,
        layer: str = "",
        attributes: Mapping[str, Any] | None = None,
        original: str = "",
    ) -> None:
        attributes = dict(attributes or {})
        known = original if original in self.prepared.own_nodes else ""
        made = tuple(self.makers[one] for one in inputs)
        node = Node(self._unique(name), op, made, layer, self.shape(result), attributes, known)
        self.nodes.append(node)
        self._ops[node.name] = op
        self.makers[result] = node.name
        axis = self._channel_axis(node, inputs)
        if axis is not None:
            self.channels[result] = axis

    def _title(self, node: Any, result: str, op: str, layer: str, has_vector: bool) -> str:
        if layer:
            return layer
        if op == "batch_norm":
            return self._norm_names[result]
        module = None
        if op in ("layer_norm", "rms_norm", "group_norm"):
            module = names.of_tensor(node.input[1])
        elif op == "mul" and has_vector:  # of a normalization that is written out
            module = names.of_tensor(next(one for one in node.input if one in self.prepared.constants))
        wanted = [one for one in (module, node.name) if one]
        return next((one for one in wanted if one not in self._taken | self._reserved), result)

    def _unique(self, name: str) -> str:
        """The name, or that of a further call."""
        numbered = (f"{name}@{number}" for number in range(2, len(self._taken) + 3))
        chosen = next(one for one in (name, *numbered) if one not in self._taken)
        self._taken.add(chosen)
        return chosen

    # -----------------------------------------------------------------------------------------------------------------
    # Words

    def _describe(self, node: Any, inputs: list[str]) -> tuple[str, dict[str, Any]]:
        """The word for a node, and its attributes."""
        use = self._uses.get(next(filter(None, node.output)))
        if use is not None:
            word, attributes = self._weighted(node, use)
            locked = self.prepared.obstacles.get(use.layer)
            attributes |= {"transposed": True} if use.turned else {}
            return word, attributes | ({"locked": locked} if locked else {})
        if node.domain not in _DOMAINS and node.op_type not in _FUSED:
            return self._foreign(node)
        held = [layer for one in dict.fromkeys(node.input) for layer in self._held.get(one, ())]
        held += sorted(self.prepared.inner) if node.op_type in _BRANCHING else []
        if held:
            return node.op_type, {"layers": tuple(dict.fromkeys(held))}
        rule = _RULES.get(node.op_type)
        if rule is not None:
            found = rule(self, node, inputs)
            return (node.op_type, {}) if found is None else found
        if node.op_type == "Div" and node.input[1] not in inputs:
            return "mul", {"constant": True}  # of one over what it divides by
        if node.op_type in _ARITHMETIC:
            constant = len(inputs) < len(node.input)
            word, layer, axis = _ARITHMETIC[node.op_type], self.prepared.added.get(node.output[0]), self._along(node)
            owner = {} if layer is None else {"bias_of": layer}
            return word, {"constant": constant, **owner, **({} if axis is None else {"axis": axis})}
        if node.op_type == "Neg":
            return "mul", {"constant": True}  # of -1
        return _SAME.get(node.op_type, node.op_type), {}

    def _along(self, node: Any) -> int | None:
        """The axis, from the end, along which the vector lies that a node adds or multiplies by."""
        held = [one for one in node.input if one in self.prepared.constants]
        sizes = list(self.prepared.constants[held[0]].dims) if len(held) == 1 and len(node.input) == 2 else []
        varying = [axis - len(sizes) for axis, size in enumerate(sizes) if size > 1]
        is_plain = (
            node.op_type in ("Add", "Sub", "Mul") and attribute(node, "axis", None) is None
        )  # as before version 7
        return varying[0] if len(varying) == 1 and is_plain else None

    def _weighted(self, node: Any, use: Use) -> tuple[str, dict[str, Any]]:
        if use.data is None:
            return "embedding", {}
        if attribute(node, "activation", "") not in ("", "Relu", "LeakyRelu"):
            return self._foreign(node)
        bias = len(node.input) > 2 and bool(node.input[2])
        if "Conv" in node.op_type:
            pads = any(attribute(node, "pads", ())) or attribute(node, "auto_pad", "").startswith("SAME")
            groups = attribute(node, "group", 1)
            axis = -1 if node.op_type.startswith("Nhwc") else 1
            if "Transpose" in node.op_type:
                return "conv_transpose", {"groups": groups, "channel_axis": axis, "bias": bias}
            return "conv", {"groups": groups, "padding": bool(pads), "channel_axis": axis, "bias": bias}
        rank = self.rank(use.node)
        last = -1 if rank is None else rank - 1
        flat = "Gemm" in node.op_type or self.rank(node.input[use.slot]) == 2
        if _sums_last(node, use) if node.op_type == "Einsum" else use.slot == 1 and flat and use.axis == -1:
            return "linear", {"channel_axis": last, "bias": bias}
        return "matmul", {"channel_axis": last if use.slot == 1 else last - 1}

    def _foreign(self, node: Any) -> tuple[str, dict[str, Any]]:
        """An operator of another domain, which is not followed; it may use several layers at once."""
        result = next(filter(None, node.output))
        layers = tuple(dict.fromkeys(use.layer for use in self.prepared.uses if use.node == result))
        return f"{node.domain}.{node.op_type}", {"layers": layers} if layers else {}

    def batch_norm(self, node: Any, inputs: list[str]) -> tuple[str, dict[str, Any]] | None:  # noqa: ARG002
        if any(name not in self.prepared.constants for name in node.input[1:5]) or attribute(node, "training_mode", 0):
            return None
        name = self._norm_names[node.output[0]]
        scale, shift, mean, variance = map(self.prepared.read, node.input[1:5])
        self.norms[name] = Norm(name, mean, variance, scale, shift, attribute(node, "epsilon", 1e-5))
        return "batch_norm", {"channel_axis": 1}

    def norm(self, node: Any, inputs: list[str]) -> tuple[str, dict[str, Any]] | None:
        rank, axis = self.rank(inputs[0]), attribute(node, "axis", -1)
        axes = (axis,) if rank is None else tuple(range(axis % rank, rank))
        shift = len(node.input) > 2 and bool(node.input[2])
        return _NORMS[node.op_type], {"axes": axes, "scale": True, "shift": shift}

    def group_norm(self, node: Any, inputs: list[str]) -> tuple[str, dict[str, Any]] | None:  # noqa: ARG002
        # before version 21 of the operators its factors were those of groups
        is_whole = node.op_type != "GroupNormalization" or self.prepared.opset() >= 21
        if node.op_type == "InstanceNormalization":
            # Group normalizations are written with one of reshaped channels that does nothing more.
            maker = self.prepared.nodes.get(node.input[0])
            held = [self.prepared.read(one) for one in node.input[1:3] if one in self.prepared.constants]
            is_plain = len(held) == 2 and bool(np.all(held[0] == 1) and np.all(held[1] == 0))
            is_whole = not (is_plain and maker is not None and maker.op_type == "Reshape")
        return "group_norm", {"channel_axis": 1, "scale": is_whole, "shift": is_whole}

    def attention(self, node: Any, inputs: list[str]) -> tuple[str, dict[str, Any]] | None:
        """Of query, key and value, and maybe a mask; not of a cache beside them."""
        is_plain = all(one in inputs for one in node.input[:3]) and not any(node.input[4:])
        return ("attention", {}) if is_plain else None

    def clip(self, node: Any, inputs: list[str]) -> tuple[str, dict[str, Any]] | None:
        if self.prepared.type_of(inputs[0]) not in _REAL_TYPES:
            return None
        bounds: list[float | None] = []
        for slot, name in ((1, "min"), (2, "max")):
            held = self.number(node.input[slot]) if len(node.input) > slot and node.input[slot] else None
            given = attribute(node, name, None)
            if held is None and len(node.input) > slot and node.input[slot]:
                return None
            bounds.append(given if held is None else float(held))
        low, high = bounds
        return ("relu", {}) if low == 0 and high is None else ("clip", {"low": low, "high": high})

    def cast(self, node: Any, inputs: list[str]) -> tuple[str, dict[str, Any]] | None:  # noqa: ARG002
        """To a real type numbers stay what they are, but for their precision."""
        kind = attribute(node, "to", None) or self.prepared.type_of(node.output[0])
        return ("identity", {}) if kind in _REAL_TYPES else None

    def resize(self, node: Any, inputs: list[str]) -> tuple[str, dict[str, Any]] | None:  # noqa: ARG002
        """Not where numbers come from outside of the image."""
        is_cropped = attribute(node, "coordinate_transformation_mode", "") == "tf_crop_and_resize"
        return None if is_cropped else ("resize", {})

    def extreme(self, node: Any, inputs: list[str]) -> tuple[str, dict[str, Any]] | None:
        """The larger or the smaller of a result and a number: half a clip, of which a ReLU may be the other half."""
        held = [self.number(one) for one in node.input if one not in inputs]
        if self.prepared.type_of(inputs[0]) not in _REAL_TYPES:
            return None
        if len(inputs) != 1 or len(held) != 1 or held[0] is None or held[0].size != 1:
            return None
        bound = float(held[0].reshape(-1)[0])
        if node.op_type == "Max":
            return ("relu", {}) if bound == 0 else ("clip", {"low": bound, "high": None})
        is_rectified = self._ops[self.makers[inputs[0]]] == "relu"
        return "clip", {"low": 0.0 if is_rectified else None, "high": bound}

    def prelu(self, node: Any, inputs: list[str]) -> tuple[str, dict[str, Any]] | None:  # noqa: ARG002
        slopes = self.number(node.input[1])
        return None if slopes is None else ("prelu", {"slopes": slopes.reshape(-1)})

    def _channel_axis(self, node: Node, inputs: list[str] | tuple[str, ...]) -> int | None:
        if "channel_axis" in node.attributes:
            return int(node.attributes["channel_axis"])
        known = self.channels.get(inputs[0]) if inputs else None
        if node.op == "embedding":
            return -1
        if known is None or node.op in _MOVING:
            return None
        if node.op == "transpose":
            axes = node.attributes["axes"]
            return axes.index(known % len(axes))  # type: ignore[no-any-return]
        return known


def _sums_last(node: Any, use: Use) -> bool:
    """Whether an Einsum is a matrix times the last axis of what it takes."""
    left, _, result = attribute(node, "equation", "").replace(" ", "").partition("->")
    terms = left.split(",")
    data, weight = terms[1 - use.slot], terms[use.slot]
    outer = set(weight) - {data[-1:]}
    return len(weight) == 2 and len(outer) == 1 and result == data[:-1] + outer.pop()


_WEIGHTED = ("conv", "conv_transpose", "linear", "matmul", "embedding")
_RULES: dict[str, Callable[[Following, Any, list[str]], tuple[str, dict[str, Any]] | None]] = {
    "Attention": Following.attention,
    "BatchNormalization": Following.batch_norm,
    **dict.fromkeys(_NORMS, Following.norm),
    **dict.fromkeys(("GroupNormalization", "InstanceNormalization"), Following.group_norm),
    **dict.fromkeys(("Cast", "CastLike"), Following.cast),
    "Clip": Following.clip,
    "Concat": Following.concat,
    "Expand": Following.expand,
    "Flatten": Following.reshape,
    "Gather": Following.gather,
    **dict.fromkeys(("Max", "Min"), Following.extreme),
    "LeakyRelu": lambda flow, node, inputs: ("leaky_relu", {"slope": attribute(node, "alpha", 0.01)}),  # noqa: ARG005
    "PRelu": Following.prelu,
    "Pad": Following.pad,
    **dict.fromkeys(("ReduceMean", "ReduceMax"), Following.mean),
    "Reshape": Following.reshape,
    "Resize": Following.resize,
    "Slice": Following.slice,
    "Split": Following.split,
    "Transpose": Following.transpose,
}
"""Operators that need more than a word; a rule returns None for a use that there is no word for."""


def _needed(nodes: list[Node]) -> Iterator[Node]:
    """The nodes that an output depends on, and all inputs."""
    needed = {node.name for node in nodes if node.op in ("input", "output")}
    for node in reversed(nodes):
        if node.name in needed:
            needed.update(node.inputs)
    return (node for node in nodes if node.name in needed)
