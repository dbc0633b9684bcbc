"""What makes a layer a problem and what does not, and whether the reasons say it right."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from qvis.adapters.digits import load_digits_model
from qvis.analysis import analyze
from qvis.errors import BadArgumentError
from qvis.layers import Analysis, LayerAnalysis, Reason, Severity, Thresholds, decibels
from qvis.words import percent
from tests.weights import Array, analysis, finding, gaussian, layer, network, weights

OK, WATCH, PROBLEM, UNUSABLE = Severity


def reason(found: LayerAnalysis, kind: str) -> Reason | None:
    """The layer's only reason of this kind."""
    reasons = [one for one in found.reasons if one.kind == kind]
    assert len(reasons) <= 1
    return reasons[0] if reasons else None


def severity_of(found: LayerAnalysis, kind: str) -> Severity | None:
    one = reason(found, kind)
    return one.severity if one else None


def text(weight: Any, kind: str, **options: Any) -> str:
    one = reason(finding(weight, **options), kind)
    assert one is not None
    assert str(one) == one.text
    return one.text


# ---------------------------------------------------------------------------------------------------------------------
# One channel never decides


@settings(deadline=None, max_examples=150)
@given(
    st.integers(2, 512),
    st.sampled_from([9, 64, 300]),
    st.integers(0, 1000),
    st.one_of(st.just(0.0), st.floats(-12, -1).map(lambda exponent: 10**exponent)),
)
def test_one_near_dead_channel_never_makes_a_layer_a_problem(
    channels: int, elements: int, seed: int, scale: float
) -> None:
    weight = gaussian(channels, elements, seed)
    weight[seed % channels] *= scale
    found = finding(weight)
    assert found.severity is OK
    if scale < 1e-4 and channels > 3:
        assert {seed % channels} == {*found.flags["dead"], *found.flags["near_dead"]}


@pytest.mark.parametrize("channels", [3, 4, 5, 16, 512])
def test_one_channel_a_hundred_times_wider_makes_the_others_a_problem(channels: int) -> None:
    weight = gaussian(channels, 64)
    weight[1] *= 100
    found = finding(weight)
    assert found.severity is PROBLEM
    assert severity_of(found, "noise") is PROBLEM
    assert severity_of(found, "starved") is PROBLEM
    assert found.flags["starved"].tolist() == [i for i in range(channels) if i != 1]
    assert found.noise_share > 100 * found.noise_share_channel


@pytest.mark.parametrize("kind", ["dead", "near_dead"])
def test_few_dead_or_near_dead_channels_are_only_mentioned(kind: str) -> None:
    weight = gaussian(20, 64)
    weight[:5] *= {"dead": 1e-9, "near_dead": 1e-4}[kind]
    found = finding(weight)
    assert found.severity is OK
    assert severity_of(found, kind) is OK
    assert found.flags[kind].tolist() == [0, 1, 2, 3, 4]


def test_a_majority_of_near_dead_channels_is_to_be_watched() -> None:
    weight = gaussian(20, 64)
    weight[:12] *= 1e-4
    found = finding(weight)
    assert found.severity is WATCH
    assert severity_of(found, "near_dead") is WATCH
    weight[10:12] *= 1e4  # half of them is no majority
    assert severity_of(finding(weight), "near_dead") is OK


def test_dead_channels_do_not_count_towards_the_majority_of_the_live_ones() -> None:
    weight = gaussian(20, 64)
    weight[:15] = 0
    assert finding(weight).severity is OK


@pytest.mark.parametrize("factor", [1, 1e-4])
def test_equal_weights_need_no_levels_and_are_no_problem(factor: float) -> None:
    weight = np.ones((6, 8)) * np.array([1, factor, 1, 1, factor, 1])[:, None]
    found = finding(weight)
    assert found.severity is OK
    assert found.flags["starved"].size == 0


# ---------------------------------------------------------------------------------------------------------------------
# Flags


@settings(deadline=None, max_examples=100)
@given(weights(channels=60, elements=30, exponents=(-10, 10)), st.sampled_from([0.5, 1.5, 3.0]))
def test_outliers_are_those_of_aimets_rule_over_live_channels(weight: Array, iqr: float) -> None:
    found = finding(weight, thresholds=Thresholds(outlier_iqr=iqr))
    live = np.flatnonzero(found.statistics.live)
    relative = found.statistics.relative_range
    ordered = sorted(float(relative[i]) for i in live)

    def quartile(q: float) -> float:
        place = q * (len(ordered) - 1)
        low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
        return low + (high - low) * (place - math.floor(place))

    limit = quartile(0.75) + iqr * (quartile(0.75) - quartile(0.25)) if ordered else math.inf
    near = {int(i) for i in live if math.isclose(relative[i], limit, rel_tol=1e-9)}  # may fall on either side
    expected = {int(i) for i in live if relative[i] > limit}
    assert set(found.flags["outliers"].tolist()) | near == expected | near


