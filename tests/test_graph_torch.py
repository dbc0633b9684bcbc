"""How data flows through PyTorch modules, as torch.export and torch.fx find it."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from qvis.adapters import torch as adapter
from qvis.adapters.torch import exported
from qvis.errors import NoGraphError
from qvis.layers import OPS, Graph, Node
from qvis.running import Batch
from tests import zoo
from tests.convnets import IMAGE_MODELS, image_model, images


class Flow(nn.Module):
    """Modules in a flow that the test gives."""

    def __init__(self, flow: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.flow = flow

    def forward(self, x: Tensor) -> Any:
        return self.flow(self, x)


def check(graph: Graph, model: nn.Module) -> None:
    """Every node follows its inputs, every layer is one that is read, and all that has a word has its attributes."""
    layers = {layer.name for layer in adapter.read(model).layers}
    known: set[str] = set()
    for node in graph.nodes:
        assert set(node.inputs) <= known, node
        assert node.layer in layers | {""}, node
        assert node.name not in known
        known.add(node.name)
        if node.op in ("conv", "conv_transpose", "linear", "batch_norm"):
            assert "channel_axis" in node.attributes
        if node.op in ("concat", "split"):
            assert "axis" in node.attributes
    assert any(node.op == "output" for node in graph.nodes)


def graphs(model: nn.Module, *inputs: Tensor) -> list[Graph]:
    """With an example and without one."""
    found = [adapter.graph(model, Batch(inputs)), adapter.graph(model, None)]
    assert [graph.source for graph in found] == ["torch.export", "torch.fx"]
    for graph in found:
        check(graph, model)
    return found


def lines(graph: Graph, *, shapes: bool = False) -> list[tuple[Any, ...]]:
    return [(node.name, node.op, node.inputs, node.layer, *([node.shape] if shapes else [])) for node in graph.nodes]


def only(graph: Graph, op: str) -> Node:
    (node,) = (node for node in graph.nodes if node.op == op)
    return node


# ---------------------------------------------------------------------------------------------------------------------
# What is found


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_export_and_fx_find_the_same_operations(name: str) -> None:
    exported_graph, symbolic = graphs(image_model(name), images())
    assert lines(exported_graph) == lines(symbolic)
    assert exported_graph.norms.keys() == symbolic.norms.keys()
    assert all(node.shape for node in exported_graph.nodes)
    assert not any(node.shape for node in symbolic.nodes)
    assert all(node.op in OPS for node in exported_graph.nodes)


def test_a_graph_names_what_it_holds() -> None:
    graph, _ = graphs(image_model("ResNet"), images())
    assert lines(graph, shapes=True)[11:22] == [
        ("layer1.relu@2", "relu", ("layer1/add",), "", (2, 8, 8, 8)),
        ("layer2.conv1", "conv", ("layer1.relu@2",), "layer2.conv1", (2, 12, 4, 4)),
        ("layer2.bn1", "batch_norm", ("layer2.conv1",), "", (2, 12, 4, 4)),
        ("layer2.relu", "relu", ("layer2.bn1",), "", (2, 12, 4, 4)),
        ("layer2.conv2", "conv", ("layer2.relu",), "layer2.conv2", (2, 12, 4, 4)),
        ("layer2.bn2", "batch_norm", ("layer2.conv2",), "", (2, 12, 4, 4)),
        ("layer2.downsample.0", "conv", ("layer1.relu@2",), "layer2.downsample.0", (2, 12, 4, 4)),
        ("layer2.downsample.1", "batch_norm", ("layer2.downsample.0",), "", (2, 12, 4, 4)),
        ("layer2/add", "add", ("layer2.bn2", "layer2.downsample.1"), "", (2, 12, 4, 4)),
        ("layer2.relu@2", "relu", ("layer2/add",), "", (2, 12, 4, 4)),
        ("avg_pool", "avg_pool", ("layer2.relu@2",), "", (2, 12, 1, 1)),
    ]


def test_a_graph_holds_the_numbers_of_its_normalizations() -> None:
    model = image_model("Vgg")
    for graph in graphs(model, images()):
        assert list(graph.norms) == ["features.1", "features.5", "classifier.1"]
        module, norm = model.get_submodule("features.5"), graph.norms["features.5"]
        for attribute, numbers in (
            ("running_mean", norm.mean),
            ("running_var", norm.variance),
            ("weight", norm.scale),
            ("bias", norm.shift),
        ):
            np.testing.assert_array_equal(getattr(module, attribute).detach(), numbers)
        assert norm.epsilon == 1e-5


OPERATIONS: list[tuple[Callable[[Any, Tensor], Tensor], str, dict[str, Any]]] = [
    (lambda _, x: functional.relu(x), "relu", {}),
    (lambda _, x: x.relu(), "relu", {}),
    (lambda _, x: nn.ReLU()(x), "relu", {}),
    (lambda _, x: functional.leaky_relu(x, 0.2), "leaky_relu", {"slope": 0.2}),
    (lambda _, x: functional.relu6(x), "clip", {"low": 0.0, "high": 6.0}),
    (lambda _, x: functional.hardtanh(x, -2, 3), "clip", {"low": -2, "high": 3}),
    (lambda _, x: x.clamp(min=0), "clip", {"low": 0, "high": None}),
    (lambda _, x: torch.clamp(x, max=1.5), "clip", {"low": None, "high": 1.5}),
    (lambda _, x: functional.gelu(x), "gelu", {}),
    (lambda _, x: functional.silu(x, inplace=False), "silu", {}),
    (lambda _, x: x.sigmoid(), "sigmoid", {}),
    (lambda _, x: torch.tanh(x), "tanh", {}),
    (lambda _, x: functional.softmax(x, 1), "softmax", {}),
    (lambda _, x: functional.hardswish(x), "hardswish", {}),
    (lambda _, x: functional.hardsigmoid(x), "hardsigmoid", {}),
    (lambda _, x: functional.elu(x), "elu", {}),
    (lambda _, x: x + 1, "add", {"constant": True}),
    (lambda _, x: 1 - x, "sub", {"constant": True}),
    (lambda _, x: x * x, "mul", {"constant": False}),
    (lambda _, x: x / 2, "div", {"constant": True, "divisor": True}),
    (lambda _, x: torch.maximum(x, x.relu()), "maximum", {}),
    (lambda _, x: torch.min(x, x.relu()), "maximum", {}),
    (lambda _, x: -x, "mul", {"constant": True}),
    (lambda _, x: functional.glu(x, 2), "glu", {"axis": 2}),
    (lambda _, x: torch.stack([x, x], 1), "concat", {"axis": 1}),
    (lambda _, x: torch.cat([x, x], dim=1), "concat", {"axis": 1}),
    (lambda _, x: x.chunk(2, dim=3)[1], "split", {"axis": 3, "index": 1}),
    (lambda _, x: x[:, 1], "split", {"axis": 1, "start": 1, "step": 1}),
    (lambda _, x: x[:, :, :2], "split", {"axis": 2, "start": 0, "step": 1}),
    (lambda _, x: x[:, :, 1::2], "split", {"axis": 2, "start": 1, "step": 2}),
    (lambda _, x: x.narrow(1, 1, 2), "split", {"axis": 1, "start": 1, "step": 1}),
    (lambda _, x: x.select(1, 2), "split", {"axis": 1, "start": 2, "step": 1}),
    (lambda _, x: functional.max_pool2d(x, 2), "max_pool", {}),
    (lambda _, x: functional.avg_pool2d(x, 2), "avg_pool", {}),
    (lambda _, x: x.mean((2, 3)), "avg_pool", {}),
    (lambda _, x: x.sum((2, 3)), "sum", {}),
    (lambda _, x: x.amax((2, 3)), "max_pool", {}),
    (lambda _, x: functional.pad(x, (1, 1)), "pad", {"value": 0}),
    (lambda _, x: functional.pad(x, (1, 1), value=2.0), "pad", {"value": 2.0}),
    (lambda _, x: functional.pad(x, (1, 1, 1, 1), mode="reflect"), "pad", {"value": None}),
    (lambda _, x: functional.interpolate(x, scale_factor=2), "resize", {}),
    (lambda _, x: x.flatten(1), "flatten", {"start": 1}),
    (lambda _, x: torch.flatten(x, start_dim=2), "flatten", {"start": 2}),
    (lambda _, x: x.view(x.shape[0], -1), "flatten", {"start": 1}),
    (lambda _, x: x.reshape(x.size(0), 3, 2, -1), "reshape", {}),
    (lambda _, x: x.permute(0, 2, 3, 1), "transpose", {"axes": (0, 2, 3, 1)}),
    (lambda m, x: functional.dropout(x, training=m.training), "dropout", {}),
    (lambda _, x: x @ x.transpose(2, 3), "matmul", {}),
    (lambda _, x: functional.scaled_dot_product_attention(x, x, x), "attention", {}),
]


@pytest.mark.parametrize(("flow", "op", "attributes"), OPERATIONS)
def test_an_operation_has_its_word_and_attributes(
    flow: Callable[[Any, Tensor], Tensor], op: str, attributes: dict[str, Any]
) -> None:
    for graph in graphs(Flow(flow, conv=nn.Conv2d(3, 3, 1)), images()):
        assert only(graph, op).attributes == {**only(graph, op).attributes, **attributes}


@pytest.mark.parametrize(
    ("flow", "op", "attributes"),
    [
        (lambda x: x.flip(2, -1), "roll", {"axes": (2, 3)}),
        (lambda x: x.expand(2, 3, 16, 16), "identity", {}),
        (lambda x: x.mean((-1, -2)), "avg_pool", {"axes": (3, 2)}),
        (lambda x: x.max(3)[0], "max_pool", {"axes": (3,)}),
        (lambda x: x.mean((2, 3), keepdim=True).expand(-1, -1, 4, 4), "resize", {}),
        (lambda x: x.repeat(1, 1, 2, 1), "resize", {}),
        (lambda x: functional.pixel_unshuffle(x, 2), "pixel_shuffle", {"channel_axis": 1}),
        (lambda x: functional.pad(x, (0, 1, 2, 3)), "pad", {"value": 0, "widths": ((0, 0), (0, 0), (2, 3), (0, 1))}),
        (lambda x: x.movedim(1, -1), "transpose", {"axes": (0, 2, 3, 1)}),
        (lambda x: torch.movedim(x, (2, 3), (0, 1)), "transpose", {"axes": (2, 3, 0, 1)}),
    ],
)
def test_along_which_axes_elements_move_is_known_with_an_example(
    flow: Callable[[Tensor], Tensor], op: str, attributes: dict[str, Any]
) -> None:
    graph = adapter.graph(Flow(lambda m, x: flow(m.conv(x)), conv=nn.Conv2d(3, 3, 1)), Batch((images(),)))
    assert only(graph, op).attributes == attributes


def test_one_of_several_results_may_be_taken_by_name() -> None:
    for graph in graphs(
        Flow(lambda m, x: m.fc(m.conv(x).max(3).values), conv=nn.Conv2d(3, 3, 1), fc=nn.Linear(16, 2)), images()
    ):
        assert graph.by_name[only(graph, "linear").inputs[0]].op == "max_pool"


def test_weights_and_biases_that_are_used_elsewhere_too_are_named() -> None:
    model = Flow(lambda m, x: m.conv(x) * m.conv.bias[:, None, None] + m.conv.weight.mean(), conv=nn.Conv2d(3, 3, 1))
    for graph in graphs(model, images()):
        assert only(graph, "mul").attributes["layers"] == ("conv",)
        assert only(graph, "add").attributes["layers"] == ("conv",)


def test_a_normalization_by_numbers_that_are_no_modules_own_is_marked() -> None:
    def flow(m: Any, x: Tensor) -> Tensor:
        return functional.batch_norm(m.norm(x), m.norm.running_mean, m.norm.running_var, m.other.weight, m.other.bias)

    model = Flow(flow, norm=nn.BatchNorm2d(3), other=nn.BatchNorm2d(3))
    for graph in graphs(model, images()):
        own, other = (node for node in graph.nodes if node.op == "batch_norm")
        assert own.attributes.get("writable", True)
        assert other.attributes["writable"] is False


def test_axes_that_depend_on_the_rank_are_known_with_an_example() -> None:
    graph = adapter.graph(Flow(lambda _, x: x.transpose(-1, 1), fc=nn.Linear(2, 2)), Batch((images(),)))
    assert only(graph, "transpose").attributes == {"axes": (0, 3, 2, 1)}
    norm = adapter.graph(Flow(lambda m, x: m.norm(x), norm=nn.LayerNorm((16, 16))), Batch((images(),)))
    assert only(norm, "layer_norm").attributes == {"axes": (2, 3), "scale": True, "shift": True}


@pytest.mark.parametrize(
    ("flow", "places"),
    [
        (lambda _, x: x.chunk(2, dim=3), [(3, 0), (3, 8)]),
        (lambda _, x: x.split([3, 12, 1], -1), [(3, 0), (3, 3), (3, 15)]),
        (lambda _, x: x.split(5, 2)[1:], [(2, 5), (2, 10), (2, 15)]),
        (lambda _, x: torch.tensor_split(x, (4, 6), 3)[::2], [(3, 0), (3, 6)]),
        (lambda _, x: x.unbind(1)[-1:], [(1, 2)]),
        (lambda _, x: (x[..., -2:], x[:, -1]), [(3, 14), (1, 2)]),
        (lambda _, x: x.chunk(1), [(0, 0)]),
    ],
)
def test_a_part_says_where_it_begins(flow: Callable[[Any, Tensor], Any], places: list[tuple[int, int]]) -> None:
    """Against the part itself: what lies there is what the model returns."""
    model, image = Flow(flow, fc=nn.Linear(2, 2)), images()
    found = [node for node in adapter.graph(model, Batch((image,))).nodes if node.op == "split"]
    assert [(node.attributes["axis"], node.attributes["start"]) for node in found] == places
    for node, part in zip(found, model(image), strict=False):
        axis, start = node.attributes["axis"], node.attributes["start"]
        size = node.shape[axis] if len(node.shape) == 4 else 1
        assert torch.equal(image.narrow(axis, start, size).reshape(node.shape), part)


def test_what_is_rolled_is_two_parts_the_other_way_round() -> None:
    model, image = Flow(lambda _, x: torch.roll(x, (-3, 1, 16), (2, -1, 3)), fc=nn.Linear(2, 2)), images()
    values = {"x": image}
    graph = adapter.graph(model, Batch((image,)))
    for node in graph.nodes[1:-1]:
        given, facts = [values[name] for name in node.inputs], node.attributes
        if node.op == "split":
            values[node.name] = given[0].narrow(facts["axis"], facts["start"], node.shape[facts["axis"]])
        elif node.op == "concat":
            values[node.name] = torch.cat(given, facts["axis"])
        assert tuple(values[node.name].shape) == node.shape
    assert [node.op for node in graph.nodes[1:-1]] == ["split", "split", "concat"] * 2
    assert torch.equal(values[graph.nodes[-1].inputs[0]], model(image))


def test_a_prelu_brings_its_slopes() -> None:
    for graph in graphs(Flow(lambda m, x: m.act(x), act=nn.PReLU(3, init=0.3)), images()):
        np.testing.assert_allclose(only(graph, "prelu").attributes["slopes"], [0.3] * 3)


def test_a_layer_used_twice_has_two_nodes() -> None:
    model = Flow(lambda m, x: m.conv(m.conv(x)), conv=nn.Conv2d(3, 3, 1))
    for graph in graphs(model, images()):
        assert [node.name for node in graph.calls["conv"]] == ["conv", "conv@2"]


def test_tied_weights_are_one_layer() -> None:
    model = Flow(
        lambda m, x: functional.linear(m.head(m.tokens(x)), m.tokens.weight),
        tokens=nn.Embedding(10, 4),
        head=nn.Linear(4, 4),
        twin=nn.Linear(4, 4),
    )
    model.twin.weight = model.head.weight  # type: ignore[union-attr]
    for graph in graphs(model, torch.arange(6).reshape(2, 3)):
        assert [(node.name, node.op) for node in graph.calls["tokens"]] == [
            ("tokens", "embedding"),
            ("tokens@2", "linear"),
        ]
    model.flow = lambda m, x: m.twin(m.head(m.tokens(x)))
    for graph in graphs(model, torch.arange(6).reshape(2, 3)):
        assert [node.name for node in graph.calls["head"]] == ["head", "twin"]


def test_what_an_operation_in_place_changes_is_followed() -> None:
    def flow(m: Any, x: Tensor) -> Tensor:
        hidden = m.conv(x)
        m.act(hidden)  # the result is thrown away, but hidden is changed
        kept = hidden
        hidden += 1
        return m.last(kept)

    model = Flow(flow, conv=nn.Conv2d(3, 3, 1), act=nn.ReLU(inplace=True), last=nn.Conv2d(3, 3, 1))
    for graph in graphs(model, images()):
        assert graph.by_name["last"].inputs == ("add",)
        assert graph.by_name["add"].inputs == ("act",)


def test_a_part_that_is_overwritten_is_seen_in_the_whole() -> None:
    def flow(m: Any, x: Tensor) -> Tensor:
        hidden = m.conv(x)
        hidden[:, :1] *= 2
        return m.last(hidden)

    model = Flow(flow, conv=nn.Conv2d(3, 3, 1), last=nn.Conv2d(3, 3, 1))
    for graph in graphs(model, images()):
        (before,) = graph.by_name["last"].inputs
        assert before != "conv"
        assert len(graph.users["conv"]) > 1


def test_constants_and_parameters_are_no_nodes() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(1, 16, 4))
            self.register_buffer("scale", torch.ones(4))
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc((x + self.table[:, : x.shape[1]]) * (self.scale * 2))

    for graph in graphs(Positions(), torch.randn(2, 5, 4)):
        assert [(node.name, node.attributes.get("constant")) for node in graph.nodes] == [
            ("x", None),
            ("add", True),
            ("mul", True),
            ("fc", None),
            ("output", None),
        ]


def test_a_product_with_a_plain_parameter_is_a_linear_layer() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 4))

        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x @ self.w, self.w)

    for graph in graphs(Product(), torch.randn(2, 3)):
        first, second = graph.calls["w"]
        assert (first.op, first.attributes.get("transposed")) == ("linear", True)
        assert (second.op, second.attributes.get("transposed")) == ("linear", None)


def test_computed_weights_belong_to_their_layer() -> None:
    model = zoo.seeded(zoo.Unsettled)
    for graph in graphs(model, torch.randn(2, 3, 6, 6)):
        for name in ("spectral", "old_spectral", "normed", "head"):
            (node,) = graph.calls[name]
            assert (node.name, "computed" in node.attributes) == (name, False)


def test_several_inputs_and_outputs_are_named() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x: Tensor, other: Tensor, scale: Tensor | None = None, flag: bool = False) -> dict[str, Any]:
            if scale is not None:
                x = x * scale
            hidden = self.fc(x)
            return {"sum": hidden + other, "both": (hidden, None if flag else other)}

    model = Pair()
    example = Batch((np.zeros((2, 4)),), {"other": np.zeros((2, 2)), "scale": torch.ones(2, 4)})
    graph = adapter.graph(model, example)
    check(graph, model)
    assert [node.name for node in graph.nodes if node.op == "input"] == ["x", "other", "scale"]
    assert [(node.name, node.inputs) for node in graph.nodes if node.op == "output"] == [
        ("output['sum']", ("add",)),
        ("output['both'][0]", ("fc",)),
        ("output['both'][1]", ("other",)),
    ]
    symbolic = adapter.graph(model, None)  # arguments with a default keep it
    assert [node.name for node in symbolic.nodes if node.op == "input"] == ["x", "other"]
    assert [node.inputs for node in symbolic.nodes if node.op == "output"] == [("add",), ("fc",), ("other",)]


def test_integer_inputs_and_recurrent_layers_are_followed() -> None:
    model = zoo.seeded(zoo.Sequences)
    graph = adapter.graph(model, Batch((torch.arange(14).reshape(2, 7) % 10,)))
    check(graph, model)
    assert graph.by_name["tokens"].op == "embedding"
    assert [node.name for node in graph.calls["linear"]] == ["linear", "tied"]
    assert "lstm.weight_ih_l0.i" in only(graph, "aten.lstm").attributes["layers"]


def test_a_transformer_shows_its_layers() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    graph = adapter.graph(model, Batch((torch.randn(2, 5, 8),)))
    check(graph, model)
    assert [len(graph.calls[f"layers.{i}.{name}"]) for i in (0, 1) for name in ("linear1", "linear2")] == [1] * 4
    packed = [f"layers.1.self_attn.in_proj_weight.{part}" for part in "qkv"]
    assert [[(node.name, node.shape) for node in graph.calls[name]] for name in packed] == [
        [(name, (5, 2, 8))] for name in packed
    ]
    assert graph.by_name["layers.1.self_attn/concat"].inputs == tuple(packed)
    assert [node.op for node in graph.nodes].count("layer_norm") == 4
    symbolic = adapter.graph(model, None)
    assert [node.op for node in symbolic.nodes] == ["input", "nn.TransformerEncoder", "output"]
    assert len(symbolic.nodes[1].attributes["layers"]) == len(adapter.read(model).layers)


def test_a_single_layer_is_a_model() -> None:
    for graph in graphs(nn.Conv2d(3, 4, 1), images()):
        assert [node.op for node in graph.nodes] == ["input", "conv", "output"]
        assert graph.nodes[1].layer == "(root)"


def test_derived_layers_are_known_unless_they_do_something_else() -> None:
    class Plain(nn.Conv2d):
        pass

    class Doubled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    model = Flow(lambda m, x: m.doubled(m.plain(x)), plain=Plain(3, 3, 1), doubled=Doubled(3, 3, 1))
    for graph in graphs(model, images()):
        assert [node.name for node in graph.nodes] == [
            "input" if False else "x",
            "plain",
            "doubled",
            "doubled/mul",
            "output",
        ]


def test_regions_without_gradient_or_with_autocast_are_looked_into() -> None:
    def flow(m: Any, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = m.conv(x)
        with torch.autocast("cpu", enabled=False):
            return m.last(x)

    model = Flow(flow, conv=nn.Conv2d(3, 3, 1), last=nn.Conv2d(3, 3, 1))
    graph = adapter.graph(model, Batch((images(),)))
    assert graph.by_name["last"].inputs == ("conv",)


def test_a_compiled_model_is_seen_as_the_one_inside() -> None:
    model = image_model("ResNet")
    graph = adapter.graph(torch.compile(model), Batch((images(),)))  # type: ignore[arg-type]
    assert lines(graph) == lines(adapter.graph(model, None))


def test_what_leads_to_no_output_is_left_out() -> None:
    model = Flow(lambda m, x: (m.conv(x), functional.relu(x))[0], conv=nn.Conv2d(3, 3, 1))
    for graph in graphs(model, images()):
        assert [node.op for node in graph.nodes] == ["input", "conv", "output"]


def test_a_model_that_export_refuses_is_traced_by_fx() -> None:
    class Printing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            if not isinstance(x, torch.fx.Proxy):
                raise RuntimeError("only for proxies")
            return self.fc(x)

    graph = adapter.graph(Printing(), Batch((torch.zeros(2, 3),)))
    assert graph.source == "torch.fx"


def test_an_exported_program_has_the_graph_of_its_module() -> None:
    model = image_model("UNet")
    program = torch.export.export(model, (images(),), strict=False)
    expected = adapter.graph(model, Batch((images(),)))
    found = exported.graph(program)
    assert lines(found, shapes=True) == lines(expected, shapes=True)
    assert found.norms.keys() == expected.norms.keys()


# ---------------------------------------------------------------------------------------------------------------------
# What is not changed


class Restless(zoo.Unsettled):
    """A forward pass that leaves traces: attributes, lists, counters, random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []
        self.calls = 0
        self.register_buffer("count", torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(images)
        self.last = images
        self.count += 1
        return super().forward(images) + torch.rand(1) * random.random() * float(np.random.rand())


@pytest.mark.parametrize("example", [Batch((torch.randn(2, 3, 6, 6),)), None])
def test_finding_the_graph_changes_nothing(example: Batch | None) -> None:
    model = Restless().train()
    model.norm.eval()
    model.conv.weight.grad = torch.ones_like(model.conv.weight)
    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    identities = {name: id(tensor) for name, tensor in model.named_parameters()}
    drawn = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[union-attr]
    fast = torch.backends.mha.get_fastpath_enabled()
    adapter.graph(model, example)
    assert [module.training for module in model.modules()] == modes
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert {name: id(tensor) for name, tensor in model.named_parameters()} == identities
    assert (model.seen, model.calls) == ([], 0)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert type(model.old_spectral.weight) is torch.Tensor
    assert torch.equal(model.conv.weight.grad, torch.ones_like(model.conv.weight))
    assert torch.equal(torch.get_rng_state(), drawn[0])
    assert random.getstate() == drawn[1]
    np.testing.assert_array_equal(np.random.get_state()[1], drawn[2])  # type: ignore[arg-type]
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert torch.is_grad_enabled()


def test_a_failure_changes_nothing_either() -> None:
    model = Flow(lambda m, x: m.conv(x) if x.sum() > 0 else x, conv=nn.Conv2d(3, 3, 1), drop=nn.Dropout()).train()
    for example in (Batch((images(),)), None):
        with pytest.raises(NoGraphError):
            adapter.graph(model, example)
        assert all(module.training for module in model.modules())


# ---------------------------------------------------------------------------------------------------------------------
# What has no graph


def branching(m: Any, x: Tensor) -> Tensor:
    return m.conv(x) if x.sum() > 0 else x


def test_a_model_that_looks_at_its_numbers_has_no_graph(capfd: pytest.CaptureFixture[str]) -> None:
    model = Flow(branching, conv=nn.Conv2d(3, 3, 1))
    with pytest.raises(NoGraphError, match=r"^no graph: torch\.fx cannot follow .*; give inputs that"):
        adapter.graph(model, None)
    with pytest.raises(NoGraphError, match=r"^no graph: torch\.export cannot follow .*; give inputs that") as caught:
        adapter.graph(model, Batch((images(),)))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_inputs_that_do_not_fit_are_named_as_the_reason() -> None:
    model = Flow(branching, conv=nn.Conv2d(3, 3, 1))
    with pytest.raises(NoGraphError, match=r"no graph: torch\.export cannot follow the model on the example inputs"):
        adapter.graph(model, Batch((images(), images())))


def test_models_that_cannot_be_traced_say_why(tmp_path: Path) -> None:
    with pytest.raises(NoGraphError, match=r"no graph: the model is a TorchScript module.*give the module it was made"):
        adapter.graph(torch.jit.script(nn.Linear(2, 2)), None)
    with pytest.raises(NoGraphError, match=r"no graph: '0\.weight' has a shape but no numbers \(meta device\)"):
        adapter.graph(nn.Sequential(nn.Linear(2, 2, device="meta")), None)
    with pytest.raises(NoGraphError, match=r"no graph: '0\.weight' is not initialized yet; run the model once"):
        adapter.graph(nn.Sequential(nn.LazyLinear(2)), None)
    with pytest.raises(NoGraphError, match=r"no graph: a \.pt2 file is read as data"):
        exported.graph(tmp_path / "model.pt2")


# ---------------------------------------------------------------------------------------------------------------------
# Biases


@pytest.mark.parametrize(
    "module",
    [nn.Linear(3, 4), nn.Conv1d(4, 6, 3, groups=2), nn.ConvTranspose2d(4, 6, 2), nn.Conv3d(2, 2, 1).bfloat16()],
)
def test_a_layer_gives_its_bias(module: nn.Module) -> None:
    (layer,) = adapter.read(module).layers
    assert layer.bias is not None
    np.testing.assert_array_equal(layer.bias(), module.bias.detach().float().numpy())  # type: ignore[union-attr, operator]
    assert layer.bias().dtype == np.float32


def test_a_layer_without_a_bias_has_none() -> None:
    network = adapter.read(nn.Sequential(nn.Linear(3, 4, bias=False), nn.Embedding(3, 4), nn.LSTM(3, 4)))
    assert all(layer.bias is None for layer in network.layers)
