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

from collections.abc import Iterable, Sequence
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
    blocks = _blocks(count, layers)
    x = np.zeros(count + 1)  # the last is that of -1
    for _ in range(sweeps):
        before = x.copy()
        for block in blocks:
            block.balance(x)
        if np.abs(x - before).max(initial=0) < TOLERANCE:
            break
    return x[:-1]


class _Ranges(NamedTuple):
    """Weights of one layer on one side of some channels of a block: of each the same number of pairs."""

    own: IntArray
    """(channels,) their places in the block"""
    other: IntArray
    """(channels, pairs) the variable at the other end"""
    size: FloatArray
    """(channels, pairs) log A; -inf where there is nothing"""


class _Block(NamedTuple):
    """Channels that are balanced together, (channels,), and the weights around them."""

    variables: IntArray
    makers: list[_Ranges]
    takers: list[_Ranges]
    inner_makers: list[_Ranges]
    """Weights between two channels of the block."""
    inner_takers: list[_Ranges]

    def balance(self, x: FloatArray) -> None:
        """Make the ranges on both sides of each channel equal, by changing ``x`` (count + 1,)."""
        low = np.full(len(self.variables), -np.inf)
        made, taken = _largest(self.makers, x, low, -1), _largest(self.takers, x, low, 1)
        if not self.inner_makers:
            x[self.variables] = (taken - made) / 2
            return
        for _ in range(HALF_STEPS):
            taken_now, made_now = _largest(self.inner_takers, x, taken, 1), _largest(self.inner_makers, x, made, -1)
            # the rule never moves two points apart, so that half steps converge where whole ones may go to and fro
            change = ((taken_now - made_now) / 2 - x[self.variables]) / 2
            x[self.variables] += change
            if np.abs(change).max() < TOLERANCE / 100:
                break


def _largest(ranges: Iterable[_Ranges], x: FloatArray, least: FloatArray, sign: int) -> FloatArray:
    """The logarithm of each channel's range without the channel's own scale, or ``least``; (channels,)."""
    out: FloatArray = least.copy()
    for one in ranges:
        np.maximum.at(out, one.own, (one.size + sign * x[one.other]).max(axis=1))
    return out


class _Layer:
    """A layer's weights, seen from its output and from its input channels."""

    def __init__(self, term: LayerTerm) -> None:
        rows, columns = term.magnitude.shape
        shape = (term.groups, rows // term.groups, columns)
        self.outputs, self.inputs = np.asarray(term.outputs), np.asarray(term.inputs)
        above = np.broadcast_to(self.outputs.reshape(*shape[:2], 1), shape)
        below = np.broadcast_to(self.inputs.reshape(shape[0], 1, columns), shape)
        with np.errstate(divide="ignore"):
            size = np.log(np.asarray(term.magnitude, np.float64)).reshape(shape)
        # what lies between a channel and itself no scale changes
        size[above == below] = -np.inf
        self.made = (below.reshape(rows, columns), size.reshape(rows, columns))
        """Of each output channel, what it is made of: variables and log A, (rows, columns)."""
        turned = (len(self.inputs), shape[1])
        self.taken = (above.swapaxes(1, 2).reshape(turned), size.swapaxes(1, 2).reshape(turned))
        """Of each input channel, what it is taken for, (groups * columns, rows of a group)."""
        # a depthwise convolution has one input channel of its own for each output
        alone = columns == 1 and len(np.unique(self.inputs)) == len(self.inputs) == rows
        linked = (self.inputs >= 0) & (self.outputs >= 0) if alone else np.zeros(0, bool)
        self.links = self.outputs[: len(linked)][linked], self.inputs[: len(linked)][linked]
        """The variables of outputs and inputs that it links."""
        self.there = np.isfinite(size).reshape(-1)[: len(linked)][linked]
        """Whether it has a weight between them."""


def _blocks(count: int, layers: Sequence[LayerTerm]) -> list[_Block]:
    """The blocks, in the order of the layers that make their channels."""
    known = [_Layer(term) for term in layers]
    label: IntArray = np.append(np.arange(count), -1)
    order: dict[int, None] = {}
    for layer in known:
        members = np.unique(np.concatenate([layer.outputs, layer.links[1]]))
        old = np.unique(label[members[members >= 0]])
        if len(old):
            label[np.isin(label, old)] = old[0]
    label[:-1][~_alive(count, known)] = -1
    for layer in known:
        order |= dict.fromkeys(label[np.unique(layer.outputs)].tolist())
    order.pop(-1, None)
    places = np.zeros(count + 1, np.intp)
    blocks = {}
    for name in order:
        own = np.flatnonzero(label == name)
        places[own] = np.arange(len(own))
        blocks[name] = _Block(own, [], [], [], [])
    for layer in known:
        for variables, (other, size), which in ((layer.outputs, layer.made, 0), (layer.inputs, layer.taken, 1)):
            labels = label[variables]
            for name in np.unique(labels[labels >= 0]).tolist():
                within = np.isin(label, name)
                rows = slice(None) if np.all(labels == name) else np.flatnonzero(labels == name)
                _add(blocks[name], which, places[variables[rows]], other[rows], size[rows], within)
    return list(blocks.values())


def _add(block: _Block, which: int, own: IntArray, other: IntArray, size: FloatArray, members: BoolArray) -> None:
    """Add weights to the makers (0) or takers (1) of a block, those between two of its channels apart."""
    inner = members[other]
    outside, inside = (block.makers, block.inner_makers) if which == 0 else (block.takers, block.inner_takers)
    for part, those in ((outside, ~inner), (inside, inner)):
        if np.any(those & np.isfinite(size)):
            part.append(_Ranges(own, other, size if those.all() else np.where(those, size, -np.inf)))


def _alive(count: int, layers: Sequence[_Layer]) -> BoolArray:
    """Which channels have weights on both sides, with all that they are linked to; (count,)."""
    sides: BoolArray = np.zeros((2, count + 1), bool)
    for layer in layers:
        for side, variables, (_, size) in ((0, layer.outputs, layer.made), (1, layer.inputs, layer.taken)):
            sides[side, variables[np.isfinite(size).any(axis=1)]] = True
    alive = sides[0, :-1] & sides[1, :-1]
    found = [[link[layer.there] for link in layer.links] for layer in layers]
    up, down = (np.concatenate([np.zeros(0, np.intp), *(one[i] for one in found)]) for i in (0, 1))
    while True:
        lost = alive[up] != alive[down]
        if not lost.any():
            return alive
        alive[up[lost]] = alive[down[lost]] = False
