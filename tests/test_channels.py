"""The arrays that the page carries, unpacked again and compared with the statistics they stand for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from numpy.typing import NDArray

from qvis.analysis.comparison import compare
from qvis.report.channels import BINS, COLUMNS, FLAGS, MOST_POINTS, PAGE_POINTS, pack_channels
from qvis.report.document import summarize, summarize_changes
from tests.weights import Array, analysis, gaussian, weights

Packed = list[list[dict[str, NDArray[np.float32]]]]
LOWS, HIGHS = ("min", "q25"), ("q75", "max", "std", "relative_range")


def unpack(points: list[int], packed: bytes, series: int = 1) -> Packed:
    """For each layer and series its columns by name, and its ``histogram``, as the page's script reads them."""
    numbers = np.frombuffer(packed, np.uint8).reshape(4, -1).T.copy().view("<f4").ravel()
    layers: Packed = []
    place = 0
    for count in points:
        layers.append([])
        for _ in range(series):
            size = len(COLUMNS) * count
            columns = dict(zip(COLUMNS, numbers[place : place + size].reshape(len(COLUMNS), count), strict=True))
            place += size
            layers[-1].append(columns | {"histogram": numbers[place : place + BINS]})
            place += BINS
    assert place == numbers.size
    return layers


def packed(weights: dict[str, Array]) -> tuple[list[dict[str, Any]], Packed]:
    """The summary's layers, and what the page has of them."""
    layers = summarize(analysis(weights), "weight_ranges")["layers"]
    return layers, unpack(*pack_channels(layers, [None]))


def float32(values: Any) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        return np.asarray(values, dtype=np.float32)


def bits(layer: dict[str, Any], channel: int) -> int:
    return sum(bit for name, bit in FLAGS.items() if channel in layer["flags"][name])


@settings(deadline=None, max_examples=60)
@given(st.lists(weights(channels=20, elements=20), min_size=1, max_size=3))
def test_up_to_512_channels_are_all_there(arrays: list[Array]) -> None:
    layers, pages = packed({f"layer{i}": array for i, array in enumerate(arrays)})
    assert [len(page["channel"]) for (page,) in pages] == [len(array) for array in arrays]
    for layer, (page,) in zip(layers, pages, strict=True):
        channels = range(layer["channels"])
        assert page["channel"].tolist() == list(channels)
        assert page["flags"].tolist() == [bits(layer, i) for i in channels]
        for name in COLUMNS[1:-1]:
            assert_array_equal(page[name], float32(layer["statistics"][name]), name)


def test_every_flag_has_a_bit_of_its_own() -> None:
    assert sorted(FLAGS.values()) == [2**i for i in range(len(FLAGS))]
    assert set(FLAGS) == set(analysis({"a": gaussian(2, 2)}).layers[0].flags)


def test_flags_of_one_channel_add_up() -> None:
    weight = np.tile([1.0, -1, 0.5], (12, 1))
    weight[3] *= 300
    weight[4, 0] = np.nan
    _, ((page,),) = packed({"a": weight})
    assert page["flags"][3] == FLAGS["outliers"]
    assert page["flags"][4] == FLAGS["starved"] + FLAGS["nonfinite"]


@settings(deadline=None, max_examples=60)
@given(weights(channels=60, elements=20))
def test_the_histogram_is_that_of_a_loop_over_the_channels(weight: Array) -> None:
    (layer,), ((page,),) = packed({"a": weight})
    relative = [r for r in layer["statistics"]["relative_range"].tolist() if 1 <= r < math.inf]
    end = max(max((math.log10(r) for r in relative), default=0.0), 1e-9)
    assert page["histogram"].sum() == len(relative)
    filled = set(np.flatnonzero(page["histogram"]).tolist())
    allowed = set()
    for value in relative:
        exact = math.log10(value) / end * BINS
        # a value on a border may fall on either side of it
        allowed |= {min(math.floor(exact - 1e-6), BINS - 1), min(math.floor(exact + 1e-6), BINS - 1)}
    assert filled <= allowed


def test_the_histogram_counts_the_channels_of_each_bin() -> None:
    peaks = 10 ** (np.array([0, 0.001, 0.5, 0.505, 0.99, 1.0, 1.0]) * 2)
    _, ((page,),) = packed({"a": np.stack([peaks, -peaks], axis=1)})
    expected = np.zeros(BINS)
    expected[[0, 37, 74]] = [2, 2, 3]
    assert page["histogram"].tolist() == expected.tolist()


def test_dead_channels_are_not_counted_in_the_histogram() -> None:
    weight = gaussian(10, 30)
    weight[:4] = 0
    _, ((page,),) = packed({"a": weight})
    assert page["histogram"].sum() == 6


