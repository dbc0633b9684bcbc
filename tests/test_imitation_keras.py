"""Inputs that are made up for a Keras model without data."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import numpy as np
import pytest

import qvis
from qvis.running import Batch
from tests import keras_models

keras = keras_models.require()
import tensorflow as tf  # noqa: E402

from qvis.adapters.keras.imitation import minimize  # noqa: E402
from tests.test_runner_keras import draw, runner_of, unchanged  # noqa: E402

L = keras.layers
pytestmark = keras_models.QUIET
PLAIN = "noise, since the model has no normalization that remembers its data"


def misfit(model: Any, inputs: Any) -> float:
    """How far what enters each BatchNormalization is from what it remembers, found by models that end there."""
    found = []
    for norm in model.layers:
        if isinstance(norm, L.BatchNormalization):
            x = keras.Model(model.inputs[0], norm.input)(inputs).numpy().reshape(-1, norm.moving_mean.shape[0])
            mean, deviation = norm.moving_mean.numpy(), np.sqrt(norm.moving_variance.numpy())
            off = ((x.mean(0) - mean) / deviation) ** 2 + (x.std(0) / deviation - 1) ** 2
            found.append(np.minimum(off, 100).mean())
    return float(np.mean(found))


def test_made_up_inputs_come_near_to_what_the_normalizations_remember() -> None:
    model = keras_models.digits()
    with unchanged(model):
        batches, how = runner_of(model).imitate(Batch((np.zeros((1, 8, 8, 1), np.float32),)), 17)
    assert how == "noise, shaped in up to 40 steps to the statistics of 1 normalizations"
    assert [(one.size, one.args[0].shape) for one in batches] == [(16, (16, 8, 8, 1)), (1, (1, 8, 8, 1))]
    assert all(one.args[0].dtype == np.float32 for one in batches)
    assert misfit(model, batches[0].args[0]) < 0.02 * misfit(model, draw(16, 8, 8, 1))


def test_a_study_without_data_uses_them() -> None:
    result = qvis.sensitivity(keras_models.digits(), example_inputs=(1, 8, 8, 1), samples=16, bits=8, probes=1)
    assert result.evidence == "predicted from made-up inputs"
    assert any("shaped in up to 40 steps" in note for note in result.notes)


def images() -> Any:
    """Takes bytes, and normalizes their channels, which are the first axis; parts of it are float16."""
    keras.utils.set_random_seed(2)
    model = keras.Sequential(
        [
            keras.Input((2, 5, 5)),
            L.Rescaling(1 / 255),
            L.Permute((2, 3, 1)),
            L.Conv2D(4, 3, dtype="mixed_float16"),
            L.Permute((3, 1, 2)),
            L.BatchNormalization(axis=1, name="norm"),
            L.Flatten(),
            L.Dense(2),
        ]
    )
    model.get_layer("norm").moving_mean.assign([0.5, -0.2, 0.1, 0.3])
    return model


def test_inputs_of_another_scale_are_found() -> None:
    batches, how = runner_of(model := images()).imitate(Batch((draw(1, 2, 5, 5),)), 16)
    x = batches[0].args[0]
    assert "shaped" in how
    norm = model.get_layer("norm")
    entering = keras.Model(model.inputs[0], norm.input)(x).numpy().transpose(0, 2, 3, 1).reshape(-1, 4)
    np.testing.assert_allclose(entering.mean(0), norm.moving_mean.numpy(), atol=0.1)
    np.testing.assert_allclose(entering.std(0), 1, atol=0.1)
    assert x.std() > 50


def test_the_same_seed_gives_the_same_inputs_and_no_random_state_is_used() -> None:
    runner, example = runner_of(keras_models.digits()), Batch((draw(1, 8, 8, 1),))
    keras.utils.set_random_seed(3)
    expected = random.random(), np.random.random(), tf.random.uniform(()).numpy(), keras.random.uniform(()).numpy()
    keras.utils.set_random_seed(3)
    one, two, other = (runner.imitate(example, 2, seed)[0][0].args[0] for seed in (3, 3, 4))
    found = random.random(), np.random.random(), tf.random.uniform(()).numpy(), keras.random.uniform(()).numpy()
    assert found == expected
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, other)


@cache
def tokens() -> Any:
    """Words of two tables by name, one of them as real numbers, a mask, and a real input."""
    kinds = {"words": "float32", "kind": "int32", "mask": "int32", "extra": "float32"}
    shapes = {"words": (6,), "kind": (1,), "mask": (6,), "extra": (6, 4)}
    inputs = {name: keras.Input(shapes[name], name=name, dtype=kinds[name]) for name in kinds}
    x = L.Embedding(50, 4, name="all_words")(inputs["words"]) + L.Embedding(3, 4, name="kinds")(inputs["kind"])
    x = (x + inputs["extra"]) * keras.ops.cast(inputs["mask"], "float32")[..., None]
    return keras.Model(inputs, L.Dense(3)(x))


@pytest.mark.parametrize("nested", [False, True])
def test_numbers_of_rows_stay_within_their_table(nested: bool) -> None:
    given = {
        "mask": np.zeros((2, 6), np.int32),
        "kind": np.zeros((2, 1), np.int64),
        "words": np.zeros((2, 6), np.float32),
        "extra": np.zeros((2, 6, 4), np.float64),
    }
    runner = runner_of(tokens())
    batches, how = runner.imitate(Batch((given,), {}, None, 2) if nested else Batch((), given, None, 2), 40)
    assert how == PLAIN
    made = [one.args[0] if nested else one.kwargs for one in batches]
    assert [one["words"].shape for one in made] == [(16, 6), (16, 6), (8, 6)]
    words, kind = (np.concatenate([one[name] for one in made]) for name in ("words", "kind"))
    assert words.dtype == np.float32
    assert words.min() >= 0
    assert 40 < words.max() < 50
    assert set(kind.ravel().tolist()) == {0, 1, 2}
    assert kind.dtype == np.int64
    for one, batch in zip(made, batches, strict=True):
        assert one["mask"].dtype == np.int32
        assert one["mask"].all()
        assert one["extra"].dtype == np.float64
        assert runner.run(batch)[0].shape == (batch.size, 6, 3)


class Loose(keras.Model):  # type: ignore[misc]
    """A model that is code: an image of some type, and an option that is no array."""

    def __init__(self, cut: bool = False, size: int | None = None) -> None:
        super().__init__()
        self.conv, self.norm, self.cut, self.size = L.Conv2D(2, 3), L.BatchNormalization(), cut, size
        self(np.zeros((size or 1, 5, 5, 1), np.float32), mode="x")

    def call(self, x: Any, mode: str = "", training: bool = False) -> Any:
        assert mode == "x"
        if self.size is not None:
            x = tf.reshape(x, (self.size, 5, 5, 1))
        x = self.conv(tf.cast(x, "float32"))
        return self.norm(tf.stop_gradient(x) if self.cut else x, training=training)


def test_a_model_without_derivative_by_its_inputs_gets_noise() -> None:
    (batch,), how = runner_of(Loose(cut=True)).imitate(Batch((draw(1, 5, 5, 1),), {"mode": "x"}), 16)
    assert how == "noise, since the model cannot be differentiated by its inputs"
    assert 0.8 < batch.args[0].std() < 1.2
    assert batch.kwargs == {"mode": "x"}


def test_a_model_for_two_samples_gets_two_at_a_time() -> None:
    batches, how = runner_of(Loose(size=2)).imitate(Batch((draw(2, 5, 5, 1),), {"mode": "x"}, None, 2), 4)
    assert [one.args[0].shape for one in batches] == [(2, 5, 5, 1)] * 2
    assert "shaped" in how


@pytest.mark.parametrize("kind", [np.uint8, np.bool_, np.float16])
def test_inputs_have_the_type_of_the_example(kind: Any) -> None:
    (batch,), _ = runner_of(Loose()).imitate(Batch((np.zeros((1, 5, 5, 1), kind),), {"mode": "x"}), 16)
    values = batch.args[0]
    assert values.dtype == kind
    assert values.all() if kind is np.bool_ else values.std() > (50 if kind is np.uint8 else 0.1)


def test_a_bent_valley_is_followed_to_its_end() -> None:
    def valley(x: Any) -> tuple[float, Any]:
        a, b = x.astype(np.float64)
        slope = [-2 * (1 - a) - 40 * a * (b - a * a), 20 * (b - a * a)]
        return (1 - a) ** 2 + 10 * (b - a * a) ** 2, np.array(slope, np.float32)

    np.testing.assert_allclose(minimize(valley, np.array([-1.2, 1.0], np.float32)), [1, 1], atol=0.01)


def test_a_function_that_is_no_number_is_left_where_it_is() -> None:
    start = np.ones(3, np.float32)
    assert minimize(lambda x: (float("nan"), np.full_like(x, np.nan)), start) is start
    assert minimize(lambda x: (float(x.sum()) if x is start else float("nan"), np.ones_like(x)), start) is start
