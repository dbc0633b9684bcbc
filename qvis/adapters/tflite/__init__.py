"""Reads TensorFlow Lite models: as data and with NumPy alone, no interpreter is started and nothing is computed.

Quantized weights are shown as the numbers they stand for, with the grid they are stored on in the layer's notes.
"""

from __future__ import annotations

import struct
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import NoReturn

import numpy as np

from qvis.adapters.matrices import Part, along
from qvis.adapters.matrices import layer as layer_of
from qvis.adapters.tflite import names
from qvis.adapters.tflite.flatbuffer import Table
from qvis.adapters.tflite.operators import OPERATORS
from qvis.adapters.tflite.parts import RULES, Operator
from qvis.adapters.values import Grid, Loader, Tensor, Value, dequantize, mapped, reshape, transpose
from qvis.errors import BadArgumentError, NotRunnableError, QvisError
from qvis.layers import Layer, Network, Skipped

_MALFORMED = (ArithmeticError, LookupError, OSError, TypeError, ValueError, struct.error)
"""What comes of reading bytes that are not what they should be."""


def handles(model: object) -> bool:
    """Whether ``model`` is the path of a TensorFlow Lite file, by the mark in it or by its name."""
    if not isinstance(model, Path) or not model.is_file():
        return False
    with model.open("rb") as file:
        return file.read(8)[4:] == b"TFL3" or model.suffix.lower() == ".tflite"


def read(path: Path) -> Network:
    """List the weights of a TensorFlow Lite model in the order in which its operators use them.

    Raises
    ------
    BadArgumentError
        The file is damaged, or no TensorFlow Lite model.
    """
    walk = walked(path)
    return Network(path.stem, "TensorFlow Lite", walk.finish(), tuple(walk.skipped.values()), walk.parameters())


def walked(path: Path) -> Walk:
    """Walk all graphs of a file; see :func:`read`."""
    try:
        data = mapped(path, 0, path.stat().st_size)
        if not data:
            raise BadArgumentError(f"model: the file {str(path)!r} is empty")
        if bytes(data[4:8]) != b"TFL3":
            raise ValueError("it lacks the mark TFL3")
        model = Table.root(data)
        if model.number(0, "I") != 3:
            raise ValueError(f"it is of version {model.number(0, 'I')}, and only 3 is known")
        walk = Walk(path, len(data), model)
        for graph in model.tables(2):
            walk.graph(graph)
        return walk
    except QvisError:
        raise
    except _MALFORMED as error:
        raise BadArgumentError(
            f"model: {str(path)!r} is no TensorFlow Lite model, or was cut short ({error}); convert the model anew"
        ) from error


def runner(model: Path, network: Network, loss: object = None) -> NoReturn:  # noqa: ARG001
    """A .tflite model cannot be run here.

    Raises
    ------
    NotRunnableError
        Always, with what to give instead.
    """
    raise NotRunnableError(
        "model: a .tflite file can be read, but not run on other weights or differentiated here; give the Keras model "
        "or the ONNX file that it was made from"
    )


TYPES = {
    0: "float32",
    1: "float16",
    2: "int32",
    3: "uint8",
    4: "int64",
    5: "string",
    6: "bool",
    7: "int16",
    8: "complex64",
    9: "int8",
    10: "float64",
    11: "complex128",
    12: "uint64",
    13: "resource",
    14: "variant",
    15: "uint32",
    16: "uint16",
    17: "int4",
    18: "bfloat16",
    19: "int2",
    20: "uint4",
    21: "float8_e4m3fn",
    22: "float8_e5m2",
}
"""What TensorFlow Lite's numbers for types mean."""


