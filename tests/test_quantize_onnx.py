"""ONNX models become smaller files that ONNX Runtime computes with integers, and nearly the same."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

import qvis
from qvis import adapters
from qvis.errors import BadArgumentError, NotRunnableError, UnsupportedModelError
from qvis.quantization.contents import Arithmetic
from qvis.quantization.methods import FLOAT
from tests.onnx_models import digits, model, pictures, run, sqnr

RANDOM = np.random.default_rng(0)


def numbers(*shape: int, scale: float = 1.0) -> np.ndarray:
    return (RANDOM.normal(size=shape) * scale).astype(np.float32)


def quantized(given: Any, folder: Path, method: str = "post_training", data: Any = None, **rest: Any) -> Any:
    with_data = {} if data is None else {"calibration_data": data}
    return qvis.quantize(given, folder / "quantized.onnx", method, **with_data, **rest)


def optimized(path: Path) -> Counter[str]:
    """The operators that ONNX Runtime really runs."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path.with_suffix(".optimized"))
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(path.with_suffix(".optimized")).graph.node)


def accuracy(given: Any) -> float:
    x, digit = pictures()
    return float((run(given, x)[0].argmax(axis=1) == digit).mean())


def convolutions(opset: int = 20, **rest: Any) -> onnx.ModelProto:
    """Two convolutions, one of them with a normalization behind it."""
    nodes = [
        helper.make_node("Conv", ["x", "first.weight"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["a", "scale", "shift", "mean", "variance"], ["b"]),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("Conv", ["c", "second.weight", "bias"], ["y"]),
    ]
    tensors = {
        "first.weight": numbers(6, 3, 3, 3),
        "scale": 1 + numbers(6, scale=0.2),
        "shift": numbers(6),
        "mean": numbers(6),
        "variance": 1 + np.abs(numbers(6)),
        "second.weight": numbers(4, 6, 3, 3),
        "bias": numbers(4),
    }
    return model(nodes, {"x": rest.get("shape", ["batch", 3, 6, 6])}, ["y"], opset, **tensors)


# ---------------------------------------------------------------------------------------------------------------------
# What comes of it


@pytest.mark.parametrize(
    ("method", "bits", "largest", "least"),
    [
        ("post_training", 8, 0.31, 0.99),
        ("post_training", 4, 0.19, 0.5),
        ("weight_only", 8, 0.30, 0.0),
        ("weight_only", 4, 0.18, 0.0),
        ("dynamic", 8, 1.0, 0.0),
    ],
)
def test_the_digits_are_read_as_before(
    method: str, bits: int, largest: float, least: float, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = digits()
    before = given.SerializeToString(deterministic=True)
    x, _ = pictures()
    made = quantized(given, tmp_path, method, x[::10] if method == "post_training" else None, bits=bits)
    assert given.SerializeToString(deterministic=True) == before
    assert capfd.readouterr() == ("", "")
    assert abs(accuracy(made.path) - accuracy(given)) < 0.01 * (1 if bits == 8 else 3)
    assert made.compression < largest
    assert made.contents.integer_operations >= least
    names = [layer.name for layer in adapters.read(given).layers]
    assert [layer.name for layer in adapters.read(made.path).layers] == names


def test_after_post_training_every_operator_that_computes_is_one_on_integers(tmp_path: Path) -> None:
    for bits in (8, 4):
        made = quantized(digits(), tmp_path, data=pictures()[0][:64], bits=bits)
        found = optimized(made.path)
        assert found["QLinearConv"] == 17
        assert found["QGemm"] == found["QLinearGlobalAveragePool"] == 1
        assert not found.keys() & {"Conv", "FusedConv", "Gemm", "MatMul", "Add", "Relu", "ReduceMean"}
        assert made.contents.leftovers == ()


def test_each_layer_has_its_width_and_its_own_grid(tmp_path: Path) -> None:
    given = digits()
    wanted = {"stem.conv": 4, "blocks.0.depthwise": 4, "classifier": FLOAT}
    for granularity in ("channel", "tensor"):
        made = quantized(given, tmp_path, data=pictures()[0][:64], bits={"*": 8, **wanted}, granularity=granularity)
        held = {layer.name: layer for layer in adapters.read(made.path).layers}
        for layer in adapters.read(given).layers:  # in which all normalizations are folded already
            width = wanted.get(layer.name, 8)
            assert held[layer.name].dtype == {8: "int8", 4: "int4", FLOAT: "float32"}[width]
            exact = layer.weight
            if width != FLOAT:
                largest = np.abs(exact).max(axis=1, keepdims=True)
                step = (largest if granularity == "channel" else largest.max()) / (2 ** (width - 1) - 1)
                exact = np.rint(exact / step) * step
            if width == 4:  # on a grid that clips, which leaves less error than this one
                found = held[layer.name].weight
                assert max(len(np.unique(row)) for row in found) <= 15
                assert np.square(found - layer.weight).sum() <= np.square(exact - layer.weight).sum()
                continue
            # where a number lies between two codes, either is right
            near = np.isclose(held[layer.name].weight, exact, atol=1e-6)
            assert near.mean() > 0.99
        assert [one.layer for one in made.contents.leftovers] == ["classifier"]
        kinds = made.contents.bytes_by_type
        assert kinds["int4"] == (24 * 9 + 48 * 9) // 2


def test_normalizations_are_folded_before_weights_are_rounded(tmp_path: Path) -> None:
    given, x = convolutions(), numbers(16, 3, 6, 6)
    exact = run(given, x)[0]
    for method in ("post_training", "weight_only"):
        made = quantized(given, tmp_path, method, x if method == "post_training" else None)
        assert {layer.name: layer.dtype for layer in adapters.read(made.path).layers} == {
            "first": "int8",
            "second": "int8",
        }
        assert "BatchNormalization" not in optimized(made.path)
        assert sqnr(exact, run(made.path, x)[0]) > 30


def test_a_turned_weight_keeps_the_name_of_its_layer(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Transpose", ["fc.weight"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "turned"], ["y"]),
    ]
    given = model(nodes, {"x": ["batch", 8]}, ["y"], **{"fc.weight": numbers(5, 8)})
    x = numbers(32, 8)
    for method in ("post_training", "dynamic", "weight_only"):
        made = quantized(given, tmp_path, method, x if method == "post_training" else None)
        (layer,) = adapters.read(made.path).layers
        assert (layer.name, layer.dtype, layer.weight.shape) == ("fc", "int8", (5, 8))
        assert sqnr(run(given, x)[0], run(made.path, x)[0]) > 30


def test_a_model_of_a_fixed_batch_size_is_calibrated_on_any_number_of_samples(tmp_path: Path) -> None:
    given, x = convolutions(shape=[4, 3, 6, 6]), numbers(9, 3, 6, 6)
    made = quantized(given, tmp_path, data=x)
    assert sqnr(run(given, x[:4])[0], run(made.path, x[:4])[0]) > 25


def test_a_mask_of_huge_numbers_spoils_no_transformer(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Gather", ["words", "ids"], ["e"]),
        *(helper.make_node("MatMul", ["e", f"{name}.weight"], [name]) for name in "qkv"),
        helper.make_node("Transpose", ["k"], ["turned"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "turned"], ["scores"]),
        helper.make_node("Add", ["scores", "mask"], ["masked"]),
        helper.make_node("Softmax", ["masked"], ["shares"]),
        helper.make_node("MatMul", ["shares", "v"], ["mixed"]),
        helper.make_node("Add", ["mixed", "e"], ["sum"]),
        helper.make_node("LayerNormalization", ["sum", "scale", "shift"], ["y"]),
    ]
    tensors = {
        "words": numbers(30, 16),
        **{f"{name}.weight": numbers(16, 16, scale=0.25) for name in "qkv"},
        "scale": 1 + numbers(16, scale=0.1),
        "shift": numbers(16),
    }
    given = model(nodes, {"ids": ["batch", 6], "mask": ["batch", 1, 6]}, ["y"], **tensors)
    ids = RANDOM.integers(0, 30, size=(16, 6))
    mask = np.where(np.arange(6) < 4, 0, np.finfo("f4").min).astype("f4") * np.ones((16, 1, 1), "f4")
    exact = run(given, ids, mask)[0]
    made = quantized(given, tmp_path, data={"ids": ids, "mask": mask})
    assert sqnr(exact, run(made.path, ids, mask)[0]) > 25
    assert optimized(made.path)["MatMul"] == 0
    assert any("attention or layer normalization" in note for note in made.notes)
    made = quantized(given, tmp_path, data={"ids": ids, "mask": mask}, bits={"*": 8, "words": 4})
    assert next(layer.dtype for layer in adapters.read(made.path).layers if layer.name == "words") == "uint4"
    assert sqnr(exact, run(made.path, ids, mask)[0]) > 10
    made = quantized(given, tmp_path, "dynamic")
    assert sqnr(exact, run(made.path, ids, mask)[0]) > 25
    held = {layer.name: layer for layer in adapters.read(made.path).layers}
    assert set(held) == {"words", "q", "k", "v"}
    np.testing.assert_allclose(held["words"].weight, tensors["words"], atol=np.ptp(tensors["words"]) / 255)


def test_a_weight_that_an_embedding_and_a_product_share(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Gather", ["words.weight", "ids"], ["e"]),
        helper.make_node("ReduceMean", ["e", "axes"], ["m"], keepdims=0),
        helper.make_node("Gemm", ["m", "fc.weight"], ["h"], transB=1),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "fc.weight"], ["g"], transB=1),
        helper.make_node("Gemm", ["g", "words.weight"], ["y"], transB=1),
    ]
    tensors = {"words.weight": numbers(20, 8), "fc.weight": numbers(8, 8), "axes": np.array([1])}
    given = model(nodes, {"ids": ["batch", 5]}, ["y"], **tensors)
    ids = RANDOM.integers(0, 20, size=(32, 5))
    for method in ("post_training", "dynamic", "weight_only"):
        made = quantized(given, tmp_path, method, ids if method == "post_training" else None)
        assert sqnr(run(given, ids)[0], run(made.path, ids)[0]) > 20


