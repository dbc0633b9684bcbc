"""Clips that become ReLU and Linears whose input is multiplied, in copies of PyTorch modules and programs."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from qvis import adapters
from qvis.errors import BadArgumentError
from qvis.layers import Network
from qvis.rewriting import Rewriting
from qvis.running import Batch


def noise(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(make: Callable[[], nn.Module]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()


def network_of(model: Any, *inputs: Tensor) -> Network:
    network = adapters.read(model)
    return replace(network, graph=adapters.graph(model, Batch(inputs, size=len(inputs[0])))) if inputs else network


def export(model: nn.Module, *inputs: Tensor, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(model, inputs, **options)


def ops(model: Any, *inputs: Tensor) -> list[tuple[str, str]]:
    graph = adapters.graph(model, Batch(inputs, size=len(inputs[0])))
    return [(node.name, node.op) for node in graph.nodes if node.op in ("clip", "relu", "mul", "linear")]


def run(model: Any, *inputs: Tensor) -> Tensor:
    """The output of a model as users run it, which must be what the runner finds."""
    with torch.no_grad():
        result = (model.module() if hasattr(model, "graph_signature") else model)(*inputs)
    (ran,) = adapters.runner(model, adapters.read(model)).run(Batch(inputs, size=len(inputs[0])))
    np.testing.assert_allclose(ran, result.numpy(), rtol=1e-5, atol=1e-6)
    assert isinstance(result, Tensor)
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Clips


class Capped(nn.ReLU6):
    """A class of the user's own that does what its base does."""


