"""Which inputs of an ONNX node are weights, and where in them its output channels are: one rule for each operator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import Any

import numpy as np

from qvis.adapters.encodings import Array
from qvis.adapters.matrices import Part, along
from qvis.adapters.values import Grid, Value, dequantize
from qvis.words import count


@dataclass(frozen=True)
class Node:
    """One node of a graph, with the attributes that the call of a function gives it filled in."""

    op: str
    domain: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    """The ``AttributeProto`` of each name."""
    metadata: Mapping[str, str] = field(default_factory=dict)

    def integer(self, name: str, default: int) -> int:
        """An attribute that is an integer."""
        return int(self.attributes[name].i) if name in self.attributes else default

    def integers(self, name: str) -> list[int] | None:
        """An attribute that is a list of integers, None where it is absent."""
        return [int(one) for one in self.attributes[name].ints] if name in self.attributes else None

    def text(self, name: str) -> str:
        """An attribute that is a string."""
        return str(self.attributes[name].s, "utf-8", "replace") if name in self.attributes else ""


Inputs = Sequence["Value | None"]
Rule = Callable[[Node, Inputs], Iterable[Part]]
"""(a node, its inputs where they are constant) -> its weights; nothing for one that it does not understand."""


def _get(inputs: Inputs, index: int, axes: int = 2) -> Value | None:
    """The input when it is a constant of real numbers with at least so many axes."""
    value = inputs[index] if index < len(inputs) else None
    return value if value is not None and value.floating and len(value.shape) >= axes else None


def _first_axis(node: Node, inputs: Inputs, index: int) -> Iterable[Part]:  # noqa: ARG001
    value = _get(inputs, index)
    return [] if value is None else [along(value, [0])]


def _transposed(node: Node, inputs: Inputs, index: int) -> Iterable[Part]:
    value, groups = _get(inputs, index), node.integer("group", 1)
    if value is None or groups < 1 or value.shape[0] % groups:
        return []
    words = value.axis_name(1)
    view = partial(_transposed_rows, groups=groups)
    return [Part(value, view, words if groups == 1 else f"groups x {words}")]


def _transposed_rows(array: Array, groups: int) -> Array:
    """``(in, out/groups, ...) -> (out, in/groups * ...)``."""
    grouped: Array = array.reshape(groups, array.shape[0] // groups, *array.shape[1:]).swapaxes(1, 2)
    return grouped.reshape(groups * array.shape[1], -1 if array.size else 0)


def _gemm(node: Node, inputs: Inputs, second: int = 1) -> Iterable[Part]:
    right, left = _get(inputs, second), _get(inputs, 0)
    if right is not None:
        return [along(right, [0 if node.integer("transB", 0) else 1])]
    return [] if left is None else [along(left, [1 if node.integer("transA", 0) else 0])]


def _matmul(node: Node, inputs: Inputs, second: int = 1) -> Iterable[Part]:
    """Each matrix of a stack makes its own output channels."""
    right, left = _get(inputs, second), _get(inputs, 0)
    if right is not None:
        return [along(right, [*_stack(right), -2 if node.integer("transB", 0) else -1])]
    return [] if left is None else [along(left, [*_stack(left), -1 if node.integer("transA", 0) else -2])]


def _stack(value: Value) -> list[int]:
    return [axis for axis in range(len(value.shape) - 2) if value.shape[axis] > 1]


def _gather(node: Node, inputs: Inputs) -> Iterable[Part]:
    """An embedding, when rows of it are chosen by what flows through the graph."""
    value = _get(inputs, 0)
    chosen = inputs[1] if len(inputs) > 1 else None
    if value is None or chosen is not None or node.integer("axis", 0) not in (0, -len(value.shape)):
        return []
    return [along(value, [0])]


def _embeddings(node: Node, inputs: Inputs) -> Iterable[Part]:  # noqa: ARG001
    found = ((_get(inputs, index), label) for index, label in ((2, "word"), (3, "position"), (4, "segment")))
    return [along(value, [0], label) for value, label in found if value is not None]


def _einsum(node: Node, inputs: Inputs) -> Iterable[Part]:
    """The axes of the weight that the result still has."""
    left, arrow, result = node.text("equation").replace(" ", "").partition("->")
    terms = left.split(",")
    constant = [index for index in range(len(inputs)) if _get(inputs, index) is not None]
    if not arrow or len(terms) != len(inputs) or len(constant) != 1 or len(inputs) < 2:
        return []
    value, term = inputs[constant[0]], terms[constant[0]]
    if value is None or len(term) != len(value.shape) or "." in term:
        return []
    axes = [axis for axis, letter in enumerate(term) if letter in result]
    return [along(value, axes)] if axes else []


GATES = {"LSTM": "iofc", "GRU": "zrh", "RNN": "", "DynamicQuantizeLSTM": "iofc"}
"""In the order in which they are stored."""


def _recurrent(node: Node, inputs: Inputs) -> Iterable[Part]:
    """``W (directions, gates * hidden, in)`` and ``R (directions, gates * hidden, hidden)``."""
    across = node.op == "DynamicQuantizeLSTM"  # which stores its matrices the other way round
    for index, label in ((1, "W"), (2, "R")):
        value = _get(inputs, index, axes=3)
        if value is not None and len(value.shape) == 3:
            yield from _gates(value, label, GATES[node.op], across, node.text("direction"))


def _gates(value: Value, label: str, gates: str, across: bool, direction: str) -> Iterable[Part]:
    axis = 2 if across else 1
    directions, parts = value.shape[0], max(1, len(gates))
    if directions not in (1, 2) or value.shape[axis] % parts:
        return
    shape = (value.shape[axis] // parts, value.shape[3 - axis])
    names = ("forward", "backward") if directions == 2 else ("backward" if direction == "reverse" else "",)
    for way, name in enumerate(names):
        for part in range(parts):
            view = partial(_gate, way=way, part=part, parts=parts, across=across)
            words = value.axis_name(axis) + (f", part {part + 1} of {parts}" if parts > 1 else "")
            yield Part(value, view, words, ".".join(filter(None, (label, name, gates[part : part + 1]))), shape)


def _gate(array: Array, way: int, part: int, parts: int, across: bool) -> Array:
    matrix: Array = array[way].T if across else array[way]
    size = matrix.shape[0] // parts
    return matrix[part * size : (part + 1) * size]


def _attention(node: Node, inputs: Inputs) -> Iterable[Part]:
    """``weights (in, q + k + v)`` of onnxruntime's fused attention."""
    value = _get(inputs, 1)
    if value is None or len(value.shape) != 2:
        return
    sizes = node.integers("qkv_hidden_sizes") or [value.shape[1] // 3] * 3
    if len(sizes) != 3 or min(sizes) < 0 or sum(sizes) != value.shape[1]:
        return
    for part, label in enumerate("qkv"):
        start = sum(sizes[:part])
        view = partial(_columns, start=start, end=start + sizes[part])
        yield Part(value, view, f"{value.axis_name(1)}, part {part + 1} of 3", label, (value.shape[0], sizes[part]))


def _columns(array: Array, start: int, end: int) -> Array:
    columns: Array = array.T[start:end]
    return columns


# ---------------------------------------------------------------------------------------------------------------------
# Operators that take integers together with their scales


def _quantized(rule: Rule, weight: int, scale: int, zero: int, axis: int = -1) -> Rule:
    """The rule for a node that gets the scale and the zero point of its weight as inputs of its own."""

    def apply(node: Node, inputs: Inputs) -> Iterable[Part]:
        value, scales = (_any(inputs, index) for index in (weight, scale))
        if value is None or scales is None or value.floating or not value.shape:
            return []
        found = dequantize(value, Grid(scales, _any(inputs, zero), axis))
        return [] if found is None else rule(node, [*inputs[:weight], found, *inputs[weight + 1 :]])

    return apply


def _any(inputs: Inputs, index: int) -> Value | None:
    return inputs[index] if 0 <= index < len(inputs) else None


def _quantized_gemm(node: Node, inputs: Inputs) -> Iterable[Part]:
    axis = 0 if node.integer("transB", 0) else 1
    return _quantized(partial(_gemm, second=3), 3, 4, 5, axis)(node, inputs)


def _quantized_lstm(node: Node, inputs: Inputs) -> Iterable[Part]:
    """Scales are one for each direction, or one for each column of it."""
    inputs = list(inputs)
    for weight, scale, zero in ((1, 8, 9), (2, 10, 11)):
        value, scales, zeros = (_any(inputs, index) for index in (weight, scale, zero))
        if value is None or scales is None or len(value.shape) != 3:
            continue
        directions, _, columns = value.shape
        shape = (directions, 1, scales.shape[1] if len(scales.shape) == 2 else 1)
        if shape[2] not in (1, columns) or prod(scales.shape) != prod(shape):
            continue
        spread = _spread(scales, shape, value.shape)
        spread_zeros = None if zeros is None else _spread(zeros, shape, value.shape)
        found = dequantize(value, Grid(spread, spread_zeros))
        note = f"{value.tensor.type}, dequantized with {count(prod(scales.shape), 'scale')}"
        inputs[weight] = None if found is None else replace(found, notes=(note,))
    return _recurrent(node, inputs)


def _spread(value: Value, shape: tuple[int, ...], whole: tuple[int, ...]) -> Value:
    """Scales as many as the weights have them, for a tensor that needs them along two axes."""

    def read() -> Array:
        return np.broadcast_to(value.read().reshape(shape), whole)

    return Value(value.tensor, value.key, read, whole, (None,) * len(whole), value.floating)


def _packed(node: Node, inputs: Inputs) -> Iterable[Part]:
    """``MatMulNBits``: B (N, blocks, bytes) with K numbers of 2, 4 or 8 bits in each row."""
    packed, scales, zeros = (_any(inputs, index) for index in (1, 2, 3))
    rows, columns = node.integer("N", 0), node.integer("K", 0)
    bits, block = node.integer("bits", 4), node.integer("block_size", 0)
    if packed is None or scales is None or not scales.floating or _any(inputs, 4) is not None:
        return []
    if bits not in (2, 4, 8) or block < 16 or min(rows, columns) < 1 or packed.tensor.type != "uint8":
        return []
    blocks, size = -(-columns // block), block * bits // 8
    zeros_size = rows * (-(-blocks * bits // 8) if zeros is not None and not zeros.floating else blocks)
    if prod(packed.shape) != rows * blocks * size or prod(scales.shape) != rows * blocks:
        return []
    if zeros is not None and (prod(zeros.shape) != zeros_size or not (zeros.floating or zeros.tensor.type == "uint8")):
        return []

    def read() -> Array:
        numbers = _unpack(packed.read().reshape(rows, -1), bits).reshape(rows, blocks, block).astype(np.float32)
        if zeros is None:
            numbers -= 2 ** (bits - 1)
        else:
            zero = zeros.read().reshape(rows, -1)
            zero = zero if zeros.floating else _unpack(zero, bits)[:, :blocks]
            numbers -= zero.astype(np.float32)[:, :, None]
        numbers *= scales.read().astype(np.float32).reshape(rows, blocks, 1)
        return numbers.reshape(rows, -1)[:, :columns]

    kind = "symmetric" if zeros is None else "with zero points"
    note = f"uint{bits}, dequantized with {rows * blocks:,} scales of {block} weights each ({kind})"
    value = Value(packed.tensor, packed.key, read, (rows, columns), (0, None), True, (note,))
    return [along(value, [0])._replace(shape=(rows, columns))]


def _unpack(rows: Array, bits: int) -> Array:
    """Each byte's numbers, those in its lowest bits first."""
    if bits == 8:
        return rows
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    numbers: Array = ((rows[:, :, None] >> shifts) & (2**bits - 1)).reshape(rows.shape[0], -1)
    return numbers


_STANDARD: dict[str, Rule] = {
    "Conv": partial(_first_axis, index=1),
    "DeformConv": partial(_first_axis, index=1),
    "ConvTranspose": partial(_transposed, index=1),
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Gather": _gather,
    "Einsum": _einsum,
    "LSTM": _recurrent,
    "GRU": _recurrent,
    "RNN": _recurrent,
    "ConvInteger": partial(_first_axis, index=1),
    "MatMulInteger": _matmul,
    "QLinearConv": _quantized(partial(_first_axis, index=3), 3, 4, 5, 0),
    "QLinearMatMul": _quantized(partial(_matmul, second=3), 3, 4, 5),
}
_ONNXRUNTIME: dict[str, Rule] = {
    "FusedConv": partial(_first_axis, index=1),
    "NhwcConv": partial(_first_axis, index=1),
    "NhwcFusedConv": partial(_first_axis, index=1),
    "FusedMatMul": _matmul,
    "TransposeMatMul": _matmul,
    "FusedGemm": _gemm,
    "GemmFastGelu": _matmul,
    "Attention": _attention,
    "EmbedLayerNormalization": _embeddings,
    "QGemm": _quantized_gemm,
    "QAttention": _quantized(_attention, 1, 4, 7),
    "MatMulIntegerToFloat": _quantized(_matmul, 1, 3, 5),
    "DynamicQuantizeMatMul": _quantized(_matmul, 1, 2, 3),
    "DynamicQuantizeLSTM": _quantized_lstm,
    "MatMulNBits": _packed,
}
RULES: dict[str, dict[str, Rule]] = {
    "": _STANDARD,
    "ai.onnx": _STANDARD,
    "com.microsoft": _ONNXRUNTIME,
    "com.microsoft.nchwc": {},
}
"""By the operator's domain and its name."""
