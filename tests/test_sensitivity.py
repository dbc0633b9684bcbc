"""``qvis.sensitivity``: what is predicted is what is measured, whatever the model comes as, and the model stays."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from math import isnan, log10
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import qvis
from qvis.adapters.digits import load_digits_model, load_digits_samples
from qvis.analysis.damage import Damage, Sensitivity
from qvis.analysis.sensitivity import TOP
from qvis.analysis.study import rank_correlation
from qvis.noise import WeightGrid, round_weight, span

QUICK: dict[str, Any] = {"samples": 8, "probes": 1, "bits": (8, 4)}


class Small(nn.Module):
    """A convolution, its normalization, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.conv(x)))
        return self.head(self.drop(x.flatten(1)))


def small() -> nn.Module:
    torch.manual_seed(0)
    model = Small()
    with torch.no_grad():
        model(torch.randn(64, 1, 4, 4))
    return model.eval()


def mlp(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval()


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


PICTURES = noise(24, 1, 4, 4)


def decibels(damage: float) -> float:
    return 10 * log10(damage)


# ---------------------------------------------------------------------------------------------------------------------
# The figures


@pytest.fixture(scope="module")
def measured() -> Sensitivity:
    """The shipped model, with each layer rounded by itself as well."""
    return qvis.sensitivity(load_digits_model(), load_digits_samples()[0], samples=32, bits=(8, 4), measure="all")


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("what", "granularity"), [("weights", "tensor"), ("weights", "channel"), ("inputs", "tensor")])
def test_layers_are_ranked_as_measuring_each_ranks_them(
    measured: Sensitivity, bits: int, what: str, granularity: str
) -> None:
    damages = [layer.damage(bits, granularity, what) for layer in measured.layers]
    predicted, found = (np.array([getattr(one, kind) for one in damages]) for kind in ("predicted", "measured"))
    assert rank_correlation(predicted, found) >= 0.85
    small_ones = found < 0.1
    error = np.abs(np.log(predicted / found))[small_ones]
    assert np.median(error) < np.log(1.5)
    assert np.mean(error < np.log(2.5)) >= 0.9


@pytest.mark.parametrize(("what", "bits", "granularity"), [("weights", 8, "channel"), ("inputs", 8, "tensor")])
def test_small_damages_add_up_to_that_of_all_layers(
    measured: Sensitivity, what: str, bits: int, granularity: str
) -> None:
    total = measured.total[bits, granularity] if what == "weights" else measured.total_inputs[bits]
    assert measured.predicted_total(bits, granularity, what) == pytest.approx(
        sum(layer.damage(bits, granularity, what).predicted for layer in measured.layers)
    )
    assert abs(decibels(total.mean) - decibels(measured.predicted_total(bits, granularity, what))) < 3


def test_a_measured_damage_is_that_of_a_model_with_rounded_weights() -> None:
    model, x = mlp(6, 8, 3), noise(20, 6)
    found = qvis.sensitivity(model, x, bits=(5, 3), measure="all")
    with torch.no_grad():
        exact = model(torch.from_numpy(x))
        for bits in (5, 3):
            for granularity in ("tensor", "channel"):
                other = copy.deepcopy(model)
                rounded = round_weight(model[2].weight.numpy(), WeightGrid(bits, granularity))
                other[2].weight.copy_(torch.from_numpy(rounded))
                expected = ((other(torch.from_numpy(x)) - exact) ** 2).sum() / (exact**2).sum()
                assert found.damage(bits, granularity)["2"] == pytest.approx(float(expected), rel=1e-4)
        hidden = model[1](model[0](torch.from_numpy(x))).numpy()
        grid = span(float(hidden.min()), float(hidden.max()), 5)
        fake = np.clip(np.rint(hidden / grid.step), -grid.zero, 31 - grid.zero) * grid.step
        expected = ((model[2](torch.from_numpy(fake.astype(np.float32))) - exact) ** 2).sum() / (exact**2).sum()
    assert found.damage(5, what="inputs")["2"] == pytest.approx(float(expected), rel=1e-3)


