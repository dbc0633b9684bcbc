"""Which channels can be scaled, and that scaling them leaves the function as it is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from qvis.adapters import torch as adapter
from qvis.adapters.rewritten import express
from qvis.equalization.sites import Sites, find_sites, scaled
from qvis.errors import BadArgumentError
from qvis.folding import Folded, fold_network
from qvis.layers import Graph, Layer, Network, Node, Norm
from tests.convnets import image_model, images, settled
from tests.test_folding import network_of, tensor_of

STATISTICS = {"mean": "running_mean", "variance": "running_var", "scale": "weight", "shift": "bias"}


class Flow(nn.Module):
    """Modules in a flow that the test gives."""

    def __init__(self, flow: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.flow = flow

    def forward(self, *inputs: Tensor) -> Any:
        return self.flow(self, *inputs)


def made(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A model with random weights, the same at every call, whose normalizations do something."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = settled(make())
        for module in model.modules():
            if isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)) and module.weight is not None:
                module.weight.normal_(1, 0.3)
                if getattr(module, "bias", None) is not None:
                    module.bias.normal_()
    return model


def sites_of(
    model: nn.Module, *inputs: Tensor, multiplied: Sequence[str] = (), shapes: bool = True
) -> tuple[Sites, Folded]:
    network = network_of(model, *(inputs if shapes else ()))
    assert network.graph is not None
    folded = fold_network(network)
    return find_sites(network.graph, folded.network, set(folded.norms), multiplied=multiplied), folded


def affine_of(model: nn.Module, name: str) -> tuple[Any, Any]:
    module = model.get_submodule(name)
    bias = getattr(module, "bias", None)
    return module.weight.detach().numpy(), None if bias is None else bias.detach().numpy()  # type: ignore[operator]


def rewritten(model: nn.Module, sites: Sites, folded: Folded, scales: Any) -> dict[str, Tensor]:
    """The parameters and buffers of the model, folded and scaled."""
    affines = {name: affine_of(model, name) for name in sites.affines}
    assert folded.network.graph is not None
    own = {**folded.network.graph.norms, **folded.norms}
    new = scaled(sites, scales, folded.network.layers, own, affines)
    weights, norms = {**folded.weights, **new.weights}, {**folded.norms, **new.norms}
    tensors: dict[str, Any] = {}
    for layer in folded.network.layers:
        if layer.name in weights:
            module = model.get_submodule(layer.name)
            whole = layer.__class__(layer.name, layer.op, layer.shape, layer.dtype, lambda n=layer.name: weights[n])
            tensors[f"{layer.name}.weight"] = tensor_of(whole, module)
    for name, bias in new.biases.items():
        tensors[f"{name}.bias"] = bias
    for name, norm in norms.items():
        module = model.get_submodule(name)
        has = {"has_scale": module.weight is not None, "has_shift": module.bias is not None}
        for what, one in express(norm, float(module.eps), **has).items():  # type: ignore[arg-type]
            tensors[f"{name}.{STATISTICS[what]}"] = one
    for name, factors in new.multiplies.items():  # in the weight's place, which undoes it
        tensors[f"{name}.weight"] = np.asarray(tensors[f"{name}.weight"]) * factors
    for name, (scale, shift) in new.affines.items():
        tensors[f"{name}.weight"] = scale
        if shift is not None:
            tensors[f"{name}.bias"] = shift
    return {
        name: (one if isinstance(one, Tensor) else torch.from_numpy(np.array(one))).float()
        for name, one in tensors.items()
    }


def check(model: nn.Module, *inputs: Tensor, seed: int = 0, **options: Any) -> Sites:
    """Scale a model by random numbers: its outputs must stay as they are."""
    sites, folded = sites_of(model, *inputs, **options)
    scales = np.exp2(np.random.default_rng(seed).uniform(-2, 2, sites.count))
    tensors = rewritten(model, sites, folded, scales)
    with torch.no_grad():
        own = pytree.tree_leaves(model(*inputs))
        other = pytree.tree_leaves(functional_call(model, tensors, inputs))
    worst = max(float((one - two).abs().max()) for one, two in zip(own, other, strict=True))
    assert worst <= 1e-5 * max(float(one.abs().max()) for one in own)
    return sites


def pairs(sites: Sites) -> list[tuple[tuple[str, ...], tuple[str, ...], int]]:
    return [(site.producers, site.consumers, site.channels) for site in sites.sites]


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


# ---------------------------------------------------------------------------------------------------------------------
# Models of images


@pytest.mark.parametrize(
    ("name", "counts"),
    {
        # ResNet: its stream of 8 channels with the stem and a block, each block's inside, and the last stream.
        "ResNet": [8, 8, 12, 12],
        "PreActivation": [6, 6],
        "MobileNet": [12],
        "MobileNetV3": [4, 4],
        "UNet": [6, 8, 6, 6],
        "Dense": [6, 6, 4, 10, 4],
        "Vgg": [6, 8, 10],
        "Detector": [6, 6, 6],
    }.items(),
)
def test_scaling_changes_no_image_model(name: str, counts: list[int]) -> None:
    sites = check(image_model(name), images())
    assert [site.channels for site in sites.sites] == counts
    assert sites.count == sum(counts)


@pytest.mark.parametrize("name", ["ResNet", "UNet", "Dense", "EfficientNet", "Vgg"])
def test_without_shapes_less_is_found_and_nothing_changes(name: str) -> None:
    sites = check(image_model(name), images(), shapes=False)
    assert sites.count == {"ResNet": 28, "UNet": 26, "Dense": 30, "EfficientNet": 8, "Vgg": 6}[name]
    reasons = {skipped.name: skipped.reason for skipped in sites.skipped}
    if name == "ResNet":
        assert reasons["layer2.conv2 -> fc"] == "its shape is not known: give example_inputs"


def test_a_multiplication_before_a_linear_sets_its_input_free() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 8), nn.Linear(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).relu()
            return x + self.down(nn.functional.gelu(self.up(x)))

    model = made(Block)
    assert pairs(check(model, noise(3, 4))) == []
    sites = check(model, noise(3, 4), multiplied=["down", "up"])
    assert pairs(sites) == [((), ("up",), 6), ((), ("down",), 8)]
    assert not sites.skipped


def test_a_residual_stream_is_one_site() -> None:
    site = sites_of(image_model("ResNet"), images())[0].sites[0]
    assert site.producers == ("stem.0", "layer1.conv2")
    assert site.consumers == ("layer1.conv1", "layer2.conv1", "layer2.downsample.0")
    assert site.through == ("batch_norm", "relu", "max_pool", "add")


def test_relu6_is_refused_and_equalized_where_it_is_replaced() -> None:
    model = image_model("MobileNet")
    refused = {one.name: one.reason for one in sites_of(model, images())[0].skipped}
    assert refused["features.1.body.0.0 -> features.1.body.1.0"] == (
        "clip 'features.1.body.0.2' is not homogeneous (ReLU6): replace it by ReLU to equalize here"
    )
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.ReLU6):
                setattr(module, name, nn.ReLU())
    sites = check(model, images())
    assert not sites.skipped
    assert sites.count == 8 + 16 + 16 + 16 + 16 + 12 + 16


# ---------------------------------------------------------------------------------------------------------------------
# One thing at a time


Expected = list[tuple[str, str, int]]
"""Producers and consumers of each site, and how many channels it has."""


class Encoder(nn.Module):
    """A layer of a transformer."""

    def __init__(self, pre: bool, manual: bool) -> None:
        super().__init__()
        self.pre, self.manual = pre, manual
        self.norm1, self.norm2 = nn.LayerNorm(12), nn.LayerNorm(12)
        self.q, self.k, self.v, self.o = (nn.Linear(12, 12) for _ in range(4))
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (one(x).view(*x.shape[:2], 3, 4).transpose(1, 2) for one in (self.q, self.k, self.v))
        if self.manual:
            mixed = torch.softmax(q @ k.transpose(-2, -1) * 0.5, -1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v)
        return self.o(mixed.transpose(1, 2).reshape(x.shape))

    def forward(self, x: Tensor) -> Tensor:
        if self.pre:
            x = x + self.attend(self.norm1(x))
            return x + self.down(F.relu(self.up(self.norm2(x))))
        x = self.norm1(x + self.attend(x))
        return self.norm2(x + self.down(F.relu(self.up(x))))


class Centred(nn.Module):
    """A layer normalization that is written out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.linspace(start, 1.7, width)) for start in (0.3, -1.0))

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.weight + self.bias


