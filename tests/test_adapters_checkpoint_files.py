"""Files that are damaged, mislabelled, hostile or incomplete: one clear line each, and nothing in them is run."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from qvis import adapters
from qvis.errors import BadArgumentError, QvisError, UnsupportedModelError

ONES = np.ones((2, 2), np.float32)


@cache
def valid(kind: str) -> bytes:
    """A small file of each kind."""
    rng = np.random.default_rng(0)
    arrays = {"a.weight": rng.normal(size=(3, 4)).astype(np.float32), "b": np.arange(6.0).reshape(2, 3)}
    if kind == "safetensors":
        return safetensors.numpy.save(arrays, metadata={"format": "np"})
    buffer = io.BytesIO()
    if kind == "npz":
        np.savez(buffer, **arrays)
    elif kind == "compressed":
        np.savez_compressed(buffer, **arrays)
    else:
        state = {name: torch.from_numpy(array) for name, array in arrays.items()}
        torch.save(state, buffer, _use_new_zipfile_serialization=kind == "torch")
    return buffer.getvalue()


KINDS = {"safetensors": "m.safetensors", "npz": "m.npz", "compressed": "c.npz", "torch": "m.pt", "legacy": "m.pth"}


def message(path: Path) -> str:
    """The one line that reading the file gives."""
    with pytest.raises(QvisError) as caught:
        read_all(path)
    text = str(caught.value)
    assert "\n" not in text
    assert repr(str(path))[1:-1] in text or path.is_dir() or path.stem in text
    return text


def outcome(path: Path) -> str:
    """The error of reading the file, empty where there is none."""
    try:
        read_all(path)
    except QvisError as error:
        return str(error)
    return ""


def read_all(path: Path) -> list[float]:
    """Every number of every layer."""
    with np.errstate(all="ignore"):
        return [float(layer.weight.sum(dtype=np.float64)) for layer in adapters.read(path).layers]


# ---------------------------------------------------------------------------------------------------------------------
# What a file is


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("name", ["m.safetensors", "m.npz", "m.pt", "m.bin", "m.xyz", "noending"])
def test_a_mislabelled_file_is_read_as_what_it_is(kind: str, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(valid(kind))
    assert [layer.name for layer in adapters.read(tmp_path / name).layers] == ["a", "b"]


@pytest.mark.parametrize("name", list(KINDS.values()))
def test_an_empty_file_is_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    assert "is empty" in message(tmp_path / name) or "cut short" in message(tmp_path / name)


@pytest.mark.parametrize("name", list(KINDS.values()))
def test_a_text_file_is_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    assert "Git LFS" in message(tmp_path / name)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.99])
def test_a_truncated_file_is_one_line(kind: str, share: float, tmp_path: Path) -> None:
    content = valid(kind)
    path = tmp_path / KINDS[kind]
    path.write_bytes(content[: int(len(content) * share)])
    assert "cut short" in message(path) or "damaged" in message(path)


def test_an_unreadable_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").symlink_to(tmp_path / "nowhere")
    with pytest.raises(BadArgumentError, match="there is no file"):
        adapters.read(tmp_path / "m.safetensors")


def test_an_encrypted_file_is_one_line(tmp_path: Path) -> None:
    for kind in ("npz", "torch"):
        content = bytearray(valid(kind))
        for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            start = content.find(mark)
            while start >= 0:
                content[start + place] |= 1
                start = content.find(mark, start + 4)
        path = tmp_path / KINDS[kind]
        path.write_bytes(content)
        assert "encrypted" in message(path)


def test_a_file_that_changes_while_it_is_read_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(valid("safetensors"))
    (layer, _) = adapters.read(path).layers
    path.write_bytes(b"")
    with pytest.raises(BadArgumentError, match="no longer what it was"):
        layer.weight.sum()


# ---------------------------------------------------------------------------------------------------------------------
# safetensors


def header(entries: Any, numbers: int = 16) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + bytes(numbers)


def entry(**changes: Any) -> dict[str, Any]:
    return {"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **changes}}


DEEP = b'{"a":' * 100_000


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\0" * 8, "should have 0"),
        (b"\xff" * 16, "should have"),
        (header(b"{}" + b" " * 10)[:12], "should have"),
        (header(b"[1, 2]"), "no table"),
        (header(b'{"w": 1}'), "cut short"),
        (header(b"\xff\xfe{}"), "cut short"),
        (header(DEEP), "cut short"),
        (header({"__metadata__": 3, **entry()}), "no table"),
        (header(entry(shape=[2, 3])), "has 16 bytes"),
        (header(entry(shape=[-2, -2])), "no proper"),
        (header(entry(shape=[2.0, 2])), "no proper"),
        (header(entry(shape=[True, 4])), "no proper"),
        (header(entry(shape=[2**60, 2**60])), "fits into no file"),
        (header(entry(shape=[1] * 40 + [2, 2])), "has 42 axes"),
        (header(entry(data_offsets=[0, 16, 32])), "no proper"),
        (header(entry(data_offsets=[16, 0])), "cut short"),
        (header(entry(data_offsets=[8, 24]), 24), "leave a gap at byte 0"),
        (header(entry(), 12), "should have 16 bytes and have 12"),
        (header(entry(), 20), "should have 16 bytes and have 20"),
        (header({**entry(), "v": entry()["w"]}), "overlap at byte 0"),
        (header(b'{"w":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},"w":{}}'), "'w' is in its header twice"),
        (header({}, 0), "holds no weights"),
        (header(entry(dtype="F3", data_offsets=[0, 16])), "has a type unknown here"),
    ],
)
def test_a_damaged_header_is_one_line(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(content)
    assert said in message(tmp_path / "m.safetensors")


def test_tensors_that_do_not_start_at_a_multiple_of_their_size_are_read(tmp_path: Path) -> None:
    numbers = np.arange(4, dtype="<f4").reshape(2, 2)
    text = json.dumps({"m": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, **entry(data_offsets=[1, 17])})
    content = len(text).to_bytes(8, "little") + text.encode() + b"\0" + numbers.tobytes()
    (tmp_path / "m.safetensors").write_bytes(content)
    (layer,) = adapters.read(tmp_path / "m.safetensors").layers
    np.testing.assert_array_equal(layer.weight, numbers)


# ---------------------------------------------------------------------------------------------------------------------
# Pickles


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (Path.touch, (self.path,))


def pickled(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["m.pt", "m.bin", "m.pkl"])
def test_nothing_that_is_pickled_is_run(name: str, tmp_path: Path) -> None:
    for make in (pickle.dumps, pickled, lambda value: pickled({"state_dict": {"w": torch.ones(2, 2)}, "x": value})):
        (tmp_path / name).write_bytes(make(Bomb(tmp_path / "run")))
        text = message(tmp_path / name)
        assert "could run code" in text
        assert "torch.load" in text
        assert not (tmp_path / "run").exists()


def test_arrays_of_objects_are_not_unpickled(tmp_path: Path) -> None:
    objects = np.empty((2, 2), object)
    objects[:] = Bomb(tmp_path / "run")
    np.savez(tmp_path / "m.npz", w=objects, good=ONES)
    network = adapters.read(tmp_path / "m.npz")
    assert [layer.name for layer in network.layers] == ["good"]
    assert network.skipped[0].reason == "holds Python objects, and unpickling them could run code"
    assert not (tmp_path / "run").exists()


def test_a_whole_model_is_refused_with_the_way_out(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "m.pt")
    assert "or save its state_dict()" in message(tmp_path / "m.pt")


@pytest.mark.parametrize("length", [0x280, 0x380, 0x480, 0x580])
def test_a_header_whose_length_looks_like_the_start_of_a_pickle_is_none(length: int, tmp_path: Path) -> None:
    header = json.dumps({"w.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}).encode()
    content = length.to_bytes(8, "little") + header.ljust(length) + ONES[:2, :2].astype("<f4").tobytes()
    assert content[0] == 0x80
    (tmp_path / "m.bin").write_bytes(content)
    assert adapters.read(tmp_path / "m.bin").framework == "safetensors"


def test_other_formats_of_torch_are_named_or_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        for name in ("m/data.pkl", "m/constants.pkl", "m/code/__torch__.py"):
            archive.writestr(name, b"")
    assert "a TorchScript program; load it with torch.jit.load" in message(tmp_path / "script.pt")
    program = torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),))
    torch.export.save(program, tmp_path / "m.pt2")
    shutil.move(tmp_path / "m.pt2", tmp_path / "exported.pt")
    assert [layer.op for layer in adapters.read(tmp_path / "exported.pt").layers] == ["Linear"]


@pytest.mark.parametrize(
    ("value", "said"),
    [([torch.ones(2, 2)], "holds a list"), ({"epoch": 3}, "no weights"), ({"a": {}}, "no weights")],
)
def test_what_is_no_state_dict_is_named(value: object, said: str, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "m.pt")
    assert said in message(tmp_path / "m.pt")


def test_the_state_of_an_optimizer_is_no_layer(tmp_path: Path) -> None:
    state = {"encoder": {"fc.weight": torch.ones(2, 2)}, "optim": {"state": {0: {"exp_avg": torch.ones(2, 2)}}}}
    torch.save(state, tmp_path / "m.pt")
    network = adapters.read(tmp_path / "m.pt")
    assert [layer.name for layer in network.layers] == ["encoder.fc"]
    assert [(one.name, one.reason) for one in network.skipped] == [("optim", "is the state of an optimizer")]


# ---------------------------------------------------------------------------------------------------------------------
# npz


def test_arrays_that_numpy_cannot_name_are_skipped(tmp_path: Path) -> None:
    import ml_dtypes

    np.savez(
        tmp_path / "m.npz",
        good=np.ones((2, 2), ">f8"),
        long=np.ones((2, 2), np.longdouble),
        fortran=np.asfortranarray(np.arange(6, dtype=np.float16).reshape(2, 3)),
        bfloat=np.ones((2, 2), ml_dtypes.bfloat16),
        text=np.full((2, 2), "a"),
        record=np.zeros((2, 2), [("a", "f4")]),
        imaginary=np.ones((2, 2), complex),
    )
    network = adapters.read(tmp_path / "m.npz")
    read = {layer.name: layer.weight for layer in network.layers}
    assert {name: array.dtype.name for name, array in read.items()} == {
        "good": "float64",
        "long": "float64",
        "fortran": "float32",
    }
    np.testing.assert_array_equal(read["fortran"], np.arange(6).reshape(2, 3))
    reasons = {one.name: one.reason for one in network.skipped}
    assert "does not say of which type" in reasons["bfloat"]
    assert "is complex" in reasons["imaginary"]
    assert "holds no numbers" in reasons["text"]
    assert "holds no numbers" in reasons["record"]


def test_an_array_of_a_later_version_is_skipped(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.npz", "w") as archive:
        buffer = io.BytesIO()
        np.save(buffer, ONES)
        archive.writestr("good.npy", buffer.getvalue())
        archive.writestr("new.npy", buffer.getvalue().replace(b"NUMPY\x01", b"NUMPY\x09"))
    network = adapters.read(tmp_path / "m.npz")
    assert [(one.name, one.reason) for one in network.skipped] == [("new", "is of version (9, 0) of the .npy format")]


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def sharded(folder: Path, kind: str = "safetensors") -> Path:
    """Two shards and their index, as Transformers writes them."""
    folder.mkdir(exist_ok=True)
    stem, ending = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    weight_map = {}
    for number, names in enumerate((["layers.10.weight", "layers.2.weight"], ["norm.bias", "head.weight"]), 1):
        file = f"{stem}-0000{number}-of-00002.{ending}"
        tensors = {name: np.full((2, 2), number, np.float32) for name in names}
        weight_map.update(dict.fromkeys(names, file))
        if kind == "safetensors":
            safetensors.numpy.save_file(tensors, folder / file)
        else:
            torch.save({name: torch.from_numpy(array) for name, array in tensors.items()}, folder / file)
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_shards_are_one_model(kind: str, tmp_path: Path) -> None:
    folder = sharded(tmp_path / "llm", kind)
    expected = ["head", "layers.2", "layers.10", "norm.bias"]
    network = adapters.read(folder)
    assert network.name == "llm"
    assert [layer.name for layer in network.layers] == expected
    assert [float(layer.weight[0, 0]) for layer in network.layers] == [2, 1, 1, 2]
    (index,) = folder.glob("*.index.json")
    assert [layer.name for layer in adapters.read(index).layers] == expected


def test_links_out_of_the_folder_are_followed(tmp_path: Path) -> None:
    sharded(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    assert len(adapters.read(tmp_path / "snapshot").layers) == 4


@pytest.mark.parametrize("name", ["model.safetensors", "odd name.safetensors", "pytorch_model.bin"])
def test_a_folder_with_one_file_of_weights_is_that_file(name: str, tmp_path: Path) -> None:
    content = valid("torch" if name.endswith(".bin") else "safetensors")
    (tmp_path / name).write_bytes(content)
    (tmp_path / "config.json").write_text("{}")
    assert len(adapters.read(tmp_path).layers) == 2


def test_what_is_pickled_is_read_only_where_there_is_nothing_better(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
    assert len(adapters.read(tmp_path).layers) == 4


def test_missing_shards_are_named(tmp_path: Path) -> None:
    (sharded(tmp_path) / "model-00002-of-00002.safetensors").unlink()
    assert "names 2 files, of which 'model-00002-of-00002.safetensors' missing" in message(tmp_path)


def test_several_files_without_an_index_are_one_line(tmp_path: Path) -> None:
    (sharded(tmp_path) / "model.safetensors.index.json").unlink()
    assert "holds 2 files of weights ('model-00001-of-00002.safetensors', " in message(tmp_path)


@pytest.mark.parametrize("names", [(), ("readme.md",)])
def test_a_folder_without_weights_is_one_line(names: tuple[str, ...], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(UnsupportedModelError, match="cannot read the folder"):
        adapters.read(tmp_path)


@pytest.mark.parametrize("place", ["../model.safetensors", "/etc/passwd", "a/../../b", r"..\b", r"C:\b", "a\0b"])
def test_an_index_cannot_lead_out_of_its_folder(place: str, tmp_path: Path) -> None:
    sharded(tmp_path / "in")
    shutil.copy(tmp_path / "in" / "model-00001-of-00002.safetensors", tmp_path / "model.safetensors")
    index = tmp_path / "in" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"layers.2.weight": place}}))
    assert "outside its folder; that is refused" in message(tmp_path / "in")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "{" * 9, "\0"])
def test_a_damaged_index_is_one_line(content: str, tmp_path: Path) -> None:
    (sharded(tmp_path) / "model.safetensors.index.json").write_text(content)
    assert "no index of weights" in message(tmp_path)


def test_an_index_and_shards_of_different_versions_are_one_line(tmp_path: Path) -> None:
    index = sharded(tmp_path) / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"]["lost.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(table))
    assert "says that 'lost.weight' is in 'model-00001-of-00002.safetensors', and it is not" in message(tmp_path)
    del table["weight_map"]["lost.weight"], table["weight_map"]["layers.2.weight"]
    index.write_text(json.dumps(table))
    (skipped,) = adapters.read(tmp_path).skipped
    assert skipped.name == "layers.2.weight"
    assert "model.safetensors.index.json does not name it" in skipped.reason


def test_an_index_of_itself_is_one_line(tmp_path: Path) -> None:
    name = "model.safetensors.index.json"
    (tmp_path / name).write_text(json.dumps({"weight_map": {"a": name}}))
    assert "no file of weights" in message(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Anything at all


@pytest.mark.parametrize("kind", list(KINDS))
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_a_mutated_file_is_read_or_refused_in_one_line(kind: str, tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(valid(kind))
    for _ in range(data.draw(st.integers(0, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))
    path = tmp_path / KINDS[kind]
    path.write_bytes(content[:cut] + data.draw(st.binary(max_size=8)))
    assert "\n" not in outcome(path)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    header_content=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from(["F32", "BF16", "F8_E4M3"]),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from(["w", "__metadata__", "dtype", "shape", "data_offsets", "format"]), inner, max_size=4
            )
        ),
        max_leaves=12,
    )
)
def test_any_header_is_read_or_refused_in_one_line(header_content: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(header(header_content))
    assert "\n" not in outcome(path)
