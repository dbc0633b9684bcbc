"""Layers that stay in float, as other tools are told."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import qvis
from qvis import adapters
from qvis.adapters.digits import load_digits_model
from qvis.adapters.onnx import graph as onnx_graph
from qvis.cli import main
from qvis.cli.options import Tool
from qvis.cli.output import print_exclusion
from qvis.errors import BadArgumentError, UnknownLayerError
from qvis.excluding import TITLES, TOOLS, exclusions, find_setting
from qvis.layers import Analysis, Graph, Layer, Network, Node

HOSTILE = ["'); import os; os.system('x') #", 'a"b', "c\nimport os", "d\\", "{e}", "$(touch f)", "`g`", "h;i", "ü.j"]
FOR_ONNX = ["onnxruntime", "openvino", "nncf", "tensorrt", "trtexec"]
FOR_TORCH = ["openvino", "nncf", "torchao", "pt2e"]


def network_of(names: list[str], framework: str, graph: Graph | None = None) -> Network:
    layers = [Layer(name, "Linear", (2, 2), "float32", lambda: np.ones((2, 2))) for name in names]
    return Network("net", framework, tuple(layers), graph=graph)


def graph_of(names: list[str], originals: list[str] | None = None) -> Graph:
    originals = names if originals is None else originals
    nodes = [Node(f"n{i}", "linear", (), name, original=originals[i]) for i, name in enumerate(names)]
    return Graph(tuple(nodes))


def written(names: list[str], tool: str, framework: str | None = None) -> Any:
    framework = framework or {"tflite": "Keras 3"}.get(tool, "ONNX" if tool in FOR_ONNX else "PyTorch")
    return exclusions(network_of(names, framework, graph_of(names)), tool, names)


# ---------------------------------------------------------------------------------------------------------------------
# The tools themselves


class Net(nn.Module):
    """Names that no tool finds by their beginning alone, and a layer without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16, bias=False))
        self.a1 = nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.a1(self.a(x))))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.onnx.export(Net().eval(), (torch.zeros(1, 8),), str(path), dynamo=False)
    return path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kept", [["a.0"], ["a.2", "head"], ["a1"]])
def test_onnxruntime_leaves_just_these_layers_in_float(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: list[str]
) -> None:
    import onnx
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self, name: str) -> None:
            self.batches = iter([{name: np.random.default_rng(0).normal(size=(1, 8)).astype(np.float32)}] * 2)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.batches, None)

    (tmp_path / "model.onnx").write_bytes(exported.read_bytes())
    monkeypatch.chdir(tmp_path)
    network, graph = adapters.read(exported), onnx_graph(exported)
    assert {layer.name for layer in network.layers} == {"a.0", "a.2", "a1", "head"}
    made = exclusions(replace(network, graph=graph), "onnxruntime", kept)
    assert made.missing == ()
    assert made.names == tuple(graph.calls[name][0].original for name in kept)
    name = onnx.load("model.onnx").graph.input[0].name
    exec(made.text, {"calibration_data_reader": Reader(name)})

    quantized = onnx.load("model.int8.onnx").graph
    weights = {one.name for one in quantized.initializer if onnx.numpy_helper.to_array(one).dtype == np.float32}
    in_float = {node.name for node in quantized.node if weights & set(node.input[1:2])}
    assert {node.name for node in quantized.node if node.op_type in ("Gemm", "MatMul")} > set(made.names)
    assert in_float & {node.original for nodes in graph.calls.values() for node in nodes} == set(made.names)


@pytest.fixture
def keras_model() -> Iterator[Any]:
    import keras

    keras.utils.set_random_seed(0)
    given = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(4, 3, name="conv", activation="relu")(given)
    x = keras.layers.Conv2D(4, 3, name="conv_after")(x)
    x = keras.layers.Dense(4, name="inner", activation="relu")(x)
    x = keras.layers.Flatten()(x)
    yield keras.Model(given, keras.layers.Dense(5, name="head")(x), name="net")
    keras.backend.clear_session()


