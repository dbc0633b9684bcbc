"""That scaling channels keeps the function of many architectures, that much is found in them, and why not the rest."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import qvis
from qvis import adapters
from qvis.adapters import torch as adapter
from qvis.equalization.sites import Sites, find_sites, scaled
from qvis.folding import Folded, fold_network
from qvis.layers import Graph
from qvis.rewriting import Rewriting
from qvis.running import Batch
from tests.architectures import ARCHITECTURES, Built

FOUND: dict[str, tuple[int, int]] = {
    "ResNet": (6, 60),
    "SmallResNet": (7, 64),
    "ResNetBottleneck": (9, 76),
    "ResNeXt": (7, 88),
    "RegNetY": (8, 62),
    "PreActivationResNet": (9, 92),
    "ConvNeXt": (5, 36),
    "MobileNetV1": (7, 88),
    "MobileNetV2": (2, 14),
    "MobileNetV3": (7, 112),
    "EfficientNet": (2, 14),
    "EfficientNetLite": (2, 14),
    "SqueezeNet": (7, 40),
    "ShuffleNetV2": (18, 92),
    "Vgg": (5, 42),
    "DenseNet": (16, 146),
    "GoogLeNet": (15, 60),
    "UNet": (12, 90),
    "Autoencoder": (5, 35),
    "SuperResolution": (4, 24),
    "Yolo": (21, 153),
    "Ssd": (4, 28),
    "Retina": (9, 68),
    "Volumes": (3, 22),
    "Sound": (3, 28),
    "Tcn": (5, 34),
    "VisionTransformer": (7, 56),
    "Swin": (10, 94),
    "Mixer": (9, 66),
    "Mlp": (4, 40),
    "Outputs": (2, 18),
    "Recurrent": (2, 20),
    "Dead": (2, 16),
    "Siamese": (3, 23),
    "PostNormEncoder": (5, 48),
    "Llama": (9, 136),
    "Tagger": (1, 7),
    "TextCnn": (3, 18),
    "Tied": (1, 12),
}
"""How many sites there are at least, and how many channels they have."""

HOMOGENEOUS = {
    "ResNet", "SmallResNet", "ResNetBottleneck", "ResNeXt", "PreActivationResNet", "MobileNetV1", "SqueezeNet",
    "ShuffleNetV2", "Vgg", "DenseNet", "GoogLeNet", "UNet", "Autoencoder", "SuperResolution", "Yolo", "Ssd", "Retina",
    "Volumes", "Sound", "Tcn", "Mlp", "Recurrent", "Dead", "Siamese",
}  # fmt: skip
"""Those in which every connection between two layers can be scaled."""


class Scaled(NamedTuple):
    """A model with what can be scaled in it."""

    sites: Sites
    folded: Folded
    rewriting: Rewriting
    """With random scales."""


def precise(built: Built) -> Built:
    """The same in float64."""
    inputs = tuple(one.double() if one.is_floating_point() else one for one in built.inputs)
    return Built(copy.deepcopy(built.model).double(), inputs)


@cache
def traced(name: str) -> tuple[Built, Graph]:
    """A model in float64, and its graph."""
    built = precise(ARCHITECTURES[name].build())
    return built, adapter.graph(built.model, Batch(built.inputs))


def scale(model: nn.Module, graph: Graph) -> Scaled:
    network = replace(adapter.read(model), graph=graph)
    folded = fold_network(network)
    affines = adapters.affines(model)
    sites = find_sites(graph, folded.network, set(folded.norms), affines=set(affines))
    scales = np.exp(np.random.default_rng(0).normal(0, 0.5, sites.count))
    new = scaled(sites, scales, folded.network.layers, {**graph.norms, **folded.norms}, affines)
    whole = replace(new, weights={**folded.weights, **new.weights}, norms={**folded.norms, **new.norms})
    return Scaled(sites, folded, whole)


def difference(built: Built, one: Scaled, rewriting: Rewriting | None = None) -> float:
    """How far the outputs of the scaled model are from the model's own, relative to the largest."""
    new = adapters.rewrite(built.model, one.folded.network, rewriting or one.rewriting).model
    with torch.no_grad():
        own, other = (pytree.tree_leaves(model(*built.inputs)) for model in (built.model, new))
    assert all(bool(tensor.isfinite().all()) for tensor in own)
    worst = max(float((a - b).abs().max()) for a, b in zip(own, other, strict=True))
    return worst / max(float(a.abs().max()) for a in own)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scaling_keeps_the_function_and_much_is_scaled(name: str) -> None:
    exact, graph = traced(name)
    found = scale(exact.model, graph)
    # In float64, rounding leaves 1e-15: what is not exactly the same function is far above.
    assert difference(exact, found) < 1e-12
    single = ARCHITECTURES[name].build()
    before = copy.deepcopy(single.model.state_dict())
    assert difference(single, scale(single.model, graph)) < 1e-5
    assert all(torch.equal(one, before[key]) for key, one in single.model.state_dict().items())
    sites, channels = FOUND[name]
    assert len(found.sites.sites) >= sites
    assert found.sites.count >= channels
    assert found.sites.skipped == () or name not in HOMOGENEOUS


