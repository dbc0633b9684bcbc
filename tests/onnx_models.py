"""ONNX models that tests share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from qvis.adapters.digits import load_digits_model
from qvis.adapters.torch.graph import _quiet


@cache
def digits_bytes() -> bytes:
    """The model that comes with qvis, exported, for batches of any size."""
    example = torch.zeros(2, 1, 8, 8)
    with _quiet():
        program = torch.onnx.export(
            load_digits_model(),
            (example,),
            dynamo=True,
            verbose=False,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    assert program is not None
    found: bytes = program.model_proto.SerializeToString()
    return found


def digits() -> onnx.ModelProto:
    """The same as a message of one's own."""
    return onnx.ModelProto.FromString(digits_bytes())


@cache
def pictures() -> tuple[np.ndarray, np.ndarray]:
    """All of scikit-learn's digits, as the model takes them, and what they show."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return (data.images[:, None] / 16).astype(np.float32), data.target


def model(
    nodes: Sequence[Any],
    inputs: Mapping[str, Any],
    outputs: Sequence[str],
    opset: int = 20,
    ir_version: int = 10,
    **tensors: np.ndarray,
) -> onnx.ModelProto:
    """A model of few nodes; inputs by name with their shapes, of floats but for ``ids``."""
    given = [
        helper.make_tensor_value_info(name, TensorProto.INT64 if name == "ids" else TensorProto.FLOAT, shape)
        for name, shape in inputs.items()
    ]
    results = [onnx.ValueInfoProto(name=name) for name in outputs]
    held = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    graph = helper.make_graph(list(nodes), "net", given, results, held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


def run(given: Any, *arrays: np.ndarray) -> list[np.ndarray]:
    """What ONNX Runtime computes with its own settings."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    what = given.SerializeToString() if isinstance(given, onnx.ModelProto) else str(given)
    session = onnxruntime.InferenceSession(what, options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    return list(session.run(None, dict(zip(names, arrays, strict=True))))


def sqnr(exact: np.ndarray, found: np.ndarray) -> float:
    """In dB."""
    if np.array_equal(exact, found):
        return float("inf")
    return float(10 * np.log10(np.square(exact).sum() / np.square(exact - found).sum()))