@pytest.mark.filterwarnings("ignore")
def test_tflite_leaves_just_these_layers_in_float(keras_model: Any) -> None:
    import tensorflow as tf

    def representative_dataset() -> Iterator[list[np.ndarray]]:
        yield [np.random.default_rng(0).random((1, 8, 8, 3), dtype=np.float32)]

    converter = tf.lite.TFLiteConverter.from_keras_model(keras_model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = representative_dataset
    given = {"converter": converter, "representative_dataset": representative_dataset}
    network = adapters.read(keras_model)
    made = exclusions(network, "tflite", ["conv", "inner"])
    namespace: dict[str, Any] = dict(given)
    exec(made.text, namespace)
    interpreter = tf.lite.Interpreter(model_content=namespace["quantized"])
    types = {detail["index"]: detail["dtype"] for detail in interpreter.get_tensor_details()}
    weights = [
        types[op["inputs"][1]]
        for op in interpreter._get_ops_details()
        if op["op_name"] in ("CONV_2D", "FULLY_CONNECTED")
    ]
    assert weights == [np.float32, np.int8, np.float32, np.int8]

    with pytest.raises(ValueError, match=r"put a pattern for one of these in its place: .*StatefulPartitionedCall"):
        exec(exclusions(network, "tflite", ["head"]).text, dict(given))


@pytest.mark.parametrize(
    ("layer", "tensor", "found"),
    [
        ("conv", "net_1/conv_1/Relu;net_1/conv_1/convolution1", True),
        ("conv", "net/conv/Conv2D", True),
        ("conv", "net/a/Relu;net/conv/Conv2D", True),
        ("conv", "net/conv_after/Conv2D", False),
        ("conv", "net/my_conv/Conv2D", False),
        ("conv", "net/conv2/Conv2D", False),
        ("block/conv", "net_1/block_1/conv_1/Conv2D", True),
        ("block/conv", "net_1/conv_1/Conv2D", False),
        ("net/conv/Conv2D", "net/conv/Conv2D1", True),
        ("a.b", "net/aXb/Conv2D", False),
    ],
)
def test_patterns_for_tflite_find_the_tensors_of_a_layer(layer: str, tensor: str, found: bool) -> None:
    (pattern,) = written([layer], "tflite").names
    assert (re.search(pattern, tensor) is not None) == found


def test_patterns_for_nncf_find_just_the_operations_of_a_layer() -> None:
    (pattern,) = written(["a.0"], "nncf", "PyTorch").names
    nodes = ["a/0/linear/0", "a/1/relu/0", "b/a/0/linear/0", "a/01/linear/0", "aX0/linear/0"]
    assert [node for node in nodes if re.match(pattern, node)] == ["a/0/linear/0"]
    (pattern,) = written(["conv.1"], "nncf", "ONNX").names
    nodes = ["conv.1", "conv.1/WithoutBiases", "conv.11", "convX1", "conv.1/other"]
    assert [node for node in nodes if re.match(pattern, node)] == nodes[:2]


# ---------------------------------------------------------------------------------------------------------------------
# Names


def literals(text: str) -> list[list[str]]:
    """The lists of texts in a script."""
    found = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.List)]
    return [[ast.literal_eval(one) for one in node.elts] for node in found if node.elts]


@given(st.lists(st.text(max_size=12) | st.sampled_from(HOSTILE), min_size=1, max_size=3, unique=True))
@pytest.mark.parametrize(
    ("tool", "framework"), [*((tool, None) for tool in TOOLS if tool != "trtexec"), ("nncf", "PyTorch")]
)
def test_a_name_is_a_literal_whatever_it_holds(tool: str, framework: str | None, names: list[str]) -> None:
    names = [name for name in names if name] or ["x"]
    made = written(names, tool, framework)
    assert made.language == "python"
    assert list(made.names) in literals(made.text)
    calls = [ast.dump(node.func) for node in ast.walk(ast.parse(made.text)) if isinstance(node, ast.Call)]
    plain = ast.parse(written(["x"], tool, framework).text)
    assert calls == [ast.dump(node.func) for node in ast.walk(plain) if isinstance(node, ast.Call)]
    compile(made.text, "pasted", "exec")


@given(st.lists(st.text(max_size=12) | st.sampled_from(HOSTILE), min_size=1, max_size=3, unique=True))
def test_a_shell_sees_each_argument_whole(names: list[str]) -> None:
    names = [name for name in names if name] or ["x"]
    made = written(names, "trtexec")
    spoken = [name for name in names if not set(name) & set(",'*")]
    assert list(made.names) == spoken
    assert list(made.missing) == [name for name in names if name not in spoken]
    if spoken:
        assert made.language == "shell"
        assert shlex.split(made.text) == [
            "trtexec",
            "--onnx=model.onnx",
            "--int8",
            "--precisionConstraints=obey",
            f"--layerPrecisions={','.join(f'{name}:fp32' for name in spoken)}",
        ]
    else:
        assert made.text == ""


def test_a_layer_that_is_used_twice_is_told_by_all_its_nodes() -> None:
    network = network_of(["a"], "ONNX", graph_of(["a", "a"], ["first", "second"]))
    assert exclusions(network, "onnxruntime", "a").names == ("first", "second")


# ---------------------------------------------------------------------------------------------------------------------
# What was analyzed


