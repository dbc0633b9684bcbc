"""The graphs of Keras models, and normalizations folded by them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qvis import adapters
from qvis.errors import NoGraphError, NotRunnableError
from qvis.folding import fold_network, verify
from qvis.layers import Graph, Network, Node
from qvis.running import Batch
from tests import keras_models
from tests.test_runner_keras import MODELS, draw, runner_of, unchanged

keras = keras_models.require()
L = keras.layers
pytestmark = keras_models.QUIET


def graph_of(model: Any, example: Batch | None = None) -> Graph:
    adapter: Any = adapters.find(model)
    found: Graph = adapter.graph(model, example)
    known: set[str] = set()
    for node in found.nodes:
        assert set(node.inputs) <= known, "a node follows those it takes from"
        assert node.name not in known
        known.add(node.name)
    return found


def flow(graph: Graph) -> list[tuple[str, str, tuple[str, ...]]]:
    return [(node.name, node.op, node.inputs) for node in graph.nodes]


def one(layer: Any, *shape: int) -> Node:
    """The only node of a model of one layer."""
    given = keras.Input(shape)
    graph = graph_of(keras.Model(given, layer(given)))
    _, node, _ = graph.nodes
    return node


# ---------------------------------------------------------------------------------------------------------------------
# Which nodes there are


def test_a_sequential_model_is_a_chain_with_activations_of_their_own() -> None:
    model = keras.Sequential(
        [
            keras.Input((6, 6, 2), name="image"),
            L.Conv2D(4, 3, activation="relu", name="conv"),
            L.BatchNormalization(name="norm"),
            L.SeparableConv2D(3, 3, padding="same", activation="relu6", name="separable"),
            L.GlobalAveragePooling2D(name="pool"),
            L.Dense(2, activation="softmax", name="dense"),
        ]
    )
    graph = graph_of(model, Batch((draw(3, 6, 6, 2),), size=3))
    assert flow(graph) == [
        ("image", "input", ()),
        ("conv", "conv", ("image",)),
        ("conv/relu", "relu", ("conv",)),
        ("norm", "batch_norm", ("conv/relu",)),
        ("separable/depthwise_kernel", "conv", ("norm",)),
        ("separable/pointwise_kernel", "conv", ("separable/depthwise_kernel",)),
        ("separable/relu6", "clip", ("separable/pointwise_kernel",)),
        ("pool", "avg_pool", ("separable/relu6",)),
        ("dense", "linear", ("pool",)),
        ("dense/softmax", "softmax", ("dense",)),
        ("output", "output", ("dense/softmax",)),
    ]
    assert graph.by_name["conv"].shape == (3, 4, 4, 4)
    assert graph.by_name["separable/depthwise_kernel"].attributes["groups"] == 4
    assert graph.by_name["separable/relu6"].attributes == {"low": 0, "high": 6}
    assert list(graph.calls) == [layer.name for layer in adapters.read(model).layers]
    norm = graph.norms["norm"]
    assert (norm.epsilon, norm.scale.shape) == (1e-3, (4,))


def test_layers_used_twice_have_two_nodes_and_models_inside_are_unfolded() -> None:
    inner = keras.Sequential([keras.Input((4,)), L.Dense(4, name="dense", activation="tanh"), L.ReLU()], name="inner")
    given = keras.Input((4,), name="given")
    model = keras.Model(given, keras.ops.relu(inner(inner(given)) + given))
    keras.Model(given, inner(given * 2))  # another model's call of the same layers
    graph = graph_of(model)
    assert [(node.name, node.layer) for node in graph.nodes if node.layer] == [
        ("inner/dense", "inner/dense"),
        ("inner/dense@2", "inner/dense"),
    ]
    (add,) = (node for node in graph.nodes if node.op == "add")
    assert add.inputs == ("inner/re_lu@2", "given") or add.inputs[1] == "given"
    assert add.attributes["constant"] is False
    assert len(graph.calls["inner/dense"]) == 2
    assert len(graph.nodes) == 10


def test_an_attention_layer_is_unfolded_into_its_projections() -> None:
    given = keras.Input((3, 4), name="given")
    graph = graph_of(keras.Model(given, L.MultiHeadAttention(2, 3, name="attention")(given, given)))
    ops = {node.name: node.op for node in graph.nodes}
    for name in ("query", "key", "value"):
        assert graph.by_name[f"attention/{name}"].inputs == ("given",)
        assert ops[f"attention/{name}/outputs"] == "reshape"
    assert list(graph.calls) == [f"attention/{name}" for name in ("query", "key", "value", "attention_output")]
    (attention,) = (node for node in graph.nodes if node.op == "attention")
    assert attention.inputs == tuple(f"attention/{name}/outputs" for name in ("query", "key", "value"))


def test_a_layer_that_cannot_be_unfolded_names_the_weights_it_applies() -> None:
    given = keras.Input((3, 4))
    x = L.TimeDistributed(L.Dense(4, name="each"), name="steps")(given)
    graph = graph_of(keras.Model(given, L.LSTM(2, name="lstm")(x)))
    assert graph.by_name["steps"].op == "keras.TimeDistributed"
    assert graph.by_name["steps"].attributes["layers"] == ("steps/each",)
    assert graph.by_name["lstm"].op == "keras.LSTM"
    assert len(graph.by_name["lstm"].attributes["layers"]) == 8


NODES: dict[str, tuple[Callable[[], Any], tuple[int, ...], str, dict[str, Any]]] = {
    "padding": (lambda: L.Conv2D(4, 3, padding="same"), (5, 5, 2), "conv", {"padding": True, "channel_axis": -1}),
    "no padding": (lambda: L.Conv2D(4, 1, padding="same"), (5, 5, 2), "conv", {"padding": False}),
    "causal": (lambda: L.Conv1D(4, 2, padding="causal"), (5, 2), "conv", {"padding": True}),
    "groups": (lambda: L.Conv2D(4, 3, groups=2), (5, 5, 2), "conv", {"groups": 2, "bias": True}),
    "depthwise": (lambda: L.DepthwiseConv2D(3, use_bias=False), (5, 5, 2), "conv", {"groups": 2, "bias": False}),
    "channels first": (
        lambda: L.Conv2DTranspose(4, 3, data_format="channels_first"),
        (2, 5, 5),
        "conv_transpose",
        {"channel_axis": 1},
    ),
    "relu": (lambda: L.ReLU(), (3,), "relu", {}),
    "relu6": (lambda: L.ReLU(max_value=6), (3,), "clip", {"low": 0.0, "high": 6.0}),
    "slope": (lambda: L.ReLU(negative_slope=0.5), (3,), "leaky_relu", {"slope": 0.5}),
    "threshold": (lambda: L.ReLU(threshold=0.5), (3,), "keras.ReLU", {}),
    "leaky": (lambda: L.LeakyReLU(negative_slope=0.25), (3,), "leaky_relu", {"slope": 0.25}),
    "swish": (lambda: L.Activation("swish"), (3,), "silu", {}),
    "softplus": (lambda: L.Activation("softplus"), (3,), "activation.softplus", {}),
    "one's own": (lambda: L.Activation(lambda x: x * 2), (3,), "activation.<lambda>", {}),
    "linear": (lambda: L.Activation("linear"), (3,), "identity", {}),
    "layer norm": (
        lambda: L.LayerNormalization(scale=False),
        (3, 4),
        "layer_norm",
        {"axes": (-1,), "scale": False, "shift": True},
    ),
    "rms norm": (lambda: L.RMSNormalization(), (3, 4), "rms_norm", {"scale": True, "shift": False}),
    "batch norm": (lambda: L.BatchNormalization(center=False), (3, 4), "batch_norm", {"shift": False}),
    "pad": (
        lambda: L.ZeroPadding2D(((1, 2), (0, 1))),
        (5, 5, 2),
        "pad",
        {"value": 0.0, "widths": ((0, 0), (1, 2), (0, 1), (0, 0))},
    ),
    "global pool": (
        lambda: L.GlobalMaxPooling2D(data_format="channels_first"),
        (2, 5, 5),
        "max_pool",
        {"axes": (2, 3)},
    ),
    "crop": (lambda: L.Cropping2D(((0, 0), (2, 1))), (5, 5, 2), "split", {"axis": 2, "start": 2}),
    "crop of nothing": (lambda: L.Cropping1D(0), (5, 2), "identity", {}),
    "rescaling": (lambda: L.Rescaling(0.5), (5, 2), "mul", {"constant": True}),
    "permute": (lambda: L.Permute((2, 1)), (5, 2), "transpose", {"axes": (0, 2, 1)}),
    "dropout": (lambda: L.Dropout(0.5), (5, 2), "dropout", {}),
    "up": (lambda: L.UpSampling2D(), (5, 5, 2), "resize", {}),
    "flatten": (lambda: L.Flatten(), (5, 2), "flatten", {"start": 1}),
    "max": (lambda: L.MaxPooling2D(), (5, 5, 2), "max_pool", {}),
    "einsum": (lambda: L.EinsumDense("abc,cd->abd", (None, 5)), (3, 4), "linear", {"channel_axis": -1}),
    "turned": (lambda: L.EinsumDense("abcd,de->acbe", (4, 3, 5)), (3, 4, 2), "keras.EinsumDense", {}),
    "group norm": (
        lambda: L.GroupNormalization(2, center=False),
        (3, 4),
        "group_norm",
        {"channel_axis": -1, "scale": True, "shift": False},
    ),
    "grouped": (lambda: L.EinsumDense("agi,gio->ago", (3, 5)), (3, 4), "keras.EinsumDense", {}),
}


@pytest.mark.parametrize("case", list(NODES))
def test_a_layer_is_called_by_the_shared_word_for_it(case: str) -> None:
    make, shape, op, attributes = NODES[case]
    node = one(make(), *shape)
    assert node.op == op
    assert {key: node.attributes[key] for key in attributes} == attributes


OPERATIONS: dict[str, tuple[Callable[[Any], Any], str, dict[str, Any]]] = {
    "relu": (keras.ops.relu, "relu", {}),
    "relu6": (keras.ops.relu6, "clip", {"low": 0.0, "high": 6.0}),
    "clip": (lambda x: keras.ops.clip(x, -1, 1), "clip", {"low": -1.0, "high": 1.0}),
    "leaky": (lambda x: keras.ops.leaky_relu(x, 0.3), "leaky_relu", {"slope": 0.3}),
    "add a number": (lambda x: x + 1.5, "add", {"constant": True}),
    "add itself": (lambda x: x + x, "add", {"constant": False}),
    "divide": (lambda x: x / 2, "div", {"constant": True, "divisor": True}),
    "divide a number": (lambda x: 2 / x, "div", {"constant": True, "divisor": False}),
    "divide by a result": (lambda x: x / x, "div", {"constant": False}),
    "larger": (lambda x: keras.ops.maximum(x, keras.ops.abs(x)), "maximum", {"constant": False}),
    "larger than 0": (lambda x: keras.ops.maximum(0.0, x), "relu", {}),
    "larger than 1": (lambda x: keras.ops.maximum(x, 1), "keras.Maximum", {}),
    "pad with ones": (lambda x: keras.ops.pad(x, 1, constant_values=1), "pad", {"value": 1.0, "widths": ((1, 1),) * 4}),
    "pad by reflection": (lambda x: keras.ops.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), "reflect"), "keras.Pad", {}),
    "largest from 0": (lambda x: keras.ops.max(x, 1, initial=0.0), "keras.Max", {}),
    "roll": (lambda x: keras.ops.roll(x, 1, 1), "roll", {"axes": (1,)}),
    "glu": (lambda x: keras.ops.glu(x, -1), "glu", {"axis": -1}),
    "sum": (lambda x: keras.ops.sum(x, 1), "sum", {"axes": (1,)}),
    "largest": (lambda x: keras.ops.max(x, (1, 2)), "max_pool", {"axes": (1, 2)}),
    "slice": (lambda x: x[:, :2], "split", {"axis": 1, "start": 0, "step": 1}),
    "slice at the end": (lambda x: x[..., -1:], "split", {"axis": 3, "start": -1}),
    "slice of every other": (lambda x: x[:, :, 1::2], "split", {"axis": 2, "start": 1, "step": 2}),
    "one of many": (lambda x: x[:, 2], "split", {"axis": 1, "start": 2}),
    "slice of two axes": (lambda x: x[:, 1:, 1:], "split", {"axis": None}),
    "new axis": (lambda x: x[:, None], "split", {"axis": None}),
    "mean": (lambda x: keras.ops.mean(x, (1, 2)), "avg_pool", {"axes": (1, 2)}),
    "mean of channels": (lambda x: keras.ops.mean(x, -1), "keras.Mean", {}),
    "transpose": (lambda x: keras.ops.transpose(x, (0, 3, 1, 2)), "transpose", {"axes": (0, 3, 1, 2)}),
    "concat": (lambda x: keras.ops.concatenate([x, x], 2), "concat", {"axis": 2}),
    "pad": (
        lambda x: keras.ops.pad(x, ((0, 0), (1, 2), (0, 1), (0, 0))),
        "pad",
        {"value": 0.0, "widths": ((0, 0), (1, 2), (0, 1), (0, 0))},
    ),
    "reshape": (lambda x: keras.ops.reshape(x, (-1, 8)), "reshape", {}),
    "swap": (lambda x: keras.ops.swapaxes(x, -1, 1), "transpose", {"axes": (0, 3, 2, 1)}),
    "move": (lambda x: keras.ops.moveaxis(x, (1, 2), (-1, 1)), "transpose", {"axes": (0, 2, 3, 1)}),
    "repeat": (lambda x: keras.ops.repeat(x, 2, 1), "resize", {}),
    "stack": (lambda x: keras.ops.stack([x, x], 1), "concat", {"axis": 1}),
    "einsum": (lambda x: keras.ops.einsum("abcd,abed->abce", x, x), "matmul", {"equation": "abcd,abed->abce"}),
    "einsum with dots": (
        lambda x: keras.ops.einsum("...ij,...kj", x, x),
        "matmul",
        {"equation": "abij,abkj->abik"},
    ),
    "einsum of a diagonal": (lambda x: keras.ops.einsum("abbd,abbd->abd", x, x), "keras.Einsum", {}),
    "dot": (lambda x: keras.ops.dot(x, keras.ops.swapaxes(x, 2, 3)), "matmul", {"equation": "abcd,efdg->abcefg"}),
    "dot layer": (lambda x: L.Dot((2, 2))([x[:, 0], x[:, 1]]), "matmul", {"equation": "abc,adc->abd"}),
    "cosine": (lambda x: L.Dot((2, 2), normalize=True)([x[:, 0], x[:, 1]]), "keras.Dot", {}),
    "cast": (lambda x: keras.ops.cast(x, "float16"), "identity", {}),
    "cast to whole numbers": (lambda x: keras.ops.cast(x, "int32"), "keras.Cast", {}),
    "sine": (keras.ops.sin, "keras.Sin", {}),
}


@pytest.mark.parametrize("case", list(OPERATIONS))
def test_an_operation_is_called_by_the_shared_word_for_it(case: str) -> None:
    apply, op, attributes = OPERATIONS[case]
    given = keras.Input((4, 4, 2))
    node = graph_of(keras.Model(given, apply(given))).nodes[-2]
    assert node.op == op
    assert {key: node.attributes[key] for key in attributes} == attributes


@pytest.mark.parametrize("form", ["one by one", "a list", "by name", "a mapping", "of another rank", "none"])
def test_open_sizes_come_from_an_example_in_any_form(form: str) -> None:
    one, two = keras.Input((None, 3), name="one"), keras.Input((None, 3), name="two")
    table = L.MultiHeadAttention(2, 4, name="mha")(one, two)
    model = keras.Model([one, two], [keras.ops.transpose(table, (1, 0, 2)), two])
    before = [(len(node._inbound_nodes), len(node._outbound_nodes)) for node in model.operations]
    x, y = draw(2, 5, 3), draw(2, 7, 3)
    batch = {
        "one by one": Batch((x, y), size=2),
        "a list": Batch(([x, y],), size=2),
        "by name": Batch((), {"two": y, "one": x}, size=2),
        "a mapping": Batch(({"two": y, "one": x},), size=2),
        "of another rank": Batch((x[0], y[0]), size=2),
        "none": None,
    }[form]
    with unchanged(model):
        graph = graph_of(model, batch)
    assert [node.name for node in graph.nodes if node.op == "input"] == ["one", "two"]
    assert len([node for node in graph.nodes if node.op == "output"]) == 2
    is_known = form not in ("of another rank", "none")
    assert graph.by_name["mha/key"].shape == ((2, 7, 8) if is_known else ())
    (turned,) = (node for node in graph.nodes if node.op == "transpose")
    assert turned.shape == ((5, 2, 3) if is_known else ())
    assert [(len(node._inbound_nodes), len(node._outbound_nodes)) for node in model.operations] == before


def test_a_sum_of_three_is_two_sums() -> None:
    inputs = [keras.Input((2,), name=name) for name in "abc"]
    graph = graph_of(keras.Model(inputs, L.Add(name="sum")(inputs)))
    assert flow(graph)[3:] == [
        ("sum/1", "add", ("a", "b")),
        ("sum", "add", ("sum/1", "c")),
        ("output", "output", ("sum",)),
    ]


def test_both_uses_of_a_tied_table_bear_its_name() -> None:
    tokens = keras.Input((3,), dtype="int32")
    table = L.ReversibleEmbedding(7, 4, name="table")
    graph = graph_of(keras.Model(tokens, table(table(tokens), reverse=True)))
    assert [node.op for node in graph.calls["table/embeddings"]] == ["embedding", "linear"]


# ---------------------------------------------------------------------------------------------------------------------
# Models that have no nodes


class Block(keras.layers.Layer):  # type: ignore[misc]
    """A layer made of others, and of a weight of its own."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dense, self.norm = L.Dense(4, name="dense"), L.BatchNormalization(name="norm")

    def build(self, shape: Any) -> None:
        self.dense.build(shape)
        self.norm.build((*shape[:-1], 4))
        self.mix = self.add_weight(shape=(4, 4), name="mix")

    def call(self, x: Any, training: bool = False) -> Any:
        return keras.ops.relu(self.norm(self.dense(x), training=training)) @ self.mix


