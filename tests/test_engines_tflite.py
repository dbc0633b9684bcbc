"""LiteRT and Keras run models as they are, let one look at layers, and tell what is in files."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qvis import adapters
from qvis.errors import BadArgumentError, NotRunnableError
from qvis.quantization.contents import Arithmetic
from qvis.quantization.engines import Looked, inspect, open_engine
from qvis.quantization.engines import tflite as litert
from qvis.running import Batch
from tests import keras_models

keras = keras_models.require()
pytest.importorskip("ai_edge_litert.interpreter")
L = keras.layers
pytestmark = keras_models.QUIET


@cache
def model() -> Any:
    """A small network with a normalization, a residual addition and a clipped activation."""
    keras.utils.set_random_seed(0)
    image = keras.Input((8, 8, 3), name="image")
    x = y = L.ReLU(6.0)(L.BatchNormalization()(L.Conv2D(8, 3, padding="same", name="stem")(image)))
    x = L.ReLU()(L.DepthwiseConv2D(3, padding="same", name="depthwise")(x))
    x = L.Add()([x, y])
    return keras.Model(image, L.Dense(5, name="head")(L.GlobalAveragePooling2D()(x)), name="small")


@cache
def pictures(size: int = 12) -> Any:
    return np.random.default_rng(0).normal(size=(size, 8, 8, 3)).astype("f4")


@cache
def convert(kind: str = "float", batch: int | None = None) -> bytes:
    """The model as TensorFlow's converter makes it; ``int8`` has integers as inputs and outputs too."""
    import tensorflow as tf

    from qvis.adapters.quiet import quietly

    own = model()
    spec = [tf.TensorSpec((batch, 8, 8, 3), tf.float32, name="image")]
    with quietly():
        traced = tf.function(lambda x: own(x, training=False), input_signature=spec, autograph=False)
        converter = tf.lite.TFLiteConverter.from_concrete_functions([traced.get_concrete_function()])
        if kind == "int8":
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
            converter.representative_dataset = lambda: ([one[None]] for one in pictures())
            converter.inference_input_type = converter.inference_output_type = tf.int8
        made: bytes = converter.convert()
    return made


def saved(folder: Path, kind: str = "float", batch: int | None = None) -> Path:
    path = folder / f"{kind}.tflite"
    path.write_bytes(convert(kind, batch))
    return path


def batch_of(size: int) -> Batch:
    return Batch((pictures()[:size],), size=size)


def expected(size: int = 12) -> Any:
    return np.asarray(model()(pictures()[:size]))


# ---------------------------------------------------------------------------------------------------------------------
# Running


def test_any_number_of_samples_is_run_at_once(tmp_path: Path) -> None:
    engine = open_engine(saved(tmp_path))
    assert engine.name.startswith("LiteRT ")
    assert (engine.simulated, engine.fixed_batch) == ("", None)
    for size in (12, 1, 5):
        (got,) = engine.run(batch_of(size))
        np.testing.assert_allclose(got, expected(size), rtol=0, atol=1e-4)
    named = Batch((), {"image": pictures()}, size=12)
    np.testing.assert_allclose(engine.run(named)[0], expected(), rtol=0, atol=1e-4)


def test_a_file_for_some_samples_at_once_is_run_in_parts(tmp_path: Path) -> None:
    engine = open_engine(saved(tmp_path, batch=5))
    assert engine.fixed_batch == 5
    (got,) = engine.run(batch_of(12))
    np.testing.assert_allclose(got, expected(), rtol=0, atol=1e-4)
    with pytest.raises(BadArgumentError, match="the model takes 5 at once, and no other number such as 12"):
        engine.prepare(batch_of(12))


