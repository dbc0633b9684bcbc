"""``qvis.bit_widths``: the mix is the best there is, keeps what was asked for, and what is said of it is measured."""

from __future__ import annotations

from itertools import pairwise, product
from math import ceil, log10
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qvis.adapters.digits import load_digits_model, load_digits_samples
from qvis.analysis.bit_widths import WIDTHS, bit_widths
from qvis.analysis.widths import BitWidths, LayerWidths, Mix, interpolate, stored_bytes
from qvis.errors import BadArgumentError, NotRunnableError
from qvis.noise import WeightGrid, round_weight
from qvis.quantization.grids import Scheme

QUICK: dict[str, Any] = {"samples": 48, "probes": 2}


def perceptron() -> nn.Sequential:
    """Three layers, of which the second is of small weights and many, and the last decides."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 3)).eval()
    with torch.no_grad():
        model[0].weight[3] *= 6
    return model


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


VECTORS = noise(48, 12)


@pytest.fixture(scope="module")
def found() -> BitWidths:
    return bit_widths(perceptron(), VECTORS, average_bits=4.5, **QUICK)


@pytest.fixture(scope="module")
def digits() -> BitWidths:
    pictures, labels = load_digits_samples()
    return bit_widths(load_digits_model(), pictures, labels=labels, average_bits=5, samples=32, probes=2)


def damage_db(model: nn.Module, inputs: np.ndarray, mix: Mix, draws: int = 24) -> float:
    """What the output keeps with weights that are rounded one by one, on steps of other random lengths."""
    generator = np.random.default_rng(7)
    x = torch.from_numpy(inputs)
    with torch.no_grad():
        exact = model(x).double()
        found = []
        for _ in range(draws):
            kept = {name: layer.clone() for name, layer in model.state_dict().items()}
            for name, grid in mix.grids.items():
                weight = model.get_submodule(name).weight
                rounded = round_weight(weight.numpy(), grid, 1 + 0.08 * generator.random())
                weight.copy_(torch.from_numpy(rounded))
            found.append(float(((model(x).double() - exact) ** 2).sum() / (exact**2).sum()))
            model.load_state_dict(kept)
    return -10 * log10(float(np.mean(found)))


# ---------------------------------------------------------------------------------------------------------------------
# The mix


def test_every_layer_gets_a_width_and_their_average_is_what_was_asked_for(found: BitWidths) -> None:
    assert list(found.bits) == ["0", "2", "4"] == [layer.name for layer in found.layers]
    weights = {layer.name: layer.weights for layer in found.layers}
    average = sum(found.bits[name] * weights[name] for name in weights) / sum(weights.values())
    assert found.chosen.average_bits == pytest.approx(average)
    assert average <= 4.5


def test_no_other_mix_within_the_average_is_predicted_to_do_less_damage(found: BitWidths) -> None:
    def predicted(widths: tuple[int, ...]) -> float:
        return sum(layer.option(bits).damage for layer, bits in zip(found.layers, widths, strict=True))

    total = sum(layer.weights for layer in found.layers)
    possible = [
        widths
        for widths in product(WIDTHS, repeat=3)
        if sum(layer.weights * bits for layer, bits in zip(found.layers, widths, strict=True)) <= 4.5 * total
    ]
    assert predicted(tuple(found.bits.values())) == pytest.approx(min(map(predicted, possible)), rel=1e-3)


def test_bytes_are_those_of_packed_codes_and_scales(found: BitWidths) -> None:
    model = perceptron()
    expected = 0
    for name, grid in found.chosen.grids.items():
        weight = model.get_submodule(name).weight.detach().numpy()
        expected += Scheme(bits=grid.bits, granularity="channel").fit(weight).bytes
    assert found.chosen.bytes == expected
    assert found.rest_bytes == 4 * (24 + 40 + 3)
    assert found.bytes == expected + found.rest_bytes


@pytest.mark.parametrize("granularity", ["tensor", "channel", 5, 128])
def test_stored_bytes_are_those_of_the_library_of_grids(granularity: Any) -> None:
    matrix = noise(7, 13)
    for bits in (2, 3, 8):
        fitted = Scheme(bits=bits, granularity=granularity).fit(matrix)
        assert stored_bytes(7, 13, WeightGrid(bits, granularity)) == fitted.bytes


def test_what_is_verified_is_what_rounding_by_hand_brings(found: BitWidths) -> None:
    assert found.verified.sqnr_db == pytest.approx(damage_db(perceptron(), VECTORS, found.chosen), abs=2)
    for mix in found.uniform:
        if mix.measured_db > 5:
            assert mix.measured_db == pytest.approx(damage_db(perceptron(), VECTORS, mix), abs=2.5)


def test_the_gain_is_over_one_width_for_all_of_the_same_size(found: BitWidths) -> None:
    sizes = np.array([mix.bytes for mix in found.uniform])
    kept = np.array([mix.measured_db for mix in found.uniform])
    assert [mix.average_bits for mix in found.uniform] == [*reversed(WIDTHS)]
    assert found.verified.uniform_db == pytest.approx(np.interp(found.chosen.bytes, sizes, kept))
    assert found.verified.gain_db == pytest.approx(found.verified.sqnr_db - found.verified.uniform_db)


def test_a_really_trained_model_keeps_more_than_with_one_width_and_answers_as_well(digits: BitWidths) -> None:
    assert digits.verified.gain_db > 1
    assert digits.verified.answers == 128
    assert digits.verified.accuracy is not None
    assert digits.verified.accuracy.share >= digits.verified.uniform_accuracy - 0.02
    assert digits.predicted == pytest.approx(digits.verified.sqnr_db, abs=3)
    assert len(set(digits.bits.values())) > 1


def test_the_frontier_rises_with_size_and_is_measured_here_and_there(digits: BitWidths) -> None:
    sizes = [mix.bytes for mix in digits.frontier]
    assert sizes == sorted(set(sizes))
    assert all(b.predicted <= a.predicted for a, b in pairwise(digits.frontier))
    assert digits.frontier[0].average_bits == 2
    assert set(digits.frontier[-1].grids.values()) == {WeightGrid(8, "channel")}
    measured = [mix for mix in digits.frontier if mix.measured is not None]
    assert len(measured) >= 4
    for mix in measured:
        if mix.measured_db > 8:
            assert mix.predicted_db == pytest.approx(mix.measured_db, abs=4)


def test_every_granularity_is_told_of_each_layer(found: BitWidths) -> None:
    for layer in found.layers:
        grids = {one.grid for one in layer.options}
        assert grids == set(map(WeightGrid._make, product(WIDTHS, ("tensor", "channel", 128, 64, 32))))
    finest, coarsest = (found.by_name["0"].option(4, one).damage for one in ("channel", "tensor"))
    assert finest < coarsest


def test_several_granularities_are_mixed_where_that_is_better() -> None:
    model = perceptron()
    both = bit_widths(model, VECTORS, average_bits=4, granularity=("tensor", "channel", 8), **QUICK)
    one = bit_widths(model, VECTORS, average_bits=4, granularity="tensor", **QUICK)
    assert {grid.granularity for grid in one.chosen.grids.values()} == {"tensor"}
    assert {grid.granularity for grid in both.chosen.grids.values()} != {"tensor"}
    assert both.chosen.bytes <= sum(layer.weights * 4 // 8 + 2 + 1 for layer in both.layers)
    assert sum(map(predicted_of(both), both.layers)) <= sum(map(predicted_of(one), one.layers))


def predicted_of(found: BitWidths) -> Any:
    return lambda layer: layer.option(*found.chosen.grids[layer.name]).damage


def test_layers_that_are_not_selected_stay_in_float() -> None:
    found = bit_widths(perceptron(), VECTORS, average_bits=4, selected_layers=["0", "4"], **QUICK)
    assert set(found.bits) == {"0", "4"}
    assert found.rest_bytes == 4 * (24 * 40 + 24 + 40 + 3)


def test_the_same_seed_gives_the_same_widths_and_figures() -> None:
    first, second = (bit_widths(perceptron(), VECTORS, average_bits=3.3, seed=5, **QUICK) for _ in range(2))
    assert first.bits == second.bits
    assert first.verified == second.verified
    assert [mix.predicted for mix in first.frontier] == [mix.predicted for mix in second.frontier]


def test_the_model_is_not_changed() -> None:
    model = perceptron().train()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    bit_widths(model, VECTORS, average_bits=4, **QUICK)
    assert model.training
    assert all(torch.equal(before[name], one) for name, one in model.state_dict().items())


def test_without_data_inputs_are_made_up_and_that_is_said() -> None:
    found = bit_widths(perceptron(), example_inputs=(1, 12), average_bits=4, **QUICK)
    assert found.source == "made-up inputs"
    assert any("made up" in note for note in found.notes)


# ---------------------------------------------------------------------------------------------------------------------
# Other goals


def test_a_target_size_is_kept_with_all_that_is_not_rounded() -> None:
    target = 1100
    found = bit_widths(perceptron(), VECTORS, target_size=target, **QUICK)
    assert 0.9 * target < found.bytes <= target


def test_the_smallest_mix_keeps_what_was_asked_for() -> None:
    found = bit_widths(perceptron(), VECTORS, max_damage_db=20, **QUICK)
    assert found.verified.sqnr_db >= 20
    smaller = [mix for mix in found.frontier if mix.measured is not None and mix.bytes < 0.9 * found.chosen.bytes]
    assert all(mix.measured_db < 20.5 for mix in smaller)
    assert found.chosen.bytes < found.uniform[-1].bytes


def test_what_cannot_be_reached_is_refused_with_what_can() -> None:
    with pytest.raises(BadArgumentError, match=r"max_damage_db: got 90, .* 8 bits the output keeps \d+\.\d dB"):
        bit_widths(perceptron(), VECTORS, max_damage_db=90, **QUICK)
    with pytest.raises(BadArgumentError, match=r"target_size: got 300, expected at least [\d,]+: .* 2 bits"):
        bit_widths(perceptron(), VECTORS, target_size=300, **QUICK)
    with pytest.raises(BadArgumentError, match=r"average_bits: got 3, expected at least 4"):
        bit_widths(perceptron(), VECTORS, average_bits=3, bits=(8, 4), **QUICK)


@pytest.mark.parametrize("less", [0.01, 0.7, 1.0])
def test_what_hardly_any_mix_keeps_is_kept(less: float) -> None:
    widest = bit_widths(perceptron(), VECTORS, average_bits=8, **QUICK).verified.sqnr_db
    found = bit_widths(perceptron(), VECTORS, max_damage_db=widest - less, **QUICK)
    assert found.verified.sqnr_db >= widest - less


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "average_bits, target_size, max_damage_db: got none of them, expected exactly one"),
        ({"average_bits": 4, "target_size": 900}, "got average_bits and target_size, expected exactly one"),
        ({"average_bits": 0}, "average_bits: got 0, expected a number above 0"),
        ({"average_bits": "4"}, "average_bits: got '4', expected a number above 0"),
        ({"target_size": float("nan")}, "target_size: got nan, expected a number above 0"),
        ({"average_bits": 4, "bits": ()}, "bits: got none"),
        ({"average_bits": 4, "bits": (1, 4)}, "bits: got 1, expected a whole number from 2 to 16"),
        ({"average_bits": 4, "granularity": "row"}, "granularity: got 'row', expected 'tensor', 'channel' or how many"),
        ({"average_bits": 4, "granularity": 0}, "granularity: got 0, expected"),
        ({"average_bits": 4, "granularity": ()}, "granularity: got 'none'"),
        ({"average_bits": 4, "samples": 0}, "samples: got 0"),
        ({"average_bits": 4, "probes": 0}, "probes: got 0"),
        ({"average_bits": 4, "seed": -1}, "seed: got -1"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(BadArgumentError) as caught:
        bit_widths(perceptron(), VECTORS, **{**QUICK, **arguments})
    assert said in str(caught.value)


def test_weights_alone_cannot_tell_widths(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(3, 4)}, tmp_path / "weights.pt")
    with pytest.raises(NotRunnableError):
        bit_widths(tmp_path / "weights.pt", VECTORS, average_bits=4)


def test_a_width_that_was_not_looked_at_is_refused(found: BitWidths) -> None:
    with pytest.raises(BadArgumentError, match=r"bits, granularity: got 9, 'channel', expected one of 8 'channel'"):
        found.layers[0].option(9)


# ---------------------------------------------------------------------------------------------------------------------
# Answers


class Distracted(nn.Module):
    """A class that is never the answer has nearly all of the output's power; what decides is small."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.decides = nn.Linear(16, 2, bias=False)
        self.distracts = nn.Linear(16, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.decides(x), -1000 - 100 * self.distracts(x)], dim=1)


