"""PyTorch models on other weights, watched, rounded and differentiated: compared with what PyTorch does itself."""

from __future__ import annotations

import copy
import random
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize, prune

from qvis import adapters
from qvis.adapters.torch.running import TorchRunner
from qvis.errors import BadArgumentError, NotRunnableError
from qvis.layers import Norm
from qvis.running import Batch, Gradient, Grid, Passage


def made(model: nn.Module, loss: Any = None, only: Sequence[str] | None = None) -> TorchRunner:
    return adapters.runner(model, adapters.read(model, only), loss)  # type: ignore[return-value]


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def of(*inputs: Any, labels: Any = None, **named: Any) -> Batch:
    sized = [one for one in (*inputs, *named.values()) if getattr(one, "ndim", 0)]
    return Batch(inputs, named, labels, len(sized[0]))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


def ones(outputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [np.ones_like(one) for one in outputs]


def probe(outputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [noise(*one.shape, seed=i) for i, one in enumerate(outputs)]


def gradients(runner: TorchRunner, batch: Batch, probe: Any = probe) -> dict[str, Gradient]:
    return {one.layer: one for one in runner.differentiate(batch, probe)}


def flat(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [one for part in (result.values() if isinstance(result, dict) else result) for one in flat(part)]


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All of a model that could change, as objects and as numbers."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        state[f"{name}!"] = (type(module), module.training, list(module.__dict__), list(module._modules))
        state[f"{name}!hooks"] = [
            (key, dict(value)) for key, value in module.__dict__.items() if "hooks" in key and value
        ]
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        state[name] = (id(tensor), tensor.dtype, tensor.requires_grad, tensor.detach().clone(), tensor.grad)
    return state


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert list(before) == list(after)
    for name, old in before.items():
        if len(old) == 5 and isinstance(old[3], Tensor):
            assert old[:3] == after[name][:3], name
            torch.testing.assert_close(old[3], after[name][3], rtol=0, atol=0, equal_nan=True)
            assert old[4] is after[name][4]
        else:
            assert old == after[name], name


def globals_now() -> tuple[Any, ...]:
    numpy_state = np.random.get_state()
    return (
        torch.get_rng_state().tolist(),
        (numpy_state[0], numpy_state[1].tolist(), *numpy_state[2:]),
        random.getstate(),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
    )


def exercise(model: nn.Module, batch: Batch, loss: Any = None) -> tuple[TorchRunner, list[np.ndarray]]:
    """Do everything that a runner can do, and see that nothing of it is left behind."""
    before, settings = snapshot(model), globals_now()
    runner = made(model, loss)
    weights = {name: 0.5 * matrix for name, matrix in matrices(model, runner).items()}
    own = runner.run(batch)
    runner.run(
        batch, weights=weights, watch=lambda _: None, others=weights, grids=dict.fromkeys(weights, Grid(4, 1, 8))
    )
    if runner.differentiable:
        gradients(runner, batch)
    runner.place(weights, {})
    runner.run(batch)
    runner.place({}, {})
    again = runner.run(batch)
    for one, two in zip(own, again, strict=True):
        np.testing.assert_array_equal(one, two)
    assert_same(before, snapshot(model))
    assert settings == globals_now()
    return runner, own


def matrices(model: nn.Module, runner: TorchRunner) -> dict[str, np.ndarray]:
    return {one.name: one.weight for one in adapters.read(model).layers if one.name in runner.layers}


def by_hand(model: nn.Module, names: Sequence[str], batch: Batch) -> dict[str, Tensor]:
    """Gradients of parameters by plain autograd on a copy, in evaluation mode."""
    twin = copy.deepcopy(model).eval()
    inputs = [torch.as_tensor(one) for one in batch.args]
    outputs = flat(twin(*inputs, **{name: torch.as_tensor(one) for name, one in batch.kwargs.items()}))
    loss = sum((one * torch.from_numpy(noise(*one.shape, seed=i))).sum() for i, one in enumerate(outputs))
    parameters = dict(twin.named_parameters(remove_duplicate=False))
    found = torch.autograd.grad(loss, [parameters[name] for name in names])
    return dict(zip(names, found, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Values


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.matrix = nn.Parameter(torch.randn(5, 4))
        self.right = nn.Parameter(torch.randn(5, 6))
        self.summed = nn.Parameter(torch.randn(2, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(functional.conv2d(x, self.kernel, padding=1)).mean((2, 3))
        x = functional.linear(x, self.matrix) @ self.right
        return torch.einsum("bi,oi->bo", x, self.summed)


class Conv1D(nn.Module):
    """A linear layer with its weight the other way round, as in the transformers library."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)


Conv1D.__module__ = "transformers.pytorch_utils"


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, **options)

    def forward(self, query: Tensor, key: Tensor | None = None, value: Tensor | None = None) -> Tensor:
        key = query if key is None else key
        return self.attention(query, key, key if value is None else value)[0]


class Recurrent(nn.Module):
    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.cells = getattr(nn, kind)(4, 6, batch_first=True, **options)
        self.head = nn.Linear(6 * (1 + self.cells.bidirectional), 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x)[0])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 5)
        self.mix = nn.Linear(5, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.table(tokens))))


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Bilinear(3, 4, 2)
        self.bags = nn.EmbeddingBag(9, 4, mode="sum")

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        return self.both(x, self.bags(words))


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.twice = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        x = x + self.twice(self.act(self.twice(x)))
        x += 1
        return self.up(x)


class Hidden(nn.Module):
    """Holds a module in a list that it does not register."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.hidden = [nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 4))]

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden[0](self.stem(x))


IMAGES = noise(3, 3, 5, 5)
VALUES: dict[str, tuple[Callable[[], nn.Module], Batch, dict[str, str]]] = {
    "functional": (Functional, of(IMAGES), {name: name for name in ("kernel", "matrix", "right", "summed")}),
    "Conv1D": (lambda: nn.Sequential(Conv1D(6, 4), nn.ReLU()), of(noise(3, 4)), {"0": "0.weight"}),
    "attention": (Attention, of(noise(4, 3, 8)), {"attention.out_proj": "attention.out_proj.weight"}),
    "batch_first": (
        lambda: Attention(batch_first=True),
        of(noise(4, 3, 8)),
        {"attention.out_proj": "attention.out_proj.weight"},
    ),
    "kdim": (
        lambda: Attention(kdim=5, vdim=6),
        of(noise(4, 3, 8), noise(4, 3, 5), noise(4, 3, 6)),
        {f"attention.{one}_proj_weight": f"attention.{one}_proj_weight" for one in "qkv"},
    ),
    "RNN": (
        lambda: Recurrent("RNN"),
        of(noise(2, 3, 4)),
        {f"cells.weight_{x}h_l0": f"cells.weight_{x}h_l0" for x in "ih"},
    ),
    "tied": (Tied, of(np.array([[1, 2], [3, 1]])), {"table": "table.weight", "mix": "mix.weight"}),
    "bilinear": (Bilinear, of(noise(2, 3), np.array([[1, 2], [3, 1]])), {"both": "both.weight", "bags": "bags.weight"}),
    "reused": (Reused, of(noise(2, 2, 4, 4)), {"stem": "stem.weight", "twice": "twice.weight"}),
    "hidden": (Hidden, of(noise(3, 4)), {"stem": "stem.weight"}),
    "channels_last": (
        lambda: nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last),
        of(IMAGES),
        {"(root)": "weight"},
    ),
}


@pytest.mark.parametrize("name", VALUES)
def test_gradients_by_weights_are_those_of_autograd(name: str) -> None:
    make, batch, names = VALUES[name]
    model = seeded(make)
    if name == "hidden":
        model.hidden[0].eval()
    found = gradients(made(model), batch)
    for layer, parameter in names.items():
        expected = by_hand(model, [parameter], batch)[parameter]
        if "Conv1D" in type(model).__name__ or layer == "0":
            expected = expected.T
        if layer == "up":
            continue
        np.testing.assert_allclose(
            found[layer].weight, expected.reshape(found[layer].weight.shape), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("name", VALUES)
def test_weights_that_are_tried_or_placed_give_what_a_changed_copy_gives(name: str) -> None:
    make, batch, names = VALUES[name]
    model = seeded(make)
    runner, own = exercise(model, batch)
    weights = {
        layer: matrix + noise(*matrix.shape, seed=3)
        for layer, matrix in matrices(model, runner).items()
        if layer in names
    }
    twin = copy.deepcopy(model).eval()
    for module in getattr(twin, "hidden", ()):
        module.eval()
    parameters = dict(twin.named_parameters())
    with torch.no_grad():
        expected_own = flat(twin(*map(torch.as_tensor, batch.args)))
        for layer, parameter in names.items():
            matrix = weights[layer].T if layer == "0" else weights[layer]
            parameters[parameter].copy_(torch.from_numpy(matrix.reshape(parameters[parameter].shape)))
        expected = flat(twin(*map(torch.as_tensor, batch.args)))
    placed = made(model)
    placed.place(weights, {})
    for one, two, three, four, five in zip(
        own, expected_own, runner.run(batch, weights=weights), placed.run(batch), expected, strict=True
    ):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(three, five, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(four, five, rtol=1e-4, atol=1e-4)


def test_parts_of_an_attention_are_layers_of_their_own() -> None:
    for options, inputs in [({}, 1), ({"batch_first": True}, 1), ({}, 3)]:
        model = seeded(lambda options=options: Attention(**options))
        batch = of(*[noise(4, 3, 8, seed=i) for i in range(inputs)])
        found = gradients(made(model), batch)
        expected = by_hand(model, ["attention.in_proj_weight"], batch)["attention.in_proj_weight"].numpy()
        together = np.concatenate([found[f"attention.in_proj_weight.{one}"].weight for one in "qkv"])
        np.testing.assert_allclose(together, expected, rtol=1e-4, atol=1e-4)
        seen: list[Passage] = []
        other = noise(8, 8, seed=9)
        runner = made(model)
        runner.run(batch, watch=seen.append, others={"attention.in_proj_weight.k": other})
        changed = next(one for one in seen if one.layer == "attention.in_proj_weight.k")
        assert changed.changed is not None
        entered = batch.args[min(1, inputs - 1)]
        np.testing.assert_array_equal(changed.inputs, entered.swapaxes(0, 1) if options else entered)
        result = changed.changed[..., 8:16] if inputs == 1 else changed.changed
        np.testing.assert_allclose(result, changed.inputs @ other.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "gates"), [("LSTM", "ifgo"), ("GRU", "rzn")])
def test_gates_of_recurrent_cells_are_layers_of_their_own(kind: str, gates: str) -> None:
    model = seeded(lambda: Recurrent(kind, num_layers=2, bidirectional=True))
    batch = of(noise(2, 3, 4))
    runner, _ = exercise(model, batch)
    found = gradients(runner, batch)
    name = "cells.weight_hh_l1_reverse"
    expected = by_hand(model, [name], batch)[name].numpy()
    together = np.concatenate([found[f"{name}.{gate}"].weight for gate in gates])
    np.testing.assert_allclose(together, expected, rtol=1e-4, atol=1e-4)
    twin = copy.deepcopy(model).eval()
    with torch.no_grad():
        twin.cells.weight_hh_l1_reverse[:6] = 0
    weights = {f"{name}.{gates[0]}": np.zeros((6, 6), np.float32)}
    np.testing.assert_allclose(
        runner.run(batch, weights=weights)[0], twin(torch.from_numpy(batch.args[0])).detach(), rtol=1e-4, atol=1e-5
    )


def test_a_transposed_convolution_in_groups_is_differentiated_and_replaced() -> None:
    model = seeded(lambda: nn.ConvTranspose2d(4, 6, 3, groups=2))
    batch = of(noise(2, 4, 3, 3))
    runner = made(model)
    gradient = gradients(runner, batch)["(root)"].weight
    expected = by_hand(model, ["weight"], batch)["weight"]  # (4, 3, 3, 3): two groups of two inputs
    expected = expected.reshape(2, 2, 3, 9).permute(0, 2, 1, 3).reshape(6, 18)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)
    matrix = noise(6, 18, seed=4)
    twin = copy.deepcopy(model)
    twin.weight.data = torch.from_numpy(matrix).reshape(2, 3, 2, 9).permute(0, 2, 1, 3).reshape(4, 3, 3, 3)
    expected_run = twin(torch.from_numpy(batch.args[0])).detach()
    np.testing.assert_allclose(runner.run(batch, weights={"(root)": matrix})[0], expected_run, rtol=1e-4, atol=1e-4)


def test_what_passes_a_layer_is_what_forward_hooks_see() -> None:
    model = seeded(Reused)
    batch = of(noise(2, 2, 4, 4))
    seen: list[Passage] = []
    made(model).run(
        batch, watch=lambda p: seen.append(copy.deepcopy(p)), others={"twice": np.zeros((4, 18), np.float32)}
    )
    expected: list[tuple[str, Tensor, Tensor]] = []
    twin = copy.deepcopy(model)
    for name in ("stem", "twice", "up"):
        getattr(twin, name).register_forward_hook(
            lambda _, args, out, name=name: expected.append((name, args[0].clone(), out.clone()))
        )
    twin(torch.from_numpy(batch.args[0]))
    assert [one.layer for one in seen] == [name for name, _, _ in expected]
    for one, (_, entered, left) in zip(seen, expected, strict=True):
        np.testing.assert_allclose(one.inputs, entered.detach(), atol=1e-5)
        np.testing.assert_allclose(one.outputs, left.detach(), atol=1e-5)
        assert one.axis % one.inputs.ndim == 1
        assert (one.changed is not None) == (one.layer == "twice")
        if one.changed is not None:
            np.testing.assert_allclose(
                one.changed, np.broadcast_to(model.twice.bias.detach()[:, None, None], (2, 4, 4, 4))
            )


def test_the_axis_is_the_one_that_is_summed_over() -> None:
    class Axes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left = nn.Parameter(torch.randn(5, 4))
            self.channels = nn.Parameter(torch.randn(3, 6))
            self.last = nn.Linear(7, 2)

        def forward(self, x: Tensor) -> Any:  # (batch, 3, 4, 7)
            return self.left @ x, torch.einsum("bchw,co->bohw", x, self.channels), self.last(x)

    seen: dict[str, Passage] = {}
    made(seeded(Axes)).run(of(noise(2, 3, 4, 7)), watch=lambda p: seen.update({p.layer: p}))
    assert {name: one.axis % one.inputs.ndim for name, one in seen.items()} == {"left": 2, "channels": 1, "last": 3}


def test_inputs_are_rounded_as_by_a_naive_fake_quantization() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
    batch = of(noise(5, 4))
    grid = Grid(3, 0.4, 2)

    def rounded(x: Tensor) -> Tensor:
        points = torch.tensor([grid.step * (q - grid.zero) for q in range(8)])
        return points[(x[..., None] - points).abs().argmin(-1)]

    hidden = torch.relu(model[0](rounded(torch.from_numpy(batch.args[0]))))
    (result,) = made(model).run(batch, grids={"0": grid})
    np.testing.assert_allclose(result, model[2](hidden).detach(), atol=1e-5)
    (result,) = made(model).run(batch, grids={"2": grid})
    np.testing.assert_allclose(
        result, model[2](rounded(torch.relu(model[0](torch.from_numpy(batch.args[0]))))).detach(), atol=1e-5
    )


def test_gradients_by_inputs_are_of_one_use_alone() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.stem(x))
            return x + self.left(x) * 2 + self.right(x)

    model = seeded(Fork)
    found = gradients(made(model), of(noise(3, 4)), ones)
    ((values, left),), ((_, right),) = found["left"].inputs, found["right"].inputs
    np.testing.assert_allclose(left, np.broadcast_to(2 * model.left.weight.sum(0).detach(), (3, 4)), rtol=1e-5)
    np.testing.assert_allclose(right, np.broadcast_to(model.right.weight.sum(0).detach(), (3, 4)), rtol=1e-5)
    np.testing.assert_allclose(values, torch.tanh(model.stem(torch.from_numpy(noise(3, 4)))).detach(), rtol=1e-5)


NORMS = [
    (lambda: nn.BatchNorm1d(4), (3, 4)),
    (lambda: nn.BatchNorm1d(4, affine=False), (3, 4)),
    (lambda: nn.BatchNorm2d(4), (3, 4, 2, 2)),
    (lambda: nn.BatchNorm3d(4, affine=False), (3, 4, 2, 2, 2)),
    (lambda: nn.SyncBatchNorm(4), (3, 4, 2, 2)),
]


@pytest.mark.parametrize("case", range(len(NORMS)))
def test_normalizations_that_are_placed_compute_their_formula(case: int) -> None:
    make, shape = NORMS[case]
    model = nn.Sequential(make(), nn.Flatten(), nn.Linear(int(np.prod(shape[1:])), 2)).train()
    mean, scale, shift = noise(4, seed=1), np.exp(noise(4, seed=2)), noise(4, seed=3)
    variance = np.exp(noise(4, seed=4)) + 0.1
    norm = Norm("0", mean, variance, scale, shift, 1e-5)
    runner, batch = made(model), of(noise(*shape))
    before = snapshot(model)
    runner.place({}, {"0": norm})
    (result,) = runner.run(batch)
    sides = (4,) + (1,) * (len(shape) - 2)
    m, v, s, b = (one.reshape(sides) for one in (mean, variance, scale, shift))
    expected = (batch.args[0] - m) / np.sqrt(v + 1e-5) * s + b
    with torch.no_grad():
        np.testing.assert_allclose(result, model[2](torch.from_numpy(expected).flatten(1)), rtol=1e-3, atol=1e-4)
    assert_same(before, snapshot(model))


# ---------------------------------------------------------------------------------------------------------------------
# Outputs


@dataclass
class Found:
    scores: Tensor
    nothing: None = None


class ModelOutput(OrderedDict):  # type: ignore[type-arg]
    """As in the transformers library."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class Returns(nn.Module):
    def __init__(self, what: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.what = what

    def forward(self, x: Tensor) -> Any:
        return self.what(self.layer(x))


@pytest.mark.parametrize(
    ("what", "count"),
    [
        (lambda y: y, 1),
        (lambda y: (y, [2 * y, {"a": -y}]), 3),
        (lambda y: {"a": y, "b": {"c": y + 1}, "n": None}, 2),
        (lambda y: Found(y), 1),
        (lambda y: ModelOutput(logits=y, loss=None, hidden=(y, y * 2)), 2),
        (lambda y: (y, y.argmax(1)), 1),
    ],
)
def test_outputs_are_found_in_any_structure(what: Any, count: int) -> None:
    model = seeded(lambda: Returns(what))
    runner, outputs = exercise(model, of(noise(3, 4)))
    assert len(outputs) == count
    np.testing.assert_allclose(outputs[0], model.layer(torch.from_numpy(noise(3, 4))).detach(), rtol=1e-5)
    assert gradients(runner, of(noise(3, 4)))["layer"].weight.any()


@pytest.mark.parametrize(
    ("what", "name"),
    [
        (lambda y: y.argmax(1), "argmax"),
        (lambda y: y.detach() * 2, "detach"),
        (lambda y: (y > 0).int(), "gt"),
        (lambda y: (y.softmax(1), y.argmax(1))[1], "argmax"),
        (lambda y: (y.argmax(1), y.softmax(1))[0], "argmax"),
    ],
)
def test_a_tail_without_derivative_is_cut_off_and_named(what: Any, name: str) -> None:
    runner, outputs = exercise(seeded(lambda: Returns(what)), of(noise(3, 4)))
    assert [name in note and "cut off" in note for note in runner.notes] == [True]
    assert outputs[0].shape == (3, 3)
    assert gradients(runner, of(noise(3, 4)))["layer"].weight.any()


@pytest.mark.parametrize(
    ("what", "name"),
    [
        (lambda y: y[y > 0.1], "a selection by a mask"),
        (lambda y: [one[one > 0.1] for one in y], "a selection by a mask"),
        (lambda y: y.flatten()[(y.flatten() > 0.1).nonzero()[:, 0]], "nonzero"),
        (lambda y: torch.masked_select(y, y > 0), "masked_select"),
        (lambda y: y[torch.where(y > 0)], "where"),
        (lambda y: {"boxes": y[y[:, 0] > 0], "scores": y.sigmoid()[y[:, 0] > 0]}, "a selection by a mask"),
    ],
)
def test_a_selection_by_number_is_cut_off_and_named(what: Any, name: str) -> None:
    batch = of(noise(3, 4))
    runner, outputs = exercise(seeded(lambda: Returns(what)), batch)
    assert [f"cut off before {name}" in note for note in runner.notes] == [True]
    moved = runner.run(batch, weights={"layer": noise(3, 4, seed=5)})
    assert [one.shape for one in outputs] == [one.shape for one in moved]
    assert sum(one.size for one in outputs) in (9, 18)
    assert gradients(runner, batch)["layer"].weight.any()


def test_a_selection_that_further_layers_follow_is_no_end() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router, self.first, self.second = nn.Linear(4, 2), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            chosen, out = self.router(x).argmax(1), torch.zeros_like(x)
            for index, expert in enumerate((self.first, self.second)):
                out[chosen == index] = expert(x[chosen == index])
            return out

    model = seeded(Experts)
    runner, (output,) = exercise(model, of(noise(6, 4)))
    np.testing.assert_allclose(output, model(torch.from_numpy(noise(6, 4))).detach(), rtol=1e-5, atol=1e-6)
    assert not any("cut off" in note for note in runner.notes)
    assert gradients(runner, of(noise(6, 4)))["first"].weight.any()


def test_a_mask_that_is_given_selects_without_a_cut() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)
            self.register_buffer("mask", torch.tensor([True, False, True]))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)[:, self.mask]

    runner, (output,) = exercise(seeded(Masked), of(noise(5, 4)))
    assert output.shape == (5, 2)
    assert not runner.notes


def test_a_model_that_returns_no_tensor_is_refused_in_one_line() -> None:
    with pytest.raises(NotRunnableError, match="it returns an object of type lock"):
        made(Returns(lambda _: threading.Lock())).run(of(noise(2, 4)))
    with pytest.raises(NotRunnableError, match="it returns nothing"):
        made(Returns(lambda _: None)).run(of(noise(2, 4)))


def test_a_layer_without_part_in_the_outputs_is_named() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model.forward = lambda x: model["a"](x)  # type: ignore[method-assign]
    runner = made(model)
    runner.run(of(noise(2, 2)))
    assert runner.notes == ["'b': takes no part in the outputs"]
    assert not gradients(runner, of(noise(2, 2)))["b"].weight.any()


# ---------------------------------------------------------------------------------------------------------------------
# What models do


class Writes(nn.Module):
    """Writes to all that it holds, while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.tensor(3.0))
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("cache", torch.zeros(4))
        self.plain = torch.zeros(4)
        self.count = 0
        self.history: list[Any] = []
        self.nested = {"a": [1, 2]}
        self.lock = threading.Lock()
        self.generator = (i for i in range(3))
        self.module = torch

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        self.cache[:] = self.cache + x.mean().detach()
        self.plain.add_(1)
        self.count += 1
        self.history.append(x)
        self.nested["a"].append(3)
        self.last = x
        self.scale.data.clamp_(max=2)
        self.scale.data = self.scale.data * 0.5
        with torch.no_grad():
            self.layer.weight.mul_(0.5)
        torch.rand(1), np.random.rand(), random.random()
        torch.set_default_dtype(torch.float32)
        return self.layer(x) * self.scale + self.cache + self.plain + self.steps + self.count


def test_what_a_model_writes_while_it_runs_is_undone() -> None:
    model = seeded(Writes)
    exercise(model, of(noise(3, 4)))
    assert (model.count, model.history, model.nested) == (0, [], {"a": [1, 2]})
    assert not model.plain.any()
    runner = made(model)
    expected = copy.copy(model.layer.weight.detach().clone())
    (output,) = runner.run(of(noise(3, 4)))
    with torch.no_grad():
        mean = noise(3, 4).mean()
        inside = functional.linear(torch.from_numpy(noise(3, 4)), expected * 0.5, model.layer.bias) + mean + 3
    np.testing.assert_allclose(output, inside, rtol=1e-5)


class Raises(Writes):
    def forward(self, x: Tensor) -> Tensor:
        super().forward(x)
        raise ValueError("no\nsecond line")


def test_a_model_that_raises_is_left_as_it_was() -> None:
    model = seeded(Raises)
    before, settings = snapshot(model), globals_now()
    with pytest.raises(
        BadArgumentError, match=r"^inputs: the model failed on them at .* with ValueError: no; they were 3x4 float32$"
    ):
        made(model).run(of(noise(3, 4)))
    assert_same(before, snapshot(model))
    assert settings == globals_now()
    assert (model.count, model.history) == (0, [])


class Flags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 4))
        self.body[1].eval()
        self.body[0].weight.requires_grad_(False)
        self.body[3].register_forward_hook(lambda _m, _a, out: out * 2)
        self.body[3].register_full_backward_hook(lambda *_: pytest.fail("a backward hook ran"))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.rand(()) < 0.5:  # stochastic depth
            return x
        return x + functional.dropout(self.body(x), 0.5, training=self.training)


def test_it_runs_in_evaluation_mode_and_flags_stay() -> None:
    model = seeded(Flags).train()
    model.body[1].eval()
    runner, (output,) = exercise(model, of(noise(3, 4)))
    twin = copy.deepcopy(model).eval()
    twin.body[3]._backward_hooks.clear()
    np.testing.assert_allclose(output, twin(torch.from_numpy(noise(3, 4))).detach(), rtol=1e-5, atol=1e-6)
    assert gradients(runner, of(noise(3, 4)))["body.0"].weight.any()


def test_a_model_that_draws_random_numbers_draws_the_same_each_time() -> None:
    runner, _ = exercise(Returns(lambda y: functional.dropout(y) + torch.randn(3)), of(noise(3, 4)))
    torch.manual_seed(5)
    first = runner.run(of(noise(3, 4)))
    torch.rand(1)
    np.testing.assert_array_equal(first, runner.run(of(noise(3, 4))))


class NoGrad(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Inference(NoGrad):
    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_a_model_under_no_grad_is_differentiated() -> None:
    runner, _ = exercise(seeded(NoGrad), of(noise(2, 4)))
    np.testing.assert_allclose(
        gradients(runner, of(noise(2, 4)), ones)["layer"].weight, [noise(2, 4).sum(0)] * 3, rtol=1e-5
    )


def test_a_model_under_inference_mode_runs_but_is_not_differentiated() -> None:
    runner, outputs = exercise(seeded(Inference), of(noise(2, 4)))
    assert len(outputs) == 1
    assert not runner.differentiable
    with pytest.raises(NotRunnableError, match=r"torch.inference_mode, where nothing can be differentiated; use"):
        gradients(runner, of(noise(2, 4)))


def test_a_detached_middle_leaves_no_derivative_before_it() -> None:
    class Stopped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).detach())

    found = gradients(made(seeded(Stopped)), of(noise(2, 4)))
    assert not found["first"].weight.any()
    assert found["second"].weight.any()


@pytest.mark.parametrize("kind", ["saved", "view"])
def test_operations_in_place_that_autograd_refuses(kind: str) -> None:
    def saved(y: Tensor) -> Tensor:
        z = torch.sigmoid(y)
        z += 1
        return z

    def view(y: Tensor) -> Tensor:
        first, *_ = y.unbind(1)
        first += 1
        return y

    model = seeded(lambda: Returns({"saved": saved, "view": view}[kind]))
    runner, outputs = exercise(model, of(noise(2, 4)))
    with torch.no_grad():
        np.testing.assert_allclose(outputs[0], model(torch.from_numpy(noise(2, 4))), rtol=1e-5)
    if kind == "saved":
        out = torch.sigmoid(model.layer(torch.from_numpy(noise(2, 4))))
        expected = torch.autograd.grad(out.sum(), model.layer.weight)[0]
        np.testing.assert_allclose(gradients(runner, of(noise(2, 4)), ones)["layer"].weight, expected, rtol=1e-4)
    else:
        assert "unbind" in runner.notes[-1].lower()
        with pytest.raises(NotRunnableError, match="cannot be differentiated"):
            gradients(runner, of(noise(2, 4)))


def test_inputs_are_never_written_to() -> None:
    class Shifts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.sub_(0.5))

    for inputs in (noise(3, 4), torch.from_numpy(noise(3, 4))):
        exercise(Shifts(), of(inputs))
        np.testing.assert_array_equal(np.asarray(inputs), noise(3, 4))


