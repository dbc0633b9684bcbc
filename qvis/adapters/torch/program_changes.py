"""Changes operations of exported programs and graphs of bare operations: clips become ReLU, inputs are multiplied."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qvis.adapters.torch.module_changes import check_clip, factors_as
from qvis.adapters.torch.tensors import SCALE
from qvis.errors import BadArgumentError, suggest
from qvis.layers import FloatArray, Graph, Network
from qvis.rewriting import Rewriting

if TYPE_CHECKING:
    from torch import Tensor, fx

_CLIPS = {"aten::hardtanh", "aten::relu6", "aten::clamp", "aten::clip"}
_DATA = {"aten::linear": 0, "aten::matmul": 0, "aten::mm": 0, "aten::addmm": 1}
"""The argument of each product that is multiplied by the weight."""


@dataclass
class ProgramChanges:
    """What is to become of the operations of a program, by the names of its own nodes."""

    unclipped: list[str] = field(default_factory=list)
    scales: dict[str, tuple[str, list[str], Tensor]] = field(default_factory=dict)
    """By layer, the path of the new buffer, the products before which it comes, and its numbers."""
    rounded: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def make(self, program: Any) -> None:
        """Make them, in a program with the same nodes."""
        if not (self.unclipped or self.scales):
            return
        graphs = list(_graphs(program))
        nodes = {node.name: node for graph in graphs for node in graph.nodes}
        for name in self.unclipped:
            _unclip(nodes[name])
        for path, names, factors in self.scales.values():
            _multiply(program, [nodes[name] for name in names], path, factors)
        for graph in graphs:
            if graph.owning_module is not None:
                graph.owning_module.recompile()
        if hasattr(program, "graph_signature"):
            program._validate()


def plan_program_changes(
    program: Any, weights: Mapping[str, tuple[str, Tensor]], network: Network, rewriting: Rewriting
) -> ProgramChanges:
    """Find what has to be changed, and check that it can be. ``weights`` are the layers' tensors with their paths."""
    changes = ProgramChanges()
    if not (rewriting.unclipped or rewriting.multiplies):
        return changes
    calls = _Calls(program)
    for name in rewriting.unclipped:
        _plan_clip(changes, name, calls.graph, calls.nodes)
    for name, factors in rewriting.multiplies.items():
        _plan_product(changes, program, name, factors, weights, network, calls)
    return changes


def _graphs(program: Any) -> list[fx.Graph]:
    """The graph of a program, and those inside it."""
    from torch.fx import GraphModule

    outer = program.graph_module if hasattr(program, "graph_module") else program
    return [one.graph for one in outer.modules() if isinstance(one, GraphModule)]


def _schema(node: fx.Node) -> str:
    """Such as ``aten::relu``; empty for what is no bare operation."""
    from torch._ops import OpOverload

    return node.target._schema.name if isinstance(node.target, OpOverload) else ""


# ---------------------------------------------------------------------------------------------------------------------
# Clips


def _plan_clip(changes: ProgramChanges, name: str, graph: Graph, found: Mapping[str, list[fx.Node]]) -> None:
    check_clip(name, graph)
    node = graph.by_name[name]
    low, nodes = node.attributes["low"], found.get(node.original, [])
    if low != 0:
        changes.notes.append(f"{name!r}: it begins at {low}, not at 0 as a ReLU, so that it stays")
    elif len(nodes) != 1 or _schema(nodes[0]).removesuffix("_") not in _CLIPS:
        changes.notes.append(f"{name!r}: it is no operation of its own in the program ({node.original}), and stays")
    else:
        changes.unclipped.append(node.original)


def _unclip(node: fx.Node) -> None:
    import torch

    in_place = _schema(node).endswith("_")
    node.target = torch.ops.aten.relu_.default if in_place else torch.ops.aten.relu.default
    node.args, node.kwargs = (node.args[0] if node.args else node.kwargs["self"],), {}
    for key in ("source_fn_stack", "torch_fn"):  # they say what it was
        node.meta.pop(key, None)
    stack = node.meta.get("nn_module_stack")
    if stack:
        *_, key = stack
        path, cls = stack[key]
        if str(cls if isinstance(cls, str) else cls.__name__).rpartition(".")[2] in ("ReLU6", "Hardtanh"):
            node.meta["nn_module_stack"] = {**stack, key: (path, "torch.nn.modules.activation.ReLU")}


# ---------------------------------------------------------------------------------------------------------------------
# Multiplications


def multipliable_products(program: Any, weights: Mapping[str, tuple[str, Tensor]], network: Network) -> list[str]:
    """The layers that :func:`plan_program_changes` can multiply what enters; see there."""
    calls = _Calls(program)
    return [layer.name for layer in network.layers if layer.name in weights and calls.products_of(layer.name)]


class _Calls:
    """The operations of a program that apply its layers."""

    def __init__(self, program: Any) -> None:
        from qvis.adapters.torch.exported import graph as find_graph

        self.main = program.graph
        self.graph = find_graph(program)
        self.nodes: dict[str, list[fx.Node]] = {}
        """By name, in all graphs inside the program."""
        for one in _graphs(program):
            for node in one.nodes:
                self.nodes.setdefault(node.name, []).append(node)
        self.layers: dict[str, set[str]] = {}
        """The layers that each operation applies."""
        for node in self.graph.nodes:
            if node.layer:
                self.layers.setdefault(node.original, set()).add(node.layer)

    def products_of(self, layer: str) -> list[fx.Node]:
        """The products with the weight of a layer; none where another layer takes part in one, or it is no product."""
        found = []
        for call in self.graph.calls.get(layer, ()):
            same = self.nodes.get(call.original, [])
            plain = call.op == "linear" and call.inputs and "computed" not in call.attributes
            alone = self.layers[call.original] == {layer} and len(same) == 1 and same[0].graph is self.main
            if not (plain and alone and _schema(same[0]) in _DATA):
                return []
            found.append(same[0])
        return found


