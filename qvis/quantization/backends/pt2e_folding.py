"""Makes a graph simpler to quantize without changing what it computes.

A normalization by fixed numbers becomes part of the weight before it: as operations on parameters, so that training
reaches them, which disappear when constants are computed in the end.
"""

from __future__ import annotations

from typing import Any

GraphModule = Any
Node = Any
"""Of torch.fx; the arguments of its nodes could be anything."""


def fold_norms(graph: GraphModule) -> None:
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

            def call(target: Any, *args: Any) -> Node:
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


def make_linear(graph: GraphModule) -> None:
    """Write products with a matrix of parameters as what they are: linear layers."""
    import torch

    aten = torch.ops.aten
    places = {aten.matmul.default: (0, 1), aten.mm.default: (0, 1), aten.addmm.default: (1, 2)}
    for node in list(graph.graph.nodes):
        if (
            node.op != "call_function"
            or node.target not in places
            or len(node.args) != len(places[node.target]) + (node.target is aten.addmm.default)
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
