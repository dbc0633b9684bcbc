"""Keras models trained with rounding in place: what they learn, what the files hold, and what is refused."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
from keras_models import QUIET, digits, require

import qvis
from qvis.errors import BadArgumentError, UnsupportedModelError
from qvis.quantization.backends import keras_training
from qvis.quantization.engines import open_engine
from qvis.quantization.methods import TrainingStep
from qvis.quantization.result import QuantizedModel
from qvis.running import Batch

keras = require()
layers = keras.layers
pytestmark = QUIET
ENDS = {"QUANTIZE", "DEQUANTIZE"}
"""What stands between the integers of a file and the floats around it."""


@cache
def data() -> tuple[Any, Any, Any]:
    """Pictures of digits, their labels, and which of them are trained on."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return images.reshape(-1, 8, 8, 1).astype(np.float32) / 16, labels, np.arange(len(labels)) % 5 != 0


@cache
def deep() -> Any:
    """A network that reads digits, and that rounding to few bits ruins."""
    keras.utils.set_random_seed(0)
    images, labels, taught = data()

    def norm(x: Any) -> Any:
        return layers.BatchNormalization(momentum=0.8)(x)

    inputs = keras.Input((8, 8, 1))
    x = keras.ops.relu(norm(layers.Conv2D(8, 3, 2, padding="same", use_bias=False)(inputs)))
    for _ in range(3):
        y = keras.ops.relu(norm(layers.SeparableConv2D(12, 3, padding="same", use_bias=False)(x)))
        y = norm(layers.Conv2D(8, 1, use_bias=False)(y))
        x = layers.ReLU(6.0)(layers.Add()([x, y]))
    x = layers.Dropout(0.1)(layers.Flatten()(x))
    model = keras.Model(inputs, layers.Dense(10, activation="softmax")(x), name="deep")
    model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy")
    model.fit(images[taught], labels[taught], batch_size=64, epochs=3, verbose=0)
    return model


def trained(model: Any, *given: Any, **settings: Any) -> QuantizedModel:
    """A model trained with rounding in place, on the digits unless data are given."""
    images, labels, taught = data()
    settings.setdefault("train_data", (images[taught], labels[taught]))
    target = Path(mkdtemp()) / "model.tflite"
    return qvis.quantize(model, target, "quantization_aware", *given, **settings)


@cache
def of_digits() -> QuantizedModel:
    return trained(digits(), epochs=1)


@cache
def of_deep(bits: int, epochs: int) -> QuantizedModel:
    return trained(deep(), bits=bits, epochs=epochs, learning_rate=5e-3)


def run(result: QuantizedModel, *inputs: Any) -> Any:
    """The outputs of the file in its engine; of several the list of them."""
    found = open_engine(result.path).run(Batch(inputs, size=len(inputs[0])))
    return found[0] if len(found) == 1 else found


def accuracy(result: QuantizedModel, taught: bool = False) -> float:
    """The share of right answers of the file, on the pictures that were not trained on."""
    images, labels, chosen = data()
    chosen = chosen if taught else ~chosen
    return float((run(result, images[chosen]).argmax(axis=1) == labels[chosen]).mean())


def error(one: Any, other: Any) -> float:
    """The power of what two outputs differ by, relative to that of their spread."""
    one, other = np.asarray(one), np.asarray(other)
    return float(np.sqrt(np.mean((one - other) ** 2) / np.var(other)))


# ---------------------------------------------------------------------------------------------------------------------
# What is learned


def test_eight_bits_answer_as_well_as_the_float_model() -> None:
    images, labels, taught = data()
    scores = digits().predict(images[~taught], verbose=0)
    assert accuracy(of_digits()) >= float((scores.argmax(axis=1) == labels[~taught]).mean()) - 0.01


def test_nothing_in_the_file_computes_with_floats() -> None:
    contents = of_digits().contents
    assert contents.integer_operations == 1
    assert not contents.leftovers
    assert not any(kind.startswith("float") for kind in contents.bytes_by_type)
    assert of_digits().compression <= 0.3


