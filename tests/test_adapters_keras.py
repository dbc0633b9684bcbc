"""What is read from Keras models in memory."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qvis import adapters
from qvis.adapters import keras as reader
from qvis.adapters.keras.parts import kernel_axes, weights
from qvis.errors import UnknownLayerError, UnsupportedModelError
from qvis.layers import Layer
from tests import keras_models

keras = keras_models.require()
L = keras.layers
pytestmark = keras_models.QUIET


def layers_of(model: Any) -> dict[str, Layer]:
    return {layer.name: layer for layer in adapters.read(model).layers}


def kinds(model: Any) -> dict[str, tuple[str, str]]:
    return {name: (layer.op, layer.channels) for name, layer in layers_of(model).items()}


# ---------------------------------------------------------------------------------------------------------------------
# Rows are output channels

PLAIN: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "Dense": (lambda: L.Dense(5), (1, 4)),
    "Dense of a sequence": (lambda: L.Dense(5), (1, 3, 4)),
    "EinsumDense": (lambda: L.EinsumDense("abc,cde->abde", (None, 2, 5)), (1, 3, 4)),
    "EinsumDense that mixes axes": (lambda: L.EinsumDense("abcd,dec->abe", (None, 5)), (1, 2, 3, 4)),
    "EinsumDense with groups": (lambda: L.EinsumDense("agi,gio->ago", (3, 5)), (1, 3, 4)),
    "EinsumDense with dots": (lambda: L.EinsumDense("...x,xy->...y", 5), (1, 3, 4)),
    "Conv1D": (lambda: L.Conv1D(5, 3), (1, 6, 2)),
    "Conv2D": (lambda: L.Conv2D(5, (3, 2)), (1, 6, 6, 2)),
    "Conv2D with groups": (lambda: L.Conv2D(6, 3, groups=2), (1, 6, 6, 4)),
    "Conv3D": (lambda: L.Conv3D(5, 2), (1, 4, 4, 4, 2)),
    "Conv1DTranspose": (lambda: L.Conv1DTranspose(5, 3), (1, 6, 2)),
    "Conv2DTranspose": (lambda: L.Conv2DTranspose(5, 3, strides=2), (1, 4, 4, 2)),
    "Conv3DTranspose": (lambda: L.Conv3DTranspose(5, 2), (1, 3, 3, 3, 2)),
    "DepthwiseConv1D": (lambda: L.DepthwiseConv1D(3, depth_multiplier=2), (1, 6, 3)),
    "DepthwiseConv2D": (lambda: L.DepthwiseConv2D(3, depth_multiplier=2), (1, 6, 6, 3)),
    "DepthwiseConv2D of one channel": (lambda: L.DepthwiseConv2D(3, depth_multiplier=4), (1, 6, 6, 1)),
}


@pytest.mark.parametrize("case", list(PLAIN))
def test_each_row_makes_one_output_channel_and_no_other(case: str) -> None:
    make, shape = PLAIN[case]
    layer = make()
    layer.build(shape)
    (found,) = adapters.read(layer).layers
    assert found.op == case.partition(" ")[0]
    kernel = np.random.default_rng(0).normal(size=found.shape).astype(np.float32)
    layer.kernel.assign(kernel)
    np.testing.assert_array_equal(np.sort(found.weight.reshape(-1)), np.sort(kernel.reshape(-1)))
    inputs = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    whole = channels_last(layer(inputs), len(found.weight))
    # Where in the kernel each row comes from: the same view of the places instead of the numbers.
    config = {"equation": getattr(layer, "equation", "")}
    (part,) = weights(found.op, config, "kernel", found.shape)
    places = part.view(np.arange(kernel.size).reshape(found.shape).astype(np.float64)).astype(int)
    for channel, row in enumerate(places):
        alone = np.zeros(kernel.size, np.float32)
        alone[row] = kernel.reshape(-1)[row]
        layer.kernel.assign(alone.reshape(kernel.shape))
        output = channels_last(layer(inputs), len(places))
        np.testing.assert_allclose(output[:, channel], whole[:, channel], rtol=1e-5, atol=1e-5)
        assert not np.delete(output, channel, axis=1).any()


def channels_last(output: Any, channels: int) -> Any:
    return keras.ops.convert_to_numpy(output).reshape(-1, channels)


@pytest.mark.parametrize(("make", "shape"), [(L.SeparableConv1D, (1, 6, 3)), (L.SeparableConv2D, (1, 6, 6, 3))])
def test_a_separable_convolution_is_a_depthwise_and_a_pointwise_one(make: Any, shape: tuple[int, ...]) -> None:
    axes = len(shape) - 2
    layer = make(5, 3, depth_multiplier=2, name="s")
    layer.build(shape)
    found = layers_of(keras.Sequential([keras.Input(shape[1:]), layer]))
    assert {name: (one.op, len(one.weight)) for name, one in found.items()} == {
        "s/depthwise_kernel": (f"SeparableConv{axes}D", 6),
        "s/pointwise_kernel": (f"SeparableConv{axes}D", 5),
    }
    depthwise, pointwise = (getattr(L, f"{kind}Conv{axes}D") for kind in ("Depthwise", ""))
    first, second = depthwise(3, depth_multiplier=2), pointwise(5, 1)
    first.build(shape)
    inputs = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    second.build((None,) * (axes + 1) + (6,))
    first.kernel.assign(found["s/depthwise_kernel"].weight.T.reshape(first.kernel.shape))
    second.kernel.assign(found["s/pointwise_kernel"].weight.T.reshape(second.kernel.shape))
    np.testing.assert_allclose(second(first(inputs)), layer(inputs), rtol=1e-4, atol=1e-5)


def test_a_row_of_an_embedding_is_the_vector_of_a_token() -> None:
    layer = L.Embedding(7, 3)
    layer.build()
    (found,) = adapters.read(layer).layers
    np.testing.assert_array_equal(found.weight, keras.ops.convert_to_numpy(layer(np.arange(7))))


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def lstm(found: dict[str, Any], steps: Any, size: int) -> Any:
    h, c = np.zeros(size), np.zeros(size)
    for x in steps:
        i, f, g, o = (found[f"kernel/{k}"] @ x + found[f"recurrent_kernel/{k}"] @ h for k in "ifco")
        c = sigmoid(f + 1) * c + sigmoid(i) * np.tanh(g)  # the forget gate's bias is 1
        h = sigmoid(o) * np.tanh(c)
    return h


def gru(found: dict[str, Any], steps: Any, size: int) -> Any:
    h = np.zeros(size)
    for x in steps:
        (xz, hz), (xr, hr), (xh, hh) = ((found[f"kernel/{k}"] @ x, found[f"recurrent_kernel/{k}"] @ h) for k in "zrh")
        z = sigmoid(xz + hz)
        h = z * h + (1 - z) * np.tanh(xh + sigmoid(xr + hr) * hh)
    return h


def simple(found: dict[str, Any], steps: Any, size: int) -> Any:
    h = np.zeros(size)
    for x in steps:
        h = np.tanh(found["kernel"] @ x + found["recurrent_kernel"] @ h)
    return h


@pytest.mark.parametrize(
    ("make", "naive"),
    [
        (lambda: L.LSTM(3), lstm),
        (lambda: L.RNN(L.LSTMCell(3)), lstm),
        (lambda: L.GRU(3), gru),
        (lambda: L.SimpleRNN(3), simple),
    ],
)
def test_the_gates_are_those_that_a_naive_loop_needs(make: Any, naive: Any) -> None:
    layer = make()
    inputs = np.random.default_rng(0).normal(size=(1, 4, 2)).astype(np.float32)
    expected = keras.ops.convert_to_numpy(layer(inputs))[0]
    found = {one.name: one.weight for one in adapters.read(layer).layers}
    np.testing.assert_allclose(naive(found, inputs[0], 3), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_a_recurrent_convolution_of_one_point_is_an_lstm(axes: int) -> None:
    layer = getattr(L, f"ConvLSTM{axes}D")(3, 1)
    inputs = np.random.default_rng(0).normal(size=(1, 4, *(1,) * axes, 2)).astype(np.float32)
    expected = keras.ops.convert_to_numpy(layer(inputs)).reshape(-1)
    found = {one.name: one.weight for one in adapters.read(layer).layers}
    np.testing.assert_allclose(lstm(found, inputs.reshape(4, 2), 3), expected, rtol=1e-5, atol=1e-5)


def test_the_axes_of_an_einsum_come_from_its_equation() -> None:
    assert kernel_axes({"equation": "ab, bc -> ac"}, 2) == [1]
    assert kernel_axes({"equation": "...x,xyz->...zy"}, 3) == [1, 2]
    assert kernel_axes({"equation": "ab,bc->ac"}, 3) is None
    assert kernel_axes({}, 2) is None


# ---------------------------------------------------------------------------------------------------------------------
# Which layers there are


def test_every_matrix_of_a_model_is_found_under_its_path() -> None:
    found = kinds(keras_models.everything())
    expected = {
        "conv": ("Conv2D", "axis 3"),
        "separable/depthwise_kernel": ("SeparableConv2D", "axes 2 x 3"),
        "separable/pointwise_kernel": ("SeparableConv2D", "axis 3"),
        "depthwise": ("DepthwiseConv2D", "axes 2 x 3"),
        "inner/dense": ("Dense", "axis 1"),
        **{
            f"{name}/{kind}": ("EinsumDense", "axes 1 x 2")
            for name in ("attention", "grouped")
            for kind in ("query", "key", "value")
        },
        "attention/attention_output": ("EinsumDense", "axis 2"),
        "grouped/attention_output": ("EinsumDense", "axis 2"),
        "einsum": ("EinsumDense", "axes 1 x 2"),
        "steps/each": ("Dense", "axis 1"),
        "conv1": ("Conv1D", "axis 2"),
        "back1": ("Conv1DTranspose", "axis 1"),
        "simple/kernel": ("SimpleRNN", "axis 1"),
        "simple/recurrent_kernel": ("SimpleRNN", "axis 1"),
        "half": ("Dense", "axis 1"),
        "embedding": ("Embedding", "axis 0"),
    }
    gates = {
        f"{name}/{kernel}/{letter}": (op, f"axis 1, part {index} of {len(letters)}")
        for name, op, letters in (
            ("two_ways/forward_lstm", "LSTM", "ifco"),
            ("two_ways/backward_lstm", "LSTM", "ifco"),
            ("rnn/one", "GRUCell", "zrh"),
            ("rnn/two", "LSTMCell", "ifco"),
            ("gru", "GRU", "zrh"),
        )
        for kernel in ("kernel", "recurrent_kernel")
        for index, letter in enumerate(letters, 1)
    }
    assert found == {**expected, **gates}


def test_parameters_are_those_that_can_be_trained() -> None:
    model = keras_models.everything()
    trainable = sum(int(np.prod(one.shape)) for one in model.trainable_variables)
    assert adapters.read(model).parameters == trainable
    model.trainable = False
    try:
        assert adapters.read(model).parameters == trainable
    finally:
        model.trainable = True


class Subclassed(keras.Model):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__(name="net")
        self.first = L.Dense(3, name="same")
        self.blocks = [L.Dense(3, name="same"), L.Dense(3, name="last")]
        self.again = self.first
        self.table = self.add_weight(shape=(4, 3), name="table")
        self.never = L.Dense(2, name="never")

    def call(self, x: Any) -> Any:
        x = self.again(self.first(x))
        for block in self.blocks:
            x = block(x)
        return x + keras.ops.sum(self.table)


def test_a_subclassed_model_has_layers_in_lists_and_weights_of_its_own() -> None:
    model = Subclassed()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras sees that one layer is never called
        model(np.zeros((1, 3)))
    assert kinds(model) == {
        "table": ("other", "axis 1"),
        "same": ("Dense", "axis 1"),
        "same#2": ("Dense", "axis 1"),
        "last": ("Dense", "axis 1"),
    }
    (skipped,) = adapters.read(model).skipped
    assert skipped.name == "never"
    assert "was never called" in skipped.reason


def test_a_layer_shared_by_two_models_has_both_names() -> None:
    shared = L.Dense(3, name="shared")
    one, two = (keras.Sequential([keras.Input((3,)), shared], name=name) for name in ("one", "two"))
    inputs = keras.Input((3,))
    model = keras.Model(inputs, two(one(inputs)))
    (layer,) = adapters.read(model).layers
    assert (layer.name, layer.aliases) == ("one/shared", ("two/shared",))


def test_layers_of_ones_own_follow_the_rule_of_their_base() -> None:
    class Mine(L.Dense):  # type: ignore[misc]
        pass

    class Scale(L.Layer):  # type: ignore[misc]
        def build(self, shape: Any) -> None:
            self.scale = self.add_weight(shape=(2, shape[-1]), name="scale")

        def call(self, x: Any) -> Any:
            return x * self.scale[0]

    model = keras.Sequential([keras.Input((3,)), Mine(4, name="mine"), Scale(name="scale"), L.PReLU(name="slope")])
    assert kinds(model) == {"mine": ("Dense", "axis 1"), "scale/scale": ("other", "axis 1")}


def test_mixed_precision_keeps_float32_and_says_so() -> None:
    layer = L.Dense(3, dtype="mixed_float16")
    layer.build((1, 2))
    assert adapters.read(layer).layers[0].dtype == "float32"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_all_types_of_numbers_are_read(dtype: str) -> None:
    layer = L.Dense(3, dtype=dtype)
    layer.build((1, 2))
    (found,) = adapters.read(layer).layers
    assert found.dtype == dtype
    assert found.weight.dtype == (np.float64 if dtype == "float64" else np.float32)
    np.testing.assert_array_equal(found.weight.T, np.asarray(layer.kernel).astype(found.weight.dtype))


def test_names_paths_and_patterns_select_layers() -> None:
    inner = keras.Sequential([keras.Input((3,)), L.Dense(3, name="a"), L.Dense(3, name="b")], name="inner")
    model = keras.Sequential([keras.Input((3,)), inner, L.Dense(2, name="c"), L.LSTM(2, name="d")][:3], name="outer")
    for wanted, expected in {
        "inner": ["inner/a", "inner/b"],
        "inner/a": ["inner/a"],
        "a": ["inner/a"],
        "outer/inner/b": ["inner/b"],
        inner.layers[0].path: ["inner/a"],
        "c": ["c"],
        "*/b": ["inner/b"],
    }.items():
        assert [layer.name for layer in adapters.read(model, [wanted]).layers] == expected
    with pytest.raises(UnknownLayerError, match="did you mean 'inner/a'"):
        adapters.read(model, "inner/aa")


# ---------------------------------------------------------------------------------------------------------------------
# Quantized and adapted layers


def test_int8_layers_are_dequantized_and_say_so() -> None:
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((4,), dtype="int32"),
            L.Embedding(9, 6, name="embedding"),
            L.EinsumDense("abc,cde->abed", (4, 3, 2), name="einsum"),
            L.Reshape((4, 6)),
            L.Dense(5, name="dense"),
        ]
    )
    before = {layer.name: layer.weight.copy() for layer in adapters.read(model).layers}
    model.quantize("int8")
    after = adapters.read(model)
    assert [(one.name, one.dtype, one.notes) for one in after.layers] == [
        (name, "int8", ("dequantized from int8",)) for name in before
    ]
    for layer in after.layers:
        original = before[layer.name]
        step = np.abs(original).max(axis=1, keepdims=True) / 127
        assert layer.weight.shape == original.shape
        assert (np.abs(layer.weight - original) <= step * 0.51).all()


def test_int4_layers_are_named_with_the_reason() -> None:
    model = keras.Sequential([keras.Input((4,)), L.Dense(4, name="packed"), L.Conv1D(1, 1, name="c")][:2])
    model.quantize("int4")
    with pytest.raises(UnsupportedModelError, match="'packed' is packed by Keras's quantization 'int4'"):
        adapters.read(model)


def test_a_low_rank_update_is_part_of_the_weight() -> None:
    layer = L.Dense(5, name="dense")
    layer.build((1, 4))
    before = adapters.read(layer).layers[0].weight.copy()
    layer.enable_lora(2)
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(4, 2)).astype(np.float32), rng.normal(size=(2, 5)).astype(np.float32)
    layer.lora_kernel_a.assign(a)
    layer.lora_kernel_b.assign(b)
    (found,) = adapters.read(layer).layers
    assert found.notes == ("computed with its LoRA update",)
    np.testing.assert_allclose(found.weight, before + (a @ b).T, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# What reading must not do


def test_a_model_that_was_never_built_is_answered_with_the_way_out() -> None:
    for model in (keras.Sequential([L.Dense(3)], name="m"), Subclassed(), L.Dense(3)):
        with pytest.raises(UnsupportedModelError, match=r"is not built yet.*call it once on an example input"):
            adapters.read(model)


def test_a_model_without_weights_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="holds no weights"):
        adapters.read(keras.Sequential([keras.Input((3,)), L.ReLU()]))


def test_reading_changes_nothing() -> None:
    import tensorflow as tf

    model = keras_models.digits()
    model.get_layer("head").trainable = False
    before = [one.numpy().copy() for one in [*model.variables, *model.optimizer.variables]]
    flags = [one.trainable for one in model.variables]
    seed = tf.random.get_global_generator().state.numpy()
    numpy_state = np.random.get_state()[1].tolist()  # type: ignore[index,union-attr]
    for layer in adapters.read(model).layers:
        assert not layer.weight.flags.writeable
    after = [one.numpy().copy() for one in [*model.variables, *model.optimizer.variables]]
    assert all(np.array_equal(one, other) for one, other in zip(before, after, strict=True))
    assert flags == [one.trainable for one in model.variables]
    assert not model.get_layer("head").trainable
    np.testing.assert_array_equal(seed, tf.random.get_global_generator().state.numpy())
    assert numpy_state == np.random.get_state()[1].tolist()  # type: ignore[index,union-attr]
    model.get_layer("head").trainable = True


def test_asking_does_not_import_keras() -> None:
    code = (
        "import sys; from qvis.adapters import keras; from qvis.adapters.keras import files; from pathlib import Path; "
        "assert not keras.handles(object()) and not files.handles(Path('setup.cfg')); "
        "assert not {'keras', 'tensorflow', 'h5py', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


BACKEND = """
import os, sys
os.environ["KERAS_BACKEND"] = "torch"
import keras, numpy as np
from qvis import adapters
assert keras.backend.backend() == "torch"
model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="d"), keras.layers.BatchNormalization()])
network = adapters.read(model)
assert network.framework == f"Keras {keras.__version__}", network.framework
assert [(one.name, one.op, one.channels) for one in network.layers] == [("d", "Dense", "axis 1")]
assert np.array_equal(network.layers[0].weight.T, model.layers[0].kernel.detach().numpy() if False else
                      keras.ops.convert_to_numpy(model.layers[0].kernel))
assert "tensorflow" not in sys.modules
"""


def test_models_on_the_torch_backend_are_read_as_keras_models() -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", BACKEND], check=True)


def test_the_reader_is_asked_before_that_of_torch() -> None:
    assert adapters.BUILT_IN.index("keras") < adapters.BUILT_IN.index("torch")
    assert reader.handles(keras_models.digits())
