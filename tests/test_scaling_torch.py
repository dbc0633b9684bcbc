"""What gets scales in PyTorch models, by the graphs of their own, and that they compute the same with them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from qvis import adapters
from qvis.equalization.sites import Sites, find_sites, scaled
from qvis.running import Batch

WIDTH = 8


def noise(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A model in evaluation mode, in which every parameter does something."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = make().eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.3 * torch.randn(parameter.shape))
    return model


def exported(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """As users do it, but without the one operation that hides a whole encoder layer."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(model, inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def outputs(model: Any, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.no_grad():
        run = model.module() if hasattr(model, "graph_signature") else model
        return [one for one in pytree.tree_leaves(run(*inputs)) if isinstance(one, Tensor)]


def check(model: Any, *inputs: Tensor, multiplied: Collection[str] = ()) -> Sites:
    """Scale a model by random numbers: its outputs must stay as they are, however it is run."""
    batch = Batch(inputs, size=len(inputs[0]))
    network, graph = adapters.read(model), adapters.graph(model, batch)
    affines = adapters.affines(model)
    sites = find_sites(graph, network, affines=affines, multiplied=multiplied)
    scales = np.exp(np.random.default_rng(0).normal(0, 0.5, sites.count))
    new, _ = adapters.rewrite(model, network, scaled(sites, scales, network.layers, affines=affines))
    own, other = outputs(model, inputs), outputs(new, inputs)
    largest = max(float(one.abs().max()) for one in own)
    assert max(float((a - b).abs().max()) for a, b in zip(own, other, strict=True)) <= 1e-5 * largest
    ran = adapters.runner(new, adapters.read(new)).run(batch)
    np.testing.assert_allclose(ran[0], own[0].numpy(), rtol=0, atol=1e-5 * largest)
    return sites


def both(model: nn.Module, *inputs: Tensor, multiplied: Collection[str] = ()) -> list[tuple[str, str, int]]:
    """The sites of a module, which must be those of the program that is made of it."""
    found = [
        [(" ".join(one.producers), " ".join(one.consumers), one.channels) for one in sites.sites]
        for sites in (
            check(model, *inputs, multiplied=multiplied),
            check(exported(model, inputs), *inputs, multiplied=multiplied),
        )
    ]
    assert found[0] == found[1]
    return found[0]


