"""From the graph that torch.fx or torch.export traced to a :class:`~qvis.layers.Graph`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from qvis.adapters.torch import operations
from qvis.adapters.torch.calls import Call, Held, call_module, call_operation, is_padded, spatial_axes, type_of
from qvis.adapters.torch.nodes import Nodes, known_shape
from qvis.adapters.torch.operations import Facts, describe
from qvis.adapters.torch.values import (
    Parts,
    Result,
    Several,
    Traced,
    flatten,
    nested_graph,
    nodes_in,
    plain,
    shape_of,
    shapes_of,
)
from qvis.layers import Graph, Node, Norm

if TYPE_CHECKING:
    from torch import fx


def build(traced: Traced) -> Graph:
    """The graph, without the operations that lead to no output."""
    builder = _Builder(traced)
    builder.walk(traced.graph, ())
    return builder.finish()


class _Builder(Nodes):
    def __init__(self, traced: Traced) -> None:
        super().__init__(traced)
        self.norms: dict[str, Norm] = {}
        self.values: dict[fx.Node, Any] = {}
        self.bases: dict[fx.Node, tuple[fx.Node, bool]] = {}
        """What a result is a view of, and whether it is the whole of it."""
        self.channels: dict[str, int | None] = {}

    # -- the walk

    def walk(self, graph: fx.Graph, operands: Sequence[Any]) -> Any:
        """Add the operations of a graph, and return the values that it returns; a nested one is given its operands."""
        given = iter(operands)
        for node in graph.nodes:
            if node.op == "placeholder":
                self.values[node] = next(given) if operands else self._placeholder(node)
            elif node.op == "get_attr":
                self.values[node] = Held(plain(str(node.target)))
            elif node.op == "output":
                if operands or graph is not self.traced.graph:
                    return self._value(node.args[0])
                self._add_outputs(node.args[0])
            else:
                self._take(node)
        return ()

    def _placeholder(self, node: fx.Node) -> Any:
        if node.name in self.traced.held:
            return Held(plain(self.traced.held[node.name]))
        expected = self.traced.inputs is None or node.name in self.traced.inputs
        known = node.meta.get("val", ...)
        if not expected or not (known is ... or hasattr(known, "shape")):
            return Held()
        name = self._unique(str(node.target).lstrip("*"), module=False)
        return Result(self._add(node, name, "input", ()))

    def _add_outputs(self, result: Any) -> None:
        found = list(self.traced.outputs(result))
        for path, node in found:
            value = self.values[node]
            for one in value if isinstance(value, tuple) else (value,):
                inputs = () if isinstance(one, Held) else (one.node,)
                shape = self.shapes.get(inputs[0]) if inputs else None
                name = self._unique(f"output{path if len(found) > 1 else ''}", module=False)
                self.nodes[name] = Node(name, "output", inputs, shape=known_shape(shape))

    def _take(self, node: fx.Node) -> None:
        nested = nested_graph(node)
        if nested is not None:
            graph, operands = nested
            self.values[node] = self.walk(graph, [self._value(one) for one in operands])
            return
        call = self._call(node)
        self.values[node] = value = self._evaluate(node, call)
        data = next(iter(node.all_input_nodes), None)
        if data is None or not isinstance(value, (Result, Parts)):
            return
        first = node.args[0] if node.args else None
        if call.in_place:
            self._overwrite(data, value)
            self.bases[node] = (data, True)
        elif call.operation in operations.VIEWS and first is data:
            self.bases[node] = (data, call.operation in operations.WHOLE)

    def _overwrite(self, node: fx.Node, value: Any) -> None:
        """An operation in place changes what it was given, and all that this is a view of."""
        self.values[node] = value
        while node in self.bases:
            node, whole = self.bases[node]
            before = self.values[node]
            if isinstance(before, (Held, tuple)):
                return
            if not whole:
                name = self._unique(before.node.partition("/copy")[0] + "/copy")
                self.nodes[name] = Node(
                    name, "aten.copy", (before.node, value.node), shape=known_shape(self.shapes[before.node])
                )
                self.shapes[name], self.channels[name] = self.shapes[before.node], self.channels.get(before.node)
                value = Result(name)
            self.values[node] = value

    def _call(self, node: fx.Node) -> Call:
        if node.op == "call_module":
            path = str(node.target)
            return call_module(node, plain(path), self.traced.modules[path])
        stack = list(node.meta.get("nn_module_stack", {}).values())
        path, cls = stack[-1] if stack else ("", "")
        path = plain(str(path).partition("@")[0])
        known = self.traced.modules.get(path)
        cls = cls if known is None else type(known)
        if isinstance(cls, type):
            kind = type_of(cls)
        else:  # a class of one's own is only known by its name
            kind = str(cls).rpartition(".")[2] if str(cls).startswith("torch.nn.modules.") else ""
        return call_operation(node, path, kind)

    # -- one operation

    def _value(self, argument: Any) -> Any:
        """The value of an argument, in which values of nodes may be nested."""
        from torch.fx import Node as Traced

        if isinstance(argument, Traced):
            return self.values[argument]
        if isinstance(argument, (list, tuple)):
            return tuple(self._value(one) for one in argument)
        if isinstance(argument, Mapping):
            return {key: self._value(one) for key, one in argument.items()}
        if isinstance(argument, slice):
            parts = [self._value(one) for one in (argument.start, argument.stop, argument.step)]
            return slice(*parts)
        return argument

    def _evaluate(self, node: fx.Node, call: Call) -> Any:
        call = Call(
            call.operation,
            tuple(self._value(one) for one in call.args),
            {name: self._value(one) for name, one in call.kwargs.items()},
            call.module,
            call.kind,
            call.in_place,
            call.original,
        )
        leaves = list(flatten((call.args, call.kwargs)))
        if call.operation in operations.SAME_SHAPE:
            leaves = leaves[:1]
        inputs = nodes_in(leaves)
        if call.operation in operations.SHAPES or call.operation.startswith(("_assert", "sym_")):
            return Held()
        if call.operation == "getattr":
            if call.args[1] not in ("T", "mT", "data"):
                return Held()
            flips = "T" in call.args[1]
            call = Call("t" if flips else "detach", call.args[:1], {}, call.module, original="aten.getattr")
        weighted = self._weighted(node, call)
        if weighted is not None:
            return weighted
        if not inputs:
            return self.held.constant(node, call, [one for one in leaves if isinstance(one, Held)])
        return self._part(node, call) or self._plain_operation(node, call, inputs)

    def _part(self, node: fx.Node, call: Call) -> Any:
        """One of several results, or the list of them; None for any other operation."""
        value = call.args[0] if call.args else None
        if call.operation in operations.SPLITS and isinstance(value, Result):
            before, shapes = self.shapes.get(value.node), shapes_of(node)
            axis = operations.split_axis(call, before)
            single = call.operation == "unbind"
            sizes = [1 if single else shape[axis] for shape in shapes] if axis is not None else []
            return Parts(value.node, axis, tuple(sizes))
        if call.operation != "getitem":
            return None
        key = call.args[1]
        if isinstance(value, tuple) and isinstance(key, (int, slice)):
            return value[key]
        if isinstance(value, Parts):
            attributes = {"axis": value.axis, "index": key if isinstance(key, int) else None}
            if value.sizes and isinstance(key, int):
                index = key % len(value.sizes)
                attributes.update(index=index, start=sum(value.sizes[:index]), step=1)
            name = self._name(call, "split")
            return Result(self._add(node, name, "split", (value.node,), attributes=attributes))
        if isinstance(value, Several) and isinstance(key, int):
            recurrent = self.nodes[value.node].op.startswith(("nn.LSTM", "nn.Multihead")) and key == 1
            return Several(value.node) if recurrent else Result(value.node)
        if isinstance(value, Result) and isinstance(key, str):  # a dictionary that was given
            return value
        return None

    def _plain_operation(self, node: fx.Node, call: Call, inputs: tuple[str, ...]) -> Any:
        word, attributes = describe(self._facts(node, call, len(inputs)))
        layers = self.held.layers_used(call)
        if layers and word == (call.original or call.operation):
            attributes = {**attributes, "layers": layers}
        owner = self.held.owner_of_affine(call) if word in ("layer_norm", "rms_norm", "group_norm") else ""
        name = self._unique(owner) if owner else self._name(call, word)
        added = self._add(node, name, word, inputs, attributes=attributes)
        self.channels[added] = self._channels_after(word, inputs[0], attributes, node)
        return Several(added) if self._has_several(node, call) else Result(added)

    def _has_several(self, node: fx.Node, call: Call) -> bool:
        known = node.meta.get("val")
        if known is not None:
            return isinstance(known, (tuple, list))
        return operations.SEVERAL.fullmatch(call.operation) is not None

    def _facts(self, node: fx.Node, call: Call, inputs: int) -> Facts:
        first = next((one.node for one in flatten(call.args) if not isinstance(one, Held)), "")
        return Facts(call, inputs, self.shapes.get(first), shape_of(node), self.channels.get(first), self.held.numbers)

    def _channels_after(self, word: str, first: str, attributes: Mapping[str, Any], node: fx.Node) -> int | None:
        """The channel axis of a result, as far as it is known."""
        before = self.channels.get(first)
        if word in ("layer_norm", "rms_norm"):
            return attributes["axes"][-1]  # type: ignore[no-any-return]
        if word == "group_norm":
            return 1
        if word == "transpose":
            axes = attributes["axes"]
            return axes.index(before % len(axes)) if axes and before is not None else None
        fewer = word == "split" and len(shape_of(node) or ()) != len(self.shapes[first] or ())
        return None if fewer or word in ("reshape", "flatten") else before

    # -- operations with a weight

    def _weighted(self, node: fx.Node, call: Call) -> Result | None:
        """A convolution, a matrix product, a lookup or a normalization; None for any other operation."""
        kind = call.operation[:-2] if spatial_axes(call.operation) else call.operation
        weight, bias = call.get(1, "weight"), call.get(2, "bias")
        if kind in ("conv", "conv_transpose"):
            return self._biased(node, self._convolution(node, call, kind), weight, bias)
        if kind == "linear":
            return self._biased(node, self._linear(node, call, call.get(0, "input"), weight, bias, False), weight, bias)
        if kind in ("matmul", "mm"):
            return self._linear(node, call, call.get(0, "input"), call.get(1, "other", "mat2"), None, True)
        if kind == "addmm":
            weight, bias = call.get(2, "mat2"), call.get(0, "input")
            return self._biased(node, self._linear(node, call, call.get(1, "mat1"), weight, bias, True), weight, bias)
        if kind == "embedding":
            weight = call.get(0, "weight")
            if not isinstance(weight, Held):
                return None
            return self._add_weighted(node, call, "embedding", nodes_in(call.get(1, "indices")), weight, {}, -1)
        return self._batch_norm(node, call) if kind == "batch_norm" else None

    def _biased(self, node: fx.Node, result: Result | None, weight: Any, bias: Any) -> Result | None:
        """The result of a layer; where what is added is not the layer's own bias, this is an addition by itself."""
        if result is None or not isinstance(bias, Held) or not isinstance(weight, Held):
            return result
        applied = self.nodes[result.node]
        names = applied.inputs if applied.op == "concat" else (applied.name,)
        layers = [self.held.layers[name] for name in (self.nodes[one].layer for one in names) if name]
        if not layers or self.held.is_own_bias(layers, weight, bias):
            return result
        for name in names:
            one = self.nodes[name]
            self.nodes[name] = replace(one, attributes={**one.attributes, "bias": False})
        name = self._unique(f"{applied.name.partition('@')[0]}/add")
        added = self._add(node, name, "add", (applied.name,), attributes={"constant": True})
        self.channels[added] = self.channels[applied.name]
        return Result(added)

    def _convolution(self, node: fx.Node, call: Call, kind: str) -> Result | None:
        data, weight, bias = call.get(0, "input"), call.get(1, "weight"), call.get(2, "bias")
        if not isinstance(weight, Held):
            return None
        groups = call.get(6, "groups", default=1)
        shape = shape_of(node)
        channels = 0 if shape is not None and len(shape) == spatial_axes(call.operation) + 1 else 1
        attributes = {"groups": groups, "channel_axis": channels, "bias": bias is not None}
        if kind == "conv":
            attributes["padding"] = is_padded(call.get(4, "padding", default=0), self.held.shape_of(weight)[2:])
        return self._add_weighted(node, call, kind, nodes_in(data), weight, attributes, channels)

    def _linear(self, node: fx.Node, call: Call, data: Any, weight: Any, bias: Any, columns: bool) -> Result | None:
        """``data @ weight`` where the weight's ``columns`` are the outputs, else ``data @ weight.T``."""
        if not isinstance(weight, Held) or not weight.path or isinstance(bias, Result):
            return None
        if len(self.held.shape_of(weight)) != 2 or not isinstance(data, Result if columns else (Result, Held)):
            return None  # among them the product of two weights, which is one more weight
        shape = shape_of(node)
        channels = len(shape) - 1 if shape else -1
        attributes: dict[str, Any] = {"channel_axis": channels, "bias": bias is not None}
        layer = self.held.layer_of(weight, call)
        if layer is None:
            return None
        across = layer.channels == "axis 1"  # the layer's rows are the columns of the tensor
        if columns ^ weight.flipped ^ across:
            attributes["transposed"] = True
        if not (columns or weight.flipped or weight.computed) and nodes_in(data):
            packed = self._packed(node, call, nodes_in(data), weight, attributes)
            if packed is not None:
                return packed
        return self._add_weighted(node, call, "linear", nodes_in(data), weight, attributes, channels)

    def _packed(
        self, node: fx.Node, call: Call, inputs: tuple[str, ...], weight: Held, attributes: dict[str, Any]
    ) -> Result | None:
        """A product with a tensor that holds several layers: one of each, and what they give side by side."""
        parts = self.held.packed(weight)
        shape, axis = shape_of(node), attributes["channel_axis"]
        added = []
        for layer, count in parts:
            part = None if shape is None else (*shape[:-1], count)
            name = self._unique(layer)
            added.append(self._add(node, name, "linear", inputs, layer=layer, attributes=dict(attributes), shape=part))
        if not added:
            return None
        if len(added) > 1:
            name = self._name(call, "concat")
            added = [self._add(node, name, "concat", tuple(added), attributes={"axis": axis})]
        self.channels[added[0]] = axis
        return Result(added[0])

    def _add_weighted(
        self,
        node: fx.Node,
        call: Call,
        op: str,
        inputs: tuple[str, ...],
        weight: Held,
        attributes: dict[str, Any],
        channels: int,
    ) -> Result:
        layer = self.held.layer_of(weight, call)
        name, layers = self.held.owner(weight)
        if layer is not None and layer.name not in layers:  # a weight that is computed anew, as by a parametrization
            name, layers = call.module or "(root)", (layer.name,)
        elif weight.computed:
            attributes["computed"] = True
        elif self.held.layers.get(call.module) is layer:  # one name of several for a tied weight
            name = call.module
        if len(layers) > 1:
            attributes["layers"] = layers
        if self.held.layers.get(call.module or "(root)") is not layer:
            attributes["uncalled"] = True
        name = self._unique(name) if name else self._name(call, op)
        used = layers[0] if len(layers) == 1 else ""
        added = self._add(node, name, op, inputs, layer=used, attributes=attributes)
        self.channels[added] = channels
        return Result(added)

    def _batch_norm(self, node: fx.Node, call: Call) -> Result | None:
        names = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")
        data, scale, shift, mean, variance, training, _, epsilon = (
            call.get(position, name) for position, name in enumerate(names)
        )
        if training or not isinstance(mean, Held) or not isinstance(data, Result):
            return None  # by the numbers of the batch
        owner, _, tensor = mean.path.rpartition(".")
        of_module = tensor == "running_mean" and not mean.computed
        name = (owner or "(root)") if of_module else self._name(call, "batch_norm")
        means, variances = self.held.numbers(mean), self.held.numbers(variance)
        if means is not None and variances is not None:
            scales = np.ones_like(means) if scale is None else self.held.numbers(scale)
            shifts = np.zeros_like(means) if shift is None else self.held.numbers(shift)
            if scales is not None and shifts is not None:
                self.norms.setdefault(name, Norm(name, means, variances, scales, shifts, float(epsilon)))
        attributes = {"channel_axis": 1, "scale": scale is not None, "shift": shift is not None}
        added = self._add(
            node, self._unique(name) if of_module else name, "batch_norm", (data.node,), attributes=attributes
        )
        self.channels[added] = 1
        return Result(added)

    def finish(self) -> Graph:
        """The graph of the nodes that matter to an output, in the order in which they were found."""
        wanted = [name for name, node in self.nodes.items() if node.op == "output"]
        reached: set[str] = set()
        while wanted:
            name = wanted.pop()
            if name not in reached:
                reached.add(name)
                wanted += self.nodes[name].inputs
        kept = [node for name, node in self.nodes.items() if name in reached or node.op == "input"]
        norms = {name: norm for name, norm in self.norms.items() if any(_is_call(node.name, name) for node in kept)}
        return Graph(tuple(kept), norms, self.traced.source)


def _is_call(node: str, module: str) -> bool:
    return node == module or node.startswith(f"{module}@")