def doubled(weight: Tensor) -> Tensor:
    return weight


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(layer)


COMPUTED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": parametrizations.weight_norm,
    "old weight_norm": old_weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "old spectral_norm": lambda layer: nn.utils.spectral_norm(layer),
    "prune": lambda layer: prune.random_unstructured(layer, "weight", 0.5),
    "custom": lambda layer: parametrize.register_parametrization(layer, "weight", Double()),
    "two": lambda layer: parametrizations.weight_norm(parametrize.register_parametrization(layer, "bias", Double())),
}


@pytest.mark.parametrize("kind", COMPUTED)
def test_weights_that_the_model_computes_are_replaced(kind: str) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), COMPUTED[kind](nn.Linear(4, 3)))).train()
    batch = of(noise(3, 4))
    bias = model[2].bias.detach().clone()
    for context in (nn.Identity, parametrize.cached):
        if context is parametrize.cached:
            with parametrize.cached():
                runner, (own,) = exercise(model, batch)
        else:
            runner, (own,) = exercise(model, batch)
        weight = torch.from_numpy(matrices(model, runner)["2"].copy())
        hidden = torch.relu(model[0](torch.from_numpy(batch.args[0]))).detach()
        np.testing.assert_allclose(own, hidden @ weight.T + bias, rtol=1e-4, atol=1e-5)
        other = noise(3, 4, seed=7)
        result = runner.run(batch, weights={"2": other})[0]
        np.testing.assert_allclose(result, hidden @ torch.from_numpy(other).T + bias, rtol=1e-4, atol=1e-5)
        expected = torch.from_numpy(probe([own])[0]).T @ hidden
        np.testing.assert_allclose(gradients(runner, batch)["2"].weight, expected, rtol=1e-4, atol=1e-4)


