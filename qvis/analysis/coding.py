"""Making a layer smaller by fewer bits for each weight, and by storing their codes as briefly as entropy allows."""

from __future__ import annotations

import numpy as np

from qvis.analysis.compressing import SCALE_BYTES, packed
from qvis.layers import FloatArray, IntArray
from qvis.noise import WeightGrid, round_weight
from qvis.quantization.grids import Scheme

FREQUENCY_BYTES = 2
"""For each code that occurs, the coder's table says how often."""


class FewerBits:
    """A layer's weights rounded to nearest on a grid for each channel, at several widths."""

    def __init__(self, weight: FloatArray, widths: tuple[int, ...]) -> None:
        self.weight = weight
        self.widths = widths
        """The narrowest first."""
        found = [entropy(Scheme("uniform", width, "channel").fit(weight).codes) for width in widths]
        self.entropies = tuple(bits for bits, _ in found)
        """Of each width, the bits for each code that an ideal entropy coder needs in the mean (Shannon)."""
        steps = SCALE_BYTES * len(weight)
        self.packed = tuple(packed(weight.size, width) + steps for width in widths)
        """Bytes with the codes packed without gaps, and a step for each channel."""
        self.coded = tuple(
            min(whole, -(-int(np.ceil(bits * weight.size)) // 8) + FREQUENCY_BYTES * used + steps)
            for whole, (bits, used) in zip(self.packed, found, strict=True)
        )
        """Bytes with an ideal entropy coder, its table of frequencies, and a step for each channel; packed where that
        is less."""

    def make(self, setting: int) -> FloatArray:
        """The weight (channels, elements) rounded to a grid of so many bits."""
        return round_weight(self.weight, WeightGrid(setting, "channel"))


def entropy(codes: IntArray) -> tuple[float, int]:
    """Bits for each code, in the mean over all of them, and how many different ones there are."""
    if not codes.size:
        return 0.0, 0
    counts = np.bincount(codes.reshape(-1) - codes.min())
    shares = counts[counts > 0] / codes.size
    return float(-(shares * np.log2(shares)).sum()) + 0.0, len(shares)
