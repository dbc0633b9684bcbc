"""Keras 2 models (``tf_keras``) are read in memory and from all that Keras 2 writes."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qvis import adapters
from qvis.errors import BadArgumentError, UnsupportedModelError
from qvis.rewriting import Rewriting
from tests import keras_models

keras_models.require()
if find_spec("tf_keras") is None and not os.environ.get("CI"):
    pytest.skip("tf_keras is not installed", allow_module_level=True)
import tensorflow as tf  # noqa: E402
import tf_keras as keras  # noqa: E402

L = keras.layers
pytestmark = [
    *keras_models.QUIET,
    pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file:UserWarning"),
]


@cache
def model() -> Any:
    keras.utils.set_random_seed(0)
    image = keras.Input((8, 8, 3))
    x = L.Conv2D(4, 3, name="conv")(image)
    x = L.SeparableConv2D(4, 3, depth_multiplier=2, name="separable")(x)
    x = L.DepthwiseConv2D(3, depth_multiplier=2, name="depthwise")(x)
    x = tf.nn.relu(L.BatchNormalization(name="norm")(x))
    inner = [keras.Input((2, 2, 8)), L.Flatten(), L.Dense(6, name="dense"), L.Reshape((3, 2))]
    x = keras.Sequential(inner, name="inner")(x)
    x = L.MultiHeadAttention(2, 3, name="attention")(x, x)
    x = L.Bidirectional(L.LSTM(3, return_sequences=True, name="lstm"), name="both")(x)
    x = L.TimeDistributed(L.Dense(4, name="each"), name="steps")(x)
    x = L.RNN([L.GRUCell(3), L.LSTMCell(2)], return_sequences=True, name="rnn")(x)
    x = L.Conv1DTranspose(3, 2, name="back")(x)
    x = L.GRU(3, name="gru")(L.SimpleRNN(3, return_sequences=True, name="simple")(x))
    result = keras.Model(image, L.Dense(5, use_bias=False, name="head")(x), name="old")
    result.compile("adam", "mse")
    result.fit(np.zeros((2, 8, 8, 3)), np.zeros((2, 5)), verbose=0)
    return result


def test_every_matrix_is_found() -> None:
    network = adapters.read(model())
    assert network.framework == f"Keras {keras.__version__}"
    trainable = model().trainable_variables
    assert network.parameters == sum(int(np.prod(one.shape)) for one in trainable)
    gates = [layer for layer in network.layers if "part" in layer.channels]
    assert len(gates) == 2 * (4 + 4 + 3 + 4 + 3)  # of both directions, the two cells and the GRU
    biases = 3 + 2  # the attention's projections and GRUs have some of two axes
    kernels = sum(len(one.shape) > 1 for one in trainable) - biases
    assert len(network.layers) - len(gates) == kernels - 2 * 5
    found = {layer.name: (layer.op, layer.channels) for layer in network.layers}
    assert found["depthwise"] == ("DepthwiseConv2D", "axes 2 x 3")
    assert found["inner/dense"] == ("Dense", "axis 1")
    assert found["attention/query"] == ("EinsumDense", "axes 1 x 2")
    assert found["both/backward_lstm/kernel/o"] == ("LSTM", "axis 1, part 4 of 4")
    assert found["back"] == ("Conv1DTranspose", "axis 1")


@pytest.mark.parametrize("name", ["model.h5", "model.keras"])
def test_a_whole_model_is_read_like_the_model_itself(tmp_path: Path, name: str) -> None:
    model().save(tmp_path / name)
    keras_models.assert_same(model(), tmp_path / name)


@pytest.mark.parametrize("kind", ["weights.h5", "SavedModel"])
def test_weights_alone_are_told_by_their_names_and_shapes(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "weights.h5"
    if kind == "SavedModel":
        tf.saved_model.save(model(), path := tmp_path / "saved")
    else:
        model().save_weights(path)
    live, stored = adapters.read(model()), adapters.read(path)
    assert stored.parameters == live.parameters
    found = {layer.name: layer for layer in stored.layers}
    # These files do not say what is around a layer in a nested model, or inside a TimeDistributed.
    shorter = {"steps/each": "steps"} | ({"inner/dense": "dense"} if kind == "SavedModel" else {})
    for layer in live.layers:
        other = found.pop(shorter.get(layer.name, layer.name))
        assert (layer.op, layer.channels) == (other.op, other.channels)
        np.testing.assert_array_equal(layer.weight, other.weight)
    assert not found


def test_a_model_that_was_never_built_is_answered_with_the_way_out() -> None:
    with pytest.raises(UnsupportedModelError, match="is not built yet"):
        adapters.read(keras.Sequential([L.Dense(3)]))


def test_operations_of_keras_2_stay_and_that_is_said() -> None:
    model = keras.Sequential([L.Input((4,)), L.Dense(3, name="dense"), L.ReLU(6, name="relu")])
    network = adapters.read(model)
    assert adapters.multipliable(model, network) == []
    _, notes = adapters.rewrite(model, network, Rewriting(unclipped=["relu"]))
    assert notes == ("relu: not made ReLU, since the model is one of Keras 2; build it with Keras 3",)
    with pytest.raises(BadArgumentError, match="what enters 'dense' cannot be multiplied: the model is one of Keras 2"):
        adapters.rewrite(model, network, Rewriting(multiplies={"dense": np.ones(4)}))