class Casts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.cells = nn.LSTM(4, 4, batch_first=True)
        self.constant = torch.ones(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        kind = self.head.weight.dtype
        x = self.body(x.to(kind)).mean((2, 3)).to(torch.bfloat16)
        x = self.cells(x.to(kind)[:, None])[0][:, 0] * self.constant.half()
        return self.head((x.half() + torch.zeros(4, dtype=torch.float16)).to(kind)).float()


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_models_in_half_precision_run_in_float32(kind: torch.dtype) -> None:
    model = seeded(Casts).to(kind)
    batch = of(noise(2, 3, 5, 5))
    runner, (output,) = exercise(model, batch)
    twin = copy.deepcopy(model).float().eval()
    x = twin.body(torch.from_numpy(batch.args[0])).mean((2, 3))
    expected = twin.head(twin.cells(x[:, None])[0][:, 0])
    np.testing.assert_allclose(output, expected.detach(), rtol=1e-4, atol=1e-6)
    assert gradients(runner, batch)["head"].weight.any()


def test_models_in_double_precision_run_in_it() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh())).double()
    _, (output,) = exercise(model, of(noise(2, 4)))
    assert output.dtype == np.float64
    np.testing.assert_allclose(output, model(torch.from_numpy(noise(2, 4)).double()).detach(), rtol=1e-12)


