"""ONNX files as they lie on disk: with external data, damaged, mislabelled, or made to do harm."""

from __future__ import annotations

import os
import random
import tracemalloc
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qvis import adapters
from qvis.adapters import onnx as adapter
from qvis.errors import BadArgumentError, QvisError, UnsupportedModelError
from tests.test_adapters_onnx import graph, node, weights

W = weights(64, 48)


def external(folder: Path, location: str, offset: int | None = None, shape: tuple[int, ...] = W.shape) -> Path:
    """A model whose one weight is said to be in the file ``location``."""
    folder.mkdir(parents=True, exist_ok=True)
    tensor = TensorProto(name="w", dims=shape, data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    if offset is not None:
        tensor.external_data.add(key="offset", value=str(offset))
    path = folder / "model.onnx"
    path.write_bytes(graph(node("MatMul", "x w"), w=tensor).SerializeToString())
    return path


# ---------------------------------------------------------------------------------------------------------------------
# External data


def test_external_data_is_read_from_beside_the_model(tmp_path: Path) -> None:
    model = graph(node("MatMul", "x w", output="h"), node("MatMul", "h v"), w=W, v=weights(48, 64))
    inside = adapters.read(onnx.ModelProto.FromString(model.SerializeToString()))  # saving empties the model
    options = {"save_as_external_data": True, "location": "data/all.bin", "size_threshold": 0}
    (tmp_path / "data").mkdir()
    onnx.save(model, tmp_path / "model.onnx", **options)
    found = adapters.read(tmp_path / "model.onnx")
    assert found.layers == inside.layers
    for one, other in zip(inside.layers, found.layers, strict=True):
        np.testing.assert_array_equal(one.weight, other.weight)


def test_external_data_that_its_folder_links_to_stays_inside(tmp_path: Path) -> None:
    path = external(tmp_path / "real", "w.bin", offset=8)
    (tmp_path / "real" / "blob").write_bytes(bytes(8) + W.tobytes())
    (tmp_path / "real" / "w.bin").symlink_to("blob")
    (tmp_path / "link").symlink_to("real")
    for given in (path, tmp_path / "link" / "model.onnx"):
        np.testing.assert_array_equal(adapters.read(given).layers[0].weight, W.T)


@pytest.mark.parametrize(
    "location",
    [
        "../secret.bin",
        "data/../../secret.bin",
        "{folder}/secret.bin",
        "/etc/passwd",
        "C:\\secret.bin",
        "\\\\server\\share\\secret.bin",
        "..\\secret.bin",
        "link.bin",
        "folder/secret.bin",
        "loop",
        "",
        "a\0b",
    ],
)
def test_external_data_cannot_lead_outside(location: str, tmp_path: Path) -> None:
    (tmp_path / "secret.bin").write_bytes(W.tobytes())
    path = external(tmp_path / "model", location.format(folder=tmp_path))
    (tmp_path / "model" / "link.bin").symlink_to(tmp_path / "secret.bin")
    (tmp_path / "model" / "folder").symlink_to(tmp_path)
    (tmp_path / "model" / "loop").symlink_to("loop")
    with pytest.raises(BadArgumentError, match="the tensor 'w' ") as caught:
        adapters.read(path)
    message = str(caught.value)
    assert location == "loop" or "only read from inside the model's own folder" in message
    assert "\n" not in message


def test_external_data_is_checked_again_when_it_is_read(tmp_path: Path) -> None:
    path = external(tmp_path / "model", "w.bin")
    (tmp_path / "secret.bin").write_bytes(W.tobytes())
    (tmp_path / "model" / "w.bin").write_bytes(W.tobytes())
    (layer,) = adapters.read(path).layers
    (tmp_path / "model" / "w.bin").unlink()
    (tmp_path / "model" / "w.bin").symlink_to(tmp_path / "secret.bin")
    with pytest.raises(BadArgumentError, match="only read from inside"):
        _ = layer.weight


def test_external_data_that_is_missing_or_short(tmp_path: Path) -> None:
    path = external(tmp_path, "w.bin", offset=100)
    with pytest.raises(
        BadArgumentError, match=r"'w' is in the file 'w.bin', which is not beside the model; put it into"
    ):
        adapters.read(path)
    (tmp_path / "w.bin").write_bytes(W.tobytes())
    with pytest.raises(
        BadArgumentError, match=rf"'w' needs {W.nbytes + 100} bytes of the file 'w.bin', which has {W.nbytes}"
    ):
        adapters.read(path)
    (tmp_path / "w.bin").unlink()
    os.mkfifo(tmp_path / "w.bin")  # would be waited for forever
    with pytest.raises(BadArgumentError, match="not beside the model"):
        adapters.read(path)


@pytest.mark.parametrize("offset", ["-8", "1e3", "0x10", "²", "9" * 40])
def test_offsets_that_are_none(offset: str, tmp_path: Path) -> None:
    tensor = TensorProto(name="w", dims=[2, 2], data_type=1, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="w.bin")
    tensor.external_data.add(key="offset", value=offset)
    (tmp_path / "w.bin").write_bytes(bytes(64))
    path = tmp_path / "model.onnx"
    path.write_bytes(graph(node("MatMul", "x w"), w=tensor).SerializeToString())
    with pytest.raises(BadArgumentError, match="'w' has no offset but"):
        adapters.read(path)


def test_a_live_model_without_its_external_data(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(W.tobytes())
    live = onnx.load(external(tmp_path, "w.bin"), load_external_data=False)
    with pytest.raises(BadArgumentError, match="'w' are in a file beside the model; pass the path of the model"):
        adapters.read(live)


def test_models_larger_than_two_gigabytes(tmp_path: Path) -> None:
    path = external(tmp_path, "w.bin", offset=3 * 2**30, shape=(64, 48))
    with (tmp_path / "w.bin").open("wb") as file:
        file.seek(3 * 2**30)  # a hole, which takes no room
        file.write(W.tobytes())
    np.testing.assert_array_equal(adapters.read(path).layers[0].weight, W.T)


@pytest.mark.parametrize("outside", [False, True], ids=["inside", "external"])
def test_no_weight_is_read_before_it_is_asked_for(outside: bool, tmp_path: Path) -> None:
    size = 2**20
    constants = {f"w{i}": np.zeros((1024, size // 1024), dtype="f4") for i in range(8)}
    model = graph(*(node("MatMul", f"x {name}", output=f"y_{name}") for name in constants), **constants)
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=outside)
    tracemalloc.start()
    try:
        network = adapters.read(tmp_path / "model.onnx")
        assert tracemalloc.get_traced_memory()[1] < size
        for layer in network.layers:
            assert layer.weight.shape == (1024, 1024)
        assert tracemalloc.get_traced_memory()[1] < 2 * 4 * size
    finally:
        tracemalloc.stop()


# ---------------------------------------------------------------------------------------------------------------------
# Which files are ONNX, and what is wrong with those that are not


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(graph(node("MatMul", "x w"), w=W).SerializeToString())
    return path


@pytest.mark.parametrize("name", ["model", "model.pb", "model.bin", "model.ONNX"])
def test_a_file_is_known_by_its_content(name: str, file: Path) -> None:
    other = file.rename(file.with_name(name))
    assert adapter.handles(other)
    assert len(adapter.read(other).layers) == 1


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x08",
        b"\x08\x0a",
        b"\x08\x0a\x3a\x00",
        b"PK\x03\x04" + bytes(60),
        b"\x00" * 100,
        b"hello world\n",
        bytes(range(256)),
    ],
)
def test_other_files_are_none(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(content)
    assert not adapter.handles(path)
    assert not adapter.handles(tmp_path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"PK\x03\x04" + bytes(60), "looks like a zip archive"),
        (b"\x89HDF\r\n\x1a\n" + bytes(60), "looks like an HDF5 file"),
        (b"\x80\x02}q\x00.", "looks like a pickled object"),
        (b"version https://git-lfs.github.com/spec/v1\n", "looks like a pointer of Git LFS"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{}", "looks like a safetensors file"),
        (b"    ORTM" + bytes(20), "looks like a model in onnxruntime's own format"),
        (b"hello world, this is text\n", "is no ONNX model, or was cut short"),
        (b"\x08\x0a", "it holds no graph"),
    ],
)
def test_mislabelled_files_are_named(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(BadArgumentError, match=says) as caught:
        adapter.read(path)
    assert "\n" not in str(caught.value)
    assert repr(str(path)) in str(caught.value)


def test_a_version_of_tomorrow_is_read(file: Path) -> None:
    model = onnx.load(file)
    model.ir_version = 99
    model.opset_import[0].version = 999
    file.write_bytes(model.SerializeToString())
    assert adapters.read(file).framework == "ONNX opset 999"


@pytest.mark.parametrize("node_only", [True, False])
def test_a_graph_without_weights(node_only: bool, tmp_path: Path) -> None:
    path = tmp_path / "empty.onnx"
    path.write_bytes((graph(node("Relu", "x")) if node_only else graph(node("Add", "x b"), b=W[0])).SerializeToString())
    with pytest.raises(UnsupportedModelError, match="empty holds no weights that could be reported on"):
        adapters.read(path)


def test_types_that_hold_no_real_numbers_are_named() -> None:
    model = graph(node("MatMul", "x w"), w=W, c=W.astype("c8"), s=np.array([["a", "b"], ["c", "d"]]), i=W.astype("i8"))
    found = adapters.read(model)
    assert [layer.name for layer in found.layers] == ["w"]
    assert [(one.name, one.reason) for one in found.skipped] == [
        ("c", "is of type complex64, which qvis does not read")
    ]


def test_tensors_with_fewer_numbers_than_their_shape(tmp_path: Path) -> None:
    for field in ("raw_data", "float_data"):
        tensor = TensorProto(name="w", dims=[3, 4], data_type=TensorProto.FLOAT)
        if field == "raw_data":
            tensor.raw_data = bytes(44)
        else:
            tensor.float_data.extend([1.0] * 11)
        path = tmp_path / "short.onnx"
        path.write_bytes(graph(node("MatMul", "x w"), w=tensor).SerializeToString())
        with pytest.raises(BadArgumentError, match=r"'w' of shape \(3, 4\) holds 44 of 48 bytes"):
            adapters.read(path)


def test_shapes_that_no_memory_holds(tmp_path: Path) -> None:
    for dims in ([2**40, 2**40], [-1, 4], [0, 2**62]):
        tensor = TensorProto(name="w", dims=dims, data_type=TensorProto.FLOAT, raw_data=b"")
        path = tmp_path / "huge.onnx"
        path.write_bytes(graph(node("MatMul", "x w"), w=tensor).SerializeToString())
        with pytest.raises(QvisError):
            adapters.read(path)


def test_functions_that_call_each_other_without_end(tmp_path: Path) -> None:
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("own", 1)]
    call = helper.make_node("F", ["a"], ["b"], domain="own")
    loop = helper.make_function("own", "F", ["a"], ["b"], [call], opsets)
    path = tmp_path / "loop.onnx"
    path.write_bytes(graph(node("F", "x", domain="own"), functions=[loop]).SerializeToString())
    with pytest.raises(BadArgumentError, match="nested deeper than 50 levels"):
        adapters.read(path)


def test_functions_that_multiply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("qvis.adapters.onnx.graph"), "_NODES", 1000)  # a function has the same name
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("own", 1)]
    functions = []
    for level in range(20):
        calls = [helper.make_node(f"F{level + 1}", ["a"], [f"b{i}"], domain="own") for i in range(4)]
        functions.append(helper.make_function("own", f"F{level}", ["a"], ["b0"], calls, opsets))
    path = tmp_path / "bomb.onnx"
    path.write_bytes(graph(node("F0", "x", domain="own"), functions=functions).SerializeToString())
    with pytest.raises(BadArgumentError, match="more than 1,000 nodes"):
        adapters.read(path)


