"""Which normalizations are folded, into what, and that the model stays the same function."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.utils import _pytree as pytree

from qvis.adapters import torch as adapter
from qvis.folding import Fold, Folded, find_folds, fold_network, input_channels, verify
from qvis.layers import FloatArray, Graph, Layer, Network, Node, Norm
from qvis.running import Batch
from tests.convnets import IMAGE_MODELS, image_model, images, settled


def network_of(model: nn.Module, *inputs: Tensor, **kwargs: Tensor) -> Network:
    example = Batch(inputs, kwargs) if inputs or kwargs else None
    return replace(adapter.read(model), graph=adapter.graph(model, example))


def tensor_of(layer: Layer, module: nn.Module) -> Tensor:
    """The framework's tensor for the matrix of a layer."""
    matrix = torch.from_numpy(np.array(layer.weight))
    if not layer.op.startswith("ConvTranspose"):
        return matrix.reshape(layer.shape)
    inputs, outputs, *kernel = layer.shape
    groups = int(module.groups)  # type: ignore[arg-type]
    return matrix.reshape(groups, outputs, inputs // groups, *kernel).transpose(1, 2).reshape(layer.shape)


def replaced(model: nn.Module, folded: Folded) -> dict[str, Tensor]:
    """The parameters and buffers of the model with folded weights."""
    tensors = {}
    for layer in folded.network.layers:
        if layer.stored is not None:
            name = "" if layer.name == "(root)" else layer.name
            tensors[f"{name}.weight"] = tensor_of(layer, model.get_submodule(name))
    for name, norm in folded.norms.items():
        module = model.get_submodule(name)
        numbers = {"running_mean": norm.mean, "running_var": norm.variance, "weight": norm.scale, "bias": norm.shift}
        for what, numbers_of in numbers.items():
            own = getattr(module, what)
            if own is None:
                assert np.all(numbers_of == (1 if what == "weight" else 0))
            else:
                tensors[f"{name}.{what}"] = torch.from_numpy(np.array(numbers_of)).to(own.dtype)
    return tensors


def difference(model: nn.Module, folded: Folded, *inputs: Tensor) -> float:
    with torch.no_grad():
        own = pytree.tree_leaves(model(*inputs))
        other = pytree.tree_leaves(functional_call(model, replaced(model, folded), inputs))
    worst = max(float((one - two).abs().max()) for one, two in zip(own, other, strict=True))
    return worst / max(float(one.abs().max()) for one in own)


class FunctionalRunner:
    """A runner for the test of ``verify``, by functional_call."""

    def __init__(self, model: nn.Module, folded: Folded) -> None:
        self.model, self.folded = model, folded
        self.tensors: dict[str, Tensor] = {}

    def place(self, weights: Mapping[str, FloatArray], norms: Mapping[str, Norm]) -> None:
        assert set(weights) == {fold.layer for fold in self.folded.folds}
        self.tensors = replaced(self.model, replace(self.folded, norms=norms))

    def run(self, batch: Batch) -> list[FloatArray]:
        with torch.no_grad():
            result = functional_call(self.model, self.tensors, batch.args)
        return [one.numpy() for one in pytree.tree_leaves(result)]


# ---------------------------------------------------------------------------------------------------------------------
# The same function


@pytest.mark.parametrize("name", IMAGE_MODELS)
@pytest.mark.parametrize("traced", ["with an example", "without inputs"])
def test_a_folded_model_computes_the_same(name: str, traced: str) -> None:
    model = image_model(name)
    folded = fold_network(network_of(model, *([images()] if traced == "with an example" else [])))
    assert folded.folds
    assert difference(model, folded, images()) < 1e-5


EXPECTED = {
    "ResNet": (6, 0),
    "PreActivation": (1, 1),
    "MobileNet": (8, 0),
    "EfficientNet": (7, 0),
    "MobileNetV3": (7, 0),
    "UNet": (4, 0),
    "Dense": (1, 2),
    "Vgg": (3, 0),
    "Detector": (2, 1),
}


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_export_and_fx_find_the_same_folds(name: str) -> None:
    model = image_model(name)
    network = adapter.read(model)
    exported = find_folds(adapter.graph(model, Batch((images(),))), network)
    symbolic = find_folds(adapter.graph(model, None), network)
    assert exported == symbolic
    folds, refused = exported
    assert (len(folds), len(refused)) == EXPECTED[name]
    norms = {n for n, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)}
    assert {fold.norm for fold in folds} | set(refused) == norms


