"""What is read from TensorFlow Lite files: conversions of Keras models, and files made by hand."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qvis import adapters
from qvis.adapters import tflite as adapter
from qvis.adapters.tflite import names as tflite_names
from qvis.errors import BadArgumentError, QvisError, UnsupportedModelError
from qvis.layers import Layer
from qvis.quantization.grids import Scheme

interpreters = pytest.importorskip("ai_edge_litert.interpreter")

KINDS = ["float", "dynamic", "float16", "int8", "int16x8"]
CONVERT = """
import sys
import keras, numpy as np, tensorflow as tf
from sklearn.datasets import load_digits

folder = sys.argv[1]
keras.utils.set_random_seed(0)
digits = load_digits()
images = (digits.images[..., None] / 16).astype("f4")
layers = keras.layers
model = keras.Sequential([
    keras.Input((8, 8, 1), batch_size=1),
    layers.Conv2D(32, 3, name="stem"),
    layers.ReLU(),
    layers.DepthwiseConv2D(3, depth_multiplier=2, padding="same", name="depth"),
    layers.ReLU(),
    layers.Conv2DTranspose(16, 2, strides=2, name="up"),
    layers.Conv2D(16, 3, strides=2, activation="relu", name="down"),
    layers.Flatten(),
    layers.Dense(64, activation="relu", name="hidden"),
    layers.Dense(10, name="head"),
])
training = keras.Sequential([keras.Input((8, 8, 1)), *model.layers])
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
training.compile("adam", loss)
training.fit(images, digits.target, epochs=2, verbose=0)
np.savez(f"{folder}/kernels.npz", **{layer.name: layer.get_weights()[0] for layer in model.layers if layer.weights})

def save(name, model, **options):
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    supported = options.pop("supported", {})
    for key, value in options.items():
        setattr(converter, key, value)
    for key, value in supported.items():
        setattr(converter.target_spec, key, value)
    open(f"{folder}/{name}.tflite", "wb").write(converter.convert())

small = {"optimizations": [tf.lite.Optimize.DEFAULT]}
seen = {"representative_dataset": lambda: ([image[None]] for image in images[:20])}
wide = [tf.lite.OpsSet.EXPERIMENTAL_TFLITE_BUILTINS_ACTIVATIONS_INT16_WEIGHTS_INT8]
save("float", model)
save("dynamic", model, **small)
save("float16", model, **small, supported={"supported_types": [tf.float16]})
save("int8", model, **small, **seen)
save("int16x8", model, **small, **seen, supported={"supported_ops": wide})