@dataclass
class Walk:
    """What is gathered from the graphs of a model."""

    path: Path
    size: int
    model: Table
    layers: dict[Hashable, Layer] = field(default_factory=dict)
    skipped: dict[str, Skipped] = field(default_factory=dict)
    constants: dict[Hashable, Value] = field(default_factory=dict)
    """All constants that an operator uses."""
    ruled: set[Hashable] = field(default_factory=set)
    others: list[tuple[Hashable, Value]] = field(default_factory=list)
    order: list[Hashable] = field(default_factory=list)
    taken: set[str] = field(default_factory=set)
    uses: dict[int, list[Hashable]] = field(default_factory=dict)
    """The keys in :attr:`layers` of the weights that an operator uses, by its place in the model."""
    operators: int = 0
    """How many were walked."""

    def __post_init__(self) -> None:
        self.buffers = self.model.tables(4)
        self.codes = [_operator_name(code) for code in self.model.tables(1)]

    def graph(self, graph: Table) -> None:
        """Walk one of the model's graphs; their constants may share buffers."""
        tensors = graph.tables(0)
        values: dict[int, Value | None] = {}

        def find(index: int) -> Value | None:
            if index not in values:
                value = self._constant(tensors[index]) if 0 <= index < len(tensors) else None
                value = value and self._real(tensors, tensors[index], value)
                values[index] = value
                if value is not None:
                    self.constants.setdefault(value.key, value)
            return values[index]

        titles = [tensor.text(3) for tensor in tensors]
        for table in graph.tables(3):
            inputs, outputs = (tuple(table.numbers(number, "<i4")) for number in (1, 2))
            operator = Operator(self.codes[table.number(0, "I")], inputs, outputs, table.table(4))
            self.operators += 1
            given = [find(index) for index in inputs]
            passed = _pass_on(operator, given)
            if passed is not None and outputs:
                values[outputs[0]] = passed
                continue
            self._use(operator, given, [titles[index] for index in outputs if 0 <= index < len(titles)])

    # -----------------------------------------------------------------------------------------------------------------
    # Constants

    def _constant(self, table: Table) -> Value | None:
        """A tensor that has numbers in the file, as they are stored."""
        where = table.number(2, "I")
        kind = TYPES.get(table.number(1, "b"), f"number {table.number(1, 'b')}")
        shape = tuple(table.numbers(0, "<i4"))
        if where == 0 or min(shape, default=0) < 0 or table.number(5, "b"):
            return None
        start, end = self.span(self.buffers[where])
        if start == end:
            return None
        name = table.text(3)
        if table.table(6) is not None:
            self.skipped[name] = Skipped(name, "is a sparse tensor")
            return None
        tensor = Tensor(name, shape, kind, _loader(self.path, start, end))
        if tensor.encoding is not None and tensor.encoding.bytes_for(tensor.size) > end - start:
            raise ValueError(f"the tensor {name!r} of shape {shape} holds {end - start} bytes, which is too few")
        return Value.of(tensor, (where, shape))

    def _real(self, tensors: list[Table], table: Table, value: Value) -> Value:
        """The constant dequantized, where the tensor says how."""
        quantization = table.table(4)
        grid = None if quantization is None or value.floating else self._grid(tensors, quantization, value)
        return value if grid is None else dequantize(value, grid) or value

    def span(self, buffer: Table) -> tuple[int, int]:
        """Where in the file the numbers of a buffer begin and end."""
        start, count = buffer.vector(0, 1)
        offset, size = buffer.number(1, "Q"), buffer.number(2, "Q")
        if offset > 1:  # in a file of more than 2 GB, behind the part that FlatBuffers can reach
            start, count = offset, size
        if start + count > self.size:
            raise ValueError(f"its numbers reach {start + count - self.size} bytes beyond its end")
        return start, start + count

    def _grid(self, tensors: list[Table], table: Table, value: Value) -> Grid | None:
        details = table.table(5)
        if table.number(4, "B") == 2 and details is not None:
            return self._blocks(tensors, details, value)
        scales, zeros = table.numbers(2, "<f4"), table.numbers(3, "<i8")
        if not scales or table.number(4, "B"):
            return None
        axis = table.number(6, "i")
        return Grid(_held(scales, "<f4"), _held(zeros, "<i8") if any(zeros) else None, axis)

    def _blocks(self, tensors: list[Table], details: Table, value: Value) -> Grid | None:
        """Scales that are tensors themselves, one for each block along the last axis."""
        places = [details.number(number, "i", -1) for number in (0, 1)]
        scales, zeros = (self._constant(tensors[one]) if 0 <= one < len(tensors) else None for one in places)
        block = details.number(2, "i")
        if scales is None or block < 1 or not value.shape or value.shape[-1] % block:
            return None
        shape = (*value.shape[:-1], value.shape[-1] // block)
        spread = reshape(scales, shape)
        zero = None if zeros is None else reshape(zeros, shape)
        return None if spread is None else Grid(spread, zero, len(shape) - 1, block)

    # -----------------------------------------------------------------------------------------------------------------
    # Weights

    def _use(self, operator: Operator, inputs: list[Value | None], outputs: list[str]) -> None:
        if operator.op == "FULLY_CONNECTED" and operator.flag(1) and inputs[1:2] != [None]:
            name = names.choose(inputs[1].tensor.name if len(inputs) > 1 and inputs[1] else "", outputs)
            self.skipped[name] = Skipped(name, "is stored in an order made for one kind of processor")
            return
        rule = RULES.get(operator.op)
        parts = list(rule(operator, inputs)) if rule is not None else []
        for part in parts:
            if prod(part.value.shape):
                self._add(operator.op, part, outputs)
        if rule is None and operator.op not in ("WHILE", "IF"):
            for value in inputs:
                if value is not None:
                    self.others.append((value.key, value))
                    self.order.append((value.key, None))

    def _add(self, op: str, part: Part, outputs: list[str]) -> None:
        key = (part.value.key, part.label)
        self.uses.setdefault(self.operators - 1, []).append(key)
        name = names.choose(part.value.tensor.name, outputs) + (f".{part.label}" if part.label else "")
        known = self.layers.get(key)
        if known is None:
            self.ruled.add(part.value.key)
            self.order.append(key)
            self.layers[key] = layer_of(self._unique(name), op, part)
            return
        if name in self.taken:
            name = names.clean(outputs[0]) if outputs else name
        if name not in self.taken:
            self.taken.add(name)
            self.layers[key] = replace(known, aliases=(*known.aliases, name))

    def _unique(self, name: str) -> str:
        numbered = (f"{name}#{number}" for number in range(2, len(self.taken) + 3))
        chosen = next(one for one in (name, *numbered) if one not in self.taken)
        self.taken.add(chosen)
        return chosen

    def finish(self) -> tuple[Layer, ...]:
        """All layers in the order in which the operators use them."""
        others = dict(reversed(self.others))
        found: dict[Hashable, Layer] = {}
        for key in self.order:
            if key in self.layers:
                found[key] = self.layers[key]
            elif isinstance(key, tuple) and key[0] in others and key[0] not in self.ruled and key not in found:
                value = others[key[0]]
                if _is_matrix(value):
                    found[key] = layer_of(self._unique(value.tensor.name or "(unnamed)"), "other", along(value, [0]))
        return tuple(found.values())

    def parameters(self) -> int:
        """How many numbers the constants hold that are real, or stand for real ones."""
        return sum(value.tensor.size for value in self.constants.values() if value.floating and value.shape)


def _operator_name(code: Table) -> str:
    number = max(code.number(0, "b"), code.number(3, "i"))
    return OPERATORS.get(number, code.text(1) or f"operator {number}")


def _loader(path: Path, start: int, end: int) -> Loader:
    return partial(mapped, path, start, end)


def _held(numbers: list[float], dtype: str) -> Value:
    array = np.array(numbers, dtype=dtype)
    kind = "float32" if dtype == "<f4" else "int64"
    return Value.of(Tensor("", array.shape, kind, lambda: array), ("held", id(array)))


def _pass_on(operator: Operator, inputs: list[Value | None]) -> Value | None:
    """What an operator makes of a constant; None for one that uses it."""
    value = inputs[0] if inputs else None
    if value is None:
        return None
    if operator.op in ("DEQUANTIZE", "CAST"):
        return value if value.floating else None
    if operator.op == "TRANSPOSE" and len(inputs) > 1 and inputs[1] is not None:
        return transpose(value, inputs[1].small())
    if operator.op == "RESHAPE" and len(inputs) > 1 and inputs[1] is not None:
        return reshape(value, inputs[1].small(), keep_zero=True)
    return None


def _is_matrix(value: Value) -> bool:
    """Whether a constant that no rule knows is worth a line: not a row, not a mask, and not a state of zeros."""
    if not value.floating or sum(size > 1 for size in value.shape) < 2 or 0 in value.shape:
        return False
    array = value.read()
    return bool(array.any()) and not (bool((array <= -1e4).any()) and not bool((array > 0).any()))
