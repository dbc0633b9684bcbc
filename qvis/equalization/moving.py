"""Follows scale variables through operations that move elements, and through those that mix them along some axes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import prod

import numpy as np

from qvis.equalization.channels import Channels, Variables, compress, reshape
from qvis.layers import Graph, IntArray, Node

POOLS = ("max_pool", "avg_pool", "sum")


class Moving:
    """What such operations make of the variables of what they are given; None where scaling ends there.

    Where an operation mixes elements along an axis, or where it is not known what goes where, their variables are made
    equal, so that it does not matter.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.variables = Variables()
        self._channel_axes = {
            (len(node.shape), node.attributes["channel_axis"] % len(node.shape))
            for node in graph.nodes
            if node.op in ("conv", "conv_transpose") and node.shape and "channel_axis" in node.attributes
        }
        """(rank, axis) of the channels of images here."""

    # -- where scaling ends

    def _fixed(self, node: Node, reason: str) -> Channels:
        ids = self.variables.new(1, reason)
        return Channels(ids.reshape((1,) * len(node.shape)) if node.shape else ids, node.shape)

    def _stop(self, node: Node, given: Sequence[Channels], reason: str = "") -> Channels:
        """What goes in cannot be scaled, nor what comes out."""
        for one in given:
            self.variables.fix(one.ids, reason or f"{node.op} {node.name!r} follows it")
        return self._fixed(node, reason or f"it is tied to the result of {node.op} {node.name!r}")

    def _tie_along(self, ids: IntArray, axis: int) -> IntArray:
        """Make the variables along an axis equal, so that it does not matter what an operation does there."""
        first = ids.take([0], axis)
        if ids.shape[axis] > 1:
            self.variables.tie(ids, first)
        return first

    def _vector(self, tensor: Channels, axis: int) -> IntArray | None:
        """The variables along one axis, made equal along all others; None where it is not known which they are."""
        if not tensor.shape:
            return tensor.ids if tensor.is_uniform or axis == tensor.axis else None
        axis %= len(tensor.shape)
        ids = tensor.ids
        for other in range(ids.ndim):
            if other != axis:
                ids = self._tie_along(ids, other)
        return np.array(np.broadcast_to(ids.ravel(), tensor.shape[axis]))

    # -- pooling, resizing and padding

    def _local(self, node: Node, given: list[Channels]) -> Channels | None:
        """Pooling, resizing and padding, which may mix places but not channels."""
        source = given[0]
        if len(given) > 1 or (node.op == "pad" and node.attributes.get("value") not in (0, None)):
            return self._stop(node, given)
        if not (node.shape and source.is_known):
            keeps = not node.shape and (source.is_uniform or (source.axis == 1 and node.op != "pad"))
            return source if keeps else None
        if source.is_uniform:
            return Channels(source.aligned(len(node.shape)), node.shape)
        if "axes" in node.attributes:
            return self._reduced(node, source)
        if len(source.shape) != len(node.shape):
            return self._mean(node, source)
        if node.op == "pad" and "widths" in node.attributes:
            return self._padded(node, source)
        ids, rank = source.ids, len(node.shape)
        changed = [axis for axis in range(rank) if source.shape[axis] != node.shape[axis]]
        for axis in range(rank):
            others = any(one != axis for one in changed)
            keeps = node.op not in POOLS or others or (rank, axis) in self._channel_axes
            if ids.shape[axis] > 1 and (axis in changed or not keeps):
                ids = self._tie_along(ids, axis)
        return Channels(ids, node.shape)

    def _reduced(self, node: Node, source: Channels) -> Channels:
        """Over whole axes, which may be dropped."""
        ids, axes = source.ids, tuple(node.attributes["axes"])
        for axis in axes:
            ids = self._tie_along(ids, axis)
        return Channels(ids if ids.ndim == len(node.shape) else ids.squeeze(axes), node.shape)

    def _padded(self, node: Node, source: Channels) -> Channels:
        """Zeros have any scale; copies have that of all that is along their axis."""
        ids = source.ids
        for axis, (before, after) in enumerate(node.attributes["widths"]):
            if ids.shape[axis] == 1 or not (before or after):
                continue
            if node.attributes.get("value") is None or min(before, after) < 0:
                ids = self._tie_along(ids, axis)
                continue
            zeros = [[one if at == axis else size for at, size in enumerate(ids.shape)] for one in (before, after)]
            first, last = (self.variables.new(prod(sizes)).reshape(sizes) for sizes in zeros)
            ids = np.concatenate([first, ids, last], axis)
        return Channels(ids, node.shape)

    def _mean(self, node: Node, source: Channels) -> Channels | None:
        """A mean, sum or maximum that drops axes: the sizes must tell which are left."""
        before, rank = source.shape, len(node.shape)
        ways = [kept for kept in combinations(range(len(before)), rank) if _sizes(before, kept) == node.shape]
        if not ways:
            return None
        ids = source.ids
        for axis in range(len(before)):
            # Where sizes do not tell, an image's channels are those that the graph says are not averaged over.
            named = len(before) > 3 and (len(before), axis) in self._channel_axes
            if ids.shape[axis] > 1 and not named and not all(axis in way for way in ways):
                ids = self._tie_along(ids, axis)
        varying = {axis for axis in range(ids.ndim) if ids.shape[axis] > 1}
        ways = [way for way in ways if varying <= set(way)]
        found = {tuple(ids.shape[axis] for axis in way) for way in ways}
        if len(found) != 1:
            return None
        return Channels(ids.reshape(found.pop()), node.shape)

    # -- what moves elements

    def _moved(self, node: Node, source: Channels, ids: IntArray | None) -> Channels | None:
        """The result; where it is not known what goes where, everything has one scale."""
        if ids is None and not source.is_known:
            return None
        if ids is None:
            self.variables.tie(source.ids, source.ids.ravel()[:1])
            ids = source.ids.ravel()[:1].reshape((1,) * len(node.shape) or (1,))
        return Channels(compress(ids), node.shape)

    def _reshape(self, node: Node, given: list[Channels]) -> Channels | None:
        source = given[0]
        if len(given) > 1:
            return None
        if not (node.shape and source.shape):
            return self._moved(node, source, None)
        return self._moved(node, source, reshape(source.ids, source.shape, node.shape))

    def _transpose(self, node: Node, given: list[Channels]) -> Channels | None:
        source, axes = given[0], node.attributes.get("axes")
        if not (node.shape and source.shape):
            return self._moved(node, source, None)
        fits = axes is not None and tuple(source.shape[axis] for axis in axes) == node.shape
        return self._moved(node, source, source.ids.transpose(axes) if fits else None)

    def _roll(self, node: Node, given: list[Channels]) -> Channels | None:
        """It does not matter what goes where along an axis with one scale."""
        source, axes = given[0], node.attributes.get("axes")
        if not axes or not node.shape or source.shape != node.shape:
            return self._moved(node, source, None)
        ids = source.ids
        for axis in axes:
            ids = self._tie_along(ids, axis)
        return Channels(ids, node.shape)

    def _pixel_shuffle(self, node: Node, given: list[Channels]) -> Channels | None:
        """All channels that become places of one, or are made of it, have its scale."""
        source, axis = given[0], node.attributes.get("channel_axis")
        if axis is None or not node.shape or not source.shape:
            return self._moved(node, source, None)
        before, after = source.shape[axis], node.shape[axis]
        ids = self._vector(source, axis)
        if ids is None or max(before, after) % min(before, after):
            return None
        if before > after:
            ids = self._tie_along(ids.reshape(after, -1), 1).ravel()
        return Channels.along(np.repeat(ids, max(1, after // before)), axis, node.shape)

    def _concat(self, node: Node, given: list[Channels]) -> Channels | None:
        axis = node.attributes.get("axis")
        if axis is None or node.attributes.get("constant"):
            return None
        if not node.shape or not all(one.shape for one in given):
            return self._concat_unknown(node, given, axis)
        rank = len(node.shape)
        axis %= rank
        given = [_with_axis(one, axis) if len(one.shape) == rank - 1 else one for one in given]
        if sum(one.shape[axis] for one in given) != node.shape[axis]:
            return self._stop(node, given, f"{node.op} {node.name!r} with a constant follows it")
        parts = [one.full(axis) for one in given]
        common = np.broadcast_shapes(*((*part.shape[:axis], 1, *part.shape[axis + 1 :]) for part in parts))
        spread = [np.broadcast_to(part, (*common[:axis], part.shape[axis], *common[axis + 1 :])) for part in parts]
        return Channels(compress(np.concatenate(spread, axis)), node.shape)

    def _concat_unknown(self, node: Node, given: list[Channels], axis: int) -> Channels | None:
        if node.shape or any(one.shape or one.axis != axis or one.is_uniform for one in given):
            return None
        return Channels(np.concatenate([one.ids for one in given]), (), axis)

    def _split(self, node: Node, given: list[Channels]) -> Channels | None:
        source, axis = given[0], node.attributes.get("axis")
        if not (node.shape and source.shape):
            return self._moved(node, source, None)
        fewer = len(source.shape) - len(node.shape)
        if axis is None or len(given) > 1 or fewer not in (0, 1):
            return self._moved(node, source, None)
        axis %= len(source.shape)
        left = list(source.shape)
        size = node.shape[axis] if not fewer else 1
        left[axis : axis + 1] = [] if fewer else [size]
        if tuple(left) != node.shape:
            return self._moved(node, source, None)
        start = self._start(node, source, axis, size)
        if start is None or source.ids.shape[axis] == 1:
            ids = self._tie_along(source.ids, axis)
        else:
            ids = source.ids.take(range(start, start + size), axis)
        return self._moved(node, source, ids.squeeze(axis) if fewer else ids)

    def _start(self, node: Node, source: Channels, axis: int, size: int) -> int | None:
        """Where a part begins; None where the graph does not tell."""
        start, index = node.attributes.get("start"), node.attributes.get("index")
        if start is None and index is not None:
            parts: dict[int | None, set[int]] = {}
            for user in self.graph.users[node.inputs[0]]:
                if user.op == "split" and user.attributes.get("axis") == node.attributes["axis"]:
                    number = user.attributes.get("index")
                    sole = len(user.shape) < len(source.shape)
                    parts.setdefault(number, set()).add(1 if sole or not user.shape else user.shape[axis])
            if index == 0 or len(node.shape) < len(source.shape):
                start = index
            elif set(parts) == set(range(len(parts))) and all(len(sizes) == 1 for sizes in parts.values()):
                # All parts are there: those before it tell where it begins.
                sizes = [next(iter(parts[number])) for number in range(len(parts))]
                start = sum(sizes[:index]) if sum(sizes) == source.shape[axis] else None
        if start is None or node.attributes.get("step", 1) != 1:
            return None
        start = start % source.shape[axis]
        return start if start + size <= source.shape[axis] else None

    # -- products of two results

    def _attention(self, node: Node, given: list[Channels]) -> Channels | None:
        """A mean of values over tokens, weighted by what query and key say."""
        if not 3 <= len(given) <= 4 or not node.shape:
            return None
        value = given[2]
        if len(value.shape) != len(node.shape) or value.shape[-1] != node.shape[-1]:
            return None
        for one in (*given[:2], *given[3:]):
            self.variables.fix(one.ids, f"the softmax of attention {node.name!r} follows it")
        ids, rank = value.ids, len(node.shape)
        tokens = node.attributes.get("tokens", rank - 2)
        for axis in range(rank - 1):
            if axis == tokens or value.shape[axis] != node.shape[axis]:
                ids = self._tie_along(ids, axis)
        return Channels(ids, node.shape)

    def _matmul(self, node: Node, given: list[Channels]) -> Channels | None:
        """A result times one that is not scaled."""
        if len(given) != 2:
            return None
        if "equation" in node.attributes:
            return self._einsum(node, given, node.attributes["equation"])
        one, other = given
        if min(len(one.shape), len(other.shape), len(node.shape)) < 2:
            return None
        if one.shape[-1] != other.shape[-2] or node.shape[-2:] != (one.shape[-2], other.shape[-1]):
            return None
        rank = len(node.shape)
        if max(one.ids.ndim, other.ids.ndim) > rank:
            return None
        if self.variables.is_fixed(one.ids):
            ids = self._tie_along(other.ids, -2)
        elif self.variables.is_fixed(other.ids):
            ids = self._tie_along(one.ids, -1)
        else:
            return None
        return Channels(ids.reshape((1,) * (rank - ids.ndim) + ids.shape), node.shape)

    def _einsum(self, node: Node, given: Sequence[Channels], equation: str) -> Channels | None:
        """The same where letters say what is summed over."""
        before, _, after = equation.partition("->")
        for letters, source, other in zip(before.split(","), given, reversed(given), strict=True):
            if len(source.shape) != len(letters) or len(node.shape) != len(after):
                return None
            if self.variables.is_fixed(other.ids):
                ids = source.ids
                for axis, letter in enumerate(letters):
                    ids = ids if letter in after else self._tie_along(ids, axis)
                ids = ids.squeeze(tuple(axis for axis, letter in enumerate(letters) if letter not in after))
                left = [letter for letter in letters if letter in after]
                ids = ids.transpose([left.index(letter) for letter in after if letter in left])
                missing = [axis for axis, letter in enumerate(after) if letter not in left]
                return Channels(np.expand_dims(ids, missing), node.shape)
        return None


def _with_axis(tensor: Channels, axis: int) -> Channels:
    """With one more axis, of size 1."""
    shape = (*tensor.shape[:axis], 1, *tensor.shape[axis:])
    return Channels(np.expand_dims(tensor.ids, axis), shape)


def _sizes(shape: Sequence[int], axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(shape[axis] for axis in axes)