def _plan_product(
    changes: ProgramChanges,
    program: Any,
    name: str,
    factors: FloatArray,
    weights: Mapping[str, tuple[str, Tensor]],
    network: Network,
    calls: _Calls,
) -> None:
    known = {one: layer for layer in network.layers for one in (layer.name, *layer.aliases)}
    if name not in known or name not in weights:
        raise BadArgumentError(f"multiplies: no layer is called {name!r}{suggest(name, known)}")
    layer = known[name]
    products = calls.products_of(layer.name)
    if not products:
        raise BadArgumentError(
            f"multiplies: what enters {name!r} ({layer.op}) cannot be multiplied, because it is not a product of its "
            "own in the program's outermost graph; leave it out, or give the module that was exported"
        )
    path, weight = weights[name]
    owner, _, tensor = path.rpartition(".")
    buffer = f"{owner}.{SCALE}".lstrip(".") if tensor == "weight" else f"{path}_{SCALE}"
    held = _held(program)
    before = held[buffer] if all(_scaled_by(program, node, buffer) for node in products) else None
    while before is None and buffer in held:
        buffer += "_"
    count = int(weight.shape[1] if layer.channels != "axis 1" else weight.shape[0])
    new = factors_as(changes.rounded, name, factors, count, weight, before)
    changes.scales[layer.name] = buffer, [node.name for node in products], new
    if before is None:
        changes.notes.append(f"{name!r}: what enters is multiplied by the new buffer {buffer!r}")


def _held(program: Any) -> dict[str, Tensor]:
    if hasattr(program, "graph_signature"):
        return {**program.constants, **program.state_dict}
    return {
        **dict(program.named_parameters(remove_duplicate=False)),
        **dict(program.named_buffers(remove_duplicate=False)),
    }


def _scaled_by(program: Any, product: fx.Node, buffer: str) -> bool:
    """Whether what enters a product is multiplied by a buffer already, for this product alone."""
    before: Any = product.args[_DATA[_schema(product)]]
    if _schema(before) != "aten::mul" or len(before.users) != 1 or len(before.args) != 2:
        return False
    factor: Any = before.args[1]
    origins = program.graph_signature.inputs_to_buffers if hasattr(program, "graph_signature") else {}
    return bool(origins.get(getattr(factor, "name", ""), getattr(factor, "target", "")) == buffer)


def _multiply(program: Any, products: Collection[fx.Node], path: str, factors: Tensor) -> None:
    """Multiply what enters some products by a buffer, which is made if it is not there."""
    import torch

    if path in _held(program):
        with torch.no_grad():
            _held(program)[path].copy_(factors)
        return
    is_program = hasattr(program, "graph_signature")
    scale = _add_input(program, path, factors) if is_program else None
    if not is_program:
        _add_buffer(program, path, factors)
    for product in products:
        graph, position = product.graph, _DATA[_schema(product)]
        data: Any = product.args[position]
        with graph.inserting_before(product):
            factor = scale or graph.get_attr(path)
            made = graph.call_function(torch.ops.aten.mul.Tensor, (data, factor))
        stack = product.meta.get("nn_module_stack")
        made.meta = {} if stack is None else {"nn_module_stack": stack}
        known = data.meta.get("val")
        if known is not None:
            mode = known.fake_mode
            if scale is None:
                factor.meta["val"] = mode.from_tensor(factors, static_shapes=True)
            with mode:
                made.meta["val"] = torch.ops.aten.mul.Tensor(known, factor.meta["val"])
        product.update_arg(position, made)


def _add_input(program: Any, path: str, factors: Tensor) -> fx.Node:
    """A buffer of an exported program, which its graph is given before what the user gives."""
    from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

    specs = program.graph_signature.input_specs
    places = [node for node in program.graph.nodes if node.op == "placeholder"]
    place = next((i for i, spec in enumerate(specs) if spec.kind == InputKind.USER_INPUT), len(specs))
    modes = (getattr(node.meta.get("val"), "fake_mode", None) for node in places)
    mode = next((one for one in modes if one is not None), None)
    with program.graph.inserting_before(places[place] if place < len(places) else places[-1].next):
        node = program.graph.placeholder(f"b_{path.replace('.', '_')}")
    node.meta["val"] = mode.from_tensor(factors, static_shapes=True) if mode is not None else factors
    specs.insert(place, InputSpec(InputKind.BUFFER, TensorArgument(node.name), path, persistent=True))
    program.state_dict[path] = factors
    return node  # type: ignore[no-any-return]


def _add_buffer(program: Any, path: str, factors: Tensor) -> None:
    from torch import nn

    owner: nn.Module = program
    *steps, name = path.split(".")
    for step in steps:
        if step not in owner._modules:
            owner.add_module(step, nn.Module())
        owner = owner._modules[step]  # type: ignore[assignment]
    owner.register_buffer(name, factors)
