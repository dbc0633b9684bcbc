"""Inputs that are made up for a PyTorch model without data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qvis import adapters
from qvis.adapters.digits import load_digits_model
from qvis.running import Batch
from tests.test_runner_torch import assert_same, globals_now, made, noise, of, seeded, snapshot


def misfit(model: nn.Module, inputs: Tensor) -> float:
    """How far each BatchNorm's input is from its running statistics, found with hooks."""
    found: list[Tensor] = []

    def hook(norm: Any, args: tuple[Tensor]) -> None:
        x, deviation = args[0], norm.running_var.sqrt()
        mean, std = x.mean((0, 2, 3)), x.std((0, 2, 3), correction=0)
        off = ((mean - norm.running_mean) / deviation).square() + (std / deviation - 1).square()
        found.append(off.clamp_max(100).mean())

    hooks = [one.register_forward_pre_hook(hook) for one in model.modules() if isinstance(one, nn.BatchNorm2d)]
    with torch.no_grad():
        model(inputs)
    for one in hooks:
        one.remove()
    return float(torch.stack(found).mean())


def test_made_up_inputs_come_near_to_what_the_normalizations_remember() -> None:
    model = load_digits_model()
    before, settings = snapshot(model), globals_now()
    batches, how = made(model).imitate(of(np.zeros((1, 1, 8, 8), np.float32)), 17)
    assert_same(before, snapshot(model))
    assert settings == globals_now()
    assert sum(one.size for one in batches) == 17
    assert "the statistics of 17 normalizations" in how
    for batch in batches:
        (x,) = batch.args
        assert (x.shape, x.dtype, x.requires_grad, x.grad) == ((batch.size, 1, 8, 8), torch.float32, False, None)
    plain = misfit(model, torch.from_numpy(noise(16, 1, 8, 8)))
    assert misfit(model, batches[0].args[0]) < 0.02 * plain


def test_the_same_seed_gives_the_same_inputs() -> None:
    runner, example = made(seeded(Writes)), of(np.zeros((1, 1, 5, 5), np.float32))
    one, two, other = (runner.imitate(example, 2, seed)[0][0].args[0] for seed in (3, 3, 4))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


class Tokens(nn.Module):
    """Words of two tables, a mask, an option, and a real input."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.kinds, self.head = nn.Embedding(50, 4), nn.Embedding(2, 4), nn.Linear(4, 3)

    def forward(self, ids: Tensor, more: Any, *, mask: Tensor, mode: str, scale: Tensor) -> Tensor:
        assert mode == "x"
        x = self.words(ids.view(ids.shape[0], -1)) + self.kinds(more["kinds"]) + more["extra"][0]
        return self.head((x * mask[..., None]).mean(1)) * scale


def test_numbers_of_rows_stay_within_their_table() -> None:
    ids = np.zeros((2, 6), np.int64)
    named = {"mask": np.zeros((2, 6), np.int32), "mode": "x", "scale": np.float64(2)}
    example = Batch((ids, {"kinds": ids, "extra": [np.zeros((2, 6, 4), np.float64)]}), named, None, 2)
    runner = made(seeded(Tokens))
    batches, how = runner.imitate(example, 40)
    assert how == "noise, since the model has no normalization that remembers its data"
    words = torch.cat([one.args[0] for one in batches])
    assert (words.shape, words.dtype) == ((40, 6), torch.int64)
    assert 40 < words.max() < 50
    kinds = torch.cat([one.args[1]["kinds"] for one in batches])
    assert set(kinds.flatten().tolist()) == {0, 1}
    for one in batches:
        assert one.kwargs["mode"] == "x"
        assert one.kwargs["mask"].dtype == torch.int32
        assert one.kwargs["mask"].all()
        assert one.args[1]["extra"][0].dtype == torch.float64
        assert runner.run(one)[0].shape == (one.size, 3)


@pytest.mark.parametrize("kind", [np.uint8, np.bool_])
def test_bytes_are_of_all_values_and_masks_let_all_through(kind: Any) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    model.register_forward_pre_hook(lambda _, args: (args[0].float() / 255,))
    (batch,), _ = made(model).imitate(of(np.zeros((1, 4, 4), kind)), 16)
    values = batch.args[0]
    assert values.dtype == torch.as_tensor(np.zeros(1, kind)).dtype
    assert values.all() if kind is np.bool_ else values.float().std() > 50


def test_a_model_for_one_sample_gets_one_at_a_time() -> None:
    model = nn.Sequential(nn.Unflatten(0, (1, 1)), nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    batches, how = made(model).imitate(of(noise(1, 3, 3)), 3)
    assert [one.size for one in batches] == [1, 1, 1]
    assert "shaped" in how


class Writes(nn.Module):
    """Writes to its input, under no_grad, before a normalization."""

    def __init__(self, cut: bool = False) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)
        self.cut = cut
        self.norm.running_mean += 1

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2).clamp_(-5, 5)
        return self.norm(self.conv(x.detach() if self.cut else x))


def test_inputs_are_shaped_through_what_a_model_writes_in_place() -> None:
    model = seeded(Writes)
    (batch,), how = made(model).imitate(of(noise(1, 1, 5, 5)), 16)
    assert "shaped" in how
    plain, model = batch.args[0].clone(), model.eval()
    assert misfit(model, plain) < 0.5 * misfit(model, torch.from_numpy(noise(16, 1, 5, 5)))


def test_a_model_without_derivative_by_its_inputs_gets_noise() -> None:
    (batch,), how = made(seeded(lambda: Writes(cut=True))).imitate(of(noise(1, 1, 5, 5)), 16)
    assert how == "noise, since the model cannot be differentiated by its inputs"
    assert 0.8 < float(batch.args[0].std()) < 1.2


def test_half_precision_and_frozen_models_are_served() -> None:
    model = load_digits_model().to(torch.bfloat16).requires_grad_(False)
    before = snapshot(model)
    batches, _ = adapters.runner(model, adapters.read(model)).imitate(of(np.zeros((1, 1, 8, 8), np.float16)), 2)
    assert batches[0].args[0].dtype == torch.float32
    assert_same(before, snapshot(model))