def damaged_analysis() -> Analysis:
    """A model with a layer that suffers, and one that is broken."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 40), nn.Linear(40, 4))
    with torch.no_grad():
        model[0].weight[0] = float("nan")
        model[1].weight[0] *= 1e4
    return qvis.analyze(model)


def test_by_default_the_problem_layers_stay_in_float_worst_first() -> None:
    analysis = damaged_analysis()
    made = qvis.exclusions(analysis, tool="torchao")
    assert made.names == tuple(layer.name for layer in analysis.problematic_layers) == ("0", "1")
    assert made == qvis.exclusions(analysis, "torchao", layers=["0", "1"])
    with pytest.raises(BadArgumentError, match="none is a problem"):
        qvis.exclusions(qvis.analyze(nn.Linear(3, 3)), "torchao")


@given(st.lists(st.sampled_from(HOSTILE), min_size=1, unique=True))
@pytest.mark.parametrize("tool", TOOLS)
def test_a_text_is_what_stands_around_its_layers(tool: str, names: list[str]) -> None:
    framework = {"tflite": "Keras 3"}.get(tool, "ONNX" if tool in FOR_ONNX else "PyTorch")
    network = network_of(HOSTILE, framework, graph_of(HOSTILE))
    setting = find_setting(network, tool)
    items = [item for name in names for item in setting.items(name)]
    text = setting.before + setting.between.join(items) + setting.after
    assert exclusions(network, tool, names).text == (text if items else "")


def test_the_command_line_prints_what_python_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).random((4, 1, 8, 8)).astype(np.float32))
    model, data = "qvis.adapters.digits:load_digits_model", str(tmp_path / "data.npz")
    run = ["sensitivity", model, "--data", data, "--exclude-for", "pt2e"]
    assert main(run) == 0
    made = qvis.exclusions(qvis.analyze(load_digits_model()), "pt2e", "blocks.0.depthwise")
    assert capsys.readouterr().out.endswith(
        f"\n\nTo leave 1 layer in float, for PyTorch PT2E:\n\n{made.text}# {made.note}\n"
    )
    assert main([*run, "--json"]) == 2
    assert "not with --json" in capsys.readouterr().err


def test_the_command_line_says_where_there_is_nothing_to_paste(capsys: pytest.CaptureFixture[str]) -> None:
    print_exclusion(damaged_analysis(), "onnxruntime")
    assert "run qvis on the .onnx file" in capsys.readouterr().out
    print_exclusion(qvis.analyze(nn.Linear(3, 3)), "torchao")
    assert capsys.readouterr().out == "\nNo layer is a problem: for torchao none needs to stay in float.\n"


def test_the_command_line_knows_the_same_tools() -> None:
    assert [tool.value for tool in Tool] == list(TOOLS) == list(TITLES)


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be told


def test_layers_whose_nodes_have_no_names_are_missing() -> None:
    network = network_of(["a", "b", "c"], "ONNX", graph_of(["a", "b"], ["node", ""]))
    made = exclusions(network, "onnxruntime", ["a", "b", "c"])
    assert made.names == ("node",)
    assert made.missing == ("b", "c")
    assert "b, c: no node with a name applies it" in made.note


@pytest.mark.parametrize("tool", ["onnxruntime", "tensorrt", "trtexec"])
def test_names_of_nodes_come_from_the_exported_file(tool: str) -> None:
    for framework in ("PyTorch 2.13.0", "Keras 3.15"):
        made = written(["a", "b"], tool, framework)
        assert (made.text, made.names, made.missing) == ("", (), ("a", "b"))
        assert "run qvis on the .onnx file" in made.note


def test_without_a_graph_the_reason_is_said() -> None:
    network = replace(network_of(["a"], "ONNX"), no_graph="no graph: it is too large")
    made = exclusions(network, "onnxruntime", ["a"])
    assert made.text == ""
    assert "no graph: it is too large" in made.note


@pytest.mark.parametrize(
    ("tool", "framework"),
    [("torchao", "ONNX opset 18"), ("pt2e", "Keras 3.15"), ("openvino", "TensorFlow 2.21"), ("tflite", "PyTorch 2.13")],
)
def test_models_of_another_framework_cannot_be_told(tool: str, framework: str) -> None:
    made = written(["a"], tool, framework)
    assert (made.text, made.missing) == ("", ("a",))
    assert framework in made.note


@pytest.mark.parametrize("tool", FOR_TORCH)
def test_a_model_that_is_one_layer_has_no_name_to_tell(tool: str) -> None:
    (layer,) = adapters.read(nn.Linear(2, 2)).layers
    made = exclusions(adapters.read(nn.Linear(2, 2)), tool, [layer.name])
    assert (made.text, made.missing) == ("", (layer.name,))
    assert "the model itself" in made.note


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda network: exclusions(network, "tensorflow", ["a"]), BadArgumentError, "tool: got 'tensorflow'"),
        (lambda network: exclusions(network, "nncf", []), BadArgumentError, "layers: none are given"),
        (lambda network: exclusions(network, "nncf", ["A"]), UnknownLayerError, "'A'; did you mean 'a'?"),
    ],
)
def test_unknown_tools_and_layers_are_refused(
    call: Callable[[Network], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call(network_of(["a"], "PyTorch"))
