r"""What normalizations tell of the mean of each channel, without running the model.

What leaves a batch normalization has the mean :math:`\beta` (its shift) and the deviation :math:`|\gamma|` (its scale)
in each channel; taken for a normal distribution, which a rectifier then clips, this gives the mean of what enters the
next layer (Nagel et al., arXiv 1906.04721, section 4.2.1 and appendix C).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import erf, exp, inf, pi, prod, sqrt
from typing import NamedTuple

import numpy as np

from qvis.layers import FloatArray, Graph, Node


class Moments(NamedTuple):
    """Of the numbers in each channel, (channels,)."""

    mean: FloatArray
    variance: FloatArray


def expect(graph: Graph, without: Collection[str] = ()) -> dict[str, Moments]:
    """The moments of the results of those nodes of a graph for which they are known.

    Parameters
    ----------
    graph
        How data flows, with its normalizations.
    without
        Normalizations that are not what they are in the graph any more.
    """
    found: dict[str, Moments] = {}
    for node in graph.nodes:
        result = _result(graph, node, [found.get(name) for name in node.inputs], without)
        if result is not None:
            found[node.name] = result
    return found


def _result(graph: Graph, node: Node, given: Sequence[Moments | None], without: Collection[str]) -> Moments | None:
    if node.op == "batch_norm":
        norm = graph.norms.get(node.name)
        known = norm is not None and node.name not in without
        return Moments(norm.shift, np.square(norm.scale)) if known and norm is not None else None
    known_inputs = [one for one in given if one is not None]
    if not known_inputs or len(known_inputs) < len(given) or node.attributes.get("constant"):
        return None
    first = known_inputs[0]
    if node.op == "relu":
        return clipped(first, 0.0, inf)
    if node.op == "clip":
        low, high = node.attributes.get("low"), node.attributes.get("high")
        return clipped(first, -inf if low is None else low, inf if high is None else high)
    if node.op in ("identity", "dropout"):
        return first
    if node.op == "avg_pool" or (node.op in ("flatten", "reshape") and prod(node.shape[1:]) == len(first.mean)):
        return first  # of which the mean alone is right then
    if node.op == "add" and len({len(one.mean) for one in known_inputs}) == 1:
        # as if they had nothing to do with each other
        total = (
            np.sum([one.mean for one in known_inputs], axis=0),
            np.sum([one.variance for one in known_inputs], axis=0),
        )
        return Moments(*total)
    return None


def clipped(moments: Moments, low: float, high: float) -> Moments:
    """The moments of normal numbers that are clipped to an interval, either end of which may be infinite."""
    mean, deviation = np.asarray(moments.mean, np.float64), np.sqrt(np.asarray(moments.variance, np.float64))
    found = [_clipped(float(m), float(d), low, high) for m, d in zip(mean, deviation, strict=True)]
    means, variances = np.array(found, np.float64).reshape(-1, 2).T
    return Moments(means, variances)


def _clipped(mean: float, deviation: float, low: float, high: float) -> tuple[float, float]:
    """The integral over the three parts: what lies below, between, and above the ends."""
    if deviation == 0:
        return min(max(mean, low), high), 0.0
    a, b = (low - mean) / deviation, (high - mean) / deviation
    below, above = _below(a), 1 - _below(b)
    between = 1 - below - above
    first = mean * between + deviation * (_density(a) - _density(b))
    second = (mean**2 + deviation**2) * between + deviation * (_edge(mean, deviation, a) - _edge(mean, deviation, b))
    if below > 0 and low > -inf:
        first, second = first + low * below, second + low**2 * below
    if above > 0 and high < inf:
        first, second = first + high * above, second + high**2 * above
    return first, max(0.0, second - first**2)


def _edge(mean: float, deviation: float, x: float) -> float:
    """What an end adds to the second moment: (2 mean + deviation x) times the density there."""
    return 0.0 if abs(x) == inf else (2 * mean + deviation * x) * _density(x)


def _below(x: float) -> float:
    """The share of standard normal numbers below."""
    return (1 + erf(x / sqrt(2))) / 2


def _density(x: float) -> float:
    return 0.0 if abs(x) == inf else exp(-x * x / 2) / sqrt(2 * pi)
