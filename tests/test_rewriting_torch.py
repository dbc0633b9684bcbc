"""New numbers in copies of PyTorch models: what comes out, what stays, and what is refused."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize, prune

from qvis import adapters
from qvis.adapters.rewritten import express
from qvis.errors import BadArgumentError, OutputError, UnsupportedModelError
from qvis.layers import Network, Norm
from qvis.rewriting import Rewriting
from qvis.running import Batch
from tests.zoo import Images, Sequences


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def seeded(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    model = make().eval()
    for module in model.modules():
        if getattr(module, "running_var", None) is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model


def drawn(network: Network, seed: int = 1) -> dict[str, np.ndarray]:
    """Random weights for every layer."""
    return {layer.name: noise(*layer.weight.shape, seed=seed + i) for i, layer in enumerate(network.layers)}


def owned(network: Network, model: Any = None) -> Rewriting:
    """The model's own numbers."""
    norms = {} if model is None else dict(adapters.graph(model).norms)
    return Rewriting(
        weights={layer.name: layer.weight.copy() for layer in network.layers},
        biases={layer.name: layer.bias() for layer in network.layers if layer.bias is not None},
        norms=norms,
    )


def frozen(model: nn.Module) -> dict[str, Any]:
    """All of a model that could change, as objects and as bytes."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        state[f"{name}!"] = (type(module), module.training, list(module.__dict__), list(module._modules))
        state[f"{name}!hooks"] = {key: list(v) for key, v in module.__dict__.items() if "hooks" in key}
        for kind in (module._parameters, module._buffers):
            for key, one in kind.items():
                if one is not None:
                    held = one.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
                    state[f"{name}.{key}"] = (id(one), one.dtype, one.requires_grad, one._version, held)
    return state


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    return all(same(a, b) for a, b in zip(one, other, strict=True))


def assert_runs_alike(model: nn.Module, batch: Batch, weights: dict[str, np.ndarray], norms: dict[str, Norm]) -> None:
    """The rewritten model computes what the runner computes with the same numbers in the original."""
    network = adapters.read(model)
    runner = adapters.runner(model, network)
    runner.place(weights, norms)
    wanted = runner.run(batch)
    before = frozen(model)
    new, notes = adapters.rewrite(model, network, Rewriting(weights=weights, norms=norms))
    assert notes == ()
    assert frozen(model) == before
    with torch.no_grad():
        result = new(*(torch.as_tensor(one) for one in batch.args))
    for one, other in zip([result] if isinstance(result, Tensor) else result, wanted, strict=True):
        # attention and recurrent layers have faster ways to compute, which are not taken while a model is watched
        np.testing.assert_allclose(one.numpy(), other, rtol=1e-4, atol=1e-4)
    for layer in adapters.read(new).layers:
        np.testing.assert_array_equal(layer.weight, weights[layer.name])


INDICES = np.random.default_rng(0).integers(0, 10, (2, 7))


@pytest.mark.parametrize(("make", "given"), [(Sequences, INDICES), (Images, noise(2, 3, 8, 8))])
def test_rewriting_with_the_models_own_numbers_changes_nothing(make: type[nn.Module], given: np.ndarray) -> None:
    model = seeded(make)
    network = adapters.read(model)
    new, notes = adapters.rewrite(model, network, owned(network, model))
    assert notes == ()
    for (name, one), (other_name, other) in zip(model.state_dict().items(), new.state_dict().items(), strict=True):
        assert name == other_name
        assert torch.equal(one, other)
        assert one.data_ptr() != other.data_ptr()
    assert same(model(torch.as_tensor(given)), new(torch.as_tensor(given)))


@pytest.mark.parametrize(("make", "given"), [(Sequences, INDICES), (Images, noise(2, 3, 8, 8))])
def test_a_rewritten_model_computes_what_the_runner_does(make: type[nn.Module], given: np.ndarray) -> None:
    model = seeded(make)
    assert_runs_alike(model, Batch((given,), size=2), drawn(adapters.read(model)), {})


@pytest.mark.parametrize("affine", [True, False])
def test_normalizations_get_the_numbers_that_the_runner_places(affine: bool) -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=affine)))
    norm = Norm("1", noise(4), noise(4) ** 2 + 0.1, noise(4, seed=2) ** 2 + 0.1, noise(4, seed=3), 1e-5)
    network = adapters.read(model)
    new, _ = adapters.rewrite(model, network, Rewriting(norms={"1": norm}))
    x = torch.from_numpy(noise(2, 3, 8, 8))
    runner = adapters.runner(model, network)
    runner.place({}, {"1": norm})
    with torch.no_grad():
        wanted = (model[0](x) - torch.tensor(norm.mean)[:, None, None]) / torch.tensor(
            norm.variance + norm.epsilon
        ).sqrt()[:, None, None] * torch.tensor(norm.scale)[:, None, None] + torch.tensor(norm.shift)[:, None, None]
        assert torch.allclose(new(x), wanted, atol=1e-5)
        np.testing.assert_allclose(new(x), runner.run(Batch((x,), size=2))[0], atol=1e-5)
    assert not torch.equal(new[1].running_mean, model[1].running_mean)


def test_a_normalization_without_a_scale_cannot_multiply_by_what_is_not_positive() -> None:
    model = seeded(lambda: nn.Sequential(nn.BatchNorm1d(2, affine=False)))
    model.append(nn.Linear(2, 2))
    norm = Norm("0", np.zeros(2), np.ones(2), np.array([1.0, -2.0]), np.zeros(2), 1e-5)
    with pytest.raises(BadArgumentError, match="multiply by -2"):
        adapters.rewrite(model, adapters.read(model), Rewriting(norms={"0": norm}))


positive = st.floats(0.01, 100)
number = st.floats(-100, 100)


@given(
    mean=number, variance=positive, scale=positive, shift=number, epsilon=st.sampled_from([1e-5, 1e-3]),
    has_scale=st.booleans(), has_shift=st.booleans(), x=number,
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_a_normalization_is_expressed_by_whatever_numbers_there_are(
    mean: float, variance: float, scale: float, shift: float, epsilon: float, has_scale: bool, has_shift: bool, x: float
) -> None:
    norm = Norm("n", *(np.array([one]) for one in (mean, variance, scale, shift)), epsilon)
    found = express(norm, 1e-4, has_scale=has_scale, has_shift=has_shift)
    assert ("scale" in found, "shift" in found) == (has_scale, has_shift)
    gain = found.get("scale", 1) / np.sqrt(found["variance"] + 1e-4)
    made = (x - found["mean"]) * gain + found.get("shift", 0)
    wanted = (x - mean) / np.sqrt(variance + epsilon) * scale + shift
    # what is added may lie in the mean, where it is as large as the numbers that cancel there
    np.testing.assert_allclose(made, wanted, rtol=1e-6, atol=1e-6 * (abs(shift) + abs(gain[0]) * (abs(x) + abs(mean))))


def test_biases_are_written_and_one_that_is_missing_is_refused() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False)))
    network = adapters.read(model)
    new, _ = adapters.rewrite(model, network, Rewriting(biases={"0": noise(4)}))
    np.testing.assert_array_equal(new[0].bias.detach(), noise(4))
    assert torch.equal(new[0].weight, model[0].weight)
    with pytest.raises(BadArgumentError, match=r"biases: '1' \(Linear\) has no bias"):
        adapters.rewrite(model, network, Rewriting(biases={"1": noise(2)}))


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LayerNorm(4)
        self.group = nn.GroupNorm(2, 4)
        self.rms = nn.RMSNorm(4)
        self.own = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.rms(self.group(self.layer(self.own(x))))


def test_factors_and_shifts_of_other_normalizations_are_written_by_node() -> None:
    model = seeded(Normed)
    network = adapters.read(model)
    names = {node.op: node.name for node in adapters.graph(model, Batch((noise(2, 4),), size=2)).nodes}
    affines = {
        names["layer_norm"]: (noise(4), noise(4, seed=1)),
        names["group_norm"]: (noise(4, seed=2), None),
        names["rms_norm"]: (noise(4, seed=3), None),
    }
    new, _ = adapters.rewrite(model, network, Rewriting(affines=affines))
    np.testing.assert_array_equal(new.layer.weight.detach(), noise(4))
    np.testing.assert_array_equal(new.layer.bias.detach(), noise(4, seed=1))
    np.testing.assert_array_equal(new.group.weight.detach(), noise(4, seed=2))
    assert torch.equal(new.group.bias, model.group.bias)
    np.testing.assert_array_equal(new.rms.weight.detach(), noise(4, seed=3))
    with pytest.raises(BadArgumentError, match="affines: 'rms' has no shift"):
        adapters.rewrite(model, network, Rewriting(affines={"rms": (None, noise(4))}))
    with pytest.raises(BadArgumentError, match="affines: 'nothing'"):
        adapters.rewrite(model, network, Rewriting(affines={"nothing": (noise(4), None)}))


@pytest.mark.parametrize("options", [{}, {"kdim": 3, "vdim": 5}])
def test_biases_of_attention_are_read_and_written_in_their_rows(options: dict[str, int]) -> None:
    model = seeded(lambda: nn.MultiheadAttention(4, 2, **options))
    model.in_proj_bias.data.normal_()
    network = adapters.read(model)
    layers = {
        layer.name.replace("_proj_weight", "")[-1]: layer for layer in network.layers if "proj_weight" in layer.name
    }
    own = model.in_proj_bias.detach().numpy()
    assert [layers[part].bias is not None for part in "qkv"] == [True] * 3
    np.testing.assert_array_equal(np.concatenate([layers[part].bias() for part in "qkv"]), own)  # type: ignore[misc]
    new, _ = adapters.rewrite(
        model, network, Rewriting(biases={layers["v"].name: noise(4), layers["q"].name: noise(4)})
    )
    np.testing.assert_array_equal(new.in_proj_bias.detach(), np.concatenate([noise(4), own[4:8], noise(4)]))
    bare = adapters.read(nn.MultiheadAttention(4, 2, bias=False))
    assert all(layer.bias is None for layer in bare.layers)


def test_tied_weights_stay_tied() -> None:
    model = seeded(Sequences)
    network = adapters.read(model)
    new, _ = adapters.rewrite(model, network, Rewriting(weights={"linear": noise(4, 4)}))
    assert new.tied.weight is new.linear.weight
    np.testing.assert_array_equal(new.tied.weight.detach(), noise(4, 4))


def test_a_view_of_a_weight_under_another_name_is_written_too() -> None:
    class Viewed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.second = nn.Linear(3, 3)
            self.second.weight = nn.Parameter(self.first.weight.data)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    model = seeded(Viewed)
    new, _ = adapters.rewrite(model, adapters.read(model), Rewriting(weights={"first": noise(3, 3)}))
    np.testing.assert_array_equal(new.second.weight.detach(), noise(3, 3))


def test_flags_hooks_and_types_of_the_original_are_those_of_the_copy() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(), nn.Linear(3, 2)).train()
    model[0].weight.requires_grad_(False)
    model[1].eval()
    model[2].double()
    calls: list[int] = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    before = frozen(model)
    new, notes = adapters.rewrite(model, adapters.read(model), Rewriting(weights={"0": noise(3, 3), "2": noise(2, 3)}))
    assert notes == ()
    assert frozen(model) == before
    assert not new[0].weight.requires_grad
    assert new[0].bias.requires_grad
    assert [module.training for module in new.modules()] == [True, True, False, True]
    assert new[2].weight.dtype == torch.float64
    new[0](torch.zeros(1, 3))
    assert calls == [1]


def test_inplace_writes_into_the_model_and_only_when_everything_is_right() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)))
    network, held, before = adapters.read(model), model[0].weight, frozen(model)
    with pytest.raises(BadArgumentError, match=r"weights: '1' has the shape \(2, 3\), got \(3, 3\)"):
        adapters.rewrite(model, network, Rewriting(weights={"0": noise(3, 3), "1": noise(3, 3)}), inplace=True)
    assert frozen(model) == before
    new, _ = adapters.rewrite(model, network, Rewriting(weights={"0": noise(3, 3)}), inplace=True)
    assert new is model
    assert model[0].weight is held
    np.testing.assert_array_equal(held.detach(), noise(3, 3))


def test_unknown_names_are_refused_with_what_is_near() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 3)))
    network = adapters.read(model)
    with pytest.raises(BadArgumentError, match="weights: no layer is called 'linear'; the model has 1 layers: '0'"):
        adapters.rewrite(model, network, Rewriting(weights={"linear": noise(3, 3)}))
    norm = Norm("bn", noise(3), noise(3), noise(3), noise(3), 1e-5)
    with pytest.raises(BadArgumentError, match="norms: no module with running statistics is called 'bn'"):
        adapters.rewrite(model, network, Rewriting(norms={"bn": norm}))


# ---------------------------------------------------------------------------------------------------------------------
# Types


def test_numbers_that_half_precision_cannot_hold_are_named() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))).bfloat16()
    network = adapters.read(model)
    own, notes = adapters.rewrite(model, network, owned(network))
    assert notes == ()
    assert all(torch.equal(a, b) for a, b in zip(own.parameters(), model.parameters(), strict=True))
    new, notes = adapters.rewrite(model, network, Rewriting(weights={"1": noise(2, 3)}))
    assert len(notes) == 1
    assert "'1'" in notes[0] or notes[0].startswith("1:")
    assert "bfloat16" in notes[0]
    assert torch.equal(new[1].weight, torch.from_numpy(noise(2, 3)).bfloat16())
    with pytest.raises(BadArgumentError, match="float16, which has no room for 1e\\+05"):
        adapters.rewrite(model.half(), network, Rewriting(weights={"1": np.full((2, 3), 1e5)}))


def test_a_weight_of_inference_mode_and_one_that_is_expanded_are_written() -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(3, 3))
    new, _ = adapters.rewrite(model, adapters.read(model), Rewriting(weights={"0": noise(3, 3)}), inplace=True)
    np.testing.assert_array_equal(new[0].weight.detach(), noise(3, 3))
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].weight = nn.Parameter(torch.ones(1, 3).expand(3, 3))
    new, _ = adapters.rewrite(model, adapters.read(model), Rewriting(weights={"0": noise(3, 3)}))
    np.testing.assert_array_equal(new[0].weight.detach(), noise(3, 3))
    assert torch.equal(model[0].weight, torch.ones(3, 3))


def test_a_weight_that_lies_otherwise_in_memory_is_written_in_its_own_layout() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(4, 6, 3))).to(memory_format=torch.channels_last)
    network = adapters.read(model)
    new, _ = adapters.rewrite(model, network, Rewriting(weights={"0": noise(6, 36)}))
    assert new[0].weight.stride() == model[0].weight.stride()
    np.testing.assert_array_equal(adapters.read(new).layers[0].weight, noise(6, 36))


# ---------------------------------------------------------------------------------------------------------------------
# Computed weights


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def _parametrized() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    parametrize.register_parametrization(model[0], "weight", Doubled())
    parametrize.register_parametrization(model[0], "bias", Doubled())
    return model


def _pruned() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    return model


COMPUTED = {
    "weight_norm": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 3)),
    "spectral_norm": lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 3)), nn.Linear(3, 3)),
    "old spectral_norm": lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(3, 3)), nn.Linear(3, 3)),
    "two of one's own": _parametrized,
    "pruned": _pruned,
}


@pytest.mark.parametrize("kind", COMPUTED)
def test_a_computed_weight_becomes_a_plain_one_in_the_copy_alone(kind: str) -> None:
    model = seeded(COMPUTED[kind])
    x = torch.from_numpy(noise(2, 3))
    wanted, before = model(x).detach(), frozen(model)
    network = adapters.read(model)
    rewriting = Rewriting(weights={"0": noise(3, 3)})
    new, notes = adapters.rewrite(model, network, rewriting)
    assert len(notes) == 1
    assert "'weight' is" in notes[0] or "'0.weight' was computed by" in notes[0]
    assert isinstance(new[0].weight, nn.Parameter)
    np.testing.assert_array_equal(new[0].weight.detach(), noise(3, 3))
    expected = model[1](functional.linear(x, torch.from_numpy(noise(3, 3)), model[0].bias))
    assert torch.equal(new(x), expected)
    assert "0.weight" in new.state_dict()
    assert not any(key.startswith("0.weight_") or "parametrizations.weight" in key for key in new.state_dict())
    assert frozen(model) == before
    assert torch.equal(model(x), wanted)
    with pytest.raises(BadArgumentError, match=r"inplace: '0.weight' is computed"):
        adapters.rewrite(model, network, rewriting, inplace=True)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_weight_norm_by_a_hook_that_was_run_is_no_obstacle() -> None:
    model = seeded(lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 3)))
    x = torch.from_numpy(noise(2, 3))
    wanted = model(x)  # leaves a weight with a history, which cannot be deep-copied
    with pytest.raises(RuntimeError):
        copy.deepcopy(model)
    network = adapters.read(model)
    same_again, notes = adapters.rewrite(model, network, Rewriting(weights={"1": network.layers[1].weight}))
    assert notes == ()
    assert torch.equal(same_again(x), wanted)
    new, _ = adapters.rewrite(model, network, Rewriting(weights={"0": noise(3, 3)}))
    assert torch.equal(new(x), model[1](functional.linear(x, torch.from_numpy(noise(3, 3)), model[0].bias)))
    assert torch.equal(model(x), wanted)


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be deep-copied


class Stubborn(nn.Module):
    """Holds what ``copy.deepcopy`` refuses, and refers to its layers in every way there is."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.numbers = (i for i in range(3))
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.listed = [self.first, {"second": self.second}]
        self.__dict__["hidden"] = self.first
        self.call = self.second.forward
        self.register_buffer("offset", torch.ones(3))
        self.last = self.first(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            return self.call(self.hidden(x)) + self.listed[0](x) + self.listed[1]["second"](x) + self.offset


def test_a_module_that_cannot_be_deep_copied_is_copied_by_its_structure() -> None:
    model = seeded(Stubborn)
    with pytest.raises(TypeError):
        copy.deepcopy(model)
    x = torch.from_numpy(noise(2, 3))
    network, wanted, before = adapters.read(model), model(x).detach(), frozen(model)
    own, notes = adapters.rewrite(model, network, owned(network))
    assert notes == ("'lock', 'numbers': cannot be copied, and is shared with the original model",)
    assert torch.equal(own(x), wanted)
    assert own.lock is model.lock
    assert own.listed[0] is own.first is own.hidden
    assert own.call.__self__ is own.second
    assert own.second.weight is own.first.weight
    assert own.offset.data_ptr() != model.offset.data_ptr()
    runner = adapters.runner(model, network)
    new, _ = adapters.rewrite(model, network, Rewriting(weights={"first": noise(3, 3)}))
    np.testing.assert_array_equal(new(x).detach(), runner.run(Batch((x,), size=2), weights={"first": noise(3, 3)})[0])
    assert frozen(model) == before
    assert torch.equal(model(x), wanted)


def test_a_copy_that_shares_its_numbers_with_the_original_is_not_written_to() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def __deepcopy__(self, memo: dict[int, Any]) -> Single:
            return self

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    model = seeded(Single)
    before = frozen(model)
    new, _ = adapters.rewrite(model, adapters.read(model), Rewriting(weights={"fc": noise(3, 3)}))
    assert new is not model
    assert frozen(model) == before
    np.testing.assert_array_equal(new.fc.weight.detach(), noise(3, 3))


def test_a_function_that_holds_on_to_the_original_is_named() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 3)))
    first = model[0]
    model.shortcut = lambda x: first(x)
    _, notes = adapters.rewrite(model, adapters.read(model), Rewriting())
    assert notes == ("'shortcut': a function that goes on to use the modules of the original model",)