def test_a_mix_that_answers_worse_is_replaced_by_a_better_one() -> None:
    model = Distracted().eval()
    inputs = noise(400, 16)
    with torch.no_grad():
        labels = model(torch.from_numpy(inputs)).argmax(dim=1).numpy()
    found = bit_widths(model, inputs, labels=labels, average_bits=4, bits=(8, 6, 4, 3, 2), **QUICK)
    plain = bit_widths(model, inputs, average_bits=4, bits=(8, 6, 4, 3, 2), **QUICK)
    assert plain.bits["distracts"] > plain.bits["decides"]
    assert plain.corrected == ()
    assert found.bits["decides"] > plain.bits["decides"]
    assert "one width for all layers at equal size" in found.corrected[0]
    assert found.verified.accuracy is not None
    assert found.verified.accuracy.share >= found.verified.uniform_accuracy - found.verified.accuracy.error
    assert found.replaced is not None
    assert found.replaced.accuracy is not None
    assert found.replaced.accuracy.share < found.verified.accuracy.share
    assert {name: grid.bits for name, grid in found.replaced.grids.items()} == plain.bits
    assert found.chosen.average_bits <= 4
    assert found.verified.float_accuracy == 1


def test_answers_are_counted_as_by_hand(digits: BitWidths) -> None:
    pictures, labels = load_digits_samples()
    with torch.no_grad():
        right = load_digits_model()(torch.from_numpy(pictures)).argmax(dim=1).numpy() == labels
    assert digits.verified.float_accuracy == pytest.approx(right.mean())


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (np.linspace(0, 1, 48), "the labels are float64, 1 for each sample, not one whole number"),
        (np.full(48, 7), "there are labels from 7 to 7, and 3 classes"),
    ],
)
def test_labels_that_are_no_classes_are_left_out_by_name(labels: np.ndarray, said: str) -> None:
    found = bit_widths(perceptron(), VECTORS, labels=labels, average_bits=4, **QUICK)
    assert found.verified.accuracy is None
    assert any(said in note for note in found.notes)


