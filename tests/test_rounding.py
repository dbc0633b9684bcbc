"""Rounding noise, levels and noise shares, against loops over single weights."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from qvis import BadArgumentError
from qvis.analysis.problems import noise_share
from qvis.analysis.rounding import rounding_noise
from qvis.analysis.statistics import channel_statistics
from qvis.layers import RoundingNoise, decibels
from tests.weights import Array, analysis, finding, gaussian, weights

BITS = st.integers(2, 16)


def rounded(weight: Array, bits: int = 8) -> RoundingNoise:
    return rounding_noise(weight, channel_statistics(weight), bits=bits)


def finite_rows(weight: Array) -> list[list[float]]:
    return [[w for w in row if math.isfinite(w)] for row in weight.astype(np.float64).tolist()]


def noise_of(row: list[float], step: float) -> tuple[float, float]:
    """Sum of squared errors and of squared weights, in steps."""
    errors = [w / step - round(w / step) for w in row]
    return math.fsum(e * e for e in errors), math.fsum((w / step) ** 2 for w in row)


def assert_noise(actual: float, row: list[float], step: float, unit: float, eps: float) -> None:
    """``actual``, in units of ``unit`` squared, is the noise of ``row``, as far as steps can be counted in its type."""
    noise, power = noise_of(row, step)
    inaccuracy = 4 * eps * math.sqrt(power)  # of the root of the noise: the errors of single weights add up like this
    assert abs(math.sqrt(actual) * (unit / step) - math.sqrt(noise)) <= inaccuracy + 1e-6 * math.sqrt(noise)


@settings(deadline=None, max_examples=120)
@given(weights(channels=20, elements=60, exponents=(-37, 38)), BITS)
def test_noise_and_levels_are_those_of_a_loop_over_the_weights(weight: Array, bits: int) -> None:
    noise, rows, largest = rounded(weight, bits), finite_rows(weight), 2 ** (bits - 1) - 1
    eps = float(np.finfo(weight.dtype).eps)
    peaks = [max(map(abs, row), default=0.0) for row in rows]
    assert noise.step == max(peaks) / largest
    unit = 1.0 if 1e-24 < max(peaks) < 1e24 else 2.0 ** math.frexp(max(peaks))[1]
    for i, (row, peak) in enumerate(zip(rows, peaks, strict=True)):
        if peak == 0:
            assert noise.power[i] == noise.noise_tensor[i] == noise.noise_channel[i] == 0
            assert noise.levels[i] == 1
            continue
        assert_allclose(noise.power[i], math.fsum((w / unit) ** 2 for w in row), rtol=1e-6)
        assert_noise(noise.noise_tensor[i], row, noise.step, unit, eps)
        if peak >= 1e-6 * max(peaks):  # dead channels have no noise worth counting
            assert_noise(noise.noise_channel[i], row, peak / largest, unit, eps)
        assert noise.levels[i] == round(max(row) / noise.step) - round(min(row) / noise.step) + 1


@settings(deadline=None, max_examples=120)
@given(weights(), BITS)
def test_noise_stays_within_its_bounds(weight: Array, bits: int) -> None:
    noise, statistics = rounded(weight, bits), channel_statistics(weight)
    assert np.all((noise.levels >= 1) & (noise.levels < 2**bits))
    assert np.all(noise.power >= 0)
    for errors in (noise.noise_tensor, noise.noise_channel):
        # 0 lies on every grid, so that no weight moves farther than its own size
        assert np.all((errors >= 0) & (errors <= noise.power * (1 + 1e-5)))
    if noise.step > 0:
        share = noise.noise_channel.sum() / noise.power.sum()
        assert share <= weight.shape[1] / (4 * (2 ** (bits - 1) - 1) ** 2) * (1 + 1e-5)
        widest = np.nanargmax(statistics.peak)
        assert_allclose(noise.noise_tensor[widest], noise.noise_channel[widest], rtol=1e-12)


@pytest.mark.parametrize("bits", range(2, 17))
def test_gaussian_noise_is_that_of_theory_at_every_width(bits: int) -> None:
    weight = gaussian(16, 4000).astype(np.float64)
    noise = rounded(weight, bits)
    assert noise.bits == bits
    if bits > 3:  # steps are small against the deviation
        assert_allclose(noise.noise_tensor.sum(), weight.size * noise.step**2 / 12, rtol=0.02)
    assert noise.noise_channel.sum() <= noise.noise_tensor.sum()
    assert_allclose(noise.sqnr_tensor, 10 * math.log10(np.square(weight).sum() / noise.noise_tensor.sum()), rtol=1e-9)
    assert_allclose(noise.sqnr_channel, 10 * math.log10(np.square(weight).sum() / noise.noise_channel.sum()), rtol=1e-9)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_weights_that_lie_on_the_grid_lose_nothing(dtype: type[Any], bits: int) -> None:
    largest = 2 ** (bits - 1) - 1
    steps = np.random.default_rng(0).integers(-largest, largest + 1, (10, 50))
    steps[:, 0] = largest
    noise = rounded((steps * 0.0123).astype(dtype), bits)
    assert noise.noise_tensor.sum() == noise.noise_channel.sum() == 0
    assert noise.sqnr_tensor == noise.sqnr_channel == math.inf
    assert noise.levels.tolist() == (largest - steps.min(axis=1) + 1).tolist()


def test_a_channel_below_half_a_step_loses_all_and_gets_one_level() -> None:
    weight = np.array([[127.0, -127], [0.49, -0.49], [0.51, 0.3], [2, -2]])
    noise = rounded(weight)
    assert noise.step == 1
    assert noise.levels.tolist() == [255, 1, 2, 5]
    assert_allclose(noise.noise_tensor, [0, noise.power[1], 0.49**2 + 0.3**2, 0], rtol=1e-12)


@pytest.mark.parametrize("bits", [8, 16])
def test_a_lonely_weight_far_below_the_step_is_lost_and_not_taken_for_a_grid_point(bits: int) -> None:
    weight = np.zeros((2, 10_000), np.float32)
    weight[0], weight[1, 0] = 1, 2e-6
    noise = rounded(weight, bits)
    assert_allclose(noise.noise_tensor[1], noise.power[1], rtol=1e-6)


def test_a_matrix_of_zeros_has_no_noise_and_no_ratio() -> None:
    noise = rounded(np.zeros((3, 4), np.float32))
    assert noise.step == 0
    assert noise.power.sum() == noise.noise_tensor.sum() == noise.noise_channel.sum() == 0
    assert noise.levels.tolist() == [1, 1, 1]
    assert math.isnan(noise.sqnr_tensor)
    assert math.isnan(noise.sqnr_channel)


@settings(deadline=None, max_examples=60)
@given(weights(finite=True, exponents=(-3, 3), spread=4), BITS, st.integers(-10, 10))
def test_scaling_by_a_power_of_two_leaves_the_findings_as_they_are(weight: Array, bits: int, exponent: int) -> None:
    original, scaled = finding(weight, bits), finding(np.ldexp(weight, exponent), bits)
    assert scaled.rounding.step == np.ldexp(original.rounding.step, exponent)
    assert_array_equal(scaled.rounding.levels, original.rounding.levels)
    assert_array_equal(scaled.rounding.noise_tensor, np.ldexp(original.rounding.noise_tensor, 2 * exponent))
    assert_array_equal(scaled.noise_share, original.noise_share)
    assert_array_equal(scaled.noise_share_channel, original.noise_share_channel)
    assert scaled.severity is original.severity
    assert scaled.reasons == original.reasons


@pytest.mark.parametrize("exponent", [-1000, -600, -200, 200, 600, 1000])
def test_weights_whose_squares_leave_float64_are_judged_like_all_others(exponent: int) -> None:
    weight = gaussian(8, 40).astype(np.float64)
    weight[3] *= 100
    near, far = finding(weight), finding(np.ldexp(weight, exponent))
    assert_allclose(far.noise_share, near.noise_share, rtol=1e-9)
    assert_allclose(far.rounding.sqnr_tensor, near.rounding.sqnr_tensor, rtol=1e-9)
    assert_array_equal(far.rounding.levels, near.rounding.levels)
    assert [str(reason) for reason in far.reasons] == [str(reason) for reason in near.reasons]


@settings(deadline=None, max_examples=60)
@given(weights(), st.randoms(use_true_random=False))
def test_reordering_the_channels_reorders_the_findings(weight: Array, random: Any) -> None:
    order = random.sample(range(weight.shape[0]), weight.shape[0])
    original, reordered = finding(weight), finding(weight[order])
    for name in ("power", "noise_tensor", "noise_channel", "levels"):
        assert_array_equal(getattr(reordered.rounding, name), getattr(original.rounding, name)[order])
    assert_array_equal(reordered.noise_share, original.noise_share)
    assert reordered.severity is original.severity
    for name, channels in original.flags.items():
        assert sorted(order[i] for i in reordered.flags[name]) == channels.tolist()


@settings(deadline=None, max_examples=80)
@given(weights(channels=30, elements=60, exponents=(-10, 10)), BITS)
def test_the_noise_share_is_what_a_quarter_of_the_channels_loses_or_more(weight: Array, bits: int) -> None:
    found = finding(weight, bits)
    statistics, noise = found.statistics, found.rounding
    useful = [i for i in range(weight.shape[0]) if statistics.live[i] and i not in found.flags["near_dead"]]
    for share, errors in ((found.noise_share, noise.noise_tensor), (found.noise_share_channel, noise.noise_channel)):
        if not useful:
            assert math.isnan(share)
            continue
        shares = sorted((min(errors[i] / noise.power[i], 1.0) for i in useful), reverse=True)
        assert share in shares
        assert sum(one >= share for one in shares) >= len(shares) / 4
        assert share == sorted(shares)[math.floor(0.75 * (len(shares) - 1))]
        assert 0 <= share <= 1 + 1e-5


def test_the_noise_share_is_not_a_number_where_nothing_is_left_to_lose() -> None:
    found = finding(np.zeros((3, 3)))
    assert math.isnan(noise_share(found.statistics, found.rounding, found.flags))
    assert math.isnan(found.noise_share)


@pytest.mark.parametrize("bits", [1, 17, 0, -8, 8.0, 8.5, "8", None, math.nan])
def test_a_width_that_no_grid_has_is_refused(bits: Any) -> None:
    with pytest.raises(BadArgumentError, match=r"^bits: got .+, expected a whole number from 2 to 16$"):
        analysis({"a": gaussian(2, 2)}, bits=bits)
    with pytest.raises(BadArgumentError, match="bits"):
        rounded(gaussian(2, 2), bits)


def test_any_kind_of_whole_number_is_a_width() -> None:
    found = analysis({"a": gaussian(2, 2)}, bits=np.int64(4))
    assert type(found.bits) is int
    assert found.layers[0].rounding.bits == 4


def test_decibels_say_when_there_is_no_noise_or_no_signal() -> None:
    assert decibels(100, 1) == pytest.approx(20)
    assert decibels(1, 0) == math.inf
    assert math.isnan(decibels(0, 1))
    assert math.isnan(decibels(0, 0))
    assert math.isnan(decibels(math.nan, 1))