@pytest.mark.parametrize("name", ["ResNet", "MobileNetV3", "DenseNet", "ShuffleNetV2", "Yolo", "Swin", "Llama", "Tcn"])
def test_each_scaled_layer_counts(name: str) -> None:
    """Were one of them left out, the outputs would tell: so they also would, were one scaled wrongly."""
    built, graph = traced(name)
    found = scale(built.model, graph)
    sites, new = found.sites, found.rewriting
    for layer in found.folded.network.layers:
        if layer.name in new.weights and np.any(np.append(sites.outputs[layer.name], sites.inputs[layer.name]) >= 0):
            broken = replace(new, weights={**new.weights, layer.name: layer.weight})
            assert difference(built, found, broken) > 1e-6, layer.name


@pytest.mark.parametrize(
    "name", ["DenseNet", "ShuffleNetV2", "MobileNetV3", "UNet", "Yolo", "Retina", "Siamese", "Swin"]
)
def test_what_is_found_without_inputs_keeps_the_function_too(name: str) -> None:
    built = traced(name)[0]
    found = scale(built.model, adapter.graph(built.model, None))
    assert difference(built, found) < 1e-12
    assert found.sites.count >= 20


# ---------------------------------------------------------------------------------------------------------------------
# Why not the rest


def refused(name: str) -> dict[str, str]:
    built, graph = traced(name)
    return {one.name: one.reason for one in scale(built.model, graph).sites.skipped}


def test_what_is_not_homogeneous_is_named() -> None:
    assert refused("RegNetY") == {
        f"{block}.gate.fc2 -> {block}.conv3.0": f"sigmoid '{block}.gate.gate' follows it" for block in (1, 2)
    }
    mobile = refused("MobileNetV3")
    assert mobile["3.expand.0 -> 3.depthwise.0"] == "hardswish '3.expand.2' follows it"
    assert mobile["2.gate.fc2 -> 2.project.0"] == "hardsigmoid '2.gate.gate' follows it"
    assert mobile["2.project.0 -> 3.expand.0"] == "it is tied to the result of hardswish '0.2'"
    assert not any(name.startswith("1.expand.0") for name in mobile)
    assert refused("EfficientNet")["4.0 -> 5.3"] == "silu '4.2' follows it"
    lite = refused("EfficientNetLite")
    assert lite["4.0 -> 5.3"].startswith("clip '4.2' is not homogeneous (ReLU6)")
    assert not any(name.startswith("2.project.0") for name in lite)


def test_what_is_refused_in_transformers_is_so_for_a_reason() -> None:
    llama = refused("Llama")
    assert llama["layers.0.q -> layers.0.o"] == "the softmax of attention 'layers.0/attention' follows it"
    assert llama["layers.0.gate -> layers.0.down"] == "silu 'layers.0/silu' follows it"
    assert (
        llama["layers.0.down -> layers.1.norm1, layers.1.norm2, norm"]
        == "it is tied to the result of embedding 'embed'"
    )
    assert not any(name.startswith(("layers.0.v ", "layers.0.up ", "layers.0.norm1 ")) for name in llama)
    vision = refused("VisionTransformer")
    assert vision["layers.0.fc1 -> layers.0.fc2"] == "gelu 'layers.0/gelu' follows it"
    assert (
        vision["patches -> layers.0.norm1, layers.0.norm2 and 3 more"] == "concat 'concat' with a constant follows it"
    )
    convnext = refused("ConvNeXt")
    assert convnext["stage1.dwconv -> stage1.norm"] == "layer_norm 'stage1.norm' follows it"
    assert set(refused("Mixer").values()) == {"layer_norm 'norms.0' follows it"}