def test_labels_of_one_score_and_of_one_number_per_class_are_understood() -> None:
    one = nn.Sequential(nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 1)).eval()
    with torch.no_grad():
        binary = (one(torch.from_numpy(VECTORS))[:, 0] > 0).numpy().astype(int)
        classes = perceptron()(torch.from_numpy(VECTORS)).argmax(dim=1).numpy()
    found = bit_widths(one, VECTORS, labels=binary, average_bits=8, **QUICK)
    assert found.verified.float_accuracy == 1
    found = bit_widths(perceptron(), VECTORS, labels=np.eye(3)[classes], average_bits=8, **QUICK)
    assert found.verified.float_accuracy == 1


# ---------------------------------------------------------------------------------------------------------------------
# Models of other kinds


class Stepped(nn.Module):
    """Nothing can be differentiated."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            return self.second(torch.relu(self.first(x)))


def test_what_cannot_be_differentiated_is_measured_layer_by_layer() -> None:
    torch.manual_seed(0)
    found = bit_widths(Stepped().eval(), VECTORS, average_bits=5, **QUICK)
    assert {one.grid.granularity for layer in found.layers for one in layer.options} == {"channel"}
    assert found.predicted == pytest.approx(found.verified.sqnr_db, abs=3)


class Idle(nn.Module):
    """A layer whose output is multiplied by nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(12, 8), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x) + 0 * self.idle(x)


