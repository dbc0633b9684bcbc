"""Grids against the engines that have them: PyTorch and onnxruntime.

TensorFlow Lite is compared where its conversions are at hand, in test_adapters_tflite.py.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qvis.quantization.grids import Fitted, Scheme
from qvis.quantization.tables import float_levels


def weights_for_engines() -> np.ndarray:
    """With many numbers half-way between two codes."""
    rng = np.random.default_rng(5)
    weight = rng.normal(size=(4, 500)).astype(np.float32)
    weight[:, 250:] = rng.integers(-254, 255, size=(4, 250)) / 64
    weight[:, 0] = 127 / 32
    return weight


def at_halves(weight: np.ndarray, fitted: Fitted) -> np.ndarray:
    """Where float32 cannot tell on which side of the middle of two codes a number is."""
    codes = weight.astype(float) / fitted.scale
    return np.abs(np.abs(codes - np.rint(codes)) - 0.5) < 1e-4


@pytest.mark.parametrize("symmetric", [True, False])
def test_torch_rounds_to_the_same_numbers(symmetric: bool) -> None:
    import torch

    for weight in (weights_for_engines(), weights_for_engines() * np.float32(1.7)):
        for granularity in ("tensor", "channel"):
            fitted = Scheme(bits=8, granularity=granularity, symmetric=symmetric).fit(weight)
            scale = torch.from_numpy(fitted.scale.ravel().copy())
            zero = torch.from_numpy(fitted.zero_point.ravel().astype(np.int32))
            ends = (-127, 127) if symmetric else (0, 255)
            tensor = torch.from_numpy(weight)
            if granularity == "tensor":
                theirs = torch.fake_quantize_per_tensor_affine(tensor, scale, zero, *ends).numpy()
            else:
                theirs = torch.fake_quantize_per_channel_affine(tensor, scale, zero, 0, *ends).numpy()
            same = theirs == fitted.rounded()
            assert same[~at_halves(weight, fitted)].all()
            assert (np.abs(theirs - fitted.rounded()) <= 1.001 * fitted.scale).all()
            if symmetric and (fitted.scale == 1 / 32).all():  # where multiplying by 1 / scale is exact
                assert same.all()


def test_the_full_symmetric_range_is_that_of_torchs_observers() -> None:
    import torch

    weight = weights_for_engines()
    observer = torch.ao.quantization.MinMaxObserver(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric)
    observer(torch.from_numpy(weight))
    scale, zero = observer.calculate_qparams()
    fitted = Scheme(bits=8, granularity="tensor", narrow=False).fit(weight)
    np.testing.assert_allclose(fitted.scale, scale.numpy()[:, None], rtol=1e-6)
    assert zero == 0
    theirs = torch.fake_quantize_per_tensor_affine(torch.from_numpy(weight), float(fitted.scale[0, 0]), 0, -128, 127)
    assert (theirs.numpy() == fitted.rounded())[~at_halves(weight, fitted)].all()


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2"])
def test_small_floats_are_cast_as_by_torch(kind: str) -> None:
    import torch

    dtype = getattr(torch, kind)
    every = torch.arange(256, dtype=torch.uint8).view(dtype).to(torch.float32).numpy()
    finite = np.unique(every[np.isfinite(every)])
    np.testing.assert_array_equal(float_levels(kind), finite)
    halves = (finite[1:] + finite[:-1]) / 2
    near = np.concatenate(
        [finite, halves, np.nextafter(halves, np.float32(9e9)), np.nextafter(halves, np.float32(-9e9))]
    )
    values = np.concatenate([near, np.random.default_rng(0).normal(size=2000) * 30])[None].astype(np.float32)
    fitted = Scheme(kind, granularity="tensor").fit(values)
    assert fitted.scale == 1
    theirs = torch.from_numpy(values).to(dtype).to(torch.float32).numpy()
    np.testing.assert_array_equal(fitted.rounded(), theirs)


def quantize_with_onnx(weight: np.ndarray, fitted: Fitted, to: int, axis: int | None) -> np.ndarray:
    """What onnxruntime's QuantizeLinear and DequantizeLinear make of a weight."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    scale = fitted.scale.ravel() if axis is not None else fitted.scale.ravel()[0]
    zero = helper.make_tensor("zero", to, list(np.shape(scale)), fitted.zero_point.ravel().astype(int).tolist())
    attributes = {} if axis is None else {"axis": axis}
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], **attributes),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"], **attributes),
        ],
        "round",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(weight.shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, list(weight.shape))],
        [numpy_helper.from_array(np.asarray(scale, dtype=np.float32), "scale"), zero],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, {"x": weight})[0]
    return result


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize(
    ("scheme", "to"),
    [
        (Scheme(bits=8, narrow=False), "INT8"),
        (Scheme(bits=8), "INT8"),
        (Scheme(bits=8, symmetric=False), "UINT8"),
        (Scheme("float8_e4m3fn"), "FLOAT8E4M3FN"),
        (Scheme("float8_e5m2"), "FLOAT8E5M2"),
    ],
    ids=str,
)
def test_onnxruntime_rounds_to_the_same_numbers(scheme: Scheme, to: str, granularity: str) -> None:
    from onnx import TensorProto

    for weight in (weights_for_engines(), weights_for_engines() * np.float32(1.7)):
        fitted = replace(scheme, granularity=granularity).fit(weight)
        axis = 0 if granularity == "channel" else None
        theirs = quantize_with_onnx(weight, fitted, getattr(TensorProto, to), axis)
        np.testing.assert_array_equal(fitted.rounded(), theirs)