def gqa(m: Any, x: Tensor) -> Tensor:
    def heads(layer: nn.Module) -> Tensor:
        return layer(x).view(*x.shape[:2], -1, 4).transpose(1, 2)

    mixed = F.scaled_dot_product_attention(heads(m.q), heads(m.k), heads(m.v), enable_gqa=True)
    return m.o(mixed.transpose(1, 2).flatten(2))


def shuffle(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    n, c, h, w = x.shape
    return m.b(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


def excite(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    return m.c(x * torch.sigmoid(m.up(F.relu(m.down(x.mean((2, 3), keepdim=True))))))


def halves(m: Any, x: Tensor) -> Tensor:
    one, other = m.a(x).chunk(2, 1)
    return m.c(torch.cat([other, m.b(one)], 1))


def unbound(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
    return m.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def gated(m: Any, x: Tensor) -> Tensor:
    hidden = m.norm(x)
    return x + m.down(F.silu(m.gate(hidden)) * m.up(hidden))


def windows(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    n, c, h, w = x.shape
    return m.b(x.permute(0, 2, 3, 1).view(n, h // 4, 4, w // 4, 4, c).transpose(2, 3).reshape(-1, 16, c))


def several(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    return m.c(F.relu(m.b(F.relu(m.b(x)))))


def pair(kind: Callable[..., nn.Module]) -> dict[str, nn.Module]:
    return {"a": kind(4, 6, 1), "b": kind(4, 6, 1)}


IMAGE, TOKENS, ROWS = (2, 4, 8, 8), (2, 5, 12), (3, 6)
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Expected]] = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Dropout(), nn.Linear(7, 5), nn.PReLU(5), nn.Linear(5, 2)),
        ROWS,
        [("0", "3", 7), ("3", "5", 5)],
    ),
    "conv1d": (
        lambda: nn.Sequential(nn.Conv1d(4, 6, 3), nn.LeakyReLU(), nn.AvgPool1d(2), nn.Conv1d(6, 3, 1)),
        (2, 4, 12),
        [("0", "3", 6)],
    ),
    "conv3d": (
        lambda: nn.Sequential(nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4), nn.ReLU(), nn.Conv3d(4, 3, 1, groups=1)),
        (1, 2, 4, 4, 4),
        [("0", "3", 4)],
    ),
    "transposed": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 1), nn.ConvTranspose2d(6, 4, 2, groups=2), nn.Conv2d(4, 2, 1)),
        IMAGE,
        [("0", "1", 6), ("1", "2", 4)],
    ),
    "depthwise multiplier": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 1), nn.Conv2d(6, 12, 3, groups=6), nn.ReLU(), nn.Conv2d(12, 2, 1)),
        IMAGE,
        [("0", "1", 6), ("1", "3", 12)],
    ),
    "shuffle": (
        lambda: Flow(shuffle, a=nn.Conv2d(4, 8, 1, groups=2), b=nn.Conv2d(8, 4, 1, groups=4)),
        IMAGE,
        [("a", "b", 8)],
    ),
    "concat and flatten": (
        lambda: Flow(
            lambda m, x: m.c(F.relu(torch.cat([m.a(x), F.pad(m.b(x), (1, 1, 1, 1))], 1)).flatten(1)),
            a=nn.Conv2d(4, 3, 1),
            b=nn.Conv2d(4, 2, 3),
            c=nn.Linear(5 * 64, 3),
        ),
        IMAGE,
        [("a", "c", 3), ("b", "c", 2)],
    ),
    "excite": (
        lambda: Flow(
            excite, a=nn.Conv2d(4, 6, 1), down=nn.Conv2d(6, 2, 1), up=nn.Conv2d(2, 6, 1), c=nn.Conv2d(6, 2, 1)
        ),
        IMAGE,
        [("a", "down c", 6), ("down", "up", 2)],
    ),
    "pre-LN": (
        lambda: Encoder(True, False),
        TOKENS,
        [("norm1", "q k v", 12), ("v", "o", 12), ("norm2", "up", 12), ("up", "down", 20)],
    ),
    "pre-LN by hand": (
        lambda: Encoder(True, True),
        TOKENS,
        [("norm1", "q k v", 12), ("v", "o", 12), ("norm2", "up", 12), ("up", "down", 20)],
    ),
    "post-LN": (lambda: Encoder(False, False), TOKENS, [("v", "o", 12), ("up", "down", 20)]),
    "query groups": (
        lambda: Flow(gqa, q=nn.Linear(12, 16), k=nn.Linear(12, 8), v=nn.Linear(12, 8), o=nn.Linear(16, 5)),
        TOKENS,
        [("v", "o", 4)],
    ),
    "packed qkv": (lambda: Flow(unbound, qkv=nn.Linear(12, 24), o=nn.Linear(8, 3)), TOKENS, [("qkv", "o", 8)]),
    "gated": (
        lambda: Flow(
            gated,
            norm=nn.RMSNorm(12),
            gate=nn.Linear(12, 9),
            up=nn.Linear(12, 9),
            down=nn.Linear(9, 12),
        ),
        TOKENS,
        [("norm", "gate up", 12), ("up", "down", 9)],
    ),
    "both factors": (
        lambda: Flow(
            lambda m, x: m.c(F.relu(m.a(x)) * m.b(x)), a=nn.Linear(6, 4), b=nn.Linear(6, 4), c=nn.Linear(4, 2)
        ),
        ROWS,
        [("a", "c", 4)],
    ),
    "square": (lambda: Flow(lambda m, x: m.c(m.a(x) * m.a(x)), a=nn.Linear(6, 4), c=nn.Linear(4, 2)), ROWS, []),
    "used twice": (
        lambda: Flow(several, a=nn.Conv2d(4, 6, 1), b=nn.Conv2d(6, 6, 3, padding=1), c=nn.Conv2d(6, 2, 1)),
        IMAGE,
        [("a b", "b c", 6)],
    ),
    "an output": (
        lambda: Flow(lambda m, x: (m.b(y := m.a(x)), F.relu(y)), a=nn.Linear(6, 4), b=nn.Linear(4, 2)),
        ROWS,
        [],
    ),
    "halves": (
        lambda: Flow(halves, a=nn.Conv2d(4, 6, 1), b=nn.Conv2d(3, 3, 1), c=nn.Conv2d(6, 2, 1)),
        IMAGE,
        [("a", "b", 3), ("a", "c", 3), ("b", "c", 3)],
    ),
    "a slice": (
        lambda: Flow(lambda m, x: m.b(m.a(x)[:, 1:4]), a=nn.Linear(6, 5), b=nn.Linear(3, 2)),
        ROWS,
        [("a", "b", 3)],
    ),
    "factors": (
        lambda: Flow(
            lambda m, x: m.b(m.a(x) * torch.tensor([1.0, -2.0, 3.0]) * 0.5), a=nn.Linear(6, 3), b=nn.Linear(3, 2)
        ),
        ROWS,
        [("a", "b", 3)],
    ),
    "a constant": (lambda: Flow(lambda m, x: m.b(F.relu(m.a(x) + 1)), a=nn.Linear(6, 3), b=nn.Linear(3, 2)), ROWS, []),
    "one over": (lambda: Flow(lambda m, x: m.b(1 / (m.a(x))), a=nn.Linear(6, 3), b=nn.Linear(3, 2)), ROWS, []),
    "class token": (
        lambda: Flow(
            lambda m, x: m.b(torch.cat([torch.ones(2, 1, 3), m.a(x)], 1)), a=nn.Linear(12, 3), b=nn.Linear(3, 2)
        ),
        TOKENS,
        [],
    ),
    "mean of tokens": (
        lambda: Flow(lambda m, x: m.b(F.relu(m.a(x)).mean(1)), a=nn.Linear(12, 5), b=nn.Linear(5, 2)),
        TOKENS,
        [("a", "b", 5)],
    ),
    "pooled channels": (
        lambda: Flow(lambda m, x: m.b(F.avg_pool1d(m.a(x), 3, 1, 1)), a=nn.Linear(12, 6), b=nn.Linear(6, 2)),
        TOKENS,
        [("a", "b", 1)],
    ),
    "mixed tokens": (
        lambda: Flow(lambda m, x: m.b(m.a(x).transpose(1, 2)), a=nn.Linear(12, 4), b=nn.Linear(5, 2)),
        TOKENS,
        [("a", "b", 1)],
    ),
    "pooled by attention": (
        lambda: Flow(
            lambda m, x: m.c(m.a(x).transpose(1, 2) @ torch.softmax(m.b(x), 1)).transpose(1, 2),
            a=nn.Linear(12, 4),
            b=nn.Linear(12, 3),
            c=nn.Linear(3, 2),
        ),
        TOKENS,
        [("a", "c", 1)],
    ),
    "channels last": (
        lambda: Flow(
            lambda m, x: m.b(m.a(x).permute(0, 2, 3, 1)).mean((1, 2)), a=nn.Conv2d(4, 5, 1), b=nn.Linear(5, 3)
        ),
        IMAGE,
        [("a", "b", 5)],
    ),
    "windows": (
        lambda: Flow(windows, a=nn.Conv2d(4, 6, 1), b=nn.Linear(6, 3)),
        IMAGE,
        [("a", "b", 6)],
    ),
    "shrunk shortcut": (
        lambda: Flow(
            lambda m, x: m.c(m.b(y := m.a(x)) + F.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1))),
            a=nn.Conv2d(4, 4, 1),
            b=nn.Conv2d(4, 6, 1, 2),
            c=nn.Conv2d(6, 2, 1),
        ),
        IMAGE,
        [("a b", "b c", 4), ("b", "c", 2)],
    ),
    "stacked": (
        lambda: Flow(
            lambda m, x: m.c(torch.stack([m.a(x), m.b(x)], 1).amax(1)), **pair(nn.Conv2d), c=nn.Conv2d(6, 2, 1)
        ),
        IMAGE,
        [("a b", "c", 6)],
    ),
    "the larger": (
        lambda: Flow(lambda m, x: m.c(torch.maximum(m.a(x), -m.b(x) / 3)), **pair(nn.Conv2d), c=nn.Conv2d(6, 2, 1)),
        IMAGE,
        [("a b", "c", 6)],
    ),
    "linear unit with a gate": (
        lambda: Flow(lambda m, x: m.b(F.glu(m.a(x), 1)), a=nn.Conv2d(4, 6, 1), b=nn.Conv2d(3, 2, 1)),
        IMAGE,
        [("a", "b", 3)],
    ),
    "rolled and turned around": (
        lambda: Flow(
            lambda m, x: m.b(m.a(x).roll((1, -2), (2, 3)).flip(3).movedim(1, -1)).mean((1, 2)),
            a=nn.Conv2d(4, 6, 1),
            b=nn.Linear(6, 2),
        ),
        IMAGE,
        [("a", "b", 6)],
    ),
    "channels turned around": (
        lambda: Flow(lambda m, x: m.b(m.a(x).flip(1)), a=nn.Conv2d(4, 6, 1), b=nn.Conv2d(6, 2, 1)),
        IMAGE,
        [("a", "b", 1)],
    ),
    "places from channels": (
        lambda: Flow(lambda m, x: m.b(F.pixel_shuffle(m.a(x), 2)), a=nn.Conv2d(4, 8, 1), b=nn.Conv2d(2, 2, 1)),
        IMAGE,
        [("a", "b", 2)],
    ),
    "channels from places": (
        lambda: Flow(lambda m, x: m.b(F.pixel_unshuffle(m.a(x), 2)), a=nn.Conv2d(4, 3, 1), b=nn.Conv2d(12, 2, 1)),
        IMAGE,
        [("a", "b", 3)],
    ),
    "spread and summed": (
        lambda: Flow(
            lambda m, x: m.c((m.a(x) + m.b(x).sum((2, 3), keepdim=True).expand(-1, -1, 8, 8)).repeat(1, 1, 1, 2)),
            **pair(nn.Conv2d),
            c=nn.Conv2d(6, 2, 1),
        ),
        IMAGE,
        [("a b", "c", 6)],
    ),
    "largest": (
        lambda: Flow(lambda m, x: m.b(m.a(x).max(1)[0]), a=nn.Linear(12, 5), b=nn.Linear(5, 2)),
        TOKENS,
        [("a", "b", 5)],
    ),
    "written out": (
        lambda: Flow(
            lambda m, x: m.b(m.norm(x)) + m.c(F.gelu(m.a(x)) * m.other.weight),
            norm=Centred(12),
            other=Centred(5),
            a=nn.Linear(12, 5),
            b=nn.Linear(12, 2),
            c=nn.Linear(5, 2),
        ),
        TOKENS,
        [("norm", "b", 12), ("other", "c", 5)],
    ),
    "written out and called twice": (
        lambda: Flow(lambda m, x: m.b(m.norm(x)) + m.b(m.norm(m.norm(x))), norm=Centred(12), b=nn.Linear(12, 2)),
        TOKENS,
        [],
    ),
    "one normalization called twice": (
        lambda: Flow(
            lambda m, x: m.b(F.relu(m.norm(F.relu(m.a(x))))) + m.c(m.norm(x)),
            a=nn.Conv2d(4, 4, 1),
            norm=nn.BatchNorm2d(4),
            b=nn.Conv2d(4, 2, 1),
            c=nn.Conv2d(4, 2, 1),
        ),
        IMAGE,
        [("norm", "b c", 4)],
    ),
    "a normalization without factors": (
        lambda: Flow(
            lambda m, x: m.b(m.norm(F.relu(m.a(x))).relu()),
            a=nn.Conv2d(4, 6, 1),
            norm=nn.BatchNorm2d(6, affine=False),
            b=nn.Conv2d(6, 2, 1),
        ),
        IMAGE,
        [("a", "norm", 6), ("norm", "b", 6)],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_scaling_changes_nothing(name: str) -> None:
    make, shape, expected = CASES[name]
    sites = check(made(make), noise(*shape))
    assert [(" ".join(one.producers), " ".join(one.consumers), one.channels) for one in sites.sites] == expected


# ---------------------------------------------------------------------------------------------------------------------
# What is refused, and why


def reasons(model: nn.Module, *inputs: Tensor) -> dict[str, str]:
    return {one.name: one.reason for one in sites_of(model, *inputs)[0].skipped}


def test_each_refused_connection_says_why() -> None:
    assert reasons(nn.Sequential(nn.Linear(6, 4), nn.GELU(), nn.Linear(4, 2)), noise(3, 6)) == {
        "0 -> 2": "gelu '1' follows it"
    }
    assert reasons(made(CASES["an output"][0]), noise(3, 6)) == {"a -> b": "its output is an output of the model"}
    assert reasons(made(CASES["a constant"][0]), noise(3, 6)) == {"a -> b": "add 'add' of a constant follows it"}
    post = reasons(Encoder(False, False), noise(2, 5, 12))
    assert post["o -> norm1"] == "it is tied to an input of the model"
    assert post["down -> norm2"] == "layer_norm 'norm2' follows it"
    assert post["q -> o"] == "the softmax of attention 'attention' follows it"


def test_a_normalization_that_is_not_folded_has_connections_of_its_own() -> None:
    model = made(lambda: nn.Sequential(nn.Linear(6, 4), nn.GELU(), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)))
    sites = check(model, noise(3, 6))
    assert pairs(sites) == [(("2",), ("4",), 4)]
    assert [(one.name, one.reason) for one in sites.skipped] == [("0 -> 2", "gelu '1' follows it")]


