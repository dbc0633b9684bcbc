"""Quantized weights in ONNX files are the numbers that onnxruntime computes with."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from qvis import adapters
from tests.test_adapters_onnx import assert_same_layers, graph, node, only, through_file, weights

quantization = pytest.importorskip("onnxruntime.quantization")

KINDS = ["static", "static-int4", "operators", "dynamic", "dynamic-channels"]


class Batches(quantization.CalibrationDataReader):
    """What static quantization looks at."""

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        self.batches = iter([{"x": random.normal(size=(1, 3, 8, 8)).astype("f4")} for _ in range(4)])

    def get_next(self) -> Any:
        return next(self.batches, None)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One network, as float and quantized in all ways that onnxruntime offers."""
    folder = tmp_path_factory.mktemp("quantized")
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4), nn.ReLU()]
    model = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(128, 10), nn.ReLU(), nn.Linear(10, 4)).eval()
    paths = {kind: folder / f"{kind}.onnx" for kind in ["float", *KINDS]}
    logging.disable()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = {"input_names": ["x"], "do_constant_folding": True}
        torch.onnx.export(model, (torch.zeros(1, 3, 8, 8),), paths["float"], dynamo=False, **names)
        static = {"weight_type": quantization.QuantType.QInt8, "per_channel": True}
        made = quantization.QuantFormat
        quantization.quantize_static(paths["float"], paths["static"], Batches(), quant_format=made.QDQ, **static)
        quantization.quantize_static(
            paths["float"], paths["operators"], Batches(), quant_format=made.QOperator, **static
        )
        four = quantization.QuantType.QInt4
        quantization.quantize_static(paths["float"], paths["static-int4"], Batches(), weight_type=four)
        quantization.quantize_dynamic(paths["float"], paths["dynamic"], weight_type=quantization.QuantType.QUInt8)
        quantization.quantize_dynamic(paths["float"], paths["dynamic-channels"], per_channel=True)
    logging.disable(logging.NOTSET)
    return paths


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_weights_lie_near_those_they_came_from(kind: str, files: dict[str, Path]) -> None:
    exact, found = adapters.read(files["float"]), adapters.read(files[kind])
    assert [layer.name for layer in found.layers] == [layer.name for layer in exact.layers] == ["0", "2", "5", "7"]
    assert found.parameters == exact.parameters
    for one, other in zip(exact.layers, found.layers, strict=True):
        assert other.dtype in ("int8", "uint8", "int4")
        (note,) = other.notes
        assert note.startswith(f"{other.dtype}, dequantized with ")
        per_channel = kind in ("static", "operators")
        assert not per_channel or f"{one.weight.shape[0]} scales (symmetric)" in note
        steps = np.ptp(one.weight) / (15 if other.dtype == "int4" else 200)
        assert np.abs(one.weight - other.weight).max() < steps


@pytest.mark.parametrize("kind", ["static", "static-int4"])
def test_dequantized_weights_equal_those_of_onnxruntime(kind: str, files: dict[str, Path]) -> None:
    model = onnx.load(files[kind])
    held = {tensor.name for tensor in model.graph.initializer}
    outputs = {made.output[0]: made.input[0] for made in model.graph.node if made.op_type == "DequantizeLinear"}
    outputs = {output: source for output, source in outputs.items() if source in held and "bias" not in source}
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    theirs = session.run(list(outputs), {"x": np.zeros((1, 3, 8, 8), "f4")})
    ours = adapters.read(files[kind]).layers
    assert len(ours) == len(theirs) == 4
    for layer, array in zip(ours, theirs, strict=True):
        rows = array if layer.channels == "axis 0" else array.T
        np.testing.assert_array_equal(layer.weight, rows.reshape(layer.weight.shape))


@pytest.mark.parametrize("kind", ["operators", "dynamic", "dynamic-channels"])
def test_operators_on_integers_have_their_scales(kind: str, files: dict[str, Path]) -> None:
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(files[kind]).graph.initializer}
    for layer in adapters.read(files[kind]).layers:
        name = next(one for one in held if one.endswith("quantized") and held[one].shape == layer.shape)
        stem = name.removesuffix("_quantized")
        integers = held[name].astype("f4") - held[f"{stem}_zero_point"].astype("f4").reshape(-1)[0]
        scale = held[f"{stem}_scale"]
        along_last = layer.channels == "axis 1"
        integers = integers.T if along_last else integers.reshape(layer.weight.shape)
        np.testing.assert_array_equal(layer.weight, integers * scale.reshape(-1, 1))


