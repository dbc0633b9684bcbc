"""Keras models are quantized to TensorFlow Lite files, which LiteRT runs and which hold what was promised."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qvis import adapters, quantize
from qvis.errors import BadArgumentError, NotRunnableError, UnsupportedModelError
from qvis.quantization.backends import tflite as backend
from qvis.quantization.contents import Arithmetic
from qvis.quantization.engines import open_engine
from qvis.quantization.result import QuantizedModel
from qvis.running import Batch
from tests import keras_models

keras = keras_models.require()
pytest.importorskip("ai_edge_litert.interpreter")
L = keras.layers
pytestmark = keras_models.QUIET


@cache
def data() -> tuple[Any, Any]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return (images.reshape(-1, 8, 8, 1) / 16).astype("f4"), labels


@cache
def wide() -> Any:
    """A trained network whose weights have more numbers than those that TensorFlow leaves in float."""
    keras.utils.set_random_seed(0)
    dense = [L.Dense(96, activation="relu", name="first"), L.Dense(64, activation="relu", name="second")]
    model = keras.Sequential([keras.Input((8, 8, 1)), L.Flatten(), *dense, L.Dense(10, name="last")], name="wide")
    model.compile(keras.optimizers.Adam(0.003), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(*data(), batch_size=64, epochs=6, verbose=0)
    return model


def accuracy(scores: Any) -> float:
    return float((scores.argmax(axis=1) == data()[1]).mean())


def run(found: QuantizedModel, *inputs: Any, **named: Any) -> list[Any]:
    first = next(iter((*inputs, *named.values())))
    return open_engine(found.path).run(Batch(inputs, named, size=len(first)))


def made(model: Any, folder: Path, method: str = "post_training", **settings: Any) -> QuantizedModel:
    if method in ("post_training", "int16x8"):
        settings.setdefault("calibration_data", data()[0][:128])
    return quantize(model, folder / "model.tflite", method, **settings)


def noise(got: Any, expected: Any) -> float:
    """How far it is from what was expected, relative to its size."""
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


# ---------------------------------------------------------------------------------------------------------------------
# The four methods


@pytest.mark.parametrize("method", ["dynamic_range", "float16", "post_training", "int16x8"])
def test_a_quantized_model_answers_as_the_float_model_does(method: str, tmp_path: Path) -> None:
    x, _ = data()
    for model in (wide(), keras_models.digits()):
        expected = np.asarray(model(x))
        (got,) = run(made(model, tmp_path, method), x)
        assert abs(accuracy(got) - accuracy(expected)) <= 0.01
        assert noise(got, expected) < (0.001 if method == "float16" else 0.05)


def test_post_training_leaves_nothing_in_float(tmp_path: Path) -> None:
    for model in (wide(), keras_models.digits()):
        found = made(model, tmp_path)
        assert not found.contents.leftovers
        assert found.contents.integer_operations == 1
        assert found.contents.integer_bytes == 1
        assert found.compression < 0.3
        assert not found.notes
        kinds = {one.kind for one in found.contents.operations if one.arithmetic is Arithmetic.NONE}
        assert {"QUANTIZE", "DEQUANTIZE"} <= kinds  # numbers go in and come out as floats


def test_int16x8_leaves_nothing_in_float(tmp_path: Path) -> None:
    found = made(keras_models.digits(), tmp_path, "int16x8")
    assert not found.contents.leftovers
    assert set(found.contents.bytes_by_type) == {"int8", "int64", "int32"}  # weights, biases, shapes
    assert found.compression < 0.35


def test_float16_halves_the_numbers(tmp_path: Path) -> None:
    found = made(wide(), tmp_path, "float16")
    assert found.contents.bytes_by_type["float16"] == found.float_bytes / 2
    assert "float32" not in found.contents.bytes_by_type
    assert {one.arithmetic for one in found.contents.computing} == {Arithmetic.FLOAT}


def test_dynamic_range_rounds_large_weights_and_says_which_are_left(tmp_path: Path) -> None:
    found = made(wide(), tmp_path, "dynamic_range")
    assert found.contents.bytes_by_type["int8"] == 64 * 96 + 96 * 64
    computing = {one.layer: one.arithmetic for one in found.contents.computing}
    assert computing == {"first": Arithmetic.HYBRID, "second": Arithmetic.HYBRID, "last": Arithmetic.FLOAT}
    assert found.compression < 0.31
    assert found.notes == ("last: left in float by TensorFlow, as are all weights of fewer than 1024 numbers",)


def test_a_file_of_keras_gives_what_the_model_gives(tmp_path: Path) -> None:
    (expected,) = run(made(wide(), tmp_path), data()[0])
    for suffix in (".keras", ".h5"):
        wide().save(tmp_path / f"wide{suffix}")
        (got,) = run(made(tmp_path / f"wide{suffix}", tmp_path), data()[0])
        np.testing.assert_array_equal(got, expected)


def test_one_step_can_be_shared_by_all_channels(tmp_path: Path) -> None:
    from ai_edge_litert.interpreter import Interpreter

    steps = {}
    for granularity in ("channel", "tensor"):
        found = made(keras_models.digits(), tmp_path, granularity=granularity)
        details = Interpreter(str(found.path)).get_tensor_details()
        steps[granularity] = max(len(one["quantization_parameters"]["scales"]) for one in details)
        assert abs(accuracy(run(found, data()[0])[0]) - accuracy(np.asarray(keras_models.digits()(data()[0])))) <= 0.01
    assert steps == {"channel": 16, "tensor": 1}
    with pytest.raises(BadArgumentError, match="granularity"):
        made(wide(), tmp_path, "int16x8", granularity="tensor")


# ---------------------------------------------------------------------------------------------------------------------
# Layers in float


def test_layers_stay_in_float_where_that_is_asked_for(tmp_path: Path) -> None:
    model = keras_models.digits()
    found = made(model, tmp_path, exclude=["stem", "head"])
    arithmetic = {one.layer: one.arithmetic for one in found.contents.computing}
    assert {name for name, one in arithmetic.items() if one is Arithmetic.FLOAT} == {"stem", "head"}
    assert set(arithmetic.values()) == {Arithmetic.FLOAT, Arithmetic.INTEGER}
    assert not found.notes
    head = next(layer for layer in adapters.read(found.path).layers if layer.name == "head")
    np.testing.assert_array_equal(head.weight, np.asarray(model.get_layer("head").kernel).T)
    assert abs(accuracy(run(found, data()[0])[0]) - accuracy(np.asarray(model(data()[0])))) <= 0.01


def test_a_layer_of_two_weights_stays_in_float_as_a_whole(tmp_path: Path) -> None:
    names = [layer.name for layer in adapters.read(keras_models.digits()).layers]
    both = [name for name in names if name.startswith("separable")]
    found = made(keras_models.digits(), tmp_path, exclude=both[:1])
    assert found.notes == (f"{both[1]}: left in float too, since a layer is quantized as a whole",)
    floats = [one for one in found.contents.computing if one.arithmetic is Arithmetic.FLOAT]
    assert [one.kind for one in floats] == ["DEPTHWISE_CONV_2D", "CONV_2D"]


@pytest.mark.parametrize("method", ["dynamic_range", "float16", "int16x8"])
def test_other_methods_say_that_they_leave_no_choice(method: str, tmp_path: Path) -> None:
    with pytest.raises(BadArgumentError, match=r"leaves no choice of layers.* last .*method='post_training'"):
        made(wide(), tmp_path, method, exclude=["last"])


# ---------------------------------------------------------------------------------------------------------------------
# What is left alone


def test_the_model_and_all_random_states_stay_as_they_are(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    keras.utils.set_random_seed(3)
    lstm = L.LSTM(4, name="lstm")
    model = keras.Sequential([keras.Input((5, 3)), lstm, L.Dropout(0.5), L.Dense(2)])
    x = np.random.default_rng(0).normal(size=(8, 5, 3)).astype("f4")
    states = [{key: id(value) for key, value in vars(layer).items()} for layer in model.layers]
    weights = [np.array(one) for one in model.get_weights()]
    np.random.seed(7)
    random.seed(7)
    expected = np.random.random(), random.random()
    np.random.seed(7)
    random.seed(7)
    made(model, tmp_path, calibration_data=x)
    assert (np.random.random(), random.random()) == expected
    assert [{key: id(value) for key, value in vars(layer).items()} for layer in model.layers] == states
    assert not lstm.unroll
    for before, after in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)
    assert capfd.readouterr() == ("", "")


# ---------------------------------------------------------------------------------------------------------------------
# Models of all kinds


def test_inputs_and_outputs_keep_their_order_and_names(tmp_path: Path) -> None:
    from ai_edge_litert.interpreter import Interpreter

    keras.utils.set_random_seed(0)
    z, a = keras.Input((4,), name="z"), keras.Input((3,), name="a")
    both = L.Dense(16, activation="relu")(L.Concatenate()([z, a]))
    model = keras.Model([z, a], [L.Dense(2, name="two")(both), L.Dense(5, name="five")(both)])
    one, other = (np.random.default_rng(0).normal(size=(32, size)).astype("f4") for size in (4, 3))
    found = made(model, tmp_path, calibration_data=(one, other))
    expected = [np.asarray(each) for each in model([one, other])]
    for got in (run(found, one, other), run(found, z=one, a=other), run(found, a=other, z=one)):
        for mine, theirs in zip(got, expected, strict=True):
            assert mine.shape == theirs.shape
            assert noise(mine, theirs) < 0.05
    interpreter = Interpreter(str(found.path))
    signature = interpreter.get_signature_runner()(z=one[:1], a=other[:1])
    np.testing.assert_array_equal(signature["output_1"][0], run(found, one[:1], other[:1])[1][0])


def test_outputs_in_a_dictionary_give_their_names(tmp_path: Path) -> None:
    from ai_edge_litert.interpreter import Interpreter

    keras.utils.set_random_seed(0)
    u, v = keras.Input((4,), name="u"), keras.Input((4,), name="v")
    model = keras.Model({"v": v, "u": u}, {"sum": L.Dense(3)(u + v), "product": L.Dense(2)(u * v)})
    x = {name: np.random.default_rng(n).normal(size=(32, 4)).astype("f4") for n, name in enumerate("uv")}
    found = made(model, tmp_path, calibration_data=x)
    signed = Interpreter(str(found.path)).get_signature_list()["serving_default"]
    assert (sorted(signed["inputs"]), sorted(signed["outputs"])) == (["u", "v"], ["product", "sum"])
    expected = model(x)
    got = run(found, **x)
    assert noise(got[0], np.asarray(expected["sum"])) < 0.05
    assert noise(got[1], np.asarray(expected["product"])) < 0.05


class Own(keras.Model):
    """A class of its own, with a normalization and an operation between layers."""

    def __init__(self) -> None:
        super().__init__(name="own")
        self.conv, self.norm, self.head = L.Conv2D(8, 3, name="conv"), L.BatchNormalization(), L.Dense(4, name="head")

    def call(self, pair: Any, training: bool = False) -> Any:
        x = keras.ops.relu(self.norm(self.conv(pair["image"]), training=training))
        return self.head(keras.ops.mean(x, axis=(1, 2)) * pair["factor"])


def test_a_class_of_its_own_is_called_as_the_data_tell(tmp_path: Path) -> None:
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x = {"image": rng.normal(size=(32, 8, 8, 3)).astype("f4"), "factor": rng.random((32, 1)).astype("f4")}
    model = Own()
    model({name: one[:2] for name, one in x.items()})
    found = made(model, tmp_path, calibration_data=x)
    assert noise(run(found, **x)[0], np.asarray(model(x))) < 0.05
    assert not found.contents.leftovers
    assert {one.layer for one in found.contents.computing if one.layer} == {"conv", "head"}
    with pytest.raises(BadArgumentError, match=r"example_inputs: what the model 'own' takes cannot be seen"):
        made(model, tmp_path, "float16")


def test_token_ids_and_attention(tmp_path: Path) -> None:
    keras.utils.set_random_seed(0)
    ids = keras.Input((6,), dtype="int32", name="ids")
    x = L.Embedding(50, 32, name="tokens")(ids)
    x = L.Add()([x, L.MultiHeadAttention(4, 8, name="attention")(x, x)])
    model = keras.Model(ids, L.Dense(3, name="head")(L.GlobalAveragePooling1D()(x)))
    tokens = np.random.default_rng(0).integers(0, 50, (64, 6))
    found = made(model, tmp_path, calibration_data=tokens)
    assert noise(run(found, tokens)[0], np.asarray(model(tokens))) < 0.05
    assert {one.layer for one in found.contents.computing} >= {"tokens", "attention/query", "head"}
    assert not found.contents.leftovers
    with pytest.raises(UnsupportedModelError, match=r"its input 'ids' takes whole numbers.*post_training"):
        made(model, tmp_path, "int16x8", calibration_data=tokens)


def test_recurrent_layers_are_laid_out_step_by_step_or_take_one_sample(tmp_path: Path) -> None:
    keras.utils.set_random_seed(0)
    steps = keras.Input((None, 8), name="steps")
    model = keras.Model(steps, L.Dense(2, name="head")(L.LSTM(24, name="lstm")(steps)))
    x = np.random.default_rng(0).normal(size=(40, 5, 8)).astype("f4")
    expected = np.asarray(model(x))
    found = made(model, tmp_path, calibration_data=x)
    assert noise(run(found, x)[0], expected) < 0.1
    assert not found.contents.leftovers
    assert any("steps 5×8" in note for note in found.notes)
    found = made(model, tmp_path, "dynamic_range", example_inputs=x[:1])
    assert any("one sample at a time" in note for note in found.notes)
    assert open_engine(found.path).fixed_batch == 1
    assert noise(run(found, x)[0], expected) < 0.05


def test_a_model_can_be_equalized_first(tmp_path: Path) -> None:
    found = made(keras_models.digits(), tmp_path, equalize=True, granularity="tensor")
    assert found.equalization is not None
    assert not found.contents.leftovers
    assert abs(accuracy(run(found, data()[0])[0]) - accuracy(np.asarray(keras_models.digits()(data()[0])))) <= 0.01


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be done


def test_an_operation_that_tensorflow_lite_lacks_is_named(tmp_path: Path) -> None:
    image = keras.Input((8, 8, 1))
    model = keras.Model(image, keras.ops.erf(L.Dense(3)(L.Flatten()(image))))
    with pytest.raises(UnsupportedModelError, match=r"TensorFlow Lite has no Erf \(.*Erf\); give a model without"):
        made(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_operation_without_an_integer_version_is_named(tmp_path: Path) -> None:
    keras.utils.set_random_seed(0)
    image = keras.Input((8, 8, 1))
    x = keras.ops.sin(L.Dense(16, name="before")(L.Flatten()(image)))
    found = made(keras.Model(image, L.Dense(3, name="after")(x)), tmp_path)
    assert [one.kind for one in found.contents.leftovers] == ["SIN"]
    assert len(found.notes) == 1
    assert "(SIN): left in float, which post_training of TensorFlow has no integers for" in found.notes[0]


class Loop(L.Layer):
    """A loop that TensorFlow sees."""

    def call(self, x: Any) -> Any:
        import tensorflow as tf

        return tf.while_loop(lambda n, _: n < 3, lambda n, y: (n + 1, y * 0.5), (0, x))[1]


def _halved() -> Any:
    image = keras.Input((8, 8, 1))
    return keras.Model(image, L.Dense(3)(L.Flatten()(Loop()(image))))


def _three_axes() -> Any:
    return keras.Sequential([keras.Input((4, 4, 4, 1)), L.Conv3D(2, 2, name="conv")])


def _narrow() -> Any:
    return keras.Sequential([keras.Input((8, 8, 1)), L.Flatten(), L.Dense(2, dtype="mixed_float16")])


def _quantized() -> Any:
    model = keras.Sequential([keras.Input((8,)), L.Dense(8, name="dense")])
    model.quantize("int8")
    return model


@pytest.mark.parametrize(
    ("make", "shape", "message"),
    [
        (_halved, (8, 8, 1), r"it has loops or branches .*dynamic_range"),
        (_three_axes, (4, 4, 4, 1), r"nothing of it can be quantized: .* no integer version of CONV_3D; use .*float16"),
        (_narrow, (8, 8, 1), r"it computes in float16, and TensorFlow Lite in float32"),
        (_quantized, (8,), r"dense is quantized by Keras already"),
    ],
)
def test_models_that_it_cannot_quantize_are_refused_with_a_reason(
    make: Callable[[], Any], shape: tuple[int, ...], message: str, tmp_path: Path
) -> None:
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).random((8, *shape)).astype("f4")
    with pytest.raises(UnsupportedModelError, match=message):
        made(make(), tmp_path, calibration_data=x)


def test_a_file_that_litert_does_not_take_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(content: bytes) -> None:
        raise NotRunnableError(f"model: LiteRT refuses it: {len(content)} bytes")

    monkeypatch.setattr(backend, "LiteRT", refuse)
    with pytest.raises(UnsupportedModelError, match=r"LiteRT refuses it.*what TensorFlow made of it by post_training"):
        made(wide(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_small_weights_alone_are_nothing_for_dynamic_range(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((8,)), L.Dense(8)])
    with pytest.raises(UnsupportedModelError, match=r"fewer than 1024 numbers each.*post_training"):
        made(model, tmp_path, "dynamic_range")


def test_text_is_refused(tmp_path: Path) -> None:
    words = keras.Input((1,), dtype="string", name="words")
    lookup = L.StringLookup(vocabulary=["a", "b"], output_mode="one_hot")
    model = keras.Model(words, L.Dense(2)(keras.ops.cast(lookup(words), "float32")))
    with pytest.raises(UnsupportedModelError, match=r"its input 'words' is text"):
        made(model, tmp_path, "float16")


def test_data_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadArgumentError, match=r"the model's input 'input' is any×8×8×1, and a batch has 16×8×8"):
        made(wide(), tmp_path, calibration_data=data()[0][:16, ..., 0])