def test_a_file_changed_after_it_was_listed(file: Path) -> None:
    (layer,) = adapters.read(file).layers
    file.write_bytes(b"")
    with pytest.raises(BadArgumentError, match="the tensor 'w' cannot be read"):
        _ = layer.weight


# ---------------------------------------------------------------------------------------------------------------------
# Damage


def rich() -> bytes:
    """A small model with something of everything that is read."""
    inner = helper.make_graph(
        [node("MatMul", "x w", output="z")], "g", [], [], [numpy_helper.from_array(W[:3, :3], "w")]
    )
    scaled = [node("DequantizeLinear", "q s", output="d", axis=0), node("Transpose", "d", output="t", perm=[1, 0])]
    nodes = [
        *scaled,
        node("Reshape", "t shape", output="r"),
        node("MatMul", "x r", "first", "h"),
        node("LSTM", "h lw lr", "lstm", "l", hidden_size=2, direction="bidirectional"),
        node("If", "l", output="y", then_branch=inner, else_branch=inner),
    ]
    return graph(
        *nodes,
        q=helper.make_tensor("q", TensorProto.INT4, (4, 6), [i % 15 - 7 for i in range(24)]),
        s=weights(4),
        shape=np.array([2, 3, 4]),
        lw=weights(2, 8, 4),
        lr=helper.make_tensor("lr", TensorProto.BFLOAT16, (2, 8, 2), weights(32)),
    ).SerializeToString()


def attempt(content: bytes, path: Path, read: Any) -> None:
    """Read a damaged file: a result or a QvisError, nothing else."""
    path.write_bytes(content)
    with suppress(QvisError):
        for layer in read(path).layers:
            assert layer.weight.ndim == 2


def test_truncated_files(tmp_path: Path) -> None:
    content = rich()
    for end in range(0, len(content), 3):
        attempt(content[:end], tmp_path / "model.onnx", adapter.read)


def test_altered_files(tmp_path: Path) -> None:
    content, chance = rich(), random.Random(0)
    for _ in range(700):
        damaged = bytearray(content)
        for _ in range(chance.choice([1, 1, 2, 8])):
            damaged[chance.randrange(len(damaged))] = chance.choice([0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)])
        attempt(bytes(damaged), tmp_path / "model.onnx", adapter.read)


def test_random_bytes(tmp_path: Path) -> None:
    chance = random.Random(1)
    for size in (1, 2, 7, 64, 1000):
        for _ in range(40):
            attempt(chance.randbytes(size), tmp_path / "model.onnx", adapter.read)