def test_the_numbers_of_normalizations_are_needed() -> None:
    sites, folded = sites_of(made(CASES["a normalization without factors"][0]), noise(*IMAGE))
    with pytest.raises(BadArgumentError, match="norms: the numbers of 'norm', which are to be scaled, are missing"):
        scaled(sites, np.full(12, 2.0), folded.network.layers)


def test_what_takes_many_is_one_line() -> None:
    model = Flow(
        lambda m, x: sum(one(F.gelu(m.a(x))) for one in m.heads),
        a=nn.Linear(6, 4),
        heads=nn.ModuleList(nn.Linear(4, 2) for _ in range(5)),
    )
    assert reasons(model, noise(3, 6)) == {"a -> heads.0, heads.1 and 3 more": "gelu 'gelu' follows it"}


def test_tied_and_packed_weights_stay() -> None:
    tied = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    tied[2].weight = tied[0].weight
    assert reasons(tied, noise(3, 4)) == {
        "0 -> 0, 4": "the weight of '0' is held under several names",
    }
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 5), nn.LSTM(5, 4))
    found = reasons(model, torch.tensor([[1, 2, 3]]))
    assert found["0 -> 1"] == "embedding '0' uses the weight of '0'"
    assert all(name.startswith(("0 -> 1", "1 -> 2.")) for name in found)
    sites = sites_of(model, torch.tensor([[1, 2, 3]]))[0]
    assert sites.count == 0
    assert all(np.all(ids == -1) for ids in (*sites.outputs.values(), *sites.inputs.values()))
    assert {name: len(ids) for name, ids in sites.outputs.items()} == {
        layer.name: len(layer.weight) for layer in adapter.read(model).layers
    }


