"""What changes the function a little: absorbed and corrected biases, and the means that they rest on."""

from __future__ import annotations

import copy
from math import inf

import numpy as np
import pytest
import torch
from torch import nn

import qvis
from qvis.equalization.expectations import Moments, clipped, expect
from qvis.errors import BadArgumentError
from qvis.layers import Graph, Node, Norm

BITS = 4


@pytest.mark.parametrize(("low", "high"), [(0, inf), (0, 6), (-inf, 1), (-1, 1), (-inf, inf)])
@pytest.mark.parametrize(("mean", "deviation"), [(0, 1), (2, 0.5), (-3, 2), (5, 4), (1.5, 0)])
def test_moments_of_clipped_normal_numbers_are_those_of_a_numerical_integral(
    mean: float, deviation: float, low: float, high: float
) -> None:
    found = clipped(Moments(np.array([mean]), np.array([deviation**2])), low, high)
    x = np.linspace(-12, 12, 200_001)
    density = np.exp(-(x**2) / 2)
    values = np.clip(mean + deviation * x, low, high)
    expected = float((values * density).sum() / density.sum())
    variance = float((np.square(values - expected) * density).sum() / density.sum())
    assert found.mean[0] == pytest.approx(expected, abs=1e-4)
    assert found.variance[0] == pytest.approx(variance, abs=1e-3)


def test_means_follow_a_graph_as_far_as_they_are_known() -> None:
    norm = Norm("norm", np.zeros(2), np.ones(2), np.array([2.0, -1.0]), np.array([1.0, 3.0]), 1e-5)
    nodes = (
        Node("x", "input"),
        Node("norm", "batch_norm", ("x",), attributes={"channel_axis": 1}, shape=(1, 2, 4, 4)),
        Node("relu", "relu", ("norm",), shape=(1, 2, 4, 4)),
        Node("sum", "add", ("relu", "norm"), shape=(1, 2, 4, 4)),
        Node("pool", "avg_pool", ("sum",), shape=(1, 2, 1, 1)),
        Node("flat", "flatten", ("pool",), shape=(1, 2)),
        Node("wide", "flatten", ("sum",), shape=(1, 32)),
        Node("gelu", "gelu", ("norm",), shape=(1, 2, 4, 4)),
        Node("more", "add", ("norm", "gelu"), shape=(1, 2, 4, 4)),
    )
    found = expect(Graph(nodes, {"norm": norm}))
    assert set(found) == {"norm", "relu", "sum", "pool", "flat"}
    np.testing.assert_allclose(found["norm"].mean, [1, 3])
    np.testing.assert_allclose(found["norm"].variance, [4, 1])
    np.testing.assert_allclose(found["flat"].mean, found["relu"].mean + found["norm"].mean)
    assert set(expect(Graph(nodes, {"norm": norm}), without=["norm"])) == set()