def test_training_gains_what_rounding_to_two_bits_lost() -> None:
    before, after = of_deep(2, 0), of_deep(2, 3)
    assert after.epochs[-1].accuracy is not None
    assert before.epochs[0].accuracy is not None
    assert after.epochs[-1].accuracy >= before.epochs[0].accuracy + 0.2
    assert accuracy(after) >= accuracy(before) + 0.2


def test_epochs_are_counted_from_before_training() -> None:
    before, after = of_deep(2, 0), of_deep(2, 3)
    assert [one.number for one in before.epochs] == [0]
    assert [one.number for one in after.epochs] == [0, 1, 2, 3]
    assert before.epochs[0].loss == pytest.approx(after.epochs[0].loss, rel=1e-3)
    assert after.epochs[-1].loss < after.epochs[0].loss


@pytest.mark.parametrize(("bits", "epochs"), [(2, 0), (2, 3)])
def test_the_file_answers_as_the_model_did_in_training(bits: int, epochs: int) -> None:
    result = of_deep(bits, epochs)
    assert accuracy(result, taught=True) == pytest.approx(result.epochs[-1].accuracy, abs=0.015)


@pytest.mark.parametrize("bits", [8, 5])
def test_file_and_training_give_the_same_answers(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    convert = keras_training.converted
    monkeypatch.setattr(keras_training, "converted", lambda rounded: [kept.append(rounded), convert(rounded)][1])
    images, labels, _ = data()
    result = trained(digits(), train_data=(images[:320], labels[:320]), bits=bits, epochs=1, learning_rate=1e-3)
    made, _ = kept[0].run([keras.ops.convert_to_tensor(images)])
    scores = np.asarray(made[id(kept[0].model.outputs[0])])
    assert (scores.argmax(axis=1) == run(result, images).argmax(axis=1)).mean() >= 0.99


def test_before_training_it_is_the_model_quantized_after_training(tmp_path: Path) -> None:
    images, _, taught = data()
    plain = qvis.quantize(digits(), tmp_path / "plain.tflite", calibration_data=images[taught], samples=2000)
    ours = trained(digits(), epochs=0, calibration_data=images[taught], samples=2000)
    assert ours.epochs[0].accuracy == pytest.approx(accuracy(plain, taught=True), abs=0.005)
    assert error(run(ours, images), run(plain, images)) < 0.02


def test_without_labels_the_float_model_is_the_teacher() -> None:
    images, _, taught = data()
    result = trained(digits(), train_data=images[taught][:800], bits=2, epochs=2, learning_rate=5e-3)
    assert all(one.accuracy is None for one in result.epochs)
    assert result.epochs[-1].loss < 0.7 * result.epochs[0].loss
    before = error(run(trained(digits(), bits=2, epochs=0), images), digits()(images, training=False))
    assert error(run(result, images), digits()(images, training=False)) < 0.8 * before


def test_the_same_seed_gives_the_same_file() -> None:
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((6,)), layers.Dense(8, activation="relu"), layers.Dropout(0.3), layers.Dense(3)]
    )
    few = np.random.default_rng(0).random((96, 6), np.float32), np.arange(96) % 3
    one, same, other = (trained(model, train_data=few, epochs=2, learning_rate=1e-2, seed=seed) for seed in (0, 0, 1))
    assert one.path.read_bytes() == same.path.read_bytes()
    assert one.epochs == same.epochs
    assert one.path.read_bytes() != other.path.read_bytes()


def test_every_step_of_training_can_be_watched() -> None:
    seen: list[TrainingStep] = []
    images, labels, _ = data()
    trained(digits(), train_data=(images[:70], labels[:70]), epochs=2, batch_size=32, watch=seen.append)
    assert [(one.epoch, one.step) for one in seen] == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3)]
    assert {(one.epochs, one.steps) for one in seen} == {(2, 3)}
    assert all(0 < one.loss < 10 and one.accuracy is not None and 0 <= one.accuracy <= 1 for one in seen)