@settings(deadline=None, max_examples=15)
@given(
    st.integers(MOST_POINTS + 1, 3000),
    st.integers(0, 1000),
    st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from([0.0, 1e-5, 40.0, np.nan])), max_size=30),
)
def test_more_channels_become_an_envelope_that_hides_no_extreme_and_no_flag(
    channels: int, seed: int, edits: list[tuple[int, float]]
) -> None:
    weight = gaussian(channels, 3, seed)
    for place, factor in edits:
        weight[place % channels] *= factor
    (layer,), ((page,),) = packed({"a": weight})
    starts = page["channel"].astype(int).tolist()
    assert starts[0] == 0
    assert starts == sorted(set(starts))
    assert len(starts) <= MOST_POINTS
    groups = [range(start, end) for start, end in zip(starts, [*starts[1:], channels], strict=True)]
    statistics = layer["statistics"]
    for i, group in enumerate(groups):
        part = slice(group.start, group.stop)
        for names, extreme in ((LOWS, np.fmin.reduce), (HIGHS, np.fmax.reduce)):
            for name in names:
                assert_array_equal(page[name][i], float32(extreme(statistics[name][part])), name)
        for name in ("q50", "mean"):
            finite = [value for value in statistics[name][part].tolist() if math.isfinite(value)]
            expected = math.fsum(finite) / len(finite) if finite else math.nan
            np.testing.assert_allclose(page[name][i], expected, rtol=1e-5, atol=1e-6)
        assert page["flags"][i] == (bits(layer, group.start) if len(group) == 1 else 0)
    flagged = {channel for flags in layer["flags"].values() for channel in flags}
    if len(flagged) <= MOST_POINTS // 3:
        assert flagged <= {group.start for group in groups if len(group) == 1}
    assert page["histogram"].sum() == np.count_nonzero(statistics["relative_range"] >= 1)


def test_among_too_many_flagged_channels_the_widest_stand_alone() -> None:
    weight = gaussian(3000, 4)
    wide = np.arange(0, 3000, 3)
    weight[wide] *= np.linspace(50, 100, wide.size)[:, None].astype(np.float32)
    (layer,), ((page,),) = packed({"a": weight})
    flagged = np.unique(np.concatenate([np.array(x, int) for x in layer["flags"].values()]))
    assert flagged.size > MOST_POINTS
    widest = flagged[np.argsort(-layer["statistics"]["range"][flagged])][: MOST_POINTS // 4]
    assert set(widest) <= set(page["channel"].astype(int))
    assert len(page["channel"]) <= MOST_POINTS


def test_many_layers_share_the_room_on_the_page() -> None:
    layer = summarize(analysis({"a": gaussian(512, 2)}), "weight_ranges")["layers"][0]
    points, _ = pack_channels([layer] * 300, [None])
    assert sum(points) <= PAGE_POINTS
    assert min(points) > 50
    few = PAGE_POINTS // 512
    points, _ = pack_channels([layer] * few, [None])
    assert points == [512] * few


def test_a_comparison_carries_both_models_on_the_same_points() -> None:
    before, after = gaussian(900, 5, 1), gaussian(900, 5, 2)
    before[17] *= 30
    after[33] *= 30
    comparison = compare(analysis({"a": before, "b": gaussian(3, 5)}), analysis({"a": after, "b": gaussian(3, 5, 4)}))
    layers = summarize_changes(comparison)["layers"]
    pages = unpack(*pack_channels(layers, ["before", "after"]), series=2)
    for layer, (was, now) in zip(layers, pages, strict=True):
        assert_array_equal(was["channel"], now["channel"])
        assert was["max"].max() == float32(layer["before"]["statistics"]["max"].max())
        assert now["max"].max() == float32(layer["after"]["statistics"]["max"].max())
    assert {17, 18, 33, 34} <= set(pages[0][0]["channel"].astype(int))


def test_the_histograms_of_a_comparison_share_their_bins() -> None:
    peaks = np.array([[1.0], [10], [100]]) * [1, -1]
    comparison = compare(analysis({"a": peaks}), analysis({"a": np.sqrt(np.abs(peaks)) * np.sign(peaks)}))
    ((was, now),) = unpack(*pack_channels(summarize_changes(comparison)["layers"], ["before", "after"]), series=2)
    assert np.flatnonzero(was["histogram"]).tolist() == [0, 37, 74]
    assert np.flatnonzero(now["histogram"]).tolist() == [0, 18, 37]


def test_a_page_without_layers_has_no_arrays() -> None:
    assert pack_channels([], [None]) == ([], b"")


@pytest.mark.parametrize("scale", [1e300, 1e-300])
def test_numbers_beyond_float32_become_infinite_or_zero_without_a_warning(scale: float) -> None:
    _, ((page,),) = packed({"a": gaussian(3, 4).astype(np.float64) * scale})
    assert set(np.abs(page["max"])) == {math.inf if scale > 1 else 0.0}
    assert np.isfinite(page["relative_range"]).all()
