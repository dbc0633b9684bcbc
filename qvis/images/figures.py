"""What a picture loses and what it takes, in numbers."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, nan, pi
from typing import Any

import numpy as np

from qvis.images.palettes import distinct
from qvis.images.png import encode_png
from qvis.images.quantizing import Quantized, Samples, depth_of, luminance
from qvis.layers import FloatArray

WINDOW = 11
"""Sides of the window that SSIM looks through, in pixels."""
SIGMA = 1.5
K1, K2 = 0.01, 0.03
BINS = 256
"""Of a histogram."""


@dataclass(frozen=True)
class Figures:
    """What is left of a picture in so many bits."""

    bits: int
    """Of each channel or, with a palette, of each pixel."""
    levels: int
    """Of a range, or colours of the palette."""
    colours: int
    """Different colours that the quantized picture has."""
    bits_per_pixel: float
    """Of the codes."""
    bytes: int
    """Codes packed without gaps, and the ranges or the palette."""
    png_bytes: int
    """Of the quantized picture as a PNG file."""
    ratio: float
    """How many times less the PNG takes than the pixels of the original, uncompressed."""
    psnr: float
    """Peak signal to noise ratio in dB, infinite where nothing is lost."""
    ssim: float
    """Structural similarity of luminance, 1 where nothing is lost; NaN for pictures smaller than its window."""


class Original:
    """A picture that quantized ones are compared with."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples
        self.raw_bytes = samples.nbytes
        self.grey = luminance(samples)
        self._ssim = Similarity(self.grey[..., 0], float(np.iinfo(samples.dtype).max))

    @property
    def figures(self) -> Figures:
        """Those of the picture as it is."""
        depth, png = depth_of(self.samples), len(encode_png(self.samples))
        colours = len(distinct(self.samples.reshape(-1, self.samples.shape[2])))
        per_pixel = float(depth * self.samples.shape[2])
        ssim = self._ssim.to(self.grey[..., 0])
        return Figures(depth, 2**depth, colours, per_pixel, self.raw_bytes, png, self.raw_bytes / png, inf, ssim)

    def measure(self, quantized: Quantized, bits: int) -> Figures:
        """The figures of this picture in ``bits`` bits."""
        png = len(encode_png(quantized.samples))
        return Figures(
            bits=bits,
            levels=2**bits,
            colours=len(distinct(quantized.samples.reshape(-1, quantized.samples.shape[2]))),
            bits_per_pixel=quantized.bits_per_pixel,
            bytes=quantized.bytes,
            png_bytes=png,
            ratio=self.raw_bytes / png,
            psnr=psnr(self.grey if quantized.samples.shape[2] == 1 else self.samples, quantized.samples),
            ssim=self._ssim.to(luminance(quantized.samples)[..., 0]),
        )


def psnr(original: Samples, changed: Samples) -> float:
    """``10 log10(top² / mean square error)`` over all numbers of a picture, in dB."""
    error = np.square(original.astype(np.int64) - changed.astype(np.int64)).sum()
    if not error:
        return inf
    top = float(np.iinfo(original.dtype).max)
    return float(10 * np.log10(top * top * original.size / float(error)))


class Similarity:
    """SSIM to one picture (Wang, Bovik, Sheikh and Simoncelli, IEEE Trans. Image Processing 13:600, 2004).

    The mean over all places where the window, a Gaussian of 11 by 11 pixels, lies within the picture.
    """

    def __init__(self, grey: np.ndarray[Any, Any], top: float) -> None:
        self._small = min(grey.shape) < WINDOW
        self._limits = ((K1 * top) ** 2, (K2 * top) ** 2)
        if not self._small:
            self._grey = grey.astype(np.float64)
            self._mean = _blur(self._grey)
            self._variance = _blur(np.square(self._grey)) - np.square(self._mean)

    def to(self, other: np.ndarray[Any, Any]) -> float:
        """The similarity of another picture of the same shape (height, width)."""
        if self._small:
            return nan
        grey = other.astype(np.float64)
        mean = _blur(grey)
        variance = _blur(np.square(grey)) - np.square(mean)
        both = self._mean * mean
        covariance = _blur(self._grey * grey) - both
        c1, c2 = self._limits
        above = (2 * both + c1) * (2 * covariance + c2)
        below = (np.square(self._mean) + np.square(mean) + c1) * (self._variance + variance + c2)
        return float((above / below).mean())


def _blur(values: FloatArray) -> FloatArray:
    """Weighted means through the window, where it lies within; (height - 10, width - 10)."""
    reach = WINDOW // 2
    weights = np.exp(-np.square(np.arange(-reach, reach + 1)) / (2 * SIGMA**2)) / (SIGMA * np.sqrt(2 * pi))
    weights /= weights.sum()
    height, width = (side - WINDOW + 1 for side in values.shape)
    down = sum((weight * values[i : i + height] for i, weight in enumerate(weights)), np.zeros((height, 1)))
    blurred: FloatArray = sum(
        (weight * down[:, i : i + width] for i, weight in enumerate(weights)), np.zeros((height, width))
    )
    return blurred


def histogram(samples: Samples) -> list[list[int]]:
    """How many numbers of each channel are in each of :data:`BINS` equal parts of what it could hold."""
    shift = depth_of(samples) - 8
    channels = np.moveaxis(samples, 2, 0)
    return [np.bincount((channel >> shift).ravel(), minlength=BINS).tolist() for channel in channels]
