"""Grids of numbers: levels, codes, rounding and sizes of all kinds, against loops and exhaustive searches."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from qvis import BadArgumentError
from qvis.noise import WeightGrid, round_input, round_weight, span
from qvis.quantization.grids import KINDS, Fitted, Scheme
from qvis.quantization.tables import quantile_levels

FLOATS = st.floats(-1e3, 1e3, width=32)
ANY = st.one_of(FLOATS, st.sampled_from([np.nan, np.inf, -np.inf]))
SCHEMES = [
    Scheme(),
    Scheme(bits=2),
    Scheme(bits=3, narrow=False),
    Scheme(bits=4, granularity="tensor", symmetric=False),
    Scheme(bits=1, symmetric=False),
    Scheme(bits=4, granularity=3, symmetric=False),
    Scheme(bits=4, granularity=2, range="mse"),
    Scheme(bits=4, symmetric=False, range="mse"),
    Scheme(bits=4, range="percentile", percentile=90),
    Scheme("power_of_two", 4),
    Scheme("power_of_two", 5, symmetric=False, range="percentile"),
    Scheme("offset", 4),
    Scheme("offset", 1, granularity=4, range="mse"),
    Scheme("kmeans", 2),
    Scheme("kmeans", 1, granularity="tensor"),
    Scheme("logarithmic", 4),
    Scheme("logarithmic", 3, range="mse"),
    Scheme("quantile", 4, granularity=4),
    Scheme("float8_e4m3fn"),
    Scheme("float8_e5m2", granularity="tensor"),
    Scheme("float4_e2m1", 4, range="mse"),
]
each_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=str)
quickly = settings(max_examples=25, deadline=None)


def matrices(elements: st.SearchStrategy[float], dtype: Any = np.float32) -> st.SearchStrategy[np.ndarray]:
    return arrays.arrays(dtype, st.tuples(st.integers(1, 3), st.integers(1, 7)), elements=elements)


def draws(count: int, seed: int = 0) -> list[np.ndarray]:
    """Numbers of different distributions, (1, count) each."""
    rng = np.random.default_rng(seed)
    half = rng.normal(size=count // 2)
    found = [rng.normal(size=count), rng.laplace(size=count), rng.standard_t(3, size=count)]
    found += [rng.uniform(-1, 1, size=count), np.abs(rng.laplace(size=count)), np.concatenate([half - 5, half * 2 + 5])]
    return [numbers.reshape(1, -1) for numbers in found]


def levels_of_each(fitted: Fitted) -> np.ndarray:
    """The levels that each number can become, (channels, elements, levels)."""
    rows, columns = fitted.matrix.shape
    granularity = fitted.scheme.granularity
    size = granularity if isinstance(granularity, int) else columns
    return np.array([[fitted.levels(i, j // min(size, columns)) for j in range(columns)] for i in range(rows)])


def noise(fitted: Fitted) -> float:
    return float(np.square(fitted.rounded().astype(float) - fitted.matrix).sum())


# ---------------------------------------------------------------------------------------------------------------------
# All kinds


@each_scheme
@given(weight=st.one_of(matrices(ANY), matrices(ANY, np.float64)))
@quickly
def test_each_number_becomes_the_nearest_level_that_its_code_names(scheme: Scheme, weight: np.ndarray) -> None:
    kept = weight.copy()
    fitted = scheme.fit(weight)
    rounded, levels = fitted.rounded(), levels_of_each(fitted)
    finite = np.isfinite(weight)
    np.testing.assert_array_equal(weight, kept)
    assert rounded.dtype == weight.dtype
    assert rounded.shape == fitted.codes.shape == weight.shape
    np.testing.assert_array_equal(rounded[~finite], weight[~finite])
    assert np.isfinite(levels).all()
    assert (np.diff(levels, axis=-1) >= 0).all()
    assert levels.shape[-1] <= 2**scheme.bits
    lowest = int(-levels.shape[-1] // 2) + 1 if scheme.kind in ("uniform", "power_of_two") and scheme.symmetric else 0
    lowest -= scheme.kind == "uniform" and not scheme.narrow
    for i, j in np.argwhere(finite):
        assert rounded[i, j] == levels[i, j, fitted.codes[i, j] - lowest]
        errors = np.abs(levels[i, j].astype(float) - float(weight[i, j]))
        slack = 4 * np.finfo(weight.dtype).eps * np.abs(levels[i, j]).max()
        assert abs(float(rounded[i, j]) - float(weight[i, j])) <= errors.min() + slack


@each_scheme
@given(weight=matrices(ANY))
@quickly
def test_rounding_what_is_rounded_changes_nothing(scheme: Scheme, weight: np.ndarray) -> None:
    fitted = scheme.fit(weight)
    np.testing.assert_array_equal(fitted.round(fitted.rounded()), fitted.rounded())


@each_scheme
def test_numbers_that_are_not_finite_count_for_nothing(scheme: Scheme) -> None:
    weight = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
    scheme = replace(scheme, granularity="tensor")
    without = scheme.fit(weight)
    holed = np.insert(weight, [1, 5], [np.nan, np.inf], axis=1)
    rounded = scheme.fit(holed).rounded()
    np.testing.assert_array_equal(np.delete(rounded, [1, 6], axis=1), without.rounded())
    assert np.isnan(rounded[:, 1]).all()
    assert np.isinf(rounded[:, 6]).all()


@each_scheme
def test_what_is_zero_or_nothing_or_unknown_stays_as_it_is(scheme: Scheme) -> None:
    for weight in (np.zeros((2, 5)), np.zeros((0, 4)), np.zeros((3, 0)), np.full((2, 3), np.nan)):
        weight = weight.astype(np.float32)
        fitted = scheme.fit(weight)
        np.testing.assert_array_equal(fitted.rounded(), weight)
        assert fitted.scale.shape[0] in (1, len(weight))
        if weight.size:
            assert (fitted.scale == 1).all()


@each_scheme
def test_one_number_is_kept_but_where_the_scale_or_the_range_forbids_it(scheme: Scheme) -> None:
    for value in (3e-3, -7.0, 1e30, -1e-30):
        rounded = scheme.fit([[value]]).rounded()
        coarse = scheme.kind in ("power_of_two", "logarithmic") or not scheme.narrow
        np.testing.assert_allclose(rounded, [[value]], rtol=0.5 if coarse else 1e-6)
        assert rounded.dtype == np.float64


@each_scheme
def test_numbers_at_the_edges_of_floating_point_stay_finite(scheme: Scheme) -> None:
    for dtype in (np.float32, np.float64):
        info = np.finfo(dtype)
        large = np.array([[info.max, info.min, 0, info.max / 3, info.max, -1, 1]], dtype=dtype)
        small = np.array([[1, 2, 3, -4, 5, 100, -127]], dtype=dtype) * info.smallest_subnormal
        for weight in (large, small, np.array([[info.max]], dtype), np.array([[info.smallest_subnormal]], dtype)):
            fitted = scheme.fit(weight)
            assert np.isfinite(fitted.rounded()).all()
            assert np.isfinite(fitted.levels()).all()
            assert np.abs(fitted.rounded() / 2 - weight / 2).max() <= np.abs(weight).max() / 2


@each_scheme
def test_stochastic_rounding_goes_to_a_neighbour_and_is_right_in_the_mean(scheme: Scheme) -> None:
    row = np.linspace(-1, 1, 7) ** 3
    weight = np.repeat(row[None], 4000, axis=0)
    scheme = replace(scheme, granularity="tensor", rounding="stochastic", seed=1)
    fitted = scheme.fit(weight)
    rounded, levels = fitted.rounded(), fitted.levels()
    np.testing.assert_array_equal(scheme.fit(weight).rounded(), rounded)
    for column, value in enumerate(np.clip(row, levels[0], levels[-1])):
        low, high = levels[levels <= value].max(), levels[levels >= value].min()
        drawn = rounded[:, column]
        assert set(drawn) <= {low, high}
        share = (value - low) / ((high - low) or 1)
        # five standard errors
        assert abs((drawn - value).mean()) <= 5 * (high - low) * np.sqrt(share * (1 - share) / 4000) + 1e-12
    if len(set(levels)) < 200:
        assert (replace(scheme, seed=2).fit(weight).rounded() != rounded).any()


def test_types_are_computed_in_themselves_or_in_the_next_larger_float() -> None:
    values = [[0, 3, 200], [7, 1, 9]]
    for given_type, expected in (
        ("uint8", "float32"),
        ("float16", "float32"),
        ("int32", "float64"),
        ("bool", "float32"),
    ):
        assert Scheme().fit(np.array(values, dtype=given_type)).rounded().dtype == expected
    exact = Scheme("offset").fit(np.arange(256, dtype=np.uint8).reshape(1, -1))
    np.testing.assert_array_equal(exact.codes, [np.arange(256)])
    assert (exact.scale, exact.zero_point) == (1, 0)


def test_other_numbers_are_rounded_on_the_same_grid() -> None:
    fitted = Scheme(bits=3).fit([[3.0, -1.0, 0.4]])
    np.testing.assert_array_equal(fitted.round([[9.0, -1.6, np.nan]]), [[3, -2, np.nan]])
    shared = Scheme(bits=3, granularity="tensor").fit([[3.0, -1.0, 0.4]])
    np.testing.assert_array_equal(shared.round([[1.2], [-0.7]]), [[1], [-1]])
    with pytest.raises(BadArgumentError, match=r"matrix: got shape \(1, 2\), expected \(1, 3\)"):
        fitted.round([[1.0, 2.0]])


# ---------------------------------------------------------------------------------------------------------------------
# Uniform grids


@pytest.mark.parametrize(("bits", "granularity"), list(itertools.product((2, 4, 8), ("tensor", "channel"))))
@given(weight=matrices(ANY))
@quickly
def test_the_usual_grid_is_that_of_the_noise_model(bits: int, granularity: str, weight: np.ndarray) -> None:
    weight[np.abs(weight) < 1e-30] = 0  # steps below the normal numbers are rounded up here, so that none is clipped
    expected = round_weight(weight, WeightGrid(bits, granularity))
    np.testing.assert_array_equal(Scheme(bits=bits, granularity=granularity).fit(weight).rounded(), expected)


def test_an_asymmetric_grid_is_that_of_inputs() -> None:
    for bits, numbers in itertools.product((2, 4, 8), draws(100)):
        grid = span(float(numbers.min()), float(numbers.max()), bits)
        fitted = Scheme(bits=bits, symmetric=False).fit(numbers)
        assert (fitted.scale, fitted.zero_point) == (grid.step, grid.zero)
        np.testing.assert_array_equal(fitted.rounded(), round_input(numbers, grid))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("kind", ["uniform", "power_of_two", "offset"])
@given(weight=matrices(FLOATS, np.float64))
@quickly
def test_no_number_moves_further_than_half_a_step(kind: str, narrow: bool, symmetric: bool, weight: np.ndarray) -> None:
    fitted = Scheme(kind, 4, symmetric=symmetric, narrow=narrow).fit(weight)
    steps = np.broadcast_to(fitted.scale, weight.shape)
    assert (np.abs(fitted.rounded() - weight) <= steps * (0.5 + 1e-9)).all()
    if kind == "power_of_two":
        mantissa, _ = np.frexp(fitted.scale)
        assert (mantissa == 0.5).all()
        usual = Scheme("uniform", 4, symmetric=symmetric, narrow=narrow).fit(weight).scale
        assert ((fitted.scale >= usual) & (fitted.scale < 2 * usual) | (usual == 1)).all()
    if kind != "offset":
        zeros = fitted.round(np.zeros_like(weight))
        assert not zeros.any()


def test_groups_are_rounded_as_if_each_were_a_layer() -> None:
    weight = np.random.default_rng(3).normal(size=(3, 70)).astype(np.float32)
    for kind, bits in (("uniform", 4), ("kmeans", 2), ("float4_e2m1", 4)):
        fitted = Scheme(kind, bits, granularity=32).fit(weight)
        assert fitted.scale.shape == (3, 3)
        for row, (group, start) in itertools.product(range(3), enumerate((0, 32, 64))):
            alone = Scheme(kind, bits, granularity="tensor").fit(weight[row : row + 1, start : start + 32])
            np.testing.assert_array_equal(fitted.rounded()[row, start : start + 32], alone.rounded()[0])
            np.testing.assert_array_equal(fitted.levels(row, group), alone.levels())
    whole = Scheme(granularity=128).fit(weight)
    np.testing.assert_array_equal(whole.rounded(), Scheme().fit(weight).rounded())
    with pytest.raises(BadArgumentError, match="row, group: got 0, 1, expected a row below 3 and a group below 1"):
        whole.levels(0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def test_the_quantile_levels_of_four_bits_are_those_of_nf4() -> None:
    # Dettmers et al., arXiv 2305.14314, appendix E
    negative = [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004]
    positive = [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
    np.testing.assert_allclose(quantile_levels(4), [*negative, 0, *positive], atol=3e-7)
    from scipy.stats import norm

    for bits in (2, 3, 4, 8):
        levels = quantile_levels(bits)
        assert len(levels) == 2**bits
        side = norm.cdf(levels[levels >= 0] * norm.ppf(1 - (1 / 2 ** (bits + 1) + 1 / (2 ** (bits + 1) - 2)) / 2))
        np.testing.assert_allclose(np.diff(side), np.diff(side)[0])


def test_logarithmic_levels_are_powers_of_two() -> None:
    fitted = Scheme("logarithmic", 3).fit([[0.9, -0.3, 0.13, 0.1, 0.0, -0.7]])
    np.testing.assert_array_equal(fitted.levels(), [-1, -0.5, -0.25, 0, 0.25, 0.5, 1])
    np.testing.assert_array_equal(fitted.rounded(), [[1, -0.25, 0.25, 0, 0, -0.5]])
    for largest, power in ((1.49, 1), (1.51, 2), (1.0, 1), (0.7, 0.5), (0.8, 1)):
        assert Scheme("logarithmic", 3).fit([[largest]]).scale == power


def best_cells(numbers: np.ndarray, count: int) -> float:
    """The least squared error of any codebook, by dynamic programming over all numbers."""
    ordered = np.sort(numbers.ravel()).astype(float)
    size = len(ordered)
    cost = np.full((size + 1, size + 1), np.inf)
    for first in range(size):
        part = ordered[first:]
        seen = np.arange(1, len(part) + 1)
        cost[first, first + 1 :] = np.cumsum(part**2) - np.cumsum(part) ** 2 / seen
    best = cost[0]
    for _ in range(count - 1):
        best = np.minimum(best, (best[:, None] + cost).min(axis=0))
    return float(best[-1])


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_codebooks_are_the_best_for_few_numbers_and_nearly_so_for_more(bits: int) -> None:
    for count, tolerance in ((40, 1e-6), (128, 1e-6), (300, 0.02)):
        for numbers in draws(count, seed=bits):
            found = noise(Scheme("kmeans", bits).fit(numbers))
            assert found <= best_cells(numbers, 2**bits) * (1 + tolerance)


def test_large_codebooks_are_as_good_as_the_theory_of_many_levels() -> None:
    numbers = np.random.default_rng(0).normal(size=(1, 200_000))
    fitted = Scheme("kmeans", 8).fit(numbers)
    # Panter and Dite: for normal numbers the error is sqrt(3) pi / 2 / levels^2
    assert noise(fitted) / numbers.size == pytest.approx(np.sqrt(3) * np.pi / 2 / 256**2, rel=0.05)


@given(weight=matrices(FLOATS, np.float64), bits=st.integers(1, 4))
@quickly
def test_a_codebook_with_room_for_all_numbers_holds_them(weight: np.ndarray, bits: int) -> None:
    fitted = Scheme("kmeans", bits).fit(weight)
    for row, (numbers, rounded) in enumerate(zip(weight, fitted.rounded(), strict=True)):
        levels = fitted.levels(row)
        assert numbers.min() <= levels[0] <= levels[-1] <= numbers.max()
        if len(set(numbers)) <= 2**bits:
            np.testing.assert_array_equal(rounded, numbers)
            assert set(levels) == set(numbers)


# ---------------------------------------------------------------------------------------------------------------------
# Sizes and settings


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [
        (Scheme(bits=8, granularity="tensor"), 600 * 8 + 16),
        (Scheme(bits=4), 600 * 4 + 3 * 16),
        (Scheme(bits=4, granularity=128), 600 * 4 + 6 * 16),
        (Scheme(bits=4, symmetric=False), 600 * 4 + 3 * (16 + 8)),
        (Scheme(bits=16, symmetric=False), 600 * 16 + 3 * (16 + 16)),
        (Scheme("power_of_two", 5), 600 * 5 + 3 * 8),
        (Scheme("power_of_two", 5, symmetric=False), 600 * 5 + 3 * (8 + 8)),
        (Scheme("offset", 3), 600 * 3 + 3 * 32),
        (Scheme("kmeans", 4), 600 * 4 + 3 * 16 * 16),
        (Scheme("logarithmic", 4), 600 * 4 + 3 * 8),
        (Scheme("quantile", 4, granularity=64), 600 * 4 + 12 * 16),
        (Scheme("float8_e5m2"), 600 * 8 + 3 * 16),
    ],
    ids=str,
)
def test_bytes_count_codes_and_all_that_is_needed_to_read_them(scheme: Scheme, bits: int) -> None:
    fitted = scheme.fit(np.random.default_rng(0).normal(size=(3, 200)))
    assert fitted.bytes == -(-bits // 8)
    assert fitted.bits_per_weight == pytest.approx(fitted.bytes * 8 / 600)


def test_nothing_takes_no_bits_per_weight() -> None:
    fitted = Scheme().fit(np.zeros((0, 3)))
    assert fitted.bytes == 0
    assert np.isnan(fitted.bits_per_weight)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "int8"}, "kind: got 'int8', expected one of uniform, power_of_two"),
        ({"rounding": "up"}, "rounding: got 'up', expected one of nearest, stochastic"),
        ({"range": "kl"}, "range: got 'kl', expected one of minmax, percentile, mse"),
        ({"bits": 1}, "bits: got 1, expected a whole number from 2 to 16 for kind 'uniform'; one bit takes symmetric"),
        ({"bits": 17}, "bits: got 17, expected a whole number from 2 to 16"),
        ({"bits": 4.0}, "bits: got 4.0, expected a whole number"),
        ({"bits": True}, "bits: got True"),
        ({"kind": "kmeans", "bits": 9}, "bits: got 9, expected a whole number from 1 to 8 for kind 'kmeans'"),
        ({"kind": "float4_e2m1"}, "bits: got 8, expected 4 for kind 'float4_e2m1'"),
        ({"granularity": "row"}, "granularity: got 'row', expected 'tensor', 'channel' or how many"),
        ({"granularity": 0}, "granularity: got 0"),
        ({"percentile": 0}, "percentile: got 0, expected a number above 0 and up to 100"),
        ({"kind": "kmeans", "range": "mse"}, "range: got 'mse', but a codebook has none"),
    ],
)
def test_settings_that_do_not_exist_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BadArgumentError, match=message):
        Scheme(**settings)


def test_what_is_no_matrix_of_real_numbers_is_named() -> None:
    with pytest.raises(BadArgumentError, match=r"matrix: got shape \(3,\), expected \(channels, elements\)"):
        Scheme().fit([1.0, 2.0, 3.0])
    with pytest.raises(BadArgumentError, match="matrix: got type complex128, expected real numbers"):
        Scheme().fit([[1j]])


def test_a_scheme_says_what_it_is() -> None:
    assert str(Scheme(bits=4, granularity=32, range="mse")) == "4-bit uniform, groups of 32, mse"
    assert str(Scheme("power_of_two", symmetric=False)) == "8-bit asymmetric power of two, per channel"
    assert {scheme.kind for scheme in SCHEMES} == set(KINDS)