def lstm() -> onnx.ModelProto:
    """An LSTM and a matrix behind it."""
    nodes = [
        helper.make_node("LSTM", ["x", "val_1", "val_2"], ["", "h"], "lstm", hidden_size=4),
        helper.make_node("Squeeze", ["h", "axis"], ["s"]),
        helper.make_node("Gemm", ["s", "fc.weight"], ["y"], transB=1),
    ]
    tensors = {
        "val_1": numbers(1, 16, 3),
        "val_2": numbers(1, 16, 4),
        "fc.weight": numbers(2, 4),
        "axis": np.array([0]),
    }
    return model(nodes, {"x": [5, "batch", 3]}, ["y"], **tensors)


def test_recurrent_layers_are_computed_with_integers_where_onnxruntime_can(tmp_path: Path) -> None:
    given, x = lstm(), numbers(5, 8, 3)
    exact = run(given, x)[0]
    names = {layer.name for layer in adapters.read(given).layers}
    for method, kind in (("dynamic", "DynamicQuantizeLSTM"), ("weight_only", "LSTM")):
        made = quantized(given, tmp_path, method)
        assert sqnr(exact, run(made.path, x)[0]) > 25
        assert {layer.name for layer in adapters.read(made.path).layers} == names
        (found,) = (one for one in made.contents.operations if one.kind == kind)
        assert (found.arithmetic, found.layer) == (Arithmetic.HYBRID, "lstm")
    made = quantized(given, tmp_path, data=[qvis.running.Batch((x,), size=8)])
    assert any("quantize_static has no LSTM" in note for note in made.notes)
    assert {layer.dtype for layer in adapters.read(made.path).layers} == {"int8"}