def test_an_affine_that_cannot_be_rewritten_stays() -> None:
    network = network_of(Encoder(True, False), noise(2, 5, 12))
    assert network.graph is not None
    sites = find_sites(network.graph, network, affines={"norm2"})
    assert list(sites.affines) == ["norm2"]


def test_scales_are_checked() -> None:
    sites, folded = sites_of(made(CASES["pre-LN"][0]), noise(2, 5, 12))
    layers = folded.network.layers
    with pytest.raises(BadArgumentError, match=r"scales: expected 56 numbers, one for each variable, not \(3,\)"):
        scaled(sites, np.ones(3), layers)
    for wrong in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(BadArgumentError, match="scales: expected finite numbers above 0"):
            scaled(sites, np.full(56, wrong), layers)
    with pytest.raises(BadArgumentError, match="affines: the numbers of 'norm1', which are to be scaled, are missing"):
        scaled(sites, np.ones(56), layers)


def test_a_model_is_not_changed_and_scales_of_one_give_its_own_numbers() -> None:
    model = made(lambda: nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 2)))
    before = {name: one.clone() for name, one in model.state_dict().items()}
    sites, folded = sites_of(model, noise(3, 6))
    new = scaled(sites, np.ones(7), folded.network.layers)
    assert set(new.weights) == {"0", "2"}
    assert set(new.biases) == {"0"}
    assert all(np.array_equal(one, before[f"{name}.weight"].numpy()) for name, one in new.weights.items())
    scaled(sites, np.full(7, 3.0), folded.network.layers)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


