"""Making a layer smaller by leaving out weights: the smallest ones, two of each four, or whole output channels."""

from __future__ import annotations

from typing import Any

import numpy as np

from qvis.analysis.blocks import row_blocks
from qvis.analysis.compressing import OPTIONS, SCALE_BYTES, Compression, Rows, Stored, dot, packed
from qvis.layers import BoolArray, FloatArray, IntArray

DEAD = 1e-9
"""Channels of so little of a layer's power are left out safely."""


class SmallestWeights(Compression):
    """The smallest weights of the layer are left out, wherever they are (Han et al., arXiv 1506.02626).

    Those that round to zero go first, and are never kept. Stored are one bit for each weight, which says whether it is
    kept, the codes of those that are, and the steps.
    """

    method = "weights"

    def __init__(self, stored: Stored) -> None:
        super().__init__(stored)
        size = self._sizes(stored.weight, stored.rounded)
        kept = np.sort(size, axis=None)[::-1]
        nonzero = np.count_nonzero(kept)
        self._least = kept[-(-nonzero * np.arange(1, OPTIONS + 1) // OPTIONS) - 1]
        """Of each option, the size of the smallest weight that is kept, falling."""
        dropped_by = OPTIONS - np.searchsorted(self._least[::-1], size, side="right")
        self._dropped_by = dropped_by.astype(np.uint8)
        """By how many of the options a weight is left out; those are the first ones."""
        counts = np.bincount(self._dropped_by.reshape(-1), minlength=OPTIONS + 1)
        self.settings = [int(one) for one in np.cumsum(counts)[:OPTIONS]]
        flags = packed(stored.weight.size, 1) + SCALE_BYTES * len(stored.weight)
        self.sizes = [flags + packed(kept, stored.bits) for kept in self.settings]

    @staticmethod
    def _sizes(weight: FloatArray, rounded: FloatArray) -> FloatArray:
        return np.where(rounded != 0, np.abs(weight), 0)

    def see(self, gradient: FloatArray, rows: Rows) -> None:
        rounded = self.stored.rounded[rows]
        error = dot(gradient, rounded) - dot(gradient, self.stored.weight[rows])
        lost = np.bincount(
            self._dropped_by[rows].reshape(-1), weights=(gradient * rounded).reshape(-1), minlength=OPTIONS + 1
        )
        self.along.append(error - _after(lost))

    def noise(self) -> FloatArray:
        found = np.empty((OPTIONS, len(self.stored.weight)))
        for rows in row_blocks(self.stored.weight):
            weight, rounded = self.stored.weight[rows], self.stored.rounded[rows]
            error = np.square(rounded - weight, dtype=np.float64)
            more = np.square(weight, dtype=np.float64) - error
            place = self._dropped_by[rows] + (OPTIONS + 1) * np.arange(len(weight))[:, None]
            by = np.bincount(place.reshape(-1), weights=more.reshape(-1), minlength=(OPTIONS + 1) * len(weight))
            found[:, rows] = error.sum(axis=1) + _after(by.reshape(len(weight), -1)).T
        return found

    def make(self, setting: int) -> FloatArray:
        option = self.settings.index(setting)
        return np.where(self._dropped_by <= option, self.stored.rounded, 0)


class TwoOfFour(Compression):
    """Of each four neighbours in a row the two largest are kept (Mishra et al., arXiv 2104.08378).

    Stored are their codes, two bits for the place of each, and the steps. Some graphics processors multiply so.
    """

    method = "pattern"

    def __init__(self, stored: Stored) -> None:
        super().__init__(stored)
        self._kept = two_of_four(stored.weight)
        kept = int(np.count_nonzero(self._kept))
        self.settings = [kept]
        self.sizes = [packed(kept, stored.bits + 2) + SCALE_BYTES * len(stored.weight)]

    def see(self, gradient: FloatArray, rows: Rows) -> None:
        left = np.where(self._kept[rows], self.stored.rounded[rows], 0)
        self.along.append(np.array([dot(gradient, left) - dot(gradient, self.stored.weight[rows])]))

    def noise(self) -> FloatArray:
        change = self.make(self.settings[0]) - self.stored.weight
        noise: FloatArray = np.square(change, dtype=np.float64).sum(axis=1)[None]
        return noise

    def make(self, setting: int) -> FloatArray:  # noqa: ARG002
        return np.where(self._kept, self.stored.rounded, 0)


def two_of_four(weight: FloatArray) -> BoolArray:
    """Which weights are among the two largest of each four neighbours in a row; the first ones of equals."""
    rows, elements = weight.shape
    size = np.pad(np.abs(weight), ((0, 0), (0, -elements % 4)), constant_values=-1)
    order = np.argsort(-size.reshape(rows, -1, 4), axis=2, kind="stable")
    kept = np.zeros(order.shape, dtype=bool)
    np.put_along_axis(kept, order[:, :, :2], True, axis=2)
    found: BoolArray = kept.reshape(rows, -1)[:, :elements]
    return found


class WholeChannels(Compression):
    """The output channels that matter least are left out, by the squared derivatives times the squared weights.

    This order is steadier than that by the damage itself (Molchanov et al., arXiv 1906.10771): to first order, leaving
    out a whole channel seems to do too little damage, and the more so in those that look best. Stored are the rows that
    are kept with their steps, and one bit for each channel. The bias of a channel stays, and so does what other layers
    have for it: no more than the rows are counted.
    """

    method = "channels"

    def __init__(self, stored: Stored) -> None:
        super().__init__(stored)
        channels, elements = stored.weight.shape
        self._error: list[float] = []
        self._each: list[FloatArray] = []
        kept = -(-channels * np.arange(1, OPTIONS + 1) // OPTIONS)
        self.settings = [int(one) for one in kept]
        row = elements * stored.bits
        self.sizes = [packed(channels, 1) + SCALE_BYTES * one + packed(one, row) for one in self.settings]
        self._order: IntArray = np.zeros(0, dtype=np.intp)

    def see(self, gradient: FloatArray, rows: Rows) -> None:
        each = np.zeros(len(self.stored.weight), dtype=np.float32)
        each[rows] = np.einsum("ij,ij->i", gradient, self.stored.rounded[rows])
        self._error.append(float(each.sum(dtype=np.float64)) - dot(gradient, self.stored.weight[rows]))
        self._each.append(each)

    def settle(self, importance: FloatArray) -> None:
        """Order the channels; where nothing was seen, by their power."""
        power = np.square(self.stored.rounded, dtype=np.float64).sum(axis=1)
        self._order = np.lexsort((power, power * importance))[::-1]
        for error, each in zip(self._error, self._each, strict=True):
            kept = np.cumsum(each[self._order], dtype=np.float64)[np.array(self.settings) - 1]
            self.along.append(error - (each.sum(dtype=np.float64) - kept))
        self._each = []

    def noise(self) -> FloatArray:
        weight, rounded = self.stored.weight, self.stored.rounded
        kept = np.square(rounded - weight, dtype=np.float64).sum(axis=1)
        lost = np.square(weight, dtype=np.float64).sum(axis=1)
        return np.stack([np.where(self._kept(setting), kept, lost) for setting in self.settings])

    def estimates(self, importance: FloatArray, samples: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        """As for all, but sure only of channels that are dead.

        What a softmax or a rectifier does without a channel that it hardly answers to now, first order cannot tell.
        """
        diagonal, projected, _ = super().estimates(importance, samples)
        power = np.square(self.stored.weight, dtype=np.float64).sum(axis=1)
        lost = np.array([power[~self._kept(setting)].sum() for setting in self.settings])
        return diagonal, projected, (lost > DEAD * power.sum()).astype(np.float64)

    def _kept(self, setting: int) -> BoolArray:
        kept = np.zeros(len(self.stored.weight), dtype=bool)
        kept[self._order[:setting]] = True
        return kept

    def make(self, setting: int) -> FloatArray:
        return np.where(self._kept(setting)[:, None], self.stored.rounded, 0)


def _after(sums: Any) -> FloatArray:
    """For each option, the sum over all that it leaves out: what stands after its place, along the last axis."""
    after: FloatArray = np.cumsum(sums[..., ::-1], axis=-1)[..., ::-1][..., 1:]
    return after