class Biased(nn.Module):
    """Convolutions whose inputs are far from zero, so that rounding moves the mean of what they put out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(2, 6, 1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 8, 1)
        self.again = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 3)
        with torch.no_grad():
            self.norm.bias.fill_(4.0)
            self.norm.weight.fill_(0.5)
            self.norm.running_var.fill_(0.6)
            self.norm.eval()
            for _ in range(200):  # the statistics are those of what goes through
                x = torch.relu(self.norm(self.first(torch.randn(32, 2, 5, 5))))
                self.again(self.second(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.head(torch.relu(self.again(self.second(x))).mean((2, 3)))


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((32, 2, 5, 5)).astype(np.float32)


def outputs(model: nn.Module, images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model(torch.from_numpy(images)))


def rounded(model: nn.Module, stretch: float = 1.0) -> nn.Module:
    new = copy.deepcopy(model)
    with torch.no_grad():
        for module in new.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                step = stretch * module.weight.abs().max() / (2 ** (BITS - 1) - 1)
                module.weight.copy_((module.weight / step).round() * step)
    return new


@pytest.mark.parametrize("means", ["inputs", "analytic"])
def test_corrected_biases_take_the_mean_of_the_error_out_measured_by_hand(images: np.ndarray, means: str) -> None:
    model = Biased().eval()
    plain = qvis.equalize(model, images, bits=BITS, seed=1)
    corrected = qvis.equalize(model, images, bits=BITS, seed=1, correct_biases=means)
    (step,) = corrected.steps
    assert step.kind == "bias correction"
    assert step.kept
    assert step.before is not None
    assert step.after is not None
    assert step.after.mean < step.before.mean
    assert "kept" in str(step)
    exact = outputs(model, images)

    def damage(one: nn.Module) -> float:
        return float(np.square(outputs(rounded(one), images) - exact).mean())

    assert damage(corrected.model) < damage(plain.model)
    np.testing.assert_allclose(outputs(plain.model, images), exact, atol=1e-5)
    assert np.abs(outputs(corrected.model, images) - exact).max() > 1e-4


def test_the_correction_of_a_layer_is_its_rounding_error_times_the_mean_of_its_input() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3)).eval()
    x = np.random.default_rng(0).normal(1.0, 1.0, (64, 4)).astype(np.float32)
    found = qvis.equalize(model, x, bits=2, samples=64, correct_biases="inputs")
    assert found.steps[0].kept
    weight = model[0].weight.detach().numpy()
    step = np.abs(weight).max()
    error = np.rint(weight / step) * step - weight
    expected = model[0].bias.detach().numpy() - error @ x.mean(axis=0)
    np.testing.assert_allclose(found.model[0].bias.detach().numpy(), expected, rtol=1e-4, atol=1e-6)


def test_a_model_without_biases_has_nothing_to_correct(images: np.ndarray) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 1, bias=False), nn.Flatten(), nn.Linear(100, 3, bias=False)).eval()
    (step,) = qvis.equalize(model, images, correct_biases="inputs").steps
    assert not step.kept
    assert "Nothing to correct" in str(step)


def test_high_biases_are_absorbed_where_activations_are_rounded_and_that_helps(images: np.ndarray) -> None:
    model = Biased().eval()
    with torch.no_grad():
        model.norm.bias.copy_(torch.tensor([9.0, 4.0, 3.0, 8.0, 2.0, 1.0]))
        model.norm.weight.fill_(0.1)
    found = qvis.equalize(model, images, bits=8, activations=True, absorb_biases=True)
    (step,) = found.steps
    assert step.kind == "absorption"
    assert step.kept, str(step)
    exact = outputs(model, images)
    assert np.abs(outputs(found.model, images) - exact).max() / np.abs(exact).max() < 0.01
    # what enters the second convolution is a part of what it was
    grabbed: list[float] = []
    for one in (model, found.model):
        one.second.register_forward_pre_hook(lambda _, given: grabbed.append(float(given[0].max())))
        outputs(one, images)
    scale = np.exp(max(np.abs(np.log(pair.scales)).max() for pair in found.pairs)) if found.pairs else 1.0
    assert grabbed[-1] < grabbed[0] * scale / 2


def test_nothing_is_taken_from_a_bias_that_the_next_layer_cannot_give_back(images: np.ndarray) -> None:
    model = Biased().eval()
    with torch.no_grad():
        model.norm.bias.fill_(9.0)
    model.second = nn.Conv2d(6, 8, 1, bias=False)
    model.again = nn.Identity()
    (step,) = qvis.equalize(model, images, activations=True, absorb_biases=True).steps
    assert not step.kept
    assert step.before is None


def test_where_no_bias_is_high_nothing_is_absorbed(images: np.ndarray) -> None:
    model = Biased().eval()
    with torch.no_grad():
        model.norm.bias.zero_()
    (step,) = qvis.equalize(model, images, activations=True, absorb_biases=True).steps
    assert not step.kept
    assert "high enough" in str(step)


def test_options_that_need_others_say_so(images: np.ndarray) -> None:
    model = Biased().eval()
    with pytest.raises(BadArgumentError, match=r"absorb_biases: .* give activations=True"):
        qvis.equalize(model, images, absorb_biases=True)
    with pytest.raises(BadArgumentError, match="correct_biases: got 'data'"):
        qvis.equalize(model, images, correct_biases="data")
    with pytest.raises(BadArgumentError, match="multiply: it needs the noise model"):
        qvis.equalize(model, images, multiply="head", method="square root")
    with pytest.raises(BadArgumentError, match="multiply: 'first' is no Linear"):
        qvis.equalize(model, images, multiply="first")
    with pytest.raises(BadArgumentError, match="correct_biases: whether it helps shows on inputs only"):
        qvis.equalize(model, method="square root", correct_biases="analytic")


class Clipped(nn.Module):
    """Convolutions whose channels differ a hundredfold, with a ReLU6 between that never clips."""

    def __init__(self, size: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.clip, self.second = nn.Conv2d(2, 8, 1), nn.ReLU6(), nn.Conv2d(8, 3, 1)
        with torch.no_grad():
            factors = torch.logspace(-2, 0, 8)
            self.first.weight.mul_(size * factors[:, None, None, None])
            self.first.bias.mul_(size * factors)
            self.second.weight.div_(factors[:, None, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.clip(self.first(x))).mean((2, 3))


def test_relu_takes_the_place_of_relu6_where_that_helps(images: np.ndarray) -> None:
    model = Clipped().eval()
    assert not qvis.equalize(model, images).accepted
    found = qvis.equalize(model, images, replace_relu6=True)
    (step,) = found.steps
    assert step.kept
    assert found.accepted
    assert isinstance(found.model.clip, nn.ReLU)
    assert isinstance(model.clip, nn.ReLU6)
    assert [pair.through for pair in found.pairs] == [("relu",)]
    assert found.verification.gain_db() > 10
    np.testing.assert_allclose(outputs(found.model, images), outputs(model, images), atol=1e-5)


def test_relu6_stays_where_its_clipping_matters(images: np.ndarray) -> None:
    found = qvis.equalize(Clipped(20).eval(), images, replace_relu6=True)
    (step,) = found.steps
    assert not step.kept
    assert "left out" in str(step)
    assert isinstance(found.model.clip, nn.ReLU6)
    assert not found.accepted
    without = nn.Sequential(nn.Linear(4, 3)).eval()
    found = qvis.equalize(without, np.ones((4, 4), np.float32), replace_relu6=True)
    assert "has no ReLU6" in str(found.steps[0])


def test_a_relu6_that_is_called_as_a_function_is_named_with_the_way_out(images: np.ndarray) -> None:
    class Functional(Clipped):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(nn.functional.relu6(self.first(x))).mean((2, 3))

    (step,) = qvis.equalize(Functional().eval(), images, replace_relu6=True).steps
    assert not step.kept
    assert "0 clips of 1" in str(step)
    assert "nn.ReLU6" in str(step)


class Block(nn.Module):
    """An MLP of a transformer: nothing before its second Linear can take the inverse of a scale."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.head = nn.Linear(6, 16), nn.Linear(16, 6), nn.Linear(6, 3)
        with torch.no_grad():
            self.up.weight.mul_(2)
            self.down.weight.mul_(torch.logspace(-1.5, 1, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x + self.down(torch.sigmoid(self.up(x))))


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((32, 5, 6)).astype(np.float32)


def test_a_multiplication_is_offered_with_what_it_brings_and_costs(tokens: np.ndarray) -> None:
    model = Block().eval()
    plain = qvis.equalize(model, tokens)
    offer = plain.offers[0]
    assert offer.layer == "down"
    assert offer.after < offer.before / 3
    assert offer.share > 0.3
    assert offer.multiplications == 5 * 16
    assert offer.cost == pytest.approx(16 / (6 * 16 + 16 * 6 + 6 * 3))
    assert "down" in str(offer)
    assert all(pair.producers for pair in plain.pairs)


@pytest.mark.parametrize("chosen", ["offered", "down", ["d*n"]])
def test_a_multiplication_that_was_asked_for_is_inserted_and_helps(tokens: np.ndarray, chosen: str) -> None:
    model = Block().eval()
    found = qvis.equalize(model, tokens, multiply=chosen)
    assert found.accepted
    assert ((), ("down",)) in [(pair.producers, pair.consumers) for pair in found.pairs]
    np.testing.assert_allclose(outputs(found.model, tokens), outputs(model, tokens), atol=2e-6)
    assert found.verification.gain_db() > 5
    assert found.verification.gain_db() > qvis.equalize(model, tokens).verification.gain_db() + 3
    assert type(model.down) is nn.Linear
    assert "down" not in [offer.layer for offer in found.offers]


def test_the_best_multiplication_for_one_grid_is_found_in_closed_form() -> None:
    from qvis.equalization.offers import _damages
    from qvis.equalization.scales import optimal_scales
    from qvis.equalization.terms import LayerTerm
    from qvis.noise import WeightGrid

    magnitude, importance = np.exp(np.random.default_rng(0).normal(size=(2, 5, 7)))
    term = LayerTerm("down", np.full(5, -1), np.arange(7), magnitude, importance)
    for granularity in ("tensor", "channel"):
        best = optimal_scales(7, [term], [], 8, granularity)
        before, after = _damages(magnitude, importance, WeightGrid(8, granularity))
        assert before == pytest.approx(best.before.total)
        assert best.after.total * 0.995 <= after <= best.before.total
        if granularity == "tensor":
            assert after == pytest.approx(best.after.total, rel=0.01)


def test_without_inputs_the_rule_scales_and_nothing_is_claimed(images: np.ndarray) -> None:
    model = Clipped().eval()
    model.clip = nn.ReLU()
    found = qvis.equalize(model, method="square root")
    assert found.verification is None
    assert "unseen" in found.verdict
    np.testing.assert_allclose(outputs(found.model, images), outputs(model, images), atol=1e-5)
    (pair,) = found.pairs
    made = model.first.weight.detach().abs().amax((1, 2, 3)).numpy()
    taken = model.second.weight.detach().abs().amax((0, 2, 3)).numpy()
    np.testing.assert_allclose(pair.scales, np.sqrt(taken / made), rtol=1e-5)
