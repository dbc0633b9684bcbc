"""What is read from ONNX graphs: PyTorch's exports, and small graphs made by hand."""

from __future__ import annotations

import sys
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from qvis import adapters
from qvis.layers import Layer, Network
from tests import zoo

RANDOM = np.random.default_rng(0)


def weights(*shape: int, dtype: str = "f4") -> np.ndarray:
    return RANDOM.normal(size=shape).astype(dtype)


def graph(*nodes: Any, inputs: tuple[str, ...] = ("x",), functions: Any = (), **constants: Any) -> onnx.ModelProto:
    """A model of these nodes; constants are arrays or ready tensors."""
    tensors = [
        value if isinstance(value, TensorProto) else numpy_helper.from_array(np.asarray(value), name)
        for name, value in constants.items()
    ]
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in inputs]
    outputs = [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1), helper.make_opsetid("own", 1)]
    made = helper.make_graph(list(nodes), "made", infos, outputs, tensors)
    return helper.make_model(made, opset_imports=opsets, functions=list(functions))


def node(op: str, inputs: str, name: str = "", output: str = "y", domain: str = "", **attributes: Any) -> Any:
    given = [one if one != "-" else "" for one in inputs.split()]
    return helper.make_node(op, given, [output], name=name, domain=domain, **attributes)


def only(model: onnx.ModelProto) -> Layer:
    """The one layer of a model, which is the same read from memory and from a file's bytes."""
    (layer,) = adapters.read(model).layers
    return layer


def through_file(model: onnx.ModelProto, folder: Path) -> Network:
    path = folder / "made.onnx"
    path.write_bytes(model.SerializeToString())
    return adapters.read(path)


def assert_same_layers(first: Network, second: Network) -> None:
    assert first.layers == second.layers
    assert (first.skipped, first.parameters, first.framework) == (second.skipped, second.parameters, second.framework)
    for one, other in zip(first.layers, second.layers, strict=True):
        np.testing.assert_array_equal(one.weight, other.weight)


# ---------------------------------------------------------------------------------------------------------------------
# PyTorch's exports