def test_what_all_but_one_layer_cost_is_measured_with_it() -> None:
    model, x = mlp(6, 8, 3), noise(20, 6)
    found = qvis.sensitivity(model, x, bits=4, measure="all")
    # of two layers, all but one is the other
    for one, other in (("0", "2"), ("2", "0")):
        assert found.by_name[one].without[4, "tensor"] == pytest.approx(found.damage(4)[other], rel=1e-6)


def test_all_forms_of_a_model_have_the_same_figures(tmp_path: Path) -> None:
    model = small()
    example = (torch.zeros(2, 1, 4, 4),)
    axes = ({0: torch.export.Dim("n", min=1, max=512)},)
    program = torch.export.export(model, example, dynamic_shapes=axes)
    torch.export.save(program, tmp_path / "net.pt2")
    options: dict[str, Any] = {"do_constant_folding": False, "training": torch.onnx.TrainingMode.PRESERVE}
    names = {"input_names": ["x"], "dynamic_axes": {"x": {0: "n"}}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, example, tmp_path / "net.onnx", dynamo=False, **names, **options)
    expected = qvis.sensitivity(model, PICTURES, **QUICK)
    forms = {"program": program, "pt2": tmp_path / "net.pt2", "onnx": tmp_path / "net.onnx"}
    for form, given in forms.items():
        found = qvis.sensitivity(given, PICTURES, **QUICK)
        assert list(found.by_name) == ["conv", "head"], form
        for what in ("weights", "inputs"):
            for bits in (8, 4):
                assert found.damage(bits, what=what) == pytest.approx(expected.damage(bits, what=what), rel=1e-3), form
        assert found.total[8, "tensor"].mean == pytest.approx(expected.total[8, "tensor"].mean, rel=1e-3), form


@pytest.mark.parametrize("measure", ["none", "top", "all"])
def test_as_many_layers_are_measured_as_asked_for(measure: str) -> None:
    model = mlp(*[5] * (TOP + 4))
    found = qvis.sensitivity(model, noise(8, 5), measure=measure, **{**QUICK, "bits": 6})
    confirmed = [layer.name for layer in found.layers if layer.damage(6).confidence == "measured"]
    expected = {"none": 0, "top": TOP, "all": TOP + 3}[measure]
    assert len(confirmed) == expected
    worst = sorted(found.layers, key=lambda layer: -layer.damage(6).predicted)[:expected]
    assert set(confirmed) == {layer.name for layer in worst}
    assert found.evidence == ("measured on 8 samples" if measure == "all" else "predicted from 8 samples")
    for layer in found.layers:
        damage = layer.damage(6)
        assert damage.value == (damage.measured if layer.name in confirmed else damage.predicted)
        assert (not layer.without) == (layer.name not in confirmed)


def test_one_width_and_one_granularity_may_be_given_alone() -> None:
    one = qvis.sensitivity(small(), PICTURES, **{**QUICK, "bits": np.int64(6)}, granularity="channel")
    assert (one.bits, one.granularities) == ((6,), ("channel",))
    several = qvis.sensitivity(small(), PICTURES, **{**QUICK, "bits": [6, 6]}, granularity=["channel"])
    assert several.damage(6, "channel") == one.damage(6, "channel")
    assert set(one.total) == {(6, "channel")}
    assert set(one.total_inputs) == {6}