def test_compiled_and_wrapped_models_run_by_their_python_code() -> None:
    plain = seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))
    batch = of(noise(2, 4))
    expected = plain(torch.from_numpy(batch.args[0])).detach()
    nested = nn.Sequential(torch.compile(plain[0]), plain[1], plain[2])
    in_place = copy.deepcopy(plain)
    in_place.compile()
    for model in (torch.compile(plain), nested, in_place, nn.DataParallel(plain)):
        runner, (output,) = exercise(model, batch)
        np.testing.assert_allclose(output, expected, rtol=1e-5)
        assert len(runner.layers) == 2
        assert all(one.weight.any() for one in gradients(runner, batch).values())


def test_scripted_modules_are_refused_by_name() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Linear(4, 2))
    for model in (scripted, nn.Sequential(scripted)):
        with pytest.raises(NotRunnableError, match="'Linear' is scripted, and cannot be run on other weights; give"):
            made(model)


def test_meta_and_lazy_weights_are_refused_in_one_line() -> None:
    with pytest.raises(TypeError, match="meta device"):
        made(nn.Linear(2, 2, device="meta"))
    with pytest.raises(TypeError, match="not initialized"):
        made(nn.LazyLinear(2))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8, max_norm=1.0)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(
        self,
        *args: Any,
        attention_mask: Any = None,
        mode: str = "cls",
        extra: Any = None,
        flag: bool = True,
        scale: Any = 1.0,
        **rest: Any,
    ) -> dict[str, Tensor]:
        assert (mode, extra, flag, rest) == ("mean", None, False, {"more": (None, "x")})
        x = self.layer(self.table(args[0]), src_key_padding_mask=attention_mask == 0)
        assert torch.as_tensor(scale).ndim == 0
        return {"logits": self.head(x.mean(1)) * scale}