class Blocks(keras.Model):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__(name="blocks")
        self.blocks = [Block(name="first"), Block(name="second")]

    def call(self, x: Any) -> Any:
        for block in self.blocks:
            x = x + block(x)
        return {"features": x, "sum": keras.ops.sum(x, -1)}


def test_a_subclassed_model_is_traced_on_symbolic_tensors() -> None:
    model = Blocks()
    x = draw(3, 4)
    model(x)
    with unchanged(model):
        graph = graph_of(model, Batch((x,), size=3))
    assert [(node.name, node.op, node.layer) for node in graph.nodes if node.layer] == [
        ("first/dense", "linear", "first/dense"),
        ("first/matmul", "linear", "first/mix"),
        ("second/dense", "linear", "second/dense"),
        ("second/matmul_1", "linear", "second/mix"),
    ]
    assert list(graph.norms) == ["first/norm", "second/norm"]
    assert [node.inputs for node in graph.nodes if node.op == "output"] == [("add_1",), ("sum",)]
    assert graph.by_name["first/dense"].shape == (3, 4)
    assert flow(graph_of(model)) == flow(graph)  # it knows the shape it was built for


def test_a_model_that_takes_no_symbolic_tensors_has_no_graph() -> None:
    class Plain(Blocks):
        def call(self, x: Any) -> Any:
            import tensorflow as tf

            return tf.nn.relu(self.blocks[1](self.blocks[0](x)))

    model = Plain()
    model(draw(2, 4))
    with unchanged(model), pytest.raises(NoGraphError, match="no graph: 'blocks' cannot be called on symbolic"):
        graph_of(model, Batch((draw(2, 4),), size=2))