def test_folded_weights_are_judged_unless_stored_ones_are_asked_for() -> None:
    model = small()
    with torch.no_grad():
        model.norm.weight[:3] = 50.0
    folded, stored = (qvis.sensitivity(model, PICTURES, fold=fold, **QUICK) for fold in (True, False))
    assert any("1 normalization folded" in note for note in folded.notes)
    assert stored.notes == ()
    assert folded.damage(8)["conv"] != pytest.approx(stored.damage(8)["conv"], rel=0.05)
    by_hand = copy.deepcopy(model)
    by_hand.conv = torch.nn.utils.fuse_conv_bn_eval(model.conv, model.norm)
    by_hand.norm = nn.Identity()
    assert qvis.sensitivity(by_hand, PICTURES, **QUICK).damage(8) == pytest.approx(folded.damage(8), rel=1e-2)


def test_a_loss_takes_the_place_of_the_outputs() -> None:
    model, labels = small(), np.arange(24) % 5
    found = qvis.sensitivity(model, PICTURES, labels=labels, loss="cross_entropy", bits=(8, 4), measure="all")
    assert found.loss
    with torch.no_grad():
        fused = torch.nn.utils.fuse_conv_bn_eval(model.conv, model.norm)
        plain = nn.Sequential(fused, nn.ReLU(), nn.Flatten(), copy.deepcopy(model.head))
        x, y = torch.from_numpy(PICTURES), torch.from_numpy(labels)
        exact = functional.cross_entropy(plain(x), y, reduction="none")
        plain[3].weight.copy_(torch.from_numpy(round_weight(model.head.weight.numpy(), WeightGrid(4, "tensor"))))
        moved = functional.cross_entropy(plain(x), y, reduction="none") - exact
    assert found.damage(4)["head"] == pytest.approx(float((moved**2).sum() / (exact**2).sum()), rel=1e-3)
    own = qvis.sensitivity(
        model,
        PICTURES,
        labels=labels,
        loss=lambda out, wanted: functional.cross_entropy(out, wanted, reduction="none"),
        bits=(8, 4),
        measure="all",
    )
    assert own.damage(4) == pytest.approx(found.damage(4), rel=1e-5)