@pytest.mark.parametrize("scale", [2.0, np.array(2.0), np.float32(2), torch.tensor(2.0)])
def test_inputs_of_all_kinds_reach_the_model(scale: Any) -> None:
    model = seeded(Encoder)
    tokens = np.random.default_rng(0).integers(0, 11, (3, 5))
    mask = np.ones((3, 5), np.int64)
    mask[1, 3:] = 0
    rest: dict[str, Any] = {"mode": "mean", "extra": None, "flag": False, "more": (None, "x")}
    batch = Batch((tokens,), {"attention_mask": mask, "scale": scale, **rest}, None, 3)
    runner, (output,) = exercise(model, batch)
    twin = copy.deepcopy(model).eval()
    with torch.no_grad():
        expected = twin(torch.from_numpy(tokens), attention_mask=torch.from_numpy(mask), scale=2.0, **rest)["logits"]
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-5)
    assert all(one.weight.any() for one in gradients(runner, batch).values())


def test_images_of_bytes_are_answered_with_how_to_scale_them() -> None:
    with pytest.raises(BadArgumentError, match=r"uint8; images of type uint8 have to be turned into float32 and sc"):
        made(nn.Conv2d(3, 2, 3)).run(of(np.zeros((1, 3, 5, 5), np.uint8)))


