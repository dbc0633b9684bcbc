"""The ranges of grids: those of least noise against exhaustive searches, percentiles against NumPy's."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given

from qvis.quantization.grids import Scheme
from tests.test_grids import ANY, draws, each_scheme, matrices, noise, quickly


def best_symmetric(numbers: np.ndarray, bits: int) -> float:
    """The least error of any step up to that of twice the whole range.

    Between two steps at which a number changes its code the error is a quadratic function of the step.
    """
    sizes, most = np.abs(numbers.ravel()), 2 ** (bits - 1) - 1
    largest = sizes.max() / most
    changes = np.unique(sizes[:, None] / (np.arange(most) + 0.5))
    changes = np.append(changes[changes < 2 * largest], 2 * largest)
    least = np.inf
    for low, high in itertools.pairwise(changes):
        codes = np.clip(np.rint(sizes / ((low + high) / 2)), 0, most)
        step = np.clip((sizes @ codes) / (codes @ codes), low, high)
        least = min(least, np.square(sizes - step * codes).sum())
    return float(least)


@pytest.mark.parametrize(("bits", "tolerance"), [(2, 0.02), (3, 0.02), (4, 0.02), (5, 0.02), (8, 0.2)])
def test_the_mse_range_is_as_near_the_best_as_is_promised(bits: int, tolerance: float) -> None:
    for numbers in draws(64, seed=bits) + (draws(150, seed=10 + bits) if bits < 8 else []):
        found = noise(Scheme(bits=bits, range="mse").fit(numbers))
        assert found <= (1 + tolerance) * best_symmetric(numbers, bits)


def test_the_mse_range_of_large_layers_is_as_good_as_a_fine_sweep() -> None:
    rng = np.random.default_rng(0)
    for numbers in (rng.normal(size=100_000), rng.standard_t(3, size=100_000)):
        for bits in (4, 8):
            found = noise(Scheme(bits=bits, granularity="tensor", range="mse").fit(numbers[None]))
            most = 2 ** (bits - 1) - 1
            steps = np.abs(numbers).max() / most * np.geomspace(1 / 200, 1, 150)
            errors = [np.square(numbers - s * np.clip(np.rint(numbers / s), -most, most)).sum() for s in steps]
            assert found <= 1.01 * min(errors)


def test_the_mse_range_of_large_layers_leaves_out_what_is_not_finite() -> None:
    numbers = np.random.default_rng(0).laplace(size=(1, 80_000))
    holed = np.insert(numbers, np.arange(0, 80_000, 3), np.nan, axis=1)
    scheme = Scheme(bits=4, range="mse")
    whole, found = scheme.fit(numbers), scheme.fit(holed)
    assert np.nansum(np.square(found.rounded() - holed)) <= 1.01 * noise(whole)
    nothing = scheme.fit(np.full((1, 80_000), np.nan))
    assert nothing.scale == 1


@pytest.mark.parametrize("kind", ["uniform", "offset"])
def test_the_mse_range_of_two_ends_is_close_to_the_best_pair(kind: str) -> None:
    for numbers in draws(256):
        scheme = Scheme(kind, 4, granularity="channel", symmetric=False)
        found = noise(replace(scheme, range="mse").fit(numbers))
        parts = np.linspace(0.05, 1, 40)
        middle = 0 if kind == "uniform" else numbers.mean()
        low, high = numbers.min(), numbers.max()
        low, high = (min(low, 0), max(high, 0)) if kind == "uniform" else (low, high)
        tried = []
        for a, b in itertools.product(parts, parts):
            first, last = middle + (low - middle) * a, middle + (high - middle) * b
            step = (last - first) / 15
            base = -np.rint(-first / step) * step if kind == "uniform" else first
            rounded = np.clip(np.rint((numbers - base) / step), 0, 15) * step + base
            tried.append(np.square(rounded - numbers).sum())
        assert found <= 1.1 * min(tried)


@each_scheme
@given(weight=matrices(ANY))
@quickly
def test_the_mse_range_is_never_worse_than_the_whole(scheme: Scheme, weight: np.ndarray) -> None:
    if scheme.kind == "kmeans":
        return
    weight = np.where(np.isfinite(weight), weight, 0)
    whole, narrow = (noise(replace(scheme, range=name).fit(weight)) for name in ("minmax", "mse"))
    assert narrow <= whole * (1 + 1e-6)


@pytest.mark.parametrize("kind", ["uniform", "power_of_two", "offset", "kmeans", "quantile"])
def test_more_bits_and_smaller_blocks_are_never_worse(kind: str) -> None:
    numbers = np.concatenate(draws(256)).reshape(-1, 256)
    chosen = "minmax" if kind == "kmeans" else "mse"
    by_bits = [noise(Scheme(kind, bits, range=chosen).fit(numbers)) for bits in range(2, 9)]
    assert by_bits == sorted(by_bits, reverse=True)
    if kind == "quantile":  # has few levels for groups whose numbers are all alike
        numbers = numbers[:-1]
    by_blocks = [noise(Scheme(kind, 4, size, range=chosen).fit(numbers)) for size in ("tensor", "channel", 128, 64, 32)]
    assert by_blocks == sorted(by_blocks, reverse=True)


@pytest.mark.parametrize("percentile", [50, 90, 99.9, 100])
def test_percentiles_are_those_of_numpy(percentile: float) -> None:
    weight = np.concatenate(draws(200))
    holed = np.insert(weight, 3, np.nan, axis=1)
    scheme = Scheme(bits=4, range="percentile", percentile=percentile)
    high = np.percentile(np.abs(weight), percentile, axis=1)
    np.testing.assert_allclose(scheme.fit(holed).scale[:, 0] * 7, high)
    outside = (100 - percentile) / 2
    low, high = np.percentile(weight, [outside, 100 - outside], axis=1)
    offset = replace(scheme, kind="offset").fit(holed)
    np.testing.assert_allclose(offset.zero_point[:, 0], low)
    np.testing.assert_allclose(offset.scale[:, 0] * 15, high - low)
    zeroed = replace(scheme, symmetric=False).fit(holed)
    np.testing.assert_allclose(zeroed.scale[:, 0] * 15, np.maximum(high, 0) - np.minimum(low, 0))


@pytest.mark.parametrize("kind", ["uniform", "offset", "quantile"])
def test_a_range_is_not_cut_down_to_nothing_where_most_numbers_are_the_same(kind: str) -> None:
    sparse = np.zeros((1, 5000))
    sparse[0, 7] = 0.5
    rounded = Scheme(kind, 4, range="percentile").fit(sparse).rounded()
    np.testing.assert_allclose(rounded, sparse)