def test_neither_the_model_nor_any_random_state_is_changed(capfd: pytest.CaptureFixture[str]) -> None:
    model = digits()
    images, labels, _ = data()
    weights = [one.copy() for one in model.get_weights()]
    nodes = [len(layer._inbound_nodes) for layer in model.layers]
    states = random.getstate(), np.random.get_state()[1].tolist()
    trained(model, train_data=(images[:64], labels[:64]), epochs=1)
    assert states == (random.getstate(), np.random.get_state()[1].tolist())
    assert nodes == [len(layer._inbound_nodes) for layer in model.layers]
    assert model.compiled
    for one, other in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert capfd.readouterr() == ("", "")


# ---------------------------------------------------------------------------------------------------------------------
# What the file holds


def test_up_to_four_bits_two_weights_share_a_byte() -> None:
    kinds = of_deep(2, 3).contents.bytes_by_type
    assert "int8" not in kinds
    weights = sum(int(np.prod(one.shape)) for one in qvis.adapters.read(deep()).layers)
    assert weights / 2 <= kinds["int4"] <= 0.55 * weights
    assert any("2 bits" in note and "int4" in note for note in of_deep(2, 3).notes)
    assert any("several times as long" in note for note in of_deep(2, 3).notes)


def test_few_bits_in_a_wider_type_use_few_codes() -> None:
    result = trained(digits(), bits=6, epochs=0)
    assert any("6 bits" in note and "int8" in note for note in result.notes)
    for layer in qvis.adapters.read(result.path).layers:
        for row in layer.weight:
            steps = np.unique(np.abs(row[row != 0]))
            codes = row / (steps.min() if len(steps) else 1)
            # the smallest may stand for 1, 2, ... steps: then the others are such shares of them
            assert any(np.allclose(codes * k, np.rint(codes * k), atol=1e-3) for k in range(1, 32))
            assert len(np.unique(row)) <= 63


def test_each_layer_can_have_a_width_of_its_own() -> None:
    widths = {"stem": 8, "depthwise": 4, "separable/depthwise_kernel": 8, "separable/pointwise_kernel": 4, "head": 4}
    known = {layer.name: 8 for layer in qvis.adapters.read(digits()).layers}
    result = trained(digits(), bits=known | {name: width for name, width in widths.items() if name in known}, epochs=0)
    assert {"int8", "int4"} <= set(result.contents.bytes_by_type)


@pytest.mark.parametrize("name", ["stem", "depthwise", "head"])
def test_a_layer_that_is_left_out_stays_in_float(name: str) -> None:
    images = data()[0]
    result = trained(digits(), exclude=[name], epochs=0)
    assert [one.layer for one in result.contents.leftovers if one.layer] == [name]
    assert any("ELU" in note and name in note for note in result.notes) == (name == "depthwise")
    assert error(run(result, images), digits()(images, training=False)) < 0.1


def test_one_step_for_the_whole_tensor_loses_more_than_one_for_each_channel() -> None:
    images = data()[0]
    scores = digits()(images, training=False)
    tensor, channel = (trained(digits(), granularity=one, bits=4, epochs=0) for one in ("tensor", "channel"))
    assert error(run(channel, images), scores) < error(run(tensor, images), scores)


# ---------------------------------------------------------------------------------------------------------------------
# Models of other kinds: each must compute what it did, but for the rounding


def shaken(model: Any) -> Any:
    """A model with normalizations and biases that are not those of the beginning."""
    generator = np.random.default_rng(0)
    for layer in model._flatten_layers():
        for variable in layer._trainable_variables + layer._non_trainable_variables:
            if variable.name in ("bias", "beta", "moving_mean"):
                variable.assign(generator.normal(0, 0.1, variable.shape))
            elif variable.name in ("gamma", "moving_variance"):
                variable.assign(generator.uniform(0.5, 2, variable.shape))
    return model


def functional(shape: tuple[int, ...], build: Any) -> Any:
    keras.utils.set_random_seed(0)
    inputs = keras.Input(shape)
    return shaken(keras.Model(inputs, build(inputs)))