def test_a_model_for_one_sample_is_run_one_by_one() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.view(1, 4))

    model = seeded(Single)
    runner, (output,) = exercise(model, of(noise(3, 4)))
    np.testing.assert_allclose(output, model.layer(torch.from_numpy(noise(3, 4))).detach(), rtol=1e-5)
    expected = by_hand(model.layer, ["weight"], of(noise(3, 4)))["weight"]
    np.testing.assert_allclose(gradients(runner, of(noise(3, 4)))["layer"].weight, expected, rtol=1e-4)
    assert runner.notes == ["samples are run one by one, since the model takes no more"]


def test_several_weights_in_one_piece_of_memory_are_kept_apart() -> None:
    memory = torch.randn(4 * 4 + 4 + 3 * 4)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3, bias=False))
    model[0].weight = nn.Parameter(memory[:16].view(4, 4))
    model[0].bias = nn.Parameter(memory[16:20])
    model[1].weight = nn.Parameter(memory[20:].view(3, 4))
    seen: list[Passage] = []
    runner, _ = exercise(model, of(noise(2, 4)))
    runner.run(of(noise(2, 4)), watch=seen.append, others={"1": noise(3, 4, seed=2)})
    assert [one.layer for one in seen] == ["0", "1"]
    np.testing.assert_allclose(seen[1].changed, seen[1].inputs @ noise(3, 4, seed=2).T, rtol=1e-4, atol=1e-5)


