"""From the graph that torch.fx or torch.export traced to a :class:`~qvis.layers.Graph`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qvis.adapters.torch import operations
from qvis.adapters.torch.calls import Call, Held, call_module, call_operation, type_of
from qvis.adapters.torch.nodes import known_shape
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
from qvis.adapters.torch.weighted import Weighted
from qvis.layers import Graph, Node

if TYPE_CHECKING:
    from torch import fx


def build(traced: Traced) -> Graph:
    """The graph, without the operations that lead to no output."""
    builder = _Builder(traced)
    builder.walk(traced.graph, ())
    return builder.finish()


class _Builder(Weighted):
    def __init__(self, traced: Traced) -> None:
        super().__init__(traced)
        self.values: dict[fx.Node, Any] = {}
        self.bases: dict[fx.Node, tuple[fx.Node, bool]] = {}
        """What a result is a view of, and whether it is the whole of it."""

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
            if isinstance(call.args[0], Several):  # one of the results, by its name
                return Result(call.args[0].node)
            if call.args[1] in operations.FACTS:
                return Held()
            if call.args[1] in ("T", "mT", "data"):
                name = "detach" if call.args[1] == "data" else "t"
                call = Call(name, call.args[:1], {}, call.module, original="aten.getattr")
        weighted = self._weighted(node, call)
        if weighted is not None:
            return weighted
        if not inputs:
            return self.held.constant(node, call, [one for one in leaves if isinstance(one, Held)])
        rolled = self._rolled(node, call) if call.operation == "roll" else None
        return rolled or self._part(node, call) or self._plain_operation(node, call, inputs)

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

    def _rolled(self, node: fx.Node, call: Call) -> Result | None:
        """What is rolled along some axes is two parts the other way round along each of them."""
        data, shifts, axes = call.get(0, "input"), call.get(1, "shifts"), call.get(2, "dims", default=())
        shifts, axes = ((one,) if isinstance(one, int) else one for one in (shifts, axes))
        shape = known_shape(self.shapes.get(data.node)) if isinstance(data, Result) else ()
        if not shape or not axes or not all(isinstance(one, int) for one in (*shifts, *axes)):
            return None
        found = data.node
        for shift, axis in zip(shifts, axes, strict=True):
            axis %= len(shape)
            cut = -shift % shape[axis]
            parts = []
            for start, size in ((cut, shape[axis] - cut), (0, cut)) if cut else ():
                part = (*shape[:axis], size, *shape[axis + 1 :])
                attributes = {"axis": axis, "start": start, "step": 1}
                name = self._name(call, "split")
                parts.append(self._add(node, name, "split", (found,), attributes=attributes, shape=part))
            if parts:
                found = self._add(node, self._name(call, "concat"), "concat", tuple(parts), attributes={"axis": axis})
        self.channels[found] = self.channels.get(data.node)
        return Result(found)

    def _plain_operation(self, node: fx.Node, call: Call, inputs: tuple[str, ...]) -> Any:
        word, attributes = describe(self._facts(node, call, len(inputs)))
        layers = self.held.layers_used(call)
        if word != (call.original or call.operation):
            layers = tuple(name for name in layers if self.held.layers[name].op != "other")
        if layers:
            attributes = {**attributes, "layers": layers}
        owner, more = self.held.written_out(word, call, shape_of(node))
        attributes = {**attributes, **more}
        if word in ("layer_norm", "rms_norm", "group_norm"):
            owner = self.held.owner_of_affine(call)
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
        if word == "concat" and before is not None and len(shape_of(node) or ()) > len(self.shapes[first] or ()) > 0:
            return before + int(attributes["axis"] <= before)  # stacked
        fewer = word == "split" and len(shape_of(node) or ()) != len(self.shapes[first] or ())
        return None if fewer or word in ("reshape", "flatten") else before

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
