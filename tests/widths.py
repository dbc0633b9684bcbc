"""Choices of bit widths that are made up, for tests of what shows them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qvis.analysis.assignment import Frontier
from qvis.analysis.damage import Draws
from qvis.analysis.widths import (
    Accuracy,
    BitWidths,
    LayerWidths,
    Mix,
    Option,
    Verified,
    interpolate,
    stored_bytes,
)
from qvis.layers import Layer, Network, Skipped
from qvis.noise import Granularity, WeightGrid

BITS = (8, 6, 4, 3, 2)


def make_widths(
    names: Sequence[str] = ("stem", "body.0.conv", "head"),
    *,
    bits: Sequence[int] = BITS,
    granularities: Sequence[Granularity] = ("channel",),
    looked_at: Sequence[Granularity] = ("channel", "tensor", 32),
    average: float = 5.0,
    labels: bool = True,
    network: bool = True,
    corrected: tuple[str, ...] = (),
    skipped: tuple[Skipped, ...] = (),
    measured: int = 4,
    seed: int = 0,
) -> BitWidths:
    """A choice for layers with these names, whose figures agree with each other."""
    random = np.random.default_rng(seed)
    grids = [WeightGrid(width, one) for one in looked_at for width in bits]
    layers = []
    for i, name in enumerate(names):
        channels, elements = int(random.integers(4, 40)), int(random.integers(8, 80))
        scale = 10 ** random.uniform(-3, 0) / len(names)
        finer = {"tensor": 4.0, "channel": 1.0}
        damages = [scale * finer.get(str(g.granularity), 0.7) * 4.0 ** (2 - g.bits) for g in grids]
        sizes = [stored_bytes(channels, elements, g) for g in grids]
        options = tuple(Option(g, s, d, 0.1) for g, s, d in zip(grids, sizes, damages, strict=True))
        op = ("Conv2d", "Linear", "Embedding")[i % 3]
        shape = (channels, elements, 1, 1) if op == "Conv2d" else (channels, elements)
        layers.append(LayerWidths(name, op, shape, channels, elements, options))
    own = [[o for o in layer.options if o.grid.granularity in granularities] for layer in layers]
    weights = sum(layer.weights for layer in layers)

    def mix(chosen: Sequence[Option], tried: bool) -> Mix:
        damage = sum(one.damage for one in chosen)
        codes = sum(layer.weights * one.grid.bits for layer, one in zip(layers, chosen, strict=True))
        pairs = {layer.name: one.grid for layer, one in zip(layers, chosen, strict=True)}
        size = sum(one.bytes for one in chosen)
        return Mix(pairs, size, codes / weights, damage, Draws(damage * 1.1, 0.4) if tried else None)

    best = Frontier(
        [np.array([o.damage for o in o_]) for o_ in own], [np.array([float(o.bytes) for o in o_]) for o_ in own]
    )
    corners = sorted({int(i) for i in np.linspace(0, len(best.weights) - 1, 30)})
    places = [best.at(corner) for corner in corners]
    tried = {int(i) for i in np.linspace(0, len(corners) - 1, measured)}
    picked = [[o_[at] for o_, at in zip(own, place, strict=True)] for place in places]
    frontier = sorted((mix(one, i in tried) for i, one in enumerate(picked)), key=lambda one: one.bytes)
    uniform = [mix([layer.option(b, granularities[0]) for layer in layers], True) for b in sorted(bits)]
    near = min(range(len(frontier)), key=lambda i: abs(frontier[i].average_bits - average))
    by_size = sorted(range(len(picked)), key=lambda i: mix(picked[i], False).bytes)
    chosen = mix(picked[by_size[near]], True)
    other = interpolate(
        chosen.bytes, np.array([float(m.bytes) for m in uniform]), np.array([m.measured_db for m in uniform])
    )
    assert chosen.measured is not None
    found = Verified(chosen.measured_db, chosen.measured.spread_db, other)
    if labels:
        found = Verified(*(found.sqnr_db, found.spread_db, other), Accuracy(0.984, 0.004), 0.977, 0.992, 512)
    held = tuple(_layer(layer, random) for layer in layers)
    return BitWidths(
        name="net",
        framework="NumPy",
        layers=tuple(layers),
        chosen=chosen,
        verified=found,
        frontier=tuple(frontier),
        uniform=tuple(uniform),
        asked=f"{average:g} bits on average",
        granularities=tuple(granularities),
        corrected=corrected,
        rest_bytes=400,
        samples=64,
        source="64 samples",
        notes=("A note.",),
        skipped=skipped,
        network=Network("net", "PyTorch 2.13.0", held) if network else None,
    )


def _layer(layer: LayerWidths, random: np.random.Generator) -> Layer:
    weight = random.normal(size=(layer.channels, layer.elements)).astype(np.float32)
    return Layer(layer.name, layer.op, layer.shape, "float32", lambda: weight)
