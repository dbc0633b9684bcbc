"""How data flows through an ONNX graph, in the words that all adapters share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np

from qvis.adapters.encodings import Array
from qvis.adapters.onnx import names
from qvis.adapters.onnx.measured import measure
from qvis.adapters.onnx.prepared import Prepared, Use, attribute, norm_names, prepare
from qvis.errors import NoGraphError
from qvis.layers import Graph, Node, Norm
from qvis.running import Batch
from qvis.words import count

_SAME = {
    "Relu": "relu", "Gelu": "gelu", "FastGelu": "gelu", "Swish": "silu", "Sigmoid": "sigmoid", "Tanh": "tanh",
    "Softmax": "softmax", "HardSwish": "hardswish", "HardSigmoid": "hardsigmoid", "Elu": "elu", "MatMul": "matmul",
    "MaxPool": "max_pool", "GlobalMaxPool": "max_pool", "AveragePool": "avg_pool", "GlobalAveragePool": "avg_pool",
    "Resize": "resize", "Upsample": "resize", "Reshape": "reshape", "Squeeze": "reshape", "Unsqueeze": "reshape",
    "Identity": "identity", "Cast": "identity", "CastLike": "identity", "Dropout": "dropout",
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
class Following:
    """What is gathered on the way through a graph."""

    prepared: Prepared
    nodes: list[Node] = field(default_factory=list)
    norms: dict[str, Norm] = field(default_factory=dict)
    shapeless: list[str] = field(default_factory=list)
    """The values whose shapes are not known."""
    computed: list[str] = field(default_factory=list)
    """Sizes and places that are not known, since they are computed."""
    makers: dict[str, str] = field(default_factory=dict)
    """The node that a value comes from."""
    _ops: dict[str, str] = field(default_factory=dict)
    """The word for each node."""
    _channels: dict[str, int] = field(default_factory=dict)
    """The axis of a value's channels, where it is known."""
    _taken: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._uses: dict[str, Use] = {use.node: use for use in reversed(self.prepared.uses) if use.watched}
        self._held = {held.tensor: name for name, held in self.prepared.layers.items()}
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
                node = Node(self._unique(name), "output", (self.makers[info.name],), "", self._shape(info.name))
                self.nodes.append(node)

    def _visit(self, node: Any) -> None:
        given = node.input[:1] if node.op_type in _PLACES else node.input
        inputs = [name for name in (*given, *_captured(node)) if name in self.makers]
        results = [name for name in node.output if name]
        if not inputs or not results or node.op_type in _SHAPES:
            return
        op, attributes = self._describe(node, inputs)
        use = self._uses.get(results[0])
        layer = use.layer if use is not None and op in _WEIGHTED else ""
        shown = self._title(node, results[0], op, layer)
        starts = self._starts(node) if op == "split" and len(node.output) > 1 else {}
        for result in results:
            name = shown if len(results) == 1 or result == results[0] else f"{shown}:{result}"
            if result in starts:
                self._add(result, op, inputs, name, "", {**attributes, **starts[result]}, node.name)
            elif result == results[0] or op == "split":
                self._add(result, op, inputs, name, layer, attributes, node.name)
            else:  # indices, masks and statistics
                self._add(result, node.op_type, inputs, name, "", {}, node.name)

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
        node = Node(self._unique(name), op, made, layer, self._shape(result), attributes, known)
        self.nodes.append(node)
        self._ops[node.name] = op
        self.makers[result] = node.name
        axis = self._channel_axis(node, inputs)
        if axis is not None:
            self._channels[result] = axis

    def _title(self, node: Any, result: str, op: str, layer: str) -> str:
        if layer:
            return layer
        if op == "batch_norm":
            return self._norm_names[result]
        module = names.of_tensor(node.input[1]) if op in ("layer_norm", "rms_norm", "group_norm") else None
        wanted = [one for one in (module, node.name) if one]
        return next((one for one in wanted if one not in self._taken | self._reserved), result)

    def _unique(self, name: str) -> str:
        """The name, or that of a further call."""
        numbered = (f"{name}@{number}" for number in range(2, len(self._taken) + 3))
        chosen = next(one for one in (name, *numbered) if one not in self._taken)
        self._taken.add(chosen)
        return chosen

    def _shape(self, name: str) -> tuple[int, ...]:
        sizes = self.prepared.shape_of(name)
        if sizes is None or None in sizes:
            self.shapeless.append(name)
            return ()
        return tuple(size for size in sizes if size is not None)

    def _rank(self, name: str) -> int | None:
        sizes = self.prepared.shape_of(name)
        return None if sizes is None else len(sizes)

    # -----------------------------------------------------------------------------------------------------------------
    # Words

    def _describe(self, node: Any, inputs: list[str]) -> tuple[str, dict[str, Any]]:
        """The word for a node, and its attributes."""
        use = self._uses.get(next(filter(None, node.output)))
        if use is not None:
            word, attributes = self._weighted(node, use)
            return word, {**attributes, "transposed": True} if use.turned else attributes
        if node.domain not in _DOMAINS and node.op_type not in _FUSED:
            return self._foreign(node)
        held = self.prepared.inner if node.op_type in _BRANCHING else self._held.keys() & set(node.input)
        if held:
            return node.op_type, {"layers": tuple(sorted(self._held.get(one, one) for one in held))}
        rule = _RULES.get(node.op_type)
        if rule is not None:
            found = rule(self, node, inputs)
            return (node.op_type, {}) if found is None else found
        if node.op_type in _ARITHMETIC:
            constant = len(inputs) < len(node.input)
            word, layer, axis = _ARITHMETIC[node.op_type], self.prepared.added.get(node.output[0]), self._along(node)
            if layer is not None:
                return word, {"constant": True, "bias_of": layer}
            return word, {"constant": constant, **({} if axis is None else {"axis": axis})}
        if node.op_type == "Neg":
            return "mul", {"constant": True}
        return _SAME.get(node.op_type, node.op_type), {}

    def _along(self, node: Any) -> int | None:
        """The axis, from the end, along which the vector lies that a node adds or multiplies by."""
        held = [one for one in node.input if one in self.prepared.constants]
        sizes = list(self.prepared.constants[held[0]].dims) if len(held) == 1 and len(node.input) == 2 else []
        varying = [axis - len(sizes) for axis, size in enumerate(sizes) if size > 1]
        return varying[0] if len(varying) == 1 and node.op_type in ("Add", "Sub", "Mul") else None

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
        rank = self._rank(use.node)
        last = -1 if rank is None else rank - 1
        flat = "Gemm" in node.op_type or self._rank(node.input[use.slot]) == 2
        if use.slot == 1 and flat and node.op_type != "Einsum" and use.axis == -1:
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
        rank, axis = self._rank(inputs[0]), attribute(node, "axis", -1)
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

    def clip(self, node: Any, inputs: list[str]) -> tuple[str, dict[str, Any]] | None:  # noqa: ARG002
        bounds: list[float | None] = []
        for slot, name in ((1, "min"), (2, "max")):
            held = self._number(node.input[slot]) if len(node.input) > slot and node.input[slot] else None
            given = attribute(node, name, None)
            if held is None and len(node.input) > slot and node.input[slot]:
                return None
            bounds.append(given if held is None else float(held))
        low, high = bounds
        return ("relu", {}) if low == 0 and high is None else ("clip", {"low": low, "high": high})

    def extreme(self, node: Any, inputs: list[str]) -> tuple[str, dict[str, Any]] | None:
        """The larger or the smaller of a result and a number: half a clip, of which a ReLU may be the other half."""
        held = [self._number(one) for one in node.input if one not in inputs]
        if len(inputs) != 1 or len(held) != 1 or held[0] is None or held[0].size != 1:
            return None
        bound = float(held[0].reshape(-1)[0])
        if node.op_type == "Max":
            return ("relu", {}) if bound == 0 else ("clip", {"low": bound, "high": None})
        is_rectified = self._ops[self.makers[inputs[0]]] == "relu"
        return "clip", {"low": 0.0 if is_rectified else None, "high": bound}

    def prelu(self, node: Any, inputs: list[str]) -> tuple[str, dict[str, Any]] | None:  # noqa: ARG002
        slopes = self._number(node.input[1])
        return None if slopes is None else ("prelu", {"slopes": slopes.reshape(-1)})

    def gather(self, node: Any, inputs: list[str]) -> tuple[str, dict[str, Any]] | None:
        if node.input[0] not in inputs or node.input[1] in inputs:
            return None
        axis, held = attribute(node, "axis", 0), self._number(node.input[1])
        index = np.zeros(0, np.int64) if held is None or held.ndim > 1 else held.reshape(-1)
        is_run = index.size > 0 and bool(np.all(np.diff(index) == 1)) and (index[0] >= 0 or index.size == 1)
        return "split", {"axis": axis, "start": int(index[0]), "step": 1} if is_run else {"axis": axis}

    def slice(self, node: Any, inputs: list[str]) -> tuple[str, dict[str, Any]] | None:
        """A part along one axis, where all others stay whole."""
        starts, ends, axes, steps = (
            self._integers(node, slot, name) for slot, name in enumerate(("starts", "ends", "axes", "steps"), 1)
        )
        if starts is None or ends is None:
            axis = axes[0] if axes is not None and len(axes) == 1 else None
            return "split", {"axis": axis}
        axes = list(range(len(starts))) if axes is None else axes
        steps = [1] * len(starts) if steps is None else steps
        if not len(starts) == len(ends) == len(axes) == len(steps):
            return None
        sizes = self.prepared.shape_of(inputs[0]) or ()
        parts: list[tuple[int, int | None, int]] = []
        for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
            size = sizes[axis] if sizes else None
            first: int | None = start if start >= 0 else None
            if size is not None:
                first = max(0, start + size) if start < 0 else min(start, size)
            is_whole = first == 0 and step == 1 and end >= (2**31 - 1 if size is None else size)
            parts += [] if is_whole else [(axis, first, step)]
        if not parts:
            return "identity", {}
        axis, first, step = parts[0]
        if len(parts) > 1:
            return "split", {"axis": None}
        return "split", {"axis": axis, "step": step, **({} if first is None else {"start": first})}

    def split(self, node: Any, inputs: list[str]) -> tuple[str, dict[str, Any]] | None:  # noqa: ARG002
        return "split", {"axis": attribute(node, "axis", 0)}

    def _starts(self, node: Any) -> dict[str, dict[str, int]]:
        """Where each part of a Split begins, by the names of its results."""
        axis, whole = attribute(node, "axis", 0), self.prepared.shape_of(node.input[0])
        sizes = self._integers(node, 1, "split")
        if sizes is None and not any(node.input[1:]) and whole is not None:
            size, count = whole[axis], attribute(node, "num_outputs", len(node.output))
            sizes = None if size is None else [-(-size // count)] * count
        if sizes is None or len(sizes) != len(node.output):
            return {}
        return {name: {"start": sum(sizes[:place]), "step": 1} for place, name in enumerate(node.output) if name}

    def expand(self, node: Any, inputs: list[str]) -> tuple[str, dict[str, Any]] | None:
        """Repeating places is what enlarging an image by its nearest pixels does too."""
        rank = self._rank(inputs[0])
        return None if rank is None or rank != self._rank(node.output[0]) else ("resize", {})

    def reshape(self, node: Any, inputs: list[str]) -> tuple[str, dict[str, Any]] | None:
        """A flatten where all axes from one on became the last."""
        before, after = self.prepared.shape_of(inputs[0]), self.prepared.shape_of(node.output[0])
        if before is not None and after and 0 < len(after) < len(before):
            start = len(after) - 1
            merged = before[start:]
            if None not in merged and after[-1] == prod(size for size in merged if size is not None):
                return "flatten", {"start": start}
        if node.op_type == "Flatten" and attribute(node, "axis", 1) == 1:
            return "flatten", {"start": 1}
        return "reshape", {}

    def mean(self, node: Any, inputs: list[str]) -> tuple[str, dict[str, Any]] | None:
        rank, channels = self._rank(inputs[0]), self._channels.get(inputs[0])
        axes = self._integers(node, 1, "axes")
        if rank is None or channels is None or not axes or channels % rank in {axis % rank for axis in axes}:
            return None
        return "avg_pool", {}

    def pad(self, node: Any, inputs: list[str]) -> tuple[str, dict[str, Any]] | None:  # noqa: ARG002
        if attribute(node, "mode", "constant") != "constant":
            return "pad", {"value": None}
        held = self._number(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        return "pad", {"value": attribute(node, "value", 0.0) if held is None else float(held.reshape(-1)[0])}

    def transpose(self, node: Any, inputs: list[str]) -> tuple[str, dict[str, Any]] | None:
        rank = self._rank(inputs[0])
        order = attribute(node, "perm", None if rank is None else range(rank - 1, -1, -1))
        return None if order is None else ("transpose", {"axes": tuple(order)})

    def concat(self, node: Any, inputs: list[str]) -> tuple[str, dict[str, Any]] | None:
        return "concat", {"axis": attribute(node, "axis", 0), "constant": len(inputs) < len(node.input)}

    # -----------------------------------------------------------------------------------------------------------------
    # What is known of values

    def _number(self, name: str) -> Array | None:
        """The numbers of a small constant, which may have been cast or reshaped, or was measured."""
        if name in self.prepared.numbers:
            return self.prepared.numbers[name]
        if name not in self.makers:
            found = self._constant(name)
            self.computed += [name] if found is None else []
            return found
        return None

    def _constant(self, name: str) -> Array | None:
        import onnx

        for _ in range(5):
            if name in self.prepared.constants:
                return self.prepared.read(name)
            node = self.prepared.nodes.get(name)
            if node is None or not (node.op_type == "Constant" or node.input):
                return None
            if node.op_type == "Constant":
                value = onnx.helper.get_attribute_value(node.attribute[0])
                return onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.array(value)
            if node.op_type not in ("Cast", "CastLike", "Identity", "Reshape", "Squeeze", "Unsqueeze"):
                return None
            name = node.input[0]
        return None

    def _integers(self, node: Any, slot: int, name: str) -> list[int] | None:
        """A list that is an attribute in older versions of an operator, and an input in later ones."""
        if len(node.input) > slot and node.input[slot]:
            held = self._number(node.input[slot])
            return None if held is None else [int(one) for one in held.reshape(-1)]
        given = attribute(node, name, None)
        return None if given is None else [int(one) for one in given]

    def _channel_axis(self, node: Node, inputs: list[str] | tuple[str, ...]) -> int | None:
        if "channel_axis" in node.attributes:
            return int(node.attributes["channel_axis"])
        known = self._channels.get(inputs[0]) if inputs else None
        if node.op == "embedding":
            return -1
        if known is None or node.op in _MOVING:
            return None
        if node.op == "transpose":
            axes = node.attributes["axes"]
            return axes.index(known % len(axes))  # type: ignore[no-any-return]
        return known


_WEIGHTED = ("conv", "conv_transpose", "linear", "matmul", "embedding")
_RULES: dict[str, Callable[[Following, Any, list[str]], tuple[str, dict[str, Any]] | None]] = {
    "Attention": Following.attention,
    "BatchNormalization": Following.batch_norm,
    **dict.fromkeys(_NORMS, Following.norm),
    **dict.fromkeys(("GroupNormalization", "InstanceNormalization"), Following.group_norm),
    "Clip": Following.clip,
    "Concat": Following.concat,
    "Expand": Following.expand,
    "Flatten": Following.reshape,
    "Gather": Following.gather,
    **dict.fromkeys(("Max", "Min"), Following.extreme),
    "LeakyRelu": lambda flow, node, inputs: ("leaky_relu", {"slope": attribute(node, "alpha", 0.01)}),  # noqa: ARG005
    "PRelu": Following.prelu,
    "Pad": Following.pad,
    "ReduceMean": Following.mean,
    "Reshape": Following.reshape,
    "Slice": Following.slice,
    "Split": Following.split,
    "Transpose": Following.transpose,
}
"""Operators that need more than a word; a rule returns None for a use that there is no word for."""


def _captured(node: Any) -> Iterator[str]:
    """What the branches of a node take from around it."""
    for one in node.attribute:
        for graph in (one.g, *one.graphs):
            for inner in graph.node:
                yield from inner.input
                yield from _captured(inner)


def _needed(nodes: list[Node]) -> Iterator[Node]:
    """The nodes that an output depends on, and all inputs."""
    needed = {node.name for node in nodes if node.op in ("input", "output")}
    for node in reversed(nodes):
        if node.name in needed:
            needed.update(node.inputs)
    return (node for node in nodes if node.name in needed)