def test_a_dynamically_quantized_lstm(tmp_path: Path) -> None:
    w, r = weights(2, 24, 8), weights(2, 24, 6)
    lstm = node("LSTM", "x lstm.w lstm.r", "/lstm/LSTM", hidden_size=6, direction="bidirectional")
    exact = graph(lstm, **{"lstm.w": w, "lstm.r": r})
    exact.graph.input[0].type.tensor_type.shape.dim.add().dim_value = 3
    for size in (1, 8):
        exact.graph.input[0].type.tensor_type.shape.dim.add().dim_value = size
    onnx.save(exact, tmp_path / "float.onnx")
    logging.disable()
    quantization.quantize_dynamic(tmp_path / "float.onnx", tmp_path / "int8.onnx", per_channel=True)
    logging.disable(logging.NOTSET)
    one, other = adapters.read(tmp_path / "float.onnx"), adapters.read(tmp_path / "int8.onnx")
    assert {layer.op for layer in other.layers} == {"DynamicQuantizeLSTM"}
    assert [layer.name for layer in one.layers] == [layer.name for layer in other.layers]
    for exact_layer, layer in zip(one.layers, other.layers, strict=True):
        assert exact_layer.shape == layer.shape
        np.testing.assert_allclose(layer.weight, exact_layer.weight, atol=0.03)


# ---------------------------------------------------------------------------------------------------------------------
# Grids made by hand, against onnxruntime


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    model.ir_version = 10
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {"x": x})
    return np.asarray(output)


INTEGERS = np.random.default_rng(1).integers(-128, 128, (8, 6)).astype("i1")
SCALES = np.random.default_rng(2).uniform(0.01, 0.1, 8).astype("f4")
GRIDS = {
    "per tensor": (INTEGERS, SCALES[0], None, {}, "int8, dequantized with 1 scale (symmetric)"),
    "zero point": (INTEGERS, SCALES[0], np.int8(-3), {}, "int8, dequantized with 1 scale (zero point -3)"),
    "per axis": (INTEGERS, SCALES, None, {"axis": 0}, "int8, dequantized with 8 scales (symmetric)"),
    "last axis": (
        INTEGERS.astype("u1"),
        SCALES[:6],
        np.arange(6, dtype="u1"),
        {"axis": -1},
        "uint8, dequantized with 6 scales (zero points 0 to 5)",
    ),
    "blocks": (
        INTEGERS,
        weights(3, 6),
        None,
        {"axis": 0, "block_size": 3},
        "int8, dequantized with 18 scales of 3 weights each (symmetric)",
    ),
}


@pytest.mark.parametrize("case", list(GRIDS))
def test_grids(case: str, tmp_path: Path) -> None:
    integers, scale, zero, attributes, note = GRIDS[case]
    inputs, given = "w scale", {"w": integers, "scale": np.asarray(scale)}
    if zero is not None:
        inputs, given["zero"] = "w scale zero", np.asarray(zero)
    model = graph(node("DequantizeLinear", inputs, output="v", **attributes), node("MatMul", "x v"), **given)
    layer = only(model)
    assert layer.notes == (note,)
    np.testing.assert_array_equal(layer.weight, run(model, np.eye(8, dtype="f4")).T)
    assert_same_layers(adapters.read(model), through_file(model, tmp_path))


def test_a_weight_that_the_graph_itself_rounds() -> None:
    steps = [node("QuantizeLinear", "w s z", output="q", axis=0), node("DequantizeLinear", "q s z", output="v", axis=0)]
    weight = weights(8, 6)
    model = graph(*steps, node("MatMul", "x v"), w=weight, s=SCALES, z=np.zeros(8, dtype="i1"))
    layer = only(model)
    note = "stored as float32; the model itself rounds it: int8, dequantized with 8 scales (symmetric)"
    assert (layer.dtype, layer.notes) == ("float32", (note,))
    np.testing.assert_array_equal(layer.weight, run(model, np.eye(8, dtype="f4")).T)


def test_grids_that_do_not_fit_are_no_weights() -> None:
    steps = node("DequantizeLinear", "w s", output="v", axis=0), node("MatMul", "x v")
    found = adapters.find(graph(*steps, w=INTEGERS, s=SCALES[:5]))
    assert found is not None
    assert found.read(graph(*steps, w=INTEGERS, s=SCALES[:5])).layers == ()