def _branches(x: Any) -> Any:
    x = layers.Conv2D(6, 3, padding="same", activation="relu6")(x)
    y = layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2)(x)
    z = layers.AveragePooling2D(2)(layers.ReLU()(layers.BatchNormalization()(y)))
    x = layers.Concatenate()([layers.MaxPooling2D(2)(x), z])
    return layers.Dense(5)(layers.Dense(8, activation="tanh")(layers.GlobalAveragePooling2D()(x)))


def _activations(x: Any) -> Any:
    x = layers.Conv2D(6, 3, activation="silu")(x)
    x = layers.Conv2D(6, 1, activation="gelu")(x)
    x = layers.LeakyReLU()(layers.Conv2D(6, 1, activation="hard_silu")(x))
    gate = layers.Conv2D(6, 1, activation="sigmoid")(layers.GlobalAveragePooling2D(keepdims=True)(x))
    x = layers.UpSampling2D(2)(layers.ZeroPadding2D(1)(layers.Multiply()([x, gate])))
    x = layers.Conv2DTranspose(4, 3, strides=2, padding="same", activation="relu")(x)
    return 2.0 * x[:, 2:-2] + 1.0


def _sequence(x: Any) -> Any:
    x = layers.MaxPooling1D(2)(layers.Conv1D(6, 3, padding="causal", activation="relu")(x))
    x = layers.ReLU()(layers.BatchNormalization()(layers.SeparableConv1D(6, 3, padding="same")(x)))
    return layers.Dense(3)(layers.GlobalMaxPooling1D()(layers.DepthwiseConv1D(3, strides=2)(x)))


def _unfolded(x: Any) -> Any:
    x = layers.Rescaling(1 / 2, offset=-0.25)(x)
    x = layers.BatchNormalization(name="after")(layers.Conv2D(6, 3, padding="same", activation="relu")(x))
    return layers.Dense(4)(layers.Flatten()(layers.Conv2D(6, 3, padding="same")(x)))


def _twice(x: Any) -> Any:
    inner = keras.Sequential([keras.Input((6, 6, 3)), layers.Conv2D(3, 3, padding="same"), layers.BatchNormalization()])
    return layers.Dense(4)(layers.Flatten()(keras.ops.relu(inner(keras.ops.relu(inner(x))))))


