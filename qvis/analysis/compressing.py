"""What all ways to make a layer smaller have in common: options from small to large, and the damage of each of them.

Nothing is changed for real. An option moves the weights by some Δw, which is known; a backward pass gives the gradient
g, and the same two estimates of the damage as for rounding (:mod:`qvis.noise`) need two sums: Σ Δw² of each channel,
and g·Δw. Where options are nested, as ranks and the smallest weights are, one pass gives the g·Δw of all of them as
running sums.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from qvis.layers import FloatArray, IntArray
from qvis.noise import COARSE

OPTIONS = 24
"""So many sizes of a layer are looked at, for each way to make it smaller."""
SCALE_BYTES = 2
"""Of the step of a grid: a 16-bit float."""

Rows = slice | IntArray
"""The rows of a weight that a gradient is not zero in."""


class Stored:
    """A layer's weights, and the same as they are kept: rounded to a grid for each channel."""

    def __init__(self, weight: FloatArray, rounded: FloatArray, bits: int) -> None:
        self.weight = weight
        """(channels, elements)"""
        self.rounded = rounded
        self.bits = bits

    @property
    def bytes(self) -> int:
        """What the codes take, packed without gaps, with a step for each channel."""
        return packed(self.weight.size, self.bits) + SCALE_BYTES * len(self.weight)


class Compression(ABC):
    """One way to make one layer smaller, with its options from the smallest to the largest."""

    method: str
    """A word of :data:`qvis.analysis.sizes.METHODS`."""
    settings: Sequence[int]
    """What tells the options apart: how many weights, channels or ranks are kept."""
    sizes: Sequence[int]
    """Of each option, the bytes."""

    def __init__(self, stored: Stored) -> None:
        self.stored = stored
        self.along: list[FloatArray] = []
        """Of each pass, g·Δw of each option."""

    @abstractmethod
    def see(self, gradient: FloatArray, rows: Rows) -> None:
        """Take in the gradient (rows, elements) of one pass, without the rows that are zero."""

    def settle(self, importance: FloatArray) -> None:  # noqa: B027 (most have nothing to do)  # noqa: B027 (most have nothing to do)
        """Choose the options now that all passes are made, where they depend on them.

        ``importance`` is the sum of squared derivatives of each channel, (channels,).
        """

    @abstractmethod
    def noise(self) -> FloatArray:
        """The power of the change of each channel, (options, channels)."""

    @abstractmethod
    def make(self, setting: int) -> FloatArray:
        """The weight (channels, elements) that is left with this option."""

    def estimates(self, importance: FloatArray, samples: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        """What :func:`qvis.noise.combine` is given, and how much of it no first order can tell.

        Parameters
        ----------
        importance
            The sum of squared derivatives of each channel, (passes, channels).
        samples
            Of each pass, (passes,).

        Returns
        -------
        tuple
            The diagonal and the projected estimate for one sample, (passes, options), and the part of the diagonal one
            that is due to channels that lose a quarter of their power, (options,).
        """
        noise = self.noise()
        diagonal = importance @ (noise / max(1, self.stored.weight.shape[1])).T / samples[:, None]
        projected = np.square(np.stack(self.along)) / samples[:, None]
        power = np.square(self.stored.weight, dtype=np.float64).sum(axis=1)
        damage = noise * importance.sum(axis=0)
        lost = np.where(noise > COARSE * power, damage, 0).sum(axis=1)
        return diagonal, projected, lost / np.maximum(damage.sum(axis=1), np.finfo(float).tiny)


def packed(codes: int, bits: int) -> int:
    """The bytes of so many codes, packed without gaps."""
    return -(-codes * bits // 8)


def dot(a: FloatArray, b: FloatArray) -> float:
    """The sum of products."""
    return float(np.vdot(a, b))