class Flow(nn.Module):
    """Modules in a flow that the test gives."""

    def __init__(self, flow: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.flow = flow

    def forward(self, *inputs: Tensor) -> Any:
        return self.flow(self, *inputs)


# ---------------------------------------------------------------------------------------------------------------------
# Attention


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("options", [{"batch_first": True}, {}, {"bias": False}, {"add_zero_attn": True}])
def test_the_values_of_attention_are_scaled(options: dict[str, bool], weighed: bool) -> None:
    attention = nn.MultiheadAttention(WIDTH, 2, **options)
    model = made(lambda: Flow(lambda m, x: m.a(x, x, x, need_weights=weighed), a=attention))
    sites = both(model, noise(2, 5, WIDTH))
    assert sites == ([] if "add_zero_attn" in options else [("a.in_proj_weight.v", "a.out_proj", WIDTH)])


def test_attention_to_something_else_is_scaled() -> None:
    attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
    model = made(lambda: Flow(lambda m, x, y: m.a(x, y, y)[0], a=attention))
    assert both(model, noise(2, 5, WIDTH), noise(2, 3, WIDTH)) == [("a.in_proj_weight.v", "a.out_proj", WIDTH)]
    model = made(lambda: Flow(lambda m, x, y: m.a(x, y, 2 * y)[0], a=attention))
    assert both(model, noise(2, 5, WIDTH), noise(2, 3, WIDTH)) == [("a.in_proj_weight.v", "a.out_proj", WIDTH)]


def test_attention_with_weights_of_their_own_is_scaled() -> None:
    attention = nn.MultiheadAttention(WIDTH, 2, kdim=6, vdim=4, batch_first=True)
    model = made(lambda: Flow(lambda m, x, k, v: m.a(x, k, v)[0], a=attention))
    sites = both(model, noise(2, 5, WIDTH), noise(2, 3, 6), noise(2, 3, 4))
    assert sites == [("a.v_proj_weight", "a.out_proj", WIDTH)]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_encoder_layers_are_scaled_and_run_on_the_fast_path(first: bool, batch_first: bool) -> None:
    model = made(lambda: nn.TransformerEncoderLayer(WIDTH, 2, 12, norm_first=first, batch_first=batch_first))
    packed = [f"self_attn.in_proj_weight.{part}" for part in "qkv"]
    inside = [(packed[2], "self_attn.out_proj", WIDTH), ("linear1", "linear2", 12)]
    around = [("norm1", " ".join(packed), WIDTH), ("norm2", "linear1", WIDTH)]
    assert sorted(both(model, noise(2, 5, WIDTH))) == sorted(inside + (around if first else []))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_a_whole_transformer_is_scaled() -> None:
    model = made(lambda: nn.Transformer(WIDTH, 2, 2, 2, 12, batch_first=True, norm_first=True))
    sites = check(model, noise(2, 5, WIDTH), noise(2, 3, WIDTH))
    producers = [name for site in sites.sites for name in site.producers]
    for layer in ("encoder.layers.1.self_attn", "decoder.layers.1.self_attn", "decoder.layers.1.multihead_attn"):
        assert f"{layer}.in_proj_weight.v" in producers
    assert {"encoder.layers.0.norm1", "encoder.norm", "decoder.layers.0.norm3"} <= set(producers)


def heads(x: Tensor) -> Tensor:
    return x.reshape(*x.shape[:2], 2, 4).transpose(1, 2)


def mixed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(heads(q), heads(k), heads(v)).transpose(1, 2).flatten(2)


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax(heads(q) @ heads(k).transpose(-2, -1) * 0.5, -1)
    return (weights @ heads(v)).transpose(1, 2).flatten(2)


def folded_heads(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).reshape(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4).reshape(3, -1, x.shape[1], 4).unbind(0)
    weights = ((q * 0.5) @ k.transpose(-2, -1)).softmax(-1)
    return m.o((weights @ v).view(-1, 2, x.shape[1], 4).permute(0, 2, 1, 3).reshape(x.shape))


def sliced(m: Any, x: Tensor) -> Tensor:
    y = m.qkv(x)
    return m.o(mixed(y[..., :8], y[..., 8:16], y[..., -8:]))


def indexed(m: Any, x: Tensor) -> Tensor:
    y = m.qkv(x).reshape(*x.shape[:2], 3, 8).permute(2, 0, 1, 3)
    return m.o(mixed(y[0], y[1], y[2]))


def selected(m: Any, x: Tensor) -> Tensor:
    y = m.qkv(x).unflatten(-1, (3, 8))
    return m.o(mixed(*(y.select(2, i - 3) for i in range(3))))


def functional(m: Any, x: Tensor) -> Tensor:
    parts = zip(m.qkv.weight.chunk(3), m.qkv.bias.chunk(3), strict=True)
    return m.o(mixed(*(F.linear(x, weight, bias) for weight, bias in parts)))


PACKED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "chunk": lambda m, x: m.o(mixed(*m.qkv(x).chunk(3, -1))),
    "by hand": lambda m, x: m.o(by_hand(*m.qkv(x).chunk(3, dim=-1))),
    "split": lambda m, x: m.o(mixed(*m.qkv(x).split(8, -1))),
    "split into sizes": lambda m, x: m.o(by_hand(*m.qkv(x).split([8, 8, 8], 2))),
    "tensor_split": lambda m, x: m.o(by_hand(*torch.tensor_split(m.qkv(x), 3, 2))),
    "slices": sliced,
    "narrow": lambda m, x: m.o(mixed(*(m.qkv(x).narrow(2, start, 8) for start in (0, 8, 16)))),
    "unbind": lambda m, x: m.o(mixed(*m.qkv(x).reshape(*x.shape[:2], 3, 8).unbind(2))),
    "index": indexed,
    "select": selected,
    "heads in one axis": folded_heads,
    "functional": functional,
}


@pytest.mark.parametrize("name", PACKED)
def test_the_values_of_a_packed_projection_are_scaled(name: str) -> None:
    model = made(lambda: Flow(PACKED[name], qkv=nn.Linear(WIDTH, 24), o=nn.Linear(8, WIDTH)))
    expected = [] if name == "functional" else [("qkv", "o", 8)]
    assert both(model, noise(2, 5, WIDTH)) == expected


# ---------------------------------------------------------------------------------------------------------------------
# Normalizations by numbers of their own input


class ChannelsLast(nn.LayerNorm):
    """A layer normalization of images."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class Centered(nn.RMSNorm):
    """One whose factor is stored less one."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (8,), 1 + self.weight, 1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.GroupNorm(2, 6),
        lambda: nn.InstanceNorm2d(6, affine=True),
        lambda: nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
        lambda: ChannelsLast(6),
    ],
)
def test_normalizations_of_images_take_the_scales_of_what_follows(make: Callable[[], nn.Module]) -> None:
    model = made(lambda: nn.Sequential(nn.Conv2d(4, 6, 1), make(), nn.ReLU(), nn.Conv2d(6, 3, 1)))
    assert both(model, noise(2, 4, 8, 8)) == [("1", "3", 6)]


