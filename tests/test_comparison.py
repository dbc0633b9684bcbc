"""Two versions of a model, side by side."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from qvis.analysis.comparison import NOTICEABLE_DB, Comparison, LayerChange, compare
from qvis.layers import Severity, decibels
from qvis.report.document import summarize_changes
from qvis.words import percent
from tests.weights import Array, analysis, finding, gaussian, weights


def comparison(before: dict[str, Any], after: dict[str, Any], **options: Any) -> Comparison:
    return compare(analysis(before, **options), analysis(after, **options))


def change(before: Any, after: Any) -> LayerChange:
    return LayerChange(finding(before), finding(after))


def widened(times: float) -> Array:
    """Nine channels for which the step grows with ``times``, and so does what they lose."""
    weight = gaussian(9, 200).astype(np.float64)
    weight[0] *= times
    return weight


def test_layers_are_matched_by_name_in_the_order_of_the_model_after() -> None:
    weight = gaussian(3, 4)
    found = comparison({"a": weight, "b": 2 * weight, "c": weight}, {"c": 3 * weight, "b": weight, "a": weight})
    assert [one.name for one in found.layers] == ["c", "b", "a"]
    assert found.unmatched == ()
    for one in found.layers:
        assert one.before.name == one.after.name
        assert one.before in found.before.layers
        assert one.after in found.after.layers


def test_layers_of_one_model_only_or_of_another_shape_are_named() -> None:
    weight = gaussian(3, 4)
    found = comparison(
        {"kept": weight, "gone": weight, "turned": weight},
        {"new": weight, "turned": weight.T, "kept": weight},
    )
    assert [one.name for one in found.layers] == ["kept"]
    assert [(one.name, one.reason) for one in found.unmatched] == [
        ("new", "only in the new model"),
        ("turned", "its shape was 3×4 and is 4×3"),
        ("gone", "only in the old model"),
    ]


def test_nothing_matches_between_strangers() -> None:
    found = comparison({"a": gaussian(2, 2)}, {"b": gaussian(2, 2)})
    assert found.layers == found.ranked == ()
    assert found.count("unchanged") == 0


def test_the_same_bytes_are_unchanged() -> None:
    one = change(gaussian(5, 6), gaussian(5, 6).copy())
    assert (one.verdict, one.gain_db) == ("unchanged", 0)
    assert one.text == "The weights are the same, bit for bit."


def test_unusable_layers_of_the_same_bytes_are_unchanged_too() -> None:
    assert change(np.full((2, 2), np.nan), np.full((2, 2), np.nan)).verdict == "unchanged"


def test_other_weights_that_round_as_well_are_the_same() -> None:
    one = change(gaussian(9, 400, 1), 3 * gaussian(9, 400, 1))
    assert (one.verdict, one.gain_db) == ("same", pytest.approx(0, abs=0.01))


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [(100, 10, "better"), (10, 100, "worse"), (10, 11.5, "worse"), (11.5, 10, "better"), (10, 10.1, "same")],
)
def test_a_layer_is_better_or_worse_by_the_noise_of_its_channels(before: float, after: float, verdict: str) -> None:
    one = change(widened(before), widened(after))
    assert one.verdict == verdict
    gain = decibels(1, one.after.noise_share) - decibels(1, one.before.noise_share)
    assert one.gain_db == pytest.approx(gain)
    assert one.gain_db == pytest.approx(20 * math.log10(before / after), abs=1)
    assert (abs(one.gain_db) < NOTICEABLE_DB) == (verdict == "same")


def test_the_change_is_told_with_both_shares_and_the_gain() -> None:
    one = change(widened(100), widened(5))
    match = re.fullmatch(
        r"A quarter of the channels lose (.+) or more of their power to rounding on one grid for the tensor;"
        r" before it was (.+) \((.+) dB\)\.",
        one.text,
    )
    assert match
    assert match.groups() == (percent(one.after.noise_share), percent(one.before.noise_share), f"{one.gain_db:+.1f}")


def test_a_gain_without_bounds_is_told_without_a_number() -> None:
    exact = np.tile([127.0, -127, 4, 7], (4, 1))
    exact[3, 2:] += 0.3  # one channel beside the grid: the layer is not rounded, and yet most of it loses nothing
    better, worse = change(exact + 0.3, exact), change(exact, exact + 0.3)
    assert (better.gain_db, better.verdict) == (math.inf, "better")
    assert (worse.gain_db, worse.verdict) == (-math.inf, "worse")
    for one in (better, worse):
        assert "inf" not in one.text
        assert "dB" not in one.text
    assert "lose 0 % or more" in better.text
    assert change(exact, 2 * exact).verdict == "same"


@pytest.mark.parametrize("broken", [np.zeros((4, 8)), np.full((4, 8), np.nan), np.full((4, 8), np.inf)])
def test_a_layer_that_becomes_unusable_is_worse_and_one_that_recovers_is_better(broken: Array) -> None:
    fine = gaussian(4, 8)
    worse, better = change(fine, broken), change(broken, fine)
    assert (worse.verdict, better.verdict) == ("worse", "better")
    assert worse.text == "Ok before, unusable after."
    assert better.text == "Unusable before, ok after."


def test_one_unusable_layer_in_place_of_another_is_the_same() -> None:
    one = change(np.zeros((2, 3)), np.full((2, 3), np.nan))
    assert one.verdict == "same"
    assert one.text == "Unusable before, unusable after."


def test_a_change_reads_like_the_layer_after() -> None:
    one = change(widened(100), widened(5))
    for name in ("name", "op", "shape", "severity", "reasons", "statistics"):
        assert getattr(one, name) is getattr(one.after, name)
    assert (one.before.severity, one.severity) == (Severity.PROBLEM, one.after.severity)


def test_changes_are_ranked_by_severity_after_and_then_by_what_got_worse() -> None:
    before = {
        "unchanged": widened(1),
        "slightly": widened(1),
        "much": widened(1),
        "bad": widened(200),
        "spoilt": widened(1),
        "broken": widened(1),
        "zero": np.zeros((9, 200)),
    }
    after = before | {
        "slightly": widened(2),
        "much": widened(4),
        "spoilt": widened(100),
        "broken": np.full((9, 200), np.nan),
        "zero": 1 * before["zero"],
    }
    found = comparison(before, after)
    names = [one.name for one in found.ranked]
    assert names == ["broken", "zero", "spoilt", "bad", "much", "slightly", "unchanged"]
    counts = {verdict: found.count(verdict) for verdict in ("better", "worse", "same", "unchanged")}
    assert counts == {"better": 0, "worse": 4, "same": 0, "unchanged": 3}


@settings(deadline=None, max_examples=60)
@given(weights(channels=10, elements=30), weights(channels=10, elements=30))
def test_swapping_the_models_turns_every_change_around(one: Array, other: Array) -> None:
    size = min(len(one), len(other))
    elements = min(one.shape[1], other.shape[1])
    one, other = one[:size, :elements], other[:size, :elements]
    forth, back = change(one, other), change(other, one)
    opposite = {"better": "worse", "worse": "better", "same": "same", "unchanged": "unchanged", "rounded": "rounded"}
    assert back.verdict == opposite[forth.verdict]
    np.testing.assert_array_equal(back.gain_db, -forth.gain_db)
    for either in (forth, back):
        assert not re.search(r"\b(nan|inf)\b", either.text)


@pytest.mark.parametrize("per_channel", [False, True], ids=["per tensor", "per channel"])
def test_weights_that_are_rounded_already_are_not_called_better(per_channel: bool) -> None:
    weight = gaussian(6, 50)
    step = np.abs(weight).max(axis=1, keepdims=True) / 127
    on_grid = np.rint(weight / (step if per_channel else step.max())) * (step if per_channel else step.max())
    for found in (change(weight, on_grid.astype(np.float32)), change(on_grid.astype(np.float32), weight)):
        assert found.verdict == "rounded"
        assert math.isnan(found.gain_db)
        assert "do not show what rounding them has cost" in found.text


def test_the_verdict_on_a_quantized_model_claims_no_gain() -> None:
    weight = gaussian(6, 50)
    step = np.abs(weight).max() / 127
    document = summarize_changes(comparison({"a": weight}, {"a": (np.rint(weight / step) * step).astype(np.float32)}))
    assert "1 of 1 layer is rounded already in the new model" in document["verdict"]["text"]
    assert "better" not in document["verdict"]["text"]