def test_a_model_of_several_inputs_asks_for_samples() -> None:
    class Two(Blocks):
        def call(self, x: Any, y: Any) -> Any:
            return self.blocks[1](self.blocks[0](x)) + y

    model = Two()
    model(draw(2, 4), draw(2, 4))
    with pytest.raises(NoGraphError, match="give samples"):
        graph_of(model)
    assert graph_of(model, Batch((draw(2, 4),), {"y": draw(2, 4)}, size=2)).nodes[1].name == "y"


def test_a_layer_alone_has_a_graph() -> None:
    layer = L.Dense(3, activation="relu")
    layer.build((None, 4))
    assert flow(graph_of(layer, Batch((draw(2, 4),), size=2))) == [
        ("input", "input", ()),
        ("(root)", "linear", ("input",)),
        ("(root)/relu", "relu", ("(root)",)),
        ("output", "output", ("(root)/relu",)),
    ]


@pytest.mark.parametrize("name", list(MODELS))
def test_the_model_stays_as_it_is(name: str) -> None:
    model, batch = MODELS[name]()
    with unchanged(model):
        graph = graph_of(model, batch)
    assert set(graph.calls) <= {layer.name for layer in adapters.read(model).layers}


def test_names_that_come_next_are_not_used_up() -> None:
    keras.utils.clear_session()
    given = keras.Input((3, 4))
    model = keras.Model(given, L.MultiHeadAttention(2, 3, name="attention")(given, given))
    graph_of(model)
    (name,) = (
        layer.name for layer in keras.Model(given, keras.ops.einsum("abc,adc->abd", given, given)).operations[1:]
    )
    assert name == "einsum"