def test_dead_channels_do_not_hide_outliers() -> None:
    weight = gaussian(30, 64)
    weight[7] *= 5
    assert finding(weight).flags["outliers"].tolist() == [7]
    weight[10:] *= 1e-9
    assert finding(weight).flags["outliers"].tolist() == [7]


@settings(deadline=None, max_examples=100)
@given(weights(channels=60, elements=30, exponents=(-10, 10)), st.integers(2, 16))
def test_flags_follow_their_definitions(weight: Array, bits: int) -> None:
    found = finding(weight, bits)
    statistics, thresholds = found.statistics, Thresholds()
    live = np.flatnonzero(statistics.live).tolist()
    assert list(found.flags) == ["nonfinite", "dead", "near_dead", "starved", "outliers"]
    assert found.flags["nonfinite"].tolist() == np.flatnonzero(~np.isfinite(weight).all(axis=1)).tolist()
    assert found.flags["dead"].tolist() == np.flatnonzero(statistics.dead).tolist()
    usual = float(np.percentile(statistics.peak[live], 75)) if live else 0
    near_dead = [i for i in live if statistics.peak[i] < thresholds.near_dead * usual]
    assert found.flags["near_dead"].tolist() == near_dead
    few = [i for i in live if statistics.range[i] > 0 and found.rounding.levels[i] < thresholds.starved_levels]
    assert found.flags["starved"].tolist() == [i for i in few if i not in near_dead]


# ---------------------------------------------------------------------------------------------------------------------
# Severity


@settings(deadline=None, max_examples=150)
@given(weights(), st.integers(2, 16))
def test_a_layer_is_as_severe_as_its_weightiest_reason_which_comes_first(weight: Array, bits: int) -> None:
    found = finding(weight, bits)
    ranks = [one.severity.rank for one in found.reasons]
    assert ranks == sorted(ranks, reverse=True)
    assert found.severity.rank == ranks[0]
    kinds = [one.kind for one in found.reasons]
    assert len(set(kinds)) == len(kinds)
    assert (found.severity is UNUSABLE) == (not np.isfinite(weight).all() or not weight.any())
    for one in found.reasons:
        assert one.evidence == "from the weights alone"
        assert one.channels == tuple(found.flags.get(one.kind, ()))
        assert all(type(channel) is int for channel in one.channels)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(1, 1), (8, 30)])
def test_one_weight_that_is_not_finite_makes_a_layer_unusable(value: float, shape: tuple[int, int]) -> None:
    weight = gaussian(*shape)
    weight[-1, -1] = value
    found = finding(weight)
    assert found.severity is UNUSABLE
    assert found.reasons[0].kind == "nonfinite"
    assert found.flags["nonfinite"].tolist() == [shape[0] - 1]


def test_a_layer_of_zeros_is_unusable() -> None:
    found = finding(np.zeros((5, 3), np.float32))
    assert found.severity is UNUSABLE
    assert [str(one) for one in found.reasons] == ["No channel holds a finite weight other than zero."]


@pytest.mark.parametrize("bits", range(2, 17))
def test_every_bit_more_quarters_the_noise_and_never_raises_the_severity(bits: int) -> None:
    weight = gaussian(32, 64)
    weight[0] *= 20
    found = finding(weight, bits)
    assert f"int{bits} grid" in text(weight, "noise", bits=bits)
    if bits < 16:
        better = finding(weight, bits + 1)
        assert better.severity.rank <= found.severity.rank
        assert better.noise_share <= found.noise_share
        if bits >= 8:  # below, steps are not small against the weights
            assert_allclose(found.noise_share / better.noise_share, 4 * (1 - 2 ** (1 - bits)) ** -2, rtol=0.1)


def test_the_noise_thresholds_move_the_verdict() -> None:
    weight = gaussian(16, 64)
    kept = decibels(1, finding(weight).noise_share)
    for problem, watch, expected in [
        (kept + 0.01, kept + 5, PROBLEM),
        (kept - 0.01, kept + 0.01, WATCH),
        (kept - 5, kept - 0.01, OK),
    ]:
        assert finding(weight, thresholds=Thresholds(problem_db=problem, watch_db=watch)).severity is expected


