"""The scales of cross-layer equalization, against loops, finite differences and another solver."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose

from qvis.equalization.scales import _Program, assess_scales, optimal_scales, square_root_scales
from qvis.equalization.terms import InputTerm, LayerTerm
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
        layers.append(LayerTerm.of(f"layer{i}", variables[i + 1], variables[i], magnitude, importance))
        inputs.append(InputTerm(f"layer{i}", variables[i], *np.exp(rng.normal(size=(2, columns)))))
    return int(first[-1]), layers, inputs


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("power", [5, 80])
def test_the_gradient_is_that_of_finite_differences(granularity: str, power: float) -> None:
    count, layers, inputs = chain(3, 4, 5, 2)
    program = _Program.of(count, layers, inputs, 8, granularity, None)
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
            pair = layer.magnitude[i] * factor, layer.importance[i] / factor**2
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