def test_a_layer_that_does_nothing_gets_the_fewest_bits_and_is_named() -> None:
    torch.manual_seed(0)
    found = bit_widths(Idle().eval(), VECTORS, average_bits=5, **QUICK)
    assert found.bits == {"used": 8, "idle": 2}
    assert any("idle does nothing to the output" in note for note in found.notes)


def test_interpolation_knows_its_ends() -> None:
    sizes, values = np.array([30.0, 10.0]), np.array([3.0, 1.0])
    assert interpolate(20, sizes, values) == 2
    assert np.isnan(interpolate(31, sizes, values))
    assert np.isnan(interpolate(9, sizes, values))


def test_packed_bytes_are_rounded_up() -> None:
    assert stored_bytes(1, 3, WeightGrid(3, "tensor")) == ceil((9 + 16) / 8)
    assert LayerWidths("a", "Linear", (1, 3), 1, 3, ()).weights == 3


class Spare(nn.Module):
    """Three layers; the second is used only where asked for."""

    def __init__(self, used: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.broken, self.last = nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.used = used
        with torch.no_grad():
            self.broken.weight[1, 2] = float("nan")

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        found: Tensor = self.last(self.broken(x) if self.used else x)
        return found


def test_weights_that_are_no_numbers_stay_in_float_where_they_are_not_used_and_are_named_where_they_are() -> None:
    found = bit_widths(Spare(used=False), VECTORS, average_bits=4, **QUICK)
    assert list(found.bits) == ["first", "last"]
    assert [(one.name, one.reason) for one in found.skipped] == [("broken", "some of its weights are NaN or infinite")]
    assert found.rest_bytes == 4 * (8 * 8 + 8 + 8 + 3)
    for selected in (None, "first"):
        with pytest.raises(BadArgumentError, match="model: weights of broken are NaN or infinite"):
            bit_widths(Spare(used=True), VECTORS, average_bits=4, selected_layers=selected, **QUICK)


def test_one_width_for_all_layers_is_taken_where_it_is_measured_to_keep_more() -> None:
    class Stairs(nn.Module):
        """What the second layer does to the output no derivative tells."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.value, self.gate = nn.Linear(12, 6), nn.Linear(12, 6)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.value(x) * (4 * self.gate(x)).round()
            return found

    found = bit_widths(Stairs(), VECTORS, average_bits=5, **QUICK)
    fits = [mix.measured_db for mix in found.uniform if mix.average_bits <= 5]
    assert found.verified.sqnr_db == pytest.approx(max(fits))
    assert set(found.bits.values()) == {5}
    # widths that are only there to compare with are not to choose from
    assert set(bit_widths(Stairs(), VECTORS, average_bits=5, bits=(8, 4), **QUICK).bits.values()) <= {8, 4}
