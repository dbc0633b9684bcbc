"""Which channels of Keras models can be scaled, and that scaling them leaves what they compute as it is.

All is computed in float64: what is exact there to nine digits is no rounding error in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import pytest

from qvis import adapters
from qvis.equalization.sites import Sites, find_sites, scaled
from qvis.folding import fold_network
from qvis.layers import Network
from qvis.rewriting import Rewriting
from qvis.running import Batch
from tests import keras_models

keras = keras_models.require()

L, ops = keras.layers, keras.ops
pytestmark = keras_models.QUIET


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    floats, policy = keras.config.floatx(), keras.config.dtype_policy()
    keras.utils.clear_session()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx(floats)
    keras.config.set_dtype_policy(policy)


def noise(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape)


def drawn(model: Any) -> Any:
    """A model with random weights, whose normalizations do something."""
    for seed, one in enumerate(model.weights):
        is_variance = "variance" in one.name
        one.assign(np.abs(noise(*one.shape, seed=seed)) + 0.5 if is_variance else noise(*one.shape, seed=seed) * 0.5)
    return model


def read(model: Any, x: Any) -> Network:
    return replace(adapters.read(model), graph=adapters.graph(model, Batch((x,), size=len(x))))


def run(model: Any, x: Any) -> Any:
    return np.asarray(model(x, training=False))


def check(model: Any, x: Any) -> Sites:
    """Scale a model by random numbers: its outputs must stay as they are."""
    network = read(model, x)
    assert network.graph is not None
    folded = fold_network(network)
    sites = find_sites(network.graph, folded.network, set(folded.norms))
    scales = np.exp(np.random.default_rng(1).normal(0, 0.5, sites.count))
    norms = {**network.graph.norms, **folded.norms}
    new = scaled(sites, scales, folded.network.layers, norms, adapters.affines(model))
    new = replace(new, weights={**folded.weights, **new.weights}, norms={**folded.norms, **new.norms})
    own = run(model, x)
    other, notes = adapters.rewrite(model, network, new)
    assert notes == ()
    before = {layer.name: layer for layer in network.layers}
    changed = [
        one.name for one in adapters.read(other).layers if not np.array_equal(one.weight, before[one.name].weight)
    ]
    assert {name for site in sites.sites for name in site.producers} - set(sites.affines) - set(sites.norms) <= {
        *changed
    }
    assert np.abs(run(other, x) - own).max() <= 1e-9 * np.abs(own).max()
    assert np.ptp(own) > 1e-3 * np.abs(own).max()
    return sites


# ---------------------------------------------------------------------------------------------------------------------
# One thing at a time

TOKENS, IMAGE = (5, 12), (8, 8, 4)


def heads(x: Any) -> Any:
    return ops.transpose(ops.reshape(x, (-1, 5, 3, 4)), (0, 2, 1, 3))


def projected(x: Any) -> list[Any]:
    return [L.Dense(12, name=name)(x) for name in "qkv"]


def by_matmul(x: Any) -> Any:
    q, k, v = map(heads, projected(x))
    mixed = ops.matmul(ops.softmax(ops.matmul(q, ops.swapaxes(k, 2, 3)) / 2), v)
    return L.Dense(3, name="o")(ops.reshape(ops.transpose(mixed, (0, 2, 1, 3)), (-1, 5, 12)))


def by_einsum(x: Any) -> Any:
    q, k, v = (ops.reshape(one, (-1, 5, 3, 4)) for one in projected(x))
    mixed = ops.einsum("bhqk,bkhd->bqhd", ops.softmax(ops.einsum("bqhd,bkhd->bhqk", q, k)), v)
    return L.EinsumDense("bqhd,hdo->bqo", (None, 3), name="o")(mixed)


def packed(x: Any) -> Any:
    q, k, v = ops.split(L.Dense(18, name="qkv")(x), 3, axis=-1)
    return L.Dense(3, name="o")(ops.matmul(ops.softmax(ops.matmul(q, ops.transpose(k, (0, 2, 1)))), v))


def unbound(x: Any) -> Any:
    qkv = ops.transpose(ops.reshape(L.Dense(36, name="qkv")(x), (-1, 5, 3, 3, 4)), (2, 0, 3, 1, 4))
    mixed = ops.matmul(ops.softmax(ops.matmul(qkv[0], ops.transpose(qkv[1], (0, 1, 3, 2)))), qkv[2])
    return L.Dense(3, name="o")(ops.reshape(ops.transpose(mixed, (0, 2, 1, 3)), (-1, 5, 12)))


def attention_layer(x: Any) -> Any:
    q, k, v = projected(x)
    return L.Dense(3, name="o")(L.Attention()([q, v, k]))


def additive(x: Any) -> Any:
    q, k, v = projected(x)
    return L.Dense(3, name="o")(L.AdditiveAttention()([q, v, k]))


def block(x: Any) -> Any:
    y = L.LayerNormalization(name="n1")(x)
    x = L.Add()([x, L.MultiHeadAttention(3, 4, name="mha")(y, y)])
    y = L.RMSNormalization(name="n2")(x)
    y = ops.silu(L.Dense(7, name="gate")(y)) * L.Dense(7, name="up")(y)
    return L.Dense(2, name="head")(L.LayerNormalization(name="n3", center=False)(x + L.Dense(12, name="down")(y)))


def grouped(x: Any) -> Any:
    x = L.Activation("relu")(L.GroupNormalization(2, name="gn")(L.Conv2D(6, 3, name="c0")(x)))
    x = L.GroupNormalization(-1, scale=False, name="in")(L.Conv2D(5, 1, name="c1")(x))
    x = L.LayerNormalization(axis=[1, 2, 3], name="all")(L.Conv2D(4, 1, name="c2")(x))
    return L.Conv2D(3, 1, name="c3")(x)


def cropped(x: Any) -> Any:
    x = L.Cropping2D(((1, 0), (2, 1)))(L.ZeroPadding2D(2)(L.Conv2D(5, 3, name="a")(x)))
    return L.Dense(3, name="b")(L.UpSampling2D()(x)[:, ::2])


def halved(x: Any) -> Any:
    one, other = ops.split(L.Conv2D(6, 1, name="a")(x), [2], axis=-1)
    return L.Conv2D(2, 1, name="c")(L.Concatenate()([other, L.Conv2D(2, 1, name="b")(one)]))


def dotted(x: Any) -> Any:
    weights = ops.softmax(L.Dense(4, name="w")(x), axis=1)
    return L.Dense(3, name="o")(L.Dot((1, 1))([weights, L.Dense(6, name="v")(x)]))


CASES: dict[str, tuple[Callable[[Any], Any], tuple[int, ...], list[tuple[str, str, int]]]] = {
    "multi-head": (
        lambda x: L.MultiHeadAttention(3, 4, value_dim=2, name="m")(x, x),
        TOKENS,
        [("m/value", "m/attention_output", 6)],
    ),
    "multi-head by einsum": (
        lambda x: L.MultiHeadAttention(3, 4, dropout=0.1, name="m")(x, x, use_causal_mask=True),
        TOKENS,
        [("m/value", "m/attention_output", 12)],
    ),
    "grouped queries": (
        lambda x: L.GroupQueryAttention(4, 6, 2, name="m")(x, x),
        TOKENS,
        [("m/value", "m/attention_output", 4)],
    ),
    "attention layer": (attention_layer, TOKENS, [("v", "o", 12)]),
    "additive": (additive, TOKENS, []),
    "by matmul": (by_matmul, TOKENS, [("v", "o", 12)]),
    "by einsum": (by_einsum, TOKENS, [("v", "o", 12)]),
    "packed": (packed, TOKENS, [("qkv", "o", 6)]),
    "unbound": (unbound, TOKENS, [("qkv", "o", 12)]),
    "a block": (
        block,
        TOKENS,
        [
            ("n1", "mha/query mha/key mha/value", 12),
            ("mha/value", "mha/attention_output", 12),
            ("n2", "gate up", 12),
            ("up", "down", 7),
            ("n3", "head", 12),
        ],
    ),
    "norms of groups": (grouped, IMAGE, [("gn", "c1", 6)]),
    "cropped": (cropped, IMAGE, [("a", "b", 5)]),
    "halved": (halved, IMAGE, [("a", "b", 2), ("a", "c", 4), ("b", "c", 2)]),
    "dot": (dotted, TOKENS, [("v", "o", 6)]),
}


@pytest.mark.parametrize("name", CASES)
def test_scaling_changes_nothing(name: str) -> None:
    make, shape, expected = CASES[name]
    given = keras.Input(shape)
    sites = check(drawn(keras.Model(given, make(given))), noise(2, *shape))
    found = [(" ".join(one.producers), " ".join(one.consumers), one.channels) for one in sites.sites]
    assert sorted(found) == sorted(expected)


def test_query_and_key_stay_since_the_softmax_follows() -> None:
    given = keras.Input(TOKENS)
    sites = check(drawn(keras.Model(given, L.MultiHeadAttention(3, 4, name="m")(given, given))), noise(2, *TOKENS))
    assert {one.name: one.reason for one in sites.skipped} == {
        f"m/{name} -> m/attention_output": "the softmax of attention 'm/dot_product_attention' follows it"
        for name in ("query", "key")
    }


class Attention(keras.Model):  # type: ignore[misc]
    """Attention in code of its own, which asks how many samples there are, and puts their axis behind another one."""

    def __init__(self) -> None:
        super().__init__(name="attention")
        self.qkv, self.o = L.Dense(36, name="qkv"), L.Dense(3, name="o")

    def call(self, x: Any) -> Any:
        count, tokens, _ = ops.shape(x)
        q, k, v = ops.unstack(ops.transpose(ops.reshape(self.qkv(x), (count, tokens, 3, 3, 4)), (2, 0, 3, 1, 4)), 3)
        mixed = ops.matmul(ops.softmax(ops.matmul(q, ops.swapaxes(k, 2, 3))), v)
        return self.o(ops.reshape(ops.swapaxes(mixed, 1, 2), (count, tokens, 12)))


@pytest.mark.parametrize("inside", [False, True])
def test_attention_in_code_of_ones_own_is_followed(inside: bool) -> None:
    model, x, given = Attention(), noise(2, *TOKENS), keras.Input(TOKENS)
    model(x)
    sites = check(drawn(keras.Model(given, model(given)) if inside else model), x)
    assert [one.channels for one in sites.sites] == [12]


@pytest.mark.parametrize("nested", [False, True])
def test_sizes_that_a_model_leaves_open_come_from_an_example(nested: bool) -> None:
    given = keras.Input((None, None, 3), name="given")
    x = L.ReLU()(L.Conv2D(6, 3, name="a")(given))
    x = L.Conv2D(4, 3, name="b")(x)
    inner = keras.Model(given, ops.reshape(x, (-1, 16 * 4)), name="inner")
    outer = keras.Input((8, 8, 3), name="outer")
    dense = L.Dense(2, name="c")
    dense.build((None, 64))
    model = keras.Model(outer, dense(inner(outer))) if nested else keras.Model(given, dense(inner.output))
    x = noise(2, 8, 8, 3)
    before = [len(one._inbound_nodes) for one in [*inner.operations, *model.operations]]
    sites = check(drawn(model), x)
    assert [len(one._inbound_nodes) for one in [*inner.operations, *model.operations]] == before
    assert [site.channels for site in sites.sites] == [6, 4]
    shapes = {node.op: node.shape for node in read(model, x).graph.nodes}  # type: ignore[union-attr]
    assert shapes["reshape"] == (2, 64)
    if not nested:
        unknown = adapters.graph(model)
        assert {node.shape for node in unknown.nodes if node.op == "conv"} == {()}
        assert [node.name for node in unknown.nodes] == [node.name for node in read(model, x).graph.nodes]  # type: ignore[union-attr]


# ---------------------------------------------------------------------------------------------------------------------
# Well-known architectures


def small(family: str, kind: str, *args: Any, **facts: Any) -> Callable[..., Any]:
    """What builds a network of few blocks with the structure of a known family."""
    module = import_module(f"keras.src.applications.{family}")
    return partial(getattr(module, kind), *args, **{"name": family, **facts})


def stacks(name: str) -> Callable[[Any], Any]:
    """The blocks of a residual network: of one stack with a shortcut as it is, and of one with a shrunk one."""
    stack = getattr(import_module("keras.src.applications.resnet"), name)
    return lambda x: stack(stack(x, 4, 2, stride1=1, name="conv2"), 6, 2, name="conv3")


ARCHITECTURES: dict[str, tuple[Callable[[], Any], dict[str, Any], int, set[str]]] = {
    "MobileNet": (lambda: keras.applications.MobileNet, {"alpha": 0.25}, 27, set()),
    "MobileNetV2": (lambda: keras.applications.MobileNetV2, {"alpha": 0.35}, 42, set()),
    "MobileNetV3Small": (lambda: keras.applications.MobileNetV3Small, {}, 19, {"hardswish", "add"}),
    "EfficientNet": (
        lambda: small("efficientnet", "EfficientNet", 0.25, 0.3, 32),
        {},
        6,
        {"silu", "sigmoid", "it is tied to the result of silu"},
    ),
    "EfficientNetV2": (
        lambda: small("efficientnet_v2", "EfficientNetV2", 0.25, 0.4, 32, name="efficientnetv2-b0"),
        {},
        5,
        {"silu", "sigmoid"},
    ),
    "ResNet": (lambda: small("resnet", "ResNet", stacks("stack_residual_blocks_v1"), False, True), {}, 11, set()),
    "ResNetV2": (
        lambda: small("resnet", "ResNet", stacks("stack_residual_blocks_v2"), True, True),
        {},
        8,
        {"batch_norm"},
    ),
    "DenseNet": (lambda: small("densenet", "DenseNet", [2, 1, 2, 1]), {}, 6, {"batch_norm"}),
    "ConvNeXt": (lambda: small("convnext", "ConvNeXt", [1, 2, 1, 1], [4, 6, 8, 10]), {}, 9, {"gelu", "layer_norm"}),
}


def trained(name: str) -> tuple[Any, Any]:
    """An architecture of Keras with random weights, and normalizations with numbers as after training."""
    keras.utils.set_random_seed(0)
    build, options, *_ = ARCHITECTURES[name]
    shape = (32, 32, 3)
    model = build()(weights=None, input_shape=shape, classes=10, classifier_activation=None, **options)
    x, random = noise(2, *shape), np.random.default_rng(0)
    if any(isinstance(layer, L.Rescaling) for layer in model.layers):
        x = 100 + 50 * x
    layers = model._flatten_layers()
    norms = [layer for layer in layers if hasattr(layer, "moving_variance")]
    for layer in layers:
        for key, low, high in (("gamma", 0.5, 2), ("beta", -0.5, 0.5), ("bias", -0.5, 0.5)):
            one = getattr(layer, key, None)
            if hasattr(one, "assign"):
                one.assign(random.uniform(low, high, one.shape))
    for norm in norms:
        norm.momentum = 0.0
    model(x, training=True)
    for norm in norms:
        variance, mean = norm.moving_variance, norm.moving_mean
        variance.assign(variance.numpy() * random.uniform(0.5, 2, variance.shape) + 1e-2)
        mean.assign(mean.numpy() + random.normal(0, 0.1, mean.shape))
    return model, x


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scaling_changes_no_architecture(name: str) -> None:
    *_, count, obstacles = ARCHITECTURES[name]
    model, x = trained(name)
    if name in ("MobileNet", "MobileNetV2"):  # whose ReLU6 nothing can be scaled through
        own, network = run(model, x), read(model, x)
        clips = [node.name for node in network.graph.nodes if node.op == "clip"]  # type: ignore[union-attr]
        model, notes = adapters.rewrite(model, network, Rewriting(unclipped=clips))
        assert notes == ()
        assert np.abs(run(model, x) - own).max() > 1e-3 * np.abs(own).max()
    sites = check(model, x)
    assert len(sites.sites) >= count
    assert {one.reason.split(" '")[0] for one in sites.skipped} <= obstacles