def test_only_selected_layers_are_exchanged() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    runner = made(model, only=["1"])
    assert runner.layers == ("1",)
    assert list(gradients(runner, of(noise(2, 4)))) == ["1"]


# ---------------------------------------------------------------------------------------------------------------------
# Losses


LABELS = np.array([0, 2, 1])


def test_named_losses_are_those_of_torch() -> None:
    model = seeded(lambda: nn.Linear(4, 3))
    scores = model(torch.from_numpy(noise(3, 4)))
    for labels in (LABELS, LABELS.astype(np.int32), torch.from_numpy(LABELS)):
        (losses,) = exercise(model, of(noise(3, 4), labels=labels), "cross_entropy")[1]
        expected = functional.cross_entropy(scores, torch.from_numpy(LABELS), reduction="none")
        np.testing.assert_allclose(losses, expected.detach(), rtol=1e-5)
    target = noise(3, 3, seed=1).astype(np.float64)
    (losses,) = exercise(model, of(noise(3, 4), labels=target), "mse")[1]
    np.testing.assert_allclose(losses, ((scores.detach().numpy() - target) ** 2).mean(1), rtol=1e-5)


def test_losses_of_tokens_and_pixels_are_averaged_in_each_sample() -> None:
    model = seeded(lambda: Returns(lambda y: {"logits": y}))
    tokens = np.array([[0, 1], [2, -100], [1, 1]])
    (losses,) = exercise(model, of(noise(3, 2, 4), labels=tokens), "cross_entropy")[1]
    scores = model.layer(torch.from_numpy(noise(3, 2, 4))).movedim(-1, 1)
    expected = functional.cross_entropy(scores, torch.from_numpy(tokens), reduction="none").mean(1)
    np.testing.assert_allclose(losses, expected.detach(), rtol=1e-5)