# ---------------------------------------------------------------------------------------------------------------------
# Graphs of any kind, computed with NumPy

Numbers = dict[str, Any]
"""Weights, biases, shifts of normalizations and factors of affine ones, by name."""


OF_TWO = [("add", np.add), ("sub", np.subtract), ("mul", np.multiply), ("maximum", np.maximum), ("maximum", np.minimum)]


class Program:
    """A random graph, drawn one operation after the other, that can be computed with any numbers."""

    def __init__(self, draw: Callable[[Any], Any]) -> None:
        self.random = np.random.default_rng(draw(st.integers(0, 99)))
        self.draw = draw
        self.nodes: list[Node] = [Node("x", "input", shape=(2, 4, 6))]
        self.steps: dict[str, Callable[..., Any]] = {}
        self.numbers: Numbers = {}
        self.norms: dict[str, Norm] = {}
        self.folded: set[str] = set()
        self.layers: dict[str, Layer] = {}
        self.values = {"x": self.random.normal(size=(2, 4, 6))}

    def pick(self, choices: Sequence[Any]) -> Any:
        return choices[self.draw(st.integers(0, len(choices) - 1))]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.values[name].shape)

    def add(
        self, op: str, inputs: Sequence[str], step: Callable[..., Any], layer: str = "", name: str = "", **facts: Any
    ) -> None:
        """Add a node whose result is ``step(numbers, *operands)``."""
        name = name or f"{op}{len(self.nodes)}"
        self.steps[name] = step
        self.values[name] = step(self.numbers, *(self.values[one] for one in inputs))
        self.nodes.append(Node(name, op, tuple(inputs), layer, self.shape(name), facts))

    def grow(self) -> None:
        """Add one operation on results that are there."""
        name = self.pick([node.name for node in self.nodes if node.op != "input"][-4:])
        makers = (
            self.linear, self.linear, self.conv, self.conv, self.elementwise, self.elementwise, self.arithmetic,
            self.arithmetic, self.concat, self.part, self.transpose, self.reshape, self.pool, self.norm, self.product,
            self.shuffle, self.halves, self.move,
        )  # fmt: skip
        self.pick(makers)(name)

    def layer(self, shape: tuple[int, ...]) -> str:
        """A new layer, or one of the same shape that is used already."""
        same = [name for name, one in self.layers.items() if one.shape == shape]
        if same and self.pick([True, False]):
            return str(self.pick(same))
        name = f"layer{len(self.layers)}"
        self.numbers |= {name: self.random.normal(size=shape), f"{name}.bias": self.random.normal(size=shape[0])}
        weight, bias = self.numbers[name].reshape(shape[0], -1), self.numbers[f"{name}.bias"]
        self.layers[name] = Layer(name, "any", shape, "float64", lambda: weight, bias=lambda: bias)
        return name

    def linear(self, name: str) -> None:
        size = self.pick([2, 4, 6])
        layer = self.layer((size, self.shape(name)[-1]))
        self.add("linear", [name], lambda n, x: x @ n[layer].T + n[f"{layer}.bias"], layer, channel_axis=-1, bias=True)

    def conv(self, name: str) -> None:
        if len(self.shape(name)) != 3:
            return
        count, groups, size = self.shape(name)[1], self.pick([1, 2]), self.pick([2, 4, 6])
        kernel = self.pick([1, 3])
        groups = groups if count % groups == 0 else 1
        layer = self.layer((size, count // groups, kernel))

        def step(n: Numbers, x: Any) -> Any:
            width = x.shape[2]
            x = np.pad(x, ((0, 0), (0, 0), (kernel // 2, kernel // 2)))
            parts = zip(np.split(x, groups, 1), np.split(n[layer], groups, 0), strict=True)
            out = [
                sum(np.einsum("ncl,oc->nol", one[:, :, k : k + width], w[:, :, k]) for k in range(kernel))
                for one, w in parts
            ]
            return np.concatenate(out, 1) + n[f"{layer}.bias"][:, None]

        self.add("conv", [name], step, layer, channel_axis=1, groups=groups, bias=True)

    def elementwise(self, name: str) -> None:
        op, step, facts = self.pick(
            [
                ("relu", lambda _, x: np.maximum(x, 0), {}),
                ("leaky_relu", lambda _, x: np.where(x > 0, x, x / 4), {}),
                ("sigmoid", lambda _, x: (1 + np.tanh(x / 2)) / 2, {}),
                ("clip", lambda _, x: np.clip(x, 0, 1), {"low": 0.0, "high": 1.0}),
                ("mul", lambda _, x: x * np.arange(1.0, 1 + x.shape[-1]), {"constant": True}),
                ("div", lambda _, x: x / np.arange(-1.0, -1 - x.shape[-1], -1), {"constant": True, "divisor": True}),
                ("div", lambda _, x: 1 / (9 + x), {"constant": True}),
                ("identity", lambda _, x: x, {}),
            ]
        )
        self.add(op, [name], step, **facts)

    def arithmetic(self, name: str) -> None:
        fits = []
        for other in self.values:
            with contextlib.suppress(ValueError):
                if len(np.broadcast_shapes(self.shape(name), self.shape(other))) <= 4:
                    fits.append(other)
        other, (op, step) = self.pick(fits), self.pick(OF_TWO)
        operands = self.pick([(name, other), (other, name)])
        self.add(op, operands, lambda _, x, y: step(x, y), constant=False)

    def concat(self, name: str) -> None:
        axis = self.pick(range(1, len(self.shape(name))))
        rest = np.delete(self.shape(name), axis).tolist()
        fits = [one for one in self.values if len(self.shape(one)) == len(rest) + 1]
        fits = [one for one in fits if np.delete(self.shape(one), axis).tolist() == rest]
        given = [name, *(self.pick(fits) for _ in range(self.pick([1, 2])))]
        self.add("concat", given, lambda _, *parts: np.concatenate(parts, axis), axis=axis)

    def part(self, name: str) -> None:
        axis = self.pick(range(1, len(self.shape(name))))
        size = self.shape(name)[axis]
        cut = self.pick(range(1, size)) if size > 1 else 1
        kind = self.pick(["both", "second", "start", "step", "one"])
        if kind == "both":
            self.add("split", [name], lambda _, x: x.take(range(cut), axis), axis=axis, index=0)
            if cut < size:
                self.add("split", [name], lambda _, x: x.take(range(cut, size), axis), axis=axis, index=1)
        elif kind == "one" and len(self.shape(name)) > 2:
            self.add("split", [name], lambda _, x: x.take(cut - 1, axis), axis=axis, start=self.pick([None, cut - 1]))
        elif kind == "step":
            self.add("split", [name], lambda _, x: x.take(range(0, size, 2), axis), axis=self.pick([None, axis]))
        elif cut < size:
            facts = {"start": cut} if kind == "start" else {}
            self.add("split", [name], lambda _, x: x.take(range(cut, size), axis), axis=axis, **facts)

    def transpose(self, name: str) -> None:
        axes = self.draw(st.permutations(range(len(self.shape(name)))))
        self.add("transpose", [name], lambda _, x: x.transpose(axes), axes=self.pick([tuple(axes), None]))

    def reshape(self, name: str) -> None:
        shape = self.shape(name)
        ways: list[tuple[int, ...]] = [(shape[0], -1)]
        ways += [(*shape[:2], 1, *shape[2:]), (shape[0] * shape[1], *shape[2:])] if 2 < len(shape) < 4 else []
        ways += [(*shape[:axis], 2, size // 2, *shape[axis + 1 :]) for axis, size in enumerate(shape) if size % 2 == 0]
        ways += [(*shape[:axis], size // 2, 2, *shape[axis + 1 :]) for axis, size in enumerate(shape) if size % 2 == 0]
        wanted = self.pick([way for way in ways if len(way) <= 4])
        self.add("reshape", [name], lambda _, x: x.reshape(wanted))

    def shuffle(self, name: str) -> None:
        """The channels of several groups, one of each in turn."""
        shape = self.shape(name)
        if len(shape) == 3 and shape[1] % 2 == 0:
            self.add("reshape", [name], lambda _, x: x.reshape(shape[0], 2, -1, shape[2]))
            self.add("transpose", [self.nodes[-1].name], lambda _, x: x.transpose(0, 2, 1, 3), axes=(0, 2, 1, 3))
            self.add("reshape", [self.nodes[-1].name], lambda _, x: x.reshape(shape))
            self.conv(self.nodes[-1].name)

    def halves(self, name: str) -> None:
        """Parts along an axis, some of them left out, some twice, and in another order."""
        axis = self.pick(range(1, len(self.shape(name))))
        size = self.shape(name)[axis]
        cut = self.pick(range(1, size)) if size > 1 else 1
        parts = []
        for start, end in ((0, cut), (cut, size)):
            if start < end:
                self.add(
                    "split", [name], lambda _, x, a=start, b=end: x.take(range(a, b), axis), axis=axis, start=start
                )
                parts.append(self.nodes[-1].name)
        given = [self.pick(parts) for _ in range(self.pick([2, 3]))]
        self.add("concat", given, lambda _, *some: np.concatenate(some, axis), axis=axis)

    def move(self, name: str) -> None:
        shape = self.shape(name)
        axis = self.pick(range(1, len(shape)))
        kind = self.pick(["roll", "stack", "places", "channels", "glu"])
        if kind == "roll":
            self.add("roll", [name], lambda _, x: np.roll(x, 1, axis), axes=(axis,))
        elif kind == "stack" and len(shape) < 4:
            given = self.pick(
                [[name, name], [name], [name, self.pick([a for a in self.values if self.shape(a) == shape])]]
            )
            self.add("concat", given, lambda _, *some: np.stack(some, axis), axis=axis)
        elif kind == "glu" and shape[axis] % 2 == 0:

            def gate(_: Numbers, x: Any) -> Any:
                kept, gate = np.split(x, 2, axis)
                return kept * (1 + np.tanh(gate)) / 2

            self.add("glu", [name], gate, axis=axis)
        elif kind == "places" and len(shape) == 3 and shape[1] % 2 == 0:
            self.add("pixel_shuffle", [name], lambda _, x: x.reshape(shape[0], shape[1] // 2, -1), channel_axis=1)
        elif kind == "channels" and len(shape) == 3 and shape[2] % 2 == 0:
            self.add("pixel_shuffle", [name], lambda _, x: x.reshape(shape[0], shape[1] * 2, -1), channel_axis=1)

    def pool(self, name: str) -> None:
        axis = self.pick(range(1, len(self.shape(name))))
        kind = self.pick(["mean", "keep", "pad", "resize", "reduce"])
        if kind == "pad":
            width = [(1, 2) if one == axis else (0, 0) for one in range(len(self.shape(name)))]
            mode, value = self.pick([("constant", 0), ("edge", None)])
            facts = self.pick([{}, {"widths": tuple(width)}])
            self.add("pad", [name], lambda _, x: np.pad(x, width, mode), value=value, **facts)
        elif kind == "reduce":
            op, step = self.pick([("sum", np.sum), ("avg_pool", np.mean), ("max_pool", np.min)])
            keep = len(self.shape(name)) < 3 or self.pick([True, False])
            self.add(op, [name], lambda _, x: step(x, axis=axis, keepdims=keep), axes=(axis,))
        elif kind == "resize":
            self.add("resize", [name], lambda _, x: x.repeat(2, axis))
        elif kind == "keep" or len(self.shape(name)) < 3:
            self.add("max_pool", [name], lambda _, x: x.max(axis, keepdims=True))
        else:
            self.add("avg_pool", [name], lambda _, x: x.mean(axis))

    def norm(self, name: str) -> None:
        label = f"norm{len(self.nodes)}"
        if self.pick([True, False]):
            count = self.shape(name)[1]
            mean, scale, shift = self.random.normal(size=(3, count))
            if folded := self.pick([True, False]):
                mean, scale = np.zeros(count), np.ones(count)
                self.folded.add(label)
            variance = np.ones(count) if folded else self.random.uniform(0.5, 2, count)
            self.numbers[label] = self.norms[label] = Norm(label, mean, variance, scale, shift, 0.0)
            wide = (-1, *[1] * (len(self.shape(name)) - 2))

            def normed(n: Numbers, x: Any) -> Any:
                own = n[label]
                factor = own.scale / np.sqrt(own.variance + own.epsilon)
                return (x - own.mean.reshape(wide)) * factor.reshape(wide) + own.shift.reshape(wide)

            self.add("batch_norm", [name], normed, name=label, channel_axis=1)
            if not folded and self.pick([True, False]):
                shape = self.shape(name)
                same = [
                    one for one in self.values if len(self.shape(one)) == len(shape) and self.shape(one)[1] == count
                ]
                self.add("batch_norm", [self.pick(same)], normed, name=f"{label}@2", channel_axis=1)
        else:
            self.numbers[label] = self.random.normal(size=(2, self.shape(name)[-1]))
            facts = {"axes": (-1,), "scale": True, "shift": True}

            def step(n: Numbers, x: Any) -> Any:
                x = x - x.mean(-1, keepdims=True)
                return x / np.sqrt(x.var(-1, keepdims=True) + 0.1) * n[label][0] + n[label][1]

            self.add("layer_norm", [name], step, name=label, **facts)

    def product(self, name: str) -> None:
        size = self.shape(name)[-1]
        fits = [one for one in self.values if len(self.shape(one)) > 1 and self.shape(one)[-2] == size]
        fits = [one for one in fits if self.shape(one)[:-2] == self.shape(name)[:-2]]
        same = [one for one in self.values if self.shape(one) == self.shape(name)]

        def attend(_: Numbers, q: Any, k: Any, v: Any) -> Any:
            scores = q @ k.swapaxes(-1, -2)
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            return scores / scores.sum(-1, keepdims=True) @ v

        if fits and self.pick([True, False]):
            self.add("matmul", [name, self.pick(fits)], lambda _, x, y: x @ y)
        else:
            self.add("attention", [name, self.pick(same), self.pick(same)], attend)

    def finish(self) -> Network:
        last = [node.name for node in self.nodes[-2:]]
        for name in last:
            self.linear(name)
        ends = [self.nodes[-1].name, self.nodes[-2].name]
        ends += self.pick([[], [], [], [self.pick([node.name for node in self.nodes])]])
        for name in dict.fromkeys(ends):
            self.nodes.append(Node(f"output {name}", "output", (name,)))
        graph = Graph(tuple(self.nodes), self.norms)
        return Network("random", "NumPy", tuple(self.layers.values()), graph=graph)

    def run(self, numbers: Numbers) -> list[Any]:
        values = {"x": self.values["x"]}
        for node in self.nodes[1:]:
            if node.op != "output":
                values[node.name] = self.steps[node.name](numbers, *(values[one] for one in node.inputs))
        return [values[node.inputs[0]] for node in self.nodes if node.op == "output"]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_scaling_changes_no_graph(data: st.DataObject) -> None:
    program = Program(data.draw)
    program.pick([program.linear, program.conv])("x")
    for _ in range(data.draw(st.integers(2, 14))):
        program.grow()
    network = program.finish()
    assert network.graph is not None
    sites = find_sites(network.graph, network, program.folded)
    event(f"{min(sites.count, 12)} variables")
    own = program.numbers
    scales = np.exp2(program.random.uniform(-2, 2, sites.count))
    affines = {name: (own[name][0], own[name][1]) for name in sites.affines}
    new = scaled(sites, scales, network.layers, program.norms, affines)
    numbers = {
        **own,
        **{name: weight.reshape(own[name].shape) for name, weight in new.weights.items()},
        **{f"{name}.bias": bias for name, bias in new.biases.items()},
        **new.norms,
        **{name: np.array(affine) for name, affine in new.affines.items()},
    }
    for one, other in zip(program.run(own), program.run(numbers), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-9 * max(1.0, float(np.abs(one).max())))
