"""ONNX Runtime as an engine: what it puts out, what its layers put out, and what it tells of a file."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

import qvis
from qvis import adapters
from qvis.errors import BadArgumentError, NotRunnableError
from qvis.quantization.contents import Arithmetic
from qvis.quantization.engines import inspect, open_engine
from qvis.running import Batch
from tests.onnx_models import digits, model, pictures, run, sqnr

RANDOM = np.random.default_rng(0)


def numbers(*shape: int) -> np.ndarray:
    return RANDOM.normal(size=shape).astype(np.float32)


def net(batch: int | str = "batch") -> onnx.ModelProto:
    """A convolution, what follows it, and a result that is a class."""
    nodes = [
        helper.make_node("Conv", ["x", "conv.weight"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("GlobalAveragePool", ["b"], ["c"]),
        helper.make_node("Flatten", ["c"], ["d"]),
        helper.make_node("MatMul", ["d", "fc.weight"], ["e"]),
        helper.make_node("Add", ["e", "bias"], ["scores"]),
        helper.make_node("ArgMax", ["scores"], ["best"], axis=1, keepdims=0),
        helper.make_node("Equal", ["best", "zero"], ["none"]),
    ]
    tensors = {"conv.weight": numbers(8, 2, 3, 3), "fc.weight": numbers(8, 5), "bias": numbers(5), "zero": np.array(0)}
    return model(nodes, {"x": [batch, 2, 6, 6]}, ["scores", "best", "none"], **tensors)


def test_it_puts_out_what_onnxruntime_does_as_floats() -> None:
    given, x = net(), numbers(7, 2, 6, 6)
    engine = open_engine(given, threads=1)
    assert engine.name == f"onnxruntime {onnxruntime.__version__}"
    assert engine.simulated == ""
    scores, best = engine.run(Batch((x.astype(np.float64),), size=7))
    exact = run(given, x)
    np.testing.assert_allclose(scores, exact[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(best, exact[1])
    assert best.dtype == np.float32
    np.testing.assert_array_equal(engine.run(Batch((), {"x": x}, size=7))[0], scores)


def test_what_is_prepared_runs_without_more_ado() -> None:
    engine = open_engine(net())
    call = engine.prepare(Batch((numbers(3, 2, 6, 6),), size=3))
    call()
    call()
    with pytest.raises(BadArgumentError, match="onnxruntime failed on x 3x4x6x6"):
        engine.prepare(Batch((numbers(3, 4, 6, 6),), size=3))
    with pytest.raises(BadArgumentError, match="got one called 'z', the model takes x"):
        engine.run(Batch((), {"z": numbers(3, 2, 6, 6)}, size=3))


def test_a_fixed_number_of_samples_is_told() -> None:
    assert open_engine(net()).fixed_batch is None
    assert open_engine(net(4)).fixed_batch == 4
    node = helper.make_node("Add", ["x", "offset"], ["y"])
    assert open_engine(model([node], {"x": ["batch", 3], "offset": [1, 3]}, ["y"])).fixed_batch is None


def test_layers_of_a_float_model_are_seen_with_their_biases() -> None:
    given, x = net(), numbers(4, 2, 6, 6)
    seen = open_engine(given).look(Batch((x,), size=4))
    assert set(seen) == {"conv", "fc"}
    given.graph.output.append(onnx.ValueInfoProto(name="a"))
    exact = run(given, x)
    np.testing.assert_allclose(seen["conv"].values, exact[3], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(seen["fc"].values, exact[0], rtol=1e-4, atol=1e-5)
    assert (seen["conv"].axis, seen["fc"].axis) == (1, -1)
    assert {one.activation for one in seen.values()} == {""}


def test_layers_of_a_quantized_file_are_seen_as_floats_with_what_was_fused(tmp_path: Path) -> None:
    x = pictures()[0][:32]
    for method in ("post_training", "weight_only", "dynamic"):
        data = {"calibration_data": x} if method == "post_training" else {}
        made = qvis.quantize(digits(), tmp_path / "digits.onnx", method, **data)
        exact = open_engine(digits()).look(Batch((x,), size=32))
        found = open_engine(made.path).look(Batch((x,), size=32))
        assert set(found) == set(exact) == {layer.name for layer in adapters.read(made.path).layers}
        for name, one in found.items():
            value = exact[name].values
            assert sqnr(np.maximum(value, 0) if one.activation else value, one.values) > 20
        fused = {name for name, one in found.items() if one.activation == "relu"}
        expected = {
            name for name in found if name.endswith(("expand", "depthwise")) or name in ("stem.conv", "head.conv")
        }
        assert fused == (expected if method == "post_training" else set())
        if method == "post_training":  # the same numbers as without a look
            scores = open_engine(made.path).run(Batch((x,), size=32))[0]
            np.testing.assert_allclose(found["classifier"].values, scores, atol=1e-5)


def test_relu6_is_told_from_relu(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "conv.weight"], ["a"]),
        helper.make_node("Clip", ["a", "low", "high"], ["b"]),
        helper.make_node("Conv", ["b", "next.weight"], ["y"]),
    ]
    tensors = {"conv.weight": 4 * numbers(6, 2, 1, 1), "next.weight": numbers(3, 6, 1, 1)}
    ends = {"low": np.array(0, np.float32), "high": np.array(6, np.float32)}
    x = numbers(32, 2, 4, 4)
    given = model(nodes, {"x": ["batch", 2, 4, 4]}, ["y"], **tensors, **ends)
    made = qvis.quantize(given, tmp_path / "q.onnx", calibration_data=x)
    seen = open_engine(made.path).look(Batch((x,), size=32))
    assert (seen["conv"].activation, seen["next"].activation) == ("relu6", "")


def test_bytes_are_counted_by_type_and_each_once(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(net(), path)
    assert inspect(path).bytes_by_type == {"float32": 4 * (8 * 2 * 9 + 8 * 5 + 5), "int64": 8}
    made = qvis.quantize(path, tmp_path / "q.onnx", "weight_only", bits={"conv": 4, "fc": 8})
    kinds = made.contents.bytes_by_type
    assert kinds == {"int4": 8 * 2 * 9 // 2, "int8": 8 * 5, "float32": 4 * (8 + 5 + 5), "int64": 8}
    assert made.contents.file_bytes == made.path.stat().st_size


def test_numbers_beside_the_file_count_as_its_own(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(net(), path, save_as_external_data=True, location="net.data", size_threshold=100)
    found = inspect(path)
    assert found.bytes_by_type["float32"] == 4 * (8 * 2 * 9 + 8 * 5 + 5)
    assert found.file_bytes == path.stat().st_size + (tmp_path / "net.data").stat().st_size


def test_arithmetic_is_what_onnxruntime_makes_of_the_graph(tmp_path: Path) -> None:
    x = numbers(16, 2, 6, 6)

    def arithmetic(method: str) -> dict[str, Arithmetic]:
        data = {"calibration_data": x} if method == "post_training" else {}
        made = qvis.quantize(net(), tmp_path / "q.onnx", method, **data)
        return {one.layer: one.arithmetic for one in made.contents.operations if one.layer}

    assert arithmetic("post_training") == dict.fromkeys(("conv", "fc"), Arithmetic.INTEGER)
    assert arithmetic("weight_only") == dict.fromkeys(("conv", "fc"), Arithmetic.HYBRID)
    assert arithmetic("dynamic") == {"conv": Arithmetic.FLOAT, "fc": Arithmetic.HYBRID}


def test_operations_on_shapes_compute_nothing(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Mul", ["shape", "two"], ["twice"]),
        helper.make_node("Expand", ["x", "twice"], ["wide"]),
        helper.make_node("Relu", ["wide"], ["y"]),
    ]
    path = tmp_path / "net.onnx"
    onnx.save(model(nodes, {"x": ["batch", 1]}, ["y"], two=np.array([1, 2])), path)
    assert [(one.kind, one.arithmetic) for one in inspect(path).computing] == [("Relu", Arithmetic.FLOAT)]


def test_weights_that_become_floats_in_each_call_are_named(tmp_path: Path) -> None:
    for exclude, more in ((), False), ("fc", True):
        made = qvis.quantize(net(), tmp_path / "q.onnx", "weight_only", exclude=exclude)
        (note,) = made.contents.notes
        assert note.startswith("conv: integers in the file alone")
        # which would cost the product its integers
        assert ("session.disable_quant_qdq=1" in note) == more


def test_what_is_missing_or_broken_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    with pytest.raises(NotRunnableError, match="onnxruntime cannot load it"):
        open_engine(broken)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(NotRunnableError, match=r"onnxruntime is not installed; run: pip install 'qvis\[onnx\]'"):
        open_engine(net())