@pytest.mark.parametrize("size", [1, 3])
def test_a_loss_that_is_one_number_is_taken_of_each_sample(size: int) -> None:
    model = seeded(lambda: nn.Linear(4, 3))
    runner = made(model, nn.CrossEntropyLoss())
    runner.run(of(noise(3, 4)[:size], labels=LABELS[:size]))
    batch = of(noise(3, 4), labels=LABELS)
    scores = model(torch.from_numpy(noise(3, 4)))
    expected = functional.cross_entropy(scores, torch.from_numpy(LABELS), reduction="none")
    np.testing.assert_allclose(runner.run(batch)[0], expected.detach(), rtol=1e-5)
    weight = gradients(runner, batch, ones)["(root)"].weight
    np.testing.assert_allclose(weight, torch.autograd.grad(expected.sum(), model.weight)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("loss", "labels", "text"),
    [
        ("cross_entropy", [0, 3, 1], r"^labels: they go from 0 to 3, and the model has 3 classes, 0 to 2; give"),
        ("cross_entropy", [0, 1], r"^labels: their shape is \(2,\), and the model returns scores \(3, 3\)"),
        ("mse", [0.0, 1.0, 2.0], r"^labels: their shape is \(3,\), and the model returns \(3, 3\)"),
        ("cross_entropy", None, r"^loss: needs labels"),
        (lambda *_: 1.0, [0, 1, 2], r"^loss: it returned an object of type float"),
        (lambda *_: torch.ones(2), [0, 1, 2], r"^loss: it returned a tensor of shape \(2,\) for 3 samples"),
        (lambda a, b: a[b + 9], [0, 1, 2], r"^loss: it failed with IndexError: .*; the labels were 3 int64$"),
    ],
)
def test_labels_that_do_not_fit_give_one_clear_line(loss: Any, labels: Any, text: str) -> None:
    given = None if labels is None else np.array(labels)
    with pytest.raises(BadArgumentError, match=text) as raised:
        made(nn.Linear(4, 3), loss).run(of(noise(3, 4), labels=given))
    assert "\n" not in str(raised.value)


def test_an_unknown_loss_is_refused() -> None:
    with pytest.raises(
        BadArgumentError, match="loss: got 'hinge', expected one of 'cross_entropy', 'mse', or a function"
    ):
        made(nn.Linear(4, 3), "hinge")


# ---------------------------------------------------------------------------------------------------------------------
# Devices


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("make", [Reused, lambda: Recurrent("LSTM", num_layers=2)])
def test_models_on_a_gpu_stay_there(make: Callable[[], nn.Module]) -> None:
    model = seeded(make)
    batch = of(noise(2, 2, 4, 4)) if make is Reused else of(noise(2, 3, 4))
    expected = {name: one.weight for name, one in gradients(made(model), batch).items()}
    model.cuda()
    state = torch.cuda.get_rng_state()
    runner, _ = exercise(model, batch)
    for name, one in gradients(runner, batch).items():
        np.testing.assert_allclose(one.weight, expected[name], rtol=1e-2, atol=1e-2)
    assert torch.equal(state, torch.cuda.get_rng_state())


def test_what_changes_in_steps_only_is_cut_off_where_nothing_else_is_left() -> None:
    class Steps(nn.Module):
        """Steps that end the model, behind others that do not."""

        def __init__(self, ends: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)
            self.ends = ends

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            x = x + (x.round() - x).detach()
            y: Tensor = self.second(x)
            return y.floor().mul(2) if self.ends else y

    batch = Batch((np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32),))
    for ends, notes in ((True, ["floor"]), (False, [])):
        model = Steps(ends)
        runner = adapters.runner(model, adapters.read(model))
        [output] = runner.run(batch)
        exact = Steps(False)(torch.from_numpy(batch.args[0])).detach().numpy()
        np.testing.assert_allclose(output, exact, rtol=1e-5)
        assert [f"cut off before {name}" in note for name, note in zip(notes, runner.notes, strict=True)] == [
            True
        ] * len(notes)
        gradients = runner.differentiate(batch, lambda outputs: [np.ones_like(one) for one in outputs])
        assert all(np.abs(one.weight).max() > 0 for one in gradients)
