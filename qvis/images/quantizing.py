"""From pixels to quantized pixels, with the grids that weights are rounded to.

``templates/widgets/picture_quantizing.js`` does the same in the browser, and every pixel must come out the same: all
numbers are integers or float64, each operation stands in the same order there, and halves go to even.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from qvis.images.dithering import dither, to_grid, to_palette
from qvis.images.palettes import learn, nearest
from qvis.images.settings import TILE, Settings
from qvis.layers import FloatArray
from qvis.quantization.grids import SCALE_BITS, Scheme

Samples = np.ndarray[Any, np.dtype[np.unsignedinteger[Any]]]
"""Pixels, (height, width, 1 or 3): uint8 or uint16."""

WEIGHTS = (299, 587, 114)
"""Thousandths of red, green and blue in luminance (ITU-R BT.601)."""


class Quantized(NamedTuple):
    """A picture in so many bits."""

    samples: Samples
    """The pixels that are left, in the type of the original; one channel of luminance."""
    bytes: int
    """What it takes, its codes packed without gaps, with the ranges or the palette that are needed to read them."""
    bits_per_pixel: float
    """Of the codes alone."""
    values: tuple[int, ...]
    """The levels of the first range, or the luminance of the palette's colours, ascending; none of more than 256."""


def depth_of(samples: Samples) -> int:
    """Bits of each channel: 8 or 16."""
    return 8 * samples.dtype.itemsize


def luminance(samples: Samples) -> Samples:
    """Brightness of each pixel, (height, width, 1), in whole numbers."""
    if samples.shape[2] == 1:
        return samples
    total = samples.astype(np.int64) @ np.array(WEIGHTS)
    grey: Samples = ((total[..., None] + 500) // 1000).astype(samples.dtype)
    return grey


def quantize(
    samples: Samples, bits: int, settings: Settings | None = None, tile: tuple[int, int] = (TILE, TILE)
) -> Quantized:
    """A picture in ``bits`` bits: of each channel or, with a palette, of each pixel.

    Parameters
    ----------
    samples
        (height, width, 1 or 3), uint8 or uint16.
    bits
        1 to 16; of a palette to 8.
    tile
        Width and height of a tile in pixels; those at the right and at the bottom may be smaller.
    """
    settings = settings or Settings()
    if settings.channels == "luminance":
        samples = luminance(samples)
    if settings.levels == "palette":
        return _with_palette(samples, bits, settings.rounding)
    return _on_grid(samples, bits, settings, tile)


def _with_palette(samples: Samples, bits: int, rounding: str) -> Quantized:
    height, width, channels = samples.shape
    palette = learn(samples, 2**bits)
    if rounding == "dithered":
        found = dither(samples, to_palette(palette))
    else:
        found = palette[nearest(samples.reshape(-1, channels), palette)].reshape(samples.shape)
    stored = height * width * bits + palette.size * depth_of(samples)
    values = sorted({int(one) for one in luminance(palette[None].astype(samples.dtype)).flat})
    return Quantized(found.astype(samples.dtype), -(-stored // 8), float(bits), tuple(values))


def _on_grid(samples: Samples, bits: int, settings: Settings, tile: tuple[int, int]) -> Quantized:
    blocks = _blocks(samples, settings.range, tile)
    fitted = Scheme("offset", bits, "tensor" if settings.range == "picture" else "channel").fit(blocks)
    if settings.rounding == "dithered":
        step, low = (
            _unblocked(np.broadcast_to(of_each, blocks.shape), samples.shape, settings.range, tile)
            for of_each in (fitted.scale, fitted.zero_point)
        )
        found = dither(samples, to_grid(step, low, bits))
    else:
        found = _unblocked(np.rint(fitted.rounded()), samples.shape, settings.range, tile)
    stored = samples.size * bits + len(blocks) * 2 * SCALE_BITS
    values = tuple(dict.fromkeys(int(one) for one in np.rint(fitted.levels()))) if bits <= 8 else ()
    return Quantized(found.astype(samples.dtype), -(-stored // 8), float(bits * samples.shape[2]), values)


# ---------------------------------------------------------------------------------------------- blocks


def _blocks(samples: Samples, sharing: str, tile: tuple[int, int]) -> FloatArray:
    """The numbers that share a range in rows, (blocks, numbers) in float64, filled up with NaN."""
    height, width, channels = samples.shape
    if sharing == "picture":
        return samples.reshape(1, -1).astype(np.float64)
    planes = np.moveaxis(samples, 2, 0).astype(np.float64)
    if sharing == "channel":
        return planes.reshape(channels, -1)
    across, down = tile
    padded = np.pad(planes, ((0, 0), (0, -height % down), (0, -width % across)), constant_values=np.nan)
    split = padded.reshape(channels, -(-height // down), down, -(-width // across), across)
    tiles: FloatArray = split.swapaxes(2, 3).reshape(-1, down * across)
    return tiles


def _unblocked(blocks: FloatArray, shape: tuple[int, ...], sharing: str, tile: tuple[int, int]) -> FloatArray:
    height, width, channels = shape
    if sharing == "picture":
        return blocks.reshape(shape)
    if sharing == "tile":
        across, down = tile
        rows, columns = -(-height // down), -(-width // across)
        split = blocks.reshape(channels, rows, columns, down, across).swapaxes(2, 3)
        blocks = split.reshape(channels, rows * down, columns * across)[:, :height, :width]
    return np.moveaxis(blocks.reshape(channels, height, width), 0, 2)
