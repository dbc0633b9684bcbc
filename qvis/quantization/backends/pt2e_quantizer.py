"""Says which numbers of a graph are rounded, and how: the rules that torchao's quantization by export follows.

Weights are rounded by themselves. Activations are rounded where they enter a layer that multiplies them with a rounded
weight, and where they enter what has to be done between such layers: additions, pooling, joining. So an operation that
integers can carry out gets integers, and what it puts out is rounded where the next one takes it. What is left, such as
softmax and layer normalization, computes with floats.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from qvis.quantization.backends.pt2e_rounding import ACTIVATION_BITS, roundings
from qvis.quantization.methods import FLOAT

GraphModule = Any
Node = Any
"""Of torch.fx; the arguments of its nodes could be anything."""


class Weight(NamedTuple):
    """A weight that a graph's operation takes."""

    node: Node
    """The operation."""
    weight: Node
    axis: int
    """Of the output channels."""
    input: Node | None
    """What is multiplied with it, where that can be rounded."""
    names: tuple[str, ...]
    """Of the layers in it."""
    path: str
    """The parameter that it is, or is made of."""


def weights_in(graph: GraphModule, layers: Mapping[str, Sequence[str]]) -> Iterator[Weight]:
    """The weights of a graph's operations, with the names of their layers; ``layers`` has these by paths."""
    for node in graph.graph.nodes:
        rule = _rules().get(node.target) if node.op == "call_function" else None
        if rule is None:
            continue
        position, axis, activation = rule
        for weight in _listed(node.args[position]):
            if _is_constant(weight) and _is_matrix(weight):
                taken = None if activation is None else node.args[activation]
                path = _path(weight)
                names = tuple(layers.get(path, ())) or _module_of(node)
                yield Weight(node, weight, axis, taken, names, path)


def roundings_in(graph: GraphModule, layers: Mapping[str, Sequence[str]]) -> Iterator[tuple[Weight, Any]]:
    """The weights of a prepared graph that are rounded, and the modules that round them."""
    for node in graph.graph.nodes:
        rule = _rules().get(node.target) if node.op == "call_function" else None
        if rule is None:
            continue
        for weight in _listed(node.args[rule[0]]):
            rounding = getattr(graph, str(weight.target)) if weight.op == "call_module" else None
            if isinstance(rounding, roundings().weight):
                path = _path(weight)
                names = tuple(layers.get(path, ())) or _module_of(node)
                yield Weight(node, weight, rule[1], None, names, path), rounding


@cache
def _rules() -> dict[Any, tuple[int, int, int | None]]:
    """Where in the arguments weights are, the axis of their output channels, and where what is rounded with them is."""
    import torch

    aten = torch.ops.aten
    layers = (
        aten.conv1d.default,
        aten.conv1d.padding,
        aten.conv2d.default,
        aten.conv2d.padding,
        aten.linear.default,
    )
    spatial = (aten.conv3d.default, aten.conv3d.padding)
    transposed = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
    recurrent = (aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)
    return {
        **dict.fromkeys(layers, (1, 0, 0)),
        # what follows has no integer kernels in oneDNN as PyTorch calls it
        **dict.fromkeys(spatial, (1, 0, None)),
        **dict.fromkeys(transposed, (1, 1, None)),
        aten.embedding.default: (0, 0, None),
        **dict.fromkeys(recurrent, (2, 0, None)),
        aten.bilinear.default: (2, 0, None),
    }


def quantizer(layers: Mapping[str, Sequence[str]], bits: Mapping[str, int], granularity: str, activations: bool) -> Any:
    """A quantizer of torchao.

    Parameters
    ----------
    layers
        The names of the layers in each parameter, by the parameter's path.
    bits
        The width of each layer's weight.
    granularity
        ``channel`` or ``tensor``.
    activations
        Whether activations are rounded too.
    """
    from torchao.quantization.pt2e.quantizer import Quantizer

    class Rules(Quantizer):  # type: ignore[misc, unused-ignore]
        def annotate(self, model: GraphModule) -> GraphModule:
            _Annotating(layers, bits, granularity).annotate(model, activations)
            return model

        def validate(self, model: GraphModule) -> None:
            pass

    return Rules()


