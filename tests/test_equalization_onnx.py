"""Real exports of small models, scaled at random: their outputs stay, and what stays unscaled does so for a reason."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qvis
from qvis import adapters
from qvis.equalization.sites import Sites, find_sites, scaled
from qvis.folding import fold_network
from qvis.rewriting import Rewriting
from qvis.running import Batch
from tests.convnets import image_model, images
from tests.test_equalization_sites import CASES, made, noise

onnxruntime = pytest.importorskip("onnxruntime")


class Transformer(nn.Module):
    """A layer that normalizes first, with one Linear for query, key and value, and heads pooled over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(12), nn.LayerNorm(12)
        self.qkv, self.o = nn.Linear(12, 36), nn.Linear(12, 12)
        self.up, self.down, self.head = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = torch.softmax(q @ k.transpose(-2, -1) * 0.5, -1) @ v
        x = x + self.o(mixed.transpose(1, 2).reshape(batch, tokens, 12))
        x = x + self.down(F.relu(self.up(self.norm2(x))))
        return self.head(x.mean(1))


class Gated(nn.Module):
    """A gated perceptron behind a normalization by the root mean square."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(12)
        self.gate, self.up, self.down = nn.Linear(12, 9), nn.Linear(12, 9), nn.Linear(9, 12)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(x)
        return x + self.down(F.silu(self.gate(hidden)) * self.up(hidden))


class Grouped(nn.Module):
    """Normalizations of groups and of single images."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(4, 6, 3, bias=False), nn.Conv2d(6, 8, 3), nn.Conv2d(8, 2, 1)
        self.groups, self.single = nn.GroupNorm(2, 6), nn.InstanceNorm2d(8, affine=True)
        with torch.no_grad():
            self.single.weight.normal_()
            self.single.bias.normal_()

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.single(self.b(F.relu(self.groups(self.a(x)))))))


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    **{
        name: lambda name=name: (image_model(name), images())
        for name in ("ResNet", "MobileNet", "MobileNetV3", "UNet", "Detector", "Dense")
    },
    **{name: lambda name=name: (made(CASES[name][0]), noise(*CASES[name][1])) for name in CASES},
    "Transformer": lambda: (made(Transformer), noise(2, 5, 12)),
    "Gated": lambda: (made(Gated), noise(2, 5, 12)),
    "Grouped": lambda: (made(Grouped), noise(2, 4, 8, 8)),
}


def exported(name: str, **options: Any) -> tuple[onnx.ModelProto, list[np.ndarray]]:
    """What one of PyTorch's exporters writes, and inputs for it."""
    model, example = MODELS[name]()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        file = io.BytesIO()
        if options.get("dynamo"):
            level = logging.getLogger("torch").level
            program = torch.onnx.export(model, (example,), verbose=False, **options)
            logging.getLogger("torch").setLevel(level)
            return program.model_proto, [example.numpy()]
        torch.onnx.export(model, (example,), file, input_names=["x"], **{"dynamo": False, **options})
    return onnx.load_from_string(file.getvalue()), [example.numpy()]


