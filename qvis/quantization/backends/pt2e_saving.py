"""From a quantized graph to a file: constants are computed and named, and nothing else is kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvis.quantization.backends.pt2e_program import Opened, any_batch, as_tensor, quietly

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.export import ExportedProgram

GraphModule = Any
Node = Any
"""Of torch.fx; the arguments of its nodes could be anything."""


def settled(graph: GraphModule, named: Mapping[str, str]) -> GraphModule:
    """The same graph with all that depends on no input computed, under readable names, and nothing else in it.

    ``named`` has other paths for some parameters.
    """
    import torch
    from torch import fx, nn

    known: dict[Node, Tensor] = {}
    with torch.no_grad():
        for node in graph.graph.nodes:
            if node.op == "get_attr":
                known[node] = _attribute(graph, node.target)
            elif _is_constant(node, known):
                args = fx.node.map_arg(node.args, lambda one: known[one])
                kwargs = fx.node.map_arg(node.kwargs, lambda one: known[one])
                known[node] = node.target(*args, **kwargs)
    root = nn.Module()
    names: dict[str, Tensor] = {}
    places = {node: place for place, node in enumerate(graph.graph.nodes)}
    users = [node for node in graph.graph.nodes if node not in known]
    # a weight is dequantized early, and belongs to the layer that takes it
    for user in sorted(users, key=lambda node: min((places[one] for one in node.users), default=places[node])):
        for node in user.all_input_nodes:
            value = known.get(node)
            if not isinstance(value, torch.Tensor):
                continue
            name, value = _name_of(node, user, value, named)
            name = _unused(name, value, names)
            if name not in names:
                names[name] = value.detach().clone().contiguous()
                _put(root, name, names[name])
                _set_attribute(graph, name, names[name])
            with graph.graph.inserting_before(user):
                new = graph.graph.get_attr(name)
            new.meta.update(node.meta)
            user.replace_input_with(node, new)
    graph.graph.eliminate_dead_code()
    for name, child in graph.named_children():
        if any(node.op in ("call_module", "get_attr") and node.target == name for node in graph.graph.nodes):
            root.add_module(name, child)  # graphs within the graph
    found = fx.GraphModule(root, graph.graph)
    _order(found, root)
    return found


def _order(module: nn.Module, like: nn.Module) -> None:
    """Have the modules in the order of use; torch.fx puts those with short names first."""
    for name, child in like._modules.items():
        own = module._modules.pop(name, None)
        if own is not None and child is not None:
            module._modules[name] = own
            _order(own, child)


def _is_constant(node: Node, known: Mapping[Node, Tensor]) -> bool:
    from torch._ops import OpOverload

    inputs = node.all_input_nodes
    if node.op != "call_function" or not inputs or not isinstance(node.target, OpOverload):
        return False
    if "dequantize" in node.target._schema.name or node.target._schema.is_mutable:
        return False
    return all(one in known for one in inputs)


def _name_of(node: Node, user: Node, value: Tensor, named: Mapping[str, str]) -> tuple[str, Tensor]:
    """What a constant is called: after the parameter that it was made of, and what it is to the operation.

    The zero points of weights are all zero, and shared by all that have so many of them.
    """
    import torch

    place = user.args.index(node) if node in user.args else -1
    if "dequantize" in str(user.target):
        path = _made_of(user.args[0])
        path = named.get(path, path)
        if place == 2 and not value.any():
            return f"zero_points_{value.numel()}", value.to(torch.int32)
        return path + {1: "_scale", 2: "_zero_point"}.get(place, ""), value
    if place == 2 and node.op != "get_attr" and ("aten.conv" in str(user.target) or "aten.linear" in str(user.target)):
        owner = _made_of(user.args[1]).rpartition(".")[0]
        return ".".join(filter(None, (owner, "bias"))), value
    path = _made_of(node)
    return named.get(path, path), value


def _made_of(node: Any) -> str:
    """The path of the first parameter that a constant comes from."""
    while node.op != "get_attr" and node.all_input_nodes:
        node = node.all_input_nodes[0]
    owner, found, rest = str(node.target).partition(".parametrizations.")
    return f"{owner}.{rest.partition('.')[0]}" if found else owner


def _unused(name: str, value: Tensor, names: Mapping[str, Tensor]) -> str:
    """The name, or one like it where another constant has it."""
    import torch

    found, number = name, 1
    while found in names and not (names[found].dtype == value.dtype and torch.equal(names[found], value)):
        number += 1
        found = f"{name}_{number}"
    return found


def _attribute(module: Any, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part)
    return module


def _put(root: nn.Module, path: str, tensor: Tensor) -> None:
    from torch import nn

    *owners, name = path.split(".")
    for owner in owners:
        if not hasattr(root, owner):
            root.add_module(owner, nn.Module())
        root = getattr(root, owner)
    if tensor.is_floating_point() and not name.endswith("_scale"):
        root.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    else:
        root.register_buffer(name, tensor)


def _set_attribute(graph: GraphModule, path: str, tensor: Tensor) -> None:
    """For the time of rewriting, so that the graph may name it."""
    from torch import nn

    owner: Any = graph
    *owners, name = path.split(".")
    for one in owners:
        if not hasattr(owner, one):
            owner.add_module(one, nn.Module())
        owner = getattr(owner, one)
    for held in (owner._parameters, owner._buffers):
        held.pop(name, None)
    owner.register_buffer(name, tensor)


def save(graph: GraphModule, opened: Opened, path: Path) -> None:
    """Write a graph as an exported program that takes what the model takes."""
    import torch
    from torch.utils import _pytree as pytree

    args, kwargs = pytree.tree_map(as_tensor, (opened.args, opened.kwargs))
    shapes = any_batch(args, kwargs) if opened.batch is None else None
    with quietly(), torch.no_grad():
        program = torch.export.export(graph, args, kwargs, dynamic_shapes=shapes)
        _say_modules(program, opened.types)
        torch.export.save(program, path)


def _say_modules(program: ExportedProgram, types: Mapping[str, str]) -> None:
    """Note at what takes a weight which module that is of, and nothing else.

    Who reads the file knows by it the parts of a weight. The rest would be lines of the model's source, and each step
    that a node has gone through, which is twice as much as the graph itself.
    """
    signature = program.graph_signature
    paths = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    owners: dict[Node, str] = {}
    for node in program.graph.nodes:
        for name in ("stack_trace", "from_node", "torch_fn", "nn_module_stack", "source_fn_stack"):
            node.meta.pop(name, None)
        if node.op == "placeholder" and node.name in paths:
            owners[node] = paths[node.name].rpartition(".")[0]
        elif node.op == "call_function" and node.all_input_nodes and "dequantize" in str(node.target):
            first = node.all_input_nodes[0]
            owners.update({node: owners[first]} if first in owners else {})
        elif node.op == "call_function":
            owner = next((owners[one] for one in node.all_input_nodes if one in owners), "")
            known = {path: (path, types[path]) for path in dict.fromkeys(("", owner)) if path in types}
            if known:
                node.meta["nn_module_stack"] = {f"module {path}": held for path, held in known.items()}
