"""What is read from the files of Keras, and that they are read without Keras."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qvis
from qvis import adapters
from qvis.errors import BadArgumentError, QvisError
from tests import keras_models
from tests.keras_models import assert_same

keras = keras_models.require()
import h5py  # noqa: E402

L = keras.layers
pytestmark = keras_models.QUIET
KINDS = ("keras", "weights.h5", "h5")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keras")
    for model in (keras_models.digits(), keras_models.everything()):
        save(model, folder)
    return folder


def save(model: Any, folder: Path) -> None:
    model.save(folder / f"{model.name}.keras")
    model.save_weights(folder / f"{model.name}.weights.h5")
    if model.name != "everything":  # Keras cannot write bfloat16 there
        model.save(folder / f"{model.name}.h5")


# ---------------------------------------------------------------------------------------------------------------------
# The same as from the model


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_of_a_trained_model_are_the_same_from_every_file(files: Path, kind: str) -> None:
    model = keras_models.digits()
    assert model.get_metrics_result()["accuracy"] > 0.9
    live, stored = qvis.analyze(model, fold=False), qvis.analyze(files / f"digits.{kind}")
    assert stored.framework.startswith("Keras")
    assert {one.name for one in live.layers} == {
        "stem",
        "depthwise",
        "separable/depthwise_kernel",
        "separable/pointwise_kernel",
        "head",
    }
    found = {one.name: one for one in stored.layers}
    assert live.parameters == stored.parameters
    for layer in live.layers:
        other = found.pop(layer.name)
        assert (layer.op, layer.shape, layer.channels) == (other.op, other.shape, other.channels)
        for name in ("min", "max", "mean", "std", "q25", "q50", "q75", "range", "relative_range"):
            expected, got = getattr(layer.statistics, name), getattr(other.statistics, name)
            np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
    assert not found


@pytest.mark.parametrize("name", ["digits", "everything"])
def test_a_whole_model_is_read_like_the_model_itself(files: Path, name: str) -> None:
    assert_same(getattr(keras_models, name)(), files / f"{name}.keras")


def test_an_h5_file_of_a_whole_model_is_read_like_the_model_itself(files: Path) -> None:
    assert_same(keras_models.digits(), files / "digits.h5")


def test_weights_alone_are_read_like_the_model_but_for_their_order(files: Path) -> None:
    for name in ("digits", "everything"):
        live = adapters.read(getattr(keras_models, name)())
        stored = adapters.read(files / f"{name}.weights.h5")
        found = {one.name: one for one in stored.layers}
        assert stored.name == name
        assert set(found) == {one.name for one in live.layers}
        assert stored.parameters == live.parameters
        for one in live.layers:
            np.testing.assert_array_equal(found[one.name].weight, one.weight)
            assert found[one.name].op == one.op


def test_an_unpacked_file_and_a_compressed_one_are_read_too(files: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(files / "digits.keras") as archive:
        archive.extractall(tmp_path / "folder")
        with zipfile.ZipFile(tmp_path / "packed.keras", "w", zipfile.ZIP_DEFLATED) as packed:
            for name in archive.namelist():
                packed.writestr(name, archive.read(name))
    assert_same(files / "digits.keras", tmp_path / "folder")
    assert_same(files / "digits.keras", tmp_path / "packed.keras")


def test_files_are_known_by_their_content(files: Path, tmp_path: Path) -> None:
    for kind in KINDS:
        shutil.copy(files / f"digits.{kind}", tmp_path / "model.bin")
        assert len(adapters.read(tmp_path / "model.bin").layers) == 5


def test_chunked_and_compressed_arrays_are_read(files: Path, tmp_path: Path) -> None:
    shutil.copy(files / "digits.weights.h5", tmp_path / "m.h5")
    with h5py.File(tmp_path / "m.h5", "a") as file:
        group = file["layers/dense/vars"]
        kernel = group["0"][...]
        del group["0"]
        group.create_dataset("0", data=kernel, chunks=(10, 10), compression="gzip")
    assert_same(files / "digits.weights.h5", tmp_path / "m.h5")


class Block(L.Layer):  # type: ignore[misc]
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.one = L.Dense(3, name="first")
        self.convs = [L.Conv1D(3, 2, padding="same"), L.DepthwiseConv1D(2, padding="same")]
        self.attention = L.MultiHeadAttention(2, 3, name="heads")
        self.mixed = L.EinsumDense("abc,cde->abde", (None, 2, 5), bias_axes="de", name="mixed")

    def build(self, shape: Any) -> None:
        self.table = self.add_weight(shape=(4, 3), name="table")
        super().build(shape)

    def call(self, x: Any) -> Any:
        x = self.one(x)
        for conv in self.convs:
            x = conv(x)
        return keras.ops.sum(self.mixed(self.attention(x, x)), axis=-2) + keras.ops.sum(self.table)


@pytest.mark.filterwarnings("ignore:.build.. was called on layer:UserWarning")
def test_layers_inside_layers_of_ones_own_are_told_by_what_the_file_has(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((4, 3)), Block(name="block"), L.Dense(2, name="head")], name="own")
    model.save(tmp_path / "m.keras")
    live = {one.name: one for one in adapters.read(model).layers}
    stored = {one.name: one for one in adapters.read(tmp_path / "m.keras").layers}
    assert stored["block/0"].op == "other"  # the file only numbers it
    np.testing.assert_array_equal(stored.pop("block/0").weight, live.pop("block/table").weight)
    assert set(stored) == set(live)
    for name, one in stored.items():
        assert (one.op, one.channels) == (live[name].op, live[name].channels), name
        np.testing.assert_array_equal(one.weight, live[name].weight)
    assert stored["block/first"].notes == ("the type of the layer is guessed from the shapes of its arrays",)


def test_int8_weights_and_low_rank_updates_are_read_like_in_the_model(tmp_path: Path) -> None:
    model = keras.Sequential(
        [
            keras.Input((4,), dtype="int32"),
            L.Embedding(9, 6, name="embedding"),
            L.EinsumDense("abc,cde->abed", (4, 3, 2), bias_axes="ed", name="einsum"),
            L.Reshape((4, 6)),
            L.Dense(5, name="dense"),
        ],
        name="q",
    )
    model.layers[-1].enable_lora(2)
    model.layers[-1].lora_kernel_b.assign(np.ones((2, 5), np.float32))
    model.save(tmp_path / "lora.keras")
    live, stored = adapters.read(model), adapters.read(tmp_path / "lora.keras")
    for one, other in zip(live.layers, stored.layers, strict=True):
        np.testing.assert_allclose(one.weight, other.weight, rtol=1e-6, atol=1e-7)
    model = keras.Sequential([keras.Input((4,), dtype="int32"), *model.layers[:-1]], name="q")
    model.quantize("int8")
    model.save(tmp_path / "int8.keras")
    assert_same(model, tmp_path / "int8.keras")
    assert adapters.read(tmp_path / "int8.keras").layers[0].notes == ("dequantized from int8",)


def test_a_lambda_layer_is_named_and_not_run(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((3,)), L.Lambda(lambda x: x, name="code"), L.Dense(2, name="d")])
    model.save(tmp_path / "m.keras")
    network = adapters.read(tmp_path / "m.keras")
    assert [one.name for one in network.layers] == ["d"]
    assert [(one.name, "not run" in one.reason) for one in network.skipped] == [("code", True)]


# ---------------------------------------------------------------------------------------------------------------------
# Files of Keras 2


def keras_2(path: Path, *, whole: bool) -> dict[str, Any]:
    """A file as Keras 2 writes it; returns the arrays."""
    rng = np.random.default_rng(0)
    shapes = {
        "conv": {"conv/kernel:0": (3, 3, 2, 4), "conv/bias:0": (4,)},
        "depthwise": {"depthwise/depthwise_kernel:0": (3, 3, 4, 1), "depthwise/bias:0": (4,)},
        "separable": {
            "separable/depthwise_kernel:0": (3, 3, 4, 1),
            "separable/pointwise_kernel:0": (1, 1, 4, 6),
            "separable/bias:0": (6,),
        },
        "nested": {"dense/kernel:0": (6, 5), "dense/bias:0": (5,)},
        "both": {
            f"both/{way}_lstm/lstm_cell/{name}:0": shape
            for way in ("forward", "backward")
            for name, shape in {"kernel": (5, 8), "recurrent_kernel": (2, 8), "bias": (8,)}.items()
        },
        "attention": {
            "attention/query/kernel:0": (5, 2, 3),
            "attention/query/bias:0": (2, 3),
            "attention/attention_output/kernel:0": (2, 3, 5),
        },
    }

    def layer(kind: str, name: str, **config: Any) -> dict[str, Any]:
        return {"class_name": kind, "config": {"name": name, **config}}

    inner = [layer("Dense", "dense", units=5)]
    config = {
        "class_name": "Functional",
        "config": {
            "name": "old",
            "layers": [
                layer("Conv2D", "conv"),
                layer("DepthwiseConv2D", "depthwise"),
                layer("SeparableConv2D", "separable"),
                layer("Sequential", "nested", layers=inner),
                layer("Bidirectional", "both", layer=layer("LSTM", "lstm", units=2)),
                layer("MultiHeadAttention", "attention"),
            ],
        },
    }
    arrays = {}
    with h5py.File(path, "w") as file:
        group = file.create_group("model_weights") if whole else file
        if whole:
            file.attrs["model_config"] = json.dumps(config)
            file.create_group("optimizer_weights")["Adam/conv/kernel/m:0"] = np.zeros((3, 3))
        group.attrs["layer_names"] = np.array(list(shapes), dtype="S")
        group.attrs["keras_version"] = b"2.15.0"
        for name, held in shapes.items():
            inner_group = group.create_group(name)
            inner_group.attrs["weight_names"] = np.array(list(held), dtype="S")
            for weight, shape in held.items():
                arrays[weight] = rng.normal(size=shape).astype(np.float32)
                inner_group[weight] = arrays[weight]
    return arrays


@pytest.mark.parametrize("whole", [True, False])
def test_files_of_keras_2_are_read(tmp_path: Path, whole: bool) -> None:
    arrays = keras_2(tmp_path / "old.h5", whole=whole)
    network = adapters.read(tmp_path / "old.h5")
    assert (network.name, network.framework) == ("old", "Keras 2.15.0")
    found = {one.name: one for one in network.layers}
    expected = {
        "conv": ("Conv2D", arrays["conv/kernel:0"].reshape(-1, 4).T),
        "depthwise": ("DepthwiseConv2D", arrays["depthwise/depthwise_kernel:0"].reshape(9, 4).T),
        "separable/depthwise_kernel": ("SeparableConv2D", arrays["separable/depthwise_kernel:0"].reshape(9, 4).T),
        "separable/pointwise_kernel": ("SeparableConv2D", arrays["separable/pointwise_kernel:0"].reshape(4, 6).T),
        "nested/dense": ("Dense", arrays["dense/kernel:0"].T),
        "attention/query": ("EinsumDense", arrays["attention/query/kernel:0"].reshape(5, 6).T),
        "attention/attention_output": ("EinsumDense", arrays["attention/attention_output/kernel:0"].reshape(6, 5).T),
    }
    for way in ("forward", "backward"):
        for kernel in ("kernel", "recurrent_kernel"):
            array = arrays[f"both/{way}_lstm/lstm_cell/{kernel}:0"]
            for index, gate in enumerate("ifco"):
                expected[f"both/{way}_lstm/{kernel}/{gate}"] = ("LSTM", array[:, 2 * index : 2 * index + 2].T)
    assert list(found) == [name for name in found if name in expected]
    assert set(found) == set(expected)
    for name, (op, matrix) in expected.items():
        assert found[name].op == op, name
        np.testing.assert_array_equal(found[name].weight, matrix)
    assert network.parameters == sum(array.size for array in arrays.values())


# ---------------------------------------------------------------------------------------------------------------------
# Without Keras

BLOCKED = """
import sys
for name in ("tensorflow", "keras", "torch", "tf_keras"):
    sys.modules[name] = None
