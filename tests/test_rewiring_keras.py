"""Clips that become ReLU, and multiplications before layers, in copies of Keras models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qvis import adapters
from qvis.errors import BadArgumentError
from qvis.layers import Graph, Network
from qvis.rewriting import Rewriting
from qvis.running import Batch
from tests import keras_models
from tests.test_rewriting_keras import frozen, noise, run

keras = keras_models.require()

L = keras.layers
pytestmark = keras_models.QUIET


def read(model: Any, x: Any) -> Network:
    return replace(adapters.read(model), graph=adapters.graph(model, Batch((x,), size=len(x))))


def graph_of(model: Any, x: Any) -> Graph:
    return adapters.graph(model, Batch((x,), size=len(x)))


def ops(model: Any, x: Any) -> list[str]:
    return [node.op for node in graph_of(model, x).nodes]


def draw(model: Any) -> Any:
    """Give all weights random numbers that are large enough for clips to matter."""
    for seed, one in enumerate(model.weights):
        one.assign(noise(*one.shape, seed=seed) * 3)
    return model


def clipped() -> Any:
    """A clip of every kind that can be exchanged."""
    given = keras.Input((6,))
    x = L.Dense(6, activation="relu6", name="string")(given)
    x = L.Dense(6, activation=keras.activations.relu6, name="function")(x)
    x = L.Dense(6, activation=L.ReLU(6, name="inside"), name="layer")(x)
    x = L.ReLU(max_value=4, name="relu")(L.Dense(6, name="dense1")(x))
    x = L.Activation("relu6", name="activation")(L.Dense(6, name="dense2")(x))
    inner = keras.Sequential([keras.Input((6,)), L.Dense(6, name="dense"), L.ReLU(6, name="relu")], name="inner")
    x = inner(inner(x))
    return draw(keras.Model(given, L.Dense(3, name="last")(x)))


NAMES = [
    "string/relu6", "function/relu6", "layer/inside", "relu", "activation", "inner/relu", "inner/relu@2",
]  # fmt: skip


def unclipped_by_hand(model: Any, x: Any) -> Any:
    """The same computed layer by layer with ReLU everywhere."""
    inner = model.get_layer("inner").get_layer("dense")
    layers = [model.get_layer(name) for name in ("string", "function", "layer", "dense1", "dense2")]
    x = np.asarray(x, np.float64)
    for layer in [*layers, inner, inner]:
        x = np.maximum(x @ layer.kernel.numpy() + layer.bias.numpy(), 0)
    last = model.get_layer("last")
    return x @ last.kernel.numpy() + last.bias.numpy()


# ---------------------------------------------------------------------------------------------------------------------
# Clips


def test_clips_become_relu_in_a_copy_that_was_run_before() -> None:
    model, x = clipped(), noise(4, 6)
    own = model.predict(x, verbose=0)
    before, network = frozen(model), read(model, x)
    assert [node.name for node in network.graph.nodes if node.op == "clip"] == NAMES  # type: ignore[union-attr]
    new, notes = adapters.rewrite(model, network, Rewriting(unclipped=NAMES))
    assert notes == ()
    wanted = unclipped_by_hand(model, x)
    scale = np.abs(wanted).max()
    assert np.abs(own - wanted).max() > 0.1 * scale  # so that it is seen whether something clips
    np.testing.assert_allclose(new.predict(x, verbose=0), wanted, atol=1e-5 * scale)
    np.testing.assert_allclose(run(new, [x]), wanted, atol=1e-5 * scale)
    runner = adapters.runner(new, adapters.read(new))
    np.testing.assert_allclose(runner.run(Batch((x,), size=4))[0], wanted, atol=1e-5 * scale)
    np.testing.assert_array_equal(model.predict(x, verbose=0), own)
    assert frozen(model) == before
    assert ops(new, x).count("relu") == len(NAMES)
    assert "clip" not in ops(new, x)
    assert ops(model, x).count("clip") == len(NAMES)


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_a_model_with_relu_in_place_of_clips_is_saved_and_loaded(suffix: str, tmp_path: Path) -> None:
    given = keras.Input((6, 6, 2))
    x = L.ReLU(6.0, name="relu")(L.Conv2D(4, 3, name="conv")(given))
    x = L.DepthwiseConv2D(3, activation="relu6", name="depthwise")(x)
    x = L.SeparableConv2D(3, 1, activation="relu6", name="separable")(x)
    model, x = draw(keras.Model(given, L.Dense(2)(L.Flatten()(x)))), noise(2, 6, 6, 2)
    names = ["relu", "depthwise/relu6", "separable/relu6"]
    new, notes = adapters.rewrite(model, read(model, x), Rewriting(unclipped=names))
    assert notes == ()
    loaded = keras.models.load_model(adapters.save(new, tmp_path / f"new{suffix}"), compile=False)
    np.testing.assert_array_equal(run(loaded, [x]), run(new, [x]))
    assert np.abs(run(new, [x]) - run(model, [x])).max() > 1
    assert [node.name for node in graph_of(loaded, x).nodes if node.op == "relu"] == [
        "relu", "depthwise/relu", "separable/relu",
    ]  # fmt: skip
    keras_models.assert_same(model, loaded)


def test_operations_that_are_no_layers_are_exchanged_in_a_copy(tmp_path: Path) -> None:
    keras.utils.clear_session()
    given = keras.Input((6,))
    dense = L.Dense(6, name="dense")
    x = keras.ops.clip(dense(keras.ops.relu6(dense(given))), 0, 4)
    model, x = draw(keras.Model(given, {"one": x, "two": L.Dense(2, name="last")(x)})), noise(4, 6)
    network, before = read(model, x), frozen(model)
    names = [node.name for node in network.graph.nodes if node.op == "clip"]  # type: ignore[union-attr]
    new, notes = adapters.rewrite(model, network, Rewriting(unclipped=names))
    assert notes == ()
    assert [one.name for one in new.operations] == [one.name for one in model.operations]
    kernel, bias = (one.numpy().astype(np.float64) for one in dense.weights)
    wanted = np.maximum(np.maximum(x @ kernel + bias, 0) @ kernel + bias, 0)
    np.testing.assert_allclose(new(x)["one"], wanted, rtol=1e-4, atol=1e-4)
    assert frozen(model) == before
    assert ops(model, x).count("clip") == 2
    loaded = keras.models.load_model(adapters.save(new, tmp_path / "new.keras"), compile=False)
    np.testing.assert_array_equal(loaded(x)["two"], new(x)["two"])
    _, notes = adapters.rewrite(model, network, Rewriting(unclipped=names), inplace=True)
    assert notes == (
        "relu6, clip: not made ReLU, since it is an operation among the nodes of the model, which only change in"
        " a copy; leave out inplace",
    )
    assert ops(model, x).count("clip") == 2


class Own(keras.layers.Layer):  # type: ignore[misc]
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dense = L.Dense(4, name="dense")

    def build(self, shape: Any) -> None:
        self.dense.build(shape)

    def call(self, x: Any) -> Any:
        return keras.ops.relu6(self.dense(x))


def test_clips_that_cannot_be_exchanged_stay_and_are_told() -> None:
    keras.utils.clear_session()
    given = keras.Input((4,))
    twice = L.ReLU(6, name="twice")
    x = twice(L.Dense(4)(twice(L.Dense(4)(given))))
    model, x = draw(keras.Model(given, Own(name="own")(keras.ops.clip(x, -1, 1)))), noise(3, 4)
    network, own = read(model, x), run(model, [x])
    new, notes = adapters.rewrite(model, network, Rewriting(unclipped=["own/relu6", "clip", "twice", "dense"]))
    np.testing.assert_array_equal(run(new, [x]), own)
    assert [note.partition(":")[0] for note in notes] == ["own/relu6", "clip", "twice", "dense"]
    assert "the code of a layer or model of one's own computes it" in notes[0]
    assert "no clip from 0 upwards" in notes[1]
    assert "called several times, and not all of its calls are to change" in notes[2]
    assert "no clip from 0 upwards but linear" in notes[3]
    with pytest.raises(BadArgumentError, match=r"unclipped: no operation is called 'twise'; did you mean 'twice'"):
        adapters.rewrite(model, network, Rewriting(unclipped=["twise"]))
    new, notes = adapters.rewrite(model, network, Rewriting(unclipped=["twice", "twice@2"]))
    assert notes == ()
    assert ops(new, x).count("relu") == 2


def test_in_place_what_keras_had_traced_is_traced_anew() -> None:
    model, x = clipped(), noise(4, 6)
    model.compile("sgd", "mse")
    own = model.predict(x, verbose=0)
    model.evaluate(x, own, verbose=0)
    wanted = unclipped_by_hand(model, x)
    new, notes = adapters.rewrite(model, read(model, x), Rewriting(unclipped=NAMES), inplace=True)
    assert new is model
    assert len(notes) == 1
    assert "what tf.function, or a model around it, has traced of it before still clips" in notes[0]
    np.testing.assert_allclose(model.predict(x, verbose=0), wanted, atol=1e-5 * np.abs(wanted).max())
    loss = model.evaluate(x, own, verbose=0)
    assert loss == pytest.approx(float(np.mean((wanted - own) ** 2)), rel=1e-3)
    model.fit(x, own, verbose=0)


def test_in_place_a_model_with_compiled_code_keeps_its_clips() -> None:
    import tensorflow as tf

    class Compiled(keras.Model):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(name="compiled")
            self.dense, self.act = L.Dense(3, name="dense"), L.ReLU(6, name="act")

        @tf.function  # type: ignore[untyped-decorator]
        def call(self, x: Any) -> Any:
            return self.act(self.dense(x))

    model, x = Compiled(), noise(2, 4)
    model(x)
    network = adapters.read(model)
    _, notes = adapters.rewrite(model, network, Rewriting(unclipped=["act"]), inplace=True)
    assert len(notes) == 1
    assert "act: not made ReLU, since code of the model is compiled by tf.function" in notes[0]
    new, notes = adapters.rewrite(model, network, Rewriting(unclipped=["act"]))
    assert notes == ()
    new.dense.kernel.assign(noise(4, 3) * 9)
    wanted = np.maximum(x @ new.dense.kernel.numpy() + new.dense.bias.numpy(), 0)
    assert wanted.max() > 6
    np.testing.assert_allclose(run(new, [x]), wanted, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Multiplications


def nested() -> Any:
    inner = keras.Sequential([keras.Input((3, 6)), L.Dense(5, name="up"), L.Dense(6, name="down")], name="inner")
    shared = L.Dense(6, activation="tanh", name="shared")
    given = keras.Input((3, 6))
    x = inner(shared(given))
    x = L.Add()([shared(x), inner(x)])
    x = L.EinsumDense("abc,cde->abde", (None, 2, 2), bias_axes="de", name="heads")(x)
    x = L.EinsumDense("abde,def->abf", (None, 4), name="merge")(x)
    return draw(keras.Model(given, L.Dense(2, name="last")(x)))


def plain() -> Any:
    layers = [keras.Input((6,)), L.Dense(5, activation="relu", name="one"), L.Dense(2, name="two")]
    return draw(keras.Sequential(layers))


MODELS: dict[str, tuple[Callable[[], Any], tuple[int, ...], dict[str, int]]] = {
    "nested": (nested, (2, 3, 6), {"shared": 6, "inner/down": 5, "heads": 6, "merge": 4, "last": 4}),
    "sequential": (plain, (2, 6), {"one": 6, "two": 5}),
}


def multiplied(name: str) -> tuple[Any, Any, Network, dict[str, Any]]:
    make, shape, sizes = MODELS[name]
    model, x = make(), noise(*shape, seed=9)
    numbers = {layer: noise(size, seed=size) + 2 for layer, size in sizes.items()}
    return model, x, read(model, x), numbers


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.parametrize("name", MODELS)
def test_inputs_are_multiplied_before_layers(name: str, suffix: str, tmp_path: Path) -> None:
    model, x, network, numbers = multiplied(name)
    own, before = run(model, [x]), frozen(model)
    new, notes = adapters.rewrite(model, network, Rewriting(multiplies=numbers))
    assert notes == ()
    assert frozen(model) == before
    # by what each layer multiplies, its weight can multiply too
    weights = {one.name: one.weight * numbers[one.name] for one in network.layers if one.name in numbers}
    runner = adapters.runner(model, network)
    runner.place(weights, {})
    (wanted,) = runner.run(Batch((x,), size=2))
    assert np.abs(wanted - own).max() > 0.1 * np.abs(wanted).max()
    scale = 1e-5 * np.abs(wanted).max()
    np.testing.assert_allclose(run(new, [x]), wanted, atol=scale)
    found = read(new, x)
    assert [(one.name, one.shape) for one in found.layers] == [(one.name, one.shape) for one in network.layers]
    np.testing.assert_allclose(adapters.runner(new, found).run(Batch((x,), size=2))[0], wanted, atol=scale)
    assert found.graph is not None
    for layer in numbers:
        for call in found.graph.calls[layer]:
            (source,) = (found.graph.by_name[one] for one in call.inputs)
            source = found.graph.by_name[source.inputs[0]] if source.op == "reshape" else source
            assert (source.op, source.attributes["constant"], source.layer) == ("mul", True, "")
    path = adapters.save(new, tmp_path / f"new{suffix}")
    loaded = keras.models.load_model(path, compile=False)
    np.testing.assert_array_equal(run(loaded, [x]), run(new, [x]))
    assert [one.name for one in graph_of(loaded, x).nodes] == [one.name for one in found.graph.nodes]
    keras_models.assert_same(new, loaded)


def test_numbers_survive_files_to_the_last_bit_and_weights_go_between_both_models(tmp_path: Path) -> None:
    model, x, network, _ = multiplied("sequential")
    exact = np.float32([1 / 3, 1e-30, 3e38, np.pi, 1.0000001, 7])
    new, _ = adapters.rewrite(model, network, Rewriting(multiplies={"one": exact}))
    assert [layer.name for layer in new.layers] == ["one_multiply", "one", "two"]
    for suffix in (".keras", ".h5"):
        loaded = keras.models.load_model(adapters.save(new, tmp_path / f"new{suffix}"), compile=False)
        np.testing.assert_array_equal(np.float32(loaded.layers[0].scale), exact)
    other = plain()
    for one in other.weights:
        one.assign(one * 2)
    other.save_weights(tmp_path / "other.weights.h5")
    new.load_weights(tmp_path / "other.weights.h5")
    keras_models.assert_same(other, new)
    again, _ = adapters.rewrite(new, read(new, x), Rewriting(multiplies={"one": exact}))
    assert [layer.name for layer in again.layers] == ["one_multiply", "one_multiply_2", "one", "two"]
    new.compile("sgd", "mse")
    new.fit(x, np.zeros((2, 2)), verbose=0)


class Head(keras.Model):  # type: ignore[misc]
    """A model with code of its own around one that is made of layers."""

    def __init__(self) -> None:
        super().__init__(name="head")
        self.inner = keras.Sequential([keras.Input((4,)), L.Dense(3, name="dense")], name="inner")

    def call(self, x: Any) -> Any:
        return self.inner(x)


class Fixed(keras.Model):  # type: ignore[misc]
    """A functional model that a file only tells the constructor of."""

    def __init__(self) -> None:
        given = keras.Input((4,))
        super().__init__(given, L.Dense(3, name="dense")(given), name="fixed")

    def get_config(self) -> dict[str, Any]:
        return {}


def attending() -> Any:
    given = keras.Input((3, 4))
    return keras.Model(given, L.MultiHeadAttention(2, 2, name="attention")(given, given))


def shared_kernel() -> Any:
    given, dense = keras.Input((4,)), L.Dense(4, use_bias=False, name="dense")
    return keras.Model(given, keras.ops.matmul(dense(given), dense.kernel))


def subclassed() -> Any:
    model = Head()
    model(noise(2, 4))
    return model


def test_operations_of_a_model_in_a_file_are_changed(tmp_path: Path) -> None:
    keras.utils.clear_session()
    given = keras.Input((6,))
    model = draw(keras.Model(given, L.Dense(2, name="last")(keras.ops.relu6(L.Dense(4, name="first")(given)))))
    x = noise(3, 6)
    network, path = read(model, x), adapters.save(model, tmp_path / "model.keras")
    rewriting = Rewriting(unclipped=["relu6"], multiplies={"last": noise(4)})
    wanted, content = adapters.rewrite(model, network, rewriting).model, path.read_bytes()
    new, notes = adapters.rewrite(path, network, rewriting)
    assert notes == ()
    np.testing.assert_array_equal(run(new, [x]), run(wanted, [x]))
    assert path.read_bytes() == content


def test_it_is_known_before_which_layers_a_multiplication_can_be_put(tmp_path: Path) -> None:
    model, _, network, _ = multiplied("nested")
    names = ["shared", "inner/up", "inner/down", "heads", "merge", "last"]
    assert adapters.multipliable(model, network) == names
    assert adapters.multipliable(adapters.save(model, tmp_path / "model.keras"), network) == names
    for make, shape in ((attending, (2, 3, 4)), (shared_kernel, (2, 4)), (subclassed, (2, 4))):
        other = make()
        assert adapters.multipliable(other, read(other, noise(*shape))) == []


def test_the_factors_of_normalizations_in_a_file_are_found(tmp_path: Path) -> None:
    model = draw(keras.Sequential([keras.Input((4,)), L.LayerNormalization(center=False, name="norm"), L.Dense(2)]))
    path = adapters.save(model, tmp_path / "model.keras")
    ((name, (factor, shift)),) = adapters.affines(path).items()
    assert (name, shift) == ("norm", None)
    np.testing.assert_array_equal(factor, model.layers[0].gamma.numpy())
    path = adapters.save(keras.Sequential([keras.Input((3,)), L.Lambda(lambda x: x)]), tmp_path / "code.keras")
    assert adapters.affines(path) == {}


@pytest.mark.parametrize(
    ("make", "shape", "layer", "count", "reason"),
    [
        (subclassed, (2, 4), "inner/dense", 4, r"called by the code of 'head' \(Head\).*leave the layer out, or build"),
        (Fixed, (2, 4), "dense", 4, r"called by the code of 'fixed' \(Fixed\)"),
        (attending, (2, 3, 4), "attention/value", 4, r"called by the code of 'attention' \(MultiHeadAttention\)"),
        (shared_kernel, (2, 4), "dense", 4, r"'matmul\w*' uses its weight as well"),
        (lambda: keras.Sequential([keras.Input((4, 2)), L.Conv1D(3, 1, name="a")]), (2, 4, 2), "a", 2, "is a Conv1D"),
        (plain, (2, 6), "three", 4, "no layer is called 'three'"),
        (plain, (2, 6), "one", 3, r"has the shape \(6,\), got \(3,\)"),
    ],
)  # fmt: skip
def test_what_cannot_be_multiplied_is_refused(
    make: Callable[[], Any], shape: tuple[int, ...], layer: str, count: int, reason: str
) -> None:
    model = make()
    network, before = read(model, noise(*shape)), frozen(model)
    with pytest.raises(BadArgumentError, match=f"multiplies: .*{reason}"):
        adapters.rewrite(model, network, Rewriting(multiplies={layer: np.ones(count)}))
    assert frozen(model) == before


def test_in_place_nothing_is_multiplied() -> None:
    model, _, network, numbers = multiplied("sequential")
    before = frozen(model)
    with pytest.raises(BadArgumentError, match=r"inplace: nothing can be put before one, two in the model itself"):
        adapters.rewrite(model, network, Rewriting(multiplies=numbers), inplace=True)
    with pytest.raises(BadArgumentError, match="multiplies: 'one' has numbers that are not finite"):
        adapters.rewrite(model, network, Rewriting(multiplies={"one": np.full(6, np.nan)}))
    assert frozen(model) == before
