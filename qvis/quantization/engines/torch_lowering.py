"""From a quantized program, which imitates integers with floats, to one that computes with oneDNN's integer kernels.

The steps are those of torchao's lowering for x86 without a compiler, which replaces the chains from dequantizing to
quantizing by single operations. It knows them by the names that torch.compile gives to changes of shape.
"""

from __future__ import annotations

import copy
from typing import Any

GraphModule = Any
Node = Any
"""Of torch.fx; the arguments of its nodes could be anything."""


class NotLoweredError(Exception):
    """Why the integers of a program are not computed with."""


def lower(module: GraphModule, args: Any, kwargs: Any, expected: int) -> Any:
    """The program for inputs of these shapes, which takes all of them by position.

    Parameters
    ----------
    expected
        How many layers multiply integers.

    Raises
    ------
    NotLoweredError
        Not all of them can be computed with integers here.
    """
    import torch

    from qvis.adapters.torch.graph import _first_line
    from qvis.quantization.backends.pt2e_program import quietly

    try:
        with quietly(), torch.no_grad():
            lowered = _lowered(*_positional(_ready(copy.deepcopy(module)), args, kwargs))
    except Exception as error:  # whatever of torch's own parts has moved, or a processor cannot do
        raise NotLoweredError(f"the program cannot be lowered to integer kernels: {_first_line(error)}") from error
    names = [str(node.target) for node in lowered.graph.nodes if node.op == "call_function"]
    done = sum(name.startswith("onednn.q") for name in names)
    if done < expected:
        raise NotLoweredError(
            f"oneDNN's integer kernels take {done} of {expected} layers here; the others would be imitated with floats"
        )
    return lowered


def _lowered(module: Any, inputs: tuple[Any, ...]) -> Any:
    import torch
    import torchao.quantization.pt2e  # noqa: F401  (registers operations)
    from torch._export.utils import _is_cia_op
    from torch._inductor.constant_folding import constant_fold
    from torch._inductor.fx_passes.freezing_patterns import freezing_passes

    aten = torch.ops.aten
    table: Any = torch.export.default_decompositions()
    composed = {op: rule for op, rule in table.items() if _is_cia_op(op)}
    program = torch.export.export(module, inputs, strict=True).run_decompositions(composed)
    lowered = program.module(check_guards=False)
    for node in lowered.graph.nodes:
        if node.target is aten.t.default:
            node.target, node.args = aten.permute.default, (node.args[0], [1, 0])
        elif node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
    lowered.recompile()
    freezing_passes(lowered, inputs)
    constant_fold(lowered)
    return lowered


def _positional(module: GraphModule, args: Any, kwargs: Any) -> tuple[Any, tuple[Any, ...]]:
    """A module that takes its tensors by position, whatever nest of them the other takes."""
    import torch
    from torch import nn
    from torch.utils import _pytree as pytree

    leaves, spec = pytree.tree_flatten((args, kwargs))
    if not kwargs and all(isinstance(one, torch.Tensor) for one in args):
        return module, tuple(args)

    class Positional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, *given: Any) -> Any:
            args, kwargs = pytree.tree_unflatten(given, spec)
            return self.inner(*args, **kwargs)

    return Positional(), tuple(leaves)


def _ready(module: GraphModule) -> GraphModule:
    """The same, in a form that is lowered: a step for each channel, and linear layers of what lies in order."""
    import torch

    decomposed, aten = torch.ops.quantized_decomposed, torch.ops.aten
    for node in list(module.graph.nodes):
        if _name(node) in ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "conv3d"):
            _in_float(module, node)  # else taken for a convolution that there is a kernel for
        elif node.target is aten.embedding.default and node.args[0].target is decomposed.dequantize_per_channel.default:
            _rows_first(module, node)
        elif node.target is decomposed.dequantize_per_tensor.default and node.args[0].op == "get_attr":
            _by_channel(module, node)
        if node.target is aten.linear.default and node.args[0].target is decomposed.dequantize_per_tensor.default:
            rounded = node.args[0].args[0]
            if rounded.target is not decomposed.quantize_per_tensor.default:
                continue
            if rounded.args[0].meta["val"].is_contiguous():
                continue
            with module.graph.inserting_before(rounded):
                new = module.graph.call_function(
                    aten.clone.default, (rounded.args[0],), {"memory_format": torch.contiguous_format}
                )
            rounded.replace_input_with(rounded.args[0], new)
    module.recompile()
    return module


def _name(node: Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return "" if schema is None else str(schema.name).rpartition("::")[2]


def _rows_first(module: GraphModule, node: Node) -> None:
    """Dequantize the rows that are looked up in a table, not all of it."""
    import torch

    aten, made = torch.ops.aten, node.args[0]
    table, steps, zeros, axis, *_ = made.args
    if axis != 0 or module.get_buffer(zeros.target).any():
        return
    with module.graph.inserting_before(node):
        rows = module.graph.call_function(aten.embedding.default, (table, node.args[1]))
        step = module.graph.call_function(aten.index.Tensor, (steps, [node.args[1]]))
        step = module.graph.call_function(aten.unsqueeze.default, (step, -1))
        new = module.graph.call_function(aten.mul.Tensor, (rows, step))
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)
    module.graph.erase_node(node)
    if not made.users:
        module.graph.erase_node(made)


def _in_float(module: GraphModule, node: Node) -> None:
    """Dequantize the weight of a layer for good."""
    made = node.args[1]
    if "dequantize" not in _name(made):
        return
    given = [module.get_buffer(one.target) if getattr(one, "op", "") == "get_attr" else one for one in made.args]
    module.register_buffer(f"{node.name}_weight", made.target(*given))
    with module.graph.inserting_before(node):
        weight = module.graph.get_attr(f"{node.name}_weight")
    weight.meta.update(made.meta)
    node.replace_input_with(made, weight)
    if not made.users:
        module.graph.erase_node(made)


def _by_channel(module: GraphModule, node: Node) -> None:
    """Repeat the one step of a weight for each of its channels."""
    import torch

    weight, step, zero, low, high, kind = node.args[:6]
    channels = weight.meta["val"].shape[0]
    for name, value in (("step", torch.full((channels,), step)), ("zero", torch.full((channels,), zero))):
        module.register_buffer(f"{node.name}_{name}", value)
    with module.graph.inserting_before(node):
        steps, zeros = (module.graph.get_attr(f"{node.name}_{name}") for name in ("step", "zero"))
        new = module.graph.call_function(
            torch.ops.quantized_decomposed.dequantize_per_channel.default,
            (weight, steps, zeros, 0, low, high, kind),
        )
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)
    module.graph.erase_node(node)
