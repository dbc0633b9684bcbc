"""Gives each of many items one of its options, so that the costs add up to the least that a limit on weights allows.

This is the multiple-choice knapsack problem (Sinha and Zoltners, Operations Research 27(3):503, 1979). Where options
may be mixed it is solved by going along the convex hulls of the items, always by the steepest edge; that gives the
frontier, and a bound for the whole. Which whole options are best is then found by dynamic programming over the items,
in which every beginning that the bound rules out is dropped (Dyer, Kayal and Walker, EJOR 16:59, 1984).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from qvis.errors import BadArgumentError
from qvis.layers import FloatArray, IntArray

TOLERANCE = 1e-4
"""A solution this close to the best one is as good: costs are not known any better."""
MOST_STATES = 50_000
"""Beginnings that are kept; with more the best of them are, by their bounds."""


class Step(NamedTuple):
    """An edge of a hull: an item goes from one option to a heavier one that costs less."""

    item: int
    option: int
    weight: float
    """How much heavier."""
    cost: float
    """How much less it costs."""


class Frontier:
    """The assignments at the corners of the convex frontier, from the lightest to the cheapest."""

    def __init__(self, costs: Sequence[FloatArray], weights: Sequence[FloatArray]) -> None:
        hulls = [_hull(cost, weight) for cost, weight in zip(costs, weights, strict=True)]
        self.lightest: IntArray = np.array([hull[0] for hull in hulls], dtype=np.int64)
        steps = [
            Step(item, int(b), float(weights[item][b] - weights[item][a]), float(costs[item][a] - costs[item][b]))
            for item, hull in enumerate(hulls)
            for a, b in pairwise(hull)
        ]
        # the edges of one hull get ever less steep, so that sorting keeps their order
        self.steps = sorted(steps, key=lambda step: -step.cost / step.weight)
        self.weights: FloatArray = np.cumsum([_total(weights, self.lightest), *(step.weight for step in self.steps)])
        """The weight at each corner, (corners,)."""
        start = _total(costs, self.lightest)
        self.costs: FloatArray = np.maximum(start - np.cumsum([0.0, *(step.cost for step in self.steps)]), 0.0)
        """The cost at each corner, (corners,)."""

    def at(self, corner: int) -> IntArray:
        """The options at a corner, (items,)."""
        chosen: IntArray = self.lightest.copy()
        for step in self.steps[:corner]:
            chosen[step.item] = step.option
        return chosen

    def fill(self, limit: float) -> IntArray:
        """Good options within a limit of the weight: the steepest edges that still fit, (items,)."""
        chosen: IntArray = self.lightest.copy()
        left, stuck = limit - self.weights[0], set()
        for step in self.steps:
            if step.item not in stuck and step.weight <= left:
                chosen[step.item], left = step.option, left - step.weight
            else:
                stuck.add(step.item)
        return chosen


def choose(costs: Sequence[FloatArray], weights: Sequence[FloatArray], limit: float) -> IntArray:
    """The options of least cost whose weights add up to at most ``limit``.

    Parameters
    ----------
    costs, weights
        Of each item an array with one number for each of its options, (options,); not negative, and finite.
    limit
        For the sum of the weights.

    Returns
    -------
    ndarray
        The place of the chosen option of each item, (items,); its cost is at most :data:`TOLERANCE` above the least.

    Raises
    ------
    BadArgumentError
        The lightest options are too heavy.
    """
    limit *= 1 + 1e-12  # sums of weights that should be equal to it may come out above it
    lightest = float(sum(weight.min() for weight in weights))
    if lightest > limit:
        raise BadArgumentError(f"limit: got {limit:g}, expected at least {lightest:g}, the sum of the smallest weights")
    frontier = Frontier(costs, weights)
    best = frontier.fill(limit)
    bound = _Bound(frontier, costs, weights)
    if _total(costs, best) <= bound(0, np.array([limit]))[0] * (1 + TOLERANCE):
        return best
    found = _search(costs, weights, limit, _total(costs, best), bound)
    return best if found is None else found


def _search(
    costs: Sequence[FloatArray], weights: Sequence[FloatArray], limit: float, least: float, bound: _Bound
) -> IntArray | None:
    """Options that cost less than ``least`` by more than the tolerance; None where there are none."""
    weight, cost = np.zeros(1), np.zeros(1)
    history: list[tuple[IntArray, IntArray]] = []
    for item, (own_costs, own_weights) in enumerate(zip(costs, weights, strict=True)):
        weight, cost = (np.add.outer(a, b).reshape(-1) for a, b in ((weight, own_weights), (cost, own_costs)))
        hopes = cost + bound(item + 1, limit - weight)
        kept = np.flatnonzero(hopes < least * (1 - TOLERANCE))
        kept = kept[np.lexsort((cost[kept], weight[kept]))]
        cheaper = np.minimum.accumulate(cost[kept])
        kept = kept[np.r_[True, cost[kept][1:] < cheaper[:-1]]] if kept.size else kept
        if kept.size > MOST_STATES:
            kept = np.sort(kept[np.argsort(hopes[kept], kind="stable")[:MOST_STATES]])
        if not kept.size:
            return None
        before, option = np.divmod(kept, len(own_costs))
        history.append((before, option))
        weight, cost = weight[kept], cost[kept]
    state = int(cost.argmin())
    chosen = np.zeros(len(costs), dtype=np.int64)
    for item in range(len(costs) - 1, -1, -1):
        before, option = history[item]
        chosen[item], state = option[state], int(before[state])
    return chosen


class _Bound:
    """The least that the items from some item on can cost with options mixed; infinite where they do not fit."""

    def __init__(self, frontier: Frontier, costs: Sequence[FloatArray], weights: Sequence[FloatArray]) -> None:
        self.items = np.array([step.item for step in frontier.steps], dtype=np.int64)
        self.steps = np.array([(step.weight, step.cost) for step in frontier.steps]).reshape(-1, 2)
        lightest = [(own[at], cost[at]) for own, cost, at in zip(weights, costs, frontier.lightest, strict=True)]
        rest = np.cumsum(np.array([*lightest, (0.0, 0.0)])[::-1], axis=0)[::-1]
        self.rest = rest
        """Weight and cost of the lightest options of the items from each on, (items + 1, 2)."""

    def __call__(self, item: int, left: FloatArray) -> FloatArray:
        """With so much weight left for the items from ``item`` on."""
        weights, costs = np.cumsum(np.vstack([self.rest[item], self.steps[self.items >= item] * (1, -1)]), axis=0).T
        found: FloatArray = np.interp(left, weights, np.maximum(costs, 0.0))
        return np.where(left < weights[0] * (1 - 1e-12), np.inf, found)


def _hull(cost: FloatArray, weight: FloatArray) -> list[int]:
    """The options on the lower convex hull of an item, from the lightest to the cheapest."""
    hull: list[int] = []
    for one in np.lexsort((cost, weight)):
        if hull and cost[one] >= cost[hull[-1]]:
            continue
        while len(hull) > 1 and not _turns(cost, weight, hull[-2], hull[-1], int(one)):
            hull.pop()
        if hull and weight[one] == weight[hull[-1]]:
            continue
        hull.append(int(one))
    return hull


def _turns(cost: FloatArray, weight: FloatArray, a: int, b: int, c: int) -> bool:
    """Whether the edge from b to c falls less steeply than the one from a to b."""
    return bool((cost[a] - cost[b]) * (weight[c] - weight[b]) > (cost[b] - cost[c]) * (weight[b] - weight[a]))


def _total(values: Sequence[FloatArray], chosen: IntArray) -> float:
    return float(sum(own[at] for own, at in zip(values, chosen, strict=True)))