@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("columns", [64, 50])
def test_four_bits_of_onnxruntime(zeros: bool, columns: int) -> None:
    random = np.random.default_rng(3)
    blocks = -(-columns // 16)
    given = {"w": random.integers(0, 256, (5, blocks, 8)).astype("u1"), "s": weights(5 * blocks)}
    if zeros:
        given["z"] = random.integers(0, 256, 5 * ((blocks + 1) // 2)).astype("u1")
    sizes = {"K": columns, "N": 5, "bits": 4, "block_size": 16}
    model = graph(node("MatMulNBits", "x w s z" if zeros else "x w s", domain="com.microsoft", **sizes), **given)
    model.graph.input[0].type.tensor_type.shape.dim.add().dim_value = columns
    model.graph.input[0].type.tensor_type.shape.dim.add().dim_value = columns
    layer = only(model)
    assert (layer.op, layer.shape, layer.channels) == ("MatMulNBits", (5, columns), "axis 0")
    assert adapters.read(model).skipped == ()
    assert layer.notes[0].startswith(f"uint4, dequantized with {5 * blocks} scales of 16 weights each")
    np.testing.assert_allclose(layer.weight, run(model, np.eye(columns, dtype="f4")).T, rtol=1e-6)


def test_packed_weights_in_another_order_are_named_as_left_out() -> None:
    random = np.random.default_rng(3)
    given = {"w": random.integers(0, 256, (5, 4, 8)).astype("u1"), "s": weights(20), "g": np.arange(64, dtype="i4")}
    sizes = {"K": 64, "N": 5, "bits": 4, "block_size": 16}
    steps = (
        node("MatMulNBits", "x w s - g", domain="com.microsoft", **sizes),
        node("MatMul", "x v", output="other"),
    )
    network = adapters.read(graph(*steps, **given, v=weights(64, 3)))
    assert [layer.op for layer in network.layers] == ["MatMul"]
    assert [one.name for one in network.skipped] == ["w"]
    assert "packed" in network.skipped[0].reason


def test_integers_without_a_scale_are_in_steps_of_their_grid() -> None:
    layer = only(graph(node("MatMulInteger", "x w - z"), w=INTEGERS, z=np.int8(2)))
    assert layer.notes == ("int8, in steps of its grid: the graph shows no scale for it",)
    np.testing.assert_array_equal(layer.weight, INTEGERS.T.astype("f4") - 2)


# ---------------------------------------------------------------------------------------------------------------------
# Types of numbers

FLOATS = {
    TensorProto.DOUBLE: np.float64,
    TensorProto.FLOAT16: np.float16,
    TensorProto.BFLOAT16: ml_dtypes.bfloat16,
    TensorProto.FLOAT8E4M3FN: ml_dtypes.float8_e4m3fn,
    TensorProto.FLOAT8E4M3FNUZ: ml_dtypes.float8_e4m3fnuz,
    TensorProto.FLOAT8E5M2: ml_dtypes.float8_e5m2,
    TensorProto.FLOAT8E5M2FNUZ: ml_dtypes.float8_e5m2fnuz,
    TensorProto.FLOAT4E2M1: ml_dtypes.float4_e2m1fn,
}


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "typed"])
@pytest.mark.parametrize("kind", list(FLOATS))
def test_floating_types(kind: int, raw: bool, tmp_path: Path) -> None:
    numbers = weights(3, 5).astype(FLOATS[kind])
    if raw:
        tensor = numpy_helper.from_array(numbers, "w")
    else:
        tensor = helper.make_tensor("w", kind, (3, 5), numbers.astype("f4").reshape(-1))
    model = graph(node("Gemm", "x w", transB=1), w=tensor)
    layer = only(model)
    assert layer.dtype == np.dtype(FLOATS[kind]).name.replace("e2m1fn", "e2m1")
    np.testing.assert_array_equal(layer.weight, numbers.astype("f8" if kind == TensorProto.DOUBLE else "f4"))
    assert_same_layers(adapters.read(model), through_file(model, tmp_path))


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "typed"])
@pytest.mark.parametrize(
    ("kind", "low", "high"),
    [
        (TensorProto.INT8, -128, 127),
        (TensorProto.UINT8, 0, 255),
        (TensorProto.INT16, -32768, 32767),
        (TensorProto.UINT16, 0, 65535),
        (TensorProto.INT32, -(2**20), 2**20),
        (TensorProto.INT4, -8, 7),
        (TensorProto.UINT4, 0, 15),
        (TensorProto.INT2, -2, 1),
        (TensorProto.UINT2, 0, 3),
    ],
)
def test_integer_types(kind: int, low: int, high: int, raw: bool, tmp_path: Path) -> None:
    numbers = np.random.default_rng(4).integers(low, high + 1, (3, 5))
    tensor = helper.make_tensor("w", kind, (3, 5), numbers.reshape(-1))
    if raw:
        tensor = numpy_helper.from_array(numpy_helper.to_array(tensor), "w")
    steps = node("DequantizeLinear", "w s", output="v"), node("Gemm", "x v", transB=1)
    model = graph(*steps, w=tensor, s=np.float32(0.5))
    np.testing.assert_array_equal(only(model).weight, numbers.astype("f4") * 0.5)
    assert_same_layers(adapters.read(model), through_file(model, tmp_path))