CONVOLUTIONS: list[Callable[[], nn.Module]] = [
    lambda: nn.Sequential(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)),
    lambda: nn.Sequential(nn.Conv2d(4, 6, (3, 2), groups=2), nn.BatchNorm2d(6)),
    lambda: nn.Sequential(nn.Conv3d(4, 6, 2, padding=1), nn.BatchNorm3d(6)),
    lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=4, padding="same"), nn.BatchNorm2d(8)),
    lambda: nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6)),
    lambda: nn.Sequential(nn.ConvTranspose1d(4, 6, 3, groups=2), nn.BatchNorm1d(6)),
    lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2, output_padding=1), nn.BatchNorm2d(6)),
    lambda: nn.Sequential(nn.ConvTranspose3d(4, 6, 2), nn.BatchNorm3d(6)),
    lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False)),
    lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, eps=0.3)),
    lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.Identity(), nn.Dropout(), nn.BatchNorm2d(6)),
    lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1, bias=False)),
    lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Dropout(), nn.Conv2d(4, 6, 3, groups=2)),
    lambda: nn.Sequential(nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 8, 3, groups=4)),
    lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Conv1d(4, 6, 2)),
    lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)),
]


@pytest.mark.parametrize("make", CONVOLUTIONS)
def test_a_normalization_beside_a_convolution_is_folded(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = settled(make())
    (conv,) = (module for module in model if hasattr(module, "kernel_size"))  # type: ignore[attr-defined]
    inputs = torch.randn(2, 4, *[5] * len(conv.kernel_size))
    folded = fold_network(network_of(model, inputs))
    assert folded.refused == {}
    assert difference(model, folded, inputs) < 1e-5
    (layer,) = folded.network.layers
    (stored,) = adapter.read(model).layers
    assert layer.stored == stored
    assert layer.norms == tuple(sorted(folded.norms))
    assert layer.notes == tuple(f"BatchNorm {name} folded in" for name in sorted(folded.norms))
    assert layer.weight.dtype == np.float32
    check_deployed(model, conv, layer, inputs)


def check_deployed(model: nn.Module, conv: Any, layer: Layer, inputs: Tensor) -> None:
    """The folded weight and bias alone are what the layer and its normalizations compute."""
    alone = copy.deepcopy(conv)
    alone.weight = nn.Parameter(tensor_of(layer, conv))
    assert layer.bias is not None
    alone.bias = nn.Parameter(torch.from_numpy(np.array(layer.bias())).float())
    with torch.no_grad():
        torch.testing.assert_close(alone(inputs), model(inputs), rtol=1e-4, atol=1e-4)


def test_a_normalization_beside_a_linear_layer_is_folded() -> None:
    torch.manual_seed(0)
    model = settled(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.BatchNorm1d(6), nn.Linear(6, 3)))
    for network in (network_of(model, torch.randn(5, 4)), network_of(model)):
        folded = fold_network(network)
        assert folded.folds == (Fold("1", "0", "backward"), Fold("3", "4", "forward"))
        assert difference(model, folded, torch.randn(5, 4)) < 1e-5


def test_a_trained_model_computes_the_same_after_folding() -> None:
    model = image_model("ResNet").train()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(3):
        optimizer.zero_grad()
        functional.cross_entropy(model(images(8)), torch.arange(8) % 5).backward()
        optimizer.step()
    model.eval()
    assert difference(model, fold_network(network_of(model)), images()) < 1e-5


def test_dead_channels_are_folded_backward() -> None:
    model = settled(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    with torch.no_grad():
        model[1].weight[1] = 0  # type: ignore[index]
        model[1].running_var[2] = 0  # type: ignore[index]
    folded = fold_network(network_of(model))
    assert np.all(folded.network.layers[0].weight[1] == 0)
    assert difference(model, folded, images()) < 1e-5


@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, np.float32), (torch.float64, np.float64)])
def test_folded_weights_are_float32_unless_the_stored_are_float64(dtype: torch.dtype, expected: type) -> None:
    model = settled(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).to(dtype))
    (layer,) = fold_network(network_of(model)).network.layers
    assert layer.weight.dtype == expected


def test_folding_leaves_the_model_alone() -> None:
    model = image_model("MobileNet")
    before = copy.deepcopy(model.state_dict())
    folded = fold_network(network_of(model))
    assert all(layer.weight.flags.writeable is False for layer in folded.network.layers)
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())


def test_a_network_without_a_graph_is_not_folded() -> None:
    network = adapter.read(image_model("Vgg"))
    assert fold_network(network) == Folded(network)


# ---------------------------------------------------------------------------------------------------------------------
# Refused


