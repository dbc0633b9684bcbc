"""The scales of cross-layer equalization, against loops, finite differences and another solver."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy.optimize import NonlinearConstraint, minimize

from qvis import BadArgumentError
from qvis.equalization.scales import Scales, assess_scales, formulate, optimal_scales, power_of_two
from qvis.equalization.square_root import square_root_scales
from qvis.equalization.terms import InputTerm, LayerTerm
from qvis.errors import QvisError
from qvis.layers import IntArray
from tests.weights import Array

GRANULARITIES = ("tensor", "channel")


def chain(*widths: int, seed: int = 0) -> tuple[int, list[LayerTerm], list[InputTerm]]:
    """Full layers one after another, with variables for the channels between them."""
    rng = np.random.default_rng(seed)
    first = np.cumsum([0, *widths[1:-1]])
    variables = [np.full(widths[0], -1)]
    variables += [np.arange(start, start + width) for start, width in zip(first, widths[1:-1], strict=False)]
    variables.append(np.full(widths[-1], -1))
    layers, inputs = [], []
    for i, (rows, columns) in enumerate(zip(widths[1:], widths[:-1], strict=True)):
        magnitude, importance = np.exp(rng.normal(size=(2, rows, columns)))
        layers.append(LayerTerm(f"layer{i}", variables[i + 1], variables[i], magnitude, importance))
        inputs.append(InputTerm(f"layer{i}", variables[i], *np.exp(rng.normal(size=(2, columns)))))
    return int(first[-1]), layers, inputs


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("power", [5, 80])
def test_the_gradient_is_that_of_finite_differences(granularity: str, power: float) -> None:
    count, layers, inputs = chain(3, 4, 5, 2)
    program = formulate(count, layers, inputs, 8, granularity)
    x = np.random.default_rng(1).normal(size=count)
    _, gradient = program.smooth(x, power)
    for i, step in enumerate(1e-6 * np.eye(count)):
        difference = program.smooth(x + step, power)[0] - program.smooth(x - step, power)[0]
        assert_allclose(gradient[i], difference / 2e-6, rtol=1e-5, atol=1e-7)


def naive_damage(x: Array, layers: list[LayerTerm], inputs: list[InputTerm], bits: int, granularity: str) -> float:
    """The sum of the formulas, by a loop over single pairs."""
    full, total = np.append(x, 0.0), 0.0
    for layer in layers:
        rows: dict[int, list[tuple[float, float]]] = {}
        for i, row in enumerate(layer.row):
            factor = np.exp(full[layer.row_variable[i]] - full[layer.column_variable[i]])
            pair = layer.magnitude.flat[i] * factor, layer.importance.flat[i] / factor**2
            rows.setdefault(int(row) if granularity == "channel" else 0, []).append(pair)
        for pairs in rows.values():
            step = max(size for size, _ in pairs) / (2 ** (bits - 1) - 1)
            total += step**2 / 12 * sum(importance for size, importance in pairs if size)
    for term in inputs:
        factors = np.exp(full[term.variable])
        total += (max(term.range * factors) / (2**bits - 1)) ** 2 / 12 * sum(term.importance / factors**2)
    return total


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_predicted_damage_is_that_of_a_loop_over_pairs(granularity: str) -> None:
    count, layers, inputs = chain(3, 4, 5, 2)
    x = np.random.default_rng(1).normal(size=count)
    found = assess_scales(x, layers, inputs, 6, granularity)
    assert_allclose(found.after.total, naive_damage(x, layers, inputs, 6, granularity))
    assert_allclose(found.before.total, naive_damage(0 * x, layers, inputs, 6, granularity))
    assert_allclose(found.after.layers["layer1"], naive_damage(x, layers[1:2], [], 6, granularity))
    assert_allclose(found.after.inputs["layer1"], naive_damage(x, [], inputs[1:2], 6, granularity))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_result_is_no_worse_than_no_scaling_and_the_rule(granularity: str) -> None:
    count, layers, inputs = chain(3, 4, 5, 2)
    found = optimal_scales(count, layers, inputs, 8, granularity)
    rule = assess_scales(square_root_scales(count, layers), layers, inputs, 8, granularity)
    assert found.after.total < min(found.before.total, rule.after.total)


def test_a_better_result_than_the_start_is_found_for_variables_that_several_layers_share() -> None:
    layers, x = residual(), square_root_scales(3, residual())
    for granularity in GRANULARITIES:
        found = optimal_scales(3, layers, [], 4, granularity)
        rule = assess_scales(x, layers, [], 4, granularity)
        assert found.after.total <= min(found.before.total, rule.after.total)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.sampled_from(GRANULARITIES), st.floats(0, 1))
def test_the_logarithm_of_damage_is_convex_along_segments(seed: int, granularity: str, part: float) -> None:
    count, layers, inputs = chain(3, 4, 5, 2, seed=seed)
    program = formulate(count, layers, inputs, 8, granularity, 4)
    one, other = np.random.default_rng(seed).normal(size=(2, count), scale=3)
    for damage in (program.log_damage, lambda x: program.smooth(x, 20)[0]):
        between = part * damage(one) + (1 - part) * damage(other)
        assert damage(part * one + (1 - part) * other) <= between + 1e-9


def least_with_constraints(count: int, layers: list[LayerTerm], inputs: list[InputTerm], granularity: str) -> float:
    """The least log damage, by sequential quadratic programs over the scales and a bound on each maximum."""
    up = np.concatenate([*(one.row_variable for one in layers), *(one.variable for one in inputs)])
    down = np.concatenate([*(one.column_variable for one in layers), *(0 * one.variable - 1 for one in inputs)])
    sizes = np.concatenate([*(one.magnitude.ravel() for one in layers), *(one.range for one in inputs)])
    importance = np.concatenate([*(one.importance.ravel() for one in layers), *(one.importance for one in inputs)])
    by_row = granularity == "channel"
    grids = [(i, row if by_row else 0, 127) for i, one in enumerate(layers) for row in one.row]
    grids += [(-1 - i, 0, 255) for i, one in enumerate(inputs) for _ in one.variable]
    _, first, term = np.unique(np.array(grids), axis=0, return_index=True, return_inverse=True)
    constant = np.array([-np.log(12) - 2 * np.log(grids[i][2]) for i in first])
    up = np.where([by_row and one[0] >= 0 for one in grids], -1, up)  # cancels

    def shift(z: Array) -> Array:
        full = np.append(z[:count], 0.0)
        return full[up] - full[down]

    def log_damage(z: Array) -> float:
        sums = np.bincount(term, importance * np.exp(-2 * shift(z)))
        return float(np.logaddexp.reduce(constant + 2 * z[count:] + np.log(sums)))

    bounds = NonlinearConstraint(lambda z: z[count:][term] - np.log(sizes) - shift(z), 0, np.inf)
    start = np.append(np.zeros(count), [np.log(sizes[term == i]).max() for i in range(len(first))])
    found = minimize(log_damage, start, method="SLSQP", constraints=bounds, options={"maxiter": 500, "ftol": 1e-12})
    assert found.success
    return float(found.fun)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_optimum_is_that_of_a_solver_with_constraints(granularity: str, seed: int) -> None:
    count, layers, inputs = chain(2, 3, 4, 2, seed=seed)
    found = optimal_scales(count, layers, inputs, 8, granularity)
    wanted = least_with_constraints(count, layers, inputs, granularity)
    assert_allclose(np.log(found.after.total), wanted, atol=0.01)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("entering", [True, False])
def test_the_optimum_is_no_worse_than_any_point_of_a_fine_grid(granularity: str, entering: bool) -> None:
    count, layers, inputs = chain(3, 2, 3)
    inputs = inputs if entering else []
    found = optimal_scales(count, layers, inputs, 8, granularity)
    points = np.array(list(product(np.linspace(-4, 4, 81), repeat=2)))
    least = min(naive_damage(point, layers, inputs, 8, granularity) for point in points)
    assert found.after.total <= 1.002 * least


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_what_was_scaled_before_ends_at_the_same_weights(granularity: str) -> None:
    count, layers, inputs = chain(3, 4, 3)
    before = np.random.default_rng(5).normal(size=count)
    first = optimal_scales(count, layers, inputs, 8, granularity)
    second = optimal_scales(count, *scaled(before, layers, inputs), 8, granularity)
    assert_allclose(second.after.total, first.after.total, rtol=0.005)
    moved = second.x + before - first.x
    if granularity == "channel":  # what all channels of a tensor have in common then cancels
        moved -= moved.mean()
    assert_allclose(moved, 0, atol=0.05)


def scaled(x: Array, layers: list[LayerTerm], inputs: list[InputTerm]) -> tuple[list[LayerTerm], list[InputTerm]]:
    """What remains of the terms when the channels have been scaled by exp(x)."""
    full, changed, entering = np.append(x, 0.0), [], []
    for one in layers:
        factor = np.exp(full[one.row_variable] - full[one.column_variable]).reshape(one.magnitude.shape)
        magnitude, importance = one.magnitude * factor, one.importance / factor**2
        changed.append(replace(one, magnitude=magnitude, importance=importance))
    for term in inputs:
        factor = np.exp(full[term.variable])
        entering.append(InputTerm(term.name, term.variable, term.range * factor, term.importance / factor**2))
    return changed, entering


def test_the_same_question_has_the_same_answer() -> None:
    answers = [optimal_scales(*chain(3, 6, 6, 3), 8, "tensor").x for _ in range(2)]
    assert_array_equal(*answers)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_dead_channels_are_not_scaled(granularity: str) -> None:
    count, layers, inputs = chain(3, 4, 3)
    layers[0].magnitude[layers[0].outputs == 1] = 0
    layers[1].magnitude[:, layers[1].inputs == 1] = 0
    inputs[1].range[1] = 0
    for layer in layers:
        of_two = (layer.outputs == 2)[:, None] | (layer.inputs == 2)
        layer.importance[of_two] = 0
        layer.magnitude[of_two] /= 1e6
    inputs[1].importance[2] = 0
    inputs[1].range[2] /= 1e6
    found = optimal_scales(count, layers, inputs, 8, granularity)
    assert_allclose(found.x[1:3], 0, atol=1e-6)
    assert np.abs(found.x[[0, 3]]).min() > 0.01


def test_weights_of_zero_neither_cost_nor_count() -> None:
    count, layers, inputs = chain(3, 4, 3)
    layers[0].magnitude.flat[:5] = 0
    assert_allclose(
        assess_scales(np.zeros(count), layers, inputs, 8, "tensor").before.total,
        naive_damage(np.zeros(count), layers, inputs, 8, "tensor"),
    )


def test_no_scale_goes_beyond_the_limit() -> None:
    count, layers, inputs = chain(3, 4, 3)
    layers[0].magnitude[layers[0].outputs == 1] *= 1e6
    assert np.abs(optimal_scales(count, layers, inputs, 8, "tensor").x).max() > np.log(4)
    assert np.abs(optimal_scales(count, layers, inputs, 8, "tensor", limit=4).x).max() <= np.log(4)


def test_inputs_can_have_grids_of_another_width() -> None:
    count, layers, inputs = chain(3, 4, 3)
    coarse = assess_scales(np.zeros(count), layers, inputs, 4, "tensor", input_bits=8).before
    fine = assess_scales(np.zeros(count), layers, inputs, 8, "tensor").before
    assert coarse.inputs == fine.inputs
    assert_allclose(coarse.layers["layer0"] / fine.layers["layer0"], (127 / 7) ** 2)


def test_a_layer_that_is_entered_twice_has_the_sum_of_damages() -> None:
    count, _, inputs = chain(3, 4, 3)
    once = assess_scales(np.zeros(count), [], inputs, 8, "tensor").before
    twice = assess_scales(np.zeros(count), [], inputs * 2, 8, "tensor").before
    assert_allclose(twice.inputs["layer1"], 2 * once.inputs["layer1"])


def test_without_anything_to_scale_nothing_is_scaled() -> None:
    assert optimal_scales(0, [], [], 8, "tensor").after.total == 0
    assert_array_equal(optimal_scales(2, [], [], 8, "channel").x, [0, 0])
    found = optimal_scales(*chain(3, 2), 8, "tensor")
    assert found.before == found.after
    assert found.x.shape == (0,)


def test_powers_of_two_are_exact_and_cost_something() -> None:
    count, layers, inputs = chain(3, 4, 5, 2)
    best = optimal_scales(count, layers, inputs, 8, "tensor")
    rounded = assess_scales(power_of_two(best.x), layers, inputs, 8, "tensor")
    assert_array_equal(np.frexp(rounded.factors)[0], 0.5)
    assert best.after.total < rounded.after.total < best.before.total
    powers = np.arange(-10, 11)
    none = best.before
    assert_array_equal(Scales(power_of_two(powers * np.log(2)), none, none).factors, 2.0**powers)
    assert_allclose(best.factors, np.exp(best.x))


def test_without_scipy_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(QvisError, match=r"qvis\[equalize\]"):
        optimal_scales(*chain(3, 4, 3), 8, "tensor")
    square_root_scales(*chain(3, 4, 3)[:2])


def test_errors_name_the_argument() -> None:
    count, layers, inputs = chain(3, 4, 3)
    with pytest.raises(BadArgumentError, match="granularity: got 'row'"):
        optimal_scales(count, layers, inputs, 8, "row")
    with pytest.raises(BadArgumentError, match="bits: got 1"):
        optimal_scales(count, layers, inputs, 1, "tensor")
    with pytest.raises(BadArgumentError, match="limit: got 1"):
        optimal_scales(count, layers, inputs, 8, "tensor", limit=1)
    with pytest.raises(BadArgumentError, match=r"layers: layer0: outputs has numbers outside -1 to 2"):
        optimal_scales(3, layers, inputs, 8, "tensor")
    layers[1].magnitude.flat[3] = np.nan
    with pytest.raises(BadArgumentError, match=r"layers: layer1: magnitude has negative or infinite numbers or NaN"):
        square_root_scales(count, layers)
    inputs[1].importance[0] = -1
    with pytest.raises(BadArgumentError, match=r"inputs: layer1: importance has negative"):
        optimal_scales(count, layers[:1], inputs, 8, "tensor")
    with pytest.raises(BadArgumentError, match=r"layers: fc: magnitude has shape \(2, 2\), expected \(2, 3\)"):
        square_root_scales(3, [LayerTerm("fc", np.arange(2), np.arange(3), np.ones((2, 2)), np.ones((2, 2)))])
    with pytest.raises(BadArgumentError, match=r"inputs: fc: range has shape \(2,\), expected \(3,\)"):
        optimal_scales(3, [], [InputTerm("fc", np.arange(3), np.ones(2), np.ones(3))], 8, "tensor")


def test_a_grouped_convolution_has_the_pairs_within_its_groups() -> None:
    matrix = np.arange(8.0).reshape(4, 2)
    term = LayerTerm("conv", np.array([4, 5, 6, 7]), np.array([0, 1, 2, -1]), matrix, matrix + 1, groups=2)
    assert_array_equal(term.row_variable, [4, 4, 5, 5, 6, 6, 7, 7])
    assert_array_equal(term.column_variable, [0, 1, 0, 1, 2, -1, 2, -1])
    assert_array_equal(term.row, [0, 0, 1, 1, 2, 2, 3, 3])


# ---------------------------------------------------------------------------------------------------------------------
# The square-root rule


def full(name: str, outputs: IntArray, inputs: IntArray, seed: int) -> LayerTerm:
    magnitude = np.exp(np.random.default_rng(seed).normal(size=(len(outputs), len(inputs))))
    return LayerTerm(name, outputs, inputs, magnitude, np.ones_like(magnitude))


def residual() -> list[LayerTerm]:
    """Variables 0 and 1 are made by two layers and taken by two; 2 lies within the branch."""
    stream, branch, fixed = np.array([0, 1]), np.array([2]), np.array([-1, -1])
    return [
        full("stem", stream, fixed, 1),
        full("branch1", branch, stream, 2),
        full("branch2", stream, branch, 3),
        full("head", fixed, stream, 4),
    ]


def ranges(variable: int, x: Array, layers: list[LayerTerm]) -> tuple[float, float]:
    """The largest weight that makes a channel, and the largest that takes it, by a loop."""
    values, made, taken = np.append(x, 0.0), [0.0], [0.0]
    for layer in layers:
        for row, column, size in zip(layer.row_variable, layer.column_variable, layer.magnitude.flat, strict=True):
            weight = size * np.exp(values[row] - values[column])
            if row == variable != column:
                made.append(weight)
            if column == variable != row:
                taken.append(weight)
    return max(made), max(taken)


def test_the_rule_for_a_pair_is_the_root_of_the_ratio_of_ranges() -> None:
    count, layers, _ = chain(3, 5, 4)
    first, second = layers[0].magnitude.reshape(5, 3), layers[1].magnitude.reshape(4, 5)
    wanted = np.sqrt(second.max(axis=0) / first.max(axis=1))
    assert_allclose(np.exp(square_root_scales(count, layers)), wanted)


def test_one_sweep_over_a_chain_takes_each_pair_once_with_what_the_last_one_left() -> None:
    count, layers, _ = chain(3, 5, 4, 6, 2)
    shapes = [(5, 3), (4, 5), (6, 4), (2, 6)]
    weights = [layer.magnitude.reshape(shape) for layer, shape in zip(layers, shapes, strict=True)]
    wanted: list[float] = []
    for one, other in pairwise(weights):
        scale = np.sqrt(other.max(axis=0) / one.max(axis=1))
        one *= scale[:, None]
        other /= scale
        wanted += scale.tolist()
    count, layers, _ = chain(3, 5, 4, 6, 2)
    assert_allclose(np.exp(square_root_scales(count, layers, sweeps=1)), wanted)


def depthwise() -> tuple[list[LayerTerm], Array, Array, Array]:
    rng = np.random.default_rng(7)
    first, middle, last = (np.exp(rng.normal(size=shape)) for shape in ((4, 3), (4, 1), (5, 4)))
    one, other = np.arange(4), np.arange(4, 8)
    layers = [
        LayerTerm("expand", one, np.full(3, -1), first, first),
        LayerTerm("depthwise", other, one, middle, middle, groups=4),
        LayerTerm("project", np.full(5, -1), other, last, last),
    ]
    return layers, first, middle, last


@pytest.mark.parametrize("sweeps", [1, 100])
def test_around_a_depthwise_convolution_the_rule_is_the_cube_root(sweeps: int) -> None:
    layers, first, middle, last = depthwise()
    r1, r2, r3 = first.max(axis=1), middle.max(axis=1), last.max(axis=0)
    root = np.cbrt(r1 * r2 * r3)
    wanted = np.concatenate([root / r1, r3 / root])
    assert_allclose(np.exp(square_root_scales(8, layers, sweeps=sweeps)), wanted, rtol=1e-8)


@pytest.mark.parametrize("dead", [0, 1, 2])
def test_a_range_of_zero_leaves_both_sides_of_a_depthwise_convolution_alone(dead: int) -> None:
    layers = depthwise()[0]
    channel = [layers[0].row_variable, layers[1].column_variable, layers[2].column_variable - 4][dead]
    layers[dead].magnitude.flat[np.flatnonzero(channel == 2)] = 0
    x = square_root_scales(8, layers)
    assert_array_equal(x[[2, 6]], 0)
    assert np.abs(np.delete(x, [2, 6])).min() > 1e-3


@pytest.mark.parametrize("name", ["chain", "residual", "recurrent"])
def test_when_the_rule_has_converged_the_ranges_of_both_sides_are_equal(name: str) -> None:
    count, layers = chain(3, 5, 4, 6, 2)[:2]
    if name == "residual":
        count, layers = 3, residual()
    if name == "recurrent":  # channels that one layer both makes and takes
        own, fixed = np.arange(4), np.full(3, -1)
        count, layers = 4, [full("in", own, fixed, 1), full("own", own, own, 2), full("out", fixed, own, 3)]
    x = square_root_scales(count, layers)
    made, taken = np.transpose([ranges(i, x, layers) for i in range(count)])
    assert_allclose(made, taken, rtol=1e-6)
    assert np.ptp(x) > 0.1


def test_channels_that_no_layer_makes_or_takes_are_not_scaled() -> None:
    fixed = np.full(2, -1)
    layers = [full("one", fixed, np.array([0, 1]), 1), full("two", np.array([2, 3]), fixed, 2)]
    assert_array_equal(square_root_scales(5, layers), 0)
    assert_array_equal(square_root_scales(2, []), 0)


def test_the_rule_for_pairs_scaled_before_ends_at_the_same_weights() -> None:
    count, layers, inputs = chain(3, 5, 4)
    before = np.random.default_rng(5).normal(size=count, scale=3)
    again, _ = scaled(before, layers, inputs)
    assert_allclose(square_root_scales(count, again) + before, square_root_scales(count, layers))