class Block(layers.Layer):  # type: ignore[misc]
    """A layer of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = layers.Conv2D(3, 3, padding="same", name="inner")

    def call(self, x: Any) -> Any:
        return keras.ops.relu(self.conv(x)) + x


@pytest.mark.parametrize(
    ("shape", "build", "epochs"),
    [
        ((8, 8, 3), _branches, 1),
        ((6, 6, 3), _activations, 1),
        ((20, 3), _sequence, 0),
        ((6, 6, 3), _unfolded, 0),
        ((6, 6, 3), _twice, 0),
        ((6, 6, 3), lambda x: layers.Dense(3)(layers.Flatten()(Block()(Block()(x)))), 0),
        ((5, 4), lambda x: layers.Dense(3, activation="relu")(x), 0),
    ],
    ids=["branches", "activations", "sequence", "unfolded", "twice", "custom", "places"],
)
def test_models_of_many_kinds_become_integers(shape: tuple[int, ...], build: Any, epochs: int) -> None:
    model = functional(shape, build)
    samples = np.random.default_rng(1).random((48, *shape)).astype(np.float32)
    result = trained(model, train_data=samples, epochs=epochs, learning_rate=1e-5)
    assert not result.contents.leftovers
    assert error(run(result, samples), model(samples, training=False)) < 0.05


def test_a_kernel_that_is_used_twice_keeps_its_codes() -> None:
    keras.utils.set_random_seed(0)
    inputs, conv = keras.Input((6, 6, 3)), layers.Conv2D(3, 3, padding="same")
    model = keras.Model(inputs, layers.Flatten()(conv(keras.ops.relu(conv(inputs)))))
    result = trained(model, train_data=np.random.default_rng(1).random((32, 6, 6, 3), np.float32), bits=5, epochs=0)
    assert any("used several times" in note for note in result.notes)
    for layer in qvis.adapters.read(result.path).layers:
        for row in layer.weight:
            gaps = np.diff(np.unique(row))
            np.testing.assert_allclose(gaps / gaps.min(), np.rint(gaps / gaps.min()), atol=1e-3)


def test_channels_that_a_normalization_closes_keep_what_it_adds() -> None:
    keras.utils.set_random_seed(0)
    norm = layers.BatchNormalization()
    model = keras.Sequential([keras.Input((6, 6, 3)), layers.Conv2D(6, 3), norm, layers.ReLU(), layers.Conv2D(4, 3)])
    norm.gamma.assign([1, 1e-30, 0, 1e-9, 1e-5, 1])
    norm.beta.assign([0.1, 0.7, 0.9, 0.5, 0.3, 0])
    samples = np.random.default_rng(1).random((32, 6, 6, 3), np.float32)
    result = trained(model, train_data=samples, epochs=0)
    assert error(run(result, samples), model(samples, training=False)) < 0.05


def test_a_subclassed_model_is_followed() -> None:
    class Own(keras.Model):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.head = layers.Conv2D(4, 3), layers.BatchNormalization(), layers.Dense(3)

        def call(self, x: Any) -> Any:
            return self.head(keras.ops.reshape(keras.ops.relu(self.norm(self.conv(x))), (-1, 64)))

    keras.utils.set_random_seed(0)
    model, samples = Own(), np.random.default_rng(1).random((48, 6, 6, 2)).astype(np.float32)
    model(samples)
    result = trained(shaken(model), train_data=samples, epochs=0)
    assert not result.contents.leftovers
    assert error(run(result, samples), model(samples)) < 0.05


def test_several_inputs_and_outputs_keep_their_order() -> None:
    keras.utils.set_random_seed(0)
    one, other = keras.Input((6,), name="one"), keras.Input((4,), name="other")
    x = layers.Concatenate()([layers.Dense(8, activation="relu")(one), layers.Dense(8, activation="relu")(other)])
    model = keras.Model({"one": one, "other": other}, [layers.Dense(3)(x), layers.Dense(2, activation="softmax")(x)])
    generator = np.random.default_rng(1)
    samples = {"other": generator.random((48, 4), np.float32), "one": generator.random((48, 6), np.float32)}
    result = trained(model, train_data=samples, epochs=0)
    found = open_engine(result.path).run(Batch((samples,), size=48))
    for output, expected in zip(found, model(samples), strict=True):
        assert error(output, expected) < 0.05


@pytest.mark.parametrize(
    ("end", "labels", "loss"),
    [
        ((1, "sigmoid"), "sides", None),
        ((1, None), "sides", None),
        ((2, "softmax"), "rows", None),
        ((2, None), "rows", "cross_entropy"),
        ((1, None), "numbers", None),
        ((2, None), "sides", lambda y, scores: keras.losses.sparse_categorical_crossentropy(y, scores, True)),
    ],
)
def test_labels_of_many_kinds_are_learned(end: tuple[int, str | None], labels: str, loss: Any) -> None:
    generator = np.random.default_rng(0)
    samples = generator.normal(0.5, 1, (256, 4)).astype(np.float32)
    sides = (samples @ [1, -1, 2, 0.5] > 1).astype(np.int64)
    targets = {
        "sides": sides,
        "rows": np.eye(2, dtype=np.float32)[sides],
        "numbers": samples @ np.float32([1, -1, 2, 0]),
    }
    keras.utils.set_random_seed(0)
    scaled = layers.Normalization(mean=[0.5] * 4, variance=[1.0] * 4)
    hidden = [layers.Dense(8, activation="relu"), layers.Dropout(0.1)]
    model = keras.Sequential([keras.Input((4,)), scaled, *hidden, layers.Dense(end[0], activation=end[1])])
    result = trained(model, train_data=(samples, targets[labels]), epochs=8, learning_rate=2e-2, loss=loss)
    assert result.epochs[-1].loss < 0.7 * result.epochs[0].loss
    if labels == "sides" and loss is None:
        assert result.epochs[-1].accuracy is not None
        assert result.epochs[-1].accuracy > 0.8


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("shape", "build", "names"),
    [
        ((6, 3), lambda x: layers.Dense(2)(layers.LSTM(4, name="memory")(x)), ["memory", "LSTM", "post_training"]),
        ((6, 3), lambda x: layers.Dense(2, activation="elu", name="curved")(x), ["curved", "elu", "post_training"]),
        ((6, 6, 4), lambda x: layers.Conv2D(4, 3, groups=2, name="grouped")(x), ["grouped", "groups"]),
        ((6, 3), lambda x: layers.Softmax(axis=1, name="odd")(layers.Dense(3)(x)), ["odd", "axis"]),
        (
            (6, 3),
            lambda x: keras.ops.cumsum(layers.Dense(2)(layers.LayerNormalization(name="n")(x))),
            ["Cumsum", "'n'"],
        ),
    ],
)
def test_operations_without_a_rule_are_refused_by_name(shape: tuple[int, ...], build: Any, names: list[str]) -> None:
    samples = np.zeros((8, *shape), np.float32)
    with pytest.raises(UnsupportedModelError) as raised:
        trained(functional(shape, build), train_data=samples)
    assert all(name in str(raised.value) for name in names)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.arange(32), "labels from 0 to 31, and 10 classes"),
        (np.zeros((32, 4)), "labels of shape (32, 4)"),
        (np.full(32, -1), "labels from -1 to -1"),
        (np.zeros(32), "whole numbers of an integer type if they are classes"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels: Any, words: str) -> None:
    with pytest.raises(BadArgumentError) as raised:
        trained(digits(), train_data=(data()[0][:32], labels))
    assert words in str(raised.value)


def test_inputs_of_another_shape_are_refused() -> None:
    with pytest.raises(BadArgumentError, match=r"got inputs of shape \(4, 9, 9, 1\), expected \(samples, 8, 8, 1\)"):
        trained(digits(), train_data=np.zeros((4, 9, 9, 1), np.float32))


def test_a_loss_without_labels_is_refused() -> None:
    with pytest.raises(BadArgumentError, match="loss: the training data have no labels"):
        trained(digits(), train_data=data()[0][:32], loss="mse")


def test_a_loss_that_fails_on_the_labels_is_refused() -> None:
    with pytest.raises(BadArgumentError, match=r"loss: it fails on labels of type int64 and shape \(2,\)"):
        trained(digits(), train_data=(data()[0][:32], data()[1][:32]), loss="huber")


def test_weights_that_are_not_finite_are_refused() -> None:
    model = functional((4,), lambda x: layers.Dense(3, name="broken")(x))
    model.get_layer("broken").kernel.assign(np.full((4, 3), np.nan))
    with pytest.raises(UnsupportedModelError, match="broken holds NaN or infinite weights"):
        trained(model, train_data=np.zeros((8, 4), np.float32))


def test_a_learning_rate_that_leads_nowhere_is_named() -> None:
    images, labels, _ = data()
    with pytest.raises(BadArgumentError, match="learning_rate: got 1e"):
        trained(digits(), train_data=(images[:64], labels[:64]), epochs=20, learning_rate=1e38)


def test_a_layer_that_cannot_stay_in_float_is_named() -> None:
    def build(x: Any) -> Any:
        x = layers.Conv2D(4, 3, name="first")(x)
        x = layers.Conv2D(4, 3, name="middle")(x)
        return layers.Conv2D(4, 1, name="last")(x)

    with pytest.raises(UnsupportedModelError, match="'middle' cannot be left in float"):
        trained(functional((6, 6, 3), build), train_data=np.zeros((8, 6, 6, 3), np.float32), exclude=["middle"])
