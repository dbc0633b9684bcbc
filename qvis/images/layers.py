"""Layers of the model that comes with qvis, as pictures, and what a few bits of them cost the model.

``examples/measure_layers.py`` wrote the file, so that neither PyTorch nor the model is needed here.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files

import numpy as np

from qvis.images.loading import Picture
from qvis.layers import FloatArray

MEASURED = "models/digits_layers.npz"
MODEL = "DigitsNet"
GRIDS = {
    "tensor": "one range for the layer",
    "channel": "one for each channel",
    "codebook": "a learned codebook",
}
"""The grids that a layer was measured on, in words."""


@dataclass(frozen=True)
class Cost:
    """What the model suffers when one layer is rounded."""

    bits: int
    db: float
    """How far the power of the output's change is below that of the output."""
    right: int
    """Pictures of digits that are read right."""


@dataclass(frozen=True)
class MeasuredLayer:
    """A layer, and what was measured."""

    name: str
    picture: Picture
    """Its weights in 65,536 greys, from the lowest, black, to the highest, white; an output channel is a column."""
    ends: tuple[float, float]
    """The lowest and the highest weight."""
    costs: dict[str, list[Cost]]
    """By the words of :data:`GRIDS`, at each width."""
    sign: Cost
    """On a grid of 1 bit that codebooks and even steps do not have: the sign times the mean size of each channel."""
    right_before: int
    samples: int


def load_layers() -> list[MeasuredLayer]:
    """The layers in the order of the page."""
    with np.load(str(files("qvis") / MEASURED), allow_pickle=False) as stored:
        bits = stored["bits"].tolist()
        grids = stored["grids"].tolist()
        found = []
        for one, name in enumerate(stored["names"].tolist()):
            costs = {
                grid: [
                    Cost(width, float(db), int(right))
                    for width, db, right in zip(bits, stored["db"][one, two], stored["right"][one, two], strict=True)
                ]
                for two, grid in enumerate(grids)
            }
            sign = costs.pop("sign")[-1]
            weight = stored[f"weight_{one}"]
            found.append(
                MeasuredLayer(
                    name,
                    draw_weight(weight, name),
                    (float(weight.min()), float(weight.max())),
                    costs,
                    sign,
                    int(stored["right_before"]),
                    int(stored["samples"]),
                )
            )
    return found


def draw_weight(weight: FloatArray, name: str) -> Picture:
    """A weight (channels, elements) as a grey picture: a column for each output channel, which is a tile of its own."""
    columns = weight.T.astype(np.float64)
    low, high = columns.min(), columns.max()
    greys = np.rint((columns - low) / ((high - low) or 1) * 65535).astype(np.uint16)[..., None]
    height, width = greys.shape[:2]
    return Picture(name, greys, (width, height), tile=(1, height))
