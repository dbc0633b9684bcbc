"""Equalizing Keras models from end to end: they compute the same, round better, and can be saved."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qvis
from tests import keras_models

keras = keras_models.require()

L = keras.layers
pytestmark = keras_models.QUIET


def noise(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def run(model: Any, x: Any) -> Any:
    return np.asarray(model(x, training=False))


@cache
def clipped() -> tuple[Any, Any]:
    """A small MobileNet whose channels differ in size a hundredfold."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            L.Conv2D(6, 3, use_bias=False, name="stem"),
            L.BatchNormalization(name="norm"),
            L.ReLU(6, name="relu"),
            L.DepthwiseConv2D(3, activation="relu6", name="depthwise"),
            L.Conv2D(5, 1, name="last"),
            L.Activation("relu6", name="act"),
            L.GlobalAveragePooling2D(),
            L.Dense(3, name="head"),
        ]
    )
    norm, depthwise = model.get_layer("norm"), model.get_layer("depthwise")
    norm.gamma.assign(np.logspace(-1.5, 0, 6))
    norm.beta.assign(noise(6) * 0.1)
    depthwise.kernel.assign(depthwise.kernel * np.logspace(1.5, 0, 6)[:, None])
    return model, noise(8, 8, 8, 3)


@cache
def encoder() -> tuple[Any, Any]:
    """A transformer's block, where what enters one layer comes from a GELU and differs from channel to channel."""
    keras.utils.set_random_seed(0)
    given = keras.Input((4, 8))
    y = L.LayerNormalization(name="norm1")(given)
    x = L.Add()([given, L.MultiHeadAttention(2, 4, name="mha")(y, y)])
    y = L.LayerNormalization(name="norm2")(x)
    y = L.Dense(12, name="middle")(L.Dense(16, activation="gelu", name="up")(y))
    y = L.Rescaling(np.logspace(-2, 0.5, 12).tolist(), name="sizes")(keras.activations.gelu(y))
    y = L.Dense(8, name="down")(y)
    model = keras.Model(given, L.Dense(3, name="head")(L.GlobalAveragePooling1D()(L.Add()([x, y]))))
    down = model.get_layer("down")
    down.kernel.assign(down.kernel * np.logspace(2, -0.5, 12)[:, None])
    return model, noise(8, 4, 8)


def test_clips_are_exchanged_for_relu_where_that_helps(tmp_path: Path) -> None:
    model, x = clipped()
    own = run(model, x)
    result = qvis.equalize(model, x, probes=1, replace_relu6=True)
    assert result.accepted
    assert result.verification.gain_db() > 10
    assert [str(pair) for pair in result.pairs] == ["stem -> depthwise", "depthwise -> last", "last -> head"]
    assert np.abs(run(result.model, x) - own).max() < 1e-5 * np.abs(own).max()  # nothing here is as large as 6
    large = 100 * x
    assert run(result.model, large).max() != pytest.approx(run(model, large).max(), rel=0.1)
    np.testing.assert_array_equal(run(model, x), own)
    for suffix in (".keras", ".h5"):
        result.save(tmp_path / f"new{suffix}")
        loaded = keras.models.load_model(tmp_path / f"new{suffix}", compile=False)
        np.testing.assert_array_equal(run(loaded, large), run(result.model, large))


def test_attention_and_normalizations_are_scaled_and_a_multiplication_is_inserted(tmp_path: Path) -> None:
    model, x = encoder()
    own = run(model, x)
    model.save(tmp_path / "own.keras")
    for given in (model, tmp_path / "own.keras"):
        result = qvis.equalize(given, x, probes=1, multiply="offered")
        assert result.accepted
        assert result.offers == []  # what was offered is there now
        assert [str(pair) for pair in result.pairs] == [
            "norm1 -> mha/query, mha/key, mha/value",
            "mha/value -> mha/attention_output",
            "norm2 -> up",
            "a multiplication -> down",
        ]
        assert result.verification.gain_db() > 10
        assert np.abs(run(result.model, x) - own).max() < 1e-5 * np.abs(own).max()
        assert {one.name for one in result.model.layers} - {one.name for one in model.layers} == {"down_multiply"}
    result.save(tmp_path / "new.keras")
    loaded = keras.models.load_model(tmp_path / "new.keras", compile=False)
    np.testing.assert_array_equal(run(loaded, x), run(result.model, x))
    np.testing.assert_array_equal(run(model, x), own)