def test_the_starving_thresholds_move_the_verdict() -> None:
    weight = gaussian(10, 64)
    weight[:9] /= 20  # 9 of 10 channels get about 13 levels
    quiet = Thresholds(problem_db=-100, watch_db=-100)
    assert finding(weight, thresholds=quiet).severity is OK
    hungry = replace(quiet, starved_levels=40)
    assert finding(weight, thresholds=hungry).severity is PROBLEM
    assert len(finding(weight, thresholds=hungry).flags["starved"]) == 9
    assert finding(weight, thresholds=replace(hungry, problem_starved=0.9)).severity is PROBLEM
    assert finding(weight, thresholds=replace(hungry, problem_starved=0.91)).severity is WATCH
    assert finding(weight, thresholds=replace(hungry, problem_starved=0.91, watch_starved=0.91)).severity is OK


def test_the_thresholds_for_dead_and_near_dead_channels_move_them() -> None:
    weight = gaussian(20, 64)
    weight[3] *= 0.01
    assert finding(weight).flags["near_dead"].size == 0
    assert finding(weight, thresholds=Thresholds(near_dead=0.1)).flags["near_dead"].tolist() == [3]
    assert finding(weight, thresholds=Thresholds(dead=0.1)).flags["dead"].tolist() == [3]
    assert finding(weight, thresholds=Thresholds(dead=0.1, near_dead=0.1)).flags["near_dead"].size == 0


@given(st.sampled_from(Severity))
def test_severities_are_words_that_can_be_ordered(severity: Severity) -> None:
    assert [str(one) for one in Severity] == ["ok", "watch", "problem", "unusable"]
    assert Severity(str(severity)) is severity
    assert list(Severity)[severity.rank] is severity


# ---------------------------------------------------------------------------------------------------------------------
# Order


def mixed() -> dict[str, Any]:
    """Layers of every severity, the weighty ones last."""
    bad = gaussian(16, 64, 1)
    bad[0] *= 50
    return {
        "fine": gaussian(16, 64, 2),
        "exact": np.array([[127.0, -127], [3, 4], [5, -6]]),
        "watched": gaussian(16, 64, 3) * np.where(np.arange(16) == 0, 6, 1)[:, None],
        "bad": bad,
        "worse": bad * np.where(np.arange(16) == 0, 3, 1)[:, None],
        "zero": np.zeros((4, 4)),
        "nan": np.where(np.arange(1024).reshape(16, 64) == 7, np.nan, gaussian(16, 64, 4)),
    }


def test_layers_are_ranked_by_severity_and_then_by_noise() -> None:
    found = analysis(mixed())
    assert [one.name for one in found.layers] == list(mixed())
    assert [one.name for one in found.ranked] == ["zero", "nan", "worse", "bad", "watched", "fine", "exact"]
    assert [one.name for one in found.problematic_layers] == ["zero", "nan", "worse", "bad"]


@settings(deadline=None, max_examples=20)
@given(st.lists(weights(channels=8, elements=20), min_size=1, max_size=6))
def test_no_layer_is_ranked_before_a_worse_one(arrays: list[Array]) -> None:
    found = analysis({f"layer{i}": array for i, array in enumerate(arrays)})
    assert sorted(one.name for one in found.ranked) == sorted(one.name for one in found.layers)
    keys = [(one.severity.rank, math.inf if math.isnan(one.noise_share) else one.noise_share) for one in found.ranked]
    assert keys == sorted(keys, reverse=True)


def test_equally_noisy_layers_stay_in_the_models_order() -> None:
    weight = gaussian(4, 10)
    assert [one.name for one in analysis({"b": weight, "a": weight, "c": weight}).ranked] == ["b", "a", "c"]


# ---------------------------------------------------------------------------------------------------------------------
# Words


@settings(deadline=None, max_examples=80)
@given(weights(channels=30, elements=60, finite=True, exponents=(-5, 5), spread=4), st.integers(2, 16))
def test_the_reason_for_noise_has_the_numbers_of_the_layer(weight: Array, bits: int) -> None:
    found = finding(weight, bits)
    one = reason(found, "noise")
    if not weight.any():
        assert one is None
        return
    assert one is not None
    assert one.text.startswith(f"On one int{bits} grid for the tensor, ")
    if found.noise_share == 0:
        assert one.text.endswith(", most channels lose nothing to rounding.")
        return
    match = re.fullmatch(
        r".+, a quarter of the channels lose (.+?) or more of their power to rounding \((-?[\d.]+) dB\); a grid per"
        r" channel would (?:lose nothing|make that (.+?) \((-?[\d.]+) dB\))\.",
        one.text,
    )
    assert match
    shares = [(found.noise_share, match[1], match[2]), (found.noise_share_channel, match[3], match[4])]
    for share, in_percent, in_decibels in shares:
        if in_percent is None:
            assert share == 0
            continue
        assert in_percent == percent(share)
        assert abs(float(in_decibels) + 10 * math.log10(share)) <= 0.05 + 1e-9