# ---------------------------------------------------------------------------------------------------------------------
# Exported programs


def network_rows(network: Network, name: str) -> int:
    return next(len(layer.weight) for layer in network.layers if layer.name == name)


def test_an_exported_program_is_rewritten_in_a_copy() -> None:
    model = seeded(Images)
    x = torch.from_numpy(noise(2, 3, 8, 8))
    program = torch.export.export(model, (x,))
    network = adapters.read(program)
    held = {name: one.detach().clone() for name, one in program.state_dict.items()}
    weights = drawn(network)
    norm = Norm("norm", noise(8), noise(8) ** 2 + 0.1, noise(8, seed=2), noise(8, seed=3), 1e-5)
    rewriting = Rewriting(weights=weights, norms={"norm": norm})
    new, notes = adapters.rewrite(program, network, rewriting)
    assert notes == ()
    other, _ = adapters.rewrite(model, adapters.read(model), rewriting)
    assert torch.equal(new.module()(x), other(x))
    assert all(torch.equal(program.state_dict[name], one) for name, one in held.items())
    own, _ = adapters.rewrite(program, network, owned(network, program))
    assert torch.equal(own.module()(x), program.module()(x))
    biased = [layer.name for layer in network.layers if layer.bias is not None]
    moved = Rewriting(biases={biased[0]: noise(network_rows(network, biased[0]))})
    same = [adapters.rewrite(one, adapters.read(one), moved)[0] for one in (program, model)]
    assert torch.equal(same[0].module()(x), same[1](x))
    bare = next(layer.name for layer in network.layers if layer.bias is None)
    with pytest.raises(BadArgumentError, match="has no bias that could be written"):
        adapters.rewrite(program, network, Rewriting(biases={bare: noise(network_rows(network, bare))}))
    adapters.rewrite(program, network, rewriting, inplace=True)
    assert torch.equal(program.module()(x), other(x))