import qvis
for path in sys.argv[1:]:
    report = qvis.analyze(path)
    assert report.layers, path
"""


def test_files_are_read_where_no_framework_is_installed(files: Path) -> None:
    paths = [str(path) for path in sorted(files.iterdir())]
    subprocess.run([sys.executable, "-c", BLOCKED, *paths], check=True)


def test_without_h5py_the_error_says_what_to_install(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(BadArgumentError, match="needs the package 'h5py' to be read; install it"):
        adapters.read(files / "digits.keras")


def test_a_file_is_reported_on_from_the_shell(files: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "qvis", "report", str(files / "digits.keras"), "-o", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    assert "separable" in (tmp_path / "relative_weight_ranges.html").read_text("utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Bad files


def without_weights(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", "{}")


def encrypted(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", "{}")
        archive.writestr("model.weights.h5", "secret")
    data = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = data.find(mark)
        while start >= 0:
            data[start + offset] |= 1
            start = data.find(mark, start + 1)
    path.write_bytes(bytes(data))


def broken_config(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", "{")
        archive.writestr("model.weights.h5", b"\x89HDF\r\n\x1a\n")


def foreign(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["table"] = np.zeros((3, 3))


def linked(path: Path) -> None:
    with h5py.File(path.parent / "secret.h5", "w") as file:
        file["0"] = np.zeros((3, 3), np.float32)
    with h5py.File(path, "w") as file:
        file.create_group("layers/dense/vars")["0"] = h5py.ExternalLink("secret.h5", "0")


def elsewhere(path: Path) -> None:
    (path.parent / "secret.raw").write_bytes(bytes(36))
    with h5py.File(path, "w") as file:
        group = file.create_group("layers/dense/vars")
        group.create_dataset("0", (3, 3), "f4", external=[(str(path.parent / "secret.raw"), 0, 36)])


def endless(path: Path) -> None:
    with h5py.File(path, "w") as file:
        group = file.create_group("layers/dense")
        group["again"] = group


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("m.keras", lambda path: path.write_bytes(b""), "is empty"),
        ("m.h5", lambda path: path.write_bytes(b""), "is empty"),
        ("m.keras", lambda path: path.write_bytes(b"PK\x03\x04"), "damaged, or no file of Keras, or was cut short"),
        ("m.keras", lambda path: path.write_text("model"), "neither a .keras nor an HDF5 file"),
        ("m.h5", lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(9)), "damaged"),
        ("m.keras", without_weights, "holds no weights"),
        ("m.keras", encrypted, "is encrypted"),
        ("m.keras", broken_config, "damaged"),
        ("m.h5", foreign, "without weights that Keras wrote"),
        ("m.h5", linked, "is a link, which could point outside"),
        ("m.h5", elsewhere, "keeps its numbers in another file"),
        ("m.h5", endless, "damaged"),
    ],
)
def test_a_bad_file_gives_one_clear_line(tmp_path: Path, name: str, make: Callable[[Path], Any], message: str) -> None:
    make(tmp_path / name)
    with pytest.raises(BadArgumentError, match=message) as caught:
        adapters.read(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_cut_and_altered_files_are_read_or_refused(files: Path, tmp_path: Path, kind: str) -> None:
    data = (files / f"digits.{kind}").read_bytes()
    rng = random.Random(0)
    path = tmp_path / f"m.{kind}"
    counts = Counter[str]()
    for turn in range(40):
        if turn % 2:
            altered = bytearray(data)
            for _ in range(8):
                altered[rng.randrange(min(len(data), 1 << rng.randrange(4, 20)))] = rng.randrange(256)
            path.write_bytes(bytes(altered))
        else:
            path.write_bytes(data[: rng.randrange(len(data))])
        message = outcome(path)
        assert "\n" not in message
        counts["refused" if message else "read"] += 1
    assert counts["refused"] > 15


def outcome(path: Path) -> str:
    """Why a file is refused; nothing where it is read."""
    try:
        for layer in adapters.read(path).layers:
            assert layer.weight.ndim == 2
    except QvisError as error:
        return str(error)
    return ""
