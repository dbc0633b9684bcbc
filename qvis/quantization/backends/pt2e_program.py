"""From a model to a graph whose weights and activations can be rounded, and back to a program that can be saved.

The graph holds the parameters under the names that they have in the model. A normalization by fixed numbers becomes part
of the weight before it: as operations on parameters, so that training reaches them, which disappear when the constants
are computed in the end.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from qvis.errors import BadArgumentError, QvisError, UnsupportedModelError
from qvis.quantization.methods import Job
from qvis.running import Batch

if TYPE_CHECKING:
    from torch import Tensor, fx, nn
    from torch.export import ExportedProgram


class Opened(NamedTuple):
    """A model as a graph of operations, on the CPU, in 32-bit floats and evaluation mode, with memory of its own."""

    program: ExportedProgram
    graph: fx.GraphModule
    """With the normalizations folded; its parameters are copies."""
    args: tuple[Any, ...]
    """What it was called with to be followed: tensors."""
    kwargs: dict[str, Any]
    layers: Mapping[str, tuple[str, ...]]
    """The names of the layers in each parameter, by the parameter's path."""
    batch: int | None
    """The only number of samples that it takes; None where any will do."""


def open_model(job: Job) -> Opened:
    """Follow a model with ``torch.export``.

    Raises
    ------
    UnsupportedModelError
        It cannot be followed, or holds no numbers.
    BadArgumentError
        There is nothing to call it with.
    """
    from torch.export import ExportedProgram

    from qvis.adapters.torch.exported import _from_export, names_by_path

    model = job.model
    with quietly():
        program = _of_program(model) if isinstance(model, ExportedProgram) else _export(job)
    args, kwargs = program.example_inputs or ((), {})
    batch = _fixed_batch(program)
    paths = {path: _names(path, names) for path, names in names_by_path(_from_export(program)).items()}
    graph = program.module(check_guards=False)
    with quietly():
        _own(graph)
        fold_norms(graph)
        make_linear(graph)
        graph.graph.eliminate_dead_code()
        graph.recompile()
    return Opened(program, graph, args, kwargs, paths, batch)


@contextmanager
def quietly() -> Iterator[None]:
    """Without what torch prints and warns of, and with the random generators as they were."""
    import torch

    from qvis.adapters.torch.exchange import settings_kept
    from qvis.adapters.torch.graph import _quiet

    with settings_kept(torch.device("cpu")), _quiet():
        yield


def _export(job: Job) -> ExportedProgram:
    from qvis.adapters.torch.copying import copied
    from qvis.adapters.torch.graph import _check, _first_line, _settled

    if job.example is None:
        raise BadArgumentError(
            "example_inputs: none were given, and the model has to be called once to be followed; give its shape, such "
            "as (1, 3, 224, 224), or data"
        )
    import torch

    model = job.model
    try:
        _check(model)
    except QvisError as error:
        text = str(error).removeprefix("no graph: ")
        raise UnsupportedModelError(f"model: {text}") from None
    with _settled(model):
        plain = _in_float(copied(model)[0])
    plain.eval()
    args, kwargs = tensors_of(_several(job.example))
    failures = []
    for shapes in (_any_batch(args, kwargs), None):
        for strict in (False, True):
            try:
                with torch.no_grad():
                    program = torch.export.export(plain, args, kwargs, dynamic_shapes=shapes, strict=strict)
                return _functional(program)
            except Exception as error:  # noqa: PERF203
                failures.append(_first_line(error))
    raise UnsupportedModelError(
        f"model: torch.export cannot follow it ({failures[0]}); take out what depends on the numbers it is given, or "
        "write .safetensors with method='weight_only' or 'dynamic', which needs no graph"
    )


def _in_float(model: nn.Module) -> nn.Module:
    """The same on the CPU, real numbers as 32-bit floats."""
    return model.float().cpu()


def _of_program(program: ExportedProgram) -> ExportedProgram:
    import torch

    held = {**program.state_dict, **program.constants}
    for name, tensor in held.items():
        if not isinstance(tensor, torch.Tensor):
            continue
        if tensor.is_meta:
            raise UnsupportedModelError(
                f"model: {name!r} has a shape but no numbers (meta device); load the weights first"
            )
        if tensor.device.type != "cpu" or (tensor.is_floating_point() and tensor.dtype != torch.float32):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UnsupportedModelError(
                f"model: the program holds {name!r} as {kind} on {tensor.device}, and only float32 on the CPU is "
                "quantized; export the model anew after model.float().cpu(), or give the module itself"
            )
    if not program.example_inputs:
        raise UnsupportedModelError("model: the program has no example inputs; export it anew, or give the module")
    return _functional(copy.deepcopy(program))