def test_what_dynamic_leaves_in_float_is_said(tmp_path: Path) -> None:
    made = quantized(digits(), tmp_path, "dynamic")
    assert any(note.startswith("stem.conv") and "several times slower" in note for note in made.notes)
    assert optimized(made.path)["DynamicQuantizeMatMul"] == 1


@pytest.mark.parametrize("bits", [8, 4])
def test_an_old_file_is_brought_to_the_operators_that_its_widths_take(bits: int, tmp_path: Path) -> None:
    given, x = convolutions(opset=9), numbers(8, 3, 6, 6)
    given.ir_version = 3
    given.graph.input.extend(
        helper.make_tensor_value_info(one.name, one.data_type, list(one.dims)) for one in given.graph.initializer
    )
    path = tmp_path / "old.onnx"
    onnx.save(given, path)
    made = quantized(path, tmp_path, data=x, bits=bits)
    assert max(one.version for one in onnx.load(made.path).opset_import if one.domain == "") >= {8: 13, 4: 21}[bits]
    assert sqnr(run(convolutions_of(given), x)[0], run(made.path, x)[0]) > {8: 25, 4: 8}[bits]


def convolutions_of(given: onnx.ModelProto) -> onnx.ModelProto:
    """The same without initializers among the inputs."""
    del given.graph.input[1:]
    given.ir_version = 8
    return given


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def test_numbers_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    given = lstm()
    (tensor,) = (one for one in given.graph.initializer if one.name == "fc.weight")
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.full((2, 4), np.nan, np.float32), "fc.weight"))
    with pytest.raises(UnsupportedModelError, match=r"'fc' holds NaN or infinite numbers; .*exclude=\['fc'\]"):
        quantized(given, tmp_path, "weight_only")
    assert not list(tmp_path.iterdir())


