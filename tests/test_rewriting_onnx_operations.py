"""Biases that Add nodes add, clips that become ReLU, and multiplications that are put in, in copies of ONNX models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qvis import adapters
from qvis.errors import BadArgumentError
from qvis.folding import fold_network, verify
from qvis.rewriting import Rewriting
from qvis.running import Batch
from tests import test_rewriting_onnx
from tests.test_adapters_onnx import node
from tests.test_rewriting_onnx import noise, run

X = noise(2, 3, 5, seed=9)


def made(*nodes: Any, shape: tuple[int, ...] = X.shape, opset: int = 21, **constants: Any) -> onnx.ModelProto:
    """A model of which all sizes are known, as the checker wants it."""
    model = test_rewriting_onnx.made(*nodes, **constants)
    model.opset_import[0].version = opset
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", 1, shape))
    model.graph.output[0].CopyFrom(onnx.shape_inference.infer_shapes(model).graph.output[0])
    return model


def checked(model: onnx.ModelProto, rewriting: Rewriting, *, notes: int = 0) -> onnx.ModelProto:
    """A copy with other numbers, that is a valid model; the given one stays as it is."""
    before = model.SerializeToString()
    new, found = adapters.rewrite(model, adapters.read(model), rewriting)
    assert len(found) == notes, found
    assert model.SerializeToString() == before
    onnx.checker.check_model(new, full_check=True)
    return new


def stored(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}


# ---------------------------------------------------------------------------------------------------------------------
# Biases


@pytest.mark.parametrize("add", ["h b", "b h"])
@pytest.mark.parametrize("held", ["initializer", "node", "row"])
def test_a_bias_is_written_to_the_constant_that_an_add_adds(add: str, held: str) -> None:
    bias, w = noise(4, seed=1), noise(5, 4)
    constant = helper.make_node("Constant", [], ["b"], value=numpy_helper.from_array(bias))
    model = made(
        *([constant] if held == "node" else []),
        node("MatMul", "x w", output="h"),
        node("Add", add),
        w=w,
        **({} if held == "node" else {"b": bias.reshape(1, 1, 4) if held == "row" else bias}),
    )
    wanted = noise(4, seed=2)
    new = checked(model, Rewriting(biases={"w": wanted}))
    np.testing.assert_allclose(run(new, X)[0], X @ w + wanted, rtol=1e-5, atol=1e-5)
    assert len(new.graph.initializer) == len(model.graph.initializer)
    assert [one.op_type for one in new.graph.node] == [one.op_type for one in model.graph.node]


def test_a_bias_that_others_share_becomes_its_own() -> None:
    model = made(
        node("Identity", "b", output="copy"),
        node("MatMul", "x w", output="h"), node("Add", "h copy", output="i"),
        node("MatMul", "i v", output="j"), node("Add", "b j", output="k"),
        node("Mul", "k b"),
        w=noise(5, 4), v=noise(4, 4, seed=1), b=noise(4, seed=2),
    )  # fmt: skip
    wanted = {"w": noise(4, seed=3), "v": noise(4, seed=4)}
    new = checked(model, Rewriting(biases=wanted))
    own = stored(model)
    np.testing.assert_array_equal(stored(new)["b"], own["b"])
    expected = ((X @ own["w"] + wanted["w"]) @ own["v"] + wanted["v"]) * own["b"]
    np.testing.assert_allclose(run(new, X)[0], expected, rtol=1e-4, atol=1e-4)
    for layer in adapters.read(new).layers:
        assert layer.bias is not None
        np.testing.assert_array_equal(layer.bias(), wanted[layer.name])


def test_a_normalization_behind_a_bias_that_is_added_to_a_convolution_is_folded_and_scaled() -> None:
    model = made(
        node("Conv", "x w", output="h"), node("Add", "b h", output="i"),
        node("BatchNormalization", "i scale shift mean variance", "norm", "j"),
        node("Mul", "j b"),
        w=noise(3, 3, 1), b=noise(3, 1), scale=noise(3, seed=1), shift=noise(3, seed=2), mean=noise(3, seed=3),
        variance=noise(3, seed=4) ** 2 + 0.1,
    )  # fmt: skip
    network = replace(adapters.read(model), graph=adapters.graph(model))
    folded = fold_network(network)
    assert [(one.layer, one.direction) for one in folded.folds] == [("w", "backward")]
    factors = np.exp(noise(3, seed=5))
    weights = {"w": folded.weights["w"] * factors[:, None]}
    norms = {name: replace(norm, shift=norm.shift * factors) for name, norm in folded.norms.items()}
    biases = {"w": noise(3, 1).reshape(3) * factors}
    new = checked(model, Rewriting(weights=weights, biases=biases, norms=norms))
    np.testing.assert_array_equal(stored(new)["b"], noise(3, 1))  # which the Mul takes too
    np.testing.assert_allclose(run(new, X)[0], run(model, X)[0] * factors[:, None], rtol=1e-4, atol=1e-5)


def test_a_layer_whose_uses_add_different_things_has_no_bias_to_write() -> None:
    model = made(
        node("MatMul", "x w", output="h"), node("Add", "h b", output="i"), node("MatMul", "i w", output="j"),
        node("Add", "j c"), w=noise(5, 5), b=noise(5), c=noise(5, seed=1),
    )  # fmt: skip
    with pytest.raises(BadArgumentError, match=r"biases: 'w' .* has no bias that could be written; give one"):
        adapters.rewrite(model, adapters.read(model), Rewriting(biases={"w": noise(5)}))


def test_a_normalization_behind_an_added_bias_is_folded() -> None:
    model = made(
        node("MatMul", "x w", output="h"),
        node("Add", "h b", output="i"),
        node("BatchNormalization", "i scale shift mean variance", "norm", "j"),
        node("Relu", "j"),
        w=noise(5, 4), b=noise(4), scale=noise(4, seed=1), shift=noise(4, seed=2), mean=noise(4, seed=3),
        variance=noise(4, seed=4) ** 2 + 0.1, shape=(6, 5),
    )  # fmt: skip
    x, own = X.reshape(6, 5), stored(model)
    network = replace(adapters.read(model), graph=adapters.graph(model))
    folded = fold_network(network)
    assert [(one.layer, one.direction) for one in folded.folds] == [("w", "backward")]
    gain = own["scale"] / np.sqrt(own["variance"] + 1e-5)
    (layer,) = [one for one in folded.network.layers if one.name == "w"]
    np.testing.assert_allclose(layer.weight, (own["w"] * gain).T, rtol=1e-5)
    assert layer.bias is not None
    np.testing.assert_allclose(layer.bias(), (own["b"] - own["mean"]) * gain + own["shift"], rtol=1e-5)
    assert verify(adapters.runner(model, network), [Batch((x,), size=6)], folded) < 1e-6
    new = checked(model, Rewriting(weights=folded.weights, norms=folded.norms))
    np.testing.assert_allclose(run(new, x)[0], run(model, x)[0], rtol=1e-5, atol=1e-6)


def test_vectors_of_sums_and_products_are_written_and_found() -> None:
    model = made(
        node("Sub", "x c", "take", "h"), node("Mul", "norm.weight h", "times", "i"), node("Add", "i c", "give", "j"),
        node("MatMul", "j w"), c=noise(3, 1), w=noise(5, 4), **{"norm.weight": noise(1, 1, 5, seed=1)},
    )  # fmt: skip
    found = adapters.affines(model)
    assert {name: [one is None for one in pair] for name, pair in found.items()} == {
        "take": [True, False], "norm": [False, True], "give": [True, False],
    }  # fmt: skip
    wanted = {"take": (None, noise(3, seed=2)), "norm": (noise(5, seed=3), None)}
    new = checked(model, Rewriting(affines=wanted))
    expected = ((X - wanted["take"][1][:, None]) * wanted["norm"][0] + noise(3, 1)) @ noise(5, 4)
    np.testing.assert_allclose(run(new, X)[0], expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(BadArgumentError, match="affines: the factor of 'take' does not exist; give None"):
        adapters.rewrite(model, adapters.read(model), Rewriting(affines={"take": (noise(3), None)}))


# ---------------------------------------------------------------------------------------------------------------------
# Clips


def clips(opset: int = 21) -> onnx.ModelProto:
    """Clips with their bounds in all places, one after the other."""
    held = numpy_helper.from_array(np.float32(6))
    nodes: list[Any] = [helper.make_node("Constant", [], ["six"], value=held)]
    if opset < 11:
        nodes += [helper.make_node("Clip", ["x"], ["a"], min=0.0, max=6.0), node("MatMul", "a w")]
    else:
        nodes += [
            node("Clip", "x zero six", "first", "a"),
            node("Max", "a zero", output="b"), node("Min", "six b", "second", "c"),
            node("Clip", "c one six", "third", "d"), node("MatMul", "d w"),
        ]  # fmt: skip
    return made(*nodes, opset=opset, w=noise(5, 4), zero=np.float32(0), one=np.float32(1))


def test_clips_from_0_become_relu_and_others_stay_with_a_note() -> None:
    x = X * 10
    new = checked(clips(), Rewriting(unclipped=["first", "second", "third"]), notes=1)
    assert [one.op_type for one in new.graph.node] == ["Constant", "Relu", "Max", "Relu", "Clip", "MatMul"]
    np.testing.assert_allclose(run(new, x)[0], np.clip(np.maximum(x, 0), 1, 6) @ noise(5, 4), rtol=1e-5, atol=1e-5)
    _, (note,) = adapters.rewrite(clips(), adapters.read(clips()), Rewriting(unclipped=["third"]))
    assert note.startswith("third: stays as it is, since it is no clip from 0 on")
    again = checked(new, Rewriting(unclipped=["first"]))
    assert again.SerializeToString() == new.SerializeToString()
    old = clips(6)
    (name,) = [one.name for one in adapters.graph(old).nodes if one.op == "clip"]
    found = run(checked(old, Rewriting(unclipped=[name])), x)[0]
    np.testing.assert_allclose(found, np.maximum(x, 0) @ noise(5, 4), rtol=1e-5, atol=1e-4)
    with pytest.raises(BadArgumentError, match="unclipped: no operation is called 'frist'; did you mean 'first'"):
        adapters.rewrite(clips(), adapters.read(clips()), Rewriting(unclipped=["frist"]))


# ---------------------------------------------------------------------------------------------------------------------
# Multiplications


def shared() -> onnx.ModelProto:
    """A result that two layers and a sum take; one of the layers is used twice."""
    model = made(
        node("Tanh", "x", output="t"), node("Reshape", "t rows", output="flat"),
        node("MatMul", "t w", output="h"), node("Gemm", "flat u", "fc.multiply", "fc.multiplied"),
        node("Reshape", "fc.multiplied same", output="i"),
        node("MatMul", "i w", output="j"), node("Sum", "h t j"),
        w=noise(5, 5), u=noise(5, 5, seed=1), same=np.array([2, 3, 5]), rows=np.array([6, 5]),
    )  # fmt: skip
    model.graph.value_info.append(helper.make_tensor_value_info("t", 1, [2, 3, 5]))
    return model


def test_what_enters_a_layer_is_multiplied_in_each_of_its_calls_and_nowhere_else() -> None:
    model, own, factors = shared(), stored(shared()), np.exp(noise(5, seed=2))
    new = checked(model, Rewriting(multiplies={"w": factors, "u": factors[::-1]}))
    t = np.tanh(X)
    wanted = (t * factors) @ own["w"] + t + ((t * factors[::-1]) @ own["u"] * factors) @ own["w"]
    np.testing.assert_allclose(run(new, X)[0], wanted, rtol=1e-4, atol=1e-4)
    names = [one for node in new.graph.node for one in (*node.output, node.name) if one]
    assert len(set(names)) == len(names)
    assert [one.op_type for one in new.graph.node].count("Mul") == 3
    graph, before = adapters.graph(new), adapters.graph(model)
    for layer, calls in before.calls.items():
        assert len(graph.calls[layer]) == len(calls)
        for call in graph.calls[layer]:
            (given,) = (graph.by_name[one] for one in call.inputs)
            assert (given.op, dict(given.attributes)) == ("mul", {"constant": True, "axis": -1})
    assert [one.name for one in adapters.read(new).layers] == [one.name for one in adapters.read(model).layers]
    sizes = {one.name: [size.dim_value for size in one.type.tensor_type.shape.dim] for one in new.graph.value_info}
    assert sizes == {"t": [2, 3, 5], "w.multiplied": [2, 3, 5]}
    # and once more, on what was made
    twice = checked(new, Rewriting(multiplies={"w": 1 / factors, "u": 1 / factors[::-1]}))
    np.testing.assert_allclose(run(twice, X)[0], run(model, X)[0], rtol=1e-4, atol=1e-4)


def test_models_of_float16_are_multiplied_in_float16() -> None:
    model = made(
        node("Cast", "x", output="h", to=10), node("MatMul", "h w", output="i"), node("Cast", "i", to=1),
        w=noise(5, 4).astype(np.float16),
    )  # fmt: skip
    factors = np.exp(noise(5))
    new = checked(model, Rewriting(multiplies={"w": factors}), notes=1)
    wanted = X.astype(np.float16) * factors.astype(np.float16) @ noise(5, 4).astype(np.float16)
    np.testing.assert_allclose(run(new, X)[0], wanted.astype(np.float32), rtol=2e-2, atol=2e-2)
    with pytest.raises(BadArgumentError, match="multiplies: 'w' is stored in float16, which has no room for"):
        adapters.rewrite(model, adapters.read(model), Rewriting(multiplies={"w": factors * 1e6}))


def test_a_multiplication_inside_of_a_function_is_put_in_once_that_is_inlined() -> None:
    body = [helper.make_node("MatMul", ["a", "k"], ["b"])]
    function = helper.make_function("own", "Dense", ["a", "k"], ["b"], body, [helper.make_opsetid("", 21)])
    model = made(node("Dense", "x w", "one", domain="own"), functions=[function], w=noise(5, 4))
    factors = np.exp(noise(5))
    new = checked(model, Rewriting(multiplies={"w": factors}), notes=1)
    assert not new.functions
    np.testing.assert_allclose(run(new, X)[0], X * factors @ noise(5, 4), rtol=1e-5, atol=1e-5)


def test_what_cannot_be_multiplied_is_named_with_the_way_out() -> None:
    def refused(model: Any, match: str, **given: Any) -> None:
        with pytest.raises(BadArgumentError, match=match):
            adapters.rewrite(model, adapters.read(model), Rewriting(multiplies=given))

    image = made(node("Conv", "x w"), w=noise(4, 3, 1))
    refused(image, "multiplies: 'w' is no linear layer, so that its input cannot be multiplied; leave it out", w=X)
    refused(image, "multiplies: no layer is called 'v'", v=X)
    left = made(node("MatMul", "w x"), w=noise(4, 3))
    refused(left, "multiplies: 'w' is no linear layer", w=noise(3))
    plain = made(node("MatMul", "x w"), w=noise(5, 4))
    refused(plain, r"multiplies: 'w' has the shape \(5,\), got \(4,\)", w=noise(4))
    plain.opset_import[0].version = 6
    refused(plain, r"opset 6, in which Mul takes no vector; convert it with onnx\.version_converter", w=noise(5))
    inner = helper.make_graph(
        [node("MatMul", "h w", output="z")], "inner", [], [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)]
    )
    chosen = helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
    model = made(node("MatMul", "x w", output="h"), chosen, w=noise(5, 5), c=np.array(True))
    refused(model, "multiplies: 'w' is used inside a branch or a loop", w=noise(5))


def test_operations_are_put_into_the_model_itself_only_when_everything_is_right() -> None:
    model, factors = shared(), np.exp(noise(5, seed=2))
    before = model.SerializeToString()
    network = adapters.read(model)
    with pytest.raises(BadArgumentError, match=r"multiplies: 'u' has the shape \(5,\), got \(2,\)"):
        adapters.rewrite(model, network, Rewriting(multiplies={"w": factors, "u": factors[:2]}), inplace=True)
    assert model.SerializeToString() == before
    copied, _ = adapters.rewrite(model, network, Rewriting(multiplies={"w": factors}))
    new, _ = adapters.rewrite(model, network, Rewriting(multiplies={"w": factors}), inplace=True)
    assert new is model
    assert new.SerializeToString() == copied.SerializeToString()
