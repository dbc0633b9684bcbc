"""ONNX models on other weights, watched, rounded and differentiated: compared with onnxruntime and PyTorch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from qvis.adapters import onnx as adapter
from qvis.adapters.onnx.runner import OnnxRunner
from qvis.errors import BadArgumentError, NotRunnableError
from qvis.layers import Norm
from qvis.running import Batch, Gradient, Grid, Passage
from tests import zoo
from tests.test_adapters_onnx import graph, node

onnxruntime = pytest.importorskip("onnxruntime")

RANDOM = np.random.default_rng(0)


class Convolutions(nn.Module):
    """Grouped, transposed and repeated convolutions with a residual, and two outputs, one of them integer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)
        self.head = nn.Linear(6, 5)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.nn.functional.relu6(self.norm(self.stem(images)))
        hidden = hidden + self.grouped(torch.relu(self.grouped(hidden)))
        scores = self.head(torch.nn.functional.silu(self.up(hidden)).mean((2, 3)))
        return scores, scores.argmax(1)


class Encoder(nn.Module):
    """Tokens through a transformer's encoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu")
        self.head = nn.Linear(8, 3, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layer(self.tokens(tokens)).mean(1))


EXAMPLES: dict[type[nn.Module], np.ndarray] = {
    Convolutions: RANDOM.normal(size=(4, 3, 6, 6)).astype("f4"),
    Encoder: RANDOM.integers(0, 11, (4, 5)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runner")


def module(make: type[nn.Module]) -> nn.Module:
    model = zoo.seeded(make).eval()
    for one in model.modules():
        if isinstance(one, nn.BatchNorm2d):
            one.running_mean.copy_(torch.linspace(-0.2, 0.2, 8))
            one.running_var.copy_(torch.linspace(0.5, 2, 8))
    return model


@cache
def exported(make: type[nn.Module], folder: Path, dynamo: bool = True, sizes: int = 0, folded: bool = True) -> Path:
    """A file of the model for any number of samples, or for a fixed one."""
    path = folder / f"{make.__name__}-{dynamo}-{sizes}-{folded}.onnx"
    example = torch.from_numpy(np.resize(EXAMPLES[make], (sizes or 2, *EXAMPLES[make].shape[1:])))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given: dict[str, Any] = {"dynamo": dynamo, "verbose": False, "input_names": ["x"]}
        if dynamo:
            given |= {"dynamic_shapes": None if sizes else ({0: "n"},), "optimize": folded}
        else:
            given |= {"dynamic_axes": None if sizes else {"x": [0]}, "do_constant_folding": folded}
            given |= {"training": torch.onnx.TrainingMode.EVAL if folded else torch.onnx.TrainingMode.PRESERVE}
        torch.onnx.export(module(make), (example,), path, **given)
    return path


def made(model: Any, loss: Any = None) -> OnnxRunner:
    return adapter.runner(model, adapter.read(model), loss)


def batch(make: type[nn.Module], size: int = 4) -> Batch:
    return Batch((EXAMPLES[make][:size],), size=size)


def named(gradients: Any) -> dict[str, Gradient]:
    return {one.layer: one for one in gradients}


def ones(outputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [np.ones_like(one) for one in outputs]


def shaken(runner: OnnxRunner, path: Any) -> dict[str, np.ndarray]:
    """Other weights for every layer."""
    random = np.random.default_rng(1)
    layers = {one.name: one.weight for one in adapter.read(path).layers if one.name in runner.layers}
    return {name: w + 0.1 * random.normal(size=w.shape).astype("f4") for name, w in layers.items()}


def owner_of(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.removesuffix(".in_proj_weight"))


def weight_of(model: nn.Module, name: str) -> Tensor:
    owner = owner_of(model, name)
    return owner.in_proj_weight if isinstance(owner, nn.MultiheadAttention) else owner.weight


def put(model: nn.Module, weights: dict[str, np.ndarray]) -> nn.Module:
    """The module with the matrices in it, turned to PyTorch's own layout by hand."""
    for name, matrix in weights.items():
        owner, weight = owner_of(model, name), weight_of(model, name)
        tensor = matrix
        if isinstance(owner, nn.ConvTranspose2d):
            groups, (inputs, outputs, *kernel) = owner.groups, weight.shape
            tensor = matrix.reshape(groups, outputs, inputs // groups, *kernel).swapaxes(1, 2)
        weight.data.copy_(torch.from_numpy(np.ascontiguousarray(tensor.reshape(weight.shape))))
    return model


def first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


MODELS = [(make, dynamo) for make in EXAMPLES for dynamo in (True, False)]


@pytest.mark.parametrize(("make", "dynamo"), MODELS)
def test_other_weights_give_what_the_module_gives_with_them(make: type[nn.Module], dynamo: bool, folder: Path) -> None:
    path = exported(make, folder, dynamo, folded=False)
    runner = made(path)
    weights = shaken(runner, path)
    assert len(weights) == len(adapter.read(path).layers)
    example = torch.from_numpy(EXAMPLES[make])
    with torch.no_grad():
        own, other = first(module(make)(example)), first(put(module(make), weights)(example))
    np.testing.assert_allclose(runner.run(batch(make))[0], own, atol=1e-5)
    np.testing.assert_allclose(runner.run(batch(make), weights=weights)[0], other, atol=1e-5)
    np.testing.assert_allclose(runner.run(batch(make))[0], own, atol=1e-5)
    runner.place(weights, {})
    np.testing.assert_allclose(runner.run(batch(make))[0], other, atol=1e-5)
    runner.place({}, {})
    np.testing.assert_allclose(runner.run(batch(make))[0], own, atol=1e-5)


@pytest.mark.parametrize(("make", "dynamo"), MODELS)
def test_derivatives_are_those_of_the_module(make: type[nn.Module], dynamo: bool, folder: Path) -> None:
    path = exported(make, folder, dynamo, folded=False)
    runner = made(path)
    factor = np.random.default_rng(2).normal(size=runner.run(batch(make))[0].shape).astype("f4")
    assert runner.differentiable, runner.notes
    found = named(runner.differentiate(batch(make), lambda _: [factor]))
    assert set(found) == set(runner.layers)
    model = module(make)
    (first(model(torch.from_numpy(EXAMPLES[make]))) * torch.from_numpy(factor)).sum().backward()
    direction = {name: np.random.default_rng(3).normal(size=one.weight.shape) for name, one in found.items()}
    moved = put(module(make), {name: one.astype("f4") for name, one in direction.items()})
    for name, gradient in found.items():
        theirs = float((weight_of(model, name).grad * weight_of(moved, name).detach()).sum())
        assert float((gradient.weight * direction[name]).sum()) == pytest.approx(theirs, rel=1e-3, abs=1e-4), name


def test_a_derivative_by_an_input_is_of_each_call_alone(folder: Path) -> None:
    runner = made(exported(Convolutions, folder, folded=False))
    found = named(runner.differentiate(batch(Convolutions), ones))["grouped"]
    model, entered = module(Convolutions), []

    def copy(_: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        entered.append(inputs[0].clone())
        entered[-1].retain_grad()
        return entered[-1]

    model.grouped.register_forward_pre_hook(copy)
    first(model(torch.from_numpy(EXAMPLES[Convolutions]))).sum().backward()
    assert (len(found.inputs), found.axis) == (2, 1)
    for (x, gradient), one in zip(found.inputs, entered, strict=True):
        np.testing.assert_allclose(x, one.detach(), atol=1e-5)
        np.testing.assert_allclose(gradient, one.grad, atol=1e-5)


@pytest.mark.parametrize("make", list(EXAMPLES))
def test_what_enters_and_leaves_is_what_hooks_see(make: type[nn.Module], folder: Path) -> None:
    path = exported(make, folder, folded=False)
    runner = made(path)
    others = shaken(runner, path)
    seen: dict[str, list[Passage]] = {}
    plain = runner.run(batch(make))[0]
    watched = runner.run(batch(make), others=others, watch=lambda one: seen.setdefault(one.layer, []).append(one))
    np.testing.assert_allclose(watched[0], plain, atol=1e-6)
    assert set(seen) == set(runner.layers)
    model, other = module(make), put(module(make), others)
    hooked: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name in seen:
        owner_of(model, name).register_forward_hook(
            lambda _, given, result, name=name: hooked.setdefault(name, []).append((given[0], first(result)))
        )
    with torch.enable_grad():  # keeps the encoder from a path of its own that no hook sees
        model(torch.from_numpy(EXAMPLES[make]))
    for name, calls in hooked.items():
        owner = owner_of(model, name)
        if isinstance(owner, nn.MultiheadAttention) or name.endswith("out_proj"):
            continue  # hides its own steps
        assert len(calls) == len(seen[name])
        for (given, result), passage in zip(calls, seen[name], strict=True):
            if not isinstance(owner, nn.Embedding):
                np.testing.assert_allclose(passage.inputs, given.detach(), atol=1e-5)
                assert passage.inputs.shape[passage.axis] == given.shape[1 if given.ndim == 4 else -1]
            bias = bias_of(owner, passage)
            np.testing.assert_allclose(passage.outputs + bias, result.detach(), atol=1e-5)
            with torch.no_grad():
                changed = other.get_submodule(name)(given)
            np.testing.assert_allclose(passage.changed + bias, changed, atol=1e-5)


def bias_of(owner: nn.Module, passage: Passage) -> np.ndarray | float:
    """The bias of a linear layer that the graph adds behind its product."""
    if isinstance(owner, nn.Linear) and owner.bias is not None and passage.outputs.ndim == 3:
        return owner.bias.detach().numpy()
    return 0.0


def test_inputs_are_rounded_to_the_grid_and_only_where_asked(folder: Path) -> None:
    path = exported(Convolutions, folder, folded=False)
    runner, seen = made(path), {}
    grid = Grid(4, 0.5, 3)
    plain: dict[str, np.ndarray] = {}
    runner.run(batch(Convolutions), watch=lambda one: plain.setdefault(one.layer, one.inputs))
    outputs = runner.run(
        batch(Convolutions), grids={"stem": grid}, watch=lambda one: seen.setdefault(one.layer, one.inputs)
    )
    x = EXAMPLES[Convolutions]
    rounded = (np.clip(np.rint(x / 0.5) + 3, 0, 15) - 3) * 0.5
    np.testing.assert_allclose(seen["stem"], rounded, atol=1e-6)
    np.testing.assert_allclose(outputs[0], runner.run(Batch((rounded,), size=4))[0], atol=1e-5)
    assert np.unique(seen["head"]).size > 15
    again = runner.run(batch(Convolutions), grids={"stem": Grid(8, 1e-3, 128)})[0]
    assert not np.allclose(again, outputs[0], atol=1e-4)


def test_normalizations_are_placed_by_the_name_of_their_module(folder: Path) -> None:
    runner = made(exported(Convolutions, folder, dynamo=False, folded=False))
    values = [RANDOM.normal(size=8).astype("f4") for _ in range(3)]
    norm = Norm("norm", values[0], np.abs(values[1]) + 0.5, values[2], values[0] * 2, 1e-3)
    runner.place({}, {"norm": norm})
    model = module(Convolutions)
    model.norm.eps = 1e-3
    for tensor, value in zip(
        (model.norm.running_mean, model.norm.running_var, model.norm.weight, model.norm.bias),
        (norm.mean, norm.variance, norm.scale, norm.shift),
        strict=True,
    ):
        tensor.data.copy_(torch.from_numpy(value))
    with torch.no_grad():
        theirs = model(torch.from_numpy(EXAMPLES[Convolutions]))[0]
    np.testing.assert_allclose(runner.run(batch(Convolutions))[0], theirs, atol=1e-5)
    with pytest.raises(BadArgumentError, match="no BatchNormalization that can be replaced is called 'stem'"):
        runner.place({}, {"stem": norm})


@pytest.mark.parametrize("sizes", [1, 3])
def test_a_model_of_a_fixed_batch_size_takes_any_number_of_samples(sizes: int, folder: Path) -> None:
    fixed, free = made(exported(Convolutions, folder, sizes=sizes)), made(exported(Convolutions, folder))
    given = batch(Convolutions)
    np.testing.assert_allclose(fixed.run(given)[0], free.run(given)[0], atol=1e-5)
    seen: list[list[Passage]] = [[], []]
    for runner, found in zip((fixed, free), seen, strict=True):
        runner.run(given, watch=found.append)
    for one, other in zip(*seen, strict=True):
        np.testing.assert_allclose(one.inputs, other.inputs, atol=1e-5)
        np.testing.assert_allclose(one.outputs, other.outputs, atol=1e-5)
    ours, theirs = (named(one.differentiate(given, ones)) for one in (fixed, free))
    for name in ours:
        np.testing.assert_allclose(ours[name].weight, theirs[name].weight, atol=1e-4)


def test_integer_outputs_are_left_out_and_named(folder: Path) -> None:
    runner = made(exported(Convolutions, folder))
    assert [one.shape for one in runner.run(batch(Convolutions))] == [(4, 5)]
    assert any("is no real number and is left out" in note for note in runner.notes)


def test_a_model_that_ends_in_a_choice_is_cut_off_before_it() -> None:
    model = graph(node("MatMul", "x w", output="scores"), node("ArgMax", "scores", axis=1), w=np.eye(3, 4, dtype="f4"))
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
    model.graph.input[0].type.tensor_type.shape.dim.add()
    model.graph.input[0].type.tensor_type.shape.dim.add()
    runner = made(model)
    assert runner.run(Batch((np.ones((2, 3), "f4"),), size=2))[0].shape == (2, 4)
    assert "cut off before y" in runner.notes[0]
    assert "scores" in runner.notes[0]


# ---------------------------------------------------------------------------------------------------------------------
# Weights that are stored otherwise


def test_tied_weights_change_together_and_each_in_its_own_layout() -> None:
    w = RANDOM.normal(size=(5, 4)).astype("f4")
    model = graph(
        node("Gather", "w x", output="rows"),
        node("Transpose", "w", output="turned", perm=[1, 0]),
        node("MatMul", "rows turned"),
        w=w,
    )
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64
    runner = made(model)
    x = np.array([[0, 3], [4, 4]])
    other = (w * 2 + 1).astype("f4")
    np.testing.assert_allclose(
        runner.run(Batch((x,), size=2), weights={runner.layers[0]: other})[0], other[x] @ other.T, rtol=1e-5
    )
    seen: list[Passage] = []
    runner.run(Batch((x,), size=2), watch=seen.append, others={runner.layers[0]: other})
    assert len(seen) == 2
    np.testing.assert_allclose(seen[0].changed, other[x])
    np.testing.assert_allclose(seen[1].changed, w[x] @ other.T, rtol=1e-5)
    (found,) = runner.differentiate(Batch((x,), size=2), ones)
    leaf = torch.from_numpy(w).requires_grad_()
    (leaf[torch.from_numpy(x)] @ leaf.T).sum().backward()
    np.testing.assert_allclose(found.weight, leaf.grad, rtol=1e-4)


def test_the_gates_of_a_recurrent_layer_are_replaced_one_by_one() -> None:
    w, r = RANDOM.normal(size=(1, 12, 2)).astype("f4"), RANDOM.normal(size=(1, 12, 3)).astype("f4")
    model = graph(node("LSTM", "x w r", hidden_size=3), w=w, r=r)
    runner = made(model)
    x = RANDOM.normal(size=(4, 2, 2)).astype("f4")
    other = RANDOM.normal(size=(3, 2)).astype("f4")
    gate = next(name for name in runner.layers if name.endswith("W.f"))  # the third of iofc
    changed = w.copy()
    changed[0, 6:9] = other
    theirs = made(graph(node("LSTM", "x w r", hidden_size=3), w=changed, r=r)).run(Batch((x,), size=4))
    np.testing.assert_allclose(runner.run(Batch((x,), size=4), weights={gate: other})[0], theirs[0], atol=1e-6)
    assert "cannot be seen or rounded" in runner.notes[0]
    assert not runner.differentiable
    assert "LSTM" in " ".join(runner.notes)
    with pytest.raises(NotRunnableError, match=r"cannot be differentiated.*LSTM"):
        list(runner.differentiate(Batch((x,), size=4), ones))


def test_half_precision_weights_are_replaced_in_half_precision() -> None:
    w = RANDOM.normal(size=(3, 4)).astype("f2")
    model = graph(node("Cast", "w", output="wide", to=1), node("MatMul", "x wide"), w=w)
    runner = made(model)
    x, other = RANDOM.normal(size=(2, 3)).astype("f4"), RANDOM.normal(size=(4, 3)).astype("f4")
    found = runner.run(Batch((x,), size=2), weights={runner.layers[0]: other})[0]
    np.testing.assert_allclose(found, x @ other.T.astype("f2").astype("f4"), rtol=1e-5)


def test_layers_on_an_integer_grid_are_refused_by_name() -> None:
    q, w = RANDOM.integers(-100, 100, (3, 4)).astype("i1"), RANDOM.normal(size=(4, 2)).astype("f4")
    model = graph(
        node("DequantizeLinear", "q s", output="wide"), node("MatMul", "x wide", output="h"), node("MatMul", "h w"),
        q=q, s=np.float32(0.1), w=w,
    )  # fmt: skip
    runner = made(model)
    assert runner.layers == ("w",)
    assert runner.notes[0] == "q is quantized already; give the model before quantization"
    with pytest.raises(BadArgumentError, match="'q', which is quantized already"):
        runner.run(Batch((np.ones((1, 3), "f4"),)), weights={"q": q.T})


def test_weights_inside_functions_and_constants_are_replaced() -> None:
    w = RANDOM.normal(size=(3, 4)).astype("f4")
    constant = helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(w, "w"))
    own = helper.make_function(
        "own",
        "Dense",
        ["x", "k"],
        ["y"],
        [helper.make_node("MatMul", ["x", "k"], ["y"])],
        [helper.make_opsetid("", 21)],
    )
    model = graph(constant, node("Dense", "x w", domain="own"), functions=[own])
    runner = made(model)
    other = RANDOM.normal(size=(4, 3)).astype("f4")
    x = np.ones((2, 3), "f4")
    found = runner.run(Batch((x,), size=2), weights={runner.layers[0]: other})[0]
    np.testing.assert_allclose(found, x @ other.T, rtol=1e-5)


def test_external_data_is_read(tmp_path: Path) -> None:
    w = RANDOM.normal(size=(40, 40)).astype("f4")
    path = tmp_path / "model.onnx"
    onnx.save_model(graph(node("MatMul", "x w"), w=w), str(path), save_as_external_data=True, size_threshold=0)
    x = np.ones((1, 40), "f4")
    np.testing.assert_allclose(made(path).run(Batch((x,)))[0], x @ w, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# The model, the inputs and the loss


def test_a_model_in_memory_is_not_changed(folder: Path) -> None:
    model = onnx.load(str(exported(Convolutions, folder, folded=False)))
    before = model.SerializeToString(deterministic=True)
    state = torch.random.get_rng_state()
    runner = made(model)
    runner.run(batch(Convolutions), grids={"stem": Grid(8, 0.1, 0)}, watch=lambda _: None)
    list(runner.differentiate(batch(Convolutions), ones))
    adapter.graph(model, batch(Convolutions))
    assert model.SerializeToString(deterministic=True) == before
    assert torch.equal(torch.random.get_rng_state(), state)


def test_inputs_are_given_by_place_or_name_and_cast() -> None:
    model = graph(node("MatMul", "x w", output="h"), node("Add", "h z"), inputs=("x", "z"), w=np.eye(3, dtype="f4"))
    runner = made(model)
    x, z = np.ones((2, 3)), torch.full((2, 3), 2.0, dtype=torch.float64)
    np.testing.assert_allclose(runner.run(Batch((x, z), size=2))[0], np.full((2, 3), 3.0))
    np.testing.assert_allclose(runner.run(Batch((x,), {"z": z}, size=2))[0], np.full((2, 3), 3.0))
    with pytest.raises(BadArgumentError, match="z is missing; the model takes x, z"):
        runner.run(Batch((x,), size=2))
    with pytest.raises(BadArgumentError, match="one called 'q'"):
        runner.run(Batch((x,), {"q": z}, size=2))
    with pytest.raises(BadArgumentError, match="inputs: onnxruntime failed on x 2x4 float32"):
        runner.run(Batch((np.ones((2, 4)), z), size=2))


@pytest.mark.parametrize("name", ["cross_entropy", "mse"])
def test_named_losses_are_those_of_torch(name: str, folder: Path) -> None:
    path = exported(Convolutions, folder)
    labels = np.array([0, 4, 2, 2]) if name == "cross_entropy" else RANDOM.normal(size=(4, 5)).astype("f4")
    given = Batch((EXAMPLES[Convolutions],), labels=labels, size=4)
    scores = torch.from_numpy(made(path).run(given)[0])
    if name == "mse":
        theirs = ((scores - torch.from_numpy(labels)) ** 2).mean(1)
    else:
        theirs = torch.nn.functional.cross_entropy(scores, torch.from_numpy(labels), reduction="none")
    runner = made(path, name)
    (ours,) = runner.run(given)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    found = named(runner.differentiate(given, lambda losses: [np.ones_like(losses[0])]))["head"]
    matrix = np.zeros_like(found.weight)
    matrix[1, 2] = 1e-2
    own = next(one.weight for one in adapter.read(path).layers if one.name == "head")
    high, low = (runner.run(given, weights={"head": own + sign * matrix})[0].sum() for sign in (1, -1))
    assert float(found.weight[1, 2]) == pytest.approx(float(high - low) / 2e-2, rel=2e-2, abs=1e-3)


def test_a_loss_may_take_arrays_or_tensors_but_derivatives_need_tensors(folder: Path) -> None:
    path = exported(Convolutions, folder)
    given = Batch((EXAMPLES[Convolutions],), labels=np.zeros(4), size=4)
    plain = made(path).run(given)[0]
    arrays: Callable[..., Any] = lambda outputs, labels: np.asarray(outputs[0], np.float32).sum(1) - labels  # noqa: E731
    tensors: Callable[..., Any] = lambda outputs, labels: outputs[0].relu().sum(dim=1) - labels  # noqa: E731
    np.testing.assert_allclose(made(path, arrays).run(given)[0], plain.sum(1), rtol=1e-5)
    runner = made(path, tensors)
    np.testing.assert_allclose(runner.run(given)[0], np.maximum(plain, 0).sum(1), rtol=1e-5)
    assert named(runner.differentiate(given, ones))["head"].weight.any()
    with pytest.raises(NotRunnableError, match=r"loss: .*tensor.* of PyTorch"):
        list(made(path, arrays).differentiate(given, ones))
    with pytest.raises(BadArgumentError, match="loss: needs labels"):
        made(path, "mse").run(batch(Convolutions))
    with pytest.raises(BadArgumentError, match="expected one for each; pass reduction='none'"):
        made(path, lambda outputs, _: outputs[0].sum()).run(given)
    with pytest.raises(BadArgumentError, match="loss: got 'hinge'"):
        made(path, "hinge")


def test_what_torch_computes_otherwise_is_not_differentiated(monkeypatch: pytest.MonkeyPatch) -> None:
    from qvis.adapters.onnx.torch_ops import OPERATORS

    monkeypatch.setitem(OPERATORS[""], "Relu", lambda _, x: x * 2)
    runner = made(graph(node("MatMul", "x w", output="h"), node("Relu", "h"), w=np.eye(3, dtype="f4")))
    assert runner.differentiable
    runner.run(Batch((np.ones((2, 3)),), size=2))
    assert not runner.differentiable
    assert "differs from onnxruntime: 'y' by up to 1" in runner.notes[-1]


def test_a_model_that_onnxruntime_cannot_load_is_refused() -> None:
    model = graph(node("Odd", "x w", domain="own"), node("MatMul", "y w", output="z"), w=np.eye(3, dtype="f4"))
    with pytest.raises(NotRunnableError, match="onnxruntime cannot load it"):
        made(model)


def test_weights_of_another_shape_or_name_are_refused() -> None:
    runner = made(graph(node("MatMul", "x weight"), weight=np.eye(3, dtype="f4")))
    given = Batch((np.ones((1, 3)),))
    with pytest.raises(BadArgumentError, match=r"has the shape \(3, 3\) \(channels, elements\), got \(2, 3\)"):
        runner.run(given, weights={runner.layers[0]: np.ones((2, 3), "f4")})
    with pytest.raises(BadArgumentError, match="no layer that can be replaced is called 'wight'"):
        runner.run(given, weights={"wight": np.ones((3, 3), "f4")})


def test_files_without_code_or_derivatives_say_what_to_give() -> None:
    from qvis.adapters import checkpoint, tflite

    network = adapter.read(graph(node("MatMul", "x w"), w=np.eye(3, dtype="f4")))
    with pytest.raises(NotRunnableError, match=r"package\.module:factory, and this file with --weights"):
        checkpoint.runner(Path("a.safetensors"), network)
    with pytest.raises(NotRunnableError, match="the Keras model or the ONNX file"):
        tflite.runner(Path("a.tflite"), network)


def test_a_model_of_keras_keeps_its_layers_on_the_way_through_tf2onnx(tmp_path: Path) -> None:
    pytest.importorskip("tf2onnx")
    keras = pytest.importorskip("keras")
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((6, 6, 3)),
            keras.layers.Conv2D(4, 3, padding="same", strides=2, activation="relu"),
            keras.layers.DepthwiseConv2D(3),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(2, activation="softmax"),
        ]
    )
    path, x = tmp_path / "model.onnx", RANDOM.normal(size=(3, 6, 6, 3)).astype("f4")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        own = np.asarray(model(x))  # it wants to have run before
        model.export(path, format="onnx", verbose=False)
    runner = made(path)
    given = Batch((x,), size=3)
    np.testing.assert_allclose(runner.run(given)[0], own, atol=1e-5)
    factor = RANDOM.normal(size=own.shape).astype("f4")
    tf = pytest.importorskip("tensorflow")
    with tf.GradientTape() as tape:
        projected = tf.reduce_sum(model(x) * factor)
    kernels = [layer.kernel.value for layer in model.layers if layer.weights]
    exact = {
        tuple(kernel.shape): gradient.numpy()
        for kernel, gradient in zip(kernels, tape.gradient(projected, kernels), strict=True)
    }
    found = named(runner.differentiate(given, lambda _: [factor]))
    assert runner.differentiable, runner.notes
    assert len(found) == len(runner.layers) == len(exact) == 3
    dense = next(layer for layer in adapter.read(path).layers if layer.shape == (4, 2))
    np.testing.assert_allclose(found[dense.name].weight, exact[4, 2].T, rtol=1e-3, atol=1e-5)
    sizes = sorted(float(np.abs(found[name].weight).sum()) for name in found)
    np.testing.assert_allclose(sizes, sorted(float(np.abs(one).sum()) for one in exact.values()), rtol=1e-3)
    kernel, bias = model.layers[-1].get_weights()
    model.layers[-1].set_weights([kernel * 3, bias])
    changed = runner.run(given, weights={dense.name: dense.weight * 3})[0]
    np.testing.assert_allclose(changed, np.asarray(model(x)), atol=1e-5)