class Clips(nn.Module):
    """Clips of all kinds, one of which is used twice under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.act = nn.ReLU6(inplace=True)
        shared = nn.Hardtanh(0, 3)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 1), shared, nn.Conv2d(4, 4, 1), shared, Capped())
        self.plain = [self.act]
        self.tanh = nn.Hardtanh(-1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.plain[0](4 * self.conv(x)))
        return self.tanh(F.relu6(3 * self.act(x + 2)).clamp(0, 5) / 5)


def relus(model: Any) -> Any:
    """The same model with ReLU in place of the modules."""
    new = copy.deepcopy(model)
    new.act = nn.ReLU()
    new.plain = [new.act]
    new.block[1] = new.block[3] = new.block[4] = nn.ReLU()
    return new


IMAGES = (noise(2, 3, 5, 5) * 9,)


def test_clips_that_are_modules_become_relu_wherever_they_are_used() -> None:
    model = seeded(Clips)
    looked = []
    model.act.register_forward_hook(lambda *_: looked.append(1))
    model.train()
    before = run(copy.deepcopy(model).eval(), *IMAGES)
    names = ["act", "act@2", "block.1", "block.4/clip"]
    new, notes = adapters.rewrite(model, network_of(model), Rewriting(unclipped=names))
    assert notes == ()
    assert [type(one) for one in (new.act, *new.block[3:])] == [nn.ReLU] * 3
    assert new.act is new.plain[0]
    assert new.block[1] is new.block[3]
    assert new.act.inplace
    assert new.act.training
    assert not hasattr(new.act, "max_val")
    assert [type(one) for one in (model.act, *model.block[3:])] == [nn.ReLU6, nn.Hardtanh, Capped]
    assert torch.equal(run(copy.deepcopy(model).eval(), *IMAGES), before)
    looked.clear()
    assert torch.equal(run(new.eval(), *IMAGES), run(relus(model).eval(), *IMAGES))
    assert looked
    expected = [("act", "relu"), ("block.1", "relu"), ("block.3", "relu"), ("block.4", "relu"), ("act@2", "relu")]
    assert [one for one in ops(new, *IMAGES) if one[1] == "relu"] == expected
    assert repr(new.act) == "ReLU(inplace=True)"


def test_a_module_that_is_used_elsewhere_too_is_named() -> None:
    model = seeded(Clips)
    new, notes = adapters.rewrite(model, network_of(model, *IMAGES), Rewriting(unclipped=["act@2", "block.3"]))
    assert notes == (
        "'act': it is the same module as 'act@2', so that it is a ReLU now too",
        "'block.1': it is the same module as 'block.3', so that it is a ReLU now too",
    )
    assert isinstance(new.block[1], nn.ReLU)


def test_clips_that_stay_are_named() -> None:
    model = seeded(Clips)
    for network in (network_of(model), network_of(model, *IMAGES)):
        new, notes = adapters.rewrite(model, network, Rewriting(unclipped=["clip", "clip@2", "tanh"]))
        assert notes == (
            *(
                f"{name!r}: it is a clip in the code of the model, so that it stays; make it an nn.ReLU6 there, or "
                "export the model with torch.export and give the program"
                for name in ("clip", "clip@2")
            ),
            "'tanh': it begins at -1, not at 0 as a ReLU, so that it stays",
        )
        assert torch.equal(run(new, *IMAGES), run(model, *IMAGES))


def test_what_is_no_clip_is_refused() -> None:
    model = seeded(Clips)
    for network in (network_of(model), network_of(model, *IMAGES)):
        with pytest.raises(BadArgumentError, match=r"unclipped: no clip is called 'atc'; did you mean 'act'"):
            adapters.rewrite(model, network, Rewriting(unclipped=["atc"]))
        with pytest.raises(BadArgumentError, match=r"unclipped: .*'conv'"):
            adapters.rewrite(model, network, Rewriting(unclipped=["conv"]))
    with pytest.raises(BadArgumentError, match="unclipped: 'conv' is conv, no clip"):
        adapters.rewrite(export(model, *IMAGES), network_of(model), Rewriting(unclipped=["conv"]))


def test_clips_are_exchanged_in_place_and_in_a_compiled_model() -> None:
    model = seeded(Clips)
    expected = run(relus(model), *IMAGES)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(*IMAGES)
        rewriting = Rewriting(unclipped=["act", "block.1", "block.4"])
        new, _ = adapters.rewrite(compiled, network_of(model), rewriting, inplace=True)
        assert new is compiled
        assert torch.equal(compiled(*IMAGES), expected)


def programs(model: nn.Module, folder: Path, *inputs: Tensor) -> list[Any]:
    """What torch.export makes of a module: the program, one in a file, and a module of bare operations."""
    program = export(model, *inputs)
    adapters.save(program, folder / "model.pt2")
    return [program, folder / "model.pt2", program.module()]


@pytest.mark.filterwarnings("ignore:`isinstance")
def test_programs_get_relu_for_single_operations(tmp_path: Path) -> None:
    model = seeded(Clips)
    for given in programs(model, tmp_path, *IMAGES):
        network = adapters.read(given)
        names = ["act", "block.1", "clip@2", "tanh"]
        new, notes = adapters.rewrite(given, network, Rewriting(unclipped=names))
        assert notes == ("'tanh': it begins at -1.0, not at 0 as a ReLU, so that it stays",)
        clips = ["act", "block.1", "block.3", "block.4/clip", "act@2", "clip", "clip@2", "tanh"]
        now = {"clip@2": "relu"}  # the name of a module stays, that of an operation is its word
        assert [one for one in ops(new, *IMAGES) if one[1] != "mul"] == [
            (now.get(name, name), "relu" if name in names[:3] else "clip") for name in clips
        ]
        own = Clips()
        own.load_state_dict(model.state_dict())

        def forward(x: Tensor, own: Clips = own) -> Tensor:
            x = F.relu(4 * own.conv(x))
            for one in (own.block[0], nn.ReLU(), *own.block[2:]):
                x = one(x)
            return own.tanh(F.relu(F.relu6(3 * own.act(x + 2))) / 5)

        with torch.no_grad():
            torch.testing.assert_close(run(new, *IMAGES), forward(*IMAGES))
            if not isinstance(given, Path):
                torch.testing.assert_close(run(given, *IMAGES), model(*IMAGES))


# ---------------------------------------------------------------------------------------------------------------------
# Multiplications


class Twice(nn.Module):
    """Three layers, one of which is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 5), nn.Linear(5, 4, bias=False), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.gelu(self.c(self.b(F.gelu(self.a(x))))))


ROWS = (noise(3, 6),)
FACTORS = {"a": np.array([1.0, 2, 3, 0.5, 0.25, -4]), "b": np.array([4.0, 1, 0.125, 2, 3])}


def compensated(network: Network, factors: dict[str, np.ndarray] | None = None) -> Rewriting:
    """Weights divided by what their inputs are multiplied by."""
    factors = FACTORS if factors is None else factors
    weights = {layer.name: layer.weight / factors[layer.name] for layer in network.layers if layer.name in factors}
    return Rewriting(weights={name: one.astype(np.float32) for name, one in weights.items()}, multiplies=factors)