def test_a_group_normalization_says_what_it_has() -> None:
    for norm, has in ((nn.GroupNorm(2, 4, affine=False), False), (nn.GroupNorm(2, 4), True)):
        model = made(lambda norm=norm: nn.Sequential(nn.Conv2d(4, 4, 1), norm, nn.Conv2d(4, 2, 1)))  # type: ignore[misc]
        for graph in (adapters.graph(model, Batch((noise(2, 4, 8, 8),))), adapters.graph(model)):
            assert graph.by_name["1"].attributes == {"channel_axis": 1, "scale": has, "shift": has}
        assert list(adapters.affines(model)) == (["1"] if has else [])


def test_factors_that_something_else_needs_stay() -> None:
    tied = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    tied[2].weight = tied[0].weight
    assert adapters.affines(tied) == {}
    assert check(made(lambda: tied), noise(3, 8)).count == 0
    centered = made(lambda: nn.Sequential(nn.Linear(4, 8), Centered(8), nn.Linear(8, 2)))
    assert both(centered, noise(3, 4)) == []
    lent = made(
        lambda: Flow(
            lambda m, x: m.c(F.layer_norm(m.b(m.norm(x)), (8,), m.norm.weight, m.norm.bias)),
            norm=nn.LayerNorm(8),
            b=nn.Linear(8, 8),
            c=nn.Linear(8, 2),
        )
    )
    assert both(lent, noise(3, 8)) == []


def test_a_bias_that_is_not_the_layers_own_stops_a_scale() -> None:
    def flow(m: Any, x: Tensor) -> Tensor:
        return m.c(F.linear(F.relu(F.linear(x, m.a.weight, m.lent)), m.b.weight, m.b.bias))

    model = Flow(flow, a=nn.Linear(6, 5), b=nn.Linear(5, 4), c=nn.Linear(4, 2))
    model.lent = nn.Parameter(torch.ones(5))
    model = made(lambda: model)
    graph = adapters.graph(model, Batch((noise(3, 6),)))
    assert [(node.name, node.op) for node in graph.nodes][1:3] == [("a", "linear"), ("a/add", "add")]
    sites = check(model, noise(3, 6))
    assert [(one.producers, one.consumers) for one in sites.sites] == [(("b",), ("c",))]


# ---------------------------------------------------------------------------------------------------------------------
# Multiplications before a Linear


def test_a_multiplication_sets_free_what_enters_a_layer() -> None:
    def residual(m: Any, x: Tensor) -> Tensor:
        x = m.first(x)
        return x + m.down(F.gelu(m.up(x)))

    parts = {"first": nn.Linear(6, 8), "up": nn.Linear(8, 12), "down": nn.Linear(12, 8)}
    model = made(lambda: Flow(residual, **parts))
    assert both(model, noise(3, 6)) == []
    assert both(model, noise(3, 6), multiplied=["up", "down"]) == [("", "up", 8), ("", "down", 12)]


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_multiplication_in_an_encoder_layer_is_done_in_evaluation_mode_too(batch_first: bool) -> None:
    model = made(lambda: nn.TransformerEncoderLayer(WIDTH, 2, 12, batch_first=batch_first))
    sites = check(model, noise(2, 5, WIDTH), multiplied=["linear1", "linear2"])
    assert set(sites.multiplied) == {"linear1", "linear2"}


# ---------------------------------------------------------------------------------------------------------------------
# Programs of other kinds


@pytest.mark.filterwarnings("ignore:`isinstance")
def test_a_program_of_core_operations_is_scaled_too() -> None:
    parts = [nn.Conv2d(4, 6, 1), nn.GroupNorm(2, 6), nn.ReLU(), nn.Conv2d(6, 3, 1), nn.ReLU(), nn.Flatten()]
    model = made(lambda: nn.Sequential(*parts, nn.Linear(48, 7), nn.ReLU(), nn.Linear(7, 2)))
    program = exported(model, (noise(2, 4, 4, 4),)).run_decompositions()
    assert {"addmm", "native_group_norm", "convolution"} <= {node.name for node in program.graph.nodes}
    sites = check(program, noise(2, 4, 4, 4))
    assert [(one.producers, one.consumers) for one in sites.sites] == [
        (("1",), ("3",)), (("3",), ("6",)), (("6",), ("8",))
    ]  # fmt: skip


def test_a_program_that_takes_any_batch_is_scaled_like_its_module() -> None:
    model = made(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Unflatten(1, (2, 4)), nn.Linear(4, 3)))
    given = (noise(3, 6),)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, given, dynamic_shapes=({0: torch.export.Dim("rows", min=2)},))
    graph = adapters.graph(program)
    assert [node.shape for node in graph.nodes][:3] == [(3, 6), (3, 8), (3, 8)]
    assert [one.channels for one in check(program, *given).sites] == [4]
    assert [one.channels for one in check(model, *given).sites] == [4]
