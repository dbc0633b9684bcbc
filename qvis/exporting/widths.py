"""A choice of bit widths, as those need it who write it down for a tool."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from qvis.analysis.widths import FLOAT_BYTES, stored_bytes
from qvis.errors import BadArgumentError, UnknownLayerError, suggest
from qvis.layers import FloatArray, Layer, Network
from qvis.noise import WeightGrid, weight_step

MOST_BITS = 16


@dataclass(frozen=True)
class Widths:
    """The layers of a model, and the grid of each that does not stay in float."""

    network: Network
    grids: Mapping[str, WeightGrid]
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Bytes of layers, where they are given."""

    @classmethod
    def checked(
        cls, network: Network, grids: Mapping[str, WeightGrid], sizes: Mapping[str, int] | None = None
    ) -> Widths:
        """Raise for names that are no layers and for grids that do not exist; all numbers become plain integers."""
        known = [layer.name for layer in network.layers]
        for argument, names in (("grids", grids), ("sizes", sizes or {})):
            for name in names:
                if name not in known:
                    raise UnknownLayerError(f"{argument}: no layer is called {name!r}{suggest(name, known)}")
        for name, (bits, granularity) in grids.items():
            if not _is_whole(bits) or not 2 <= bits <= MOST_BITS:
                raise BadArgumentError(f"grids: {name!r} has {bits!r} bits, expected an integer from 2 to {MOST_BITS}")
            if granularity not in ("tensor", "channel") and not (_is_whole(granularity) and int(granularity) > 0):
                raise BadArgumentError(
                    f"grids: {name!r} has the granularity {granularity!r}, expected tensor, channel or a group size"
                )
        plain = {
            name: WeightGrid(int(bits), sharing if isinstance(sharing, str) else int(sharing))
            for name, (bits, sharing) in grids.items()
        }
        return cls(network, plain, {name: int(size) for name, size in (sizes or {}).items()})

    def rounded(self) -> list[tuple[Layer, WeightGrid]]:
        """The layers that have a grid, in the model's own order."""
        return [(layer, self.grids[layer.name]) for layer in self.network.layers if layer.name in self.grids]

    def in_float(self) -> list[Layer]:
        """The layers that have none."""
        return [layer for layer in self.network.layers if layer.name not in self.grids]

    def bytes(self, layer: Layer) -> int:
        """What a layer takes: its codes packed without gaps, and its scales; four bytes for each weight in float."""
        if layer.name in self.sizes:
            return self.sizes[layer.name]
        rows, elements = layer.weight.shape
        grid = self.grids.get(layer.name)
        return rows * elements * FLOAT_BYTES if grid is None else stored_bytes(rows, elements, grid)


def scales_of(layer: Layer, grid: WeightGrid) -> FloatArray:
    """The steps of a layer's grid: a number, (channels,), or (channels, blocks); 1 where all weights are zero."""
    weight = layer.weight
    step = weight_step(weight, grid)
    if grid.granularity == "channel":
        step = step[:, 0]
    elif grid.granularity != "tensor" and weight.size:
        step = step[:, :: int(grid.granularity)]
    scales: FloatArray = np.where(step > 0, step, 1).astype(step.dtype)
    return scales


def axis_of_channels(layer: Layer) -> int | None:
    """The axis of the stored tensor that the rows of a layer's matrix lie along; None where it is not just one."""
    found = re.fullmatch(r"axis (\d+)", layer.channels)
    return int(found.group(1)) if found else None


def by_reason(reasons: Mapping[str, str]) -> list[str]:
    """One sentence for each reason, with all layers that it holds for."""
    layers: dict[str, list[str]] = {}
    for layer, why in reasons.items():
        layers.setdefault(why, []).append(layer)
    return [f"{', '.join(names)}: {why}" for why, names in layers.items()]


def folded(layers: Sequence[Layer]) -> dict[str, str]:
    """What to do about layers whose weights were read with normalizations folded in."""
    return {
        layer.name: f"the width was chosen with {', '.join(layer.norms)} folded in, so fold that before quantizing"
        for layer in layers
        if layer.norms
    }


def _is_whole(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