def test_what_enters_a_linear_is_multiplied_in_each_of_its_calls() -> None:
    model = seeded(Twice)
    state = {name: one.clone() for name, one in model.state_dict().items()}
    network = network_of(model, *ROWS)
    new, notes = adapters.rewrite(model, network, compensated(network))
    assert notes == (
        "a, b: what enters is multiplied by the new buffer 'input_scale', which a state dict of the model holds too",
    )
    torch.testing.assert_close(run(new, *ROWS), run(model, *ROWS))
    assert ops(new, *ROWS) == [
        ("a/mul", "mul"), ("a", "linear"), ("b/mul", "mul"), ("b", "linear"), ("c", "linear"),
        ("b/mul@2", "mul"), ("b@2", "linear"),
    ]  # fmt: skip
    assert [layer.name for layer in adapters.read(new).layers] == ["a", "b", "c"]
    assert all(isinstance(one, nn.Linear) for one in (new.a, new.b, new.c))
    assert type(model.a) is nn.Linear
    assert list(new.state_dict()) == [*list(state)[:2], "a.input_scale", "b.weight", "b.input_scale", *list(state)[3:]]
    assert all(torch.equal(one, state[name]) for name, one in model.state_dict().items())
    for twin in (copy.deepcopy(new), pickle.loads(pickle.dumps(new)), torch.jit.script(new)):
        torch.testing.assert_close(twin(*ROWS), new(*ROWS))


def test_multiplying_alone_multiplies_and_again_multiplies_more() -> None:
    model = seeded(Twice)
    network = adapters.read(model)
    new, _ = adapters.rewrite(model, network, Rewriting(multiplies=FACTORS))
    expected = copy.deepcopy(model)
    for name, factors in FACTORS.items():
        module = expected.get_submodule(name)
        module.weight.data *= torch.from_numpy(factors).float()
    torch.testing.assert_close(run(new, *ROWS), run(expected, *ROWS))
    again, notes = adapters.rewrite(new, adapters.read(new), Rewriting(multiplies=FACTORS))
    assert notes == ()
    np.testing.assert_allclose(again.a.input_scale, FACTORS["a"] ** 2)
    np.testing.assert_allclose(new.a.input_scale, FACTORS["a"])


def test_a_linear_keeps_its_parameters_hooks_type_and_flags() -> None:
    model = seeded(Twice).to(torch.float64).train()
    seen: list[Tensor] = []
    model.a.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.a.weight.requires_grad_(False)
    kept = dict(model.named_parameters())
    module = model.a
    new, _ = adapters.rewrite(model, adapters.read(model), Rewriting(multiplies=FACTORS), inplace=True)
    assert new is model
    assert new.a is module
    assert dict(model.named_parameters()) == kept
    assert all(one is kept[name] for name, one in model.named_parameters())
    assert new.a.training
    assert new.a.input_scale.dtype == torch.float64
    assert not new.a.input_scale.requires_grad
    given = ROWS[0].double()
    model(given)
    assert torch.equal(seen[-1], given)
    assert new.half().a.input_scale.dtype == torch.float16


def test_half_precision_says_what_it_rounds() -> None:
    model = seeded(Twice).to(torch.bfloat16)
    network = adapters.read(model)
    new, notes = adapters.rewrite(model, network, Rewriting(multiplies={"a": np.array([1, 2, 4, 0.5, 8, 1.0])}))
    assert new.a.input_scale.dtype == torch.bfloat16
    assert len(notes) == 1
    _, notes = adapters.rewrite(model, network, Rewriting(multiplies={"a": np.full(6, 1.001)}))
    assert "a: stored in bfloat16" in notes[1]


def test_one_module_of_two_names_is_multiplied_once_and_two_of_one_weight_both() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)))
    model[2] = model[0]
    network = adapters.read(model)
    factors = {"0": np.array([2.0, 3, 4, 5])}
    new, _ = adapters.rewrite(model, network, compensated(network, factors))
    assert new[2] is new[0]
    torch.testing.assert_close(run(new, noise(3, 4)), run(model, noise(3, 4)))
    tied = seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)))
    tied[2].weight = tied[0].weight
    network = adapters.read(tied)
    new, _ = adapters.rewrite(tied, network, compensated(network, factors))
    assert new[2].weight is new[0].weight
    torch.testing.assert_close(run(new, noise(3, 4)), run(tied, noise(3, 4)))


def test_a_weight_that_becomes_plain_can_be_multiplied() -> None:
    model = seeded(lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 5)), nn.ReLU(), nn.Linear(5, 2)))
    network = network_of(model, *ROWS)
    factors = {"0": FACTORS["a"]}
    new, _ = adapters.rewrite(model, network, compensated(network, factors))
    torch.testing.assert_close(run(new, *ROWS), run(model, *ROWS))
    with pytest.raises(BadArgumentError, match=r"multiplies: what enters '0' .* of the class Linear"):
        adapters.rewrite(model, network, Rewriting(multiplies=factors))