def _functional(program: ExportedProgram) -> ExportedProgram:
    """Without operations in place, where there are any."""
    from torch._ops import OpOverload

    targets = (node.target for node in program.graph.nodes)
    if any(isinstance(one, OpOverload) and one._schema.is_mutable for one in targets):
        return program.run_decompositions({})
    return program


def _several(example: Batch) -> Batch:
    """At least two samples: a graph that was followed with one takes no more."""
    from torch.utils import _pytree as pytree

    def twice(value: Any) -> Any:
        if isinstance(value, np.ndarray) and value.ndim:
            return np.concatenate([value, value])
        return value.repeat(2, *[1] * (value.ndim - 1)) if hasattr(value, "repeat") and value.ndim else value

    if example.size > 1:
        return example
    args, kwargs = pytree.tree_map(twice, (tuple(example.args), dict(example.kwargs)))
    return Batch(args, kwargs, size=2)


def tensors_of(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs as tensors of their own on the CPU, real numbers as 32-bit floats."""
    from torch.utils import _pytree as pytree

    args, kwargs = pytree.tree_map(as_tensor, (tuple(batch.args), dict(batch.kwargs)))
    return args, kwargs


def as_tensor(value: Any) -> Any:
    """An array or tensor as a tensor of its own on the CPU, real numbers as 32-bit floats; all else as it is."""
    import torch

    if isinstance(value, (np.ndarray, np.generic)):
        value = torch.from_numpy(np.array(value))
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach().cpu().clone()
    return value.float() if value.is_floating_point() else value


def _any_batch(args: Any, kwargs: Any) -> Any:
    """That the first axis of every tensor may have any length."""
    import torch
    from torch.utils import _pytree as pytree

    found = torch.export.ShapesCollection()
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, torch.Tensor) and leaf.ndim:
            found[leaf] = {0: torch.export.Dim.AUTO}
    return found


def _fixed_batch(program: ExportedProgram) -> int | None:
    inputs = set(program.graph_signature.user_inputs)
    for node in program.graph.nodes:
        shape = getattr(node.meta.get("val"), "shape", ())
        if node.op == "placeholder" and node.name in inputs and len(shape) and isinstance(shape[0], int):
            return int(shape[0])
    return None


def _names(path: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """The layers in a parameter; where a weight is computed from it, as by weight_norm, the layer of that weight."""
    owner, found, rest = path.partition(".parametrizations.")
    if not found:
        return names
    tensor = rest.partition(".")[0]
    return (owner,) if tensor == "weight" else (f"{owner}.{tensor}",)


def _own(graph: fx.GraphModule) -> None:
    """Give a graph memory of its own; tied parameters stay tied."""
    import torch

    known: dict[int, Any] = {}
    for module in graph.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in known:
                    new = tensor.detach().clone()
                    known[id(tensor)] = torch.nn.Parameter(new) if held is module._parameters else new
                held[name] = known[id(tensor)]


# ---------------------------------------------------------------------------------------------------------------------
# Normalizations into weights


def fold_norms(graph: fx.GraphModule) -> None:
    """Make normalizations by fixed numbers part of the weight and the bias before them, as operations on parameters."""
    import torch

    aten = torch.ops.aten
    for norm in list(graph.graph.nodes):
        if norm.target is not aten.batch_norm.default or norm.args[5] is not False:
            continue
        layer = norm.args[0]
        axis = _folded_axis(layer)
        if axis is None or len(layer.users) > 1:
            continue
        _, scale, shift, mean, variance, *_ = norm.args
        weight = layer.args[1]
        bias = layer.args[2] if len(layer.args) > 2 else None
        with graph.graph.inserting_before(layer):

            def call(target: Any, *args: Any) -> fx.Node:
                return graph.graph.call_function(target, args)

            # the normalization's numbers may be listed after the layer
            scale, shift, mean, variance = (
                None if one is None else graph.graph.get_attr(one.target) for one in (scale, shift, mean, variance)
            )
            factor = call(aten.rsqrt.default, call(aten.add.Tensor, variance, norm.args[7]))
            if scale is not None:
                factor = call(aten.mul.Tensor, factor, scale)
            dimensions = weight.meta["val"].ndim
            along = call(aten.reshape.default, factor, [-1 if one == axis else 1 for one in range(dimensions)])
            new_weight = call(aten.mul.Tensor, weight, along)
            new_weight.meta.update(weight.meta)
            new_bias = call(aten.neg.default, mean) if bias is None else call(aten.sub.Tensor, bias, mean)
            new_bias = call(aten.mul.Tensor, new_bias, factor)
            if shift is not None:
                new_bias = call(aten.add.Tensor, new_bias, shift)
        layer.args = (layer.args[0], new_weight, new_bias, *layer.args[3:])
        norm.replace_all_uses_with(layer)
        graph.graph.erase_node(norm)


def make_linear(graph: fx.GraphModule) -> None:
    """Write products with a matrix of parameters as what they are: linear layers."""
    import torch

    aten = torch.ops.aten
    places = {aten.matmul.default: (0, 1), aten.mm.default: (0, 1), aten.addmm.default: (1, 2)}
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or node.target not in places or len(node.args) != len(places[node.target]) + (
            node.target is aten.addmm.default
        ):
            continue
        values, matrix = (node.args[one] for one in places[node.target])
        if matrix.op != "get_attr" or matrix.meta["val"].ndim != 2 or values.op == "get_attr" or node.kwargs:
            continue
        with graph.graph.inserting_before(node):
            turned = graph.graph.call_function(aten.t.default, (matrix,))
            turned.meta.update(matrix.meta)
            turned.meta["val"] = matrix.meta["val"].t()
            bias = node.args[:1] if node.target is aten.addmm.default else ()
            new = graph.graph.call_function(aten.linear.default, (values, turned, *bias))
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)


def _folded_axis(layer: Any) -> int | None:
    """The axis of the output channels in the weight of a layer that a normalization can become part of."""
    import torch

    aten = torch.ops.aten
    target = getattr(layer, "target", None)
    if target in (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default):
        return 0
    if target in (aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding):
        return 0
    if target in (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input):
        return 1 if len(layer.args) < 7 or layer.args[6] == 1 else None
    if target is aten.linear.default and layer.meta["val"].ndim == 2:
        return 0
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Constants, computed and named


def settled(graph: fx.GraphModule) -> fx.GraphModule:
    """The same graph with all that depends on no input computed, under readable names, and nothing else in it."""
    import torch
    from torch import fx, nn

    known: dict[fx.Node, Tensor] = {}
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
    for user in [node for node in graph.graph.nodes if node not in known]:
        for node in user.all_input_nodes:
            value = known.get(node)
            if not isinstance(value, torch.Tensor):
                continue
            name, value = _name_of(node, user, value)
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


def _is_constant(node: fx.Node, known: Mapping[fx.Node, Tensor]) -> bool:
    from torch._ops import OpOverload

    inputs = node.all_input_nodes
    if node.op != "call_function" or not inputs or not isinstance(node.target, OpOverload):
        return False
    if "dequantize" in node.target._schema.name or node.target._schema.is_mutable:
        return False
    return all(one in known for one in inputs)


def _name_of(node: fx.Node, user: fx.Node, value: Tensor) -> tuple[str, Tensor]:
    """What a constant is called: after the parameter that it was made of, and what it is to the operation.

    The zero points of weights are all zero, and shared by all that have so many of them.
    """
    import torch

    place = user.args.index(node) if node in user.args else -1
    if "dequantize" in str(user.target):
        path = _made_of(user.args[0])
        if place == 2 and not value.any():
            return f"zero_points_{value.numel()}", value.to(torch.int32)
        return path + {1: "_scale", 2: "_zero_point"}.get(place, ""), value
    if place == 2 and node.op != "get_attr" and ("aten.conv" in str(user.target) or "aten.linear" in str(user.target)):
        owner = _made_of(user.args[1]).rpartition(".")[0]
        return ".".join(filter(None, (owner, "bias"))), value
    return _made_of(node), value


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


def _set_attribute(graph: fx.GraphModule, path: str, tensor: Tensor) -> None:
    """For the time of rewriting, so that the graph may name it."""
    owner: Any = graph
    *owners, name = path.split(".")
    for one in owners:
        owner = getattr(owner, one)
    for held in (owner._parameters, owner._buffers):
        held.pop(name, None)
    owner.register_buffer(name, tensor)


def save(graph: fx.GraphModule, opened: Opened, path: Any) -> None:
    """Write a graph as an exported program that takes what the model takes."""
    import torch
    from torch.utils import _pytree as pytree

    args, kwargs = pytree.tree_map(as_tensor, (opened.args, opened.kwargs))
    shapes = _any_batch(args, kwargs) if opened.batch is None else None
    with quietly(), torch.no_grad():
        program = torch.export.export(graph, args, kwargs, dynamic_shapes=shapes)
        for node in program.graph.nodes:  # lines of the model's source, and what passes a node has gone through
            for name in ("stack_trace", "from_node", "torch_fn", "nn_module_stack", "source_fn_stack"):
                node.meta.pop(name, None)
        torch.export.save(program, path)