@pytest.mark.filterwarnings("ignore:The tensor attributes:UserWarning")
def test_the_program_in_a_file_is_rewritten_and_saved_anew(tmp_path: Path) -> None:
    model = seeded(Sequences)
    x = torch.from_numpy(INDICES)
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "model.pt2")
    content = (tmp_path / "model.pt2").read_bytes()
    network = adapters.read(tmp_path / "model.pt2")
    weights = drawn(network)
    new, _ = adapters.rewrite(tmp_path / "model.pt2", network, Rewriting(weights=weights))
    with pytest.raises(OutputError, match="is the file that the model came from"):
        adapters.save(new, tmp_path / "model.pt2", source=tmp_path / "model.pt2")
    assert adapters.save(new, tmp_path / "new.pt2", source=str(tmp_path / "model.pt2")) == tmp_path / "new.pt2"
    assert (tmp_path / "model.pt2").read_bytes() == content
    for layer in adapters.read(tmp_path / "new.pt2").layers:
        np.testing.assert_array_equal(layer.weight, weights[layer.name])
    assert torch.equal(torch.export.load(tmp_path / "new.pt2").module()(x), new.module()(x))
    with pytest.raises(BadArgumentError, match="inplace: the file"):
        adapters.rewrite(tmp_path / "model.pt2", network, Rewriting(weights=weights), inplace=True)