class TwoHeads(nn.Module):
    """Two outputs of very different size, each of a layer of its own."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = nn.Linear(6, 4, bias=False), nn.Linear(6, 3, bias=False)
        self.scale = scale

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"left": self.left(x), "right": self.scale * self.right(x)}


def test_each_output_counts_by_its_own_power() -> None:
    x = noise(16, 6)
    plain, scaled = (qvis.sensitivity(TwoHeads(s), x, bits=(8, 4), measure="all") for s in (1.0, 1e3))
    assert scaled.damage(8) == pytest.approx(plain.damage(8), rel=1e-3)
    alone = qvis.sensitivity(TwoHeads().left, x, bits=(8, 4), measure="all")
    (expected,) = alone.damage(4).values()
    assert plain.damage(4)["left"] == pytest.approx(expected / 2, rel=1e-4)  # the mean over both outputs


# ---------------------------------------------------------------------------------------------------------------------
# The record


def test_figures_are_given_by_name_and_in_order() -> None:
    found = qvis.sensitivity(small(), PICTURES, **QUICK)
    assert list(found.damage()) == list(found.spread()) == ["conv", "head"]
    for what in ("weights", "inputs"):
        ranked = [layer.damage(4, what=what).value for layer in found.ranked(4, what=what)]
        assert ranked == sorted(found.damage(4, what=what).values(), reverse=True)
    assert all(value > 0 for value in found.spread().values())


@pytest.mark.parametrize("method", ["damage", "spread", "ranked", "predicted_total"])
def test_what_was_not_looked_at_is_refused_with_what_was(method: str) -> None:
    found = qvis.sensitivity(small(), PICTURES, **QUICK, granularity="tensor")
    for given, message in (
        ({"bits": 5}, "bits: got 5, expected one of 8, 4"),
        ({"granularity": "channel"}, "granularity: got 'channel', expected one of 'tensor'"),
        ({"what": "biases"}, "what: got 'biases', expected one of 'weights', 'inputs'"),
    ):
        with pytest.raises(qvis.BadArgumentError) as raised:
            getattr(found, method)(**given)
        assert str(raised.value) == message


def test_it_introduces_itself_by_its_worst_layer() -> None:
    found = qvis.sensitivity(small(), PICTURES, **QUICK)
    kept = -decibels(max(found.damage(8).values()))
    name = found.ranked()[0].name
    text = f"<sensitivity of Small, predicted from 8 samples: 2 layers, int8 hurts {name!r} most ({kept:.1f} dB)>"
    assert repr(found) == text


@pytest.mark.parametrize(
    ("damage", "confidence"),
    [
        (Damage(1e-3, 0.1), "high"),
        (Damage(1e-3, 0.6), "fair"),
        (Damage(1e-3, 1.2), "low"),
        (Damage(0.4, 0.1), "low"),
        (Damage(0.4, 1.2, 0.5), "measured"),
        (Damage(), "low"),
    ],
)
def test_confidence_follows_the_spread_and_ends_where_errors_are_large(damage: Damage, confidence: str) -> None:
    assert damage.confidence == confidence


# ---------------------------------------------------------------------------------------------------------------------
# Data


@pytest.mark.parametrize("samples", [1, 2, 300])
def test_any_number_of_samples_will_do(samples: int) -> None:
    found = qvis.sensitivity(small(), noise(300, 1, 4, 4), samples=samples, probes=1, bits=8)
    assert found.samples == samples
    assert found.evidence == f"predicted from {samples} sample{'s' * (samples > 1)}"
    assert all(np.isfinite(value) and value > 0 for value in found.damage(8).values())
    assert isnan(found.agreement) or -1 <= found.agreement <= 1


def test_without_data_all_is_marked_as_made_up() -> None:
    found = qvis.sensitivity(small(), example_inputs=(1, 1, 4, 4), measure="top", **QUICK)
    assert found.evidence == "predicted from made-up inputs"
    assert found.measured == "measured on made-up inputs"
    assert any(note.startswith("No data: the inputs are made up") for note in found.notes)
    analysis = qvis.analyze(small(), example_inputs=(1, 1, 4, 4), measure="top")
    evidence = {reason.evidence for layer in analysis.layers for reason in layer.reasons}
    assert evidence <= {"from the weights alone", "measured on made-up inputs", "predicted from made-up inputs"}
    assert "measured on made-up inputs" in evidence


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(20, 6), nn.Linear(6, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.table(input_ids) * attention_mask[..., None]
        return self.head(hidden.sum(1) / attention_mask.sum(1, keepdim=True))


def test_tokens_are_given_by_name() -> None:
    ids = np.random.default_rng(0).integers(0, 20, (12, 5))
    inputs = {"input_ids": ids, "attention_mask": np.ones((12, 5), np.int64)}
    found = qvis.sensitivity(Tokens(), inputs, **QUICK)
    assert list(found.damage(8)) == ["table", "head"]
    assert list(found.damage(8, what="inputs")) == ["head"]  # a table multiplies nothing
    assert found.by_name["table"].operations == 0
    made = qvis.sensitivity(Tokens(), example_inputs="input_ids=1x5:int64,attention_mask=1x5:int64", **QUICK)
    assert set(made.damage(8)) == {"table", "head"}


def test_a_loader_gives_what_an_array_gives() -> None:
    labels = torch.arange(8) % 5
    dataset = torch.utils.data.TensorDataset(torch.from_numpy(PICTURES[:8]), labels)
    loader: Any = torch.utils.data.DataLoader(dataset, batch_size=8)
    expected = qvis.sensitivity(small(), PICTURES[:8], **QUICK)
    assert qvis.sensitivity(small(), loader, **QUICK).damage(8) == pytest.approx(expected.damage(8), rel=1e-5)
    assert qvis.sensitivity(small(), loader, loss="cross_entropy", **QUICK).loss


# ---------------------------------------------------------------------------------------------------------------------
# Models of all kinds


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_outputs_that_are_no_numbers_give_one_line(bad: float) -> None:
    model = mlp(6, 8, 3)
    with torch.no_grad():
        model[2].bias[0] = bad
    with pytest.raises(qvis.BadArgumentError, match="inputs: the model returns NaN or infinite numbers") as raised:
        qvis.sensitivity(model, noise(8, 6), **QUICK)
    assert "\n" not in str(raised.value)


def test_weights_that_are_no_numbers_are_named() -> None:
    model = mlp(6, 8, 3)
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    with pytest.raises(qvis.BadArgumentError, match="model: weights of 2 are NaN or infinite"):
        qvis.sensitivity(model, noise(8, 6), **QUICK)
    reasons = qvis.analyze(model).layers[1].reasons
    assert reasons[0].kind == "nonfinite"


class Exploding(nn.Module):
    """A small change of its weights changes the output beyond all measure."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(self.outer(self.inner(x)) * 60)


