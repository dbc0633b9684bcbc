"""Statistics of channels, against pandas, and the same however the work is divided."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from qvis.analysis import blocks
from qvis.analysis.blocks import pool
from qvis.analysis.rounding import rounding_noise
from qvis.analysis.statistics import channel_statistics
from qvis.layers import ChannelStatistics
from tests.weights import Array, finding, gaussian, weights

PANDAS = {"min": "min", "max": "max", "mean": "mean", "std": "std", "q25": "25%", "q50": "50%", "q75": "75%"}
"""What qvis calls a statistic -> what pandas calls it."""


def described(weight: Array) -> pd.DataFrame:
    """What pandas says of the finite weights of each channel, in float64; a row for each channel."""
    wide = weight.astype(np.float64)
    return pd.DataFrame(np.where(np.isfinite(wide), wide, np.nan).T).describe().T


def assert_like_pandas(statistics: ChannelStatistics, weight: Array, exact: tuple[str, ...] = ("min", "max")) -> None:
    expected = described(weight)
    # what is left of a deviation or a mean when weights cancel is known to the last place of the largest
    slack = 1e-12 * np.fmax(expected["max"].abs(), expected["min"].abs()).fillna(0).to_numpy()
    for ours, theirs in PANDAS.items():
        actual, desired = getattr(statistics, ours), expected[theirs].to_numpy()
        assert actual.dtype == np.float64
        if ours in exact:
            assert_array_equal(actual, desired, ours)
        assert_array_equal(np.isnan(actual), np.isnan(desired), ours)
        assert np.all((np.abs(actual - desired) <= 1e-6 * np.abs(desired) + slack) | np.isnan(desired)), ours


def table(statistics: ChannelStatistics) -> dict[str, bytes]:
    """Every array, bit for bit."""
    names = (*PANDAS, "nonfinite", "dead", "range", "peak", "live", "relative_range")
    return {name: np.asarray(getattr(statistics, name)).tobytes() for name in names}


@settings(deadline=None, max_examples=150)
@given(weights())
def test_statistics_are_those_of_pandas(weight: Array) -> None:
    statistics = channel_statistics(weight)
    assert_like_pandas(statistics, weight)
    assert_array_equal(statistics.nonfinite, [sum(not np.isfinite(w) for w in row) for row in weight.tolist()])
    assert statistics.elements == weight.shape[1]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("elements", [2, 3, 5, 4095, 4096, 4097, 10_000])
@pytest.mark.parametrize("offset", [0, 0.03, 3, 1000])
def test_statistics_are_those_of_pandas_however_long_and_far_from_zero(
    dtype: type[Any], elements: int, offset: float
) -> None:
    weight = (gaussian(6, elements).astype(np.float64) + offset).astype(dtype)
    assert_like_pandas(channel_statistics(weight), weight)


@pytest.mark.parametrize("exponent", [-1000, -600, 600, 1000])
def test_weights_whose_squares_leave_float64_are_described_all_the_same(exponent: int) -> None:
    weight = gaussian(5, 30).astype(np.float64)
    near, far = (channel_statistics(w) for w in (weight, np.ldexp(weight, exponent)))
    for name in PANDAS:
        assert_allclose(np.ldexp(getattr(far, name), -exponent), getattr(near, name), rtol=1e-12)
    assert_allclose(far.relative_range, near.relative_range, rtol=1e-12)


def test_without_quartiles_all_else_is_the_same() -> None:
    weight = gaussian(30, 700)
    weight[3, 5] = np.nan
    for w in (weight, weight[:3]):  # with and without a weight that is not finite
        fast, full = channel_statistics(w, quartiles=False), channel_statistics(w)
        for name in ("q25", "q50", "q75"):
            assert np.isnan(getattr(fast, name)).all()
        for name in ("min", "max", "mean", "std", "nonfinite", "dead", "range"):
            assert_allclose(getattr(fast, name), getattr(full, name), rtol=1e-6)


@settings(deadline=None, max_examples=60)
@given(weights())
def test_ranges_and_live_channels_follow_their_definitions(weight: Array) -> None:
    statistics = channel_statistics(weight)
    rows = [[w for w in row if np.isfinite(w)] for row in weight.astype(np.float64).tolist()]
    largest = max((abs(w) for row in rows for w in row), default=0.0)
    peaks = [max(map(abs, row)) if row else None for row in rows]
    dead = [peak is not None and (peak == 0 or peak < 1e-6 * largest) for peak in peaks]
    live = [peak is not None and not gone for peak, gone in zip(peaks, dead, strict=True)]
    ranges = [max(row) - min(row) if row else np.nan for row in rows]
    assert statistics.dead.tolist() == dead
    assert statistics.live.tolist() == live
    assert_array_equal(statistics.range, ranges)
    assert_array_equal(statistics.peak, [np.nan if peak is None else peak for peak in peaks])
    base = min((r for r, alive in zip(ranges, live, strict=True) if alive and r > 0), default=None)
    assert_array_equal(
        statistics.relative_range,
        [np.nan if np.isnan(r) else 1.0 if base is None else r / base for r in ranges],
    )
    of_live = statistics.relative_range[statistics.live & (statistics.range > 0)]
    if of_live.size:
        assert of_live.min() == 1


def test_the_share_below_which_a_channel_is_dead_is_an_argument() -> None:
    weight = np.array([[1.0, -1], [0.01, 0.005], [0.001, 0]])
    assert channel_statistics(weight).dead.tolist() == [False, False, False]
    assert channel_statistics(weight, dead=0.005).dead.tolist() == [False, False, True]
    assert channel_statistics(weight, dead=0.05).dead.tolist() == [False, True, True]


def test_a_channel_of_equal_weights_has_no_range_and_is_alive() -> None:
    statistics = channel_statistics(np.array([[2.0, 2, 2], [1, 2, 3], [0, 0, 0]]))
    assert statistics.live.tolist() == [True, True, False]
    assert statistics.relative_range.tolist() == [0, 1, 0]


def outcome(weight: Array, workers: int, block_bytes: int) -> dict[str, bytes]:
    """Statistics and noise, bit for bit, computed by ``workers`` threads on blocks of ``block_bytes``."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(blocks, "BLOCK_BYTES", block_bytes))
        threads = stack.enter_context(pool(workers))
        statistics = channel_statistics(weight, pool=threads)
        noise = rounding_noise(weight, statistics, pool=threads)
    arrays = {name: getattr(noise, name).tobytes() for name in ("power", "noise_tensor", "noise_channel", "levels")}
    return table(statistics) | arrays


