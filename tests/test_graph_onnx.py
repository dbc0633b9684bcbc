"""How data flows through ONNX models, in the words of ``qvis.layers.OPS``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qvis.adapters import onnx as adapter
from qvis.errors import NoGraphError
from qvis.layers import OPS, Graph, Node
from qvis.running import Batch
from tests.test_adapters_onnx import graph, node, weights
from tests.test_runner_onnx import EXAMPLES, Convolutions, Encoder, exported, module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("graph")


def of(model: Any, *shape: int) -> Graph:
    """The graph of a model; with sizes, for an input of them."""
    found = adapter.graph(model, Batch((np.zeros(shape, "f4"),), size=shape[0]) if shape else None)
    seen: set[str] = set()
    for one in found.nodes:
        assert seen.issuperset(one.inputs), "a node comes before one that it takes from"
        assert one.name not in seen
        seen.add(one.name)
    return found


def single(model: Any, *shape: int) -> Node:
    """The only node between an input and an output."""
    given, *found, output = of(model, *shape).nodes
    assert (given.op, output.op, len(found)) == ("input", "output", 1)
    return found[0]


def test_layers_are_called_as_the_network_calls_them_and_numbered_on_further_use(folder: Path) -> None:
    path = exported(Convolutions, folder, dynamo=False, folded=False)
    found = of(path, 4, 3, 6, 6)
    names = {layer.name for layer in adapter.read(path).layers}
    assert set(found.calls) == names
    assert [one.name for one in found.calls["grouped"]] == ["grouped", "grouped@2"]
    grouped = found.by_name["grouped"]
    assert grouped.attributes == {"groups": 4, "padding": True, "channel_axis": 1, "bias": False}
    assert grouped.shape == (4, 8, 6, 6)
    assert found.by_name["up"].attributes == {"groups": 2, "channel_axis": 1, "bias": True}
    assert found.by_name["head"].op == "linear"
    own = {one.name for one in onnx.load(str(path)).graph.node}
    assert all(one.original in own for one in found.nodes if one.op not in ("input", "output"))


def test_the_numbers_of_a_normalization_are_those_of_its_module(folder: Path) -> None:
    found = of(exported(Convolutions, folder, dynamo=False, folded=False))
    norm, model = found.norms["norm"], module(Convolutions).norm
    assert found.by_name["norm"].op == "batch_norm"
    assert found.by_name["norm"].inputs == ("stem",)
    for ours, theirs in zip(
        (norm.mean, norm.variance, norm.scale, norm.shift),
        (model.running_mean, model.running_var, model.weight, model.bias),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs.detach())
    assert norm.epsilon == pytest.approx(model.eps)


def test_a_normalization_that_was_folded_is_not_there(folder: Path) -> None:
    found = of(exported(Convolutions, folder), 4, 3, 6, 6)
    assert not found.norms
    assert [one.op for one in found.users["stem"]] == ["clip"]
    assert found.users["stem"][0].attributes == {"low": 0.0, "high": 6.0}


def test_an_encoder_is_made_of_known_words(folder: Path) -> None:
    found = of(exported(Encoder, folder), *EXAMPLES[Encoder].shape)
    assert {one.op for one in found.nodes} <= set(OPS)
    assert found.by_name["tokens"].op == "embedding"
    norms = [one for one in found.nodes if one.op == "layer_norm"]
    assert [one.attributes for one in norms] == [{"axes": (2,), "scale": True, "shift": True}] * 2
    second = next(one for one in found.nodes if one.layer == "layer.linear2")
    (bias,) = found.users[second.name]
    assert (bias.op, bias.attributes) == ("add", {"constant": True, "bias_of": "layer.linear2", "axis": -1})
    (residual,) = found.users[bias.name]
    assert (residual.op, residual.attributes, len(residual.inputs)) == ("add", {"constant": False}, 2)


def open_size(name: str) -> Any:
    return onnx.TensorShapeProto.Dimension(dim_param=name)


def numbered(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def slicing(start: int, end: int, axis: int) -> dict[str, np.ndarray]:
    return {"a": np.array([start]), "b": np.array([end]), "c": np.array([axis])}


CASES: list[tuple[str, str, dict[str, Any], dict[str, Any], str, dict[str, Any]]] = [
    ("Relu", "x", {}, {}, "relu", {}),
    ("LeakyRelu", "x", {"alpha": 0.25}, {}, "leaky_relu", {"slope": 0.25}),
    ("Clip", "x low high", {}, {"low": np.float32(-1), "high": np.float32(1)}, "clip", {"low": -1.0, "high": 1.0}),
    ("Clip", "x low", {}, {"low": np.float32(0)}, "relu", {}),
    ("Gemm", "x w", {}, {"w": weights(3, 5)}, "linear", {"channel_axis": 1, "bias": False}),
    ("MatMul", "x w", {}, {"w": weights(3, 5)}, "linear", {"channel_axis": 1, "bias": False}),
    ("MatMul", "w x", {}, {"w": weights(4, 2)}, "matmul", {"channel_axis": 0}),
    ("Mul", "x s", {}, {"s": numbered(2)}, "mul", {"constant": True}),
    ("Add", "x x", {}, {}, "add", {"constant": False}),
    ("Concat", "x x", {"axis": -1}, {}, "concat", {"axis": -1, "constant": False}),
    ("Transpose", "x", {}, {}, "transpose", {"axes": (1, 0)}),
    ("Gather", "x i", {"axis": 1}, {"i": np.array(1)}, "split", {"axis": 1, "start": 1, "step": 1}),
    ("Slice", "x a b c", {}, slicing(0, 1, -1), "split", {"axis": -1, "start": 0, "step": 1}),
    ("Slice", "x a b c", {}, slicing(-2, 9, 1), "split", {"axis": 1, "start": 1, "step": 1}),
    ("Slice", "x a b c", {}, slicing(-9, 2**62, 1), "identity", {}),
    ("Slice", "x a b c d", {}, slicing(0, 9, 1) | {"d": np.array([2])}, "split", {"axis": 1, "start": 0, "step": 2}),
    ("Slice", "x a b", {}, {"a": np.array([1, 1]), "b": np.array([2, 2])}, "split", {"axis": None}),
    ("Slice", "x a b", {}, {"a": np.array([0, 1]), "b": np.array([2, 2])}, "split", {"axis": 1, "start": 1, "step": 1}),
    ("Gather", "x i", {"axis": 1}, {"i": np.array([1, 2])}, "split", {"axis": 1, "start": 1, "step": 1}),
    ("Gather", "x i", {"axis": 1}, {"i": np.array([2, 1])}, "split", {"axis": 1}),
    ("Gather", "x i", {"axis": 1}, {"i": np.array([-1, 0])}, "split", {"axis": 1}),
    ("Pad", "x p v", {}, {"p": np.zeros(4, "i8"), "v": np.float32(2)}, "pad", {"value": 2.0}),
    ("Pad", "x p", {"mode": "edge"}, {"p": np.zeros(4, "i8")}, "pad", {"value": None}),
    ("Flatten", "x", {}, {}, "flatten", {"start": 1}),
    ("Reshape", "x s", {}, {"s": np.array([3, 2])}, "reshape", {}),
    ("Cast", "x", {"to": 10}, {}, "identity", {}),
    ("Cast", "x", {"to": 7}, {}, "Cast", {}),
    ("Expand", "x s", {}, {"s": np.array([2, 3])}, "resize", {}),
    ("Expand", "x s", {}, {"s": np.array([4, 2, 3])}, "Expand", {}),
    ("Neg", "x", {}, {}, "mul", {"constant": True}),
    ("Max", "x s", {}, {"s": np.float32(0)}, "relu", {}),
    ("Max", "s x", {}, {"s": numbered(2)}, "clip", {"low": 2.0, "high": None}),
    ("Max", "x s", {}, {"s": numbered(2, 3, 4)}, "Max", {}),
    ("Min", "x s", {}, {"s": numbered(6)}, "clip", {"low": None, "high": 6.0}),
    ("Mul", "x s", {}, {"s": numbered(2, 3, 4)}, "mul", {"constant": True, "axis": -1}),
    ("Add", "s x", {}, {"s": weights(2, 1)}, "add", {"constant": True, "axis": -2}),
    ("Sub", "s x", {}, {"s": weights(2, 3)}, "sub", {"constant": True}),
    ("Div", "x s", {}, {"s": numbered(2, 3, 4)}, "mul", {"constant": True}),
    ("Div", "s x", {}, {"s": numbered(2, 3, 4)}, "div", {"constant": True}),
    ("Einsum", "x w", {"equation": "ab,bc->ac"}, {"w": weights(3, 5)}, "linear", {"channel_axis": 1, "bias": False}),
    ("Einsum", "x w", {"equation": "ab,cb->ac"}, {"w": weights(5, 3)}, "linear", {"channel_axis": 1, "bias": False}),
    ("Einsum", "x w", {"equation": "ab,ac->cb"}, {"w": weights(2, 5)}, "matmul", {"channel_axis": 1}),
    (
        "RMSNormalization",
        "x s",
        {},
        {"s": numbered(1, 2, 3)},
        "rms_norm",
        {"axes": (1,), "scale": True, "shift": False},
    ),
    ("Resize", "x - s", {}, {"s": numbered(2, 2)}, "resize", {}),
    ("Sign", "x", {}, {}, "Sign", {}),
    ("ReduceMean", "x a", {}, {"a": np.array([1])}, "ReduceMean", {}),
]


@pytest.mark.parametrize(("op", "inputs", "given", "constants", "word", "attributes"), CASES)
def test_a_node_gets_its_word(
    op: str, inputs: str, given: dict[str, Any], constants: dict[str, Any], word: str, attributes: dict[str, Any]
) -> None:
    model = graph(node(op, inputs, name="own", **given), **constants)
    model.graph.input[0].type.tensor_type.shape.dim.extend([open_size("n"), open_size("m")])
    found = single(model, 2, 3)
    assert (found.op, dict(found.attributes), found.original) == (word, attributes, "own")


def test_slopes_are_listed() -> None:
    found = single(graph(node("PRelu", "x s"), s=weights(3, 1, 1)))
    assert found.op == "prelu"
    assert found.attributes["slopes"].shape == (3,)


def test_a_mean_over_space_is_a_pool_and_one_over_channels_is_not() -> None:
    def model(*axes: int) -> Any:
        made = graph(
            node("Conv", "x weight", output="h"),
            node("ReduceMean", "h a"),
            weight=weights(4, 3, 1, 1),
            a=np.array(axes),
        )
        made.graph.input[0].type.tensor_type.shape.dim.extend([open_size(name) for name in "nchw"])
        return made

    assert of(model(2, 3), 2, 3, 5, 5).nodes[2].op == "avg_pool"
    assert of(model(1), 2, 3, 5, 5).nodes[2].op == "ReduceMean"
    largest = model(2, 3)
    largest.graph.node[1].op_type = "ReduceMax"
    assert of(largest, 2, 3, 5, 5).nodes[2].op == "max_pool"


def test_integers_are_not_clipped_like_real_numbers() -> None:
    model = graph(node("Cast", "x", output="i", to=7), node("Clip", "i a b"), a=np.array(0), b=np.array(6))
    assert [one.op for one in of(model).nodes] == ["input", "Cast", "Clip", "output"]


def test_shapes_that_are_computed_are_no_data() -> None:
    model = graph(
        node("Shape", "x", output="s"),
        node("Gather", "s zero", output="n"),
        node("Concat", "n rest", output="wanted", axis=0),
        node("Reshape", "x wanted"),
        zero=np.array([0]),
        rest=np.array([-1]),
    )
    assert single(model).op == "reshape"


def test_parts_of_a_split_are_nodes_of_their_own() -> None:
    split = helper.make_node("Split", ["x"], ["a", "b"], name="cut", axis=1, num_outputs=2)
    found = of(graph(split, node("Add", "a b")))
    assert [(one.op, one.original) for one in found.nodes[1:3]] == [("split", "cut")] * 2
    assert len(set(found.nodes[3].inputs)) == 2


@pytest.mark.parametrize(
    ("given", "constants", "starts"),
    [
        ({"num_outputs": 3}, {}, [0, 2, 4]),
        ({}, {"sizes": np.array([1, 3, 1])}, [0, 1, 4]),
    ],
)
def test_parts_of_a_split_say_where_they_begin(given: dict[str, Any], constants: Any, starts: list[int]) -> None:
    names = ["x", *constants]
    model = graph(helper.make_node("Split", names, ["a", "b", "c"], axis=1, **given), node("Sum", "a b c"), **constants)
    found = of(model, 2, 5).nodes[1:4]
    assert [one.attributes for one in found] == [{"axis": 1, "start": start, "step": 1} for start in starts]


def test_indices_masks_and_statistics_are_no_such_results() -> None:
    found = of(
        graph(
            helper.make_node("MaxPool", ["x"], ["a", "b"], kernel_shape=[2]),
            helper.make_node("LayerNormalization", ["a", "s"], ["c", "d", "e"]),
            node("Cast", "b", output="f", to=1),
            node("Sum", "c d f"),
            s=numbered(1, 1, 1),
        ),
        1, 2, 4,
    )  # fmt: skip
    words = [one.op for one in found.nodes]
    assert words == ["input", "max_pool", "MaxPool", "layer_norm", "LayerNormalization", "identity", "add", "output"]


def test_a_clip_in_two_halves_is_a_clip() -> None:
    found = of(graph(node("Max", "x low", output="a"), node("Min", "high a"), low=np.float32(0), high=numbered(6)))
    assert [(one.op, dict(one.attributes)) for one in found.nodes[1:3]] == [
        ("relu", {}),
        ("clip", {"low": 0.0, "high": 6.0}),
    ]


def test_factors_of_whole_groups_are_none_of_channels() -> None:
    model = graph(node("GroupNormalization", "x s s", num_groups=2), s=numbered(1, 2))
    assert single(model).attributes == {"channel_axis": 1, "scale": True, "shift": True}
    model.opset_import[0].version = 20
    assert single(model).attributes == {"channel_axis": 1, "scale": False, "shift": False}
    model = graph(node("InstanceNormalization", "x s s"), s=numbered(1, 2))
    assert single(model).op == "group_norm"


def test_attention_needs_query_key_and_value_and_no_cache() -> None:
    plain = graph(node("Attention", "q k v"), inputs=("q", "k", "v"))
    assert of(plain).nodes[3].op == "attention"
    masked = graph(node("Attention", "q k v m"), inputs=("q", "k", "v"), m=np.zeros((2, 2), np.float32))
    assert of(masked).nodes[3].op == "attention"
    for given in ("q k v - p p", "q w v"):
        other = graph(node("Attention", given), inputs=("q", "v", "p", "k"), w=weights(1, 2, 3, 4))
        assert next(one for one in of(other).nodes if one.op not in ("input", "output")).op == "Attention"


def test_operators_of_others_are_named_with_their_domain_and_the_layers_that_they_use() -> None:
    model = graph(
        node("Attention", "x w b", domain="com.microsoft", num_heads=2), w=weights(4, 12), b=numbered(*range(12))
    )
    found = single(model)
    assert found.op == "com.microsoft.Attention"
    assert set(found.attributes["layers"]) == {layer.name for layer in adapter.read(model).layers}
    fused = graph(node("FusedConv", "x w", domain="com.microsoft", activation="Sigmoid"), w=weights(4, 2, 3, 3))
    assert (single(fused).op, single(fused).layer) == ("com.microsoft.FusedConv", "")
    fused = graph(node("FusedConv", "x w", domain="com.microsoft", activation="Relu"), w=weights(4, 2, 3, 3))
    assert (single(fused).op, single(fused).layer) == ("conv", "w")
    assert single(graph(node("Relu", "x", domain="own"))).op == "own.Relu"


# ---------------------------------------------------------------------------------------------------------------------
# Biases that Add nodes add


def dense(*between: Any, add: str = "h b", **constants: Any) -> Any:
    """A product and what may be its bias."""
    return graph(node("MatMul", "x w", output="h"), *between, node("Add", add), w=weights(3, 4), **constants)


@pytest.mark.parametrize("add", ["h b", "b h"])
@pytest.mark.parametrize("shape", [(4,), (1, 1, 4)])
def test_a_vector_that_is_added_to_a_product_is_the_bias_of_the_layer(add: str, shape: tuple[int, ...]) -> None:
    bias = weights(*shape)
    model = dense(add=add, b=bias)
    (layer,) = adapter.read(model).layers
    assert layer.bias is not None
    np.testing.assert_array_equal(layer.bias(), bias.reshape(-1))
    assert of(model).nodes[2].attributes == {"constant": True, "bias_of": "w", "axis": -1}


@pytest.mark.parametrize(("op", "shape", "rows"), [("Conv", (4, 2, 3), 4), ("ConvTranspose", (4, 3, 1, 1), 6)])
def test_a_vector_that_is_added_to_the_channels_of_a_convolution_is_its_bias(
    op: str, shape: tuple[int, ...], rows: int
) -> None:
    def model(*sizes: int) -> Any:
        return graph(node(op, "x w", output="h", group=2), node("Add", "h b"), w=weights(*shape), b=weights(*sizes))

    ones = (1,) * (len(shape) - 2)
    for sizes in ((rows, *ones), (1, rows, *ones)):
        (layer,) = adapter.read(model(*sizes)).layers
        assert layer.bias is not None
        assert layer.bias().shape == (rows,)
        assert of(model(*sizes)).nodes[2].attributes == {"constant": True, "bias_of": "w", "axis": 1 - len(shape)}
    assert adapter.read(model(rows)).layers[0].bias is None


def test_constants_that_are_nodes_and_copies_are_biases_too() -> None:
    held = numpy_helper.from_array(numbered(1, 2, 3, 4))
    for between in (
        [helper.make_node("Constant", [], ["b"], value=held)],
        [helper.make_node("Constant", [], ["c"], value=held), node("Identity", "c", output="b")],
    ):
        model = dense(*between)
        (layer,) = adapter.read(model).layers
        assert layer.bias is not None
        np.testing.assert_array_equal(layer.bias(), [1, 2, 3, 4])
        assert of(model).nodes[2].attributes["bias_of"] == "w"
    gemm = graph(node("Gemm", "x w", output="h", transB=1), node("Add", "h b"), w=weights(4, 3), b=weights(4))
    assert adapter.read(gemm).layers[0].bias is not None


def test_what_else_is_added_is_no_bias() -> None:
    seen = dense(b=weights(4))
    seen.graph.output.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, None))
    models = [
        seen,
        dense(b=weights(1)),
        dense(b=weights(4, 1)),
        dense(b=weights(2, 4)),
        dense(node("Relu", "h", output="r"), b=weights(4), add="r b"),
        dense(node("Tanh", "h", output="b"), b2=weights(4)),
        graph(node("Gemm", "x w c", output="h"), node("Add", "h b"), w=weights(3, 4), c=weights(4), b=weights(4)),
    ]
    for model in models[:-1]:
        (layer, *_) = adapter.read(model).layers
        assert layer.bias is None
        assert not any("bias_of" in one.attributes for one in of(model).nodes)
    assert not any("bias_of" in one.attributes for one in of(models[-1]).nodes)


def test_a_layer_that_is_used_twice_has_a_bias_where_both_uses_add_the_same() -> None:
    def twice(second: str) -> Any:
        return graph(
            node("MatMul", "x w", output="h"), node("Add", "h b", output="i"),
            node("MatMul", "i w", output="j"), node("Add", f"j {second}"),
            w=weights(4, 4), b=weights(4), c=weights(4),
        )  # fmt: skip

    assert adapter.read(twice("b")).layers[0].bias is not None
    assert adapter.read(twice("c")).layers[0].bias is None
    assert [one.attributes.get("bias_of") for one in of(twice("b")).nodes if one.op == "add"] == ["w", "w"]
    assert not any("bias_of" in one.attributes for one in of(twice("c")).nodes)


# ---------------------------------------------------------------------------------------------------------------------
# Weights that stay as they are


def test_a_weight_that_is_used_the_other_way_round_as_well_is_marked() -> None:
    model = graph(
        node("MatMul", "x w", output="h"),
        node("Transpose", "w", output="t", perm=[1, 0]),
        node("MatMul", "h t"),
        w=weights(3, 3),
    )
    assert ["transposed" in one.attributes for one in of(model).calls["w"]] == [False, True]


def test_what_else_takes_a_weight_is_said() -> None:
    model = graph(node("MatMul", "x w", output="h"), node("Mul", "h w"), w=weights(3, 3))
    assert of(model).nodes[2].attributes == {"layers": ("w",)}
    inner = helper.make_graph(
        [node("MatMul", "h w", output="z")], "inner", [], [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)]
    )
    chosen = helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
    model = graph(node("MatMul", "x w", output="h"), chosen, w=weights(3, 3), c=np.array(True))
    assert of(model).nodes[2].attributes == {"layers": ("w",)}


def test_weights_that_cannot_be_written_are_locked() -> None:
    model = graph(
        node("DequantizeLinear", "q s", output="w"), node("MatMul", "x w"),
        q=np.ones((3, 3), np.int8), s=np.float32(0.5),
    )  # fmt: skip
    assert of(model).nodes[1].attributes["locked"].startswith("is quantized already")


def test_shapes_and_places_that_are_computed_are_measured_unless_they_depend_on_numbers() -> None:
    model = graph(
        node("Shape", "x", output="s"),
        node("Gather", "s one", output="n"),
        node("Div", "n two", output="half"),
        node("Slice", "x half n one", output="a"),
        node("NonZero", "x", output="z"),
        node("Shape", "z", output="t"),
        node("Gather", "t one", output="m"),
        node("Slice", "x zero m one", output="b"),
        node("Concat", "a b", axis=1),
        one=np.array([1]), two=np.array([2]), zero=np.array([0]),
    )  # fmt: skip
    model.ir_version = 10
    found = {one.original or one.name: one for one in of(model, 3, 6).nodes}
    assert (found["a"].shape, found["a"].attributes) == ((3, 3), {"axis": 1, "step": 1, "start": 3})
    assert (found["b"].shape, found["b"].attributes) == ((), {"axis": 1})


def test_what_no_output_needs_is_left_out_and_functions_are_opened() -> None:
    body = [helper.make_node("MatMul", ["x", "k"], ["h"], name="inner"), helper.make_node("Relu", ["h"], ["y"])]
    own = helper.make_function("own", "Dense", ["x", "k"], ["y"], body, [helper.make_opsetid("", 21)])
    model = graph(
        node("Tanh", "x", output="unused"), node("Dense", "x dense", domain="own"), functions=[own], dense=weights(3, 4)
    )
    found = of(model)
    assert [one.op for one in found.nodes] == ["input", "linear", "relu", "output"]
    assert found.nodes[1].name == found.nodes[1].layer == "dense"
    assert found.nodes[1].original == ""
    assert "bear no name" in found.source


def test_branches_take_what_they_use_from_around_them() -> None:
    def branch(op: str) -> Any:
        return helper.make_graph([helper.make_node(op, ["h"], [f"{op}_y"])], op, [], [value(f"{op}_y")])

    def value(name: str) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)

    chosen = helper.make_node("If", ["c"], ["y"], then_branch=branch("Relu"), else_branch=branch("Tanh"))
    found = of(graph(node("MatMul", "x w", output="h"), chosen, w=weights(3, 3), c=np.array(True)))
    assert [one.op for one in found.nodes] == ["input", "linear", "If", "output"]


def test_sizes_that_the_model_leaves_open_stay_unknown_without_an_example(folder: Path) -> None:
    path = exported(Convolutions, folder)
    assert of(path).by_name["stem"].shape == ()
    assert of(path, 3, 3, 6, 6).by_name["stem"].shape == (3, 8, 6, 6)


def test_a_graph_needs_onnx(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = exported(Convolutions, folder)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(NoGraphError, match=r"^no graph: the package onnx is not installed.*qvis\[onnx\]"):
        adapter.graph(path)