def run(model: onnx.ModelProto, inputs: list[np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    return list(session.run(None, dict(zip(names, inputs, strict=True))))


def apart(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    """The largest difference, as a share of the largest number."""
    largest = max(float(np.abs(one).max()) for one in ours)
    return max(float(np.abs(one - other).max()) for one, other in zip(ours, theirs, strict=True)) / largest


def scale(
    model: onnx.ModelProto, inputs: list[np.ndarray], multiplied: tuple[str, ...] = ()
) -> tuple[Sites, Rewriting, onnx.ModelProto]:
    """The model scaled by random numbers."""
    graph = adapters.graph(model, Batch(tuple(inputs), size=len(inputs[0])))
    network = replace(adapters.read(model), graph=graph)
    folded = fold_network(network)
    affines = adapters.affines(model)
    sites = find_sites(graph, folded.network, frozenset(folded.norms), affines, multiplied)
    scales = np.exp(np.random.default_rng(0).normal(0, 0.5, sites.count))
    new = scaled(sites, scales, folded.network.layers, {**graph.norms, **folded.norms}, affines)
    new = replace(new, weights={**folded.weights, **new.weights}, norms={**folded.norms, **new.norms})
    written, notes = adapters.rewrite(model, network, new)
    assert notes == ()
    onnx.checker.check_model(written, full_check=True)
    return sites, new, written


def check(model: onnx.ModelProto, inputs: list[np.ndarray], **given: Any) -> Sites:
    """Scaling changes nothing, and the new model is read as the old one was."""
    before = model.SerializeToString()
    sites, new, written = scale(model, inputs, **given)
    assert model.SerializeToString() == before
    assert apart(run(model, inputs), run(written, inputs)) < 1e-5
    layers = {layer.name: layer for layer in adapters.read(written).layers}
    assert list(layers) == [layer.name for layer in adapters.read(model).layers]
    for name, weight in new.weights.items():
        np.testing.assert_array_equal(layers[name].weight, weight)
    for name, bias in new.biases.items():
        known = layers[name].bias
        assert known is not None
        np.testing.assert_allclose(known(), bias, rtol=1e-6)
    return sites


def pairs(sites: Sites) -> list[tuple[str, str, int]]:
    return [(" ".join(one.producers), " ".join(one.consumers), one.channels) for one in sites.sites]


def reasons(sites: Sites) -> dict[str, str]:
    return {one.name: one.reason for one in sites.skipped}


# ---------------------------------------------------------------------------------------------------------------------
# Both exporters of PyTorch


OTHERWISE: dict[str, list[tuple[str, str, int]]] = {
    "a slice": [("a", "b", 3)],  # here the graph tells where it begins
    # axes that are averaged over, and what is padded, are told by sizes alone
    "mean of tokens": [("a", "b", 1)],
    "largest": [("a", "b", 1)],
    "shrunk shortcut": [("a b", "b c", 1)],
    # operators that the graph has no word for yet
    **{name: [] for name in ("stacked", "the larger", "places from channels", "spread and summed")},
    # a normalization whose numbers have no names of its module
    "a normalization without factors": [("a", "/norm/BatchNormalization", 6), ("/norm/BatchNormalization", "b", 6)],
}
"""What ONNX graphs tell otherwise."""


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("query groups", "gated")])
def test_the_older_exporter_leaves_all_that_pytorch_itself_shows(name: str) -> None:
    assert pairs(check(*exported(name))) == OTHERWISE.get(name, CASES[name][2])


@pytest.mark.parametrize(
    ("name", "expected"),
    {
        "ResNet": [8, 8, 12, 12],
        "MobileNetV3": [4, 4],
        "UNet": [6, 8, 6, 6],
        # normalizations are folded by the exporter, so that more is left than in PyTorch
        "Detector": [6, 6],
        "Dense": [6, 6, 4, 10, 4],
    }.items(),
)
@pytest.mark.parametrize("options", [{}, {"dynamic_axes": {"x": [0]}, "opset_version": 13}], ids=["fixed", "any size"])
def test_scaling_changes_no_image_model(name: str, expected: list[int], options: dict[str, Any]) -> None:
    assert [one.channels for one in check(*exported(name, **options)).sites] == expected


@pytest.mark.parametrize("name", ["shuffle", "windows", "halves", "concat and flatten"])
def test_shapes_that_are_computed_for_any_size_are_measured(name: str) -> None:
    model, inputs = exported(name, dynamic_axes={"x": [0]})
    assert pairs(check(model, inputs)) == CASES[name][2]
    assert len(find_sites(adapters.graph(model), adapters.read(model)).sites) < len(CASES[name][2]) or name == "halves"


ENCODER = [("norm1", "qkv", 12), ("qkv", "o", 12), ("norm2", "up", 12), ("up", "down", 20)]


def test_an_encoder_is_scaled_inside_and_not_along_its_stream() -> None:
    sites = check(*exported("Transformer"))
    assert pairs(sites) == ENCODER
    assert reasons(sites) == {
        "o -> norm2, head": "it is tied to an input of the model",
        "down -> head": "it is tied to an input of the model",
    }


def test_normalizations_that_are_written_out_are_scaled_at_their_factors() -> None:
    model, inputs = exported("Transformer", opset_version=13)
    assert not any(one.op_type == "LayerNormalization" for one in model.graph.node)
    assert pairs(check(model, inputs)) == ENCODER
    assert pairs(check(*exported("Grouped"))) == [("/groups/Mul", "b", 6), ("single", "c", 8)]


def test_the_newer_exporter_leaves_the_same() -> None:
    assert pairs(check(*exported("Transformer", dynamo=True))) == ENCODER


def test_attention_of_one_node_is_followed() -> None:
    sites = check(*exported("query groups", dynamo=True, opset_version=23))
    assert pairs(sites) == [("v", "o", 4)]
    assert all("the softmax of attention" in reason for reason in reasons(sites).values())


def test_a_normalization_by_the_root_mean_square_is_scaled() -> None:
    sites = check(*exported("Gated", dynamo=True, opset_version=23))
    assert pairs(sites) == [("norm", "gate up", 12), ("up", "down", 9)]
    assert list(reasons(sites)) == ["gate -> down"]


def test_what_enters_a_layer_is_multiplied_where_that_sets_it_free() -> None:
    model, inputs = exported("Transformer", dynamic_axes={"x": [0]})
    sites = check(model, inputs, multiplied=("head", "down"))
    assert ("", "head", 12) in pairs(sites)


def test_relu6_stays_until_it_is_exchanged() -> None:
    model, inputs = exported("MobileNet")
    graph = adapters.graph(model)
    assert "replace it by ReLU to equalize here" in "".join(reasons(check(model, inputs)).values())
    clips = [one.name for one in graph.nodes if one.op == "clip"]
    new, notes = adapters.rewrite(model, adapters.read(model), Rewriting(unclipped=clips))
    assert notes == ()
    onnx.checker.check_model(new, full_check=True)
    assert not any(one.op_type == "Clip" for one in new.graph.node)
    sites = check(new, inputs)
    assert not sites.skipped
    assert sites.count == 8 + 16 + 16 + 16 + 16 + 12 + 16


# ---------------------------------------------------------------------------------------------------------------------
# Keras, and all at once


def test_a_model_of_keras_is_scaled_through_its_normalizations(tmp_path: Path) -> None:
    pytest.importorskip("tf2onnx")
    keras = pytest.importorskip("keras")
    keras.utils.set_random_seed(0)
    layers = keras.layers
    given = keras.Input((8, 8, 3))
    x = layers.Conv2D(6, 3, padding="same")(given)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.DepthwiseConv2D(3, padding="same", use_bias=False)(x)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.Conv2D(4, 1)(x)
    x = layers.Reshape((64, 4))(x)
    x = layers.Dense(5, activation="relu")(x)
    x = layers.LayerNormalization()(layers.Dense(7)(x))
    x = layers.Dense(6)(x)
    x = layers.PReLU(shared_axes=[1])(x)
    model = keras.Model(given, layers.Dense(3)(x))
    random = np.random.default_rng(0)
    for one in model.weights:
        positive = "variance" in one.name
        one.assign(random.uniform(0.5, 2, one.shape) if positive else random.normal(0, 0.5, one.shape))
    images = random.normal(size=(2, 8, 8, 3)).astype("f4")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(images)  # it wants to have run before
        model.export(tmp_path / "model.onnx", format="onnx", verbose=False)
    sites = check(onnx.load(tmp_path / "model.onnx"), [images])
    assert [one.channels for one in sites.sites] == [6, 6, 4, 5, 7, 6]
    (stays,) = reasons(sites)  # what comes before the normalization of tokens
    assert "layer_normalization" in stays


def test_an_exported_model_is_equalized_as_a_whole() -> None:
    model, (x,) = exported("Transformer", dynamic_axes={"x": [0]})
    inputs = np.concatenate([x * factor for factor in (1, -0.5, 2, 0.7)])
    result = qvis.equalize(model, inputs, probes=1, multiply="head", correct_biases="inputs")
    assert result.function_kept
    onnx.checker.check_model(result.model, full_check=True)
    assert adapters.read(result.model).layers


def test_high_biases_are_absorbed_that_an_add_adds() -> None:
    model = made(lambda: nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 3)))
    with torch.no_grad():
        model[0].bias.add_(20)  # type: ignore[operator, union-attr]
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (noise(2, 5, 6),), file, dynamo=False, dynamic_axes={"x": [0]}, input_names=["x"])
    x = np.random.default_rng(0).normal(size=(8, 5, 6)).astype("f4")
    proto = onnx.load_from_string(file.getvalue())
    assert [one.op_type for one in proto.graph.node].count("Add") == 2
    result = qvis.equalize(proto, x, probes=1, activations=True, absorb_biases=True)
    (step,) = result.steps
    assert "Biases of 2 layers moved" in str(step)
    assert apart(run(proto, [x]), run(result.model, [x])) < 1e-5