def test_damages_beyond_all_measure_are_told_in_few_words() -> None:
    analysis = qvis.analyze(Exploding(), inputs=noise(8, 6), measure="all", bits=2)
    texts = [reason.text for layer in analysis.layers for reason in layer.reasons]
    assert any("changes the output by more than 10,000 % of its power" in text for text in texts)
    assert all(len(text) < 250 for text in texts)
    assert {str(layer.severity) for layer in analysis.layers} == {"problem"}


def test_outputs_that_are_all_zero_give_one_line() -> None:
    model = mlp(6, 8, 3)
    with torch.no_grad():
        model[2].weight.zero_()
        model[2].bias.zero_()
    with pytest.raises(qvis.BadArgumentError, match="no real number other than zero"):
        qvis.sensitivity(model, noise(8, 6), **QUICK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "inputs: got none; give data, or instead example_inputs"),
        ({"example_inputs": (1, 1, 4, 4), "loss": "mse"}, "inputs: a loss cannot be judged without data"),
        ({"inputs": PICTURES, "loss": "mse"}, "loss: needs labels"),
        ({"inputs": PICTURES, "bits": ()}, "bits: got none"),
        ({"inputs": PICTURES, "bits": 1}, "bits: got 1, expected a whole number from 2 to 16"),
        ({"inputs": PICTURES, "bits": 8.0}, "bits: got 8.0, expected a whole number from 2 to 16"),
        ({"inputs": PICTURES, "granularity": "row"}, "granularity: got 'row', expected some of 'tensor', 'channel'"),
        ({"inputs": PICTURES, "granularity": None}, "granularity: got None"),
        ({"inputs": PICTURES, "measure": "some"}, "measure: got 'some', expected one of 'none', 'top', 'all'"),
        ({"inputs": PICTURES, "probes": 0}, "probes: got 0, expected a whole number of 1 or more"),
        ({"inputs": PICTURES, "samples": 0}, "samples: got 0, expected a whole number of 1 or more"),
        ({"example_inputs": (1, 1, 4, 4), "samples": 0}, "samples: got 0, expected a whole number of 1 or more"),
        ({"inputs": PICTURES, "seed": -1}, "seed: got -1, expected a whole number of 0 or more"),
    ],
)
def test_wrong_arguments_are_named_with_what_was_expected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(qvis.BadArgumentError) as raised:
        qvis.sensitivity(small(), **options)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


def test_files_that_hold_weights_alone_name_the_way_out(tmp_path: Path) -> None:
    torch.save(small().state_dict(), tmp_path / "net.pt")
    message = "model: a checkpoint holds weights but no code to run them with; give the model's code"
    for use in (qvis.sensitivity, lambda path, data: qvis.analyze(path, inputs=data)):
        with pytest.raises(qvis.NotRunnableError, match=message):
            use(tmp_path / "net.pt", PICTURES)