def test_integers_that_go_in_and_come_out_are_made_real_numbers(tmp_path: Path) -> None:
    from ai_edge_litert.interpreter import Interpreter

    path = saved(tmp_path, "int8")
    (got,) = open_engine(path).run(batch_of(12))
    assert got.dtype == np.float32
    assert np.linalg.norm(got - expected()) < 0.05 * np.linalg.norm(expected())
    plain = Interpreter(str(path))
    plain.allocate_tensors()
    (given,), (made,) = plain.get_input_details(), plain.get_output_details()
    for sample, mine in zip(pictures(), got, strict=True):
        scale, zero = given["quantization"]
        codes = np.clip(np.round(sample[None] / scale) + zero, -128, 127).astype(np.int8)
        plain.set_tensor(given["index"], codes)
        plain.invoke()
        scale, zero = made["quantization"]
        theirs = (plain.get_tensor(made["index"])[0].astype(float) - zero) * scale
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=scale * 1.001)  # kernels may round a half otherwise


def test_what_is_prepared_runs_whatever_runs_in_between(tmp_path: Path) -> None:
    engine = open_engine(saved(tmp_path))
    ready = engine.prepare(batch_of(3))
    engine.run(batch_of(7))
    engine.prepare(batch_of(1))()
    for _ in range(3):
        ready()
    interpreter = ready.__self__  # type: ignore[attr-defined]
    got = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    np.testing.assert_allclose(got, expected(3), rtol=0, atol=1e-4)