class Odd(nn.Module):
    """Layers that are no plain Linear, or are not called."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)
        self.own = Own(4, 4)
        self.conv = nn.Conv1d(4, 4, 1)
        self.lent = nn.Linear(4, 4)
        self.named = nn.Linear(4, 4)
        self.named.input_scale = 3
        self.tokens, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.own(x), self.lent.weight)


class Own(nn.Linear):
    """A class of the user's own."""


@pytest.mark.parametrize(
    ("name", "why"),
    {
        "nothing": "no layer is called 'nothing'",
        "attention.in_proj_weight.q": r"it is no nn.Linear \(MultiheadAttention\)",
        "attention.out_proj": "'attention.out_proj' is of the class NonDynamicallyQuantizableLinear",
        "own": "'own' is of the class Own, which may use its weight in a way of its own; leave it out",
        "conv": r"it is no nn.Linear \(Conv1d\)",
        "lent": "'lent' uses its weight without calling it",
        "named": "it has an attribute 'input_scale' of its own",
        "tokens": r"it is no nn.Linear \(Embedding\)",
        "head": r"it is no nn.Linear \(Embedding\)",
    }.items(),
)
def test_what_cannot_be_multiplied_is_refused_by_name(name: str, why: str) -> None:
    model = seeded(Odd)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(BadArgumentError, match=f"multiplies: .*{why}"):
        adapters.rewrite(model, network_of(model, noise(3, 4)), Rewriting(multiplies={name: np.ones(4)}), inplace=True)
    assert list(model.state_dict()) == list(state)


def test_what_can_be_multiplied_is_known_beforehand() -> None:
    model = seeded(Odd)
    model.plain = nn.Linear(4, 4)
    model.normed = parametrizations.weight_norm(nn.Linear(4, 4))
    assert adapters.multipliable(model, network_of(model, noise(3, 4))) == ["plain", "normed"]
    assert "lent" in adapters.multipliable(model, network_of(model))  # only the graph tells
    encoder = seeded(lambda: nn.TransformerEncoderLayer(8, 2, 12))
    assert adapters.multipliable(encoder, adapters.read(encoder)) == ["linear1", "linear2"]
    encoder.activation_relu_or_gelu = 0
    program = export(encoder, noise(2, 5, 8))
    assert adapters.multipliable(program, adapters.read(program)) == ["self_attn.out_proj", "linear1", "linear2"]


def test_wrong_numbers_are_refused() -> None:
    model = seeded(Twice)
    for given in (model, export(model, *ROWS)):
        network = adapters.read(given)
        with pytest.raises(BadArgumentError, match=r"multiplies: 'a' has the shape \(6,\), got \(5,\)"):
            adapters.rewrite(given, network, Rewriting(multiplies={"a": np.ones(5)}))
        with pytest.raises(BadArgumentError, match="multiplies: 'a' has numbers that are not finite"):
            adapters.rewrite(given, network, Rewriting(multiplies={"a": np.full(6, np.inf)}))
        with pytest.raises(BadArgumentError, match="multiplies: no layer is called 'aa'"):
            adapters.rewrite(given, network, Rewriting(multiplies={"aa": np.ones(6)}))