def test_tied_weights_and_outputs_stay() -> None:
    assert refused("Outputs") == {"features -> score": "its output is an output of the model"}
    assert refused("Tied") == {
        "embed -> up, norm": "the weight of 'embed' is held under several names",
        "down -> norm": "it is tied to the result of embedding 'embed'",
        "norm -> embed": "the weight of 'embed' is held under several names",
    }


# ---------------------------------------------------------------------------------------------------------------------
# The whole way


@pytest.mark.parametrize("name", ["PreActivationResNet", "Tcn", "Llama", "Siamese"])
def test_equalize_keeps_the_function(name: str) -> None:
    model, inputs = ARCHITECTURES[name].build()
    result = qvis.equalize(model, inputs if len(inputs) > 1 else inputs[0], samples=2, probes=1)
    assert result.found >= FOUND[name][0]
    assert result.function_kept
    assert result.verification.relative < 1e-5
    with torch.no_grad():
        own, other = model(*inputs), result.model(*inputs)
    assert float((own - other).abs().max()) < 1e-5 * float(own.abs().max())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_equalize_knows_how_coarse_a_model_is(dtype: torch.dtype) -> None:
    model, inputs = ARCHITECTURES["PreActivationResNet"].build()
    given = inputs[0].to(dtype)
    result = qvis.equalize(model.to(dtype), given, samples=2, probes=1)
    kind = str(dtype).removeprefix("torch.")
    assert any(f"stored in {kind}" in note for note in result.notes)  # the folded normalizations
    with torch.no_grad():
        own, other = model(given).float(), result.model(given).float()
    assert float((own - other).abs().max()) < 8 * torch.finfo(dtype).eps * float(own.abs().max())


def test_a_normalization_after_an_activation_is_scaled_on_both_sides_in_keras() -> None:
    keras = pytest.importorskip("keras")
    keras.utils.set_random_seed(0)
    random = np.random.default_rng(0)
    layers = [keras.layers.Conv2D(6, 3, activation="relu"), keras.layers.BatchNormalization(scale=False)]
    layers += [keras.layers.ReLU(), keras.layers.Conv2D(5, 1, activation="relu")]
    layers += [keras.layers.BatchNormalization(center=False), keras.layers.LeakyReLU(), keras.layers.Conv2D(2, 1)]
    model = keras.Sequential([keras.Input((8, 8, 3)), *layers])
    for layer in (layers[1], layers[4]):
        low = {"moving_variance": 0.3, "gamma": 0.5}
        layer.set_weights([random.uniform(low.get(one.name, -1), 2, one.shape) for one in layer.weights])
    pictures = random.normal(size=(4, 8, 8, 3)).astype(np.float32)
    result = qvis.equalize(model, pictures, samples=2, probes=1)
    assert result.skipped == []
    assert result.found == 4
    assert result.verification.relative < 1e-5
    own, other = (np.asarray(one(pictures)) for one in (model, result.model))
    np.testing.assert_allclose(other, own, atol=1e-5 * np.abs(own).max())


def test_a_normalization_after_an_activation_is_scaled_on_both_sides_in_onnx() -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    random = np.random.default_rng(0)
    numbers = {
        "w0": random.normal(size=(6, 3, 3, 3)), "b0": random.normal(size=6), "w1": random.normal(size=(2, 6, 1, 1)),
        "scale": random.normal(size=6), "shift": random.normal(size=6), "mean": random.normal(size=6),
        "variance": random.uniform(0.3, 2, 6),
    }  # fmt: skip
    node, real = onnx.helper.make_node, onnx.TensorProto.FLOAT
    nodes = [
        node("Conv", ["x", "w0", "b0"], ["a"], "first"),
        node("Relu", ["a"], ["b"]),
        node("BatchNormalization", ["b", "scale", "shift", "mean", "variance"], ["c"], "norm"),
        node("LeakyRelu", ["c"], ["d"]),
        node("Conv", ["d", "w1"], ["y"], "last"),
    ]
    held = [onnx.numpy_helper.from_array(one.astype(np.float32), name) for name, one in numbers.items()]
    ends = [
        [onnx.helper.make_tensor_value_info(name, real, ["n", size, None, None])] for name, size in (("x", 3), ("y", 2))
    ]
    graph = onnx.helper.make_graph(nodes, "net", *ends, held)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    result = qvis.equalize(model, random.normal(size=(4, 3, 8, 8)).astype(np.float32), samples=2, probes=1)
    assert result.skipped == []
    assert result.found == 2
    assert result.accepted
    assert [str(pair) for pair in result.pairs] == ["w0 -> scale", "scale -> w1"]
    assert result.verification.relative < 1e-5
