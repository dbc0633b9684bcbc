"""New numbers in copies of Keras models: what comes out, what stays, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qvis import adapters
from qvis.errors import BadArgumentError, OutputError, UnsupportedModelError
from qvis.layers import Network, Norm
from qvis.rewriting import Rewriting
from qvis.running import Batch
from tests import keras_models

keras = keras_models.require()

L = keras.layers
pytestmark = keras_models.QUIET


def noise(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


class Residual(keras.Model):  # type: ignore[misc]
    """A model of a class of its own, with a layer that is used twice and what no configuration tells of."""

    def __init__(self, size: int) -> None:
        super().__init__(name="residual")
        self.first, self.twice = L.Dense(size, name="first"), L.Dense(size, name="twice")
        self.norm = L.BatchNormalization(name="norm")
        self.blocks = [L.Dense(size, name="inner"), {"last": L.Dense(2, name="last")}]
        self.extra = lambda x: x + 1

    def call(self, x: Any, training: bool = False) -> Any:
        x = self.norm(self.first(x), training=training)
        x = self.twice(self.twice(x)) + self.blocks[0](x)
        return self.extra(self.blocks[1]["last"](x))


def with_code() -> Any:
    """A model that a file only holds together with code."""
    return keras.Sequential([keras.Input((3,)), L.Dense(2, name="dense"), L.Lambda(lambda x: x + 1)])


def residual() -> tuple[Any, list[Any]]:
    model = Residual(4)
    x = noise(3, 5)
    model(x)
    return model, [x]


def convolutions() -> tuple[Any, list[Any]]:
    model = keras.Sequential(
        [
            keras.Input((6, 6, 4)),
            L.Conv2D(6, 3, groups=2, padding="same", name="grouped"),
            L.BatchNormalization(name="norm"),
            L.ReLU(),
            L.DepthwiseConv2D(3, depth_multiplier=2, name="depthwise"),
            L.Conv2DTranspose(4, 3, strides=2, name="up"),
            L.SeparableConv2D(5, 3, name="separable"),
            L.LayerNormalization(name="ln"),
            L.GlobalAveragePooling2D(),
            L.Dense(3, name="head"),
        ]
    )
    model.compile("adam", "mse")
    return model, [noise(2, 6, 6, 4)]


def tied() -> tuple[Any, list[Any]]:
    given = keras.Input((4,))
    dense = L.Dense(4, use_bias=False, name="dense")
    return keras.Model(given, keras.ops.matmul(dense(given), dense.kernel)), [noise(2, 4)]


def everything() -> tuple[Any, list[Any]]:
    return keras_models.everything(), [[noise(2, 8, 8, 3), np.arange(8).reshape(2, 4) % 7]]


MODELS: dict[str, Callable[[], tuple[Any, list[Any]]]] = {
    "residual": residual,
    "convolutions": convolutions,
    "tied": tied,
    "everything": everything,
}


def frozen(model: Any) -> list[Any]:
    """All of a model that could change."""
    state: list[Any] = [(id(one), one.name, one.trainable, one.numpy().tobytes()) for one in model.variables]
    return [*state, id(getattr(model, "optimizer", None)), [id(one) for one in model._flatten_layers()]]


def run(model: Any, given: list[Any]) -> np.ndarray[Any, Any]:
    return np.asarray(keras.ops.convert_to_numpy(model(*given, training=False)))


def own(network: Network, model: Any, given: list[Any]) -> Rewriting:
    batch = Batch(tuple(given), size=2)
    return Rewriting(
        weights={layer.name: layer.weight.copy() for layer in network.layers},
        biases={layer.name: layer.bias().copy() for layer in network.layers if layer.bias is not None},
        norms=dict(adapters.graph(model, batch).norms),
    )


@pytest.mark.parametrize("name", MODELS)
def test_rewriting_with_the_models_own_numbers_changes_nothing(name: str) -> None:
    model, given = MODELS[name]()
    before, wanted = frozen(model), run(model, given)
    network = adapters.read(model)
    new, notes = adapters.rewrite(model, network, own(network, model, given))
    compiled = "the copy is not compiled; call compile before training or evaluating it"
    assert notes == ((compiled,) if name == "convolutions" else ())
    assert frozen(model) == before
    np.testing.assert_array_equal(run(new, given), wanted)
    assert type(new) is type(model)
    assert [(one.path, one.trainable) for one in new.variables[: len(model.weights)]]
    mine, others = {id(one) for one in model.variables}, {id(one) for one in new.variables}
    assert not mine & others
    for one in new.weights:
        one.assign(keras.ops.zeros_like(one))
    np.testing.assert_array_equal(run(model, given), wanted)
    keras_models.assert_same(model, adapters.rewrite(model, network, Rewriting()).model)


@pytest.mark.parametrize("name", ["residual", "convolutions", "everything"])
def test_a_rewritten_model_computes_what_the_runner_does(name: str) -> None:
    model, given = MODELS[name]()
    network = adapters.read(model)
    weights = {one.name: noise(*one.weight.shape, seed=i) * 0.3 for i, one in enumerate(network.layers)}
    graph = adapters.graph(model, Batch(tuple(given), size=len(given[0])))
    norms = {
        key: Norm(key, noise(len(one.mean)), noise(len(one.mean)) ** 2 + 0.1, one.scale * 2, one.shift + 1, 1e-3)
        for key, one in graph.norms.items()
    }
    new, _ = adapters.rewrite(model, network, Rewriting(weights=weights, norms=norms))
    runner = adapters.runner(model, network)
    runner.place(weights, norms)
    wanted = runner.run(Batch(tuple(given[0]) if name == "everything" else tuple(given), size=len(run(model, given))))
    np.testing.assert_allclose(run(new, given), wanted[0], rtol=1e-4, atol=1e-4)
    for layer in adapters.read(new).layers:
        held = weights[layer.name]
        np.testing.assert_allclose(layer.weight, held, rtol=1e-2 if layer.dtype == "bfloat16" else 0)


def test_biases_and_affine_numbers_are_written() -> None:
    model, given = convolutions()
    network = adapters.read(model)
    biases = {layer.name: noise(*layer.bias().shape, seed=i) for i, layer in enumerate(network.layers) if layer.bias}
    rewriting = Rewriting(biases=biases, affines={"ln": (noise(5), noise(5, seed=1))})
    new, _ = adapters.rewrite(model, network, rewriting)
    for layer in adapters.read(new).layers:
        if layer.bias is not None:
            np.testing.assert_array_equal(layer.bias(), biases[layer.name])
    ((name, (factor, shift)),) = adapters.affines(new).items()
    assert name == "ln"
    np.testing.assert_array_equal(factor, noise(5))
    np.testing.assert_array_equal(shift, noise(5, seed=1))
    np.testing.assert_array_equal(new.get_layer("ln").gamma.numpy(), noise(5))
    np.testing.assert_array_equal(new.get_layer("ln").beta.numpy(), noise(5, seed=1))
    run(new, given)
    with pytest.raises(BadArgumentError, match=r"biases: 'separable/depthwise_kernel' .* has no bias"):
        adapters.rewrite(model, network, Rewriting(biases={"separable/depthwise_kernel": noise(4)}))
    with pytest.raises(BadArgumentError, match="affines: no normalization with numbers of its own is called 'head'"):
        adapters.rewrite(model, network, Rewriting(affines={"head": (noise(3), None)}))


def test_a_normalization_without_scale_and_shift_gets_them_in_its_statistics() -> None:
    model = keras.Sequential([keras.Input((4,)), L.BatchNormalization(scale=False, center=False, name="norm")])
    model.build((None, 4))
    model.add(L.Dense(2, name="dense"))
    norm = Norm("norm", noise(4), noise(4) ** 2 + 0.1, noise(4, seed=1) ** 2 + 0.1, noise(4, seed=2), 1e-5)
    network = adapters.read(model)
    new, _ = adapters.rewrite(model, network, Rewriting(norms={"norm": norm}))
    x = noise(3, 4, seed=5)
    wanted = (x - norm.mean) / np.sqrt(norm.variance + norm.epsilon) * norm.scale + norm.shift
    np.testing.assert_allclose(run(new.layers[0], [x]), wanted, rtol=1e-4, atol=1e-4)
    bad = Norm("norm", norm.mean, norm.variance, -norm.scale, norm.shift, 1e-5)
    with pytest.raises(BadArgumentError, match="norms: 'norm' has no scale of its own"):
        adapters.rewrite(model, network, Rewriting(norms={"norm": bad}))


def test_inplace_writes_into_the_model_and_only_when_everything_is_right() -> None:
    model, _ = residual()
    network, before = adapters.read(model), frozen(model)
    bad = {"first": noise(4, 5), "twice": noise(3, 4)}
    with pytest.raises(BadArgumentError, match=r"weights: 'twice' has the shape \(4, 4\), got \(3, 4\)"):
        adapters.rewrite(model, network, Rewriting(weights=bad), inplace=True)
    with pytest.raises(BadArgumentError, match="weights: no layer is called 'frst'; did you mean 'first'"):
        adapters.rewrite(model, network, Rewriting(weights={"frst": noise(4, 5)}), inplace=True)
    assert frozen(model) == before
    new, notes = adapters.rewrite(model, network, Rewriting(weights={"first": noise(4, 5)}), inplace=True)
    assert new is model
    assert notes == ()
    np.testing.assert_array_equal(model.first.kernel.numpy(), noise(4, 5).T)


def test_numbers_that_a_narrow_type_cannot_hold_are_named() -> None:
    model = keras.Sequential([keras.Input((3,)), L.Dense(2, dtype="bfloat16", name="half")])
    network = adapters.read(model)
    _, notes = adapters.rewrite(model, network, Rewriting(weights={"half": network.layers[0].weight}))
    assert notes == ()
    _, notes = adapters.rewrite(model, network, Rewriting(weights={"half": noise(2, 3)}))
    assert len(notes) == 1
    assert "bfloat16" in notes[0]


def test_a_copy_can_be_trained_and_saved() -> None:
    model, given = convolutions()
    before = frozen(model)
    new, _ = adapters.rewrite(model, adapters.read(model), Rewriting())
    assert not new.compiled
    new.compile("sgd", "mse")
    new.fit(given[0], np.zeros((2, 3)), verbose=0)
    assert frozen(model) == before
    assert not np.array_equal(new.get_layer("head").bias.numpy(), model.get_layer("head").bias.numpy())


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_a_file_is_rewritten_and_saved_anew(suffix: str, tmp_path: Path) -> None:
    model, given = convolutions()
    path = adapters.save(model, tmp_path / f"model{suffix}")
    content = path.read_bytes()
    network = adapters.read(path)
    weights = {one.name: noise(*one.weight.shape, seed=i) for i, one in enumerate(network.layers)}
    new, _ = adapters.rewrite(path, network, Rewriting(weights=weights))
    expected, _ = adapters.rewrite(model, adapters.read(model), Rewriting(weights=weights))
    np.testing.assert_array_equal(run(new, given), run(expected, given))
    with pytest.raises(OutputError, match="is the file that the model came from"):
        adapters.save(new, path, source=path)
    saved = adapters.save(new, tmp_path / f"new{suffix}", source=path)
    assert sorted(one.name for one in tmp_path.iterdir()) == [f"model{suffix}", f"new{suffix}"]
    np.testing.assert_array_equal(run(keras.models.load_model(saved, compile=False), given), run(new, given))
    assert path.read_bytes() == content
    with pytest.raises(BadArgumentError, match="inplace: the file"):
        adapters.rewrite(path, network, Rewriting(weights=weights), inplace=True)


def test_wrong_suffixes_and_files_that_cannot_be_loaded_are_refused(tmp_path: Path) -> None:
    model, _ = residual()
    with pytest.raises(OutputError, match=r"cannot be saved to 'model.onnx'; name it .keras or .h5"):
        adapters.save(model, tmp_path / "model.onnx")
    with pytest.raises(OutputError, match="Keras cannot save 'residual' to 'model"):
        adapters.save(model, tmp_path / "model.keras")
    assert list(tmp_path.iterdir()) == []
    path = adapters.save(with_code(), tmp_path / "simple.keras")
    with pytest.raises(UnsupportedModelError, match="Keras cannot load"):
        adapters.rewrite(path, adapters.read(path), Rewriting())