# ---------------------------------------------------------------------------------------------------------------------
# Saving


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_the_numbers_of_a_module_are_saved_alone(suffix: str, tmp_path: Path) -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(2, 5).bfloat16()))
    path = adapters.save(model, tmp_path / f"model{suffix}")
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
    found = {layer.name: layer.weight for layer in adapters.read(path).layers}
    wanted = {layer.name: layer.weight for layer in adapters.read(model).layers}
    assert sorted(found) == [f"{name}.weight" for name in wanted] or sorted(found) == sorted(wanted)
    for one, other in zip(sorted(found), sorted(wanted), strict=True):
        np.testing.assert_array_equal(found[one], wanted[other])


def test_a_safetensors_file_is_as_its_format_says(tmp_path: Path) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 2).half(), nn.BatchNorm1d(2)))
    data = adapters.save(model, tmp_path / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert (8 + size) % 8 == 0
    assert set(header) == set(model.state_dict())
    assert sorted(one["data_offsets"] for one in header.values())[-1][1] == len(data) - 8 - size
    start, end = header["0.weight"]["data_offsets"]
    held = np.frombuffer(data[8 + size + start : 8 + size + end], np.float16).reshape(2, 3)
    np.testing.assert_array_equal(held, model[0].weight.detach().numpy())
    start, end = header["1.num_batches_tracked"]["data_offsets"]
    assert header["1.num_batches_tracked"]["dtype"] == "I64"
    assert end - start == 8


def test_a_module_is_saved_as_a_program_with_an_example(tmp_path: Path) -> None:
    model = seeded(Images).train()
    before = frozen(model)
    x = noise(2, 3, 8, 8)
    path = adapters.save(model, tmp_path / "model.pt2", example=Batch((x,), size=2))
    assert frozen(model) == before
    assert torch.equal(torch.export.load(path).module()(torch.from_numpy(x)), model.eval()(torch.from_numpy(x)))
    with pytest.raises(OutputError, match="give an example"):
        adapters.save(model, tmp_path / "other.pt2")
    assert [one.name for one in tmp_path.iterdir()] == ["model.pt2"]


def test_wrong_suffixes_and_places_are_refused(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(OutputError, match=r"cannot be saved to 'model.onnx'; name it .pt2"):
        adapters.save(model, tmp_path / "model.onnx")
    with pytest.raises(OutputError, match="lies in a folder that does not exist"):
        adapters.save(model, tmp_path / "no" / "model.pt")
    with pytest.raises(OutputError, match="is a folder"):
        adapters.save(model, tmp_path)
    with pytest.raises(BadArgumentError, match="expected a model object"):
        adapters.save(tmp_path, tmp_path / "model.pt")  # type: ignore[arg-type]
    program = torch.export.export(model, (torch.zeros(1, 2),))
    with pytest.raises(OutputError, match=r"name it .pt2"):
        adapters.save(program, tmp_path / "model.pt")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_only_read(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "model.pt")
    with pytest.raises(UnsupportedModelError, match="give the model itself"):
        adapters.rewrite(tmp_path / "model.pt", adapters.read(tmp_path / "model.pt"), Rewriting())


def test_vectors_of_modules_with_a_pass_of_their_own_are_affines() -> None:
    class Own(nn.Module):
        def __init__(self, *names: str, buffers: tuple[str, ...] = ()) -> None:
            super().__init__()
            for name in names:
                self.register_parameter(name, nn.Parameter(torch.arange(3.0) + len(name)))
            for name in buffers:
                self.register_buffer(name, torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return x

    model = nn.ModuleDict({
        "factor": Own("weight"), "both": Own("weight", "bias").double(), "fixed": Own("weight", buffers=("bias",)),
        "gamma": Own("gamma"), "more": Own("weight", "other"), "prelu": nn.PReLU(3), "linear": nn.Linear(3, 3),
        "one": Own("weight"), "same": Own("weight"),
    })  # fmt: skip
    model["same"].weight = model["one"].weight
    found = adapters.affines(model)
    assert set(found) == {"factor", "both"}
    assert found["factor"][1] is None
    np.testing.assert_array_equal(found["factor"][0], np.float32([6, 7, 8]))
    assert found["both"][1].dtype == np.float64
    np.testing.assert_array_equal(found["both"][1], [4.0, 5, 6])
