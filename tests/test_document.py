"""The one summary that every report is made from, and its JSON."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from qvis import __version__
from qvis.adapters.digits import load_digits_model
from qvis.analysis import analyze
from qvis.analysis.comparison import compare
from qvis.layers import Analysis, Severity, Thresholds
from qvis.report.document import (
    SCHEMA_VERSION,
    TITLES,
    Document,
    describe,
    jsonable,
    plain,
    summarize,
    summarize_changes,
)
from tests.weights import Array, analysis, gaussian, weights

HEAD = ["schema_version", "qvis", "kind", "title", "evidence", "bits", "thresholds", "model", "verdict", "layers"]
RUN = ["folding", "sensitivity", "layers", "exclusions"]
LAYER = [
    "name", "op", "shape", "dtype", "aliases", "notes", "weights", "channels", "channels_from", "elements", "severity",
    "reasons", "remedies", "norms", "stored", "noise_share", "noise_share_channel", "sqnr_tensor_db", "sqnr_channel_db",
    "step", "largest_relative_range", "relative_range_statistics", "median_levels", "flags", "digest", "statistics",
    "levels",
]  # fmt: skip
CHANGE = [
    "rank", "name", "op", "channels", "channels_from", "elements", "weights", "name_before", "severity",
    "severity_before", "verdict", "gain_db", "damage_before", "damage_after", "text", "before", "after",
]  # fmt: skip
THRESHOLDS = [
    "watch_db", "problem_db", "starved_levels", "watch_starved", "problem_starved", "dead", "near_dead", "outlier_iqr"
]  # fmt: skip


def bad(seed: int = 0) -> Array:
    """One channel sets a step that is too wide for all others."""
    weight = gaussian(16, 64, seed)
    weight[0] *= 100
    return weight


def summary(weights: dict[str, Any], **options: Any) -> Document:
    return summarize(analysis(weights, **options), "weight_ranges")


def changes(before: dict[str, Any], after: dict[str, Any]) -> Document:
    return summarize_changes(compare(analysis(before), analysis(after)))


def strict(document: Document) -> Any:
    """What a reader of the JSON gets; fails for NaN and for what JSON cannot hold."""
    return json.loads(json.dumps(jsonable(document), allow_nan=False))


# ---------------------------------------------------------------------------------------------------------------------
# Fields. Whoever changes these lists must tell it in docs/json.rst, and raise SCHEMA_VERSION where a field goes.


def test_the_schema_has_a_version() -> None:
    document = summary({"a": gaussian(2, 3)})
    assert document["schema_version"] == SCHEMA_VERSION == 1
    assert document["qvis"] == __version__


def test_a_report_on_one_model_has_these_fields() -> None:
    document = strict(summary({"a": bad()}))
    assert list(document) == [*HEAD[:-1], *RUN, "skipped"]
    assert list(document["thresholds"]) == THRESHOLDS
    assert list(document["model"]) == ["name", "framework", "parameters", "weights", "fingerprint", "counts"]
    assert list(document["model"]["counts"]) == ["ok", "watch", "problem", "unusable"]
    assert list(document["verdict"]) == ["sentence", "text", "details"]
    (layer,) = document["layers"]
    assert list(layer) == ["rank", *LAYER, "sensitivity"]
    assert (document["sensitivity"], layer["sensitivity"], document["exclusions"]) == (None, None, [])
    assert list(document["folding"]) == ["graph", "no_graph", "folded", "refused", "text"]
    assert list(layer["flags"]) == ["nonfinite", "dead", "near_dead", "starved", "outliers"]
    assert list(layer["reasons"][0]) == ["kind", "text", "severity", "channels", "evidence"]
    described = ["count", "mean", "std", "min", "q25", "q50", "q75", "max"]
    assert list(layer["relative_range_statistics"]) == described
    arrays = ["min", "q25", "q50", "mean", "q75", "max", "std", "range", "relative_range"]
    assert list(layer["statistics"]) == arrays
    assert all(len(layer["statistics"][name]) == 16 for name in arrays)
    assert len(layer["levels"]) == 16


def test_a_comparison_has_these_fields() -> None:
    document = strict(changes({"a": bad(), "b": bad()}, {"a": gaussian(16, 64)}))
    assert list(document) == [*HEAD[:-1], "equalization", "layers", "unmatched", "skipped"]
    assert document["equalization"] is None
    assert list(document["model"]) == ["before", "after"]
    (layer,) = document["layers"]
    assert list(layer) == CHANGE
    assert list(layer["before"]) == list(layer["after"]) == LAYER
    assert document["unmatched"] == [{"name": "b", "reason": "only in the old model"}]


def test_a_report_on_a_model_that_was_run_has_these_fields() -> None:
    inputs = np.random.default_rng(0).random((4, 1, 8, 8), dtype=np.float32)
    found = summarize(analyze(load_digits_model(), inputs=inputs), "sensitivity")
    document = strict(found)
    assert list(document["sensitivity"]) == [
        "evidence", "samples", "passes", "settled", "agreement", "loss", "bits", "granularities", "judged",
        "predicted_total", "total", "total_inputs", "total_both", "total_spread_db", "operations", "notes", "methods",
    ]  # fmt: skip
    layer = document["layers"][2]
    known, entering = layer["sensitivity"], layer["sensitivity"]["entering"]
    assert list(known) == [
        "damage", "damage_db", "spread", "confidence", "damage_inputs", "weights", "inputs", "without",
        "predicted_without", "output_sqnr_db", "operations", "share_of_operations", "entering", "weight_grids",
    ]  # fmt: skip
    figures = ["value", "predicted", "spread", "measured", "confidence"]
    assert list(known["weights"]["tensor"]) == list(known["inputs"]) == figures
    histogram = ["low", "high", "counts", "importance"]
    assert list(entering) == [*histogram, "zeros", "channels", "step", "zero", "grids", "channel_statistics"]
    assert list(known["weight_grids"]) == [*histogram, "grids"]
    assert list(entering["grids"][0]) == ["method", "step", "zero", "low", "high", "sqnr_db", "damage"]
    assert {len(entering[name]) for name in ("counts", "importance")} == {64}
    assert {len(values) for values in entering["channel_statistics"].values()} == {entering["channels"]}
    assert set(layer["stored"]) == set(LAYER[LAYER.index("stored") + 1 :])
    assert layer["stored"]["digest"] != layer["digest"]
    light = jsonable(found, statistics=False)["layers"][2]["sensitivity"]
    assert not {"counts", "importance", "channel_statistics"} & {*light["entering"], *light["weight_grids"]}


@pytest.mark.parametrize("kind", ["weight_ranges", "relative_weight_ranges"])
def test_a_report_says_what_it_is(kind: str) -> None:
    document = summarize(analysis({"a": gaussian(2, 3)}, bits=6), kind)
    assert (document["kind"], document["title"], document["bits"]) == (kind, TITLES[kind], 6)
    assert changes({"a": gaussian(2, 3)}, {"a": gaussian(2, 3)})["kind"] == "changes_after_optimization"


# ---------------------------------------------------------------------------------------------------------------------
# Values


@settings(deadline=None, max_examples=80)
@given(st.lists(weights(channels=12, elements=20), min_size=1, max_size=3), st.integers(2, 16))
def test_every_summary_is_plain_and_holds_for_json(arrays: list[Array], bits: int) -> None:
    document = summary({f"layer{i}": array for i, array in enumerate(arrays)}, bits=bits)
    assert strict(document) == jsonable(document)
    assert "nan" not in document["verdict"]["text"]
    assert [layer["name"] for layer in document["layers"]] == [f"layer{i}" for i in range(len(arrays))]
    assert sorted(layer["rank"] for layer in document["layers"]) == list(range(1, len(arrays) + 1))


@settings(deadline=None, max_examples=30)
@given(weights(channels=12, elements=20), weights(channels=12, elements=20))
def test_every_comparison_is_plain_and_holds_for_json(before: Array, after: Array) -> None:
    document = changes({"a": before, "b": before, "c": before}, {"a": after, "b": before, "c": before * 1})
    assert strict(document) == jsonable(document)


def test_numbers_that_are_none_become_null() -> None:
    weight = gaussian(3, 4)
    weight[1] = np.nan
    (broken,) = strict(summary({"a": weight}))["layers"]
    for values in broken["statistics"].values():
        assert [value is None for value in values] == [False, True, False]
    (single,) = strict(summary({"a": np.array([[1.0], [2.0]])}))["layers"]
    assert single["statistics"]["std"] == [None, None]
    (exact,) = strict(summary({"a": np.array([[127.0, -3]])}))["layers"]
    assert exact["noise_share"] == 0
    assert exact["sqnr_tensor_db"] is None
    (zero,) = strict(summary({"a": np.zeros((2, 2))}))["layers"]
    assert (zero["noise_share"], zero["largest_relative_range"], zero["median_levels"]) == (None, None, 0)


def test_values_are_those_of_the_analysis() -> None:
    found = analysis({"fine": gaussian(16, 64, 1), "bad": bad()})
    document = strict(summarize(found, "weight_ranges"))
    for layer, written in zip(found.layers, document["layers"], strict=True):
        for name, values in written["statistics"].items():
            assert values == getattr(layer.statistics, name).tolist()
        assert written["levels"] == layer.rounding.levels.tolist()
        assert written["noise_share"] == layer.noise_share
        assert written["noise_share_channel"] == layer.noise_share_channel
        assert written["sqnr_tensor_db"] == layer.rounding.sqnr_tensor
        assert written["sqnr_channel_db"] == layer.rounding.sqnr_channel
        assert written["step"] == layer.rounding.step == max(layer.statistics.peak) / 127
        assert written["largest_relative_range"] == max(layer.statistics.relative_range)
        assert written["median_levels"] == float(np.median(layer.rounding.levels))
        assert written["flags"] == {name: channels.tolist() for name, channels in layer.flags.items()}
        assert [one["text"] for one in written["reasons"]] == [one.text for one in layer.reasons]
        assert [one["severity"] for one in written["reasons"]] == [one.severity.value for one in layer.reasons]
        assert written["shape"] == [16, 64]
    assert [layer["rank"] for layer in document["layers"]] == [2, 1]
    assert document["model"]["counts"] == {"ok": 1, "watch": 0, "problem": 1, "unusable": 0}
    assert document["model"]["weights"] == 2 * 16 * 64


@settings(deadline=None, max_examples=60)
@given(weights(channels=40, elements=30, exponents=(-10, 10)))
def test_relative_ranges_of_live_channels_are_described_as_by_pandas(weight: Array) -> None:
    found = analysis({"a": weight})
    live = found.layers[0].statistics.live
    relative = found.layers[0].statistics.relative_range[live]
    (layer,) = summarize(found, "relative_weight_ranges")["layers"]
    expected = pd.Series(relative, dtype=float).describe().rename({"25%": "q25", "50%": "q50", "75%": "q75"})
    slack = 1e-12 * float(relative.max(initial=0))
    assert set(expected.index) == set(layer["relative_range_statistics"])
    for name, value in layer["relative_range_statistics"].items():
        assert_allclose(value, expected[name], rtol=1e-6, atol=slack, err_msg=name)


@pytest.mark.parametrize("values", [[], [3.0], [1.0, 2.0], [1.0, 5.0, 9.0, 2.0]])
def test_few_values_are_described_as_by_pandas(values: list[float]) -> None:
    expected = pd.Series(values, dtype=float).describe().to_numpy()
    assert_allclose(list(describe(np.array(values)).values()), expected, rtol=1e-12)


def test_statistics_of_the_shipped_model_are_those_of_pandas() -> None:
    model = load_digits_model()
    document = strict(summarize(analyze(model, fold=False), "relative_weight_ranges"))
    parameters = {name: value.detach().numpy() for name, value in model.named_parameters()}
    assert len(document["layers"]) == 18
    for layer in document["layers"]:
        weight = parameters[f"{layer['name']}.weight"]
        assert layer["shape"] == list(weight.shape)
        described = pd.DataFrame(weight.reshape(len(weight), -1).T.astype(np.float64)).describe().T
        names = {"min": "min", "max": "max", "mean": "mean", "std": "std", "q25": "25%", "q50": "50%", "q75": "75%"}
        slack = 1e-12 * float(np.abs(weight).max())
        for ours, theirs in names.items():
            assert_allclose(layer["statistics"][ours], described[theirs], rtol=1e-6, atol=slack)
        ranges = (described["max"] - described["min"]).to_numpy()
        assert_allclose(layer["statistics"]["range"], ranges, rtol=1e-12)


def test_two_analyses_of_one_model_give_the_same_text() -> None:
    texts = [json.dumps(jsonable(summarize(analyze(load_digits_model()), "weight_ranges"))) for _ in range(2)]
    assert texts[0] == texts[1]


def test_a_summary_without_arrays_has_all_else() -> None:
    document = summary({"a": gaussian(3, 4)})
    short, full = jsonable(document, statistics=False), jsonable(document)
    for layer in full["layers"]:
        del layer["statistics"], layer["levels"]
    assert short == full


def test_what_json_cannot_hold_is_refused_and_not_guessed() -> None:
    with pytest.raises(TypeError, match="set has no place in a document"):
        jsonable({"a": [{1, 2}]})


# ---------------------------------------------------------------------------------------------------------------------
# The verdict


WEIGHTS = {
    "fine": gaussian(16, 64, 1),
    "watched": gaussian(16, 64, 3) * np.where(np.arange(16) == 0, 6, 1)[:, None],
    "bad": bad(),
    "worse": bad() * np.where(np.arange(16) == 0, 3, 1)[:, None],
    "zero": np.zeros((2, 2)),
}
GRID = "int8 with one grid per tensor"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("fine", f"{GRID} suits the only layer."),
        ("fine fine2", f"{GRID} suits all 2 layers."),
        ("fine watched", f"no layer is a problem at {GRID}; 1 of 2 deserves a look."),
        ("watched watched2", f"no layer is a problem at {GRID}; 2 of 2 deserve a look."),
        ("fine bad worse watched", f"2 of 4 layers will suffer at {GRID}, worse most."),
        ("zero fine", "1 layer of 2 is unusable (NaN, infinite or all zero)."),
        (
            "zero bad zero2",
            f"2 layers of 3 are unusable (NaN, infinite or all zero) and 1 will suffer at {GRID}.",
        ),
    ],
)
def test_the_verdict_is_one_sentence_with_its_evidence(names: str, expected: str) -> None:
    verdict = summary({name: WEIGHTS[name.rstrip("2")] for name in names.split()})["verdict"]
    assert verdict["text"] == plain(verdict["sentence"]) == f"From the weights alone: {expected}"
    assert {style for _, style in verdict["sentence"]} <= {"", "strong", *map(str, Severity)}


def test_the_details_name_the_noisiest_layer_and_what_a_grid_per_channel_would_do() -> None:
    document = summary({name: WEIGHTS[name] for name in ("bad", "worse", "fine")})
    share = {layer["name"]: layer["noise_share"] for layer in document["layers"]}["worse"]
    noisiest, cure, caveat = document["verdict"]["details"]
    match = re.search(r"layer, (\w+), a quarter .* \((-?[\d.]+) dB\)\.$", noisiest)
    assert match
    assert match[1] == "worse"
    assert float(match[2]) == pytest.approx(-10 * math.log10(share), abs=0.05)
    assert cure == "A grid per channel would bring both below 0.10 %."
    assert caveat.startswith("No data was run: ")


def test_the_details_say_when_a_grid_per_channel_is_no_cure() -> None:
    weight = gaussian(16, 1000)
    weight[:, 0] = 1000  # each channel is wide by itself
    details = summary({"a": weight})["verdict"]["details"]
    assert "A grid per channel would bring it down, but not below 0.10 %." in details


def test_a_name_cannot_turn_the_verdict_around() -> None:
    verdict = summary({"a\u202e\nb": bad()})["verdict"]
    assert "a\\u202e\\nb most." in verdict["text"]
    assert "a\\u202e\\nb" in verdict["details"][0]


def test_the_thresholds_in_use_are_written_down() -> None:
    document = summary({"a": bad()}, thresholds=Thresholds(problem_db=-50, watch_db=-50, problem_starved=2))
    assert document["thresholds"]["problem_db"] == -50
    assert document["layers"][0]["severity"] == "watch"


CHANGED = {"a": gaussian(16, 64, 5), "b": gaussian(16, 64, 6), "c": gaussian(16, 64, 7)}
START = "From the weights alone: at int8 with one grid per tensor "


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (CHANGED, CHANGED, "nothing changed in 3 layers."),
        (CHANGED, {"x": CHANGED["a"]}, "no layer of the two models could be matched."),
        (
            CHANGED | {"a": bad()},
            CHANGED,
            "1 of 3 layers will round better than before and 0 worse; 2 stay as they were.",
        ),
        (
            CHANGED | {"a": bad()},
            CHANGED | {"b": bad()},
            "1 of 3 layers will round better than before and 1 worse; 1 stays as it was.",
        ),
        ({"a": bad()}, {"a": CHANGED["a"]}, "1 of 1 layer will round better than before and 0 worse."),
    ],
)
def test_the_verdict_on_changes_counts_them(before: dict[str, Array], after: dict[str, Array], expected: str) -> None:
    verdict = changes(before, after)["verdict"]
    assert verdict["text"] == plain(verdict["sentence"]) == START + expected


def test_the_details_of_changes_count_severities_and_layers_without_a_match() -> None:
    before = {"a": bad(), "b": np.zeros((2, 2)), "old": gaussian(2, 2)}
    after = {"a": CHANGED["a"], "b": np.zeros((2, 2))}
    details = changes(before, after)["verdict"]["details"]
    assert details[:3] == [
        "Unusable: 1 before, 1 after.",
        "Problem: 1 before, 0 after.",
        "1 layer could not be compared; it is named below.",
    ]
    details = changes(before, after | {"new": gaussian(2, 2)})["verdict"]["details"]
    assert "2 layers could not be compared; they are named below." in details
    assert details[-1].startswith("No data was run: ")


def test_a_document_holds_nothing_of_the_machine_or_the_day() -> None:
    found: Analysis = analyze(load_digits_model())
    text = json.dumps(jsonable(summarize(found, "weight_ranges")))
    assert not re.search(r"\b20\d\d-\d\d|/home|/tmp|/work|/usr|site-packages|localhost|0x[0-9a-f]{6}", text)
