"""Whole models in HDF5 files of Keras 2 are loaded by Keras 3 as they were, and can be quantized."""

from __future__ import annotations

import json
import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from qvis import adapters, quantize
from qvis.errors import NotRunnableError
from qvis.quantization.engines import open_engine
from qvis.running import Batch
from tests import keras_models

keras_models.require()
if find_spec("tf_keras") is None and not os.environ.get("CI"):
    pytest.skip("tf_keras is not installed", allow_module_level=True)
import tf_keras as keras  # noqa: E402

L = keras.layers
pytestmark = [
    *keras_models.QUIET,
    pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file:UserWarning"),
]


@cache
def digits() -> tuple[Any, Any, Any]:
    """A model with the layers that Keras 3 knows otherwise, trained a little, with pictures and what they show."""
    from sklearn.datasets import load_digits

    keras.utils.set_random_seed(0)
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8, 1) / 16).astype("f4")
    layers = [
        L.Conv2D(8, 3, padding="same", use_bias=False),
        L.BatchNormalization(momentum=0.9),
        L.ReLU(),
        L.DepthwiseConv2D(3, padding="same", depth_multiplier=2, kernel_regularizer="l2"),
        L.SpatialDropout2D(0.05),
        L.SeparableConv2D(16, 3, strides=2, activation="relu", pointwise_initializer="he_normal"),
        L.Conv2DTranspose(4, 2, strides=2),
        L.Flatten(),
        L.Dense(10),
    ]
    model = keras.Sequential([keras.Input((8, 8, 1)), *layers], name="old_digits")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.legacy.Adam(0.01), loss)
    model.fit(images, labels, batch_size=64, epochs=4, verbose=0)
    return model, images, labels


def loaded(model: Any, folder: Path) -> Any:
    model.save(folder / "model.h5")
    before = (folder / "model.h5").read_bytes()
    found = adapters.load(folder / "model.h5")
    assert (folder / "model.h5").read_bytes() == before
    return found


def test_a_trained_model_gives_the_same_numbers(tmp_path: Path) -> None:
    model, images, _ = digits()
    found = loaded(model, tmp_path)
    assert type(found).__module__.startswith("keras.")
    assert all(type(layer).__module__.startswith("keras.") for layer in found.layers)  # and can be saved as such
    np.testing.assert_allclose(found.predict(images[:64], verbose=0), model.predict(images[:64], verbose=0), atol=1e-4)
    keras_models.assert_same(tmp_path / "model.h5", tmp_path / "model.h5")


def test_it_is_quantized_like_any_other(tmp_path: Path) -> None:
    model, images, labels = digits()
    model.save(tmp_path / "model.h5")
    found = quantize(tmp_path / "model.h5", tmp_path / "model.tflite", calibration_data=images[:128])
    assert not found.contents.leftovers
    (got,) = open_engine(found.path).run(Batch((images,), size=len(images)))
    expected = model.predict(images, verbose=0)
    scores = [float((one.argmax(axis=1) == labels).mean()) for one in (expected, got)]
    assert abs(scores[0] - scores[1]) <= 0.01


@pytest.mark.parametrize(
    ("shape", "layers"),
    [
        ((8, 3), [L.DepthwiseConv1D(3), L.SeparableConv1D(4, 3), L.Conv1DTranspose(2, 2)]),
        ((6, 6, 6, 2), [L.Conv3DTranspose(2, 2)]),
        ((5, 3), [L.Bidirectional(L.LSTM(4, return_sequences=True)), L.GRU(3, return_sequences=True), L.SimpleRNN(2)]),
        ((5, 3), [L.RNN([L.GRUCell(3), L.LSTMCell(2)])]),
        ((3, 6, 6, 2), [L.ConvLSTM2D(2, 3, recurrent_activation="sigmoid")]),
        ((8, 8, 3), [L.RandomFlip(), L.RandomRotation(0.1), L.Resizing(4, 4), L.SpatialDropout2D(0.1), L.Flatten()]),
    ],
)
def test_layers_with_arguments_that_have_no_effect_are_loaded(
    shape: tuple[int, ...], layers: list[Any], tmp_path: Path
) -> None:
    keras.utils.set_random_seed(0)
    inner = keras.Sequential([keras.Input(shape), *layers], name="inner")
    image = keras.Input(shape)
    model = keras.Model(image, inner(image))  # the layers stand in a model inside of the model
    x = np.random.default_rng(0).random((2, *shape)).astype("f4")
    found = np.asarray(loaded(model, tmp_path)(x, training=False))
    np.testing.assert_allclose(found, model(x, training=False).numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "argument", "value"), [("DepthwiseConv2D", "groups", 2), ("LSTM", "time_major", True)]
)
def test_an_argument_that_has_an_effect_is_refused(kind: str, argument: str, value: Any, tmp_path: Path) -> None:
    shape = (5, 3) if kind == "LSTM" else (8, 8, 4)
    layer = L.LSTM(4, name="odd") if kind == "LSTM" else L.DepthwiseConv2D(3, name="odd")
    keras.Sequential([keras.Input(shape), layer]).save(tmp_path / "model.h5")
    with h5py.File(tmp_path / "model.h5", "r+") as file:
        config = json.loads(file.attrs["model_config"])
        (own,) = [one["config"] for one in config["config"]["layers"] if one["class_name"] == kind]
        own[argument] = value
        file.attrs["model_config"] = json.dumps(config)
    with pytest.raises(NotRunnableError, match=f"its layer 'odd' has {argument}={value}, and Keras 3 has no {kind}"):
        adapters.load(tmp_path / "model.h5")


@pytest.mark.parametrize("inside", ["Functional", "Sequential"])
@pytest.mark.parametrize("around", ["Functional", "Sequential"])
def test_a_model_inside_of_a_model_is_called_where_it_was(inside: str, around: str, tmp_path: Path) -> None:
    keras.utils.set_random_seed(0)
    one, other = keras.Input((8,)), keras.Input((8,), name="other")
    dense = L.Dense(8, activation="relu")
    inner = keras.Model(one, dense(one)) if inside == "Functional" else keras.Sequential([keras.Input((8,)), dense])
    if around == "Functional":
        model = keras.Model([one, other], L.Subtract()([inner(inner(one)), L.Dense(8)(inner(other))]))
    else:
        model = keras.Sequential([keras.Input((8,)), inner, L.Dense(2)])
    x = np.random.default_rng(0).normal(size=(2, 4, 8)).astype("f4")
    given = list(x) if around == "Functional" else x[0]
    np.testing.assert_allclose(np.asarray(loaded(model, tmp_path)(given)), model(given).numpy(), rtol=0, atol=1e-5)


def test_a_function_that_is_another_one_in_keras_3_is_refused(tmp_path: Path) -> None:
    keras.Sequential([keras.Input((4,)), L.Dense(2, activation="hard_sigmoid", name="hard")]).save(tmp_path / "m.h5")
    with pytest.raises(NotRunnableError, match="its layer 'hard' has the activation hard_sigmoid, which is another"):
        adapters.load(tmp_path / "m.h5")


def test_a_layer_that_keras_3_does_not_have_is_named(tmp_path: Path) -> None:
    keras.Sequential([keras.Input((4,)), L.ThresholdedReLU(0.5)]).save(tmp_path / "model.h5")
    with pytest.raises(NotRunnableError, match=r"Keras cannot load .*Unknown layer: 'ThresholdedReLU'"):
        adapters.load(tmp_path / "model.h5")