class Flow(nn.Module):
    """A convolution and a normalization in a flow that the test gives."""

    def __init__(self, flow: Callable[[Any, Tensor], Any], **modules: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        for name, module in modules.items():
            self.add_module(name, module)
        self.flow = flow

    def forward(self, x: Tensor) -> Any:
        return self.flow(self, x)


def residual(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    return m.bn(y) + y


def overwritten(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    functional.relu_(y)
    return m.bn(y)


def standardized(m: Any, x: Tensor) -> Tensor:
    weight = m.conv.weight
    return m.bn(functional.conv2d(x, (weight - weight.mean()) / weight.std(), m.conv.bias))


REFUSED: list[tuple[Callable[[Any, Tensor], Any], dict[str, nn.Module], str]] = [
    (lambda m, x: m.bn(functional.relu(m.conv(x))), {}, "'relu' stands before it, and an output of the model"),
    (lambda m, x: m.bn(m.conv(m.conv(x))), {}, "the weight of 'conv@2' is used 2 times, and an output"),
    (lambda m, x: m.bn(m.bn(m.conv(x))), {}, "it is used 2 times"),
    (residual, {}, "what 'conv' gives is used 2 times, and 'add' follows it"),
    (lambda m, x: (m.conv(x), m.bn(m.conv(x))), {}, "is used 2 times, and an output of the model follows it"),
    (overwritten, {}, "'relu' stands before it"),
    (lambda m, x: m.pad(m.bn(x)), {"pad": nn.Conv2d(3, 2, 3, padding=1)}, "and 'pad' after it pads with zeros"),
    (lambda m, x: m.fc(m.bn(x).flatten(1)), {"fc": nn.Linear(768, 2)}, "and 'flatten' follows it"),
    (lambda m, x: m.up(m.bn(x)), {"up": nn.ConvTranspose2d(3, 2, 2)}, "and 'up' (conv_transpose) follows it"),
    (lambda m, x: (m.bn(x), m.bn.weight)[0].chunk(3, 1)[0], {}, "and 'split' follows it"),
    (standardized, {}, "computes its weight anew in each pass"),
    (lambda m, x: m.bn(m.fc(x)), {"fc": nn.Linear(16, 3)}, "it normalizes another axis than the channels of 'fc'"),
]  # fmt: skip


@pytest.mark.parametrize(("flow", "modules", "reason"), REFUSED)
def test_what_cannot_be_folded_is_refused_with_the_reason(
    flow: Callable[[Any, Tensor], Any], modules: dict[str, nn.Module], reason: str
) -> None:
    model = settled(Flow(flow, **modules))
    network = network_of(model, images())
    folded = fold_network(network)
    assert folded.folds == ()
    assert reason in folded.refused["bn"]
    assert folded.network == network
    assert folded.weights == {}


def test_a_tied_weight_is_not_folded() -> None:
    model = Flow(lambda m, x: m.bn(m.conv(m.other(x))), other=nn.Conv2d(3, 3, 1))
    model.other.weight = model.conv.weight  # type: ignore[union-attr]
    assert "the weight of 'conv' is used 2 times" in fold_network(network_of(settled(model))).refused["bn"]
    model.flow = lambda m, x: m.bn(m.conv(x))
    assert "is used under several names" in fold_network(network_of(model, images())).refused["bn"]


@pytest.mark.parametrize("variance", [-1.0, float("nan")])
def test_a_variance_that_cannot_be_divided_by_is_refused(variance: float) -> None:
    model = settled(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    with torch.no_grad():
        model[1].running_var[0] = variance  # type: ignore[index]
    assert fold_network(network_of(model)).refused == {"1": "variance + epsilon is 0, negative or NaN in some channel"}


def test_a_shift_that_is_not_finite_is_refused() -> None:
    model = settled(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    with torch.no_grad():
        model[1].bias[0] = float("inf")  # type: ignore[index]
    assert "its mean, scale or shift is NaN or infinite" in fold_network(network_of(model)).refused["1"]


def test_a_gain_of_zero_cannot_be_folded_forward() -> None:
    model = settled(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)))
    with torch.no_grad():
        model[0].weight[0] = 0  # type: ignore[index]
    assert "it multiplies a channel by 0" in fold_network(network_of(model)).refused["0"]


def test_a_normalization_by_the_statistics_of_the_batch_is_no_candidate() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)).eval()
    for network in (network_of(model), network_of(model, images())):
        folded = fold_network(network)
        assert (folded.folds, folded.refused) == ((), {})


def test_an_unknown_bias_or_unknown_numbers_are_refused() -> None:
    network = network_of(settled(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))))
    (layer,) = network.layers
    assert network.graph is not None
    unknown = fold_network(replace(network, layers=(replace(layer, bias=None),)))
    assert "what '0' adds to its channels is not known" in unknown.refused["1"]
    assert fold_network(replace(network, graph=replace(network.graph, norms={}))).refused == {
        "1": "its numbers are not known"
    }
    assert "is not among the layers" in fold_network(replace(network, layers=())).refused["1"]


