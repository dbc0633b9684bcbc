"""What ONNX operators that move elements, or take parts, are in the words that all adapters share."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np

from qvis.adapters.encodings import Array
from qvis.adapters.onnx.prepared import Prepared
from qvis.adapters.onnx.protos import attribute

Word = tuple[str, dict[str, Any]]
"""A word of :data:`qvis.layers.OPS`, or the operator's own, and the attributes."""


@dataclass
class Moving:
    """Rules for such operators, and what they know of values; a rule returns None for what there is no word for."""

    prepared: Prepared
    shapeless: list[str] = field(default_factory=list)
    """The values whose shapes are not known."""
    computed: list[str] = field(default_factory=list)
    """Sizes and places that are not known, since they are computed."""
    makers: dict[str, str] = field(default_factory=dict)
    """The node that a value comes from; of what flows from the inputs of the model."""
    channels: dict[str, int] = field(default_factory=dict)
    """The axis of a value's channels, where it is known."""

    # -- parts

    def gather(self, node: Any, inputs: list[str]) -> Word | None:
        if node.input[0] not in inputs or node.input[1] in inputs:
            return None
        axis, held = attribute(node, "axis", 0), self.number(node.input[1])
        index = np.zeros(0, np.int64) if held is None or held.ndim > 1 else held.reshape(-1)
        is_run = index.size > 0 and bool(np.all(np.diff(index) == 1)) and (index[0] >= 0 or index.size == 1)
        return "split", {"axis": axis, "start": int(index[0]), "step": 1} if is_run else {"axis": axis}

    def slice(self, node: Any, inputs: list[str]) -> Word | None:
        """A part along one axis, where all others stay whole."""
        starts, ends, axes, steps = (
            self.integers(node, slot, name) for slot, name in enumerate(("starts", "ends", "axes", "steps"), 1)
        )
        if starts is None or ends is None:
            axis = axes[0] if axes is not None and len(axes) == 1 else None
            return "split", {"axis": axis}
        axes = list(range(len(starts))) if axes is None else axes
        steps = [1] * len(starts) if steps is None else steps
        if not len(starts) == len(ends) == len(axes) == len(steps):
            return None
        sizes = self.prepared.shape_of(inputs[0]) or ()
        parts: list[tuple[int, int | None, int]] = []
        for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
            size = sizes[axis] if sizes else None
            first: int | None = start if start >= 0 else None
            if size is not None:
                first = max(0, start + size) if start < 0 else min(start, size)
            is_whole = first == 0 and step == 1 and end >= (2**31 - 1 if size is None else size)
            parts += [] if is_whole else [(axis, first, step)]
        if not parts:
            return "identity", {}
        axis, first, step = parts[0]
        if len(parts) > 1:
            return "split", {"axis": None}
        return "split", {"axis": axis, "step": step, **({} if first is None else {"start": first})}

    def split(self, node: Any, inputs: list[str]) -> Word | None:  # noqa: ARG002
        return "split", {"axis": attribute(node, "axis", 0)}

    def starts(self, node: Any) -> dict[str, dict[str, int]]:
        """Where each part of a Split begins, by the names of its results."""
        axis, whole = attribute(node, "axis", 0), self.prepared.shape_of(node.input[0])
        sizes = self.integers(node, 1, "split")
        if sizes is None and not any(node.input[1:]) and whole is not None:
            size, count = whole[axis], attribute(node, "num_outputs", len(node.output))
            sizes = None if size is None else [-(-size // count)] * count
        if sizes is None or len(sizes) != len(node.output):
            return {}
        return {name: {"start": sum(sizes[:place]), "step": 1} for place, name in enumerate(node.output) if name}

    # -- the same elements in other places, or more of them

    def expand(self, node: Any, inputs: list[str]) -> Word | None:
        """Repeating places is what enlarging an image by its nearest pixels does too."""
        rank = self.rank(inputs[0])
        return None if rank is None or rank != self.rank(node.output[0]) else ("resize", {})

    def reshape(self, node: Any, inputs: list[str]) -> Word | None:
        """A flatten where all axes from one on became the last."""
        before, after = self.prepared.shape_of(inputs[0]), self.prepared.shape_of(node.output[0])
        if before is not None and after and 0 < len(after) < len(before):
            start = len(after) - 1
            merged = before[start:]
            if None not in merged and after[-1] == prod(size for size in merged if size is not None):
                return "flatten", {"start": start}
        if node.op_type == "Flatten" and attribute(node, "axis", 1) == 1:
            return "flatten", {"start": 1}
        return "reshape", {}

    def transpose(self, node: Any, inputs: list[str]) -> Word | None:
        rank = self.rank(inputs[0])
        order = attribute(node, "perm", None if rank is None else range(rank - 1, -1, -1))
        return None if order is None else ("transpose", {"axes": tuple(order)})

    def concat(self, node: Any, inputs: list[str]) -> Word | None:
        return "concat", {"axis": attribute(node, "axis", 0), "constant": len(inputs) < len(node.input)}

    def pad(self, node: Any, inputs: list[str]) -> Word | None:  # noqa: ARG002
        if attribute(node, "mode", "constant") != "constant":
            return "pad", {"value": None}
        held = self.number(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        return "pad", {"value": attribute(node, "value", 0.0) if held is None else float(held.reshape(-1)[0])}

    def mean(self, node: Any, inputs: list[str]) -> Word | None:
        """The mean or the largest over axes that are not the channels."""
        rank, channels = self.rank(inputs[0]), self.channels.get(inputs[0])
        axes = self.integers(node, 1, "axes")
        if rank is None or channels is None or not axes or channels % rank in {axis % rank for axis in axes}:
            return None
        return "max_pool" if node.op_type == "ReduceMax" else "avg_pool", {}

    # -- what is known of values

    def shape(self, name: str) -> tuple[int, ...]:
        sizes = self.prepared.shape_of(name)
        if sizes is None or None in sizes:
            self.shapeless.append(name)
            return ()
        return tuple(size for size in sizes if size is not None)

    def rank(self, name: str) -> int | None:
        sizes = self.prepared.shape_of(name)
        return None if sizes is None else len(sizes)

    def number(self, name: str) -> Array | None:
        """The numbers of a small constant, which may have been cast or reshaped, or was measured."""
        if name in self.prepared.numbers:
            return self.prepared.numbers[name]
        if name not in self.makers:
            found = self._constant(name)
            self.computed += [name] if found is None else []
            return found
        return None

    def _constant(self, name: str) -> Array | None:
        import onnx

        for _ in range(5):
            if name in self.prepared.constants:
                return self.prepared.read(name)
            node = self.prepared.nodes.get(name)
            if node is None or not (node.op_type == "Constant" or node.input):
                return None
            if node.op_type == "Constant":
                value = onnx.helper.get_attribute_value(node.attribute[0])
                return onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.array(value)
            if node.op_type not in ("Cast", "CastLike", "Identity", "Reshape", "Squeeze", "Unsqueeze"):
                return None
            name = node.input[0]
        return None

    def integers(self, node: Any, slot: int, name: str) -> list[int] | None:
        """A list that is an attribute in older versions of an operator, and an input in later ones."""
        if len(node.input) > slot and node.input[slot]:
            held = self.number(node.input[slot])
            return None if held is None else [int(one) for one in held.reshape(-1)]
        given = attribute(node, name, None)
        return None if given is None else [int(one) for one in given]
