r"""The square-root rule of cross-layer equalization: equal ranges of weights on both sides of a channel.

Of a channel :math:`i` between two layers, let :math:`r_1` be the largest weight that makes it and :math:`r_2` the
largest that takes it. The rule multiplies the first by :math:`\sqrt{r_2 / r_1}` and divides the second by it (Nagel et
al., arXiv 1906.04721, equation 11; its :math:`s` is the inverse of the scale here). Where several layers make or take
a channel, :math:`r_1` and :math:`r_2` are maxima over all of them.

A whole network of such channels is balanced by going over it until nothing changes. That is Osborne's method for
balancing a matrix in the maximum norm (J. ACM 7:338, 1960), with the variables as its rows and columns. Channels that
a depthwise convolution links are solved for together, which for one such layer between two others gives each side the
cube root of the product of all three ranges, as in AIMET.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from qvis.equalization.terms import LayerTerm, check_terms
from qvis.layers import BoolArray, FloatArray, IntArray

TOLERANCE = 1e-9
"""Logarithms of scales that change by less have converged."""
HALF_STEPS = 1000
"""At most so many, to solve for channels that depend on each other."""


def square_root_scales(count: int, layers: Sequence[LayerTerm], *, sweeps: int = 100) -> FloatArray:
    """Find the scales that make the ranges on both sides of each channel equal.

    Parameters
    ----------
    count
        How many variables there are.
    layers
        The layers, in the order in which data flows through them. Importance and grids have no say.
    sweeps
        At most so many times are all layers gone over, in their order. With 1 it is what AIMET does: each pair of
        layers once, and each depthwise convolution with its two neighbours once.

    Returns
    -------
    FloatArray
        The logarithms of the scales, (count,). Channels with a range of 0 on either side, or with no layer there, are
        not scaled, nor are those that depthwise convolutions link them with.

    Raises
    ------
    BadArgumentError
        The arrays of a layer are not what they must be.
    """
    check_terms(count, layers)
    blocks = list(_blocks(count, layers))
    x = np.zeros(count + 1)  # the last is that of -1
    for _ in range(sweeps):
        before = x.copy()
        for block in blocks:
            block.balance(x)
        if np.abs(x - before).max(initial=0) < TOLERANCE:
            break
    return x[:-1]


class _Ranges(NamedTuple):
    """Weights on one side of some channels: of each channel consecutive pairs."""

    own: IntArray
    """(channels,) their places in the block"""
    starts: IntArray
    """(channels,) their first pairs"""
    other: IntArray
    """(pairs,) the variable at the other end"""
    size: FloatArray
    """(pairs,) log A"""

    @classmethod
    def of(cls, block: IntArray, variable: IntArray, other: IntArray, size: FloatArray) -> _Ranges:
        order = np.argsort(variable, kind="stable")
        own, starts = np.unique(variable[order], return_index=True)
        return cls(np.searchsorted(block, own), starts, other[order], size[order])

    def largest(self, x: FloatArray, least: FloatArray, sign: int) -> FloatArray:
        """The logarithm of each channel's range without the channel's own scale, or ``least``; (channels,)."""
        out: FloatArray = least.copy()
        if len(self.own):
            found = np.maximum.reduceat(self.size + sign * x[self.other], self.starts)
            out[self.own] = np.maximum(out[self.own], found)
        return out


class _Block(NamedTuple):
    """Channels that are balanced together, (channels,), and the weights around them."""

    variables: IntArray
    makers: _Ranges
    takers: _Ranges
    inner_makers: _Ranges
    """Weights between two channels of the block."""
    inner_takers: _Ranges

    def balance(self, x: FloatArray) -> None:
        """Make the ranges on both sides of each channel equal, by changing ``x`` (count + 1,)."""
        low = np.full(len(self.variables), -np.inf)
        made, taken = self.makers.largest(x, low, -1), self.takers.largest(x, low, 1)
        if not len(self.inner_makers.own):
            x[self.variables] = (taken - made) / 2
            return
        for _ in range(HALF_STEPS):
            taken_now, made_now = self.inner_takers.largest(x, taken, 1), self.inner_makers.largest(x, made, -1)
            # the rule never moves two points apart, so that half steps converge where whole ones may go to and fro
            change = ((taken_now - made_now) / 2 - x[self.variables]) / 2
            x[self.variables] += change
            if np.abs(change).max() < TOLERANCE / 100:
                break


def _blocks(count: int, layers: Sequence[LayerTerm]) -> Iterator[_Block]:
    """The blocks, in the order of the layers that make their channels."""
    links = [_links(layer) for layer in layers]
    up = _joined([layer.row_variable for layer in layers])
    down = _joined([layer.column_variable for layer in layers])
    magnitude = np.concatenate([np.zeros(0), *(np.asarray(layer.magnitude, np.float64).ravel() for layer in layers)])
    # what lies between a channel and itself no scale changes
    used = (magnitude > 0) & (up != down)
    up, down, linked, size = up[used], down[used], np.concatenate([[], *links])[used] > 0, np.log(magnitude[used])
    alive = _alive(count, up, down, linked)

    label = np.append(np.arange(count), -1)
    order: dict[int, None] = {}
    for layer, link in zip(layers, links, strict=True):
        together = [layer.row_variable, layer.column_variable[link]]
        members = np.unique(np.concatenate(together))
        old = np.unique(label[members[members >= 0]])
        if len(old):
            label[np.isin(label, old)] = old[0]
    label[:-1][~alive] = -1
    for layer in layers:
        order |= dict.fromkeys(label[np.unique(layer.row_variable)].tolist())
    order.pop(-1, None)

    made_by = _split(label[up], len(label))
    taken_by = _split(label[down], len(label))
    none = np.zeros(0, np.intp)
    for block in order:
        made, taken = made_by.get(block, none), taken_by.get(block, none)
        inner = label[down[made]] == block
        outer = label[up[taken]] != block
        within = made[inner]
        own = np.flatnonzero(label == block)
        yield _Block(
            own,
            _Ranges.of(own, up[made[~inner]], down[made[~inner]], size[made[~inner]]),
            _Ranges.of(own, down[taken[outer]], up[taken[outer]], size[taken[outer]]),
            _Ranges.of(own, up[within], down[within], size[within]),
            _Ranges.of(own, down[within], up[within], size[within]),
        )


def _links(layer: LayerTerm) -> BoolArray:
    """The pairs of a depthwise convolution, which has one input channel of its own for each output; (pairs,)."""
    alone = np.bincount(layer.row, minlength=1).max(initial=0) <= 1
    columns = layer.column_variable
    own = alone and len(np.unique(columns)) == len(columns)
    return np.full(len(columns), own) & (columns >= 0) & (layer.row_variable >= 0)


def _alive(count: int, up: IntArray, down: IntArray, linked: BoolArray) -> BoolArray:
    """Which channels have weights on both sides, with all that they are linked to; (count,)."""
    alive = (np.bincount(up[up >= 0], minlength=count) > 0) & (np.bincount(down[down >= 0], minlength=count) > 0)
    up, down = up[linked], down[linked]
    while True:
        lost = alive[up] != alive[down]
        if not lost.any():
            return alive
        alive[up[lost]] = alive[down[lost]] = False


def _joined(arrays: list[IntArray]) -> IntArray:
    return np.concatenate([np.zeros(0, np.intp), *(np.asarray(array, np.intp) for array in arrays)])


def _split(labels: IntArray, count: int) -> dict[int, IntArray]:
    """The places of each label."""
    order = np.argsort(labels, kind="stable")
    found, starts = np.unique(labels[order], return_index=True)
    return dict(zip(found.tolist(), np.split(order, starts[1:]), strict=True)) if len(found) and count else {}
