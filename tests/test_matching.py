"""Which layers are paired when two models are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from qvis.analysis import analyze_network
from qvis.analysis.matching import match_layers
from qvis.layers import Analysis, FloatArray, Layer, Network


def analysis(framework: str, weights: dict[str, FloatArray]) -> Analysis:
    """A model of the given matrices."""
    layers = tuple(_layer(name, weight) for name, weight in weights.items())
    return analyze_network(Network("model", framework, layers))


def _layer(name: str, weight: FloatArray) -> Layer:
    return Layer(name, "Linear", weight.shape, "float32", lambda: weight)


@pytest.fixture
def weights() -> list[FloatArray]:
    """Four matrices, three of the same shape."""
    random = np.random.default_rng(0)
    return [random.standard_normal(shape).astype(np.float32) for shape in [(8, 27), (8, 27), (8, 27), (4, 8)]]


def rounded(weight: FloatArray, bits: int = 8) -> FloatArray:
    """The weight on an integer grid."""
    step = np.abs(weight).max() / (2 ** (bits - 1) - 1)
    return (np.rint(weight / step) * step).astype(np.float32)


def names(pairs: list[tuple[object, object]]) -> list[tuple[str, str]]:
    return [(old.name, new.name) for old, new in pairs]  # type: ignore[attr-defined]


def test_within_a_framework_only_names_make_pairs(weights: list[FloatArray]) -> None:
    before = analysis("PyTorch 2", {"a": weights[0], "b": weights[1]})
    after = analysis("PyTorch 2", {"a": weights[1], "c": weights[1]})
    pairs, unmatched = match_layers(before, after)
    assert names(pairs) == [("a", "a")]
    assert {(one.name, one.reason) for one in unmatched} == {
        ("c", "only in the new model"),
        ("b", "only in the old model"),
    }


CHANGES = {"same": lambda w: w, "int8": rounded, "permuted": lambda w: w[:, ::-1].copy()}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_across_formats_renamed_layers_are_found_by_their_weights(
    weights: list[FloatArray], change: Callable[[FloatArray], FloatArray]
) -> None:
    before = analysis("Keras 3", {f"conv{i}": weight for i, weight in enumerate(weights)})
    order = [2, 0, 3, 1]
    after = analysis("TFLite 3", {f"tensor{i}": change(weights[i]) for i in order})
    pairs, unmatched = match_layers(before, after)
    assert names(pairs) == [(f"conv{i}", f"tensor{i}") for i in order]
    assert unmatched == []


def test_a_tensorflow_model_and_its_conversion_are_two_formats(weights: list[FloatArray]) -> None:
    before = analysis("TensorFlow 2.21.0", {"dense/kernel": weights[0]})
    after = analysis("TensorFlow Lite", {"model/dense/MatMul": rounded(weights[0])})
    pairs, unmatched = match_layers(before, after)
    assert names(pairs) == [("dense/kernel", "model/dense/MatMul")]
    assert unmatched == []


def test_across_formats_other_weights_make_no_pair(weights: list[FloatArray]) -> None:
    before = analysis("Keras 3", {"conv": weights[0]})
    after = analysis("ONNX 1", {"node": weights[1]})
    pairs, unmatched = match_layers(before, after)
    assert pairs == []
    assert {one.name for one in unmatched} == {"conv", "node"}
    assert all("weights like these" in one.reason for one in unmatched)


def test_layers_with_equal_weights_pair_in_order(weights: list[FloatArray]) -> None:
    before = analysis("Keras 3", {"one": weights[0], "two": weights[0]})
    after = analysis("ONNX 1", {"first": weights[0], "second": weights[0]})
    pairs, unmatched = match_layers(before, after)
    assert names(pairs) == [("one", "first"), ("two", "second")]
    assert unmatched == []


def test_a_layer_into_which_a_batchnorm_was_folded_is_found(weights: list[FloatArray]) -> None:
    factors = np.geomspace(0.1, 20, 8, dtype=np.float32)[:, None]
    before = analysis("Keras 3", {f"conv{i}": weights[i] for i in range(3)})
    after = analysis("ONNX 1", {f"node{i}": weights[i] * factors for i in (1, 2)})
    pairs, unmatched = match_layers(before, after)
    assert names(pairs) == [("conv1", "node1"), ("conv2", "node2")]
    assert [one.name for one in unmatched] == ["conv0"]


def test_channels_of_one_weight_are_not_told_by_factors(weights: list[FloatArray]) -> None:
    before, after = analysis("Keras 3", {"a": weights[0][:, :1]}), analysis("ONNX 1", {"b": weights[1][:, :1]})
    assert match_layers(before, after)[0] == []


@pytest.mark.parametrize("other", ["PyTorch 2", "safetensors"])
def test_layers_whose_channels_lie_along_another_axis_are_no_pair(other: str, weights: list[FloatArray]) -> None:
    matrix = weights[0][:, :8]
    before, after = analysis("PyTorch 2", {"up": matrix.T}), analysis(other, {"up": matrix})
    before = replace(before, layers=(replace(before.layers[0], channels="axis 1"),))
    pairs, unmatched = match_layers(before, after)
    assert pairs == []
    assert [(one.name, one.reason) for one in unmatched] == [("up", "its channels were axis 1 and are axis 0")]


def test_a_layer_of_another_shape_is_named_with_both_shapes(weights: list[FloatArray]) -> None:
    before, after = analysis("PyTorch 2", {"a": weights[0]}), analysis("PyTorch 2", {"a": weights[3]})
    pairs, unmatched = match_layers(before, after)
    assert pairs == []
    assert [(one.name, one.reason) for one in unmatched] == [("a", "its shape was 8×27 and is 4×8")]
