"""New numbers in copies of ONNX models: what onnxruntime makes of them, what stays, and what is refused."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from qvis import adapters
from qvis.adapters.onnx import protos
from qvis.errors import BadArgumentError, OutputError
from qvis.layers import Network, Norm
from qvis.rewriting import Rewriting
from qvis.running import Batch
from tests.test_adapters_onnx import graph, node

onnxruntime = pytest.importorskip("onnxruntime")


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def made(*nodes: Any, **constants: Any) -> onnx.ModelProto:
    """A model of a version that onnxruntime takes."""
    model = graph(*nodes, **constants)
    model.ir_version = 10
    return model


def run(model: onnx.ModelProto | Path, *given: np.ndarray) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    content = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(content, options)
    return session.run(None, dict(zip((one.name for one in session.get_inputs()), given, strict=True)))


@cache
def images() -> onnx.ModelProto:
    """Convolutions of all kinds, with a normalization whose numbers are shared, and layers used twice."""
    model = made(
        node("Conv", "x stem.weight stem.bias", "stem", "a", pads=[1, 1, 1, 1]),
        node("BatchNormalization", "a ones zeros zeros ones", "norm", "b", epsilon=1e-3),
        node("Relu", "b", "relu", "c"),
        node("Conv", "c deep.weight", "deep", "d", group=8),
        node("Conv", "d grouped.weight shared.bias", "grouped", "e", group=2),
        node("ConvTranspose", "e up.weight shared.bias", "up", "f", group=2, strides=[2, 2]),
        node("GlobalAveragePool", "f", "pool", "g"),
        node("Flatten", "g", "flat", "h"),
        node("Transpose", "head.weight", "turn", "turned", perm=[1, 0]),
        node("MatMul", "h turned", "head", "i"),
        node("Gemm", "i last.weight last.bias", "last", "j", transB=1),
        node("Gemm", "j last.weight last.bias", "again", "k", transB=1),
        node("LayerNormalization", "k factor shift", "ln", "y"),
        **{
            "stem.weight": noise(8, 3, 3, 3),
            "stem.bias": noise(8),
            "ones": np.ones(8, np.float32),
            "zeros": np.zeros(8, np.float32),
            "deep.weight": noise(8, 1, 3, 3),
            "grouped.weight": noise(6, 4, 1, 1),
            "shared.bias": noise(6, seed=4),
            "up.weight": noise(6, 3, 2, 2),
            "head.weight": noise(4, 6),
            "last.weight": noise(4, 4),
            "last.bias": noise(4),
            "factor": noise(4),
            "shift": noise(4, seed=1),
        },
    )
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", 1, ["n", 3, 6, 6]))
    return model


X = noise(2, 3, 6, 6, seed=9)


def drawn(network: Network) -> dict[str, np.ndarray]:
    return {layer.name: noise(*layer.weight.shape, seed=10 + i) for i, layer in enumerate(network.layers)}


def own(network: Network, model: Any) -> Rewriting:
    return Rewriting(
        weights={layer.name: layer.weight.copy() for layer in network.layers}, norms=dict(adapters.graph(model).norms)
    )


def test_rewriting_with_the_models_own_numbers_changes_nothing() -> None:
    model = images()
    before = model.SerializeToString()
    network = adapters.read(model)
    new, notes = adapters.rewrite(model, network, own(network, model))
    assert notes == ()
    assert model.SerializeToString() == before
    assert [one.name for one in new.graph.initializer][:13] == [one.name for one in model.graph.initializer]
    np.testing.assert_array_equal(run(new, X)[0], run(model, X)[0])


def test_a_rewritten_model_computes_what_the_runner_does() -> None:
    model = images()
    network = adapters.read(model)
    weights = drawn(network)
    norm = Norm("norm", noise(8), noise(8) ** 2 + 0.1, noise(8, seed=2), noise(8, seed=3), 1e-5)
    (name,) = adapters.graph(model).norms
    new, notes = adapters.rewrite(model, network, Rewriting(weights=weights, norms={name: norm}))
    assert notes == ()
    runner = adapters.runner(model, network)
    runner.place(weights, {name: norm})
    np.testing.assert_allclose(run(new, X)[0], runner.run(Batch((X,), size=2))[0], rtol=1e-4, atol=1e-4)
    for layer in adapters.read(new).layers:
        np.testing.assert_array_equal(layer.weight, weights[layer.name])
    stored = {one.name: numpy_helper.to_array(one) for one in new.graph.initializer}
    # what the normalization shares with itself alone gets a tensor for each of its uses
    np.testing.assert_array_equal(stored["ones"], np.ones(8))
    batch_norm = next(one for one in new.graph.node if one.op_type == "BatchNormalization")
    np.testing.assert_array_equal(stored[batch_norm.input[1]], norm.scale)
    np.testing.assert_allclose(stored[batch_norm.input[4]], norm.variance + 1e-5 - 1e-3, rtol=1e-5)


def test_biases_are_written_and_those_that_others_share_become_their_own() -> None:
    model = images()
    network = adapters.read(model)
    new, _ = adapters.rewrite(model, network, Rewriting(biases={"stem": noise(8, seed=5), "up": noise(6, seed=6)}))
    stored = {one.name: numpy_helper.to_array(one) for one in new.graph.initializer}
    np.testing.assert_array_equal(stored["stem.bias"], noise(8, seed=5))
    np.testing.assert_array_equal(stored["shared.bias"], noise(6, seed=4))
    up, grouped = (next(one for one in new.graph.node if one.name == name) for name in ("up", "grouped"))
    assert grouped.input[2] == "shared.bias"
    np.testing.assert_array_equal(stored[up.input[2]], noise(6, seed=6))
    new, _ = adapters.rewrite(model, network, Rewriting(biases={"last": noise(4, seed=7)}))
    np.testing.assert_array_equal(numpy_helper.to_array(new.graph.initializer[10]), noise(4, seed=7))
    run(new, X)
    for name in ("deep", "head"):
        with pytest.raises(BadArgumentError, match=f"biases: '{name}' .* has no bias"):
            adapters.rewrite(model, network, Rewriting(biases={name: noise(8)}))


def test_factors_and_shifts_of_a_layer_normalization_are_written() -> None:
    model = images()
    network = adapters.read(model)
    name = next(one.name for one in adapters.graph(model).nodes if one.op == "layer_norm")
    ((known, (factor, shift)),) = adapters.affines(model).items()
    assert known == name
    np.testing.assert_array_equal(factor, noise(4))
    np.testing.assert_array_equal(shift, noise(4, seed=1))
    new, _ = adapters.rewrite(model, network, Rewriting(affines={name: (noise(4, seed=7), None)}))
    stored = {one.name: numpy_helper.to_array(one) for one in new.graph.initializer}
    np.testing.assert_array_equal(stored["factor"], noise(4, seed=7))
    np.testing.assert_array_equal(stored["shift"], noise(4, seed=1))
    with pytest.raises(BadArgumentError, match="affines: no normalization is called 'other'"):
        adapters.rewrite(model, network, Rewriting(affines={"other": (noise(4), None)}))


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_the_gates_of_a_recurrent_layer_are_written_each_to_its_place(direction: str) -> None:
    ways = 2 if direction == "bidirectional" else 1
    tensors = {"W": noise(ways, 12, 4), "R": noise(ways, 12, 3)}
    model = made(node("LSTM", "x W R", "lstm", "y", hidden_size=3, direction=direction), **tensors)
    network = adapters.read(model)
    weights = drawn(network)
    assert len(weights) == 8 * ways
    new, _ = adapters.rewrite(model, network, Rewriting(weights=weights))
    for layer in adapters.read(new).layers:
        np.testing.assert_array_equal(layer.weight, weights[layer.name])
    assert [tuple(one.dims) for one in new.graph.initializer] == [tuple(one.dims) for one in model.graph.initializer]


def test_weights_in_nodes_and_behind_casts_are_written_where_they_are_stored() -> None:
    held = numpy_helper.from_array(noise(4, 6).astype(np.float16), "inside")
    model = made(
        helper.make_node("Constant", [], ["fc.weight"], value=held),
        node("Cast", "fc.weight", "cast", "wide", to=1),
        node("Reshape", "wide shape", "shaped", "flat"),
        node("MatMul", "x flat", "fc", "y"),
        shape=np.array([6, 4]),
    )
    before = model.SerializeToString()
    network = adapters.read(model)
    matrix = noise(*network.layers[0].weight.shape)
    new, notes = adapters.rewrite(model, network, Rewriting(weights={network.layers[0].name: matrix}))
    assert model.SerializeToString() == before
    assert len(notes) == 1
    assert "float16" in notes[0]
    assert [one.op_type for one in new.graph.node] == ["Constant", "Cast", "Reshape", "MatMul"]
    np.testing.assert_array_equal(adapters.read(new).layers[0].weight, matrix.astype(np.float16).astype(np.float32))
    x = noise(2, 6)
    np.testing.assert_allclose(run(new, x)[0], x @ matrix.astype(np.float16).astype(np.float32).T, rtol=1e-5)
    with pytest.raises(BadArgumentError, match="float16, which has no room"):
        adapters.rewrite(model, network, Rewriting(weights={network.layers[0].name: np.full_like(matrix, 1e6)}))


def test_functions_are_inlined_when_a_node_in_them_needs_a_tensor_of_its_own_and_only_then() -> None:
    function = helper.make_function(
        "own",
        "Dense",
        ["a", "w", "c"],
        ["b"],
        [helper.make_node("Gemm", ["a", "w", "c"], ["b"])],
        [helper.make_opsetid("", 21)],
    )
    model = made(
        node("Dense", "x first zero", "one", "z", domain="own"),
        node("Dense", "z second zero", "two", "y", domain="own"),
        functions=[function],
        first=noise(5, 4),
        second=noise(4, 4),
        zero=np.zeros(4, np.float32),
    )
    before = model.SerializeToString()
    network = adapters.read(model)
    weights, x = drawn(network), noise(2, 5)
    new, notes = adapters.rewrite(model, network, Rewriting(weights=weights))
    assert notes == ()
    assert len(new.functions) == 1
    np.testing.assert_allclose(run(new, x)[0], x @ weights["first"].T @ weights["second"].T, rtol=1e-5)
    rewriting = Rewriting(weights=weights, biases={"first": noise(4)})
    with pytest.raises(BadArgumentError, match="inside a function"):
        adapters.rewrite(model, network, rewriting, inplace=True)
    new, notes = adapters.rewrite(model, network, rewriting)
    assert notes == ("the functions of the model are inlined, since they hold some of the numbers",)
    wanted = (x @ weights["first"].T + noise(4)) @ weights["second"].T
    np.testing.assert_allclose(run(new, x)[0], wanted, rtol=1e-5, atol=1e-5)
    assert model.SerializeToString() == before


def test_a_weight_that_is_a_constant_of_a_function_is_refused_with_a_way_out() -> None:
    held = numpy_helper.from_array(noise(4, 6), "w")
    nodes = [helper.make_node("Constant", [], ["w"], value=held), helper.make_node("MatMul", ["a", "w"], ["b"])]
    function = helper.make_function("own", "Dense", ["a"], ["b"], nodes, [helper.make_opsetid("", 21)])
    model = made(node("Dense", "x", "dense", "y", domain="own"), functions=[function])
    network = adapters.read(model)
    with pytest.raises(BadArgumentError, match="inside a function of the model; inline them first"):
        adapters.rewrite(model, network, Rewriting(weights=drawn(network)))


def test_inplace_writes_into_the_proto_and_only_when_everything_is_right() -> None:
    model = onnx.ModelProto()
    model.CopyFrom(images())
    before = model.SerializeToString()
    network = adapters.read(model)
    bad = {"stem": noise(8, 27, seed=3), "last": noise(3, 4)}
    with pytest.raises(BadArgumentError, match=r"weights: 'last' has the shape \(4, 4\), got \(3, 4\)"):
        adapters.rewrite(model, network, Rewriting(weights=bad), inplace=True)
    assert model.SerializeToString() == before
    new, _ = adapters.rewrite(model, network, Rewriting(weights={"stem": noise(8, 27, seed=3)}), inplace=True)
    assert new is model
    np.testing.assert_array_equal(adapters.read(model).layers[0].weight, noise(8, 27, seed=3))


def test_what_cannot_be_written_is_named_with_the_reason() -> None:
    quantized = made(
        node("DequantizeLinear", "codes scale", "dq", "w"),
        node("MatMul", "x w", "fc", "z"),
        node("Add", "z table", "add", "y"),
        codes=np.ones((4, 4), np.int8),
        scale=np.float32(0.5),
        table=noise(3, 4),
    )
    network = adapters.read(quantized)
    names = {layer.op: layer.name for layer in network.layers}
    with pytest.raises(BadArgumentError, match="is quantized already"):
        adapters.rewrite(quantized, network, Rewriting(weights={names["MatMul"]: noise(4, 4)}))
    with pytest.raises(BadArgumentError, match="its weight is used by no operator"):
        adapters.rewrite(quantized, network, Rewriting(weights={names["other"]: noise(3, 4)}))
    with pytest.raises(BadArgumentError, match="weights: no layer is called 'stm'; did you mean 'stem'"):
        adapters.rewrite(images(), adapters.read(images()), Rewriting(weights={"stm": noise(4, 4)}))
    norm = Norm("bn", noise(8), noise(8), noise(8), noise(8), 1e-5)
    with pytest.raises(BadArgumentError, match="norms: no BatchNormalization that can be written is called 'bn'"):
        adapters.rewrite(images(), adapters.read(images()), Rewriting(norms={"bn": norm}))


def test_a_file_with_external_data_is_rewritten_and_saved_anew(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    copied = onnx.ModelProto()
    copied.CopyFrom(images())
    onnx.save_model(copied, path, save_as_external_data=True, location="model.data", size_threshold=0)
    before = {one.name: one.read_bytes() for one in tmp_path.iterdir()}
    network = adapters.read(path)
    new, notes = adapters.rewrite(path, network, Rewriting(weights=drawn(network)))
    assert notes == ()
    with pytest.raises(BadArgumentError, match="inplace: only a ModelProto"):
        adapters.rewrite(path, network, Rewriting(), inplace=True)
    with pytest.raises(OutputError, match="is the file that the model came from"):
        adapters.save(new, path, source=path)
    saved = adapters.save(new, tmp_path / "new.onnx", source=path)
    np.testing.assert_array_equal(run(saved, X)[0], run(new, X)[0])
    after = {one.name: one.read_bytes() for one in tmp_path.iterdir()}
    assert {name: after[name] for name in before} == before
    assert set(after) == {*before, "new.onnx"}


def test_a_large_model_is_saved_with_its_numbers_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    big = made(node("MatMul", "x w", "fc", "y"), w=noise(32, 32))
    before = big.SerializeToString()
    monkeypatch.setattr(protos, "LIMIT", 1 << 24)
    path = adapters.save(big, tmp_path / "big.onnx")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["big.onnx", "big.onnx.data"]
    assert big.SerializeToString() == before
    x = noise(2, 32)
    np.testing.assert_array_equal(run(path, x)[0], run(big, x)[0])
    with pytest.raises(OutputError, match=r"cannot be saved to 'big.keras'; name it .onnx"):
        adapters.save(big, tmp_path / "big.keras")
