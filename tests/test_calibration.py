"""The grids that methods of calibration choose, compared with direct searches and with NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvis.analysis.calibration import CLIPS, METHODS, Candidate, best, candidates, coarse, weight_histogram
from qvis.noise import BINS, Histogram, round_input, span
from qvis.running import Grid

RANDOM = np.random.default_rng(0)
SHAPES = {
    "normal": RANDOM.standard_normal(20_000),
    "rectified": np.maximum(RANDOM.standard_normal(20_000), 0),
    "long tails": RANDOM.standard_t(2, 20_000),
    "negative": -RANDOM.gamma(1.0, size=20_000),
    "away from zero": RANDOM.uniform(4, 5, 20_000),
    "an outlier": np.append(RANDOM.standard_normal(20_000), 300.0),
}


def histogram_of(values: np.ndarray, gradient: np.ndarray | None = None) -> Histogram:
    histogram = Histogram(float(values.min()), float(values.max()))
    histogram.add(values, gradient)
    return histogram


def by_method(found: list[Candidate]) -> dict[str, Candidate]:
    return {one.method: one for one in found}


def squares(values: np.ndarray, grid: Grid) -> float:
    return float(np.square(values - round_input(values, grid)).sum())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [3, 8, 12])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_mse_grid_has_no_more_error_than_any_other_that_is_tried(shape: str, bits: int, symmetric: bool) -> None:
    values = SHAPES[shape]
    found = by_method(candidates(histogram_of(values), bits, 0, symmetric=symmetric))
    assert list(found) == [name for name in METHODS if name != "damage"]
    least = squares(values, found["MSE"].grid)
    longer = np.abs(values).max()
    for clip in CLIPS[::8]:
        if symmetric:
            steps = 2 ** (bits - 1) - 1
            grid = Grid(bits, clip * found["min-max"].grid.step, steps)
        else:
            grid = span(max(values.min(), -clip * longer), min(values.max(), clip * longer), bits)
        assert least <= 1.02 * squares(values, grid)
    signal = np.square(values).sum()
    for one in found.values():
        assert one.sqnr_db == pytest.approx(10 * np.log10(signal / squares(values, one.grid)), abs=0.2)
        assert np.isnan(one.damage)
        if symmetric:
            assert one.grid.zero == 2 ** (bits - 1) - 1


@pytest.mark.parametrize("shape", SHAPES)
def test_percentiles_are_those_of_numpy(shape: str) -> None:
    values = SHAPES[shape]
    width = (values.max() - values.min()) / BINS
    for percentile in (99.9, 99.99):
        name = f"percentile {percentile:g}"
        symmetric = by_method(candidates(histogram_of(values), 8, 0, symmetric=True))[name].grid
        low, high = (np.percentile(np.abs(values), percentile, method=one) for one in ("lower", "higher"))
        assert low - 1.5 * width <= symmetric.step * 127 <= high + 1.5 * width
        grid = by_method(candidates(histogram_of(values), 8, 0))[name].grid
        both = values.min() < 0 < values.max()
        part = (100 - percentile) / (2 if both else 1)
        inner = span(np.percentile(values, part, method="higher"), np.percentile(values, 100 - part, method="lower"), 8)
        outer = span(np.percentile(values, part, method="lower"), np.percentile(values, 100 - part, method="higher"), 8)
        assert 255 * inner.step - 3 * width <= 255 * grid.step <= 255 * outer.step + 3 * width


def divergence_by_loop(counts: np.ndarray, centers: np.ndarray, grid: Grid) -> float:
    """KL(P || Q) in plain loops: Q spreads the count of each step over the bins in it that hold anything."""
    low, high = grid.ends
    inside = [i for i, c in enumerate(centers) if low - grid.step / 2 <= c <= high + grid.step / 2]
    p = [float(counts[i]) for i in inside]
    steps: dict[int, list[int]] = {}
    for place, i in enumerate(inside):
        code = min(max(round(centers[i] / grid.step) + grid.zero, 0), 2**grid.bits - 1)
        steps.setdefault(code, []).append(place)
    q = [0.0] * len(p)
    for places in steps.values():
        held = [place for place in places if p[place] > 0]
        for place in held:
            q[place] = sum(p[one] for one in held) / len(held)
    p[0] += float(sum(counts[: inside[0]]))
    p[-1] += float(sum(counts[inside[-1] + 1 :]))
    total_p, total_q = sum(p), sum(q)
    return sum(
        a / total_p * np.log((a / total_p) / max(b / total_q, 1e-12)) for a, b in zip(p, q, strict=True) if a > 0
    )


@pytest.mark.parametrize("shape", ["normal", "rectified", "an outlier"])
def test_the_entropy_grid_has_the_least_divergence(shape: str) -> None:
    histogram = histogram_of(SHAPES[shape])
    centers = (histogram.edges[:-1] + histogram.edges[1:]) / 2
    found = by_method(candidates(histogram, 4, 0))
    longer = max(-histogram.low, histogram.high)
    tried = [span(max(min(histogram.low, 0), -clip * longer), min(histogram.high, clip * longer), 4) for clip in CLIPS]
    divergences = [divergence_by_loop(histogram.counts, centers, grid) for grid in tried]
    assert found["entropy"].grid == tried[int(np.argmin(divergences))]


def test_the_damage_grid_follows_what_matters() -> None:
    values = np.concatenate([RANDOM.standard_normal(20_000), np.full(20, 30.0)])
    for important, near in ((np.abs(values) > 20, 30), (np.abs(values) < 20, 2.5)):
        found = by_method(candidates(histogram_of(values, important * 1.0), 4, 10))
        low, high = found["damage"].grid.ends
        assert high == pytest.approx(near, rel=0.4)
        assert found["damage"].damage == min(one.damage for one in found.values())
        assert best(list(found.values())).damage == found["damage"].damage
        exact = np.square(values - round_input(values, found["damage"].grid))[important].sum() / 10
        assert found["damage"].damage == pytest.approx(exact, rel=0.1, abs=0.01)
        assert low <= 0


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("value", [2.0, -3.0, 1e-30, 1e30])
def test_a_constant_is_held_exactly(value: float, symmetric: bool) -> None:
    found = candidates(histogram_of(np.full(7, value), np.ones(7)), 8, 1, symmetric=symmetric)
    assert [one.method for one in found] == list(METHODS)
    for one in found:
        assert np.isfinite([one.grid.step, *one.grid.ends]).all()
        assert 0 <= one.grid.zero <= 255
    minmax = by_method(found)["min-max"].grid
    assert round_input(np.array([value]), minmax)[0] == pytest.approx(value, rel=1e-6)


def test_zeros_alone_need_no_grid() -> None:
    assert candidates(histogram_of(np.zeros(5)), 8, 0) == []
    assert best([]) is None


def test_values_that_are_not_finite_are_left_out_of_a_histogram_of_weights() -> None:
    weight = np.array([[1.0, np.nan], [np.inf, -2.0]], np.float32)
    histogram = weight_histogram(weight, np.array([4.0, 9.0]))
    assert (histogram.low, histogram.high, histogram.counts.sum()) == (-2.0, 1.0, 2)
    assert histogram.importance.sum() == pytest.approx(4 / 2 + 9 / 2)
    assert all(np.isfinite(one.sqnr_db) for one in candidates(histogram, 8, 1, symmetric=True))


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=30), st.integers(2, 8), st.booleans())
@settings(max_examples=40, deadline=None)
def test_every_grid_holds_zero_and_is_finite(values: list[float], bits: int, symmetric: bool) -> None:
    for one in candidates(histogram_of(np.array(values)), bits, 0, symmetric=symmetric):
        assert one.grid.step > 0
        assert 0 <= one.grid.zero < 2**bits
        assert one.sqnr_db == one.sqnr_db


def test_a_figures_bars_hold_all_counts() -> None:
    counts = RANDOM.integers(0, 9, BINS).astype(float)
    for bars in (1, 7, 100, BINS):
        assert coarse(counts, bars).shape == (bars,)
        assert coarse(counts, bars).sum() == counts.sum()