tokens = keras.Input((7,), batch_size=1, dtype="int32")
hidden = layers.Embedding(20, 8, name="tokens")(tokens)
hidden = layers.LSTM(6, return_sequences=True, name="lstm")(hidden)
hidden = layers.MultiHeadAttention(2, 3, name="attention")(hidden, hidden)
model = keras.Model(tokens, layers.Dense(3, name="out")(hidden))
save("sequence", model)
np.savez(f"{folder}/sequence.npz", **{weight.path: weight.numpy() for weight in model.weights})
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All conversions, made in a process of their own: TensorFlow prints, and stays in memory."""
    pytest.importorskip("tensorflow")
    path = tmp_path_factory.mktemp("tflite")
    quiet = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "", "KERAS_BACKEND": "tensorflow"}
    made = subprocess.run([sys.executable, "-c", CONVERT, path], env=quiet, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr[-2000:]
    return path


Constants = dict[str, tuple[np.ndarray, dict[str, Any]]]


def interpreted(path: Path) -> Constants:
    """All constants of a file as the interpreter has them, by their names."""
    interpreter = interpreters.Interpreter(str(path))
    interpreter.allocate_tensors()
    found = {}
    for detail in interpreter.get_tensor_details():
        with suppress(ValueError):
            found[detail["name"]] = (interpreter.get_tensor(detail["index"]).copy(), detail["quantization_parameters"])
    return found


def layers(path: Path) -> dict[str, Layer]:
    """The layers by the last part of their names, without the number that the converter adds."""
    return {layer.name.rpartition("/")[2].removesuffix("_1"): layer for layer in adapters.read(path).layers}


def rows(kernel: np.ndarray, name: str) -> np.ndarray:
    """A Keras kernel as (channels, elements) in the order that TensorFlow Lite stores them in."""
    if name == "up":  # (height, width, out, in)
        return kernel.transpose(2, 0, 1, 3).reshape(kernel.shape[2], -1)
    if name == "depth":  # (height, width, in, multiplier)
        return kernel.reshape(-1, kernel.shape[2] * kernel.shape[3]).T
    return np.moveaxis(kernel, -1, 0).reshape(kernel.shape[-1], -1)


SHAPES = {
    "stem": ("CONV_2D", "axis 0"),
    "depth": ("DEPTHWISE_CONV_2D", "axis 3"),
    "up": ("TRANSPOSE_CONV", "axis 0"),
    "down": ("CONV_2D", "axis 0"),
    "hidden": ("FULLY_CONNECTED", "axis 0"),
    "head": ("FULLY_CONNECTED", "axis 0"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kernel_is_found_with_its_channels(kind: str, folder: Path) -> None:
    found = layers(folder / f"{kind}.tflite")
    assert {name: (layer.op, layer.channels) for name, layer in found.items()} == SHAPES
    kernels = np.load(folder / "kernels.npz")
    for name, layer in found.items():
        exact = rows(kernels[name], name)
        assert layer.weight.shape == exact.shape
        # Half a step of the grid; the layer's own where it has one for all channels.
        step = np.ptp(exact) / 254 if layer.dtype == "int8" else np.abs(exact).max() * 2**-11
        np.testing.assert_allclose(layer.weight, exact, rtol=0, atol=0 if layer.dtype == "float32" else step * 1.01)


def test_a_float_file_holds_the_kernels_themselves(folder: Path) -> None:
    assert {layer.dtype for layer in layers(folder / "float.tflite").values()} == {"float32"}
    assert adapters.read(folder / "float.tflite").framework == "TensorFlow Lite"


def test_half_floats_are_found_behind_their_conversion(folder: Path) -> None:
    kernels = np.load(folder / "kernels.npz")
    for name, layer in layers(folder / "float16.tflite").items():
        assert (layer.dtype, layer.notes) == ("float16", ())
        np.testing.assert_array_equal(layer.weight, rows(kernels[name], name).astype("f2").astype("f4"))


def constant_of(layer: Layer, name: str, theirs: Constants) -> tuple[np.ndarray, dict[str, Any]]:
    """The integers of a layer and their grid, as the interpreter has them."""
    stored = {"depth": "depthwise", "up": "conv_transpose", "hidden": "MatMul", "head": "MatMul"}
    mark = f"{name}_1/{stored.get(name, 'convolution')}"
    return next((a, g) for title, (a, g) in theirs.items() if mark in title and a.shape == layer.shape)


@pytest.mark.parametrize("kind", ["dynamic", "int8", "int16x8"])
def test_quantized_rows_are_those_of_the_interpreter(kind: str, folder: Path) -> None:
    theirs = interpreted(folder / f"{kind}.tflite")
    checked = 0
    for name, layer in layers(folder / f"{kind}.tflite").items():
        integers, grid = constant_of(layer, name, theirs)
        scales = np.asarray(grid["scales"], dtype="f4")
        if scales.size == 0:  # too small for the converter to quantize it
            assert layer.dtype == "float32"
            continue
        axis = grid["quantized_dimension"]
        spread = [-1 if one == axis and scales.size > 1 else 1 for one in range(integers.ndim)]
        real = (integers.astype("f4") - np.asarray(grid["zero_points"], "f4").reshape(spread)) * scales.reshape(spread)
        real = np.moveaxis(real, int(layer.channels[-1]), 0).reshape(layer.weight.shape)
        np.testing.assert_array_equal(layer.weight, real)
        plural = "scale" if scales.size == 1 else "scales"
        assert layer.notes == (f"int8, dequantized with {scales.size} {plural} (symmetric)",)
        checked += 1
    assert checked >= (len(SHAPES) if kind != "dynamic" else 3)


@pytest.mark.parametrize("kind", ["dynamic", "int8"])
def test_the_converter_rounds_as_the_grids_of_qvis(kind: str, folder: Path) -> None:
    theirs = interpreted(folder / f"{kind}.tflite")
    kernels = np.load(folder / "kernels.npz")
    checked = 0
    for name, layer in layers(folder / f"{kind}.tflite").items():
        scales = np.asarray(constant_of(layer, name, theirs)[1]["scales"])
        if scales.size == 0:
            continue
        exact = rows(kernels[name], name)
        fitted = Scheme(bits=8, granularity="tensor" if scales.size == 1 else "channel").fit(exact)
        np.testing.assert_allclose(fitted.scale.ravel(), scales, rtol=1e-6)
        codes = np.rint(layer.weight / fitted.scale)
        np.testing.assert_allclose(
            fitted.rounded()[codes == fitted.codes], layer.weight[codes == fitted.codes], rtol=1e-6
        )
        # the converter may go the other way from the middle of two codes
        halves = np.abs(np.abs(exact / fitted.scale - fitted.codes) - 0.5) < 1e-4
        assert (codes == fitted.codes)[~halves].all()
        checked += 1
    assert checked >= 3


def test_parameters_are_those_of_the_model(folder: Path) -> None:
    counts = {kind: adapters.read(folder / f"{kind}.tflite").parameters for kind in KINDS}
    kernels = np.load(folder / "kernels.npz")
    # Biases of zeros are left out by the converter, so that there may be fewer.
    least = sum(kernels[name].size for name in kernels)
    assert set(counts) == set(KINDS)
    assert all(least <= count <= least + 32 + 64 + 16 + 16 + 64 + 10 for count in counts.values()), counts


def test_graphs_inside_graphs_and_embeddings(folder: Path) -> None:
    found = adapters.read(folder / "sequence.tflite")
    exact = {path: array for path, array in np.load(folder / "sequence.npz").items() if array.ndim > 1}
    held = [layer.weight for layer in found.layers]
    for path, array in exact.items():
        if path.endswith("bias"):
            continue
        if path.startswith("tokens"):
            wanted = array
        elif "attention_output" in path:
            wanted = array.reshape(-1, array.shape[-1]).T
        else:
            wanted = array.reshape(array.shape[0], -1).T
        assert any(one.shape == wanted.shape and np.array_equal(one, wanted) for one in held), path
    assert {layer.op for layer in found.layers} == {"GATHER", "FULLY_CONNECTED"}
    assert not found.skipped


# ---------------------------------------------------------------------------------------------------------------------
# Files made by hand


class Builder:
    """Writes the few tables that a file needs, with the library of FlatBuffers."""

    def __init__(self) -> None:
        flatbuffers = pytest.importorskip("flatbuffers")
        self.builder = flatbuffers.Builder(0)

    def table(self, fields: dict[int, tuple[str, Any]]) -> int:
        self.builder.StartObject(max(fields, default=0) + 1)
        for number, (kind, value) in fields.items():
            if kind == "offset":
                self.builder.PrependUOffsetTRelativeSlot(number, value, 0)
            else:
                getattr(self.builder, f"Prepend{kind}Slot")(number, value, 0)
        return int(self.builder.EndObject())

    def offsets(self, values: list[int]) -> tuple[str, int]:
        self.builder.StartVector(4, len(values), 4)
        for value in reversed(values):
            self.builder.PrependUOffsetTRelative(value)
        return "offset", self.builder.EndVector()

    def array(self, values: Any) -> tuple[str, int]:
        return "offset", self.builder.CreateNumpyVector(np.asarray(values))

    def text(self, value: str) -> tuple[str, int]:
        return "offset", self.builder.CreateString(value)


def made(
    operator: int, weight: np.ndarray, kind: int, shape: list[int], options: Any = None, at: int = 1, **quantized: Any
) -> bytes:
    """A file of one operator with one weight, its second input or that at ``at``."""
    b = Builder()
    buffers = b.offsets([b.table({}), b.table({0: b.array(weight.view("u1").reshape(-1))})])
    grid: dict[int, tuple[str, Any]] = {}
    if quantized:
        grid[2] = b.array(np.asarray(quantized["scales"], dtype="f4"))
        grid[3] = b.array(np.asarray(quantized.get("zeros", [0]), dtype="i8"))
        grid[6] = ("Int32", quantized.get("axis", 0))
    fields = {0: b.array(np.array(shape, "i4")), 1: ("Int8", kind), 2: ("Uint32", 1), 3: b.text("a/w")}
    if grid:
        fields[4] = ("offset", b.table(grid))
    tensors = [b.table({3: b.text("x")}), b.table(fields), b.table({3: b.text("y")})]
    inputs = [0, 0, 0]
    inputs[at] = 1
    call = {1: b.array(np.array(inputs, "i4")), 2: b.array(np.array([2], "i4"))}
    if options is not None:
        call[4] = ("offset", b.table(options))
    operators = b.offsets([b.table(call)])
    graph = b.table({0: b.offsets(tensors), 3: operators})
    codes = b.offsets([b.table({0: ("Int8", min(operator, 127)), 3: ("Int32", operator)})])
    model = b.table({0: ("Uint32", 3), 1: codes, 2: b.offsets([graph]), 4: buffers})
    b.builder.Finish(model, b"TFL3")
    return bytes(b.builder.Output())


def only(content: bytes, folder: Path) -> Layer:
    path = folder / "made.tflite"
    path.write_bytes(content)
    (layer,) = adapters.read(path).layers
    return layer


M = np.arange(24, dtype="f4").reshape(4, 6)
V = np.arange(48, dtype="f4")
OPERATORS = {
    "volume": (132, V, [1, 2, 2, 3, 4], None, 1, "axis 4", V.reshape(-1, 4).T),
    "volume transposed": (
        141,
        V,
        [1, 2, 2, 4, 3],
        None,
        1,
        "axis 3",
        V.reshape(4, 4, 3).transpose(1, 0, 2).reshape(4, -1),
    ),
    "lookup": (7, M, [4, 6], None, 1, "axis 0", M),
    "gather": (36, M, [4, 6], None, 0, "axis 0", M),
    "product": (126, M, [4, 6], None, 1, "axis 1", M.T),
    "product turned": (126, M, [4, 6], {1: ("Int8", 1)}, 1, "axis 0", M),
    "product from the left": (126, M, [4, 6], None, 0, "axis 0", M),
    "products": (126, V, [2, 4, 6], None, 1, "axis 0 x axis 2", V.reshape(2, 4, 6).swapaxes(1, 2).reshape(12, 4)),
    "unknown": (18, M, [4, 6], None, 1, "axis 0", M),
}


@pytest.mark.parametrize("case", list(OPERATORS))
def test_the_operator_tells_where_the_channels_are(case: str, tmp_path: Path) -> None:
    operator, weight, shape, options, at, channels, wanted = OPERATORS[case]
    layer = only(made(operator, weight, 0, shape, options, at), tmp_path)
    assert (layer.name, layer.op == "other", layer.channels) == ("a/w", case == "unknown", channels)
    np.testing.assert_array_equal(layer.weight, wanted)


def test_gates_have_tensors_of_their_own() -> None:
    from qvis.adapters.tflite.parts import RULES, Operator
    from qvis.adapters.values import Tensor, Value

    def value(number: int) -> Value:
        return Value.of(Tensor(str(number), (2, 3), "float32", lambda: bytes(24)), number)

    for op, count, labels in (("UNIDIRECTIONAL_SEQUENCE_LSTM", 24, ["W.i", "R.o", "P"]), ("SVDF", 4, ["W", "R"])):
        parts = list(RULES[op](Operator(op, (), (), None), [value(number) for number in range(count)]))
        assert set(labels) <= {part.label for part in parts}
    both = RULES["BIDIRECTIONAL_SEQUENCE_LSTM"](Operator("", (), (), None), [value(number) for number in range(48)])
    assert {part.label: part.value.key for part in both}["backward.R.i"] == 22


def test_four_bits_and_zero_points(tmp_path: Path) -> None:
    packed = np.array([0x21, 0x43, 0x98, 0xFE], dtype="u1")
    layer = only(made(9, packed, 17, [2, 4], scales=[0.5, 2.0], zeros=[0, 0]), tmp_path)
    assert (layer.dtype, layer.notes) == ("int4", ("int4, dequantized with 2 scales (symmetric)",))
    np.testing.assert_array_equal(layer.weight, [[0.5, 1, 1.5, 2], [-16, -14, -4, -2]])
    layer = only(made(9, packed, 3, [2, 2], scales=[0.5], zeros=[100]), tmp_path)
    assert layer.notes == ("uint8, dequantized with 1 scale (zero point 100)",)
    np.testing.assert_array_equal(layer.weight, [[-33.5, -16.5], [26, 77]])


def test_integers_without_a_grid_are_no_weights(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="holds no weights"):
        only(made(9, np.zeros(8, "i1"), 9, [2, 4]), tmp_path)


def test_an_order_for_one_processor_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="'a/w' is stored in an order made for one kind of processor"):
        only(made(9, np.zeros(8, "i1"), 9, [2, 4], {1: ("Int8", 1)}, scales=[1.0]), tmp_path)


@pytest.mark.parametrize(
    ("tensor", "output", "name"),
    [
        ("model/conv1/Conv2D", "", "model/conv1"),
        ("model/relu_1/Relu;model/depth_1/depthwise", "", "model/depth_1"),
        ("arith.constant3", "model/head/MatMul;model/head/BiasAdd", "model/head"),
        ("tfl.pseudo_qconst2", "StatefulPartitionedCall:0", "tfl.pseudo_qconst2"),
        ("emb/embedding_lookup/ReadVariableOp", "", "emb"),
        ("while/lstm_cell/MatMul_1", "", "while/lstm_cell/MatMul_1"),
        ("", "", "(unnamed)"),
        ("plain", "", "plain"),
    ],
)
def test_layers_are_named_after_those_they_came_from(tensor: str, output: str, name: str) -> None:
    assert tflite_names.choose(tensor, [output]) == name


# ---------------------------------------------------------------------------------------------------------------------
# Which files are TensorFlow Lite, and damage


def test_a_file_is_known_by_its_content(tmp_path: Path) -> None:
    content = made(9, M, 0, [4, 6])
    for name in ("model.bin", "model.onnx", "model"):
        path = tmp_path / name
        path.write_bytes(content)
        assert adapter.handles(path)
        assert len(adapters.read(path).layers) == 1
    (tmp_path / "other").write_bytes(b"something else")
    assert not adapter.handles(tmp_path / "other")
    assert not adapter.handles(tmp_path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"hello world", "lacks the mark TFL3"),
        (b"PK\x03\x04" + bytes(60), "lacks the mark TFL3"),
        (b"\xff\xff\xff\x7fTFL3" + bytes(60), "refers to byte 2147483647 of 68"),
    ],
)
def test_what_is_wrong_is_said(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "model.tflite"
    path.write_bytes(content)
    with pytest.raises(BadArgumentError, match=says) as caught:
        adapter.read(path)
    assert "\n" not in str(caught.value)


def test_another_version_is_named(tmp_path: Path) -> None:
    b = Builder()
    b.builder.Finish(b.table({0: ("Uint32", 9)}), b"TFL3")
    path = tmp_path / "model.tflite"
    path.write_bytes(bytes(b.builder.Output()))
    with pytest.raises(BadArgumentError, match="of version 9, and only 3 is known"):
        adapters.read(path)


def attempt(content: bytes, path: Path) -> None:
    """Read a damaged file: a result or a QvisError, nothing else."""
    path.write_bytes(content)
    with suppress(QvisError):
        for layer in adapter.read(path).layers:
            assert layer.weight.ndim == 2


def test_damaged_files(tmp_path: Path) -> None:
    content, chance = (
        made(9, np.arange(24, dtype="i1"), 9, [4, 6], scales=[1, 2, 3, 4], zeros=[0] * 4),
        random.Random(0),
    )
    for end in range(len(content)):
        attempt(content[:end], tmp_path / "model.tflite")
    for _ in range(1000):
        damaged = bytearray(content)
        for _ in range(chance.choice([1, 1, 2, 8])):
            damaged[chance.randrange(len(damaged))] = chance.choice([0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)])
        attempt(bytes(damaged), tmp_path / "model.tflite")


def test_damaged_conversions(folder: Path, tmp_path: Path) -> None:
    chance = random.Random(1)
    for kind in ("int8", "sequence"):
        content = (folder / f"{kind}.tflite").read_bytes()
        for _ in range(60):
            attempt(content[: chance.randrange(len(content))], tmp_path / "model.tflite")
            damaged = bytearray(content)
            for _ in range(50):
                damaged[chance.randrange(len(damaged))] = chance.randrange(256)
            attempt(bytes(damaged), tmp_path / "model.tflite")