class _Annotating:
    def __init__(self, layers: Mapping[str, Sequence[str]], bits: Mapping[str, int], granularity: str) -> None:
        import torch
        from torchao.quantization.pt2e.quantizer import QuantizationSpec

        self.layers, self.bits, self.granularity = layers, bits, granularity
        self.activation = QuantizationSpec(
            dtype=torch.uint8,
            observer_or_fake_quant_ctr=roundings().activation,
            quant_min=0,
            quant_max=2**ACTIVATION_BITS - 1,
            qscheme=torch.per_tensor_affine,
        )
        self.inputs: dict[Node, dict[Node, Any]] = {}
        self.outputs: dict[Node, Any] = {}

    def annotate(self, graph: GraphModule, activations: bool) -> None:
        """Write into the nodes of a graph what of them is rounded."""
        from torchao.quantization.pt2e.quantizer import QuantizationAnnotation

        for weight in weights_in(graph, self.layers):
            width = width_of(weight, self.bits)
            if width == FLOAT:
                continue
            taken = self.inputs.setdefault(weight.node, {})
            taken[weight.weight] = self.weight(width, weight.axis)
            if activations and weight.input is not None and is_real(weight.input):
                taken[weight.input] = self.activation
        if activations:
            layers = set(self.inputs)
            for node in graph.graph.nodes:
                self._between(node, layers)
        for node in {*self.inputs, *self.outputs}:
            node.meta["quantization_annotation"] = QuantizationAnnotation(
                input_qspec_map=self.inputs.get(node, {}), output_qspec=self.outputs.get(node), _annotated=True
            )

    def weight(self, width: int, axis: int) -> Any:
        import torch
        from torchao.quantization.pt2e.quantizer import QuantizationSpec

        limit = 2 ** (width - 1) - 1
        by_channel = self.granularity == "channel"
        return QuantizationSpec(
            dtype=torch.int8,
            observer_or_fake_quant_ctr=roundings().weight,
            quant_min=-limit,
            quant_max=limit,
            qscheme=torch.per_channel_symmetric if by_channel else torch.per_tensor_symmetric,
            ch_axis=axis if by_channel else None,
        )

    def _between(self, node: Node, layers: set[Node]) -> None:
        """What is done between layers: only where numbers come from a layer and go to one is it worth rounding."""
        from torchao.quantization.pt2e.quantizer import SharedQuantizationSpec

        kind = _kind(node)
        if not kind or not is_real(node):
            return
        taken = [one for one in _operands(node) if is_real(one)]
        if not taken or len(taken) < (2 if kind == "sum" else 1) or any(map(_is_constant, taken)):
            return
        if not any(_comes_from(one, layers) for one in taken):
            return
        if kind == "sum":
            # the layer that adds to what is there: its sum is never rounded before
            inner = [one for one in taken if one in layers and len(one.users) == 1]
            self.inputs[node] = dict.fromkeys((one for one in taken if one not in inner[-1:]), self.activation)
        elif kind == "same":
            first = (taken[0], node)
            rest = dict.fromkeys(taken[1:], SharedQuantizationSpec(first))
            self.inputs[node] = {taken[0]: self.activation, **rest}
            self.outputs[node] = SharedQuantizationSpec(first)
        else:
            self.inputs[node] = dict.fromkeys(taken, self.activation)


def width_of(weight: Weight, bits: Mapping[str, int]) -> int:
    """The width that was asked for of a weight; that of a layer that was not mentioned is :data:`FLOAT`."""
    return min((bits[name] for name in weight.names if name in bits), default=FLOAT)


def is_real(node: Any) -> bool:
    """Whether a node's result is a tensor of 32-bit floats."""
    import torch

    return getattr(getattr(node, "meta", {}).get("val"), "dtype", None) is torch.float32


@cache
def _kinds() -> dict[Any, str]:
    import torch

    aten = torch.ops.aten
    return {
        **dict.fromkeys((aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor), "sum"),
        **dict.fromkeys((aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default), "same"),
        aten.cat.default: "same",
        **dict.fromkeys((aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default), "mean"),
        **dict.fromkeys(
            (aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default),
            "mean",
        ),
        aten.mean.dim: "mean",
    }


def _kind(node: Node) -> str:
    return _kinds().get(node.target, "") if node.op == "call_function" else ""


HANDING_ON = frozenset(
    (  # noqa: SIM905
        "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d add avg_pool1d avg_pool2d avg_pool3d cat chunk "
        "clamp clone contiguous dropout elu flatten gelu getitem hardsigmoid hardswish hardtanh leaky_relu "
        "max_pool1d max_pool2d max_pool3d mean mul pad permute pixel_shuffle relu relu6 reshape select sigmoid silu "
        "slice split squeeze sub tanh transpose unsqueeze upsample_bilinear2d upsample_nearest2d view"
    ).split()
)
"""What stands between layers without leaving the kind of numbers that they take and give."""


def _comes_from(node: Node, layers: set[Node]) -> bool:
    """Whether what a node puts out was made by layers, and by nothing that needs floats."""
    seen: set[Node] = set()
    waiting = [node]
    while waiting:
        one = waiting.pop()
        if one in layers:
            return True
        if one in seen or one.op != "call_function":
            continue
        seen.add(one)
        if operation(one) in HANDING_ON:
            waiting += one.all_input_nodes
    return False


def operation(node: Node) -> str:
    """The name of what a node does, without its library and overload."""
    schema = getattr(node.target, "_schema", None)
    name = schema.name.rpartition("::")[2] if schema is not None else getattr(node.target, "__name__", "")
    return str(name).rstrip("_")


def _operands(node: Node) -> list[Node]:
    second = node.args[1:2] if operation(node) in ("add", "mul", "sub") else ()
    return [*_listed(node.args[0]), *(one for one in second if hasattr(one, "meta"))]


def _listed(value: Any) -> list[Node]:
    return [one for one in (value if isinstance(value, (list, tuple)) else [value]) if hasattr(one, "meta")]


def _is_constant(node: Node) -> bool:
    """Whether a node depends on no input."""
    if node.op == "get_attr":
        return True
    inputs = node.all_input_nodes
    return node.op == "call_function" and bool(inputs) and all(map(_is_constant, inputs))


def _is_matrix(node: Node) -> bool:
    value = node.meta.get("val")
    return is_real(node) and value is not None and value.ndim >= 2


def _path(node: Node) -> str:
    """The parameter that a weight is, or is made of."""
    while node.op != "get_attr" and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return str(node.target)


def _module_of(node: Node) -> tuple[str, ...]:
    """The module that an operation belongs to."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return (str(stack[-1][0]).partition("@")[0],) if stack else ()
