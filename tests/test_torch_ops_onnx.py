"""ONNX's operators in PyTorch give what onnxruntime gives, one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from qvis.adapters.onnx.autograd import Differentiator
from qvis.adapters.onnx.prepared import prepare
from qvis.adapters.onnx.sessions import session
from qvis.errors import NotRunnableError

pytest.importorskip("onnxruntime")


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype("f4")


IMAGE = numbers(2, 4, 7, 6)
ROW = numbers(2, 4, 9)
TABLE = numbers(3, 5)
AXES = np.array([1])


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


CASES: list[tuple[str, list[Any], dict[str, Any], int]] = [
    ("Conv", [IMAGE, numbers(6, 2, 3, 2), numbers(6)], {"group": 2, "pads": [1, 0, 2, 1], "strides": [2, 1]}, 17),
    ("Conv", [IMAGE, numbers(3, 4, 3, 3)], {"auto_pad": "SAME_UPPER", "strides": [2, 3]}, 17),
    ("Conv", [IMAGE, numbers(3, 4, 2, 3)], {"auto_pad": "SAME_LOWER", "strides": [2, 3]}, 17),
    ("Conv", [IMAGE, numbers(3, 4, 3, 3)], {"auto_pad": "VALID", "dilations": [2, 1]}, 17),
    ("Conv", [ROW, numbers(3, 4, 3)], {}, 11),
    ("ConvTranspose", [IMAGE, numbers(4, 3, 3, 2), numbers(6)],
     {"group": 2, "strides": [2, 2], "pads": [1, 0, 0, 1]}, 17),
    ("ConvTranspose", [IMAGE, numbers(4, 3, 3, 3)], {"strides": [2, 2], "output_padding": [1, 1], "pads": [1] * 4}, 17),
    ("ConvTranspose", [IMAGE, numbers(4, 3, 3, 3)], {"strides": [2, 2], "output_shape": [14, 12]}, 17),
    ("ConvTranspose", [IMAGE, numbers(4, 3, 3, 3)], {"strides": [2, 2], "auto_pad": "SAME_UPPER"}, 17),
    ("ConvTranspose", [ROW, numbers(4, 3, 3)], {"dilations": [2]}, 17),
    ("MaxPool", [IMAGE], {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 1, 1]}, 17),
    ("MaxPool", [IMAGE], {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}, 17),
    ("MaxPool", [IMAGE], {"kernel_shape": [2, 2], "strides": [2, 2], "auto_pad": "SAME_UPPER"}, 17),
    ("MaxPool", [IMAGE], {"kernel_shape": [2, 2], "dilations": [2, 3]}, 17),
    ("AveragePool", [IMAGE], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1] * 4}, 17),
    ("AveragePool", [IMAGE], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1] * 4, "count_include_pad": 1}, 17),
    ("AveragePool", [IMAGE], {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}, 19),
    ("GlobalAveragePool", [IMAGE], {}, 17),
    ("GlobalMaxPool", [IMAGE], {}, 17),
    ("Gemm", [TABLE, numbers(4, 5), numbers(4)], {"transB": 1, "alpha": 0.5, "beta": 2.0}, 17),
    ("Gemm", [TABLE, numbers(3, 4)], {"transA": 1}, 17),
    ("BatchNormalization", [IMAGE, numbers(4), numbers(4), numbers(4), np.abs(numbers(4))], {"epsilon": 0.01}, 17),
    ("LayerNormalization", [IMAGE, numbers(7, 6), numbers(7, 6)], {"axis": 2}, 17),
    ("LayerNormalization", [ROW, numbers(9)], {"epsilon": 0.1}, 17),
    ("RMSNormalization", [ROW, numbers(9)], {}, 23),
    ("InstanceNormalization", [IMAGE, numbers(4), numbers(4)], {}, 17),
    ("GroupNormalization", [IMAGE, numbers(4), numbers(4)], {"num_groups": 2}, 21),
    ("LRN", [IMAGE], {"size": 3, "alpha": 0.5}, 17),
    ("Softmax", [IMAGE], {"axis": 1}, 17),
    ("Softmax", [IMAGE], {"axis": 2}, 11),
    ("LogSoftmax", [ROW], {}, 17),
    ("Gelu", [ROW], {}, 20),
    ("Gelu", [ROW], {"approximate": "tanh"}, 20),
    *((op, [ROW], {}, 17) for op in ("Relu", "LeakyRelu", "Elu", "Selu", "Sigmoid", "HardSigmoid", "Tanh", "Erf")),
    *((op, [ROW], {}, 18) for op in ("Exp", "Floor", "Ceil", "Round", "Neg", "Abs", "Softplus", "Softsign", "Mish")),
    *((op, [np.abs(ROW)], {}, 17) for op in ("Sqrt", "Log", "Reciprocal", "HardSwish", "Identity", "ThresholdedRelu")),
    ("PRelu", [IMAGE, numbers(4, 1, 1)], {}, 17),
    ("Clip", [ROW, floats(-0.5).reshape(()), floats(0.25).reshape(())], {}, 17),
    ("Clip", [ROW, None, floats(0.25).reshape(())], {}, 17),
    ("Clip", [ROW], {"min": 0.0, "max": 0.5}, 6),
    ("Clip", [ROW], {}, 17),
    *((op, [IMAGE, numbers(6)], {}, 17) for op in ("Add", "Sub", "Mul", "Div", "Max", "Min")),
    *((op, [TABLE, TABLE[:, :1], TABLE * 2], {}, 17) for op in ("Sum", "Mean", "Max")),
    ("Div", [ints(7, -7, 9), ints(2, 2, -4)], {}, 17),
    ("Pow", [np.abs(ROW), floats(0.5).reshape(())], {}, 17),
    ("Pow", [ROW, ints(2).reshape(())], {}, 17),
    ("Mod", [ints(7, -7), ints(4, 4)], {}, 17),
    ("Mod", [ROW, numbers(9)], {"fmod": 1}, 17),
    *((op, [ROW], {"axes": [1, -1]}, 17) for op in ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceL2")),
    *((op, [ROW, ints(-1)], {"keepdims": 0}, 18) for op in ("ReduceSum", "ReduceMean", "ReduceSumSquare", "ReduceMax")),
    ("ReduceSum", [ROW], {}, 17),
    ("ReduceSum", [ROW], {"noop_with_empty_axes": 1}, 17),
    ("ArgMax", [ROW], {"axis": 1, "keepdims": 0}, 17),
    ("Reshape", [IMAGE, ints(0, -1, 6)], {}, 17),
    ("Flatten", [IMAGE], {"axis": 2}, 17),
    ("Flatten", [IMAGE], {"axis": -1}, 17),
    ("Squeeze", [numbers(1, 3, 1)], {}, 17),
    ("Squeeze", [numbers(1, 3, 1), ints(-1)], {}, 17),
    ("Unsqueeze", [TABLE, ints(0, -1)], {}, 17),
    ("Unsqueeze", [TABLE], {"axes": [1]}, 11),
    ("Transpose", [IMAGE], {}, 17),
    ("Transpose", [IMAGE], {"perm": [0, 2, 3, 1]}, 17),
    ("Slice", [IMAGE, ints(-1, 1), ints(-9, 2**40), ints(2, 3), ints(-2, 1)], {}, 17),
    ("Slice", [IMAGE], {"starts": [1], "ends": [-1], "axes": [1]}, 9),
    ("Gather", [TABLE, ints(0, -1).reshape(2, 1)], {"axis": 1}, 17),
    ("Gather", [TABLE, ints(2).reshape(())], {}, 17),
    ("GatherElements", [TABLE, ints(0, -1, 2).reshape(3, 1)], {"axis": 1}, 17),
    ("Expand", [numbers(3, 1), ints(2, 1, 4)], {}, 17),
    ("Tile", [TABLE, ints(2, 1)], {}, 17),
    ("Shape", [IMAGE], {"start": 1, "end": -1}, 17),
    ("Size", [IMAGE], {}, 17),
    ("Concat", [TABLE, TABLE], {"axis": -1}, 17),
    ("CumSum", [TABLE, ints(1).reshape(())], {}, 17),
    ("Where", [TABLE > 0, TABLE, numbers(5)], {}, 17),
    ("Einsum", [TABLE, numbers(5, 2)], {"equation": "ij,jk->ki"}, 17),
    ("Trilu", [TABLE, ints(1).reshape(())], {"upper": 0}, 17),
    ("Cast", [ROW], {"to": TensorProto.INT32}, 17),
    ("Range", [ints(1).reshape(()), ints(9).reshape(()), ints(3).reshape(())], {}, 17),
    ("ConstantOfShape", [ints(2, 3)], {}, 17),
    ("Pad", [IMAGE, ints(0, 0, 1, 2, 0, 0, -1, 1), floats(3).reshape(())], {}, 17),
    ("Pad", [IMAGE, ints(1, 2, 0, 1), None, ints(2, 3)], {}, 18),
    *(("Pad", [IMAGE, ints(0, 0, 1, 2, 0, 0, 1, 1)], {"mode": mode}, 19) for mode in ("reflect", "edge", "wrap")),
    ("DepthToSpace", [IMAGE], {"blocksize": 2}, 17),
    ("DepthToSpace", [IMAGE], {"blocksize": 2, "mode": "CRD"}, 17),
    ("Resize", [IMAGE, None, floats(1, 1, 2, 2)], {"mode": "nearest"}, 17),
    ("Resize", [IMAGE, None, None, ints(2, 4, 10, 3)], {"mode": "linear"}, 17),
    *(
        ("Resize", [IMAGE, None, floats(1, 1, 1.5, 2)],
         {"nearest_mode": mode, "coordinate_transformation_mode": place}, 17)
        for mode in ("floor", "ceil", "round_prefer_ceil")
        for place in ("asymmetric", "half_pixel", "align_corners")
    ),
    ("Resize", [IMAGE, None, floats(1, 1, 2, 2)],
     {"mode": "linear", "coordinate_transformation_mode": "align_corners"}, 17),
    ("Upsample", [IMAGE, floats(1, 1, 2, 3)], {"mode": "nearest"}, 9),
    ("Attention", [numbers(2, 2, 3, 4), numbers(2, 2, 5, 4), numbers(2, 2, 5, 4)], {}, 23),
]  # fmt: skip


def build(op: str, inputs: list[Any], attributes: dict[str, Any], opset: int, results: int = 1) -> Any:
    """A model of one node, all of whose inputs are given."""
    names = [f"x{i}" if array is not None else "" for i, array in enumerate(inputs)]
    kinds = [(name, array) for name, array in zip(names, inputs, strict=True) if name]
    infos = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in kinds
    ]
    outputs = [f"y{i}" for i in range(results)]
    node = helper.make_node(op, names, outputs, **attributes)
    shown = [onnx.ValueInfoProto(name=name) for name in outputs]
    model = helper.make_model(
        helper.make_graph([node], "one", infos, shown), opset_imports=[helper.make_opsetid("", opset)]
    )
    return prepare(model, NotRunnableError), dict(kinds), outputs


def compare(op: str, inputs: list[Any], attributes: dict[str, Any], opset: int, results: int = 1) -> None:
    prepared, feeds, outputs = build(op, inputs, attributes, opset, results)
    found = Differentiator(prepared, [], [])
    assert not found.missing
    theirs = session(prepared.model).run(outputs, feeds)
    for one, other in zip(found.forward(feeds, {}, outputs), theirs, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("op", "inputs", "attributes", "opset"), CASES, ids=lambda one: one if type(one) is str else ""
)
def test_an_operator_gives_what_onnxruntime_gives(
    op: str, inputs: list[Any], attributes: dict[str, Any], opset: int
) -> None:
    compare(op, inputs, attributes, opset)


def test_a_split_gives_all_its_parts() -> None:
    compare("Split", [IMAGE, ints(1, 3)], {"axis": 1}, 17, 2)
    compare("Split", [IMAGE], {"axis": 2, "num_outputs": 3}, 18, 3)


def test_an_operator_without_a_rule_is_named() -> None:
    prepared, _, _ = build("NonZero", [TABLE], {}, 17)
    assert Differentiator(prepared, [], []).missing == ["NonZero"]