def test_the_reason_for_starving_counts_channels_and_levels() -> None:
    weight = gaussian(10, 64)
    weight[4] *= 80
    weight[6] /= 2
    found = finding(weight)
    fewest = min(found.rounding.levels)
    assert found.rounding.levels[6] == fewest
    assert text(weight, "starved") == (
        f"9 channels of 10 are starved: fewer than 8 of the 256 levels of the tensor's grid (channel 6 gets {fewest})."
    )


def test_one_starved_channel_is_told_in_the_singular_and_is_no_problem() -> None:
    weight = gaussian(10, 64)
    weight[6] /= 200
    found = finding(weight, 6)
    assert text(weight, "starved", bits=6) == (
        "1 channel of 10 is starved: fewer than 8 of the 64 levels of the tensor's grid (channel 6 gets 1)."
    )
    assert severity_of(found, "starved") is OK


@pytest.mark.parametrize(
    ("number", "start", "them"),
    [
        (1, "1 channel of 12 is near dead (channel 0)", "it"),
        (3, "3 channels of 12 are near dead (channels 0, 1, 2)", "them"),
        (6, "6 channels of 12 are near dead (channels 0, 1, 2, 3 and 2 more)", "them"),
    ],
)
def test_near_dead_channels_are_counted_and_named(number: int, start: str, them: str) -> None:
    weight = gaussian(12, 64)
    weight[:number] *= 1e-4
    assert text(weight, "near_dead") == (
        f"{start}: below 0.001 of what is usual here. Rounding empties {them}, which costs nothing unless a later"
        f" layer scales {them} up again; the weights alone cannot tell."
    )


def test_dead_channels_are_counted_and_named() -> None:
    weight = gaussian(12, 64)
    weight[5] = 0
    assert text(weight, "dead") == (
        "1 channel of 12 is dead (channel 5): it costs nothing when quantized, and could be pruned."
    )
    weight[7] *= 1e-8
    assert text(weight, "dead") == (
        "2 channels of 12 are dead (channels 5, 7): they cost nothing when quantized, and could be pruned."
    )


def test_outliers_are_counted_and_the_widest_is_measured() -> None:
    weight = np.tile([1.0, -1, 0.5], (12, 1))
    weight[3] *= 8
    assert text(weight, "outliers") == (
        "1 channel of 12 is an outlier by range (channel 3); the widest is channel 3, 8 times the median channel's,"
        " which sets the step for all."
    )
    weight[5] = [16, 16, 8]  # wide in one direction only: a smaller range and a larger weight
    assert text(weight, "outliers") == (
        "2 channels of 12 are outliers by range (channels 3, 5); the widest is channel 3, 8 times the median channel's."
    )


def test_weights_that_are_not_finite_are_counted_and_their_channels_named() -> None:
    weight = gaussian(40, 50)
    weight[3, 4] = np.nan
    assert text(weight, "nonfinite") == (
        "1 weight of 2,000 is NaN or infinite (channel 3): no grid can hold it."
        " The other figures are of the finite weights."
    )
    weight[8] = np.inf
    assert text(weight, "nonfinite") == (
        "51 weights of 2,000 are NaN or infinite (channels 3, 8): no grid can hold them."
        " The other figures are of the finite weights."
    )


def test_channels_of_a_single_weight_are_explained() -> None:
    found = finding(np.array([[1.0], [2.0], [-3.0]]))
    assert severity_of(found, "single") is OK
    assert text(np.ones((2, 1)), "single") == (
        "Each channel is a single weight, so that its range is 0 and its deviation undefined."
    )
    assert reason(finding(np.ones((2, 2))), "single") is None


@settings(deadline=None, max_examples=100)
@given(weights())
def test_no_reason_has_a_wrong_number_of_channels_or_a_number_that_is_none(weight: Array) -> None:
    for one in finding(weight).reasons:
        assert not re.search(r"\b(nan|inf)\b|\b1 (channels|weights|are)\b|\b1 channel of \d+ are\b", one.text)
        if match := re.match(r"([\d,]+) channels? of (\d+)", one.text):
            assert int(match[1].replace(",", "")) == len(one.channels)
            assert int(match[2]) == weight.shape[0]


# ---------------------------------------------------------------------------------------------------------------------
# A network that training made


