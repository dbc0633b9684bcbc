"""Adds the operations with a weight to a graph while it is built: products, lookups, and normalizations by numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from qvis.adapters.torch.calls import Call, Held, is_padded, spatial_axes
from qvis.adapters.torch.nodes import Nodes
from qvis.adapters.torch.values import Result, Traced, nodes_in, shape_of
from qvis.layers import Norm

if TYPE_CHECKING:
    from torch import fx


class Weighted(Nodes):
    """The nodes that were found up to now, and what is known of those with a weight."""

    def __init__(self, traced: Traced) -> None:
        super().__init__(traced)
        self.norms: dict[str, Norm] = {}
        self.channels: dict[str, int | None] = {}
        """The channel axis of each result, None where it is not known."""

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
        prefix = f"{owner}." if owner else ""
        own = {"weight": scale, "bias": shift, "running_mean": mean, "running_var": variance}
        if not all(one is None or one == Held(prefix + key) for key, one in own.items()):
            attributes["writable"] = False
        added = self._add(
            node, self._unique(name) if of_module else name, "batch_norm", (data.node,), attributes=attributes
        )
        self.channels[added] = 1
        return Result(added)