class Choosy(Small):
    """Which way the data go depends on the data, so that there is no graph."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if float(x.sum()) < 1e9 else -x)


def test_a_model_without_a_graph_is_run_and_the_reason_is_told() -> None:
    torch.manual_seed(0)
    model = Choosy().eval()
    analysis = qvis.analyze(model, inputs=PICTURES, samples=8)
    assert analysis.sensitivity is not None
    assert analysis.graph is None
    assert analysis.no_graph.startswith("no graph: ")
    stored = qvis.sensitivity(model, PICTURES, fold=False, **QUICK)
    assert qvis.sensitivity(model, PICTURES, **QUICK).damage(8) == stored.damage(8)


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(torch.tanh(self.inner(x)))))


def frozen() -> nn.Module:
    model = Reused()
    model.inner.requires_grad_(False)
    return model


@pytest.mark.parametrize("make", [Reused, frozen])
def test_a_layer_that_is_used_twice_or_frozen_is_predicted(make: Callable[[], nn.Module]) -> None:
    found = qvis.sensitivity(make(), noise(64, 6), bits=8, measure="all")
    for what in ("weights", "inputs"):
        for name in ("inner", "head"):
            damage = found.by_name[name].damage(8, what=what)
            assert abs(decibels(damage.predicted / damage.measured)) < 4, (what, name)
    (calls_twice,) = (layer for layer in found.layers if layer.name == "inner")
    assert calls_twice.operations == 2 * 36


def test_selected_layers_alone_are_rounded() -> None:
    found = qvis.sensitivity(small(), PICTURES, selected_layers="head", **QUICK)
    assert list(found.by_name) == ["head"]
    whole = qvis.sensitivity(small(), PICTURES, measure="all", **QUICK)
    # all layers at once are now this one alone
    assert found.total[4, "tensor"].mean == pytest.approx(whole.damage(4)["head"], rel=1.0)
    with pytest.raises(qvis.UnknownLayerError):
        qvis.sensitivity(small(), PICTURES, selected_layers="haed", **QUICK)


def test_layers_without_part_in_the_outputs_do_no_damage() -> None:
    model = mlp(6, 8, 3)
    model.spare = nn.Linear(4, 4)
    model.forward = lambda x: model[2](model[1](model[0](x)))  # type: ignore[method-assign]
    found = qvis.sensitivity(model, noise(8, 6), **QUICK)
    assert found.damage(8).get("spare", 0.0) == 0.0
    assert qvis.analyze(model, inputs=noise(8, 6)).layers[-1].severity == "ok"


def test_where_nothing_can_be_differentiated_all_layers_are_measured() -> None:
    model = mlp(*[5] * (TOP + 4))
    model.forward = torch.inference_mode()(model.forward)  # type: ignore[method-assign]
    for measure in ("none", "top"):
        found = qvis.sensitivity(model, noise(8, 5), measure=measure, **QUICK)
        assert found.evidence == "measured on 8 samples"
        assert {layer.damage(8).confidence for layer in found.layers} == {"measured"}
        assert found.passes == 0
        assert isnan(found.predicted_total(8))


def test_normalizations_that_cannot_be_folded_are_no_folding() -> None:
    model = nn.Sequential(nn.BatchNorm1d(6), nn.ReLU(), *mlp(6, 8, 3)).eval()
    assert qvis.sensitivity(model, noise(8, 6), **QUICK).notes == ()


def test_the_model_and_all_random_states_stay_as_they_were() -> None:
    model = small()
    model.train()
    model.conv.eval()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    versions = [parameter._version for parameter in model.parameters()]
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[index]
    qvis.sensitivity(model, PICTURES, measure="top", **QUICK)
    qvis.sensitivity(model, example_inputs=(1, 1, 4, 4), **QUICK)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # type: ignore[index]
    assert random.getstate() == states[2]
    assert [module.training for module in model.modules()] == modes
    assert [parameter._version for parameter in model.parameters()] == versions
    assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))
    assert model.conv.weight.grad is None
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def figures() -> str:
    """Figures of a model with data and without, to the last digit."""
    found = [
        qvis.sensitivity(small(), PICTURES, measure="top", **QUICK),
        qvis.sensitivity(small(), example_inputs=(1, 1, 4, 4), **QUICK),
    ]
    return json.dumps([[one.damage(8), one.spread(4), one.total_both[4, "tensor"]] for one in found])


def test_the_same_seed_gives_the_same_figures_in_another_process() -> None:
    code = "from tests.test_sensitivity import figures; print(figures())"
    folder = Path(__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=folder)
    assert run.stdout.strip() == figures()


def test_another_seed_gives_other_figures_that_agree() -> None:
    first, second = (qvis.sensitivity(small(), PICTURES, bits=8, seed=seed) for seed in (0, 1))
    assert first.damage(8) != second.damage(8)
    for name, damage in first.damage(8).items():
        spread = float(np.hypot(first.spread(8)[name], second.spread(8)[name]))
        assert abs(np.log(damage / second.damage(8)[name])) < 3 * spread


def test_the_same_call_twice_gives_the_same_figures() -> None:
    first, second = (qvis.sensitivity(small(), PICTURES, measure="top", **QUICK) for _ in range(2))
    assert first.damage(4) == second.damage(4)
    assert first.total_both == second.total_both


def test_the_work_is_tracked() -> None:
    seen: dict[str, int] = {}

    def track(items: Any, what: str) -> Iterator[Any]:
        for item in items:
            seen[what] = seen.get(what, 0) + 1
            yield item

    qvis.sensitivity(small(), PICTURES, measure="top", track=track, **QUICK)
    assert set(seen) == {"Calibrating", "Differentiating", "Measuring", "Measuring all layers at once"}


# ---------------------------------------------------------------------------------------------------------------------
# What was found before


def test_an_analysis_takes_what_was_found_before() -> None:
    model = small()
    found = qvis.sensitivity(model, PICTURES, **QUICK)
    analysis = qvis.analyze(model, sensitivity=found, bits=4)
    assert analysis.sensitivity is found
    assert {layer.name: analysis.damage(layer) for layer in analysis.layers} == found.damage(4)


def test_an_analysis_refuses_what_was_found_at_other_widths_or_for_another_model() -> None:
    found = qvis.sensitivity(small(), PICTURES, **QUICK)
    with pytest.raises(qvis.BadArgumentError, match="it was found at 8, 4 bits, not at 6; find it with bits=6"):
        qvis.analyze(small(), sensitivity=found, bits=6)
    with pytest.raises(qvis.BadArgumentError, match="none of its layers is one of Sequential's"):
        qvis.analyze(mlp(6, 8, 3), sensitivity=found)


# ---------------------------------------------------------------------------------------------------------------------
# Keras


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
def test_a_keras_model_and_its_dataset() -> None:
    from tests.keras_models import require

    keras = require()
    import tensorflow as tf

    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((4, 4, 1)),
            layers.Conv2D(6, 3, padding="same", name="conv"),
            layers.BatchNormalization(name="norm"),
            layers.ReLU(),
            layers.Flatten(),
            layers.Dense(5, name="head"),
        ]
    )
    pictures = PICTURES.transpose(0, 2, 3, 1).copy()
    before = [weight.copy() for weight in model.get_weights()]
    found = qvis.sensitivity(model, pictures[:8], measure="all", **QUICK)
    assert list(found.by_name) == ["conv", "head"]
    for damage in (layer.damage(8) for layer in found.layers):
        assert abs(decibels(damage.predicted / damage.measured)) < 5
    dataset = tf.data.Dataset.from_tensor_slices((pictures[:8], np.arange(8) % 5)).batch(8)
    again = qvis.sensitivity(model, dataset, **QUICK)
    assert {name: found.by_name[name].damage(8).predicted for name in again.by_name} == pytest.approx(
        again.damage(8), rel=1e-4
    )
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