# ---------------------------------------------------------------------------------------------------------------------
# Folding


def residual() -> Any:
    given = keras.Input((8, 8, 3))
    x = L.ReLU()(L.BatchNormalization(name="norm1")(L.Conv2D(4, 3, padding="same", name="conv1")(given)))
    y = L.BatchNormalization(scale=False, name="norm2")(L.DepthwiseConv2D(3, padding="same", name="conv2")(x))
    y = L.BatchNormalization(center=False, name="norm3")(L.Conv2D(4, 1, use_bias=False, name="conv3")(y))
    x = L.BatchNormalization(name="norm4")(keras.ops.relu(x + y))
    x = L.Conv2D(5, 3, name="conv4")(x)
    x = L.Conv2DTranspose(4, 3, strides=2, name="up")(x)
    x = L.BatchNormalization(scale=False, center=False, name="norm5")(x)
    x = L.SeparableConv2D(6, 3, name="separable")(x)
    x = L.Flatten()(L.BatchNormalization(name="norm6")(x))
    return keras.Model(given, L.BatchNormalization(name="norm7")(L.Dense(3, name="dense")(x)))


@cache
def normalized() -> Any:
    """A model whose normalizations have numbers as after training."""
    keras.utils.set_random_seed(0)
    model = residual()
    rng = np.random.default_rng(0)
    for layer in model.layers:
        for name in ("gamma", "beta", "moving_mean", "moving_variance"):
            variable = getattr(layer, name, None)
            if variable is not None:
                low, high = (0.5, 2) if name in ("gamma", "moving_variance") else (-1, 1)
                variable.assign(rng.uniform(low, high, variable.shape))
    return model


