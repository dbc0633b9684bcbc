"""Keras models run on other weights than their own: against what Keras computes itself."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest

from qvis import adapters
from qvis.adapters.keras.runner import KerasRunner
from qvis.errors import BadArgumentError, NoGraphError, NotRunnableError
from qvis.layers import Norm
from qvis.running import Batch, Gradient, Grid, Passage
from tests import keras_models

keras = keras_models.require()
import tensorflow as tf  # noqa: E402

L = keras.layers
pytestmark = keras_models.QUIET


def runner_of(model: Any, loss: object = None) -> Any:
    adapter: Any = adapters.find(model)
    return adapter.runner(model, adapters.read(model), loss)


def draw(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def ones(outputs: Any) -> list[Any]:
    return [np.ones_like(one) for one in outputs]


def distinct(outputs: Any) -> list[Any]:
    """Numbers to multiply outputs with, all different."""
    return [draw(*one.shape, seed=index) for index, one in enumerate(outputs)]


def gradients(runner: Any, batch: Batch, probe: Any = distinct) -> dict[str, Gradient]:
    return {one.layer: one for one in runner.differentiate(batch, probe)}


class Subclassed(keras.Model):  # type: ignore[misc]
    """Uses a layer twice, and returns several things."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice = L.Dense(6, name="first"), L.Dense(6, name="twice", activation="tanh")
        self.norm = L.BatchNormalization(name="norm")
        self.last = L.Dense(3, name="last")

    def call(self, x: Any, scale: Any = None, training: bool = False) -> Any:
        x = self.norm(self.first(x), training=training)
        x = self.twice(keras.ops.relu(self.twice(x)))
        x = self.last(x) if scale is None else self.last(x * scale)
        self.note = x
        return {"scores": x, "best": keras.ops.argmax(x, -1)}


def subclassed() -> tuple[Any, Batch]:
    model = Subclassed()
    batch = Batch((draw(3, 4),), {"scale": draw(3, 1, seed=5)}, size=3)
    model(batch.args[0], scale=batch.kwargs["scale"])
    return model, batch


def everything() -> tuple[Any, Batch]:
    return keras_models.everything(), Batch((draw(3, 8, 8, 3), np.arange(12).reshape(3, 4) % 7), size=3)


def by_names() -> tuple[Any, Batch]:
    one, two = keras.Input((3,), name="one"), keras.Input((3,), name="two")
    shared = L.Dense(4, name="shared")
    x = L.Add(name="sum")([shared(one), shared(two)])
    model = keras.Model({"one": one, "two": two}, {"a": L.Dense(2, name="a")(x), "b": L.Dense(1, name="b")(x)})
    return model, Batch(({"one": draw(2, 3), "two": draw(2, 3, seed=1)},), size=2)


def transposed() -> tuple[Any, Batch]:
    model = keras.Sequential(
        [
            keras.Input((4, 4, 2)),
            L.Conv2DTranspose(3, 3, strides=2, activation="relu", name="up"),
            L.Conv2D(4, 3, groups=1, strides=2, padding="same", name="down"),
            L.SeparableConv2D(5, 3, padding="same", dilation_rate=2, depth_multiplier=2, name="separable"),
            L.BatchNormalization(name="norm", scale=False),
            L.GlobalAveragePooling2D(),
        ]
    )
    return model, Batch((draw(2, 4, 4, 2),), size=2)


def digits() -> tuple[Any, Batch]:
    return keras_models.digits(), Batch((draw(3, 8, 8, 1),), size=3)


MODELS: dict[str, Callable[[], tuple[Any, Batch]]] = {
    "subclassed": cache(subclassed),
    "everything": everything,
    "by names": cache(by_names),
    "transposed": cache(transposed),
    "digits": digits,
}


def call(model: Any, batch: Batch) -> Any:
    args = batch.args if len(batch.args) == 1 else (list(batch.args),)
    return model(*args, **batch.kwargs, training=False)


def real(result: Any) -> list[Any]:
    return [one for one in tf.nest.flatten(result) if one.dtype.is_floating]