@pytest.fixture(scope="module", params=[False, True], ids=["with BatchNorm", "folded"])
def trained(request: pytest.FixtureRequest) -> tuple[dict[str, Array], Analysis]:
    model = load_digits_model(folded=request.param)
    found = analyze(model, fold=False)
    parameters = dict(model.named_parameters())
    arrays = {one.name: parameters[f"{one.name}.weight"].detach().numpy() for one in found.layers}
    return {name: array.reshape(len(array), -1) for name, array in arrays.items()}, found


def test_trained_layers_have_the_noise_that_a_loop_over_their_channels_finds(
    trained: tuple[dict[str, Array], Analysis],
) -> None:
    arrays, found = trained
    assert len(found.layers) == 18
    for one in found.layers:
        rows = arrays[one.name].astype(np.float64)
        errors = [row - np.round(row / (step := np.abs(rows).max() / 127)) * step for row in rows]
        shares = [float(e @ e) / float(row @ row) for e, row in zip(errors, rows, strict=True) if row.any()]
        total = sum(float(e @ e) for e in errors)
        assert_allclose(one.rounding.sqnr_tensor, 10 * math.log10(float(np.square(rows).sum()) / total), atol=1e-4)
        assert min(shares) <= one.noise_share * (1 + 1e-3)
        assert one.noise_share <= max(shares) * (1 + 1e-3)


def test_silencing_any_channel_of_a_trained_layer_makes_no_new_problem(
    trained: tuple[dict[str, Array], Analysis],
) -> None:
    arrays, found = trained
    for one in found.layers:
        for channel in range(0, len(arrays[one.name]), 7):
            for scale in (1e-2, 1e-5, 0.0):
                weight = arrays[one.name].copy()
                weight[channel] *= scale
                assert finding(weight).severity.rank <= max(one.severity.rank, WATCH.rank), (one.name, channel, scale)


def test_widening_a_channel_of_a_trained_layer_a_hundred_times_makes_a_problem(
    trained: tuple[dict[str, Array], Analysis],
) -> None:
    arrays, found = trained
    for one in found.layers:
        weight = arrays[one.name].copy()
        weight[np.argmax(one.statistics.peak)] *= 100
        assert finding(weight).severity is PROBLEM, one.name


# ---------------------------------------------------------------------------------------------------------------------
# The analysis as a whole


def test_an_analysis_carries_what_it_was_made_with() -> None:
    thresholds = Thresholds(watch_db=33)
    found = analysis({"a": gaussian(3, 4), "b": gaussian(3, 4)}, bits=5, thresholds=thresholds)
    assert (found.name, found.framework, found.parameters) == ("model", "arrays 1.0", 24)
    assert (found.bits, found.thresholds) == (5, thresholds)
    assert found.evidence == "from the weights alone"
    assert [one.weights for one in found.layers] == [12, 12]


def test_the_fingerprint_tells_names_shapes_and_weights_apart() -> None:
    weight = gaussian(4, 6)
    changed = weight.copy()
    changed[0, 0] = np.nextafter(changed[0, 0], np.float32(np.inf))
    networks: list[dict[str, Any]] = [
        {"a": weight},
        {"b": weight},
        {"a": weight.reshape(6, 4)},
        {"a": changed},
        {"a": weight, "b": weight},
    ]
    fingerprints = [analysis(one).fingerprint for one in networks]
    assert len(set(fingerprints)) == len(networks)
    assert fingerprints == [analysis(one).fingerprint for one in networks]
    assert all(re.fullmatch("[0-9a-f]{64}", one) for one in fingerprints)


def test_the_digest_is_that_of_the_little_endian_bytes() -> None:
    import hashlib

    weight = gaussian(4, 6)
    assert finding(weight).digest == hashlib.sha256(weight.astype("<f4").tobytes()).hexdigest()
    assert finding(weight.astype(">f4")).digest == finding(weight).digest


def test_progress_sees_every_layer_and_each_weight_is_read_once() -> None:
    from qvis.analysis import analyze_network

    reads: list[str] = []

    def counted(name: str) -> Any:
        def read() -> Array:
            reads.append(name)
            return gaussian(3, 4)

        return replace(layer(gaussian(3, 4), name), read=read)

    seen: list[str] = []

    def progress(layers: Any) -> Any:
        for one in layers:
            seen.append(one.name)
            yield one

    model = replace(network({}), layers=(counted("a"), counted("b")))
    analyze_network(model, progress=progress)
    assert seen == reads == ["a", "b"]


@pytest.mark.parametrize("value", [math.nan, math.inf, "20", True])
def test_a_threshold_that_is_no_finite_number_is_refused_by_name(value: Any) -> None:
    with pytest.raises(BadArgumentError, match=r"^problem_db: got .*, expected a finite number$"):
        Thresholds(problem_db=value)
