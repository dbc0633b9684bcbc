"""Chosen bit widths, as other tools are told."""

from __future__ import annotations

import ast
import csv
import io
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qvis import adapters
from qvis.adapters.onnx import graph as onnx_graph
from qvis.errors import BadArgumentError, UnknownLayerError
from qvis.exporting import FORMATS, export_widths
from qvis.layers import Graph, Layer, Network, Node
from qvis.noise import WeightGrid, round_weight
from qvis.quantization.grids import Scheme
from qvis.version import __version__

HOSTILE = ["'); import os; os.system('x') #", 'a"b', "c\nimport os", "d\\", "{e}", "h;i", "ü.j", "=1+1", "k\udc80"]


class Net(nn.Module):
    """Each kind of layer that tools treat differently; weights have their channels along axes 0 and 1."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 8)
        self.conv = nn.Conv1d(8, 6, 3, padding=1)
        self.up = nn.ConvTranspose1d(6, 8, 2)
        self.wide = nn.Linear(8, 64)
        self.tail = nn.Linear(64, 5)
        self.head = nn.Linear(64, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.up(torch.relu(self.conv(self.table(x).transpose(1, 2))))
        y = torch.relu(self.wide(y.transpose(1, 2)))
        return self.head(y.mean(1)), self.tail(y)


GRIDS = {
    "table": WeightGrid(5, "tensor"),
    "conv": WeightGrid(4, "channel"),
    "up": WeightGrid(3, "channel"),
    "wide": WeightGrid(12, "tensor"),
    "head": WeightGrid(6, 32),
}
"""Of all layers but ``tail``."""


def make_net() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().eval()


@pytest.fixture(scope="module")
def network() -> Network:
    return adapters.read(make_net())


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(make_net(), (torch.zeros(2, 7, dtype=torch.long),), str(path), dynamo=False, opset_version=17)
    return path


@pytest.fixture(scope="module")
def onnx_network(exported: Path) -> Network:
    return replace(adapters.read(exported), graph=onnx_graph(exported))


def layer_of(name: str, op: str = "Linear", shape: tuple[int, ...] = (3, 4), **rest: Any) -> Layer:
    weight = np.random.default_rng(0).normal(size=(shape[0], int(np.prod(shape[1:])))).astype(np.float32)
    return Layer(name, op, shape, "float32", lambda: weight, **rest)


def network_of(*layers: Layer, framework: str = "PyTorch 2.13", graph: Graph | None = None) -> Network:
    return Network("net", framework, layers, graph=graph)


def rounded_by(scales: Any, layer: Layer, bits: int) -> np.ndarray:
    """A weight rounded with scales: one, one for each channel, or (channels, blocks)."""
    scales = np.asarray(scales, dtype=np.float32)
    weight = layer.weight
    if scales.ndim == 1:
        scales = scales[:, None]
    elif scales.ndim == 2:
        scales = np.repeat(scales, -(-weight.shape[1] // scales.shape[1]), axis=1)[:, : weight.shape[1]]
    most = 2 ** (bits - 1) - 1
    return np.clip(np.rint(weight / scales), -most - 1, most) * scales


# ---------------------------------------------------------------------------------------------------------------------
# Plain data


def test_json_has_every_layer_and_scales_that_round_as_predicted(network: Network) -> None:
    made = export_widths(network, GRIDS, "json")
    assert (made.suffix, made.notes, dict(made.missing)) == (".json", (), {})
    document = json.loads(made.text)
    assert {key: document[key] for key in ("format", "version", "qvis")} == {
        "format": "qvis bit widths",
        "version": 1,
        "qvis": __version__,
    }
    assert [one["name"] for one in document["layers"]] == ["table", "conv", "up", "wide", "tail", "head"]
    for layer, one in zip(network.layers, document["layers"], strict=True):
        if layer.name == "tail":
            assert (one["bits"], one["granularity"], one["scales"]) == (None, None, None)
            assert one["bytes"] == 4 * layer.weight.size
            continue
        grid = GRIDS[layer.name]
        assert (one["bits"], one["granularity"], one["shape"]) == (*grid, list(layer.shape))
        assert one["bytes"] == Scheme("uniform", grid.bits, grid.granularity).fit(layer.weight).bytes
        np.testing.assert_array_equal(rounded_by(one["scales"], layer, grid.bits), round_weight(layer.weight, grid))


def test_the_last_group_of_a_row_may_be_shorter() -> None:
    layer = layer_of("a", shape=(2, 7))
    grid = WeightGrid(4, 3)
    (one,) = json.loads(export_widths(network_of(layer), {"a": grid}).text)["layers"]
    scales = np.repeat(np.float32(one["scales"]), 3, axis=1)[:, :7]
    np.testing.assert_array_equal(np.rint(layer.weight / scales) * scales, round_weight(layer.weight, grid))
    assert one["bytes"] == (14 * 4 + 6 * 16) // 8


def test_numbers_of_numpy_do_and_a_channel_of_zeros_has_the_scale_one() -> None:
    layer = replace(layer_of("a"), read=lambda: np.array([[0.0, 0.0], [1.0, -7.0]], dtype=np.float32), shape=(2, 2))
    grids = {"a": WeightGrid(np.int64(4), "channel")}  # type: ignore[arg-type]
    (one,) = json.loads(export_widths(network_of(layer), grids).text)["layers"]
    assert one["scales"] == [1.0, 1.0]
    (one,) = json.loads(export_widths(network_of(layer), {"a": WeightGrid(4, np.int64(2))}).text)["layers"]  # type: ignore[arg-type]
    assert one["granularity"] == 2


def test_csv_has_a_row_for_each_layer(network: Network) -> None:
    made = export_widths(network, GRIDS, "csv", sizes={"conv": 77})
    rows = list(csv.DictReader(io.StringIO(made.text, newline="")))
    assert made.suffix == ".csv"
    assert rows[1] == {
        "layer": "conv",
        "op": "Conv1d",
        "shape": "6 x 8 x 3",
        "weights": "144",
        "bits": "4",
        "granularity": "channel",
        "bytes": "77",
    }
    assert [(row["layer"], row["bits"], row["granularity"]) for row in rows[3:]] == [
        ("wide", "12", "tensor"),
        ("tail", "", "float"),
        ("head", "6", "32"),
    ]


def test_a_spreadsheet_takes_no_name_for_a_formula() -> None:
    names = ["=1+1", "+a", "-a", "@a", "\ta", 'a,"b"', "a\nb", "k\udc80"]
    text = export_widths(network_of(*map(layer_of, names)), {}, "csv").text
    read = [row["layer"] for row in csv.DictReader(io.StringIO(text, newline=""))]
    assert read == ["'=1+1", "'+a", "'-a", "'@a", "'\ta", 'a,"b"', "a\nb", r"k\udc80"]
    text.encode()


# ---------------------------------------------------------------------------------------------------------------------
# AIMET


def test_encodings_for_aimet_torch_round_as_predicted(network: Network) -> None:
    made = export_widths(network, GRIDS, "aimet")
    document = json.loads(made.text)
    assert (made.suffix, document["version"], document["activation_encodings"]) == (".json", "0.6.1", {})
    assert list(document["param_encodings"]) == [f"{name}.weight" for name in ("table", "conv", "up", "wide", "head")]
    assert [(one["shape"], one["block_size"]) for one in document["quantizers"].values()] == [
        ([], None),
        ([6, 1, 1], None),
        ([1, 8, 1], None),
        ([], None),
        ([3, 2], [1, 32]),
    ]
    for layer in network.layers:
        if layer.name not in GRIDS:
            continue
        grid = GRIDS[layer.name]
        entries = document["param_encodings"][f"{layer.name}.weight"]
        assert {(one["bitwidth"], one["is_symmetric"], one["dtype"]) for one in entries} == {(grid.bits, "True", "int")}
        for one in entries:  # AIMET reads the ends alone
            assert (one["max"] - one["min"]) / (2**grid.bits - 1) == pytest.approx(one["scale"])
            assert one["min"] == one["offset"] * one["scale"]
        scales = np.array([one["scale"] for one in entries])
        shaped = scales.reshape(3, 2) if layer.name == "head" else scales if len(scales) > 1 else scales[0]
        np.testing.assert_array_equal(rounded_by(shaped, layer, grid.bits), round_weight(layer.weight, grid))
    assert any('"quantizers"' in note for note in made.notes)


def test_a_tied_weight_is_told_to_aimet_and_torchao_under_all_its_names() -> None:
    network = network_of(layer_of("table", "Embedding", aliases=("head",)))
    grids = {"table": WeightGrid(4, "channel")}
    document = json.loads(export_widths(network, grids, "aimet").text)
    assert document["param_encodings"]["head.weight"] == document["param_encodings"]["table.weight"]
    assert "('head', weights(4, PerAxis(0)))" in export_widths(network, grids, "torchao").text


def test_encodings_for_aimet_onnx_name_initializers_and_axes(onnx_network: Network) -> None:
    grids = {**GRIDS, "tail": WeightGrid(4, 16)}
    document = json.loads(export_widths(onnx_network, grids, "aimet").text)
    found = {one["name"]: one for one in document["encodings"]}
    layers = {layer.name: layer for layer in onnx_network.layers}
    assert document["version"] == "2.0.0"
    assert list(found) == [layer.tensor for layer in onnx_network.layers]
    assert "axis" not in found["table.weight"]
    assert found["up.weight"]["axis"] == 1
    for name, transposed in (("conv", False), ("head", False), ("tail", True)):  # tail is x @ weight
        layer, grid = layers[name], grids[name]
        one = found[layer.tensor]
        assert one["output_dtype"] == f"int{grid.bits}"
        scales = np.array(one["y_scale"])
        scales = scales.T if transposed else scales
        np.testing.assert_array_equal(rounded_by(scales, layer, grid.bits), round_weight(layer.weight, grid))
    assert (found[layers["tail"].tensor]["axis"], found[layers["tail"].tensor]["block_size"]) == (0, 16)
    assert (found["head.weight"]["axis"], found["head.weight"]["block_size"]) == (1, 32)


@pytest.mark.parametrize(
    ("layer", "grid", "why"),
    [
        (layer_of("a", "LSTM"), WeightGrid(4, "channel"), "this is LSTM"),
        (layer_of("a", "ConvTranspose1d", channels="groups x axis 1"), WeightGrid(4, "channel"), "groups x axis 1"),
        (layer_of("a", "Conv2d", (3, 4, 1, 1)), WeightGrid(4, 2), "input channels alone"),
        (layer_of("a", "Linear", (3, 5)), WeightGrid(4, 2), "blocks of 2 divide, and these have 5"),
        (layer_of("(root)"), WeightGrid(4, "channel"), "has no name"),
    ],
)
def test_what_aimet_cannot_be_told_is_named(layer: Layer, grid: WeightGrid, why: str) -> None:
    made = export_widths(network_of(layer), {layer.name: grid}, "aimet")
    assert made.text == ""
    assert why in made.missing[layer.name]
    assert made.notes == (f"left out: {layer.name}: {made.missing[layer.name]}",)


# ---------------------------------------------------------------------------------------------------------------------
# torchao


def test_torchao_is_told_widths_and_granularities_of_linear_and_embedding(network: Network) -> None:
    grids = {**GRIDS, "tail": WeightGrid(3, 32)}
    made = export_widths(network, grids, "torchao")
    compile(made.text, "pasted", "exec")
    calls = [line.strip() for line in made.text.splitlines() if line.startswith("    (")]
    assert calls == [
        "('table', weights(5, PerAxis(0))),",
        "('tail', weights(3, PerGroup(32))),",
        "('head', weights(6, PerGroup(32))),",
    ]
    assert set(made.missing) == {"conv", "up", "wide"}
    assert "8 bits at most, and 12 were chosen" in made.missing["wide"]
    assert "table: has a grid for each channel" in made.notes[3]
    assert all(line.startswith("# ") for line in made.text.splitlines()[: len(made.notes)])


@pytest.mark.parametrize(
    ("name", "op", "grid", "why"),
    [
        ("a", "Linear", WeightGrid(4, 3), "groups of 3 divide"),
        ("re:a", "Linear", WeightGrid(4, "channel"), "pattern"),
        ("attention.out_proj", "Linear", WeightGrid(4, "channel"), "MultiheadAttention"),
    ],
)
def test_what_torchao_cannot_do_is_named(name: str, op: str, grid: WeightGrid, why: str) -> None:
    network = network_of(layer_of(name, op), layer_of("attention.in_proj_weight.q", "MultiheadAttention"))
    made = export_widths(network, {name: grid}, "torchao")
    assert made.text == ""
    assert why in made.missing[name]


# ---------------------------------------------------------------------------------------------------------------------
# ONNX Runtime


def quantize(text: str, path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a script, and return the graph that it made."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader

    given_to = onnx.load(path).graph.input[0].name
    batch = np.arange(14).reshape(2, 7) % 10

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter([{given_to: batch}] * 2)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.batches, None)

    (folder / "model.onnx").write_bytes(path.read_bytes())
    monkeypatch.chdir(folder)
    exec(text, {"calibration_data_reader": Reader()})
    return onnx.load(folder / "model.quantized.onnx").graph


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("with_16", [True, False])
def test_onnxruntime_rounds_each_layer_to_its_width(
    exported: Path, onnx_network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_16: bool
) -> None:
    import onnx
    import onnxruntime

    grids = {**GRIDS, "table": WeightGrid(4, "tensor"), "wide": WeightGrid(12 if with_16 else 8, "tensor")}
    made = export_widths(onnx_network, grids, "onnxruntime")
    assert made.suffix == ".py"
    assert set(made.missing) == {"head"}
    quantized = quantize(made.text, exported, tmp_path, monkeypatch)
    tensors = {one.name: one for one in quantized.initializer}

    wanted = {"table": 4, "conv": 4, "up": 4, "wide": 16 if with_16 else 8}
    for layer in onnx_network.layers:
        if layer.name not in wanted:
            assert tensors[layer.tensor].data_type == onnx.TensorProto.FLOAT
            continue
        bits = wanted[layer.name]
        codes, scale = tensors[f"{layer.tensor}_quantized"], tensors[f"{layer.tensor}_scale"]
        assert onnx.TensorProto.DataType.Name(codes.data_type) == f"INT{bits}"
        assert not onnx.numpy_helper.to_array(tensors[f"{layer.tensor}_zero_point"]).astype(int).any()
        numbers = onnx.numpy_helper.to_array(codes).astype(np.float32)
        matrix = np.moveaxis(numbers, int(layer.channels[-1]), 0).reshape(layer.weight.shape)
        steps = onnx.numpy_helper.to_array(scale).reshape(-1, 1)
        grid = WeightGrid(bits, grids[layer.name].granularity)
        np.testing.assert_allclose(matrix * steps, round_weight(layer.weight, grid), rtol=1e-6)

    sample = {onnx.load(exported).graph.input[0].name: np.arange(14).reshape(2, 7) % 10}
    exact, rough = (
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, sample)
        for path in ("model.onnx", "model.quantized.onnx")
    )
    for one, other in zip(exact, rough, strict=True):
        assert np.square(one - other).sum() < 0.1 * np.square(one).sum()


def test_onnxruntime_gets_the_next_width_that_it_has_and_this_is_said(onnx_network: Network) -> None:
    made = export_widths(onnx_network, {**GRIDS, "tail": WeightGrid(9, "channel")}, "onnxruntime")
    assert "up: gets 4 bits in place of 3, the next width that ONNX Runtime has" in made.notes
    assert "table: gets 8 bits in place of 5, the next width that ONNX Runtime has" in made.notes
    assert "tail: gets 16 bits in place of 9, the next width that ONNX Runtime has" in made.notes
    assert not any(note.startswith("conv: ") for note in made.notes)


def test_layers_that_cannot_be_excluded_are_named(onnx_network: Network) -> None:
    made = export_widths(replace(onnx_network, graph=None, no_graph="onnx is not installed"), GRIDS, "onnxruntime")
    (note,) = (note for note in made.notes if note.startswith("tail, head: gets 8 bits"))
    assert "onnx is not installed" in note


@pytest.mark.parametrize(
    ("layer", "grid", "why"),
    [
        (layer_of("a", "LSTM", tensor="w"), WeightGrid(4, "channel"), "this is LSTM"),
        (layer_of("a", "Gemm"), WeightGrid(4, "channel"), "just as it is stored"),
        (layer_of("a", "Gemm", tensor="w"), WeightGrid(4, 2), "no groups"),
        (layer_of("a", "Gather", tensor="w"), WeightGrid(4, "channel"), "one grid for the tensor"),
        (layer_of("a", "MatMul", tensor="w", channels="axis 0 x axis 2"), WeightGrid(4, "channel"), "axis 0 x axis 2"),
    ],
)
def test_what_onnxruntime_cannot_be_told_is_named(layer: Layer, grid: WeightGrid, why: str) -> None:
    made = export_widths(network_of(layer, framework="ONNX opset 18"), {"a": grid}, "onnxruntime")
    assert made.text == ""
    assert why in made.missing["a"]


def test_names_of_initializers_come_from_the_exported_file(network: Network) -> None:
    made = export_widths(network, GRIDS, "onnxruntime")
    assert made.text == ""
    assert set(made.missing) == set(GRIDS)
    assert "run qvis on the .onnx file" in made.notes[0]


def test_an_initializer_is_known_only_where_it_goes_into_its_node_as_it_is() -> None:
    import onnx
    from onnx import TensorProto, helper

    rng = np.random.default_rng(0)
    names = ("plain", "turned", "quantized")
    tensors = [onnx.numpy_helper.from_array(rng.normal(size=(4, 4)).astype(np.float32), name) for name in names[:2]]
    tensors += [
        onnx.numpy_helper.from_array(rng.integers(-9, 9, (4, 4)).astype(np.int8), "quantized"),
        onnx.numpy_helper.from_array(np.float32(0.1), "scale"),
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "plain"], ["a"], "first"),
        helper.make_node("Transpose", ["turned"], ["t"]),
        helper.make_node("MatMul", ["a", "t"], ["b"], "second"),
        helper.make_node("DequantizeLinear", ["quantized", "scale"], ["d"]),
        helper.make_node("MatMul", ["b", "d"], ["y"], "third"),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in "xy"]
    model = helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors))
    layers = adapters.read(model).layers
    assert [(layer.name, layer.tensor) for layer in layers] == [("plain", "plain"), ("turned", ""), ("quantized", "")]


# ---------------------------------------------------------------------------------------------------------------------
# Names, and what is wrong


def literals(text: str) -> list[str]:
    """The texts in a script."""
    return [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]


@settings(deadline=None)
@given(st.lists(st.text(max_size=12) | st.sampled_from(HOSTILE), min_size=1, max_size=3, unique=True))
@pytest.mark.parametrize(("format", "framework"), [("torchao", "PyTorch 2.13"), ("onnxruntime", "ONNX opset 18")])
def test_a_name_is_a_literal_whatever_it_holds(format: str, framework: str, names: list[str]) -> None:
    def written(names: list[str]) -> str:
        layers = [layer_of(name, op, tensor=name) for name in names]
        nodes = tuple(Node(f"n{i}", "linear", (), name, original=name) for i, name in enumerate([*names, "float"]))
        network = network_of(*layers, layer_of("float", op), framework=framework, graph=Graph(nodes))
        return export_widths(network, dict.fromkeys(names, WeightGrid(4, "channel")), format).text

    op = "Linear" if format == "torchao" else "MatMul"
    names = [name for name in names if name not in ("", "float", "_default") and not name.startswith("re:")] or ["x"]
    text = written(names)
    text.encode()
    assert set(names) <= set(literals(text))
    kinds = [type(node) for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.Call, ast.Import))]
    plain = ast.parse(written([f"x{i}" for i in range(len(names))]))
    assert kinds == [type(node) for node in ast.walk(plain) if isinstance(node, (ast.Call, ast.Import))]


def test_a_name_in_a_note_stays_in_its_comment() -> None:
    network = network_of(layer_of("a"), layer_of("b\nimport os", "Conv2d"))
    text = export_widths(network, dict.fromkeys(("a", "b\nimport os"), WeightGrid(4, "channel")), "torchao").text
    assert r"# left out: b\nimport os: " in text
    assert "os" not in [
        name.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import) for name in node.names
    ]


def test_folded_normalizations_are_to_be_folded_before_quantizing() -> None:
    network = network_of(layer_of("a", norms=("bn",)))
    grids = {"a": WeightGrid(4, "channel")}
    for format in ("aimet", "torchao"):
        assert "a: the width was chosen with bn folded in" in export_widths(network, grids, format).notes[0]
    assert export_widths(network, grids, "json").notes == ()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("grids", "error", "message"),
    [
        ({"con": WeightGrid(4, "channel")}, UnknownLayerError, "grids: no layer is called 'con'; did you mean 'conv'"),
        ({"conv": WeightGrid(1, "channel")}, BadArgumentError, "grids: 'conv' has 1 bits, expected an integer from 2"),
        ({"conv": WeightGrid(17, "channel")}, BadArgumentError, "to 16"),
        ({"conv": WeightGrid(4.0, "channel")}, BadArgumentError, "4.0 bits"),
        (
            {"conv": WeightGrid(4, "row")},
            BadArgumentError,
            "the granularity 'row', expected tensor, channel or a group",
        ),
        ({"conv": WeightGrid(4, 0)}, BadArgumentError, "the granularity 0"),
        ({"conv": WeightGrid(4, True)}, BadArgumentError, "the granularity True"),
    ],
)
def test_grids_that_do_not_exist_are_refused(
    network: Network, format: str, grids: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        export_widths(network, grids, format)


def test_other_formats_and_sizes_of_nothing_are_refused(network: Network) -> None:
    with pytest.raises(BadArgumentError, match="format: got 'tflite', expected one of json, csv, aimet"):
        export_widths(network, GRIDS, "tflite")
    with pytest.raises(UnknownLayerError, match="sizes: no layer is called 'x'"):
        export_widths(network, GRIDS, sizes={"x": 1})


@pytest.mark.parametrize("format", ["aimet", "torchao", "onnxruntime"])
def test_without_any_width_there_is_nothing_to_write(network: Network, format: str) -> None:
    made = export_widths(network, {}, format)
    assert (made.text, made.notes) == ("", ())