def variables_of(model: Any) -> dict[str, Any]:
    """The variable and the matrix in it, for each layer."""
    from qvis.adapters.keras.live import collect

    found = collect(model)
    return {layer.name: found.sources[key][0] for key, layer in found.layers.items()}


# ---------------------------------------------------------------------------------------------------------------------
# As Keras computes it


@pytest.mark.parametrize("name", list(MODELS))
def test_outputs_are_those_of_the_model(name: str) -> None:
    model, batch = MODELS[name]()
    expected = [one.numpy() for one in real(call(model, batch))]
    runner = runner_of(model)
    for _ in range(2):
        outputs = runner.run(batch)
        assert len(outputs) == len(expected)
        for mine, theirs in zip(outputs, expected, strict=True):
            np.testing.assert_allclose(mine, theirs.astype(np.float32), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", list(MODELS))
def test_gradients_by_weights_are_those_of_a_plain_tape(name: str) -> None:
    model, batch = MODELS[name]()
    found = gradients(runner_of(model), batch)
    held = variables_of(model)
    with tf.GradientTape() as tape:
        outputs = real(call(model, batch))
        total = tf.add_n(
            [tf.reduce_sum(tf.cast(one, tf.float32) * v) for one, v in zip(outputs, distinct(outputs), strict=True)]
        )
    plain = tape.gradient(total, {key: one.variable.held.value for key, one in held.items()})
    assert list(found) == [layer.name for layer in adapters.read(model).layers]
    for key, source in held.items():
        expected = source.part.view(tf.convert_to_tensor(tf.cast(plain[key], tf.float32)).numpy())
        assert found[key].weight.dtype == np.float32
        scale = np.abs(expected).max()
        tolerance = 0.02 if source.variable.dtype == "bfloat16" else 1e-4
        np.testing.assert_allclose(found[key].weight, expected, atol=tolerance * scale + 1e-7, err_msg=key)


@pytest.mark.parametrize("name", list(MODELS))
def test_exchanged_weights_act_as_if_they_had_been_assigned(name: str) -> None:
    model, batch = MODELS[name]()
    runner = runner_of(model)
    other = {
        layer.name: layer.weight * 1.25 + draw(*layer.weight.shape, seed=9) * 0.01
        for layer in adapters.read(model).layers
    }
    before = model.get_weights()
    try:
        for key, source in variables_of(model).items():
            array = np.array(tf.cast(source.variable.held.value, tf.float32))
            array.reshape(-1)[source.places()] = other[key]
            source.variable.held.assign(array)
        expected = [one.numpy().astype(np.float32) for one in real(call(model, batch))]
    finally:
        model.set_weights(before)
    alone = runner.run(batch, weights=other)
    runner.place(other, {})
    placed = runner.run(batch)
    runner.place({}, {})
    own = runner.run(batch)
    for one, two, three, theirs in zip(alone, placed, own, expected, strict=True):
        np.testing.assert_allclose(one, theirs, rtol=1e-3, atol=1e-4)
        np.testing.assert_array_equal(one, two)
        assert np.abs(three - one).max() > 1e-5


def test_what_enters_and_leaves_layers_is_what_a_model_of_intermediates_has() -> None:
    model, batch = transposed()
    runner = runner_of(model)
    seen: list[Passage] = []
    runner.run(batch, watch=seen.append)
    assert [one.layer for one in seen] == list(runner.layers)
    between = keras.Model(model.inputs[0], [layer.output for layer in model.layers])(batch.args[0], training=False)
    up, down, separable = (one.numpy() for one in between[:3])
    np.testing.assert_array_equal(seen[0].inputs, batch.args[0])
    np.testing.assert_allclose(np.maximum(seen[0].outputs, 0), up, atol=1e-6)
    assert seen[0].outputs.min() < 0  # before the activation
    np.testing.assert_allclose(seen[1].inputs, up, atol=1e-6)
    np.testing.assert_allclose(seen[1].outputs, down, atol=1e-5)
    np.testing.assert_allclose(seen[2].inputs, down, atol=1e-5)
    np.testing.assert_array_equal(seen[2].outputs, seen[3].inputs)
    np.testing.assert_allclose(seen[3].outputs, separable, atol=1e-5)
    assert {one.axis for one in seen} == {-1}


def test_layers_used_twice_are_seen_twice() -> None:
    model, batch = subclassed()
    seen: list[Passage] = []
    runner_of(model).run(batch, watch=seen.append)
    assert [one.layer for one in seen] == ["first", "twice", "twice", "last"]
    np.testing.assert_allclose(np.maximum(np.tanh(seen[1].outputs), 0), seen[2].inputs, atol=1e-6)


@pytest.mark.parametrize("name", ["everything", "digits"])
def test_changed_outputs_are_those_of_the_other_weights(name: str) -> None:
    model, batch = MODELS[name]()
    runner = runner_of(model)
    others = {layer.name: 2 * layer.weight for layer in adapters.read(model).layers}
    plain = runner.run(batch)
    for _ in range(2):  # just run, and from a graph
        seen: list[Passage] = []
        for mine, theirs in zip(runner.run(batch, watch=seen.append, others=others), plain, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)
        biases = {layer.name: layer.bias for layer in adapters.read(model).layers}
        for one in seen:
            bias = biases[one.layer]
            # The biases of these layers are zero, or those of the model's training.
            added = 0 if bias is None or not bias().any() else bias().reshape(one.outputs.shape[-1:])
            if one.layer == "half" or "lstm" in one.layer:  # rounded to bfloat16, or without its bias
                continue
            np.testing.assert_allclose(one.changed - added, 2 * (one.outputs - added), rtol=1e-3, atol=1e-5)


def test_the_derivative_by_an_input_is_of_that_use_alone() -> None:
    given = keras.Input((3,))
    first, second = L.Dense(2, name="first", use_bias=False), L.Dense(2, name="second", use_bias=False)
    model = keras.Model(given, first(given) + second(given) + first(given * 2))
    x = draw(4, 3)
    found = gradients(runner_of(model), Batch((x,), size=4))
    v = distinct([np.zeros((4, 2))])[0]
    for layer, scales in (("first", (1, 2)), ("second", (1,))):
        kernel = model.get_layer(layer).kernel.numpy()
        assert len(found[layer].inputs) == len(scales)
        for (inputs, by), scale in zip(found[layer].inputs, scales, strict=True):
            np.testing.assert_allclose(inputs, scale * x, rtol=1e-6)
            np.testing.assert_allclose(by, v @ kernel.T, rtol=1e-5, atol=1e-6)


def test_axes_that_are_summed_over_together_become_one() -> None:
    given = keras.Input((3, 4))
    model = keras.Model(given, L.MultiHeadAttention(2, 3, name="attention")(given, given))
    layers = {layer.name: layer for layer in adapters.read(model).layers}
    runner = runner_of(model)
    seen: list[Passage] = []
    batch = Batch((draw(2, 3, 4),), size=2)
    (outputs,) = runner.run(batch, watch=seen.append)
    last = seen[-1]
    assert (last.layer, last.inputs.shape, last.axis) == ("attention/attention_output", (2, 3, 6), -1)
    np.testing.assert_allclose(last.inputs @ layers[last.layer].weight.T, outputs, atol=1e-6)
    found = gradients(runner, batch)
    (pair,) = found["attention/attention_output"].inputs
    v = distinct([outputs])[0]
    np.testing.assert_allclose(pair[1], v @ layers[last.layer].weight, rtol=1e-4, atol=1e-6)


def test_grids_round_what_enters_a_layer() -> None:
    model, batch = transposed()
    grids = {"down": Grid(4, 0.05, 3), "separable/pointwise_kernel": Grid(3, 0.2, 4), "up": Grid(8, 0.01, 100)}

    def rounded(x: Any, grid: Grid) -> Any:
        codes = np.clip(np.rint(np.asarray(x) / np.float32(grid.step)) + grid.zero, 0, 2**grid.bits - 1)
        return ((codes - grid.zero) * grid.step).astype(np.float32)

    up, down, separable, norm, pool = model.layers
    x = up(rounded(batch.args[0], grids["up"]))
    x = down(rounded(x, grids["down"]))
    x = keras.ops.depthwise_conv(x, separable.depthwise_kernel, padding="same", dilation_rate=2)
    x = keras.ops.conv(rounded(x, grids["separable/pointwise_kernel"]), separable.pointwise_kernel)
    expected = pool(norm(x + separable.bias, training=False))
    seen: list[Passage] = []
    runner = runner_of(model)
    np.testing.assert_allclose(runner.run(batch, grids=grids)[0], expected, atol=1e-5)
    runner.run(batch, grids=grids, watch=seen.append)
    assert len(np.unique(seen[1].inputs)) <= 16
    alone = runner.run(batch, grids={"down": grids["down"]})
    expected = pool(norm(separable(down(rounded(up(batch.args[0]), grids["down"])))))
    np.testing.assert_allclose(alone[0], expected, atol=1e-5)


def test_gates_share_the_grid_of_their_input() -> None:
    model = keras.Sequential([keras.Input((5, 3)), L.LSTM(4, name="lstm")])
    runner = runner_of(model)
    x = draw(2, 5, 3)
    grids = {f"lstm/kernel/{gate}": Grid(3, 0.5, 4) for gate in "ifco"}
    expected = model(np.clip(np.rint(x / 0.5) + 4, 0, 7) * 0.5 - 2)
    np.testing.assert_allclose(runner.run(Batch((x,), size=2), grids=grids)[0], expected, atol=1e-6)
    assert runner.notes[0].startswith("what enters lstm/recurrent_kernel/i, ")


# ---------------------------------------------------------------------------------------------------------------------
# Nothing of the model changes


def state(model: Any) -> Any:
    layers = {id(one): one for _, _, one in _walk(model)}.values()
    return (
        [value.copy() for value in model.get_weights()],
        [dict(vars(one)) for one in layers],
        [(len(one._inbound_nodes), len(one._outbound_nodes)) for one in layers],
        [one.trainable for one in layers],
    )


def _walk(model: Any) -> Iterator[Any]:
    from qvis.adapters.keras.live import walk

    return walk(model)


@contextmanager
def unchanged(model: Any) -> Iterator[None]:
    before = state(model)
    yield
    after = state(model)
    for one, two in zip(before[0], after[0], strict=True):
        np.testing.assert_array_equal(one, two)
    for one, two in zip(before[1], after[1], strict=True):
        assert one.keys() == two.keys()
        assert all(one[key] is two[key] for key in one)
    assert before[2:] == after[2:]


@pytest.mark.parametrize("name", list(MODELS))
def test_the_model_stays_as_it_is(name: str) -> None:
    model, batch = MODELS[name]()
    with unchanged(model):
        runner = runner_of(model)
        layers = adapters.read(model).layers
        grids = {one.name: Grid(8, 0.1, 128) for one in layers}
        for _ in range(2 if len(layers) < 10 else 1):
            runner.run(batch, weights={layers[0].name: layers[0].weight * 2})
            runner.run(batch, grids=grids, watch=lambda _: None, others={layers[-1].name: layers[-1].weight})
            gradients(runner, batch)


def test_random_numbers_of_layers_are_not_used_up() -> None:
    model = keras.Sequential([keras.Input((3,)), L.Dense(4), L.GaussianDropout(0.5, seed=3), L.Dense(2)])
    before = [variable.numpy() for variable in model.non_trainable_variables]
    generators = [layer.seed_generator.state.numpy() for layer in model.layers if hasattr(layer, "seed_generator")]
    runner = runner_of(model)
    runner.run(Batch((draw(2, 3),), size=2))
    gradients(runner, Batch((draw(2, 3),), size=2))
    after = [layer.seed_generator.state.numpy() for layer in model.layers if hasattr(layer, "seed_generator")]
    np.testing.assert_array_equal(generators, after)
    assert len(before) == len(model.non_trainable_variables)


def test_the_random_numbers_of_the_program_are_not_used_up() -> None:
    model, batch = digits()
    runner = runner_of(model)
    keras.utils.set_random_seed(3)
    expected = random.random(), np.random.random(), tf.random.uniform(()).numpy(), keras.random.uniform(()).numpy()
    keras.utils.set_random_seed(3)
    runner.run(batch, watch=lambda _: None)
    gradients(runner, batch)
    adapter: Any = adapters.find(model)
    adapter.graph(model)
    found = random.random(), np.random.random(), tf.random.uniform(()).numpy(), keras.random.uniform(()).numpy()
    assert found == expected


def test_a_failing_model_stays_as_it_is_and_says_why() -> None:
    model, batch = subclassed()
    runner = runner_of(model)
    with unchanged(model), pytest.raises(NotRunnableError, match=r"running it fails with .*args\[0\] 3x7 float32"):
        runner.run(Batch((draw(3, 7),), size=3))
    assert len(runner.run(batch)) == 1


def test_a_failing_probe_is_passed_on() -> None:
    model, batch = digits()

    def fail(_: Any) -> Any:
        raise KeyError("no such thing")

    runner = runner_of(model)
    with pytest.raises(KeyError, match="no such thing"):
        gradients(runner, batch, fail)
    assert len(gradients(runner, batch)) == 5


# ---------------------------------------------------------------------------------------------------------------------
# Models of other kinds


class Compiled(keras.Model):  # type: ignore[misc]
    """Its author compiled it."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = L.Dense(3, name="dense")

    @tf.function  # type: ignore[untyped-decorator,unused-ignore]
    def call(self, x: Any) -> Any:
        return self.dense(x) * 2


def test_a_model_that_its_author_compiled_keeps_no_trace_of_other_weights() -> None:
    model = Compiled()
    x = draw(2, 4)
    model.dense.build((None, 4))
    model.built = True
    runner = runner_of(model)
    other = {"dense": np.zeros((3, 4), np.float32)}
    np.testing.assert_array_equal(runner.run(Batch((x,), size=2), weights=other)[0], 0)
    assert gradients(runner, Batch((x,), size=2))["dense"].weight.any()
    np.testing.assert_allclose(model(x), 2 * x @ model.dense.kernel.numpy(), atol=1e-6)
    assert not tf.config.functions_run_eagerly()


class Branching(keras.Model):  # type: ignore[misc]
    """Looks at numbers, as only a model that just runs can."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = L.Dense(3, name="dense")

    def call(self, x: Any) -> Any:
        return self.dense(x) * (2 if float(keras.ops.sum(x)) > 0 else 3)


def test_a_model_that_cannot_be_traced_just_runs() -> None:
    model = Branching()
    for x in (abs(draw(2, 4)), -abs(draw(2, 4))):
        expected = model(x)
        runner = runner_of(model)
        np.testing.assert_allclose(runner.run(Batch((x,), size=2))[0], expected, atol=1e-6)
        assert gradients(runner, Batch((x,), size=2))["dense"].inputs


class Step(keras.layers.Layer):  # type: ignore[misc]
    """A recurrent cell of the user's, with a layer inside."""

    def __init__(self) -> None:
        super().__init__(name="cell")
        self.state_size, self.dense = 3, L.Dense(3, name="dense")

    def build(self, shape: Any) -> None:
        self.dense.build((shape[0], shape[-1] + 3))

    def call(self, x: Any, states: Any) -> Any:
        y = self.dense(keras.ops.concatenate([x, states[0]], -1))
        return y, [y]


def test_layers_inside_a_loop_are_seen_by_just_running() -> None:
    given = keras.Input((4, 2))
    model = keras.Model(given, L.RNN(Step(), name="rnn")(given))
    runner = runner_of(model)
    seen: list[Passage] = []
    batch = Batch((draw(2, 4, 2),), size=2)
    runner.run(batch, watch=seen.append)
    assert {(one.layer, one.inputs.shape) for one in seen} == {("rnn/dense", (2, 5))}
    assert len(seen) >= 4  # Keras tries the cell before it starts
    found = gradients(runner, batch)["rnn/dense"]
    assert len(found.inputs) == 4
    assert found.weight.any()


def test_the_way_to_an_argmax_is_the_output() -> None:
    given = keras.Input((4,))
    scores = L.Dense(3, name="dense")(given)
    model = keras.Model(given, keras.ops.cast(keras.ops.argmax(scores, -1), "float32"))
    runner = runner_of(model)
    x = draw(2, 4)
    with unchanged(model):
        np.testing.assert_allclose(runner.run(Batch((x,), size=2))[0], x @ model.get_layer("dense").kernel, atol=1e-6)
    assert any("cut off before" in note and "argmax" in note for note in runner.notes)


def test_integer_outputs_are_left_out_by_name() -> None:
    model, batch = subclassed()
    runner = runner_of(model)
    assert [one.shape for one in runner.run(batch)] == [(3, 3)]
    assert runner.notes == ["output['best'] holds no real numbers (int32) and is left out"]


class Deciding(keras.Model):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.dense = L.Dense(3, name="dense")

    def call(self, x: Any) -> Any:
        return keras.ops.argmax(self.dense(x), -1)


class Rounding(Deciding):
    def call(self, x: Any) -> Any:
        return keras.ops.round(keras.ops.stop_gradient(self.dense(x)))


def test_outputs_without_derivative_are_refused() -> None:
    batch = Batch((draw(2, 4),), size=2)
    for cls in (Deciding, Rounding):
        model = cls()
        model(batch.args[0])
        with pytest.raises(NotRunnableError, match="give a model that ends before"):
            gradients(runner_of(model), batch)


def test_narrow_types_are_handed_out_as_float32() -> None:
    for policy in ("mixed_bfloat16", "bfloat16", "mixed_float16"):
        model = keras.Sequential(
            [keras.Input((4,)), L.Dense(5, dtype=policy, name="a"), L.Dense(2, dtype=policy, name="b")]
        )
        batch = Batch((draw(3, 4),), size=3)
        runner = runner_of(model)
        seen: list[Passage] = []
        weights = {layer.name: layer.weight for layer in adapters.read(model).layers}
        outputs = runner.run(batch, weights=weights, grids={"b": Grid(8, 0.01, 128)}, watch=seen.append, others=weights)
        found = gradients(runner, batch)
        arrays = [*outputs, *(one.weight for one in found.values()), *found["b"].inputs[0]]
        arrays += [array for one in seen for array in (one.inputs, one.outputs, one.changed) if array is not None]
        assert {array.dtype for array in arrays} == {np.dtype(np.float32)}


def test_inputs_may_be_given_one_by_one_by_name_and_as_tensors() -> None:
    model, batch = by_names()
    runner = runner_of(model)
    one, two = batch.args[0].values()
    expected = runner.run(batch)
    for args, kwargs in (((one, two), {}), ((), {"one": one, "two": tf.constant(two)})):
        for mine, theirs in zip(runner.run(Batch(args, kwargs, size=2)), expected, strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_tied_weights_are_exchanged_and_differentiated_together() -> None:
    tokens = keras.Input((3,), dtype="int32")
    table = L.ReversibleEmbedding(7, 4, name="table")
    model = keras.Model(tokens, table(L.Dense(4, name="dense")(table(tokens)), reverse=True))
    runner = runner_of(model)
    batch = Batch((np.array([[1, 2, 3], [4, 5, 6]]),), size=2)
    seen: list[Passage] = []
    runner.run(batch, watch=seen.append)
    assert [(one.layer, one.inputs.shape) for one in seen] == [
        ("table/embeddings", (0,)),
        ("dense", (2, 3, 4)),
        ("table/embeddings", (2, 3, 4)),
    ]
    found = gradients(runner, batch)
    assert len(found["table/embeddings"].inputs) == 1
    assert found["table/embeddings"].weight.shape == (7, 4)


def test_a_low_rank_update_stays_part_of_the_weight() -> None:
    model = keras.Sequential([keras.Input((4,)), L.Dense(3, name="dense", use_bias=False)])
    model.layers[0].enable_lora(2)
    model.layers[0].lora_kernel_b.assign(draw(2, 3))
    runner = runner_of(model)
    x, weight = draw(2, 4), draw(3, 4, seed=2)
    np.testing.assert_allclose(runner.run(Batch((x,), size=2), weights={"dense": weight})[0], x @ weight.T, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Normalizations and losses


@pytest.mark.parametrize(("scale", "center"), [(True, True), (False, True), (True, False), (False, False)])
def test_a_normalization_is_expressed_by_what_the_layer_has(scale: bool, center: bool) -> None:
    model = keras.Sequential(
        [keras.Input((4,)), L.Dense(3, name="dense"), L.BatchNormalization(name="norm", scale=scale, center=center)]
    )
    rng = np.random.default_rng(0)
    norm = Norm("norm", *(rng.uniform(0.5, 2, 3) for _ in range(4)), 0.01)
    x = draw(2, 4)
    runner = runner_of(model)
    runner.place({}, {"norm": norm})
    dense = x @ model.layers[0].kernel.numpy()
    expected = (dense - norm.mean) / np.sqrt(norm.variance + norm.epsilon) * norm.scale + norm.shift
    np.testing.assert_allclose(runner.run(Batch((x,), size=2))[0], expected, rtol=1e-4, atol=1e-5)


def test_a_normalization_that_cannot_be_expressed_is_refused_by_name() -> None:
    model = keras.Sequential([keras.Input((4,)), L.Dense(3), L.BatchNormalization(name="norm", scale=False)])
    numbers = np.ones(3)
    runner = runner_of(model)
    with pytest.raises(BadArgumentError, match=r"'norm' has no scale of its own .* -1"):
        runner.place({}, {"norm": Norm("norm", numbers, numbers, -numbers, numbers, 0)})
    with pytest.raises(BadArgumentError, match="did you mean 'norm'"):
        runner.place({}, {"nrm": Norm("nrm", numbers, numbers, numbers, numbers, 0)})


@pytest.mark.parametrize(
    "loss",
    [
        "sparse_categorical_crossentropy",
        keras.losses.SparseCategoricalCrossentropy(),
        lambda labels, outputs: keras.ops.mean(keras.losses.sparse_categorical_crossentropy(labels, outputs)),
    ],
)
def test_a_loss_takes_the_place_of_the_outputs(loss: Any) -> None:
    model = keras.Sequential([keras.Input((4,)), L.Dense(3, activation="softmax", name="dense")])
    x, labels = draw(5, 4), np.array([0, 1, 2, 1, 0])
    runner = runner_of(model, loss)
    (losses,) = runner.run(Batch((x,), labels=labels, size=5))
    expected = -np.log(model(x).numpy()[np.arange(5), labels])
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    probability = model(x).numpy() - np.eye(3)[labels]
    found = gradients(runner, Batch((x,), labels=labels, size=5), ones)
    np.testing.assert_allclose(found["dense"].weight, probability.T @ x, rtol=1e-3, atol=1e-5)
    with pytest.raises(BadArgumentError, match="no labels"):
        runner.run(Batch((x,), size=5))


def test_a_loss_that_is_none_is_refused() -> None:
    model, _ = digits()
    with pytest.raises(BadArgumentError, match="no loss 'crossed'"):
        runner_of(model, "crossed")
    with pytest.raises(BadArgumentError, match="got 3, expected"):
        runner_of(model, 3)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def test_weights_of_another_name_or_shape_are_refused() -> None:
    model, batch = digits()
    runner = runner_of(model)
    with pytest.raises(BadArgumentError, match="did you mean 'head'"):
        runner.run(batch, weights={"hed": np.ones((10, 144))})
    with pytest.raises(BadArgumentError, match=r"'head' has the shape \(10, 144\), not \(144, 10\)"):
        runner.run(batch, weights={"head": np.ones((144, 10))})


def test_layers_without_weights_are_not_built_by_a_run() -> None:
    model = Branching()
    model.other = L.Dense(2, name="other")
    model.dense.build((None, 4))
    model.built = True
    runner = runner_of(model)
    batch = Batch((draw(2, 4),), size=2)
    model.call = lambda x: model.other(model.dense(x))
    with unchanged(model), pytest.raises(NotRunnableError, match=r"^model: its layer 'other' has no weights yet; call"):
        runner.run(batch)
    assert not model.other.weights


def test_grids_and_weights_to_try_of_other_names_are_refused() -> None:
    model, batch = digits()
    runner = runner_of(model)
    with pytest.raises(BadArgumentError, match=r"grids: 'hed' is no layer to be run; did you mean 'head'"):
        runner.run(batch, grids={"hed": Grid(8, 0.1, 0)})
    with pytest.raises(BadArgumentError, match=r"others: 'hed' is no layer"):
        runner.run(batch, others={"hed": np.ones((10, 144))})


def test_other_backends_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = digits()
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(NotRunnableError, match=r"Keras runs on jax here.*KERAS_BACKEND=tensorflow"):
        runner_of(model)


def test_models_of_keras_2_are_refused_by_name() -> None:
    pytest.importorskip("tf_keras")
    import tf_keras

    model = tf_keras.Sequential([tf_keras.layers.Input((4,)), tf_keras.layers.Dense(3)], name="old")
    with pytest.raises(NotRunnableError, match=r"'old' is a model of Keras 2 \(tf_keras\).* Keras 3"):
        runner_of(model)
    adapter: Any = adapters.find(model)
    with pytest.raises(NoGraphError, match="Keras 2"):
        adapter.graph(model)


def test_quantized_weights_are_named_and_left() -> None:
    model = keras.Sequential([keras.Input((4,)), L.Dense(3, name="small"), L.Dense(2, name="other")])
    model.layers[0].quantize("int8")
    runner = runner_of(model)
    assert runner.layers == ("other",)
    assert runner.notes[0] == "the weights of small are quantized, and cannot be exchanged"
    assert isinstance(runner, KerasRunner)


# ---------------------------------------------------------------------------------------------------------------------
# What layers add

BIASED: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "Dense": (lambda: L.Dense(5), (1, 4)),
    "Conv2D": (lambda: L.Conv2D(6, 3, groups=2), (1, 6, 6, 4)),
    "Conv2DTranspose": (lambda: L.Conv2DTranspose(5, 3), (1, 4, 4, 2)),
    "DepthwiseConv2D": (lambda: L.DepthwiseConv2D(3, depth_multiplier=2), (1, 6, 6, 3)),
    "EinsumDense": (lambda: L.EinsumDense("abc,cde->abde", (None, 2, 5), bias_axes="de"), (1, 3, 4)),
    "EinsumDense of one axis": (lambda: L.EinsumDense("abc,cde->abde", (None, 2, 5), bias_axes="d"), (1, 3, 4)),
    "EinsumDense in another order": (lambda: L.EinsumDense("abc,cde->abed", (None, 5, 2), bias_axes="de"), (1, 3, 4)),
}


@pytest.mark.parametrize("case", list(BIASED))
def test_a_bias_is_what_is_added_to_each_channel(case: str) -> None:
    make, shape = BIASED[case]
    layer = make()
    layer.build(shape)
    layer.bias.assign(draw(*layer.bias.shape))
    (found,) = adapters.read(layer).layers
    assert found.bias is not None
    layer.kernel.assign(np.zeros(found.shape))
    added = layer(draw(*shape)).numpy()
    if case.endswith("another order"):
        added = added.swapaxes(-1, -2)
    rows = added.reshape(-1, len(found.weight))
    np.testing.assert_array_equal(rows, np.broadcast_to(found.bias(), rows.shape))


def test_gates_have_their_parts_of_a_bias() -> None:
    for layer, gates in ((L.LSTM(3), "ifco"), (L.GRU(3), "zrh"), (L.GRU(3, reset_after=False), "zrh")):
        layer.build((1, 2, 4))
        layer.cell.bias.assign(draw(*layer.cell.bias.shape))
        found = {one.name: one for one in adapters.read(layer).layers}
        rows = layer.cell.bias.numpy().reshape(-1, 3 * len(gates))[0].reshape(-1, 3)
        for gate, row in zip(gates, rows, strict=True):
            bias = found[f"kernel/{gate}"].bias
            assert bias is not None
            np.testing.assert_array_equal(bias(), row)
            assert found[f"recurrent_kernel/{gate}"].bias is None


def test_layers_without_a_bias_of_their_own_have_none() -> None:
    separable, position = L.SeparableConv1D(3, 2), L.EinsumDense("abc,cd->abd", (3, 5), bias_axes="bd")
    for layer in (separable, position, L.Dense(3, use_bias=False), L.Embedding(4, 3)):
        layer.build((1, 3, 4))
    assert [one.bias is None for one in adapters.read(separable).layers] == [True, False]
    for layer in (position,):
        assert adapters.read(layer).layers[0].bias is None