class Mixed(nn.Module):
    """Token indices (batch, 7) through the layers that both of PyTorch's exporters know."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(10, 8)
        self.conv = nn.Conv1d(8, 12, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose1d(12, 8, 3, padding=1, groups=2)
        self.norm = nn.GroupNorm(2, 8)
        self.lstm = nn.LSTM(8, 6, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(12, 4, batch_first=True)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.linear = nn.Linear(4, 5)
        self.block = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Sequential(nn.Linear(5, 3)))
        self.free = nn.Linear(3, 4, bias=False)

    def forward(self, indices: Tensor) -> Tensor:
        hidden = self.norm(self.up(self.conv(self.tokens(indices).transpose(1, 2)))).transpose(1, 2)
        for recurrent in (self.lstm, self.gru):
            hidden, _ = recurrent(hidden)
        hidden, _ = self.attention(hidden, hidden, hidden)
        return self.free(self.block(self.linear(hidden)))


EXAMPLES = {Mixed: torch.zeros(2, 7, dtype=torch.int64), zoo.Images: torch.zeros(2, 3, 8, 8)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("onnx")


@cache
def exported(make: type[nn.Module], dynamo: bool, folder: Path) -> Path:
    path = folder / f"{make.__name__}-{dynamo}.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(zoo.seeded(make).eval(), (EXAMPLES[make],), path, dynamo=dynamo, verbose=False)
    return path


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.parametrize("make", list(EXAMPLES))
def test_an_export_is_read_like_its_module(make: type[nn.Module], dynamo: bool, folder: Path) -> None:
    path = exported(make, dynamo, folder)
    module = {layer.name: layer for layer in adapters.read(zoo.seeded(make)).layers}
    found = {layer.name: layer for layer in adapters.read(path).layers}
    assert not [layer for layer in found.values() if layer.op == "other"]
    plain = {name for name, layer in module.items() if layer.op in PLAIN}
    assert plain <= set(found)
    for name in plain:
        if name != "stem":  # the batch norm behind it was folded into it
            np.testing.assert_array_equal(found[name].weight, module[name].weight, err_msg=name)


PLAIN = {f"Conv{n}d" for n in (1, 2, 3)} | {f"ConvTranspose{n}d" for n in (1, 2, 3)} | {"Linear", "Embedding"}


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
def test_gates_are_those_of_the_module(dynamo: bool, folder: Path) -> None:
    module = adapters.read(zoo.seeded(Mixed)).layers
    found = adapters.read(exported(Mixed, dynamo, folder)).layers
    for op in ("LSTM", "GRU"):
        theirs = sorted(layer.weight.tobytes() for layer in module if layer.op == op)
        assert theirs == sorted(layer.weight.tobytes() for layer in found if layer.op == op)
    lstm = {layer.name: layer for layer in found if layer.op == "LSTM"}
    theirs = {layer.name: layer for layer in module}
    for gate in "ifo":
        for way, suffix in (("forward", ""), ("backward", "_reverse")):
            ours = lstm[f"lstm.W.{way}.{gate}"]
            np.testing.assert_array_equal(ours.weight, theirs[f"lstm.weight_ih_l0{suffix}.{gate}"].weight)
    assert lstm["lstm.R.forward.c"].channels == "axis 1, part 4 of 4"


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
def test_packed_attention_is_one_matrix_with_all_rows(dynamo: bool, folder: Path) -> None:
    rows = zoo.seeded(Mixed).get_parameter("attention.in_proj_weight").detach().numpy()
    found = {layer.name: layer for layer in adapters.read(exported(Mixed, dynamo, folder)).layers}
    np.testing.assert_array_equal(found["attention"].weight, rows)


@pytest.mark.parametrize("make", list(EXAMPLES))
def test_a_live_model_is_read_like_its_file(make: type[nn.Module], folder: Path) -> None:
    path = exported(make, True, folder)
    live = onnx.load(path)
    before = live.SerializeToString()
    first, second = adapters.read(path), adapters.read(live)
    assert_same_layers(first, second)
    assert live.SerializeToString() == before
    assert (first.name, second.name) == (path.stem, "main_graph")


def test_an_exporters_program_is_read_like_its_model() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(nn.Linear(3, 4).eval(), (torch.zeros(1, 3),), dynamo=True, verbose=False)
    assert_same_layers(adapters.read(program), adapters.read(program.model_proto))


def test_parameters_are_counted_without_statistics(folder: Path) -> None:
    path = folder / "counted.onnx"
    module = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)).eval()
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1)  # the exporter stores equal tensors once
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"do_constant_folding": False, "training": torch.onnx.TrainingMode.PRESERVE}
        torch.onnx.export(module, (torch.zeros(1, 3, 8, 8),), path, dynamo=False, **options)
    network = adapters.read(path)
    assert network.parameters == sum(one.numel() for one in module.parameters())
    assert network.framework.startswith("ONNX opset ")
    assert f"written by pytorch {torch.__version__.partition('+')[0]}" in network.framework


def test_a_file_is_read_without_onnx(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "onnx"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnx", None)  # makes an import fail
    assert adapters.read(exported(zoo.Images, True, folder)).layers


# ---------------------------------------------------------------------------------------------------------------------
# One operator each

W = weights(6, 4)
K = weights(6, 4, 3, 2)
T = weights(4, 3, 3, 2)
STACK = weights(2, 4, 6)

OPERATORS = {
    "convolution": (node("Conv", "x w"), K, "axis 0", K.reshape(6, -1)),
    "quantizer's convolution": (node("ConvTranspose", "x w"), T, "axis 1", T.swapaxes(0, 1).reshape(3, -1)),
    "grouped transposed": (
        node("ConvTranspose", "x w", group=2),
        T,
        "groups x axis 1",
        np.concatenate([T[:2].swapaxes(0, 1).reshape(3, -1), T[2:].swapaxes(0, 1).reshape(3, -1)]),
    ),
    "deformable": (node("DeformConv", "x w offset"), K, "axis 0", K.reshape(6, -1)),
    "gemm": (node("Gemm", "x w"), W, "axis 1", W.T),
    "gemm turned": (node("Gemm", "x w", transB=1), W, "axis 0", W),
    "gemm from the left": (node("Gemm", "w x"), W, "axis 0", W),
    "gemm from the left, turned": (node("Gemm", "w x", transA=1), W, "axis 1", W.T),
    "matmul": (node("MatMul", "x w"), W, "axis 1", W.T),
    "matmul from the left": (node("MatMul", "w x"), W, "axis 0", W),
    "stacked matmul": (node("MatMul", "x w"), STACK, "axis 0 x axis 2", STACK.swapaxes(1, 2).reshape(12, 4)),
    "embedding": (node("Gather", "w x"), W, "axis 0", W),
    "einsum": (node("Einsum", "x w", equation="bi,ihd->bhd"), STACK, "axis 1 x axis 2", STACK.reshape(2, -1).T),
    "fused": (node("FusedMatMul", "x w", domain="com.microsoft", transB=1), W, "axis 0", W),
    "rows chosen by a constant": (node("Gather", "w i"), W, "axis 0", W),
    "other domain": (node("MatMul", "x w", domain="own"), W, "axis 0", W),
    "arithmetic": (node("Mul", "x w"), W, "axis 0", W),
}
UNKNOWN = {"rows chosen by a constant", "other domain", "arithmetic"}


@pytest.mark.parametrize("case", list(OPERATORS))
def test_the_operator_tells_where_the_channels_are(case: str, tmp_path: Path) -> None:
    made, weight, channels, rows = OPERATORS[case]
    model = graph(made, inputs=("x", "offset"), w=weight, i=np.array([0, 1]))
    layer = only(model)
    assert (layer.op, layer.channels) == ("other" if case in UNKNOWN else made.op_type, channels)
    assert (layer.shape, layer.dtype, layer.name) == (weight.shape, "float32", "w")
    np.testing.assert_array_equal(layer.weight, rows)
    assert_same_layers(adapters.read(model), through_file(model, tmp_path))


PASSES = {
    "identity": ([node("Identity", "w", output="v")], W, "axis 1"),
    "transposed": ([node("Transpose", "w", output="v")], W.T.copy(), "axis 0"),
    "transposed by name": ([node("Transpose", "w", output="v", perm=[1, 0])], W.T.copy(), "axis 0"),
    "transposed twice": ([node("Transpose", "w", output="u"), node("Transpose", "u", output="v")], W, "axis 1"),
    "reshaped around the channels": ([node("Reshape", "w shape", output="v")], W.reshape(2, 3, 4), "axis 2"),
    "reshaped through the channels": (
        [node("Reshape", "w shape", output="v")],
        W.reshape(3, 8),
        "axis 1 after a reshape",
    ),
    "squeezed": ([node("Squeeze", "w axes", output="v")], W.reshape(6, 1, 4), "axis 2"),
    "unsqueezed": ([node("Unsqueeze", "w axes", output="u"), node("Squeeze", "u axes", output="v")], W, "axis 1"),
    "flattened": ([node("Flatten", "w", output="v", axis=2)], W.reshape(2, 3, 4), "axis 2"),
    "cast": ([node("Cast", "w", output="v", to=TensorProto.FLOAT)], W.astype("f8"), "axis 1"),
}


@pytest.mark.parametrize("case", list(PASSES))
def test_weights_are_found_behind_nodes_that_hand_them_on(case: str, tmp_path: Path) -> None:
    nodes, weight, channels = PASSES[case]
    model = graph(*nodes, node("MatMul", "x v"), w=weight, shape=np.array([6, -1]), axes=np.array([1]))
    layer = only(model)
    assert (layer.op, layer.channels, layer.shape) == ("MatMul", channels, weight.shape)
    np.testing.assert_array_equal(layer.weight, W.T)
    assert_same_layers(adapters.read(model), through_file(model, tmp_path))


def test_a_cast_to_fewer_bits_is_noted() -> None:
    model = graph(node("Cast", "w", output="v", to=TensorProto.BFLOAT16), node("MatMul", "x v"), w=W)
    assert only(model).notes == ("cast to bfloat16 in the graph; shown before that",)


def test_embeddings_of_a_fused_layer() -> None:
    tables = {name: weights(5, 3) for name in ("word", "position", "segment")}
    fused = node("EmbedLayerNormalization", "x x word position segment", "start", domain="com.microsoft")
    found = adapters.read(graph(fused, **tables)).layers
    assert [layer.name for layer in found] == ["word.word", "position.position", "segment.segment"]


def test_fused_attention_is_split_into_its_three_matrices() -> None:
    packed = weights(4, 14)
    fused = node("Attention", "x w", domain="com.microsoft", num_heads=2, qkv_hidden_sizes=[4, 4, 6])
    found = adapters.read(graph(fused, w=packed)).layers
    assert [(layer.name, layer.shape, layer.channels) for layer in found] == [
        ("w.q", (4, 4), "axis 1, part 1 of 3"),
        ("w.k", (4, 4), "axis 1, part 2 of 3"),
        ("w.v", (4, 6), "axis 1, part 3 of 3"),
    ]
    np.testing.assert_array_equal(np.concatenate([layer.weight for layer in found]), packed.T)


def test_a_reverse_rnn_has_one_matrix_for_the_input_and_one_for_the_state() -> None:
    model = graph(
        node("RNN", "x w r", "rnn", hidden_size=3, direction="reverse"), w=weights(1, 3, 4), r=weights(1, 3, 3)
    )
    found = adapters.read(model).layers
    assert [(layer.name, layer.shape) for layer in found] == [("w.W.backward", (3, 4)), ("r.R.backward", (3, 3))]


# ---------------------------------------------------------------------------------------------------------------------
# The graph around


def test_a_weight_used_twice_is_listed_once_with_both_names() -> None:
    model = graph(node("Gather", "w i", "tokens", "h"), node("Gemm", "h w", "head", transB=1), inputs=("i",), w=W)
    assert (only(model).name, only(model).aliases, only(model).notes) == ("w", ("head",), ())
    model = graph(node("Gemm", "x w", "a", "h", transB=1), node("MatMul", "h w", "b"), w=weights(4, 4))
    assert only(model).notes == ("b (MatMul) uses the same tensor with its output channels along axis 1",)


def test_subgraphs_see_the_constants_around_them(tmp_path: Path) -> None:
    inner = helper.make_graph(
        [node("MatMul", "x outer", "first", "h"), node("MatMul", "h inner", "second", "z")],
        "then",
        [],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weights(6, 5), "inner")],
    )
    model = graph(node("If", "x", then_branch=inner, else_branch=inner), outer=W)
    found = adapters.read(model)
    # Both branches hold a tensor of that name; they are two.
    assert [layer.name for layer in found.layers] == ["outer", "inner", "second"]
    assert_same_layers(found, through_file(model, tmp_path))


def test_functions_are_followed_with_their_attributes(tmp_path: Path) -> None:
    gemm = node("Gemm", "a b", output="c")
    gemm.attribute.add(name="transB", ref_attr_name="turned", type=onnx.AttributeProto.INT)
    opsets = [helper.make_opsetid("", 21)]
    linear = helper.make_function("own", "Linear", ["a", "b"], ["c"], [gemm], opsets, ["turned"])
    calls = [node("Linear", "x w", "one", "h", "own", turned=1), node("Linear", "h v", "two", "y", "own", turned=0)]
    model = graph(*calls, functions=[linear], w=W, v=weights(6, 3))
    found = adapters.read(model)
    assert [(layer.name, layer.op, layer.channels) for layer in found.layers] == [
        ("w", "Gemm", "axis 0"),
        ("v", "Gemm", "axis 1"),
    ]
    assert_same_layers(found, through_file(model, tmp_path))


def test_constant_nodes_are_weights_too() -> None:
    held = helper.make_node("Constant", [], ["v"], value=numpy_helper.from_array(W))
    assert (only(graph(held, node("MatMul", "x v", "here"))).name, only(graph(held, node("MatMul", "x v"))).name) == (
        "here",
        "v",
    )


def test_what_is_no_matrix_of_weights_is_not_listed() -> None:
    mask = np.where(np.tri(4, dtype=bool), 0, -np.inf).astype("f4")[None, None]
    states = np.zeros((1, 2, 3), dtype="f4")
    nodes = [
        node("Add", "x mask", output="a"),
        node("Where", "a table table", output="b"),
        node("Expand", "states shape", output="s"),
        node("Add", "b row", output="c"),
        node("MatMul", "c w"),
    ]
    model = graph(*nodes, w=W, mask=mask, table=W, states=states, row=weights(1, 9, 1), shape=np.array([1, 2, 3]))
    found = adapters.read(model)
    assert [layer.name for layer in found.layers] == ["w"]
    assert [(one.name, one.reason) for one in found.skipped] == [
        ("mask", "is a mask: its values hide what they are added to")
    ]


def test_unused_and_sparse_tensors() -> None:
    model = graph(node("MatMul", "x w"), w=W, left=weights(3, 3))
    values = numpy_helper.from_array(weights(2), "thin")
    indices = numpy_helper.from_array(np.array([1, 5]), "thin_indices")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4, 4]))
    found = adapters.read(model)
    assert [(layer.name, layer.op) for layer in found.layers] == [("w", "MatMul"), ("left", "other")]
    assert [(one.name, one.reason) for one in found.skipped] == [("thin", "is a sparse tensor")]


@pytest.mark.parametrize(
    ("tensor", "title", "name"),
    [
        ("conv1.weight", "/conv1/Conv", "conv1"),
        ("weight", "", "(root)"),
        ("layer.weight_quantized", "/layer/Conv_quant", "layer"),
        ("onnx::MatMul_123", "/layer1/layer1.0/fc/MatMul", "layer1.0.fc"),
        ("onnx::MatMul_123", "/encoder/layer.0/layer.0.1/fc/MatMul_2", "encoder.layer.0.1.fc.MatMul_2"),
        ("val_12", "node_MatMul_4", "val_12"),
        ("val_12", "dense", "dense"),
        ("block/conv/ReadVariableOp:0", "", "block/conv"),
        ("q_proj.MatMul.weight_Q4", "", "q_proj"),
        ("", "", "y"),
    ],
)
def test_layers_are_named_after_their_modules(tensor: str, title: str, name: str) -> None:
    from qvis.adapters.onnx import names as onnx_names
    from qvis.adapters.onnx.parts import Node

    assert onnx_names.choose(tensor, Node("MatMul", "", title, (), ("y",)))[0] == name


def test_layers_of_one_name_are_told_apart() -> None:
    nodes = [node("MatMul", "x a.weight", "a", "h"), node("MatMul", "h a.weight_quantized", "a")]
    found = adapters.read(graph(*nodes, **{"a.weight": W, "a.weight_quantized": weights(6, 6)})).layers
    assert [layer.name for layer in found] == ["a", "a.weight_quantized"]