# ---------------------------------------------------------------------------------------------------------------------
# Where the input channels are


@settings(max_examples=50, deadline=None)
@given(
    groups=st.integers(1, 3), inputs=st.integers(1, 3), outputs=st.integers(1, 3), kernel=st.integers(1, 4),
    last=st.booleans(),
)  # fmt: skip
def test_columns_belong_to_the_input_channels_in_either_layout(
    groups: int, inputs: int, outputs: int, kernel: int, last: bool
) -> None:
    attributes = {"groups": groups, "columns": "channels last" if last else "channels first"}
    found = input_channels(
        (groups * outputs, inputs * kernel), groups * inputs, Node("conv", "conv", attributes=attributes)
    )
    for row in range(groups * outputs):
        for channel in range(inputs):
            for place in range(kernel):
                column = place * inputs + channel if last else channel * kernel + place
                assert found[row, column] == row // outputs * inputs + channel


def test_a_matrix_with_its_channels_last_is_folded_forward() -> None:
    """As Keras has them: a naive convolution by a kernel (height, width, in, out)."""
    random = np.random.default_rng(0)
    kernel, image = random.normal(size=(2, 2, 3, 4)), random.normal(size=(2, 2, 3))
    gain, offset = random.normal(size=3), random.normal(size=3)
    norm = Norm("bn", -offset / gain, np.full(3, 1 - 1e-3), gain, np.zeros(3), 1e-3)
    last = {"columns": "channels last"}
    nodes = (
        Node("x", "input"),
        Node("bn", "batch_norm", ("x",), attributes={"channel_axis": 3}),
        Node("conv", "conv", ("bn",), "conv", attributes={"padding": False, "channel_axis": 3, **last}),
        Node("y", "output", ("conv",)),
    )  # fmt: skip
    layer = Layer("conv", "Conv2D", kernel.shape, "float64", lambda: kernel.transpose(3, 0, 1, 2).reshape(4, 12))
    folded = fold_network(Network("n", "f", (layer,), graph=Graph(nodes, {"bn": norm})))
    expected = np.einsum("hwi,hwio->o", image * gain + offset, kernel)
    new = folded.network.layers[0]
    assert new.bias is not None
    np.testing.assert_allclose(new.weight @ image.ravel() + new.bias(), expected)
    np.testing.assert_allclose(new.weight @ (image + folded.norms["bn"].shift).ravel(), expected)


# ---------------------------------------------------------------------------------------------------------------------
# Verification


def test_verification_tells_a_right_fold_from_a_wrong_one() -> None:
    model = image_model("EfficientNet")
    folded = fold_network(network_of(model))
    batches = [Batch((images(),)), Batch((images(3),))]
    assert verify(FunctionalRunner(model, folded), batches, folded) < 1e-5  # type: ignore[arg-type]
    name, norm = next(iter(folded.norms.items()))
    wrong = replace(folded, norms={**folded.norms, name: replace(norm, shift=norm.shift + 1)})
    assert verify(FunctionalRunner(model, wrong), batches, wrong) > 1e-2  # type: ignore[arg-type]


class Fixed:
    """A runner with one output before and another after."""

    def __init__(self, *outputs: list[float]) -> None:
        self.outputs = list(outputs)

    def place(self, weights: object, norms: object) -> None:  # noqa: ARG002
        self.outputs.pop(0)

    def run(self, batch: Batch) -> list[FloatArray]:  # noqa: ARG002
        return [np.array(self.outputs[0])]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([1.0, -4.0], [1.0, -4.5], 0.125),
        ([float("nan"), 2.0], [float("nan"), 2.0], 0.0),
        ([float("nan"), 2.0], [1.0, 2.0], float("inf")),
        ([float("inf"), 2.0], [float("inf"), 1.0], 0.5),
        ([0.0], [1.0], float("inf")),
        ([0.0], [0.0], 0.0),
    ],
)
def test_the_difference_is_relative_to_the_largest_output(
    before: list[float], after: list[float], expected: float
) -> None:
    network = Network("n", "f", ())
    assert verify(Fixed(before, after), [Batch(())], Folded(network)) == expected  # type: ignore[arg-type]