@settings(deadline=None, max_examples=40)
@given(weights(), st.sampled_from([1, 500, 4000, 1 << 19]))
def test_any_number_of_threads_gives_the_same_bits(weight: Array, block_bytes: int) -> None:
    alone = outcome(weight, 1, block_bytes)
    assert outcome(weight, 2, block_bytes) == alone
    assert outcome(weight, 4, block_bytes) == alone


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(300, 27), (40, 200), (12, 5000), (64, 1)])
def test_the_size_of_blocks_changes_no_bit_of_ordinary_weights(dtype: type[Any], shape: tuple[int, int]) -> None:
    weight = gaussian(*shape).astype(dtype)
    whole = outcome(weight, 1, 1 << 30)
    for block_bytes in (1, 1000, 30_000):
        assert outcome(weight, 4, block_bytes) == whole


@settings(deadline=None, max_examples=40)
@given(weights(), st.sampled_from([1, 300, 5000]), st.sampled_from([3, 16, 150]))
def test_the_size_of_blocks_and_of_partial_sums_hardly_matters(weight: Array, block_bytes: int, chunk: int) -> None:
    with patch.object(blocks, "BLOCK_BYTES", block_bytes), patch.object(blocks, "CHUNK", chunk):
        assert_like_pandas(channel_statistics(weight), weight)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 500), st.integers(0, 300), st.sampled_from([np.float32, np.float64]), st.integers(1, 100_000))
def test_blocks_hold_each_row_once_and_stay_small(
    channels: int, elements: int, dtype: type[Any], block_bytes: int
) -> None:
    weight = np.empty((channels, elements), dtype)
    with patch.object(blocks, "BLOCK_BYTES", block_bytes):
        cut = list(blocks.row_blocks(weight))
    assert [i for block in cut for i in range(block.start, block.stop)] == list(range(channels))
    assert all(weight[block].nbytes <= block_bytes or block.stop - block.start == 1 for block in cut)


def test_an_error_in_a_thread_reaches_the_caller() -> None:
    def fail(rows: slice) -> None:
        raise ZeroDivisionError(rows.start)

    with (
        patch.object(blocks, "BLOCK_BYTES", 1),
        pytest.raises(ZeroDivisionError, match="0"),
        pool(3) as threads,
    ):
        threads.map(fail, gaussian(20, 3))


@settings(deadline=None, max_examples=60)
@given(weights(), st.randoms(use_true_random=False))
def test_reordering_the_channels_reorders_the_statistics(weight: Array, random: Any) -> None:
    order = random.sample(range(weight.shape[0]), weight.shape[0])
    original, reordered = channel_statistics(weight), channel_statistics(weight[order])
    for name in (*PANDAS, "nonfinite", "dead", "live", "range", "relative_range"):
        assert_array_equal(getattr(reordered, name), getattr(original, name)[order], name)


@settings(deadline=None, max_examples=60)
@given(weights(finite=True, exponents=(-3, 3), spread=4), st.integers(-10, 10))
def test_scaling_by_a_power_of_two_scales_the_statistics_exactly(weight: Array, exponent: int) -> None:
    original, scaled = channel_statistics(weight), channel_statistics(np.ldexp(weight, exponent))
    for name in (*PANDAS, "range", "peak"):
        assert_array_equal(getattr(scaled, name), np.ldexp(getattr(original, name), exponent), name)
    assert_array_equal(scaled.relative_range, original.relative_range)
    assert_array_equal(scaled.dead, original.dead)


@pytest.mark.parametrize("order", ["C", "F"])
def test_weights_are_never_written_to_and_may_lie_in_memory_in_any_way(order: Any) -> None:
    weight = np.array(gaussian(20, 60), order=order)
    weight[2, 7] = np.inf
    before, reference = weight.copy(), finding(np.ascontiguousarray(weight))
    weight.setflags(write=False)
    for view in (weight, np.repeat(weight, 2, axis=1)[:, ::2]):
        found = finding(view)
        assert table(found.statistics) == table(reference.statistics)
        assert found.digest == reference.digest
        assert_array_equal(view, before)