def test_a_model_without_products_is_not_for_dynamic(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="only Conv; use method='post_training', or 'weight_only'"):
        quantized(convolutions(), tmp_path, "dynamic")


def test_a_model_that_onnxruntime_cannot_load_is_refused(tmp_path: Path) -> None:
    given = convolutions()
    given.opset_import[0].version = 999
    with pytest.raises(NotRunnableError, match="onnxruntime cannot load it"):
        quantized(given, tmp_path, "weight_only")


def test_four_bits_are_refused_where_the_operators_cannot_be_converted(tmp_path: Path) -> None:
    given = convolutions(opset=13)
    given.graph.node.add(op_type="Gelu", domain="com.microsoft", input=["y"], output=["z"])
    given.graph.output[0].name = "z"
    given.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    x = numbers(4, 3, 6, 6)
    try:
        made = quantized(given, tmp_path, data=x, bits=4)
    except UnsupportedModelError as error:
        assert "opset 13" in str(error)  # noqa: PT017
        assert "choose 8 bits" in str(error)  # noqa: PT017
    else:
        assert sqnr(run(given, x)[0], run(made.path, x)[0]) > 8


def test_samples_of_another_shape_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadArgumentError, match="onnxruntime failed on x 4x5x6x6 float32"):
        quantized(convolutions(), tmp_path, data=numbers(4, 5, 6, 6))


def test_a_quantized_file_is_not_quantized_again(tmp_path: Path) -> None:
    made = quantized(convolutions(), tmp_path, "weight_only")
    with pytest.raises(UnsupportedModelError, match="'first' is quantized already"):
        qvis.quantize(made.path, tmp_path / "again.onnx", "weight_only")


def test_gates_in_one_tensor_need_one_width(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"'lstm\.W\.i' and 'lstm\.W\.o' lie in one tensor, 'val_1'"):
        quantized(lstm(), tmp_path, "weight_only", bits={"*": 8, "lstm.W.i": 4})


def test_half_precision_is_refused(tmp_path: Path) -> None:
    node = helper.make_node("MatMul", ["x", "fc.weight"], ["y"])
    given = model([node], {"x": [1, 4]}, ["y"], **{"fc.weight": numbers(4, 4).astype(np.float16)})
    given.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    with pytest.raises(UnsupportedModelError, match="'fc' is stored as float16; give the model in float32"):
        quantized(given, tmp_path, "weight_only")
