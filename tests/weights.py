"""Weights and networks of plain arrays for the tests of analysis and reports, with no framework around them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from qvis.analysis import analyze_layer, analyze_network
from qvis.layers import Analysis, Layer, LayerAnalysis, Network, Thresholds

Array = NDArray[np.floating[Any]]

HUGE = 1e38
SPECIAL = (np.nan, np.inf, -np.inf)


def layer(weight: Any, name: str = "layer") -> Layer:
    """A layer around an array (channels, elements)."""
    weight = np.asarray(weight)
    return Layer(name, "Linear", weight.shape, str(weight.dtype), lambda: weight)


def network(weights: Mapping[str, Any], name: str = "model") -> Network:
    """A network of such layers, by name."""
    layers = tuple(layer(weight, key) for key, weight in weights.items())
    return Network(name, "arrays 1.0", layers, parameters=sum(np.size(weight) for weight in weights.values()))


def analysis(weights: Mapping[str, Any], **options: Any) -> Analysis:
    """What qvis finds about such a network."""
    return analyze_network(network(weights), **options)


def finding(weight: Any, bits: int = 8, thresholds: Thresholds | None = None) -> LayerAnalysis:
    """What qvis finds about one layer."""
    return analyze_layer(layer(weight), bits, thresholds or Thresholds())


def gaussian(channels: int, elements: int, seed: int = 0) -> NDArray[np.float32]:
    """A layer as training often leaves it, with nothing wrong."""
    return np.random.default_rng(seed).standard_normal((channels, elements)).astype(np.float32)


@st.composite
def weights(
    draw: st.DrawFn,
    *,
    channels: int = 40,
    elements: int = 200,
    finite: bool = False,
    exponents: tuple[int, int] = (-38, 38),
    spread: int = 12,
) -> Array:
    """Weights (channels, elements) of all kinds: tiny to huge, with constant, sparse, zero and shifted channels.

    ``exponents`` bound the layer's magnitude, powers of ten; ``spread`` bounds how many of them lie between channels.
    """
    shape = draw(st.integers(1, channels)), draw(st.integers(1, elements))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["normal", "heavy", "uniform", "grid"]))
    weight = {
        "normal": lambda: random.standard_normal(shape),
        "heavy": lambda: random.standard_normal(shape) ** 5,
        "uniform": lambda: random.random(shape),
        "grid": lambda: random.integers(-8, 9, shape).astype(float),
    }[kind]()
    weight *= 10.0 ** random.uniform(-draw(st.integers(0, spread)), 0, (shape[0], 1))
    for row in draw(st.lists(st.integers(0, shape[0] - 1), max_size=4)):
        match draw(st.sampled_from(["zero", "constant", "sparse", "shifted"])):
            case "zero":
                weight[row] = 0
            case "constant":
                weight[row] = weight[row, 0]
            case "sparse":
                weight[row, 1:] = 0
            case "shifted":
                weight[row] += 1000 * np.abs(weight[row]).max()
    weight *= 10.0 ** draw(st.integers(*exponents))
    weight = np.clip(weight, -HUGE, HUGE)
    if not finite:
        places = st.tuples(st.integers(0, shape[0] - 1), st.integers(0, shape[1] - 1), st.sampled_from(SPECIAL))
        for row, column, value in draw(st.lists(places, max_size=5)):
            weight[row, column] = value
        if draw(st.sampled_from([False] * 9 + [True])):
            weight[draw(st.integers(0, shape[0] - 1))] = np.nan
    weight = weight.astype(draw(st.sampled_from([np.float32, np.float64])))
    weight.setflags(write=False)
    return weight