def test_bytes_are_run_like_a_file() -> None:
    (got,) = litert.open_engine(convert(), 1).run(batch_of(2))
    np.testing.assert_allclose(got, expected(2), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (Batch((np.zeros((2, 8, 8, 4), "f4"),), size=2), r"takes -1×8×8×3, and was given 2×8×8×4"),
        (Batch((pictures(), pictures()), size=12), r"takes image, and was given 2 without a name"),
        (
            Batch((), {"picture": pictures(), "mask": pictures()}, size=12),
            r"takes image, and was given .*picture, mask",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_refused(batch: Batch, message: str, tmp_path: Path) -> None:
    with pytest.raises(BadArgumentError, match=message):
        open_engine(saved(tmp_path)).run(batch)


def test_without_litert_one_is_told_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
    with pytest.raises(NotRunnableError, match=r'pip install "qvis\[quantize\]"'):
        open_engine(saved(tmp_path))


def test_a_damaged_file_is_refused_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "cut.tflite"
    path.write_bytes(convert()[:200])
    with pytest.raises(NotRunnableError, match=r"LiteRT refuses .*cut\.tflite"):
        open_engine(path)
    with pytest.raises(BadArgumentError, match=r"cut\.tflite' is no TensorFlow Lite model, or was cut short"):
        inspect(path)


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    engine = litert.open_engine(saved(tmp_path, "int8"), 1)
    engine.run(batch_of(3))
    engine.look(batch_of(3))
    open_engine(model()).run(batch_of(3))
    assert capfd.readouterr() == ("", "")


# ---------------------------------------------------------------------------------------------------------------------
# Looking at layers


def look(path: Path, size: int = 12) -> dict[str, Looked]:
    return dict(litert.open_engine(path, 1).look(batch_of(size)))


@pytest.mark.parametrize("kind", ["float", "int8"])
def test_what_layers_put_out_is_what_keras_has_there(kind: str, tmp_path: Path) -> None:
    path = saved(tmp_path, kind)
    found = look(path)
    assert set(found) == {layer.name for layer in adapters.read(path).layers}
    of_kind = {name.rpartition("/")[2].removesuffix("_1"): one for name, one in found.items()}
    activations = {"stem": "relu6", "depthwise": "relu", "head": ""}
    assert {name: one.activation for name, one in of_kind.items()} == activations
    relus = [layer.name for layer in model().layers if isinstance(layer, L.ReLU)]
    after = {"stem": relus[0], "depthwise": relus[1], "head": "head"}
    for name, one in of_kind.items():
        wanted = np.asarray(keras.Model(model().input, model().get_layer(after[name]).output)(pictures()))
        assert one.values.shape == wanted.shape
        assert one.axis == wanted.ndim - 1
        error = np.linalg.norm(one.values - wanted) / np.linalg.norm(wanted)
        assert error < (1e-5 if kind == "float" else 0.05)


def test_one_can_look_at_a_file_for_some_samples_at_once(tmp_path: Path) -> None:
    fixed, free = (tmp_path / name for name in ("fixed", "free"))
    fixed.mkdir()
    free.mkdir()
    parts, whole = look(saved(fixed, batch=5)), look(saved(free))
    for name, one in whole.items():
        np.testing.assert_allclose(parts[name].values, one.values, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# What is in a file


def test_a_float_file_computes_with_floats(tmp_path: Path) -> None:
    path = saved(tmp_path)
    found = inspect(path)
    assert {one.arithmetic for one in found.computing} == {Arithmetic.FLOAT}
    assert {one.kind for one in found.computing} >= {"CONV_2D", "DEPTHWISE_CONV_2D", "ADD", "MEAN", "FULLY_CONNECTED"}
    # the normalization is folded; biases of zeros may be left out
    weights, biases = 3 * 3 * 3 * 8 + 3 * 3 * 8 + 8 * 5, 8 + 8 + 5
    assert 4 * weights <= found.bytes_by_type["float32"] <= 4 * (weights + biases)
    assert found.file_bytes == path.stat().st_size


def test_an_integer_file_computes_with_integers_and_its_constants_count_once(tmp_path: Path) -> None:
    from ai_edge_litert.interpreter import Interpreter

    path = saved(tmp_path, "int8")
    found = inspect(path)
    assert not found.leftovers
    assert found.bytes_by_type["int8"] == 3 * 3 * 3 * 8 + 3 * 3 * 8 + 8 * 5
    assert {one.layer for one in found.computing if one.layer} == {layer.name for layer in adapters.read(path).layers}
    interpreter = Interpreter(str(path), experimental_preserve_all_tensors=False)
    count = len([one for one in interpreter._get_ops_details() if one["op_name"] != "DELEGATE"])
    assert len(found.operations) == count


def test_bytes_of_a_file_of_keras_are_those_of_its_variables(tmp_path: Path) -> None:
    trained = keras_models.digits()
    sizes = sum(int(np.prod(one.shape)) for one in trained.variables) * 4
    for suffix in (".keras", ".h5"):
        path = tmp_path / f"digits{suffix}"
        trained.save(path)
        found = inspect(path)
        assert found.bytes_by_type == {"float32": sizes}  # and nothing of Adam
        assert found.file_bytes == path.stat().st_size
        assert not found.operations


# ---------------------------------------------------------------------------------------------------------------------
# Keras


def test_keras_runs_models_and_files_of_any_form(tmp_path: Path) -> None:
    model().save(tmp_path / "small.keras")
    for given in (model(), tmp_path / "small.keras"):
        engine = open_engine(given)
        assert engine.name.startswith("TensorFlow ")
        assert (engine.simulated, engine.fixed_batch) == ("", None)
        for batch in (batch_of(12), batch_of(3), Batch((), {"image": pictures()}, size=12)):
            (got,) = engine.run(batch)
            np.testing.assert_allclose(got, expected(batch.size), rtol=0, atol=1e-4)
        (tensor,) = engine.prepare(batch_of(4))()  # type: ignore[misc]
        np.testing.assert_allclose(tensor.numpy(), expected(4), rtol=0, atol=1e-4)


def test_keras_runs_a_model_for_some_samples_at_once_in_parts() -> None:
    image = keras.Input((8, 8, 3), batch_size=5)
    fixed = keras.Model(image, model()(image))
    engine = open_engine(fixed)
    assert engine.fixed_batch == 5
    np.testing.assert_allclose(engine.run(batch_of(12))[0], expected(), rtol=0, atol=1e-4)
    with pytest.raises(BadArgumentError, match="takes 5 at once"):
        engine.prepare(batch_of(12))


def test_keras_says_why_a_model_does_not_run() -> None:
    with pytest.raises(BadArgumentError, match="the model's input 'image' is any×8×8×3, and a batch has 2×8×8×1"):
        open_engine(model()).run(Batch((np.zeros((2, 8, 8, 1), "f4"),), size=2))
