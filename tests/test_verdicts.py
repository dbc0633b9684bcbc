"""How layers are judged by their damage, and what is suggested to help them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import isnan, log10
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import qvis
from qvis.adapters.digits import load_digits_model, load_digits_samples
from qvis.analysis.damage import Damage, Draws, Sensitivity
from qvis.analysis.remedies import neighbours
from qvis.analysis.verdicts import grade, judge
from qvis.excluding import exclusions
from qvis.layers import Analysis, Graph, LayerAnalysis, Node, Severity, Thresholds
from qvis.report.document import summarize


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


X = noise(16, 16)


def mlp(*between: nn.Module) -> nn.Sequential:
    """Linear layers of 16 with these modules between them."""
    torch.manual_seed(0)
    parts: list[nn.Module] = [nn.Linear(16, 16)]
    for module in between:
        parts += [module, nn.Linear(16, 16)]
    return nn.Sequential(*parts).eval()


def kinds(layer: LayerAnalysis) -> list[str]:
    return [remedy.kind for remedy in layer.remedies]


@pytest.fixture(scope="module")
def digits() -> Analysis:
    """The shipped model at int8: one depthwise layer is a problem on one grid per tensor."""
    model, limits = load_digits_model(), Thresholds(problem_db=25)
    known = qvis.sensitivity(model, load_digits_samples()[0], samples=16, bits=8)
    return qvis.analyze(model, sensitivity=known, thresholds=limits)


@pytest.fixture(scope="module")
def plain() -> tuple[nn.Module, Sensitivity]:
    model = mlp(nn.ReLU(), nn.ReLU())
    return model, qvis.sensitivity(model, X, bits=(8, 4))


def with_damages(known: Sensitivity, **damages: float) -> Sensitivity:
    """The same with other damages of weights, by name with ``_`` before it, on every grid."""
    layers = [
        replace(layer, weights=dict.fromkeys(layer.weights, Damage(damages[f"_{layer.name}"], 0.1)))
        if f"_{layer.name}" in damages
        else layer
        for layer in known.layers
    ]
    return replace(known, layers=tuple(layers))


# ---------------------------------------------------------------------------------------------------------------------
# Severity


@pytest.mark.parametrize(
    ("damage", "severity"),
    [(0.0, "ok"), (9.9e-4, "ok"), (1.1e-3, "watch"), (9.9e-3, "watch"), (1.1e-2, "problem"), (5.0, "problem")],
)
def test_severity_follows_the_damage(plain: tuple[nn.Module, Sensitivity], damage: float, severity: str) -> None:
    analysis = qvis.analyze(plain[0], sensitivity=with_damages(plain[1], _2=damage))
    assert str(analysis.layers[1].severity) == severity
    assert [str(layer.severity) for layer in analysis.layers[::2]] == ["ok", "ok"]


@given(damage=st.floats(0, 1e6), limits=st.tuples(st.floats(-50, 90), st.floats(-50, 90)))
def test_limits_decide_as_their_power_does(damage: float, limits: tuple[float, float]) -> None:
    problem, watch = sorted(limits)
    found = grade(damage, Thresholds(watch_db=watch, problem_db=problem))
    kept = np.inf if damage == 0 else -10 * log10(damage)
    expected = Severity.PROBLEM if kept < problem else Severity.WATCH if kept < watch else Severity.OK
    assert found is expected


def test_other_limits_give_other_severities(plain: tuple[nn.Module, Sensitivity]) -> None:
    model, known = plain
    known = with_damages(known, _2=1e-4)  # 40 dB
    for watch_db, problem_db, severity in ((39, 20, "ok"), (41, 39, "watch"), (50, 41, "problem")):
        thresholds = Thresholds(watch_db=watch_db, problem_db=problem_db)
        analysis = qvis.analyze(model, sensitivity=known, thresholds=thresholds)
        assert str(analysis.layers[1].severity) == severity
        told = " ".join(summarize(analysis, "sensitivity")["verdict"]["details"])
        assert f"({problem_db} dB), and worth a look above" in told


def test_rounding_what_enters_a_layer_is_judged_alike(plain: tuple[nn.Module, Sensitivity]) -> None:
    model, known = plain
    first, second, third = known.layers
    hurt = replace(second, inputs=dict.fromkeys(second.inputs, Damage(0.05, 0.1)))
    analysis = qvis.analyze(model, sensitivity=replace(known, layers=(first, hurt, third)))
    layer = analysis.layers[1]
    assert layer.severity is Severity.PROBLEM
    assert layer.reasons[0].kind == "inputs"
    assert "Rounding what enters it (0 to " in layer.reasons[0].text
    assert analysis.ranked[0] is layer
    verdict = summarize(analysis, "sensitivity")["verdict"]
    assert verdict["text"].endswith("1 of 3 layers will suffer at int8 with one grid per tensor, 2 most.")
    assert verdict["details"][0].startswith("Rounding what enters 2 alone does the most damage: it changes the output")


def test_what_the_weights_suggest_only_explains() -> None:
    model = mlp(nn.ReLU(), nn.ReLU())
    with torch.no_grad():
        model[2].weight[::2] *= 4e-3
    from_weights = qvis.analyze(model)
    assert from_weights.layers[1].severity is Severity.PROBLEM
    analysis = qvis.analyze(model, inputs=X)
    layer = analysis.layers[1]
    before = {reason.kind for reason in from_weights.layers[1].reasons}
    explaining = [reason for reason in layer.reasons if reason.kind in before]
    assert {reason.kind for reason in explaining} == before
    assert {reason.severity for reason in explaining} == {Severity.OK}
    assert {reason.evidence for reason in explaining} == {"from the weights alone"}
    assert layer.severity is grade(analysis.damage(layer), analysis.thresholds)


def test_a_layer_of_zeros_stays_unusable_whatever_a_run_says() -> None:
    model = mlp(nn.ReLU(), nn.ReLU())
    with torch.no_grad():
        model[2].weight.zero_()
    layer = qvis.analyze(model, inputs=X).layers[1]
    assert layer.severity is Severity.UNUSABLE
    assert layer.reasons[0].kind == "zero"
    assert layer.remedies == ()


def test_the_best_evidence_of_each_layer_is_named() -> None:
    many = mlp(*[nn.ReLU() for _ in range(9)])
    analysis = qvis.analyze(many, inputs=X, samples=8, measure="top")
    evidence = [
        reason.evidence for layer in analysis.layers for reason in layer.reasons if reason.kind in ("damage", "inputs")
    ]
    assert set(evidence) == {"predicted from 8 samples", "measured on 8 samples"}
    assert evidence.count("measured on 8 samples") == 2 * 8
    assert analysis.evidence == "predicted from 8 samples"


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (Damage(2e-4, 0.1), "0.020 % of its power (37.0 dB)"),
        (Damage(2e-4, 0.7), "0.020 % of its power (37.0 dB, within 2.5 times)"),
        (Damage(0.5, 0.1), "50 % of its power (3.0 dB, a rough guess)"),
        (Damage(0.5, 0.1, 2.0), "200 % of its power (-3.0 dB)"),
    ],
)
def test_a_reason_says_how_sure_it_is(plain: tuple[nn.Module, Sensitivity], damage: Damage, text: str) -> None:
    model, known = plain
    one = replace(known.layers[1], weights={**known.layers[1].weights, (8, "tensor"): damage})
    known = replace(known, layers=(known.layers[0], one, known.layers[2]))
    reason = next(r for r in qvis.analyze(model, sensitivity=known).layers[1].reasons if r.kind == "damage")
    assert f"changes the output by {text}; with a grid per channel " in reason.text


def test_a_loss_is_called_a_loss() -> None:
    analysis = qvis.analyze(mlp(nn.ReLU()), inputs=X, labels=np.arange(16), loss="cross_entropy")
    verdict = summarize(analysis, "sensitivity")["verdict"]
    texts = [verdict["text"], *verdict["details"], *(r.text for layer in analysis.layers for r in layer.reasons)]
    assert "changes the loss by" in " ".join(texts)
    assert "the output" not in " ".join(verdict["details"])


# ---------------------------------------------------------------------------------------------------------------------
# All layers together


def chain(layers: int) -> nn.Sequential:
    """Rotations one after the other: every error reaches the output as it is, and they all add up."""
    torch.manual_seed(1)
    parts = []
    for _ in range(layers):
        parts.append(nn.Linear(16, 16, bias=False))
        with torch.no_grad():
            parts[-1].weight.copy_(torch.linalg.qr(torch.randn(16, 16))[0])
    return nn.Sequential(*parts).eval()


def test_layers_that_are_fine_but_not_together_are_called_so() -> None:
    thresholds, model = Thresholds(watch_db=26, problem_db=20), chain(24)
    known = qvis.sensitivity(model, X, samples=8, bits=6)
    analysis = qvis.analyze(model, sensitivity=known, bits=6, thresholds=thresholds)
    assert {layer.severity for layer in analysis.layers} == {Severity.OK}
    assert analysis.sensitivity is not None
    kept = -10 * log10(analysis.sensitivity.total_both[6, "tensor"].mean)
    assert kept < 20
    verdict = summarize(analysis, "sensitivity")["verdict"]
    assert verdict["text"] == (
        "Predicted from 8 samples: int6 with one grid per tensor suits all 24 layers; but all layers together,"
        f" measured, leave {kept:.1f} dB of the output."
    )
    assert analysis.problematic_layers == ()
    assert "but all layers" not in summarize(qvis.analyze(chain(3), inputs=X), "sensitivity")["verdict"]["text"]


def test_the_totals_are_told_with_what_they_were_measured_on(digits: Analysis) -> None:
    known = digits.sensitivity
    assert known is not None
    told = summarize(digits, "sensitivity")["verdict"]["details"]
    (weights,) = (text for text in told if text.startswith("All weights rounded to int8 at once"))
    both = [f"{-10 * log10(known.total[8, one].mean):.1f} ±" for one in ("tensor", "channel")]
    assert weights.startswith("All weights rounded to int8 at once, measured on 16 samples: the output keeps ")
    assert all(text in weights for text in both)
    (passes,) = (text for text in told if text.startswith("Predicted by"))
    assert passes.startswith(f"Predicted by {known.passes} backward passes")


def test_the_word_on_the_passes_is_as_good_as_their_agreement(plain: tuple[nn.Module, Sensitivity]) -> None:
    model, known = plain

    def told(**changes: Any) -> str:
        analysis = qvis.analyze(model, sensitivity=replace(known, **changes))
        details = summarize(analysis, "sensitivity")["verdict"]["details"]
        return next((text for text in details if text.startswith("Predicted by")), "")

    assert "rank the layers alike (Spearman's 0.95" in told(agreement=0.95)
    assert "rank the layers mostly alike (Spearman's 0.80" in told(agreement=0.8)
    assert "rank the layers differently (Spearman's 0.30" in told(agreement=0.3)
    assert told(agreement=float("nan"), passes=1, settled=False) == "Predicted by 1 backward pass."
    assert told(passes=0) == ""


def test_rounding_that_changes_nothing_keeps_all() -> None:
    model = mlp(nn.ReLU())
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.copy_(torch.eye(16))
    known = qvis.sensitivity(model, X, bits=8)
    known = replace(known, total=dict.fromkeys(known.total, Draws(0.0, 0.0)))
    told = summarize(qvis.analyze(model, sensitivity=known), "sensitivity")["verdict"]["details"]
    assert any("the output keeps all with one grid per tensor and all with a grid per channel" in text for text in told)


def test_layers_that_cannot_be_run_are_judged_by_their_weights_and_named(plain: tuple[nn.Module, Sensitivity]) -> None:
    from qvis.layers import Skipped

    model, known = plain
    with torch.no_grad():
        known = replace(known, layers=known.layers[:2], skipped=(Skipped("4", "cannot be run on other weights"),))
    analysis = qvis.analyze(model, sensitivity=known)
    assert analysis.layers[2].sensitivity is None
    told = summarize(analysis, "sensitivity")["verdict"]["details"]
    assert "1 layer is judged by weights alone: 4 cannot be run on other weights." in told


# ---------------------------------------------------------------------------------------------------------------------
# Remedies


def test_a_grid_per_channel_is_offered_where_it_helps(digits: Analysis) -> None:
    worst = digits.ranked[0]
    assert (worst.name, worst.severity) == ("blocks.0.depthwise", Severity.PROBLEM)
    first = worst.remedies[0]
    assert first.kind == "per_channel"
    assert worst.sensitivity is not None
    assert first.damage == worst.sensitivity.damage(8, "channel").value
    assert first.text == (
        f"A grid per channel for its weights leaves a damage of {100 * first.damage:.5f} %"
        f" ({-10 * log10(first.damage):.1f} dB)."
    )


def test_a_grid_per_channel_is_not_offered_where_weights_do_not_hurt_or_it_is_no_better(
    plain: tuple[nn.Module, Sensitivity],
) -> None:
    model, known = plain
    one = known.layers[1]
    no_better = {key: Damage(0.02 if key[1] == "tensor" else 0.015, 0.1) for key in one.weights}
    harmless = {key: Damage(1e-6 if key[1] == "tensor" else 1e-9, 0.1) for key in one.weights}
    hurt = dict.fromkeys(one.inputs, Damage(0.05, 0.1))
    for changed in (replace(one, weights=no_better), replace(one, weights=harmless, inputs=hurt)):
        layers = (known.layers[0], changed, known.layers[2])
        layer = qvis.analyze(model, sensitivity=replace(known, layers=layers)).layers[1]
        assert layer.severity is Severity.PROBLEM
        assert "per_channel" not in kinds(layer)


def test_clipping_is_offered_where_an_outlier_stretches_the_grid() -> None:
    inputs = X.copy()
    inputs[0, 0] = 3000.0
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Sigmoid(), nn.Linear(16, 4)).eval()
    analysis = qvis.analyze(model, inputs=inputs)
    layer = analysis.layers[0]
    assert layer.reasons[0].kind == "inputs"
    assert layer.remedies[0].kind == "clip"
    assert layer.remedies[0].text.startswith("Clipping what enters to ")
    before = layer.sensitivity.damage(8, what="inputs").value  # type: ignore[union-attr]
    assert layer.remedies[0].damage < before / 2
    assert "clip" not in kinds(qvis.analyze(model, inputs=X, bits=2).layers[1])


def test_more_bits_are_the_fewest_that_suffice(plain: tuple[nn.Module, Sensitivity]) -> None:
    model, known = plain
    for damage, bits, width, left in ((0.02, 4, 8, 0.02 / 4**4), (2.0, 4, 16, 2.0 / 4**12), (0.02, 8, 16, 0.02 / 4**8)):
        analysis = qvis.analyze(model, sensitivity=with_damages(known, _2=damage), bits=bits)
        remedy = next(r for r in analysis.layers[1].remedies if r.kind == "more_bits" and "weights" in r.text)
        assert remedy.text.startswith(f"{width} bits for its weights leave a damage of ")
        assert remedy.damage == pytest.approx(left)


@pytest.mark.parametrize(
    ("between", "expected"),
    [
        ((nn.ReLU(), nn.ReLU()), ["0", "4"]),
        ((nn.Identity(), nn.LeakyReLU()), ["0", "4"]),
        ((nn.Sigmoid(), nn.ReLU()), ["4"]),
        ((nn.ReLU6(), nn.GELU()), []),
        ((nn.Softmax(-1), nn.Dropout()), ["4"]),
    ],
)
def test_a_layer_is_equalized_with_neighbours_beyond_what_hands_factors_on(
    between: tuple[nn.Module, ...], expected: list[str]
) -> None:
    model = mlp(*between)
    known = with_damages(qvis.sensitivity(model, X, bits=8, samples=4, probes=1), _2=0.05)
    analysis = qvis.analyze(model, sensitivity=known)
    found = [remedy.text for remedy in analysis.layers[1].remedies if remedy.kind == "equalize"]
    names = ", ".join(repr(name) for name in expected)
    text = f"Equalize it with {names}: scaling their shared channels changes no output."
    assert found == ([text] if expected else [])


def test_a_normalization_hands_factors_on_only_where_it_is_folded() -> None:
    nodes = [
        Node("x", "input"),
        Node("a", "conv", ("x",), "a"),
        Node("norm", "batch_norm", ("a",)),
        Node("relu", "relu", ("norm",)),
        Node("b", "conv", ("relu",), "b"),
        Node("out", "output", ("b",)),
    ]
    graph = Graph(tuple(nodes))
    assert (neighbours(graph, "a", {"norm"}), neighbours(graph, "b", {"norm"})) == (["b"], ["a"])
    assert (neighbours(graph, "a"), neighbours(graph, "b")) == ([], [])


def test_what_goes_two_ways_or_is_used_twice_has_no_neighbour() -> None:
    start = [Node("x", "input"), Node("a", "linear", ("x",), "a")]
    forked = Graph((*start, Node("b", "linear", ("a",), "b"), Node("c", "linear", ("a",), "c")))
    assert [neighbours(forked, name) for name in "abc"] == [[], [], []]
    twice = Graph((*start, Node("a@2", "linear", ("a",), "a"), Node("b", "linear", ("a@2",), "b")))
    assert [neighbours(twice, name) for name in "ab"] == [[], []]
    assert neighbours(twice, "unknown") == []


def test_dead_channels_are_to_be_pruned() -> None:
    model = mlp(nn.ReLU(), nn.ReLU())
    with torch.no_grad():
        model[2].weight[3] = 0
        model[2].weight[5] = 0
    known = with_damages(qvis.sensitivity(model, X, bits=8, samples=4, probes=1), _2=0.05)
    remedies = qvis.analyze(model, sensitivity=known).layers[1].remedies
    (text,) = (remedy.text for remedy in remedies if remedy.kind == "prune")
    assert text == "Prune channels 3, 5: their weights are zero, or as good as zero."


def test_leaving_it_in_float_costs_its_share() -> None:
    torch.manual_seed(0)
    conv, head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4 * 16, 10)
    model = nn.Sequential(conv, nn.Flatten(), head).eval()
    known = with_damages(qvis.sensitivity(model, noise(8, 1, 4, 4), bits=8, samples=4, probes=1), _0=0.05)
    remedy = qvis.analyze(model, sensitivity=known).layers[0].remedies[-1]
    multiplications, weights = 36 * 16 / (36 * 16 + 640), 36 / (36 + 640)
    assert remedy.kind == "float"
    assert remedy.text == (
        f"Leave it in float: {100 * multiplications:.0f} % of the multiplications and {100 * weights:.1f} % of the"
        " weights stay so, and its damage is gone."
    )
    assert remedy.damage == 0


def test_remedies_are_for_layers_that_need_them_and_cost_comes_last(digits: Analysis) -> None:
    order = ["per_channel", "clip", "equalize", "more_bits", "prune", "float"]
    for layer in digits.layers:
        if layer.severity is Severity.OK:
            assert layer.remedies == ()
        else:
            places = [order.index(kind) for kind in kinds(layer)]
            free, costly = [p for p in places if p < 3], [p for p in places if p >= 3]
            assert places == free + sorted(costly)
            assert kinds(layer)[-1] == "float"


def test_without_a_run_only_what_weights_tell_is_suggested() -> None:
    model = mlp(nn.ReLU(), nn.ReLU())
    with torch.no_grad():
        model[2].weight[::2] *= 4e-3
    layer = qvis.analyze(model).layers[1]
    assert set(kinds(layer)) == {"per_channel", "equalize", "float"}
    assert all(isnan(remedy.damage) for remedy in layer.remedies)
    assert layer.remedies[-1].text == "Leave it in float: 33 % of the weights."


def test_judging_without_a_run_changes_no_severity() -> None:
    analysis = qvis.analyze(mlp(nn.ReLU()))
    assert judge(analysis, None) == analysis


# ---------------------------------------------------------------------------------------------------------------------
# Exclusions


def test_exclusions_name_the_layers_that_are_a_problem(digits: Analysis) -> None:
    found = exclusions(digits, "torchao")
    assert found.names == ("blocks.0.depthwise",)
    assert "'blocks.0.depthwise'" in found.text


@pytest.mark.parametrize("use", [lambda a: exclusions(a, "torchao")])
def test_where_no_layer_is_a_problem_there_is_nothing_to_exclude(use: Callable[[Analysis], object]) -> None:
    with pytest.raises(qvis.BadArgumentError, match="none is a problem"):
        use(qvis.analyze(mlp(nn.ReLU()), inputs=X))
