"""How pictures are quantized, and the words for it."""

from __future__ import annotations

from dataclasses import dataclass, fields

from qvis.errors import BadArgumentError

CHANNELS = {"rgb": "red, green and blue, each by itself", "luminance": "luminance alone, as a grey picture"}
LEVELS = {"uniform": "even steps from the lowest number to the highest", "palette": "colours learned from the picture"}
ROUNDING = {
    "nearest": "to the nearest level",
    "dithered": "the error handed on to the neighbours (Floyd and Steinberg)",
}
RANGES = {
    "picture": "one range for the whole picture",
    "channel": "one for each colour channel",
    "tile": "one for each tile of each colour channel",
}
WORDS = {"channels": CHANNELS, "levels": LEVELS, "rounding": ROUNDING, "range": RANGES}
"""The words that each setting may have, and what they mean."""

BITS = (16, 8, 6, 4, 3, 2, 1)
"""Depths, the deepest only for pictures that have more than 8 bits."""
PALETTE_BITS = 8
"""A palette has no more than 256 colours."""
TILE = 32
"""Sides of a tile in pixels."""


@dataclass(frozen=True)
class Settings:
    """How a picture is quantized, whatever the bits."""

    channels: str = "rgb"
    levels: str = "uniform"
    rounding: str = "nearest"
    range: str = "picture"

    def __post_init__(self) -> None:
        for one in fields(self):
            value, words = getattr(self, one.name), WORDS[one.name]
            if value not in words:
                raise BadArgumentError(f"{one.name}: got {value!r}, expected one of {', '.join(map(repr, words))}")
        if self.levels == "palette" and self.range != "picture":
            raise BadArgumentError(
                f"range: got {self.range!r} with levels='palette', which has no range: its colours are where those of"
                " the picture are; leave range='picture'"
            )


def depths(depth: int, levels: str = "uniform") -> tuple[int, ...]:
    """The bits that a picture of so many bits is shown at, most first."""
    most = PALETTE_BITS if levels == "palette" else depth
    return tuple(bits for bits in BITS if bits <= most)
