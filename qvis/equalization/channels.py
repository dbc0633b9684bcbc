"""Scale variables of channels: which of them are one and the same, which must be 1, and how tensors carry them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from qvis.layers import IntArray


class Variables:
    """Numbers above 0, one for each channel of each tensor: equal where they are tied, 1 where they are fixed.

    Equal ones are found by union-find over whole arrays.
    """

    def __init__(self) -> None:
        self._count = 0
        self._parent = np.arange(1024)
        self._cause = np.zeros(1024, np.intp)
        """Of a root: why it is fixed, 0 where it is free."""
        self._reasons: list[str] = [""]
        self._codes: dict[str, int] = {"": 0}

    def new(self, count: int, reason: str = "") -> IntArray:
        """So many more; fixed where a reason is given."""
        ids = np.arange(self._count, self._count + count)
        self._count += count
        room = len(self._parent)
        if self._count > room:  # which at least doubles, so that many small requests stay cheap
            self._parent = np.append(self._parent, np.arange(room, room + self._count))
            self._cause = np.append(self._cause, np.zeros(self._count, np.intp))
        self._cause[ids] = self._code(reason)
        return ids

    def find(self, ids: IntArray) -> IntArray:
        """The one that stands for all that are equal, of the same shape."""
        roots = self._parent[ids]
        while np.any(self._parent[roots] != roots):
            roots = self._parent[roots]
        self._parent[ids] = roots
        return np.asarray(roots)

    def tie(self, one: IntArray, other: IntArray) -> None:
        """Make them equal, element by element; the arrays are broadcast. What is fixed fixes the other."""
        one, other = (part.ravel() for part in np.broadcast_arrays(self.find(one), self.find(other)))
        different = one != other
        one, other = one[different], other[different]
        old = np.unique(np.concatenate([one, other]))
        causes = self._cause[old]
        # Where one number meets several in a pass, only the last is kept: the next pass finds the others.
        while len(one):
            self._parent[np.maximum(one, other)] = np.minimum(one, other)
            one, other = self.find(one), self.find(other)
            different = one != other
            one, other = one[different], other[different]
        self._spread(self.find(old), causes)

    def fix(self, ids: IntArray, reason: str) -> None:
        """Make them 1. The first reason counts."""
        roots = np.unique(self.find(ids))
        self._spread(roots, np.full(len(roots), self._code(reason)))

    def is_fixed(self, ids: IntArray) -> bool:
        """Whether all of them are 1."""
        return bool(np.all(self._cause[self.find(ids)] > 0))

    def free(self, ids: IntArray) -> IntArray:
        """Those that stand for all that are free, each once."""
        roots = np.unique(self.find(ids))
        return np.asarray(roots[self._cause[roots] == 0])

    def reason(self, ids: IntArray) -> str:
        """Why the first of them that is fixed is; empty where none is."""
        causes = self._cause[self.find(ids)].ravel()
        causes = causes[causes > 0]
        return self._reasons[causes[0]] if len(causes) else ""

    def _code(self, reason: str) -> int:
        if reason not in self._codes:
            self._codes[reason] = len(self._reasons)
            self._reasons.append(reason)
        return self._codes[reason]

    def _spread(self, roots: IntArray, causes: IntArray) -> None:
        new = (causes > 0) & (self._cause[roots] == 0)
        self._cause[roots[new]] = causes[new]


@dataclass(frozen=True, eq=False)
class Channels:
    """The variables of a tensor's elements: ``element * variable`` is what flows when channels are scaled."""

    ids: IntArray
    """As many axes as the tensor, of size 1 where they do not vary. Without a shape (channels,) along :attr:`axis`."""
    shape: tuple[int, ...] = ()
    """Of the tensor; empty where it is not known."""
    axis: int = 0
    """The axis along which they vary, where the shape is not known."""

    @classmethod
    def along(cls, ids: IntArray, axis: int, shape: tuple[int, ...]) -> Channels:
        """Of a tensor whose variables vary along one axis alone."""
        if not shape:
            return cls(ids, (), axis)
        sizes = [1] * len(shape)
        sizes[axis] = len(ids)
        return cls(ids.reshape(sizes), shape)

    @property
    def is_uniform(self) -> bool:
        """Whether there is one variable for the whole tensor."""
        return self.ids.size == 1

    @property
    def is_known(self) -> bool:
        """Whether it is known where the variables are."""
        return bool(self.shape) or self.is_uniform

    def aligned(self, rank: int) -> IntArray:
        """The ids with so many axes, new ones in front."""
        return self.ids.reshape((1,) * rank if self.is_uniform else (1,) * (rank - self.ids.ndim) + self.ids.shape)

    def full(self, axis: int) -> IntArray:
        """The ids, as many along an axis as the tensor has places there."""
        sizes = list(self.ids.shape)
        sizes[axis] = self.shape[axis]
        return np.broadcast_to(self.ids, sizes)


def compress(ids: IntArray) -> IntArray:
    """The same ids with size 1 along each axis where they do not vary."""
    for axis in range(ids.ndim):
        first = ids.take([0], axis) if ids.shape[axis] else ids
        ids = first if np.all(ids == first) else ids
    return ids


def reshape(ids: IntArray, before: Sequence[int], after: Sequence[int]) -> IntArray | None:
    """The ids of a reshaped tensor; None where the number of elements differs. Expands no more axes than it must.

    >>> reshape(np.array([[[0], [1]]]), (8, 2, 3), (8, 6)).tolist()
    [[0, 0, 0, 1, 1, 1]]
    """
    if prod(before) != prod(after) or prod(before) == 0:
        return None
    expanded: list[int] = []
    wanted: list[int] = []
    for olds, news in _blocks(before, after):
        varies = any(ids.shape[axis] > 1 for axis in olds)
        expanded += [before[axis] if varies else 1 for axis in olds]
        wanted += [after[axis] if varies else 1 for axis in news]
    return compress(np.broadcast_to(ids, expanded).reshape(wanted))


def _blocks(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[range, range]]:
    """The smallest runs of axes of both shapes, in order, that hold as many elements as one another."""
    i = j = 0
    while i < len(before) or j < len(after):
        first, second = i, j
        i, j = min(i + 1, len(before)), min(j + 1, len(after))
        while (sizes := (prod(before[first:i]), prod(after[second:j])))[0] != sizes[1]:
            if sizes[0] < sizes[1]:
                i += 1
            else:
                j += 1
        yield range(first, i), range(second, j)
