"""The noise model's arithmetic: rounding, the two estimates and their mix, and histograms of what enters layers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from qvis.noise import (
    BINS,
    Histogram,
    WeightGrid,
    WeightNoise,
    combine,
    evenly,
    round_input,
    round_weight,
    span,
)
from qvis.running import Grid

GRIDS = [WeightGrid(bits, granularity) for bits in (2, 4, 8) for granularity in ("tensor", "channel")]
FLOATS = st.floats(-1e3, 1e3, width=32)
ANY = st.one_of(FLOATS, st.sampled_from([np.nan, np.inf, -np.inf]))


def matrices(elements: st.SearchStrategy[float]) -> st.SearchStrategy[np.ndarray]:
    return arrays.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 6)), elements=elements)


def rounded_by_loop(weight: np.ndarray, grid: WeightGrid) -> np.ndarray:
    result = weight.copy()
    for i, row in enumerate(weight):
        shared = row if grid.granularity == "channel" else weight
        finite = shared[np.isfinite(shared)]
        step = np.float32(np.abs(finite).max(initial=0) / (2 ** (grid.bits - 1) - 1))
        for j, value in enumerate(row):
            if step > 0 and np.isfinite(value):
                result[i, j] = np.float32(round(value / step)) * step
    return result


@pytest.mark.parametrize("grid", GRIDS)
@given(weight=matrices(ANY))
@settings(max_examples=30, deadline=None)
def test_weights_are_rounded_as_by_a_loop(grid: WeightGrid, weight: np.ndarray) -> None:
    kept = weight.copy()
    result = round_weight(weight, grid)
    np.testing.assert_array_equal(result, rounded_by_loop(weight, grid))
    np.testing.assert_array_equal(weight, kept)
    assert result.dtype == weight.dtype


@pytest.mark.parametrize("grid", GRIDS)
@given(weight=matrices(FLOATS))
@settings(max_examples=30, deadline=None)
def test_rounding_is_symmetric_and_moves_no_weight_by_more_than_half_a_step(
    grid: WeightGrid, weight: np.ndarray
) -> None:
    result = round_weight(weight, grid)
    np.testing.assert_array_equal(round_weight(-weight, grid), -result)
    largest = np.abs(weight).max(axis=1, keepdims=True) if grid.granularity == "channel" else np.abs(weight).max()
    half = largest / (2 ** (grid.bits - 1) - 1) / 2
    assert (np.abs(result - weight) <= half * (1 + 1e-4) + 1e-37).all()
    zero = ~weight.any(axis=1)
    assert not result[zero].any()


def test_both_estimates_of_a_linear_map_have_its_norm_as_their_mean() -> None:
    random = np.random.default_rng(0)
    weight = random.standard_normal((6, 5)).astype(np.float32)
    jacobian = random.standard_normal((40, 30))
    grids = [WeightGrid(3, "tensor"), WeightGrid(2, "channel")]
    noise = WeightNoise(weight, grids)
    for _ in range(4000):
        gradient = random.standard_normal(40) @ jacobian
        noise.add(gradient.reshape(6, 5).astype(np.float32), 2)
    diagonal, projected = noise.estimates()
    for index, grid in enumerate(grids):
        error = (round_weight(weight, grid) - weight).astype(np.float64)
        exact = np.square(jacobian @ error.reshape(-1)).sum() / 2
        assert projected[:, index].mean() == pytest.approx(exact, rel=0.1)
        squares = np.square(jacobian).sum(axis=0).reshape(6, 5)
        steady = (squares.sum(axis=1) * np.square(error).mean(axis=1)).sum() / 2
        assert diagonal[:, index].mean() == pytest.approx(steady, rel=0.05)
    np.testing.assert_allclose(noise.by_channel(), squares.sum(axis=1) / 2, rtol=0.1)


def test_gradients_that_are_not_finite_count_as_none() -> None:
    noise = WeightNoise(np.ones((1, 3), np.float32), [WeightGrid(2, "tensor")])
    noise.add(np.array([[np.nan, np.inf, -np.inf]], np.float32), 1)
    assert np.isfinite(noise.estimates()).all()


def test_rounding_errors_that_are_not_kept_give_the_same() -> None:
    random = np.random.default_rng(1)
    weight = random.standard_normal((3, 4)).astype(np.float32)
    both = [WeightNoise(weight, GRIDS, keep) for keep in (True, False)]
    for _ in range(3):
        gradient = random.standard_normal((3, 4)).astype(np.float32)
        for one in both:
            one.add(gradient, 1)
    np.testing.assert_array_equal(both[0].estimates(), both[1].estimates())
    assert both[1]._errors is None


# ---------------------------------------------------------------------------------------------------------------------
# Mixing the estimates

POSITIVE = st.one_of(st.just(0.0), st.floats(1e-300, 1e100))


@given(st.data(), st.integers(1, 4), st.integers(1, 5), st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_the_mix_is_never_nan_and_lies_between_the_estimates(
    data: st.DataObject, layers: int, passes: int, grids: int
) -> None:
    shape = (layers, passes, grids)
    diagonal, projected = (data.draw(arrays.arrays(np.float64, shape, elements=POSITIVE)) for _ in range(2))
    damage, spread = combine(diagonal, projected)
    assert damage.shape == spread.shape == (layers, grids)
    steady, varying = diagonal.mean(axis=1), projected.mean(axis=1)
    assert np.isfinite(damage).all()
    assert not np.isnan(spread).any()
    assert (spread >= 0).all()
    usable = (steady > 0) & (varying > 0)
    low, high = np.minimum(steady, varying), np.maximum(steady, varying)
    assert (damage[usable] >= low[usable] * (1 - 1e-9)).all()
    assert (damage[usable] <= high[usable] * (1 + 1e-9)).all()
    np.testing.assert_array_equal(damage[~usable], steady[~usable])


def test_estimates_that_agree_are_kept() -> None:
    both = np.random.default_rng(0).uniform(1, 2, (5, 1, 2)).repeat(8, axis=1)
    np.testing.assert_allclose(combine(both, both).damage, both[:, 0], rtol=1e-12)


def test_a_layer_without_damage_has_none() -> None:
    damage, spread = combine(np.zeros((3, 4, 1)), np.zeros((3, 4, 1)))
    assert not damage.any()
    assert not spread.any()


def test_an_unknown_projection_leaves_the_diagonal_estimate_without_certainty() -> None:
    damage, spread = combine(np.ones((1, 4, 1)), np.zeros((1, 4, 1)))
    assert (damage, spread) == (1, np.inf)


def test_more_damage_in_both_estimates_is_more_damage_in_the_mix() -> None:
    random = np.random.default_rng(2)
    diagonal = np.exp(random.standard_normal((6, 16, 1)))
    projected = diagonal * random.standard_normal((6, 16, 1)) ** 2
    once, thrice = combine(diagonal, projected).damage, combine(3 * diagonal, 3 * projected).damage
    np.testing.assert_allclose(thrice, 3 * once)


def test_more_passes_are_surer_and_come_nearer_to_the_projected_estimate() -> None:
    random = np.random.default_rng(3)
    exact = np.exp(random.standard_normal((30, 1, 1)))
    spreads, errors = [], []
    for passes in (4, 64, 1024):
        diagonal = np.broadcast_to(exact * np.exp(random.standard_normal((30, 1, 1))), (30, passes, 1))
        damage, spread = combine(diagonal, exact * random.standard_normal((30, passes, 1)) ** 2)
        spreads.append(spread.mean())
        errors.append(np.abs(np.log(damage[:, 0] / exact[:, 0, 0])).mean())
    assert spreads == sorted(spreads, reverse=True)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.06


# ---------------------------------------------------------------------------------------------------------------------
# What enters a layer


def test_a_histogram_counts_values_and_zeros_apart() -> None:
    random = np.random.default_rng(0)
    values = np.maximum(random.standard_normal(1001), 0).astype(np.float32)
    gradient = random.standard_normal(1001).astype(np.float32)
    histogram = Histogram(0.0, float(values.max()))
    histogram.add(values, gradient, 2.0)
    assert histogram.zeros == 2 * (values == 0).sum()
    expected, _ = np.histogram(values[values > 0], BINS, (0, float(values.max())))
    assert histogram.counts.sum() == 2 * (values > 0).sum()
    assert np.abs(np.cumsum(histogram.counts) - 2 * np.cumsum(expected)).max() <= 4  # values on an edge
    assert histogram.importance.sum() == pytest.approx(2 * np.square(gradient[values > 0], dtype=float).sum())


def test_values_outside_and_not_finite_do_no_harm_to_a_histogram() -> None:
    histogram = Histogram(-1.0, 1.0)
    histogram.add(np.array([-5, 5, np.nan, np.inf, 0.5]), np.array([1, np.nan, 1, 1, 1.0]))
    assert histogram.counts.sum() == 3
    assert histogram.counts[0] == histogram.counts[-1] == 1
    assert histogram.importance.sum() == 2


@pytest.mark.parametrize("bits", [2, 4, 8, 12, 16])
@pytest.mark.parametrize("part", [0.3, 1.0])
def test_errors_of_a_histogram_are_those_of_rounding_its_values(bits: int, part: float) -> None:
    values = np.random.default_rng(0).normal(0.3, 1, 200_000)
    histogram = Histogram(float(values.min()), float(values.max()))
    histogram.add(values, None)
    grid = span(part * values.min(), part * values.max(), bits)
    exact = np.square(values - round_input(values, grid)).sum()
    assert histogram.errors(grid) @ histogram.counts == pytest.approx(exact, rel=0.01)


def test_errors_in_each_bin_are_the_mean_over_many_points() -> None:
    histogram = Histogram(-0.7, 2.1)
    inside = (np.arange(2000) + 0.5) / 2000
    values = histogram.edges[:-1, None] + inside * 2.8 / BINS
    for grid in (span(-0.5, 1.3, 3), span(-0.7, 2.1, 14), Grid(4, 0.3, 0)):
        expected = np.square(values - round_input(values, grid)).mean(axis=1)
        np.testing.assert_allclose(histogram.errors(grid), expected, rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.5])
def test_a_constant_has_the_error_of_its_one_value(value: float) -> None:
    histogram = Histogram(value, value)
    histogram.add(np.full(5, value), np.ones(5))
    grid = span(-2.0, 3.3, 4)
    exact = np.square(value - round_input(np.array([value]), grid))[0]
    assert histogram.errors(grid) @ histogram.counts == pytest.approx(5 * exact)


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6), st.integers(2, 16))
@settings(deadline=None)
def test_a_grid_holds_zero_and_the_range(one: float, two: float, bits: int) -> None:
    low, high = sorted((one, two))
    grid = span(low, high, bits)
    assert 0 <= grid.zero <= 2**bits - 1
    assert round_input(np.zeros(1), grid) == 0
    width = max(high, 0) - min(low, 0)
    first, last = grid.ends
    assert first <= 0 <= last
    if width > 1e-300:
        assert abs(first - min(low, 0)) <= 0.51 * grid.step
        assert abs(last - max(high, 0)) <= 0.51 * grid.step


@given(arrays.arrays(np.float32, 5, elements=st.floats(-100, 100, width=32)), st.integers(2, 8))
@settings(deadline=None)
def test_inputs_go_to_the_nearest_point_of_the_grid(values: np.ndarray, bits: int) -> None:
    grid = span(-3.0, 8.0, bits)
    kept = values.copy()
    result = round_input(values, grid)
    points = grid.step * (np.arange(2**bits) - grid.zero)
    nearest = np.abs(values[:, None] - points).min(axis=1)
    np.testing.assert_allclose(np.abs(values - result), nearest, atol=1e-4)
    np.testing.assert_array_equal(values, kept)
    assert result.dtype == values.dtype
    np.testing.assert_allclose(round_input(result, grid), result, atol=1e-6)


@given(st.integers(0, 5000), st.integers(1, 300))
def test_values_that_are_looked_at_stand_for_all(size: int, most: int) -> None:
    part, weight = evenly(np.zeros(size), most)
    taken = len(range(size)[part])
    assert taken <= most
    assert taken * weight == pytest.approx(size)


@pytest.mark.parametrize("used", [(1, 4), ()])
def test_rows_without_a_derivative_need_no_rounding(used: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    weight = random.standard_normal((6, 5)).astype(np.float32)
    gradient = np.zeros_like(weight)
    gradient[list(used)] = random.standard_normal((len(used), 5))
    both = [WeightNoise(weight, GRIDS, keep) for keep in (True, False)]
    for noise in both:
        noise.add(gradient, 1)
    expected = [float(np.sum((round_weight(weight, grid) - weight) * gradient)) ** 2 for grid in GRIDS]
    for noise in both:
        np.testing.assert_allclose(noise.projected[0], expected, rtol=1e-4, atol=1e-12)
        np.testing.assert_allclose(noise.estimates()[0], both[0].estimates()[0])