def test_encoder_layers_leave_the_fast_path_and_those_on_nested_tensors_are_refused() -> None:
    x = noise(2, 5, 8)
    factors = {"linear1": np.linspace(0.5, 3, 8)}
    model = seeded(lambda: nn.TransformerEncoderLayer(8, 2, 12, batch_first=True))
    network = adapters.read(model)
    new, notes = adapters.rewrite(model, network, compensated(network, factors))
    assert "(root): runs without the fast path of nn.TransformerEncoderLayer" in notes[0]
    torch.testing.assert_close(run(new, x), run(model, x), rtol=1e-4, atol=1e-5)
    whole = seeded(lambda: nn.TransformerEncoder(model, 1))
    with pytest.raises(BadArgumentError, match=r"multiplies: .* make that encoder with enable_nested_tensor=False"):
        adapters.rewrite(whole, adapters.read(whole), Rewriting(multiplies={"layers.0.linear1": np.ones(8)}))
    whole = seeded(lambda: nn.TransformerEncoder(model, 1, enable_nested_tensor=False))
    network = adapters.read(whole)
    new, _ = adapters.rewrite(whole, network, compensated(network, {"layers.0.linear1": factors["linear1"]}))
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        own, other = (one(x, src_key_padding_mask=mask) for one in (whole, new))
    torch.testing.assert_close(own[~mask], other[~mask], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`isinstance")
def test_programs_are_given_a_multiplication(tmp_path: Path) -> None:
    model = seeded(Twice)
    for given in programs(model, tmp_path, *ROWS):
        network = adapters.read(given)
        new, notes = adapters.rewrite(given, network, compensated(network))
        assert notes == tuple(
            f"{name!r}: what enters is multiplied by the new buffer '{name}.input_scale'" for name in "ab"
        )
        torch.testing.assert_close(run(new, *ROWS), run(model, *ROWS))
        assert [one for one in ops(new, *ROWS) if one[1] == "mul"] == [
            ("a/mul", "mul"), ("b/mul", "mul"), ("b/mul@2", "mul")
        ]  # fmt: skip
        assert [layer.name for layer in adapters.read(new).layers] == ["a", "b", "c"]
        again, notes = adapters.rewrite(new, adapters.read(new), Rewriting(multiplies=FACTORS), inplace=True)
        assert again is new
        assert notes == ()
        held = dict(again.state_dict if hasattr(again, "graph_signature") else again.state_dict())
        np.testing.assert_allclose(held["b.input_scale"], FACTORS["b"] ** 2)
        assert len([one for one in ops(new, *ROWS) if one[1] == "mul"]) == 3


@pytest.mark.filterwarnings("ignore:`isinstance")
def test_programs_with_a_multiplication_are_saved_and_take_other_batches(tmp_path: Path) -> None:
    model = seeded(Twice)
    program = export(model, *ROWS, dynamic_shapes=({0: torch.export.Dim("rows", min=2)},))
    network = adapters.read(program)
    new, _ = adapters.rewrite(program, network, compensated(network))
    adapters.save(new, tmp_path / "new.pt2")
    loaded = torch.export.load(tmp_path / "new.pt2")
    many = noise(7, 6)
    torch.testing.assert_close(loaded.module()(many), model(many))
    torch.testing.assert_close(new.run_decompositions().module()(many), model(many))
    assert "a.input_scale" not in program.state_dict
    torch.testing.assert_close(program.module()(many), model(many))


class Columns(nn.Module):
    """Products with parameters, written out."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v, self.bias = nn.Parameter(noise(6, 4)), nn.Parameter(noise(3, 4)), nn.Parameter(noise(3))
        self.attention = nn.MultiheadAttention(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.addmm(self.bias, (x @ self.w).tanh(), self.v.t())
        return self.attention(x, x, x)[0]


def test_products_with_parameters_are_multiplied_in_programs() -> None:
    model = seeded(Columns)
    program = export(model, *ROWS)
    network = adapters.read(program)
    factors = {"w": FACTORS["a"], "v": np.array([1, 2, 3, 0.5]), "attention.out_proj": np.array([2, 0.5, 3.0])}
    new, notes = adapters.rewrite(program, network, compensated(network, factors))
    assert "'w_input_scale'" in notes[0]
    torch.testing.assert_close(run(new, *ROWS), run(model, *ROWS), rtol=1e-4, atol=1e-5)


def test_products_that_several_layers_share_are_refused() -> None:
    model = seeded(lambda: nn.TransformerEncoderLayer(8, 2, 12))
    model.activation_relu_or_gelu = 0
    program = export(model, noise(2, 5, 8))
    network = adapters.read(program)
    with pytest.raises(
        BadArgumentError, match=r"multiplies: what enters 'self_attn.in_proj_weight.k' .* give the modu"
    ):
        adapters.rewrite(program, network, Rewriting(multiplies={"self_attn.in_proj_weight.k": np.ones(8)}))


@pytest.mark.parametrize("suffix", [".pt2", ".pt", ".safetensors"])
@pytest.mark.filterwarnings("ignore:`isinstance")
def test_a_multiplied_module_is_saved(tmp_path: Path, suffix: str) -> None:
    model = seeded(Twice)
    network = adapters.read(model)
    new, _ = adapters.rewrite(model, network, compensated(network))
    path = adapters.save(new, tmp_path / f"new{suffix}", example=Batch(ROWS, size=3))
    found = adapters.read(path)
    assert [layer.name for layer in found.layers] == ["a", "b", "c"]
    for layer, other in zip(found.layers, adapters.read(new).layers, strict=True):
        np.testing.assert_array_equal(layer.weight, other.weight)
    if suffix == ".pt2":
        torch.testing.assert_close(torch.export.load(path).module()(*ROWS), model(*ROWS))
    if suffix == ".pt":
        state = torch.load(path, weights_only=True)
        np.testing.assert_allclose(state["a.input_scale"], FACTORS["a"])