def with_graph(model: Any, batch: Batch) -> Network:
    from dataclasses import replace

    return replace(adapters.read(model), graph=graph_of(model, batch))


def test_a_folded_model_computes_the_same() -> None:
    model, batch = normalized(), Batch((draw(2, 8, 8, 3),), size=2)
    folded = fold_network(with_graph(model, batch))
    assert {fold.norm: fold.layer for fold in folded.folds} == {
        "norm1": "conv1",
        "norm2": "conv2",
        "norm3": "conv3",
        "norm4": "conv4",
        "norm5": "up",
        "norm6": "separable/pointwise_kernel",
        "norm7": "dense",
    }
    with unchanged(model):
        assert verify(runner_of(model), [batch], folded) < 1e-5


def test_digits_fold_and_compute_the_same() -> None:
    model, batch = MODELS["digits"]()
    folded = fold_network(with_graph(model, batch))
    assert [fold.layer for fold in folded.folds] == ["stem"]
    assert verify(runner_of(model), [batch], folded) < 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_a_file_is_loaded_to_be_run(tmp_path: Path) -> None:
    model, batch = MODELS["digits"]()
    expected = runner_of(model).run(batch)[0]
    for name in ("digits.keras", "digits.h5"):
        model.save(tmp_path / name)
        np.testing.assert_allclose(runner_of(tmp_path / name).run(batch)[0], expected, atol=1e-6)
        found = graph_of(tmp_path / name, batch)
        assert [node.op for node in found.nodes] == [node.op for node in graph_of(model).nodes]
        with pytest.raises(NoGraphError, match=r"read without Keras; .* or give samples"):
            graph_of(tmp_path / name)


def test_weights_without_a_model_are_refused_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "digits.weights.h5"
    keras_models.digits().save_weights(path)
    with pytest.raises(NotRunnableError, match=r"Keras cannot load .*digits.weights.h5.* pass the model"):
        runner_of(path)
    with pytest.raises(NoGraphError, match=r"no graph: Keras cannot load .*pass the model"):
        graph_of(path, MODELS["digits"]()[1])


def test_what_tensorflow_saved_is_refused_with_the_way_out(tmp_path: Path) -> None:
    import tensorflow as tf

    module = tf.Module()
    module.v = tf.Variable(draw(3, 4))
    tf.saved_model.save(module, str(tmp_path / "saved"))
    with pytest.raises(NotRunnableError, match="pass the Keras model"):
        runner_of(tmp_path / "saved")
    with pytest.raises(NoGraphError, match="pass the Keras model"):
        graph_of(tmp_path / "saved")
