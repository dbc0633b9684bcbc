"""Options are assigned as well as trying all of them would."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvis.analysis import assignment
from qvis.analysis.assignment import TOLERANCE, Frontier, choose
from qvis.errors import BadArgumentError

NUMBERS = st.floats(0, 100, allow_nan=False).map(lambda value: round(value, 2))
ITEM = st.lists(st.tuples(NUMBERS, st.integers(1, 12)), min_size=1, max_size=4)
ITEMS = st.lists(ITEM, min_size=1, max_size=5)

Items = list[list[tuple[float, int]]]


def arrays(items: Items) -> tuple[list[np.ndarray], list[np.ndarray]]:
    costs = [np.array([cost for cost, _ in item]) for item in items]
    return costs, [np.array([weight for _, weight in item], dtype=float) for item in items]


def total(values: list[np.ndarray], chosen: np.ndarray) -> float:
    return sum(float(own[at]) for own, at in zip(values, chosen, strict=True))


def cheapest(items: Items, limit: float) -> float:
    """By trying everything."""
    sums = (np.sum(picked, axis=0) for picked in product(*items))
    return min(cost for cost, weight in sums if weight <= limit)


@settings(deadline=None)
@given(ITEMS, st.floats(0, 1))
def test_no_other_assignment_within_the_limit_costs_less(items: Items, share: float) -> None:
    costs, weights = arrays(items)
    low, high = (sum(end(own) for own in weights) for end in (np.min, np.max))
    limit = float(low + share * (high - low))
    chosen = choose(costs, weights, limit)
    assert total(weights, chosen) <= limit * (1 + 1e-9)
    assert total(costs, chosen) <= cheapest(items, limit) * (1 + 2 * TOLERANCE) + 1e-9


@settings(deadline=None)
@given(ITEMS)
def test_corners_of_the_frontier_are_the_cheapest_of_their_weight(items: Items) -> None:
    costs, weights = arrays(items)
    found = Frontier(costs, weights)
    assert len(found.weights) == len(found.costs) == len(found.steps) + 1
    for corner, (weight, cost) in enumerate(zip(found.weights, found.costs, strict=True)):
        chosen = found.at(corner)
        assert total(weights, chosen) == pytest.approx(weight)
        assert total(costs, chosen) == pytest.approx(cost, abs=1e-6)
        assert cost <= cheapest(items, weight * (1 + 1e-9)) + 1e-6


@settings(deadline=None)
@given(ITEMS)
def test_the_frontier_is_convex_and_falls(items: Items) -> None:
    found = Frontier(*arrays(items))
    slopes = np.diff(found.costs) / np.diff(found.weights)
    assert np.all(np.diff(found.weights) > 0)
    assert np.all(np.diff(found.costs) <= 0)
    assert np.all(np.diff(slopes) >= -1e-6)


def test_many_items_are_assigned_near_the_bound() -> None:
    generator = np.random.default_rng(0)
    bits = np.array([8.0, 6.0, 4.0, 3.0, 2.0])
    sizes = generator.integers(100, 1_000_000, 1000).astype(float)
    costs = [cost * 4.0**-bits for cost in np.exp(generator.normal(0, 2, 1000))]
    weights = [size * bits for size in sizes]
    limit = 4.7 * sizes.sum()
    chosen, frontier = choose(costs, weights, limit), Frontier(costs, weights)
    bound = np.interp(limit, frontier.weights, frontier.costs)
    assert total(weights, chosen) <= limit
    assert total(costs, chosen) <= bound * (1 + 1e-3)


def test_few_states_still_give_a_good_assignment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assignment, "MOST_STATES", 2)
    items: Items = [[(float(c), w) for c, w in ((9, 1), (5, 4), (1, 6))] for _ in range(5)]
    costs, weights = arrays(items)
    chosen = choose(costs, weights, 17)
    assert total(weights, chosen) <= 17
    assert total(costs, chosen) <= 1.3 * cheapest(items, 17)


def test_a_limit_that_is_met_exactly_is_no_excess() -> None:
    weights = [np.array([0.1, 0.3])] * 3
    assert list(choose([np.array([1.0, 0.0])] * 3, weights, 0.1 * 3)) == [0, 0, 0]
    assert list(choose([np.array([1.0, 0.0])] * 3, weights, 0.3 + 0.3 + 0.3)) == [1, 1, 1]


def test_costs_of_nothing_leave_the_lightest_options() -> None:
    assert list(choose([np.zeros(3)] * 2, [np.array([3.0, 1.0, 2.0])] * 2, 100)) == [1, 1]


def test_what_cannot_fit_is_refused_with_the_least_that_could() -> None:
    with pytest.raises(BadArgumentError, match=r"limit: got 3, expected at least 4"):
        choose([np.ones(2)] * 2, [np.array([2.0, 5.0])] * 2, 3)
