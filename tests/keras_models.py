"""Keras models that tests share."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

from qvis import adapters

QUIET = [
    # TensorFlow's variables do not know a keyword that NumPy 2 has
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method:UserWarning"),
    pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file:UserWarning"),
]
"""What Keras says about itself."""


def require() -> Any:
    """The package ``keras``; where it is missing the tests are skipped, but not in CI."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if find_spec("tensorflow") is None and not os.environ.get("CI"):
        pytest.skip("TensorFlow is not installed", allow_module_level=True)
    import keras

    return keras


@cache
def digits() -> Any:
    """A small network that has learned to read scikit-learn's digits."""
    keras = require()
    from sklearn.datasets import load_digits

    keras.utils.set_random_seed(0)
    images, labels = load_digits(return_X_y=True)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(8, 3, padding="same", use_bias=False, name="stem"),
            layers.BatchNormalization(momentum=0.9),
            layers.ReLU(),
            layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2, name="depthwise"),
            layers.ReLU(),
            layers.SeparableConv2D(16, 3, strides=2, activation="relu", name="separable"),
            layers.Flatten(),
            layers.Dense(10, name="head"),
        ],
        name="digits",
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss, metrics=["accuracy"])
    model.fit(images.reshape(-1, 8, 8, 1) / 16, labels, batch_size=64, epochs=4, verbose=0)
    return model


@cache
def everything() -> Any:
    """A functional model with a layer of nearly every type, nested models, and layers used twice."""
    keras = require()
    keras.utils.set_random_seed(1)
    layers = keras.layers
    image = keras.Input((8, 8, 3), name="image")
    x = layers.Conv2D(4, 3, name="conv")(image)
    x = layers.SeparableConv2D(4, 3, name="separable")(x)
    x = layers.DepthwiseConv2D(3, depth_multiplier=2, name="depthwise")(x)
    x = layers.BatchNormalization(name="norm")(x)
    x = keras.ops.relu(layers.Add(name="sum")([x, x]))
    shared = keras.Sequential([keras.Input((2, 2, 8)), layers.Flatten(), layers.Dense(6, name="dense")], name="inner")
    rows = layers.Reshape((3, 2), name="rows")
    x = layers.Concatenate(name="both")([rows(shared(x)), rows(shared(keras.ops.negative(x)))])
    x = layers.MultiHeadAttention(2, 3, name="attention")(x, x)
    x = layers.GroupQueryAttention(3, 4, 2, name="grouped")(x, x)
    x = layers.EinsumDense("abc,cde->abde", (None, 2, 3), bias_axes="de", name="einsum")(x)
    x = layers.Reshape((3, 6), name="flat")(x)
    x = layers.Bidirectional(layers.LSTM(3, return_sequences=True, name="lstm"), name="two_ways")(x)
    x = layers.TimeDistributed(layers.Dense(4, name="each"), name="steps")(x)
    x = layers.RNN([layers.GRUCell(3, name="one"), layers.LSTMCell(2, name="two")], return_sequences=True, name="rnn")(
        x
    )
    x = layers.Conv1D(4, 2, name="conv1")(x)
    x = layers.Conv1DTranspose(4, 2, name="back1")(x)
    x = layers.SimpleRNN(3, return_sequences=True, name="simple")(x)
    x = layers.GRU(3, name="gru")(x)
    x = layers.Dense(5, use_bias=False, dtype="bfloat16", name="half")(x)
    token = keras.Input((4,), name="token")
    y = layers.Flatten(name="tokens")(layers.Embedding(7, 3, name="embedding")(token))
    return keras.Model([image, token], layers.Concatenate(name="all")([x, y]), name="everything")


def values(layer: Any) -> tuple[Any, ...]:
    """All that is known about a layer but its numbers."""
    return layer.name, layer.op, layer.shape, layer.dtype, layer.channels, layer.aliases, layer.notes


def assert_same(one: Any, other: Any) -> None:
    """Assert that two models have the same layers with the same numbers, in the same order."""
    first, second = adapters.read(one), adapters.read(other)
    assert [values(one) for one in first.layers] == [values(one) for one in second.layers]
    for mine, theirs in zip(first.layers, second.layers, strict=True):
        np.testing.assert_array_equal(mine.weight, theirs.weight)
    assert first.parameters == second.parameters
